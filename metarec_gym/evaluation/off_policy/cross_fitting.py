"""Models that off-policy estimators lean on, each row's fitted without the rows of its user.

A model that has seen a user's rewards and is then used for that user's correction hides part of the noise from the interval;
fitted on the other folds it does not (Chernozhukov et al., "Double/debiased machine learning", Econometrics Journal 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


def design(context: Floats, choice: Floats) -> Floats:
    """Features of (context, action), linear in `choice`: so those of a policy are their mean over its actions.

    Args:
        context: (n_rows, n_features).
        choice: (n_rows, K): one-hot for an action, probabilities for a policy, any difference of such.

    Returns:
        (n_rows, 1 + n_features + K) or, where these stay few, with the products of choice and context behind.
    """
    total = choice.sum(axis=1, keepdims=True)
    columns = [total, total * context, choice]
    if context.shape[1] * choice.shape[1] <= MOST_INTERACTIONS:
        columns.append((choice[:, :, None] * context[:, None, :]).reshape(len(choice), -1))
    return np.concatenate(columns, axis=1)


def one_hot(action: Ints, n_actions: int) -> Floats:
    """(..., K), float64."""
    return np.asarray(np.eye(n_actions)[action])


class RidgeRegressor:
    """The reward model unless another is given: least squares, a penalty of one row on all columns but the first (constant)."""

    coef: Floats
    """(n_columns,)."""
    inverse: Floats
    """(n_columns, n_columns): inverse of X'X + penalty."""

    def fit(self, features: Floats, target: Floats) -> RidgeRegressor:
        """Fits (n_rows, n_columns) to (n_rows,); returns self."""
        penalty = np.eye(features.shape[1])
        # the constant is free, or the predictions would be pulled to 0; this little keeps a fold without rows solvable
        penalty[0, 0] = 1e-9
        self.inverse = np.asarray(np.linalg.inv(features.T @ features + penalty), dtype=np.float64)
        self.coef = self.inverse @ (features.T @ target)
        return self

    def predict(self, features: Floats) -> Floats:
        """(n_rows,)."""
        return np.asarray(features @ self.coef)


def fitted(regressor: Any, features: Floats, target: Floats) -> Any:
    """A scikit-learn regressor's clone, fitted; `RidgeRegressor` if None."""
    if regressor is None:
        return RidgeRegressor().fit(features, target)
    from sklearn.base import clone

    return clone(regressor).fit(features, target)


def predicted_by_action(model: Any, context: Floats, n_actions: int) -> Floats:
    """Predictions for every action, (n_rows, K)."""
    if not isinstance(model, RidgeRegressor):
        by_action = [model.predict(design(context, np.tile(row, (len(context), 1)))) for row in np.eye(n_actions)]
        return np.stack(by_action, axis=1).astype(np.float64)
    # the same for a model that is linear in the design: constant, context, action, their products
    n_features = context.shape[1]
    own, by_context, by_choice, products = np.split(model.coef, np.cumsum([1, n_features, n_actions]))
    slopes = by_context[:, None] + products.reshape(n_actions, n_features).T if len(products) else by_context[:, None]
    return np.asarray(own + by_choice + context @ slopes)


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


@dataclass(frozen=True, eq=False)
class RewardModel:
    """q(x, k): the reward each action is expected to bring in each row's context; each row predicted without its user."""

    q: Floats
    """(n_rows, K)."""
    fits: tuple[RidgeRegressor, ...] = ()
    """One a fold; empty for predictions given or another regressor's, whose own noise no interval then holds."""
    fold: Ints | None = None
    """int64 (n_rows,): fold of each row."""
    context: Floats | None = None
    """(n_rows, n_features)."""
    features: Floats | None = None
    """(n_rows, n_columns): what was fitted on, the `design` of context and logged action."""
    reward: Floats | None = None
    """(n_rows,): what was fitted."""

    def fit_influence(self, choice: Floats) -> Floats:
        """How far each row moves  mean_i sum_k choice_ik q(x_i, k)  by having been in the fit.

        psi_j = sum over folds f that j helped to fit of  (sum_{i in f} z_i)' (X'X + penalty)^-1 x_j (r_j - q_f(x_j)),  z_i the
        features of choice_i: the usual expansion of a least-squares estimate (White, Econometrica 1980).

        Args:
            choice: (n_rows, K).

        Returns:
            (n_rows,), times n_rows, mean 0; zeros where the fit is not known.
        """
        moved = np.zeros(len(self.q))
        if self.fold is None or self.context is None or self.features is None or self.reward is None:
            return moved
        for number, model in enumerate(self.fits):
            held_out = self.fold == number
            direction = _design_sum(self.context[held_out], choice[held_out]) @ model.inverse
            learnt = np.where(held_out, 0.0, self.reward - model.predict(self.features))
            moved += (self.features @ direction) * learnt
        return np.asarray(moved - moved.mean())


def _design_sum(context: Floats, choice: Floats) -> Floats:
    """`design` summed over the rows, (n_columns,)."""
    total = choice.sum(axis=1)
    columns = [total.sum()[None], total @ context, choice.sum(axis=0)]
    if context.shape[1] * choice.shape[1] <= MOST_INTERACTIONS:
        columns.append((choice.T @ context).ravel())
    return np.concatenate(columns)


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
) -> RewardModel:
    """Fits q(x, k) on what was logged.

    Args:
        context: (n_rows, n_features).
        action: int64 (n_rows,), as logged.
        reward: (n_rows,).
        cluster: (n_rows,), users.
        n_actions: K.
        regressor: A scikit-learn regressor; it is cloned for each fold. None = ridge regression.
        folds: Folds of users.
        seed: Seed of the folds.
    """
    fold = cluster_folds(cluster, folds, seed)
    features = design(context, one_hot(action, n_actions))
    q = np.zeros((len(action), n_actions))
    models = []
    for number in range(folds):
        held_out = fold == number
        models.append(fitted(regressor, features[~held_out], reward[~held_out]))
        q[held_out] = predicted_by_action(models[-1], context[held_out], n_actions)
    if regressor is not None:
        return RewardModel(q)
    return RewardModel(q, tuple(models), fold, context, features, reward)


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
