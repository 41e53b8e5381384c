"""Session lengths and return times of users that the judges have not seen: the log against the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metarec_gym.evaluation.intervals import Floats
from metarec_gym.evaluation.validity.checks import curve_quantiles, hazard_curves
from metarec_gym.evaluation.validity.sample import FOLD_NUMBER, FOLDS

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset
    from metarec_gym.world import World

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def return_curves(world: World, dataset: Dataset) -> dict[str, Any] | None:
    """Times to the next session of users that the judges have not seen: log against model; None without a return model."""
    from metarec_gym.response.returning import return_table

    parts, edges = [], None
    for fold, other in (FOLDS, FOLDS[::-1]):
        judge = world.responses[fold]
        if not judge.has_return:
            return None
        table = return_table(dataset, dataset.users_in(FOLD_NUMBER[other]))
        own = judge.tensors["return_edges"].to(torch.float64)
        hazards = judge.return_hazards(table.features.to(torch.float32)).to(torch.float64)
        gap, followed = table.gap_h[:, None], table.followed_h[:, None]
        not_yet = gap >= own[:-1]
        not_yet[:, 0] = True
        at_risk = not_yet & (followed >= own[1:])
        happened = at_risk & (gap < own[1:])
        who, where = torch.nonzero(at_risk, as_tuple=True)
        n_bins = len(own) - 1
        curves = hazard_curves(where.numpy(), happened[who, where].numpy(), hazards[who, where].numpy(), n_bins)
        # each judge has edges of its own: the second one's curves are read at the first one's
        edges = own if edges is None else edges
        at = [np.interp(edges[1:].log().numpy(), own[1:].log().numpy(), curve) for curve in curves]
        parts.append((len(table.user), int(table.returned.sum()), at[0], at[1]))
    assert edges is not None
    return _curves_json(edges[1:].numpy(), parts, unit="hours")


def session_curves(world: World, dataset: Dataset) -> dict[str, Any] | None:
    """Requests a session of users that the judges have not seen: log against model; None where nobody ever leaves."""
    from metarec_gym.response.leaving import request_table

    if not dataset.has_impressions or not all(world.responses[fold].has_leaving for fold in FOLDS):
        return None
    tables = {fold: request_table(dataset, dataset.users_in(FOLD_NUMBER[fold])) for fold in FOLDS}
    numbers = {}
    for fold, table in tables.items():
        key = table.user * (int(table.session.max()) + 1) + table.session
        new = torch.cat([torch.ones(1, dtype=torch.bool), key[1:] != key[:-1]])
        at = torch.arange(len(key))
        numbers[fold] = at - at[new][torch.cumsum(new.to(torch.int64), 0) - 1]
    longest = min(max(int(number.max()) for number in numbers.values()) + 1, 500)
    parts = []
    for fold, other in (FOLDS, FOLDS[::-1]):
        table, number = tables[other], numbers[other]
        keep = table.known & (number < longest)
        unrewarded, quality, repetition = table.features.to(torch.float32).T
        hazard = world.responses[fold].leave_prob(unrewarded, quality, repetition).to(torch.float64)
        log, model = hazard_curves(number[keep].numpy(), table.left[keep].numpy(), hazard[keep].numpy(), longest)
        parts.append((int((number == 0).sum()), int(table.left[keep].sum()), log, model))
    return _curves_json(np.arange(1, longest + 1), parts, unit="requests")


def _curves_json(ends: Any, parts: list[tuple[int, int, Floats, Floats]], *, unit: str) -> dict[str, Any]:
    weight = np.array([n for n, _, _, _ in parts], dtype=np.float64)
    weight = weight / weight.sum()
    log = sum(w * part[2] for w, part in zip(weight, parts, strict=True))
    model = sum(w * part[3] for w, part in zip(weight, parts, strict=True))
    return {
        "unit": unit,
        "n_sessions": sum(part[0] for part in parts),
        "n": sum(part[1] for part in parts),
        # of the worse judge: pooled, two judges fitted to each other's users would cancel each other's errors
        "ks": max(float(np.abs(part[2] - part[3]).max()) for part in parts),
        "ends": np.asarray(ends, dtype=np.float64).tolist(),
        "log": np.asarray(log).tolist(),
        "model": np.asarray(model).tolist(),
        "quantiles": list(QUANTILES),
        "log_quantiles": curve_quantiles(ends, np.asarray(log), QUANTILES),
        "model_quantiles": curve_quantiles(ends, np.asarray(model), QUANTILES),
    }
