"""Estimators for sequences of requests: earlier choices change later contexts. Notation: request t of T, rho_t = w_1 ... w_t.

Values are expected (discounted) sums of rewards of an episode from the log's start states. Weights multiply along the episode:
beyond some ten requests of a policy that differs from the logger, what is left is a few episodes, and the effective number
says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec_gym.evaluation.intervals import Floats
from metarec_gym.evaluation.off_policy.cross_fitting import (
    Ints,
    cluster_folds,
    cross_fitted,
    design,
    fitted,
    one_hot,
    predicted_by_action,
)
from metarec_gym.evaluation.off_policy.terms import Terms


@dataclass(frozen=True, eq=False)
class EpisodeLog:
    """Logged episodes, padded to the longest."""

    context: Floats
    """(n_episodes, T, n_features): what the policy saw before each request."""
    action: Ints
    """int64 (n_episodes, T)."""
    reward: Floats
    """(n_episodes, T); 0 after the end."""
    propensity: Floats
    """(n_episodes, T) in (0, 1]: the logger's chance of what it chose; anything positive after the end."""
    alive: NDArray[np.bool_]
    """bool (n_episodes, T): the request was made; once False it stays False."""
    cluster: Ints
    """int64 (n_episodes,): users."""

    def __post_init__(self) -> None:
        shape = self.action.shape
        for name in ("reward", "propensity", "alive"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected (n_episodes, T) = {shape}")
        if self.context.shape[:2] != shape or self.cluster.shape != shape[:1]:
            raise ValueError(
                f"context {self.context.shape} and cluster {self.cluster.shape} do not fit {shape[0]} episodes of "
                f"{shape[1]} requests"
            )
        if (self.alive[:, 1:] & ~self.alive[:, :-1]).any() or not self.alive[:, 0].all():
            raise ValueError("`alive` starts True in every episode and never comes back once it is False")
        if (self.reward[~self.alive] != 0.0).any():
            raise ValueError("some rewards after an episode's end are not 0")
        if not ((self.propensity > 0.0) & (self.propensity <= 1.0 + 1e-9))[self.alive].all():
            raise ValueError("some propensities are not in (0, 1]; what was served had a chance of being served")


def step_weights(log: EpisodeLog, probs: Floats) -> Floats:
    """w_t = pi(a_t | x_t) / p(a_t | x_t), 1 after the end; (n_episodes, T).

    Args:
        log: The episodes.
        probs: (n_episodes, T, K), the policy's probabilities at every logged request.
    """
    if probs.shape[:2] != log.action.shape:
        raise ValueError(f"the policy's probabilities have shape {probs.shape}, expected {(*log.action.shape, 'K')}")
    chosen = np.take_along_axis(probs, log.action[:, :, None], axis=2)[:, :, 0]
    return np.asarray(np.where(log.alive, chosen / log.propensity, 1.0))


def pdis(log: EpisodeLog, probs: Floats, *, discount: float = 1.0) -> Terms:
    """Per-decision importance sampling: mean over episodes of sum_t discount^(t-1) rho_t r_t.

    Precup, Sutton and Singh (ICML 2000). Unbiased; variance may grow exponentially with T.
    """
    rho = _cumulative(log, probs)
    return Terms.of((rho * log.reward * _discounts(log, discount)).sum(axis=1), weight=rho[:, -1])


def wpdis(log: EpisodeLog, probs: Floats, *, discount: float = 1.0) -> Terms:
    """Self-normalised (weighted) PDIS: sum_t discount^(t-1) (sum_i rho_it r_it / sum_i rho_it).

    Precup, Sutton and Singh (ICML 2000). Bias of order 1/n (consistent). Episodes that have ended stay in the sums with their
    last weight and reward 0: leaving them out would value only those who stay.
    """
    rho = _cumulative(log, probs)
    return Terms(np.zeros(len(rho)), rho * log.reward * _discounts(log, discount), rho, rho[:, -1])


def sequential_dr(log: EpisodeLog, probs: Floats, q: Floats, *, discount: float = 1.0) -> Terms:
    """Sequential doubly robust: V_t = sum_k pi(k) q_t(k) + w_t (r_t + discount V_(t+1) - q_t(a_t)), mean of V_1.

    Jiang and Li (ICML 2016), equation 10. Unbiased if the propensities are right, whatever q is; PDIS where q = 0.

    Args:
        log: The episodes.
        probs: (n_episodes, T, K).
        q: (n_episodes, T, K), see `fitted_q`.
        discount: In [0, 1].
    """
    if q.shape != probs.shape:
        raise ValueError(f"q has shape {q.shape}, expected {probs.shape}")
    weight = step_weights(log, probs)
    value = np.zeros(len(weight))
    for t in range(weight.shape[1] - 1, -1, -1):
        shown = np.take_along_axis(q[:, t], log.action[:, t, None], axis=1)[:, 0]
        model = (probs[:, t] * q[:, t]).sum(axis=1)
        value = np.where(log.alive[:, t], model + weight[:, t] * (log.reward[:, t] + discount * value - shown), 0.0)
    return Terms.of(value, weight=np.prod(weight, axis=1))


def fitted_q_value(log: EpisodeLog, probs: Floats, q: Floats) -> Terms:
    """Fitted-Q evaluation: mean over start states of sum_k pi(k | x_1) q_1(x_1, k).

    Le, Voloshin and Yue (ICML 2019). A direct method: biased by whatever q gets wrong and by contexts that do not hold the state;
    its interval knows nothing of that.
    """
    start = (probs[:, 0] * q[:, 0]).sum(axis=1)
    return Terms.of(np.zeros(len(start)), base=start, weight=np.zeros(len(start)))


def fitted_q(
    log: EpisodeLog, probs: Floats, *, discount: float = 1.0, regressor: Any = None, folds: int = 3, seed: int = 0
) -> Floats:
    """q_t(x, k): expected reward from request t on, under the policy; one regression a request, cross-fitted by user.

    Finite-horizon fitted-Q evaluation, from the last request backwards, on  r_t + discount sum_k pi(k | x_(t+1))
    q_(t+1)(x_(t+1), k), which is r_t where the episode ended (Le, Voloshin and Yue, ICML 2019).

    Args:
        log: The episodes.
        probs: (n_episodes, T, K).
        discount: In [0, 1].
        regressor: A scikit-learn regressor; None = ridge regression.
        folds: Folds of users.
        seed: Seed of the folds.

    Returns:
        (n_episodes, T, K); 0 where no training episode reached the request.
    """
    episodes, horizon, count = probs.shape
    logged = one_hot(log.action, count)

    def fit(rows: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], Floats]:
        models: list[Any] = [None] * horizon
        value = np.zeros(episodes)
        for t in range(horizon - 1, -1, -1):
            learn = rows & log.alive[:, t]
            if not learn.any():
                continue
            target = log.reward[learn, t] + discount * value[learn]
            models[t] = fitted(regressor, design(log.context[learn, t], logged[learn, t]), target)
            # where the episode ended before, nothing is left to win
            value = np.zeros(episodes)
            value[learn] = (probs[learn, t] * predicted_by_action(models[t], log.context[learn, t], count)).sum(axis=1)

        def predict(held_out: NDArray[np.bool_]) -> Floats:
            none = np.zeros((int(held_out.sum()), count))
            by_step = [
                none if model is None else predicted_by_action(model, log.context[held_out, t], count)
                for t, model in enumerate(models)
            ]
            return np.stack(by_step, axis=1)

        return predict

    return cross_fitted(fit, cluster_folds(log.cluster, folds, seed), probs.shape)


def _cumulative(log: EpisodeLog, probs: Floats) -> Floats:
    return np.asarray(np.cumprod(step_weights(log, probs), axis=1), dtype=np.float64)


def _discounts(log: EpisodeLog, discount: float) -> Floats:
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount is {discount}, expected a number in [0, 1]")
    return np.asarray(discount ** np.arange(log.action.shape[1], dtype=np.float64))
