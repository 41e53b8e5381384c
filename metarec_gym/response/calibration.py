"""From scores to probabilities that mean what they say, and the numbers that show whether they do.

All functions take weights: a positives-only log is scored on a population in which taken items have the weight of the base
rate. Probabilities are averages over the random effects, because a new user's coefficients are not known. z . phi is one normal
number, whatever the length of z, so the average is an integral in one dimension: Gauss-Hermite nodes, no random draws.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

N_NODES = 11
"""Nodes of the average over random effects: exact to 1e-4 for standard deviations up to 2."""
_TINY = 1e-7


@functools.cache
def _nodes(count: int) -> tuple[Tensor, Tensor]:
    from numpy.polynomial.hermite_e import hermegauss

    at, weight = hermegauss(count)
    return torch.from_numpy(at).to(torch.float32), torch.from_numpy(weight / weight.sum()).to(torch.float32)


@dataclass(frozen=True)
class Spread:
    """The random effects' part of each logit: normal with a mean and a standard deviation; float32 (n,) each."""

    mean: Tensor
    sd: Tensor

    @classmethod
    def of(cls, phi: Tensor, mean: Tensor, factor: Tensor) -> Spread:
        """Distribution of z . phi for z ~ N(mean, factor factor').

        Args:
            phi: float32 (n, m, f).
            mean: float32 (n, f).
            factor: float32 (n, f, f).

        Returns:
            The n * m spreads.
        """
        centre = torch.einsum("nmf,nf->nm", phi, mean)
        return cls(centre.flatten(), (phi @ factor).norm(dim=-1).flatten())

    def moved(self, by: Tensor) -> Spread:
        """The same with `by` (n,) added."""
        return Spread(self.mean + by, self.sd)

    def widened(self, sd: float) -> Spread:
        """The same with an independent normal term of standard deviation `sd` added."""
        return self if sd == 0.0 else Spread(self.mean, torch.sqrt(self.sd.square() + sd**2))

    def at(self, logit: Tensor) -> Tensor:
        """Logits at the nodes; (n,) -> (n, N_NODES)."""
        return (logit + self.mean)[:, None] + self.sd[:, None] * _nodes(N_NODES)[0]

    def average(self, value: Tensor) -> Tensor:
        """Average over the nodes; (n, N_NODES) -> float64 (n,)."""
        return (value @ _nodes(N_NODES)[1]).to(torch.float64)


def marginal(score: Tensor, spread: Spread, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """E[logistic(scale * score + shift + z . phi)]; score (n,) -> float64 (n,)."""
    return spread.average(torch.sigmoid(spread.at(scale * score + shift)))


def fit_scale_and_shift(
    score: Tensor, spread: Spread, target: Tensor, weight: Tensor, *, steps: int = 25
) -> tuple[float, float]:
    """Maximum likelihood of p = E[logistic(scale * score + shift + z . phi)], by Fisher scoring.

    Args:
        score: (n,), fixed effects.
        spread: Distribution of the random effects' part, which has its scale already.
        target: (n,) in [0, 1].
        weight: (n,) >= 0.
        steps: Most steps.

    Returns:
        scale > 0 and shift.
    """
    target, weight = target.to(torch.float64), weight.to(torch.float64) / weight.sum()
    rate = float((weight * target).sum())
    parameters = torch.tensor([1.0, 0.0], dtype=torch.float64)
    parameters[1] = solve_shift(score, spread, 1.0, weight, min(max(rate, 1e-6), 1 - 1e-6))
    for _ in range(steps):
        p_node = torch.sigmoid(spread.at(float(parameters[0]) * score + float(parameters[1])))
        p = spread.average(p_node).clamp(_TINY, 1 - _TINY)
        slope = spread.average(p_node * (1.0 - p_node))
        jacobian = torch.stack([slope * score, slope], dim=1)
        precision = weight / (p * (1.0 - p))
        gradient = ((target - p) * precision) @ jacobian
        information = jacobian.T @ (jacobian * precision[:, None]) + 1e-9 * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(information, gradient).clamp(-1.0, 1.0)
        parameters = parameters + step
        # a negative scale would turn the judge round: it is held at the edge instead
        parameters[0] = parameters[0].clamp(min=0.05)
        if float(step.abs().max()) < 1e-6:
            break
    return float(parameters[0]), float(parameters[1])


def solve_shift(score: Tensor, spread: Spread, scale: float, weight: Tensor, rate: float) -> float:
    """Shift at which the weighted mean of `marginal` is `rate`, by bisection; score and weight (n,)."""
    if not 0.0 < rate < 1.0:
        raise ValueError(f"a rate of {rate} cannot be reached by a logistic model; expected a number inside (0, 1)")
    weight = weight.to(torch.float64) / weight.sum()
    low, high = -40.0, 40.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        if float((weight * marginal(score, spread, scale, middle)).sum()) < rate:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def fit_pair_sd(logit: Tensor, target: Tensor, pair: Tensor) -> tuple[float, float, float]:
    """Standard deviation of a normal term that all rows of one pair share, by maximum likelihood.

    Args:
        logit: (n,), what is known of each row without the term.
        target: (n,) in [0, 1].
        pair: int64 (n,), equal for rows of one pair.

    Returns:
        The standard deviation, at most 4; its gain of log-likelihood over 0; and the factor by which the other terms grow
        when the average over the new one is no longer hidden in them.
    """
    number = torch.unique(pair, return_inverse=True)[1]
    n_pairs, weight = int(number.max()) + 1, torch.ones_like(logit)
    at, share = (x.to(torch.float64) for x in _nodes(N_NODES))

    def profile(sd: float) -> tuple[float, float]:
        # the term flattens the average probability: scale and shift of the rest go with it
        spread = Spread(torch.zeros_like(logit), torch.full_like(logit, sd))
        scale, shift = fit_scale_and_shift(logit, spread, target, weight)
        value = (scale * logit + shift).to(torch.float64)[:, None] + sd * at
        each = target.to(torch.float64)[:, None] * value - torch.nn.functional.softplus(value)
        total = torch.zeros(n_pairs, N_NODES, dtype=torch.float64).index_add_(0, number, each)
        return float(torch.logsumexp(total + share.log(), dim=1).sum()), scale

    # golden section: the profile has one top
    ratio, low, high = (math.sqrt(5.0) - 1.0) / 2.0, 0.0, 4.0
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = profile(left)[0], profile(right)[0]
    while high - low > 0.02:
        if at_left > at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = profile(left)[0]
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = profile(right)[0]
    sd = 0.5 * (low + high)
    best, scale = profile(sd)
    without, plain = profile(0.0)
    return sd, best - without, scale / plain


def logistic_fit(
    x: Tensor, target: Tensor, weight: Tensor, *, offset: Tensor | None = None, ridge: float = 1e-6
) -> Tensor:
    """Weighted logistic regression by Newton; x (n, k) with its constant column, offset (n,) -> coefficients float64 (k,)."""
    x, target = x.to(torch.float64), target.to(torch.float64)
    weight = weight.to(torch.float64) / weight.sum()
    known = torch.zeros_like(target) if offset is None else offset.to(torch.float64)
    beta = torch.zeros(x.shape[1], dtype=torch.float64)
    eye = torch.eye(x.shape[1], dtype=torch.float64) * ridge
    for _ in range(50):
        p = torch.sigmoid(x @ beta + known)
        gradient = x.T @ (weight * (target - p)) - ridge * beta
        hessian = x.T @ (x * (weight * p * (1 - p))[:, None]) + eye
        step = torch.linalg.solve(hessian, gradient)
        # the whole step is shortened: cut coordinate by coordinate it would point elsewhere
        step = step * min(1.0, 4.0 / float((x @ step).abs().max().clamp(min=1e-12)))
        beta = beta + step
        if float(step.abs().max()) < 1e-9:
            break
    return beta


def log_loss(p: Tensor, target: Tensor, weight: Tensor) -> float:
    """Weighted mean of -log probability of what happened, in nats."""
    p, target, weight = p.to(torch.float64).clamp(_TINY, 1 - _TINY), target.to(torch.float64), weight.to(torch.float64)
    loss = -(target * p.log() + (1 - target) * (1 - p).log())
    return float((weight * loss).sum() / weight.sum())


def calibration_slope(p: Tensor, target: Tensor, weight: Tensor) -> float:
    """Slope of a logistic regression of what happened on logit(p): 1 = right, below 1 = too sure of itself."""
    logit = torch.logit(p.to(torch.float64).clamp(_TINY, 1 - _TINY))
    if float(logit.std(unbiased=False)) < 1e-9:
        return math.nan
    return float(logistic_fit(torch.stack([torch.ones_like(logit), logit], dim=1), target, weight)[1])


def reliability(p: Tensor, target: Tensor, weight: Tensor, *, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted rate, observed rate and weight share of bins of equal weight, sorted by prediction; float64 (bins,) each."""
    p, target, weight = p.to(torch.float64), target.to(torch.float64), weight.to(torch.float64)
    order = torch.argsort(p, stable=True)
    p, target, weight = p[order], target[order], weight[order] / weight.sum()
    middle = torch.cumsum(weight, dim=0) - 0.5 * weight
    bin_of = (middle * bins).to(torch.int64).clamp(max=bins - 1)
    # equal predictions belong to one bin: a constant model has one bin, not `bins` noisy ones
    fresh = torch.ones_like(bin_of, dtype=torch.bool)
    fresh[1:] = p[1:] != p[:-1]
    group = torch.cumsum(fresh.to(torch.int64), dim=0) - 1
    bin_of = bin_of[fresh][group]
    share = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, weight)
    predicted = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, weight * p)
    observed = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, weight * target)
    filled = share > 0
    return predicted[filled] / share[filled], observed[filled] / share[filled], share[filled]


def expected_calibration_error(p: Tensor, target: Tensor, weight: Tensor, *, bins: int = 15) -> float:
    """Weighted mean of |predicted - observed| over bins of equal weight."""
    predicted, observed, share = reliability(p, target, weight, bins=bins)
    return float((share * (predicted - observed).abs()).sum())
