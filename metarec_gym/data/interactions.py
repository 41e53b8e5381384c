"""`InteractionLog`: what users did with items, validated once at the door so that nothing behind it checks again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from metarec_gym.data.storage import content_hash, read_tables, write_tables

KEY_COLUMNS = ("user_id", "item_id", "timestamp")
OPTIONAL_COLUMNS = ("session_id", "propensity", "position", "strategy")
LOG_KIND = "interaction log"
_KNOWN_LOGS = ("movielens_100k", "movielens_1m", "deskdrop")


@dataclass(frozen=True)
class CleaningStep:
    """One cleaning rule and what it did."""

    rule: str
    """What the rule does, in words."""
    rows_before: int
    """Rows that came in."""
    rows_after: int
    """Rows that went on."""
    note: str = ""
    """Rows changed rather than removed, and other remarks."""


@dataclass(frozen=True, eq=False)
class InteractionLog:
    """A validated, cleaned log. Make one with `from_frame` or `load`; the bare constructor checks nothing."""

    name: str
    """Short name, e.g. movielens_100k."""
    frame: pd.DataFrame
    """user_id, item_id, timestamp (unix s), outcomes in [0, 1], optional columns; sorted by (user, time)."""
    outcomes: tuple[str, ...]
    """Outcome columns; the first is the gate (the user takes the item at all), the others are conditional on it."""
    outcome_weights: tuple[float, ...]
    """Reward of each outcome."""
    items: pd.DataFrame | None = None
    """item_id, title, categories ('|'-joined), numeric columns such as release_time (unix seconds)."""
    users: pd.DataFrame | None = None
    """user_id and what is known of the users."""
    card: dict[str, Any] = field(default_factory=dict)
    """Source, licence, rows, users, items, and what each outcome means."""
    cleaning: tuple[CleaningStep, ...] = ()
    """What each cleaning rule did, in order."""

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        *,
        name: str,
        outcomes: Sequence[str],
        outcome_weights: Sequence[float] | None = None,
        items: pd.DataFrame | None = None,
        users: pd.DataFrame | None = None,
        card: Mapping[str, Any] | None = None,
        merge_repeats: bool = True,
        cleaning: Sequence[CleaningStep] = (),
    ) -> InteractionLog:
        """Validates and cleans a table of events; the table given is not changed.

        Args:
            frame: One row per event with user_id, item_id, timestamp (unix seconds or datetimes; naive ones are UTC), a
                column per outcome in [0, 1], and optionally session_id, propensity, position, strategy.
            name: Short name of the log.
            outcomes: Outcome columns, the gate first.
            outcome_weights: Reward of each outcome; 1 for each if None.
            items: Item table with item_id; title, categories and numeric columns are optional.
            users: User table with user_id.
            card: Source, licence, and what each outcome means; the counts are added here.
            merge_repeats: Merge a user's repeated events with one item into the first, if the log holds positives only.
            cleaning: Steps that were applied before, put in front of the ones applied here.

        Returns:
            The log.

        Raises:
            ValueError: The table cannot be used; the sentence says why and what to do.
        """
        outcomes = _checked_outcomes(outcomes)
        weights = _checked_weights(outcomes, outcome_weights)
        clean, steps = clean_rows(frame, outcomes)
        steps = [*cleaning, *steps]
        gate = clean[outcomes[0]].to_numpy()
        check_gate(outcomes[0], len(clean), int((gate > 0).sum()))
        if merge_repeats and bool((gate > 0).all()):
            clean, step = merged_repeats(clean, outcomes)
            steps.append(step)
        users_left = clean["user_id"].unique()
        check_size(name, len(clean), len(users_left), str(users_left[0]) if len(users_left) else "")
        log = cls(
            name=name,
            frame=clean,
            outcomes=outcomes,
            outcome_weights=weights,
            items=checked_table(items, "item_id", "item"),
            users=checked_table(users, "user_id", "user"),
            card=dict(card or {}),
            cleaning=tuple(steps),
        )
        log.card.update(log.counts())
        return log

    @property
    def has_impressions(self) -> bool:
        """Whether rows in which nothing happened are there too: real negatives, the gate has zeros as well as ones."""
        gate = self.frame[self.outcomes[0]].to_numpy()
        return bool((gate == 0).any() and (gate > 0).any())

    @cached_property
    def hash(self) -> str:
        """Content hash, 16 hexadecimal digits: the tables, the outcomes and their weights; neither name nor card."""
        return content_hash(
            {"interactions": self.frame, "items": self.items, "users": self.users},
            {"outcomes": self.outcomes, "outcome_weights": self.outcome_weights},
        )

    def counts(self) -> dict[str, Any]:
        """Rows, users, items and first and last day, as the card states them."""
        frame = self.frame
        return log_counts(
            len(frame),
            int(frame["user_id"].nunique()),
            int(frame["item_id"].nunique()),
            (float(frame["timestamp"].min()), float(frame["timestamp"].max())),
            {o: float(frame[o].astype("float64").sum()) for o in self.outcomes},
        )

    def report(self) -> str:
        """What cleaning did and what is left, one line each."""
        lines = [
            f"  {step.rule}: {step.rows_before:,} -> {step.rows_after:,} rows" + (f", {step.note}" if step.note else "")
            for step in self.cleaning
        ]
        counts = self.counts()
        rates = ", ".join(f"{name} {rate:.2%}" for name, rate in counts["outcome_rates"].items())
        kind = "with impressions" if self.has_impressions else "positives only"
        lines.append(
            f"  {counts['rows']:,} rows, {counts['users']:,} users, {counts['items']:,} items, "
            f"{counts['first_day']} to {counts['last_day']}, {kind}; {rates}"
        )
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Writes interactions.parquet, items.parquet, users.parquet and, last, log.json; leaves other files alone."""
        tables = {"interactions": self.frame, "items": self.items, "users": self.users}
        description = log_description(
            self.name, self.hash, self.outcomes, self.outcome_weights, self.card, self.cleaning
        )
        write_tables(Path(folder), tables, description)

    @classmethod
    def load(cls, folder: Path) -> InteractionLog:
        """Reads a saved log and checks that it is what was saved.

        Raises:
            FileNotFoundError: No log there; the sentence names the command that prepares it.
            ValueError: The log is damaged or of another schema.
        """
        folder = Path(folder)
        command = prepare_command(folder)
        tables, description = read_tables(
            folder, ("interactions", "items", "users"), kind=LOG_KIND, prepare_command=command
        )
        frame = tables["interactions"]
        damaged = f"the prepared log in {folder} is damaged"
        if frame is None:
            raise ValueError(f"{damaged}: log.json lists no interactions.parquet; prepare it again: {command}")
        try:
            log = cls(
                name=str(description["name"]),
                frame=frame,
                outcomes=tuple(description["outcomes"]),
                outcome_weights=tuple(float(weight) for weight in description["outcome_weights"]),
                items=tables["items"],
                users=tables["users"],
                card=dict(description["card"]),
                cleaning=tuple(CleaningStep(**step) for step in description["cleaning"]),
            )
            intact = log.hash == description["hash"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{damaged}: log.json lacks or garbles {error}; prepare it again: {command}") from error
        if not intact:
            raise ValueError(
                f"{damaged}: its content has hash {log.hash} and log.json says {description['hash']}; "
                f"prepare it again: {command}"
            )
        return log


def log_description(
    name: str,
    content: str,
    outcomes: Sequence[str],
    weights: Sequence[float],
    card: Mapping[str, Any],
    cleaning: Sequence[CleaningStep],
) -> dict[str, Any]:
    """What `log.json` says of a log whose content has the hash `content`."""
    return {
        "kind": LOG_KIND,
        "name": name,
        "hash": content,
        "outcomes": list(outcomes),
        "outcome_weights": list(weights),
        "card": dict(card),
        "cleaning": [asdict(step) for step in cleaning],
    }


def log_counts(
    rows: int, users: int, items: int, span_s: tuple[float, float], sums: Mapping[str, float]
) -> dict[str, Any]:
    """Counts of a log as its card states them.

    Args:
        rows: Rows.
        users: Different users.
        items: Different items.
        span_s: First and last time, unix seconds.
        sums: Sum of each outcome.
    """
    days = ["" if pd.isna(day) else day.date().isoformat() for day in pd.to_datetime(span_s, unit="s", errors="coerce")]
    return {
        "rows": rows,
        "users": users,
        "items": items,
        "first_day": days[0],
        "last_day": days[1],
        "outcome_rates": {o: round(total / max(rows, 1), 6) for o, total in sums.items()},
    }


def clean_rows(frame: pd.DataFrame, outcomes: tuple[str, ...]) -> tuple[pd.DataFrame, list[CleaningStep]]:
    """Checked and typed rows of whole users, sorted, without repeats, and what was done; see `InteractionLog.from_frame`."""
    clean, steps = _typed_columns(frame, outcomes), []
    before = len(clean)
    clean = clean.drop_duplicates(ignore_index=True)
    steps.append(CleaningStep("drop rows that repeat another row in every column", before, len(clean)))
    gate = clean[outcomes[0]].to_numpy()
    if len(outcomes) > 1:
        ungated = (gate == 0) & (clean[list(outcomes[1:])].to_numpy() > 0).any(axis=1)
        clean[outcomes[0]] = np.where(ungated, np.float32(1.0), gate)
        rule = f"an outcome without its gate sets the gate ({outcomes[0]} = 1)"
        steps.append(CleaningStep(rule, len(clean), len(clean), f"{int(ungated.sum())} rows changed"))
    return sorted_rows(clean), steps


def check_gate(gate: str, rows: int, happened: int) -> None:
    """Refuses a log whose gate outcome never happens."""
    if rows and not happened:
        raise ValueError(
            f"the gate outcome {gate!r} never happens in {rows} rows; "
            "put the outcome that says the user took the item first, or check its mapping"
        )


def check_size(name: str, rows: int, users: int, only: str = "") -> None:
    """Refuses a log without rows, or of one user, `only`."""
    if rows == 0:
        raise ValueError(f"log {name!r} has no rows after cleaning; check the input file and the column mapping")
    if users < 2:
        raise ValueError(
            f"log {name!r} has one user only ({only!r}); at least two are needed, check which column holds the user id"
        )


def prepare_command(folder: Path) -> str:
    """The command that prepares the log in `folder`, as far as its name tells."""
    if folder.name in _KNOWN_LOGS:
        return f"python -m envs_data.{folder.name}.prepare"
    columns = "--user COL --item COL --time COL --outcome NAME=MAPPING"
    return f"python -m envs_data.own_log.prepare --path FILE {columns} --out {folder}"


def id_strings(column: pd.Series[Any], what: str) -> pd.Series[Any]:
    """Ids as strings, whole-numbered floats without their '.0'; refuses missing and empty ids.

    Args:
        column: Ids of any type.
        what: Column name used in the error sentence.
    """
    texts: pd.Series[Any]
    if pd.api.types.is_float_dtype(column.dtype):
        numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
        # a missing id turns a whole column of integers into floats: 7.0 is still user 7
        whole = bool(np.all(np.isnan(numbers) | ((numbers == np.floor(numbers)) & (np.abs(numbers) < 2**53))))
        texts = pd.Series([f"{n:.0f}" if whole else repr(float(n)) for n in numbers], index=column.index, dtype=object)
    else:
        texts = column.astype(str)
    missing = column.isna().to_numpy() | (texts.str.strip() == "").to_numpy()
    if missing.any():
        raise ValueError(
            f"{int(missing.sum())} of {len(column)} rows have no {what} (first: row {int(np.argmax(missing))}); "
            "remove these rows or fill the ids in"
        )
    return texts.astype(str)


TIME_UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
# unix seconds from March 1973 to May 2255: the ranges of the four units do not meet
_SECONDS_LOW, _SECONDS_HIGH = 1e8, 9e9


def parse_times(column: pd.Series[Any], *, unit: str | None = None, what: str = "timestamp") -> NDArray[np.float64]:
    """Unix seconds from numbers (seconds, milliseconds, microseconds, nanoseconds), datetimes or ISO 8601 texts.

    Args:
        column: The times; texts and datetimes without a time zone are UTC.
        unit: s, ms, us or ns for numbers; None finds it out and refuses what is ambiguous.
        what: Column name used in the error sentences.

    Returns:
        float64 (n_rows,), all finite.

    Raises:
        ValueError: A time is missing, cannot be read, or its unit is ambiguous.
    """
    if unit is not None and unit not in TIME_UNITS:
        raise ValueError(f"time unit {unit!r} is not known; expected one of {', '.join(TIME_UNITS)}")
    if column.isna().any():
        first = int(np.argmax(column.isna().to_numpy()))
        raise ValueError(
            f"{int(column.isna().sum())} of {len(column)} rows have no {what} (first: row {first}); remove these rows"
        )
    if len(column) == 0:
        return np.zeros(0, dtype=np.float64)
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        return _datetime_seconds(column)
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    if not np.isnan(numbers).all():
        unreadable = ~np.isfinite(numbers)
        if unreadable.any():
            raise ValueError(_unreadable_times(column, unreadable, what, "a number like the other rows"))
        return numbers / (TIME_UNITS[unit] if unit else guessed_unit(numbers, what))
    times = pd.to_datetime(column.astype(str), format="ISO8601", utc=True, errors="coerce")
    unreadable = times.isna().to_numpy()
    if unreadable.any():
        raise ValueError(
            _unreadable_times(column, unreadable, what, "ISO 8601 such as 2024-03-01T12:30:00Z, or unix seconds")
        )
    return _datetime_seconds(times)


def _datetime_seconds(column: pd.Series[Any]) -> NDArray[np.float64]:
    aware = column.dt.tz_localize("UTC") if column.dt.tz is None else column.dt.tz_convert("UTC")
    return np.asarray((aware - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1), dtype=np.float64)


def _unreadable_times(column: pd.Series[Any], unreadable: NDArray[np.bool_], what: str, expected: str) -> str:
    first = int(np.argmax(unreadable))
    return (
        f"{int(unreadable.sum())} of {len(column)} values of {what} cannot be read as a time "
        f"(first: {str(column.iloc[first])!r} in row {first}); expected {expected}"
    )


def guessed_unit(numbers: NDArray[np.float64], what: str) -> float:
    """What numeric times are to be divided by to be unix seconds; refuses ranges that fit no unit or two."""
    low, high = float(numbers.min()), float(numbers.max())
    for per_second in TIME_UNITS.values():
        if _SECONDS_LOW * per_second <= low and high <= _SECONDS_HIGH * per_second:
            return per_second
    raise ValueError(
        f"{what} runs from {low:.15g} to {high:.15g}: neither unix seconds, milliseconds, microseconds nor nanoseconds "
        "in every row; convert it to one of them, or name the unit (--time-unit s)"
    )


def _checked_outcomes(outcomes: Sequence[str]) -> tuple[str, ...]:
    if isinstance(outcomes, str):
        outcomes = (outcomes,)
    names = tuple(outcomes)
    if not names:
        raise ValueError(
            "no outcome is given; name at least one, the first says that the user took the item, e.g. click"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"outcomes {names} name one outcome twice; give each a name of its own")
    for name in names:
        if name in (*KEY_COLUMNS, *OPTIONAL_COLUMNS) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise ValueError(
                f"outcome name {name!r} cannot be used; expected letters, digits and _, "
                f"and none of {', '.join((*KEY_COLUMNS, *OPTIONAL_COLUMNS))}"
            )
    return names


def _checked_weights(outcomes: tuple[str, ...], weights: Sequence[float] | None) -> tuple[float, ...]:
    values = tuple(float(weight) for weight in weights) if weights is not None else (1.0,) * len(outcomes)
    if len(values) != len(outcomes) or not np.isfinite(values).all():
        raise ValueError(
            f"outcome weights are {values} for outcomes {outcomes}; expected one finite number per outcome"
        )
    return values


def _typed_columns(frame: pd.DataFrame, outcomes: tuple[str, ...]) -> pd.DataFrame:
    """The columns of a log with their types, rows in the order given; refuses what cannot be one."""
    missing = [column for column in (*KEY_COLUMNS, *outcomes) if column not in frame.columns]
    if missing:
        raise ValueError(
            f"the log lacks the column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, frame.columns))}; "
            "rename the columns or map them with envs_data.own_log.prepare"
        )
    if len(frame) == 0:
        raise ValueError("the log has no rows; check the input file")
    columns: dict[str, Any] = {
        "user_id": id_strings(frame["user_id"], "user_id").to_numpy(),
        "item_id": id_strings(frame["item_id"], "item_id").to_numpy(),
        # a table made by hand may count from 0, so numbers are seconds; own_log.prepare finds the unit of foreign files
        "timestamp": parse_times(frame["timestamp"], unit="s"),
    }
    for name in outcomes:
        values = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        wrong = ~((values >= 0.0) & (values <= 1.0))
        if wrong.any():
            first = int(np.argmax(wrong))
            raise ValueError(
                f"{int(wrong.sum())} of {len(values)} values of outcome {name!r} are not in [0, 1] "
                f"(first: {str(frame[name].iloc[first])!r} in row {first}); "
                f"scale it, or map it with a threshold such as {name}={name}>=4"
            )
        columns[name] = values.astype(np.float32)
    if "session_id" in frame.columns:
        columns["session_id"] = id_strings(frame["session_id"], "session_id").to_numpy()
    if "propensity" in frame.columns:
        values = pd.to_numeric(frame["propensity"], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        wrong = ~((values > 0.0) & (values <= 1.0))
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum())} of {len(values)} propensities are not in (0, 1] "
                f"(first: row {int(np.argmax(wrong))}); "
                "a shown item had a chance of being shown: correct them or leave the column out"
            )
        columns["propensity"] = values
    if "position" in frame.columns:
        values = pd.to_numeric(frame["position"], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        wrong = ~((values >= 0) & (values == np.floor(values)))
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum())} of {len(values)} positions are not whole numbers >= 0 "
                f"(first: row {int(np.argmax(wrong))}); correct them or leave the column out"
            )
        columns["position"] = values.astype(np.int64)
    if "strategy" in frame.columns:
        columns["strategy"] = id_strings(frame["strategy"], "strategy").to_numpy()
    return pd.DataFrame(columns)


def sorted_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by (user_id, timestamp), ties in the order given."""
    user_code, _ = pd.factorize(frame["user_id"], sort=True)
    # lexsort is stable: ties keep their order
    order = np.lexsort((frame["timestamp"].to_numpy(), user_code))
    return frame.iloc[order].reset_index(drop=True)


def merged_repeats(frame: pd.DataFrame, outcomes: tuple[str, ...]) -> tuple[pd.DataFrame, CleaningStep]:
    """First row of each (user, item) of sorted rows, with the largest value of each outcome; and the step that this was."""
    groups = frame.groupby(["user_id", "item_id"], sort=False)
    largest = groups[list(outcomes)].transform("max")
    first = (groups.cumcount() == 0).to_numpy()
    merged = frame.loc[first].reset_index(drop=True)
    for name in outcomes:
        merged[name] = largest.loc[first, name].to_numpy(dtype=np.float32)
    rule = "merge a user's repeated events with one item into the first (outcomes: the largest)"
    return merged, CleaningStep(rule, len(frame), len(merged))


def checked_table(table: pd.DataFrame | None, id_column: str, what: str) -> pd.DataFrame | None:
    """An item or user table with string ids, sorted by them."""
    if table is None:
        return None
    if id_column not in table.columns:
        raise ValueError(
            f"the {what} table lacks the column {id_column!r}; it has {', '.join(map(repr, table.columns))}; rename one"
        )
    table = table.copy()
    table[id_column] = id_strings(table[id_column], id_column).to_numpy()
    twice = table[id_column].duplicated().to_numpy()
    if twice.any():
        raise ValueError(
            f"{int(twice.sum())} rows of the {what} table repeat an id "
            f"(first: {table[id_column].iloc[int(np.argmax(twice))]!r}); keep one row per {what}"
        )
    for column in ("title", "categories"):
        if id_column == "item_id" and column in table.columns:
            table[column] = table[column].fillna("").astype(str)
    return table.sort_values(id_column, kind="stable", ignore_index=True)
