"""Episodes of several sessions: who comes back when, what it is worth, and what a new session starts from."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from metarec_gym.data import FOLD_S, encode, synthetic_log
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.envs.sessions import back_within, live_histories
from metarec_gym.recommenders import Pool
from metarec_gym.response.frozen import LoggedResponse
from metarec_gym.response.returning import draw_gap

MODES = ("NextStep", "SameStep", "Disabled")
EDGES = [1.0, 24.0, 168.0, 720.0]


def with_return(world, baseline=(-0.5, -0.5, -0.5), weight=(1.0, 0.0, 0.0, 0.0), leaving=None):
    """A world whose users come back within a day, a week or 30 days, sooner the more they took."""
    changes = {
        "return_edges": torch.tensor(EDGES),
        "return_baseline": torch.tensor(baseline),
        "return_weight": torch.tensor(weight),
    }
    if leaving is not None:
        changes["leaving"] = torch.tensor(leaving)
    judge = world.judge("A").replaced(**changes)
    return replace(world, responses={"A": judge, "B": judge})


@pytest.fixture(scope="module")
def returning_world(leaving_world):
    return with_return(leaving_world)


def random_actions(env, steps, seed=0):
    return np.random.default_rng(seed).integers(0, env.world.n_strategies, (steps, env.num_envs))


def play(env, actions, seed=0, options=None):
    obs, info = env.reset(seed=seed, options=options)
    record = []
    for action in actions:
        before = obs
        obs, reward, terminated, truncated, info = env.step(action)
        record.append((before, reward, terminated, truncated, info, obs))
    return record


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_a_step_after_the_end_of_an_episode_in_which_everything_was_taken_is_harmless(tiny_world, mode):
    """3 requests of 2 items, all taken: there is no place for a seventh item, though the session has one request left."""
    settings = {"horizon": 3, "session_requests": 2, "base_rate_factor": 1e9}
    env = MetaRecVectorEnv(3, world=tiny_world, autoreset_mode=mode, **settings)
    record = play(env, np.full((4, 3), 2))
    assert [float(step[1].sum()) for step in record] == [6.0, 6.0, 6.0, 0.0]
    assert record[2][3].all()


def test_a_new_session_worked_out_by_hand(tiny_world):
    """A cold user of type 0 takes everything: sessions of 1 request, a day apart, as the log says nothing of returns."""
    env = MetaRecVectorEnv(
        1, world=tiny_world, session_requests=1, base_rate_factor=1e9, autoreset_mode="Disabled", output="torch"
    )
    start = int(torch.nonzero(tiny_world.tensors["start_user"] == 0)[0])
    obs, info = env.reset(seed=4, options={"start_state": [start]})
    assert info["session"].tolist() == [0]
    assert float(obs[0, env.feature_slices["sessions"]]) == 0.0
    obs, _, terminated, truncated, info = env.step(torch.tensor([0]))
    assert info["slate"].tolist() == [[0, 2]]
    assert info["session_ended"].tolist() == [True]
    assert info["away_hours"].tolist() == [24.0]
    assert info["session"].tolist() == [1]
    assert not bool(terminated | truncated)
    blocks = {name: obs[0, where].tolist() for name, where in env.feature_slices.items()}
    assert blocks["session_fraction"] == [0.0]
    assert blocks["request_fraction"] == [0.25]
    assert blocks["sessions"] == pytest.approx([math.log(2) / math.log(101)], abs=1e-5)
    assert blocks["recent_gap"] == pytest.approx([math.log(2) / math.log(366)], abs=1e-5)
    # specialist_0 lists 4 6 (its own category is the taste), specialist_1 1 3, mixed 1 3: 0 and 2 were taken
    assert blocks["list_similarity"] == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    assert blocks["list_agreement"] == pytest.approx([0.0, 0.5, 0.5], abs=1e-6)
    assert env.step(torch.tensor([2]))[4]["slate"].tolist() == [[1, 3]]


def test_sessions_have_their_number_of_requests_and_boredom_and_fatigue_end_with_them(tiny_world):
    env = MetaRecVectorEnv(
        4, world=tiny_world, session_requests=2, fatigue=1.0, base_rate_factor=1e-9, autoreset_mode="Disabled"
    )
    record = play(env, np.zeros((4, 4), int))
    where = env.feature_slices
    assert [step[4]["session_ended"].tolist() for step in record] == [[False] * 4, [True] * 4] * 2
    assert [step[4]["session"][0] for step in record] == [0, 1, 1, 1]
    assert [step[5][0, where["session_fraction"]].item() for step in record] == [0.5, 0.0, 0.5, 1.0]
    # tenths of an unrewarded request; the session that ends with the episode is not followed by another
    bored = [step[5][0, where["unrewarded_requests"]].item() for step in record]
    assert bored == pytest.approx([0.1, 0.0, 0.1, 0.2])
    assert [bool(step[3].all()) for step in record] == [False, False, False, True]
    state = env.get_state()
    assert state["user.time"][0] == 24.0 * 3600.0
    env.reset(seed=0)
    for exposure in (1.0, 0.0, 1.0):
        env.step(np.zeros(4, int))
        assert env.get_state()["user.exposure"][0, 0] == exposure


def test_an_episode_of_one_long_session_equals_the_plain_one(leaving_world):
    """Until somebody leaves, a session as long as the horizon is what an episode is without sessions."""
    plain = MetaRecVectorEnv(32, world=leaving_world, autoreset_mode="Disabled")
    long = MetaRecVectorEnv(32, world=leaving_world, session_requests=12, autoreset_mode="Disabled")
    actions = random_actions(plain, 12)
    here = np.ones(32, bool)
    where = plain.feature_slices["session_fraction"]
    for a, b in zip(play(plain, actions), play(long, actions), strict=True):
        assert np.array_equal(a[1][here], b[1][here])
        assert np.array_equal(a[4]["slate"][here], b[4]["slate"][here])
        assert np.array_equal(a[2][here], b[4]["session_ended"][here] & ~b[3][here] | (a[2] & b[3])[here])
        here &= ~(a[2] | a[3])
        x, y = a[5].copy(), b[5].copy()
        x[:, where] = y[:, where] = 0.0
        assert np.array_equal(x[here], y[here])
    assert not here.any()


def test_shown_items_stay_out_of_the_lists_for_the_whole_episode(returning_world):
    env = MetaRecVectorEnv(16, world=returning_world, session_requests=3, autoreset_mode="Disabled")
    record = play(env, random_actions(env, 12))
    sessions = 0
    for row in range(16):
        items = [i for step in record for i in step[4]["slate"][row].tolist() if i >= 0]
        assert len(items) == len(set(items))
        sessions += int(record[-1][4]["session"][row])
    assert sessions > 16


def test_lists_of_a_new_session_leave_out_the_history_and_know_what_was_taken(returning_world):
    """The ranker gets the history of the log, then what was taken in the episode in its order."""
    seen = []

    class Recorder:
        def top_lists(self, histories, length, *, exclude=None):
            seen.append((histories.clone(), exclude.clone()))
            return returning_world.ranker.top_lists(histories, length, exclude=exclude)

    world = replace(returning_world, ranker=Recorder())
    start = int(torch.nonzero((world.tensors["start_user"] == 1) & (world.tensors["start_length"] == 3))[0])
    env = MetaRecVectorEnv(1, world=world, session_requests=2, autoreset_mode="Disabled", output="torch", patience=1e9)
    env.reset(seed=0, options={"start_state": [start]})
    taken, shown = world.history_of(torch.tensor([start]))[0].tolist(), []
    for action in (0, 1):
        _, _, terminated, _, info = env.step(torch.tensor([action]))
        slate = info["slate"][0]
        taken += slate[info["outcomes"][0, :, 0]].tolist()
        shown += slate.tolist()
    assert not bool(terminated)
    histories, exclude = seen[-1]
    assert histories[0][histories[0] >= 0].tolist() == taken
    assert len(taken) > 3
    assert torch.nonzero(exclude[0])[:, 0].tolist() == sorted(shown)


def test_histories_are_grouped_by_their_own_length():
    history = torch.tensor([[-1, 5], [7, 8], [-1, -1]])
    taken = torch.tensor([[1, 2, -1], [3] + [-1] * 2, [-1] * 3], dtype=torch.int32)
    groups = live_histories(history, taken)
    assert [rows.tolist() for rows, _ in groups] == [[0, 1, 2]]
    assert groups[0][1].shape == (3, 16)
    assert groups[0][1][:, -3:].tolist() == [[5, 1, 2], [7, 8, 3], [-1, -1, -1]]
    long = torch.arange(40)[None].repeat(2, 1)
    long[0, :30] = -1
    groups = live_histories(long, torch.full((2, 1), -1, dtype=torch.int32))
    assert [(rows.tolist(), h.shape[1]) for rows, h in groups] == [([0], 16), ([1], 64)]


def test_a_world_of_logged_answers_plays_sessions_with_observed_pairs_only(tiny_world):
    """Every user was asked about 24 of the 32 items, the first of them another one for each user."""
    judge = tiny_world.judge("A")
    user, item = torch.meshgrid(torch.arange(16), torch.arange(32), indexing="ij")
    answers = torch.where((item + user) % 4 == 0, torch.nan, ((item + user) % 3 == 0).to(torch.float32))[..., None]
    logged = LoggedResponse({**judge.tensors, "answers": answers}, judge.outcomes)
    lists = tiny_world.tensors["start_lists"].to(torch.int64)
    unseen = torch.isnan(answers[tiny_world.tensors["start_user"][:, None, None], lists.clamp(min=0), 0])
    tensors = {"start_lists": torch.where(unseen, -1, lists).to(torch.int32), "start_state": torch.zeros(len(lists), 1)}
    world = replace(tiny_world, responses={"A": logged, "B": logged}, tensors=tiny_world.tensors | tensors)
    env = MetaRecVectorEnv(64, world=world, session_requests=1, unavailable=["mixed"], autoreset_mode="Disabled")
    # the third choice is out of service: an empty slate asks for no answer
    for _, reward, _, _, info, _ in play(env, random_actions(env, 4)):
        shown = info["slate"] >= 0
        pairs = answers[info["user"][:, None], np.maximum(info["slate"], 0), 0].numpy()
        assert not np.isnan(pairs[shown]).any()
        assert np.array_equal(info["outcomes"][..., 0], np.where(shown, pairs, 0.0) > 0)
        assert np.array_equal(reward, info["outcomes"][..., 0].sum(axis=1))
        assert torch.isfinite(env.peek_expected_rewards()).all()
    assert shown.any()


def test_users_who_do_not_come_back_terminate_the_episode(tiny_world):
    """Hazard logistic(-2) in each of 3 bins: stays away with probability 0.8808 ** 3 = 0.6833."""
    world = with_return(tiny_world, baseline=(-2.0, -2.0, -2.0), weight=(0.0, 0.0, 0.0, 0.0))
    env = MetaRecVectorEnv(2048, world=world, session_requests=1, autoreset_mode="Disabled")
    _, _, terminated, truncated, info, _ = play(env, np.ones((1, 2048), int))[0]
    assert np.array_equal(terminated, np.isinf(info["away_hours"]))
    assert not truncated.any()
    # standard error 0.0103
    assert terminated.mean() == pytest.approx((1 / (1 + math.exp(-2.0))) ** 3, abs=0.035)


def test_a_session_that_ends_at_the_horizon_says_whether_the_user_comes_back(tiny_world):
    world = with_return(tiny_world, baseline=(-1.0, -1.0, -1.0), weight=(0.0, 0.0, 0.0, 0.0))
    env = MetaRecVectorEnv(256, world=world, session_requests=2, horizon=2, autoreset_mode="Disabled")
    _, _, terminated, truncated, info, _ = play(env, np.ones((2, 256), int))[-1]
    assert truncated.all()
    assert np.array_equal(terminated, np.isinf(info["away_hours"]))
    assert 0 < terminated.sum() < 256


def test_the_probability_of_being_back_is_worked_out_by_hand():
    hazards = torch.tensor([[0.5, 0.2, 0.1]])
    edges = torch.tensor(EDGES)
    assert float(back_within(hazards, edges, 24.0)) == pytest.approx(0.5)
    assert float(back_within(hazards, edges, 168.0)) == pytest.approx(0.5 + 0.5 * 0.2)
    # half of the second bin in log hours
    middle = math.sqrt(24.0 * 168.0)
    assert float(back_within(hazards, edges, middle)) == pytest.approx(0.5 + 0.5 * 0.2 / 2, abs=1e-6)
    assert float(back_within(hazards, edges, 1e6)) == pytest.approx(0.5 + 0.1 + 0.04)
    u = (torch.arange(20000) + 0.5) / 20000
    inside = (torch.arange(20000) * 0.618034) % 1.0
    hours = draw_gap(hazards.expand(20000, 3), u, inside, edges)
    assert float((hours <= 100.0).float().mean()) == pytest.approx(float(back_within(hazards, edges, 100.0)), abs=0.005)


def test_more_retention_weight_raises_the_reward_by_the_probability_of_being_back_in_time(tiny_world):
    world = with_return(tiny_world, weight=(0.0, 0.0, 0.0, 0.0))
    hazard = 1 / (1 + math.exp(0.5))
    within_week = 1 - (1 - hazard) ** 2
    means = []
    for weight in (0.0, 1.0, 3.0):
        env = MetaRecVectorEnv(
            2048, world=world, session_requests=1, retention_weight=weight, autoreset_mode="Disabled", output="torch"
        )
        env.reset(seed=0)
        _, reward, _, _, info = env.step(np.ones(2048, int))
        paid = info["reward_retention"]
        assert torch.equal(paid, weight * (info["away_hours"] <= 168.0))
        assert torch.allclose(reward, info["reward_click"] + info["reward_cost"] + paid)
        assert float(paid.mean()) == pytest.approx(weight * within_week, abs=weight * 0.04)
        means.append(float(env.expected_reward.mean()))
    assert np.diff(means) == pytest.approx([within_week, 2 * within_week], abs=1e-4)


def test_a_longer_retention_time_is_met_by_more_users(tiny_world):
    world = with_return(tiny_world, weight=(0.0, 0.0, 0.0, 0.0))
    means = []
    for days in (0.5, 1.0, 7.0, 30.0):
        env = MetaRecVectorEnv(512, world=world, session_requests=1, retention_weight=1.0, retention_days=days)
        env.reset(seed=0)
        means.append(float(env.step(np.ones(512, int))[4]["reward_retention"].mean()))
    assert means == sorted(means)
    assert means[0] < means[1] < means[2] < means[3]


def test_users_who_took_more_come_back_sooner(tiny_world):
    world = with_return(tiny_world, weight=(2.0, 0.0, 0.0, 0.0))
    hours = []
    for factor in (1e-9, 1e9):
        env = MetaRecVectorEnv(512, world=world, session_requests=2, base_rate_factor=factor, autoreset_mode="Disabled")
        hours.append(play(env, np.ones((2, 512), int))[-1][4]["away_hours"])
    # the same uniforms: nobody comes later for having taken more
    assert (hours[1] <= hours[0]).all()
    assert np.isinf(hours[1]).sum() < np.isinf(hours[0]).sum()


def test_return_features_are_those_of_the_session_just_ended(tiny_world):
    """Cold user, two items taken in a request; then the second session after an absence."""
    seen = []
    world = with_return(tiny_world, baseline=(9.0, 9.0, 9.0), weight=(0.1, 0.0, 0.0, 0.0))
    judge = world.judge("A")
    plain = judge.return_hazards
    judge.return_hazards = lambda x: seen.append(x[0].tolist()) or plain(x)
    env = MetaRecVectorEnv(1, world=world, session_requests=1, base_rate_factor=1e9, autoreset_mode="Disabled")
    start = int(torch.nonzero(world.tensors["start_user"] == 0)[0])
    env.reset(seed=0, options={"start_state": [start]})
    away = float(env.step(np.array([0]))[4]["away_hours"][0])
    env.step(np.array([0]))
    assert seen[0] == pytest.approx([math.log(3), math.log(2), 0.0, 1.0], abs=1e-5)
    assert seen[1] == pytest.approx([math.log(3), math.log(3), math.log(1 + away), 0.0], abs=1e-5)


def test_the_period_follows_the_clock(tiny_world):
    """Periods of a day; users come back after 1 to 24 hours or later, and the trend of their day answers."""
    tensors = tiny_world.tensors | {"period_starts": torch.arange(40, dtype=torch.float64) * 86400.0}
    world = replace(with_return(tiny_world), tensors=tensors)
    env = MetaRecVectorEnv(64, world=world, session_requests=1, autoreset_mode="Disabled")
    env.reset(seed=0)
    clock, alive = np.zeros(64), np.ones(64, bool)
    for _ in range(3):
        _, _, terminated, _, info = env.step(np.ones(64, int))
        alive &= ~terminated
        clock = np.where(alive, clock + info["away_hours"], clock)
        state = env.get_state()
        assert np.allclose(state["user.time"][:64][alive] / 3600.0, clock[alive], rtol=1e-5)
        # the last period has no end
        assert np.array_equal(state["user.period"][:64][alive], (clock[alive] // 24.0).clip(max=39).astype(int))
    assert alive.any()


@pytest.mark.parametrize(("mode", "action"), [("NextStep", "select"), ("SameStep", "blend"), ("Disabled", "slots")])
def test_a_row_has_the_same_bits_in_any_batch(returning_world, mode, action):
    settings = {"world": returning_world, "action": action, "session_requests": 3, "autoreset_mode": mode}
    settings |= {"retention_weight": 0.5, "fatigue": 0.3, "outage_rate": 0.05, "cost_weight": (0.0, 0.5)}
    env = MetaRecVectorEnv(19, **settings)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(20)]
    record = play(env, actions, seed=5)
    for row in (0, 18):
        alone = MetaRecVectorEnv(1, **settings)
        for many, one in zip(record, play(alone, [a[row : row + 1] for a in actions], seed=5 + row), strict=True):
            for a, b in zip((*many[:4], many[5]), (*one[:4], one[5]), strict=True):
                assert np.array_equal(a[row], b[0])


def test_fitted_strategies_rank_a_row_alike_alone_and_among_others(returning_world):
    dataset = encode(synthetic_log(2, n_users=150, n_items=80, events_per_user=(15, 25))[0], seed=1)
    assert dataset.n_items == returning_world.n_items
    pool = Pool.fit(dataset, dataset.users_in(FOLD_S), seed=0, names=("popular", "item_knn", "als"))
    settings = {"world": replace(returning_world, ranker=pool), "session_requests": 2, "autoreset_mode": "SameStep"}
    env = MetaRecVectorEnv(40, **settings)
    actions = random_actions(env, 15)
    record = play(env, actions, seed=5)
    for row in (0, 21, 39):
        alone = play(MetaRecVectorEnv(1, **settings), actions[:, row : row + 1], seed=5 + row)
        for many, one in zip(record, alone, strict=True):
            assert np.array_equal(many[4]["slate"][row], one[4]["slate"][0])
            for a, b in zip((*many[:4], many[5]), (*one[:4], one[5]), strict=True):
                assert np.array_equal(a[row], b[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_state_continues_exactly(returning_world, mode):
    settings = {"session_requests": 3, "retention_weight": 0.5, "outage_rate": 0.1, "fatigue": 0.5}
    env = MetaRecVectorEnv(8, world=returning_world, autoreset_mode=mode, **settings)
    actions = random_actions(env, 24)
    play(env, actions[:10], seed=3)
    saved = env.get_state()
    rest = [env.step(a) for a in actions[10:]]
    other = MetaRecVectorEnv(8, world=returning_world, autoreset_mode=mode, **settings)
    other.set_state(saved)
    for x, y in zip(rest, [other.step(a) for a in actions[10:]], strict=True):
        for u, v in zip(x[:4], y[:4], strict=True):
            assert np.array_equal(u, v)


def test_all_three_autoreset_modes_give_the_same_transitions(returning_world):
    def transitions(mode):
        env = MetaRecVectorEnv(
            8, world=returning_world, session_requests=3, retention_weight=0.5, autoreset_mode=mode, outage_rate=0.1
        )
        strategies = np.random.default_rng(1).integers(0, env.world.n_strategies, (8, 30, env.horizon))
        obs, info = env.reset(seed=2)
        episode, step, found = np.zeros(8, int), np.zeros(8, int), {}
        ended = np.zeros(8, bool)
        for _ in range(40):
            if mode == "Disabled" and ended.any():
                obs, info = env.reset(options={"reset_mask": ended})
                episode, step, ended = episode + ended, np.where(ended, 0, step), np.zeros(8, bool)
            action = strategies[np.arange(8), episode, step % env.horizon]
            mask = info["action_mask"]
            nxt, reward, terminated, truncated, info = env.step(action)
            done = terminated | truncated
            for row in range(8):
                if mode == "NextStep" and ended[row]:
                    episode[row], step[row] = episode[row] + 1, 0
                    continue
                last = info["final_obs"][row] if mode == "SameStep" and done[row] else nxt[row]
                found[row, int(episode[row]), int(step[row])] = (
                    obs[row].tobytes(),
                    mask[row].tobytes(),
                    float(reward[row]),
                    bool(terminated[row]),
                    bool(truncated[row]),
                    last.tobytes(),
                )
                step[row] += 1
                if mode == "SameStep" and done[row]:
                    episode[row], step[row] = episode[row] + 1, 0
            ended = done
            obs = nxt
        return found

    by_mode = [transitions(mode) for mode in MODES]
    shared = set(by_mode[0]) & set(by_mode[1]) & set(by_mode[2])
    assert len(shared) > 180
    assert any(by_mode[0][key][3] for key in shared)
    for key in shared:
        assert by_mode[0][key] == by_mode[1][key] == by_mode[2][key]


@pytest.mark.parametrize("action", ["select", "blend", "slots"])
def test_reward_parts_sum_to_the_reward_and_observations_stay_in_the_box(returning_world, action):
    world = replace(
        returning_world,
        info={"metrics": {"cost_seconds": dict(zip(returning_world.strategies, (0.1, 0.2, 0.4), strict=True))}},
    )
    env = MetaRecVectorEnv(
        32,
        world=world,
        action=action,
        session_requests=2,
        retention_weight=0.7,
        cost_weight=0.3,
        latency_weight=0.2,
        outage_rate=0.1,
        autoreset_mode="SameStep",
    )
    env.action_space.seed(0)
    for _, reward, _, _, info, obs in play(env, [env.action_space.sample() for _ in range(20)]):
        parts = sum(v for k, v in info.items() if k.startswith("reward_"))
        assert np.allclose(parts, reward, atol=1e-5)
        assert env.observation_space.contains(obs)
        for key in [k for k in info if not k.startswith("_")]:
            assert info[f"_{key}"].shape == (32,)


def test_the_sampled_reward_has_the_expected_reward_as_its_mean_with_retention(tiny_world):
    world = with_return(tiny_world, leaving=(-1.0, 0.5, 0.0, 0.0))
    env = MetaRecVectorEnv(4096, world=world, session_requests=3, retention_weight=2.0, autoreset_mode="Disabled")
    env.reset(seed=1)
    total, expected = 0.0, 0.0
    for strategy in (0, 1, 2):
        _, reward, *_ = env.step(np.full(4096, strategy))
        total, expected = total + reward.mean(), expected + float(env.expected_reward.mean())
    # standard error: root of 3 steps x (0.5 + 1) / 4096 = 0.033
    assert total == pytest.approx(expected, abs=0.12)


def test_sessions_with_returns_run_on_a_bare_machine():
    """No library beyond torch, numpy, gymnasium and safetensors is loaded."""
    code = """
import sys, numpy, torch
from dataclasses import replace
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.world import World
world = World.synthetic()
bins = {"return_edges": torch.tensor([1.0, 9.0]), "return_baseline": torch.zeros(1)}
world = replace(world, responses={"A": world.judge("A").replaced(**bins), "B": world.judge("B")})
env = MetaRecVectorEnv(4, world=world, session_requests=1)
env.reset(seed=0)
assert env.step(numpy.zeros(4, int))[4]["session"].any()
assert "metarec_gym.response.returning" in sys.modules
heavy = {"pandas", "scipy", "implicit", "sklearn", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_world_that_cannot_rank_again_says_so_when_the_environment_is_made(tiny_world):
    with pytest.raises(ValueError, match="has no strategies beside it"):
        MetaRecVectorEnv(2, world=replace(tiny_world, ranker=None), session_requests=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"session_requests": 0}, r"session_requests is 0, expected 1\.\.4"),
        ({"session_requests": 5}, r"session_requests is 5, expected 1\.\.4"),
        ({"session_requests": 2, "retention_weight": 1.0}, "does not say when users come back"),
        ({"retention_weight": 1.0}, "set session_requests"),
        ({"session_requests": 2, "retention_days": 0.0}, "retention_days is 0.0"),
        ({"session_requests": 2, "horizon": 17}, "show more than the 32 items"),
    ],
)
def test_a_session_setting_that_does_not_fit_is_explained(tiny_world, settings, message):
    with pytest.raises(ValueError, match=message):
        MetaRecVectorEnv(2, world=tiny_world, **settings)
