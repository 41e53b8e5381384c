"""The arithmetic of the validity report: calibration, rates, rank agreement and a two-sample test, all with users as the unit.

Rows of one user are not independent, so every interval here is clustered: means and slopes by sums over users (linearisation),
binned errors and shares of pairs by drawing users with replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarec_gym.evaluation.intervals import Floats, Interval, ratio_interval
from metarec_gym.seeding import numpy_rng

Ints = NDArray[np.int64]

DRAWS = 1_000
"""Bootstrap draws of users."""
BINS = 15
"""Bins of equal weight in reliability curves."""
_TINY = 1e-7


def user_sums(user: Ints, *columns: Floats) -> tuple[Floats, ...]:
    """Sum of each column over the rows of each user; columns (n,) -> (n_users,) in ascending order of the user."""
    _, index = np.unique(user, return_inverse=True)
    return tuple(np.asarray(np.bincount(index, weights=column), dtype=np.float64) for column in columns)


def clustered_mean(value: ArrayLike, user: Ints, weight: ArrayLike | None = None) -> Interval:
    """Weighted mean over rows with a 95 % interval over users.

    Args:
        value: (n,), one number a row.
        user: int64 (n,), whose row it is.
        weight: (n,) >= 0; equal weights if None.

    Returns:
        The interval.
    """
    values = np.asarray(value, dtype=np.float64)
    weights = np.ones_like(values) if weight is None else np.asarray(weight, dtype=np.float64)
    return ratio_interval(*user_sums(user, values * weights, weights))


def log_losses(p: ArrayLike, target: ArrayLike) -> Floats:
    """-log probability of what happened, in nats; (n,) each."""
    prob = np.clip(np.asarray(p, dtype=np.float64), _TINY, 1.0 - _TINY)
    t = np.asarray(target, dtype=np.float64)
    return -(t * np.log(prob) + (1.0 - t) * np.log1p(-prob))


@dataclass(frozen=True)
class Calibration:
    """Do the probabilities mean what they say?

    Attributes:
        ece: Expected calibration error: weighted mean of |predicted - observed| over bins.
        slope: Slope of a logistic regression of what happened on logit(p); 1 = right, below 1 = too sure of itself.
        predicted: Mean prediction.
        observed: What happened, with its interval.
        curve: `predicted`, `observed`, `low`, `high`, `share` of each bin.
    """

    ece: Interval
    slope: Interval | None
    predicted: float
    observed: Interval
    curve: dict[str, list[float]]

    @property
    def ece_share(self) -> Interval:
        """The calibration error as a share of the observed rate."""
        e, rate = self.ece, max(self.observed.estimate, _TINY)
        return Interval(e.estimate / rate, e.low / rate, e.high / rate, e.se / rate, e.df, e.level, 1, e.users)


def calibration(p: ArrayLike, target: ArrayLike, weight: ArrayLike, user: Ints, *, seed: int) -> Calibration:
    """Calibration of predictions with intervals over users.

    Args:
        p: (n,) in (0, 1).
        target: (n,) in [0, 1].
        weight: (n,) >= 0.
        user: int64 (n,).
        seed: Decides the bootstrap.

    Returns:
        The calibration; its slope is None where all predictions are equal.
    """
    prob, t, w = (np.asarray(x, dtype=np.float64) for x in (p, target, weight))
    bins = _equal_weight_bins(prob, w)
    n_bins = int(bins.max()) + 1
    ids, index = np.unique(user, return_inverse=True)
    shape = (len(ids), n_bins)
    flat = index * n_bins + bins
    size = shape[0] * n_bins
    parts = np.stack([np.bincount(flat, weights=c, minlength=size).reshape(shape) for c in (w, w * prob, w * t)])
    total = parts.sum(axis=1)
    drawn = np.einsum("du,cub->cdb", _user_draws(len(ids), seed), parts)
    ece = _binned_error(total)
    low, high = np.quantile(_binned_error(drawn), [0.025, 0.975])
    # drawing users adds noise to an error that counts absolute values: the reversed interval takes that bias off again
    interval = _bootstrap_interval(float(ece), max(2.0 * ece - high, 0.0), max(2.0 * ece - low, ece), len(ids))
    with np.errstate(invalid="ignore", divide="ignore"):
        seen = np.quantile(np.where(drawn[0] > 0, drawn[2] / drawn[0], np.nan), [0.025, 0.975], axis=0)
    curve = {
        "predicted": (total[1] / total[0]).tolist(),
        "observed": (total[2] / total[0]).tolist(),
        "low": np.nan_to_num(seen[0]).tolist(),
        "high": np.nan_to_num(seen[1], nan=1.0).tolist(),
        "share": (total[0] / total[0].sum()).tolist(),
    }
    return Calibration(
        interval,
        calibration_slope(prob, t, w, user),
        float((w * prob).sum() / w.sum()),
        clustered_mean(t, user, w),
        curve,
    )


def calibration_slope(p: Floats, target: Floats, weight: Floats, user: Ints) -> Interval | None:
    """Slope of a weighted logistic regression of `target` on logit(p), with a cluster-robust interval; (n,) each."""
    logit = np.log(np.clip(p, _TINY, 1 - _TINY)) - np.log1p(-np.clip(p, _TINY, 1 - _TINY))
    centre = float(np.average(logit, weights=weight))
    x = np.stack([np.ones_like(logit), logit - centre], axis=1)
    if float(np.sqrt(np.average(x[:, 1] ** 2, weights=weight))) < 1e-9:
        return None
    w = weight / weight.sum()
    beta = np.zeros(2)
    for _ in range(60):
        q = 1.0 / (1.0 + np.exp(-(x @ beta)))
        hessian = (x * (w * q * (1.0 - q))[:, None]).T @ x + 1e-12 * np.eye(2)
        step = np.clip(np.linalg.solve(hessian, x.T @ (w * (target - q))), -2.0, 2.0)
        beta = beta + step
        if float(np.abs(step).max()) < 1e-10:
            break
    q = 1.0 / (1.0 + np.exp(-(x @ beta)))
    hessian = (x * (w * q * (1.0 - q))[:, None]).T @ x + 1e-12 * np.eye(2)
    score = w * (target - q)
    sums = np.stack(user_sums(user, score * x[:, 0], score * x[:, 1]), axis=1)
    users = len(sums)
    inverse = np.linalg.inv(hessian)
    covariance = inverse @ (sums.T @ sums) @ inverse * users / max(users - 1, 1)
    return _normal_interval(float(beta[1]), float(np.sqrt(covariance[1, 1])), users)


def _normal_interval(estimate: float, se: float, users: int) -> Interval:
    from scipy import stats

    df = float(max(users - 1, 1))
    half = float(stats.t.ppf(0.975, df)) * se
    return Interval(estimate, estimate - half, estimate + half, se, df, 0.95, 1, users)


def _bootstrap_interval(estimate: float, low: float, high: float, users: int) -> Interval:
    return Interval(estimate, low, high, (high - low) / 3.92, float(max(users - 1, 1)), 0.95, 1, users)


def _user_draws(users: int, seed: int, draws: int = DRAWS) -> Floats:
    """How often each user is in each bootstrap sample; float64 (draws, users)."""
    rng = numpy_rng(seed, "users drawn with replacement")
    return cast(Floats, rng.multinomial(users, np.full(users, 1.0 / users), size=draws).astype(np.float64))


def _binned_error(parts: Floats) -> Any:
    """Expected calibration error from (weight, weight x p, weight x target) of each bin; (3, ..., bins) -> (...)."""
    return np.abs(parts[1] - parts[2]).sum(axis=-1) / parts[0].sum(axis=-1)


def _equal_weight_bins(p: Floats, weight: Floats, bins: int = BINS) -> Ints:
    order = np.argsort(p, kind="stable")
    share = weight[order] / weight.sum()
    place = np.minimum(((np.cumsum(share) - 0.5 * share) * bins).astype(np.int64), bins - 1)
    # equal predictions belong to one bin: a constant model has one bin, not many noisy ones
    ordered = p[order]
    fresh = np.r_[True, ordered[1:] != ordered[:-1]]
    place = place[fresh][np.cumsum(fresh) - 1]
    found: Ints = np.empty(len(place), dtype=np.int64)
    found[order] = np.unique(place, return_inverse=True)[1]
    return found


# ------------------------------------------------------------------------------------------------ strategies
@dataclass(frozen=True)
class Concordance:
    """Do the world and the log order the strategies alike?

    Attributes:
        pairs: Pairs of strategies.
        separated: Pairs that the log itself tells apart (95 % interval of the paired difference excludes 0).
        agreeing: Those of them that the world orders alike.
        share: agreeing / separated, with its interval over users; None without a separated pair.
        reversed: Names (better in the log, worse in the log) of the separated pairs that the world orders the other way.
        log: Mean hit rate of each strategy in the log, float64 (K,).
        world: The same in the world's logs.
        low: Lower bounds of the log's rates.
        high: Upper bounds.
    """

    pairs: int
    separated: int
    agreeing: int
    share: Interval | None
    reversed: tuple[tuple[str, str], ...]
    log: Floats
    world: Floats
    low: Floats
    high: Floats

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "pairs": self.pairs,
            "separated": self.separated,
            "agreeing": self.agreeing,
            "share": None if self.share is None else self.share.estimate,
            "low": None if self.share is None else self.share.low,
            "high": None if self.share is None else self.share.high,
            "reversed": [list(pair) for pair in self.reversed],
            "strategies": {
                name: {"log": self.log[k], "low": self.low[k], "high": self.high[k], "world": self.world[k]}
                for k, name in enumerate(names)
            },
        }


def concordance(log: Floats, world: Floats, names: Sequence[str], *, seed: int) -> Concordance:
    """Rank agreement on the pairs of strategies that the log separates.

    Args:
        log: (users, K), hit rate of each strategy's list on the user's own events.
        world: (users, K), the same estimator on what the world emits for these users.
        names: Strategy names.
        seed: Decides the bootstrap of users.

    Returns:
        The agreement.
    """
    users, k = log.shape
    pairs = [(a, b) for a in range(k) for b in range(a + 1, k)]
    chosen, signs = [], []
    for a, b in pairs:
        difference = log[:, a] - log[:, b]
        if np.ptp(difference) == 0.0:
            continue
        interval = ratio_interval(difference, np.ones(users))
        if interval.low > 0.0 or interval.high < 0.0:
            chosen.append((a, b))
            signs.append(1.0 if interval.estimate > 0.0 else -1.0)
    rates = [ratio_interval(log[:, a], np.ones(users)) for a in range(k)]
    bounds = {"low": np.array([i.low for i in rates]), "high": np.array([i.high for i in rates])}
    means = {"log": log.mean(axis=0), "world": world.mean(axis=0)}
    if not chosen:
        return Concordance(len(pairs), 0, 0, None, (), **means, **bounds)
    sign = np.array(signs)
    left, right = np.array(chosen).T
    alike = sign * (means["world"][left] - means["world"][right]) > 0.0
    draws = _user_draws(users, seed)
    # both orders move with the users drawn; the pairs stay those that the whole log separates
    drawn_world = draws @ (world[:, left] - world[:, right])
    drawn_log = draws @ (log[:, left] - log[:, right])
    shares = (drawn_world * drawn_log > 0.0).mean(axis=1)
    low, high = np.quantile(shares, [0.025, 0.975])
    estimate = float(alike.mean())
    wrong = [
        (names[a], names[b]) if s > 0 else (names[b], names[a])
        for (a, b), s, ok in zip(chosen, signs, alike, strict=True)
        if not ok
    ]
    share = _bootstrap_interval(estimate, float(min(low, estimate)), float(max(high, estimate)), users)
    return Concordance(len(pairs), len(chosen), int(alike.sum()), share, tuple(wrong), **means, **bounds)


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's correlation; 1.0 when both are constant, 0.0 when one is."""
    from scipy import stats

    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return float(np.ptp(x) == np.ptp(y) == 0.0)
    return float(stats.spearmanr(x, y).statistic)


# ------------------------------------------------------------------------------------------------ two samples
def two_sample_auc(real: Floats, made: Floats, user: Ints, names: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Can a classifier tell the log's windows of events from the world's? Cross-validated by user.

    Args:
        real: (n, n_features), windows of the log.
        made: (n, n_features), windows that the world made for the same users; row by row.
        user: int64 (n,).
        names: Feature names.
        seed: Decides folds and bootstrap.

    Returns:
        JSON-able: `auc` of the better of two classifiers (logistic regression, gradient boosted trees) with `low` and
        `high` over users (0.5 = they cannot be told apart), both classifiers, and what each feature alone tells.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.concatenate([real, made])
    y = np.r_[np.ones(len(real)), np.zeros(len(made))]
    groups = np.r_[user, user]
    # user numbers follow file order; shuffled, a fold is a random part of the users
    ids, index = np.unique(groups, return_inverse=True)
    shuffled = numpy_rng(seed, "classifier folds").permutation(len(ids))[index]
    classifiers = {
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1_000)),
        "boosting": HistGradientBoostingClassifier(
            max_iter=60, learning_rate=0.1, max_leaf_nodes=8, min_samples_leaf=20, l2_regularization=1.0, random_state=0
        ),
    }
    draws = _user_draws(len(ids), seed, 300)
    found: dict[str, Any] = {}
    for name, classifier in classifiers.items():
        score = np.zeros(len(y))
        for learn, ask in GroupKFold(n_splits=5).split(x, y, shuffled):
            score[ask] = classifier.fit(x[learn], y[learn]).predict_proba(x[ask])[:, 1]
        auc = _auc(score, y, np.ones(len(y)))
        low, high = np.quantile([_auc(score, y, draw[index]) for draw in draws], [0.025, 0.975])
        found[name] = {"auc": auc, "low": float(low), "high": float(high)}
    better = max(found.values(), key=lambda entry: entry["auc"])
    alone = {name: _auc(x[:, j], y, np.ones(len(y))) for j, name in enumerate(names)}
    means = {
        name: {"log": float(real[:, j].mean()), "world": float(made[:, j].mean()), "auc": alone[name]}
        for j, name in enumerate(names)
    }
    return {**better, "classifiers": found, "features": means, "n_windows": len(real), "n_users": len(ids)}


def _auc(score: Floats, y: Floats, weight: Floats) -> float:
    """Weighted area under the ROC curve; ties count half."""
    _, place = np.unique(score, return_inverse=True)
    top = np.bincount(place, weights=weight * y)
    bottom = np.bincount(place, weights=weight * (1.0 - y))
    below = np.cumsum(bottom) - bottom
    return float((top * (below + 0.5 * bottom)).sum() / max(top.sum() * bottom.sum(), 1e-12))


# ------------------------------------------------------------------------------------------------ distributions
def hazard_curves(bins: Ints, happened: NDArray[np.bool_], hazard: Floats, n_bins: int) -> tuple[Floats, Floats]:
    """Share that it has happened to by the end of each bin, in the log (Kaplan-Meier) and by the model.

    The model's hazard is averaged over those who are at risk in a bin: whoever was no longer watched counts in neither curve.

    Args:
        bins: int64 (n,), one entry for everyone at risk in a bin.
        happened: (n,), whether it happened in that bin.
        hazard: (n,) probability of it, by the model.
        n_bins: Number of bins.

    Returns:
        Both shares, float64 (n_bins,).
    """
    at_risk = np.maximum(np.bincount(bins, minlength=n_bins), 1)
    seen = np.bincount(bins, weights=happened.astype(np.float64), minlength=n_bins) / at_risk
    said = np.bincount(bins, weights=hazard, minlength=n_bins) / at_risk
    log, model = (np.asarray(1.0 - np.cumprod(1.0 - h), dtype=np.float64) for h in (seen, said))
    return log, model


def curve_quantiles(ends: ArrayLike, share: Floats, at: Sequence[float]) -> list[float | None]:
    """Quantiles of a distribution known at the ends of bins; None where the curve never gets so far."""
    grid = np.asarray(ends, dtype=np.float64)
    found: list[float | None] = []
    for q in at:
        place = int(np.searchsorted(share, q, side="left"))
        if place >= len(grid):
            found.append(None)
            continue
        below = float(share[place - 1]) if place > 0 else 0.0
        start = float(grid[place - 1]) if place > 0 else 0.0
        width = max(float(share[place]) - below, 1e-12)
        found.append(start + (float(grid[place]) - start) * (q - below) / width)
    return found
