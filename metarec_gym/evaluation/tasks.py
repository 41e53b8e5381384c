"""Long work cut into tasks; a result is a file that appears completely or not at all: a kill loses little."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

_advance: Callable[[int], None] | None = None
_pool: tuple[int, ProcessPoolExecutor, Any] | None = None


@dataclass(frozen=True)
class Task:
    """A call whose result is a set of arrays.

    Attributes:
        key: Name of its file; two tasks with one key are the same work.
        call: An importable function, so that another process can run it.
        kwargs: Its arguments, picklable when several workers run.
        weight: Expected amount of work (user-steps), for the time left.
    """

    key: str
    call: Callable[..., Arrays]
    kwargs: dict[str, Any] = field(default_factory=dict)
    weight: int = 1


def advance(amount: int) -> None:
    """Called by running tasks: so much of the weight is done."""
    if _advance is not None:
        _advance(amount)


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Writes an .npz file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)


def load_arrays(path: Path) -> Arrays:
    """Reads an .npz file; objects (pickle) are refused."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def run_tasks(
    tasks: Sequence[Task],
    *,
    folder: Path | None,
    workers: int = 1,
    title: str = "",
    progress: bool = True,
    unit: str = "step",
    spawn_above: int = 500_000,
) -> dict[str, Arrays]:
    """Runs what has no file yet and returns every result.

    Args:
        tasks: The work; equal keys are run once.
        folder: Where results are kept; None keeps nothing.
        workers: Processes, each with one torch thread; 1 runs here.
        title: Text before the bar.
        progress: Shows a bar with the time left.
        unit: Unit of the tasks' weights.
        spawn_above: Less weight than this runs here: starting processes takes seconds.

    Returns:
        Result by key.
    """
    from tqdm import tqdm

    results: dict[str, Arrays] = {}
    todo: dict[str, Task] = {}
    for task in tasks:
        file = folder / f"{task.key}.npz" if folder is not None else None
        if file is not None and file.is_file():
            results[task.key] = load_arrays(file)
        else:
            todo[task.key] = task
    if not todo:
        return results

    def keep(key: str, arrays: Arrays) -> None:
        if folder is not None:
            save_arrays(folder / f"{key}.npz", arrays)
        results[key] = arrays

    total = sum(task.weight for task in todo.values())
    # a log file is not rewritten: few lines there, many updates on a terminal
    every_s = 0.3 if sys.stderr.isatty() else 15.0
    bar = tqdm(total=total, desc=title, unit=unit, unit_scale=True, disable=not progress, mininterval=every_s)
    try:
        if workers <= 1 or len(todo) == 1 or total < spawn_above:
            _run_here(list(todo.values()), keep, lambda n: _update(bar, bar.n + n))
        else:
            _run_in_processes(list(todo.values()), keep, workers, lambda n: _update(bar, n))
        _update(bar, total)
    finally:
        bar.close()
    return results


def _update(bar: Any, position: float) -> None:
    # task weights are estimates; the bar must not run past its end
    bar.update(min(position, bar.total) - bar.n)


def _run_here(tasks: list[Task], keep: Callable[[str, Arrays], None], moved: Callable[[int], None]) -> None:
    global _advance
    before, _advance = _advance, moved
    try:
        for task in tasks:
            keep(task.key, task.call(**task.kwargs))
    finally:
        _advance = before


def _run_in_processes(
    tasks: list[Task], keep: Callable[[str, Arrays], None], workers: int, position: Callable[[int], None]
) -> None:
    pool, counter = _workers(workers)
    start = counter.value
    # heavy tasks first: no worker then waits for one long task at the end
    ordered = sorted(tasks, key=lambda t: -t.weight)
    waiting: dict[Future[Arrays], str] = {pool.submit(task.call, **task.kwargs): task.key for task in ordered}
    try:
        while waiting:
            finished, _ = wait(waiting, timeout=0.3, return_when="FIRST_COMPLETED")
            for future in finished:
                keep(waiting.pop(future), future.result())
            position(counter.value - start)
    except BaseException:
        stop_workers()
        raise


def _workers(count: int) -> tuple[ProcessPoolExecutor, Any]:
    """The processes, started once: each must import torch, which takes seconds."""
    global _pool
    if _pool is None or _pool[0] != count:
        stop_workers()
        # spawn: a forked torch deadlocks in its thread pool
        context = get_context("spawn")
        counter = context.Value("q", 0)
        pool = ProcessPoolExecutor(count, mp_context=context, initializer=_init_worker, initargs=(counter, os.getpid()))
        _pool = (count, pool, counter)
    return _pool[1], _pool[2]


@atexit.register
def stop_workers() -> None:
    """Ends the worker processes; what they have not finished is dropped."""
    global _pool
    if _pool is not None:
        _pool[1].shutdown(wait=True, cancel_futures=True)
        _pool = None


def _init_worker(counter: Any, parent: int) -> None:
    global _advance
    torch.set_num_threads(1)

    def add(amount: int) -> None:
        with counter.get_lock():
            counter.value += amount

    _advance = add

    def watch() -> None:
        # a killed parent cannot stop its workers: they would wait for work for ever
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def one_thread() -> None:
    """One torch thread in this process: small batches run faster on one, and workers fill the other cores."""
    torch.set_num_threads(1)
