"""Who is used for what: the three user folds, and prefixes by calendar time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FOLD_S = 0
"""Users whose rows fit the strategies."""
FOLD_A = 1
"""Users whose rows fit judge A."""
FOLD_B = 2
"""Users whose rows fit judge B."""


def assign_folds(
    user_ids: Sequence[str] | NDArray[np.object_], *, seed: int, shares: Sequence[float] = (0.34, 0.33, 0.33)
) -> NDArray[np.int8]:
    """Assigns each user to fold S, A or B, by rank of a hash of (seed, user id).

    The sizes are exact, and because the rank follows the id and not the place in the log, erasing or adding a user
    moves at most the users next to the two cuts.

    Args:
        user_ids: Original ids, all different.
        seed: The experiment's seed.
        shares: Shares of S, A and B; positive, summing to 1.

    Returns:
        int8 (n_users,) of `FOLD_S`, `FOLD_A` and `FOLD_B`.
    """
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1.0) > 1e-6:
        raise ValueError(
            f"fold shares are {tuple(shares)}; expected three positive numbers that sum to 1, e.g. (0.34, 0.33, 0.33)"
        )
    n_users = len(user_ids)
    if n_users < 3:
        raise ValueError(f"the log has {n_users} users and three folds need at least 3; use a log with more users")
    key = f"folds:{int(seed)}".encode()
    ranks = np.array(
        [
            int.from_bytes(
                hashlib.blake2b(str(user).encode(), digest_size=8, key=hashlib.sha256(key).digest()).digest(), "big"
            )
            for user in user_ids
        ],
        dtype=np.uint64,
    )
    # every fold keeps at least one user, however small its share
    cut_a = min(max(round(n_users * shares[0]), 1), n_users - 2)
    cut_b = min(max(round(n_users * (shares[0] + shares[1])), cut_a + 1), n_users - 1)
    fold = np.empty(n_users, dtype=np.int8)
    order = np.argsort(ranks, kind="stable")
    fold[order[:cut_a]] = FOLD_S
    fold[order[cut_a:cut_b]] = FOLD_A
    fold[order[cut_b:]] = FOLD_B
    return fold


def engaged_before(
    time_s: NDArray[np.float64], engaged: NDArray[np.bool_], offsets: NDArray[np.int64], cut_s: float
) -> NDArray[np.int64]:
    """How many engaged items each user had before a calendar time: the history length of a dated start state.

    Args:
        time_s: (n_rows,) unix seconds, rows sorted by (user, time).
        engaged: (n_rows,) whether the gate outcome happened.
        offsets: (n_users + 1,) rows of user u are `offsets[u]:offsets[u + 1]`.
        cut_s: The cut, unix seconds; an event at the cut comes after it.

    Returns:
        int64 (n_users,).
    """
    counts = np.concatenate([[0], np.cumsum(engaged & (time_s < cut_s))])
    return np.asarray(counts[offsets[1:]] - counts[offsets[:-1]], dtype=np.int64)
