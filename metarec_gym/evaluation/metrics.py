"""What is reported of a policy: lift, closed gap, strategies used, worst-served users, segments."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarec_gym.evaluation.intervals import Floats, Interval, ratio_interval
from metarec_gym.evaluation.rollout import per_user

MIN_HEADROOM = 0.02
"""A closed gap is reported only where the gap itself is surely larger than this share of the single best strategy."""

SEGMENTS = ("cold", "light", "heavy")
SEGMENT_EDGES = (6, 21)
"""History lengths at the start of an episode: cold 0-5, light 6-20, heavy from 21 on."""


def lift(values: ArrayLike, baseline: ArrayLike, *, level: float = 0.95) -> Interval:
    """V(policy) / V(baseline) - 1.

    Args:
        values: Value of every user, (users,) or (seeds, users).
        baseline: Value of the same users under the baseline, (users,).
        level: Confidence level.

    Returns:
        The lift with its interval.
    """
    return ratio_interval(values, baseline, minus=1.0, level=level)


def closed_gap(
    values: ArrayLike, sbs: ArrayLike, oracle: ArrayLike, headroom: Interval, *, level: float = 0.95
) -> Interval | None:
    """AGC = (V(policy) - V(SBS)) / (V(oracle) - V(SBS)): 0 = single best strategy, 1 = the oracle.

    Args:
        values: Value of every user, (users,) or (seeds, users).
        sbs: Value of the same users under the single best strategy, (users,).
        oracle: Under the oracle, (users,), on the same replicates.
        headroom: Lift of the oracle over the single best strategy.
        level: Confidence level.

    Returns:
        The closed gap; None where the headroom's lower bound is not above 2 %: a share of almost nothing says nothing.
    """
    if not headroom.low > MIN_HEADROOM:
        return None
    base = np.asarray(sbs, dtype=np.float64)
    gain = np.asarray(values, dtype=np.float64) - base
    gap = np.asarray(oracle, dtype=np.float64) - base
    if float(gap.mean()) <= 0.0:
        return None
    return ratio_interval(gain, gap, level=level)


def usage_entropy(served: ArrayLike) -> float:
    """Entropy of the strategies served, in bits: 0 = always the same one, log2(K) = all equally often.

    Args:
        served: Requests that each strategy served, (K,).
    """
    counts = np.asarray(served, dtype=np.float64)
    share = counts[counts > 0] / max(float(counts.sum()), 1.0)
    # 0.0 - x, not -x: one strategy alone has entropy 0, not -0
    return 0.0 - float((share * np.log2(share)).sum())


def worst_decile(values: ArrayLike) -> float:
    """Mean value of the tenth of the users that a policy serves worst.

    Args:
        values: Value of every user, (users,) or (seeds, users); seeds are averaged user by user first.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array.mean(axis=0) if array.ndim == 2 else array
    return float(np.sort(array)[: max(1, len(array) // 10)].mean())


def interquartile_mean(scores: ArrayLike) -> float:
    """Mean of the middle half of the scores: a quarter of them, rounded down, is left out at either end (Agarwal et al., 2021).

    Args:
        scores: One score a training seed, (seeds,).
    """
    ranked = np.sort(np.asarray(scores, dtype=np.float64))
    cut = len(ranked) // 4
    return float(ranked[cut : len(ranked) - cut].mean())


def segment_of(history_length: ArrayLike) -> NDArray[np.int64]:
    """Index into `SEGMENTS` of each history length."""
    return cast("NDArray[np.int64]", np.digitize(np.asarray(history_length), SEGMENT_EDGES))


def segment_values(user: NDArray[np.int64], history_length: NDArray[np.int64], values: NDArray[Any]) -> list[Floats]:
    """Values of the users of each segment, a user's start states inside the segment averaged.

    Args:
        user: int64 (C,), user of each start state.
        history_length: int64 (C,).
        values: (C, ...), one row a start state.

    Returns:
        For each segment (users in it, ...); users ascending.
    """
    segment = segment_of(history_length)
    return [per_user(user[segment == s], values[segment == s]) for s in range(len(SEGMENTS))]
