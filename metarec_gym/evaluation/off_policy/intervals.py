"""Intervals of off-policy estimates; the unit is the user: a user's requests go up and down together.

    t_interval            linearised, t with (users - 1) degrees of freedom
    bootstrap_interval    users drawn with replacement; studentised (bootstrap-t) or percentile
    empirical_bernstein   valid for every number of users and any weights; wide

The first two are asymptotic: they believe that the weights' tails have been seen. Where few rows carry the estimate (see
`diagnostics`) they are too short, whatever their nominal level; the third is not. What they covered in simulation:
`experiments/results/coverage_off_policy.md`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from metarec_gym.evaluation.intervals import Floats, Interval, mean_interval
from metarec_gym.evaluation.off_policy.bandit_log import BanditLog
from metarec_gym.evaluation.off_policy.single_action import importance_weights
from metarec_gym.evaluation.off_policy.terms import Terms
from metarec_gym.seeding import numpy_rng

CLIPS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""Clips tried by the empirical Bernstein bounds; fixed beforehand and paid for."""
MOST_CELLS = 4_000_000
"""Samples x users resampled at once: 32 MB."""


@dataclass(frozen=True)
class Bounds:
    """Bounds that are not symmetric about the estimate."""

    low: float
    """Lower bound."""
    high: float
    """Upper bound."""
    level: float
    """Confidence level."""
    method: str
    """How they were found."""

    def as_number(self, digits: int = 4) -> str:
        """For example `[0.0398, 0.0426]`."""
        return f"[{self.low:.{digits}f}, {self.high:.{digits}f}]"


def t_interval(terms: Terms, cluster: ArrayLike, *, level: float = 0.95) -> Interval:
    """Clustered interval by linearisation, with a t quantile.

    V +- t(C - 1) sqrt(C / (C - 1) sum_c psi_c^2) / n  with psi_c the summed influence of a user's rows (Liang and Zeger,
    Biometrika 1986; the factor is the usual small-sample one).

    Args:
        terms: The estimate.
        cluster: (n_rows,), users.
        level: Confidence level.

    Raises:
        ValueError: When there are fewer than two users.
    """
    return _linearised(terms.value, terms.influence(), cluster, level)


def difference_interval(left: Terms, right: Terms, cluster: ArrayLike, *, level: float = 0.95) -> Interval:
    """Interval of left - right on the same rows: what both share cancels, user by user.

    Args:
        left: An estimate.
        right: Another one of the same rows.
        cluster: (n_rows,), users.
        level: Confidence level.
    """
    return _linearised(left.value - right.value, left.influence() - right.influence(), cluster, level)


def _linearised(value: float, influence: Floats, cluster: ArrayLike, level: float) -> Interval:
    number = np.unique(np.asarray(cluster), return_inverse=True)[1]
    by_cluster = np.bincount(number, weights=influence)
    # a user's share of the mean, as if every user had rows / users rows
    return mean_interval(value + by_cluster * len(by_cluster) / len(influence), level=level)


def bootstrap_interval(
    terms: Terms,
    cluster: ArrayLike,
    *,
    seed: int,
    level: float = 0.95,
    samples: int = 1000,
    method: Literal["studentised", "percentile"] = "studentised",
) -> Bounds:
    """Bootstrap over users.

    Percentile: quantiles of the resampled estimates. Studentised: V - q se with q the quantiles of (V* - V) / se*, which follows
    the skewness of weighted rewards to second order (Efron and Tibshirani 1993, chapter 12). Models are not
    refitted: the first-order noise of their fits is among the terms (`RewardModel.fit_influence`). Tuning is not repeated.

    Args:
        terms: The estimate.
        cluster: (n_rows,), users.
        seed: Seed of the resampling; the same seed draws the same users for every estimator.
        level: Confidence level.
        samples: Bootstrap samples.
        method: See above.
    """
    sums = terms.cluster_sums(cluster)
    clusters = len(sums.rows)
    size = max(1, min(samples, MOST_CELLS // clusters))
    parts = [
        sums.resampled(_draws(seed, start, min(size, samples - start), clusters)) for start in range(0, samples, size)
    ]
    values, errors = (np.concatenate(part) for part in zip(*parts, strict=True))
    tails = (0.5 - level / 2.0, 0.5 + level / 2.0)
    name = f"{method} bootstrap"
    if method == "percentile":
        low, high = np.nanquantile(values, tails)
        return Bounds(float(low), float(high), level, name)
    centre = t_interval(terms, cluster, level=level)
    if centre.se == 0.0:
        return Bounds(centre.estimate, centre.estimate, level, name)
    usable = np.isfinite(values) & (errors > 0.0)
    below, above = np.quantile((values[usable] - centre.estimate) / errors[usable], tails)
    return Bounds(float(centre.estimate - above * centre.se), float(centre.estimate - below * centre.se), level, name)


@functools.lru_cache(maxsize=4)
def _draws(seed: int, start: int, samples: int, clusters: int) -> Floats:
    """How often each user is drawn, (samples, clusters); kept for the next estimator of the same log."""
    drawn = numpy_rng(seed, "off_policy_bootstrap", start).integers(clusters, size=(samples, clusters))
    flat = drawn + clusters * np.arange(samples)[:, None]
    return np.bincount(flat.ravel(), minlength=samples * clusters).reshape(samples, clusters).astype(np.float64)


def empirical_bernstein(
    log: BanditLog,
    probs: Floats,
    reward_range: tuple[float, float],
    *,
    level: float = 0.95,
    clips: Sequence[float] = CLIPS,
) -> Bounds:
    """Bounds of a policy's value that hold for every sample size, without a word on the weights' tails or on common support.

    Clipping biases IPS downwards, by at most (b - a)(1 - E[min(w, M)]) for rewards in [a, b]; so the value lies between two means
    of *bounded* variables (Bottou et al., JMLR 2013, section 4.4):

        a + E[min(w, M)(r - a)]  <=  V  <=  b - E[min(w, M)(b - r)]

    with the bias inside. (The mass that the policy puts where the logger never went counts as a below and as b above.) Each side
    gets the empirical Bernstein bound of Maurer and Pontil (COLT 2009, theorem 4) over users: with S a user's sum and N a user's
    requests, v is refused where the mean of S - v N is above  sqrt(2 Var ln(2/d) / C) + 7 R ln(2/d) / (3 (C - 1)),  R = M (b - a)
    times the most requests of a user. d = (1 - level) / 2 is shared among the clips, the best of which is kept.

    What is taken as given: the propensities, [a, b], users who are independent, and that none has more requests than seen.

    Args:
        log: The log.
        probs: (n_rows, K).
        reward_range: Smallest and largest reward a request can bring (known beforehand, not seen).
        level: Confidence level of both bounds together.
        clips: M; fixed before the data are seen.

    Raises:
        ValueError: When a reward lies outside the range.
    """
    least, most = reward_range
    if log.reward.min() < least or log.reward.max() > most:
        raise ValueError(
            f"rewards run from {log.reward.min()} to {log.reward.max()}, outside the range {reward_range} that they can have; "
            "correct it"
        )
    weight = importance_weights(log, probs)
    number = np.unique(log.cluster, return_inverse=True)[1]
    requests = np.bincount(number).astype(np.float64)
    share = (1.0 - level) / 2.0 / len(clips)
    low, high = least, most
    for clip in clips:
        clipped = np.minimum(weight, clip)
        above = np.bincount(number, weights=clipped * (log.reward - least)).astype(np.float64)
        below = np.bincount(number, weights=clipped * (most - log.reward)).astype(np.float64)
        low = max(low, least + _bernstein_lower(above, requests, clip * (most - least), share))
        high = min(high, most - _bernstein_lower(below, requests, clip * (most - least), share))
    return Bounds(low, high, level, "empirical Bernstein")


def clipping_bias_bound(log: BanditLog, probs: Floats, clip: float, reward_range: tuple[float, float]) -> float:
    """How far IPS with this clip may lie below the value: (b - a)(1 - mean of min(w, clip)), at least 0.

    Follows from E[w] = 1; an estimate of the bound, with the sample's mean for the expectation.

    Args:
        log: The log.
        probs: (n_rows, K).
        clip: Largest weight.
        reward_range: a and b.
    """
    kept = float(np.minimum(importance_weights(log, probs), clip).mean())
    return (reward_range[1] - reward_range[0]) * max(0.0, 1.0 - kept)


def _bernstein_lower(total: Floats, requests: Floats, largest: float, delta: float) -> float:
    """Lower bound of E[total] / E[requests] at confidence 1 - delta, where 0 <= total <= largest * requests."""
    from scipy.optimize import brentq

    clusters = len(requests)
    if clusters < 2 or largest <= 0.0:
        return 0.0
    log_term = float(np.log(2.0 / delta))
    slack = 7.0 * largest * float(requests.max()) * log_term / (3.0 * (clusters - 1))

    def excess(value: float) -> float:
        z = total - value * requests
        return float(z.mean() - np.sqrt(2.0 * z.var(ddof=1) * log_term / clusters) - slack)

    # concave in the value, so it crosses 0 once where it starts above
    if excess(0.0) <= 0.0:
        return 0.0
    return float(brentq(excess, 0.0, largest)) if excess(largest) < 0.0 else largest
