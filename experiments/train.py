"""Trains one learner on one fold's users and judge.

    python -m experiments.train --agent ppo --world worlds/movielens_100k --fold A --seed 0

The run's folder is named by everything that decides the result: a finished run is found and not repeated. With --resume a
killed PPO run goes on from its last checkpoint and ends with the same numbers; SB3 starts again from its seed.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from agents.ppo.judges import with_judges
from agents.roster import ROSTER
from experiments.env_settings import env_settings
from experiments.run_folder import ENV_CODE, RunFolder, code_hash
from experiments.train_entry import check_entry, learn_entry
from metarec_gym.devices import device_of

if TYPE_CHECKING:
    from metarec_gym.evaluation.tasks import Arrays
    from metarec_gym.world import World

SELECT_ID = "MetaRec/Select-v0"
BLEND_ID = "MetaRec/Blend-v0"


@dataclass(frozen=True)
class Learner:
    """Where a learner lives and how it is run by default."""

    module: str
    seeds: int
    num_envs: int
    num_steps: int
    output: Literal["torch", "numpy"]
    settings: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters that differ from the module's defaults."""
    env: str = SELECT_ID
    """Registered id that a comparison trains it in."""


LEARNERS = {
    "ppo": Learner("agents.ppo", seeds=10, num_envs=256, num_steps=33, output="torch"),
    "ppo_gru": Learner(
        "agents.ppo", seeds=10, num_envs=256, num_steps=33, output="torch", settings={"recurrent": True}
    ),
    "sb3_ppo": Learner("agents.sb3.ppo", seeds=5, num_envs=256, num_steps=33, output="numpy"),
    "sb3_a2c": Learner("agents.sb3.a2c", seeds=5, num_envs=256, num_steps=8, output="numpy"),
    "sb3_dqn": Learner("agents.sb3.dqn", seeds=5, num_envs=64, num_steps=1, output="numpy"),
    "sb3_sac": Learner("agents.sb3.sac", seeds=5, num_envs=64, num_steps=1, output="numpy", env=BLEND_ID),
    "sb3_maskable_ppo": Learner("agents.sb3.maskable_ppo", seeds=5, num_envs=256, num_steps=33, output="numpy"),
    "sb3_recurrent_ppo": Learner("agents.sb3.recurrent_ppo", seeds=5, num_envs=256, num_steps=33, output="numpy"),
    "sb3_qrdqn": Learner("agents.sb3.qrdqn", seeds=5, num_envs=64, num_steps=1, output="numpy"),
    "sb3_trpo": Learner("agents.sb3.trpo", seeds=5, num_envs=256, num_steps=33, output="numpy"),
}


@dataclass(frozen=True)
class Args:
    """Trains one learner."""

    world: Path | None = None
    """Folder of the world; if absent that of a scenario (`--env MetaRec/MovieLens100K-Select-v0`), else the synthetic one."""
    agent: str = "ppo"
    """The learner: ppo, ppo_gru (with a memory of the episode), sb3_ppo, sb3_a2c, sb3_dqn, sb3_sac (Blend),
    sb3_maskable_ppo, sb3_recurrent_ppo, sb3_qrdqn, sb3_trpo; or an agent of the roster: tuned_ppo, bayes_schedule, ..."""
    env: tuple[str, ...] = (SELECT_ID,)
    """Registered id of the environment, then further settings of it, KEY=VALUE each (JSON values), in any order."""
    session_requests: int | None = None
    """Requests a session: episodes then span several sessions. None: the whole episode is one session."""
    judge: str = "main"
    """Which of the fold's judges answers: main, second (another family), uniform or popularity (other samplers); several with
    commas share the users out, so that the policy does not lean on one judge's beliefs (`main,second`; our PPO only)."""
    fold: Literal["A", "B"] = "A"
    """Whose users and judge to train on; score on the other."""
    seed: int = 0
    """Seed of everything random in the training."""
    steps: int = 300_000
    """Requests to learn from."""
    num_envs: int | None = None
    """Users served at once; the learner's default if absent."""
    horizon: int | None = None
    """Requests an episode; the world's if absent."""
    slate_size: int | None = None
    """Items a request; the world's if absent."""
    cost_weight: float = 0.0
    """Reward lost for the relative serving cost (dearest strategy = 1) of each request."""
    set: tuple[str, ...] = ()
    """More hyperparameters of the learner, `name=value` each, e.g. `--set learning_rate=3e-4 epochs=8`."""
    resume: bool = False
    """Go on from the last checkpoint of a killed run."""
    device: str = "cpu"
    """Where the environment and our PPO run: cpu, cuda, or auto, which takes a GPU where there is one."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quiet: bool = False
    """No progress line."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", device_of(self.device))


def env_of(args: Args) -> tuple[str, dict[str, Any]]:
    """Registered id of the environment and its further settings.

    Raises:
        ValueError: When `--env` gives two ids, or a setting that is none.
    """
    ids = [text for text in args.env if "=" not in text] or [SELECT_ID]
    if len(ids) > 1:
        raise ValueError(f"--env gives the ids {ids}; expected one, and KEY=VALUE for settings")
    pairs = [text for text in args.env if "=" in text]
    judges = args.judge.split(",")
    # every judge's name is looked at; several go on as one setting
    checked = [env_settings(pairs, session_requests=args.session_requests, judge=judge) for judge in judges]
    return ids[0], checked[0] | ({"judge": args.judge} if len(judges) > 1 else {})


def learner_code(learner: Learner) -> tuple[str, ...]:
    """The files that decide what a learner does."""
    path = learner.module.replace(".", "/")
    # the algorithms of SB3 share settings, loop and export
    return ("agents/sb3",) if path.startswith("agents/sb3/") else (path, f"{path}.py")


def learner_args(args: Args) -> Any:
    """The learner's own `Args`, by the kind of action where it has settings for each: seed, steps, then `--set`.

    Raises:
        ValueError: When there is no such learner, or `--set` names no hyperparameter of it.
    """
    if args.agent not in LEARNERS:
        raise ValueError(f"--agent is {args.agent!r}, expected one of {sorted({*LEARNERS, *ROSTER})}")
    module = importlib.import_module(LEARNERS[args.agent].module)
    default = module.defaults_for(env_of(args)[0]) if hasattr(module, "defaults_for") else module.Args()
    default = dataclasses.replace(default, **LEARNERS[args.agent].settings)
    fields = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
    changes: dict[str, Any] = {"seed": args.seed, "total_steps": args.steps}
    if args.horizon is not None and "num_steps" in fields:
        changes["num_steps"] = args.horizon
    for text in args.set:
        name, found, value = text.partition("=")
        if not found or name not in fields:
            raise ValueError(f"--set {text!r}: expected name=value with a name of {sorted(fields)}")
        changes[name] = _convert(value, fields[name])
    return dataclasses.replace(default, **changes)


def _convert(text: str, like: Any) -> Any:
    if text == "None":
        return None
    if isinstance(like, bool):
        if text not in ("True", "False"):
            raise ValueError(f"{text!r} is neither True nor False")
        return text == "True"
    if isinstance(like, tuple):
        return tuple(int(part) for part in text.split(","))
    for kind in (int, float):
        if isinstance(like, kind) or like is None:
            try:
                return kind(text)
            except ValueError:
                if like is not None and kind is float:
                    raise
    return text


def world_of(args: Args) -> World:
    """The world given, else the one that the id stands for."""
    import gymnasium

    import metarec_gym  # noqa: F401  (registers the ids)
    from metarec_gym.world import resolve_world

    return resolve_world(args.world or gymnasium.spec(env_of(args)[0]).kwargs.get("world"))


def run_folder(args: Args) -> RunFolder:
    """The folder of this training run, finished or not."""
    env_id, settings = env_of(args)
    hyper: Any = {"requests": args.steps, "seed": args.seed}
    num_envs: int | None = None
    code: tuple[str, ...] = ("agents",)
    if args.agent in ROSTER:
        check_entry(args, env_id)
    else:
        hyper, learner = learner_args(args), LEARNERS[args.agent]
        num_envs, code = args.num_envs or learner.num_envs, learner_code(learner)
    facts = {
        "kind": "train",
        "agent": args.agent,
        "env": env_id,
        "env_settings": settings,
        "world": world_of(args).hash,
        "fold": args.fold,
        "num_envs": num_envs,
        "horizon": args.horizon,
        "slate_size": args.slate_size,
        "cost_weight": args.cost_weight,
        "device": args.device.split(":")[0],
        "learner": hyper,
        "code": code_hash((*ENV_CODE, *code)),
    }
    return RunFolder(args.runs, f"{args.agent}_{args.fold}_seed{args.seed}", facts)


def run(args: Args, command: str | None = None) -> dict[str, Any]:
    """Trains, or finds the finished run.

    Args:
        args: The command line.
        command: What to note as the command; the one running now if None.

    Returns:
        The result row; the policy is `policy.safetensors` in its folder.
    """
    folder = run_folder(args)
    done = folder.result()
    if done is not None:
        return done
    folder.begin(args, command)
    world, (env_id, settings) = world_of(args), env_of(args)
    started, path = time.perf_counter(), folder.path / "policy.safetensors"
    learn = learn_entry if args.agent in ROSTER else _learn
    learned = learn(args, world, settings, path)
    return folder.finish(
        {
            "agent": args.agent,
            "env": env_id,
            "env_settings": settings,
            "world": world.hash,
            "response": "+".join(world.judge(args.fold, judge).hash for judge in _judges(settings)),
            "fold": args.fold,
            "seed": args.seed,
            "device": args.device,
            "wall_seconds": time.perf_counter() - started,
            "policy": path.name,
            **learned,
        }
    )


def _judges(settings: dict[str, Any]) -> list[str]:
    names: list[str] = settings.get("judge", "main").split(",")
    return names


def _learn(args: Args, world: World, settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Trains a learner in its run's folder and writes the policy; `steps`, `seconds` and `metrics` of the run."""
    import gymnasium

    from metarec_gym.evaluation.tasks import advance

    learner, judges = LEARNERS[args.agent], _judges(settings)
    if len(judges) > 1 and learner.output != "torch":
        raise ValueError(
            f"--judge {args.judge}: {args.agent} learns from one judge at a time; several need ppo or ppo_gru"
        )
    plain = {key: value for key, value in settings.items() if key != "judge"}

    def make(num_envs: int, judge: str) -> Any:
        chosen = plain if judge == "main" else plain | {"judge": judge}
        return gymnasium.make_vec(
            env_of(args)[0],
            num_envs=num_envs,
            vectorization_mode="vector_entry_point",
            world=world,
            fold=args.fold,
            horizon=args.horizon,
            slate_size=args.slate_size,
            cost_weight=args.cost_weight,
            device=args.device,
            output=learner.output,
            autoreset_mode="SameStep",
            **chosen,
        )

    env: Any = with_judges(make, judges, args.num_envs or learner.num_envs)
    step = env.step

    def counted(actions: Any) -> Any:
        advance(env.num_envs)
        return step(actions)

    env.step = counted
    module = importlib.import_module(learner.module)
    result = module.train(env, learner_args(args), run_dir=path.parent, progress=not args.quiet, resume=args.resume)
    env.close()
    result.policy.save(path)
    metrics = {k: v for k, v in result.metrics.items() if np.isfinite(v)}
    return {"steps": result.steps, "seconds": result.seconds, "metrics": metrics}


def train_task(args: Args, command: str) -> Arrays:
    """The same as one task of many, for a worker process."""
    row = run(args, command)
    return {"seconds": np.array(row["seconds"])}


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    args = tyro.cli(Args, description=__doc__)
    folder = run_folder(args)
    if folder.result() is not None:
        print(f"found finished: {folder.path}")
    row = run(args)
    print(f"{args.agent}  fold {args.fold}  seed {args.seed}  {row['steps']:,} steps in {row['seconds']:.0f} s")
    print(f"policy   {folder.path / 'policy.safetensors'}        curves   tensorboard --logdir {args.runs}")
    if "loader" in row:
        print(f"read it with {row['loader']}")


if __name__ == "__main__":
    main()
