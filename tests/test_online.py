"""Fixed and adaptive allocation: who is named best, how many users that takes, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from metarec_gym.evaluation.online import Serve, best_policy, fixed_allocation, successive_halving
from metarec_gym.seeding import numpy_rng


def _serve(means: tuple[float, ...], seed: int = 0) -> tuple[Serve, list[tuple[int, int]]]:
    rng, calls = numpy_rng(seed, "users"), []

    def serve(policy: int, users: int) -> np.ndarray:
        calls.append((policy, users))
        return means[policy] + rng.standard_normal(users)

    return serve, calls


def test_the_best_policy_is_named_and_worse_ones_get_fewer_users() -> None:
    serve, _ = _serve((0.0, 1.0, 0.0, 0.7))
    found = best_policy(serve, 4, max_users=20_000)
    assert (found.best, found.sure) == (1, True)
    assert found.users[0] == found.users[2] == 100
    assert found.users[1] == found.users[3] > 100
    assert found.rounds[-1].low[1] > found.rounds[-1].high[3]


def test_adaptive_allocation_needs_fewer_users_than_equal_shares() -> None:
    means = (0.0, 0.5, 0.0, 0.2, 0.0, 0.0)
    adaptive, equal = (rule(_serve(means)[0], 6, max_users=50_000) for rule in (best_policy, fixed_allocation))
    assert adaptive.best == equal.best == 1
    assert adaptive.users.sum() < 0.7 * equal.users.sum()
    assert len(set(equal.users.tolist())) == 1


def test_without_a_difference_the_users_run_out_and_nothing_is_sure() -> None:
    serve, _ = _serve((0.0, 0.0))
    found = best_policy(serve, 2, max_users=1000)
    assert not found.sure
    assert found.users.sum() == 1000


def test_halving_by_hand() -> None:
    # 4 policies, 2 rounds: 800 / (2 * 4) = 100 users each, then 800 / (2 * 2) = 200 each for the better two
    serve, calls = _serve((0.0, 3.0, 2.0, 0.0))
    found = successive_halving(serve, 4, max_users=800)
    assert calls == [(0, 100), (1, 100), (2, 100), (3, 100), (1, 200), (2, 200)]
    assert (found.best, found.sure) == (1, True)
    assert found.users.tolist() == [100, 300, 300, 100]


def test_what_makes_no_comparison_is_refused() -> None:
    serve, _ = _serve((0.0, 0.0))
    with pytest.raises(ValueError, match="at least two"):
        best_policy(serve, 1, max_users=100)
    with pytest.raises(ValueError, match="give at least"):
        successive_halving(serve, 2, max_users=2)
    with pytest.raises(ValueError, match="finite outcomes"):
        fixed_allocation(lambda policy, users: np.full(users, np.nan), 2, max_users=1000)
