"""One row a policy: what it is worth, with intervals, against the single best strategy and the best simple rule."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec_gym.evaluation.headroom import FOLDS, Headroom
from metarec_gym.evaluation.intervals import Floats, Interval, holm, mean_interval
from metarec_gym.evaluation.metrics import (
    SEGMENTS,
    closed_gap,
    interquartile_mean,
    lift,
    segment_of,
    segment_values,
    usage_entropy,
    worst_decile,
)
from metarec_gym.evaluation.rollout import Played, per_user
from metarec_gym.evaluation.verdict import sign_changes

KINDS = ("learned", "bandit", "search", "supervised", "fixed", "oracle")
TRAINED = ("learned", "bandit", "search", "supervised")
"""Kinds whose lift decides the verdict: they learn which strategy suits whom."""


@dataclass(frozen=True)
class PolicyPlays:
    """Plays of one policy.

    Attributes:
        name: Name in the table.
        kind: One of `KINDS`.
        plays: By fold scored, one `Played` a training seed.
        seconds: Mean training time of a seed and direction; None if it is not trained.
        note: One line on what it is, may be empty.
        second: The same seeds played under a judge of another family, on the first few replicates; None if there is none.
        train: The same seeds played on their training users by the training judge; None if that was not done.
    """

    name: str
    kind: str
    plays: dict[str, list[Played]]
    seconds: float | None = None
    note: str = ""
    second: dict[str, list[Played]] | None = None
    train: dict[str, list[Played]] | None = None

    def users(self) -> Floats:
        """Value of every user, fold A's before fold B's; (seeds, users, windows)."""
        return _users(self.plays)

    def by_request(self) -> Floats:
        """Expected reward of every user at every request; (seeds, users, T)."""
        count = len(self.plays[FOLDS[0]])
        return np.stack(
            [
                np.concatenate([per_user(self.plays[f][s].user, self.plays[f][s].by_request) for f in FOLDS])
                for s in range(count)
            ]
        )


def _users(plays: dict[str, list[Played]]) -> Floats:
    """Value of every user, fold A's before fold B's; (seeds, users, windows)."""
    rows = []
    for seed in range(len(plays[FOLDS[0]])):
        parts = [per_user(p.user, p.value.mean(axis=1)) for p in (plays[f][seed] for f in FOLDS)]
        rows.append(np.concatenate(parts))
    return np.stack(rows)


@dataclass(frozen=True)
class PolicyRow:
    """One row of the leaderboard; tuples have one entry a window.

    Attributes:
        name: Name.
        kind: One of `KINDS`.
        seeds: Training seeds.
        value: Utility a request.
        iqm: Interquartile mean over training seeds of the utility a request.
        lift_sbs: Lift over the single best strategy.
        lift_sched: Lift over the best non-personal rule.
        agc_user: Share of the per-user oracle's gap that is closed; None where that gap is not surely above 2 %.
        agc_greedy: Likewise for the greedy oracle.
        fir_share: Share of the full-information reference's lift over the single best strategy; None where that lift is not
            surely above 2 % or it was not played.
        entropy: Entropy of the strategies served (of their shares where several serve a request), bits; mean over seeds.
        worst_decile: Utility of the tenth of users served worst, at the headline horizon.
        cost: Mean serving cost of a request relative to the dearest strategy, of all that it asks: a blend's may be above 1.
        seconds: Mean training time.
        segment_value: Utility in each segment at the headline horizon; None where a segment has fewer than two users.
        share: float64 (K,), share of all requests that each strategy served.
        segment_share: float64 (segments, K), share of requests that each strategy served.
        curve: float64 (3, T): mean, lower and upper bound of the expected reward of each request.
        p_holm: P-value of "lift over the best non-personal rule is 0", Holm-corrected over all trained policies.
        note: One line.
        lift_sbs_second: Lift over the single best strategy, both scored by a judge of another family; empty without one.
        value_train: Utility on the training users by the training judge; empty where that was not played.
        blends: Several strategies serve a request together; its lift says nothing about selecting.
    """

    name: str
    kind: str
    seeds: int
    value: tuple[Interval, ...]
    iqm: tuple[float, ...]
    lift_sbs: tuple[Interval, ...]
    lift_sched: tuple[Interval, ...]
    agc_user: tuple[Interval | None, ...]
    agc_greedy: tuple[Interval | None, ...]
    fir_share: tuple[Interval | None, ...]
    entropy: float
    worst_decile: float
    cost: float
    seconds: float | None
    segment_value: tuple[Interval | None, ...]
    share: Floats
    segment_share: Floats
    curve: Floats
    p_holm: float | None = None
    note: str = ""
    lift_sbs_second: tuple[Interval, ...] = ()
    value_train: tuple[Interval, ...] = ()
    blends: bool = False

    def model_dependent(self, window: int) -> bool:
        """Whether the lift over the single best strategy is sure under the main judge and changes sign under the second."""
        if not self.lift_sbs_second:
            return False
        return sign_changes(self.lift_sbs[window], self.lift_sbs_second[window])


def leaderboard(policies: Sequence[PolicyPlays], headroom: Headroom, costs: NDArray[Any]) -> list[PolicyRow]:
    """Rows of all policies, in the order given.

    Args:
        policies: The plays.
        headroom: The plays that they are paired with.
        costs: Relative serving cost of each strategy, (K,).

    Returns:
        The rows.
    """
    second = _second_sbs(policies, headroom)
    rows = [_row(policy, headroom, np.asarray(costs, dtype=np.float64), second) for policy in policies]
    trained = [i for i, row in enumerate(rows) if row.kind in TRAINED]
    adjusted = holm([rows[i].lift_sched[headroom.headline].p_value() for i in trained])
    for index, p in zip(trained, adjusted, strict=True):
        rows[index] = replace(rows[index], p_holm=p)
    return rows


def _second_sbs(policies: Sequence[PolicyPlays], headroom: Headroom) -> Floats | None:
    """Value of the single best strategy of each window under the second judge, (users, P); None without plays of it."""
    played = {policy.name: policy.second for policy in policies if policy.kind == "fixed"}
    parts = []
    for test in FOLDS:
        columns = []
        for window, k in enumerate(headroom.sbs[test]):
            second = played.get(headroom.strategies[k])
            if second is None:
                return None
            only = second[test][0]
            columns.append(per_user(only.user, only.value.mean(axis=1)[:, window]))
        parts.append(np.stack(columns, axis=1))
    return np.concatenate(parts)


def _row(policy: PolicyPlays, headroom: Headroom, costs: Floats, second_sbs: Floats | None) -> PolicyRow:
    values = policy.users()
    second = None if policy.second is None or second_sbs is None else _users(policy.second)
    train = None if policy.train is None else _users(policy.train)
    sbs = headroom.pooled(headroom.sbs_value())
    sched = headroom.pooled({f: headroom.sched[f].value for f in FOLDS})
    oracle = headroom.pooled(headroom.oracle_value())
    greedy = headroom.pooled({f: headroom.greedy[f].value for f in FOLDS})
    windows = range(len(headroom.windows))
    gaps = [headroom.headrooms(p) for p in windows]
    fir = headroom.pooled({f: headroom.fir[f].value for f in FOLDS}) if headroom.fir else None
    everything = [p for plays in policy.plays.values() for p in plays]
    served = np.sum([p.served.sum(axis=0) for p in everything], axis=0).astype(np.float64)
    paid = np.sum([p.paid.sum(axis=0) for p in everything], axis=0).astype(np.float64)
    by_seed = [sum(policy.plays[f][s].served.sum(axis=0) for f in FOLDS) for s in range(len(policy.plays[FOLDS[0]]))]
    requests = policy.by_request()
    curve = [mean_interval(requests[:, :, t]) for t in range(requests.shape[2])]
    return PolicyRow(
        name=policy.name,
        kind=policy.kind,
        seeds=values.shape[0],
        value=tuple(mean_interval(values[:, :, p]) for p in windows),
        iqm=tuple(interquartile_mean(values[:, :, p].mean(axis=1)) for p in windows),
        lift_sbs=tuple(lift(values[:, :, p], sbs[:, p]) for p in windows),
        lift_sched=tuple(lift(values[:, :, p], sched[:, p]) for p in windows),
        agc_user=tuple(
            closed_gap(values[:, :, p], sbs[:, p], oracle[:, p], gaps[p]["per-user oracle"]) for p in windows
        ),
        agc_greedy=tuple(
            closed_gap(values[:, :, p], sbs[:, p], greedy[:, p], gaps[p]["greedy oracle"]) for p in windows
        ),
        fir_share=tuple(
            None if fir is None else closed_gap(values[:, :, p], sbs[:, p], fir[:, p], headroom.fir_lift(p))
            for p in windows
        ),
        entropy=float(np.mean([usage_entropy(counts) for counts in by_seed])),
        worst_decile=worst_decile(values[:, :, headroom.headline]),
        cost=float((paid * costs).sum() / max(served.sum(), 1.0)),
        seconds=policy.seconds,
        segment_value=_segment_values(policy, headroom.headline),
        share=served / max(served.sum(), 1.0),
        segment_share=_segment_share(everything, len(costs)),
        curve=np.array([[c.estimate for c in curve], [c.low for c in curve], [c.high for c in curve]]),
        note=policy.note,
        lift_sbs_second=()
        if second is None or second_sbs is None
        else tuple(lift(second[:, :, p], second_sbs[:, p]) for p in windows),
        value_train=() if train is None else tuple(mean_interval(train[:, :, p]) for p in windows),
        blends=any(p.asked is not None for p in everything),
    )


def blends_sentence(rows: Sequence[PolicyRow], window: int) -> str:
    """What the best policy that blends gains, which no verdict on selecting counts; empty where none was played."""
    blends = [row for row in rows if row.blends]
    if not blends:
        return ""
    best = max(blends, key=lambda row: row.lift_sched[window].estimate)
    return (
        f"Blending is no selecting and not counted here; the best that blends, {best.name}, gains "
        f"{best.lift_sched[window].as_percent()} over the best non-personal rule at cost {best.cost:.2f} a request."
    )


def _segment_values(policy: PolicyPlays, window: int) -> tuple[Interval | None, ...]:
    found: list[Interval | None] = []
    for segment in range(len(SEGMENTS)):
        seeds = [
            np.concatenate(
                [
                    segment_values(p.user, p.history_length, p.value.mean(axis=1)[:, window])[segment]
                    for p in (policy.plays[f][s] for f in FOLDS)
                ]
            )
            for s in range(len(policy.plays[FOLDS[0]]))
        ]
        found.append(mean_interval(np.stack(seeds)) if len(seeds[0]) >= 2 else None)
    return tuple(found)


def _segment_share(everything: list[Played], n_strategies: int) -> Floats:
    counts = np.zeros((len(SEGMENTS), n_strategies))
    for played in everything:
        np.add.at(counts, segment_of(played.history_length), played.served)
    shares: Floats = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    return shares


HEADER = (
    "policy",
    "utility/request [95 % CI]",
    "IQM of seeds",
    "lift over SBS",
    "lift over SCHED",
    "AGC_user",
    "AGC_greedy",
    "of FIR's lift",
    "entropy",
    "cost",
    "seconds",
)


def header(headroom: Headroom) -> tuple[str, ...]:
    """`HEADER` with the horizons of the full-information column."""
    early, horizon = early_window(headroom), headroom.windows[headroom.headline].name
    at = horizon if early == headroom.headline else f"{headroom.windows[early].name} / {horizon}"
    return tuple(f"{name} {at}" if name == "of FIR's lift" else name for name in HEADER)


def early_window(headroom: Headroom) -> int:
    """The shortest reported horizon: how fast a policy gets going; the headline where there is no other."""
    return min(range(headroom.headline + 1), key=lambda p: headroom.windows[p].last)


def cells(row: PolicyRow, window: int, early: int | None = None) -> tuple[str, ...]:
    """The row's cells under `HEADER` at one window; the full-information share at `early` too."""

    def gap(interval: Interval | None) -> str:
        return "-" if interval is None else interval.as_number(2)

    name = row.name if row.seeds == 1 else f"{row.name} ({row.seeds} seeds)"
    shares = [row.fir_share[p] for p in dict.fromkeys((window if early is None else early, window))]
    return (
        name,
        row.value[window].as_number(),
        f"{row.iqm[window]:.3f}" if row.seeds > 1 else "-",
        row.lift_sbs[window].as_percent(),
        row.lift_sched[window].as_percent(),
        gap(row.agc_user[window]),
        gap(row.agc_greedy[window]),
        " / ".join("-" if s is None else f"{100 * s.estimate:.0f} %" for s in shares),
        f"{row.entropy:.2f} bits",
        f"{row.cost:.2f}",
        "-" if row.seconds is None else f"{row.seconds:.1f}",
    )


def second_cell(row: PolicyRow, window: int) -> str:
    """Lift over the single best strategy under the second judge, and whether it contradicts the main judge's."""
    if not row.lift_sbs_second:
        return "-"
    return row.lift_sbs_second[window].as_percent() + (" model-dependent" if row.model_dependent(window) else "")


def _lines(rows: Sequence[PolicyRow], headroom: Headroom) -> list[tuple[str, ...]]:
    """Header and rows; the second judge's column is there when something was played under it."""
    window, early = headroom.headline, early_window(headroom)
    chosen = ordered(rows, window)
    if not any(row.lift_sbs_second for row in rows):
        return [header(headroom), *(cells(row, window, early) for row in chosen)]
    return [
        (*header(headroom), "lift over SBS, second judge"),
        *((*cells(row, window, early), second_cell(row, window)) for row in chosen),
    ]


def text_table(rows: Sequence[PolicyRow], headroom: Headroom) -> str:
    """The leaderboard at the headline horizon in aligned columns, best first within each kind."""
    lines = _lines(rows, headroom)
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown_table(rows: Sequence[PolicyRow], headroom: Headroom) -> str:
    """The leaderboard at the headline horizon as a Markdown table."""
    head, *body = _lines(rows, headroom)
    top = f"| {' | '.join(head)} |\n|{'---|' * len(head)}"
    return "\n".join([top, *(f"| {' | '.join(line)} |" for line in body)])


def ordered(rows: Sequence[PolicyRow], window: int) -> list[PolicyRow]:
    """Trained policies, then fixed ones, then oracles; best first inside each group."""
    group = {"fixed": 1, "oracle": 2}
    return sorted(rows, key=lambda r: (group.get(r.kind, 0), -r.value[window].estimate))


def csv_text(rows: Sequence[PolicyRow], headroom: Headroom, world: str) -> str:
    """One line for each policy and window."""
    out = io.StringIO()
    names = ("value", "lift_sbs", "lift_sched", "agc_user", "agc_greedy", "fir_share")
    columns = ["world", "policy", "kind", "horizon", "value", "lo", "hi"]
    columns += [f"{name}{end}" for name in names[1:] for end in ("", "_lo", "_hi")]
    columns += ["lift_sbs_second", "lift_sbs_second_lo", "lift_sbs_second_hi", "model_dependent", "value_train_judge"]
    columns += ["iqm", "p_holm_sched", "entropy_bits", "worst_decile", "cost", "seconds", "seeds", "users"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in ordered(rows, headroom.headline):
        for index, window in enumerate(headroom.windows):
            line: list[Any] = [world, row.name, row.kind, window.name.lstrip("@")]
            for name in names:
                interval: Interval | None = getattr(row, name)[index]
                numbers = ("", "", "") if interval is None else (interval.estimate, interval.low, interval.high)
                line += [f"{x:.6g}" if x != "" else "" for x in numbers]
            if row.lift_sbs_second:
                other = row.lift_sbs_second[index]
                line += [f"{x:.6g}" for x in (other.estimate, other.low, other.high)]
                line += [str(row.model_dependent(index)).lower()]
            else:
                line += [""] * 4
            line += [f"{row.value_train[index].estimate:.6g}" if row.value_train else ""]
            line += [f"{row.iqm[index]:.6g}", "" if row.p_holm is None else f"{row.p_holm:.4g}", f"{row.entropy:.4f}"]
            line += [f"{row.worst_decile:.6g}", f"{row.cost:.4f}"]
            line += ["" if row.seconds is None else f"{row.seconds:.1f}", row.seeds, row.value[index].users]
            writer.writerow(line)
    return out.getvalue()
