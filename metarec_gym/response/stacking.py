"""A rare outcome's score, stacked on a reference that a small log can carry.

A network has a vector and a bias for every item; with less than about one positive an item it learns little that lasts, and its
score is off by a factor that changes from fold to fold. Stacking (Wolpert, Neural Networks 1992; Breiman, Machine Learning 1996)
asks the inner folds, on users that neither had seen, how much of it to believe:

    logit = constant + a log_popularity(item) + b level(item) + c f(state, item)

`level` is the item's smoothed rate of the outcome. Each coefficient of a column with unit variance has the prior N(0, 1/4), so
few positives mean small ones, and the network stays only where its gain of likelihood is beyond chance: otherwise c = 0, and what
the judge says is what the popularity of the outcome says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from metarec_gym.response.network import Network

ALIKE = 0.2
"""How alike the answers of one user are, as an intraclass correlation: users' own rates differ by a standard deviation of 0.9 to
1.2 logits on Deskdrop, which is 0.2 to 0.3. One user with 100 bookmarks then counts as much as 5 strangers, not as 100."""
_PRIOR_SD = 0.5
_SURE = 3.84 / 2
"""Gain of log-likelihood from which the network is taken to add something (5 %)."""


@dataclass(frozen=True)
class Stack:
    """How an outcome's score is made; in logits per unit of each column."""

    constant: float
    popularity: float
    """Weight of the log density of the item among the gate's events."""
    level: float
    """Weight of the item's smoothed rate of the outcome, in logits around the mean."""
    network: float
    """Weight of the network's score; 0 = the reference answers alone."""
    network_gain: float
    """Gain of penalised log-likelihood by the network, users weighted as in the fit."""

    def score(self, network: Tensor, simple: Tensor) -> Tensor:
        """The stacked score; network (...) and simple (..., 3): 1, log density, level -> (...)."""
        reference = torch.tensor([self.constant, self.popularity, self.level], dtype=simple.dtype)
        return self.network * network + simple @ reference

    def network_of(self, network: Network, log_density: Tensor, level: Tensor) -> Network:
        """The network whose score is the stacked one; log_density and level float32 (n_items,)."""
        reference = self.constant + self.popularity * log_density + self.level * level
        return replace(
            network,
            vector=self.network * network.vector,
            bias=self.network * network.bias + reference.to(torch.float32),
        )

    def to_json(self) -> dict[str, float]:
        """The numbers by name; `Stack(**numbers)` reads them."""
        return asdict(self)


def user_weight(user: Tensor, alike: float = ALIKE) -> Tensor:
    """Weight of each row when a user's answers are alike: 1 / (1 + alike (n - 1)) for a user of n rows.

    The rows of a user then weigh together what independent ones would carry of a mean (Liang and Zeger, Biometrika 1986).

    Args:
        user: int64 (n,).
        alike: Correlation of two answers of one user.

    Returns:
        float64 (n,).
    """
    _, number, count = torch.unique(user, return_inverse=True, return_counts=True)
    weight: Tensor = 1.0 / (1.0 + alike * (count[number].to(torch.float64) - 1.0))
    return weight


def fit_stack(network: Tensor, simple: Tensor, target: Tensor, user: Tensor) -> Stack:
    """Fits a stack on predictions for users that the network has not seen.

    Args:
        network: float (n,), the network's score of each row.
        simple: float (n, 3): 1, log density, level.
        target: float (n,) in [0, 1].
        user: int64 (n,), whose row it is.

    Returns:
        The stack; its network weight is never negative.
    """
    columns = torch.cat([simple[:, 1:], network[:, None]], dim=1).to(torch.float64)
    centre, spread = columns.mean(dim=0), columns.std(dim=0, unbiased=False)
    # a column that never varies says nothing: it stands still at weight 0
    unit = (columns - centre) / spread.clamp(min=1e-9)
    weight, target = user_weight(user), target.to(torch.float64)
    reference, without = _penalised_fit(unit[:, :2], target, weight)
    full, gained = _penalised_fit(unit, target, weight)
    gain = gained - without
    kept = float(full[3]) > 0.0 and gain > _SURE
    beta = full if kept else torch.cat([reference, torch.zeros(1, dtype=torch.float64)])
    slope = torch.where(spread > 1e-9, beta[1:] / spread.clamp(min=1e-9), torch.zeros_like(spread))
    popularity, level, own = slope.tolist()
    return Stack(float(beta[0] - centre @ slope), popularity, level, own, gain)


def _penalised_fit(unit: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """Logistic regression with a free constant and the prior on the columns; coefficients, and log-likelihood + log prior."""
    x = torch.cat([torch.ones(len(unit), 1, dtype=torch.float64), unit], dim=1)
    precision = torch.full((x.shape[1],), _PRIOR_SD**-2, dtype=torch.float64)
    precision[0] = 1e-6
    beta = torch.zeros(x.shape[1], dtype=torch.float64)
    rate = ((weight * target).sum() / weight.sum()).clamp(1e-6, 1.0 - 1e-6)
    beta[0] = torch.logit(rate)
    for _ in range(50):
        p = torch.sigmoid(x @ beta)
        gradient = x.T @ (weight * (target - p)) - precision * beta
        hessian = x.T @ (x * (weight * p * (1.0 - p))[:, None]) + torch.diag(precision)
        step = torch.linalg.solve(hessian, gradient)
        # the whole step is shortened: cut coordinate by coordinate it would point elsewhere
        step = step * min(1.0, 4.0 / float((x @ step).abs().max().clamp(min=1e-12)))
        beta = beta + step
        if float(step.abs().max()) < 1e-9:
            break
    logit = x @ beta
    likelihood = (weight * (target * logit - torch.nn.functional.softplus(logit))).sum()
    return beta, float(likelihood - 0.5 * (precision[1:] * beta[1:].square()).sum())
