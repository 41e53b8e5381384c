"""`Terms`: the rows of an estimate, so that every estimator shares one value, one influence function and one set of intervals.

    value = mean(base) + sum_j  sum_i top_ij / sum_i bottom_ij

Plain averages (IPS, DR) have bottom = 1, self-normalised ones (SNIPS, SNDR, WPDIS) have their weights there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from metarec_gym.evaluation.intervals import Floats


@dataclass(frozen=True, eq=False)
class Terms:
    """What each row adds to an estimate."""

    base: Floats
    """(n_rows,), averaged."""
    top: Floats
    """(n_rows, J), summed and divided by the sum of `bottom`, column by column."""
    bottom: Floats
    """(n_rows, J)."""
    weight: Floats
    """(n_rows,): the weight of each row's own reward, for diagnostics; zeros where rewards are predicted only."""

    @classmethod
    def of(cls, top: Floats, *, weight: Floats, base: Floats | None = None, bottom: Floats | None = None) -> Terms:
        """Terms of one column; base is 0 and bottom is 1 unless given. All (n_rows,)."""
        return cls(
            np.zeros_like(top) if base is None else base,
            top[:, None],
            (np.ones_like(top) if bottom is None else bottom)[:, None],
            weight,
        )

    def __post_init__(self) -> None:
        if not all(np.isfinite(part).all() for part in (self.base, self.top, self.bottom)):
            raise ValueError("an estimate has rows that are not finite; check rewards, propensities and predictions")
        if (self.bottom.sum(axis=0) <= 0.0).any():
            raise ValueError("the weights sum to 0: no row of the log matches the policy, so it says nothing about it")

    @property
    def value(self) -> float:
        """The estimate."""
        return float(self.base.mean() + self._ratios().sum())

    def _ratios(self) -> Floats:
        return np.asarray(self.top.sum(axis=0) / self.bottom.sum(axis=0), dtype=np.float64)

    def influence(self) -> Floats:
        """(n_rows,), mean 0: how far each row moves the estimate, to first order (times the number of rows).

        psi_i = base_i - mean(base) + sum_j (top_ij - R_j bottom_ij) / mean(bottom_j),  R_j the ratio of column j.
        """
        ratios = self._ratios()
        moved = (self.top - ratios * self.bottom) / self.bottom.mean(axis=0)
        return np.asarray(self.base - self.base.mean() + moved.sum(axis=1), dtype=np.float64)

    def cluster_sums(self, cluster: ArrayLike) -> ClusterSums:
        """The same summed over clusters."""
        number = np.unique(np.asarray(cluster), return_inverse=True)[1]
        columns = np.column_stack([np.ones_like(self.base), self.base, self.top, self.bottom])
        sums = np.stack([np.bincount(number, weights=column) for column in columns.T], axis=1).astype(np.float64)
        count = self.top.shape[1]
        return ClusterSums(sums[:, 0], sums[:, 1], sums[:, 2 : 2 + count], sums[:, 2 + count :])


@dataclass(frozen=True, eq=False)
class ClusterSums:
    """Sums over the rows of each cluster; all that resampling clusters needs."""

    rows: Floats
    """(n_clusters,): rows."""
    base: Floats
    """(n_clusters,)."""
    top: Floats
    """(n_clusters, J)."""
    bottom: Floats
    """(n_clusters, J)."""

    def resampled(self, times: Floats) -> tuple[Floats, Floats]:
        """Estimates and standard errors where each cluster counts as often as given.

        Args:
            times: (n_samples, n_clusters), whole numbers.

        Returns:
            Values and linearised standard errors, both (n_samples,); NaN where no row of a sample matches the policy.
        """
        count = self.top.shape[1]
        sums = np.column_stack([self.rows, self.base, self.top, self.bottom])
        pairs = (sums[:, :, None] * sums[:, None, :]).reshape(len(sums), -1)
        totals = times @ sums
        rows, base, top, bottom = totals[:, 0], totals[:, 1], totals[:, 2 : 2 + count], totals[:, 2 + count :]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio, share = top / bottom, rows[:, None] / bottom
        mean_base = base / rows
        # psi of a cluster is linear in its sums, so their squares summed are a quadratic form in the summed pairs
        psi = np.column_stack([-mean_base, np.ones(len(times)), share, -share * ratio])
        squares = np.einsum("sij,si,sj->s", (times @ pairs).reshape(len(times), *2 * [sums.shape[1]]), psi, psi)
        clusters = times.shape[1]
        return mean_base + ratio.sum(axis=1), np.sqrt(np.maximum(squares, 0.0) * clusters / (clusters - 1)) / rows
