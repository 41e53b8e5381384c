"""What does a trained policy do, in words, and how much of its worth do the words keep?

    python -m experiments.explain --world worlds/movielens_100k --policy runs/ppo_A_seed0_.../policy.safetensors

Writes the policy as a small decision tree (tree.json, which can be played), who gets which strategy, what the policy looks at
and what would have to be different, into explain.md, explain.html and result.json; a copy beside the policy's file feeds the
report of `python -m experiments.compare`. Everything is measured on users and a judge that the policy has not seen.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.headroom import PLAY_CODE, load_world, settings_of, world_line
from experiments.run_folder import RunFolder, code_hash, command_line, versions, write_atomic
from metarec_gym.evaluation.headroom import FOLDS, EvalSettings


@dataclass(frozen=True)
class Args:
    """Explains a policy."""

    world: Path
    """Folder of the world that the policy was trained on."""
    policy: Path
    """File of the policy, as experiments.train writes it."""
    fold: Literal["A", "B"] | None = None
    """Whose users the policy was trained on; what the file says if absent."""
    leaves: int = 16
    """Rules at most."""
    rounds: int = 3
    """Rounds of the imitation."""
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    """How policies are played."""
    session_requests: int | None = None
    """Requests a session: episodes then span several sessions. None: the whole episode is one session."""
    judge: str = "main"
    """Which of the fold's judges scores: main, second (another family), uniform or popularity (other samplers)."""
    env: tuple[str, ...] = ()
    """Further settings of the environment, KEY=VALUE each (JSON values)."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quiet: bool = False
    """Says nothing while working."""


def run(args: Args) -> dict[str, Any]:
    """Explains, prints and writes everything, or finds the finished run.

    Args:
        args: The command line.

    Returns:
        The result row.

    Raises:
        ValueError: When the policy was trained on another world, or nobody says on which fold.
    """
    from metarec_gym.evaluation.explain.explanation import explain, explanation_file
    from metarec_gym.evaluation.explain.text import markdown
    from metarec_gym.evaluation.report.explanation import explanation_page
    from metarec_gym.policy import MlpPolicy

    world, policy, settings = load_world(args.world), MlpPolicy.load(args.policy), settings_of(args)
    trained_on = policy.meta.get("world")
    if trained_on not in (None, world.hash):
        raise ValueError(f"{args.policy} was trained on the world {trained_on}, {args.world} is {world.hash}")
    fold = args.fold or policy.meta.get("fold")
    if fold not in FOLDS:
        raise ValueError(f"{args.policy} does not say on which fold it was trained; give --fold A or --fold B")
    facts = {
        "kind": "explain",
        "world": world.hash,
        "policy": hashlib.sha256(args.policy.read_bytes()).hexdigest(),
        "fold": fold,
        "leaves": args.leaves,
        "rounds": args.rounds,
        "settings": settings,
        "code": code_hash((*PLAY_CODE, "metarec_gym/evaluation/explain")),
    }
    folder = RunFolder(args.runs, f"explain_{world.name}_{policy.meta.get('agent', 'policy')}_{fold}", facts)
    row = folder.result()
    if row is None:
        folder.begin(args)
        started = time.perf_counter()
        say = (lambda text: None) if args.quiet else (lambda text: print(f"[explain] {text}", flush=True))
        found = explain(world, policy, fold, settings, max_leaves=args.leaves, rounds=args.rounds, say=say)
        provenance = {
            "command": command_line(),
            "world": world.hash,
            "policy": str(facts["policy"])[:16],
            "code": str(facts["code"]),
            "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        }
        found.tree.save(folder.path / "tree.json")
        write_atomic(folder.path / "explain.md", markdown(found.result, provenance))
        write_atomic(folder.path / "explain.html", explanation_page(found.result, provenance))
        row = folder.finish({**found.result, "seconds": time.perf_counter() - started, "tree": "tree.json"})
    write_atomic(explanation_file(args.policy), json.dumps(row, indent=2, sort_keys=True) + "\n")
    print(world_line(world))
    print(row["rules"]["text"])
    print(row["verdict"])
    print(f"report   {folder.path / 'explain.html'}")
    return row


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    run(tyro.cli(Args, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))


if __name__ == "__main__":
    main()
