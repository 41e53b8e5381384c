"""Is there anything to win by selecting? Asked before anything is trained.

    python -m experiments.headroom --world worlds/movielens_100k

Every strategy is played from the same start states with the same luck; the numbers are explained in the report of
`python -m experiments.compare`. A second run reads what the first one stored, a killed run goes on where it was.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.env_settings import env_pairs, env_settings
from experiments.run_folder import ENV_CODE, RunFolder, code_hash, command_line
from metarec_gym.devices import device_of
from metarec_gym.evaluation.headroom import EvalSettings

if TYPE_CHECKING:
    from metarec_gym.evaluation.headroom import Headroom
    from metarec_gym.world import World

PLAY_CODE = (*ENV_CODE, *(f"metarec_gym/evaluation/{name}" for name in ("rollout.py", "references.py", "headroom")))
"""Code that decides what a play returns."""


@dataclass(frozen=True)
class Args:
    """Measures the headroom of a world."""

    world: Path
    """Folder of the world."""
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    """How policies are played."""
    session_requests: int | None = None
    """Requests a session: episodes then span several sessions, lists are ranked again at the start of each (slow: think of
    --no-look). None: the whole episode is one session."""
    judge: str = "main"
    """Which of the fold's judges answers: main, second (another family), uniform or popularity (other samplers)."""
    env: tuple[str, ...] = ()
    """Further settings of the environment, KEY=VALUE each (JSON values), e.g. `--env base_rate_factor=0.5 fatigue=0.3`."""
    workers: int = 2
    """Processes, one core each."""
    device: str = "cpu"
    """Where environments run: cpu, cuda, or auto, which takes a GPU where there is one; on a GPU one worker is used."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", device_of(self.device))


def settings_of(args: Any) -> EvalSettings:
    """How policies are played, the environment's further settings of a command line among them.

    Args:
        args: Arguments with `evaluation`, `env`, `session_requests` and `judge`.
    """
    evaluation: EvalSettings = args.evaluation
    env = env_settings(args.env, session_requests=args.session_requests, judge=args.judge, given=evaluation.env)
    return replace(evaluation, env=env)


def load_world(folder: Path) -> World:
    """The world of a folder."""
    from metarec_gym.world import resolve_world

    return resolve_world(folder)


def world_line(world: World) -> str:
    """The first line of the table."""
    return (
        f"world  {world.name}  {world.hash}   {world.n_users:,} users  {world.n_items:,} items  "
        f"{world.n_strategies} strategies"
    )


def measure(
    world: World,
    source: Path,
    settings: EvalSettings,
    *,
    runs: Path,
    workers: int = 2,
    device: str = "cpu",
    progress: bool = True,
    command: str | None = None,
) -> tuple[Headroom, RunFolder]:
    """The headroom, from stored plays where they exist.

    Args:
        world: The world.
        source: Its folder.
        settings: How policies are played.
        runs: Folder of all runs.
        workers: Processes.
        device: Where environments run.
        progress: Shows bars.
        command: The command line to note; the one running now if None.

    Returns:
        The headroom and its run folder.
    """
    from metarec_gym.evaluation.headroom import measure_headroom

    facts = {"kind": "headroom", "world": world.hash, "settings": settings, "device": device.split(":")[0]}
    folder = RunFolder(runs, f"headroom_{world.name}", {**facts, "code": code_hash(PLAY_CODE)})
    finished = folder.result() is not None
    if not finished:
        folder.begin({"world": str(source), "evaluation": settings, "device": device}, command)
    started = time.perf_counter()
    headroom = measure_headroom(
        world,
        settings,
        folder=folder.path / "plays",
        source=source,
        workers=1 if device != "cpu" else min(workers, os.cpu_count() or 1),
        device=device,
        progress=progress,
    )
    if not finished:
        responses = {fold: response.hash for fold, response in world.responses.items()}
        row = {"world": world.hash, "responses": responses, "seed": settings.seed, "device": device}
        row |= {"judge": settings.env.get("judge", "main")}
        folder.finish({**row, "seconds": time.perf_counter() - started, **headroom.to_json()})
    return headroom, folder


def run(args: Args) -> dict[str, Any]:
    """Measures and prints.

    Args:
        args: The command line.

    Returns:
        The result row.
    """
    from metarec_gym.evaluation.verdict import decide

    world = load_world(args.world)
    settings = settings_of(args)
    print(world_line(world))
    if settings.env:
        print(f"environment  {', '.join(env_pairs(settings.env))}")
    headroom, folder = measure(
        world,
        args.world,
        settings,
        runs=args.runs,
        workers=args.workers,
        device=args.device,
        progress=not args.quiet,
        command=command_line(),
    )
    print(headroom.line())
    for line in headroom.reference_lines():
        print(line)
    optimism = f"{headroom.optimism:.2%} of the single best strategy"
    plug_in = headroom.plug_in()
    print(
        f"oracle without cross-fitting {plug_in.as_percent()}: optimistic by {optimism}, "
        f"{headroom.replicates} replicates a half"
    )
    for index, window in enumerate(headroom.windows):
        if index != headroom.headline:
            parts = ", ".join(f"{name} {i.as_percent()}" for name, i in headroom.headrooms(index).items())
            print(f"  {window.name}: {parts}")
    for note in headroom.notes:
        print(f"note  {note}")
    verdict = decide(headroom.sbs_name, headroom.headrooms(), {}, sched=headroom.sched_name)
    print(f"verdict before training  {verdict.headline}. {verdict.reason}")
    print(f"result   {folder.path / 'result.json'}")
    return folder.result() or {}


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    run(tyro.cli(Args, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))


if __name__ == "__main__":
    main()
