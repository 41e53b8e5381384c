"""`ReplayTable`: logged bandit feedback with known chances, as rows that any policy over its actions can be valued on.

An action k stands for a way of choosing what is shown: pi_k(shown | context). A row was logged with the chance
p(shown | context). Its weight for k is

    w_k = pi_k(shown) / p(shown)

so that reward * w_k has, over what the logger might have shown, the mean that k would have brought in that context. Where an
action is what was logged itself (an item, a strategy), w_k = 1 / p where it matches and 0 elsewhere: plain inverse propensity.
What this values is one request at a time: contexts are those that the logger met, not those a policy's earlier choices would lead
to.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from metarec_gym.places import log_folder
from metarec_gym.seeding import torch_generator

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from metarec_gym.data.impressions import ImpressionTable
    from metarec_gym.data.interactions import InteractionLog

Action = Literal["auto", "strategy", "category", "item"]
ACTIONS = ("auto", "strategy", "category", "item")
Reweigh = Literal["logger", "balanced", "none"]
REWEIGH = ("logger", "balanced", "none")
_MOST_LEVELS = 12
_MOST_ACTIONS = 1000
_DAY_S, _YEAR_S = 86_400.0, 365.25 * 86_400.0


@dataclass(frozen=True, eq=False)
class ReplayTable:
    """One row a logged request; all tensors have the rows first."""

    name: str
    """Name of the log."""
    actions: tuple[str, ...]
    """What a policy chooses among."""
    context_names: tuple[str, ...]
    """Names of the context's columns."""
    context: Tensor
    """float32 (n_rows, n_features) in [-1, 1]: what was known before anything was shown."""
    reward: Tensor
    """float32 (n_rows,)."""
    weight: Tensor
    """float32 (n_rows, K) >= 0: chance of what was shown under each action over its chance in the log; 0 = no match."""
    logged: Tensor
    """int64 (n_rows,): the action that was logged, -1 where it is none of them."""
    cluster: Tensor
    """int64 (n_rows,): rows that belong together (a user's, or one request's) share a number."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayTable:
        # gymnasium deep-copies keyword arguments of make(); a frozen table may be shared
        return self

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.reward)

    @property
    def n_actions(self) -> int:
        """Number of actions K."""
        return len(self.actions)

    @functools.cached_property
    def uniform(self) -> bool:
        """Whether the log drew its actions uniformly: every row matches one action, with a weight of K."""
        matches = self.weight > 0
        return bool((matches.sum(dim=1) == 1).all()) and bool(
            torch.allclose(self.weight.sum(dim=1), torch.tensor(float(self.n_actions)), rtol=1e-3)
        )

    def select(self, rows: Tensor) -> ReplayTable:
        """The given rows only; bool (n_rows,) or indices."""
        return self._mapped(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> ReplayTable:
        """The same table on `device`."""
        return self._mapped(lambda tensor: tensor.to(device))

    def _mapped(self, change: Any) -> ReplayTable:
        return replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self) if f.type == "Tensor"})

    @classmethod
    def from_log(cls, log: InteractionLog, *, action: Action = "auto") -> ReplayTable:
        """From a log that says with what chance it showed what.

        Args:
            log: Needs a column `propensity`: the chance of its action in that context.
            action: `strategy` (the log's own column), `item`, `category` (an item of a category, drawn uniformly), or `auto`:
                the strategy where the log names it, else the item.

        Returns:
            The table; the context is what the log knew of the user before the row, clusters are users.

        Raises:
            ValueError: When the log has no propensities or not the asked action.
        """
        frame = log.frame
        _check_action(action)
        if "propensity" not in frame.columns:
            raise ValueError(
                f"the log {log.name!r} has no column 'propensity': nothing says how likely what was shown was, so no other "
                "policy can be valued on it without bias; log the chances, or simulate its users (experiments.build_world)"
            )
        if action == "auto":
            action = "strategy" if "strategy" in frame.columns else "item"
        if action == "strategy" and "strategy" not in frame.columns:
            raise ValueError(f"the log {log.name!r} has no column 'strategy'; choose action='item' or 'category'")
        chance = frame["propensity"].to_numpy(dtype=np.float64)
        if action == "category":
            groups = _first_categories(log)
            names, logged, weight = _category_weights(groups, frame["item_id"].to_numpy(), chance)
        else:
            codes, names = _coded(frame[f"{action}_id" if action == "item" else action].to_numpy())
            logged, weight = codes, _own_weights(codes, len(names), chance)
        reward = frame[list(log.outcomes)].to_numpy(dtype=np.float64) @ np.array(log.outcome_weights)
        context = user_context(log)
        return cls._make(log.name, names, context, reward, weight, logged, _coded(frame["user_id"].to_numpy())[0])

    @classmethod
    def from_impressions(
        cls,
        table: ImpressionTable,
        *,
        action: Action = "auto",
        campaign: str | None = None,
        reweigh: Reweigh = "logger",
        category_column: str = "item_feature_3",
    ) -> ReplayTable:
        """From impressions without users, such as Open Bandit.

        Args:
            table: The impressions.
            action: `strategy` (also `auto`): which of the production's strategies serves; `item`, or `category` (an item of a
                group of `category_column`, drawn uniformly).
            campaign: Which campaign; None = the first. Items are other ones in each.
            reweigh: For strategies, how a row logged by s counts for strategy k:
                `logger`: pi_k(item | position) / p_s(item), so 1 for s itself: unbiased, but huge where s hardly showed the item;
                `balanced`: pi_k(item) over the mean chance of all strategies, by their shares of the rows (the balance heuristic
                of Veach and Guibas, 1995): never above 1 / share of k;
                `none`: only k's own rows count for it, with 1 / share.
                A strategy whose chances never change (random) is known exactly at every row. One whose chances change over time
                was not asked for them at another's rows: its mean chances are used there, how often it showed the item at the
                position. All three need strategies that met the same contexts (requests assigned to them at random).
            category_column: Column of the item table for `category`.

        Returns:
            The table; the context is user features, position and hour, clusters are requests.

        Raises:
            ValueError: When the campaign or column is unknown.
        """
        _check_action(action)
        if reweigh not in REWEIGH:
            raise ValueError(f"reweigh is {reweigh!r}, expected one of {REWEIGH}")
        frame = table.frame
        campaigns = sorted(frame["campaign"].unique())
        campaign = campaigns[0] if campaign is None else campaign
        if campaign not in campaigns:
            raise ValueError(f"campaign is {campaign!r}, the impressions have {campaigns}")
        frame = frame[frame["campaign"] == campaign].reset_index(drop=True)
        items = table.items[table.items["item_id"].isin(frame["item_id"].unique())].reset_index(drop=True)
        chance = frame["propensity"].to_numpy(dtype=np.float64)
        if action in ("auto", "strategy"):
            codes, names = _coded(frame["strategy"].to_numpy())
            share = np.bincount(codes) / len(codes)
            if reweigh == "none":
                logged, weight = codes, _own_weights(codes, len(names), share[codes])
            else:
                chances = _strategy_chances(frame, codes, len(names))
                over = chance if reweigh == "logger" else chances @ share
                logged, weight = codes, chances / over[:, None]
        elif action == "category":
            if category_column not in items.columns:
                raise ValueError(f"category_column is {category_column!r}, the item table has {list(items.columns)}")
            groups = dict(zip(items["item_id"], items[category_column].astype(str), strict=True))
            names, logged, weight = _category_weights(groups, frame["item_id"].to_numpy(), chance)
        else:
            codes, names = _coded(frame["item_id"].to_numpy())
            logged, weight = codes, _own_weights(codes, len(names), chance)
        features = [column for column in frame.columns if column.startswith("user_feature_")]
        context = _one_hots(frame, [*features, "position"]) | _hour(frame["timestamp"].to_numpy(dtype=np.float64))
        # the same visitor at the same instant is one request: its places are not independent
        visits = frame.groupby(["strategy", "timestamp", *features], sort=False)
        request = np.asarray(visits.ngroup(), dtype=np.int64)
        name = f"{table.name}/{campaign}"
        return cls._make(name, names, context, frame["click"].to_numpy(dtype=np.float64), weight, logged, request)

    @classmethod
    def _make(
        cls,
        name: str,
        actions: tuple[str, ...],
        context: dict[str, NDArray[np.float64]],
        reward: NDArray[np.float64],
        weight: NDArray[np.float64],
        logged: NDArray[np.int64],
        cluster: NDArray[np.int64],
    ) -> ReplayTable:
        if not 2 <= len(actions) <= _MOST_ACTIONS:
            raise ValueError(
                f"the log {name!r} has {len(actions)} actions, expected 2 to {_MOST_ACTIONS}; choose another `action`: strategy, "
                "category or item"
            )
        columns = np.stack([np.clip(column, -1.0, 1.0) for column in context.values()], axis=1)
        return cls(
            name=name,
            actions=actions,
            context_names=tuple(context),
            context=torch.from_numpy(columns.astype(np.float32)),
            reward=torch.from_numpy(reward.astype(np.float32)),
            weight=torch.from_numpy(weight.astype(np.float32)),
            logged=torch.from_numpy(logged.astype(np.int64)),
            cluster=torch.from_numpy(cluster.astype(np.int64)),
        )

    @classmethod
    def synthetic(
        cls,
        seed: int = 0,
        *,
        n_rows: int = 4096,
        n_actions: int = 4,
        n_groups: int = 3,
        rows_per_user: int = 1,
        uniform: bool = False,
    ) -> tuple[ReplayTable, Tensor]:
        """A log whose truth is known: users of a few groups, each with its own chance of a click for every action.

        Args:
            seed: Seed of everything.
            n_rows: Rows.
            n_actions: Actions.
            n_groups: Groups of users; the context names the group.
            rows_per_user: Rows of each user, who clicks more or less than the group's mean in all of them.
            uniform: The logger draws uniformly; else it prefers some actions in each group.

        Returns:
            The table, and the mean reward of each action in each (equally likely) group: float32 (n_groups, K).
        """
        generator = torch_generator(seed, "synthetic_replay")
        users = -(-n_rows // rows_per_user)
        truth = 0.15 + 0.5 * torch.rand(n_groups, n_actions, generator=generator)
        taste = torch.randn(n_groups, n_actions, generator=generator)
        policy = torch.softmax(torch.zeros_like(taste) if uniform else 0.7 * taste, dim=1)
        user_group = torch.randint(n_groups, (users,), generator=generator)
        # symmetric, so that the group's mean stays what it is
        user_shift = 0.15 * (2.0 * torch.rand(users, generator=generator) - 1.0)
        user = torch.arange(n_rows) // rows_per_user
        group = user_group[user]
        action = torch.multinomial(policy[group], 1, generator=generator)[:, 0]
        prob = truth[group, action] + (user_shift[user] if rows_per_user > 1 else 0.0)
        reward = (torch.rand(n_rows, generator=generator) < prob).to(torch.float32)
        weight = torch.zeros(n_rows, n_actions)
        weight[torch.arange(n_rows), action] = 1.0 / policy[group, action]
        table = cls(
            name="synthetic",
            actions=tuple(f"action_{k}" for k in range(n_actions)),
            context_names=tuple(f"group_{g}" for g in range(n_groups)),
            context=torch.nn.functional.one_hot(group, n_groups).to(torch.float32),
            reward=reward,
            weight=weight,
            logged=action,
            cluster=user,
        )
        return table, truth


def resolve_table(
    log: str | Path | ReplayTable | InteractionLog | ImpressionTable | None,
    *,
    action: Action,
    campaign: str | None,
    reweigh: Reweigh,
) -> ReplayTable:
    """The table of `log`: a folder of a prepared log, its name, what one loads from it, or None for the synthetic default.

    Raises:
        FileNotFoundError: When there is no prepared log in the folder or of that name.
        ValueError: When the log has no propensities.
        TypeError: When `log` is something else.
    """
    if log is None:
        return ReplayTable.synthetic()[0]
    if isinstance(log, ReplayTable):
        return log
    if isinstance(log, str | Path):
        return _from_folder(str(log_folder(log).resolve()), action, campaign, reweigh)
    return _from_object(log, action, campaign, reweigh)


@functools.lru_cache(maxsize=8)
def _from_folder(folder: str, action: Action, campaign: str | None, reweigh: Reweigh) -> ReplayTable:
    return _from_object(_loaded(folder), action, campaign, reweigh)


@functools.lru_cache(maxsize=2)
def _loaded(folder: str) -> InteractionLog | ImpressionTable:
    from metarec_gym.data.impressions import load_open_bandit
    from metarec_gym.data.interactions import InteractionLog

    path = Path(folder)
    described = path / "log.json"
    if described.is_file() and json.loads(described.read_text(encoding="utf-8")).get("kind") == "impression table":
        return load_open_bandit(path)
    return InteractionLog.load(path)


def _from_object(log: Any, action: Action, campaign: str | None, reweigh: Reweigh) -> ReplayTable:
    from metarec_gym.data.impressions import ImpressionTable
    from metarec_gym.data.interactions import InteractionLog

    if isinstance(log, ImpressionTable):
        return ReplayTable.from_impressions(log, action=action, campaign=campaign, reweigh=reweigh)
    if isinstance(log, InteractionLog):
        if campaign is not None:
            raise ValueError(f"campaign is {campaign!r}, but an interaction log has none; leave it None")
        return ReplayTable.from_log(log, action=action)
    raise TypeError(f"log is a {type(log).__name__}, expected a folder, an InteractionLog, an ImpressionTable or None")


# ---- weights


def _check_action(action: str) -> None:
    if action not in ACTIONS:
        raise ValueError(f"action is {action!r}, expected one of {ACTIONS}")


def _coded(values: NDArray[Any]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Numbers 0..n-1 by sorted value, and the values."""
    names, codes = np.unique(values.astype(str), return_inverse=True)
    return codes.astype(np.int64), tuple(names.tolist())


def _own_weights(codes: NDArray[np.int64], count: int, chance: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / chance for the logged action, 0 for the others; (n_rows, count)."""
    weight = np.zeros((len(codes), count))
    weight[np.arange(len(codes)), codes] = 1.0 / chance
    return weight


def _category_weights(
    category: dict[str, str], item: NDArray[Any], chance: NDArray[np.float64]
) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.float64]]:
    """Actions that draw an item of a category uniformly: pi_c(item) = 1 / size of c, 0 outside."""
    codes, names = _coded(np.array([category[i] for i in item]))
    sizes = np.array([sum(group == name for group in category.values()) for name in names], dtype=np.float64)
    weight = np.zeros((len(item), len(names)))
    weight[np.arange(len(item)), codes] = 1.0 / (sizes[codes] * chance)
    return names, codes, weight


def _strategy_chances(frame: pd.DataFrame, codes: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """(n_rows, count): chance of the item shown under each strategy; the logger's own as logged."""
    chance = frame["propensity"].to_numpy(dtype=np.float64)
    item, _ = _coded(frame["item_id"].to_numpy())
    place, _ = _coded(frame["position"].to_numpy())
    chances = np.zeros((len(frame), count))
    for k in range(count):
        own = codes == k
        if np.allclose(chance[own], chance[own][0]):
            known = np.full(len(frame), chance[own][0])
        else:
            shown = np.zeros((item.max() + 1, place.max() + 1))
            np.add.at(shown, (item[own], place[own]), 1.0)
            known = (shown / np.maximum(shown.sum(axis=0), 1.0))[item, place]
        chances[:, k] = np.where(own, chance, known)
    return chances


# ---- contexts


def _first_categories(log: InteractionLog) -> dict[str, str]:
    if log.items is None or "categories" not in log.items.columns:
        raise ValueError(f"the log {log.name!r} has no item categories; choose action='item' or 'strategy'")
    names = log.items["categories"].astype(str).str.split("|").str[0].str.strip()
    return dict(zip(log.items["item_id"], names.where(names != "", "none"), strict=True))


def _one_hots(frame: pd.DataFrame, columns: list[str]) -> dict[str, NDArray[np.float64]]:
    """A 0/1 column for each of the commonest levels of each column."""
    found: dict[str, NDArray[np.float64]] = {}
    for column in columns:
        values = frame[column].astype(str)
        counts = values.value_counts()
        # ties by name, so that the order never depends on the rows' order
        levels = sorted(counts.index, key=lambda level: (-counts[level], level))[:_MOST_LEVELS]
        for level in sorted(levels):
            found[f"{column}={level}"] = (values == level).to_numpy(dtype=np.float64)
    return found


def _hour(time_s: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    angle = 2.0 * np.pi * (time_s % _DAY_S) / _DAY_S
    return {"hour_sin": np.sin(angle), "hour_cos": np.cos(angle)}


def user_context(log: InteractionLog) -> dict[str, NDArray[np.float64]]:
    """What the log knew of the user before each row: how many rows, how good, how long ago, the hour, the user table."""
    frame = log.frame
    gate = frame[log.outcomes[0]].to_numpy(dtype=np.float64)
    group = frame.groupby("user_id", sort=False)
    before = group.cumcount().to_numpy(dtype=np.float64)
    # rows of one user are in time order, so everything up to the row less the row itself is the past
    taken = group[log.outcomes[0]].cumsum().to_numpy(dtype=np.float64) - gate
    gap = group["timestamp"].diff().fillna(0.0).to_numpy(dtype=np.float64)
    context = {
        "rows_before": np.minimum(np.log1p(before) / np.log(1001.0), 1.0),
        "taken_before": taken / np.maximum(before, 1.0),
        "gap": np.minimum(np.log1p(np.maximum(gap, 0.0)) / np.log1p(_YEAR_S), 1.0),
        **_hour(frame["timestamp"].to_numpy(dtype=np.float64)),
    }
    if log.users is not None:
        table = frame[["user_id"]].merge(log.users, on="user_id", how="left")
        for column in log.users.columns.drop("user_id"):
            if table[column].dtype.kind in "fiu":
                values = table[column].to_numpy(dtype=np.float64)
                spread = np.nanstd(values) or 1.0
                context[column] = np.nan_to_num(np.tanh((values - np.nanmean(values)) / spread))
            else:
                context |= _one_hots(table, [column])
    return context
