"""Sessions: the requests between two absences of a user, given by the log or found by a gap in time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SESSION_GAP_S = 30 * 60.0
"""Pause that ends a session, where nothing better is known, in seconds."""
_SHORTEST_GAP_S, _LONGEST_GAP_S = 5 * 60.0, 12 * 3600.0
_MIN_PAUSES = 200
_MIN_SHARE = 0.002
_MIN_SEPARATION = 2.0
_KERNEL_SD = 0.3
_VALLEY = 0.8


def sessions_by_gap(
    user: NDArray[np.int64], time_s: NDArray[np.float64], gap_s: float = SESSION_GAP_S
) -> NDArray[np.int64]:
    """Numbers the sessions of each user from 0: a new one starts after more than `gap_s` seconds without an event.

    Args:
        user: (n_rows,) user indices, rows of a user adjacent and in time order.
        time_s: (n_rows,) unix seconds.
        gap_s: Longest pause inside a session, in seconds.

    Returns:
        (n_rows,) session numbers, starting at 0 for every user.
    """
    if not gap_s > 0:
        raise ValueError(f"the session gap is {gap_s} s; it must be positive, 1800 s is usual")
    if len(user) == 0:
        return np.zeros(0, dtype=np.int64)
    new_user = np.concatenate([[True], user[1:] != user[:-1]])
    new_session = np.concatenate([[True], np.diff(time_s) > gap_s]) | new_user
    number = np.cumsum(new_session) - 1
    first_of_user = number[np.flatnonzero(new_user)]
    return np.asarray(number - first_of_user[np.cumsum(new_user) - 1], dtype=np.int64)


def sessions_by_id(user: NDArray[np.int64], session_id: NDArray[np.object_]) -> NDArray[np.int64]:
    """Numbers the given sessions of each user from 0, in order of first appearance.

    Args:
        user: (n_rows,) user indices, rows of a user adjacent and in time order.
        session_id: (n_rows,) the log's session ids; two users with the same id have different sessions.

    Returns:
        (n_rows,) session numbers, starting at 0 for every user.
    """
    if len(user) == 0:
        return np.zeros(0, dtype=np.int64)
    _, id_code = np.unique(session_id.astype(str), return_inverse=True)
    pair = user.astype(np.int64) * (int(id_code.max()) + 1) + id_code
    _, first_row, pair_code = np.unique(pair, return_index=True, return_inverse=True)
    # rank of each (user, session) pair by the row where it first appears: it grows inside a user
    rank = np.empty(len(first_row), dtype=np.int64)
    rank[np.argsort(first_row, kind="stable")] = np.arange(len(first_row))
    number = rank[pair_code]
    new_user = np.concatenate([[True], user[1:] != user[:-1]])
    first_of_user = number[np.flatnonzero(new_user)]
    return np.asarray(number - first_of_user[np.cumsum(new_user) - 1], dtype=np.int64)


@dataclass(frozen=True)
class SessionGap:
    """Where the pauses inside sessions end and those between them begin."""

    gap_s: float
    """Longest pause inside a session, in seconds."""
    note: str
    """How it was found, or why it could not be."""
    share_between: float | None = None
    """Share of the pauses that are longer; None if the gap was not fitted."""


def fitted_gap_s(user: NDArray[np.int64], time_s: NDArray[np.float64]) -> float:
    """The session gap that the pauses of a log suggest, in seconds: `fit_session_gap` without its reasons."""
    return fit_session_gap(user, time_s).gap_s


def fit_session_gap(user: NDArray[np.int64], time_s: NDArray[np.float64]) -> SessionGap:
    """Fits a mixture of log-normals to the pauses between a user's events; the gap is where both kinds are equally likely.

    Pauses inside sessions take seconds to minutes, those between sessions hours to days: the logarithms of the pauses have two
    hills, one log-normal each, or two for the first hill if its tail is long. Events of the same moment have no pause between
    them. Where there are not two hills the usual 30 minutes are kept.

    Args:
        user: (n_rows,) user indices, rows of a user adjacent and in time order.
        time_s: (n_rows,) unix seconds.

    Returns:
        The gap, at least 5 minutes and at most 12 hours, and how it was found.
    """
    pause = np.diff(time_s)[user[1:] == user[:-1]] if len(user) > 1 else np.zeros(0)
    pause = pause[pause > 0]
    usual = f"the usual {SESSION_GAP_S / 60:.0f} minutes are kept"
    if len(pause) < _MIN_PAUSES:
        return SessionGap(SESSION_GAP_S, f"{len(pause)} pauses, {_MIN_PAUSES} needed for a fit; {usual}")
    log_pause = np.log(pause)
    if log_pause.max() - log_pause.min() < 1.0:
        return SessionGap(SESSION_GAP_S, f"all pauses are alike; {usual}")
    # a histogram is all that the fit needs, and makes its cost independent of the log's size
    count, edge = np.histogram(log_pause, bins=200)
    at, weight = 0.5 * (edge[1:] + edge[:-1]), count / count.sum()
    usual_log = np.log(SESSION_GAP_S)
    inside = np.cumsum(weight * (at <= usual_log))
    tail_log = at[np.searchsorted(inside, 0.9 * inside[-1])]
    # where pauses inside sessions have a long tail one normal cannot hold them, and two may
    for cuts in ((usual_log,), (tail_log, usual_log)):
        share, mean, sd = _normals(at, weight, np.asarray(cuts))
        crossing = _crossing(at, weight, share, mean, sd)
        if crossing is not None:
            break
    if crossing is None:
        return SessionGap(SESSION_GAP_S, f"the pauses do not fall into two kinds; {usual}")
    crossing_s = float(np.exp(crossing))
    gap_s = min(max(crossing_s, _SHORTEST_GAP_S), _LONGEST_GAP_S)
    note = f"pauses of two kinds, equally likely at {crossing_s / 60:.1f} minutes"
    if gap_s != crossing_s:
        note += f", moved to {gap_s / 60:.0f} minutes, the end of what is allowed"
    return SessionGap(gap_s, note, float((pause > gap_s).mean()))


def _normals(
    at: NDArray[np.float64], weight: NDArray[np.float64], cuts: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mixture of normals by EM on a histogram, from the parts between the cuts: shares, means (ascending), deviations."""
    part = np.searchsorted(cuts, at)
    belongs = np.eye(len(cuts) + 1)[part]
    # a hill narrower than the histogram's bars cannot be told from one bar
    narrowest = max(float(at[1] - at[0]), 0.05)
    mean, sd = np.zeros(len(cuts) + 1), np.ones(len(cuts) + 1)
    for _ in range(500):
        mass = weight[:, None] * belongs
        share = mass.sum(axis=0) + 1e-12
        new_mean = (mass * at[:, None]).sum(axis=0) / share
        new_sd = np.sqrt((mass * (at[:, None] - new_mean) ** 2).sum(axis=0) / share).clip(min=narrowest)
        step = max(float(np.abs(new_mean - mean).max()), float(np.abs(new_sd - sd).max()))
        mean, sd = new_mean, new_sd
        if step < 1e-5:
            break
        log_density = np.log(share) - np.log(sd) - 0.5 * ((at[:, None] - mean) / sd) ** 2
        belongs = np.exp(log_density - np.logaddexp.reduce(log_density, axis=1, keepdims=True))
    order = np.argsort(mean)
    return share[order], mean[order], sd[order]


def _crossing(
    at: NDArray[np.float64],
    weight: NDArray[np.float64],
    share: NDArray[np.float64],
    mean: NDArray[np.float64],
    sd: NDArray[np.float64],
) -> float | None:
    """Where the last normal of the mixture overtakes the others together, if it and they are two hills of the histogram."""
    inside = share[:-1].sum()
    centre = (share[:-1] * mean[:-1]).sum() / inside
    variance = (share[:-1] * (sd[:-1] ** 2 + (mean[:-1] - centre) ** 2)).sum() / inside
    # Ashman's D (Astronomical Journal 1994): two normals closer than 2 make one hill
    separation = (mean[-1] - centre) / np.sqrt(0.5 * (variance + sd[-1] ** 2))
    if min(share[-1], inside) < _MIN_SHARE or separation < _MIN_SEPARATION:
        return None
    grid = np.linspace(centre, mean[-1], 2001)
    density = share * np.exp(-0.5 * ((grid[:, None] - mean) / sd) ** 2) / sd
    crossing = float(grid[np.argmax(density[:, -1] >= density[:, :-1].sum(axis=1))])
    # the mixture may see two hills where there are none; the smoothed histogram has the last word
    smooth = np.exp(-0.5 * ((at[:, None] - at) / _KERNEL_SD) ** 2) @ weight
    below = at <= crossing
    if not 0 < below.sum() < len(at):
        return None
    first = int(np.argmax(np.where(below, smooth, -1.0)))
    second = int(np.argmax(np.where(below, -1.0, smooth)))
    valley = smooth[first : second + 1].min()
    return crossing if valley < _VALLEY * min(smooth[first], smooth[second]) else None
