"""Between two sessions: how long the user stays away, whether that counts as retained, and what the next session starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metarec_gym.envs.actions import next_scored
from metarec_gym.envs.user_state import EnvTables, UserState, period_of
from metarec_gym.response.frozen import AnyJudge
from metarec_gym.seeding import fold_in, uniform
from metarec_gym.world import World, list_stats

GAP_DRAW = -7
FIXED_GAP_HOURS = 24.0
"""Time between sessions where the log does not say when users come back: everybody is back after a day."""
_NARROWEST = 16


@dataclass(frozen=True, eq=False)
class Absence:
    """The time after a session, were it to end now; rows first."""

    hours: Tensor
    """float32 (rows,): until the user is back; inf = not within the last edge of the return model."""
    in_time_prob: Tensor
    """float32 (rows,): probability of being back within the retention time."""


def absence(
    tables: EnvTables, judge: AnyJudge, state: UserState, session_engaged: Tensor, retention_hours: float
) -> Absence:
    """Draws when each user would be back, given the items taken in the session; keyed by episode and session."""
    if not judge.has_return:
        hours = torch.full_like(session_engaged, FIXED_GAP_HOURS)
        return Absence(hours, (hours <= retention_hours).to(torch.float32))
    # imported here: only worlds with a return model need it
    from metarec_gym.response.returning import draw_gap

    edges = judge.tensors["return_edges"]
    # sessions so far, the one just ended included; a cold user's first session is the first of all
    sessions = tables.sessions[state.start] + state.session + 1.0
    hazards = judge.return_hazards(
        torch.stack(
            [
                torch.log1p(session_engaged),
                torch.log1p(sessions),
                torch.log1p(state.gap),
                (sessions <= 1.0).to(torch.float32),
            ],
            dim=1,
        )
    )
    key = fold_in(fold_in(state.draw_key, GAP_DRAW), state.session)
    hours = draw_gap(hazards, uniform(fold_in(key, 0)), uniform(fold_in(key, 1)), edges)
    return Absence(hours, back_within(hazards, edges, retention_hours))


def back_within(hazards: Tensor, edges: Tensor, hours: float) -> Tensor:
    """Probability of being back within `hours`: whole bins, and of the last one its share in log hours.

    Args:
        hazards: float32 (rows, B).
        edges: float32 (B + 1,), hours.
        hours: Time.

    Returns:
        float32 (rows,).
    """
    stayed = torch.cumprod(1.0 - hazards, dim=1)
    before = torch.cat([torch.ones_like(stayed[:, :1]), stayed[:, :-1]], dim=1)
    log_edges = torch.log(edges)
    share = (torch.log(edges.new_tensor(hours)) - log_edges[:-1]) / (log_edges[1:] - log_edges[:-1])
    return (before * hazards * share.clamp(0.0, 1.0)).sum(dim=1)


def check_ranker(world: World, tables: EnvTables) -> None:
    """Asks for one list, so that a world which cannot rank again fails before the first episode.

    Raises:
        WorldError: When the world has no strategies at hand.
    """
    nobody = torch.full((1, 1), -1, dtype=torch.int64, device=tables.user.device)
    nothing = torch.zeros(1, world.n_items, dtype=torch.bool, device=nobody.device)
    world.top_lists(nobody, 1, exclude=nothing, user=tables.user[:1])


def live_histories(history: Tensor, taken: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Histories with what was taken since, in groups of similar length.

    A row's width is a power of two that depends on the row alone: sums over a history then have the same bits in any batch.

    Args:
        history: int64 (rows, H), newest last, -1 on the left.
        taken: int32 (rows, T), in order, -1 behind.

    Returns:
        Pairs of rows, int64 (n,), and histories, int64 (n, width), -1 on the left.
    """
    joined = torch.cat([history, taken.to(torch.int64)], dim=1)
    # a stable sort moves the padding to the left and keeps the order of the items
    joined = joined.gather(1, (joined >= 0).to(torch.int8).argsort(dim=1, stable=True))
    size = (joined >= 0).sum(dim=1)
    groups, width = [], _NARROWEST
    done = torch.zeros_like(size, dtype=torch.bool)
    while not bool(done.all()):
        mine = torch.nonzero((size <= width) & ~done)[:, 0]
        if len(mine):
            rows = joined[mine][:, -width:]
            groups.append((mine, torch.nn.functional.pad(rows, (width - rows.shape[1], 0), value=-1)))
        done |= size <= width
        width *= 2
    return groups


def start_sessions(world: World, tables: EnvTables, state: UserState, rows: Tensor, hours: Tensor) -> UserState:
    """The next session of some rows: the clock moves, short-term memory fades, and all strategies rank again.

    Lists leave out what the user has ever taken and what this episode has shown. A stale strategy goes on with the list of the
    episode's start.

    Args:
        world: Ranks the lists.
        tables: The fold's tables.
        state: All rows; `lists` and `list_scores` are written in place.
        rows: int64 (n,), the rows whose user is back.
        hours: float32 (n,), how long the user was away.

    Returns:
        All rows.
    """
    start, shown = state.start[rows], state.shown[rows]
    no_item = shown.shape[1] - 1
    lists, scores = torch.full_like(state.lists[rows], no_item), torch.zeros_like(state.list_scores[rows])
    by_score = tables.list_scores is not None
    history = world.history_of(tables.start_index[start].cpu()).to(start.device)
    for group, histories in live_histories(history, state.taken[rows]):
        barred, user = shown[group, :-1] > 0, tables.user[start[group]]
        if by_score:
            found, scores[group] = world.ranked(histories, tables.session_list, exclude=barred, user=user)
        else:
            found = world.top_lists(histories, tables.session_list, exclude=barred, user=user)
        lists[group] = torch.where(found < 0, no_item, found).to(lists.dtype)
    stale = tables.stale[state.request[rows]]
    if bool(stale.any()):
        first = None if tables.list_scores is None else tables.list_scores[start]
        old, old_scores = next_scored(tables.lists[start], first, shown, tables.session_list)
        lists = torch.where(stale[..., None], torch.where(old < 0, no_item, old).to(lists.dtype), lists)
        if old_scores is not None:
            scores = torch.where(stale[..., None], old_scores.to(scores.dtype), scores)
    state.lists[rows] = lists
    state.list_scores[rows] = scores
    taste = state.profile[rows, : tables.n_taste]
    heads = torch.where(lists == no_item, -1, lists)
    stats = list_stats(heads, tables.item_profile[:, -1], tables.item_profile[:, : tables.n_taste], taste)
    # as World's start_gap: log(1 + days), a year = 1
    recent = (torch.log1p(hours / 24.0) / torch.log1p(hours.new_tensor(365.0))).clamp(max=1.0)
    time = state.time[rows] + hours.to(torch.float64) * 3600.0
    zero = torch.zeros_like(hours)
    return replace(
        state,
        time=_put(state.time, rows, time),
        period=_put(state.period, rows, period_of(tables, time)),
        session=_put(state.session, rows, state.session[rows] + 1),
        session_request=_put(state.session_request, rows, torch.zeros_like(rows)),
        session_engaged=_put(state.session_engaged, rows, zero),
        gap=_put(state.gap, rows, hours),
        unrewarded=_put(state.unrewarded, rows, zero),
        exposure=_put(state.exposure, rows, torch.zeros_like(state.exposure[rows])),
        static_obs=_put(state.static_obs, rows, torch.cat([recent[:, None], stats.transpose(1, 2).flatten(1)], dim=1)),
    )


def _put(old: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return old.index_copy(0, rows, new)
