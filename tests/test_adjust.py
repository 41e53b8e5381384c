"""A deployed policy is adjusted to fresh feedback within its bound, and carried over to a pool with a new strategy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from agents.adjust import (
    Args,
    Logged,
    carry_over,
    cold_policy,
    finetune,
    finetune_on_log,
    log_probs_of,
    mean_kl,
    resized,
    unleashed,
)
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import MlpPolicy
from metarec_gym.world import World

SMALL = Args(num_steps=8, requests=32 * 8 * 6, minibatch_size=128, learning_rate=5e-3, gamma=0.0)


@pytest.fixture(scope="module")
def world() -> World:
    """Two types told by their histories; nobody leaves; the right strategy is worth 1 a request, the wrong one 0.2."""
    return World.synthetic(
        n_types=2,
        users_per_type=16,
        items_per_type=40,
        horizon=8,
        slate_size=2,
        history_lengths=(5, 10),
        leaving=None,
    )


def make_env(world: World, rows: int = 32, **settings: Any) -> MetaRecVectorEnv:
    return MetaRecVectorEnv(rows, world=world, autoreset_mode="SameStep", output="torch", **settings)


def deployed_for(world: World, right: bool) -> MlpPolicy:
    """Chooses by the taste's first two entries: each type's own specialist, or just the other one; never quite surely."""
    env = make_env(world, 1)
    width, k = env.single_observation_space.shape[0], world.n_strategies
    weight, bias = torch.zeros(k, width), torch.zeros(k)
    taste = env.feature_slices["taste"].start
    sign = 2.0 if right else -2.0
    weight[0, taste], weight[1, taste + 1] = sign, sign
    first = torch.eye(width), torch.zeros(width)
    return MlpPolicy([first, (weight, bias)], world.strategies)


def value(world: World, policy: MlpPolicy, fold: str = "B", **settings: Any) -> float:
    env = make_env(world, 64, fold=fold, **settings)
    obs, info = env.reset(seed=7)
    total = 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        probs = policy.action_probs(obs, info["action_mask"].bool())
        action = torch.multinomial(probs, 1, generator=generator)[:, 0]
        obs, _, _, _, info = env.step(action)
        total += float(env.expected_reward.mean()) / 8
    return total


def states(world: World, rows: int = 512, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    env = make_env(world, rows, **settings)
    obs, info = env.reset(seed=11)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        obs, _, _, _, info = env.step(torch.randint(world.n_strategies, (rows,), generator=generator))
    return obs, info["action_mask"].bool()


def test_after_its_users_changed_fine_tuning_gains_and_without_a_leash_most(world) -> None:
    """The deployed policy has the types the wrong way round: as if tastes had turned over."""
    deployed = deployed_for(world, right=False)
    free_args = dataclasses.replace(unleashed(SMALL), learning_rate=2e-2)
    tight = finetune(make_env(world), deployed, dataclasses.replace(free_args, kl_limit=0.1)).policy
    free = finetune(make_env(world), deployed, free_args).policy
    before, held, after = (value(world, policy) for policy in (deployed, tight, free))
    assert before + 0.02 < held < after
    assert after > before + 0.2


@pytest.mark.parametrize("kl_limit", [0.02, 0.2])
def test_no_policy_that_served_exceeds_the_bound_even_on_states_it_did_not_meet(world, kl_limit: float) -> None:
    deployed = deployed_for(world, right=False)
    args = dataclasses.replace(SMALL, kl_limit=kl_limit, kl_coef=0.0)
    marks = [256 * i for i in range(1, 7)]
    result = finetune(make_env(world), deployed, args, snapshots=marks)
    obs, mask = states(world, fold="B")
    assert len(result.snapshots) == 6
    for policy, row in zip(result.snapshots, result.history, strict=True):
        assert row["kl"] <= kl_limit
        assert mean_kl(policy, deployed, obs, mask) <= kl_limit
    # the bound was reached, so it was the bound that held
    assert min(row["kept"] for row in result.history) < 1.0
    assert result.history[-1]["kl"] > 0.5 * kl_limit


def test_a_penalty_keeps_the_policy_nearer(world) -> None:
    deployed = deployed_for(world, right=False)
    kls = []
    for kl_coef in (0.0, 1.0):
        args = dataclasses.replace(SMALL, kl_limit=float("inf"), kl_coef=kl_coef)
        kls.append(finetune(make_env(world), deployed, args).history[-1]["kl"])
    assert kls[1] < 0.5 * kls[0]


def test_the_divergence_is_the_one_worked_out_by_hand() -> None:
    # 0.8 ln(0.8 / 0.5) + 0.2 ln(0.2 / 0.5) = 0.19274
    fixed = [MlpPolicy([(torch.zeros(2, 3), torch.tensor(p).log())], ("a", "b")) for p in ([0.8, 0.2], [0.5, 0.5])]
    everything = torch.ones(4, 2, dtype=torch.bool)
    assert mean_kl(fixed[0], fixed[1], torch.zeros(4, 3), everything) == pytest.approx(0.19274, abs=1e-5)
    only_first = torch.tensor([[True, False]]).expand(4, -1)
    assert mean_kl(fixed[0], fixed[1], torch.zeros(4, 3), only_first) == 0.0


def test_equal_seeds_give_equal_adjustments_and_the_deployed_policy_stays_as_it_was(world) -> None:
    deployed = deployed_for(world, right=False)
    kept = [tensor.clone() for pair in deployed.layers for tensor in pair]
    one, two = (finetune(make_env(world), deployed, SMALL).policy for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one.layers, two.layers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, [t for pair in deployed.layers for t in pair], strict=True))


def test_logged_requests_with_propensities_teach_what_serves_better() -> None:
    """Strategy 1 pays 1, strategy 0 nothing; the log's policy chose 1 in one request of ten."""
    generator = torch.Generator().manual_seed(0)
    action = (torch.rand(4000, generator=generator) < 0.1).long()
    propensity = torch.where(action == 1, 0.1, 0.9)
    obs, mask = torch.randn(4000, 3, generator=generator), torch.ones(4000, 2, dtype=torch.bool)
    deployed = cold_policy(3, ("a", "b"), (8,), 0)
    log = Logged(obs, mask, action, propensity, action.float())
    args = dataclasses.replace(SMALL, learning_rate=1e-2, epochs=8, kl_coef=0.0, kl_limit=0.1)
    result = finetune_on_log(deployed, log, args)
    before, after = (log_probs_of(p, obs, mask)[:, 1].exp().mean() for p in (deployed, result.policy))
    assert after > before + 0.1
    assert result.history[0]["kl"] <= 0.1
    with pytest.raises(ValueError, match=r"propensity is not in \(0, 1\]"):
        finetune_on_log(deployed, dataclasses.replace(log, propensity=propensity * 0.0), args)


def grown(world: World) -> tuple[dict[str, slice], MlpPolicy]:
    """Features of the whole pool, and a policy that knows all strategies but `specialist_1`."""
    slices = make_env(world, 1).feature_slices
    known = [s for s in world.strategies if s != "specialist_1"]
    generator = torch.Generator().manual_seed(3)
    width = make_env(world, 1).single_observation_space.shape[0] - 6
    layers = [(torch.randn(4, width, generator=generator), torch.randn(4, generator=generator)),
              (torch.randn(2, 4, generator=generator), torch.randn(2, generator=generator))]  # fmt: skip
    return slices, MlpPolicy(layers, tuple(known))


def test_a_new_strategy_leaves_the_odds_of_the_known_ones_as_they_were(world) -> None:
    slices, policy = grown(world)
    policy_new = carry_over(policy, world.strategies, slices)
    obs, mask = states(world)
    place = world.strategies.index("specialist_1")
    blocks = [name for name in slices if name.startswith("list_") or "strategy" in name]
    gone = [slices[name].start + place for name in blocks]
    old_obs = obs[:, [i for i in range(obs.shape[1]) if i not in gone]]
    rest = [i for i in range(world.n_strategies) if i != place]
    expected, got = policy.logits(old_obs), policy_new.logits(obs)
    torch.testing.assert_close(got[:, rest], expected)
    # the new one is as likely as a typical one
    torch.testing.assert_close(got[:, place], expected.mean(dim=1))
    assert mask.all()


def test_the_prior_share_is_the_share_where_the_others_are_alike(world) -> None:
    slices, policy = grown(world)
    weight, bias = policy.layers[-1]
    policy.layers[-1] = weight * 0.0, bias * 0.0
    place = world.strategies.index("specialist_1")
    probs = carry_over(policy, world.strategies, slices, prior_share=0.2).action_probs(*states(world))
    assert probs[:, place].tolist() == pytest.approx([0.2] * len(probs), abs=1e-6)


def test_taking_a_strategy_away_and_giving_it_back_keeps_the_others(world) -> None:
    deployed = deployed_for(world, right=True)
    slices = make_env(world, 1).feature_slices
    rest = [s for s in world.strategies if s != "mixed"]
    back = carry_over(carry_over(deployed, rest, resized(slices, 2)), world.strategies, slices)
    obs, _ = states(world)
    torch.testing.assert_close(back.logits(obs)[:, :2], deployed.logits(obs)[:, :2])


def test_a_warm_start_is_worth_more_than_a_cold_one_at_equal_few_requests(world) -> None:
    """A pool gains `specialist_1`; the deployed policy knows that `specialist_0` is for users of type 0."""
    slices = make_env(world, 1).feature_slices
    right = deployed_for(world, right=True)
    layers = [(w.clone(), b.clone()) for w, b in right.layers]
    layers[-1][0][world.strategies.index("specialist_1")] = 0.0
    warm = MlpPolicy(layers, world.strategies)
    cold = cold_policy(warm.layers[0][0].shape[1], world.strategies, (64, 64), 0)
    args = dataclasses.replace(unleashed(SMALL), requests=512, ent_coef=0.01)
    values = {}
    for name, policy in (("warm", warm), ("cold", cold)):
        values[name] = value(world, finetune(make_env(world), policy, args).policy)
    assert slices["taste"].start == 0
    assert values["warm"] > values["cold"] + 0.03


def test_a_policy_for_another_pool_is_refused_with_what_to_do(world) -> None:
    _, policy = grown(world)
    with pytest.raises(ValueError, match="carry_over"):
        finetune(make_env(world), policy, SMALL)
    with pytest.raises(ValueError, match="nothing can be carried over"):
        carry_over(policy, ["x", "y"], {"taste": slice(0, 8)})
