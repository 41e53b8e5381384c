"""Every agent that plays on the leaderboard beside those that `experiments.train` trains: name, kind, seeds, how it learns.

An entry learns from a `Lesson`: a budget of requests to the users of one fold, answered by that fold's main judge. What it
returns is a policy that is played on users it has never met; it may go on learning inside each episode.

    from agents.roster import ROSTER, Lesson

    policy = ROSTER["population_ucb"].learn(Lesson.of(world, "A", seed=0, requests=50_000, horizon=20))
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from agents import search, supervised
from agents.bandits.lessons import BANDITS
from agents.hybrid import learn_fixed_hybrid
from agents.tuned_ppo import learn_tuned_ppo
from metarec_gym.policy import ActingPolicy, Policy

if TYPE_CHECKING:
    from metarec_gym.envs.vector_env import MetaRecVectorEnv
    from metarec_gym.world import World

KINDS = ("learned", "bandit", "search", "supervised", "fixed")
"""What an entry may be; oracles are no entries: they see what no policy may see."""
SIGHTS = ("history", "request", "answers")
"""What a choice may rest on: the user's history, the request's number, the user's own answers in the episode."""


@dataclass(frozen=True)
class Lesson:
    """What an agent may learn from.

    Attributes:
        world: The world.
        fold: Whose users, "A" or "B".
        seed: Training seed: decides everything random.
        requests: Budget. Requests served to training users count, whoever serves them and whatever for.
        horizon: Requests an episode.
        make_env: `make_env(num_envs, **settings)` gives a torch vector environment of the fold's users and main judge that
            resets in the same step; settings are those of `EnvConfig`.
    """

    world: World
    fold: str
    seed: int
    requests: int
    horizon: int
    make_env: Callable[..., MetaRecVectorEnv]

    @classmethod
    def of(
        cls, world: World | str | Path, fold: str, *, seed: int, requests: int, horizon: int, **settings: Any
    ) -> Self:
        """A lesson in a world.

        Args:
            world: A World or its folder.
            fold: "A" or "B".
            seed: Training seed.
            requests: Budget.
            horizon: Requests an episode.
            **settings: Of every environment that the lesson makes, e.g. `slate_size` or `cost_weight`.
        """
        from metarec_gym.envs.vector_env import MetaRecVectorEnv
        from metarec_gym.world import resolve_world

        found = resolve_world(world)

        def make_env(num_envs: int, **more: Any) -> MetaRecVectorEnv:
            fixed = {"world": found, "fold": fold, "output": "torch", "autoreset_mode": "SameStep"}
            return MetaRecVectorEnv(num_envs, **{**fixed, "horizon": horizon, **settings, **more})

        return cls(found, fold, seed, requests, horizon, make_env)


@dataclass(frozen=True)
class Entry:
    """One agent.

    Attributes:
        kind: One of `KINDS`.
        seeds: Training seeds it is compared with; 1 where nothing is drawn.
        learn: Lesson -> policy; what is learned from training users lies in the policy.
        note: One line on what it is.
        needs: Modules outside the core dependencies; the entry is skipped where one is missing.
        sees: What its choice can rest on, of `SIGHTS`; decides which known optimum it must reach (`tests/known_worlds.py`).
        answers: Of a user, with which it has settled on the best strategy where it must find it out from them.
    """

    kind: str
    seeds: int
    learn: Callable[[Lesson], Policy | ActingPolicy]
    note: str = ""
    needs: tuple[str, ...] = ()
    sees: tuple[str, ...] = ("history", "request")
    answers: int = 90

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not set(self.sees) <= set(SIGHTS) or self.seeds < 1:
            raise ValueError(
                f"kind is {self.kind!r}, sees {self.sees} and seeds {self.seeds}; expected a kind of {KINDS}, sights of "
                f"{SIGHTS} and at least one seed"
            )

    def missing(self) -> tuple[str, ...]:
        """Modules that it needs and that are not installed."""
        return absent(self.needs)


def absent(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the modules that are not installed."""
    return tuple(name for name in modules if importlib.util.find_spec(name) is None)


_ANSWERS = ("answers",)
_START = ("history",)
_ALL = ("history", "request", "answers")
_SEES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("epsilon_greedy", "softmax", "ucb1", "thompson", "beta_thompson", "exp3"), _ANSWERS),
    **dict.fromkeys(("population_ucb", "population_thompson"), _ANSWERS),
    **dict.fromkeys(("neural_linear", "tuned_hierarchical"), _ALL),
}
_ANSWERS_NEEDED = {"exp3": 360}
"""Rewards chosen by an adversary are the price: what it knows of a gap grows with the root of the requests only."""


def _bandit(name: str) -> Entry:
    learn, seeds, note = BANDITS[name]
    sees = _SEES.get(name, ("history", "request"))
    return Entry("bandit", seeds, learn, note, sees=sees, answers=_ANSWERS_NEEDED.get(name, 90))


ROSTER: dict[str, Entry] = {
    "tuned_ppo": Entry(
        "learned",
        10,
        learn_tuned_ppo,
        "PPO from a searched schedule on; discount and mean of networks raced on training users",
    ),
    **{name: _bandit(name) for name in BANDITS},
    "ga": Entry("search", 5, search.learn_ga, "genetic algorithm over a linear policy", ("pymoo",)),
    "pso": Entry("search", 5, search.learn_pso, "particle swarm over a linear policy", ("pymoo",)),
    "cma_es": Entry("search", 5, search.learn_cma_es, "CMA-ES over a linear policy", ("cma",)),
    "random_search": Entry("search", 5, search.learn_random_search, "random search around a linear policy"),
    "bayes_schedule": Entry(
        "search",
        5,
        search.learn_bayes_schedule,
        "Bayesian optimisation of a schedule by request",
        ("optuna",),
        sees=("request",),
    ),
    "gbm_regressor": Entry("supervised", 5, supervised.learn_gbm_regressor, "boosted trees of each strategy's reward"),
    "gbm_selector": Entry(
        "supervised", 5, supervised.learn_gbm_selector, "boosted classifier of the user's best strategy", sees=_START
    ),
    "knn_router": Entry("supervised", 5, supervised.learn_knn_router, "best among the nearest starts", sees=_START),
    "cluster_router": Entry(
        "supervised", 5, supervised.learn_cluster_router, "best in the start's cluster", sees=_START
    ),
    "history_length": Entry(
        "supervised", 5, supervised.learn_history_length, "best for the history's length at the start", sees=()
    ),
    "supervised_bandit": Entry(
        "supervised",
        5,
        supervised.learn_supervised_bandit,
        "boosted trees as prior, then each user's answers",
        sees=_ALL,
    ),
    "fixed_hybrid": Entry(
        "supervised",
        5,
        learn_fixed_hybrid,
        "one weighted fusion of all lists for everyone, charged for all that it asks",
        ("cma",),
        sees=(),
    ),
    "round_robin": Entry("fixed", 1, supervised.learn_round_robin, "every strategy in turn", sees=()),
}
"""The agents, by name."""


def pick(chosen: tuple[str, ...], learners: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names for a choice by names and kinds, in the order of `learners` and the roster.

    Args:
        chosen: Names, kinds or `all`.
        learners: Names outside the roster, of kind "learned".

    Raises:
        ValueError: When something chosen is neither a name nor a kind.
    """
    kind_of = {**dict.fromkeys(learners, "learned"), **{name: entry.kind for name, entry in ROSTER.items()}}
    wanted = set(chosen)
    unknown = sorted(wanted - {"all", *KINDS, *kind_of})
    if unknown:
        raise ValueError(
            f"--agents names {unknown}; known are all, the kinds {', '.join(KINDS)}, and the names {', '.join(kind_of)}"
        )
    return tuple(name for name, kind in kind_of.items() if wanted & {"all", name, kind})
