"""Do the intervals, tests and plans hold what they promise? Measured on made-up users whose truth is known.

    python -m experiments.coverage_ab --out experiments/results/coverage_ab.md

Users are skewed and differ from each other: gamma-distributed values, click rates that vary by user, requests that vary by
user, a pre-period that is correlated with the outcome. Every line says what was promised and what was found.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.run_folder import command_line, write_atomic
from metarec_gym.evaluation.ab_test.analysis import SRM_LEVEL, sample_ratio
from metarec_gym.evaluation.ab_test.estimates import Floats, Moments, compare
from metarec_gym.evaluation.ab_test.monitoring import effect_path
from metarec_gym.evaluation.ab_test.planning import Planner
from metarec_gym.evaluation.ab_test.sequential import MIN_USERS, always_valid_p, log_count_ratio
from metarec_gym.evaluation.intervals import holm, mean_interval, ratio_interval
from metarec_gym.evaluation.online import OnlineResult, best_policy, fixed_allocation
from metarec_gym.seeding import numpy_rng

USERS = 500
"""Users of an arm in tests that are looked at once."""
LOOKS = 1200
"""Users of both arms together in tests that are looked at after every user."""
BASELINE = 4000
"""Users that a test is planned from."""
CHUNK = 50
"""Tests worked on at once."""
ANY = (0.0, 1.0)
"""Nothing is promised."""
KINDS = ("mean", "ratio", "CUPED", "conversion")


@dataclass(frozen=True)
class Args:
    """Measures coverage and error rates."""

    repetitions: int = 2000
    """Tests of each kind."""
    seed: int = 0
    """Seed of all draws."""
    out: Path | None = None
    """Markdown file to write; printed only if absent."""


@dataclass(frozen=True)
class Line:
    """One promise and what was found.

    Attributes:
        what: What was measured.
        promised: Lowest and highest value that keep the promise.
        found: The value.
        note: More, may be empty.
    """

    what: str
    promised: tuple[float, float]
    found: float
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        return self.promised[0] <= self.found <= self.promised[1]


# ---- users whose truth is known


def draw_users(kind: str, lift: float, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """The four numbers of made-up users; float64 (*shape, 4).

    Args:
        kind: One of `KINDS`.
        lift: Relative effect on them.
        shape: How many.
        rng: Their draws.
    """
    out = np.ones((*shape, 4))
    if kind == "mean":
        out[..., 0] = (1.0 + lift) * rng.gamma(1.5, 2.0, shape)
    elif kind == "ratio":
        rate = rng.beta(2.0, 18.0, shape)
        out[..., 1] = 5.0 + rng.poisson(15.0, shape)
        out[..., 0] = rng.binomial(out[..., 1].astype(np.int64), rate * (1.0 + lift))
    elif kind == "CUPED":
        taste = rng.gamma(2.0, 2.0, shape)
        out[..., 2] = rng.poisson(taste)
        out[..., 0] = rng.poisson(taste * (1.0 + lift))
    else:
        out[..., 0] = rng.random(shape) < 0.3 * (1.0 + lift)
    return out


TRUTH = {"mean": 3.0, "ratio": 0.1, "CUPED": 4.0, "conversion": 0.3}
"""What the control arm is worth; E[gamma(1.5, 2)] = 3, E[beta(2, 18)] = 0.1, E[gamma(2, 2)] = 4."""
LIFTS = {"mean": 0.15, "ratio": 0.15, "CUPED": 0.12, "conversion": 0.27}
"""Effects that tests of `USERS` users in an arm find about four times in five."""


def _cuped(kind: str) -> bool:
    return kind == "CUPED"


# ---- what is measured


def fixed_intervals(repetitions: int, seed: int) -> list[Line]:
    """Coverage of the 95 % interval of a difference."""
    lines = []
    for kind in KINDS:
        rng = numpy_rng(seed, "fixed", kind)
        hits, truth = [], TRUTH[kind] * LIFTS[kind]
        for low in range(0, repetitions, CHUNK):
            size = (min(CHUNK, repetitions - low), USERS)
            arms = [Moments.of(draw_users(kind, lift, size, rng)) for lift in (0.0, LIFTS[kind])]
            found = compare(*arms, cuped=_cuped(kind))
            hits.append(np.abs(found.estimate - truth) <= found.half_width())
        share = float(np.concatenate(hits).mean())
        lines.append(
            Line(f"95 % interval of a difference, {kind}: coverage", (0.93, 0.97), share, f"{USERS} users an arm")
        )
    return lines


def paths(repetitions: int, seed: int) -> list[Line]:
    """Coverage and false alarms when the test is looked at after every user."""
    lines = []
    for kind in KINDS:
        rng = numpy_rng(seed, "paths", kind)
        missed, alarms, naive = [], [], []
        for low in range(0, repetitions, CHUNK):
            size = (min(CHUNK, repetitions - low), LOOKS)
            treated = rng.random(size) < 0.5
            null, raised = (draw_users(kind, lift, size, rng) for lift in (0.0, LIFTS[kind]))
            real = effect_path(treated, np.where(treated[..., None], raised, null), cuped=_cuped(kind))
            truth = TRUTH[kind] * LIFTS[kind]
            missed.append(((real.low > truth) | (real.high < truth)).any(axis=-1))
            same = effect_path(treated, null, cuped=_cuped(kind))
            alarms.append(((same.low > 0) | (same.high < 0)).any(axis=-1))
            # the same looks with 1.96 standard errors
            control, treatment = Moments.running(~treated, null), Moments.running(treated, null)
            found = compare(control, treatment, cuped=_cuped(kind))
            ready = np.minimum(control.count, treatment.count) >= MIN_USERS
            naive.append((ready & (np.abs(found.estimate) > 1.96 * found.se)).any(axis=-1))
        note = f"{LOOKS} users, a look after each"
        covered = 1.0 - float(np.concatenate(missed).mean())
        lines.append(Line(f"confidence sequence, {kind}: coverage of the whole path", (0.94, 1.0), covered, note))
        peeking = f"{note}; 1.96 standard errors at the same looks: {100 * float(np.concatenate(naive).mean()):.1f} %"
        lines.append(
            Line(
                f"A/A under continuous peeking, {kind}: false alarms",
                (0.0, 0.05),
                float(np.concatenate(alarms).mean()),
                peeking,
            )
        )
    return lines


def counts(repetitions: int, seed: int) -> list[Line]:
    """False alarms of the sample-ratio check and of the tests on counts."""
    rng = numpy_rng(seed, "counts")
    # one in a thousand is not seen in a few thousand tests
    many, weights = 20 * repetitions, {"a": 0.5, "b": 0.25, "c": 0.25}
    drawn = rng.multinomial(2000, list(weights.values()), size=many)
    expected = 2000 * np.array(list(weights.values()))
    from scipy import stats

    p_values = stats.chisquare(drawn, expected, axis=1).pvalue
    # the vectorised test is the one that reports use
    assert abs(p_values[0] - sample_ratio(dict(zip(weights, drawn[0].tolist(), strict=True)), weights).p_value) < 1e-12
    share = float((p_values < SRM_LEVEL).mean())
    lines = [
        Line(
            "sample-ratio check: false alarms",
            (0.0, 0.002),
            share,
            f"{many:,} tests of 2,000 users in 3 arms; about 0.1 %",
        )
    ]
    alarms = []
    for low in range(0, repetitions, CHUNK):
        arm = rng.choice(3, size=(min(CHUNK, repetitions - low), 2000), p=list(weights.values()))
        running = np.cumsum(arm[..., None] == np.arange(3), axis=1)
        p = always_valid_p(log_count_ratio(running, list(weights.values())))
        alarms.append(p[:, -1] < 0.05)
    lines.append(
        Line(
            "counts under continuous peeking: false alarms",
            (0.0, 0.05),
            float(np.concatenate(alarms).mean()),
            "2,000 users in 3 arms",
        )
    )
    return lines


def family(repetitions: int, seed: int) -> list[Line]:
    """Any false claim among 3 policies x 2 metrics that share one control arm."""
    rng = numpy_rng(seed, "family")
    raw, adjusted = 0, 0
    for low in range(0, repetitions, CHUNK):
        size = (min(CHUNK, repetitions - low), USERS)
        columns = []
        for kind in ("mean", "ratio"):
            arms = [Moments.of(draw_users(kind, 0.0, size, rng)) for _ in range(4)]
            columns += [compare(arms[0], arm, cuped=False).p_value() for arm in arms[1:]]
        for p in np.stack(columns, axis=1):
            raw += bool((p < 0.05).any())
            adjusted += min(holm(p.tolist())) < 0.05
    note = f"3 policies x 2 metrics; without Holm {100 * raw / repetitions:.1f} %"
    return [Line("Holm: any false claim", (0.0, 0.05), adjusted / repetitions, note)]


def planning(repetitions: int, seed: int) -> list[Line]:
    """Power as planned from baseline users against power in fresh tests with the real effect."""
    lines = []
    for kind in KINDS:
        worst, note = 0.0, []
        baseline = draw_users(kind, 0.0, (BASELINE,), numpy_rng(seed, "baseline", kind))
        planner = Planner(baseline, (USERS, USERS), cuped=_cuped(kind), samples=repetitions, seed=seed)
        for factor in (0.7, 1.0):
            lift, rng, found = factor * LIFTS[kind], numpy_rng(seed, "power", kind, str(factor)), []
            for low in range(0, repetitions, CHUNK):
                size = (min(CHUNK, repetitions - low), USERS)
                arms = [Moments.of(draw_users(kind, x, size, rng)) for x in (0.0, lift)]
                found.append(compare(*arms, cuped=_cuped(kind)).p_value() < 0.05)
            truth, planned = float(np.concatenate(found).mean()), planner.power(lift)
            worst = max(worst, abs(truth - planned))
            note.append(f"lift {100 * lift:.0f} %: planned {100 * planned:.0f} %, simulated {100 * truth:.0f} %")
        lines.append(
            Line(
                f"planner, {kind}: error of the power",
                (0.0, 0.05),
                worst,
                f"{BASELINE:,} baseline users; {'; '.join(note)}",
            )
        )
    return lines


def seeds_and_users(repetitions: int, seed: int) -> list[Line]:
    """Coverage of the intervals over training seeds and users: means, lifts and closed gaps (AGC)."""
    lines = []
    for seeds in (5, 10):
        for users in (100, 600):
            for rest in (0.3, 1.0, 3.0):
                shares = [
                    _matrix_coverage(
                        repetitions,
                        seeds,
                        users,
                        ratio,
                        rest,
                        numpy_rng(seed, "matrix", seeds, users, str((ratio, rest))),
                    )
                    for ratio in (0.0, 1.0, 10.0)
                ]
                note = (
                    f"{users} users, sd(rest) {rest:g} x sd(user); var(seed)/S over var(user)/n is 0, 1, 10: "
                    + ", ".join(f"{100 * s:.1f} %" for s in shares)
                )
                worst = max(shares, key=lambda s: abs(s - 0.95))
                lines.append(
                    Line(f"mean over {seeds} seeds: coverage, the farthest from 95 %", (0.93, 0.97), worst, note)
                )
        for name, judge in (("lift", _lift_hit), ("AGC", _gap_hit)):
            for spread in (0.0, 0.01, 0.03):
                rng = numpy_rng(seed, name, seeds, str(spread))
                hits = sum(judge(rng, seeds, 300, spread) for _ in range(repetitions))
                note = f"300 users; seeds differ by {100 * spread:g} % (sd)"
                lines.append(Line(f"{name} over {seeds} seeds: coverage", (0.93, 0.97), hits / repetitions, note))
    rng, few = numpy_rng(seed, "bootstrap"), max(1, repetitions // 4)
    hits = sum(_bootstrap_hit(rng, 5, 300, 0.03) for _ in range(few))
    lines.append(
        Line(
            "for comparison, not used: seeds-then-users bootstrap of a lift, 5 seeds: coverage",
            ANY,
            hits / few,
            "300 users; seeds differ by 3 %",
        )
    )
    return lines


def _matrix_coverage(
    repetitions: int, seeds: int, users: int, ratio: float, rest: float, rng: np.random.Generator
) -> float:
    hits, sd = 0, (ratio * seeds / users) ** 0.5
    for _ in range(repetitions):
        y = (
            sd * rng.standard_normal((seeds, 1))
            + rng.standard_normal((1, users))
            + rest * rng.standard_normal((seeds, users))
        )
        interval = mean_interval(y)
        hits += interval.low <= 0.0 <= interval.high
    return hits / repetitions


def _plays(rng: np.random.Generator, seeds: int, users: int, spread: float) -> tuple[Floats, Floats, Floats]:
    """Values of the single best strategy, an oracle (both (users,)) and a learned policy (seeds, users); gains 10 % and 5 %."""
    base = rng.gamma(2.0, 0.5, users)
    oracle = base * (1.1 + 0.1 * rng.standard_normal(users))
    gain = 1.05 + spread * rng.standard_normal((seeds, 1)) + 0.1 * rng.standard_normal(users)
    return base, oracle, base * gain + 0.1 * rng.standard_normal((seeds, users))


def _lift_hit(rng: np.random.Generator, seeds: int, users: int, spread: float) -> bool:
    base, _, learned = _plays(rng, seeds, users, spread)
    interval = ratio_interval(learned, base, minus=1.0)
    return interval.low <= 0.05 <= interval.high


def _gap_hit(rng: np.random.Generator, seeds: int, users: int, spread: float) -> bool:
    base, oracle, learned = _plays(rng, seeds, users, spread)
    interval = ratio_interval(learned - base, oracle - base)
    return interval.low <= 0.5 <= interval.high


def _bootstrap_hit(rng: np.random.Generator, seeds: int, users: int, spread: float, samples: int = 300) -> bool:
    base, _, learned = _plays(rng, seeds, users, spread)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), samples) / seeds
    of_users = rng.multinomial(users, np.full(users, 1.0 / users), samples) / users
    lifts = np.einsum("bs,su,bu->b", of_seeds, learned, of_users, optimize=True) / (of_users @ base) - 1.0
    low, high = np.quantile(lifts, [0.025, 0.975])
    return bool(low <= 0.05 <= high)


def allocation(repetitions: int, seed: int) -> list[Line]:
    """How often an allocation names a worse policy as surely best, and the users it takes."""
    lines = []
    settings = (("one better by 0.3 sd", (0.0, 0.0, 0.0, 0.3), 12_000), ("all equal", (0.0, 0.0, 0.0, 0.0), 4_000))
    for title, means, most in settings:
        for name, rule in (("LUCB", best_policy), ("equal shares", fixed_allocation)):
            wrong, took, sure = 0, [], 0
            for repetition in range(repetitions):
                found = _allocate(rule, means, most, numpy_rng(seed, "allocation", title, repetition))
                wrong += found.sure and (means[found.best] < max(means) or len(set(means)) == 1)
                sure += found.sure
                took.append(int(found.users.sum()))
            users = f"median {int(np.median(took)):,} users"
            note = f"4 policies, exponential outcomes; sure in {100 * sure / repetitions:.0f} %, {users}"
            lines.append(Line(f"online, {title}, {name}: wrongly sure", (0.0, 0.05), wrong / repetitions, note))
    return lines


def _allocate(
    rule: Callable[..., OnlineResult], means: tuple[float, ...], most: int, rng: np.random.Generator
) -> OnlineResult:
    def serve(policy: int, users: int) -> Floats:
        return means[policy] + rng.standard_exponential(users)

    return rule(serve, len(means), max_users=most, batch=100)


PARTS = (fixed_intervals, paths, counts, family, planning, seeds_and_users, allocation)


def run(args: Args) -> list[Line]:
    """Measures, prints, and writes the page.

    Args:
        args: The command line.

    Returns:
        Every line.
    """
    started, lines = time.process_time(), []
    for part in PARTS:
        lines += part(args.repetitions, args.seed)
        print(f"{part.__name__}: {time.process_time() - started:.0f} CPU s", flush=True)
    rows = []
    for line in lines:
        low, high = (f"{100 * x:.4g} %" for x in line.promised)
        promised = "-" if line.promised == ANY else f"{low} to {high}"
        holds = "" if promised == "-" else "yes" if line.holds else "**no**"
        rows.append(f"| {line.what} | {promised} | {100 * line.found:.2f} % | {holds} | {line.note} |")
    promises = [line for line in lines if line.promised != ANY]
    kept = sum(line.holds for line in promises)
    intro = (
        f"`{command_line()}`: {args.repetitions:,} repetitions, seed {args.seed}, "
        f"{time.process_time() - started:.0f} CPU seconds; {kept} of {len(promises)} promises hold. A share of 2,000 "
        "repetitions has a standard error of 0.5 points at 95 %."
    )
    head = "| what | promised | found | holds | |\n|---|---|---|---|---|"
    text = "\n".join(["# Do the A/B tests keep their promises?", "", intro, "", head, *rows]) + "\n"
    print(text)
    if args.out is not None:
        write_atomic(args.out, text)
    return lines


def main() -> None:
    """The command line."""
    import tyro

    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
