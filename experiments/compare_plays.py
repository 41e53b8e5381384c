"""What a comparison trains and plays: every policy on the other fold's users, by tasks that are found again when done."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from agents.roster import ROSTER, Lesson, absent, pick
from experiments.env_settings import env_pairs, training_settings
from experiments.headroom import load_world, settings_of
from experiments.run_folder import code_hash, content_hash
from experiments.train import LEARNERS, SELECT_ID
from experiments.train import Args as TrainArgs
from experiments.train import run_folder as train_folder
from experiments.train_entry import counted
from metarec_gym.evaluation.headroom import FOLDS

if TYPE_CHECKING:
    from pathlib import Path

    from experiments.compare import Args
    from metarec_gym.evaluation.headroom import EvalSettings, Headroom
    from metarec_gym.evaluation.leaderboard import PolicyPlays
    from metarec_gym.evaluation.rollout import Played, Player
    from metarec_gym.evaluation.tasks import Arrays, Task

RESCORE_REPLICATES = 2
"""Replicates of the main table that the second judge scores again: enough for a sign, a quarter of the time."""
TRAIN_REPLICATES = 1
"""Replicates that learned policies play on their training users, to show how much better they look there."""
SECOND = "second"
"""The judge of another family."""
LEARNER_NEEDS = dict.fromkeys(("sb3_maskable_ppo", "sb3_recurrent_ppo", "sb3_qrdqn", "sb3_trpo"), ("sb3_contrib",))
"""Modules outside the core dependencies that learners need."""
SECOND_NOTE = (
    "Second judge: a response model of another family, fitted to the same users' events, scores the same choices again on {} "
    "replicates. A sure lift whose sign it turns round is model-dependent."
)


def play_policy(path: str, **kwargs: Any) -> Arrays:
    """Task: plays an exported policy."""
    from metarec_gym.evaluation.headroom import play_task
    from metarec_gym.policy import load_policy

    return play_task(player=load_policy(path), **kwargs)


def play_entry(
    name: str, train_fold: str, seed: int, requests: int, again: dict[str, Any] | None = None, **kwargs: Any
) -> Arrays:
    """Task: an agent of the roster learns what it can from training users and is played; it may learn on in each episode.

    Args:
        name: Of `agents.roster.ROSTER`.
        train_fold: Whose users to learn from, by their main judge.
        seed: Training seed.
        requests: Budget.
        again: What changes when the same policy is played once more by the second judge; None = it is not.
        **kwargs: Of `play_task`.
    """
    from metarec_gym.evaluation.headroom import play_task

    settings: EvalSettings = kwargs["settings"]
    lesson = Lesson.of(
        kwargs["world"],
        train_fold,
        seed=seed,
        requests=requests,
        horizon=kwargs["horizon"],
        slate_size=settings.slate_size,
        cost_weight=settings.cost_weight,
        device=kwargs["device"],
        **training_settings(settings.env),
    )
    started = time.perf_counter()
    player = ROSTER[name].learn(counted(lesson))
    seconds = time.perf_counter() - started
    arrays = {**play_task(player=player, **kwargs), "seconds": np.array(seconds)}
    if again is not None:
        played = play_task(player=player, **{**kwargs, **again})
        arrays |= {f"{SECOND}.{field_name}": array for field_name, array in played.items()}
    return arrays


def seeds_of(texts: Sequence[str]) -> dict[str, int]:
    """Numbers of seeds by agent, from texts such as `ppo=10`.

    Raises:
        ValueError: When a text is none, or names no agent.
    """
    found = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in {*LEARNERS, *ROSTER} or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--seeds-of {text!r}: expected AGENT=N with N at least 1, for example ppo=10")
        found[name] = int(number)
    return found


def set_of(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Hyperparameters by learner, from texts such as `ppo:gamma=0.95`.

    Raises:
        ValueError: When a text is none, or names no learner.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, setting = text.partition(":")
        if name not in LEARNERS or "=" not in setting:
            raise ValueError(f"--set-of {text!r}: expected LEARNER:NAME=VALUE, for example ppo:gamma=0.95")
        found[name] = (*found.get(name, ()), setting)
    return found


class Comparer:
    """One comparison's work: what is trained, what is played, and how.

    Args:
        args: The command line.

    Attributes:
        agents: Names of what learns and is played.
        skipped: Why, by agent left out.
    """

    def __init__(self, args: Args) -> None:
        self.args = args = replace(args, evaluation=settings_of(args))
        self.agents: tuple[str, ...] = ()
        self.skipped: dict[str, str] = {}
        self._seeds_of = seeds_of(args.seeds_of)
        self._set_of = set_of(args.set_of)
        self.world = load_world(args.world)
        chosen = tuple(a for part in args.agents for a in part.split(",") if a)
        for name in pick(chosen, tuple(LEARNERS)):
            missing = ROSTER[name].missing() if name in ROSTER else absent(LEARNER_NEEDS.get(name, ()))
            if missing:
                self.skipped[name] = f"it needs {', '.join(missing)}, which is not installed"
            else:
                self.agents += (name,)

    def seeds(self, agent: str) -> int:
        """Training seeds of an agent: those asked for it, for all, or its own; never more than the roster gives it."""
        most = ROSTER[agent].seeds if agent in ROSTER else None
        asked = self._seeds_of.get(agent) or self.args.seeds or most or LEARNERS[agent].seeds
        return min(asked, most) if most else asked

    # ---- training
    def training_args(self, headroom: Headroom, cost_weight: float | None = None) -> list[TrainArgs]:
        """Every (learner, fold, seed), with the comparison's own cost weight or another one."""
        args, jobs = self.args, []
        weight = args.evaluation.cost_weight if cost_weight is None else cost_weight
        for agent in (a for a in self.agents if a in LEARNERS):
            for seed in range(args.seed_base, args.seed_base + self.seeds(agent)):
                for fold in FOLDS:
                    jobs.append(
                        TrainArgs(
                            world=args.world,
                            agent=agent,
                            fold=cast(Literal["A", "B"], fold),
                            seed=seed,
                            steps=args.steps,
                            horizon=headroom.horizon,
                            slate_size=args.evaluation.slate_size,
                            cost_weight=weight,
                            env=(LEARNERS[agent].env, *env_pairs(training_settings(args.evaluation.env))),
                            set=self._set_of.get(agent, ()),
                            resume=True,
                            device=args.device if LEARNERS[agent].output == "torch" else "cpu",
                            runs=args.runs,
                            quiet=True,
                        )
                    )
        return jobs

    def train(self, jobs: Sequence[TrainArgs]) -> None:
        """Trains what has no result yet."""
        from experiments.train import train_task
        from metarec_gym.evaluation.tasks import Task, run_tasks

        missing = [job for job in jobs if train_folder(job).result() is None]
        tasks = [
            Task(
                # tasks of one key are done once: trainings with another cost weight are other ones
                key=train_folder(job).key,
                call=train_task,
                kwargs={"args": job, "command": train_command(job)},
                weight=job.steps,
            )
            for job in missing
        ]
        title = f"training {', '.join(dict.fromkeys(job.agent for job in missing))}"
        run_tasks(
            tasks,
            folder=None,
            workers=self.workers,
            title=title,
            progress=not self.args.quiet,
            spawn_above=100_000,
        )

    @property
    def workers(self) -> int:
        """Processes."""
        return 1 if self.args.device != "cpu" else min(self.args.workers, os.cpu_count() or 1)

    @property
    def second(self) -> EvalSettings | None:
        """How the second judge scores again; None where the world has none or another judge than the main one scores."""
        env = self.args.evaluation.env
        there = all(f"{fold}/{SECOND}" in self.world.responses for fold in FOLDS)
        if not there or not self.args.rescore or env.get("judge", "main") != "main":
            return None
        return replace(self.args.evaluation, env={**env, "judge": SECOND})

    # ---- playing
    def _task(
        self,
        headroom: Headroom,
        name: str,
        fold: str,
        call: Callable[..., Arrays],
        key: str,
        extra: dict[str, Any],
        *,
        table: str = "main",
        settings: EvalSettings | None = None,
    ) -> Task:
        """One play; `table` is "main", "second" (the same by the second judge) or "train" (on training users)."""
        from metarec_gym.evaluation.headroom import env_key
        from metarec_gym.evaluation.rollout import effort_of
        from metarec_gym.evaluation.tasks import Task

        replicates = {"main": headroom.played, SECOND: self.few(headroom), "train": TRAIN_REPLICATES}[table]
        common: dict[str, Any] = {
            "world": self.args.world,
            "fold": fold,
            "contexts": headroom.contexts[fold].tolist(),
            "windows": headroom.windows,
            "horizon": headroom.horizon,
            "noise_base": 0,
            "replicates": replicates,
            "settings": settings or self.args.evaluation,
            "device": self.args.device,
        }
        # learning costs about as much as playing, request by request
        effort = effort_of(extra["player"], self.world.n_strategies) if "player" in extra else 1
        weight = len(common["contexts"]) * replicates * headroom.horizon * effort
        weight += extra.get("requests", 0)
        title = f"{name}_{fold}_{key}".replace(" ", "_") + ("" if table == "main" else f"_{table}")
        return Task(title + env_key(common["settings"].env), call, {**common, **extra}, weight)

    def few(self, headroom: Headroom) -> int:
        """Replicates of the second judge."""
        return min(RESCORE_REPLICATES, headroom.played)

    def _entries(self) -> list[tuple[str, int, str, str]]:
        """(name, seed, fold learned from, fold scored) of every agent of the roster."""
        return [
            (name, self.args.seed_base + seed, learned, scored)
            for name in self.agents
            if name in ROSTER
            for seed in range(self.seeds(name))
            for learned, scored in (FOLDS, FOLDS[::-1])
        ]

    def play(self, headroom: Headroom, jobs: Sequence[TrainArgs], folder: Path) -> list[PolicyPlays]:
        """Plays everything on the other fold's users and gathers it by policy.

        Args:
            headroom: What everything is paired with.
            jobs: Finished trainings.
            folder: Where plays are kept.
        """
        from metarec_gym.evaluation.headroom import play_task
        from metarec_gym.evaluation.leaderboard import PolicyPlays
        from metarec_gym.evaluation.rollout import Greedy, Played
        from metarec_gym.evaluation.tasks import run_tasks
        from metarec_gym.policy import FixedPolicy, UniformPolicy

        tasks: dict[tuple[str, str, str, int], Task] = {}
        by_table = {
            "main": self.args.evaluation,
            SECOND: self.second,
            "train": replace(self.args.evaluation, env=training_settings(self.args.evaluation.env)),
        }

        def add(
            table: str, name: str, fold: str, seed: int, call: Callable[..., Arrays], key: str, extra: dict[str, Any]
        ) -> None:
            tasks[table, name, fold, seed] = self._task(
                headroom, name, fold, call, key, extra, table=table, settings=by_table[table]
            )

        scored = ("main",) if self.second is None else ("main", SECOND)
        for job in jobs:
            trained = train_folder(job)
            test = FOLDS[1 - FOLDS.index(job.fold)]
            path = str(trained.path / "policy.safetensors")
            for table, fold in (*((table, test) for table in scored), ("train", job.fold)):
                add(table, job.agent, fold, job.seed, play_policy, f"seed{job.seed}_{trained.key}", {"path": path})
        again = {"settings": self.second, "replicates": self.few(headroom)}
        for name, seed, learned, fold in self._entries():
            extra = self._lesson(name, seed, learned)
            key = content_hash([extra, code_hash(["agents"]), self.second is None])
            add("main", name, fold, seed, play_entry, key, extra | ({} if self.second is None else {"again": again}))
        players: dict[str, Callable[[str], Player]] = {
            "random": lambda test: UniformPolicy(),
            "SBS": lambda test: FixedPolicy(headroom.sbs[test][headroom.headline]),
            "SCHED": lambda test: headroom.sched[test].player,
            "per-user oracle": headroom.oracle_player,
        }
        # these were played for the headroom
        others: dict[str, Callable[[str], Player]] = {
            **{name: _always(k) for k, name in enumerate(headroom.strategies)},
            "greedy oracle": lambda test: Greedy(),
            **({"FIR": lambda test: headroom.fir_players[test]} if headroom.fir else {}),
        }
        for table in scored:
            for name, make in (players if table == "main" else {**players, **others}).items():
                for test in FOLDS:
                    add(table, name, test, 0, play_task, _player_key(make(test)), {"player": make(test)})
        plays = run_tasks(
            list(tasks.values()),
            folder=folder,
            workers=self.workers,
            title="playing policies",
            progress=not self.args.quiet,
        )
        found: dict[str, dict[str, dict[str, list[Played]]]] = {"main": {}, SECOND: {}, "train": {}}
        seconds: dict[str, list[float]] = {}

        def keep(table: str, name: str, fold: str, arrays: Arrays) -> None:
            found[table].setdefault(name, {f: [] for f in FOLDS})[fold].append(Played.from_arrays(arrays))

        for (table, name, fold, _), task in sorted(tasks.items(), key=lambda item: item[0][3]):
            arrays = dict(plays[task.key])
            if "seconds" in arrays:
                seconds.setdefault(name, []).append(float(arrays.pop("seconds")))
            more = {n.split(".", 1)[1]: arrays.pop(n) for n in [*arrays] if n.startswith(f"{SECOND}.")}
            keep(table, name, fold, arrays)
            if more:
                keep(SECOND, name, fold, more)
        for job in jobs:
            seconds.setdefault(job.agent, []).append(float((train_folder(job).result() or {})["seconds"]))
        notes = {
            "SBS": f"always {headroom.sbs_name}",
            "SCHED": headroom.sched_name,
            "per-user oracle": "best strategy for each user, cross-fitted",
            "random": "every strategy equally often",
            **{name: ROSTER[name].note for name in self.agents if name in ROSTER},
            "greedy oracle": "best expected reward right now",
            "FIR": "full-information reference: told every strategy's answer after each request",
        }
        main = found["main"]
        for k, strategy in enumerate(headroom.strategies):
            main[strategy] = {fold: [headroom.folds[fold].strategies[k]] for fold in FOLDS}
        main["greedy oracle"] = {fold: [headroom.greedy[fold]] for fold in FOLDS}
        if headroom.fir:
            main["FIR"] = {fold: [headroom.fir[fold]] for fold in FOLDS}
        return [
            PolicyPlays(
                name,
                _kind(name),
                by_fold,
                _mean(seconds.get(name)),
                notes.get(name, ""),
                found[SECOND].get(name),
                # a fixed strategy is the same in both directions: its training users are the other direction's test users
                by_fold if name in headroom.strategies else found["train"].get(name),
            )
            for name, by_fold in main.items()
        ]

    def _lesson(self, name: str, seed: int, learned: str) -> dict[str, Any]:
        return {"name": name, "train_fold": learned, "seed": seed, "requests": self.args.steps}

    def play_priced(
        self, headroom: Headroom, jobs: dict[float, list[TrainArgs]], folder: Path
    ) -> dict[float, list[PolicyPlays]]:
        """Plays what learned with other cost weights, on the same users with the same luck.

        Args:
            headroom: Of the comparison's own cost weight.
            jobs: Finished trainings by cost weight.
            folder: Where plays are kept.

        Returns:
            Plays of trained policies by cost weight; their rewards are net of it.
        """
        from metarec_gym.evaluation.leaderboard import TRAINED, PolicyPlays
        from metarec_gym.evaluation.rollout import Played
        from metarec_gym.evaluation.tasks import run_tasks

        tasks: dict[tuple[float, str, str, int], Task] = {}
        for weight, trainings in jobs.items():
            settings = replace(self.args.evaluation, cost_weight=weight)
            for job in trainings:
                trained = train_folder(job)
                fold, extra = FOLDS[1 - FOLDS.index(job.fold)], {"path": str(trained.path / "policy.safetensors")}
                key = f"seed{job.seed}_{trained.key}_cost{weight:g}"
                task = self._task(headroom, job.agent, fold, play_policy, key, extra, settings=settings)
                tasks[weight, job.agent, fold, job.seed] = task
            for name, seed, learned, fold in self._entries():
                if ROSTER[name].kind in TRAINED:
                    extra = self._lesson(name, seed, learned)
                    key = content_hash([extra, code_hash(["agents"]), weight])
                    task = self._task(headroom, name, fold, play_entry, key, extra, settings=settings)
                    tasks[weight, name, fold, seed] = task
        title = f"playing cost weights {', '.join(f'{w:g}' for w in jobs)}"
        quiet = self.args.quiet
        plays = run_tasks(list(tasks.values()), folder=folder, workers=self.workers, title=title, progress=not quiet)
        found: dict[float, dict[str, dict[str, list[Played]]]] = {weight: {} for weight in jobs}
        for (weight, name, fold, _), task in sorted(tasks.items(), key=lambda item: item[0][3]):
            arrays = {n: a for n, a in plays[task.key].items() if n != "seconds"}
            by_fold = found[weight].setdefault(name, {f: [] for f in FOLDS})
            by_fold[fold].append(Played.from_arrays(arrays))
        return {
            weight: [PolicyPlays(name, _kind(name), by_fold) for name, by_fold in by_name.items()]
            for weight, by_name in found.items()
        }


def _always(strategy: int) -> Callable[[str], Player]:
    from metarec_gym.evaluation.rollout import Fixed

    return lambda test: Fixed(strategy)


def _mean(values: list[float] | None) -> float | None:
    return None if not values else float(np.mean(values))


def _kind(name: str) -> str:
    if name in LEARNERS:
        return "learned"
    if name in ROSTER:
        return ROSTER[name].kind
    return "oracle" if name.endswith("oracle") or name == "FIR" else "fixed"


def train_command(job: TrainArgs) -> str:
    """The command that repeats a training."""
    parts = ["python", "-m", "experiments.train", "--agent", job.agent, "--world", str(job.world), "--fold", job.fold]
    parts += ["--seed", str(job.seed), "--steps", str(job.steps), "--runs", str(job.runs)]
    for flag, value in (("--horizon", job.horizon), ("--slate-size", job.slate_size)):
        parts += [] if value is None else [flag, str(value)]
    parts += ["--cost-weight", str(job.cost_weight)] if job.cost_weight else []
    parts += ["--set", *job.set] if job.set else []
    parts += ["--env", *job.env] if job.env != (SELECT_ID,) else []
    return shlex.join([*parts, "--resume"])


def _player_key(player: Any) -> str:
    facts = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in vars(player).items()}
    return content_hash({"player": type(player).__name__, **facts})
