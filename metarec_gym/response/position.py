"""How much a place in the slate is looked at: fitted where impressions say the position, a documented prior elsewhere.

    logit P(click | item i, position j) = b_i + a_j,     b_i ~ N(b, 1 / l2),  a_0 = 0

Items carry their own effect, so that a policy that puts good items first is not taken for examination. The effect adds to the
logit, as in the judge: at the low rates of real logs that is the position-based model (Richardson et al., WWW 2007), in which the
probability of examination multiplies the click's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from metarec_gym.data.impressions import ImpressionTable

PRIOR_DECAY = 0.5
"""Where a log does not say positions: logit lost per doubling of the place in sensitivity worlds (`position_decay`)."""


@dataclass(frozen=True)
class PositionEffect:
    """Fitted effect of each place in the slate on the gate's logit."""

    logit: Tensor
    """float64 (n_positions,): a_j, the first place is 0."""
    covariance: Tensor
    """float64 (n_positions - 1, n_positions - 1): of the places after the first."""
    n_rows: int
    """Impressions."""
    n_clicks: int
    """Clicks among them."""

    @property
    def standard_error(self) -> Tensor:
        """float64 (n_positions,): of a_j - a_0."""
        return torch.cat([self.covariance.new_zeros(1), self.covariance.diagonal().sqrt()])

    @property
    def decay(self) -> tuple[float, float]:
        """Logit lost per doubling of the place, and its standard error: what `position_decay` of the environments means.

        Generalised least squares of the places' effects on -log2(1 + j).
        """
        x = -torch.log2(1.0 + torch.arange(1, len(self.logit), dtype=torch.float64))
        weighted = torch.linalg.solve(self.covariance, x)
        precision = float(weighted @ x)
        return float(weighted @ self.logit[1:]) / precision, precision**-0.5

    @property
    def identified(self) -> bool:
        """Whether some place differs from the first one by more than 1.96 standard errors."""
        return bool((self.logit[1:].abs() > 1.96 * self.standard_error[1:]).any())


def fit_position(item: Tensor, position: Tensor, click: Tensor, *, l2: float = 2.0, rounds: int = 50) -> PositionEffect:
    """Penalised maximum likelihood by Newton's method.

    Args:
        item: int64 (n,), 0..n_items-1.
        position: int64 (n,), place in the slate from 0.
        click: (n,), 0 or 1.
        l2: Precision of the items' effects around their mean.
        rounds: Most Newton steps.

    Returns:
        The effect; its standard errors come from the observed information.

    Raises:
        ValueError: When there is only one position, or no click in one of them.
    """
    n_items, n_positions = int(item.max()) + 1, int(position.max()) + 1
    y = click.to(torch.float64)
    shown = torch.zeros(n_items, n_positions, dtype=torch.float64)
    clicked = shown.clone()
    # only how often an item was shown and clicked in a place matters: millions of rows become one small table
    cell = item * n_positions + position
    shown.view(-1).index_add_(0, cell, torch.ones_like(y))
    clicked.view(-1).index_add_(0, cell, y)
    if n_positions < 2 or bool((clicked.sum(dim=0) == 0).any()):
        raise ValueError(
            f"{n_positions} positions with {[int(c) for c in clicked.sum(dim=0)]} clicks; expected two positions or more and a "
            "click in each: use a larger sample of impressions"
        )
    rate = clicked.sum() / shown.sum()
    # parameters: mean, items around it, places after the first
    free = 1 + n_items + n_positions - 1
    theta = torch.zeros(free, dtype=torch.float64)
    theta[0] = torch.logit(rate)
    penalty = torch.zeros(free, dtype=torch.float64)
    penalty[1 : 1 + n_items] = l2
    information = torch.eye(free, dtype=torch.float64)
    for _ in range(rounds):
        places = torch.cat([theta.new_zeros(1), theta[1 + n_items :]])
        p = torch.sigmoid(theta[0] + theta[1 : 1 + n_items, None] + places[None, :])
        residual, weight = clicked - shown * p, shown * p * (1.0 - p)
        gradient = torch.cat([residual.sum()[None], residual.sum(dim=1), residual.sum(dim=0)[1:]]) - penalty * theta
        information = _information(weight) + torch.diag(penalty)
        step = torch.linalg.solve(information, gradient)
        # damped: a first step from the mean may overshoot where an item was never clicked
        theta = theta + step * min(1.0, 2.0 / float(step.abs().max().clamp(min=1e-12)))
        if float(step.abs().max()) < 1e-9:
            break
    covariance = torch.linalg.inv(information)
    places = torch.cat([theta.new_zeros(1), theta[1 + n_items :]])
    return PositionEffect(places, covariance[1 + n_items :, 1 + n_items :], len(y), int(y.sum()))


def _information(weight: Tensor) -> Tensor:
    """Observed information of (mean, items, places after the first) from the cells' weights (n_items, n_positions)."""
    n_items, n_positions = weight.shape
    by_item, by_place = weight.sum(dim=1), weight.sum(dim=0)[1:]
    top = torch.cat([weight.sum()[None], by_item, by_place])[None]
    middle = torch.cat([by_item[:, None], torch.diag(by_item), weight[:, 1:]], dim=1)
    bottom = torch.cat([by_place[:, None], weight[:, 1:].T, torch.diag(by_place)], dim=1)
    assert middle.shape == (n_items, n_items + n_positions)
    return torch.cat([top, middle, bottom])


def position_of_impressions(table: ImpressionTable, *, campaign: str | None = None) -> PositionEffect:
    """The effect of positions in an impression table, e.g. Open Bandit (its positions count from 1).

    Args:
        table: Impressions with item, position and click.
        campaign: Only this campaign; None takes all, each with items of its own.

    Raises:
        ValueError: When the campaign is unknown, or there are too few clicks.
    """
    frame = table.frame if campaign is None else table.frame[table.frame["campaign"] == campaign]
    if len(frame) == 0:
        raise ValueError(f"no campaign {campaign!r}; there are {sorted(table.frame['campaign'].unique())}")
    names = frame["campaign"].astype(str) + "/" + frame["item_id"].astype(str)
    codes = torch.tensor(names.astype("category").cat.codes.to_numpy(dtype="int64"))
    position = torch.tensor(frame["position"].to_numpy(dtype="int64"))
    return fit_position(codes, position - position.min(), torch.tensor(frame["click"].to_numpy(dtype="float64")))
