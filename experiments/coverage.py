"""Do the intervals of this repository cover? Simulated repetitions with a known truth; one part a room.

    python -m experiments.coverage --part off_policy
    python -m experiments.coverage --part ab

writes `experiments/results/coverage_<part>.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Args:
    """Measures how often intervals hold the truth."""

    part: Literal["off_policy", "ab"] = "off_policy"
    """Which intervals; `experiments.coverage_<part>` measures them."""
    repetitions: int = 2000
    """Simulated logs."""
    seed: int = 0
    """Seed of the simulations."""
    out: Path = Path("experiments/results")
    """Folder of the table."""


def run(args: Args) -> Any:
    """Measures one part; returns what its `run` returns.

    Args:
        args: The command line.
    """
    if args.part == "ab":
        from experiments import coverage_ab

        return coverage_ab.run(coverage_ab.Args(args.repetitions, args.seed, args.out / "coverage_ab.md"))
    from experiments import coverage_off_policy

    return coverage_off_policy.run(args.repetitions, args.seed, args.out)


def main() -> None:
    """The command line."""
    import tyro

    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
