"""Does selection still pay after the world was refitted on the data that it selected?

    python -m experiments.feedback_loop
    python -m experiments.feedback_loop --log envs_data/movielens_100k --world worlds/movielens_100k

A round builds a world from a log, trains a policy in it, and serves new users by it; what they answer is the next round's log,
and the only one: an item that was never shown is forgotten. A fixed truth answers in every round and says what policy and
strategies are worth: the model that made a synthetic log, or, for a real log, fold B's judge of its original world. Four arms
start from the same first round: `naive` always serves the policy's most probable strategy; `explore` serves a strategy drawn
uniformly in a share of the requests; `reweighted` serves as `explore`, and refits on its requests kept in inverse proportion to
their logged propensity, as if all strategies had been drawn alike; `static` keeps the first round's strategies and policy for
ever. A killed run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.run_folder import ENV_CODE, RunFolder, code_hash, command_line, versions, write_atomic

if TYPE_CHECKING:
    from metarec_gym.data.interactions import InteractionLog
    from metarec_gym.evaluation.deployment import Truth
    from metarec_gym.policy import MlpPolicy, Policy
    from metarec_gym.world import World

ARMS = ("naive", "explore", "reweighted")
"""Arms that are refitted."""
JUDGED_COHORT = 1_000_000
"""Cohort whose users judge every round; deployments serve others."""
JUDGED_REPLICATES = 2
FEWEST_REQUESTS = 10
"""A world needs ten slates of items, and everybody may be shown the same ones."""


@dataclass(frozen=True)
class Args:
    """Closes the loop and judges every round."""

    log: Path | None = None
    """Prepared log of the first round; a synthetic one with known truth if absent."""
    world: Path | None = None
    """World of that log, whose fold B answers in every round; needed with --log."""
    rounds: int = 5
    """Rounds; the first one is the same for all arms."""
    exploration: float = 0.2
    """Share of requests that the exploring arms serve by a strategy drawn uniformly."""
    pool: tuple[str, ...] = ("popular", "long_tail", "item_knn", "ease", "content")
    """Strategies, fitted anew in every round."""
    horizon: int = 32
    """Requests a user."""
    session_requests: int = 8
    """Requests a session: the strategies rank again from what was taken."""
    copies: int = 2
    """Cohorts of the truth's users that a deployment serves: the same histories of nobody, other draws of taste."""
    steps: int = 200_000
    """Requests that a policy learns from."""
    max_epochs: int = 8
    """Passes over the log when a judge is refitted: a quick fit, the same in every round."""
    users: int = 300
    """Users of a cohort of the synthetic truth."""
    items: int = 400
    """Items of the synthetic truth."""
    seed: int = 0
    """Seed of everything."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quiet: bool = False
    """Says nothing while working."""


@dataclass(frozen=True)
class _Loop:
    """What all rounds share."""

    args: Args
    truth: Truth
    folder: Path

    @property
    def env(self) -> dict[str, Any]:
        """Settings of every environment."""
        return {"session_requests": self.args.session_requests}

    def say(self, text: str) -> None:
        if not self.args.quiet:
            print(f"[loop] {text}", flush=True)

    def round(self, arm: str, number: int, log: InteractionLog) -> tuple[dict[str, Any], World, MlpPolicy]:
        """Builds, trains and judges one round, or finds it finished."""
        from metarec_gym.evaluation.deployment import deployed

        place, args = self.folder / f"{arm}_{number}", self.args
        started = time.process_time()
        world, item_ids = self._world(place / "world", log)
        built = time.process_time()
        policy = self._policy(place, world)
        trained = time.process_time()
        live = deployed(self.truth, world, item_ids, args.session_requests)
        file = place / "judged.json"
        if not file.is_file():
            self.say(f"{arm} {number}: judged by the truth")
            row = {"arm": arm, "round": number, "items": world.n_items, "world": world.hash}
            row |= self._judged(world, live, policy)
            seconds = {"build": built - started, "train": trained - built, "judge": time.process_time() - trained}
            write_atomic(file, json.dumps({**row, "cpu_seconds": seconds}, indent=1) + "\n")
        return json.loads(file.read_text()), live, policy

    def _world(self, out: Path, log: InteractionLog) -> tuple[World, list[str]]:
        import pandas as pd

        from metarec_gym.evaluation.deployment import staying
        from metarec_gym.response.config import ResponseConfig
        from metarec_gym.world import World

        if not (out / "world.json").is_file():
            self.say(
                f"{out.parent.name}: {len(log.frame):,} rows, {log.counts()['items']:,} items; strategies and judges"
            )
            World.build(
                log,
                seed=self.args.seed,
                pool=self.args.pool,
                starts_per_user=1,
                slate_size=self.truth.world.slate_size,
                horizon=self.args.horizon,
                out=out,
                progress=False,
                replicas=0,
                members=1,
                variants=False,
                response_config=ResponseConfig(
                    max_epochs=self.args.max_epochs, inner_folds=2, effect_negatives=16, effect_rounds=4
                ),
            )
        items = pd.read_parquet(out / "items.parquet").sort_values("item_index")
        world = World.load(out)
        # sessions end when this loop ends them: whether users leave or return is no part of the question
        judges = {name: staying(judge) for name, judge in world.responses.items()}
        return dataclasses.replace(world, responses=judges), [str(item) for item in items["item_id"]]

    def _policy(self, place: Path, world: World) -> MlpPolicy:
        from agents import ppo
        from metarec_gym.envs.vector_env import MetaRecVectorEnv
        from metarec_gym.policy import MlpPolicy

        file, args = place / "policy.safetensors", self.args
        if not file.is_file():
            self.say(f"{place.name}: policy")
            env = MetaRecVectorEnv(
                128, world=world, fold="A", horizon=args.horizon, output="torch", autoreset_mode="SameStep", **self.env
            )
            learner = ppo.Args(
                seed=args.seed, total_steps=args.steps, num_steps=args.horizon, minibatch_size=32 * args.horizon
            )
            ppo.train(env, learner, progress=False).policy.save(file)
            env.close()
        return MlpPolicy.load(file)

    def _judged(self, world: World, live: World, policy: MlpPolicy) -> dict[str, Any]:
        """What the round's world believes of its policy, and what the truth says; values by user."""
        from metarec_gym.evaluation.rollout import Fixed
        from metarec_gym.policy import FirstChoice

        def values(where: World, fold: str, player: Any) -> list[float]:
            return self._values(where, fold, player)

        greedy = FirstChoice(policy)
        own = [values(world, "A", Fixed(k)) for k in range(world.n_strategies)]
        sbs = int(np.argmax([np.mean(v) for v in own]))
        fixed = {name: values(live, "B", Fixed(k)) for k, name in enumerate(world.strategies)}
        return {
            "sbs": world.strategies[sbs],
            "believed": {"policy": values(world, "B", greedy), "sbs": values(world, "B", Fixed(sbs))},
            "true": {"policy": values(live, "B", greedy), "sampled": values(live, "B", policy), **fixed},
        }

    def _values(self, where: World, fold: str, player: Any) -> list[float]:
        """Expected reward a request of every user."""
        from metarec_gym.evaluation.rollout import per_user, rollout
        from metarec_gym.seeding import stream

        played = rollout(
            where,
            fold,
            player,
            contexts=where.starts_of(fold),
            replicates=JUDGED_REPLICATES,
            horizon=self.args.horizon,
            env_seed=stream(self.args.seed, "judged"),
            env_settings={**self.env, "world_seed": JUDGED_COHORT},
        )
        found: list[float] = per_user(played.user, played.expected.mean(axis=(1, 2), dtype=np.float64)).tolist()
        return found

    def log(self, arm: str, number: int, live: World, policy: Policy, given: InteractionLog) -> InteractionLog:
        """Serves new users by the round's policy and keeps their log, or finds it."""
        import pandas as pd

        from metarec_gym.data.interactions import InteractionLog
        from metarec_gym.evaluation.deployment import Exploring, emit, thinned
        from metarec_gym.policy import FirstChoice

        place, args = self.folder / f"{arm}_{number}" / "log", self.args
        if (place / "log.json").is_file():
            return InteractionLog.load(place)
        serving = Exploring(FirstChoice(policy), 0.0 if arm == "naive" else args.exploration)
        parts = [
            emit(
                live,
                serving,
                self.truth.item_ids,
                settings=self.env,
                horizon=args.horizon,
                seed=args.seed,
                cohort=number * args.copies + copy,
                prefix=f"r{number}c{copy}u",
            )
            for copy in range(args.copies)
        ]
        shown, served = (np.sum([getattr(p, name) for p in parts], axis=0) for name in ("shown", "served"))
        frames = [p.frame for p in parts]
        if arm == "reweighted":
            lowest = args.exploration / live.n_strategies
            frames = [thinned(f, lowest, seed=args.seed, cohort=number * args.copies + c) for c, f in enumerate(frames)]
        log = InteractionLog.from_frame(
            pd.concat(frames, ignore_index=True),
            name=given.name,
            outcomes=given.outcomes,
            outcome_weights=given.outcome_weights,
            items=given.items,
            card={
                "served": served.tolist(),
                "shown": np.sort(shown)[::-1].tolist(),
                "value": self._values(live, "B", serving),
            },
            merge_repeats=False,
        )
        log.save(place)
        return log


def _synthetic(args: Args) -> tuple[Truth, InteractionLog]:
    """Users of known taste, and a first log of slates drawn at random: as good as an experiment."""
    from metarec_gym.data.synthetic import behaviour_log
    from metarec_gym.evaluation.deployment import Truth, behaviour_world

    categories = 4
    log, truth = behaviour_log(
        args.seed,
        n_users=args.users * args.copies,
        n_items=args.items,
        n_categories=categories,
        item_sd=1.0,
        effect_sd=[[0.5, *[0.8] * categories]] * 2,
        effect_correlation=0.0,
        position_decay=0.0,
        fatigue=0.0,
        # nobody leaves; a user makes a dozen or two of requests until the log ends
        leaving=(-20.0, 0.0, 0.0, 0.0),
        span_days=0.025,
    )
    world = behaviour_world(truth, users=args.users, slate_size=5, seed=args.seed)
    return Truth(world, truth.item_ids), log


def _real(args: Args) -> tuple[Truth, InteractionLog]:
    import pandas as pd

    from experiments.headroom import load_world
    from metarec_gym.data.interactions import InteractionLog
    from metarec_gym.evaluation.deployment import Truth

    if args.log is None or args.world is None:
        raise ValueError("a real log needs both --log and --world: the world that was built from it is the truth")
    items = pd.read_parquet(args.world / "items.parquet").sort_values("item_index")
    return Truth(load_world(args.world), tuple(str(i) for i in items["item_id"])), InteractionLog.load(args.log)


def run(args: Args) -> dict[str, Any]:
    """Runs or finds all rounds, and reports.

    Args:
        args: The command line.

    Returns:
        The result row.

    Raises:
        ValueError: When a setting leaves nothing to refit.
    """
    from metarec_gym.evaluation.feedback import summary
    from metarec_gym.evaluation.report.feedback import feedback_markdown, feedback_page

    if args.horizon < FEWEST_REQUESTS or args.rounds < 2:
        raise ValueError(
            f"--horizon is {args.horizon} and --rounds {args.rounds}; expected at least {FEWEST_REQUESTS} requests (what one "
            "user sees may be all that the next round knows of the catalogue) and 2 rounds"
        )
    if not 0.0 < args.exploration <= 1.0:
        raise ValueError(f"--exploration is {args.exploration}, expected a share above 0 and at most 1")
    truth, log = _synthetic(args) if args.log is None and args.world is None else _real(args)
    asked = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("runs", "quiet", "log", "world")}
    code = code_hash((*ENV_CODE, "agents/ppo", "metarec_gym/evaluation/deployment.py", "experiments/feedback_loop.py"))
    facts = {"kind": "feedback_loop", "truth": truth.world.hash, "log": log.hash, "asked": asked, "code": code}
    folder = RunFolder(args.runs, f"feedback_loop_{log.name}", facts)
    if folder.result() is None:
        folder.begin(args)
    loop = _Loop(args, truth, folder.path)
    rounds = _rounds(loop, log)
    result = {"truth": truth.world.hash, "log": log.hash, "name": log.name, "args": asked, **summary(rounds, asked)}
    provenance = {"command": command_line(), "versions": ", ".join(f"{k} {v}" for k, v in versions().items())}
    write_atomic(folder.path / "feedback_loop.md", feedback_markdown(result, provenance))
    page = write_atomic(folder.path / "feedback_loop.html", feedback_page(result, provenance))
    row = folder.finish(result)
    print(result["answer"])
    print(f"report   {page}")
    return row


def _rounds(loop: _Loop, log: InteractionLog) -> list[dict[str, Any]]:
    """Every round of every arm, with what its log looks like."""
    first, live, policy = loop.round("first", 1, log)
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        row, served_by, chosen, given = first, live, policy, log
        for number in range(1, loop.args.rounds + 1):
            if number > 1:
                row, served_by, chosen = loop.round(arm, number, given)
            given = loop.log(arm, number, served_by, chosen, log)
            rows.append({**row, "arm": arm, "strategies": served_by.strategies, **_exposure(given.card)})
    return rows


def _exposure(card: dict[str, Any]) -> dict[str, Any]:
    """What was shown, how concentrated, by which strategies, and what the users got, exploration included."""
    shown: Sequence[int] = card["shown"]
    total = max(sum(shown), 1)
    return {
        "items_shown": sum(n > 0 for n in shown),
        "top_tenth": sum(shown[: max(len(shown) // 10, 1)]) / total,
        "served": card["served"],
        "deployed": card["value"],
    }


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
