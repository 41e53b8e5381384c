"""RecurrentPPO of sb3-contrib: PPO with an LSTM that remembers the episode.

python -m experiments.train --agent sb3_recurrent_ppo --env MetaRec/Select-v0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm, TrainResult, parse_rate, train_with
from agents.sb3.export import recurrent_policy
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
    lstm_hidden_size: int = 64
    """Width of the LSTM, of actor and critic alike."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the tanh layers."""
    stats_window: int = 256
    """Episodes that the logged mean return and length run over."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "recurrent_ppo", action_of(env_id))


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> RecurrentPPO:
    """The untrained model."""
    return RecurrentPPO(
        "MlpLstmPolicy",
        env,
        learning_rate=parse_rate(args.learning_rate),
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        n_steps=args.n_steps,
        batch_size=args.batch_size,
        n_epochs=args.n_epochs,
        clip_range=args.clip_range,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        stats_window_size=args.stats_window,
        policy_kwargs={
            "net_arch": list(args.hidden),
            "activation_fn": torch.nn.Tanh,
            "lstm_hidden_size": args.lstm_hidden_size,
        },
        seed=seed,
        device="cpu",
    )


ALGORITHM = Algorithm("sb3_recurrent_ppo", make_model, recurrent_policy, actions=("select",))


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
