"""Log -> world: fits the strategies and the two judges, ranks every start state's lists, checks what it built.

    python -m experiments.build_world --log envs_data/movielens_100k --out worlds/movielens_100k

Finished stages are kept in `<out>.partial` while it runs; a finished world of the same log and settings is found again.
"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.run_folder import RunFolder, code_hash, jsonable
from metarec_gym.devices import device_of

CODE = (
    "metarec_gym/data",
    "metarec_gym/recommenders",
    "metarec_gym/response",
    "metarec_gym/world.py",
    "metarec_gym/world_building.py",
    "metarec_gym/world_judges.py",
    "metarec_gym/devices.py",
)


@dataclass(frozen=True)
class Args:
    """Builds a world from a prepared log."""

    log: Path
    """Folder of a prepared log (`python -m envs_data.<log>.prepare`)."""
    out: Path
    """Folder of the world."""
    seed: int = 0
    """Decides folds, fits and start states."""
    users: int | None = None
    """Builds from this many users of the log, drawn at random: the log is read row group by row group, but strategies and
    judges are fitted in memory. The sample is kept as a log of its own in `<out>_log`; none given takes all users."""
    pool: tuple[str, ...] = ()
    """Strategies: names (popular, ease, ...), `production=scores.parquet`, or `my_module:MyStrategy`; none given takes the
    default pool."""
    starts_per_user: int = 8
    """Start states for each user of folds A and B; the first is cold."""
    slate_size: int = 5
    """Items a request."""
    horizon: int | None = None
    """Requests an episode; none given takes the largest sound one."""
    replicas: int = 200
    """Emitted logs of the posterior predictive check; 0 leaves it out."""
    members: int = 2
    """Networks in each judge; every episode meets one of them, so that what the fit does not know reaches every interval."""
    variants: bool = True
    """Also fits a judge of a second family, which scores the final table again, and, for a positives-only log, judges whose
    negatives are sampled otherwise."""
    response: Literal["model", "logged"] = "model"
    """How users answer: by fitted judges, or by looking the answer up, for logs in which (nearly) every pair was observed."""
    session_gap: float | None = None
    """Longest pause inside a session in seconds, for a log without session ids; none given fits it from the log."""
    force: bool = False
    """Builds again although a world of the same log and settings is there."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    workers: int = 2
    """Processes that fit judges side by side, one core each."""
    device: str = "cpu"
    """Where strategies and judges are fitted and lists ranked: cpu, cuda, or auto, which takes a GPU where there is one."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", device_of(self.device))


def run(args: Args) -> dict[str, Any]:
    """Builds the world, or finds it finished.

    Args:
        args: The command line.

    Returns:
        The result row.
    """
    from metarec_gym.data import InteractionLog
    from metarec_gym.recommenders import make_strategy
    from metarec_gym.world import World

    pool = [make_strategy(word) for word in args.pool]
    if args.users is None:
        log = InteractionLog.load(args.log)
    else:
        from metarec_gym.data.streaming import load_sample

        log = load_sample(args.log, args.users, seed=args.seed)
        log.save(log_of(args))
    settings = {"seed": args.seed, "pool": list(args.pool), "starts_per_user": args.starts_per_user}
    settings |= {"slate_size": args.slate_size, "horizon": args.horizon, "replicas": args.replicas}
    settings |= {"members": args.members, "variants": args.variants, "response": args.response}
    settings |= {"session_gap_s": args.session_gap, "strategies": [strategy.fingerprint() for strategy in pool]}
    facts: dict[str, Any] = {"kind": "world", "log": log.hash, "settings": settings, "code": code_hash(CODE)}
    if args.device != "cpu":
        facts["device"] = args.device.split(":")[0]
    folder = RunFolder(args.runs, f"world_{log.name}", facts)
    done = folder.result()
    if done is not None and not args.force and (args.out / "world.json").is_file():
        built = json.loads((args.out / "world.json").read_text())
        if built.get("hash") == done["world"]:
            print(f"world  {log.name}  {done['world']}  found in {args.out}")
            print(_hint(args))
            return done
    folder.begin(args)
    started = time.perf_counter()
    world = World.build(
        log,
        seed=args.seed,
        pool=pool or None,
        starts_per_user=args.starts_per_user,
        slate_size=args.slate_size,
        horizon=args.horizon,
        out=args.out,
        progress=not args.quiet,
        replicas=args.replicas,
        workers=args.workers,
        members=args.members,
        variants=args.variants,
        response=args.response,
        session_gap_s=args.session_gap,
        device=args.device,
    )
    row = folder.finish(
        {
            "world": world.hash,
            "name": world.name,
            "folder": str(args.out),
            "responses": {fold: response.hash for fold, response in world.responses.items()},
            "seed": args.seed,
            "device": args.device,
            "seconds": time.perf_counter() - started,
            "horizon": world.horizon,
            "strategies": world.strategies,
            "metrics": jsonable(world.metrics),
        }
    )
    print(f"world  {world.name}  {world.hash}  saved to {args.out} in {row['seconds']:.0f} s")
    for name, said in world.metrics["strategies"].items():
        print(f"strategy {name}: " + ", ".join(f"{fact.replace('_', ' ')} {value}" for fact, value in said.items()))
    print(_hint(args))
    return row


def log_of(args: Args) -> Path:
    """Folder of the log that the world is built from: the one given, or the sample of it."""
    return args.log if args.users is None else args.out.with_name(f"{args.out.name}_log")


def _hint(args: Args) -> str:
    command = shlex.join(["python", "-m", "experiments.validity", "--world", str(args.out), "--log", str(log_of(args))])
    return f"how far may it be believed?  {command}"


def main() -> None:
    """The command line."""
    import tyro

    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
