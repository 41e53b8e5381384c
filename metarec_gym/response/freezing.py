"""Fitted parts in the tables of a frozen judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metarec_gym.response.effects import cholesky_factor
from metarec_gym.response.frozen import FrozenResponse, untimed
from metarec_gym.response.item_space import ItemSpace
from metarec_gym.response.network import Network
from metarec_gym.response.outcome_parts import Part
from metarec_gym.response.rows import MAX_SLATE, Rows

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset


def network_tensors(networks: list[list[Network]]) -> dict[str, Tensor]:
    """Networks of (member, outcome) in the tables of `FrozenResponse`; each outcome has its own block of hidden units."""
    n_outcomes, rank = len(networks[0]), networks[0][0].vector.shape[1]
    widths = [len(network.hidden_bias) for network in networks[0]]
    tower_weight = torch.zeros(len(networks), n_outcomes * rank, sum(widths))
    for member, own in enumerate(networks):
        at = 0
        for outcome, (network, width) in enumerate(zip(own, widths, strict=True)):
            tower_weight[member, outcome * rank : (outcome + 1) * rank, at : at + width] = network.tower_weight
            at += width
    return {
        "hidden_weight": torch.stack([torch.cat([n.hidden_weight for n in own]) for own in networks]),
        "hidden_bias": torch.stack([torch.cat([n.hidden_bias for n in own]) for own in networks]),
        "tower_weight": tower_weight,
        "tower_bias": torch.stack([torch.cat([n.tower_bias for n in own]) for own in networks]),
        "item_output": torch.stack([torch.stack([n.vector for n in own], dim=1) for own in networks]),
        "item_bias": torch.stack([torch.stack([n.bias for n in own], dim=1) for own in networks]),
    }


def freeze(
    dataset: Dataset,
    rows: Rows,
    space: ItemSpace,
    networks: list[list[Network]],
    parts: list[Part],
    covariates: Tensor,
    feature_names: tuple[str, ...],
) -> FrozenResponse:
    """All parts in the tables of `FrozenResponse`."""
    n_outcomes, n_features = len(parts), len(feature_names)
    mean = torch.zeros(dataset.n_users, n_outcomes, n_features)
    factor = torch.zeros(dataset.n_users, n_outcomes, n_features, n_features)
    for outcome, part in enumerate(parts):
        found, scale = part.effects, part.scale
        # the frozen logit is scale * (f + z . phi) + shift, the fitted one scale * f + z . phi + shift
        mean[:, outcome] = found.prior(covariates).to(torch.float32) / scale
        factor[:, outcome] = cholesky_factor(found.covariance).to(torch.float32) / scale
        mean[rows.users, outcome] = found.mean.to(torch.float32) / scale
        factor[rows.users, outcome] = cholesky_factor(found.posterior).to(torch.float32) / scale
    shown = parts[0].shown
    calibration = torch.tensor([[part.scale, part.shift] for part in parts])
    tensors = network_tensors(networks) | {
        "item_input": space.item_input,
        "decays": space.decays,
        "calibration": calibration.expand(len(networks), -1, -1),
        "static_features": space.static_features,
        "trend": space.trend,
        "dynamic_scale": space.dynamic_scale,
        "effect_mean": mean,
        "effect_chol": factor,
        "pair_sd": torch.tensor([part.pair_sd / part.scale for part in parts]),
        **untimed(MAX_SLATE),
        "position_logit": torch.cat([torch.zeros(1), shown[:-1]]),
        "fatigue": shown[-1:],
    }
    return FrozenResponse(tensors, tuple(dataset.outcomes), feature_names)
