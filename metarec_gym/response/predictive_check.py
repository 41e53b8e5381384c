"""Posterior predictive check: are the world's differences between users and strategies those of the log?

The real log and logs that the judge emits go through the same function: the same users, the same prefix, the same lists of the
strategies at that prefix, the same number of events after it. An emitted event is an unseen item drawn in proportion to the
judge's gate odds at the date of the prefix's end, with the user's random coefficients drawn anew from their posterior for every
emitted log. Members of the judge take turns: an emitted log is one member's.

    hit(user, strategy, event) = the event's item is among the strategy's first M at the prefix
    interaction = hit rate - user's mean - strategy's mean + mean, computed in two halves (odd and even events)

Noise of a half is independent of the other half's, so cross products between halves estimate the covariance of the interaction
without the noise that a variance would contain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from metarec_gym.response.frozen import FrozenResponse
from metarec_gym.response.rows import period_of, period_starts
from metarec_gym.seeding import stream, torch_generator

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

_CHUNK_ROWS = 4_096
_CHUNK_USERS = 64
_FEWEST_USERS = 20

Halves = Literal["interleaved", "consecutive"]

ListsFunction = Callable[[Tensor, int], Tensor]
"""(histories int64 (batch, H), length) -> lists int64 (batch, n_strategies, length), -1 where a list has no more items."""


def predictive_check(
    dataset: Dataset,
    response: FrozenResponse,
    users: Tensor,
    lists_fn: ListsFunction,
    names: Sequence[str],
    *,
    seed: int,
    replicas: int = 200,
    prefix: int = 10,
    events: int = 20,
    list_length: int = 50,
    refresh: int = 1,
    max_users: int = 500,
    halves: Halves = "interleaved",
    progress: bool = False,
) -> dict[str, Any]:
    """Compares the log of one fold with logs that its judge emits; arguments and result as in `check_world`."""
    return check_world(
        dataset,
        {"judge": (response, users)},
        lists_fn,
        names,
        seed=seed,
        replicas=replicas,
        prefix=prefix,
        events=events,
        list_length=list_length,
        refresh=refresh,
        max_users=max_users,
        halves=halves,
        progress=progress,
    )


def check_world(
    dataset: Dataset,
    judges: Mapping[str, tuple[FrozenResponse, Tensor]],
    lists_fn: ListsFunction,
    names: Sequence[str],
    *,
    seed: int,
    replicas: int = 200,
    prefix: int = 10,
    events: int = 20,
    list_length: int = 50,
    refresh: int = 1,
    max_users: int = 500,
    halves: Halves | Literal["both"] = "interleaved",
    progress: bool = False,
) -> dict[str, Any]:
    """Compares the real log with emitted ones over all folds at once, each fold's users with their own judge.

    Args:
        dataset: The log.
        judges: The judge and the users (int64) of each fold.
        lists_fn: Ranks the strategies' lists, e.g. `pool.top_lists`.
        names: Strategy names, in the order of the lists.
        seed: Seed of the emitted logs.
        replicas: Emitted logs.
        prefix: Engaged items of the history at which lists are ranked.
        events: Engaged items after it that are compared; users with fewer are left out.
        list_length: M, the items of a list that count.
        refresh: The emitting user's state is brought up to date after this many events. The log's users are up to date at
            every event: more than 1 is faster and understates how much the events of one user have in common.
        max_users: At most this many users a fold, drawn by seed.
        halves: `interleaved`: odd and even events, which share whatever the user is after just then; `consecutive`: the first
            and the last half of the events, which share only what lasts; `both`: the first kind, and the second kind of the same
            emitted logs under the key `consecutive_halves`.
        progress: Shows a bar.

    Returns:
        JSON-able: `statistics` maps each name to observed value, mean and central 95 % of the replicas, `inside` and the
        share of replicas below; `inside_all`, and the settings. With too few users `statistics` is empty and `note` says so.
    """
    if events < 2 or prefix < 0 or replicas < 2:
        raise ValueError(
            f"events={events}, prefix={prefix}, replicas={replicas}; expected at least 2 events, 2 replicas, prefix >= 0"
        )
    chosen: dict[str, Tensor] = {}
    counts = dataset.engaged_counts()
    for name, (_, users) in judges.items():
        fit = users[counts[users] >= prefix + events]
        order = torch.randperm(len(fit), generator=torch_generator(seed, "check_users", name))[:max_users]
        chosen[name] = fit[order.sort()[0]]
    n_users = sum(len(users) for users in chosen.values())
    kinds: tuple[Halves, ...] = ("interleaved", "consecutive") if halves == "both" else (halves,)
    result: dict[str, Any] = {
        "n_users": n_users,
        "prefix": prefix,
        "events": events,
        "list_length": list_length,
        "replicas": replicas,
        "halves": kinds[0],
        "strategies": list(names),
        "statistics": {},
    }
    if n_users < _FEWEST_USERS:
        result["note"] = (
            f"only {n_users} users have {prefix + events} engaged items or more; the log is too small to tell "
            f"(at least {_FEWEST_USERS} are needed)"
        )
        return result
    bar = _bar(replicas * n_users, progress)
    real, emitted = [], []
    for name, (response, _) in judges.items():
        users = chosen[name]
        for number, part in enumerate(users.split(_CHUNK_USERS)):
            generator = torch_generator(seed, "emit", name, number)
            own, made = _hits(
                dataset,
                response,
                part,
                lists_fn,
                seed=stream(seed, "effects", name),
                generator=generator,
                replicas=replicas,
                prefix=prefix,
                events=events,
                list_length=list_length,
                refresh=refresh,
                kinds=kinds,
                bar=bar,
            )
            real.append(own)
            emitted.append(made)
    bar.close()
    of_log, of_replicas = torch.cat(real), torch.cat(emitted, dim=1)
    found = [_compared(of_log[..., kind, :], of_replicas[..., kind, :], names) for kind in range(len(kinds))]
    result |= found[0]
    if halves == "both":
        result["consecutive_halves"] = {**result, "halves": "consecutive", **found[1]}
    return result


def _compared(of_log: Tensor, of_replicas: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Each statistic of the log (n_users, n_strategies, 2) beside those of the replicas (replicas, n_users, n_strategies, 2)."""
    observed, simulated = strategy_statistics(of_log, names), strategy_statistics(of_replicas, names)
    statistics: dict[str, Any] = {}
    for name, value in observed.items():
        draws = simulated[name]
        low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
        statistics[name] = {
            "observed": float(value),
            "replicas_mean": float(draws.mean()),
            "replicas_low": low,
            "replicas_high": high,
            "inside": bool(low <= float(value) <= high),
            "share_of_replicas_below": float((draws < value).to(torch.float64).mean()),
        }
    return {
        "statistics": statistics,
        "inside_headline": all(statistics[name]["inside"] for name in ("interaction_trace", "headroom")),
        "inside_all": all(entry["inside"] for entry in statistics.values()),
    }


def strategy_statistics(hits: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The statistics that real and emitted logs are compared by.

    Args:
        hits: (..., n_users, n_strategies, 2): hit rates in the two halves of the events.
        names: Strategy names.

    Returns:
        Each statistic, float64 (...):
        `interaction_trace` and `interaction_variance/<strategy>`: split-half covariance of the user x strategy interaction;
        `user_variance`: of the users' mean hit rate; `headroom`: hit rate of the strategy that was best for the user in
        one half, measured in the other and averaged over both directions, relative to the single best strategy, minus 1;
        `headroom_shrunken`: the same when a user's interaction is shrunken by its reliability before choosing;
        `rate/<strategy>`: mean hit rate.
    """
    x = hits.to(torch.float64)
    n_users = x.shape[-3]
    user_mean = x.mean(dim=-2, keepdim=True)
    strategy_mean = x.mean(dim=-3, keepdim=True)
    grand = user_mean.mean(dim=-3, keepdim=True)
    interaction = x - user_mean - strategy_mean + grand
    # (n - 1): the strategies' means were estimated from the same users
    variance = (interaction[..., 0] * interaction[..., 1]).sum(dim=-2) / (n_users - 1)
    trace = variance.sum(dim=-1)
    spread = (interaction.square().sum(dim=-3) / (n_users - 1)).mean(dim=-1).sum(dim=-1)
    reliability = (trace / spread.clamp(min=1e-12)).clamp(0.0, 1.0)
    centred = user_mean[..., 0, :] - user_mean[..., 0, :].mean(dim=-2, keepdim=True)
    rate = x.mean(dim=(-3, -1))
    best = rate.max(dim=-1).values.clamp(min=1e-12)
    # ties are many among a few events: the generally better strategy wins them
    prior = rate[..., None, :]

    def headroom(weight: Tensor | float) -> Tensor:
        total = torch.zeros_like(best)
        for half in (0, 1):
            score = strategy_mean[..., 0, :, half][..., None, :] + weight * interaction[..., half]
            choice = (score + 1e-6 * prior).argmax(dim=-1, keepdim=True)
            total = total + x[..., 1 - half].gather(-1, choice)[..., 0].mean(dim=-1)
        return 0.5 * total / best - 1.0

    found = {
        "interaction_trace": trace,
        "headroom": headroom(1.0),
        "headroom_shrunken": headroom(reliability[..., None, None]),
        "user_variance": (centred[..., 0] * centred[..., 1]).sum(dim=-1) / (n_users - 1),
    }
    for index, name in enumerate(names):
        found[f"interaction_variance/{name}"] = variance[..., index]
    for index, name in enumerate(names):
        found[f"rate/{name}"] = rate[..., index]
    return found


def _hits(
    dataset: Dataset,
    response: FrozenResponse,
    users: Tensor,
    lists_fn: ListsFunction,
    *,
    seed: int,
    generator: torch.Generator,
    replicas: int,
    prefix: int,
    events: int,
    list_length: int,
    refresh: int,
    kinds: Sequence[Halves],
    bar: Any,
) -> tuple[Tensor, Tensor]:
    """Hit rates in halves of each kind: of the log (n_users, n_strategies, n_kinds, 2) and of emitted logs (replicas, ...)."""
    n = len(users)
    histories = dataset.histories(users, torch.full((n,), prefix))
    upto = dataset.histories(users, torch.full((n,), prefix + events))
    lists = lists_fn(histories, list_length).to(torch.int64)
    n_strategies = lists.shape[1]
    # the last column takes the places where a list has no item
    listed = torch.zeros(n, n_strategies, dataset.n_items + 1, dtype=torch.bool)
    listed.scatter_(2, torch.where(lists < 0, dataset.n_items, lists), True)
    listed[:, :, -1] = False
    row = torch.arange(n)

    def halves(row: Tensor, items: Tensor) -> Tensor:
        hit = listed[row[:, None], :, items].to(torch.float32)
        parts = []
        for kind in kinds:
            first, second = (hit[:, 0::2], hit[:, 1::2]) if kind == "interleaved" else hit.tensor_split(2, dim=1)
            parts.append(torch.stack([first.mean(dim=1), second.mean(dim=1)], dim=-1))
        return torch.stack(parts, dim=-2)

    real = halves(row, upto[:, prefix:])
    seen = torch.zeros(n, dataset.n_items, dtype=torch.bool)
    if prefix > 0:
        seen.scatter_(1, histories, True)
    state = response.start(histories)
    period = _periods(dataset, users, prefix)
    each = max(_CHUNK_ROWS // n, 1)
    made = []
    for lo in range(0, replicas, each):
        logs = range(lo, min(lo + each, replicas))
        z = torch.cat([response.effects(seed, number)[users, 0] for number in logs])
        repeated = row.repeat(len(logs))
        items = emit(
            response,
            state[repeated],
            z,
            seen[repeated],
            events,
            refresh=refresh,
            generator=generator,
            member=torch.tensor(logs).repeat_interleave(n) % response.n_members,
            period=period[repeated],
        )
        made.append(halves(repeated, items).view(len(logs), n, n_strategies, len(kinds), 2))
        bar.update(len(repeated))
    return real, torch.cat(made)


def _periods(dataset: Dataset, users: Tensor, prefix: int) -> Tensor:
    """Period of the log at which each user's prefix ends; users have more engaged items than that. int64 (n_users,)."""
    counts = dataset.engaged_counts()
    engaged = torch.nonzero(dataset.outcome[:, 0] > 0).flatten()
    first = torch.cumsum(counts, dim=0) - counts
    last = engaged[first[users] + max(prefix - 1, 0)]
    return period_of(period_starts(dataset), dataset.time[last])


def emit(
    response: FrozenResponse,
    state: Tensor,
    effects: Tensor,
    seen: Tensor,
    events: int,
    *,
    refresh: int,
    generator: torch.Generator,
    member: Tensor | None = None,
    period: Tensor | None = None,
) -> Tensor:
    """Events of users who take unseen items in proportion to the gate's odds, without replacement.

    Args:
        response: The judge.
        state: float32 (rows, state_dim).
        effects: float32 (rows, n_features), the gate's z.
        seen: bool (rows, n_items), items that cannot be taken.
        events: Items each user takes.
        refresh: Events between two updates of the state.
        generator: Source of the draws.
        member: int64 (rows,), the member that answers each row; None = the first.
        period: int64 (rows,), period of the log; None = the first, where there is no trend.

    Returns:
        int64 (rows, events), in order.
    """
    t, n_static, d = response.tensors, response.n_static, response.dim
    member = torch.zeros(len(state), dtype=torch.int64) if member is None else member
    period = torch.zeros(len(state), dtype=torch.int64) if period is None else period
    # each member's rows and table: a slate of all items is then one matrix product
    shared = [t["item_input"], t["static_features"], t["trend"].T]
    groups = [
        (rows, torch.cat([t["item_output"][m, :, 0], *shared, t["item_bias"][m, :, :1]], dim=1).T.contiguous())
        for m in range(response.n_members)
        if len(rows := torch.nonzero(member == m).flatten())
    ]
    scale = t["calibration"][member, 0, 0][:, None]
    dated = torch.nn.functional.one_hot(period, response.n_periods).to(torch.float32)
    taken, blocked = [], seen.clone()
    for lo in range(0, events, refresh):
        inputs = response.inputs(state)
        weight = effects[:, n_static + 1 :] * t["dynamic_scale"]
        dynamic = weight[:, :1] * inputs[:, :d] + weight[:, 1:] * inputs[:, -d - 1 : -1]
        trend = effects[:, n_static, None] * dated
        one = torch.ones(len(state), 1)
        users = torch.cat([response.tower(inputs, member)[:, 0], dynamic, effects[:, :n_static], trend, one], dim=1)
        logit = torch.empty(len(state), response.n_items)
        for rows, table in groups:
            logit[rows] = users[rows] @ table
        logit = logit.mul_(scale).masked_fill_(blocked, -torch.inf)
        items = draw_without_replacement(logit, min(refresh, events - lo), generator)
        taken.append(items)
        blocked.scatter_(1, items, True)
        state = response.step(state, items, torch.ones(items.shape, dtype=torch.bool))
    return torch.cat(taken, dim=1)


def draw_without_replacement(logit: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Items drawn one after the other in proportion to exp(logit) among those left; -inf is never drawn.

    Draws with replacement whose repeats are skipped have that law, and one cumulative sum serves all of them; it is three
    times as fast as a Gumbel number for every item.

    Args:
        logit: float32 (rows, n_items), at least `count` finite in each row; overwritten.
        count: Items wanted.
        generator: Source of the draws.

    Returns:
        int64 (rows, count), in the order drawn.
    """
    weight = logit.sub_(logit.amax(dim=1, keepdim=True)).exp_()
    cumulative = weight.cumsum(dim=1)
    tries = 3 * count
    # the factor keeps a rounded draw below the total: beyond it there is no item
    draw = torch.rand(len(logit), tries, generator=generator) * cumulative[:, -1:] * (1.0 - 1e-6)
    found = torch.searchsorted(cumulative, draw, right=True)
    same = (found[:, :, None] == found[:, None, :]).tril(-1).any(dim=2)
    place = (~same).cumsum(dim=1) - 1
    enough = place[:, -1] >= count - 1
    target = torch.where(~same & (place < count), place, count)
    items = torch.zeros(len(logit), count + 1, dtype=torch.int64).scatter_(1, target, found)[:, :count]
    if not bool(enough.all()):
        # odds so uneven that a few items took all draws: what was drawn stays, an exact race among the others does the rest
        late = torch.nonzero(~enough).flatten()
        have = place[late, -1:] + 1
        left = weight[late].scatter(1, found[late], 0.0)
        race = torch.empty(left.shape).exponential_(generator=generator) / left
        rest = race.topk(count, dim=1, largest=False).indices
        column = torch.arange(count)[None, :]
        items[late] = torch.where(column < have, items[late], rest.gather(1, (column - have).clamp(min=0)))
    return items


def _bar(total: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="posterior predictive check", disable=not show, unit="user")
