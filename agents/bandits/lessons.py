"""Each bandit learned from a lesson: a fold's users, their main judge, and a budget of requests.

The per-user bandits start from nothing with each user, but the scale of their beliefs (mean reward, spread over users, noise of
one request) comes from training users: set by hand it would favour or cripple them. A lesson has `world`, `fold`, `seed`,
`requests`, `horizon` and `make_env(num_envs, **settings)`, an environment of the training fold with torch outputs and same-step
autoreset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agents.bandits.hierarchical import HierarchicalUcb
from agents.bandits.linear import HybridLinTs, HybridLinUcb, LinTs, LinUcb
from agents.bandits.neural import NeuralLinear
from agents.bandits.per_user import BetaThompson, BoltzmannGumbel, EpsilonGreedy, Exp3, GaussianThompson, Ucb1
from agents.bandits.population import PopulationThompson, PopulationUcb
from agents.bandits.tuned import learn_tuned
from metarec_gym.seeding import stream

USERS = 2048
"""Users served at once while a bandit learns; linear models are solved once for all of them."""
SCALE_REQUESTS = 50_000
"""Requests to training users that tell per-user bandits how large and how noisy rewards are."""


def _seed(lesson: Any, name: str) -> int:
    return stream(lesson.seed, "bandit", name, lesson.fold)


def _env(lesson: Any, requests: int) -> Any:
    # a small budget still holds whole episodes
    return lesson.make_env(min(USERS, max(1, requests // int(lesson.horizon))))


def _obs_dim(env: Any) -> int:
    return int(env.single_observation_space.shape[0])


def _scale(lesson: Any, name: str) -> tuple[int, float, float, float]:
    """Number of strategies; mean reward, its deviation over users, and that of one request's noise."""
    requests, k = min(lesson.requests, SCALE_REQUESTS), lesson.world.n_strategies
    prior = PopulationUcb(k).learn(_env(lesson, requests), requests, seed=_seed(lesson, name))
    # users differ, and so do strategies: without the second part a pool of one taste would never be explored
    spread = float(prior.prior_cov.diagonal().mean() + prior.prior_mean.var(correction=0)) ** 0.5
    return k, float(prior.prior_mean.mean()), spread, prior.noise_var**0.5


def learn_epsilon_greedy(lesson: Any) -> EpsilonGreedy:
    """Epsilon-greedy that explores in the first seventh of an episode: nothing to learn."""
    # at power 2, decay requests at first and as many later; a constant share would never settle
    return EpsilonGreedy(lesson.world.n_strategies, epsilon=1.0, decay=0.075 * lesson.horizon, power=2.0)


def learn_softmax(lesson: Any) -> BoltzmannGumbel:
    """Boltzmann exploration whose temperature falls with what is known, at half of one request's deviation."""
    k, _, _, noise = _scale(lesson, "softmax")
    return BoltzmannGumbel(k, _seed(lesson, "softmax"), scale=max(0.5 * noise, 1e-6))


def learn_ucb1(lesson: Any) -> Ucb1:
    """UCB1 in its sub-Gaussian form: sigma * sqrt(2 ln t / n)."""
    k, _, _, noise = _scale(lesson, "ucb1")
    return Ucb1(k, reward_range=noise)


def learn_thompson(lesson: Any) -> GaussianThompson:
    """Gaussian Thompson sampling with the population's scale."""
    k, mean, spread, noise = _scale(lesson, "thompson")
    return GaussianThompson(
        k, _seed(lesson, "thompson"), prior_mean=mean, prior_std=max(spread, 1e-6), noise_std=max(noise, 1e-6)
    )


def learn_beta_thompson(lesson: Any) -> BetaThompson:
    """Beta-Bernoulli Thompson sampling; success is within two deviations of the mean, a request as many trials as it is worth."""
    k, mean, spread, noise = _scale(lesson, "beta_thompson")
    width = max(2.0 * (spread**2 + noise**2) ** 0.5, 1e-6)
    return BetaThompson(
        k,
        _seed(lesson, "beta_thompson"),
        reward_low=mean - width,
        reward_range=2.0 * width,
        # n trials of p = 1/2 have the variance 1 / (4 n), one request has (noise / range)^2
        trials=(width / max(noise, 1e-6 * width)) ** 2,
        draws=32,
    )


def learn_exp3(lesson: Any) -> Exp3:
    """Anytime EXP3 on rewards within a deviation of the mean.

    The rate is large beside the theorem's, which holds for the worst sequence of rewards; then the probability of a poor strategy
    falls within hundreds of requests instead of thousands.
    """
    k, mean, spread, noise = _scale(lesson, "exp3")
    width = max((spread**2 + noise**2) ** 0.5, 1e-6)
    return Exp3(k, reward_low=mean - width, reward_high=mean + width, rate=6.0)


def _linear(lesson: Any, name: str, make: Callable[[int, int, int], Any]) -> Any:
    env = _env(lesson, lesson.requests)
    seed = _seed(lesson, name)
    return make(lesson.world.n_strategies, _obs_dim(env), seed).learn(env, lesson.requests, seed=seed)


def learn_linucb(lesson: Any) -> LinUcb:
    """Disjoint LinUCB, frozen after learning."""
    bandit: LinUcb = _linear(lesson, "linucb", lambda k, width, seed: LinUcb(k, width))
    return bandit


def learn_lints(lesson: Any) -> LinTs:
    """Disjoint linear Thompson sampling, frozen after learning."""
    bandit: LinTs = _linear(lesson, "lints", lambda k, width, seed: LinTs(k, width, seed=seed))
    return bandit


def _parts(world: Any) -> dict[str, Any]:
    """What the hybrid models see: a strategy's list and what it got from the user so far; the user, counts included."""
    from metarec_gym.envs.observation import feature_slices

    at = feature_slices(world)
    own = [name for name in at if name.startswith(("list_", "strategy_"))]
    shared = [name for name in at if name not in own or name == "strategy_count"]
    crossed = ("history_length", "popularity_affinity", "category_entropy", "request_fraction")
    return {
        "own": [at[name].start for name in own],
        "shared": [c for name in shared for c in range(at[name].start, at[name].stop)],
        "crossed": [at[name].start for name in crossed],
    }


def learn_hybrid_linucb(lesson: Any) -> HybridLinUcb:
    """Hybrid LinUCB, frozen after learning."""
    parts = _parts(lesson.world)
    bandit: HybridLinUcb = _linear(lesson, "hybrid_linucb", lambda k, width, seed: HybridLinUcb(k, width, **parts))
    return bandit


def learn_hybrid_lints(lesson: Any) -> HybridLinTs:
    """Hybrid linear Thompson sampling, frozen after learning."""
    parts = _parts(lesson.world)
    bandit: HybridLinTs = _linear(
        lesson, "hybrid_lints", lambda k, width, seed: HybridLinTs(k, width, seed=seed, **parts)
    )
    return bandit


def learn_neural_linear(lesson: Any) -> NeuralLinear:
    """Neural-linear Thompson sampling, learning on for each user."""
    bandit: NeuralLinear = _linear(
        lesson, "neural_linear", lambda k, width, seed: NeuralLinear(k, width, seed=seed, exploration=0.3)
    )
    return bandit


def learn_population_ucb(lesson: Any) -> PopulationUcb:
    """Population UCB."""
    bandit = PopulationUcb(lesson.world.n_strategies)
    return bandit.learn(_env(lesson, lesson.requests), lesson.requests, seed=_seed(lesson, "population_ucb"))


def learn_population_thompson(lesson: Any) -> PopulationThompson:
    """Population Thompson sampling, at 0.3 of the posterior deviation (1 explores for longer than episodes last)."""
    seed = _seed(lesson, "population_thompson")
    bandit = PopulationThompson(lesson.world.n_strategies, exploration=0.3, seed=seed)
    return bandit.learn(_env(lesson, lesson.requests), lesson.requests, seed=seed)


def learn_tuned_hierarchical(lesson: Any) -> HierarchicalUcb:
    """The hierarchical bandit with everything chosen on training users."""
    return learn_tuned(lesson)


BANDITS: dict[str, tuple[Callable[[Any], Any], int, str]] = {
    "epsilon_greedy": (learn_epsilon_greedy, 1, "each user's own means"),
    "softmax": (learn_softmax, 1, "each user's own means, Boltzmann"),
    "ucb1": (learn_ucb1, 1, "each user's own means, optimistic"),
    "thompson": (learn_thompson, 1, "each user's own posterior"),
    "beta_thompson": (learn_beta_thompson, 1, "each user's own posterior, Beta"),
    "exp3": (learn_exp3, 1, "each user's own weights, for adversarial rewards"),
    "linucb": (learn_linucb, 5, "one linear model per strategy"),
    "lints": (learn_lints, 5, "one linear model per strategy, Thompson"),
    "hybrid_linucb": (learn_hybrid_linucb, 5, "linear models that share coefficients"),
    "hybrid_lints": (learn_hybrid_lints, 5, "linear models that share coefficients, Thompson"),
    "neural_linear": (learn_neural_linear, 5, "a network with Bayesian heads, Thompson"),
    "population_ucb": (learn_population_ucb, 5, "the population's prior"),
    "population_thompson": (learn_population_thompson, 5, "the population's prior, Thompson"),
    "tuned_hierarchical": (learn_tuned_hierarchical, 5, "a predicted prior; all settings chosen on training users"),
}
"""Learning function, training seeds and note of every bandit."""
