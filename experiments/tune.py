"""Which way of steering a recommender's training is best at an equal budget of training runs, on initialisations nobody tuned on?

    python -m experiments.tune --logs envs_data/movielens_100k envs_data/deskdrop

Every method gets the same number of training runs on the training initialisations; what it found is played on held-out ones,
the same for all. Unit of the intervals: the initialisation, and the method's seed where it has one. A killed run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.run_folder import RunFolder, code_hash, command_line, jsonable, versions, write_atomic

if TYPE_CHECKING:
    from metarec_gym.evaluation.intervals import Interval

TUNE_CODE = (
    "agents/tuning.py",
    "metarec_gym/envs/batched.py",
    "metarec_gym/envs/tune.py",
    "metarec_gym/envs/tune_training.py",
    "metarec_gym/seeding.py",
)


@dataclass(frozen=True)
class Args:
    """Compares ways of steering training runs."""

    logs: tuple[Path, ...] = (Path("envs_data/movielens_100k"), Path("envs_data/deskdrop"))
    """Folders of prepared logs or worlds."""
    methods: tuple[str, ...] = ()
    """Names in agents.tuning.METHODS; all that can run if empty."""
    budget: int = 512
    """Training runs for each method and seed."""
    seeds: int = 5
    """Seeds of each method that searches or learns."""
    runs: int = 256
    """Held-out training runs that each result is played on."""
    metric: str = "ranking"
    """`ranking` or `log_loss`."""
    cost_weight: float = 0.0
    """Reward lost by a whole run at the dearest hardness."""
    horizon: int = 20
    """Training steps of a run."""
    workers: int = 2
    """Processes, one core each."""
    folder: Path = Path("runs")
    """Folder of all runs."""
    quiet: bool = False
    """Only the tables."""


def one_task(log: str, method: str, seed: int, settings: dict[str, Any], budget: int, runs: int) -> dict[str, Any]:
    """One method with one seed on one log: search on the training split, then the returns on the held-out one."""
    import torch

    from agents.tuning import METHODS, evaluate, make_runs
    from metarec_gym.seeding import stream

    torch.set_num_threads(1)
    started = time.perf_counter()
    steering = METHODS[method](make_runs(log, **settings), budget, stream(seed, "tune", method))
    searched = time.perf_counter() - started
    returns = evaluate(make_runs(log, split="test", **settings), steering, runs, seed=0)
    return {"returns": returns.tolist(), "search_seconds": searched}


def run(args: Args) -> dict[str, Any]:
    """Plays what is missing and prints a table for each log.

    Args:
        args: The command line.

    Returns:
        The result row.
    """
    from agents.tuning import FREE, METHODS, has_optuna

    methods = args.methods or tuple(name for name in METHODS if name != "search_optuna" or has_optuna())
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ValueError(f"there are no methods {unknown}; there are {sorted(METHODS)}")
    settings = {"metric": args.metric, "cost_weight": args.cost_weight, "horizon": args.horizon}
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    missing = []
    for method in methods:
        for log in map(str, args.logs):
            for seed in range(1 if method in FREE else args.seeds):
                task = (log, method, seed, settings, args.budget, args.runs)
                folder = _folder(args, task)
                done = folder.result()
                if done is None:
                    missing.append((task, folder))
                else:
                    found[log, method, seed] = done
    for count, (task, folder, result) in enumerate(_played(missing, args.workers), 1):
        folder.begin({"task": task})
        found[task[:3]] = folder.finish(result)
        if not args.quiet:
            print(f"{count}/{len(missing)}  {Path(task[0]).name}  {task[1]}  seed {task[2]}", flush=True)
    rows = {str(log): _table(str(log), methods, found, args) for log in args.logs}
    summary = RunFolder(args.folder, "tune", {"args": args, "methods": methods, "code": code_hash(TUNE_CODE)})
    summary.begin(args)
    write_atomic(summary.path / "tune.md", markdown(rows, args))
    return summary.finish({"logs": rows})


def markdown(logs: Mapping[str, Mapping[str, Any]], args: Args) -> str:
    """The tables as a page, with a sentence a log on whether steering beat the usual schedules.

    Args:
        logs: Rows of each log by method, as the result has them: `gain` and `less_<reference>`, intervals as JSON.
        args: The command line.
    """

    def cell(row: Mapping[str, float] | None) -> str:
        return "" if row is None else f"{row['estimate']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"

    lines = [
        "# Steering a recommender's training",
        "",
        f"Gain of the held-out metric ({args.metric}) over a run of {args.horizon} steps, {args.runs} held-out initialisations, "
        f"{args.seeds} seeds of each method that searches or learns, {args.budget} training runs each; 95 % intervals.",
        f"Command: `{command_line()}`. Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(versions().items())) + ".",
    ]
    usual = ("constant_default", "cosine_default")
    for log, rows in logs.items():
        references = [name for name in (*usual, "search_cosine") if name in rows]
        head = ["method", "gain", *(f"less {name}" for name in references)]
        lines += ["", f"## {Path(log).name}", "", _line(head), _line(["---"] * len(head))]
        lines += [
            _line([name, cell(row["gain"]), *(cell(row.get(f"less_{other}")) for other in references)])
            for name, row in rows.items()
        ]
        beaten = [
            name
            for name, row in rows.items()
            if all(f"less_{other}" in row and row[f"less_{other}"]["low"] > 0 for other in usual)
        ]
        surely = "Surely better than both usual schedules: " + ", ".join(beaten) + "."
        lines += ["", surely if beaten else "Nothing surely beats both usual schedules."]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _played(missing: list[tuple[Any, RunFolder]], workers: int) -> Iterator[tuple[Any, RunFolder, dict[str, Any]]]:
    """Tasks as they finish, in this process or in others."""
    if workers == 1:
        for task, folder in missing:
            yield task, folder, one_task(*task)
        return
    with ProcessPoolExecutor(max_workers=workers) as pool:
        futures = {pool.submit(one_task, *task): (task, folder) for task, folder in missing}
        for future in as_completed(futures):
            yield *futures[future], future.result()


def _folder(args: Args, task: tuple[Any, ...]) -> RunFolder:
    facts = {"task": jsonable(task), "log": _log_hash(Path(task[0])), "code": code_hash(TUNE_CODE)}
    return RunFolder(args.folder / "tune", f"{Path(task[0]).name}_{task[1]}_seed{task[2]}", facts)


def _log_hash(folder: Path) -> str:
    import json

    for name in ("world.json", "log.json"):
        if (folder / name).is_file():
            return str(json.loads((folder / name).read_text())["hash"])
    raise FileNotFoundError(f"no prepared log and no world in {folder}; run: python -m envs_data.{folder.name}.prepare")


def _table(
    log: str, methods: tuple[str, ...], found: dict[tuple[str, str, int], dict[str, Any]], args: Args
) -> dict[str, Any]:
    """Prints one log's methods with their gain and its difference to the two usual schedules; returns the numbers."""
    import numpy as np

    from agents.tuning import FREE
    from metarec_gym.evaluation.intervals import mean_interval

    def returns(method: str) -> Any:
        seeds = 1 if method in FREE else args.seeds
        matrix = np.array([found[log, method, seed]["returns"] for seed in range(seeds)])
        return matrix[0] if seeds == 1 else matrix

    print(
        f"\n{Path(log).name}: gain of the held-out metric ({args.metric}) over a run, {args.runs} held-out initialisations,"
    )
    print(f"{args.seeds} seeds with {args.budget} training runs each; 95 % intervals")
    # the two usual schedules, and the one that the same budget finds
    references = [name for name in (*FREE, "search_cosine") if name in methods]
    print(f"  {'method':18s} {'gain':26s} " + " ".join(f"{'less ' + name:26s}" for name in references))
    rows: dict[str, Any] = {}
    for method in methods:
        own = returns(method)
        intervals: dict[str, Interval] = {"gain": mean_interval(own)}
        for reference in references:
            if reference != method:
                intervals[f"less_{reference}"] = mean_interval(own - returns(reference))
        keys = ("gain", *(f"less_{reference}" for reference in references))
        texts = (f"{intervals[key].as_number(4) if key in intervals else '':26s}" for key in keys)
        print(f"  {method:18s} " + " ".join(texts))
        rows[method] = {name: interval.to_json() for name, interval in intervals.items()}
    return rows


def main() -> None:
    """The command line."""
    import tyro

    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
