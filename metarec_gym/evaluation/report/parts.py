"""Pieces that every page is put together from: sections, tables, small bars, and the style sheet."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarec_gym.evaluation.intervals import Interval


_INTERVAL = re.compile(r"\[([+-]?[\d,]*\.\d+(?: ?%)?), ([+-]?[\d,]*\.\d+(?: ?%)?)\]")
"""Two numbers with decimals: lists of whole numbers, as commands and settings have them, are left as they are."""


def document(title: str, blocks: Sequence[str]) -> str:
    """One self-contained HTML document; blocks are HTML already."""
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body><main>\n" + unbroken("\n".join(blocks)) + "\n</main></body></html>\n"
    )


def unbroken(text: str) -> str:
    """The same with no line break inside an interval: its comma is followed by a no-break space."""
    return _INTERVAL.sub("[\\1,\u00a0\\2]", text)


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def section(title: str, body: str) -> str:
    """A card with a heading; `body` is HTML already."""
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def rows_table(head: Sequence[str], lines: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table; cells are HTML already."""
    top = "".join(f"<th>{h}</th>" for h in head)
    body = "\n".join("<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def fact_list(pairs: Mapping[str, object]) -> str:
    """Names and values, one line each."""
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs.items())
    return f"<dl>{lines}</dl>"


def bar(interval: Interval, scale: tuple[float, float]) -> str:
    """A small interval on a scale that the lines of one table share."""
    low, high = scale

    def at(x: float) -> float:
        return 4.0 + 92.0 * (x - low) / (high - low)

    a, b, c, zero = at(interval.low), at(interval.high), at(interval.estimate), at(0.0)
    return (
        '<svg class="spark" viewBox="0 0 100 12" width="140" height="17" role="img">'
        f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="12" class="zero"/>'
        f'<line x1="{a:.1f}" x2="{b:.1f}" y1="6" y2="6" class="range"/><circle cx="{c:.1f}" cy="6" r="2.6"/></svg>'
    )


def folded(title: str, value: Any) -> str:
    """Nested facts that are shown when the reader asks."""
    return f"<details><summary>{escape(title)}</summary>{nested_table(value)}</details>"


def nested_table(value: Any, depth: int = 0) -> str:
    """Nested facts as a table: one line for each leaf, long lists shortened; columns where siblings share their keys."""
    if isinstance(value, Mapping):
        children = list(value.items())
        dicts = [v for _, v in children if isinstance(v, Mapping)]
        if len(dicts) == len(children) > 1 and all(set(d) == set(dicts[0]) for d in dicts):
            leaves = [dict(_leaves(d)) for d in dicts]
            if all(set(x) == set(leaves[0]) for x in leaves):
                lines = [[escape(path), *(escape(x[path]) for x in leaves)] for path in leaves[0]]
                return rows_table(("", *(escape(name) for name, _ in children)), lines)
        return rows_table(("", ""), [[escape(path), escape(leaf)] for path, leaf in _leaves(value)])
    return f"<p>{escape(value)}</p>"


def _leaves(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [
            leaf
            for key, child in value.items()
            for leaf in _leaves(child, f"{path}, {key}".lstrip(", ").replace("_", " "))
        ]
    if isinstance(value, float):
        return [(path, f"{value:.4g}")]
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
        return [(path, f"{len(value)} x {len(value[0])} numbers")]
    if isinstance(value, (list, tuple)):
        shown = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value[:12])
        return [(path, shown + (f" ... ({len(value)})" if len(value) > 12 else ""))]
    return [(path, str(value))]


_LIGHT = (
    "--page:#fbfbf9;--card:#fff;--ink:#1d2129;--soft:#5b6270;--faint:#e3e5e8;--good:#11734b;--calm:#2557a7;"
    "--open:#8a5a00;--bad:#a3312b;--heat:37 87 167;"
    "--c0:#2563b8;--c1:#c2410c;--c2:#0f766e;--c3:#be185d;--c4:#7c3aed;--c5:#6b7280;--c6:#a16207;--c7:#4d7c0f;"
)
_DARK = (
    "--page:#14171c;--card:#1b1f26;--ink:#e8eaee;--soft:#a3abb8;--faint:#343a45;--good:#4cc38a;--calm:#7fb0ff;"
    "--open:#f0b849;--bad:#ff8f85;--heat:127 176 255;"
    "--c0:#6ea8ff;--c1:#ff8a5c;--c2:#4fd1c5;--c3:#f687b3;--c4:#b794f6;--c5:#9aa3b2;--c6:#ecc94b;--c7:#a3d65c;"
)
STYLE = (
    f":root{{{_LIGHT}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    "*{box-sizing:border-box}"
    "body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif}"
    "main{max-width:1440px;margin:0 auto;padding:28px 20px 60px}"
    "header,section{background:var(--card);border:1px solid var(--faint);border-radius:10px;padding:18px 22px;margin:0 0 18px}"
    "h1{font-size:27px;line-height:1.25;margin:6px 0 10px}h2{font-size:18px;margin:0 0 8px}h3{font-size:15px;margin:18px 0 6px}"
    "h1.good{color:var(--good)}h1.calm{color:var(--calm)}h1.open{color:var(--open)}"
    ".caution{color:var(--open)}details{margin:8px 0}summary{cursor:pointer;color:var(--soft)}"
    "p{margin:6px 0 10px;max-width:92ch}.lead{font-size:16px}.over,small,figcaption,.note{color:var(--soft)}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;margin:6px 0}"
    "th,td{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid var(--faint);vertical-align:top}"
    "th{color:var(--soft);font-weight:600}.board{font-size:12px}.board td,.board th{padding-right:8px}"
    ".board td{white-space:nowrap}"
    ".board td:first-child{min-width:170px}"
    ".board small{display:inline-block;white-space:normal;max-width:200px;line-height:1.25}"
    ".up{color:var(--good)}.down{color:var(--bad)}td i{color:var(--soft)}"
    ".heatmap td{padding:0 8px 0 0;white-space:nowrap;vertical-align:middle}"
    ".heatmap th span{display:inline-block;writing-mode:vertical-rl;transform:rotate(180deg);font-weight:500}"
    ".heatmap th{vertical-align:bottom}"
    ".heat{display:block;min-width:34px;text-align:center;padding:3px 4px;"
    "background:rgb(var(--heat)/calc(var(--s)*.75));print-color-adjust:exact;-webkit-print-color-adjust:exact}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:6px 0}dt{color:var(--soft)}"
    "dd{margin:0;overflow-wrap:anywhere}code{font-size:12px;overflow-wrap:anywhere}"
    "figure{margin:6px 0}figure svg{width:100%;height:auto;max-width:960px}"
    ".spark .zero{stroke:var(--soft);stroke-width:.8}.spark .range{stroke:var(--c0);stroke-width:2.4}"
    ".spark circle{fill:var(--c0)}"
    f"@media print{{:root{{{_LIGHT}--page:#fff}}body{{font-size:11px}}main{{max-width:none;padding:0}}"
    "header,section{border:0;padding:0 0 8px;break-inside:avoid-page}.wide{overflow:visible}table{font-size:9px}"
    "section:has(.board),section:has(dl){break-inside:auto}}"
)
