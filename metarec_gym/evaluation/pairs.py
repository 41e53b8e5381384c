"""Trained policies against the ones that a claim names: differences paired by user, corrected for how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metarec_gym.evaluation.intervals import Interval, difference_interval, holm, relative_difference
from metarec_gym.evaluation.leaderboard import TRAINED, PolicyPlays

RULE, BANDIT, LIBRARY = "best non-personal rule", "strongest hierarchical bandit", "PPO of Stable-Baselines3"
"""What a policy is held against."""
HIERARCHICAL = ("hierarchical", "population")
"""Names of bandits with a prior over users hold one of these."""


@dataclass(frozen=True)
class Pair:
    """One comparison.

    Attributes:
        policy: The policy.
        against: Name of what it is held against.
        role: Why: `RULE`, `BANDIT` or `LIBRARY`.
        difference: Utility a request, policy minus the other.
        relative: The same as a share of the other's utility.
        p_holm: P-value of "no difference", Holm-corrected over all pairs of the table.
    """

    policy: str
    against: str
    role: str
    difference: Interval
    relative: Interval
    p_holm: float

    @property
    def sure(self) -> bool:
        """Whether the difference survives the correction at 5 %."""
        return self.p_holm < 0.05


def opponents(policies: Sequence[PolicyPlays], window: int) -> dict[str, str]:
    """What trained policies are held against, by role; roles that nothing played has are left out.

    The strongest hierarchical bandit is the one of highest value on the very users of the table, which favours it: a policy that
    beats it beats each of them.
    """
    values = {policy.name: float(policy.users()[:, :, window].mean()) for policy in policies}
    family = [p.name for p in policies if p.kind == "bandit" and any(word in p.name for word in HIERARCHICAL)]
    found = {}
    if "SCHED" in values:
        found[RULE] = "SCHED"
    if family:
        found[BANDIT] = max(family, key=values.__getitem__)
    if "sb3_ppo" in values:
        found[LIBRARY] = "sb3_ppo"
    return found


def paired_differences(policies: Sequence[PolicyPlays], window: int) -> list[Pair]:
    """Every trained policy against every opponent but itself.

    Args:
        policies: All plays, on the same users with the same luck.
        window: Of the headroom's windows.

    Returns:
        The pairs; one family for Holm's correction.
    """
    values = {policy.name: policy.users()[:, :, window] for policy in policies}
    asked = [
        (policy.name, other, role)
        for role, other in opponents(policies, window).items()
        for policy in policies
        if policy.kind in TRAINED and policy.name != other
    ]
    differences = [difference_interval(values[name], values[other]) for name, other, _ in asked]
    adjusted = holm([difference.p_value() for difference in differences])
    return [
        Pair(name, other, role, difference, relative_difference(values[name], values[other]), p)
        for (name, other, role), difference, p in zip(asked, differences, adjusted, strict=True)
    ]


def pairs_markdown(pairs: Sequence[Pair]) -> str:
    """The pairs as a Markdown table, those of one opponent together."""
    lines = ["| policy | against | difference a request [95 % CI] | relative | p (Holm) |", "|---|---|---|---|---|"]
    for pair in sorted(pairs, key=lambda p: (p.role, -p.difference.estimate)):
        against = pair.against if pair.role == RULE else f"{pair.against} ({pair.role})"
        lines.append(
            f"| {pair.policy} | {against} | {signed(pair.difference)} | {pair.relative.as_percent()} | {pair.p_holm:.2g} |"
        )
    return "\n".join(lines)


def signed(interval: Interval) -> str:
    """For example `+0.031 [+0.010, +0.052]`."""
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
