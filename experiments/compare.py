"""The leaderboard: trains what is missing, plays every policy on users and a judge it has never met, says whether it pays.

    python -m experiments.compare --world worlds/movielens_100k --agents all

Learned policies are trained on fold A and scored on fold B, then the other way round. Finished trainings and plays are found
by content hash and not repeated; a killed run goes on where it was and ends with the same numbers. Where the world has a
judge of a second family, every choice is scored again by it: a lift whose sign it turns round is called model-dependent.

With `--cost-weights 0.1 0.3 1` every trained policy learns and plays once more with each weight on serving cost, and the hull of
quality against cost is drawn through all of them.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.compare_plays import SECOND_NOTE, Comparer, train_command
from experiments.env_settings import env_pairs
from experiments.headroom import PLAY_CODE, measure, world_line
from experiments.run_folder import RunFolder, code_hash, command_line, versions, write_atomic
from experiments.train import LEARNERS, SELECT_ID
from experiments.train import run_folder as train_folder
from metarec_gym.devices import device_of
from metarec_gym.evaluation.headroom import EvalSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from experiments.train import Args as TrainArgs
    from metarec_gym.evaluation.headroom import Headroom
    from metarec_gym.evaluation.hull import Frontier
    from metarec_gym.evaluation.leaderboard import PolicyPlays, PolicyRow
    from metarec_gym.evaluation.learning_curves import LearningCurve
    from metarec_gym.evaluation.pairs import Pair
    from metarec_gym.evaluation.verdict import Verdict


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
    seeds_of: tuple[str, ...] = ()
    """Training seeds of single agents, AGENT=N each."""
    set_of: tuple[str, ...] = ()
    """Hyperparameters of single learners, AGENT:NAME=VALUE each, e.g. `ppo:gamma=0.95`."""
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
    cost_weights: tuple[float, ...] = ()
    """More weights on serving cost that every trained policy learns and plays with, for the hull of quality against cost."""
    rescore: bool = True
    """Score everything again by a judge of another family, where the world has one."""
    seed_base: int = 0
    """First training seed."""
    workers: int = 2
    """Processes, one core each."""
    device: str = "cpu"
    """Where environments and our PPO run: cpu, cuda, or auto, which takes a GPU where there is one."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", device_of(self.device))


@dataclass(frozen=True)
class Comparison:
    """What `run` returns."""

    rows: list[PolicyRow]
    headroom: Headroom
    verdict: Verdict
    checks: dict[str, str]
    folder: Path
    pairs: list[Pair]
    frontiers: list[Frontier]


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
    from metarec_gym.evaluation.hull import hull_markdown
    from metarec_gym.evaluation.leaderboard import (
        TRAINED,
        blends_sentence,
        csv_text,
        leaderboard,
        markdown_table,
        text_table,
    )
    from metarec_gym.evaluation.pairs import paired_differences, pairs_markdown
    from metarec_gym.evaluation.report import ReportData, cautions, render
    from metarec_gym.evaluation.report.comparison import frontier_lines
    from metarec_gym.evaluation.validity.findings import read_validity
    from metarec_gym.evaluation.verdict import RULE, decide

    started = time.perf_counter()
    comparer, command = Comparer(args), command_line()
    args, world = comparer.args, comparer.world
    print(world_line(world), flush=True)
    for name, reason in comparer.skipped.items():
        print(f"note  {name} is left out: {reason}")
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
    more = sorted(set(args.cost_weights) - {args.evaluation.cost_weight})
    priced = {weight: comparer.training_args(headroom, weight) for weight in more}
    all_jobs = [*jobs, *(job for part in priced.values() for job in part)]
    facts = {
        "kind": "compare",
        "world": world.hash,
        "headroom": headroom_run.key,
        "agents": comparer.agents,
        "rescored": comparer.second is not None,
        "trainings": [train_folder(job).key for job in all_jobs],
        **({"cost_weights": more} if more else {}),
        "code": code_hash([*PLAY_CODE, "agents"]),
    }
    folder = RunFolder(args.runs, f"compare_{world.name}", facts)
    folder.begin(args, command)
    comparer.train(all_jobs)
    # beside the headroom's plays: they are of the same world, settings and code
    policies = comparer.play(headroom, jobs, headroom_run.path / "plays")
    rows = leaderboard(policies, headroom, world.tensors["costs"].numpy())
    at = headroom.headline
    pairs = paired_differences(policies, at)
    again = comparer.play_priced(headroom, priced, headroom_run.path / "plays") if more else {}
    frontiers = _frontiers(policies, again, headroom, args, world.tensors["costs"].numpy())
    learned = {row.name: row.lift_sched[at] for row in rows if row.kind in TRAINED and not row.blends}
    second = {
        RULE if row.name == "SCHED" else row.name: (row.lift_sbs[at], row.lift_sbs_second[at])
        for row in rows
        if row.lift_sbs_second and row.kind != "oracle" and row.name != "SBS" and not row.blends
    }
    verdict = decide(headroom.sbs_name, headroom.headrooms(), learned, sched=headroom.sched_name, second=second)
    verdict = replace(verdict, reason=f"{verdict.reason} {blends_sentence(rows, at)}".strip())
    checks = self_checks(policies, headroom)

    csv_path = write_atomic(folder.path / f"leaderboard_{world.name}.csv", csv_text(rows, headroom, world.name))
    table = markdown_table(rows, headroom)
    lines = [world_line(world), headroom.line(), *headroom.reference_lines(), table]
    lines += [SECOND_NOTE.format(comparer.few(headroom))] if comparer.second is not None else []
    lines += ["## Paired differences, corrected for all of them", pairs_markdown(pairs)] if pairs else []
    lines += ["## Quality and serving cost", ". ".join([*frontier_lines(frontiers), ""]).strip()]
    lines += [hull_markdown(frontiers[0])]
    text = "\n\n".join([*lines, f"**{verdict.headline}.** {verdict.reason}"]) + "\n"
    text += "".join(f"\n{caution}\n" for caution in cautions(world))
    write_atomic(folder.path / "leaderboard.md", text)
    seeds = {a: comparer.seeds(a) for a in comparer.agents}
    provenance = {
        "command": command,
        "training commands": f"{args.runs}/<run>/command.txt, for example: "
        + (train_command(jobs[0]) if jobs else "none"),
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
    # weights of a blend are no choice that could be explained
    selecting = [job for job in jobs if LEARNERS[job.agent].env == SELECT_ID]
    files = [train_folder(job).path / "policy.safetensors" for job in selecting]
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
        pairs,
        frontiers,
        _learning_curves(jobs),
    )
    report = write_atomic(folder.path / "report.html", render(data))
    write_events(folder.path, rows, headroom, {"requests": args.steps, "cost_weight": args.evaluation.cost_weight})
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
            "rows": [row_json(row, headroom) for row in rows],
            "pairs": [_pair_json(pair) for pair in pairs],
            "hull": [_frontier_json(found) for found in frontiers],
            "report": report.name,
            "leaderboard": csv_path.name,
        }
    )
    print()
    print(text_table(rows, headroom))
    print()
    if comparer.second is not None:
        print(f"note     {SECOND_NOTE.format(comparer.few(headroom))}")
    for pair in sorted((p for p in pairs if p.sure), key=lambda p: (p.role, -p.difference.estimate)):
        print(
            f"pair     {pair.policy} against {pair.against}: {pair.relative.as_percent()}, p (Holm) {pair.p_holm:.2g}"
        )
    for line in frontier_lines(frontiers):
        print(f"cost     {line}")
    for name, outcome in checks.items():
        print(f"check    {name}: {outcome}")
    print(f"verdict  {verdict.headline}. {verdict.reason}")
    for caution in cautions(world):
        print(f"note     {caution}")
    print(f"report   {report}        curves   tensorboard --logdir {args.runs}")
    return Comparison(rows, headroom, verdict, checks, folder.path, pairs, frontiers)


def _headroom_command(args: Args) -> str:
    parts = ["python", "-m", "experiments.headroom", "--world", str(args.world)]
    if args.evaluation.env:
        parts += ["--env", *env_pairs(args.evaluation.env)]
    return shlex.join(parts)


def _frontiers(
    policies: Sequence[PolicyPlays],
    priced: Mapping[float, Sequence[PolicyPlays]],
    headroom: Headroom,
    args: Args,
    costs: NDArray[Any],
) -> list[Frontier]:
    """Quality against cost of everything that could be served (no oracle), seen from SBS and from SCHED."""
    from metarec_gym.evaluation.hull import frontier, offer

    weighted = {args.evaluation.cost_weight: [p for p in policies if p.kind != "oracle"], **priced}
    offers = [
        offer(
            policy,
            costs.astype(np.float64),
            cost_weight=weight,
            window=headroom.headline,
            horizon=headroom.horizon,
        )
        for weight, part in weighted.items()
        for policy in part
    ]
    return [frontier(offers, name) for name in ("SBS", "SCHED")]


def _learning_curves(jobs: Sequence[TrainArgs]) -> list[LearningCurve]:
    from metarec_gym.evaluation.learning_curves import learning_curve, read_scalars

    found = []
    for agent in dict.fromkeys(job.agent for job in jobs):
        runs = [read_scalars(train_folder(job).path) for job in jobs if job.agent == agent]
        found.append(learning_curve(agent, runs))
    return [curve for curve in found if curve is not None]


def row_json(row: PolicyRow, headroom: Headroom) -> dict[str, Any]:
    """A row of the leaderboard as plain JSON."""
    names = ("value", "lift_sbs", "lift_sched", "agc_user", "agc_greedy", "fir_share", "lift_sbs_second", "value_train")
    windows: dict[str, Any] = {}
    for index, window in enumerate(headroom.windows):
        intervals = {name: getattr(row, name)[index] if getattr(row, name) else None for name in names}
        windows[window.name] = {name: None if i is None else i.to_json() for name, i in intervals.items()}
        windows[window.name]["iqm"] = row.iqm[index]
        windows[window.name]["model_dependent"] = row.model_dependent(index) if row.lift_sbs_second else None
    return {
        "policy": row.name,
        "kind": row.kind,
        "seeds": row.seeds,
        "windows": windows,
        "entropy_bits": row.entropy,
        "share": dict(zip(headroom.strategies, row.share.tolist(), strict=True)),
        "worst_decile": row.worst_decile,
        "cost": row.cost,
        "seconds": row.seconds,
        "p_holm_sched": row.p_holm,
    }


def _pair_json(pair: Pair) -> dict[str, Any]:
    intervals = {"difference": pair.difference.to_json(), "relative": pair.relative.to_json()}
    return {"policy": pair.policy, "against": pair.against, "role": pair.role, **intervals, "p_holm": pair.p_holm}


def _frontier_json(found: Frontier) -> dict[str, Any]:
    cheapest = found.cheapest_without_loss()
    return {
        "reference": found.reference,
        "saving_at_equal_quality": found.saving,
        "gain_at_equal_cost": found.gain,
        "cheapest_without_loss": None if cheapest is None else {"policy": cheapest[0].label, "saving": cheapest[1]},
        "hull": [
            {"policy": o.name, "cost_weight": o.weight, "cost": o.cost, "utility": o.utility, "against": i.to_json()}
            for o, i in zip(found.hull, found.against, strict=True)
        ],
    }


def write_events(folder: Path, rows: Sequence[PolicyRow], headroom: Headroom, settings: Mapping[str, Any]) -> None:
    """Writes the comparison for TensorBoard: scalars by horizon, a page of custom scalars, a line of HParams a policy.

    A repeated run replaces what an earlier one wrote.

    Args:
        folder: Of the comparison; each policy is a run of its own in `policies/`.
        rows: The leaderboard.
        headroom: Names the windows.
        settings: Columns of the HParams page beside policy and kind; JSON scalars.
    """
    from torch.utils.tensorboard.summary import hparams
    from torch.utils.tensorboard.writer import SummaryWriter

    for old in (*folder.glob("events.out.tfevents.*"), *folder.glob("policies/*/events.out.tfevents.*")):
        old.unlink()
    writer = SummaryWriter(str(folder))
    tags = {row.name: row.name.replace(" ", "_") for row in rows}
    by_kind: dict[str, list[str]] = {}
    for row in rows:
        by_kind.setdefault(row.kind, []).append(tags[row.name])
        for index, window in enumerate(headroom.windows[:-1]):
            writer.add_scalar(f"compare/utility/{tags[row.name]}", row.value[index].estimate, window.last)
            writer.add_scalar(f"compare/lift_sbs/{tags[row.name]}", row.lift_sbs[index].estimate, window.last)
    pages = {"utility": "utility a request by horizon", "lift_sbs": "lift over the single best strategy by horizon"}
    writer.add_custom_scalars(
        {
            page: {kind: ["Multiline", [f"compare/{tag}/{name}$" for name in names]] for kind, names in by_kind.items()}
            for tag, page in pages.items()
        }
    )
    writer.close()
    at = headroom.headline
    for row in rows:
        numbers = {
            "compare/utility": row.value[at].estimate,
            "compare/lift_sbs": row.lift_sbs[at].estimate,
            "compare/lift_sched": row.lift_sched[at].estimate,
            "compare/cost": row.cost,
            "compare/seconds": row.seconds or 0.0,
        }
        one = SummaryWriter(str(folder / "policies" / tags[row.name]))
        # into the policy's own file: SummaryWriter.add_hparams would open another run
        for summary in hparams({"policy": row.name, "kind": row.kind, "seeds": row.seeds, **settings}, numbers):
            one._get_file_writer().add_summary(summary)
        for tag, number in numbers.items():
            one.add_scalar(tag, number, headroom.horizon)
        one.close()


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    run(tyro.cli(Args, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))


if __name__ == "__main__":
    main()
