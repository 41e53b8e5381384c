"""`BanditLog`: what was served to whom with what chance, and what it brought; one request a row, validated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarec_gym.evaluation.intervals import Floats
from metarec_gym.evaluation.off_policy.cross_fitting import (
    Ints,
    RewardModel,
    cross_fitted_propensities,
    cross_fitted_rewards,
)

if TYPE_CHECKING:
    import pandas as pd

    from metarec_gym.data.interactions import InteractionLog
    from metarec_gym.envs.replay_table import ReplayTable

ESTIMATED_PROPENSITIES = (
    "the log has no propensities: they were estimated by multinomial logistic regression on its context. Estimates "
    "are right only "
    "where everything that decided the strategy is in that context; intervals do not cover what is not"
)
KEYS = ("user_id", "timestamp", "strategy")
"""Rows that agree in these are one request."""


@dataclass(frozen=True, eq=False)
class BanditLog:
    """Logged bandit feedback. Make one with `from_arrays`, `from_log` or `from_table`."""

    name: str
    """Short name."""
    actions: tuple[str, ...]
    """What the logger chose among (strategies, items); K names."""
    context: Floats
    """(n_rows, n_features): what was known before the choice."""
    action: Ints
    """int64 (n_rows,): what was chosen."""
    reward: Floats
    """(n_rows,)."""
    propensity: Floats
    """(n_rows,) in (0, 1]: the logger's chance of what it chose."""
    cluster: Ints
    """int64 (n_rows,): rows of one user share a number; they go up and down together."""
    pscore: Floats | None = None
    """(n_rows, K): the logger's chances of all actions, where known."""
    available: NDArray[np.bool_] | None = None
    """bool (n_rows, K): which actions could have been chosen; None = all."""
    position: Ints | None = None
    """int64 (n_rows,): place in the slate, where rows are places."""
    families: tuple[str, ...] | None = None
    """Family of each action (for MIPS), K names."""
    warnings: tuple[str, ...] = ()
    """What every estimate from this log has to be read with."""

    def __post_init__(self) -> None:
        rows, count = len(self.action), len(self.actions)
        if rows < 2 or count < 2:
            raise ValueError(f"the log {self.name!r} has {rows} rows and {count} actions, expected at least 2 of each")
        for field, shape in (
            ("context", (rows, self.context.shape[-1])),
            ("reward", (rows,)),
            ("propensity", (rows,)),
            ("cluster", (rows,)),
            ("pscore", (rows, count)),
            ("available", (rows, count)),
            ("position", (rows,)),
        ):
            value = getattr(self, field)
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"{field} has shape {value.shape}, expected {shape}: one row for each of {rows} requests"
                )
            if value is not None and not np.isfinite(value).all():
                raise ValueError(
                    f"{field} of the log {self.name!r} has values that are missing or infinite; remove these rows"
                )
        if self.action.min() < 0 or self.action.max() >= count:
            raise ValueError(f"actions run from {self.action.min()} to {self.action.max()}, expected 0..{count - 1}")
        wrong = ~((self.propensity > 0.0) & (self.propensity <= 1.0 + 1e-9))
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum())} of {rows} propensities are not in (0, 1] (first: {self.propensity[wrong][0]} in row "
                f"{int(np.argmax(wrong))}); what was served had a chance of being served"
            )
        if self.families is not None and len(self.families) != count:
            raise ValueError(f"families has {len(self.families)} names, expected {count}: one for each action")
        chosen = (np.arange(rows), self.action)
        if self.pscore is not None:
            if (self.pscore < 0.0).any() or not np.allclose(self.pscore.sum(axis=1), 1.0, atol=1e-6):
                raise ValueError(
                    "some rows of pscore are no distribution; expected chances >= 0 that sum to 1 over the actions"
                )
            if not np.allclose(self.pscore[chosen], self.propensity, rtol=1e-6):
                raise ValueError("pscore of the chosen action differs from propensity in some rows; give one of them")
        if self.available is not None and not self.available[chosen].all():
            raise ValueError("some rows chose an action that `available` says could not be chosen; correct one of them")

    @property
    def n_rows(self) -> int:
        """Number of requests."""
        return len(self.action)

    @property
    def n_actions(self) -> int:
        """Number of actions K."""
        return len(self.actions)

    @classmethod
    def from_arrays(
        cls,
        action: ArrayLike,
        reward: ArrayLike,
        *,
        propensity: ArrayLike | None = None,
        pscore: ArrayLike | None = None,
        context: ArrayLike | None = None,
        cluster: ArrayLike | None = None,
        available: ArrayLike | None = None,
        position: ArrayLike | None = None,
        actions: Sequence[str] | None = None,
        families: Sequence[str] | None = None,
        estimate_missing: bool = False,
        seed: int = 0,
        name: str = "arrays",
    ) -> BanditLog:
        """From arrays with the requests first.

        Args:
            action: Integers (n_rows,) in 0..K-1.
            reward: (n_rows,).
            propensity: (n_rows,), the logger's chance of what it chose; not needed with `pscore`.
            pscore: (n_rows, K), its chances of all actions.
            context: (n_rows, n_features); none if None.
            cluster: (n_rows,), users, any labels; every row by itself if None.
            available: bool (n_rows, K).
            position: Integers (n_rows,).
            actions: Names of the actions; needed where neither `pscore` nor the largest action tells K.
            families: Family of each action.
            estimate_missing: Without propensities, estimate them from the context (cross-fitted by cluster), with a warning that
                stays with the log.
            seed: Seed of the folds of that.
            name: Short name.

        Raises:
            ValueError: When something does not fit, or there are no propensities and they may not be estimated.
        """
        chosen = np.asarray(action, dtype=np.int64)
        rows = len(chosen)
        chances = None if pscore is None else np.asarray(pscore, dtype=np.float64)
        if actions is None:
            count = int(chosen.max(initial=-1)) + 1 if chances is None else chances.shape[-1]
            actions = [f"action_{k}" for k in range(count)]
        features = np.zeros((rows, 0)) if context is None else np.asarray(context, dtype=np.float64)
        groups = np.arange(rows) if cluster is None else np.unique(np.asarray(cluster), return_inverse=True)[1]
        warnings: tuple[str, ...] = ()
        if propensity is None and chances is None:
            if not estimate_missing:
                raise ValueError(
                    f"the log {name!r} has no propensities: nothing says how likely what was served was. Log them; "
                    f"or let them be "
                    "estimated (estimate_missing=True, --estimate-propensities) and read every number with that warning"
                )
            chances = cross_fitted_propensities(features, chosen, groups, len(actions), seed=seed)
            warnings = (ESTIMATED_PROPENSITIES,)
        if propensity is None and chances is not None:
            propensity = chances[np.arange(rows), chosen]
        return cls(
            name=name,
            actions=tuple(actions),
            context=features,
            action=chosen,
            reward=np.asarray(reward, dtype=np.float64),
            propensity=np.asarray(propensity, dtype=np.float64),
            cluster=groups.astype(np.int64),
            pscore=chances,
            available=None if available is None else np.asarray(available, dtype=bool),
            position=None if position is None else np.asarray(position, dtype=np.int64),
            families=None if families is None else tuple(families),
            warnings=warnings,
        )

    @classmethod
    def from_log(
        cls,
        log: InteractionLog,
        *,
        families: dict[str, str] | None = None,
        estimate_missing: bool = False,
        seed: int = 0,
    ) -> BanditLog:
        """From a production log that names the `strategy` of each row and its `propensity`.

        Rows of one user, time and strategy are one request: its reward is their sum (the slate's), its cluster the user. Where
        each strategy always had the same chance (a plain split of the traffic) the chances of all actions are known, else the
        chosen one's.

        Args:
            log: With a column `strategy`, and `propensity` unless it may be estimated.
            families: Family of each strategy by name, for MIPS.
            estimate_missing: See `from_arrays`.
            seed: See `from_arrays`.

        Raises:
            ValueError: When a column is missing, or one request has two propensities.
        """
        requests = requests_of(log)
        names, chosen = np.unique(requests["strategy"].to_numpy().astype(str), return_inverse=True)
        propensity = requests["propensity"].to_numpy(dtype=np.float64) if "propensity" in requests.columns else None
        pscore = None
        if propensity is not None:
            by_action = [propensity[chosen == k] for k in range(len(names))]
            fixed = np.array([part[0] for part in by_action])
            if all(np.allclose(part, part[0], rtol=1e-6) for part in by_action) and np.isclose(
                fixed.sum(), 1.0, atol=1e-6
            ):
                pscore = np.tile(fixed / fixed.sum(), (len(chosen), 1))
                propensity = None
        if families is not None:
            unknown = sorted(set(names.tolist()) - set(families))
            if unknown:
                raise ValueError(f"no family is named for the strategies {unknown}; name one for each")
        return cls.from_arrays(
            chosen,
            requests["reward"].to_numpy(),
            propensity=propensity,
            pscore=pscore,
            context=requests[context_columns(requests)].to_numpy(dtype=np.float64),
            cluster=requests["user_id"].to_numpy(),
            actions=names.tolist(),
            families=None if families is None else [families[name] for name in names],
            estimate_missing=estimate_missing,
            seed=seed,
            name=log.name,
        )

    @classmethod
    def from_table(cls, table: ReplayTable) -> BanditLog:
        """From a `ReplayTable` whose rows each match the one action that was logged (an item, a strategy of its own log).

        Raises:
            ValueError: When rows count for several actions (the strategies of Open Bandit, categories): value these with
                `replay_value`, or take the table with action="item".
        """
        weight = table.weight.cpu().numpy().astype(np.float64)
        logged = table.logged.cpu().numpy()
        chosen = weight[np.arange(len(weight)), np.maximum(logged, 0)]
        if (logged < 0).any() or ((weight > 0).sum(axis=1) != 1).any() or (chosen <= 0).any():
            raise ValueError(
                f"rows of {table.name!r} count for several of its actions, or for none; use replay_value, or the table with "
                'action="item"'
            )
        return cls.from_arrays(
            logged,
            table.reward.cpu().numpy(),
            # weights are float32: 1 / p may come back as 1 + 1e-8
            propensity=np.minimum(1.0 / chosen, 1.0),
            context=table.context.cpu().numpy(),
            cluster=table.cluster.cpu().numpy(),
            actions=table.actions,
            name=table.name,
        )

    def reward_model(self, *, regressor: Any = None, folds: int = 3, seed: int = 0) -> RewardModel:
        """Rewards predicted for every action, cross-fitted by user; arguments as in `cross_fitted_rewards`."""
        return cross_fitted_rewards(
            self.context,
            self.action,
            self.reward,
            self.cluster,
            self.n_actions,
            regressor=regressor,
            folds=min(folds, int(self.cluster.max()) + 1),
            seed=seed,
        )


def target_probs(log: BanditLog, policy: str | int | ArrayLike) -> Floats:
    """A policy's probabilities at every request of a log.

    Args:
        log: The log.
        policy: "uniform", an action's name or index (always that one; where it is unavailable, uniform over the others),
        probabilities
            (K,) (rescaled to what is available) or (n_rows, K).

    Returns:
        (n_rows, K), rows sum to 1.

    Raises:
        ValueError: When there is no such action, or rows are no distribution over what is available.
    """
    allowed = np.ones((log.n_rows, log.n_actions)) if log.available is None else log.available.astype(np.float64)
    if isinstance(policy, str):
        if policy == "uniform":
            return np.asarray(allowed / allowed.sum(axis=1, keepdims=True))
        if policy not in log.actions:
            raise ValueError(f"the log has no action {policy!r}; it has {', '.join(log.actions)}, and 'uniform'")
        policy = log.actions.index(policy)
    if isinstance(policy, (int, np.integer)):
        if not 0 <= policy < log.n_actions:
            raise ValueError(f"action {policy} does not exist, the log has 0..{log.n_actions - 1}")
        policy = np.eye(log.n_actions)[policy]
    probs = np.asarray(policy, dtype=np.float64)
    if probs.shape == (log.n_actions,):
        probs = probs * allowed
        total = probs.sum(axis=1, keepdims=True)
        probs = np.where(
            total > 0.0, probs / np.where(total > 0.0, total, 1.0), allowed / allowed.sum(axis=1, keepdims=True)
        )
    if probs.shape != allowed.shape:
        raise ValueError(
            f"the policy's probabilities have shape {probs.shape}, expected {allowed.shape} or ({log.n_actions},)"
        )
    if not np.isfinite(probs).all() or (probs < 0.0).any() or not np.allclose(probs.sum(axis=1), 1.0, atol=1e-4):
        raise ValueError(
            "some rows of the policy's probabilities are no distribution; expected numbers >= 0 that sum to 1"
        )
    if (probs[allowed == 0.0] > 0.0).any():
        raise ValueError("the policy gives probability to actions that were unavailable; give these 0")
    return np.asarray(probs / probs.sum(axis=1, keepdims=True))


def requests_of(log: InteractionLog) -> pd.DataFrame:
    """The requests of a production log, one a row, ordered by user and time.

    Args:
        log: With a column `strategy`.

    Returns:
        request (0..n-1), user_id, timestamp, strategy, shown (its rows), reward (their sum), propensity where logged,
        earlier_requests (of that user), and what the log knew of the user before (`context_columns`).

    Raises:
        ValueError: When the log does not name its strategies, or rows of one request have several propensities.
    """
    import pandas as pd

    from metarec_gym.envs.replay_table import user_context

    frame = log.frame
    if "strategy" not in frame.columns:
        raise ValueError(
            f"the log {log.name!r} has no column 'strategy': nothing says who served; name it when you prepare the "
            f"log (--strategy)"
        )
    number = frame.groupby(list(KEYS), sort=False).ngroup().to_numpy()
    first = np.unique(number, return_index=True)[1]
    rewards = frame[list(log.outcomes)].to_numpy(dtype=np.float64) @ np.array(log.outcome_weights)
    requests = frame.loc[first, list(KEYS)].reset_index(drop=True)
    requests.insert(0, "request", np.arange(len(first)))
    requests["shown"] = np.bincount(number)
    requests["reward"] = np.bincount(number, weights=rewards)
    if "propensity" in frame.columns:
        propensity = frame["propensity"].to_numpy(dtype=np.float64)
        differs = ~np.isclose(propensity, propensity[first][number], rtol=1e-6)
        if differs.any():
            row = frame.loc[int(np.argmax(differs)), list(KEYS)].to_dict()
            raise ValueError(
                f"rows of one request have different propensities (first: {row}); `propensity` is the chance of the strategy, so "
                "it is one number a request"
            )
        requests["propensity"] = propensity[first]
    requests["earlier_requests"] = requests.groupby("user_id", sort=False).cumcount()
    # the request's first row: what was known before any of its outcomes
    context = pd.DataFrame({name: column[first] for name, column in user_context(log).items()})
    return pd.concat([requests, context], axis=1)


def context_columns(requests: pd.DataFrame) -> list[str]:
    """Which columns of `requests_of` are the context."""
    rest = ("request", *KEYS, "shown", "reward", "propensity", "earlier_requests")
    return [column for column in requests.columns if column not in rest]
