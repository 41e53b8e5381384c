"""One request as functions of (state, action, draws): plan, serve, advance. No generator, no `self`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metarec_gym.envs import actions
from metarec_gym.envs.actions import Plan
from metarec_gym.envs.config import EnvConfig
from metarec_gym.envs.life import in_service, outage
from metarec_gym.envs.sessions import absence
from metarec_gym.envs.user_state import EnvTables, UserState
from metarec_gym.response.frozen import AnyJudge, item_exposure, joint_probs, logistic, next_exposure, rows_of
from metarec_gym.seeding import fold_in, mix, normal, uniform

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
    """float32 (rows,): parts - cost - latency + retention."""
    parts: Tensor
    """float32 (rows, n_outcomes): reward of each outcome before cost."""
    cost: Tensor
    """float32 (rows,): reward lost to serving cost."""
    latency: Tensor
    """float32 (rows,): reward lost to latency."""
    retention: Tensor
    """float32 (rows,): reward for a user who comes back in time after this request."""
    expected_reward: Tensor
    """float32 (rows,): mean of `reward` over the draws, given state and the user's coefficients (privileged)."""
    unrewarded: Tensor
    """float32 (rows,): requests since the last one in which an item was taken, this one included."""
    left: Tensor
    """bool (rows,): the user left, in a longer episode this session only."""
    session_ends: Tensor
    """bool (rows,): the session ends here and the user goes; never in an episode of one session."""
    away_hours: Tensor
    """float32 (rows,): until the user is back, were the session to end here; inf = stays away."""


# ---------------------------------------------------------------------------------------------- what is shown
def depth_of(tables: EnvTables, deepest: int, slate_size: int, action: str) -> int:
    """Items of a list that can be needed when at most `deepest` requests of its session were served."""
    ahead = actions.FUSION_SLATES if action == "blend" else 1
    length = tables.session_list if tables.session_requests is not None else tables.lists.shape[2]
    return min(length, slate_size * (deepest + ahead))


def lists_of(tables: EnvTables, state: UserState, strategies: Tensor | None, depth: int) -> Tensor:
    """Beginnings of lists, ranked when the session began; int32 (rows, n, depth).

    Args:
        tables: The fold's tables.
        state: The rows.
        strategies: int64 (rows, n), which ones; None = all, in order.
        depth: Items of each.
    """
    if tables.session_requests is None:
        if strategies is None:
            return tables.lists[state.start, :, :depth]
        if strategies.shape[1] == 1:
            # a whole beginning is copied at once
            row = state.start * tables.lists.shape[1] + strategies[:, 0]
            return tables.lists.view(-1, tables.lists.shape[2])[:, :depth].index_select(0, row)[:, None]
        return tables.lists[state.start[:, None], strategies, :depth]
    lists = state.lists[..., :depth]
    return lists if strategies is None else lists.gather(1, strategies[..., None].expand(-1, -1, depth))


def scores_of(tables: EnvTables, state: UserState, depth: int) -> Tensor | None:
    """Standard scores of the beginnings of all lists; float16 (rows, K, depth), None where no fusion reads them."""
    if tables.list_scores is None:
        return None
    return (tables.list_scores[state.start] if tables.session_requests is None else state.list_scores)[..., :depth]


def plan(tables: EnvTables, config: EnvConfig, state: UserState, action: Tensor, slate_size: int, deepest: int) -> Plan:
    """What an action serves now.

    Args:
        tables: The fold's tables.
        config: The kind of action, and how a blend fuses.
        state: The rows.
        action: int64 (rows,) for `select`, float32 (rows, K) for `blend`, int64 (rows, slate_size) for `slots`.
        slate_size: Items of a slate.
        deepest: Most requests that the session of a row has served; bounds what is read of the lists.
    """
    depth = depth_of(tables, deepest, slate_size, config.action)
    if config.action == "blend":
        lists = lists_of(tables, state, None, depth)
        scores = scores_of(tables, state, depth)
        return actions.blend(lists, scores, state.shown, state.available, action, slate_size, config.fusion)
    if config.action == "slots":
        return actions.slots(lists_of(tables, state, action, depth), state.shown, state.available, action)
    lists = lists_of(tables, state, action[:, None], depth)[:, 0]
    return actions.select(lists, state.shown, state.available, action, slate_size)


# ------------------------------------------------------------------------------------------------ the answer
def gate_shift(tables: EnvTables, state: UserState, items: Tensor) -> Tensor | None:
    """What fatigue and settings add to the gate's logit; int64 (rows, m) -> float32 (rows, m), None = nothing."""
    if not tables.shifts_gate:
        return None
    shift = tables.gate_offset[: items.shape[1]].expand(items.shape)
    if tables.fatigue != 0.0:
        shift = shift - tables.fatigue * item_exposure(state.exposure, tables.item_category[items])
    if len(tables.drift):
        shift = shift - state.session[:, None] * tables.drift[items]
    return shift


def slate_probs(tables: EnvTables, judge: AnyJudge, state: UserState, slate: Tensor) -> Tensor:
    """Conditional outcome probabilities of a slate; (rows, slate_size) -> (rows, slate_size, n_outcomes), 0 where no item."""
    user = tables.user[state.start]
    # where there is no item, one that the judge can answer is asked about, and not counted
    items = torch.where(slate < 0, tables.askable[user][:, None], slate)
    several = tables.n_members > 1
    noise = None
    if judge.has_pair_noise:
        root = mix(torch.full_like(user, tables.world_seed)) + state.member
        noise = normal(fold_in(fold_in(fold_in(root, PAIR_DRAW), user)[:, None], slate))
    probs = judge.conditional_probs(
        state.response,
        tables.effects.flatten(0, 1).index_select(0, state.member * tables.effects.shape[1] + user),
        items,
        user=user,
        member=state.member if several else None,
        period=state.period,
        pair_noise=noise,
        gate_shift=gate_shift(tables, state, items),
    )
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


def leave_prob(
    tables: EnvTables, judge: AnyJudge, state: UserState, slate: Tensor, count: Tensor, unrewarded: Tensor
) -> Tensor:
    """Probability that the user leaves after a slate of which `count` items were taken; float32 (rows,)."""
    if tables.patience is not None:
        return logistic(-4.0 + 4.0 * unrewarded / tables.patience)
    size = (slate >= 0).to(torch.float32).sum(dim=1).clamp(min=1.0)
    repetition = None
    if tables.tracks_exposure:
        met = item_exposure(state.exposure, tables.item_category[slate.clamp(min=0)])
        repetition = (met * (slate >= 0)).sum(dim=1) / size
    return judge.leave_prob(unrewarded, count / size, repetition)


def serve(tables: EnvTables, judge: AnyJudge, config: EnvConfig, state: UserState, planned: Plan) -> Served:
    """Shows a slate, lets the user respond, and says whether the user goes and comes back."""
    slate = planned.slate
    probs = slate_probs(tables, judge, state, slate)
    outcomes = draw_outcomes(state.draw_key, state.request, slate, probs)
    parts = outcomes.to(torch.float32).sum(dim=1) * tables.outcome_weights
    cost = (planned.asked * tables.cost).sum(dim=1) * state.cost_weight
    # strategies rank side by side: the slowest one is waited for
    latency = (planned.asked * tables.latency).amax(dim=1)
    reward = parts.sum(dim=1) - cost - latency
    expected = (joint_probs(probs) * tables.outcome_weights).sum(dim=(1, 2)) - cost - latency
    count = outcomes[..., 0].to(torch.float32).sum(dim=1)
    unrewarded = torch.where(count > 0, 0.0, state.unrewarded + 1.0)
    if tables.may_leave:
        leaving = leave_prob(tables, judge, state, slate, count, unrewarded)
        left = uniform(fold_in(fold_in(state.draw_key, state.request), LEAVE_DRAW)) < leaving
    else:
        leaving, left = torch.zeros_like(reward), torch.zeros_like(reward, dtype=torch.bool)
    retention, hours = torch.zeros_like(reward), torch.zeros_like(reward)
    session_ends = torch.zeros_like(left)
    if tables.session_requests is not None:
        full = state.session_request + 1 >= tables.session_requests
        session_ends = left | full
        within = config.retention_days * 24.0
        away = absence(tables, judge, state, state.session_engaged + count, within)
        hours = away.hours
        retention = config.retention_weight * (session_ends & (hours <= within)).to(torch.float32)
        reward = reward + retention
        expected = expected + config.retention_weight * torch.where(full, 1.0, leaving) * away.in_time_prob
    return Served(
        slate, outcomes, reward, parts, cost, latency, retention, expected, unrewarded, left, session_ends, hours
    )


def silenced(served: Served, active: Tensor) -> Served:
    """What was served, without the rows that are not `active` (bool (rows,))."""
    return replace(
        served,
        slate=torch.where(active[:, None], served.slate, -1),
        outcomes=served.outcomes & active[:, None, None],
        reward=served.reward * active,
        parts=served.parts * active[:, None],
        cost=served.cost * active,
        latency=served.latency * active,
        retention=served.retention * active,
        expected_reward=served.expected_reward * active,
        session_ends=served.session_ends & active,
    )


# ------------------------------------------------------------------------------------------------ what follows
def credit(tables: EnvTables, state: UserState, planned: Plan, served: Served) -> Tensor:
    """Reward of each strategy; rows sum to the reward. float32 (rows, K).

    Where every place belongs to a strategy, it is credited with the place's outcomes and pays its own cost, and what belongs to
    nobody alone (latency, retention) is shared; elsewhere the whole reward is.
    """
    if planned.owner is None:
        return planned.share * served.reward[:, None]
    worth = (served.outcomes.to(torch.float32) * tables.outcome_weights).sum(dim=2)
    owner = torch.nn.functional.one_hot(planned.owner, planned.share.shape[1])
    own = (owner * worth[..., None]).sum(dim=1)
    costs = planned.asked * tables.cost * state.cost_weight[:, None]
    return own - costs + planned.share * (served.retention - served.latency)[:, None]


def advance(
    tables: EnvTables, judge: AnyJudge, state: UserState, planned: Plan, served: Served, horizon: int
) -> UserState:
    """The user's state after the request; marks the shown items in `state.shown` in place.

    Where a session ends and the user will be back, the next session has yet to be started (`sessions.start_sessions`).
    """
    taken = served.outcomes[..., 0]
    items = served.slate.clamp(min=0)
    weight = taken.to(torch.float32)[..., None]
    n_items = state.shown.shape[1] - 1
    state.shown.scatter_(1, torch.where(served.slate < 0, n_items, served.slate), 1)
    count = weight.sum(dim=(1, 2))
    request = state.request + 1
    new = replace(
        state,
        request=request,
        response=judge.step(state.response, items, taken),
        profile=state.profile + rows_of(tables.item_profile, items).mul_(weight).sum(dim=1),
        engaged=state.engaged + count,
        strategy_count=state.strategy_count + planned.share,
        strategy_reward=state.strategy_reward + credit(tables, state, planned, served),
        last_share=planned.share,
        last_reward=served.reward,
        unrewarded=served.unrewarded,
        terminated=served.left,
        truncated=request >= horizon,
    )
    changes: dict[str, Tensor] = {}
    if tables.tracks_exposure:
        valid = served.slate >= 0
        changes["exposure"] = next_exposure(state.exposure, tables.item_category[items], valid)
    if tables.outage_rate > 0:
        changes["down"] = outage(
            state.draw_key, request, state.down, tables.outage_rate, tables.outage_length, first=False
        )
    if tables.service_changes:
        service = tables.service[request.clamp(max=horizon)]
        changes["available"] = in_service(service, changes.get("down", state.down))
    if tables.session_requests is not None:
        changes |= {
            "session_request": state.session_request + 1,
            "session_engaged": state.session_engaged + count,
            "taken": _append(state.taken, state.taken_count, items, taken),
            "taken_count": state.taken_count + taken.sum(dim=1),
            # leaving ends the session; the episode goes on if the user comes back
            "terminated": served.session_ends & torch.isinf(served.away_hours),
        }
    return replace(new, **changes) if changes else new


def _append(buffer: Tensor, count: Tensor, items: Tensor, taken: Tensor) -> Tensor:
    """Writes the taken items behind the first `count` of each row; the last column takes what is not kept."""
    last = buffer.shape[1] - 1
    # rows whose episode is over are served too before they are silenced: a full one has no place left
    place = (count[:, None] + taken.to(torch.int64).cumsum(dim=1) - 1).clamp(max=last)
    place = torch.where(taken, place, last)
    written = buffer.scatter(1, place, items.to(buffer.dtype))
    written[:, last] = -1
    return written
