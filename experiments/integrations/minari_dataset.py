"""A policy's episodes as a Minari dataset, with propensities; read back, and replayed against the environment bit by bit.

    python -m experiments.integrations.minari_dataset --episodes 64 --name metarec/select/random-v0

Minari's own `DataCollector` wraps one environment at a time and needs jax; this collects all episodes side by side and hands
Minari the finished buffers. The Arrow format needs nothing that `metarec_gym` does not install.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import torch
import tyro
from minari.data_collector import EpisodeBuffer

from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.policy import Policy, UniformPolicy, sample_actions
from metarec_gym.seeding import torch_generator

INFOS = ("action_mask", "user", "slate", "outcomes")


def collect(policy: Policy, episodes: int, seed: int, **settings: Any) -> list[EpisodeBuffer]:
    """Plays `episodes` whole episodes side by side; episode i is the single environment's seeded `seed + i`.

    Entry t of an info belongs to observation t, as Minari has it: `action_mask[t]` and `propensity[t]` are those of action t;
    `slate[t + 1]` and `outcomes[t + 1]` are what came of it. The propensity after the last action is nan.
    """
    env = MetaRecVectorEnv(episodes, autoreset_mode="Disabled", output="torch", **settings)
    generator = torch_generator(seed, "minari", "actions")
    obs, info = env.reset(seed=seed)
    # a reset serves nothing; the slate of an unserved request is empty (-1)
    info |= {
        "slate": torch.full((episodes, env.slate_size), -1),
        "outcomes": torch.zeros(episodes, env.slate_size, len(env.world.outcomes), dtype=torch.bool),
    }
    policy.begin(episodes)
    alive = torch.ones(episodes, dtype=torch.bool)
    steps: list[dict[str, Any]] = []
    while bool(alive.any()):
        probs = policy.action_probs(obs, info["action_mask"].bool())
        action = sample_actions(probs, torch.rand(episodes, generator=generator))
        before = {key: info[key] for key in INFOS}
        following, reward, terminated, truncated, info = env.step(action)
        policy.observe(obs, action, reward, alive)
        propensity = probs.gather(1, action[:, None])[:, 0]
        steps.append(
            {"obs": obs, "action": action, "reward": reward, "propensity": propensity, "alive": alive, **before}
        )
        steps[-1] |= {"terminated": terminated, "truncated": truncated}
        obs, alive = following, alive & ~(terminated | truncated)
    steps.append(
        {**steps[-1], "obs": obs, "propensity": torch.full((episodes,), torch.nan), **{k: info[k] for k in INFOS}}
    )
    table = {key: torch.stack([step[key] for step in steps], dim=1).numpy() for key in steps[0]}
    lengths = table["alive"][:, :-1].sum(axis=1).tolist()
    return [
        _buffer({key: rows[i] for key, rows in table.items()}, length, seed + i) for i, length in enumerate(lengths)
    ]


def _buffer(rows: dict[str, Any], length: int, seed: int) -> EpisodeBuffer:
    """One episode; rows holds (steps + 1, ...) arrays, of which `length` requests were served."""
    propensity = np.append(rows["propensity"][:length], np.float32(np.nan))
    infos = {"propensity": propensity, **{key: rows[key][: length + 1] for key in INFOS}}
    return EpisodeBuffer(
        seed=seed,
        observations=rows["obs"][: length + 1],
        actions=rows["action"][:length],
        rewards=rows["reward"][:length].astype(np.float64),
        terminations=rows["terminated"][:length],
        truncations=rows["truncated"][:length],
        # Minari 0.5.4 cannot read a one-dimensional array back from Arrow
        infos={key: value.tolist() if value.ndim == 1 else value for key, value in infos.items()},
    )


def export(name: str, algorithm: str, buffers: list[EpisodeBuffer], **settings: Any) -> minari.MinariDataset:
    """Writes the dataset `name` under MINARI_DATASETS_PATH; a `world` must be a folder: the dataset says which."""
    env = gymnasium.make("MetaRec/Select-v0", **settings)
    return minari.create_dataset_from_buffers(
        name,
        buffers,
        env=env,
        eval_env=env,
        algorithm_name=algorithm,
        description="Episodes of MetaRec/Select-v0 with the propensity of every action",
        data_format="arrow",
        requirements=["metarec-gym"],
    )


def replay(dataset: minari.MinariDataset) -> dict[str, float]:
    """Plays every stored action again in the environment that the dataset itself names, and counts what differs."""
    env = dataset.recover_environment()
    different, steps = 0, 0
    for episode in dataset.iterate_episodes():
        (facts,) = dataset.storage.get_episode_metadata([episode.id])
        obs, _ = env.reset(seed=int(facts["seed"]))
        different += not np.array_equal(obs, episode.observations[0])
        for t, action in enumerate(episode.actions):
            obs, *numbers, info = env.step(int(action))
            stored = [episode.rewards[t], episode.terminations[t], episode.truncations[t]]
            same = np.array_equal(obs, episode.observations[t + 1]) and numbers == stored
            different += not (same and np.array_equal(info["slate"], episode.infos["slate"][t + 1]))
        steps += len(episode)
    return {"episodes": dataset.total_episodes, "transitions": steps, "different": different}


@dataclass(frozen=True)
class Args:
    """Exports the episodes of the uniform policy, reads them back and replays them."""

    name: str = "metarec/select/random-v0"
    """The dataset's Minari name."""
    episodes: int = 64
    """Episodes to play."""
    seed: int = 0
    """Episode i is the environment seeded with seed + i."""
    world: str | None = None
    """Folder of a world; the embedded synthetic one if absent."""
    folder: Path = Path("runs/minari")
    """Where Minari keeps its datasets, if MINARI_DATASETS_PATH does not say."""


def main() -> None:
    """The command line."""
    args = tyro.cli(Args)
    os.environ.setdefault("MINARI_DATASETS_PATH", str(args.folder.resolve()))
    buffers = collect(UniformPolicy(), args.episodes, args.seed, world=args.world)
    export(args.name, "uniform", buffers, world=args.world)
    print(json.dumps(replay(minari.load_dataset(args.name)), indent=2))


if __name__ == "__main__":
    main()
