"""One request as functions of (state, action, draws): serve, respond, advance. No generator, no `self`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metarec_gym.envs.user_state import EnvTables, UserState
from metarec_gym.response.frozen import FrozenResponse, joint_probs
from metarec_gym.seeding import fold_in, normal, uniform

LEAVE_DRAW = -2
PAIR_DRAW = -3
"""Purposes of draws that belong to no item; items are >= 0."""


@dataclass(frozen=True, eq=False)
class Served:
    """What one request brought, rows first."""

    slate: Tensor
    """int64 (rows, slate_size): item ids, -1 where the list had no item left."""
    outcomes: Tensor
    """bool (rows, slate_size, n_outcomes)."""
    reward: Tensor
    """float32 (rows,)."""
    parts: Tensor
    """float32 (rows, n_outcomes): reward of each outcome before cost."""
    cost: Tensor
    """float32 (rows,): reward lost to serving cost."""
    expected_reward: Tensor
    """float32 (rows,): mean of `reward` over the draws, given state and the user's coefficients (privileged)."""


def first_unshown(lists: Tensor, shown: Tensor, slate_size: int) -> Tensor:
    """First `slate_size` items of each list that were not shown yet, in list order.

    Args:
        lists: int32 (rows, length), n_items = no item.
        shown: uint8 (rows, n_items + 1); the last column is 1, so that "no item" counts as shown.
        slate_size: Items wanted.

    Returns:
        int64 (rows, slate_size), filled up with -1.
    """
    rows = lists.shape[0]
    items = lists.to(torch.int64)
    fresh = shown.gather(1, items) == 0
    place = fresh.to(torch.int32).cumsum(dim=1) - 1
    # items that are shown or come later than the slate all land in one extra column, which is cut off
    target = torch.where(fresh & (place < slate_size), place.to(torch.int64), slate_size)
    slate = torch.full((rows, slate_size + 1), -1, dtype=torch.int64, device=lists.device)
    return slate.scatter(1, target, items)[:, :slate_size]


def slate_of(tables: EnvTables, state: UserState, action: Tensor, slate_size: int, depth: int) -> Tensor:
    """Slate that strategy `action` serves now; int64 (rows,) -> (rows, slate_size). Reads `depth` items of the list."""
    lists = tables.lists[state.start, action, :depth]
    slate = first_unshown(lists, state.shown, slate_size)
    # a strategy that is out of service serves nothing
    return torch.where(tables.available[action][:, None], slate, -1)


def slate_probs(tables: EnvTables, response: FrozenResponse, state: UserState, slate: Tensor) -> Tensor:
    """Conditional outcome probabilities of a slate; (rows, slate_size) -> (rows, slate_size, n_outcomes), 0 where no item."""
    user = tables.user[state.start]
    noise = None
    if response.has_pair_noise:
        noise = normal(fold_in(fold_in(fold_in(torch.zeros_like(user), PAIR_DRAW), user)[:, None], slate))
    probs = response.conditional_probs(state.response, tables.effects[user], slate.clamp(min=0), pair_noise=noise)
    return probs * (slate >= 0)[..., None]


def draw_outcomes(draw_key: Tensor, request: Tensor, slate: Tensor, probs: Tensor) -> Tensor:
    """Outcomes of a slate by draws keyed by (episode, request, item, outcome); never by strategy or position.

    Args:
        draw_key: int64 (rows,).
        request: int64 (rows,).
        slate: int64 (rows, slate_size).
        probs: float32 (rows, slate_size, n_outcomes), conditional on the gate after the first.

    Returns:
        bool (rows, slate_size, n_outcomes).
    """
    n_outcomes = probs.shape[2]
    outcome = torch.arange(n_outcomes, device=slate.device)
    key = fold_in(fold_in(draw_key, request)[:, None, None], slate[..., None] * n_outcomes + outcome)
    happened = uniform(key) < probs
    return happened & happened[..., :1]


def serve(
    tables: EnvTables, response: FrozenResponse, state: UserState, action: Tensor, slate_size: int, depth: int
) -> Served:
    """Serves one request by strategy `action` (int64 (rows,)) and lets the user respond."""
    slate = slate_of(tables, state, action, slate_size, depth)
    probs = slate_probs(tables, response, state, slate)
    outcomes = draw_outcomes(state.draw_key, state.request, slate, probs)
    parts = outcomes.to(torch.float32).sum(dim=1) * tables.outcome_weights
    cost = tables.cost[action]
    expected = (joint_probs(probs) * tables.outcome_weights).sum(dim=(1, 2)) - cost
    return Served(slate, outcomes, parts.sum(dim=1) - cost, parts, cost, expected)


def advance(
    tables: EnvTables, response: FrozenResponse, state: UserState, action: Tensor, served: Served, horizon: int
) -> UserState:
    """The user's state after the request; marks the shown items in `state.shown` in place."""
    taken = served.outcomes[..., 0]
    items = served.slate.clamp(min=0)
    weight = taken.to(torch.float32)[..., None]
    n_items = state.shown.shape[1] - 1
    state.shown.scatter_(1, torch.where(served.slate < 0, n_items, served.slate), 1)
    count = weight.sum(dim=(1, 2))
    chosen = torch.nn.functional.one_hot(action, tables.available.shape[0]).to(torch.float32)
    unrewarded = torch.where(count > 0, 0.0, state.unrewarded + 1.0)
    request = state.request + 1
    draw = uniform(fold_in(fold_in(state.draw_key, state.request), LEAVE_DRAW))
    return replace(
        state,
        request=request,
        response=response.step(state.response, items, taken),
        profile=state.profile + (tables.item_profile[items] * weight).sum(dim=1),
        engaged=state.engaged + count,
        strategy_count=state.strategy_count + chosen,
        strategy_reward=state.strategy_reward + chosen * served.reward[:, None],
        last_strategy=action,
        last_reward=served.reward,
        unrewarded=unrewarded,
        terminated=draw < response.leave_prob(unrewarded),
        truncated=request >= horizon,
    )
