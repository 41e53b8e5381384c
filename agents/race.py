"""Races: candidates play the same training users with the same luck, so that their differences say who is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarec_gym.policy import sample_actions
from metarec_gym.seeding import fold_in, mix, stream, uniform


@dataclass(frozen=True)
class Race:
    """How candidates did on the same users with the same luck.

    Attributes:
        value: float64 (candidates, episodes), mean reward a request of each episode, zero after leaving.
        requests: Requests it took.
    """

    value: Tensor
    requests: int


def race(lesson: Any, candidates: Sequence[Any], requests: int, seed: int) -> Race:
    """Plays all candidates from the same start states of training users with the same luck.

    Args:
        lesson: What is learned from: `world`, `fold`, `horizon`, `make_env`.
        candidates: Policies, each an object of its own: they may learn inside an episode.
        requests: How many may be played over all candidates; at least one episode each is.
        seed: Of start states and luck.
    """
    horizon, n = int(lesson.horizon), len(candidates)
    episodes = max(1, requests // (n * horizon))
    env = lesson.make_env(n * episodes)
    starts = lesson.world.starts_of(lesson.fold)
    root = mix(torch.tensor(stream(seed, "race")))
    picked = starts[
        torch.argsort(fold_in(root, torch.arange(len(starts))), stable=True)[torch.arange(episodes) % len(starts)]
    ]
    noise = stream(seed, "race luck") % 1_000_000 + torch.arange(episodes)
    obs, info = env.reset(
        seed=stream(seed, "race env"), options={"start_state": picked.repeat(n), "noise": noise.repeat(n)}
    )
    device = obs.device
    for policy in candidates:
        policy.begin(episodes, device)
    alive = torch.ones(n * episodes, dtype=torch.bool, device=device)
    total = torch.zeros(n * episodes, dtype=torch.float64, device=device)
    key = fold_in(fold_in(root, -1), torch.arange(episodes)).repeat(n).to(device)
    parts = [slice(i * episodes, (i + 1) * episodes) for i in range(n)]
    for request in range(horizon):
        mask = torch.as_tensor(info["action_mask"], device=device).to(torch.bool)
        probs = torch.cat([p.action_probs(obs[part], mask[part]) for p, part in zip(candidates, parts, strict=True)])
        action = sample_actions(probs, uniform(fold_in(key, request)))
        seen = obs
        obs, reward, terminated, truncated, info = env.step(action)
        reward = torch.as_tensor(reward, device=device)
        for policy, part in zip(candidates, parts, strict=True):
            policy.observe(seen[part], action[part], reward[part], alive[part])
        total += torch.where(alive, reward.to(torch.float64), 0.0)
        alive &= ~(terminated | truncated)
    env.close()
    return Race((total / horizon).reshape(n, episodes).cpu(), n * episodes * horizon)
