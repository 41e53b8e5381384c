"""Environments by the name of their log: `MetaRec/MovieLens100K-Select-v0` and so on.

A scenario is one of the five ids with a log and settings fixed, so that a name and a version say what was played. Its world or
log is looked up by name when the environment is made (`metarec_gym.places`); registering reads no file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WORLD_FAMILIES = ("Select", "Blend", "Slots")
"""Families whose environments run on a world; the others run on a log."""
_DESKDROP = {"session_requests": 5, "retention_weight": 1.0}


@dataclass(frozen=True)
class Scenario:
    """One of the five families on one log."""

    title: str
    """Name of the log in the id."""
    family: str
    """`Select`, `Blend`, `Slots`, `Tune` or `Replay`."""
    log: str
    """Name of the log, and of the world built from it."""
    simulates: str
    """One sentence: whose requests, and what is won."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the environment that are not its defaults; JSON values."""

    @property
    def id(self) -> str:
        """Registered id."""
        return f"MetaRec/{self.title}-{self.family}-v0"

    @property
    def base_id(self) -> str:
        """Id of the family."""
        return f"MetaRec/{self.family}-v0"

    @property
    def has_world(self) -> bool:
        """Whether it runs on a world; else on the log itself."""
        return self.family in WORLD_FAMILIES

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments of the environment, JSON values."""
        action = {"action": self.family.lower()} if self.has_world else {}
        return {"world" if self.has_world else "log": self.log, **action, **self.settings}


def _simulated(title: str, log: str, who: str, won: str, settings: dict[str, Any]) -> list[Scenario]:
    means = {
        "Select": "the action names the strategy that fills each slate",
        "Blend": "the action weighs all strategies in a fusion of their lists",
        "Slots": "the action names a strategy for each place of the slate",
    }
    worlds = [
        Scenario(title, family, log, f"{who}: {meaning}; {won}.", dict(settings)) for family, meaning in means.items()
    ]
    tuned = "the action sets step sizes, L2 and negatives; held-out ranking is won"
    trained = Scenario(
        title, "Tune", log, f"A factorisation recommender in training on a subsample of {title}: {tuned}."
    )
    return [*worlds, trained]


_ALL = [
    *_simulated(
        "MovieLens100K", "movielens_100k", "Sessions of film raters of 1997-98", "films rated 4 or more are won", {}
    ),
    *_simulated(
        "MovieLens1M", "movielens_1m", "Sessions of film raters of 2000-03", "films rated 4 or more are won", {}
    ),
    *_simulated(
        "Deskdrop",
        "deskdrop",
        "Employees who read articles on an intranet and come back, several sessions an episode",
        "views, likes and responses (bookmark, follow, comment) are won, and users who come back within a week",
        _DESKDROP,
    ),
    Scenario(
        "OpenBandit",
        "Replay",
        "open_bandit",
        "Logged requests to a fashion shop, two production policies with known chances: the action names the policy; clicks "
        "are won.",
    ),
]

SCENARIOS: dict[str, Scenario] = {scenario.id: scenario for scenario in _ALL}
"""By id."""
