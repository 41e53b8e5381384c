"""Sections of the comparison's report that hold policies against each other: pairs, quality and cost, learning, arms."""

from __future__ import annotations

from collections.abc import Sequence

from metarec_gym.evaluation.hull import Frontier
from metarec_gym.evaluation.intervals import mean_interval
from metarec_gym.evaluation.leaderboard import TRAINED, PolicyRow
from metarec_gym.evaluation.learning_curves import LearningCurve
from metarec_gym.evaluation.pairs import RULE, Pair, signed
from metarec_gym.evaluation.report.figures import DASHES, FAINT, INK, MAX_CURVES, SERIES, drawing, figure_html
from metarec_gym.evaluation.report.parts import escape, rows_table, section


def pairs_section(pairs: Sequence[Pair]) -> str:
    """Paired differences; nothing where nothing was trained."""
    if not pairs:
        return ""
    lines, role = [], ""
    for pair in sorted(pairs, key=lambda p: (p.role, -p.difference.estimate)):
        if pair.role != role:
            role = pair.role
            name = "" if role == RULE else f": {pair.against}"
            lines.append([f"<i>against the {escape(role + name)}</i>", "", "", ""])
        tone = "" if not pair.sure else "up" if pair.difference.estimate > 0 else "down"
        lines.append(
            [
                f"<b>{escape(pair.policy)}</b>",
                f"<span class='{tone}'>{escape(signed(pair.difference))}</span>",
                escape(pair.relative.as_percent()),
                f"{pair.p_holm:.2g}",
            ]
        )
    body = (
        "<p>Utility a request, policy minus opponent, paired by user; intervals carry the seeds of both sides. The p-value is "
        f"corrected (Holm) for all {len(pairs)} pairs; coloured: below 5 %. The strongest hierarchical bandit is picked on these "
        "very users, which favours it.</p>"
    )
    head = ("policy", "difference [95 %]", "relative [95 %]", "p (Holm)")
    return section("Which differences are sure", body + rows_table(head, lines))


def hull_section(frontiers: Sequence[Frontier]) -> str:
    """Quality against serving cost."""
    if not frontiers:
        return ""
    first = frontiers[0]
    with drawing(height=3.8) as (figure, axes):
        hull = {id(o) for o in first.hull}
        references = {f.reference for f in frontiers}
        for o in first.offers:
            named = id(o) in hull or (o.name in references and o.weight == 0.0)
            colour = SERIES[0] if id(o) in hull else SERIES[1] if named else SERIES[5]
            axes.plot([o.cost], [o.utility], "o", color=colour, markersize=6 if named else 3.5)
        axes.plot([o.cost for o in first.hull], [o.utility for o in first.hull], color=SERIES[0], linewidth=1.4)
        placed: list[tuple[float, float]] = []
        span = max(o.utility for o in first.offers) - min(o.utility for o in first.offers) or 1.0
        for o in [*first.hull, *(o for o in first.offers if o.name in references and id(o) not in hull)]:
            # labels that would lie on each other go below their point
            near = any(abs(o.cost - x) < 0.15 and abs(o.utility - y) < 0.05 * span for x, y in placed)
            place = (6, -11) if near else (6, 5)
            axes.annotate(
                o.label, (o.cost, o.utility), place, textcoords="offset points", color=INK, fontsize=8, clip_on=False
            )
            placed.append((o.cost, o.utility))
        axes.set_xlabel("serving cost of a request (dearest strategy = 1)")
        axes.set_ylabel("utility a request, before cost")
        axes.grid(color=FAINT, linewidth=0.5)
    caption = (
        "Blue: on the hull; every point of the line can be had by serving some users by one policy, others by the next."
    )
    lines = [
        [
            f"<b>{escape(o.label)}</b>",
            f"{o.cost:.3f}",
            escape(mean_interval(o.users).as_number()),
            *(escape(f.against[i].as_percent()) for f in frontiers),
        ]
        for i, o in enumerate(first.hull)
    ]
    head = ("on the hull", "cost a request", "utility a request [95 %]", *(f"against {f.reference}" for f in frontiers))
    words = "".join(f"<p>{escape(sentence[0].upper() + sentence[1:])}.</p>" for sentence in frontier_lines(frontiers))
    return section(
        "Quality and serving cost",
        words + figure_html(figure, caption, "hull") + rows_table([escape(h) for h in head], lines),
    )


def frontier_lines(frontiers: Sequence[Frontier]) -> list[str]:
    """What can be saved, in words."""
    lines = []
    for found in frontiers:
        lines.append(found.sentence())
        cheapest = found.cheapest_without_loss()
        if cheapest is not None:
            saved = f"{cheapest[1]:.0%}".replace("%", " %")
            lines.append(
                f"the cheapest policy whose utility is surely not below {found.reference}'s is {cheapest[0].label}: "
                f"{saved} less serving cost"
            )
        else:
            lines.append(f"no cheaper policy has a utility that is surely not below {found.reference}'s")
    return lines


def learning_section(curves: Sequence[LearningCurve]) -> str:
    """Reward a request against requests learned from."""
    shown = list(curves)[:MAX_CURVES]
    if not shown:
        return ""
    with drawing(height=3.4) as (figure, axes):
        for index, curve in enumerate(shown):
            axes.fill_between(curve.requests, curve.low, curve.high, color=SERIES[index], alpha=0.13, linewidth=0)
            label = f"{curve.name} ({curve.trainings} trainings)"
            style = {"color": SERIES[index], "linewidth": 1.7, "linestyle": DASHES[index]}
            axes.plot(curve.requests, curve.mean, label=label, **style)
        axes.set_xlim(0, max(float(c.requests[-1]) for c in shown))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set_xlabel("requests learned from")
        axes.set_ylabel("reward of a request while learning")
        axes.grid(color=FAINT, linewidth=0.5)
        axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    left_out = "" if len(shown) == len(curves) else f" {len(curves) - len(shown)} learners are not shown."
    caption = (
        "Sampled reward on training users by the training judge, exploration included: it says how fast a learner learns, not "
        f"what its policy is worth. Bands are 95 % intervals over trainings (seeds and directions).{left_out}"
    )
    return section("Learning", figure_html(figure, caption, "learning"))


def usage_section(rows: Sequence[PolicyRow], strategies: Sequence[str]) -> str:
    """Which strategies every policy serves."""
    single = set(strategies)
    lines = [
        [
            f"<b>{escape(row.name)}</b>",
            *(
                f'<span class="heat" style="--s:{100 * x:.0f}%">{100 * x:.0f}</span>' if x >= 0.005 else ""
                for x in row.share
            ),
        ]
        for row in rows
        if row.name not in single and (row.kind in TRAINED or row.kind in ("fixed", "oracle"))
    ]
    head = ("policy", *(f"<span>{escape(s)}</span>" for s in strategies))
    return section(
        "What every policy serves",
        "<p>Share of all requests, in %, that each strategy served; all seeds and both directions.</p>"
        + rows_table(head, lines, kind="heatmap"),
    )
