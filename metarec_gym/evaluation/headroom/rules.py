"""Who is still in the race, and the best rule that does not look at the user: chosen on one fold's plays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from metarec_gym.evaluation.headroom.found import FoldPlays, halves, mean_replicates
from metarec_gym.evaluation.intervals import Floats
from metarec_gym.evaluation.rollout import (
    Fixed,
    LengthRule,
    Rotation,
    RowRule,
    Schedule,
    per_user,
)
from metarec_gym.seeding import fold_in, mix, stream

DROP_P = 1e-4
"""A strategy leaves a start state's race when a t test says that it is worse than the leader with a p-value below this."""


def still_racing(values: Floats, racing: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Strategies that may be the best of a start state at one of the windows.

    Args:
        values: (C, N, K, P); replicates are shared by the strategies, so differences are paired.
        racing: (C, K), strategies that are left; all if None.

    Returns:
        bool (C, K), at least one strategy for each start state.
    """
    from scipy import stats

    replicates = values.shape[1]
    if racing is None:
        racing = np.ones((values.shape[0], values.shape[2]), dtype=np.bool_)
    if replicates < 2:
        return racing
    # far below any value, yet finite: whoever left stays behind
    filled = np.where(racing[:, None, :, None] & ~np.isnan(values), values, -1e9)
    leader = filled.mean(axis=1).argmax(axis=1)
    behind = np.take_along_axis(filled, leader[:, None, None, :], axis=2) - filled
    se = behind.std(axis=1, ddof=1) / np.sqrt(replicates)
    limit = float(stats.t.ppf(1.0 - DROP_P, replicates - 1))
    left: NDArray[np.bool_] = racing & (behind.mean(axis=1) <= limit * se + 1e-9).any(axis=2)
    # start states that are decided were not played on; they stay decided
    return np.where(racing.sum(axis=1, keepdims=True) > 1, left, racing)


def choose(raced: Floats, racing: NDArray[np.bool_], headline: int) -> NDArray[np.int64]:
    """Best racing strategy of each start state on each half; (C, M, K, P) and (C, K) -> (C, 2, P)."""
    half = halves(raced.shape[1])
    values = np.where(racing[:, None, :, None], raced, -np.inf)
    best = np.stack([mean_replicates(values[:, half == h]).argmax(axis=1) for h in (0, 1)], axis=1)
    best[:, :, -1] = best[:, :, headline]
    return best


def fit_length_rule(history_length: NDArray[np.int64], value: Floats, bins: int) -> LengthRule:
    """Best strategy for each range of history lengths.

    Args:
        history_length: int64 (C,).
        value: (C, K), value of every strategy from each start state.
        bins: Ranges wanted; the edges are quantiles of the lengths, so fewer remain where lengths repeat.

    Returns:
        The rule.
    """
    edges = length_edges(history_length, bins)
    place = np.digitize(history_length, edges)
    strategies = [int(value[place == b].mean(axis=0).argmax()) for b in range(len(edges) + 1)]
    return LengthRule(edges, tuple(strategies))


def length_edges(history_length: NDArray[np.int64], bins: int) -> tuple[int, ...]:
    """Quantiles of history lengths that cut them into `bins` ranges; fewer where lengths repeat."""
    if bins == 1:
        return ()
    quantiles = np.quantile(history_length, np.arange(1, bins) / bins, method="inverted_cdf")
    return tuple(int(edge) for edge in np.unique(quantiles) if edge > history_length.min())


def choose_sched(
    train: FoldPlays,
    timed: Mapping[RowRule, Floats],
    strategies: tuple[str, ...],
    headline: int,
    seed: int,
) -> tuple[str, RowRule, dict[str, float]]:
    """Best non-personal rule on the training users: one strategy, a history-length rule, a rotation, switch or schedule.

    Rules that are fitted to users win on the very users they were fitted to; so one strategy and length rules are judged by
    five-fold cross-validation over the training users, and only then fitted to all of them. The timed rules are fitted to
    means over all users; that flatters them little, and if it does, SCHED as scored on the other fold is the lower for it.
    Rank fusion is a strategy (`rrf`).

    Args:
        train: Plays of the training fold.
        timed: Values (C, R, P) of rotations, switches and schedules on the training fold's first R replicates.
        strategies: Names.
        headline: Index of the window that decides.
        seed: Decides the cross-validation's parts.

    Returns:
        Name in words, the rule, and the score of every candidate.
    """
    replicates = next(iter(timed.values())).shape[1] if timed else train.fixed.shape[1]
    fixed = train.fixed[:, :replicates].mean(axis=1)[:, :, headline]
    part = (fold_in(mix(torch.tensor(stream(seed, "sched parts"))), torch.from_numpy(train.user)) % 5).numpy()
    scores: dict[str, float] = {}
    rules: dict[str, RowRule] = {}

    def score(value: Floats) -> float:
        return float(per_user(train.user, value[:, None]).mean())

    def cross_validated(fit: Callable[[NDArray[np.bool_]], NDArray[np.int64]]) -> float:
        chosen = np.zeros(len(fixed), dtype=np.int64)
        for p in np.unique(part):
            rest = part != p
            chosen[~rest] = fit(rest if rest.any() else ~rest)[~rest]
        return score(np.take_along_axis(fixed, chosen[:, None], axis=1)[:, 0])

    def single(rows: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.full(len(fixed), per_user(train.user[rows], fixed[rows]).mean(axis=0).argmax())

    best = int(per_user(train.user, train.fixed.mean(axis=1)[:, :, headline]).mean(axis=0).argmax())
    rules["one strategy"] = Fixed(best)
    scores["one strategy"] = cross_validated(single)
    for timed_rule, value in timed.items():
        name = describe_timed_rule(timed_rule, strategies)
        # long schedules are told by their shares, and two may share them
        name = name if name not in rules else f"{name} ({len(rules)})"
        rules[name], scores[name] = timed_rule, score(value.mean(axis=1)[:, headline])
    for bins in (2, 3, 4, 6):

        def by_length(rows: NDArray[np.bool_], bins: int = bins) -> NDArray[np.int64]:
            rule = fit_length_rule(train.history_length[rows], fixed[rows], bins)
            return np.asarray(rule.strategies)[np.digitize(train.history_length, rule.edges)]

        name = f"history-length rule with {bins} ranges"
        rules[name] = fit_length_rule(train.history_length, fixed, bins)
        scores[name] = cross_validated(by_length)
    # a rule must be better than one strategy, not equal to it
    winner = max(scores, key=lambda name: (scores[name], name == "one strategy"))
    rule = rules[winner]
    if isinstance(rule, Fixed):
        winner = f"always {strategies[rule.strategy]}"
    elif isinstance(rule, LengthRule):
        winner = describe_length_rule(rule, strategies)
    return winner, rule, scores


def played_throughout(rule: RowRule, plays: FoldPlays) -> Floats:
    """Value (C, R, P) of a rule that keeps one strategy in each episode, from the plays of every strategy."""
    if isinstance(rule, Fixed):
        return plays.fixed[:, :, rule.strategy]
    length_rule = cast(LengthRule, rule)
    chosen = np.asarray(length_rule.strategies)[np.digitize(plays.history_length, length_rule.edges)]
    return np.take_along_axis(plays.fixed, chosen[:, None, None, None], axis=2)[:, :, 0]


def describe_timed_rule(rule: RowRule, strategies: tuple[str, ...]) -> str:
    """A rotation, switch or schedule in words: `x 1-8, y 9-12` for the requests 1 to 8 and 9 to 12."""
    if isinstance(rule, Rotation):
        return "in turn: " + ", ".join(strategies[k] for k in rule.strategies)
    schedule = cast(Schedule, rule)
    lines = []
    for turns in schedule.table:
        starts = [i for i in range(len(turns)) if i == 0 or turns[i] != turns[i - 1]]
        ends = [*starts[1:], len(turns)]
        spans = [
            f"{strategies[turns[a]]} from request {a + 1}"
            if b == len(turns)
            else f"{strategies[turns[a]]} {a + 1}" + (f"-{b}" if b > a + 1 else "")
            for a, b in zip(starts, ends, strict=True)
        ]
        if len(spans) > 6:
            used = sorted(set(turns), key=lambda k: -turns.count(k))
            spans = [f"{strategies[k]} {turns.count(k)}x" for k in used]
        lines.append(", ".join(spans))
    if len(lines) == 1:
        return "by time: " + lines[0]
    ranges = [f"history below {edge}" for edge in schedule.edges] + ["else"]
    return "by time and history length: " + "; ".join(f"{r}: {line}" for r, line in zip(ranges, lines, strict=True))


def describe_length_rule(rule: LengthRule, strategies: tuple[str, ...]) -> str:
    """The rule in words, neighbouring ranges with one strategy joined."""
    parts: list[str] = []
    for index, strategy in enumerate(rule.strategies):
        if index + 1 < len(rule.strategies) and rule.strategies[index + 1] == strategy:
            continue
        name = strategies[strategy]
        parts.append(f"{name} below {rule.edges[index]}" if index < len(rule.edges) else f"else {name}")
    return "by history length: " + ", ".join(parts)
