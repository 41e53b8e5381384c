"""How far may a world be believed? Measured on users that its judges have not seen, and said in plain words.

    python -m experiments.validity --world worlds/movielens_100k

Compares the judges with simple rules and with the log: log-loss, calibration, rates, session lengths and return times, the
posterior predictive check, the order of the strategies, whether a classifier can tell simulated sessions from real ones; then
plays the strategies against other judges and settings that the log cannot tell. Writes `validity.json` beside the world, and
`result.json`, `validity.html` and `validity.md` in the run's folder. A killed run goes on where it was; a finished one is found
again.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.headroom import PLAY_CODE, load_world, world_line
from experiments.run_folder import ROOT, RunFolder, code_hash, jsonable, write_atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from metarec_gym.data.dataset import Dataset
    from metarec_gym.evaluation.headroom import EvalSettings
    from metarec_gym.world import World

CODE = (
    *PLAY_CODE,
    "metarec_gym/evaluation/references.py",
    "metarec_gym/evaluation/validity/checks.py",
    "metarec_gym/evaluation/validity/sample.py",
    "metarec_gym/evaluation/validity/timing.py",
    "metarec_gym/evaluation/validity/windows.py",
    "metarec_gym/evaluation/validity/parts.py",
    "metarec_gym/evaluation/validity/variations.py",
    "metarec_gym/response/predictive_check.py",
    "experiments/validity.py",
)
"""Code that decides what is measured; findings and verdict are drawn anew from what was measured."""


@dataclass(frozen=True)
class Args:
    """Says how far a world may be believed."""

    world: Path
    """Folder of the world."""
    log: Path | None = None
    """Folder of the prepared log that the world was built from; None looks for envs_data/<name of the world>."""
    quick: bool = False
    """Fewer users, replicas and variations: a first look in about a minute."""
    sensitivity: bool = True
    """Plays the strategies against settings that the log cannot tell (samplers, base rate, fatigue, patience ...)."""
    seed: int = 0
    """Decides samples of users and all draws."""
    workers: int = 2
    """Processes, one core each."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quiet: bool = False
    """No progress bars."""


class _Parts:
    """Parts of the work, each kept as a file: a kill loses one part at most."""

    def __init__(self, folder: Path, show: bool) -> None:
        self.folder, self.show = folder, show
        self.started = time.perf_counter()
        self.total = self.done = self.spent = 0.0

    def expect(self, seconds: float) -> None:
        self.total += seconds

    def run(self, key: str, title: str, expected_s: float, work: Callable[[], Any]) -> Any:
        file = self.folder / f"{key}.json"
        if file.is_file():
            self.total -= expected_s
            return json.loads(file.read_text())
        if self.show:
            # the expectation is for two idle cores; what was measured so far says how much slower this machine is
            pace = self.spent / self.done if self.done > 0 else 1.0
            left = max(self.total - self.done, expected_s) * pace
            print(f"[validity] {title} (about {left:.0f} s left)", flush=True)
        begun = time.perf_counter()
        result = jsonable(work())
        self.spent += time.perf_counter() - begun
        self.done += expected_s
        write_atomic(file, json.dumps(result))
        return result


def find_log(world: World, given: Path | None) -> tuple[Dataset | None, NDArray[np.object_] | None, str]:
    """The log that the world was built from, who served its rows (where it says so), and why there is none.

    Raises:
        ValueError: When the log given is another one.
    """
    from metarec_gym.data import InteractionLog
    from metarec_gym.evaluation.validity.sample import served_by, world_dataset

    folder = given if given is not None else ROOT / "envs_data" / world.name
    if given is None and not (folder / "log.json").is_file():
        return None, None, f"It needs the log: name its folder with --log (there is none at {folder})."
    try:
        log = InteractionLog.load(folder)
        dataset = world_dataset(world, log)
        return dataset, served_by(log, dataset), ""
    except ValueError as error:
        if given is not None:
            raise
        return None, None, f"It needs the log: {error}."


def eval_settings(quick: bool, seed: int) -> EvalSettings:
    """How strategies are played here: fewer users and replicates than in a comparison, the same ones for every variation."""
    from metarec_gym.evaluation.headroom import EvalSettings

    return EvalSettings(
        contexts_per_user=1,
        max_users=60 if quick else 100,
        replicates=1,
        max_replicates=2 if quick else 4,
        horizons=(),
        seed=seed,
        look=True,
        look_users=8 if quick else 32,
    )


def run(args: Args) -> dict[str, Any]:
    """Measures, concludes, prints and writes.

    Args:
        args: The command line.

    Returns:
        The result row.
    """
    from metarec_gym.evaluation.validity.findings import FILE, conclude
    from metarec_gym.evaluation.validity.page import page
    from metarec_gym.evaluation.validity.text import markdown

    world = load_world(args.world)
    dataset, served, no_log = find_log(world, args.log)
    if not args.quiet:
        print(world_line(world), flush=True)
    facts = {
        "kind": "validity",
        "world": world.hash,
        "log": None if dataset is None else world.info.get("log_hash"),
        "quick": args.quick,
        "sensitivity": args.sensitivity,
        "seed": args.seed,
        "code": code_hash(CODE),
    }
    folder = RunFolder(args.runs, f"validity_{world.name}", facts)
    started = time.perf_counter()
    finished = folder.result()
    if finished is None:
        folder.begin(args)
        measured = _measure(args, world, dataset, served, no_log, folder)
        measured["seconds"] = round(time.perf_counter() - started, 1)
    else:
        measured = finished["measured"]
    # a stored result has its keys sorted
    measured["outcomes"] = {name: measured["outcomes"][name] for name in world.outcomes}
    validity = jsonable(conclude(measured))
    provenance = {"command": (folder.path / "command.txt").read_text().strip(), "code hash": str(facts["code"])}
    target = write_atomic(args.world / FILE, json.dumps(validity, indent=1) + "\n")
    report = write_atomic(folder.path / "validity.html", page(validity, provenance))
    write_atomic(folder.path / "validity.md", markdown(validity, provenance))
    row = folder.finish(
        {
            "world": world.hash,
            "responses": {name: response.hash for name, response in world.responses.items()},
            "seed": args.seed,
            "device": "cpu",
            "seconds": measured["seconds"],
            "measured": measured,
            "findings": validity["findings"],
            "verdict": validity["verdict"],
            "report": report.name,
        }
    )
    for finding in validity["findings"]:
        print(f"{finding['result']:<12} {finding['question']}\n             {finding['text']}")
    print(f"verdict  {validity['verdict']['headline']}.")
    for sentence in validity["verdict"]["sentences"]:
        print(f"         {sentence}")
    print(f"validity {target}\nreport   {report}")
    return row


def _measure(
    args: Args,
    world: World,
    dataset: Dataset | None,
    served: NDArray[np.object_] | None,
    no_log: str,
    folder: RunFolder,
) -> dict[str, Any]:
    from metarec_gym.evaluation.validity import parts
    from metarec_gym.evaluation.validity import variations as plays
    from metarec_gym.evaluation.validity.findings import SCHEMA

    kept = _Parts(folder.path / "parts", not args.quiet)
    settings = eval_settings(args.quick, args.seed)
    rows = plays.variations(world, quick=args.quick) if args.sensitivity else []
    others = [row for row in plays.judge_variations(world) if row.name not in {r.name for r in rows}]
    n_outcomes = len(world.outcomes)
    seconds = {"outcome": 10.0, "windows": 25.0, "main": 40.0, "row": 12.0}
    kept.expect(seconds["main"] + seconds["row"] * (len(rows) + len(others)))
    if dataset is not None:
        kept.expect(n_outcomes * seconds["outcome"] + seconds["windows"] + 5.0)
    validity: dict[str, Any] = {
        "schema": SCHEMA,
        "name": world.name,
        "world": world.hash,
        "log_hash": world.info.get("log_hash"),
        "with_log": dataset is not None,
        "quick": args.quick,
        "seed": args.seed,
        "users_by_fold": world.metrics.get("users_by_fold", {}),
    }
    outcomes = {}
    limit = 3_000 if args.quick else 6_000
    for index, name in enumerate(world.outcomes):
        if dataset is None:
            outcomes[name] = parts.outcome_from_world(world, name) or {"note": no_log}
        else:
            outcomes[name] = kept.run(
                f"outcome_{index}",
                f"the judges on unseen users: {name}",
                seconds["outcome"],
                functools.partial(
                    parts.outcome_part, world, dataset, index, limit=limit, seed=args.seed, served=served
                ),
            )
    validity["outcomes"] = outcomes
    validity["log_loss"] = parts.losses_by_model(outcomes)
    validity |= (
        kept.run("time", "sessions and returns", 5.0, lambda: parts.time_part(world, dataset))
        if dataset is not None
        else {"sessions": {"note": no_log}, "returns": {"note": no_log}}
    )
    validity["posterior_predictive"] = parts.predictive_part(world)
    if dataset is None:
        validity |= {"concordance": {"note": no_log}, "classifier_auc": {"note": no_log}}
    else:
        validity |= kept.run(
            "windows",
            "the strategies' order and the look of sessions",
            seconds["windows"],
            lambda: parts.windows_part(world, dataset, quick=args.quick, seed=args.seed),
        )
    workers = min(args.workers, os.cpu_count() or 1)

    def play_main() -> dict[str, Any]:
        stored, show = folder.path / "plays", not args.quiet
        return plays.play_part(
            world, plays.MAIN, settings, folder=stored, source=args.world, workers=workers, progress=show
        )

    main = kept.run("play_main", "the strategies with the main judges", seconds["main"], play_main)
    played = {"main": main} | plays.play_variations(
        args.world,
        (*others, *rows),
        # the same horizon, users and luck for every variation
        replace(settings, horizon=main["horizon"], look=False),
        folder=folder.path,
        workers=workers,
        progress=not args.quiet,
    )
    validity["judges_agree"] = plays.judges_part(main, played.get("second"))
    validity["sensitivity"] = plays.sensitivity_rows(played) if args.sensitivity else []
    validity["long_term"] = main["long_term"]
    validity["strategies"] = main["values"]
    validity["horizon"] = main["horizon"]
    return validity


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
