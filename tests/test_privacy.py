from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pandas as pd
import pytest

from metarec_gym.data import InteractionLog, encode, erase_user, minimise, pseudonym, pseudonymise, read_key, write_key

KEY = bytes(range(32))


def visits() -> InteractionLog:
    frame = pd.DataFrame(
        {
            "user_id": ["ann", "ann", "bob", "cyd"],
            "item_id": ["x", "y", "x", "z"],
            "timestamp": [1.0, 2.0, 3.0, 4.0],
            "view": [1.0, 1.0, 1.0, 1.0],
            "session_id": ["s", "t", "s", "s"],
            "position": [1, 2, 3, 4],
        }
    )
    users = pd.DataFrame({"user_id": ["ann", "bob", "cyd"], "age": [30, 40, 50], "town": ["A", "B", "C"]})
    items = pd.DataFrame({"item_id": ["x", "y", "z"], "title": ["X", "Y", "Z"]})
    return InteractionLog.from_frame(frame, name="visits", outcomes=("view",), users=users, items=items)


def test_a_pseudonym_is_a_keyed_hash_of_the_id() -> None:
    expected = hmac.new(KEY, b"user:ann", hashlib.sha256).hexdigest()[:32]
    assert pseudonym("ann", KEY) == expected
    assert pseudonym("ann", KEY[::-1]) != expected
    with pytest.raises(ValueError, match="the key has 3 bytes"):
        pseudonym("ann", b"abc")


def test_pseudonyms_replace_every_id_and_keep_who_did_what() -> None:
    log = visits()
    renamed = pseudonymise(log, KEY)
    assert renamed.users is not None
    assert (
        set(renamed.frame["user_id"])
        == set(renamed.users["user_id"])
        == {pseudonym(u, KEY) for u in ("ann", "bob", "cyd")}
    )
    of_ann = renamed.frame[renamed.frame["user_id"] == pseudonym("ann", KEY)]
    assert of_ann["item_id"].tolist() == ["x", "y"]
    assert renamed.users.set_index("user_id").loc[pseudonym("bob", KEY), "age"] == 40
    assert renamed.frame["user_id"].is_monotonic_increasing
    assert "personal data still" in renamed.card["pseudonymised"]
    # the log before is as it was
    assert set(log.frame["user_id"]) == {"ann", "bob", "cyd"}
    assert "pseudonymised" not in log.card


def test_a_session_id_shared_by_users_is_not_shared_after_pseudonyms() -> None:
    renamed = pseudonymise(visits(), KEY).frame
    assert renamed["session_id"].nunique() == 4
    assert not set(renamed["session_id"]) & {"s", "t"}


def test_a_pseudonymised_log_is_saved_read_and_encoded_like_any_other(tmp_path: Path) -> None:
    log = pseudonymise(visits(), KEY)
    log.save(tmp_path)
    assert InteractionLog.load(tmp_path).hash == log.hash
    assert encode(log, seed=0).n_users == 3
    written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert not any(name in written for name in (b"ann", b"bob", b"cyd"))


def test_the_key_is_written_outside_the_data_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "secret" / "key"
    key = write_key(path, data_folder=tmp_path / "data")
    assert len(key) == 32
    assert read_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError, match="there is a key at"):
        write_key(path)


def test_a_key_inside_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside the data"):
        write_key(tmp_path / "data" / "deep" / "key", data_folder=tmp_path / "data")
    with pytest.raises(ValueError, match="inside the data"):
        write_key(tmp_path / "data" / ".." / "data" / "key", data_folder=tmp_path / "data")
    visits().save(tmp_path / "log")
    with pytest.raises(ValueError, match="inside the data"):
        write_key(tmp_path / "log" / "key")
    assert not list(tmp_path.rglob("key"))


def test_a_missing_or_garbled_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no key at"):
        read_key(tmp_path / "key")
    (tmp_path / "key").write_text("hello")
    with pytest.raises(ValueError, match="is not a key"):
        read_key(tmp_path / "key")


def test_minimise_keeps_what_every_room_needs_and_what_is_named() -> None:
    bare = minimise(visits())
    assert list(bare.frame.columns) == ["user_id", "item_id", "timestamp", "view"]
    assert bare.users is None
    assert bare.items is not None
    some = minimise(visits(), keep=("session_id", "age"))
    assert list(some.frame.columns) == ["user_id", "item_id", "timestamp", "view", "session_id"]
    assert some.users is not None
    assert list(some.users.columns) == ["user_id", "age"]
    assert some.cleaning[-1].note == "dropped position, town"
    with pytest.raises(ValueError, match="cannot keep 'shoe_size'"):
        minimise(visits(), keep=("shoe_size",))


def test_an_erased_user_is_gone_from_events_users_and_files(tmp_path: Path) -> None:
    log = visits()
    erased = erase_user(log, "ann")
    assert set(erased.frame["user_id"]) == {"bob", "cyd"}
    assert erased.users is not None
    assert set(erased.users["user_id"]) == {"bob", "cyd"}
    assert (erased.card["rows"], erased.card["users"], erased.card["items"]) == (2, 2, 2)
    assert (erased.cleaning[-1].rows_before, erased.cleaning[-1].rows_after) == (4, 2)
    assert erased.hash != log.hash
    log.save(tmp_path)
    erased.save(tmp_path)
    assert b"ann" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert len(log.frame) == 4


def test_an_erasure_by_pseudonym_finds_the_user() -> None:
    erased = erase_user(pseudonymise(visits(), KEY), pseudonym("bob", KEY))
    assert set(erased.frame["user_id"]) == {pseudonym("ann", KEY), pseudonym("cyd", KEY)}


def test_erasing_an_unknown_user_or_one_of_the_last_two_is_refused() -> None:
    with pytest.raises(ValueError, match="user 'zoe' is not in log 'visits'"):
        erase_user(visits(), "zoe")
    with pytest.raises(ValueError, match="fewer than two users"):
        erase_user(erase_user(visits(), "ann"), "bob")
