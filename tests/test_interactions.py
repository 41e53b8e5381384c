from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from metarec_gym.data import CleaningStep, InteractionLog, parse_times


def events(**columns: Any) -> pd.DataFrame:
    """Two users; user b watches item x twice and likes it the second time."""
    table: dict[str, Any] = {
        "user_id": ["b", "a", "b", "b"],
        "item_id": ["x", "y", "y", "x"],
        "timestamp": [30.0, 5.0, 10.0, 40.0],
        "watch": [1, 1, 1, 1],
        "like": [0, 1, 0, 1],
    }
    table.update(columns)
    return pd.DataFrame(table)


def log_of(frame: pd.DataFrame, **settings: Any) -> InteractionLog:
    return InteractionLog.from_frame(frame, **{"name": "t", "outcomes": ("watch", "like"), **settings})


def test_rows_are_sorted_by_user_then_time_and_a_repeat_is_merged_into_the_first() -> None:
    log = log_of(events())
    assert log.frame["user_id"].tolist() == ["a", "b", "b"]
    assert log.frame["item_id"].tolist() == ["y", "y", "x"]
    assert log.frame["timestamp"].tolist() == [5.0, 10.0, 30.0]
    # the like of b's second meeting with x counts for the first
    assert log.frame["like"].tolist() == [1.0, 0.0, 1.0]
    assert log.frame["like"].dtype == np.float32
    assert log.cleaning[-1].rows_before == 4
    assert log.cleaning[-1].rows_after == 3


def test_repeats_stay_when_asked_for() -> None:
    assert len(log_of(events(), merge_repeats=False).frame) == 4


def test_repeats_of_a_log_with_impressions_stay_because_they_were_shown_again() -> None:
    log = log_of(events(watch=[0, 1, 1, 1], like=[0, 0, 0, 0]))
    assert log.has_impressions
    assert len(log.frame) == 4
    assert not log_of(events()).has_impressions


def test_events_of_one_second_keep_the_order_given() -> None:
    frame = pd.DataFrame({"user_id": ["a", "a", "a", "b"], "item_id": ["z", "m", "c", "z"], "timestamp": [7.0] * 4})
    log = log_of(frame.assign(watch=1.0), outcomes=("watch",))
    assert log.frame["item_id"].tolist() == ["z", "m", "c", "z"]


def test_identical_rows_are_dropped_and_counted() -> None:
    frame = pd.concat([events(), events().iloc[[1]]])
    log = log_of(frame)
    assert (log.cleaning[0].rows_before, log.cleaning[0].rows_after) == (5, 4)


def test_an_outcome_without_its_gate_sets_the_gate_and_is_counted() -> None:
    log = log_of(events(watch=[1, 0, 1, 1]))
    assert log.frame["watch"].tolist() == [1.0, 1.0, 1.0]
    assert "1 rows changed" in log.cleaning[1].note


def test_the_frame_given_is_not_changed() -> None:
    frame = events(watch=[1, 0, 1, 1])
    copy = frame.copy()
    log_of(frame)
    pd.testing.assert_frame_equal(frame, copy)


def test_integer_ids_that_became_floats_lose_their_point_zero() -> None:
    log = log_of(events(user_id=[2.0, 10.0, 2.0, 2.0]))
    assert set(log.frame["user_id"]) == {"2", "10"}


def test_datetimes_are_read_as_utc_seconds() -> None:
    times = pd.to_datetime(["1970-01-01 00:00:30", "1970-01-01 00:00:05", "1970-01-01 00:00:10", "1970-01-01 00:00:40"])
    assert log_of(events(timestamp=times)).frame["timestamp"].tolist() == [5.0, 10.0, 30.0]
    aware = times.tz_localize("UTC").tz_convert("Asia/Tokyo")
    assert log_of(events(timestamp=aware)).frame["timestamp"].tolist() == [5.0, 10.0, 30.0]


def test_the_card_states_rows_users_items_and_rates() -> None:
    card = log_of(events(), card={"licence": "mine"}).card
    assert card["licence"] == "mine"
    assert (card["rows"], card["users"], card["items"]) == (3, 2, 2)
    assert card["first_day"] == "1970-01-01"
    assert card["outcome_rates"]["like"] == pytest.approx(2 / 3, abs=1e-6)


def test_earlier_cleaning_steps_come_first_in_the_report() -> None:
    log = log_of(events(), cleaning=[CleaningStep("dropped robots", 9, 4)])
    assert log.cleaning[0].rule == "dropped robots"
    assert "dropped robots: 9 -> 4 rows" in log.report()


@pytest.mark.parametrize(
    ("frame", "settings", "sentence"),
    [
        (events().drop(columns="item_id"), {}, "lacks the column 'item_id'"),
        (events().drop(columns="like"), {}, "lacks the column 'like'"),
        (events(user_id=["b", None, "b", "b"]), {}, r"1 of 4 rows have no user_id \(first: row 1\)"),
        (events(item_id=["x", "y", " ", "x"]), {}, r"1 of 4 rows have no item_id \(first: row 2\)"),
        (events(timestamp=["1", "2", "yesterday", "4"]), {}, "'yesterday' in row 2"),
        (events(timestamp=[1.0, 2.0, np.nan, 4.0]), {}, "1 of 4 rows have no timestamp"),
        (events(timestamp=[1.0, 2.0, np.inf, 4.0]), {}, "cannot be read as a time"),
        (events(), {"outcomes": ()}, "no outcome is given"),
        (events(), {"outcomes": ("watch", "watch")}, "name one outcome twice"),
        (events(), {"outcomes": ("watch", "timestamp")}, "'timestamp' cannot be used"),
        (events(), {"outcome_weights": (1.0,)}, "expected one finite number per outcome"),
        (events(), {"outcome_weights": (1.0, np.nan)}, "expected one finite number per outcome"),
        (events(like=[0, 1, 0, 4]), {}, r"'like' are not in \[0, 1\] \(first: '4' in row 3\)"),
        (events(like=[0, 1, np.nan, 1]), {}, r"1 of 4 values of outcome 'like'"),
        (events(user_id="only"), {}, r"one user only \('only'\)"),
        (events().iloc[:0], {}, "the log has no rows"),
        (events(watch=0, like=0), {}, "the gate outcome 'watch' never happens"),
        (events(propensity=[0.5, 0.0, 1.0, 1.0]), {}, r"1 of 4 propensities are not in \(0, 1\]"),
        (events(position=[0, 1, 1.5, -1]), {}, "2 of 4 positions are not whole numbers"),
        (events(session_id=["s", None, "s", "s"]), {}, "1 of 4 rows have no session_id"),
        (events(), {"items": pd.DataFrame({"id": ["x"]})}, "the item table lacks the column 'item_id'"),
        (events(), {"items": pd.DataFrame({"item_id": ["x", "x"]})}, "1 rows of the item table repeat an id"),
        (events(), {"users": pd.DataFrame({"user_id": ["a", None]})}, "1 of 2 rows have no user_id"),
    ],
)
def test_each_fault_has_its_sentence(frame: pd.DataFrame, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        log_of(frame, **settings)


def test_a_saved_log_comes_back_the_same(tmp_path: Path) -> None:
    items = pd.DataFrame({"item_id": ["y", "x"], "title": ["Why", None], "release_time": [1.0, np.nan]})
    users = pd.DataFrame({"user_id": ["b", "a"], "age": [30, 40]})
    log = log_of(events(position=[1, 2, 3, 4]), items=items, users=users, outcome_weights=(0.0, 2.0), card={"k": "v"})
    log.save(tmp_path / "log")
    back = InteractionLog.load(tmp_path / "log")
    assert (back.name, back.outcomes, back.outcome_weights) == ("t", ("watch", "like"), (0.0, 2.0))
    assert back.hash == log.hash
    assert back.card == log.card
    assert back.cleaning == log.cleaning
    pd.testing.assert_frame_equal(back.frame, log.frame)
    assert back.items is not None
    assert back.items["title"].tolist() == ["", "Why"]


def test_saving_again_replaces_the_tables_of_the_earlier_log(tmp_path: Path) -> None:
    log_of(events(), items=pd.DataFrame({"item_id": ["x"]})).save(tmp_path)
    (tmp_path / "mine.txt").write_text("stays")
    log_of(events()).save(tmp_path)
    assert InteractionLog.load(tmp_path).items is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["interactions.parquet", "log.json", "mine.txt"]


def test_a_missing_log_names_the_command_that_prepares_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m envs_data\.movielens_100k\.prepare"):
        InteractionLog.load(tmp_path / "movielens_100k")
    with pytest.raises(FileNotFoundError, match=r"python -m envs_data\.own_log\.prepare .* --out"):
        InteractionLog.load(tmp_path / "shop")


def test_a_damaged_log_is_refused_with_the_reason(tmp_path: Path) -> None:
    log_of(events()).save(tmp_path)
    good = (tmp_path / "interactions.parquet").read_bytes()
    description = json.loads((tmp_path / "log.json").read_text())

    (tmp_path / "interactions.parquet").write_bytes(good[:-1] + b"!")
    with pytest.raises(ValueError, match=r"damaged: interactions\.parquet is not the file that was written"):
        InteractionLog.load(tmp_path)
    (tmp_path / "interactions.parquet").unlink()
    with pytest.raises(ValueError, match=r"damaged: interactions\.parquet is missing"):
        InteractionLog.load(tmp_path)
    (tmp_path / "interactions.parquet").write_bytes(good)

    (tmp_path / "log.json").write_text(json.dumps({**description, "outcome_weights": [1.0, 9.0]}))
    with pytest.raises(ValueError, match="damaged: its content has hash"):
        InteractionLog.load(tmp_path)
    (tmp_path / "log.json").write_text(json.dumps({**description, "schema": 99}))
    with pytest.raises(ValueError, match="has schema 99 and this version reads 1"):
        InteractionLog.load(tmp_path)
    (tmp_path / "log.json").write_text(json.dumps({**description, "kind": "recipe book"}))
    with pytest.raises(ValueError, match="found 'recipe book'"):
        InteractionLog.load(tmp_path)
    without_name = {key: value for key, value in description.items() if key != "name"}
    (tmp_path / "log.json").write_text(json.dumps(without_name))
    with pytest.raises(ValueError, match="lacks or garbles 'name'"):
        InteractionLog.load(tmp_path)
    (tmp_path / "log.json").write_text("{")
    with pytest.raises(ValueError, match=r"log\.json is not JSON"):
        InteractionLog.load(tmp_path)


def test_an_interrupted_save_leaves_no_log_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_of(events()).save(tmp_path)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_parquet", killed)
    with pytest.raises(KeyboardInterrupt):
        log_of(events(like=0)).save(tmp_path)
    with pytest.raises(FileNotFoundError, match="no prepared log"):
        InteractionLog.load(tmp_path)


def test_the_hash_follows_content_and_not_name_order_or_string_type() -> None:
    log = log_of(events())
    assert log.hash == log_of(events(), name="other", card={"licence": "x"}).hash
    assert log.hash == log_of(events()[["like", "timestamp", "watch", "item_id", "user_id"]]).hash
    assert log.hash == log_of(events().iloc[[3, 2, 1, 0]]).hash
    assert log.hash == log_of(events().astype({"user_id": object, "item_id": object})).hash
    assert log.hash != log_of(events(like=[0, 0, 0, 1])).hash
    assert log.hash != log_of(events(), outcome_weights=(0.0, 1.0)).hash
    assert log.hash != log_of(events(), users=pd.DataFrame({"user_id": ["a"]})).hash
    # the same letters cut differently are other ids
    pair = events().iloc[:2]
    assert log_of(pair.assign(user_id=["ab", "c"])).hash != log_of(pair.assign(user_id=["a", "bc"])).hash


@pytest.mark.parametrize(
    "column",
    [
        [1_600_000_000, 1_600_000_060],
        ["1600000000", "1600000060"],
        [1_600_000_000_000, 1_600_000_060_000],
        [1_600_000_000_000_000, 1_600_000_060_000_000],
        ["2020-09-13T12:26:40Z", "2020-09-13T12:27:40Z"],
        ["2020-09-13 12:26:40", "2020-09-13 14:27:40+02:00"],
    ],
)
def test_times_in_every_form_are_the_same_seconds(column: list[Any]) -> None:
    assert parse_times(pd.Series(column)).tolist() == [1_600_000_000.0, 1_600_000_060.0]


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        ([1.0, 2.0], "neither unix seconds, milliseconds"),
        ([20200131, 20200201], "name the unit"),
        ([1_600_000_000, 1_600_000_000_000], "neither unix seconds, milliseconds"),
        (["01/02/2020", "02/02/2020"], "'01/02/2020' in row 0.*expected ISO 8601"),
        (["2020-01-01", "soon"], "1 of 2 values of timestamp"),
        (["1600000000", "2020-01-01"], "expected a number like the other rows"),
        ([1_600_000_000, None], "1 of 2 rows have no timestamp"),
    ],
)
def test_ambiguous_and_unreadable_times_are_refused(column: list[Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_times(pd.Series(column))


def test_a_named_unit_reads_small_numbers() -> None:
    assert parse_times(pd.Series([1000, 2000]), unit="ms").tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="time unit 'week' is not known"):
        parse_times(pd.Series([1]), unit="week")
