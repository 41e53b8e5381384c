"""From an action to a slate: one strategy, a blend of all, or one a place. Only lists and what was shown are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarec_gym.fixed_shapes import may_look

FUSION_SLATES = 4
"""A blend looks at the next items of every list, this many slates deep."""
RANK_CONSTANT = 60.0
"""Reciprocal rank fusion: 1 / (constant + rank); Cormack, Clarke and Buettcher, SIGIR 2009."""
LISTED = 1e-3
"""Standard deviations that the last item looked at is worth in a `zscore` fusion: more than an item that is not listed."""
MIN_WEIGHT = 1e-6
"""A blend's weights up to this one count as 0: the strategy is not asked and costs nothing."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What an action serves, rows first."""

    slate: Tensor
    """int64 (rows, slate_size): item ids, -1 where no item is left."""
    owner: Tensor | None
    """int64 (rows, slate_size): the strategy that each place belongs to; None where places have no owner of their own."""
    share: Tensor
    """float32 (rows, K): share of each strategy in the request, rows sum to 1."""
    asked: Tensor
    """bool (rows, K): strategies that had to rank for the request; each one costs."""


def next_unshown(lists: Tensor, shown: Tensor, count: int) -> Tensor:
    """First `count` items of each list that were not shown yet, in list order.

    Args:
        lists: int32 (rows, n_lists, length), n_items = no item.
        shown: uint8 (rows, n_items + 1); the last column is 1, so that "no item" counts as shown.
        count: Items wanted.

    Returns:
        int64 (rows, n_lists, count), filled up with -1.
    """
    return next_scored(lists, None, shown, count)[0]


def next_scored(lists: Tensor, scores: Tensor | None, shown: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """`next_unshown`, and the scores that belong to those items.

    Args:
        lists: int32 (rows, n_lists, length), n_items = no item.
        scores: float16 (rows, n_lists, length), or None.
        shown: uint8 (rows, n_items + 1).
        count: Items wanted.

    Returns:
        int64 (rows, n_lists, count), filled up with -1; float32 (rows, n_lists, count), filled up with 0, or None.
    """
    rows, n_lists, length = lists.shape
    items = lists.to(torch.int64, memory_format=torch.contiguous_format)
    fresh = (shown.gather(1, items.view(rows, n_lists * length)) == 0).view(rows, n_lists, length)
    if may_look(lists):
        # the narrower the count, the less memory it passes through
        narrow = torch.uint8 if length < 2**8 else torch.int16 if length < 2**15 else torch.int32
        wanted = fresh & (fresh.cumsum(dim=2, dtype=narrow) <= count)
        # numpy finds them in a quarter of torch's time
        at = torch.from_numpy(np.flatnonzero(wanted.numpy()))
        # where no list runs out, which is the rule, they lie one after the other
        if len(at) == rows * n_lists * count:
            shape = (rows, n_lists, count)
            found = None if scores is None else scores.reshape(-1).index_select(0, at).to(torch.float32).view(shape)
            return items.view(-1).index_select(0, at).view(shape), found
    place = fresh.to(torch.int32).cumsum(dim=2) - 1
    # items that are shown or come later than wanted all land in one extra column, which is cut off
    target = torch.where(fresh & (place < count), place.to(torch.int64), count)
    heads = torch.full((rows, n_lists, count + 1), -1, dtype=torch.int64, device=lists.device)
    heads = heads.scatter_(2, target, items)[..., :count]
    if scores is None:
        return heads, None
    worth = torch.zeros(rows, n_lists, count + 1, device=lists.device)
    return heads, worth.scatter_(2, target, scores.to(torch.float32))[..., :count]


def first_unshown(lists: Tensor, shown: Tensor, slate_size: int) -> Tensor:
    """First `slate_size` items of one list a row that were not shown yet; int32 (rows, length) -> int64 (rows, slate_size)."""
    return next_unshown(lists[:, None], shown, slate_size)[:, 0]


def select(lists: Tensor, shown: Tensor, available: Tensor, action: Tensor, slate_size: int) -> Plan:
    """One strategy serves the slate; unavailable, it serves nothing.

    Args:
        lists: int32 (rows, length), the list of the chosen strategy.
        shown: uint8 (rows, n_items + 1).
        available: bool (rows, K).
        action: int64 (rows,).
        slate_size: Items wanted.
    """
    slate = first_unshown(lists, shown, slate_size)
    slate = torch.where(available.gather(1, action[:, None]), slate, -1)
    chosen = torch.nn.functional.one_hot(action, available.shape[1])
    return Plan(slate, None, chosen.to(torch.float32), chosen.to(torch.bool))


def blend_weights(action: Tensor) -> Tensor:
    """Weights in [0, 1] of an action in [-1, 1] (values outside are cut off); all 0 asks every strategy alike.

    Args:
        action: float32 (rows, K).

    Returns:
        float32 (rows, K), every row with at least one weight above 0.
    """
    weight = (action.clamp(-1.0, 1.0) + 1.0) / 2.0
    weight = torch.where(weight > MIN_WEIGHT, weight, 0.0)
    return torch.where((weight > 0).any(dim=1, keepdim=True), weight, 1.0)


def blend(
    lists: Tensor,
    scores: Tensor | None,
    shown: Tensor,
    available: Tensor,
    action: Tensor,
    slate_size: int,
    fusion: str,
) -> Plan:
    """The best items of a weighted fusion of all lists; ties go to the lower item index.

        score(item) = sum over strategies k in service of weight_k * f_k(item)

    over the items among k's next unshown ones, as deep as `FUSION_SLATES` slates; f_k is 0 for all others. By rank, f_k is
    1 / (60 + rank) or 1 - (rank - 1) / depth; by score, it is the item's standard score less that of the last of those items
    (CombSUM with z-scores, Fox and Shaw, TREC-2 1994, with the smallest score that was seen for an item that is not listed).

    Args:
        lists: int32 (rows, K, length), the lists of all strategies.
        scores: float16 (rows, K, length), the standard scores of the listed items; read by "zscore" alone.
        shown: uint8 (rows, n_items + 1).
        available: bool (rows, K).
        action: float32 (rows, K) in [-1, 1].
        slate_size: Items wanted.
        fusion: "rank", "linear_rank" or "zscore".

    Raises:
        ValueError: When `fusion` is "zscore" and there are no scores.
    """
    weight = blend_weights(action)
    depth = FUSION_SLATES * slate_size
    heads, z = next_scored(lists, scores, shown, depth)
    rows, strategies, _ = heads.shape
    no_item = shown.shape[1] - 1
    items = torch.where(heads < 0, no_item, heads)
    rank = torch.arange(1, depth + 1, device=lists.device, dtype=torch.float32)
    # linear ranks times the depth: whole numbers, so that equal scores tie exactly
    worth = 1.0 / (RANK_CONSTANT + rank) if fusion == "rank" else depth + 1.0 - rank
    worth = worth.expand(rows, strategies, -1)
    if fusion == "zscore":
        if z is None:
            raise ValueError("a fusion by zscore needs the scores of the lists; hand them over, or fuse by rank")
        lowest = z.masked_fill(heads < 0, torch.inf).amin(dim=2, keepdim=True)
        worth = torch.where(heads < 0, 0.0, z - lowest + LISTED)
    serving = weight * available
    total = torch.zeros(rows, no_item + 1, device=lists.device)
    first = torch.zeros(rows, no_item + 1, dtype=torch.int64, device=lists.device)
    place = torch.arange(depth, device=lists.device)
    # one strategy after the other: a list names an item once, so sums have one order on every device
    for k in range(strategies):
        total.scatter_add_(1, items[:, k], serving[:, k, None] * worth[:, k])
    for k in reversed(range(strategies)):
        first.scatter_(1, items[:, k], (k * depth + place).expand(rows, -1))
    flat = items.flatten(1)
    score = total.gather(1, flat)
    # an item stands in several lists: its first mention speaks for it
    candidate = (first.gather(1, flat) == torch.arange(flat.shape[1], device=lists.device)) & (flat < no_item)
    # bits of a non-negative float order as integers; the item in the low half makes every key distinct
    key = score.view(torch.int32).to(torch.int64) * 2**32 + (no_item - flat)
    key = torch.where(candidate & (score > 0), key, -1)
    best = key.topk(min(slate_size, key.shape[1]), dim=1)
    slate = torch.where(best.values >= 0, flat.gather(1, best.indices), -1)
    return Plan(slate, None, weight / weight.sum(dim=1, keepdim=True), weight > 0)


def slots(lists: Tensor, shown: Tensor, available: Tensor, action: Tensor) -> Plan:
    """Team draft: place j takes the first unshown item of its strategy that the places before it did not take.

    Args:
        lists: int32 (rows, slate_size, length), the list of each place's strategy.
        shown: uint8 (rows, n_items + 1).
        available: bool (rows, K).
        action: int64 (rows, slate_size), the strategy of each place; an unavailable one leaves its place empty.
    """
    slate_size = action.shape[1]
    # j places before took at most j items of the list
    heads = next_unshown(lists, shown, slate_size)
    serves = available.gather(1, action)
    places: list[Tensor] = []
    for j in range(slate_size):
        fresh = heads[:, j] >= 0
        for taken in places:
            fresh &= heads[:, j] != taken[:, None]
        pick = fresh.to(torch.uint8).argmax(dim=1, keepdim=True)
        item = torch.where(fresh.any(dim=1), heads[:, j].gather(1, pick)[:, 0], -1)
        places.append(torch.where(serves[:, j], item, -1))
    count = torch.nn.functional.one_hot(action, available.shape[1]).sum(dim=1)
    return Plan(torch.stack(places, dim=1), action, count.to(torch.float32) / slate_size, count > 0)
