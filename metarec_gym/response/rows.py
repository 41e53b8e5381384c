"""What the judge learns from: the rows of the fold's users, the periods of the log, and items that a user has not taken."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarec_gym.response.frozen import EXPOSURE_DECAY

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

MAX_SLATE = 64
"""Positions for which a position effect is stored."""
MAX_PERIODS = 24
"""Most periods that a log is cut into."""
PERIOD_DAYS = 30.0
"""Length of a period, longer where the log would have more than `MAX_PERIODS`."""
_DENSE_CELLS = 50_000_000
"""Up to this many (user, item) cells the order of engagement is kept as a dense table (200 MB)."""
_DAY_S = 86_400.0


def period_starts(dataset: Dataset) -> Tensor:
    """When each period of the log begins, unix seconds; float64 (n_periods,). Only the log's first and last time decide it."""
    first, last = float(dataset.time.min()), float(dataset.time.max())
    count = min(max(round((last - first) / (PERIOD_DAYS * _DAY_S)), 1), MAX_PERIODS)
    return first + (last - first) / count * torch.arange(count, dtype=torch.float64)


def period_of(starts: Tensor, time_s: Tensor) -> Tensor:
    """The period of each time; a time before the first is in it. float64 (n,) -> int64 (n,)."""
    found: Tensor = torch.searchsorted(starts, time_s.contiguous(), right=True) - 1
    return found.clamp(min=0)


@dataclass(frozen=True)
class Rows:
    """Rows of some users in (user, time) order, users renumbered 0..n_users-1."""

    users: Tensor
    """int64 (n_users,): index of each user in the dataset, ascending."""
    user: Tensor
    """int64 (n,): 0..n_users-1."""
    item: Tensor
    """int64 (n,)."""
    outcome: Tensor
    """float32 (n, n_outcomes)."""
    rank: Tensor
    """int64 (n,): engaged items of the user before the row."""
    period: Tensor
    """int64 (n,): period of the log (`period_starts`)."""
    position: Tensor
    """int64 (n,): place in the slate; 0 where the log does not say."""
    exposure: Tensor
    """float32 (n,): exposure to the item's categories earlier in the session; 0 where the log has no impressions."""
    n_items: int
    _cache: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, dataset: Dataset, users: Tensor) -> Rows:
        """The rows of `users` (int64, any order)."""
        users = torch.unique(users)
        rows = dataset.rows_of(users)
        user = torch.searchsorted(users, dataset.user[rows])
        engaged = (dataset.outcome[rows, 0] > 0).to(torch.int64)
        before = torch.cumsum(engaged, dim=0) - engaged
        first = torch.searchsorted(user, torch.arange(len(users)))
        rank = before - (before[first.clamp(max=max(len(rows) - 1, 0))][user] if len(rows) else before)
        return cls(
            users,
            user,
            dataset.item[rows],
            dataset.outcome[rows],
            rank,
            period_of(period_starts(dataset), dataset.time[rows]),
            torch.zeros_like(user) if dataset.position is None else dataset.position[rows].clamp(0, MAX_SLATE - 1),
            category_exposure(dataset, rows),
            dataset.n_items,
        )

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.user.shape[0])

    @property
    def n_users(self) -> int:
        """Number of users."""
        return int(self.users.shape[0])

    @property
    def engaged(self) -> Tensor:
        """Whether the gate happened; bool (n,)."""
        return self.outcome[:, 0] > 0

    @cached_property
    def engaged_counts(self) -> Tensor:
        """Engaged rows of each user; int64 (n_users,)."""
        return torch.bincount(self.user[self.engaged], minlength=self.n_users)

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on `device` (self when they are there already)."""
        if self.user.device == torch.device(device):
            return self
        names = ("users", "user", "item", "outcome", "rank", "period", "position", "exposure")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved, _cache={})

    def subset(self, keep: Tensor) -> Rows:
        """The rows of the users with `keep`; bool (n_users,)."""
        renumber = torch.cumsum(keep.to(torch.int64), dim=0) - 1
        rows = keep[self.user]
        return Rows(
            self.users[keep],
            renumber[self.user[rows]],
            self.item[rows],
            self.outcome[rows],
            self.rank[rows],
            self.period[rows],
            self.position[rows],
            self.exposure[rows],
            self.n_items,
        )

    def seen(self, user: Tensor, rank: Tensor, items: Tensor) -> Tensor:
        """Whether the user had engaged with an item before its `rank`-th engagement.

        Args:
            user: int64 (rows,), 0..n_users-1.
            rank: int64 (rows,).
            items: int64 (rows, m), or (m,) when every row asks about the same items.

        Returns:
            bool (rows, m).
        """
        if self.n_users * self.n_items <= _DENSE_CELLS:
            first = self._first_rank()
            if items.dim() == 1:
                # rows of the transposed table are contiguous: four times as fast as gathering columns
                if "transposed" not in self._cache:
                    self._cache["transposed"] = first.T.contiguous()
                taken = self._cache["transposed"][items].T[user]
            else:
                taken = first[user[:, None], items]
            return taken < rank[:, None]
        keys, ranks = self._sorted_keys()
        asked = user[:, None] * self.n_items + items
        place = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
        return (keys[place] == asked) & (ranks[place] < rank[:, None])

    def _first_rank(self) -> Tensor:
        if "first" not in self._cache:
            keys, ranks = self._sorted_keys()
            never = torch.iinfo(torch.int32).max
            first = torch.full((self.n_users * self.n_items,), never, dtype=torch.int32, device=keys.device)
            first[keys] = ranks.to(torch.int32)
            self._cache["first"] = first.view(self.n_users, self.n_items)
        return self._cache["first"]

    def _sorted_keys(self) -> tuple[Tensor, Tensor]:
        """Keys user * n_items + item of the engaged rows, ascending, and the rank of the first such row."""
        if "keys" not in self._cache:
            key = (self.user * self.n_items + self.item)[self.engaged]
            keys, order = torch.sort(key, stable=True)
            fresh = torch.ones_like(keys, dtype=torch.bool)
            fresh[1:] = keys[1:] != keys[:-1]
            self._cache["keys"], self._cache["ranks"] = keys[fresh], self.rank[self.engaged][order][fresh]
        return self._cache["keys"], self._cache["ranks"]

    def unseen_items(self, index: Tensor, m: int, q: Tensor, generator: torch.Generator) -> Tensor:
        """Items drawn from `q` that the user had not engaged with at the row and that are not the row's own item.

        Args:
            index: int64 (rows,): which rows.
            m: Draws per row, with replacement.
            q: float (n_items,), the sampler.
            generator: Source of the draws.

        Returns:
            int64 (rows, m). Where a user has taken nearly everything a draw may remain a seen item.
        """
        items = draw_items(q, (len(index), m), generator)
        user, rank, own = self.user[index], self.rank[index], self.item[index]
        for _ in range(8):
            bad = self.seen(user, rank, items) | (items == own[:, None])
            row, column = torch.nonzero(bad, as_tuple=True)
            if len(row) == 0:
                break
            items[row, column] = draw_items(q, (len(row),), generator)
        return items


def category_exposure(dataset: Dataset, rows: Tensor) -> Tensor:
    """Exposure to each row's categories by the slates shown before in the session, as the environment counts it.

    Rows of one session with the same time are one slate. A slate adds the mean of its items' category shares, and what was there
    before fades by `EXPOSURE_DECAY`.

    Args:
        dataset: The log.
        rows: int64 (n,), ascending row indices, whole users.

    Returns:
        float32 (n,); zeros where the log has no impressions or no categories.
    """
    category = dataset.item_category
    if not dataset.has_impressions or category.shape[1] == 0 or len(rows) == 0:
        return torch.zeros(len(rows))
    category = category / category.sum(dim=1, keepdim=True).clamp(min=1.0)
    user, session, time_s, item = (x[rows] for x in (dataset.user, dataset.session, dataset.time, dataset.item))
    # rows of a session need not be adjacent when the log gave session ids: they are put together, in time order
    order = torch.argsort(session, stable=True)
    order = order[torch.argsort(user[order], stable=True)]
    user, session, time_s, item = user[order], session[order], time_s[order], item[order]
    new_session = torch.ones(len(rows), dtype=torch.bool)
    new_session[1:] = (user[1:] != user[:-1]) | (session[1:] != session[:-1])
    new_slate = new_session.clone()
    new_slate[1:] |= time_s[1:] != time_s[:-1]
    slate = torch.cumsum(new_slate, dim=0) - 1
    mean = torch.zeros(int(slate[-1]) + 1, category.shape[1]).index_add_(0, slate, category[item])
    mean = mean / torch.bincount(slate)[:, None]
    # slates of all sessions side by side: one step of the recurrence serves every session that is long enough
    of_session = (torch.cumsum(new_session, dim=0) - 1)[new_slate]
    lengths = torch.bincount(of_session)
    first = torch.cumsum(lengths, dim=0) - lengths
    before = torch.zeros_like(mean)
    for step in range(1, int(lengths.max())):
        at = first[lengths > step] + step
        before[at] = EXPOSURE_DECAY * before[at - 1] + mean[at - 1]
    exposure = torch.empty(len(rows))
    exposure[order] = (category[item] * before[slate]).sum(dim=1)
    return exposure


def draw_items(q: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Items drawn from `q` by its inverse distribution function, with numbers of the CPU's generator; int64 of `shape`."""
    cumulative = torch.cumsum(q.to(torch.float64), dim=0)
    draw = torch.rand(shape, generator=generator, dtype=torch.float64).to(q.device) * cumulative[-1]
    return torch.searchsorted(cumulative, draw, right=True).clamp(max=len(q) - 1)
