"""`MetaRec/Select-v0`, `Blend-v0` and `Slots-v0`, batched: an action says which strategies serve a simulated user next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from metarec_gym.envs.actions import Plan, next_unshown
from metarec_gym.envs.config import EnvConfig
from metarec_gym.envs.dynamics import Served, advance, depth_of, lists_of, plan, serve, silenced, slate_probs
from metarec_gym.envs.episodes import Episodes, pinned, row_mask, row_seeds, start_rows
from metarec_gym.envs.infos import apart, request_facts, state_facts
from metarec_gym.envs.observation import bounds, feature_slices, observe
from metarec_gym.envs.sessions import check_ranker, start_sessions
from metarec_gym.envs.user_state import EnvTables, UserState, choose_rows, fresh_rows, make_tables
from metarec_gym.response.frozen import ROW_MULTIPLE, joint_probs
from metarec_gym.world import World, resolve_world

Mode = Literal["NextStep", "SameStep", "Disabled"]


class MetaRecVectorEnv(VectorEnv[Any, Any, Any]):
    """Simulated users choose from slates; the action says which strategies fill the slate.

    ## Description
    Every row is one user of the world's fold, met at a start state drawn from the log (cold users included). Each step is one
    request: the strategies that the action names serve the next items of their ranked lists that were not shown yet, the frozen
    judge says what the user does, and the reward is what those outcomes are worth, less serving cost. Lists are ranked when a
    session starts, from the history before it; inside a session they are only filtered.

    An episode is one session, or, with `session_requests=n`, several: after n requests, or when the user leaves, the user goes,
    and comes back after a time that the judge's return model draws (a day, and surely, where the log does not say when users come
    back). Then the clock moves, boredom and fatigue are over, and every strategy ranks again from what the user has taken by now.
    Requests themselves take no time. Items shown in an episode are not shown in it again. The gap before the episode's first
    session counts as the last gap of the history.

    Each episode meets one member of the judge's ensemble. Draws hang on the episode, request, item and outcome, never on
    strategy, place or action: the same item in the same state and place gets the same answer, whoever shows it.

    ## Actions
    | id | space | meaning |
    |---|---|---|
    | `MetaRec/Select-v0` | `Discrete(K)` | k: `world.strategies[k]` serves the slate |
    | `MetaRec/Blend-v0` | `Box(-1, 1, (K,))` | weights (a + 1) / 2 of a fusion of all lists, by rank or score |
    | `MetaRec/Slots-v0` | `MultiDiscrete([K] * slate_size)` | the strategy of each place of the slate |

    In Blend values outside the box are cut off, and weights that are all 0 ask every strategy alike; `EnvConfig.fusion` says what
    an item's place or score in a list is worth. Slots is a team draft: a place takes its strategy's first unshown item that no
    place before it took.
    Strategies out of service (see `info["action_mask"]`, int8 (num_envs, K)) serve nothing: an empty slate in Select, an empty
    place in Slots, no say in Blend. `action_masks()` gives the mask as sb3-contrib wants it: (num_envs, K), in Slots
    (num_envs, slate_size * K). Where outages leave no strategy, the first scheduled one of the pool is held in service.

    ## Observations
    `Box(-1, 1, (obs_dim,), float32)`; `feature_slices` names the blocks.

    | block | width | bounds | meaning |
    |---|---|---|---|
    | taste | 8 | -1..1 | mean item vector (SVD of fold S) of the history and the items taken since |
    | history_length | 1 | 0..1 | log(1 + items taken) / log(1001), clipped |
    | popularity_affinity | 1 | 0..1 | mean popularity percentile of those items |
    | category_entropy | 1 | 0..1 | entropy of their categories over its maximum |
    | unrewarded_requests | 1 | 0..1 | requests of the session since an item was taken, in tens, clipped |
    | request_fraction | 1 | 0..1 | requests served over the horizon |
    | session_fraction | 1 | 0..1 | requests of the session over `session_requests`; 0 in episodes of one session |
    | sessions | 1 | 0..1 | log(1 + sessions before this one, history included) / log(101), clipped |
    | cost_weight | 1 | 0..1 | w / (1 + w) |
    | latency_weight | 1 | 0..1 | w / (1 + w) |
    | last_reward | 1 | -1..1 | tanh(reward of the last request / typical reward) |
    | last_strategy | K | 0..1 | shares in the last request (Select: one-hot), zeros before the first |
    | strategy_count | K | 0..1 | log(1 + requests served, by shares) / log(1 + horizon), by strategy |
    | strategy_mean_reward | K | -1..1 | tanh(sum of credited rewards / (count + 1) / typical reward), by strategy |
    | recent_gap | 1 | 0..1 | log time between the history's last two events, later between the last two sessions; a year = 1 |
    | list_popularity | K | 0..1 | mean popularity percentile of each strategy's first 20 items at session start |
    | list_agreement | K | 0..1 | mean share of those items that another strategy's first 20 hold |
    | list_similarity | K | -1..1 | mean cosine between those items and the taste at session start |

    A share is 1 for the strategy of Select, weight over sum of weights in Blend, places over slate size in Slots. Rewards are
    credited by shares; in Slots each strategy is credited with the outcomes of its own places and pays its own cost.

    ## Reward
    `sum over items and outcomes of weight * happened - cost_weight * sum of cost[k] - latency_weight * max of latency[k]
    + retention_weight * (session ends here and the user is back within retention_days)`, over the strategies k asked: the one of
    Select, those with weight above 1e-6 of Blend, each distinct one of Slots, in service or not. Weights are the world's, cost is
    relative to the dearest strategy, latency (measured, so two builds of a world differ) to the slowest. The parts are in `info`
    as `reward_<outcome>`, `reward_cost`, `reward_latency`, `reward_retention`.

    ## Episode end
    `terminated`: the user left (the judge's hazard; never in worlds whose log cannot identify leaving); in episodes of several
    sessions leaving ends the session, and `terminated` says that the user did not come back within the last edge of the return
    model. `truncated`: `horizon` requests were served.

    ## Arguments
    See `__init__` and `EnvConfig`. `reset(options=...)` takes `reset_mask` (bool (num_envs,)), `start_state` (indices into the
    world's start states) and `noise` (int64: rows with equal start state, noise and environment seed meet equal draws under any
    policy).

    ## Registered ids
    `MetaRec/Select-v0`, `MetaRec/Blend-v0`, `MetaRec/Slots-v0` (`gymnasium.make`: the single environment, `make_vec`: this one).

    ## Version history
    v0: first release.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        world: World | str | Path | None = None,
        *,
        device: str = "cpu",
        output: Literal["numpy", "torch"] = "numpy",
        autoreset_mode: Mode | AutoresetMode = "NextStep",
        max_episode_steps: int | None = None,
        record_statistics: bool = False,
        render_mode: None = None,
        **settings: Any,
    ) -> None:
        """Makes `num_envs` rows.

        Args:
            num_envs: Rows.
            world: A World, its folder or its name (both keep specs JSON-able), or None for the synthetic default.
            device: "cpu", "cuda", "cuda:1" ...
            output: Arrays or tensors out; both are accepted in.
            autoreset_mode: One of Gymnasium's three.
            max_episode_steps: Overrides `horizon` (`gymnasium.make_vec` hands it over by this name).
            record_statistics: Adds `info["episode"]` with `r`, `l`, `t` at episode ends; leave it off under Gymnasium's
                RecordEpisodeStatistics, which refuses a second one.
            render_mode: There is nothing to render.
            **settings: Fields of `EnvConfig`: fold, action, horizon, cost_weight, session_requests ...

        Raises:
            ValueError: When a setting does not fit the world.
            TypeError: When there is no such setting, or a `render_mode` is given.
            FileNotFoundError: When `world` names a folder without a world.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}, expected at least 1")
        if output not in ("numpy", "torch"):
            raise ValueError(f"output is {output!r}, expected 'numpy' or 'torch'")
        if render_mode is not None:
            # a TypeError, on which SB3's make_vec_env, which asks everyone for pictures, tries again without
            raise TypeError(f"render_mode is {render_mode!r}, but there is nothing to render; leave it None")
        self.world = resolve_world(world)
        if max_episode_steps is not None:
            settings["horizon"] = max_episode_steps
        self.config = EnvConfig.of(settings)
        self.horizon, self.slate_size = self.config.resolve(self.world)
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.output = output
        self.render_mode = None
        self.closed = False
        self.spec = None
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.record_statistics = record_statistics
        self.strategy_names = self.world.strategies
        self.feature_slices = feature_slices(self.world)
        low, high = bounds(self.world)
        self.single_observation_space = gymnasium.spaces.Box(
            np.array(low, dtype=np.float32), np.array(high, dtype=np.float32), dtype=np.float32
        )
        self.single_action_space = self._action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        # every batch is padded to full blocks of rows, so that a row has the same bits in any batch
        self._rows = num_envs + (-num_envs % ROW_MULTIPLE)
        self._tables: EnvTables = make_tables(self.world, self.config, self.horizon, self.slate_size, self.device)
        if self.config.session_requests is not None:
            check_ranker(self.world, self._tables)
        self._judge = self.world.judge(self.config.fold, self.config.judge).to(self.device)
        self._reward_scale = self.world.reward_scale * self.slate_size
        index = torch.arange(self._rows, device=self.device)
        self._masked_infos = True
        self._exists = index < num_envs
        self._seeded = False
        self._episodes = Episodes(index.clone(), torch.zeros_like(index[:1]), torch.zeros_like(index))
        self._return = torch.zeros(self._rows, device=self.device)
        self._length = torch.zeros_like(index)
        self._state: UserState | None = None
        self.expected_reward: Tensor = torch.zeros(num_envs, device=self.device)
        """float32 (num_envs,): mean of the last reward over the draws (retention: given what was taken); privileged."""

    def _action_space(self) -> gymnasium.Space[Any]:
        strategies = self.world.n_strategies
        if self.config.action == "blend":
            return gymnasium.spaces.Box(-1.0, 1.0, (strategies,), dtype=np.float32)
        if self.config.action == "slots":
            return gymnasium.spaces.MultiDiscrete([strategies] * self.slate_size)
        return gymnasium.spaces.Discrete(strategies)

    # ------------------------------------------------------------------------------------------ reset
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts episodes in all rows, or in the rows of `options["reset_mask"]`.

        Args:
            seed: Row i is seeded `seed + i`, as the single environment with that seed; a list gives each row its own. Without
                a seed the rows go on to their next episode.
            options: `reset_mask`, `start_state`, `noise`; see the class.

        Returns:
            Observations of all rows, and infos.

        Raises:
            ValueError: When an option has the wrong length or names a start state of the other fold.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        with self._bookkeeping():
            result = self._reset(seed, dict(options or {}))
        self.expected_reward = torch.zeros(self.num_envs, device=self.device)
        return result

    def _reset(self, seed: int | Sequence[int | None] | None, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = row_mask(options.get("reset_mask"), self.num_envs, self._rows, self.device)
        if self._state is None and not bool(mask[: self.num_envs].all()):
            raise ValueError("the first reset must start every row; call reset() without reset_mask first")
        if seed is not None or not self._seeded:
            given = int(self.np_random.integers(2**62)) if seed is None else seed
            self._episodes = self._episodes.seeded(row_seeds(given, self.num_envs, self._rows, self.np_random), mask)
            self._seeded = True
        elif self._state is not None:
            self._episodes = self._episodes.next(mask)
        start = pinned(options.get("start_state"), "start_state", self.num_envs, self._rows, self.device)
        noise = pinned(options.get("noise"), "noise", self.num_envs, self._rows, self.device)
        self._begin(mask, start_rows(self._tables, start, self.config.fold), noise)
        return self._out(self._observe()), self._info()

    def _begin(self, mask: Tensor, start: Tensor | None = None, noise: Tensor | None = None) -> None:
        """Starts the episodes of the rows of `mask` (bool (rows,))."""
        start, draw_key = self._episodes.draw(self._tables, start, noise)
        # where every row begins there is nothing to keep; on CUDA the question would wait for the device
        whole = self._state is None or (self.device.type == "cpu" and bool(mask.all()))
        if self._state is None:
            shown = torch.zeros(self._rows, self.world.n_items + 1, dtype=torch.uint8, device=self.device)
        else:
            shown = self._state.shown
            shown.masked_fill_(mask[:, None], 0)
        shown[:, -1] = 1
        fresh = fresh_rows(self._tables, start, draw_key, shown, self.horizon * self.slate_size)
        self._state = fresh if whole or self._state is None else choose_rows(mask, fresh, self._state)
        self._return = torch.where(mask, 0.0, self._return)
        self._length = torch.where(mask, 0, self._length)

    # ------------------------------------------------------------------------------------------ step
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Serves one request in every row.

        Args:
            actions: As the action space, batched: integers (num_envs,), numbers (num_envs, K) or integers (num_envs, slate_size);
                array or tensor.

        Returns:
            Observations, rewards (float32), terminations and truncations (bool), infos: `action_mask`, `user`, `start_state`,
            `request`, `slate`, `outcomes`, `reward_<outcome>`, `reward_cost`, `reward_latency`, `reward_retention`, in Slots
            `slot_strategy`, in Blend `strategy_weights`, in episodes of several sessions `session`, `session_ended` and
            `away_hours` (inf = stays away), each with its `_<key>` mask. Rows that had ended before this step serve nothing: in
            next-step mode they are reset, in disabled mode they stay ended, reward 0.

        Raises:
            RuntimeError: When `reset` was not called.
            ValueError: When an action is out of range or has the wrong shape.
        """
        if self._state is None:
            raise RuntimeError("step was called before reset; call env.reset(seed=...) first")
        with self._bookkeeping():
            result = self._step(self._state, actions)
        # an ordinary tensor again, for whoever computes with it
        self.expected_reward = self.expected_reward.clone()
        return result

    def _bookkeeping(self) -> torch.inference_mode:
        """No notes for autograd, which slow small calls down; not where tensors go out, which may be trained on."""
        return torch.inference_mode(self.output == "numpy")

    def _step(self, state: UserState, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        action = self._actions(actions)
        idle = state.terminated | state.truncated
        planned = plan(self._tables, self.config, state, action, self.slate_size, self._deepest(state))
        served = serve(self._tables, self._judge, self.config, state, planned)
        moved = advance(self._tables, self._judge, state, planned, served, self.horizon)
        any_idle = bool(idle.any())
        if any_idle:
            moved = choose_rows(~idle, moved, state)
            served = silenced(served, ~idle)
        self._return = self._return + served.reward
        self._length = self._length + (~idle)
        self.expected_reward = served.expected_reward[: self.num_envs]
        terminated, truncated = moved.terminated, moved.truncated
        ended = (terminated | truncated) & ~idle
        self._state = self._next_sessions(moved, served, served.session_ends & ~ended)
        info = self._info(served, planned)
        if self.record_statistics:
            self._add_statistics(info, ended)
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and any_idle:
            self._episodes = self._episodes.next(idle)
            self._begin(idle)
            terminated, truncated = terminated & ~idle, truncated & ~idle
            info = self._refresh_info(info)
        elif self.autoreset_mode is AutoresetMode.SAME_STEP and bool(ended.any()):
            final_obs = self._observe()
            self._add(info, "final_obs", self._out(final_obs), ended)
            final = {k: v for k, v in info.items() if not k.endswith("final_obs")}
            self._episodes = self._episodes.next(ended)
            self._begin(ended)
            info = self._refresh_info(info)
            self._add(info, "final_info", apart(final, info), ended)
        return (
            self._out(self._observe()),
            # the state keeps these three: a caller who writes `terminated |= ...` must not end an episode here
            self._out(served.reward.clone()),
            self._out(terminated.clone()),
            self._out(truncated.clone()),
            info,
        )

    def _next_sessions(self, state: UserState, served: Served, starts: Tensor) -> UserState:
        if self._tables.session_requests is None:
            return state
        rows = torch.nonzero(starts & self._exists)[:, 0]
        if len(rows) == 0:
            return state
        return start_sessions(self.world, self._tables, state, rows, served.away_hours[rows])

    def _deepest(self, state: UserState) -> int:
        """Most requests that a row's session has served; on CUDA, where looking would wait for the device, the most possible."""
        if self.device.type != "cpu":
            return self.horizon
        served = state.request if self._tables.session_requests is None else state.session_request
        return int(served[: self.num_envs].max())

    def _actions(self, actions: Any) -> Tensor:
        action = torch.as_tensor(actions, device=self.device)
        shape = (self.num_envs, *(self.single_action_space.shape or ()))
        whole = self.config.action != "blend"
        if action.shape != shape or (whole and (action.dtype.is_floating_point or action.dtype == torch.bool)):
            kind = "integers" if whole else "numbers in [-1, 1]"
            raise ValueError(
                f"actions have shape {tuple(action.shape)} and dtype {action.dtype}, expected {kind} {shape}"
            )
        action = action.to(torch.int64 if whole else torch.float32)
        # on CUDA the check would wait for the device; an index out of range fails there in the gather itself
        if self.device.type == "cpu":
            if whole and bool(((action < 0) | (action >= self.world.n_strategies)).any()):
                raise ValueError(f"actions must lie in 0..{self.world.n_strategies - 1}, got {action.tolist()[:8]}")
            if not whole and bool(torch.isnan(action).any()):
                raise ValueError("actions hold values that are not a number; the policy that gave them has diverged")
        return torch.cat([action, action.new_zeros(self._rows - self.num_envs, *shape[1:])])

    # ------------------------------------------------------------------------------------------ outputs
    def _current(self) -> UserState:
        if self._state is None:
            raise RuntimeError("the environment has no state yet; call env.reset(seed=...) first")
        return self._state

    def _observe(self) -> Tensor:
        return observe(self._tables, self._current(), self.horizon, self._reward_scale, self.config.latency_weight)

    def _out(self, value: Tensor) -> Any:
        """The rows that exist, as the caller wants them; never a view of memory that changes later."""
        return value[: self.num_envs] if self.output == "torch" else value.cpu().numpy()[: self.num_envs]

    def _add(self, info: dict[str, Any], key: str, value: Any, rows: Tensor | None = None) -> None:
        info[key] = value
        if not self._masked_infos:
            return
        if rows is not None:
            info[f"_{key}"] = self._out(rows.clone())
        elif self.output == "numpy":
            info[f"_{key}"] = np.ones(self.num_envs, dtype=np.bool_)
        else:
            info[f"_{key}"] = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)

    def _info(self, served: Served | None = None, planned: Plan | None = None) -> dict[str, Any]:
        facts = state_facts(self._tables, self._current())
        if served is not None and planned is not None:
            facts |= request_facts(self._tables, self.world.outcomes, self.config.action, planned, served)
        info: dict[str, Any] = {}
        for key, value in facts.items():
            self._add(info, key, self._out(value))
        return info

    def _refresh_info(self, info: dict[str, Any]) -> dict[str, Any]:
        """After an automatic reset: who sits in the row now; what the request brought stays."""
        return {**info, **self._info()}

    def _add_statistics(self, info: dict[str, Any], ended: Tensor) -> None:
        if bool(ended.any()):
            numbers = {"r": self._return, "l": self._length, "t": torch.zeros_like(self._return)}
            self._add(info, "episode", {k: self._out(v.clone()) for k, v in numbers.items()}, ended)

    def action_masks(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Available strategies, bool (num_envs, K), in Slots (num_envs, slate_size * K); for sb3-contrib's MaskablePPO."""
        service = self._tables.service[:1].expand(self.num_envs, -1)
        available = service if self._state is None else self._state.available[: self.num_envs]
        masks: np.ndarray[Any, np.dtype[np.bool_]] = available.cpu().numpy().copy()
        return np.tile(masks, (1, self.slate_size)) if self.config.action == "slots" else masks

    # ------------------------------------------------------------------------------------------ privileged and state
    def peek_expected_rewards(self) -> Tensor:
        """Expected reward of the next request if one strategy filled the slate, without retention; float32 (num_envs, K).

        Privileged: for oracles only.
        """
        state, tables = self._current(), self._tables
        depth = depth_of(tables, self._deepest(state), self.slate_size, "select")
        slates = next_unshown(lists_of(tables, state, None, depth), state.shown, self.slate_size)
        values = []
        for k in range(self.world.n_strategies):
            probs = slate_probs(tables, self._judge, state, slates[:, k])
            values.append((joint_probs(probs) * tables.outcome_weights).sum(dim=(1, 2)))
        price = tables.cost * state.cost_weight[:, None] + tables.latency
        # an unavailable strategy would serve nothing and still cost
        return (torch.where(state.available, torch.stack(values, dim=1), 0.0) - price)[: self.num_envs]

    def peek_sampled_rewards(self) -> Tensor:
        """Reward that the next request would bring if one strategy filled the slate; float32 (num_envs, K). Privileged.

        The entry of the strategy that then serves is what `step` returns: the same item meets the same draw.
        """
        state, select, rewards = self._current(), replace(self.config, action="select"), []
        for k in range(self.world.n_strategies):
            action = torch.full_like(state.start, k)
            planned = plan(self._tables, select, state, action, self.slate_size, self._deepest(state))
            rewards.append(serve(self._tables, self._judge, select, state, planned).reward)
        return torch.stack(rewards, dim=1)[: self.num_envs]

    def get_state(self) -> dict[str, Tensor]:
        """Everything that decides what comes next, as named tensors; `set_state` continues from it exactly."""
        episodes = self._episodes
        return {
            **{f"user.{name}": value for name, value in self._current().to_dict().items()},
            "row_seed": episodes.row_seed.clone(),
            "env_key": episodes.env_key.clone(),
            "episode": episodes.episode.clone(),
            "return": self._return.clone(),
            "length": self._length.clone(),
        }

    def set_state(self, saved: dict[str, Tensor]) -> Any:
        """Continues from `get_state()` of an environment with the same world and settings; returns the observations.

        Raises:
            ValueError: When the state comes from another number of rows.
        """
        rows = saved["row_seed"].shape[0]
        if rows != self._rows:
            raise ValueError(f"the saved state has {rows} rows, this environment {self._rows}; use the same num_envs")
        here = {name: value.to(self.device).clone() for name, value in saved.items()}
        self._state = UserState(**{n.removeprefix("user."): v for n, v in here.items() if n.startswith("user.")})
        self._episodes = Episodes(here["row_seed"], here["env_key"], here["episode"])
        self._return, self._length = here["return"], here["length"]
        self._seeded = True
        return self._out(self._observe())

    def close_extras(self, **kwargs: Any) -> None:
        """Nothing to release."""
