"""A log whose users are known by construction: each has a type, and mostly takes items of that type's category."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from metarec_gym import seeding
from metarec_gym.data.interactions import InteractionLog

_START_S = 1_700_000_000.0
_DAY_S = 86_400.0


@dataclass(frozen=True, eq=False)
class SyntheticTruth:
    """What the log does not say: who the users are."""

    user_type: dict[str, int]
    """Type of each user id, 0..n_types-1."""
    item_category: dict[str, int]
    """Category of each item id, 0..n_types-1; type g prefers category g."""
    popularity: dict[str, float]
    """Probability of each item inside its category, before repeats are excluded."""
    on_type_share: float
    """Probability that an engaged item is of the user's category, while that category has items left."""
    like_probability: tuple[float, float]
    """Probability of a like, given a watch, of an item of the user's category and of another."""

    def types_of(self, user_ids: NDArray[np.object_]) -> NDArray[np.int64]:
        """Types of the users, e.g. of `Dataset.user_ids`; (n_users,)."""
        return np.array([self.user_type[str(user)] for user in user_ids], dtype=np.int64)

    def categories_of(self, item_ids: NDArray[np.object_]) -> NDArray[np.int64]:
        """Categories of the items, e.g. of `Dataset.item_ids`; (n_items,)."""
        return np.array([self.item_category[str(item)] for item in item_ids], dtype=np.int64)


def synthetic_log(
    seed: int,
    *,
    n_users: int = 240,
    n_items: int = 120,
    n_types: int = 4,
    events_per_user: tuple[int, int] = (8, 40),
    on_type_share: float = 0.8,
    like_probability: tuple[float, float] = (0.8, 0.25),
    popularity_skew: float = 1.0,
    shown_per_event: int = 0,
    name: str = "synthetic",
) -> tuple[InteractionLog, SyntheticTruth]:
    """A log of users of known type: outcomes `watch` (the gate, weight 0) and `like` (weight 1), as in MovieLens.

    Users come back every few days; events of a session are minutes apart, so the 30-minute rule recovers the sessions.

    Args:
        seed: Seed of everything.
        n_users: Users; type of user u is u modulo n_types.
        n_items: Items; category of item i is i modulo n_types, so categories are equally large.
        n_types: Types and categories.
        events_per_user: Fewest and most watched items of a user.
        on_type_share: Probability that a watched item is of the user's category.
        like_probability: Probability of a like, given a watch, of an item of the user's category and of another.
        popularity_skew: Popularity inside a category is proportional to rank ** -skew; 0 is uniform.
        shown_per_event: Items shown and not watched per watched one; 0 gives positives only, more gives real negatives.
        name: Name of the log.

    Returns:
        The log and the truth about it.
    """
    low, high = events_per_user
    if not (1 <= n_types <= n_items and 1 <= low <= high <= n_items and n_users >= 3 and shown_per_event >= 0):
        raise ValueError(
            f"cannot make {n_users} users of {n_types} types with {low} to {high} events among {n_items} items; "
            "expected 3 users or more, and no more types or events than items"
        )
    rng = seeding.numpy_rng(seed, "synthetic_log")
    user_width, item_width = len(str(n_users - 1)), len(str(n_items - 1))
    user_ids = [f"u{index:0{user_width}d}" for index in range(n_users)]
    item_ids = np.array([f"i{index:0{item_width}d}" for index in range(n_items)], dtype=object)
    category = np.arange(n_items) % n_types
    # popular items are not the first ones: an arm that ranks by index must not look good by accident
    rank = np.empty(n_items, dtype=np.int64)
    for group in range(n_types):
        members = np.flatnonzero(category == group)
        rank[members] = rng.permutation(len(members)) + 1
    popularity = rank.astype(np.float64) ** -popularity_skew
    for group in range(n_types):
        popularity[category == group] /= popularity[category == group].sum()
    # log popularity + Gumbel noise, sorted: a draw without replacement in proportion to popularity
    keys = np.log(popularity) + rng.gumbel(size=(n_users, n_items))

    rows: list[tuple[str, str, float, float, float]] = []
    for index, user_id in enumerate(user_ids):
        own = index % n_types
        queue = np.argsort(-keys[index], kind="stable")
        own_queue, other_queue = list(queue[category[queue] == own]), list(queue[category[queue] != own])
        n_events = int(rng.integers(low, high + 1))
        time_s = _START_S + float(rng.uniform(0, 30 * _DAY_S))
        left_in_session = int(rng.integers(1, 7))
        for _ in range(n_events):
            if left_in_session == 0:
                time_s += float(rng.uniform(0.5, 5.0)) * _DAY_S
                left_in_session = int(rng.integers(1, 7))
            left_in_session -= 1
            on_type = bool(rng.random() < on_type_share)
            chosen = (own_queue if (on_type and own_queue) or not other_queue else other_queue).pop(0)
            liked = float(rng.random() < like_probability[0 if category[chosen] == own else 1])
            rows.append((user_id, str(item_ids[chosen]), time_s, 1.0, liked))
            if shown_per_event:
                rest = np.array(own_queue + other_queue, dtype=np.int64)
                for skipped in rng.choice(rest, size=min(shown_per_event, len(rest)), replace=False):
                    rows.append((user_id, str(item_ids[skipped]), time_s + 1.0, 0.0, 0.0))
            time_s += float(rng.uniform(60.0, 600.0))
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "watch", "like"])
    items = pd.DataFrame(
        {
            "item_id": item_ids,
            "title": [f"Item {index} of category {group}" for index, group in enumerate(category)],
            "categories": [f"category_{group}" for group in category],
            "release_time": _START_S - rng.uniform(0, 3_000 * _DAY_S, size=n_items),
        }
    )
    log = InteractionLog.from_frame(
        frame,
        name=name,
        outcomes=("watch", "like"),
        outcome_weights=(0.0, 1.0),
        items=items,
        card={
            "source": f"metarec_gym.data.synthetic_log(seed={seed})",
            "licence": "made up, free of rights",
            "outcomes": {"watch": "the user took the item", "like": "the user liked what was taken"},
        },
    )
    truth = SyntheticTruth(
        user_type={user_id: index % n_types for index, user_id in enumerate(user_ids)},
        item_category={str(item): int(group) for item, group in zip(item_ids, category, strict=True)},
        popularity={str(item): float(value) for item, value in zip(item_ids, popularity, strict=True)},
        on_type_share=on_type_share,
        like_probability=like_probability,
    )
    return log, truth
