"""The command line: `python -m agents.ppo`, or `torchrun --nproc-per-node N -m agents.ppo --backend gloo`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch

from agents.ppo import SOLO, Args, join_team, train, with_judges
from metarec_gym.devices import device_of


@dataclass(frozen=True)
class Command:
    """Trains PPO on one environment."""

    args: Args = dataclasses.field(default_factory=Args)
    """Hyperparameters."""
    env_id: str = "MetaRec/Select-v0"
    """A registered environment."""
    world: str | None = None
    """Folder of a world; the embedded synthetic one if absent. Only for MetaRec environments."""
    fold: Literal["A", "B"] = "A"
    """Whose users and judge to train on. Only for MetaRec environments."""
    judges: tuple[str, ...] = ("main",)
    """Judges of the fold that answer, each a share of the users: main, second, uniform, popularity. Only for MetaRec."""
    num_envs: int = 256
    """Users served at once; by each process, where there are several."""
    run_dir: str | None = None
    """Where to write; `runs/ppo_<seed>` if absent."""
    resume: bool = False
    """Go on from the checkpoint in the run folder."""
    threads: int = 1
    """CPU threads a process; these networks are too small to gain much from more, and lose much on a busy machine."""
    device: str = "cpu"
    """Where everything runs: cpu, cuda, or auto, which takes a GPU where there is one; with several processes `cuda` is one
    device each. Only for MetaRec environments."""
    backend: Literal["gloo", "nccl"] | None = None
    """How several processes, started by torchrun, talk to each other; None: there is one process."""


def make_env(command: Command, device: str) -> Any:
    """The environment of one process."""
    if not command.env_id.startswith("MetaRec/"):
        return gym.make_vec(command.env_id, num_envs=command.num_envs)
    import metarec_gym  # noqa: F401  registers the ids

    kwargs: dict[str, Any] = {"fold": command.fold, "output": "torch", "autoreset_mode": "SameStep", "device": device}
    kwargs |= {} if command.world is None else {"world": command.world}

    def make(num_envs: int, judge: str) -> Any:
        chosen = kwargs if judge == "main" else kwargs | {"judge": judge}
        return gym.make_vec(command.env_id, num_envs=num_envs, **chosen)

    return with_judges(make, command.judges, command.num_envs)


def main() -> None:
    """The command line."""
    import tyro

    command = tyro.cli(Command, config=(tyro.conf.OmitArgPrefixes,))
    torch.set_num_threads(command.threads)
    team = SOLO if command.backend is None else join_team(command.backend)
    asked = device_of(command.device)
    device = f"cuda:{team.rank % torch.cuda.device_count()}" if asked == "cuda" else asked
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    run_dir = Path(command.run_dir or f"runs/ppo_{command.args.seed}")
    result = train(make_env(command, device), command.args, run_dir=run_dir, resume=command.resume, team=team)
    if team.rank == 0:
        row = {"steps": result.steps, "seconds": result.seconds, **result.metrics}
        (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(command), indent=2) + "\n")
        (run_dir / "command.txt").write_text(" ".join(["python -m agents.ppo", *sys.argv[1:]]) + "\n")
        (run_dir / "result.json").write_text(json.dumps(row, indent=2) + "\n")
        print(json.dumps({"run_dir": str(run_dir), **row}, indent=2))
    if team.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
