"""Looking at a running test as often as one likes: intervals and p-values that hold at all looks at once.

Asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and
asymptotic confidence sequences", Annals of Statistics 2024, theorem 2.2): for an estimate that is an average to first order,
the factor 1.96 of its standard error is replaced by

    b(n) = sqrt((n + rho) / n * log((n + rho) / (rho * alpha^2))),      n users so far,

and the interval covers at every n at once with probability 1 - alpha, for large n. `rho` only says at which n the interval is
narrowest. It is the mixture sequential probability ratio test of Johari, Koomen, Pekelis and Walsh ("Always valid inference",
Operations Research 2022) turned round: the interval excludes 0 exactly when that test's likelihood ratio is at least 1 / alpha.

Counts need no large n: under the null an event falls into an arm with the arm's share of the traffic, whatever its rate and
whenever it comes, so a Dirichlet mixture against that multinomial is exact (Lindon and Malek, "Anytime-valid inference for
multinomial count data", NeurIPS 2022). A user must count at most once: events of one user are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

MIN_USERS = 100
"""No look before each arm has that many users: the theory is for large numbers."""


def mixture_rho(best_at: float, alpha: float = 0.05) -> float:
    """The mixture's precision that makes the sequence narrowest at `best_at` users.

    Minimises (n + rho) log((n + rho) / (rho alpha^2)) at n = best_at; with q = n / rho the optimum solves
    1 + q = -W(-alpha^2 / e), W the lower branch of Lambert's function.

    Args:
        best_at: Users, in both arms together.
        alpha: 1 - confidence level.

    Raises:
        ValueError: When `alpha` is no probability or `best_at` is not positive.
    """
    from scipy.special import lambertw

    if not 0.0 < alpha < 1.0 or not best_at > 0:
        raise ValueError(f"alpha is {alpha} and best_at {best_at}, expected a number in (0, 1) and a positive one")
    return best_at / (-float(lambertw(-(alpha**2) / np.e, k=-1).real) - 1.0)


def boundary(users: ArrayLike, *, best_at: float, alpha: float = 0.05) -> Floats:
    """How many standard errors the sequence reaches to each side after `users` users; float64 of the shape of `users`."""
    n, rho = np.asarray(users, dtype=np.float64), mixture_rho(best_at, alpha)
    factor: Floats = np.sqrt((n + rho) / n * np.log((n + rho) / (rho * alpha**2)))
    return factor


def log_mixture_ratio(z: ArrayLike, users: ArrayLike, *, best_at: float, alpha: float = 0.05) -> Floats:
    """Log likelihood ratio of the mixture test after `users` users whose estimate lies `z` standard errors from the null.

    log sqrt(rho / (n + rho)) + z^2 / 2 * n / (n + rho); a false alarm at level alpha is a value above log(1 / alpha).
    """
    n, rho = np.asarray(users, dtype=np.float64), mixture_rho(best_at, alpha)
    score = np.asarray(z, dtype=np.float64)
    ratio: Floats = 0.5 * np.log(rho / (n + rho)) + 0.5 * score**2 * n / (n + rho)
    return ratio


def log_count_ratio(counts: ArrayLike, weights: Sequence[float]) -> Floats:
    """Log likelihood ratio that counts do not fall into the arms by their shares.

    Dirichlet(K w) mixture against multinomial(w):  B(K w + x) / B(K w) / prod w_k^x_k.

    Args:
        counts: (..., K) events so far in each arm.
        weights: Shares of the K arms, sum 1.

    Returns:
        float64 (...,).
    """
    from scipy.special import gammaln

    x, w = np.asarray(counts, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    prior = w * len(w)

    def log_beta(a: Floats) -> Floats:
        out: Floats = gammaln(a).sum(axis=-1) - gammaln(a.sum(axis=-1))
        return out

    ratio: Floats = log_beta(prior + x) - log_beta(prior) - (x * np.log(w)).sum(axis=-1)
    return ratio


def always_valid_p(log_ratio: Floats) -> Floats:
    """P-values that may be looked at any number of times: 1 / the largest ratio so far; (..., looks) -> (..., looks)."""
    return np.minimum(1.0, np.exp(-np.maximum.accumulate(log_ratio, axis=-1)))
