"""A2C of Stable-Baselines3: one gradient step a rollout, no clipping (Mnih et al. 2016, synchronous).

python -m experiments.train --agent sb3_a2c --env MetaRec/Select-v0
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_baselines3 import A2C
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm
from agents.sb3.export import actor_critic_policy
from agents.sb3.hyperparameters import action_of, tuned
from agents.sb3.settings import Settings


@dataclass(frozen=True)
class Args(Settings):
    """Hyperparameters, named as in Stable-Baselines3."""

    learning_rate: str = "lin_0.003"
    """Step size; `lin_X` falls linearly from X to 0, a number stays."""
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


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    return tuned(Args(), "a2c", action_of(env_id))


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> A2C:
    """The untrained model."""
    return A2C("MlpPolicy", env, **args.arguments(seed))


ALGORITHM = Algorithm("sb3_a2c", make_model, actor_critic_policy)
train = ALGORITHM.train
