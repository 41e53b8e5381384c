"""L5: PPO lands on LunarLander-v3, mean return of three seeds at least 200, which counts as solved there."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from agents import ppo
from metarec_gym.policy import MlpPolicy

pytest.importorskip("Box2D", reason="LunarLander needs Box2D: pip install 'metarec-gym[lander]'")

STEPS = 1_000_000
SEEDS = (0, 1, 2)
EPISODES = 50


def trained(seed: int) -> MlpPolicy:
    """RL Zoo's settings of PPO for LunarLander, but for the step size, which falls to zero here."""
    env = gym.make_vec(
        "LunarLander-v3", 16, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
    )
    args = ppo.Args(seed=seed, total_steps=STEPS, num_steps=1024, minibatch_size=64, epochs=4, gamma=0.999,
                    gae_lambda=0.98, learning_rate=3e-4, ent_coef=0.01, reward_scale=1.0)  # fmt: skip
    policy = ppo.train(env, args, progress=False).policy
    env.close()
    return policy


def mean_return(policy: MlpPolicy) -> float:
    """Of the likeliest actions, one episode a row."""
    env = gym.make_vec("LunarLander-v3", EPISODES, vectorization_mode="sync")
    obs, _ = env.reset(seed=1000)
    total, alive = np.zeros(EPISODES), np.ones(EPISODES, dtype=bool)
    while alive.any():
        probs = policy.action_probs(torch.as_tensor(obs), torch.ones(EPISODES, 4, dtype=torch.bool))
        obs, reward, terminated, truncated, _ = env.step(probs.argmax(dim=1).numpy())
        total += np.where(alive, reward, 0.0)
        alive &= ~(terminated | truncated)
    env.close()
    return float(total.mean())


@pytest.mark.slow
def test_ppo_lands_with_a_return_of_200_in_the_mean_of_three_seeds() -> None:
    returns = [mean_return(trained(seed)) for seed in SEEDS]
    print("returns", [round(value, 1) for value in returns])
    assert np.mean(returns) >= 200.0, returns
