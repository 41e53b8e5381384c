"""One HTML file that can be mailed: verdict first, then the numbers with their intervals, figures, cards and provenance.

No script, no network, no font: figures are inline SVG drawn by matplotlib whose colours are style-sheet variables, so the
page follows the reader's light or dark theme and prints on white.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from metarec_gym.evaluation.leaderboard import TRAINED, PolicyRow, cells, ordered, second_cell
from metarec_gym.evaluation.metrics import MIN_HEADROOM, SEGMENT_EDGES, SEGMENTS

if TYPE_CHECKING:
    from metarec_gym.evaluation.headroom import Headroom
    from metarec_gym.evaluation.intervals import Interval
    from metarec_gym.evaluation.verdict import Verdict
    from metarec_gym.world import World

# colours that occur nowhere else; they become style-sheet variables after drawing
_INK, _FAINT = "#010203", "#010204"
_SERIES = tuple(f"#0a0b{i:02x}" for i in range(8))
_DASHES: tuple[Any, ...] = ("-", "-", "-", "-", "--", "--", ":", ":")
MAX_CURVES = 8


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
    """

    world: World
    headroom: Headroom
    rows: Sequence[PolicyRow]
    verdict: Verdict
    checks: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    validity: Mapping[str, Any] | None = None


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
        _section("Is there anything to win?", _headroom(data)),
        _section("Every policy", _table(rows, headline, data.headroom.horizon)),
        _section("Lift over the single best strategy", _forest(rows, headline)),
        _section("Utility over the episode", _curves(rows)),
        _section("Who gets which strategy", _segments(data, by_name)),
        _section("Shorter horizons and the end of the episode", _windows(data, rows)),
        validity_section(data.validity),
        _section("The world and its judges", _world_card(data.world)),
        _section("The log", _data_card(data.world)),
        _section("How this was measured", _method(data)),
    ]
    title = f"metarec_gym: {data.world.name}"
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{_e(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{_STYLE}</style></head><body><main>\n" + "\n".join(blocks) + "\n</main></body></html>\n"
    )


def _e(text: object) -> str:
    return html.escape(str(text))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2>\n{body}</section>"


def _rows_table(head: Sequence[str], lines: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table; cells are HTML already."""
    top = "".join(f"<th>{h}</th>" for h in head)
    body = "\n".join("<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(pairs: Mapping[str, object]) -> str:
    lines = "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in pairs.items())
    return f"<dl>{lines}</dl>"


def cautions(world: World) -> list[str]:
    """What must be known of the world before its numbers are believed; empty when nothing speaks against it."""
    found = []
    check = world.metrics.get("predictive_check")
    if isinstance(check, dict) and check.get("inside_headline") is False:
        headroom = check.get("statistics", {}).get("headroom", {})
        sizes = ""
        if "observed" in headroom and "replicas_mean" in headroom:
            sizes = (
                f" (per-user headroom in the log {headroom['observed']:+.1%}, in emitted logs "
                f"{headroom['replicas_mean']:+.1%}, same estimator)"
            )
        found.append(
            f"Caution: this world does not pass its posterior predictive check{sizes}. What is said here holds for the "
            "simulated users; how far it carries to the real ones is open."
        )
    for fold, judge in world.metrics.get("judges", {}).items():
        # variants of a judge ("A/uniform") are there for sensitivity: nothing rests on them alone
        main = isinstance(judge, dict) and "/" not in fold
        for outcome, facts in judge.get("outcomes", {}).items() if main else ():
            loss = facts.get("heldout", {}).get("log_loss", {})
            if "judge" in loss and any(loss["judge"] >= v for n, v in loss.items() if n != "judge"):
                found.append(
                    f"Caution: judge {fold} predicts the outcome {outcome!r} no better than a simple rule does."
                )
    return found


# ---- sections


def _verdict(data: ReportData) -> str:
    world, headroom = data.world, data.headroom
    kind = {"selection pays": "good", "just use": "calm"}.get(data.verdict.kind, "open")
    sound = "" if headroom.sound else " This horizon is not sound: see the notes below."
    return (
        f"<header><p class='over'>Which recommender should serve whom? &middot; {_e(world.name)}</p>"
        f"<h1 class='{kind}'>{_e(data.verdict.headline[0].upper() + data.verdict.headline[1:])}</h1>"
        f"<p class='lead'>{_e(data.verdict.reason)}</p>{''.join(f'<p class=caution>{_e(c)}</p>' for c in cautions(world))}"
        f"<p class='over'>{world.n_users:,} users, {world.n_items:,} items, {world.n_strategies} strategies; "
        f"{len(headroom.pooled(headroom.sbs_value())):,} test users, {headroom.horizon} requests each, "
        f"world {_e(world.hash)}.{sound}</p></header>"
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
        [f"<b>{_e(name)}</b>", _e(names[name]), _e(interval.as_percent()), _bar(interval, scale)]
        for name, interval in headrooms.items()
    ]
    plug_in = headroom.plug_in()
    references = "".join(f"<p>{_e(line[0].upper() + line[1:])}.</p>" for line in headroom.reference_lines())
    notes = "".join(f"<p class='note'>{_e(n)}</p>" for n in headroom.notes)
    return (
        f"<p>Lift over the single best strategy, <b>{_e(headroom.sbs_name)}</b>, at T = {headroom.horizon} requests; "
        "95 % intervals over users.</p>"
        + _rows_table(("reference", "what it is", "lift over SBS", ""), lines)
        + f"<p>Without cross-fitting the per-user oracle would read {_e(plug_in.as_percent())}: that much of it is luck "
        f"({headroom.optimism:.2%} of the single best strategy with {headroom.replicates} replicates a half).</p>"
        f"{references}{notes}"
    )


def _bar(interval: Interval, scale: tuple[float, float]) -> str:
    """A small interval on a scale that the lines of one table share."""
    low, high = scale

    def at(x: float) -> float:
        return 4.0 + 92.0 * (x - low) / (high - low)

    a, b, c, zero = at(interval.low), at(interval.high), at(interval.estimate), at(0.0)
    return (
        '<svg class="spark" viewBox="0 0 100 12" width="140" height="17" role="img">'
        f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="12" class="zero"/>'
        f'<line x1="{a:.1f}" x2="{b:.1f}" y1="6" y2="6" class="range"/><circle cx="{c:.1f}" cy="6" r="2.6"/></svg>'
    )


def _table(rows: Sequence[PolicyRow], window: int, horizon: int) -> str:
    head = (
        "policy",
        "utility a request [95 %]",
        "lift over SBS",
        "lift over SCHED",
        "AGC<sub>user</sub>",
        "AGC<sub>greedy</sub>",
        "strategies used",
        "worst-served tenth",
        "cost",
    )
    lines, group = [], ""
    for row in rows:
        kind = "learned" if row.kind in TRAINED else row.kind
        cell = [_e(c) for c in cells(row, window)]
        cell[0] = f"<b>{cell[0]}</b>" + (f"<br><small>{_e(row.note)}</small>" if row.note else "")
        for index, interval in ((2, row.lift_sbs[window]), (3, row.lift_sched[window])):
            tone = "up" if interval.low > 0 else "down" if interval.high < 0 else ""
            cell[index] = f"<span class='{tone}'>{cell[index]}</span>"
        if row.lift_sbs_second:
            cell[2] += f"<br><small>second judge {_e(second_cell(row, window))}</small>"
        if kind != group:
            group = kind
            lines.append([f"<i>{_e(kind)}</i>", *[""] * (len(head) - 1)])
        lines.append([*cell, f"{row.worst_decile:.3f}", f"{row.cost:.2f}"])
    return (
        f"<p>T = {horizon}. Utility is the expected reward of a request, zero after the user left. SBS: single best strategy. "
        "SCHED: best non-personal rule. Both are chosen on the training users. AGC: share of an oracle's gap that is closed "
        f"(0 = SBS, 1 = oracle), shown only where that gap is surely above {MIN_HEADROOM:.0%}. Strategies used: entropy, "
        "0 bits = always the same. Cost: serving cost of a request, dearest strategy = 1. Coloured: the interval excludes 0. "
        "Second judge: the same choices scored by a response model of another family."
        "</p>" + _rows_table(head, lines, kind="board")
    )


def _forest(rows: Sequence[PolicyRow], window: int) -> str:
    shown = list(reversed(rows))
    with _drawing(height=0.26 * len(shown) + 0.9) as (figure, axes):
        axes.axvline(0.0, color=_INK, linewidth=0.8)
        # hopeless strategies would squeeze everything else together: they stand at the edge, with an arrow
        edge = -1.6 * max(20.0, *(100 * row.lift_sbs[window].high for row in shown))
        for y, row in enumerate(shown):
            interval = row.lift_sbs[window]
            colour = _SERIES[0 if row.kind in TRAINED else 1 if row.kind == "oracle" else 5]
            low, mid, high = (100 * x for x in (interval.low, interval.estimate, interval.high))
            axes.plot([max(low, edge), max(high, edge)], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot([max(mid, edge)], [y], "o" if mid > edge else "<", color=colour, markersize=5)
            if mid <= edge:
                axes.annotate(f"{mid:.0f} %", (edge, y), (8, -3), textcoords="offset points", color=_INK, fontsize=8)
        axes.set_yticks(range(len(shown)), [row.name for row in shown])
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.set_xlabel("lift over the single best strategy, % (95 % interval over seeds and users)")
        axes.grid(axis="x", color=_FAINT, linewidth=0.5)
    return _figure(
        figure,
        "Blue: learned; orange: oracles; grey: fixed. Right of the line is better. An arrow: off the scale.",
        "forest",
    )


def _curves(rows: Sequence[PolicyRow]) -> str:
    trained = [row for row in rows if row.kind in TRAINED][:4]
    wanted = [*trained, *(r for r in rows if r.name in ("SBS", "SCHED", "per-user oracle", "greedy oracle", "random"))]
    wanted = wanted[:MAX_CURVES]
    with _drawing(height=3.6) as (figure, axes):
        for index, row in enumerate(wanted):
            mean, low, high = row.curve
            x = np.arange(1, len(mean) + 1)
            axes.fill_between(x, low, high, color=_SERIES[index], alpha=0.13, linewidth=0)
            axes.plot(x, mean, color=_SERIES[index], linewidth=1.7, linestyle=_DASHES[index], label=row.name)
        axes.set_xlim(1, max(len(row.curve[0]) for row in wanted))
        axes.set_xlabel("request of the episode")
        axes.set_ylabel("expected reward of a request")
        axes.grid(color=_FAINT, linewidth=0.5)
        axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    note = "Bands are 95 % intervals over seeds and users; the policies share users and luck, so differences are surer."
    return _figure(figure, note, "curves")


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
            name = f"<b>{_e(row.name)}</b>" if index == 0 else ""
            lines.append([name, f"{segment} <small>{ranges[index]}</small>", _e(value.as_number()), *heat])
    head = ("policy", "history at the start", "utility a request", *(f"<span>{_e(s)}</span>" for s in strategies))
    return (
        "<p>Share of requests, in %, that each strategy served, by how long the user's history was when the episode began. "
        "The first block is the learned policy of highest utility.</p>" + _rows_table(head, lines, kind="heatmap")
    )


def _windows(data: ReportData, rows: Sequence[PolicyRow]) -> str:
    windows = data.headroom.windows
    shown = [r for r in rows if r.kind != "fixed" or r.name in ("SBS", "SCHED", "random")]
    head = ["policy", *(f"utility {_e(w.name)}" for w in windows), *(f"lift {_e(w.name)}" for w in windows)]
    lines = [
        [
            f"<b>{_e(row.name)}</b>",
            *(_e(i.as_number()) for i in row.value),
            *(_e(i.as_percent()) for i in row.lift_sbs),
        ]
        for row in shown
    ]
    return (
        "<p>@T: mean of the first T requests. The lift is over the strategy that is best on the training users at that T.</p>"
        + _rows_table(head, lines)
    )


def _world_card(world: World) -> str:
    metrics = world.metrics
    out = [
        _facts(
            {
                "world": f"{world.name}, hash {world.hash}",
                "judges": ", ".join(f"{fold} {response.hash}" for fold, response in sorted(world.responses.items())),
                "strategies": ", ".join(world.strategies),
                "outcomes": ", ".join(
                    f"{name} (reward {float(weight):g})"
                    for name, weight in zip(world.outcomes, world.tensors["outcome_weights"], strict=True)
                ),
                "longest sound horizon": f"{world.horizon} requests of {world.slate_size} items",
                "users by fold": ", ".join(f"{k} {v}" for k, v in metrics.get("users_by_fold", {}).items())
                or "unknown",
                "seed": world.seed,
            }
        )
    ]
    judges = metrics.get("judges")
    check = metrics.get("predictive_check")
    if judges:
        out.append("<h3>Does each judge predict users it has not seen?</h3>" + _judges(judges))
    if check:
        out.append("<h3>Do emitted logs look like the real one? (posterior predictive check)</h3>" + _predictive(check))
    if not judges and not check:
        out.append("<p>This world was made by construction: no judge was fitted.</p>")
    return "".join(out)


def _details(title: str, value: Any) -> str:
    return f"<details><summary>{_e(title)}</summary>{_nested(value)}</details>"


def _judges(judges: Mapping[str, Any]) -> str:
    """Held-out log-loss against simple predictors, calibration; everything else folded away."""
    lines, curves = [], []
    for fold, judge in judges.items():
        for outcome, facts in (judge.get("outcomes", {}) if isinstance(judge, Mapping) else {}).items():
            heldout = facts.get("heldout", {})
            loss = heldout.get("log_loss")
            if not isinstance(loss, Mapping) or "judge" not in loss:
                continue
            others = {name: value for name, value in loss.items() if name != "judge"}
            beaten = all(loss["judge"] < value for value in others.values())
            numbers = [
                f"{loss['judge']:.4f}",
                *(f"{others.get(n, float('nan')):.4f}" for n in ("popularity", "base_rate")),
            ]
            tone = f"<span class='{'up' if beaten else 'down'}'>{'yes' if beaten else 'no'}</span>"
            rates = f"{heldout.get('rate_predicted', 0):.4f} / {heldout.get('rate_observed', 0):.4f}"
            more = [f"{heldout.get('calibration_slope', float('nan')):.2f}", f"{heldout.get('ece', float('nan')):.4f}"]
            lines.append([_e(fold), _e(outcome), *numbers, tone, *more, rates, f"{heldout.get('n_users', 0):,}"])
            if isinstance(heldout.get("reliability"), Mapping):
                curves.append((f"judge {fold}, {outcome}", heldout["reliability"]))
    if not lines:
        return _nested(judges)
    head: tuple[str, ...] = (
        "judge",
        "outcome",
        "log-loss: judge",
        "popularity",
        "base rate",
        "beats both",
        "calibration slope",
    )
    head += ("calibration error", "rate predicted / observed", "held-out users")
    return _rows_table(head, lines) + _calibration(curves) + _details("everything about the judges", judges)


def _calibration(curves: Sequence[tuple[str, Mapping[str, Sequence[float]]]]) -> str:
    if not curves:
        return ""
    with _drawing(height=3.4) as (figure, axes):
        top = max(max(*c["predicted"], *c["observed"]) for _, c in curves)
        axes.plot([0, top], [0, top], color=_FAINT, linewidth=1.2)
        for index, (name, curve) in enumerate(curves[:MAX_CURVES]):
            style = {"color": _SERIES[index], "linewidth": 1.3, "markersize": 4}
            axes.plot(curve["predicted"], curve["observed"], "o-", label=name, **style)
        axes.set_xlabel("predicted probability, mean of a bin")
        axes.set_ylabel("share observed on held-out users")
        axes.grid(color=_FAINT, linewidth=0.5)
        axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return _figure(figure, "Calibration on users that the judge has not seen; on the diagonal is right.", "calibration")


def _predictive(check: Mapping[str, Any]) -> str:
    intro = (
        "<p>The same estimator of user-by-strategy effects runs on the real log and on logs that the world emits"
        + (f" ({check['replicas']} of them)" if "replicas" in check else "")
        + "; the log should lie in the central 95 % of the emitted ones.</p>"
    )
    statistics = check.get("statistics")
    if not isinstance(statistics, Mapping):
        return intro + _nested(check)
    lines = []
    for name, facts in statistics.items():
        if not isinstance(facts, Mapping) or "observed" not in facts:
            continue
        low, high = facts.get("replicas_low", float("nan")), facts.get("replicas_high", float("nan"))
        inside = bool(facts.get("inside"))
        emitted = f"{facts.get('replicas_mean', float('nan')):.4g} [{low:.4g}, {high:.4g}]"
        tone = f"<span class='{'up' if inside else 'down'}'>{'inside' if inside else 'outside'}</span>"
        lines.append([_e(name.replace("_", " ").replace("/", ": ")), f"{facts['observed']:.4g}", emitted, tone])
    return intro + _rows_table(("statistic", "log", "emitted logs, mean [95 %]", ""), lines)


def _data_card(world: World) -> str:
    card = {k: v for k, v in world.card.items() if not isinstance(v, (dict, list))}
    nested = {k: v for k, v in world.card.items() if isinstance(v, (dict, list)) and v}
    cleaning = world.info.get("cleaning") or []
    out = _facts({str(k).replace("_", " "): v for k, v in card.items()})
    if nested:
        out += _nested(nested)
    if cleaning:
        lines = [
            [
                _e(step.get("rule", "")),
                f"{step.get('rows_before', 0):,}",
                f"{step.get('rows_after', 0):,}",
                _e(step.get("note", "")),
            ]
            for step in cleaning
        ]
        out += "<h3>Cleaning</h3>" + _rows_table(("rule", "rows before", "rows after", ""), lines)
    return out


def _method(data: ReportData) -> str:
    checks = _rows_table(("check", "result"), [[_e(k), _e(v)] for k, v in data.checks.items()]) if data.checks else ""
    sources = [[_e(k), f"<code>{_e(v)}</code>"] for k, v in data.provenance.items()]
    return (
        "<p>Policies learn on the users of one fold with its judge and are scored on the users of the other fold with the "
        "other judge; then the other way round; results are pooled by user. All policies meet the same users with the same "
        "luck. Intervals are 95 % and carry the variance of users and of training seeds; they do not carry the uncertainty of "
        "the judges themselves, of which there are two. The verdict uses bounds corrected for the number of learned policies."
        "</p>" + checks + "<h3>Where it comes from</h3>" + _rows_table(("", ""), sources, kind="sources")
    )


def _nested(value: Any, depth: int = 0) -> str:
    """Nested facts as a table: one line for each leaf, long lists shortened; columns where siblings share their keys."""
    if isinstance(value, Mapping):
        children = list(value.items())
        dicts = [v for _, v in children if isinstance(v, Mapping)]
        if len(dicts) == len(children) > 1 and all(set(d) == set(dicts[0]) for d in dicts):
            leaves = [dict(_leaves(d)) for d in dicts]
            if all(set(x) == set(leaves[0]) for x in leaves):
                lines = [[_e(path), *(_e(x[path]) for x in leaves)] for path in leaves[0]]
                return _rows_table(("", *(_e(name) for name, _ in children)), lines)
        return _rows_table(("", ""), [[_e(path), _e(leaf)] for path, leaf in _leaves(value)])
    return f"<p>{_e(value)}</p>"


def _leaves(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [
            leaf
            for key, child in value.items()
            for leaf in _leaves(child, f"{path}, {key}".lstrip(", ").replace("_", " "))
        ]
    if isinstance(value, float):
        return [(path, f"{value:.4g}")]
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
        return [(path, f"{len(value)} x {len(value[0])} numbers")]
    if isinstance(value, (list, tuple)):
        shown = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value[:12])
        return [(path, shown + (f" ... ({len(value)})" if len(value) > 12 else ""))]
    return [(path, str(value))]


# ---- figures


class _drawing:
    """A matplotlib figure without global state, drawn with placeholder colours."""

    def __init__(self, *, height: float) -> None:
        self.height = height

    def __enter__(self) -> tuple[Any, Any]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.6, self.height))
        axes = figure.add_subplot()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(_INK)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        axes.set_axisbelow(True)
        axes.patch.set_alpha(0.0)
        figure.patch.set_alpha(0.0)
        return figure, axes

    def __exit__(self, *error: object) -> None:
        return None


def _figure(figure: Any, caption: str, name: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # fixed size -> as wide as the page; ids are made unique so that two figures never share a clip path
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'id="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*'[^;\"]*sans-serif", r"font: \1sans-serif", svg)
    for colour, variable in ((_INK, "--ink"), (_FAINT, "--faint"), *((c, f"--c{i}") for i, c in enumerate(_SERIES))):
        svg = svg.replace(colour, f"var({variable})")
    return f"<figure>{svg}<figcaption>{_e(caption)}</figcaption></figure>"


_LIGHT = (
    "--page:#fbfbf9;--card:#fff;--ink:#1d2129;--soft:#5b6270;--faint:#e3e5e8;--good:#11734b;--calm:#2557a7;"
    "--open:#8a5a00;--bad:#a3312b;--heat:37 87 167;"
    "--c0:#2563b8;--c1:#c2410c;--c2:#0f766e;--c3:#be185d;--c4:#7c3aed;--c5:#6b7280;--c6:#a16207;--c7:#4d7c0f;"
)
_DARK = (
    "--page:#14171c;--card:#1b1f26;--ink:#e8eaee;--soft:#a3abb8;--faint:#343a45;--good:#4cc38a;--calm:#7fb0ff;"
    "--open:#f0b849;--bad:#ff8f85;--heat:127 176 255;"
    "--c0:#6ea8ff;--c1:#ff8a5c;--c2:#4fd1c5;--c3:#f687b3;--c4:#b794f6;--c5:#9aa3b2;--c6:#ecc94b;--c7:#a3d65c;"
)
_STYLE = (
    f":root{{{_LIGHT}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    "*{box-sizing:border-box}"
    "body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif}"
    "main{max-width:1340px;margin:0 auto;padding:28px 20px 60px}"
    "header,section{background:var(--card);border:1px solid var(--faint);border-radius:10px;padding:18px 22px;margin:0 0 18px}"
    "h1{font-size:27px;line-height:1.25;margin:6px 0 10px}h2{font-size:18px;margin:0 0 8px}h3{font-size:15px;margin:18px 0 6px}"
    "h1.good{color:var(--good)}h1.calm{color:var(--calm)}h1.open{color:var(--open)}"
    ".caution{color:var(--open)}details{margin:8px 0}summary{cursor:pointer;color:var(--soft)}"
    "p{margin:6px 0 10px;max-width:92ch}.lead{font-size:16px}.over,small,figcaption,.note{color:var(--soft)}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;margin:6px 0}"
    "th,td{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid var(--faint);vertical-align:top}"
    "th{color:var(--soft);font-weight:600}.board{font-size:12px}.board td,.board th{padding-right:8px;white-space:nowrap}"
    ".board td:first-child{min-width:170px}"
    ".board small{display:inline-block;white-space:normal;max-width:200px;line-height:1.25}"
    ".up{color:var(--good)}.down{color:var(--bad)}td i{color:var(--soft)}"
    ".heatmap td{padding:0 8px 0 0;white-space:nowrap;vertical-align:middle}"
    ".heatmap th span{display:inline-block;writing-mode:vertical-rl;transform:rotate(180deg);font-weight:500}"
    ".heatmap th{vertical-align:bottom}"
    ".heat{display:block;min-width:34px;text-align:center;padding:3px 4px;"
    "background:rgb(var(--heat)/calc(var(--s)*.75));print-color-adjust:exact;-webkit-print-color-adjust:exact}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:6px 0}dt{color:var(--soft)}"
    "dd{margin:0;overflow-wrap:anywhere}code{font-size:12px;overflow-wrap:anywhere}"
    "figure{margin:6px 0}figure svg{width:100%;height:auto;max-width:960px}"
    ".spark .zero{stroke:var(--soft);stroke-width:.8}.spark .range{stroke:var(--c0);stroke-width:2.4}"
    ".spark circle{fill:var(--c0)}"
    f"@media print{{:root{{{_LIGHT}--page:#fff}}body{{font-size:11px}}main{{max-width:none;padding:0}}"
    "header,section{border:0;padding:0 0 8px;break-inside:avoid-page}.wide{overflow:visible}table{font-size:9px}"
    "section:has(.board),section:has(dl){break-inside:auto}}"
)
