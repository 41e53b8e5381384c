r"""What would another policy have earned? Answered from a production log alone: no simulator, no model of users is believed.

A log that says which `strategy` served each request, and with what `propensity` (its chance of being chosen), can value any
other way of choosing among the same strategies:

    python -m envs_data.own_log.prepare --path my.csv --user uid --item sku --time ts --outcome click=event:click \
        --shown event:impression --strategy strategy --propensity chance --name shop --out logs/shop
    python -m experiments.off_policy --log logs/shop

values every strategy served to everyone, and the uniform choice, beside what the log itself earned. Rows of one user, time and
strategy are one request; its reward is their weighted sum. More policies:

* `--rule "fresh=earlier_requests<3:popular:sasrec"`: popular where a user had fewer than 3 requests before, else sasrec.
  Columns are those of `requests.parquet` in the run's folder. A rule is to be fixed beforehand, or found on other users' logs:
  one that was picked because it looks good here, looks too good.
* `--policy table.parquet`: any policy at all, as its probabilities: columns `request` (the number in `requests.parquet`),
  `strategy`, `probability`; pairs left out are 0. Run once without it, take `requests.parquet` (user, time, strategy, context),
  ask your policy what it would have done at each of these moments, write the answers down. This is how a policy that was learned
  in `MetaRec/Select-v0` is valued: its observation holds the strategies' ranked lists at that moment, which a log of outcomes
  does not keep; the system that serves it can compute them, this command cannot.
* `--policy policy.safetensors`: a policy exported from `MetaRec/Replay-v0` on a log with the same context and strategies. It
  meets every request as the first of an episode.

Out come a table (every estimator x policy: value, 95 % intervals, difference to the log's own value, effective rows, largest
weight) as `off_policy.html` and `off_policy.md`, `overlap.png`, `result.json`. **Claims rest on DR, named beforehand**; p-values
of its differences are adjusted for the number of policies (Holm); the other estimators say how much the answer depends on the
method. The empirical Bernstein bounds hold for any sample size and any overlap.

Without propensities: `--estimate-propensities`, and read every number with the warning that is printed beside it.

What no log can answer: what happens after many requests of another policy (contexts are those that the logger met), what
strategies would do that never served, and what is decided by something that the log does not hold.

For Open Bandit (`python -m envs_data.open_bandit.prepare`) it is run in both directions, from each of its two policies' logs to
the other policy, beside the mean that the other policy really earned:

    python -m experiments.off_policy --log envs_data/open_bandit
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.run_folder import RunFolder, code_hash, command_line, versions, write_atomic

if TYPE_CHECKING:
    import pandas as pd

    from metarec_gym.data.impressions import ImpressionTable
    from metarec_gym.data.interactions import InteractionLog
    from metarec_gym.evaluation.intervals import Floats, Interval
    from metarec_gym.evaluation.off_policy.bandit_log import BanditLog
    from metarec_gym.evaluation.off_policy.evaluation import PolicyValue

CODE = (
    "experiments/off_policy.py",
    "metarec_gym/evaluation/off_policy",
    "metarec_gym/evaluation/intervals.py",
    "metarec_gym/envs/replay_table.py",
)
RULE = re.compile(r"(?P<name>[^=]+)=(?P<column>[^<]+)<(?P<edge>[^:]+):(?P<below>[^:]+):(?P<other>[^:]+)")
TABLE_COLUMNS = ("request", "strategy", "probability")
AVERAGED = "the target's chances change over time and are known on its own rows only: means by item and place stand in"


@dataclass(frozen=True)
class Args:
    """Values policies on a production log."""

    log: Path
    """Folder of a prepared log with strategies, or of Open Bandit."""
    policy: tuple[Path, ...] = ()
    """Policies: Parquet of (request, strategy, probability), or safetensors exported from MetaRec/Replay-v0."""
    rule: tuple[str, ...] = ()
    """Rules NAME=COLUMN<NUMBER:STRATEGY_IF_BELOW:STRATEGY_ELSE."""
    family: tuple[str, ...] = ()
    """Families STRATEGY=FAMILY of all strategies, for MIPS."""
    estimate_propensities: bool = False
    """Estimate propensities that the log lacks from its context."""
    level: float = 0.95
    """Confidence level."""
    samples: int = 1000
    """Bootstrap samples."""
    seed: int = 0
    """Folds of the reward model, and bootstrap."""
    runs: Path = Path("runs")
    """Folder of all runs."""


# ---- policies


def rule_probs(rule: str, log: BanditLog, requests: pd.DataFrame) -> tuple[str, Floats]:
    """A rule's name and its probabilities (n_rows, K).

    Args:
        rule: NAME=COLUMN<NUMBER:STRATEGY_IF_BELOW:STRATEGY_ELSE.
        log: The log.
        requests: Its requests, in the same order.

    Raises:
        ValueError: When the rule cannot be read, or names a column or strategy that is not there.
    """
    from metarec_gym.evaluation.off_policy.bandit_log import context_columns, target_probs

    found = RULE.fullmatch(rule)
    columns = ["earlier_requests", *context_columns(requests)]
    if found is None or found["column"] not in columns:
        raise ValueError(
            f"the rule {rule!r} cannot be read; expected NAME=COLUMN<NUMBER:STRATEGY_IF_BELOW:STRATEGY_ELSE with a column of "
            f"{', '.join(columns)}"
        )
    try:
        edge = float(found["edge"])
    except ValueError:
        raise ValueError(f"the rule {rule!r} compares with {found['edge']!r}, expected a number") from None
    below = requests[found["column"]].to_numpy(dtype=np.float64) < edge
    return found["name"], np.where(below[:, None], target_probs(log, found["below"]), target_probs(log, found["other"]))


def table_probs(path: Path, log: BanditLog) -> Floats:
    """Probabilities (n_rows, K) from a Parquet file of (request, strategy, probability).

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it does not describe one distribution for every request.
    """
    import pandas as pd

    from metarec_gym.evaluation.off_policy.bandit_log import target_probs

    if not path.is_file():
        raise FileNotFoundError(f"no policy at {path}; write one with the columns {', '.join(TABLE_COLUMNS)}")
    table = pd.read_parquet(path)
    missing = [column for column in TABLE_COLUMNS if column not in table.columns]
    if missing:
        raise ValueError(f"{path} lacks the column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    number = {name: k for k, name in enumerate(log.actions)}
    unknown = sorted(set(table["strategy"].astype(str)) - set(number))
    if unknown:
        raise ValueError(
            f"{path} names strategies {unknown} that never served in the log; it has {', '.join(log.actions)}"
        )
    request = table["request"].to_numpy(dtype=np.int64)
    if request.min() < 0 or request.max() >= log.n_rows or table.duplicated(["request", "strategy"]).any():
        raise ValueError(
            f"{path} must name each pair of request (0..{log.n_rows - 1}, see requests.parquet) and strategy once at most"
        )
    probs = np.zeros((log.n_rows, log.n_actions))
    probs[request, table["strategy"].astype(str).map(number).to_numpy()] = table["probability"].to_numpy(
        dtype=np.float64
    )
    lacking = np.flatnonzero(probs.sum(axis=1) == 0.0)
    if len(lacking):
        raise ValueError(
            f"{path} says nothing of {len(lacking)} requests (first: {lacking[0]}); each needs its probabilities"
        )
    return target_probs(log, probs)


def exported_probs(path: Path, log: BanditLog, context_names: Sequence[str]) -> Floats:
    """Probabilities (n_rows, K) of a policy exported from `MetaRec/Replay-v0`; each request is the first of an episode.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the policy has other strategies or observations.
    """
    import torch

    from metarec_gym.envs.replay import first_observations
    from metarec_gym.envs.replay_table import ReplayTable
    from metarec_gym.evaluation.off_policy.bandit_log import target_probs
    from metarec_gym.evaluation.off_policy.cross_fitting import one_hot
    from metarec_gym.policy import MlpPolicy

    policy = MlpPolicy.load(path)
    if policy.strategies != log.actions:
        raise ValueError(f"{path} chooses among {policy.strategies}, the log among {log.actions}")
    table = ReplayTable(
        name=log.name,
        actions=log.actions,
        context_names=tuple(context_names),
        context=torch.from_numpy(np.clip(log.context, -1.0, 1.0).astype(np.float32)),
        reward=torch.from_numpy(log.reward.astype(np.float32)),
        weight=torch.from_numpy((one_hot(log.action, log.n_actions) / log.propensity[:, None]).astype(np.float32)),
        logged=torch.from_numpy(log.action),
        cluster=torch.from_numpy(log.cluster),
    )
    observations = first_observations(table)
    wanted = policy.layers[0][0].shape[1]
    if observations.shape[1] != wanted:
        raise ValueError(
            f"{path} sees {wanted} numbers, MetaRec/Replay-v0 on this log shows {observations.shape[1]}: learned elsewhere "
            "(in MetaRec/Select-v0 it sees ranked lists, which a log does not keep). Write its probabilities down where it is "
            f"served, as Parquet with the columns {', '.join(TABLE_COLUMNS)}"
        )
    mask = torch.ones(log.n_rows, log.n_actions, dtype=torch.bool)
    return target_probs(log, policy.action_probs(observations, mask).double().numpy())


# ---- a production log


def reward_range(log: InteractionLog, most_shown: int) -> tuple[float, float]:
    """Smallest and largest reward a request can bring: outcomes lie in [0, 1], times their weights, times the items shown."""
    weights = np.array(log.outcome_weights)
    return float(np.minimum(weights, 0.0).sum()) * most_shown, float(np.maximum(weights, 0.0).sum()) * most_shown


def value_production(source: InteractionLog, args: Args, folder: Path) -> dict[str, Any]:
    """Values every policy on a production log; writes requests.parquet, overlap.png and off_policy.md.

    Args:
        source: The log.
        args: The command line.
        folder: Folder of the run.
    """
    from metarec_gym.evaluation.intervals import holm
    from metarec_gym.evaluation.off_policy import single_action as single
    from metarec_gym.evaluation.off_policy.bandit_log import BanditLog, context_columns, requests_of, target_probs
    from metarec_gym.evaluation.off_policy.diagnostics import plot_overlap
    from metarec_gym.evaluation.off_policy.evaluation import HEADLINE, value_policy
    from metarec_gym.evaluation.off_policy.intervals import empirical_bernstein, t_interval
    from metarec_gym.evaluation.off_policy.page import OffPolicyReport, claims, off_policy_page

    requests = requests_of(source)
    partial = folder / "requests.parquet.partial"
    requests.to_parquet(partial, index=False)
    partial.replace(folder / "requests.parquet")
    families = dict(pair.split("=", 1) for pair in args.family) if args.family else None
    log = BanditLog.from_log(source, families=families, estimate_missing=args.estimate_propensities, seed=args.seed)
    policies: dict[str, Floats] = {name: target_probs(log, name) for name in (*log.actions, "uniform")}
    policies |= dict(rule_probs(rule, log, requests) for rule in args.rule)
    for path in args.policy:
        exported = path.suffix == ".safetensors"
        policies[path.stem] = (
            exported_probs(path, log, context_columns(requests)) if exported else table_probs(path, log)
        )
    model = log.reward_model(seed=args.seed)
    bounds = reward_range(source, int(requests["shown"].max()))
    values, bernstein = {}, {}
    for name, probs in policies.items():
        values[name] = value_policy(log, probs, model, seed=args.seed, level=args.level, samples=args.samples)
        bernstein[name] = empirical_bernstein(log, probs, bounds, level=args.level)
    headline = {name: next(v for v in rows if v.estimator == HEADLINE) for name, rows in values.items()}
    adjusted = dict(zip(headline, holm([v.less_logged.p_value() for v in headline.values()]), strict=True))
    logged = t_interval(single.logged_value(log), log.cluster, level=args.level)
    lines = [
        f"# Off-policy values on {log.name}",
        "",
        f"{log.n_rows:,} requests of {logged.users:,} users, {log.n_actions} strategies; the log itself earned "
        f"{logged.as_number(4)} a request. Intervals of {args.level:.0%}, over users.".replace("%", " %"),
        "",
        *(f"**Warning**: {warning}." for warning in log.warnings),
        "",
        "| policy | DR | less the log's own value | p (Holm) | empirical Bernstein | effective rows |",
        "|---|---|---|---|---|---|",
    ]
    for name, claim in headline.items():
        lines.append(
            f"| {name} | {claim.interval.as_number(4)} | {claim.less_logged.as_number(4)} | {adjusted[name]:.3f} "
            f"| {bernstein[name].as_number()} | {claim.support.effective_rows if claim.support else 0:,.0f} |"
        )
    lines += ["", *estimator_lines(values), "", "![overlap](overlap.png)", ""]
    plot_overlap(
        {name: single.importance_weights(log, probs) for name, probs in policies.items()}, folder / "overlap.png"
    )
    page = "\n".join(lines)
    write_atomic(folder / "off_policy.md", page)
    report = OffPolicyReport(
        f"Off-policy values on {log.name}",
        claims(values, adjusted, args.level),
        values,
        dict.fromkeys(values, ("What the log itself earned", logged)),
        {name: bound.as_number() for name, bound in bernstein.items()},
        log.warnings,
        provenance(source.hash),
    )
    write_atomic(folder / "off_policy.html", off_policy_page(report))
    print(page)
    return {
        "logged": logged.to_json(),
        "warnings": list(log.warnings),
        "reward_range": list(bounds),
        "policies": {
            name: {
                "estimators": [value.to_json() for value in values[name]],
                "bernstein": [bernstein[name].low, bernstein[name].high],
                "p_holm": adjusted[name],
            }
            for name in policies
        },
    }


def estimator_lines(values: Mapping[str, Sequence[PolicyValue]]) -> list[str]:
    """A Markdown table of every estimator and policy, and what its notes say."""
    lines = [
        "| policy | estimator | value (t) | studentised bootstrap | less the log's own | effective rows | largest weight (share) "
        "| notes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes: dict[str, int] = {}
    for policy, rows in values.items():
        for value in rows:
            rests, name = value.support, value.estimator
            held = "| | "
            if rests is not None:
                held = (
                    f"| {rests.effective_rows:,.0f} | {rests.largest_weight:.2f} ({100 * rests.largest_share:.1f} %) "
                )
            numbers = [str(notes.setdefault(warning, len(notes) + 1)) for warning in value.warnings]
            lines.append(
                f"| {policy} | {f'{name} ({value.setting})' if value.setting else name} | {value.interval.as_number(4)} "
                f"| {value.bootstrap.as_number()} | {value.less_logged.as_number(4)} {held}| {', '.join(numbers)} |"
            )
    return [*lines, "", *(f"{number}. {note}." for note, number in notes.items())]


# ---- Open Bandit


def open_bandit_log(table: ImpressionTable, campaign: str, strategy: str) -> BanditLog:
    """What one of Open Bandit's policies logged in a campaign; actions are items, rows places, clusters requests.

    Args:
        table: The impressions.
        campaign: One of its campaigns.
        strategy: "bts" or "random"; the chances of all items are known for the latter.
    """
    from metarec_gym.data.impressions import ImpressionTable
    from metarec_gym.envs.replay_table import ReplayTable
    from metarec_gym.evaluation.off_policy.bandit_log import BanditLog

    frame = table.frame[(table.frame["campaign"] == campaign) & (table.frame["strategy"] == strategy)].reset_index(
        drop=True
    )
    part = ImpressionTable.from_frame(frame, name=f"{table.name} by {strategy}", items=table.items)
    rows = ReplayTable.from_impressions(part, action="item", campaign=campaign)
    log = BanditLog.from_table(rows)
    uniform = bool(np.allclose(log.propensity, 1.0 / log.n_actions, rtol=1e-5))
    groups = dict(zip(table.items["item_id"], table.items["item_feature_3"].astype(str), strict=True))
    return BanditLog.from_arrays(
        log.action,
        log.reward,
        propensity=None if uniform else log.propensity,
        pscore=np.full((log.n_rows, log.n_actions), 1.0 / log.n_actions) if uniform else None,
        context=log.context,
        cluster=log.cluster,
        position=frame["position"].to_numpy(),
        actions=log.actions,
        families=[groups[item] for item in log.actions],
        name=log.name,
    )


def item_chances(log: BanditLog, other: BanditLog) -> tuple[Floats, tuple[str, ...]]:
    """Chances with which `other`'s policy shows items at the places of `log`'s rows, (n_rows, K), and what to say of them.

    Raises:
        ValueError: When the two showed different items.
    """
    if log.actions != other.actions:
        raise ValueError(
            f"{log.name} and {other.name} showed different items; the one's log says nothing of the other's items"
        )
    if log.position is None or other.position is None:
        raise ValueError("the places of the rows are needed")
    if other.pscore is not None:
        return np.full((log.n_rows, log.n_actions), 1.0 / log.n_actions), ()
    shown = np.zeros((max(log.position.max(), other.position.max()) + 1, log.n_actions))
    np.add.at(shown, (other.position, other.action), 1.0)
    chances = shown / np.maximum(shown.sum(axis=1, keepdims=True), 1.0)
    return np.asarray(chances[log.position]), (AVERAGED,)


def value_open_bandit(table: ImpressionTable, args: Args, folder: Path) -> dict[str, Any]:
    """Both policies of every campaign, each valued on the other's log, beside what it earned itself; writes off_policy.md."""
    from metarec_gym.evaluation.off_policy import single_action as single
    from metarec_gym.evaluation.off_policy.diagnostics import plot_overlap
    from metarec_gym.evaluation.off_policy.evaluation import HEADLINE, value_policy
    from metarec_gym.evaluation.off_policy.intervals import empirical_bernstein, t_interval
    from metarec_gym.evaluation.off_policy.page import OffPolicyReport, off_policy_page

    every: dict[str, Sequence[PolicyValue]] = {}
    references: dict[str, tuple[str, Interval]] = {}
    bernstein, warned, overlapping = {}, list[str](), 0
    lines, result, weights = (
        [f"# Off-policy values on {table.name}, beside the mean that was really earned", ""],
        {},
        {},
    )
    for campaign in sorted(table.frame["campaign"].unique()):
        logs = {name: open_bandit_log(table, campaign, name) for name in sorted(table.frame["strategy"].unique())}
        for logger, target in ((a, b) for a in logs for b in logs if a != b):
            log = logs[logger]
            probs, notes = item_chances(log, logs[target])
            earned = t_interval(single.logged_value(logs[target]), logs[target].cluster, level=args.level)
            model = log.reward_model(seed=args.seed)
            values = value_policy(log, probs, model, seed=args.seed, level=args.level, samples=args.samples)
            bounds = empirical_bernstein(log, probs, (0.0, 1.0), level=args.level)
            title = f"{campaign}: {logger} -> {target}"
            every[title], bernstein[title] = values, bounds.as_number()
            references[title] = (f"What {target} really earned, on its own rows", earned)
            warned += [note for note in notes if note not in warned]
            claim = next(v.interval for v in values if v.estimator == HEADLINE)
            overlapping += claim.low <= earned.high and claim.high >= earned.low
            weights[title] = single.importance_weights(log, probs)
            lines += [
                f"## {title}",
                "",
                f"On-policy mean of {target}: **{earned.as_number(4)}**, {log.n_rows:,} rows of {logger}.",
                "",
            ]
            lines += [*(f"Note: {note}." for note in notes), "", *estimator_lines({title: values}), ""]
            lines += [f"Empirical Bernstein bounds: {bounds.as_number()}.", ""]
            inside = [v.interval.low <= earned.estimate <= v.interval.high for v in values]
            result[title] = {
                "on_policy": earned.to_json(),
                "estimators": [
                    v.to_json() | {"holds_on_policy_mean": held} for v, held in zip(values, inside, strict=True)
                ],
                "bernstein": [bounds.low, bounds.high],
                "notes": list(notes),
            }
    plot_overlap(weights, folder / "overlap.png")
    page = "\n".join([*lines, "![overlap](overlap.png)", ""])
    write_atomic(folder / "off_policy.md", page)
    answer = f"{HEADLINE}'s 95 % interval overlaps that of the mean really earned in {overlapping} of {len(every)} directions."
    report = OffPolicyReport(
        f"Off-policy values on {table.name}", [answer], every, references, bernstein, warned, provenance(table.hash)
    )
    write_atomic(folder / "off_policy.html", off_policy_page(report))
    print(page)
    return {"directions": result}


def provenance(log_hash: str) -> dict[str, str]:
    """What the page says of its making."""
    return {"command": command_line(), "log": log_hash, **versions()}


def run(args: Args) -> dict[str, Any]:
    """Values policies on a log.

    Args:
        args: The command line.

    Returns:
        The result row.
    """
    from metarec_gym.data.impressions import load_open_bandit
    from metarec_gym.data.interactions import InteractionLog

    described = args.log / "log.json"
    kind = json.loads(described.read_text(encoding="utf-8")).get("kind") if described.is_file() else None
    source = load_open_bandit(args.log) if kind == "impression table" else InteractionLog.load(args.log)
    folder = RunFolder(args.runs, "off_policy", {"args": args, "log": source.hash, "code": code_hash(CODE)})
    path = folder.begin(args)
    if isinstance(source, InteractionLog):
        result = folder.finish(value_production(source, args, path))
    else:
        result = folder.finish(value_open_bandit(source, args, path))
    print(f"result   {path / 'result.json'}\nreport   {path / 'off_policy.html'}")
    return result


def main() -> None:
    """The command line."""
    import tyro

    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
