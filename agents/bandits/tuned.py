"""The tuned hierarchical bandit: every setting is chosen on training users, by playing them side by side with the same luck.

A budget of requests is split into random service, service by the bandit itself, and races. Three things are chosen: how strongly
it explores and how fast it forgets, which schedule leads, and by how much another strategy must be better to replace the leader
(a margin that no one exceeds is the schedule alone; 0 is the bandit alone). The schedule matters where lists wear out: what is
served now changes what can be won later, which a bandit, looking at one reward at a time, does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from agents.bandits.hierarchical import Features, HierarchicalUcb, Served, serve
from agents.bandits.population import episodes_of
from agents.race import race
from metarec_gym.seeding import stream

SHARES = (0.2, 0.2, 0.2, 0.2, 0.2)
"""Budget of random service, service by the bandit, the race of schedules, the race of settings, the last race."""
SWITCHES = (0.25, 0.4, 0.55, 0.7)
"""Shares of the episode after which a leading schedule may switch."""


def schedules(early: Sequence[int], late: Sequence[int], horizon: int) -> list[tuple[int, ...]]:
    """Each strategy alone, and each early one followed by each late one from a switch on.

    Args:
        early: Strategies that may come first.
        late: Strategies that may come second.
        horizon: Requests an episode.
    """
    found: list[tuple[int, ...]] = [(k,) for k in dict.fromkeys((*early, *late))]
    for first in early:
        for then in late:
            for share in SWITCHES if first != then else ():
                found.append((first,) * max(1, round(share * horizon)) + (then,))
    return found


def _leaders(own: Served, k: int) -> tuple[list[int], list[int]]:
    """The three strategies that the bandit itself served most in the first and in the second half of episodes."""
    _, request = episodes_of(own.done)
    late = request > request.max() // 2
    counts = [torch.bincount(own.action[half], minlength=k).argsort(descending=True) for half in (~late, late)]
    return counts[0][:3].tolist(), counts[1][:3].tolist()


def features_of(world: Any) -> Features:
    """What predicts rewards in a Select environment: the user's history, the clock, each strategy's list and use so far."""
    from metarec_gym.envs.observation import feature_slices

    at = feature_slices(world)
    names = (
        "taste",
        "history_length",
        "popularity_affinity",
        "category_entropy",
        "unrewarded_requests",
        "request_fraction",
        "session_fraction",
        "sessions",
        "cost_weight",
        "latency_weight",
        "recent_gap",
        "strategy_count",
    )
    shared = tuple(c for name in names for c in range(at[name].start, at[name].stop))
    own = tuple(at[name].start for name in at if name.startswith("list_"))
    return Features(shared, own, bent=(at["request_fraction"].start,), bent_own=(at["strategy_count"].start,))


def learn_tuned(lesson: Any, *, log: Any = None) -> HierarchicalUcb:
    """The tuned hierarchical bandit of a lesson.

    Args:
        lesson: `world`, `fold`, `seed`, `requests`, `horizon`, `make_env`.
        log: Called with a sentence about every choice; None keeps quiet.
    """
    say = log or (lambda text: None)
    seed = stream(lesson.seed, "tuned bandit", lesson.fold)
    k, horizon = lesson.world.n_strategies, int(lesson.horizon)
    budget = [share * lesson.requests for share in SHARES]
    env = lesson.make_env(min(2048, max(1, int(budget[0]) // horizon)))
    rounds = [serve(env, int(budget[0]), stream(seed, "random"))]
    bandit = HierarchicalUcb(k, features_of(lesson.world)).fit(rounds)
    rounds.append(serve(env, int(budget[1]), stream(seed, "own"), policy=bandit, epsilon=0.2))
    bandit.fit(rounds)
    env.close()
    leads = schedules(*_leaders(rounds[1], k), horizon)
    # any margin that no reward reaches: the leader always serves
    scale = float(rounds[0].reward.mean().abs().clamp(min=1e-6))
    alone = race(
        lesson,
        [bandit.like(lead=lead, margin=1e3 * scale) for lead in leads],
        int(budget[2]),
        stream(seed, "schedules"),
    )
    order = alone.value.mean(dim=1).argsort(descending=True).tolist()
    say(f"schedules {[(short(leads[i]), round(float(alone.value[i].mean()), 3)) for i in order[:5]]}")
    candidates: list[dict[str, Any]] = [{"exploration": e, "memory": m} for e in (0.0, 0.25, 0.5) for m in (1.0, 0.95)]
    for lead in [leads[i] for i in order[:2]]:
        for margin in (0.1, 0.2, 0.4, 1e3):
            for exploration in (0.0, 0.5) if margin < 1e3 else (0.0,):
                candidates.append({"lead": lead, "margin": margin * scale, "exploration": exploration})
    second = race(lesson, [bandit.like(**c) for c in candidates], int(budget[3]), stream(seed, "settings"))
    order = second.value.mean(dim=1).argsort(descending=True).tolist()
    say(f"settings {[(_told(candidates[i]), round(float(second.value[i].mean()), 3)) for i in order]}")
    last = [candidates[i] for i in order[:4]]
    third = race(lesson, [bandit.like(**c) for c in last], int(budget[4]), stream(seed, "last"))
    pooled = torch.stack([torch.cat([second.value[order[j]], third.value[j]]).mean() for j in range(len(last))])
    best = int(pooled.argmax())
    say(f"chosen {_told(last[best])} of {[(_told(c), round(float(v), 3)) for c, v in zip(last, pooled, strict=True)]}")
    return bandit.like(**last[best])


def short(lead: tuple[int, ...]) -> str:
    """A schedule in words."""
    turns = [f"{k} from {t}" for t, k in enumerate(lead) if t == 0 or lead[t - 1] != k]
    return ", ".join(turns)


def _told(setting: dict[str, Any]) -> str:
    return " ".join(f"{name}={short(value) if name == 'lead' else round(value, 2)}" for name, value in setting.items())
