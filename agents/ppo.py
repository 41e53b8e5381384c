"""Proximal policy optimisation on one page: rollout, advantages and update stay on the environment's device.

It follows Stable-Baselines3's PPO (same losses, same tags in TensorBoard) with four differences on purpose: the
learning rate falls from its full value and never below zero; action masks are honoured; `train/*` is logged with the
rollout it belongs to, not one iteration later; and a run can be killed and resumed, bit for bit on CPU.

    python -m agents.ppo --env-id MetaRec/Select-v0 --world worlds/movielens_100k --seed 0 --run-dir runs/ppo_0
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metarec_gym.policy import MlpPolicy, sample_actions
from metarec_gym.seeding import stream, torch_generator

CHECKPOINT_SCHEMA = 1


@dataclass(frozen=True)
class Args:
    """Hyperparameters of the learner; the number of environments is the environment's own."""

    seed: int = 0
    """Seed of the network, the actions, the minibatches and the environment (each has its own stream)."""
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
    """Requests per gradient step; the last one of a pass may be smaller."""
    clip_range: float = 0.2
    """The probability ratio counts only within 1 +- this."""
    clip_range_vf: float | None = None
    """Values may move by at most this per iteration; None does not clip."""
    normalize_advantage: bool = True
    """Advantages get mean 0 and deviation 1 in every minibatch."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the mean squared value error (no further half, as in Stable-Baselines3)."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""
    target_kl: float | None = None
    """The update ends before the gradient step whose KL estimate exceeds 1.5 times this; None never ends it."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the tanh layers, of actor and critic alike."""
    reward_scale: float | None = None
    """Rewards are divided by this; None takes the root mean square of the first rollout's discounted returns: so the
    critic starts within reach of its targets, whatever the unit of the reward."""
    stats_window: int = 256
    """Episodes that the logged mean return and length run over."""
    checkpoint_every: int = 10
    """Iterations between checkpoints; the last iteration always writes one."""


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind."""

    policy: MlpPolicy
    """The actor, without training code."""
    steps: int
    """Requests learned from."""
    seconds: float
    """Wall time of all iterations, interruptions excluded."""
    metrics: dict[str, float]
    """The last iteration's scalars, by TensorBoard tag."""
    history: list[dict[str, float]]
    """The scalars of every iteration that this process ran, plus `step`."""


# ---- network


def _mlp(widths: list[int], last_gain: float, generator: torch.Generator) -> torch.nn.Sequential:
    modules: list[torch.nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        last = index == len(widths) - 2
        # built on "meta": the default initialisation would draw from torch's global generator
        layer = torch.nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
        torch.nn.init.orthogonal_(layer.weight, last_gain if last else math.sqrt(2.0), generator=generator)
        torch.nn.init.zeros_(layer.bias)
        modules += [layer] if last else [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*modules)


class ActorCritic(torch.nn.Module):
    """Two tanh networks that share nothing: strategy logits and the state's value."""

    def __init__(self, obs_dim: int, num_strategies: int, hidden: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.actor = _mlp([obs_dim, *hidden, num_strategies], 0.01, generator)
        self.critic = _mlp([obs_dim, *hidden, 1], 1.0, generator)

    def log_probs(self, obs: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities, -1e8 or less where masked; (batch, obs_dim) and bool (batch, K) -> (batch, K)."""
        # finite, so that 0 * log 0 is 0 in the entropy; far enough that exp gives exactly 0 and the gradient is 0
        return torch.log_softmax(self.actor(obs).masked_fill(~mask, -1e8), dim=-1)

    def value(self, obs: Tensor) -> Tensor:
        """Expected discounted return; (..., obs_dim) -> (...)."""
        return self.critic(obs)[..., 0]  # type: ignore[no-any-return]


def export_policy(net: ActorCritic, strategies: tuple[str, ...], meta: dict[str, Any]) -> MlpPolicy:
    """A copy of the actor as a policy that needs no training code."""
    linear = [module for module in net.actor if isinstance(module, torch.nn.Linear)]
    return MlpPolicy([(m.weight.clone(), m.bias.clone()) for m in linear], strategies, meta=meta).to("cpu")


# ---- rollout


@dataclass
class Live:
    """What one request hands to the next, all (num_envs, ...): the part of a run that lies between env and learner."""

    obs: Tensor
    mask: Tensor
    """bool (num_envs, K)."""
    done: Tensor
    """True where the previous step ended the episode."""
    episode_return: Tensor
    episode_length: Tensor
    numpy: bool
    """The environment takes and gives arrays; not part of a checkpoint."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {name: tensor for name, tensor in vars(self).items() if name != "numpy"}


@dataclass
class Rollout:
    """One iteration's requests, time first: (num_steps, num_envs, ...)."""

    obs: Tensor
    """One step longer than the rest: its last row is where the next iteration starts."""
    mask: Tensor
    action: Tensor
    log_prob: Tensor
    reward: Tensor
    terminated: Tensor
    done: Tensor
    valid: Tensor
    """False on the rows that NEXT_STEP spends on a reset: nobody was served."""
    ended_return: Tensor
    """Return of the episode that ended here, NaN where none did."""
    ended_length: Tensor
    final: list[tuple[int, Tensor, Tensor]]
    """SAME_STEP truncations: (step, rows, their last observations)."""


def autoreset_mode(env: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """The mode of `env`; the ones that cannot be learned from here are refused."""
    mode = env.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        raise ValueError(f"autoreset_mode is {mode}; PPO needs SAME_STEP or NEXT_STEP: pass autoreset_mode='SameStep'")
    return AutoresetMode(mode)


def action_mask(infos: dict[str, Any], like: Tensor, num_strategies: int) -> Tensor:
    """Available strategies from `infos`, all of them where it has none; bool (num_envs, K)."""
    if "action_mask" not in infos:
        return torch.ones(like.shape[0], num_strategies, dtype=torch.bool, device=like.device)
    return torch.as_tensor(infos["action_mask"], device=like.device).to(torch.bool)


@torch.no_grad()
def collect(
    env: VectorEnv[Any, Any, Any], net: ActorCritic, live: Live, num_steps: int, generator: torch.Generator
) -> Rollout:
    """Plays `num_steps` requests in every environment and moves `live` along."""
    same_step, device = autoreset_mode(env) == AutoresetMode.SAME_STEP, live.obs.device
    (num_envs, num_strategies), obs_dim = live.mask.shape, live.obs.shape[1]

    def empty(dtype: torch.dtype, *extra: int, steps: int = num_steps) -> Tensor:
        return torch.empty(steps, num_envs, *extra, dtype=dtype, device=device)

    roll = Rollout(
        obs=empty(torch.float32, obs_dim, steps=num_steps + 1),
        mask=empty(torch.bool, num_strategies),
        action=empty(torch.int64),
        log_prob=empty(torch.float32),
        reward=empty(torch.float32),
        terminated=empty(torch.bool),
        done=empty(torch.bool),
        valid=empty(torch.bool).fill_(True),
        ended_return=empty(torch.float32),
        ended_length=empty(torch.float32),
        final=[],
    )
    draws = torch.rand(num_steps, num_envs, generator=generator, device=device)
    for t in range(num_steps):
        if not same_step:
            roll.valid[t] = ~live.done
        roll.obs[t], roll.mask[t] = live.obs, live.mask
        log_probs = net.log_probs(live.obs, live.mask)
        action = sample_actions(log_probs.exp(), draws[t])
        roll.action[t], roll.log_prob[t] = action, log_probs.gather(1, action[:, None])[:, 0]

        obs, reward, terminated, truncated, infos = env.step(action.cpu().numpy() if live.numpy else action)
        roll.reward[t] = torch.as_tensor(reward, device=device)
        roll.terminated[t] = torch.as_tensor(terminated, device=device)
        truncated = torch.as_tensor(truncated, device=device)
        live.done = roll.terminated[t] | truncated
        roll.done[t] = live.done
        if same_step and "final_obs" in infos:
            # the returned row already belongs to the next episode; the last one's value is V(final_obs)
            rows = (truncated & ~roll.terminated[t]).nonzero()[:, 0]
            if len(rows):
                roll.final.append((t, rows, _rows_of(infos["final_obs"], rows)))
        live.obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
        live.mask = action_mask(infos, live.obs, num_strategies)

        live.episode_return = live.episode_return + torch.where(roll.valid[t], roll.reward[t], 0.0)
        live.episode_length = live.episode_length + roll.valid[t]
        roll.ended_return[t] = torch.where(live.done, live.episode_return, torch.nan)
        roll.ended_length[t] = torch.where(live.done, live.episode_length, torch.nan)
        live.episode_return = torch.where(live.done, 0.0, live.episode_return)
        live.episode_length = torch.where(live.done, 0.0, live.episode_length)
    roll.obs[num_steps] = live.obs
    if not bool(roll.mask.any(dim=-1).all()):
        raise ValueError("an action_mask forbids every strategy; an environment must leave at least one available")
    return roll


def _rows_of(final_obs: Any, rows: Tensor) -> Tensor:
    if isinstance(final_obs, np.ndarray) and final_obs.dtype == object:  # SyncVectorEnv: None in the rows that go on
        final_obs = np.stack([final_obs[i] for i in rows.tolist()])
        return torch.as_tensor(final_obs, dtype=torch.float32, device=rows.device)
    return torch.as_tensor(final_obs, dtype=torch.float32, device=rows.device)[rows]


# ---- advantages


@torch.no_grad()
def values_of(net: ActorCritic, roll: Rollout) -> tuple[Tensor, Tensor]:
    """Values of each request's state and of the state it led to, both (num_steps, num_envs)."""
    values = net.value(roll.obs)
    # NEXT_STEP shows the last observation of an episode as the reset row's obs, so the shift is right for it too
    next_values = values[1:].clone()
    for t, rows, final_obs in roll.final:
        next_values[t, rows] = net.value(final_obs)
    return values[:-1], next_values


def advantages_of(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimates; all arguments and the result are (num_steps, num_envs).

    A terminated episode has no future; a truncated one is worth what the critic says of its last state (`next_value`);
    in both the sum of later errors ends.
    """
    # delta_t = r_t + gamma * V(s_{t+1}) - V(s_t), with V = 0 after a termination
    delta = reward + gamma * torch.where(terminated, 0.0, next_value) - value
    # A_t = delta_t + gamma * lambda * A_{t+1}, cut where an episode ended
    decay = gamma * gae_lambda * (~done).to(delta.dtype)
    advantage, later = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        later = delta[t] + decay[t] * later
        advantage[t] = later
    return advantage


# ---- update


@dataclass
class Batch:
    """Requests to learn from, flat: (batch, ...)."""

    obs: Tensor
    mask: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> Batch:
        """The requests at `index`."""
        return Batch(**{name: tensor.index_select(0, index) for name, tensor in vars(self).items()})


def typical_return(roll: Rollout, gamma: float) -> float:
    """Root mean square of the discounted returns inside a rollout; 1 where there was no reward at all."""
    nothing = torch.zeros_like(roll.reward)
    returns = advantages_of(roll.reward, nothing, nothing, roll.terminated, roll.done, gamma, 1.0)
    return float(returns[roll.valid].square().mean().sqrt()) or 1.0


def make_batch(net: ActorCritic, roll: Rollout, args: Args, reward_scale: float) -> Batch:
    """Advantages and value targets of a rollout, without the rows on which nobody was served."""
    value, next_value = values_of(net, roll)
    reward = roll.reward / reward_scale
    advantage = advantages_of(reward, value, next_value, roll.terminated, roll.done, args.gamma, args.gae_lambda)
    tensors = (roll.obs[:-1], roll.mask, roll.action, roll.log_prob, value, advantage, advantage + value)
    batch = Batch(*(tensor.flatten(0, 1) for tensor in tensors))
    return batch if bool(roll.valid.all()) else batch.rows(roll.valid.flatten().nonzero()[:, 0])


def update(
    net: ActorCritic, optimizer: torch.optim.Optimizer, batch: Batch, args: Args, orders: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Gradient steps on one batch.

    Args:
        net: Changed in place.
        optimizer: Of the network's parameters, with this iteration's learning rate.
        batch: The iteration's requests.
        args: Hyperparameters.
        orders: One permutation of the batch per epoch, int64 (batch,).

    Returns:
        Device scalars by tag; as in SB3 `approx_kl` is the last epoch's mean and `loss` the last minibatch's.
    """
    steps: list[Tensor] = []
    kls: list[Tensor] = []
    loss, stop = torch.zeros(()), False
    for order in orders:
        kls = []
        for index in order.split(args.minibatch_size):
            part = batch.rows(index)
            log_probs = net.log_probs(part.obs, part.mask)
            log_ratio = log_probs.gather(1, part.action[:, None])[:, 0] - part.log_prob
            ratio = log_ratio.exp()
            advantage = part.advantage
            if args.normalize_advantage and len(advantage) > 1:
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
            policy_loss = -torch.min(advantage * ratio, advantage * clipped).mean()
            value = net.value(part.obs)
            if args.clip_range_vf is not None:
                value = part.value + (value - part.value).clamp(-args.clip_range_vf, args.clip_range_vf)
            value_loss = torch.nn.functional.mse_loss(value, part.returns)
            entropy_loss = (log_probs.exp() * log_probs).sum(dim=1).mean()
            loss = policy_loss + args.ent_coef * entropy_loss + args.vf_coef * value_loss
            with torch.no_grad():
                # k3 estimate of KL(old || new): E[(ratio - 1) - log ratio], never negative
                kls.append(((ratio - 1) - log_ratio).mean())
                clip_fraction = ((ratio - 1).abs() > args.clip_range).float().mean()
                steps.append(torch.stack([policy_loss, value_loss, entropy_loss, clip_fraction]))
            # the only place where the host waits for the device, and only if asked to
            if args.target_kl is not None and float(kls[-1]) > 1.5 * args.target_kl:
                stop = True
                break
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm)
            optimizer.step()
        if stop:
            break
    policy_mean, value_mean, entropy_mean, clip_mean = torch.stack(steps).mean(dim=0).unbind()
    return {
        "train/policy_gradient_loss": policy_mean,
        "train/value_loss": value_mean,
        "train/entropy_loss": entropy_mean,
        "train/clip_fraction": clip_mean,
        "train/approx_kl": torch.stack(kls).mean(),
        "train/loss": loss.detach(),
        "train/explained_variance": 1 - (batch.returns - batch.value).var() / batch.returns.var(),
    }


# ---- training


class Training:
    """Everything that a checkpoint has to hold, and how it goes in and out of one."""

    _COUNTERS = ("iteration", "steps", "seconds", "metrics", "reward_scale")

    def __init__(self, env: VectorEnv[Any, Any, Any], args: Args) -> None:
        autoreset_mode(env)
        obs_space, action_space = env.single_observation_space, env.single_action_space
        if not isinstance(obs_space, gym.spaces.Box) or not isinstance(action_space, gym.spaces.Discrete):
            raise ValueError(f"PPO needs Box observations and Discrete actions, got {obs_space} and {action_space}")
        self.env, self.args = env, args
        first, infos = env.reset(seed=stream(args.seed, "ppo", "env"))
        device = first.device if isinstance(first, Tensor) else torch.device("cpu")
        obs = torch.as_tensor(first, dtype=torch.float32, device=device)
        num_strategies = int(action_space.n)
        weights_rng = torch_generator(args.seed, "ppo", "network")
        self.net = ActorCritic(obs.shape[1], num_strategies, args.hidden, weights_rng).to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        self.live = Live(
            obs=obs,
            mask=action_mask(infos, obs, num_strategies),
            done=torch.zeros(len(obs), dtype=torch.bool, device=device),
            episode_return=torch.zeros(len(obs), device=device),
            episode_length=torch.zeros(len(obs), device=device),
            numpy=not isinstance(first, Tensor),
        )
        self.generators = {
            name: torch_generator(args.seed, "ppo", name, device=device) for name in ("action", "minibatch")
        }
        self.recent: deque[tuple[float, float]] = deque(maxlen=args.stats_window)
        self.iteration, self.steps, self.seconds = 0, 0, 0.0
        self.metrics: dict[str, float] = {}
        self.reward_scale = args.reward_scale
        self.num_iterations = math.ceil(args.total_steps / (args.num_steps * len(obs)))
        names = getattr(env, "strategy_names", None) or (f"action_{i}" for i in range(num_strategies))
        self.strategies = tuple(names)
        world, config = getattr(env, "world", None), getattr(env, "config", None)
        self.meta = {"agent": "ppo", "seed": args.seed, "world": getattr(world, "hash", None),
                     "fold": getattr(config, "fold", None)}  # fmt: skip
        setting = None if config is None else dataclasses.asdict(config)
        identity = {"args": dataclasses.asdict(args), "num_envs": len(obs), "obs_dim": obs.shape[1], "env": setting}
        # through JSON, so that it compares with what a checkpoint gives back
        self.identity: dict[str, Any] = json.loads(json.dumps(identity | self.meta))

    def iterate(self) -> dict[str, float]:
        """One rollout and one update; returns its scalars by tag."""
        args, started = self.args, time.perf_counter()
        progress = self.iteration / self.num_iterations if args.lr_schedule == "linear" else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate * (1.0 - progress)
        roll = collect(self.env, self.net, self.live, args.num_steps, self.generators["action"])
        if self.reward_scale is None:
            # fixed from here on: a scale that moves would move the critic's targets under it
            self.reward_scale = typical_return(roll, args.gamma)
        batch = make_batch(self.net, roll, args, self.reward_scale)
        size, device = len(batch.action), batch.action.device
        orders = (
            torch.randperm(size, generator=self.generators["minibatch"], device=device) for _ in range(args.epochs)
        )
        scalars = update(self.net, self.optimizer, batch, args, orders)

        # log on the device, then one copy: every scalar, the strategy shares and the ended episodes
        shares = torch.nn.functional.one_hot(batch.action, len(self.strategies)).float().mean(dim=0)
        per_request = torch.where(roll.valid, roll.reward, 0.0).sum() / size
        packed = torch.cat([torch.stack([*scalars.values(), per_request]).float(), shares,
                            roll.ended_return.flatten(), roll.ended_length.flatten()]).cpu()  # fmt: skip
        numbers, ended = packed[: len(scalars) + 1 + len(shares)].tolist(), packed[len(scalars) + 1 + len(shares) :]
        returns, lengths = ended.reshape(2, -1)
        finished = ~returns.isnan()
        self.recent.extend(zip(returns[finished].tolist(), lengths[finished].tolist(), strict=True))

        self.iteration, self.steps = self.iteration + 1, self.steps + size
        self.seconds += time.perf_counter() - started
        tags = [*scalars, "metarec/return_per_request", *(f"metarec/action_share/{name}" for name in self.strategies)]
        self.metrics = dict(zip(tags, numbers, strict=True))
        self.metrics["train/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.metrics["train/clip_range"] = args.clip_range
        self.metrics["time/fps"] = self.steps / self.seconds
        if self.recent:
            self.metrics["rollout/ep_rew_mean"] = sum(r for r, _ in self.recent) / len(self.recent)
            self.metrics["rollout/ep_len_mean"] = sum(n for _, n in self.recent) / len(self.recent)
        return self.metrics

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": tensor for name, tensor in state.items()}
        tensors |= {f"live.{name}": tensor for name, tensor in self.live.tensors().items()}
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
        self.live = Live(**group("live."), numpy=self.live.numpy)
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"rng.{name}"])
        self.env.set_state(group("env."))  # type: ignore[attr-defined]
        self.recent.extend((r, n) for r, n in facts["recent"])
        for name in self._COUNTERS:
            setattr(self, name, facts[name])


def train(
    env: VectorEnv[Any, Any, Any],
    args: Args,
    *,
    run_dir: str | Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> TrainResult:
    """Trains on `env` and returns the policy.

    Args:
        env: A vector environment with Box observations and Discrete actions, numpy or torch, SAME_STEP or NEXT_STEP.
        args: Hyperparameters.
        run_dir: Gets TensorBoard events, `policy.safetensors` and, if the environment has `get_state`,
            `checkpoint.safetensors`; None writes nothing.
        progress: Prints a line with the time left.
        resume: Goes on from the checkpoint in `run_dir` where there is one.

    Returns:
        The policy with its numbers.
    """
    training, history = Training(env, args), []
    folder = Path(run_dir) if run_dir is not None else None
    checkpoint = folder / "checkpoint.safetensors" if folder is not None and hasattr(env, "get_state") else None
    writer = None
    if checkpoint is not None and resume and checkpoint.is_file():
        training.load(checkpoint)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        writer = _writer(folder, args, training.steps)
    for _ in range(training.iteration, training.num_iterations):
        metrics = training.iterate()
        history.append({"step": float(training.steps), **metrics})
        if writer is not None:
            for tag, number in metrics.items():
                writer.add_scalar(tag, number, training.steps)
            writer.flush()
        last = training.iteration == training.num_iterations
        if checkpoint is not None and (last or training.iteration % args.checkpoint_every == 0):
            training.save(checkpoint)
        if progress:
            left_s = (training.num_iterations - training.iteration) * training.seconds / training.iteration
            print(
                f"\rppo {training.steps:,} steps  return {metrics.get('rollout/ep_rew_mean', math.nan):.3f}  "
                f"{metrics['time/fps']:,.0f} steps/s  {left_s:.0f} s left   ",
                end="\n" if last else "", file=sys.stderr, flush=True,
            )  # fmt: skip
    policy = export_policy(training.net, training.strategies, {**training.meta, "steps": training.steps})
    if folder is not None and writer is not None:
        policy.save(folder / "policy.safetensors")
        writer.close()
    return TrainResult(policy, training.steps, training.seconds, training.metrics, history)


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


@dataclass(frozen=True)
class Command:
    """Trains PPO on one environment."""

    args: Args = dataclasses.field(default_factory=Args)
    """Hyperparameters."""
    env_id: str = "MetaRec/Select-v0"
    """A registered environment."""
    world: str | None = None
    """Folder of a world; the embedded synthetic one if absent. Only for MetaRec environments."""
    fold: Literal["A", "B"] = "A"
    """Whose users and judge to train on. Only for MetaRec environments."""
    num_envs: int = 256
    """Users served at once."""
    run_dir: str | None = None
    """Where to write; `runs/ppo_<seed>` if absent."""
    resume: bool = False
    """Go on from the checkpoint in the run folder."""
    threads: int = 1
    """CPU threads; these networks are too small to gain much from more, and lose much on a busy machine."""


def main() -> None:
    """The command line."""
    import tyro

    command = tyro.cli(Command, config=(tyro.conf.OmitArgPrefixes,))
    torch.set_num_threads(command.threads)
    kwargs: dict[str, Any] = {}
    if command.env_id.startswith("MetaRec/"):
        import metarec_gym  # noqa: F401  registers the ids

        kwargs = {"fold": command.fold, "output": "torch", "autoreset_mode": "SameStep"}
        kwargs |= {} if command.world is None else {"world": command.world}
    env = gym.make_vec(command.env_id, num_envs=command.num_envs, **kwargs)
    run_dir = Path(command.run_dir or f"runs/ppo_{command.args.seed}")
    result = train(env, command.args, run_dir=run_dir, resume=command.resume)
    row = {"steps": result.steps, "seconds": result.seconds, **result.metrics}
    (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(command), indent=2) + "\n")
    (run_dir / "command.txt").write_text(" ".join(["python -m agents.ppo", *sys.argv[1:]]) + "\n")
    (run_dir / "result.json").write_text(json.dumps(row, indent=2) + "\n")
    print(json.dumps({"run_dir": str(run_dir), **row}, indent=2))


if __name__ == "__main__":
    main()
