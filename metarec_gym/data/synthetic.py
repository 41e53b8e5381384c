"""Logs whose users are known by construction.

`synthetic_log`: each user has a type, and mostly takes items of that type's category. `behaviour_log`: users who answer what they
are shown, leave and come back by a model of exactly the judge's form, with known numbers: does fitting find them again?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from metarec_gym import seeding
from metarec_gym.data.interactions import InteractionLog

_START_S = 1_700_000_000.0
_DAY_S = 86_400.0


@dataclass(frozen=True, eq=False)
class SyntheticTruth:
    """What the log does not say: who the users are."""

    user_type: dict[str, int]
    """Type of each user id, 0..n_types-1."""
    item_category: dict[str, int]
    """Category of each item id, 0..n_types-1; type g prefers category g."""
    popularity: dict[str, float]
    """Probability of each item inside its category, before repeats are excluded."""
    on_type_share: float
    """Probability that an engaged item is of the user's category, while that category has items left."""
    like_probability: tuple[float, float]
    """Probability of a like, given a watch, of an item of the user's category and of another."""

    def types_of(self, user_ids: NDArray[np.object_]) -> NDArray[np.int64]:
        """Types of the users, e.g. of `Dataset.user_ids`; (n_users,)."""
        return np.array([self.user_type[str(user)] for user in user_ids], dtype=np.int64)

    def categories_of(self, item_ids: NDArray[np.object_]) -> NDArray[np.int64]:
        """Categories of the items, e.g. of `Dataset.item_ids`; (n_items,)."""
        return np.array([self.item_category[str(item)] for item in item_ids], dtype=np.int64)


def synthetic_log(
    seed: int,
    *,
    n_users: int = 240,
    n_items: int = 120,
    n_types: int = 4,
    events_per_user: tuple[int, int] = (8, 40),
    on_type_share: float = 0.8,
    like_probability: tuple[float, float] = (0.8, 0.25),
    popularity_skew: float = 1.0,
    shown_per_event: int = 0,
    name: str = "synthetic",
) -> tuple[InteractionLog, SyntheticTruth]:
    """A log of users of known type: outcomes `watch` (the gate, weight 0) and `like` (weight 1), as in MovieLens.

    Users come back every few days; events of a session are minutes apart, so the 30-minute rule recovers the sessions.

    Args:
        seed: Seed of everything.
        n_users: Users; type of user u is u modulo n_types.
        n_items: Items; category of item i is i modulo n_types, so categories are equally large.
        n_types: Types and categories.
        events_per_user: Fewest and most watched items of a user.
        on_type_share: Probability that a watched item is of the user's category.
        like_probability: Probability of a like, given a watch, of an item of the user's category and of another.
        popularity_skew: Popularity inside a category is proportional to rank ** -skew; 0 is uniform.
        shown_per_event: Items shown and not watched per watched one; 0 gives positives only, more gives real negatives.
        name: Name of the log.

    Returns:
        The log and the truth about it.
    """
    low, high = events_per_user
    if not (1 <= n_types <= n_items and 1 <= low <= high <= n_items and n_users >= 3 and shown_per_event >= 0):
        raise ValueError(
            f"cannot make {n_users} users of {n_types} types with {low} to {high} events among {n_items} items; "
            "expected 3 users or more, and no more types or events than items"
        )
    rng = seeding.numpy_rng(seed, "synthetic_log")
    user_width, item_width = len(str(n_users - 1)), len(str(n_items - 1))
    user_ids = [f"u{index:0{user_width}d}" for index in range(n_users)]
    item_ids = np.array([f"i{index:0{item_width}d}" for index in range(n_items)], dtype=object)
    category = np.arange(n_items) % n_types
    # popular items are not the first ones: an arm that ranks by index must not look good by accident
    rank = np.empty(n_items, dtype=np.int64)
    for group in range(n_types):
        members = np.flatnonzero(category == group)
        rank[members] = rng.permutation(len(members)) + 1
    popularity = rank.astype(np.float64) ** -popularity_skew
    for group in range(n_types):
        popularity[category == group] /= popularity[category == group].sum()
    # log popularity + Gumbel noise, sorted: a draw without replacement in proportion to popularity
    keys = np.log(popularity) + rng.gumbel(size=(n_users, n_items))

    rows: list[tuple[str, str, float, float, float]] = []
    for index, user_id in enumerate(user_ids):
        own = index % n_types
        queue = np.argsort(-keys[index], kind="stable")
        own_queue, other_queue = list(queue[category[queue] == own]), list(queue[category[queue] != own])
        n_events = int(rng.integers(low, high + 1))
        time_s = _START_S + float(rng.uniform(0, 30 * _DAY_S))
        left_in_session = int(rng.integers(1, 7))
        for _ in range(n_events):
            if left_in_session == 0:
                time_s += float(rng.uniform(0.5, 5.0)) * _DAY_S
                left_in_session = int(rng.integers(1, 7))
            left_in_session -= 1
            on_type = bool(rng.random() < on_type_share)
            chosen = (own_queue if (on_type and own_queue) or not other_queue else other_queue).pop(0)
            liked = float(rng.random() < like_probability[0 if category[chosen] == own else 1])
            rows.append((user_id, str(item_ids[chosen]), time_s, 1.0, liked))
            if shown_per_event:
                rest = np.array(own_queue + other_queue, dtype=np.int64)
                for skipped in rng.choice(rest, size=min(shown_per_event, len(rest)), replace=False):
                    rows.append((user_id, str(item_ids[skipped]), time_s + 1.0, 0.0, 0.0))
            time_s += float(rng.uniform(60.0, 600.0))
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "watch", "like"])
    items = pd.DataFrame(
        {
            "item_id": item_ids,
            "title": [f"Item {index} of category {group}" for index, group in enumerate(category)],
            "categories": [f"category_{group}" for group in category],
            "release_time": _START_S - rng.uniform(0, 3_000 * _DAY_S, size=n_items),
        }
    )
    log = InteractionLog.from_frame(
        frame,
        name=name,
        outcomes=("watch", "like"),
        outcome_weights=(0.0, 1.0),
        items=items,
        card={
            "source": f"metarec_gym.data.synthetic_log(seed={seed})",
            "licence": "made up, free of rights",
            "outcomes": {"watch": "the user took the item", "like": "the user liked what was taken"},
        },
    )
    truth = SyntheticTruth(
        user_type={user_id: index % n_types for index, user_id in enumerate(user_ids)},
        item_category={str(item): int(group) for item, group in zip(item_ids, category, strict=True)},
        popularity={str(item): float(value) for item, value in zip(item_ids, popularity, strict=True)},
        on_type_share=on_type_share,
        like_probability=like_probability,
    )
    return log, truth


@dataclass(frozen=True, eq=False)
class BehaviourTruth:
    """The model that made a behaviour log. Users and items are in the order of their ids, as `encode` numbers them."""

    user_ids: tuple[str, ...]
    """Ids of all users; every one of them is in the log."""
    item_ids: tuple[str, ...]
    """Ids of all items; one never shown is not in the log."""
    feature_names: tuple[str, ...]
    """Names of phi: intercept, then one per category."""
    phi: NDArray[np.float64]
    """(n_items, n_features): 1, then membership of each category minus its mean over the items."""
    item_category: NDArray[np.float64]
    """(n_items, n_categories), 0 or 1, at least one 1 in a row."""
    item_bias: NDArray[np.float64]
    """(n_items, 2): logits of watch and of like given watch, for z = 0, in the first position, with nothing shown before."""
    effect_mean: NDArray[np.float64]
    """(2, n_features): mean of the users' z for each outcome."""
    effect_covariance: NDArray[np.float64]
    """(2, n_features, n_features): Sigma of the users' z for each outcome."""
    effects: NDArray[np.float64]
    """(n_users, 2, n_features): every user's z."""
    position_logit: NDArray[np.float64]
    """(slate_size,): added to the logit of watch."""
    fatigue: float
    """Added to the logit of watch per unit of category exposure."""
    exposure_decay: float
    """Share of the exposure that one request leaves over."""
    leaving: tuple[float, float, float, float]
    """Logit of leaving after a request: intercept, per request since the last watch, per share watched, per mean exposure."""
    return_edges: NDArray[np.float64]
    """(n_bins + 1,) hours."""
    return_baseline: NDArray[np.float64]
    """(n_bins,) logits of coming back in a bin, given not before."""
    return_weight: NDArray[np.float64]
    """(4,): per log1p(watched in the session), log1p(sessions so far), log1p(hours of the gap before it), first session."""
    end_s: float
    """Unix seconds at which the log stops, whatever was going on."""
    watch_probability: NDArray[np.float64]
    """(n_rows,): the probability of watch in each row of the log, rows in the log's order."""
    exposure: NDArray[np.float64]
    """(n_rows,): the item's category exposure in each row of the log, rows in the log's order."""


_MOST_REQUESTS = 10_000
_RETURN_EDGES_H = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 36.0, 48.0, 72.0, 120.0, 240.0, 480.0, 960.0)
_RETURN_BASELINE = (-4.0, -4.0, -3.8, -3.5, -3.0, -2.2, -1.6, -1.8, -1.5, -1.2, -1.0, -1.2, -1.5)


def behaviour_log(
    seed: int,
    *,
    n_users: int = 600,
    n_items: int = 200,
    n_categories: int = 3,
    slate_size: int = 5,
    span_days: float = 180.0,
    sampler: Literal["uniform", "popularity"] = "uniform",
    base_logit: tuple[float, float] = (-1.0, 0.0),
    item_sd: float = 0.5,
    effect_mean: Sequence[Sequence[float]] | None = None,
    effect_sd: Sequence[Sequence[float]] | None = None,
    effect_correlation: float = 0.3,
    position_decay: float = 0.35,
    fatigue: float = -0.4,
    leaving: tuple[float, float, float, float] = (-2.6, 0.3, -0.8, 0.4),
    return_edges: Sequence[float] = _RETURN_EDGES_H,
    return_baseline: Sequence[float] = _RETURN_BASELINE,
    return_weight: tuple[float, float, float, float] = (0.4, 0.15, -0.2, -0.5),
    exposure_decay: float = 0.8,
    name: str = "behaviour",
) -> tuple[InteractionLog, BehaviourTruth]:
    """A log with impressions, positions, sessions and returns: outcomes `watch` (the gate) and `like` (given a watch).

    A request shows `slate_size` different items, drawn anew each time without a look at the user, so what was shown is as good as
    an experiment; all its rows have one timestamp. An item may be shown again in a later request.

        logit P(watch) = item_bias + z_user . phi + position_logit + fatigue * exposure,    z_user ~ N(effect_mean, Sigma)
        logit P(like | watch) = item_bias' + z'_user . phi
        logit P(leaves after the request) = leaving . (1, requests since the last watch, share watched, mean exposure)
        logit P(returns in bin b | not before) = return_baseline_b + return_weight . (the session and the ones before it)

    Exposure of an item is the sum over its categories of what this session showed of them, faded by `exposure_decay` a request; a
    category row sums to 1. A user who does not return within the last edge never does.

    Args:
        seed: Seed of everything.
        n_users: Users.
        n_items: Items.
        n_categories: Categories; an item belongs to each with probability 0.4, and to at least one.
        slate_size: Items a request.
        span_days: Length of the log; users arrive in its first third.
        sampler: `uniform`, or `popularity`: shown in proportion to exp(item bias), so what is watched more is shown more.
        base_logit: Mean of the item biases of watch and of like.
        item_sd: Standard deviation of the item biases.
        effect_mean: (2, 1 + n_categories) means of z; None = 0 for the intercept, 0.3 and -0.3 in turn for the categories.
        effect_sd: (2, 1 + n_categories) standard deviations of z; None = 0.5 for the intercept, 0.9 and 0.6 in turn.
        effect_correlation: Correlation of each two coefficients of an outcome.
        position_decay: Position j has the logit -position_decay * log2(1 + j), j from 0.
        fatigue: Logit of watch per unit of exposure.
        leaving: Intercept, boredom, quality, repetition.
        return_edges: (n_bins + 1,) hours, ascending; the first at least half an hour.
        return_baseline: (n_bins,) logits.
        return_weight: Weights of log1p(watched), log1p(sessions so far), log1p(hours of the gap before), first session.
        exposure_decay: Share of the exposure that one request leaves over.
        name: Name of the log.

    Returns:
        The log and the truth about it.
    """
    edges, baseline = np.asarray(return_edges, dtype=np.float64), np.asarray(return_baseline, dtype=np.float64)
    if not (1 <= slate_size <= n_items and n_users >= 3 and n_categories >= 1 and span_days > 0):
        raise ValueError(
            f"cannot show slates of {slate_size} from {n_items} items of {n_categories} categories to {n_users} users for "
            f"{span_days} days; expected slates no larger than the catalogue, 3 users or more and a positive span"
        )
    if len(edges) != len(baseline) + 1 or edges[0] < 0.5 or not (np.diff(edges) > 0).all():
        raise ValueError(
            f"{len(edges)} edges for {len(baseline)} return bins; expected one more than bins, ascending, from 0.5 hours"
        )
    rng = seeding.numpy_rng(seed, "behaviour_log")
    n_features = 1 + n_categories
    category = (rng.random((n_items, n_categories)) < 0.4).astype(np.float64)
    homeless = category.sum(axis=1) == 0
    category[homeless, np.arange(homeless.sum()) % n_categories] = 1.0
    category_row = category / category.sum(axis=1, keepdims=True)
    phi = np.concatenate([np.ones((n_items, 1)), category - category.mean(axis=0)], axis=1)
    item_bias = np.asarray(base_logit) + item_sd * rng.standard_normal((n_items, 2))
    alternate = np.where(np.arange(n_categories) % 2 == 0, 1.0, 0.0)
    mean = (
        np.tile(np.concatenate([[0.0], 0.6 * alternate - 0.3]), (2, 1))
        if effect_mean is None
        else np.asarray(effect_mean, dtype=np.float64)
    )
    sd = (
        np.tile(np.concatenate([[0.5], 0.3 * alternate + 0.6]), (2, 1))
        if effect_sd is None
        else np.asarray(effect_sd, dtype=np.float64)
    )
    if mean.shape != (2, n_features) or sd.shape != (2, n_features):
        raise ValueError(
            f"effect_mean and effect_sd have shapes {mean.shape} and {sd.shape}; expected (2, {n_features})"
        )
    correlation = np.full((n_features, n_features), effect_correlation) + (1.0 - effect_correlation) * np.eye(
        n_features
    )
    covariance = sd[:, :, None] * correlation * sd[:, None, :]
    root = np.linalg.cholesky(covariance + 1e-12 * np.eye(n_features))
    effects = mean + np.einsum("ofg,uog->uof", root, rng.standard_normal((n_users, 2, n_features)))
    position_logit = -position_decay * np.log2(1.0 + np.arange(slate_size))
    sampler_logit = item_bias[:, 0] if sampler == "popularity" else np.zeros(n_items)
    utility = item_bias + np.einsum("uof,if->uio", effects, phi)

    end_s = _START_S + span_days * _DAY_S
    time_s = np.floor(_START_S + rng.uniform(0, span_days * _DAY_S / 3, size=n_users))
    session = np.zeros(n_users, dtype=np.int64)
    unrewarded, watched_in_session, previous_gap_h = np.zeros(n_users), np.zeros(n_users), np.zeros(n_users)
    exposure = np.zeros((n_users, n_categories))
    active = np.arange(n_users)
    parts: list[tuple[NDArray[Any], ...]] = []
    while len(active) > 0:
        n = len(active)
        if len(parts) == _MOST_REQUESTS:
            raise ValueError(
                f"a user makes more than {_MOST_REQUESTS} requests in {span_days} days with leaving {leaving}; "
                "let users leave sooner, or shorten the span"
            )
        # the largest of log weight + Gumbel noise: a draw without replacement in proportion to the weights, in random order
        noise = -np.log(-np.log(rng.random((n, n_items))))
        slate = np.argsort(-(sampler_logit + noise), axis=1)[:, :slate_size]
        met = np.einsum("nsc,nc->ns", category_row[slate], exposure[active])
        logit = utility[active[:, None], slate, 0] + position_logit + fatigue * met
        p_watch = 1.0 / (1.0 + np.exp(-logit))
        watch = rng.random((n, slate_size)) < p_watch
        like = watch & (rng.random((n, slate_size)) < 1.0 / (1.0 + np.exp(-utility[active[:, None], slate, 1])))
        parts.append((active, session[active], time_s[active], slate, watch, like, p_watch, met))

        taken = watch.sum(axis=1)
        unrewarded[active] = np.where(taken > 0, 0.0, unrewarded[active] + 1.0)
        watched_in_session[active] += taken
        repetition = met.mean(axis=1)
        exposure[active] = exposure_decay * exposure[active] + category_row[slate].mean(axis=1)
        quality = taken / slate_size
        leave_logit = leaving[0] + leaving[1] * unrewarded[active] + leaving[2] * quality + leaving[3] * repetition
        leaves = rng.random(n) < 1.0 / (1.0 + np.exp(-leave_logit))
        pause_s = np.floor(rng.uniform(20.0, 180.0, size=n))

        gone = active[leaves]
        covariates = np.stack(
            [
                np.log1p(watched_in_session[gone]),
                np.log1p(session[gone] + 1.0),
                np.log1p(previous_gap_h[gone]),
                (session[gone] == 0).astype(np.float64),
            ],
            axis=1,
        )
        gap_h = _gap_hours(baseline + (covariates @ np.asarray(return_weight))[:, None], edges, rng)
        pause_s[leaves] = gap_h * 3600.0
        session[gone] += 1
        unrewarded[gone], watched_in_session[gone], exposure[gone] = 0.0, 0.0, 0.0
        previous_gap_h[gone] = gap_h
        time_s[active] += pause_s
        active = active[time_s[active] < end_s]

    user_ids = [f"u{index:0{len(str(n_users - 1))}d}" for index in range(n_users)]
    item_ids = [f"i{index:0{len(str(n_items - 1))}d}" for index in range(n_items)]
    user, number, at = (np.concatenate([part[k] for part in parts]).repeat(slate_size) for k in range(3))
    item, watched, liked, probability, seen = (np.concatenate([part[k] for part in parts]).ravel() for k in range(3, 8))
    # the order in which a log keeps its rows: by user and time, then as they came, which is by position
    order = np.lexsort((at, user))
    position = np.tile(np.arange(slate_size), len(user) // slate_size)
    user, number, item = user[order].astype(np.int64), number[order].astype(np.int64), item[order].astype(np.int64)
    frame = pd.DataFrame(
        {
            "user_id": np.array(user_ids, dtype=object)[user],
            "item_id": np.array(item_ids, dtype=object)[item],
            "timestamp": at[order],
            "session_id": number,
            "position": position[order],
            "watch": watched[order].astype(np.float32),
            "like": liked[order].astype(np.float32),
        }
    )
    names = tuple(f"category_{c}" for c in range(n_categories))
    items = pd.DataFrame(
        {
            "item_id": item_ids,
            "title": [f"Item {index}" for index in range(n_items)],
            "categories": ["|".join(n for n, inside in zip(names, row, strict=True) if inside) for row in category],
        }
    )
    log = InteractionLog.from_frame(
        frame,
        name=name,
        outcomes=("watch", "like"),
        outcome_weights=(0.0, 1.0),
        items=items,
        card={
            "source": f"metarec_gym.data.behaviour_log(seed={seed})",
            "licence": "made up, free of rights",
            "outcomes": {"watch": "the user took the item", "like": "the user liked what was taken"},
        },
    )
    truth = BehaviourTruth(
        user_ids=tuple(user_ids),
        item_ids=tuple(item_ids),
        feature_names=("intercept", *names),
        phi=phi,
        item_category=category,
        item_bias=item_bias,
        effect_mean=mean,
        effect_covariance=covariance,
        effects=effects,
        position_logit=position_logit,
        fatigue=fatigue,
        exposure_decay=exposure_decay,
        leaving=leaving,
        return_edges=edges,
        return_baseline=baseline,
        return_weight=np.asarray(return_weight, dtype=np.float64),
        end_s=end_s,
        watch_probability=probability[order].astype(np.float64),
        exposure=seen[order].astype(np.float64),
    )
    return log, truth


def _gap_hours(
    hazard_logit: NDArray[np.float64], edges: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Hours until the return by bins' hazards (rows, n_bins), uniform in log hours inside a bin; inf = never; (rows,)."""
    n, n_bins = hazard_logit.shape
    happens = rng.random((n, n_bins)) < 1.0 / (1.0 + np.exp(-hazard_logit))
    first = np.argmax(happens, axis=1)
    hours = edges[first] * (edges[first + 1] / edges[first]) ** rng.random(n)
    # a pause longer than the gap that cuts sessions, so that the 30-minute rule finds the same sessions
    return np.where(happens.any(axis=1), np.maximum(hours, 0.5 + 1.0 / 3600.0), np.inf)
