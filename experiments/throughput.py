"""How fast: environment, policy inference, PPO and Stable-Baselines3, by batch, catalogue, strategies, slate and device.

    python -m experiments.throughput --world worlds/movielens_100k --out experiments/results/throughput.md
    python -m experiments.throughput --world worlds/movielens_100k --device cuda --out experiments/results/throughput_h200.md
    python -m experiments.throughput --world worlds/movielens_100k --profile

Every part runs in a process of its own and leaves a file; a run that was stopped goes on with the parts that are missing.
Gymnasium's vectorised CartPole and Stable-Baselines3 on CartPole are measured in the same run: a figure is a ratio, not a boast.
Needs torch, numpy, gymnasium and safetensors; the rows of Stable-Baselines3 need it too, the plots need matplotlib, and both are
left out (and named) where they are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.run_folder import ENV_CODE, ROOT, RunFolder, code_hash
from experiments.throughput_measure import Setting
from metarec_gym.devices import device_of

CODE = (*ENV_CODE, "agents/ppo.py", "agents/ppo", "metarec_gym/response/frozen.py")
CATALOGUES = (1_682, 3_706, 100_000, 1_000_000)
"""MovieLens-100K, MovieLens-1M, and two sizes beyond any public log of users."""
STRATEGIES = (4, 8, 16, 32, 64)
SLATES = (1, 2, 5, 10, 20)
MANY_USERS = 100_000
LARGE_MINIBATCH = 8_448
"""An eighth of a rollout of 2,048 users and 33 requests."""


@dataclass(frozen=True)
class Args:
    """What is measured."""

    world: Path | None = None
    """Folder of the world; None = random tables of the size of MovieLens-100K."""
    device: str = "cpu"
    """cpu, cuda, or auto, which takes a GPU where there is one."""
    quick: bool = False
    """Small batches and short windows: whether everything runs, not how fast."""
    window_s: float = 2.0
    """Seconds of a window."""
    windows: int = 5
    """Windows of each part."""
    only: tuple[str, ...] = ()
    """Parts to measure, by the start of their names; all if empty."""
    profile: bool = False
    """Also writes traces of the environment's step and of a PPO iteration."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    out: Path | None = None
    """Page to write; in the run's folder if None."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", device_of(self.device))


def batches(args: Args) -> tuple[int, ...]:
    """Batch sizes of the environment."""
    if args.quick:
        return (32, 64)
    return (256, 1024, 4096, 16384, 65536, 262144) if args.device != "cpu" else (64, 256, 1024, 4096, 16384)


def first_settings(args: Args) -> list[Setting]:
    """Parts that depend on no other one's result."""
    common, quick = _common(args), args.quick
    parts = [
        Setting("ceilings_1", "ceilings", **common),
        Setting("hash", "hash", num_envs=8 if quick else 16, world=_folder(args), device=args.device),
        Setting("cartpole_1024", "cartpole", num_envs=1024, **{**common, "device": "cpu"}),
        Setting("single", "single", world=_folder(args), **common),
    ]
    mode = _mode(args)
    parts += [Setting(f"env_{n}", "env", num_envs=n, world=_folder(args), mode=mode, **common) for n in batches(args)]
    return parts


def further_settings(args: Args, best: int) -> list[Setting]:
    """The other parts, given the batch at which the environment alone is fastest."""
    common, quick, cpu, folder = _common(args), args.quick, args.device == "cpu", _folder(args)
    many = 32 if quick else min(best, 4096) if cpu else best
    size: dict[str, Any] = {"n_items": 1_000, "n_users": 100} if quick else {"n_items": 3_706}
    mode = _mode(args)
    both: list[tuple[str, dict[str, Any]]] = [("", {})]
    if cpu:
        both += [("_2processes", {"processes": 2}), ("_2threads", {"threads": 2})]
    parts = [Setting("ceilings_2threads", "ceilings", **common | {"threads": 2})] if cpu else []
    for suffix, spread in both:
        options = {**common, **spread, "world": folder}
        if suffix:
            parts.append(Setting(f"env_best{suffix}", "env", num_envs=best, **options))
            parts.append(Setting(f"cartpole_1024{suffix}", "cartpole", num_envs=1024, **{**common, **spread}))
        parts += [
            Setting(f"policy{suffix}", "policy", num_envs=best, mode=mode, **options),
            Setting(f"ppo{suffix}", "ppo", num_envs=many, mode=mode, **options),
            Setting(f"ppo_large_minibatch{suffix}", "ppo", num_envs=many, minibatch_size=LARGE_MINIBATCH, mode=mode,
                    **options),
        ]  # fmt: skip
    options = {**common, "world": folder}
    if cpu and not quick:
        parts.append(Setting("env_compiled", "env", num_envs=1024, mode="compile", **options))
    if not cpu:
        # what the graph is worth: the same batch by single steps, and by a compiled step
        parts += [
            Setting(f"env_best_{way}", "env", num_envs=best, mode=way, **options)
            for way in ("step", "eager", "compile")
        ]
        parts.append(Setting("ppo_step", "ppo", num_envs=many, **options))
    parts += [
        Setting("env_arrays", "env", num_envs=best, output="numpy", **options),
        Setting("env_blend", "env", num_envs=many, env={"action": "blend"}, mode=mode, **options),
        Setting("env_slots", "env", num_envs=many, env={"action": "slots"}, mode=mode, **options),
        Setting("env_sessions", "env", num_envs=many, env={"session_requests": 5}, **options),
    ]
    if folder is None:
        # random tables have no strategies that could rank again
        parts = [part for part in parts if part.name != "env_sessions"]
    if importlib.util.find_spec("stable_baselines3") is not None:
        few, adapter = (4, 32) if quick else (64, 1024 if cpu else 4096)
        parts += [
            Setting("sb3_adapter", "sb3", num_envs=adapter, minibatch_size=LARGE_MINIBATCH, **options),
            Setting("sb3_adapter_64", "sb3", num_envs=few, **options),
            Setting("sb3_dummy_64", "sb3_dummy", num_envs=few, **options),
            Setting("sb3_cartpole", "sb3_cartpole", num_envs=8, **{**common, "device": "cpu"}),
        ]
        if cpu and not quick:
            parts.append(
                Setting("sb3_adapter_2threads", "sb3", num_envs=adapter, minibatch_size=LARGE_MINIBATCH,
                        **options | {"threads": 2})
            )  # fmt: skip
    fixed = 32 if quick else 1024 if cpu else 16384
    for n in (500, 1_000) if quick else CATALOGUES:
        # one network in the judge and short episodes, so that the tables of 1 M items fit beside each other
        sizes = {**size, "n_items": n, "n_members": 1}
        parts.append(Setting(f"items_{n}", "env", num_envs=fixed, sizes=sizes, mode=mode, **common))
    for k in (2, 4) if quick else STRATEGIES:
        sizes = {**size, "n_strategies": k}
        parts.append(Setting(f"strategies_{k}", "env", num_envs=fixed, sizes=sizes, mode=mode, **common))
    for s in (1, 5) if quick else SLATES:
        sizes = {**size, "slate_size": s}
        parts.append(Setting(f"slate_{s}", "env", num_envs=fixed, sizes=sizes, mode=mode, **common))
    parts.append(Setting("users_many", "env", num_envs=64 if quick else MANY_USERS, mode=mode, **options))
    return parts


def _folder(args: Args) -> str | None:
    return None if args.world is None else str(args.world)


def _common(args: Args) -> dict[str, Any]:
    return {"device": args.device, "windows": args.windows, "window_s": 0.1 if args.quick else args.window_s}


def _mode(args: Args) -> str:
    """How the environment, the policy and PPO play: on a GPU the host would be waited for at every step."""
    return "step" if args.device == "cpu" else "graph"


# ------------------------------------------------------------------------------------------------ running
def run_settings(settings: Iterable[Setting], folder: Path, args: Args) -> dict[str, dict[str, Any]]:
    """Measures what has no file yet, each part in a process of its own; a part that fails is named and left out."""
    rows: dict[str, dict[str, Any]] = {}
    wanted = [s for s in settings if not args.only or s.name.startswith(args.only)]
    for number, setting in enumerate(wanted, start=1):
        file = folder / "parts" / f"{setting.name}.json"
        row = _finished(file, setting)
        if row is None:
            print(f"[{number}/{len(wanted)}] {setting.name} ...", end=" ", file=sys.stderr, flush=True)
            began = time.monotonic()
            file.parent.mkdir(parents=True, exist_ok=True)
            given = json.dumps(dataclasses.asdict(setting))
            threads = {"OMP_NUM_THREADS": str(setting.threads), "MKL_NUM_THREADS": str(setting.threads)}
            command = [sys.executable, "-W", "ignore", "-m", "experiments.throughput_measure", given, str(file)]
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **threads}, check=False, stderr=subprocess.PIPE, text=True
            )
            row = _finished(file, setting)
            if row is None:
                reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                rows[setting.name] = {"setting": dataclasses.asdict(setting), "error": reason}
                print(f"failed: {reason}", file=sys.stderr)
                continue
            speed = row.get("steps_per_s", {}).get("median")
            said = f"{speed:,.0f} steps/s" if speed else "done"
            print(f"{said} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
        rows[setting.name] = row
    return rows


def _finished(file: Path, setting: Setting) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    row: dict[str, Any] = json.loads(file.read_text())
    # through JSON, so that tuples compare with what was read
    return row if row["setting"] == json.loads(json.dumps(dataclasses.asdict(setting))) else None


def best_batch(rows: dict[str, dict[str, Any]], sizes: Iterable[int]) -> int:
    """The batch size with the highest median speed; the smallest one if none was measured."""
    found = {n: rows[f"env_{n}"]["steps_per_s"]["median"] for n in sizes if "steps_per_s" in rows.get(f"env_{n}", {})}
    return max(found, key=lambda n: found[n]) if found else min(sizes)


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"cpu": model, "cores": cores, "torch": torch.__version__, "python": platform.python_version()}
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return facts


def run(args: Args) -> dict[str, Any]:
    """Measures everything that is missing and writes `result.json`, the plots and the page.

    Raises:
        FileNotFoundError: When there is no world at `args.world`.
    """
    from experiments.throughput_page import write_page

    world = None
    if args.world is not None:
        file = args.world / "world.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"no world at {args.world}; build it: python -m experiments.build_world --log LOG --out {args.world}"
            )
        world = json.loads(file.read_text())["hash"]
    asked = {"world": world, "device": args.device, "quick": args.quick, "window_s": args.window_s}
    facts = {"kind": "throughput", **asked, "machine": machine(args.device), "code": code_hash(CODE)}
    folder = RunFolder(args.runs, f"throughput_{args.device.replace(':', '')}", facts)
    folder.begin(args)
    rows = run_settings(first_settings(args), folder.path, args)
    best = best_batch(rows, batches(args))
    rows |= run_settings(further_settings(args, best), folder.path, args)
    result: dict[str, Any] = {"machine": machine(args.device), "world": world, "best_batch": best, "parts": rows,
                              "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}  # fmt: skip
    if args.profile:
        from experiments.throughput_profile import profiles

        result["profiles"] = profiles(args.world, args.device, folder.path, num_envs=64 if args.quick else 1024)
    finished = folder.finish(result)
    page = write_page(finished, args.out or folder.path / "throughput.md")
    print(f"page     {page}\nnumbers  {folder.path / 'result.json'}")
    failed = sorted(name for name, row in rows.items() if "error" in row)
    if failed:
        print(f"failed   {', '.join(failed)}")
    return finished


def parse(argv: list[str] | None = None) -> Args:
    """The command line, by argparse: a bare machine with a GPU may have nothing more."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world", type=Path, help="folder of the world; random tables if absent")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or auto (a GPU where there is one)")
    parser.add_argument("--quick", action="store_true", help="whether everything runs, not how fast")
    parser.add_argument("--window-s", type=float, default=2.0, help="seconds of a window")
    parser.add_argument("--windows", type=int, default=5, help="windows of each part, at least 5")
    parser.add_argument("--only", nargs="+", default=(), help="parts to measure, by the start of their names")
    parser.add_argument("--profile", action="store_true", help="also traces where the time goes")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument("--out", type=Path, help="page to write; in the run's folder if absent")
    found = vars(parser.parse_args(argv))
    return Args(**{**found, "only": tuple(found["only"])})


if __name__ == "__main__":
    try:
        run(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
