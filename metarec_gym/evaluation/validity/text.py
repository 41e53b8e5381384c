"""The validity report as Markdown: verdict, findings, and whether the answer stays when what the log cannot tell is varied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def markdown(validity: Mapping[str, Any], provenance: Mapping[str, str]) -> str:
    """A page that a repository can keep; `validity` is the content of validity.json."""
    verdict = validity["verdict"]
    lines = [f"# How far may {validity['name']} be believed?", "", f"**{verdict['headline']}.**", ""]
    lines += [f"- {sentence}" for sentence in verdict["sentences"]]
    counts = ", ".join(f"{count} {result}" for result, count in verdict["counts"].items())
    users = ", ".join(f"{fold} {count}" for fold, count in validity["users_by_fold"].items())
    lines += ["", f"World `{validity['world']}`, users {users}; {counts}; {validity['seconds']:.0f} s."]
    lines += [f"{key}: `{value}`" for key, value in provenance.items()]
    lines += ["", "| question | result | answer |", "|---|---|---|"]
    lines += [f"| {f['question']} | {f['result']} | {f['text']} |" for f in validity["findings"]]
    losses = validity.get("log_loss") or {}
    if losses:
        models = list(dict.fromkeys(model for entry in losses.values() for model in entry))
        lines += ["", "Held-out log-loss:", "", f"| outcome | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
        for outcome, entry in losses.items():
            cells = [f"{entry[model]:.4f}" if isinstance(entry.get(model), float) else "" for model in models]
            lines.append(f"| {outcome} | {' | '.join(cells)} |")
    if validity.get("sensitivity"):
        names = list(validity["sensitivity"][0].get("headrooms", {}))
        lines += ["", f"Headroom over the single best strategy at T={validity['horizon']}, as settings vary:", ""]
        lines += [f"| setting | single best | {' | '.join(names)} | answer |", "|---" * (len(names) + 3) + "|"]
        for row in validity["sensitivity"]:
            cells = [_percent(row["headrooms"][name]) if name in row.get("headrooms", {}) else "" for name in names]
            answer = row.get("verdict", row.get("note", ""))
            lines.append(f"| {row['label']} | {row.get('sbs', '')} | {' | '.join(cells)} | {answer} |")
    return "\n".join(lines) + "\n"


def _percent(interval: Mapping[str, float]) -> str:
    return f"{interval['estimate']:+.1%} [{interval['low']:+.1%}, {interval['high']:+.1%}]"
