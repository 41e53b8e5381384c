"""Headroom: known answers on worlds built to have them, cross-fitting and rules by hand, chunks that are found again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from metarec_gym.evaluation.headroom import (
    FOLDS,
    EvalSettings,
    FoldPlays,
    Headroom,
    choose_sched,
    describe_timed_rule,
    fit_length_rule,
    found,
    horizons_of,
    measure_headroom,
    played_throughout,
)
from metarec_gym.evaluation.headroom import measure as room
from metarec_gym.evaluation.rollout import Fixed, Greedy, LengthRule, Rotation, RowRule, Schedule, Window, rollout
from metarec_gym.evaluation.verdict import JUST_USE, decide
from metarec_gym.policy import FixedPolicy
from metarec_gym.seeding import stream
from metarec_gym.world import World

SETTINGS = EvalSettings(replicates=2, horizon=4, horizons=(2,), batch_rows=256, look_ahead=2, look_branches=2)
BLIND = dataclasses.replace(SETTINGS, look=False)


def _measure(world: World, settings: EvalSettings = SETTINGS, folder: Path | None = None) -> Headroom:
    return measure_headroom(world, settings, folder=folder, progress=False)


@pytest.fixture(scope="module")
def tiny(tiny_world: World) -> Headroom:
    return _measure(tiny_world)


@pytest.fixture(scope="module")
def leaving(leaving_world: World) -> Headroom:
    return _measure(leaving_world, dataclasses.replace(SETTINGS, look_users=3))


def test_the_oracles_of_the_tiny_world_gain_two_thirds(tiny: Headroom) -> None:
    # a specialist gives 1.0 to half the users and 0.2 to the others; the oracle 1.0 to all: 1.0 / 0.6 - 1
    gains = tiny.headrooms()
    assert gains["per-user oracle"].estimate == pytest.approx(2 / 3, abs=1e-6)
    assert gains["greedy oracle"].estimate == pytest.approx(2 / 3, abs=1e-6)
    assert tiny.pooled(tiny.sbs_value())[:, tiny.headline].mean() == pytest.approx(0.6, abs=1e-6)
    assert tiny.optimism == pytest.approx(0.0, abs=1e-9)


def test_windows_are_the_sound_ones_the_headline_and_its_last_tenth(tiny: Headroom) -> None:
    assert [w.name for w in tiny.windows] == ["@2", "@4", "last tenth"]
    assert tiny.horizon == 4
    assert "@2" in tiny.to_json()["windows"]
    assert "per-user oracle +66.7 %" in tiny.line()


def test_the_references_stand_in_the_result(tiny: Headroom) -> None:
    row = tiny.to_json()
    # a choice changes nothing later in this world: looking ahead finds what greedy finds
    assert tiny.look is not None
    assert tiny.look.users == 16
    assert row["look"]["over_greedy"]["@4"]["estimate"] == 0.0
    assert (row["look"]["ahead"], row["look"]["replicates"]) == (2, 1)
    assert "nothing is long-term here" in row["look"]["sentence"]
    # told all answers a learner beats the single best strategy, and knows less than the oracle
    assert 0.1 < row["fir"]["@4"]["estimate"] < 2 / 3
    assert len(tiny.reference_lines()) == 2
    assert row["env"] == {}


def test_look_ahead_is_paired_with_the_greedy_plays_of_the_same_start_states(
    leaving: Headroom, leaving_world: World
) -> None:
    assert leaving.look is not None
    for fold in FOLDS:
        starts = leaving.look.look[fold].start_state
        assert len(np.unique(leaving.look.look[fold].user)) == len(starts) == 3
        again = rollout(
            leaving_world,
            fold,
            Greedy(),
            contexts=torch.from_numpy(starts),
            replicates=1,
            horizon=4,
            env_seed=stream(0, "evaluation"),
        )
        np.testing.assert_array_equal(leaving.look.greedy[fold][:, 0, 1], again.value(leaving.windows[1])[:, 0])


def test_environment_settings_reach_every_play_and_name_other_tasks(
    leaving: Headroom, leaving_world: World, tmp_path: Path
) -> None:
    halved = _measure(leaving_world, dataclasses.replace(BLIND, env={"base_rate_factor": 0.5}), folder=tmp_path)
    assert all("_env" in file.name for file in tmp_path.glob("*.npz"))
    assert halved.to_json()["env"] == {"base_rate_factor": 0.5}
    at = leaving.headline
    for fold in FOLDS:
        assert (halved.folds[fold].fixed[..., at] < leaving.folds[fold].fixed[..., at]).all()
        assert halved.greedy[fold].value.mean() < leaving.greedy[fold].value.mean()
        assert halved.fir[fold].value.mean() < leaving.fir[fold].value.mean()


def test_unknown_environment_settings_are_refused(tiny_world: World) -> None:
    with pytest.raises(ValueError, match="base_rate_factor"):
        _measure(tiny_world, dataclasses.replace(BLIND, env={"base_rate": 0.5}))
    with pytest.raises(ValueError, match="horizon"):
        _measure(tiny_world, dataclasses.replace(BLIND, env={"horizon": 3}))


def test_identical_strategies_leave_nothing_to_win() -> None:
    world = World.synthetic(
        n_types=2, users_per_type=4, items_per_type=16, horizon=4, slate_size=2, history_lengths=(0, 3), identical=True
    )
    null = _measure(world, BLIND)
    assert null.look is None
    assert null.to_json()["look"] is None
    assert len(null.reference_lines()) == 1
    for interval in null.headrooms().values():
        assert (interval.estimate, interval.low, interval.high) == (0.0, 0.0, 0.0)
    assert decide(null.sbs_name, null.headrooms(), {}).kind == JUST_USE


def test_sbs_as_a_policy_and_the_stored_oracle_replay_bit_for_bit(leaving_world: World) -> None:
    found = _measure(leaving_world, dataclasses.replace(BLIND, horizon=6))
    for test in FOLDS:
        common = {
            "contexts": found.contexts[test],
            "replicates": found.played,
            "horizon": found.horizon,
            "env_seed": stream(0, "evaluation"),
        }
        sbs = rollout(leaving_world, test, FixedPolicy(found.sbs[test][found.headline]), **common)
        oracle = rollout(leaving_world, test, found.oracle_player(test), **common)
        window = found.windows[found.headline]
        stored = found.oracle_value()[test][:, :, found.headline]
        np.testing.assert_array_equal(sbs.value(window), found.sbs_value()[test][:, :, found.headline])
        np.testing.assert_array_equal(oracle.value(window), stored)


def _plays(fixed: np.ndarray, lengths: list[int] | None = None) -> FoldPlays:
    """fixed: (C, N, K) of one window; repeated for the last tenth."""
    count = fixed.shape[0]
    values = np.stack([fixed, fixed], axis=3).astype(np.float64)
    racing = np.ones(fixed.shape[::2], dtype=bool)
    return FoldPlays(np.arange(count), np.array(lengths or [0] * count), values, (), racing, values)


def test_the_oracle_is_scored_on_the_half_it_did_not_choose_on() -> None:
    # one start state, replicates 0..3, two strategies; even replicates favour 0 (mean 3 > 1), odd ones 1 (mean 2 > 0)
    fixed = np.array([[[4.0, 1.0], [0.0, 2.0], [2.0, 1.0], [0.0, 2.0]]])
    plays = _plays(np.concatenate([fixed, fixed]))
    choice = room.choose(plays.raced, plays.racing, 0)
    assert choice[0, :, 0].tolist() == [0, 1]
    found = Headroom(
        ("a", "b"),
        (Window.until(1), Window.last_tenth(1)),
        2,
        4,
        {},
        {"A": plays, "B": plays},
        {"A": (0, 0), "B": (0, 0)},
        {},
        {"A": choice, "B": choice},
        {},
        0.0,
    )
    # even replicates are scored with strategy 1, odd ones with 0: (1 + 0 + 1 + 0) / 4; the plug-in (4 + 2 + 2 + 2) / 4
    assert found.pooled(found.oracle_value(raced=True))[0, 0] == 0.5
    assert found.pooled(found.oracle_value(raced=True, plug_in=True))[0, 0] == 2.5


def test_only_strategies_that_are_surely_worse_leave_the_race() -> None:
    # four replicates; b is behind by exactly 1 each time, c by 0 or 1 in turn: t = 0.5 / 0.289 = 1.7, far from the limit
    fixed = np.array([[[2.0, 1.0, 2.0], [2.0, 1.0, 1.0], [2.0, 1.0, 2.0], [2.0, 1.0, 1.0]]])[..., None]
    assert room.still_racing(fixed).tolist() == [[True, False, True]]
    # a strategy that leads at another window stays
    both = np.concatenate([fixed, fixed[:, :, [1, 0, 2]]], axis=3)
    assert room.still_racing(both).tolist() == [[True, True, True]]


def test_a_strategy_out_of_the_race_is_never_chosen_and_missing_replicates_do_not_count() -> None:
    raced = np.array([[[1.0, 9.0], [1.0, 9.0], [np.nan, np.nan], [np.nan, np.nan]]])
    raced = np.stack([raced, raced], axis=3)
    assert room.choose(raced, np.array([[True, False]]), 0)[0, :, 0].tolist() == [0, 0]
    assert found.mean_replicates(raced)[0, :, 0].tolist() == [1.0, 9.0]


def test_dropping_strategies_early_changes_the_oracle_little(
    leaving_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(BLIND, horizon=6, replicates=4)
    dropped = _measure(leaving_world, settings)
    assert dropped.folds["A"].racing.mean() < 1.0
    monkeypatch.setattr(room, "still_racing", lambda fixed: np.ones((fixed.shape[0], fixed.shape[2]), dtype=bool))
    whole = _measure(leaving_world, settings)
    assert whole.folds["A"].racing.all()
    first, second = (x.headrooms()["per-user oracle"].estimate for x in (dropped, whole))
    assert first == pytest.approx(second, abs=0.02)


def test_replicates_double_until_the_optimism_is_small_or_the_cap_is_met(leaving_world: World) -> None:
    strict = dataclasses.replace(BLIND, replicates=1, max_replicates=4, tolerance=-1.0)
    found = _measure(leaving_world, strict)
    assert found.replicates == 4
    assert found.folds["A"].raced.shape[1] == 8
    assert found.played == 2
    assert any("optimism" in note for note in found.notes)


def test_length_rule_takes_the_best_strategy_of_each_range() -> None:
    lengths = np.array([0, 1, 2, 30, 40, 50])
    value = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    rule = fit_length_rule(lengths, value, 2)
    assert rule == LengthRule((2,), (0, 1)) or rule == LengthRule((30,), (0, 1))


Chosen = tuple[str, RowRule, np.ndarray]


def _choose(value: np.ndarray, lengths: list[int], rotation: float = 0.0) -> Chosen:
    plays = _plays(np.repeat(value[:, None], 2, axis=1), lengths)
    turned = np.full((len(value), 2, 2), rotation)
    name, rule, _ = choose_sched(plays, {Rotation((0, 1)): turned}, ("a", "b"), 0, 0)
    return name, rule, turned if isinstance(rule, Rotation) else played_throughout(rule, plays)


def test_sched_is_one_strategy_when_nothing_is_better() -> None:
    name, rule, _ = _choose(np.array([[1.0, 0.5]] * 40), list(range(40)), rotation=1.0)
    assert rule == Fixed(0)
    assert name == "always a"


def test_sched_is_a_length_rule_when_lengths_decide() -> None:
    lengths = list(range(60))
    name, rule, value = _choose(np.array([[1.0, 0.0] if length < 30 else [0.0, 1.0] for length in lengths]), lengths)
    assert isinstance(rule, LengthRule)
    # 0.5 for one strategy; the rule finds all but the users next to the edge
    assert value.mean() > 0.95
    assert name.startswith("by history length: a below")


def test_sched_is_a_rotation_when_turning_pays() -> None:
    name, rule, _ = _choose(np.array([[1.0, 0.9]] * 40), [3] * 40, rotation=1.2)
    assert rule == Rotation((0, 1))
    assert name == "in turn: a, b"


def test_rotations_grow_by_the_strategy_that_helps_most(tiny: Headroom) -> None:
    # half the users like either category: whatever the turns, a request is worth about 0.6 on average
    for sched in tiny.sched.values():
        turns = [name for name in sched.candidates if name.startswith("in turn")]
        assert len(turns) == 5
        assert all(sched.candidates[name] == pytest.approx(0.6, abs=0.1) for name in turns)


def test_rules_by_time_are_told_in_words() -> None:
    names = ("a", "b")
    assert describe_timed_rule(Schedule((), ((0, 0, 1),)), names) == "by time: a 1-2, b from request 3"
    both = Schedule((6,), ((0, 0), (1, 0)))
    assert describe_timed_rule(both, names) == (
        "by time and history length: history below 6: a from request 1; else: b 1, a from request 2"
    )


def test_a_fitted_rule_must_win_on_users_it_was_not_fitted_to() -> None:
    rng = np.random.default_rng(0)
    # lengths say nothing; in-sample a rule with six ranges looks better than one strategy, out of sample it does not
    _, rule, _ = _choose(0.5 + rng.normal(size=(80, 2)) * [0.05, 0.05] + [0.2, 0.0], list(range(80)))
    assert rule == Fixed(0)


def test_the_single_best_strategy_is_chosen_on_the_other_fold(tiny_world: World) -> None:
    run = room._Measurement(tiny_world, SETTINGS, None, None, 1, "cpu", False)
    training = _plays(np.array([[[0.0, 5.0]], [[1.0, 2.0]]]))
    assert run._single_best(training, 0) == (1, 1)


def test_a_second_measurement_reads_the_first_and_a_lost_chunk_alone_is_played_again(
    leaving_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _measure(leaving_world, folder=tmp_path)
    files = sorted(tmp_path.glob("*.npz"))
    files[0].unlink()
    calls: list[str] = []
    play = room.play_task

    def counted(**kwargs: object) -> object:
        calls.append(str(kwargs["fold"]))
        return play(**kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "play_task", counted)
    second = _measure(leaving_world, folder=tmp_path)
    assert len(calls) == 1
    assert second.to_json() == first.to_json()
    _measure(leaving_world, folder=tmp_path)
    assert len(calls) == 1


def test_horizons_stop_where_a_tenth_of_the_catalogue_is_shown(tiny_world: World) -> None:
    # 32 items: one request of 2 shows 6 %, two would show 12.5 %
    assert horizons_of(tiny_world, EvalSettings()) == (1, True, ())
    horizon, sound, notes = horizons_of(tiny_world, EvalSettings(horizon=4))
    assert (horizon, sound) == (4, False)
    assert "25%" in notes[0]
    with pytest.raises(ValueError, match="at most 4"):
        horizons_of(tiny_world, EvalSettings(horizon=5))
    # lists are ranked again for every session, and what was shown stays out: the rule is the same
    sessions = {"session_requests": 4}
    assert horizons_of(tiny_world, EvalSettings(env=sessions)) == (1, True, ())
    assert horizons_of(tiny_world, EvalSettings(horizon=8, env=sessions))[:2] == (8, False)
    with pytest.raises(ValueError, match="at most 16"):
        horizons_of(tiny_world, EvalSettings(horizon=17, env=sessions))


def test_horizons_stop_where_users_take_more_than_the_log_shows(tiny_world: World) -> None:
    small = dataclasses.replace(tiny_world, tensors=dict(tiny_world.tensors), info={"metrics": {"engaged_p90": 0.1}})
    found = _measure(small, dataclasses.replace(BLIND, horizon=None))
    assert not found.sound
    assert any("0 items" in note for note in found.notes)


@pytest.mark.slow
def test_processes_give_the_numbers_of_one_process(leaving_world: World, tmp_path: Path) -> None:
    from metarec_gym.evaluation.tasks import Task, run_tasks, stop_workers

    folder = leaving_world.save(tmp_path / "world")
    base = {
        "world": folder,
        "fold": "A",
        "contexts": leaving_world.starts_of("A").tolist(),
        "windows": (Window.until(4),),
        "horizon": 4,
        "noise_base": 0,
        "replicates": 2,
        "settings": SETTINGS,
        "device": "cpu",
    }
    tasks = [Task(f"k{k}", room.play_task, {**base, "player": Fixed(k)}, 100) for k in range(2)]
    here = run_tasks(tasks, folder=None, progress=False)
    try:
        there = run_tasks(tasks, folder=None, workers=2, progress=False, spawn_above=0)
    finally:
        stop_workers()
    for key, arrays in here.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, there[key][name])
