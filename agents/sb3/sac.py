"""SAC of Stable-Baselines3 for Blend: soft Q-learning of a squashed Gaussian actor (Haarnoja et al. 2018).

python -m experiments.train --agent sb3_sac --env MetaRec/Blend-v0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm, TrainResult, parse_rate, train_with
from agents.sb3.exploration import RowwiseExploration
from agents.sb3.export import squashed_policy
from agents.sb3.hyperparameters import action_of, tuned
from metarec_gym.envs.vector_env import MetaRecVectorEnv


@dataclass(frozen=True)
class Args:
    """Hyperparameters, named as in Stable-Baselines3."""

    seed: int = 0
    """Seed of the network, the actions, the minibatches and the environment."""
    total_steps: int = 300_000
    """Requests to learn from."""
    learning_rate: str = "0.001"
    """Step size; `lin_X` falls linearly from X to 0, a number stays."""
    gamma: float = 0.9
    """Discount of the next request's value."""
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
    tau: float = 0.01
    """Share of the critic that enters its target at each gradient step."""
    ent_coef: str = "auto_0.1"
    """Weight of the entropy; `auto_X` learns it from X on."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the tanh layers."""
    stats_window: int = 256
    """Episodes that the logged mean return and length run over."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "sac", action_of(env_id))


class BatchedSAC(RowwiseExploration, SAC):
    """SAC whose random first actions are drawn for all rows at once."""


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> SAC:
    """The untrained model."""
    return BatchedSAC(
        "MlpPolicy",
        env,
        learning_rate=parse_rate(args.learning_rate),
        gamma=args.gamma,
        buffer_size=args.buffer_size,
        learning_starts=args.learning_starts,
        batch_size=args.batch_size,
        train_freq=args.train_freq,
        gradient_steps=args.gradient_steps,
        tau=args.tau,
        ent_coef=args.ent_coef,
        stats_window_size=args.stats_window,
        policy_kwargs={"net_arch": list(args.hidden), "activation_fn": torch.nn.Tanh},
        seed=seed,
        device="cpu",
    )


ALGORITHM = Algorithm("sb3_sac", make_model, squashed_policy, actions=("blend",), off_policy=True)


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
