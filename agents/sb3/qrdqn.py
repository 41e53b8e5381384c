"""QR-DQN of sb3-contrib: Q-learning of the return's quantiles, greedy over their mean (Dabney et al. 2018).

python -m experiments.train --agent sb3_qrdqn --env MetaRec/Select-v0
"""

from __future__ import annotations

from dataclasses import dataclass

from sb3_contrib import QRDQN
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3 import dqn
from agents.sb3.common import Algorithm
from agents.sb3.exploration import RowwiseExploration
from agents.sb3.export import quantile_policy
from agents.sb3.hyperparameters import action_of, tuned


@dataclass(frozen=True)
class Args(dqn.Args):
    """Hyperparameters, named as in sb3-contrib: those of DQN, and the quantiles."""

    n_quantiles: int = 25
    """Quantiles of the return that are learned for every strategy."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "qrdqn", action_of(env_id))


class BatchedQRDQN(RowwiseExploration, QRDQN):
    """QRDQN that explores in each row by itself."""


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> QRDQN:
    """The untrained model."""
    return BatchedQRDQN("MlpPolicy", env, **args.arguments(seed, network=("n_quantiles",)))


ALGORITHM = Algorithm("sb3_qrdqn", make_model, quantile_policy, actions=("select",), off_policy=True)
train = ALGORITHM.train
