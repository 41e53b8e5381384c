"""Who gets which strategy, and what that gains over serving everyone the single best one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_gym.evaluation.intervals import Interval, mean_interval
from metarec_gym.evaluation.metrics import SEGMENT_EDGES, SEGMENTS, segment_of

if TYPE_CHECKING:
    from metarec_gym.evaluation.explain.visits import Visits
    from metarec_gym.world import World

RARE = 0.01
"""Cells of a smaller share of the segment's requests are left out: a gain over so few requests says nothing."""
FEW_USERS = 10
"""Fewer users than this give no interval worth reading."""
TASTE_CLUSTERS = 4


@dataclass(frozen=True)
class Cell:
    """One strategy in one segment.

    Attributes:
        strategy: Its name.
        share: Share of the segment's requests that it served.
        gain: Expected immediate reward of the request above that of the single best strategy in the same state, mean over the
            segment's users who met it; None with few users.
    """

    strategy: str
    share: float
    gain: Interval | None


@dataclass(frozen=True)
class Segment:
    """A group of requests and what they were served.

    Attributes:
        group: What it is cut by: "history at the start", "taste" or "rule".
        name: In words.
        users: Share of the users who have requests in it.
        requests: Share of all requests.
        gain: As in `Cell`, over all its requests.
        cells: Strategies, most served first.
    """

    group: str
    name: str
    users: float
    requests: float
    gain: Interval | None
    cells: tuple[Cell, ...]

    def to_json(self) -> dict[str, Any]:
        """Its numbers as plain JSON types."""
        return {
            "group": self.group,
            "name": self.name,
            "users": self.users,
            "requests": self.requests,
            "gain": None if self.gain is None else self.gain.to_json(),
            "cells": [
                {"strategy": c.strategy, "share": c.share, "gain": None if c.gain is None else c.gain.to_json()}
                for c in self.cells
            ],
        }


def segment_table(
    visits: Visits, sbs: int, strategies: Sequence[str], groups: Mapping[str, tuple[Tensor, Sequence[str]]]
) -> list[Segment]:
    """Shares and gains of each segment.

    Args:
        visits: Requests that the policy served, on users it was not trained on.
        sbs: The single best strategy.
        strategies: Names.
        groups: For each way to cut: the segment of each request, int64 (N,) with -1 for none, and the segments' names.

    Returns:
        Segments with at least one request, in order.
    """
    took = visits.worth.gather(1, visits.action[:, None])[:, 0]
    gain = (took - visits.worth[:, sbs]).to(torch.float64).numpy()
    user, action = visits.user.numpy(), visits.action.numpy()
    n_users = len(np.unique(user))
    found = []
    for group, (segment, names) in groups.items():
        for index, name in enumerate(names):
            inside = segment.numpy() == index
            if not inside.any():
                continue
            counts = np.bincount(action[inside], minlength=len(strategies))
            cells = [
                Cell(strategies[k], float(counts[k] / inside.sum()), _over_users(user, gain, inside & (action == k)))
                for k in np.argsort(-counts, kind="stable")
                if counts[k] >= RARE * inside.sum()
            ]
            share = len(np.unique(user[inside])) / n_users
            overall = _over_users(user, gain, inside)
            found.append(Segment(group, name, share, float(inside.mean()), overall, tuple(cells)))
    return found


def _over_users(user: NDArray[np.int64], gain: NDArray[np.float64], rows: NDArray[np.bool_]) -> Interval | None:
    """Mean gain of the users' own means: every user counts once, however many requests they have."""
    _, place = np.unique(user[rows], return_inverse=True)
    if not len(place) or place.max() + 1 < FEW_USERS:
        return None
    return mean_interval(np.bincount(place, weights=gain[rows]) / np.bincount(place))


def history_segments(visits: Visits) -> tuple[Tensor, list[str]]:
    """Segments by history length at the start of the episode, as in the comparison."""
    light, heavy = SEGMENT_EDGES
    ranges = (f"0-{light - 1} items", f"{light}-{heavy - 1} items", f"{heavy} items or more")
    names = [f"{name} ({text})" for name, text in zip(SEGMENTS, ranges, strict=True)]
    return torch.from_numpy(segment_of(visits.history_length.numpy())), names


@dataclass(frozen=True)
class TasteClusters:
    """Groups of tastes, found on training users.

    Attributes:
        centres: float64 (clusters, n_taste).
        names: In words.
    """

    centres: NDArray[np.float64]
    names: tuple[str, ...]

    def of(self, visits: Visits, taste: slice) -> Tensor:
        """Nearest centre of each request's taste; -1 where nothing was taken yet."""
        now = visits.obs[:, taste].to(torch.float64)
        near = torch.cdist(now, torch.from_numpy(self.centres)).argmin(dim=1)
        return torch.where(now.abs().sum(dim=1) > 0.0, near, -1)


def taste_clusters(visits: Visits, taste: slice, world: World, *, seed: int) -> TasteClusters:
    """K-means of the tastes that training users have, one taste a user: that of the longest history met.

    Args:
        visits: Requests of training users.
        taste: Where the taste stands in the observation.
        world: The world; the axes that a cluster differs in most name it.
        seed: Decides the start of k-means.

    Returns:
        The clusters.
    """
    from sklearn.cluster import KMeans

    from metarec_gym.seeding import stream

    last = {int(u): i for i, u in enumerate(visits.user.tolist())}
    tastes = visits.obs[torch.tensor(sorted(last.values()))][:, taste].to(torch.float64).numpy()
    tastes = tastes[np.abs(tastes).sum(axis=1) > 0.0]
    clusters = min(TASTE_CLUSTERS, len(np.unique(tastes.round(6), axis=0)))
    if clusters < 2:
        return TasteClusters(np.zeros((0, taste.stop - taste.start)), ())
    model = KMeans(clusters, n_init=10, random_state=stream(seed, "taste clusters") % 2**32).fit(tastes)
    spread = tastes.std(axis=0) + 1e-9
    names = []
    for index, centre in enumerate(model.cluster_centers_):
        away = (centre - tastes.mean(axis=0)) / spread
        axes = np.argsort(-np.abs(away))[:2]
        text = ", ".join(f"axis {a + 1} {'high' if away[a] > 0 else 'low'}" for a in axes)
        names.append(f"taste {index + 1} ({text})")
    return TasteClusters(np.asarray(model.cluster_centers_, dtype=np.float64), tuple(names))
