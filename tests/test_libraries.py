"""Models of implicit and cornac keep the contract of a strategy and rank as their library does, where it can be asked."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from implicit.cpu.als import AlternatingLeastSquares
from implicit.cpu.bpr import BayesianPersonalizedRanking
from implicit.cpu.lmf import LogisticMatrixFactorization
from implicit.nearest_neighbours import BM25Recommender, CosineRecommender, ItemItemRecommender, TFIDFRecommender
from threadpoolctl import threadpool_limits
from torch import Tensor

from metarec_gym.data import FOLD_S, Dataset, encode, synthetic_log
from metarec_gym.recommenders import Pool, Strategy
from metarec_gym.recommenders.base import FitRows, best_items
from metarec_gym.recommenders.factorization import Als
from metarec_gym.recommenders.libraries import CornacModel, ImplicitModel
from tests.test_library_parity import LENGTH, held_out, matrix_of, ndcg
from tests.test_strategies import TestContract, dataset_of, histories, one_thread

__all__ = ["TestContract", "histories", "one_thread"]

try:
    import cornac.models as cornac
except ImportError:
    cornac = None
needs_cornac = pytest.mark.skipif(cornac is None, reason="needs the extra 'recommenders' (cornac)")
FROM_IMPLICIT = ("als", "bpr", "lmf", "cosine", "tfidf")
FROM_CORNAC = ("cornac_ease", "cornac_bpr", "cornac_wbpr", "cornac_mmmf", "cornac_hpf")


def models() -> list[Strategy | str]:
    """A strategy of every kind of model that the adapters take, quick to fit."""
    found: list[Strategy | str] = [
        ImplicitModel(AlternatingLeastSquares(factors=8, alpha=3.0, regularization=1.0), name="als"),
        ImplicitModel(BayesianPersonalizedRanking(factors=8, iterations=15), name="bpr"),
        ImplicitModel(LogisticMatrixFactorization(factors=8), name="lmf"),
        ImplicitModel(CosineRecommender(K=30), name="cosine"),
        ImplicitModel(TFIDFRecommender(K=30), name="tfidf"),
    ]
    if cornac is not None:
        found += [
            CornacModel(cornac.EASE(lamb=100), name="cornac_ease"),
            CornacModel(cornac.BPR(k=8, max_iter=20), name="cornac_bpr"),
            CornacModel(cornac.WBPR(k=8, max_iter=20), name="cornac_wbpr"),
            CornacModel(cornac.MMMF(k=8, max_iter=20), name="cornac_mmmf"),
            CornacModel(cornac.HPF(k=4, max_iter=10), name="cornac_hpf"),
        ]
    return found


@pytest.fixture(params=[*FROM_IMPLICIT, *(pytest.param(name, marks=needs_cornac) for name in FROM_CORNAC)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return encode(synthetic_log(3, n_users=100, n_items=90, events_per_user=(4, 14))[0], seed=5)


@pytest.fixture(scope="module")
def pool(dataset: Dataset) -> Pool:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fitted = Pool.fit(dataset, dataset.users_in(FOLD_S), seed=7, names=models())
    assert torch.equal(torch_before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    return fitted


@pytest.fixture(scope="module")
def second_pool(dataset: Dataset) -> Pool:
    return Pool.fit(dataset, dataset.users_in(FOLD_S), seed=7, names=models())


@pytest.fixture(scope="module")
def larger() -> Dataset:
    log, _ = synthetic_log(2, n_users=300, n_items=120, events_per_user=(18, 45), popularity_skew=0.8)
    return encode(log, seed=0)


def library_lists(model: object, dataset: Dataset, histories: Tensor, **settings: bool) -> Tensor:
    """What implicit's own `recommend` lists for the histories."""
    with threadpool_limits(1, "blas"):
        lists, _ = model.recommend(  # type: ignore[attr-defined]
            np.arange(len(histories)), matrix_of(histories, dataset.n_items), N=LENGTH, **settings
        )
    return torch.from_numpy(lists.astype("int64"))


@pytest.mark.parametrize(
    "model",
    [
        AlternatingLeastSquares(factors=16, alpha=4.0, regularization=2.0, random_state=1, num_threads=1),
        CosineRecommender(K=25, num_threads=1),
        TFIDFRecommender(K=25, num_threads=1),
        BM25Recommender(K=25, K1=1.5, B=0.4, num_threads=1),
        ItemItemRecommender(K=25, num_threads=1),
    ],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.filterwarnings("ignore:.*CSR")
def test_a_model_of_implicit_ranks_as_the_library_itself(larger: Dataset, model: object) -> None:
    users = larger.users_in(FOLD_S)
    strategy = ImplicitModel(model).fit(larger, users, seed=3)
    assert getattr(model, "similarity", None) is None  # a copy was fitted
    assert getattr(model, "item_factors", None) is None
    histories, future = held_out(larger)
    with threadpool_limits(1, "blas"):
        model.fit(FitRows.of(larger, users).matrix().astype("float64"), show_progress=False)  # type: ignore[attr-defined]
    asked = {"recalculate_user": True} if isinstance(model, AlternatingLeastSquares) else {}
    library = ndcg(library_lists(model, larger, histories, **asked), future)
    assert library > 0.2
    assert ndcg(best_items(strategy.score(histories), histories, LENGTH), future) == pytest.approx(library, rel=0.02)


@needs_cornac
def test_ease_of_cornac_ranks_as_the_library_itself(larger: Dataset) -> None:
    users = larger.users_in(FOLD_S)
    strategy = CornacModel(cornac.EASE(lamb=150, posB=False)).fit(larger, users, seed=3)
    fitted = CornacModel(cornac.EASE(lamb=150, posB=False))._trained(FitRows.of(larger, users), 3)
    histories, future = held_out(larger)
    # the library's formula, U B, for users that it has not met
    own = torch.from_numpy(np.asarray(matrix_of(histories, larger.n_items) @ fitted.B)).to(torch.float32)
    own[:, FitRows.of(larger, users).counts() == 0] = -9.0
    library = ndcg(best_items(own, histories, LENGTH), future)
    assert library > 0.3
    assert ndcg(best_items(strategy.score(histories), histories, LENGTH), future) == pytest.approx(library, rel=0.02)


@needs_cornac
@pytest.mark.parametrize("kind", ["BPR", "WBPR", "MMMF", "HPF"])
def test_folded_in_histories_rank_about_as_well_as_the_factors_that_cornac_trained_for_the_same_users(
    larger: Dataset, kind: str
) -> None:
    """No library ranks for users it never met, so its own users, all but their last ten items, are ranked both ways."""
    extra = {"max_iter": 40} if kind == "HPF" else {"learning_rate": 0.05, "max_iter": 150}
    model = getattr(cornac, kind)(k=16 if kind != "HPF" else 8, seed=1, verbose=False, **extra)
    users = torch.arange(larger.n_users)
    length = larger.engaged_counts() - LENGTH
    histories, future = larger.histories(users, length), larger.histories(users, length + LENGTH)[:, -LENGTH:]
    rows, columns = torch.nonzero(histories >= 0, as_tuple=True)
    known = FitRows(rows, histories[rows, columns], torch.zeros(len(rows)), larger.n_users, larger.n_items)
    strategy = CornacModel(model)
    fitted = strategy._trained(known, 1)
    strategy._freeze(fitted, torch.arange(larger.n_items), known.counts() > 0)
    own = torch.from_numpy(np.stack([fitted.score(user) for user in range(larger.n_users)])).to(torch.float32)
    library = ndcg(best_items(own, histories, LENGTH), future)
    folded = ndcg(best_items(strategy._score(histories), histories, LENGTH), future)
    assert library > 0.2
    assert folded > 0.9 * library


def test_a_model_fitted_elsewhere_is_found_by_its_item_ids_and_the_world_is_told() -> None:
    # the model's columns are the log's items 2, 0, 1 and one that the log does not have
    data = dataset_of([[0, 1, 2, 3]], 4)
    model = AlternatingLeastSquares(factors=2, regularization=0.5, alpha=2.0)
    model.item_factors = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [9.0, 9.0]], dtype=np.float32)
    model.user_factors = np.zeros((1, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="fitted already; give item_ids"):
        ImplicitModel(model)
    strategy = ImplicitModel(model, item_ids=[2, 0, 1, "x"]).fit(data, torch.arange(1), seed=0)
    by_hand = Als(factors=2, l2=0.5, alpha=2.0)
    table = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    by_hand.freeze(table, torch.tensor([True, True, True, False]))
    history = torch.tensor([[0]])
    torch.testing.assert_close(strategy.score(history), by_hand._score(history))
    assert strategy.report() == {"fitted": "elsewhere, on users that this world cannot name"}
    with pytest.raises(ValueError, match="the model has 4 items, came 3 item_ids"):
        ImplicitModel(model, item_ids=[0, 1, 2])
    with pytest.raises(ValueError, match="no item of the fitted model is an item of the log"):
        ImplicitModel(model, item_ids=list("abcd")).fit(data, torch.arange(1), seed=0)


@needs_cornac
def test_a_fitted_model_of_cornac_finds_its_items_by_the_ids_it_was_fitted_with(larger: Dataset) -> None:
    from cornac.data import Dataset as CornacDataset

    rows = FitRows.of(larger, larger.users_in(FOLD_S))
    order = torch.arange(len(rows.item)).flip(0)
    events = [(int(u), str(larger.item_ids[i]), 1.0) for u, i in zip(rows.user[order], rows.item[order], strict=True)]
    model = cornac.EASE(lamb=150, verbose=False).fit(CornacDataset.from_uir(events))
    outside = CornacModel(model, name="same").fit(larger, larger.users_in(FOLD_S), seed=0)
    inside = CornacModel(cornac.EASE(lamb=150), name="same").fit(larger, larger.users_in(FOLD_S), seed=0)
    histories, _ = held_out(larger)
    torch.testing.assert_close(outside.score(histories), inside.score(histories))
    assert "fitted" in outside.report()
    assert inside.report() == {}


def test_a_loaded_model_scores_without_its_library_and_cannot_be_fitted_again(
    pool: Pool, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.save(tmp_path)
    monkeypatch.setitem(sys.modules, "cornac", None)
    monkeypatch.setitem(sys.modules, "cornac.models", None)
    loaded = Pool.load(tmp_path)
    histories = dataset.histories(torch.arange(8), torch.arange(8))
    assert torch.equal(loaded.top_lists(histories, 9), pool.top_lists(histories, 9))
    with pytest.raises(RuntimeError, match="give the model again"):
        loaded["als"].fit(dataset, dataset.users_in(FOLD_S), seed=0)
    with pytest.raises(ImportError, match=r"pip install 'metarec-gym\[recommenders\]'"):
        CornacModel(object())


def test_models_that_cannot_be_strategies_are_refused_with_a_sentence() -> None:
    with pytest.raises(ValueError, match="came builtins.object; call to_cpu"):
        ImplicitModel(object())
    if cornac is not None:
        for model in (cornac.UserKNN(), cornac.MF(), cornac.ItemKNN(), cornac.MostPop()):
            with pytest.raises(ValueError, match=f"came {type(model).__name__}: its items cannot be frozen"):
                CornacModel(model)


def test_the_fingerprint_knows_the_settings_of_the_model_and_what_it_learned() -> None:
    one, other = (ImplicitModel(AlternatingLeastSquares(factors=8, iterations=n)).fingerprint() for n in (5, 6))
    assert one != other
    model = AlternatingLeastSquares(factors=2)
    prints = []
    for value in (1.0, 2.0):
        model.item_factors = np.full((3, 2), value, dtype=np.float32)
        prints.append(ImplicitModel(model, item_ids=[0, 1, 2]).fingerprint())
    prints.append(ImplicitModel(model, item_ids=[2, 1, 0]).fingerprint())
    assert len(set(prints)) == 3
