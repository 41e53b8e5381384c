"""A test while it runs: the effect after each user, with bounds that may be looked at every day."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from metarec_gym.evaluation.ab_test.assignment import check_weights
from metarec_gym.evaluation.ab_test.estimates import Floats, Moments, compare
from metarec_gym.evaluation.ab_test.sequential import (
    MIN_USERS,
    always_valid_p,
    boundary,
    log_count_ratio,
    log_mixture_ratio,
)
from metarec_gym.evaluation.ab_test.table import Metric, metric_columns

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Path:
    """An effect look by look; NaN before both arms have enough users. L looks; float64 (L,) each, leading dimensions allowed.

    Attributes:
        users: Users so far in both arms.
        effect: Treatment minus control.
        low: Lower bound of the confidence sequence.
        high: Upper bound.
        p_value: Always-valid p-value.
    """

    users: Floats
    effect: Floats
    low: Floats
    high: Floats
    p_value: Floats

    def decided_at(self) -> int | None:
        """Users after which the sequence first excluded 0; None when it never did. One path only."""
        outside = np.flatnonzero((self.low > 0) | (self.high < 0))
        return int(self.users[outside[0]]) if len(outside) else None


def effect_path(
    treated: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    columns: Floats,
    *,
    cuped: bool = False,
    alpha: float = 0.05,
    best_at: float | None = None,
    min_users: int = MIN_USERS,
) -> Path:
    """The effect after every user of two arms.

    Args:
        treated: bool (..., users), in order of arrival.
        columns: A metric's four numbers, float64 (..., users, 4).
        cuped: Whether to adjust by the covariate.
        alpha: 1 - confidence level, over all looks together.
        best_at: Users at which the sequence is narrowest; half of all by default. Decide it beforehand.
        min_users: Users in each arm before the first look.

    Returns:
        One look a user.
    """
    control, treatment = Moments.running(~treated, columns), Moments.running(treated, columns)
    found = compare(control, treatment, cuped=cuped)
    users = control.count + treatment.count
    best = users.shape[-1] / 2.0 if best_at is None else best_at
    early = (np.minimum(control.count, treatment.count) < min_users) | ~(found.se > 0)
    half = boundary(users, best_at=best, alpha=alpha) * found.se
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.where(early, 0.0, found.estimate / found.se)
    ratio = np.where(early, 0.0, log_mixture_ratio(score, users, best_at=best, alpha=alpha))
    effect, low, high = (
        np.where(early, np.nan, x) for x in (found.estimate, found.estimate - half, found.estimate + half)
    )
    return Path(users, effect, low, high, always_valid_p(ratio))


def monitor(
    users: pd.DataFrame, metric: Metric, *, control: str, arm: str, alpha: float = 0.05, best_at: float | None = None
) -> Path:
    """The path of one metric in one test.

    Args:
        users: One row a user, in order of first exposure.
        metric: The metric, its covariate set.
        control: Control arm.
        arm: The other arm.
        alpha: 1 - confidence level.
        best_at: See `effect_path`.

    Raises:
        ValueError: When the table does not say when users came.
    """
    if "first_exposure" not in users:
        raise ValueError("monitoring needs the column first_exposure: when each user was first exposed")
    pair = users[users["arm"].isin([control, arm])]
    columns = metric_columns(pair, metric)
    return effect_path(
        (pair["arm"] == arm).to_numpy(), columns, cuped=metric.covariate is not None, alpha=alpha, best_at=best_at
    )


def sample_ratio_path(users: pd.DataFrame, weights: Mapping[str, float]) -> Floats:
    """Always-valid p-value, after every user, that users fall into the arms by their weights; float64 (users,)."""
    return event_path(users, np.ones(len(users), dtype=np.bool_), weights)


def event_path(
    users: pd.DataFrame, event: np.ndarray[tuple[int], np.dtype[np.bool_]], weights: Mapping[str, float]
) -> Floats:
    """Always-valid p-value, after every user, that users with the event (a conversion) fall into the arms by their weights.

    Args:
        users: One row a user, in order of first exposure.
        event: bool (users,): whether it happened to the user; once a user at most.
        weights: Traffic by arm.
    """
    shares = check_weights(weights)
    arm = users["arm"].to_numpy()
    counts = np.stack([np.cumsum((arm == name) & event) for name in shares], axis=-1)
    return always_valid_p(log_count_ratio(counts, list(shares.values())))
