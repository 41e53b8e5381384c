"""Algorithms of Stable-Baselines3 and sb3-contrib on MetaRec environments; one module each, PPO's names also here."""

from agents.ppo.args import TrainResult
from agents.sb3.common import isolated_generators
from agents.sb3.export import actor_critic_policy
from agents.sb3.ppo import ALGORITHM, Args, learning_rate, train

__all__ = ["ALGORITHM", "Args", "TrainResult", "actor_critic_policy", "isolated_generators", "learning_rate", "train"]
