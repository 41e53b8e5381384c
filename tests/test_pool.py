"""The pool: lists that a world can rely on, and a folder that gives the same lists again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metarec_gym.data import FOLD_S, Dataset, encode, synthetic_log
from metarec_gym.recommenders import DEFAULT_POOL, Pool
from metarec_gym.recommenders import pool as pool_module
from metarec_gym.recommenders.factorization import Bpr
from metarec_gym.recommenders.neighbours import Ease
from metarec_gym.recommenders.non_personal import Popular
from metarec_gym.recommenders.pool import standard_scores
from metarec_gym.recommenders.sequential import SasRec


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return encode(synthetic_log(4, n_users=100, n_items=60, events_per_user=(6, 20))[0], seed=5)


@pytest.fixture(scope="module")
def pool(dataset: Dataset) -> Pool:
    quick = {"sasrec": SasRec(steps=4, width=16), "bpr": Bpr(iterations=15)}
    names = [quick.get(name, name) for name in DEFAULT_POOL]
    return Pool.fit(dataset, dataset.users_in(FOLD_S), seed=7, names=names)


@pytest.fixture(scope="module")
def histories(dataset: Dataset) -> Tensor:
    users = torch.nonzero(dataset.fold != FOLD_S).flatten()[:40]
    return dataset.histories(users, torch.arange(40) % 12)


def test_the_default_pool_has_ten_strategies_of_six_families_in_the_named_order(pool: Pool) -> None:
    assert pool.names == DEFAULT_POOL
    assert len(pool) == 10
    assert {strategy.kind for strategy in pool} == {
        "non_personal",
        "neighbours",
        "factorization",
        "content",
        "sequential",
        "hybrid",
    }


def test_lists_hold_distinct_items_that_the_user_has_not_consumed(pool: Pool, histories: Tensor) -> None:
    lists = pool.top_lists(histories, 15)
    assert lists.shape == (40, 10, 15)
    assert lists.dtype == torch.int64
    for row, history in zip(lists.tolist(), histories.tolist(), strict=True):
        for ranked in row:
            assert len(set(ranked)) == 15
            assert min(ranked) >= 0
            assert not set(ranked) & set(history)


def test_lists_are_the_scores_in_order_with_ties_to_the_lower_item(pool: Pool, histories: Tensor) -> None:
    lists = pool.top_lists(histories, 60)
    for index, strategy in enumerate(pool):
        scores = strategy.score(histories)
        for row in (0, 7, 11):
            left = [item for item in range(60) if item not in histories[row].tolist()]
            by_hand = sorted(left, key=lambda item, row=row, scores=scores: (-float(scores[row, item]), item))
            if strategy.name != "rrf":  # its score is computed once more, from lists of other lengths
                assert lists[row, index, : len(left)].tolist() == by_hand, strategy.name


def test_a_list_longer_than_the_catalogue_ends_in_padding(pool: Pool, histories: Tensor) -> None:
    lists = pool.top_lists(histories, 65)
    consumed = (histories >= 0).sum(dim=1)
    assert torch.equal((lists == -1).sum(dim=2), (5 + consumed)[:, None].expand(-1, 10))
    # padding only at the end
    assert bool(((lists == -1).to(torch.int8).diff(dim=2) >= 0).all())


def test_lists_do_not_depend_on_the_batch_or_the_padding(
    pool: Pool, histories: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = pool.top_lists(histories, 20)
    padded = torch.nn.functional.pad(histories, (9, 0), value=-1)
    assert torch.equal(pool.top_lists(padded, 20), lists)
    assert torch.equal(torch.cat([pool.top_lists(histories[row : row + 1], 20) for row in range(40)]), lists)
    # chunks of 16 rows instead of one
    monkeypatch.setattr(pool_module, "_ELEMENTS_PER_CHUNK", 1)
    assert torch.equal(pool.top_lists(histories, 20), lists)


def test_lists_leave_out_excluded_items_and_close_the_gaps(pool: Pool, histories: Tensor) -> None:
    """Excluding every second item of the catalogue: the other items keep their order, and nothing else moves up."""
    barred = torch.zeros(len(histories), pool.n_items, dtype=torch.bool)
    barred[:, ::2] = True
    lists = pool.top_lists(histories, pool.n_items, exclude=barred)
    whole = pool.top_lists(histories, pool.n_items)
    for k, name in enumerate(pool.names):
        for row in range(len(histories)):
            kept = [item for item in whole[row, k].tolist() if item >= 0 and item % 2]
            if name == "rrf":
                # ranks are counted without the excluded items, so a fusion may order the rest anew
                assert sorted(item for item in lists[row, k].tolist() if item >= 0) == sorted(kept)
            else:
                assert lists[row, k].tolist() == kept + [-1] * (pool.n_items - len(kept))
    alone = [pool.top_lists(histories[row : row + 1], 9, exclude=barred[row : row + 1]) for row in range(5)]
    assert torch.equal(torch.cat(alone), lists[:5, :, :9])
    with pytest.raises(ValueError, match="one row a history and one column an item"):
        pool.top_lists(histories, 5, exclude=barred[:3])


def test_standard_scores_fall_along_a_list_and_are_worked_out_by_hand(pool: Pool, histories: Tensor) -> None:
    # scores 4 1 1 2, the first item is no candidate: mean 4/3, variance 2/9, so 2 is (2/3) / sqrt(2/9) = sqrt(2) above
    scores = torch.tensor([[4.0, 1.0, 1.0, 2.0]])
    z = standard_scores(scores, torch.tensor([[False, True, True, True]]), torch.tensor([[3, 1, 2, -1]]))
    assert z.tolist()[0] == pytest.approx([2**0.5, -(0.5**0.5), -(0.5**0.5), 0.0], abs=2e-3)
    assert standard_scores(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0, 1]])).tolist() == [
        [0, 0]
    ]
    lists, found = pool.ranked(histories, 20)
    assert torch.equal(lists, pool.top_lists(histories, 20))
    assert found.dtype == torch.float16
    assert bool((found[..., :-1] >= found[..., 1:]).all())
    # a mean over all candidates: the best items stand above it
    assert bool((found[..., 0] >= 0).all())


def test_standard_scores_do_not_depend_on_the_batch(pool: Pool, histories: Tensor) -> None:
    whole = pool.ranked(histories, 10)[1]
    assert torch.equal(torch.cat([pool.ranked(histories[row : row + 1], 10)[1] for row in range(40)]), whole)


def test_lists_for_nobody_are_empty(pool: Pool) -> None:
    assert pool.top_lists(torch.zeros(0, 4, dtype=torch.int64), 5).shape == (0, 10, 5)


def test_cold_users_are_served(pool: Pool) -> None:
    lists = pool.top_lists(torch.zeros(2, 0, dtype=torch.int64), 5)
    assert bool((lists >= 0).all())
    assert torch.equal(lists[0], lists[1])


def test_strategies_disagree(pool: Pool, histories: Tensor) -> None:
    lists = pool.top_lists(histories[11:12], 10)[0].tolist()
    assert len({tuple(ranked) for ranked in lists}) >= 9


def test_a_saved_pool_gives_equal_lists_and_needs_no_pickle(pool: Pool, histories: Tensor, tmp_path: Path) -> None:
    pool.save(tmp_path / "a")
    again = Pool.load(tmp_path / "a")
    assert again.names == pool.names
    assert torch.equal(again.top_lists(histories, 30), pool.top_lists(histories, 30))
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["strategies.json", "strategies.safetensors"]
    assert not any(b"pickle" in file.read_bytes() for file in (tmp_path / "a").iterdir())
    again.save(tmp_path / "b")
    for file in ("strategies.json", "strategies.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_pool_of_a_newer_schema_or_no_pool_is_refused_with_a_sentence(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no strategies\.json .* build a world"):
        Pool.load(tmp_path)
    pool.save(tmp_path)
    file = tmp_path / "strategies.json"
    description = json.loads(file.read_text())
    file.write_text(json.dumps(description | {"schema": 99}))
    with pytest.raises(ValueError, match="schema 99, this metarec_gym reads up to 1; upgrade"):
        Pool.load(tmp_path)
    description["strategies"][0]["class"] = "Oracle"
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="no strategy class 'Oracle'"):
        Pool.load(tmp_path)


def test_another_strategy_in_the_pool_changes_no_other(dataset: Dataset) -> None:
    users = dataset.users_in(FOLD_S)
    alone = Pool.fit(dataset, users, seed=7, names=["als"])
    together = Pool.fit(dataset, users, seed=7, names=["long_tail", "als", "ease"])
    assert torch.equal(alone["als"].state_dict()["factor"], together["als"].state_dict()["factor"])


def test_impossible_pools_are_refused_with_a_sentence(dataset: Dataset) -> None:
    users = dataset.users_in(FOLD_S)
    with pytest.raises(ValueError, match=r"no strategy is named \['magic'\]"):
        Pool.fit(dataset, users, seed=0, names=["popular", "magic"])
    with pytest.raises(ValueError, match="the pool has no"):
        Pool.fit(dataset, users, seed=0, names=["popular", "rrf"])
    with pytest.raises(ValueError, match="distinct names"):
        Pool.fit(dataset, users, seed=0, names=[Popular(), Popular()])
    with pytest.raises(ValueError, match="one catalogue"):
        Pool([Popular().fit(dataset, users, seed=0), Ease()])
    with pytest.raises(KeyError, match="no strategy 'ease'"):
        Pool.fit(dataset, users, seed=0, names=["popular"])["ease"]


def test_costs_rank_a_sequence_model_above_a_fixed_list(pool: Pool) -> None:
    costs = pool.costs()
    assert tuple(costs) == pool.names
    assert costs["popular"].flops < costs["item_knn"].flops < costs["als"].flops < costs["rrf"].flops


def test_a_gpu_scores_as_the_cpu_within_tolerance(pool: Pool, histories: Tensor, tmp_path: Path, gpu: str) -> None:
    far = Pool.load(pool.save(tmp_path), device="cuda" if gpu == "cuda" else "cpu").to(gpu)
    for strategy in pool:
        if strategy.name != "rrf":  # ranks jump where scores are within the tolerance
            scores = far[strategy.name].score(histories.to(gpu)).cpu()
            torch.testing.assert_close(scores, strategy.score(histories), rtol=1e-3, atol=1e-4)
    assert far.top_lists(histories, 10).device.type == "cpu"
