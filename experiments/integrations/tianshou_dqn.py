"""Tianshou's DQN on our single environments while strategies fail and come back; in an environment of its own.

    python -m experiments.integrations.make_environment tianshou
    build/envs/tianshou/bin/python -m experiments.integrations.tianshou_dqn --steps 6000

Tianshou 2.0.1 wants pandas below 3. It resets environments itself, by number, so it takes single ones (`DummyVectorEnv`), and
reads action masks from an observation that is a dictionary of `obs` and `mask`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Dict, flatdim
from tianshou.algorithm import DQN
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OffPolicyTrainerParams
from tianshou.utils.net.common import Net

import metarec_gym  # noqa: F401  registers the ids


class MaskInObservation(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Gives the mask as Tianshou reads it, and counts the requests that asked a strategy out of service."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        mask = Box(0, 1, (flatdim(env.action_space),), dtype=np.int8)
        self.observation_space = Dict({"obs": env.observation_space, "mask": mask})
        self.mask = np.ones(mask.shape, dtype=np.int8)
        self.masked, self.violations = 0, 0

    def _with_mask(self, obs: Any, info: dict[str, Any]) -> dict[str, Any]:
        self.mask = info["action_mask"]
        return {"obs": obs, "mask": self.mask}

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Starts an episode; Tianshou's buffers store flat infos, and need none of ours."""
        obs, info = self.env.reset(**arguments)
        return self._with_mask(obs, info), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Serves a request."""
        self.masked += int((self.mask == 0).sum())
        self.violations += int(self.mask[action] == 0)
        obs, reward, terminated, truncated, info = self.env.step(int(action))
        return self._with_mask(obs, info), reward, terminated, truncated, {}


def make_rows(num_envs: int, **settings: Any) -> Any:
    """`num_envs` single environments, stepped one after the other."""
    return DummyVectorEnv([lambda: MaskInObservation(gymnasium.make("MetaRec/Select-v0", **settings))] * num_envs)


def mean_return(algorithm: Any, episodes: int, seed: int, **settings: Any) -> float:
    """Mean return of the greedy policy with little exploration; equal seeds meet equal users."""
    rows = make_rows(episodes, **settings)
    rows.seed(seed)
    collector = Collector(algorithm, rows, exploration_noise=True)
    return float(np.mean(collector.collect(n_episode=episodes, reset_before_collect=True).returns))


def train(steps: int, seed: int, *, num_envs: int = 8, outage_rate: float = 0.1, **settings: Any) -> dict[str, float]:
    """Trains; returns what was measured."""
    # Tianshou explores and samples with the global generators
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    settings["outage_rate"] = outage_rate
    rows = make_rows(num_envs, **settings)
    rows.seed(seed)
    env = rows.workers[0].env
    policy = DiscreteQLearningPolicy(
        model=Net(
            state_shape=env.observation_space["obs"].shape, action_shape=env.action_space.n, hidden_sizes=[64, 64]
        ),
        action_space=env.action_space,
        eps_training=0.3,
        eps_inference=0.05,
    )
    algorithm = DQN(policy=policy, optim=AdamOptimizerFactory(lr=1e-3), gamma=0.9, target_update_freq=100)
    before = mean_return(algorithm, 32, seed + 1, **settings)
    buffer = VectorReplayBuffer(steps + num_envs, num_envs)
    collector = Collector(algorithm, rows, buffer, exploration_noise=True)
    algorithm.run_training(
        OffPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=steps,
            collection_step_num_env_steps=10 * num_envs,
            update_step_num_gradient_steps_per_sample=0.25,
            batch_size=64,
            show_progress=False,
            verbose=False,
        )
    )
    # a sample of 0 is everything
    stored = buffer.sample(0)[0]
    fraction = stored.obs_next.obs[stored.truncated][:, env.unwrapped.feature_slices["request_fraction"]]
    wrappers = [worker.env for worker in rows.workers]
    return {
        "transitions": len(stored.rew),
        "truncated": int(stored.truncated.sum()),
        "truncated_at_the_horizon": int((fraction == 1.0).sum()),
        "masked_choices": sum(w.masked for w in wrappers),
        "violations": sum(w.violations for w in wrappers),
        "return_before": before,
        "return_after": mean_return(algorithm, 32, seed + 1, **settings),
    }


@dataclass(frozen=True)
class Args:
    """Tianshou's DQN on `MetaRec/Select-v0`."""

    steps: int = 6_000
    """Requests to learn from."""
    seed: int = 0
    """Seed of network, exploration and users."""
    num_envs: int = 8
    """Environments."""
    outage_rate: float = 0.1
    """Probability that a strategy in service fails before a request."""
    world: str | None = None
    """Folder of a world; the embedded synthetic one if absent."""


def main() -> None:
    """The command line."""
    args = tyro.cli(Args)
    torch.set_num_threads(1)
    numbers = train(args.steps, args.seed, num_envs=args.num_envs, outage_rate=args.outage_rate, world=args.world)
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
