"""A normal belief about each user's mean reward per strategy, whose prior is how training users differ.

The prior comes from random service of training users. Strategies that suit the same users are correlated in it, so one answer
tells about several.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from agents.bandits.shared import Saved, best_of, draw_keys, play, win_shares
from metarec_gym.policy import masked_uniform
from metarec_gym.seeding import normal


def episodes_of(done: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the episode and of the request within it, from 0; bool (requests, num_rows) -> int64 of that shape, twice."""
    num_rows = done.shape[1]
    ended = done.to(torch.int64).cumsum(dim=0) - done.to(torch.int64)
    request, clock = torch.zeros_like(ended), torch.zeros(num_rows, dtype=torch.int64)
    for t in range(len(done)):
        request[t] = clock
        clock = torch.where(done[t], 0, clock + 1)
    return ended * num_rows + torch.arange(num_rows), request


def mean_by(index: Tensor, size: int, of: Tensor) -> Tensor:
    """Mean of float64 `of` (n,) for each value of int64 `index` (n,); 0 where there is none; (size,)."""
    number = torch.zeros(size, dtype=torch.float64).index_add_(0, index, torch.ones_like(of))
    return torch.zeros(size, dtype=torch.float64).index_add_(0, index, of) / number.clamp(min=1.0)


def effects_of(rest: Tensor, arm: Tensor, episode: Tensor, k: int) -> tuple[Tensor, float]:
    """Covariance over episodes of what strategies are worth beyond the mean, and the noise of one request, by moments.

    Args:
        rest: float64 (n,), reward less its expectation.
        arm: int64 (n,), the strategy that served.
        episode: int64 (n,).
        k: Number of strategies.

    Returns:
        float64 (k, k) positive definite, and the variance of the noise.
    """
    cell, size = episode * k + arm, int(episode.max()) + 1

    def by_cell(of: Tensor) -> Tensor:
        return torch.zeros(size * k, dtype=torch.float64).index_add_(0, cell, of).reshape(size, k)

    number, total, squares = by_cell(torch.ones_like(rest)), by_cell(rest), by_cell(rest * rest)
    # products of two *different* requests of one user: their noise is independent, so the mean is the covariance
    products, pairs = total.T @ total, number.T @ number
    products -= torch.diag(squares.sum(dim=0))
    pairs -= torch.diag(number.sum(dim=0))
    values, vectors = torch.linalg.eigh(products / pairs.clamp(min=1.0))
    # moments of few users may give directions of negative variance; a small floor keeps the belief proper
    floor = max(1e-4 * float(rest.var()), 1e-12)
    covariance = vectors @ torch.diag(values.clamp(min=floor)) @ vectors.T
    spread = mean_by(arm, k, rest * rest)
    return covariance, max(float((spread - covariance.diagonal()).mean()), floor)


def kalman(
    mean: Tensor, cov: Tensor, action: Tensor, value: Tensor, noise_var: float, alive: Tensor
) -> tuple[Tensor, Tensor]:
    """The belief about every row after one answer.

    Args:
        mean: float64 (num_rows, K).
        cov: float64 (num_rows, K, K).
        action: int64 (num_rows,), the strategy that answered.
        value: float64 (num_rows,), what it is observed to be worth.
        noise_var: Variance of that observation.
        alive: bool (num_rows,), rows that are updated.

    Returns:
        Mean and covariance.
    """
    column = cov.gather(2, action[:, None, None].expand(-1, mean.shape[1], 1))[..., 0]
    variance = column.gather(1, action[:, None])[:, 0] + noise_var
    # gain = Cov(theta, theta_a) / (Var(theta_a) + noise)
    gain = torch.where(alive[:, None], column / variance[:, None], 0.0)
    surprise = value - mean.gather(1, action[:, None])[:, 0]
    return mean + gain * surprise[:, None], cov - gain[:, :, None] * column[:, None, :]


def drift(
    mean: Tensor, cov: Tensor, prior_mean: Tensor, prior_cov: Tensor, memory: float, alive: Tensor
) -> tuple[Tensor, Tensor]:
    """One request later: deviations from the prior keep the share `memory`, the rest is drawn anew (first-order autoregression).

    The population's spread stays what it is: Cov <- memory^2 Cov + (1 - memory^2) prior.
    """
    if memory == 1.0:
        return mean, cov
    on = alive[:, None]
    later = prior_mean + memory * (mean - prior_mean)
    wider = memory**2 * cov + (1.0 - memory**2) * prior_cov
    return torch.where(on, later, mean), torch.where(on[:, :, None], wider, cov)


def posterior_draws(seed: int, request: Tensor, draws: int, mean: Tensor, cov: Tensor, scale: float) -> Tensor:
    """Draws of N(mean, scale^2 cov), keyed by (seed, request, draw, strategy); (num_rows, draws, K)."""
    jitter = 1e-9 * torch.eye(mean.shape[1], dtype=cov.dtype, device=cov.device)
    factor = torch.linalg.cholesky(cov + jitter)
    standard = normal(draw_keys(seed, "population", request, draws, mean.shape[1])).to(cov.dtype)
    samples: Tensor = mean[:, None] + scale * standard @ factor.transpose(1, 2)
    return samples


class PopulationUcb(Saved):
    """Upper confidence bounds of a normal belief about the user's mean reward under every strategy.

    The prior (means, covariance of the strategies over users, noise of one request, trend over the requests of an episode)
    comes from random service of training users. Feedback may come late, in the order of the requests.

    Args:
        num_strategies: K.
        exploration: Posterior standard deviations added to the posterior mean; 0 acts on the mean.
        memory: Share of a user's deviation from the population that is left one request later; 1 = users do not change.
        seed: Of the posterior draws (Thompson).
        draws: Posterior draws that the probabilities are shares of (Thompson).
    """

    LEARNED = ("prior_mean", "prior_cov", "noise_var", "trend")
    ROWS = ("_mean", "_cov", "_request")
    thompson = False
    """Posterior draws decide instead of a bound."""

    def __init__(
        self, num_strategies: int, *, exploration: float = 0.5, memory: float = 1.0, seed: int = 0, draws: int = 64
    ) -> None:
        if not 0.0 < memory <= 1.0:
            raise ValueError(f"memory is {memory}, expected a number in (0, 1]; 1 forgets nothing")
        self.num_strategies, self.exploration = int(num_strategies), float(exploration)
        self.memory, self.seed, self.draws = float(memory), int(seed), int(draws)
        self.settings = {
            "num_strategies": self.num_strategies,
            "exploration": self.exploration,
            "memory": self.memory,
            "seed": self.seed,
            "draws": self.draws,
        }
        self.prior_mean = torch.zeros(num_strategies, dtype=torch.float64)
        self.prior_cov = torch.eye(num_strategies, dtype=torch.float64)
        self.noise_var = 1.0
        self.trend = torch.zeros(1, dtype=torch.float64)
        """Mean reward at each request of an episode, less the overall mean; the last one holds for later requests."""
        self.begin(0)

    def _loaded(self) -> None:
        self.noise_var = float(self.noise_var)

    def learn(self, env: Any, requests: int, *, seed: int) -> Self:
        """Serves training users at random for `requests` requests and estimates the prior from their rewards.

        Args:
            env: A same-step vector environment, numpy or torch.
            requests: How many; rounded up to whole steps of the environment.
            seed: Of the environment and the choices.
        """
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        play(
            env,
            requests,
            seed,
            lambda obs, mask: masked_uniform(mask),
            lambda obs, action, reward, done: kept.append((action.cpu(), reward.cpu(), done.cpu())),
        )
        action, reward, done = (torch.stack(part) for part in zip(*kept, strict=True))
        return self.fit(action, reward, done)

    def fit(self, action: Tensor, reward: Tensor, done: Tensor) -> Self:
        """Estimates the prior by moments from randomly served episodes.

        Args:
            action: int64 (requests, num_rows).
            reward: float32 (requests, num_rows).
            done: bool (requests, num_rows), True on an episode's last request; the next row entry is another user.
        """
        k = self.num_strategies
        episode, request = episodes_of(done)
        arm, value, when = action.flatten(), reward.flatten().to(torch.float64), request.flatten()
        self.trend = mean_by(when, int(when.max()) + 1, value) - value.mean()
        value = value - self.trend[when]
        self.prior_mean = mean_by(arm, k, value)
        self.prior_cov, self.noise_var = effects_of(value - self.prior_mean[arm], arm, episode.flatten(), k)
        return self

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Every row is a new user: back to the prior."""
        self._mean = self.prior_mean.to(device).repeat(num_rows, 1)
        self._cov = self.prior_cov.to(device).repeat(num_rows, 1, 1)
        self._request = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The highest posterior mean plus bound, or the share of wins among posterior draws."""
        if self.thompson:
            samples = posterior_draws(self.seed, self._request, self.draws, self._mean, self._cov, self.exploration)
            return win_shares(samples, action_mask)
        spread = self._cov.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
        return best_of(self._mean + self.exploration * spread, action_mask)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Updates the belief about every row that was served."""
        trend = self.trend.to(action.device)
        value = reward.to(torch.float64) - trend[self._request.clamp(max=len(trend) - 1)]
        mean, cov = kalman(self._mean, self._cov, action, value, self.noise_var, alive)
        prior_mean, prior_cov = self.prior_mean.to(mean.device), self.prior_cov.to(mean.device)
        self._mean, self._cov = drift(mean, cov, prior_mean, prior_cov, self.memory, alive)
        self._request = self._request + alive.to(torch.int64)


class PopulationThompson(PopulationUcb):
    """Thompson sampling with the population's prior: draws of all strategies together, correlated as they are over users.

    Args:
        num_strategies: K.
        exploration: Scale of the posterior deviation; 1 is Thompson sampling, less is greedier.
        memory: As in `PopulationUcb`.
        seed: Of the posterior draws.
        draws: Posterior draws that the probabilities are shares of.
    """

    thompson = True

    def __init__(
        self, num_strategies: int, *, exploration: float = 1.0, memory: float = 1.0, seed: int = 0, draws: int = 64
    ) -> None:
        super().__init__(num_strategies, exploration=exploration, memory=memory, seed=seed, draws=draws)
