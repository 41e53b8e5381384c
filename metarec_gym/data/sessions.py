"""Sessions: the requests between two absences of a user, given by the log or found by a gap in time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SESSION_GAP_S = 30 * 60.0


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
