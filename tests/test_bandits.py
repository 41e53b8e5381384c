"""Bandits: hand-worked choices, masks, rows apart from one another, and worlds whose best strategy is known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from agents import bandits
from metarec_gym.policy import sample_actions
from metarec_gym.seeding import numpy_rng, torch_generator

K = 4
ALL = torch.ones(1, K, dtype=torch.bool)
OBS = torch.zeros(1, 3 + K)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class UserTypes(VectorEnv[Any, Any, Any]):
    """Each episode's user has a hidden type (= best strategy); strategies 2g and 2g + 1 suit the same half of the users."""

    def __init__(self, num_envs: int, *, hint: bool = False, horizon: int = 12) -> None:
        self.num_envs, self.hint, self.horizon = num_envs, hint, horizon
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gym.spaces.Box(0, 1, (K,), np.float32)
        self.single_action_space = gym.spaces.Discrete(K)
        self.means = torch.tensor(
            [[1.0, 0.7, 0.0, 0.0], [0.7, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.7], [0.0, 0.0, 0.7, 1.0]]
        )

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Tensor, dict[str, Any]]:
        self.rng = torch_generator(seed or 0, "toy")
        self.clock = 0
        self.type = torch.randint(0, K, (self.num_envs,), generator=self.rng)
        return self._obs(), {}

    def _obs(self) -> Tensor:
        shown = torch.nn.functional.one_hot(self.type, K).to(torch.float32)
        return shown if self.hint else torch.zeros_like(shown)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        reward = self.means[self.type, actions] + 0.3 * torch.randn(self.num_envs, generator=self.rng)
        self.clock += 1
        over = torch.full((self.num_envs,), self.clock % self.horizon == 0)
        if bool(over[0]):
            self.type = torch.randint(0, K, (self.num_envs,), generator=self.rng)
        return self._obs(), reward, torch.zeros_like(over), over, {}


def play(policy: Any, env: UserTypes, episodes: int = 1, seed: int = 5) -> float:
    """Mean reward per request over whole episodes."""
    generator, total = torch_generator(seed, "play"), 0.0
    obs, _ = env.reset(seed=seed)
    mask = torch.ones(env.num_envs, K, dtype=torch.bool)
    for _ in range(episodes):
        policy.begin(env.num_envs)
        for _ in range(env.horizon):
            probs = policy.action_probs(obs, mask)
            torch.testing.assert_close(probs.sum(dim=1), torch.ones(env.num_envs))
            action = sample_actions(probs, torch.rand(env.num_envs, generator=generator))
            seen = obs
            obs, reward, _, _, _ = env.step(action)
            policy.observe(seen, action, reward, torch.ones(env.num_envs, dtype=torch.bool))
            total += float(reward.mean())
    return total / episodes / env.horizon


def feed(policy: Any, pairs: list[tuple[int, float]]) -> Any:
    """One user's (strategy, reward) history."""
    policy.begin(1)
    for action, reward in pairs:
        policy.observe(OBS, torch.tensor([action]), torch.tensor([reward]), torch.tensor([True]))
    return policy


def every_policy() -> list[Any]:
    hybrid = {"num_strategies": K, "obs_dim": 3 + K, "own": [3]}
    return [
        bandits.EpsilonGreedy(K),
        bandits.EpsilonGreedy(K, discount=0.8),
        bandits.Softmax(K),
        bandits.Ucb1(K),
        bandits.GaussianThompson(K, 0),
        bandits.BetaThompson(K, 0),
        bandits.BoltzmannGumbel(K, 0),
        bandits.EpsilonGreedy(K, epsilon=1.0, decay=2.0, power=2.0),
        bandits.BetaThompson(K, 0, reward_low=-1.0, reward_range=2.0, trials=4.0),
        bandits.Exp3(K),
        bandits.Exp3(K, rate=2.0),
        bandits.LinUcb(K, 3 + K, online=True),
        bandits.LinTs(K, 3 + K, online=True),
        bandits.HybridLinUcb(**hybrid, online=True),
        bandits.HybridLinTs(**hybrid, online=True),
        bandits.NeuralLinear(K, 3 + K, hidden=8),
        bandits.PopulationUcb(K),
        bandits.PopulationThompson(K, memory=0.9),
        bandits.HierarchicalUcb(K, bandits.Features((0, 1), (3,), (2,), (3,)), memory=0.9),
        bandits.HierarchicalUcb(K, bandits.Features((0, 1)), thompson=True, lead=(0, 2), margin=0.5),
    ]


SHARED = bandits.LinUcb | bandits.HybridLinUcb
"""Their models are shared by the rows by design."""


def test_epsilon_greedy_tries_each_strategy_and_then_prefers_the_best_mean() -> None:
    policy = feed(bandits.EpsilonGreedy(K, epsilon=0.2), [(0, 1.0), (2, 0.0)])
    # 0.8 split over the untried 1 and 3, and 0.2 over all four
    torch.testing.assert_close(policy.action_probs(OBS, ALL), torch.tensor([[0.05, 0.45, 0.05, 0.45]]))
    policy = feed(policy, [(0, 0.2), (1, 0.6), (2, 0.1), (3, 0.0), (0, 0.4)])
    torch.testing.assert_close(policy.action_probs(OBS, ALL), torch.tensor([[0.05, 0.85, 0.05, 0.05]]))


def test_ucb1_weighs_a_good_mean_against_few_tries() -> None:
    # t = 6; bounds: 0.5 + sqrt(2 ln 6 / 3) = 1.593, 0 + sqrt(2 ln 6) = 1.893, two others with reward 0 like it
    pairs = [(0, 0.5), (0, 0.5), (0, 0.5), (1, 0.0), (2, 0.0), (3, 0.0)]
    assert 0.5 + math.sqrt(2 * math.log(6) / 3) < math.sqrt(2 * math.log(6))
    probs = feed(bandits.Ucb1(K), pairs).action_probs(OBS, ALL)
    torch.testing.assert_close(probs, torch.tensor([[0.0, 1 / 3, 1 / 3, 1 / 3]]))
    # a tenth of the reward range leaves 0.5 + 0.109 against 0.189
    probs = feed(bandits.Ucb1(K, reward_range=0.1), pairs).action_probs(OBS, ALL)
    assert probs.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_gaussian_thompson_probabilities_are_the_chances_of_being_best() -> None:
    # beliefs N(mean, 1/(1 + n)); strategies 1..3 without data, strategy 0 after 99 requests of reward 1: N(0.99, 0.01)
    policy = feed(bandits.GaussianThompson(K, 0, draws=4000), [(0, 1.0)] * 99)
    # P(max of three N(0, 1) < 0.99) = 0.8389^3 = 0.590, a little less for the width 0.1
    probs = policy.action_probs(OBS, ALL)[0]
    assert float(probs[0]) == pytest.approx(0.59, abs=0.03)
    assert float(probs[1]) == pytest.approx(0.137, abs=0.03)


def test_gamma_draws_have_the_mean_and_variance_of_the_gamma_distribution() -> None:
    for shape in (1.0, 2.5, 20.0):
        draws = bandits.gamma_draws(torch.arange(60_000), torch.tensor(shape))
        assert float(draws.mean()) == pytest.approx(shape, rel=0.02)
        assert float(draws.var()) == pytest.approx(shape, rel=0.04)


def test_beta_thompson_probabilities_are_the_chances_of_being_best() -> None:
    # Beta(3, 1) against three Beta(1, 1): P(X is best) = E[X^3] = 3/6 = 0.5
    policy = feed(bandits.BetaThompson(K, 0, reward_range=2.0, draws=8000), [(0, 2.0), (0, 5.0)])
    assert float(policy.action_probs(OBS, ALL)[0, 0]) == pytest.approx(0.5, abs=0.02)


def test_linucb_equals_ridge_regression_worked_by_hand() -> None:
    # one feature x = 1 and the constant: A = I + [[1, 1], [1, 1]], b = (2, 2), weights (2/3, 2/3): 4/3 at x = 1
    policy = bandits.LinUcb(2, 1, alpha=1.0, online=True)
    x = torch.ones(1, 1)
    policy.observe(x, torch.tensor([0]), torch.tensor([2.0]), torch.tensor([True]))
    torch.testing.assert_close(policy._weights[0], torch.tensor([2 / 3, 2 / 3]))
    # x' A^-1 x = 2/3 for strategy 0 (score 4/3 + 0.816 = 2.15) and 2 for the untried one (score 1.41)
    spread = torch.einsum("kij,nj->nki", policy._whitener, torch.ones(1, 2)).norm(dim=2)
    torch.testing.assert_close(spread, torch.tensor([[math.sqrt(2 / 3), math.sqrt(2.0)]]))
    assert policy.action_probs(x, torch.ones(1, 2, dtype=torch.bool)).tolist() == [[1.0, 0.0]]


def test_population_ucb_equals_a_kalman_update_worked_by_hand() -> None:
    policy = bandits.PopulationUcb(2, exploration=0.0)
    policy.prior_cov = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    policy.begin(1)
    policy.observe(OBS, torch.tensor([0]), torch.tensor([1.0]), torch.tensor([True]))
    # gain = (1, 0.5) / (1 + 1): mean (0.5, 0.25), covariance [[0.5, 0.25], [0.25, 0.875]]
    assert policy._mean.tolist() == [[0.5, 0.25]]
    assert policy._cov.tolist() == [[[0.5, 0.25], [0.25, 0.875]]]
    policy.observe(OBS, torch.tensor([0]), torch.tensor([9.0]), torch.tensor([False]))
    assert policy._mean.tolist() == [[0.5, 0.25]]


def test_population_ucb_finds_the_population_that_the_rewards_were_drawn_from() -> None:
    rng = numpy_rng(0, "population")
    mean, cov = np.array([0.3, 0.5, 0.1]), np.array([[0.2, 0.1, 0.0], [0.1, 0.3, -0.1], [0.0, -0.1, 0.2]])
    users, horizon = 4000, 20
    theta = rng.multivariate_normal(mean, cov, size=users)
    trend = -0.02 * np.arange(horizon)
    action = rng.integers(0, 3, size=(horizon, users))
    reward = theta[np.arange(users), action] + trend[:, None] + rng.normal(scale=0.5, size=(horizon, users))
    done = np.zeros((horizon, users), dtype=bool)
    done[-1] = True
    policy = bandits.PopulationUcb(3).fit(
        torch.from_numpy(action), torch.from_numpy(reward).float(), torch.from_numpy(done)
    )  # fmt: skip
    np.testing.assert_allclose(policy.prior_mean, mean + trend.mean(), atol=0.03)
    np.testing.assert_allclose(policy.prior_cov, cov, atol=0.03)
    np.testing.assert_allclose(policy.trend, trend - trend.mean(), atol=0.03)
    assert policy.noise_var == pytest.approx(0.25, abs=0.02)


def test_no_bandit_chooses_a_forbidden_strategy() -> None:
    mask = torch.tensor([[False, True, False, True]])
    for policy in every_policy():
        for pairs in ([], [(0, 5.0), (2, 5.0), (1, 0.1)]):
            probs = feed(policy, pairs).action_probs(OBS, mask)
            assert float(probs.sum()) == pytest.approx(1.0)
            assert float(probs[~mask].sum()) == 0.0


def test_a_user_gets_the_same_probabilities_in_any_batch() -> None:
    generator = torch_generator(0, "rows")
    actions = torch.randint(0, K, (6, 5), generator=generator)
    rewards = torch.rand(6, 5, generator=generator)
    obs, on = torch.rand(5, 3 + K, generator=generator), torch.ones(5, dtype=torch.bool)
    for policy in every_policy():
        if isinstance(policy, SHARED):
            continue
        policy.begin(5)
        for action, reward in zip(actions, rewards, strict=True):
            policy.observe(obs, action, reward, on)
        together = policy.action_probs(obs, ALL.expand(5, K))
        policy.begin(1)
        for action, reward in zip(actions, rewards, strict=True):
            policy.observe(obs[3:4], action[3:4], reward[3:4], on[:1])
        torch.testing.assert_close(policy.action_probs(obs[3:4], ALL)[0], together[3], atol=1e-6, rtol=0)


def test_what_follows_the_end_of_an_episode_is_not_learned() -> None:
    for policy in every_policy():
        policy.begin(1)
        before = policy.action_probs(OBS, ALL)
        policy.observe(OBS, torch.tensor([1]), torch.tensor([5.0]), torch.tensor([False]))
        assert torch.equal(policy.action_probs(OBS, ALL), before)


def test_equal_seeds_give_equal_choices_and_no_global_generator_moves() -> None:
    state = torch.get_rng_state()
    for make in (
        lambda: bandits.GaussianThompson(K, 3),
        lambda: bandits.BetaThompson(K, 3),
        lambda: bandits.LinUcb(K, K).learn(UserTypes(8), 200, seed=3),
        lambda: bandits.PopulationUcb(K).learn(UserTypes(8), 200, seed=3),
    ):
        assert play(make(), UserTypes(8)) == play(make(), UserTypes(8))
    assert torch.equal(torch.get_rng_state(), state)


def test_bandits_serve_a_hidden_type_better_the_longer_they_know_it() -> None:
    # any fixed or random strategy earns (1 + 0.7) / 4 = 0.425 a request; knowing the type earns 1
    def value(policy: Any) -> float:
        return play(policy, UserTypes(512, horizon=24))

    assert value(bandits.EpsilonGreedy(K)) > 0.65
    assert value(bandits.Ucb1(K, reward_range=0.5)) > 0.65
    assert value(bandits.GaussianThompson(K, 0, prior_mean=0.4, prior_std=0.4, noise_std=0.3)) > 0.7
    assert value(bandits.BetaThompson(K, 0)) > 0.55


def test_the_population_prior_beats_every_bandit_that_starts_from_nothing() -> None:
    population = bandits.PopulationUcb(K).learn(UserTypes(512), 40_000, seed=1)
    own = bandits.GaussianThompson(K, 0, prior_mean=0.425, prior_std=0.4, noise_std=0.3)
    # types come in two halves, so strategies 0 and 1 (2 and 3) suit the same users
    assert float(population.prior_cov[0, 1]) > 0.05
    assert float(population.prior_cov[0, 2]) < -0.05
    gain = play(population, UserTypes(1024)) - play(own, UserTypes(1024))
    assert gain > 0.03


def test_linucb_reads_the_type_from_the_observation_and_keeps_it_when_frozen() -> None:
    policy = bandits.LinUcb(K, K).learn(UserTypes(256, hint=True), 8_000, seed=1)
    weights = policy._weights.clone()
    assert play(policy, UserTypes(256, hint=True)) > 0.95
    assert torch.equal(policy._weights, weights)
    online = bandits.LinUcb(K, K, online=True).learn(UserTypes(256, hint=True), 8_000, seed=1)
    assert play(online, UserTypes(256, hint=True)) > 0.95
    assert not torch.equal(online._weights, weights)
    online.begin(4)
    torch.testing.assert_close(online._weights, weights)


def test_learning_needs_same_step_autoreset() -> None:
    env = UserTypes(4)
    env.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    with pytest.raises(ValueError, match="SameStep"):
        bandits.LinUcb(K, K).learn(env, 10, seed=0)
