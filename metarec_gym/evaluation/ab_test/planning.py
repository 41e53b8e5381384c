"""Before the test: what it can find, by resampling users who were served as the control arm will be.

A planned test is drawn many times: both arms' users with replacement from the baseline users, the treated ones' numerators
raised by the effect, analysed as the test will be. So skewed users, ratios and CUPED are in it without a formula for each.
A plan is as good as its baseline: of few users the value itself is uncertain, and the plan does not know it. A/A splits of
the baseline show whether the analysis raises false alarms on these very users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metarec_gym.evaluation.ab_test.estimates import Floats, Moments, compare
from metarec_gym.seeding import numpy_rng

SAMPLES = 2000
"""Tests drawn for a power; its standard error is then at most 1.1 points."""
MAX_STEPS = 6
"""Sizes tried when users are asked for."""
_CHUNK = 8_000_000
"""Weights drawn at once."""


@dataclass(frozen=True)
class Plan:
    """What a test of a given size can find.

    Attributes:
        users: Users in the control arm and in the treated one.
        power: Power that `detectable` is for.
        level: Significance level of the two-sided test.
        detectable: Smallest lift found with that power (relative, 0.05 = 5 %); None when even 100 % is not.
        curve: Pairs of lift and power, ascending.
    """

    users: tuple[int, int]
    power: float
    level: float
    detectable: float | None
    curve: tuple[tuple[float, float], ...]


class Planner:
    """Tests drawn once from the baseline users, to be asked for any effect.

    Args:
        columns: A metric's four numbers of every baseline user, see `table.metric_columns`; float64 (baseline users, 4).
        users: Users in the control arm and in the treated one.
        cuped: Whether the analysis adjusts by the covariate.
        level: Significance level of the two-sided test; divide it by the number of comparisons for Holm's first step.
        samples: Tests drawn.
        seed: Of the draws.

    Raises:
        ValueError: When there are too few users.
    """

    def __init__(
        self,
        columns: Floats,
        users: tuple[int, int],
        *,
        cuped: bool = False,
        level: float = 0.05,
        samples: int = SAMPLES,
        seed: int = 0,
    ) -> None:
        if len(columns) < 10 or min(users) < 10:
            raise ValueError(
                f"{len(columns)} baseline users and arms of {users} users are too few to plan; at least 10 each"
            )
        self.users, self.cuped, self.level = users, cuped, level
        self._binary = bool(np.isin(columns[:, 0], (0.0, 1.0)).all() and (columns[:, 1] == 1.0).all())
        rng = numpy_rng(seed, "planning")
        arms = []
        for size in users:
            step = max(1, _CHUNK // len(columns))
            chance = np.full(len(columns), 1.0 / len(columns))
            draws = (rng.multinomial(size, chance, min(step, samples - low)) for low in range(0, samples, step))
            parts = [Moments.weighted(draw.astype(np.float64), columns) for draw in draws]
            arms.append(Moments(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("count", "mean", "cov"))))
        self._control, self._treated = arms

    def power(self, lift: float) -> float:
        """Share of the drawn tests that find a lift of this size (0 gives the share of false alarms)."""
        found = compare(self._control, self._treated.raised(lift, binary=self._binary), cuped=self.cuped)
        return float((found.p_value() < self.level).mean())

    def detectable(self, power: float = 0.8) -> float | None:
        """Smallest lift that is found with the power, to 0.01 points; None when even 100 % is not."""
        low, high = 0.0, 1.0
        if self.power(high) < power:
            return None
        while high - low > 1e-4:
            middle = (low + high) / 2.0
            low, high = (low, middle) if self.power(middle) >= power else (middle, high)
        return high

    def plan(self, power: float = 0.8) -> Plan:
        """The plan, with a curve up to twice the detectable lift."""
        found = self.detectable(power)
        lifts = np.linspace(0.0, 2.0 * (found or 0.5), 9)
        curve = tuple((float(lift), self.power(float(lift))) for lift in lifts)
        return Plan(self.users, power, self.level, found, curve)


def users_needed(
    columns: Floats,
    lift: float,
    *,
    power: float = 0.8,
    cuped: bool = False,
    level: float = 0.05,
    share: float = 0.5,
    seed: int = 0,
) -> int | None:
    """Users of both arms together for a lift to be found with the power, about; None above ten million.

    Args:
        columns: As for `Planner`.
        lift: Relative effect, not 0.
        power: Wanted power.
        cuped: Whether the analysis adjusts by the covariate.
        level: Significance level.
        share: Share of the two arms' users that is treated.
        seed: Of the draws.

    Raises:
        ValueError: When the lift is 0.
    """
    if lift == 0.0:
        raise ValueError("no number of users finds a lift of 0; give the smallest lift worth finding")

    total = float(max(len(columns), 200))
    for _ in range(MAX_STEPS):
        arms = (max(10, round(total * (1.0 - share))), max(10, round(total * share)))
        found = Planner(columns, arms, cuped=cuped, level=level, samples=SAMPLES // 2, seed=seed).detectable(power)
        # the detectable lift falls with the root of the users: one step lands close, the next ones correct skewness
        wanted = total * (16.0 if found is None else (found / abs(lift)) ** 2)
        if wanted > 1e7:
            return None
        if abs(wanted / total - 1.0) < 0.02:
            break
        total = max(wanted, 40.0)
    return int(np.ceil(wanted))


def a_a_p_values(columns: Floats, *, cuped: bool = False, splits: int = SAMPLES, seed: int = 0) -> Floats:
    """P-values of A/A tests: the baseline users split in two at random, many times over; float64 (splits,).

    Args:
        columns: As for `Planner`.
        cuped: Whether the analysis adjusts by the covariate.
        splits: Tests.
        seed: Of the splits.
    """
    rng = numpy_rng(seed, "a/a splits")
    step = max(1, _CHUNK // len(columns))
    out = []
    for low in range(0, splits, step):
        first = rng.random((min(step, splits - low), len(columns))) < 0.5
        arms = (
            Moments.weighted(first.astype(np.float64), columns),
            Moments.weighted((~first).astype(np.float64), columns),
        )
        out.append(compare(*arms, cuped=cuped).p_value())
    return np.concatenate(out)
