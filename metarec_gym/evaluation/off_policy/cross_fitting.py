"""Models that off-policy estimators lean on, each row's fitted without the rows of its user.

A model that has seen a user's rewards and is then used for that user's correction hides part of the noise from the interval;
fitted on the other folds it does not (Chernozhukov et al., "Double/debiased machine learning", Econometrics Journal 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarec_gym.evaluation.intervals import Floats
from metarec_gym.seeding import numpy_rng

Ints = NDArray[np.int64]
MOST_INTERACTIONS = 400
"""Columns of context x action up to which a reward model gets them; beyond, actions and context only add up."""
LEAST_PROPENSITY = 1e-3
"""Floor of estimated propensities: a smaller chance is not told from 0 by any log of usual size."""


def cluster_folds(cluster: ArrayLike, folds: int, seed: int) -> Ints:
    """Fold of every row; rows of one cluster share it, and folds hold equally many clusters (one more or less).

    Args:
        cluster: int (n_rows,).
        folds: Number of folds, at least 2.
        seed: Seed of the assignment.

    Returns:
        int64 (n_rows,) in 0..folds-1.

    Raises:
        ValueError: When there are fewer clusters than folds.
    """
    names, number = np.unique(np.asarray(cluster), return_inverse=True)
    if not 2 <= folds <= len(names):
        raise ValueError(f"folds is {folds}, expected 2 to {len(names)}, the number of users (clusters) in the log")
    of_cluster = numpy_rng(seed, "off_policy_folds").permutation(np.arange(len(names)) % folds)
    return np.asarray(of_cluster[number], dtype=np.int64)


def design(context: Floats, action: Ints, n_actions: int) -> Floats:
    """Features of (context, action): the context, the action one-hot, and their products where these stay few.

    Args:
        context: (n_rows, n_features).
        action: int64 (n_rows,).
        n_actions: K.

    Returns:
        (n_rows, n_features + K) or (n_rows, n_features + K + K * n_features).
    """
    own = np.zeros((len(action), n_actions))
    own[np.arange(len(action)), action] = 1.0
    if context.shape[1] * n_actions > MOST_INTERACTIONS:
        return np.concatenate([context, own], axis=1)
    products = (own[:, :, None] * context[:, None, :]).reshape(len(action), -1)
    return np.concatenate([context, own, products], axis=1)


def linear_regressor() -> Any:
    """The reward model unless another is given: ridge regression with a penalty of one row."""
    from sklearn.linear_model import Ridge

    return Ridge(alpha=1.0)


def cross_fitted(
    fit: Callable[[NDArray[np.bool_]], Callable[[NDArray[np.bool_]], Floats]], fold: Ints, shape: tuple[int, ...]
) -> Floats:
    """Predictions for every row by a model that was fitted on the other folds.

    Args:
        fit: Takes the rows to learn from, bool (n_rows,); returns what predicts the rows of another mask.
        fold: int64 (n_rows,).
        shape: Shape of the predictions, rows first.
    """
    predicted = np.zeros(shape)
    for number in np.unique(fold):
        held_out = fold == number
        predicted[held_out] = fit(~held_out)(held_out)
    return predicted


def cross_fitted_rewards(
    context: Floats,
    action: Ints,
    reward: Floats,
    cluster: ArrayLike,
    n_actions: int,
    *,
    regressor: Any = None,
    folds: int = 3,
    seed: int = 0,
) -> Floats:
    """q(x, k): the reward each action is expected to bring in each row's context.

    Args:
        context: (n_rows, n_features).
        action: int64 (n_rows,), as logged.
        reward: (n_rows,).
        cluster: (n_rows,), users.
        n_actions: K.
        regressor: A scikit-learn regressor; it is cloned for each fold. None = ridge regression.
        folds: Folds of users.
        seed: Seed of the folds.

    Returns:
        (n_rows, K).
    """
    from sklearn.base import clone

    def fit(rows: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], Floats]:
        model = linear_regressor() if regressor is None else clone(regressor)
        model.fit(design(context[rows], action[rows], n_actions), reward[rows])

        def predict(held_out: NDArray[np.bool_]) -> Floats:
            x = context[held_out]
            by_action = [model.predict(design(x, np.full(len(x), k), n_actions)) for k in range(n_actions)]
            return np.stack(by_action, axis=1).astype(np.float64)

        return predict

    return cross_fitted(fit, cluster_folds(cluster, folds, seed), (len(action), n_actions))


def cross_fitted_propensities(
    context: Floats, action: Ints, cluster: ArrayLike, n_actions: int, *, folds: int = 3, seed: int = 0
) -> Floats:
    """p(k | x) of a logger that did not write its chances down: multinomial logistic regression on the context.

    Right only where what decided the action is in the context: a logger that looked at something else (stock, time, a score that
    was not kept) leaves confounding that no estimator here removes and no interval here covers.

    Args:
        context: (n_rows, n_features).
        action: int64 (n_rows,).
        cluster: (n_rows,), users.
        n_actions: K.
        folds: Folds of users.
        seed: Seed of the folds.

    Returns:
        (n_rows, K), rows sum to 1, none below `LEAST_PROPENSITY` (before the last normalisation).

    Raises:
        ValueError: When an action is logged by too few users to be in every training part.
    """
    from sklearn.linear_model import LogisticRegression

    def fit(rows: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], Floats]:
        missing = sorted(set(range(n_actions)) - set(action[rows].tolist()))
        if missing:
            raise ValueError(
                f"actions {missing} are logged by the users of one fold only; their chances cannot be estimated: leave these "
                "actions out, or log more of them"
            )
        model = LogisticRegression(max_iter=1000).fit(context[rows], action[rows])
        return lambda held_out: np.asarray(model.predict_proba(context[held_out]), dtype=np.float64)

    chances = cross_fitted(fit, cluster_folds(cluster, folds, seed), (len(action), n_actions))
    chances = np.maximum(chances, LEAST_PROPENSITY)
    return np.asarray(chances / chances.sum(axis=1, keepdims=True), dtype=np.float64)
