"""Stable-Baselines3 on our environments: PPO, A2C and DQN choose a strategy, SAC blends, PPO fills a slate place by place.

    python -m experiments.integrations.sb3_agents --task dqn_select --steps 20000

A batch of ours behind `SB3VecEnv` is one `VecEnv`; `make_vec_env` with the id works too, and is slower.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import torch
import tyro
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

import metarec_gym  # noqa: F401  registers the ids
from metarec_gym.envs.sb3 import SB3VecEnv
from metarec_gym.world import World

Task = Literal["ppo_select", "a2c_select", "dqn_select", "sac_blend", "ppo_slots"]

# SB3's defaults for DQN are Atari's: a target network that moves every 10,000 steps would not move here at all
DQN_SETTINGS = {
    "learning_rate": 1e-3,
    "learning_starts": 200,
    "train_freq": 1,
    "gradient_steps": 4,
    "target_update_interval": 400,
    "exploration_fraction": 0.5,
}
# (algorithm, environment, hyperparameters): SAC needs a Box of actions, DQN a Discrete, PPO and A2C take every space
TASKS: dict[Task, tuple[Callable[..., BaseAlgorithm], str, dict[str, Any]]] = {
    "ppo_select": (PPO, "MetaRec/Select-v0", {"n_steps": 20, "batch_size": 80, "learning_rate": 2e-3}),
    "a2c_select": (A2C, "MetaRec/Select-v0", {"n_steps": 10, "learning_rate": 3e-3}),
    "dqn_select": (DQN, "MetaRec/Select-v0", DQN_SETTINGS),
    "sac_blend": (SAC, "MetaRec/Blend-v0", {"learning_starts": 200, "learning_rate": 1e-3, "ent_coef": 0.1}),
    "ppo_slots": (PPO, "MetaRec/Slots-v0", {"n_steps": 20, "batch_size": 80, "learning_rate": 2e-3}),
}


def make_rows(env_id: str, num_envs: int, *, batched: bool = True, **settings: Any) -> VecEnv:
    """`num_envs` users at once: our batch behind one adapter, or SB3's own loop over single environments."""
    if batched:
        return SB3VecEnv(gymnasium.make_vec(env_id, num_envs=num_envs, autoreset_mode="SameStep", **settings))
    # without a render mode it would ask for pictures, and Gymnasium would warn that there are none
    return make_vec_env(env_id, n_envs=num_envs, env_kwargs={"render_mode": None, **settings})


def make_model(task: Task, seed: int, *, num_envs: int = 16, batched: bool = True, **settings: Any) -> BaseAlgorithm:
    """The untrained learner of a task on its environment."""
    algorithm, env_id, hyperparameters = TASKS[task]
    # ten requests of foresight cover what one episode can teach about a user
    rows = make_rows(env_id, num_envs, batched=batched, **settings)
    return algorithm("MlpPolicy", rows, gamma=0.9, seed=seed, device="cpu", **hyperparameters)


def mean_return(model: BaseAlgorithm, env_id: str, *, episodes: int = 128, seed: int = 1, **settings: Any) -> float:
    """Mean return of the sampled (not the greedy) policy; equal seeds meet equal users."""
    rows = make_rows(env_id, episodes, **settings)
    rows.seed(seed)
    mean, _ = evaluate_policy(model, rows, n_eval_episodes=episodes, deterministic=False)
    assert isinstance(mean, float)
    return float(mean)


def train(
    task: Task, steps: int, seed: int, *, num_envs: int = 16, batched: bool = True, world: World | str | None = None
) -> dict[str, float]:
    """Learns from `steps` requests (rounded up to whole rollouts) and says what came of it."""
    model = make_model(task, seed, num_envs=num_envs, batched=batched, world=world)
    start = torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()
    before = mean_return(model, TASKS[task][1], world=world)
    model.learn(steps)
    end = torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    return {
        "transitions": model.num_timesteps,
        "parameter_change": float((end - start).abs().max()),
        "return_before": before,
        "return_after": mean_return(model, TASKS[task][1], world=world),
    }


@dataclass(frozen=True)
class Args:
    """Trains one agent of Stable-Baselines3."""

    task: Task = "ppo_select"
    """Algorithm and environment."""
    steps: int = 20_000
    """Requests to learn from."""
    seed: int = 0
    """Seed of network, exploration and users."""
    num_envs: int = 16
    """Users served at once."""
    batched: bool = True
    """One batch behind `SB3VecEnv`; with --no-batched SB3 loops over single environments."""
    world: str | None = None
    """Folder of a world; the embedded synthetic one if absent."""


def main() -> None:
    """The command line."""
    args = tyro.cli(Args)
    numbers = train(args.task, args.steps, args.seed, num_envs=args.num_envs, batched=args.batched, world=args.world)
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
