"""Several strategies answering as one: reciprocal rank fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from metarec_gym.recommenders.base import JSON, Cost, FitRows, Strategy, best_items, spread

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset


class ReciprocalRankFusion(Strategy):
    """Adds up 1 / (constant + rank) over the lists of other strategies of the pool.

    Cormack, Clarke and Buettcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods",
    SIGIR 2009. Consumed items are taken out of the lists before ranks are counted. An item beyond the first `depth` of
    every list follows after all others, the most popular first.

    It holds no state of its own but the popularity: `bind` says which fitted strategies it fuses, and the pool does
    that. The pool also hands it the lists it has ranked already, so that fusing costs next to nothing there.

    Args:
        name: Name in the pool.
        bases: Names of the strategies to fuse.
        constant: How little the very first ranks stand out; 60 in the paper.
        depth: How far down a list an item is still counted.
    """

    kind: ClassVar[str] = "hybrid"
    knows_unseen_items: ClassVar[bool] = True

    def __init__(
        self,
        name: str = "rrf",
        bases: Sequence[str] = ("item_knn", "bpr", "sasrec"),
        constant: float = 60.0,
        depth: int = 300,
    ) -> None:
        super().__init__(name)
        if len(set(bases)) != len(bases) or len(bases) < 2 or name in bases:
            raise ValueError(f"bases are two or more distinct names of other strategies, came {tuple(bases)}")
        self.bases = tuple(bases)
        self.constant = constant
        self.depth = depth
        # a plain tuple: as submodules their state would be saved twice
        self._bound: tuple[Strategy, ...] = ()

    def bind(self, strategies: Mapping[str, Strategy]) -> ReciprocalRankFusion:
        """Takes the strategies to fuse out of `strategies`; returns self.

        Raises:
            ValueError: When one is not there.
        """
        missing = [base for base in self.bases if base not in strategies]
        if missing:
            raise ValueError(
                f"{self.name!r} fuses {list(self.bases)}, and the pool has no {missing}; "
                f"add them to the pool or give other bases (there are {sorted(strategies)})"
            )
        self._bound = tuple(strategies[base] for base in self.bases)
        return self

    def fuse(self, lists: Sequence[Tensor]) -> Tensor:
        """Scores from ranked lists, each int64 (batch, depth) with -1 at the end; float32 (batch, n_items)."""
        total = torch.zeros(lists[0].shape[0], self.n_items, device=lists[0].device)
        for ranked in lists:
            rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device, dtype=torch.float32)
            total += spread(ranked, (1.0 / (self.constant + rank)).expand(ranked.shape), self.n_items)
        return torch.where(total > 0, total, self.popularity - 1.0)

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        self._bases()

    def _bases(self) -> tuple[Strategy, ...]:
        if not self._bound:
            raise RuntimeError(f"{self.name!r} has nothing to fuse yet; put it into a Pool or call bind(strategies)")
        return self._bound

    def _score(self, histories: Tensor) -> Tensor:
        return self.fuse([best_items(base.score(histories), histories, self.depth) for base in self._bases()])

    def cost(self) -> Cost:
        """The sum of what its bases cost, and the additions."""
        costs = [base.cost() for base in self._bases()]
        return Cost(
            flops=sum(cost.flops for cost in costs) + self._flops(), seconds=sum(cost.seconds for cost in costs)
        )

    def _flops(self) -> float:
        return float(2 * self.depth * len(self.bases) + self.n_items)

    def _settings(self) -> dict[str, JSON]:
        return {"bases": list(self.bases), "constant": self.constant, "depth": self.depth}
