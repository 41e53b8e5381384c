"""The feedback loop as Markdown and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metarec_gym.evaluation.feedback import percent
from metarec_gym.evaluation.report.figures import FAINT, INK, SERIES, drawing, figure_html
from metarec_gym.evaluation.report.parts import document, escape, fact_list, rows_table, section

HEAD = (
    "arm",
    "round",
    "lift over the round's single best strategy [95 %]",
    "what its own world believed",
    "lift over the strategy that is truly best",
    "policy against never refitting",
    "single best strategy against never refitting",
    "as served, exploration included, against never refitting",
    "items shown",
    "impressions on the tenth shown most",
    "strategies used",
)
WEIGHTS = (
    "The logs carry the propensity of every choice. The arm `reweighted` uses it: the fits take no weights, so a request is kept "
    "with probability proportional to 1 / propensity (rejection sampling), which leaves the log of a uniform choice of the "
    "strategies, at the price of as many requests as were not explored."
)


def setting(result: Mapping[str, Any]) -> str:
    """How the loop runs, in a few sentences."""
    args = result["args"]
    return (
        f"In every round strategies ({', '.join(args['pool'])}) and judges are fitted to the last round's log alone (an item "
        "that was never shown is forgotten), a policy is "
        f"trained on {args['steps']:,} requests, and its most probable strategy serves {args['copies']} new cohorts of "
        f"{result['users']:,} users, {args['horizon']} requests each in sessions of {args['session_requests']}. The truth "
        "answers in every round and judges it: the same users with the same luck, so rounds and arms are paired. Intervals are "
        "95 % over users; they leave out that another seed would train another policy and that the truth is one."
    )


def seconds(result: Mapping[str, Any]) -> str:
    """What a round costs, in a sentence."""
    every = [c["cpu_seconds"] for curve in result["curves"].values() for c in curve]
    parts = {name: sum(c[name] for c in every) / len(every) for name in ("build", "train", "judge")}
    listed = ", ".join(f"{name} {value:.0f} s" for name, value in parts.items())
    return f"A round takes {sum(parts.values()):.0f} s of one core: {listed}."


def feedback_markdown(result: Mapping[str, Any], provenance: Mapping[str, str]) -> str:
    """A page that a repository can keep."""
    lines = [
        f"# Feedback loop on {result['name']}",
        "",
        f"**{result['answer']}**",
        "",
        setting(result),
        "",
        WEIGHTS,
        "",
    ]
    lines += [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD), *(f"| {' | '.join(r)} |" for r in _rows(result))]
    lines += ["", seconds(result), "", *(f"{key}: `{value}`  " for key, value in provenance.items())]
    return "\n".join(lines) + "\n"


def feedback_page(result: Mapping[str, Any], provenance: Mapping[str, str]) -> str:
    """One self-contained HTML document."""
    header = (
        f"<header><p class='over'>Does selection still pay on its own data? &middot; {escape(result['name'])}</p>"
        f"<p class='lead'><b>{escape(result['answer'])}</b></p></header>"
    )
    body = f"<p>{escape(setting(result))}</p><p class='note'>{escape(WEIGHTS)} {escape(seconds(result))}</p>"
    table = rows_table([escape(h) for h in HEAD], [[escape(c) for c in row] for row in _rows(result)])
    return document(
        f"metarec_gym: feedback loop on {result['name']}",
        [
            header,
            section("What selection was worth, and what its own world believed", _lifts(result)),
            section("Against never refitting", _levels(result)),
            section("Every round", table),
            section("How this was measured", body + fact_list(provenance)),
        ],
    )


def _rows(result: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            arm,
            str(c["round"]),
            f"{percent(c['lift'])} ({c['sbs']})",
            percent(c["believed_lift"]),
            f"{percent(c['lift_true_best'])} ({c['true_best']})",
            percent(c["against_static"]),
            percent(c["sbs_against_static"]),
            percent(c["deployed_against_static"]),
            f"{c['items_shown']:,} of {c['items']:,}",
            f"{c['top_tenth']:.0%}",
            f"{c['entropy_bits']:.2f} bits",
        ]
        for arm, curve in result["curves"].items()
        for c in curve
    ]


def _lifts(result: Mapping[str, Any]) -> str:
    series = [(arm, curve, "lift", "-") for arm, curve in result["curves"].items()]
    series += [(f"{arm}, believed", curve, "believed_lift", ":") for arm, curve in result["curves"].items()]
    return _figure(
        series, "lift over the round's single best strategy, %", "lifts", "Dotted: what the round's own world believed."
    )


def _levels(result: Mapping[str, Any]) -> str:
    series = [(arm, curve, "against_static", "-") for arm, curve in result["curves"].items()]
    series += [(f"{arm}, single best", curve, "sbs_against_static", ":") for arm, curve in result["curves"].items()]
    return _figure(
        series, "against the first round's policy, %", "levels", "0 = strategies and policy of round 1, kept for ever."
    )


def _figure(
    series: Sequence[tuple[str, Sequence[Mapping[str, Any]], str, str]], label: str, name: str, caption: str
) -> str:
    arms = list(dict.fromkeys(title.split(",")[0] for title, *_ in series))
    with drawing(height=3.4) as (figure, axes):
        axes.axhline(0.0, color=INK, linewidth=0.8)
        for title, curve, key, style in series:
            colour = SERIES[arms.index(title.split(",")[0])]
            x = [c["round"] for c in curve]
            low, mid, high = ([100 * c[key][part] for c in curve] for part in ("low", "estimate", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            axes.plot(x, mid, color=colour, linewidth=1.7, linestyle=style, marker="o", markersize=3, label=title)
        axes.set_xticks([c["round"] for c in series[0][1]])
        axes.set_xlabel("round")
        axes.set_ylabel(label)
        axes.grid(color=FAINT, linewidth=0.5)
        axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure_html(figure, f"{caption} Bands are 95 % intervals over users.", name)
