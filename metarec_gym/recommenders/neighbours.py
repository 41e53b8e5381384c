"""Item-to-item strategies: the neighbours of the last items, and the closed-form linear autoencoder EASE."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from metarec_gym.recommenders.base import (
    JSON,
    REFERENCE_LENGTH,
    FitRows,
    Strategy,
    recency_weights,
    spread,
    sum_of_rows,
)

if TYPE_CHECKING:
    from scipy.sparse import coo_matrix

    from metarec_gym.data.dataset import Dataset

EASE_MAX_ITEMS = 20_000


class NeighbourStrategy(Strategy):
    """Adds up the neighbour lists of the last items of the history, the newest counting most.

    Items that are nobody's neighbour come after all others, the most popular first.

    Args:
        name: Name in the pool.
        last_items: How many of the newest items speak; None lets all of them.
        half_life_items: The k-th newest item weighs 0.5 ** (k / half_life_items); None weighs all alike.
    """

    neighbour: Tensor
    similarity: Tensor

    def __init__(self, name: str, last_items: int | None, half_life_items: float | None) -> None:
        super().__init__(name)
        self.last_items = last_items
        self.half_life_items = half_life_items
        # (n_items, n_neighbours): int64 items with -1 for none, and float32 similarities with 0 for none
        self.register_buffer("neighbour", torch.zeros(0, 0, dtype=torch.int64))
        self.register_buffer("similarity", torch.zeros(0, 0))

    def _score(self, histories: Tensor) -> Tensor:
        if self.last_items is not None:
            histories = histories[:, max(0, histories.shape[1] - self.last_items) :]
        batch, n_last = histories.shape
        weight = recency_weights(histories, self.half_life_items)
        row = histories.clamp(min=0)
        neighbour = self.neighbour[row].reshape(batch, n_last * self.neighbour.shape[1])
        value = (self.similarity[row] * weight[:, :, None]).reshape(batch, n_last * self.neighbour.shape[1])
        score = spread(neighbour, value, self.n_items)
        return torch.where(score > 0, score, self._backfill())

    def _backfill(self) -> Tensor:
        # similarities are positive: numbers in [-1, 0] keep the strangers behind every neighbour
        return self.popularity - 1.0

    def _flops(self) -> float:
        spoken = REFERENCE_LENGTH if self.last_items is None else min(self.last_items, REFERENCE_LENGTH)
        return 2.0 * spoken * self.neighbour.shape[1] + self.n_items


class ItemKnn(NeighbourStrategy):
    """Item-item nearest neighbours, fitted by the library `implicit` and frozen into (n_items, n_neighbours) tensors.

    Sarwar et al., "Item-based collaborative filtering recommendation algorithms", WWW 2001; BM25 as in `implicit`.

    Args:
        name: Name in the pool.
        n_neighbours: Neighbours kept per item.
        weighting: "cosine" or "bm25".
        last_items: How many of the newest items speak; None lets all of them.
        half_life_items: The k-th newest item weighs 0.5 ** (k / half_life_items); None weighs all alike.
    """

    kind: ClassVar[str] = "neighbours"

    def __init__(
        self,
        name: str = "item_knn",
        n_neighbours: int = 100,
        weighting: str = "cosine",
        last_items: int | None = 20,
        half_life_items: float | None = 5.0,
    ) -> None:
        super().__init__(name, last_items, half_life_items)
        if weighting not in ("cosine", "bm25"):
            raise ValueError(f"weighting is 'cosine' or 'bm25', came {weighting!r}")
        self.n_neighbours = n_neighbours
        self.weighting = weighting

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        from implicit.nearest_neighbours import ItemItemRecommender, bm25_weight, normalize

        item_user = rows.matrix().T
        weighted = normalize(item_user) if self.weighting == "cosine" else bm25_weight(item_user, K1=1.2, B=0.75)
        # the library counts an item among its own neighbours: one more, so that n_neighbours others are left
        model = ItemItemRecommender(K=self.n_neighbours + 1, num_threads=1)
        model.fit(weighted.T.tocsr(), show_progress=False)
        self.freeze(model.similarity.tocoo())

    def freeze(self, similarity: coo_matrix) -> None:
        """Takes fitted similarities (n_items, n_items): row i says what follows item i."""
        row = torch.from_numpy(similarity.row.astype("int64"))
        column = torch.from_numpy(similarity.col.astype("int64"))
        value = torch.from_numpy(similarity.data.astype("float32"))
        keep = (row != column) & (value > 0)
        self.neighbour, self.similarity = neighbour_table(
            row[keep], column[keep], value[keep], similarity.shape[0], self.n_neighbours
        )

    def _settings(self) -> dict[str, JSON]:
        return {
            "n_neighbours": self.n_neighbours,
            "weighting": self.weighting,
            "last_items": self.last_items,
            "half_life_items": self.half_life_items,
        }


def neighbour_table(
    item: Tensor, neighbour: Tensor, similarity: Tensor, n_items: int, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Triples (item, neighbour, similarity) as padded tables, the most similar first, ties to the lower index.

    Args:
        item: int64 (n_pairs,).
        neighbour: int64 (n_pairs,).
        similarity: float32 (n_pairs,).
        n_items: Rows of the tables.
        width: Neighbours kept per item; None keeps all.

    Returns:
        Neighbours int64 (n_items, width) with -1 for none, similarities float32 of the same shape with 0 for none.
    """
    order = neighbour.argsort(stable=True)
    order = order[similarity[order].argsort(descending=True, stable=True)]
    order = order[item[order].argsort(stable=True)]
    item, neighbour, similarity = item[order], neighbour[order], similarity[order]
    per_item = torch.bincount(item, minlength=n_items)
    place = torch.arange(item.numel()) - (per_item.cumsum(0) - per_item)[item]
    widest = int(per_item.max()) if item.numel() else 0
    width = widest if width is None else min(width, widest)
    neighbours = torch.full((n_items, width), -1, dtype=torch.int64)
    similarities = torch.zeros(n_items, width)
    keep = place < width
    neighbours[item[keep], place[keep]] = neighbour[keep]
    similarities[item[keep], place[keep]] = similarity[keep]
    return neighbours, similarities


class Ease(Strategy):
    """Linear item-item autoencoder with a zero diagonal, solved in closed form.

    Steck, "Embarrassingly shallow autoencoders for sparse data", WWW 2019: with P = (X'X + l2 I)^-1 the weights are
    B_ij = -P_ij / P_jj off the diagonal and 0 on it; a user's scores are x B.

    Args:
        name: Name in the pool.
        l2: Ridge penalty, in events.
    """

    kind: ClassVar[str] = "neighbours"
    weight: Tensor

    def __init__(self, name: str = "ease", l2: float = 300.0) -> None:
        super().__init__(name)
        if l2 <= 0:
            raise ValueError(f"l2 is positive, came {l2}")
        self.l2 = l2
        self.register_buffer("weight", torch.zeros(0, 0))

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        if rows.n_items > EASE_MAX_ITEMS:
            raise ValueError(
                f"ease inverts a dense item x item matrix: at most {EASE_MAX_ITEMS} items, came {rows.n_items}; "
                "leave 'ease' out of the pool or keep fewer items"
            )
        matrix = rows.matrix()
        gram = torch.from_numpy((matrix.T @ matrix).toarray()).to(rows.device, torch.float64)
        gram.diagonal().add_(self.l2)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        # B_ij = -P_ij / P_jj, B_jj = 0
        weight = -inverse / inverse.diagonal()
        weight.fill_diagonal_(0.0)
        self.freeze(weight)

    def freeze(self, weight: Tensor) -> None:
        """Takes fitted weights (n_items, n_items): row i is what item i adds to the scores."""
        # row by row: the inverse comes column by column, and adding up its rows would be 25 times slower
        self.weight = weight.to(torch.float32).contiguous().cpu()

    def _score(self, histories: Tensor) -> Tensor:
        # x B with x in {0, 1}: the weights of the history's items added up, each item once
        items = histories.sort(dim=1).values
        again = torch.zeros_like(items, dtype=torch.bool)
        again[:, 1:] = items[:, 1:] == items[:, :-1]
        items = items.masked_fill(again, -1)
        return sum_of_rows(items, torch.ones_like(items, dtype=self.weight.dtype), self.weight)

    def _flops(self) -> float:
        # only the rows of the history's items are added up
        return 2.0 * REFERENCE_LENGTH * self.n_items

    def _settings(self) -> dict[str, JSON]:
        return {"l2": self.l2}
