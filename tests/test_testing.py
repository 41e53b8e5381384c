"""The conformance kit finds every rule that is broken, and nothing where none is."""

import doctest
import re
import unittest

import gymnasium
import numpy as np
import pytest
from gymnasium.vector.utils import batch_space

from metarec_gym.testing import CHECKS, BrokenRule, EnvContract, NotApplicable, Subject, check_vector_env, contract
from tests import walk_envs as walks
from tests.walk_envs import NEXT_STEP, SAME_STEP, TorchWalk, Walk, WalkEnv

ALL = ("terminated", "truncated")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    gymnasium.register("Kit/Walk-v0", entry_point="tests.walk_envs:WalkEnv", vector_entry_point="tests.walk_envs:Walk")
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


BROKEN = [
    ("spaces", walks.OneRowMore, "num_envs is 4, expected 3"),
    ("spaces", walks.WiderSpace, r"observation_space is Box.*expected batch_space\(single_observation_space, 3\)"),
    ("spaces", walks.OtherActions, r"action_space is Box.*which is MultiDiscrete\(\[3 3 3\]\)"),
    ("metadata", walks.ClassMetadata, "changed to .* when another instance was made"),
    ("metadata", walks.ModeAsText, "is 'NextStep', expected AutoresetMode.NEXT_STEP"),
    ("metadata", walks.ModeOfTheClass, r"but AutoresetMode.SAME_STEP was asked for"),
    (
        "mode_attribute",
        walks.NoModeAttribute,
        "the attribute autoreset_mode is None, expected <AutoresetMode.NEXT_STEP",
    ),
    ("types", walks.DoubleObs, r"obs of reset is float64 \(3, 2\), expected float32 \(3, 2\)"),
    ("types", walks.InfoAsList, "info of reset is a list, expected a dict"),
    ("types", walks.changed(1, lambda r: r[:, None]), r"reward of step 0 is float32 \(3, 1\), expected floats \(3,\)"),
    ("types", walks.changed(1, lambda r: r.tolist()), "reward of step 0 is a list"),
    ("types", walks.changed(2, lambda t: t.astype(np.int8)), r"terminated of step 0 is int8 \(3,\), expected bool"),
    ("types", walks.changed(3, lambda t: bool(t.any())), "truncated of step 0 is a bool"),
    ("bounds", walks.BeyondTheBox, r"obs after step 3 \(NextStep\)\[\d, 1\] is 1.2\d*, expected 0.0..1.0"),
    ("bounds", walks.NotANumber, r"is nan, expected"),
    ("bounds", walks.FinalBeyondTheBox, r"final_obs after step \d+ \(SameStep\)\[\d, 1\] is \d.\d+, expected 0.0..1.0"),
    ("info_pairs", walks.NoMaskOfInfo, r"info\['position'\] after reset has no mask '_position', expected bool \(3,\)"),
    ("info_pairs", walks.MaskAlone, r"info\['_nothing'\] after reset masks 'nothing', which is not there"),
    ("info_pairs", walks.MaskOfNumbers, r"the mask '_position' .* is float64 \(3,\), expected bool"),
    ("info_dense", walks.Words, r"info\['name'\] after reset is of <U3, expected numbers"),
    ("info_dense", walks.ListOfInfos, r"info\['rows'\]\[0\] after reset has shape \(\), expected 3 rows"),
    ("info_dense", walks.Objects, r"info\['any'\] after reset is of object, expected numbers"),
    ("info_dense", walks.NumberForAll, r"info\['weight'\] after reset has shape \(2,\), expected 3 rows"),
    ("action_masks", walks.BoolMask, r"is bool \(3, 3\), expected int8 \(3, ...\)"),
    ("action_masks", walks.NothingValid, "has no valid action in row"),
    ("action_masks", walks.MaskMethodOfOthers, r"action_masks\(\) and info\['action_mask'\] disagree"),
    ("action_masks", walks.WideMaskMethod, r"action_masks\(\) has shape \(3, 4\), expected \(3, 3\)"),
    ("action_masks", walks.MaskForgottenLater, "no 'action_mask' after step 0, but had it after reset"),
    ("endings", walks.OneDone, r"all \d+ episode ends have terminated and truncated both True"),
    ("endings", walks.TruncationAsTermination, r"none of \d+ episode ends is truncated alone"),
    ("endings", walks.Endless, "no episode ended in 12 steps of 3 rows"),
    ("repeatable", walks.OwnEntropy, "expected equal runs"),
    ("repeatable", walks.Remembers, "in a new environment and in one that ran before"),
    ("seeds_differ", walks.DeafToSeeds, "seeds 0 and 1000 give equal runs"),
    ("large_seeds", walks.SmallSeeds, r"reset\(seed=18446744073709551615\) raised OverflowError"),
    ("seed_list", walks.OneSeedOnly, r"reset\(seed=\[0, 1, 2\]\) raised TypeError"),
    ("seed_list", walks.FirstOfTheList, r"expected one seed a row"),
    ("seed_list", walks.OtherListThanNumber, r"reset\(seed=\[0, 1, 2\]\) is not reset\(seed=0\)"),
    ("unseeded_reset", walks.SeedsAgain, "gives the same run again"),
    ("unseeded_reset", walks.FreshEntropy, "differs from time to time"),
    ("next_step", walks.RewardedReset, r"reward of row \d is 1.0 at step \d, which only resets it"),
    ("final_obs", walks.NoFinalObs, "in same-step mode and info has no 'final_obs'"),
    ("final_obs", walks.NoFinalInfo, "expected 'final_info' and '_final_info'"),
    (
        "final_obs",
        walks.FinalForEveryRow,
        r"_final_obs of step \d+ marks the rows \[0, 1, 2\], expected the ones that ended",
    ),
    ("same_transitions", walks.FinalIsFirst, r"NextStep and SameStep play different transitions.*after"),
    ("same_transitions", walks.LateReset, r"NextStep and SameStep play different transitions"),
    ("final_info", walks.InfoOfTheNext, "expected what belongs to the step that ended"),
    ("final_info", walks.PoorFinalInfo, r"final_info lacks \['position'\]"),
    ("partial_reset", walks.ResetsAll, r"resetting the rows \[0\] changed others"),
    ("partial_reset", walks.DrawsForAll, "after resetting row 0 alone, the other rows go on differently"),
    ("inputs_kept", walks.PopsOptions, r"reset changed the caller's options to \{\}"),
    ("inputs_kept", walks.ClearsTheMask, r"reset changed the caller's options to \{'reset_mask': array\(\[False"),
    ("inputs_kept", walks.WritesActions, "step 0 wrote into the caller's actions"),
    ("kept_arrays", walks.OneBuffer, r"a later step changed what reset had returned .*; now, then\)"),
    ("kept_arrays", walks.OneInfoBuffer, r"\['position'\]\[\d\] is"),
    ("written_arrays", walks.StateAsInfo, "after the caller wrote into returned arrays"),
    ("written_arrays", walks.KeepsActions, "and used actions, the run went on differently"),
    ("arrays_apart", walks.TwoNames, r"\['position'\] and .*\['again'\] are one memory"),
    ("closing", walks.CannotCloseTwice, r"close\(\) raised RuntimeError"),
    ("closing", walks.NeverClosed, r"closed is False after close\(\), expected True"),
]

ONE_MODE = {
    walks.FinalBeyondTheBox: {"modes": (SAME_STEP,), "make_single": None},
    walks.MaskForgottenLater: {"modes": (NEXT_STEP,)},
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
            return walks.RewardedReset(num_envs, autoreset_mode)

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
            return walks.NeverClosed(num_envs, autoreset_mode)

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
        check_vector_env(walks.RewardedReset, steps=12)
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
