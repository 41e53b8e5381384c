"""A small world by construction, and the lists of its strategies for any history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metarec_gym.response.frozen import DYNAMIC_FEATURES, FrozenResponse, untimed
from metarec_gym.seeding import numpy_rng
from metarec_gym.world import World, WorldError, list_stats


def synthetic_world(
    n_types: int,
    users_per_type: int,
    items_per_type: int,
    horizon: int,
    slate_size: int,
    probability: tuple[float, float],
    history_lengths: tuple[int, ...],
    leaving: tuple[float, ...] | None,
    identical: bool,
    seed: int,
) -> World:
    """Arguments and result as `World.synthetic`; `probability` is (high, low)."""
    length = horizon * slate_size
    if items_per_type < length + max(history_lengths):
        raise WorldError(
            f"items_per_type={items_per_type} is too small: {horizon} requests of {slate_size} items and a history of "
            f"{max(history_lengths)} need at least {length + max(history_lengths)}"
        )
    high, low = (torch.logit(torch.tensor(p, dtype=torch.float64)).item() for p in probability)
    n_items, n_users, dim, taste_dim = n_types * items_per_type, 2 * n_types * users_per_type, 4, max(8, n_types)
    item_type = torch.arange(n_items) % n_types
    user_type = torch.arange(n_users) % n_types
    user_fold = torch.arange(n_users) // (n_types * users_per_type)
    one_hot = torch.nn.functional.one_hot(item_type, n_types).to(torch.float32)
    features = n_types + len(DYNAMIC_FEATURES)
    effect_mean = torch.full((n_users, 1, features), float(low))
    effect_mean[torch.arange(n_users), 0, user_type] = float(high)
    effect_mean[:, :, n_types:] = 0.0
    response = FrozenResponse(
        {
            "item_input": torch.zeros(n_items, dim),
            "decays": torch.tensor([0.5]),
            "hidden_weight": torch.zeros(1, 4, 2 * dim + 1),
            "hidden_bias": torch.zeros(1, 4),
            "tower_weight": torch.zeros(1, 2, 4),
            "tower_bias": torch.zeros(1, 2),
            "item_output": torch.zeros(1, n_items, 1, 2),
            "item_bias": torch.zeros(1, n_items, 1),
            "calibration": torch.tensor([[[1.0, 0.0]]]),
            "static_features": one_hot,
            "trend": torch.zeros(1, n_items),
            "dynamic_scale": torch.zeros(2),
            "effect_mean": effect_mean,
            "effect_chol": torch.zeros(n_users, 1, features, features),
            "pair_sd": torch.zeros(1),
            **untimed(),
            "leaving": _leaving(leaving),
        },
        ("click",),
        (*(f"category_{g}" for g in range(n_types)), *DYNAMIC_FEATURES),
    )
    per_user = len(history_lengths)
    start_user = torch.arange(n_users).repeat_interleave(per_user)
    start_length = torch.tensor(history_lengths).repeat(n_users)
    # category g's items in a fixed order; a history is a seeded sample of the user's own category
    members = torch.stack([torch.nonzero(item_type == g)[:, 0] for g in range(n_types)])
    rng = numpy_rng(seed, "synthetic histories")
    strategies = (*(f"specialist_{g}" for g in range(n_types)), "mixed")
    orders = [*members, torch.arange(n_items)]
    lists = torch.full((len(start_user), len(strategies), length), -1, dtype=torch.int32)
    popularity = torch.full((n_items,), 0.5)
    taste = torch.zeros(n_items, taste_dim)
    taste[:, :n_types] = one_hot
    # one order a user: shorter histories are the beginnings of longer ones
    own_order = [members[int(g)][torch.from_numpy(rng.permutation(items_per_type))] for g in user_type]
    histories: list[Tensor] = []
    for row, (user, size) in enumerate(zip(start_user.tolist(), start_length.tolist(), strict=True)):
        history = own_order[user][:size]
        histories.append(history)
        for k, order in enumerate(orders):
            ranked = orders[-1] if identical else order
            unseen = ranked[~torch.isin(ranked, history)]
            lists[row, k] = unseen[:length].to(torch.int32)
    taste_sum = torch.stack([taste[h].sum(dim=0) for h in histories])
    return World(
        name="synthetic_null" if identical else "synthetic",
        strategies=strategies,
        outcomes=("click",),
        horizon=horizon,
        slate_size=slate_size,
        seed=seed,
        reward_scale=round((probability[0] + (n_types - 1) * probability[1]) / n_types, 6),
        tensors={
            "outcome_weights": torch.ones(1),
            "costs": torch.linspace(0.2, 1.0, len(strategies)),
            "item_taste": taste,
            "item_popularity": popularity,
            "item_category": one_hot,
            "start_user": start_user,
            "start_fold": user_fold[start_user].to(torch.int8),
            "start_length": start_length,
            "start_lists": lists,
            "start_list_scores": ramp_scores(lists),
            "start_state": torch.zeros(len(start_user), response.state_dim),
            "start_state_second": torch.zeros(len(start_user), 0),
            "start_taste": taste_sum,
            "start_category": torch.stack([one_hot[h].sum(dim=0) for h in histories]),
            "start_popularity": start_length * 0.5,
            "start_gap": torch.zeros(len(start_user)),
            "start_list_stats": list_stats(lists, popularity, taste, taste_sum),
            "start_time": torch.zeros(len(start_user), dtype=torch.float64),
            "start_sessions": (start_length > 0).to(torch.float32),
            "start_previous_gap": torch.zeros(len(start_user)),
            "period_starts": torch.zeros(1, dtype=torch.float64),
            "user_events": torch.stack(own_order)[:, : max(history_lengths)].flatten().to(torch.int32),
            "user_event_offsets": torch.arange(n_users + 1) * max(history_lengths),
        },
        responses={"A": response, "B": response},
        info={
            "card": {"source": "synthetic, by construction", "licence": "Apache-2.0"},
            "metrics": {"users_by_fold": {"A": n_users // 2, "B": n_users // 2}},
        },
        ranker=FixedOrders([orders[-1] if identical else order for order in orders], n_items),
    )


class FixedOrders:
    """Strategies that list items in a fixed order, without those of the history.

    Args:
        orders: One order of item ids a strategy; int64, each of its own length, or filled up with n_items to a table.
        n_items: Items in the catalogue.
    """

    def __init__(self, orders: Sequence[Tensor] | Tensor, n_items: int) -> None:
        longest = max(len(order) for order in orders)
        self.orders = torch.full((len(orders), longest), n_items, dtype=torch.int64)
        for k, order in enumerate(orders):
            self.orders[k, : len(order)] = order
        self.n_items = n_items

    def top_lists(self, histories: Tensor, length: int, *, exclude: Tensor | None = None) -> Tensor:
        """Lists of every strategy; see `World.top_lists`."""
        rows, n_strategies = histories.shape[0], self.orders.shape[0]
        out = torch.zeros(rows, self.n_items + 1, dtype=torch.bool, device=histories.device)
        if exclude is not None:
            out[:, : self.n_items] = exclude
        out.scatter_(1, torch.where(histories < 0, self.n_items, histories), True)
        # the last column is "no item", with which short orders are filled up
        out[:, -1] = True
        orders = self.orders.to(histories.device)
        lists = torch.full((rows, n_strategies, length + 1), -1, dtype=torch.int64, device=histories.device)
        for k in range(n_strategies):
            fresh = ~out[:, orders[k]]
            place = fresh.to(torch.int64).cumsum(dim=1) - 1
            target = torch.where(fresh & (place < length), place, length)
            lists[:, k].scatter_(1, target, orders[k].expand(rows, -1))
        return lists[..., :length]

    def ranked(self, histories: Tensor, length: int, *, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Lists and standard scores; see `World.ranked`."""
        lists = self.top_lists(histories, length, exclude=exclude)
        return lists, ramp_scores(lists)


def ramp_scores(lists: Tensor) -> Tensor:
    """Standard scores of strategies that score by place: the places of each list, standardised over the list.

    Args:
        lists: int (rows, K, length), -1 where there is no item.

    Returns:
        float16 (rows, K, length), falling along each list, 0 where there is no item.
    """
    valid = lists >= 0
    count = valid.sum(dim=2, keepdim=True).to(torch.float64)
    place = torch.arange(lists.shape[2], device=lists.device, dtype=torch.float64)
    # places 0 .. n - 1 have mean (n - 1) / 2 and variance (n^2 - 1) / 12
    z = ((count - 1.0) / 2.0 - place) / ((count**2 - 1.0) / 12.0).clamp(min=1e-12).sqrt()
    return torch.where(valid & (count > 1), z, 0.0).to(torch.float16)


def _leaving(given: tuple[float, ...] | None) -> Tensor:
    weights = (-torch.inf,) if given is None else given
    return torch.tensor([*weights, *([0.0] * (4 - len(weights)))])
