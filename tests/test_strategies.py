"""The contract that every strategy keeps, and one or two facts about each that can be worked out by hand."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from metarec_gym.data import FOLD_S, Dataset, encode, synthetic_log
from metarec_gym.recommenders import DEFAULT_POOL, Pool, Strategy, register_strategy
from metarec_gym.recommenders.base import FitRows, best_items, keep_on_the_right, recency_weights
from metarec_gym.recommenders.content import Content, sentence_embeddings
from metarec_gym.recommenders.factorization import Als, Bpr
from metarec_gym.recommenders.hybrid import ReciprocalRankFusion, Reranker
from metarec_gym.recommenders.neighbours import Ease, ItemKnn
from metarec_gym.recommenders.non_personal import LongTail, Popular, Trending
from metarec_gym.recommenders.precomputed import Precomputed
from metarec_gym.recommenders.registry import rebuild
from metarec_gym.recommenders.sequential import SasRec

DAY_S = 86_400.0
KINDS = {
    "non_personal",
    "neighbours",
    "factorization",
    "sequential",
    "content",
    "hybrid",
    "precomputed",
    "library",
    "language_model",
    "own",
}


def dataset_of(
    histories: Sequence[Sequence[int]],
    n_items: int,
    *,
    times_s: Sequence[Sequence[float]] | None = None,
    item_text: Sequence[str] | None = None,
) -> Dataset:
    """A tiny log written down by hand: what each user took, one second apart unless said otherwise."""
    lengths = torch.tensor([len(history) for history in histories])
    times = times_s if times_s is not None else [[float(place) for place in range(len(row))] for row in histories]
    n_rows = int(lengths.sum())
    return Dataset(
        name="by hand",
        outcomes=("watch",),
        outcome_weights=(1.0,),
        has_impressions=False,
        user_ids=np.array([str(user) for user in range(len(histories))], dtype=object),
        item_ids=np.array([str(item) for item in range(n_items)], dtype=object),
        user=torch.repeat_interleave(torch.arange(len(histories)), lengths),
        item=torch.tensor([item for history in histories for item in history]),
        time=torch.tensor([second for row in times for second in row], dtype=torch.float64),
        outcome=torch.ones(n_rows, 1),
        session=torch.zeros(n_rows, dtype=torch.int64),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        fold=torch.zeros(len(histories), dtype=torch.int8),
        item_text=tuple(item_text) if item_text is not None else ("",) * n_items,
        item_category=torch.zeros(n_items, 0),
        category_names=(),
        item_release=torch.full((n_items,), math.nan, dtype=torch.float64),
    )


class SameCategory(Strategy):
    """A strategy as a user writes it: the last item's categories first, the most popular of them leading."""

    kind = "own"

    def __init__(self, name: str = "same_category") -> None:
        super().__init__(name)
        self.register_buffer("category", torch.zeros(0, 0))

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        self.category = dataset.item_category

    def _score(self, histories: Tensor) -> Tensor:
        return self.category[histories[:, -1].clamp(min=0)] @ self.category.T + self.popularity

    def _flops(self) -> float:
        return 2.0 * self.category.numel()


register_strategy(SameCategory)


def all_users(dataset: Dataset) -> Tensor:
    return torch.arange(dataset.n_users)


def variants(dataset: Dataset) -> list[Strategy | str]:
    """The default pool, with a SASRec that trains for a moment, and the other settings that have code of their own."""
    ids = dataset.item_ids.tolist()
    lists = pd.DataFrame({"item_id": ids[:-1], "neighbour_id": ids[1:], "score": np.linspace(1.0, 2.0, len(ids) - 1)})
    small: list[Strategy | str] = [name for name in DEFAULT_POOL if name not in ("sasrec", "bpr")]
    return [
        *small,
        SasRec(steps=4, width=16),
        Bpr(iterations=15),
        ItemKnn("item_bm25", weighting="bm25", last_items=None, half_life_items=None),
        Content("embedding", embeddings=np.eye(dataset.n_items, 5) + 0.1),
        SameCategory(),
        Precomputed(neighbours=lists, ranking=pd.DataFrame({"item_id": ids[3:9], "score": range(6)})),
    ]


NAMES = (*DEFAULT_POOL, "item_bm25", "embedding", "same_category", "precomputed")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return encode(synthetic_log(3, n_users=100, n_items=90, events_per_user=(4, 14))[0], seed=5)


@pytest.fixture(scope="module")
def pool(dataset: Dataset) -> Pool:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fitted = Pool.fit(dataset, dataset.users_in(FOLD_S), seed=7, names=variants(dataset))
    # no fit touches a global generator
    assert torch.equal(torch_before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    return fitted


@pytest.fixture(scope="module")
def second_pool(dataset: Dataset) -> Pool:
    """Fitted alike, except that everything about the users outside fold S is another."""
    outside = dataset.fold[dataset.user] != FOLD_S
    other = replace(
        dataset,
        item=torch.where(outside, (dataset.item * 7 + 3) % dataset.n_items, dataset.item),
        time=torch.where(outside, dataset.time + 1e8, dataset.time),
        outcome=torch.where(outside[:, None], 1.0 - dataset.outcome, dataset.outcome),
    )
    return Pool.fit(other, other.users_in(FOLD_S), seed=7, names=variants(other))


@pytest.fixture(scope="module")
def histories(dataset: Dataset) -> Tensor:
    """Users outside fold S after 0, 1, 2 ... items."""
    users = torch.nonzero(dataset.fold != FOLD_S).flatten()[:24]
    return dataset.histories(users, torch.arange(24) % 9)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """The strategies of the contract one by one."""
    return str(request.param)


class TestContract:
    """What a world relies on, whichever strategy it is.

    A module that imports this class and has fixtures `pool`, `second_pool`, `histories`, `dataset` and `name` of its own holds
    its strategies to the same contract.
    """

    def test_scores_are_finite_float32_of_shape_batch_by_items(
        self, name: str, pool: Pool, histories: Tensor, dataset: Dataset
    ) -> None:
        scores = pool[name].score(histories)
        assert scores.shape == (24, dataset.n_items)
        assert scores.dtype == torch.float32
        assert bool(torch.isfinite(scores).all())
        assert not scores.requires_grad

    def test_no_user_id_can_be_handed_in(self, name: str, pool: Pool) -> None:
        assert list(inspect.signature(pool[name].score).parameters) == ["histories"]

    def test_a_row_alone_scores_as_in_a_batch(self, name: str, pool: Pool, histories: Tensor) -> None:
        batch = pool[name].score(histories)
        for row in (0, 1, 5, 23):
            torch.testing.assert_close(pool[name].score(histories[row : row + 1])[0], batch[row])

    def test_padding_on_the_left_changes_nothing(self, name: str, pool: Pool, histories: Tensor) -> None:
        padded = torch.nn.functional.pad(histories, (5, 0), value=-1)
        torch.testing.assert_close(pool[name].score(padded), pool[name].score(histories))

    def test_a_user_without_history_gets_the_same_list_however_that_is_written(self, name: str, pool: Pool) -> None:
        nothing = pool[name].score(torch.zeros(3, 0, dtype=torch.int64))
        padding = pool[name].score(torch.full((3, 4), -1))
        assert bool(torch.isfinite(nothing).all())
        assert torch.equal(nothing, padding)
        assert torch.equal(nothing[0], nothing[2])

    def test_an_empty_batch_scores_to_an_empty_table(self, name: str, pool: Pool) -> None:
        assert pool[name].score(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, pool.n_items)

    def test_same_seed_same_state_and_other_users_do_not_matter(self, name: str, pool: Pool, second_pool: Pool) -> None:
        first, second = pool[name].state_dict(), second_pool[name].state_dict()
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), key

    def test_state_dict_and_description_rebuild_it(self, name: str, pool: Pool, histories: Tensor) -> None:
        rebuilt = rebuild(pool[name].describe())
        rebuilt.load_state_dict(pool[name].state_dict())
        if isinstance(rebuilt, Reranker):
            rebuilt.bind({strategy.name: strategy for strategy in pool})
        assert torch.equal(rebuilt.score(histories), pool[name].score(histories))
        assert rebuilt.describe() == pool[name].describe()

    def test_cost_is_positive_and_its_flops_are_repeatable(self, name: str, pool: Pool, second_pool: Pool) -> None:
        cost = pool[name].cost()
        assert cost.flops > 0
        assert cost.seconds > 0
        assert cost.flops == second_pool[name].cost().flops

    def test_nothing_is_left_to_train(self, name: str, pool: Pool) -> None:
        assert list(pool[name].parameters()) == []
        assert pool[name].kind in KINDS

    def test_items_that_fold_s_never_met_come_last_unless_something_else_is_known_of_them(
        self, name: str, pool: Pool, histories: Tensor
    ) -> None:
        strategy = pool[name]
        unseen = strategy.popularity == 0
        assert bool(unseen.any())
        if not strategy.knows_unseen_items:
            scores = strategy.score(histories)
            assert bool((scores[:, unseen].amax(dim=1) < scores[:, ~unseen].amin(dim=1)).all())

    def test_histories_of_another_kind_are_refused_with_a_sentence(self, name: str, pool: Pool) -> None:
        with pytest.raises(ValueError, match=r"histories are int64 \(batch, H\)"):
            pool[name].score(torch.zeros(2, 3))


def test_items_unknown_to_fold_s_exist_in_the_contract_log(pool: Pool, dataset: Dataset) -> None:
    few = Pool.fit(dataset, dataset.users_in(FOLD_S)[:3], seed=0, names=("popular", "ease", "als", "item_knn"))
    assert bool((few["popular"].popularity == 0).any())
    history = torch.tensor([[int(torch.nonzero(few["popular"].popularity == 0)[0])]])
    for strategy in few:
        # a history of unknown items says nothing: the user is served like one without any
        assert torch.equal(strategy.score(history), strategy.score(torch.zeros(1, 0, dtype=torch.int64)))
        scores = strategy.score(history)[0]
        assert bool(scores[strategy.popularity == 0].max() < scores[strategy.popularity > 0].min())


def test_users_who_engaged_with_nothing_are_refused_with_a_sentence(dataset: Dataset) -> None:
    nobody = replace(dataset, outcome=torch.zeros_like(dataset.outcome))
    with pytest.raises(ValueError, match="have no engaged event"):
        Popular().fit(nobody, nobody.users_in(FOLD_S), seed=0)


def test_scoring_before_fitting_is_refused_with_a_sentence() -> None:
    with pytest.raises(RuntimeError, match="has not been fitted"):
        Ease().score(torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("values", ["distinct", "few", "one"])
def test_the_best_items_are_those_of_a_sort_by_score_and_then_by_item(values):
    generator = torch.Generator().manual_seed(3)
    for n_items, length in ((3, 2), (30, 5), (60, 30), (60, 70)):
        scores = torch.zeros(12, n_items)
        if values != "one":
            scores = torch.randn(12, n_items, generator=generator)
        if values == "few":
            scores = scores.round() * -1.0
        excluded = torch.randint(-1, n_items, (12, n_items // 2), generator=generator)
        expected = []
        for score, barred in zip(scores.tolist(), excluded.tolist(), strict=True):
            allowed = sorted(set(range(n_items)) - set(barred), key=lambda item: (-score[item], item))[:length]
            expected.append(allowed + [-1] * (length - len(allowed)))
        assert best_items(scores, excluded, length).tolist() == expected


def test_ties_go_to_the_lower_item_and_excluded_items_never_appear() -> None:
    scores = torch.tensor([[0.5, -1.0, 0.5, -0.0, 0.0, -2.0]])
    assert best_items(scores, torch.tensor([[-1, 2]]), 8).tolist() == [[0, 3, 4, 1, 5, -1, -1, -1]]


def test_dropped_items_close_the_gap_towards_the_newest() -> None:
    histories = torch.tensor([[-1, 4, 5, 6], [1, 2, 3, 0]])
    keep = torch.tensor([[False, True, False, True], [False, False, False, True]])
    assert keep_on_the_right(histories, keep).tolist() == [[4, 6], [-1, 0]]


def test_recency_weights_halve_every_half_life() -> None:
    weights = recency_weights(torch.tensor([[-1, 7, 7, 7]]), half_life_items=1.0)
    assert weights.tolist() == [[0.0, 0.25, 0.5, 1.0]]


def test_popular_halves_an_event_for_every_half_life_since() -> None:
    # item 0 twice, ten days before the end; item 1 once, at the end: 2 / 2 = 1 each; item 2 once, twenty days before: 1 / 4
    data = dataset_of([[2, 0], [0, 1]], 3, times_s=[[0.0, 10 * DAY_S], [10 * DAY_S, 20 * DAY_S]])
    popular = Popular(half_life_days=10.0).fit(data, all_users(data), seed=0)
    torch.testing.assert_close(popular.score(torch.zeros(1, 0, dtype=torch.int64))[0], torch.tensor([1.0, 1.0, 0.25]))


def test_trending_prefers_what_rose_to_what_was_always_there() -> None:
    # 12 events before the window (item 0 nine times, item 1 once, item 2 twice), 4 inside it (items 0 and 1 twice each):
    # expected 4 * 9 / 12 = 3 and 4 * 1 / 12 = 1 / 3; item 2 fell silent and comes after both
    old, new = [0.0] * 6, [30 * DAY_S] * 2
    data = dataset_of(
        [[0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 2, 2, 0, 1]],
        3,
        times_s=[old + new, old + new],
    )
    trending = Trending(window_days=1.0, smoothing=1.0).fit(data, all_users(data), seed=0)
    row = trending.score(torch.zeros(1, 0, dtype=torch.int64))[0]
    torch.testing.assert_close(row[:2], torch.tensor([2 * math.sqrt(3 / 4), 2 * math.sqrt(3 / (4 / 3))]))
    assert float(row[2]) < 0


def test_long_tail_leads_with_rare_items_and_ends_with_those_hardly_seen() -> None:
    # item i in 0..19 has 5 events, 20..39 have 100, 40..44 have 1
    plan = [(item, 5) for item in range(20)] + [(item, 100) for item in range(20, 40)] + [(i, 1) for i in range(40, 45)]
    data = dataset_of([[item for item, count in plan for _ in range(count)]], 45)
    order = best_items(
        LongTail(min_events=5).fit(data, all_users(data), seed=1).score(torch.zeros(1, 0, dtype=torch.int64)),
        torch.zeros(1, 0, dtype=torch.int64),
        45,
    )[0]
    assert sorted(order[40:].tolist()) == [40, 41, 42, 43, 44]
    # a rare item is drawn twenty times as readily as a common one
    assert int((order[:20] < 20).sum()) >= 16
    other = LongTail(min_events=5).fit(data, all_users(data), seed=2).item_score
    assert not torch.equal(other, LongTail(min_events=5).fit(data, all_users(data), seed=1).item_score)


def test_item_knn_adds_cosines_of_the_last_items_the_newest_counting_most() -> None:
    # users {0, 1}, {0, 1}, {0, 2}: cos(0, 1) = 2 / sqrt(3 * 2), cos(0, 2) = 1 / sqrt(3 * 1), cos(1, 2) = 0
    data = dataset_of([[0, 1], [0, 1], [0, 2]], 3)
    knn = ItemKnn(n_neighbours=5, last_items=2, half_life_items=1.0).fit(data, all_users(data), seed=0)
    cos_01, cos_02 = 2 / math.sqrt(6), 1 / math.sqrt(3)
    scores = knn.score(torch.tensor([[-1, 0], [1, 2]]))
    torch.testing.assert_close(scores[0, 1:], torch.tensor([cos_01, cos_02]))
    torch.testing.assert_close(scores[1, 0], torch.tensor(cos_02 + 0.5 * cos_01))
    # nobody's neighbours rank below every neighbour, by popularity: item 1 was taken twice, item 2 once
    assert float(scores[1, 2]) < float(scores[1, 1]) < 0


def test_item_knn_listens_to_the_last_items_only() -> None:
    data = dataset_of([[0, 1], [0, 1], [2, 3]], 4)
    knn = ItemKnn(last_items=1).fit(data, all_users(data), seed=0)
    assert torch.equal(knn.score(torch.tensor([[0, 2]])), knn.score(torch.tensor([[-1, 2]])))


def test_ease_is_its_closed_form() -> None:
    # users {0, 1}, {0}, {1}: X'X + I = [[3, 1], [1, 3]], its inverse is [[3, -1], [-1, 3]] / 8, so B_01 = 1 / 3
    data = dataset_of([[0, 1], [0], [1]], 2)
    ease = Ease(l2=1.0).fit(data, all_users(data), seed=0)
    torch.testing.assert_close(ease.weight, torch.tensor([[0.0, 1 / 3], [1 / 3, 0.0]]))
    torch.testing.assert_close(ease.score(torch.tensor([[0]])), torch.tensor([[0.0, 1 / 3]]))


def test_ease_adds_the_weights_of_the_history_each_item_once_whatever_its_order(dataset: Dataset) -> None:
    ease = Ease(l2=5.0).fit(dataset, all_users(dataset), seed=0)
    a, b = torch.nonzero(ease.popularity > 0).flatten()[:2].tolist()
    one, other, repeated = ease.score(torch.tensor([[-1, -1, a, b], [-1, -1, b, a], [a, b, a, b]]))
    known = ease.popularity > 0
    torch.testing.assert_close(one[known], (ease.weight[a] + ease.weight[b])[known])
    assert torch.equal(one, other)
    assert torch.equal(one, repeated)


def test_als_folds_a_history_in_as_the_ridge_solution_of_its_loss(dataset: Dataset) -> None:
    als = Als(factors=4, alpha=3.0, l2=0.5).fit(dataset, dataset.users_in(FOLD_S), seed=0)
    seen = torch.nonzero(als.popularity > 0).flatten()
    history = seen[None, [1, 4, 7]]
    factor = als.factor[seen].to(torch.float64)
    user = torch.linalg.lstsq(factor, als.score(history)[0, seen].to(torch.float64)).solution
    # the slope of sum_i c_i (p_i - u'v_i)^2 + l2 |u|^2 vanishes at u; c = 3 and p = 1 on the history, c = 1 and p = 0 off it
    taken = torch.isin(seen, history[0])
    wanted, confidence = taken.to(torch.float64), 1.0 + 2.0 * taken.to(torch.float64)
    slope = (factor.T * confidence) @ (wanted - factor @ user) - 0.5 * user
    assert float(slope.abs().max()) < 1e-4
    assert float(user.abs().max()) > 1e-2


@pytest.mark.parametrize("strategy", [Als(), Bpr(), Ease(), ItemKnn(), Content()], ids=lambda strategy: strategy.name)
def test_a_taste_shown_by_three_items_is_met_in_the_list(strategy: Strategy) -> None:
    log, truth = synthetic_log(1, n_users=160, n_items=60, n_types=4, on_type_share=0.95, popularity_skew=0.3)
    data = encode(log, seed=0)
    strategy.fit(data, data.users_in(FOLD_S), seed=0)
    category = data.item_category.argmax(dim=1)
    for type_index in range(4):
        own = torch.nonzero((category == type_index) & (strategy.popularity > 0)).flatten()
        history = own[None, :3]
        best = best_items(strategy.score(history), history, 5)[0]
        assert int((category[best] == type_index).sum()) >= 4, strategy.name
    assert truth is not None


def test_content_finds_the_item_that_says_the_same_and_knows_items_nobody_took() -> None:
    text = ["red fast car", "slow boat", "red fast bike", "slow boat", "green tea"]
    data = dataset_of([[0, 1, 2], [0, 1, 2]], 5, item_text=text)
    content = Content(popularity_weight=0.0).fit(data, all_users(data), seed=0)
    history = torch.tensor([[1]])
    assert best_items(content.score(history), history, 1).tolist() == [[3]]
    history = torch.tensor([[0]])
    assert best_items(content.score(history), history, 1).tolist() == [[2]]


def test_content_without_any_description_is_popularity() -> None:
    data = dataset_of([[0, 1], [1, 2], [1, 2]], 4)
    content = Content().fit(data, all_users(data), seed=0)
    assert best_items(content.score(torch.tensor([[0]])), torch.tensor([[0]]), 3).tolist() == [[1, 2, 3]]


def test_content_takes_embeddings_and_refuses_those_of_another_catalogue() -> None:
    data = dataset_of([[0, 1, 2, 3]], 4)
    embeddings = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]])
    content = Content(embeddings=embeddings).fit(data, all_users(data), seed=0)
    assert best_items(content.score(torch.tensor([[0]])), torch.tensor([[0]]), 1).tolist() == [[2]]
    with pytest.raises(ValueError, match=r"shape \(n_items=4, d\)"):
        Content(embeddings=embeddings[:3]).fit(data, all_users(data), seed=0)


def test_sentence_embeddings_say_which_extra_is_missing() -> None:
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"metarec-gym\[content\]"):
            sentence_embeddings(dataset_of([[0, 1]], 2))
    else:
        pytest.skip("the extra is installed")


def test_sasrec_learns_what_comes_after_what() -> None:
    # every user walks round a ring of twelve items from another start: after item i comes item i + 1
    data = dataset_of([[(start + step) % 12 for step in range(10)] for start in range(12)], 12)
    sasrec = SasRec(width=16, steps=60, learning_rate=1e-2, dropout=0.0).fit(data, all_users(data), seed=0)
    history = torch.tensor([[2, 3, 4], [-1, 8, 9], [-1, -1, 0]])
    assert best_items(sasrec.score(history), history, 1)[:, 0].tolist() == [5, 10, 1]


def test_sasrec_survives_users_of_one_event_each() -> None:
    data = dataset_of([[0], [1], [1]], 3)
    sasrec = SasRec(width=16, steps=5).fit(data, all_users(data), seed=0)
    # nothing to learn from: log popularity decides
    assert best_items(sasrec.score(torch.tensor([[0]])), torch.tensor([[0]]), 2).tolist() == [[1, 2]]


def test_reciprocal_rank_fusion_adds_reciprocal_ranks() -> None:
    data = dataset_of([[0, 1, 2, 3]], 4)
    fusion = ReciprocalRankFusion(bases=("popular", "ease"), constant=60.0)
    fusion.bind({"popular": Popular(), "ease": Ease()}).fit(data, all_users(data), seed=0)
    scores = fusion.rerank(torch.zeros(1, 0, dtype=torch.int64), [torch.tensor([[2, 0]]), torch.tensor([[0, 1]])])
    expected = torch.tensor([1 / 62 + 1 / 61, 1 / 62, 1 / 61, 0.0])
    torch.testing.assert_close(scores[0, :3], expected[:3])
    assert float(scores[0, 3]) <= 0.0


def test_reciprocal_rank_fusion_costs_what_its_bases_cost_together(pool: Pool) -> None:
    bases = [pool[name].cost().flops for name in ("item_knn", "bpr", "sasrec")]
    assert sum(bases) < pool["rrf"].cost().flops < sum(bases) * 2 + 1e5


def test_precomputed_serves_lists_by_the_logs_own_ids(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = dataset_of([[0, 1, 2, 3, 4]], 5)
    pairs = pd.DataFrame(
        {"item_id": ["0", "0", "3", "nowhere"], "neighbour_id": ["2", "4", "4", "1"], "score": [2.0, 1.0, 3.0, 9.0]}
    )
    pairs.to_parquet(tmp_path / "pairs.parquet")
    ranking = pd.DataFrame({"item_id": ["1", "3"], "score": [0.1, 0.9]})
    strategy = Precomputed(neighbours=tmp_path / "pairs.parquet", ranking=ranking, half_life_items=1.0)
    strategy.fit(data, all_users(data), seed=0)
    assert strategy.ignored_rows == 1
    history = torch.tensor([[-1, 0], [0, 3]])
    # after 0: 2 (2.0) before 4 (1.0), then the ranking 3, 1; after 0, 3: 4 has 3.0 + 0.5 * 1.0, 2 has 0.5 * 2.0
    assert best_items(strategy.score(history), history, 4).tolist() == [[2, 4, 3, 1], [4, 2, 1, -1]]
    torch.testing.assert_close(strategy.score(history)[1, [4, 2]], torch.tensor([3.5, 1.0]))


def test_precomputed_says_what_is_wrong_with_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = dataset_of([[0, 1]], 2)
    cases = [
        (Precomputed(), ValueError, "has no file"),
        (Precomputed(ranking=tmp_path / "none.parquet"), FileNotFoundError, "expects a Parquet file"),
        (Precomputed(ranking=pd.DataFrame({"item_id": ["0"]})), ValueError, r"\['score'\] missing"),
        (Precomputed(ranking=pd.DataFrame({"item_id": ["x"], "score": [1.0]})), ValueError, "no id of the file"),
        (Precomputed(ranking=pd.DataFrame({"item_id": ["0"], "score": [math.nan]})), ValueError, "missing or infinite"),
        (
            Precomputed(neighbours=pd.DataFrame({"item_id": ["0"], "neighbour_id": ["1"], "score": [-1.0]})),
            ValueError,
            "scores are positive",
        ),
    ]
    for strategy, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            strategy.fit(data, all_users(data), seed=0)
