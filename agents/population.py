"""Many small policy networks at once: their shape, a start from regression, and the batched rollout that scores them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.service import EnvRecipe, Service, keyed_draws
from metarec_gym.policy import MlpPolicy, sample_actions
from metarec_gym.seeding import fold_in, uniform

SHARPNESS = 20.0
"""Logits are the network's outputs times this: what is found is played almost surely, and ties stay soft."""


# ---- network


@dataclass(frozen=True, eq=False)
class Network:
    """Tanh networks of one shape, many at once; a network is a vector of `dim` numbers.

    Attributes:
        columns: int64 (F,), which entries of the observation it sees.
        mean: float32 (F,), subtracted from them.
        scale: float32 (F,), they are divided by it.
        widths: F, the hidden layers, K.
        strategies: Names of the K outputs.
    """

    columns: Tensor
    mean: Tensor
    scale: Tensor
    widths: tuple[int, ...]
    strategies: tuple[str, ...]

    @property
    def dim(self) -> int:
        """Numbers of a network."""
        return sum((a + 1) * b for a, b in zip(self.widths, self.widths[1:], strict=False))

    def layers(self, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights (C, out, in) and biases (C, out) of every layer; (C, dim) -> pairs."""
        found, at = [], 0
        for a, b in zip(self.widths, self.widths[1:], strict=False):
            weight = vectors[:, at : at + a * b].reshape(-1, b, a)
            found.append((weight, vectors[:, at + a * b : at + (a + 1) * b]))
            at += (a + 1) * b
        return found

    def logits(self, vectors: Tensor, obs: Tensor) -> Tensor:
        """Every candidate on its own rows; float32 (C, dim) and (C, U, obs_dim) -> (C, U, K)."""
        hidden = (obs[..., self.columns.to(obs.device)] - self.mean.to(obs.device)) / self.scale.to(obs.device)
        pairs = self.layers(vectors)
        for index, (weight, bias) in enumerate(pairs):
            hidden = torch.baddbmm(bias[:, None, :], hidden, weight.transpose(1, 2))
            hidden = torch.tanh(hidden) if index < len(pairs) - 1 else hidden
        return SHARPNESS * hidden

    def export(self, vector: Tensor, obs_dim: int, meta: dict[str, Any] | None = None) -> MlpPolicy:
        """One network as a policy; float32 (dim,)."""
        pairs = [(weight[0], bias[0]) for weight, bias in self.layers(vector[None].to(torch.float32))]
        first, bias = pairs[0]
        wide = torch.zeros(first.shape[0], obs_dim)
        wide[:, self.columns] = first
        pairs[0] = (wide, bias)
        last, bias = pairs[-1]
        pairs[-1] = (SHARPNESS * last, SHARPNESS * bias)
        mean, scale = torch.zeros(obs_dim), torch.ones(obs_dim)
        mean[self.columns], scale[self.columns] = self.mean, self.scale
        return MlpPolicy(pairs, self.strategies, obs_mean=mean, obs_scale=scale, meta=meta)


def make_network(recipe: EnvRecipe, service: Service, features: tuple[str, ...], hidden: tuple[int, ...]) -> Network:
    """A network over named blocks of the observation (none named: all of it), standardised by what was served.

    Raises:
        ValueError: When the observation has no such block.
    """
    env = recipe.make(1)
    features = features or tuple(env.feature_slices)
    unknown = sorted(set(features) - set(env.feature_slices))
    if unknown:
        raise ValueError(f"features names {unknown}; the observation has {list(env.feature_slices)}")
    columns = torch.cat([torch.arange(s.start, s.stop) for s in (env.feature_slices[name] for name in features)])
    rows = service.obs[service.alive][:, columns]
    scale = rows.std(dim=0)
    # what never varies in training says nothing: it is not blown up where it does
    scale = torch.where(scale > 1e-4, scale, 1.0)
    widths = (len(columns), *hidden, env.world.n_strategies)
    return Network(columns, rows.mean(dim=0), scale, widths, tuple(env.strategy_names))


def ridge_start(network: Network, service: Service, ridge: float = 10.0) -> Tensor:
    """A linear policy that follows the ridge regression of each strategy's reward; zeros for a network with hidden layers.

    Args:
        network: Its shape.
        service: Random service.
        ridge: Prior precision of the standardised weights; the constant is free.

    Returns:
        float64 (dim,), scaled so that its outputs have deviation 1 over the strategies.
    """
    start = torch.zeros(network.dim, dtype=torch.float64)
    if len(network.widths) > 2:
        return start
    alive = service.alive
    x = ((service.obs[alive][:, network.columns] - network.mean) / network.scale).to(torch.float64)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    action, reward = service.action[alive], service.reward[alive].to(torch.float64)
    penalty = torch.full((x.shape[1],), float(ridge), dtype=torch.float64)
    penalty[-1] = 1e-6
    weights = torch.zeros(network.widths[-1], x.shape[1], dtype=torch.float64)
    for k in range(network.widths[-1]):
        mine = x[action == k]
        if len(mine):
            weights[k] = torch.linalg.solve(mine.T @ mine + penalty.diag(), mine.T @ reward[action == k])
    weights = weights - weights.mean(dim=0)
    spread = (x @ weights.T).std(dim=1).mean().clamp(min=1e-9)
    weights = weights / spread
    return torch.cat([weights[:, :-1].flatten(), weights[:, -1]])


def searched_numbers(network: Network, columns: Tensor | None) -> Tensor:
    """Places of a linear network's vector that belong to some columns of the observation, and of all its constants.

    Args:
        network: Its shape.
        columns: int64, of the observation; None = everything, hidden layers too.

    Returns:
        int64, ascending.
    """
    if columns is None:
        return torch.arange(network.dim)
    k, width = network.widths[-1], network.widths[0]
    mine = torch.nonzero(torch.isin(network.columns, columns))[:, 0]
    weights = (torch.arange(k)[:, None] * width + mine).flatten()
    return torch.cat([weights, torch.arange(k * width, k * width + k)])


# ---- evaluation of a population


class PopulationEvaluator:
    """Scores whole populations; made again anywhere from its recipe and network (pickling drops the environments).

    Args:
        recipe: The environment.
        network: Shape of the candidates.
        batch_rows: Episodes side by side at most.
    """

    def __init__(self, recipe: EnvRecipe, network: Network, batch_rows: int = 2048) -> None:
        self.recipe, self.network, self.batch_rows = recipe, network, int(batch_rows)
        self.requests = 0
        """Requests that users saw so far."""
        self._envs: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the environments."""
        return {**self.__dict__, "_envs": {}}

    def _env(self, rows: int) -> Any:
        if rows not in self._envs:
            # two sizes at most: generations and the final
            if len(self._envs) > 3:
                self._envs.clear()
            self._envs[rows] = self.recipe.make(rows)
        return self._envs[rows]

    def returns(self, population: Tensor, seeds: list[int]) -> Tensor:
        """Reward a request of every candidate with every user, 0 after leaving.

        Args:
            population: float64 (C, dim).
            seeds: Of the U users; the same for every candidate, and so is their luck.

        Returns:
            float64 (C, U).
        """
        many = max(1, self.batch_rows // len(seeds))
        with torch.no_grad():
            return torch.cat([self._play(part, seeds) for part in population.split(many)])

    def evaluate(self, population: Tensor, seeds: list[int]) -> Tensor:
        """Mean over the users; float64 (C, dim) -> (C,)."""
        return self.returns(population, seeds).mean(dim=1)

    def _play(self, population: Tensor, seeds: list[int]) -> Tensor:
        candidates, users = len(population), len(seeds)
        env = self._env(candidates * users)
        vectors = population.to(env.device, torch.float32)
        obs, info = env.reset(seed=seeds * candidates)
        key = keyed_draws(seeds * candidates, env.device)
        alive = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
        total = torch.zeros(env.num_envs, dtype=torch.float64, device=env.device)
        served = torch.zeros((), dtype=torch.int64, device=env.device)
        for request in range(env.horizon):
            logits = self.network.logits(vectors, obs.view(candidates, users, -1)).view(env.num_envs, -1)
            mask = info["action_mask"].to(torch.bool)
            probs = torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=1)
            obs, reward, terminated, truncated, info = env.step(sample_actions(probs, uniform(fold_in(key, request))))
            total += torch.where(alive, reward, 0.0)
            served += alive.sum()
            alive = alive & ~(terminated | truncated)
        self.requests += int(served)
        value: Tensor = (total / env.horizon).view(candidates, users).cpu()
        return value
