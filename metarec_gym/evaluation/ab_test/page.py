"""The report of a test, once as Markdown and once as a fragment of HTML (`<section>`s to put into any page)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from metarec_gym.evaluation.ab_test.analysis import Analysis, Effect
from metarec_gym.evaluation.ab_test.interleaving import Sensitivity
from metarec_gym.evaluation.ab_test.monitoring import Path
from metarec_gym.evaluation.ab_test.planning import Plan
from metarec_gym.evaluation.intervals import Interval
from metarec_gym.evaluation.report.figures import FAINT as _FAINT
from metarec_gym.evaluation.report.figures import INK as _INK
from metarec_gym.evaluation.report.figures import SERIES as _SERIES
from metarec_gym.evaluation.report.figures import drawing as _drawing
from metarec_gym.evaluation.report.figures import figure_html as _figure
from metarec_gym.evaluation.report.parts import escape as _e
from metarec_gym.evaluation.report.parts import rows_table as _rows_table
from metarec_gym.evaluation.report.parts import section as _section

MAX_POINTS = 400
"""Points of a drawn path; a look at every user would make a page of megabytes."""


@dataclass(frozen=True)
class Planned:
    """What was known of a metric before the test.

    Attributes:
        plan: What the planned size can find, with CUPED where the metric has a covariate.
        plain: Likewise without CUPED; None without a covariate.
        needed: Users of two equal arms for `smallest`; None when that is out of reach.
        smallest: Smallest lift worth finding.
        alarms: Share of A/A splits of the baseline users that were significant at 5 %.
        splits: How many splits.
    """

    plan: Plan
    plain: Plan | None
    needed: int | None
    smallest: float
    alarms: float
    splits: int


@dataclass(frozen=True)
class TestReport:
    """What the report shows.

    Attributes:
        title: First line.
        facts: Name and value: world, users, salt, command ...
        analysis: The analysis.
        planned: By metric; empty where nothing was planned.
        paths: By arm, the monitored metric after each user; empty when stopped.
        monitored: Name of that metric.
        ratio_path: Always-valid p-value of the sample ratio at the end.
        conversions: By arm, always-valid p-value of the conversion counts against the control.
        interleaved: By arm, preference over the control and sensitivity.
        notes: Further sentences.
    """

    __test__ = False

    title: str
    facts: Mapping[str, str]
    analysis: Analysis
    planned: Mapping[str, Planned] = field(default_factory=dict)
    paths: Mapping[str, Path] = field(default_factory=dict)
    monitored: str = ""
    ratio_path: float | None = None
    conversions: Mapping[str, float] = field(default_factory=dict)
    interleaved: Mapping[str, tuple[Interval, Sensitivity]] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


Section = tuple[str, list["str | Table"]]
"""Heading; paragraphs and tables."""


def sections(report: TestReport) -> list[Section]:
    """The report's content, in order; where the sample-ratio check fails nothing that compares arms is among it."""
    found = report.analysis
    out: list[Section] = [(report.title, _verdict(report)), ("Before the test", _before(report.planned))]
    if found.stopped is None:
        out += [
            ("Effects", _effects(found.effects)),
            ("Guardrails", _guardrails(found)),
            ("Who gains", _segments(found.segments)),
            ("While it ran", _monitoring(report)),
            ("Interleaving", _interleaving(report)),
        ]
    out += [("How this was measured", _method(report))]
    return [section for section in out if section[1]]


def markdown(report: TestReport) -> str:
    """The report as Markdown."""
    blocks = []
    for index, (title, content) in enumerate(sections(report)):
        blocks.append(f"{'#' if index == 0 else '##'} {title}")
        for part in content:
            if isinstance(part, str):
                blocks.append(part)
            else:
                lines = [f"| {' | '.join(line)} |" for line in (part.head, *part.rows)]
                blocks.append("\n".join([lines[0], f"|{'---|' * len(part.head)}", *lines[1:]]))
    return "\n\n".join(blocks) + "\n"


def fragment(report: TestReport) -> str:
    """The report as `<section>`s, with the monitoring plot as inline SVG."""
    out = []
    for title, content in sections(report):
        body = [
            f"<p>{_e(part)}</p>"
            if isinstance(part, str)
            else _rows_table([_e(h) for h in part.head], [[_e(c) for c in row] for row in part.rows])
            for part in content
        ]
        if title == "While it ran" and any(np.isfinite(path.effect).any() for path in report.paths.values()):
            body.append(_plot(report))
        out.append(_section(title, "\n".join(body)))
    return "\n".join(out) + "\n"


def _verdict(report: TestReport) -> list[str | Table]:
    found = report.analysis
    if found.stopped is not None:
        return [found.stopped]
    rows = [[arm, found.verdict(arm)] for arm in found.arms]
    return [
        f"Control: {found.control}. Claims hold with 95 % confidence for all goals and arms together (Holm).",
        Table(("arm", "verdict"), rows),
        f"Sample ratio: {found.ratio.line()}.",
    ]


def _before(planned: Mapping[str, Planned]) -> list[str | Table]:
    if not planned:
        return []
    rows = []
    for name, p in planned.items():
        without = "-" if p.plain is None else _lift(p.plain.detectable)
        needed = "over ten million" if p.needed is None else f"{p.needed:,}"
        alarms = f"{100 * p.alarms:.1f} % of {p.splits:,}"
        rows.append([name, _lift(p.plan.detectable), without, f"{needed} for {100 * p.smallest:g} %", alarms])
    first = next(iter(planned.values())).plan
    head = ("metric", "detectable lift", "without CUPED", "users needed, two equal arms", "A/A splits significant")
    return [
        f"Smallest lift found with {first.power:.0%} power by {first.users[0]:,} control and {first.users[1]:,} other users, "
        f"two-sided at {100 * first.level:.2g} % (5 % over the number of comparisons). Tests are drawn from users whom the "
        "control policy served before. A/A splits of those users, each analysed like the test at 5 %, should be significant "
        "in about 5 %, and in fewer where nearly all users have the same value.",
        Table(head, rows),
    ]


def _lift(value: float | None) -> str:
    return "above 100 %" if value is None else f"{100 * value:.1f} %"


def _effects(effects: Sequence[Effect]) -> list[str | Table]:
    head = ("metric", "arm", "users", "control", "arm's value", "difference [95 %]", "lift [95 %]", "p")
    rows = []
    for e in effects:
        left = "-" if e.variance_left is None else f"{100 * e.variance_left:.0f} %"
        users = f"{e.users[0]:,} / {e.users[1]:,}"
        row = [e.metric, e.arm, users, f"{e.control:.4f}", f"{e.treatment:.4f}", e.difference.as_number()]
        rows.append([*row, e.lift.as_percent(), f"{e.p_value:.2g}", f"{e.p_holm:.2g}", f"{e.p_bh:.2g}", left])
    return [
        "Intervals are for each comparison by itself; p (Holm) and p (BH) are for all of them together. The last column is the "
        "variance that CUPED left.",
        Table((*head, "p (Holm)", "p (BH)", "variance left"), rows),
    ]


def _guardrails(found: Analysis) -> list[str | Table]:
    if not found.guardrails:
        return []
    rows = []
    for g in found.guardrails:
        numbers = (f"{100 * g.margin:g} %", f"{100 * g.lift:+.1f} %", f"{100 * g.bound:+.1f} %")
        rows.append([g.metric, g.arm, *numbers, "passed" if g.passes else "harm not excluded"])
    head = ("guardrail", "arm", "worsening tolerated", "change", "one-sided 95 % bound", "")
    return ["Passed means: a worsening beyond the margin is excluded. Not shown is not passed.", Table(head, rows)]


def _segments(effects: Sequence[Effect]) -> list[str | Table]:
    rows = [
        [e.segment, e.metric, e.arm, f"{e.users[0]:,} / {e.users[1]:,}", e.lift.as_percent(), f"{e.p_holm:.2g}"]
        for e in effects
    ]
    head = ("segment", "metric", "arm", "users", "lift [95 %]", "p (Holm)")
    note = "By length of the history before the test. Exploratory: p (Holm) is over all lines of this table."
    return [note, Table(head, rows)] if rows else []


def _monitoring(report: TestReport) -> list[str | Table]:
    if not report.paths:
        return []
    rows = []
    for arm, path in report.paths.items():
        at = path.decided_at()
        end = f"{path.effect[-1]:+.4f} [{path.low[-1]:+.4f}, {path.high[-1]:+.4f}]"
        if not np.isfinite(path.effect[-1]):
            end = f"too few users for bounds ({path.users[-1]:,.0f})"
        conversion = report.conversions.get(arm)
        row = [arm, "not decided" if at is None else f"after {at:,} users", end, f"{path.p_value[-1]:.2g}"]
        rows.append([*row, "-" if conversion is None else f"{conversion:.2g}"])
    head = ("arm", "0 excluded", "difference at the end", "always-valid p", "always-valid p, counts of converted users")
    ratio = (
        "" if report.ratio_path is None else f" Always-valid p of the sample ratio at the end: {report.ratio_path:.2g}."
    )
    return [
        f"Metric {report.monitored}. The bounds hold at all looks at once, so the test may be stopped at any of them; each arm "
        f"by itself. They are wider than the interval of a test that is looked at once.{ratio}",
        Table(head, rows),
    ]


def _interleaving(report: TestReport) -> list[str | Table]:
    if not report.interleaved:
        return []
    rows, rates = [], []
    for arm, (preference, s) in report.interleaved.items():
        z = f"{s.interleaving:+.1f} / {s.ab_test:+.1f}"
        # with a difference that the A/B test hardly sees the ratio is noise
        fewer = f"{s.fewer_users:.1f} x" if abs(s.ab_test) > 2.0 else "-"
        if abs(s.ab_test) > 2.0 and s.interleaving * s.ab_test < 0:
            fewer = "they disagree: believe the A/B test"
        rows.append([arm, f"{preference.estimate:+.4f} [{preference.low:+.4f}, {preference.high:+.4f}]", z, fewer])
        rates += [[arm, f"{n:,}", f"{i:.0%}", f"{a:.0%}"] for n, i, a in s.detected]
    head = ("arm", "preference over control per pair of places [95 %]", "z, interleaving / A/B", "fewer users needed")
    return [
        "Both policies fill one slate by team draft; the preference is the reward of the arm's places less that of the "
        "control's. It says which policy is preferred, not what it will gain: that is the A/B test's answer. Sensitivity is "
        "measured on the reward of the same visitors, without CUPED.",
        Table(head, rows),
        Table(("arm", "users", "interleavings significant", "A/B tests significant"), rates),
    ]


def _method(report: TestReport) -> list[str | Table]:
    return [*report.notes, Table(("", ""), [[k, v] for k, v in report.facts.items()])]


def _plot(report: TestReport) -> str:
    with _drawing(height=3.4) as (figure, axes):
        axes.axhline(0.0, color=_INK, linewidth=0.8)
        for index, (arm, path) in enumerate(report.paths.items()):
            seen = np.flatnonzero(np.isfinite(path.effect))
            seen = seen[:: max(1, len(seen) // MAX_POINTS)]
            colour = _SERIES[index % len(_SERIES)]
            axes.fill_between(path.users[seen], path.low[seen], path.high[seen], color=colour, alpha=0.13, linewidth=0)
            axes.plot(path.users[seen], path.effect[seen], color=colour, linewidth=1.6, label=arm)
        axes.set_xlabel("users of the arm and of the control so far")
        axes.set_ylabel(f"{report.monitored}: arm less control")
        axes.grid(color=_FAINT, linewidth=0.5)
        axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return _figure(figure, "95 % confidence sequences: valid at every user at once.", "monitoring")
