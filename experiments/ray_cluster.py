"""Ray, started in one way: on this machine or on a cluster, workers that find our modules, worlds that reach every node once.

Needs the `ray` extra; everything here says so in one sentence where it is missing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from experiments.run_folder import ROOT

WORLD_FILES = ("world.json", "world.safetensors", "strategies.json", "strategies.safetensors")
NOT_SENT = (".git", ".venv", "runs", "worlds", "*.parquet", "*.safetensors")


def start_ray(address: str | None, cpus: int | None) -> Any:
    """The `ray` module, connected.

    Args:
        address: Of a cluster; None starts Ray on this machine.
        cpus: Cores that Ray may use on this machine; None = all.

    Raises:
        ModuleNotFoundError: When the extra is not installed.
    """
    # Ray would else report use to its makers, and a sweep must work without a network
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Ray is not installed; install it: pip install 'metarec-gym[ray]'") from error
    if ray.is_initialized():
        return ray
    threads = {"OMP_NUM_THREADS": "1"}
    if address is None:
        environment: dict[str, Any] = {"env_vars": {**threads, "PYTHONPATH": str(ROOT)}}
        ray.init(num_cpus=cpus, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    else:
        environment = {"env_vars": threads, "working_dir": str(ROOT), "excludes": list(NOT_SENT)}
        ray.init(address=address, runtime_env=environment, log_to_driver=False)
    return ray


def packed_world(folder: Path) -> dict[str, bytes]:
    """The files of a world that trainings and plays read, for the object store; the order of names is fixed.

    Raises:
        FileNotFoundError: When there is no world in `folder`.
    """
    if not (folder / "world.json").is_file():
        raise FileNotFoundError(
            f"no world at {folder}; build it: python -m experiments.build_world --log LOG --out {folder}"
        )
    return {name: (folder / name).read_bytes() for name in WORLD_FILES if (folder / name).is_file()}


def unpacked_world(files: dict[str, bytes], cache: Path | None = None) -> Path:
    """The folder of a packed world on this node; written once, found again by its content.

    Args:
        files: From `packed_world`.
        cache: Folder of the unpacked worlds; in the system's temporary folder if None.
    """
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\x1f{len(files[name])}\x1f".encode())
        digest.update(files[name])
    root = cache if cache is not None else Path(tempfile.gettempdir()) / "metarec_worlds"
    folder = root / digest.hexdigest()[:16]
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=root, suffix=".partial"))
    for name, content in files.items():
        (partial / name).write_bytes(content)
    try:
        partial.replace(folder)
    except OSError:
        # another worker of this node was first
        shutil.rmtree(partial, ignore_errors=True)
    return folder
