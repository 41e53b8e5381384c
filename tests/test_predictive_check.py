import dataclasses
import json

import pytest
import torch
from torch import Tensor

from metarec_gym.data import Dataset, encode, synthetic_log
from metarec_gym.response.frozen import DYNAMIC_FEATURES, FrozenResponse, untimed
from metarec_gym.response.predictive_check import (
    check_world,
    draw_without_replacement,
    emit,
    predictive_check,
    strategy_statistics,
)
from metarec_gym.seeding import torch_generator

N_USERS, N_ITEMS, PREFIX, EVENTS = 90, 60, 3, 12
SETTINGS = {"prefix": PREFIX, "events": EVENTS, "list_length": 15, "replicas": 60, "refresh": 4}


def judge(taste_sd: float, *, members: int = 1) -> FrozenResponse:
    """A judge whose users differ in one thing: how much they like the first half of the items; sd of that taste given.

    Items rise and fall over three periods; members have tables of their own.
    """
    generator = torch_generator(0, "judge")
    d, rank, hidden, n_static = 4, 2, 3, 2
    static = torch.ones(N_ITEMS, n_static)
    static[:, 1] = torch.where(torch.arange(N_ITEMS) < N_ITEMS // 2, 1.0, -1.0)
    mean = torch.zeros(N_USERS, 2, n_static + 3)
    mean[:, 0, n_static] = 0.5
    factor = torch.zeros(N_USERS, 2, n_static + 3, n_static + 3)
    factor[:, 0, 1, 1] = taste_sd
    trend = torch.randn(3, N_ITEMS, generator=generator)
    trend[0] = 0.0
    tensors = {
        "item_input": torch.randn(N_ITEMS, d, generator=generator) * 0.5,
        "decays": torch.tensor([0.5, 0.9]),
        "hidden_weight": torch.randn(members, hidden, 3 * d + 1, generator=generator) * 0.3,
        "hidden_bias": torch.zeros(members, hidden),
        "tower_weight": torch.randn(members, 2 * rank, hidden, generator=generator) * 0.3,
        "tower_bias": torch.zeros(members, 2 * rank),
        "item_output": torch.randn(members, N_ITEMS, 2, rank, generator=generator) * 0.5,
        "item_bias": torch.randn(members, N_ITEMS, 2, generator=generator) * 0.7,
        "calibration": torch.tensor([[0.8, -2.0], [1.0, 0.0]]).expand(members, -1, -1),
        "static_features": static,
        "trend": trend,
        "dynamic_scale": torch.tensor([0.5, 0.5]),
        "effect_mean": mean,
        "effect_chol": factor,
        "pair_sd": torch.zeros(2),
        **untimed(8),
    }
    return FrozenResponse(tensors, ("watch", "like"), ("intercept", "half", *DYNAMIC_FEATURES))


def log_of(response: FrozenResponse, seed: int) -> Dataset:
    """A log that the judge itself emits: its users really are as it says."""
    length = PREFIX + EVENTS
    blank = synthetic_log(1, n_users=N_USERS, n_items=N_ITEMS, n_types=1, events_per_user=(length, length))[0]
    dataset = encode(blank, seed=0)
    items = emit(
        response,
        response.start(torch.zeros(N_USERS, 0, dtype=torch.int64)),
        response.effects(seed)[:, 0],
        torch.zeros(N_USERS, N_ITEMS, dtype=torch.bool),
        length,
        refresh=1,
        generator=torch_generator(seed, "log"),
    )
    # all at one time: the check then asks about the period that the log was emitted in
    return dataclasses.replace(dataset, item=items.flatten(), time=torch.zeros_like(dataset.time))


def lists(histories: Tensor, length: int) -> Tensor:
    """Two strategies: the first half of the items by index, and the second half."""
    first = torch.arange(length)
    return torch.stack([first, first + N_ITEMS // 2]).expand(len(histories), -1, -1)


def test_the_statistics_of_two_users_and_two_strategies_by_hand():
    # rates (user, strategy): odd events [[1, 0], [0, 1]], even events [[1, .5], [0, .5]]
    odd, even = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.5], [0.0, 0.5]])
    found = strategy_statistics(torch.stack([odd, even], dim=-1), ("x", "y"))
    # odd interactions: means .5 everywhere, so +-.5; even: user means .75 and .25, strategy means .5, so +.25 -.25 / -.25 +.25
    # x: (.5 * .25 + .5 * .25) / (2 - 1) = .25, the same for y
    assert float(found["interaction_variance/x"]) == pytest.approx(0.25)
    assert float(found["interaction_trace"]) == pytest.approx(0.5)
    # user means: odd .5 and .5, so no covariance
    assert float(found["user_variance"]) == pytest.approx(0.0)
    assert float(found["rate/x"]) == pytest.approx(0.5)
    # chosen on odd: user 0 x (even 1), user 1 y (even .5): .75; chosen on even: user 0 x (odd 1), user 1 y (odd 1): 1
    # single best: .5
    assert float(found["headroom"]) == pytest.approx(0.875 / 0.5 - 1)


def test_noise_alone_has_no_interaction_and_no_headroom():
    noise = torch.rand(50, 400, 5, 2, generator=torch_generator(0, "noise"))
    found = strategy_statistics(noise, tuple("abcde"))
    # mean over 50 replicas of a sum of 5 products of noise of variance 1/12: standard error below .001
    assert abs(float(found["interaction_trace"].mean())) < 0.004
    # the single best strategy is chosen on the users it is scored on: max of 5 means, 1.16 * sqrt(1/12/800) / .5 = 2.4 %
    assert float(found["headroom"].mean()) == pytest.approx(-0.024, abs=0.01)


def test_identical_strategies_have_exactly_no_interaction():
    one = torch.rand(30, 1, 2, generator=torch_generator(1, "same")).expand(30, 4, 2)
    found = strategy_statistics(one, tuple("abcd"))
    assert float(found["interaction_trace"]) == pytest.approx(0.0, abs=1e-12)
    assert float(found["headroom"]) == pytest.approx(0.0, abs=1e-12)


def test_items_are_drawn_in_proportion_to_their_odds_without_replacement():
    logit = torch.tensor([0.0, 1.0, 2.0, float("-inf")]).repeat(60_000, 1)
    items = draw_without_replacement(logit, 2, torch_generator(0, "draw"))
    odds = torch.tensor([0.0, 1.0, 2.0]).exp()
    first = torch.bincount(items[:, 0], minlength=4) / 60_000
    assert torch.allclose(first[:3], odds / odds.sum(), atol=0.008)
    assert int((items == 3).sum()) == 0
    assert bool((items[:, 0] != items[:, 1]).all())
    # after item 2 the next is item 1 with odds e against 1
    second = items[items[:, 0] == 2, 1]
    assert float((second == 1).float().mean()) == pytest.approx(2.71828 / 3.71828, abs=0.008)


def test_very_uneven_odds_still_give_distinct_items():
    logit = torch.zeros(500, 30)
    logit[:, 0] = 60.0
    items = draw_without_replacement(logit, 5, torch_generator(0, "uneven"))
    assert bool((items[:, 0] == 0).all())
    assert all(len(set(row)) == 5 for row in items.tolist())


@pytest.mark.parametrize(("member", "period"), [(0, 0), (1, 0), (1, 2)])
def test_emitted_items_are_unseen_and_follow_the_odds_of_the_frozen_judge(member: int, period: int):
    response, rows = judge(0.5, members=2), 40_000
    seen = torch.zeros(rows, N_ITEMS, dtype=torch.bool)
    seen[:, :50] = True
    history = torch.tensor([[3, 17, 40]])
    state, z = response.start(history), response.effects(0)[:1]
    # rows of the other member and period are in the batch too
    asked = torch.where(torch.arange(rows) % 2 == 0, member, 1 - member)
    dated = torch.where(torch.arange(rows) % 2 == 0, period, 1)
    items = emit(
        response,
        state.repeat(rows, 1),
        z[:, 0].repeat(rows, 1),
        seen,
        1,
        refresh=1,
        generator=torch_generator(0, "emit"),
        member=asked,
        period=dated,
    )[::2]
    every = torch.arange(N_ITEMS)[None]
    at = {"member": torch.tensor([member]), "period": torch.tensor([period])}
    p = response.conditional_probs(state, z, every, position=False, **at)[0, 50:, 0]
    odds = p / (1 - p)
    share = torch.bincount(items[:, 0], minlength=N_ITEMS) / len(items)
    assert float(share[:50].sum()) == 0
    # three standard errors of a share near .3 among 20,000 draws are .01
    assert torch.allclose(share[50:], odds / odds.sum(), atol=0.014)


def test_a_judge_finds_its_own_log_believable():
    response = judge(0.6)
    dataset = log_of(response, seed=3)
    result = predictive_check(dataset, response, torch.arange(N_USERS), lists, ("one", "two"), seed=1, **SETTINGS)
    assert result["n_users"] == N_USERS
    assert result["inside_headline"]
    assert result["statistics"]["interaction_trace"]["observed"] > 0.01


def test_a_judge_whose_users_are_all_alike_is_found_out():
    dataset = log_of(judge(0.9), seed=3)
    result = predictive_check(dataset, judge(0.0), torch.arange(N_USERS), lists, ("one", "two"), seed=1, **SETTINGS)
    trace = result["statistics"]["interaction_trace"]
    assert not trace["inside"]
    assert trace["observed"] > trace["replicas_high"]
    assert not result["inside_headline"]


def test_a_check_repeats_and_can_be_written_as_json():
    response = judge(0.6)
    dataset = log_of(response, seed=3)
    users = torch.arange(N_USERS)
    judges = {"A": (response, users[:45]), "B": (response, users[45:])}
    settings = {**SETTINGS, "replicas": 5}
    first = check_world(dataset, judges, lists, ("one", "two"), seed=7, **settings)
    assert first == check_world(dataset, judges, lists, ("one", "two"), seed=7, **settings)
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    other = check_world(dataset, judges, lists, ("one", "two"), seed=8, **settings)
    assert other["statistics"]["headroom"]["replicas_mean"] != first["statistics"]["headroom"]["replicas_mean"]
    assert other["statistics"]["headroom"]["observed"] == first["statistics"]["headroom"]["observed"]


def test_a_log_too_small_to_tell_says_so():
    response = judge(0.6)
    dataset = log_of(response, seed=3)
    result = predictive_check(
        dataset, response, torch.arange(N_USERS), lists, ("one", "two"), seed=0, prefix=10, events=20
    )
    assert result["statistics"] == {}
    assert "too small" in result["note"]


def test_unusable_settings_are_refused():
    response = judge(0.6)
    dataset = log_of(response, seed=3)
    with pytest.raises(ValueError, match="at least 2 events"):
        predictive_check(dataset, response, torch.arange(N_USERS), lists, ("one", "two"), seed=0, events=1)
