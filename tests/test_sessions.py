from __future__ import annotations

import numpy as np
import pytest

from metarec_gym.data.sessions import SESSION_GAP_S, fit_session_gap, fitted_gap_s, sessions_by_gap


def one_user(pauses_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A user whose events are that far apart."""
    time_s = 1.7e9 + np.concatenate([[0.0], np.cumsum(pauses_s)])
    return np.zeros(len(time_s), dtype=np.int64), time_s


def two_kinds(seed: int, n: int = 6000, share: float = 0.2) -> np.ndarray:
    """Pauses about a minute long inside sessions and about a day long between them, log-normal with spread 1 each."""
    rng = np.random.default_rng(seed)
    between = rng.random(n) < share
    return np.exp(np.where(between, rng.normal(np.log(86_400), 1, n), rng.normal(np.log(60), 1, n)))


def test_the_gap_lies_where_pauses_inside_and_between_sessions_are_equally_likely() -> None:
    found = fit_session_gap(*one_user(two_kinds(0)))
    # equal spreads of 1: (x - a)^2 / 2 - log 0.8 = (x - b)^2 / 2 - log 0.2, so x = (a + b) / 2 + log 4 / (b - a)
    low, high = np.log(60), np.log(86_400)
    expected = np.exp((low + high) / 2 + np.log(4) / (high - low))
    assert found.gap_s == pytest.approx(expected, rel=0.15)
    assert found.share_between == pytest.approx(0.2, abs=0.02)
    assert "two kinds" in found.note


def test_a_long_tail_inside_sessions_does_not_hide_the_second_kind() -> None:
    rng = np.random.default_rng(1)
    inside = np.where(
        rng.random(19_000) < 0.85, rng.normal(np.log(30), 0.5, 19_000), rng.normal(np.log(80), 1.6, 19_000)
    )
    between = rng.normal(np.log(5 * 86_400), 1.7, 1_000)
    gap_s = fitted_gap_s(*one_user(rng.permutation(np.exp(np.concatenate([inside, between])))))
    assert gap_s != SESSION_GAP_S
    assert 1_800 < gap_s < 4 * 3_600


@pytest.mark.parametrize("kind", ["log-normal", "exponential", "log-uniform"])
def test_pauses_of_one_kind_keep_the_usual_30_minutes_and_say_so(kind: str) -> None:
    rng = np.random.default_rng(2)
    draws = {
        "log-normal": np.exp(rng.normal(7, 1.5, 6000)),
        "exponential": rng.exponential(900, 6000),
        "log-uniform": np.exp(rng.uniform(1, 12, 6000)),
    }
    found = fit_session_gap(*one_user(draws[kind]))
    assert found.gap_s == SESSION_GAP_S
    assert "do not fall into two kinds" in found.note
    assert found.share_between is None


def test_too_few_pauses_keep_the_usual_30_minutes() -> None:
    found = fit_session_gap(*one_user(two_kinds(0, n=150)))
    assert found.gap_s == SESSION_GAP_S
    assert "150 pauses" in found.note
    assert fitted_gap_s(np.zeros(0, dtype=np.int64), np.zeros(0)) == SESSION_GAP_S
    assert fitted_gap_s(np.zeros(500, dtype=np.int64), np.arange(500) * 60.0) == SESSION_GAP_S


def test_pauses_between_users_and_events_of_one_moment_do_not_count() -> None:
    user, time_s = one_user(two_kinds(3))
    twice = np.concatenate([user, user + 1]), np.concatenate([time_s, time_s - 1e6])
    repeated = user.repeat(2), time_s.repeat(2)
    assert fitted_gap_s(*twice) == pytest.approx(fitted_gap_s(user, time_s), rel=1e-3)
    assert fitted_gap_s(*repeated) == fitted_gap_s(user, time_s)


def test_a_gap_outside_5_minutes_to_12_hours_is_moved_to_the_nearer_end() -> None:
    pauses = two_kinds(4)
    assert fitted_gap_s(*one_user(pauses * 0.01)) == 300.0
    assert fitted_gap_s(*one_user(pauses * 100.0)) == 12 * 3600.0


def test_sessions_cut_at_the_fitted_gap_are_those_that_made_the_log() -> None:
    pauses = two_kinds(5)
    user, time_s = one_user(pauses)
    number = sessions_by_gap(user, time_s, fitted_gap_s(user, time_s))
    assert number[-1] == pytest.approx(0.2 * len(pauses), rel=0.1)
