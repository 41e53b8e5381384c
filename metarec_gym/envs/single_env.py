"""`MetaRec/Select-v0`, `Blend-v0` and `Slots-v0` as single Gymnasium environments: a batch of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from metarec_gym.envs.one_row import OneRow
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.world import World


class MetaRecEnv(gymnasium.Env[NDArray[np.float32], Any]):
    """One simulated user at a time. Spaces, reward and endings: see `MetaRecVectorEnv`, of which this is one row.

    `MetaRecEnv` seeded s + i equals row i of the vector environment seeded s.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        world: World | str | Path | None = None,
        *,
        device: str = "cpu",
        render_mode: None = None,
        **settings: Any,
    ) -> None:
        """Arguments as in `MetaRecVectorEnv`."""
        self._batch = MetaRecVectorEnv(
            1, world=world, device=device, autoreset_mode="Disabled", render_mode=render_mode, **settings
        )
        # with one row there is nothing to tell apart
        self._batch._masked_infos = False
        self._row = OneRow(self._batch) if OneRow.can_step(self._batch) else None
        self.render_mode = render_mode
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space
        self.world = self._batch.world
        self.strategy_names = self._batch.strategy_names
        self.feature_slices = self._batch.feature_slices

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: Seeds the environment; None goes on to the next episode.
            options: `start_state` and `noise` as integers, see `MetaRecVectorEnv`.

        Returns:
            Observation (obs_dim,) and info.
        """
        super().reset(seed=seed)
        if seed is None and not self._batch._seeded:
            seed = int(self.np_random.integers(2**62))
        batch = {name: np.atleast_1d(value) for name, value in (options or {}).items()}
        obs, info = self._batch.reset(seed=seed, options=batch)
        if self._row is not None:
            self._row.begin(obs[0])
        return obs[0], self._one(info)

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Serves one request; see `MetaRecVectorEnv.step`."""
        alone = None if self._row is None else self._row.step(action)
        if alone is not None:
            return alone
        obs, reward, terminated, truncated, info = self._batch.step(np.asarray(action)[None])
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), self._one(info)

    def action_masks(self) -> NDArray[np.bool_]:
        """Available strategies, bool (K,), in Slots (slate_size * K,)."""
        masks: NDArray[np.bool_] = self._batch.action_masks()[0]
        return masks

    @staticmethod
    def _one(info: dict[str, Any]) -> dict[str, Any]:
        return {key: value[0] for key, value in info.items() if not key.startswith("_")}
