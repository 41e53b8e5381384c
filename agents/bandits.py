"""Bandits over strategies: classic ones that start from nothing with every user, and two that learn from training users.

| policy | learns from training users | learns inside the episode |
|---|---|---|
| `EpsilonGreedy`, `Ucb1`, `GaussianThompson`, `BetaThompson` | nothing | each user's own mean reward per strategy |
| `PopulationUcb` | the distribution of those means over users | its posterior for the user |
| `LinUcb` | one linear model per strategy, shared by all users | that model goes on, or is frozen |

All are batched: row i is a user, and nothing in a row depends on the other rows (`LinUcb` that learns online excepted). They
return probabilities; the caller samples. Thompson sampling returns how often a strategy wins among a fixed number of
posterior draws, which are keyed by (seed, request, draw, strategy) and shared by the rows: the same user gets the same
probabilities in any batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from metarec_gym.policy import masked_uniform, one_hot_probs, sample_actions
from metarec_gym.seeding import fold_in, normal, stream, torch_generator, uniform

if TYPE_CHECKING:
    from agents.roster import Lesson


def best_of(scores: Tensor, action_mask: Tensor) -> Tensor:
    """Equal probability for the available strategies of highest score; both (num_rows, K) -> float32 (num_rows, K)."""
    allowed = scores.masked_fill(~action_mask, -torch.inf)
    return masked_uniform((allowed == allowed.amax(dim=1, keepdim=True)) & action_mask)


class _PerUser:
    """Counts and reward sums of every row and strategy, forgotten when episodes begin."""

    def __init__(self, num_strategies: int, seed: int = 0) -> None:
        if num_strategies < 1:
            raise ValueError(f"num_strategies is {num_strategies}, expected at least 1")
        self.num_strategies, self.seed = int(num_strategies), int(seed)
        self.begin(0)

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Forgets every row."""
        self.count = torch.zeros(num_rows, self.num_strategies, device=device)
        self.total = torch.zeros_like(self.count)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Adds the requests that were served."""
        served = one_hot_probs(action, self.num_strategies) * alive.to(torch.float32)[:, None]
        self.count = self.count + served
        self.total = self.total + served * reward.to(torch.float32)[:, None]

    def _mean(self) -> Tensor:
        return self.total / self.count.clamp(min=1.0)


class EpsilonGreedy(_PerUser):
    """The best mean so far, or with probability epsilon any strategy; untried ones come first.

    Args:
        num_strategies: K.
        epsilon: Share of the requests spent on a uniform choice.
    """

    def __init__(self, num_strategies: int, epsilon: float = 0.1) -> None:
        super().__init__(num_strategies)
        self.epsilon = float(epsilon)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """(1 - epsilon) for the best, epsilon spread over all that are available."""
        scores = torch.where(self.count == 0, torch.inf, self._mean())
        return (1 - self.epsilon) * best_of(scores, action_mask) + self.epsilon * masked_uniform(action_mask)


class Ucb1(_PerUser):
    """Optimism in the face of uncertainty (Auer, Cesa-Bianchi and Fischer, 2002).

    Args:
        num_strategies: K.
        reward_range: Largest minus smallest reward of one request; the bound is scaled by it.
        exploration: Factor of the confidence bound; sqrt(2) is the paper's.
    """

    def __init__(self, num_strategies: int, reward_range: float = 1.0, exploration: float = math.sqrt(2.0)) -> None:
        super().__init__(num_strategies)
        self.reward_range, self.exploration = float(reward_range), float(exploration)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The highest upper confidence bound; untried strategies come first."""
        # mean + c * range * sqrt(ln t / n)
        log_t = self.count.sum(dim=1, keepdim=True).clamp(min=1.0).log()
        bound = self._mean() + self.exploration * self.reward_range * (log_t / self.count.clamp(min=1.0)).sqrt()
        return best_of(torch.where(self.count == 0, torch.inf, bound), action_mask)


class _Thompson(_PerUser):
    """Posterior draws shared by the rows; see the module's docstring."""

    def __init__(self, num_strategies: int, seed: int, draws: int) -> None:
        super().__init__(num_strategies, seed)
        self.draws = int(draws)

    def _keys(self, purpose: str) -> Tensor:
        """int64 (num_rows, draws, K); rows at the same request share theirs."""
        device = self.count.device
        request = self.count.sum(dim=1).to(torch.int64)[:, None, None]
        draw = torch.arange(self.draws, device=device)[None, :, None]
        strategy = torch.arange(self.num_strategies, device=device)
        root = torch.tensor(stream(self.seed, "thompson", purpose), device=device)
        return fold_in(fold_in(fold_in(root, request), draw), strategy)

    def _win_probs(self, samples: Tensor, action_mask: Tensor) -> Tensor:
        allowed = samples.masked_fill(~action_mask[:, None, :], -torch.inf)
        return one_hot_probs(allowed.argmax(dim=2), self.num_strategies).mean(dim=1)


class GaussianThompson(_Thompson):
    """Thompson sampling with independent normal beliefs about each strategy's mean reward.

    Args:
        num_strategies: K.
        seed: Of the posterior draws.
        prior_mean: Expected reward of a request before the first one.
        prior_std: Its uncertainty.
        noise_std: Deviation of one request's reward around the user's mean.
        draws: Posterior draws that the probabilities are shares of.
    """

    def __init__(
        self,
        num_strategies: int,
        seed: int,
        *,
        prior_mean: float = 0.0,
        prior_std: float = 1.0,
        noise_std: float = 1.0,
        draws: int = 64,
    ) -> None:
        super().__init__(num_strategies, seed, draws)
        self.prior_mean, self.prior_std, self.noise_std = float(prior_mean), float(prior_std), float(noise_std)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """How often each strategy is the best in a posterior draw."""
        precision = self.prior_std**-2 + self.count * self.noise_std**-2
        mean = (self.prior_mean * self.prior_std**-2 + self.total * self.noise_std**-2) / precision
        samples = mean[:, None] + precision.rsqrt()[:, None] * normal(self._keys("gaussian"))
        return self._win_probs(samples, action_mask)


class BetaThompson(_Thompson):
    """Thompson sampling with Beta(1, 1) beliefs; a reward counts as the fraction `reward / reward_range` of a success.

    Args:
        num_strategies: K.
        seed: Of the posterior draws.
        reward_range: Reward of a perfect request; what lies outside [0, reward_range] is clipped.
        draws: Posterior draws that the probabilities are shares of.
    """

    def __init__(self, num_strategies: int, seed: int, *, reward_range: float = 1.0, draws: int = 16) -> None:
        super().__init__(num_strategies, seed, draws)
        self.reward_range = float(reward_range)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Adds the clipped fraction of a success."""
        super().observe(obs, action, (reward / self.reward_range).clamp(0.0, 1.0), alive)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """How often each strategy is the best in a posterior draw."""
        # Beta(a, b) = Ga / (Ga + Gb) of two gamma draws
        win = gamma_draws(self._keys("beta successes"), 1.0 + self.total[:, None])
        loss = gamma_draws(self._keys("beta failures"), 1.0 + (self.count - self.total)[:, None])
        return self._win_probs(win / (win + loss), action_mask)


def gamma_draws(key: Tensor, shape: Tensor) -> Tensor:
    """Gamma(shape, 1) draws for shape >= 1 from int64 keys; the two broadcast together.

    Marsaglia and Tsang's squeeze with four tries, each a function of the key; all four are refused with a probability below
    1e-5, and then the last one stands.
    """
    d = shape - 1.0 / 3.0
    c = (9.0 * d).rsqrt()
    result, accepted = torch.ones(()), torch.zeros((), dtype=torch.bool)
    for attempt in range(4):
        x = normal(fold_in(key, 2 * attempt))
        u = uniform(fold_in(key, 2 * attempt + 1))
        v = (1.0 + c * x) ** 3
        positive = v.clamp(min=1e-12)
        good = (v > 0) & (u.clamp(min=1e-12).log() < 0.5 * x * x + d * (1.0 - v + positive.log()))
        result = torch.where(accepted, result, d * positive)
        accepted = accepted | good
    return result


# ---- learned from training users


def _play(env: Any, requests: int, seed: int, choose: Any, learn: Any) -> None:
    """Plays at least `requests` requests with `choose(obs, mask) -> probs`; `learn(obs, action, reward, done)` gets each."""
    if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
        raise ValueError("learning a bandit needs an environment with autoreset_mode='SameStep'; make it with that")
    generator = torch_generator(seed, "bandit", "action")
    obs, infos = env.reset(seed=stream(seed, "bandit", "env"))
    num_strategies = int(env.single_action_space.n)
    for _ in range(math.ceil(requests / env.num_envs)):
        rows = torch.as_tensor(obs, dtype=torch.float32)
        mask = torch.ones(len(rows), num_strategies, dtype=torch.bool, device=rows.device)
        if "action_mask" in infos:
            mask = torch.as_tensor(infos["action_mask"], device=rows.device).to(torch.bool)
        # drawn on the CPU whatever the environment's device, so that both see the same draws
        draw = torch.rand(len(rows), generator=generator).to(rows.device)
        action = sample_actions(choose(rows, mask), draw)
        obs, reward, terminated, truncated, infos = env.step(action if isinstance(obs, Tensor) else action.numpy())
        done = torch.as_tensor(terminated, device=rows.device) | torch.as_tensor(truncated, device=rows.device)
        learn(rows, action, torch.as_tensor(reward, dtype=torch.float32, device=rows.device), done)


class LinUcb:
    """Disjoint LinUCB (Li et al., 2010): each strategy's reward is linear in the observation.

    The models are shared by all users: `learn` fits them on training users. `begin` goes back to what `learn` left, so what
    was seen in one evaluation never enters the next.

    Args:
        num_strategies: K.
        obs_dim: Width of the observation; a constant is added.
        alpha: Width of the confidence bound, in standard deviations of the noise.
        ridge: Prior precision of the weights.
        online: The models go on learning after `learn`; False freezes them, and then the mean decides without a bound.
    """

    def __init__(
        self, num_strategies: int, obs_dim: int, *, alpha: float = 0.5, ridge: float = 1.0, online: bool = False
    ) -> None:
        self.alpha, self.ridge, self.online, self.frozen = float(alpha), float(ridge), bool(online), False
        width = obs_dim + 1
        # float64: the matrices sum over a million requests
        self.gram = torch.eye(width, dtype=torch.float64).mul(self.ridge).repeat(num_strategies, 1, 1)
        self.moment = torch.zeros(num_strategies, width, dtype=torch.float64)
        self._solve()
        self._learned = (self.gram.clone(), self.moment.clone())

    def learn(self, env: Any, requests: int, *, seed: int) -> Self:
        """Plays `requests` requests of training users, choosing by its own bound and updating after each.

        Args:
            env: A same-step vector environment, numpy or torch.
            requests: How many; rounded up to whole steps of the environment.
            seed: Of the environment and of ties.
        """
        self.frozen = False
        _play(
            env,
            requests,
            seed,
            self.action_probs,
            lambda obs, action, reward, done: self.observe(obs, action, reward, torch.ones_like(done)),
        )
        self._learned = (self.gram.clone(), self.moment.clone())
        self.frozen = not self.online
        return self

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Back to what `learn` left."""
        self.gram, self.moment = (tensor.to(device).clone() for tensor in self._learned)
        self._solve()

    def _solve(self) -> None:
        self._factor = torch.linalg.cholesky(self.gram)
        self._weights = torch.cholesky_solve(self.moment[..., None], self._factor)[..., 0].to(torch.float32)
        # ||L^-1 x||^2 = x' A^-1 x
        eye = torch.eye(self.gram.shape[1], dtype=torch.float64, device=self.gram.device).expand_as(self.gram)
        self._whitener = torch.linalg.solve_triangular(self._factor, eye, upper=False).to(torch.float32)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The highest mean plus bound; the highest mean if frozen."""
        x = _with_constant(obs)
        scores = x @ self._weights.T
        if not self.frozen:
            spread = torch.einsum("kij,nj->nki", self._whitener, x).norm(dim=2)
            scores = scores + self.alpha * spread
        return best_of(scores, action_mask)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Adds the requests that were served, unless frozen."""
        if self.frozen:
            return
        x = _with_constant(obs).to(torch.float64)
        for k in range(len(self.gram)):
            rows = x * ((action == k) & alive).to(torch.float64)[:, None]
            self.gram[k] += rows.T @ rows
            self.moment[k] += rows.T @ reward.to(torch.float64)
        self._solve()


def _with_constant(obs: Tensor) -> Tensor:
    return torch.cat([obs, torch.ones_like(obs[:, :1])], dim=1)


class PopulationUcb:
    """A normal belief about the user's mean reward under every strategy, whose prior is how training users differ.

    The prior (means, covariance of the strategies over users, noise of one request, trend over the requests of an episode)
    comes from random service of training users. Strategies that suit the same users are correlated in it, so one answer tells
    about several; this is the strongest baseline without a network.

    Args:
        num_strategies: K.
        exploration: Posterior standard deviations added to the posterior mean; 0 acts on the mean.
    """

    def __init__(self, num_strategies: int, *, exploration: float = 0.5) -> None:
        self.num_strategies, self.exploration = int(num_strategies), float(exploration)
        self.prior_mean = torch.zeros(num_strategies, dtype=torch.float64)
        self.prior_cov = torch.eye(num_strategies, dtype=torch.float64)
        self.noise_var = 1.0
        self.trend = torch.zeros(1, dtype=torch.float64)
        """Mean reward at each request of an episode, less the overall mean; the last one holds for later requests."""
        self.begin(0)

    def learn(self, env: Any, requests: int, *, seed: int) -> Self:
        """Serves training users at random for `requests` requests and estimates the prior from their rewards.

        Args:
            env: A same-step vector environment, numpy or torch.
            requests: How many; rounded up to whole steps of the environment.
            seed: Of the environment and the choices.
        """
        actions: list[Tensor] = []
        rewards: list[Tensor] = []
        dones: list[Tensor] = []

        def keep(obs: Tensor, action: Tensor, reward: Tensor, done: Tensor) -> None:
            actions.append(action.cpu())
            rewards.append(reward.cpu())
            dones.append(done.cpu())

        _play(env, requests, seed, lambda obs, mask: masked_uniform(mask), keep)
        return self.fit(torch.stack(actions), torch.stack(rewards), torch.stack(dones))

    def fit(self, action: Tensor, reward: Tensor, done: Tensor) -> Self:
        """Estimates the prior by moments from randomly served episodes.

        Args:
            action: int64 (requests, num_rows).
            reward: float32 (requests, num_rows).
            done: bool (requests, num_rows), True on an episode's last request; the next row entry is another user.
        """
        k, num_rows = self.num_strategies, action.shape[1]
        ended = done.to(torch.int64).cumsum(dim=0) - done.to(torch.int64)
        episode = (ended * num_rows + torch.arange(num_rows)).flatten()
        request, clock = torch.zeros_like(action), torch.zeros(num_rows, dtype=torch.int64)
        for t in range(len(action)):
            request[t] = clock
            clock = torch.where(done[t], 0, clock + 1)
        arm, value, when = action.flatten(), reward.flatten().to(torch.float64), request.flatten()

        def mean_by(index: Tensor, size: int, of: Tensor) -> Tensor:
            number = torch.zeros(size, dtype=torch.float64).index_add_(0, index, torch.ones_like(of))
            return torch.zeros(size, dtype=torch.float64).index_add_(0, index, of) / number.clamp(min=1.0)

        self.trend = mean_by(when, int(when.max()) + 1, value) - value.mean()
        value = value - self.trend[when]
        self.prior_mean = mean_by(arm, k, value)
        rest = value - self.prior_mean[arm]
        cell = episode * k + arm
        size = int(episode.max()) + 1
        number = torch.zeros(size * k, dtype=torch.float64).index_add_(0, cell, torch.ones_like(rest)).reshape(size, k)
        total = torch.zeros(size * k, dtype=torch.float64).index_add_(0, cell, rest).reshape(size, k)
        squares = torch.zeros(size * k, dtype=torch.float64).index_add_(0, cell, rest * rest).reshape(size, k)
        # products of two *different* requests of one user: their noise is independent, so the mean is the covariance
        products, pairs = total.T @ total, number.T @ number
        products -= torch.diag(squares.sum(dim=0))
        pairs -= torch.diag(number.sum(dim=0))
        covariance = products / pairs.clamp(min=1.0)
        values, vectors = torch.linalg.eigh(covariance)
        # moments of few users may give directions of negative variance; a small floor keeps the belief proper
        floor = max(1e-4 * float(rest.var()), 1e-12)
        self.prior_cov = vectors @ torch.diag(values.clamp(min=floor)) @ vectors.T
        spread = mean_by(arm, k, rest * rest)
        self.noise_var = max(float((spread - self.prior_cov.diagonal()).mean()), floor)
        return self

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Every row is a new user: back to the prior."""
        self._mean = self.prior_mean.to(device).repeat(num_rows, 1)
        self._cov = self.prior_cov.to(device).repeat(num_rows, 1, 1)
        self._request = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The highest posterior mean plus bound."""
        spread = self._cov.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
        return best_of(self._mean + self.exploration * spread, action_mask)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Updates the belief about every row that was served."""
        trend = self.trend.to(action.device)
        surprise = reward.to(torch.float64) - trend[self._request.clamp(max=len(trend) - 1)]
        column = self._cov.gather(2, action[:, None, None].expand(-1, self.num_strategies, 1))[..., 0]
        variance = column.gather(1, action[:, None])[:, 0] + self.noise_var
        # gain = Cov(theta, theta_a) / (Var(theta_a) + noise)
        gain = torch.where(alive[:, None], column / variance[:, None], 0.0)
        surprise = surprise - self._mean.gather(1, action[:, None])[:, 0]
        self._mean = self._mean + gain * surprise[:, None]
        self._cov = self._cov - gain[:, :, None] * column[:, None, :]
        self._request = self._request + alive.to(torch.int64)


# ---- on the leaderboard, see `agents.roster`

LESSON_ENVS = 2048
"""Users served at once while a bandit learns; LinUCB solves its models once for all of them."""
PRIOR_REQUESTS = 50_000
"""Requests to training users that tell the per-user bandits how large and how noisy rewards are: set by hand, the scale of
their beliefs would favour or cripple them."""


def _draw_seed(name: str, lesson: Lesson) -> int:
    return stream(lesson.seed, "bandit", name, lesson.fold)


def _prior(name: str, lesson: Lesson) -> PopulationUcb:
    prior = PopulationUcb(lesson.world.n_strategies)
    env = lesson.make_env(LESSON_ENVS)
    return prior.learn(env, min(lesson.requests, PRIOR_REQUESTS), seed=_draw_seed(name, lesson))


def learn_epsilon_greedy(lesson: Lesson) -> EpsilonGreedy:
    """It learns nothing before a user comes."""
    return EpsilonGreedy(lesson.world.n_strategies)


def learn_ucb1(lesson: Lesson) -> Ucb1:
    """The width of its bound comes from training users."""
    # sub-Gaussian form of the bound: sigma * sqrt(2 ln t / n)
    return Ucb1(lesson.world.n_strategies, reward_range=_prior("ucb1", lesson).noise_var ** 0.5)


def learn_thompson(lesson: Lesson) -> GaussianThompson:
    """The scale of its beliefs comes from training users."""
    prior = _prior("thompson", lesson)
    return GaussianThompson(
        lesson.world.n_strategies,
        _draw_seed("thompson", lesson),
        prior_mean=float(prior.prior_mean.mean()),
        # users differ, and so do strategies: without the second part a pool of one taste would never be explored
        prior_std=float(prior.prior_cov.diagonal().mean() + prior.prior_mean.var(correction=0)) ** 0.5,
        noise_std=prior.noise_var**0.5,
    )


def learn_linucb(lesson: Lesson) -> LinUcb:
    """One linear model a strategy, from all requests of the lesson."""
    env = lesson.make_env(LESSON_ENVS)
    width = math.prod(env.single_observation_space.shape or ())
    policy = LinUcb(lesson.world.n_strategies, width)
    return policy.learn(env, lesson.requests, seed=_draw_seed("linucb", lesson))


def learn_population_ucb(lesson: Lesson) -> PopulationUcb:
    """The prior over users, from all requests of the lesson."""
    policy = PopulationUcb(lesson.world.n_strategies)
    return policy.learn(lesson.make_env(LESSON_ENVS), lesson.requests, seed=_draw_seed("population_ucb", lesson))
