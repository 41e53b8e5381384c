"""What the batched environments that simulate no users share: rows, seeds, the three autoreset modes, outputs and state.

A subclass keeps its state in named tensors with one row an environment and says how an episode begins (`_fresh`), what a step
does (`_transition`), what is seen (`_observe`) and what is told besides (`_facts`). Everything else is here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from metarec_gym.envs.infos import apart
from metarec_gym.seeding import fold_in, mix

Mode = Literal["NextStep", "SameStep", "Disabled"]
State = dict[str, Tensor]
_ROW_MULTIPLE = 16


@dataclass(frozen=True)
class Moved:
    """What a step brought, (num_envs, ...) each."""

    state: State
    """Every row's new state."""
    reward: Tensor
    """float32 (num_envs,)."""
    terminated: Tensor
    """bool (num_envs,): there is no future."""
    truncated: Tensor
    """bool (num_envs,): we stopped watching."""
    parts: dict[str, Tensor]
    """What goes to `info`; zeroed in rows whose episode had ended before."""


def row_exact(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """`function` of every element, so that a row has the same bits in any batch; (rows, ...) -> (rows, ...).

    Vector units and their scalar remainder differ in the last bit of exp, log and tanh; whole blocks leave no remainder.
    """
    rows = values.shape[0]
    missing = -rows % _ROW_MULTIPLE
    if missing:
        values = torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
    return function(values.contiguous())[:rows]


def tree_sum(values: Tensor) -> Tensor:
    """Sum over the last axis by halving: one order of additions on every device and in every batch; (..., n) -> (...)."""
    while values.shape[-1] > 8:
        half = (values.shape[-1] + 1) // 2
        rest = values[..., half:]
        if rest.shape[-1] < half:
            rest = torch.nn.functional.pad(rest, (0, half - rest.shape[-1]))
        values = values[..., :half] + rest
    parts = list(values.unbind(dim=-1))
    # whole columns at once: adding short slices of rows is three times slower
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts = [part + parts[half + k] if half + k < len(parts) else part for k, part in enumerate(parts[:half])]
    return parts[0]


def choose(rows: Tensor, one: State, other: State) -> State:
    """Rows of `one` where the mask is true, of `other` elsewhere; bool (num_envs,)."""
    return {
        name: torch.where(rows.view(-1, *(1,) * (value.ndim - 1)), value, other[name]) for name, value in one.items()
    }


class BatchedEnv(VectorEnv[Any, Any, Any]):
    """Rows that run side by side on one device; see the subclasses for what they do.

    Row i seeded s meets the draws of row 0 seeded s + i, whatever the batch: draws are functions of (row seed, episode, ...).
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int,
        single_observation_space: gymnasium.spaces.Box,
        single_action_space: gymnasium.spaces.Space[Any],
        *,
        device: str = "cpu",
        output: Literal["numpy", "torch"] = "numpy",
        autoreset_mode: Mode | AutoresetMode = "NextStep",
        record_statistics: bool = False,
        render_mode: None = None,
    ) -> None:
        """Makes the rows; they start at the first `reset`.

        Args:
            num_envs: Rows.
            single_observation_space: Observation of a row.
            single_action_space: Action of a row.
            device: "cpu", "cuda", "cuda:1" ...
            output: Arrays or tensors out; both are accepted in.
            autoreset_mode: One of Gymnasium's three.
            record_statistics: Adds `info["episode"]` with `r`, `l`, `t` at episode ends.
            render_mode: There is nothing to render.

        Raises:
            ValueError: When a setting is not one of those.
            TypeError: When a `render_mode` is given.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}, expected at least 1")
        if output not in ("numpy", "torch"):
            raise ValueError(f"output is {output!r}, expected 'numpy' or 'torch'")
        if render_mode is not None:
            # a TypeError, on which SB3's make_vec_env, which asks everyone for pictures, tries again without
            raise TypeError(f"render_mode is {render_mode!r}, but there is nothing to render; leave it None")
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.output = output
        self.render_mode = None
        self.closed = False
        self.spec = None
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.record_statistics = record_statistics
        self.single_observation_space = single_observation_space
        self.single_action_space = single_action_space
        self.observation_space = batch_space(single_observation_space, num_envs)
        self.action_space = batch_space(single_action_space, num_envs)
        index = torch.arange(num_envs, device=self.device)
        self._all = torch.ones(num_envs, dtype=torch.bool, device=self.device)
        self._row_seed = index.clone()
        self._seeded = False
        self._episode = torch.zeros_like(index)
        self._ended = torch.zeros_like(self._all)
        self._last_terminated = torch.zeros_like(self._all)
        self._return = torch.zeros(num_envs, device=self.device)
        self._length = torch.zeros_like(index)
        self._state: State | None = None

    # ------------------------------------------------------------------------------------------ what a subclass says
    def _fresh(self, options: dict[str, Any]) -> State:
        """First state of every row's current episode."""
        raise NotImplementedError

    def _check_action(self, action: Tensor) -> Tensor:
        """The actions in the form that `_transition` takes; refuses others."""
        raise NotImplementedError

    def _transition(self, state: State, action: Tensor) -> Moved:
        """One step of every row; must not write into `state`."""
        raise NotImplementedError

    def _observe(self, state: State) -> Tensor:
        """Observations, float32 (num_envs, obs_dim)."""
        raise NotImplementedError

    def _facts(self, state: State) -> dict[str, Tensor]:
        """What `info` tells about the state itself."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ reset and step
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts episodes in all rows, or in the rows of `options["reset_mask"]`.

        Args:
            seed: Row i is seeded `seed + i`, as the single environment with that seed; a list gives each row its own. Without
                a seed the rows go on to their next episode.
            options: `reset_mask` (bool (num_envs,)) and what the class names.

        Returns:
            Observations of all rows, and infos.

        Raises:
            ValueError: When an option has the wrong length.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        options = dict(options or {})
        mask = self._row_mask(options.pop("reset_mask", None))
        if seed is not None or not self._seeded:
            self._seed_rows(seed, mask)
        elif self._state is not None:
            self._episode = torch.where(mask, self._episode + 1, self._episode)
        self._begin(mask, options)
        state = self._current()
        return self._out(self._observe(state)), self._info(state, {})

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step in every row.

        Args:
            actions: (num_envs, ...), array or tensor.

        Returns:
            Observations, rewards (float32), terminations and truncations (bool), infos, each key with its `_<key>` mask. Rows
            that had ended before do nothing: in next-step mode they are reset, in disabled mode they stay ended, reward 0.

        Raises:
            RuntimeError: When `reset` was not called.
            ValueError: When an action has the wrong shape, type or range.
        """
        if self._state is None:
            raise RuntimeError("step was called before reset; call env.reset(seed=...) first")
        action = self._check_action(torch.as_tensor(actions, device=self.device))
        state, idle = self._state, self._ended
        moved = self._transition(state, action)
        any_idle = bool(idle.any())
        reward, parts, terminated, truncated = moved.reward, moved.parts, moved.terminated, moved.truncated
        self._state = moved.state
        if any_idle:
            self._state = choose(~idle, moved.state, state)
            nothing = {name: torch.zeros_like(value) for name, value in parts.items()}
            parts = choose(~idle, parts, nothing)
            reward = torch.where(idle, 0.0, reward)
        ended = (terminated | truncated) & ~idle
        # an ended row keeps saying how it ended until it is reset
        terminated = torch.where(idle, self._last_terminated, terminated) if any_idle else terminated
        truncated = torch.where(idle, ~self._last_terminated, truncated) if any_idle else truncated
        self._ended, self._last_terminated = self._ended | ended, terminated
        self._return = self._return + reward
        self._length = self._length + (~idle)
        info = self._info(self._state, parts)
        if self.record_statistics and bool(ended.any()):
            numbers = {"r": self._return, "l": self._length, "t": torch.zeros_like(self._return)}
            self._add(info, "episode", {k: self._out(v) for k, v in numbers.items()}, ended)
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and any_idle:
            self._episode = self._episode + idle
            self._begin(idle, {})
            terminated, truncated = terminated & ~idle, truncated & ~idle
            info = {**info, **self._info(self._state, {})}
        elif self.autoreset_mode is AutoresetMode.SAME_STEP and bool(ended.any()):
            self._add(info, "final_obs", self._out(self._observe(self._state)), ended)
            final = {k: v for k, v in info.items() if not k.endswith("final_obs")}
            self._episode = self._episode + ended
            self._begin(ended, {})
            info = {**info, **self._info(self._state, {})}
            self._add(info, "final_info", apart(final, info), ended)
        obs = self._observe(self._state)
        return self._out(obs), self._out(reward), self._out(terminated), self._out(truncated), info

    def _begin(self, rows: Tensor, options: dict[str, Any]) -> None:
        """Starts the next episode in the rows of the mask."""
        fresh = self._fresh(options)
        self._state = fresh if self._state is None else choose(rows, fresh, self._state)
        self._ended = self._ended & ~rows
        self._last_terminated = self._last_terminated & ~rows
        self._return = torch.where(rows, 0.0, self._return)
        self._length = torch.where(rows, 0, self._length)

    # ------------------------------------------------------------------------------------------ rows and seeds
    def _row_mask(self, given: Any) -> Tensor:
        if given is None:
            return self._all.clone()
        mask = torch.as_tensor(given, device=self.device)
        if mask.shape != (self.num_envs,) or mask.dtype != torch.bool:
            raise ValueError(
                f"reset_mask has shape {tuple(mask.shape)} and dtype {mask.dtype}, expected bool ({self.num_envs},)"
            )
        if self._state is None and not bool(mask.all()):
            raise ValueError("the first reset must start every row; call reset() without reset_mask first")
        return mask

    def _pinned(self, options: dict[str, Any], name: str) -> Tensor | None:
        """An option with one integer a row."""
        if options.get(name) is None:
            return None
        value = torch.as_tensor(options[name], device=self.device).to(torch.int64)
        if value.shape != (self.num_envs,):
            raise ValueError(f"options[{name!r}] has shape {tuple(value.shape)}, expected ({self.num_envs},)")
        return value

    def _seed_rows(self, seed: int | Sequence[int | None] | None, mask: Tensor) -> None:
        if seed is None:
            seed = int(self.np_random.integers(2**62))
        if isinstance(seed, int):
            # Python integers of any size: reduce before the signed 64-bit tensor sees them
            seeds = [(seed + i) % 2**63 for i in range(self.num_envs)]
        else:
            if len(seed) != self.num_envs:
                raise ValueError(f"seed has {len(seed)} entries, expected {self.num_envs}")
            seeds = [int(self.np_random.integers(2**62)) if s is None else int(s) % 2**63 for s in seed]
        values = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        self._row_seed = torch.where(mask, values, self._row_seed)
        self._episode = torch.where(mask, 0, self._episode)
        self._seeded = True

    def _episode_key(self) -> Tensor:
        """int64 (num_envs,): parent of every draw of the current episodes."""
        return fold_in(mix(self._row_seed), self._episode)

    # ------------------------------------------------------------------------------------------ outputs
    def _current(self) -> State:
        if self._state is None:
            raise RuntimeError("the environment has no state yet; call env.reset(seed=...) first")
        return self._state

    def _out(self, value: Tensor) -> Any:
        """As the caller wants it; never memory that changes later."""
        value = value.clone()
        return value if self.output == "torch" else value.cpu().numpy()

    def _add(self, info: dict[str, Any], key: str, value: Any, rows: Tensor | None = None) -> None:
        info[key], info[f"_{key}"] = value, self._out(self._all if rows is None else rows)

    def _info(self, state: State, parts: dict[str, Tensor]) -> dict[str, Any]:
        info: dict[str, Any] = {}
        for name, value in {**self._facts(state), **parts}.items():
            self._add(info, name, self._out(value))
        return info

    # ------------------------------------------------------------------------------------------ state
    def get_state(self) -> State:
        """Everything that decides what comes next, as named tensors; `set_state` continues from it exactly."""
        run = {
            "row_seed": self._row_seed,
            "episode": self._episode,
            "ended": self._ended,
            "last_terminated": self._last_terminated,
            "return": self._return,
            "length": self._length,
        }
        state = {f"state.{name}": value for name, value in self._current().items()}
        return {name: value.clone() for name, value in {**run, **state}.items()}

    def set_state(self, saved: State) -> Any:
        """Continues from `get_state()` of an environment with the same settings; returns the observations.

        Raises:
            ValueError: When the state comes from another number of rows.
        """
        rows = saved["row_seed"].shape[0]
        if rows != self.num_envs:
            raise ValueError(
                f"the saved state has {rows} rows, this environment {self.num_envs}; use the same num_envs"
            )
        here = {name: value.to(self.device).clone() for name, value in saved.items()}
        self._state = {n.removeprefix("state."): v for n, v in here.items() if n.startswith("state.")}
        self._row_seed, self._episode, self._seeded = here["row_seed"], here["episode"], True
        self._ended, self._last_terminated = here["ended"], here["last_terminated"]
        self._return, self._length = here["return"], here["length"]
        return self._out(self._observe(self._state))

    def close_extras(self, **kwargs: Any) -> None:
        """Nothing to release."""


class BatchOfOne(gymnasium.Env[Any, Any]):
    """A batched environment with one row as a single one; seeded s + i it equals row i of the batch seeded s."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, batch: BatchedEnv) -> None:
        self._batch = batch
        self.render_mode = None
        self.observation_space = batch.single_observation_space
        self.action_space = batch.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: Seeds the environment; None goes on to the next episode.
            options: As for the batch, numbers instead of arrays.

        Returns:
            Observation (obs_dim,) and info.
        """
        super().reset(seed=seed)
        if seed is None and not self._batch._seeded:
            seed = int(self.np_random.integers(2**62))
        batch = {name: np.atleast_1d(value) for name, value in (options or {}).items()}
        obs, info = self._batch.reset(seed=seed, options=batch)
        return obs[0], self._one(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step; see the batch."""
        obs, reward, terminated, truncated, info = self._batch.step(np.asarray(action)[None])
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), self._one(info)

    @staticmethod
    def _one(info: dict[str, Any]) -> dict[str, Any]:
        return {key: value[0] for key, value in info.items() if not key.startswith("_")}
