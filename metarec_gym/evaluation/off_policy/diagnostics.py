"""How much of a log an estimate rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metarec_gym.evaluation.intervals import Floats

FEW_ROWS = 100.0
"""Effective rows below which asymptotic intervals are called unreliable."""
LARGE_SHARE = 0.05
"""A row that carries more than this share of the weights is called out."""


@dataclass(frozen=True)
class Support:
    """Weights of a policy on a log."""

    rows: int
    """Rows of the log."""
    matched: int
    """Rows with a weight above 0."""
    effective_rows: float
    """(sum w)^2 / sum w^2 (Kish 1965): so many equally weighted rows would say as much."""
    largest_weight: float
    """Largest weight."""
    largest_share: float
    """Its share of the sum of weights."""
    mean_weight: float
    """About 1 where the propensities are right and the logger could do all that the policy does."""

    def warnings(self) -> tuple[str, ...]:
        """What to tell a reader, in sentences; empty where nothing is wrong."""
        found = []
        if self.effective_rows < FEW_ROWS:
            found.append(
                f"{self.effective_rows:.0f} effective rows of {self.rows:,}: the intervals (but Bernstein's) are too short"
            )
        if self.largest_share > LARGE_SHARE:
            found.append(f"one row carries {self.largest_share:.0%} of the weight")
        if not 0.8 < self.mean_weight < 1.25:
            found.append(
                f"mean weight {self.mean_weight:.2f}, expected 1: chances are wrong, support is missing, or tails unseen"
            )
        return tuple(found)


def support(weight: Floats) -> Support:
    """Facts of a policy's weights; (n_rows,), not all 0."""
    total = float(weight.sum())
    return Support(
        rows=len(weight),
        matched=int((weight > 0.0).sum()),
        effective_rows=total**2 / float((weight**2).sum()),
        largest_weight=float(weight.max()),
        largest_share=float(weight.max()) / total,
        mean_weight=float(weight.mean()),
    )


def overlap(weight: Floats, bins: int = 30) -> dict[str, Any]:
    """Histogram of the weights on a logarithmic scale.

    Args:
        weight: (n_rows,).
        bins: Bars between the smallest and the largest positive weight.

    Returns:
        `edges` (bins + 1) of log10(w), `rows` (bins), and `zero`: the share of rows that the policy would never have served so.
    """
    positive = np.log10(weight[weight > 0.0])
    low, high = float(positive.min()), float(positive.max())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    rows, _ = np.histogram(positive, edges)
    return {"edges": edges, "rows": rows, "zero": float((weight == 0.0).mean())}


def plot_overlap(weights: Mapping[str, Floats], path: Path) -> Path:
    """Draws the histograms of several policies, one above the other.

    Args:
        weights: (n_rows,) by policy.
        path: A PNG to write.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.1 + 1.3 * len(weights)), layout="constrained")
    axes = figure.subplots(len(weights), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, weight) in zip(axes, weights.items(), strict=True):
        facts, histogram = support(weight), overlap(weight)
        axis.stairs(histogram["rows"], histogram["edges"], fill=True)
        axis.axvline(0.0, color="black", linewidth=0.8)
        axis.set_yscale("symlog")
        axis.set_ylabel("rows")
        axis.set_title(
            f"{name}: {facts.effective_rows:,.0f} effective rows of {facts.rows:,}; weight 0 in {histogram['zero']:.0%}",
            fontsize=9,
        )
    axes[-1].set_xlabel("log10 of the weight (policy's chance over the logger's)")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=100)
    partial.replace(path)
    return path
