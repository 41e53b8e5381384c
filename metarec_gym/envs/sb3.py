"""Stable-Baselines3 adapter: our batch as a `VecEnv`, without a Python loop over rows except the finished ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from metarec_gym.envs.batched import BatchedEnv
from metarec_gym.envs.vector_env import MetaRecVectorEnv


class SB3VecEnv(VecEnv):
    """A batch of ours as SB3 expects it: `SB3VecEnv(gymnasium.make_vec(ID, num_envs=256, autoreset_mode="SameStep"))`.

    Finished rows carry `terminal_observation`, `TimeLimit.truncated` (SB3 bootstraps from the two) and `episode` (replaces
    Monitor). The other rows share one empty dict: SB3 and its wrappers read infos and copy before they write.

    Args:
        env: What `gymnasium.make_vec` gives for one of our ids, unwrapped; numpy output, same-step autoreset mode.

    Raises:
        TypeError: When it is not one of our batches.
        ValueError: When the environment has another output or mode: the terminal observation would be lost.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(env, MetaRecVectorEnv | BatchedEnv):
            raise TypeError(
                f"SB3VecEnv takes a vector environment of ours, got {type(env).__name__}; for wrapped or other ones use "
                "make_vec_env of stable_baselines3.common.env_util"
            )
        if env.autoreset_mode is not AutoresetMode.SAME_STEP or env.output != "numpy":
            raise ValueError(
                f"SB3 needs autoreset_mode='SameStep' and output='numpy', this environment has "
                f"{env.autoreset_mode.value!r} and {env.output!r}; make it with those"
            )
        self.env = env
        self._action: NDArray[np.int64] = np.zeros(env.num_envs, dtype=np.int64)
        self._return = np.zeros(env.num_envs, dtype=np.float64)
        self._length = np.zeros(env.num_envs, dtype=np.int64)
        self._empty: dict[str, Any] = {}
        self.last_outcomes: dict[str, NDArray[np.float32]] = {}
        """Reward parts of the last step, (num_envs,) each, for callbacks."""
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        """Starts all rows; seeds and options set before are used once."""
        seeds = None if all(s is None for s in self._seeds) else list(self._seeds)
        options = self._options[0] if any(self._options) else None
        obs, _ = self.env.reset(seed=seeds, options=options or None)
        self._return[:] = 0.0
        self._length[:] = 0
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return obs

    def step_async(self, actions: NDArray[Any]) -> None:
        """Remembers the actions."""
        self._action = np.asarray(actions)

    def step_wait(self) -> tuple[Any, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Serves one request in every row."""
        obs, reward, terminated, truncated, info = self.env.step(self._action)
        self._return += reward
        self._length += 1
        done = terminated | truncated
        infos: list[dict[str, Any]] = [self._empty] * self.num_envs
        self.last_outcomes = {k: v for k, v in info.items() if k.startswith("reward_")}
        if done.any():
            for row in np.flatnonzero(done).tolist():
                infos[row] = {
                    "terminal_observation": info["final_obs"][row],
                    "TimeLimit.truncated": bool(truncated[row] and not terminated[row]),
                    "episode": {"r": float(self._return[row]), "l": int(self._length[row]), "t": 0.0},
                }
            self._return[done] = 0.0
            self._length[done] = 0
        return obs, reward, done, infos

    def close(self) -> None:
        """Closes the batch."""
        self.env.close()

    def has_attr(self, attr_name: str) -> bool:
        """Whether the environment has the attribute."""
        return hasattr(self.env, attr_name)

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """The batch's attribute, once for every row asked for."""
        value = getattr(self.env, attr_name)
        return [value for _ in self._rows(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Sets the attribute of the batch; rows cannot differ."""
        if len(self._rows(indices)) != self.num_envs:
            raise ValueError(f"{attr_name} belongs to the whole batch; set it for all {self.num_envs} rows at once")
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: int | Iterable[int] | None = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls the batch's method once; a batched result is handed out row by row."""
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        rows = self._rows(indices)
        batched = isinstance(result, np.ndarray) and result.shape[:1] == (self.num_envs,)
        return [result[row] if batched else result for row in rows]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: int | Iterable[int] | None = None) -> list[bool]:
        """No row is wrapped; episodes are recorded here, as Monitor would."""
        from stable_baselines3.common.monitor import Monitor

        return [wrapper_class is Monitor for _ in self._rows(indices)]

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """There is nothing to render."""
        return [None] * self.num_envs

    def _rows(self, indices: int | Iterable[int] | None) -> list[int]:
        return list(self._get_indices(indices))
