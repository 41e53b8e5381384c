"""The path log -> world, on a synthetic log whose users' types are known, with judges and pool cut down to be quick."""

import dataclasses
import itertools
from pathlib import Path

import pandas as pd
import pytest
import torch

from metarec_gym import world_building
from metarec_gym.data import FOLD_A, FOLD_B, InteractionLog, encode, synthetic_log
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.recommenders.sequential import SasRec
from metarec_gym.response.config import ResponseConfig
from metarec_gym.response.frozen import LoggedResponse
from metarec_gym.world import World, WorldError, erase_user
from metarec_gym.world_judges import JudgeJob, fit_judge, fit_judges

QUICK = ResponseConfig(
    dim=8,
    taste_dim=8,
    hidden=16,
    rank=4,
    negatives=32,
    max_epochs=2,
    inner_folds=2,
    effect_negatives=8,
    effect_rounds=2,
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


def test_a_judge_has_the_same_bits_whatever_the_threads_and_workers(log):
    dataset = encode(log, seed=0)
    users, others = dataset.users_in(FOLD_A), dataset.users_in(FOLD_B)
    job = JudgeJob(dataset, users, others, seed=3, config=QUICK, members=1, base=None, stage=None)
    before = torch.get_num_threads()
    hashes = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        hashes.add(fit_judge(job, False)[0].hash)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    said: list[str] = []
    two = fit_judges({"one": job, "other": dataclasses.replace(job, seed=4)}, 2, said.append, False)
    assert {two["one"][0].hash} == hashes
    assert two["other"][0].hash not in hashes
    assert said[0] == "fitting 2 judges in 2 processes: one, other"


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
    # two folds with a main judge and one of a second family each; the second fit was begun twice
    assert len(calls) == 5
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
        world_building._gaps(dataset, start_user[chosen], length[chosen]),
        world_building._gaps(changed, start_user[chosen], length[chosen]),
    )
    from metarec_gym.recommenders.pool import Pool

    for name, table in world_building._start_sessions(changed, start_user[chosen], length[chosen]).items():
        assert torch.equal(table, world.tensors[name][chosen]), name
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


def test_a_world_has_judges_of_a_second_family_and_of_other_samplers(built):
    world = World.load(built)
    assert world.judge_names("A") == world.judge_names("B") == ("main", "popularity", "second", "uniform")
    assert world.judge("A").n_members == 2
    hashes = [world.judge("A", name).hash for name in world.judge_names("A")]
    assert len(set(hashes)) == 4
    rows = world.tensors["start_user"].shape[0]
    assert world.start_states("second").shape == (rows, world.judge("A", "second").state_dim)
    assert world.start_states("uniform").shape == (rows, world.judge("A", "uniform").state_dim)


def test_start_states_know_their_time_sessions_and_gap(built, log):
    world, dataset = World.load(built), encode(log, seed=0)
    t = world.tensors
    gap_s = world.metrics["session_gap_s"]
    for start in (0, 3, 7, 15):
        user, length = int(t["start_user"][start]), int(t["start_length"][start])
        times = dataset.time[dataset.offsets[user] : dataset.offsets[user + 1]][: max(length, 1)].tolist()
        assert float(t["start_time"][start]) == times[-1]
        pauses = [(b - a) for a, b in itertools.pairwise(times) if b - a > gap_s] if length else []
        assert float(t["start_sessions"][start]) == (len(pauses) + 1 if length else 0)
        assert float(t["start_previous_gap"][start]) == pytest.approx(pauses[-1] / 3600.0 if pauses else 0.0)


def test_histories_of_start_states_are_the_logs_own(built, log):
    world, dataset = World.load(built), encode(log, seed=0)
    starts = torch.arange(0, world.tensors["start_user"].shape[0], 5)
    expected = dataset.histories(world.tensors["start_user"][starts], world.tensors["start_length"][starts])
    assert torch.equal(world.history_of(starts), expected)


def test_a_dense_log_answers_by_look_up(tmp_path):
    frame = pd.DataFrame(
        [(f"u{u:02d}", f"i{i:02d}", 1e9 + 60.0 * i, float((u + i) % 3 == 0)) for u in range(36) for i in range(60)],
        columns=["user_id", "item_id", "timestamp", "click"],
    )
    log = InteractionLog.from_frame(frame, name="dense", outcomes=("click",))
    world = build(log, out=tmp_path / "world", response="logged", slate_size=2)
    assert isinstance(World.load(tmp_path / "world").responses["A"], LoggedResponse)
    env = MetaRecVectorEnv(8, world=world, fold="B", autoreset_mode="Disabled")
    env.reset(seed=0)
    _, reward, *_, info = env.step([0] * 8)
    for row in range(8):
        # what was logged, whatever happens in between
        assert reward[row] == sum((int(info["user"][row]) + int(i)) % 3 == 0 for i in info["slate"][row])


def test_answers_of_a_sparse_log_cannot_be_looked_up(log):
    with pytest.raises(WorldError, match=r"looking answers up needs 90%"):
        build(log, response="logged")


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
    for judge in after.responses.values():
        assert not bool(judge.tensors["effect_mean"][index].any())
    offsets = after.tensors["user_event_offsets"]
    assert int(offsets[index]) == int(offsets[index + 1])
    left = torch.arange(after.tensors["start_user"].shape[0])
    assert torch.equal(after.history_of(left), before.history_of(left + 8))
    assert name not in set(pd.read_parquet(folder / "users.parquet")["user_id"])
    with pytest.raises(KeyError, match="has no user"):
        erase_user(folder, name)


def test_a_log_of_too_few_users_says_how_many_are_needed():
    with pytest.raises(WorldError, match="at least 30 are needed"):
        build(synthetic_log(0, n_users=20, n_items=100)[0])


def test_a_slate_larger_than_a_tenth_of_the_catalogue_is_refused(log):
    with pytest.raises(WorldError, match="one request would show more than 10%"):
        build(log, slate_size=11)


def test_changing_the_fitted_weights_changes_the_outcome(built):
    world = World.load(built)
    judge = world.judge("A")
    moved = judge.replaced(item_bias=judge.tensors["item_bias"].flip(1))
    changed = dataclasses.replace(world, responses={**world.responses, "A": moved})
    assert changed.hash != world.hash
    rewards = []
    for each in (world, changed):
        env = MetaRecVectorEnv(256, world=each, base_rate_factor=5.0, autoreset_mode="Disabled", output="torch")
        env.reset(seed=0)
        env.step(torch.zeros(256, dtype=torch.int64))
        rewards.append(env.expected_reward.clone())
    assert float((rewards[0] - rewards[1]).abs().max()) > 0.01


def test_probabilities_lie_inside_0_and_1_and_tell_items_apart(built):
    world = World.load(built)
    judge = world.judge("A")
    starts = world.starts_of("A")[:16]
    effects = judge.effects(0)[world.tensors["start_user"][starts]]
    items = torch.arange(world.n_items).expand(16, -1)
    state = world.tensors["start_state"][starts]
    probs = judge.conditional_probs(state, effects, items, position=False)
    assert bool(((probs > 0.0) & (probs < 1.0)).all())
    # the likeliest item of a user is many times as likely as the least likely one
    assert float((probs[..., 0].amax(dim=1) / probs[..., 0].amin(dim=1)).min()) > 5.0


def test_a_sequence_model_has_the_same_bits_whatever_the_threads():
    dataset = encode(synthetic_log(0, n_users=300, n_items=400, events_per_user=(20, 60))[0], seed=0)
    users, before = torch.arange(dataset.n_users), torch.get_num_threads()
    fitted = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        fitted.append(SasRec(steps=4).fit(dataset, users, seed=0).state_dict())
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert all(torch.equal(value, fitted[1][key]) for key, value in fitted[0].items())
