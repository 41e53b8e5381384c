"""Coming back: a discrete-time hazard of the hours until a user's next session, fitted by penalised maximum likelihood.

    P(returns in bin b | not returned before) = logistic(baseline_b + weight . x),    bins on a log scale of hours

Singer and Willett, "It's about time: using discrete-time survival analysis to study duration and the timing of events"
(Journal of Educational Statistics 1993). A user's last session is censored at the log's end. A session speaks for a bin only if
the log goes on until that bin is over, whether or not the user came back in it: a bin that the end of the log cuts is dropped for
everybody, because keeping only those who returned in time would make everybody return.

The coefficients are associations in the log, not effects proven by an experiment: eager users have many sessions and short gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metarec_gym import seeding
from metarec_gym.response.frozen import RETURN_FEATURES

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

MIN_RETURNS = 200
"""With fewer observed returns no model is fitted."""
MIN_HELD_OUT_USERS = 10
"""With fewer held-out users nothing is scored."""
_BINS = 18
_MAX_HOURS = 120.0 * 24.0
_MIN_HOURS = 1.0 / 60.0
_FOLLOWED_SHARE = 0.1
_RIDGE = 1.0
_SMOOTHING = 1.0
_CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class ReturnTable:
    """One row per session, users ascending, sessions of a user in time order."""

    user: Tensor
    """int64 (n,)."""
    session: Tensor
    """int64 (n,): number of the session in the log, from 0 within each user."""
    features: Tensor
    """float64 (n, 4): `RETURN_FEATURES`."""
    gap_h: Tensor
    """float64 (n,): hours from the session's last event to the next session's first; inf if the log shows none."""
    followed_h: Tensor
    """float64 (n,): hours from the session's last event to the log's end; what comes later was never looked at."""
    overlaps: int
    """Sessions that start before the one before has ended; their gap counts as 0."""

    @property
    def returned(self) -> Tensor:
        """Whether the log shows a next session; bool (n,)."""
        return torch.isfinite(self.gap_h)

    def rows(self, chosen: Tensor) -> ReturnTable:
        """The rows chosen by a mask or by indices."""
        return ReturnTable(
            self.user[chosen],
            self.session[chosen],
            self.features[chosen],
            self.gap_h[chosen],
            self.followed_h[chosen],
            self.overlaps,
        )


def return_table(dataset: Dataset, users: Tensor) -> ReturnTable:
    """Sessions of the users with what the return model reads, and when the user came back.

    Args:
        dataset: The log; its last event, of whatever user, is the end of the observation.
        users: int64 (n_users_given,).

    Returns:
        The table, one row per session.
    """
    rows = dataset.rows_of(users)
    if len(rows) == 0:
        nothing = torch.zeros(0, dtype=torch.float64)
        none = torch.zeros(0, dtype=torch.int64)
        return ReturnTable(none, none, torch.zeros(0, len(RETURN_FEATURES), dtype=torch.float64), nothing, nothing, 0)
    user, number, time = dataset.user[rows], dataset.session[rows], dataset.time[rows]
    # sessions are numbered in the order of their first events, so the key sorts them by user and start
    key = user * (int(number.max()) + 1) + number
    keys, group = torch.unique(key, return_inverse=True)
    n = len(keys)
    first = torch.full((n,), torch.inf, dtype=torch.float64).scatter_reduce(0, group, time, "amin")
    last = torch.full((n,), -torch.inf, dtype=torch.float64).scatter_reduce(0, group, time, "amax")
    engaged = (dataset.outcome[rows, 0] > 0).to(torch.float64)
    taken = torch.zeros(n, dtype=torch.float64).index_add_(0, group, engaged)
    owner, session = keys // (int(number.max()) + 1), keys % (int(number.max()) + 1)
    same = owner[1:] == owner[:-1]
    pause = (first[1:] - last[:-1]) / 3600.0
    gap = torch.full((n,), torch.inf, dtype=torch.float64)
    gap[:-1][same] = pause[same].clamp(min=0.0)
    previous = torch.zeros(n, dtype=torch.float64)
    previous[1:][same] = pause[same].clamp(min=0.0)
    start = torch.cat([torch.ones(1, dtype=torch.bool), ~same])
    at = torch.arange(n)
    rank = at - at[start][torch.cumsum(start.to(torch.int64), dim=0) - 1]
    features = torch.stack(
        [torch.log1p(taken), torch.log1p(rank + 1.0).to(torch.float64), torch.log1p(previous), start.to(torch.float64)],
        dim=1,
    )
    followed = (float(dataset.time.max()) - last) / 3600.0
    return ReturnTable(owner, session, features, gap, followed, int((pause[same] < 0).sum()))


def survival(hazards: Tensor) -> Tensor:
    """Probability of not being back at each bin's end; (rows, B) -> (rows, B)."""
    return torch.cumprod(1.0 - hazards, dim=1)


def draw_gap(hazards: Tensor, u_bin: Tensor, u_inside: Tensor, edges: Tensor) -> Tensor:
    """Hours until the next session; a higher hazard never means a later return for the same uniforms.

    Args:
        hazards: (rows, B) in [0, 1].
        u_bin: (rows,) uniforms in [0, 1) that choose the bin.
        u_inside: (rows,) uniforms in [0, 1) that choose the place inside the bin, uniform in log hours.
        edges: (B + 1,) hours, ascending.

    Returns:
        (rows,) hours; inf where the user did not come back within the last edge.
    """
    n_bins = hazards.shape[1]
    never = torch.full_like(u_bin, torch.inf)
    if n_bins == 0:
        return never
    # first bin whose distribution function exceeds the uniform
    bin_of = (u_bin[:, None] >= 1.0 - survival(hazards)).sum(dim=1)
    inside = bin_of.clamp(max=n_bins - 1)
    log_edges = torch.log(edges).to(u_bin.dtype)
    hours = torch.exp(log_edges[inside] + u_inside * (log_edges[inside + 1] - log_edges[inside]))
    return torch.where(bin_of == n_bins, never, hours)


def fit_return(
    dataset: Dataset, users: Tensor, *, heldout_users: Tensor | None = None, edges: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fits the return model to the sessions of some users.

    Args:
        dataset: The log.
        users: int64, whose sessions are fitted.
        heldout_users: int64, whose sessions are scored. None: every fifth of `users` is scored by a fit to the others, and the
            tensors come from all of them.
        edges: (B + 1,) hours; None chooses 18 bins on a log scale, from the shortest gaps to the longest that a tenth of the
            sessions was followed for, at most 120 days.

    Returns:
        `return_edges` (B + 1,) hours, `return_baseline` (B,) logits, `return_weight` (4,), float32; B is 0 where the log has too
        few returns to tell. And metrics: counts, coefficients with standard errors (robust to users being alike within
        themselves), held-out log-likelihood a session against the model without features, KS distance between the held-out
        Kaplan-Meier curve and the model's, and the distance that chance alone exceeds once in 20 times (`ks_noise`).
    """
    table = return_table(dataset, users)
    n_returns = int(table.returned.sum())
    metrics: dict[str, Any] = {
        "n_sessions": len(table.user),
        "n_returns": n_returns,
        "n_censored": len(table.user) - n_returns,
        "n_overlapping_sessions": table.overlaps,
        "median_gap_hours": float(table.gap_h[table.returned].median()) if n_returns else None,
        "features": list(RETURN_FEATURES),
    }
    if n_returns < MIN_RETURNS:
        note = f"too few returns to tell: {n_returns} observed, {MIN_RETURNS} needed"
        return _no_model(), {**metrics, "n_bins": 0, "note": note}
    edges = _bin_edges(table) if edges is None else edges.to(torch.float64)
    if edges is None or len(edges) < 2:
        return _no_model(), {**metrics, "n_bins": 0, "note": "the log is too short to follow anybody's return"}
    fitted = _fit(table, edges)
    if heldout_users is None:
        scored = torch.isin(table.user, torch.unique(table.user)[::5])
        metrics["held_out"] = "every fifth user, by a fit to the others"
        metrics.update(_held_out(table.rows(~scored), table.rows(scored), edges))
    else:
        metrics["held_out"] = "the users given"
        metrics.update(_held_out(table, return_table(dataset, heldout_users), edges))
    metrics.update(
        n_bins=len(edges) - 1,
        edges_hours=edges.tolist(),
        coefficients=dict(zip(RETURN_FEATURES, fitted.weight.tolist(), strict=True)),
        standard_errors=dict(zip(RETURN_FEATURES, fitted.weight_se.tolist(), strict=True)),
        engaged_users_return_sooner=bool(fitted.weight[0] > 2.0 * fitted.weight_se[0]),
        back_within_last_edge=float(1.0 - survival(fitted.hazards(table.features)).mean(dim=0)[-1]),
        note="associations in the log: no experiment told users apart from what they met",
    )
    tensors = {
        "return_edges": edges.to(torch.float32),
        "return_baseline": fitted.baseline.to(torch.float32),
        "return_weight": fitted.weight.to(torch.float32),
    }
    return tensors, metrics


def _no_model() -> dict[str, Tensor]:
    """No bins: nobody is ever said to come back."""
    return {
        "return_edges": torch.zeros(1),
        "return_baseline": torch.zeros(0),
        "return_weight": torch.zeros(len(RETURN_FEATURES)),
    }


@dataclass(frozen=True)
class _Fit:
    baseline: Tensor
    weight: Tensor
    weight_se: Tensor

    def hazards(self, features: Tensor) -> Tensor:
        """(rows, 4) -> (rows, B)."""
        return torch.sigmoid(self.baseline + (features @ self.weight)[:, None])


def _bin_edges(table: ReturnTable) -> Tensor | None:
    gaps = table.gap_h[table.returned]
    low = float(torch.quantile(gaps[:: 1 + len(gaps) // 1_000_000], 0.005).clamp(_MIN_HOURS, 24.0))
    followed = np.quantile(table.followed_h.numpy(), 1.0 - _FOLLOWED_SHARE)
    high = min(_MAX_HOURS, float(followed))
    if high <= 4.0 * low:
        return None
    return torch.logspace(np.log10(low), np.log10(high), _BINS + 1, dtype=torch.float64)


def _risk(table: ReturnTable, edges: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """At risk in a bin that the log saw to its end, and returned in it; float64 (rows, B) each."""
    gap, followed = table.gap_h[rows, None], table.followed_h[rows, None]
    # a gap below the first edge counts in the first bin
    not_yet = gap >= edges[:-1]
    not_yet[:, 0] = True
    at_risk = not_yet & (followed >= edges[1:])
    return at_risk.to(torch.float64), (at_risk & (gap < edges[1:])).to(torch.float64)


def _fit(table: ReturnTable, edges: Tensor, *, with_features: bool = True) -> _Fit:
    """Newton's method for the penalised likelihood, on centred and scaled features."""
    n_bins, n_features = len(edges) - 1, table.features.shape[1]
    centre = table.features.mean(dim=0)
    scale = table.features.std(dim=0, unbiased=False)
    # a feature that never varies gets coefficient 0 from the ridge
    scale = torch.where(scale > 1e-9, scale, torch.ones_like(scale))
    used = float(with_features)
    difference = torch.diff(torch.eye(n_bins, dtype=torch.float64), dim=0)
    penalty = torch.zeros(n_bins + n_features, n_bins + n_features, dtype=torch.float64)
    penalty[:n_bins, :n_bins] = _SMOOTHING * difference.T @ difference
    penalty[n_bins:, n_bins:] = _RIDGE * torch.eye(n_features, dtype=torch.float64)
    # a trace of ridge keeps the Hessian regular where no session reaches any bin
    penalty = penalty + 1e-6 * torch.eye(n_bins + n_features, dtype=torch.float64)
    theta = torch.zeros(n_bins + n_features, dtype=torch.float64)

    def evaluate(theta: Tensor, scores: Tensor | None = None) -> tuple[float, Tensor, Tensor]:
        value = torch.zeros((), dtype=torch.float64)
        gradient = torch.zeros_like(theta)
        hessian = torch.zeros_like(penalty)
        for lo in range(0, len(table.user), _CHUNK_ROWS):
            rows = slice(lo, lo + _CHUNK_ROWS)
            at_risk, event = _risk(table, edges, rows)
            x = (table.features[rows] - centre) / scale * used
            logit = theta[:n_bins] + (x @ theta[n_bins:])[:, None]
            value += (event * logit - at_risk * torch.nn.functional.softplus(logit)).sum()
            p = torch.sigmoid(logit)
            residual = event - at_risk * p
            v = at_risk * p * (1.0 - p)
            score = torch.cat([residual, x * residual.sum(dim=1, keepdim=True)], dim=1)
            gradient += score.sum(dim=0)
            cross = v.T @ x
            hessian[:n_bins, :n_bins] += torch.diag(v.sum(dim=0))
            hessian[:n_bins, n_bins:] += cross
            hessian[n_bins:, :n_bins] += cross.T
            hessian[n_bins:, n_bins:] += x.T @ (x * v.sum(dim=1, keepdim=True))
            if scores is not None:
                scores.index_add_(0, cluster[rows], score)
        value -= 0.5 * theta @ penalty @ theta
        return float(value), gradient - penalty @ theta, hessian + penalty

    value, gradient, hessian = evaluate(theta)
    for _ in range(40):
        step = torch.linalg.solve(hessian, gradient)
        expected_gain = float(gradient @ step)
        if expected_gain < 1e-8:
            break
        size = 1.0
        while size > 1e-4:
            new_value, new_gradient, new_hessian = evaluate(theta + size * step)
            if new_value >= value:
                break
            size *= 0.5
        else:
            break
        theta, value, gradient, hessian = theta + size * step, new_value, new_gradient, new_hessian
    # sandwich by user: the sessions of one user are not independent
    distinct, cluster = torch.unique(table.user, return_inverse=True)
    scores = torch.zeros(len(distinct), len(theta), dtype=torch.float64)
    evaluate(theta, scores)
    bread = torch.linalg.inv(hessian)
    covariance = bread @ (scores.T @ scores) @ bread
    weight = theta[n_bins:] / scale * used
    return _Fit(theta[:n_bins] - weight @ centre, weight, covariance.diagonal()[n_bins:].sqrt() / scale)


def _log_likelihood(fit: _Fit, table: ReturnTable, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every session (n,); sessions at risk (B,) and the model's expected returns among them (B,)."""
    value = []
    at_risk_sum, expected = torch.zeros(2, len(edges) - 1, dtype=torch.float64)
    for lo in range(0, len(table.user), _CHUNK_ROWS):
        rows = slice(lo, lo + _CHUNK_ROWS)
        at_risk, event = _risk(table, edges, rows)
        logit = fit.baseline + (table.features[rows] @ fit.weight)[:, None]
        value.append((event * logit - at_risk * torch.nn.functional.softplus(logit)).sum(dim=1))
        at_risk_sum += at_risk.sum(dim=0)
        expected += (at_risk * torch.sigmoid(logit)).sum(dim=0)
    return torch.cat(value), at_risk_sum, expected


def _held_out(fitted: ReturnTable, scored: ReturnTable, edges: Tensor) -> dict[str, Any]:
    """Scores on sessions of users that the fit never saw, with and without features."""
    n_users = len(torch.unique(scored.user))
    if n_users < MIN_HELD_OUT_USERS or not bool(scored.returned.any()):
        return {"note_held_out": f"{n_users} held-out users are too few to tell, or none of them came back"}
    model, at_risk, expected = _log_likelihood(_fit(fitted, edges), scored, edges)
    plain = _log_likelihood(_fit(fitted, edges, with_features=False), scored, edges)[0]
    gain, gain_se = mean_by_user(model - plain, scored.user)
    # the hazard expected of those at risk in each bin: late sessions are followed for less, so a plain mean of the sessions'
    # survival curves would be of other sessions than the Kaplan-Meier curve
    hazard = expected / at_risk.clamp(min=1.0)
    curve = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1.0 - hazard, dim=0)])
    return {
        "held_out_sessions": len(scored.user),
        "held_out_log_likelihood": float(model.mean()),
        "held_out_log_likelihood_baseline": float(plain.mean()),
        "held_out_gain": gain,
        "held_out_gain_se": gain_se,
        "better_than_baseline": gain > 2.0 * gain_se,
        "ks": _kaplan_meier_distance(scored, edges, curve),
        "ks_noise": _kaplan_meier_noise(scored, edges),
    }


def mean_by_user(value: Tensor, user: Tensor) -> tuple[float, float]:
    """Mean of (n,) values and its standard error, when the values of one user may depend on each other."""
    distinct, group = torch.unique(user, return_inverse=True)
    mean = float(value.mean())
    total = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, group, value - mean)
    return mean, float(total.square().sum().sqrt()) / len(value)


def kaplan_meier(gap_h: Tensor, followed_h: Tensor) -> tuple[Tensor, Tensor]:
    """Kaplan and Meier's estimate of not being back yet.

    Args:
        gap_h: (n,) hours to the return, inf if none was seen.
        followed_h: (n,) hours to the end of the observation.

    Returns:
        Hours at which somebody returned, ascending, and the probability of not being back just after each; float64 (m,).
    """
    seen = torch.isfinite(gap_h)
    leaves, _ = torch.where(seen, gap_h, followed_h).sort()
    hours, count = torch.unique(gap_h[seen], return_counts=True)
    at_risk = len(leaves) - torch.searchsorted(leaves, hours)
    return hours, torch.cumprod(1.0 - count.to(torch.float64) / at_risk, dim=0)


def _kaplan_meier_distance(table: ReturnTable, edges: Tensor, curve: Tensor) -> float:
    """Largest distance between the Kaplan-Meier curve and the model's, up to the last edge."""
    hours, alive = kaplan_meier(table.gap_h, table.followed_h)
    inside = hours <= edges[-1]
    hours, alive = hours[inside], alive[inside]
    if len(hours) == 0:
        return float(1.0 - curve[-1])
    # returns are uniform in log hours inside a bin, so the curve is linear there
    model = np.interp(hours.log().numpy(), edges.log().numpy(), curve.numpy())
    before = torch.cat([torch.ones(1, dtype=torch.float64), alive[:-1]]).numpy()
    return float(max(np.abs(model - alive.numpy()).max(), np.abs(model - before).max()))


def _kaplan_meier_noise(table: ReturnTable, edges: Tensor, *, resamples: int = 100) -> float:
    """Distance between the Kaplan-Meier curves of the users and of the users drawn anew, which 95 % of the draws stay below."""
    rng = seeding.numpy_rng(0, "kaplan_meier_noise")
    distinct, group = torch.unique(table.user, return_inverse=True)
    grid = torch.logspace(np.log10(float(edges[0])), np.log10(float(edges[-1])), 200, dtype=torch.float64)
    seen = table.returned
    # returns up to each grid point and sessions at risk there, by user: drawing users anew is then one product
    edge_of = torch.searchsorted(grid, torch.where(seen, table.gap_h, table.followed_h))
    returned = torch.zeros(len(distinct), len(grid) + 1).index_put_((group[seen], edge_of[seen]), torch.ones(()), True)
    left = torch.zeros(len(distinct), len(grid) + 1).index_put_((group, edge_of), torch.ones(()), True)
    at_risk = left.flip(1).cumsum(1).flip(1)
    count = rng.multinomial(len(distinct), np.full(len(distinct), 1.0 / len(distinct)), size=resamples)
    weight = torch.cat([torch.ones(1, len(distinct)), torch.from_numpy(count).to(torch.float32)])
    hazard = (weight @ returned) / (weight @ at_risk).clamp(min=1.0)
    alive = torch.cumprod(1.0 - hazard, dim=1)[:, : len(grid)]
    return float(torch.quantile((alive[1:] - alive[0]).abs().amax(dim=1), 0.95))
