"""Where worlds and prepared logs lie: a folder is itself, a name is looked up.

| | below the current directory | or in the folder named by |
|---|---|---|
| world `movielens_100k` | `worlds/movielens_100k` | `METAREC_WORLDS` |
| log `open_bandit` | `envs_data/open_bandit` | `METAREC_LOGS` |

A name is a string without a path separator; a `Path` is always a path. Nothing is read here but whether a file exists.
"""

from __future__ import annotations

import os
from pathlib import Path

WORLDS_VARIABLE = "METAREC_WORLDS"
LOGS_VARIABLE = "METAREC_LOGS"
PREPARED = {
    "movielens_100k": "",
    "movielens_1m": "",
    "open_bandit": "",
    "deskdrop": " --file users_interactions.csv",
}
"""Logs that `envs_data` prepares, with what their command needs."""


def world_folder(world: str | Path) -> Path:
    """The folder of a world, which may not exist when it is given as a path.

    Args:
        world: A folder, or a name.

    Raises:
        FileNotFoundError: When there is no world of that name; the message has the commands that make it.
    """
    return _place(world, "world.json", WORLDS_VARIABLE, "worlds")


def log_folder(log: str | Path) -> Path:
    """The folder of a prepared log, which may not exist when it is given as a path.

    Args:
        log: A folder, or a name.

    Raises:
        FileNotFoundError: When there is no log of that name; the message has the command that prepares it.
    """
    return _place(log, "log.json", LOGS_VARIABLE, "envs_data")


def commands(name: str, *, log: Path | None = None, world: Path | None = None) -> tuple[str, ...]:
    """What makes a log, or the world of it, from nothing; to be run from the repository's root.

    Args:
        name: Of the log, and of its world.
        log: Where a log of one's own goes; `logs/<name>` if None. The others have their place in `envs_data`.
        world: Where the world goes; None = the log alone is made.
    """
    if name in PREPARED:
        log, prepare = Path("envs_data") / name, f"python -m envs_data.{name}.prepare{PREPARED[name]}"
    else:
        log = log or Path("logs") / name
        columns = "--path FILE --user COL --item COL --time COL --outcome NAME=MAPPING"
        prepare = f"python -m envs_data.own_log.prepare {columns} --name {name} --out {log}"
    if world is None:
        return (prepare,)
    return prepare, f"python -m experiments.build_world --log {log} --out {world}"


def _place(given: str | Path, file: str, variable: str, folder: str) -> Path:
    path = Path(given)
    is_name = isinstance(given, str) and given not in ("", ".", "..") and not any(s in given for s in _SEPARATORS)
    if not is_name or path.is_dir():
        return path
    named = os.environ.get(variable)
    # the variable says it on purpose, so it goes first
    places = [*([Path(named) / path] if named else []), Path(folder) / path]
    for place in places:
        if (place / file).is_file():
            return place
    if file == "world.json":
        kind, steps = "world", commands(path.name, world=places[0])
    else:
        kind, steps = "prepared log", commands(path.name, log=places[0])
    where = " or ".join(str(place) for place in places)
    also = "" if named else f" (or set {variable} to the folder that holds it)"
    raise FileNotFoundError(f"no {kind} {given!r} at {where}{also}; make it:\n" + "\n".join(f"  {s}" for s in steps))


_SEPARATORS = tuple(s for s in (os.sep, os.altsep) if s)
