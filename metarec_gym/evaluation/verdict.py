"""Does selecting pay on this log, with this pool? Three answers, decided by bounds and not by point estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from metarec_gym.evaluation.intervals import Interval
from metarec_gym.evaluation.metrics import MIN_HEADROOM

RULE = "best non-personal rule"
"""Its name among the headrooms."""
PAYS, JUST_USE, CANNOT_TELL = "selection pays", "just use", "cannot tell"


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        kind: "selection pays", "just use" or "cannot tell".
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
        level: Confidence level of the whole statement.

    Returns:
        "selection pays" when a lower bound of a learned lift is above 2 %; "just use" when the upper bounds of all
        headrooms and of all learned lifts are below 2 %; "cannot tell" otherwise.
    """
    edge = f"{MIN_HEADROOM:.0%}".replace("%", " %")
    corrected = {name: i.at_level(1.0 - (1.0 - level) / len(learned)) for name, i in learned.items()}
    note = f" (bounds corrected for {len(learned)} learned policies by Bonferroni)" if len(learned) > 1 else ""
    best = max(corrected, key=lambda name: corrected[name].low) if corrected else None
    if best is not None and corrected[best].low > MIN_HEADROOM:
        return Verdict(
            PAYS,
            f"selection pays: {best} gains {learned[best].as_percent()} over the best non-personal rule",
            f"The lower bound of its lift, {100 * corrected[best].low:+.1f} %, is above {edge}{note}.",
            best,
        )
    open_headrooms = {name: i for name, i in headrooms.items() if not i.high < MIN_HEADROOM}
    open_learned = {name: i for name, i in corrected.items() if not i.high < MIN_HEADROOM}
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
    if sched is not None and rule is not None and rule.low > MIN_HEADROOM:
        sentences.append(f"What is sure without learning: {sched} gains {rule.as_percent()} over {sbs}.")
        return Verdict(CANNOT_TELL, f"cannot tell (until then the safe choice is {sched})", " ".join(sentences), best)
    return Verdict(CANNOT_TELL, f"cannot tell (until then the safe choice is {sbs})", " ".join(sentences), best)
