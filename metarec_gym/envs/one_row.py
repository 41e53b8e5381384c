"""The step of `MetaRecVectorEnv` for one user: the same numbers from a tenth of the calls.

A call of torch costs microseconds however few numbers it handles, and a step makes some four hundred. Here whole numbers,
products and additions of one row are numpy's, on views of the batch's own state. What rounds by its order or by its vector
unit (sums, matrix products, exp, log, tanh) stays torch's, on blocks laid out as the batch has them, so that every bit is the
batch's (`tests/test_one_row.py`). Settings that are rare or dear (episodes of several sessions, outages, fatigue, pair noise,
logged answers) are left to the batch. The privileged `expected_reward`, which a single environment does not offer, is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from metarec_gym.envs.dynamics import LEAVE_DRAW, plan
from metarec_gym.envs.user_state import UserState
from metarec_gym.response.frozen import ROW_MULTIPLE, FrozenResponse
from metarec_gym.seeding import fold_in_one, uniform_of

if TYPE_CHECKING:
    from metarec_gym.envs.vector_env import MetaRecVectorEnv

Floats = NDArray[np.float32]
Step = tuple[Floats, float, bool, bool, dict[str, Any]]


class _Block:
    """Memory of one row in the layout that the batch has it: a tensor of 16 rows, and its first row as an array.

    Args:
        *shape: Of the row.
    """

    def __init__(self, *shape: int) -> None:
        self.whole = torch.zeros(ROW_MULTIPLE, *shape)
        self.row: Floats = self.whole.numpy()[0]

    def sum(self, values: Any, *dims: int) -> Any:
        """Sum of `values` over dimensions of the batch; an array without them, or a float32."""
        self.row[...] = values
        return self.whole.sum(dim=dims).numpy()[0]


class _Numbers:
    """Memory for `size` numbers that go through exp, log or tanh: whole blocks, whose vector unit leaves no remainder."""

    def __init__(self, *shape: int) -> None:
        size = math.prod(shape)
        self.whole = torch.zeros(size + -size % ROW_MULTIPLE)
        self._size, self._shape = size, shape
        self.row: Floats = self.whole.numpy()[:size].reshape(shape)

    def through(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Floats:
        """What the function makes of `row`."""
        made: Floats = function(self.whole).numpy()[: self._size].reshape(self._shape)
        return made


class OneRow:
    """Steps the only row of a batch.

    Args:
        batch: An environment of one row in disabled-reset mode for which `can_step` holds.
    """

    def __init__(self, batch: MetaRecVectorEnv) -> None:
        tables, judge = batch._tables, batch._judge
        if not isinstance(judge, FrozenResponse):
            raise TypeError(f"the judge is a {type(judge).__name__}, expected a FrozenResponse; ask can_step first")
        self._batch, self._tables, self._judge, self._slate_size = batch, tables, judge, batch.slate_size
        self._kind, strategies = batch.config.action, batch.world.n_strategies
        self._outcomes = len(batch.world.outcomes)
        self._lists, self._item_profile = tables.lists.numpy(), tables.item_profile.numpy()
        self._weights, self._cost, self._latency = (
            x.numpy() for x in (tables.outcome_weights, tables.cost, tables.latency)
        )
        self._outcome_ids = np.arange(self._outcomes)
        self._state: UserState | None = None
        self._obs: Floats = np.zeros(batch.single_observation_space.shape or (), dtype=np.float32)
        self._seen = {name: self._obs[where] for name, where in batch.feature_slices.items()}
        # the judge's tables
        t = judge.tensors
        self._table, self._items = judge._table.numpy(), t["item_input"].numpy()
        self._trend: Floats | None = None
        gate = t["position_logit"][: self._slate_size].numpy()
        self._gate_offsets = [gate, tables.gate_offset.numpy()] if tables.shifts_gate else [gate]
        self._leaving = t["leaving"].numpy()
        # d^m for 0, 1 .. slate_size items taken
        taken = torch.arange(self._slate_size + 1 + (-self._slate_size - 1) % ROW_MULTIPLE, dtype=torch.float32)
        kept = torch.exp(taken[:, None] * judge._log_decays)
        self._kept, self._gain = kept.numpy(), ((1.0 - t["decays"]) * kept).numpy()
        # blocks for what stays torch's
        size, outcomes = self._slate_size, self._outcomes
        self._inputs = _Block(judge.state_dim)
        self._user = np.ones((outcomes, self._table.shape[2]), dtype=np.float32)
        self._products, self._product_sum = self._pair(size, outcomes, self._table.shape[2])
        self._vectors, self._vector_sum = self._pair(judge.n_decays + 1, size, judge.dim)
        self._taken_profile, self._profile_sum = self._pair(1, size, self._item_profile.shape[1])
        self._exp, self._number, self._parts = _Numbers(size, outcomes), _Numbers(1), _Block(outcomes)
        self._worth, self._own, self._asked = _Block(size, outcomes), _Block(size, strategies), _Block(strategies)
        self._log1p, self._tanh = _Numbers(strategies + 1), _Numbers(strategies + 1)
        categories = self._item_profile.shape[1] - tables.n_taste - 1
        self._share, self._entropy = _Numbers(categories), _Block(categories)

    def __reduce__(self) -> tuple[Any, ...]:
        # the arrays are views of the tensors; a copy made of both would tear them apart
        return OneRow, (self._batch,)

    @staticmethod
    def _pair(*shape: int) -> tuple[Floats, torch.Tensor]:
        block = torch.zeros(*shape)
        return block.numpy(), block

    @staticmethod
    def can_step(batch: MetaRecVectorEnv) -> bool:
        """Whether the batch is one row with settings that are known here."""
        tables = batch._tables
        return (
            batch.num_envs == 1
            and batch.device.type == "cpu"
            and batch.output == "numpy"
            and not batch.record_statistics
            and isinstance(batch._judge, FrozenResponse)
            and not batch._judge.has_pair_noise
            and tables.session_requests is None
            and tables.outage_rate == 0
            and not tables.tracks_exposure
        )

    # ------------------------------------------------------------------------------------------ an episode's beginning
    def begin(self, obs: Floats) -> None:
        """Looks at the state that the batch has made; `obs` (obs_dim,) is its observation."""
        state, row = self._batch._current(), {}
        self._state = state
        for name in (
            "response", "shown", "profile", "strategy_count", "strategy_reward", "last_share", "available",
            "engaged", "unrewarded", "request", "last_reward", "terminated", "truncated",
        ):  # fmt: skip
            array = getattr(state, name).numpy()
            # rows of numbers keep their axis: a number alone could not be written to
            row[name] = array[0] if array.ndim > 1 else array[:1]
        self._now = row
        self._return, self._length = self._batch._return.numpy(), self._batch._length.numpy()
        self._start, self._draw_key = int(state.start[0]), int(state.draw_key[0])
        self._member, self._period = int(state.member[0]), int(state.period[0])
        self._cost_weight = state.cost_weight.numpy()[0]
        self._category = state.profile[:, self._tables.n_taste : -1]
        self._user_id = self._tables.user.numpy()[self._start]
        self._start_state = self._tables.start_index.numpy()[self._start]
        self._obs[:] = obs
        judge, member = self._judge, self._member
        effects = self._tables.effects[member, int(self._user_id)].numpy()
        scale, split = judge.tensors["dynamic_scale"].numpy(), judge.n_static
        self._recent, self._whole = effects[:, split + 1, None] * scale[0], effects[:, split + 2, None] * scale[1]
        if judge.has_trend:
            self._trend, self._trend_effect = judge.tensors["trend"].numpy()[self._period], effects[:, split]
        self._user[:, judge.rank + judge.dim : -1] = effects[:, :split]
        self._calibration = judge._scale[member].numpy(), judge._shift[member].numpy()
        self._look()

    def _look(self) -> None:
        """What the judge makes of the user's state, until an item is taken."""
        judge, response, inputs = self._judge, self._now["response"], self._inputs.row
        width, rank = judge.n_decays * judge.dim, judge.rank
        inputs[:width] = response[:width]
        inputs[width:-1] = response[width:-1] / max(response[-1], np.float32(1.0))
        self._number.row[0] = response[-1]
        inputs[-1] = self._number.through(torch.log1p)[0] / np.float32(7.0)
        self._user[:, :rank] = judge.tower(self._inputs.whole, self._member)[0].numpy()
        recent = inputs[: judge.dim] * self._recent
        recent += inputs[width:-1] * self._whole
        self._user[:, rank : rank + judge.dim] = recent

    # ------------------------------------------------------------------------------------------ one request
    def step(self, action: Any) -> Step | None:
        """One request; what `MetaRecEnv.step` returns, or None where the batch must step: no episode runs, or a wrong action."""
        state = self._batch._state
        if state is None or bool(state.terminated[0]) or bool(state.truncated[0]):
            return None
        chosen = self._chosen(action)
        if chosen is None:
            return None
        if state is not self._state:
            self.begin(self._batch._observe().numpy()[0])
        now, tables = self._now, self._tables
        request = int(now["request"][0])
        slate, owner, share, asked = self._plan(chosen, request)
        valid = slate >= 0
        full = bool(valid.all())
        probs = self._probs(slate, None if full else valid)
        key = fold_in_one(self._draw_key, request)
        outcomes = uniform_of(key, slate[:, None] * self._outcomes + self._outcome_ids) < probs
        outcomes &= outcomes[:, :1]
        parts = np.add.reduce(outcomes, axis=0, dtype=np.float32) * self._weights
        if self._kind == "select":
            cost, latency = self._cost[chosen] * self._cost_weight, self._latency[chosen]
        else:
            cost = self._asked.sum(asked * self._cost, 1) * self._cost_weight
            latency = (asked * self._latency).max()
        # the sum of two numbers has one order
        reward = (parts[0] + parts[1] if len(parts) == 2 else self._parts.sum(parts, 1)) - cost - latency
        taken = outcomes[:, 0]
        count = int(np.count_nonzero(taken))
        unrewarded = np.float32(0.0) if count else now["unrewarded"][0] + np.float32(1.0)
        left = tables.may_leave and self._leaves(key, unrewarded, count, valid)
        # what follows, in the batch's own memory
        now["shown"][slate] = 1
        credit = share * reward if owner is None else self._credit(outcomes, owner, share, asked, latency)
        now["strategy_count"] += share
        now["strategy_reward"] += credit
        now["last_share"][:] = share
        now["last_reward"][0], now["unrewarded"][0], now["request"][0] = reward, unrewarded, request + 1
        now["terminated"][0], now["truncated"][0] = left, request + 1 >= self._batch.horizon
        if count:
            self._take(slate if full else np.where(valid, slate, 0), taken, count)
        if tables.service_changes:
            now["available"][:] = tables.service.numpy()[request + 1]
        self._return[0] += reward
        self._length[0] += 1
        info = {
            "action_mask": now["available"].astype(np.int8),
            "user": self._user_id,
            "start_state": self._start_state,
            "request": np.int64(request + 1),
            "slate": slate,
            "outcomes": outcomes,
            **{f"reward_{name}": part for name, part in zip(self._batch.world.outcomes, parts, strict=True)},
            "reward_cost": -cost,
            "reward_latency": -latency,
            "reward_retention": np.float32(0.0),
        }
        if owner is not None:
            info["slot_strategy"] = owner
        if self._kind == "blend":
            info["strategy_weights"] = share
        return self._observe(bool(count)), float(reward), bool(left), request + 1 >= self._batch.horizon, info

    def _chosen(self, action: Any) -> Any:
        """The action as a number or an array of its space's kind; None where the batch must explain what is wrong."""
        strategies = self._cost.shape[0]
        if self._kind == "select" and type(action) in (int, np.int64):
            return action if 0 <= action < strategies else None
        chosen = np.asarray(action)
        if self._kind == "blend":
            fits = chosen.shape == (strategies,) and not np.isnan(chosen).any()
            return chosen.astype(np.float32) if fits else None
        shape = (self._slate_size,) if self._kind == "slots" else ()
        if chosen.shape != shape or chosen.dtype.kind not in "iu":
            return None
        return chosen.astype(np.int64) if ((chosen >= 0) & (chosen < strategies)).all() else None

    def _plan(self, action: Any, request: int) -> tuple[Any, Any, Any, Any]:
        """Slate, owner of each place, shares and strategies asked, as `actions.Plan` of one row."""
        strategies, size = self._cost.shape[0], self._slate_size
        if self._kind == "blend":
            state = self._batch._current()
            given = torch.zeros(ROW_MULTIPLE, strategies)
            given[0] = torch.from_numpy(action)
            planned = plan(self._tables, self._batch.config, state, given, size, request)
            return planned.slate[0].numpy(), None, planned.share[0].numpy(), planned.asked[0].numpy()
        share = np.zeros(strategies, dtype=np.float32)
        available = self._now["available"]
        if self._kind == "select":
            k = int(action)
            slate = np.full(size, -1, dtype=np.int64)
            if available[k]:
                head = self._head(k, request)
                slate[: len(head)] = head
            share[k] = 1.0
            return slate, None, share, share > 0
        slate, heads = np.full(size, -1, dtype=np.int64), {}
        for place, k in enumerate(action.tolist()):
            share[k] += 1.0
            if not available[k]:
                continue
            if k not in heads:
                heads[k] = self._head(k, request).tolist()
            # a place takes its strategy's first item that no place before it took
            slate[place] = next((item for item in heads[k] if item not in slate[:place]), -1)
        asked = share > 0
        share /= size
        return slate, action, share, asked

    def _head(self, strategy: int, request: int) -> NDArray[Any]:
        """First items of a list that were not shown yet, slate_size at most."""
        items = self._lists[self._start, strategy, : self._slate_size * (request + 1)]
        found: NDArray[Any] = items[np.flatnonzero(self._now["shown"][items] == 0)[: self._slate_size]]
        return found

    def _probs(self, slate: NDArray[np.int64], valid: NDArray[np.bool_] | None) -> Floats:
        """As `dynamics.slate_probs`; (slate_size,) -> (slate_size, n_outcomes). None: every place holds an item."""
        items = slate if valid is None else np.where(valid, slate, int(self._tables.askable[int(self._user_id)]))
        np.multiply(self._table[items + self._member * self._judge.n_items], self._user, out=self._products)
        score = self._product_sum.sum(dim=-1).numpy()
        if self._trend is not None:
            score += self._trend[items][:, None] * self._trend_effect
        scale, shift = self._calibration
        score *= scale
        score += shift
        for offset in self._gate_offsets:
            score[:, 0] += offset
        np.negative(score, out=self._exp.row)
        probs: Floats = np.float32(1.0) / (np.float32(1.0) + self._exp.through(torch.exp))
        return probs if valid is None else probs * valid[:, None]

    def _leaves(self, key: int, unrewarded: np.float32, count: int, valid: NDArray[np.bool_]) -> bool:
        """As `dynamics.leave_prob`, and its draw."""
        patience, one = self._tables.patience, np.float32(1.0)
        if patience is not None:
            logit = np.float32(-4.0) + np.float32(4.0) * unrewarded / np.float32(patience)
        else:
            weight, size = self._leaving, max(np.float32(np.count_nonzero(valid)), one)
            logit = weight[0] + weight[1] * unrewarded + weight[2] * (np.float32(count) / size)
        self._number.row[0] = -logit
        prob = one / (one + self._number.through(torch.exp)[0])
        return bool(uniform_of(key, np.array([LEAVE_DRAW]))[0] < prob)

    def _credit(self, outcomes: Any, owner: Any, share: Floats, asked: Any, latency: np.float32) -> Floats:
        """As `dynamics.credit` where every place belongs to a strategy."""
        worth = self._worth.sum(outcomes * self._weights, 2)
        own = self._own.sum((owner[:, None] == np.arange(len(share))) * worth[:, None], 1)
        credit: Floats = own - asked * self._cost * self._cost_weight + share * (np.float32(0.0) - latency)
        return credit

    def _take(self, items: NDArray[np.int64], taken: NDArray[np.bool_], count: int) -> None:
        """The user takes items: profile and judge's state, as `dynamics.advance` and `FrozenResponse.step`."""
        now, judge, weight = self._now, self._judge, taken[:, None].astype(np.float32)
        np.multiply(self._item_profile[items], weight, out=self._taken_profile[0])
        now["profile"] += self._profile_sum.sum(dim=1).numpy()[0]
        now["engaged"] += np.float32(count)
        response, width = now["response"], judge.n_decays * judge.dim
        vectors = self._items[items] * weight
        gain = self._gain[count - np.cumsum(taken)]
        np.multiply(gain.T[:, :, None], vectors, out=self._vectors[:-1])
        self._vectors[-1] = vectors
        gained = self._vector_sum.sum(dim=1).numpy()
        averages = response[:width].reshape(judge.n_decays, judge.dim)
        averages *= self._kept[count][:, None]
        averages += gained[:-1]
        response[width:-1] += gained[-1]
        response[-1] += count
        self._look()

    def _observe(self, moved: bool) -> Floats:
        """As `observation.observe`; the blocks that stay as they were are not written again."""
        now, seen, batch = self._now, self._seen, self._batch
        scale, count = np.float32(batch._reward_scale), now["strategy_count"]
        if moved:
            engaged, taste = max(now["engaged"][0], np.float32(1.0)), self._tables.n_taste
            profile = now["profile"]
            np.divide(profile[:taste], engaged, out=seen["taste"])
            seen["popularity_affinity"][0] = profile[-1] / engaged
            if self._category.shape[1]:
                total = max(self._category.sum(dim=1).numpy()[0], np.float32(1e-6))
                share = profile[taste:-1] / total
                np.maximum(share, np.float32(1e-9), out=self._share.row)
                entropy = -self._entropy.sum(share * self._share.through(torch.log), 1)
                seen["category_entropy"][0] = entropy / np.float32(math.log(max(len(share), 2)))
        self._log1p.row[:-1], self._log1p.row[-1] = count, now["engaged"][0]
        logs = self._log1p.through(torch.log1p)
        rewards = self._tanh.row
        np.divide(now["strategy_reward"], count + np.float32(1.0), out=rewards[:-1])
        rewards[-1] = now["last_reward"][0]
        rewards /= scale
        tanhs = self._tanh.through(torch.tanh)
        seen["history_length"][0] = logs[-1] / np.float32(math.log1p(1000.0))
        seen["unrewarded_requests"][0] = now["unrewarded"][0] / np.float32(10.0)
        seen["request_fraction"][0] = np.float32(now["request"][0]) / np.float32(batch.horizon)
        seen["last_reward"][0] = tanhs[-1]
        seen["last_strategy"][:] = now["last_share"]
        np.divide(logs[:-1], np.float32(math.log1p(batch.horizon)), out=seen["strategy_count"])
        seen["strategy_mean_reward"][:] = tanhs[:-1]
        obs: Floats = np.minimum(self._obs, np.float32(1.0))
        return np.maximum(obs, np.float32(-1.0), out=obs)
