"""Matrix factorisation with the history folded in: item factors are frozen, user factors are solved at scoring.

No trained user factor survives the fit: it would carry the user's future into every "cold" user's list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from metarec_gym.recommenders.base import JSON, REFERENCE_LENGTH, FitRows, Strategy

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset


def library_seed(seed: int) -> int:
    """The seed for a library that takes 32 bits."""
    # numpy's RandomState, which the library builds from it, takes 32 bits
    return seed % 2**31


class Als(Strategy):
    """Implicit-feedback alternating least squares, fitted by the library `implicit`.

    Hu, Koren and Volinsky, "Collaborative filtering for implicit feedback datasets", ICDM 2008. A taken item has
    confidence `alpha` and every other one 1, so the factors u of a user with the items h minimise
    alpha sum_h (1 - u'v)^2 + sum_others (u'v)^2 + l2 |u|^2, the ridge solution of

        (V'V + (alpha - 1) V_h'V_h + l2 I) u = alpha sum_h v

    Args:
        name: Name in the pool.
        factors: Length of the item factors.
        alpha: Confidence of a taken item; the library's own convention (1 + alpha in the paper).
        l2: Ridge penalty.
        iterations: Sweeps of the fit.
    """

    kind: ClassVar[str] = "factorization"
    factor: Tensor
    gram: Tensor

    def __init__(
        self, name: str = "als", factors: int = 32, alpha: float = 2.0, l2: float = 5.0, iterations: int = 15
    ) -> None:
        super().__init__(name)
        self.factors = factors
        self.alpha = alpha
        self.l2 = l2
        self.iterations = iterations
        self.register_buffer("factor", torch.zeros(0, 0))
        # V'V + l2 I, the part of the system that is the same for every user
        self.register_buffer("gram", torch.zeros(0, 0))

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        from implicit.cpu.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        # one BLAS thread inside: the library warns otherwise, and one thread makes the fit repeatable
        with threadpool_limits(1, "blas"):
            model = AlternatingLeastSquares(
                factors=self.factors,
                regularization=self.l2,
                alpha=self.alpha,
                iterations=self.iterations,
                num_threads=1,
                random_state=library_seed(seed),
            )
            model.fit(rows.matrix(), show_progress=False)
        self.freeze(torch.from_numpy(model.item_factors), rows.counts() > 0)

    def freeze(self, factor: Tensor, seen: Tensor) -> None:
        """Takes fitted item factors (n_items, d); `seen`, bool (n_items,), are the items that the fit met."""
        # what nobody took keeps a remnant of its random start
        self.factor = torch.where(seen[:, None], factor.to(torch.float32), 0.0)
        self.gram = self.factor.T @ self.factor + self.l2 * torch.eye(factor.shape[1])

    def _score(self, histories: Tensor) -> Tensor:
        taken = self.factor[histories.clamp(min=0)] * (histories >= 0)[:, :, None]
        system = self.gram + (self.alpha - 1.0) * taken.transpose(1, 2) @ taken
        target = self.alpha * taken.sum(dim=1)
        user = torch.cholesky_solve(target[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
        return user @ self.factor.T

    def _flops(self) -> float:
        width = self.factor.shape[1]
        return 2.0 * REFERENCE_LENGTH * width**2 + width**3 / 3 + 2.0 * width**2 + 2.0 * width * self.n_items

    def _settings(self) -> dict[str, JSON]:
        return {"factors": self.factors, "alpha": self.alpha, "l2": self.l2, "iterations": self.iterations}


class Bpr(Strategy):
    """Bayesian personalised ranking, fitted by the library `implicit`; the history folds in by one Newton-like step.

    Rendle et al., "BPR: Bayesian personalized ranking from implicit feedback", UAI 2009. A user with the items h wants
    factors u that maximise the mean of log sigmoid(u'(v_i - v_j)) over i in h and j in the catalogue. Around u = 0 its
    slope is (mean_h v - mean v) / 2 and its curvature grows with the covariance C of the item factors, so with a ridge

        u = (C + fold_l2 I)^-1 (mean_h v - mean v)        score = u'v + b

    which has no sampled negatives, hence no randomness, and costs one small matrix product.

    Args:
        name: Name in the pool.
        factors: Length of the item factors.
        learning_rate: Step size of the fit.
        l2: Penalty of the fit.
        iterations: Passes of the fit over the events.
        fold_l2: Ridge of the folding-in, in units of the factors' covariance.
    """

    kind: ClassVar[str] = "factorization"
    factor: Tensor
    bias: Tensor
    centre: Tensor
    fold: Tensor

    def __init__(
        self,
        name: str = "bpr",
        factors: int = 32,
        learning_rate: float = 0.05,
        l2: float = 0.01,
        iterations: int = 150,
        fold_l2: float = 0.5,
    ) -> None:
        super().__init__(name)
        self.factors = factors
        self.learning_rate = learning_rate
        self.l2 = l2
        self.iterations = iterations
        self.fold_l2 = fold_l2
        self.register_buffer("factor", torch.zeros(0, 0))
        self.register_buffer("bias", torch.zeros(0))
        self.register_buffer("centre", torch.zeros(0))
        # (C + fold_l2 I)^-1, symmetric
        self.register_buffer("fold", torch.zeros(0, 0))

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        from implicit.cpu.bpr import BayesianPersonalizedRanking
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):
            model = BayesianPersonalizedRanking(
                factors=self.factors,
                learning_rate=self.learning_rate,
                regularization=self.l2,
                iterations=self.iterations,
                num_threads=1,
                random_state=library_seed(seed),
            )
            model.fit(rows.matrix(), show_progress=False)
        # the library keeps the bias in the last column
        factor = torch.from_numpy(model.item_factors)
        self.freeze(factor[:, :-1], factor[:, -1], rows.counts() > 0)

    def freeze(self, factor: Tensor, bias: Tensor, seen: Tensor) -> None:
        """Takes fitted item factors (n_items, d) and biases (n_items,); `seen`, bool (n_items,): those that the fit met."""
        self.factor = factor.to(torch.float32).clone()
        self.bias = bias.to(torch.float32).clone()
        known = self.factor[seen].to(torch.float64)
        self.centre = known.mean(dim=0).to(torch.float32)
        centred = known - known.mean(dim=0)
        covariance = centred.T @ centred / known.shape[0]
        self.fold = torch.linalg.inv(covariance + self.fold_l2 * torch.eye(known.shape[1])).to(torch.float32)

    def _score(self, histories: Tensor) -> Tensor:
        known = histories >= 0
        taken = self.factor[histories.clamp(min=0)] * known[:, :, None]
        mean = taken.sum(dim=1) / known.sum(dim=1, keepdim=True).clamp(min=1)
        return ((mean - self.centre) @ self.fold) @ self.factor.T + self.bias

    def _flops(self) -> float:
        width = self.factor.shape[1]
        return float(REFERENCE_LENGTH * width + 2.0 * width**2 + 2.0 * width * self.n_items)

    def _settings(self) -> dict[str, JSON]:
        return {
            "factors": self.factors,
            "learning_rate": self.learning_rate,
            "l2": self.l2,
            "iterations": self.iterations,
            "fold_l2": self.fold_l2,
        }
