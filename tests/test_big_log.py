"""The measurement of big logs: what it writes, and that a step that fails is said."""

import json

import numpy as np
import pytest

from experiments import big_log


def test_every_step_is_measured_and_the_log_is_gone_afterwards(tmp_path, capsys):
    # a step's peak is its own: this process is larger than any of them
    large = np.ones(1 << 27)
    args = big_log.Args(rows=3_000, items=50, sample=10, folder=tmp_path / "log", runs=tmp_path / "runs")
    row = big_log.run(args)
    assert list(row["steps"]) == list(big_log.STEPS)
    assert all(said["seconds"] > 0 and 10e6 < said["peak_bytes"] < large.nbytes for said in row["steps"].values())
    assert (row["users"], row["rows"]) == (30, 3_000)
    assert not (tmp_path / "log").exists()
    table = next((tmp_path / "runs").glob("big_log_*/table.md")).read_text()
    assert "| `envs_data.own_log.prepare` |" in table
    assert big_log.run(args) == json.loads(json.dumps(row))


def test_files_of_others_in_the_folder_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    big_log.run(big_log.Args(rows=2_000, items=50, sample=10, folder=tmp_path / "mine", runs=tmp_path / "runs"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious.txt"]


def test_a_step_that_fails_is_named(tmp_path):
    args = big_log.Args(rows=100, folder=tmp_path / "nothing", runs=tmp_path)
    with pytest.raises(RuntimeError, match="the step 'encode' of the big log failed"):
        big_log.measured(args, "encode")
