"""The leaderboard: trains what is missing, plays every policy on users and a judge it has never met, says whether it pays.

    python -m experiments.compare --world worlds/movielens_100k --agents all

Learned policies are trained on fold A and scored on fold B, then the other way round. Finished trainings and plays are found
by content hash and not repeated; a killed run goes on where it was and ends with the same numbers. Where the world has a
judge of a second family, every choice is scored again by it: a lift whose sign it turns round is called model-dependent.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from agents.roster import ROSTER, pick
from experiments.env_settings import env_pairs, training_settings
from experiments.headroom import PLAY_CODE, load_world, measure, settings_of, world_line
from experiments.run_folder import RunFolder, code_hash, command_line, content_hash, versions, write_atomic
from experiments.train import LEARNERS, SELECT_ID
from experiments.train import Args as TrainArgs
from experiments.train import run_folder as train_folder
from metarec_gym.evaluation.headroom import FOLDS, EvalSettings

if TYPE_CHECKING:
    from metarec_gym.evaluation.headroom import Headroom
    from metarec_gym.evaluation.leaderboard import PolicyPlays, PolicyRow
    from metarec_gym.evaluation.rollout import Played, Player
    from metarec_gym.evaluation.tasks import Arrays
    from metarec_gym.evaluation.verdict import Verdict

RESCORE_REPLICATES = 2
"""Replicates of the main table that the second judge scores again: enough for a sign, a quarter of the time."""
TRAIN_REPLICATES = 1
"""Replicates that learned policies play on their training users, to show how much better they look there."""
SECOND = "second"
"""The judge of another family."""
SECOND_NOTE = (
    "Second judge: a response model of another family, fitted to the same users' events, scores the same choices again on {} "
    "replicates. A sure lift whose sign it turns round is model-dependent."
)


@dataclass(frozen=True)
class Args:
    """Compares policies on a world."""

    world: Path
    """Folder of the world."""
    agents: tuple[str, ...] = ("all",)
    """Names or kinds (learned, bandit, search, supervised, fixed) of agents to include, or `all`; strategies, simple rules and
    oracles are always there."""
    seeds: int | None = None
    """Training seeds of each learner; its own default if absent (10 for ppo, 5 for sb3_ppo)."""
    steps: int = 300_000
    """Requests that each training run learns from, the same for every learner."""
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    """How policies are played."""
    session_requests: int | None = None
    """Requests a session: episodes then span several sessions, lists are ranked again at the start of each (slow: think of
    --no-look). None: the whole episode is one session."""
    judge: str = "main"
    """Which of the fold's judges scores: main, second (another family), uniform or popularity (other samplers); the main one
    trains in any case."""
    env: tuple[str, ...] = ()
    """Further settings of the environment, KEY=VALUE each (JSON values), for training and playing."""
    rescore: bool = True
    """Score everything again by a judge of another family, where the world has one."""
    seed_base: int = 0
    """First training seed."""
    workers: int = 2
    """Processes, one core each."""
    device: str = "cpu"
    """Where environments and our PPO run."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quiet: bool = False
    """No progress bars."""


@dataclass(frozen=True)
class Comparison:
    """What `run` returns."""

    rows: list[PolicyRow]
    headroom: Headroom
    verdict: Verdict
    checks: dict[str, str]
    folder: Path


def load_policy(path: str) -> Any:
    """An exported policy of any kind."""
    from metarec_gym import policy

    load: Callable[[str], Any] = getattr(policy, "load_policy", policy.MlpPolicy.load)
    return load(path)


def play_policy(path: str, **kwargs: Any) -> Arrays:
    """Task: plays an exported policy."""
    from metarec_gym.evaluation.headroom import play_task

    return play_task(player=load_policy(path).to(kwargs["device"]), **kwargs)


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
    from agents.roster import ROSTER, Lesson
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
        **training_settings(settings.env),
    )
    started = time.perf_counter()
    player = ROSTER[name].learn(lesson)
    seconds = time.perf_counter() - started
    arrays = {**play_task(player=player, **kwargs), "seconds": np.array(seconds)}
    if again is not None:
        played = play_task(player=player, **{**kwargs, **again})
        arrays |= {f"{SECOND}.{field_name}": array for field_name, array in played.items()}
    return arrays


class _Comparer:
    def __init__(self, args: Args) -> None:
        self.args = args = replace(args, evaluation=settings_of(args))
        self.agents: tuple[str, ...] = ()
        self.skipped: dict[str, tuple[str, ...]] = {}
        self.world = load_world(args.world)
        self.command = command_line()
        chosen = tuple(a for part in args.agents for a in part.split(",") if a)
        for name in pick(chosen, tuple(LEARNERS)):
            missing = ROSTER[name].missing() if name in ROSTER else ()
            if missing:
                self.skipped[name] = missing
            else:
                self.agents += (name,)

    # ---- training
    def training_args(self, headroom: Headroom) -> list[TrainArgs]:
        """Every (learner, fold, seed)."""
        args, jobs = self.args, []
        for agent in (a for a in self.agents if a in LEARNERS):
            for seed in range(args.seed_base, args.seed_base + (args.seeds or LEARNERS[agent].seeds)):
                for fold in FOLDS:
                    jobs.append(
                        TrainArgs(
                            world=args.world,
                            agent=cast(Literal["ppo", "sb3_ppo"], agent),
                            fold=cast(Literal["A", "B"], fold),
                            seed=seed,
                            steps=args.steps,
                            horizon=headroom.horizon,
                            slate_size=args.evaluation.slate_size,
                            cost_weight=args.evaluation.cost_weight,
                            env=(SELECT_ID, *env_pairs(training_settings(args.evaluation.env))),
                            resume=True,
                            device=args.device if agent == "ppo" else "cpu",
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
                key=f"{job.agent}_{job.fold}_{job.seed}",
                call=train_task,
                kwargs={"args": job, "command": _train_command(job)},
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
    def play(self, headroom: Headroom, jobs: Sequence[TrainArgs], folder: Path) -> list[PolicyPlays]:
        """Plays everything on the other fold's users and gathers it by policy."""
        from metarec_gym.evaluation.headroom import env_key, play_task
        from metarec_gym.evaluation.leaderboard import PolicyPlays
        from metarec_gym.evaluation.rollout import Greedy, Played, effort_of
        from metarec_gym.evaluation.tasks import Task, run_tasks
        from metarec_gym.policy import FixedPolicy, UniformPolicy

        tasks: dict[tuple[str, str, str, int], Task] = {}
        few = min(RESCORE_REPLICATES, headroom.played)
        again = {"settings": self.second, "replicates": few}
        trained_with = training_settings(self.args.evaluation.env)
        by_table = {
            "main": self.args.evaluation,
            SECOND: self.second,
            "train": replace(self.args.evaluation, env=trained_with),
        }

        def add(
            table: str, name: str, fold: str, seed: int, call: Callable[..., Arrays], key: str, extra: dict[str, Any]
        ) -> None:
            """`table` is "main", "second" (the same by the second judge) or "train" (on training users)."""
            common: dict[str, Any] = {
                "world": self.args.world,
                "fold": fold,
                "contexts": headroom.contexts[fold].tolist(),
                "windows": headroom.windows,
                "horizon": headroom.horizon,
                "noise_base": 0,
                "replicates": {"main": headroom.played, SECOND: few, "train": TRAIN_REPLICATES}[table],
                "settings": by_table[table],
                "device": self.args.device,
            }
            # learning costs about as much as playing, request by request
            effort = effort_of(extra["player"], self.world.n_strategies) if "player" in extra else 1
            weight = len(common["contexts"]) * common["replicates"] * headroom.horizon * effort
            weight += extra.get("requests", 0)
            title = f"{name}_{fold}_{key}".replace(" ", "_") + ("" if table == "main" else f"_{table}")
            tasks[table, name, fold, seed] = Task(
                title + env_key(common["settings"].env), call, {**common, **extra}, weight
            )

        scored = ("main",) if self.second is None else ("main", SECOND)
        for job in jobs:
            trained = train_folder(job)
            test = FOLDS[1 - FOLDS.index(job.fold)]
            path = str(trained.path / "policy.safetensors")
            for table, fold in (*((table, test) for table in scored), ("train", job.fold)):
                add(table, job.agent, fold, job.seed, play_policy, f"seed{job.seed}_{trained.key}", {"path": path})
        code = code_hash(["agents"])
        for name in (a for a in self.agents if a in ROSTER):
            for seed in range(min(self.args.seeds or ROSTER[name].seeds, ROSTER[name].seeds)):
                for train, test in (FOLDS, FOLDS[::-1]):
                    extra = {"name": name, "train_fold": train, "seed": self.args.seed_base + seed}
                    extra["requests"] = self.args.steps
                    key = content_hash([extra, code, self.second is None])
                    if self.second is not None:
                        extra["again"] = again
                    add("main", name, test, seed, play_entry, key, extra)
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


def _train_command(job: TrainArgs) -> str:
    parts = ["python", "-m", "experiments.train", "--agent", job.agent, "--world", str(job.world), "--fold", job.fold]
    parts += ["--seed", str(job.seed), "--steps", str(job.steps), "--runs", str(job.runs)]
    for flag, value in (("--horizon", job.horizon), ("--slate-size", job.slate_size)):
        parts += [] if value is None else [flag, str(value)]
    parts += ["--cost-weight", str(job.cost_weight)] if job.cost_weight else []
    parts += ["--env", *job.env] if job.env != (SELECT_ID,) else []
    return shlex.join([*parts, "--resume"])


def _player_key(player: Any) -> str:
    facts = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in vars(player).items()}
    return content_hash({"player": type(player).__name__, **facts})


def self_checks(policies: Sequence[PolicyPlays], headroom: Headroom) -> dict[str, str]:
    """Facts that must hold exactly, measured through the same code as every other row.

    Args:
        policies: The plays, SBS and the per-user oracle among them.
        headroom: What they are paired with.

    Returns:
        Result in words by check.
    """
    at = headroom.headline
    by_name = {
        policy.name: policy.users()[0, :, at] for policy in policies if policy.name in ("SBS", "per-user oracle")
    }
    sbs = headroom.pooled(headroom.sbs_value())[:, at]
    oracle = headroom.pooled(headroom.oracle_value())[:, at]
    gap = float((oracle - sbs).mean())
    gains = {name: float((values - sbs).mean()) for name, values in by_name.items()}
    agc = {name: "no gap to close" if gap == 0.0 else f"{gain / gap:.12g}" for name, gain in gains.items()}
    return {
        "SBS played as a policy: AGC must be 0": agc["SBS"] if gap != 0.0 else f"difference {gains['SBS']:g}",
        "stored oracle choices replayed on the scoring replicates: AGC must be 1": agc["per-user oracle"],
        "plug-in minus cross-fitted oracle, share of SBS": f"{headroom.optimism:.3%}",
    }


def run(args: Args) -> Comparison:
    """Trains, plays, prints and writes everything.

    Args:
        args: The command line.

    Returns:
        The comparison.
    """
    from metarec_gym.evaluation.explain.explanation import read_explanation
    from metarec_gym.evaluation.leaderboard import TRAINED, csv_text, leaderboard, markdown_table, text_table
    from metarec_gym.evaluation.report import ReportData, cautions, render
    from metarec_gym.evaluation.validity.findings import read_validity
    from metarec_gym.evaluation.verdict import RULE, decide

    started = time.perf_counter()
    comparer = _Comparer(args)
    args, world = comparer.args, comparer.world
    print(world_line(world), flush=True)
    for name, missing in comparer.skipped.items():
        print(f"note  {name} is left out: it needs {', '.join(missing)}, which is not installed")
    headroom, headroom_run = measure(
        world,
        args.world,
        args.evaluation,
        runs=args.runs,
        workers=args.workers,
        device=args.device,
        progress=not args.quiet,
        command=_headroom_command(args),
    )
    print(headroom.line(), flush=True)
    for line in headroom.reference_lines():
        print(line)
    for note in headroom.notes:
        print(f"note  {note}")
    jobs = comparer.training_args(headroom)
    facts = {
        "kind": "compare",
        "world": world.hash,
        "headroom": headroom_run.key,
        "agents": comparer.agents,
        "rescored": comparer.second is not None,
        "trainings": [train_folder(job).key for job in jobs],
        "code": code_hash([*PLAY_CODE, "agents"]),
    }
    folder = RunFolder(args.runs, f"compare_{world.name}", facts)
    folder.begin(args, comparer.command)
    comparer.train(jobs)
    # beside the headroom's plays: they are of the same world, settings and code
    policies = comparer.play(headroom, jobs, headroom_run.path / "plays")
    rows = leaderboard(policies, headroom, world.tensors["costs"].numpy())
    at = headroom.headline
    learned = {row.name: row.lift_sched[at] for row in rows if row.kind in TRAINED}
    second = {
        RULE if row.name == "SCHED" else row.name: (row.lift_sbs[at], row.lift_sbs_second[at])
        for row in rows
        if row.lift_sbs_second and row.kind != "oracle" and row.name != "SBS"
    }
    verdict = decide(headroom.sbs_name, headroom.headrooms(), learned, sched=headroom.sched_name, second=second)
    checks = self_checks(policies, headroom)

    csv_path = write_atomic(folder.path / f"leaderboard_{world.name}.csv", csv_text(rows, headroom, world.name))
    table = markdown_table(rows, at)
    lines = [world_line(world), headroom.line(), *headroom.reference_lines(), table]
    lines += [SECOND_NOTE.format(min(RESCORE_REPLICATES, headroom.played))] if comparer.second is not None else []
    text = "\n\n".join([*lines, f"**{verdict.headline}.** {verdict.reason}"]) + "\n"
    text += "".join(f"\n{caution}\n" for caution in cautions(world))
    write_atomic(folder.path / "leaderboard.md", text)
    seeds = {a: args.seeds or LEARNERS[a].seeds for a in comparer.agents if a in LEARNERS}
    provenance = {
        "command": comparer.command,
        "training commands": f"{args.runs}/<run>/command.txt, for example: "
        + (_train_command(jobs[0]) if jobs else "none"),
        "training seeds": ", ".join(f"{a}: {args.seed_base}..{args.seed_base + n - 1}" for a, n in seeds.items())
        or "none",
        "requests a training": f"{args.steps:,}",
        "evaluation": str(args.evaluation),
        "world hash": world.hash,
        "judge hashes": ", ".join(f"{fold} {r.hash}" for fold, r in sorted(world.responses.items())),
        "code hash": str(facts["code"]),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        "device": args.device,
    }
    files = [train_folder(job).path / "policy.safetensors" for job in jobs]
    explained = (read_explanation(file, world.hash) for file in files)
    data = ReportData(
        world,
        headroom,
        rows,
        verdict,
        checks,
        provenance,
        read_validity(args.world, world.hash),
        next((found for found in explained if found is not None), None),
        f"python -m experiments.explain --world {args.world} --policy {files[0]}" if files else "",
    )
    report = write_atomic(folder.path / "report.html", render(data))
    _tensorboard(folder.path, rows, headroom)
    folder.finish(
        {
            "world": world.hash,
            "responses": {fold: response.hash for fold, response in world.responses.items()},
            "seed": args.seed_base,
            "device": args.device,
            "env": args.evaluation.env,
            "rescored": comparer.second is not None,
            "seconds": time.perf_counter() - started,
            "headroom": headroom.to_json(),
            "verdict": vars(verdict),
            "cautions": cautions(world),
            "checks": checks,
            "rows": [_row_json(row, headroom) for row in rows],
            "report": report.name,
            "leaderboard": csv_path.name,
        }
    )
    print()
    print(text_table(rows, at))
    print()
    if comparer.second is not None:
        print(f"note     {SECOND_NOTE.format(min(RESCORE_REPLICATES, headroom.played))}")
    for name, outcome in checks.items():
        print(f"check    {name}: {outcome}")
    print(f"verdict  {verdict.headline}. {verdict.reason}")
    for caution in cautions(world):
        print(f"note     {caution}")
    print(f"report   {report}        curves   tensorboard --logdir {args.runs}")
    return Comparison(rows, headroom, verdict, checks, folder.path)


def _headroom_command(args: Args) -> str:
    parts = ["python", "-m", "experiments.headroom", "--world", str(args.world)]
    if args.evaluation.env:
        parts += ["--env", *env_pairs(args.evaluation.env)]
    return shlex.join(parts)


def _row_json(row: PolicyRow, headroom: Headroom) -> dict[str, Any]:
    names = ("value", "lift_sbs", "lift_sched", "agc_user", "agc_greedy", "lift_sbs_second", "value_train")
    windows: dict[str, Any] = {}
    for index, window in enumerate(headroom.windows):
        intervals = {name: getattr(row, name)[index] if getattr(row, name) else None for name in names}
        windows[window.name] = {name: None if i is None else i.to_json() for name, i in intervals.items()}
        windows[window.name]["model_dependent"] = row.model_dependent(index) if row.lift_sbs_second else None
    return {
        "policy": row.name,
        "kind": row.kind,
        "seeds": row.seeds,
        "windows": windows,
        "entropy_bits": row.entropy,
        "worst_decile": row.worst_decile,
        "cost": row.cost,
        "seconds": row.seconds,
        "p_holm_sched": row.p_holm,
    }


def _tensorboard(folder: Path, rows: Sequence[PolicyRow], headroom: Headroom) -> None:
    """Final value of every policy as scalars, in one events file that a repeated run replaces."""
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(folder))
    for row in rows:
        for index, window in enumerate(headroom.windows[:-1]):
            tag = row.name.replace(" ", "_")
            writer.add_scalar(f"compare/utility/{tag}", row.value[index].estimate, window.last)
            writer.add_scalar(f"compare/lift_sbs/{tag}", row.lift_sbs[index].estimate, window.last)
    writer.close()


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    run(tyro.cli(Args, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))


if __name__ == "__main__":
    main()
