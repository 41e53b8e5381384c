"""A fixed weighted hybrid: one fusion of all strategies' lists for everyone, its weights chosen on training users by CMA-ES.

It is played in `MetaRec/Blend-v0`, where a request pays for every strategy whose weight is above 0; so it is no `Policy` over
strategies. `HybridEnv` lets `rollout` play it: whatever strategy is asked for, the hybrid serves.

    weights = learn_fixed_hybrid(lesson)
    rollout(world, "B", FixedPolicy(0), make_env=lambda n: HybridEnv(recipe.make(n, fold="B", action="blend"), weights), ...)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from agents.search import Args, CmaEs
from agents.service import EnvRecipe, row_seeds
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.seeding import stream

FINAL_SHARE = 0.2
"""Share of the budget that compares the answer with equal weights and the best single candidates on fresh users."""


class HybridEnv:
    """A Blend environment that always blends with the same weights, offered as a Select environment.

    Args:
        env: A Blend environment with torch output.
        weights: float32 (K,), as the action of Blend: -1 = does not take part, 1 = full weight.
    """

    def __init__(self, env: MetaRecVectorEnv, weights: Tensor) -> None:
        if env.config.action != "blend" or weights.shape != (env.world.n_strategies,):
            raise ValueError(
                f"the action is {env.config.action!r} and the weights have shape {tuple(weights.shape)}; expected 'blend' "
                f"and ({env.world.n_strategies},)"
            )
        self.env, self.num_envs = env, env.num_envs
        self.weights = weights.to(env.device, torch.float32)

    @property
    def expected_reward(self) -> Tensor:
        """float32 (num_envs,), of the last request."""
        return self.env.expected_reward

    def reset(self, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """As the environment's."""
        return self.env.reset(**kwargs)

    def step(self, actions: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Serves the hybrid, whatever strategies `actions` name."""
        return self.env.step(self.weights.expand(self.num_envs, -1))

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()


def blend_returns(env: MetaRecVectorEnv, weights: Tensor, seeds: list[int]) -> tuple[Tensor, int]:
    """Every candidate's reward a request with every user, and the requests that users saw.

    Args:
        env: A Blend environment of C * U rows in disabled mode.
        weights: float64 (C, K).
        seeds: Of the U users: every candidate meets them with the same luck.

    Returns:
        float64 (C, U), and the number.
    """
    action = weights.clamp(-1.0, 1.0).to(env.device, torch.float32).repeat_interleave(len(seeds), dim=0)
    env.reset(seed=seeds * len(weights))
    alive = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    total, served = torch.zeros(env.num_envs, dtype=torch.float64, device=env.device), 0
    with torch.no_grad():
        for _ in range(env.horizon):
            _, reward, terminated, truncated, _ = env.step(action)
            total += torch.where(alive, reward, 0.0)
            served += int(alive.sum())
            alive = alive & ~(terminated | truncated)
    return (total / env.horizon).view(len(weights), len(seeds)).cpu(), served


def learn_fixed_hybrid(lesson: Any, population: int = 12, users: int = 16) -> Tensor:
    """Weights of the fusion; lesson -> float32 (K,), actions of Blend.

    Args:
        lesson: What may be learned from.
        population: Candidates a generation.
        users: Fresh users a generation.

    Raises:
        ValueError: When the budget leaves no generation.
    """
    recipe, seed = EnvRecipe.of(lesson.make_env(1)), stream(lesson.seed, "fixed hybrid")
    args = dataclasses.replace(Args(), population=population, users=users, sigma=0.5)
    equal = torch.zeros(lesson.world.n_strategies, dtype=torch.float64)
    optimiser = CmaEs(equal, args, seed)
    env = recipe.make(population * users, action="blend")
    cost = env.num_envs * env.horizon
    generations = int(lesson.requests * (1.0 - FINAL_SHARE)) // cost
    if generations < 1:
        raise ValueError(f"{lesson.requests} requests leave no generation of {cost}; raise the budget")
    spent, best = 0, (-torch.inf, equal)
    for generation in range(generations):
        candidates = optimiser.ask()
        values, served = blend_returns(env, candidates, row_seeds(seed, users, "generation", generation))
        scores = values.mean(dim=1)
        optimiser.tell(candidates, scores - scores.mean())
        spent += served
        lead = float(scores.max() - scores.mean())
        best = max(best, (lead, candidates[int(scores.argmax())]), key=lambda entry: entry[0])
    answer = optimiser.answer()
    finalists = torch.stack([equal, best[1], equal if answer is None else answer]).clamp(-1.0, 1.0)
    count = max(users, (lesson.requests - spent) // (len(finalists) * env.horizon))
    final = recipe.make(len(finalists) * count, action="blend")
    values, _ = blend_returns(final, finalists, row_seeds(seed, count, "final"))
    return finalists[int(values.mean(dim=1).argmax())].to(torch.float32)
