from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from metarec_gym.data import encode, synthetic_log


def test_the_same_seed_gives_the_same_log_and_another_seed_another() -> None:
    assert synthetic_log(5)[0].hash == synthetic_log(5)[0].hash
    assert synthetic_log(5)[0].hash != synthetic_log(6)[0].hash


def test_no_global_generator_is_touched() -> None:
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    encode(synthetic_log(0, n_users=12)[0], seed=1)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert before == after


def test_the_default_log_has_240_users_and_120_items_of_8_to_40_events() -> None:
    log, truth = synthetic_log(0)
    data = encode(log, seed=0)
    assert (data.n_users, data.n_items) == (240, 120)
    counts = data.engaged_counts()
    assert int(counts.min()) >= 8
    assert int(counts.max()) <= 40
    assert not data.has_impressions
    assert np.bincount(truth.types_of(data.user_ids)).tolist() == [60, 60, 60, 60]
    assert np.bincount(truth.categories_of(data.item_ids)).tolist() == [30, 30, 30, 30]


def test_users_mostly_take_items_of_their_type_and_like_them_more() -> None:
    log, truth = synthetic_log(0)
    data = encode(log, seed=0)
    own = truth.types_of(data.user_ids)[data.user.numpy()] == truth.categories_of(data.item_ids)[data.item.numpy()]
    assert 0.6 < own.mean() < 0.85
    liked = data.outcome[:, 1].numpy()
    # 0.8 and 0.25 by construction; about 4,000 and 1,700 rows give standard errors of 0.006 and 0.011
    assert liked[own].mean() == pytest.approx(0.8, abs=0.03)
    assert liked[~own].mean() == pytest.approx(0.25, abs=0.045)


def test_popular_items_of_a_category_are_taken_more() -> None:
    log, truth = synthetic_log(0)
    taken = log.frame["item_id"].value_counts()
    for group in range(4):
        members = sorted((i for i, g in truth.item_category.items() if g == group), key=lambda i: -truth.popularity[i])
        assert taken[members[:5]].mean() > 2 * taken[members[-5:]].mean()


def test_a_log_with_impressions_has_that_many_real_negatives() -> None:
    log = synthetic_log(0, n_users=20, shown_per_event=2)[0]
    assert log.has_impressions
    assert log.frame["watch"].mean() == pytest.approx(1 / 3, abs=0.01)


def test_nobody_takes_an_item_twice() -> None:
    assert not synthetic_log(1)[0].frame.duplicated(["user_id", "item_id"]).any()


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="8 to 40 events among 10 items"):
        synthetic_log(0, n_items=10)
