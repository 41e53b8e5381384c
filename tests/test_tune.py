import dataclasses
import json

import numpy as np
import pytest
import torch

from metarec_gym.data import synthetic_log
from metarec_gym.data.dataset import encode
from metarec_gym.envs import tune_training
from metarec_gym.envs.sb3 import SB3VecEnv
from metarec_gym.envs.tune import ACTION_NAMES, TuneConfig, TuneEnv, TuneVectorEnv
from metarec_gym.envs.tune_training import (
    Settings,
    TrainingData,
    held_out_log_loss,
    held_out_ranking,
    initialise,
    train,
)
from metarec_gym.seeding import mix

MODES = ("NextStep", "SameStep", "Disabled")
SMALL = {"n_users": 16, "n_items": 32, "horizon": 4, "batch_size": 16, "updates_per_step": 2}


def small(num_envs=1, **settings):
    return TuneVectorEnv(num_envs, **{**SMALL, **settings})


def random_actions(num_envs, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, num_envs, 5)).astype(np.float32)


def play(env, actions, seed=0):
    obs, info = env.reset(seed=seed)
    record = []
    for action in actions:
        before = obs
        obs, reward, terminated, truncated, info = env.step(action)
        record.append((before, reward, terminated, truncated, info, obs))
    return record


def two_by_two():
    """User 0 took item 0 and later took item 1; user 1 the other way round; items 2 and 3 nobody took."""
    return TrainingData(
        name="by_hand",
        n_users=2,
        n_items=4,
        train_user=torch.tensor([0, 1]),
        train_item=torch.tensor([0, 1]),
        taken=torch.tensor([[True, False, False, False], [False, True, False, False]]),
        held_user=torch.tensor([0, 1]),
        held_item=torch.tensor([1, 0]),
        held_others=torch.tensor([[False, False, True, True], [False, False, True, True]]),
        held_negative=torch.tensor([2, 3]),
    )


def model(users, items, bias, mean):
    pad = tune_training.DIM - 1
    return {
        "users": torch.nn.functional.pad(torch.tensor(users)[None, :, None], (0, pad)),
        "items": torch.nn.functional.pad(torch.tensor(items)[None, :, None], (0, pad)),
        "bias": torch.tensor(bias)[None],
        "mean": torch.tensor([mean]),
    }


def test_both_held_out_metrics_worked_out_by_hand():
    """Scores of user 0: 1*(1, 2, 3, -1) + bias; item 1 scores 2, items 2 and 3 score 3 and -1: one pair of two is right."""
    here = model([1.0, -1.0], [1.0, 2.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0], 0.5)
    # user 1: item 0 scores -1, items 2 and 3 score -3 and 1: one of two; together 2 of 4
    assert held_out_ranking(two_by_two(), here).tolist() == [0.5]
    tied = model([0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0], 0.0)
    # item 2 ties with the held-out one (half a point), item 3 is below (one point): 3 of 4
    assert held_out_ranking(two_by_two(), tied).tolist() == [0.75]
    # logits: user 0 takes item 1: 0.5 + 2, negative item 2: 0.5 + 3; user 1 takes item 0: 0.5 - 1, negative item 3: 0.5 + 1
    by_hand = np.mean(np.log1p(np.exp([-2.5, 3.5, 0.5, 1.5])))
    assert held_out_log_loss(two_by_two(), here).tolist() == pytest.approx([by_hand], abs=1e-6)


def test_a_gradient_step_worked_out_by_hand(monkeypatch):
    """One pair (user 0, item 0) and the hardest candidate, item 2: the model moves along the gradient of the log-loss."""
    # candidates have three axes; 0.6 of 4 items is item 2
    monkeypatch.setattr(tune_training, "uniform", lambda key: torch.full(key.shape, 0.6 if key.ndim == 3 else 0.0))
    monkeypatch.setattr(tune_training, "CANDIDATES", 2)
    before = model([0.5, 1.0], [1.0, -1.0, 2.0, 0.0], [0.1, 0.0, 0.2, 0.0], 0.3)
    one = [torch.tensor([value]) for value in (0.1, 0.2, 0.4, 0.5, 2.0)]
    after = train(two_by_two(), before, Settings(*one), torch.tensor([7]), updates=1, batch=1)
    taken, negative = 0.3 + 0.1 + 0.5 * 1.0, 0.3 + 0.2 + 0.5 * 2.0
    error_taken, error_negative = 1 / (1 + np.exp(-taken)) - 1, 1 / (1 + np.exp(-negative))
    assert float(after.loss) == pytest.approx((np.log1p(np.exp(-taken)) + np.log1p(np.exp(negative))) / 2, abs=1e-6)
    moved = after.model
    # x' = x (1 - step * l2) - step * gradient
    assert float(moved["users"][0, 0, 0]) == pytest.approx(
        0.5 * (1 - 0.05) - 0.1 * (error_taken * 1.0 + error_negative * 2.0)
    )
    assert float(moved["users"][0, 1, 0]) == pytest.approx(1.0 * (1 - 0.05))
    assert float(moved["items"][0, 0, 0]) == pytest.approx(1.0 * (1 - 0.1) - 0.2 * error_taken * 0.5)
    assert float(moved["items"][0, 2, 0]) == pytest.approx(2.0 * (1 - 0.1) - 0.2 * error_negative * 0.5)
    assert float(moved["bias"][0, 0]) == pytest.approx(0.1 * (1 - 0.2) - 0.4 * error_taken)
    assert float(moved["mean"][0]) == pytest.approx(0.3 - 0.4 * (error_taken + error_negative) / 2)
    gradient = [abs(error_taken + 2 * error_negative), 0.5 * np.hypot(error_taken, error_negative)]
    assert after.gradient[0, :2].tolist() == pytest.approx(gradient)


def test_a_step_of_the_environment_worked_out_by_hand(monkeypatch):
    """The model and the gradient step of the test above; held out are (user 0, item 1) and (user 1, item 0)."""
    monkeypatch.setattr(tune_training, "uniform", lambda key: torch.full(key.shape, 0.6 if key.ndim == 3 else 0.0))
    env = TuneVectorEnv(
        log=two_by_two(), metric="log_loss", cost_weight=0.7, horizon=4, updates_per_step=1, batch_size=1
    )
    env.reset(seed=0)
    before = model([0.5, 1.0], [1.0, -1.0, 2.0, 0.0], [0.1, 0.0, 0.2, 0.0], 0.3)
    # log-losses of the held-out items and of their negatives, items 2 and 3: logits -0.2 and 1.5, 1.4 and 0.3
    metric = -np.mean(np.log1p(np.exp([0.2, 1.5, -1.4, 0.3])))
    saved = env.get_state() | {f"state.{name}": value for name, value in before.items()}
    env.set_state(saved | {"state.metric": torch.tensor([metric], dtype=torch.float32)})
    action = env.config.action_of(step_users=0.1, step_items=0.2, step_weights=0.4, l2=0.5, hardness=2.0)
    obs, reward, terminated, truncated, info = env.step(action[None])
    # errors of the pair (user 0, item 0), logit 0.9, and of its negative item 2, logit 1.5
    taken, negative = 1 / (1 + np.exp(-0.9)) - 1, 1 / (1 + np.exp(-1.5))
    users = [0.5 * 0.95 - 0.1 * (taken * 1.0 + negative * 2.0), 1.0 * 0.95]
    items = [1.0 * 0.9 - 0.2 * taken * 0.5, -1.0 * 0.9, 2.0 * 0.9 - 0.2 * negative * 0.5, 0.0]
    bias = [0.1 * 0.8 - 0.4 * taken, 0.0, 0.2 * 0.8 - 0.4 * negative, 0.0]
    mean = 0.3 - 0.4 * (taken + negative) / 2
    logit = [[mean + bias[i] + users[u] * items[i] for i in range(4)] for u in range(2)]
    after = -np.mean(np.log1p(np.exp([-logit[0][1], logit[0][2], -logit[1][0], logit[1][3]])))
    # two candidates cost (6 + 2) / 14 of the dearest step
    cost = 0.7 * (8 / 14) / 4
    assert float(info["metric"][0]) == pytest.approx(after, abs=1e-6)
    assert float(info["reward_metric"][0]) == pytest.approx(after - metric, abs=1e-6)
    assert float(info["reward_cost"][0]) == pytest.approx(-cost, abs=1e-6)
    assert float(reward[0]) == pytest.approx(after - metric - cost, abs=1e-6)
    assert (bool(terminated[0]), bool(truncated[0])) == (False, False)
    assert float(obs[0, env.feature_slices["progress"]][0]) == 0.25
    assert obs[0, env.feature_slices["last_action"]].tolist() == pytest.approx(action.tolist(), abs=1e-6)


def test_a_harder_negative_scores_higher_and_is_never_an_item_the_user_took():
    data = TrainingData.synthetic(n_users=16, n_items=32)
    key = mix(torch.arange(8))
    start = initialise(data, key)
    loss = []
    for hardness in (1.0, 8.0):
        values = [torch.full((8,), value) for value in (1e-3, 1e-3, 1e-3, 1e-5, hardness)]
        loss.append(train(data, start, Settings(*values), key, updates=1, batch=64).loss)
    assert bool((loss[1] > loss[0]).all())


def test_actions_are_mapped_log_uniformly():
    config = TuneConfig()
    settings = config.settings_of(torch.tensor([[-1.0, 0.0, 1.0, 0.0, 3.0]]))
    values = [float(value) for value in vars(settings).values()]
    # 0 is the geometric middle; 3 is clipped to 1
    assert values == pytest.approx([0.001, 0.001**0.5, 1.0, 1e-5**0.5, 8.0], rel=1e-5)
    asked = dict(zip(ACTION_NAMES, (0.05, 0.2, 0.01, 0.001, 3.0), strict=True))
    back = config.settings_of(torch.tensor(config.action_of(**asked))[None])
    assert [float(value) for value in vars(back).values()] == pytest.approx(list(asked.values()), rel=1e-4)
    assert int(back.candidates) == 3
    assert float(back.cost) == pytest.approx((6 + 3) / 14)


@pytest.mark.parametrize("metric", ["ranking", "log_loss"])
def test_rewards_sum_to_the_last_metric_less_the_first_less_the_costs(metric):
    env = small(8, metric=metric, cost_weight=0.3, autoreset_mode="Disabled")
    _, info = env.reset(seed=0)
    first, total, parts, costs = info["metric"], 0.0, 0.0, 0.0
    for action in random_actions(8, 4):
        _, reward, _, truncated, info = env.step(action)
        total, costs = total + reward.astype(float), costs + 0.3 * info["cost"] / 4
        parts = parts + info["reward_metric"] + info["reward_cost"]
    assert truncated.all()
    assert np.allclose(total, info["metric"] - first - costs, atol=1e-6)
    assert np.allclose(total, parts, atol=1e-6)


def test_training_pays_and_far_too_large_steps_destroy_it():
    env = TuneVectorEnv(16, horizon=10, autoreset_mode="Disabled")
    gains = []
    for step in (0.2, 1.0):
        env.reset(seed=0)
        action = env.config.action_of(step_users=step, step_items=step, step_weights=step, l2=1e-5, hardness=1)
        gains.append(sum(env.step(np.tile(action, (16, 1)))[1] for _ in range(10)).mean())
    assert gains[0] > 0.1
    assert gains[1] < gains[0] / 2


@pytest.mark.parametrize("mode", MODES)
def test_row_i_seeded_s_equals_the_single_row_seeded_s_plus_i_bit_for_bit(mode):
    env = small(7, autoreset_mode=mode)
    actions = random_actions(7, 10)
    record = play(env, actions, seed=5)
    for row in (0, 1, 6):
        alone = play(small(1, autoreset_mode=mode), actions[:, row : row + 1], seed=5 + row)
        for many, one in zip(record, alone, strict=True):
            for a, b in zip((*many[:4], many[5]), (*one[:4], one[5]), strict=True):
                assert np.array_equal(a[row], b[0])


def test_the_single_environment_is_a_row_of_the_batch():
    many = play(small(3, autoreset_mode="Disabled"), random_actions(3, 4), seed=2)
    env = TuneEnv(**SMALL)
    obs, _ = env.reset(seed=4)
    for step, action in zip(many, random_actions(3, 4)[:, 2], strict=True):
        assert np.array_equal(obs, step[0][2])
        obs, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated) == (float(step[1][2]), bool(step[2][2]), bool(step[3][2]))
        assert info["metric"] == step[4]["metric"][2]
        assert type(reward) is float


def test_the_three_autoreset_modes_play_the_same_transitions():
    actions = random_actions(4, 4)
    runs = {}
    for mode in MODES:
        env = small(4, autoreset_mode=mode)
        obs, _ = env.reset(seed=1)
        found = []
        for _ in range(2):
            for step, action in enumerate(actions):
                before = obs
                obs, reward, _, truncated, info = env.step(action)
                after = info["final_obs"] if mode == "SameStep" and step == 3 else obs
                found.append((before, reward, truncated, after))
            if mode == "NextStep":
                obs, reward, _, truncated, _ = env.step(actions[0])
                assert not reward.any()
                assert not truncated.any()
            elif mode == "Disabled":
                obs, _ = env.reset(options={"reset_mask": np.ones(4, dtype=bool)})
        runs[mode] = found
    for mode in MODES[1:]:
        for a, b in zip(runs["NextStep"], runs[mode], strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_reset_of_one_row_leaves_the_others_untouched_and_an_ended_row_stays_ended():
    env = small(3, autoreset_mode="Disabled")
    record = play(env, random_actions(3, 4))
    assert record[-1][3].all()
    obs, info = env.reset(options={"reset_mask": np.array([False, True, False])})
    assert np.array_equal(obs[[0, 2]], record[-1][5][[0, 2]])
    assert info["step"].tolist() == [4, 0, 4]
    after, reward, _, truncated, _ = env.step(random_actions(3, 1)[0])
    assert truncated.tolist() == [True, False, True]
    assert np.array_equal(after[[0, 2]], obs[[0, 2]])
    assert reward[0] == reward[2] == 0.0 != reward[1]


def test_the_same_seed_gives_the_same_run_and_episodes_and_seeds_differ():
    env = small(4, autoreset_mode="SameStep")
    runs = [
        np.stack([step[1] for step in play(env, np.tile(random_actions(4, 4), (2, 1, 1)), seed=s)]) for s in (1, 1, 2)
    ]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    assert not np.array_equal(runs[0][:4], runs[0][4:])


def test_test_initialisations_are_not_among_the_training_ones():
    keys = []
    for split in ("train", "test"):
        env = small(256, split=split)
        env.reset(seed=0)
        keys.append(env.get_state()["state.users"].flatten(1)[:, :4])
    assert not bool((keys[0][:, None] == keys[1][None]).all(dim=2).any())


def test_a_run_that_is_no_longer_finite_ends_with_the_worst_metric():
    env = small(2, cost_weight=0.1, autoreset_mode="SameStep")
    _, info = env.reset(seed=0)
    state = env.get_state()
    state["state.users"][1] = torch.nan
    env.set_state(state)
    obs, reward, terminated, truncated, after = env.step(random_actions(2, 1)[0])
    assert terminated.tolist() == [False, True]
    assert not truncated.any()
    # from its metric down to 0, the worst ranking
    assert reward[1] == pytest.approx(-info["metric"][1] - 0.1 * after["cost"][1] / 4)
    assert env.observation_space.contains(obs)
    assert env.single_observation_space.contains(after["final_obs"][1])


def test_observations_stay_in_bounds_whatever_the_actions():
    env = small(64, horizon=12, autoreset_mode="Disabled", metric="log_loss", step_size=(1e-3, 50.0))
    for _, _, terminated, truncated, _, obs in play(env, np.sign(random_actions(64, 12))):
        assert env.observation_space.contains(obs)
        assert not (terminated & truncated).any()


def test_the_observation_says_what_happened():
    env = small(2, cost_weight=1.0, autoreset_mode="Disabled")
    obs, info = env.reset(seed=0)
    see = {name: obs[:, where] for name, where in env.feature_slices.items()}
    assert not see["loss"].any()
    assert not see["last_action"].any()
    assert np.allclose(see["metric"][:, 0], 2 * info["metric"] - 1, atol=1e-6)
    action = random_actions(2, 1)[0]
    before = info["metric"]
    obs, _, _, _, info = env.step(action)
    see = {name: obs[:, where] for name, where in env.feature_slices.items()}
    assert np.array_equal(see["last_action"], action)
    assert np.allclose(see["metric_history"][:, 0], 10 * (info["metric"] - before), atol=1e-5)
    assert see["progress"].tolist() == [[0.25], [0.25]]
    assert see["cost_weight"].tolist() == [[0.5], [0.5]]


def test_returned_arrays_never_change_later():
    for output in ("numpy", "torch"):
        env = small(2, output=output, autoreset_mode="SameStep")
        obs, _ = env.reset(seed=0)
        for action in random_actions(2, 6):
            copy = obs.copy() if output == "numpy" else obs.clone()
            new, rewards, *_ = env.step(torch.tensor(action) if output == "torch" else action)
            rewards += 100.0
            assert bool((obs == copy).all())
            obs = new


def test_a_saved_state_goes_on_exactly():
    env, actions = small(3, autoreset_mode="NextStep"), random_actions(3, 8)
    play(env, actions[:2])
    saved = env.get_state()
    first = [env.step(action)[1] for action in actions[2:]]
    other = small(3, autoreset_mode="NextStep")
    other.set_state(saved)
    assert np.array_equal(np.stack(first), np.stack([other.step(action)[1] for action in actions[2:]]))


def test_logs_datasets_and_folders_give_the_same_subsample(tmp_path):
    log, _ = synthetic_log(0, n_users=60, n_items=40)
    log.save(tmp_path)
    made = [TuneVectorEnv(1, log=source, **SMALL).data for source in (log, encode(log, seed=0), str(tmp_path))]
    for data in made[1:]:
        assert torch.equal(data.train_item, made[0].train_item)
        assert torch.equal(data.held_item, made[0].held_item)
    data = made[0]
    assert not bool(data.taken[data.held_user, data.held_item].any())
    assert not bool(data.held_others[torch.arange(len(data.held_user)), data.held_item].any())
    assert bool(data.held_others[torch.arange(len(data.held_user)), data.held_negative].all())
    with pytest.raises(FileNotFoundError):
        TuneVectorEnv(1, log=str(tmp_path / "nothing"))
    with pytest.raises(TypeError, match="log is a int"):
        TuneVectorEnv(1, log=3)


def test_a_world_gives_what_its_users_took(tiny_world):
    user = torch.arange(12).repeat_interleave(8)
    events = (user * 3 + torch.arange(96)) % 30
    tables = {"user_events": events.to(torch.int32), "user_event_offsets": torch.arange(13) * 8}
    world = dataclasses.replace(tiny_world, tensors={**tiny_world.tensors, **tables})
    data = TuneVectorEnv(1, log=world, **SMALL).data
    straight = TrainingData.from_events(user, events, name="straight", n_users=16, n_items=32)
    assert data.n_users == 12
    assert torch.equal(data.taken, straight.taken)
    empty = {"user_events": events[:0].to(torch.int32), "user_event_offsets": torch.zeros(13, dtype=torch.int64)}
    with pytest.raises(ValueError, match="keeps no events"):
        TuneVectorEnv(1, log=dataclasses.replace(tiny_world, tensors={**tiny_world.tensors, **empty}))


def test_the_metric_of_many_runs_is_that_of_each(monkeypatch):
    data = TrainingData.synthetic(n_users=16, n_items=32)
    models = initialise(data, mix(torch.arange(10)))
    whole = held_out_ranking(data, models)
    monkeypatch.setattr(tune_training, "_RUNS_AT_ONCE", 3)
    assert torch.equal(whole, held_out_ranking(data, models))


def test_a_synthetic_log_of_few_items_leaves_every_user_items_not_taken():
    """30 items a user is the default; of 20 items each takes half."""
    data = TrainingData.synthetic(n_users=10, n_items=20)
    assert data.taken.shape[0] == 10
    taken = data.taken.sum(dim=1) + torch.bincount(data.held_user, minlength=10)
    assert taken.tolist() == [10] * 10
    with pytest.raises(ValueError, match="expected at least 8 users and 16 items"):
        TrainingData.synthetic(n_users=10, n_items=12)


def test_a_gpu_trains_as_cpu_within_tolerance(gpu):
    cpu, far = (small(64, output="torch", autoreset_mode="Disabled", device=device) for device in ("cpu", gpu))
    cpu.reset(seed=0)
    far.reset(seed=0)
    for action in random_actions(64, 4):
        # the reference state is fed, so that one candidate at a tie cannot make everything after it differ
        far.set_state(cpu.get_state())
        a, b = cpu.step(torch.from_numpy(action)), far.step(torch.from_numpy(action).to(gpu))
        torch.testing.assert_close(b[0].cpu(), a[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(b[1].cpu(), a[1], rtol=1e-3, atol=2e-3)


def test_wrong_settings_and_actions_are_refused_with_a_sentence():
    with pytest.raises(TypeError, match="has no settings"):
        small(horizons=3)
    with pytest.raises(ValueError, match="metric is 'auc'"):
        small(metric="auc")
    with pytest.raises(ValueError, match="expected \\(low, high\\)"):
        small(l2=(1.0, 0.1))
    env = small(2)
    with pytest.raises(RuntimeError, match="before reset"):
        env.step(np.zeros((2, 5), dtype=np.float32))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected floats"):
        env.step(np.zeros((2, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.full((2, 5), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="expected nothing but reset_mask"):
        env.reset(options={"user": [0, 1]})


def test_settings_survive_json():
    env = small(1, step_size=[0.01, 0.5])
    assert env.config == TuneConfig(**json.loads(json.dumps({**SMALL, "step_size": (0.01, 0.5)})))


def test_sb3_takes_the_batch():
    env = SB3VecEnv(small(4, autoreset_mode="SameStep"))
    env.seed(0)
    env.reset()
    for action in random_actions(4, 4):
        _, _, done, infos = env.step(action)
    assert done.all()
    assert infos[0]["TimeLimit.truncated"]
    assert infos[0]["episode"]["l"] == 4
