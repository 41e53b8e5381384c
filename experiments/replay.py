"""What would a log's policies have earned, by the log alone?

    python -m experiments.replay --log envs_data/open_bandit

For every action (in Open Bandit: the strategy that serves) the estimate from the rows that the *others* logged stands beside
the mean that its own rows saw: where the chances are right the two agree. Then a policy that chooses by context, learned on
one half of the rows and valued on the other, against the best single action.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.run_folder import RunFolder, code_hash

if TYPE_CHECKING:
    from torch import Tensor

    from metarec_gym.envs.replay_table import ReplayTable

REPLAY_CODE = (
    "experiments/replay.py",
    "metarec_gym/envs/replay_table.py",
    "metarec_gym/evaluation/replay_value.py",
    "metarec_gym/evaluation/intervals.py",
)


@dataclass(frozen=True)
class Args:
    """Values policies on a log with propensities."""

    log: Path = Path("envs_data/open_bandit")
    """Folder of a prepared log."""
    campaigns: tuple[str, ...] = ()
    """Campaigns of an impression table; all if empty."""
    action: Literal["auto", "strategy", "category", "item"] = "auto"
    """What an action is."""
    reweigh: Literal["logger", "balanced", "none"] = "balanced"
    """How rows of one strategy count for another where all rows are used, see ReplayTable.from_impressions."""
    ridge: float = 100.0
    """Pull of the context policy's regression to each action's mean, in rows."""
    seed: int = 0
    """Which rows the context policy is learned on."""
    runs: Path = Path("runs")
    """Folder of all runs."""


def context_choice(table: ReplayTable, learn: Tensor, ridge: float) -> Tensor:
    """The action of highest predicted reward in every row's context, by one weighted ridge regression an action.

    Args:
        table: The log.
        learn: bool (n_rows,), the rows to learn from.
        ridge: Penalty on the slopes, in rows.

    Returns:
        Probabilities, float32 (n_rows, K): 1 for one action.
    """
    import torch

    features = torch.cat([table.context, torch.ones(table.n_rows, 1)], dim=1).to(torch.float64)
    penalty = ridge * torch.eye(features.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 1e-6
    predicted = []
    for k in range(table.n_actions):
        weight = table.weight[learn, k].to(torch.float64)
        x, y = features[learn], table.reward[learn].to(torch.float64)
        # (X' W X + ridge) b = X' W y
        solved = torch.linalg.solve(x.T @ (weight[:, None] * x) + penalty, x.T @ (weight * y))
        predicted.append(features @ solved)
    best = torch.stack(predicted, dim=1).argmax(dim=1)
    return torch.nn.functional.one_hot(best, table.n_actions).to(torch.float32)


def cross_fitted_choice(table: ReplayTable, ridge: float, seed: int) -> Tensor:
    """Every row's choice, learned on the half of the clusters that it is not in; float32 (n_rows, K)."""
    import torch

    from metarec_gym.seeding import fold_in, stream, uniform

    key = torch.tensor(stream(seed, "replay_halves"), dtype=torch.int64)
    half = uniform(fold_in(key, table.cluster)) < 0.5
    return torch.where(half[:, None], context_choice(table, ~half, ridge), context_choice(table, half, ridge))


def value_campaign(table: ReplayTable, apart: ReplayTable, ridge: float, seed: int) -> dict[str, Any]:
    """Prints and returns the numbers of one table.

    Args:
        table: Weights for all rows together.
        apart: The same rows with weights that are right for each logger's rows by themselves.
        ridge: See `Args`.
        seed: See `Args`.
    """
    import torch

    from metarec_gym.evaluation.intervals import mean_interval
    from metarec_gym.evaluation.replay_value import on_policy_value, replay_value

    rows: dict[str, Any] = {"rows": table.n_rows}
    print(f"\n{table.name}: {table.n_rows:,} rows, mean reward {float(table.reward.mean()):.4f}; 95 % intervals")
    print(f"  {'':16s} {'own rows':27s} {'others rows, weighted':27s} {'others, self-normalised':27s} effective rows")
    for k, name in enumerate(table.actions):
        own, others = apart.logged == k, apart.logged != k
        if not bool(apart.weight[others, k].sum() > 0):
            continue
        rest = apart.select(others)
        values = [replay_value(rest, k, estimator=e) for e in ("weighted", "self_normalised")]
        on_policy = on_policy_value(table, k)
        print(
            f"  {name:16s} {on_policy.as_number(4):27s} {values[0].interval.as_number(4):27s} "
            f"{values[1].interval.as_number(4):27s} {values[0].effective_rows:,.0f} of {rest.n_rows:,}"
        )
        rows[name] = {
            "on_policy": on_policy.to_json(),
            "from_others": values[0].to_json(),
            "from_others_self_normalised": values[1].to_json(),
            "own_rows": int(own.sum()),
        }
    choice = cross_fitted_choice(table, ridge, seed)
    singles = [replay_value(table, k) for k in range(table.n_actions)]
    best = max(range(table.n_actions), key=lambda k: singles[k].interval.estimate)
    chosen = replay_value(table, choice)
    # row by row, so that what both choices share cancels
    single = torch.nn.functional.one_hot(torch.tensor(best), table.n_actions)
    difference = mean_interval((((choice - single) * table.weight).sum(dim=1) * table.reward).numpy())
    shares = {name: round(float(choice[:, k].mean()), 3) for k, name in enumerate(table.actions)}
    print(f"  best single ({table.actions[best]}, all rows)  {singles[best].interval.as_number(4)}")
    print(f"  by context (all rows)  {chosen.interval.as_number(4)}; less best single {difference.as_number(4)}")
    rows["best_single"] = {"action": table.actions[best], **singles[best].to_json()}
    rows["by_context"] = {**chosen.to_json(), "shares": shares, "less_best_single": difference.to_json()}
    return rows


def run(args: Args) -> dict[str, Any]:
    """Values the log's actions and a policy that chooses by context.

    Args:
        args: The command line.

    Returns:
        The result row.
    """
    from metarec_gym.envs.replay_table import resolve_table

    described = args.log / "log.json"
    kind = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    campaigns: tuple[str | None, ...] = args.campaigns or (None,)
    if not args.campaigns and kind.get("kind") == "impression table":
        from metarec_gym.data.impressions import load_open_bandit

        campaigns = tuple(sorted(load_open_bandit(args.log).frame["campaign"].unique()))
    folder = RunFolder(args.runs, "replay", {"args": args, "log": kind.get("hash"), "code": code_hash(REPLAY_CODE)})
    rows = {}
    for campaign in campaigns:
        pooled, apart = (
            resolve_table(args.log, action=args.action, campaign=campaign, reweigh=how)
            for how in (args.reweigh, "logger")
        )
        rows[pooled.name] = value_campaign(pooled, apart, args.ridge, args.seed)
    folder.begin(args)
    result = folder.finish({"tables": rows})
    print(f"\nresult   {folder.path / 'result.json'}")
    return result


def main() -> None:
    """The command line."""
    import tyro

    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
