"""What a measurement found: the plays of each fold, the best rule, looking ahead, and the numbers made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_gym.evaluation.headroom.settings import FOLDS, EvalSettings
from metarec_gym.evaluation.intervals import Floats, Interval
from metarec_gym.evaluation.metrics import MIN_HEADROOM, lift
from metarec_gym.evaluation.references import FullInformation, LookAhead
from metarec_gym.evaluation.rollout import (
    Choices,
    Played,
    RowRule,
    Window,
    per_user,
)


@dataclass(frozen=True)
class FoldPlays:
    """Plays of one fold's users. C start states, N replicates, M fresh ones, K strategies, P windows, T requests.

    Attributes:
        user: int64 (C,).
        history_length: int64 (C,).
        fixed: float64 (C, N, K, P), value of every strategy played throughout; policies are played on these replicates.
        strategies: K plays, the same as summaries.
        racing: bool (C, K), strategies that may be the best of the start state.
        raced: float64 (C, M, K, P), the second round; NaN where a strategy had left the race.
    """

    user: NDArray[np.int64]
    history_length: NDArray[np.int64]
    fixed: Floats
    strategies: tuple[Played, ...]
    racing: NDArray[np.bool_]
    raced: Floats

    @property
    def engaged(self) -> Floats:
        """Items taken up to each request, float64 (T,), under the strategy of which most are taken."""
        return cast(Floats, np.max([p.engaged.mean(axis=0) for p in self.strategies], axis=0))


@dataclass(frozen=True)
class Sched:
    """The best non-personal rule as chosen on the training fold.

    Attributes:
        name: In words.
        player: The rule.
        value: float64 (C, R, P) on the test fold.
        candidates: Value on the training users, cross-validated, by candidate.
    """

    name: str
    player: RowRule
    value: Floats
    candidates: dict[str, float]


@dataclass(frozen=True)
class LookPlays:
    """The greedy oracle with look-ahead and without, from the same start states with the same luck.

    Attributes:
        rule: What looks ahead, and how far.
        look: Plays with look-ahead, by fold scored.
        greedy: float64 (C, R, P), values without it, by fold scored.
    """

    rule: LookAhead
    look: dict[str, Played]
    greedy: dict[str, Floats]

    @property
    def users(self) -> int:
        """Users that it was played on, one start state each."""
        return sum(len(np.unique(p.user)) for p in self.look.values())

    def over_greedy(self, window: int) -> Interval:
        """Lift of LOOK over the greedy oracle: what the future adds."""
        look, greedy = (
            np.concatenate([per_user(self.look[t].user, value[t].mean(axis=1)) for t in FOLDS])
            for value in ({t: p.value for t, p in self.look.items()}, self.greedy)
        )
        return lift(look[:, window], greedy[:, window])

    def sentence(self, window: int) -> str:
        """Whether anything is long-term, in words."""
        gain = self.over_greedy(window)
        text = (
            f"looking {self.rule.ahead} requests ahead gains {gain.as_percent()} over the greedy oracle "
            f"({self.users} users)"
        )
        if gain.low > 0.0:
            return f"{text}: what is served now changes what can be won later"
        if gain.high < MIN_HEADROOM:
            return f"{text}: nothing is long-term here, a bandit is enough"
        return f"{text}: whether anything is long-term is open"


@dataclass(frozen=True)
class Headroom:
    """What can be won, and the plays that everything else is paired with.

    Directions are named by the fold scored: "B" means chosen on A's users, scored on B's.

    Attributes:
        strategies: Names.
        windows: Reported windows; the last but one is the headline horizon, the last is its last tenth.
        replicates: Replicates a half of the oracle's second round.
        played: Replicates that policies are played on: those of the first round.
        contexts: Start states of each fold.
        folds: Plays of each fold's users.
        sbs: Single best strategy of each direction and window.
        sched: Best non-personal rule of each direction.
        choice: int64 (C, 2, P): strategy that the oracle chose on each half.
        greedy: Plays of the greedy oracle.
        optimism: (plug-in - cross-fitted oracle) / SBS.
        notes: What a reader must know about the horizons.
        sound: Whether the headline horizon is sound.
        fir: Plays of the full-information reference.
        fir_players: The reference itself, by fold scored.
        look: LOOK and the greedy oracle on the same few start states and luck; None when it was not played.
        settings: How everything was played.
    """

    strategies: tuple[str, ...]
    windows: tuple[Window, ...]
    replicates: int
    played: int
    contexts: dict[str, Tensor]
    folds: dict[str, FoldPlays]
    sbs: dict[str, tuple[int, ...]]
    sched: dict[str, Sched]
    choice: dict[str, NDArray[np.int64]]
    greedy: dict[str, Played]
    optimism: float
    notes: tuple[str, ...] = ()
    sound: bool = True
    fir: dict[str, Played] = field(default_factory=dict)
    fir_players: dict[str, FullInformation] = field(default_factory=dict)
    look: LookPlays | None = None
    settings: EvalSettings = field(default_factory=EvalSettings)
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def headline(self) -> int:
        """Index of the headline window."""
        return len(self.windows) - 2

    @property
    def horizon(self) -> int:
        """Headline horizon T."""
        return self.windows[self.headline].last

    @property
    def sbs_name(self) -> str:
        """Name of the single best strategy; both names where the two directions differ."""
        names = [self.strategies[self.sbs[test][self.headline]] for test in FOLDS]
        return names[0] if names[0] == names[1] else f"{names[1]} (A->B), {names[0]} (B->A)"

    @property
    def sched_name(self) -> str:
        """Best non-personal rule in words."""
        names = [self.sched[test].name for test in FOLDS]
        return names[0] if names[0] == names[1] else f"{names[1]} (A->B), {names[0]} (B->A)"

    def pooled(self, value: dict[str, Floats]) -> Floats:
        """Values of all users, fold A's before fold B's; a dict of (C, R, ...) -> (users, ...)."""
        return np.concatenate([per_user(self.folds[test].user, mean_replicates(value[test])) for test in FOLDS])

    def sbs_value(self, *, raced: bool = False) -> dict[str, Floats]:
        """Value of the single best strategy, (C, R, P) by fold scored, in the first round or in the second."""
        plays = {test: self.folds[test].raced if raced else self.folds[test].fixed for test in FOLDS}
        return {
            test: np.stack([plays[test][:, :, k, p] for p, k in enumerate(self.sbs[test])], axis=2) for test in FOLDS
        }

    def oracle_value(self, *, raced: bool = False, plug_in: bool = False) -> dict[str, Floats]:
        """Value of the per-user oracle, (C, R, P), in the first round or in the second.

        Each half is scored with the choice made on the second round's other half (on its own half if `plug_in`).
        """
        found = {}
        for test in FOLDS:
            values = self.folds[test].raced if raced else self.folds[test].fixed
            half = halves(values.shape[1])
            chosen = self.choice[test][:, half if plug_in else 1 - half]
            found[test] = np.take_along_axis(values, chosen[:, :, None, :], axis=2)[:, :, 0, :]
        return found

    def oracle_player(self, test: str) -> Choices:
        """The oracle's stored choices at the headline horizon, for the replicates that policies are played on."""
        return Choices(torch.from_numpy(self.choice[test][:, 1 - halves(self.played), self.headline]))

    def lift_of(self, value: dict[str, Floats], window: int, *, raced: bool = False) -> Interval:
        """Lift over the single best strategy, paired on the round that both were played in."""
        return lift(self.pooled(value)[:, window], self.pooled(self.sbs_value(raced=raced))[:, window])

    def headrooms(self, window: int | None = None) -> dict[str, Interval]:
        """Lift over SBS of the per-user oracle, the greedy oracle and the best non-personal rule."""
        at = self.headline if window is None else window
        if f"headrooms{at}" not in self._cache:
            greedy = {test: self.greedy[test].value for test in FOLDS}
            sched = {test: self.sched[test].value for test in FOLDS}
            self._cache[f"headrooms{at}"] = {
                "per-user oracle": self.lift_of(self.oracle_value(raced=True), at, raced=True),
                "greedy oracle": self.lift_of(greedy, at),
                "best non-personal rule": self.lift_of(sched, at),
            }
        return cast("dict[str, Interval]", self._cache[f"headrooms{at}"])

    def fir_lift(self, window: int | None = None) -> Interval:
        """Lift of the full-information reference over the single best strategy."""
        at = self.headline if window is None else window
        return self.lift_of({test: self.fir[test].value for test in FOLDS}, at)

    def reference_lines(self) -> list[str]:
        """What the two references beside the oracles say; nothing where they were not played."""
        lines = []
        if self.fir:
            lines.append(
                f"full information (a learner told every strategy's answer; no bound): {self.fir_lift().as_percent()} "
                "over the single best strategy"
            )
        if self.look is not None:
            lines.append(self.look.sentence(self.headline))
        return lines

    def plug_in(self) -> Interval:
        """Lift of the oracle that is scored on the luck it chose by: too high, shown to say by how much."""
        return self.lift_of(self.oracle_value(raced=True, plug_in=True), self.headline, raced=True)

    def line(self) -> str:
        """The headroom line of the table."""
        h = self.headrooms()
        rule = h["best non-personal rule"]
        return (
            f"headroom over the single best strategy ({self.sbs_name}) at T={self.horizon}: per-user oracle "
            f"{h['per-user oracle'].as_percent()}, greedy oracle {h['greedy oracle'].as_percent()}, best "
            f"non-personal rule ({self.sched_name}) {rule.as_percent()}"
        )

    def to_json(self) -> dict[str, Any]:
        """Its numbers as plain JSON types."""
        plug_in = self.plug_in()
        windows = {w.name: p for p, w in enumerate(self.windows)}
        look = self.look
        return {
            "env": self.settings.env,
            "fir": {name: self.fir_lift(p).to_json() for name, p in windows.items()} if self.fir else None,
            "look": None
            if look is None
            else {
                "users": look.users,
                "replicates": next(iter(look.greedy.values())).shape[1],
                **vars(look.rule),
                "over_greedy": {name: look.over_greedy(p).to_json() for name, p in windows.items()},
                "sentence": look.sentence(self.headline),
            },
            "horizon": self.horizon,
            "sound": self.sound,
            "notes": list(self.notes),
            "sbs": {f"scored on {t}": [self.strategies[k] for k in self.sbs[t]] for t in FOLDS},
            "sched": {f"scored on {t}": {"rule": s.name, "candidates": s.candidates} for t, s in self.sched.items()},
            "replicates_per_half": self.replicates,
            "oracle_optimism": self.optimism,
            "strategies_racing": {f: float(plays.racing.sum(axis=1).mean()) for f, plays in self.folds.items()},
            "plug_in_oracle": plug_in.to_json(),
            "windows": {
                w.name: {name: i.to_json() for name, i in self.headrooms(p).items()} for p, w in enumerate(self.windows)
            },
            "users": len(self.pooled(self.sbs_value())),
            "contexts": {fold: len(c) for fold, c in self.contexts.items()},
        }


def mean_replicates(value: Floats) -> Floats:
    """Mean over axis 1; replicates that were not played (NaN) do not count."""
    mean: Floats = np.nanmean(value, axis=1) if np.isnan(value).any() else value.mean(axis=1)
    return mean


def halves(replicates: int) -> NDArray[np.int64]:
    """Which half each replicate belongs to, 0 or 1; int64 (replicates,)."""
    # even and odd replicates: doubling their number extends both halves and changes neither
    return np.arange(replicates) % 2
