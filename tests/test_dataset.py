from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from metarec_gym.data import (
    FOLD_A,
    FOLD_B,
    FOLD_S,
    Dataset,
    InteractionLog,
    assign_folds,
    encode,
    engaged_before,
    sessions_by_gap,
    sessions_by_id,
    synthetic_log,
)

DAY_S = 86_400.0


def small_log(**settings: object) -> InteractionLog:
    """Users a (3 shown, 2 clicked), b (2 clicked), c (1 shown, none clicked); item ids out of order."""
    frame = pd.DataFrame(
        {
            "user_id": ["a", "a", "a", "b", "b", "c"],
            "item_id": ["q", "p", "r", "p", "q", "r"],
            "timestamp": [0.0, 60.0, 2 * DAY_S, 10.0, 5.0, 7.0],
            "click": [1, 0, 1, 1, 1, 0],
        }
    )
    items = pd.DataFrame(
        {"item_id": ["r", "q"], "title": ["Red", "Quiet"], "categories": ["Drama|War", ""], "release_time": [5.0, None]}
    )
    if "session_id" in settings:
        frame["session_id"] = settings.pop("session_id")
    return InteractionLog.from_frame(frame, name="small", outcomes=("click",), items=items)


def small() -> Dataset:
    return encode(small_log(), seed=0)


def test_ids_are_numbered_in_sorted_order_and_rows_by_user_and_time() -> None:
    data = small()
    assert data.user_ids.tolist() == ["a", "b", "c"]
    assert data.item_ids.tolist() == ["p", "q", "r"]
    assert data.user.tolist() == [0, 0, 0, 1, 1, 2]
    assert data.item.tolist() == [1, 0, 2, 1, 0, 2]
    assert data.time.tolist() == [0.0, 60.0, 2 * DAY_S, 5.0, 10.0, 7.0]
    assert data.outcome.tolist() == [[1.0], [0.0], [1.0], [1.0], [1.0], [0.0]]
    assert data.offsets.tolist() == [0, 3, 5, 6]
    assert (data.n_users, data.n_items, data.n_rows) == (3, 3, 6)
    assert data.has_impressions


def test_tensors_have_the_promised_types() -> None:
    data = small()
    assert (data.user.dtype, data.item.dtype, data.session.dtype, data.offsets.dtype) == (torch.int64,) * 4
    assert (data.time.dtype, data.item_release.dtype) == (torch.float64,) * 2
    assert (data.outcome.dtype, data.item_category.dtype, data.fold.dtype) == (torch.float32, torch.float32, torch.int8)


def test_item_table_becomes_text_categories_and_release_in_item_order() -> None:
    data = small()
    assert data.item_text == ("", "Quiet", "Red Drama War")
    assert data.category_names == ("Drama", "War")
    assert data.item_category.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    assert torch.isnan(data.item_release).tolist() == [True, True, False]
    assert data.item_release[2] == 5.0


def test_a_log_without_items_has_no_categories_and_empty_text() -> None:
    log = small_log()
    data = encode(InteractionLog.from_frame(log.frame, name="x", outcomes=("click",)), seed=0)
    assert data.item_text == ("", "", "")
    assert data.item_category.shape == (3, 0)
    assert torch.isnan(data.item_release).all()


def test_histories_hold_the_first_engaged_items_newest_last() -> None:
    data = small()
    # a clicked q and then r (p was shown and not clicked), b clicked q and then p, c clicked nothing
    assert data.engaged_counts().tolist() == [2, 2, 0]
    users, lengths = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 0])
    assert data.histories(users, lengths).tolist() == [[1, 2], [-1, 1], [-1, -1], [-1, -1]]
    assert data.histories(users, lengths, max_length=1).tolist() == [[2], [1], [-1], [-1]]
    assert data.histories(users, torch.tensor([9, 9, 9, 9])).tolist() == [[1, 2], [1, 0], [-1, -1], [1, 2]]


def test_histories_of_cold_users_have_no_columns() -> None:
    data = small()
    assert data.histories(torch.tensor([2, 0]), torch.tensor([0, 0])).shape == (2, 0)
    assert data.histories(torch.tensor([0]), torch.tensor([2]), max_length=0).shape == (1, 0)
    assert data.histories(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64)).shape == (0, 0)


def test_histories_refuse_lengths_that_do_not_fit() -> None:
    data = small()
    with pytest.raises(ValueError, match="one length per user"):
        data.histories(torch.tensor([0, 1]), torch.tensor([1]))
    with pytest.raises(ValueError, match="negative"):
        data.histories(torch.tensor([0]), torch.tensor([-1]))


def test_histories_equal_a_plain_loop_on_a_synthetic_log() -> None:
    data = encode(synthetic_log(3, n_users=30, shown_per_event=1)[0], seed=0)
    lengths = torch.arange(30) % 12
    found = data.histories(torch.arange(30), lengths, max_length=7)
    for user in range(30):
        rows = range(int(data.offsets[user]), int(data.offsets[user + 1]))
        engaged = [int(data.item[row]) for row in rows if data.outcome[row, 0] > 0][: int(lengths[user])][-7:]
        assert found[user].tolist() == [-1] * (7 - len(engaged)) + engaged


def test_changing_the_future_of_a_user_changes_no_history_before_it() -> None:
    log = synthetic_log(0, n_users=60)[0]
    data = encode(log, seed=0)
    lengths = torch.minimum(torch.full((60,), 5), data.engaged_counts())
    past = data.item_ids[data.histories(torch.arange(60), lengths).clamp(min=0).numpy()]

    rank = log.frame.groupby("user_id").cumcount().to_numpy()
    future = rank >= 5
    frame = log.frame.copy()
    # every later event gets another item, another outcome and a later time, and some later events never happen
    seen = frame["item_id"].to_numpy(dtype=object)
    frame.loc[future, "item_id"] = "i" + pd.Series(rank[future]).add(900).astype(str).to_numpy()
    frame.loc[future, "like"] = 1 - frame.loc[future, "like"]
    frame.loc[future, "timestamp"] += DAY_S
    frame = frame.loc[~(future & (rank % 3 == 0))]
    changed = encode(InteractionLog.from_frame(frame, name="changed", outcomes=log.outcomes, items=log.items), seed=0)
    after = changed.item_ids[changed.histories(torch.arange(60), lengths).clamp(min=0).numpy()]
    assert (past == after).all()
    assert len(set(seen[future])) > 0


def test_rows_of_users_are_their_rows_ascending() -> None:
    assert small().rows_of(torch.tensor([2, 0])).tolist() == [0, 1, 2, 5]


def test_folds_share_no_user_and_cover_everyone() -> None:
    data = encode(synthetic_log(0)[0], seed=7)
    s, a, b = (data.users_in(fold).tolist() for fold in (FOLD_S, FOLD_A, FOLD_B))
    # 240 users: 0.34 -> round(81.6) = 82, 0.67 -> round(160.8) = 161, so 82, 79, 79
    assert (len(s), len(a), len(b)) == (82, 79, 79)
    assert sorted(s + a + b) == list(range(240))
    assert data.users_in(FOLD_A, FOLD_B).tolist() == sorted(a + b)


def test_folds_follow_seed_and_id_and_hardly_move_when_a_user_is_gone() -> None:
    ids = [f"user {number}" for number in range(300)]
    fold = assign_folds(ids, seed=1)
    assert (fold == assign_folds(ids, seed=1)).all()
    assert (fold != assign_folds(ids, seed=2)).mean() > 0.5
    assert (fold == assign_folds(ids[::-1], seed=1)[::-1]).all()
    without_first = assign_folds(ids[1:], seed=1)
    assert (without_first != fold[1:]).sum() <= 2


def test_every_fold_has_a_user_even_among_three() -> None:
    assert sorted(assign_folds(["a", "b", "c"], seed=0).tolist()) == [FOLD_S, FOLD_A, FOLD_B]
    with pytest.raises(ValueError, match="three folds need at least 3"):
        assign_folds(["a", "b"], seed=0)
    with pytest.raises(ValueError, match="fold shares"):
        assign_folds(["a", "b", "c"], seed=0, shares=(0.5, 0.5, 0.5))


def test_a_session_ends_after_a_pause_longer_than_the_gap() -> None:
    user = np.array([0, 0, 0, 0, 1, 1])
    time_s = np.array([0.0, 1800.0, 3601.0, 3700.0, 0.0, 9000.0])
    # 1,800 s is inside, 1,801 s is outside; the second user starts from 0 again
    assert sessions_by_gap(user, time_s).tolist() == [0, 0, 1, 1, 0, 1]
    with pytest.raises(ValueError, match="must be positive"):
        sessions_by_gap(user, time_s, 0.0)


def test_given_sessions_are_numbered_by_first_appearance_within_each_user() -> None:
    user = np.array([0, 0, 0, 0, 1, 1])
    ids = np.array(["s9", "s1", "s9", "s4", "s1", "s9"], dtype=object)
    assert sessions_by_id(user, ids).tolist() == [0, 1, 0, 2, 0, 1]


def test_encode_uses_given_sessions_and_else_the_gap() -> None:
    assert small().session.tolist() == [0, 0, 1, 0, 0, 0]
    given = encode(small_log(session_id=["m", "n", "n", "m", "k", "m"]), seed=0)
    # in time order user b has k before m
    assert given.session.tolist() == [0, 1, 1, 0, 1, 0]
    assert encode(small_log(), seed=0, session_gap_s=30.0).session.tolist() == [0, 1, 2, 0, 0, 0]


def test_the_history_length_at_a_date_counts_engaged_rows_before_it() -> None:
    data = small()
    counts = engaged_before(data.time.numpy(), data.outcome[:, 0].numpy() > 0, data.offsets.numpy(), 10.0)
    # a clicked q at 0; b clicked q at 5 and p at 10, which is not before 10; c clicked nothing
    assert counts.tolist() == [1, 1, 0]
