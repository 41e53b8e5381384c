"""A feedback loop in numbers: what each round's selection was worth, what its own world believed, and what was shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metarec_gym.evaluation.intervals import Interval
from metarec_gym.evaluation.metrics import MIN_HEADROOM, lift, usage_entropy

PAID, DID_NOT, OPEN = "still paid", "did not pay", "cannot be told to have paid"


def summary(rounds: Sequence[Mapping[str, Any]], args: Mapping[str, Any]) -> dict[str, Any]:
    """Curves and the answer.

    Values of the truth are paired: all rounds and arms are judged by the same users with the same luck.

    Args:
        rounds: One row a round and arm, in order: `arm`, `round`, `sbs`, `items`, `strategies`, `served`, `items_shown`,
            `top_tenth`, `cpu_seconds`; `true`, `believed` and `deployed`: values of users.
        args: `exploration` and `rounds`.

    Returns:
        `curves` by arm, one entry a round; `static`, the first round kept for ever; and `answer` in words.
    """
    static = np.asarray(rounds[0]["true"]["policy"])
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rounds:
        true, believed = row["true"], row["believed"]
        fixed = {name: float(np.mean(true[name])) for name in row["strategies"]}
        best = max(fixed, key=lambda name: fixed[name])
        curves.setdefault(row["arm"], []).append(
            {
                "round": row["round"],
                "sbs": row["sbs"],
                "true_best": best,
                "lift_true_best": lift(true["policy"], true[best]).to_json(),
                "value": float(np.mean(true["policy"])),
                "lift": lift(true["policy"], true[row["sbs"]]).to_json(),
                "sampled_lift": lift(true["sampled"], true[row["sbs"]]).to_json(),
                "believed_lift": lift(believed["policy"], believed["sbs"]).to_json(),
                "against_static": lift(true["policy"], static).to_json(),
                "sbs_against_static": lift(true[row["sbs"]], static).to_json(),
                "deployed_against_static": lift(row["deployed"], static).to_json(),
                "items": row["items"],
                "items_shown": row["items_shown"],
                "top_tenth": row["top_tenth"],
                "entropy_bits": usage_entropy(row["served"]),
                "cpu_seconds": row["cpu_seconds"],
            }
        )
    first = rounds[0]
    kept = lift(static, first["true"][first["sbs"]])
    return {
        "users": len(static),
        "static": {"value": float(static.mean()), "lift": kept.to_json(), "sbs": first["sbs"]},
        "curves": curves,
        "answer": _answer(curves, kept, args),
    }


def paid(interval: Mapping[str, float]) -> str:
    """Whether a lift over the single best strategy is worth selecting for."""
    if interval["low"] > MIN_HEADROOM:
        return PAID
    return DID_NOT if interval["high"] < MIN_HEADROOM else OPEN


def percent(interval: Mapping[str, float]) -> str:
    """For example `+1.6 % [+0.6, +2.8]`."""
    return f"{100 * interval['estimate']:+.1f} % [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"


def _answer(curves: Mapping[str, Sequence[Mapping[str, Any]]], kept: Interval, args: Mapping[str, Any]) -> str:
    share = f"with {args['exploration']:.0%} exploration"
    names = {"naive": "without exploration", "explore": share, "reweighted": f"{share} and logged propensities"}
    parts = []
    for arm, curve in curves.items():
        last = curve[-1]
        parts.append(
            f"{names.get(arm, arm)} selection {paid(last['lift'])} in round {last['round']}: {percent(last['lift'])} over "
            f"its own single best strategy (its own world believed {percent(last['believed_lift'])}), and "
            f"{percent(last['against_static'])} compared with never refitting; {last['items_shown']:,} items were shown, "
            f"{curve[0]['items_shown']:,} in round 1"
        )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}. In round 1 selection gained {kept.as_percent()}."
