"""What must be known of a world and its log before its numbers are believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metarec_gym.evaluation.report.figures import FAINT, INK, MAX_CURVES, SERIES, drawing, figure_html
from metarec_gym.evaluation.report.parts import escape, fact_list, folded, nested_table, rows_table

if TYPE_CHECKING:
    from metarec_gym.world import World


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


def world_card(world: World) -> str:
    """Hashes, strategies, outcomes, and how the judges did."""
    metrics = world.metrics
    out = [
        fact_list(
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
            lines.append(
                [escape(fold), escape(outcome), *numbers, tone, *more, rates, f"{heldout.get('n_users', 0):,}"]
            )
            if isinstance(heldout.get("reliability"), Mapping):
                curves.append((f"judge {fold}, {outcome}", heldout["reliability"]))
    if not lines:
        return nested_table(judges)
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
    return rows_table(head, lines) + _calibration(curves) + folded("everything about the judges", judges)


def _calibration(curves: Sequence[tuple[str, Mapping[str, Sequence[float]]]]) -> str:
    if not curves:
        return ""
    with drawing(height=3.4) as (figure, axes):
        top = max(max(*c["predicted"], *c["observed"]) for _, c in curves)
        axes.plot([0, top], [0, top], color=FAINT, linewidth=1.2)
        for index, (name, curve) in enumerate(curves[:MAX_CURVES]):
            style = {"color": SERIES[index], "linewidth": 1.3, "markersize": 4}
            axes.plot(curve["predicted"], curve["observed"], "o-", label=name, **style)
        axes.set_xlabel("predicted probability, mean of a bin")
        axes.set_ylabel("share observed on held-out users")
        axes.grid(color=FAINT, linewidth=0.5)
        axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure_html(
        figure, "Calibration on users that the judge has not seen; on the diagonal is right.", "calibration"
    )


def _predictive(check: Mapping[str, Any]) -> str:
    intro = (
        "<p>The same estimator of user-by-strategy effects runs on the real log and on logs that the world emits"
        + (f" ({check['replicas']} of them)" if "replicas" in check else "")
        + "; the log should lie in the central 95 % of the emitted ones.</p>"
    )
    statistics = check.get("statistics")
    if not isinstance(statistics, Mapping):
        return intro + nested_table(check)
    lines = []
    for name, facts in statistics.items():
        if not isinstance(facts, Mapping) or "observed" not in facts:
            continue
        low, high = facts.get("replicas_low", float("nan")), facts.get("replicas_high", float("nan"))
        inside = bool(facts.get("inside"))
        emitted = f"{facts.get('replicas_mean', float('nan')):.4g} [{low:.4g}, {high:.4g}]"
        tone = f"<span class='{'up' if inside else 'down'}'>{'inside' if inside else 'outside'}</span>"
        lines.append([escape(name.replace("_", " ").replace("/", ": ")), f"{facts['observed']:.4g}", emitted, tone])
    return intro + rows_table(("statistic", "log", "emitted logs, mean [95 %]", ""), lines)


def data_card(world: World) -> str:
    """Source, licence and cleaning of the log."""
    card = {k: v for k, v in world.card.items() if not isinstance(v, (dict, list))}
    nested = {k: v for k, v in world.card.items() if isinstance(v, (dict, list)) and v}
    cleaning = world.info.get("cleaning") or []
    out = fact_list({str(k).replace("_", " "): v for k, v in card.items()})
    if nested:
        out += nested_table(nested)
    if cleaning:
        lines = [
            [
                escape(step.get("rule", "")),
                f"{step.get('rows_before', 0):,}",
                f"{step.get('rows_after', 0):,}",
                escape(step.get("note", "")),
            ]
            for step in cleaning
        ]
        out += "<h3>Cleaning</h3>" + rows_table(("rule", "rows before", "rows after", ""), lines)
    return out
