"""Does selecting pay on this log, with this pool? Decided by bounds and not by point estimates.

An answer that a judge of another family contradicts is no answer about the log: it is called model-dependent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from metarec_gym.evaluation.intervals import Interval
from metarec_gym.evaluation.metrics import MIN_HEADROOM

RULE = "best non-personal rule"
"""Its name among the headrooms."""
PAYS, JUST_USE, CANNOT_TELL = "selection pays", "just use", "cannot tell"
MODEL_DEPENDENT = "model-dependent"


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        kind: "selection pays", "just use", "cannot tell" or "model-dependent".
        headline: The answer in a few words.
        reason: Why, in plain words.
        policy: The learned policy it rests on, if any.
    """

    kind: str
    headline: str
    reason: str
    policy: str | None = None


def decide(
    sbs: str,
    headrooms: Mapping[str, Interval],
    learned: Mapping[str, Interval],
    *,
    sched: str | None = None,
    second: Mapping[str, tuple[Interval, Interval]] | None = None,
    level: float = 0.95,
) -> Verdict:
    """Verdict from bounds.

    The best learned policy would be picked on the very numbers it is judged by; so every learned policy gets a
    Bonferroni interval (level 1 - (1 - level) / m for m policies), which stays valid for whichever looks best.

    Args:
        sbs: Name of the single best strategy.
        headrooms: Lift over the single best strategy of each oracle and of the best non-personal rule.
        learned: Lift over the best non-personal rule of each learned policy; may be empty.
        sched: The best non-personal rule in words.
        second: Lift over the single best strategy of each policy under the main judge and under one of another family; the
            best non-personal rule is among them as `RULE`. A policy whose sure lift changes sign is believed in neither
            direction.
        level: Confidence level of the whole statement.

    Returns:
        "selection pays" when a lower bound of a learned lift is above 2 % and the second judge does not turn that policy's
        lift over the single best strategy round; "just use" when the upper bounds of all headrooms and of all learned
        lifts are below 2 % and nothing surely beats the single best strategy by 2 % under the second judge;
        "model-dependent" where the second judge alone stands against one of these; "cannot tell" otherwise.
    """
    turned = {n: pair for n, pair in (second or {}).items() if sign_changes(*pair)}
    edge = f"{MIN_HEADROOM:.0%}".replace("%", " %")
    corrected = {name: i.at_level(1.0 - (1.0 - level) / len(learned)) for name, i in learned.items()}
    note = f" (bounds corrected for {len(learned)} learned policies by Bonferroni)" if len(learned) > 1 else ""
    best = max(corrected, key=lambda name: corrected[name].low) if corrected else None
    paying = sorted((n for n, i in corrected.items() if i.low > MIN_HEADROOM), key=lambda n: -corrected[n].low)
    lasting = [name for name in paying if name not in turned]
    if lasting:
        best = lasting[0]
        contradicted = [name for name in paying if name in turned]
        return Verdict(
            PAYS,
            f"selection pays: {best} gains {learned[best].as_percent()} over the best non-personal rule",
            f"The lower bound of its lift, {100 * corrected[best].low:+.1f} %, is above {edge}{note}."
            + (f" Model-dependent and not counted: {', '.join(contradicted)}." if contradicted else ""),
            best,
        )
    if paying:
        return Verdict(
            MODEL_DEPENDENT,
            f"model-dependent (until then the safe choice is {sbs})",
            f"{paying[0]} gains {learned[paying[0]].as_percent()} over the best non-personal rule, but a judge of another "
            f"family turns its lift over {sbs} round: {_pair(turned[paying[0]])}.",
            paying[0],
        )
    open_headrooms = {name: i for name, i in headrooms.items() if not i.high < MIN_HEADROOM}
    open_learned = {name: i for name, i in corrected.items() if not i.high < MIN_HEADROOM}
    wide = 1.0 - (1.0 - level) / max(len(second or {}), 1)
    beaten = {n: pair for n, pair in (second or {}).items() if pair[1].at_level(wide).low > MIN_HEADROOM}
    if not open_headrooms and not open_learned and beaten:
        name = max(beaten, key=lambda n: beaten[n][1].low)
        return Verdict(
            MODEL_DEPENDENT,
            f"model-dependent (until then the safe choice is {sbs})",
            f"Under the main judge there is nothing to win over {sbs}, but under a judge of another family {name} surely "
            f"beats it: {_pair(beaten[name])}.",
        )
    if not open_headrooms and not open_learned:
        what = "every headroom" + (" and of every learned policy's lift" if learned else "")
        return Verdict(
            JUST_USE, f"just use {sbs}", f"The upper bound of {what} is below {edge}{note}: there is nothing to win."
        )
    sentences = []
    sure = {n: i for n, i in open_headrooms.items() if i.low > MIN_HEADROOM}
    if sure:
        listed = ", ".join(f"{n} {i.as_percent()}" for n, i in sure.items())
        sentences.append(f"There is something to win: {listed}.")
    unsure = {n: i for n, i in open_headrooms.items() if n not in sure}
    if unsure:
        listed = ", ".join(f"{n} {i.as_percent()}" for n, i in unsure.items())
        sentences.append(f"Whether there is {edge} to win is open: {listed} has {edge} inside its interval.")
    if not learned:
        sentences.append("No learned policy was played.")
    elif open_learned:
        name = max(open_learned, key=lambda n: open_learned[n].estimate)
        sentences.append(
            f"No learned policy surely gains {edge} over the best non-personal rule; the closest is {name} with "
            f"{open_learned[name].as_percent()}{note}."
        )
    else:
        name = max(corrected, key=lambda n: corrected[n].estimate)
        sentences.append(
            f"But the learned policies do not win it: even the best, {name}, gains {corrected[name].as_percent()} "
            f"over the best non-personal rule, surely less than {edge}{note}."
        )
    rule = headrooms.get(RULE)
    if turned:
        listed = "; ".join(f"{name} {_pair(pair)}" for name, pair in sorted(turned.items()))
        sentences.append(
            f"Model-dependent: the lift over {sbs} changes sign under a judge of another family for {listed}."
        )
    if RULE in turned:
        return Verdict(CANNOT_TELL, f"cannot tell (until then the safe choice is {sbs})", " ".join(sentences), best)
    if sched is not None and rule is not None and rule.low > MIN_HEADROOM:
        sentences.append(f"What is sure without learning: {sched} gains {rule.as_percent()} over {sbs}.")
        return Verdict(CANNOT_TELL, f"cannot tell (until then the safe choice is {sched})", " ".join(sentences), best)
    return Verdict(CANNOT_TELL, f"cannot tell (until then the safe choice is {sbs})", " ".join(sentences), best)


def sign_changes(main: Interval, second: Interval) -> bool:
    """Whether `main` excludes 0 and `second` lies on the other side of it."""
    return (main.low > 0.0 > second.estimate) or (main.high < 0.0 < second.estimate)


def _pair(pair: tuple[Interval, Interval]) -> str:
    return f"{pair[0].as_percent()} under the main judge, {pair[1].as_percent()} under the second"
