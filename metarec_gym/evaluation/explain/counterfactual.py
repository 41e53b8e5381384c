"""What would have to be different for another strategy to serve: the smallest change of one or two features.

A feature may only take values that occur among the states met, and a change is as large as the share of those states that lie
between the old and the new value. Features of an observation hang together (more items taken means another taste), so a changed
state need not be one that a user can be in: a counterfactual says where the policy's border runs, not what to do to a user.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from metarec_gym.evaluation.explain.features import Feature
    from metarec_gym.evaluation.explain.visits import Visits
    from metarec_gym.policy import Policy

CAVEAT = (
    "Features hang together, so a changed state need not be one that a user can be in: this says where the policy's border "
    "runs, not what to do to a user."
)
VALUES = 32
"""Values tried for a feature: quantiles of those that occur."""
PAIR_FEATURES, PAIR_VALUES = 12, 12
"""Two features are changed together only among those that move the choice most by themselves."""
FROZEN = ("last_strategy", "cost_weight", "latency_weight", "session_fraction")
"""Blocks that are left alone: one entry of a one-hot cannot change by itself, and settings are no property of a user."""


@dataclass(frozen=True)
class Change:
    """One feature's change, as written and as normalised values."""

    feature: str
    before: str
    after: str


@dataclass(frozen=True)
class Counterfactual:
    """A state and the nearest one that gets another strategy.

    Attributes:
        history_length: Items in the history at the start of the user's episode.
        request: Number of the request in words.
        served: The strategy that the policy chooses.
        other: The strategy that it chooses after the change; None where nothing tried changes the choice.
        changes: One or two features.
        size: Share of the states met that lie between the old and the new value, summed over the changes.
    """

    history_length: int
    request: str
    served: str
    other: str | None
    changes: tuple[Change, ...]
    size: float

    def sentence(self) -> str:
        """In words."""
        who = f"A user with {self.history_length} items in the history, request {self.request}: {self.served} serves."
        if self.other is None:
            return f"{who} No value of one or two features that occurs changes that."
        what = " and ".join(f"{c.feature} were {c.after} instead of {c.before}" for c in self.changes)
        return f"{who} {self.other} would serve if {what} (a change across {self.size:.0%} of the states met)."

    def to_json(self) -> dict[str, Any]:
        """Its facts as plain JSON types."""
        return {**vars(self), "changes": [vars(c) for c in self.changes], "sentence": self.sentence()}


def counterfactual(
    policy: Policy, state: int, visits: Visits, features: Sequence[Feature], strategies: Sequence[str]
) -> Counterfactual:
    """The smallest change of one feature that changes the choice, or of two where one is not enough.

    Args:
        policy: A policy that keeps nothing between requests.
        state: Which of the visits.
        visits: States met; values come from them.
        features: The observation in words.
        strategies: Names.

    Returns:
        The nearest counterfactual found.
    """
    obs, mask = visits.obs[state], visits.mask[state]
    served = int(policy.action_probs(obs[None], mask[None]).argmax())
    movable = [f for f in features if f.block not in FROZEN and len(torch.unique(visits.obs[:, f.index])) > 1]
    ordered = {f.index: visits.obs[:, f.index].sort().values for f in movable}
    tried = {f.index: _values(ordered[f.index], VALUES) for f in movable}

    def size(index: int, values: Tensor) -> Tensor:
        return _between(ordered[index], obs[index], values)

    rows: list[Tensor] = []
    cost: list[Tensor] = []
    what: list[tuple[tuple[int, float], ...]] = []
    for f in movable:
        changed = obs.repeat(len(tried[f.index]), 1)
        changed[:, f.index] = tried[f.index]
        rows.append(changed)
        cost.append(size(f.index, tried[f.index]))
        what += [((f.index, float(v)),) for v in tried[f.index]]
    probs = _probs(policy, torch.cat(rows), mask)
    best = _nearest(probs, torch.cat(cost), served)
    if best is None:
        # how far the chosen strategy's lead falls when a feature moves by itself
        reach: dict[int, float] = {}
        for row, ((index, _), *_) in zip(probs, what, strict=True):
            lead = float(row[served] - _without(row, served).max())
            reach[index] = min(reach.get(index, 1.0), lead)
        strongest = sorted(reach, key=lambda index: reach[index])[:PAIR_FEATURES]
        rows, cost, what = [], [], []
        for a, b in itertools.combinations(strongest, 2):
            grid = torch.cartesian_prod(_values(ordered[a], PAIR_VALUES), _values(ordered[b], PAIR_VALUES))
            changed = obs.repeat(len(grid), 1)
            changed[:, a], changed[:, b] = grid[:, 0], grid[:, 1]
            rows.append(changed)
            cost.append(size(a, grid[:, 0]) + size(b, grid[:, 1]))
            what += [((a, float(x)), (b, float(y))) for x, y in grid]
        if rows:
            probs = _probs(policy, torch.cat(rows), mask)
            best = _nearest(probs, torch.cat(cost), served)
    by_index = {f.index: f for f in features}
    moment = next((f.show(float(obs[f.index])) for f in features if f.block == "request_fraction"), "?")
    start = int(visits.history_length[state])
    if best is None:
        return Counterfactual(start, moment, strategies[served], None, (), float("nan"))
    changes = tuple(
        Change(by_index[i].name, by_index[i].show(float(obs[i])), by_index[i].show(value)) for i, value in what[best]
    )
    other = strategies[int(probs[best].argmax())]
    return Counterfactual(start, moment, strategies[served], other, changes, float(torch.cat(cost)[best]))


def _probs(policy: Policy, obs: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return policy.action_probs(obs, mask.expand(len(obs), -1))


def _nearest(probs: Tensor, cost: Tensor, served: int) -> int | None:
    """The cheapest row whose most probable strategy is another one."""
    flips = torch.nonzero(probs.argmax(dim=1) != served)[:, 0]
    return None if len(flips) == 0 else int(flips[cost[flips].argmin()])


def _without(probs: Tensor, served: int) -> Tensor:
    return torch.cat([probs[:served], probs[served + 1 :]])


def _values(ordered: Tensor, count: int) -> Tensor:
    """At most `count` distinct values that occur, spread over the sorted states."""
    place = torch.linspace(0, len(ordered) - 1, count).round().to(torch.int64)
    values: Tensor = torch.unique(ordered[place])
    return values


def _between(ordered: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Share of the sorted states between an old value and each new one; (values,)."""
    low, high = torch.minimum(new, old), torch.maximum(new, old)
    # both ends count half: a change to the neighbouring value is small but not nothing
    closed = torch.searchsorted(ordered, high, right=True) - torch.searchsorted(ordered, low, right=False)
    open_ = torch.searchsorted(ordered, high, right=False) - torch.searchsorted(ordered, low, right=True)
    share: Tensor = (closed + open_.clamp(min=0)).to(torch.float64) / (2.0 * len(ordered))
    return share


def example_states(visits: Visits, segment: Tensor, *, each: int = 2) -> list[int]:
    """One state of each of the most chosen strategies of every segment, in which the policy is as sure as it is on average.

    Args:
        visits: States met.
        segment: int64 (N,), the segment of each state.
        each: Strategies a segment.

    Returns:
        Indices into the visits.
    """
    sure = visits.probs.max(dim=1).values
    found = []
    for s in torch.unique(segment).tolist():
        counts = torch.bincount(visits.label[segment == s], minlength=visits.probs.shape[1])
        for k in counts.argsort(descending=True, stable=True)[:each].tolist():
            rows = torch.nonzero((segment == s) & (visits.label == k))[:, 0]
            if len(rows):
                found.append(int(rows[(sure[rows] - sure[rows].median()).abs().argmin()]))
    return found
