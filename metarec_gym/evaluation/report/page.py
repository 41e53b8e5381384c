"""The comparison's report: verdict first, then the numbers with their intervals, figures, cards and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from metarec_gym.evaluation.leaderboard import TRAINED, PolicyRow, cells, early_window, ordered, second_cell
from metarec_gym.evaluation.metrics import MIN_HEADROOM, SEGMENT_EDGES, SEGMENTS
from metarec_gym.evaluation.report.cards import cautions, data_card, world_card
from metarec_gym.evaluation.report.comparison import hull_section, learning_section, pairs_section, usage_section
from metarec_gym.evaluation.report.explanation import explanation_section
from metarec_gym.evaluation.report.figures import DASHES, FAINT, INK, MAX_CURVES, SERIES, drawing, figure_html
from metarec_gym.evaluation.report.parts import bar, document, escape, rows_table, section

if TYPE_CHECKING:
    from metarec_gym.evaluation.headroom import Headroom
    from metarec_gym.evaluation.hull import Frontier
    from metarec_gym.evaluation.learning_curves import LearningCurve
    from metarec_gym.evaluation.pairs import Pair
    from metarec_gym.evaluation.verdict import Verdict
    from metarec_gym.world import World


@dataclass(frozen=True)
class ReportData:
    """What the report shows.

    Attributes:
        world: The world.
        headroom: What could be won.
        rows: The leaderboard.
        verdict: The answer.
        checks: Name of each self-check and what came out.
        provenance: Name and value: command lines, seeds, versions, hashes.
        validity: What `experiments.validity` found for this world; None when it was not asked.
        explanation: What `experiments.explain` found for one of the trained policies; None when it was not asked.
        explain_hint: The command that explains one; empty where nothing was trained.
        pairs: Trained policies against the ones that a claim names.
        frontiers: Quality against cost, seen from one policy in use each; they share their hull.
        learning: Learning curves.
    """

    world: World
    headroom: Headroom
    rows: Sequence[PolicyRow]
    verdict: Verdict
    checks: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    validity: Mapping[str, Any] | None = None
    explanation: Mapping[str, Any] | None = None
    explain_hint: str = ""
    pairs: Sequence[Pair] = ()
    frontiers: Sequence[Frontier] = ()
    learning: Sequence[LearningCurve] = ()


def render(data: ReportData) -> str:
    """The page.

    Args:
        data: What it shows.

    Returns:
        One self-contained HTML document.
    """
    from metarec_gym.evaluation.validity.page import validity_section

    headline = data.headroom.headline
    rows = ordered(data.rows, headline)
    by_name = {row.name: row for row in rows}
    blocks = [
        _verdict(data),
        section("Is there anything to win?", _headroom(data)),
        section("Every policy", _table(rows, data.headroom)),
        section("Lift over the single best strategy", _forest(rows, headline)),
        pairs_section(data.pairs),
        hull_section(data.frontiers),
        section("Utility over the episode", _curves(rows)),
        section("Who gets which strategy", _segments(data, by_name)),
        usage_section(rows, data.headroom.strategies),
        learning_section(data.learning),
        explanation_section(data.explanation, data.explain_hint),
        section("Shorter horizons and the end of the episode", _windows(data, rows)),
        validity_section(data.validity),
        section("The world and its judges", world_card(data.world)),
        section("The log", data_card(data.world)),
        section("How this was measured", _method(data)),
    ]
    title = f"metarec_gym: {data.world.name}"
    return document(title, blocks)


# ---- sections


def _verdict(data: ReportData) -> str:
    world, headroom = data.world, data.headroom
    warnings = "".join(f"<p class=caution>{escape(c)}</p>" for c in cautions(world))
    kind = {"selection pays": "good", "just use": "calm"}.get(data.verdict.kind, "open")
    sound = "" if headroom.sound else " This horizon is not sound: see the notes below."
    return (
        f"<header><p class='over'>Which recommender should serve whom? &middot; {escape(world.name)}</p>"
        f"<h1 class='{kind}'>{escape(data.verdict.headline[0].upper() + data.verdict.headline[1:])}</h1>"
        f"<p class='lead'>{escape(data.verdict.reason)}</p>{warnings}"
        f"<p class='over'>{world.n_users:,} users, {world.n_items:,} items, {world.n_strategies} strategies; "
        f"{len(headroom.pooled(headroom.sbs_value())):,} test users, {headroom.horizon} requests each, "
        f"world {escape(world.hash)}.{sound}</p></header>"
    )


def _headroom(data: ReportData) -> str:
    headroom = data.headroom
    names = {
        "per-user oracle": "knows which single strategy suits each user best (chosen and scored on different luck)",
        "greedy oracle": "knows at every request which strategy is worth most right now; not an upper bound",
        "best non-personal rule": f"needs no learning: {headroom.sched_name}",
    }
    headrooms = headroom.headrooms()
    scale = (min(-0.02, *(i.low for i in headrooms.values())), max(0.05, *(i.high for i in headrooms.values())))
    lines = [
        [f"<b>{escape(name)}</b>", escape(names[name]), escape(interval.as_percent()), bar(interval, scale)]
        for name, interval in headrooms.items()
    ]
    plug_in = headroom.plug_in()
    references = "".join(f"<p>{escape(line[0].upper() + line[1:])}.</p>" for line in headroom.reference_lines())
    notes = "".join(f"<p class='note'>{escape(n)}</p>" for n in headroom.notes)
    return (
        f"<p>Lift over the single best strategy, <b>{escape(headroom.sbs_name)}</b>, at T = {headroom.horizon} requests; "
        "95 % intervals over users.</p>"
        + rows_table(("reference", "what it is", "lift over SBS", ""), lines)
        + f"<p>Without cross-fitting the per-user oracle would read {escape(plug_in.as_percent())}: that much of it is luck "
        f"({headroom.optimism:.2%} of the single best strategy with {headroom.replicates} replicates a half).</p>"
        f"{references}{notes}"
    )


def _table(rows: Sequence[PolicyRow], headroom: Headroom) -> str:
    window, early = headroom.headline, early_window(headroom)
    at = " / ".join(headroom.windows[p].name for p in dict.fromkeys((early, window)))
    head = (
        "policy",
        "utility a request [95 %]",
        "IQM of seeds",
        "lift over SBS",
        "lift over SCHED",
        "AGC<sub>user</sub>",
        "AGC<sub>greedy</sub>",
        f"of FIR's lift<br>{escape(at)}",
        "strategies used",
        "cost",
        "seconds",
        "worst-served tenth",
    )
    lines, group = [], ""
    for row in rows:
        kind = "learned" if row.kind in TRAINED else row.kind
        cell = [escape(c) for c in cells(row, window, early)]
        cell[0] = f"<b>{cell[0]}</b>" + (f"<br><small>{escape(row.note)}</small>" if row.note else "")
        for index, interval in ((3, row.lift_sbs[window]), (4, row.lift_sched[window])):
            tone = "up" if interval.low > 0 else "down" if interval.high < 0 else ""
            cell[index] = f"<span class='{tone}'>{cell[index]}</span>"
        if row.lift_sbs_second:
            cell[3] += f"<br><small>second judge {escape(second_cell(row, window))}</small>"
        if kind != group:
            group = kind
            lines.append([f"<i>{escape(kind)}</i>", *[""] * (len(head) - 1)])
        lines.append([*cell, f"{row.worst_decile:.3f}"])
    return (
        f"<p>T = {headroom.horizon}. Utility is the expected reward of a request, zero after the user left. SBS: single best "
        "strategy. SCHED: best non-personal rule. Both are chosen on the training users. AGC: share of an oracle's gap that "
        f"is closed (0 = SBS, 1 = oracle), shown only where that gap is surely above {MIN_HEADROOM:.0%}. Strategies used: "
        "entropy, 0 bits = always the same. Cost: serving cost of a request, dearest strategy = 1. Seconds: "
        "wall time of learning, one seed. IQM: mean over the middle half of the seeds. Of FIR's lift: share of what a learner "
        "that is told every strategy's answer gains over SBS, shown where that is surely above 2 %. Coloured: the interval "
        "excludes 0. Second judge: the same choices scored by a response model of another family."
        "</p>" + rows_table(head, lines, kind="board")
    )


def _forest(rows: Sequence[PolicyRow], window: int) -> str:
    shown = list(reversed(rows))
    with drawing(height=0.26 * len(shown) + 0.9) as (figure, axes):
        axes.axvline(0.0, color=INK, linewidth=0.8)
        # hopeless strategies would squeeze everything else together: they stand at the edge, with an arrow
        edge = -1.6 * max(20.0, *(100 * row.lift_sbs[window].high for row in shown))
        for y, row in enumerate(shown):
            interval = row.lift_sbs[window]
            colour = SERIES[0 if row.kind in TRAINED else 1 if row.kind == "oracle" else 5]
            low, mid, high = (100 * x for x in (interval.low, interval.estimate, interval.high))
            axes.plot([max(low, edge), max(high, edge)], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot([max(mid, edge)], [y], "o" if mid > edge else "<", color=colour, markersize=5)
            if mid <= edge:
                axes.annotate(f"{mid:.0f} %", (edge, y), (8, -3), textcoords="offset points", color=INK, fontsize=8)
        axes.set_yticks(range(len(shown)), [row.name for row in shown])
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.set_xlabel("lift over the single best strategy, % (95 % interval over seeds and users)")
        axes.grid(axis="x", color=FAINT, linewidth=0.5)
    return figure_html(
        figure,
        "Blue: learned; orange: oracles; grey: fixed. Right of the line is better. An arrow: off the scale.",
        "forest",
    )


def _curves(rows: Sequence[PolicyRow]) -> str:
    trained = [row for row in rows if row.kind in TRAINED][:4]
    wanted = [*trained, *(r for r in rows if r.name in ("SBS", "SCHED", "per-user oracle", "greedy oracle", "random"))]
    wanted = wanted[:MAX_CURVES]
    with drawing(height=3.6) as (figure, axes):
        for index, row in enumerate(wanted):
            mean, low, high = row.curve
            x = np.arange(1, len(mean) + 1)
            axes.fill_between(x, low, high, color=SERIES[index], alpha=0.13, linewidth=0)
            axes.plot(x, mean, color=SERIES[index], linewidth=1.7, linestyle=DASHES[index], label=row.name)
        axes.set_xlim(1, max(len(row.curve[0]) for row in wanted))
        axes.set_xlabel("request of the episode")
        axes.set_ylabel("expected reward of a request")
        axes.grid(color=FAINT, linewidth=0.5)
        axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    note = "Bands are 95 % intervals over seeds and users; the policies share users and luck, so differences are surer."
    return figure_html(figure, note, "curves")


def _segments(data: ReportData, by_name: Mapping[str, PolicyRow]) -> str:
    trained = [row for row in by_name.values() if row.kind in TRAINED]
    best = max(trained, key=lambda r: r.value[data.headroom.headline].estimate, default=None)
    wanted = [best, *(by_name.get(name) for name in ("SBS", "SCHED", "per-user oracle", "greedy oracle"))]
    shown = [row for row in wanted if row is not None]
    strategies = data.headroom.strategies
    light, heavy = SEGMENT_EDGES
    ranges = (f"0-{light - 1} items", f"{light}-{heavy - 1} items", f"from {heavy} items")
    lines = []
    for row in shown:
        for index, segment in enumerate(SEGMENTS):
            value = row.segment_value[index]
            if value is None:
                continue
            share = row.segment_share[index]
            heat = [
                f'<span class="heat" style="--s:{100 * x:.0f}%">{100 * x:.0f}</span>' if x >= 0.005 else ""
                for x in share
            ]
            name = f"<b>{escape(row.name)}</b>" if index == 0 else ""
            lines.append([name, f"{segment} <small>{ranges[index]}</small>", escape(value.as_number()), *heat])
    head = ("policy", "history at the start", "utility a request", *(f"<span>{escape(s)}</span>" for s in strategies))
    return (
        "<p>Share of requests, in %, that each strategy served, by how long the user's history was when the episode began. "
        "The first block is the learned policy of highest utility.</p>" + rows_table(head, lines, kind="heatmap")
    )


def _windows(data: ReportData, rows: Sequence[PolicyRow]) -> str:
    windows = data.headroom.windows
    shown = [r for r in rows if r.kind != "fixed" or r.name in ("SBS", "SCHED", "random")]
    head = ["policy", *(f"utility {escape(w.name)}" for w in windows), *(f"lift {escape(w.name)}" for w in windows)]
    lines = [
        [
            f"<b>{escape(row.name)}</b>",
            *(escape(i.as_number()) for i in row.value),
            *(escape(i.as_percent()) for i in row.lift_sbs),
        ]
        for row in shown
    ]
    return (
        "<p>@T: mean of the first T requests. The lift is over the strategy that is best on the training users at that T.</p>"
        + rows_table(head, lines)
    )


def _method(data: ReportData) -> str:
    checks = (
        rows_table(("check", "result"), [[escape(k), escape(v)] for k, v in data.checks.items()]) if data.checks else ""
    )
    sources = [[escape(k), f"<code>{escape(v)}</code>"] for k, v in data.provenance.items()]
    return (
        "<p>Policies learn on the users of one fold with its judge and are scored on the users of the other fold with the "
        "other judge; then the other way round; results are pooled by user. All policies meet the same users with the same "
        "luck. Intervals are 95 % and carry the variance of users and of training seeds; they do not carry the uncertainty of "
        "the judges themselves, of which there are two. The verdict uses bounds corrected for the number of learned policies."
        "</p>" + checks + "<h3>Where it comes from</h3>" + rows_table(("", ""), sources, kind="sources")
    )
