import numpy as np
import pytest
from stable_baselines3.common.monitor import Monitor

from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.envs.sb3 import SB3VecEnv
from metarec_gym.world import World


def make(world, n=8, **settings):
    return SB3VecEnv(MetaRecVectorEnv(n, world=world, autoreset_mode="SameStep", **settings))


def test_a_mode_that_would_lose_the_terminal_observation_is_refused(tiny_world):
    with pytest.raises(ValueError, match="SB3 needs autoreset_mode='SameStep'"):
        SB3VecEnv(MetaRecVectorEnv(2, world=tiny_world))
    with pytest.raises(ValueError, match="output='numpy'"):
        SB3VecEnv(MetaRecVectorEnv(2, world=tiny_world, autoreset_mode="SameStep", output="torch"))


def test_finished_rows_carry_what_sb3_bootstraps_from(leaving_world):
    env = make(leaving_world)
    env.seed(0)
    env.reset()
    total, length, left, cut = np.zeros(8), np.zeros(8, int), 0, 0
    for step in range(60):
        _, reward, done, infos = env.step(np.full(8, step % 3))
        total, length = total + reward, length + 1
        for row in range(8):
            if not done[row]:
                assert infos[row] == {}
                continue
            assert infos[row]["episode"]["r"] == pytest.approx(total[row], abs=1e-5)
            assert infos[row]["episode"]["l"] == length[row]
            fraction = infos[row]["terminal_observation"][env.env.feature_slices["request_fraction"]]
            assert fraction == pytest.approx(length[row] / env.env.horizon)
            cut += infos[row]["TimeLimit.truncated"]
            left += not infos[row]["TimeLimit.truncated"]
            total[row], length[row] = 0.0, 0
    assert left > 0
    assert cut > 0


def test_a_user_who_leaves_at_the_last_request_is_terminated_and_not_truncated_for_sb3():
    """Gymnasium allows both flags; SB3 would bootstrap from the value of a user who is gone."""
    world = World.synthetic(
        n_types=2,
        users_per_type=4,
        items_per_type=16,
        horizon=4,
        slate_size=2,
        history_lengths=(0,),
        leaving=(1e3, 0.0),
    )
    batch = MetaRecVectorEnv(3, world=world, horizon=1, autoreset_mode="SameStep")
    batch.reset(seed=0)
    _, _, terminated, truncated, _ = batch.step(np.zeros(3, dtype=int))
    assert (terminated & truncated).all()
    env = SB3VecEnv(batch)
    env.reset()
    _, _, done, infos = env.step(np.zeros(3, dtype=int))
    assert done.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [False] * 3


def test_seeds_reproduce_a_run_and_are_used_once(leaving_world):
    runs = []
    for _ in range(2):
        env = make(leaving_world)
        env.seed(3)
        runs.append([env.reset(), env.reset()])
    assert np.array_equal(runs[0][0], runs[1][0])
    assert np.array_equal(runs[0][1], runs[1][1])
    assert not np.array_equal(runs[0][0], runs[0][1])


def test_stored_observations_do_not_shift_under_sb3s_late_storing(leaving_world):
    """SB3 stores the observation of before the step after the step; it must still be the one of before."""
    env = make(leaving_world)
    env.seed(0)
    last = env.reset()
    for step in range(10):
        copy = last.copy()
        obs, rewards, _, _ = env.step(np.full(8, step % 3))
        assert np.array_equal(last, copy)
        rewards += 100.0  # SB3 writes into the rewards it was given
        last = obs


def test_attributes_and_methods_reach_the_batch(tiny_world):
    env = make(tiny_world, unavailable=["mixed"])
    assert env.has_attr("action_masks")
    assert np.stack(env.env_method("action_masks")).tolist() == [[True, True, False]] * 8
    assert env.env_method("action_masks", indices=[0])[0].tolist() == [True, True, False]
    assert env.get_attr("slate_size", indices=[0, 1]) == [2, 2]
    with pytest.raises(AttributeError):
        env.get_attr("no_such_attribute")
    assert env.env_is_wrapped(Monitor, indices=0) == [True]
    with pytest.raises(ValueError, match="belongs to the whole batch"):
        env.set_attr("horizon", 3, indices=[0])


@pytest.mark.parametrize("action", ["select", "blend", "slots"])
def test_sb3_ppo_runs_on_every_kind_of_action(leaving_world, action):
    from stable_baselines3 import PPO

    env = make(leaving_world, 4, action=action, session_requests=3)
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=32, n_epochs=1, seed=0, device="cpu").learn(128)
    assert model.num_timesteps == 128
    assert np.isfinite(model.rollout_buffer.rewards).all()
    chosen, _ = model.predict(env.reset(), deterministic=True)
    assert chosen.shape == env.env.action_space.shape


def test_masks_of_slots_reach_sb3_contrib_row_by_row(tiny_world):
    env = make(tiny_world, 2, action="slots", unavailable=["mixed"])
    assert np.stack(env.env_method("action_masks")).tolist() == [[True, True, False] * 2] * 2
