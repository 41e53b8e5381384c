"""What is checked, and how it is played: the same actions at a row's k-th real step, whatever the autoreset mode."""

from __future__ import annotations

import copy
import unittest
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from metarec_gym.testing.trees import Array, array, copied, is_array, leaves, picked, stacked

MakeVector = Callable[[int, AutoresetMode], VectorEnv[Any, Any, Any]]
MakeSingle = Callable[[], gymnasium.Env[Any, Any]]
Touch = Callable[[Any], None]
Seed = int | list[int] | None
FOUNDATIONS = ("types", "final_obs")
"""Rules on which the playing itself relies: any check may find them broken, none can be left out."""


class BrokenRule(AssertionError):
    """An environment breaks a rule; the sentence says which one, what came and what was expected."""

    def __init__(self, rule: str, sentence: str) -> None:
        super().__init__(f"{rule}: {sentence}")
        self.rule = rule
        """Name of the rule, a key of `CHECKS`."""


class NotApplicable(unittest.SkipTest):
    """A check has nothing to check here; test runners show it as skipped, with the reason."""


@dataclass(frozen=True)
class Subject:
    """The environment under test and how long it is played."""

    make: MakeVector
    """`make(num_envs, autoreset_mode)` gives a new vector environment."""
    make_single: MakeSingle | None = None
    """Gives the single environment of which the rows are copies, if there is one."""
    make_torch: MakeVector | None = None
    """As `make`, with tensors out, if there is that."""
    env_id: str | None = None
    """Registered id, if there is one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `gymnasium.make` and `make_vec` for `env_id`; JSON-able."""
    num_envs: int = 3
    """Rows."""
    steps: int = 60
    """Steps of every run; some episode must end within them."""
    seed: int = 0
    """Seed of resets and of the drawn actions."""
    modes: tuple[AutoresetMode, ...] = tuple(AutoresetMode)
    """Autoreset modes that `make` can give."""
    endings: tuple[str, ...] = ()
    """Endings that the environment is known to have within `steps`: `terminated`, `truncated`."""
    _actions: list[Actions] = field(default_factory=list, init=False, repr=False, compare=False)
    _runs: dict[AutoresetMode, Run] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_envs < 1 or self.steps < 1 or not self.modes:
            raise ValueError(
                f"num_envs is {self.num_envs}, steps {self.steps}, modes {self.modes}; expected at least one of each"
            )
        if not set(self.endings) <= {"terminated", "truncated"}:
            raise ValueError(f"endings is {self.endings}, expected some of 'terminated', 'truncated'")

    def env(self, mode: AutoresetMode | None = None) -> VectorEnv[Any, Any, Any]:
        """A new environment, in the first mode if none is named."""
        env = self.make(self.num_envs, mode or self.modes[0])
        if env.num_envs != self.num_envs:
            raise BrokenRule("spaces", f"num_envs is {env.num_envs}, expected {self.num_envs}, as asked for")
        return env

    def actions(self) -> Actions:
        """The actions of every run, drawn once."""
        if not self._actions:
            self._actions.append(Actions(self.env(), self.steps, self.seed))
        return self._actions[0]

    def run(self, mode: AutoresetMode) -> Run:
        """The plain run in a mode, played once and kept."""
        if mode not in self._runs:
            self._runs[mode] = play(self.env(mode), mode, self.actions(), seed=self.seed, steps=self.steps)
        return self._runs[mode]


class Actions:
    """Actions drawn once from a copy of the action space: row i's k-th real step has the same one in every run.

    Where the space is `Discrete` and `info["action_mask"]` says what is valid, the draw picks among the valid actions.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], steps: int, seed: int) -> None:
        self._single = env.single_action_space
        # a copy: the environment may draw from its own space
        space = copy.deepcopy(batch_space(self._single, env.num_envs))
        space.seed(seed)
        drawn = [copied(space.sample()) for _ in range(steps)]
        for name, value in leaves(drawn[0], "action"):
            if value.shape[:1] != (env.num_envs,):
                raise TypeError(
                    f"{name} of the batched action space {space} has no row for every environment; the checks know spaces whose "
                    "batches are arrays (Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of them)"
                )
        self._table = stacked(drawn)
        self._draws = np.random.default_rng(seed).random((steps, env.num_envs))
        self._rows = np.arange(env.num_envs)

    def of(self, count: NDArray[np.int64], info: Mapping[str, Any]) -> Any:
        """Actions of rows that have made `count` real steps, int64 (num_envs,), after `info`."""
        action = copied(picked(self._table, (count, self._rows)))
        if not isinstance(self._single, gymnasium.spaces.Discrete) or "action_mask" not in info:
            return action
        mask = array(info["action_mask"]) > 0
        if mask.shape != (len(self._rows), int(self._single.n)):
            return action
        # the r-th valid action, r = floor(draw * number of valid ones)
        rank = (self._draws[count, self._rows] * mask.sum(axis=1)).astype(np.int64)
        chosen = np.argmax(np.cumsum(mask, axis=1) > rank[:, None], axis=1) + self._single.start
        return np.where(mask.any(axis=1), chosen, action).astype(action.dtype)


@dataclass(frozen=True)
class Step:
    """One step of all rows; numpy copies, (num_envs, ...) each."""

    restart: tuple[Any, Any] | None
    """Observation and info of the reset of ended rows before it (disabled mode)."""
    before: Any
    """What the action was chosen on."""
    action: Any
    """What was done."""
    given: Any
    """The array that `step` was given, as it was afterwards."""
    real: Array
    """bool (num_envs,): False where next-step mode only reset the row."""
    obs: Any
    reward: Array
    terminated: Array
    truncated: Array
    info: Any
    ended: Array
    """bool (num_envs,): an episode ended here."""
    after: Any
    """What followed: `obs`, in same-step mode with the rows of `final_obs`."""


@dataclass(frozen=True)
class Run:
    """A run: what reset gave, and the steps."""

    start: tuple[Any, Any]
    steps: list[Step]
    raw: list[tuple[str, Any, Any]]
    """Where, the very objects that were returned there, and copies made at that moment."""

    def outputs(self) -> list[tuple[str, Any, Any]]:
        """Where, observation and info of every output."""
        found = [("reset", *self.start)]
        for index, step in enumerate(self.steps):
            if step.restart is not None:
                found.append((f"reset of ended rows before step {index}", *step.restart))
            found.append((f"step {index}", step.obs, step.info))
        return found


def play(
    env: VectorEnv[Any, Any, Any],
    mode: AutoresetMode,
    actions: Actions,
    *,
    seed: Seed,
    steps: int,
    touch: Touch | None = None,
) -> Run:
    """Plays `steps` steps; in disabled mode, ended rows are reset by `options["reset_mask"]` before the next.

    Args:
        env: The environment.
        mode: Its autoreset mode.
        actions: What is done.
        seed: Of the reset; None resets without a seed.
        steps: Steps.
        touch: Gets the very objects of every output, and the used actions, after they were copied.

    Raises:
        BrokenRule: When an output has not the form that the spaces promise, or a last observation is missing.
    """
    raw: list[tuple[str, Any, Any]] = []

    def returned(where: str, out: Any) -> Any:
        kept = copied(out)
        raw.append((where, out, kept))
        if touch is not None:
            touch(out)
        return kept

    def reset(where: str, **arguments: Any) -> tuple[Any, Any]:
        out = env.reset(**arguments)
        check_form(env, out, where, parts=2)
        kept = returned(where, out)
        return kept[0], kept[1]

    obs, info = start = reset("reset", seed=seed) if seed is not None else reset("reset")
    count = np.zeros(env.num_envs, dtype=np.int64)
    ended = np.zeros(env.num_envs, dtype=bool)
    found: list[Step] = []
    for index in range(steps):
        restart = None
        if mode is AutoresetMode.DISABLED and ended.any():
            restart = reset(f"reset before step {index}", options={"reset_mask": ended.copy()})
            obs, info = restart
        action = actions.of(count, info)
        given = copied(action)
        out = env.step(given)
        check_form(env, out, f"step {index}", parts=5)
        left = copied(given)
        before, (obs, reward, terminated, truncated, info) = obs, returned(f"step {index}", out)
        if touch is not None:
            touch(given)
        real = ~ended if mode is AutoresetMode.NEXT_STEP else np.ones_like(ended)
        ended = (terminated | truncated) & real
        after = obs
        if mode is AutoresetMode.SAME_STEP and ended.any():
            after = with_rows(obs, _final(info, env.num_envs, index), ended)
        found.append(Step(restart, before, action, left, real, obs, reward, terminated, truncated, info, ended, after))
        count = count + real
    return Run(start, found, raw)


def _final(info: Mapping[str, Any], num_envs: int, index: int) -> Any:
    if "final_obs" not in info:
        raise BrokenRule(
            "final_obs",
            f"an episode ended at step {index} in same-step mode and info has no 'final_obs'; expected the last observation "
            "there, since step returns the first of the next episode",
        )
    for name, value in leaves(info["final_obs"], "info['final_obs']"):
        if array(value).shape[:1] != (num_envs,):
            raise BrokenRule(
                "final_obs", f"{name} has shape {array(value).shape}, expected one row for each of {num_envs}"
            )
    return info["final_obs"]


def with_rows(tree: Any, final: Any, rows: Array) -> Any:
    """A copy of the observations with the given rows taken from `final`: dense arrays, or Gymnasium's array of objects."""
    result = copied(tree)
    if isinstance(final, np.ndarray) and final.dtype == object:
        for row in np.flatnonzero(rows).tolist():
            for (_, target), (_, value) in zip(leaves(result, "obs"), leaves(final[row], "obs"), strict=True):
                target[row] = array(value)
        return result
    for (_, target), (_, value) in zip(leaves(result, "obs"), leaves(final, "obs"), strict=True):
        target[rows] = value[rows]
    return result


def check_form(env: VectorEnv[Any, Any, Any], out: Any, where: str, parts: int) -> None:
    """Raises `types` unless an output has the containers, shapes and dtypes that the spaces promise."""
    if not isinstance(out, tuple) or len(out) != parts:
        size = f" of {len(out)}" if isinstance(out, Sequence) else ""
        raise BrokenRule("types", f"{where} gave a {type(out).__name__}{size}, expected a tuple of {parts}")
    if not isinstance(out[-1], dict):
        raise BrokenRule("types", f"info of {where} is a {type(out[-1]).__name__}, expected a dict")
    _check_obs(env.observation_space, out[0], env.num_envs, f"obs of {where}")
    if parts == 2:
        return
    for name, value, kinds, word in (
        ("reward", out[1], "f", "floats"),
        ("terminated", out[2], "b", "bool"),
        ("truncated", out[3], "b", "bool"),
    ):
        came = f"{array(value).dtype} {array(value).shape}" if is_array(value) else f"a {type(value).__name__}"
        if not is_array(value) or array(value).shape != (env.num_envs,) or array(value).dtype.kind not in kinds:
            raise BrokenRule("types", f"{name} of {where} is {came}, expected {word} ({env.num_envs},)")


def _check_obs(space: gymnasium.Space[Any], obs: Any, num_envs: int, name: str) -> None:
    if isinstance(space, gymnasium.spaces.Dict):
        if not isinstance(obs, dict) or set(obs) != set(space.spaces):
            keys = sorted(obs) if isinstance(obs, dict) else type(obs).__name__
            raise BrokenRule("types", f"{name} has {keys}, expected a dict with {sorted(space.spaces)}")
        for key, inner in space.spaces.items():
            _check_obs(inner, obs[key], num_envs, f"{name}[{key!r}]")
    elif isinstance(space, gymnasium.spaces.Tuple):
        if not isinstance(obs, tuple) or len(obs) != len(space.spaces):
            raise BrokenRule("types", f"{name} is a {type(obs).__name__}, expected a tuple of {len(space.spaces)}")
        for index, inner in enumerate(space.spaces):
            _check_obs(inner, obs[index], num_envs, f"{name}[{index}]")
    elif space.shape is not None:
        if not is_array(obs):
            raise BrokenRule("types", f"{name} is a {type(obs).__name__}, expected an array of {space}")
        value = array(obs)
        if value.shape != space.shape or value.dtype != space.dtype:
            raise BrokenRule(
                "types",
                f"{name} is {value.dtype} {value.shape}, expected {space.dtype} {space.shape} as its space says",
            )
        if value.shape[:1] != (num_envs,):
            raise BrokenRule("types", f"{name} has shape {value.shape}, expected a row for each of {num_envs}")
