"""DQN of Stable-Baselines3 with exploration row by row; exported as its greedy policy (Mnih et al. 2015).

python -m experiments.train --agent sb3_dqn --env MetaRec/Select-v0
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm
from agents.sb3.exploration import RowwiseExploration
from agents.sb3.export import value_policy
from agents.sb3.hyperparameters import action_of, tuned
from agents.sb3.settings import OffPolicy


@dataclass(frozen=True)
class Args(OffPolicy):
    """Hyperparameters, named as in Stable-Baselines3."""

    learning_rate: str = "lin_0.001"
    """Step size; `lin_X` falls linearly from X to 0, a number stays."""
    target_update_interval: int = 2_000
    """Requests, of all environments, between copies of the target network."""
    exploration_fraction: float = 0.3
    """Share of training over which the exploration rate falls."""
    exploration_final_eps: float = 0.05
    """Exploration rate from then on."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "dqn", action_of(env_id))


class BatchedDQN(RowwiseExploration, DQN):
    """DQN that explores in each row by itself."""


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> DQN:
    """The untrained model."""
    return BatchedDQN("MlpPolicy", env, **args.arguments(seed))


ALGORITHM = Algorithm("sb3_dqn", make_model, value_policy, actions=("select",), off_policy=True)
train = ALGORITHM.train
