"""Supervised selection: frozen trees equal scikit-learn's, routers find each user's best strategy, nothing is lost in a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from agents import supervised
from agents.service import EnvRecipe, FixedPlays, play_fixed, row_seeds, serve, serve_episodes
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import FixedPolicy, UniformPolicy
from metarec_gym.world import World

OPTIMUM = 2 * 0.5
PERSONAL = ("gbm_regressor", "supervised_bandit", "gbm_selector", "knn_router", "cluster_router")


@pytest.fixture(scope="module")
def world() -> World:
    """Three types, told by the taste of their history; nobody leaves."""
    return World.synthetic(
        n_types=3, users_per_type=8, items_per_type=20, horizon=5, slate_size=2, history_lengths=(5, 10), leaving=None
    )


def lesson_of(world: World, requests: int = 5_000, **fixed: Any) -> Any:
    def make_env(num_envs: int, **settings: Any) -> MetaRecVectorEnv:
        both = {**fixed, **settings}
        return MetaRecVectorEnv(num_envs, world=world, fold="A", output="torch", autoreset_mode="SameStep", **both)

    return SimpleNamespace(world=world, fold="A", seed=0, requests=requests, horizon=world.horizon, make_env=make_env)


def value(world: World, policy: Any) -> float:
    """Expected reward a request on all start states of fold B."""
    starts = world.starts_of("B")
    env = MetaRecVectorEnv(len(starts), world=world, fold="B", output="torch", autoreset_mode="Disabled")
    obs, info = env.reset(seed=3, options={"start_state": starts})
    policy.begin(len(starts))
    total, alive = 0.0, torch.ones(len(starts), dtype=torch.bool)
    for _ in range(env.horizon):
        probs = policy.action_probs(obs, info["action_mask"].bool())
        torch.testing.assert_close(probs.sum(dim=1), torch.ones(len(starts)))
        seen, action = obs, probs.argmax(dim=1)
        obs, reward, *_, info = env.step(action)
        policy.observe(seen, action, reward, alive)
        total += float(env.expected_reward.mean())
    return total / env.horizon


def plays_of(value: torch.Tensor, obs: torch.Tensor, noise: float = 0.0) -> FixedPlays:
    noise_var = torch.full((value.shape[1],), noise, dtype=torch.float64)
    return FixedPlays(obs, torch.arange(len(value)), value.to(torch.float64), noise_var, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", PERSONAL)
def test_each_learner_reaches_95_percent_of_the_known_optimum_on_users_it_never_met(world: World, name: str) -> None:
    policy = getattr(supervised, f"learn_{name}")(lesson_of(world))
    assert 0.95 * OPTIMUM <= value(world, policy) <= OPTIMUM + 1e-5


@pytest.mark.parametrize("name", ["knn_router", "cluster_router"])
def test_routers_reach_95_percent_of_the_known_optimum(world: World, name: str) -> None:
    policy = getattr(supervised, f"learn_{name}")(lesson_of(world, 1_000))
    assert 0.95 * OPTIMUM <= value(world, policy) <= OPTIMUM + 1e-5


def test_round_robin_and_length_ranges_know_nothing_of_types(world: World) -> None:
    # in turn over 5 requests: the own specialist once or twice in four
    lesson = lesson_of(world, 1_000)
    assert value(world, supervised.learn_round_robin(lesson)) < 0.6 * OPTIMUM
    assert value(world, supervised.learn_history_length(lesson)) < 0.6 * OPTIMUM


def test_frozen_trees_predict_what_scikit_learn_predicts() -> None:
    from sklearn.ensemble import HistGradientBoostingRegressor

    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    targets = [x[:, 0] * x[:, 1], np.sin(3 * x[:, 2])]
    models = [
        HistGradientBoostingRegressor(max_iter=n, max_leaf_nodes=9, random_state=0).fit(x.astype(np.float64), y)
        for n, y in zip((30, 20), targets, strict=True)
    ]
    forest = supervised.Forest.of(models)
    expected = np.stack([model.predict(x.astype(np.float64)) for model in models], axis=1)
    np.testing.assert_allclose(forest.predict(torch.from_numpy(x)).numpy(), expected, atol=1e-9)
    # a row has the same value in any batch
    assert torch.equal(forest.predict(torch.from_numpy(x[:3])), forest.predict(torch.from_numpy(x))[:3])


def test_a_router_keeps_its_first_choice_until_episodes_begin_again() -> None:
    tensors = {"column": torch.tensor([0]), "edges": torch.tensor([0.5], dtype=torch.float64)}
    router = supervised.Router("ranges", {**tensors, "value": torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()})
    mask, low, high = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0.1]]), torch.tensor([[0.9]])
    router.begin(1)
    assert router.action_probs(low, mask).tolist() == [[1.0, 0.0]]
    assert router.action_probs(high, mask).tolist() == [[1.0, 0.0]]
    assert router.action_probs(high, torch.tensor([[False, True]])).tolist() == [[0.0, 1.0]]
    router.begin(1)
    assert router.action_probs(high, mask).tolist() == [[0.0, 1.0]]
    with pytest.raises(ValueError, match="expected forest"):
        supervised.Router("dice", {})


def test_labels_of_pure_noise_follow_the_prediction_and_labels_without_noise_the_measurement() -> None:
    rng = torch.Generator().manual_seed(0)
    obs, noise = torch.rand(64, 2, generator=rng), torch.randn(64, 3, generator=rng).double()
    measured = noise + torch.tensor([0.0, 0.0, 1.0]).double()
    # noise of variance 1 explains all that differs: shrunk to the mean, strategy 2 for nearly everyone
    shrunk = supervised.selector_labels(plays_of(measured, obs, noise=1.5), 0)
    assert float((shrunk == 2).double().mean()) > 0.85
    exact = supervised.selector_labels(plays_of(measured, obs, noise=0.0), 0)
    assert torch.equal(exact, measured.argmax(dim=1))
    assert float((exact == 2).double().mean()) < 0.8


def test_cross_validation_prefers_one_strategy_where_the_start_tells_nothing() -> None:
    rng = torch.Generator().manual_seed(1)
    obs = torch.rand(200, 3, generator=rng)
    measured = torch.randn(200, 2, generator=rng).double() + torch.tensor([0.8, 0.0]).double()
    router = supervised.best_fit(plays_of(measured, obs), [supervised.neighbours_fit(k) for k in (150, 1)], 0)
    assert int(router.tensors()["k"]) == 150
    # and one neighbour where each type is told exactly
    types = (obs[:, 0] > 0.5).long()
    told = torch.nn.functional.one_hot(types, 2).double()
    router = supervised.best_fit(plays_of(told, obs), [supervised.neighbours_fit(k) for k in (150, 5)], 0)
    assert int(router.tensors()["k"]) == 5


def test_a_users_answers_move_the_supervised_bandit_by_hand() -> None:
    # predictions 0.5, 0.4; deviations with variance 1 and covariance -0.5; noise 1
    forest = supervised.Forest(
        {
            **{n: torch.zeros(0, 1, dtype=torch.int64) for n in ("feature", "left", "right")},
            **{n: torch.zeros(0, 1, dtype=torch.float64) for n in ("threshold", "value")},
            "output": torch.zeros(0, dtype=torch.int64),
            "base": torch.tensor([0.5, 0.4], dtype=torch.float64),
            "depth": torch.tensor([0]),
        }
    )
    policy = supervised.SupervisedBandit(forest, torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), 1.0, exploration=0.0)
    mask, obs = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 3)
    policy.begin(2)
    assert policy.action_probs(obs, mask).tolist() == [[1.0, 0.0], [1.0, 0.0]]
    # reward 0: surprise -0.5, gain 1/2 and -1/4: 0.5 - 0.25 = 0.25 against 0.4 + 0.125 = 0.525; the second row was over
    policy.observe(obs, torch.tensor([0, 0]), torch.tensor([0.0, 0.0]), torch.tensor([True, False]))
    torch.testing.assert_close(policy._mean, torch.tensor([[-0.25, 0.125], [0.0, 0.0]]).double())
    torch.testing.assert_close(policy._cov[0], torch.tensor([[0.5, -0.25], [-0.25, 0.875]]).double())
    assert policy.action_probs(obs, mask).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_policies_come_back_from_a_file_as_they_were(world: World, tmp_path: Path) -> None:
    lesson = lesson_of(world, 1_500)
    forest = supervised.fit_rewards(
        serve_episodes(EnvRecipe.of(lesson.make_env(1)), UniformPolicy(), 1_500, seed=0, purpose="test"), 4, 0
    )
    policies = [
        supervised.ForestPolicy(forest),
        supervised.SupervisedBandit(forest, torch.eye(4) * 0.1, 0.3),
        supervised.learn_knn_router(lesson),
    ]
    obs, mask = lesson.make_env(32).reset(seed=1)[0], torch.ones(32, 4, dtype=torch.bool)
    for policy in policies:
        again = supervised.load(supervised.save(policy, tmp_path / "policy.safetensors"))
        assert type(again) is type(policy)
        policy.begin(32)
        again.begin(32)
        assert torch.equal(policy.action_probs(obs, mask), again.action_probs(obs, mask))
    with pytest.raises(FileNotFoundError, match="learn one"):
        supervised.load(tmp_path / "nothing")


def test_fixed_plays_give_what_each_strategy_earns_alone(leaving_world: World) -> None:
    recipe = EnvRecipe.of(lesson_of(leaving_world).make_env(1))
    plays = play_fixed(recipe, 3 * 12 * 5, seed=4)
    k, seeds = leaving_world.n_strategies, row_seeds(4, len(plays.value), "fixed plays")
    assert plays.value.shape == (5, k)
    assert plays.requests <= 3 * 12 * 5
    for strategy in range(k):
        served = serve(recipe.make(5), FixedPolicy(strategy), seeds)
        torch.testing.assert_close(served.reward.double().sum(dim=1) / 12, plays.value[:, strategy])
        assert torch.equal(served.start_obs, plays.start_obs)


def test_service_stays_within_its_budget_and_repeats_by_seed(leaving_world: World) -> None:
    recipe = EnvRecipe.of(lesson_of(leaving_world).make_env(1))
    first, again = (serve_episodes(recipe, UniformPolicy(), 3_000, seed=2, purpose="test") for _ in range(2))
    assert 2_500 < first.requests <= 3_000
    assert torch.equal(first.reward, again.reward)
    assert not bool(first.reward[~first.alive].any())
    other = serve_episodes(recipe, UniformPolicy(), 3_000, seed=3, purpose="test")
    assert not torch.equal(first.obs[:16], other.obs[:16])
