"""The arithmetic of a comparison, for many tables at once: delta method, CUPED and Welch's degrees of freedom.

A metric is four numbers a user (numerator, denominator, covariate, its denominator; ones where there is none). Its value in an
arm is r = mean(numerator) / mean(denominator); to first order r moves as the mean of (numerator - r denominator) /
mean(denominator) over the users (delta method: Deng, Knoblich and Lu, KDD 2018). CUPED (Deng, Xu, Kohavi and Walker, WSDM
2013) takes off theta times the covariate's deviation from its mean over both arms, with theta = cov(r, x) / var(x) over both.
The formulas are those of tea-tasting's `RatioOfMeans`; a test holds both equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, means and covariances of a metric's four numbers in one arm; leading dimensions are any number of tables.

    Attributes:
        count: float64 (...,), users.
        mean: float64 (..., 4).
        cov: float64 (..., 4, 4), with divisor count - 1.
    """

    count: Floats
    mean: Floats
    cov: Floats

    @classmethod
    def of(cls, columns: Floats) -> Moments:
        """Of the users of one arm; float64 (..., users, 4)."""
        count = columns.shape[-2]
        mean = columns.mean(axis=-2)
        away = columns - mean[..., None, :]
        return cls(np.full(mean.shape[:-1], float(count)), mean, np.swapaxes(away, -1, -2) @ away / (count - 1))

    @classmethod
    def weighted(cls, weights: Floats, columns: Floats) -> Moments:
        """Of many samples from the same users: weights (..., users) say how often each is in a sample; columns (users, 4)."""
        centre = columns.mean(axis=0)
        count, first, second = (weights @ f for f in _features(columns - centre))
        return cls._from_sums(count, first, second, centre)

    @classmethod
    def running(cls, member: NDArray[np.bool_], columns: Floats) -> Moments:
        """Of the users so far: `member` (..., users) says who is in the arm, columns (..., users, 4), in order of arrival."""
        centre = columns.reshape(-1, columns.shape[-1]).mean(axis=0)
        sums = (np.cumsum(f * member[..., None], axis=-2) for f in _features(columns - centre))
        count, first, second = sums
        return cls._from_sums(count, first, second, centre)

    @classmethod
    def _from_sums(cls, count: Floats, first: Floats, second: Floats, centre: Floats) -> Moments:
        number = count[..., 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = first / count
            square = second.reshape(*second.shape[:-1], 4, 4)
            cov = (square - first[..., :, None] * mean[..., None, :]) / (number - 1.0)[..., None, None]
        return cls(number, mean + centre, cov)

    def joined(self, other: Moments) -> Moments:
        """Of both arms together."""
        count = self.count + other.count
        share = (other.count / count)[..., None]
        mean = self.mean + share * (other.mean - self.mean)
        apart = other.mean - self.mean
        between = (self.count * other.count / count)[..., None, None] * apart[..., :, None] * apart[..., None, :]
        within = (self.count - 1.0)[..., None, None] * self.cov + (other.count - 1.0)[..., None, None] * other.cov
        return Moments(count, mean, (within + between) / (count - 1.0)[..., None, None])

    def raised(self, lift: float, *, binary: bool = False) -> Moments:
        """As if every user's numerator had been raised by `lift`.

        Args:
            lift: Relative effect.
            binary: The numerator is 0 or 1: then more users get a 1 (at most all), and the variance is p (1 - p) again.
        """
        p = self.mean[..., 0]
        factor = np.full_like(p, 1.0 + lift)
        spread = factor
        if binary:
            with np.errstate(divide="ignore", invalid="ignore"):
                factor = np.where(p > 0, np.minimum(factor, 1.0 / p), 1.0)
                ratio = factor * (1.0 - factor * p) / (1.0 - p)
                spread = np.sqrt(np.where(p < 1, np.maximum(ratio, 0.0), 0.0))
        place = np.arange(4) == 0
        mean = np.where(place, factor[..., None], 1.0)
        scale = np.where(place, spread[..., None], 1.0)
        return Moments(self.count, self.mean * mean, self.cov * scale[..., :, None] * scale[..., None, :])


def _features(columns: Floats) -> tuple[Floats, Floats, Floats]:
    """Ones, the columns and their products: what has to be summed."""
    products = columns[..., :, None] * columns[..., None, :]
    return np.ones((*columns.shape[:-1], 1)), columns, products.reshape(*columns.shape[:-1], -1)


@dataclass(frozen=True)
class Difference:
    """Treatment minus control; all float64 of the tables' shape.

    Attributes:
        estimate: Difference of the metric.
        se: Its standard error.
        df: Welch's degrees of freedom.
        control: The metric in the control arm, adjusted if CUPED was used.
    """

    estimate: Floats
    se: Floats
    df: Floats
    control: Floats

    def p_value(self) -> Floats:
        """Two-sided p-value of no difference."""
        from scipy import stats

        with np.errstate(divide="ignore", invalid="ignore"):
            p = 2.0 * stats.t.sf(np.abs(self.estimate) / self.se, self.df)
        return np.where(self.se > 0, p, np.where(self.estimate == 0, 1.0, 0.0))

    def half_width(self, level: float = 0.95) -> Floats:
        """Half the width of the interval."""
        from scipy import stats

        half: Floats = stats.t.ppf(0.5 + level / 2.0, self.df) * self.se
        return half


def compare(control: Moments, treatment: Moments, *, cuped: bool) -> Difference:
    """Difference of a metric between two arms.

    Args:
        control: Users of the control arm.
        treatment: Users of the other arm.
        cuped: Whether to adjust by the covariate.

    Returns:
        The difference with its standard error.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        theta, centre = np.zeros_like(control.count), np.zeros_like(control.count)
        if cuped:
            both = control.joined(treatment)
            y, x = _gradient(both, 0), _gradient(both, 2)
            spread = _product(x, both, x)
            theta = np.where(spread > 0, _product(y, both, x) / spread, 0.0)
            centre = _ratio(both, 2)
        values, variances = [], []
        for arm in (control, treatment):
            value = _ratio(arm, 0) - theta * (_ratio(arm, 2) - centre) if cuped else _ratio(arm, 0)
            weight = _gradient(arm, 0) - theta[..., None] * _gradient(arm, 2) if cuped else _gradient(arm, 0)
            values.append(value)
            # rounding must not make a variance of 0 negative
            variances.append(np.maximum(_product(weight, arm, weight), 0.0) / arm.count)
        total = variances[0] + variances[1]
        df = total**2 / (variances[0] ** 2 / (control.count - 1.0) + variances[1] ** 2 / (treatment.count - 1.0))
    return Difference(values[1] - values[0], np.sqrt(total), df, values[0])


def _ratio(arm: Moments, place: int) -> Floats:
    return arm.mean[..., place] / arm.mean[..., place + 1]


def _gradient(arm: Moments, place: int) -> Floats:
    """Derivative of the ratio of columns `place` and `place + 1` by the four means; (..., 4)."""
    out = np.zeros_like(arm.mean)
    out[..., place] = 1.0 / arm.mean[..., place + 1]
    out[..., place + 1] = -arm.mean[..., place] / arm.mean[..., place + 1] ** 2
    return out


def _product(left: Floats, arm: Moments, right: Floats) -> Floats:
    out: Floats = np.einsum("...i,...ij,...j->...", left, arm.cov, right)
    return out
