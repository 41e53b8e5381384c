"""The parts of the validity report: each measures one thing on a world (and its log) and returns plain JSON types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from metarec_gym.evaluation.intervals import Floats, ratio_interval
from metarec_gym.evaluation.metrics import SEGMENT_EDGES, SEGMENTS
from metarec_gym.evaluation.rollout import per_user
from metarec_gym.evaluation.validity.checks import (
    calibration,
    clustered_mean,
    concordance,
    log_losses,
    two_sample_auc,
    user_sums,
)
from metarec_gym.evaluation.validity.sample import (
    FOLD_NUMBER,
    FOLDS,
    HeldOut,
    held_out,
    judges_of,
    lengths_before,
    sampled_gate,
)
from metarec_gym.evaluation.validity.timing import return_curves, session_curves
from metarec_gym.evaluation.validity.windows import FEATURES, window_features, windows

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset
    from metarec_gym.world import World

PREFIXES = (0, 5, 10, 20, 40)
"""Engaged items before a window in which strategies are compared."""
EVENTS = 20
"""Engaged items of a window."""
LIST_LENGTH = 50
"""Items of a strategy's list that count as its hits."""
CLASSIFIER_PREFIX = 10
FEWEST_WINDOWS = 40
"""With fewer users on each side a classifier learns nothing."""
FEWEST_USERS = 20

LOGGED = "The answers of this world are the log's own: there is no model to check."


# ------------------------------------------------------------------------------------------------ outcomes
def outcome_part(
    world: World,
    dataset: Dataset,
    outcome: int,
    *,
    limit: int,
    seed: int,
    served: NDArray[np.object_] | None = None,
) -> dict[str, Any]:
    """Log-loss, calibration and rates of one outcome on users that the judges have not seen.

    Args:
        world: The world.
        dataset: Its log.
        outcome: Index of the outcome.
        limit: Events a fold at most.
        seed: Decides the sample.
        served: Strategy that served each row of the log, where it says so.

    Returns:
        The outcome's entry of `validity.json`.
    """
    name = world.outcomes[outcome]
    if not all(judges_of(world, fold) for fold in FOLDS):
        return {"note": LOGGED}
    sample = held_out(world, dataset, outcome, limit=limit, seed=seed)
    n_users = len(np.unique(sample.user))
    if n_users < FEWEST_USERS or np.ptp(sample.target) == 0.0:
        return {"note": f"Only {n_users} users, or only one answer, in the log: too small to tell."}
    judge = sample.prob["judge"]
    found = calibration(judge, sample.target, sample.weight, sample.user, seed=seed)
    losses = {model: log_losses(p, sample.target) for model, p in sample.prob.items()}
    entry: dict[str, Any] = {
        "declared": sampled_gate(dataset, outcome),
        "n_rows": len(judge),
        "n_users": n_users,
        "ece": found.ece.estimate,
        "ece_low": found.ece.low,
        "ece_high": found.ece.high,
        "ece_share_of_rate": found.ece_share.estimate,
        "ece_share_low": found.ece_share.low,
        "ece_share_high": found.ece_share.high,
        "reliability": found.curve,
        "rate_sim": found.predicted,
        "rate_sim_own": float(np.average(sample.own, weights=sample.weight)),
        "rate_log": found.observed.estimate,
        "rate_log_lo": found.observed.low,
        "rate_log_hi": found.observed.high,
        "log_loss": {model: float(np.average(loss, weights=sample.weight)) for model, loss in losses.items()},
        "gain": {m: _gain(losses, m, sample, None) for m in losses if m != "judge"},
        "later": _later(losses, sample),
    }
    if found.slope is not None:
        slope = found.slope
        entry |= {
            "calibration_slope": slope.estimate,
            "calibration_slope_low": slope.low,
            "calibration_slope_high": slope.high,
        }
    if entry["declared"]:
        entry |= _declared_rates(world, dataset)
    else:
        entry["by_judge"] = _rates_by_judge(dataset, sample)
    if served is not None and dataset.has_impressions:
        entry["groups"] = rates_by_group(dataset, sample, served)
    return {**entry, **_with_factorization(world, name, entry)}


def _gain(losses: Mapping[str, Floats], rival: str, sample: HeldOut, rows: Any) -> dict[str, float]:
    """Share of the rival's log-loss that the judge saves, paired row by row, with an interval over users."""
    keep = slice(None) if rows is None else rows
    weight, user = sample.weight[keep], sample.user[keep]
    saved = (losses[rival] - losses["judge"])[keep]
    return ratio_interval(*user_sums(user, saved * weight, losses[rival][keep] * weight)).to_json()


def _later(losses: Mapping[str, Floats], sample: HeldOut) -> dict[str, Any]:
    """The same on the last fifth of the calendar."""
    rows = sample.later
    if len(np.unique(sample.user[rows])) < FEWEST_USERS:
        return {"note": "Too few unseen users in the last fifth of the calendar to tell."}
    weight = sample.weight[rows]
    return {
        "n_users": len(np.unique(sample.user[rows])),
        "log_loss": {model: float(np.average(loss[rows], weights=weight)) for model, loss in losses.items()},
        "gain": {m: _gain(losses, m, sample, rows) for m in losses if m in ("popularity", "base_rate")},
    }


def _declared_rates(world: World, dataset: Dataset) -> dict[str, Any]:
    """What is declared instead of measured: the share of the catalogue that a user took, and the judges' mean over it."""
    judges = world.metrics.get("judges", {})
    said = [judges.get(fold, {}).get("uniform_rate_heldout") for fold in FOLDS]
    shares = []
    for fold in FOLDS:
        users = dataset.users_in(FOLD_NUMBER[fold])
        shares.append(dataset.engaged_counts()[users].to(torch.float64).numpy() / dataset.n_items)
    share = np.concatenate(shares)
    interval = ratio_interval(share, np.ones(len(share)))
    found = {"rate_log": interval.estimate, "rate_log_lo": interval.low, "rate_log_hi": interval.high}
    return found | ({"rate_sim": float(np.mean(said))} if all(s is not None for s in said) else {})


def _rates_by_judge(dataset: Dataset, sample: HeldOut) -> dict[str, Any]:
    """Rates of each judge on the other fold's users; pooled, two judges' levels may be wrong in opposite directions.

    The judge's own level was estimated from about as many users as the log's is here, so the difference has twice the variance
    of the log's rate: `low` and `high` are wider than the log's interval by the square root of two.
    """
    fold = dataset.fold.numpy()[sample.user]
    found = {}
    for judge, users in (("A", FOLD_NUMBER["B"]), ("B", FOLD_NUMBER["A"])):
        rows = fold == users
        log = clustered_mean(sample.target[rows], sample.user[rows], sample.weight[rows])
        half = float(np.sqrt(2.0)) * 0.5 * (log.high - log.low)
        found[judge] = {
            "rate_sim": float(np.average(sample.prob["judge"][rows], weights=sample.weight[rows])),
            "rate_log": log.estimate,
            "rate_log_lo": log.low,
            "rate_log_hi": log.high,
            "low": log.estimate - half,
            "high": log.estimate + half,
        }
    return found


def rates_by_group(dataset: Dataset, sample: HeldOut, served: NDArray[np.object_]) -> dict[str, Any]:
    """Simulated and logged rate by who served the row and how long the history was.

    Args:
        dataset: A log with impressions.
        sample: Predictions.
        served: (n_rows of the log,), the strategy that served each row.

    Returns:
        Rates by `strategy, segment`; groups of few users are left out.
    """
    by = served[sample.row]
    segment = np.digitize(lengths_before(dataset, torch.from_numpy(sample.row)).numpy(), SEGMENT_EDGES)
    found = {}
    for name in np.unique(by):
        for index, words in enumerate(SEGMENTS):
            rows = (by == name) & (segment == index)
            if len(np.unique(sample.user[rows])) < FEWEST_USERS:
                continue
            interval = clustered_mean(sample.target[rows], sample.user[rows], sample.weight[rows])
            found[f"{name}, {words}"] = {
                "rate_sim": float(np.average(sample.prob["judge"][rows], weights=sample.weight[rows])),
                "rate_log": interval.estimate,
                "rate_log_lo": interval.low,
                "rate_log_hi": interval.high,
                "n_rows": int(rows.sum()),
            }
    return found


def _with_factorization(world: World, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Matrix factorisation as the build measured it; its loss is moved to this sample by its ratio to the judge's."""
    found = []
    for fold in FOLDS:
        facts = world.metrics.get("judges", {}).get(fold, {}).get("outcomes", {}).get(name, {})
        loss = facts.get("heldout", {}).get("log_loss", {})
        if "mf" in loss and "judge" in loss:
            found.append((float(loss["judge"]), float(loss["mf"])))
    if not found:
        return {}
    ratio = float(np.mean([mf / judge for judge, mf in found]))
    losses = {**entry["log_loss"], "mf": entry["log_loss"]["judge"] * ratio}
    return {"log_loss": losses, "log_loss_by_fold": {"mf": [list(pair) for pair in found]}}


def outcome_from_world(world: World, name: str) -> dict[str, Any]:
    """The outcome's entry without the log, from what the build measured: no intervals, so little can be told."""
    parts = []
    for fold in FOLDS:
        judge = world.metrics.get("judges", {}).get(fold, {})
        facts = judge.get("outcomes", {}).get(name, {}).get("heldout", {})
        if "log_loss" in facts:
            parts.append((judge, facts))
    if not parts:
        return {}

    def mean(key: str) -> float:
        return float(np.mean([facts[key] for _, facts in parts]))

    models = [m for m in parts[0][1]["log_loss"] if all(m in facts["log_loss"] for _, facts in parts)]
    rate = mean("rate_observed")
    pairs = {m: [[f["log_loss"]["judge"], f["log_loss"][m]] for _, f in parts] for m in models if m != "judge"}
    return {
        "declared": bool(parts[0][0].get("sampled_negatives")) and name == world.outcomes[0],
        "ece": mean("ece"),
        "ece_share_of_rate": mean("ece") / max(rate, 1e-12),
        "calibration_slope": mean("calibration_slope"),
        "rate_sim": mean("rate_predicted"),
        "rate_log": rate,
        "log_loss": {m: float(np.mean([f["log_loss"][m] for _, f in parts])) for m in models},
        "log_loss_by_fold": pairs,
        "reliability": parts[0][1].get("reliability"),
    }


def losses_by_model(outcomes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Held-out log-loss by model and outcome."""
    found: dict[str, dict[str, float]] = {}
    for name, entry in outcomes.items():
        for model, loss in entry.get("log_loss", {}).items():
            found.setdefault(model, {})[name] = loss
    return found


# ------------------------------------------------------------------------------------------------ time, check, windows
def time_part(world: World, dataset: Dataset) -> dict[str, Any]:
    """Session lengths and return times of users that the judges have not seen, log against model."""
    judges = world.metrics.get("judges", {})

    def why(key: str, otherwise: str) -> dict[str, Any]:
        note = judges.get("A", {}).get(key, {}).get("note", otherwise)
        return {"note": f"{note[:1].upper()}{note[1:]}."}

    sessions = session_curves(world, dataset)
    returns = return_curves(world, dataset)
    for part in (sessions, returns):
        if part is not None and part["n"] == 0:
            part["note"] = "Nobody was seen to leave or to come back: too small to tell."
    nobody = "not identified: users never leave in this world, an episode ends at its horizon"
    return {
        "sessions": sessions or why("leaving", nobody),
        "returns": returns or why("returning", "not identified: the log does not say when users come back"),
    }


def predictive_part(world: World) -> dict[str, Any]:
    """The posterior predictive check of the build, by how the events were halved."""
    check = world.metrics.get("predictive_check")
    if not isinstance(check, Mapping):
        return {}
    found = {"interleaved": {k: v for k, v in check.items() if k != "consecutive_halves"}}
    if isinstance(check.get("consecutive_halves"), Mapping):
        found["consecutive"] = dict(check["consecutive_halves"])
    return found


def windows_part(world: World, dataset: Dataset, *, quick: bool, seed: int) -> dict[str, Any]:
    """Order of the strategies and look of the sessions: the log's windows of events against the world's."""
    if not all(judges_of(world, fold) for fold in FOLDS):
        return {"concordance": {"note": LOGGED}, "classifier_auc": {"note": LOGGED}}
    log, made, user = [], [], []
    classifier: dict[str, Any] = {"note": "The log has too few users with enough events to tell."}
    for prefix in (0, CLASSIFIER_PREFIX) if quick else PREFIXES:
        found = windows(
            world,
            dataset,
            world.top_lists,
            prefix=prefix,
            events=EVENTS,
            list_length=min(LIST_LENGTH, max(dataset.n_items // 10, 1)),
            replicas=3 if quick else 10,
            max_users=150 if quick else 500,
            seed=seed,
        )
        if found is None:
            continue
        log.append(found.hits(found.real, dataset.n_items).numpy())
        made.append(found.hits(found.made, dataset.n_items).mean(dim=0).numpy())
        user.append(found.user.numpy())
        if prefix == CLASSIFIER_PREFIX and len(found.user) >= FEWEST_WINDOWS:
            names = (*FEATURES, *(f"hits_{name}" for name in world.strategies))
            real = window_features(world, dataset, found, found.real).numpy()
            emitted = window_features(world, dataset, found, found.made[0]).numpy()
            classifier = two_sample_auc(real, emitted, found.user.numpy(), names, seed=seed)
    if not log or len(np.unique(np.concatenate(user))) < FEWEST_USERS:
        return {
            "concordance": {"note": "The log has too few users with enough events to tell."},
            "classifier_auc": classifier,
        }
    everybody = np.concatenate(user)
    # one row a user: the mean over the prefixes that the user has
    rows = [per_user(everybody, np.concatenate(parts)) for parts in (log, made)]
    agreement = concordance(rows[0], rows[1], world.strategies, seed=seed).to_json(world.strategies)
    return {"concordance": {**agreement, "n_users": len(rows[0])}, "classifier_auc": classifier}
