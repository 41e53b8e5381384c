"""Hyperparameters by Ray Tune with Optuna: seeds x worlds x agents, on this machine or on a cluster.

    python -m experiments.sweep --worlds worlds/movielens_100k --agents ppo sb3_ppo --trials 20 --seeds 3
    python -m experiments.sweep --worlds worlds/a worlds/b --address ray://head:10001

A trial trains one agent with some hyperparameters once for each seed, on one fold's users and judge, and is scored there with
luck that training never met. Only that decides. The best trial of each world and agent is then scored once on the other fold's
users and judge: the number to quote. Stopped, it goes on where it was: finished trials stay, finished seeds of a broken trial are
found again, and a trial that fails is tried again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.ray_cluster import packed_world, start_ray, unpacked_world
from experiments.run_folder import RunFolder, write_atomic
from experiments.train import LEARNERS
from metarec_gym.policy import Policy, sample_actions
from metarec_gym.seeding import fold_in, mix, stream, uniform

SPACE = (
    "learning_rate=log:2e-4:1e-2",
    "ent_coef=log:1e-4:1e-1",
    "gamma=float:0.5:0.99",
    "gae_lambda=float:0.8:1.0",
    "epochs=int:2:8",
    "minibatch_size=choice:528,1056,2112,4224",
)
"""What both PPOs are searched over."""


@dataclass(frozen=True)
class Args:
    """What is swept."""

    worlds: tuple[Path, ...]
    """Folders of worlds."""
    agents: tuple[str, ...] = ("ppo",)
    """Learners of `experiments.train`."""
    trials: int = 20
    """Choices of hyperparameters, for each world and agent."""
    seeds: int = 3
    """Trainings of each choice; its score is their mean."""
    steps: int = 300_000
    """Requests to learn from, each training."""
    fold: Literal["A", "B"] = "A"
    """Whose users and judge train and choose; the other fold's are for the best only."""
    space: tuple[str, ...] = SPACE
    """NAME=log:LOW:HIGH, float:LOW:HIGH, int:LOW:HIGH or choice:A,B,C of the learner's settings."""
    episodes: int = 2000
    """Episodes that score a policy."""
    seed: int = 0
    """Of the search, the trainings and the scores."""
    address: str | None = None
    """Of a Ray cluster; None starts Ray here."""
    cpus: int | None = None
    """Cores on this machine, one for each trial; None = all."""
    retries: int = 2
    """How often a failed trial is tried again."""
    runs: Path = Path("runs")
    """Folder of all runs; on a cluster one that every node sees."""


# ------------------------------------------------------------------------------------------------ one trial
def value_of(policy: Policy, world: Path, *, fold: str, seed: int, episodes: int) -> float:
    """Mean reward a request of a policy's episodes; a request after leaving counts 0.

    Args:
        policy: The policy.
        world: Folder of the world.
        fold: Whose users and judge.
        seed: Which users, and their luck.
        episodes: How many.
    """
    import torch

    from metarec_gym.envs.vector_env import MetaRecVectorEnv

    env = MetaRecVectorEnv(episodes, world=world, fold=fold, output="torch", autoreset_mode="Disabled")
    obs, info = env.reset(seed=stream(seed, "sweep score"))
    policy.begin(episodes, env.device)
    alive = torch.ones(episodes, dtype=torch.bool)
    total = torch.zeros(episodes, dtype=torch.float64)
    root = mix(torch.arange(episodes, dtype=torch.int64) + stream(seed, "sweep actions") % 2**40)
    with torch.no_grad():
        for request in range(env.horizon):
            probs = policy.action_probs(obs, info["action_mask"].to(torch.bool))
            action = sample_actions(probs, uniform(fold_in(root, request)))
            after, reward, terminated, truncated, info = env.step(action)
            policy.observe(obs, action, reward, alive)
            total += torch.where(alive, reward, 0.0)
            alive, obs = alive & ~(terminated | truncated), after
    return float(total.mean()) / env.horizon


def trained(config: Mapping[str, Any], args: Args, agent: str, world: Path, seed: int) -> Path:
    """The policy file of one training, found if it was finished before."""
    from experiments import train

    asked = train.Args(
        world=world,
        agent=agent,
        fold=args.fold,
        seed=seed,
        steps=args.steps,
        set=tuple(f"{name}={value}" for name, value in sorted(config.items())),
        resume=True,
        runs=args.runs,
        quiet=True,
    )
    row = train.run(asked, "python -m experiments.sweep")
    return train.run_folder(asked).path / str(row["policy"])


def seeds_of(args: Args) -> list[int]:
    """Seeds of the trainings."""
    return [stream(args.seed, "sweep training", index) % 2**31 for index in range(args.seeds)]


def score_of(config: Mapping[str, Any], args: Args, agent: str, world: Path, fold: str, seed: int) -> float:
    """Trains once, or finds the training, and scores its policy on a fold's users and judge."""
    from metarec_gym.policy import load_policy

    policy = load_policy(trained(config, args, agent, world, seed))
    return value_of(policy, world, fold=fold, seed=args.seed, episodes=args.episodes)


def trial(config: dict[str, Any], args: Args, agent: str, place: str, parcel: list[Any] | None) -> None:
    """One trial of Ray Tune; reports after every seed.

    Args:
        config: The hyperparameters.
        args: The sweep.
        agent: The learner.
        place: Folder of the world, on this machine.
        parcel: The packed world's reference in the object store, on a cluster; None here.
    """
    import ray
    import torch
    from ray import tune

    torch.set_num_threads(1)
    world = Path(place) if parcel is None else unpacked_world(ray.get(parcel[0]))
    found: list[float] = []
    for seed in seeds_of(args):
        found.append(score_of(config, args, agent, world, args.fold, seed))
        tune.report({"score": float(np.mean(found)), "scores": list(found), "seeds": len(found)})


# ------------------------------------------------------------------------------------------------ the space
def parse_space(texts: tuple[str, ...]) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Kind and numbers of each hyperparameter.

    Raises:
        ValueError: When one cannot be understood.
    """
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        kind, _, values = rest.partition(":")
        try:
            if kind == "choice" and values:
                found[name] = (kind, tuple(_literal(v) for v in values.split(",")))
                continue
            low, high = (int(v) if kind == "int" else float(v) for v in values.split(":"))
        except ValueError:
            kind = ""
        if kind not in ("log", "float", "int") or not name or not low < high or (kind == "log" and low <= 0):
            raise ValueError(
                f"--space {text!r}: expected NAME=log:LOW:HIGH, float:LOW:HIGH, int:LOW:HIGH (LOW below HIGH) or choice:A,B,C"
            )
        found[name] = (kind, (low, high))
    return found


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def check(args: Args) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """The space, after everything that can be checked without Ray.

    Raises:
        ValueError: When an agent or a hyperparameter is unknown, or a number is too small.
        FileNotFoundError: When there is no world.
    """
    import importlib

    space = parse_space(args.space)
    for agent in args.agents:
        if agent not in LEARNERS:
            raise ValueError(f"there is no learner {agent!r}; experiments.train has {sorted(LEARNERS)}")
        known = {f.name for f in dataclasses.fields(importlib.import_module(LEARNERS[agent].module).Args)}
        unknown = sorted(set(space) - known)
        if unknown:
            raise ValueError(f"--space names {unknown}, which {agent} does not have; it has {sorted(known)}")
    for name in ("trials", "seeds", "steps", "episodes"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}, expected at least 1")
    for world in args.worlds:
        if not (world / "world.json").is_file():
            raise FileNotFoundError(
                f"no world at {world}; build it: python -m experiments.build_world --log LOG --out {world}"
            )
    return space


# ------------------------------------------------------------------------------------------------ the sweep
def sweep_one(
    args: Args, agent: str, world: Path, space: Mapping[str, tuple[str, tuple[Any, ...]]], folder: Path, ray: Any
) -> dict[str, Any]:
    """All trials of one agent in one world, and the best one on the other fold; JSON-able."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    makers: dict[str, Callable[..., Any]] = {"log": tune.loguniform, "float": tune.uniform, "choice": tune.choice}
    # both ends count, as they are written
    makers["int"] = lambda low, high: tune.randint(low, high + 1)
    domains = {
        name: makers[kind](list(values)) if kind == "choice" else makers[kind](*values)
        for name, (kind, values) in space.items()
    }
    parcel = None if args.address is None else [ray.put(packed_world(world))]
    place = str(world.resolve())
    runnable = tune.with_resources(
        tune.with_parameters(trial, args=dataclasses.replace(args, runs=args.runs.resolve()), agent=agent, place=place,
                             parcel=parcel),
        {"cpu": 1},
    )  # fmt: skip
    storage, name = folder.resolve() / "tune", f"{world.name}_{agent}"
    if tune.Tuner.can_restore(str(storage / name)):
        tuner = tune.Tuner.restore(
            str(storage / name), runnable, param_space=domains, resume_unfinished=True, restart_errored=True
        )
    else:
        tuner = tune.Tuner(
            runnable,
            param_space=domains,
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                num_samples=args.trials,
                search_alg=OptunaSearch(seed=stream(args.seed, "sweep search", agent) % 2**32),
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(storage),
                failure_config=tune.FailureConfig(max_failures=args.retries),
                verbose=1,
            ),
        )
    grid = tuner.fit()
    trials = [
        {"config": result.config, "score": result.metrics["score"], "scores": list(result.metrics["scores"])}
        for result in (grid[index] for index in range(len(grid)))
        if result.metrics and result.metrics.get("seeds") == args.seeds
    ]
    errors = [str(error) for error in grid.errors]
    if not trials:
        raise RuntimeError(
            f"no trial of {agent} in {world.name} finished; the first error: {errors[0] if errors else ''}"
        )
    trials.sort(key=lambda row: -row["score"])
    other = "B" if args.fold == "A" else "A"
    best = trials[0]
    held_out = [score_of(best["config"], args, agent, world, other, seed) for seed in seeds_of(args)]
    return {"world": world.name, "agent": agent, "trials": trials, "best": best, "held_out": held_out,
            "held_out_fold": other, "failed": errors}  # fmt: skip


def run(args: Args) -> dict[str, Any]:
    """Sweeps every agent in every world; writes `result.json`, `sweep.md` and TensorBoard scalars.

    Raises:
        ValueError: When an argument cannot be used.
        FileNotFoundError: When there is no world.
        ModuleNotFoundError: When Ray is not installed.
        RuntimeError: When no trial of an agent finished.
    """
    space = check(args)
    asked = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    hashes = [json.loads((world / "world.json").read_text())["hash"] for world in args.worlds]
    decisive = {k: v for k, v in asked.items() if k not in ("address", "cpus", "retries", "runs", "worlds")}
    folder = RunFolder(args.runs, "sweep", {"kind": "sweep", **decisive, "worlds": hashes})
    done = folder.result()
    if done is not None:
        print(f"found finished: {folder.path}")
        return done
    folder.begin(args)
    ray = start_ray(args.address, args.cpus)
    rows = [sweep_one(args, agent, world, space, folder.path, ray) for world in args.worlds for agent in args.agents]
    write_atomic(folder.path / "sweep.md", page(rows))
    _tensorboard(folder.path, rows)
    result = folder.finish({"rows": rows})
    print(page(rows))
    print(f"page     {folder.path / 'sweep.md'}        curves   tensorboard --logdir {args.runs}")
    return result


def page(rows: list[dict[str, Any]]) -> str:
    """The table of the best choices, and all trials."""
    lines = [
        "# Sweep",
        "Reward a request; mean [lowest, highest] over the training seeds. `chosen on`: users and judge that trained the "
        "policies, with new luck. `held out`: the other fold's users and judge, which chose nothing.",
        "",
        "| world | agent | trials | failed | best hyperparameters | chosen on | held out |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['world']} | {row['agent']} | {len(row['trials'])} | {len(row['failed'])} | "
            f"{_said(row['best']['config'])} | {_spread(row['best']['scores'])} | {_spread(row['held_out'])} |"
        )
    for row in rows:
        lines += ["", f"## {row['agent']} in {row['world']}", "| score | hyperparameters |", "|---|---|"]
        lines += [f"| {_spread(t['scores'])} | {_said(t['config'])} |" for t in row["trials"]]
    return "\n".join(lines) + "\n"


def _said(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in sorted(config.items()))


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} [{min(values):.4f}, {max(values):.4f}]"


def _tensorboard(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Scores over trials, best first, and the HParams table."""
    from torch.utils.tensorboard.summary import hparams
    from torch.utils.tensorboard.writer import SummaryWriter

    for row in rows:
        for index, one in enumerate(row["trials"]):
            writer = SummaryWriter(
                str(folder / "tensorboard" / f"{row['world']}_{row['agent']}" / f"{index:03d}"), purge_step=0
            )
            settings = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in one["config"].items()}
            for summary in hparams({"world": row["world"], "agent": row["agent"], **settings}, {"sweep/score": 0.0}):
                writer._get_file_writer().add_summary(summary)
            writer.add_scalar("sweep/score", one["score"], 0)
            writer.close()


def main() -> None:
    """The command line."""
    import tyro

    try:
        run(tyro.cli(Args, description=__doc__))
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
