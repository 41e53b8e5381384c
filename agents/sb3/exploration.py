"""Exploration of off-policy algorithms for a batch: every row for itself, all rows in one call."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from metarec_gym.seeding import numpy_rng


class RowwiseExploration(OffPolicyAlgorithm):
    """Mixin for DQN, QR-DQN and SAC.

    SB3 asks the action space row by row for random actions, and flips epsilon-greedy's coin once for the whole batch: with 64
    rows either all explore or none.
    """

    _explore: np.random.Generator | None = None

    def _random_actions(self, rows: int) -> np.ndarray[Any, Any]:
        if self._explore is None:
            self._explore = numpy_rng(int(self.seed or 0), "sb3", "exploration")
        if isinstance(self.action_space, spaces.Box):
            shape = (rows, *self.action_space.shape)
            return self._explore.uniform(self.action_space.low, self.action_space.high, shape).astype(np.float32)
        return self._explore.integers(0, int(self.action_space.n), rows)  # type: ignore[attr-defined]

    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if self.num_timesteps >= learning_starts:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        # a Box of ours is [-1, 1], so the scaled action is the action
        action = self._random_actions(n_envs)
        return action, action

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray[Any, Any], Any]:
        """The policy's actions; unless `deterministic` or SAC, each row explores with the exploration rate."""
        action, state = self.policy.predict(observation, state, episode_start, deterministic)
        rate = getattr(self, "exploration_rate", 0.0)
        if deterministic or rate <= 0.0 or np.ndim(action) == 0:
            return action, state
        other = self._random_actions(len(action))
        assert self._explore is not None
        return np.where(self._explore.random(len(action)) < rate, other, action), state
