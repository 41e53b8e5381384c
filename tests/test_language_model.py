"""A language model as a strategy, against a real local server that behaves and misbehaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metarec_gym import world_building
from metarec_gym.data import FOLD_S, Dataset, encode, synthetic_log
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.recommenders import Pool, Strategy
from metarec_gym.recommenders.completions import ENDPOINT_VARIABLE, parse_ranking
from metarec_gym.recommenders.hybrid import ReciprocalRankFusion
from metarec_gym.recommenders.language_model import LanguageModelReranker
from metarec_gym.recommenders.non_personal import Popular
from metarec_gym.recommenders.registry import rebuild
from metarec_gym.world import World
from tests.local_endpoint import Reply, Server, backwards, said
from tests.test_registry import dense_log
from tests.test_strategies import TestContract, all_users, dataset_of, histories, one_thread

pytest.importorskip("openai", reason="needs the extra 'llm' (openai)")
__all__ = ["TestContract", "histories", "one_thread"]


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, well-behaved, with nothing asked yet; and no settings of the machine that runs the test."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv(ENDPOINT_VARIABLE, raising=False)
    running.behave, running.most_open = backwards, 0
    running.requests.clear()
    running.keys.clear()
    return running


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return encode(synthetic_log(3, n_users=100, n_items=90, events_per_user=(4, 14))[0], seed=5)


def ask(server: Server, cache: Path, **settings: Any) -> LanguageModelReranker:
    return LanguageModelReranker(
        "m", cache, "popular", **({"endpoint": server.url, "candidates": 4, "retries": 0} | settings)
    )


def pool_of(dataset: Dataset, strategy: Strategy) -> Pool:
    return Pool.fit(dataset, dataset.users_in(FOLD_S), seed=7, names=["popular", strategy])


def lists_of(pool: Pool, rows: int = 3) -> Tensor:
    """Lists (rows, 2, 8) for histories of one item each, item 0 first."""
    return pool.top_lists(torch.arange(rows)[:, None], 8)


# ------------------------------------------------------------------------------------------ the shared contract
@pytest.fixture(params=["language_model"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def answers(running: Server, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers") / "answers.sqlite"


@pytest.fixture(scope="module")
def pool(running: Server, dataset: Dataset, answers: Path) -> Pool:
    running.behave = backwards
    return pool_of(dataset, ask(running, answers))


@pytest.fixture(scope="module")
def second_pool(pool: Pool, running: Server, dataset: Dataset, answers: Path) -> Pool:
    return pool_of(dataset, ask(running, answers))


# ------------------------------------------------------------------------------------------ prompt and answer
def test_the_prompt_holds_the_newest_items_and_the_numbered_candidates(tmp_path: Path) -> None:
    text = ["Alien\n(1979) Horror", "Heat Action", "", "Up " + "x" * 100]
    data = dataset_of([[0, 1, 2, 3]], 4, item_text=text)
    strategy = LanguageModelReranker("m", tmp_path / "a", "popular", history_items=2)
    strategy.bind({"popular": Popular()}).fit(data, all_users(data), seed=0)
    assert strategy.prompt([3, 1, 0], [2, 3]).splitlines() == [
        "Taken, oldest first:",
        "- Heat Action",
        "- Alien (1979) Horror",
        "Candidates:",
        "1. item 2",
        "2. Up " + "x" * 77,
    ]


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("3, 1, 2", [2, 0, 1]),
        ("[2, 3]", [1, 2]),
        ('Sure! Here it is: ["3","1"] as you liked 1999 films', [2, 0]),
        ("1. Toy Story 2\n3. Seven\n", [0, 2]),
        ("2 > 3 > 1", [1, 2, 0]),
        ("3, 3, 1, 3", [2, 0]),
        ("0, 7, 2, -1, 99999999999999999999", [1, 0]),
        ("<think>maybe [1, 2, 3]? no</think>3,1", [2, 0]),
        ("I cannot say.", []),
        ("", []),
    ],
)
def test_numbers_are_read_from_whatever_was_said_and_wrong_ones_are_dropped(text: str, places: list[int]) -> None:
    assert parse_ranking(text, 3) == places


def test_answers_order_the_candidates_and_the_base_orders_the_rest(
    server: Server, dataset: Dataset, tmp_path: Path
) -> None:
    server.behave = lambda request: said("3, 3, 1, 17")
    lists = lists_of(pool_of(dataset, ask(server, tmp_path / "a")))
    base = lists[:, 0]
    # third, first, then what was left out in the base's order, then the rest of the base's list
    assert torch.equal(lists[:, 1], base[:, [2, 0, 1, 3, 4, 5, 6, 7]])
    assert server.requests[0]["model"] == "m"
    assert server.requests[0]["temperature"] == 0.0


def test_users_without_history_and_padding_rows_are_not_asked_about(
    server: Server, dataset: Dataset, tmp_path: Path
) -> None:
    pool = pool_of(dataset, ask(server, tmp_path / "a"))
    lists = pool.top_lists(torch.tensor([[-1], [3], [-1]]), 8)
    assert len(server.requests) == 1
    assert torch.equal(lists[[0, 2], 1], lists[[0, 2], 0])
    assert not torch.equal(lists[1, 1], lists[1, 0])


def test_a_fusion_may_take_the_list_of_a_language_model(server: Server, dataset: Dataset, tmp_path: Path) -> None:
    names = [ReciprocalRankFusion("both", ("popular", "language_model")), ask(server, tmp_path / "a"), "popular"]
    lists = Pool.fit(dataset, dataset.users_in(FOLD_S), seed=0, names=names).top_lists(torch.tensor([[0]]), 4)[0]
    # the base lists a b c d, the model d c b a: first and last have 1/61 + 1/64, the two between 2/62 or so, which is less
    assert set(lists[0, :2].tolist()) == set(lists[2, [0, 3]].tolist())
    assert len(server.requests) == 1


# ------------------------------------------------------------------------------------------ cache, replay, money
def test_an_answer_in_the_cache_is_not_asked_for_again(server: Server, dataset: Dataset, tmp_path: Path) -> None:
    first = lists_of(pool_of(dataset, ask(server, tmp_path / "a")))
    assert len(server.requests) == 3
    again = pool_of(dataset, ask(server, tmp_path / "a"))
    assert torch.equal(lists_of(again), first)
    assert torch.equal(lists_of(again), first)
    assert len(server.requests) == 3
    # another model, prompt or option is another question
    lists_of(pool_of(dataset, ask(server, tmp_path / "a", options={"temperature": 1.0})))
    lists_of(pool_of(dataset, ask(server, tmp_path / "a", candidates=5)))
    assert len(server.requests) == 9


def test_replay_needs_no_server_and_says_how_many_answers_are_missing(
    server: Server, dataset: Dataset, tmp_path: Path
) -> None:
    live = lists_of(pool_of(dataset, ask(server, tmp_path / "a")))
    replayed = pool_of(dataset, ask(server, tmp_path / "a", mode="replay", endpoint="http://127.0.0.1:9/v1"))
    assert torch.equal(lists_of(replayed), live)
    with pytest.raises(LookupError, match=r"2 of 5 prompts for 'm' have no answer in .*mode='live'"):
        lists_of(replayed, rows=5)
    assert len(server.requests) == 3


def test_another_file_is_not_taken_for_a_cache(server: Server, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("notes " * 200)
    with pytest.raises(ValueError, match="is not a file of a language model's answers"):
        lists_of(pool_of(dataset, ask(server, tmp_path / "a")))
    assert (tmp_path / "a").read_text() == "notes " * 200


def test_money_and_tokens_are_those_of_the_answers_cached_or_not(
    server: Server, dataset: Dataset, tmp_path: Path
) -> None:
    server.behave = lambda request: said("1", tokens_in=400, tokens_out=20)
    prices = {"price_per_1k_in": 0.5, "price_per_1k_out": 2.0}
    for _ in range(2):
        strategy = ask(server, tmp_path / "a", **prices)
        pool = pool_of(dataset, strategy)
        on_paper = strategy.cost()
        assert on_paper.money > 0
        lists_of(pool)
        # 0.4 * 0.5 + 0.02 * 2
        assert strategy.cost().money == pytest.approx(0.24)
        assert strategy.cost().flops == on_paper.flops > pool["popular"].cost().flops
        assert strategy.report()["tokens_in"] == 1200
        assert pool["popular"].cost().money == 0.0
    assert len(server.requests) == 3


# ------------------------------------------------------------------------------------------ what goes wrong
def test_an_error_of_the_server_is_tried_again(server: Server, dataset: Dataset, tmp_path: Path) -> None:
    seen: list[str] = []

    def fails_first(request: dict[str, Any]) -> Reply:
        prompt = request["messages"][1]["content"]
        seen.append(prompt)
        return backwards(request) if seen.count(prompt) > 1 else (500, b'{"error": {"message": "busy"}}')

    server.behave = fails_first
    strategy = ask(server, tmp_path / "a", retries=1)
    lists = lists_of(pool_of(dataset, strategy))
    assert torch.equal(lists[:, 1, :4], lists[:, 0, :4].flip(1))
    assert len(server.requests) == 6
    assert strategy.report()["requests_failed"] == 0


def slow(request: dict[str, Any]) -> Reply:
    time.sleep(0.6)
    return backwards(request)


@pytest.mark.parametrize(
    "behave",
    [
        slow,
        lambda _: (500, b"{}"),
        lambda _: (200, b'{"choices": [{"mess'),
        lambda _: (200, b'{"choices": []}'),
        lambda _: (200, b"7"),
    ],
    ids=["slow", "500", "malformed", "no choice", "a number"],
)
def test_a_request_that_fails_leaves_the_base_order_and_is_counted_and_warned_of_once(
    server: Server, dataset: Dataset, tmp_path: Path, behave: Callable[[dict[str, Any]], Reply]
) -> None:
    server.behave = behave
    strategy = ask(server, tmp_path / "a", timeout_s=0.2 if behave is slow else 30.0)
    with pytest.warns(UserWarning, match="a request to 'm' failed") as caught:
        lists = lists_of(pool_of(dataset, strategy))
    assert len(caught) == 1
    assert torch.equal(lists[:, 1], lists[:, 0])
    assert strategy.report()["requests_failed"] == 3
    assert strategy.report()["lists_ranked"] == 0
    # nothing was kept: the next time the question is asked again
    server.behave = backwards
    again = lists_of(pool_of(dataset, ask(server, tmp_path / "a")))
    assert torch.equal(again[:, 1, :4], lists[:, 0, :4].flip(1))


def test_nonsense_leaves_the_base_order_is_counted_and_replays(
    server: Server, dataset: Dataset, tmp_path: Path
) -> None:
    server.behave = lambda request: said("As a language model I like all films.")
    strategy = ask(server, tmp_path / "a")
    lists = lists_of(pool_of(dataset, strategy))
    assert torch.equal(lists[:, 1], lists[:, 0])
    report = strategy.report()
    assert (report["answers_unusable"], report["requests_failed"], report["requests_sent"]) == (3, 0, 3)
    assert torch.equal(lists_of(pool_of(dataset, ask(server, tmp_path / "a", mode="replay"))), lists)


def test_a_refusal_raises_at_once_and_says_what_to_check(server: Server, dataset: Dataset, tmp_path: Path) -> None:
    server.behave = lambda request: (401, b'{"error": {"message": "who are you"}}')
    with pytest.raises(RuntimeError, match="the endpoint refuses.*who are you.*the key in OPENAI_API_KEY"):
        lists_of(pool_of(dataset, ask(server, tmp_path / "a", concurrency=1)))


def test_a_dead_endpoint_stops_the_ranking_after_twenty_failures(
    dataset: Dataset, server: Server, tmp_path: Path
) -> None:
    server.behave = lambda request: (503, b"{}")
    pool = pool_of(dataset, ask(server, tmp_path / "a"))
    with (
        pytest.warns(UserWarning, match="failed"),
        pytest.raises(RuntimeError, match="20 requests to 'm' failed in a row"),
    ):
        lists_of(pool, rows=60)
    assert len(server.requests) >= 20


def test_as_many_requests_are_open_as_allowed_and_no_more(server: Server, dataset: Dataset, tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=20.0)

    def waits_for_two_others(request: dict[str, Any]) -> Reply:
        together.wait()
        return backwards(request)

    server.behave = waits_for_two_others
    lists_of(pool_of(dataset, ask(server, tmp_path / "a", concurrency=3)), rows=12)
    assert (len(server.requests), server.most_open) == (12, 3)


def test_items_without_any_text_are_refused_with_a_sentence(tmp_path: Path) -> None:
    data = dataset_of([[0, 1]], 2)
    strategy = LanguageModelReranker("m", tmp_path / "a", "popular").bind({"popular": Popular()})
    with pytest.raises(ValueError, match="nothing to read.*item table"):
        strategy.fit(data, all_users(data), seed=0)
    with pytest.raises(ValueError, match="expected mode 'live', 'replay' or 'auto'"):
        LanguageModelReranker("m", tmp_path / "a", candidates=1)


# ------------------------------------------------------------------------------------------ what is saved
def test_a_saved_pool_holds_neither_key_nor_endpoint_and_asks_nobody_unless_told(
    server: Server, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    pool = pool_of(dataset, ask(server, tmp_path / "a", key_variable="MY_KEY"))
    lists = lists_of(pool)
    assert server.keys == ["Bearer sk-secret"] * 3
    pool.save(tmp_path / "pool")
    for file in (tmp_path / "pool").iterdir():
        assert b"sk-secret" not in file.read_bytes()
        assert b"127.0.0.1" not in file.read_bytes()
        assert b"MY_KEY" not in file.read_bytes()
    loaded = Pool.load(tmp_path / "pool")
    assert torch.equal(lists_of(loaded), lists)
    with pytest.raises(LookupError, match=ENDPOINT_VARIABLE):
        lists_of(loaded, rows=4)
    assert len(server.requests) == 3
    monkeypatch.setenv(ENDPOINT_VARIABLE, server.url)
    assert lists_of(loaded, rows=4).shape == (4, 2, 8)
    assert server.keys[-1] == "Bearer none"
    monkeypatch.delenv(ENDPOINT_VARIABLE)
    own = Pool.load(tmp_path / "pool", given=[ask(server, tmp_path / "a")])
    assert lists_of(own, rows=5).shape == (5, 2, 8)
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    "extra", [{"endpoint": "http://elsewhere/v1"}, {"key_variable": "AWS_SECRET"}, {"mode": "live"}]
)
def test_a_folder_that_says_whom_to_ask_is_not_trusted(extra: dict[str, str], tmp_path: Path) -> None:
    description = LanguageModelReranker("m", tmp_path / "a").describe()
    assert isinstance(description["settings"], dict)
    assert isinstance(rebuild(description), LanguageModelReranker)
    description["settings"] |= extra
    with pytest.raises(ValueError, match="never saves; do not trust the folder"):
        rebuild(description)


def test_a_language_model_goes_from_log_to_world_to_sessions_that_are_ranked_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"response": "logged", "starts_per_user": 2, "slate_size": 2, "progress": False}
    log = dense_log()

    def pool() -> list[str | Strategy]:
        return [
            "popular",
            "ease",
            LanguageModelReranker("m", tmp_path / "answers", endpoint=server.url, candidates=4, price_per_1k_in=1.0),
        ]

    # killed after the strategies were fitted; the second build asks, though its strategies come from the stage
    with monkeypatch.context() as patch:
        patch.setattr(world_building, "_logged_judge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            World.build(log, pool=pool(), out=tmp_path / "world", **settings)
    assert not server.requests
    world = World.build(log, pool=pool(), out=tmp_path / "world", **settings)
    asked = len(server.requests)
    assert world.metrics["strategies"]["language_model"]["requests_sent"] == asked > 20
    assert world.metrics["cost_money"] == {"language_model": pytest.approx(0.1)}
    # the four candidates from the last to the first, wherever there was a history
    lists, warm = world.tensors["start_lists"], world.tensors["start_length"] > 0
    assert torch.equal(lists[warm, 2], lists[warm, 1].flip(1))
    assert torch.equal(lists[~warm, 2], lists[~warm, 1])
    again = World.build(log, pool=pool(), **settings)
    assert (again.hash, len(server.requests)) == (world.hash, asked)

    def play(world: World | Path) -> list[np.ndarray]:
        env = MetaRecVectorEnv(4, world=world, session_requests=1, autoreset_mode="SameStep")
        env.reset(seed=0)
        return [env.step(np.full(4, 2))[0] for _ in range(3)]

    first = play(world)
    assert len(server.requests) > asked
    # a loaded world replays what has been answered
    for one, other in zip(first, play(tmp_path / "world"), strict=True):
        np.testing.assert_array_equal(one, other)
