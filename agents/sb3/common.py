"""What every algorithm of Stable-Baselines3 shares here: one training loop, its logs, and the refusal of what it cannot do."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam, KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from agents.ppo.args import TrainResult
from metarec_gym.envs.actions import blend_weights
from metarec_gym.envs.sb3 import SB3VecEnv
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import MlpPolicy
from metarec_gym.seeding import stream


@dataclass(frozen=True)
class Algorithm:
    """One learner of SB3 or sb3-contrib.

    Attributes:
        name: As in `experiments.train`.
        make: (environment, its number of rows, hyperparameters, seed) -> the untrained model.
        export: (model, action kind, strategies, meta) -> the policy that plays without SB3.
        actions: Kinds of action that it can choose.
        masks: Whether it leaves strategies out of service alone.
        off_policy: It learns from a replay buffer.
    """

    name: str
    make: Callable[[VecEnv, int, Any, int], BaseAlgorithm]
    export: Callable[[Any, str, tuple[str, ...], dict[str, Any]], MlpPolicy]
    actions: tuple[str, ...] = ("select", "blend", "slots")
    masks: bool = False
    off_policy: bool = False

    def train(
        self,
        env: MetaRecVectorEnv,
        args: Any,
        *,
        run_dir: str | Path | None = None,
        progress: bool = True,
        resume: bool = False,
    ) -> TrainResult:
        """Trains on `env` and returns the policy.

        Args:
            env: Numpy output, same-step autoreset.
            args: The algorithm's hyperparameters, with `seed`, `total_steps` and `gamma`.
            run_dir: Gets TensorBoard events and `policy.safetensors`; None writes nothing.
            progress: Prints a line with the time left.
            resume: Accepted for the sake of one call for all learners; a killed run starts again from its seed.

        Returns:
            The policy with its numbers.

        Raises:
            ValueError: When the algorithm cannot choose this kind of action, or strategies can be out of service and it knows
                no masks and is not told to learn without them.
        """
        action, name = env.config.action, self.name
        if action not in self.actions:
            ids = " or ".join(f"MetaRec/{kind.capitalize()}-v0" for kind in self.actions)
            raise ValueError(f"{name} cannot choose the actions of {action}; train it on {ids}")
        if may_mask(env) and not self.masks and not args.blind_to_masks:
            raise ValueError(
                f"{name} of Stable-Baselines3 knows no action masks, but strategies are unavailable; use agents.ppo or "
                "sb3_maskable_ppo, or let it meet outages as requests that nothing serves: --set blind_to_masks=True"
            )
        strategies = tuple(env.strategy_names)
        history = _History()
        outputs: list[KVWriter] = [history]
        if run_dir is not None:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            outputs.append(_TensorBoard(str(run_dir)))
        started = time.perf_counter()
        with isolated_generators():
            rows = SB3VecEnv(env)
            # numpy's global generator takes 32 bits
            seed = stream(args.seed, "sb3", "learner") % 2**32
            scaled = VecNormalize(rows, norm_obs=False, gamma=args.gamma, clip_reward=math.inf)
            model = self.make(scaled, env.num_envs, args, seed)
            model.set_logger(Logger(str(run_dir) if run_dir is not None else None, outputs))
            # after the constructor, which seeds the environment with the learner's; the users are those our PPO meets
            rows.seed(stream(args.seed, "ppo", "env"))
            # counted in iterations on policy; in episodes off policy, where all rows may end in one step
            every = env.num_envs if self.off_policy else 1
            report = _Report(self, args, action, strategies, progress)
            model.learn(args.total_steps, callback=report, log_interval=every)
        seconds = time.perf_counter() - started
        meta = {"agent": name, "seed": args.seed, "world": env.world.hash, "fold": env.config.fold, "action": action}
        policy = self.export(model, action, strategies, {**meta, "steps": model.num_timesteps})
        if run_dir is not None:
            policy.save(Path(run_dir) / "policy.safetensors")
            outputs[1].close()
        metrics: dict[str, float] = {}
        for row in history.rows:
            metrics |= {k: v for k, v in row.items() if k != "step"}
        return TrainResult(policy, model.num_timesteps, seconds, metrics, history.rows)


@contextmanager
def isolated_generators() -> Iterator[None]:
    """Gives the process-wide generators back as they were.

    Stable-Baselines3 seeds and draws from Python's, numpy's and torch's global generators. Nothing else here ever does, and
    nothing that runs after it may notice.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def may_mask(env: MetaRecVectorEnv) -> bool:
    """Whether a strategy can be out of service in this environment, now or later in an episode."""
    config = env.config
    leaves = any(event in ("added", "removed") for _, event, _ in config.schedule)
    return bool(config.unavailable) or leaves or config.outage_rate > 0


class _History(KVWriter):
    """Keeps every dumped row of scalars."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        row = {k: float(v) for k, v in key_values.items() if isinstance(v, int | float | np.number)}
        hidden = ("time/iterations", "time/time_elapsed", "time/total_timesteps", "time/episodes", "train/n_updates")
        self.rows.append({"step": float(step), **{k: v for k, v in row.items() if k not in hidden}})

    def close(self) -> None:
        """Nothing to close."""


class _TensorBoard(TensorBoardOutputFormat):
    """SB3's writer, but a run that starts again in its folder hides the points of the one that was killed."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=0)
        self._is_closed = False


class _Report(BaseCallback):
    """Adds strategy shares, return per request, the HParams table and a line with the time left."""

    def __init__(
        self, algorithm: Algorithm, args: Any, action: str, strategies: tuple[str, ...], progress: bool
    ) -> None:
        super().__init__()
        self.algorithm, self.args, self.action = algorithm, args, action
        self.strategies, self.progress = strategies, progress
        self.started = time.perf_counter()
        self.shown = 0.0
        self._forget()

    def _forget(self) -> None:
        self.reward, self.count = 0.0, 0
        self.served = np.zeros(len(self.strategies))

    def _on_training_start(self) -> None:
        settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in dataclasses.asdict(self.args).items()
        }
        # the loss that the algorithm logs: the HParams tab needs names of curves that exist
        metrics = {"rollout/ep_rew_mean": 0.0, "train/learning_rate": 0.0}
        if self.algorithm.name == "sb3_ppo":
            metrics = {"rollout/ep_rew_mean": 0.0, "train/value_loss": 0.0}
        self.logger.record("hparams", HParam({"agent": self.algorithm.name, **settings}, metrics))

    def _on_step(self) -> bool:
        # the raw reward; what the learner sees is scaled
        assert isinstance(self.training_env, VecNormalize)
        original = self.training_env.get_original_reward()
        self.reward, self.count = self.reward + float(original.sum()), self.count + original.size
        self.served += self._shares(np.asarray(self.locals["actions"]))
        if self.algorithm.off_policy and bool(self.locals["dones"].any()):
            # off-policy algorithms dump at episode ends, right after this
            self._record()
        return True

    def _shares(self, actions: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Requests that each strategy served in this step, (K,); a request shared by several is split."""
        if self.action == "blend":
            weight = blend_weights(torch.as_tensor(actions, dtype=torch.float32))
            shares: np.ndarray[Any, np.dtype[np.float64]] = (
                (weight / weight.sum(dim=1, keepdim=True)).sum(dim=0).numpy()
            )
            return shares.astype(np.float64)
        flat = actions.astype(np.int64).reshape(len(actions), -1)
        return np.bincount(flat.ravel(), minlength=len(self.strategies)) / flat.shape[1]

    def _record(self) -> None:
        for name, share in zip(self.strategies, (self.served / self.served.sum()).tolist(), strict=True):
            self.logger.record(f"metarec/action_share/{name}", share)
        self.logger.record("metarec/return_per_request", self.reward / self.count)
        self._forget()

    def _on_rollout_end(self) -> None:
        if not self.algorithm.off_policy:
            self._record()
        if not self.progress:
            return
        done, seconds = self.num_timesteps / self.args.total_steps, time.perf_counter() - self.started
        # an off-policy rollout is one step long: twice a second is often enough
        if done < 1 and seconds - self.shown < 0.5:
            return
        self.shown = seconds
        print(
            f"\r{self.algorithm.name} {self.num_timesteps:,} steps  {self.num_timesteps / seconds:,.0f} steps/s  "
            f"{max(seconds / done - seconds, 0.0):.0f} s left   ",
            end="\n" if done >= 1 else "",
            file=sys.stderr,
            flush=True,
        )

    def _on_training_end(self) -> None:
        # SB3 never writes the last update's scalars: it dumps before it trains
        self.logger.dump(self.num_timesteps)
