"""`runs/<name>/`: what was asked (args.json, command.txt), what came out (result.json); found again by content hash."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

ENV_CODE = ("metarec_gym/envs", "metarec_gym/response/frozen.py", "metarec_gym/seeding.py", "metarec_gym/policy.py")
"""Code that decides what an environment does, beside the world itself."""


def jsonable(value: Any) -> Any:
    """`value` as plain JSON types: dataclasses become objects, paths and unknown things strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def content_hash(facts: Any) -> str:
    """16 hexadecimal characters that change when any of the facts does; the order of keys does not matter."""
    text = json.dumps(jsonable(facts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_hash(paths: Iterable[str]) -> str:
    """Hash of what Python files do: comments, docstrings and layout do not count.

    Args:
        paths: Files or folders under the repository root; missing ones are skipped.

    Returns:
        16 hexadecimal characters.
    """
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        full = ROOT / path
        for file in sorted(full.rglob("*.py")) if full.is_dir() else [full] if full.is_file() else []:
            stat = file.stat()
            digest.update(f"{file.relative_to(ROOT)}\n{_file_hash(file, stat.st_mtime_ns, stat.st_size)}\n".encode())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=512)
def _file_hash(file: Path, mtime_ns: int, size: int) -> str:
    """Hash of one file's syntax tree; time and size are there to notice a change."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            node.body = [e for e in body if not _is_text(e)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def write_atomic(path: Path, text: str) -> Path:
    """Writes a file so that it is there completely or not at all; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, path)
    return path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a number."""
    found = {"python": platform.python_version()}
    for package in ("metarec-gym", "torch", "numpy", "scipy", "gymnasium", "stable-baselines3", "implicit"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """The command that runs now, as one would type it from the repository root."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    start = ["python", "-m", spec.name] if spec is not None else ["python", *sys.argv[:1]]
    return shlex.join([*start, *sys.argv[1:]])


class RunFolder:
    """One run's folder; its name ends in the content hash of what was asked, so the same question finds its answer.

    Args:
        root: Folder of all runs.
        title: Readable start of the name, e.g. `ppo_A_seed0`.
        facts: Everything that decides the result.
    """

    def __init__(self, root: str | Path, title: str, facts: Mapping[str, Any]) -> None:
        self.facts = dict(jsonable(facts))
        self.key = content_hash(self.facts)
        self.path = Path(root) / f"{title}_{self.key[:10]}"
        self._asked = ""

    def begin(self, args: Any, command: str | None = None) -> Path:
        """Creates the folder with `args.json` and `command.txt`; returns its path."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._asked = json.dumps({"args": jsonable(args), "facts": self.facts}, indent=2) + "\n"
        write_atomic(self.path / "args.json", self._asked)
        write_atomic(self.path / "command.txt", (command or command_line()) + "\n")
        return self.path

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Writes `result.json` atomically: a folder with it is a finished run.

        Args:
            result: What came out; versions and the key are added.

        Returns:
            What was written.
        """
        if self._asked:
            # a learner keeps its own hyperparameters in a file of this name; they are among the arguments here
            write_atomic(self.path / "args.json", self._asked)
        row = {**jsonable(result), "key": self.key, "versions": versions()}
        write_atomic(self.path / "result.json", json.dumps(row, indent=2, sort_keys=True) + "\n")
        return row

    def result(self) -> dict[str, Any] | None:
        """The finished run's result, or None when it has not finished."""
        file = self.path / "result.json"
        if not file.is_file():
            return None
        row: dict[str, Any] = json.loads(file.read_text())
        return row if row.get("key") == self.key else None
