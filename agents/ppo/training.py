"""Iterations, checkpoints and a whole run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from agents.ppo import learning, rollout
from agents.ppo.args import Args, Schedule, TrainResult
from agents.ppo.captured import CapturedCollector, way_of
from agents.ppo.captured_update import CapturedUpdate, updates_captured
from agents.ppo.heads import Weights, action_mask, head_of
from agents.ppo.networks import ActorCritic, export_policy, take_actor
from agents.ppo.normalise import Normaliser
from agents.ppo.team import SOLO, Team
from metarec_gym.policy import MlpPolicy
from metarec_gym.seeding import stream, torch_generator

CHECKPOINT_SCHEMA = 2


class Training:
    """Everything that a checkpoint has to hold, and how it goes in and out of one.

    Args:
        env: See `train`.
        args: Hyperparameters.
        team: Processes that learn together; each has its own `env`.
        start: See `train`.
    """

    _COUNTERS = ("iteration", "steps", "seconds", "metrics", "reward_scale", "best_return")

    def __init__(
        self, env: VectorEnv[Any, Any, Any], args: Args, team: Team = SOLO, start: MlpPolicy | None = None
    ) -> None:
        mode = rollout.autoreset_mode(env)
        obs_space, action_space = env.single_observation_space, env.single_action_space
        if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
            raise ValueError(f"PPO needs flat Box observations, got {obs_space}; flatten them")
        if team.size > 1 and mode != AutoresetMode.SAME_STEP:
            raise ValueError("several processes need autoreset_mode='SameStep': else their minibatches differ in size")
        self.env, self.args, self.team = env, args, team
        # the first process is the same as a process alone
        me = (team.rank,) if team.rank else ()
        first, infos = env.reset(seed=stream(args.seed, "ppo", "env", *me))
        device = first.device if isinstance(first, Tensor) else torch.device("cpu")
        obs = torch.as_tensor(first, dtype=torch.float32, device=device)
        head = head_of(action_space, args.log_std_init)
        weights_rng = torch_generator(args.seed, "ppo", "network")
        self.net = ActorCritic(obs.shape[1], head, args, weights_rng).to(device)
        if start is not None:
            take_actor(self.net, start)
        self.optimizer = adam(self.net.parameters(), args, device)
        self.normaliser = Normaliser(
            obs.shape[1], obs=args.normalize_obs, reward=args.normalize_reward, clip_obs=args.clip_obs,
            clip_reward=args.clip_reward, gamma=args.gamma, team=team,
        )  # fmt: skip
        nothing, size = torch.zeros(len(obs), device=device), self.net.size
        self.live = rollout.Live(
            obs=self.normaliser.observation(obs),
            mask=action_mask(infos, len(obs), head, device),
            done=nothing > 0,
            start=nothing == 0,
            memory=torch.zeros(len(obs), size, device=device),
            critic_memory=torch.zeros(len(obs), size, device=device),
            discounted=nothing.clone(),
            episode_return=nothing.clone(),
            episode_length=nothing.clone(),
            numpy=not isinstance(first, Tensor),
        )
        self.generators = {
            name: torch_generator(args.seed, "ppo", name, *me, device=device) for name in ("action", "minibatch")
        }
        self.way = way_of(env, args)
        """How requests are played: eager, compile or graph."""
        self.captured = None if self.way == "eager" else CapturedCollector(env, self.net, args.num_steps, self.way)
        self.learner = (
            CapturedUpdate(self.net, self.optimizer, args, "graph") if updates_captured(self.way, args, team) else None
        )
        self.recent: deque[tuple[float, float]] = deque(maxlen=args.stats_window)
        self.iteration, self.steps, self.seconds = 0, 0, 0.0
        self.metrics: dict[str, float] = {}
        self.reward_scale = 1.0 if args.normalize_reward else args.reward_scale
        self.best_return: float | None = None
        self.num_iterations = math.ceil(args.total_steps / (args.num_steps * len(obs) * team.size))
        count = getattr(head, "sizes", [head.outputs])[0]
        names = getattr(env, "strategy_names", None) or (f"action_{i}" for i in range(count))
        self.strategies = tuple(names)
        world, config = getattr(env, "world", None), getattr(env, "config", None)
        self.meta = {"agent": "ppo", "seed": args.seed, "world": getattr(world, "hash", None),
                     "fold": getattr(config, "fold", None)}  # fmt: skip
        setting = None if config is None else dataclasses.asdict(config)
        # how requests are played is not what a run is: a checkpoint may go on in another way
        settings = {name: value for name, value in dataclasses.asdict(args).items() if name != "rollout"}
        identity = {"args": settings, "num_envs": len(obs), "obs_dim": obs.shape[1], "env": setting,
                    "judges": getattr(env, "judges", None), "processes": team.size}  # fmt: skip
        if start is not None:
            settings["start"] = [float(part.double().sum()) for layer in start.layers for part in layer]
        # through JSON, so that it compares with what a checkpoint gives back
        self.identity: dict[str, Any] = json.loads(json.dumps(identity | self.meta))

    def _left(self, schedule: Schedule) -> float:
        """What a schedule leaves of its full value in this iteration."""
        counted = self.iteration + (self.args.schedules_count == "after")
        return 1.0 - counted / self.num_iterations if schedule == "linear" else 1.0

    def _orders(self, size: int, device: torch.device) -> Iterator[Tensor]:
        order = torch.zeros(0)
        for epoch in range(self.args.epochs):
            if epoch == 0 or self.args.shuffle == "epoch":
                order = torch.randperm(size, generator=self.generators["minibatch"], device=device)
            yield order

    def iterate(self) -> dict[str, float]:
        """One rollout and one update; returns its scalars by tag."""
        args, team, started = self.args, self.team, time.perf_counter()
        learning_rate = args.learning_rate * self._left(args.lr_schedule)
        set_learning_rate(self.optimizer, learning_rate)
        now = dataclasses.replace(
            args,
            ent_coef=args.ent_coef * self._left(args.ent_schedule),
            clip_range=args.clip_range * self._left(args.clip_schedule),
        )
        if self.captured is not None:
            roll = self.captured.collect(self.live, self.generators["action"])
        else:
            roll = rollout.collect(
                self.env, self.net, self.live, args.num_steps, self.generators["action"], self.normaliser
            )
        if self.reward_scale is None:
            # fixed from here on: a scale that moves would move the critic's targets under it
            self.reward_scale = learning.typical_return(roll, args.gamma, team)
        scalars = self._learn(roll, now, self.reward_scale)
        self._report(roll, scalars, now, learning_rate)
        self.seconds += time.perf_counter() - started
        self.metrics["time/fps"] = self.steps / self.seconds
        return self.metrics

    def _learn(self, roll: rollout.Rollout, now: Args, reward_scale: float) -> dict[str, Tensor]:
        """The gradient steps of one iteration; what they log, on the device."""
        if self.learner is not None:
            whole = torch.stack(list(self._orders(roll.reward.numel(), roll.reward.device)))
            return self.learner.learn(roll, now, reward_scale, whole)
        batch, self.live.critic_memory = learning.make_batch(self.net, roll, now, reward_scale, self.team)
        orders = self._orders(len(batch), roll.obs.device)
        return learning.update(self.net, self.optimizer, batch, now, orders, self.team)

    def _report(self, roll: rollout.Rollout, scalars: dict[str, Tensor], now: Args, learning_rate: float) -> None:
        """The iteration's numbers: gathered on the device, then one copy."""
        served, head = roll.valid.sum(), self.net.head
        per_request = torch.where(roll.valid, roll.reward, 0.0).sum() / served
        logged = self.team.mean(torch.cat([torch.stack([*scalars.values(), per_request]).float(), self._shares(roll)]))
        std = head.log_std.detach().exp().mean() if isinstance(head, Weights) else torch.zeros_like(per_request)
        # float64 holds any count of requests
        own = torch.stack([served.double(), std.double()])
        packed = torch.cat([own, logged.double(), roll.ended_return.flatten(), roll.ended_length.flatten()]).cpu()
        size, deviation, numbers = int(packed[0]), float(packed[1]), packed[2 : 2 + len(logged)].tolist()
        ended = packed[2 + len(logged) :]
        returns, lengths = ended.reshape(2, -1)
        finished = ~returns.isnan()
        self.recent.extend(zip(returns[finished].tolist(), lengths[finished].tolist(), strict=True))

        self.iteration, self.steps = self.iteration + 1, self.steps + size * self.team.size
        kind = "action_mean" if isinstance(head, Weights) else "action_share"
        tags = [*scalars, "metarec/return_per_request", *(f"metarec/{kind}/{name}" for name in self.strategies)]
        self.metrics = dict(zip(tags, numbers, strict=True))
        self.metrics["train/learning_rate"] = learning_rate
        self.metrics["train/clip_range"] = now.clip_range
        if isinstance(head, Weights):
            self.metrics["train/std"] = deviation
        if self.recent:
            self.metrics["rollout/ep_rew_mean"] = sum(r for r, _ in self.recent) / len(self.recent)
            self.metrics["rollout/ep_len_mean"] = sum(n for _, n in self.recent) / len(self.recent)

    def _shares(self, roll: rollout.Rollout) -> Tensor:
        """How often each strategy was chosen, or its mean weight; (K,)."""
        if isinstance(self.net.head, Weights):
            return self.net.head.for_env(roll.action[roll.valid]).mean(dim=0)
        # a sum by scattering: bincount would wait for the device to say how many there are
        action = roll.action.flatten(0, 1).flatten()
        served = roll.valid.flatten().repeat_interleave(action.numel() // roll.valid.numel())
        count = torch.zeros(len(self.strategies), dtype=torch.int64, device=action.device)
        return count.scatter_add_(0, action, served.long()).float() / served.sum().clamp(min=1)

    def improved(self) -> bool:
        """True when the mean return of a full window of episodes is the best so far; notes it."""
        if len(self.recent) < self.args.stats_window:
            return False
        mean = self.metrics["rollout/ep_rew_mean"]
        better = self.best_return is None or mean > self.best_return
        self.best_return = mean if better else self.best_return
        return better

    def policy(self) -> MlpPolicy:
        """The actor as it is now."""
        return export_policy(self.net, self.strategies, {**self.meta, "steps": self.steps}, self.normaliser.exported())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": tensor for name, tensor in state.items()}
        tensors |= {f"live.{name}": tensor for name, tensor in self.live.tensors().items()}
        tensors |= {f"norm.{name}": tensor for name, tensor in self.normaliser.tensors().items()}
        return tensors | {f"rng.{name}": generator.get_state() for name, generator in self.generators.items()}

    def save(self, path: Path) -> None:
        """Writes one safetensors file with the JSON facts in its header; call it between iterations only."""
        env_state: dict[str, Tensor] = self.env.get_state()  # type: ignore[attr-defined]
        tensors = self._tensors() | {f"env.{name}": tensor for name, tensor in env_state.items()}
        # clones: safetensors refuses tensors that share memory
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        facts = {name: getattr(self, name) for name in self._COUNTERS} | {"recent": list(self.recent)}
        header = {"schema": str(CHECKPOINT_SCHEMA), "facts": json.dumps(facts | self.identity)}
        # written aside and renamed: a kill at any moment leaves the last checkpoint whole
        partial = path.with_name(path.name + ".partial")
        save_file(copies, str(partial), metadata=header)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Takes the state of a checkpoint, so that the run goes on as if it had never stopped."""
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata()
            if int(header["schema"]) != CHECKPOINT_SCHEMA:
                raise ValueError(f"{path} has schema {header['schema']}, expected {CHECKPOINT_SCHEMA}; train anew")
            tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, json.loads(header["facts"])  # noqa: SIM118
        for name, wanted in self.identity.items():
            if facts[name] != wanted:
                raise ValueError(
                    f"the checkpoint {path} was written with {name} = {facts[name]}, this run has {wanted}; use the "
                    "same settings, another --run-dir, or start anew without --resume"
                )

        def group(prefix: str) -> dict[str, Tensor]:
            device = self.live.obs.device
            return {k[len(prefix) :]: v.to(device) for k, v in tensors.items() if k.startswith(prefix)}

        self.net.load_state_dict(group("net."))
        adam = self.optimizer.state_dict()
        for name, tensor in group("adam.").items():
            index, _, key = name.partition(".")
            adam["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(adam)
        if self.learner is not None:
            self.learner.forget()
        self.live = rollout.Live(**group("live."), numpy=self.live.numpy)
        self.normaliser.load(group("norm."))
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"rng.{name}"])
        self.env.set_state(group("env."))  # type: ignore[attr-defined]
        self.recent.extend((r, n) for r, n in facts["recent"])
        for name in self._COUNTERS:
            setattr(self, name, facts[name])


def adam(parameters: Any, args: Args, device: torch.device) -> torch.optim.Adam:
    """The optimiser; on CUDA nothing in it waits for the host, and its learning rate is a tensor, which a graph reads anew."""
    on_gpu = device.type == "cuda"
    return torch.optim.Adam(
        parameters,
        lr=torch.tensor(args.learning_rate, device=device) if on_gpu else args.learning_rate,
        eps=args.adam_eps,
        fused=device.type in ("cpu", "cuda"),
        capturable=on_gpu,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The step size from now on, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def train(
    env: VectorEnv[Any, Any, Any],
    args: Args,
    *,
    run_dir: str | Path | None = None,
    progress: bool = True,
    resume: bool = False,
    team: Team = SOLO,
    start: MlpPolicy | None = None,
) -> TrainResult:
    """Trains on `env` and returns the policy.

    Args:
        env: A vector environment with flat Box observations and Discrete, MultiDiscrete or Box actions, numpy or torch,
            SAME_STEP or NEXT_STEP.
        args: Hyperparameters.
        run_dir: Gets TensorBoard events, `policy.safetensors`, `best.safetensors` (the policy after the iteration with the best
            mean return of `stats_window` episodes; it played them before its last update) and, if the environment has
            `get_state`, `checkpoint.safetensors`; None writes nothing.
        progress: Prints a line with the time left.
        resume: Goes on from the checkpoint in `run_dir` where there is one.
        team: Processes that learn together. The first one writes; the others leave only their checkpoints,
            `checkpoint_<rank>.safetensors`.
        start: The actor to begin with, of the same widths; see `imitate`. None draws one.

    Returns:
        The policy with its numbers.
    """
    training, history = Training(env, args, team, start), []
    folder = Path(run_dir) if run_dir is not None else None
    mine = f"_{team.rank}" if team.rank else ""
    checkpoint = folder / f"checkpoint{mine}.safetensors" if folder is not None and hasattr(env, "get_state") else None
    if checkpoint is not None and resume:
        _resume(training, checkpoint)
    writer = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if folder is not None and team.rank == 0:
        writer = _writer(folder, args, training.steps)
    for _ in range(training.iteration, training.num_iterations):
        metrics = training.iterate()
        history.append({"step": float(training.steps), **metrics})
        if folder is not None and writer is not None:
            for tag, number in metrics.items():
                writer.add_scalar(tag, number, training.steps)
            writer.flush()
            if training.improved():
                training.policy().save(folder / "best.safetensors")
        last = training.iteration == training.num_iterations
        if checkpoint is not None and (last or training.iteration % args.checkpoint_every == 0):
            training.save(checkpoint)
        if progress and team.rank == 0:
            left_s = (training.num_iterations - training.iteration) * training.seconds / training.iteration
            print(
                f"\rppo {training.steps:,} steps  return {metrics.get('rollout/ep_rew_mean', math.nan):.3f}  "
                f"{metrics['time/fps']:,.0f} steps/s  {left_s:.0f} s left   ",
                end="\n" if last else "", file=sys.stderr, flush=True,
            )  # fmt: skip
    policy = training.policy()
    if folder is not None and writer is not None:
        policy.save(folder / "policy.safetensors")
        writer.close()
    return TrainResult(policy, training.steps, training.seconds, training.metrics, history)


def _resume(training: Training, checkpoint: Path) -> None:
    """Loads the checkpoint where there is one; all processes must then stand at the same iteration."""
    if checkpoint.is_file():
        training.load(checkpoint)
    team = training.team
    mean = float(team.mean(torch.tensor(float(training.iteration), dtype=torch.float64)))
    if mean != training.iteration:
        raise ValueError(
            f"the processes' checkpoints in {checkpoint.parent} are of different iterations (this one's of "
            f"{training.iteration}, {mean:.1f} on average): they were killed while writing; start anew without --resume"
        )


def _writer(folder: Path, args: Args, steps: int) -> Any:
    """A TensorBoard writer with the HParams table and the page of strategy shares."""
    from torch.utils.tensorboard.summary import hparams
    from torch.utils.tensorboard.writer import SummaryWriter

    # a killed run may have logged past its last checkpoint: TensorBoard hides those points, they will come again
    writer = SummaryWriter(str(folder), purge_step=steps + 1 if steps else 0)
    if not steps:
        fields = dataclasses.asdict(args).items()
        settings = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in fields}
        # written into this run's own file: SummaryWriter.add_hparams would split the run in two
        for summary in hparams({"agent": "ppo", **settings}, {"rollout/ep_rew_mean": 0.0, "train/value_loss": 0.0}):
            writer._get_file_writer().add_summary(summary)
        writer.add_custom_scalars({"Strategies": {"share": ["Multiline", ["metarec/action_share/.*"]]}})
    return writer


def learn_ppo(lesson: Any, **settings: Any) -> MlpPolicy:
    """Trains on a lesson (`agents.roster.Lesson`); `settings` are further fields of `Args`."""
    args = Args(seed=lesson.seed, total_steps=lesson.requests, num_steps=lesson.horizon, **settings)
    return train(lesson.make_env(256), args, progress=False).policy


def learn_ppo_gru(lesson: Any) -> MlpPolicy:
    """The same with a memory of the episode."""
    return learn_ppo(lesson, recurrent=True)
