"""Off-policy values as one self-contained HTML page: the claims first, then every estimator with what it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from metarec_gym.evaluation.intervals import Interval
from metarec_gym.evaluation.off_policy.evaluation import HEADLINE, PolicyValue
from metarec_gym.evaluation.report.figures import FAINT, INK, SERIES, drawing, figure_html
from metarec_gym.evaluation.report.parts import document, escape, fact_list, rows_table, section

_HEAD = (
    "estimator",
    "value of a request [t interval]",
    "studentised bootstrap",
    "less the log's own value",
    "effective rows",
    "largest weight (share)",
    "read with",
)


@dataclass(frozen=True)
class OffPolicyReport:
    """What the page shows.

    Attributes:
        title: First line.
        answers: Sentences that come first.
        values: Every estimator by policy, or by what else was valued.
        references: By policy the mean that it is shown beside, and what that is.
        bernstein: By policy the empirical Bernstein bounds, as text.
        warnings: Sentences that stand before all numbers.
        provenance: Name and value: command, log, versions.
    """

    title: str
    answers: Sequence[str]
    values: Mapping[str, Sequence[PolicyValue]]
    references: Mapping[str, tuple[str, Interval]]
    bernstein: Mapping[str, str]
    warnings: Sequence[str] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)


def claims(values: Mapping[str, Sequence[PolicyValue]], adjusted: Mapping[str, float], level: float) -> list[str]:
    """Sentences on which policies surely earn more or less than the log did.

    Args:
        values: Every estimator by policy.
        adjusted: p-value of the headline estimator's difference by policy, adjusted for their number.
        level: Confidence level.
    """
    said = []
    for name, rows in values.items():
        claim = next(row for row in rows if row.estimator == HEADLINE)
        if adjusted[name] < 1.0 - level:
            way = "more" if claim.less_logged.estimate > 0 else "less"
            gain = claim.less_logged.as_number(4)
            said.append(
                f"{name} would have earned {way} than the log did: {gain} a request (p {adjusted[name]:.2g}, Holm)."
            )
    return said or [f"No policy surely differs from what the log earned (at {level:.0%}, {HEADLINE}, Holm)."]


def off_policy_page(report: OffPolicyReport) -> str:
    """The page; HTML without script or network."""
    lead = "".join(f'<p class="lead">{escape(sentence)}</p>' for sentence in report.answers)
    care = "".join(f'<p class="caution">Warning: {escape(warning)}.</p>' for warning in report.warnings)
    blocks = [f"<header><h1>{escape(report.title)}</h1>{care}{lead}</header>"]
    notes: dict[str, int] = {}
    for index, (name, rows) in enumerate(report.values.items()):
        label, reference = report.references[name]
        lines = []
        for row in rows:
            rests = row.support
            marks = ", ".join(str(notes.setdefault(warning, len(notes) + 1)) for warning in row.warnings)
            weight = "-" if rests is None else f"{rests.largest_weight:.2f} ({100 * rests.largest_share:.1f} %)"
            cells = [
                f"{row.estimator} ({row.setting})" if row.setting else row.estimator,
                row.interval.as_number(4),
                row.bootstrap.as_number(),
                row.less_logged.as_number(4),
                "-" if rests is None else f"{rests.effective_rows:,.0f}",
                weight,
                marks,
            ]
            lines.append([escape(cell) for cell in cells])
        below = f"<p>{escape(label)}: {escape(reference.as_number(4))}. Empirical Bernstein bounds, which hold for any overlap: "
        below += f"{escape(report.bernstein[name])}.</p>"
        blocks.append(
            section(name, _forest(rows, label, reference, f"forest{index}") + below + rows_table(_HEAD, lines))
        )
    if notes:
        items = "".join(f"<p>{number}. {escape(note)}.</p>" for note, number in notes.items())
        blocks.append(section("What the estimators have to be read with", items))
    blocks.append(section("How this was measured", fact_list(report.provenance)))
    return document(report.title, blocks)


def _forest(rows: Sequence[PolicyValue], label: str, reference: Interval, name: str) -> str:
    with drawing(height=0.9 + 0.24 * len(rows)) as (figure, axes):
        axes.axvspan(reference.low, reference.high, color=FAINT, linewidth=0)
        axes.axvline(reference.estimate, color=INK, linewidth=0.8)
        for place, row in enumerate(reversed(rows)):
            colour = SERIES[1] if row.estimator == HEADLINE else SERIES[0]
            axes.plot([row.interval.low, row.interval.high], [place, place], color=colour, linewidth=2.0)
            axes.plot([row.interval.estimate], [place], "o", color=colour, markersize=4)
        axes.set_yticks(range(len(rows)), [row.estimator for row in reversed(rows)])
        axes.set_xlabel("reward a request")
    caption = f"95 % t intervals over users; claims rest on {HEADLINE}. Line and band: {label[:1].lower()}{label[1:]}."
    return figure_html(figure, caption, name)
