"""How a log lies on disk: Parquet tables and a `log.json` with their checksums; a crash never looks complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

LOG_FILE = "log.json"
LOG_SCHEMA = 1
_CHUNK_BYTES = 1 << 20


def file_sha256(path: Path) -> str:
    """The sha256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _column_bytes(column: pd.Series[Any]) -> list[bytes]:
    """The values of a column as bytes that depend neither on the pandas version nor on its dtypes or memory layout."""
    if pd.api.types.is_bool_dtype(column.dtype):
        return [b"number", np.ascontiguousarray(column.to_numpy(dtype="<f8")).tobytes()]
    if pd.api.types.is_numeric_dtype(column.dtype):
        numbers = column.to_numpy(dtype="<f8", na_value=np.nan)
        # every NaN has the same bits, and so have 0.0 and -0.0
        numbers = np.where(np.isnan(numbers), np.nan, numbers) + 0.0
        return [b"number", numbers.tobytes()]
    texts = pa.array([None if pd.isna(value) else str(value) for value in column], type=pa.large_string())
    missing = texts.is_null().to_numpy(zero_copy_only=False)
    filled = texts.fill_null("")
    lengths = np.diff(np.frombuffer(filled.buffers()[1], dtype="<i8")[: len(filled) + 1])
    return [b"text", missing.tobytes(), lengths.tobytes(), "".join(filled.to_pylist()).encode()]


def content_hash(tables: Mapping[str, pd.DataFrame | None], settings: Mapping[str, Any]) -> str:
    """Hash of what the tables say: column names, values and row order, whatever the file format or the pandas version.

    Args:
        tables: Tables by name; None counts as absent.
        settings: JSON-able facts that belong to the content, such as the outcome names.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for table_name in sorted(tables):
        hash_table(digest, table_name, tables[table_name])
    return digest.hexdigest()[:16]


def hash_table(digest: hashlib._Hash, name: str, table: pd.DataFrame | None) -> None:
    """Adds one table to a content hash; None adds nothing."""
    if table is None:
        return
    digest.update(f"\x1etable {name} {len(table)}".encode())
    for column in sorted(map(str, table.columns)):
        digest.update(f"\x1fcolumn {column}\x1f".encode())
        for part in _column_bytes(table[column]):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame | None], description: Mapping[str, Any]) -> None:
    """Writes `<name>.parquet` for each table and then `log.json`; a folder without `log.json` is no log.

    Args:
        folder: Made if it is not there; other files in it are left alone.
        tables: Tables by name; a name with None removes the file of an earlier log.
        description: JSON-able content of `log.json`; the schema version and the checksums of the files are added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # the old description goes first: a crash from here on leaves a folder to prepare again, not a mixture of two logs
    (folder / LOG_FILE).unlink(missing_ok=True)
    files: dict[str, Path | None] = {}
    for name, table in tables.items():
        files[name] = None
        if table is not None:
            files[name] = folder / f"{name}.parquet.partial"
            table.to_parquet(files[name], index=False)
    install_tables(folder, files, description)


def install_tables(folder: Path, files: Mapping[str, Path | None], description: Mapping[str, Any]) -> None:
    """Moves finished Parquet files to their places in `folder` and writes `log.json` last.

    Args:
        folder: Where the log will lie.
        files: Files by the table's name, on the same file system as `folder`; None removes the file of an earlier log.
        description: As for `write_tables`.
    """
    (folder / LOG_FILE).unlink(missing_ok=True)
    checksums: dict[str, str] = {}
    for name, file in files.items():
        path = folder / f"{name}.parquet"
        if file is None:
            path.unlink(missing_ok=True)
            continue
        checksums[path.name] = file_sha256(file)
        os.replace(file, path)
    partial = folder / f"{LOG_FILE}.partial"
    whole = {"schema": LOG_SCHEMA, **description, "files": checksums}
    partial.write_text(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, folder / LOG_FILE)


def read_tables(
    folder: Path, names: Sequence[str], *, kind: str, prepare_command: str
) -> tuple[dict[str, pd.DataFrame | None], dict[str, Any]]:
    """Reads what `write_tables` wrote, after checking every checksum.

    Args:
        folder: Where the log lies.
        names: Tables to read; one that the log does not have comes back as None.
        kind: What `log.json` must call itself, so that a log is never taken for an impression table.
        prepare_command: Command named in the error sentences.

    Returns:
        The tables by name and the content of `log.json`.

    Raises:
        FileNotFoundError: There is no log in `folder`.
        ValueError: The log is damaged, of a newer schema, or of another kind.
    """
    description = read_description(folder, kind=kind, prepare_command=prepare_command)
    damaged = f"the prepared log in {folder} is damaged"
    tables: dict[str, pd.DataFrame | None] = dict.fromkeys(names)
    for name in names:
        file_name = f"{name}.parquet"
        expected = description["files"].get(file_name)
        if expected is None:
            continue
        file = folder / file_name
        if not file.is_file():
            raise ValueError(f"{damaged}: {file_name} is missing; prepare it again: {prepare_command}")
        if file_sha256(file) != expected:
            raise ValueError(
                f"{damaged}: {file_name} is not the file that was written; prepare it again: {prepare_command}"
            )
        tables[name] = pd.read_parquet(file)
    return tables, description


def read_description(folder: Path, *, kind: str, prepare_command: str) -> dict[str, Any]:
    """The content of `log.json`, as `read_tables` checks it; the tables' files are not looked at.

    Args:
        folder: Where the log lies.
        kind: What it must call itself.
        prepare_command: Command named in the error sentences.

    Raises:
        FileNotFoundError: There is no log in `folder`.
        ValueError: The log is damaged, of a newer schema, or of another kind.
    """
    path = folder / LOG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no prepared log in {folder} ({LOG_FILE} is missing); prepare it: {prepare_command}")
    damaged = f"the prepared log in {folder} is damaged"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{damaged}: {LOG_FILE} is not JSON; prepare it again: {prepare_command}") from error
    if not isinstance(description, dict) or not isinstance(description.get("files"), dict):
        raise ValueError(f"{damaged}: {LOG_FILE} does not list its files; prepare it again: {prepare_command}")
    if description.get("schema") != LOG_SCHEMA:
        raise ValueError(
            f"the log in {folder} has schema {description.get('schema')!r} and this version reads {LOG_SCHEMA}; "
            f"prepare it again: {prepare_command}"
        )
    if description.get("kind") != kind:
        raise ValueError(
            f"expected {kind} in {folder} and found {description.get('kind')!r}; name the folder of another log"
        )
    return description
