"""What a policy sees: named blocks, all in [-1, 1], from the log and the episode so far; never from the judge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metarec_gym.envs.user_state import EnvTables, UserState
from metarec_gym.world import LIST_FEATURES, World

SIGNED = ("taste", "last_reward", "strategy_mean_reward", "list_similarity")
"""Blocks in [-1, 1]; the others are in [0, 1]."""


def feature_sizes(world: World) -> dict[str, int]:
    """Blocks of the observation in order, with their widths."""
    k = world.n_strategies
    return {
        "taste": int(world.tensors["item_taste"].shape[1]),
        "history_length": 1,
        "popularity_affinity": 1,
        "category_entropy": 1,
        "unrewarded_requests": 1,
        "request_fraction": 1,
        "session_fraction": 1,
        "sessions": 1,
        "cost_weight": 1,
        "latency_weight": 1,
        "last_reward": 1,
        "last_strategy": k,
        "strategy_count": k,
        "strategy_mean_reward": k,
        "recent_gap": 1,
        **{f"list_{name}": k for name in LIST_FEATURES},
    }


def feature_slices(world: World) -> dict[str, slice]:
    """Where each block stands in the observation."""
    slices, at = {}, 0
    for name, size in feature_sizes(world).items():
        slices[name] = slice(at, at + size)
        at += size
    return slices


def bounds(world: World) -> tuple[list[float], list[float]]:
    """Lower and upper bound of every entry."""
    low = [-1.0 if name in SIGNED else 0.0 for name, size in feature_sizes(world).items() for _ in range(size)]
    return low, [1.0] * len(low)


def observe(
    tables: EnvTables, state: UserState, horizon: int, reward_scale: float, latency_weight: float = 0.0
) -> Tensor:
    """The observation of every row; float32 (rows, obs_dim), a fresh tensor.

    Args:
        tables: The fold's tables.
        state: The rows.
        horizon: Requests an episode.
        reward_scale: Typical reward a request; rewards enter as tanh(reward / scale).
        latency_weight: The environment's.
    """
    engaged = state.engaged.clamp(min=1.0)[:, None]
    taste, category = state.profile[:, : tables.n_taste], state.profile[:, tables.n_taste : -1]
    total = category.sum(dim=1, keepdim=True).clamp(min=1e-6)
    share = category / total
    entropy = -(share * torch.log(share.clamp(min=1e-9))).sum(dim=1, keepdim=True)
    entropy = entropy / math.log(max(share.shape[1], 2))
    # one pseudo-request without reward keeps a single lucky answer from looking certain
    mean_reward = torch.tanh(state.strategy_reward / (state.strategy_count + 1.0) / reward_scale)
    if tables.session_requests is None:
        progress, static = torch.zeros_like(engaged), tables.static_obs[state.start]
    else:
        progress = state.session_request.to(torch.float32)[:, None] / tables.session_requests
        static = state.static_obs
    sessions = tables.sessions[state.start] + state.session
    obs = torch.cat(
        [
            taste / engaged,
            torch.log1p(state.engaged)[:, None] / math.log1p(1000.0),
            state.profile[:, -1:] / engaged,
            entropy,
            state.unrewarded[:, None] / 10.0,
            state.request.to(torch.float32)[:, None] / horizon,
            progress,
            torch.log1p(sessions)[:, None] / math.log1p(100.0),
            (state.cost_weight / (1.0 + state.cost_weight))[:, None],
            torch.full_like(engaged, latency_weight / (1.0 + latency_weight)),
            torch.tanh(state.last_reward / reward_scale)[:, None],
            state.last_share,
            torch.log1p(state.strategy_count) / math.log1p(horizon),
            mean_reward,
            static,
        ],
        dim=1,
    )
    # rounding must not leave the box by one unit in the last place
    return obs.clamp(-1.0, 1.0)
