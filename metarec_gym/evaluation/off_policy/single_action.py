"""Estimators for one action a request. Notation: pi the policy to value, p the logger, w_i = pi(a_i | x_i) / p(a_i | x_i).

Every function takes a log, the policy's probabilities (n_rows, K) as `target_probs` makes them and, where it predicts, a reward
model q that was not fitted on the row's own user (`BanditLog.reward_model`; or predictions (n_rows, K), taken as certain). All
value the mean reward of a request on the contexts of the log. All are biased where p is wrong, where something unlogged moved
both the action and the reward, and (unless said otherwise) where pi shows what p never showed.
"""

from __future__ import annotations

import numpy as np

from metarec_gym.evaluation.intervals import Floats
from metarec_gym.evaluation.off_policy.bandit_log import BanditLog
from metarec_gym.evaluation.off_policy.cross_fitting import RewardModel, one_hot
from metarec_gym.evaluation.off_policy.terms import Terms


def importance_weights(log: BanditLog, probs: Floats) -> Floats:
    """w_i = pi(a_i | x_i) / p(a_i | x_i); (n_rows,)."""
    return np.asarray(probs[np.arange(log.n_rows), log.action] / log.propensity, dtype=np.float64)


def logged_value(log: BanditLog) -> Terms:
    """The log's own mean reward: what the logger earned. Unbiased for the logger, on its own contexts."""
    return Terms.of(log.reward, weight=np.ones(log.n_rows))


def ips(log: BanditLog, probs: Floats, *, clip: float = np.inf) -> Terms:
    """Inverse propensity scoring: mean of min(w, clip) r.

    Horvitz and Thompson (JASA 1952); clipping: Ionides (JCGS 2008). Unbiased for clip = inf. Clipped, it is off by
    -E[(w - clip)_+ r]: too low for rewards >= 0.

    Args:
        log: The log.
        probs: (n_rows, K).
        clip: Largest weight.
    """
    weight = np.minimum(importance_weights(log, probs), clip)
    return Terms.of(weight * log.reward, weight=weight)


def snips(log: BanditLog, probs: Floats) -> Terms:
    """Self-normalised IPS: sum of w r over sum of w.

    Swaminathan and Joachims (NeurIPS 2015). Bias of order 1/n (consistent); never leaves the range of the rewards.
    """
    weight = importance_weights(log, probs)
    return Terms.of(weight * log.reward, bottom=weight, weight=weight)


def direct_method(log: BanditLog, probs: Floats, q: Floats | RewardModel) -> Terms:
    """Direct method: mean of sum_k pi(k | x) q(x, k).

    Beygelzimer and Langford (KDD 2009). Biased by whatever the reward model gets wrong, and more rows do not heal that; its
    interval holds the noise of the model's fit (of a `RewardModel` by ridge regression), not that bias.
    """
    return _corrected(log, probs, q, np.zeros(log.n_rows))


def doubly_robust(log: BanditLog, probs: Floats, q: Floats | RewardModel, *, clip: float = np.inf) -> Terms:
    """Doubly robust: mean of sum_k pi(k | x) q(x, k) + min(w, clip) (r - q(x, a)).

    Dudik, Langford and Li (ICML 2011). Unbiased for clip = inf if p is right, whatever q is; else off by about (error of p) x
    (error of q). Clipped: off by -E[(w - clip)_+ (r - q)].
    """
    return _corrected(log, probs, q, np.minimum(importance_weights(log, probs), clip))


def self_normalised_dr(log: BanditLog, probs: Floats, q: Floats | RewardModel) -> Terms:
    """SNDR: mean of sum_k pi(k | x) q(x, k), plus sum of w (r - q(x, a)) over sum of w.

    Thomas and Brunskill (ICML 2016, weighted doubly robust with one step). Bias of order 1/n; consistent as DR is.
    """
    weight = importance_weights(log, probs)
    return _corrected(log, probs, q, weight, bottom=weight)


def switch_dr(log: BanditLog, probs: Floats, q: Floats | RewardModel, *, tau: float) -> Terms:
    """Switch-DR: DR whose correction counts only where w <= tau.

    Wang, Agarwal and Dudik (ICML 2017). Off by -E[1(w > tau) w (r - q)]: what the model gets wrong where weights are large.
    """
    weight = importance_weights(log, probs)
    return _corrected(log, probs, q, np.where(weight <= tau, weight, 0.0))


def dr_optimistic_shrinkage(log: BanditLog, probs: Floats, q: Floats | RewardModel, *, shrinkage: float) -> Terms:
    """DRos: DR with weights  lambda w / (w^2 + lambda); lambda = 0 is the direct method, inf is DR.

    Su, Dimakopoulou, Krishnamurthy and Dudik (ICML 2020). Off by -E[(w - shrunk w) (r - q)].
    """
    weight = importance_weights(log, probs)
    if np.isfinite(shrinkage):
        weight = shrinkage * weight / (weight**2 + shrinkage) if shrinkage > 0.0 else np.zeros_like(weight)
    return _corrected(log, probs, q, weight)


def sub_gaussian_ips(log: BanditLog, probs: Floats, *, smoothing: float) -> Terms:
    """SG-IPS: mean of w / (1 - lambda + lambda w) r; lambda = 0 is IPS, lambda = 1 the logger's mean where w > 0.

    Metelli, Russo and Restelli (NeurIPS 2021, power mean with s = -1): the error's tails are sub-Gaussian. Off by
    -E[(w - smoothed w) r]: at most of order lambda.
    """
    weight = _smoothed(importance_weights(log, probs), smoothing)
    return Terms.of(weight * log.reward, weight=weight)


def sub_gaussian_dr(log: BanditLog, probs: Floats, q: Floats | RewardModel, *, smoothing: float) -> Terms:
    """SG-DR: DR with the weights of SG-IPS. Metelli, Russo and Restelli (NeurIPS 2021). Off by -E[(w - smoothed w) (r - q)]."""
    return _corrected(log, probs, q, _smoothed(importance_weights(log, probs), smoothing))


def mips(log: BanditLog, probs: Floats) -> Terms:
    """Marginalised IPS over families of actions: mean of w(x, e) r with  w(x, e) = pi(e | x) / p(e | x).

    e is the family of the logged action and pi(e | x) = sum of pi(k | x) over it. Saito and Joachims (ICML 2022), equation 7,
    with an embedding that is a function of the action. Unbiased if an action moves the reward through its family only (no
    direct effect); else it values pi as if within each family it chose as the logger did. Needs common support of families,
    not of actions.

    Raises:
        ValueError: When the log names no families, or has not the logger's chances of all actions.
    """
    if log.families is None:
        raise ValueError("MIPS needs `families`: one family name for each action; name them or leave MIPS out")
    if log.pscore is None:
        raise ValueError(
            "MIPS needs the logger's chances of all actions (pscore, n_rows x K), and the log has the chosen "
            "action's only; log them "
            "all, or estimate them"
        )
    _, number = np.unique(np.array(log.families), return_inverse=True)
    member = np.zeros((log.n_actions, number.max() + 1))
    member[np.arange(log.n_actions), number] = 1.0
    rows, family = np.arange(log.n_rows), number[log.action]
    weight = (probs @ member)[rows, family] / (log.pscore @ member)[rows, family]
    return Terms.of(weight * log.reward, weight=np.asarray(weight, dtype=np.float64))


def _smoothed(weight: Floats, smoothing: float) -> Floats:
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"smoothing is {smoothing}, expected a number in [0, 1]")
    # at smoothing = 1 a weight of 0 would be 0 / 0; its limit is taken as 0
    return np.divide(weight, 1.0 - smoothing + smoothing * weight, out=np.zeros_like(weight), where=weight > 0.0)


def _corrected(
    log: BanditLog, probs: Floats, q: Floats | RewardModel, weight: Floats, *, bottom: Floats | None = None
) -> Terms:
    """Mean prediction under the policy plus weighted residuals of what was logged."""
    model = q if isinstance(q, RewardModel) else RewardModel(q)
    if model.q.shape != probs.shape:
        raise ValueError(f"the reward model's predictions have shape {model.q.shape}, expected {probs.shape}")
    residual = log.reward - model.q[np.arange(log.n_rows), log.action]
    share = weight if bottom is None else weight / bottom.mean()
    # with weights that are not cut the two cancel, and the model's own noise with them: that is what makes DR robust
    noise = model.fit_influence(probs - share[:, None] * one_hot(log.action, log.n_actions))
    return Terms.of(weight * residual, base=(probs * model.q).sum(axis=1) + noise, bottom=bottom, weight=weight)
