"""Frozen ALS and neighbours rank as the library that fitted them does: NDCG@10 within 2 % on held-out users."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits
from torch import Tensor

from metarec_gym.data import FOLD_A, FOLD_B, FOLD_S, Dataset, InteractionLog, encode, synthetic_log
from metarec_gym.recommenders.base import FitRows, best_items
from metarec_gym.recommenders.factorization import Als
from metarec_gym.recommenders.neighbours import ItemKnn

MOVIELENS = Path("envs_data/movielens_100k")
LENGTH = 10


def held_out(dataset: Dataset, share: float = 0.35) -> tuple[Tensor, Tensor]:
    """Histories of users outside fold S, and the next ten items of each; -1 pads the histories."""
    users = dataset.users_in(FOLD_A, FOLD_B)
    length = (dataset.engaged_counts()[users] * share).long()
    enough = (dataset.engaged_counts()[users] - length >= LENGTH) & (length > 0)
    users, length = users[enough], length[enough]
    future = dataset.histories(users, length + LENGTH)[:, -LENGTH:]
    return dataset.histories(users, length), future


def ndcg(lists: Tensor, future: Tensor) -> float:
    """Mean NDCG@10 of lists (n, 10) against the ten next items (n, 10)."""
    discount = 1.0 / torch.log2(torch.arange(LENGTH) + 2.0)
    hit = (lists[:, :, None] == future[:, None, :]).any(dim=2).to(torch.float32)
    return float(((hit * discount).sum(dim=1) / discount.sum()).mean())


def matrix_of(histories: Tensor, n_items: int) -> csr_matrix:
    row, column = torch.nonzero(histories >= 0, as_tuple=True)
    item = histories[row, column].numpy()
    return csr_matrix((np.ones(len(item), dtype=np.float32), (row.numpy(), item)), shape=(len(histories), n_items))


def als_ndcg(dataset: Dataset) -> tuple[float, float]:
    """NDCG of the frozen ALS and of the library's own `recommend(..., recalculate_user=True)`, fitted independently."""
    from implicit.cpu.als import AlternatingLeastSquares

    users = dataset.users_in(FOLD_S)
    histories, future = held_out(dataset)
    ours = Als().fit(dataset, users, seed=3)
    with threadpool_limits(1, "blas"):
        library = AlternatingLeastSquares(
            factors=ours.factors,
            regularization=ours.l2,
            alpha=ours.alpha,
            iterations=ours.iterations,
            num_threads=1,
            random_state=0,
        )
        library.fit(FitRows.of(dataset, users).matrix(), show_progress=False)
        # the same factors as ours, so that only the folding-in is compared
        library.item_factors = ours.factor.numpy().copy()
        library._YtY = None
        lists, _ = library.recommend(
            np.arange(len(histories)), matrix_of(histories, dataset.n_items), N=LENGTH, recalculate_user=True
        )
    return ndcg(best_items(ours.score(histories), histories, LENGTH), future), ndcg(torch.from_numpy(lists), future)


def knn_ndcg(dataset: Dataset, weighting: str) -> tuple[float, float]:
    """NDCG of frozen neighbours of the whole history, and of the library's own recommender."""
    from implicit.nearest_neighbours import BM25Recommender, CosineRecommender

    users = dataset.users_in(FOLD_S)
    histories, future = held_out(dataset)
    ours = ItemKnn(weighting=weighting, last_items=None, half_life_items=None).fit(dataset, users, seed=3)
    library = (CosineRecommender if weighting == "cosine" else BM25Recommender)(K=ours.n_neighbours + 1, num_threads=1)
    with pytest.warns(match="CSR"):
        library.fit(FitRows.of(dataset, users).matrix(), show_progress=False)
    lists, _ = library.recommend(
        np.arange(len(histories)), matrix_of(histories, dataset.n_items), N=LENGTH, filter_already_liked_items=True
    )
    mine = best_items(ours.score(histories), histories, LENGTH)
    return ndcg(mine, future), ndcg(torch.from_numpy(lists.astype("int64")), future)


@pytest.fixture(scope="module")
def synthetic() -> Dataset:
    log, _ = synthetic_log(2, n_users=300, n_items=120, events_per_user=(18, 45), popularity_skew=0.8)
    return encode(log, seed=0)


@pytest.fixture(scope="module")
def movielens() -> Dataset:
    if not (MOVIELENS / "interactions.parquet").is_file():
        pytest.skip(f"no prepared log in {MOVIELENS}; run: python -m envs_data.movielens_100k.prepare")
    return encode(InteractionLog.load(MOVIELENS), seed=0)


def test_frozen_als_ranks_as_the_library_on_the_synthetic_log(synthetic: Dataset) -> None:
    ours, library = als_ndcg(synthetic)
    assert ours == pytest.approx(library, rel=0.02)


@pytest.mark.parametrize("weighting", ["cosine", "bm25"])
def test_frozen_neighbours_rank_as_the_library_on_the_synthetic_log(synthetic: Dataset, weighting: str) -> None:
    ours, library = knn_ndcg(synthetic, weighting)
    assert ours == pytest.approx(library, rel=0.02)


@pytest.mark.slow
def test_frozen_als_ranks_as_the_library_on_movielens(movielens: Dataset) -> None:
    ours, library = als_ndcg(movielens)
    assert ours == pytest.approx(library, rel=0.02)
    # a list of the most popular items reaches 0.09 there
    assert ours > 0.11


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["cosine", "bm25"])
def test_frozen_neighbours_rank_as_the_library_on_movielens(movielens: Dataset, weighting: str) -> None:
    ours, library = knn_ndcg(movielens, weighting)
    assert ours == pytest.approx(library, rel=0.02)
    assert ours > 0.11
