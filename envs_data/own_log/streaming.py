"""An own log of any length in bounded memory: the same prepared log, with the same hash, as from the whole file at once.

1. The file is read in pieces: rows are checked, users counted, the range of the times found. A CSV is kept as Parquet on the way.
2. Ranges of users become buckets on disk, each of about `rows_in_memory` rows; the pieces are mapped and dealt out to them.
3. Each bucket holds whole users, so it is sorted, cut into sessions, merged and cleaned on its own, one after the other.
4. The buckets in order are the log, sorted by user; it is written row group by row group and hashed column by column.

In memory are one piece or one bucket, the ids of the users with their counts, and those of the items. A user with more rows
than a bucket makes a larger bucket.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from envs_data.own_log import prepare as own
from metarec_gym.data import CleaningStep, InteractionLog, id_strings, pseudonym, pseudonymise
from metarec_gym.data.interactions import (
    TIME_UNITS,
    check_gate,
    check_size,
    checked_table,
    clean_rows,
    guessed_unit,
    log_counts,
    log_description,
    merged_repeats,
)
from metarec_gym.data.storage import install_tables
from metarec_gym.data.streaming import content_hash_of_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN = "_shown"


@dataclass
class _Totals:
    """What is known of the whole log when all pieces have passed."""

    rows: int = 0
    counts: list[pa.Table] = field(default_factory=list)
    """User ids with their rows, by piece."""
    numbers: list[tuple[float, float]] = field(default_factory=list)
    """Lowest and highest time of each piece whose times are numbers."""
    texts: bool = False
    """Whether a piece has times that are no numbers."""
    happened: set[str] = field(default_factory=set)
    """Outcomes that some row has."""
    fractions: dict[str, set[bool]] = field(default_factory=dict)
    """By id column: whether pieces hold numbers with fractions, without, or both."""


def prepare_in_pieces(args: own.Args, recipe: dict[str, Any]) -> dict[str, Any]:
    """Reads, maps, cleans and writes the log; returns what stands in its `log.json`.

    Args:
        args: The files and the mapping.
        recipe: Goes into the card.

    Raises:
        ValueError: The file or the mapping cannot be used; the sentence says why and what to do.
    """
    if args.rows_in_memory < 1:
        raise ValueError(f"--rows-in-memory is {args.rows_in_memory}; expected at least 1, 500000 is usual")
    name, out = own.target(args)
    out.mkdir(parents=True, exist_ok=True)
    scratch = out / "pieces.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        key = None if args.pseudonym_key is None else own.pseudonym_key(args.pseudonym_key, out)
        columns = _columns_of(args)
        own.check_columns(args, columns)
        rules, weights = own.outcome_rules(args, columns)
        told = [*rules, own.shown_rule(args, columns)] if args.shown is not None else rules
        totals = _Totals()
        source = _checked_pieces(args, told, totals, scratch)
        args = replace(args, time_unit=_time_unit(args, totals))
        bounds = _bounds(totals, args.rows_in_memory, key)
        steps = _dealt_out(source, args, rules, bounds, key, scratch)
        return _written(args, recipe, rules, weights, bounds, steps, key, scratch, name, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ 1. pieces
def _columns_of(args: own.Args) -> list[str]:
    if _is_parquet(args.path):
        with _parquet(args.path) as file:
            return [str(column) for column in file.schema_arrow.names]
    for piece in _csv_pieces(args, 1):
        return [str(column) for column in piece.columns]
    raise ValueError(f"{args.path.name} has no rows left; check the file and the columns named")


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}); check the file") from error


def _csv_pieces(args: own.Args, rows: int) -> Iterator[pd.DataFrame]:
    try:
        options = own.csv_options(args.separator, args.columns, args.encoding)
        with pd.read_csv(args.path, chunksize=rows, **options) as reader:
            for piece in reader:
                yield piece.rename(columns=lambda column: str(column).strip()).reset_index(drop=True)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{args.path} is not {args.encoding} text ({error}); name its encoding with --encoding"
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, EOFError) as error:
        raise ValueError(
            f"{args.path} cannot be read as a CSV separated by {args.separator!r} ({error}); check --separator"
        ) from error


def _parquet_pieces(path: Path, columns: list[str], rows: int) -> Iterator[pd.DataFrame]:
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=rows, columns=columns):
            yield batch.to_pandas()


def _needed(args: own.Args, rules: list[own.OutcomeRule], columns: list[str]) -> list[str]:
    wanted = {args.user, args.item, args.time, args.session, args.strategy, args.propensity, args.position}
    wanted |= {rule.column for rule in rules}
    if args.shown is not None:
        wanted.add(own.shown_rule(args, columns).column)
    return [column for column in columns if column in wanted]


def _checked_pieces(args: own.Args, rules: list[own.OutcomeRule], totals: _Totals, scratch: Path) -> Path:
    """First reading: fills `totals`; returns the Parquet file that the second reading takes."""
    columns = _columns_of(args)
    needed, as_is = _needed(args, rules, columns), _is_parquet(args.path)
    pieces = (
        _parquet_pieces(args.path, needed, args.rows_in_memory) if as_is else _csv_pieces(args, args.rows_in_memory)
    )
    kept, writer = args.path if as_is else scratch / "source.parquet", None
    for piece in pieces:
        piece = piece[needed]
        if not as_is:
            table = pa.table({c: pa.array(piece[c], type=pa.large_string()) for c in needed})
            writer = pq.ParquetWriter(kept, table.schema) if writer is None else writer
            writer.write_table(table)
        steps: list[CleaningStep] = []
        whole = own.complete_rows(piece, args, steps, first_row=totals.rows)
        totals.rows += len(piece)
        if len(whole):
            _count(whole, args, rules, totals)
        _progress("read", totals.rows)
    if writer is not None:
        writer.close()
    if not totals.counts:
        raise ValueError(f"{args.path.name} has no rows left; check the file and the columns named")
    for rule in rules:
        if rule.kind == "event" and rule.name not in totals.happened:
            raise ValueError(
                f"no row has {rule.value!r} in column {rule.column!r}; correct the mapping of {rule.name!r}"
            )
    for column, kinds in totals.fractions.items():
        if len(kinds) > 1:
            raise ValueError(
                f"column {column!r} holds ids that are numbers, some with fractions; write them as texts, or prepare the "
                "file in one piece with --no-stream"
            )
    return kept


def _count(piece: pd.DataFrame, args: own.Args, rules: list[own.OutcomeRule], totals: _Totals) -> None:
    users = pa.array(id_strings(piece[args.user], args.user).astype(object), type=pa.large_string())
    counted = pc.value_counts(users)
    totals.counts.append(pa.table({"user": counted.field(0), "rows": counted.field(1)}))
    if sum(len(table) for table in totals.counts[1:]) > max(len(totals.counts[0]), 1_000_000):
        totals.counts = [_summed(totals.counts)]
    for column in (args.user, args.item):
        if pd.api.types.is_float_dtype(piece[column].dtype):
            numbers = piece[column].to_numpy(dtype=np.float64)
            totals.fractions.setdefault(column, set()).add(bool((numbers != np.floor(numbers)).any()))
    times = piece[args.time]
    if not pd.api.types.is_datetime64_any_dtype(times.dtype):
        numbers = pd.to_numeric(times, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        known = numbers[~np.isnan(numbers)]
        totals.texts |= len(known) < len(numbers)
        if len(known):
            totals.numbers.append((float(known.min()), float(known.max())))
    for rule in rules:
        if rule.kind == "event" and rule.name not in totals.happened:
            texts = piece[rule.column].astype(str).str.strip()
            if bool(((texts == rule.value) & piece[rule.column].notna()).any()):
                totals.happened.add(rule.name)


def _summed(tables: list[pa.Table]) -> pa.Table:
    merged = pa.concat_tables(tables).group_by("user").aggregate([("rows", "sum")])
    return pa.table({"user": merged["user"], "rows": merged["rows_sum"]})


def _time_unit(args: own.Args, totals: _Totals) -> Any:
    """The unit of all times: a piece on its own might be read otherwise than the whole."""
    if totals.texts and totals.numbers:
        raise ValueError(
            f"column {args.time!r} holds numbers and texts; write all times in one form, unix seconds or ISO 8601"
        )
    if args.time_unit is not None or not totals.numbers:
        return args.time_unit
    ends = np.array([min(low for low, _ in totals.numbers), max(high for _, high in totals.numbers)])
    factor = guessed_unit(ends, args.time)
    return next(unit for unit, per_second in TIME_UNITS.items() if per_second == factor)


# ------------------------------------------------------------------------------------------------ 2. buckets
def _bounds(totals: _Totals, rows: int, key: bytes | None) -> NDArray[np.object_]:
    """First user of every bucket but the first; users count as they will be named in the log."""
    table = _summed(totals.counts)
    names = table["user"].to_pylist()
    if key is not None:
        names = [pseudonym(user, key) for user in names]
    order = np.argsort(np.array(names, dtype=object), kind="stable")
    before = np.concatenate([[0], np.cumsum(table["rows"].to_numpy()[order])[:-1]])
    bucket = before // rows
    first = np.flatnonzero(np.diff(bucket, prepend=bucket[:1]) > 0)
    return np.array([names[order[i]] for i in first], dtype=object)


def _dealt_out(
    source: Path,
    args: own.Args,
    rules: list[own.OutcomeRule],
    bounds: NDArray[np.object_],
    key: bytes | None,
    scratch: Path,
) -> list[list[CleaningStep]]:
    """Second reading: maps every piece and appends its rows to the buckets `scratch/<n>.parquet`."""
    with _parquet(source) as file:
        columns = [str(column) for column in file.schema_arrow.names]
    writers: dict[int, pq.ParquetWriter] = {}
    all_steps, done = [], 0
    for piece in _parquet_pieces(source, _needed(args, rules, columns), args.rows_in_memory):
        steps: list[CleaningStep] = []
        done += len(piece)
        whole = own.complete_rows(piece, args, steps, every_step=True)
        all_steps.append(steps)
        if len(whole) == 0:
            continue
        frame, shown = own.mapped_columns(whole, args, rules, must_happen=False)
        code, users = pd.factorize(frame["user_id"])
        names = [str(user) if key is None else pseudonym(str(user), key) for user in users]
        bucket = np.searchsorted(bounds, np.array(names, dtype=object), side="right")[code]
        order = np.argsort(bucket, kind="stable")
        table = pa.Table.from_pandas(frame.assign(**{SHOWN: shown}), preserve_index=False).take(order)
        ends = np.searchsorted(bucket[order], np.arange(len(bounds) + 2))
        for number in np.unique(bucket).tolist():
            part = table.slice(ends[number], ends[number + 1] - ends[number])
            if number not in writers:
                writers[number] = pq.ParquetWriter(scratch / f"{number}.parquet", part.schema)
            writers[number].write_table(part.cast(writers[number].schema))
        _progress("dealt out", done)
    for writer in writers.values():
        writer.close()
    return all_steps


# ------------------------------------------------------------------------------------------------ 3. and 4. the log
def _written(
    args: own.Args,
    recipe: dict[str, Any],
    rules: list[own.OutcomeRule],
    weights: list[float],
    bounds: NDArray[np.object_],
    steps: list[list[CleaningStep]],
    key: bytes | None,
    scratch: Path,
    name: str,
    out: Path,
) -> dict[str, Any]:
    outcomes = tuple(rule.name for rule in rules)
    cleaning = [s for s in _added(steps) if s.rows_after < s.rows_before or not s.rule.startswith(own.INCOMPLETE)]
    by_bucket: list[list[CleaningStep]] = []
    rows = happened = 0
    for number in range(len(bounds) + 1):
        bucket = pd.read_parquet(scratch / f"{number}.parquet")
        done: list[CleaningStep] = []
        frame = own.merged_events(bucket.drop(columns=SHOWN), bucket[SHOWN].to_numpy(), args, rules, done)
        if len(frame):
            frame, more = clean_rows(frame, outcomes)
            done += more
        by_bucket.append(done)
        rows, happened = rows + len(frame), happened + int((frame[outcomes[0]] > 0).sum())
        frame.to_parquet(scratch / f"{number}.parquet", index=False)
        _progress("cleaned", rows)
    cleaning += _added(by_bucket)
    check_gate(outcomes[0], rows, happened)
    repeats: list[list[CleaningStep]] = []
    kept, users, items = 0, 0, pa.array([], type=pa.large_string())
    sums, span, only, writer = dict.fromkeys(outcomes, 0.0), (np.inf, -np.inf), "", None
    final = scratch / "interactions.parquet"
    for number in range(len(bounds) + 1):
        frame = pd.read_parquet(scratch / f"{number}.parquet")
        if len(frame) == 0:
            continue
        if happened == rows:
            frame, step = merged_repeats(frame, outcomes)
            repeats.append([step])
        if key is not None:
            frame = pseudonymise(InteractionLog(name, frame, outcomes, tuple(weights)), key).frame
        table = pa.Table.from_pandas(frame, preserve_index=False)
        writer = pq.ParquetWriter(final, table.schema) if writer is None else writer
        writer.write_table(table.cast(writer.schema))
        kept, users = kept + len(frame), users + int(frame["user_id"].nunique())
        seen = pa.array(frame["item_id"].unique().astype(object), type=pa.large_string())
        items = pc.unique(pa.concat_arrays([items, seen]))
        span = (min(span[0], float(frame["timestamp"].min())), max(span[1], float(frame["timestamp"].max())))
        only = str(frame["user_id"].iloc[0])
        for outcome in outcomes:
            sums[outcome] += float(frame[outcome].astype("float64").sum())
        _progress("written", kept)
    if writer is not None:
        writer.close()
    check_size(name, kept, users, only)
    cleaning += _added(repeats)
    card = own.log_card(args, rules, recipe)
    if key is not None:
        cleaning.append(CleaningStep("replace user and session ids by keyed hashes", kept, kept, "pseudonyms"))
        card["pseudonymised"] = "HMAC-SHA256 pseudonyms of users and sessions: personal data still"
    card |= log_counts(kept, users, len(items), span, sums)
    table_of_items = checked_table(own.item_table(args) if args.items is not None else None, "item_id", "item")
    settings = {"outcomes": outcomes, "outcome_weights": tuple(weights)}
    content = content_hash_of_file(final, {"items": table_of_items, "users": None}, settings)
    description = log_description(name, content, outcomes, weights, card, cleaning)
    files: dict[str, Path | None] = {"interactions": final, "items": None, "users": None}
    if table_of_items is not None:
        files["items"] = scratch / "items.parquet"
        table_of_items.to_parquet(files["items"], index=False)
    install_tables(out, files, description)
    print(file=sys.stderr)
    return description


def _added(steps: list[list[CleaningStep]]) -> list[CleaningStep]:
    """The steps of all pieces, rule by rule in their order, rows summed."""
    found: dict[str, list[int]] = {}
    noted: set[str] = set()
    for one in steps:
        for step in one:
            sums = found.setdefault(step.rule, [0, 0, 0])
            sums[0] += step.rows_before
            sums[1] += step.rows_after
            if step.note:
                # the only notes of pieces are numbers of changed rows
                noted.add(step.rule)
                sums[2] += int(step.note.split()[0])
    return [
        CleaningStep(rule, before, after, f"{changed} rows changed" if rule in noted else "")
        for rule, (before, after, changed) in found.items()
    ]


def _progress(what: str, rows: int) -> None:
    print(f"\r{what} {rows:,} rows    ", end="", file=sys.stderr, flush=True)
