"""Hyperparameters by kind of action: `agents/hyperparameters/<action>.yml`, algorithm -> settings, in RL Zoo's style."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).resolve().parent.parent / "hyperparameters"

T = TypeVar("T")


def action_of(env_id: str) -> str:
    """Kind of action of a registered id: `select`, `blend` or `slots`.

    Raises:
        ValueError: When the id has no strategies to choose among.
    """
    for action in ("select", "blend", "slots"):
        if f"{action.capitalize()}-v" in env_id:
            return action
    raise ValueError(f"{env_id!r} has no hyperparameters; expected an id of Select, Blend or Slots")


def settings_of(algorithm: str, action: str) -> dict[str, Any]:
    """The settings that the file of the action has for an algorithm, empty where it names none.

    Args:
        algorithm: Name without `sb3_`: `a2c`, `dqn` ...
        action: `select`, `blend` or `slots`.

    Raises:
        ModuleNotFoundError: When PyYAML is missing.
        ValueError: When the file's settings are not a mapping.
    """
    try:
        # PyYAML brings no types
        yaml: Any = importlib.import_module("yaml")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("hyperparameter files need PyYAML: pip install -e '.[agents]'") from error
    path = FOLDER / f"{action}.yml"
    found = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get(algorithm) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} has {found!r} for {algorithm}, expected name: value")
    return found


def tuned(default: T, algorithm: str, action: str) -> T:
    """A dataclass of hyperparameters with the settings of the action's file.

    Raises:
        ValueError: When the file names a hyperparameter that the algorithm has not.
    """
    fields = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for name, value in settings_of(algorithm, action).items():
        if name not in fields:
            raise ValueError(f"{FOLDER / (action + '.yml')}: {algorithm} has no {name!r}; it has {sorted(fields)}")
        # YAML 1.1 reads 1e-3 as text, and knows no tuples
        like = fields[name]
        changes[name] = tuple(value) if isinstance(like, tuple) else float(value) if isinstance(like, float) else value
    return dataclasses.replace(default, **changes)  # type: ignore[type-var]
