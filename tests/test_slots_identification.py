import dataclasses
import math

import numpy as np
import pytest

from experiments.slots_identification import (
    Args,
    Course,
    Point,
    differences,
    make_world,
    matched,
    play,
    requests_until,
    verdict_of,
)
from experiments.slots_identification import run as run_experiment

SMALL = Args(types=2, users_per_type=4, seeds=2, horizon=6, slate_size=2, exploration=(1.0, 4.0))


def test_requests_until_a_share_is_reached_are_read_off_a_straight_line():
    # reached between the second request (0.5) and the third (1.0), four fifths of the way
    assert requests_until(np.array([0.2, 0.5, 1.0, 0.7]), 0.9) == pytest.approx(2.8)
    assert requests_until(np.array([0.95, 1.0]), 0.9) == pytest.approx(0.9 / 0.95)
    assert requests_until(np.array([0.2, 0.8]), 0.9) == math.inf


def test_settings_are_matched_by_the_nearest_regret_that_is_not_higher():
    select = [Point(0.5, 10.0, 0.30), Point(1.0, 8.0, 0.50), Point(2.0, 9.0, 0.10)]
    slots = [Point(0.5, 7.0, 0.20), Point(1.0, 5.0, 0.40), Point(2.0, 4.0, 0.50)]
    pairs = matched(select, slots)
    # nothing of Slots costs as little as 0.10
    assert pairs == [(select[0], slots[0]), (select[1], slots[2])]


def test_the_learner_credits_places_and_pays_the_regret_of_the_world():
    world = make_world(SMALL)
    courses = {action: play(world, SMALL, action, 1.0) for action in ("select", "slots")}
    for course in courses.values():
        assert course.right.shape == course.regret.shape == (2, 8, 6)
        # 2 items of 0.5 against 0, 1 or 2 of another type's 0.1
        assert set(np.unique(course.regret.round(4)).tolist()) <= {0.0, 0.4, 0.8}
    # a strategy for the whole slate is all right or all wrong; `mixed` alone shows one item of each type
    in_select = [play(world, SMALL, "select", exploration).regret for exploration in (1e-3, 1e9)]
    assert in_select[0].mean() < in_select[1].mean()
    # nobody knows which: a third of the strategies is right, half of the items of `mixed`
    assert play(world, dataclasses.replace(SMALL, seeds=40), "slots", 1e9).regret.mean() == pytest.approx(0.4, abs=0.03)


def test_evidence_makes_the_guess_right_and_equal_seeds_give_equal_courses():
    args = dataclasses.replace(SMALL, seeds=10, horizon=20)
    world = make_world(args)
    first, again = (play(world, args, "slots", 1.0) for _ in range(2))
    assert np.array_equal(first.right, again.right)
    share = first.right.mean(axis=(0, 1))
    assert share[0] < 0.8 < share[-1]


def course_of(right, regret):
    return Course(np.array(right, dtype=bool)[None], np.array(regret, dtype=float)[None])


def test_differences_and_their_intervals_have_the_sign_of_slots_less_select():
    select = course_of([[0, 0, 1]] * 20, [[0.3, 0.3, 0.0]] * 20)
    slots = course_of([[0, 1, 1]] * 20, [[0.3, 0.0, 0.0]] * 20)
    pair = Point(1.0, requests_until(select.right[0].mean(axis=0)), 0.2), Point(1.0, 1.9, 0.1)
    less = differences(select, slots, pair, seed=0)
    # users are alike, so nothing varies: 2.9 requests against 1.9
    assert less["requests"].as_number(2) == "-1.00 [-1.00, -1.00]"
    assert less["ratio"].estimate == pytest.approx(1.9 / 2.9)
    assert less["regret"].high == pytest.approx(-0.1)
    assert "at all 1 settings" in verdict_of([less])
    turned = differences(slots, select, pair[::-1], seed=0)
    assert "surely later at 1 of the 2" in verdict_of([less, turned])
    assert "nothing can be compared" in verdict_of([])


def test_the_command_writes_result_page_and_plot(tmp_path, capsys):
    args = dataclasses.replace(SMALL, seeds=3, runs=tmp_path / "runs", results=tmp_path / "results")
    row = run_experiment(args)
    text = (tmp_path / "results" / "slots_identification.md").read_text()
    assert row["verdict"] in text
    assert text in capsys.readouterr().out
    assert len(row["points"]["slots"]) == 2
    plot = tmp_path / "results" / "slots_identification.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size < 100 * 1024
