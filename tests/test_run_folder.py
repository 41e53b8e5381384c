"""Run folders: the same question finds its answer, and an answer is there completely or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from experiments import run_folder
from experiments.run_folder import RunFolder, code_hash, content_hash, jsonable, write_atomic


@dataclass(frozen=True)
class _Args:
    seed: int = 0
    world: Path = Path("worlds/x")


def test_the_order_of_keys_does_not_change_the_hash_but_a_value_does() -> None:
    assert content_hash({"a": 1, "b": (2, 3)}) == content_hash({"b": [2, 3], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert content_hash(_Args(seed=1)) != content_hash(_Args(seed=2))


def test_everything_becomes_plain_json() -> None:
    value = {"path": Path("a/b"), "array": np.arange(2), "number": np.float64(0.5), "args": _Args(), "none": None}
    assert json.loads(json.dumps(jsonable(value)))["args"] == {"seed": 0, "world": "worlds/x"}


def test_a_finished_run_is_found_by_what_was_asked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "ppo", {"seed": 0})
    assert folder.result() is None
    folder.begin(_Args(), "python -m experiments.train --seed 0")
    assert folder.result() is None
    folder.finish({"value": 0.5})
    found = RunFolder(tmp_path, "ppo", {"seed": 0}).result()
    assert found is not None
    assert found["value"] == 0.5
    assert "torch" in found["versions"]
    assert RunFolder(tmp_path, "ppo", {"seed": 1}).result() is None
    assert (folder.path / "command.txt").read_text() == "python -m experiments.train --seed 0\n"
    assert json.loads((folder.path / "args.json").read_text())["args"]["seed"] == 0


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_atomic(tmp_path / "result.json", "old")

    def fail(source: object, destination: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(run_folder.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(target, "new")
    assert target.read_text() == "old"


def test_comments_and_docstrings_do_not_make_code_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    (tmp_path / "room").mkdir()
    file = tmp_path / "room" / "a.py"
    file.write_text('"""One."""\ndef f(x):\n    """Two."""\n    return x + 1  # why\n')
    first = code_hash(["room"])
    file.write_text("def f(x):\n\n    return x + 1\n")
    assert code_hash(["room"]) == first
    file.write_text("def f(x):\n    return x + 2\n")
    assert code_hash(["room"]) != first
    assert code_hash(["room", "missing.py"]) == code_hash(["room"])
