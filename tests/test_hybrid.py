"""The fixed weighted hybrid is one fusion for everyone, pays for all that it asks, and is chosen on training users."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agents.hybrid import FixedBlend, blend_returns, in_service, learn_fixed_hybrid
from agents.service import EnvRecipe, row_seeds
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.world import World

pytest.importorskip("cma")


def lesson_of(world: World, requests: int, **fixed: Any) -> Any:
    def make_env(num_envs: int, **settings: Any) -> MetaRecVectorEnv:
        both = {**fixed, **settings}
        return MetaRecVectorEnv(num_envs, world=world, fold="A", output="torch", autoreset_mode="SameStep", **both)

    return SimpleNamespace(world=world, fold="A", seed=0, requests=requests, horizon=world.horizon, make_env=make_env)


def test_candidates_score_together_as_alone(leaving_world: World) -> None:
    recipe = EnvRecipe.of(lesson_of(leaving_world, 0).make_env(1))
    weights = torch.tensor([[1.0, -1.0, 0.0], [0.2, 0.4, -0.5]], dtype=torch.float64)
    seeds = row_seeds(1, 6, "users")
    together, served = blend_returns(recipe.make(12, action="blend"), weights, seeds)
    parts = [blend_returns(recipe.make(6, action="blend"), w[None], seeds) for w in weights]
    assert torch.equal(together, torch.cat([part for part, _ in parts]))
    assert served == sum(count for _, count in parts)


def test_learning_drops_strategies_that_cost_more_than_they_bring() -> None:
    # identical lists: nothing is gained by asking more than one strategy, and each one asked costs
    world = World.synthetic(
        n_types=2, users_per_type=4, items_per_type=20, horizon=4, slate_size=2, history_lengths=(0, 3), identical=True
    )
    weights = learn_fixed_hybrid(lesson_of(world, 8_000, cost_weight=0.5)).weights
    # the cheapest one alone
    assert torch.equal(weights > -1.0, torch.arange(3) == int(world.tensors["costs"].argmin()))
    assert torch.equal(weights, learn_fixed_hybrid(lesson_of(world, 8_000, cost_weight=0.5)).weights)


def test_what_is_out_of_service_is_not_asked() -> None:
    weights = torch.tensor([[1.0, 0.5, -1.0]])
    mask = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
    # in the last row nothing that has a weight serves
    expected = torch.tensor([[1.0, 0.5, -1.0], [-1.0, 0.5, -1.0], [-1.0, -1.0, 1.0]])
    assert torch.equal(in_service(weights, mask), expected)
    assert torch.equal(FixedBlend(weights[0]).act(torch.zeros(3, 2), mask), expected)


def test_a_hybrid_needs_weights_and_a_budget(leaving_world: World) -> None:
    for wrong in (torch.zeros(2, 3), torch.tensor([0.0, 1.5]), torch.tensor([0.0, torch.nan])):
        with pytest.raises(ValueError, match=r"expected K numbers in \[-1, 1\]"):
            FixedBlend(wrong)
    with pytest.raises(ValueError, match="leave no generation"):
        learn_fixed_hybrid(lesson_of(leaving_world, 50))
