"""The explanation of a policy as HTML: a page of its own, and a section of the comparison's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metarec_gym.evaluation.explain.text import (
    GAIN,
    PLAYED,
    attribution_sentence,
    fidelity,
    legend,
    number,
    percent,
    setting,
    weights,
)
from metarec_gym.evaluation.report.parts import document, escape, fact_list, rows_table, section

TITLE = "What the learned policy does, in words"


def explanation_page(result: Mapping[str, Any], provenance: Mapping[str, str]) -> str:
    """One self-contained HTML document.

    Args:
        result: What `explain` measured.
        provenance: Name and value: command, hashes.

    Returns:
        The page.
    """
    header = (
        f"<header><p class='over'>What does the policy do? &middot; {escape(result['name'])}</p>"
        f"<h1 class='{'good' if result['stands'] else 'open'}'>{escape(result['verdict'])}</h1></header>"
    )
    blocks = [header, *(section(title, body) for title, body in _parts(result))]
    return document(
        f"metarec_gym: the policy of {result['name']} in words",
        [*blocks, section("Where it comes from", fact_list(provenance))],
    )


def explanation_section(result: Mapping[str, Any] | None, hint: str = "") -> str:
    """The section of the comparison's report; says what to run where nothing was explained.

    Args:
        result: What `explain` measured for one of the compared policies.
        hint: The command that makes one; empty where there is no policy that can be explained.
    """
    if result is None:
        if not hint:
            return ""
        return section(TITLE, f"<p>Not explained yet. Run <code>{escape(hint)}</code> and compare again.</p>")
    agent, seed = result["policy"].get("agent", "policy"), result["policy"].get("seed")
    which = f"One of the trained policies: {agent}" + ("." if seed is None else f", seed {seed}.")
    body = f"<p class='lead'><b>{escape(result['verdict'])}</b></p><p>{escape(which)}</p>"
    return section(TITLE, body + "".join(f"<h3>{escape(title)}</h3>{part}" for title, part in _parts(result)))


def _parts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    parts = [
        ("The policy as rules", _rules(result)),
        ("Who gets which strategy, and what that gains", _segments(result["segments"], result["strategies"])),
        ("What it looks at", _attributions(result["attributions"])),
        ("What would have to be different", _counterfactuals(result)),
    ]
    axes = legend(result)
    return [*parts, ("Taste axes", _list(axes))] if axes else parts


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _rules(result: Mapping[str, Any]) -> str:
    played = [
        [f"<b>{escape(PLAYED[n])}</b>", number(p["value"]), _toned(p["lift"], percent(p["lift"]))]
        for n, p in result["played"].items()
    ]
    rows = [
        [
            "<br>and ".join(escape(c) for c in row["if"]) or "always",
            f"<b>{escape(row['serves'])}</b>",
            _heat(row["requests"]),
            f"{row['users']:.0%}",
            _toned(row["gain"], number(row["gain"], signed=True)),
            "-" if row["overlap"] is None else f"{row['overlap']:.0%}",
        ]
        for row in result["rules"]["rows"]
    ]
    head = ("when", "serve", "% of requests", "users it concerns", "gain a request [95 %]", "overlap with the policy")
    return (
        f"<p>{escape(setting(result))}</p>"
        + rows_table(("played", "reward a request [95 %]", "lift over the single best strategy [95 %]"), played)
        + f"<p>{escape(fidelity(result))}</p>"
        + rows_table(head, rows)
        + f"<p class='note'>{escape(GAIN)} Coloured: the interval excludes 0. {escape(weights(result))}</p>"
    )


def _segments(segments: Sequence[Mapping[str, Any]], strategies: Sequence[str]) -> str:
    used = [s for s in strategies if any(c["strategy"] == s for segment in segments for c in segment["cells"])]
    lines, group = [], ""
    for segment in segments:
        cells = {c["strategy"]: c for c in segment["cells"]}
        lines.append(
            [
                f"<b>{escape(segment['group'])}</b>" if segment["group"] != group else "",
                escape(segment["name"]),
                f"{segment['users']:.0%}",
                _toned(segment["lift"], percent(segment["lift"])),
                _toned(segment["gain"], number(segment["gain"], signed=True)),
                *(_cell(cells.get(s)) for s in used),
            ]
        )
        group = segment["group"]
    head = ("", "segment", "users", "lift over the episode [95 %]", "gain a request [95 %]", *map(escape, used))
    return (
        "<p>Under each strategy: its share of the segment's requests in %, and the gain of exactly these requests. A lift over "
        "the episode is told where users stay in their segment.</p>"
        + rows_table(head, lines, kind="board")
        + f"<p class='note'>{escape(GAIN)}</p>"
    )


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    return f"{_heat(cell['share'])}<small>{_toned(cell['gain'], number(cell['gain'], signed=True))}</small>"


def _heat(share: float) -> str:
    return f'<span class="heat" style="--s:{100 * share:.0f}%">{100 * share:.0f}</span>'


def _toned(interval: Mapping[str, float] | None, text: str) -> str:
    tone = "" if interval is None else "up" if interval["low"] > 0 else "down" if interval["high"] < 0 else ""
    return f"<span class='{tone}'>{escape(text)}</span>" if tone else escape(text)


def _attributions(found: Mapping[str, Any]) -> str:
    if "note" in found:
        return f"<p>{escape(found['note'])}</p>"
    groups = list(found["shares"])
    lines = [
        [escape(block), *(_heat(found["shares"][g].get(block, 0.0)) for g in groups)]
        for block in found["shares"][groups[0]]
        if any(found["shares"][g].get(block, 0.0) >= 0.005 for g in groups)
    ]
    return f"<p>{escape(attribution_sentence(found))}</p>" + rows_table(("%", *map(escape, groups)), lines)


def _counterfactuals(result: Mapping[str, Any]) -> str:
    sentences = [c["sentence"] for c in result["counterfactuals"]]
    return f"<p class='caution'>{escape(result['counterfactual_caveat'])}</p>" + _list(sentences)
