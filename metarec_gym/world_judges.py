"""Fits the judges of a world, side by side where there are cores: one thread each, so that no bit depends on how many."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from metarec_gym.devices import single_thread
from metarec_gym.response.frozen import FrozenResponse

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset
    from metarec_gym.response.config import ResponseConfig

Fitted = tuple[FrozenResponse, dict[str, Any]]


@dataclass(frozen=True)
class JudgeJob:
    """One judge to fit."""

    dataset: Dataset
    users: Tensor
    others: Tensor
    """Users it is scored on."""
    seed: int
    config: ResponseConfig
    members: int
    base: Fitted | None
    """The main judge and its metrics, if this is a variant of it."""
    stage: Path | None
    """Where it is kept (.safetensors, .json) while the build lasts."""
    device: str = "cpu"
    """Where it is fitted."""


def fit_judges(
    jobs: Mapping[str, JudgeJob], workers: int, say: Callable[[str], None], progress: bool
) -> dict[str, Fitted]:
    """Fits every job, or finds it finished.

    Args:
        jobs: The jobs by name.
        workers: Processes; with 1 all is done in this one.
        say: Prints a line.
        progress: Shows a bar for a judge that is fitted in this process.

    Returns:
        The judges and their metrics by name.
    """
    done = {key: found for key, job in jobs.items() if (found := _stored(job)) is not None}
    for key in done:
        say(f"judge {key}: found")
    left = {key: job for key, job in jobs.items() if key not in done}
    begun = time.perf_counter()
    if workers == 1 or len(left) < 2:
        for key, job in left.items():
            say(f"fitting judge {key} on {len(job.users)} users")
            done[key] = fit_judge(job, progress)
    else:
        say(f"fitting {len(left)} judges in {workers} processes: {', '.join(left)}")
        # spawn: a forked torch deadlocks in its thread pool
        context = get_context("spawn")
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=_init_worker, initargs=(os.getpid(),)
        ) as pool:
            # by value: tensors sent as tensors would take shared memory, of which containers have little
            futures = {pool.submit(_fit_bytes, pickle.dumps(job)): key for key, job in left.items()}
            for count, future in enumerate(as_completed(futures), start=1):
                key = futures[future]
                tensors, outcomes, names, metrics = pickle.loads(future.result())
                done[key] = FrozenResponse(tensors, outcomes, names), metrics
                spent = time.perf_counter() - begun
                say(
                    f"judge {key} fitted; about {spent / count * (len(left) - count):.0f} s left for {len(left) - count} more"
                )
    return {key: done[key] for key in jobs}


def fit_judge(job: JudgeJob, progress: bool) -> Fitted:
    """Fits one judge on one thread and keeps it."""
    from metarec_gym.response import fitting

    settings: dict[str, Any] = {
        "seed": job.seed,
        "config": job.config,
        "heldout_users": job.others,
        "members": job.members,
        "progress": progress,
        "device": job.device,
    }
    with single_thread():
        if job.base is None:
            judge, metrics = fitting.fit_response(job.dataset, job.users, **settings)
        else:
            judge, metrics = fitting.fit_variant(job.dataset, job.users, *job.base, **settings)
    if job.stage is not None:
        save_file(judge.tensors, str(job.stage.with_suffix(".safetensors")))
        header = {"outcomes": judge.outcomes, "feature_names": judge.feature_names, "metrics": metrics}
        # the JSON is written last: its presence says that the stage is complete
        write_text(job.stage.with_suffix(".json"), json.dumps(header))
    return judge, metrics


def _init_worker(parent: int) -> None:
    def watch() -> None:
        # a killed parent cannot stop its workers: they would fit on for minutes
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _fit_bytes(job: bytes) -> bytes:
    judge, metrics = fit_judge(pickle.loads(job), False)
    return pickle.dumps((judge.tensors, judge.outcomes, judge.feature_names, metrics))


def _stored(job: JudgeJob) -> Fitted | None:
    if job.stage is None or not job.stage.with_suffix(".json").is_file():
        return None
    header = json.loads(job.stage.with_suffix(".json").read_text())
    tensors = load_file(str(job.stage.with_suffix(".safetensors")))
    return FrozenResponse(tensors, tuple(header["outcomes"]), tuple(header["feature_names"])), header["metrics"]


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
