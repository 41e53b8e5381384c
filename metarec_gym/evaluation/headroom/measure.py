"""The rounds of plays that headroom is measured from, in tasks that outlive a kill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from metarec_gym.evaluation.headroom.found import FoldPlays, Headroom, LookPlays, Sched
from metarec_gym.evaluation.headroom.rules import (
    choose,
    choose_sched,
    length_edges,
    played_throughout,
    still_racing,
)
from metarec_gym.evaluation.headroom.settings import FOLDS, EvalSettings, env_key, horizons_of
from metarec_gym.evaluation.intervals import Floats
from metarec_gym.evaluation.references import FullInformation, LookAhead, RewardPrior, learn_reward_prior
from metarec_gym.evaluation.rollout import (
    Choices,
    Fixed,
    Greedy,
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
from metarec_gym.seeding import stream

if TYPE_CHECKING:
    from metarec_gym.world import World

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
