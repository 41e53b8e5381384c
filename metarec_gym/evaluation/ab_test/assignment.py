"""Who meets which policy: a salted hash of the user's id, so the answer is the same for ever and needs no table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Traffic shares of the arms, summing to 1.

    Args:
        weights: Any positive numbers by arm, in order.

    Raises:
        ValueError: When there are fewer than two arms or a weight is not a positive number.
    """
    if len(weights) < 2:
        raise ValueError(f"a test needs at least two arms, got {list(weights)}")
    wrong = {arm: w for arm, w in weights.items() if not 0.0 < w < float("inf")}
    if wrong:
        raise ValueError(f"the weights {wrong} are not positive numbers; an arm without traffic is no arm")
    total = float(sum(weights.values()))
    return {arm: float(w) / total for arm, w in weights.items()}


def unit_draws(user_ids: Iterable[object], salt: str) -> NDArray[np.float64]:
    """One number in [0, 1) for each user: the first 53 bits of BLAKE2b(salt, id); float64 (users,).

    Ids are compared as text, so that a CSV's 17 and a Parquet's "17" are one user.
    """
    # the separator keeps salt "a" + id "b1" apart from salt "ab" + id "1"
    keys = (f"{salt}\x1f{user}".encode() for user in user_ids)
    bits = [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11 for key in keys]
    return np.array(bits, dtype=np.float64) * 2.0**-53


def assign(user_ids: Iterable[object], weights: Mapping[str, float], salt: str) -> NDArray[np.str_]:
    """Arm of each user.

    The same user, salt and weights give the same arm on every machine and day. A new test takes a new salt: with an old one
    its arms would inherit whatever the earlier test did to the users.

    Args:
        user_ids: Users, in any order.
        weights: Traffic by arm, any positive numbers.
        salt: Name of the test.

    Returns:
        Arm names, (users,).

    Raises:
        ValueError: When the weights make no test.
    """
    shares = check_weights(weights)
    edges = np.cumsum(list(shares.values()))[:-1]
    return np.array(list(shares))[np.searchsorted(edges, unit_draws(user_ids, salt), side="right")]
