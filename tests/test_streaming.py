"""A log read in pieces is the log read at once: hash, cleaning report, card, and tensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from envs_data.own_log import prepare as own_log
from envs_data.own_log.streaming import prepare_in_pieces
from metarec_gym.data import InteractionLog, encode, read_key
from metarec_gym.data.storage import content_hash
from metarec_gym.data.streaming import content_hash_of_file, encode_folder, load_sample

OUTCOMES = ("click=event:click", "purchase=event:purchase")


def events(rows: int = 300, *, users: int = 23, seed: int = 0) -> pd.DataFrame:
    """Events in no order, with repeats, ties in time, a few odd ids and several sessions a user."""
    rng = np.random.default_rng(seed)
    names = np.array([f"u{k}" for k in range(users - 3)] + ["é", "Z", "007"])
    return pd.DataFrame(
        {
            "uid": names[rng.integers(users, size=rows)],
            "sku": [f"i{k}" for k in rng.integers(40, size=rows)],
            # minutes on a coarse grid: ties, and pauses of more than half an hour
            "ts": 1_700_000_000 + 600 * rng.integers(200, size=rows),
            "event": rng.choice(["click", "purchase", "view", "search"], size=rows, p=[0.5, 0.1, 0.3, 0.1]),
            "visit": [f"v{k}" for k in rng.integers(3, size=rows)],
            "rank": rng.integers(1, 6, size=rows),
            "chance": rng.uniform(0.1, 1.0, size=rows).round(3),
            "who": rng.choice(["a", "b"], size=rows),
        }
    )


def both(tmp_path: Path, frame: pd.DataFrame, *, suffix: str = "csv", **settings: Any) -> tuple[Path, Path]:
    """The log prepared at once, and in pieces of 60 rows."""
    path = tmp_path / f"shop.{suffix}"
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path, index=False, row_group_size=70)
    base = {"path": path, "user": "uid", "item": "sku", "time": "ts", "outcome": OUTCOMES, **settings}
    for name, more in (("whole", {"stream": False}), ("pieces", {"stream": True, "rows_in_memory": 60})):
        own_log.main(own_log.Args(**{**base, **more}, name="shop", out=tmp_path / name))
    return tmp_path / "whole", tmp_path / "pieces"


def described(folder: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads((folder / "log.json").read_text()).items() if k != "files"}


CASES: dict[str, dict[str, Any]] = {
    "positives": {},
    "impressions": {"shown": "event:view"},
    "sessions": {"session": "visit", "shown": "event:view"},
    "threshold": {"outcome": ("watch=*", "like=rank>=4"), "weight": ("like=2",)},
    "all columns": {"shown": "event:view", "position": "rank", "propensity": "chance", "strategy": "who"},
}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("case", CASES)
def test_in_pieces_and_at_once_give_the_same_log(tmp_path, case, suffix):
    whole, pieces = both(tmp_path, events(), suffix=suffix, **CASES[case])
    assert described(pieces) == described(whole)
    a, b = InteractionLog.load(whole), InteractionLog.load(pieces)
    pd.testing.assert_frame_equal(a.frame, b.frame)
    # the pieces were dealt out to several buckets, each a row group
    assert pq.ParquetFile(pieces / "interactions.parquet").num_row_groups > 3
    assert not (pieces / "pieces.partial").exists()


def test_pseudonyms_and_item_tables_are_the_same_in_pieces(tmp_path):
    items = pd.DataFrame({"sku": [f"i{k}" for k in range(40)], "name": "x", "kind": ["a|b", "c"] * 20})
    items.to_csv(tmp_path / "items.csv", index=False)
    key = tmp_path / "key"
    settings = {"pseudonym_key": key, "items": tmp_path / "items.csv", "item_title": "name", "item_categories": "kind"}
    whole, pieces = both(tmp_path, events(), **settings)
    assert described(pieces) == described(whole)
    assert "u0" not in set(InteractionLog.load(pieces).frame["user_id"])
    assert len(read_key(key)) >= 16


def test_incomplete_rows_are_dropped_and_counted_over_all_pieces(tmp_path):
    frame = events()
    frame.loc[[3, 200, 299], "uid"] = None
    frame.loc[[3, 77], "ts"] = None
    frame["ts"] = frame["ts"].astype("Int64")
    whole, pieces = both(tmp_path, frame, drop_incomplete=True)
    assert described(pieces) == described(whole)
    step = next(s for s in described(pieces)["cleaning"] if s["rule"] == "drop rows without user")
    assert step["rows_before"] - step["rows_after"] == 3


def test_milliseconds_are_found_out_for_the_whole_file_not_for_each_piece(tmp_path):
    frame = events()
    frame["ts"] *= 1000
    whole, pieces = both(tmp_path, frame)
    assert described(pieces)["hash"] == described(whole)["hash"]


def streamed(tmp_path: Path, frame: pd.DataFrame, **settings: Any) -> dict[str, Any]:
    path = tmp_path / "shop.csv"
    frame.to_csv(path, index=False)
    base = {
        "user": "uid",
        "item": "sku",
        "time": "ts",
        "outcome": OUTCOMES,
        "rows_in_memory": 50,
        "out": tmp_path / "out",
    }
    args = own_log.Args(path=path, **{**base, **settings})
    return prepare_in_pieces(args, own_log.recipe_of(args))


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, lambda f: f.assign(uid=[None if k == 233 else u for k, u in enumerate(f["uid"])]), "first: row 233"),
        ({"outcome": ("buy=event:bought",)}, lambda f: f, "no row has 'bought' in column 'event'"),
        ({"shown": "event:seen"}, lambda f: f, "no row has 'seen' in column 'event'"),
        ({}, lambda f: f.assign(uid="one"), "log 'shop' has one user only \\('one'\\)"),
        ({"item": "product"}, lambda f: f, "no column for --item product"),
        ({"rows_in_memory": 0}, lambda f: f, "expected at least 1"),
        (
            {},
            lambda f: f.assign(ts=[*f["ts"].astype(str)[:-1], "2024-01-01"]),
            "column 'ts' holds numbers and texts; write all times in one form",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_left(tmp_path, settings, change, message):
    with pytest.raises(ValueError, match=message):
        streamed(tmp_path, change(events()), **settings)
    assert not (tmp_path / "out" / "log.json").exists()
    assert not (tmp_path / "out" / "pieces.partial").exists()


def test_ids_with_fractions_in_some_pieces_only_are_refused(tmp_path):
    frame = events().assign(uid=[float(k % 9) + (0.5 if k > 200 else 0.0) for k in range(300)])
    frame.to_parquet(tmp_path / "shop.parquet", index=False)
    args = own_log.Args(path=tmp_path / "shop.parquet", user="uid", item="sku", time="ts", outcome=OUTCOMES,
                        rows_in_memory=50, out=tmp_path / "out")  # fmt: skip
    with pytest.raises(ValueError, match="some with fractions"):
        prepare_in_pieces(args, {})


@pytest.fixture
def saved(tmp_path):
    frame = events(900, users=31).rename(columns={"uid": "user_id", "sku": "item_id", "ts": "timestamp"})
    frame = frame.assign(click=frame["event"] == "click", position=frame["rank"])
    items = pd.DataFrame({"item_id": [f"i{k}" for k in range(40)], "title": "t", "categories": ["a", "b"] * 20})
    columns = ["user_id", "item_id", "timestamp", "click", "position"]
    log = InteractionLog.from_frame(frame[columns], name="small", outcomes=["click"], items=items)
    log.save(tmp_path / "log")
    # many small row groups, that cut users in two
    description = json.loads((tmp_path / "log" / "log.json").read_text())
    log.frame.to_parquet(tmp_path / "log" / "interactions.parquet", index=False, row_group_size=37)
    from metarec_gym.data.storage import file_sha256

    description["files"]["interactions.parquet"] = file_sha256(tmp_path / "log" / "interactions.parquet")
    (tmp_path / "log" / "log.json").write_text(json.dumps(description))
    return tmp_path / "log"


@pytest.mark.parametrize("mapped", [False, True])
def test_a_folder_is_encoded_as_its_log(saved, tmp_path, mapped):
    want = encode(InteractionLog.load(saved), seed=3)
    got = encode_folder(saved, seed=3, scratch=tmp_path / "scratch" if mapped else None)
    for field in dataclasses.fields(want):
        a, b = getattr(want, field.name), getattr(got, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=field.name)
        elif isinstance(a, np.ndarray):
            assert a.tolist() == b.tolist(), field.name
        else:
            assert a == b, field.name


def test_given_sessions_are_numbered_the_same_in_a_folder(tmp_path):
    whole, _ = both(tmp_path, events(), session="visit")
    want = encode(InteractionLog.load(whole), seed=0)
    torch.testing.assert_close(encode_folder(whole, seed=0).session, want.session)


def test_a_file_has_the_hash_of_its_table(saved):
    log = InteractionLog.load(saved)
    settings = {"outcomes": log.outcomes, "outcome_weights": log.outcome_weights}
    tables = {"items": log.items, "users": None}
    assert content_hash_of_file(saved / "interactions.parquet", tables, settings) == log.hash
    changed = log.frame.assign(position=log.frame["position"] + (log.frame.index == 400))
    assert content_hash({"interactions": changed, **tables}, settings) != log.hash


def test_missing_texts_and_numbers_are_hashed_alike(tmp_path):
    frame = pd.DataFrame({"a": ["x", None, "", "äöü"] * 5, "b": [1.0, np.nan, -0.0, 2.5] * 5, "c": range(20)})
    frame.to_parquet(tmp_path / "f.parquet", index=False, row_group_size=3)
    assert content_hash_of_file(tmp_path / "f.parquet", {}, {}) == content_hash({"interactions": frame}, {})


def test_rows_that_are_not_sorted_are_refused(saved):
    frame = pd.read_parquet(saved / "interactions.parquet")
    description = json.loads((saved / "log.json").read_text())
    frame.iloc[::-1].to_parquet(saved / "interactions.parquet", index=False)
    from metarec_gym.data.storage import file_sha256

    description["files"]["interactions.parquet"] = file_sha256(saved / "interactions.parquet")
    (saved / "log.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="not sorted by user and time; prepare it again"):
        encode_folder(saved, seed=0)


def test_a_damaged_file_is_refused(saved):
    with (saved / "interactions.parquet").open("r+b") as file:
        file.seek(100)
        file.write(b"\x00\x01\x02")
    with pytest.raises(ValueError, match="damaged: interactions.parquet is not the file that was written"):
        encode_folder(saved, seed=0)


def test_a_sample_keeps_whole_users_and_a_larger_one_holds_the_smaller(saved):
    log = InteractionLog.load(saved)
    few, more = load_sample(saved, 5, seed=1), load_sample(saved, 12, seed=1)
    chosen = set(few.frame["user_id"])
    assert len(chosen) == 5
    assert chosen < set(more.frame["user_id"])
    expected = log.frame[log.frame["user_id"].isin(chosen)].reset_index(drop=True)
    pd.testing.assert_frame_equal(few.frame, expected)
    assert few.card["sample"] == {"users": 5, "of": 31, "seed": 1}
    assert few.cleaning[-1].rows_after == len(expected) == few.card["rows"]
    assert set(load_sample(saved, 5, seed=2).frame["user_id"]) != chosen
    assert set(few.items["item_id"]) == set(expected["item_id"])


def test_a_sample_of_one_user_is_refused(saved):
    with pytest.raises(ValueError, match="expected at least 2"):
        load_sample(saved, 1, seed=0)


def test_a_world_of_a_sample_is_built_from_a_log_of_its_own(saved, tmp_path, monkeypatch):
    from experiments import build_world
    from metarec_gym.world import World

    class Stop(Exception):
        pass

    def build(log, **_):
        raise Stop(log.hash)

    monkeypatch.setattr(World, "build", build)
    args = build_world.Args(log=saved, out=tmp_path / "world", users=6, runs=tmp_path / "runs", quiet=True)
    with pytest.raises(Stop, match=load_sample(saved, 6, seed=0).hash):
        build_world.run(args)
    kept = InteractionLog.load(tmp_path / "world_log")
    assert kept.hash == load_sample(saved, 6, seed=0).hash
    assert kept.card["users"] == 6
