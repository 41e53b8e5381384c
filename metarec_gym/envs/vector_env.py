"""`MetaRec/Select-v0`, batched: each action chooses the strategy that serves the next slate of one simulated user."""

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

from metarec_gym.envs.config import EnvConfig
from metarec_gym.envs.dynamics import advance, first_unshown, serve, slate_probs
from metarec_gym.envs.observation import bounds, feature_slices, observe
from metarec_gym.envs.user_state import EnvTables, UserState, choose_rows, fresh_rows, make_tables
from metarec_gym.response.frozen import ROW_MULTIPLE, joint_probs
from metarec_gym.seeding import fold_in, mix, uniform
from metarec_gym.world import World, resolve_world

Mode = Literal["NextStep", "SameStep", "Disabled"]
_START_DRAW, _EPISODE_DRAW, _NOISE_DRAW = 1, 2, 3


class MetaRecVectorEnv(VectorEnv[Any, Any, Any]):
    """Simulated users choose from slates; the action is the strategy that serves the slate.

    ## Description
    Every row is one user of the world's fold, met at a start state drawn from the log (cold users included). Each step is one
    request: the chosen strategy serves the next items of its ranked list that were not shown yet, the frozen judge says what
    the user does, and the reward is what those outcomes are worth, less serving cost. Lists are ranked at session start from
    the history before it; inside an episode (one session) they are only filtered.

    ## Actions
    `Discrete(K)`: index of the strategy in `world.strategies`.

    | action | meaning |
    |---|---|
    | k | `world.strategies[k]` serves the slate; if it is unavailable (see `action_mask`), the slate is empty |

    ## Observations
    `Box(-1, 1, (obs_dim,), float32)`; `feature_slices` names the blocks.

    | block | width | bounds | meaning |
    |---|---|---|---|
    | taste | 8 | -1..1 | mean item vector (SVD of fold S) of the history and the items taken since |
    | history_length | 1 | 0..1 | log(1 + items taken) / log(1001), clipped |
    | popularity_affinity | 1 | 0..1 | mean popularity percentile of those items |
    | category_entropy | 1 | 0..1 | entropy of their categories over its maximum |
    | unrewarded_requests | 1 | 0..1 | requests since an item was taken, in tens, clipped |
    | request_fraction | 1 | 0..1 | requests served over the horizon |
    | cost_weight | 1 | 0..1 | w / (1 + w) |
    | last_reward | 1 | -1..1 | tanh(reward of the last request / typical reward) |
    | last_strategy | K | 0..1 | one-hot, zeros before the first request |
    | strategy_count | K | 0..1 | log(1 + requests served) / log(1 + horizon), by strategy |
    | strategy_mean_reward | K | -1..1 | tanh(sum of rewards / (count + 1) / typical reward), by strategy |
    | recent_gap | 1 | 0..1 | log time between the last two events of the history, a year = 1 |
    | list_popularity | K | 0..1 | mean popularity percentile of each strategy's first 20 items at session start |
    | list_agreement | K | 0..1 | mean share of those items that another strategy's first 20 hold |
    | list_similarity | K | -1..1 | mean cosine between those items and the taste at session start |

    ## Reward
    `sum over items and outcomes of weight * happened - cost_weight * cost[action]`; weights are the world's, cost is relative to
    the dearest strategy. The parts are in `info` as `reward_<outcome>` and `reward_cost`.

    ## Episode end
    `terminated`: the user left (the judge's hazard; never in worlds whose log cannot identify leaving). `truncated`: `horizon`
    requests were served.

    ## Arguments
    See `__init__`. `reset(options=...)` takes `reset_mask` (bool (num_envs,)), `start_state` (indices into the world's start
    states) and `noise` (int64: rows with equal start state, noise and environment seed meet equal draws under any policy).

    ## Registered ids
    `MetaRec/Select-v0` (`gymnasium.make` gives the single environment, `make_vec` this one).

    ## Version history
    v0: first release.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        world: World | str | Path | None = None,
        fold: str = "A",
        horizon: int | None = None,
        slate_size: int | None = None,
        cost_weight: float = 0.0,
        world_seed: int = 0,
        unavailable: Sequence[str] = (),
        device: str = "cpu",
        output: Literal["numpy", "torch"] = "numpy",
        autoreset_mode: Mode | AutoresetMode = "NextStep",
        max_episode_steps: int | None = None,
        record_statistics: bool = False,
        render_mode: None = None,
    ) -> None:
        """Makes `num_envs` rows.

        Args:
            num_envs: Rows.
            world: A World, its folder (keeps specs JSON-able), or None for the synthetic default.
            fold: "A" or "B".
            horizon: Requests until truncation; None = the world's.
            slate_size: Items a request; None = the world's.
            cost_weight: Reward lost for the relative serving cost.
            world_seed: Which draw of the users' tastes.
            unavailable: Strategies out of service.
            device: "cpu", "cuda", "cuda:1" ...
            output: Arrays or tensors out; both are accepted in.
            autoreset_mode: One of Gymnasium's three.
            max_episode_steps: Overrides `horizon` (`gymnasium.make_vec` hands it over by this name).
            record_statistics: Adds `info["episode"]` with `r`, `l`, `t` at episode ends; leave it off under Gymnasium's
                RecordEpisodeStatistics, which refuses a second one.
            render_mode: There is nothing to render.

        Raises:
            ValueError: When a setting does not fit the world.
            FileNotFoundError: When `world` names a folder without a world.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}, expected at least 1")
        if output not in ("numpy", "torch"):
            raise ValueError(f"output is {output!r}, expected 'numpy' or 'torch'")
        if render_mode is not None:
            raise ValueError(f"render_mode is {render_mode!r}, but there is nothing to render; leave it None")
        self.world = resolve_world(world)
        self.config = EnvConfig(
            fold=fold,
            horizon=horizon if max_episode_steps is None else max_episode_steps,
            slate_size=slate_size,
            cost_weight=cost_weight,
            world_seed=world_seed,
            unavailable=tuple(unavailable),
        )
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
        self.single_action_space = gymnasium.spaces.Discrete(self.world.n_strategies)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        # every batch is padded to full blocks of rows, so that a row has the same bits in any batch
        self._rows = num_envs + (-num_envs % ROW_MULTIPLE)
        self._tables: EnvTables = make_tables(self.world, self.config, self.device)
        self._response = self.world.responses[fold].to(self.device)
        self._reward_scale = self.world.reward_scale * self.slate_size
        index = torch.arange(self._rows, device=self.device)
        self._all = torch.ones(self._rows, dtype=torch.bool, device=self.device)
        self._row_seed = index.clone()
        self._seeded = False
        self._episode = torch.zeros_like(index)
        self._return = torch.zeros(self._rows, device=self.device)
        self._length = torch.zeros_like(index)
        self._state: UserState | None = None
        self._deepest = 0
        self.expected_reward: Tensor = torch.zeros(num_envs, device=self.device)
        """float32 (num_envs,): mean of the last reward over the draws; privileged, for evaluation only."""

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
        options = dict(options or {})
        mask = self._row_mask(options.get("reset_mask"))
        if seed is not None or not self._seeded:
            self._seed_rows(seed, mask)
        elif self._state is not None:
            self._episode = torch.where(mask, self._episode + 1, self._episode)
        start = self._pinned(options.get("start_state"), "start_state")
        noise = self._pinned(options.get("noise"), "noise")
        self._begin(mask, start, noise)
        self.expected_reward = torch.zeros(self.num_envs, device=self.device)
        return self._out(self._observe()), self._info()

    def _row_mask(self, given: Any) -> Tensor:
        if given is None:
            return torch.ones(self._rows, dtype=torch.bool, device=self.device)
        mask = torch.as_tensor(given, device=self.device)
        if mask.shape != (self.num_envs,) or mask.dtype != torch.bool:
            raise ValueError(
                f"reset_mask has shape {tuple(mask.shape)} and dtype {mask.dtype}, expected bool ({self.num_envs},)"
            )
        if self._state is None and not bool(mask.all()):
            raise ValueError("the first reset must start every row; call reset() without reset_mask first")
        return torch.cat([mask, mask.new_zeros(self._rows - self.num_envs)])

    def _pinned(self, given: Any, name: str) -> Tensor | None:
        if given is None:
            return None
        value = torch.as_tensor(given, device=self.device).to(torch.int64)
        if value.shape != (self.num_envs,):
            raise ValueError(f"options[{name!r}] has shape {tuple(value.shape)}, expected ({self.num_envs},)")
        value = torch.cat([value, value[:1].expand(self._rows - self.num_envs)])
        if name == "start_state":
            count = self._tables.start_row.shape[0]
            if bool(((value < 0) | (value >= count)).any()):
                raise ValueError(f"options['start_state'] must lie in 0..{count - 1}, the world's start states")
            value = self._tables.start_row[value]
            if bool((value < 0).any()):
                raise ValueError(
                    f"options['start_state'] names start states of the other fold; this environment simulates fold "
                    f"{self.config.fold}: see World.starts_of({self.config.fold!r})"
                )
        return value

    def _seed_rows(self, seed: int | Sequence[int | None] | None, mask: Tensor) -> None:
        if seed is None:
            seed = int(self.np_random.integers(2**62))
        if isinstance(seed, int):
            # Python integers of any size: reduce before the signed 64-bit tensor sees them
            seeds = [(seed + i) % 2**63 for i in range(self._rows)]
        else:
            if len(seed) != self.num_envs:
                raise ValueError(f"seed has {len(seed)} entries, expected {self.num_envs}")
            drawn = [int(self.np_random.integers(2**62)) if s is None else int(s) % 2**63 for s in seed]
            seeds = drawn + [0] * (self._rows - self.num_envs)
        values = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        self._row_seed = torch.where(mask, values, self._row_seed)
        self._episode = torch.where(mask, 0, self._episode)
        self._env_key = mix(values[:1])
        self._seeded = True

    def _begin(self, mask: Tensor, start: Tensor | None = None, noise: Tensor | None = None) -> None:
        """Starts the next episode in the rows of `mask` (bool (rows,))."""
        key = mix(self._row_seed)
        if start is None:
            draw = uniform(fold_in(fold_in(key, _START_DRAW), self._episode)).to(torch.float64)
            start = (draw * len(self._tables.user)).to(torch.int64)
        user = self._tables.user[start]
        if noise is None:
            draw_key = fold_in(fold_in(fold_in(key, _EPISODE_DRAW), user), self._episode)
        else:
            draw_key = fold_in(fold_in(fold_in(self._env_key, _NOISE_DRAW), user), noise)
        if self._state is None:
            shown = torch.zeros(self._rows, self.world.n_items + 1, dtype=torch.uint8, device=self.device)
        else:
            shown = self._state.shown
            shown.masked_fill_(mask[:, None], 0)
        shown[:, -1] = 1
        fresh = fresh_rows(self._tables, start, draw_key, shown)
        self._state = fresh if self._state is None else choose_rows(mask, fresh, self._state)
        self._return = torch.where(mask, 0.0, self._return)
        self._length = torch.where(mask, 0, self._length)
        self._deepest = int(self._state.request.max()) if self.device.type == "cpu" else self.horizon

    # ------------------------------------------------------------------------------------------ step
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Serves one request in every row.

        Args:
            actions: Integers (num_envs,) in [0, K): array or tensor.

        Returns:
            Observations, rewards (float32), terminations and truncations (bool), infos: `action_mask`, `user`, `start_state`,
            `request`, `slate`, `outcomes`, `reward_<outcome>`, `reward_cost`, each with its `_<key>` mask. Rows that had ended
            before this step serve nothing: in next-step mode they are reset, in disabled mode they stay ended, reward 0.

        Raises:
            RuntimeError: When `reset` was not called.
            ValueError: When an action is out of range or has the wrong shape.
        """
        state = self._state
        if state is None:
            raise RuntimeError("step was called before reset; call env.reset(seed=...) first")
        action = self._actions(actions)
        idle = state.terminated | state.truncated
        depth = min(self._tables.lists.shape[2], self.slate_size * (self._deepest + 1))
        served = serve(self._tables, self._response, state, action, self.slate_size, depth)
        moved = advance(self._tables, self._response, state, action, served, self.horizon)
        any_idle = bool(idle.any())
        if any_idle:
            moved = choose_rows(~idle, moved, state)
            active = ~idle
            served = replace(
                served,
                slate=torch.where(active[:, None], served.slate, -1),
                outcomes=served.outcomes & active[:, None, None],
                reward=served.reward * active,
                parts=served.parts * active[:, None],
                cost=served.cost * active,
                expected_reward=served.expected_reward * active,
            )
        self._state = moved
        self._deepest = min(self._deepest + 1, self.horizon - 1)
        self._return = self._return + served.reward
        self._length = self._length + (~idle)
        self.expected_reward = served.expected_reward[: self.num_envs]
        terminated, truncated = moved.terminated, moved.truncated
        ended = (terminated | truncated) & ~idle
        info = self._info(served)
        if self.record_statistics:
            self._add_statistics(info, ended)
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and any_idle:
            self._episode = self._episode + idle
            self._begin(idle)
            terminated, truncated = terminated & ~idle, truncated & ~idle
            info = self._refresh_info(info)
        elif self.autoreset_mode is AutoresetMode.SAME_STEP and bool(ended.any()):
            final_obs = self._observe()
            self._add(info, "final_obs", self._out(final_obs), ended)
            final = {k: v for k, v in info.items() if not k.endswith("final_obs")}
            self._add(info, "final_info", final, ended)
            self._episode = self._episode + ended
            self._begin(ended)
            info = self._refresh_info(info)
        return (
            self._out(self._observe()),
            self._out(served.reward),
            self._out(terminated),
            self._out(truncated),
            info,
        )

    def _actions(self, actions: Any) -> Tensor:
        action = torch.as_tensor(actions, device=self.device)
        if action.shape != (self.num_envs,) or action.dtype.is_floating_point:
            raise ValueError(
                f"actions have shape {tuple(action.shape)} and dtype {action.dtype}, expected integers ({self.num_envs},)"
            )
        action = action.to(torch.int64)
        # on CUDA the check would wait for the device; an index out of range fails there in the gather itself
        if self.device.type == "cpu" and bool(((action < 0) | (action >= self.world.n_strategies)).any()):
            raise ValueError(f"actions must lie in 0..{self.world.n_strategies - 1}, got {action.tolist()[:8]}")
        return torch.cat([action, action.new_zeros(self._rows - self.num_envs)])

    # ------------------------------------------------------------------------------------------ outputs
    def _current(self) -> UserState:
        if self._state is None:
            raise RuntimeError("the environment has no state yet; call env.reset(seed=...) first")
        return self._state

    def _observe(self) -> Tensor:
        return observe(self._tables, self._current(), self.horizon, self._reward_scale, self.config.cost_weight)

    def _out(self, value: Tensor) -> Any:
        """The rows that exist, as the caller wants them; never a view of memory that changes later."""
        rows = value[: self.num_envs]
        return rows if self.output == "torch" else rows.cpu().numpy()

    def _add(self, info: dict[str, Any], key: str, value: Any, rows: Tensor | None = None) -> None:
        info[key], info[f"_{key}"] = value, self._out((self._all if rows is None else rows).clone())

    def _info(self, served: Any = None) -> dict[str, Any]:
        state = self._current()
        info: dict[str, Any] = {}
        self._add(info, "action_mask", self._out(self._mask().to(torch.int8)))
        self._add(info, "user", self._out(self._tables.user[state.start]))
        self._add(info, "start_state", self._out(self._tables.start_index[state.start]))
        self._add(info, "request", self._out(state.request.clone()))
        if served is not None:
            self._add(info, "slate", self._out(served.slate))
            self._add(info, "outcomes", self._out(served.outcomes))
            for index, name in enumerate(self.world.outcomes):
                self._add(info, f"reward_{name}", self._out(served.parts[:, index].clone()))
            self._add(info, "reward_cost", self._out(-served.cost))
        return info

    def _refresh_info(self, info: dict[str, Any]) -> dict[str, Any]:
        """After an automatic reset: who sits in the row now; what the request brought stays."""
        return {**info, **self._info()}

    def _add_statistics(self, info: dict[str, Any], ended: Tensor) -> None:
        if bool(ended.any()):
            numbers = {"r": self._return, "l": self._length, "t": torch.zeros_like(self._return)}
            self._add(info, "episode", {k: self._out(v.clone()) for k, v in numbers.items()}, ended)

    def _mask(self) -> Tensor:
        return self._tables.available[None, :].expand(self._rows, -1).clone()

    def action_masks(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Available strategies, bool (num_envs, K); the name that sb3-contrib's MaskablePPO asks for."""
        masks: np.ndarray[Any, np.dtype[np.bool_]] = self._mask()[: self.num_envs].cpu().numpy()
        return masks

    # ------------------------------------------------------------------------------------------ privileged and state
    def peek_expected_rewards(self) -> Tensor:
        """Expected reward of the next request under every strategy; float32 (num_envs, K). Privileged: for oracles only."""
        state, strategies = self._current(), self.world.n_strategies
        depth = min(self._tables.lists.shape[2], self.slate_size * (self._deepest + 1))
        lists = self._tables.lists[state.start, :, :depth]
        slates = torch.stack(
            [first_unshown(lists[:, k], state.shown, self.slate_size) for k in range(strategies)], dim=1
        )
        values = []
        for k in range(strategies):
            probs = slate_probs(self._tables, self._response, state, slates[:, k])
            values.append((joint_probs(probs) * self._tables.outcome_weights).sum(dim=(1, 2)))
        value = torch.stack(values, dim=1) - self._tables.cost
        # an unavailable strategy would serve nothing and still cost
        return torch.where(self._tables.available, value, -self._tables.cost)[: self.num_envs]

    def get_state(self) -> dict[str, Tensor]:
        """Everything that decides what comes next, as named tensors; `set_state` continues from it exactly."""
        state = self._current()
        return {
            **{f"user.{name}": value for name, value in state.to_dict().items()},
            "row_seed": self._row_seed.clone(),
            "env_key": self._env_key.clone(),
            "episode": self._episode.clone(),
            "return": self._return.clone(),
            "length": self._length.clone(),
            "deepest": torch.tensor(self._deepest),
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
        self._row_seed, self._env_key, self._episode = here["row_seed"], here["env_key"], here["episode"]
        self._return, self._length, self._deepest = here["return"], here["length"], int(here["deepest"])
        self._seeded = True
        return self._out(self._observe())

    def close_extras(self, **kwargs: Any) -> None:
        """Nothing to release."""
