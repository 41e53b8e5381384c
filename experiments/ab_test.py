"""An A/B test of selection policies: in a world, or of a company's own exposure table.

    python -m experiments.ab_test --world worlds/movielens_100k --policies popular sasrec runs/ppo_A_seed0_x/policy.safetensors
    python -m experiments.ab_test --exposures log.parquet --control old --metrics ctr=click/shown bought=any:purchase

In a world the users of the test fold are assigned by a salted hash, served by the control policy for some requests (the
pre-period) and then by their arm's policy. Before that the test is planned on users of the other fold. Plays are stored: a
killed run goes on where it was. The report comes as one HTML file and as Markdown; numbers are in result.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.ab_world import CODE, Args, WorldTest, metrics_of, weights_of
from experiments.run_folder import RunFolder, code_hash, command_line, write_atomic

if TYPE_CHECKING:
    import pandas as pd

    from metarec_gym.evaluation.ab_test.analysis import Analysis
    from metarec_gym.evaluation.ab_test.interleaving import Sensitivity
    from metarec_gym.evaluation.ab_test.monitoring import Path as EffectPath
    from metarec_gym.evaluation.ab_test.page import Planned, TestReport
    from metarec_gym.evaluation.ab_test.table import Metric
    from metarec_gym.evaluation.intervals import Interval
    from metarec_gym.evaluation.tasks import Arrays

CURVE_POINTS = 200
"""Points of a curve in TensorBoard."""


# ---- analysing


def planned(
    past: pd.DataFrame, metrics: Sequence[Metric], weights: Mapping[str, float], users: int, args: Args
) -> dict[str, Planned]:
    """The plan of every goal, from one row a user of the past."""
    from metarec_gym.evaluation.ab_test.assignment import check_weights
    from metarec_gym.evaluation.ab_test.page import Planned
    from metarec_gym.evaluation.ab_test.planning import Planner, a_a_p_values, users_needed
    from metarec_gym.evaluation.ab_test.table import metric_columns

    shares = list(check_weights(weights).values())
    goals = [metric for metric in metrics if metric.margin is None]
    level = 0.05 / (len(goals) * (len(shares) - 1))
    # the smallest treated arm decides
    sizes = (round(users * shares[0]), round(users * min(shares[1:])))
    out = {}
    for metric in goals:
        columns, cuped = metric_columns(past, metric), metric.covariate is not None
        plain = Planner(columns, sizes, level=level, seed=args.seed).plan(args.power)
        with_it = Planner(columns, sizes, cuped=True, level=level, seed=args.seed).plan(args.power) if cuped else plain
        need = users_needed(columns, args.smallest_lift, power=args.power, cuped=cuped, level=level, seed=args.seed)
        p_values = a_a_p_values(columns, cuped=cuped, seed=args.seed)
        alarms = float((p_values < 0.05).mean())
        out[metric.name] = Planned(with_it, plain if cuped else None, need, args.smallest_lift, alarms, len(p_values))
    return out


def watched(
    users: pd.DataFrame, metrics: Sequence[Metric], control: str, weights: Mapping[str, float], arms: Sequence[str]
) -> tuple[str, dict[str, EffectPath], float | None, dict[str, float]]:
    """Monitoring of the first goal: its name, paths by arm, sample ratio and conversion counts (last of their p-values)."""
    from metarec_gym.evaluation.ab_test.monitoring import event_path, monitor, sample_ratio_path

    goals = [metric for metric in metrics if metric.margin is None]
    if "first_exposure" not in users:
        return goals[0].name, {}, None, {}
    paths = {arm: monitor(users, goals[0], control=control, arm=arm) for arm in arms}
    converted = next((metric for metric in goals if metric.any), None)
    counts: dict[str, float] = {}
    for arm in arms if converted is not None else ():
        pair = users[users["arm"].isin([control, arm])]
        event = pair[converted.numerator].to_numpy() > 0  # type: ignore[union-attr]
        if event.any():
            counts[arm] = float(event_path(pair, event, {control: weights[control], arm: weights[arm]})[-1])
    return goals[0].name, paths, float(sample_ratio_path(users, weights)[-1]), counts


def _interleaved(
    users: pd.DataFrame, results: Mapping[str, Arrays], control: str, seed: int
) -> dict[str, tuple[Interval, Sensitivity]]:
    from metarec_gym.evaluation.ab_test.interleaving import Preferences, sensitivity
    from metarec_gym.evaluation.ab_test.playing import REWARD

    out = {}
    for arm, arrays in results.items():
        found = Preferences(arrays["credit"], arrays["places"])
        one, two = (users.loc[users["arm"] == name, REWARD].to_numpy(dtype=np.float64) for name in (control, arm))
        out[arm] = (found.interval(), sensitivity(found.preference, one, two, seed=seed))
    return out


def run(args: Args) -> dict[str, Any]:
    """Plays (or reads), analyses, prints and writes everything.

    Args:
        args: The command line.

    Returns:
        The result row.
    """
    from metarec_gym.evaluation.ab_test.analysis import tea_tasting

    # before anything is played
    tea_tasting()
    return _run_exposures(args) if args.exposures is not None else _run_world(args)


def _run_exposures(args: Args) -> dict[str, Any]:
    from metarec_gym.evaluation.ab_test.table import read_exposures

    assert args.exposures is not None
    table = read_exposures(args.exposures)
    arms = sorted(table["arm"].unique())
    control = args.control
    if control is None or control not in arms:
        raise ValueError(f"--control is {control!r}; name one of the table's arms: {arms}")
    weights = weights_of(args, [control, *(arm for arm in arms if arm != control)])
    facts = {
        "kind": "ab_test exposures",
        "sha256": hashlib.sha256(args.exposures.read_bytes()).hexdigest(),
        "control": control,
        "weights": weights,
        "metrics": args.metrics,
        "guardrails": args.guardrails,
        "code": code_hash(CODE),
    }
    folder = RunFolder(args.runs, f"ab_test_{args.exposures.stem}", facts)
    folder.begin(args)
    source = {"exposure table": f"{args.exposures.name}, sha256 {facts['sha256']}", "traffic": str(weights)}
    return _report(args, folder, table, metrics_of(args, None), weights, source, f"A/B test {args.exposures.stem}")


def _run_world(args: Args) -> dict[str, Any]:
    test = WorldTest(args)
    world = test.world
    folder = RunFolder(args.runs, f"ab_test_{world.name}", test.facts)
    done = folder.result()
    if done is not None:
        print(f"found finished: {folder.path}\n\n{(folder.path / 'report.md').read_text()}")
        return done
    folder.begin(args)
    past, table, interleaved = test.play(folder.path / "plays")
    partial = folder.path / "exposures.parquet.partial"
    table.to_parquet(partial)
    partial.replace(folder.path / "exposures.parquet")
    visits = f"{args.visits} visit" + ("s" if args.visits > 1 else "")
    source = {
        "world": f"{world.name}, hash {world.hash}, judge {world.judge(args.fold, args.judge).hash}",
        "users": f"fold {args.fold}, {visits} each; planned on fold {test.past_fold}",
        "requests": f"{test.pre} before (served by the control), {test.horizon} in the test",
        "assignment": f"BLAKE2b of salt {args.salt!r} and visitor, traffic {test.weights}",
        "seed": str(args.seed),
    }
    notes = [
        "Users are simulated: what is shown holds for the world's users and its judge. Visitors do not influence each other, and "
        "no policy learns from another arm's visitors; in a real service check both."
    ]
    if test.pre:
        notes.append(
            f"The test begins after {test.pre} requests by the control in the same visit: what was shown then is not shown "
            "again, and the effect is that of switching there. --pre-requests 0 tests from the first request on, without a "
            "pre-period."
        )
    if args.visits > 1:
        notes.append(
            f"Each user came {args.visits} times with new luck: intervals are about these users, not about others."
        )
    more: dict[str, Any] = {"past": past, "interleaved": interleaved, "notes": notes}
    if args.adaptive:
        more["adaptive"] = test.adaptive()
        for name, found in more["adaptive"].items():
            sure, users = "surely best" if found["sure"] else "best so far", found["users"]
            notes.append(
                f"Allocation by {name}: {found['best']} {sure} after {sum(users.values()):,} visitors ({users})."
            )
    return _report(args, folder, table, test.metrics, test.weights, source, f"A/B test in {world.name}", **more)


def _report(
    args: Args,
    folder: RunFolder,
    table: pd.DataFrame,
    metrics: Sequence[Metric],
    weights: Mapping[str, float],
    source: Mapping[str, str],
    title: str,
    *,
    past: pd.DataFrame | None = None,
    interleaved: Mapping[str, Arrays] | None = None,
    notes: Sequence[str] = (),
    adaptive: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Analyses a table of exposures and writes the report, the result and the curves."""
    from metarec_gym.evaluation.ab_test.analysis import analyse
    from metarec_gym.evaluation.ab_test.page import TestReport, fragment, markdown
    from metarec_gym.evaluation.ab_test.playing import REWARD
    from metarec_gym.evaluation.ab_test.table import Metric, user_table
    from metarec_gym.evaluation.report.parts import document

    started = time.perf_counter()
    metrics = [metric.with_covariate(table.columns) for metric in metrics]
    # interleaving is compared on the reward, whatever the goals are
    also = [] if interleaved is None else [Metric(REWARD, REWARD)]
    users = user_table(table, [*metrics, *also])
    control = next(iter(weights))
    found = analyse(users, metrics, control=control, weights=weights)
    plans = {} if past is None else planned(user_table(past, metrics), metrics, weights, len(users), args)
    report = TestReport(title, {"command": command_line(), **source}, found, plans, notes=notes)
    if found.stopped is None:
        name, paths, ratio, counts = watched(users, metrics, control, weights, found.arms)
        report = dataclasses.replace(
            report,
            paths=paths,
            monitored=name,
            ratio_path=ratio,
            conversions=counts,
            interleaved=_interleaved(users, interleaved or {}, control, args.seed),
        )
    text = markdown(report)
    write_atomic(folder.path / "report.md", text)
    write_atomic(folder.path / "report.html", document(title, [fragment(report)]))
    _curves(folder.path, report)
    row = folder.finish(
        {**_json(report), "adaptive": adaptive, "seed": args.seed, "analysis_seconds": time.perf_counter() - started}
    )
    print(text)
    print(f"report   {folder.path / 'report.html'}     curves   tensorboard --logdir {args.runs}")
    return row


def _json(report: TestReport) -> dict[str, Any]:
    """The report's numbers; paths by their ends."""
    found: Analysis = report.analysis
    ends = {
        arm: {
            "users": path.users[-1],
            "effect": path.effect[-1],
            "low": path.low[-1],
            "high": path.high[-1],
            "p_value": path.p_value[-1],
            "decided_at": path.decided_at(),
        }
        for arm, path in report.paths.items()
    }
    return {
        "control": found.control,
        "sample_ratio": {**dataclasses.asdict(found.ratio), "broken": found.ratio.broken},
        "stopped": found.stopped,
        "verdicts": {arm: found.verdict(arm) for arm in found.arms},
        "effects": [dataclasses.asdict(e) for e in found.effects],
        "guardrails": [dataclasses.asdict(g) for g in found.guardrails],
        "segments": [dataclasses.asdict(e) for e in found.segments],
        "planned": {name: dataclasses.asdict(p) for name, p in report.planned.items()},
        "monitored": report.monitored,
        "monitoring": ends,
        "sample_ratio_always_valid_p": report.ratio_path,
        "conversions_always_valid_p": dict(report.conversions),
        "interleaved": {
            arm: {"preference": p.to_json(), "sensitivity": dataclasses.asdict(s)}
            for arm, (p, s) in report.interleaved.items()
        },
        "notes": list(report.notes),
    }


def _curves(folder: Path, report: TestReport) -> None:
    """Confidence sequences as scalars over users, in one events file that a repeated run replaces."""
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(folder))
    for arm, path in report.paths.items():
        seen = np.flatnonzero(np.isfinite(path.effect))
        for place in seen[:: max(1, len(seen) // CURVE_POINTS)].tolist():
            for name in ("effect", "low", "high"):
                tag = f"ab_test/{report.monitored}/{arm.replace(' ', '_')}/{name}"
                writer.add_scalar(tag, float(getattr(path, name)[place]), int(path.users[place]))
    writer.close()


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
