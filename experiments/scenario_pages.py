"""One page for each environment by name: what it simulates, its decision process, how far to believe it, reference scores.

    python -m experiments.scenario_pages
    python -m experiments.scenario_pages --ids MetaRec/MovieLens100K-Select-v0

Spaces, blocks and bounds are read from the environment, meanings from its docstring, weights from its world, scores from what
was measured (`experiments.scenario_references`). A scenario whose world or log is not there keeps its old page.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.run_folder import command_line, write_atomic
from experiments.scenario_references import NOT_MEASURED, Places, Score, replay_scores, tune_scores, world_scores
from metarec_gym.envs.scenarios import SCENARIOS, Scenario
from metarec_gym.places import commands, log_folder, world_folder

if TYPE_CHECKING:
    from metarec_gym.world import World


@dataclass(frozen=True)
class Args:
    """Writes the pages of the scenarios."""

    ids: tuple[str, ...] = tuple(SCENARIOS)
    """Registered ids."""
    runs: Path = Path("runs")
    """Folder of all runs, where scores are looked for."""
    results: Path = Path("experiments/results")
    """Folder of stored tables and validity reports."""
    out: Path = Path("experiments/results/scenarios")
    """Folder of the pages."""


def run(args: Args) -> list[Path]:
    """Writes the pages of those scenarios that can be made.

    Args:
        args: The command line.

    Returns:
        The pages written.

    Raises:
        ValueError: When an id is no scenario's.
    """
    unknown = sorted(set(args.ids) - set(SCENARIOS))
    if unknown:
        raise ValueError(f"--ids names {unknown}; there are {sorted(SCENARIOS)}")
    places, written = Places(args.runs, args.results), []
    for env_id in args.ids:
        scenario = SCENARIOS[env_id]
        try:
            folder = world_folder(scenario.log) if scenario.has_world else log_folder(scenario.log)
            text = page(scenario, folder, places)
        except (FileNotFoundError, ValueError) as error:
            # one world that is missing or damaged is no reason to leave the other pages out
            print(f"skipped  {env_id}: {error}")
            continue
        written.append(write_atomic(args.out / f"{env_id.removeprefix('MetaRec/')}.md", text))
        print(f"written  {written[-1]}")
    return written


def page(scenario: Scenario, folder: Path, places: Places) -> str:
    """The page of one scenario.

    Args:
        scenario: Which.
        folder: Of its world or log.
        places: Where results lie.
    """
    import gymnasium

    import metarec_gym  # noqa: F401  (registers the ids)

    env: Any = gymnasium.make_vec(scenario.id, num_envs=1, vectorization_mode="vector_entry_point").unwrapped
    doc = inspect.getdoc(type(env)) or ""
    history = section(doc, "Version history")
    parts = [
        f"# {scenario.id}",
        scenario.simulates,
        _origin(scenario, env, folder),
        "## Make it",
        _make(scenario),
        "## Action",
        _action(scenario, env),
        "## Observation",
        observation_table(env, doc),
        "## Reward",
        _reward(scenario, env, doc),
        "## Endings",
        _endings(scenario, env, doc),
        "## How far to believe it",
        belief(scenario, env, folder, places.results),
        "## Reference scores",
        _references(scenario, env, places),
        "## Version history",
        f"`{scenario.base_id}`: {history}\n\n`{scenario.id}`: v0, first release.",
        f"Written by `{command_line()}`.",
    ]
    env.close()
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- read from the environment


def section(doc: str, title: str) -> str:
    """The text below `## title` of a cleaned docstring, up to the next heading; '' where there is none."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", doc, re.DOTALL | re.MULTILINE)
    return found[1].strip() if found else ""


def meanings(doc: str) -> dict[str, str]:
    """What each block of the observation means, from the docstring's table `| block | width | bounds | meaning |`."""
    rows = (
        line.strip().strip("|").split("|") for line in section(doc, "Observations").splitlines() if line.startswith("|")
    )
    cells = [[cell.strip() for cell in row] for row in rows]
    return {row[0]: row[3] for row in cells if len(row) == 4 and row[0] != "block" and not row[0].startswith("--")}


def observation_table(env: Any, doc: str) -> str:
    """Blocks, widths and bounds as they are in this environment."""
    space, means = env.single_observation_space, meanings(doc)
    lines = [
        f"`Box({space.low.min():g}, {space.high.max():g}, {space.shape}, {space.dtype})`; `feature_slices` names the blocks.",
        "| block | entries | width | bounds | meaning |\n|---|---|---|---|---|",
    ]
    for name, where in env.feature_slices.items():
        low, high = float(space.low[where].min()), float(space.high[where].max())
        entries = f"{where.start}" if where.stop - where.start == 1 else f"{where.start} to {where.stop - 1}"
        width = where.stop - where.start
        lines[-1] += f"\n| {name} | {entries} | {width} | {low:g} to {high:g} | {means.get(name, '')} |"
    return "\n\n".join(lines)


def _origin(scenario: Scenario, env: Any, folder: Path) -> str:
    if not scenario.has_world:
        source = getattr(env, "table", None) or env.data
        rows = f", {source.n_rows:,} rows" if scenario.family == "Replay" else ""
        sizes = f", {source.n_users} users and {source.n_items} items of it" if scenario.family == "Tune" else ""
        return f"From the log `{source.name}`{rows}{sizes}."
    world: World = env.world
    card = world.card
    title = card.get("title", world.name)
    counts = f"{world.n_users:,} users, {world.n_items:,} items, {world.n_strategies} strategies"
    lines = [f"From {title}: world `{world.hash}`, {counts}."]
    lines += [f"{name.capitalize()}: {card[name]}" for name in ("source", "licence", "citation") if card.get(name)]
    return "\n\n".join(lines)


def _make(scenario: Scenario) -> str:
    steps = commands(scenario.log, world=Path("worlds") / scenario.log if scenario.has_world else None)
    shell = "\n".join(steps)
    code = f'import gymnasium as gym\nimport metarec_gym\n\nenv = gym.make("{scenario.id}")'
    return f"Once, from the repository's root:\n\n```\n{shell}\n```\n\nThen:\n\n```python\n{code}\n```"


def _action(scenario: Scenario, env: Any) -> str:
    space = env.single_action_space
    table = section(inspect.getdoc(type(env)) or "", "Actions")
    if scenario.has_world:
        # the other two families' rows say nothing of this one
        rows = [line for line in table.splitlines() if f"`{scenario.base_id}`" in line]
        meaning = rows[0].strip("|").split("|")[-1].strip() if rows else ""
        names = ", ".join(f"{k} {name}" for k, name in enumerate(env.strategy_names))
        return f"`{space}`: {meaning}.\n\nStrategies: {names}."
    names = f"\n\nActions: {', '.join(env.action_names)}." if scenario.family == "Replay" else ""
    return f"`{space}`{names}\n\n{table}"


def _reward(scenario: Scenario, env: Any, doc: str) -> str:
    text = section(doc, "Reward")
    if not scenario.has_world:
        return text
    world: World = env.world
    weights = zip(world.outcomes, world.tensors["outcome_weights"].tolist(), strict=True)
    rows = [(f"each item with outcome `{name}`", f"{weight:g}") for name, weight in weights]
    # `0.0 -` keeps a weight of nothing from being written as -0
    least, most = (f"{0.0 - weight:g}" for weight in env.config.cost_range)
    rows.append(("relative serving cost (`cost_weight`)", least if least == most else f"{least} to {most}"))
    rows.append(("relative latency (`latency_weight`)", f"{0.0 - env.config.latency_weight:g}"))
    if env.config.session_requests is not None:
        within = f"a user back within {env.config.retention_days:g} days (`retention_weight`)"
        rows.append((within, f"{env.config.retention_weight:g}"))
    table = "\n".join(f"| {what} | {weight} |" for what, weight in rows)
    return f"| part | weight |\n|---|---|\n{table}\n\n{text}"


def _endings(scenario: Scenario, env: Any, doc: str) -> str:
    lines = [f"Horizon: {env.horizon} steps."]
    if scenario.has_world:
        lines = [f"Horizon: {env.horizon} requests of {env.slate_size} items."]
        judge = env.world.judge(env.config.fold, env.config.judge)
        leaves = "leave" if env.config.patience is not None or judge.has_leaving else "never leave"
        lines[0] += f" In this world users {leaves} in a session."
        if env.config.session_requests is not None:
            fitted = "a model fitted to the log" if judge.has_return else "a day, and surely: the log does not say"
            lines.append(f"Sessions have {env.config.session_requests} requests; when the user is back: {fitted}.")
    return "\n\n".join([*lines, section(doc, "Episode end")])


# ---- read from what was measured


def belief(scenario: Scenario, env: Any, folder: Path, results: Path) -> str:
    """What the validity report of this very world says, or how to get one."""
    import json

    from metarec_gym.evaluation.validity.findings import read_validity

    if scenario.family == "Tune":
        return "A real training of a small model on real events: nothing is simulated, but the subsample is small."
    if scenario.family == "Replay":
        return (
            "No users are simulated: rewards are those of the log. Whether the logged chances are right is checked by "
            "`python -m experiments.replay`: a strategy's value from the others' rows must agree with that from its own. What "
            "earlier choices do to later contexts cannot be seen in it."
        )
    found = read_validity(folder, env.world.hash)
    stored = results / f"validity_{scenario.log}.json"
    if found is None and stored.is_file():
        kept = json.loads(stored.read_text())
        found = kept if kept.get("world") == env.world.hash else None
    command = f"`python -m experiments.validity --world worlds/{scenario.log} --log envs_data/{scenario.log}`"
    if found is None:
        return f"Not measured for this world; run {command}."
    verdict = found["verdict"]
    sentences = "\n".join(f"- {sentence}" for sentence in verdict["sentences"])
    counts = ", ".join(f"{count} {result}" for result, count in verdict["counts"].items())
    return f"**{verdict['headline']}.**\n\n{sentences}\n\n{counts}; measured by {command}."


def _references(scenario: Scenario, env: Any, places: Places) -> str:
    if scenario.has_world:
        scores = world_scores(scenario, env.world.hash, places)
        head = ("policy", "utility/request [95 % CI]", "lift over the single best strategy")
        notes = [
            "Utility: expected reward a request, zero after leaving, on users and a judge that training did not meet."
        ]
        if scenario.family != "Select":
            notes.append(
                "Single best strategy, non-personal rule and oracles give a request to one strategy, which this environment "
                f"allows: they are those of `MetaRec/{scenario.title}-Select-v0`. A fusion or a mixed slate may be above them."
            )
    elif scenario.family == "Tune":
        settings = {name: getattr(env.config, name) for name in ("metric", "cost_weight", "horizon")}
        scores = tune_scores(scenario, settings, places)
        head = ("method", "gain of the held-out metric over a run [95 % CI]", "less constant_default")
        notes = ["All methods have the same budget of training runs; played on initialisations that none was tuned on."]
    else:
        scores = replay_scores(scenario, env.table.name, env.action_names, places)
        head = ("policy", "mean reward a request [95 % CI]", "less the single best")
        notes = []
    return "\n\n".join([*notes, score_table(head, scores)])


def score_table(head: tuple[str, str, str], scores: Sequence[Score]) -> str:
    """The table, and below it where the numbers come from and how to get those that are missing."""
    lines = [f"| {' | '.join(head)} |\n|---|---|---|"]
    lines[0] += "".join(f"\n| {score.name} | {score.value} | {score.gain} |" for score in scores)
    sources = dict.fromkeys(score.source for score in scores if score.source)
    lines += [f"Measured by {source}." for source in sources]
    missing: dict[str, list[str]] = {}
    for score in scores:
        if score.value == NOT_MEASURED:
            missing.setdefault(score.run, []).append(score.name)
    lines += [f"Not measured ({', '.join(names)}): run `{command}`." for command, names in missing.items()]
    return "\n\n".join(lines)


def main() -> None:
    """The command line."""
    import tyro

    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
