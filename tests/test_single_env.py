import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from metarec_gym.envs import MetaRecEnv, MetaRecVectorEnv


@pytest.mark.parametrize("settings", [{}, {"session_requests": 4, "outage_rate": 0.2, "cost_weight": (0.0, 0.5)}])
@pytest.mark.parametrize("env_id", ["MetaRec/Select-v0", "MetaRec/Blend-v0", "MetaRec/Slots-v0"])
def test_gymnasium_and_sb3_checkers_pass_without_a_warning(env_id, settings):
    env = gymnasium.make(env_id, **settings).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True)
        sb3_check_env(env)


def test_make_gives_a_running_episode_under_the_usual_wrappers():
    env = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("MetaRec/Select-v0", horizon=5))
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert info["action_mask"].shape == (5,)
    steps, ended = 0, False
    while not ended:
        obs, _, terminated, truncated, info = env.step(env.action_space.sample())
        steps, ended = steps + 1, terminated or truncated
    assert info["episode"]["l"] == steps


def test_the_single_environment_is_a_row_of_the_batch(leaving_world):
    batch = MetaRecVectorEnv(5, world=leaving_world, autoreset_mode="Disabled")
    many, _ = batch.reset(seed=10)
    singles = [MetaRecEnv(world=leaving_world) for _ in range(5)]
    for row, env in enumerate(singles):
        obs, _ = env.reset(seed=10 + row)
        assert np.array_equal(obs, many[row])
    for action in (0, 2, 1):
        many, rewards, *_ = batch.step(np.full(5, action))
        for row, env in enumerate(singles):
            obs, reward, *_ = env.step(action)
            assert np.array_equal(obs, many[row])
            assert reward == float(rewards[row])


@pytest.mark.parametrize("action", ["blend", "slots"])
def test_a_single_blend_or_slots_environment_is_a_row_of_the_batch(leaving_world, action):
    settings = {"world": leaving_world, "action": action, "session_requests": 2}
    batch = MetaRecVectorEnv(3, autoreset_mode="Disabled", **settings)
    batch.reset(seed=10)
    batch.action_space.seed(0)
    singles = [MetaRecEnv(**settings) for _ in range(3)]
    for row, env in enumerate(singles):
        env.reset(seed=10 + row)
        assert env.action_space == batch.single_action_space
        assert np.array_equal(env.action_masks(), batch.action_masks()[row])
    for _ in range(5):
        actions = batch.action_space.sample()
        many, rewards, *_ = batch.step(actions)
        for row, env in enumerate(singles):
            obs, reward, *_, info = env.step(actions[row])
            assert np.array_equal(obs, many[row])
            assert reward == float(rewards[row])
            assert info["slate"].shape == (3,)


def test_types_are_plain_python_where_gymnasium_wants_them(tiny_world):
    env = MetaRecEnv(world=tiny_world)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(np.int64(1))
    assert type(reward) is float
    assert type(terminated) is bool
    assert type(truncated) is bool
    assert info["slate"].shape == (2,)


def test_reset_without_a_seed_goes_on_to_another_episode(tiny_world):
    env = MetaRecEnv(world=tiny_world)
    env.reset(seed=0)
    starts = {int(env.reset()[1]["start_state"]) for _ in range(20)}
    assert len(starts) > 3
    again = MetaRecEnv(world=tiny_world)
    again.reset(seed=0)
    assert {int(again.reset()[1]["start_state"]) for _ in range(20)} == starts
