"""Neural-linear Thompson sampling (Riquelme, Tucker and Snoek, 2018): a network's last layer as features of Bayesian regressions.

The network (observation -> hidden features -> reward of every strategy) is trained on training users served at random; a Bayesian
linear regression per strategy stands on its features. Its posterior given the training users is each new user's prior, widened
so that the user's own answers count, and goes on learning for every row.
"""

from __future__ import annotations

import itertools
from typing import Any, Self

import torch
from torch import Tensor

from agents.bandits.hierarchical import serve
from agents.bandits.linear import whitener
from agents.bandits.shared import Saved, best_of, draw_keys, win_shares, with_constant
from metarec_gym.policy import one_hot_probs
from metarec_gym.seeding import normal, torch_generator


class NeuralLinear(Saved):
    """Neural-linear Thompson sampling with a head that goes on learning for each user.

    Args:
        num_strategies: K.
        obs_dim: Width of the observation.
        hidden: Units of the two hidden layers; the last one gives the features.
        seed: Of the network's start, its batches, and the posterior draws.
        draws: Posterior draws that the probabilities are shares of.
        exploration: Scale of the draws; 1 is Thompson sampling, 0 acts on the mean.
        ridge: Prior precision of a head's weights, in units of the noise.
        prior_requests: How many requests of training users a new user's prior is worth; fewer let own answers count more.
        online: Heads go on learning inside the episode.
        epochs: Passes over the training users' answers.
    """

    LEARNED = (
        "in_weight",
        "in_bias",
        "mid_weight",
        "mid_bias",
        "head_precision",
        "head_mean",
        "noise_var",
        "obs_mean",
        "obs_std",
    )
    ROWS = ("_precision", "_moment", "_request")

    def __init__(
        self,
        num_strategies: int,
        obs_dim: int,
        *,
        hidden: int = 32,
        seed: int = 0,
        draws: int = 32,
        exploration: float = 1.0,
        ridge: float = 1.0,
        prior_requests: float = 300.0,
        online: bool = True,
        epochs: int = 6,
    ) -> None:
        self.num_strategies, self.obs_dim, self.hidden = int(num_strategies), int(obs_dim), int(hidden)
        self.seed, self.draws, self.exploration = int(seed), int(draws), float(exploration)
        self.ridge, self.prior_requests = float(ridge), float(prior_requests)
        self.online, self.epochs = bool(online), int(epochs)
        self.settings = {
            "num_strategies": self.num_strategies,
            "obs_dim": self.obs_dim,
            "hidden": self.hidden,
            "seed": self.seed,
            "draws": self.draws,
            "exploration": self.exploration,
            "ridge": self.ridge,
            "prior_requests": self.prior_requests,
            "online": self.online,
            "epochs": self.epochs,
        }
        generator = torch_generator(self.seed, "neural linear", "network")
        self.in_weight = torch.randn(hidden, obs_dim, generator=generator) / obs_dim**0.5
        self.in_bias, self.mid_bias = torch.zeros(hidden), torch.zeros(hidden)
        self.mid_weight = torch.randn(hidden, hidden, generator=generator) / hidden**0.5
        self.obs_mean, self.obs_std = torch.zeros(obs_dim), torch.ones(obs_dim)
        self.head_precision = torch.eye(hidden + 1).mul(self.ridge).repeat(num_strategies, 1, 1)
        self.head_mean = torch.zeros(num_strategies, hidden + 1)
        self.noise_var = torch.ones(())
        self.begin(0)

    def features(self, obs: Tensor) -> Tensor:
        """Last hidden layer and a constant; (num_rows, obs_dim) -> float32 (num_rows, hidden + 1)."""
        device = obs.device
        x = (obs - self.obs_mean.to(device)) / self.obs_std.to(device)
        x = torch.relu(torch.nn.functional.linear(x, self.in_weight.to(device), self.in_bias.to(device)))
        x = torch.tanh(torch.nn.functional.linear(x, self.mid_weight.to(device), self.mid_bias.to(device)))
        return with_constant(x)

    def learn(self, env: Any, requests: int, *, seed: int) -> Self:
        """Serves training users at random, trains the network on their answers, and fits the heads.

        Args:
            env: A same-step vector environment, numpy or torch.
            requests: How many; rounded up to whole steps of the environment.
            seed: Of the environment and the choices.
        """
        part = serve(env, requests, seed)
        return self.fit(part.obs.flatten(0, 1), part.action.flatten(), part.reward.flatten())

    def fit(self, obs: Tensor, action: Tensor, reward: Tensor) -> Self:
        """Trains the network by Adam on squared errors and fits the Bayesian heads in closed form.

        Args:
            obs: float32 (n, obs_dim).
            action: int64 (n,), the strategy that served.
            reward: float32 (n,).
        """
        self.obs_mean, self.obs_std = obs.mean(dim=0), obs.std(dim=0).clamp(min=1e-3)
        generator = torch_generator(self.seed, "neural linear", "batches")
        names = ("in_weight", "in_bias", "mid_weight", "mid_bias")
        body = [getattr(self, name).clone().requires_grad_() for name in names]
        for name, tensor in zip(names, body, strict=True):
            setattr(self, name, tensor)
        out = torch.zeros(self.num_strategies, self.hidden + 1, requires_grad=True)
        out.data[:, -1] = reward.mean()
        optimizer = torch.optim.Adam([*body, out], lr=2e-3)
        size = min(512, len(obs))
        for _ in range(self.epochs):
            order = torch.randperm(len(obs), generator=generator)
            for batch in order.split(size):
                predicted = (self.features(obs[batch]) * out[action[batch]]).sum(dim=1)
                loss = (predicted - reward[batch]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for name, tensor in zip(names, body, strict=True):
            setattr(self, name, tensor.detach())
        self._fit_heads(obs, action, reward)
        self.begin(0)
        return self

    def _fit_heads(self, obs: Tensor, action: Tensor, reward: Tensor) -> None:
        width = self.hidden + 1
        precision = torch.eye(width, dtype=torch.float64).mul(self.ridge).repeat(self.num_strategies, 1, 1)
        moment = torch.zeros(self.num_strategies, width, dtype=torch.float64)
        squares, count = 0.0, torch.zeros(self.num_strategies)
        for batch, k in itertools.product(torch.arange(len(obs)).split(65_536), range(self.num_strategies)):
            mine = batch[action[batch] == k]
            x, y = self.features(obs[mine]).to(torch.float64), reward[mine].to(torch.float64)
            precision[k] += x.T @ x
            moment[k] += x.T @ y
            squares, count[k] = squares + float(y.square().sum()), count[k] + len(mine)
        mean = torch.linalg.solve(precision, moment[..., None])[..., 0]
        # ||y||^2 - w' X'y is the residual sum of squares of a ridge regression, its penalty included
        self.noise_var = torch.tensor(max((squares - float((mean * moment).sum())) / max(len(obs), 1), 1e-9))
        # a user is not the population: the prior keeps its shape and mean, and counts as `prior_requests` of each strategy
        share = (self.prior_requests / count.clamp(min=1.0)).clamp(max=1.0)
        self.head_precision = (precision * share[:, None, None]).to(torch.float32)
        self.head_mean = mean.to(torch.float32)

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Every row is a new user: back to the prior."""
        prior = self.head_precision.to(device)
        moment = (prior @ self.head_mean.to(device)[..., None])[..., 0]
        self._precision = prior.repeat(num_rows, 1, 1, 1) if self.online else prior[None]
        self._moment = moment.repeat(num_rows, 1, 1) if self.online else moment[None]
        self._request = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def posterior(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each strategy's expected reward; float32 (num_rows, K) each."""
        x = self.features(obs)
        white = whitener(self._precision)
        mean = (white.transpose(2, 3) @ (white @ self._moment[..., None]))[..., 0]
        spread = (white @ x[:, None, :, None])[..., 0].norm(dim=2)
        return (mean * x[:, None]).sum(dim=2), spread * self.noise_var.to(x.device).sqrt()

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Share of the posterior draws in which a strategy is the best; heads are independent, so rewards are drawn directly."""
        mean, spread = self.posterior(obs)
        if self.exploration == 0.0:
            return best_of(mean, action_mask)
        standard = normal(draw_keys(self.seed, "neural", self._request, self.draws, self.num_strategies))
        return win_shares(mean[:, None] + self.exploration * spread[:, None] * standard, action_mask)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Adds the answers to the rows' heads; `obs` is what was seen before acting, however long ago."""
        self._request = self._request + alive.to(torch.int64)
        if not self.online:
            return
        x = self.features(obs)
        served = one_hot_probs(action, self.num_strategies) * alive.to(torch.float32)[:, None]
        self._precision = self._precision + served[:, :, None, None] * (x[:, :, None] * x[:, None, :])[:, None]
        self._moment = self._moment + served[:, :, None] * (x * reward.to(torch.float32)[:, None])[:, None]
