"""Intervals: hand-computed cases, and coverage on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from metarec_gym.evaluation.intervals import Interval, holm, mean_interval, ratio_interval
from metarec_gym.seeding import numpy_rng


def test_one_seed_gives_the_t_interval_of_users() -> None:
    # mean 2, variance ((-1)^2 + 0 + 1^2) / 2 = 1, se = sqrt(1/3), t(0.975, df 2) = 4.302653
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.estimate == 2.0
    assert interval.df == 2.0
    assert interval.se == pytest.approx(0.577350, abs=1e-6)
    assert interval.high == pytest.approx(2.0 + 4.302653 * 0.577350, abs=1e-5)


def test_seeds_and_users_both_enter_the_variance() -> None:
    # seed means 1 and 3 (variance 2), user means 1 and 3 (variance 2), no rest: 2/2 + 2/2 = 2; df = 2^2 / (1 + 1) = 2
    interval = mean_interval([[0.0, 2.0], [2.0, 4.0]])
    assert interval.estimate == 2.0
    assert interval.se**2 == pytest.approx(2.0)
    assert interval.df == pytest.approx(2.0)
    assert (interval.seeds, interval.users) == (2, 2)


def test_what_users_and_seeds_do_not_explain_stays_in_the_variance() -> None:
    # all means are 0.5, residuals +-0.5: 4 * 0.25 / (1 * 1) / (2 * 2) = 0.25 and nothing else
    interval = mean_interval([[0.0, 1.0], [1.0, 0.0]])
    assert interval.estimate == 0.5
    assert interval.se == pytest.approx(0.5)


def test_identical_seeds_leave_the_interval_of_users() -> None:
    users = numpy_rng(0, "users").normal(size=40)
    one, three = mean_interval(users), mean_interval(np.stack([users] * 3))
    assert three.se == pytest.approx(one.se)
    assert three.df == pytest.approx(one.df)


def test_ratio_of_equal_columns_is_one_without_any_spread() -> None:
    values = numpy_rng(1, "users").random(50)
    interval = ratio_interval(values, values)
    assert (interval.estimate, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_ratio_is_linearised_by_hand() -> None:
    # r = 3 / 2; influence (1 - 1.5 * 1, 5 - 1.5 * 3) / 2 = (-0.25, 0.25): variance 0.125, of the mean 0.0625
    interval = ratio_interval([1.0, 5.0], [1.0, 3.0], minus=1.0)
    assert interval.estimate == pytest.approx(0.5)
    assert interval.se == pytest.approx(0.25)


def test_p_value_and_interval_agree() -> None:
    interval = mean_interval(numpy_rng(2, "users").normal(size=30))
    assert interval.p_value(interval.low) == pytest.approx(0.05)
    assert interval.p_value(interval.low, alternative="greater") == pytest.approx(0.025)
    assert interval.at_level(0.9).low > interval.low


def test_certain_estimates_have_p_value_zero_or_one() -> None:
    interval = mean_interval([0.5, 0.5, 0.5])
    assert interval.p_value(0.5) == 1.0
    assert interval.p_value(0.0) == 0.0
    assert interval.p_value(1.0, alternative="greater") == 1.0


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    # 0.01 * 3, then 0.02 * 2 = 0.04, then 0.03 * 1 lifted to 0.04
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize("bad", [[1.0], [[1.0], [2.0]], [1.0, float("nan")]])
def test_too_few_users_and_holes_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="user"):
        mean_interval(bad)


def test_a_ratio_to_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="says nothing"):
        ratio_interval([1.0, 2.0], [-1.0, 1.0])


def _coverage(repeats: int, seeds: int, users: int, sd: tuple[float, float, float]) -> float:
    rng = numpy_rng(7, "coverage", repeats, seeds, users, str(sd))
    hits = 0
    for _ in range(repeats):
        y = 0.3 + sd[0] * rng.normal(size=(seeds, 1)) + sd[1] * rng.normal(size=(1, users))
        interval = mean_interval(y + sd[2] * rng.normal(size=(seeds, users)))
        hits += interval.low <= 0.3 <= interval.high
    return hits / repeats


def _ratio_coverage(repeats: int, seeds: int, users: int) -> float:
    # skewed user values, policy = 1.1 x baseline on average with user and seed variation: true lift 0.1
    rng = numpy_rng(8, "ratio coverage", repeats, seeds, users)
    hits = 0
    for _ in range(repeats):
        base = rng.gamma(2.0, 0.5, size=users)
        factor = 1.1 + 0.02 * rng.normal(size=(seeds, 1)) + 0.2 * rng.normal(size=(1, users))
        interval = ratio_interval(base * factor + 0.1 * rng.normal(size=(seeds, users)), base, minus=1.0)
        hits += interval.low <= 0.1 <= interval.high
    return hits / repeats


SETTINGS = [
    (1, 100, (0.0, 1.0, 0.5)),
    (5, 100, (1.0, 1.0, 1.0)),
    (10, 200, (0.1, 1.0, 1.0)),
    (5, 300, (0.02, 0.3, 0.3)),
]


@pytest.mark.parametrize(("seeds", "users", "sd"), SETTINGS)
def test_intervals_cover_a_known_truth(seeds: int, users: int, sd: tuple[float, float, float]) -> None:
    assert 0.91 <= _coverage(400, seeds, users, sd) <= 0.985


def test_lift_intervals_cover_a_known_lift() -> None:
    assert 0.91 <= _ratio_coverage(400, 5, 300) <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "users", "sd"), SETTINGS)
def test_coverage_over_two_thousand_repeats_is_close_to_the_level(
    seeds: int, users: int, sd: tuple[float, float, float]
) -> None:
    assert 0.93 <= _coverage(2000, seeds, users, sd) <= 0.97


def test_where_only_the_rest_varies_the_interval_errs_on_the_wide_side() -> None:
    assert _coverage(400, 5, 60, (0.0, 0.2, 1.0)) >= 0.93


@pytest.mark.slow
def test_lift_coverage_over_two_thousand_repeats_is_close_to_the_level() -> None:
    assert 0.93 <= _ratio_coverage(2000, 5, 300) <= 0.97


def test_intervals_print_with_their_unit() -> None:
    interval = Interval(0.016, 0.006, 0.028, 0.005, 100.0, 0.95, 10, 600)
    assert interval.as_percent() == "+1.6 % [+0.6, +2.8]"
    assert interval.as_number() == "0.016 [0.006, 0.028]"
