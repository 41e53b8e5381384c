"""CI&T Deskdrop: your copy of its files -> a prepared log. Run: python -m envs_data.deskdrop.prepare --file FILE."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from envs_data.download import prepared
from envs_data.own_log import prepare as own_log

if TYPE_CHECKING:
    import pandas as pd

    from metarec_gym.data import InteractionLog

FOLDER = Path(__file__).resolve().parent
RECIPE = "deskdrop-2"
PAGE = "https://www.kaggle.com/datasets/gspmoreira/articles-sharing-reading-from-cit-deskdrop"
FILE_NAMES = ("users_interactions.csv", "users_interactions.csv.gz")
ARTICLES_NAMES = ("shared_articles.csv", "shared_articles.csv.gz")
OutcomeName = Literal["view", "like", "respond", "bookmark", "follow", "comment"]
EVENTS: dict[OutcomeName, tuple[str, float]] = {
    "view": ("VIEW", 1.0),
    "like": ("LIKE", 2.0),
    "bookmark": ("BOOKMARK", 2.5),
    "follow": ("FOLLOW", 3.0),
    "comment": ("COMMENT CREATED", 4.0),
}
"""eventType and weight of each outcome; the weights are the event strengths of the publisher's own notebook."""
POOLED: dict[OutcomeName, tuple[tuple[OutcomeName, ...], float]] = {"respond": (("bookmark", "follow", "comment"), 4.0)}
"""An outcome that happens when any of its parts does, and its weight: where any did, the weights of those that did sum to 4.04 on
average, so a row's reward is on average what the parts would make it."""


@dataclass(frozen=True)
class Args:
    """Turns the files of CI&T Deskdrop into a prepared log; Kaggle asks for a login, so you fetch them yourself."""

    file: Path | None = None
    """users_interactions.csv (or .csv.gz), all columns or fewer; looked for in METAREC_DATA_DIR if not given."""
    articles: Path | None = None
    """shared_articles.csv, for titles, languages and times of sharing; looked for beside --file if not given."""
    outcomes: tuple[OutcomeName, ...] = ("view", "like", "respond")
    """What counts as an outcome; view, the gate, comes first. respond: a bookmark, a follow or a comment; each alone has too few
    users for a judge, so naming them gives outcomes that the validity report will not vouch for."""
    out: Path = FOLDER
    """Where the prepared log goes."""
    force: bool = False
    """Prepare again even if the prepared log is intact."""


def main(args: Args) -> None:
    """Prepares the log unless it is there."""
    file = interactions_file(args.file)
    articles = args.articles or _first_file([file.parent / name for name in ARTICLES_NAMES])
    mapping = own_log_args(replace(args, file=file, articles=articles))
    recipe = {"deskdrop": RECIPE, "outcomes": list(args.outcomes), **own_log.recipe_of(mapping)}
    done = None if args.force else prepared(args.out, recipe)
    if done is not None:
        card = done["card"]
        counts = f"{card['rows']:,} rows, {card['users']:,} users, {card['items']:,} items"
        print(f"deskdrop is prepared in {args.out}: {counts}, hash {done['hash']}")
        return
    print(f"source: {file}" + (f" and {articles}" if articles else ", without titles (no shared_articles.csv)"))
    log = to_log(mapping, args.outcomes)
    log.card["recipe"] = recipe
    log.save(args.out)
    print(f"deskdrop -> {args.out}, hash {log.hash}\n{log.report()}")


def interactions_file(given: Path | None) -> Path:
    """The file of events: the one given, or that in METAREC_DATA_DIR.

    Raises:
        FileNotFoundError: It is not there; the sentence says where to get it.
    """
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"there is no file {given}; get users_interactions.csv from {PAGE}")
        return given
    data = os.environ.get("METAREC_DATA_DIR")
    folders = [Path(data) / "deskdrop", Path(data)] if data else []
    found = _first_file([folder / name for folder in folders for name in FILE_NAMES])
    if found is None:
        raise FileNotFoundError(
            f"no file of Deskdrop's events is given; get users_interactions.csv from {PAGE} (it asks for a login) "
            "and run: python -m envs_data.deskdrop.prepare --file users_interactions.csv"
        )
    return found


def _first_file(paths: list[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def own_log_args(args: Args) -> own_log.Args:
    """Deskdrop in the words of `envs_data.own_log`, which does the work."""
    if args.outcomes[:1] != ("view",) or len(set(args.outcomes)) < len(args.outcomes):
        raise ValueError(
            f"the outcomes are {' '.join(args.outcomes) or 'none'}; expected view first and each once, "
            "e.g. --outcomes view like respond"
        )
    if args.file is None:
        raise ValueError("no file of Deskdrop's events is given; name it with --file")
    # what is pooled is mapped by its parts
    parts = dict.fromkeys(part for name in args.outcomes for part in (POOLED[name][0] if name in POOLED else (name,)))
    return own_log.Args(
        path=args.file,
        user="personId",
        item="contentId",
        time="timestamp",
        session="sessionId",
        time_unit="s",
        outcome=tuple(f"{name}=eventType:{EVENTS[name][0]}" for name in parts),
        weight=tuple(f"{name}={EVENTS[name][1]:g}" for name in parts),
        items=args.articles,
        name="deskdrop",
        out=args.out,
    )


def to_log(mapping: own_log.Args, outcomes: tuple[OutcomeName, ...]) -> InteractionLog:
    """The log of `outcomes`, with Deskdrop's card.

    Raises:
        ValueError: The file is not what Deskdrop's events look like; the sentence says why.
    """
    log = own_log.prepare(mapping, items=None if mapping.items is None else article_table(mapping.items))
    log = _pooled(log, outcomes)
    card = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    card["outcomes"] = {name: card["outcomes"][name] for name in log.outcomes}
    found = {"events": log.cleaning[0].rows_before, "users": log.card["users"], "items": log.card["items"]}
    expected = card.pop("facts")
    if found != expected:
        # a newer or cut file is still a log, but not the one that published numbers are about
        words = ", ".join(f"{found[fact]:,} {fact}" for fact in expected)
        wanted = ", ".join(f"{count:,} {fact}" for fact, count in expected.items())
        print(f"note: the file has {words}; Deskdrop as published has {wanted}", file=sys.stderr)
    return replace(log, card={**log.card, **card, "source_file": log.card["source"], "source": card["source"]})


def _pooled(log: InteractionLog, outcomes: tuple[OutcomeName, ...]) -> InteractionLog:
    """The log with `outcomes` alone: pooled ones made from their parts, parts that were not asked for dropped."""
    frame = log.frame.copy()
    for name in outcomes:
        if name in POOLED:
            frame[name] = frame[list(POOLED[name][0])].max(axis=1)
    before = [name for name in log.outcomes if name not in outcomes]
    others = [column for column in frame.columns if column not in (*log.outcomes, *POOLED)]
    weights = tuple(POOLED[name][1] if name in POOLED else EVENTS[name][1] for name in outcomes)
    rates = {name: round(float(frame[name].mean()), 6) for name in outcomes}
    return replace(
        log,
        frame=frame.drop(columns=before)[[*others[:3], *outcomes, *others[3:]]],
        outcomes=tuple(outcomes),
        outcome_weights=weights,
        card={**log.card, "outcome_rates": rates},
    )


def article_table(path: Path) -> pd.DataFrame:
    """One row an article from shared_articles.csv: title, language and the time when it was first shared."""
    import pandas as pd

    from metarec_gym.data import parse_times

    table = own_log.read_table(path, ",", None, "utf-8")
    columns = ["timestamp", "contentId", "title", "lang"]
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, table.columns))}; "
            f"give shared_articles.csv of {PAGE}"
        )
    # an article that was removed, or shared again, has several rows: the first says when it appeared
    table = table.assign(release_time=parse_times(table["timestamp"], unit="s"))
    table = table.sort_values("release_time", kind="stable").drop_duplicates("contentId")
    return pd.DataFrame(
        {
            "item_id": table["contentId"],
            "title": table["title"].fillna(""),
            "categories": table["lang"].fillna(""),
            "release_time": table["release_time"],
        }
    ).reset_index(drop=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=Args.__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
