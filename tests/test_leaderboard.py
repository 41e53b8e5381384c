"""Policies held against each other: paired differences, quality against cost, seeds, learning curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metarec_gym.evaluation.headroom import FOLDS
from metarec_gym.evaluation.hull import Offer, cost_of, frontier, hull_markdown, offer, upper_hull, utility_of
from metarec_gym.evaluation.intervals import difference_interval, holm, mean_interval, relative_difference
from metarec_gym.evaluation.leaderboard import PolicyPlays
from metarec_gym.evaluation.learning_curves import learning_curve, read_scalars
from metarec_gym.evaluation.metrics import interquartile_mean
from metarec_gym.evaluation.pairs import BANDIT, LIBRARY, RULE, opponents, paired_differences, pairs_markdown
from metarec_gym.evaluation.report.comparison import hull_section, learning_section, pairs_section
from metarec_gym.evaluation.rollout import Played
from metarec_gym.seeding import numpy_rng


def test_the_interquartile_mean_leaves_out_a_quarter_of_the_seeds_at_either_end() -> None:
    assert interquartile_mean([9.0, 1.0, 2.0, 3.0]) == 2.5
    # five seeds: one is left out at either end
    assert interquartile_mean([100.0, 1.0, 2.0, 3.0, -100.0]) == 2.0
    assert interquartile_mean([4.0]) == 4.0
    # ten seeds: two at either end, as scipy's trimmed mean that rliable calls
    assert interquartile_mean(np.arange(10.0) ** 2) == pytest.approx(np.mean(np.arange(2.0, 8.0) ** 2))


def test_a_difference_to_a_policy_without_seeds_is_the_interval_of_differences() -> None:
    rng = numpy_rng(0, "difference")
    many, one = rng.normal(size=(5, 40)), rng.normal(size=40)
    found, expected = difference_interval(many, one), mean_interval(many - one)
    for name in ("estimate", "se", "df", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12)
    assert (found.seeds, found.users) == (5, 40)


def test_a_difference_carries_the_seeds_of_both_sides_by_hand() -> None:
    # seed means 1, 3 and 0, 4 (variances 2 and 8), users alike, no rest: variance 2/2 + 8/2 = 5, df = 25 / (1/1 + 16/1)
    found = difference_interval([[1.0, 1.0], [3.0, 3.0]], [[0.0, 0.0], [4.0, 4.0]])
    assert found.estimate == 0.0
    assert found.se**2 == pytest.approx(5.0)
    assert found.df == pytest.approx(25.0 / 17.0)
    with pytest.raises(ValueError, match="same users"):
        difference_interval([1.0, 2.0], [1.0, 2.0, 3.0])


def test_a_relative_difference_is_linearised() -> None:
    # r = 3 / 2; (1 - 1.5 * 1, 5 - 1.5 * 3) / 2 = (-0.25, 0.25): as the ratio of tests/test_intervals.py
    found = relative_difference([1.0, 5.0], [1.0, 3.0])
    assert found.estimate == pytest.approx(0.5)
    assert found.se == pytest.approx(0.25)
    assert found.high - found.estimate == pytest.approx(found.estimate - found.low)


def test_intervals_of_differences_cover_the_truth_when_both_sides_have_seeds() -> None:
    rng, covered, runs, truth = numpy_rng(3, "coverage"), 0, 400, 0.05
    for _ in range(runs):
        user = rng.normal(0.0, 1.0, size=200)
        sides = [
            user
            + rng.normal(0.0, 0.1, size=200)
            + rng.normal(0.0, spread, size=(seeds, 1))
            + rng.normal(0.0, 0.5, size=(seeds, 200))
            for seeds, spread in ((10, 0.04), (5, 0.06))
        ]
        found = difference_interval(sides[0] + truth, sides[1])
        covered += found.low <= truth <= found.high
    # 95 % of 400 with a standard error of 1.1 %
    assert 0.92 <= covered / runs <= 0.985


def _played(values: np.ndarray, served: np.ndarray) -> Played:
    """Plays of one replicate and one window: values (users,), served (users, K)."""
    users = len(values)
    return Played(
        start_state=np.arange(users),
        user=np.arange(users),
        history_length=np.zeros(users, dtype=np.int64),
        noise=np.zeros(1, dtype=np.int64),
        value=values[:, None, None].astype(np.float64),
        by_request=np.repeat(values[:, None], 2, axis=1),
        served=served,
        engaged=np.zeros((users, 2)),
    )


def _plays(name: str, kind: str, seeds: list[np.ndarray], strategy: int = 0) -> PolicyPlays:
    """A policy of two requests that serves one strategy; each seed gives the values of both folds' users."""
    half = len(seeds[0]) // 2
    served = np.zeros((half, 3), dtype=np.int64)
    served[:, strategy] = 2
    by_fold = {f: [_played(v[i * half : (i + 1) * half], served) for v in seeds] for i, f in enumerate(FOLDS)}
    return PolicyPlays(name, kind, by_fold)


@pytest.fixture(scope="module")
def table() -> list[PolicyPlays]:
    rng = numpy_rng(1, "table")
    user = 1.0 + 0.2 * rng.normal(size=100)
    noise = [0.02 * rng.normal(size=100) for _ in range(20)]
    return [
        _plays("ppo", "learned", [user + 0.10 + n for n in noise[:4]]),
        _plays("sb3_ppo", "learned", [user + 0.10 + n for n in noise[4:8]]),
        _plays("tuned_hierarchical", "bandit", [user + n for n in noise[8:10]], 1),
        _plays("population_ucb", "bandit", [user - 0.1 + n for n in noise[10:12]], 1),
        _plays("SCHED", "fixed", [user + 0.05 + noise[12]], 2),
        _plays("SBS", "fixed", [user + noise[13]], 2),
    ]


def test_trained_policies_are_held_against_rule_bandit_and_library(table: list[PolicyPlays]) -> None:
    # the stronger of the two hierarchical bandits
    assert opponents(table, 0) == {RULE: "SCHED", BANDIT: "tuned_hierarchical", LIBRARY: "sb3_ppo"}
    pairs = {(p.policy, p.against): p for p in paired_differences(table, 0)}
    # four trained policies, three opponents, and nobody against itself
    assert len(pairs) == 4 * 3 - 2
    won, tied = pairs["ppo", "tuned_hierarchical"], pairs["ppo", "sb3_ppo"]
    assert won.difference.estimate == pytest.approx(0.1, abs=0.01)
    assert won.relative.estimate == pytest.approx(0.1, abs=0.015)
    assert won.sure
    assert not tied.sure
    raw = [p.difference.p_value() for p in pairs.values()]
    assert [p.p_holm for p in pairs.values()] == holm(raw)
    markdown = pairs_markdown(list(pairs.values()))
    assert markdown.count("\n") == len(pairs) + 1
    page = pairs_section(list(pairs.values()))
    assert "against the strongest hierarchical bandit: tuned_hierarchical" in page
    assert pairs_section([]) == ""


def _point(name: str, cost: float, utility: float) -> Offer:
    return Offer(name, 0.0, cost, np.array([[utility - 0.1, utility + 0.1, utility]]))


def test_the_hull_keeps_what_no_mix_dominates() -> None:
    offers = [
        _point("cheap", 0.2, 1.0),
        _point("below the line", 0.4, 1.1),
        _point("good", 0.6, 1.8),
        _point("dear", 1.0, 2.0),
        _point("dearer and worse", 1.2, 1.9),
        _point("as cheap, worse", 0.2, 0.5),
    ]
    assert [o.name for o in upper_hull(offers)] == ["cheap", "good", "dear"]
    hull = upper_hull(offers)
    # half way between cheap and good
    assert cost_of(hull, 1.4) == pytest.approx(0.4)
    assert utility_of(hull, 0.4) == pytest.approx(1.4)
    assert cost_of(hull, 2.1) is None
    assert utility_of(hull, 0.1) is None
    # 1.9 costs 0.8 on the hull, a third less than 1.2; at cost 1.2 there is 2.0
    found = frontier(offers, "dearer and worse")
    assert found.saving == pytest.approx(1.0 - 0.8 / 1.2)
    assert found.gain == pytest.approx(2.0 / 1.9 - 1.0)
    assert "33 % lower serving cost at its quality" in found.sentence()
    assert hull_markdown(found).count("\n") == len(found.hull) + 1
    assert "on the hull" in hull_section([found])


def test_the_cheapest_policy_without_loss_must_be_surely_no_worse() -> None:
    user = numpy_rng(2, "users").normal(1.0, 0.3, size=50)
    noisy = user + 0.01 + numpy_rng(2, "noise").normal(0.0, 0.5, size=50)
    offers = [
        Offer("SBS", 0.0, 1.0, user[None]),
        Offer("cheaper, perhaps worse", 0.0, 0.1, noisy[None]),
        Offer("cheaper, surely better", 0.3, 0.5, user[None] + 0.05),
    ]
    cheapest = frontier(offers, "SBS").cheapest_without_loss()
    assert cheapest is not None
    assert cheapest[0].label == "cheaper, surely better (cost weight 0.3)"
    assert cheapest[1] == pytest.approx(0.5)
    assert frontier(offers[:2], "SBS").cheapest_without_loss() is None


def test_an_offer_gets_back_what_its_reward_lost_to_cost() -> None:
    costs = np.array([0.2, 0.5, 1.0])
    plays = _plays("dear", "learned", [np.full(4, 0.7)], strategy=2)
    found = offer(plays, costs, cost_weight=0.3, window=0, horizon=2)
    # both requests by the dearest strategy: cost 1 a request, 0.7 + 0.3 * 1
    assert found.cost == pytest.approx(1.0)
    assert found.users.tolist() == [pytest.approx([1.0] * 4)]


def test_learning_curves_are_read_from_what_trainings_wrote(tmp_path: Path) -> None:
    from torch.utils.tensorboard.writer import SummaryWriter

    for seed in range(3):
        writer = SummaryWriter(str(tmp_path / str(seed)))
        for step in range(0, 1000, 100):
            writer.add_scalar("metarec/return_per_request", 1.0 + step / 1000 + 0.1 * (seed - 1), step)
            writer.add_scalar("other", 5.0, step)
        writer.close()
    runs = [read_scalars(tmp_path / str(seed)) for seed in range(3)]
    assert runs[0][0].tolist() == list(range(0, 1000, 100))
    curve = learning_curve("ppo", [*runs, read_scalars(tmp_path / "nothing")])
    assert curve is not None
    assert curve.trainings == 3
    assert (curve.requests[0], curve.requests[-1]) == (0.0, 900.0)
    assert curve.mean[-1] == pytest.approx(1.9)
    # three seeds 0.1 apart: t(0.975, df 2) * 0.1 / sqrt(3)
    assert curve.high[0] - curve.mean[0] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)
    assert "ppo (3 trainings)" in learning_section([curve])
    assert learning_curve("ppo", [read_scalars(tmp_path / "nothing")]) is None
