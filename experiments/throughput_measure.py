"""One measurement of `experiments.throughput`, in a process of its own: windows after a warm-up, start-up apart, peak memory.

    python -m experiments.throughput_measure '{"name": "env", "kind": "env", "num_envs": 256}' part.json

Only transitions of users count as steps: rows that Gymnasium's next-step mode spends on a reset do not. With two processes each
has its own batch; windows start together, and a rate is the steps of both over the time from the first start to the last end.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from experiments.run_folder import write_atomic
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import MlpPolicy, sample_actions
from metarec_gym.seeding import torch_generator
from metarec_gym.world import World, resolve_world

POOL = 16
"""Batches of actions drawn beforehand, so that drawing them costs an environment nothing."""
HIDDEN = (64, 64)


@dataclass(frozen=True)
class Setting:
    """What is measured; every field decides the number."""

    name: str
    """File name of the result."""
    kind: str
    """env, policy, ppo, sb3, sb3_dummy, single, cartpole, sb3_cartpole, ceilings or hash."""
    num_envs: int = 1
    """Users served at once, in each process."""
    world: str | None = None
    """Folder of a world; None = a random one of the sizes in `sizes`."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Fields of `RandomWorld`."""
    env: dict[str, Any] = field(default_factory=dict)
    """Settings of the environment, such as `action`."""
    mode: str = "step"
    """How requests are played: `step` calls the environment; `eager`, `compile` and `graph` are captured rollouts."""
    output: str = "torch"
    """What the environment hands out."""
    device: str = "cpu"
    """Where it runs."""
    processes: int = 1
    """Processes, each with its own batch."""
    threads: int = 1
    """Torch threads of each process."""
    minibatch_size: int = 1056
    """Requests a gradient step, for the learners."""
    windows: int = 5
    """Windows measured after the warm-up."""
    window_s: float = 2.0
    """Seconds of each window, about."""


@dataclass
class Windows:
    """Start, end (monotonic seconds), CPU seconds and steps of each window, and what came before."""

    start: list[float] = field(default_factory=list)
    end: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    vec_steps: list[int] = field(default_factory=list)
    first_s: float = 0.0
    """The first call: compilation, capture and allocation, in seconds."""
    facts: dict[str, Any] = field(default_factory=dict)


Wait = Callable[[], None]


def measure(block: Callable[[int], int], setting: Setting, wait: Wait) -> Windows:
    """Windows of `block(n)`, which makes n vector steps and returns how many transitions they were.

    Args:
        block: What is measured.
        setting: Number and length of windows.
        wait: Returns when every process has called it.
    """
    found = Windows()
    began = time.monotonic()
    block(1)
    _sync(setting.device)
    found.first_s = time.monotonic() - began
    # the warm-up tells how many steps fill a window
    count, began = 0, time.monotonic()
    while count < 2 or time.monotonic() - began < setting.window_s / 2:
        block(1)
        _sync(setting.device)
        count += 1
    per_window = max(1, round(count * setting.window_s / (time.monotonic() - began)))
    for _ in range(setting.windows):
        wait()
        cpu, start = time.process_time(), time.monotonic()
        steps = block(per_window)
        _sync(setting.device)
        found.start.append(start)
        found.end.append(time.monotonic())
        found.cpu_s.append(time.process_time() - cpu)
        found.steps.append(steps)
        found.vec_steps.append(per_window)
    return found


def rates(parts: list[Windows]) -> list[float]:
    """Steps a second of each window, all processes together."""
    return [
        sum(p.steps[i] for p in parts) / (max(p.end[i] for p in parts) - min(p.start[i] for p in parts))
        for i in range(min(len(p.steps) for p in parts))
    ]


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "q1": low, "q3": high}


def _sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ environments
def make_world(setting: Setting) -> World:
    """The world of a setting."""
    if setting.world is not None:
        return resolve_world(Path(setting.world))
    from experiments.random_world import RandomWorld

    return RandomWorld(**setting.sizes).build()


def make_env(setting: Setting, world: World, **changes: Any) -> MetaRecVectorEnv:
    """The environment of a setting."""
    options = {"output": setting.output, "device": setting.device, "autoreset_mode": "SameStep", **changes}
    return MetaRecVectorEnv(setting.num_envs, world=world, **options, **setting.env)


def drawn_actions(env: MetaRecVectorEnv, seed: int = 0) -> list[Any]:
    """`POOL` batches of random actions in the form that the environment gives."""
    generator = torch_generator(seed, "throughput actions")
    rows, strategies = env.num_envs, env.world.n_strategies
    if env.config.action == "blend":
        drawn = torch.rand(POOL, rows, strategies, generator=generator) * 2 - 1
    elif env.config.action == "slots":
        drawn = torch.randint(strategies, (POOL, rows, env.slate_size), generator=generator)
    else:
        drawn = torch.randint(strategies, (POOL, rows), generator=generator)
    if env.output == "numpy":
        return list(drawn.numpy())
    return list(drawn.to(env.device))


def env_block(env: MetaRecVectorEnv) -> Callable[[int], int]:
    """Steps with actions drawn beforehand."""
    actions = drawn_actions(env)
    env.reset(seed=0)
    done = 0

    def block(count: int) -> int:
        nonlocal done
        for _ in range(count):
            env.step(actions[done % POOL])
            done += 1
        return count * env.num_envs

    return block


def random_policy(obs_dim: int, num_strategies: int, device: str) -> MlpPolicy:
    """An untrained tanh network of the usual size: it costs what a trained one does."""
    generator = torch_generator(0, "throughput policy")
    widths = [obs_dim, *HIDDEN, num_strategies]
    layers = [
        (torch.randn(out, size, generator=generator) * size**-0.5, torch.zeros(out))
        for size, out in itertools.pairwise(widths)
    ]
    return MlpPolicy(layers, tuple(str(k) for k in range(num_strategies))).to(device)


def policy_block(env: MetaRecVectorEnv) -> Callable[[int], int]:
    """Steps with actions that a policy network chooses from the observation."""
    obs, info = env.reset(seed=0)
    policy = random_policy(obs.shape[1], env.world.n_strategies, str(env.device))
    generator = torch_generator(0, "throughput draws", device=env.device)
    last = {"obs": obs, "mask": info["action_mask"]}

    @torch.no_grad()
    def block(count: int) -> int:
        for _ in range(count):
            probs = policy.action_probs(last["obs"], last["mask"].to(torch.bool))
            draw = torch.rand(env.num_envs, generator=generator, device=env.device)
            last["obs"], _, _, _, info = env.step(sample_actions(probs, draw))
            last["mask"] = info["action_mask"]
        return count * env.num_envs

    return block


def single_block(setting: Setting, world: World) -> Callable[[int], int]:
    """`gymnasium.make`, one user at a time."""
    import metarec_gym  # noqa: F401  registers the ids

    env = gym.make("MetaRec/Select-v0", world=world, device=setting.device)
    actions = torch.randint(world.n_strategies, (1024,), generator=torch_generator(0, "throughput single")).tolist()
    env.reset(seed=0)
    done = 0

    def block(count: int) -> int:
        nonlocal done
        for _ in range(count):
            _, _, terminated, truncated, _ = env.step(actions[done % 1024])
            done += 1
            if terminated or truncated:
                env.reset()
        return count

    return block


def cartpole_block(num_envs: int) -> Callable[[int], int]:
    """Gymnasium's own vectorised CartPole; in its next-step mode a row that was reset is no transition."""
    env = gym.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")
    actions = np.random.default_rng(0).integers(2, size=(POOL, num_envs))
    env.reset(seed=0)
    idle, done = 0, 0

    def block(count: int) -> int:
        nonlocal idle, done
        steps = 0
        for _ in range(count):
            _, _, terminated, truncated, _ = env.step(actions[done % POOL])
            done += 1
            steps += num_envs - idle
            idle = int(np.count_nonzero(terminated | truncated))
        return steps

    return block


# ------------------------------------------------------------------------------------------------ learners
def ppo_windows(setting: Setting, world: World, wait: Wait) -> Windows:
    """Iterations of `agents.ppo`, rollout and update; the first one is the warm-up."""
    from agents import ppo

    env = make_env(setting, world)
    per_iteration = world.horizon * setting.num_envs

    def args(iterations: int) -> ppo.Args:
        return ppo.Args(
            total_steps=iterations * per_iteration,
            num_steps=world.horizon,
            epochs=4,
            minibatch_size=setting.minibatch_size,
            hidden=HIDDEN,
            rollout="eager" if setting.mode == "step" else setting.mode,  # type: ignore[arg-type]
        )

    found = Windows()
    began = time.monotonic()
    probe = ppo.train(env, args(2), progress=False)
    found.first_s = time.monotonic() - began
    last_s = _iteration_seconds(probe.history)[-1]
    # a window is as many whole iterations as fill it
    each = max(1, round(setting.window_s / last_s))
    wait()
    cpu, began = time.process_time(), time.monotonic()
    result = ppo.train(env, args(1 + each * setting.windows), progress=False)
    wall, cpu = time.monotonic() - began, time.process_time() - cpu
    seconds = _iteration_seconds(result.history)[1:]
    at = began
    for i in range(setting.windows):
        length = sum(seconds[i * each : (i + 1) * each])
        found.start.append(at)
        found.end.append(at := at + length)
        found.steps.append(each * per_iteration)
        found.vec_steps.append(each * world.horizon)
        found.cpu_s.append(cpu / wall * length)
    found.facts = {
        "whole_call_per_s": result.steps / wall,
        "mode": setting.mode,
        "minibatch_size": setting.minibatch_size,
        "obs_dim": int(env.single_observation_space.shape[0]),  # type: ignore[index]
        "num_strategies": world.n_strategies,
    }
    return found


def _iteration_seconds(history: list[dict[str, float]]) -> list[float]:
    """Seconds of each iteration out of the running mean speed that PPO logs."""
    total = [row["step"] / row["time/fps"] for row in history]
    return [after - before for before, after in zip([0.0, *total[:-1]], total, strict=True)]


def sb3_windows(setting: Setting, wait: Wait) -> Windows:
    """Iterations of Stable-Baselines3's PPO: through our adapter, through its own `DummyVecEnv`, or on CartPole."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    rows: Any
    num_steps, batch = 128, 256
    if setting.kind == "sb3_cartpole":
        rows = make_vec_env("CartPole-v1", n_envs=setting.num_envs, seed=0)
    else:
        world = make_world(setting)
        num_steps, batch = world.horizon, setting.minibatch_size
        if setting.kind == "sb3":
            from metarec_gym.envs.sb3 import SB3VecEnv

            rows = SB3VecEnv(make_env(setting, world, output="numpy"))
        else:
            import metarec_gym  # noqa: F401  registers the ids

            kwargs = {"world": world, "device": setting.device}
            rows = make_vec_env("MetaRec/Select-v0", n_envs=setting.num_envs, seed=0, env_kwargs=kwargs)

    class Clock(BaseCallback):
        """Notes when every iteration begins, and how long the first one took."""

        def __init__(self) -> None:
            super().__init__()
            self.began: list[tuple[float, float]] = []

        def _on_rollout_start(self) -> None:
            self.began.append((time.monotonic(), time.process_time()))

        def _on_step(self) -> bool:
            return True

    model = PPO("MlpPolicy", rows, n_steps=num_steps, batch_size=batch, n_epochs=4, seed=0, device=setting.device,
                policy_kwargs={"net_arch": list(HIDDEN), "activation_fn": torch.nn.Tanh})  # fmt: skip
    per_iteration, found, clock = num_steps * setting.num_envs, Windows(), Clock()
    model.learn(2 * per_iteration, callback=clock)
    found.first_s = clock.began[1][0] - clock.began[0][0]
    each = max(1, round(setting.window_s / found.first_s))
    clock = Clock()
    wait()
    model.learn((1 + each * setting.windows) * per_iteration, callback=clock, reset_num_timesteps=True)
    clock.began.append((time.monotonic(), time.process_time()))
    marks = clock.began[1::each]
    for (start, cpu), (end, cpu_end) in itertools.pairwise(marks):
        found.start.append(start)
        found.end.append(end)
        found.cpu_s.append(cpu_end - cpu)
        found.steps.append(each * per_iteration)
        found.vec_steps.append(each * num_steps)
    found.facts = {"minibatch_size": batch, "num_steps": num_steps}
    return found


# ------------------------------------------------------------------------------------------------ ceilings
def ceilings(setting: Setting) -> dict[str, Any]:
    """What the machine gives at best: a triad a = b + s * c (three arrays of memory traffic) and a matrix product, float32."""
    device, on_gpu = torch.device(setting.device), setting.device.startswith("cuda")
    size, side = (1 << 27, 8192) if on_gpu else (1 << 24, 1024)
    a, b, c = (torch.rand(size, device=device) for _ in range(3))
    x, y = (torch.rand(side, side, device=device) for _ in range(2))
    out = torch.empty_like(x)

    def triad(count: int) -> int:
        for _ in range(count):
            torch.add(b, c, alpha=0.5, out=a)
        return count * 3 * 4 * size

    def product(count: int) -> int:
        for _ in range(count):
            torch.mm(x, y, out=out)
        return count * 2 * side**3

    short = dataclasses.replace(setting, window_s=min(setting.window_s, 1.0))
    found = {}
    for name, block in (("bytes_per_s", triad), ("flops_per_s", product)):
        found[name] = spread(rates([measure(block, short, lambda: None)]))
    return found


# ------------------------------------------------------------------------------------------------ one part
def windows_of(setting: Setting, wait: Wait = lambda: None) -> Windows:
    """Measures a setting in this process."""
    torch.set_num_threads(setting.threads)
    if setting.kind.startswith("sb3"):
        return sb3_windows(setting, wait)
    if setting.kind == "cartpole":
        return measure(cartpole_block(setting.num_envs), setting, wait)
    world = make_world(setting)
    if setting.kind == "ppo":
        return ppo_windows(setting, world, wait)
    if setting.kind == "single":
        return measure(single_block(setting, world), setting, wait)
    env = make_env(setting, world)
    if setting.mode == "step":
        found = measure(policy_block(env) if setting.kind == "policy" else env_block(env), setting, wait)
    else:
        from experiments.throughput_captured import captured_block

        found = measure(captured_block(env, setting.mode, with_policy=setting.kind == "policy"), setting, wait)
        found.vec_steps = [steps // env.num_envs for steps in found.steps]
    from experiments.throughput_work import env_work

    found.facts = {"work": dataclasses.asdict(env_work(env)), "mode": setting.mode}
    return found


def _worker(setting: Setting, barrier: Any, answers: Any) -> None:
    answers.put((windows_of(setting, lambda: barrier.wait(600)), _peak_bytes()))


def _peak_bytes() -> int:
    # Linux counts in KiB, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_part(setting: Setting) -> dict[str, Any]:
    """Measures a setting, in as many processes as it says; JSON-able."""
    row: dict[str, Any] = {"setting": dataclasses.asdict(setting)}
    if setting.kind == "hash":
        from experiments.throughput_hash import hashes

        return {**row, "hashes": hashes(make_world(setting), setting.device, rows=setting.num_envs)}
    if setting.kind == "ceilings":
        torch.set_num_threads(setting.threads)
        return {**row, **ceilings(setting)}
    if setting.processes == 1:
        parts, peaks = [windows_of(setting)], [_peak_bytes()]
    else:
        # spawned: a forked torch with threads can hang
        context = multiprocessing.get_context("spawn")
        barrier, answers = context.Barrier(setting.processes), context.SimpleQueue()
        workers = [
            context.Process(target=_worker, args=(setting, barrier, answers), daemon=True)
            for _ in range(setting.processes)
        ]
        for worker in workers:
            worker.start()
        found = [answers.get() for _ in workers]
        for worker in workers:
            worker.join()
        parts, peaks = [part for part, _ in found], [peak for _, peak in found]
    per_s = rates(parts)
    step_ms = [
        1e3 * (part.end[i] - part.start[i]) / part.vec_steps[i] for part in parts for i in range(len(part.steps))
    ]
    cpu = [steps / max(cpu_s, 1e-9) for part in parts for steps, cpu_s in zip(part.steps, part.cpu_s, strict=True)]
    row |= {
        "steps_per_s": spread(per_s),
        "windows": per_s,
        "ms_per_vec_step": spread(step_ms),
        "steps_per_cpu_s": spread(cpu),
        "first_s": max(part.first_s for part in parts),
        "peak_bytes": sum(peaks),
        "facts": parts[0].facts,
    }
    if setting.device.startswith("cuda"):
        row["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def main() -> None:
    """The command line: a setting as JSON, and where the result goes."""
    given, out = sys.argv[1:]
    write_atomic(Path(out), json.dumps(run_part(Setting(**json.loads(given))), indent=2) + "\n")


if __name__ == "__main__":
    main()
