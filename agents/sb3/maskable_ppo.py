"""MaskablePPO of sb3-contrib: PPO that never asks a strategy out of service (Huang and Ontañón 2022).

python -m experiments.train --agent sb3_maskable_ppo --env MetaRec/Select-v0
"""

from __future__ import annotations

from dataclasses import dataclass

from sb3_contrib import MaskablePPO
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm
from agents.sb3.export import actor_critic_policy
from agents.sb3.hyperparameters import action_of, tuned
from agents.sb3.settings import Clipped


@dataclass(frozen=True)
class Args(Clipped):
    """Hyperparameters, named as in sb3-contrib."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "maskable_ppo", action_of(env_id))


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> MaskablePPO:
    """The untrained model."""
    return MaskablePPO("MlpPolicy", env, **args.arguments(seed))


ALGORITHM = Algorithm("sb3_maskable_ppo", make_model, actor_critic_policy, actions=("select", "slots"), masks=True)
train = ALGORITHM.train
