import numpy as np
import pytest

from experiments import coverage_off_policy as coverage
from metarec_gym.envs.replay_table import ReplayTable
from metarec_gym.evaluation.off_policy import single_action as single
from metarec_gym.evaluation.off_policy.bandit_log import BanditLog, target_probs
from metarec_gym.evaluation.off_policy.cross_fitting import RewardModel, cluster_folds, design, one_hot
from metarec_gym.evaluation.off_policy.diagnostics import overlap, plot_overlap, support
from metarec_gym.evaluation.off_policy.intervals import (
    bootstrap_interval,
    clipping_bias_bound,
    difference_interval,
    empirical_bernstein,
    t_interval,
)
from metarec_gym.evaluation.off_policy.selection import rank_correlation, regret_at_k, sharpe_ratio_at_k
from metarec_gym.evaluation.off_policy.terms import Terms
from metarec_gym.evaluation.off_policy.tuning import slope
from metarec_gym.evaluation.replay_value import replay_value


def test_intervals_are_those_of_the_replay_where_both_know_the_estimator():
    table, _ = ReplayTable.synthetic(n_rows=400, rows_per_user=4)
    log = BanditLog.from_table(table)
    probs = target_probs(log, [0.1, 0.2, 0.3, 0.4])
    for terms, name in ((single.ips(log, probs), "weighted"), (single.snips(log, probs), "self_normalised")):
        found, expected = t_interval(terms, log.cluster), replay_value(table, probs, estimator=name).interval
        assert (found.estimate, found.low, found.high) == pytest.approx(
            (expected.estimate, expected.low, expected.high), rel=1e-5
        )


def test_the_interval_of_a_mean_worked_out_by_hand_over_users():
    # users with rewards 1, 1 and 0, 1 and 0: mean 0.6; summed deviations 0.8, -0.2, -0.6
    terms = Terms.of(np.array([1.0, 1.0, 0.0, 1.0, 0.0]), weight=np.ones(5))
    found = t_interval(terms, [7, 7, 8, 8, 9])
    assert found.estimate == pytest.approx(0.6)
    # sqrt(3 / 2 * (0.64 + 0.04 + 0.36)) / 5, t with 2 degrees of freedom
    assert found.se == pytest.approx(np.sqrt(1.5 * 1.04) / 5)
    assert (found.df, found.high - found.estimate) == (2.0, pytest.approx(4.302653 * found.se, rel=1e-6))


def test_what_two_policies_share_cancels_in_their_difference():
    log, probs = coverage.draw_log(np.random.default_rng(1), 60)
    terms = single.snips(log, probs)
    shifted = Terms(terms.base + 0.25, terms.top, terms.bottom, terms.weight)
    found = difference_interval(shifted, terms, log.cluster)
    assert found.estimate == pytest.approx(0.25)
    assert found.se == pytest.approx(0.0, abs=1e-12)


def test_a_resampled_estimate_is_that_of_the_log_with_its_users_repeated():
    log, probs = coverage.draw_log(np.random.default_rng(2), 5)
    times = np.array([[2, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    terms = single.self_normalised_dr(log, probs, np.full(probs.shape, 0.3))
    values, errors = terms.cluster_sums(log.cluster).resampled(times.astype(float))
    for sample in range(2):
        copies = [(user, copy) for user in range(5) for copy in range(times[sample, user])]
        rows = np.concatenate([np.flatnonzero(log.cluster == user) for user, _ in copies])
        names = np.concatenate([np.full((log.cluster == user).sum(), i) for i, (user, _) in enumerate(copies)])
        again = Terms(terms.base[rows], terms.top[rows], terms.bottom[rows], terms.weight[rows])
        expected = t_interval(again, names)
        assert (values[sample], errors[sample]) == pytest.approx((expected.estimate, expected.se))


def test_the_bootstrap_repeats_itself_and_agrees_with_t_on_many_users():
    rng = np.random.default_rng(3)
    user = np.repeat(np.arange(800), 2)
    terms = Terms.of(rng.standard_normal(1600) + np.repeat(rng.standard_normal(800), 2), weight=np.ones(1600))
    t = t_interval(terms, user)
    for method in ("studentised", "percentile"):
        found = bootstrap_interval(terms, user, seed=1, method=method)
        assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=0.12 * (t.high - t.low))
        assert bootstrap_interval(terms, user, seed=1, method=method) == found
        assert bootstrap_interval(terms, user, seed=2, method=method) != found


def test_empirical_bernstein_worked_out_by_hand():
    # 1,000 users of one request; logger and policy the same: weights 1, half of the rewards 1
    reward = np.tile([0.0, 1.0], 500)
    log = BanditLog.from_arrays(np.tile([0, 1], 500), reward, pscore=np.full((1000, 2), 0.5))
    found = empirical_bernstein(log, log.pscore, (0.0, 1.0), clips=(1.0,))
    # d = 0.025: sqrt(2 * var * ln(2 / d) / n) + 7 ln(2 / d) / (3 (n - 1)), the variance at any v is that of the rewards
    log_term = np.log(80.0)
    half = np.sqrt(2 * (0.25 * 1000 / 999) * log_term / 1000) + 7 * log_term / (3 * 999)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-9)


def test_bernstein_bounds_hold_the_value_of_a_policy_that_the_logger_never_followed():
    log = BanditLog.from_arrays([0] * 500, [1.0] * 500, propensity=[1.0] * 500, actions=["served", "never"])
    # half of its mass is where nothing is known: anything between 0.5 and 1
    found = empirical_bernstein(log, target_probs(log, "uniform"), (0.0, 1.0))
    assert found.low < 0.5
    assert found.high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="outside the range"):
        empirical_bernstein(log, target_probs(log, "uniform"), (0.0, 0.5))


def test_the_bias_bound_of_clipping_worked_out_by_hand():
    log = BanditLog.from_arrays([0, 1, 1, 1], [0.0, 1.0, 1.0, 0.0], pscore=np.tile([0.25, 0.75], (4, 1)))
    # weights 4 (clipped to 2), 0, 0, 0: 2 * (1 - 0.5)
    assert clipping_bias_bound(log, target_probs(log, 0), 2.0, (-1.0, 1.0)) == pytest.approx(1.0)


def test_the_direct_methods_interval_holds_the_noise_of_its_model():
    # one context, one user a row: with a free mean for each action the prediction for action 1 is about its mean over 40 rows
    rng = np.random.default_rng(4)
    action = np.tile([0, 0, 1], 60)
    log = BanditLog.from_arrays(action, rng.standard_normal(180), pscore=np.tile([2 / 3, 1 / 3], (180, 1)))
    probs = target_probs(log, 1)
    found = t_interval(single.direct_method(log, probs, log.reward_model()), log.cluster)
    spread = log.reward[action == 1].std(ddof=1) / np.sqrt(60)
    assert found.se == pytest.approx(spread, rel=0.1)
    given = t_interval(single.direct_method(log, probs, log.reward_model().q), log.cluster)
    assert given.se < 0.5 * spread


def test_the_noise_of_the_model_cancels_in_dr_with_true_propensities():
    log, probs = coverage.draw_log(np.random.default_rng(5), 300)
    model = log.reward_model()
    known, certain = (t_interval(single.doubly_robust(log, probs, q), log.cluster).se for q in (model, model.q))
    assert known == pytest.approx(certain, rel=0.15)


def test_a_fits_influence_is_what_one_more_row_changes():
    log, probs = coverage.draw_log(np.random.default_rng(6), 200)
    model = log.reward_model()
    before = (probs * model.q).sum(axis=1).mean()
    moved = model.fit_influence(probs)
    # row 0 counts 1 % more in every fit that it is in: weighted least squares by hand
    again = np.zeros_like(model.q)
    for number in range(3):
        learn, held_out = model.fold != number, model.fold == number
        weight = np.where(np.arange(log.n_rows) == 0, 1.01, 1.0)[learn]
        x, y = model.features[learn], log.reward[learn]
        penalty = np.eye(x.shape[1])
        penalty[0, 0] = 1e-9
        coef = np.linalg.solve(x.T @ (weight[:, None] * x) + penalty, x.T @ (weight * y))
        for k in range(log.n_actions):
            again[held_out, k] = (
                design(log.context[held_out], one_hot(np.full(held_out.sum(), k), log.n_actions)) @ coef
            )
    change = ((probs * again).sum(axis=1).mean() - before) * log.n_rows / 0.01
    # the mean is taken out of the influences: the ridge's pull, small
    assert change == pytest.approx(moved[0], abs=0.05 * max(1.0, abs(change)))


def test_folds_keep_users_together_and_are_of_equal_size():
    cluster = np.repeat(np.arange(10), 3)
    fold = cluster_folds(cluster, 3, seed=0)
    assert all(len(set(fold[cluster == user])) == 1 for user in range(10))
    assert sorted(np.bincount(fold[::3])) == [3, 3, 4]
    with pytest.raises(ValueError, match="expected 2 to 10"):
        cluster_folds(cluster, 11, seed=0)


def test_no_row_is_predicted_by_a_model_that_saw_its_user():
    log, _ = coverage.draw_log(np.random.default_rng(7), 30)
    before = log.reward_model().q
    reward = np.where(log.cluster == 0, 1000.0, log.reward)
    changed = BanditLog.from_arrays(log.action, reward, pscore=log.pscore, context=log.context, cluster=log.cluster)
    after = changed.reward_model().q
    own = log.cluster == 0
    assert np.array_equal(before[own], after[own])
    assert not np.allclose(before[~own], after[~own])


def test_another_regressor_is_used_where_one_is_given():
    from sklearn.dummy import DummyRegressor

    log, _ = coverage.draw_log(np.random.default_rng(8), 30)
    model = log.reward_model(regressor=DummyRegressor(strategy="constant", constant=0.25))
    assert np.array_equal(model.q, np.full(model.q.shape, 0.25))
    assert not model.fit_influence(model.q).any()


def test_a_reward_model_of_other_rows_is_refused():
    log, probs = coverage.draw_log(np.random.default_rng(8), 30)
    with pytest.raises(ValueError, match="reward model"):
        single.doubly_robust(log, probs, RewardModel(np.zeros((3, 5))))


def test_slope_takes_the_narrow_estimate_that_agrees_and_not_the_one_that_does_not():
    rng = np.random.default_rng(9)
    noise = rng.standard_normal(400)
    wide, narrow, biased = (Terms.of(m + s * noise, weight=np.ones(400)) for m, s in ((0, 3), (0, 1), (5, 0.1)))
    assert slope([wide, narrow], np.arange(400)) == 1
    assert slope([biased, narrow, wide], np.arange(400)) == 1


def test_support_of_weights_worked_out_by_hand():
    found = support(np.array([1.0, 1.0, 2.0, 0.0]))
    assert (found.rows, found.matched, found.largest_weight, found.mean_weight) == (4, 3, 2.0, 1.0)
    assert (found.effective_rows, found.largest_share) == pytest.approx((16 / 6, 0.5))
    assert any("one row carries 50%" in warning for warning in found.warnings())
    assert support(np.ones(1000)).warnings() == ()


def test_the_overlap_counts_every_row_once(tmp_path):
    weight = np.array([0.1, 1.0, 10.0, 10.0, 0.0])
    found = overlap(weight, bins=2)
    assert list(found["rows"]) == [1, 3]
    assert (found["edges"][0], found["edges"][-1], found["zero"]) == pytest.approx((-1.0, 1.0, 0.2))
    assert plot_overlap({"policy": weight}, tmp_path / "overlap.png").stat().st_size > 1000


def test_choosing_policies_by_estimates_worked_out_by_hand():
    estimates, truths = [0.9, 0.5, 0.7, 0.1], [0.3, 0.6, 0.5, 0.1]
    # ranks 1, 3, 2, 4 and 3, 1, 2, 4: 1 - 6 * (4 + 4) / (4 * 15)
    assert rank_correlation(estimates, truths) == pytest.approx(0.2)
    assert [regret_at_k(estimates, truths, k) for k in (1, 2, 3)] == pytest.approx([0.3, 0.1, 0.0])
    # the two best-looking have 0.3 and 0.5: (0.5 - 0.2) / 0.1
    assert sharpe_ratio_at_k(estimates, truths, 0.2, 2) == pytest.approx(3.0)
    assert sharpe_ratio_at_k([1.0, 0.5], [0.2, 0.2], 0.2, 2) == 0.0
    with pytest.raises(ValueError, match="at least 2"):
        sharpe_ratio_at_k(estimates, truths, 0.2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "mips", "slates", "sequences"])
def test_95_percent_intervals_cover_93_to_97_percent(name):
    for estimator, row in coverage.measure(name, 2000, seed=0).items():
        assert estimator in coverage.SETTINGS[name].biased or 0.93 <= row["t"] <= 0.97, estimator


@pytest.mark.slow
def test_with_estimated_propensities_intervals_are_not_too_short():
    found = coverage.measure("estimated", 500, seed=0)
    # two standard errors of 500 logs below 95 %; IPS is on the wide side, see the page of results
    assert {estimator: row["t"] >= 0.93 for estimator, row in found.items()} == dict.fromkeys(found, True)


@pytest.mark.slow
def test_bernstein_bounds_cover_at_least_94_percent():
    assert coverage.measure_bernstein(2000, 0, 300)["t"] >= 0.94
    assert coverage.measure_bernstein(50, 0, 30_000)["t"] >= 0.94


@pytest.mark.slow
def test_the_error_falls_with_the_number_of_users():
    few, many = (coverage.measure("single", 100, 0, users) for users in (100, 1600))
    for estimator in ("IPS", "SNIPS", "DR", "SNDR"):
        # 16 times the users: a quarter of the error, give or take the noise of 100 logs
        assert many[estimator]["rmse"] < 0.4 * few[estimator]["rmse"], estimator


def test_the_truth_of_the_simulated_logs_is_what_many_users_earn():
    rng = np.random.default_rng(0)
    log, probs = coverage.draw_log(rng, 40_000)
    found = t_interval(single.snips(log, probs), log.cluster)
    assert abs(found.estimate - coverage.SETTINGS["single"].truth) < 3.5 * found.se
    terms, users = coverage.sequence_terms(rng, 10_000)
    found = t_interval(terms["WPDIS"], users)
    assert abs(found.estimate - coverage.sequence_value()) < 3.5 * found.se
    terms, users = coverage.slate_terms(rng, 4_000)
    found = t_interval(terms["cascade-DR"], users)
    assert abs(found.estimate - coverage.slate_value()) < 3.5 * found.se
