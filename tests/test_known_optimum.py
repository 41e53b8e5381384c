"""Blend and Slots on a world whose best value is known: PPO of Stable-Baselines3 learns on fold A and must reach it on fold B."""

import numpy as np
import pytest
import torch

from agents.sb3 import isolated_generators
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.envs.sb3 import SB3VecEnv
from metarec_gym.world import World

OPTIMUM = 2 * 0.5
"""Two items a request, each taken with probability 0.5 when the strategy of the user's type fills the slate."""


@pytest.fixture(scope="module")
def world() -> World:
    """Three types, told by the taste of their history; nobody leaves."""
    return World.synthetic(
        n_types=3,
        users_per_type=8,
        items_per_type=20,
        horizon=5,
        slate_size=2,
        history_lengths=(5, 10),
        leaving=None,
    )


def value(world, action, choose):
    """Expected reward a request on all start states of fold B; `choose` maps observations to actions."""
    starts = world.starts_of("B").numpy()
    env = MetaRecVectorEnv(len(starts), world=world, fold="B", action=action, autoreset_mode="Disabled")
    obs, _ = env.reset(seed=3, options={"start_state": starts})
    total = 0.0
    for _ in range(env.horizon):
        obs, *_ = env.step(choose(obs))
        total += float(env.expected_reward.mean())
    return total / env.horizon


def untrained_and_trained(world, action):
    """Value on fold B before and after learning on fold A."""
    from stable_baselines3 import PPO

    rows = SB3VecEnv(MetaRecVectorEnv(64, world=world, fold="A", action=action, autoreset_mode="SameStep"))
    with isolated_generators():
        model = PPO(
            "MlpPolicy",
            rows,
            n_steps=10,
            batch_size=160,
            n_epochs=4,
            gamma=0.0,
            learning_rate=5e-3,
            seed=0,
            device="cpu",
        )
        rows.seed(11)

        def choose(obs):
            return model.predict(obs, deterministic=True)[0]

        before = value(world, action, choose)
        model.learn(64 * 10 * 8)
    return before, value(world, action, choose)


def one_strategy(action, k, rows, world):
    """All places, or all weight, to strategy k."""
    if action == "slots":
        return np.full((rows, world.slate_size), k)
    return np.tile(np.where(np.arange(world.n_strategies) == k, 1.0, -1.0).astype(np.float32), (rows, 1))


@pytest.mark.parametrize("action", ["blend", "slots"])
def test_ppo_reaches_95_percent_of_the_known_optimum_on_users_it_never_met(world, action):
    # the same strategy for all is right for one user in three: 2 x (0.5 + 0.1 + 0.1) / 3
    assert value(world, action, lambda obs: one_strategy(action, 0, len(obs), world)) == pytest.approx(
        1.4 / 3, abs=1e-5
    )
    before, reached = untrained_and_trained(world, action)
    assert before < 0.7 * OPTIMUM
    assert 0.95 * OPTIMUM <= reached <= OPTIMUM + 1e-5


@pytest.mark.parametrize("action", ["blend", "slots"])
def test_the_strategy_of_the_users_type_is_the_optimum(world, action):
    def truth(obs):
        # the taste of a user with a history names the type
        types = torch.as_tensor(obs)[:, :3].argmax(dim=1).tolist()
        return np.concatenate([one_strategy(action, k, 1, world) for k in types])

    assert value(world, action, truth) == pytest.approx(OPTIMUM, abs=1e-5)


@pytest.mark.parametrize("action", ["blend", "slots"])
def test_one_strategy_alone_is_served_as_select_serves_it(leaving_world, action):
    """So what one strategy a request can win in Select, by any rule, it can win in Blend and Slots."""
    for k in range(leaving_world.n_strategies):
        steps = []
        for kind in ("select", action):
            env = MetaRecVectorEnv(32, world=leaving_world, action=kind, cost_weight=0.3, autoreset_mode="Disabled")
            env.reset(seed=5)
            alone = np.full(32, k) if kind == "select" else one_strategy(kind, k, 32, leaving_world)
            steps.append([env.step(alone) for _ in range(6)])
        for (_, reward, ended, _, info), (_, other, other_ended, _, other_info) in zip(*steps, strict=True):
            assert np.array_equal(info["slate"], other_info["slate"])
            assert np.allclose(reward, other, atol=1e-6)
            assert np.array_equal(ended, other_ended)
