import dataclasses
import json
from pathlib import Path

import pytest
import torch

from experiments import sweep
from experiments.ray_cluster import packed_world, unpacked_world
from metarec_gym.policy import FixedPolicy, UniformPolicy
from metarec_gym.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World.synthetic(users_per_type=8, items_per_type=60, horizon=5, history_lengths=(0, 5), leaving=None)
    return made.save(tmp_path_factory.mktemp("worlds") / "tiny")


def test_a_space_is_understood():
    found = sweep.parse_space(("a=log:1e-4:1e-2", "b=int:2:8", "c=float:0.5:1", "d=choice:1,2,tanh"))
    assert found == {
        "a": ("log", (1e-4, 1e-2)),
        "b": ("int", (2, 8)),
        "c": ("float", (0.5, 1.0)),
        "d": ("choice", (1, 2, "tanh")),
    }


@pytest.mark.parametrize(
    "text", ["a", "a=log:0:1", "a=int:3:3", "a=float:2:1", "a=normal:0:1", "=int:1:2", "a=choice:", "a=int:x:y"]
)
def test_a_space_that_says_nothing_is_refused(text):
    with pytest.raises(ValueError, match="expected NAME=log:LOW:HIGH"):
        sweep.parse_space((text,))


def test_what_cannot_run_is_refused_before_ray_starts(world, tmp_path):
    good = sweep.Args(worlds=(world,))
    assert set(sweep.check(good)) == {text.partition("=")[0] for text in sweep.SPACE}
    with pytest.raises(ValueError, match="there is no learner 'dqn9'"):
        sweep.check(dataclasses.replace(good, agents=("dqn9",)))
    with pytest.raises(ValueError, match=r"--space names \['learning_rat'\]"):
        sweep.check(dataclasses.replace(good, space=("learning_rat=float:0:1",)))
    with pytest.raises(ValueError, match="trials is 0"):
        sweep.check(dataclasses.replace(good, trials=0))
    with pytest.raises(FileNotFoundError, match="build it: python -m experiments.build_world"):
        sweep.check(dataclasses.replace(good, worlds=(tmp_path,)))


def test_the_score_of_a_policy_is_its_reward_a_request(world):
    # every strategy serves its own type with 0.5 and the other three with 0.1: 5 * (0.5 + 3 * 0.1) / 4 = 1
    value = sweep.value_of(FixedPolicy(0), world, fold="A", seed=0, episodes=2000)
    assert value == pytest.approx(1.0, abs=0.03)


def test_the_score_is_its_seed_and_not_training_luck(world):
    def value(seed):
        return sweep.value_of(UniformPolicy(), world, fold="A", seed=seed, episodes=64)

    assert value(1) == value(1)
    assert value(1) != value(2)


def test_seeds_of_trainings_are_different_and_hang_on_the_sweep(world):
    args = sweep.Args(worlds=(world,), seeds=5)
    assert len(set(sweep.seeds_of(args))) == 5
    assert sweep.seeds_of(args) != sweep.seeds_of(dataclasses.replace(args, seed=1))


def test_a_packed_world_is_unpacked_once_and_is_the_world(world, tmp_path):
    files = packed_world(world)
    folder = unpacked_world(files, tmp_path)
    assert World.load(folder).hash == World.load(world).hash
    mark = folder / "world.json"
    before = mark.stat().st_mtime_ns
    assert unpacked_world(files, tmp_path) == folder
    assert mark.stat().st_mtime_ns == before
    other = unpacked_world({**files, "world.json": files["world.json"] + b"\n"}, tmp_path)
    assert other != folder
    assert not list(tmp_path.glob("*.partial"))


def test_the_page_names_the_best_and_what_it_is_worth_held_out():
    best = {"config": {"learning_rate": 0.00123, "epochs": 4}, "score": 1.5, "scores": [1.4, 1.6]}
    row = {"world": "w", "agent": "ppo", "trials": [best], "best": best, "held_out": [1.1, 1.3], "failed": []}
    text = sweep.page([row])
    assert (
        "| w | ppo | 1 | 0 | epochs 4, learning_rate 0.00123 | 1.5000 [1.4000, 1.6000] | 1.2000 [1.1000, 1.3000] |"
        in text
    )


class Squares:
    """Scores a candidate by its squares, and counts."""

    requests = 0

    def evaluate(self, population, seeds):
        self.requests += len(population) * len(seeds)
        return -(population**2).sum(dim=1) + sum(seeds)


@pytest.mark.slow
def test_actors_give_the_scores_of_one_process():
    pytest.importorskip("ray")
    from experiments.ray_population import RayPopulation

    population = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here = Squares()
    want = [here.evaluate(population, [1, 2]), here.evaluate(population[:1], [3])]
    with RayPopulation(Squares(), actors=2) as actors:
        got = [actors.evaluate(population, [1, 2]), actors.evaluate(population[:1], [3])]
        assert actors.requests == here.requests
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_actors_give_the_scores_of_batched_rollouts(world):
    pytest.importorskip("ray")
    population_module = pytest.importorskip("agents.population")
    service = pytest.importorskip("agents.service")
    from experiments.ray_population import RayPopulation

    recipe = service.EnvRecipe(world=world)
    env = recipe.make(1)
    columns = torch.arange(4)
    network = population_module.Network(
        columns, torch.zeros(4), torch.ones(4), (4, env.world.n_strategies), tuple(env.strategy_names)
    )
    candidates = torch.randn(5, network.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    evaluator = population_module.PopulationEvaluator(recipe, network)
    want = evaluator.evaluate(candidates, [3, 4, 5])
    with RayPopulation(population_module.PopulationEvaluator(recipe, network), actors=2) as actors:
        assert torch.equal(actors.evaluate(candidates, [3, 4, 5]), want)
        assert actors.requests == evaluator.requests


def small_sweep(world, runs, **settings):
    return sweep.Args(
        worlds=(world,), trials=2, seeds=2, steps=2560, episodes=50, runs=runs,
        space=("learning_rate=log:1e-3:1e-2", "epochs=int:1:2"), **settings,
    )  # fmt: skip


@pytest.mark.slow
def test_a_small_sweep_finds_finished_trials_and_scores_the_best_held_out(world, tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("optuna")
    result = sweep.run(small_sweep(world, tmp_path, cpus=2))
    (row,) = result["rows"]
    assert len(row["trials"]) == 2
    assert row["failed"] == []
    assert row["best"]["score"] == max(t["score"] for t in row["trials"])
    assert len(row["best"]["scores"]) == len(row["held_out"]) == 2
    assert row["held_out_fold"] == "B"
    folder = next(Path(tmp_path).glob("sweep_*"))
    assert list(folder.glob("tensorboard/*/*/events*"))
    # without result.json the sweep is restored: no trial is made anew
    trainings = sorted(p.name for p in tmp_path.glob("ppo_*"))
    (folder / "result.json").unlink()
    again = sweep.run(small_sweep(world, tmp_path, cpus=2))
    assert again["rows"][0]["trials"] == json.loads(json.dumps(row["trials"]))
    assert sorted(p.name for p in tmp_path.glob("ppo_*")) == trainings


@pytest.mark.slow
def test_a_sweep_and_a_population_run_on_a_cluster_of_two_nodes(world, tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("optuna")
    from ray.cluster_utils import Cluster

    from experiments.ray_population import RayPopulation

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        result = sweep.run(small_sweep(world, tmp_path, address=cluster.address))
        assert len(ray.nodes()) == 2
        (row,) = result["rows"]
        assert (len(row["trials"]), row["failed"], len(row["held_out"])) == (2, [], 2)
        population = torch.eye(5, 3, dtype=torch.float64)
        with RayPopulation(Squares(), actors=2, address=cluster.address) as actors:
            assert torch.equal(actors.evaluate(population, [1, 2]), Squares().evaluate(population, [1, 2]))
    finally:
        ray.shutdown()
        cluster.shutdown()
