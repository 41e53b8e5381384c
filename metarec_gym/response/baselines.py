"""Matrix factorisation as a yardstick for the judge: what a plain model of the same fold says of users it never saw.

Item factors by implicit alternating least squares (Hu, Koren and Volinsky, ICDM 2008). No factor belongs to a held-out user: the
user's vector is folded in from the items taken so far, which is all that the judge knows of the user too. An outcome that the log
answers yes or no to gets item factors of its own, by ridge regression of its residuals on the users' vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metarec_gym.response.network import outcome_level
from metarec_gym.response.rows import Rows
from metarec_gym.seeding import torch_generator

_BLOCK_ROWS = 4_096


@dataclass(frozen=True)
class Factorization:
    """Item factors of one set of users, and how a history becomes a user vector."""

    factors: Tensor
    """float64 (n_items, rank)."""
    confidence: float
    """Extra weight of a taken item."""
    ridge: float
    """Precision of every vector around 0."""

    @classmethod
    def fit(
        cls, rows: Rows, seed: int, *, rank: int = 24, confidence: float = 8.0, ridge: float = 8.0, sweeps: int = 8
    ) -> Factorization:
        """Alternating least squares on the engaged rows."""
        generator = torch_generator(seed, "factorization")
        taken = _histories(rows)
        factors = 0.1 * torch.randn(rows.n_items, rank, generator=generator, dtype=torch.float64)
        by_item = taken.T.tocsr()
        for _ in range(sweeps):
            users = _solve(taken, factors, confidence, ridge)
            factors = _solve(by_item, users, confidence, ridge)
        return cls(factors, confidence, ridge)

    def users(self, rows: Rows, index: Tensor) -> Tensor:
        """Vectors of users from what they took before the rows `index` (int64 (n,)); float64 (n, rank of the factors)."""
        asked, place = torch.sort(index, stable=True)
        begins = torch.searchsorted(rows.user, torch.arange(rows.n_users))
        # blocks of whole users: running sums along them cost one product a row, whatever the length of the histories
        fresh = torch.ones(rows.n_users, dtype=torch.bool)
        fresh[1:] = begins[1:] // _BLOCK_ROWS != begins[:-1] // _BLOCK_ROWS
        edges = [*begins[fresh].tolist(), rows.n]
        parts = []
        for lo, hi in pairwise(edges):
            at = asked[(asked >= lo) & (asked < hi)] - lo
            taken = self.factors[rows.item[lo:hi]] * rows.engaged[lo:hi, None]
            first = begins[rows.user[lo + at]] - lo
            outer, total = _before(_outer(taken), at, first), _before(taken, at, first)
            parts.append(_solved(self.factors, outer, total, self.confidence, self.ridge))
        found = torch.empty(len(index), self.factors.shape[1], dtype=torch.float64)
        found[place] = torch.cat(parts)
        return found

    def answers(self, rows: Rows, outcome: int, *, ridge: float = 30.0) -> Tensor:
        """Item factors of an outcome with known answers; float64 (n_items, rank of the factors)."""
        from scipy.sparse import csr_matrix

        usable = rows.engaged if outcome > 0 else torch.ones(rows.n, dtype=torch.bool)
        user, item = rows.user[usable], rows.item[usable]
        taken = _histories(rows)
        x = _solve(taken, self.factors, self.confidence, self.ridge)
        # in units of their own size, so that one ridge suits every log
        size = x.square().sum(dim=1).mean().sqrt().clamp(min=1e-9)
        x = x / size
        value = rows.outcome[usable, outcome].to(torch.float64)
        mean = value.mean().clamp(1e-4, 1 - 1e-4) if len(value) else torch.tensor(0.5, dtype=torch.float64)
        residual = value - torch.sigmoid(torch.logit(mean) + outcome_level(rows, outcome).to(torch.float64))[item]
        shape, place = (rows.n_items, rows.n_users), (item.numpy(), user.numpy())
        k = x.shape[1]
        # of each item's answers: the sum of x x' and that of x times the residual
        gram = csr_matrix((torch.ones(len(item), dtype=torch.float64).numpy(), place), shape) @ _outer(x).numpy()
        right = csr_matrix((residual.numpy(), place), shape) @ x.numpy()
        system = torch.from_numpy(gram).view(-1, k, k) + ridge / k * torch.eye(k, dtype=torch.float64)
        found: Tensor = torch.linalg.solve(system, torch.from_numpy(right)) / size
        return found


def _histories(rows: Rows) -> Any:
    """Sparse float64 (n_users, n_items): how often each user took each item."""
    from scipy.sparse import csr_matrix

    user, item = rows.user[rows.engaged].numpy(), rows.item[rows.engaged].numpy()
    return csr_matrix((torch.ones(len(item), dtype=torch.float64).numpy(), (user, item)), (rows.n_users, rows.n_items))


def _outer(x: Tensor) -> Tensor:
    return (x[:, :, None] * x[:, None, :]).flatten(1)


def _before(x: Tensor, at: Tensor, first: Tensor) -> Tensor:
    """Sum of x over the rows first..at-1; x (rows, k), at and first (n,) -> (n, k)."""
    running = torch.cat([torch.zeros(1, x.shape[1], dtype=x.dtype), torch.cumsum(x, dim=0)])
    return running[at] - running[first]


def _solve(taken: Any, factors: Tensor, confidence: float, ridge: float) -> Tensor:
    """Least squares of sparse rows of taken items on the items' factors."""
    outer, total = torch.from_numpy(taken @ _outer(factors).numpy()), torch.from_numpy(taken @ factors.numpy())
    return _solved(factors, outer, total, confidence, ridge)


def _solved(factors: Tensor, outer: Tensor, total: Tensor, confidence: float, ridge: float) -> Tensor:
    """(F'F + c sum f f' + ridge) x = (1 + c) sum f, sums over taken items: outer (n, k * k) and total (n, k) -> (n, k)."""
    k = factors.shape[1]
    gram = factors.T @ factors + ridge * torch.eye(k, dtype=factors.dtype) + confidence * outer.view(-1, k, k)
    # positive definite: a Cholesky solve is twice as fast
    found = torch.cholesky_solve((1.0 + confidence) * total[..., None], torch.linalg.cholesky(gram))
    return found[..., 0]
