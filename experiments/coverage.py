"""Do the intervals of this repository cover? Simulated repetitions with a known truth; one part a room.

    python -m experiments.coverage --part off_policy

writes `experiments/results/coverage_<part>.md`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Args:
    """Measures how often intervals hold the truth."""

    part: Literal["off_policy"] = "off_policy"
    """Which intervals; `experiments.coverage_<part>` measures them."""
    repetitions: int = 2000
    """Simulated logs."""
    seed: int = 0
    """Seed of the simulations."""
    out: Path = Path("experiments/results")
    """Folder of the table."""


def run(args: Args) -> dict[str, Any]:
    """Measures one part; returns what its `run` returns.

    Args:
        args: The command line.
    """
    part = importlib.import_module(f"experiments.coverage_{args.part}")
    result: dict[str, Any] = part.run(args.repetitions, args.seed, args.out)
    return result


def main() -> None:
    """The command line."""
    import tyro

    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
