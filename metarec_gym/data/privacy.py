"""Pseudonyms, fewer columns, erasure: what a log owes its users.

Pseudonymisation, never anonymisation: the holder of the key can name every user again, and without the key a user can
still be recognised by what they did and when. A pseudonymised log remains personal data; keep it as such.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from metarec_gym.data.interactions import KEY_COLUMNS, OPTIONAL_COLUMNS, CleaningStep, InteractionLog, sorted_rows
from metarec_gym.data.storage import LOG_FILE

KEY_BYTES = 32
_MIN_KEY_BYTES = 16
_PSEUDONYM_DIGITS = 32


def write_key(path: Path, *, data_folder: Path | None = None) -> bytes:
    """Makes a random key and writes it to `path`, readable by its owner only.

    Args:
        path: A new file outside the data: who gets the data must not get the key with it.
        data_folder: Folder of the data the key is for; the key may not lie in it.

    Returns:
        The key.

    Raises:
        ValueError: `path` is inside `data_folder` or inside a prepared log.
        FileExistsError: There is a key already; a new one would cut the old pseudonyms off.
    """
    path = Path(path)
    _refuse_inside_data(path, data_folder)
    key = secrets.token_bytes(KEY_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise FileExistsError(
            f"there is a key at {path} already; read it with read_key, or name another file"
        ) from error
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(key.hex() + "\n")
    return key


def read_key(path: Path) -> bytes:
    """Reads a key that `write_key` wrote."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no key at {path}; make one with metarec_gym.data.write_key")
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except ValueError as error:
        raise ValueError(f"{path} is not a key: expected hexadecimal digits as write_key writes them") from error
    return _checked_key(key)


def pseudonym(user_id: str, key: bytes) -> str:
    """The pseudonym of a user: the first 128 bits of HMAC-SHA256(key, user id), as 32 hexadecimal digits."""
    return _keyed_hash(_checked_key(key), "user", user_id)


def pseudonymise(log: InteractionLog, key: bytes) -> InteractionLog:
    """The log with user ids and session ids replaced by keyed hashes; whoever lacks the key cannot test a guessed id.

    This is pseudonymisation, not anonymisation: see the module's first lines. Other user columns stay; see `minimise`.

    Args:
        log: The log.
        key: At least 16 random bytes, from `write_key` or `read_key`.

    Returns:
        A new log, sorted by the pseudonyms.
    """
    key = _checked_key(key)
    known: dict[str, str] = {}

    def renamed(user_id: str) -> str:
        if user_id not in known:
            known[user_id] = _keyed_hash(key, "user", user_id)
        return known[user_id]

    frame = log.frame.copy()
    if "session_id" in frame.columns:
        # the user is hashed in: a session id shared by two users must not tell that they were together
        pairs = zip(frame["user_id"], frame["session_id"], strict=True)
        frame["session_id"] = [_keyed_hash(key, "session", f"{len(user)}:{user}{session}") for user, session in pairs]
    frame["user_id"] = [renamed(user) for user in frame["user_id"]]
    users = None
    if log.users is not None:
        users = log.users.assign(user_id=[renamed(user) for user in log.users["user_id"]])
        users = users.sort_values("user_id", kind="stable", ignore_index=True)
    step = CleaningStep("replace user and session ids by keyed hashes", len(frame), len(frame), "pseudonyms")
    card = {**log.card, "pseudonymised": "HMAC-SHA256 pseudonyms of users and sessions: personal data still"}
    return replace(log, frame=sorted_rows(frame), users=users, card=card, cleaning=(*log.cleaning, step))


def minimise(log: InteractionLog, keep: Sequence[str] = ()) -> InteractionLog:
    """The log with only the columns that every room needs, and those named: what is not there cannot leak.

    Args:
        log: The log.
        keep: Optional columns to keep, of the events (session_id, propensity, position, strategy) or of the users.

    Returns:
        A new log. Its user table keeps `user_id` and the columns named, and is dropped where none is.

    Raises:
        ValueError: A column named is not in the log.
    """
    optional = [column for column in OPTIONAL_COLUMNS if column in log.frame.columns]
    of_users = [column for column in log.users.columns if column != "user_id"] if log.users is not None else []
    unknown = [column for column in keep if column not in (*optional, *of_users)]
    if unknown:
        raise ValueError(
            f"cannot keep {', '.join(map(repr, unknown))}: the log's optional columns are "
            f"{', '.join(map(repr, (*optional, *of_users))) or 'none'}; name some of these"
        )
    frame = log.frame[[*KEY_COLUMNS, *log.outcomes, *(column for column in optional if column in keep)]].copy()
    kept_of_users = [column for column in of_users if column in keep]
    users = log.users[["user_id", *kept_of_users]].copy() if log.users is not None and kept_of_users else None
    dropped = [column for column in (*optional, *of_users) if column not in keep]
    step = CleaningStep("drop columns not needed", len(frame), len(frame), f"dropped {', '.join(dropped) or 'none'}")
    return replace(log, frame=frame, users=users, card=dict(log.card), cleaning=(*log.cleaning, step))


def erase_user(log: InteractionLog, user_id: str) -> InteractionLog:
    """The log without one user: no row, no line in the user table, and no trace of the id in the cleaning report.

    Strategies and worlds made from the log before still hold what they learned from the user: build them again.

    Args:
        log: The log.
        user_id: The user as the log names them: the pseudonym if it is pseudonymised.

    Returns:
        A new log; the item table stays as it is.

    Raises:
        ValueError: The user is not in the log, or fewer than two users would be left.
    """
    user_id = str(user_id)
    remains = (log.frame["user_id"] != user_id).to_numpy(dtype=bool)
    in_table = log.users is not None and bool((log.users["user_id"] == user_id).any())
    if bool(remains.all()) and not in_table:
        raise ValueError(f"user {user_id!r} is not in log {log.name!r}; in a pseudonymised log name the pseudonym")
    frame = log.frame.loc[remains].reset_index(drop=True)
    if frame["user_id"].nunique() < 2:
        raise ValueError(f"log {log.name!r} would keep fewer than two users; delete its folder instead")
    users = None
    if log.users is not None:
        users = log.users.loc[(log.users["user_id"] != user_id).to_numpy(dtype=bool)].reset_index(drop=True)
    step = CleaningStep("erase a user on request", len(log.frame), int(np.count_nonzero(remains)))
    erased = replace(log, frame=frame, users=users, card=dict(log.card), cleaning=(*log.cleaning, step))
    erased.card.update(erased.counts())
    return erased


def _refuse_inside_data(path: Path, data_folder: Path | None) -> None:
    resolved = path.resolve()
    inside_named = data_folder is not None and resolved.is_relative_to(Path(data_folder).resolve())
    inside_log = any((parent / LOG_FILE).is_file() for parent in resolved.parents)
    if inside_named or inside_log:
        raise ValueError(
            f"the key would lie inside the data at {path}; name a file outside, where the data is not handed on"
        )


def _checked_key(key: bytes) -> bytes:
    if len(key) < _MIN_KEY_BYTES:
        raise ValueError(
            f"the key has {len(key)} bytes; expected at least {_MIN_KEY_BYTES} random ones, as write_key makes them"
        )
    return key


def _keyed_hash(key: bytes, what: str, text: str) -> str:
    return hmac.new(key, f"{what}:{text}".encode(), hashlib.sha256).hexdigest()[:_PSEUDONYM_DIGITS]
