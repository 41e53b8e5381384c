"""DQN of Stable-Baselines3 with exploration row by row; exported as its greedy policy (Mnih et al. 2015).

python -m experiments.train --agent sb3_dqn --env MetaRec/Select-v0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm, TrainResult, parse_rate, train_with
from agents.sb3.exploration import RowwiseExploration
from agents.sb3.export import value_policy
from agents.sb3.hyperparameters import action_of, tuned
from metarec_gym.envs.vector_env import MetaRecVectorEnv


@dataclass(frozen=True)
class Args:
    """Hyperparameters, named as in Stable-Baselines3."""

    seed: int = 0
    """Seed of the network, the actions, the minibatches and the environment."""
    total_steps: int = 300_000
    """Requests to learn from."""
    learning_rate: str = "lin_0.001"
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
    target_update_interval: int = 2_000
    """Requests, of all environments, between copies of the target network."""
    exploration_fraction: float = 0.3
    """Share of training over which the exploration rate falls."""
    exploration_final_eps: float = 0.05
    """Exploration rate from then on."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the tanh layers."""
    stats_window: int = 256
    """Episodes that the logged mean return and length run over."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "dqn", action_of(env_id))


class BatchedDQN(RowwiseExploration, DQN):
    """DQN that explores in each row by itself."""


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> DQN:
    """The untrained model."""
    return BatchedDQN(
        "MlpPolicy",
        env,
        learning_rate=parse_rate(args.learning_rate),
        gamma=args.gamma,
        buffer_size=args.buffer_size,
        learning_starts=args.learning_starts,
        batch_size=args.batch_size,
        train_freq=args.train_freq,
        gradient_steps=args.gradient_steps,
        target_update_interval=args.target_update_interval,
        exploration_fraction=args.exploration_fraction,
        exploration_final_eps=args.exploration_final_eps,
        max_grad_norm=args.max_grad_norm,
        stats_window_size=args.stats_window,
        policy_kwargs={"net_arch": list(args.hidden), "activation_fn": torch.nn.Tanh},
        seed=seed,
        device="cpu",
    )


ALGORITHM = Algorithm("sb3_dqn", make_model, value_policy, actions=("select",), off_policy=True)


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
