"""An explanation as Markdown, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metarec_gym.evaluation.explain.distil import KEEP

PLAYED = {
    "policy": "the policy as it is served (sampled)",
    "first choice": "its most probable strategy, always",
    "rules": "the rules below",
    "single best": "the single best strategy for everyone",
}
"""Players of the value table in words."""
GAIN = (
    "Gain: expected reward of the request above what the single best strategy would earn in the same state; mean over users, "
    "95 % interval."
)


def percent(interval: Mapping[str, float] | None) -> str:
    """For example `+1.6 % [+0.6, +2.8]`; a dash for nothing."""
    if interval is None:
        return "-"
    return f"{100 * interval['estimate']:+.1f} % [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"


def share(interval: Mapping[str, float]) -> str:
    """For example `96 % [91, 101]`."""
    return f"{100 * interval['estimate']:.0f} % [{100 * interval['low']:.0f}, {100 * interval['high']:.0f}]"


def number(interval: Mapping[str, float] | None, *, signed: bool = False) -> str:
    """For example `0.412 [0.398, 0.426]`; a dash for nothing."""
    if interval is None:
        return "-"
    form = "+.3f" if signed else ".3f"
    return f"{interval['estimate']:{form}} [{interval['low']:{form}}, {interval['high']:{form}}]"


def setting(result: Mapping[str, Any]) -> str:
    """How everything was measured, in a sentence."""
    return (
        f"The policy learned from the users and the judge of fold {result['trained_on']}. Every number here is measured on "
        f"{result['users']:,} users of fold {result['scored_on']} with that fold's judge, {result['horizon']} requests an "
        f"episode; the single best strategy, {result['sbs']}, was chosen on the training users. All players meet the same luck; "
        "intervals are 95 % over users and leave out the uncertainty of the judge and of training anew."
    )


def fidelity(result: Mapping[str, Any]) -> str:
    """How often the rules choose as the policy does, and what chance is worth, in a few sentences."""
    rules, chance = result["rules"], result["first_choice_against_policy"]
    text = (
        f"In the states that the policy meets, {rules['leaves']} rules choose its most probable strategy in "
        f"{share(rules['agreement'])} of the requests; the policy gives their choice a probability of {share(rules['overlap'])}. "
        f"Compared with the policy as served they earn {percent(result['rules_against_policy'])}."
    )
    if chance["high"] < 0.0:
        text += (
            f" Chance is part of what the policy wins: always serving its most probable strategy earns {percent(chance)} "
            "compared with drawing by its probabilities."
        )
    return text


def weights(result: Mapping[str, Any]) -> str:
    """How the rules came about, in a sentence."""
    tried = result["rules"]["candidates"]
    rounds = max(c["round"] for c in tried)
    sizes = ", ".join(
        f"{c['leaves']}{'*' if c['own_past'] else ''}: {c['value']:.3f}"
        for c in sorted(tried, key=lambda c: c["leaves"])
    )
    return (
        f"Rules: decision trees fitted to what the policy chose in up to {tried[-1]['requests']:,} training "
        f"requests (DAgger, {rounds} rounds; as in VIPER a state weighs what is at stake in it, here: "
        f"{result['rules']['weights']}). The smallest was taken that keeps {KEEP:.0%} of the best tree's lift on the training "
        f"users. Rules and reward a request there (* may ask about the policy's own earlier choices): {sizes}."
    )


def legend(result: Mapping[str, Any]) -> list[str]:
    """What stands behind the taste axes that rules, segments or counterfactuals name."""
    named = str([result["rules"]["rows"], result["segments"], result["counterfactuals"]])
    return [
        line for i, line in enumerate(result["taste_axes"]) if f"axis {i + 1} " in named or f"axis {i + 1}'" in named
    ]


def markdown(result: Mapping[str, Any], provenance: Mapping[str, str]) -> str:
    """A page that a repository can keep."""
    lines = [f"# What the policy of {result['name']} does", "", f"**{result['verdict']}**", "", setting(result), ""]
    lines += _table(
        ("played", "reward a request [95 %]", "lift over the single best [95 %]"),
        [(PLAYED[n], number(p["value"]), percent(p["lift"])) for n, p in result["played"].items()],
    )
    lines += ["", "## Rules", "", fidelity(result), "", "```", result["rules"]["text"], "```", ""]
    lines += _table(
        ("rule", "serves", "requests", "users", "gain [95 %]", "overlap with the policy"),
        [
            (
                " and ".join(row["if"]) or "always",
                row["serves"],
                f"{row['requests']:.0%}",
                f"{row['users']:.0%}",
                number(row["gain"], signed=True),
                "-" if row["overlap"] is None else f"{row['overlap']:.0%}",
            )
            for row in result["rules"]["rows"]
        ],
    )
    lines += ["", GAIN, "", weights(result), "", "## Who gets which strategy", ""]
    lines += _table(
        (
            "segment",
            "users",
            "requests",
            "gain [95 %]",
            "lift over the episode [95 %]",
            "strategies: share of requests, gain",
        ),
        [
            (
                f"{s['group']}: {s['name']}",
                f"{s['users']:.0%}",
                f"{s['requests']:.0%}",
                number(s["gain"], signed=True),
                percent(s["lift"]),
                "; ".join(f"{c['strategy']} {c['share']:.0%}, {number(c['gain'], signed=True)}" for c in s["cells"]),
            )
            for s in result["segments"]
        ],
    )
    lines += ["", "## What it looks at", "", *_attributions(result["attributions"])]
    lines += ["", "## What would have to be different", "", result["counterfactual_caveat"], ""]
    lines += [f"- {c['sentence']}" for c in result["counterfactuals"]]
    axes = legend(result)
    lines += ["", "## Taste axes", "", *(f"- {line}" for line in axes)] if axes else []
    lines += ["", *(f"{key}: `{value}`  " for key, value in provenance.items())]
    return "\n".join(lines) + "\n"


def attribution_sentence(found: Mapping[str, Any]) -> str:
    """What the shares are, in a sentence."""
    return (
        f"Share of each part of the observation in what lifts the chosen strategy above the others (integrated gradients of the "
        f"logits from {found['baseline']}; {found['states']:,} states; they add up to within "
        f"{100 * found['completeness_error']:.1g} %)."
    )


def _attributions(found: Mapping[str, Any]) -> list[str]:
    if "note" in found:
        return [found["note"]]
    groups = list(found["shares"])
    head = ("looks at", *groups)
    body = [
        (block, *(f"{found['shares'][g].get(block, 0.0):.0%}" for g in groups)) for block in found["shares"][groups[0]]
    ]
    shown = [line for line in body if any(cell != "0%" for cell in line[1:])]
    return [attribution_sentence(found), "", *_table(head, shown)]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(line)} |" for line in body)]
