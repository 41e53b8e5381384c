"""What is known of every simulated user in the middle of an episode; batch first, one row a user."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from metarec_gym.envs.config import EnvConfig
from metarec_gym.world import World


@dataclass(frozen=True, eq=False)
class EnvTables:
    """A world's tables of one fold on one device, with one draw of the users' random coefficients."""

    start_index: Tensor
    """int64 (n,): position in the world's start states; the tensors below hold the fold's rows only."""
    start_row: Tensor
    """int64 (n_starts of the world,): row of these tables, -1 for start states of the other fold."""
    user: Tensor
    length: Tensor
    lists: Tensor
    state: Tensor
    profile: Tensor
    static_obs: Tensor
    """float32 (n, ...): the part of the observation that does not change inside an episode."""
    effects: Tensor
    item_profile: Tensor
    """float32 (n_items, n_taste + n_categories + 1): what an item adds to the profile of the user who takes it."""
    n_taste: int
    outcome_weights: Tensor
    cost: Tensor
    available: Tensor
    """bool (n_strategies,)."""


def make_tables(world: World, config: EnvConfig, device: torch.device) -> EnvTables:
    """Puts what an environment reads on `device`."""
    t = world.tensors
    index = world.starts_of(config.fold)
    if len(index) == 0:
        raise ValueError(f"the world {world.name!r} has no start state for fold {config.fold}; build it again")
    row = torch.full((t["start_user"].shape[0],), -1, dtype=torch.int64)
    row[index] = torch.arange(len(index))
    static = torch.cat([t["start_gap"][index, None], t["start_list_stats"][index].transpose(1, 2).flatten(1)], dim=1)
    available = torch.tensor([name not in config.unavailable for name in world.strategies])
    values = {
        "start_index": index,
        "start_row": row,
        "user": t["start_user"][index],
        "length": t["start_length"][index].to(torch.float32),
        # "no item" gets the index behind the last item, so that it can be looked up like one
        "lists": torch.where(t["start_lists"] < 0, world.n_items, t["start_lists"])[index],
        "state": t["start_state"][index],
        "profile": torch.cat([t["start_taste"], t["start_category"], t["start_popularity"][:, None].float()], dim=1)[
            index
        ],
        "static_obs": static,
        "effects": world.responses[config.fold].effects(config.world_seed),
        "item_profile": torch.cat([t["item_taste"], t["item_category"], t["item_popularity"][:, None]], dim=1),
        "outcome_weights": t["outcome_weights"],
        "cost": t["costs"] * config.cost_weight,
        "available": available,
    }
    n_taste = t["item_taste"].shape[1]
    return EnvTables(n_taste=n_taste, **{name: value.contiguous().to(device) for name, value in values.items()})


@dataclass(frozen=True, eq=False)
class UserState:
    """Rows of users; every field has `rows` first. `shown` alone is updated in place: copying a catalogue a step is slow."""

    start: Tensor
    """int64: row of the tables."""
    draw_key: Tensor
    """int64: every draw of the episode is a function of it."""
    request: Tensor
    """int64: requests served so far."""
    response: Tensor
    """float32 (rows, state_dim): the judge's state."""
    shown: Tensor
    """uint8 (rows, n_items + 1): items shown in this episode; the last column stands for "no item" and is always 1."""
    profile: Tensor
    """float32 (rows, n_taste + n_categories + 1): sums of taste, category shares and popularity over the items taken."""
    engaged: Tensor
    """float32: items taken, history included."""
    strategy_count: Tensor
    strategy_reward: Tensor
    last_strategy: Tensor
    """int64: -1 before the first request."""
    last_reward: Tensor
    unrewarded: Tensor
    """float32: requests since the last one in which an item was taken."""
    terminated: Tensor
    truncated: Tensor

    def to_dict(self) -> dict[str, Tensor]:
        """Clones of all fields."""
        return {f.name: getattr(self, f.name).clone() for f in fields(self)}


def fresh_rows(tables: EnvTables, start: Tensor, draw_key: Tensor, shown: Tensor) -> UserState:
    """State at the start of an episode; `shown` is taken as it is."""
    rows, strategies = start.shape[0], tables.available.shape[0]
    zeros = torch.zeros(rows, device=start.device)
    return UserState(
        start=start,
        draw_key=draw_key,
        request=torch.zeros_like(start),
        response=tables.state[start],
        shown=shown,
        profile=tables.profile[start],
        engaged=tables.length[start],
        strategy_count=torch.zeros(rows, strategies, device=start.device),
        strategy_reward=torch.zeros(rows, strategies, device=start.device),
        last_strategy=torch.full_like(start, -1),
        last_reward=zeros,
        unrewarded=zeros.clone(),
        terminated=torch.zeros_like(start, dtype=torch.bool),
        truncated=torch.zeros_like(start, dtype=torch.bool),
    )


def choose_rows(mask: Tensor, new: UserState, old: UserState) -> UserState:
    """Rows of `new` where `mask` (bool (rows,)) holds, rows of `old` elsewhere; `shown` stays the one of `old`."""
    merged = {}
    for f in fields(UserState):
        a, b = getattr(new, f.name), getattr(old, f.name)
        merged[f.name] = b if f.name == "shown" else torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)
    return UserState(**merged)
