"""Reference scores of a Blend or Slots scenario: random actions, the single best strategy, and PPO of Stable-Baselines3.

    python -m experiments.scenario_scores --id MetaRec/MovieLens100K-Slots-v0

Learned and chosen on one fold, scored on the other, then the other way round, pooled by user; expected reward a request, zero
after leaving. Select is measured by `experiments.compare`; its single best strategy and oracles can be played here too (all
places, or all weight, to one strategy), so they are not measured again. A second run finds the first one's result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.run_folder import ENV_CODE, RunFolder, code_hash
from metarec_gym.envs.scenarios import SCENARIOS, Scenario

if TYPE_CHECKING:
    from metarec_gym.envs.vector_env import MetaRecVectorEnv
    from metarec_gym.world import World

Floats = NDArray[np.float64]
Choose = Callable[[NDArray[np.float32]], NDArray[Any]]
"""Observations (rows, obs_dim) -> actions of all rows."""

FOLDS = ("A", "B")
FAMILIES = ("Blend", "Slots")


@dataclass(frozen=True)
class Args:
    """Measures the reference scores of a scenario."""

    id: str
    """Registered id of a Blend or Slots scenario."""
    world: Path | None = None
    """Folder of the world; looked up by the scenario's name if absent."""
    seeds: int = 3
    """Training seeds of PPO."""
    steps: int = 100_000
    """Requests that each training learns from."""
    num_envs: int = 256
    """Users served at once while PPO learns."""
    contexts_per_user: int = 2
    """Start states played for each user; averaged before users are."""
    max_users: int = 1000
    """Users a fold at most, picked at random."""
    replicates: int = 2
    """Episodes from each start state."""
    seed: int = 0
    """Of everything."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    quiet: bool = False
    """No lines on the way."""


def scenario_of(args: Args) -> Scenario:
    """The scenario of the id.

    Raises:
        ValueError: When it is none, or not of Blend or Slots.
    """
    scenario = SCENARIOS.get(args.id)
    if scenario is None or scenario.family not in FAMILIES:
        known = [env_id for env_id, other in SCENARIOS.items() if other.family in FAMILIES]
        raise ValueError(f"--id is {args.id!r}, expected one of {known}; Select is measured by experiments.compare")
    return scenario


def run_folder(args: Args, world: World) -> RunFolder:
    """The folder of this measurement, finished or not."""
    facts = {name: value for name, value in vars(args).items() if name not in ("world", "runs", "quiet")}
    code = code_hash((*ENV_CODE, "experiments/scenario_scores.py", "metarec_gym/envs/scenarios.py"))
    title = f"scores_{args.id.removeprefix('MetaRec/')}"
    return RunFolder(
        args.runs, title, {"kind": "scenario scores", **facts, "env_id": args.id, "world": world.hash, "code": code}
    )


class _Scorer:
    """Plays actions from the same start states with the same luck."""

    def __init__(self, args: Args, world: World, scenario: Scenario) -> None:
        from metarec_gym.evaluation.headroom import EvalSettings, horizons_of

        self.args, self.world, self.scenario = args, world, scenario
        self.settings = {name: value for name, value in scenario.kwargs.items() if name != "world"}
        # as experiments.compare plays, so that its numbers stand in one table with these
        self.settings["horizon"] = horizons_of(world, EvalSettings(env=scenario.settings))[0]

    def env(self, fold: str, rows: int, mode: str) -> MetaRecVectorEnv:
        from metarec_gym.envs.vector_env import MetaRecVectorEnv

        return MetaRecVectorEnv(rows, world=self.world, fold=fold, autoreset_mode=mode, **self.settings)  # type: ignore[arg-type]

    def value(self, fold: str, choose: Choose | None) -> Floats:
        """Value of every user of the fold, (users,); None chooses at random."""
        from metarec_gym.evaluation.rollout import per_user, pick_contexts
        from metarec_gym.seeding import stream

        args = self.args
        starts = pick_contexts(
            self.world, fold, per_user=args.contexts_per_user, seed=args.seed, max_users=args.max_users
        ).numpy()
        env = self.env(fold, len(starts), "Disabled")
        env.action_space.seed(stream(args.seed, "scenario_scores", "random", fold) % 2**32)
        total = np.zeros(len(starts))
        for replicate in range(args.replicates):
            options = {"start_state": starts, "noise": np.full(len(starts), replicate)}
            obs, _ = env.reset(seed=stream(args.seed, "scenario_scores", fold), options=options)
            for _ in range(env.horizon):
                obs, *_ = env.step(env.action_space.sample() if choose is None else choose(obs))
                total += env.expected_reward.numpy()
        env.close()
        users = self.world.tensors["start_user"].numpy()[starts]
        return per_user(users, total / (args.replicates * env.horizon))

    def fixed(self, k: int) -> Choose:
        """One strategy for all."""
        strategies, slate = self.world.n_strategies, self.env("A", 1, "Disabled").slate_size
        if self.scenario.family == "Slots":
            return lambda obs: np.full((len(obs), slate), k)
        weights = np.where(np.arange(strategies) == k, 1.0, -1.0).astype(np.float32)
        return lambda obs: np.tile(weights, (len(obs), 1))

    def ppo(self, fold: str, seed: int) -> Choose:
        """PPO of Stable-Baselines3 with the settings of `agents.sb3`; its most likely action, no exploration."""
        import torch
        from stable_baselines3 import PPO
        from stable_baselines3.common.vec_env import VecNormalize

        from agents.sb3 import Args as Hyper
        from agents.sb3 import isolated_generators
        from metarec_gym.envs.sb3 import SB3VecEnv
        from metarec_gym.seeding import stream

        hyper = Hyper()
        rows = SB3VecEnv(self.env(fold, self.args.num_envs, "SameStep"))
        with isolated_generators():
            model = PPO(
                "MlpPolicy",
                VecNormalize(rows, norm_obs=False, gamma=hyper.gamma, clip_reward=float("inf")),
                learning_rate=lambda left: hyper.learning_rate * left,
                n_steps=hyper.num_steps,
                batch_size=min(hyper.minibatch_size, hyper.num_steps * self.args.num_envs),
                n_epochs=hyper.epochs,
                gamma=hyper.gamma,
                gae_lambda=hyper.gae_lambda,
                ent_coef=hyper.ent_coef,
                policy_kwargs={"net_arch": list(hyper.hidden), "activation_fn": torch.nn.Tanh},
                seed=stream(seed, "scenario_scores", "learner", fold) % 2**32,
                device="cpu",
            )
            rows.seed(stream(seed, "scenario_scores", "env", fold))
            model.learn(self.args.steps)
        return lambda obs: model.predict(obs, deterministic=True)[0]


def run(args: Args) -> dict[str, Any]:
    """Measures and prints, or finds the finished result.

    Args:
        args: The command line.

    Returns:
        The result row.
    """
    from metarec_gym.evaluation.intervals import mean_interval
    from metarec_gym.evaluation.metrics import lift
    from metarec_gym.world import resolve_world

    scenario = scenario_of(args)
    world = resolve_world(args.world or scenario.log)
    folder = run_folder(args, world)
    done = folder.result()
    if done is None:
        folder.begin(args)
        started = time.perf_counter()
        scorer = _Scorer(args, world, scenario)
        fixed = {f: [scorer.value(f, scorer.fixed(k)) for k in range(world.n_strategies)] for f in FOLDS}
        best = {f: int(np.argmax([values.mean() for values in fixed[f]])) for f in FOLDS}
        by_seed: list[dict[str, Floats]] = []
        for seed in range(args.seeds):
            by_seed.append({})
            for train, test in (FOLDS, FOLDS[::-1]):
                by_seed[-1][test] = scorer.value(test, scorer.ppo(train, seed))
                if not args.quiet:
                    print(f"ppo  seed {seed}  trained on {train}  scored on {test}", flush=True)
        # chosen on the other fold
        single = np.concatenate([fixed["A"][best["B"]], fixed["B"][best["A"]]])
        matrix = {
            "random": np.concatenate([scorer.value(f, None) for f in FOLDS]),
            "single best": single,
            "ppo": np.stack([np.concatenate([values[f] for f in FOLDS]) for values in by_seed]),
        }
        rows = {
            name: {"value": mean_interval(values).to_json(), "lift": lift(values, single).to_json()}
            for name, values in matrix.items()
        }
        done = folder.finish(
            {
                "id": args.id,
                "world": world.hash,
                "seed": args.seed,
                "device": "cpu",
                "horizon": scorer.settings["horizon"],
                "users": len(single),
                "ppo_seeds": args.seeds,
                "single_best": {f"scored on {t}": world.strategies[best[s]] for t, s in (FOLDS, FOLDS[::-1])},
                "rows": rows,
                "seconds": time.perf_counter() - started,
            }
        )
    for name, row in done["rows"].items():
        value, gain = row["value"], row["lift"]
        print(
            f"{name:12s} {value['estimate']:.3f} [{value['low']:.3f}, {value['high']:.3f}]   lift over single best "
            f"{gain['estimate']:+.1%} [{gain['low']:+.1%}, {gain['high']:+.1%}]"
        )
    print(f"result   {folder.path / 'result.json'}")
    return done


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
