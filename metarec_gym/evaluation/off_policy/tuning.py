"""SLOPE: how much to clip, switch or shrink, chosen from the log alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from metarec_gym.evaluation.off_policy.intervals import t_interval
from metarec_gym.evaluation.off_policy.terms import Terms

CLIPS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, float("inf"))
"""Clips of IPS and DR, and switches (tau) of Switch-DR."""
SHRINKAGES = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4, float("inf"))
"""Lambdas of DRos."""
SMOOTHINGS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Lambdas of SG-IPS and SG-DR."""


def slope(candidates: Sequence[Terms], cluster: ArrayLike, *, delta: float = 0.1) -> int:
    """Which of several estimates to use: the shortest interval that still agrees with all longer ones.

    Su, Srinath and Krishnamurthy (ICML 2020), with the candidates ordered by their widths as in SLOPE++ (Tucker and Lee, 2021):
    from the widest on, candidate i is accepted while  |V_i - V_j| <= width_i + (sqrt(6) - 1) width_j  for all wider j; the last
    accepted one is the choice. Widths are one-sided t bounds at level 1 - delta over users. With probability 1 - delta its
    error is within a constant of the best candidate's, if bias grows as width falls.

    The choice looks at the rewards: an interval of the chosen estimate does not know that it was chosen, nor its bias.

    Args:
        candidates: The same estimator with different settings.
        cluster: (n_rows,), users.
        delta: Probability that a width fails.

    Returns:
        Index of the choice.
    """
    constant = float(np.sqrt(6.0)) - 1.0
    # a two-sided interval of level 1 - 2 delta has the one-sided quantile of 1 - delta
    intervals = [t_interval(terms, cluster, level=1.0 - 2.0 * delta) for terms in candidates]
    values = np.array([interval.estimate for interval in intervals])
    widths = np.array([interval.high - interval.estimate for interval in intervals])
    order = np.argsort(widths)[::-1]
    for place in range(1, len(order)):
        own, wider = order[place], order[:place]
        if (np.abs(values[wider] - values[own]) > widths[own] + constant * widths[wider]).any():
            return int(order[place - 1])
    return int(order[-1])
