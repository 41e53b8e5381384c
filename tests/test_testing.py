"""The conformance kit on an environment that keeps every rule, and on copies of it that break one each."""

import doctest
import re
import unittest

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from metarec_gym.testing import CHECKS, BrokenRule, EnvContract, NotApplicable, Subject, check_vector_env, contract

NEXT_STEP, SAME_STEP, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED
ALL = ("terminated", "truncated")


class Walk(VectorEnv):
    """Rows walk on [-1, 1] and terminate beyond 0.4; five steps are the limit. Left is masked where x < 0."""

    metadata = {"render_modes": [], "autoreset_mode": NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs=1, autoreset_mode="NextStep", drift=None):
        self.num_envs = num_envs
        self.mode = self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.mode}
        self.drift = drift.get(0, 0.0) if isinstance(drift, dict) else 0.0
        self.single_observation_space = gymnasium.spaces.Box(np.float32([-1, 0]), np.float32([1, 1]))
        self.single_action_space = gymnasium.spaces.Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.random = None

    def row_seeds(self, seed):
        return list(seed) if isinstance(seed, list) else [seed + row for row in range(self.num_envs)]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed if isinstance(seed, int) else None)
        mask = (options or {}).get("reset_mask")
        if seed is not None:
            self.random = [np.random.default_rng(s) for s in self.row_seeds(seed)]
        if mask is None:
            mask = np.ones(self.num_envs, dtype=bool)
            self.x, self.t = np.zeros(self.num_envs, dtype=np.float32), np.zeros(self.num_envs, dtype=int)
            self.ended = ~mask
        self.begin(mask)
        return self.obs(), self.info()

    def begin(self, rows):
        x, t = self.x.copy(), self.t.copy()
        for row in np.flatnonzero(rows):
            x[row], t[row] = self.random[row].uniform(-0.3, 0.3) + self.drift, 0
        self.x, self.t, self.ended = x, t, self.ended & ~rows

    def obs(self):
        return np.stack([self.x, self.t / 5], axis=1).astype(np.float32)

    def mask(self):
        mask = np.ones((self.num_envs, 3), dtype=np.int8)
        mask[:, 0] = self.x >= 0
        return mask

    def action_masks(self):
        return self.mask().astype(bool)

    def facts(self):
        return {"action_mask": self.mask(), "position": self.x.copy()}

    def info(self):
        info = self.facts()
        return info | {f"_{key}": np.ones(self.num_envs, dtype=bool) for key in info}

    def move(self, actions, idle):
        x = self.x.copy()
        for row in np.flatnonzero(~idle):
            x[row] += 0.2 * (actions[row] - 1) + self.random[row].uniform(-0.2, 0.2)
        self.x, self.t = np.clip(x, -1, 1), self.t + ~idle

    def step(self, actions):
        idle = self.ended
        self.move(actions, idle)
        reward = np.where(idle, 0, self.x).astype(np.float32)
        terminated = (np.abs(self.x) > 0.4) & ~idle
        truncated = (self.t >= 5) & ~terminated & ~idle
        self.ended = terminated | truncated
        info = self.info()
        if self.mode is NEXT_STEP and idle.any():
            self.begin(idle)
            info = self.info()
        if self.mode is SAME_STEP and self.ended.any():
            ended, last = self.ended, self.last(info)
            self.begin(ended)
            info = self.info() | last
            info |= {f"_{key}": ended.copy() for key in last}
        return self.obs(), reward, terminated, truncated, info

    def last(self, info):
        return {"final_obs": self.obs(), "final_info": info}

    def close_extras(self, **kwargs):
        pass


class WalkEnv(gymnasium.Env):
    """One row of Walk."""

    metadata = {"render_modes": []}  # noqa: RUF012
    kind = Walk

    def __init__(self, drift=None, kind=None, render_mode=None):
        self.batch = (kind or Walk)(1, "Disabled", drift=drift)
        self.observation_space, self.action_space = (
            self.batch.single_observation_space,
            self.batch.single_action_space,
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        first = seed is None and self.batch.random is None
        obs, _ = self.batch.reset(seed=int(self.np_random.integers(2**31)) if first else seed)
        return obs[0], {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.batch.step(np.array([action]))
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}


class TorchWalk(Walk):
    """Tensors out."""

    def reset(self, **how):
        return tensors(super().reset(**how))

    def step(self, actions):
        return tensors(super().step(actions))


def tensors(tree):
    if isinstance(tree, dict):
        return {key: tensors(value) for key, value in tree.items()}
    return tuple(tensors(value) for value in tree) if isinstance(tree, tuple) else torch.from_numpy(np.array(tree))


@pytest.fixture(scope="module", autouse=True)
def _registered():
    gymnasium.register(
        "Kit/Walk-v0", entry_point="tests.test_testing:WalkEnv", vector_entry_point="tests.test_testing:Walk"
    )
    yield
    del gymnasium.registry["Kit/Walk-v0"]


def subject(kind=Walk, **how):
    settings = {
        "make_single": lambda: WalkEnv(kind=kind),
        "make_torch": TorchWalk if kind is Walk else None,
        "env_id": "Kit/Walk-v0",
        "steps": 12,
        "endings": ALL,
    }
    return {"make": kind} | settings | how


# ---- what each broken environment does otherwise


class WiderSpace(Walk):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.observation_space = gymnasium.spaces.Box(-1, 1, (self.num_envs, 2), dtype=np.float32)


class OneRowMore(Walk):
    def __init__(self, num_envs=1, *args, **kwargs):
        super().__init__(num_envs + 1, *args, **kwargs)


class OtherActions(Walk):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.action_space = gymnasium.spaces.Box(0, 2, (self.num_envs,), dtype=np.int64)


class ClassMetadata(Walk):
    metadata = {"render_modes": [], "autoreset_mode": NEXT_STEP}  # noqa: RUF012

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metadata = type(self).metadata
        self.metadata["autoreset_mode"] = self.mode


class ModeAsText(Walk):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metadata["autoreset_mode"] = self.mode.value


class ModeOfTheClass(Walk):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metadata = dict(type(self).metadata)


class NoModeAttribute(Walk):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.autoreset_mode


def changed(position, change):
    """A Walk whose step returns something else at one position."""

    class Changed(Walk):
        def step(self, actions):
            out = list(super().step(actions))
            out[position] = change(out[position])
            return tuple(out)

    return Changed


class DoubleObs(Walk):
    def obs(self):
        return super().obs().astype(np.float64)


class InfoAsList(Walk):
    def reset(self, **how):
        obs, _ = super().reset(**how)
        return obs, [{}] * self.num_envs


class BeyondTheBox(Walk):
    def obs(self):
        return super().obs() * np.float32([1, 1.5])


class NotANumber(Walk):
    def obs(self):
        return np.where(super().obs() > 0.5, np.float32("nan"), super().obs())


class FinalBeyondTheBox(Walk):
    def last(self, info):
        last = super().last(info)
        return last | {"final_obs": last["final_obs"] + np.float32([0, 1])}


class NoMaskOfInfo(Walk):
    def info(self):
        info = super().info()
        del info["_position"]
        return info


class MaskAlone(Walk):
    def info(self):
        return super().info() | {"_nothing": np.ones(self.num_envs, dtype=bool)}


class MaskOfNumbers(Walk):
    def info(self):
        return super().info() | {"_position": np.ones(self.num_envs)}


class Words(Walk):
    def facts(self):
        return super().facts() | {"name": np.array(["row"] * self.num_envs)}


class ListOfInfos(Walk):
    def facts(self):
        return super().facts() | {"rows": [1.0] * self.num_envs}


class Objects(Walk):
    def facts(self):
        return super().facts() | {"any": np.full(self.num_envs, None, dtype=object)}


class NumberForAll(Walk):
    def facts(self):
        return super().facts() | {"weight": np.float32([0.5, 0.5])[: self.num_envs - 1]}


class BoolMask(Walk):
    def facts(self):
        return super().facts() | {"action_mask": self.mask().astype(bool)}


class NothingValid(Walk):
    def mask(self):
        return super().mask() * (np.abs(self.x) < 0.2).astype(np.int8)[:, None]

    def action_masks(self):
        return super().mask().astype(bool)


class MaskMethodOfOthers(Walk):
    def action_masks(self):
        return np.ones((self.num_envs, 3), dtype=bool)


class WideMaskMethod(Walk):
    def action_masks(self):
        return np.ones((self.num_envs, 4), dtype=bool)


class MaskForgottenLater(Walk):
    def step(self, actions):
        *out, info = super().step(actions)
        return (*out, {key: value for key, value in info.items() if "action_mask" not in key})


class OneDone(Walk):
    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions)
        return obs, reward, terminated | truncated, terminated | truncated, info


class TruncationAsTermination(Walk):
    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions)
        return obs, reward, terminated | truncated, np.zeros_like(truncated), info


class Endless(Walk):
    def move(self, actions, idle):
        self.x = np.float32([r.uniform(-0.3, 0.3) for r in self.random])
        self.t = np.minimum(self.t + 1, 4)


class OwnEntropy(Walk):
    def move(self, actions, idle):
        super().move(actions, idle)
        self.x = np.clip(self.x + np.random.default_rng().uniform(-0.1, 0.1, self.num_envs), -1, 1).astype(np.float32)


class Remembers(Walk):
    """Steps of before the seed count on."""

    total = 0

    def move(self, actions, idle):
        self.total += 1
        super().move(actions, idle)
        self.x = np.clip(self.x + np.float32(0.01 * (self.total % 7)), -1, 1)


class DeafToSeeds(Walk):
    def row_seeds(self, seed):
        return [0] * self.num_envs


class SmallSeeds(Walk):
    def row_seeds(self, seed):
        return [int(np.int64(s)) for s in super().row_seeds(seed)]


class OneSeedOnly(Walk):
    def row_seeds(self, seed):
        return [seed + row for row in range(self.num_envs)]


class FirstOfTheList(Walk):
    def row_seeds(self, seed):
        return super().row_seeds(seed[0] if isinstance(seed, list) else seed)


class OtherListThanNumber(Walk):
    def row_seeds(self, seed):
        return [s + 100 for s in seed] if isinstance(seed, list) else super().row_seeds(seed)


class SeedsAgain(Walk):
    last_seed = None

    def reset(self, *, seed=None, options=None):
        self.last_seed = seed if seed is not None else self.last_seed
        return super().reset(seed=None if options else self.last_seed, options=options)


class FreshEntropy(Walk):
    def reset(self, *, seed=None, options=None):
        if seed is None and options is None:
            seed = int(np.random.default_rng().integers(2**40))
        return super().reset(seed=seed, options=options)


class RewardedReset(Walk):
    def step(self, actions):
        idle = self.ended if self.mode is NEXT_STEP else np.zeros(self.num_envs, dtype=bool)
        obs, reward, *rest = super().step(actions)
        return obs, np.where(idle, np.float32(1), reward), *rest


class NoFinalObs(Walk):
    def last(self, info):
        return {"final_info": info}


class NoFinalInfo(Walk):
    def last(self, info):
        return {"final_obs": self.obs()}


class FinalForEveryRow(Walk):
    def step(self, actions):
        *out, info = super().step(actions)
        return (*out, info | {key: np.ones_like(value) for key, value in info.items() if key.startswith("_final")})


class FinalIsFirst(Walk):
    """In same-step mode the observation after the reset stands for the last one."""

    def step(self, actions):
        obs, *out, info = super().step(actions)
        return obs, *out, info | ({"final_obs": obs.copy()} if "final_obs" in info else {})


class LateReset(Walk):
    """In next-step mode the first step of an episode is swallowed."""

    def step(self, actions):
        idle = self.ended
        out = super().step(actions)
        if self.mode is NEXT_STEP and idle.any():
            self.t = self.t + idle
            return self.obs(), *out[1:]
        return out


class InfoOfTheNext(Walk):
    def step(self, actions):
        *out, info = super().step(actions)
        if "final_info" in info:
            info["final_info"] = self.info()
        return (*out, info)


class PoorFinalInfo(Walk):
    def last(self, info):
        few = {key: info[key] for key in ("action_mask", "_action_mask")}
        return super().last(info) | {"final_info": few}


class ResetsAll(Walk):
    def begin(self, rows):
        super().begin(np.ones_like(rows) if self.mode is DISABLED else rows)


class DrawsForAll(Walk):
    """A reset of one row takes a draw from every row's generator."""

    def begin(self, rows):
        super().begin(rows)
        if self.mode is DISABLED:
            for row in np.flatnonzero(~rows):
                self.random[row].uniform()


class PopsOptions(Walk):
    def reset(self, *, seed=None, options=None):
        mask = options.pop("reset_mask", None) if options else None
        return super().reset(seed=seed, options=None if mask is None else {"reset_mask": mask})


class ClearsTheMask(Walk):
    def reset(self, *, seed=None, options=None):
        out = super().reset(seed=seed, options=options)
        if options:
            options["reset_mask"][:] = False
        return out


class WritesActions(Walk):
    def step(self, actions):
        out = super().step(actions)
        actions[:] = 0
        return out


class OneBuffer(Walk):
    buffer = None

    def obs(self):
        obs = super().obs()
        if self.buffer is None:
            self.buffer = obs
        self.buffer[:] = obs
        return self.buffer

    def last(self, info):
        return super().last(info) | {"final_obs": self.obs().copy()}


class OneInfoBuffer(Walk):
    def facts(self):
        facts = super().facts()
        if not hasattr(self, "buffer"):
            self.buffer = facts["position"].copy()
        if self.mode is not SAME_STEP:
            self.buffer[:] = facts["position"]
            facts["position"] = self.buffer
        return facts


class StateAsInfo(Walk):
    def facts(self):
        return super().facts() | {"position": self.x}


class KeepsActions(Walk):
    """The actions of the step before push on; they are the caller's own array."""

    before = None

    def reset(self, **how):
        self.before = None if "options" not in how else self.before
        return super().reset(**how)

    def move(self, actions, idle):
        super().move(actions, idle)
        if self.before is not None:
            fresh = self.t > 1
            self.x = np.clip(self.x + np.float32(0.01) * self.before * (fresh & ~idle), -1, 1).astype(np.float32)
        self.before = actions


class TwoNames(Walk):
    def facts(self):
        facts = super().facts()
        return facts | {"again": facts["position"]}


class CannotCloseTwice(Walk):
    def close(self, **kwargs):
        if self.closed:
            raise RuntimeError("already closed")
        self.closed = True


class NeverClosed(Walk):
    def close(self, **kwargs):
        pass


BROKEN = [
    ("spaces", OneRowMore, "num_envs is 4, expected 3"),
    ("spaces", WiderSpace, r"observation_space is Box.*expected batch_space\(single_observation_space, 3\)"),
    ("spaces", OtherActions, r"action_space is Box.*which is MultiDiscrete\(\[3 3 3\]\)"),
    ("metadata", ClassMetadata, "changed to .* when another instance was made"),
    ("metadata", ModeAsText, "is 'NextStep', expected AutoresetMode.NEXT_STEP"),
    ("metadata", ModeOfTheClass, r"but AutoresetMode.SAME_STEP was asked for"),
    ("mode_attribute", NoModeAttribute, "the attribute autoreset_mode is None, expected <AutoresetMode.NEXT_STEP"),
    ("types", DoubleObs, r"obs of reset is float64 \(3, 2\), expected float32 \(3, 2\)"),
    ("types", InfoAsList, "info of reset is a list, expected a dict"),
    ("types", changed(1, lambda r: r[:, None]), r"reward of step 0 is float32 \(3, 1\), expected floats \(3,\)"),
    ("types", changed(1, lambda r: r.tolist()), "reward of step 0 is a list"),
    ("types", changed(2, lambda t: t.astype(np.int8)), r"terminated of step 0 is int8 \(3,\), expected bool"),
    ("types", changed(3, lambda t: bool(t.any())), "truncated of step 0 is a bool"),
    ("bounds", BeyondTheBox, r"obs after step 3 \(NextStep\)\[\d, 1\] is 1.2\d*, expected 0.0..1.0"),
    ("bounds", NotANumber, r"is nan, expected"),
    ("bounds", FinalBeyondTheBox, r"final_obs after step \d+ \(SameStep\)\[\d, 1\] is \d.\d+, expected 0.0..1.0"),
    ("info_pairs", NoMaskOfInfo, r"info\['position'\] after reset has no mask '_position', expected bool \(3,\)"),
    ("info_pairs", MaskAlone, r"info\['_nothing'\] after reset masks 'nothing', which is not there"),
    ("info_pairs", MaskOfNumbers, r"the mask '_position' .* is float64 \(3,\), expected bool"),
    ("info_dense", Words, r"info\['name'\] after reset is of <U3, expected numbers"),
    ("info_dense", ListOfInfos, r"info\['rows'\]\[0\] after reset has shape \(\), expected 3 rows"),
    ("info_dense", Objects, r"info\['any'\] after reset is of object, expected numbers"),
    ("info_dense", NumberForAll, r"info\['weight'\] after reset has shape \(2,\), expected 3 rows"),
    ("action_masks", BoolMask, r"is bool \(3, 3\), expected int8 \(3, ...\)"),
    ("action_masks", NothingValid, "has no valid action in row"),
    ("action_masks", MaskMethodOfOthers, r"action_masks\(\) and info\['action_mask'\] disagree"),
    ("action_masks", WideMaskMethod, r"action_masks\(\) has shape \(3, 4\), expected \(3, 3\)"),
    ("action_masks", MaskForgottenLater, "no 'action_mask' after step 0, but had it after reset"),
    ("endings", OneDone, r"all \d+ episode ends have terminated and truncated both True"),
    ("endings", TruncationAsTermination, r"none of \d+ episode ends is truncated alone"),
    ("endings", Endless, "no episode ended in 12 steps of 3 rows"),
    ("repeatable", OwnEntropy, "expected equal runs"),
    ("repeatable", Remembers, "in a new environment and in one that ran before"),
    ("seeds_differ", DeafToSeeds, "seeds 0 and 1000 give equal runs"),
    ("large_seeds", SmallSeeds, r"reset\(seed=18446744073709551615\) raised OverflowError"),
    ("seed_list", OneSeedOnly, r"reset\(seed=\[0, 1, 2\]\) raised TypeError"),
    ("seed_list", FirstOfTheList, r"expected one seed a row"),
    ("seed_list", OtherListThanNumber, r"reset\(seed=\[0, 1, 2\]\) is not reset\(seed=0\)"),
    ("unseeded_reset", SeedsAgain, "gives the same run again"),
    ("unseeded_reset", FreshEntropy, "differs from time to time"),
    ("next_step", RewardedReset, r"reward of row \d is 1.0 at step \d, which only resets it"),
    ("final_obs", NoFinalObs, "in same-step mode and info has no 'final_obs'"),
    ("final_obs", NoFinalInfo, "expected 'final_info' and '_final_info'"),
    ("final_obs", FinalForEveryRow, r"_final_obs of step \d+ marks the rows \[0, 1, 2\], expected the ones that ended"),
    ("same_transitions", FinalIsFirst, r"NextStep and SameStep play different transitions.*after"),
    ("same_transitions", LateReset, r"NextStep and SameStep play different transitions"),
    ("final_info", InfoOfTheNext, "expected what belongs to the step that ended"),
    ("final_info", PoorFinalInfo, r"final_info lacks \['position'\]"),
    ("partial_reset", ResetsAll, r"resetting the rows \[0\] changed others"),
    ("partial_reset", DrawsForAll, "after resetting row 0 alone, the other rows go on differently"),
    ("inputs_kept", PopsOptions, r"reset changed the caller's options to \{\}"),
    ("inputs_kept", ClearsTheMask, r"reset changed the caller's options to \{'reset_mask': array\(\[False"),
    ("inputs_kept", WritesActions, "step 0 wrote into the caller's actions"),
    ("kept_arrays", OneBuffer, r"a later step changed what reset had returned .*; now, then\)"),
    ("kept_arrays", OneInfoBuffer, r"info|\[1\]\['position'\]"),
    ("written_arrays", StateAsInfo, "after the caller wrote into returned arrays"),
    ("written_arrays", KeepsActions, "and used actions, the run went on differently"),
    ("arrays_apart", TwoNames, r"\['position'\] and .*\['again'\] are one memory"),
    ("closing", CannotCloseTwice, r"close\(\) raised RuntimeError"),
    ("closing", NeverClosed, r"closed is False after close\(\), expected True"),
]

ONE_MODE = {
    FinalBeyondTheBox: {"modes": (SAME_STEP,), "make_single": None},
    MaskForgottenLater: {"modes": (NEXT_STEP,)},
}
"""Variants that show in one mode only what would make that mode differ from the others too."""


def broken_rules(**how):
    """Every rule that some check finds broken, with its message."""
    found, tested = {}, Subject(**how)
    for check in CHECKS.values():
        try:
            check(tested)
        except BrokenRule as error:
            found[error.rule] = str(error)
        except NotApplicable:
            pass
    return found


def test_an_environment_that_keeps_every_rule_passes_every_check():
    verdict = check_vector_env(**subject())
    assert set(verdict) == set(CHECKS)
    assert set(verdict.values()) == {"holds"}


@pytest.mark.parametrize(("rule", "kind", "message"), BROKEN, ids=[kind.__name__ for _, kind, _ in BROKEN])
def test_an_environment_that_breaks_one_rule_is_caught_by_that_rule_alone(rule, kind, message):
    found = broken_rules(**subject(kind, **ONE_MODE.get(kind, {})))
    assert list(found) == [rule]
    assert re.search(message, found[rule]), found[rule]


def test_rows_that_are_not_the_single_environment_are_caught():
    class OtherSingle(WalkEnv):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, reward + 0.5, *rest

    class OtherStart(WalkEnv):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed + 1, options=options)

    class OtherSpace(WalkEnv):
        def __init__(self):
            super().__init__()
            self.action_space = gymnasium.spaces.Discrete(2)

    rule = "rows_are_singles"
    found = broken_rules(**subject(make_single=OtherSingle))
    assert list(found) == [rule]
    assert re.search(r"row 0 of reset\(seed=0\) is not .* reset\(seed=0\).*reward of step 0 is", found[rule])
    found = broken_rules(**subject(make_single=OtherStart))
    assert list(found) == [rule]
    assert "obs after reset" in found[rule]
    found = broken_rules(**subject(make_single=OtherSpace))
    assert list(found) == ["spaces"]
    assert "expected that of the single environment, Discrete(2)" in found["spaces"]


def test_tensors_that_hold_other_numbers_or_are_none_are_caught():
    class OtherTorch(TorchWalk):
        def step(self, actions):
            obs, reward, *rest = super().step(actions)
            return obs, reward + 1e-3, *rest

    found = broken_rules(**subject(make_torch=OtherTorch))
    assert list(found) == ["outputs_agree"]
    assert "arrays and tensors out (NextStep): reward of step 0" in found["outputs_agree"]
    found = broken_rules(**subject(make_torch=Walk))
    assert list(found) == ["outputs_agree"]
    assert "is a ndarray, expected a tensor" in found["outputs_agree"]


def test_a_tensor_environment_passes_and_its_shared_memory_is_caught():
    class Kept(TorchWalk):
        def step(self, actions):
            obs, *out = super().step(actions)
            self.kept = getattr(self, "kept", obs)
            self.kept[:] = obs
            return self.kept, *out

    assert not broken_rules(**subject(TorchWalk))
    assert list(broken_rules(**subject(Kept))) == ["kept_arrays"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drift": np.float32([0.1])}, r"spec.to_json\(\) failed"),
        ({"drift": {0: 0.25}}, "gymnasium.make from the JSON of its own spec gives another environment"),
    ],
)
def test_arguments_that_do_not_survive_json_are_caught(settings, message):
    found = broken_rules(**subject(settings=settings))
    assert list(found) == ["spec"]
    assert re.search(message, found["spec"])


def test_every_rule_has_an_environment_that_breaks_it():
    elsewhere = {"rows_are_singles", "outputs_agree", "spec"}
    assert {rule for rule, _, _ in BROKEN} | elsewhere == set(CHECKS)


# ---- nested spaces


class NestedWalk(Walk):
    """A dict of a box and a tuple of boxes to see, a dict to do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        box, spaces = gymnasium.spaces.Box(-1, 1, (1,), dtype=np.float32), gymnasium.spaces
        self.single_observation_space = spaces.Dict({"x": box, "more": spaces.Tuple((box, spaces.Discrete(7)))})
        self.single_action_space = spaces.Dict({"step": spaces.Discrete(3), "push": box})
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def obs(self):
        return {"x": self.x[:, None].copy(), "more": (self.x[:, None].copy(), self.t.astype(np.int64))}

    def facts(self):
        return {"position": self.x.copy(), "deep": {"t": self.t.copy(), "_t": np.ones(self.num_envs, dtype=bool)}}

    def move(self, actions, idle):
        super().move(actions["step"] + 0.1 * actions["push"][:, 0], idle)

    def __getattribute__(self, name):
        if name == "action_masks":
            raise AttributeError(name)
        return super().__getattribute__(name)


class NestedBeyond(NestedWalk):
    def obs(self):
        return super().obs() | {"more": (self.x[:, None] * 3, self.t.astype(np.int64))}


class NestedOneBuffer(NestedWalk):
    buffer = None

    def obs(self):
        obs = super().obs()
        if self.buffer is None:
            self.buffer = obs["more"][1]
        self.buffer[:] = obs["more"][1]
        return obs | {"more": (obs["more"][0], self.buffer)}

    def last(self, info):
        obs = super().obs()
        return super().last(info) | {"final_obs": obs}


class NestedBareInfo(NestedWalk):
    def facts(self):
        return super().facts() | {"deep": {"t": self.t.copy()}}


def test_nested_observations_actions_and_infos_are_checked_inside():
    how = {"make_single": None, "env_id": None}
    assert not broken_rules(**subject(NestedWalk, **how))
    for kind, rule, message in (
        (NestedBeyond, "bounds", r"obs after .*\['more'\]\[0\]\[\d, 0\] is .*, expected -1.0..1.0"),
        (NestedOneBuffer, "kept_arrays", r"\['more'\]\[1\]"),
        (NestedBareInfo, "info_pairs", r"info\['deep'\]\['t'\] after reset has no mask '_t'"),
    ):
        found = broken_rules(**subject(kind, **how))
        assert list(found) == [rule]
        assert re.search(message, found[rule]), found[rule]


# ---- Gymnasium's own


def test_gymnasiums_sync_vector_environment_passes_but_for_two_habits():
    faults = {
        "inputs_kept": "SyncVectorEnv pops reset_mask out of the caller's options",
        "info_dense": "SyncVectorEnv keeps final_obs as an array of objects",
    }
    if tuple(int(part) for part in gymnasium.__version__.split(".")[:2]) < (1, 4):
        faults["metadata"] = "before 1.4 SyncVectorEnv writes into the metadata of the class"

    def make(num_envs, mode):
        return gymnasium.make_vec(
            "CartPole-v1", num_envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}
        )

    how = {"make_single": lambda: gymnasium.make("CartPole-v1"), "endings": ("terminated",)}
    assert sorted(broken_rules(make=make, **how)) == sorted(faults)
    verdict = check_vector_env(make, skip=faults, **how)
    assert {rule for rule, said in verdict.items() if said == "holds"} >= {"same_transitions", "rows_are_singles"}
    assert verdict["inputs_kept"] == f"left out: {faults['inputs_kept']}"
    assert verdict["spec"] == "does not apply: no env_id was given"


def test_gymnasiums_own_vector_cartpole_passes_in_its_one_mode_but_for_three_habits():
    def make(num_envs, mode):
        return gymnasium.make_vec(
            "CartPole-v1", num_envs, vectorization_mode="vector_entry_point", max_episode_steps=15
        )

    found = broken_rules(make=make, modes=(NEXT_STEP,), endings=ALL, num_envs=8)
    # says its mode in the metadata only; one generator for the whole batch; its close() does not set `closed`
    assert sorted(found) == ["closing", "mode_attribute", "seed_list"]


# ---- how it is used


class TestWalk(EnvContract):
    """What a user writes."""

    steps, endings, env_id = 12, ALL, "Kit/Walk-v0"

    def make_vector_env(self, num_envs, autoreset_mode):
        return Walk(num_envs, autoreset_mode)

    def make_env(self):
        return gymnasium.make("Kit/Walk-v0")

    def make_torch_vector_env(self, num_envs, autoreset_mode):
        return TorchWalk(num_envs, autoreset_mode)


def test_the_contract_has_a_test_for_every_rule_and_fails_where_the_check_does():
    class Broken(TestWalk):
        def make_vector_env(self, num_envs, autoreset_mode):
            return RewardedReset(num_envs, autoreset_mode)

    assert {name for name in dir(EnvContract) if name.startswith("test_")} == {
        "test_single_env",
        *(f"test_{r}" for r in CHECKS),
    }
    with pytest.raises(BrokenRule, match="next_step: reward of row"):
        Broken().test_next_step()
    Broken().test_spaces()


def test_what_does_not_apply_or_is_left_out_is_skipped_with_the_reason():
    class Few(EnvContract):
        skip = {"closing": "cannot be closed"}  # noqa: RUF012

        def make_vector_env(self, num_envs, autoreset_mode):
            return NeverClosed(num_envs, autoreset_mode)

    for name, reason in (
        ("test_closing", "cannot be closed"),
        ("test_single_env", "no make_env"),
        ("test_rows_are_singles", "no single environment"),
        ("test_outputs_agree", "no make_torch"),
        ("test_spec", "no env_id"),
    ):
        with pytest.raises(unittest.SkipTest, match=reason):
            getattr(Few(), name)()
    with pytest.raises(NotImplementedError, match="needs make_vector_env"):
        EnvContract().test_spaces()


def test_the_first_broken_rule_is_raised_and_wrong_use_is_explained():
    with pytest.raises(BrokenRule, match=r"^next_step: reward of row \d is 1.0"):
        check_vector_env(RewardedReset, steps=12)
    for skip, message in (
        ({"speed": "slow"}, r"skip names \['speed'\], which are no rules"),
        ({"types": "odd"}, r"skip names \['types'\], on which the other checks rely"),
        ({"closing": " "}, r"skip gives no reason for \['closing'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            check_vector_env(Walk, skip=skip)
    with pytest.raises(ValueError, match="endings is"):
        Subject(Walk, endings=("done",))
    with pytest.raises(ValueError, match="num_envs is 0"):
        Subject(Walk, num_envs=0)


def test_the_examples_of_the_docstrings_run():
    result = doctest.testmod(contract)
    assert result.attempted >= 8
    assert result.failed == 0
