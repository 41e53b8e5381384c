"""How policies are evaluated, and how long an episode may be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from metarec_gym.seeding import stream

if TYPE_CHECKING:
    from metarec_gym.world import World

FOLDS = ("A", "B")
MAX_SHOWN = 0.1
"""A horizon is sound while at most this share of the catalogue is shown: shown items stay masked."""


@dataclass(frozen=True)
class EvalSettings:
    """How policies are played; the same for the headroom and for every policy compared."""

    contexts_per_user: int = 2
    """Start states played for each user; averaged before users are."""
    max_users: int = 1000
    """Users a fold at most, picked at random; 1,000 give intervals of a few percent."""
    replicates: int = 4
    """Half the episodes from each start state that every strategy and policy plays."""
    max_replicates: int = 64
    """The oracle's replicates in each of its two halves double up to this many while its optimism is too large."""
    tolerance: float = 0.0025
    """Optimism that is small enough: plug-in minus cross-fitted oracle, as a share of the single best strategy."""
    horizons: tuple[int, ...] = (20, 50, 100)
    """Reported horizons where they are sound, beside the largest sound one."""
    horizon: int | None = None
    """Longest horizon; None takes the largest sound one."""
    slate_size: int | None = None
    """Items a request; None takes the world's."""
    cost_weight: float = 0.0
    """Reward lost for the relative serving cost (dearest strategy = 1) of each request."""
    seed: int = 0
    """Decides which start states are played and all draws."""
    batch_rows: int = 2048
    """Episodes played side by side."""
    look: bool = True
    """Measure whether anything is long-term: the greedy oracle with look-ahead (LOOK) against the one without."""
    look_users: int = 192
    """Users a fold that LOOK is played on, one start state each: it costs over a hundred times a policy's time."""
    look_ahead: int = 3
    """Requests after the present one that LOOK simulates."""
    look_branches: int = 4
    """Simulated copies of the user for each strategy that LOOK tries."""
    look_candidates: int | None = 5
    """Strategies that LOOK tries at each request, those worth most right now; None tries all."""
    env: dict[str, Any] = field(default_factory=dict)
    """Further settings of the environment, such as session_requests, judge, base_rate_factor or fatigue."""


def horizons_of(world: World, settings: EvalSettings) -> tuple[int, bool, tuple[str, ...]]:
    """Longest horizon that the catalogue allows: (T, sound, notes)."""
    slate = settings.slate_size or world.slate_size
    # lists are ranked for one session; in episodes of several they are ranked again, until nothing is left to show
    items = world.n_items if settings.env.get("session_requests") is not None else world.list_length
    longest = items // slate
    shown = int(MAX_SHOWN * world.n_items) // slate
    if settings.horizon is not None:
        if settings.horizon > longest:
            raise ValueError(
                f"horizon {settings.horizon} needs lists of {settings.horizon * slate} items, the world holds "
                f"{items}; use at most {longest} or build the world with a longer horizon"
            )
        sound = settings.horizon <= shown
        share = settings.horizon * slate / world.n_items
        note = f"The horizon {settings.horizon} was given; it shows {share:.0%} of the catalogue, more than is sound."
        return settings.horizon, sound, () if sound else (note,)
    largest = min(world.horizon, shown, longest)
    if largest >= 1:
        return largest, True, ()
    horizon = min(world.horizon, longest)
    share = horizon * slate / world.n_items
    note = f"No horizon is sound: {horizon} requests of {slate} items show {share:.0%} of {world.n_items} items."
    return horizon, False, (note,)


def env_key(env: Mapping[str, Any]) -> str:
    """What environment settings add to the name of a task; nothing for none."""
    return f"_env{stream(0, json.dumps(env, sort_keys=True)):016x}" if env else ""
