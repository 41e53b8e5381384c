"""The fixed weighted hybrid is one fusion for everyone, pays for all that it asks, and is chosen on training users."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agents.hybrid import HybridEnv, blend_returns, learn_fixed_hybrid
from agents.service import EnvRecipe, row_seeds
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.evaluation.rollout import Window, rollout
from metarec_gym.policy import FixedPolicy
from metarec_gym.world import World

pytest.importorskip("cma")


def lesson_of(world: World, requests: int, **fixed: Any) -> Any:
    def make_env(num_envs: int, **settings: Any) -> MetaRecVectorEnv:
        both = {**fixed, **settings}
        return MetaRecVectorEnv(num_envs, world=world, fold="A", output="torch", autoreset_mode="SameStep", **both)

    return SimpleNamespace(world=world, fold="A", seed=0, requests=requests, horizon=world.horizon, make_env=make_env)


def test_a_hybrid_of_one_strategy_is_that_strategy(leaving_world: World) -> None:
    recipe = EnvRecipe.of(lesson_of(leaving_world, 0, cost_weight=0.3).make_env(1))
    alone = torch.tensor([-1.0, 1.0, -1.0])
    contexts = leaving_world.starts_of("A")
    same = {"contexts": contexts, "replicates": 2, "horizon": 12, "env_seed": 3}
    hybrid = rollout(
        leaving_world, "A", FixedPolicy(0), make_env=lambda n: HybridEnv(recipe.make(n, action="blend"), alone), **same
    )
    single = rollout(leaving_world, "A", FixedPolicy(1), make_env=recipe.make, **same)
    window = Window.until(12)
    assert hybrid.value(window) == pytest.approx(single.value(window), abs=1e-6)
    assert single.value(window).mean() != pytest.approx(0.0, abs=1e-3)


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
    weights = learn_fixed_hybrid(lesson_of(world, 8_000, cost_weight=0.5))
    costs = world.tensors["costs"]
    assert float(costs[weights > -1.0].sum()) < float(costs.sum())
    assert torch.equal(weights, learn_fixed_hybrid(lesson_of(world, 8_000, cost_weight=0.5)))


def test_a_hybrid_needs_a_blend_environment_and_a_budget(leaving_world: World) -> None:
    lesson = lesson_of(leaving_world, 50)
    with pytest.raises(ValueError, match="expected 'blend'"):
        HybridEnv(EnvRecipe.of(lesson.make_env(1)).make(2), torch.zeros(3))
    with pytest.raises(ValueError, match="leave no generation"):
        learn_fixed_hybrid(lesson)
