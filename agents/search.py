"""Search over the parameters of a small policy network: genetic algorithm, particle swarm, CMA-ES, random search, TPE.

| method | library | searches |
|---|---|---|
| `ga`, `pso` | pymoo | weights of the network |
| `cma_es` | cma (Hansen's CMA-ES, diagonal covariance) | weights of the network |
| `random_search` | none | weights of the network, drawn around the start |
| `bayes_schedule` | optuna (TPE) | "strategy i until request n, then j", n moved by the history length |

A whole generation is one batched rollout: rows are candidates x users, every candidate meets the same users with the same luck,
and the next generation meets fresh ones. Scores are differences to the start policy on the same users. The budget counts every
request that a training user saw: those that fitted the start policy, those of the generations and those of the final, in which
the best few meet fresh users once more (the best of many noisy scores is mostly luck).

    python -m experiments.train --agent cma_es --world worlds/movielens_100k
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from agents.population import Network, PopulationEvaluator, make_network, ridge_start, searched_numbers
from agents.ppo.args import TrainResult
from agents.service import EnvRecipe, Service, row_seeds, serve_episodes, whole_requests
from metarec_gym.policy import MlpPolicy, UniformPolicy
from metarec_gym.seeding import numpy_rng, stream

EXPLORE = 0.3
"""Share of uniform choices while the first fit serves."""
CHECKPOINT_SCHEMA = 1
Method = Literal["ga", "pso", "cma_es", "random_search", "bayes_schedule"]


@dataclass(frozen=True)
class Args:
    """Settings of a search."""

    method: Method = "cma_es"
    """Which one; see the module."""
    seed: int = 0
    """Seed of candidates, users and luck."""
    total_steps: int = 300_000
    """Requests to learn from, everything included."""
    population: int = 24
    """Candidates a generation."""
    users: int = 16
    """Fresh users that a generation meets."""
    features: tuple[str, ...] = ()
    """Blocks of the observation that the network sees; none named = all."""
    searched: tuple[str, ...] = ("request_fraction", "history_length")
    """Blocks whose weights are searched, with the constants; the others keep the start's: few numbers are found faster. None
    named = everything, as always with hidden layers or without a warm start."""
    hidden: tuple[int, ...] = ()
    """Widths of the tanh layers; none = a linear policy."""
    sigma: float = 1.0
    """Deviation of the first candidates from the start; outputs of the start policy have deviation 1 over the strategies."""
    warm_start: bool = True
    """Start from the ridge regression of rewards; False starts from a network of zeros (as networks with hidden layers do)."""
    warm_share: float = 0.3
    """Share of the budget that the start policy (a ridge regression of rewards) is fitted to: half of it random service, half
    service by the first fit with exploration."""
    final_share: float = 0.2
    """Share of the budget for the final."""
    finalists: int = 6
    """Candidates of the final, the start and the search's own answer included."""

    def __post_init__(self) -> None:
        if self.population < 4 or self.users < 1 or self.finalists < 2:
            raise ValueError(
                f"population is {self.population}, users {self.users} and finalists {self.finalists}; expected at least "
                "4, 1 and 2"
            )
        if min(self.warm_share, self.final_share) <= 0.0 or self.warm_share + self.final_share >= 1.0:
            raise ValueError(
                f"warm_share is {self.warm_share} and final_share {self.final_share}; both must be above 0 and their sum "
                "below 1: the rest is searched with"
            )


# ---- optimisers, by ask and tell


class Optimiser(Protocol):
    """Asks for a population and is told its scores (higher is better)."""

    def ask(self) -> Tensor:
        """float64 (population, dim)."""
        ...

    def tell(self, population: Tensor, scores: Tensor) -> None:
        """Scores (population,) of what was asked last."""
        ...

    def answer(self) -> Tensor | None:
        """float64 (dim,): its own estimate of the optimum, None where it has none."""
        ...


class RandomSearch:
    """Normal draws around the start."""

    def __init__(self, start: Tensor, args: Args, seed: int) -> None:
        self.start, self.args, self.rng = start, args, numpy_rng(seed, "random search")

    def ask(self) -> Tensor:
        """Fresh draws."""
        drawn = self.rng.standard_normal((self.args.population, len(self.start)))
        return self.start + self.args.sigma * torch.from_numpy(drawn)

    def tell(self, population: Tensor, scores: Tensor) -> None:
        """Nothing is learned on the way."""

    def answer(self) -> Tensor | None:
        """None."""
        return None


class CmaEs:
    """CMA-ES with a diagonal covariance (Ros and Hansen, 2008): a full one does not pay at so few generations."""

    def __init__(self, start: Tensor, args: Args, seed: int) -> None:
        cma = _library("cma")
        rng = numpy_rng(seed, "cma")
        options = {
            "popsize": args.population,
            "CMA_diagonal": True,
            # its own generator, so that numpy's global one stays as it is
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": math.nan,
            "verbose": -9,
            # generations end with the budget, not with the library's criteria
            "tolfun": 0,
            "tolfunhist": 0,
            "tolflatfitness": 10**9,
            "tolstagnation": 10**9,
        }
        self.strategy: Any = cma.CMAEvolutionStrategy(start.numpy(), args.sigma, options)

    def ask(self) -> Tensor:
        """Draws of the present distribution."""
        return torch.from_numpy(np.stack(self.strategy.ask()))

    def tell(self, population: Tensor, scores: Tensor) -> None:
        """Moves the distribution."""
        self.strategy.tell(list(population.numpy()), (-scores).tolist())

    def answer(self) -> Tensor | None:
        """The mean of the distribution."""
        return torch.from_numpy(np.asarray(self.strategy.mean, dtype=np.float64).copy())


class Pymoo:
    """pymoo's genetic algorithm (SBX, polynomial mutation) or particle swarm, within 5 sigma of the start."""

    def __init__(self, start: Tensor, args: Args, seed: int) -> None:
        centre, reach = start.numpy(), 5.0 * args.sigma
        problem = _library("pymoo.core.problem").Problem(
            n_var=len(centre), n_obj=1, xl=centre - reach, xu=centre + reach
        )
        drawn = numpy_rng(seed, "first population").standard_normal((args.population, len(centre)))
        first = np.clip(centre + args.sigma * drawn, problem.xl, problem.xu)
        kind = {"ga": ("ga", "GA"), "pso": ("pso", "PSO")}[args.method]
        maker = getattr(_library(f"pymoo.algorithms.soo.nonconvex.{kind[0]}"), kind[1])
        # `pertube_best` (sic) would ask for one more particle outside the population
        extra = {"pertube_best": False} if args.method == "pso" else {}
        self.algorithm: Any = maker(pop_size=args.population, sampling=first, **extra)
        self.algorithm.setup(
            problem,
            seed=seed % 2**31,
            verbose=False,
            # the budget ends the search
            termination=("n_gen", 10**9),
        )
        self.asked: Any = None

    def ask(self) -> Tensor:
        """The next generation."""
        self.asked = self.algorithm.ask()
        return torch.from_numpy(np.array(self.asked.get("X"), dtype=np.float64))

    def tell(self, population: Tensor, scores: Tensor) -> None:
        """Scores of the generation."""
        self.asked.set("F", -scores.numpy()[:, None])
        # without these pymoo takes the candidates for not evaluated
        count = len(population)
        self.asked.set("G", np.zeros((count, 0)), "H", np.zeros((count, 0)))
        for individual in self.asked:
            individual.evaluated.update({"F", "G", "H"})
        self.algorithm.tell(infills=self.asked)

    def answer(self) -> Tensor | None:
        """None: its best one is the luckiest one; the final tells."""
        return None


class BayesSchedule:
    """TPE over first strategy, second strategy, request of the switch, and how the history length moves it.

    A schedule is a linear policy of two inputs, `request_fraction` and `history_length`: the first strategy's output falls
    and the second's rises with what lies beyond the switch, the others lie far below.
    """

    FAR = 1e3
    STEEP = 1e2

    def __init__(self, network: Network, horizon: int, args: Args, seed: int) -> None:
        optuna = _library("optuna", extra="tune")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.network, self.horizon, self.args = network, horizon, args
        sampler = optuna.samplers.TPESampler(
            seed=seed % 2**32, multivariate=True, constant_liar=True, n_startup_trials=2 * args.population
        )
        self.study: Any = optuna.create_study(direction="maximize", sampler=sampler)
        self.trials: list[Any] = []

    def vector(self, first: int, second: int, switch: float, by_history: float = 0.0) -> Tensor:
        """The schedule as a network; `switch` in requests, `by_history` in requests a unit of `history_length`."""
        k = len(self.network.strategies)
        # beyond > 0 from the first request after the switch on; half a request keeps it off the whole numbers
        direction = torch.tensor([float(self.horizon), -by_history], dtype=torch.float64)
        beyond = direction * self.network.scale.to(torch.float64)
        constant = float((direction * self.network.mean.to(torch.float64)).sum()) - (switch - 0.5)
        weight = torch.zeros(k, 2, dtype=torch.float64)
        bias = torch.full((k,), -self.FAR * self.STEEP, dtype=torch.float64)
        weight[second], bias[second] = self.STEEP * beyond, self.STEEP * constant
        if first == second:
            weight[first], bias[first] = 0.0, 0.0
        else:
            weight[first], bias[first] = -self.STEEP * beyond, -self.STEEP * constant
        return torch.cat([weight.flatten(), bias])

    def ask(self) -> Tensor:
        """A batch of trials; those not told yet count as bad ones."""
        self.trials = [self.study.ask() for _ in range(self.args.population)]
        names, found = range(len(self.network.strategies)), []
        for trial in self.trials:
            first = trial.suggest_categorical("first", list(names))
            second = trial.suggest_categorical("second", list(names))
            switch = trial.suggest_int("switch", 1, max(self.horizon - 1, 1))
            by_history = trial.suggest_float("by_history", -self.horizon / 2, self.horizon / 2)
            found.append(self.vector(first, second, switch, by_history))
        return torch.stack(found)

    def tell(self, population: Tensor, scores: Tensor) -> None:
        """Values of the batch."""
        for trial, score in zip(self.trials, scores.tolist(), strict=True):
            self.study.tell(trial, score)

    def answer(self) -> Tensor | None:
        """None."""
        return None


def _library(name: str, extra: str = "agents") -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ModuleNotFoundError(f"{package} is not installed; pip install 'metarec-gym[{extra}]'") from error


# ---- the search


def train(
    env: Any,
    args: Args,
    *,
    run_dir: str | Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> TrainResult:
    """Searches with `args.total_steps` requests of the environment's users.

    Args:
        env: A `MetaRecVectorEnv` of `MetaRec/Select-v0`; the search makes its own ones like it.
        args: Settings.
        run_dir: Gets `checkpoint.safetensors` after each generation, and `policy.safetensors`; None writes nothing.
        progress: Prints a line with the time left.
        resume: Goes on from the checkpoint; the optimiser is told its past again, so the end is the same.

    Returns:
        The policy with its numbers.

    Raises:
        ValueError: When the budget leaves no generation, or the checkpoint is of another search.
    """
    started, recipe = time.perf_counter(), EnvRecipe.of(env)
    if recipe.settings["action"] != "select":
        raise ValueError(f"the environment's action is {recipe.settings['action']!r}, expected 'select'")
    root = stream(args.seed, "search", args.method)
    bayes = args.method == "bayes_schedule"
    # a schedule needs no start policy; its reference is one fixed schedule
    warm = whole_requests(0.02 if bayes else args.warm_share, args.total_steps)
    features = ("request_fraction", "history_length") if bayes else args.features
    service, network = _warm_up(recipe, warm, features, args, root)
    evaluator = PopulationEvaluator(recipe, network)
    start, places, optimiser = _start(recipe, network, service, env.horizon, args, root)
    spent, cost = service.requests, (args.population + 1) * args.users * env.horizon
    final = whole_requests(args.final_share, args.total_steps)
    generations = (args.total_steps - spent - final) // cost
    if generations < 1:
        raise ValueError(
            f"total_steps is {args.total_steps}: {spent} for the start and {final} for the final leave no generation of "
            f"{cost} requests; raise total_steps or lower population or users"
        )
    identity = json.loads(json.dumps({"args": dataclasses.asdict(args), "world": env.world.hash} | _plain(recipe)))
    checkpoint = Path(run_dir) / "checkpoint.safetensors" if run_dir is not None else None
    past = _load(checkpoint, identity) if checkpoint is not None and resume and checkpoint.is_file() else []
    kept: list[tuple[Tensor, float]] = []
    scores_kept: list[Tensor] = []
    history: list[dict[str, float]] = []
    for generation in range(generations):
        asked = optimiser.ask()
        population = start.repeat(len(asked), 1)
        population[:, places] = asked
        if generation < len(past):
            scores, count = past[generation][:-1], int(past[generation][-1])
        else:
            before = evaluator.requests
            seeds = row_seeds(root, args.users, "generation", generation)
            values = evaluator.evaluate(torch.cat([population, start[None]]), seeds)
            scores, count = values[:-1] - values[-1], evaluator.requests - before
        optimiser.tell(asked, scores)
        spent += count
        best = int(scores.argmax())
        kept.append((population[best], float(scores[best])))
        scores_kept.append(torch.cat([scores, torch.tensor([float(count)], dtype=torch.float64)]))
        history.append({"step": float(spent), "search/best": float(scores[best]), "search/mean": float(scores.mean())})
        if checkpoint is not None and generation >= len(past):
            _save(checkpoint, scores_kept, identity)
        if progress:
            left_s = (time.perf_counter() - started) / (generation + 1) * (generations - generation - 1)
            print(f"\r{args.method} {spent:,} requests  best {scores[best]:+.3f}  {left_s:.0f} s left   ",
                  end="\n" if generation == generations - 1 else "", file=sys.stderr, flush=True)  # fmt: skip
    own, answer = optimiser.answer(), start.clone()
    if own is not None:
        answer[places] = own
    lucky = [vector for vector, _ in sorted(kept, key=lambda entry: -entry[1])]
    # later generations are better on the whole: half of the places are theirs
    late = [vector for vector, _ in kept[::-1]]
    finalists = _distinct([start, answer, *_interleave(late, lucky)])[: args.finalists]
    users = max(args.users, (args.total_steps - spent) // (len(finalists) * env.horizon))
    before = evaluator.requests
    values = evaluator.evaluate(torch.stack(finalists), row_seeds(root, users, "final"))
    spent += evaluator.requests - before
    winner = int(values.argmax())
    metrics = {**history[-1], "step": float(spent), "search/final": float(values[winner] - values[0])}
    metrics["search/final_users"] = float(users)
    meta = {"agent": args.method, "seed": args.seed, "world": env.world.hash, "fold": env.config.fold, "steps": spent}
    obs_dim = int(service.obs.shape[2])
    policy = network.export(finalists[winner], obs_dim, meta)
    if run_dir is not None:
        policy.save(Path(run_dir) / "policy.safetensors")
    return TrainResult(policy, spent, time.perf_counter() - started, metrics, history)


def _warm_up(
    recipe: EnvRecipe, requests: int, features: tuple[str, ...], args: Args, root: int
) -> tuple[Service, Network]:
    """What the start policy is fitted to, and the network over it."""
    regression = args.method != "bayes_schedule" and args.warm_start and not args.hidden
    first = requests // 2 if regression else requests
    service = serve_episodes(recipe, UniformPolicy(), first, seed=root, purpose="warm")
    hidden = () if args.method == "bayes_schedule" else args.hidden
    network = make_network(recipe, service, features, hidden)
    if regression:
        # lists that a good policy has used up look different from those under random service
        policy = network.export(ridge_start(network, service), int(service.obs.shape[2]))
        rest = requests - service.requests
        service = service.and_also(serve_episodes(recipe, policy, rest, seed=root, purpose="again", explore=EXPLORE))
    return service, network


def _start(
    recipe: EnvRecipe, network: Network, service: Service, horizon: int, args: Args, root: int
) -> tuple[Tensor, Tensor, Optimiser]:
    """The start policy, the places of its numbers that are searched, and the optimiser of those."""
    everything = torch.arange(network.dim)
    if args.method == "bayes_schedule":
        bayes = BayesSchedule(network, horizon, args, root)
        # the strategy of highest mean reward, always
        alive = service.alive
        hot = torch.nn.functional.one_hot(service.action[alive], len(network.strategies)).to(torch.float64)
        best = int((hot.T @ service.reward[alive].to(torch.float64) / hot.sum(dim=0).clamp(min=1.0)).argmax())
        return bayes.vector(best, best, 1), everything, bayes
    makers: dict[str, Callable[[Tensor, Args, int], Optimiser]] = {
        "ga": Pymoo,
        "pso": Pymoo,
        "cma_es": CmaEs,
        "random_search": RandomSearch,
    }
    start, places = torch.zeros(network.dim, dtype=torch.float64), everything
    if args.warm_start and not args.hidden:
        start = ridge_start(network, service)
        blocks = recipe.make(1).feature_slices
        unknown = sorted(set(args.searched) - set(blocks))
        if unknown:
            raise ValueError(f"searched names {unknown}; the observation has {list(blocks)}")
        columns = [torch.arange(blocks[name].start, blocks[name].stop) for name in args.searched]
        places = searched_numbers(network, torch.cat(columns) if columns else None)
    return start, places, makers[args.method](start[places], args, root)


def _interleave(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    return [vector for pair in zip(one, other, strict=True) for vector in pair]


def _distinct(vectors: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    for vector in vectors:
        if not any(torch.equal(vector, other) for other in found):
            found.append(vector)
    return found


def _plain(recipe: EnvRecipe) -> dict[str, Any]:
    return {"env": dict(recipe.settings)}


def _save(path: Path, scores: list[Tensor], identity: dict[str, Any]) -> None:
    """Scores of all generations: with the seed they are the whole state, since optimisers can be told their past again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    header = {"schema": str(CHECKPOINT_SCHEMA), "identity": json.dumps(identity)}
    save_file({"scores": torch.stack(scores).contiguous()}, str(partial), metadata=header)
    os.replace(partial, path)


def _load(path: Path, identity: dict[str, Any]) -> list[Tensor]:
    with safe_open(str(path), framework="pt") as file:
        header, scores = file.metadata(), file.get_tensor("scores")
    if int(header["schema"]) != CHECKPOINT_SCHEMA or json.loads(header["identity"]) != identity:
        raise ValueError(
            f"the checkpoint {path} is of another search; use another run folder or start without --resume"
        )
    return list(scores)


def _learn(lesson: Any, method: Method) -> MlpPolicy:
    env = lesson.make_env(1)
    # small budgets get small generations: at least a dozen of them
    args = Args(method=method, seed=lesson.seed, total_steps=lesson.requests)
    room = (1.0 - args.warm_share - args.final_share) * lesson.requests / 6
    while args.population > 8 and (args.population + 1) * args.users * env.horizon > room:
        args = dataclasses.replace(args, population=args.population - 4, users=max(8, args.users - 2))
    return train(env, args, progress=False).policy


def learn_ga(lesson: Any) -> MlpPolicy:
    """Genetic algorithm over a linear policy; lesson -> policy."""
    return _learn(lesson, "ga")


def learn_pso(lesson: Any) -> MlpPolicy:
    """Particle swarm over a linear policy; lesson -> policy."""
    return _learn(lesson, "pso")


def learn_cma_es(lesson: Any) -> MlpPolicy:
    """CMA-ES over a linear policy; lesson -> policy."""
    return _learn(lesson, "cma_es")


def learn_random_search(lesson: Any) -> MlpPolicy:
    """Random search around a linear policy; lesson -> policy."""
    return _learn(lesson, "random_search")


def learn_bayes_schedule(lesson: Any) -> MlpPolicy:
    """TPE over switch schedules; lesson -> policy."""
    return _learn(lesson, "bayes_schedule")
