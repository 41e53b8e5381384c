"""Entries of the observation in words and in their own units: "fewer than 12 items taken so far", not "entry 8 below 0.37".

Every normalisation of `envs.observation.observe` is inverted here; a test plays an environment and compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from metarec_gym.envs.observation import feature_slices
from metarec_gym.world import LIST_HEAD

if TYPE_CHECKING:
    from metarec_gym.world import World

KNOWN = 0.9
"""Popularity percentile from which on an item can name something."""
Kind = Literal["count", "request", "flag", "percent", "number", "days"]


@dataclass(frozen=True)
class Feature:
    """One entry of the observation.

    Attributes:
        index: Place in the observation.
        block: Block that it belongs to, as `feature_slices` names it.
        name: In words, e.g. "items taken so far".
        kind: How values read: whole numbers (`count`, `request`), yes or no (`flag`), `percent`, `days` or plain numbers.
        to_units: Normalised value -> value in the feature's own unit.
    """

    index: int
    block: str
    name: str
    kind: Kind
    to_units: Callable[[float], float]

    def show(self, value: float) -> str:
        """A normalised value as a reader writes it."""
        x = self.to_units(value)
        if self.kind == "count":
            return f"{round(x):,}"
        if self.kind == "request":
            return f"{round(x) + 1}"
        if self.kind == "flag":
            return "yes" if x > 0.5 else "no"
        if self.kind == "percent":
            return f"{100 * x:.0f} %"
        return f"{x:.1f} days" if self.kind == "days" else f"{x:.2f}"

    def below(self, threshold: float) -> str:
        """The condition "normalised value <= threshold" in words."""
        # whole numbers: n <= x is n < floor(x) + 1
        whole = math.floor(self.to_units(threshold)) + 1
        if self.kind == "count":
            return f"no {self.name}" if whole == 1 else f"fewer than {whole:,} {self.name}"
        if self.kind == "request":
            return f"{self.name} {whole} or earlier"
        if self.kind == "flag":
            return f"not: {self.name}"
        return f"{self.name} at most {self.show(threshold)}"

    def above(self, threshold: float) -> str:
        """The condition "normalised value > threshold" in words."""
        whole = math.floor(self.to_units(threshold)) + 1
        if self.kind == "count":
            return f"{whole:,} or more {self.name}"
        if self.kind == "request":
            return f"{self.name} {whole + 1} or later"
        if self.kind == "flag":
            return self.name
        return f"{self.name} above {self.show(threshold)}"


def readable_features(
    world: World,
    horizon: int,
    slate_size: int,
    *,
    session_requests: int | None = None,
) -> tuple[Feature, ...]:
    """Every entry of the observation, in order.

    Args:
        world: The world.
        horizon: Requests an episode.
        slate_size: Items a request; rewards are measured in slates of typical items.
        session_requests: Requests a session, as the environment has it.

    Returns:
        One feature an entry.
    """
    scale = world.reward_scale * slate_size
    plain: Callable[[float], float] = lambda v: v  # noqa: E731
    signed_log: Callable[[float], float] = lambda v: scale * math.atanh(min(max(v, -1 + 1e-6), 1 - 1e-6))  # noqa: E731
    weight: Callable[[float], float] = lambda v: v / max(1.0 - v, 1e-6)  # noqa: E731
    single: dict[str, tuple[str, Kind, Callable[[float], float]]] = {
        "history_length": ("items taken so far (history included)", "count", _log_count(1000.0)),
        "popularity_affinity": ("mean popularity of the items taken (percentile)", "percent", plain),
        "category_entropy": ("variety of the categories taken (100 % = all alike)", "percent", plain),
        "unrewarded_requests": ("requests in a row without an item taken", "count", lambda v: 10.0 * v),
        "request_fraction": ("request", "request", lambda v: horizon * v),
        "session_fraction": ("request of the session", "request", lambda v: (session_requests or 1) * v),
        "sessions": ("earlier sessions", "count", _log_count(100.0)),
        "cost_weight": ("cost weight", "number", weight),
        "latency_weight": ("latency weight", "number", weight),
        "last_reward": ("reward of the last request", "number", signed_log),
        "recent_gap": ("time between the last two events", "days", _log_count(365.0)),
    }
    each: dict[str, tuple[str, Kind, Callable[[float], float]]] = {
        "last_strategy": ("{} served the last request", "flag", plain),
        "strategy_count": ("requests served by {} so far", "count", _log_count(float(horizon))),
        "strategy_mean_reward": ("mean reward of {} so far (with one empty request)", "number", signed_log),
        "list_popularity": (f"popularity of the first {LIST_HEAD} items of {{}} (percentile)", "percent", plain),
        "list_agreement": (f"share of the first {LIST_HEAD} items of {{}} that others list too", "percent", plain),
        "list_similarity": (f"similarity of the first {LIST_HEAD} items of {{}} to the user's taste", "number", plain),
    }
    features: list[Feature] = []
    for block, place in feature_slices(world).items():
        for j, index in enumerate(range(place.start, place.stop)):
            if block == "taste":
                features.append(Feature(index, block, f"taste axis {j + 1}", "number", plain))
            elif block in each:
                text, kind, to_units = each[block]
                features.append(Feature(index, block, text.format(world.strategies[j]), kind, to_units))
            else:
                features.append(Feature(index, block, *single[block]))
    return tuple(features)


def _log_count(largest: float) -> Callable[[float], float]:
    """Inverse of log(1 + n) / log(1 + largest)."""
    return lambda v: math.expm1(v * math.log1p(largest))


BLOCK_WORDS: Mapping[str, str] = {
    "taste": "taste (items taken so far)",
    "history_length": "how many items were taken so far",
    "popularity_affinity": "taste for popular items",
    "category_entropy": "variety of categories",
    "unrewarded_requests": "requests in a row without an item taken",
    "request_fraction": "request number",
    "session_fraction": "request number in the session",
    "sessions": "earlier sessions",
    "cost_weight": "cost weight",
    "latency_weight": "latency weight",
    "last_reward": "reward of the last request",
    "last_strategy": "which strategy served last",
    "strategy_count": "how often each strategy has served",
    "strategy_mean_reward": "what each strategy got from this user",
    "recent_gap": "time between the last two events",
    "list_popularity": "popularity of each strategy's list",
    "list_agreement": "agreement between the lists",
    "list_similarity": "similarity of each list to the user's taste",
}
"""Blocks of the observation as a reader calls them."""


def taste_axes(world: World) -> tuple[str, ...]:
    """What stands behind the taste axes: well-known items at both ends, where the world's folder knows what items are called.

    Args:
        world: The world; without `items.parquet` beside it, or without texts in it, nothing is known.

    Returns:
        One line an axis, or nothing.
    """
    if world.folder is None or not (world.folder / "items.parquet").is_file():
        return ()
    import pandas as pd

    items = pd.read_parquet(world.folder / "items.parquet").sort_values("item_index")
    texts = [str(text).strip() for text in items["text"]]
    if not any(texts):
        return ()
    # an axis named by items nobody knows says nothing
    known = torch.nonzero(world.tensors["item_popularity"] >= KNOWN)[:, 0]
    names = []
    for axis in range(world.tensors["item_taste"].shape[1]):
        value = world.tensors["item_taste"][known, axis]
        high, low = (
            "; ".join(_short(texts[i]) for i in known[value.argsort(descending=down, stable=True)[:3]].tolist())
            for down in (True, False)
        )
        names.append(f"taste axis {axis + 1}: high for users of {high}; low for users of {low}")
    return tuple(names)


def _short(text: str) -> str:
    return text if len(text) <= 28 else text[:27].rstrip() + "…"
