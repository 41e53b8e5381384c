"""Logs that do not fit in memory: their content hash, their encoding and samples of their users, row group by row group.

The rows of a prepared log are sorted by user, so whole users pass by one after the other. What stays in memory is one row group,
the users' and the items' ids, and the tensors of the dataset; these can lie in files (`scratch`), paged in and out by the system.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from metarec_gym.data.dataset import Dataset, item_columns
from metarec_gym.data.interactions import LOG_KIND, CleaningStep, InteractionLog, prepare_command
from metarec_gym.data.sessions import SESSION_GAP_S, sessions_by_gap, sessions_by_id
from metarec_gym.data.splits import assign_folds
from metarec_gym.data.storage import file_sha256, hash_table, read_description
from metarec_gym.seeding import stream

_ROWS_SHIFTED = 1_000_000
"""Rows whose place in the slate is counted from 0 at a time: mapped files are given back in between."""


# ------------------------------------------------------------------------------------------------ content hash
def content_hash_of_file(
    interactions: Path, tables: Mapping[str, pd.DataFrame | None], settings: Mapping[str, Any]
) -> str:
    """The hash that `storage.content_hash` gives, the interactions read from their Parquet file a row group at a time.

    Args:
        interactions: The Parquet file.
        tables: The other tables by name.
        settings: As for `storage.content_hash`.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted({"interactions", *tables}):
        if name != "interactions":
            hash_table(digest, name, tables[name])
            continue
        with pq.ParquetFile(interactions) as file:
            digest.update(f"\x1etable {name} {file.metadata.num_rows}".encode())
            for column in sorted(file.schema_arrow.names):
                digest.update(f"\x1fcolumn {column}\x1f".encode())
                _hash_column(digest, file, column)
    return digest.hexdigest()[:16]


def _hash_column(digest: hashlib._Hash, file: pq.ParquetFile, column: str) -> None:
    kind, rows = file.schema_arrow.field(column).type, file.metadata.num_rows
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        _begin_part(digest, 6)
        digest.update(b"number")
        _begin_part(digest, 8 * rows)
        for piece in _pieces(file, column):
            numbers = piece.to_pandas().to_numpy(dtype="<f8", na_value=np.nan)
            digest.update((np.where(np.isnan(numbers), np.nan, numbers) + 0.0).tobytes())
        return
    # the parts of a text column stand one after the other, so the column is read once for each of them
    _begin_part(digest, 4)
    digest.update(b"text")
    _begin_part(digest, rows)
    for piece in _pieces(file, column):
        digest.update(piece.is_null().to_numpy(zero_copy_only=False).tobytes())
    _begin_part(digest, 8 * rows)
    size = 0
    for piece in _pieces(file, column):
        lengths = pc.fill_null(pc.binary_length(piece.cast(pa.large_string())), 0).to_numpy().astype("<i8")
        size += int(lengths.sum())
        digest.update(lengths.tobytes())
    _begin_part(digest, size)
    for piece in _pieces(file, column):
        digest.update("".join(piece.cast(pa.large_string()).fill_null("").to_pylist()).encode())


def _begin_part(digest: hashlib._Hash, size: int) -> None:
    digest.update(size.to_bytes(8, "little"))


def _pieces(file: pq.ParquetFile, column: str) -> Iterator[pa.Array]:
    for group in range(file.num_row_groups):
        yield from file.read_row_group(group, columns=[column]).column(0).chunks


# ------------------------------------------------------------------------------------------------ encoding
def encode_folder(
    folder: Path,
    *,
    seed: int,
    shares: Sequence[float] = (0.34, 0.33, 0.33),
    session_gap_s: float = SESSION_GAP_S,
    scratch: Path | None = None,
) -> Dataset:
    """What `encode` makes of the log in `folder`, without ever holding the log as a table.

    Args:
        folder: A prepared log.
        seed: Seed of the folds.
        shares: Shares of the folds S, A and B.
        session_gap_s: Longest pause inside a session in seconds, for a log without session ids.
        scratch: Folder for the tensors of the rows, mapped into memory; None keeps them in memory (28 bytes a row and 4 for each
            outcome).

    Returns:
        The dataset, equal to `encode(InteractionLog.load(folder), ...)`.

    Raises:
        FileNotFoundError: There is no log in `folder`.
        ValueError: The log is damaged, or its rows are not sorted by user and time.
    """
    description, file, items = _opened(folder)
    with file:
        names, rows = file.schema_arrow.names, file.metadata.num_rows
        outcomes = tuple(description["outcomes"])
        item_ids = _sorted_ids(file, "item_id")
        column = _Columns(scratch)
        user = column("user", np.int64, rows)
        item = column("item", np.int64, rows)
        time_s = column("time", np.float64, rows)
        session = column("session", np.int64, rows)
        outcome = column("outcome", np.float32, rows, len(outcomes))
        place = column("position", np.int64, rows) if "position" in names else None
        user_ids: list[str] = []
        sizes: list[int] = []
        at, refused, taken, first_place = 0, False, False, 0
        for frame in _whole_users(file):
            code, found = pd.factorize(frame["user_id"])
            ids = [str(name) for name in found]
            here, end = code.astype(np.int64) + len(user_ids), at + len(frame)
            seconds = frame["timestamp"].to_numpy(dtype=np.float64)
            in_order = np.diff(here) > 0
            if not (in_order | ((np.diff(here) == 0) & (np.diff(seconds) >= 0))).all() or [
                *user_ids[-1:],
                *ids,
            ] != sorted([*user_ids[-1:], *ids]):
                raise ValueError(
                    f"the rows of the log in {folder} are not sorted by user and time; prepare it again: "
                    f"{prepare_command(folder)}"
                )
            user[at:end], time_s[at:end] = here, seconds
            item[at:end] = item_ids.get_indexer(pd.Index(frame["item_id"].astype(object)))
            outcome[at:end] = frame[list(outcomes)].to_numpy(dtype=np.float32)
            refused |= bool((outcome[at:end, 0] == 0).any())
            taken |= bool((outcome[at:end, 0] > 0).any())
            if "session_id" in names:
                session[at:end] = sessions_by_id(here, frame["session_id"].to_numpy(dtype=object))
            else:
                session[at:end] = sessions_by_gap(here, seconds, session_gap_s)
            if place is not None:
                place[at:end] = frame["position"].to_numpy(dtype=np.int64)
                lowest = int(place[at:end].min())
                first_place = lowest if at == 0 else min(first_place, lowest)
            sizes += np.bincount(code, minlength=len(ids)).tolist()
            user_ids += ids
            at = end
            column.let_go()
    if place is not None and first_place != 0:
        # some logs count the first place as 1
        for lo in range(0, rows, _ROWS_SHIFTED):
            place[lo : lo + _ROWS_SHIFTED] -= first_place
            column.let_go()
    text, category, category_names, release = item_columns(items, np.asarray(item_ids, dtype=object).astype(str))
    return Dataset(
        name=str(description["name"]),
        outcomes=outcomes,
        outcome_weights=tuple(float(weight) for weight in description["outcome_weights"]),
        has_impressions=refused and taken,
        user_ids=np.array(user_ids, dtype=object),
        item_ids=np.asarray(item_ids, dtype=object),
        user=torch.from_numpy(user),
        item=torch.from_numpy(item),
        time=torch.from_numpy(time_s),
        outcome=torch.from_numpy(outcome),
        session=torch.from_numpy(session),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)),
        fold=torch.from_numpy(assign_folds(user_ids, seed=seed, shares=shares)),
        item_text=text,
        item_category=torch.from_numpy(category),
        category_names=category_names,
        item_release=torch.from_numpy(release),
        position=None if place is None else torch.from_numpy(place),
    )


class _Columns:
    """Makes arrays of rows, in memory or mapped from files."""

    def __init__(self, scratch: Path | None) -> None:
        self.scratch = scratch
        self._mapped: list[np.memmap[Any, Any]] = []
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, dtype: Any, *shape: int) -> NDArray[Any]:
        if self.scratch is None or 0 in shape:
            return np.zeros(shape, dtype=dtype)
        array = np.memmap(self.scratch / f"{name}.bin", dtype=dtype, mode="w+", shape=shape)
        self._mapped.append(array)
        return array

    def let_go(self) -> None:
        """Gives the memory of what was written back to the system, which keeps the pages until they are in the files."""
        for array in self._mapped:
            # not every system can; the pages then stay until it needs them
            if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                array.base.madvise(mmap.MADV_DONTNEED)


def _opened(folder: Path) -> tuple[dict[str, Any], pq.ParquetFile, pd.DataFrame | None]:
    """`log.json`, the open interactions and the item table of a prepared log, checksums checked."""
    folder = Path(folder)
    command = prepare_command(folder)
    description = read_description(folder, kind=LOG_KIND, prepare_command=command)
    for name in ("interactions.parquet", "items.parquet"):
        expected = description["files"].get(name)
        if expected is None and name == "items.parquet":
            continue
        if not (folder / name).is_file() or file_sha256(folder / name) != expected:
            raise ValueError(
                f"the prepared log in {folder} is damaged: {name} is not the file that was written; prepare it again: {command}"
            )
    items = pd.read_parquet(folder / "items.parquet") if "items.parquet" in description["files"] else None
    return description, pq.ParquetFile(folder / "interactions.parquet"), items


def _sorted_ids(file: pq.ParquetFile, column: str) -> pd.Index[Any]:
    """The different ids of a column, in the order of their code points."""
    known = pa.array([], type=pa.large_string())
    for piece in _pieces(file, column):
        known = pc.unique(pa.concat_arrays([known, pc.unique(piece).cast(pa.large_string())]))
    ids: pd.Index[Any] = pd.Index(sorted(known.to_pylist()), dtype=object)
    return ids


def _whole_users(file: pq.ParquetFile) -> Iterator[pd.DataFrame]:
    """The rows in pieces that begin and end with a user: the last user of a row group waits for the next one."""
    waiting: pd.DataFrame | None = None
    for group in range(file.num_row_groups):
        frame = file.read_row_group(group).to_pandas()
        if waiting is not None:
            frame = pd.concat([waiting, frame], ignore_index=True)
        if len(frame) == 0:
            continue
        last = (frame["user_id"] == frame["user_id"].iloc[-1]).to_numpy()
        waiting = frame.loc[last]
        if not last.all():
            yield frame.loc[~last].reset_index(drop=True)
    if waiting is not None:
        yield waiting.reset_index(drop=True)


# ------------------------------------------------------------------------------------------------ a sample
def load_sample(folder: Path, users: int, *, seed: int) -> InteractionLog:
    """The log of some of the users, drawn at random: what fits that hold everything in memory can take of a big log.

    Who is drawn follows the id and the seed, not the place in the log, so a larger sample holds the smaller ones.

    Args:
        folder: A prepared log.
        users: How many users; all of them if there are no more.
        seed: Seed of the draw.

    Returns:
        A log of these users; items that they never met are gone.

    Raises:
        FileNotFoundError: There is no log in `folder`.
        ValueError: The log is damaged, or fewer than two users are asked for.
    """
    if users < 2:
        raise ValueError(f"a sample of {users} users was asked for; expected at least 2")
    description, file, items = _opened(folder)
    key = stream(seed, "sample of users").to_bytes(8, "big")

    def rank(user: str) -> bytes:
        return hashlib.blake2b(user.encode(), digest_size=8, key=key).digest()

    with file:
        everyone = _sorted_ids(file, "user_id")
        chosen = pa.array(sorted(everyone, key=rank)[:users], type=pa.large_string())
        parts = []
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            parts.append(table.filter(pc.is_in(table["user_id"].cast(pa.large_string()), value_set=chosen)))
        rows = file.metadata.num_rows
    frame = pa.concat_tables(parts).to_pandas()
    step = CleaningStep(
        f"keep {len(chosen):,} of {len(everyone):,} users, drawn at random (seed {seed})", rows, len(frame)
    )
    log = InteractionLog(
        name=str(description["name"]),
        frame=frame,
        outcomes=tuple(description["outcomes"]),
        outcome_weights=tuple(float(weight) for weight in description["outcome_weights"]),
        items=None if items is None else items[items["item_id"].isin(frame["item_id"].unique())].reset_index(drop=True),
        card={**description["card"], "sample": {"users": len(chosen), "of": len(everyone), "seed": seed}},
        cleaning=(*(CleaningStep(**s) for s in description["cleaning"]), step),
    )
    log.card.update(log.counts())
    return log
