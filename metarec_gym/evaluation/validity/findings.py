"""How far a world may be believed: what was measured becomes findings, and findings a verdict in plain words.

A finding is `pass`, `fail` or `cannot tell`, never a guess: it passes when the estimate meets the threshold *and* its
95 % interval is no wider than what is accepted; it fails when the interval lies outside; a log too small for either says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metarec_gym.evaluation.intervals import Interval
from metarec_gym.evaluation.metrics import MIN_HEADROOM

SCHEMA = 1
FILE = "validity.json"
"""Its name beside `world.json`."""
PASS, FAIL, OPEN = "pass", "fail", "cannot tell"
STAYS, MOVES, UNCLEAR = "stays", "moves", "unclear"

MAX_ECE_SHARE = 0.10
"""Calibration error, as a share of the outcome's rate."""
SLOPE = (0.9, 1.1)
"""Calibration slope."""
RATE_PRECISION = 0.10
"""A rate's interval must be this narrow (half width, share of the rate), else any rate would lie inside."""
MIN_CONCORDANCE = 0.9
"""Share of the pairs that the log separates which the world must order alike."""
MIN_PAIRS = 5
"""With fewer separated pairs of strategies the log is too small to tell."""
MAX_KS = 0.1
"""Distance between distributions of session lengths or return times."""
MIN_EVENTS = 100
"""Sessions or returns that a distance needs."""
MAX_AUC = 0.75
"""Up to here simulated sessions pass for real ones well enough; 0.5 = they cannot be told apart."""
MAX_LOSS = 0.02
"""Value that may be lost by taking one judge's best strategy where the other judge rules."""

HALVES = ("interleaved", "consecutive")
HEADLINE = ("interaction_trace", "headroom")
_TRACE = {
    "interaction_trace": "how much users differ in which strategy suits them",
    "headroom": "what a user's own best strategy gains",
}


@dataclass(frozen=True)
class Finding:
    """One question and its answer.

    Attributes:
        topic: What it belongs to, e.g. `calibration`.
        question: The question, with the threshold.
        result: `pass`, `fail` or `cannot tell`.
        text: The answer with its number.
        value: The number that decided, if there is one.
        low: Lower bound of its 95 % interval.
        high: Upper bound.
        threshold: What was accepted, in words.
        outcome: The outcome it is about, if it is about one.
    """

    topic: str
    question: str
    result: str
    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    threshold: str = ""
    outcome: str = ""


def read_validity(folder: str | Path, world_hash: str) -> dict[str, Any] | None:
    """The validity report beside a world; None when there is none, or when it is another world's."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found if found.get("world") == world_hash and found.get("schema") == SCHEMA else None


def within(estimate: float, low: float, high: float, accepted: tuple[float, float]) -> str:
    """Whether a number lies in the accepted range, as far as its interval can tell."""
    bottom, top = accepted
    if low > top or high < bottom:
        return FAIL
    inside = bottom <= estimate <= top
    return PASS if inside and high - low <= top - bottom else OPEN


def headroom_verdict(headrooms: Mapping[str, Interval]) -> str:
    """Before training: `something to win`, `nothing to win` or `cannot tell`, from the headrooms over the best strategy."""
    if any(i.low > MIN_HEADROOM for i in headrooms.values()):
        return "something to win"
    if all(i.high < MIN_HEADROOM for i in headrooms.values()):
        return "nothing to win"
    return OPEN


def find(validity: Mapping[str, Any]) -> list[Finding]:
    """All findings of a validity report.

    Args:
        validity: What was measured: `outcomes`, `sessions`, `returns`, `posterior_predictive`, `concordance`,
            `classifier_auc`, `judges_agree`, `sensitivity`, `long_term`; a part that is missing or has a `note` cannot tell.

    Returns:
        The findings, in the order of the report.
    """
    found: list[Finding] = []
    for name, entry in validity.get("outcomes", {}).items():
        found += _outcome(name, entry)
    found += [
        _distribution("session lengths", validity.get("sessions")),
        _distribution("return times", validity.get("returns")),
        *_predictive(validity.get("posterior_predictive")),
        _concordance(validity.get("concordance")),
        _classifier(validity.get("classifier_auc")),
        *_judges(validity.get("judges_agree")),
        _sensitivity(validity.get("sensitivity")),
        _long_term(validity.get("long_term")),
    ]
    return found


def _missing(part: object) -> str | None:
    """Why a part cannot tell: None when it has numbers."""
    if not part:
        return "It was not measured."
    if isinstance(part, Mapping) and part.get("note"):
        return str(part["note"])
    return None


def _percent(x: float, digits: int = 0) -> str:
    return f"{100 * x:.{digits}f} %"


def _outcome(name: str, entry: Mapping[str, Any]) -> list[Finding]:
    note = _missing(entry)
    if note is not None:
        return [Finding("prediction", f"Does the judge predict {name!r} of unseen users?", OPEN, note, outcome=name)]
    return [*_losses(name, entry), *_calibration(name, entry), _rate(name, entry)]


def _losses(name: str, entry: Mapping[str, Any]) -> list[Finding]:
    found = []
    loss = entry.get("log_loss", {})
    for rival, words in (("popularity", "popularity"), ("mf", "matrix factorisation"), ("base_rate", "the base rate")):
        question = f"Does the judge beat {words} on {name!r} of unseen users?"
        gain = entry.get("gain", {}).get(rival)
        if gain is not None:
            result = PASS if gain["low"] > 0 else FAIL if gain["high"] < 0 else OPEN
            text = (
                f"Its log-loss is {_percent(gain['estimate'], 1)} [{_percent(gain['low'], 1)}, {_percent(gain['high'], 1)}] "
                f"lower than that of {words}."
            )
            found.append(
                Finding("prediction", question, result, text, gain["estimate"], gain["low"], gain["high"], "> 0", name)
            )
        elif rival in loss and "judge" in loss:
            better = [a < b for a, b in entry.get("log_loss_by_fold", {}).get(rival, [(loss["judge"], loss[rival])])]
            result = PASS if all(better) else FAIL if not any(better) else OPEN
            text = f"Log-loss {loss['judge']:.4f} against {loss[rival]:.4f}; better in {sum(better)} of {len(better)} folds."
            value = 1.0 - loss["judge"] / loss[rival]
            found.append(
                Finding("prediction", question, result, text, value, threshold="better in both folds", outcome=name)
            )
        elif rival == "mf":
            text = "The world holds no matrix factorisation to compare with."
            found.append(Finding("prediction", question, OPEN, text, outcome=name))
    later = entry.get("later", {})
    question = f"Does the judge beat popularity on {name!r} of unseen users in the last fifth of the calendar?"
    if later.get("note"):
        found.append(Finding("prediction", question, OPEN, str(later["note"]), outcome=name))
    elif later:
        gain = later["gain"]["popularity"]
        result = PASS if gain["low"] > 0 else FAIL if gain["high"] < 0 else OPEN
        text = f"Its log-loss is {_percent(gain['estimate'], 1)} [{_percent(gain['low'], 1)}, {_percent(gain['high'], 1)}] lower."
        found.append(
            Finding("prediction", question, result, text, gain["estimate"], gain["low"], gain["high"], "> 0", name)
        )
    return found


def _calibration(name: str, entry: Mapping[str, Any]) -> list[Finding]:
    share = f"Is the calibration error of {name!r} at most {_percent(MAX_ECE_SHARE)} of its rate?"
    slope = f"Is the calibration slope of {name!r} between {SLOPE[0]} and {SLOPE[1]}?"
    return [
        _number("calibration", share, entry, "ece_share_of_rate", "ece_share", (0.0, MAX_ECE_SHARE), name),
        _number("calibration", slope, entry, "calibration_slope", "calibration_slope", SLOPE, name),
    ]


def _number(
    topic: str,
    question: str,
    entry: Mapping[str, Any],
    key: str,
    bounds: str,
    accepted: tuple[float, float],
    outcome: str,
) -> Finding:
    value, low, high = entry.get(key), entry.get(f"{bounds}_low"), entry.get(f"{bounds}_high")
    percent = key == "ece_share_of_rate"
    threshold = f"<= {_percent(accepted[1])}" if percent else f"{accepted[0]} to {accepted[1]}"
    if value is None:
        return Finding(topic, question, OPEN, "All predictions are equal: there is no slope.", outcome=outcome)
    shown = _percent(value, 1) + " of the rate" if percent else f"{value:.2f}"
    if low is None or high is None:
        text = f"{shown}, without an interval: it needs the log."
        return Finding(topic, question, OPEN, text, value, threshold=threshold, outcome=outcome)
    result = within(value, low, high, accepted)
    span = f" [{_percent(low, 1)}, {_percent(high, 1)}]" if percent else f" [{low:.2f}, {high:.2f}]"
    text = shown + span + ("" if percent else _slope_words(value, result)) + "."
    if result == OPEN:
        text += " Too close, or too few users, to tell."
    return Finding(topic, question, result, text, value, low, high, threshold, outcome)


def _slope_words(slope: float, result: str) -> str:
    if result == PASS:
        return ""
    return ": the judge is too sure of itself" if slope < 1.0 else ": the judge is too timid"


def _rate(name: str, entry: Mapping[str, Any]) -> Finding:
    question = f"Is the simulated rate of {name!r} inside the log's 95 % interval?"
    sim, log, low, high = (entry.get(k) for k in ("rate_sim", "rate_log", "rate_log_lo", "rate_log_hi"))
    if entry.get("declared"):
        text = (
            "The log shows only what users took, not what they were shown: the rate of taking a shown item is declared "
            f"({sim:.3f} for an item drawn at random), not measured."
            if sim is not None
            else "The log shows only what users took: this rate is declared, not measured."
        )
        return Finding("rates", question, OPEN, text, sim, low, high, "inside", name)
    if sim is None or log is None or low is None or high is None:
        return Finding("rates", question, OPEN, "It was not measured.", outcome=name)
    text = f"Simulated {sim:.4f}, log {log:.4f} [{low:.4f}, {high:.4f}]: {sim / log:.3f} of the log's."
    inside = low <= sim <= high
    for judge, own in entry.get("by_judge", {}).items():
        if not own["low"] <= own["rate_sim"] <= own["high"]:
            inside = False
            text += (
                f" Judge {judge} alone: {own['rate_sim']:.4f} against {own['rate_log']:.4f}, outside "
                f"[{own['low']:.4f}, {own['high']:.4f}]."
            )
    wide = 0.5 * (high - low) > RATE_PRECISION * log
    if inside and wide:
        text += " The log is too small to tell: its interval would hold almost any rate."
    result = FAIL if not inside else OPEN if wide else PASS
    return Finding("rates", question, result, text, sim, low, high, "inside", name)


def _distribution(what: str, part: Mapping[str, Any] | None) -> Finding:
    question = f"Do {what} follow the log (distance at most {MAX_KS})?"
    note = _missing(part)
    if note is not None or part is None:
        return Finding("time", question, OPEN, note or "")
    ks, count = float(part["ks"]), int(part["n"])
    text = f"Distance {ks:.3f} on {count:,} of unseen users."
    if count < MIN_EVENTS:
        return Finding("time", question, OPEN, text + f" Fewer than {MIN_EVENTS}: too few to tell.", ks)
    return Finding("time", question, PASS if ks <= MAX_KS else FAIL, text, ks, threshold=f"<= {MAX_KS}")


def _predictive(part: Mapping[str, Any] | None) -> list[Finding]:
    note = _missing(part)
    if note is not None or part is None:
        question = "Do logs that the world emits have the real log's differences between users?"
        return [Finding("differences between users", question, OPEN, note or "")]
    found = []
    for halves in HALVES:
        check = part.get(halves)
        if check is None:
            continue
        statistics = check.get("statistics", {}) if isinstance(check, Mapping) else {}
        kind = "lasting differences" if halves == "consecutive" else "differences in all"
        if not statistics:
            note = (
                str(check.get("note", "It was not measured.")) if isinstance(check, Mapping) else "It was not measured."
            )
            found.append(
                Finding("differences between users", f"Do emitted logs show {kind} as the real log does?", OPEN, note)
            )
        for name in HEADLINE:
            if name not in statistics:
                continue
            s = statistics[name]
            low, high, seen = s["replicas_low"], s["replicas_high"], s["observed"]
            question = f"Is {_TRACE[name]} ({kind}) inside the central 95 % of emitted logs?"
            text = f"Log {seen:.4g}, emitted logs {s['replicas_mean']:.4g} [{low:.4g}, {high:.4g}]"
            result = PASS if low <= seen <= high else FAIL
            if result == PASS and name == "interaction_trace" and low <= 0.0 <= high:
                result, text = OPEN, text + ": the log is too small to tell these differences from none"
            if result == FAIL:
                text += f": {excess(s):.1f} half widths off; the world {_direction(s)} it"
            found.append(Finding("differences between users", question, result, text + ".", seen, low, high, "inside"))
    return found


def excess(statistic: Mapping[str, float]) -> float:
    """How far the log's value is from the emitted logs' mean, in half widths of their central 95 %; above 1 is outside."""
    half = max(0.5 * (statistic["replicas_high"] - statistic["replicas_low"]), 1e-12)
    return abs(statistic["observed"] - statistic["replicas_mean"]) / half


def _direction(statistic: Mapping[str, float]) -> str:
    return "understates" if statistic["observed"] > statistic["replicas_high"] else "overstates"


def _concordance(part: Mapping[str, Any] | None) -> Finding:
    question = f"Does the world order at least {_percent(MIN_CONCORDANCE)} of the strategy pairs as the log does?"
    note = _missing(part)
    if note is not None or part is None:
        return Finding("order of strategies", question, OPEN, note or "")
    separated, agreeing = int(part["separated"]), int(part["agreeing"])
    text = f"The log separates {separated} of {part['pairs']} pairs; the world orders {agreeing} of them alike"
    if separated < MIN_PAIRS:
        return Finding(
            "order of strategies", question, OPEN, f"{text}. Too few pairs to tell ({MIN_PAIRS} are needed)."
        )
    share, low, high = (float(part[k]) for k in ("share", "low", "high"))
    text += f": {_percent(share)} [{_percent(low)}, {_percent(high)}]."
    if part.get("reversed"):
        pairs = ", ".join(f"{a} above {b}" for a, b in part["reversed"][:4])
        text += f" Reversed in the world: {pairs}" + (" and others." if len(part["reversed"]) > 4 else ".")
    result = PASS if share >= MIN_CONCORDANCE else FAIL
    return Finding("order of strategies", question, result, text, share, low, high, f">= {_percent(MIN_CONCORDANCE)}")


def _classifier(part: Mapping[str, Any] | None) -> Finding:
    question = f"Can a classifier tell simulated sessions from real ones (AUC at most {MAX_AUC})?"
    note = _missing(part)
    if note is not None or part is None:
        return Finding("look of sessions", question, OPEN, note or "")
    auc, low, high = float(part["auc"]), float(part["low"]), float(part["high"])
    told = sorted(part.get("features", {}).items(), key=lambda kv: -abs(kv[1]["auc"] - 0.5))[:2]
    text = f"AUC {auc:.2f} [{low:.2f}, {high:.2f}] (0.5 = not at all)."
    if told:
        text += " What tells most: " + ", ".join(name.replace("_", " ") for name, _ in told) + "."
    result = FAIL if low > MAX_AUC else PASS if auc <= MAX_AUC and high - low <= 0.2 else OPEN
    return Finding("look of sessions", question, result, text, auc, low, high, f"<= {MAX_AUC}")


def _judges(part: Mapping[str, Any] | None) -> list[Finding]:
    note = _missing(part)
    if note is not None or part is None:
        return [Finding("judges", "Do other judges value the strategies alike?", OPEN, note or "")]
    found = []
    for key, words in (("train_test", "the two judges on disjoint users"), ("second", "a judge of a second family")):
        question = (
            f"Does the answer hold between {words}?" if key == "train_test" else f"Does the answer hold with {words}?"
        )
        entry = part.get(key)
        note = _missing(entry)
        if note is not None or entry is None:
            found.append(Finding("judges", question, OPEN, note or ""))
            continue
        rank, lost = float(entry["rank_correlation"]), float(entry["lost_by_swapping_best"])
        low, high = float(entry["lost_low"]), float(entry["lost_high"])
        verdicts = {entry["verdict"], entry["verdict_other"]}
        text = (
            f"Rank correlation of the strategies' values {rank:.2f}; taking the one's best strategy where the other rules "
            f"loses {_percent(lost, 1)} [{_percent(low, 1)}, {_percent(high, 1)}]; verdict before training: "
            f"{entry['verdict']} / {entry['verdict_other']}."
        )
        if low > MAX_LOSS or (len(verdicts) == 2 and OPEN not in verdicts):
            result = FAIL
        else:
            result = PASS if lost <= MAX_LOSS and high <= 2.0 * MAX_LOSS and len(verdicts) == 1 else OPEN
        threshold = f"same verdict, <= {_percent(MAX_LOSS)} lost"
        found.append(Finding("judges", question, result, text, lost, low, high, threshold))
    return found


def _sensitivity(rows: Sequence[Mapping[str, Any]] | None) -> Finding:
    question = "Does the verdict before training stay when what the log cannot tell is varied?"
    others = [row for row in rows or () if row.get("name") != "main" and not row.get("note")]
    if not others:
        return Finding("settings", question, OPEN, "It was not measured.")
    moved = [row for row in others if row["answer"] == MOVES]
    unclear = [row for row in others if row["answer"] == UNCLEAR]
    if not moved and not unclear:
        return Finding("settings", question, PASS, f"It stays in all {len(others)} variations.", 0.0)
    listed = "; ".join(f"{row['label']}: {row['verdict']}, best {row['best']}" for row in moved or unclear)
    text = f"It {'moves' if moved else 'is unclear'} in {len(moved or unclear)} of {len(others)} variations ({listed})."
    share = len(moved) / len(others)
    return Finding("settings", question, FAIL if moved else OPEN, text, share, threshold="none moves")


def _long_term(part: Mapping[str, Any] | None) -> Finding:
    edge = _percent(MIN_HEADROOM)
    question = f"Is anything long-term: does looking ahead gain {edge} or more over greed?"
    note = _missing(part)
    if note is not None or part is None:
        return Finding("long term", question, OPEN, note or "")
    gain, low, high = (float(part[k]) for k in ("estimate", "low", "high"))
    result = FAIL if high < MIN_HEADROOM else PASS if low > 0.0 else OPEN
    text = f"Looking ahead gains {100 * gain:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}] over greed."
    if result == FAIL:
        text += " Nothing is long-term here: use a bandit."
    return Finding("long term", question, result, text, gain, low, high, f"lower bound > 0, upper bound >= {edge}")


# ------------------------------------------------------------------------------------------------ verdict
def decide_use(validity: Mapping[str, Any], findings: Sequence[Finding]) -> dict[str, Any]:
    """What the world may and may not be used for, in plain words.

    Args:
        validity: What was measured.
        findings: Its findings.

    Returns:
        `headline`, `kind` (`good`, `open`, `bad`), `may`, `may_not` and `sentences` (all of it in reading order).
    """
    state = {topic: _worst(f.result for f in findings if f.topic == topic) for topic in {f.topic for f in findings}}
    beats = _worst(f.result for f in findings if f.topic == "prediction" and "base rate" not in f.question)
    order, users = state.get("order of strategies", OPEN), state.get("differences between users", OPEN)
    may: list[str] = []
    may_not: list[str] = []
    if state.get("prediction") == FAIL:
        may_not.append(
            "The judge predicts some outcome of unseen users no better than a simple rule: do not believe what this world "
            "says of single users."
        )
    if order == PASS and beats != FAIL:
        may.append("It may be used to compare strategies with each other: it orders them as the log does.")
    elif order == FAIL:
        may_not.append(
            "It must not be used to choose between strategies: it orders pairs the other way than the log does."
        )
    else:
        may_not.append(
            "Whether it orders the strategies as the log does is open: the log is too small, or was not given."
        )
    if users == PASS:
        may.append(
            "Users differ in it as in the log, so what it says of choosing a strategy for each user may be believed within "
            "the intervals."
        )
    elif users == FAIL:
        may_not.append(_users_sentence(validity))
    else:
        may_not.append(
            "Whether its users differ as the log's do is open; take gains from per-user selection as a hypothesis."
        )
    declared = [n for n, e in validity.get("outcomes", {}).items() if e.get("declared")]
    rates = _worst(f.result for f in findings if f.topic in ("rates", "calibration") and f.outcome not in declared)
    if declared:
        may_not.append(
            f"Do not read absolute rates of {', '.join(declared)} off it: the log has no impressions, so that rate is declared; "
            "only comparisons carry over."
        )
    if rates == PASS:
        may.append("The probabilities of the outcomes that the log measures mean what they say.")
    elif rates == FAIL:
        may_not.append("Some outcome's probabilities or rates differ from the log's: do not forecast with them.")
    else:
        may_not.append("Whether its probabilities mean what they say is open: the log is too small, or was not given.")
    closing: list[str] = []
    if state.get("judges") == FAIL:
        closing.append("The answer depends on the judge: treat it as model-dependent and test online before acting.")
    if state.get("settings") == FAIL:
        closing.append("The answer moves with settings that the log cannot tell: see the sensitivity table.")
    if state.get("long term") == FAIL:
        closing.append("Nothing is long-term in it: use a bandit here, not reinforcement learning over long episodes.")
    if state.get("look of sessions") == FAIL:
        closing.append("Do not train or test sequence models on its sessions: a classifier tells them from real ones.")
    failed = sum(f.result == FAIL for f in findings)
    opened = sum(f.result == OPEN for f in findings)
    headline, kind = _headline(order, users, beats)
    return {
        "headline": headline,
        "kind": kind,
        "counts": {PASS: len(findings) - failed - opened, FAIL: failed, OPEN: opened},
        "may": may,
        "may_not": may_not,
        "sentences": [*may, *may_not, *closing][:6],
    }


def _worst(results: Any) -> str:
    found = list(results)
    return FAIL if FAIL in found else OPEN if OPEN in found or not found else PASS


def _headline(order: str, users: str, beats: str) -> tuple[str, str]:
    if beats == FAIL or order == FAIL:
        return "Do not rely on this world", "bad"
    if order == PASS and users == PASS:
        return "Good for choosing strategies, for all users and for each user", "good"
    if order == PASS:
        tail = "is open" if users == OPEN else "is not borne out by the log"
        return f"Good for comparing strategies; what it says of single users {tail}", "open"
    return "The log is too small to say how far this world may be believed", "open"


def _users_sentence(validity: Mapping[str, Any]) -> str:
    """By how much the world's differences between users miss the log's, and what that does to the answer."""
    worst: tuple[float, str, Mapping[str, float]] | None = None
    for check in validity.get("posterior_predictive", {}).values():
        for name in HEADLINE:
            s = check.get("statistics", {}).get(name) if isinstance(check, Mapping) else None
            if s is not None and not s["replicas_low"] <= s["observed"] <= s["replicas_high"]:
                worst = max(worst or (-1.0, "", s), (excess(s), name, s), key=lambda w: w[0])
    if worst is None:
        return "Its users do not differ as the log's do."
    _, name, s = worst
    if name == "headroom":
        sizes = f"{100 * s['observed']:+.1f} % in the log, {100 * s['replicas_mean']:+.1f} % in emitted logs"
    else:
        sizes = f"{s['observed']:.3g} in the log, {s['replicas_mean']:.3g} in emitted logs"
    if _direction(s) == "understates":
        return (
            f"It understates {_TRACE[name]} ({sizes}): gains from per-user selection are more likely larger than it says; "
            '"nothing to win" would not be proven by it.'
        )
    return (
        f"It overstates {_TRACE[name]} ({sizes}): gains from per-user selection that it promises may not exist; test them "
        "online before acting."
    )


def conclude(validity: dict[str, Any]) -> dict[str, Any]:
    """The same with `findings` and `verdict`."""
    findings = find(validity)
    return {**validity, "findings": [asdict(f) for f in findings], "verdict": decide_use(validity, findings)}
