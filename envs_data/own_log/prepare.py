"""Your own log: a CSV or Parquet and a mapping -> a prepared log. Run: python -m envs_data.own_log.prepare --help."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from envs_data.download import prepared

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from metarec_gym.data import CleaningStep, InteractionLog

FOLDER = Path(__file__).resolve().parent
RECIPE_VERSION = 1
STREAM_BYTES = 256 << 20
"""Files above this size are read in pieces."""
INCOMPLETE = "drop rows without"
"""Begins the cleaning steps of incomplete rows."""
NOT_IN_RECIPE = ("path", "items", "out", "force", "stream", "rows_in_memory")
"""Settings that do not change what the log says."""
_COMPARISON = re.compile(r"^(?P<column>.+?)(?P<operator>>=|<=|>|<)(?P<value>[^<>=]+)$")
_EVENT_WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}


@dataclass(frozen=True)
class Args:
    """Turns a CSV or Parquet of events into a prepared log; envs_data/own_log/card.md says what the mappings mean."""

    path: Path
    """The events: a CSV (also .gz) or a Parquet, one row per event."""
    user: str
    """Column of the user id."""
    item: str
    """Column of the item id."""
    time: str
    """Column of the time: unix s, ms, us, ns or ISO 8601."""
    outcome: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=COLUMN:VALUE, NAME=COLUMN>=4, NAME=COLUMN or NAME=*; repeatable, the first is the gate (e.g. the click)."""
    weight: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Reward of an outcome as NAME=NUMBER, repeatable; an outcome not named weighs 1."""
    shown: str | None = None
    """COLUMN:VALUE of the events that say an item was shown and nothing more: real negatives."""
    name: str | None = None
    """Name of the log; the file's name if not given."""
    out: Path | None = None
    """Where the prepared log goes; envs_data/own_log/prepared/NAME if not given."""
    session: str | None = None
    """Column of the session id; without it sessions are cut at pauses."""
    session_gap_min: float = 30.0
    """Pause in minutes that ends a session, where there is no session column."""
    strategy: str | None = None
    """Column of the strategy that served the item."""
    propensity: str | None = None
    """Column of the probability with which it was served, in (0, 1]."""
    position: str | None = None
    """Column of the position in the slate, a whole number."""
    time_unit: Literal["s", "ms", "us", "ns"] | None = None
    """Unit of numeric times; found out if not given."""
    separator: str = ","
    """What separates the fields of a CSV; a longer one such as '::' works too."""
    columns: str | None = None
    """Column names, separated by commas, of a CSV without a header line."""
    encoding: str = "utf-8"
    """Encoding of the CSV files."""
    drop_incomplete: bool = False
    """Drop (and count) rows without user, item or time instead of refusing them."""
    items: Path | None = None
    """Item table: a CSV or Parquet with one row per item."""
    items_columns: str | None = None
    """Column names, separated by commas, of an item CSV without a header line."""
    items_id: str | None = None
    """Item id column of the item table; the same as --item if not given."""
    item_title: str | None = None
    """Title column of the item table."""
    item_categories: str | None = None
    """Categories column of the item table."""
    item_release: str | None = None
    """Release column of the item table: years or times."""
    category_separator: str = "|"
    """What separates the categories of an item."""
    pseudonym_key: Path | None = None
    """Key file, outside the data, for pseudonyms of users and sessions; made if it is not there."""
    stream: bool | None = None
    """Read in pieces, in bounded memory; if not given, files of more than 256 MB are."""
    rows_in_memory: int = 500_000
    """Rows that a piece holds, when the file is read in pieces."""
    force: bool = False
    """Prepare again even if the prepared log is intact."""


@dataclass(frozen=True)
class OutcomeRule:
    """One `--outcome`, understood."""

    name: str
    """Name of the outcome."""
    kind: Literal["every", "event", "threshold", "number"]
    """Every row, a column equal to a value, a column compared with a number, or a column that is the outcome."""
    column: str = ""
    """The column, except for every row."""
    operator: str = ""
    """>=, <=, > or < of a threshold."""
    value: str = ""
    """Value or threshold."""

    @property
    def meaning(self) -> str:
        """The rule in words, for the card."""
        words = {
            "every": "every row",
            "event": f"{self.column} is {self.value}",
            "threshold": f"{self.column} {self.operator} {self.value}",
            "number": f"the value of {self.column}",
        }
        return words[self.kind]


def main(args: Args) -> None:
    """Prepares the log unless it is there."""
    name, out = target(args)
    recipe = recipe_of(args)
    done = None if args.force else prepared(out, recipe)
    if done is not None:
        card = done["card"]
        counts = f"{card['rows']:,} rows, {card['users']:,} users, {card['items']:,} items"
        print(f"{name} is prepared in {out}: {counts}, hash {done['hash']}")
        return
    if args.stream if args.stream is not None else args.path.stat().st_size > STREAM_BYTES:
        from envs_data.own_log.streaming import prepare_in_pieces

        said = prepare_in_pieces(args, recipe)
        rates = ", ".join(f"{o} {rate:.2%}" for o, rate in said["card"]["outcome_rates"].items())
        print(f"{name} -> {out}, hash {said['hash']}")
        for step in said["cleaning"]:
            print(f"  {step['rule']}: {step['rows_before']:,} -> {step['rows_after']:,} rows {step['note']}".rstrip())
        print(
            f"  {said['card']['rows']:,} rows, {said['card']['users']:,} users, {said['card']['items']:,} items; {rates}"
        )
        return
    log = prepare(args, recipe)
    log.save(out)
    weights = ", ".join(f"{o} {w:g}" for o, w in zip(log.outcomes, log.outcome_weights, strict=True))
    print(f"{name} -> {out}, hash {log.hash}\n{log.report()}\n  weights: {weights}")


def target(args: Args) -> tuple[str, Path]:
    """Name of the log and the folder it goes to."""
    name = args.name or args.path.name.split(".")[0]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"log name {name!r} cannot be used; expected letters, digits, _ and -, give one with --name")
    return name, args.out if args.out is not None else FOLDER / "prepared" / name


def recipe_of(args: Args) -> dict[str, Any]:
    """What the log is made from, files' contents and mapping; stored in the card to see when nothing changed."""
    import hashlib

    files: dict[str, str] = {}
    for option, path in (("--path", args.path), ("--items", args.items)):
        if path is None:
            continue
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; give the file with {option}")
        with path.open("rb") as file:
            files[option] = hashlib.file_digest(file, "sha256").hexdigest()
    mapping = {key: value for key, value in asdict(args).items() if key not in NOT_IN_RECIPE}
    mapping["pseudonym_key"] = args.pseudonym_key is not None
    return {"version": RECIPE_VERSION, "sha256": files, "mapping": {**mapping, "outcome": list(args.outcome)}}


def parse_outcome(text: str, columns: list[str]) -> OutcomeRule:
    """Understands one `--outcome` text, given the columns that exist."""
    name, equals, mapping = text.partition("=")
    name, mapping = name.strip(), mapping.strip()
    if not equals or not name or not mapping:
        raise ValueError(
            f"outcome {text!r} is not NAME=MAPPING; write e.g. click=event:click, like=rating>=4 or watch=*"
        )
    if mapping == "*":
        return OutcomeRule(name, "every")
    if mapping in columns:
        return OutcomeRule(name, "number", mapping)
    compared = _COMPARISON.match(mapping)
    if compared and compared["column"].strip() in columns:
        value = compared["value"].strip()
        try:
            float(value)
        except ValueError:
            raise ValueError(
                f"outcome {text!r} compares with {value!r}; expected a number, e.g. like=rating>=4"
            ) from None
        return OutcomeRule(name, "threshold", compared["column"].strip(), compared["operator"], value)
    column, colon, value = _event_parts(mapping, columns)
    if colon:
        return OutcomeRule(name, "event", column, "", value)
    raise ValueError(
        f"outcome {text!r} names a column that the file does not have; it has {', '.join(map(repr, columns))}"
    )


def _event_parts(mapping: str, columns: list[str]) -> tuple[str, str, str]:
    """Splits COLUMN:VALUE at the first colon whose left side is a column, so that both may hold colons."""
    for colon in re.finditer(":", mapping):
        column, value = mapping[: colon.start()].strip(), mapping[colon.end() :].strip()
        if column in columns and value:
            return column, ":", value
    return mapping, "", ""


def prepare(args: Args, recipe: dict[str, Any] | None = None, *, items: pd.DataFrame | None = None) -> InteractionLog:
    """Reads, maps, aggregates and validates the log.

    Args:
        args: The files and the mapping.
        recipe: Goes into the card.
        items: Item table, in place of reading that of `args`.

    Raises:
        ValueError: The file or the mapping cannot be used; the sentence says why and what to do.
    """
    from metarec_gym.data import InteractionLog

    name, out = target(args)
    events = read_table(args.path, args.separator, args.columns, args.encoding)
    columns = [str(column) for column in events.columns]
    check_columns(args, columns)
    rules, weights = outcome_rules(args, columns)
    steps: list[CleaningStep] = []
    events = complete_rows(events, args, steps)
    if len(events) == 0:
        raise ValueError(f"{args.path.name} has no rows left; check the file and the columns named")
    frame, shown = mapped_columns(events, args, rules)
    frame = merged_events(frame, shown, args, rules, steps)
    card = log_card(args, rules, recipe)
    log = InteractionLog.from_frame(
        frame,
        name=name,
        outcomes=[rule.name for rule in rules],
        outcome_weights=weights,
        items=item_table(args) if items is None and args.items is not None else items,
        card=card,
        cleaning=steps,
    )
    return log if args.pseudonym_key is None else _pseudonymised(log, args.pseudonym_key, out)


def outcome_rules(args: Args, columns: list[str]) -> tuple[list[OutcomeRule], list[float]]:
    """The outcomes and their weights, given the columns that exist."""
    if not args.outcome:
        raise ValueError(
            "no outcome is given; say what users did, e.g. --outcome click=event:click, or --outcome watch=*"
        )
    rules = [parse_outcome(text, columns) for text in args.outcome]
    return rules, _weights(args.weight, [rule.name for rule in rules])


def log_card(args: Args, rules: list[OutcomeRule], recipe: dict[str, Any] | None) -> dict[str, Any]:
    """Source, licence, and what outcomes and sessions mean; the recipe if there is one."""
    card: dict[str, Any] = {
        "source": args.path.name,
        "licence": "the owner's; not to be handed on without their word",
        "outcomes": {rule.name: rule.meaning for rule in rules},
        "sessions": f"column {args.session}"
        if args.session
        else f"pauses of more than {args.session_gap_min:g} minutes",
    }
    return card if recipe is None else card | {"recipe": recipe}


def read_table(path: Path, separator: str, columns: str | None, encoding: str) -> pd.DataFrame:
    """A CSV with every field as text (ids keep their leading zeros), empty fields missing; or a Parquet as it is."""
    import pandas as pd

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; check the path")
    if path.suffix.lower() in (".parquet", ".pq"):
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as Parquet ({error}); check the file") from error
    try:
        table: pd.DataFrame = pd.read_csv(path, **csv_options(separator, columns, encoding))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {encoding} text ({error}); name its encoding with --encoding") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as a CSV separated by {separator!r} ({error}); check --separator"
        ) from error
    return table.rename(columns=lambda column: str(column).strip())


def csv_options(separator: str, columns: str | None, encoding: str) -> dict[str, Any]:
    """How pandas is to read a CSV: every field as text, empty fields missing."""
    names = [name.strip() for name in columns.split(",")] if columns else None
    return {
        "sep": re.escape(separator) if len(separator) > 1 else separator,
        "engine": "python" if len(separator) > 1 else "c",
        "names": names,
        "header": None if names else 0,
        # pandas would else take a first column beyond the names for an index, and shift every other one
        "index_col": False,
        "dtype": str,
        "keep_default_na": False,
        "na_values": [""],
        "encoding": encoding,
    }


def check_columns(args: Args, columns: list[str]) -> None:
    """Refuses a mapping to a column that is not there."""
    options = ("user", "item", "time", "session", "strategy", "propensity", "position")
    missing = [
        f"--{option} {getattr(args, option)}" for option in options if getattr(args, option) not in (None, *columns)
    ]
    if missing:
        hint = "; if that is one column only, name the --separator" if len(columns) == 1 else ""
        raise ValueError(
            f"{args.path.name} has no column for {', '.join(missing)}; it has {', '.join(map(repr, columns))}{hint}"
        )


def _weights(texts: tuple[str, ...], outcomes: list[str]) -> list[float]:
    """The weight of each outcome, 1 unless given."""
    given: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            given[name.strip()] = float(number)
        except ValueError:
            raise ValueError(f"weight {text!r} is not NAME=NUMBER; write e.g. --weight purchase=5") from None
    unknown = [name for name in given if name not in outcomes]
    if unknown:
        raise ValueError(
            f"weight of {unknown[0]!r} is given and the outcomes are {', '.join(outcomes)}; correct the name"
        )
    return [given.get(name, 1.0) for name in outcomes]


def complete_rows(
    events: pd.DataFrame, args: Args, steps: list[CleaningStep], *, first_row: int = 0, every_step: bool = False
) -> pd.DataFrame:
    """Rows that have user, item and time; refuses others unless told to drop them.

    Args:
        events: The file's rows, or a piece of them.
        args: The mapping.
        steps: Gets what was dropped.
        first_row: Place of the piece in its file.
        every_step: Also notes that nothing was dropped, so that the steps of pieces add up.
    """
    from metarec_gym.data import CleaningStep

    for option in ("user", "item", "time"):
        column = events[getattr(args, option)]
        missing = column.isna() | (column.astype(str).str.strip() == "")
        count = int(missing.sum())
        if count and not args.drop_incomplete:
            raise ValueError(
                f"{count} of {len(events)} rows have no {option} (column {getattr(args, option)!r}, first: row "
                f"{first_row + int(missing.to_numpy().argmax())}); fill them in, or drop these rows with --drop-incomplete"
            )
        before = len(events)
        if count:
            events = events.loc[~missing.to_numpy()].reset_index(drop=True)
        if count or every_step:
            steps.append(CleaningStep(f"{INCOMPLETE} {option}", before, len(events)))
    return events


def mapped_columns(
    events: pd.DataFrame, args: Args, rules: list[OutcomeRule], *, must_happen: bool = True
) -> tuple[pd.DataFrame, NDArray[np.bool_]]:
    """Columns of a log, one row an event, and whether it says that the item was shown; bool (n_rows,).

    Args:
        events: Complete rows.
        args: The mapping.
        rules: The outcomes.
        must_happen: Refuse an event that no row has; False for a piece of a log.
    """
    import numpy as np
    import pandas as pd

    from metarec_gym.data import id_strings, parse_times

    frame = pd.DataFrame(
        {
            "user_id": id_strings(events[args.user], args.user).to_numpy(),
            "item_id": id_strings(events[args.item], args.item).to_numpy(),
            "timestamp": parse_times(events[args.time], unit=args.time_unit, what=args.time),
        }
    )
    for rule in rules:
        frame[rule.name] = _outcome_values(events, rule, must_happen)
    for option in ("propensity", "position", "strategy"):
        if getattr(args, option) is not None:
            frame[option] = events[getattr(args, option)].to_numpy()
    if args.session is not None:
        frame["session_id"] = id_strings(events[args.session], args.session).to_numpy()
    shown = np.zeros(len(frame), dtype=bool)
    if args.shown is not None:
        shown = _outcome_values(events, shown_rule(args, [str(name) for name in events.columns]), must_happen) > 0
    return frame, shown


def merged_events(
    frame: pd.DataFrame,
    shown: NDArray[np.bool_],
    args: Args,
    rules: list[OutcomeRule],
    steps: list[CleaningStep],
) -> pd.DataFrame:
    """All events of some users -> events of no outcome dropped, one row per user, item and session."""
    import numpy as np
    import pandas as pd

    from metarec_gym.data import CleaningStep, sessions_by_gap

    order = np.lexsort((frame["timestamp"].to_numpy(), pd.factorize(frame["user_id"], sort=True)[0]))
    frame, shown = frame.iloc[order].reset_index(drop=True), shown[order]
    if args.session is None:
        # every event counts as activity, also those dropped below
        user_code = pd.factorize(frame["user_id"])[0].astype(np.int64)
        gap_s = args.session_gap_min * 60.0
        frame["session_id"] = sessions_by_gap(user_code, frame["timestamp"].to_numpy(), gap_s).astype(str)

    names = [rule.name for rule in rules]
    if all(rule.kind == "event" for rule in rules):
        # an event that no outcome names is no negative: only --shown says that the item was shown
        kept = (frame[names].to_numpy() > 0).any(axis=1) | shown
        steps.append(CleaningStep("drop events that no outcome names", len(frame), int(kept.sum())))
        frame = frame.loc[kept].reset_index(drop=True)
    before = len(frame)
    groups = frame.groupby(["user_id", "item_id", "session_id"], sort=False)
    largest = groups[names].transform("max")
    first = (groups.cumcount() == 0).to_numpy()
    frame[names] = largest
    frame = frame.loc[first].reset_index(drop=True)
    rule_text = "merge a user's events with one item in one session into the first (outcomes: the largest)"
    steps.append(CleaningStep(rule_text, before, len(frame)))
    return frame


def shown_rule(args: Args, columns: list[str]) -> OutcomeRule:
    """`--shown`, understood."""
    column, colon, value = _event_parts(args.shown or "", columns)
    if not colon:
        raise ValueError(
            f"--shown {args.shown!r} is not COLUMN:VALUE of a column of the file; write e.g. --shown event:view"
        )
    return OutcomeRule("shown", "event", column, "", value)


def _outcome_values(events: pd.DataFrame, rule: OutcomeRule, must_happen: bool = True) -> NDArray[np.float64]:
    """The outcome of each row: (n_rows,) in [0, 1]; an empty field means that it did not happen."""
    import numpy as np
    import pandas as pd

    if rule.kind == "every":
        return np.ones(len(events))
    column = events[rule.column]
    if rule.kind == "event":
        texts = column.astype(str).str.strip()
        happened = ((texts == rule.value) & column.notna()).to_numpy(dtype=bool)
        if must_happen and not happened.any():
            seen = texts[column.notna()].value_counts()
            values = ", ".join(f"{value!r} ({count:,})" for value, count in seen.head(8).items())
            raise ValueError(
                f"no row has {rule.value!r} in column {rule.column!r}; it holds {values}"
                f"{' and others' if len(seen) > 8 else ''}; correct the mapping of {rule.name!r}"
            )
        return happened.astype(np.float64)
    if pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_bool_dtype(column.dtype):
        numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        words = column.astype(str).str.strip()
        if rule.kind == "number":
            words = words.str.lower().replace({word: str(value) for word, value in _EVENT_WORDS.items()})
        numbers = pd.to_numeric(words.where(column.notna(), None), errors="coerce").to_numpy(
            np.float64, na_value=np.nan
        )
    unreadable = np.isnan(numbers) & column.notna().to_numpy(dtype=bool)
    if unreadable.any():
        first = int(np.argmax(unreadable))
        found = str(column.iloc[first])
        raise ValueError(
            f"{int(unreadable.sum())} of {len(events)} values of column {rule.column!r} are not numbers "
            f"(first: {found!r} in row {first}); map an event as {rule.name}={rule.column}:{found}"
        )
    if rule.kind == "threshold":
        threshold = float(rule.value)
        # a comparison with NaN is False: a row without the number did not pass
        passed = {
            ">=": numbers >= threshold,
            "<=": numbers <= threshold,
            ">": numbers > threshold,
            "<": numbers < threshold,
        }[rule.operator]
        return np.asarray(passed, dtype=np.float64)
    return np.asarray(np.nan_to_num(numbers, nan=0.0), dtype=np.float64)


def item_table(args: Args) -> pd.DataFrame:
    """item_id, title, categories and release_time from the item file."""
    import pandas as pd

    from metarec_gym.data import id_strings, parse_times

    if args.items is None:
        raise ValueError("no item table is given; name it with --items")
    table = read_table(args.items, args.separator, args.items_columns, args.encoding)
    id_column = args.items_id or args.item
    wanted = {"item_id": id_column, "title": args.item_title, "categories": args.item_categories}
    missing = [
        column for column in (*wanted.values(), args.item_release) if column is not None and column not in table.columns
    ]
    if missing:
        raise ValueError(
            f"{args.items.name} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, table.columns))}; correct --items-id, --item-title, --item-categories, --item-release"
        )
    items = pd.DataFrame({"item_id": id_strings(table[id_column], id_column).to_numpy()})
    for name in ("title", "categories"):
        column = wanted[name]
        if column is not None:
            items[name] = table[column].fillna("").astype(str).to_numpy()
    if "categories" in items.columns and args.category_separator != "|":
        items["categories"] = items["categories"].str.replace(args.category_separator, "|", regex=False)
    if args.item_release is not None:
        release = table[args.item_release]
        known = release.notna().to_numpy(dtype=bool)
        times = pd.Series(float("nan"), index=range(len(table)), dtype="float64")
        years = pd.to_numeric(release[known], errors="coerce")
        if known.any() and bool(years.between(1800, 2200).all()):
            release = years.astype("int64").astype(str) + "-01-01"
            times[known] = parse_times(release, what=args.item_release)
        elif known.any():
            times[known] = parse_times(release[known], unit=args.time_unit, what=args.item_release)
        items["release_time"] = times
    return items


def _pseudonymised(log: InteractionLog, key_path: Path, out: Path) -> InteractionLog:
    """The log with pseudonyms under the key at `key_path`, which is made if it is not there."""
    from metarec_gym.data import pseudonymise

    return pseudonymise(log, pseudonym_key(key_path, out))


def pseudonym_key(key_path: Path, out: Path) -> bytes:
    """The key at `key_path`, which is made if it is not there; refuses one inside the data."""
    from metarec_gym.data import read_key, write_key

    if key_path.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"the key {key_path} would lie inside the data in {out}; name a file outside")
    return read_key(key_path) if key_path.is_file() else write_key(key_path, data_folder=out)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=Args.__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
