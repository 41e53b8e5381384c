"""Leaving: the chance that a request is the last of its session, fitted by maximum likelihood where the log identifies it.

    logit P(leaves after the request) = intercept + boredom * unrewarded + quality * share taken + repetition * exposure

A request is all the rows of one user and session with the same timestamp: what was shown at the same moment is one slate. A log
that holds only what users took cannot say what they saw before they left: leaving is then not identified, and users never leave.

The last request of a session is where the user left. Within a session's longest pause of the log's end nobody can tell: all
requests made then are dropped, those that another one followed too, because keeping only these would make users stay.

As with everything learnt from a log, the coefficients are associations: how a user felt that day moves both what is taken and
when the session ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarec_gym.data.dataset import Dataset
from metarec_gym.data.sessions import SESSION_GAP_S
from metarec_gym.response.calibration import logistic_fit
from metarec_gym.response.frozen import EXPOSURE_DECAY
from metarec_gym.response.returning import MIN_HELD_OUT_USERS, mean_by_user

LEAVING_FEATURES = ("unrewarded", "quality", "repetition")
"""Requests since the last with an item taken, with this one; share of the slate taken; mean category exposure of the slate."""
MIN_EVENTS = 100
"""Fewest sessions' ends, and fewest requests after which the user stayed, for a fit."""
_CATEGORY_BLOCK = 16


@dataclass(frozen=True)
class RequestTable:
    """One row per request: users ascending, their sessions in order, requests in time order."""

    user: Tensor
    """int64 (n,)."""
    session: Tensor
    """int64 (n,): number of the session, from 0 within each user."""
    features: Tensor
    """float64 (n, 3): `LEAVING_FEATURES`."""
    left: Tensor
    """bool (n,): the session's last request."""
    known: Tensor
    """bool (n,): whether the log goes on long enough to tell if the user left."""
    slate_size: Tensor
    """int64 (n,): rows of the request."""

    def rows(self, chosen: Tensor) -> RequestTable:
        """The rows chosen by a mask."""
        return RequestTable(
            self.user[chosen],
            self.session[chosen],
            self.features[chosen],
            self.left[chosen],
            self.known[chosen],
            self.slate_size[chosen],
        )


def request_table(dataset: Dataset, users: Tensor, *, pause_s: float = SESSION_GAP_S) -> RequestTable:
    """The requests of the users with what the leaving model reads.

    Args:
        dataset: A log with impressions; its last event, of whatever user, is the end of the observation.
        users: int64 (n_users_given,).
        pause_s: Longest pause inside a session, in seconds.

    Returns:
        The table.
    """
    rows = dataset.rows_of(users)
    # rows are in (user, time) order; a stable sort by (user, session) also untangles sessions that overlap
    width = int(dataset.session[rows].max()) + 1 if len(rows) else 1
    key = dataset.user[rows] * width + dataset.session[rows]
    order = torch.argsort(key, stable=True)
    rows, key = rows[order], key[order]
    time = dataset.time[rows]
    new_session = _changes(key)
    new_request = new_session | _changes(time)
    request = torch.cumsum(new_request.to(torch.int64), dim=0) - 1
    n = int(new_request.sum())
    size = torch.bincount(request, minlength=n)
    taken = torch.zeros(n, dtype=torch.float64).index_add_(0, request, (dataset.outcome[rows, 0] > 0).to(torch.float64))
    first = rows[new_request]
    starts = new_session[new_request]
    ends = torch.cat([starts[1:], torch.ones(min(n, 1), dtype=torch.bool)])
    category = dataset.item_category / dataset.item_category.sum(dim=1, keepdim=True).clamp(min=1.0)
    repetition = torch.zeros(n, dtype=torch.float64)
    # exposure is a sum over categories: a block of them at a time bounds the memory
    for block in category.split(_CATEGORY_BLOCK, dim=1):
        shown = torch.zeros(n, block.shape[1]).index_add_(0, request, block[dataset.item[rows]]) / size[:, None]
        repetition += _repetition(shown, starts)
    features = torch.stack([_unrewarded(taken > 0, starts), taken / size, repetition], dim=1)
    end_s = float(dataset.time.max())
    return RequestTable(
        user=dataset.user[first],
        session=dataset.session[first],
        features=features,
        left=ends,
        known=end_s - dataset.time[first] > pause_s,
        slate_size=size,
    )


def _changes(value: Tensor) -> Tensor:
    """Whether an entry differs from the one before; the first does; (n,) -> bool (n,)."""
    return torch.cat([torch.ones(min(len(value), 1), dtype=torch.bool), value[1:] != value[:-1]])


def _unrewarded(rewarded: Tensor, starts: Tensor) -> Tensor:
    """Requests of the session since the last rewarded one, 0 at a rewarded one; bool (n,) both -> float64 (n,)."""
    at = torch.arange(len(rewarded))
    # place of the newest rewarded request, or of the one before the session's first
    anchor = torch.where(rewarded, at, torch.where(starts, at - 1, torch.full_like(at, -1)))
    newest = torch.cummax(anchor, dim=0).values if len(at) else anchor
    return (at - newest).to(torch.float64)


def _repetition(shown: Tensor, starts: Tensor) -> Tensor:
    """Mean category exposure of every request's slate.

    Args:
        shown: float32 (n, n_categories), mean category row of the slate's items.
        starts: bool (n,), the session's first request.

    Returns:
        float64 (n,): shown . e, with e = 0 at the session's start and e' = decay * e + shown after each request.
    """
    n = len(starts)
    first = torch.nonzero(starts).flatten()
    length = torch.diff(torch.cat([first, torch.tensor([n])]))
    # long sessions first: those that have a k-th request are then a prefix, and the work is that of the requests alone
    order = torch.argsort(length, descending=True, stable=True)
    first, length = first[order], length[order]
    exposure = torch.zeros(len(first), shown.shape[1])
    repetition = torch.zeros(n, dtype=torch.float64)
    going = torch.bincount(length, minlength=1).flip(0).cumsum(0).flip(0)[1:] if n else length
    for k, count in enumerate(going.tolist()):
        row = first[:count] + k
        slate = shown[row]
        repetition[row] = (slate * exposure[:count]).sum(dim=1).to(torch.float64)
        exposure[:count] = EXPOSURE_DECAY * exposure[:count] + slate
    return repetition


def fit_leaving(
    dataset: Dataset, users: Tensor, *, heldout_users: Tensor | None = None, pause_s: float = SESSION_GAP_S
) -> tuple[Tensor, dict[str, Any]]:
    """Fits the leaving hazard to the requests of some users.

    Args:
        dataset: The log.
        users: int64, whose requests are fitted.
        heldout_users: int64, whose requests are scored. None: every fifth of `users` is scored by a fit to the others, and the
            coefficients come from all of them.
        pause_s: Longest pause inside a session, in seconds; requests nearer to the log's end are dropped.

    Returns:
        float32 (4,): intercept, boredom, quality, repetition; (-inf, 0, 0, 0), never, where the log does not identify leaving.
        And metrics: counts, coefficients with standard errors (robust to users being alike within themselves), held-out log-loss
        against a constant hazard.
    """
    never = torch.tensor([-torch.inf, 0.0, 0.0, 0.0])
    if not dataset.has_impressions:
        return never, {"identified": False, "note": "not identified: the log does not say what was shown"}
    table = request_table(dataset, users, pause_s=pause_s)
    table, dropped = table.rows(table.known), int((~table.known).sum())
    n_left = int(table.left.sum())
    metrics: dict[str, Any] = {
        "n_requests": len(table.left),
        "n_left": n_left,
        "n_dropped_at_the_logs_end": dropped,
        "requests_of_one_item": float((table.slate_size == 1).to(torch.float64).mean()) if len(table.left) else None,
        "features": list(LEAVING_FEATURES),
    }
    if min(n_left, len(table.left) - n_left) < MIN_EVENTS:
        stayed = len(table.left) - n_left
        note = f"not identified: {n_left} ends of sessions and {stayed} requests after which the user stayed, {MIN_EVENTS} needed"
        return never, {**metrics, "identified": False, "note": note}
    coefficients, errors = _fit(table)
    if heldout_users is None:
        scored = torch.isin(table.user, torch.unique(table.user)[::5])
        metrics["held_out"] = "every fifth user, by a fit to the others"
        metrics.update(_held_out(_fit(table.rows(~scored))[0], table.rows(~scored), table.rows(scored)))
    else:
        metrics["held_out"] = "the users given"
        scored_table = request_table(dataset, heldout_users, pause_s=pause_s)
        metrics.update(_held_out(coefficients, table, scored_table.rows(scored_table.known)))
    names = ("intercept", *LEAVING_FEATURES)
    metrics.update(
        identified=True,
        coefficients=dict(zip(names, coefficients.tolist(), strict=True)),
        standard_errors=dict(zip(names, errors.tolist(), strict=True)),
        note="associations in the log: no experiment told requests apart from the users who made them",
    )
    if metrics["requests_of_one_item"] > 0.5:
        metrics["note"] += "; most requests are of one item: does the log give the items of a slate one timestamp?"
    return coefficients.to(torch.float32), metrics


def _design(table: RequestTable) -> Tensor:
    return torch.cat([torch.ones(len(table.left), 1, dtype=torch.float64), table.features], dim=1)


def _fit(table: RequestTable) -> tuple[Tensor, Tensor]:
    """Coefficients and their standard errors, float64 (4,) each; 0 for a feature that never varies."""
    x, target = _design(table), table.left.to(torch.float64)
    varies = table.features.std(dim=0, unbiased=False) > 1e-9
    kept = torch.nonzero(torch.cat([torch.ones(1, dtype=torch.bool), varies])).flatten()
    x = x[:, kept]
    beta = logistic_fit(x, target, torch.ones_like(target))
    p = torch.sigmoid(x @ beta)
    # sandwich by user: the requests of one user are not independent
    distinct, cluster = torch.unique(table.user, return_inverse=True)
    scores = torch.zeros(len(distinct), len(kept), dtype=torch.float64)
    scores.index_add_(0, cluster, x * (target - p)[:, None])
    bread = torch.linalg.pinv(x.T @ (x * (p * (1.0 - p))[:, None]), hermitian=True)
    errors = (bread @ (scores.T @ scores) @ bread).diagonal().sqrt()
    whole = torch.zeros(2, 1 + len(LEAVING_FEATURES), dtype=torch.float64)
    whole[:, kept] = torch.stack([beta, errors])
    return whole[0], whole[1]


def _held_out(coefficients: Tensor, fitted: RequestTable, scored: RequestTable) -> dict[str, Any]:
    """Log-loss on requests of users that the fit never saw, against the fitted users' constant hazard."""
    n_users = len(torch.unique(scored.user))
    if n_users < MIN_HELD_OUT_USERS:
        return {"note_held_out": f"{n_users} held-out users are too few to tell"}
    logit = _design(scored) @ coefficients
    target = scored.left.to(torch.float64)
    model = torch.nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
    rate = fitted.left.to(torch.float64).mean().expand_as(target)
    constant = torch.nn.functional.binary_cross_entropy(rate, target, reduction="none")
    gain, gain_se = mean_by_user(constant - model, scored.user)
    return {
        "held_out_requests": len(target),
        "held_out_log_loss": float(model.mean()),
        "held_out_log_loss_constant": float(constant.mean()),
        "held_out_gain": gain,
        "held_out_gain_se": gain_se,
        "better_than_constant": gain > 2.0 * gain_se,
    }
