"""TRPO of sb3-contrib: natural gradient steps under a hard bound of the KL divergence (Schulman et al. 2015).

python -m experiments.train --agent sb3_trpo --env MetaRec/Select-v0
"""

from __future__ import annotations

from dataclasses import dataclass

from sb3_contrib import TRPO
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm
from agents.sb3.export import actor_critic_policy
from agents.sb3.hyperparameters import action_of, tuned
from agents.sb3.settings import Settings


@dataclass(frozen=True)
class Args(Settings):
    """Hyperparameters, named as in sb3-contrib."""

    gae_lambda: float = 0.95
    """Exponential weight of longer advantage estimates."""
    n_steps: int = 33
    """Requests per environment and iteration."""
    batch_size: int = 1056
    """Requests per gradient step of the critic."""
    target_kl: float = 0.02
    """Bound of the mean KL divergence of an update."""
    cg_max_steps: int = 10
    """Steps of the conjugate gradient."""
    cg_damping: float = 0.1
    """Added to the Fisher matrix's diagonal."""
    n_critic_updates: int = 4
    """Passes of the critic over each rollout."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "trpo", action_of(env_id))


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> TRPO:
    """The untrained model."""
    return TRPO("MlpPolicy", env, **args.arguments(seed))


ALGORITHM = Algorithm("sb3_trpo", make_model, actor_critic_policy)
train = ALGORITHM.train
