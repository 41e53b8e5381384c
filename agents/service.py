"""Whole episodes served to training users, the data of search and supervised learning: at random, or each by one strategy.

Episodes are blocks of rows, reset with a seed for each row: equal seeds meet the same user with the same luck, whatever serves
them and in any batch. Rows that ended serve nothing, so the requests counted are requests that a user saw.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import Policy, masked_uniform, sample_actions
from metarec_gym.seeding import fold_in, mix, stream, uniform
from metarec_gym.world import World

BLOCK_ROWS = 1024
"""Episodes served side by side."""


@dataclass(frozen=True)
class EnvRecipe:
    """How to make an environment again, for any number of rows and in any process.

    Attributes:
        world: The world, its folder or its name; a folder keeps the recipe small where it is sent to other processes.
        settings: Fields of `EnvConfig`.
        device: Where environments run.
    """

    world: World | str | Path | None
    settings: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @classmethod
    def of(cls, env: Any) -> Self:
        """The recipe of an environment.

        Raises:
            ValueError: When it is no `MetaRecVectorEnv`: others do not promise equal users for equal seeds.
        """
        if not isinstance(env, MetaRecVectorEnv):
            raise ValueError(
                f"{type(env).__name__} is no MetaRecVectorEnv; search and supervised learning need one, made by "
                "gymnasium.make_vec('MetaRec/Select-v0', ...)"
            )
        names = [f.name for f in dataclasses.fields(env.config)]
        return cls(env.world, {name: getattr(env.config, name) for name in names}, str(env.device))

    def make(self, num_envs: int, **changes: Any) -> MetaRecVectorEnv:
        """Torch environment whose rows stay ended until the next reset."""
        return MetaRecVectorEnv(
            num_envs,
            world=self.world,
            device=self.device,
            output="torch",
            autoreset_mode="Disabled",
            **{**self.settings, **changes},
        )


def row_seeds(seed: int, count: int, *purpose: str | int) -> list[int]:
    """Seeds of `count` episodes; the first ones are the same for any count."""
    return [stream(seed, *purpose, row) for row in range(count)]


def keyed_draws(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Parent keys of the policy's draws, int64 (rows,): rows of equal seeds draw alike."""
    return fold_in(mix(torch.tensor(seeds, dtype=torch.int64)), 7).to(device)


@dataclass(frozen=True, eq=False)
class Service:
    """What was served. N episodes of at most T requests.

    Attributes:
        obs: float32 (N, T, obs_dim), what a policy saw before each request.
        action: int64 (N, T).
        reward: float32 (N, T), 0 where nothing was served.
        alive: bool (N, T), the request was served.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    alive: Tensor

    @property
    def requests(self) -> int:
        """Requests that users saw."""
        return int(self.alive.sum())

    @property
    def start_obs(self) -> Tensor:
        """float32 (N, obs_dim), before the first request."""
        return self.obs[:, 0]

    def episodes(self, rows: Tensor) -> Service:
        """Some of the episodes; bool or int64 index."""
        return Service(self.obs[rows], self.action[rows], self.reward[rows], self.alive[rows])

    def and_also(self, other: Service) -> Service:
        """Both, one after the other."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Service(*(torch.cat(pair) for pair in pairs))


def serve(env: MetaRecVectorEnv, policy: Policy, seeds: Sequence[int], explore: float = 0.0) -> Service:
    """One episode in every row.

    Args:
        env: A torch environment in disabled mode; see `EnvRecipe.make`.
        policy: What chooses; its probabilities are sampled with draws of the row's seed.
        seeds: Of every row.
        explore: Share of the requests served by a uniform choice.
    """
    obs, info = env.reset(seed=list(seeds))
    key = keyed_draws(seeds, env.device)
    policy.begin(env.num_envs, env.device)
    alive = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    seen, actions, rewards, served = [], [], [], []
    for request in range(env.horizon):
        mask = info["action_mask"].to(torch.bool)
        probs = policy.action_probs(obs, mask)
        if explore > 0.0:
            probs = (1.0 - explore) * probs + explore * masked_uniform(mask)
        action = sample_actions(probs, uniform(fold_in(key, request)))
        seen.append(obs)
        obs, reward, terminated, truncated, info = env.step(action)
        reward = torch.where(alive, reward, 0.0)
        policy.observe(seen[-1], action, reward, alive)
        actions.append(action)
        rewards.append(reward)
        served.append(alive)
        alive = alive & ~(terminated | truncated)
    stacked = [torch.stack(parts, dim=1).cpu() for parts in (seen, actions, rewards, served)]
    return Service(*stacked)


def serve_episodes(
    recipe: EnvRecipe, policy: Policy, requests: int, *, seed: int, purpose: str, explore: float = 0.0
) -> Service:
    """Serves fresh training users until `requests` requests are spent or the next episodes would not fit.

    Args:
        recipe: The environment.
        policy: What chooses.
        requests: Budget; at least one block of 16 episodes is served whatever it is.
        seed: Of users and choices.
        purpose: Names the stream, so that two calls of one seed meet other users.
        explore: Share of the requests served by a uniform choice.
    """
    horizon = recipe.make(1).horizon
    rows = max(16, min(BLOCK_ROWS, requests // horizon))
    env, spent, block = recipe.make(rows), 0, 0
    done: list[Service] = []
    with torch.no_grad():
        while not done or spent + rows * horizon <= requests:
            part = serve(env, policy, row_seeds(seed, rows, purpose, block), explore)
            done.append(part)
            spent, block = spent + part.requests, block + 1
        rest = (requests - spent) // horizon
        if rest > 0:
            done.append(serve(recipe.make(rest), policy, row_seeds(seed, rest, purpose, block), explore))
    everything = done[0]
    for part in done[1:]:
        everything = everything.and_also(part)
    return everything


@dataclass(frozen=True, eq=False)
class FixedPlays:
    """Every strategy played alone from the same starts with the same luck. N starts, K strategies.

    Attributes:
        start_obs: float32 (N, obs_dim).
        user: int64 (N,).
        value: float64 (N, K), reward a request, 0 after leaving.
        noise_var: float64 (K,), variance of a value around what the start and the user would give on average.
        requests: What it cost.
    """

    start_obs: Tensor
    user: Tensor
    value: Tensor
    noise_var: Tensor
    requests: int


def play_fixed(recipe: EnvRecipe, requests: int, *, seed: int) -> FixedPlays:
    """Serves training users by each strategy in turn, an episode each; rows are starts x strategies.

    Args:
        recipe: The environment.
        requests: Budget; at least two starts are played whatever it is.
        seed: Of users and luck.
    """
    probe = recipe.make(1)
    k, horizon = probe.world.n_strategies, probe.horizon
    starts = max(2, requests // (k * horizon))
    block = max(1, min(starts, BLOCK_ROWS // k))
    seeds = row_seeds(seed, starts, "fixed plays")
    obs, users, values, squares, count = [], [], [], [], 0
    env = recipe.make(block * k)
    with torch.no_grad():
        for low in range(0, starts, block):
            part = seeds[low : low + block]
            if len(part) < block:
                env = recipe.make(len(part) * k)
            first, info = env.reset(seed=[s for s in part for _ in range(k)])
            action = torch.arange(k, device=env.device).repeat(len(part))
            alive = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
            rewards = []
            users.append(info["user"][::k].cpu().to(torch.int64))
            obs.append(first[::k].cpu())
            for _ in range(horizon):
                count += int(alive.sum())
                _, reward, terminated, truncated, _ = env.step(action)
                rewards.append(torch.where(alive, reward, 0.0).to(torch.float64))
                alive = alive & ~(terminated | truncated)
            shaped = torch.stack(rewards, dim=1).cpu().reshape(len(part), k, horizon)
            values.append(shaped.mean(dim=2))
            # successive differences: a trend over the episode is no noise
            steps = (shaped[:, :, 1:] - shaped[:, :, :-1]).square().sum(dim=2) / (2.0 * max(horizon - 1, 1))
            squares.append(steps)
    noise = torch.cat(squares).mean(dim=0) / horizon
    return FixedPlays(torch.cat(obs), torch.cat(users), torch.cat(values), noise, count)


def user_parts(user: Tensor, parts: int, seed: int) -> Tensor:
    """Part of each start for cross-fitting, the same for all starts of a user; int64 (N,) -> int64 (N,)."""
    key = fold_in(mix(torch.tensor(stream(seed, "user parts"))), user)
    return (uniform(key) * parts).to(torch.int64).clamp(max=parts - 1)


def whole_requests(share: float, total: int) -> int:
    """A share of a budget of requests, rounded down."""
    return math.floor(share * total)
