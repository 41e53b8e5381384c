"""A policy turns observations into strategy probabilities; this is all that evaluation and deployment know of an agent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

POLICY_SCHEMA = 1


class Policy(Protocol):
    """What every policy offers. Rows are users in the middle of an episode; K is the number of strategies."""

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """New episodes start in all `num_rows` rows: forget what was learned inside earlier episodes."""

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Strategy probabilities.

        Args:
            obs: float32 (num_rows, obs_dim).
            action_mask: bool (num_rows, K), True where the strategy may serve.

        Returns:
            float32 (num_rows, K), rows sum to 1, zero where the mask is False.
        """

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Feedback of the request just served, for policies that learn inside an episode.

        Args:
            obs: float32 (num_rows, obs_dim), what the policy saw before acting.
            action: int64 (num_rows,), the strategy that served.
            reward: float32 (num_rows,), the sampled reward.
            alive: bool (num_rows,), False where the episode had already ended (nothing was served).
        """


class StatelessPolicy:
    """Base of the policies that keep nothing between requests."""

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Nothing to forget."""

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Nothing to learn."""


def masked_uniform(action_mask: Tensor) -> Tensor:
    """Equal probability for every available strategy; bool (num_rows, K) -> float32 (num_rows, K)."""
    allowed = action_mask.to(torch.float32)
    return allowed / allowed.sum(dim=1, keepdim=True)


def one_hot_probs(action: Tensor, num_strategies: int) -> Tensor:
    """Probability 1 for one strategy a row; int64 (num_rows,) -> float32 (num_rows, K)."""
    return torch.nn.functional.one_hot(action, num_strategies).to(torch.float32)


def sample_actions(probs: Tensor, draw: Tensor) -> Tensor:
    """Inverse-CDF sampling: probs (num_rows, K) and uniforms in [0, 1) (num_rows,) -> int64 (num_rows,)."""
    cumulative = probs.cumsum(dim=1)
    # scaling by the total keeps a sum of 1 - 1e-7 from selecting past the last strategy; searchsorted skips zero-probability ones
    threshold = draw[:, None] * cumulative[:, -1:]
    action = torch.searchsorted(cumulative.contiguous(), threshold, right=True)[:, 0]
    last_possible = probs.shape[1] - 1 - (probs.flip(1) > 0).to(torch.uint8).argmax(dim=1)
    return torch.minimum(action, last_possible)


class UniformPolicy(StatelessPolicy):
    """Every available strategy with equal probability."""

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Equal probabilities over the mask."""
        return masked_uniform(action_mask)


class FixedPolicy(StatelessPolicy):
    """Always the same strategy; where it is unavailable, a uniform choice among the others.

    Args:
        strategy: Index of the strategy in the pool.
    """

    def __init__(self, strategy: int) -> None:
        self.strategy = int(strategy)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Probability 1 for the strategy wherever it is available."""
        fixed = torch.zeros_like(action_mask, dtype=torch.float32)
        fixed[:, self.strategy] = 1.0
        return torch.where(action_mask[:, self.strategy, None], fixed, masked_uniform(action_mask))


class FirstChoice(StatelessPolicy):
    """Always the most probable strategy of a policy that keeps nothing between requests."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Probability 1 for the most probable strategy."""
        probs = self.policy.action_probs(obs, action_mask)
        return one_hot_probs(probs.argmax(dim=1), probs.shape[1])


class MlpPolicy(StatelessPolicy):
    """An exported tanh network: the actor of a trained agent without its training code.

    Args:
        layers: Pairs of weight (out, in) and bias (out,), float32; tanh between layers, logits at the end.
        strategies: Strategy names in the order of the logits.
        obs_mean: Subtracted from the observation, (obs_dim,); zeros if None.
        obs_scale: The observation is divided by it, (obs_dim,); ones if None.
        meta: JSON-able facts that travel with the policy (world hash, seed, versions ...).
    """

    def __init__(
        self,
        layers: list[tuple[Tensor, Tensor]],
        strategies: tuple[str, ...],
        *,
        obs_mean: Tensor | None = None,
        obs_scale: Tensor | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        if not layers or layers[-1][0].shape[0] != len(strategies):
            raise ValueError(f"the last layer must give one logit for each of the {len(strategies)} strategies")
        self.layers = [(w.detach().to(torch.float32), b.detach().to(torch.float32)) for w, b in layers]
        self.strategies = tuple(strategies)
        obs_dim = self.layers[0][0].shape[1]
        self.obs_mean = torch.zeros(obs_dim) if obs_mean is None else obs_mean.detach().to(torch.float32)
        self.obs_scale = torch.ones(obs_dim) if obs_scale is None else obs_scale.detach().to(torch.float32)
        self.meta = dict(meta or {})

    def to(self, device: torch.device | str) -> MlpPolicy:
        """Moves the weights to `device`; returns self."""
        self.layers = [(w.to(device), b.to(device)) for w, b in self.layers]
        self.obs_mean, self.obs_scale = self.obs_mean.to(device), self.obs_scale.to(device)
        return self

    def logits(self, obs: Tensor) -> Tensor:
        """Unmasked logits; float32 (num_rows, obs_dim) -> (num_rows, K)."""
        hidden = (obs - self.obs_mean) / self.obs_scale
        for index, (weight, bias) in enumerate(self.layers):
            hidden = torch.nn.functional.linear(hidden, weight, bias)
            if index < len(self.layers) - 1:
                hidden = torch.tanh(hidden)
        return hidden

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Softmax over the available strategies."""
        return torch.softmax(self.logits(obs).masked_fill(~action_mask, -torch.inf), dim=1)

    def choose(self, obs: Tensor, action_mask: Tensor | None = None) -> list[str]:
        """Names of the most probable strategies; obs (num_rows, obs_dim) or (obs_dim,)."""
        rows = obs if obs.ndim == 2 else obs[None]
        mask = torch.ones(rows.shape[0], len(self.strategies), dtype=torch.bool) if action_mask is None else action_mask
        return [self.strategies[i] for i in self.action_probs(rows, mask).argmax(dim=1).tolist()]

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file (weights and JSON metadata, no pickle), atomically; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"obs_mean": self.obs_mean, "obs_scale": self.obs_scale}
        for index, (weight, bias) in enumerate(self.layers):
            tensors[f"layer{index}.weight"], tensors[f"layer{index}.bias"] = weight, bias
        header = {
            "schema": str(POLICY_SCHEMA),
            "strategies": json.dumps(self.strategies),
            "meta": json.dumps(self.meta, sort_keys=True),
        }
        partial = path.with_name(path.name + ".partial")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, str(partial), metadata=header)
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> MlpPolicy:
        """Reads a saved policy.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the file comes from a newer schema.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no policy at {path}; train one: python -m experiments.train --agent ppo")
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if int(header["schema"]) > POLICY_SCHEMA:
            raise ValueError(
                f"{path} has policy schema {header['schema']}, this metarec_gym reads up to {POLICY_SCHEMA}; "
                "upgrade metarec_gym"
            )
        count = sum(name.endswith(".weight") for name in tensors)
        return cls(
            [(tensors[f"layer{i}.weight"], tensors[f"layer{i}.bias"]) for i in range(count)],
            tuple(json.loads(header["strategies"])),
            obs_mean=tensors["obs_mean"],
            obs_scale=tensors["obs_scale"],
            meta=json.loads(header["meta"]),
        )
