import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from experiments import throughput, throughput_measure, throughput_page
from experiments.random_world import RandomWorld
from experiments.throughput_captured import captured_block
from experiments.throughput_hash import digest, hashes, in_bfloat16, played
from experiments.throughput_measure import (
    Setting,
    Windows,
    env_block,
    make_env,
    measure,
    policy_block,
    rates,
    spread,
    windows_of,
)
from experiments.throughput_work import env_work, ppo_flops
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from tests.pretend_graph import pretend_gpu

SMALL = RandomWorld(
    n_items=120, n_users=8, starts_per_user=2, horizon=6, history=5, n_strategies=3, dim=8, hidden=8, rank=4
)


@pytest.fixture(scope="module")
def world():
    return SMALL.build()


def test_lists_of_a_random_world_hold_different_items_of_the_whole_catalogue(world):
    lists = world.tensors["start_lists"]
    assert lists.shape == (16, 3, 30)
    assert all(len(set(row.tolist())) == 30 for row in lists.flatten(0, 1))
    assert lists.min() >= 0
    assert lists.max() < 120


def test_a_random_world_is_its_seed(world):
    assert SMALL.build().hash == world.hash
    assert dataclasses.replace(SMALL, seed=1).build().hash != world.hash


def test_a_random_world_refuses_more_items_an_episode_than_there_are():
    with pytest.raises(ValueError, match="33 requests of 5 items need 165 items, n_items is 100"):
        RandomWorld(n_items=100).build()


def test_users_of_a_random_world_answer(world):
    env = MetaRecVectorEnv(16, world=world, output="torch", autoreset_mode="SameStep")
    env.reset(seed=0)
    rewards = torch.stack([env.step(torch.zeros(16, dtype=torch.int64))[1] for _ in range(6)])
    assert 0 < float(rewards.mean()) < 10


def test_a_rate_is_the_steps_of_all_processes_over_the_time_from_first_start_to_last_end():
    one = Windows(start=[0.0, 10.0], end=[2.0, 11.0], steps=[100, 100], cpu_s=[2, 1], vec_steps=[1, 1])
    two = Windows(start=[1.0, 10.0], end=[4.0, 12.0], steps=[300, 100], cpu_s=[3, 2], vec_steps=[3, 1])
    assert rates([one, two]) == [100.0, 100.0]
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}


def test_windows_count_the_steps_made_and_start_together():
    calls, waits = [], []

    def block(count):
        calls.append(count)
        return count * 7

    found = measure(block, Setting("x", "env", windows=5, window_s=0.01), lambda: waits.append(len(calls)))
    assert found.steps == [7 * n for n in found.vec_steps]
    assert len(found.steps) == len(waits) == 5
    # the warm-up is over before the first window, and every window waits for the others
    assert waits == list(range(len(calls) - 5, len(calls)))
    assert all(end >= start for start, end in zip(found.start, found.end, strict=True))


@pytest.mark.parametrize("action", ["select", "blend", "slots"])
def test_every_kind_of_action_can_be_measured(world, action):
    env = make_env(Setting("x", "env", num_envs=16, env={"action": action}), world)
    assert env_block(env)(3) == 48


@pytest.mark.parametrize("action", ["select", "blend", "slots"])
def test_captured_rollouts_count_every_request(world, action):
    env = make_env(Setting("x", "env", num_envs=16, env={"action": action}), world)
    assert captured_block(env, "eager", with_policy=action == "select")(2) == 2 * 6 * 16


def test_a_part_that_plays_captured_counts_its_vector_steps_too(monkeypatch, world):
    monkeypatch.setattr(throughput_measure, "make_world", lambda setting: world)
    found = windows_of(Setting("x", "env", num_envs=16, mode="eager", windows=2, window_s=0.01))
    assert found.steps == [16 * n for n in found.vec_steps]
    assert all(n % 6 == 0 for n in found.vec_steps)
    assert found.facts["mode"] == "eager"


def test_on_a_gpu_the_environment_the_policy_and_ppo_play_in_a_graph_and_the_page_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = throughput.Args(device="cuda", world=None)
    parts = throughput.first_settings(args) + throughput.further_settings(args, 4096)
    graphs = {p.name for p in parts if p.mode == "graph"}
    assert {"env_4096", "policy", "ppo", "ppo_large_minibatch", "items_1000000"} <= graphs
    assert {p.mode for p in parts if p.name.startswith("env_best_")} == {"step", "eager", "compile"}
    cpu = throughput.Args(device="cpu", world=None)
    cpu_parts = throughput.first_settings(cpu) + throughput.further_settings(cpu, 4096)
    assert {p.name for p in cpu_parts if p.mode != "step"} == {"env_compiled"}
    assert throughput_page._mode(dataclasses.asdict(Setting("x", "ppo", mode="graph"))) == "captured, graph"
    assert throughput_page._mode(dataclasses.asdict(Setting("x", "env"))) == "eager"


def test_a_policy_chooses_from_the_last_observation(world):
    env = make_env(Setting("x", "policy", num_envs=16), world)
    assert policy_block(env)(2) == 32


def test_the_hash_is_equal_in_every_way_of_playing(world):
    found = hashes(world, "cpu", rows=4, steps=8, processes=False)
    assert set(found["ways"]) == {
        "tensors",
        "arrays",
        "captured-eager",
        "batch of 20",
        "two batches",
        "one row at a time",
        "single environments",
        "2 threads",
    }
    assert found["equal"]


@pytest.mark.slow
def test_two_processes_play_the_trajectory_of_one(world):
    found = hashes(world, "cpu", rows=4, steps=8)
    assert found["ways"]["2 processes"] == found["ways"]["tensors"]


def test_rounded_tables_of_items_are_another_mdp(world):
    found = in_bfloat16(world, "cpu", rows=512)
    # 8 bits of precision: each factor is off by up to 1 in 512
    assert 1e-5 < found["mean"] < found["largest"] < 0.05
    assert 0 <= found["other"] < 0.05
    assert hashes(world, "cpu", rows=4, steps=2, processes=False)["bfloat16"]["mean"] == pytest.approx(
        in_bfloat16(world, "cpu")["mean"]
    )


def test_the_hash_notices_one_changed_reward(world):
    steps = played(world, "cpu", first=0, rows=2, batch=2, output="torch", steps=4)
    before = digest([steps])
    steps[3][1][0] += 1e-6
    assert digest([steps]) != before


def test_work_of_a_step_is_counted_from_the_shapes(world):
    work = env_work(make_env(Setting("x", "env", num_envs=16), world))
    # judge: 2 members, 2 outcomes, 8 hidden, rank 4, vectors of 8, 3 decays, 11 static features; slate 5
    state, width, profile = 4 * 8 + 1, 4 + 8 + 11 + 1, 8 + 18 + 1
    products = 2 * (state * 8 + 8 * 2 * 4) + 5 * 2 * width + 3 * 8 * 6 + 5 * 8
    assert work.flops == 2 * products + 5 * profile
    env = MetaRecVectorEnv(1, world=world)
    obs_dim = env.single_observation_space.shape[0]
    floats = 2 * (state + profile + 3 * 3 + 10) + obs_dim + 5 + 5 * profile + 5 * 2 * width + 2 * 14
    assert work.bytes_moved == 4 * floats


def test_work_of_ppo_is_one_forward_pass_and_three_for_every_epoch():
    # weights: actor 3*4 + 4*2 = 20, critic 3*4 + 4*1 = 16
    assert ppo_flops(3, 2, (4,), epochs=2) == 2 * 36 + 2 * 6 * 36


def test_the_command_loads_no_heavy_library():
    code = (
        "import sys, experiments.throughput, experiments.throughput_measure, experiments.random_world, agents.ppo; "
        "print([m for m in ('pandas', 'scipy', 'sklearn', 'stable_baselines3', 'matplotlib', 'tyro', 'implicit') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_finished_part_is_not_measured_again_and_a_changed_one_is(tmp_path, monkeypatch):
    measured = []

    def fake(command, **_):
        setting = json.loads(command[-2])
        measured.append(setting["num_envs"])
        row = {"setting": setting, "steps_per_s": {"median": 1.0, "q1": 1.0, "q3": 1.0}}
        (tmp_path / "parts" / f"{setting['name']}.json").write_text(json.dumps(row))
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(throughput.subprocess, "run", fake)
    args = throughput.Args()
    for num_envs in (8, 8, 16):
        throughput.run_settings([Setting("env_x", "env", num_envs=num_envs)], tmp_path, args)
    assert measured == [8, 16]


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(command, **_):
        return subprocess.CompletedProcess(command, 1, stderr="Traceback\nMemoryError: too many users\n")

    monkeypatch.setattr(throughput.subprocess, "run", fails)
    rows = throughput.run_settings([Setting("a", "env"), Setting("b", "env")], tmp_path, throughput.Args())
    assert {name: row["error"] for name, row in rows.items()} == dict.fromkeys("ab", "MemoryError: too many users")


def _row(setting, per_s, **more):
    part = {"median": per_s, "q1": per_s * 0.9, "q3": per_s * 1.1}
    ms = {"median": 1e3 * setting.num_envs / per_s, "q1": 1.0, "q3": 1.0}
    return {"setting": dataclasses.asdict(setting), "steps_per_s": part, "ms_per_vec_step": ms, "steps_per_cpu_s": part,
            "first_s": 0.1, "peak_bytes": 1e9, "facts": {}, **more}  # fmt: skip


def test_the_page_says_ratios_and_which_targets_are_reached(tmp_path):
    work = {"work": {"bytes_moved": 1_000.0, "flops": 2_000.0}}
    ceiling = {
        "setting": dataclasses.asdict(Setting("c", "ceilings")),
        "bytes_per_s": {"median": 1e10},
        "flops_per_s": {"median": 1e11},
    }
    rows = {
        "ceilings_2threads": ceiling,
        "cartpole_1024": _row(Setting("c", "cartpole", 1024), 4e6),
        "cartpole_1024_2processes": _row(Setting("c", "cartpole", 1024, processes=2), 8e6),
        "env_64": _row(Setting("e", "env", 64), 1e5),
        "env_256": _row(Setting("e", "env", 256), 2e5),
        "env_best_2processes": _row(Setting("e", "env", 256, processes=2), 4e5, facts=work),
        "single": _row(Setting("s", "single"), 900.0),
        "sb3_adapter_64": _row(Setting("a", "sb3", 64), 12_000.0),
        "sb3_dummy_64": _row(Setting("d", "sb3_dummy", 64), 2_000.0),
        "items_1000": {"setting": dataclasses.asdict(Setting("i", "env")), "error": "MemoryError"},
        "users_many": _row(Setting("u", "env", 100_000), 1e5),
    }
    result = {"parts": rows, "machine": {"cpu": "c", "cores": 2, "torch": "t", "python": "p"}, "world": None,
              "best_batch": 256, "load": 9.0, "key": "k"}  # fmt: skip
    text = throughput_page.write_page(result, tmp_path / "page.md").read_text()
    assert (tmp_path / "page.png").is_file()
    assert "| 2 cores: environment alone, best batch | 400,000 [360,000, 440,000] (`env_best_2processes`)" in text
    assert "| 200,000 | 1,000,000 | must |" in text
    assert "equal rows | 6.0 x | 5 |  | must |" in text
    assert "`gymnasium.make` | 900 [810, 990] (`single`) | 1,000 | 2,500 | no |" in text
    assert "one H200: our PPO end to end | not measured: no GPU" in text
    assert "our PPO end to end | not measured | 40,000" in text
    # two processes against CartPole in two processes: 4e5 / 8e6
    assert "| 400,000 | 0.05 |" in text
    # 4e5 steps of 1 kB and 2 kFLOP a second, of 10 GB/s and 100 GFLOP/s
    assert "| env_best_2processes | 1.0 | 2 | 0.40 (4.0%) | 0.8 (0.8%) |" in text
    assert "failed: MemoryError" in text
    assert "1.00 GB peak of the whole process (below 4 GB)" in text
    assert "The machine was not quiet" in text


def test_a_gpu_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' was asked for"):
        throughput.run(throughput.parse(["--device", "cuda"]))


def test_a_missing_world_is_answered_with_its_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="build it: python -m experiments.build_world"):
        throughput.run(throughput.parse(["--world", str(tmp_path)]))


@pytest.mark.slow
def test_the_quick_run_measures_and_writes_its_page(tmp_path):
    argv = ["--quick", "--runs", str(tmp_path), "--only", "env_32", "cartpole_1024", "ppo", "env_best_2processes"]
    found = throughput.run(throughput.parse(argv))
    names = {"env_32", "cartpole_1024", "ppo", "env_best_2processes"}
    assert names <= set(found["parts"])
    assert all(row["steps_per_s"]["median"] > 0 for row in found["parts"].values())
    page = next(tmp_path.glob("throughput_cpu_*/throughput.md")).read_text()
    assert "# Throughput" in page


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["step", "eager", "graph"])
@pytest.mark.parametrize("kind", ["env", "policy", "ppo"])
def test_what_is_measured_on_a_gpu_runs_on_a_pretended_one(leaving_world, monkeypatch, kind, mode):
    monkeypatch.setattr(throughput_measure, "make_world", lambda setting: leaving_world)
    with pretend_gpu(monkeypatch) as device:
        setting = Setting("x", kind, num_envs=8, mode=mode, device=device, windows=2, window_s=0.01, minibatch_size=48)
        found = throughput_measure.run_part(setting)
    assert found["steps_per_s"]["median"] > 0
    assert found["facts"]["mode"] == mode
