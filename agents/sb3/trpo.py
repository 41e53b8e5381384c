"""TRPO of sb3-contrib: natural gradient steps under a hard bound of the KL divergence (Schulman et al. 2015).

python -m experiments.train --agent sb3_trpo --env MetaRec/Select-v0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from sb3_contrib import TRPO
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm, TrainResult, parse_rate, train_with
from agents.sb3.export import actor_critic_policy
from agents.sb3.hyperparameters import action_of, tuned
from metarec_gym.envs.vector_env import MetaRecVectorEnv


@dataclass(frozen=True)
class Args:
    """Hyperparameters, named as in sb3-contrib."""

    seed: int = 0
    """Seed of the network, the actions, the minibatches and the environment."""
    total_steps: int = 300_000
    """Requests to learn from."""
    learning_rate: str = "lin_0.002"
    """Step size; `lin_X` falls linearly from X to 0, a number stays."""
    gamma: float = 0.9
    """Discount of the next request's value."""
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
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the tanh layers."""
    stats_window: int = 256
    """Episodes that the logged mean return and length run over."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "trpo", action_of(env_id))


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> TRPO:
    """The untrained model."""
    return TRPO(
        "MlpPolicy",
        env,
        learning_rate=parse_rate(args.learning_rate),
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        n_steps=args.n_steps,
        batch_size=args.batch_size,
        target_kl=args.target_kl,
        cg_max_steps=args.cg_max_steps,
        cg_damping=args.cg_damping,
        n_critic_updates=args.n_critic_updates,
        stats_window_size=args.stats_window,
        policy_kwargs={"net_arch": list(args.hidden), "activation_fn": torch.nn.Tanh},
        seed=seed,
        device="cpu",
    )


ALGORITHM = Algorithm("sb3_trpo", make_model, actor_critic_policy)


def train(
    env: MetaRecVectorEnv,
    args: Args,
    *,
    run_dir: str | Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> TrainResult:
    """Trains on `env` (numpy output, same-step autoreset); see `train_with`. A killed run starts again: `resume` says nothing."""
    return train_with(ALGORITHM, env, args, run_dir=run_dir, progress=progress)
