"""How much does the place in a slate count? Fitted on a log of impressions that says places.

    python -m experiments.positions --log envs_data/open_bandit

Items carry their own effect, so that good items in good places are not taken for examination. The decay per doubling of the
place is what the environments' `position_decay` means; where the log cannot tell it from 0, headline worlds leave it at 0 and
the validity report varies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.run_folder import RunFolder, code_hash, command_line, write_atomic

CODE = ("experiments/positions.py", "metarec_gym/response/position.py", "metarec_gym/data/impressions.py")


@dataclass(frozen=True)
class Args:
    """Fits the effect of places."""

    log: Path = Path("envs_data/open_bandit")
    """Folder of a prepared log of impressions."""
    campaigns: tuple[str, ...] = ()
    """Campaigns; all, each by itself and together, if empty."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    out: Path | None = None
    """Also writes the Markdown page here."""


def sentence(decay: float, error: float) -> str:
    """What a decay and its standard error allow to say."""
    low, high = decay - 1.96 * error, decay + 1.96 * error
    if low > 0.0:
        return "later places are surely seen less"
    if high < 0.0:
        return "later places are surely taken more: the log's places mean something else"
    return f"cannot tell it from 0 (a decay above {max(abs(low), abs(high)):.2f} is ruled out)"


def run(args: Args) -> dict[str, Any]:
    """Fits, prints and writes; returns what `result.json` holds.

    Raises:
        ValueError: When the log is no impression table, or a campaign is unknown.
    """
    from metarec_gym.data.impressions import load_open_bandit
    from metarec_gym.response.position import position_of_impressions

    table = load_open_bandit(args.log)
    facts = {"kind": "positions", "log": table.hash, "campaigns": args.campaigns, "code": code_hash(CODE)}
    folder = RunFolder(args.runs, f"positions_{table.name}", facts)
    folder.begin(args, command_line())
    names: list[str | None] = list(args.campaigns) or [None, *sorted(table.frame["campaign"].unique())]
    lines = [
        f"# How much does the place count in {table.name}?",
        f"Command: `{command_line()}`. Effects on the logit of a click against the first place, 95 % intervals; items carry "
        "their own.",
        "| campaign | impressions | clicks | places after the first | logit lost per doubling | |\n" + "|---" * 6 + "|",
    ]
    row: dict[str, Any] = {"log": table.hash, "campaigns": {}}
    for name in names:
        label = name or "all together"
        try:
            effect = position_of_impressions(table, campaign=name)
        except ValueError as error:
            if args.campaigns:
                raise
            lines[-1] += f"\n| {label} | | | | | not fitted: {error} |"
            continue
        decay, error_of = effect.decay
        later = zip(effect.logit[1:].tolist(), effect.standard_error[1:].tolist(), strict=True)
        places = ", ".join(f"{logit:+.2f} +- {1.96 * se:.2f}" for logit, se in later)
        lines[-1] += f"\n| {label} | {effect.n_rows:,} | {effect.n_clicks:,} | {places} "
        lines[-1] += f"| {decay:+.2f} +- {1.96 * error_of:.2f} | {sentence(decay, error_of)} |"
        row["campaigns"][label] = {
            "rows": effect.n_rows,
            "clicks": effect.n_clicks,
            "logit": effect.logit.tolist(),
            "standard_error": effect.standard_error.tolist(),
            "decay": decay,
            "decay_standard_error": error_of,
        }
    text = "\n\n".join(lines) + "\n"
    print(text)
    for path in (folder.path / "positions.md", *([args.out] if args.out else [])):
        write_atomic(path, text)
    result = folder.finish(row)
    print(f"result   {folder.path / 'result.json'}")
    return result


def main() -> None:
    """The command line."""
    import tyro

    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
