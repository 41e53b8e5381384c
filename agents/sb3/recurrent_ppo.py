"""RecurrentPPO of sb3-contrib: PPO with an LSTM that remembers the episode.

python -m experiments.train --agent sb3_recurrent_ppo --env MetaRec/Select-v0
"""

from __future__ import annotations

from dataclasses import dataclass

from sb3_contrib import RecurrentPPO
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm
from agents.sb3.export import recurrent_policy
from agents.sb3.hyperparameters import action_of, tuned
from agents.sb3.settings import Clipped


@dataclass(frozen=True)
class Args(Clipped):
    """Hyperparameters, named as in sb3-contrib."""

    lstm_hidden_size: int = 64
    """Width of the LSTM, of actor and critic alike."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the tanh layers."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "recurrent_ppo", action_of(env_id))


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> RecurrentPPO:
    """The untrained model."""
    return RecurrentPPO("MlpLstmPolicy", env, **args.arguments(seed, network=("lstm_hidden_size",)))


ALGORITHM = Algorithm("sb3_recurrent_ppo", make_model, recurrent_policy, actions=("select",))
train = ALGORITHM.train
