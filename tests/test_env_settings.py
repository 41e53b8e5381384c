"""Moving a setting moves the outcome in the stated direction: one test a setting."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from metarec_gym.envs import EnvConfig, MetaRecVectorEnv
from metarec_gym.response.frozen import FrozenResponse

ROWS = 512


def with_judge(world, **tensors):
    judge = world.judge("A").replaced(**{name: torch.as_tensor(value) for name, value in tensors.items()})
    return replace(world, responses={"A": judge, "B": judge})


def play(world, steps=None, action=2, **settings):
    """Mean expected and sampled reward of each request, and the share of rows still playing after it."""
    env = MetaRecVectorEnv(ROWS, world=world, autoreset_mode="Disabled", **settings)
    env.reset(seed=3)
    expected, reward, alive = [], [], []
    for _ in range(steps or env.horizon):
        _, r, terminated, truncated, _ = env.step(np.full(ROWS, action))
        expected.append(float(env.expected_reward.mean()))
        reward.append(float(r.mean()))
        alive.append(float((~(terminated | truncated)).mean()))
    return np.array(expected), np.array(reward), np.array(alive)


def test_a_higher_base_rate_factor_raises_the_odds_by_itself(tiny_world):
    """specialist_1 serves types alike: probabilities 0.5 and 0.1 of its items, two a slate; odds times 3 are 0.75 and 0.25."""
    rates = [play(tiny_world, 1, 1, base_rate_factor=f)[0][0] for f in (1.0, 3.0)]
    # cold and warm starts of both types come alike: shares s and 1 - s of the two types
    share = (rates[0] / 2 - 0.1) / 0.4
    assert rates[1] == pytest.approx(2 * (0.25 + 0.5 * share), abs=1e-4)
    halves = [play(tiny_world, 4, 1, base_rate_factor=f)[1].sum() for f in (0.5, 1.0, 2.0)]
    assert halves[0] < halves[1] < halves[2]


def test_position_decay_lowers_later_places_and_leaves_the_first(tiny_world):
    counts = []
    for decay in (0.0, 2.0):
        env = MetaRecVectorEnv(ROWS, world=tiny_world, position_decay=decay, autoreset_mode="Disabled")
        env.reset(seed=3)
        counts.append(sum(env.step(np.full(ROWS, 2))[4]["outcomes"][..., 0].mean(axis=0) for _ in range(4)))
    assert counts[1][0] == counts[0][0]
    assert counts[1][1] < 0.5 * counts[0][1]
    # place 1 loses 2 * log2(2) = 2 logits: 0.5 -> 0.1192
    env = MetaRecVectorEnv(1, world=tiny_world, position_decay=2.0, autoreset_mode="Disabled", output="torch")
    start = int(torch.nonzero(tiny_world.tensors["start_user"] == 0)[0])
    env.reset(seed=0, options={"start_state": [start]})
    env.step(np.array([0]))
    assert float(env.expected_reward) == pytest.approx(0.5 + 1 / (1 + math.exp(2.0)), abs=1e-5)


def test_fatigue_lowers_a_category_that_was_just_shown_and_not_a_fresh_one(tiny_world):
    """specialist_0 shows two items of its category: exposure 1 at the second request, 1.8 at the third."""
    env = MetaRecVectorEnv(1, world=tiny_world, fatigue=1.0, autoreset_mode="Disabled", output="torch")
    start = int(torch.nonzero(tiny_world.tensors["start_user"] == 0)[0])
    env.reset(seed=0, options={"start_state": [start]})
    expected = []
    for _ in range(3):
        env.step(np.array([0]))
        expected.append(float(env.expected_reward))
    assert expected == pytest.approx([2 / (1 + math.exp(e)) for e in (0.0, 1.0, 1.8)], abs=1e-5)
    # the other category was not shown: 0.1 each; its own has faded by nothing yet
    assert env.peek_expected_rewards()[0, 1] == pytest.approx(0.2, abs=1e-5)
    rewards = [play(tiny_world, 4, 0, fatigue=f)[0].sum() for f in (0.0, 0.5, 2.0)]
    assert rewards[0] > rewards[1] > rewards[2]


def test_the_judges_own_fatigue_is_the_default_and_a_setting_overrides_it(tiny_world):
    tired = with_judge(tiny_world, fatigue=[-1.0])
    assert np.allclose(play(tired, 4, 0)[0], play(tiny_world, 4, 0, fatigue=1.0)[0])
    assert np.allclose(play(tired, 4, 0, fatigue=0.0)[0], play(tiny_world, 4, 0)[0])


def test_more_patience_keeps_users_longer(leaving_world):
    alive = [play(leaving_world, 11, 1, patience=p)[2][-1] for p in (1.0, 3.0, 30.0)]
    assert alive[0] < alive[1] < alive[2]


def test_half_leave_after_as_many_unrewarded_requests_as_their_patience(tiny_world):
    """Nobody takes anything: logit -4 + 4 * n / 3 after n requests."""
    alive = play(tiny_world, 3, 1, patience=3.0, base_rate_factor=1e-9)[2]
    stay = np.cumprod([1 - 1 / (1 + math.exp(4 - 4 * n / 3)) for n in (1, 2, 3)])
    assert alive == pytest.approx(stay, abs=0.06)


def test_the_judges_leaving_depends_on_quality_and_repetition(tiny_world):
    """Weights per unrewarded request, share taken and exposure; nothing is taken, so quality is 0 until it is."""
    dull = with_judge(tiny_world, leaving=[-3.0, 0.0, 0.0, 2.0])
    varied = play(dull, 3, 2, base_rate_factor=1e-9)[2]
    narrow = play(dull, 3, 0, base_rate_factor=1e-9)[2]
    # mixed meets each category half as often as a specialist its own
    assert narrow[-1] < varied[-1]
    # request 3 of the specialist: exposure 1.8, logit 0.6; of mixed 0.9, logit -1.2; before: 1 and 0.5
    stay = [np.prod([1 - 1 / (1 + math.exp(3 - 2 * e)) for e in es]) for es in ((0, 1, 1.8), (0, 0.5, 0.9))]
    assert [narrow[-1], varied[-1]] == pytest.approx(stay, abs=0.06)
    pleased = with_judge(tiny_world, leaving=[0.0, 0.0, -20.0, 0.0])
    # logit 0 where nothing was taken, -10 where one of two was
    taken_all, taken_none = (play(pleased, 1, 2, base_rate_factor=f)[2][0] for f in (1e9, 1e-9))
    assert taken_all > 0.99
    assert taken_none == pytest.approx(0.5, abs=0.08)


def test_a_higher_cost_weight_lowers_the_reward(tiny_world):
    rewards = [play(tiny_world, 4, 2, cost_weight=w)[1].sum() for w in (0.0, 0.3, 1.0)]
    # mixed is the dearest strategy: cost 1
    assert np.diff(rewards) == pytest.approx([-4 * 0.3, -4 * 0.7], abs=1e-4)


def test_a_range_of_cost_weights_is_drawn_per_episode_and_shown(tiny_world):
    env = MetaRecVectorEnv(2048, world=tiny_world, cost_weight=(0.2, 1.0), autoreset_mode="SameStep", output="torch")
    obs, _ = env.reset(seed=0)
    shown = obs[:, env.feature_slices["cost_weight"]][:, 0]
    weight = shown / (1 - shown)
    assert 0.2 <= float(weight.min()) < 0.21
    assert 0.99 < float(weight.max()) <= 1.0
    assert float(weight.mean()) == pytest.approx(0.6, abs=0.03)
    for _ in range(3):
        obs, _, _, _, info = env.step(np.full(2048, 2))
        assert torch.allclose(-info["reward_cost"], weight, atol=1e-5)
        assert torch.equal(obs[:, env.feature_slices["cost_weight"]][:, 0], shown)
    obs, *_ = env.step(np.full(2048, 2))
    assert not torch.equal(obs[:, env.feature_slices["cost_weight"]][:, 0], shown)


def test_a_higher_latency_weight_charges_the_slowest_strategy_asked(tiny_world):
    seconds = {"specialist_0": 0.001, "specialist_1": 0.004, "mixed": 0.002}
    world = replace(tiny_world, info={"metrics": {"cost_seconds": seconds}})
    actions = {"select": [1], "slots": [[0, 2]], "blend": [[1.0, -1.0, 1.0]]}
    for name, slowest in (("select", 1.0), ("slots", 0.5), ("blend", 0.5)):
        for weight in (0.0, 0.5, 1.0):
            env = MetaRecVectorEnv(1, world=world, action=name, latency_weight=weight, autoreset_mode="Disabled")
            obs, _ = env.reset(seed=0)
            _, reward, _, _, info = env.step(np.array(actions[name]))
            assert info["reward_latency"] == pytest.approx(-weight * slowest)
            assert reward == pytest.approx(info["reward_click"] + info["reward_latency"])
            assert obs[0, env.feature_slices["latency_weight"]] == pytest.approx(weight / (1 + weight))
    env = MetaRecVectorEnv(1, world=world, latency_weight=1.0, autoreset_mode="Disabled")
    env.reset(seed=0)
    free = MetaRecVectorEnv(1, world=world, autoreset_mode="Disabled")
    free.reset(seed=0)
    gap = free.peek_expected_rewards() - env.peek_expected_rewards()
    assert gap.tolist() == [pytest.approx([0.25, 1.0, 0.5])]


def test_drift_moves_taste_from_popular_to_rare_items_with_every_session(tiny_world):
    """specialist_0 lists even items, here the popular ones (percentile 1: z = 1), specialist_1 the others (z = -1)."""
    popularity = torch.tensor([1.0, 0.0]).repeat(16)
    world = replace(tiny_world, tensors=tiny_world.tensors | {"item_popularity": popularity})
    means = {}
    for drift in (0.0, 1.0):
        for action in (0, 1):
            env = MetaRecVectorEnv(
                1,
                world=world,
                drift=drift,
                session_requests=1,
                autoreset_mode="Disabled",
                output="torch",
            )
            start = int(torch.nonzero(world.tensors["start_user"] == action)[0])
            env.reset(seed=0, options={"start_state": [start]})
            means[drift, action] = []
            for _ in range(3):
                env.step(np.array([action]))
                means[drift, action].append(float(env.expected_reward))
    assert means[0.0, 0] == pytest.approx([1.0] * 3, abs=1e-5)
    # each user meets items of the own type, 2 * 0.5; session s loses or gains s logits
    assert means[1.0, 0] == pytest.approx([2 / (1 + math.exp(s)) for s in (0, 1, 2)], abs=1e-5)
    assert means[1.0, 1] == pytest.approx([2 / (1 + math.exp(-s)) for s in (0, 1, 2)], abs=1e-5)


def two_members(world):
    """The judge of `world` twice; the second member's gate is 2 logits lower."""
    judge = world.judge("A")
    t = dict(judge.tensors)
    per_member = ("hidden_weight", "hidden_bias", "tower_weight", "tower_bias", "item_output", "item_bias")
    t |= {name: t[name].repeat(2, *[1] * (t[name].ndim - 1)) for name in per_member}
    t["calibration"] = torch.tensor([[[1.0, 0.0]], [[1.0, -2.0]]])
    judge = FrozenResponse(t, judge.outcomes, judge.feature_names)
    return replace(world, responses={"A": judge, "B": judge})


def test_each_episode_meets_one_member_and_a_setting_fixes_it(tiny_world):
    world = two_members(tiny_world)
    first, second = (play(world, 4, 2, member=m)[0] for m in (0, 1))
    assert np.allclose(first, play(tiny_world, 4, 2)[0])
    assert (second < 0.5 * first).all()
    drawn = play(world, 4, 2)[0]
    # standard error: half the difference of 0.5 over the root of 512 = 0.011
    assert drawn == pytest.approx((first + second) / 2, abs=0.035)
    env = MetaRecVectorEnv(ROWS, world=world, autoreset_mode="Disabled")
    env.reset(seed=0)
    member = env.get_state()["user.member"]
    assert float(member[:ROWS].float().mean()) == pytest.approx(0.5, abs=0.07)
    env.step(np.full(ROWS, 2))
    assert torch.equal(env.get_state()["user.member"], member)


def test_episodes_with_equal_noise_meet_the_same_member(tiny_world):
    env = MetaRecVectorEnv(64, world=two_members(tiny_world), autoreset_mode="Disabled")
    start = tiny_world.starts_of("A")[0].item()
    members = []
    for order in (1, -1):
        noise = np.arange(64)[::order].copy()
        env.reset(seed=5, options={"start_state": [start] * 64, "noise": noise})
        members.append(env.get_state()["user.member"][:64].numpy()[::order])
    assert np.array_equal(members[0], members[1])
    assert 0 < members[0].mean() < 1


def test_the_judge_that_answers_is_a_setting(tiny_world):
    harsher = tiny_world.judge("A").replaced(calibration=torch.tensor([[[1.0, -2.0]]]))
    world = replace(tiny_world, responses=tiny_world.responses | {"A/popularity": harsher})
    assert play(world, 1, 2, judge="popularity")[0] < 0.5 * play(world, 1, 2)[0]
    with pytest.raises(ValueError, match=r"has no judge 'second' for fold A; it has \('main', 'popularity'\)"):
        MetaRecVectorEnv(2, world=world, judge="second")


def test_a_trend_moves_answers_by_the_period_in_which_the_episode_starts(tiny_world):
    """Period 1 begins at second 100: there every item of the second half is in fashion; cold user 0 cares by 1 logit."""
    judge = tiny_world.judge("A")
    trend = torch.stack([torch.zeros(32), torch.ones(32)])
    mean = judge.tensors["effect_mean"].clone()
    # the features after the categories: trend, and two co-occurrences
    mean[:, 0, 2] = 1.0
    world = with_judge(tiny_world, trend=trend, effect_mean=mean)
    expected = []
    for seconds in (0.0, 99.0, 100.0, 500.0):
        tensors = world.tensors | {
            "period_starts": torch.tensor([0.0, 100.0], dtype=torch.float64),
            "start_time": torch.full_like(world.tensors["start_time"], seconds),
        }
        expected.append(play(replace(world, tensors=tensors), 1, 2)[0][0])
    assert expected[0] == expected[1]
    assert expected[1] < expected[2] == expected[3]


def test_settings_are_plain_values_that_json_knows():
    config = EnvConfig(cost_weight=[0, 1], schedule=[["a", "added", 3.0]], unavailable=["b"])
    assert config.cost_weight == (0.0, 1.0)
    assert config.schedule == (("a", "added", 3),)
    assert config == EnvConfig(cost_weight=(0.0, 1.0), schedule=(("a", "added", 3),), unavailable=("b",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cost_weight": (1.0, 0.5)}, r"cost_weight is \(1.0, 0.5\)"),
        ({"cost_weight": (0.1, 0.2, 0.3)}, "expected a number or"),
        ({"fatigue": -1.0}, "fatigue is -1.0, expected a number of at least 0"),
        ({"patience": 0.0}, "patience is 0.0, expected a number above 0"),
        ({"base_rate_factor": 0.0}, "base_rate_factor is 0.0"),
        ({"drift": 0.5}, "act between sessions"),
        ({"member": 1}, r"member is 1, the judge has the members 0\.\.0"),
        ({"fusion": "z"}, "fusion is 'z', expected one of"),
    ],
)
def test_a_setting_that_does_not_fit_is_explained(tiny_world, settings, message):
    with pytest.raises(ValueError, match=message):
        MetaRecVectorEnv(2, world=tiny_world, **settings)
