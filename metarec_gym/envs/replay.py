"""`MetaRec/Replay-v0`: a log of bandit feedback with known chances, replayed: no model of users, only what was really seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from metarec_gym.envs.batched import BatchedEnv, BatchOfOne, Mode, Moved, State, row_exact
from metarec_gym.envs.replay_table import ACTIONS, REWEIGH, Action, ReplayTable, Reweigh, resolve_table
from metarec_gym.seeding import fold_in, uniform

if TYPE_CHECKING:
    from metarec_gym.data.impressions import ImpressionTable
    from metarec_gym.data.interactions import InteractionLog

MODES = ("weighted", "rejection")
ORDERS = ("random", "log")


@dataclass(frozen=True)
class ReplayConfig:
    """How a log is replayed; each field has its sentence."""

    mode: str = "weighted"
    """`weighted`: reward * weight (inverse propensity); `rejection`: the logged reward where the action is the logged one, else
    nothing, for logs drawn uniformly."""
    horizon: int = 50
    """Logged requests in an episode."""
    order: str = "random"
    """`random`: every request is a row drawn from the log; `log`: rows follow each other as logged, from a drawn one on."""
    action: Action = "auto"
    """What an action is: `strategy`, `category`, `item`, or `auto`; see `ReplayTable.from_log`."""
    campaign: str | None = None
    """Campaign of an impression table; None = the first."""
    reweigh: Reweigh = "logger"
    """How rows of one strategy of an impression table count for another: `logger`, `balanced` or `none`; see
    `ReplayTable.from_impressions`."""

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon}, expected at least 1")
        for name, value, allowed in (
            ("mode", self.mode, MODES),
            ("order", self.order, ORDERS),
            ("action", self.action, ACTIONS),
            ("reweigh", self.reweigh, REWEIGH),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, expected one of {allowed}")


class ReplayVectorEnv(BatchedEnv):
    """Logged requests; the action is what the policy would have done in their context, the reward what the log knows of that.

    ## Description
    Every step shows the context of a logged request. The action is one of the log's own: the strategy that serves, the item, or a
    category of items. A log holds the outcome of one action only; the reward is arranged so that its mean is the value of the
    policy all the same, and no model of users is asked. Contexts come from the log whatever the policy does: what is learned and
    valued is one request at a time (a contextual bandit), not the long-run effect of earlier choices.

    ## Actions
    `Discrete(K)`: index into `action_names`.

    | log | action | meaning |
    |---|---|---|
    | names the `strategy` of each row | strategy | which of the production's strategies serves |
    | Open Bandit | strategy | which of the two production policies (bts, random) chooses the item; see below |
    | any with `propensity` | item, category | the item, or an item of the category drawn uniformly |

    In Open Bandit both policies served requests assigned to them at random, each saying with what chance it showed the item. "Let
    k choose" is valued on all rows: one logged by s counts with pi_k(item | position) / p_s(item), its own with 1
    (`ReplayTable.from_impressions` says what pi_k is where its chances change over time).

    ## Observations
    `Box(-1, 1, (obs_dim,), float32)`; `feature_slices` names the blocks.

    | block | width | bounds | meaning |
    |---|---|---|---|
    | context | F | -1..1 | what was known before the request, `context_names` |
    | progress | 1 | 0..1 | requests replayed over the horizon |
    | matched | 1 | 0..1 | 1 if the last request counted |
    | last_action | K | 0..1 | one-hot, zeros before the first request |
    | action_count | K | 0..1 | log(1 + summed weights) / log(1 + horizon), clipped, by action (rejection: 1 each) |
    | action_mean_reward | K | -1..1 | tanh(summed weighted rewards / (1 + summed weights) / mean logged reward), by action |

    ## Reward
    `weighted` (inverse propensity): `reward * w`, w the chance of what was shown under the action over its chance in the log: its
    mean is the action's true mean in the context, rows that do not match bring 0. `rejection` (Li et al., WSDM 2011): `reward`
    where the action is the logged one; other rows bring 0 and do not count, `info["matched"]` says which do: the value is the
    mean over matched rows. Only logs drawn uniformly allow it. In `info`: `row` (whose context is shown), `replayed_row` (whose
    reward was given), `matched`, `weight`, `logged_reward`, `reward_replayed` (the reward, its only part).

    ## Episode end
    `terminated`: never. `truncated`: `horizon` requests were replayed.

    ## Arguments
    See `__init__` and `ReplayConfig`. `reset(options=...)` takes `reset_mask` and `row` (the first row of each episode).

    ## Registered ids
    `MetaRec/Replay-v0` (`gymnasium.make` gives a single one, `make_vec` this).

    ## Version history
    v0: first release.
    """

    def __init__(
        self,
        num_envs: int = 1,
        log: str | Path | InteractionLog | ImpressionTable | ReplayTable | None = None,
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
            log: Folder of a prepared log or its name (both keep specs JSON-able), what one loads from it, or None for the
                synthetic default.
            device: "cpu", "cuda", "cuda:1" ...
            output: Arrays or tensors out; both are accepted in.
            autoreset_mode: One of Gymnasium's three.
            max_episode_steps: Overrides `horizon` (`gymnasium.make_vec` hands it over by this name).
            record_statistics: Adds `info["episode"]` at episode ends; leave it off under Gymnasium's RecordEpisodeStatistics.
            render_mode: There is nothing to render.
            **settings: Fields of `ReplayConfig`.

        Raises:
            TypeError: When there is no setting of a name.
            ValueError: When a setting does not fit, the log has no propensities, or rejection meets a log not drawn uniformly.
            FileNotFoundError: When `log` names a folder without a log.
        """
        if max_episode_steps is not None:
            settings["horizon"] = max_episode_steps
        unknown = sorted(set(settings) - set(ReplayConfig.__dataclass_fields__))
        if unknown:
            # Python's own wording: TorchRL's GymEnv offers `frameskip` to everyone and reads the answer
            raise TypeError(
                f"unexpected keyword argument {unknown[0]!r}: "
                f"Replay has no settings {unknown}; it has {sorted(ReplayConfig.__dataclass_fields__)}"
            )
        self.config = config = ReplayConfig(**settings)
        table = resolve_table(log, action=config.action, campaign=config.campaign, reweigh=config.reweigh)
        if config.mode == "rejection" and not table.uniform:
            raise ValueError(
                f"the log {table.name!r} did not draw its actions uniformly, so the rows that match a policy are no fair sample "
                "of the contexts; use mode='weighted'"
            )
        self.table = table.to(device)
        self.horizon = config.horizon
        self.action_names, self.context_names = table.actions, table.context_names
        self.strategy_names = table.actions
        """The same by the name that learners label their curves with."""
        self._scale = max(float(table.reward.abs().mean()), 1e-6)
        self.feature_slices: dict[str, slice] = {}
        start = 0
        for name, width in _blocks(table):
            self.feature_slices[name] = slice(start, start + width)
            start += width
        low = np.full(start, -1.0, dtype=np.float32)
        for name in ("progress", "matched", "last_action", "action_count"):
            low[self.feature_slices[name]] = 0.0
        super().__init__(
            num_envs,
            gymnasium.spaces.Box(low, np.ones(start, dtype=np.float32), dtype=np.float32),
            gymnasium.spaces.Discrete(table.n_actions),
            device=device,
            output=output,
            autoreset_mode=autoreset_mode,
            record_statistics=record_statistics,
            render_mode=render_mode,
        )

    def _drawn_row(self, step: Tensor) -> Tensor:
        draw = uniform(fold_in(self._episode_key(), step)).to(torch.float64)
        return (draw * self.table.n_rows).to(torch.int64)

    def _fresh(self, options: dict[str, Any]) -> State:
        unknown = sorted(set(options) - {"row"})
        if unknown:
            raise ValueError(f"options has {unknown}, expected reset_mask and row")
        step = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        row = self._pinned(options, "row")
        if row is None:
            row = self._drawn_row(step)
        elif bool(((row < 0) | (row >= self.table.n_rows)).any()):
            raise ValueError(f"options['row'] must lie in 0..{self.table.n_rows - 1}, the rows of the log")
        zeros = torch.zeros(self.num_envs, device=self.device)
        by_action = zeros[:, None].repeat(1, self.table.n_actions)
        return {
            "step": step,
            "row": row,
            "matched": zeros,
            "last_action": by_action,
            "count": by_action.clone(),
            "sum": by_action.clone(),
        }

    def _check_action(self, action: Tensor) -> Tensor:
        if action.shape != (self.num_envs,) or action.dtype.is_floating_point:
            raise ValueError(
                f"actions have shape {tuple(action.shape)} and dtype {action.dtype}, expected integers ({self.num_envs},)"
            )
        action = action.to(torch.int64)
        # on CUDA the check would wait for the device; an index out of range fails there in the gather itself
        if self.device.type == "cpu" and bool(((action < 0) | (action >= self.table.n_actions)).any()):
            raise ValueError(f"actions must lie in 0..{self.table.n_actions - 1}, got {action.tolist()[:8]}")
        return action

    def _transition(self, state: State, action: Tensor) -> Moved:
        table, row = self.table, state["row"]
        weight = table.weight[row, action]
        matched = weight > 0
        counted = matched.to(torch.float32) if self.config.mode == "rejection" else weight
        logged = table.reward[row]
        reward = logged * counted
        chosen = torch.nn.functional.one_hot(action, table.n_actions).to(torch.float32)
        step = state["step"] + 1
        moved = {
            "step": step,
            "row": (row + 1) % table.n_rows if self.config.order == "log" else self._drawn_row(step),
            "matched": matched.to(torch.float32),
            "last_action": chosen,
            "count": state["count"] + chosen * counted[:, None],
            "sum": state["sum"] + chosen * reward[:, None],
        }
        parts = {
            "matched": matched,
            "weight": weight,
            "replayed_row": row,
            "logged_reward": logged,
            "reward_replayed": reward,
        }
        return Moved(moved, reward, torch.zeros_like(matched), step >= self.horizon, parts)

    def _observe(self, state: State) -> Tensor:
        counts = row_exact(torch.log1p, state["count"]) * (1.0 / float(np.log1p(self.horizon)))
        means = row_exact(torch.tanh, state["sum"] / (1.0 + state["count"]) * (1.0 / self._scale))
        blocks = {
            "context": self.table.context[state["row"]],
            "progress": (state["step"].to(torch.float32) / self.horizon)[:, None],
            "matched": state["matched"][:, None],
            "last_action": state["last_action"],
            "action_count": counts.clamp(max=1.0),
            "action_mean_reward": means,
        }
        return torch.cat([blocks[name] for name in self.feature_slices], dim=1)

    def _facts(self, state: State) -> dict[str, Tensor]:
        return {"row": state["row"], "step": state["step"]}


class ReplayEnv(BatchOfOne):
    """One logged request at a time. Spaces, reward and endings: see `ReplayVectorEnv`, of which this is one row."""

    def __init__(
        self,
        log: str | Path | InteractionLog | ImpressionTable | ReplayTable | None = None,
        device: str = "cpu",
        render_mode: None = None,
        **settings: Any,
    ) -> None:
        """Arguments as in `ReplayVectorEnv`."""
        batch = ReplayVectorEnv(
            1, log=log, device=device, autoreset_mode="Disabled", render_mode=render_mode, **settings
        )
        super().__init__(batch)
        self.feature_slices, self.config, self.table = batch.feature_slices, batch.config, batch.table
        self.action_names, self.context_names = batch.action_names, batch.context_names


def first_observations(table: ReplayTable) -> Tensor:
    """What a policy sees of every logged request as the first of an episode; float32 (n_rows, obs_dim)."""
    rest = sum(width for name, width in _blocks(table) if name != "context")
    return torch.cat([table.context, torch.zeros(table.n_rows, rest, device=table.context.device)], dim=1)


def _blocks(table: ReplayTable) -> tuple[tuple[str, int], ...]:
    count = table.n_actions
    by_action = (("last_action", count), ("action_count", count), ("action_mean_reward", count))
    return (("context", len(table.context_names)), ("progress", 1), ("matched", 1), *by_action)
