"""Estimators for slates, when it is items that are chosen, place by place. Notation: place l of L, a_1..a_L what was shown.

How much a weight has to hold depends on what a place's reward depends on: on the whole slate, on the place's own item, or on the
items down to the place. The stronger the assumption, the smaller the weights; where it is wrong, the estimate is biased. Values
are mean rewards of a slate (summed over its places). For slates that one strategy fills, the strategy is a single action:
`BanditLog.from_log`.
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
class SlateChances:
    """A policy's chances of the slates that were logged."""

    item: Floats
    """(n_slates, L): chance of the item at its place, whatever stands elsewhere (marginal)."""
    cascade: Floats
    """(n_slates, L): chance of the items from the top down to the place (joint); the last column is that of the whole slate."""


@dataclass(frozen=True, eq=False)
class SlateLog:
    """Logged slates."""

    action: Ints
    """int64 (n_slates, L): items shown."""
    reward: Floats
    """(n_slates, L): reward of each place."""
    logger: SlateChances
    """Chances under the logger."""
    cluster: Ints
    """int64 (n_slates,): users."""
    context: Floats
    """(n_slates, n_features)."""

    def __post_init__(self) -> None:
        shape = self.action.shape
        if (
            len(shape) != 2
            or self.reward.shape != shape
            or len(self.cluster) != shape[0]
            or len(self.context) != shape[0]
        ):
            raise ValueError(
                f"action {shape}, reward {self.reward.shape}, cluster {self.cluster.shape} and context "
                f"{self.context.shape} do not "
                "fit; expected (n_slates, L) twice, (n_slates,) and (n_slates, n_features)"
            )
        for name in ("item", "cascade"):
            chances = getattr(self.logger, name)
            if chances.shape != shape or not ((chances > 0.0) & (chances <= 1.0 + 1e-9)).all():
                raise ValueError(
                    f"the logger's {name} chances must be (n_slates, L) = {shape} and in (0, 1]: they were shown"
                )


def sips(log: SlateLog, policy: SlateChances) -> Terms:
    """Standard IPS: mean of w(a_1..a_L) sum_l r_l.

    Strehl et al. (NeurIPS 2010). Unbiased whatever rewards depend on; weights grow exponentially with L.
    """
    weight = policy.cascade[:, -1] / log.logger.cascade[:, -1]
    return Terms.of(weight * log.reward.sum(axis=1), weight=weight)


def iips(log: SlateLog, policy: SlateChances) -> Terms:
    """Independent IPS: mean of sum_l w(a_l) r_l, with the marginal chances of a place.

    Li et al. (KDD 2018). Unbiased if a place's reward depends on its own item only; biased if the items around it matter.
    """
    weight = policy.item / log.logger.item
    return Terms.of((weight * log.reward).sum(axis=1), weight=np.asarray(weight.mean(axis=1)))


def rips(log: SlateLog, policy: SlateChances) -> Terms:
    """Reward-interaction IPS: mean of sum_l w(a_1..a_l) r_l.

    McInerney et al. (KDD 2020). Unbiased if users go from the top down (cascade): a place's reward depends on the items down
    to it; biased if what stands below matters.
    """
    weight = policy.cascade / log.logger.cascade
    return Terms.of((weight * log.reward).sum(axis=1), weight=np.asarray(weight[:, -1]))


def cascade_dr(log: SlateLog, policy: SlateChances, q: Floats, next_item: Floats) -> Terms:
    """Cascade-DR: mean of sum_l  w(a_1..a_l) (r_l - q_l(a_l)) + w(a_1..a_(l-1)) sum_k pi(k | a_1..a_(l-1)) q_l(k).

    Kiyohara et al. (WSDM 2022), equation 10. Unbiased under the cascade assumption as RIPS is, whatever q is; less variance where
    q predicts the rewards from place l down.

    Args:
        log: The slates.
        policy: Its chances of what was logged.
        q: (n_slates, L, K), reward from place l down if item k stands there, see `cascade_rewards`.
        next_item: (n_slates, L, K), pi(k | x, a_1..a_(l-1)).
    """
    if q.shape != next_item.shape or q.shape[:2] != log.action.shape:
        raise ValueError(f"q and next_item have shapes {q.shape} and {next_item.shape}, expected (n_slates, L, K)")
    weight = policy.cascade / log.logger.cascade
    before = np.concatenate([np.ones((len(weight), 1)), weight[:, :-1]], axis=1)
    shown = np.take_along_axis(q, log.action[:, :, None], axis=2)[:, :, 0]
    terms = weight * (log.reward - shown) + before * (next_item * q).sum(axis=2)
    return Terms.of(terms.sum(axis=1), weight=np.asarray(weight[:, -1]))


def cascade_rewards(
    log: SlateLog, next_item: Floats, *, regressor: Any = None, folds: int = 3, seed: int = 0
) -> Floats:
    """q_l(x, a_1..a_(l-1), k): expected reward from place l down under the policy; cross-fitted by user.

    Fitted from the last place upwards on  r_l + sum_k pi(k | a_1..a_l) q_(l+1)(k)  (Kiyohara et al. 2022, section 3.1). Features:
    the context, how often each item stands above, and the item.

    Args:
        log: The slates.
        next_item: (n_slates, L, K), pi(k | x, a_1..a_(l-1)).
        regressor: A scikit-learn regressor; None = ridge regression.
        folds: Folds of users.
        seed: Seed of the folds.

    Returns:
        (n_slates, L, K).
    """
    slates, places, count = next_item.shape
    shown = one_hot(log.action, count)
    above = np.cumsum(shown, axis=1) - shown

    def context(place: int, rows: NDArray[np.bool_]) -> Floats:
        return np.concatenate([log.context[rows], above[rows, place]], axis=1)

    def fit(rows: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], Floats]:
        models: list[Any] = [None] * places
        rest = np.zeros(int(rows.sum()))
        for place in range(places - 1, -1, -1):
            features = context(place, rows)
            target = log.reward[rows, place] + rest
            models[place] = fitted(regressor, design(features, shown[rows, place]), target)
            rest = (next_item[rows, place] * predicted_by_action(models[place], features, count)).sum(axis=1)

        def predict(held_out: NDArray[np.bool_]) -> Floats:
            by_place = [predicted_by_action(m, context(place, held_out), count) for place, m in enumerate(models)]
            return np.stack(by_place, axis=1)

        return predict

    return cross_fitted(fit, cluster_folds(log.cluster, folds, seed), (slates, places, count))
