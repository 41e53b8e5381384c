"""What a test logged: one row a request (or a user), and the same table with one row a user that is analysed.

| column | |
|---|---|
| `user_id` | the unit of assignment and of analysis |
| `arm` | what the user was assigned to |
| `first_exposure` | when (a date, or any number that grows: order of arrival); optional, monitoring needs it |
| `history_length` | events before the test, for segments; optional |
| `pre_<column>` | the user's own value before the test, repeated on every row; optional, CUPED uses it |
| anything else | outcomes, summed over a user's rows |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

PRE = "pre_"
"""Start of the names of columns that were measured before the test."""
ACTIVITY = "pre_activity"
"""Covariate of metrics that have no pre-period of their own."""
PARTS = ("numerator", "denominator", "covariate", "covariate_denominator")


@dataclass(frozen=True)
class Metric:
    """A metric of users: mean of a column, or ratio of the means of two.

    Attributes:
        name: Name in the report.
        numerator: Column summed over a user's rows.
        denominator: Column that the mean is divided by (clicks / shown); None = per user.
        any: Whether a user counts 1 when the sum is above 0 (share of users who converted), and 0 otherwise.
        covariate: Columns from before the test (numerator, denominator or None) for CUPED; None = no adjustment.
        higher_is_better: False for costs and complaints.
        margin: Relative worsening that a guardrail still tolerates; None = not a guardrail but a goal.
    """

    name: str
    numerator: str
    denominator: str | None = None
    any: bool = False
    covariate: tuple[str, str | None] | None = None
    higher_is_better: bool = True
    margin: float | None = None

    @classmethod
    def parse(cls, text: str) -> Metric:
        """From `name=clicks/shown`, `name=minutes` or `name=any:purchase`; `-name=...` is better when lower.

        Raises:
            ValueError: When the text has another form.
        """
        name, found, formula = text.partition("=")
        lower = name.startswith("-")
        name, whether = name.removeprefix("-"), formula.startswith("any:")
        top, slash, bottom = formula.removeprefix("any:").partition("/")
        if not (found and name and top) or (slash and not bottom) or (whether and slash):
            raise ValueError(f"metric {text!r}: expected name=column, name=column/column or name=any:column")
        return cls(name, top, bottom or None, whether, higher_is_better=not lower)

    def with_covariate(self, columns: Iterable[str]) -> Metric:
        """The metric with the pre-period column that the table has for it; unchanged where one is set already."""
        there = set(columns)
        own = (PRE + self.numerator, None if self.denominator is None else PRE + self.denominator)
        if self.covariate is not None:
            return self
        if all(column is None or column in there for column in own):
            return replace(self, covariate=own)
        return replace(self, covariate=(ACTIVITY, None)) if ACTIVITY in there else self

    def columns(self) -> list[str]:
        """Columns that a table must have for it."""
        wanted = [self.numerator, self.denominator, *(self.covariate or ())]
        return [column for column in wanted if column is not None]


def read_exposures(path: str | Path) -> pd.DataFrame:
    """Reads an exposure table.

    Args:
        path: A `.csv` or `.parquet` file.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is of another kind, or lacks `user_id` or `arm`.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no exposure table at {path}; it is a CSV or Parquet file with user_id, arm and outcomes"
        )
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path.name} ends in {path.suffix!r}, expected .csv or .parquet")
    text = {"user_id": str, "arm": str}
    table = pd.read_csv(path, dtype=text) if path.suffix == ".csv" else pd.read_parquet(path)
    return check_exposures(table)


def check_exposures(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `user_id` and `arm` as text and `first_exposure` as a number (dates become unix seconds).

    Raises:
        ValueError: When a column is missing, a user or arm is unknown, a date is none, or a user was in two arms.
    """
    import pandas as pd

    missing = sorted({"user_id", "arm"} - set(table.columns))
    if missing:
        raise ValueError(f"the exposure table lacks the columns {missing}; it has {list(table.columns)}")
    holes = int(table[["user_id", "arm"]].isna().any(axis=1).sum())
    if holes:
        raise ValueError(f"{holes} rows of the exposure table name no user or no arm; find out why before analysing")
    table = table.assign(user_id=table["user_id"].astype(str), arm=table["arm"].astype(str))
    if "first_exposure" in table and not pd.api.types.is_numeric_dtype(table["first_exposure"]):
        when = pd.to_datetime(table["first_exposure"], utc=True)
        table = table.assign(first_exposure=(when - pd.Timestamp(0, tz="UTC")).dt.total_seconds())
    arms = table.groupby("user_id")["arm"].nunique()
    if (arms > 1).any():
        example = arms.index[(arms > 1).to_numpy()][0]
        raise ValueError(
            f"{int((arms > 1).sum())} users were in more than one arm (for example {example!r}): the assignment did not hold, "
            "and no difference between the arms can be trusted"
        )
    return table


def user_table(exposures: pd.DataFrame, metrics: Sequence[Metric]) -> pd.DataFrame:
    """One row a user: outcomes summed, what was before the test kept.

    Args:
        exposures: As `check_exposures` returns it.
        metrics: What will be analysed; decides the columns.

    Returns:
        `user_id, arm, first_exposure, history_length` (where they exist) and the metrics' columns, in order of first exposure.

    Raises:
        ValueError: When a column is missing or holds something else than finite numbers, or a pre-period value changes within
            a user.
    """
    wanted = sorted({column for metric in metrics for column in metric.columns()})
    missing = [column for column in wanted if column not in exposures.columns]
    if missing:
        raise ValueError(f"the metrics need the columns {missing}; the exposure table has {list(exposures.columns)}")
    facts = [c for c in ("first_exposure", "history_length") if c in exposures.columns]
    numbers = exposures[[*wanted, *(c for c in facts if c not in wanted)]]
    bad = [c for c in numbers.columns if not np.isfinite(numbers[c].to_numpy(dtype=np.float64, na_value=np.nan)).all()]
    if bad:
        raise ValueError(f"the columns {bad} hold values that are no finite numbers; say 0 where nothing happened")
    groups = exposures.groupby("user_id", sort=False)
    constant = [c for c in wanted if c.startswith(PRE)]
    if constant and (groups[constant].nunique() > 1).any(axis=None):
        raise ValueError(f"one of {constant} changes within a user; a pre-period value is one number a user")
    how = {c: "first" if c.startswith(PRE) else "sum" for c in wanted} | {"arm": "first", "history_length": "first"}
    how |= {"first_exposure": "min"}
    users = groups.agg({c: how[c] for c in ["arm", *facts, *wanted]}).reset_index()
    return users.sort_values("first_exposure", kind="stable", ignore_index=True) if "first_exposure" in users else users


def metric_columns(users: pd.DataFrame, metric: Metric) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """A metric's four numbers of every user, in the order of `PARTS`; float64 (users, 4), ones where there is none."""
    out = np.ones((len(users), len(PARTS)))
    top = users[metric.numerator].to_numpy(dtype=np.float64)
    out[:, 0] = top > 0 if metric.any else top
    for place, column in enumerate((metric.denominator, *(metric.covariate or (None, None))), start=1):
        if column is not None:
            out[:, place] = users[column].to_numpy(dtype=np.float64)
    return out
