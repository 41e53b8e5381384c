"""`ImpressionTable`: logged bandit feedback without users: what was shown, with what chance, and was it clicked."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from metarec_gym.data.storage import content_hash, read_tables, write_tables

_KIND = "impression table"
IMPRESSION_COLUMNS = ("timestamp", "campaign", "strategy", "item_id", "position", "propensity", "click")


@dataclass(frozen=True, eq=False)
class ImpressionTable:
    """One row per item shown, with the probability the strategy gave it; no user id, so no `InteractionLog`."""

    name: str
    """Short name."""
    frame: pd.DataFrame
    """timestamp (unix seconds), campaign, strategy, item_id, position, propensity, click (0 or 1), user features."""
    items: pd.DataFrame
    """item_id and item features."""
    card: dict[str, Any] = field(default_factory=dict)
    """Source, licence and facts."""

    @classmethod
    def from_frame(
        cls, frame: pd.DataFrame, *, name: str, items: pd.DataFrame, card: dict[str, Any] | None = None
    ) -> ImpressionTable:
        """Validates a table of impressions.

        Raises:
            ValueError: A column is missing, a propensity not in (0, 1], a click not 0 or 1, or an item unknown.
        """
        missing = [column for column in IMPRESSION_COLUMNS if column not in frame.columns]
        if missing:
            expected = ", ".join(IMPRESSION_COLUMNS)
            raise ValueError(f"the impressions lack {', '.join(map(repr, missing))}; expected {expected}")
        if len(frame) == 0:
            raise ValueError("there are no impressions; check the input file")
        if not frame["propensity"].between(0, 1, inclusive="right").all():
            raise ValueError("some propensities are not in (0, 1]; an item that was shown had a chance of being shown")
        if not frame["click"].isin([0, 1]).all():
            raise ValueError("some clicks are neither 0 nor 1; check the column mapping")
        unknown = set(frame["item_id"]) - set(items["item_id"])
        if unknown:
            raise ValueError(
                f"{len(unknown)} items shown have no row in the item table, e.g. {min(unknown)!r}; add them"
            )
        return cls(
            name=name, frame=frame.reset_index(drop=True), items=items.reset_index(drop=True), card=dict(card or {})
        )

    @cached_property
    def hash(self) -> str:
        """Content hash, 16 hexadecimal digits."""
        return content_hash({"impressions": self.frame, "items": self.items}, {"kind": _KIND})

    def save(self, folder: Path) -> None:
        """Writes impressions.parquet, items.parquet and, last, log.json."""
        description = {"kind": _KIND, "name": self.name, "hash": self.hash, "card": self.card}
        write_tables(Path(folder), {"impressions": self.frame, "items": self.items}, description)


def load_open_bandit(folder: Path) -> ImpressionTable:
    """The prepared Open Bandit sample.

    Args:
        folder: Where `python -m envs_data.open_bandit.prepare` wrote it: envs_data/open_bandit unless told otherwise.

    Returns:
        Six times 10,000 impressions: two strategies in three campaigns.

    Raises:
        FileNotFoundError: Not prepared; the sentence names the command.
        ValueError: Damaged or of another schema.
    """
    command = "python -m envs_data.open_bandit.prepare"
    tables, description = read_tables(Path(folder), ("impressions", "items"), kind=_KIND, prepare_command=command)
    frame, items = tables["impressions"], tables["items"]
    if frame is None or items is None:
        raise ValueError(
            f"the impressions in {folder} are damaged: log.json lists too few files; prepare again: {command}"
        )
    table = ImpressionTable(str(description.get("name")), frame, items, dict(description.get("card") or {}))
    if table.hash != description.get("hash"):
        raise ValueError(
            f"the impressions in {folder} are damaged: their hash is {table.hash}; prepare again: {command}"
        )
    return table
