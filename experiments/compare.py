"""The leaderboard: trains what is missing, plays every policy on users and a judge it has never met, says whether it pays.

    python -m experiments.compare --world worlds/movielens_100k --agents all

Learned policies are trained on fold A and scored on fold B, then the other way round. Finished trainings and plays are found
by content hash and not repeated; a killed run goes on where it was and ends with the same numbers.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from experiments.headroom import PLAY_CODE, load_world, measure, world_line
from experiments.run_folder import RunFolder, code_hash, command_line, content_hash, versions, write_atomic
from experiments.train import LEARNERS
from experiments.train import Args as TrainArgs
from experiments.train import run_folder as train_folder
from metarec_gym.evaluation.headroom import FOLDS, EvalSettings

if TYPE_CHECKING:
    from metarec_gym.evaluation.headroom import Headroom
    from metarec_gym.evaluation.leaderboard import PolicyPlays, PolicyRow
    from metarec_gym.evaluation.rollout import Played, Player
    from metarec_gym.evaluation.tasks import Arrays
    from metarec_gym.evaluation.verdict import Verdict

BANDITS = {"epsilon_greedy": 1, "ucb1": 1, "thompson": 1, "linucb": 5, "population_ucb": 5}
"""Bandits and their training seeds; the first three learn inside the episode alone and have nothing to seed."""
BANDIT_ENVS = 2048
"""Users served at once while a bandit learns; LinUCB solves its models once for all of them."""
PRIOR_REQUESTS = 50_000
"""Requests to training users that tell the per-user bandits how large and how noisy rewards are."""


@dataclass(frozen=True)
class Args:
    """Compares policies on a world."""

    world: Path
    """Folder of the world."""
    agents: tuple[str, ...] = ("all",)
    """Learners and bandits to include, or `all`; fixed strategies, simple rules and oracles are always there."""
    seeds: int | None = None
    """Training seeds of each learner; its own default if absent (10 for ppo, 5 for sb3_ppo)."""
    steps: int = 300_000
    """Requests that each training run learns from, the same for every learner."""
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    """How policies are played."""
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


def play_policy(path: str, **kwargs: Any) -> Arrays:
    """Task: plays an exported policy."""
    from metarec_gym.evaluation.headroom import play_task
    from metarec_gym.policy import MlpPolicy

    return play_task(player=MlpPolicy.load(path).to(kwargs["device"]), **kwargs)


def play_bandit(name: str, train_fold: str, seed: int, requests: int, **kwargs: Any) -> Arrays:
    """Task: learns what the bandit can learn from training users, then plays it; it goes on learning in each episode."""
    from metarec_gym.evaluation.headroom import play_task

    player, seconds = make_bandit(
        name, kwargs["world"], train_fold, seed, requests, kwargs["settings"], kwargs["horizon"]
    )
    return {**play_task(player=player, **kwargs), "seconds": np.array(seconds)}


def make_bandit(
    name: str, world: Any, fold: str, seed: int, requests: int, settings: EvalSettings, horizon: int
) -> tuple[Any, float]:
    """A bandit that has learned from `requests` requests of a fold's users, and the seconds that took.

    The per-user bandits start from nothing with each user, but the scale of their beliefs (mean reward, spread over users,
    noise of one request) comes from training users: set by hand it would favour or cripple them.

    Args:
        name: One of `BANDITS`.
        world: A World or its folder.
        fold: Whose users to learn from.
        seed: Training seed.
        requests: Budget.
        settings: Slate size and cost weight.
        horizon: Requests an episode.

    Returns:
        The bandit and the seconds of learning.
    """
    from agents import bandits
    from metarec_gym.envs.vector_env import MetaRecVectorEnv
    from metarec_gym.seeding import stream

    env = MetaRecVectorEnv(
        BANDIT_ENVS,
        world=world,
        fold=fold,
        horizon=horizon,
        slate_size=settings.slate_size,
        cost_weight=settings.cost_weight,
        output="torch",
        autoreset_mode="SameStep",
    )
    k, draw_seed = env.world.n_strategies, stream(seed, "bandit", name, fold)
    started = time.perf_counter()
    if name == "linucb":
        player: Any = bandits.LinUcb(k, int(np.prod(env.single_observation_space.shape or ()))).learn(
            env, requests, seed=draw_seed
        )
    elif name == "population_ucb":
        player = bandits.PopulationUcb(k).learn(env, requests, seed=draw_seed)
    elif name == "epsilon_greedy":
        player = bandits.EpsilonGreedy(k)
    else:
        prior = bandits.PopulationUcb(k).learn(env, min(requests, PRIOR_REQUESTS), seed=draw_seed)
        noise_std = prior.noise_var**0.5
        if name == "ucb1":
            # sub-Gaussian form of the bound: sigma * sqrt(2 ln t / n)
            player = bandits.Ucb1(k, reward_range=noise_std)
        else:
            spread = float(prior.prior_cov.diagonal().mean()) ** 0.5
            mean = float(prior.prior_mean.mean())
            player = bandits.GaussianThompson(k, draw_seed, prior_mean=mean, prior_std=spread, noise_std=noise_std)
    return player, time.perf_counter() - started


class _Comparer:
    def __init__(self, args: Args) -> None:
        self.args = args
        self.world = load_world(args.world)
        self.command = command_line()
        chosen = tuple(a for part in args.agents for a in part.split(",") if a)
        known = (*LEARNERS, *BANDITS)
        unknown = sorted(set(chosen) - {"all", *known})
        if unknown:
            raise ValueError(f"--agents names {unknown}; known are all, {', '.join(known)}")
        self.agents = known if "all" in chosen else chosen

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

    # ---- playing
    def play(self, headroom: Headroom, jobs: Sequence[TrainArgs], folder: Path) -> list[PolicyPlays]:
        """Plays everything on the other fold's users and gathers it by policy."""
        from metarec_gym.evaluation.headroom import play_task
        from metarec_gym.evaluation.leaderboard import PolicyPlays
        from metarec_gym.evaluation.rollout import Played
        from metarec_gym.evaluation.tasks import Task, run_tasks
        from metarec_gym.policy import FixedPolicy, UniformPolicy

        tasks: dict[tuple[str, str, int], Task] = {}

        def add(name: str, test: str, seed: int, call: Callable[..., Arrays], key: str, extra: dict[str, Any]) -> None:
            common = {
                "world": self.args.world,
                "fold": test,
                "contexts": headroom.contexts[test].tolist(),
                "windows": headroom.windows,
                "horizon": headroom.horizon,
                "noise_base": 0,
                "replicates": headroom.played,
                "settings": self.args.evaluation,
                "device": self.args.device,
            }
            # learning costs about as much as playing, request by request
            weight = len(headroom.contexts[test]) * headroom.played * headroom.horizon + extra.get("requests", 0)
            tasks[name, test, seed] = Task(f"{name}_{test}_{key}".replace(" ", "_"), call, {**common, **extra}, weight)

        for job in jobs:
            trained = train_folder(job)
            test = FOLDS[1 - FOLDS.index(job.fold)]
            path = str(trained.path / "policy.safetensors")
            add(job.agent, test, job.seed, play_policy, f"seed{job.seed}_{trained.key}", {"path": path})
        code = code_hash(["agents/bandits.py", "experiments/compare.py"])
        for name in (a for a in self.agents if a in BANDITS):
            for seed in range(min(self.args.seeds or BANDITS[name], BANDITS[name])):
                for train, test in (FOLDS, FOLDS[::-1]):
                    extra = {"name": name, "train_fold": train, "seed": self.args.seed_base + seed}
                    extra["requests"] = self.args.steps
                    add(name, test, seed, play_bandit, content_hash([extra, code]), extra)
        players: dict[str, Callable[[str], Player]] = {
            "random": lambda test: UniformPolicy(),
            "SBS": lambda test: FixedPolicy(headroom.sbs[test][headroom.headline]),
            "SCHED": lambda test: headroom.sched[test].player,
            "per-user oracle": headroom.oracle_player,
        }
        for name, make in players.items():
            for test in FOLDS:
                add(name, test, 0, play_task, _player_key(make(test)), {"player": make(test)})
        plays = run_tasks(
            list(tasks.values()),
            folder=folder,
            workers=self.workers,
            title="playing policies",
            progress=not self.args.quiet,
        )
        found: dict[str, dict[str, list[Played]]] = {}
        seconds: dict[str, list[float]] = {}
        for (name, test, _), task in sorted(tasks.items(), key=lambda item: item[0][2]):
            by_fold = found.setdefault(name, {fold: [] for fold in FOLDS})
            arrays = dict(plays[task.key])
            if "seconds" in arrays:
                seconds.setdefault(name, []).append(float(arrays.pop("seconds")))
            by_fold[test].append(Played.from_arrays(arrays))
        for job in jobs:
            seconds.setdefault(job.agent, []).append(float((train_folder(job).result() or {})["seconds"]))
        notes = {
            "SBS": f"always {headroom.sbs_name}",
            "SCHED": headroom.sched_name,
            "per-user oracle": "best strategy for each user, cross-fitted",
            "random": "every strategy equally often",
            "linucb": "linear in the observation, learned from training users",
            "population_ucb": "prior from training users, then each user's own answers",
            "epsilon_greedy": "from nothing with every user",
            "ucb1": "from nothing with every user",
            "thompson": "from nothing with every user",
            "greedy oracle": "best expected reward right now",
        }
        policies = [
            PolicyPlays(name, _kind(name), by_fold, _mean(seconds.get(name)), notes.get(name, ""))
            for name, by_fold in found.items()
        ]
        for k, strategy in enumerate(headroom.strategies):
            by_fold = {fold: [headroom.folds[fold].strategies[k]] for fold in FOLDS}
            policies.append(PolicyPlays(strategy, "fixed", by_fold))
        greedy = {fold: [headroom.greedy[fold]] for fold in FOLDS}
        policies.append(PolicyPlays("greedy oracle", "oracle", greedy, None, notes["greedy oracle"]))
        return policies


def _mean(values: list[float] | None) -> float | None:
    return None if not values else float(np.mean(values))


def _kind(name: str) -> str:
    if name in LEARNERS:
        return "learned"
    if name in BANDITS:
        return "bandit"
    return "oracle" if name.endswith("oracle") else "fixed"


def _train_command(job: TrainArgs) -> str:
    parts = ["python", "-m", "experiments.train", "--agent", job.agent, "--world", str(job.world), "--fold", job.fold]
    parts += ["--seed", str(job.seed), "--steps", str(job.steps), "--runs", str(job.runs)]
    for flag, value in (("--horizon", job.horizon), ("--slate-size", job.slate_size)):
        parts += [] if value is None else [flag, str(value)]
    parts += ["--cost-weight", str(job.cost_weight)] if job.cost_weight else []
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
    from metarec_gym.evaluation.leaderboard import TRAINED, csv_text, leaderboard, markdown_table, text_table
    from metarec_gym.evaluation.report import ReportData, cautions, render
    from metarec_gym.evaluation.verdict import decide

    started = time.perf_counter()
    comparer = _Comparer(args)
    world = comparer.world
    print(world_line(world), flush=True)
    headroom, headroom_run = measure(
        world,
        args.world,
        args.evaluation,
        runs=args.runs,
        workers=args.workers,
        device=args.device,
        progress=not args.quiet,
        command=f"python -m experiments.headroom --world {shlex.quote(str(args.world))}",
    )
    print(headroom.line(), flush=True)
    for note in headroom.notes:
        print(f"note  {note}")
    jobs = comparer.training_args(headroom)
    facts = {
        "kind": "compare",
        "world": world.hash,
        "headroom": headroom_run.key,
        "agents": comparer.agents,
        "trainings": [train_folder(job).key for job in jobs],
        "code": code_hash([*PLAY_CODE, "agents/bandits.py"]),
    }
    folder = RunFolder(args.runs, f"compare_{world.name}", facts)
    folder.begin(args, comparer.command)
    comparer.train(jobs)
    # beside the headroom's plays: they are of the same world, settings and code
    policies = comparer.play(headroom, jobs, headroom_run.path / "plays")
    rows = leaderboard(policies, headroom, world.tensors["costs"].numpy())
    at = headroom.headline
    learned = {row.name: row.lift_sched[at] for row in rows if row.kind in TRAINED}
    verdict = decide(headroom.sbs_name, headroom.headrooms(), learned, sched=headroom.sched_name)
    checks = self_checks(policies, headroom)

    csv_path = write_atomic(folder.path / f"leaderboard_{world.name}.csv", csv_text(rows, headroom, world.name))
    table = markdown_table(rows, at)
    text = f"{world_line(world)}\n\n{headroom.line()}\n\n{table}\n\n**{verdict.headline}.** {verdict.reason}\n"
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
    data = ReportData(world, headroom, rows, verdict, checks, provenance)
    report = write_atomic(folder.path / "report.html", render(data))
    _tensorboard(folder.path, rows, headroom)
    folder.finish(
        {
            "world": world.hash,
            "responses": {fold: response.hash for fold, response in world.responses.items()},
            "seed": args.seed_base,
            "device": args.device,
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
    for name, outcome in checks.items():
        print(f"check    {name}: {outcome}")
    print(f"verdict  {verdict.headline}. {verdict.reason}")
    for caution in cautions(world):
        print(f"note     {caution}")
    print(f"report   {report}        curves   tensorboard --logdir {args.runs}")
    return Comparison(rows, headroom, verdict, checks, folder.path)


def _row_json(row: PolicyRow, headroom: Headroom) -> dict[str, Any]:
    names = ("value", "lift_sbs", "lift_sched", "agc_user", "agc_greedy")
    windows = {}
    for index, window in enumerate(headroom.windows):
        intervals = {name: getattr(row, name)[index] for name in names}
        windows[window.name] = {name: None if i is None else i.to_json() for name, i in intervals.items()}
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
