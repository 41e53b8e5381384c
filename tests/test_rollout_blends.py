"""Blends and slots are played by their own action, with the luck that Select meets, and pay for all that they ask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.hybrid import FixedBlend
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.evaluation.headroom import FOLDS, EvalSettings, Headroom, measure_headroom, play_task
from metarec_gym.evaluation.hull import offer
from metarec_gym.evaluation.leaderboard import PolicyPlays, blends_sentence, leaderboard
from metarec_gym.evaluation.metrics import usage_entropy
from metarec_gym.evaluation.rollout import Fixed, Played, Player, RolloutResult, Window, action_of, rollout
from metarec_gym.policy import Chooses, FixedPolicy, MlpPolicy, StatelessPolicy
from metarec_gym.world import World

COST_WEIGHT = 0.3


class FixedSlots(StatelessPolicy):
    """The same strategies in the same places at every request."""

    chooses: Chooses = "slots"

    def __init__(self, strategies: list[int]) -> None:
        self.strategies = torch.tensor(strategies)

    def act(self, obs: Tensor, action_mask: Tensor, draw: Tensor | None = None) -> Tensor:
        assert draw is not None
        assert draw.shape == (len(obs), len(self.strategies))
        return self.strategies.expand(len(obs), -1)


def _alone(k: int) -> FixedBlend:
    return FixedBlend(torch.where(torch.arange(3) == k, 1.0, -1.0))


def _play(world: World, player: Player, batch_rows: int = 64, **settings: Any) -> RolloutResult:
    return rollout(
        world,
        "B",
        player,
        contexts=world.starts_of("B"),
        replicates=2,
        horizon=world.horizon,
        env_seed=11,
        cost_weight=COST_WEIGHT,
        batch_rows=batch_rows,
        **settings,
    )


@pytest.mark.parametrize("k", [0, 2])
def test_all_weight_or_all_places_for_one_strategy_is_that_strategy(leaving_world: World, k: int) -> None:
    single = _play(leaving_world, Fixed(k))
    assert single.share is None
    # users leave, so that luck decides how many requests there are
    assert 0.2 < single.alive.mean() < 0.9
    for player in (_alone(k), FixedSlots([k] * 3)):
        other = _play(leaving_world, player)
        for name in ("reward", "action", "alive", "engaged"):
            np.testing.assert_array_equal(getattr(single, name), getattr(other, name))
        np.testing.assert_allclose(single.expected, other.expected, atol=1e-6)
        windows = (Window.until(12),)
        one, several = single.played(windows, 3), other.played(windows, 3)
        np.testing.assert_array_equal(one.served, several.served)
        np.testing.assert_array_equal(one.paid, several.paid)


def test_a_blend_of_all_pays_the_sum_of_all_costs_and_serves_by_its_weights(tiny_world: World) -> None:
    # weights 1, 1/2 and 1/2 in [0, 1]: shares 1/2, 1/4 and 1/4
    blend = FixedBlend(torch.tensor([1.0, 0.0, 0.0]))
    result = _play(tiny_world, blend)
    played = result.played((Window.until(4),), 3)
    # nobody leaves: 2 replicates of 4 requests
    assert played.served == pytest.approx(np.tile([4.0, 2.0, 2.0], (len(played.user), 1)))
    assert (played.paid == 8).all()
    assert (result.action == 0).all()
    # what is lost by the weight of costs is the sum of all costs at every request
    free = rollout(
        tiny_world, "B", blend, contexts=tiny_world.starts_of("B"), replicates=2, horizon=4, env_seed=11
    )  # fmt: skip
    lost = COST_WEIGHT * float(tiny_world.tensors["costs"].sum())
    assert free.expected - result.expected == pytest.approx(np.full(result.expected.shape, lost), abs=1e-6)


def test_places_of_several_strategies_share_the_request_and_pay_for_each(tiny_world: World) -> None:
    played = _play(tiny_world, FixedSlots([2, 1])).played((Window.until(4),), 3)
    assert (played.served == [0.0, 4.0, 4.0]).all()
    assert (played.paid == [0, 8, 8]).all()


@pytest.mark.parametrize("batch_rows", [11, 1000])
def test_a_sampled_blend_meets_the_same_luck_whatever_the_batch(leaving_world: World, batch_rows: int) -> None:
    obs_dim = MetaRecVectorEnv(1, world=leaving_world).single_observation_space.shape[0]
    generator = torch.Generator().manual_seed(3)
    layers = [(0.1 * torch.randn(3, obs_dim, generator=generator), torch.zeros(3))]
    policy = MlpPolicy(layers, leaving_world.strategies, chooses="blend", log_std=torch.full((3,), -0.5))
    reference, other = _play(leaving_world, policy), _play(leaving_world, policy, batch_rows)
    for name in ("reward", "action", "alive", "asked"):
        np.testing.assert_array_equal(getattr(reference, name), getattr(other, name))
    np.testing.assert_allclose(reference.share, other.share, atol=1e-5)  # type: ignore[arg-type]
    # its weights are drawn: another replicate, another choice
    assert (reference.action[:, 0] != reference.action[:, 1]).any()


def test_a_blend_in_an_environment_that_selects_is_refused(tiny_world: World) -> None:
    assert (action_of(_alone(0)), action_of(FixedPolicy(0)), action_of(Fixed(0))) == ("blend", "select", "select")

    def select(rows: int) -> MetaRecVectorEnv:
        return MetaRecVectorEnv(rows, world=tiny_world, fold="B", output="torch", autoreset_mode="Disabled")

    with pytest.raises(ValueError, match="action is 'blend' and the environment's 'select'"):
        _play(tiny_world, _alone(0), make_env=select)
    # a function does not say what it makes
    with pytest.raises(ValueError, match="attribute `chooses`"):
        _play(tiny_world, lambda: _alone(0))  # type: ignore[arg-type, return-value]


SETTINGS = EvalSettings(replicates=1, horizon=4, horizons=(), look=False, cost_weight=COST_WEIGHT)


@pytest.fixture(scope="module")
def headroom(tiny_world: World) -> Headroom:
    return measure_headroom(tiny_world, SETTINGS, progress=False)


def _plays(world: World, headroom: Headroom, name: str, player: Player) -> PolicyPlays:
    plays = {}
    for fold in FOLDS:
        arrays = play_task(
            world,
            fold,
            player,
            headroom.contexts[fold].tolist(),
            headroom.windows,
            headroom.horizon,
            0,
            headroom.played,
            SETTINGS,
            "cpu",
        )
        plays[fold] = [Played.from_arrays(arrays)]
    return PolicyPlays(name, "supervised", plays)


def test_the_leaderboard_charges_a_blend_for_all_and_shares_it_out_by_weight(
    tiny_world: World, headroom: Headroom
) -> None:
    costs = tiny_world.tensors["costs"].numpy().astype(np.float64)
    plays = [
        _plays(tiny_world, headroom, "blend", FixedBlend(torch.tensor([1.0, 0.0, 0.0]))),
        _plays(tiny_world, headroom, "alone", _alone(1)),
        _plays(tiny_world, headroom, "select", Fixed(1)),
    ]
    blend, alone, select = leaderboard(plays, headroom, costs)
    assert [row.blends for row in (blend, alone, select)] == [True, True, False]
    assert blends_sentence([select], 0) == ""
    assert "the best that blends, alone, gains" in blends_sentence([blend, alone, select], headroom.headline)
    assert blend.cost == pytest.approx(costs.sum())
    assert blend.share == pytest.approx([0.5, 0.25, 0.25])
    assert blend.entropy == pytest.approx(usage_entropy([2, 1, 1])) == pytest.approx(1.5)
    assert (alone.cost, alone.entropy) == (select.cost, select.entropy) == (pytest.approx(costs[1]), 0.0)
    assert alone.value[0].estimate == pytest.approx(select.value[0].estimate, abs=1e-6)
    # the hull's utility is before cost: what a blend pays is given back
    dear = offer(plays[0], costs, cost_weight=COST_WEIGHT, window=headroom.headline, horizon=4)
    assert dear.cost == pytest.approx(costs.sum())
    assert dear.utility == pytest.approx(blend.value[headroom.headline].estimate + COST_WEIGHT * costs.sum())
