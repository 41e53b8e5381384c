"""Search finds what is there to be found, spends what it may, and scores a generation as it would score each candidate alone."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import search
from agents.population import Network, PopulationEvaluator, make_network, searched_numbers
from agents.service import EnvRecipe, row_seeds, serve, serve_episodes
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import MlpPolicy, UniformPolicy
from metarec_gym.world import World

pytest.importorskip("cma")
pytest.importorskip("pymoo")
pytest.importorskip("optuna")

OPTIMUM = 2 * 0.5
"""Two items a request, each taken with probability 0.5 when the specialist of the user's type serves."""
QUICK = search.Args(
    total_steps=16_000, population=12, users=8, features=("taste",), sigma=0.5, warm_share=0.1, warm_start=False
)
WEIGHT_METHODS = ("ga", "pso", "cma_es", "random_search")


@pytest.fixture(scope="module")
def world() -> World:
    """Three types, told by the taste of their history; nobody leaves."""
    return World.synthetic(
        n_types=3, users_per_type=8, items_per_type=20, horizon=5, slate_size=2, history_lengths=(5, 10), leaving=None
    )


def env_of(world: World, **settings: object) -> MetaRecVectorEnv:
    return MetaRecVectorEnv(2, world=world, fold="A", output="torch", autoreset_mode="SameStep", **settings)


def value(world: World, policy: MlpPolicy) -> float:
    """Expected reward a request on all start states of fold B."""
    starts = world.starts_of("B")
    env = MetaRecVectorEnv(len(starts), world=world, fold="B", output="torch", autoreset_mode="Disabled")
    obs, info = env.reset(seed=3, options={"start_state": starts})
    total = 0.0
    for _ in range(env.horizon):
        obs, *_, info = env.step(policy.action_probs(obs, info["action_mask"].bool()).argmax(dim=1))
        total += float(env.expected_reward.mean())
    return total / env.horizon


def evaluator_of(world: World, **settings: object) -> PopulationEvaluator:
    recipe = EnvRecipe.of(env_of(world, **settings))
    service = serve_episodes(recipe, UniformPolicy(), 400, seed=1, purpose="test")
    return PopulationEvaluator(recipe, make_network(recipe, service, ("taste", "request_fraction"), (3,)))


def some(network: Network, count: int) -> torch.Tensor:
    return torch.randn(count, network.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_each_method_reaches_95_percent_of_the_known_optimum_from_regression(world: World, method: str) -> None:
    args = dataclasses.replace(QUICK, method=method, warm_start=True, warm_share=0.3, total_steps=12_000)
    result = search.train(env_of(world), args, progress=False)
    assert 0.95 * OPTIMUM <= value(world, result.policy) <= OPTIMUM + 1e-5
    assert 0.9 * args.total_steps <= result.steps <= args.total_steps


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ga", "pso", "cma_es"])
def test_search_alone_reaches_95_percent_of_the_known_optimum_from_zeros(world: World, method: str) -> None:
    # zeros serve every strategy alike: (0.5 + 0.1 + 0.1) / 3 an item
    args = dataclasses.replace(QUICK, method=method, total_steps=250_000, population=24, users=24)
    result = search.train(env_of(world), args, progress=False)
    assert 0.95 * OPTIMUM <= value(world, result.policy) <= OPTIMUM + 1e-5


def test_search_from_zeros_gains_over_its_start(world: World) -> None:
    result = search.train(env_of(world), dataclasses.replace(QUICK, method="cma_es"), progress=False)
    assert value(world, result.policy) > 0.55
    assert result.metrics["search/final"] > 0.0


@pytest.mark.parametrize("method", [*WEIGHT_METHODS, "bayes_schedule"])
def test_one_seed_gives_one_policy_and_leaves_the_global_generators_alone(world: World, method: str) -> None:
    args = dataclasses.replace(QUICK, method=method, total_steps=2_500)
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first, again = (search.train(env_of(world), args, progress=False) for _ in range(2))
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(torch_before, torch.get_rng_state())
    for (weight, bias), (other, other_bias) in zip(first.policy.layers, again.policy.layers, strict=True):
        assert torch.equal(weight, other)
        assert torch.equal(bias, other_bias)
    assert first.history == again.history


def test_a_whole_population_scores_as_each_candidate_alone(leaving_world: World) -> None:
    evaluator = evaluator_of(leaving_world)
    population, seeds = some(evaluator.network, 7), row_seeds(3, 9, "users")
    together = evaluator.returns(population, seeds)
    alone = torch.cat([evaluator.returns(candidate[None], seeds) for candidate in population])
    assert together.shape == (7, 9)
    assert torch.equal(together, alone)
    assert len(set(together.mean(dim=1).tolist())) > 1
    # in any order of candidates, and in blocks
    evaluator.batch_rows = 20
    assert torch.equal(evaluator.returns(population.flip(0), seeds).flip(0), together)


def test_the_exported_policy_earns_what_its_candidate_scored(leaving_world: World) -> None:
    evaluator = evaluator_of(leaving_world)
    candidate, seeds = some(evaluator.network, 1), row_seeds(5, 16, "users")
    env = evaluator.recipe.make(16)
    policy = evaluator.network.export(candidate[0], env.single_observation_space.shape[0])
    served = serve(env, policy, seeds)
    assert torch.equal(served.reward.to(torch.float64).sum(dim=1) / env.horizon, evaluator.returns(candidate, seeds)[0])
    assert evaluator.requests == served.requests


def test_candidates_meet_the_same_users_with_the_same_luck(leaving_world: World) -> None:
    evaluator = evaluator_of(leaving_world)
    twins = some(evaluator.network, 1).repeat(4, 1)
    scores = evaluator.returns(twins, row_seeds(0, 6, "users"))
    assert torch.equal(scores, scores[:1].expand(4, -1))
    assert len(set(scores[0].tolist())) > 1
    others = evaluator.returns(twins, row_seeds(0, 6, "other users"))
    assert not torch.equal(scores, others)


def test_an_evaluator_sent_to_another_process_scores_the_same(world: World) -> None:
    evaluator = evaluator_of(world)
    population, seeds = some(evaluator.network, 3), row_seeds(3, 4, "users")
    expected = evaluator.evaluate(population, seeds)
    sent = pickle.loads(pickle.dumps(evaluator))
    assert sent._envs == {}
    assert torch.equal(sent.evaluate(population, seeds), expected)


def test_strategies_out_of_service_are_never_served(world: World) -> None:
    recipe = EnvRecipe.of(env_of(world, unavailable=("specialist_1",)))
    served = serve_episodes(recipe, UniformPolicy(), 400, seed=1, purpose="test")
    assert bool((served.action != 1).all())
    result = search.train(env_of(world, unavailable=("specialist_1",)), QUICK, progress=False)
    mask = torch.tensor([[True, False, True, True]])
    assert float(result.policy.action_probs(served.start_obs[:1], mask)[0, 1]) == 0.0


@pytest.mark.parametrize("method", ["pso", "cma_es", "bayes_schedule"])
def test_a_killed_search_goes_on_and_ends_with_the_same_policy(
    world: World, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = dataclasses.replace(QUICK, method=method, total_steps=3_000)
    whole = search.train(env_of(world), args, progress=False)
    real, calls = PopulationEvaluator.evaluate, []

    def dies(self: PopulationEvaluator, population: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        calls.append(len(population))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, population, seeds)

    monkeypatch.setattr(PopulationEvaluator, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        search.train(env_of(world), args, run_dir=tmp_path, progress=False)
    rest = search.train(env_of(world), args, run_dir=tmp_path, progress=False, resume=True)
    # two generations before the kill are not played again
    assert len(calls) == 3 + len(whole.history) - 2 + 1
    assert rest.history == whole.history
    for (weight, _), (other, _) in zip(whole.policy.layers, rest.policy.layers, strict=True):
        assert torch.equal(weight, other)
    other = dataclasses.replace(args, seed=1)
    with pytest.raises(ValueError, match="another search"):
        search.train(env_of(world), other, run_dir=tmp_path, progress=False, resume=True)


def schedule_network() -> Network:
    return Network(torch.tensor([0, 1]), torch.tensor([0.4, 0.5]), torch.tensor([0.3, 0.2]), (2, 3), ("a", "b", "c"))


def served_by(network: Network, vector: torch.Tensor, horizon: int, history: float = 0.0) -> list[int]:
    obs = torch.tensor([[request / horizon, history] for request in range(horizon)])
    probs = network.export(vector, 2).action_probs(obs, torch.ones(horizon, 3, dtype=torch.bool))
    assert bool((probs.max(dim=1).values > 0.999).all())
    return probs.argmax(dim=1).tolist()


def test_a_schedule_is_a_network_that_switches_at_its_request() -> None:
    network = schedule_network()
    bayes = search.BayesSchedule(network, 10, search.Args(), 0)
    assert served_by(network, bayes.vector(2, 0, 7), 10) == [2] * 7 + [0] * 3
    assert served_by(network, bayes.vector(1, 1, 4), 10) == [1] * 10
    # four requests a unit of history: half a unit moves the switch from request 3 to 5
    assert served_by(network, bayes.vector(0, 1, 3, 4.0), 10, history=0.5) == [0] * 5 + [1] * 5


def test_tpe_finds_the_best_switch() -> None:
    network = schedule_network()
    bayes = search.BayesSchedule(network, 10, search.Args(population=8), 0)
    wanted = [2] * 7 + [0] * 3
    best, found = -1.0, 0.0
    for _ in range(12):
        population = bayes.ask()
        hits = [np.mean(np.equal(served_by_any(network, vector), wanted)) for vector in population]
        bayes.tell(population, torch.tensor(hits, dtype=torch.float64))
        best, found = max(best, max(hits)), float(np.mean(hits))
    assert best >= 0.95
    # and it knows: later trials crowd around it, chance is a third
    assert found > 0.5


def served_by_any(network: Network, vector: torch.Tensor) -> list[int]:
    obs = torch.tensor([[request / 10, 0.0] for request in range(10)])
    return network.export(vector, 2).action_probs(obs, torch.ones(10, 3, dtype=torch.bool)).argmax(dim=1).tolist()


def test_bad_settings_are_refused_with_what_to_change(world: World) -> None:
    with pytest.raises(ValueError, match="leave no generation"):
        search.train(env_of(world), dataclasses.replace(QUICK, total_steps=300), progress=False)
    with pytest.raises(ValueError, match="the observation has"):
        search.train(env_of(world), dataclasses.replace(QUICK, features=("mood",)), progress=False)
    with pytest.raises(ValueError, match="expected 'select'"):
        search.train(env_of(world, action="blend"), QUICK, progress=False)
    with pytest.raises(ValueError, match="population is 1"):
        search.Args(population=1)
    with pytest.raises(ValueError, match="no MetaRecVectorEnv"):
        search.train(object(), QUICK, progress=False)


def test_only_the_searched_blocks_and_the_constants_leave_the_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = EnvRecipe.of(env_of(world))
    service = serve_episodes(recipe, UniformPolicy(), 400, seed=1, purpose="test")
    features = ("taste", "request_fraction")
    network = make_network(recipe, service, features, ())
    column = recipe.make(1).feature_slices["request_fraction"].start
    places = searched_numbers(network, torch.tensor([column]))
    # four strategies, eight taste entries before the one searched: 8, 17, 26, 35, then the constants 36..39
    assert places.tolist() == [8, 17, 26, 35, 36, 37, 38, 39]
    assert searched_numbers(network, None).tolist() == list(range(40))
    real, populations = PopulationEvaluator.evaluate, []

    def kept(self: PopulationEvaluator, population: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        populations.append(population)
        return real(self, population, seeds)

    monkeypatch.setattr(PopulationEvaluator, "evaluate", kept)
    args = dataclasses.replace(
        QUICK, warm_start=True, warm_share=0.3, total_steps=5_000, features=features, searched=("request_fraction",)
    )
    search.train(env_of(world), args, progress=False)
    # the last row of a generation is the start
    moved = (populations[0][:-1] != populations[0][-1]).any(dim=0)
    assert torch.nonzero(moved)[:, 0].tolist() == places.tolist()
    with pytest.raises(ValueError, match="searched names"):
        search.train(env_of(world), dataclasses.replace(args, searched=("mood",)), progress=False)
