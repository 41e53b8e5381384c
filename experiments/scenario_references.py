"""Reference scores of a scenario, read from what was measured; nothing is measured here and nothing is made up.

| family | scores | from |
|---|---|---|
| Select | random, single best, rule, oracles, PPO | `runs/compare_*`; stored `leaderboard_<world>`; `runs/headroom_*` |
| Blend, Slots | random, PPO | `runs/scores_*`; what one strategy a request reaches: as Select |
| Tune | schedules, searches, PPO | `runs/tune_*` |
| Replay | every logged action, the best, a choice by context | `runs/replay_*` |

A result counts only if it is of the same world (by hash) or log and of the scenario's own settings.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarec_gym.envs.scenarios import Scenario

NOT_MEASURED = "not measured"
COMPARED = (
    ("random", ("random",)),
    ("single best strategy", ("SBS",)),
    ("best non-personal rule", ("SCHED",)),
    ("per-user oracle", ("per-user oracle",)),
    ("greedy oracle", ("greedy oracle",)),
    ("PPO", ("ppo", "sb3_ppo")),
)
"""What a page shows, and what it is called in a comparison, the first that is there."""


@dataclass(frozen=True)
class Score:
    """One line of the table."""

    name: str
    """What played."""
    value: str = NOT_MEASURED
    """Score with its interval."""
    gain: str = ""
    """Against the family's reference, with its interval."""
    source: str = ""
    """Where it was measured: a command, and its run or file."""
    run: str = ""
    """The command to run where it was not measured."""


@dataclass(frozen=True)
class Places:
    """Where results lie."""

    runs: Path
    """Folder of all runs."""
    results: Path
    """Folder of the stored tables."""


def world_command(scenario: Scenario) -> str:
    """The comparison that measures a scenario's Select."""
    command = ["python", "-m", "experiments.compare", "--world", f"worlds/{scenario.log}"]
    settings = dict(scenario.settings)
    sessions = settings.pop("session_requests", None)
    # episodes of several sessions rank again and again: the look-ahead reference would take hours
    command += [] if sessions is None else ["--session-requests", str(sessions), "--no-look"]
    command += ["--env", *(f"{name}={json.dumps(settings[name])}" for name in sorted(settings))] if settings else []
    return shlex.join(command)


def world_scores(scenario: Scenario, world_hash: str, places: Places) -> list[Score]:
    """Scores of a scenario that runs on a world.

    Args:
        scenario: Of Select, Blend or Slots.
        world_hash: Hash of its world.
        places: Where results lie.
    """
    command = world_command(scenario)
    found = _compared(scenario, world_hash, places)
    scores = [found.get(name) or Score(name, run=command) for name, _ in COMPARED]
    if scenario.family == "Select":
        return scores
    own = _measured(scenario, world_hash, places)
    own_command = shlex.join(["python", "-m", "experiments.scenario_scores", "--id", scenario.id])
    for index, score in enumerate(scores):
        if score.name in ("random", "PPO"):
            scores[index] = own.get(score.name) or Score(score.name, run=own_command)
        elif score.name == "single best strategy" and score.value == NOT_MEASURED and score.name in own:
            scores[index] = own[score.name]
    return scores


def _results(runs: Path, prefix: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Finished runs of a kind, the newest first."""
    files = sorted(runs.glob(f"{prefix}*/result.json"), key=lambda file: (file.stat().st_mtime_ns, file), reverse=True)
    for file in files:
        yield file, json.loads(file.read_text())


def _source(file: Path, horizon: int | None = None) -> str:
    command = file.with_name("command.txt")
    said = command.read_text().strip() if command.is_file() else "a command that was not kept"
    return f"`{said}` ({file.parent.name}{_over(horizon)})"


def _over(horizon: int | None) -> str:
    return "" if horizon is None else f"; mean of {horizon} requests"


def _number(row: Mapping[str, float], digits: int = 3) -> str:
    return f"{row['estimate']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def _percent(row: Mapping[str, float]) -> str:
    return f"{100 * row['estimate']:+.1f} % [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


# ---- Select


def _compared(scenario: Scenario, world_hash: str, places: Places) -> dict[str, Score]:
    for file, result in _results(places.runs, "compare_"):
        if result.get("world") != world_hash or result.get("env", {}) != scenario.settings or not _plain(file):
            continue
        horizon = result["headroom"]["horizon"]
        rows = {row["policy"]: row["windows"].get(f"@{horizon}") for row in result["rows"]}
        found = {}
        for name, called in COMPARED:
            window = next((rows[policy] for policy in called if rows.get(policy)), None)
            if window is not None:
                found[name] = Score(
                    name, _number(window["value"]), _percent(window["lift_sbs"]), _source(file, horizon)
                )
        if found:
            return found
    return _stored(scenario, world_hash, places) or _headroom(scenario, world_hash, places.runs)


def _headroom(scenario: Scenario, world_hash: str, runs: Path) -> dict[str, Score]:
    """Lifts alone, where only the headroom was measured."""
    for file, result in _results(runs, "headroom_"):
        horizon = result["horizon"]
        window = result["windows"].get(f"@{horizon}")
        if result.get("world") == world_hash and result.get("env", {}) == scenario.settings and window and _plain(file):
            names = {name for name, _ in COMPARED}
            command = world_command(scenario)
            return {
                name: Score(name, gain=_percent(row), source=_source(file, horizon), run=command)
                for name, row in window.items()
                if name in names
            }
    return {}


def _plain(file: Path) -> bool:
    """Whether a comparison or headroom left slate and cost as the world has them."""
    evaluation = json.loads(file.with_name("args.json").read_text())["args"]["evaluation"]
    return evaluation["slate_size"] is None and evaluation["cost_weight"] == 0


def _stored(scenario: Scenario, world_hash: str, places: Places) -> dict[str, Score]:
    """From the table that the repository keeps; the page beside it says of which world and settings it is."""
    table = places.results / f"leaderboard_{scenario.log}.csv"
    beside = table.with_suffix(".md")
    if not table.is_file() or not beside.is_file():
        return {}
    text = beside.read_text()
    command = re.search(r"`(python -m experiments\.compare [^`]*)`", text)
    if world_hash not in text or command is None or _settings_of(command[1]) != scenario.settings:
        return {}
    with table.open(newline="") as lines:
        every = [row for row in csv.DictReader(lines) if row["horizon"].isdigit()]
    horizon = max((int(row["horizon"]) for row in every), default=0)
    rows = {row["policy"]: row for row in every if row["horizon"] == str(horizon)}
    found = {}
    for name, called in COMPARED:
        row = next((rows[policy] for policy in called if policy in rows), None)
        if row is not None:
            value = {"estimate": float(row["value"]), "low": float(row["lo"]), "high": float(row["hi"])}
            ends = {"estimate": "lift_sbs", "low": "lift_sbs_lo", "high": "lift_sbs_hi"}
            gain = {end: float(row[column]) for end, column in ends.items()}
            found[name] = Score(name, _number(value), _percent(gain), f"`{command[1]}` ({table.name}{_over(horizon)})")
    return found


def _settings_of(command: str) -> dict[str, Any] | None:
    """Settings of the environment that a comparison's command asks for; None when it cannot be read or changes slate or cost."""
    import tyro

    from experiments.compare import Args
    from experiments.headroom import settings_of

    try:
        args = tyro.cli(Args, args=shlex.split(command)[3:], config=(tyro.conf.OmitArgPrefixes,), console_outputs=False)
        evaluation = settings_of(args)
    except (SystemExit, ValueError):
        return None
    return evaluation.env if evaluation.slate_size is None and evaluation.cost_weight == 0 else None


# ---- Blend and Slots


def _measured(scenario: Scenario, world_hash: str, places: Places) -> dict[str, Score]:
    title = f"scores_{scenario.id.removeprefix('MetaRec/')}"
    names = {"random": "random", "single best": "single best strategy", "ppo": "PPO"}
    for file, result in _results(places.runs, title):
        if result.get("world") == world_hash and result.get("id") == scenario.id:
            return {
                names[name]: Score(
                    names[name], _number(row["value"]), _percent(row["lift"]), _source(file, result["horizon"])
                )
                for name, row in result["rows"].items()
            }
    return {}


# ---- Tune and Replay


def tune_scores(scenario: Scenario, settings: Mapping[str, Any], places: Places) -> list[Score]:
    """Gains of the held-out metric over a run, and what they are above the default constant.

    Args:
        scenario: Of Tune.
        settings: The environment's metric, cost_weight and horizon, which the measurement must have had.
        places: Where results lie.
    """
    command = shlex.join(["python", "-m", "experiments.tune", "--logs", f"envs_data/{scenario.log}"])
    for file, result in _results(places.runs, "tune_"):
        asked = json.loads(file.with_name("args.json").read_text())["args"]
        rows = next((rows for name, rows in result["logs"].items() if Path(name).name == scenario.log), None)
        if rows is None or any(asked.get(name) != value for name, value in settings.items()):
            continue
        scores = []
        for method, row in rows.items():
            less = row.get("less_constant_default")
            gain = "" if less is None else _number(less, 4)
            scores.append(Score(method, _number(row["gain"], 4), gain, _source(file)))
        return scores
    return [Score(name, run=command) for name in ("constant_default", "cosine_default", "search_constant", "ppo")]


def replay_scores(scenario: Scenario, table: str, actions: tuple[str, ...], places: Places) -> list[Score]:
    """Mean reward of each logged action on its own rows, of the best one and of a choice by context on all rows.

    Args:
        scenario: Of Replay.
        table: Name of the environment's table.
        actions: Its actions.
        places: Where results lie.
    """
    command = shlex.join(["python", "-m", "experiments.replay", "--log", f"envs_data/{scenario.log}"])
    for file, result in _results(places.runs, "replay_"):
        asked = json.loads(file.with_name("args.json").read_text())["args"]
        rows = result["tables"].get(table)
        if rows is None or Path(asked["log"]).name != scenario.log:
            continue
        scores = [
            Score(f"{action}, its own rows", _number(rows[action]["on_policy"], 4), "", _source(file))
            for action in actions
            if action in rows
        ]
        best, chosen = rows["best_single"], rows["by_context"]
        scores.append(Score(f"single best ({best['action']}), all rows", _number(best, 4), "", _source(file)))
        gain = _number(chosen["less_best_single"], 4)
        scores.append(Score("chosen by context, all rows", _number(chosen, 4), gain, _source(file)))
        return scores
    names = [f"{action}, its own rows" for action in actions] + ["single best, all rows", "chosen by context, all rows"]
    return [Score(name, run=command) for name in names]
