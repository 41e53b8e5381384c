"""The validity report as HTML: a page of its own, and a section of the comparison's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from metarec_gym.evaluation.intervals import Interval
from metarec_gym.evaluation.report.figures import FAINT as _FAINT
from metarec_gym.evaluation.report.figures import INK as _INK
from metarec_gym.evaluation.report.figures import MAX_CURVES, style_axes
from metarec_gym.evaluation.report.figures import SERIES as _SERIES
from metarec_gym.evaluation.report.figures import drawing as _drawing
from metarec_gym.evaluation.report.figures import figure_html as _figure
from metarec_gym.evaluation.report.parts import bar as _bar
from metarec_gym.evaluation.report.parts import document
from metarec_gym.evaluation.report.parts import escape as _e
from metarec_gym.evaluation.report.parts import fact_list as _facts
from metarec_gym.evaluation.report.parts import rows_table as _rows_table
from metarec_gym.evaluation.report.parts import section as _section
from metarec_gym.evaluation.validity.findings import FAIL, HALVES, MOVES, OPEN, PASS, SLOPE, STAYS, excess

_TONE = {PASS: "up", FAIL: "down", OPEN: "caution"}
_MARK = {PASS: "&#10003; pass", FAIL: "&#10007; fail", OPEN: "? cannot tell"}
_MODELS = {
    "judge": "judge",
    "second": "second family",
    "mf": "matrix factorisation",
    "popularity": "popularity",
    "base_rate": "base rate",
}


def page(validity: Mapping[str, Any], provenance: Mapping[str, str]) -> str:
    """One self-contained HTML document: no script, no network, light and dark.

    Args:
        validity: What was measured, with findings and verdict.
        provenance: Name and value: command, hashes.

    Returns:
        The page.
    """
    title = f"metarec_gym: how far may {validity['name']} be believed?"
    facts = {
        "world": f"{validity['name']}, hash {validity['world']}",
        "log hash": validity.get("log_hash") or "unknown",
        "users by fold": ", ".join(f"{k} {v}" for k, v in validity.get("users_by_fold", {}).items()) or "unknown",
        "seed": validity.get("seed", 0),
        "extent": "quick: few users and replicas" if validity.get("quick") else "full",
        **provenance,
    }
    blocks = [_header(validity), *_sections(validity), _section("Where it comes from", _facts(facts))]
    return document(title, blocks)


def validity_section(validity: Mapping[str, Any] | None) -> str:
    """The section of the comparison's report; says what to run where nothing was measured."""
    if not validity:
        return _section(
            "How far may this world be believed?",
            "<p>Not measured. Run <code>python -m experiments.validity --world DIR</code> and compare again.</p>",
        )
    verdict = validity["verdict"]
    body = f"<p class='lead'><b>{_e(verdict['headline'])}.</b> {_counts(verdict)}</p>" + _sentences(verdict)
    details = "".join(_sections(validity)[1:])
    return _section(
        "How far may this world be believed?",
        body + _findings(validity) + f"<details><summary>All measurements</summary>{details}</details>",
    )


def _header(validity: Mapping[str, Any]) -> str:
    verdict = validity["verdict"]
    kind = {"good": "good", "bad": "bad"}.get(verdict["kind"], "open")
    style = " style='color:var(--bad)'" if kind == "bad" else ""
    return (
        f"<header><p class='over'>How far may this world be believed? &middot; {_e(validity['name'])}</p>"
        f"<h1 class='{kind}'{style}>{_e(verdict['headline'])}</h1>{_sentences(verdict)}"
        f"<p class='over'>{_counts(verdict)} Measured on users that the judges have not seen.</p></header>"
    )


def _sentences(verdict: Mapping[str, Any]) -> str:
    return "<ul class='lead'>" + "".join(f"<li>{_e(s)}</li>" for s in verdict["sentences"]) + "</ul>"


def _counts(verdict: Mapping[str, Any]) -> str:
    counts = verdict["counts"]
    return f"{counts[PASS]} checks passed, {counts[FAIL]} failed, {counts[OPEN]} cannot tell."


def _sections(validity: Mapping[str, Any]) -> list[str]:
    blocks = [
        ("Every check", _findings(validity)),
        ("Does the judge predict users it has not seen?", _losses(validity)),
        ("Do the probabilities mean what they say?", _calibration(validity)),
        ("Do outcomes happen as often as in the log?", _rates(validity)),
        ("Sessions and returns", _time(validity)),
        ("Do users differ as in the log?", _predictive(validity.get("posterior_predictive"))),
        ("Are the strategies ordered as in the log?", _concordance(validity.get("concordance"))),
        ("Do simulated sessions look like real ones?", _classifier(validity.get("classifier_auc"))),
        ("Do other judges say the same?", _judges(validity.get("judges_agree"))),
        ("What moves the answer?", _sensitivity(validity.get("sensitivity"))),
        ("Is anything long-term?", _long_term(validity.get("long_term"))),
    ]
    return [_section(title, body) for title, body in blocks]


def _findings(validity: Mapping[str, Any]) -> str:
    lines, topic = [], ""
    for f in validity["findings"]:
        about = f"{f['topic']}: {f['outcome']}" if f["outcome"] else f["topic"]
        first = f"<b>{_e(about)}</b>" if about != topic else ""
        topic = about
        mark = f"<span class='{_TONE[f['result']]}' style='white-space:nowrap'>{_MARK[f['result']]}</span>"
        lines.append([first, _e(f["question"]), mark, _e(f["text"])])
    return _rows_table(("", "question", "", "answer"), lines)


def _noted(part: Any) -> str | None:
    if not part:
        return "<p>Not measured.</p>"
    if isinstance(part, Mapping) and part.get("note"):
        return f"<p>{_e(part['note'])}</p>"
    return None


def _losses(validity: Mapping[str, Any]) -> str:
    models = [m for m in (*_MODELS, *validity.get("log_loss", {})) if m in validity.get("log_loss", {})]
    models = list(dict.fromkeys(models))
    if not models:
        return "<p>Not measured.</p>"
    lines = []
    for name, entry in validity["outcomes"].items():
        for when, losses in (("all", entry.get("log_loss")), ("last fifth of the calendar", entry.get("later", {}))):
            found = losses.get("log_loss", losses) if losses else None
            if not found or "judge" not in found:
                note = losses.get("note") if losses else None
                lines += [[_e(name), _e(when), f"<i>{_e(note)}</i>", *[""] * (len(models) - 1)]] if note else []
                continue
            best = min(found.values())
            cells = [
                (f"<b>{found[m]:.4f}</b>" if found[m] == best else f"{found[m]:.4f}") if m in found else ""
                for m in models
            ]
            lines.append([_e(name) if when == "all" else "", _e(when), *cells])
    head = ("outcome", "when", *(_e(_MODELS.get(m, m.replace("_", " "))) for m in models))
    return (
        "<p>Log-loss in nats, smaller is better, bold is best. Judges were fitted on the other fold's users, over the whole "
        "calendar: later time says how they fare there, not how they would have forecast it.</p>"
        + _rows_table(head, lines)
    )


def _calibration(validity: Mapping[str, Any]) -> str:
    curves = [
        (name, entry["reliability"], entry)
        for name, entry in validity["outcomes"].items()
        if isinstance(entry.get("reliability"), Mapping)
    ]
    if not curves:
        return "<p>Not measured.</p>"
    lines = []
    for name, _, entry in curves:
        share = entry.get("ece_share_of_rate")
        slope = entry.get("calibration_slope")
        lines.append(
            [
                _e(name),
                f"{entry['ece']:.4f}",
                _range(share, entry.get("ece_share_low"), entry.get("ece_share_high"), percent=True),
                _range(slope, entry.get("calibration_slope_low"), entry.get("calibration_slope_high")),
            ]
        )
    table = _rows_table(
        (
            "outcome",
            "calibration error",
            "as a share of the rate [95 %]",
            f"slope [95 %], {SLOPE[0]} to {SLOPE[1]} is right",
        ),
        lines,
    )
    shown = curves[:MAX_CURVES]
    with _drawing(height=3.4) as (figure, _axes):
        figure.clear()
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for index, (axes, (name, curve, _)) in enumerate(zip(panels, shown, strict=True)):
            style_axes(axes)
            top = 1.05 * max(*curve["predicted"], *curve["observed"])
            axes.plot([0, top], [0, top], color=_FAINT, linewidth=1.2)
            if "low" in curve:
                for x, low, high in zip(curve["predicted"], curve["low"], curve["high"], strict=True):
                    axes.plot([x, x], [low, min(high, top)], color=_SERIES[index], linewidth=1.2)
            axes.plot(curve["predicted"], curve["observed"], "o-", color=_SERIES[index], linewidth=1.3, markersize=4)
            axes.set_title(name, color=_INK, fontsize=10)
            axes.set_xlabel("predicted probability")
            axes.grid(color=_FAINT, linewidth=0.5)
        panels[0].set_ylabel("share observed")
        figure.subplots_adjust(wspace=0.28)
    note = (
        "Each dot is a fifteenth of the weight of unseen users' rows, bars are 95 % intervals over users; on the diagonal is "
        "right."
    )
    return table + _figure(figure, note, "reliability")


def _range(value: float | None, low: float | None, high: float | None, *, percent: bool = False) -> str:
    if value is None:
        return ""
    scale, digits, unit = (100.0, 1, " %") if percent else (1.0, 3, "")
    text = f"{scale * value:.{digits}f}{unit}"
    return text if low is None or high is None else f"{text} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def _rates(validity: Mapping[str, Any]) -> str:
    lines = []
    for name, entry in validity["outcomes"].items():
        if entry.get("rate_log") is None:
            continue
        kind = "declared, not measured" if entry.get("declared") else ""
        lines.append([_e(name), *_rate_cells(entry), kind])
        for judge, own in entry.get("by_judge", {}).items():
            lines.append([f"<small>judge {judge} on the other fold's users</small>", *_rate_cells(own), ""])
        lines += [[f"<small>{_e(group)}</small>", *_rate_cells(g), ""] for group, g in entry.get("groups", {}).items()]
    if not lines:
        return "<p>Not measured.</p>"
    head = ("outcome", "simulated, unseen users", "simulated, own judge", "log [95 %]", "simulated / log", "")
    return (
        "<p>On the log's own events, coefficients of the users integrated out; outcomes after the first are given the first. "
        "&ldquo;Own judge&rdquo; has seen these users: it is the one that simulates them.</p>"
        + _rows_table(head, lines)
    )


def _rate_cells(entry: Mapping[str, Any]) -> list[str]:
    sim, log = entry.get("rate_sim"), entry["rate_log"]
    own = entry.get("rate_sim_own")
    return [
        "" if sim is None else f"{sim:.4f}",
        "" if own is None or entry.get("declared") else f"{own:.4f}",
        f"{log:.4f}" + (f" [{entry['rate_log_lo']:.4f}, {entry['rate_log_hi']:.4f}]" if "rate_log_lo" in entry else ""),
        "" if sim is None or log == 0 or entry.get("declared") else f"{sim / log:.3f}",
    ]


def _time(validity: Mapping[str, Any]) -> str:
    out = []
    for key, title in (("sessions", "Requests a session"), ("returns", "Time to the next session")):
        part = validity.get(key)
        note = _noted(part)
        out.append(f"<h3>{title}</h3>")
        if note is not None or part is None:
            out.append(note or "")
            continue
        unit = part["unit"]
        lines = [
            [f"{100 * q:.0f} %", _amount(a), _amount(b)]
            for q, a, b in zip(part["quantiles"], part["log_quantiles"], part["model_quantiles"], strict=True)
        ]
        with _drawing(height=3.0) as (figure, axes):
            axes.plot(part["ends"], part["log"], color=_SERIES[5], linewidth=2.2, label="log (Kaplan-Meier)")
            axes.plot(part["ends"], part["model"], color=_SERIES[0], linewidth=1.4, label="model")
            if unit == "hours":
                axes.set_xscale("log")
            axes.set_xlabel(unit)
            axes.set_ylabel("share by then")
            axes.set_ylim(0, 1)
            axes.grid(color=_FAINT, linewidth=0.5)
            axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
        counts = f"{part['n']:,} of {part['n_sessions']:,} sessions of unseen users"
        out.append(f"<p>Distance {part['ks']:.3f} (the worse of both judges); {counts}.</p>")
        out.append(_rows_table(("quantile", f"log, {unit}", f"model, {unit}"), lines))
        out.append(_figure(figure, "Distribution functions; on top of each other is right.", f"time-{key}"))
    return "".join(out)


def _amount(x: float | None) -> str:
    return "not within the log" if x is None else f"{x:.3g}"


def _predictive(part: Mapping[str, Any] | None) -> str:
    note = _noted(part)
    if note is not None or part is None:
        return note or ""
    lines = []
    for halves in (h for h in HALVES if h in part):
        check = part[halves]
        statistics = check.get("statistics", {}) if isinstance(check, Mapping) else {}
        words = "odd and even events" if halves == "interleaved" else "earlier and later events"
        for name in ("interaction_trace", "headroom", "headroom_shrunken", "user_variance"):
            s = statistics.get(name)
            if s is None:
                continue
            inside = s["replicas_low"] <= s["observed"] <= s["replicas_high"]
            tone = f"<span class='{'up' if inside else 'down'}'>{'inside' if inside else 'outside'}</span>"
            emitted = f"{s['replicas_mean']:.4g} [{s['replicas_low']:.4g}, {s['replicas_high']:.4g}]"
            picture = _spark(s)
            lines.append(
                [
                    _e(words),
                    _e(name.replace("_", " ")),
                    f"{s['observed']:.4g}",
                    emitted,
                    f"{excess(s):.2f}",
                    tone,
                    picture,
                ]
            )
    if not lines:
        return f"<p>{_e(next(iter(part.values())).get('note', 'Not measured.'))}</p>"
    first: Mapping[str, Any] = next(iter(part.values()))
    head = ("halves", "statistic", "log", "emitted logs, mean [95 %]", "half widths off", "", "")
    return (
        f"<p>The same estimator on the real log and on {first.get('replicas', '?')} logs that the world emits for "
        f"{first.get('n_users', '?')} users. Interaction trace: how much users differ in which strategy suits them. Line: "
        "central 95 % of emitted logs; dot: the log.</p>" + _rows_table(head, lines)
    )


def _spark(s: Mapping[str, float]) -> str:
    values = (s["replicas_low"], s["replicas_high"], s["observed"])
    spread = max(max(values) - min(values), 1e-12)
    scale = (min(values) - 0.1 * spread, max(values) + 0.1 * spread)
    interval = Interval(s["observed"], s["replicas_low"], s["replicas_high"], 0.0, 1.0, 0.95, 1, 1)
    # the mean of the emitted logs takes the place of the zero line
    return _bar_at(interval, scale, s["replicas_mean"])


def _bar_at(interval: Interval, scale: tuple[float, float], line: float) -> str:
    low, high = scale
    shifted = Interval(
        interval.estimate - line, interval.low - line, interval.high - line, 0.0, 1.0, 0.95, 1, interval.users
    )
    return _bar(shifted, (low - line, high - line))


def _concordance(part: Mapping[str, Any] | None) -> str:
    note = _noted(part)
    if note is not None or part is None:
        return note or ""
    strategies = sorted(part["strategies"].items(), key=lambda kv: float(kv[1]["log"]))
    with _drawing(height=0.3 * len(strategies) + 1.0) as (figure, axes):
        for y, (_, s) in enumerate(strategies):
            label = {"label": "log, 95 % over users"} if y == 0 else {}
            axes.plot([s["low"], s["high"]], [y, y], color=_SERIES[5], linewidth=3.0, solid_capstyle="butt", **label)
            axes.plot([s["log"]], [y], "o", color=_SERIES[5], markersize=5)
            label = {"label": "the world's logs"} if y == 0 else {}
            axes.plot([s["world"]], [y], "D", color=_SERIES[0], markersize=5, linestyle="none", **label)
        axes.set_yticks(range(len(strategies)), [name for name, _ in strategies])
        axes.set_xlabel("hit rate of the strategy's list")
        axes.grid(axis="x", color=_FAINT, linewidth=0.5)
        axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    share = ""
    if part["share"] is not None:
        share = f": {100 * part['share']:.0f} % [{100 * part['low']:.0f}, {100 * part['high']:.0f}]"
    return (
        f"<p>Share of a user's next events that a strategy's list holds, on {part.get('n_users', '?')} users, by the same "
        f"estimator on the log and on what the world emits. The log separates {part['separated']} of {part['pairs']} pairs; "
        f"the world orders {part['agreeing']} of them alike{share}.</p>"
        + _figure(figure, "What counts is the order: the diamonds should move right as the dots do.", "concordance")
    )


def _classifier(part: Mapping[str, Any] | None) -> str:
    note = _noted(part)
    if note is not None or part is None:
        return note or ""
    classifiers = ", ".join(
        f"{name} {c['auc']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for name, c in part["classifiers"].items()
    )
    features = sorted(part["features"].items(), key=lambda kv: -abs(kv[1]["auc"] - 0.5))[:10]
    lines = [
        [_e(name.replace("_", " ")), f"{f['log']:.3f}", f"{f['world']:.3f}", f"{max(f['auc'], 1 - f['auc']):.3f}"]
        for name, f in features
    ]
    return (
        f"<p>Windows of events of {part['n_users']} unseen users against windows that the world makes from the same point, "
        f"cross-validated by user. AUC: {_e(classifiers)}; 0.5 = they cannot be told apart.</p>"
        + _rows_table(("feature alone (the ten that tell most)", "mean in the log", "mean in the world", "AUC"), lines)
    )


def _judges(part: Mapping[str, Any] | None) -> str:
    note = _noted(part)
    if note is not None or part is None:
        return note or ""
    lines = []
    for key, words in (("train_test", "judge A against judge B"), ("second", "main against second family")):
        entry = part[key]
        if entry.get("note"):
            lines.append([_e(words), f"<i>{_e(entry['note'])}</i>", "", "", ""])
            continue
        lines.append(
            [
                _e(words),
                f"{entry['rank_correlation']:.2f}",
                _e(f"{entry['best']} / {entry['best_other']}"),
                _range(entry["lost_by_swapping_best"], entry["lost_low"], entry["lost_high"], percent=True),
                _e(f"{entry['verdict']} / {entry['verdict_other']}"),
            ]
        )
    head = ("judges", "rank correlation", "best strategy", "lost by swapping them", "verdict before training")
    names, values = part["strategies"], part["values"]
    shown = [(k, v) for k, v in (("A", "judge A"), ("B", "judge B"), ("second", "second family")) if k in values]
    order = sorted(range(len(names)), key=lambda i: values["main"][i])
    with _drawing(height=0.3 * len(names) + 1.0) as (figure, axes):
        for index, (key, words) in enumerate(shown):
            axes.plot(
                [values[key][i] for i in order],
                range(len(order)),
                "oDs"[index],
                color=_SERIES[index],
                markersize=5,
                label=words,
            )
        axes.set_yticks(range(len(order)), [names[i] for i in order])
        axes.set_xlabel("expected reward a request")
        axes.grid(axis="x", color=_FAINT, linewidth=0.5)
        axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    caption = "Value of each fixed strategy by judge; A and B have different users."
    return _rows_table(head, lines) + _figure(figure, caption, "judges")


def _interval(entry: Mapping[str, float]) -> Interval:
    return Interval(
        entry["estimate"], entry["low"], entry["high"], entry.get("se", math.nan), entry.get("df", 1.0), 0.95, 1, 1
    )


def _sensitivity(rows: Sequence[Mapping[str, Any]] | None) -> str:
    if not rows:
        return "<p>Not measured.</p>"
    names = list(rows[0]["headrooms"])
    every = [_interval(row["headrooms"][n]) for row in rows if "note" not in row for n in names]
    scale = (min(-0.02, *(i.low for i in every)), max(0.05, *(i.high for i in every)))
    lines = []
    for row in rows:
        if "note" in row:
            lines.append([f"<b>{_e(row['label'])}</b>", f"<i>{_e(row['note'])}</i>", *[""] * (len(names) + 2)])
            continue
        tones = {MOVES: "down", STAYS: "up"}
        tone = (
            ""
            if row["name"] == "main"
            else f"<span class='{tones.get(row['answer'], 'caution')}'>{row['answer']}</span>"
        )
        cells = [
            f"{_e(_interval(row['headrooms'][n]).as_percent())}<br>{_bar(_interval(row['headrooms'][n]), scale)}"
            for n in names
        ]
        best = f"{_e(row['best'])}<br><small>{row['sbs_value']:.3f} a request</small>"
        lines.append([f"<b>{_e(row['label'])}</b>", best, *cells, _e(row["verdict"]), tone])
    head = ("variation", "best strategy", *(_e(n) for n in names), "verdict before training", "")
    return (
        "<p>Each line plays the same users with the same luck. Lifts over the single best strategy of that line, 95 % "
        "intervals; few users are played here, so the comparison's intervals are narrower. The answer moves when the verdict "
        "turns round or when the line's best strategy surely loses more than 2 % in the world as built.</p>"
        + _rows_table(head, lines)
    )


def _long_term(part: Mapping[str, Any] | None) -> str:
    note = _noted(part)
    if note is not None or part is None:
        return note or ""
    gain = _interval(part)
    return (
        f"<p>Looking {part.get('ahead', '?')} requests ahead instead of taking what is best right now gains "
        f"{_e(gain.as_percent())} ({part.get('users', '?')} users). Where that is nothing, a bandit is enough.</p>"
    )
