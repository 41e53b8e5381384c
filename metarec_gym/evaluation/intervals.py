"""Intervals that carry the variance of users and of training seeds; the unit is the user.

A learned policy is trained under several seeds and every seed is played on the same users, so a result is a matrix
(seeds, users). Both are samples: other seeds and other users would have given other numbers. With the two-way model

    y_su = mu + seed_s + user_u + rest_su

the variance of the grand mean is  var(seed) / S + var(user) / n + var(rest) / (S n), estimated from the mean squares of
seeds, users and rest; its degrees of freedom are Welch and Satterthwaite's. Ten seeds over six hundred users then get a
t quantile close to 2.26 where seeds matter and close to 1.96 where users do. Measured (`experiments.coverage_ab`), 95 %
intervals of means, lifts and closed gaps cover in 93-97 % of cases at 5 and at 10 seeds, as long as the rest's standard
deviation is at most three times the users'; beyond that they err on the wide side.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: Point estimate.
        low: Lower bound.
        high: Upper bound.
        se: Standard error.
        df: Degrees of freedom of the t quantile.
        level: Confidence level in (0, 1).
        seeds: Training seeds behind it; 1 for a policy without training.
        users: Users behind it.
    """

    estimate: float
    low: float
    high: float
    se: float
    df: float
    level: float
    seeds: int
    users: int

    def at_level(self, level: float) -> Interval:
        """The same estimate with another confidence level."""
        half = _t_quantile(level, self.df) * self.se
        return Interval(
            self.estimate, self.estimate - half, self.estimate + half, self.se, self.df, level, self.seeds, self.users
        )

    def p_value(self, null: float = 0.0, *, alternative: str = "two-sided") -> float:
        """P-value of the t test against `null`.

        Args:
            null: Value under the null hypothesis.
            alternative: "two-sided", or "greater": the true value is above `null`.
        """
        from scipy import stats

        if alternative not in ("two-sided", "greater"):
            raise ValueError(f"alternative is {alternative!r}, expected 'two-sided' or 'greater'")
        distance = self.estimate - null
        if self.se == 0.0:
            # nothing varies: the estimate is certain
            certain = distance != 0.0 if alternative == "two-sided" else distance > 0.0
            return 0.0 if certain else 1.0
        tail = float(stats.t.sf(abs(distance) / self.se, self.df))
        if alternative == "two-sided":
            return 2.0 * tail
        return tail if distance > 0 else 1.0 - tail

    def as_percent(self) -> str:
        """For example `+1.6 % [+0.6, +2.8]`."""
        return f"{100 * self.estimate:+.1f} % [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    def as_number(self, digits: int = 3) -> str:
        """For example `0.412 [0.398, 0.426]`."""
        return f"{self.estimate:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def to_json(self) -> dict[str, float]:
        """Estimate, bounds, standard error, degrees of freedom."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high, "se": self.se, "df": self.df}


def mean_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Interval of the mean over users, and over training seeds when there are several.

    Args:
        values: (users,) for a policy without training seeds, (seeds, users) else; paired differences for a comparison.
        level: Confidence level.

    Returns:
        The interval.

    Raises:
        ValueError: When there are fewer than two users or a value is not finite.
    """
    matrix = _matrix(values)
    variance, df = _variance_of_mean(matrix)
    return _interval(float(matrix.mean()), variance, df, level, matrix.shape)


def ratio_interval(
    numerator: ArrayLike, denominator: ArrayLike, *, minus: float = 0.0, level: float = 0.95
) -> Interval:
    """Interval of mean(numerator) / mean(denominator) - minus, by linearisation.

    To first order the ratio r moves as the mean of (numerator - r * denominator) / mean(denominator), user by user:
    pairing is kept, so noise that numerator and denominator share cancels.

    Args:
        numerator: (users,) or (seeds, users).
        denominator: (users,), of the same users.
        minus: 1 for a lift.
        level: Confidence level.

    Returns:
        The interval.

    Raises:
        ValueError: When the shapes do not fit or the denominator's mean is 0.
    """
    top, bottom = _matrix(numerator), np.asarray(denominator, dtype=np.float64)
    if bottom.ndim != 1 or bottom.shape[0] != top.shape[1]:
        raise ValueError(f"the denominator has shape {bottom.shape}, expected ({top.shape[1]},): one number a user")
    mean = float(bottom.mean())
    if mean == 0.0 or not np.isfinite(mean):
        raise ValueError(f"the denominator's mean is {mean}; a ratio to it says nothing")
    ratio = float(top.mean()) / mean
    variance, df = _variance_of_mean((top - ratio * bottom[None, :]) / mean)
    return _interval(ratio - minus, variance, df, level, top.shape)


def difference_interval(first: ArrayLike, second: ArrayLike, *, level: float = 0.95) -> Interval:
    """Interval of mean(first) - mean(second), played on the same users, each with training seeds of its own.

    Users are paired, seeds are not: seed 3 of one learner has nothing to do with seed 3 of another. With the two-way model for
    each side, d_u the difference of a user's means over seeds, and n users,

        variance = var(seed) / S + var'(seed) / S' + var(d_u) / n,

    in which the rest is counted once too often (see `mean_interval`). Where the second side has one seed it is `mean_interval` of
    the differences.

    Args:
        first: (users,) or (seeds, users).
        second: (users,) or (its seeds, users), of the same users.
        level: Confidence level.

    Returns:
        The interval; its `seeds` are those of the side with fewer, policies without training seeds aside.

    Raises:
        ValueError: When the sides have different users.
    """
    return _difference(_matrix(first), _matrix(second), level)


def relative_difference(first: ArrayLike, second: ArrayLike, *, level: float = 0.95) -> Interval:
    """Interval of mean(first) / mean(second) - 1, by linearisation; sides as in `difference_interval`.

    Raises:
        ValueError: When the sides have different users or the second one's mean is 0.
    """
    top, bottom = _matrix(first), _matrix(second)
    mean = float(bottom.mean())
    if mean == 0.0:
        raise ValueError("the second side's mean is 0; a ratio to it says nothing")
    ratio = float(top.mean()) / mean
    # to first order the ratio moves as mean(first - ratio * second) / mean(second)
    moved = _difference(top / mean, ratio * bottom / mean, level)
    return replace(moved, estimate=ratio - 1.0, low=ratio - 1.0 + moved.low, high=ratio - 1.0 + moved.high)


def _difference(first: Floats, second: Floats, level: float) -> Interval:
    users = first.shape[1]
    if second.shape[1] != users:
        raise ValueError(f"the sides have {users} and {second.shape[1]} users, expected the same users in both")
    by_user = first.mean(axis=0) - second.mean(axis=0)
    user_part = float(by_user.var(ddof=1)) / users
    parts = [(user_part, float(users - 1))]
    rest_total, floor = 0.0, float(users - 1)
    for side in (first, second):
        seeds = side.shape[0]
        if seeds > 1:
            seed_part, _, rest_part = _parts(side)
            parts += [(seed_part, float(seeds - 1)), (rest_part, float((seeds - 1) * (users - 1)))]
            rest_total, floor = rest_total + rest_part, min(floor, float(seeds - 1))
    seeded = [side.shape[0] for side in (first, second) if side.shape[0] > 1]
    shape = (min(seeded, default=1), users)
    # every side's rest is in its seed part and in the users' part: taken off once (its own part in the list is for the df)
    variance = max(sum(part for part, _ in parts) - 2.0 * rest_total, rest_total)
    if variance <= 0.0:
        return _interval(float(by_user.mean()), 0.0, floor, level, shape)
    spread = sum(part**2 / df for part, df in parts)
    df = max(variance**2 / spread, floor) if spread > 0.0 else floor
    return _interval(float(by_user.mean()), variance, df, level, shape)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for having made all these comparisons (Holm 1979): claim those that stay below the level.

    Args:
        p_values: One p-value a comparison.

    Returns:
        Adjusted p-values in the same order.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _matrix(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    array = array[None, :] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        raise ValueError(f"values have shape {np.shape(values)}, expected (users,) or (seeds, users) with >= 2 users")
    if not np.isfinite(array).all():
        raise ValueError("a user's value is not finite; an interval needs finite values")
    return array


def _variance_of_mean(z: Floats) -> tuple[float, float]:
    """Variance of the grand mean of (seeds, users), and its degrees of freedom."""
    seeds, users = z.shape
    if seeds == 1:
        return float(z.var(ddof=1)) / users, float(users - 1)
    seed_part, user_part, rest_part = _parts(z)
    # var(seed) and var(user) are not negative, so the sum is at least the rest's part
    variance = max(seed_part + user_part - rest_part, rest_part)
    if variance <= 0.0:
        return 0.0, float(seeds - 1)
    spread = seed_part**2 / (seeds - 1) + user_part**2 / (users - 1) + rest_part**2 / ((seeds - 1) * (users - 1))
    # never fewer degrees of freedom than the poorer of the two samples has by itself
    return variance, max(variance**2 / spread, float(min(seeds, users) - 1)) if spread > 0.0 else float(seeds - 1)


def _parts(z: Floats) -> tuple[float, float, float]:
    """Mean squares of seeds, users and rest over seeds * users, for at least two seeds."""
    seeds, users = z.shape
    by_seed, by_user = z.mean(axis=1), z.mean(axis=0)
    rest = z - by_seed[:, None] - by_user[None, :] + z.mean()
    # E[seed_part] = var(seed)/S + var(rest)/(Sn), E[user_part] = var(user)/n + var(rest)/(Sn): the rest is in both
    seed_part = float(by_seed.var(ddof=1)) / seeds
    user_part = float(by_user.var(ddof=1)) / users
    rest_part = float((rest**2).sum()) / ((seeds - 1) * (users - 1)) / (seeds * users)
    return seed_part, user_part, rest_part


@functools.lru_cache(maxsize=4096)
def _t_quantile(level: float, df: float) -> float:
    from scipy import stats

    if not 0.0 < level < 1.0:
        raise ValueError(f"the confidence level is {level}, expected a number in (0, 1)")
    return float(stats.t.ppf(0.5 + level / 2.0, df))


def _interval(estimate: float, variance: float, df: float, level: float, shape: tuple[int, ...]) -> Interval:
    se = float(np.sqrt(variance))
    half = _t_quantile(level, df) * se
    return Interval(estimate, estimate - half, estimate + half, se, df, level, shape[0], shape[1])
