"""Hyperparameters that algorithms share, named as in Stable-Baselines3, and how they reach its constructors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """What every algorithm has; an algorithm's `Args` add its own."""

    seed: int = 0
    """Seed of the network, the actions, the minibatches and the environment."""
    total_steps: int = 300_000
    """Requests to learn from."""
    learning_rate: str = "lin_0.002"
    """Step size; `lin_X` falls linearly from X to 0, a number stays."""
    gamma: float = 0.9
    """Discount of the next request's value."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the tanh layers."""
    stats_window: int = 256
    """Episodes that the logged mean return and length run over."""
    blind_to_masks: bool = False
    """Learn where strategies can be out of service although masks are not known: chosen, such a strategy serves nothing and
    the reward tells. The policy that is played leaves them alone."""

    def arguments(self, seed: int, network: tuple[str, ...] = ()) -> dict[str, Any]:
        """Keyword arguments of the algorithm's constructor.

        Args:
            seed: Of the model; `self.seed` is the run's.
            network: Fields that describe the network: they go to the policy.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("seed", "total_steps", "hidden", "stats_window", "blind_to_masks"):
            del values[name]
        policy = {"net_arch": list(self.hidden), "activation_fn": torch.nn.Tanh}
        policy |= {name: values.pop(name) for name in network}
        values |= {"learning_rate": parse_rate(self.learning_rate), "stats_window_size": self.stats_window}
        return values | {"policy_kwargs": policy, "seed": seed, "device": "cpu"}


@dataclass(frozen=True)
class Clipped(Settings):
    """Of the relatives of PPO."""

    gae_lambda: float = 0.95
    """Exponential weight of longer advantage estimates."""
    n_steps: int = 33
    """Requests per environment and iteration."""
    batch_size: int = 1056
    """Requests per gradient step."""
    n_epochs: int = 4
    """Passes over each rollout."""
    clip_range: float = 0.2
    """The probability ratio counts only within 1 +- this."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the mean squared value error."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""


@dataclass(frozen=True)
class OffPolicy(Settings):
    """Of the algorithms that learn from a replay buffer."""

    buffer_size: int = 200_000
    """Requests that the replay buffer holds."""
    learning_starts: int = 5_000
    """Requests of random actions before the first gradient step."""
    batch_size: int = 256
    """Requests per gradient step."""
    train_freq: int = 1
    """Requests per environment between updates."""
    gradient_steps: int = 4
    """Gradient steps an update."""


def parse_rate(rate: str | float) -> Callable[[float], float]:
    """A schedule written as in RL Zoo, as a function of the share of training that is left.

    Args:
        rate: `lin_X` falls linearly from X to 0; a number stays.

    Raises:
        ValueError: When it is neither.
    """
    text = str(rate)
    try:
        value = float(text.removeprefix("lin_"))
    except ValueError as error:
        raise ValueError(f"learning_rate is {rate!r}, expected a number or 'lin_' and a number: lin_0.001") from error
    linear = text.startswith("lin_")
    return lambda left: value * left if linear else value
