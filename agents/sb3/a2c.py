"""A2C of Stable-Baselines3: one gradient step a rollout, no clipping (Mnih et al. 2016, synchronous).

python -m experiments.train --agent sb3_a2c --env MetaRec/Select-v0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from stable_baselines3 import A2C
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm, TrainResult, parse_rate, train_with
from agents.sb3.export import actor_critic_policy
from agents.sb3.hyperparameters import action_of, tuned
from metarec_gym.envs.vector_env import MetaRecVectorEnv


@dataclass(frozen=True)
class Args:
    """Hyperparameters, named as in Stable-Baselines3."""

    seed: int = 0
    """Seed of the network, the actions, the minibatches and the environment."""
    total_steps: int = 300_000
    """Requests to learn from."""
    learning_rate: str = "lin_0.003"
    """Step size; `lin_X` falls linearly from X to 0, a number stays."""
    gamma: float = 0.9
    """Discount of the next request's value."""
    gae_lambda: float = 0.95
    """Exponential weight of longer advantage estimates."""
    n_steps: int = 8
    """Requests per environment and iteration."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the mean squared value error."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""
    normalize_advantage: bool = True
    """Advantages get mean 0 and deviation 1 in every rollout."""
    use_rms_prop: bool = False
    """RMSprop as in the paper; Adam otherwise."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the tanh layers."""
    stats_window: int = 256
    """Episodes that the logged mean return and length run over."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "a2c", action_of(env_id))


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> A2C:
    """The untrained model."""
    return A2C(
        "MlpPolicy",
        env,
        learning_rate=parse_rate(args.learning_rate),
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        n_steps=args.n_steps,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        normalize_advantage=args.normalize_advantage,
        use_rms_prop=args.use_rms_prop,
        stats_window_size=args.stats_window,
        policy_kwargs={"net_arch": list(args.hidden), "activation_fn": torch.nn.Tanh},
        seed=seed,
        device="cpu",
    )


ALGORITHM = Algorithm("sb3_a2c", make_model, actor_critic_policy)


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
