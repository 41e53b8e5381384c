"""Learning curves of trainings, read from the TensorBoard events that every learner writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metarec_gym.evaluation.intervals import Floats

TAG = "metarec/return_per_request"
"""Mean sampled reward of a request during a rollout."""
POINTS = 40
"""Points of a curve."""


@dataclass(frozen=True)
class LearningCurve:
    """Reward a request while learning, on training users by the training judge.

    Attributes:
        name: The learner.
        requests: float64 (points,), requests learned from.
        mean: float64 (points,), mean over trainings.
        low: Lower end of the 95 % t interval over trainings.
        high: Upper end.
        trainings: How many.
    """

    name: str
    requests: Floats
    mean: Floats
    low: Floats
    high: Floats
    trainings: int


def read_scalars(folder: Path, tag: str = TAG) -> tuple[Floats, Floats]:
    """Steps and values of one tag in a run's folder; the last value of a step holds. Empty where nothing was logged."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found: dict[int, float] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == tag:
                    number = make_ndarray(value.tensor) if value.HasField("tensor") else value.simple_value
                    found[int(event.step)] = float(np.asarray(number))
    steps = sorted(found)
    return np.array(steps, dtype=np.float64), np.array([found[step] for step in steps], dtype=np.float64)


def learning_curve(name: str, runs: Sequence[tuple[Floats, Floats]]) -> LearningCurve | None:
    """One curve of several trainings; None where none logged at least two points.

    Args:
        name: The learner.
        runs: Steps and values of each training; they need not share their steps.
    """
    from scipy import stats

    usable = [(steps, values) for steps, values in runs if len(steps) >= 2]
    if not usable:
        return None
    grid = np.linspace(max(s[0] for s, _ in usable), min(s[-1] for s, _ in usable), POINTS)
    width = (grid[1] - grid[0]) / 2.0
    rows = []
    for steps, values in usable:
        # the mean of what was logged near a point: single rollouts are noisy
        smooth = [values[np.abs(steps - x) <= width] for x in grid]
        rows.append(
            [np.interp(x, steps, values) if not len(v) else v.mean() for x, v in zip(grid, smooth, strict=True)]
        )
    matrix = np.array(rows)
    mean, n = matrix.mean(axis=0), len(matrix)
    half = stats.t.ppf(0.975, n - 1) * matrix.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros_like(mean)
    return LearningCurve(name, grid, mean, mean - half, mean + half, n)
