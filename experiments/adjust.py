"""What is a deployed policy worth after it was adjusted to fresh users, and a warm start against a cold one?

    python -m experiments.adjust --world worlds/movielens_100k --policy runs/ppo_A_seed*/policy.safetensors
    python -m experiments.adjust --world worlds/movielens_100k --new-strategy sasrec

The policies were trained on one fold. Half of the other fold's users give fresh feedback, answered by their own judge; what is
learned is scored on the other half, after few and after many requests, each training seed on the same users with the same luck.
With --new-strategy the policies are trained here while that strategy is out of service; then it enters the pool.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.env_settings import env_settings
from experiments.run_folder import ENV_CODE, RunFolder, code_hash, command_line, write_atomic

if TYPE_CHECKING:
    from agents.adjust import Args as Hyper
    from metarec_gym.envs.vector_env import MetaRecVectorEnv
    from metarec_gym.policy import MlpPolicy
    from metarec_gym.world import World

Floats = NDArray[np.float64]
ADJUST_CODE = (*ENV_CODE, "experiments/adjust.py", "agents/adjust.py", "agents/ppo.py", "agents/ppo")
ARMS = {
    "adjusted": "on the leash",
    "unleashed": "no penalty, no bound",
    "cold": "an untrained policy, no leash",
}
NOBODY = 2
"""A fold that no environment simulates: the users that are kept for scoring are put there while others give feedback."""


@dataclass(frozen=True)
class Args:
    """Measures an adjustment."""

    world: Path | None = None
    """Folder of the world; the synthetic one if absent."""
    policy: tuple[Path, ...] = ()
    """Exported policies, one a training seed; not with --new-strategy."""
    new_strategy: str | None = None
    """Name of a strategy that enters the pool: policies are trained without it first."""
    fold: Literal["A", "B"] = "B"
    """Whose users give the feedback and are scored; --policy must come from the other fold."""
    requests: int = 16_896
    """Requests of feedback."""
    seeds: int = 3
    """Adjustments; policy i % number of policies is adjusted with seed i."""
    train_requests: int = 200_000
    """Requests that a policy without the new strategy learns from."""
    kl_limit: float = 0.5
    """Bound of the mean KL(adjusted || deployed), in nats."""
    kl_coef: float = 0.05
    """Penalty on it."""
    prior_share: float | None = None
    """Share of requests that a new strategy starts with; None: that of a typical strategy."""
    env: tuple[str, ...] = ()
    """Settings of the fresh users' environment, KEY=VALUE (JSON values), e.g. judge=second."""
    num_envs: int = 32
    """Users served at once: an update follows after this many episodes."""
    contexts_per_user: int = 2
    """Start states scored for each user."""
    replicates: int = 2
    """Episodes from each start state."""
    seed: int = 0
    """Of everything."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    page: Path | None = None
    """Where to write the Markdown page too."""
    quiet: bool = False
    """No lines on the way."""


class _Measurement:
    """The world with its users in two halves, and everything that is the same for all arms."""

    def __init__(self, args: Args, world: World) -> None:
        from metarec_gym.evaluation.rollout import pick_contexts
        from metarec_gym.seeding import fold_in, mix, stream, uniform
        from metarec_gym.world import FOLDS

        self.args, self.world = args, world
        self.settings = env_settings(list(args.env))
        user = world.tensors["start_user"].to(torch.int64)
        key = mix(torch.tensor(stream(args.seed, "adjust", "users")))
        scored = uniform(fold_in(key, user)) < 0.5
        mine = world.tensors["start_fold"] == FOLDS.index(args.fold)
        self.fresh = self._without(mine & scored)
        self.scored = self._without(mine & ~scored)
        self.contexts = pick_contexts(self.scored, args.fold, per_user=args.contexts_per_user, seed=args.seed)
        probe = self.env(1)
        self.horizon, self.slices = probe.horizon, probe.feature_slices
        self.obs_dim = int(probe.single_observation_space.shape[0])  # type: ignore[index]
        per_iteration = args.num_envs * self.horizon
        iterations = max(1, -(-args.requests // per_iteration))
        # doubling, and the end
        self.marks = sorted({min(2**i, iterations) * per_iteration for i in range(iterations.bit_length() + 1)})

    def _without(self, rows: torch.Tensor) -> World:
        tensors = dict(self.world.tensors)
        tensors["start_fold"] = torch.where(rows, NOBODY, tensors["start_fold"]).to(torch.int8)
        return dataclasses.replace(self.world, tensors=tensors)

    def env(self, rows: int) -> MetaRecVectorEnv:
        """Fresh users."""
        from metarec_gym.envs.vector_env import MetaRecVectorEnv

        return MetaRecVectorEnv(rows, world=self.fresh, fold=self.args.fold, autoreset_mode="SameStep",
                                output="torch", **self.settings)  # fmt: skip

    def value(self, policy: Any, **settings: Any) -> Floats:
        """Expected reward a request of every scored user, (users,)."""
        from metarec_gym.evaluation.rollout import Window, per_user, rollout
        from metarec_gym.seeding import stream

        played = rollout(
            self.scored,
            self.args.fold,
            policy,
            contexts=self.contexts,
            replicates=self.args.replicates,
            horizon=self.horizon,
            env_seed=stream(self.args.seed, "adjust", "score"),
            env_settings={**self.settings, **settings},
        )
        return per_user(played.user, played.value(Window.until(self.horizon)).mean(axis=1))

    def hyper(self, seed: int) -> Hyper:
        """Hyperparameters of one adjustment."""
        from agents.adjust import Args as Hyper

        a = self.args
        return Hyper(seed=seed, requests=self.marks[-1], num_steps=self.horizon, kl_limit=a.kl_limit, kl_coef=a.kl_coef)


def deployed_policy(
    args: Args, world: World, seed: int, measurement: _Measurement
) -> tuple[MlpPolicy, MlpPolicy | None]:
    """The policy that serves before the adjustment; with a new strategy also the one that knew nothing of it.

    Raises:
        ValueError: When a policy comes from the fold that is scored, or the pool has no such strategy.
    """
    from metarec_gym.policy import MlpPolicy

    if args.new_strategy is None:
        policy = MlpPolicy.load(args.policy[seed % len(args.policy)])
        if policy.meta.get("fold") == args.fold:
            raise ValueError(f"{args.policy[seed % len(args.policy)]} was trained on fold {args.fold}, whose users are "
                             f"fresh here; use --fold {'A' if args.fold == 'B' else 'B'}")  # fmt: skip
        return policy, None
    from agents import ppo
    from agents.adjust import carry_over, resized
    from metarec_gym.envs.vector_env import MetaRecVectorEnv

    known = [name for name in world.strategies if name != args.new_strategy]
    if len(known) == world.n_strategies:
        raise ValueError(f"--new-strategy is {args.new_strategy!r}, the pool has {list(world.strategies)}")
    env = MetaRecVectorEnv(256, world=world, fold="A" if args.fold == "B" else "B", autoreset_mode="SameStep",
                           output="torch", unavailable=(args.new_strategy,), **measurement.settings)  # fmt: skip
    hyper = ppo.Args(seed=seed, total_steps=args.train_requests, num_steps=measurement.horizon)
    old = ppo.train(env, hyper, progress=False).policy
    # what its network says of the strategy it never served is forgotten, then filled in
    small = carry_over(old, known, resized(measurement.slices, len(known)))
    grown = carry_over(small, world.strategies, measurement.slices, prior_share=args.prior_share)
    return grown, old


def measure(args: Args, world: World) -> dict[str, Any]:
    """Adjusts every seed in every arm and scores all snapshots.

    Args:
        args: The command line.
        world: The world.

    Returns:
        The rows of the page, and what they were measured on.
    """
    from agents.adjust import cold_policy, finetune, unleashed
    from metarec_gym.evaluation.intervals import mean_interval
    from metarec_gym.policy import UniformPolicy

    m = _Measurement(args, world)
    curves: dict[str, list[list[Floats]]] = {arm: [] for arm in ARMS}
    before: list[Floats] = []
    old_pool: list[Floats] = []
    kls: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    rewards: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        policy, old = deployed_policy(args, world, seed, m)
        hyper = m.hyper(seed)
        before.append(m.value(policy))
        if old is not None:
            old_pool.append(m.value(old, unavailable=(args.new_strategy,)))
        widths = tuple(w.shape[0] for w, _ in policy.layers[:-1])
        starts = {
            "adjusted": (policy, hyper),
            "unleashed": (policy, unleashed(hyper)),
            "cold": (cold_policy(m.obs_dim, policy.strategies, widths, seed), unleashed(hyper)),
        }
        for arm, (start, settings) in starts.items():
            adjusted = finetune(m.env(args.num_envs), start, settings, snapshots=m.marks)
            curves[arm].append([m.value(snapshot) for snapshot in adjusted.snapshots])
            at = [next(row for row in adjusted.history if row["requests"] >= mark) for mark in m.marks]
            kls[arm].append([row["kl"] for row in at])
            rewards[arm].append([row["reward"] for row in adjusted.history])
            if not args.quiet:
                print(
                    f"seed {seed}  {arm:10s} {curves[arm][-1][-1].mean():.3f}  before {before[-1].mean():.3f}",
                    flush=True,
                )
    base = np.stack(before)
    reference = base.mean(axis=0)
    rows = []
    for i, mark in enumerate(m.marks):
        matrix = {arm: np.stack([values[i] for values in curves[arm]]) for arm in ARMS}
        rows.append(
            {
                "requests": mark,
                # paired: the same seed before and after, on the same users
                **{
                    arm: {
                        **mean_interval((matrix[arm] - base) / reference.mean()).to_json(),
                        "value": float(matrix[arm].mean()),
                    }
                    for arm in ARMS
                },
                "warm_less_cold": mean_interval((matrix["unleashed"] - matrix["cold"]) / reference.mean()).to_json(),
                "kl": {arm: [float(np.max([k[i] for k in kls[arm]])), float(np.mean([k[i] for k in kls[arm]]))]
                       for arm in ("adjusted", "unleashed")},
            }
        )  # fmt: skip
    result: dict[str, Any] = {
        "world": world.hash,
        "users_scored": len(reference),
        "seeds": args.seeds,
        "deployed": mean_interval(base).to_json(),
        "uniform": mean_interval(m.value(UniformPolicy())).to_json(),
        "rows": rows,
        "training_reward": rewards,
    }
    if old_pool:
        result["old_pool"] = mean_interval(np.stack(old_pool)).to_json()
        result["new_less_old"] = mean_interval((np.stack([v[-1] for v in curves["unleashed"]]) - np.stack(old_pool))
                                               / np.stack(old_pool).mean()).to_json()  # fmt: skip
    return result


def _percent(row: dict[str, float]) -> str:
    return f"{100 * row['estimate']:+.1f} % [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def page_of(args: Args, world: World, result: dict[str, Any], command: str) -> str:
    """The Markdown page."""
    deployed, uniform = result["deployed"], result["uniform"]
    what = "A policy adjusted to fresh users" if args.new_strategy is None else f"A pool that gains {args.new_strategy}"
    lines = [
        f"# {what}: {world.name}",
        "",
        f"    {command}",
        "",
        f"World `{world.hash}`. Feedback from one half of fold {args.fold}'s users, scored on the other half "
        f"({result['users_scored']} users, {args.contexts_per_user} start states each, {args.replicates} episodes from each); "
        f"{result['seeds']} seeds. 95 % intervals over users and seeds. Before the feedback: "
        f"{deployed['estimate']:.3f} [{deployed['low']:.3f}, {deployed['high']:.3f}] a request "
        f"(uniform choice {uniform['estimate']:.3f}).",
        "",
    ]
    if "old_pool" in result:
        old = result["old_pool"]
        lines += [
            f"The policy without {args.new_strategy}: {old['estimate']:.3f} [{old['low']:.3f}, {old['high']:.3f}]; with it and "
            f"all the feedback {_percent(result['new_less_old'])} against that.",
            "",
        ]
    lines += [
        f"| requests | adjusted (KL <= {args.kl_limit:g}) | mean KL, largest | no leash | mean KL, largest | cold start | warm "
        "less cold, no leash |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        (top, mean), (free_top, free_mean) = row["kl"]["adjusted"], row["kl"]["unleashed"]
        lines.append(
            f"| {row['requests']:,} | {_percent(row['adjusted'])} | {mean:.2f}, {top:.2f} | {_percent(row['unleashed'])} | "
            f"{free_mean:.2f}, {free_top:.2f} | {_percent(row['cold'])} | {_percent(row['warm_less_cold'])} |"
        )
    last, first = result["rows"][-1], result["rows"][0]
    gain, warm = last["adjusted"], first["warm_less_cold"]
    sure = (
        "gains" if gain["low"] > 0 else "loses" if gain["high"] < 0 else "shows no difference that can be told from 0"
    )
    lead = "beats" if warm["low"] > 0 else "loses to" if warm["high"] < 0 else "cannot be told from"
    lines += [
        "",
        f"All in percent of the value before. After {last['requests']:,} requests the adjusted policy {sure} "
        f"({_percent(gain)}). After {first['requests']:,} requests a warm start {lead} a cold one ({_percent(warm)}). The "
        "judge that answers the feedback also scores: part of a gain is what that judge differs in from the training's.",
        "",
    ]
    return "\n".join(lines)


def run(args: Args) -> dict[str, Any]:
    """Measures, or finds the finished result; writes the page.

    Args:
        args: The command line.

    Returns:
        The result row.

    Raises:
        ValueError: When neither or both of --policy and --new-strategy are given.
    """
    from metarec_gym.world import resolve_world

    if bool(args.policy) == (args.new_strategy is not None):
        raise ValueError("give --policy FILE (one or more) or --new-strategy NAME, and not both")
    world = resolve_world(args.world)
    facts = {
        name: value for name, value in vars(args).items() if name not in ("world", "runs", "page", "quiet", "policy")
    }
    files = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in _existing(args.policy)]
    facts |= {"kind": "adjust", "world": world.hash, "policies": files, "code": code_hash(ADJUST_CODE)}
    folder = RunFolder(args.runs, f"adjust_{world.name}", facts)
    done = folder.result()
    if done is None:
        folder.begin(args)
        started = time.perf_counter()
        result = measure(args, world)
        page = page_of(args, world, result, command_line())
        write_atomic(folder.path / "adjust.md", page)
        done = folder.finish({**result, "seconds": time.perf_counter() - started})
    page = (folder.path / "adjust.md").read_text(encoding="utf-8")
    if args.page is not None:
        write_atomic(args.page, page)
    if not args.quiet:
        print(f"{page}\nresult   {folder.path / 'result.json'}")
    return done


def _existing(paths: Sequence[Path]) -> Sequence[Path]:
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no policy at {path}; train one: python -m experiments.train --agent ppo")
    return paths


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
