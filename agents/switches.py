"""Schedules with one switch, "strategy i until request n, then j", found by successive halving on training users.

Each round plays all that are left on fresh users with the same luck and keeps the better third (Jamieson & Talwalkar, 2016):
what is nearly as good as the best meets many users, what is poor few.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from agents.race import race
from metarec_gym.envs.observation import feature_sizes, feature_slices
from metarec_gym.policy import MlpPolicy
from metarec_gym.seeding import stream
from metarec_gym.world import World

SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Of the episode, after which a schedule may switch."""
EARLY = 4
"""Strategies that may come first: those that win most in the first half."""
KEPT = 1 / 3
"""Of a round."""
STEEP = 1e3
"""Logits a request: the choice is sure."""


def switch_policy(world: World, horizon: int, first: int, second: int, switch: int) -> MlpPolicy:
    """`first` before request `switch` (from 0), `second` from it on; where both are out of service, any other.

    Args:
        world: Whose strategies and observation.
        horizon: Requests an episode.
        first: Index of a strategy.
        second: Index of a strategy, may be the same.
        switch: Request.
    """
    k, column = world.n_strategies, feature_slices(world)["request_fraction"].start
    weight, bias = torch.zeros(k, sum(feature_sizes(world).values())), torch.full((k,), -STEEP * horizon)
    if first == second:
        bias[first] = 0.0
    else:
        # half a request keeps the sign off zero
        for strategy, sign in ((first, -1.0), (second, 1.0)):
            weight[strategy, column] = sign * STEEP * horizon
            bias[strategy] = -sign * STEEP * (switch - 0.5)
    return MlpPolicy(
        [(weight, bias)], tuple(world.strategies), meta={"first": first, "second": second, "switch": switch}
    )


def find_switch(lesson: Any, requests: int, seed: int) -> MlpPolicy:
    """The best schedule with at most one switch.

    Args:
        lesson: `world`, `fold`, `horizon`, `make_env`.
        requests: Budget; every candidate meets at least one user a round.
        seed: Of users and luck.
    """
    world, horizon = lesson.world, int(lesson.horizon)

    def make(first: int, second: int, switch: int) -> MlpPolicy:
        return switch_policy(world, horizon, first, second, switch)

    alone = [(i, i, 0) for i in range(world.n_strategies)]
    switches = sorted({min(max(round(share * horizon), 1), horizon) for share in SHARES})
    pairs = EARLY * (world.n_strategies - 1) * len(switches)
    rounds = max(1, math.ceil(math.log(len(alone) + pairs) / -math.log(KEPT)))
    each = requests // (rounds + 1)
    half = dataclasses.replace(lesson, horizon=max(horizon // 2, 1))
    value = race(half, [make(*c) for c in alone], each, stream(seed, "first")).value.mean(dim=1)
    early = value.argsort(descending=True)[:EARLY].tolist()
    left = alone + [(i, j, n) for i in early for j in range(world.n_strategies) for n in switches if i != j]
    for number in range(rounds):
        value = race(lesson, [make(*c) for c in left], each, stream(seed, "round", number)).value.mean(dim=1)
        left = [left[i] for i in value.argsort(descending=True)[: max(1, round(KEPT * len(left)))].tolist()]
    return make(*left[0])
