"""A strategy of one's own becomes a strategy of the pool: class, file, folder, world, environment, headroom."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments import build_world
from metarec_gym.data import FOLD_S, Dataset, InteractionLog, encode
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.evaluation.headroom import EvalSettings, measure_headroom
from metarec_gym.recommenders import Pool, Precomputed, make_strategy, register_strategy
from metarec_gym.recommenders import registry as registry_module
from metarec_gym.recommenders.content import Content
from metarec_gym.recommenders.hybrid import ReciprocalRankFusion, Reranker
from metarec_gym.recommenders.non_personal import Popular
from metarec_gym.recommenders.registry import TRUST_VARIABLE, rebuild
from metarec_gym.world import World

N_USERS, N_ITEMS = 45, 40
OWN = """
from metarec_gym.recommenders import Strategy

class Backwards(Strategy):
    kind = "own"

    def __init__(self, name="backwards"):
        super().__init__(name)

    def _fit(self, rows, dataset, seed):
        pass

    def _score(self, histories):
        return -self.popularity.expand(len(histories), -1)

    def _flops(self):
        return 1.0

ready = Backwards("ready_made")
not_one = 7
"""


def dense_log() -> InteractionLog:
    """Every user met every item and took a third of them: a world of it needs no judge to be fitted."""
    rng = np.random.default_rng(3)
    user, item = np.repeat(np.arange(N_USERS), N_ITEMS), np.tile(np.arange(N_ITEMS), N_USERS)
    frame = pd.DataFrame({"user_id": user, "item_id": item, "timestamp": 1.6e9 + 60.0 * rng.permutation(len(user))})
    frame["click"] = ((user % 3 == item % 3) | (rng.random(len(user)) < 0.1)).astype(float)
    items = pd.DataFrame({"item_id": range(N_ITEMS), "title": "", "categories": [f"c{i % 3}" for i in range(N_ITEMS)]})
    return InteractionLog.from_frame(frame, name="dense", outcomes=["click"], items=items)


@pytest.fixture(scope="module")
def log() -> InteractionLog:
    return dense_log()


@pytest.fixture(scope="module")
def dataset(log: InteractionLog) -> Dataset:
    return encode(log, seed=0)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Item-to-item lists: after item i come i + 3 and i + 6."""
    rows = [(i, (i + 3 * k) % N_ITEMS, 3.0 - k) for i in range(N_ITEMS) for k in (1, 2)]
    rows.append((10**6, 0, 1.0))
    file = tmp_path_factory.mktemp("scores") / "scores.parquet"
    pd.DataFrame(rows, columns=["item_id", "neighbour_id", "score"]).to_parquet(file)
    return file


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module beside the user's script; what it registers is forgotten afterwards."""
    (tmp_path / "own_strategies.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry_module, "_TRUSTED", {})
    yield "own_strategies"
    sys.modules.pop("own_strategies", None)


def test_a_word_of_the_pool_is_a_name_a_file_a_class_or_a_ready_strategy(own_module: str, scores: Path) -> None:
    assert make_strategy("ease").name == "ease"
    assert make_strategy(f"production={scores}").name == "production"
    assert make_strategy(f"{own_module}:Backwards").name == "backwards"
    assert make_strategy(f"{own_module}:ready").name == "ready_made"
    mine = Content("mine")
    assert make_strategy(mine) is mine


def test_a_word_that_means_nothing_is_refused_with_one_sentence(own_module: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no strategy is named \['magic'\].*NAME=FILE.parquet or MODULE:CLASS"):
        make_strategy("magic")
    with pytest.raises(
        ImportError, match=r"'no_such_module:X' cannot be imported \(No module named 'no_such_module'\)"
    ):
        make_strategy("no_such_module:X")
    with pytest.raises(ImportError, match=r"'own_strategies:Absent' cannot be imported"):
        make_strategy(f"{own_module}:Absent")
    with pytest.raises(ValueError, match="expected a subclass of metarec_gym.recommenders.Strategy"):
        make_strategy(f"{own_module}:not_one")
    with pytest.raises(FileNotFoundError, match="'x' expects a Parquet file at"):
        make_strategy(f"x={tmp_path / 'none.parquet'}")
    (tmp_path / "text.parquet").write_text("item_id,score\n")
    with pytest.raises(ValueError, match="cannot be read"):
        make_strategy(f"x={tmp_path / 'text.parquet'}")
    with pytest.raises(TypeError, match="register_strategy takes a subclass"):
        register_strategy(int)  # type: ignore[type-var]


def test_lists_keyed_by_user_are_refused_and_the_sentence_says_what_to_export(tmp_path: Path) -> None:
    pd.DataFrame({"user_id": ["1"], "item_id": ["2"], "score": [1.0]}).to_parquet(tmp_path / "by_user.parquet")
    with pytest.raises(ValueError, match=r"keyed by user.*\(item_id, neighbour_id, score\)"):
        make_strategy(f"production={tmp_path / 'by_user.parquet'}")


def test_a_file_of_one_list_is_read_as_a_ranking(tmp_path: Path, dataset: Dataset) -> None:
    pd.DataFrame({"item_id": ["7", "3"], "score": [0.1, 0.9]}).to_parquet(tmp_path / "list.parquet")
    pool = Pool.fit(dataset, dataset.users_in(FOLD_S), seed=0, names=[f"editor={tmp_path / 'list.parquet'}"])
    best = pool.top_lists(torch.full((1, 1), -1), 2)[0, 0]
    assert [str(dataset.item_ids[i]) for i in best.tolist()] == ["3", "7"]


def test_a_saved_pool_with_a_foreign_class_loads_where_the_class_is_trusted_and_nowhere_else(
    own_module: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{own_module}:Backwards"
    pool = Pool.fit(dataset, dataset.users_in(FOLD_S), seed=0, names=["popular", path])
    pool.save(tmp_path / "pool")
    assert json.loads((tmp_path / "pool" / "strategies.json").read_text())["strategies"][1]["class"] == path
    histories = dataset.histories(torch.arange(5), torch.arange(5))
    # given to a pool of this process
    assert torch.equal(Pool.load(tmp_path / "pool").top_lists(histories, 9), pool.top_lists(histories, 9))
    # another process
    monkeypatch.setattr(registry_module, "_TRUSTED", {})
    monkeypatch.delitem(sys.modules, own_module)
    with pytest.raises(
        ValueError, match=f"'backwards' is of the class {path}, which nobody registered.*{TRUST_VARIABLE}={path}"
    ):
        Pool.load(tmp_path / "pool")
    assert own_module not in sys.modules
    monkeypatch.setenv(TRUST_VARIABLE, f"other:Thing {path}")
    assert torch.equal(Pool.load(tmp_path / "pool").top_lists(histories, 9), pool.top_lists(histories, 9))
    # trusted, and not there
    monkeypatch.setattr(registry_module, "_TRUSTED", {})
    monkeypatch.delitem(sys.modules, own_module)
    (tmp_path / "own_strategies.py").unlink()
    with pytest.raises(ImportError, match=f"'{path}' cannot be imported"):
        Pool.load(tmp_path / "pool")


def test_a_class_of_the_script_that_built_the_pool_is_to_be_put_into_a_module() -> None:
    with pytest.raises(ValueError, match="put it into a module"):
        rebuild({"class": "__main__:Mine", "settings": {"name": "mine"}})


def test_the_fingerprint_of_a_strategy_changes_with_settings_file_and_code(
    own_module: str, scores: Path, tmp_path: Path
) -> None:
    assert Content().fingerprint() == Content().fingerprint()
    assert Content().fingerprint() != Content(max_words=7).fingerprint()
    assert Content(embeddings=np.eye(3)).fingerprint() != Content(embeddings=2 * np.eye(3)).fingerprint()
    copied = tmp_path / "copy.parquet"
    copied.write_bytes(scores.read_bytes())
    before = make_strategy(f"x={copied}").fingerprint()
    assert before == make_strategy(f"x={scores}").fingerprint()
    pd.read_parquet(scores).head(4).to_parquet(copied)
    assert make_strategy(f"x={copied}").fingerprint() != before
    table = pd.DataFrame({"item_id": ["1"], "score": [1.0]})
    assert Precomputed(ranking=table).fingerprint() != Precomputed(ranking=table * 2).fingerprint()
    own = make_strategy(f"{own_module}:Backwards").fingerprint()
    sys.modules.pop(own_module)
    (tmp_path / "own_strategies.py").write_text(OWN.replace("return -self", "return -2.0 * self"))
    assert make_strategy(f"{own_module}:Backwards").fingerprint() != own


class Keep(Reranker):
    """Lists what its base lists."""

    def __init__(self, name: str, base: str, depth: int = 10) -> None:
        super().__init__(name, (base,), depth)

    def rerank(self, histories: Tensor, lists: list[Tensor]) -> Tensor:  # type: ignore[override]
        score = torch.full((len(histories), self.n_items + 1), -1.0)
        place = torch.arange(lists[0].shape[1], 0, -1, dtype=torch.float32)
        return score.scatter_(1, lists[0].remainder(self.n_items + 1), place.expand(lists[0].shape))[:, : self.n_items]

    def _flops(self) -> float:
        return 1.0


def test_a_reranker_takes_the_lists_of_its_base_and_may_be_a_base_itself(dataset: Dataset) -> None:
    chain = [
        Keep("third", "second"),
        Keep("second", "ease"),
        "popular",
        "ease",
        ReciprocalRankFusion("f", ["third", "ease"]),
    ]
    pool = Pool.fit(dataset, dataset.users_in(FOLD_S), seed=0, names=chain)
    assert pool.names == ("third", "second", "popular", "ease", "f")
    histories = dataset.histories(torch.arange(6), torch.tensor([0, 1, 2, 4, 8, 8]))
    lists = pool.top_lists(histories, 8)
    for k in (0, 1, 4):
        assert torch.equal(lists[:, k], lists[:, 3])
    assert pool["third"].cost().flops == 2.0 + pool["ease"].cost().flops


def test_bases_that_are_missing_or_wait_for_each_other_are_refused_with_a_sentence(dataset: Dataset) -> None:
    users = dataset.users_in(FOLD_S)
    with pytest.raises(ValueError, match=r"'a' takes the lists of \['ease'\], and the pool has no \['ease'\]"):
        Pool.fit(dataset, users, seed=0, names=["popular", Keep("a", "ease")])
    with pytest.raises(ValueError, match=r"\['a', 'b'\] wait for each other"):
        Pool.fit(dataset, users, seed=0, names=[Keep("a", "b"), Keep("b", "a"), "popular"])
    with pytest.raises(ValueError, match="distinct names of other strategies"):
        Keep("a", "a")
    with pytest.raises(ValueError, match="distinct names without '/'"):
        Pool.fit(dataset, users, seed=0, names=[Popular("a/b")])


def test_class_and_file_go_from_the_command_line_to_world_environment_and_headroom(
    own_module: str, log: InteractionLog, scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.save(tmp_path / "log")
    args = build_world.Args(
        log=tmp_path / "log",
        out=tmp_path / "world",
        pool=("popular", "ease", f"{own_module}:Backwards", f"production={scores}"),
        response="logged",
        starts_per_user=3,
        slate_size=2,
        runs=tmp_path / "runs",
        quiet=True,
    )
    row = build_world.run(args)
    assert "strategy production: ignored rows 1" in capsys.readouterr().out
    world = World.load(tmp_path / "world")
    assert world.strategies == ("popular", "ease", "backwards", "production")
    assert world.metrics["strategies"] == {"production": {"ignored_rows": 1}}
    # sessions are ranked again by the strategies beside the world
    env = MetaRecVectorEnv(4, world=tmp_path / "world", session_requests=1, autoreset_mode="SameStep")
    env.reset(seed=0)
    for action in (2, 3, 2):
        env.step(np.full(4, action))
    settings = EvalSettings(replicates=2, horizon=2, horizons=(2,), look=False)
    headroom = measure_headroom(world, settings, folder=None, progress=False)
    assert headroom.sbs_name in world.strategies
    # found again; another content of the file is another world
    assert build_world.run(args)["world"] == row["world"]
    assert "found in" in capsys.readouterr().out
    pd.read_parquet(scores).head(12).to_parquet(tmp_path / "fewer.parquet")
    (tmp_path / "fewer.parquet").replace(scores)
    assert build_world.run(args)["world"] != row["world"]


def test_a_world_with_a_foreign_class_plays_without_it_until_lists_are_ranked_again(
    own_module: str, log: InteractionLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ["popular", f"{own_module}:ready"]
    World.build(log, pool=pool, response="logged", starts_per_user=2, slate_size=2, out=tmp_path / "w", progress=False)
    # as another process sees it
    monkeypatch.setattr(registry_module, "_TRUSTED", {})
    monkeypatch.delitem(sys.modules, own_module)
    env = MetaRecVectorEnv(2, world=tmp_path / "w")
    env.reset(seed=0)
    env.step(np.ones(2, dtype=np.int64))
    assert own_module not in sys.modules
    with pytest.raises(ValueError, match="which nobody registered in this process"):
        MetaRecVectorEnv(2, world=tmp_path / "w", session_requests=1)


@pytest.mark.slow
def test_strategies_are_scored_where_neither_pandas_nor_scipy_nor_a_library_is_installed(tmp_path: Path) -> None:
    """A bare machine: sessions are ranked again there, too."""
    code = """
import sys
for name in ("pandas", "pyarrow", "scipy", "sklearn", "implicit", "cornac", "openai"):
    sys.modules[name] = None
from metarec_gym.recommenders import Pool
import metarec_gym.recommenders.language_model, metarec_gym.recommenders.libraries
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)
