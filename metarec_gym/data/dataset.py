"""`Dataset`: a log with ids 0..n-1 as tensors, the form in which every later room reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_gym.data.interactions import InteractionLog
from metarec_gym.data.sessions import SESSION_GAP_S, sessions_by_gap, sessions_by_id
from metarec_gym.data.splits import assign_folds


@dataclass(frozen=True, eq=False)
class Dataset:
    """A log with users and items numbered by their sorted ids, rows sorted by (user, time)."""

    name: str
    """Name of the log."""
    outcomes: tuple[str, ...]
    """Outcome names, the gate first."""
    outcome_weights: tuple[float, ...]
    """Reward of each outcome."""
    has_impressions: bool
    """Whether rows without engagement (real negatives) are there."""
    user_ids: NDArray[np.object_]
    """(n_users,) original ids."""
    item_ids: NDArray[np.object_]
    """(n_items,) original ids."""
    user: Tensor
    """int64 (n_rows,)."""
    item: Tensor
    """int64 (n_rows,)."""
    time: Tensor
    """float64 (n_rows,), unix seconds."""
    outcome: Tensor
    """float32 (n_rows, n_outcomes)."""
    session: Tensor
    """int64 (n_rows,), numbered from 0 within each user."""
    offsets: Tensor
    """int64 (n_users + 1,): rows of user u are offsets[u]:offsets[u + 1]."""
    fold: Tensor
    """int8 (n_users,): FOLD_S, FOLD_A or FOLD_B."""
    item_text: tuple[str, ...]
    """Title and categories of each item, '' if unknown."""
    item_category: Tensor
    """float32 (n_items, n_categories), multi-hot; n_categories may be 0."""
    category_names: tuple[str, ...]
    """Names of the categories, sorted."""
    item_release: Tensor
    """float64 (n_items,), unix seconds, NaN if unknown."""
    position: Tensor | None = None
    """int64 (n_rows,): place in the slate counted from 0, -1 unknown; None where the log has no positions."""

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.item_ids)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return int(self.user.shape[0])

    def users_in(self, *folds: int) -> Tensor:
        """The users of the given folds, ascending; int64 (n,)."""
        wanted = torch.tensor(folds, dtype=torch.int8)
        return torch.nonzero(torch.isin(self.fold, wanted)).flatten()

    def rows_of(self, users: Tensor) -> Tensor:
        """The rows of the given users, ascending; int64 (n_users_given,) -> int64 (n,)."""
        chosen = torch.zeros(self.n_users, dtype=torch.bool)
        chosen[users] = True
        return torch.nonzero(chosen[self.user]).flatten()

    @cached_property
    def _engaged(self) -> tuple[Tensor, Tensor]:
        """Items of the engaged rows (gate > 0) and each user's offsets in them; int64 (n_engaged,), (n_users + 1,)."""
        engaged = self.outcome[:, 0] > 0
        running = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(engaged.to(torch.int64), dim=0)])
        return self.item[engaged], running[self.offsets]

    def engaged_counts(self) -> Tensor:
        """How many rows of each user are engaged (gate > 0); int64 (n_users,)."""
        offsets = self._engaged[1]
        return offsets[1:] - offsets[:-1]

    def histories(self, users: Tensor, lengths: Tensor, max_length: int | None = None) -> Tensor:
        """The first `lengths[i]` engaged items of `users[i]`: what was known of the user then, and nothing later.

        Args:
            users: int64 (batch,).
            lengths: int64 (batch,), >= 0; a length beyond the user's engaged items means all of them.
            max_length: Keep the newest `max_length` of these items; None keeps all.

        Returns:
            int64 (batch, H): newest item last, padded with -1 on the left; H is the longest history kept and may be 0.
        """
        if users.shape != lengths.shape:
            raise ValueError(
                f"users have shape {tuple(users.shape)}, lengths {tuple(lengths.shape)}; expected one length per user"
            )
        if users.numel() == 0:
            return torch.full((0, 0), -1, dtype=torch.int64)
        if int(lengths.min()) < 0 or (max_length is not None and max_length < 0):
            raise ValueError("a history length is negative; expected lengths >= 0 and max_length >= 0 or None")
        items, offsets = self._engaged
        lengths = torch.minimum(lengths.to(torch.int64), self.engaged_counts()[users])
        kept = lengths if max_length is None else lengths.clamp(max=max_length)
        width = int(kept.max())
        # column c of row i is `width - c` items before the end of the prefix
        back = torch.arange(width, 0, -1)
        row = offsets[users].unsqueeze(1) + lengths.unsqueeze(1) - back.unsqueeze(0)
        inside = back.unsqueeze(0) <= kept.unsqueeze(1)
        found = items[row.clamp(min=0, max=max(len(items) - 1, 0))]
        return torch.where(inside, found, torch.full_like(found, -1))


def encode(
    log: InteractionLog,
    *,
    seed: int,
    shares: Sequence[float] = (0.34, 0.33, 0.33),
    session_gap_s: float = SESSION_GAP_S,
) -> Dataset:
    """Numbers users and items, assigns folds and sessions, and turns the log into tensors.

    Args:
        log: A validated log.
        seed: Seed of the folds.
        shares: Shares of the folds S, A and B.
        session_gap_s: Longest pause inside a session in seconds, for a log without session ids.

    Returns:
        The dataset; its items are those that occur in the log.
    """
    frame = log.frame
    user_ids, user = np.unique(frame["user_id"].to_numpy(dtype=object).astype(str), return_inverse=True)
    item_ids, item = np.unique(frame["item_id"].to_numpy(dtype=object).astype(str), return_inverse=True)
    time_s = frame["timestamp"].to_numpy(dtype=np.float64)
    # a log is sorted by user already; sorting by the codes used here makes it a fact whatever sorted the strings
    order = np.lexsort((time_s, user))
    user, item, time_s = user[order].astype(np.int64), item[order].astype(np.int64), time_s[order]
    outcome = frame[list(log.outcomes)].to_numpy(dtype=np.float32)[order]
    if "session_id" in frame.columns:
        session = sessions_by_id(user, frame["session_id"].to_numpy(dtype=object)[order])
    else:
        session = sessions_by_gap(user, time_s, session_gap_s)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(user_ids)))]).astype(np.int64)
    position = None
    if "position" in frame.columns:
        place = frame["position"].to_numpy(dtype=np.int64)[order]
        # some logs count the first place as 1
        position = torch.from_numpy(place - place.min())
    text, category, category_names, release = item_columns(log.items, item_ids)
    return Dataset(
        name=log.name,
        outcomes=log.outcomes,
        outcome_weights=log.outcome_weights,
        has_impressions=log.has_impressions,
        user_ids=user_ids.astype(object),
        item_ids=item_ids.astype(object),
        user=torch.from_numpy(user),
        item=torch.from_numpy(item),
        time=torch.from_numpy(time_s.copy()),
        outcome=torch.from_numpy(outcome.copy()),
        session=torch.from_numpy(session),
        offsets=torch.from_numpy(offsets),
        fold=torch.from_numpy(assign_folds(user_ids.tolist(), seed=seed, shares=shares)),
        item_text=text,
        item_category=torch.from_numpy(category),
        category_names=category_names,
        item_release=torch.from_numpy(release),
        position=position,
    )


def item_columns(
    items: pd.DataFrame | None, item_ids: NDArray[Any]
) -> tuple[tuple[str, ...], NDArray[np.float32], tuple[str, ...], NDArray[np.float64]]:
    """Text, multi-hot categories, category names and release time of the items, in the order of `item_ids`."""
    release = np.full(len(item_ids), np.nan)
    if items is None:
        return ("",) * len(item_ids), np.zeros((len(item_ids), 0), dtype=np.float32), (), release
    table = items.set_index("item_id").reindex(item_ids)
    blank = [""] * len(item_ids)
    titles = table["title"].fillna("").astype(str).tolist() if "title" in table.columns else blank
    joined = table["categories"].fillna("").astype(str).tolist() if "categories" in table.columns else blank
    split = [[name.strip() for name in text.split("|") if name.strip()] for text in joined]
    names = tuple(sorted({name for categories in split for name in categories}))
    column = {name: index for index, name in enumerate(names)}
    category = np.zeros((len(item_ids), len(names)), dtype=np.float32)
    for row, categories in enumerate(split):
        category[row, [column[name] for name in categories]] = 1.0
    if "release_time" in table.columns:
        release = table["release_time"].to_numpy(dtype=np.float64, na_value=np.nan).copy()
    text = tuple(
        " ".join([title.strip(), *categories]).strip() for title, categories in zip(titles, split, strict=True)
    )
    return text, category, names, release
