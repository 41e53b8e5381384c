"""Where the time goes: traces of the environment's step and of a PPO iteration, and their costliest operators.

The traces are Chrome JSON: open them in https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.throughput_measure import HIDDEN, Setting, env_block, make_env, make_world

TOP = 12


def profiles(world: Path | None, device: str, folder: Path, *, num_envs: int = 1024) -> dict[str, Any]:
    """Profiles both on one thread.

    Args:
        world: Folder of the world; None = random tables.
        device: cpu or cuda.
        folder: Gets `trace_env_step.json` and `trace_ppo_iteration.json`.
        num_envs: Users served at once.

    Returns:
        For `env_step` and `ppo_iteration`: `total_ms` (wall of one unit, without the profiler), `operators` (name, own
        milliseconds and calls of one unit, share of the sum), `profiled_operators_ms`, `calls` and the trace's file.
    """
    from agents import ppo

    was = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        setting = Setting(
            "profile", "env", num_envs=num_envs, device=device, world=None if world is None else str(world)
        )
        table = make_world(setting)
        env = make_env(setting, table)
        step = env_block(env)
        args = ppo.Args(total_steps=table.horizon * num_envs, num_steps=table.horizon, epochs=4, hidden=HIDDEN)
        learner_env = make_env(setting, table)

        def iteration(count: int) -> int:
            for _ in range(count):
                ppo.train(learner_env, args, progress=False)
            return count

        return {
            "num_envs": num_envs,
            "env_step": _profile(step, 20, device, folder / "trace_env_step.json"),
            "ppo_iteration": _profile(iteration, 1, device, folder / "trace_ppo_iteration.json"),
        }
    finally:
        torch.set_num_threads(was)


def _profile(block: Callable[[int], int], count: int, device: str, trace: Path) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(ProfilerActivity.CUDA)
    block(2 if count > 1 else 1)
    began = time.perf_counter()
    block(count)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    total_ms = 1e3 * (time.perf_counter() - began) / count
    with profile(activities=activities) as found:
        block(count)
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))
    on_gpu = device.startswith("cuda")
    rows = []
    for event in found.key_averages():
        own_us = float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        rows.append({"name": event.key, "ms": own_us / 1e3 / count, "calls": event.count / count})
    rows.sort(key=lambda row: -row["ms"])
    inside = sum(row["ms"] for row in rows)
    return {
        "total_ms": total_ms,
        "profiled_operators_ms": inside,
        "calls": sum(row["calls"] for row in rows),
        "operators": [{**row, "share": row["ms"] / max(inside, 1e-12)} for row in rows[:TOP]],
        "trace": trace.name,
    }
