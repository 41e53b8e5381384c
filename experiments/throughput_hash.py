"""One fixed trajectory, played in every way that must not change it: equal hashes mean that no speed was bought with another MDP.

Row i of a batch seeded s meets the same user with the same luck as row 0 of a batch seeded s + i. So the first rows of a larger
batch, the halves of two batches, and one row alone must all give the same bits on CPU; on CUDA, output as arrays or tensors must.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np
import torch

from metarec_gym.envs.single_env import MetaRecEnv
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.world import World

STEPS = 50
SEED = 7


def played(
    world: World, device: str, *, first: int, rows: int, batch: int, output: str, steps: int = STEPS
) -> list[Any]:
    """Observations, rewards and endings of `rows` rows from row `first` on, played in a batch of `batch` rows.

    Returns:
        For each step arrays (rows, obs_dim), (rows,), (rows,) and (rows,).
    """
    env = MetaRecVectorEnv(batch, world=world, device=device, output=output, autoreset_mode="SameStep")  # type: ignore[arg-type]
    obs, _ = env.reset(seed=SEED + first)
    row = torch.arange(first, first + batch)
    found = [(_array(obs)[:rows],)]
    for t in range(steps):
        action = (row * 7 + t * 3 + row * t) % world.n_strategies
        given = action.numpy() if output == "numpy" else action.to(device)
        found.append(tuple(_array(value)[:rows] for value in env.step(given)[:4]))
    return found


def played_alone(world: World, *, first: int, steps: int = STEPS) -> list[Any]:
    """`played` for row `first` by the single environment, which steps its row in its own way."""
    env = MetaRecEnv(world)
    found: list[Any] = [(env.reset(seed=SEED + first)[0][None],)]
    for t in range(steps):
        obs, reward, terminated, truncated, _ = env.step((first * 7 + t * 3 + first * t) % world.n_strategies)
        if terminated or truncated:
            obs, _ = env.reset()
        found.append((obs[None], np.array([reward], dtype=np.float32), np.array([terminated]), np.array([truncated])))
    return found


def _array(value: Any) -> Any:
    # copies: an environment that hands out its own buffers would otherwise rewrite what was played
    return np.array(value.cpu().numpy() if isinstance(value, torch.Tensor) else value)


def captured(world: World, device: str, *, rows: int, mode: str, steps: int = STEPS) -> list[Any]:
    """As `played`, all rows, by captured rollouts; two of them, so that one hands over to the next."""
    from metarec_gym.envs.captured import CapturedRollout

    def act(obs: torch.Tensor, available: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return noise.to(torch.int64), noise.to(torch.int64), noise

    env = MetaRecVectorEnv(rows, world=world, device=device, output="torch", autoreset_mode="SameStep")
    obs, _ = env.reset(seed=SEED)
    found: list[Any] = [(_array(obs),)]
    plays = CapturedRollout(env, act, steps // 2, mode=mode)  # type: ignore[arg-type]
    row = torch.arange(rows)
    for first in (0, steps // 2):
        noise = [((row * 7 + t * 3 + row * t) % world.n_strategies).float() for t in range(first, first + steps // 2)]
        p = plays.run(torch.stack(noise).to(device))
        found += [
            tuple(_array(value) for value in (p.obs[t + 1], p.reward[t], p.terminated[t], p.truncated[t]))
            for t in range(steps // 2)
        ]
    return found


def in_bfloat16(world: World, device: str, *, rows: int = 4096) -> dict[str, float]:
    """What it would do to the MDP to keep the judge's tables of items in bfloat16: half the memory, 8 bits of precision.

    Returns:
        Of one request of `rows` users: `largest` and `mean` difference of the expected reward as a share of its mean, and
        `other`, the share of users who answer otherwise.
    """
    found = []
    for rounded in (False, True):
        env = MetaRecVectorEnv(rows, world=world, device=device, output="torch", autoreset_mode="SameStep")
        if rounded:
            # a copy: environments of one world share their judge
            judge: Any = copy.copy(env._judge)
            judge._table = judge._table.to(torch.bfloat16).to(torch.float32)
            env._judge = judge
        env.reset(seed=SEED)
        reward = env.step(torch.arange(rows, device=env.device) % world.n_strategies)[1]
        found.append((env.expected_reward.double(), torch.as_tensor(reward)))
    (exact, answers), (near, others) = found
    apart = (exact - near).abs() / exact.mean()
    return {
        "largest": float(apart.max()),
        "mean": float(apart.mean()),
        "other": float((answers != others).double().mean()),
    }


def digest(parts: list[list[Any]]) -> str:
    """Hash of a trajectory whose rows were played in parts, in their order; 16 hexadecimal digits."""
    whole = hashlib.sha256()
    for step in zip(*parts, strict=True):
        for pieces in zip(*step, strict=True):
            whole.update(np.ascontiguousarray(np.concatenate(pieces)).tobytes())
    return whole.hexdigest()[:16]


def hashes(world: World, device: str, *, rows: int = 16, steps: int = STEPS, processes: bool = True) -> dict[str, Any]:
    """Hash of the trajectory by the way it was played.

    Args:
        world: The world.
        device: Where to play; on CUDA also the CPU's, and how far the two are apart.
        rows: Rows of the trajectory; even.
        steps: Requests of the trajectory; even.
        processes: Also plays the halves in two processes.

    Returns:
        `ways` (hash by way), `equal` (whether all that must agree do), `bfloat16` (see `in_bfloat16`); on CUDA also `cpu`,
        `reward_agreement`.
    """
    half, was = rows // 2, torch.get_num_threads()

    def plain(output: str = "torch", batch: int = rows, on: str = device) -> list[Any]:
        return played(world, on, first=0, rows=rows, batch=batch, output=output, steps=steps)

    base = plain()
    ways = {"tensors": digest([base]), "arrays": digest([plain("numpy")])}
    for mode in ("eager", "graph") if device.startswith("cuda") else ("eager",):
        ways[f"captured-{mode}"] = digest([captured(world, device, rows=rows, mode=mode, steps=steps)])
    if device.startswith("cuda"):
        on_cpu = plain(on="cpu")
        same = np.mean([np.mean(a[1] == b[1]) for a, b in zip(base[1:], on_cpu[1:], strict=True)])
        # matrix kernels of a GPU round by batch size, so only equal shapes must agree
        return {"ways": ways, "equal": len(set(ways.values())) == 1, "cpu": digest([on_cpu]),
                "reward_agreement": float(same), "bfloat16": in_bfloat16(world, device)}  # fmt: skip
    ways[f"batch of {5 * rows}"] = digest([plain(batch=5 * rows)])
    ways["two batches"] = digest(
        [played(world, device, first=f, rows=half, batch=half, output="torch", steps=steps) for f in (0, half)]
    )
    ways["one row at a time"] = digest(
        [played(world, device, first=f, rows=1, batch=1, output="torch", steps=steps) for f in range(rows)]
    )
    ways["single environments"] = digest([played_alone(world, first=f, steps=steps) for f in range(rows)])
    try:
        torch.set_num_threads(2)
        ways["2 threads"] = digest([plain()])
    finally:
        torch.set_num_threads(was)
    if processes:
        ways["2 processes"] = _in_processes(world, rows, steps)
    return {"ways": ways, "equal": len(set(ways.values())) == 1, "bfloat16": in_bfloat16(world, device)}


def _half(world: World, first: int, rows: int, steps: int, answers: Any) -> None:
    torch.set_num_threads(1)
    answers.put((first, played(world, "cpu", first=first, rows=rows, batch=rows, output="torch", steps=steps)))


def _in_processes(world: World, rows: int, steps: int) -> str:
    """The halves of the rows in two processes at once."""
    import multiprocessing

    # spawned: a forked torch whose threads have worked can hang
    context = multiprocessing.get_context("spawn")
    answers, half = context.SimpleQueue(), rows // 2
    workers = [context.Process(target=_half, args=(world, f, half, steps, answers), daemon=True) for f in (0, half)]
    for worker in workers:
        worker.start()
    found = dict(answers.get() for _ in workers)
    for worker in workers:
        worker.join()
    return digest([found[0], found[half]])
