"""Environments by name: light to register, found where they should be, and plain about what is missing."""

import shlex
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from experiments import build_world, train
from metarec_gym.data import synthetic_log
from metarec_gym.envs.scenarios import SCENARIOS
from metarec_gym.places import log_folder, world_folder
from metarec_gym.world import resolve_world
from tests.test_env_sessions import with_return
from tests.test_replay import impressions

ROOT = Path(__file__).parent.parent
LOGS = ("MovieLens100K", "MovieLens1M", "Deskdrop")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current directory, and no variable that names folders."""
    monkeypatch.chdir(tmp_path)
    for variable in ("METAREC_WORLDS", "METAREC_LOGS"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def test_the_scenarios_have_the_names_that_they_are_cited_by():
    families = ("Select", "Blend", "Slots", "Tune")
    named = {f"MetaRec/{log}-{family}-v0" for log in LOGS for family in families}
    assert set(SCENARIOS) == named | {"MetaRec/OpenBandit-Replay-v0"}
    assert all(scenario.id == env_id for env_id, scenario in SCENARIOS.items())


def test_registering_reads_no_file_and_loads_no_torch(tmp_path):
    code = (
        "import sys, gymnasium, metarec_gym; spec = gymnasium.spec('MetaRec/MovieLens100K-Slots-v0'); "
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules; print(spec.kwargs)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "{'world': 'movielens_100k', 'action': 'slots'}"


def test_every_specification_survives_json():
    for env_id, scenario in SCENARIOS.items():
        again = gymnasium.envs.registration.EnvSpec.from_json(gymnasium.spec(env_id).to_json())
        assert again.kwargs == scenario.kwargs


def test_a_name_is_found_below_the_current_directory_and_where_the_variable_says(elsewhere, tiny_world, monkeypatch):
    tiny_world.save(elsewhere / "worlds" / "movielens_100k")
    assert resolve_world("movielens_100k").hash == tiny_world.hash
    env = gymnasium.make("MetaRec/MovieLens100K-Blend-v0")
    assert env.unwrapped.world.hash == tiny_world.hash
    assert env.action_space == gymnasium.spaces.Box(-1.0, 1.0, (3,), dtype=np.float32)
    batch = gymnasium.make_vec("MetaRec/MovieLens100K-Slots-v0", num_envs=3, vectorization_mode="vector_entry_point")
    assert batch.action_space.shape == (3, 2)
    # what the variable names goes first
    tiny_world.save(elsewhere / "else" / "movielens_100k")
    monkeypatch.setenv("METAREC_WORLDS", str(elsewhere / "else"))
    assert world_folder("movielens_100k") == elsewhere / "else" / "movielens_100k"
    # a folder is itself, and so is every path
    tiny_world.save(elsewhere / "movielens_100k")
    assert world_folder("movielens_100k") == Path("movielens_100k")
    assert world_folder("worlds/movielens_1m") == Path("worlds/movielens_1m")
    assert world_folder(Path("movielens_1m")) == Path("movielens_1m")


def test_a_missing_world_is_answered_with_commands_that_exist(elsewhere, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        gymnasium.make("MetaRec/Select-v0", world="movielens_1m")
    assert "no world 'movielens_1m' at worlds/movielens_1m (or set METAREC_WORLDS" in str(error.value)
    prepare, build = (line.strip() for line in str(error.value).splitlines()[1:])
    assert prepare == "python -m envs_data.movielens_1m.prepare"
    assert build == "python -m experiments.build_world --log envs_data/movielens_1m --out worlds/movielens_1m"
    for command in (prepare, build):
        assert (ROOT / (shlex.split(command)[2].replace(".", "/") + ".py")).is_file()
    assert {"log", "out"} <= set(build_world.Args.__dataclass_fields__)
    # where the variable points the world is built
    monkeypatch.setenv("METAREC_WORLDS", "kept")
    with pytest.raises(
        FileNotFoundError, match=r"at kept/shop or worlds/shop; make it:\n.*own_log(.|\n)*--out kept/shop"
    ):
        resolve_world("shop")
    with pytest.raises(FileNotFoundError, match=r"no world at worlds/shop; build it"):
        resolve_world("worlds/shop")


def test_tune_and_replay_find_their_logs_by_name_and_say_how_to_prepare_them(elsewhere):
    with pytest.raises(FileNotFoundError, match=r"no prepared log 'open_bandit' (.|\n)*envs_data.open_bandit.prepare$"):
        gymnasium.make("MetaRec/OpenBandit-Replay-v0")
    with pytest.raises(FileNotFoundError, match=r"envs_data.deskdrop.prepare --file users_interactions.csv$"):
        gymnasium.make("MetaRec/Deskdrop-Tune-v0")
    impressions().save(elsewhere / "envs_data" / "open_bandit")
    replay = gymnasium.make("MetaRec/OpenBandit-Replay-v0")
    assert replay.unwrapped.action_names == ("learned", "random")
    log, _ = synthetic_log(0, n_users=60, n_items=40)
    log.save(elsewhere / "envs_data" / "movielens_100k")
    tune = gymnasium.make("MetaRec/MovieLens100K-Tune-v0", n_users=16, n_items=32)
    assert tune.unwrapped._batch.data.name == log.name
    assert log_folder("movielens_100k") == Path("envs_data/movielens_100k")


def test_deskdrop_plays_several_sessions_and_pays_for_users_who_come_back(elsewhere, leaving_world):
    with_return(leaving_world).save(elsewhere / "worlds" / "deskdrop")
    for family in ("Select", "Blend", "Slots"):
        env = gymnasium.make(f"MetaRec/Deskdrop-{family}-v0")
        config = env.unwrapped._batch.config
        assert (config.session_requests, config.retention_weight, config.retention_days) == (5, 1.0, 7.0)
        env.reset(seed=0)
        ended = 0.0
        for _ in range(env.unwrapped._batch.horizon):
            _, _, terminated, truncated, info = env.step(env.action_space.sample())
            ended += float(info["session_ended"])
            if terminated or truncated:
                break
        assert ended >= 1.0


def test_training_by_the_name_of_a_scenario_is_training_in_its_world(elsewhere, tiny_world):
    tiny_world.save(elsewhere / "worlds" / "movielens_100k")
    args = train.Args(env=("MetaRec/MovieLens100K-Select-v0",))
    assert train.world_of(args).hash == tiny_world.hash
    assert train.run_folder(args).facts["world"] == tiny_world.hash
    assert train.world_of(train.Args()).hash == resolve_world(None).hash
