"""Strategies that serve every user the same ranking: what is popular, what is rising, what hardly anyone has tried."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from metarec_gym import seeding
from metarec_gym.recommenders.base import JSON, FitRows, Strategy

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

DAY_S = 86_400.0


class _FixedRanking(Strategy):
    """One score per item, whoever asks."""

    kind: ClassVar[str] = "non_personal"
    personal: ClassVar[bool] = False
    item_score: Tensor

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.register_buffer("item_score", torch.zeros(0))

    def _score(self, histories: Tensor) -> Tensor:
        return self.item_score.expand(histories.shape[0], -1)

    def _flops(self) -> float:
        # one comparison per item: the ranking itself
        return float(self.n_items)


class Popular(_FixedRanking):
    """Engaged events per item, each halved for every half-life that had passed since it at fold S's last event.

    Args:
        name: Name in the pool.
        half_life_days: Half-life; None takes the time that fold S spans, a mild preference for what is recent.
    """

    def __init__(self, name: str = "popular", half_life_days: float | None = None) -> None:
        super().__init__(name)
        if half_life_days is not None and half_life_days <= 0:
            raise ValueError(f"half_life_days is positive (or None), came {half_life_days}")
        self.half_life_days = half_life_days

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        age_s = rows.time.max() - rows.time
        half_life_s = float(age_s.max()) if self.half_life_days is None else self.half_life_days * DAY_S
        weight = torch.pow(0.5, age_s / half_life_s) if half_life_s > 0 else torch.ones_like(age_s)
        self.item_score = torch.bincount(rows.item, weight, minlength=rows.n_items).to(torch.float32)

    def _settings(self) -> dict[str, JSON]:
        return {"half_life_days": self.half_life_days}


class Trending(_FixedRanking):
    """What fold S took in its last window, more of it than the long-run rate says.

    With r events of the item in the window and e expected there from its share of the events before, the score is
    r sqrt((r + smoothing) / (e + smoothing)): recent events, weighed up by growth and down by decline. Growth alone
    would be led by items with a handful of events. Items without an event in the window follow, popular ones first.

    Args:
        name: Name in the pool.
        window_days: Length of the recent window; None takes the latest tenth of fold S's events.
        smoothing: Events added to both sides of the growth.
    """

    def __init__(self, name: str = "trending", window_days: float | None = None, smoothing: float = 10.0) -> None:
        super().__init__(name)
        if smoothing <= 0 or (window_days is not None and window_days <= 0):
            raise ValueError(f"window_days and smoothing are positive, came {window_days} and {smoothing}")
        self.window_days = window_days
        self.smoothing = smoothing

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        if self.window_days is None:
            begin_s = rows.time.sort().values[int(0.9 * (rows.time.numel() - 1))]
        else:
            begin_s = rows.time.max() - self.window_days * DAY_S
        # a log whose times are all alike has no window: then all its events are recent
        recent = (rows.time > begin_s) | (rows.time.max() <= begin_s)
        observed = torch.bincount(rows.item[recent], minlength=rows.n_items).to(torch.float32)
        before = torch.bincount(rows.item[~recent], minlength=rows.n_items).to(torch.float32)
        expected = before / before.sum().clamp(min=1.0) * observed.sum()
        growth = (observed + self.smoothing) / (expected + self.smoothing)
        self.item_score = torch.where(observed > 0, observed * growth.sqrt(), self.popularity - 1.0)

    def _settings(self) -> dict[str, JSON]:
        return {"window_days": self.window_days, "smoothing": self.smoothing}


class LongTail(_FixedRanking):
    """A random order in which an item comes early with a weight of 1 / popularity; drawn once, at `fit`.

    Items with fewer than `min_events` events come after all others: next to nothing is known of them.
    Weighted sampling without replacement by exponential keys (Efraimidis and Spirakis, "Weighted random sampling with a
    reservoir", Information Processing Letters 2006).

    Args:
        name: Name in the pool.
        min_events: Engaged events in fold S that make an item eligible.
    """

    def __init__(self, name: str = "long_tail", min_events: int = 5) -> None:
        super().__init__(name)
        self.min_events = min_events

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        count = rows.counts().to(torch.float64)
        draw = torch.rand(rows.n_items, generator=seeding.torch_generator(seed, "order"), dtype=torch.float64)
        # key = log(u) / weight with weight = 1 / count; the largest keys come first
        key = torch.log(draw.clamp(min=1e-12)) * count
        eligible = count >= self.min_events
        lowest = key[eligible].min() if bool(eligible.any()) else torch.zeros((), dtype=torch.float64)
        self.item_score = torch.where(eligible, key, lowest - 1.0 - draw).to(torch.float32)

    def _settings(self) -> dict[str, JSON]:
        return {"min_events": self.min_events}
