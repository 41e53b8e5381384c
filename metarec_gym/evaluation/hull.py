"""Quality against serving cost: which policies are worth having, and what the cheapest mix saves at equal quality.

A policy is a point (serving cost a request, utility a request before cost). Serving some users by one policy and the others by
another reaches every point between the two, so what can be had is the upper concave hull of the points; what lies below it is
dominated by a mix. The hull is drawn through estimates on the users it is reported on: a point on it may be there by luck, which
is why its difference to the policy in use is shown with its interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metarec_gym.evaluation.headroom import FOLDS
from metarec_gym.evaluation.intervals import Floats, Interval, mean_interval, relative_difference
from metarec_gym.evaluation.leaderboard import PolicyPlays
from metarec_gym.evaluation.rollout import per_user


@dataclass(frozen=True)
class Offer:
    """One policy as quality at a cost.

    Attributes:
        name: Name.
        weight: Cost weight it was trained with.
        cost: Serving cost a request, dearest strategy = 1; 0 after the user left.
        users: float64 (seeds, users), utility a request before cost.
    """

    name: str
    weight: float
    cost: float
    users: Floats

    @property
    def utility(self) -> float:
        """Mean over seeds and users."""
        return float(self.users.mean())

    @property
    def label(self) -> str:
        """The name, and the cost weight where there is one."""
        return self.name if self.weight == 0.0 else f"{self.name} (cost weight {self.weight:g})"


def offer(policy: PolicyPlays, costs: Floats, *, cost_weight: float, window: int, horizon: int) -> Offer:
    """A played policy as an offer.

    Args:
        policy: Its plays.
        costs: float64 (K,), relative cost of each strategy.
        cost_weight: What its rewards were reduced by; given back here.
        window: Index of the window that holds the whole episode.
        horizon: Requests of the episode.
    """
    utility, spent = [], []
    for seed in range(len(policy.plays[FOLDS[0]])):
        plays = [policy.plays[fold][seed] for fold in FOLDS]
        cost = [p.paid @ costs / (horizon * p.value.shape[1]) for p in plays]
        by_user = np.concatenate([per_user(p.user, c) for p, c in zip(plays, cost, strict=True)])
        net = np.concatenate([per_user(p.user, p.value.mean(axis=1)[:, window]) for p in plays])
        utility.append(net + cost_weight * by_user)
        spent.append(float(by_user.mean()))
    return Offer(policy.name, cost_weight, float(np.mean(spent)), np.stack(utility))


def upper_hull(offers: Sequence[Offer]) -> list[Offer]:
    """The offers on the upper concave hull, cheapest first; beyond the best one nothing dearer is on it."""
    # of equally dear ones only the best can be on it
    ranked = sorted(offers, key=lambda o: (o.cost, -o.utility))
    kept: list[Offer] = []
    for point in ranked:
        if kept and point.utility <= max(o.utility for o in kept):
            continue
        # a point below the line between its neighbours is dominated by their mix
        while len(kept) >= 2 and _slope(kept[-2], point) >= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(point)
    return kept


def _slope(first: Offer, second: Offer) -> float:
    return (second.utility - first.utility) / (second.cost - first.cost)


def cost_of(hull: Sequence[Offer], utility: float) -> float | None:
    """Lowest cost at which the hull has at least this utility; None where it has not."""
    if not hull or utility > hull[-1].utility:
        return None
    points = [o.utility for o in hull]
    return float(np.interp(utility, points, [o.cost for o in hull]))


def utility_of(hull: Sequence[Offer], cost: float) -> float | None:
    """Highest utility that the hull has for at most this cost; None below its cheapest offer."""
    if not hull or cost < hull[0].cost:
        return None
    return float(np.interp(cost, [o.cost for o in hull], [o.utility for o in hull]))


@dataclass(frozen=True)
class Frontier:
    """The hull and what it means for one policy that is used now.

    Attributes:
        offers: Everything that was played.
        hull: Those on the hull, cheapest first.
        reference: Name of the policy used now.
        saving: Share of its cost that the hull saves at its quality; None where the hull does not reach it.
        gain: Share of its utility that the hull gains at its cost.
        against: Utility of each hull offer against the reference, relative, with interval.
    """

    offers: tuple[Offer, ...]
    hull: tuple[Offer, ...]
    reference: str
    saving: float | None
    gain: float | None
    against: tuple[Interval, ...]

    def sentence(self) -> str:
        """What the hull offers beside the reference, in words."""
        if any(o.name == self.reference and o.weight == 0.0 for o in self.hull):
            return f"{self.reference} is on the hull itself"
        parts = []
        if self.saving is not None:
            parts.append(f"{self.saving:.0%}".replace("%", " %") + " lower serving cost at its quality")
        if self.gain is not None:
            parts.append(f"{100 * self.gain:+.1f} % quality at its cost")
        return f"against {self.reference} the hull has {' or '.join(parts) or 'nothing to offer'}"

    def cheapest_without_loss(self) -> tuple[Offer, float] | None:
        """The cheapest offer whose utility is surely not below the reference's, and the share of cost saved; None if none is."""
        reference = next(o for o in self.offers if o.name == self.reference and o.weight == 0.0)
        good = [o for o in self.offers if o is reference or relative_difference(o.users, reference.users).low >= 0.0]
        best = min(good, key=lambda o: o.cost)
        return (best, 1.0 - best.cost / reference.cost) if best is not reference and reference.cost > 0.0 else None


def frontier(offers: Sequence[Offer], reference: str) -> Frontier:
    """The hull of all offers, seen from the policy that is used now.

    Args:
        offers: What was played.
        reference: Name of an offer of weight 0.
    """
    used = next(o for o in offers if o.name == reference and o.weight == 0.0)
    hull = upper_hull(offers)
    cost, utility = cost_of(hull, used.utility), utility_of(hull, used.cost)
    return Frontier(
        tuple(offers),
        tuple(hull),
        reference,
        None if cost is None or used.cost == 0.0 else 1.0 - cost / used.cost,
        None if utility is None or used.utility == 0.0 else utility / used.utility - 1.0,
        tuple(relative_difference(o.users, used.users) for o in hull),
    )


def hull_markdown(found: Frontier) -> str:
    """The hull as a Markdown table."""
    lines = [
        f"| on the hull | serving cost a request | utility a request [95 % CI] | against {found.reference} |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {o.label} | {o.cost:.3f} | {mean_interval(o.users).as_number()} | {against.as_percent()} |"
        for o, against in zip(found.hull, found.against, strict=True)
    ]
    return "\n".join(lines)
