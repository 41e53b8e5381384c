"""Is an estimator good at what it is for: choosing a policy? Needs the policies' true values, so a simulator or an A/B test."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from metarec_gym.evaluation.intervals import Floats


def rank_correlation(estimates: ArrayLike, truths: ArrayLike) -> float:
    """Spearman's rank correlation of estimated and true values, (n_policies,) both; 1 = the same order."""
    from scipy import stats

    left, right = _pair(estimates, truths)
    return float(stats.spearmanr(left, right).statistic)


def regret_at_k(estimates: ArrayLike, truths: ArrayLike, k: int) -> float:
    """True value of the best policy, less that of the best among the k that look best; 0 = it was among them.

    Args:
        estimates: (n_policies,).
        truths: (n_policies,).
        k: Policies tried.
    """
    _, right = _pair(estimates, truths)
    return float(right.max() - _top(estimates, truths, k).max())


def sharpe_ratio_at_k(estimates: ArrayLike, truths: ArrayLike, logged: float, k: int) -> float:
    """SharpeRatio@k = (best true value among the k that look best - the logger's value) / their standard deviation.

    Kiyohara et al. (ICLR 2024): the gain of trying k policies online over the risk of trying bad ones. The deviation is that
    of the k (divided by k, not k - 1), as there.

    Args:
        estimates: (n_policies,).
        truths: (n_policies,).
        logged: Value of the logging policy.
        k: Policies tried, at least 2.

    Returns:
        The ratio; inf or -inf where all k have one value, 0 where that is the logger's.
    """
    if k < 2:
        raise ValueError(f"k is {k}, expected at least 2: one policy has no spread")
    chosen = _top(estimates, truths, k)
    gain, spread = float(chosen.max() - logged), float(chosen.std())
    if spread == 0.0:
        return float(np.sign(gain) * np.inf) if gain != 0.0 else 0.0
    return gain / spread


def _pair(estimates: ArrayLike, truths: ArrayLike) -> tuple[Floats, Floats]:
    left, right = np.asarray(estimates, dtype=np.float64), np.asarray(truths, dtype=np.float64)
    if left.ndim != 1 or left.shape != right.shape or len(left) < 2:
        raise ValueError(
            f"estimates {left.shape} and truths {right.shape} do not fit; expected (n_policies,) with 2 or more"
        )
    return left, right


def _top(estimates: ArrayLike, truths: ArrayLike, k: int) -> Floats:
    """True values of the k policies of highest estimate."""
    left, right = _pair(estimates, truths)
    if not 1 <= k <= len(left):
        raise ValueError(f"k is {k}, expected 1 to {len(left)}, the number of policies")
    # stable, so that ties keep the order given
    return np.asarray(right[np.argsort(-left, kind="stable")[:k]])
