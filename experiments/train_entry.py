"""Agents of the roster under `experiments.train`: they learn from a lesson and leave a policy."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.roster import ROSTER, Lesson
from experiments.env_settings import training_settings

if TYPE_CHECKING:
    from experiments.train import Args


LEAVE_NO_FILE = ("fixed_hybrid", "round_robin")
"""A blend and a fixed rule: nothing reads them from a file."""


def check_entry(args: Args, env_id: str) -> None:
    """Refuses what only the learners take, before anything is learned.

    Raises:
        ValueError: For `--set`, another judge, an id that is not of Select, an agent that leaves no file, or one whose
            library is missing.
    """
    if args.agent in LEAVE_NO_FILE:
        raise ValueError(
            f"{args.agent} leaves no file; play it with python -m experiments.compare --agents {args.agent}"
        )
    if "Select-v" not in env_id:
        raise ValueError(f"{args.agent} chooses one strategy a request, --env is {env_id}; use an id of Select")
    refused = {
        "--set": args.set,
        "--num-envs": args.num_envs,
        "--resume": args.resume,
    }
    given = [name for name, value in refused.items() if value]
    if given or args.judge != "main":
        raise ValueError(
            f"{args.agent} learns from a lesson and from the main judge, and has no settings on the command line; "
            f"leave out {', '.join(given or ['--judge'])}"
        )
    if missing := ROSTER[args.agent].missing():
        raise ValueError(f"{args.agent} needs {', '.join(missing)}; pip install 'metarec-gym[agents]'")


def counted(lesson: Lesson) -> Lesson:
    """The same lesson; the bar of the running tasks moves with every request that is served."""
    from metarec_gym.evaluation.tasks import advance

    def make_env(num_envs: int, **settings: Any) -> Any:
        env: Any = lesson.make_env(num_envs, **settings)
        step = env.step

        def counted(actions: Any) -> Any:
            advance(num_envs)
            return step(actions)

        env.step = counted
        return env

    return replace(lesson, make_env=make_env)


def learn_entry(args: Args, world: Any, settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Learns and writes the policy.

    Args:
        args: The command line.
        world: The world.
        settings: Further ones of the environment.
        path: Of the policy.

    Returns:
        Numbers of the run: `steps` (the budget), `seconds`, `metrics`, and `loader`, the function that reads the file.

    Raises:
        ValueError: When the budget is too small for the agent.
    """
    more = {"cost_weight": args.cost_weight, "device": args.device, **training_settings(settings)}
    if args.slate_size is not None:
        more["slate_size"] = args.slate_size
    horizon = args.horizon or int(world.horizon)
    lesson = Lesson.of(world, args.fold, seed=args.seed, requests=args.steps, horizon=horizon, **more)
    started = time.perf_counter()
    policy: Any = ROSTER[args.agent].learn(counted(lesson))
    seconds = time.perf_counter() - started
    return {"steps": args.steps, "seconds": seconds, "metrics": {}, "loader": _save(policy, path)}


def _save(policy: Any, path: Path) -> str:
    from agents import supervised
    from metarec_gym.policy import MlpPolicy

    if hasattr(policy, "save"):
        policy.save(path)
        return "metarec_gym.policy.load_policy" if isinstance(policy, MlpPolicy) else "agents.bandits.load_bandit"
    supervised.save(policy, path)
    return "agents.supervised.load"
