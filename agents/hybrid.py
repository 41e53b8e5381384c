"""A fixed weighted hybrid: one fusion of all strategies' lists for everyone, its weights chosen on training users by CMA-ES.

It is played in `MetaRec/Blend-v0`, where a request pays for every strategy whose weight is above 0; so it is no `Policy` over
strategies, but an `ActingPolicy`: `rollout` makes the environment that it needs.

    rollout(world, "B", learn_fixed_hybrid(lesson), ...)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from agents.search import Args, CmaEs
from agents.service import EnvRecipe, row_seeds
from metarec_gym.envs.actions import blend_weights
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import Chooses, StatelessPolicy
from metarec_gym.seeding import stream

FINAL_SHARE = 0.2
"""Share of the budget that compares what was found with equal weights and every strategy alone, on fresh users."""


class FixedBlend(StatelessPolicy):
    """The same fusion at every request.

    Args:
        weights: float32 (K,), as the action of Blend: -1 = does not take part, 1 = full weight.

    Raises:
        ValueError: When the weights are no vector of numbers in [-1, 1].
    """

    chooses: Chooses = "blend"

    def __init__(self, weights: Tensor) -> None:
        if weights.ndim != 1 or not bool((weights.abs() <= 1.0).all()):
            raise ValueError(f"the weights are {weights.tolist()}; expected K numbers in [-1, 1]")
        self.weights = weights.to(torch.float32)

    def act(self, obs: Tensor, action_mask: Tensor, draw: Tensor | None = None) -> Tensor:
        """The weights of what is in service, see `in_service`; float32 (num_rows, K)."""
        return in_service(self.weights.to(obs.device)[None], action_mask)


def in_service(weights: Tensor, action_mask: Tensor) -> Tensor:
    """Weights without what is out of service: that would cost and bring nothing. Where nothing is left, all that serve alike.

    Args:
        weights: float32 (num_rows or 1, K), as the action of Blend.
        action_mask: bool (num_rows, K).

    Returns:
        float32 (num_rows, K).
    """
    weight = torch.where(action_mask, blend_weights(weights), 0.0)
    weight = torch.where((weight > 0).any(dim=1, keepdim=True), weight, action_mask.to(torch.float32))
    # a weight of 0 is -1 exactly
    return 2.0 * weight - 1.0


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
    _, info = env.reset(seed=seeds * len(weights))
    alive = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    total, served = torch.zeros(env.num_envs, dtype=torch.float64, device=env.device), 0
    with torch.no_grad():
        for _ in range(env.horizon):
            _, reward, terminated, truncated, info = env.step(in_service(action, info["action_mask"].to(torch.bool)))
            total += torch.where(alive, reward, 0.0)
            served += int(alive.sum())
            alive = alive & ~(terminated | truncated)
    return (total / env.horizon).view(len(weights), len(seeds)).cpu(), served


def learn_fixed_hybrid(lesson: Any, population: int = 12, users: int = 16) -> FixedBlend:
    """Learns the weights of the fusion from requests to training users.

    CMA-ES searches them (Hansen, 2016); the last share of the budget plays the mean that it ends with, its best candidate, equal
    weights and every strategy alone with the same fresh users, and the best of these is the answer.

    Args:
        lesson: What may be learned from.
        population: Candidates a generation.
        users: Fresh users a generation.

    Returns:
        The fusion.

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
    alone = 2.0 * torch.eye(len(equal), dtype=torch.float64) - 1.0
    found = torch.stack([equal, best[1], equal if answer is None else answer])
    finalists = torch.cat([found, alone]).clamp(-1.0, 1.0)
    count = max(2, (lesson.requests - spent) // (len(finalists) * env.horizon))
    final = recipe.make(len(finalists) * count, action="blend")
    values, _ = blend_returns(final, finalists, row_seeds(seed, count, "final"))
    return FixedBlend(finalists[int(values.mean(dim=1).argmax())])
