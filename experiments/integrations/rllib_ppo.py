"""RLlib's PPO, on its new API stack, with our vector environment inside its runner; in an environment of its own.

    python -m experiments.integrations.make_environment rllib
    build/envs/rllib/bin/python -m experiments.integrations.rllib_ppo --steps 8000

RLlib pins gymnasium 1.2.2. Its runner knows next-step autoreset only, our default: the row after an ending is no transition. With
"SameStep" it would take the next user's first observation for the last one of the episode, and say nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# before ray is imported: it would report to its makers
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import gymnasium
import numpy as np
import ray
import torch
import tyro
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

import metarec_gym  # noqa: F401  registers the ids


def configuration(num_envs: int, seed: int, **settings: Any) -> Any:
    """PPO in this process: no worker processes, one learner, `num_envs` rows of one vector environment."""
    return (
        PPOConfig()
        .environment("MetaRec/Select-v0", env_config=settings)
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=num_envs,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length=20,
        )
        .training(
            train_batch_size=20 * num_envs,
            minibatch_size=5 * num_envs,
            num_epochs=4,
            lr=2e-3,
            gamma=0.9,
            entropy_coeff=0.01,
        )
        .debugging(seed=seed, log_level="ERROR")
    )


def weights(algorithm: PPO) -> list[np.ndarray[Any, Any]]:
    """The network's parameters."""
    return [np.array(value) for value in algorithm.get_module().get_state().values()]


def mean_return(algorithm: PPO, *, episodes: int = 128, seed: int = 1, **settings: Any) -> float:
    """Mean return of the sampled policy; equal seeds meet equal users."""
    env = gymnasium.make_vec(
        "MetaRec/Select-v0", num_envs=episodes, output="torch", autoreset_mode="Disabled", **settings
    )
    generator = torch.Generator().manual_seed(seed)
    obs, _ = env.reset(seed=seed)
    total, alive = torch.zeros(episodes), torch.ones(episodes, dtype=torch.bool)
    while bool(alive.any()):
        logits = algorithm.get_module().forward_inference({Columns.OBS: obs})[Columns.ACTION_DIST_INPUTS]
        action = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator)[:, 0]
        obs, reward, terminated, truncated, _ = env.step(action)
        total, alive = total + reward * alive, alive & ~(terminated | truncated)
    return float(total.mean())


def broken_episodes(num_envs: int, seed: int, **settings: Any) -> int:
    """Of the episodes that RLlib's runner hands its learner, those whose observations do not count the requests 0, 1, 2 ... n."""
    runner = SingleAgentEnvRunner(config=configuration(num_envs, seed, **settings))
    env: Any = runner.env.unwrapped
    finished = [e for e in runner.sample(num_timesteps=4 * env.horizon * num_envs, random_actions=True) if e.is_done]
    broken = 0
    for episode in finished:
        fractions = np.stack(episode.get_observations())[:, env.feature_slices["request_fraction"]][:, 0]
        broken += not np.array_equal(np.round(fractions * env.horizon), np.arange(len(episode) + 1))
    runner.stop()
    return broken if finished else -1


def train(steps: int, seed: int, *, num_envs: int = 16, **settings: Any) -> dict[str, float]:
    """Trains, stores a checkpoint, reads it back; returns what was measured."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    algorithm = configuration(num_envs, seed, **settings).build_algo()
    start, before = weights(algorithm), mean_return(algorithm, **settings)
    transitions, iterations = 0, 0
    while transitions < steps:
        result = algorithm.train()
        transitions, iterations = int(result["env_runners"]["num_env_steps_sampled_lifetime"]), iterations + 1
    end, after = weights(algorithm), mean_return(algorithm, **settings)
    with tempfile.TemporaryDirectory() as folder:
        algorithm.save_to_path(Path(folder).resolve() / "checkpoint")
        restored = PPO.from_checkpoint(Path(folder).resolve() / "checkpoint")
        same = all(np.array_equal(a, b) for a, b in zip(end, weights(restored), strict=True))
        restored.stop()
    algorithm.stop()
    return {
        "transitions": transitions,
        "iterations": iterations,
        "broken_episodes": broken_episodes(num_envs, seed, **settings),
        "broken_episodes_same_step": broken_episodes(num_envs, seed, autoreset_mode="SameStep", **settings),
        "parameter_change": max(float(np.abs(a - b).max()) for a, b in zip(start, end, strict=True)),
        "return_before": before,
        "return_after": after,
        "checkpoint_restores": same,
    }


@dataclass(frozen=True)
class Args:
    """RLlib's PPO on `MetaRec/Select-v0`."""

    steps: int = 8_000
    """Requests to learn from."""
    seed: int = 0
    """Seed of network, choices and users."""
    num_envs: int = 16
    """Users served at once."""
    horizon: int | None = None
    """Requests an episode; the world's if absent."""
    world: str | None = None
    """Folder of a world; the embedded synthetic one if absent."""


def main() -> None:
    """The command line."""
    args = tyro.cli(Args)
    numbers = train(args.steps, args.seed, num_envs=args.num_envs, horizon=args.horizon, world=args.world)
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
