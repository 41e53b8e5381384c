"""Ways to steer the runs of `MetaRec/Tune-v0`: defaults, schedules, search, evolution and PPO at an equal budget of runs.

A steering turns observations into actions. Searchers play whole runs and count them: a budget is a number of training runs. All
of them play on the training initialisations; what they found is judged on others.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from metarec_gym.envs.tune import ACTION_NAMES, TuneConfig, TuneVectorEnv
from metarec_gym.seeding import stream, torch_generator

DEFAULTS = {"step_users": 0.05, "step_items": 0.05, "step_weights": 0.05, "l2": 1e-4, "hardness": 1.0}
"""What one would set without looking: a step size of 0.05, little L2, uniform negatives."""
ROWS = 64
"""Training runs side by side."""
_FINALISTS = 8
_ACTIONS = len(ACTION_NAMES)


class Steering(Protocol):
    """float32 observations (runs, obs_dim) -> actions (runs, 5)."""

    def __call__(self, obs: Tensor) -> Tensor:
        """The action of every run."""
        ...


@dataclass(frozen=True)
class Schedule:
    """An action that moves along a straight line while training goes on (a constant where `slope` is 0)."""

    start: Tensor
    """(runs or 1, 5) action of the first step."""
    slope: Tensor
    """(runs or 1, 5) how much it changes until the end."""
    progress: int
    """Where the observation says how much of the run is done."""

    def __call__(self, obs: Tensor) -> Tensor:
        """The line at this point."""
        return (self.start + self.slope * obs[:, self.progress, None]).clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Cosine:
    """Step sizes fall along half a cosine from their first value to the smallest there is; L2 and hardness stay."""

    start: Tensor
    """(runs or 1, 5) action of the first step."""
    progress: int
    """Where the observation says how much of the run is done."""
    span: float
    """Logarithm of the largest over the smallest step size."""

    def __call__(self, obs: Tensor) -> Tensor:
        """The schedule at this point."""
        # step(t) = low + (peak - low) * (1 + cos(pi t)) / 2, written as an action: a = 2 log(step / low) / span - 1
        share = 0.5 * (1.0 + torch.cos(math.pi * obs[:, self.progress, None]))
        peak = torch.exp((self.start[:, :3] + 1.0) * 0.5 * self.span)
        steps = 2.0 * torch.log(1.0 + (peak - 1.0) * share) / self.span - 1.0
        rest = self.start[:, 3:].expand(len(obs), -1)
        return torch.cat([steps, rest], dim=1).clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Feedback:
    """A linear function of the observation."""

    weight: Tensor
    """(runs or 1, 5, obs_dim + 1), the last column is the constant."""

    def __call__(self, obs: Tensor) -> Tensor:
        """What the observation asks for."""
        action: Tensor = (self.weight[:, :, :-1] * obs[:, None, :]).sum(dim=2) + self.weight[:, :, -1]
        return action.clamp(-1.0, 1.0)


def play_runs(env: TuneVectorEnv, steering: Steering, seeds: list[int]) -> Tensor:
    """Return of a whole run in every row; an environment with torch output in disabled mode.

    Args:
        env: The runs.
        steering: What steers them; one set of parameters, or one for each row.
        seeds: Seed of every row: equal seeds meet equal initialisations and mini-batches.

    Returns:
        float32 (num_envs,): last metric less first, less costs.
    """
    obs, _ = env.reset(seed=seeds)
    total = torch.zeros(env.num_envs, device=env.device)
    for _ in range(env.horizon):
        obs, reward, _, _, _ = env.step(steering(obs))
        total = total + reward
    return total


def make_runs(log: Any, split: str = "train", **settings: Any) -> TuneVectorEnv:
    """The environment that searchers and judges of this module play."""
    return TuneVectorEnv(ROWS, log=log, split=split, output="torch", autoreset_mode="Disabled", **settings)


def evaluate(env: TuneVectorEnv, steering: Steering, runs: int, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns of `runs` runs (a multiple of the rows), the same ones for every steering; float64 (runs,)."""
    if runs % env.num_envs:
        raise ValueError(f"runs is {runs}, expected a multiple of {env.num_envs}, the rows of the environment")
    returns = [
        play_runs(env, steering, [stream(seed, "tune_judge", block, row) for row in range(env.num_envs)])
        for block in range(runs // env.num_envs)
    ]
    return torch.cat(returns).cpu().numpy().astype(np.float64)


# ---- without search


def default_action(config: TuneConfig) -> Tensor:
    """The defaults as an action, (1, 5)."""
    return torch.from_numpy(config.action_of(**DEFAULTS))[None]


def schedule_of(env: TuneVectorEnv, start: Tensor, slope: Tensor | None = None) -> Schedule:
    """A straight line, or a constant."""
    return Schedule(start, torch.zeros_like(start) if slope is None else slope, env.feature_slices["progress"].start)


def cosine_of(env: TuneVectorEnv, start: Tensor) -> Cosine:
    """Cosine decay of the step sizes from `start`."""
    low, high = env.config.step_size
    return Cosine(start, env.feature_slices["progress"].start, math.log(high / low))


def constant_default(env: TuneVectorEnv, budget: int, seed: int) -> Steering:
    """The defaults all the way; needs no budget."""
    return schedule_of(env, default_action(env.config))


def cosine_default(env: TuneVectorEnv, budget: int, seed: int) -> Steering:
    """Cosine decay from four times the default step sizes (the usual advice: start higher, end near 0); needs no budget."""
    values = {name: value * (4.0 if name.startswith("step") else 1.0) for name, value in DEFAULTS.items()}
    return cosine_of(env, torch.from_numpy(env.config.action_of(**values))[None])


# ---- search at a budget of training runs


def _best_of(
    env: TuneVectorEnv, make: Callable[[Tensor], Steering], candidates: Tensor, scores: Tensor, budget: int, seed: int
) -> Tensor:
    """The candidate of highest mean over `budget` further runs, shared by the best few: one run says little about one."""
    finalists = candidates[scores.argsort(descending=True)[:_FINALISTS]]
    rows = finalists.repeat(math.ceil(ROWS / len(finalists)), 1)[:ROWS]
    total = torch.zeros(ROWS)
    for block in range(max(budget // ROWS, 1)):
        # finalists meet the same initialisations: row r and r + len(finalists) * k differ, equal repeats share
        seeds = [stream(seed, "finals", block, row // len(finalists)) for row in range(ROWS)]
        total += play_runs(env, make(rows), seeds)
    means = torch.stack([total[k :: len(finalists)].mean() for k in range(len(finalists))])
    return finalists[int(means.argmax())][None]


def _search(env: TuneVectorEnv, make: Callable[[Tensor], Steering], budget: int, seed: int) -> Steering:
    generator = torch_generator(seed, "random_search")
    candidates, scores = [], []
    for block in range(max(budget // 2 // ROWS, 1)):
        drawn = torch.rand(ROWS, _ACTIONS, generator=generator) * 2.0 - 1.0
        # one initialisation a block: candidates differ by what they ask for, not by luck
        scores.append(play_runs(env, make(drawn), [stream(seed, "search", block)] * ROWS))
        candidates.append(drawn)
    centred = torch.cat([score - score.mean() for score in scores])
    return make(_best_of(env, make, torch.cat(candidates), centred, budget - budget // 2, seed))


def search_constant(env: TuneVectorEnv, budget: int, seed: int) -> Steering:
    """Random search for a constant: half of the budget on random settings, half on the best eight again."""
    return _search(env, lambda action: schedule_of(env, action), budget, seed)


def search_cosine(env: TuneVectorEnv, budget: int, seed: int) -> Steering:
    """Random search for the start of a cosine schedule, as `search_constant`."""
    return _search(env, lambda action: cosine_of(env, action), budget, seed)


def search_optuna(env: TuneVectorEnv, budget: int, seed: int) -> Steering:
    """Optuna's TPE over constants and cosine schedules: half of the budget on trials, half on the best eight again.

    Raises:
        ModuleNotFoundError: Without Optuna.
    """
    if not has_optuna():
        raise ModuleNotFoundError("optuna is not installed; pip install 'metarec-gym[tune]'")
    optuna: Any = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed % 2**32, multivariate=True, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    schedules: dict[str, Callable[[Tensor], Steering]] = {
        "constant": lambda action: schedule_of(env, action),
        "cosine": lambda action: cosine_of(env, action),
    }
    tried: list[tuple[str, Tensor, float]] = []
    for block in range(max(budget // 2 // ROWS, 1)):
        trials = [study.ask() for _ in range(ROWS)]
        kinds = [trial.suggest_categorical("schedule", sorted(schedules)) for trial in trials]
        actions = torch.tensor([[trial.suggest_float(n, -1.0, 1.0) for n in ACTION_NAMES] for trial in trials])
        cosine = torch.tensor([kind == "cosine" for kind in kinds])[:, None]
        both = [make(actions) for make in schedules.values()]
        mixed: Steering = lambda obs, b=both, c=cosine: torch.where(c, b[1](obs), b[0](obs))  # noqa: E731
        scores = play_runs(env, mixed, [stream(seed, "search", block)] * ROWS)
        for trial, kind, action, score in zip(trials, kinds, actions, (scores - scores.mean()).tolist(), strict=True):
            study.tell(trial, score)
            tried.append((kind, action, score))
    # finals within the schedule that most of the best trials have
    best = sorted(tried, key=lambda entry: -entry[2])[:_FINALISTS]
    kind = max(sorted(schedules), key=lambda name: sum(entry[0] == name for entry in best))
    own = [entry for entry in tried if entry[0] == kind]
    candidates, values = torch.stack([entry[1] for entry in own]), torch.tensor([entry[2] for entry in own])
    make = schedules[kind]
    return make(_best_of(env, make, candidates, values, budget - budget // 2, seed))


def has_optuna() -> bool:
    """Whether Optuna is installed."""
    return importlib.util.find_spec("optuna") is not None


# ---- evolution


def _evolve(
    env: TuneVectorEnv, make: Callable[[Tensor], Steering], mean: Tensor, spread: Tensor, budget: int, seed: int
) -> Steering:
    """Cross-entropy method: draw a generation, move mean and spread to its best quarter; the last mean is the answer."""
    generator = torch_generator(seed, "evolution")
    for generation in range(max(budget // ROWS, 1)):
        population = mean + spread * torch.randn(ROWS, len(mean), generator=generator)
        scores = play_runs(env, make(population), [stream(seed, "evolution", generation)] * ROWS)
        best = population[scores.argsort(descending=True)[: ROWS // 4]]
        # half of the old spread stays: one generation is ranked on one initialisation
        mean, spread = best.mean(dim=0), 0.5 * spread + 0.5 * best.std(dim=0)
    return make(mean[None])


def evolve_schedule(env: TuneVectorEnv, budget: int, seed: int) -> Steering:
    """Evolution of a straight line for each of the five settings: ten numbers."""
    start = torch.cat([default_action(env.config)[0], torch.zeros(_ACTIONS)])
    make = lambda numbers: schedule_of(env, numbers[:, :_ACTIONS], numbers[:, _ACTIONS:])  # noqa: E731
    return _evolve(env, make, start, torch.full_like(start, 0.6), budget, seed)


def evolve_cosine(env: TuneVectorEnv, budget: int, seed: int) -> Steering:
    """Evolution of the start of a cosine schedule: five numbers, from the middle of the ranges."""
    start = torch.zeros(_ACTIONS)
    return _evolve(
        env, lambda action: cosine_of(env, action.clamp(-1.0, 1.0)), start, torch.full_like(start, 0.8), budget, seed
    )


def evolve_feedback(env: TuneVectorEnv, budget: int, seed: int) -> Steering:
    """Evolution of a linear function of the whole observation."""
    width = env.single_observation_space.shape[0] + 1  # type: ignore[index]
    start = torch.zeros(_ACTIONS, width)
    start[:, -1] = default_action(env.config)[0]
    spread = torch.full_like(start, 0.2)
    spread[:, -1] = 0.5
    spread[:, env.feature_slices["progress"]] = 0.5
    make = lambda numbers: Feedback(numbers.view(-1, _ACTIONS, width))  # noqa: E731
    return _evolve(env, make, start.flatten(), spread.flatten(), budget, seed)


# ---- PPO


@dataclass(frozen=True)
class Actor:
    """The mean action of a trained Gaussian actor: a tanh network."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    """Weight (out, in) and bias (out,) of each layer."""

    def __call__(self, obs: Tensor) -> Tensor:
        """The mean, clipped to the box."""
        hidden = obs
        for index, (weight, bias) in enumerate(self.layers):
            hidden = torch.nn.functional.linear(hidden, weight, bias)
            hidden = torch.tanh(hidden) if index < len(self.layers) - 1 else hidden
        return hidden.clamp(-1.0, 1.0)


def learn_ppo(env: TuneVectorEnv, budget: int, seed: int) -> Steering:
    """PPO of Stable-Baselines3 on `budget` runs; its mean action, no exploration."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecNormalize

    from agents.sb3 import isolated_generators
    from metarec_gym.envs.sb3 import SB3VecEnv

    settings = {name: getattr(env.config, name) for name in TuneConfig.__dataclass_fields__}
    rows = SB3VecEnv(TuneVectorEnv(ROWS, log=env.data, autoreset_mode="SameStep", **settings))
    with isolated_generators():
        model = PPO(
            "MlpPolicy",
            VecNormalize(rows, norm_obs=False, gamma=0.99, clip_reward=math.inf),
            learning_rate=1e-3,
            n_steps=env.horizon,
            batch_size=ROWS * env.horizon // 4,
            n_epochs=10,
            gamma=0.99,
            gae_lambda=0.95,
            policy_kwargs={"net_arch": [64, 64], "activation_fn": torch.nn.Tanh, "log_std_init": -0.7},
            seed=stream(seed, "sb3", "learner") % 2**32,
            device="cpu",
        )
        rows.seed(stream(seed, "ppo", "env"))
        model.learn(budget * env.horizon)
    extractor: Any = model.policy.mlp_extractor
    modules = [*extractor.policy_net, model.policy.action_net]
    linear = [module for module in modules if isinstance(module, torch.nn.Linear)]
    return Actor(tuple((m.weight.detach().clone(), m.bias.detach().clone()) for m in linear))


METHODS: dict[str, Callable[[TuneVectorEnv, int, int], Steering]] = {
    "constant_default": constant_default,
    "cosine_default": cosine_default,
    "search_constant": search_constant,
    "search_cosine": search_cosine,
    "search_optuna": search_optuna,
    "evolve_schedule": evolve_schedule,
    "evolve_cosine": evolve_cosine,
    "evolve_feedback": evolve_feedback,
    "ppo": learn_ppo,
}
"""(environment, budget in runs, seed) -> steering."""
FREE = ("constant_default", "cosine_default")
"""Methods that use no budget and no seed."""
