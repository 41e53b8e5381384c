"""Settings of an environment; each field has its sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from metarec_gym.world import FOLDS, World

ACTIONS = ("select", "blend", "slots")
FUSIONS = ("rank", "linear_rank", "zscore")
EVENTS = ("added", "removed", "stale", "retrained")


@dataclass(frozen=True)
class EnvConfig:
    """What an environment simulates, besides the world itself. The defaults leave a world as it was fitted."""

    action: str = "select"
    """What an action says: `select` one strategy, `blend` weights of a fusion, `slots` a strategy for each place of the slate."""
    fold: str = "A"
    """Whose users are simulated, by their own judge: train on one of A and B, score on the other."""
    judge: str = "main"
    """Which of the fold's judges answers: `main`, `second` (another family) or a variant of `World.judge_names`."""
    member: int | None = None
    """Member of the judge's ensemble; None draws one for every episode."""
    horizon: int | None = None
    """Requests until truncation, over all sessions of the episode; None takes the world's largest sound horizon."""
    slate_size: int | None = None
    """Items a request; None takes the world's."""
    session_requests: int | None = None
    """Requests a session; None = the whole episode is one session. With a number an episode spans several sessions."""
    world_seed: int = 0
    """Which draw of the users' random coefficients, from their posterior."""
    cost_weight: float | tuple[float, float] = 0.0
    """Reward lost for the relative serving cost (dearest strategy = 1) of each request; (low, high) draws it for each episode."""
    latency_weight: float = 0.0
    """Reward lost for the relative measured latency (slowest strategy = 1) of each request."""
    retention_weight: float = 0.0
    """Reward for a user who comes back in time, added to the request that ended the session; needs `session_requests`."""
    retention_days: float = 7.0
    """How soon "in time" is."""
    base_rate_factor: float = 1.0
    """Multiplies the odds that a shown item is taken."""
    position_decay: float = 0.0
    """The gate's logit loses this times log2(1 + place), the first place being 0."""
    fatigue: float | None = None
    """Gate logit lost for each unit of exposure to an item's categories in the session; None takes the judge's own."""
    patience: float | None = None
    """Requests without an item taken after which half of the users leave: logit -4 + 4 * unrewarded / patience; None takes the
    judge's own leaving."""
    drift: float = 0.0
    """Synthetic drift of popularity: in the episode's s-th session (from 0) an item has lost s * drift * (2 * popularity
    percentile - 1) of the gate's logit; needs `session_requests`."""
    unavailable: tuple[str, ...] = ()
    """Strategies out of service for the whole episode: masked; choosing one all the same serves nothing and still costs."""
    schedule: tuple[tuple[str, str, int], ...] = ()
    """(strategy, event, request): `added` and `removed` begin and end its service at that request of every episode; `stale` keeps
    its lists as ranked at the episode's start, from the next session start on, until `retrained`."""
    outage_rate: float = 0.0
    """Probability that a strategy in service fails before a request."""
    outage_length: float = 5.0
    """Mean requests until a failed strategy serves again."""
    fusion: str = "rank"
    """How a blend scores an item in a list: `rank` 1 / (60 + rank), `linear_rank` 1 - (rank - 1) / depth, `zscore` the strategy's
    own score in standard deviations, less that of the last item looked at."""

    def __post_init__(self) -> None:
        # JSON knows lists only
        object.__setattr__(self, "unavailable", tuple(self.unavailable))
        if not isinstance(self.cost_weight, int | float):
            object.__setattr__(self, "cost_weight", tuple(float(w) for w in self.cost_weight))
        events = []
        for event in self.schedule:
            if len(event) != 3:
                raise ValueError(f"schedule has the entry {event!r}, expected (strategy, event, request)")
            events.append((str(event[0]), str(event[1]), int(event[2])))
        object.__setattr__(self, "schedule", tuple(events))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The settings by name.

        Raises:
            TypeError: When there is no setting of a name.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            # Python's own wording: TorchRL's GymEnv offers `frameskip` to everyone and reads the answer
            raise TypeError(
                f"unexpected keyword argument {unknown[0]!r}: an environment has no settings {unknown}; it has {known}"
            )
        return cls(**settings)

    @property
    def cost_range(self) -> tuple[float, float]:
        """Lowest and highest cost weight of an episode."""
        if isinstance(self.cost_weight, tuple):
            return self.cost_weight[0], self.cost_weight[1]
        return float(self.cost_weight), float(self.cost_weight)

    def resolve(self, world: World) -> tuple[int, int]:
        """Horizon and slate size for `world`.

        Raises:
            ValueError: When a setting does not fit the world.
        """
        for name, value, allowed in (
            ("action", self.action, ACTIONS),
            ("fold", self.fold, FOLDS),
            ("fusion", self.fusion, FUSIONS),
        ):
            if value not in allowed:
                why = ": a judge exists for these users only" if name == "fold" else ""
                raise ValueError(f"{name} is {value!r}, expected one of {allowed}{why}")
        self._check_numbers()
        judge = world.judge(self.fold, self.judge)
        if self.member is not None and not 0 <= self.member < judge.n_members:
            raise ValueError(f"member is {self.member}, the judge has the members 0..{judge.n_members - 1}")
        horizon = world.horizon if self.horizon is None else self.horizon
        slate_size = world.slate_size if self.slate_size is None else self.slate_size
        if horizon < 1 or slate_size < 1:
            raise ValueError(f"horizon is {horizon} and slate_size {slate_size}; both must be at least 1")
        self._check_lengths(world, horizon, slate_size)
        self._check_sessions(horizon, judge.has_return)
        self._check_life(world, horizon)
        return horizon, slate_size

    def _check_numbers(self) -> None:
        low, high = self.cost_range
        if isinstance(self.cost_weight, tuple) and len(self.cost_weight) != 2:
            raise ValueError(f"cost_weight is {self.cost_weight}, expected a number or (low, high)")
        if not 0.0 <= low <= high < math.inf:
            raise ValueError(
                f"cost_weight is {self.cost_weight}, expected a number >= 0 or (low, high) with low <= high"
            )
        for name, lowest in (
            ("latency_weight", 0.0),
            ("retention_weight", 0.0),
            ("position_decay", 0.0),
            ("fatigue", 0.0),
            ("outage_length", 1.0),
        ):
            value = getattr(self, name)
            if value is not None and not lowest <= value < math.inf:
                raise ValueError(f"{name} is {value}, expected a number of at least {lowest:g}")
        for name in ("retention_days", "base_rate_factor", "patience"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} is {value}, expected a number above 0")
        if not 0.0 <= self.outage_rate < 1.0:
            raise ValueError(f"outage_rate is {self.outage_rate}, expected a probability below 1")
        if not math.isfinite(self.drift):
            raise ValueError(f"drift is {self.drift}, expected a finite number")

    def _check_lengths(self, world: World, horizon: int, slate_size: int) -> None:
        listed = horizon if self.session_requests is None else min(self.session_requests, horizon)
        if listed * slate_size > world.list_length:
            shorter = "horizon" if self.session_requests is None else "session"
            raise ValueError(
                f"{listed} requests of {slate_size} items need lists of {listed * slate_size} items, the world "
                f"{world.name!r} holds {world.list_length}; use a shorter {shorter} or build the world with --horizon {listed}"
                f" --slate-size {slate_size}"
            )
        if horizon * slate_size > world.n_items:
            raise ValueError(
                f"{horizon} requests of {slate_size} items show more than the {world.n_items} items of the world "
                f"{world.name!r}; use a shorter horizon"
            )

    def _check_sessions(self, horizon: int, has_return: bool) -> None:
        if self.session_requests is None:
            needy = {"retention_weight": self.retention_weight, "drift": self.drift}
            asked = sorted(name for name, value in needy.items() if value != 0)
            if asked:
                raise ValueError(f"{asked} act between sessions, and the episode is one session; set session_requests")
            return
        if not 1 <= self.session_requests <= horizon:
            raise ValueError(f"session_requests is {self.session_requests}, expected 1..{horizon}, the horizon")
        if self.retention_weight > 0 and not has_return:
            raise ValueError(
                "retention_weight is above 0, but the log of this world does not say when users come back (its judge has no "
                "return model); leave it 0 or use a world with sessions"
            )

    def _check_life(self, world: World, horizon: int) -> None:
        named = {"unavailable": set(self.unavailable), "schedule": {strategy for strategy, _, _ in self.schedule}}
        for name, strategies in named.items():
            unknown = sorted(strategies - set(world.strategies))
            if unknown:
                raise ValueError(f"{name} names {unknown}, which the pool has not; it has {list(world.strategies)}")
        if len(set(self.unavailable)) == world.n_strategies:
            raise ValueError("every strategy is unavailable; at least one must be able to serve")
        both = sorted(named["unavailable"] & named["schedule"])
        if both:
            raise ValueError(f"{both} are unavailable for the whole episode and in the schedule too; name them once")
        for strategy, event, request in self.schedule:
            if event not in EVENTS:
                raise ValueError(f"schedule has the event {event!r} for {strategy!r}, expected one of {EVENTS}")
            if not 0 <= request < horizon:
                raise ValueError(f"schedule has request {request} for {strategy!r}, the episode has 0..{horizon - 1}")
            if event in ("stale", "retrained") and self.session_requests is None:
                raise ValueError(
                    f"schedule makes {strategy!r} {event}, but lists are ranked once in an episode of one session; set "
                    "session_requests"
                )
