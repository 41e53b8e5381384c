"""A frozen judge from the users of one fold.

In inner user folds the network is fitted on the other users and asked about these: everything that describes users and
probabilities (random effects, scale, shift, place, fatigue) is estimated on such predictions, otherwise what the network has
memorised of a user would be counted twice and the differences between users understated. Then the members are fitted on the
whole fold: the first on all users alike, the others on users weighted at random (a Bayesian bootstrap with weights of variance
1/4). They share item vectors, features and random effects, so a state means the same to each.

What a positives-only log does not identify, and what stands in its place:

* the rate of taking a shown item: declared (`base_rate`), so that p averaged over a uniformly drawn unseen item is that;
* a rate of each user's own: the gate's intercept has no random effect; among items the user's choice is identified, and fitted;
* eps_user,item, position, fatigue and leaving: 0 (leaving: -inf, never).

A log with impressions identifies the first two, position where it is logged and varies, fatigue where slates repeat categories
in a session, and eps_user,item where users meet an item again; each is 0 where the log is too small to tell it from 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarec_gym.response.config import ResponseConfig
from metarec_gym.response.effects import fit_effects
from metarec_gym.response.fold_fit import FoldFit
from metarec_gym.response.freezing import freeze, network_tensors
from metarec_gym.response.frozen import FrozenResponse
from metarec_gym.response.outcome_parts import (
    Part,
    calibrated,
    describe,
    fit_baselines,
    heldout_calibration,
    heldout_score,
    stacked,
)
from metarec_gym.response.rows import Rows

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset


def fit_response(
    dataset: Dataset,
    users: Tensor,
    *,
    seed: int,
    config: ResponseConfig | None = None,
    heldout_users: Tensor | None = None,
    members: int = 2,
    progress: bool | Callable[[str, int, int], None] = False,
    device: torch.device | str = "cpu",
) -> tuple[FrozenResponse, dict[str, Any]]:
    """Fits one judge.

    Args:
        dataset: The log.
        users: int64, the users of one fold (A or B); no row of any other user is read, but for the activity (number of
            engaged items) that centres the other users' prior, and the log's first and last time.
        seed: Seed of the fit.
        config: Settings; None = the defaults.
        heldout_users: Users of another fold, on whom the metrics are computed; they change nothing in the judge.
        members: Networks of the judge.
        progress: True shows a bar with time left; a function is called with (stage, done, total).
        device: Where networks and random effects are fitted; item vectors, calibration and yardsticks are made on the CPU, where
            their libraries are, and so are all draws.

    Returns:
        The frozen judge, on the CPU, and JSON-able metrics: `outcomes` has one entry an outcome (`effects`, `calibration`,
        `heldout`).

    Raises:
        ValueError: When the fold has too few users or events to fit a judge.
    """
    config = config or ResponseConfig()
    begun = time.perf_counter()
    fit = FoldFit.of(dataset, users, config, seed, members, progress, device)
    rows, bar, names = fit.rows, fit.bar, dataset.outcomes
    choices, samples, epochs = fit.out_of_fold()
    covariates = _covariates(dataset, rows)
    parts: list[Part] = []
    for outcome, name in enumerate(names):
        bar.begin(f"random effects of {name}")
        free = torch.ones(choices[outcome].phi.shape[2], dtype=torch.bool)
        # a rate of the user's own would need the items that were shown and not taken
        free[0] = not (fit.sampled and outcome == 0)
        choice, sample, stack = choices[outcome], samples[outcome], None
        if fit.rare(outcome):
            choice, sample, stack = stacked(sample, rows)
        choice = choice.to(device)
        effects = fit_effects(choice, covariates[rows.users], free=free, rounds=config.effect_rounds).to("cpu")
        parts.append(calibrated(sample, effects, covariates, rows, outcome == 0 and not fit.sampled, stack))
        bar.tick()
    space, networks = fit.whole(epochs)
    networks = fit.stacked(networks, space, [part.stack for part in parts])
    response = fit.levelled(freeze(dataset, rows, space, networks, parts, covariates, fit.feature_names))
    metrics = fit.description(epochs)
    for outcome, name in enumerate(names):
        entry = describe(parts[outcome], response, outcome)
        if heldout_users is not None:
            bar.begin(f"held-out {name}")
            baselines = fit_baselines(samples[outcome])
            held = fit.heldout_sample(response, heldout_users, outcome, space)
            entry["baselines"] = {kind: beta.tolist() for kind, beta in baselines.items()}
            entry["heldout"] = heldout_score(
                held, parts[outcome], covariates, heldout_calibration(entry, response, outcome), baselines
            )
            bar.tick()
        metrics["outcomes"][name] = entry
    fit.finish(metrics, response, heldout_users, begun)
    return response, metrics


def fit_variant(
    dataset: Dataset,
    users: Tensor,
    base: FrozenResponse,
    base_metrics: Mapping[str, Any],
    *,
    seed: int,
    config: ResponseConfig,
    heldout_users: Tensor | None = None,
    members: int | None = None,
    progress: bool | Callable[[str, int, int], None] = False,
    device: torch.device | str = "cpu",
) -> tuple[FrozenResponse, dict[str, Any]]:
    """The judge `base` with its networks learnt anew, with another sampler of negatives: cheap, for a sensitivity table.

    Item vectors and features do not depend on the sampler, and the density that the network is after does not either. Random
    effects and scale are those of `base`, the passes over the fold too; f and each member's level are fitted again.

    Args:
        dataset: The log.
        users: The users `base` was fitted on.
        base: A judge of `fit_response`.
        base_metrics: Its metrics, JSON-able; with held-out numbers when `heldout_users` is given.
        seed: The seed `base` was fitted with.
        config: The settings of `base` with another `sampler`; what it says on random effects and calibration is not read.
        heldout_users: Users of another fold for the metrics.
        members: Networks of the variant; None = as many as `base` has.
        progress: As in `fit_response`.
        device: As in `fit_response`.

    Returns:
        As `fit_response`.

    Raises:
        ValueError: When the item vectors are not those of `base`: another seed, other users or other settings.
    """
    begun = time.perf_counter()
    fit = FoldFit.of(dataset, users, config, seed, members or base.n_members, progress, device, stages=1)
    covariates = _covariates(dataset, fit.rows)
    space, networks = fit.whole([int(base_metrics["epochs"][name]) for name in dataset.outcomes])
    if not torch.equal(space.item_input, base.tensors["item_input"]) or fit.feature_names != base.feature_names:
        raise ValueError(
            "the variant's item vectors are not those of its base judge; expected the same users, seed and settings but for "
            "the sampler: fit it with fit_response instead"
        )
    stacks = [Part.described(base_metrics["outcomes"][name]).stack for name in dataset.outcomes]
    networks = fit.stacked(networks, space, stacks)
    tensors = dict(base.tensors) | network_tensors(networks)
    tensors["calibration"] = base.tensors["calibration"][:1].expand(fit.members, -1, -1)
    response = fit.levelled(FrozenResponse(tensors, base.outcomes, base.feature_names))
    metrics = fit.description([int(base_metrics["epochs"][name]) for name in dataset.outcomes])
    for outcome, name in enumerate(dataset.outcomes):
        known = base_metrics["outcomes"][name]
        part = Part.described(known)
        entry = describe(part, response, outcome)
        entry["effects"] = known["effects"]
        if heldout_users is not None:
            fit.bar.begin(f"held-out {name}")
            baselines = {k: torch.tensor(beta, dtype=torch.float64) for k, beta in known["baselines"].items()}
            held = fit.heldout_sample(response, heldout_users, outcome, space)
            entry["baselines"] = known["baselines"]
            entry["heldout"] = heldout_score(
                held, part, covariates, heldout_calibration(entry, response, outcome), baselines
            )
            fit.bar.tick()
        metrics["outcomes"][name] = entry
    fit.finish(metrics, response, heldout_users, begun)
    return response, metrics


def _covariates(dataset: Dataset, rows: Rows) -> Tensor:
    """x_u = (1, log activity standardised in the fold) of every user of the dataset; float64 (n_users, 2)."""
    activity = torch.log1p(dataset.engaged_counts().to(torch.float64))
    own = activity[rows.users]
    spread = own.std(unbiased=False)
    standardised = (activity - own.mean()) / spread if float(spread) > 1e-6 else torch.zeros_like(activity)
    return torch.stack([torch.ones_like(standardised), standardised], dim=1)
