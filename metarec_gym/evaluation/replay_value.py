"""What a policy would have earned, from a log with known chances alone: an estimate with its interval, no model of users.

    weighted          mean of  reward * sum_k pi(k | context) w_k           (inverse propensity; unbiased)
    self_normalised   sum of the same over the sum of  sum_k pi(k) w_k      (a little bias, often much less variance)
    rejection         mean reward of the rows that match                    (logs drawn uniformly; Li et al., WSDM 2011)

Rows of one cluster (a user, a request) go up and down together: intervals are those of sums over clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_gym.envs.replay import first_observations
from metarec_gym.envs.replay_table import ReplayTable
from metarec_gym.evaluation.intervals import Interval, ratio_interval
from metarec_gym.policy import Policy

Estimator = Literal["weighted", "self_normalised", "rejection"]
ESTIMATORS = ("weighted", "self_normalised", "rejection")


@dataclass(frozen=True)
class ReplayValue:
    """A policy's value on a log."""

    interval: Interval
    """Mean reward a request; its `users` are clusters."""
    estimator: str
    """How it was estimated."""
    matched: float
    """Rows that the policy would have met as logged: sum of its probabilities of an action that matches."""
    effective_rows: float
    """(sum w)^2 / sum w^2: so many equally weighted rows would say as much; far below `matched` = a few rows decide."""
    largest_weight: float
    """Weight of the row that counts most."""
    mean_weight: float
    """Mean weight; about 1 when the chances are right."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        facts = {name: value for name, value in vars(self).items() if name != "interval"}
        return {**self.interval.to_json(), **facts}


def replay_value(
    table: ReplayTable,
    policy: Policy | Tensor | NDArray[Any] | Sequence[float] | int,
    *,
    estimator: Estimator = "weighted",
    level: float = 0.95,
) -> ReplayValue:
    """Values a policy on a log.

    Args:
        table: The log.
        policy: Probabilities (n_rows, K) or (K,), an action for every row (int), or a policy over the observations of
            `MetaRec/Replay-v0`, met by each row as the first of an episode.
        estimator: See the module.
        level: Confidence level.

    Returns:
        The value and how much of the log it rests on.

    Raises:
        ValueError: When the probabilities do not fit the log, or rejection meets a log that was not drawn uniformly.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected one of {ESTIMATORS}")
    if estimator == "rejection" and not table.uniform:
        raise ValueError(
            f"the log {table.name!r} did not draw its actions uniformly, so the rows that match are no fair sample of the "
            "contexts; use estimator='weighted' or 'self_normalised'"
        )
    probs = _probabilities(table, policy)
    weights = table.weight.cpu().numpy().astype(np.float64)
    match = (probs * (weights > 0)).sum(axis=1)
    # w = sum over k of pi(k | context) * w_k
    weight = match if estimator == "rejection" else (probs * weights).sum(axis=1)
    reward = table.reward.cpu().numpy().astype(np.float64)
    if float(weight.sum()) <= 0.0:
        raise ValueError(f"no row of the log {table.name!r} matches the policy; it says nothing about it")
    over = np.ones_like(weight) if estimator == "weighted" else weight
    return ReplayValue(
        interval=_clustered_ratio(reward * weight, over, table.cluster.cpu().numpy(), level),
        estimator=estimator,
        matched=float(match.sum()),
        effective_rows=float(weight.sum() ** 2 / (weight**2).sum()),
        largest_weight=float(weight.max()),
        mean_weight=float(weight.mean()),
    )


def on_policy_value(table: ReplayTable, action: int, *, level: float = 0.95) -> Interval:
    """Mean reward of the rows that an action logged itself: what a strategy earned when it served.

    Args:
        table: The log.
        action: Index into `table.actions`.
        level: Confidence level.
    """
    own = table.select(table.logged == action)
    if own.n_rows < 2:
        raise ValueError(f"{table.actions[action]!r} logged {own.n_rows} rows of {table.name!r}, expected 2 or more")
    ones = np.ones(own.n_rows)
    return _clustered_ratio(own.reward.cpu().numpy().astype(np.float64), ones, own.cluster.cpu().numpy(), level)


def _probabilities(table: ReplayTable, policy: Any) -> NDArray[np.float64]:
    shape = (table.n_rows, table.n_actions)
    if isinstance(policy, int):
        if not 0 <= policy < table.n_actions:
            raise ValueError(f"action {policy} does not exist, the log has 0..{table.n_actions - 1}")
        probs = np.zeros(shape)
        probs[:, policy] = 1.0
        return probs
    if hasattr(policy, "action_probs"):
        policy.begin(table.n_rows)
        policy = policy.action_probs(first_observations(table), torch.ones(shape, dtype=torch.bool))
    probs = np.asarray(policy.detach().cpu() if isinstance(policy, Tensor) else policy, dtype=np.float64)
    probs = np.broadcast_to(probs, shape) if probs.ndim == 1 and probs.shape[0] == table.n_actions else probs
    if probs.shape != shape:
        raise ValueError(f"the probabilities have shape {probs.shape}, expected {shape} or ({table.n_actions},)")
    if not (np.isfinite(probs).all() and (probs >= 0).all() and np.allclose(probs.sum(axis=1), 1.0, atol=1e-4)):
        raise ValueError("some rows of the probabilities are no distribution; expected numbers >= 0 that sum to 1")
    return probs


def _clustered_ratio(
    top: NDArray[np.float64], bottom: NDArray[np.float64], cluster: NDArray[np.int64], level: float
) -> Interval:
    """sum(top) / sum(bottom) with an interval over clusters."""
    _, number = np.unique(cluster, return_inverse=True)
    return ratio_interval(np.bincount(number, weights=top), np.bincount(number, weights=bottom), level=level)
