"""Strategies that answer with the lists of others: what they share, and reciprocal rank fusion."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from metarec_gym.recommenders.base import JSON, Cost, FitRows, Strategy, best_items, spread

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

AnyStrategy = TypeVar("AnyStrategy", bound=Strategy)


class Reranker(Strategy):
    """A strategy that ranks anew what other strategies of the pool have listed.

    A subclass fills in `rerank` and `_flops`. `bind` says which fitted strategies its bases are, and the pool does that; the
    pool also hands it the lists that it has ranked already, so that a base is asked once. A base may be a re-ranker itself.

    Args:
        name: Name in the pool.
        bases: Names of the strategies whose lists it takes.
        depth: How far down a list it looks.
    """

    kind: ClassVar[str] = "hybrid"
    # the bases have their stand-ins
    personal: ClassVar[bool] = False
    knows_unseen_items: ClassVar[bool] = True

    def __init__(self, name: str, bases: Sequence[str], depth: int) -> None:
        super().__init__(name)
        if not bases or len(set(bases)) != len(bases) or name in bases:
            raise ValueError(f"the bases of {name!r} are distinct names of other strategies, came {tuple(bases)}")
        if depth < 1:
            raise ValueError(f"depth is 1 or more, came {depth}")
        self.bases = tuple(bases)
        self.depth = depth
        # a plain tuple: as submodules their state would be saved twice
        self._bound: tuple[Strategy, ...] = ()

    def bind(self, strategies: Mapping[str, Strategy]) -> Self:
        """Takes its bases out of `strategies`; returns self.

        Raises:
            ValueError: When one is not there.
        """
        missing = [base for base in self.bases if base not in strategies]
        if missing:
            raise ValueError(
                f"{self.name!r} takes the lists of {list(self.bases)}, and the pool has no {missing}; "
                f"add them to the pool or give other bases (there are {sorted(strategies)})"
            )
        self._bound = tuple(strategies[base] for base in self.bases)
        return self

    @abstractmethod
    def rerank(self, histories: Tensor, lists: Sequence[Tensor]) -> Tensor:
        """Scores from ranked lists.

        Args:
            histories: int64 (batch, H), newest last, -1 on the left; H may be 0.
            lists: One of each base, int64 (batch, `depth` or fewer), best first, without consumed items, -1 at the end.

        Returns:
            float32 (batch, n_items), finite.
        """

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        self._bases()

    def _bases(self) -> tuple[Strategy, ...]:
        if not self._bound:
            raise RuntimeError(f"{self.name!r} has no bases yet; put it into a Pool or call bind(strategies)")
        return self._bound

    def _score(self, histories: Tensor) -> Tensor:
        return self.rerank(
            histories, [best_items(base.score(histories), histories, self.depth) for base in self._bases()]
        )

    def cost(self) -> Cost:
        """The sum of what its bases cost, and its own operations."""
        costs = [base.cost() for base in self._bases()]
        return Cost(
            flops=sum(cost.flops for cost in costs) + self._flops(),
            seconds=sum(cost.seconds for cost in costs),
            money=sum(cost.money for cost in costs),
        )


def bind_all(strategies: Sequence[AnyStrategy]) -> list[AnyStrategy]:
    """Binds the re-rankers among `strategies`; returns all in an order in which every base comes before who needs it.

    Raises:
        ValueError: When a base is missing, or re-rankers wait for each other.
    """
    by_name = {strategy.name: strategy for strategy in strategies}
    waiting, order, ready = list(strategies), list[AnyStrategy](), set[str]()
    for strategy in strategies:
        if isinstance(strategy, Reranker):
            strategy.bind(by_name)
    while waiting:
        free = [s for s in waiting if not isinstance(s, Reranker) or ready.issuperset(s.bases)]
        if not free:
            raise ValueError(
                f"the strategies {[s.name for s in waiting]} wait for each other's lists; change their bases"
            )
        order += free
        ready |= {s.name for s in free}
        waiting = [s for s in waiting if s.name not in ready]
    return order


class ReciprocalRankFusion(Reranker):
    """Adds up 1 / (constant + rank) over the lists of other strategies of the pool.

    Cormack, Clarke and Buettcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods",
    SIGIR 2009. Consumed items are taken out of the lists before ranks are counted. An item beyond the first `depth` of
    every list follows after all others, the most popular first. It holds no state of its own but the popularity.

    Args:
        name: Name in the pool.
        bases: Names of the strategies to fuse.
        constant: How little the very first ranks stand out; 60 in the paper.
        depth: How far down a list an item is still counted.
    """

    def __init__(
        self,
        name: str = "rrf",
        bases: Sequence[str] = ("item_knn", "bpr", "sasrec"),
        constant: float = 60.0,
        depth: int = 300,
    ) -> None:
        super().__init__(name, bases, depth)
        if len(bases) < 2:
            raise ValueError(f"a fusion has two bases or more, came {tuple(bases)}")
        self.constant = constant

    def rerank(self, histories: Tensor, lists: Sequence[Tensor]) -> Tensor:
        """Summed reciprocal ranks, whoever the user is; see `Reranker.rerank`."""
        total = torch.zeros(lists[0].shape[0], self.n_items, device=lists[0].device)
        for ranked in lists:
            rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device, dtype=torch.float32)
            total += spread(ranked, (1.0 / (self.constant + rank)).expand(ranked.shape), self.n_items)
        return torch.where(total > 0, total, self.popularity - 1.0)

    def _flops(self) -> float:
        return float(2 * self.depth * len(self.bases) + self.n_items)

    def _settings(self) -> dict[str, JSON]:
        return {"bases": list(self.bases), "constant": self.constant, "depth": self.depth}
