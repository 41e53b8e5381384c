"""A scenario's page says what the environment is and what was measured of it, and never more than that."""

import json
import re
from dataclasses import replace
from pathlib import Path

import gymnasium
import pytest

from experiments import scenario_scores
from experiments.scenario_pages import Args, meanings, run, section
from experiments.scenario_references import COMPARED, Places, world_command, world_scores
from metarec_gym.data import synthetic_log
from metarec_gym.envs import MetaRecVectorEnv, ReplayVectorEnv, TuneVectorEnv
from metarec_gym.envs.scenarios import SCENARIOS
from tests.test_env_sessions import with_return
from tests.test_replay import impressions

ROOT = Path(__file__).parent.parent
SELECT, SLOTS = "MetaRec/MovieLens100K-Select-v0", "MetaRec/MovieLens100K-Slots-v0"


@pytest.fixture
def shop(tmp_path, monkeypatch, tiny_world):
    """A current directory with the tiny world under the name of MovieLens-100K, and nothing measured."""
    monkeypatch.chdir(tmp_path)
    for variable in ("METAREC_WORLDS", "METAREC_LOGS"):
        monkeypatch.delenv(variable, raising=False)
    tiny_world.save(tmp_path / "worlds" / "movielens_100k")
    return tmp_path


def page_of(env_id):
    (path,) = run(Args(ids=(env_id,)))
    return path.read_text()


def finished(folder, result, **asked):
    """A run's folder as `RunFolder` leaves it."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "args.json").write_text(
        json.dumps({"args": {"evaluation": {"slate_size": None, "cost_weight": 0.0}, **asked}})
    )
    (folder / "command.txt").write_text("python -m experiments.compare --world worlds/movielens_100k\n")


def comparison(world, env=None):
    """Every policy at 1 and 3 requests; the value at 3 is its place in the list."""
    rows = []
    for place, (_, called) in enumerate(COMPARED):
        interval = {"estimate": float(place), "low": place - 0.5, "high": place + 0.5}
        lift = {"estimate": place / 10, "low": 0.0, "high": 0.5}
        windows = {
            "@1": {"value": {**interval, "estimate": 99.0}, "lift_sbs": lift},
            "@3": {"value": interval, "lift_sbs": lift},
        }
        rows.append({"policy": called[-1], "windows": windows})
    return {"world": world, "env": env or {}, "rows": rows, "headroom": {"horizon": 3}}


@pytest.mark.parametrize("env_class", [MetaRecVectorEnv, TuneVectorEnv, ReplayVectorEnv])
def test_the_docstring_says_what_every_block_of_the_observation_means(env_class):
    import inspect

    doc = inspect.getdoc(env_class)
    means = meanings(doc)
    assert set(means) == set(env_class(1).feature_slices)
    assert all(means.values())
    for title in ("Actions", "Reward", "Episode end", "Version history"):
        assert section(doc, title)


def test_blocks_and_bounds_on_the_page_are_those_of_the_environment(shop):
    text = page_of(SELECT)
    env = gymnasium.make_vec(SELECT, num_envs=1, vectorization_mode="vector_entry_point")
    table = re.findall(r"^\| (\w+) \| (\d+)(?: to \d+)? \| (\d+) \| (\S+) to (\S+) \|", text, re.MULTILINE)
    assert [name for name, *_ in table] == list(env.feature_slices)
    for name, first, width, low, high in table:
        where = env.feature_slices[name]
        assert (int(first), int(width)) == (where.start, where.stop - where.start)
        assert float(low) == env.single_observation_space.low[where].min()
        assert float(high) == env.single_observation_space.high[where].max()
    assert "`Discrete(3)`: k: `world.strategies[k]` serves the slate." in text
    assert "0 specialist_0, 1 specialist_1, 2 mixed" in text
    assert "| each item with outcome `click` | 1 |" in text
    assert "| relative serving cost (`cost_weight`) | 0 |" in text
    assert "Horizon: 4 requests of 2 items. In this world users never leave" in text


def test_the_lines_that_make_it_make_it(shop):
    (code,) = re.findall(r"```python\n(.*?)```", page_of(SLOTS), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 3
    made = {}
    exec(compile(code, "page", "exec"), made)
    assert made["env"].action_space == gymnasium.spaces.MultiDiscrete([3, 3])


def test_what_was_not_measured_is_said_with_a_command_that_exists(shop):
    text = page_of(SLOTS)
    assert text.count("| not measured |") == len(COMPARED)
    assert "Not measured for this world; run `python -m experiments.validity" in text
    assert "(random, PPO): run `python -m experiments.scenario_scores --id MetaRec/MovieLens100K-Slots-v0`" in text
    # the last line names the command that wrote the page, here that of the tests
    modules = set(re.findall(r"python -m ([a-z_0-9.]+)", text.rpartition("Written by")[0]))
    assert {"experiments.compare", "experiments.scenario_scores", "experiments.validity"} <= modules
    assert all((ROOT / (module.replace(".", "/") + ".py")).is_file() for module in modules)
    deskdrop = world_command(SCENARIOS["MetaRec/Deskdrop-Select-v0"])
    wanted = "--world worlds/deskdrop --session-requests 5 --no-look --env retention_weight=1.0"
    assert deskdrop == f"python -m experiments.compare {wanted}"


def test_scores_come_from_a_comparison_of_this_world_and_these_settings_only(shop, tiny_world):
    runs = shop / "runs"
    finished(runs / "compare_other", comparison("another world"))
    finished(runs / "compare_sessions", comparison(tiny_world.hash, {"session_requests": 2}))
    other_slate = {"evaluation": {"slate_size": 3, "cost_weight": 0.0}}
    finished(runs / "compare_slate", comparison(tiny_world.hash), **other_slate)
    assert page_of(SELECT).count("| not measured |") == len(COMPARED)
    finished(runs / "compare_own", comparison(tiny_world.hash))
    text = page_of(SELECT)
    assert "| random | 0.000 [-0.500, 0.500] | +0.0 % [+0.0, +50.0] |" in text
    assert "| PPO | 5.000 [4.500, 5.500] | +50.0 % [+0.0, +50.0] |" in text
    assert "(compare_own; mean of 3 requests)" in text
    assert "not measured" not in section(text, "Reference scores")


def test_where_only_the_headroom_was_measured_lifts_stand_alone(shop, tiny_world):
    lift = {"estimate": 0.09, "low": 0.08, "high": 0.10}
    result = {"world": tiny_world.hash, "env": {}, "horizon": 3, "windows": {"@3": {"per-user oracle": lift}}}
    finished(shop / "runs" / "headroom_own", result)
    text = page_of(SELECT)
    assert "| per-user oracle | not measured | +9.0 % [+8.0, +10.0] |" in text
    assert "| PPO | not measured |  |" in text


def test_a_stored_table_counts_only_where_the_page_beside_it_names_the_world_and_the_settings(shop, tiny_world):
    results = shop / "results"
    results.mkdir()
    columns = "world,policy,kind,horizon,value,lo,hi,lift_sbs,lift_sbs_lo,lift_sbs_hi"
    rows = [
        "x,ppo,learned,2,9,9,9,9,9,9",
        "x,ppo,learned,3,1.5,1.4,1.6,0.08,0.07,0.09",
        "x,ppo,learned,last tenth,7,7,7,7,7,7",
    ]
    (results / "leaderboard_movielens_100k.csv").write_text("\n".join([columns, *rows]))
    beside = results / "leaderboard_movielens_100k.md"
    places = Places(shop / "runs", results)

    def ppo():
        return world_scores(SCENARIOS[SELECT], tiny_world.hash, places)[-1]

    command = "python -m experiments.compare --world worlds/movielens_100k"
    for hash_, extra in (
        ("0123", ""),
        (tiny_world.hash, " --session-requests 5"),
        (tiny_world.hash, " --no-such-flag"),
    ):
        beside.write_text(f"Command: `{command}{extra}`\n\nworld {hash_}\n")
        assert ppo().value == "not measured"
    beside.write_text(f"Command: `{command} --agents all`\n\nworld {tiny_world.hash}\n")
    assert (ppo().value, ppo().gain) == ("1.500 [1.400, 1.600]", "+8.0 % [+7.0, +9.0]")
    assert "leaderboard_movielens_100k.csv; mean of 3 requests" in ppo().source


def test_random_and_ppo_of_slots_are_measured_and_found(shop, tiny_world, capsys):
    args = scenario_scores.Args(id=SLOTS, seeds=1, steps=64, num_envs=4, replicates=1, quiet=True)
    row = scenario_scores.run(args)
    # 2 items, each of the own specialist (0.5), the other one (0.1) or `mixed` (0.3)
    assert row["rows"]["random"]["value"]["estimate"] == pytest.approx(0.6, abs=0.1)
    assert row["rows"]["single best"]["lift"]["estimate"] == 0.0
    assert scenario_scores.run(args) == row
    scores = section(page_of(SLOTS), "Reference scores")
    random = row["rows"]["random"]["value"]
    assert f"| random | {random['estimate']:.3f} [{random['low']:.3f}, {random['high']:.3f}] |" in scores
    assert "| per-user oracle | not measured |" in scores
    with pytest.raises(ValueError, match=r"expected one of \['MetaRec/MovieLens100K-Blend-v0'"):
        scenario_scores.run(replace(args, id=SELECT))


def test_the_verdict_on_this_very_world_is_quoted(shop, tiny_world):
    verdict = {"headline": "Good for tests", "sentences": ["Not for more."], "counts": {"pass": 3, "fail": 1}}
    report = {"schema": 1, "world": "another", "verdict": verdict}
    file = shop / "worlds" / "movielens_100k" / "validity.json"
    file.write_text(json.dumps(report))
    assert "Good for tests" not in page_of(SELECT)
    file.write_text(json.dumps({**report, "world": tiny_world.hash}))
    assert "**Good for tests.**\n\n- Not for more.\n\n3 pass, 1 fail" in page_of(SELECT)


def test_a_missing_or_damaged_world_is_skipped_with_its_reason_and_keeps_its_page(shop, capsys):
    kept = shop / "experiments" / "results" / "scenarios" / "Deskdrop-Select-v0.md"
    kept.parent.mkdir(parents=True)
    kept.write_text("an older page\n")
    written = run(Args(ids=("MetaRec/Deskdrop-Select-v0", SELECT)))
    assert [path.name for path in written] == ["MovieLens100K-Select-v0.md"]
    assert "skipped  MetaRec/Deskdrop-Select-v0: no world 'deskdrop'" in capsys.readouterr().out
    damaged = shop / "worlds" / "deskdrop"
    damaged.mkdir()
    (damaged / "world.json").write_text("{")
    assert run(Args(ids=("MetaRec/Deskdrop-Select-v0",))) == []
    assert "skipped  MetaRec/Deskdrop-Select-v0: worlds/deskdrop/world.json is damaged" in capsys.readouterr().out
    assert kept.read_text() == "an older page\n"
    with pytest.raises(ValueError, match=r"--ids names \['MetaRec/Nothing-v0'\]"):
        run(Args(ids=("MetaRec/Nothing-v0",)))


def test_pages_of_logs_read_their_own_measurements(shop):
    impressions().save(shop / "envs_data" / "open_bandit")
    log, _ = synthetic_log(0, n_users=60, n_items=40)
    log.save(shop / "envs_data" / "movielens_100k")
    number = {"estimate": 0.25, "low": 0.2, "high": 0.3}
    tables = {
        "shop/x": {
            "random": {"on_policy": number},
            "best_single": {"action": "random", **number},
            "by_context": {**number, "less_best_single": number},
        }
    }
    finished(shop / "runs" / "replay_own", {"tables": tables}, log="envs_data/open_bandit")
    gain = {"constant_default": {"gain": number}, "ppo": {"gain": number, "less_constant_default": number}}
    tuned = {"logs": {"envs_data/movielens_100k": gain}}
    finished(shop / "runs" / "tune_longer", tuned, metric="ranking", cost_weight=0.0, horizon=99)
    replay = page_of("MetaRec/OpenBandit-Replay-v0")
    assert "| random, its own rows | 0.2500 [0.2000, 0.3000] |" in replay
    assert "| chosen by context, all rows | 0.2500 [0.2000, 0.3000] | 0.2500 [0.2000, 0.3000] |" in replay
    assert "| ppo | not measured |" in page_of("MetaRec/MovieLens100K-Tune-v0")
    finished(shop / "runs" / "tune_own", tuned, metric="ranking", cost_weight=0.0, horizon=20)
    assert "| ppo | 0.2500 [0.2000, 0.3000] | 0.2500 [0.2000, 0.3000] |" in page_of("MetaRec/MovieLens100K-Tune-v0")


def test_the_page_of_deskdrop_says_how_long_sessions_are_and_what_coming_back_is_worth(shop, leaving_world):
    with_return(leaving_world).save(shop / "worlds" / "deskdrop")
    text = page_of("MetaRec/Deskdrop-Select-v0")
    assert "| a user back within 7 days (`retention_weight`) | 1 |" in text
    assert "Sessions have 5 requests; when the user is back: a model fitted to the log." in text
    assert "In this world users leave in a session." in text
