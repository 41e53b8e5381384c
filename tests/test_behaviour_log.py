from __future__ import annotations

import numpy as np
import pytest
import torch

from metarec_gym.data import InteractionLog, encode, sessions_by_gap, synthetic
from metarec_gym.data.synthetic import BehaviourTruth, behaviour_log


@pytest.fixture(scope="module")
def made() -> tuple[InteractionLog, BehaviourTruth]:
    return behaviour_log(3, n_users=150, n_items=80)


def test_the_same_seed_gives_the_same_behaviour_and_another_seed_other_behaviour() -> None:
    first, same, other = (behaviour_log(seed, n_users=20, span_days=30)[0].hash for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_a_request_shows_different_items_at_one_moment_in_positions_0_to_4(made) -> None:
    log, truth = made
    requests = log.frame.groupby(["user_id", "timestamp"], sort=False)
    assert (requests.size() == 5).all()
    assert (requests["item_id"].nunique() == 5).all()
    assert log.frame["position"].tolist() == list(range(5)) * (len(log.frame) // 5)
    assert log.has_impressions
    assert log.frame["timestamp"].max() < truth.end_s


def test_sessions_given_are_those_that_the_30_minute_rule_finds(made) -> None:
    data = encode(made[0], seed=0)
    found = sessions_by_gap(data.user.numpy(), data.time.numpy())
    assert np.array_equal(found, data.session.numpy())


def test_users_and_items_of_the_truth_are_in_the_order_of_the_dataset(made) -> None:
    log, truth = made
    data = encode(log, seed=0)
    assert truth.user_ids == tuple(data.user_ids)
    assert truth.item_ids == tuple(data.item_ids)
    assert np.array_equal(truth.item_category, data.item_category.numpy())


def test_watches_happen_as_often_as_the_truth_says_in_every_tenth_of_its_probabilities(made) -> None:
    log, truth = made
    watched = log.frame["watch"].to_numpy().astype(float)
    tenth = np.argsort(np.argsort(truth.watch_probability)) * 10 // len(watched)
    for part in range(10):
        chosen = tenth == part
        p = truth.watch_probability[chosen]
        # four standard deviations of a sum of independent answers
        assert abs(watched[chosen].sum() - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())


def test_the_probability_is_the_sum_of_the_stated_parts(made) -> None:
    log, truth = made
    data = encode(log, seed=0)
    user, item = data.user.numpy(), data.item.numpy()
    taste = (truth.effects[user, 0] * truth.phi[item]).sum(axis=1)
    position = truth.position_logit[log.frame["position"].to_numpy()]
    logit = truth.item_bias[item, 0] + taste + position + truth.fatigue * truth.exposure
    assert np.allclose(1 / (1 + np.exp(-logit)), truth.watch_probability, atol=1e-9)
    # position 1 has log2(2) = 1 times the decay, position 3 twice as much
    assert truth.position_logit[[0, 1, 3]].tolist() == pytest.approx([0.0, -0.35, -0.7])


def test_exposure_is_what_the_session_showed_of_the_categories_faded_by_a_fifth_a_request(made) -> None:
    log, truth = made
    data = encode(log, seed=0)
    row = data.item_category / data.item_category.sum(dim=1, keepdim=True)
    # somebody whose first session has four requests or more
    starts = data.offsets[:-1]
    start = int(starts[(data.user[starts + 15] == data.user[starts]) & (data.session[starts + 15] == 0)][0])
    faded = torch.zeros(3)
    for request in range(4):
        rows = slice(start + 5 * request, start + 5 * request + 5)
        assert data.session[rows].tolist() == [0] * 5
        slate = row[data.item[rows]]
        assert truth.exposure[rows] == pytest.approx((slate @ faded).numpy(), abs=1e-5)
        faded = 0.8 * faded + slate.mean(dim=0)


def test_what_is_shown_does_not_depend_on_the_user() -> None:
    log, truth = behaviour_log(5, n_users=100, n_items=30, span_days=60)
    data = encode(log, seed=0)
    user, item = data.user.numpy(), data.item.numpy()
    taste = (truth.effects[user, 0, 1:] * truth.phi[item, 1:]).sum(axis=1)
    # phi is centred over the items, so shown at random its product with any taste has mean 0
    assert abs(taste.mean()) < 4 * taste.std() / np.sqrt(len(taste))


def test_shown_by_popularity_the_items_that_are_watched_more_are_shown_more() -> None:
    log, truth = behaviour_log(5, n_users=60, n_items=30, span_days=60, sampler="popularity")
    shown = np.bincount(encode(log, seed=0).item.numpy(), minlength=30)
    assert np.corrcoef(np.log(shown), truth.item_bias[:, 0])[0, 1] > 0.9


def test_effects_have_the_stated_mean_and_covariance() -> None:
    truth = behaviour_log(6, n_users=3000, n_items=8, span_days=0.5)[1]
    for outcome in range(2):
        z = truth.effects[:, outcome]
        # 3,000 users: a standard error of sd / sqrt(3000), 0.016 at most; of a covariance about 0.03 sd^2
        assert z.mean(axis=0) == pytest.approx(truth.effect_mean[outcome], abs=0.07)
        assert np.cov(z.T) == pytest.approx(truth.effect_covariance[outcome], abs=0.1)


def test_likes_happen_only_where_the_item_was_watched(made) -> None:
    frame = made[0].frame
    assert not ((frame["like"] > 0) & (frame["watch"] == 0)).any()
    assert 0.3 < frame.loc[frame["watch"] > 0, "like"].mean() < 0.8


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="slates of 9 from 5 items"):
        behaviour_log(0, n_items=5, slate_size=9)
    with pytest.raises(ValueError, match="3 edges for 3 return bins"):
        behaviour_log(0, return_edges=(1.0, 2.0, 3.0), return_baseline=(0.0, 0.0, 0.0))


def test_users_who_never_leave_are_refused_instead_of_making_an_endless_log(monkeypatch) -> None:
    monkeypatch.setattr(synthetic, "_MOST_REQUESTS", 50)
    with pytest.raises(ValueError, match="let users leave sooner"):
        behaviour_log(0, n_users=3, n_items=5, slate_size=1, leaving=(-50.0, 0.0, 0.0, 0.0))
