"""Tuned PPO: search a schedule, learn on from it, and choose on training users what serves.

1. A schedule with one switch is searched (`agents.switches`).
2. An actor imitates it, and our PPO goes on from there, once for each discount: how far ahead pays depends on how fast lists wear
   out and how noisy answers are, and no one discount is best in all worlds.
3. The schedule, the members, and means of members race on the same training users with the same luck; the best serves.

All of it is paid from one budget of requests. The mean of members' logits is again one network (their layers side by side), so
the result is an ordinary `MlpPolicy`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from agents.ppo import Args, imitate, train
from agents.race import race
from agents.switches import find_switch
from metarec_gym.policy import MlpPolicy
from metarec_gym.seeding import stream

DISCOUNTS = (0.95, 0.98, 0.9)
"""Of the members, in this order; a small budget trains the first only."""
FEWEST = 250_000
"""Requests of a member where there are several."""
SCHEDULE_SHARE, RACE_SHARE = 0.15, 0.15
"""Of the budget; members share the rest."""
WATCHED = 0.01
"""Share of a member's requests for watching the schedule."""
SHARPNESS = 2.0
"""Times the mean of logits: members that disagree flatten it. Raced against 1."""
FINALISTS = 3


def mean_of(policies: Sequence[MlpPolicy], sharpness: float = 1.0) -> MlpPolicy:
    """One network whose logits are the mean of the policies' logits, times `sharpness`.

    Args:
        policies: Networks of one kind: same inputs, strategies and number of layers, two or more; no normalisation.
        sharpness: Inverse temperature.
    """
    depth, layers = len(policies[0].layers), []
    for index in range(depth):
        weights, biases = zip(*(p.layers[index] for p in policies), strict=True)
        last = index == depth - 1
        joined = torch.cat(weights, dim=1) if last else torch.block_diag(*weights)
        weight = torch.cat(weights) if index == 0 else joined
        bias = torch.stack(biases).sum(dim=0) if last else torch.cat(biases)
        factor = sharpness / len(policies) if last else 1.0
        layers.append((weight * factor, bias * factor))
    return MlpPolicy(layers, policies[0].strategies, meta=policies[0].meta)


def learn_tuned_ppo(lesson: Any, *, log: Callable[[str], None] | None = None) -> MlpPolicy:
    """Tuned PPO of a lesson.

    Args:
        lesson: `world`, `fold`, `seed`, `requests`, `horizon`, `make_env`.
        log: Called with a sentence about every choice; None keeps quiet.
    """
    say = log or (lambda text: None)
    seed, budget = stream(lesson.seed, "tuned ppo", lesson.fold), int(lesson.requests)
    # a search of a few requests finds nothing: of a small budget it gets more
    searched = int(max(SCHEDULE_SHARE * budget, min(0.4 * budget, 4000 * lesson.horizon)))
    schedule = find_switch(lesson, searched, stream(seed, "schedule"))
    say(f"schedule {schedule.meta}")
    raced = RACE_SHARE * budget
    left = budget - searched - raced
    discounts = DISCOUNTS[: max(1, int(left / FEWEST))]
    members = [_member(lesson, schedule, d, int(left / len(discounts)), stream(seed, str(d))) for d in discounts]
    candidates: dict[str, MlpPolicy] = {"schedule": schedule}
    candidates |= {f"discount {d}": m for d, m in zip(discounts, members, strict=True)}
    for count in range(2, len(members) + 1):
        for chosen in itertools.combinations(range(len(members)), count):
            group, name = [members[i] for i in chosen], ", ".join(str(discounts[i]) for i in chosen)
            candidates |= {f"mean of {name}": mean_of(group), f"sharp mean of {name}": mean_of(group, SHARPNESS)}
    names = list(candidates)
    first = race(lesson, list(candidates.values()), int(raced / 2), stream(seed, "first")).value
    order = first.mean(dim=1).argsort(descending=True).tolist()
    say(f"raced {[(names[i], round(float(first[i].mean()), 3)) for i in order]}")
    last = order[:FINALISTS]
    second = race(lesson, [candidates[names[i]] for i in last], int(raced / 2), stream(seed, "second")).value
    pooled = torch.cat([first[last], second], dim=1).mean(dim=1)
    best = names[last[int(pooled.argmax())]]
    say(f"chosen {best} of {[(names[i], round(float(v), 3)) for i, v in zip(last, pooled, strict=True)]}")
    policy = candidates[best]
    policy.meta = {**policy.meta, "agent": "tuned_ppo", "seed": lesson.seed, "steps": budget, "chosen": best}
    return policy


def _member(lesson: Any, schedule: MlpPolicy, discount: float, requests: int, seed: int) -> MlpPolicy:
    """PPO from the schedule on, with as many users at once as leave enough iterations."""
    rows = 256
    while rows > 8 and requests < 60 * rows * Args.num_steps:
        rows //= 2
    args = Args(seed=seed, gamma=discount, minibatch_size=rows * Args.num_steps // 8)
    env = lesson.make_env(rows)
    start, watched = imitate(schedule, env, args, requests=max(rows * lesson.horizon, int(WATCHED * requests)))
    left = dataclasses.replace(args, total_steps=max(requests - watched, 1))
    return train(env, left, progress=False, start=start).policy
