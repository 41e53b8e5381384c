"""What a step must do at least: bytes moved and floating-point operations of one user and request, from the tables' shapes.

A lower bound, not what the code does: every table entry that a step needs is read once, the user's state is read and written
once, the observation is written once. Products count twice (multiply and add); draws, comparisons and indices do not count.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.response.frozen import FrozenResponse


@dataclass(frozen=True)
class Work:
    """Of one step of one user."""

    bytes_moved: float
    flops: float


def env_work(env: MetaRecVectorEnv) -> Work:
    """Least work of a step of `env`; a judge of another family is counted by its state and observation only."""
    world, slate = env.world, env.slate_size
    judge = world.judge(env.config.fold, env.config.judge)
    obs_dim = int(env.single_observation_space.shape[0])  # type: ignore[index]
    lists = {"select": 1, "slots": min(slate, world.n_strategies), "blend": world.n_strategies}[env.config.action]
    items = slate * lists * (3 if env.config.action == "blend" else 1)
    profile = world.tensors["item_taste"].shape[1] + world.tensors["item_category"].shape[1] + 1
    # the state that lives from step to step: judge's state, profile, two numbers a strategy and about ten more, read and written
    user = judge.state_dim + profile + 3 * world.n_strategies + 10
    moved = 4.0 * (2 * user + obs_dim + items + slate * profile)
    flops = float(slate * profile)
    if isinstance(judge, FrozenResponse):
        members, hidden = judge.n_members, judge.tensors["hidden_bias"].shape[1]
        width = judge.rank + judge.dim + judge.n_static + 1
        # one row a shown item and outcome, and the user's own coefficients
        moved += 4.0 * (slate * judge.n_outcomes * width + judge.n_outcomes * judge.n_features)
        tower = judge.state_dim * hidden + hidden * judge.n_outcomes * judge.rank
        # recurrence: every decay meets the state once and each item of the slate once
        recurrence = judge.n_decays * judge.dim * (slate + 1) + slate * judge.dim
        flops += 2.0 * (members * tower + slate * judge.n_outcomes * width + recurrence)
    return Work(moved, flops)


def ppo_flops(obs_dim: int, num_strategies: int, hidden: tuple[int, ...], epochs: int) -> float:
    """Of one request in PPO's networks: actor once in the rollout, critic once for advantages, both in each epoch.

    A forward pass costs 2 operations a weight, a backward pass twice that.
    """

    def weights(out: int) -> int:
        widths = [obs_dim, *hidden, out]
        return sum(a * b for a, b in itertools.pairwise(widths))

    both = weights(num_strategies) + weights(1)
    return 2.0 * both + epochs * 6.0 * both
