"""The side of an A/B test that is played in a world: command line, arms, metrics, and the plays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from experiments.env_settings import env_settings
from experiments.run_folder import ENV_CODE, code_hash, command_line
from metarec_gym.devices import device_of

if TYPE_CHECKING:
    import pandas as pd

    from metarec_gym.evaluation.ab_test.playing import Visitors
    from metarec_gym.evaluation.ab_test.table import Metric
    from metarec_gym.evaluation.online import OnlineResult
    from metarec_gym.evaluation.rollout import Player
    from metarec_gym.evaluation.tasks import Arrays, Task
    from metarec_gym.world import World

CODE = (
    *ENV_CODE,
    "metarec_gym/evaluation/ab_test",
    "metarec_gym/evaluation/online.py",
    "experiments/ab_test.py",
    "experiments/ab_world.py",
)
ADAPTIVE_BATCH = 200
"""Visitors of a policy between two looks of the adaptive allocation."""
CHUNK = 1024
"""Visitors of one task: a kill loses a few seconds of work."""


@dataclass(frozen=True)
class Args:
    """Tests policies against each other."""

    world: Path | None = None
    """Folder of the world; the embedded synthetic one if absent."""
    policies: tuple[str, ...] = ()
    """Two or more, the control first: names of strategies, `uniform`, `SBS` and `SCHED` (both take the headroom's answer and
    measure it if it is not there), or paths of exported policies. One policy twice is an A/A test."""
    exposures: Path | None = None
    """A CSV or Parquet file with user_id, arm and outcomes: it is analysed and nothing is played."""
    control: str | None = None
    """The control arm of an exposure table."""
    metrics: tuple[str, ...] = ()
    """Goals: name=column (mean a user), name=column/column (ratio), name=any:column (share of users); `-name=...` if lower is
    better. In a world by default: ctr, conversion (where there are several outcomes) and reward."""
    guardrails: tuple[str, ...] = ()
    """Metrics that must not get worse: the same with @ and the relative worsening tolerated, e.g. `retention=retained@0.02`."""
    weights: tuple[str, ...] = ()
    """Planned traffic, arm=weight each; equal by default. Never take it from the table itself."""
    fold: Literal["A", "B"] = "B"
    """Whose users and judge are tested on; the other fold's users are the past that the test is planned on."""
    salt: str = "test 1"
    """Name of the test: decides with the user's id who is in which arm."""
    visits: int = 1
    """Times each user comes, with new luck each time: a larger test on the same people."""
    max_users: int | None = None
    """Users at most."""
    horizon: int | None = None
    """Requests of a visitor in the test; what the world's horizon leaves after the pre-period if absent."""
    pre_requests: int | None = None
    """Requests before the test, served by the control; a quarter of the world's horizon if absent."""
    smallest_lift: float = 0.05
    """Relative effect worth finding, for the number of users that the plan asks for."""
    power: float = 0.8
    """Power of the plan."""
    interleave: bool = True
    """Compare each policy with the control inside one slate, too."""
    adaptive: bool = False
    """Ask also how many users adaptive allocation needs to name the best policy, on fresh visitors."""
    adaptive_users: int = 5_000
    """Visitors of the adaptive allocation at most."""
    session_requests: int | None = None
    """Requests a session: visits then span several sessions."""
    judge: str = "main"
    """Which of the fold's judges answers."""
    env: tuple[str, ...] = ()
    """Further settings of the environment, KEY=VALUE each (JSON values)."""
    seed: int = 0
    """Seed of the draws."""
    workers: int = 2
    """Processes, one core each."""
    device: str = "cpu"
    """Where environments run: cpu, cuda, or auto, which takes a GPU where there is one."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", device_of(self.device))


@dataclass(frozen=True)
class Arm:
    """One policy of the test.

    Attributes:
        name: Name of the arm.
        key: What decides how it plays, in a few characters.
        player: The policy.
    """

    name: str
    key: str
    player: Player


def arms_of(args: Args, world: World, settings: Mapping[str, Any]) -> list[Arm]:
    """The policies, control first.

    Raises:
        ValueError: When fewer than two are named, a name is unknown, or a policy does not fit the world or was trained on the
            users it is to be tested on.
    """
    from metarec_gym.evaluation.rollout import Fixed
    from metarec_gym.policy import MlpPolicy, UniformPolicy

    if len(args.policies) < 2:
        raise ValueError(f"--policies names {list(args.policies)}; a test needs at least two, the control first")
    arms: list[Arm] = []
    for text in args.policies:
        name = text
        player: Any
        if text in world.strategies:
            player, key = Fixed(world.strategies.index(text)), text
        elif text == "uniform":
            player, key = UniformPolicy(), text
        elif text in ("SBS", "SCHED"):
            player, key = _from_headroom(text, args, world, settings)
        elif text.endswith(".safetensors"):
            player = MlpPolicy.load(text)
            _check_policy(player, text, args.fold, world)
            key = hashlib.sha256(Path(text).read_bytes()).hexdigest()[:10]
            name = f"{Path(text).stem if Path(text).stem != 'policy' else Path(text).resolve().parent.name}"
        else:
            raise ValueError(
                f"--policies names {text!r}, which is no strategy of the world ({', '.join(world.strategies)}), nor uniform, "
                "SBS, SCHED or a .safetensors file"
            )
        same = sum(arm.name == name or arm.name.startswith(f"{name} (") for arm in arms)
        arms.append(Arm(name if not same else f"{name} ({same + 1})", key, player))
    return arms


def _check_policy(policy: Any, path: str, fold: str, world: World) -> None:
    if policy.strategies != world.strategies:
        raise ValueError(
            f"{path} chooses among {list(policy.strategies)}, the world has {list(world.strategies)}; train it in this world"
        )
    if policy.meta.get("fold") == fold:
        other = "A" if fold == "B" else "B"
        raise ValueError(f"{path} was trained on the users of fold {fold}; test it with --fold {other}")


def _from_headroom(name: str, args: Args, world: World, settings: Mapping[str, Any]) -> tuple[Player, str]:
    from experiments.headroom import measure
    from metarec_gym.evaluation.headroom import EvalSettings
    from metarec_gym.evaluation.rollout import Fixed

    if args.world is None:
        raise ValueError(f"{name} comes from the headroom of a world folder; give --world")
    headroom, folder = measure(
        world,
        args.world,
        EvalSettings(env=dict(settings)),
        runs=args.runs,
        workers=args.workers,
        device=args.device,
        progress=not args.quiet,
        command=command_line(),
    )
    if name == "SBS":
        return Fixed(headroom.sbs[args.fold][headroom.headline]), f"SBS {folder.key[:10]}"
    return headroom.sched[args.fold].player, f"SCHED {folder.key[:10]}"


def metrics_of(args: Args, outcomes: Sequence[str] | None) -> list[Metric]:
    """Goals and guardrails.

    Args:
        args: The command line.
        outcomes: The world's outcomes, gate first; None for a company's table.

    Raises:
        ValueError: When there is no goal, or a text has another form.
    """
    from metarec_gym.evaluation.ab_test.playing import RETAINED, REWARD, SHOWN
    from metarec_gym.evaluation.ab_test.table import Metric

    goals, guards = list(args.metrics), list(args.guardrails)
    if outcomes is not None and not goals:
        goals = [f"ctr={outcomes[0]}/{SHOWN}"]
        goals += [f"conversion=any:{outcomes[-1]}"] if len(outcomes) > 1 else []
        goals += [f"reward={REWARD}"]
    if outcomes is not None and not guards:
        guards = [f"retention={RETAINED}@0.02"]
    if not goals:
        raise ValueError("no metric to analyse; give --metrics, e.g. --metrics ctr=click/shown bought=any:purchase")
    found = [Metric.parse(text) for text in goals]
    for text in guards:
        formula, at, margin = text.rpartition("@")
        try:
            tolerated = float(margin)
        except ValueError:
            tolerated = -1.0
        if not at or not 0.0 < tolerated < 1.0:
            raise ValueError(
                f"guardrail {text!r}: expected a metric, @ and a share in (0, 1), e.g. retention=retained@0.02"
            )
        found.append(replace(Metric.parse(formula), margin=tolerated))
    return found


def weights_of(args: Args, arms: Sequence[str]) -> dict[str, float]:
    """Planned traffic by arm.

    Raises:
        ValueError: When a weight is no number, or names are not those of the arms.
    """
    if not args.weights:
        return dict.fromkeys(arms, 1.0)
    pairs = [text.rpartition("=") for text in args.weights]
    try:
        given = {name: float(value) for name, _, value in pairs}
    except ValueError as error:
        raise ValueError(f"--weights {list(args.weights)}: expected arm=number each") from error
    if set(given) != set(arms):
        raise ValueError(f"--weights names {sorted(given)}, the arms are {sorted(arms)}")
    return {arm: given[arm] for arm in arms}


# ---- playing in a world


def play_task(
    world: str | Path | None, fold: str, player: Player, control: Player, group: Visitors, **kwargs: Any
) -> Arrays:
    """Task: one arm's visitors, or some of them."""
    from metarec_gym.evaluation.ab_test.playing import play_arm
    from metarec_gym.evaluation.tasks import advance
    from metarec_gym.world import resolve_world

    return play_arm(resolve_world(world), fold, player, group, control=control, progress=advance, **kwargs)


def interleave_task(
    world: str | Path | None, fold: str, first: Player, second: Player, group: Visitors, **kwargs: Any
) -> Arrays:
    """Task: visitors served by two policies at once."""
    from metarec_gym.evaluation.ab_test.interleaving import interleave
    from metarec_gym.evaluation.tasks import advance
    from metarec_gym.world import resolve_world

    found = interleave(resolve_world(world), fold, first, second, group, progress=advance, **kwargs)
    return {"credit": found.credit, "places": found.places}


class WorldTest:
    """A test in a world: who plays, and everything played."""

    def __init__(self, args: Args) -> None:
        from metarec_gym.world import resolve_world

        self.args, self.world = args, resolve_world(args.world)
        self.settings = env_settings(args.env, session_requests=args.session_requests, judge=args.judge)
        self.arms = arms_of(args, self.world, self.settings)
        self.weights = weights_of(args, [arm.name for arm in self.arms])
        self.metrics = metrics_of(args, self.world.outcomes)
        total = self.world.horizon
        self.pre = total // 4 if args.pre_requests is None else args.pre_requests
        self.horizon = total - self.pre if args.horizon is None else args.horizon
        if self.pre < 0 or self.horizon < 1:
            raise ValueError(f"{self.pre} requests before and {self.horizon} in the test; expected >= 0 and >= 1")
        self.facts = {
            "kind": "ab_test",
            "world": self.world.hash,
            "arms": [(arm.name, arm.key) for arm in self.arms],
            "env_settings": self.settings,
            "device": args.device.split(":")[0],
            "horizon": (self.pre, self.horizon),
            "code": code_hash(CODE),
            **{
                name: getattr(args, name)
                for name in ("fold", "weights", "salt", "visits", "max_users", "seed", "metrics", "guardrails", "power")
            },
            **{name: getattr(args, name) for name in ("smallest_lift", "interleave", "adaptive", "adaptive_users")},
        }
        self.past_fold = "A" if args.fold == "B" else "B"

    def visitors(self, fold: str) -> Visitors:
        """Everybody who comes, in order."""
        from metarec_gym.evaluation.ab_test.playing import visitors

        return visitors(self.world, fold, visits=self.args.visits, seed=self.args.seed, max_users=self.args.max_users)

    def play(self, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Arrays]]:
        """Everything that is played: the past's exposure table, the test's, and the interleavings by arm."""
        from metarec_gym.evaluation.ab_test.assignment import assign
        from metarec_gym.evaluation.ab_test.playing import exposure_table
        from metarec_gym.evaluation.tasks import run_tasks

        past, group = self.visitors(self.past_fold), self.visitors(self.args.fold)
        arm_of = assign(group.visitor_id, self.weights, self.args.salt)
        control = self.arms[0]
        jobs: dict[str, tuple[Visitors, list[Task]]] = {"past": self._tasks("past", self.past_fold, control, past)}
        for index, arm in enumerate(self.arms):
            mine = group.take(np.flatnonzero(arm_of == arm.name))
            jobs[f"arm {index}"] = self._tasks(f"arm{index}", self.args.fold, arm, mine)
            if index and self.args.interleave:
                jobs[f"both {index}"] = self._tasks(f"both{index}", self.args.fold, arm, group)
        results = run_tasks(
            [task for _, tasks in jobs.values() for task in tasks],
            folder=folder,
            workers=self.args.workers if self.args.device == "cpu" else 1,
            title="playing the test",
            progress=not self.args.quiet,
        )

        def joined(job: str) -> Arrays:
            parts = [results[task.key] for task in jobs[job][1]]
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

        tables = exposure_table(past, [control.name] * len(past), joined("past"), self.pre)
        # back into the order of arrival
        filled: Arrays = {}
        for index, arm in enumerate(self.arms):
            for name, values in joined(f"arm {index}").items():
                place = filled.setdefault(name, np.zeros((len(group), values.shape[1])))
                place[arm_of == arm.name] = values
        inter = {arm.name: joined(f"both {i}") for i, arm in enumerate(self.arms) if f"both {i}" in jobs}
        return tables, exposure_table(group, list(arm_of), filled, self.pre), inter

    def _tasks(self, name: str, fold: str, arm: Arm, group: Visitors) -> tuple[Visitors, list[Task]]:
        from metarec_gym.evaluation.tasks import Task

        both = name.startswith("both")
        common: dict[str, Any] = {
            "world": self.args.world,
            "fold": fold,
            "horizon": self.horizon,
            "pre_requests": self.pre,
            "seed": self.args.seed,
            "settings": self.settings,
            "device": self.args.device,
        }
        first = self.arms[0].player
        if both:
            common |= {"first": first, "second": arm.player}
        else:
            common |= {"player": arm.player, "control": first}
        tasks = []
        for low in range(0, len(group), CHUNK):
            part = group.take(np.arange(low, min(low + CHUNK, len(group))))
            call = interleave_task if both else play_task
            tasks.append(Task(f"{name}_{low}", call, {**common, "group": part}, len(part) * (self.pre + self.horizon)))
        return group, tasks

    def adaptive(self) -> dict[str, Any]:
        """How many fresh visitors each way of allocating them needs to name the best policy."""
        from metarec_gym.evaluation.online import best_policy, fixed_allocation, serve_in_world, successive_halving

        out = {}
        batch = {"batch": ADAPTIVE_BATCH}
        rules: tuple[tuple[str, Callable[..., OnlineResult], dict[str, int]], ...] = (
            ("equal shares", fixed_allocation, batch),
            ("LUCB", best_policy, batch),
            ("halving", successive_halving, {}),
        )
        for name, rule, more in rules:
            serve = serve_in_world(
                self.world,
                self.args.fold,
                [arm.player for arm in self.arms],
                horizon=self.horizon,
                max_users=self.args.adaptive_users,
                seed=self.args.seed + 1,
                settings=self.settings,
                device=self.args.device,
            )
            found = rule(serve, len(self.arms), max_users=self.args.adaptive_users, **more)
            users = {arm.name: int(n) for arm, n in zip(self.arms, found.users, strict=True)}
            out[name] = {"best": self.arms[found.best].name, "sure": found.sure, "users": users}
        return out
