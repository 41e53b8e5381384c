"""Worlds whose best value is known by calculation, for policies that see the user's history, the request, or only answers.

| world | what is best | must see |
|---|---|---|
| types | the specialist of the user's type | history or answers |
| drift | the popular category first, the unpopular one later: popularity decays from session to session | request |
| masked | the best specialist, the second best while it is out of service | request or answers: not chosen once an episode |
| cost | the cheaper specialist, although the dearer one is liked more | nothing |
| null | nothing: all strategies serve the same list | nothing |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from metarec_gym.evaluation.rollout import rollout
from metarec_gym.seeding import stream
from metarec_gym.world import World

SLATE = 4
SHORT = 8
"""Requests an episode for policies that know at once what is best; those that must find it out have it in the last quarter."""


@dataclass(frozen=True)
class Known:
    """A world, the environment's settings, and the best expected reward of every request.

    Attributes:
        world: The world.
        best: Best expected reward of each request, (horizon,).
        settings: Of the environment.
        cost_weight: Of the environment.
    """

    world: World
    best: np.ndarray
    settings: dict[str, Any] = field(default_factory=dict)
    cost_weight: float = 0.0

    @property
    def horizon(self) -> int:
        """Requests an episode."""
        return len(self.best)


def _world(horizon: int, users_per_type: int = 8, identical: bool = False) -> World:
    return World.synthetic(
        n_types=3,
        users_per_type=users_per_type,
        items_per_type=horizon * SLATE + 10,
        horizon=horizon,
        slate_size=SLATE,
        high=0.6,
        low=0.1,
        history_lengths=(5, 10),
        leaving=None,
        identical=identical,
    )


def _alike(horizon: int, levels: Sequence[float], popularity: Sequence[float] | None = None) -> World:
    """All users take items of category g with probability levels[g]."""
    world = _world(horizon)
    judge = world.judge("A")
    effects = judge.tensors["effect_mean"].clone()
    effects[:, 0, : len(levels)] = torch.logit(torch.tensor(levels, dtype=torch.float64)).to(torch.float32)
    same = type(judge)({**judge.tensors, "effect_mean": effects}, judge.outcomes, judge.feature_names)  # type: ignore[arg-type]
    tensors = dict(world.tensors)
    if popularity is not None:
        tensors["item_popularity"] = tensors["item_category"] @ torch.tensor(popularity)
    return dataclasses.replace(world, responses={"A": same, "B": same}, tensors=tensors)


def types(horizon: int) -> Known:
    """Three types; a uniform choice is right for one specialist in three, and `mixed` shows all."""
    return Known(_world(horizon), np.full(horizon, SLATE * 0.6))


def drift(horizon: int) -> Known:
    """Four sessions; category 0 starts at 0.6 and falls, category 1 starts at 0.25 and rises, on the logit scale."""
    step, session = 0.8, np.arange(horizon) // (horizon // 4)

    def taken(start: float, direction: float) -> np.ndarray:
        return 1.0 / (1.0 + np.exp(-(np.log(start / (1.0 - start)) + direction * step * session)))

    falling, rising = taken(0.6, -1.0), taken(0.25, 1.0)
    settings = {"session_requests": horizon // 4, "drift": step}
    world = _alike(horizon, (0.6, 0.25, 0.1), popularity=(1.0, 0.0, 0.5))
    return Known(world, SLATE * np.maximum(falling, rising), settings)


def masked(horizon: int) -> Known:
    """The best strategy goes out of service before the last eighth of the episode, and was out for a quarter before."""
    quarter = horizon // 4
    out = np.zeros(horizon, dtype=bool)
    out[quarter : 2 * quarter] = True
    out[horizon - horizon // 8 :] = True
    events = (
        ("specialist_0", "removed", quarter),
        ("specialist_0", "added", 2 * quarter),
        ("specialist_0", "removed", horizon - horizon // 8),
    )
    best = SLATE * np.where(out, 0.5, 0.6)
    return Known(_alike(horizon, (0.6, 0.5, 0.1)), best, {"schedule": events})


def cost(horizon: int) -> Known:
    """Category 1 is liked more (0.7 against 0.6), but its specialist costs 0.467 and that of category 0 costs 0.2; weight 4."""
    weight, costs = 4.0, np.linspace(0.2, 1.0, 4)
    net = SLATE * np.array([0.6, 0.7, 0.1]) - weight * costs[:3]
    return Known(_alike(horizon, (0.6, 0.7, 0.1)), np.full(horizon, net.max()), {}, weight)


WORLDS: dict[str, Callable[[int], Known]] = {"types": types, "drift": drift, "masked": masked, "cost": cost}
NEEDS = {"types": ("history", "answers"), "drift": ("request",), "masked": ("request", "answers")}
"""A policy must see one of these to reach the optimum; all reach that of the other worlds."""


def reachable(name: str, sees: Sequence[str]) -> bool:
    """Whether a policy that sees this can reach the optimum."""
    return name not in NEEDS or bool(set(NEEDS[name]) & set(sees))


def episode(sees: Sequence[str], answers: int = 90) -> int:
    """Requests an episode: who sees the history knows at once what is best, who sees nothing but answers needs so many first."""
    return answers * 4 // 3 if "answers" in sees and "history" not in sees else SHORT


def target(known: Known) -> float:
    """Best value a request, in the last quarter of the episode for who must find out."""
    return float(known.best[_first(known) :].mean())


def value(known: Known, policy: Any) -> float:
    """Expected reward a request on users of fold B, in the last quarter of the episode for who must find out."""
    starts = known.world.starts_of("B")
    result = rollout(
        known.world,
        "B",
        policy,
        contexts=starts,
        replicates=2,
        horizon=known.horizon,
        env_seed=stream(0, "evaluation"),
        cost_weight=known.cost_weight,
        env_settings=known.settings,
    )
    return float(result.expected[:, :, _first(known) :].mean())


def _first(known: Known) -> int:
    return known.horizon - known.horizon // 4 if known.horizon > SHORT else 0
