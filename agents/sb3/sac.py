"""SAC of Stable-Baselines3 for Blend: soft Q-learning of a squashed Gaussian actor (Haarnoja et al. 2018).

python -m experiments.train --agent sb3_sac --env MetaRec/Blend-v0
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm
from agents.sb3.exploration import RowwiseExploration
from agents.sb3.export import squashed_policy
from agents.sb3.hyperparameters import action_of, tuned
from agents.sb3.settings import OffPolicy


@dataclass(frozen=True)
class Args(OffPolicy):
    """Hyperparameters, named as in Stable-Baselines3."""

    learning_rate: str = "0.001"
    """Step size; `lin_X` falls linearly from X to 0, a number stays."""
    tau: float = 0.01
    """Share of the critic that enters its target at each gradient step."""
    ent_coef: str = "auto_0.1"
    """Weight of the entropy; `auto_X` learns it from X on."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "sac", action_of(env_id))


class BatchedSAC(RowwiseExploration, SAC):
    """SAC whose random first actions are drawn for all rows at once."""


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> SAC:
    """The untrained model."""
    return BatchedSAC("MlpPolicy", env, **args.arguments(seed))


ALGORITHM = Algorithm("sb3_sac", make_model, squashed_policy, actions=("blend",), off_policy=True)
train = ALGORITHM.train
