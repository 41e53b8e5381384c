"""What a finished test found: sample-ratio check first, then effects by metric and arm, guardrails and segments.

The unit is the user throughout. Means, ratios (delta method) and CUPED are tea-tasting's; tests are Welch's, two-sided at 5 %.
Over all goals and arms p-values are adjusted by Holm (no false claim at all, the one to decide by) and by Benjamini and
Hochberg (share of false claims); segments are a family of their own. A guardrail is passed when a one-sided 95 % bound
excludes a worsening beyond its margin: as all of them must pass, they need no correction (intersection-union).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from metarec_gym.evaluation.ab_test.assignment import check_weights
from metarec_gym.evaluation.ab_test.table import PARTS, Metric, metric_columns
from metarec_gym.evaluation.intervals import holm
from metarec_gym.evaluation.metrics import SEGMENTS, segment_of

if TYPE_CHECKING:
    import pandas as pd

SRM_LEVEL = 0.001
"""A sample-ratio p-value below this stops the report."""
ALL = "all"
"""The segment of everybody."""
MIN_ARM_USERS = 10
"""A segment with fewer users in an arm is not analysed."""


@dataclass(frozen=True)
class Bounds:
    """An estimate and its interval."""

    estimate: float
    low: float
    high: float

    def as_percent(self) -> str:
        """For example `+1.6 % [+0.6, +2.8]`; `-` where there is no number."""
        if not np.isfinite([self.estimate, self.low, self.high]).all():
            return "-"
        return f"{100 * self.estimate:+.1f} % [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    def as_number(self, digits: int = 4) -> str:
        """For example `+0.0120 [+0.0080, +0.0160]`."""
        return f"{self.estimate:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


@dataclass(frozen=True)
class SampleRatio:
    """Whether the arms have the users they should have.

    Attributes:
        counts: Users by arm.
        expected: Expected users by arm.
        p_value: Of Pearson's chi-square test.
    """

    counts: Mapping[str, int]
    expected: Mapping[str, float]
    p_value: float

    @property
    def broken(self) -> bool:
        """Whether the assignment cannot be believed."""
        return self.p_value < SRM_LEVEL

    def line(self) -> str:
        """What was counted and expected, in words."""
        arms = ", ".join(f"{arm} {n:,} users ({self.expected[arm]:,.1f} expected)" for arm, n in self.counts.items())
        return f"{arms}; chi-square p = {self.p_value:.2g}"


@dataclass(frozen=True)
class Effect:
    """One metric, one arm against the control.

    Attributes:
        metric: Name of the metric.
        arm: The arm.
        segment: `all`, or one of the segments.
        users: Users of the arm and of the control arm.
        control: The metric in the control arm.
        treatment: The metric in the arm.
        difference: Treatment minus control.
        lift: Difference over control, the interval by the delta method on the logarithm.
        p_value: Two-sided.
        p_holm: Adjusted by Holm over the family.
        p_bh: Adjusted by Benjamini and Hochberg over the family.
        variance_left: Variance of the difference with CUPED over that without; None without a covariate.
    """

    metric: str
    arm: str
    segment: str
    users: tuple[int, int]
    control: float
    treatment: float
    difference: Bounds
    lift: Bounds
    p_value: float
    p_holm: float
    p_bh: float
    variance_left: float | None


@dataclass(frozen=True)
class Guardrail:
    """A metric that must not get worse by more than its margin.

    Attributes:
        metric: Name of the metric.
        arm: The arm.
        margin: Relative worsening that is tolerated.
        lift: Relative change.
        bound: One-sided 95 % bound of the change on the bad side.
        passes: Whether the bound excludes a worsening beyond the margin.
    """

    metric: str
    arm: str
    margin: float
    lift: float
    bound: float
    passes: bool


@dataclass(frozen=True)
class Analysis:
    """What was found.

    Attributes:
        control: The control arm.
        arms: The other arms.
        ratio: The sample-ratio check.
        stopped: Why no effect is shown; None when the check was passed.
        effects: Goals, every arm; empty when stopped.
        guardrails: Likewise.
        segments: Goals by segment; empty when stopped or without `history_length`.
        level: Confidence level.
    """

    control: str
    arms: tuple[str, ...]
    ratio: SampleRatio
    stopped: str | None
    effects: tuple[Effect, ...] = ()
    guardrails: tuple[Guardrail, ...] = ()
    segments: tuple[Effect, ...] = ()
    level: float = 0.95

    def verdict(self, arm: str) -> str:
        """What may be said of an arm, in a few words."""
        if self.stopped is not None:
            return "no conclusion: the sample-ratio check failed"
        failed = [g.metric for g in self.guardrails if g.arm == arm and not g.passes]
        own = [e for e in self.effects if e.arm == arm and e.p_holm < 1.0 - self.level]
        better = [e.metric for e in own if e.difference.estimate * self._sign(e.metric) > 0]
        worse = [e.metric for e in own if e.metric not in better]
        if worse:
            return f"worse: {', '.join(worse)}" + (f" (better: {', '.join(better)})" if better else "")
        if not better:
            return "no difference shown"
        if failed:
            return f"better on {', '.join(better)}, but harm to {', '.join(failed)} is not excluded"
        return f"better: {', '.join(better)}"

    lower_is_better: frozenset[str] = frozenset()
    """Metrics that are better when lower."""

    def _sign(self, metric: str) -> float:
        return -1.0 if metric in self.lower_is_better else 1.0


def tea_tasting() -> Any:
    """The library.

    Raises:
        ModuleNotFoundError: When the extra is not installed, with what to run.
    """
    try:
        return importlib.import_module("tea_tasting")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "analysing an A/B test needs tea-tasting, which the `ab` extra brings: pip install 'metarec-gym[ab]'"
        ) from error


def sample_ratio(counts: Mapping[str, int], weights: Mapping[str, float]) -> SampleRatio:
    """Pearson's chi-square test that users fell into the arms by their weights.

    Args:
        counts: Users by arm; an arm without users counts 0.
        weights: Traffic by arm, any positive numbers.

    Raises:
        ValueError: When there are no users, or users in an arm that has no weight.
    """
    from scipy import stats

    shares = check_weights(weights)
    unknown = sorted(set(counts) - set(shares))
    if unknown:
        raise ValueError(f"users are in the arms {unknown}, which have no weight; the weights are for {list(shares)}")
    seen = {arm: int(counts.get(arm, 0)) for arm in shares}
    total = sum(seen.values())
    if total == 0:
        raise ValueError("no user is in any arm")
    expected = {arm: total * share for arm, share in shares.items()}
    p_value = float(stats.chisquare(list(seen.values()), list(expected.values())).pvalue)
    return SampleRatio(seen, expected, p_value)


def analyse(
    users: pd.DataFrame,
    metrics: Sequence[Metric],
    *,
    control: str,
    weights: Mapping[str, float],
    level: float = 0.95,
) -> Analysis:
    """The report's numbers; nothing but the reason where the sample-ratio check fails.

    Args:
        users: One row a user, see `table.user_table`.
        metrics: Goals (without a margin) and guardrails (with one), covariates set.
        control: The arm that the others are compared with.
        weights: Traffic by arm, as planned: never as counted, or the check would check nothing.
        level: Confidence level.

    Raises:
        ValueError: When the control is no arm, or two metrics share a name.
        ModuleNotFoundError: Without the `ab` extra.
    """
    if control not in weights:
        raise ValueError(f"the control arm {control!r} has no weight; the weights are for {list(weights)}")
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names):
        raise ValueError(f"two metrics share a name: {names}")
    counts = {str(arm): int(n) for arm, n in users["arm"].value_counts().items()}
    ratio = sample_ratio(counts, weights)
    arms = tuple(arm for arm in weights if arm != control)
    if ratio.broken:
        why = (
            f"Sample-ratio mismatch: {ratio.line()}, below {SRM_LEVEL:g}. Users are missing from an arm or were put there by "
            "something else than the assignment, so the arms are not comparable and no effect is shown. Look for: exposure "
            "logged at different places, redirects and crashes of one arm, bots filtered by outcome, a changed share of traffic."
        )
        return Analysis(control, arms, ratio, why, level=level)
    goals = [metric for metric in metrics if metric.margin is None]
    effects = _effects(users, goals, control, arms, ALL, level)
    segments: list[Effect] = []
    if "history_length" in users:
        place = segment_of(users["history_length"].to_numpy())
        for index, name in enumerate(SEGMENTS):
            segments += _effects(users[place == index], goals, control, arms, name, level)
    return Analysis(
        control,
        arms,
        ratio,
        None,
        tuple(_adjusted(effects)),
        tuple(_guardrails(users, [m for m in metrics if m.margin is not None], control, arms, level)),
        tuple(_adjusted(segments)),
        level,
        frozenset(m.name for m in metrics if not m.higher_is_better),
    )


def _frame(users: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    import pandas as pd

    # columns of their own: tea-tasting cannot use one column in two roles
    return pd.DataFrame(metric_columns(users, metric), columns=list(PARTS)).assign(arm=users["arm"].to_numpy())


def _measure(frame: pd.DataFrame, control: str, *, cuped: bool, level: float, alternative: str = "two-sided") -> Any:
    """tea-tasting's result of one metric for the two arms in the frame."""
    library = tea_tasting()
    measure = library.RatioOfMeans(*PARTS[: 4 if cuped else 2], alternative=alternative, confidence_level=level)
    with warnings.catch_warnings():
        # a metric that nobody scores on has neither lift nor p-value: reported as such, not as a warning
        warnings.simplefilter("ignore", RuntimeWarning)
        return library.Experiment({"metric": measure}, variant="arm").analyze(frame, control=control)["metric"]


def _pair(users: pd.DataFrame, control: str, arm: str) -> pd.DataFrame:
    return users[users["arm"].isin([control, arm])]


def _effects(
    users: pd.DataFrame, metrics: Sequence[Metric], control: str, arms: Sequence[str], segment: str, level: float
) -> list[Effect]:
    out = []
    for arm in arms:
        pair = _pair(users, control, arm)
        sizes = (int((pair["arm"] == arm).sum()), int((pair["arm"] == control).sum()))
        if min(sizes) < MIN_ARM_USERS:
            continue
        for metric in metrics:
            frame, cuped = _frame(pair, metric), metric.covariate is not None
            found = _measure(frame, control, cuped=cuped, level=level)
            left = None
            if cuped:
                plain = _measure(frame, control, cuped=False, level=level)
                left = _width(found) ** 2 / max(_width(plain) ** 2, 1e-300)
            difference = Bounds(found.effect_size, found.effect_size_ci_lower, found.effect_size_ci_upper)
            lift = Bounds(found.rel_effect_size, found.rel_effect_size_ci_lower, found.rel_effect_size_ci_upper)
            if not _varies(frame):
                difference = Bounds(found.effect_size, found.effect_size, found.effect_size)
                lift = Bounds(found.rel_effect_size, found.rel_effect_size, found.rel_effect_size)
            if not found.control > 0:
                lift = Bounds(float("nan"), float("nan"), float("nan"))
            # without any spread the p-value is undefined: nothing is claimed
            p_value = float(found.pvalue) if np.isfinite(found.pvalue) else 1.0
            values = (float(found.control), float(found.treatment))
            out.append(Effect(metric.name, arm, segment, sizes, *values, difference, lift, p_value, 1.0, 1.0, left))
    return out


def _varies(frame: pd.DataFrame) -> bool:
    return bool((frame.groupby("arm")[list(PARTS[:2])].nunique() > 1).any(axis=None))


def _width(found: Any) -> float:
    return float(found.effect_size_ci_upper - found.effect_size_ci_lower)


def _adjusted(effects: Sequence[Effect]) -> list[Effect]:
    from scipy import stats

    if not effects:
        return []
    p_values = [effect.p_value for effect in effects]
    share = stats.false_discovery_control(p_values, method="bh")
    return [replace(e, p_holm=h, p_bh=float(b)) for e, h, b in zip(effects, holm(p_values), share, strict=True)]


def _guardrails(
    users: pd.DataFrame, metrics: Sequence[Metric], control: str, arms: Sequence[str], level: float
) -> list[Guardrail]:
    out = []
    for arm in arms:
        pair = _pair(users, control, arm)
        for metric in metrics:
            side = "greater" if metric.higher_is_better else "less"
            frame = _frame(pair, metric)
            found = _measure(frame, control, cuped=metric.covariate is not None, level=level, alternative=side)
            bound = found.rel_effect_size_ci_lower if metric.higher_is_better else found.rel_effect_size_ci_upper
            if not _varies(frame):
                # everybody alike in both arms: the change is known, and tea-tasting's bound is 0 / 0
                bound = found.rel_effect_size
            margin = float(metric.margin or 0.0)
            passes = bool(bound > -margin if metric.higher_is_better else bound < margin)
            out.append(Guardrail(metric.name, arm, margin, float(found.rel_effect_size), float(bound), passes))
    return out
