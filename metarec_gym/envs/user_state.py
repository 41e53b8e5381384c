"""What is known of every simulated user in the middle of an episode; batch first, one row a user."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from metarec_gym.envs.actions import FUSION_SLATES
from metarec_gym.envs.config import EnvConfig
from metarec_gym.envs.life import in_service, outage, service_tables
from metarec_gym.response.frozen import LoggedResponse
from metarec_gym.seeding import fold_in, uniform
from metarec_gym.world import World

MEMBER_DRAW, COST_DRAW = -4, -5
"""Purposes of draws that an episode makes once; requests are >= 0."""


@dataclass(frozen=True, eq=False)
class EnvTables:
    """A world's tables of one fold on one device, with one draw of the users' random coefficients, and the settings' numbers."""

    start_index: Tensor
    """int64 (n,): position in the world's start states; the tensors below hold the fold's rows only."""
    start_row: Tensor
    """int64 (n_starts of the world,): row of these tables, -1 for start states of the other fold."""
    user: Tensor
    length: Tensor
    lists: Tensor
    """int32 (n, K, length): n_items = no item."""
    list_scores: Tensor | None
    """float16 (n, K, length): standard scores of the listed items; None where no fusion reads them."""
    state: Tensor
    profile: Tensor
    static_obs: Tensor
    """float32 (n, 1 + 3 K): the part of the observation that does not change inside a session."""
    time: Tensor
    """float64 (n,): unix seconds of the last event before the start."""
    sessions: Tensor
    """float32 (n,): sessions in the history."""
    previous_gap: Tensor
    """float32 (n,): hours before the last session of the history."""
    period_starts: Tensor
    effects: Tensor
    """float32 (n_members, n_users, n_outcomes, n_features)."""
    item_profile: Tensor
    """float32 (n_items, n_taste + n_categories + 1): what an item adds to the profile of the user who takes it."""
    item_category: Tensor
    askable: Tensor
    """int64 (n_users,): an item about which the judge can answer for the user."""
    outcome_weights: Tensor
    cost: Tensor
    """float32 (K,): relative to the dearest strategy."""
    latency: Tensor
    """float32 (K,): reward lost to latency."""
    service: Tensor
    """bool (horizon + 1, K): in service by schedule."""
    stale: Tensor
    gate_offset: Tensor
    """float32 (slate_size,): base rate and position settings, added to the gate's logit."""
    drift: Tensor
    """float32 (n_items,): gate logit that an item loses with each further session; (0,) = off."""
    n_taste: int
    n_members: int
    member: int | None
    cost_range: tuple[float, float]
    fatigue: float
    """Gate logit lost for each unit of exposure."""
    tracks_exposure: bool
    shifts_gate: bool
    patience: float | None
    may_leave: bool
    """Whether users can leave after a request at all."""
    service_changes: bool
    """Whether strategies come and go inside an episode."""
    outage_rate: float
    outage_length: float
    session_requests: int | None
    session_list: int
    """Items of a list that a session can need; 0 where the whole episode is one session."""
    world_seed: int


def make_tables(world: World, config: EnvConfig, horizon: int, slate_size: int, device: torch.device) -> EnvTables:
    """Puts what an environment reads on `device`."""
    t = world.tensors
    index = world.starts_of(config.fold)
    if len(index) == 0:
        raise ValueError(f"the world {world.name!r} has no start state for fold {config.fold}; build it again")
    judge = world.judge(config.fold, config.judge)
    row = torch.full((t["start_user"].shape[0],), -1, dtype=torch.int64)
    row[index] = torch.arange(len(index))
    static = torch.cat([t["start_gap"][index, None], t["start_list_stats"][index].transpose(1, 2).flatten(1)], dim=1)
    profile = torch.cat([t["start_taste"], t["start_category"], t["start_popularity"][:, None].float()], dim=1)
    service, stale = service_tables(config, world.strategies, horizon)
    place = torch.arange(slate_size, dtype=torch.float32)
    drift = config.drift * (2.0 * t["item_popularity"] - 1.0)
    fatigue = -float(judge.tensors["fatigue"][0]) if config.fatigue is None else config.fatigue
    repetition = config.patience is None and judge.has_leaving and float(judge.tensors["leaving"][3]) != 0.0
    askable = torch.zeros(judge.n_users, dtype=torch.int64)
    if isinstance(judge, LoggedResponse):
        askable = judge.observed.to(torch.uint8).argmax(dim=1)
    values = {
        "start_index": index,
        "start_row": row,
        "user": t["start_user"][index],
        "length": t["start_length"][index].to(torch.float32),
        # "no item" gets the index behind the last item, so that it can be looked up like one
        "lists": torch.where(t["start_lists"] < 0, world.n_items, t["start_lists"])[index],
        "state": world.start_states(config.judge)[index],
        "profile": profile[index],
        "static_obs": static,
        "time": t["start_time"][index],
        "sessions": t["start_sessions"][index].to(torch.float32),
        "previous_gap": t["start_previous_gap"][index].to(torch.float32),
        "period_starts": t["period_starts"],
        "effects": torch.stack([judge.effects(config.world_seed, m) for m in range(judge.n_members)]),
        "item_profile": torch.cat([t["item_taste"], t["item_category"], t["item_popularity"][:, None]], dim=1),
        "item_category": t["item_category"],
        "askable": askable,
        "outcome_weights": t["outcome_weights"],
        "cost": t["costs"],
        "latency": world.latencies * config.latency_weight,
        "service": service,
        "stale": stale,
        "gate_offset": math.log(config.base_rate_factor) - config.position_decay * torch.log2(1.0 + place),
        "drift": drift if config.drift != 0 else drift[:0],
    }
    session_list = 0
    if config.session_requests is not None:
        # a blend looks some slates ahead
        ahead = FUSION_SLATES - 1 if config.action == "blend" else 0
        session_list = (config.session_requests + ahead) * slate_size
    by_score = config.action == "blend" and config.fusion == "zscore"
    return EnvTables(
        list_scores=t["start_list_scores"][index].to(device) if by_score else None,
        n_taste=t["item_taste"].shape[1],
        n_members=judge.n_members,
        member=config.member,
        cost_range=config.cost_range,
        fatigue=fatigue,
        tracks_exposure=fatigue != 0.0 or repetition,
        shifts_gate=bool((values["gate_offset"] != 0).any()) or fatigue != 0.0 or config.drift != 0,
        patience=config.patience,
        may_leave=config.patience is not None or judge.has_leaving,
        service_changes=config.outage_rate > 0 or bool((service != service[:1]).any()),
        outage_rate=config.outage_rate,
        outage_length=config.outage_length,
        session_requests=config.session_requests,
        session_list=session_list,
        world_seed=config.world_seed,
        **{name: value.contiguous().to(device) for name, value in values.items()},
    )


@dataclass(frozen=True, eq=False)
class UserState:
    """Rows of users; every field has `rows` first.

    `shown` and, where sessions start, `lists` are updated in place: copying a catalogue a step is slow. What a setting does not
    need has no columns.
    """

    start: Tensor
    """int64: row of the tables."""
    draw_key: Tensor
    """int64: every draw of the episode is a function of it."""
    member: Tensor
    """int64: which member of the judge answers in this episode."""
    cost_weight: Tensor
    """float32."""
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
    """float32 (rows, K): requests served by each strategy, a shared one by its shares."""
    strategy_reward: Tensor
    """float32 (rows, K): reward credited to each strategy."""
    last_share: Tensor
    """float32 (rows, K): shares of the strategies in the last request; zeros before the first."""
    last_reward: Tensor
    unrewarded: Tensor
    """float32: requests of the session since the last one in which an item was taken."""
    exposure: Tensor
    """float32 (rows, n_categories): exposure to each category in the session; (rows, 0) where nothing depends on it."""
    available: Tensor
    """bool (rows, K): strategies that can serve the next request."""
    down: Tensor
    """bool (rows, K): strategies that have failed; (rows, 0) without outages."""
    period: Tensor
    """int64: row of the judge's `trend`."""
    time: Tensor
    """float64: unix seconds at which the session began."""
    session: Tensor
    """int64: sessions of the episode before this one."""
    session_request: Tensor
    """int64: requests served in this session."""
    session_engaged: Tensor
    """float32: items taken in this session."""
    gap: Tensor
    """float32: hours between this session and the one before it; 0 if it is the first."""
    lists: Tensor
    """int32 (rows, K, session_list): lists ranked at the start of this session; (rows, K, 0) in episodes of one session."""
    list_scores: Tensor
    """float16, shape of `lists`: their standard scores; (rows, 1, 0) where no fusion reads them."""
    static_obs: Tensor
    """float32 (rows, 1 + 3 K): as the table, for this session; (rows, 0) in episodes of one session."""
    taken: Tensor
    """int32 (rows, most items of an episode + 1): items taken in the episode, in order, -1 behind them; (rows, 0) as above."""
    taken_count: Tensor
    """int64."""
    terminated: Tensor
    truncated: Tensor

    def to_dict(self) -> dict[str, Tensor]:
        """Clones of all fields."""
        return {f.name: getattr(self, f.name).clone() for f in fields(self)}


def fresh_rows(tables: EnvTables, start: Tensor, draw_key: Tensor, shown: Tensor, most_taken: int) -> UserState:
    """State at the start of an episode.

    Args:
        tables: The fold's tables.
        start: int64 (rows,), rows of the tables.
        draw_key: int64 (rows,).
        shown: uint8 (rows, n_items + 1), taken as it is.
        most_taken: Items that an episode can show.
    """
    rows, strategies, device = start.shape[0], tables.cost.shape[0], start.device
    zeros, none = torch.zeros(rows, device=device), torch.zeros_like(start)
    request = torch.zeros_like(start)
    low, high = tables.cost_range
    cost_weight = torch.full((rows,), low, device=device)
    if high > low:
        cost_weight = cost_weight + (high - low) * uniform(fold_in(draw_key, COST_DRAW))
    down = torch.zeros(rows, strategies if tables.outage_rate > 0 else 0, dtype=torch.bool, device=device)
    if tables.outage_rate > 0:
        down = outage(draw_key, request, down, tables.outage_rate, tables.outage_length, first=True)
    in_sessions = tables.session_requests is not None
    lists, scores = tables.lists.new_zeros(rows, 1, 0), torch.zeros(rows, 1, 0, dtype=torch.float16, device=device)
    if in_sessions:
        missing = max(0, tables.session_list - tables.lists.shape[2])
        lists = tables.lists[start][..., : tables.session_list]
        lists = torch.nn.functional.pad(lists, (0, missing), value=shown.shape[1] - 1)
        if tables.list_scores is not None:
            scores = torch.nn.functional.pad(tables.list_scores[start][..., : tables.session_list], (0, missing))
    return UserState(
        start=start,
        draw_key=draw_key,
        member=draw_member(tables, draw_key),
        cost_weight=cost_weight,
        request=request,
        response=tables.state[start],
        shown=shown,
        profile=tables.profile[start],
        engaged=tables.length[start],
        strategy_count=torch.zeros(rows, strategies, device=device),
        strategy_reward=torch.zeros(rows, strategies, device=device),
        last_share=torch.zeros(rows, strategies, device=device),
        last_reward=zeros,
        unrewarded=zeros.clone(),
        exposure=torch.zeros(rows, tables.item_category.shape[1] if tables.tracks_exposure else 0, device=device),
        available=in_service(tables.service[:1].expand(rows, -1), down).clone(),
        down=down,
        period=period_of(tables, tables.time[start]),
        time=tables.time[start],
        session=none,
        session_request=none.clone(),
        session_engaged=zeros.clone(),
        gap=tables.previous_gap[start],
        lists=lists,
        list_scores=scores,
        static_obs=tables.static_obs[start] if in_sessions else zeros.new_zeros(rows, 0),
        taken=torch.full((rows, most_taken + 1 if in_sessions else 0), -1, dtype=torch.int32, device=device),
        taken_count=none.clone(),
        terminated=torch.zeros_like(start, dtype=torch.bool),
        truncated=torch.zeros_like(start, dtype=torch.bool),
    )


def draw_member(tables: EnvTables, draw_key: Tensor) -> Tensor:
    """Member of the judge that answers in the episode; int64 (rows,)."""
    if tables.member is not None or tables.n_members == 1:
        return torch.full_like(draw_key, tables.member or 0)
    return (uniform(fold_in(draw_key, MEMBER_DRAW)) * tables.n_members).to(torch.int64)


def period_of(tables: EnvTables, time: Tensor) -> Tensor:
    """Row of the judge's `trend` at a time; float64 (rows,) -> int64 (rows,). The first and the last one have no end."""
    return (torch.searchsorted(tables.period_starts, time, right=True) - 1).clamp(min=0)


def choose_rows(mask: Tensor, new: UserState, old: UserState) -> UserState:
    """Rows of `new` where `mask` (bool (rows,)) holds, rows of `old` elsewhere; `shown` stays the one of `old`."""
    merged = {}
    for f in fields(new):
        a, b = getattr(new, f.name), getattr(old, f.name)
        merged[f.name] = b if f.name == "shown" else torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)
    return UserState(**merged)
