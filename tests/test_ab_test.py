"""A/B tests: assignment, tables, analysis by hand, the sample-ratio stop, planning, peeking, and the report."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pandas as pd
import pytest

from metarec_gym.evaluation.ab_test import analysis, monitoring
from metarec_gym.evaluation.ab_test.analysis import Analysis, analyse, sample_ratio
from metarec_gym.evaluation.ab_test.assignment import assign, unit_draws
from metarec_gym.evaluation.ab_test.estimates import Moments, compare
from metarec_gym.evaluation.ab_test.page import TestReport, fragment, markdown
from metarec_gym.evaluation.ab_test.planning import Planner, a_a_p_values, users_needed
from metarec_gym.evaluation.ab_test.sequential import (
    always_valid_p,
    boundary,
    log_count_ratio,
    log_mixture_ratio,
    mixture_rho,
)
from metarec_gym.evaluation.ab_test.table import (
    Metric,
    check_exposures,
    metric_columns,
    read_exposures,
    user_table,
)
from metarec_gym.seeding import numpy_rng

needs_tea_tasting = pytest.mark.skipif(
    importlib.util.find_spec("tea_tasting") is None, reason="needs the ab extra: pip install 'metarec-gym[ab]'"
)
EQUAL = {"old": 1.0, "new": 1.0}
CTR = Metric("ctr", "click", "shown")


def _users(seed: int, count: int = 400, lift: float = 0.0) -> pd.DataFrame:
    """Users of two arms with clicks, items shown and a pre-period."""
    rng = numpy_rng(seed, "users")
    taste = rng.gamma(2.0, 0.05, count)
    shown = 10 + rng.poisson(10, count)
    arm = np.where(np.arange(count) % 2 == 0, "old", "new")
    rate = np.minimum(taste * np.where(arm == "new", 1.0 + lift, 1.0), 1.0)
    return pd.DataFrame(
        {
            "user_id": [f"u{i}" for i in range(count)],
            "arm": arm,
            "first_exposure": np.arange(count),
            "history_length": np.arange(count) % 40,
            "click": rng.binomial(shown, rate),
            "shown": shown,
            "pre_click": rng.binomial(20, np.minimum(taste, 1.0)),
            "pre_shown": 20,
        }
    )


# ---- assignment


def test_a_user_keeps_the_arm_for_ever() -> None:
    # these are facts about BLAKE2b: a change would move users of running tests into other arms
    users = ["17", "18", "19", "20"]
    assert assign(users, EQUAL, "homepage").tolist() == ["new", "old", "old", "old"]
    assert assign(users[::-1], EQUAL, "homepage").tolist() == ["old", "old", "old", "new"]
    assert assign([17, 18, 19, 20], EQUAL, "homepage").tolist() == ["new", "old", "old", "old"]


def test_another_salt_assigns_independently() -> None:
    users = range(20_000)
    first, second = (assign(users, EQUAL, salt) == "new" for salt in ("one", "two"))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    draws = unit_draws(users, "one")
    assert draws.min() >= 0.0
    assert draws.max() < 1.0


def test_weights_decide_the_traffic() -> None:
    arms = assign(range(20_000), {"a": 8, "b": 1, "c": 1}, "salt")
    assert {arm: round(float((arms == arm).mean()), 1) for arm in "abc"} == {"a": 0.8, "b": 0.1, "c": 0.1}


@pytest.mark.parametrize("weights", [{"only": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": float("inf")}])
def test_a_test_without_two_arms_with_traffic_is_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"arm"):
        assign(["u"], weights, "salt")


# ---- tables


def test_metrics_are_written_as_formulas() -> None:
    assert Metric.parse("ctr=click/shown") == Metric("ctr", "click", "shown")
    assert Metric.parse("bought=any:order") == Metric("bought", "order", any=True)
    assert Metric.parse("-cost=cost_s") == Metric("cost", "cost_s", higher_is_better=False)
    for bad in ("ctr", "ctr=", "=click", "x=a/", "x=any:a/b"):
        with pytest.raises(ValueError, match="expected name=column"):
            Metric.parse(bad)


def test_requests_become_users() -> None:
    table = pd.DataFrame(
        {
            "user_id": ["b", "a", "a"],
            "arm": ["new", "old", "old"],
            "first_exposure": [5, 2, 3],
            "click": [0, 1, 2],
            "shown": [5, 5, 5],
            "pre_click": [7, 8, 8],
            "pre_shown": [20, 20, 20],
        }
    )
    ctr = CTR.with_covariate(table.columns)
    assert ctr.covariate == ("pre_click", "pre_shown")
    users = user_table(check_exposures(table), [ctr])
    assert users.to_dict("list") == {
        "user_id": ["a", "b"],
        "arm": ["old", "new"],
        "first_exposure": [2, 5],
        "click": [3, 0],
        "pre_click": [8, 7],
        "pre_shown": [20, 20],
        "shown": [10, 5],
    }
    assert metric_columns(users, dataclasses.replace(CTR, any=True, denominator=None)).tolist() == [
        [1] + [1] * 3,
        [0] + [1] * 3,
    ]


def test_a_user_in_two_arms_is_refused() -> None:
    table = pd.DataFrame({"user_id": [1, 1, 2], "arm": ["old", "new", "old"]})
    with pytest.raises(ValueError, match="1 users were in more than one arm"):
        check_exposures(table)


def test_dates_of_exposure_become_seconds() -> None:
    table = pd.DataFrame(
        {"user_id": ["a", "b"], "arm": "old", "first_exposure": ["1970-01-02", "1970-01-01T01:00:00+01:00"]}
    )
    with pytest.raises(ValueError, match="soon"):
        check_exposures(table.assign(first_exposure=["1970-01-02", "soon"]))
    table["first_exposure"] = ["1970-01-02T00:00:00Z", "1970-01-01T01:00:10+01:00"]
    assert check_exposures(table)["first_exposure"].tolist() == [86_400.0, 10.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"click": [1.0, np.nan, 0.0]}, "no finite numbers"),
        ({"pre_click": [1.0, 2.0, 1.0]}, "changes within a user"),
    ],
)
def test_holes_and_changing_pre_periods_are_refused(change: dict[str, list[float]], message: str) -> None:
    table = pd.DataFrame(
        {"user_id": ["a", "a", "b"], "arm": "old", "click": 1.0, "shown": 5.0, "pre_click": 1.0, **change}
    )
    with pytest.raises(ValueError, match=message):
        user_table(table, [dataclasses.replace(CTR, covariate=("pre_click", None))])


def test_csv_and_parquet_hold_the_same_test(tmp_path) -> None:
    users = _users(0, 60)
    users.to_csv(tmp_path / "log.csv", index=False)
    users.to_parquet(tmp_path / "log.parquet")
    pd.testing.assert_frame_equal(
        read_exposures(tmp_path / "log.csv"), read_exposures(tmp_path / "log.parquet"), check_dtype=False
    )
    with pytest.raises(FileNotFoundError, match="no exposure table"):
        read_exposures(tmp_path / "none.csv")
    (tmp_path / "log.txt").write_text("x")
    with pytest.raises(ValueError, match=r"\.csv or \.parquet"):
        read_exposures(tmp_path / "log.txt")


# ---- estimates, by hand


def test_the_delta_method_by_hand_on_four_users() -> None:
    # control: clicks 1, 3 of 10, 10 shown: r = 4 / 20 = 0.2; clicks - r shown = -1, 1; variance 2 / mean shown^2 100 = 0.02;
    #          of the mean of two users 0.01
    # treated: clicks 2, 6 of 10, 30 shown: r = 8 / 40 = 0.2; clicks - r shown = 0, 0: no variance
    columns = np.array([[[1, 10, 1, 1], [3, 10, 1, 1]], [[2, 10, 1, 1], [6, 30, 1, 1]]], dtype=np.float64)
    found = compare(Moments.of(columns[0]), Moments.of(columns[1]), cuped=False)
    assert found.control == pytest.approx(0.2)
    assert found.estimate == pytest.approx(0.0)
    assert found.se == pytest.approx(0.1)
    assert found.df == pytest.approx(1.0)


def test_cuped_by_hand_on_four_users() -> None:
    # y = 1, 2 | 4, 5 and x = 0, 1 | 1, 2. Both arms: mean y 3, mean x 1; cov = (2 + 0 + 0 + 2) / 3, var x = (1 + 0 + 0 + 1) / 3:
    # theta = 2. Control: 1.5 - 2 (0.5 - 1) = 2.5; treated: 4.5 - 2 (1.5 - 1) = 3.5; difference 1 instead of 3.
    # y - 2 x = 1, 0 | 2, 1: variance 0.5 each, se = sqrt(0.5 / 2 + 0.5 / 2)
    control = np.array([[1, 1, 0, 1], [2, 1, 1, 1]], dtype=np.float64)
    treated = np.array([[4, 1, 1, 1], [5, 1, 2, 1]], dtype=np.float64)
    found = compare(Moments.of(control), Moments.of(treated), cuped=True)
    assert found.control == pytest.approx(2.5)
    assert found.estimate == pytest.approx(1.0)
    assert found.se == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("cuped", [False, True])
@needs_tea_tasting
def test_our_arithmetic_is_tea_tastings(cuped: bool) -> None:
    users = _users(1, lift=0.2)
    metric = CTR.with_covariate(users.columns) if cuped else CTR
    effect = analyse(users, [metric], control="old", weights=EQUAL).effects[0]
    arms = [Moments.of(metric_columns(users[users["arm"] == arm], metric)) for arm in ("old", "new")]
    found = compare(*arms, cuped=cuped)
    assert float(found.estimate) == pytest.approx(effect.difference.estimate, rel=1e-9)
    assert float(found.half_width()) == pytest.approx(effect.difference.high - effect.difference.estimate, rel=1e-9)
    assert float(found.p_value()) == pytest.approx(effect.p_value, rel=1e-6)
    assert effect.control == pytest.approx(float(found.control))
    if cuped:
        assert effect.variance_left is not None
        assert effect.variance_left < 0.8


def test_running_and_weighted_moments_are_those_of_the_users_in_them() -> None:
    columns = numpy_rng(2, "columns").gamma(2.0, 1.0, (30, 4))
    member = np.arange(30) % 3 > 0
    whole = Moments.of(columns[member])
    running, weighted = Moments.running(member, columns), Moments.weighted(member.astype(np.float64), columns)
    for other in (Moments(running.count[-1], running.mean[-1], running.cov[-1]), weighted):
        assert other.count == whole.count
        np.testing.assert_allclose(other.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(other.cov, whole.cov, rtol=1e-9)
    split = Moments.of(columns[:10]).joined(Moments.of(columns[10:]))
    np.testing.assert_allclose(split.cov, Moments.of(columns).cov, rtol=1e-9)


# ---- analysis


def test_sample_ratio_by_hand() -> None:
    # expected 50 and 50: (60 - 50)^2 / 50 * 2 = 4, chi-square of one degree of freedom: p = 0.0455
    ratio = sample_ratio({"old": 60, "new": 40}, EQUAL)
    assert ratio.p_value == pytest.approx(0.0455, abs=1e-4)
    assert not ratio.broken
    # an arm that lost all its users counts 0: (100 - 50)^2 / 50 * 2 = 100
    assert sample_ratio({"old": 100}, EQUAL).broken
    with pytest.raises(ValueError, match=r"\['other'\]"):
        sample_ratio({"other": 3}, EQUAL)


def test_a_broken_sample_ratio_stops_the_report() -> None:
    users = _users(3, 1000, lift=0.5)
    kept = users[(users["arm"] == "old") | (users["click"] > 1)]
    found = analyse(kept, [CTR, dataclasses.replace(CTR, name="guard", margin=0.02)], control="old", weights=EQUAL)
    assert found.ratio.broken
    assert (found.effects, found.guardrails, found.segments) == ((), (), ())
    assert found.verdict("new").startswith("no conclusion")
    for text in (markdown(TestReport("a test", {}, found)), fragment(TestReport("a test", {}, found))):
        assert "Sample-ratio mismatch" in text
        assert "Effects" not in text
        assert "lift" not in text


@needs_tea_tasting
def test_the_planned_traffic_is_what_is_checked() -> None:
    users = pd.concat([_users(4)[lambda t: t["arm"] == "old"], _users(4)[lambda t: t["arm"] == "new"][:20]])
    assert analyse(users, [CTR], control="old", weights=EQUAL).stopped is not None
    assert analyse(users, [CTR], control="old", weights={"old": 10, "new": 1}).stopped is None


@needs_tea_tasting
def test_holm_and_benjamini_hochberg_are_over_goals_and_arms() -> None:
    users = pd.concat(
        [_users(5, 600, lift=0.2), _users(6, 600).assign(arm="third", user_id=[f"t{i}" for i in range(600)])]
    )
    metrics = [CTR, Metric("clicks", "click")]
    found = analyse(users, metrics, control="old", weights={"old": 1, "new": 1, "third": 2})
    assert [(e.arm, e.metric) for e in found.effects] == [
        (arm, name) for arm in ("new", "third") for name in ("ctr", "clicks")
    ]
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = [e.p_value for e in found.effects]
    for ours, method in (("p_holm", "holm"), ("p_bh", "fdr_bh")):
        expected = multitest.multipletests(p_values, method=method)[1]
        np.testing.assert_allclose([getattr(e, ours) for e in found.effects], expected)


@needs_tea_tasting
def test_a_guardrail_passes_only_when_harm_is_excluded() -> None:
    users = _users(7, 4000)
    metrics = [dataclasses.replace(CTR, name=f"tolerates {m:g}", margin=m) for m in (0.001, 0.3)]
    found = analyse(users, metrics, control="old", weights=EQUAL)
    assert [g.passes for g in found.guardrails] == [False, True]
    # the same change, read as a cost that must not rise
    costs = [dataclasses.replace(m, higher_is_better=False) for m in metrics]
    other = analyse(users, costs, control="old", weights=EQUAL).guardrails
    assert [g.passes for g in other] == [False, True]
    assert other[0].bound > other[0].lift > found.guardrails[0].bound


@needs_tea_tasting
def test_a_metric_without_any_spread_is_known_and_claims_nothing() -> None:
    users = _users(8).assign(stayed=1.0, never=0.0)
    metrics = [Metric("never", "never"), Metric("stayed", "stayed", margin=0.02)]
    found = analyse(users, metrics, control="old", weights=EQUAL)
    assert found.guardrails[0].passes
    assert found.effects[0].p_value == 1.0
    assert found.effects[0].lift.as_percent() == "-"
    assert found.effects[0].difference.as_number() == "+0.0000 [+0.0000, +0.0000]"


@needs_tea_tasting
def test_segments_are_those_of_the_leaderboard() -> None:
    found = analyse(_users(9), [CTR], control="old", weights=EQUAL)
    # history lengths 0..39 in turn, 400 users in two arms: 6, 15 and 19 lengths of 10 users
    assert [(e.segment, sum(e.users)) for e in found.segments] == [("cold", 60), ("light", 150), ("heavy", 190)]


@needs_tea_tasting
def test_a_clear_gain_is_called_better_unless_a_guardrail_is_open() -> None:
    users = _users(10, 2000, lift=0.3)
    guard = dataclasses.replace(CTR, name="guard", margin=0.02)
    assert analyse(users, [CTR, guard], control="old", weights=EQUAL).verdict("new") == "better: ctr"
    lower = dataclasses.replace(CTR, higher_is_better=False)
    assert analyse(users, [lower], control="old", weights=EQUAL).verdict("new") == "worse: ctr"
    harmed = dataclasses.replace(guard, higher_is_better=False)
    verdict = analyse(users, [CTR, harmed], control="old", weights=EQUAL).verdict("new")
    assert verdict == "better on ctr, but harm to guard is not excluded"


def test_without_the_extra_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tea_tasting", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'metarec-gym\[ab\]'"):
        analysis.tea_tasting()


# ---- planning


def test_power_is_the_level_without_an_effect_and_grows_with_it() -> None:
    columns = metric_columns(_users(11, 300), CTR)
    planner = Planner(columns, (150, 150), samples=1000)
    assert 0.03 < planner.power(0.0) < 0.07
    found = planner.detectable(0.8)
    assert found is not None
    assert planner.power(found) == pytest.approx(0.8, abs=0.01)
    assert planner.power(2 * found) > 0.95


def test_planned_power_of_normal_users_is_the_textbooks() -> None:
    # mean 10, sd 1, two arms of 100, lift 4 %: z = 0.4 / sqrt(2 / 100) = 2.83, power = P(Z > 1.96 - 2.83) = 0.81
    normal = pytest.importorskip("scipy.stats").norm.ppf((np.arange(400) + 0.5) / 400)
    columns = np.ones((400, 4))
    columns[:, 0] = 10 + normal / normal.std(ddof=1)
    assert Planner(columns, (100, 100), samples=1000).power(0.04) == pytest.approx(0.81, abs=0.04)
    # (1.96 + 0.84)^2 * 2 / 0.4^2 = 98 an arm
    assert users_needed(columns, 0.04) == pytest.approx(196, rel=0.1)


def test_a_raised_share_of_converted_users_has_the_variance_of_a_share() -> None:
    # p = 0.2 and 10 users: variance 0.16 * 10 / 9; raised by half p = 0.3: 0.21 * 10 / 9
    columns = np.ones((10, 4))
    columns[:, 0] = [1, 1] + [0] * 8
    raised = Moments.of(columns).raised(0.5, binary=True)
    assert raised.mean[0] == pytest.approx(0.3)
    assert raised.cov[0, 0] == pytest.approx(0.21 * 10 / 9)
    assert Moments.of(columns).raised(9.0, binary=True).mean[0] == pytest.approx(1.0)


def test_cuped_makes_smaller_effects_detectable() -> None:
    users = _users(13, 500)
    columns = metric_columns(users, CTR.with_covariate(users.columns))
    with_it, without = (Planner(columns, (250, 250), cuped=c, samples=500).detectable() for c in (True, False))
    assert with_it is not None
    assert without is not None
    assert with_it < 0.9 * without


def test_p_values_of_a_a_splits_are_uniform() -> None:
    stats = pytest.importorskip("scipy.stats")
    p_values = a_a_p_values(metric_columns(_users(14, 400), CTR), splits=1000)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


# ---- peeking


def test_the_confidence_sequence_is_villes() -> None:
    means = pytest.importorskip("ville.means")
    x = numpy_rng(15, "stream").normal(0.1, 1.0, 600)
    theirs = means.AsymptoticCS(alpha=0.05, t_opt=300).fit(x)
    n = np.arange(1, 601)
    se = np.array([np.nan, *(x[:k].std(ddof=1) / k**0.5 for k in n[1:])])
    half = boundary(n, best_at=300) * se
    np.testing.assert_allclose((theirs.upper_ - theirs.estimate_)[100:], half[100:], rtol=1e-5)


def test_the_mixture_ratio_is_villes() -> None:
    sequential = pytest.importorskip("ville.sequential")
    x = numpy_rng(16, "stream").normal(0.1, 1.0, 400)
    n = np.arange(1, 401)
    ours = log_mixture_ratio(np.cumsum(x) / n**0.5, n, best_at=200)
    np.testing.assert_allclose(sequential.MSPRT(sigma=1.0, t_opt=200).fit(x).log_e_values_, ours, atol=1e-5)


def test_the_count_ratio_is_villes_beta_mixture() -> None:
    proportions = pytest.importorskip("ville.proportions")
    x = (numpy_rng(17, "coins").random(300) < 0.6).astype(np.float64)
    heads = np.cumsum(x)
    ours = log_count_ratio(np.stack([heads, np.arange(1, 301) - heads], axis=1), (0.5, 0.5))
    np.testing.assert_allclose(proportions.BernoulliTest(0.5).fit(x).log_e_values_, ours, atol=1e-9)


def test_the_count_ratio_by_hand() -> None:
    # two heads: Beta(1, 1) mixture gives B(3, 1) = 1 / 3 against 1 / 4
    assert np.exp(log_count_ratio([2, 0], (0.5, 0.5))) == pytest.approx(4 / 3)
    # one of each: B(2, 2) = 1 / 6 against 1 / 4
    assert np.exp(log_count_ratio([1, 1], (0.5, 0.5))) == pytest.approx(4 / 6)


def test_the_sequence_excludes_zero_exactly_when_the_ratio_reaches_one_over_alpha() -> None:
    n = np.array([50.0, 500.0, 5000.0])
    edge = boundary(n, best_at=1000, alpha=0.01)
    np.testing.assert_allclose(log_mixture_ratio(edge, n, best_at=1000, alpha=0.01), np.log(100.0))


def test_the_sequence_is_narrowest_where_it_was_told_to() -> None:
    n = 1000.0
    rho = mixture_rho(n)
    widths = [(n + r) / n * np.log((n + r) / (r * 0.05**2)) for r in (0.8 * rho, rho, 1.25 * rho)]
    assert widths[1] == min(widths)
    with pytest.raises(ValueError, match="alpha"):
        mixture_rho(n, alpha=1.0)


def test_always_valid_p_values_never_rise() -> None:
    np.testing.assert_allclose(always_valid_p(np.log([0.5, 4.0, 2.0, 8.0])), [1.0, 0.25, 0.25, 0.125])


@needs_tea_tasting
def test_monitoring_sees_a_large_effect_early_and_ends_at_the_analysis() -> None:
    users = _users(18, 1000, lift=0.6)
    path = monitoring.monitor(users, CTR, control="old", arm="new")
    decided = path.decided_at()
    assert decided is not None
    assert 200 <= decided < 1000
    assert np.isnan(path.effect[150])
    effect = analyse(users, [CTR], control="old", weights=EQUAL).effects[0]
    assert path.effect[-1] == pytest.approx(effect.difference.estimate)
    assert path.low[-1] < effect.difference.low
    assert path.p_value[-1] < 0.05
    with pytest.raises(ValueError, match="first_exposure"):
        monitoring.monitor(users.drop(columns="first_exposure"), CTR, control="old", arm="new")


def test_monitoring_sees_lost_users_and_conversions_that_go_one_way() -> None:
    users = _users(19, 600)
    assert monitoring.sample_ratio_path(users, EQUAL)[-1] > 0.05
    lost = users[(users["arm"] == "old") | (users.index % 5 > 0)]
    assert monitoring.sample_ratio_path(lost, {"old": 1, "new": 0.8})[-1] > 0.05
    assert monitoring.sample_ratio_path(users[users["arm"] == "old"], EQUAL)[-1] < 1e-6
    event = (users["arm"] == "new").to_numpy() & (users["click"] > 0).to_numpy()
    assert monitoring.event_path(users, event, EQUAL)[-1] < 1e-6


# ---- the report


@needs_tea_tasting
def test_markdown_and_fragment_say_the_same(tmp_path) -> None:
    users = _users(20, 600, lift=0.3)
    found: Analysis = analyse(users, [CTR], control="old", weights=EQUAL)
    paths = {"new": monitoring.monitor(users, CTR, control="old", arm="new")}
    report = TestReport("A <test>", {"command": "python"}, found, paths=paths, monitored="ctr")
    text, html = markdown(report), fragment(report)
    number = found.effects[0].lift.as_percent()
    assert number in text
    assert number in html
    assert "A &lt;test&gt;" in html
    assert "<svg" in html
    assert "<script" not in html
