"""The strategies played against other judges and under settings that the log cannot tell: does the answer stay?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metarec_gym.evaluation.headroom import FOLDS, EvalSettings, Headroom, measure_headroom
from metarec_gym.evaluation.intervals import Floats, Interval, ratio_interval
from metarec_gym.evaluation.metrics import lift
from metarec_gym.evaluation.rollout import per_user
from metarec_gym.evaluation.tasks import Arrays, Task, advance, run_tasks
from metarec_gym.evaluation.validity.checks import rank_correlation
from metarec_gym.evaluation.validity.findings import MAX_LOSS, MOVES, OPEN, STAYS, UNCLEAR, headroom_verdict
from metarec_gym.evaluation.validity.sample import judges_of
from metarec_gym.response.position import PRIOR_DECAY

if TYPE_CHECKING:
    from metarec_gym.world import World


@dataclass(frozen=True)
class Variation:
    """A way to play the world that its log cannot rule out.

    Attributes:
        name: Short name.
        label: In words.
        env: Settings of the environment.
    """

    name: str
    label: str
    env: Mapping[str, Any] = field(default_factory=dict)


MAIN = Variation("main", "as built")


def judge_variations(world: World) -> list[Variation]:
    """The second family, where the world has one."""
    names = world.judge_names("A")
    return [Variation("second", "judges of a second family", {"judge": "second"})] if "second" in names else []


def variations(world: World, *, quick: bool = False) -> list[Variation]:
    """Everything that the sensitivity table varies and this world can do."""
    names = world.judge_names("A")
    if any(not judges_of(world, fold) for fold in FOLDS):
        return []
    found = judge_variations(world)
    samplers = [n for n in ("uniform", "sqrt_popularity", "popularity") if n in names]
    found += [Variation(n, f"negatives drawn by {n.replace('_', ' ')}", {"judge": n}) for n in samplers]
    found += [
        Variation("base_rate_half", "half the base rate", {"base_rate_factor": 0.5}),
        Variation("base_rate_double", "twice the base rate", {"base_rate_factor": 2.0}),
    ]
    if quick:
        return found
    found += [
        Variation("fatigue", "fatigue: a logit lost per unit of exposure", {"fatigue": 1.0}),
        Variation("patience", "patience: half leave after 5 requests with nothing taken", {"patience": 5.0}),
        Variation("position", "places further down are seen less", {"position_decay": PRIOR_DECAY}),
    ]
    if world.horizon > 1:
        size = max(world.horizon // 4, 1)
        found.append(
            Variation("sessions", f"sessions of {size} requests, lists ranked anew", {"session_requests": size})
        )
    return found


def play_part(
    world: World,
    variation: Variation,
    settings: EvalSettings,
    *,
    folder: Path | None,
    source: str | Path | None,
    workers: int,
    progress: bool,
) -> dict[str, Any]:
    """Plays every strategy, the oracles and the rules under a variation.

    Args:
        world: The world.
        variation: What is varied.
        settings: How; its own environment settings are kept.
        folder: Where plays are kept.
        source: The world's folder, which workers read.
        workers: Processes.
        progress: Shows bars.

    Returns:
        Values of the strategies (all users, and by fold), the headrooms with intervals, and the verdict before training.
    """
    asked = replace(settings, env={**settings.env, **variation.env})
    headroom = measure_headroom(
        world, asked, folder=folder, source=source, workers=workers, device="cpu", progress=progress
    )
    at = headroom.headline
    by_fold = {f: per_user(p.user, p.fixed.mean(axis=1))[:, :, at] for f, p in headroom.folds.items()}
    pooled = np.concatenate([by_fold[fold] for fold in FOLDS])
    found: dict[str, Any] = {
        "name": variation.name,
        "label": variation.label,
        "env": dict(variation.env),
        "horizon": headroom.horizon,
        "values": dict(zip(world.strategies, pooled.mean(axis=0).tolist(), strict=True)),
        "values_by_fold": {
            f: dict(zip(world.strategies, v.mean(axis=0).tolist(), strict=True)) for f, v in by_fold.items()
        },
        "user_values": {f: np.round(v, 6).tolist() for f, v in by_fold.items()},
        "best": world.strategies[int(pooled.mean(axis=0).argmax())],
        "sbs": headroom.sbs_name,
        "sched": headroom.sched_name,
        "headrooms": {name: interval.to_json() for name, interval in headroom.headrooms().items()},
        "headrooms_by_fold": {
            fold: {name: interval.to_json() for name, interval in _of_fold(headroom, fold).items()} for fold in FOLDS
        },
        "verdict": headroom_verdict(headroom.headrooms()),
        "verdict_by_fold": {fold: headroom_verdict(_of_fold(headroom, fold)) for fold in FOLDS},
        "users": len(pooled),
    }
    if headroom.look is None:
        found["long_term"] = {"note": "Looking ahead was not played."}
    else:
        gain = headroom.look.over_greedy(at)
        found["long_term"] = {**gain.to_json(), "users": headroom.look.users, "ahead": headroom.look.rule.ahead}
    return found


def vary_task(source: str | Path, variation: Variation, settings: EvalSettings, folder: Path | None) -> Arrays:
    """One task: `play_part` as JSON text, or why this world cannot play the variation."""
    from metarec_gym.world import resolve_world

    try:
        found = play_part(
            resolve_world(source), variation, settings, folder=folder, source=source, workers=1, progress=False
        )
    except ValueError as error:
        note = f"This world cannot play it: {error}."
        found = {"name": variation.name, "label": variation.label, "note": note}
    advance(1)
    return {"json": np.array(json.dumps(found))}


def play_variations(
    source: str | Path,
    chosen: Sequence[Variation],
    settings: EvalSettings,
    *,
    folder: Path,
    workers: int,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Plays variations side by side; what is in `folder` is found again.

    Args:
        source: The world's folder.
        chosen: What to play.
        settings: How.
        folder: Where results and plays are kept.
        workers: Processes, a variation each.
        progress: Shows a bar with the time left.

    Returns:
        What `play_part` returns, by name.
    """
    tasks = [
        Task(
            f"vary_{variation.name}",
            vary_task,
            {"source": source, "variation": variation, "settings": settings, "folder": folder / "plays"},
        )
        for variation in chosen
    ]
    done = run_tasks(
        tasks,
        folder=folder,
        workers=workers,
        title="variations of the world",
        progress=progress,
        unit="variation",
        spawn_above=2,
    )
    return {v.name: json.loads(str(done[task.key]["json"])) for v, task in zip(chosen, tasks, strict=True)}


def _of_fold(headroom: Headroom, fold: str) -> dict[str, Interval]:
    """The headrooms on one fold's users alone, with its judge."""
    at, user = headroom.headline, headroom.folds[fold].user

    def mean(value: Floats) -> Floats:
        return per_user(user, np.nanmean(value, axis=1))[:, at]

    sbs = mean(headroom.sbs_value()[fold])
    raced = mean(headroom.sbs_value(raced=True)[fold])
    return {
        "per-user oracle": lift(mean(headroom.oracle_value(raced=True)[fold]), raced),
        "greedy oracle": lift(mean(headroom.greedy[fold].value), sbs),
        "best non-personal rule": lift(mean(headroom.sched[fold].value), sbs),
    }


def judges_part(main: Mapping[str, Any], second: Mapping[str, Any] | None) -> dict[str, Any]:
    """Whether judges agree on the strategies' values, the best strategy and the verdict.

    Args:
        main: Plays with the main judges.
        second: Plays with judges of a second family; None without.

    Returns:
        JSON-able: `train_test` (the two main judges, each with its own users) and `second` (other judges, same users), each
        with the rank correlation of the strategies' values, what is lost by taking the one's best strategy where the other
        rules (an interval over users), and both verdicts.
    """
    names = list(main["values"])
    a, b = (_users(main, fold) for fold in FOLDS)
    values = {"A": a, "B": b, "main": np.concatenate([a, b])}
    verdicts = main["verdict_by_fold"]
    found: dict[str, Any] = {
        "strategies": names,
        "train_test": _agreement(a, b, names) | {"verdict": verdicts["A"], "verdict_other": verdicts["B"]},
        "second": {"note": "The world was built without judges of a second family."},
    }
    if second is not None and "note" in second:
        found["second"] = {"note": second["note"]}
    elif second is not None:
        values["second"] = _users(second)
        found["second"] = _agreement(values["main"], values["second"], names) | {
            "verdict": main["verdict"],
            "verdict_other": second["verdict"],
        }
    found["values"] = {key: value.mean(axis=0).tolist() for key, value in values.items()}
    return found


def _users(played: Mapping[str, Any], *folds: str) -> Floats:
    """Value of every strategy for every user, (users, K)."""
    return np.concatenate([np.asarray(played["user_values"][fold], dtype=np.float64) for fold in folds or FOLDS])


def _agreement(one: Floats, other: Floats, names: list[str]) -> dict[str, Any]:
    best, best_other = int(one.mean(axis=0).argmax()), int(other.mean(axis=0).argmax())
    lost = [_lost(other, best), _lost(one, best_other)]
    worst = max(lost, key=lambda i: i.estimate)
    return {
        "rank_correlation": rank_correlation(one.mean(axis=0), other.mean(axis=0)),
        "best": names[best],
        "best_other": names[best_other],
        "lost_by_swapping_best": worst.estimate,
        "lost_low": worst.low,
        "lost_high": worst.high,
    }


def _lost(values: Floats, choice: int) -> Interval:
    """Share of the best strategy's value that is lost by another choice, with an interval over users."""
    best = int(values.mean(axis=0).argmax())
    if best == choice or float(values[:, best].mean()) <= 0.0:
        return Interval(0.0, 0.0, 0.0, 0.0, float(len(values) - 1), 0.95, 1, len(values))
    return ratio_interval(values[:, best] - values[:, choice], values[:, best])


def sensitivity_rows(played: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The sensitivity table: each variation's headrooms, best strategy and verdict, and whether the answer moved.

    A variation `moves` the answer when it says the opposite of the world as built, or when its best strategy is surely worth
    2 % less than the best one there; `unclear` when one of the two cannot tell; else it `stays`.

    Args:
        played: Plays by name of the variation, `main` among them.

    Returns:
        One JSON-able row each.
    """
    main = played["main"]
    names, values = list(main["values"]), _users(main)
    rows = []
    for name, row in played.items():
        if "note" in row:
            rows.append({key: row[key] for key in ("name", "label", "note")})
            continue
        lost = _lost(values, names.index(row["best"]))
        kinds = {row["verdict"], main["verdict"]}
        if lost.low > MAX_LOSS or (len(kinds) == 2 and OPEN not in kinds):
            answer = MOVES
        else:
            answer = STAYS if len(kinds) == 1 and lost.estimate <= MAX_LOSS else UNCLEAR
        rows.append(
            {
                "name": name,
                "label": row["label"],
                "env": row["env"],
                "sbs": row["sbs"],
                "best": row["best"],
                "sbs_value": row["values"][row["best"]],
                "headrooms": row["headrooms"],
                "verdict": row["verdict"],
                "other_best_loses": lost.to_json(),
                "answer": answer,
                "moved": answer == MOVES,
            }
        )
    return rows
