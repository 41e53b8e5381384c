"""The path log -> world, on a synthetic log whose users' types are known, with judges and pool cut down to be quick."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch

from metarec_gym import world as world_module
from metarec_gym.data import InteractionLog, encode, synthetic_log
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.response.model import ResponseConfig
from metarec_gym.world import World, WorldError, erase_user

QUICK = ResponseConfig(
    dim=8, hidden=16, rank=4, negatives=32, max_epochs=2, inner_folds=2, effect_negatives=8, effect_rounds=2
)
POOL = ("popular", "item_knn", "ease")


def build(log, **settings):
    return World.build(log, **({"pool": POOL, "progress": False, "replicas": 2, "response_config": QUICK} | settings))


@pytest.fixture(scope="module")
def log() -> InteractionLog:
    return synthetic_log(0, n_users=90, n_items=100)[0]


@pytest.fixture(scope="module")
def built(log, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "world"
    build(log, out=out)
    return out


def test_a_built_world_runs_and_loads_with_its_hash(built, log):
    world = World.load(built)
    assert world.strategies == POOL
    assert (world.n_users, world.n_items) == (90, 100)
    # at most 10 % of 100 items in slates of 5
    assert world.horizon == 2
    assert sorted(p.name for p in built.iterdir()) == [
        "items.parquet",
        "strategies.json",
        "strategies.safetensors",
        "users.parquet",
        "world.json",
        "world.safetensors",
    ]
    env = MetaRecVectorEnv(16, world=built, autoreset_mode="SameStep")
    obs, _ = env.reset(seed=0)
    for k in range(3):
        assert env.observation_space.contains(obs)
        obs, *_ = env.step([k] * 16)
    assert {"judges", "predictive_check", "engaged_p90", "cost_seconds"} <= set(world.metrics)


def test_building_twice_gives_the_same_hash(built, log, tmp_path):
    assert build(log, out=tmp_path / "again").hash == World.load(built).hash


def test_a_build_killed_between_stages_goes_on_and_gives_the_same_world(built, log, tmp_path, monkeypatch):
    import metarec_gym.response.fitting as fitting
    from metarec_gym.recommenders.pool import Pool

    real, calls = fitting.fit_response, []

    def dies_on_the_second(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(fitting, "fit_response", dies_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        build(log, out=tmp_path / "world")
    monkeypatch.setattr(fitting, "fit_response", lambda *a, **k: calls.append(k["seed"]) or real(*a, **k))
    monkeypatch.setattr(Pool, "fit", lambda *a, **k: pytest.fail("the strategies had been fitted already"))
    world = build(log, out=tmp_path / "world")
    assert len(calls) == 3  # judge A once, judge B twice
    assert world.hash == World.load(built).hash
    assert [p.name for p in tmp_path.iterdir()] == ["world"]


def test_events_after_a_start_state_change_no_list_and_no_observation(log, built):
    """Everything at a start state comes from the history before it, given strategies and judge."""
    world, dataset = World.load(built), encode(log, seed=0)
    # rewrite every A and B user's events after the history of the fourth start state
    start_user, length = world.tensors["start_user"], world.tensors["start_length"]
    chosen = torch.arange(3, len(start_user), 8)
    item, time, counts = dataset.item.clone(), dataset.time.clone(), dataset.engaged_counts()
    for user, keep in zip(start_user[chosen].tolist(), length[chosen].tolist(), strict=True):
        assert keep < int(counts[user])
        rows = torch.arange(int(dataset.offsets[user]) + keep, int(dataset.offsets[user + 1]))
        item[rows] = (item[rows] + 7) % dataset.n_items
        time[rows] += 1e6
    changed = dataclasses.replace(dataset, item=item, time=time)
    before = dataset.histories(start_user[chosen], length[chosen])
    after = changed.histories(start_user[chosen], length[chosen])
    assert torch.equal(before, after)
    assert torch.equal(
        world_module._gaps(dataset, start_user[chosen], length[chosen]),
        world_module._gaps(changed, start_user[chosen], length[chosen]),
    )
    from metarec_gym.recommenders.pool import Pool

    lists = Pool.load(built).top_lists(after, world.list_length)
    assert torch.equal(lists.to(torch.int32), world.tensors["start_lists"][chosen])


def test_start_states_begin_cold_and_reach_long_histories(built):
    world = World.load(built)
    lengths = world.tensors["start_length"].view(-1, 8)
    assert bool((lengths[:, 0] == 0).all())
    assert bool((lengths[:, 1:] >= 1).all())
    assert bool((lengths.diff(dim=1) >= 0).all())
    assert int(lengths.max()) > 15


def test_each_fold_is_simulated_by_its_own_users_and_judge(built):
    world = World.load(built)
    users = {f: set(world.tensors["start_user"][world.starts_of(f)].tolist()) for f in "AB"}
    assert not users["A"] & users["B"]
    assert world.responses["A"].hash != world.responses["B"].hash


def test_erasing_a_user_removes_start_states_effects_and_the_row(built, log, tmp_path):
    import shutil

    folder = tmp_path / "world"
    shutil.copytree(built, folder)
    before = World.load(folder)
    index = int(before.tensors["start_user"][0])
    users = pd.read_parquet(folder / "users.parquet")
    name = users.loc[users["user_index"] == index, "user_id"].item()
    after = erase_user(folder, name)
    assert after.hash == World.load(folder).hash != before.hash
    assert index not in after.tensors["start_user"].tolist()
    assert not bool(after.responses["A"].tensors["effect_mean"][index].any())
    assert name not in set(pd.read_parquet(folder / "users.parquet")["user_id"])
    with pytest.raises(KeyError, match="has no user"):
        erase_user(folder, name)


def test_a_log_of_too_few_users_says_how_many_are_needed():
    with pytest.raises(WorldError, match="at least 30 are needed"):
        build(synthetic_log(0, n_users=20, n_items=100)[0])


def test_a_slate_larger_than_a_tenth_of_the_catalogue_is_refused(log):
    with pytest.raises(WorldError, match="one request would show more than 10%"):
        build(log, slate_size=11)
