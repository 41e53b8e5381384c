"""PPO of Stable-Baselines3 on a MetaRec environment: the reference that our own PPO is read against, under the same tags.

    python -m agents.sb3 --world worlds/movielens_100k --seed 0 --run-dir runs/sb3_0

Hyperparameters carry the names and defaults of `agents.ppo`. Differences that remain: rewards are scaled by SB3's running
`VecNormalize` (ours are by a constant), `train/*` is logged one iteration late, action masks are not known, and a killed run
starts again from its seed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam, KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecNormalize

from metarec_gym.envs.sb3 import SB3VecEnv
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import MlpPolicy
from metarec_gym.seeding import stream


@dataclass(frozen=True)
class Args:
    """Hyperparameters, named as in `agents.ppo`."""

    seed: int = 0
    """Seed of the network, the actions, the minibatches and the environment."""
    total_steps: int = 1_000_000
    """Requests to learn from; rounded up to whole iterations."""
    num_steps: int = 33
    """Requests per environment and iteration."""
    learning_rate: float = 2e-3
    """Adam's step size in the first iteration."""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """`linear` falls to zero just after the last iteration."""
    gamma: float = 0.9
    """Discount of the next request's value; ten requests of foresight cover what one episode can teach about a user."""
    gae_lambda: float = 0.95
    """Exponential weight of longer advantage estimates."""
    epochs: int = 4
    """Passes over each rollout."""
    minibatch_size: int = 1056
    """Requests per gradient step."""
    clip_range: float = 0.2
    """The probability ratio counts only within 1 +- this."""
    clip_range_vf: float | None = None
    """Values may move by at most this per iteration; None does not clip."""
    normalize_advantage: bool = True
    """Advantages get mean 0 and deviation 1 in every minibatch."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the mean squared value error."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""
    target_kl: float | None = None
    """The update ends before the gradient step whose KL estimate exceeds 1.5 times this; None never ends it."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the tanh layers, of actor and critic alike."""
    stats_window: int = 256
    """Episodes that the logged mean return and length run over."""


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind; the fields are those of `agents.ppo`."""

    policy: MlpPolicy
    steps: int
    seconds: float
    metrics: dict[str, float]
    history: list[dict[str, float]]


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


class _History(KVWriter):
    """Keeps every dumped row of scalars."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        row = {k: float(v) for k, v in key_values.items() if isinstance(v, int | float | np.number)}
        hidden = ("time/iterations", "time/time_elapsed", "time/total_timesteps", "train/n_updates")
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

    def __init__(self, args: Args, strategies: tuple[str, ...], progress: bool) -> None:
        super().__init__()
        self.args, self.strategies, self.progress = args, strategies, progress
        self.started = time.perf_counter()
        self.reward, self.count = 0.0, 0

    def _on_training_start(self) -> None:
        settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in dataclasses.asdict(self.args).items()
        }
        table = HParam({"agent": "sb3_ppo", **settings}, {"rollout/ep_rew_mean": 0.0, "train/value_loss": 0.0})
        self.logger.record("hparams", table)

    def _on_step(self) -> bool:
        # the raw reward; what the learner sees is scaled
        assert isinstance(self.training_env, VecNormalize)
        original = self.training_env.get_original_reward()
        self.reward, self.count = self.reward + float(original.sum()), self.count + original.size
        return True

    def _on_rollout_end(self) -> None:
        actions = self.locals["rollout_buffer"].actions.astype(np.int64).ravel()
        shares = np.bincount(actions, minlength=len(self.strategies)) / actions.size
        for name, share in zip(self.strategies, shares.tolist(), strict=True):
            self.logger.record(f"metarec/action_share/{name}", share)
        self.logger.record("metarec/return_per_request", self.reward / self.count)
        self.reward, self.count = 0.0, 0
        if self.progress:
            done = self.num_timesteps / self.args.total_steps
            seconds = time.perf_counter() - self.started
            print(
                f"\rsb3_ppo {self.num_timesteps:,} steps  {self.num_timesteps / seconds:,.0f} steps/s  "
                f"{max(seconds / done - seconds, 0.0):.0f} s left   ",
                end="\n" if done >= 1 else "",
                file=sys.stderr,
                flush=True,
            )

    def _on_training_end(self) -> None:
        # SB3 never writes the last update's scalars: it dumps before it trains
        self.logger.dump(self.num_timesteps)


def learning_rate(args: Args, num_envs: int) -> Any:
    """The schedule of `agents.ppo` in SB3's terms: a function of the share of steps that are left after the rollout."""
    per_iteration = args.num_steps * num_envs
    whole = math.ceil(args.total_steps / per_iteration) * per_iteration

    def at(progress_remaining: float) -> float:
        before = max((1.0 - progress_remaining) * args.total_steps - per_iteration, 0.0)
        return args.learning_rate * (1.0 - before / whole if args.lr_schedule == "linear" else 1.0)

    return at


def export_policy(model: PPO, strategies: tuple[str, ...], meta: dict[str, Any]) -> MlpPolicy:
    """A copy of the model's actor as a policy that needs no SB3."""
    extractor: Any = model.policy.mlp_extractor
    modules = [*extractor.policy_net, model.policy.action_net]
    linear = [module for module in modules if isinstance(module, torch.nn.Linear)]
    return MlpPolicy([(m.weight.clone(), m.bias.clone()) for m in linear], strategies, meta=meta)


def train(
    env: MetaRecVectorEnv,
    args: Args,
    *,
    run_dir: str | Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> TrainResult:
    """Trains on `env` and returns the policy.

    Args:
        env: Numpy output, same-step autoreset.
        args: Hyperparameters.
        run_dir: Gets TensorBoard events and `policy.safetensors`; None writes nothing.
        progress: Prints a line with the time left.
        resume: Accepted for the sake of one call for all agents; a killed run always starts again from its seed.

    Returns:
        The policy with its numbers.

    Raises:
        ValueError: When strategies are out of service.
    """
    if not bool(env.action_masks().all()):
        raise ValueError(
            "PPO of Stable-Baselines3 knows no action masks, but strategies are unavailable; use agents.ppo"
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
        model = PPO(
            "MlpPolicy",
            VecNormalize(rows, norm_obs=False, gamma=args.gamma, clip_reward=math.inf),
            learning_rate=learning_rate(args, env.num_envs),
            n_steps=args.num_steps,
            batch_size=args.minibatch_size,
            n_epochs=args.epochs,
            gamma=args.gamma,
            gae_lambda=args.gae_lambda,
            clip_range=args.clip_range,
            clip_range_vf=args.clip_range_vf,
            normalize_advantage=args.normalize_advantage,
            ent_coef=args.ent_coef,
            vf_coef=args.vf_coef,
            max_grad_norm=args.max_grad_norm,
            target_kl=args.target_kl,
            stats_window_size=args.stats_window,
            policy_kwargs={"net_arch": list(args.hidden), "activation_fn": torch.nn.Tanh},
            # numpy's global generator takes 32 bits
            seed=stream(args.seed, "sb3", "learner") % 2**32,
            device="cpu",
        )
        model.set_logger(Logger(str(run_dir) if run_dir is not None else None, outputs))
        # after the constructor, which seeds the environment with the learner's; the users are those our PPO meets
        rows.seed(stream(args.seed, "ppo", "env"))
        model.learn(args.total_steps, callback=_Report(args, strategies, progress))
    seconds = time.perf_counter() - started
    meta = {"agent": "sb3_ppo", "seed": args.seed, "world": env.world.hash, "fold": env.config.fold}
    policy = export_policy(model, strategies, {**meta, "steps": model.num_timesteps})
    if run_dir is not None:
        policy.save(Path(run_dir) / "policy.safetensors")
        outputs[1].close()
    metrics: dict[str, float] = {}
    for row in history.rows:
        metrics |= {k: v for k, v in row.items() if k != "step"}
    return TrainResult(policy, model.num_timesteps, seconds, metrics, history.rows)


@dataclass(frozen=True)
class Command:
    """Trains PPO of Stable-Baselines3 on `MetaRec/Select-v0`."""

    args: Args = dataclasses.field(default_factory=Args)
    """Hyperparameters."""
    world: str | None = None
    """Folder of a world; the embedded synthetic one if absent."""
    fold: Literal["A", "B"] = "A"
    """Whose users and judge to train on."""
    num_envs: int = 256
    """Users served at once."""
    run_dir: str | None = None
    """Where to write; `runs/sb3_<seed>` if absent."""
    threads: int = 1
    """CPU threads; these networks are too small to gain from more, and lose much on a busy machine."""


def main() -> None:
    """The command line."""
    import tyro

    command = tyro.cli(Command, config=(tyro.conf.OmitArgPrefixes,))
    torch.set_num_threads(command.threads)
    env = MetaRecVectorEnv(command.num_envs, world=command.world, fold=command.fold, autoreset_mode="SameStep")
    run_dir = Path(command.run_dir or f"runs/sb3_{command.args.seed}")
    result = train(env, command.args, run_dir=run_dir)
    row = {"steps": result.steps, "seconds": result.seconds, **result.metrics}
    (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(command), indent=2) + "\n")
    (run_dir / "command.txt").write_text(" ".join(["python -m agents.sb3", *sys.argv[1:]]) + "\n")
    (run_dir / "result.json").write_text(json.dumps(row, indent=2) + "\n")
    print(json.dumps({"run_dir": str(run_dir), **row}, indent=2))


if __name__ == "__main__":
    main()
