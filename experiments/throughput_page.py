"""The page of `experiments.throughput`: targets, tables, plots, and where the time goes."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.run_folder import write_atomic
from experiments.throughput_measure import HIDDEN
from experiments.throughput_work import ppo_flops

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """One line of the table of targets."""

    what: str
    """In words."""
    parts: tuple[str, ...]
    """Parts of which the fastest counts."""
    must: float
    """Steps a second, or a ratio where `against` is given."""
    stretch: float
    against: str | None = None
    """The part that it is divided by."""


CPU_TARGETS = (
    Target("environment alone, best batch", ("env_best_2processes", "env_best_2threads"), 200e3, 1e6),
    Target("our PPO end to end", ("ppo_2processes", "ppo_2threads", "ppo_large_minibatch_2processes",
                                  "ppo_large_minibatch_2threads"), 40e3, 80e3),
    Target("SB3's PPO, our adapter / `DummyVecEnv`, equal rows", ("sb3_adapter_64",), 5.0, math.inf, "sb3_dummy_64"),
    Target("SB3's PPO through our adapter", ("sb3_adapter", "sb3_adapter_2threads"), math.inf, 20e3),
    Target("single environment, `gymnasium.make`", ("single",), 1e3, 2.5e3),
)  # fmt: skip
GPU_TARGETS = (
    Target("environment alone, best batch", ("env_262144", "env_65536", "env_16384", "env_4096"), 5e6, 40e6),
    Target("our PPO end to end", ("ppo", "ppo_large_minibatch"), 2e6, 15e6),
    Target("SB3's PPO through our adapter, 4,096 users", ("sb3_adapter",), 100e3, 250e3),
    Target("catalogue of 1 M items, environment alone", ("items_1000000",), 100e3, 500e3),
)


def speed(row: dict[str, Any] | None) -> float | None:
    """Median steps a second of a part, None if it was not measured."""
    return None if row is None or "steps_per_s" not in row else float(row["steps_per_s"]["median"])


def shown(row: dict[str, Any] | None) -> str:
    """Median and quartiles of a part's speed as text."""
    if row is None or "steps_per_s" not in row:
        return f"failed: {row['error']}" if row is not None and "error" in row else "not measured"
    s = row["steps_per_s"]
    return f"{s['median']:,.0f} [{s['q1']:,.0f}, {s['q3']:,.0f}]"


def write_page(result: dict[str, Any], path: Path) -> Path:
    """Writes the page and, beside it, the plot; returns the page's path."""
    rows: Rows = result["parts"]
    device = next(iter(rows.values()))["setting"]["device"] if rows else "cpu"
    plot = _plot(rows, path.with_suffix(".png"))
    parts = [
        "# Throughput",
        _intro(result, rows),
        _targets(rows, device),
        _table(rows, result["best_batch"]),
        _work(rows),
        _scaling(rows, plot),
        _hashes(rows),
        _profile(result.get("profiles")),
        _how(result, rows),
    ]
    return write_atomic(path, "\n\n".join(part for part in parts if part) + "\n")


def _intro(result: dict[str, Any], rows: Rows) -> str:
    m = result["machine"]
    where = f"{m['gpu']}, {m['cpu']}" if "gpu" in m else f"{m['cpu']}, {m['cores']} cores"
    first: dict[str, Any] = next(iter(rows.values()), {"setting": {}})["setting"]
    world = f"world `{result['world']}`" if result["world"] else "random tables of the size of MovieLens-100K"
    load = result.get("load")
    busy = (
        f" The machine was not quiet (load {load:.1f} at the end): steps per CPU second are the fairer figures."
        if load is not None and load > m["cores"] + 0.5
        else ""
    )
    return (
        f"Measured on {where}; torch {m['torch']}, Python {m['python']}; {world}, slate 5, learned judge, random actions. A step "
        f"is one request of one user; rows that only reset do not count. Median [quartiles] of {first.get('windows', 5)} "
        f"windows of {first.get('window_s', 2):g} s after a warm-up.{busy}"
    )


def _targets(rows: Rows, device: str) -> str:
    lines = ["## Against the targets", "| | measured | must | stretch | reached |", "|---|---|---|---|---|"]
    title = "2 cores" if device == "cpu" else "one GPU"
    for target in CPU_TARGETS if device == "cpu" else GPU_TARGETS:
        lines.append(_target_line(target, rows, title))
    if device == "cpu":
        for target in GPU_TARGETS:
            limits = _limits(target)
            lines.append(f"| one H200: {target.what} | not measured: no GPU | {limits} | |")
        lines.append("")
        lines.append(
            "The rows of the H200 are measured by `python -m experiments.throughput --world WORLD --device cuda` on a machine "
            "that has one."
        )
    return "\n".join(lines)


def _limits(target: Target) -> str:
    return " | ".join("" if math.isinf(limit) else f"{limit:,.0f}" for limit in (target.must, target.stretch))


def _target_line(target: Target, rows: Rows, title: str) -> str:
    limits = _limits(target)
    measured = [(speed(rows.get(name)), name) for name in target.parts]
    found = max(((v, n) for v, n in measured if v is not None), default=None)
    if found is None:
        return f"| {title}: {target.what} | not measured | {limits} | |"
    value, name = found
    if target.against is None:
        text = f"{shown(rows[name])} (`{name}`)"
    else:
        other = speed(rows.get(target.against))
        if not other:
            return f"| {title}: {target.what} | not measured | {limits} | |"
        value, text = value / other, f"{value / other:.1f} x"
    reached = "stretch" if value >= target.stretch else "must" if value >= target.must else "no"
    return f"| {title}: {target.what} | {text} | {limits} | {reached} |"


def _table(rows: Rows, best: int) -> str:
    lines = [
        "## All of it",
        f"The environment alone is fastest at {best:,} users a batch; `_2processes` are two batches side by side, `_2threads` is "
        "one batch on two torch threads. Two processes of a learner are two learners, each with its own policy.",
        "",
        "| part | mode | users | steps/s | ms a vector step | steps per CPU second | / CartPole `make_vec` | / SB3 CartPole | "
        "first call s | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base, learner = speed(rows.get("cartpole_1024")), speed(rows.get("sb3_cartpole"))
    for name, row in rows.items():
        if row["setting"]["kind"] in ("ceilings", "hash"):
            continue
        if "error" in row:
            s = row["setting"]
            lines.append(f"| {name} | {_mode(s)} | {s['num_envs']:,} | failed: {row['error']} | | | | | | |")
            continue
        s, value = row["setting"], row["steps_per_s"]["median"]
        learns = s["kind"] in ("ppo", "sb3", "sb3_dummy", "sb3_cartpole")
        other = learner if learns else base
        # the environment of two processes is compared with CartPole in two processes
        if not learns and s["processes"] > 1:
            other = speed(rows.get(f"cartpole_1024_{s['processes']}processes"))
        ratio = f"{value / other:.3g}" if other else ""
        gpu = f" + {row['device_peak_bytes'] / 1e9:.2f} on the GPU" if "device_peak_bytes" in row else ""
        users = f"{s['num_envs']:,}" + (f" x {s['processes']}" if s["processes"] > 1 else "")
        lines.append(
            f"| {name} | {_mode(s)} | {users} | {shown(row)} | {row['ms_per_vec_step']['median']:,.3f} | "
            f"{row['steps_per_cpu_s']['median']:,.0f} | {'' if learns else ratio} | {ratio if learns else ''} | "
            f"{row['first_s']:.2f} | {row['peak_bytes'] / 1e9:.2f}{gpu} |"
        )
    return "\n".join(lines)


def _mode(setting: dict[str, Any]) -> str:
    """How a part played: `eager` steps, or a captured rollout's mode."""
    if setting["kind"] not in ("env", "policy", "ppo"):
        return ""
    mode = setting.get("mode", "step")
    return "eager" if mode == "step" else f"captured, {mode}"


def _work(rows: Rows) -> str:
    lines = ["## Against the machine's limits"]
    for name, words in (("ceilings_1", "one thread"), ("ceilings_2threads", "two threads")):
        row = rows.get(name, {})
        if "flops_per_s" in row:
            lines.append(
                f"- {words}: {row['bytes_per_s']['median'] / 1e9:.1f} GB/s (triad of float32 vectors), "
                f"{row['flops_per_s']['median'] / 1e9:.0f} GFLOP/s (float32 matrix product)"
            )
    body = []
    for name, row in rows.items():
        work = row.get("facts", {}).get("work")
        if work is None or not name.startswith(("env", "items", "policy")):
            continue
        double = row["setting"]["processes"] * row["setting"]["threads"] > 1
        ceiling = rows.get("ceilings_2threads" if double else "ceilings_1", {})
        value = row["steps_per_s"]["median"]
        moved, flops = value * work["bytes_moved"], value * work["flops"]
        shares = ("", "")
        if "flops_per_s" in ceiling:
            shares = (
                f" ({moved / ceiling['bytes_per_s']['median']:.1%})",
                f" ({flops / ceiling['flops_per_s']['median']:.1%})",
            )
        body.append(
            f"| {name} | {work['bytes_moved'] / 1e3:.1f} | {work['flops'] / 1e3:.0f} | {moved / 1e9:.2f}{shares[0]} | "
            f"{flops / 1e9:.1f}{shares[1]} |"
        )
    if not body:
        return ""
    lines += [
        "",
        "The least that a step must do (every entry read once, state read and written once: `experiments/throughput_work.py`), "
        "times the measured speed, and its share of what the machine gives:",
        "",
        "| part | kB a step | kFLOP a step | GB/s | GFLOP/s |",
        "|---|---|---|---|---|",
        *body,
    ]
    ppo = [name for name in rows if name.startswith("ppo") and speed(rows[name])]
    if ppo:
        facts = rows[ppo[0]]["facts"]
        flops = ppo_flops(facts["obs_dim"], facts["num_strategies"], HIDDEN, 4)
        said = ", ".join(f"`{name}` {(speed(rows[name]) or 0) * flops / 1e9:.1f} GFLOP/s" for name in ppo)
        lines += ["", f"PPO's networks alone need {flops / 1e3:.0f} kFLOP a request (4 epochs, 64 x 64): {said}."]
    return "\n".join(lines)


def _series(rows: Rows, prefix: str) -> list[tuple[int, float]]:
    found = []
    for name, row in rows.items():
        number = name.removeprefix(prefix)
        if name.startswith(prefix) and number.isdigit() and "steps_per_s" in row:
            found.append((int(number), 1e3 * row["ms_per_vec_step"]["median"] / row["setting"]["num_envs"]))
    return sorted(found)


SCALES = (
    ("env_", "users in the batch", 0),
    ("strategies_", "strategies", 1),
    ("slate_", "items in the slate", 1),
    ("items_", "items in the catalogue", 0),
)
"""Prefix of the parts, axis, and the power of its number that a linear cost of one step of one user would grow with."""


def _scaling(rows: Rows, plot: str | None) -> str:
    lines = [
        "## How it grows",
        "Microseconds of one step of one user:",
        "",
        "| | | growth of the cost | linear would be |",
        "|---|---|---|---|",
    ]
    for prefix, axis, power in SCALES:
        series = _series(rows, prefix)
        if len(series) < 2:
            continue
        costs = ", ".join(f"{n:,}: {us:.1f}" for n, us in series)
        (low, first), (high, last) = series[0], series[-1]
        # per user: equal cost in any batch is linear in users; the catalogue should not matter at all
        lines.append(f"| {axis} | {costs} | {last / first:.2f} x | {(high / low) ** power:.3g} x |")
    users = rows.get("users_many")
    if users is not None and "peak_bytes" in users:
        lines += [
            "",
            f"{users['setting']['num_envs']:,} users at once: {users['peak_bytes'] / 1e9:.2f} GB peak of the whole process "
            f"({'below' if users['peak_bytes'] < 4e9 else 'above'} 4 GB), {shown(users)} steps/s.",
        ]
    lines += ["", f"![scaling]({plot})" if plot else "The plot needs matplotlib, which was not there."]
    return "\n".join(lines)


def _plot(rows: Rows, path: Path) -> str | None:
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 3), layout="constrained")
    axes: Any = figure.subplots(1, len(SCALES))
    drawn = False
    for axis, (prefix, label, power) in zip(axes, SCALES, strict=True):
        series = _series(rows, prefix)
        axis.set_xlabel(label)
        if not series:
            continue
        drawn = True
        x = [n for n, _ in series]
        axis.plot(x, [us for _, us in series], "o-", color="#1b6ca8", label="measured")
        axis.plot(x, [series[0][1] * (n / x[0]) ** power for n in x], "--", color="#999999", label="linear cost")
        axis.set_xscale("log")
        axis.set_yscale("log")
        # a tick for each point measured: those of a narrow logarithmic axis run into each other
        axis.set_xticks(x, [f"{n:,}" if n < 10_000 else f"{n:.0e}".replace("e+0", "e") for n in x], fontsize=7)
        axis.minorticks_off()
        ticks = [t for t in (5, 10, 20, 50, 100, 200, 500) if min(axis.get_ylim()) <= t <= max(axis.get_ylim())]
        axis.set_yticks(ticks, [str(t) for t in ticks])
    axes[0].set_ylabel("us per user and step")
    axes[0].legend(frameon=False)
    if not drawn:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
    return path.name


def _hashes(rows: Rows) -> str:
    found = rows.get("hash", {}).get("hashes")
    if found is None:
        return ""
    values = found["ways"]
    ways = ", ".join(values)
    if found["equal"]:
        text = f"One trajectory, played as {ways}: the same hash, `{next(iter(values.values()))}`."
    else:
        text = "**One trajectory has different hashes**: " + ", ".join(
            f"{way} `{value}`" for way, value in values.items()
        )
    if "reward_agreement" in found:
        text += f" On CPU `{found['cpu']}`; {found['reward_agreement']:.2%} of the rewards are the same number."
    if "bfloat16" in found:
        near = found["bfloat16"]
        text += (
            "\n\nTables of items are float32. In bfloat16, half the memory, the expected reward of a request would be off by up "
            f"to {near['largest']:.2%} of its mean ({near['mean']:.3%} on average), and {near['other']:.2%} of the users would "
            "answer the first request otherwise: another MDP, which no parity test could tell from an error."
        )
    return f"## The same MDP\n{text}"


def _profile(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    lines = [
        "## Where the time goes",
        f"torch.profiler, one thread, {found['num_envs']:,} users; own time of each operator.",
    ]
    for key, title in (
        ("env_step", "One step of the environment"),
        ("ppo_iteration", "One call of PPO with one iteration"),
    ):
        part = found[key]
        lines += [
            "",
            f"**{title}**: {part['total_ms']:.2f} ms, {part['calls']:,.0f} operator calls, "
            f"{part['profiled_operators_ms']:.2f} ms inside operators while profiled; trace `{part['trace']}` "
            "(open it in Perfetto).",
            "",
            "| operator | own ms | calls | share |",
            "|---|---|---|---|",
            *(f"| `{o['name']}` | {o['ms']:.3f} | {o['calls']:,.1f} | {o['share']:.1%} |" for o in part["operators"]),
        ]
    lines += ["", _limit(found["env_step"])]
    return "\n".join(lines)


MATRIX = ("mm", "bmm", "linear", "baddbmm")


def _limit(step: dict[str, Any]) -> str:
    """What binds the step, in words, from the kinds of its costliest operators."""
    groups: dict[str, Callable[[str], bool]] = {
        "matrix products": lambda name: any(word in name for word in MATRIX),
        "gathers and scatters": lambda name: any(w in name for w in ("index", "gather", "scatter", "take")),
        "copies and fills": lambda name: any(
            w in name for w in ("copy", "cat", "fill", "zero", "clone", "pad", "stack")
        ),
    }
    shares = dict.fromkeys([*groups, "elementwise and the rest"], 0.0)
    for operator in step["operators"]:
        group = next((g for g, holds in groups.items() if holds(operator["name"])), "elementwise and the rest")
        shares[group] += operator["share"]
    said = ", ".join(f"{group} {share:.0%}" for group, share in sorted(shares.items(), key=lambda item: -item[1]))
    call_us = 1e3 * step["profiled_operators_ms"] / max(step["calls"], 1)
    outside = max(0.0, 1.0 - step["profiled_operators_ms"] / max(step["total_ms"], 1e-12))
    return (
        f"Of the step's costliest operators: {said}. A call takes {call_us:.1f} us "
        f"on average, and {outside:.0%} of the step lies outside operators (Python); what a batch can still gain lies in fewer, "
        "larger calls as long as calls are this short."
    )


def _how(result: dict[str, Any], rows: Rows) -> str:
    first: dict[str, Any] = next(iter(rows.values()), {"setting": {}})["setting"]
    lines = [
        "## How it was measured",
        "- Each part in a process of its own: peak memory is that of the whole process, libraries and world included.",
        "- `first call`: the first step (compilation and allocation), for learners the first iterations; not in the speeds.",
        "- Mode: `eager` calls the environment's `step`; `captured` plays whole rollouts without the host "
        "(`metarec_gym/envs/captured.py`) by plain calls (`eager`), a step compiled by `torch.compile` (`compile`, on CPU its "
        "C++ backend), or a CUDA graph (`graph`).",
        "- PPO: 64 x 64 tanh networks, 4 epochs, rollouts of one horizon; minibatches of 1,056 requests, `large_minibatch` of "
        "8,448. SB3 at the same settings; SB3 on CartPole: 8 environments, 128 steps, minibatches of 256, 4 epochs.",
        "- Rows `items_`, `strategies_`, `slate_` run on random tables (`experiments/random_world.py`), judge of one network for "
        "`items_`: what a step costs hangs on shapes.",
        f"- Key of the run: `{result.get('key', '')}`; settings of a part: `{json.dumps(first)}`.",
    ]
    return "\n".join(lines)
