"""What the MovieLens releases share: titles, genres, canonical tables, and the log made from them."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from envs_data.download import PackageSource, Source, UrlSource, fetch, prepared, read_members

if TYPE_CHECKING:
    import pandas as pd

    from metarec_gym.data import InteractionLog

Tables: TypeAlias = "tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]"
"""Ratings, items and users, as `tables` makes them."""
SourceName: TypeAlias = Literal["auto", "official", "package"]

# "Title (1995)", in one case followed by "(V)" for a video
_TITLE_WITH_YEAR = re.compile(r"^(?P<title>.*?)\s*\((?P<year>\d{4})\)\s*(\(V\))?$")


@dataclass(frozen=True)
class Release:
    """One MovieLens release: where it is had, how it is read and what its log must be."""

    name: str
    """Name of the log, e.g. movielens_100k."""
    title: str
    """Name in sentences, e.g. MovieLens-100K."""
    folder: Path
    """Where its card.json is."""
    recipe: str
    """Changes whenever the same raw files would give another log."""
    official: UrlSource
    """The publisher's zip."""
    read_official: Callable[[Path], Tables]
    """Reads the publisher's zip."""
    mirror: PackageSource
    """The package index's copy."""
    read_mirror: Callable[[Path], Tables]
    """Reads the package index's copy; gives the same tables."""
    ratings_sha256: str
    """`table_sha256` of its ratings."""
    items_sha256: str
    """`table_sha256` of its items."""


def prepare(release: Release, out: Path, source: SourceName, force: bool) -> None:
    """Prepares the log of `release` in `out` unless it is there (or `force`), and says so."""
    done = None if force else prepared(out, release.recipe)
    if done is not None:
        card = done["card"]
        counts = f"{card['rows']:,} rows, {card['users']:,} users, {card['items']:,} items"
        print(f"{release.name} is prepared in {out}: {counts}, hash {done['hash']}")
        return
    sources: dict[SourceName, list[Source]] = {
        "auto": [release.official, release.mirror],
        "official": [release.official],
        "package": [release.mirror],
    }
    archive, used = fetch(sources[source], out / "raw")
    log = to_log(release, *(release.read_official if used is release.official else release.read_mirror)(archive))
    log.save(out)
    print(f"{release.name} -> {out}, hash {log.hash}\n{log.report()}")


def mirror_rows(archive: Path, stem: str) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Fields of the rows of `<stem>.inter`, `.item` and `.user`: UTF-8, tabs between fields, a header line each."""
    names = [f"{stem}.{ending}" for ending in ("inter", "item", "user")]
    content = read_members(archive, names)
    # not splitlines: it would also split at characters that titles may have
    ratings, items, users = (
        [line.rstrip("\r").split("\t") for line in content[name].decode("utf-8").split("\n")[1:] if line.strip()]
        for name in names
    )
    return ratings, items, users


def title_and_year(text: str) -> tuple[str, str]:
    """'Toy Story (1995)' -> ('Toy Story', '1995'); the year is '' where there is none; white space is made single."""
    text = " ".join(text.split())
    found = _TITLE_WITH_YEAR.match(text)
    return (found["title"], found["year"]) if found else (text, "")


def tables(ratings: list[list[str]], items: list[list[str]], users: list[list[str]]) -> Tables:
    """Canonical tables, the same whichever source: ratings by (user, item), items and users by id.

    Args:
        ratings: user, item, rating and unix seconds of each rating, as text.
        items: id, title, year and '|'-joined genres of each item.
        users: id, age, gender and occupation of each user.
    """
    import pandas as pd

    rating_table = pd.DataFrame(ratings, columns=["user_id", "item_id", "rating", "timestamp"])
    rating_table = rating_table.astype("float64").astype("int64")
    item_table = pd.DataFrame(items, columns=["item_id", "title", "year", "categories"])
    user_table = pd.DataFrame(users, columns=["user_id", "age", "gender", "occupation"])
    return (
        rating_table.sort_values(["user_id", "item_id"], ignore_index=True),
        item_table.sort_values("item_id", key=lambda ids: ids.astype("int64"), ignore_index=True),
        user_table.sort_values("user_id", key=lambda ids: ids.astype("int64"), ignore_index=True),
    )


def table_sha256(table: pd.DataFrame) -> str:
    """sha256 of the rows in the order given, one line each, values separated by tabs."""
    lines = ("\t".join(map(str, row)) for row in table.itertuples(index=False))
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def to_log(release: Release, ratings: pd.DataFrame, items: pd.DataFrame, users: pd.DataFrame) -> InteractionLog:
    """The log from canonical tables: watch in every row, like where the rating is 4 or 5.

    Args:
        release: Its hashes and card say what must come out.
        ratings: user_id, item_id, rating, timestamp as int64, sorted by (user_id, item_id).
        items: item_id, title, year, categories as text, sorted by item_id.
        users: user_id, age, gender, occupation as text, sorted by user_id.

    Raises:
        ValueError: These are not the ratings of the release.
    """
    import numpy as np
    import pandas as pd
    import torch

    from metarec_gym import seeding
    from metarec_gym.data import InteractionLog

    if table_sha256(ratings) != release.ratings_sha256:
        raise ValueError(
            f"the {len(ratings)} ratings read are not those of {release.title} (their hash differs); "
            "delete the raw/ folder and prepare again"
        )
    if table_sha256(items) != release.items_sha256:
        note = "note: titles or genres differ from those seen when this file was written; the log's hash differs too"
        print(note, file=sys.stderr)
    # films rated in the same second have no order; that of the item ids would be one that a sequence model could learn
    key = torch.from_numpy((ratings["user_id"] * 4096 + ratings["item_id"]).to_numpy(dtype=np.int64, copy=True))
    tie = seeding.mix(key).numpy()
    ratings = ratings.iloc[np.lexsort((tie, ratings["timestamp"], ratings["user_id"]))]
    frame = pd.DataFrame(
        {
            "user_id": ratings["user_id"].astype(str),
            "item_id": ratings["item_id"].astype(str),
            "timestamp": ratings["timestamp"],
            "watch": 1.0,
            "like": (ratings["rating"] >= 4).astype("float32"),
        }
    )
    first_of_january = pd.to_datetime(items["year"].where(items["year"] != "", None), format="%Y", utc=True)
    item_table = items[["item_id", "title", "categories"]].assign(
        release_time=((first_of_january - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)).astype("float64")
    )
    card = json.loads((release.folder / "card.json").read_text(encoding="utf-8"))
    log = InteractionLog.from_frame(
        frame,
        name=release.name,
        outcomes=("watch", "like"),
        outcome_weights=(0.0, 1.0),
        items=item_table,
        users=users.assign(age=users["age"].astype("int64")),
        card={**card, "recipe": release.recipe},
    )
    for fact, expected in card["facts"].items():
        if log.card[fact] != expected:
            raise ValueError(
                f"{release.title} has {fact} {expected} and {log.card[fact]} came out; delete raw/ and prepare again"
            )
    return log
