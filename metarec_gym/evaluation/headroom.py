"""Is there anything to win by selecting? Measured before anything is trained, with both directions pooled by user.

Every strategy is played closed-loop from the same start states with the same luck. A first round plays all of them a few
times; a second round, with fresh luck, replays what may still be best in two halves of replicates: the per-user oracle
chooses a strategy for each start state on one half and is scored on the other, then the other way round, because a raw
maximum would mostly reward luck. As the second round grows, strategies that are surely not the best of a start state leave
(one in ten thousand leaves in error); whatever is scored plays on, so leaving biases no value. The single best strategy
(SBS) and the best non-personal rule (SCHED) are chosen on the users of one fold (with its judge) and scored on the users of
the other (with the other judge). Two references stand beside the oracles: one that looks ahead (LOOK) and one that sees
every strategy's answer (FIR), see `references`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_gym.evaluation.intervals import Floats, Interval
from metarec_gym.evaluation.metrics import MIN_HEADROOM, lift
from metarec_gym.evaluation.references import FullInformation, LookAhead, RewardPrior, learn_reward_prior
from metarec_gym.evaluation.rollout import (
    Choices,
    Fixed,
    Greedy,
    LengthRule,
    Played,
    Player,
    Rotation,
    RowRule,
    Schedule,
    Window,
    check_env_settings,
    effort_of,
    greedy_schedule,
    per_user,
    pick_contexts,
    rollout,
)
from metarec_gym.evaluation.tasks import Arrays, Task, advance, run_tasks
from metarec_gym.seeding import fold_in, mix, stream

if TYPE_CHECKING:
    from metarec_gym.world import World

FOLDS = ("A", "B")
DROP_P = 1e-4
"""A strategy leaves a start state's race when a t test says that it is worse than the leader with a p-value below this."""
CANDIDATES = 5
"""Strategies that rotations and switches are built from: the best ones on the training users."""
LONGEST_ROTATION = 3
SWITCHES = (0.25, 0.4, 0.55, 0.7)
"""Shares of the episode after which a rule may switch from the best strategy to another one for good."""
SCHEDULE_BINS = (1, 2, 3)
"""Ranges of history lengths with schedules of their own."""
SCHEDULE_ROWS = 4096
"""Episodes that a schedule is learned from, at most."""
PRIOR_ROWS = 1024
"""Episodes that the full-information reference takes its prior from, at most."""
LOOK_CHUNK = 32
"""Start states of one look-ahead task: a kill loses a few seconds of work."""
CHUNK_STEPS = 400_000
"""User-steps of a task in the second round: a kill loses a few seconds of work."""
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
        return np.concatenate([per_user(self.folds[test].user, _mean_replicates(value[test])) for test in FOLDS])

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
            half = _halves(values.shape[1])
            chosen = self.choice[test][:, half if plug_in else 1 - half]
            found[test] = np.take_along_axis(values, chosen[:, :, None, :], axis=2)[:, :, 0, :]
        return found

    def oracle_player(self, test: str) -> Choices:
        """The oracle's stored choices at the headline horizon, for the replicates that policies are played on."""
        return Choices(torch.from_numpy(self.choice[test][:, 1 - _halves(self.played), self.headline]))

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


def _mean_replicates(value: Floats) -> Floats:
    """Mean over axis 1; replicates that were not played (NaN) do not count."""
    mean: Floats = np.nanmean(value, axis=1) if np.isnan(value).any() else value.mean(axis=1)
    return mean


def _halves(replicates: int) -> NDArray[np.int64]:
    # even and odd replicates: doubling their number extends both halves and changes neither
    return np.arange(replicates) % 2


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


def play_task(
    world: World | str | Path,
    fold: str,
    player: Player | Callable[[], Any],
    contexts: list[int],
    windows: tuple[Window, ...],
    horizon: int,
    noise_base: int,
    replicates: int,
    settings: EvalSettings,
    device: str,
) -> Arrays:
    """One task: plays `player` and returns the arrays of `Played`. Runs in this process or in a worker."""
    from metarec_gym.world import resolve_world

    resolved = resolve_world(world)
    effort = effort_of(cast(Player, player), resolved.n_strategies)
    result = rollout(
        resolved,
        fold,
        player,
        contexts=torch.tensor(contexts, dtype=torch.int64),
        replicates=replicates,
        horizon=horizon,
        env_seed=stream(settings.seed, "evaluation"),
        slate_size=settings.slate_size,
        cost_weight=settings.cost_weight,
        env_settings=settings.env,
        noise_base=noise_base,
        device=device,
        batch_rows=settings.batch_rows,
        progress=lambda users: advance(users * effort),
    )
    return result.played(windows, resolved.n_strategies).arrays()


def prior_task(
    world: World | str | Path, fold: str, contexts: list[int], horizon: int, settings: EvalSettings, device: str
) -> Arrays:
    """One task: the full-information reference's prior from a fold's users."""
    from metarec_gym.world import resolve_world

    return learn_reward_prior(
        resolve_world(world),
        fold,
        contexts=torch.tensor(contexts, dtype=torch.int64),
        horizon=horizon,
        env_seed=stream(settings.seed, "reward prior"),
        slate_size=settings.slate_size,
        cost_weight=settings.cost_weight,
        env_settings=settings.env,
        device=device,
    ).arrays()


def env_key(env: Mapping[str, Any]) -> str:
    """What environment settings add to the name of a task; nothing for none."""
    return f"_env{stream(0, json.dumps(env, sort_keys=True)):016x}" if env else ""


def race_task(strategy: list[int], **kwargs: Any) -> Arrays:
    """One task of the second round: start state `contexts[i]` is served by `strategy[i]` throughout; values only."""
    stored = torch.tensor(strategy, dtype=torch.int64)[:, None].expand(-1, kwargs["replicates"])
    return {"value": play_task(player=Choices(stored), **kwargs)["value"]}


def measure_headroom(
    world: World,
    settings: EvalSettings,
    *,
    folder: Path | None = None,
    source: str | Path | None = None,
    workers: int = 1,
    device: str = "cpu",
    progress: bool = True,
) -> Headroom:
    """Plays every strategy, the greedy oracle and the rules, and puts the headroom together.

    Args:
        world: The world.
        settings: How policies are played.
        folder: Where finished chunks are kept and found again; None keeps nothing. One folder belongs to one world and
            one choice of settings, device and code.
        source: The world's folder, which workers read; needed for more than one worker.
        workers: Processes.
        device: Where environments run.
        progress: Shows bars with the time left.

    Returns:
        The headroom.
    """
    check_env_settings(settings.env)
    horizon, sound, notes = horizons_of(world, settings)
    run = _Measurement(world, settings, folder, source, workers if source is not None else 1, device, progress)
    engaged_p90 = world.metrics.get("engaged_p90")
    if engaged_p90 is None:
        notes += (
            "The world does not say how many items users take in the log, so horizons were not checked for that.",
        )
    first = run.fixed(_windows(horizon, settings), horizon, 0, 2 * settings.replicates)
    if engaged_p90 is not None and settings.horizon is None:
        taken = np.max([first[fold].engaged for fold in FOLDS], axis=0)
        within = int((taken <= engaged_p90).sum())
        if 0 < within < horizon:
            notes += (
                f"From request {within + 1} on users take more items than 90 % did in the log ({engaged_p90:.0f}).",
            )
            horizon = within
            first = run.fixed(_windows(horizon, settings), horizon, 0, 2 * settings.replicates)
        elif within == 0:
            sound = False
            notes += (f"Already in the first request users take more than {engaged_p90:.0f} items, the log's p90.",)
    return run.finish(first, _windows(horizon, settings), horizon, notes, sound)


def _windows(horizon: int, settings: EvalSettings) -> tuple[Window, ...]:
    shorter = tuple(Window.until(h) for h in sorted(settings.horizons) if h < horizon)
    return (*shorter, Window.until(horizon), Window.last_tenth(horizon))


@dataclass
class _Measurement:
    world: World
    settings: EvalSettings
    folder: Path | None
    source: str | Path | None
    workers: int
    device: str
    progress: bool

    def __post_init__(self) -> None:
        s = self.settings
        self.contexts = {
            fold: pick_contexts(self.world, fold, per_user=s.contexts_per_user, seed=s.seed, max_users=s.max_users)
            for fold in FOLDS
        }
        for fold, contexts in self.contexts.items():
            if len(torch.unique(self.world.tensors["start_user"][contexts])) < 2:
                raise ValueError(
                    f"fold {fold} has fewer than two users with start states; an interval needs at least two"
                )

    def task(
        self,
        label: str,
        fold: str,
        player: Player,
        windows: tuple[Window, ...],
        horizon: int,
        base: int,
        count: int,
    ) -> Task:
        contexts = self.contexts[fold].tolist()
        steps = len(contexts) * count * horizon
        return Task(
            key=f"{label}_{fold}_T{horizon}_{base}-{base + count}{env_key(self.settings.env)}",
            call=play_task,
            kwargs={
                "world": self._world_argument,
                "fold": fold,
                "player": player,
                "contexts": contexts,
                "windows": windows,
                "horizon": horizon,
                "noise_base": base,
                "replicates": count,
                "settings": self.settings,
                "device": self.device,
            },
            weight=steps * effort_of(player, self.world.n_strategies),
        )

    @property
    def _world_argument(self) -> World | str | Path:
        return self.source if self.workers > 1 and self.source is not None else self.world

    def run(self, tasks: Sequence[Task], title: str) -> dict[str, Played]:
        results = run_tasks(tasks, folder=self.folder, workers=self.workers, title=title, progress=self.progress)
        return {key: Played.from_arrays(arrays) for key, arrays in results.items()}

    def fixed(self, windows: tuple[Window, ...], horizon: int, base: int, count: int) -> dict[str, FoldPlays]:
        """Every strategy on both folds."""
        tasks = {
            (fold, k): self.task(f"fixed{k}", fold, Fixed(k), windows, horizon, base, count)
            for fold in FOLDS
            for k in range(self.world.n_strategies)
        }
        done = self.run(list(tasks.values()), f"headroom: strategies, replicates {base + 1}-{base + count}")
        plays = {}
        for fold in FOLDS:
            mine = [done[tasks[fold, k].key] for k in range(self.world.n_strategies)]
            plays[fold] = FoldPlays(
                user=mine[0].user,
                history_length=mine[0].history_length,
                fixed=np.stack([p.value for p in mine], axis=2),
                strategies=tuple(mine),
                racing=np.ones((len(mine[0].user), len(mine)), dtype=np.bool_),
                raced=np.zeros((len(mine[0].user), 0, len(mine), len(windows))),
            )
        return plays

    def race(
        self,
        plays: dict[str, FoldPlays],
        sbs: dict[str, tuple[int, ...]],
        windows: tuple[Window, ...],
        horizon: int,
        base: int,
        count: int,
    ) -> dict[str, Floats]:
        """One block of the second round; (C, count, K, P), NaN where nothing was played."""
        first = base == 2 * self.settings.replicates
        tasks: list[tuple[str, NDArray[np.int64], NDArray[np.int64], Task]] = []
        for fold in FOLDS:
            racing = plays[fold].racing
            reference = np.zeros(self.world.n_strategies, dtype=np.bool_)
            reference[np.unique(sbs[fold])] = True
            # where the reference alone is left the oracle is the reference, and nothing more can be learned
            going_on = (racing != reference).any(axis=1) | first
            # the reference is played wherever the oracle is, with the same luck
            wanted = (racing | reference) & going_on[:, None]
            context, strategy = np.nonzero(wanted)
            size = max(1, CHUNK_STEPS // (count * horizon))
            for low in range(0, len(context), size):
                c, k = context[low : low + size], strategy[low : low + size]
                task = self.task(f"race{low}", fold, Fixed(0), windows, horizon, base, count)
                kwargs = {name: value for name, value in task.kwargs.items() if name != "player"}
                kwargs |= {"contexts": self.contexts[fold][torch.from_numpy(c)].tolist(), "strategy": k.tolist()}
                tasks.append((fold, c, k, Task(task.key, race_task, kwargs, len(c) * count * horizon)))
        done = run_tasks(
            [task for *_, task in tasks],
            folder=self.folder,
            workers=self.workers,
            title=f"headroom: oracle, {(base + count) // 2 - self.settings.replicates} replicates a half",
            progress=self.progress,
        )
        found = {
            fold: np.full((len(p.user), count, self.world.n_strategies, len(windows)), np.nan)
            for fold, p in plays.items()
        }
        for fold, c, k, task in tasks:
            found[fold][c, :, k] = done[task.key]["value"]
        return found

    def finish(
        self,
        plays: dict[str, FoldPlays],
        windows: tuple[Window, ...],
        horizon: int,
        notes: tuple[str, ...],
        sound: bool,
    ) -> Headroom:
        played = 2 * self.settings.replicates
        headline = len(windows) - 2
        sbs = {test: self._single_best(plays[_other(test)], headline) for test in FOLDS}
        plays = {fold: replace(p, racing=still_racing(p.fixed[..., :-1])) for fold, p in plays.items()}
        base, count = played, played
        while True:
            more = self.race(plays, sbs, windows, horizon, base, count)
            plays = {fold: replace(p, raced=np.concatenate([p.raced, more[fold]], axis=1)) for fold, p in plays.items()}
            replicates = (base + count - played) // 2
            choice = {fold: choose(p.raced, p.racing, headline) for fold, p in plays.items()}
            draft = Headroom(
                self.world.strategies,
                windows,
                replicates,
                played,
                self.contexts,
                plays,
                sbs,
                {},
                choice,
                {},
                0.0,
                notes,
                sound,
            )
            reference = draft.pooled(draft.sbs_value(raced=True))[:, headline].mean()
            plug_in, honest = (draft.pooled(draft.oracle_value(raced=True, plug_in=x)) for x in (True, False))
            gap = float((plug_in - honest)[:, headline].mean())
            optimism = gap / abs(float(reference)) if reference != 0.0 else 0.0
            if optimism <= self.settings.tolerance or replicates >= self.settings.max_replicates:
                break
            # what was played stays; as many again are added
            base, count = base + count, base + count - played
            plays = {fold: replace(p, racing=still_racing(p.raced[..., :-1], p.racing)) for fold, p in plays.items()}
        if optimism > self.settings.tolerance:
            notes += (
                f"With {replicates} replicates a half the oracle's optimism is still {optimism:.2%} of the single best "
                f"strategy (wanted: {self.settings.tolerance:.2%}).",
            )
        sched = self._sched(plays, windows, horizon, headline, played)
        tasks = {fold: self.task("greedy", fold, Greedy(), windows, horizon, 0, played) for fold in FOLDS}
        done = self.run(list(tasks.values()), "headroom: greedy oracle")
        greedy = {fold: done[task.key] for fold, task in tasks.items()}
        fir_players = self.full_information(horizon)
        tasks = {
            fold: self.task("fir", fold, player, windows, horizon, 0, played) for fold, player in fir_players.items()
        }
        done = self.run(list(tasks.values()), "headroom: full-information reference")
        fir = {fold: done[task.key] for fold, task in tasks.items()}
        wanted = self.settings.look and self.settings.look_users > 0
        look = self.look_ahead(greedy, windows, horizon) if wanted else None
        return replace(
            draft,
            sched=sched,
            greedy=greedy,
            optimism=optimism,
            notes=notes,
            fir=fir,
            fir_players=fir_players,
            look=look,
            settings=self.settings,
            _cache={},
        )

    def full_information(self, horizon: int) -> dict[str, FullInformation]:
        """The full-information reference by fold scored, with the other fold's prior."""
        priors = {}
        for fold in FOLDS:
            contexts = self.contexts[fold]
            contexts = contexts[:: -(-len(contexts) // PRIOR_ROWS)]
            kwargs: dict[str, Any] = {"world": self._world_argument, "fold": fold, "horizon": horizon}
            kwargs |= {"contexts": contexts.tolist(), "settings": self.settings, "device": self.device}
            weight = len(contexts) * horizon * self.world.n_strategies
            key = f"prior_{fold}_T{horizon}{env_key(self.settings.env)}"
            priors[_other(fold)] = Task(key, prior_task, kwargs, weight)
        found = run_tasks(
            list(priors.values()),
            folder=self.folder,
            workers=self.workers,
            title="headroom: prior of the full-information reference",
            progress=self.progress,
        )
        return {test: FullInformation(RewardPrior(**found[task.key])) for test, task in priors.items()}

    def look_ahead(self, greedy: dict[str, Played], windows: tuple[Window, ...], horizon: int) -> LookPlays:
        """LOOK from some of the greedy oracle's start states, on the first replicate of its luck."""
        s = self.settings
        rule = LookAhead(s.look_ahead, s.look_branches, s.look_candidates)
        tasks: dict[str, list[Task]] = {fold: [] for fold in FOLDS}
        places = {}
        for fold in FOLDS:
            users = s.look_users if s.max_users is None else min(s.look_users, s.max_users)
            # the same keyed draws pick fewer: these start states are among those of the greedy oracle
            contexts = pick_contexts(self.world, fold, per_user=1, seed=s.seed, max_users=users)
            places[fold] = np.searchsorted(greedy[fold].start_state, contexts.numpy())
            for low in range(0, len(contexts), LOOK_CHUNK):
                part = contexts[low : low + LOOK_CHUNK].tolist()
                task = self.task(f"look{low}", fold, rule, windows, horizon, 0, 1)
                weight = len(part) * horizon * rule.effort(self.world.n_strategies)
                tasks[fold].append(replace(task, kwargs={**task.kwargs, "contexts": part}, weight=weight))
        done = self.run([task for part in tasks.values() for task in part], "headroom: look-ahead")
        look = {fold: _joined([done[task.key] for task in part]) for fold, part in tasks.items()}
        for fold in FOLDS:
            np.testing.assert_array_equal(greedy[fold].start_state[places[fold]], look[fold].start_state)
        return LookPlays(rule, look, {fold: greedy[fold].value[places[fold], :1] for fold in FOLDS})

    def _single_best(self, training: FoldPlays, headline: int) -> tuple[int, ...]:
        value = per_user(training.user, training.fixed.mean(axis=1)).mean(axis=0)
        best = value.argmax(axis=0)
        # the last tenth belongs to the headline horizon's choice
        return (*(int(k) for k in best[: headline + 1]), int(best[headline]))

    def _sched(
        self, plays: dict[str, FoldPlays], windows: tuple[Window, ...], horizon: int, headline: int, played: int
    ) -> dict[str, Sched]:
        rules = self._timed_rules(plays, windows, horizon, headline)
        chosen = {
            test: choose_sched(
                plays[_other(test)], rules[_other(test)], self.world.strategies, headline, self.settings.seed
            )
            for test in FOLDS
        }
        tasks = {
            test: self.task(_label(rule), test, rule, windows, horizon, 0, played)
            for test, (_, rule, _) in chosen.items()
            if isinstance(rule, Rotation | Schedule)
        }
        done = self.run(list(tasks.values()), "headroom: best simple rule")
        found = {}
        for test, (name, rule, scores) in chosen.items():
            value = done[tasks[test].key].value if test in tasks else played_throughout(rule, plays[test])
            found[test] = Sched(name, rule, value, scores)
        return found

    def _timed_rules(
        self, plays: dict[str, FoldPlays], windows: tuple[Window, ...], horizon: int, headline: int
    ) -> dict[str, dict[RowRule, Floats]]:
        """Rotations, switches and schedules fitted to each fold's users; values (C, R, P) on those users.

        Rotations grow one strategy at a time: from the best strategy on, every round appends the one that helps most, so
        that a rotation may serve one strategy twice as often as another. A switch serves the best strategy up to some
        request and another one from then on: long sessions exhaust a list. A schedule takes at each request what is worth
        most to the training users on average. Half of the replicates decide.
        """
        replicates = self.settings.replicates
        found: dict[str, dict[RowRule, Floats]] = {fold: {} for fold in FOLDS}
        pool: dict[str, list[int]] = {}
        grown: dict[str, tuple[int, ...]] = {}
        first: dict[tuple[str, RowRule], Task] = {}

        def add(fold: str, rule: RowRule) -> None:
            first[fold, rule] = self.task(_label(rule), fold, rule, windows, horizon, 0, replicates)

        for fold in FOLDS:
            value = per_user(plays[fold].user, plays[fold].fixed.mean(axis=1))[:, :, headline].mean(axis=0)
            best, *others = (int(k) for k in np.argsort(-value, kind="stable")[:CANDIDATES])
            pool[fold], grown[fold] = [best, *others], (best,)
            for other in others:
                for share in SWITCHES:
                    at = round(share * horizon)
                    if 0 < at < horizon:
                        add(fold, Schedule((), ((*[best] * at, other),)))
            for bins in SCHEDULE_BINS:
                add(fold, self._schedule(fold, plays[fold].history_length, bins, horizon))
        done = self.run(list(first.values()), "headroom: switches and schedules")
        for (fold, rule), task in first.items():
            found[fold][rule] = done[task.key].value
        self._grow_rotations(plays, windows, horizon, headline, pool, grown, found)
        return found

    def _schedule(self, fold: str, history_length: NDArray[np.int64], bins: int, horizon: int) -> Schedule:
        contexts = self.contexts[fold]
        step = -(-len(contexts) // SCHEDULE_ROWS)
        return greedy_schedule(
            self.world,
            fold,
            contexts=contexts[::step],
            edges=length_edges(history_length, bins),
            horizon=horizon,
            env_seed=stream(self.settings.seed, "schedules"),
            slate_size=self.settings.slate_size,
            cost_weight=self.settings.cost_weight,
            env_settings=self.settings.env,
            device=self.device,
        )

    def _grow_rotations(
        self,
        plays: dict[str, FoldPlays],
        windows: tuple[Window, ...],
        horizon: int,
        headline: int,
        pool: dict[str, list[int]],
        grown: dict[str, tuple[int, ...]],
        found: dict[str, dict[RowRule, Floats]],
    ) -> None:
        for length in range(2, LONGEST_ROTATION + 1):
            tasks = {
                (fold, rotation): self.task(
                    _label(rotation), fold, rotation, windows, horizon, 0, self.settings.replicates
                )
                for fold in FOLDS
                for k in pool[fold]
                if len(set((rotation := Rotation((*grown[fold], k))).strategies)) > 1
            }
            done = self.run(list(tasks.values()), f"headroom: rotations of {length}")
            for (fold, rotation), task in tasks.items():
                found[fold][rotation] = done[task.key].value
            for fold in FOLDS:
                mine = [rotation for f, rotation in tasks if f == fold]
                if mine:
                    users, values = plays[fold].user, found[fold]
                    scores = [float(per_user(users, values[r].mean(axis=1))[:, headline].mean()) for r in mine]
                    grown[fold] = mine[int(np.argmax(scores))].strategies


def _joined(parts: Sequence[Played]) -> Played:
    """Plays of several lists of start states as one."""
    arrays = [part.arrays() for part in parts]
    return Played.from_arrays(
        {n: parts[0].noise if n == "noise" else np.concatenate([a[n] for a in arrays]) for n in arrays[0]}
    )


def _label(rule: RowRule) -> str:
    """Name of a rule's files: readable where that is short."""
    if isinstance(rule, Rotation):
        return "rotation" + "-".join(map(str, rule.strategies))
    return f"schedule{stream(0, repr(rule)):016x}"


def _other(fold: str) -> str:
    return FOLDS[1 - FOLDS.index(fold)]


def still_racing(values: Floats, racing: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Strategies that may be the best of a start state at one of the windows.

    Args:
        values: (C, N, K, P); replicates are shared by the strategies, so differences are paired.
        racing: (C, K), strategies that are left; all if None.

    Returns:
        bool (C, K), at least one strategy for each start state.
    """
    from scipy import stats

    replicates = values.shape[1]
    if racing is None:
        racing = np.ones((values.shape[0], values.shape[2]), dtype=np.bool_)
    if replicates < 2:
        return racing
    # far below any value, yet finite: whoever left stays behind
    filled = np.where(racing[:, None, :, None] & ~np.isnan(values), values, -1e9)
    leader = filled.mean(axis=1).argmax(axis=1)
    behind = np.take_along_axis(filled, leader[:, None, None, :], axis=2) - filled
    se = behind.std(axis=1, ddof=1) / np.sqrt(replicates)
    limit = float(stats.t.ppf(1.0 - DROP_P, replicates - 1))
    left: NDArray[np.bool_] = racing & (behind.mean(axis=1) <= limit * se + 1e-9).any(axis=2)
    # start states that are decided were not played on; they stay decided
    return np.where(racing.sum(axis=1, keepdims=True) > 1, left, racing)


def choose(raced: Floats, racing: NDArray[np.bool_], headline: int) -> NDArray[np.int64]:
    """Best racing strategy of each start state on each half; (C, M, K, P) and (C, K) -> (C, 2, P)."""
    half = _halves(raced.shape[1])
    values = np.where(racing[:, None, :, None], raced, -np.inf)
    best = np.stack([_mean_replicates(values[:, half == h]).argmax(axis=1) for h in (0, 1)], axis=1)
    best[:, :, -1] = best[:, :, headline]
    return best


def fit_length_rule(history_length: NDArray[np.int64], value: Floats, bins: int) -> LengthRule:
    """Best strategy for each range of history lengths.

    Args:
        history_length: int64 (C,).
        value: (C, K), value of every strategy from each start state.
        bins: Ranges wanted; the edges are quantiles of the lengths, so fewer remain where lengths repeat.

    Returns:
        The rule.
    """
    edges = length_edges(history_length, bins)
    place = np.digitize(history_length, edges)
    strategies = [int(value[place == b].mean(axis=0).argmax()) for b in range(len(edges) + 1)]
    return LengthRule(edges, tuple(strategies))


def length_edges(history_length: NDArray[np.int64], bins: int) -> tuple[int, ...]:
    """Quantiles of history lengths that cut them into `bins` ranges; fewer where lengths repeat."""
    if bins == 1:
        return ()
    quantiles = np.quantile(history_length, np.arange(1, bins) / bins, method="inverted_cdf")
    return tuple(int(edge) for edge in np.unique(quantiles) if edge > history_length.min())


def choose_sched(
    train: FoldPlays,
    timed: Mapping[RowRule, Floats],
    strategies: tuple[str, ...],
    headline: int,
    seed: int,
) -> tuple[str, RowRule, dict[str, float]]:
    """Best non-personal rule on the training users: one strategy, a history-length rule, a rotation, switch or schedule.

    Rules that are fitted to users win on the very users they were fitted to; so one strategy and length rules are judged by
    five-fold cross-validation over the training users, and only then fitted to all of them. The timed rules are fitted to
    means over all users; that flatters them little, and if it does, SCHED as scored on the other fold is the lower for it.
    Rank fusion is a strategy (`rrf`).

    Args:
        train: Plays of the training fold.
        timed: Values (C, R, P) of rotations, switches and schedules on the training fold's first R replicates.
        strategies: Names.
        headline: Index of the window that decides.
        seed: Decides the cross-validation's parts.

    Returns:
        Name in words, the rule, and the score of every candidate.
    """
    replicates = next(iter(timed.values())).shape[1] if timed else train.fixed.shape[1]
    fixed = train.fixed[:, :replicates].mean(axis=1)[:, :, headline]
    part = (fold_in(mix(torch.tensor(stream(seed, "sched parts"))), torch.from_numpy(train.user)) % 5).numpy()
    scores: dict[str, float] = {}
    rules: dict[str, RowRule] = {}

    def score(value: Floats) -> float:
        return float(per_user(train.user, value[:, None]).mean())

    def cross_validated(fit: Callable[[NDArray[np.bool_]], NDArray[np.int64]]) -> float:
        chosen = np.zeros(len(fixed), dtype=np.int64)
        for p in np.unique(part):
            rest = part != p
            chosen[~rest] = fit(rest if rest.any() else ~rest)[~rest]
        return score(np.take_along_axis(fixed, chosen[:, None], axis=1)[:, 0])

    def single(rows: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.full(len(fixed), per_user(train.user[rows], fixed[rows]).mean(axis=0).argmax())

    best = int(per_user(train.user, train.fixed.mean(axis=1)[:, :, headline]).mean(axis=0).argmax())
    rules["one strategy"] = Fixed(best)
    scores["one strategy"] = cross_validated(single)
    for timed_rule, value in timed.items():
        name = describe_timed_rule(timed_rule, strategies)
        # long schedules are told by their shares, and two may share them
        name = name if name not in rules else f"{name} ({len(rules)})"
        rules[name], scores[name] = timed_rule, score(value.mean(axis=1)[:, headline])
    for bins in (2, 3, 4, 6):

        def by_length(rows: NDArray[np.bool_], bins: int = bins) -> NDArray[np.int64]:
            rule = fit_length_rule(train.history_length[rows], fixed[rows], bins)
            return np.asarray(rule.strategies)[np.digitize(train.history_length, rule.edges)]

        name = f"history-length rule with {bins} ranges"
        rules[name] = fit_length_rule(train.history_length, fixed, bins)
        scores[name] = cross_validated(by_length)
    # a rule must be better than one strategy, not equal to it
    winner = max(scores, key=lambda name: (scores[name], name == "one strategy"))
    rule = rules[winner]
    if isinstance(rule, Fixed):
        winner = f"always {strategies[rule.strategy]}"
    elif isinstance(rule, LengthRule):
        winner = describe_length_rule(rule, strategies)
    return winner, rule, scores


def played_throughout(rule: RowRule, plays: FoldPlays) -> Floats:
    """Value (C, R, P) of a rule that keeps one strategy in each episode, from the plays of every strategy."""
    if isinstance(rule, Fixed):
        return plays.fixed[:, :, rule.strategy]
    length_rule = cast(LengthRule, rule)
    chosen = np.asarray(length_rule.strategies)[np.digitize(plays.history_length, length_rule.edges)]
    return np.take_along_axis(plays.fixed, chosen[:, None, None, None], axis=2)[:, :, 0]


def describe_timed_rule(rule: RowRule, strategies: tuple[str, ...]) -> str:
    """A rotation, switch or schedule in words: `x 1-8, y 9-12` for the requests 1 to 8 and 9 to 12."""
    if isinstance(rule, Rotation):
        return "in turn: " + ", ".join(strategies[k] for k in rule.strategies)
    schedule = cast(Schedule, rule)
    lines = []
    for turns in schedule.table:
        starts = [i for i in range(len(turns)) if i == 0 or turns[i] != turns[i - 1]]
        ends = [*starts[1:], len(turns)]
        spans = [
            f"{strategies[turns[a]]} from request {a + 1}"
            if b == len(turns)
            else f"{strategies[turns[a]]} {a + 1}" + (f"-{b}" if b > a + 1 else "")
            for a, b in zip(starts, ends, strict=True)
        ]
        if len(spans) > 6:
            used = sorted(set(turns), key=lambda k: -turns.count(k))
            spans = [f"{strategies[k]} {turns.count(k)}x" for k in used]
        lines.append(", ".join(spans))
    if len(lines) == 1:
        return "by time: " + lines[0]
    ranges = [f"history below {edge}" for edge in schedule.edges] + ["else"]
    return "by time and history length: " + "; ".join(f"{r}: {line}" for r, line in zip(ranges, lines, strict=True))


def describe_length_rule(rule: LengthRule, strategies: tuple[str, ...]) -> str:
    """The rule in words, neighbouring ranges with one strategy joined."""
    parts: list[str] = []
    for index, strategy in enumerate(rule.strategies):
        if index + 1 < len(rule.strategies) and rule.strategies[index + 1] == strategy:
            continue
        name = strategies[strategy]
        parts.append(f"{name} below {rule.edges[index]}" if index < len(rule.edges) else f"else {name}")
    return "by history length: " + ", ".join(parts)
