"""Time and memory of reading a log that does not fit in memory: a synthetic CSV of any length, prepared, encoded and sampled.

    python -m experiments.big_log --rows 20000000 --folder /tmp/big_log

Every step is a process of its own, so its peak memory is its own. The events are drawn block by block: users alike, items by a
power law, two outcomes, in the order of time, as a company's event table has them.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.run_folder import RunFolder, code_hash, write_atomic

CODE = ("experiments/big_log.py", "envs_data/own_log", "metarec_gym/data")
BLOCK = 1_000_000
"""Rows drawn at a time."""
FIRST_S = 1_600_000_000
SPAN_S = 365 * 86_400
Step = Literal["draw", "prepare", "encode", "sample"]
STEPS: tuple[Step, ...] = ("draw", "prepare", "encode", "sample")


@dataclass(frozen=True)
class Args:
    """Measures time and peak memory of reading a synthetic log of `rows` events."""

    rows: int = 20_000_000
    """Events of the log."""
    users: int | None = None
    """Users; none given takes one for 100 events."""
    items: int = 100_000
    """Items."""
    sample: int = 5_000
    """Users that are drawn from the log, as `experiments.build_world --users` draws them."""
    folder: Path = Path("runs/big_log")
    """Where the log is written: about 100 bytes of disk an event while it is prepared. What is written there is removed at the
    end, and nothing else."""
    seed: int = 0
    """Seed of the events and of the sample."""
    keep: bool = False
    """Leaves the prepared log, its tensors and the sample in the folder; the CSV goes in any case."""
    step: Step | None = None
    """One step alone, in this process; for the program itself."""
    runs: Path = Path("runs")
    """Folder of all runs."""


def draw(args: Args) -> None:
    """Writes the events as a CSV, in the order of time."""
    import numpy as np
    import pandas as pd

    n_users = users_of(args)
    popularity = 1.0 / np.arange(1, args.items + 1) ** 0.8
    cumulative = np.cumsum(popularity / popularity.sum())
    with source_of(args).open("w", encoding="utf-8") as file:
        for begin in range(0, args.rows, BLOCK):
            rng = np.random.default_rng([args.seed, begin])
            rows = min(BLOCK, args.rows - begin)
            place = begin + np.sort(rng.random(rows)) * rows
            block = pd.DataFrame(
                {
                    "user": rng.integers(n_users, size=rows),
                    "item": np.searchsorted(cumulative, rng.random(rows)).clip(max=args.items - 1),
                    "time": FIRST_S + (place / args.rows * SPAN_S).astype(np.int64),
                    "event": np.where(rng.random(rows) < 0.1, "purchase", "view"),
                }
            )
            block.to_csv(file, index=False, header=begin == 0)


def prepare(args: Args) -> None:
    """Prepares the log in pieces."""
    from envs_data.own_log import prepare as own_log

    own_log.main(
        own_log.Args(
            path=source_of(args),
            user="user",
            item="item",
            time="time",
            outcome=("take=*", "purchase=event:purchase"),
            out=log_of(args),
            name="big",
            stream=True,
            force=True,
        )
    )


def encode(args: Args) -> None:
    """Makes the tensors of the whole log, mapped from files."""
    from metarec_gym.data.streaming import encode_folder

    encode_folder(log_of(args), seed=args.seed, scratch=args.folder / "tensors")


def sample(args: Args) -> None:
    """Draws the log of some of the users."""
    from metarec_gym.data.streaming import load_sample

    load_sample(log_of(args), args.sample, seed=args.seed).save(args.folder / "sampled")


def users_of(args: Args) -> int:
    """Number of users."""
    return args.users or max(args.rows // 100, 10)


def source_of(args: Args) -> Path:
    """The CSV."""
    return args.folder / "events.csv"


def log_of(args: Args) -> Path:
    """The prepared log."""
    return args.folder / "log"


def peak_bytes() -> int:
    """Largest resident size of this process since it began."""
    status = Path("/proc/self/status")
    if status.is_file():
        # unlike ru_maxrss, it does not begin at the size of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    # Linux counts kilobytes, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def measured(args: Args, step: Step) -> dict[str, Any]:
    """Runs one step in a process of its own.

    Returns:
        Wall seconds, CPU seconds of all its threads, and peak resident memory in bytes, mapped pages of files included.

    Raises:
        RuntimeError: When the step fails.
    """
    settings: dict[str, Any] = {"rows": args.rows, "users": users_of(args), "items": args.items, "sample": args.sample}
    settings |= {"folder": args.folder, "seed": args.seed, "step": step}
    command = [sys.executable, "-m", "experiments.big_log"]
    command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    begun = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        raise RuntimeError(f"the step {step!r} of the big log failed with status {status}; its message stands above")
    said = args.folder / f"{step}.peak"
    peak = int(said.read_text())
    said.unlink()
    return {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": peak,
    }


def run(args: Args) -> dict[str, Any]:
    """Measures every step, or finds the measurement finished.

    Args:
        args: The command line.

    Returns:
        The result row.
    """
    if args.step is not None:
        {"draw": draw, "prepare": prepare, "encode": encode, "sample": sample}[args.step](args)
        write_atomic(args.folder / f"{args.step}.peak", str(peak_bytes()))
        return {}
    facts = {"kind": "big_log", "rows": args.rows, "users": users_of(args), "items": args.items}
    facts |= {"sample": args.sample, "seed": args.seed, "code": code_hash(CODE)}
    folder = RunFolder(args.runs, "big_log", facts)
    if (done := folder.result()) is not None:
        print(table(done))
        return done
    folder.begin(args)
    args.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for step in STEPS:
        found[step] = measured(args, step)
        print(f"{step}: {found[step]['seconds']:.0f} s, peak {found[step]['peak_bytes'] / 1e9:.2f} GB", flush=True)
    sizes = {
        "csv_bytes": source_of(args).stat().st_size,
        "log_bytes": sum(file.stat().st_size for file in log_of(args).rglob("*") if file.is_file()),
        "tensor_bytes": sum(file.stat().st_size for file in (args.folder / "tensors").iterdir()),
    }
    source_of(args).unlink()
    if not args.keep:
        for written in (log_of(args), args.folder / "tensors", args.folder / "sampled"):
            shutil.rmtree(written)
        if not any(args.folder.iterdir()):
            args.folder.rmdir()
    row = folder.finish({**facts, **sizes, "steps": found, "device": "cpu", "cores": os.cpu_count()})
    write_atomic(folder.path / "table.md", table(row) + "\n")
    print(table(row))
    return row


def table(row: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    words = {
        "draw": "draw the events, write the CSV",
        "prepare": "`envs_data.own_log.prepare`",
        "encode": "`encode_folder(scratch=...)`",
        "sample": f"`load_sample`, {row['sample']:,} users",
    }
    lines = [
        f"{row['rows']:,} events, {row['users']:,} users, {row['items']:,} items; CSV {row['csv_bytes'] / 1e9:.2f} GB, prepared "
        f"log {row['log_bytes'] / 1e9:.2f} GB, tensors {row['tensor_bytes'] / 1e9:.2f} GB",
        "",
        "| step | wall s | CPU s | peak memory GB | M events/s |",
        "|---|---|---|---|---|",
    ]
    for step, said in row["steps"].items():
        rate = row["rows"] / said["seconds"] / 1e6
        lines.append(
            f"| {words[step]} | {said['seconds']:.0f} | {said['cpu_seconds']:.0f} | {said['peak_bytes'] / 1e9:.2f} | {rate:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    import tyro

    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
