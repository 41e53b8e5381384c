"""What predictions for unseen users say of one outcome: place, fatigue, pair effects, scale and shift; and how good they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metarec_gym.response.calibration import (
    Spread,
    calibration_slope,
    expected_calibration_error,
    fit_pair_sd,
    fit_scale_and_shift,
    log_loss,
    logistic_fit,
    marginal,
    reliability,
    solve_shift,
)
from metarec_gym.response.effects import ChoiceData, Effects, cholesky_factor
from metarec_gym.response.frozen import FrozenResponse
from metarec_gym.response.network import shown_logit
from metarec_gym.response.rows import MAX_SLATE, Rows
from metarec_gym.response.stacking import Stack, fit_stack

_FEWEST_SHOWN = 200
"""Rows at a position below which its effect is that of the first position."""
_FEWEST_AGAIN = 300
"""(user, item) pairs met again below which eps_user,item is 0."""
_SURE = 3.84 / 2
"""Gain of log-likelihood from which a parameter is taken to differ from 0 (5 %)."""


@dataclass(frozen=True)
class Sample:
    """Events of users the network has not seen, each with some items: what calibration and scoring read."""

    user: Tensor
    """int64 (n,): index of the user in the dataset."""
    score: Tensor
    """float32 (n, m, n_members): f, without random effects."""
    phi: Tensor
    """float32 (n, m, n_features)."""
    simple: Tensor
    """float32 (n, m, k): what the popularity baseline reads."""
    factors: Tensor
    """float32 (n, m, k): what the matrix factorisation reads besides."""
    target: Tensor
    """float32 (n, m)."""
    weight: Tensor
    """float32 (n, m): sampled negatives have the weight that makes the positives' share the base rate."""
    pair: Tensor
    """int64 (n, 1): number of the event's own (user, item) pair, -1 where the user had taken the item before."""
    position: Tensor
    """int64 (n, 1): place in the slate, 0 where it is not known."""
    exposure: Tensor
    """float32 (n, 1): exposure to the item's categories."""


def weighted_mean(p: Tensor, weight: Tensor) -> float:
    """Mean of p with weights; (n,) each."""
    return float((p * weight).sum() / weight.sum(dtype=torch.float64))


@dataclass(frozen=True)
class Part:
    """What the inner folds say of one outcome."""

    effects: Effects
    scale: float
    shift: float
    pair_sd: float
    """Standard deviation of eps_user,item in logits."""
    shown: Tensor
    """float32 (MAX_SLATE,): effects of positions 1, 2, ... and of exposure, in logits."""
    notes: dict[str, Any]
    stack: Stack | None = None
    """How the score of a rare outcome is made; None = it is the network's."""

    @classmethod
    def described(cls, entry: Mapping[str, Any]) -> Part:
        """From the metrics of a fitted judge; without the users' own posteriors."""
        found, calibration = entry["effects"], entry["calibration"]
        weight = torch.tensor([found["mean"], found["mean_per_sd_log_activity"]], dtype=torch.float64).T
        covariance = torch.tensor(found["covariance"], dtype=torch.float64)
        none = torch.zeros(0, len(weight), dtype=torch.float64)
        effects = Effects(
            weight, covariance, none, none[..., None] * none[:, None], found["log_marginal"], found["rounds"]
        )
        return cls(
            effects,
            calibration["scale"],
            calibration["inner_shift"],
            calibration["pair_sd"],
            torch.tensor(calibration["shown"]),
            dict(calibration["notes"]),
            Stack(**calibration["stack"]) if calibration.get("stack") else None,
        )


def describe(part: Part, response: FrozenResponse, outcome: int) -> dict[str, Any]:
    """The metrics of one outcome that `Part.described` reads again; JSON-able."""
    effects = part.effects
    return {
        "effects": {
            "features": list(response.feature_names),
            "sd": effects.covariance.diagonal().sqrt().tolist(),
            "covariance": effects.covariance.tolist(),
            "mean": effects.weight[:, 0].tolist(),
            "mean_per_sd_log_activity": effects.weight[:, 1].tolist(),
            "log_marginal": effects.log_marginal,
            "rounds": effects.rounds,
        },
        "calibration": {
            "scale": part.scale,
            "shift": float(response.tensors["calibration"][0, outcome, 1]),
            "member_shifts": response.tensors["calibration"][:, outcome, 1].tolist(),
            "inner_shift": part.shift,
            "pair_sd": part.pair_sd,
            "shown": part.shown.tolist(),
            "notes": part.notes,
            **({} if part.stack is None else {"stack": part.stack.to_json()}),
        },
    }


def prior_spread(sample: Sample, part: Part, covariates: Tensor) -> Spread:
    """Random effects of users of whom nothing but x_u is known, at the place where the item was shown."""
    mean = part.effects.prior(covariates)[sample.user].to(torch.float32)
    factor = cholesky_factor(part.effects.covariance).to(torch.float32)
    spread = Spread.of(sample.phi, mean, factor.expand(len(mean), -1, -1)).widened(part.pair_sd)
    if not bool(part.shown.any()):
        return spread
    return spread.moved(shown_logit(part.shown, sample.position.flatten(), sample.exposure.flatten()))


def stacked(sample: Sample, rows: Rows) -> tuple[ChoiceData, Sample, Stack]:
    """A rare outcome's sample and choices with the stacked score in the place of the network's."""
    user, target = torch.searchsorted(rows.users, sample.user), sample.target[:, 0]
    stack = fit_stack(sample.score[:, 0, 0], sample.simple[:, 0], target, user)
    score = stack.score(sample.score[..., 0], sample.simple)
    choice = ChoiceData.answers(user, sample.phi[:, 0], score[:, 0], target, rows.n_users)
    return choice, replace(sample, score=score[..., None]), stack


def calibrated(
    sample: Sample, effects: Effects, covariates: Tensor, rows: Rows, impressions: bool, stack: Stack | None
) -> Part:
    """Place, fatigue, pair effects (the gate of a log with impressions), then scale and shift of f.

    At these, predictions for unknown users (coefficients integrated out) mean what they say. A stacked score has its scale
    already: only the level is fitted, because a second slope from the same few positives is noise.
    """
    shown, notes, pair_sd = torch.zeros(MAX_SLATE), dict[str, Any](), 0.0
    if impressions:
        local = torch.searchsorted(rows.users, sample.user)
        taste = torch.einsum("nmf,nf->nm", sample.phi, effects.mean[local].to(torch.float32)).flatten()
        shown, logit, notes = _fit_shown(sample, taste)
        pair_sd, growth, notes["pair_sd"] = _fit_pair(sample, logit)
        # effects estimated with eps averaged out are flatter than those next to it
        shown = shown * growth
    part = Part(effects, 1.0, 0.0, pair_sd, shown, notes)
    spread = prior_spread(sample, part, covariates)
    score, target, weight = sample.score[..., 0].flatten(), sample.target.flatten(), sample.weight.flatten()
    if stack is not None:
        shift = solve_shift(score, spread, 1.0, weight, min(max(weighted_mean(target, weight), 1e-6), 1.0 - 1e-6))
        return Part(effects, 1.0, shift, pair_sd, shown, notes, stack)
    scale, shift = fit_scale_and_shift(score, spread, target, weight)
    return Part(effects, scale, shift, pair_sd, shown, notes)


def _fit_shown(sample: Sample, taste: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Effects of place and exposure by logistic regression next to f, with the users' own taste as offset.

    Returns:
        `Part.shown`, the logit of every row, and what was found: gain of log-likelihood and whether it is beyond chance.
    """
    from scipy.stats import chi2

    position, exposure, target = sample.position.flatten(), sample.exposure.flatten(), sample.target.flatten()
    weight = sample.weight.flatten()
    counts = torch.bincount(position, minlength=MAX_SLATE)
    places = [int(p) for p in torch.nonzero(counts >= _FEWEST_SHOWN).flatten() if p > 0]
    blocks = {}
    if places and int(counts[0]) >= _FEWEST_SHOWN:
        blocks["position"] = torch.stack([(position == p).to(torch.float64) for p in places], dim=1)
    if float(exposure.std(unbiased=False)) > 1e-6:
        blocks["fatigue"] = exposure[:, None].to(torch.float64)
    base = torch.stack([torch.ones_like(taste), sample.score[..., 0].flatten()], dim=1).to(torch.float64)

    def fitted(names: list[str]) -> tuple[Tensor, Tensor, float]:
        x = torch.cat([base, *(blocks[name] for name in names)], dim=1)
        beta = logistic_fit(x, target, weight, offset=taste)
        logit = x @ beta + taste
        return beta, logit, -log_loss(torch.sigmoid(logit), target, weight) * len(target)

    notes: dict[str, Any] = {}
    kept, whole = list(blocks), fitted(list(blocks))[2]
    for name, block in blocks.items():
        gain = whole - fitted([other for other in blocks if other != name])[2]
        identified = gain > 0.5 * float(chi2.ppf(0.95, block.shape[1]))
        notes[name] = {"log_likelihood_gain": gain, "identified": identified}
        if not identified:
            kept.remove(name)
    beta, logit, _ = fitted(kept)
    shown, at = torch.zeros(MAX_SLATE), base.shape[1]
    if "position" in kept:
        shown[torch.tensor(places) - 1] = beta[at : at + len(places)].to(torch.float32)
        at += len(places)
    if "fatigue" in kept:
        shown[-1] = float(beta[at])
    return shown, logit.to(torch.float32), notes


def _fit_pair(sample: Sample, logit: Tensor) -> tuple[float, float, dict[str, Any]]:
    """Standard deviation of eps_user,item from items that a user met again before taking them; 0 where there are few.

    Returns:
        It, the factor by which the other effects grow next to it, and what was found.
    """
    pair, fresh = sample.pair.flatten(), sample.pair.flatten() >= 0
    again = int((torch.unique(pair[fresh], return_counts=True)[1] > 1).sum())
    if again < _FEWEST_AGAIN:
        return 0.0, 1.0, {"pairs_met_again": again, "identified": False}
    sd, gain, growth = fit_pair_sd(logit[fresh], sample.target.flatten()[fresh], pair[fresh])
    identified = gain > _SURE
    notes = {"pairs_met_again": again, "log_likelihood_gain": gain, "identified": identified}
    return (sd, growth, notes) if identified else (0.0, 1.0, notes)


def fit_baselines(sample: Sample) -> dict[str, Tensor]:
    """Coefficients of the popularity logistic and of matrix factorisation next to it, on users that neither had seen."""
    target, weight = sample.target.flatten(), sample.weight.flatten()
    both = torch.cat([sample.simple, sample.factors], dim=-1)
    return {
        "popularity": logistic_fit(sample.simple.flatten(0, 1), target, weight),
        "mf": logistic_fit(both.flatten(0, 1), target, weight),
    }


def heldout_calibration(entry: Mapping[str, Any], response: FrozenResponse, outcome: int) -> list[tuple[float, float]]:
    """Scale and shift of each member on the population of the held-out sample.

    Its positives' share is that of the inner folds' sample, where the gate's declared base rate is another population's: the
    members' differences are kept, the level is the inner folds'.
    """
    scale, level = entry["calibration"]["scale"], entry["calibration"]["inner_shift"]
    shifts = response.tensors["calibration"][:, outcome, 1].tolist()
    return [(scale, level + shift - shifts[0]) for shift in shifts]


def heldout_score(
    sample: Sample,
    part: Part,
    covariates: Tensor,
    calibration: list[tuple[float, float]],
    baselines: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Held-out numbers of one outcome: the judge with unknown coefficients, averaged over members, and the baselines."""
    spread = prior_spread(sample, part, covariates)
    target, weight = sample.target.flatten(), sample.weight.flatten()
    members = torch.stack(
        [
            marginal(sample.score[..., member].flatten(), spread, scale, shift)
            for member, (scale, shift) in enumerate(calibration)
        ]
    )
    judge = members.mean(dim=0)
    both = torch.cat([sample.simple, sample.factors], dim=-1).flatten(0, 1).to(torch.float64)
    simple = torch.sigmoid(sample.simple.flatten(0, 1).to(torch.float64) @ baselines["popularity"])
    observed = float((weight * target).sum(dtype=torch.float64) / weight.sum(dtype=torch.float64))
    predicted, seen, share = reliability(judge, target, weight)
    return {
        "n_events": len(sample.user),
        "n_rows": target.numel(),
        "n_users": int(torch.unique(sample.user).numel()),
        "log_loss": {
            "judge": log_loss(judge, target, weight),
            "mf": log_loss(torch.sigmoid(both @ baselines["mf"]), target, weight),
            "popularity": log_loss(simple, target, weight),
            "base_rate": log_loss(torch.full_like(judge, observed), target, weight),
        },
        "log_loss_members": [log_loss(p, target, weight) for p in members],
        # standard deviation between members over the mean, averaged over rows
        "member_disagreement": weighted_mean(members.std(dim=0, unbiased=False) / judge.clamp(min=1e-12), weight),
        "calibration_slope": calibration_slope(judge, target, weight),
        "ece": expected_calibration_error(judge, target, weight),
        "rate_predicted": weighted_mean(judge, weight),
        "rate_observed": observed,
        "reliability": {"predicted": predicted.tolist(), "observed": seen.tolist(), "share": share.tolist()},
    }
