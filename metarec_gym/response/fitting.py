"""A frozen judge from the users of one fold.

In inner user folds the network is fitted on the other users and asked about these: everything that describes users and
probabilities (random effects, scale, shift) is estimated on such predictions, otherwise what the network has memorised of a user
would be counted twice and the differences between users understated. Then the network is fitted again on the whole fold.

What a positives-only log does not identify, and what stands in its place:

* the rate of taking a shown item: declared (`base_rate`), so that p averaged over a uniformly drawn unseen item is that;
* a rate of each user's own: the gate's intercept has no random effect; among items the user's choice is identified, and fitted;
* eps_user,item, position and leaving: 0 (`pair_sd` 0, `position_logit` 0, `leaving` (-inf, 0)).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarec_gym.response.calibration import (
    Spread,
    calibration_slope,
    expected_calibration_error,
    fit_scale_and_shift,
    log_loss,
    logistic_fit,
    marginal,
    reliability,
    solve_shift,
)
from metarec_gym.response.effects import ChoiceData, Effects, cholesky_factor, fit_effects
from metarec_gym.response.frozen import DYNAMIC_FEATURES, FrozenResponse
from metarec_gym.response.model import (
    STATIC_FEATURES,
    ItemSpace,
    Network,
    ResponseConfig,
    Rows,
    chosen_categories,
    fit_network,
    item_space,
    outcome_level,
    prefix_inputs,
)
from metarec_gym.seeding import numpy_rng, stream, torch_generator

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

MAX_SLATE = 64
"""Positions for which a position effect is stored."""
_CALIBRATION_EVENTS = 8_000
_HELDOUT_EVENTS = 12_000
_UNIFORM_NEGATIVES = 16
_CHUNK = 2_048


@dataclass(frozen=True)
class _Sample:
    """Events of users the network has not seen, each with some items: what calibration and scoring read."""

    user: Tensor
    """int64 (n,): index of the user in the dataset."""
    score: Tensor
    """float32 (n, m): f, without random effects."""
    phi: Tensor
    """float32 (n, m, n_features)."""
    simple: Tensor
    """float32 (n, m, k): what the popularity baseline reads."""
    target: Tensor
    """float32 (n, m)."""
    weight: Tensor
    """float32 (n, m): sampled negatives have the weight that makes the positives' share the base rate."""


def _cat(parts: list[Any]) -> Any:
    kind = type(parts[0])
    fields = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    joined = {k: torch.cat(v) if isinstance(v[0], Tensor) else v[0] for k, v in fields.items()}
    return kind(**joined)


class _Progress:
    """A bar with time left, a callback (stage, done, total), or nothing."""

    def __init__(self, show: bool | Callable[[str, int, int], None], total: int):
        self.show, self.total, self.done, self.stage = show, total, 0, ""
        self.bar: Any = None
        if show is True:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc="judge", unit="step")

    def expect(self, total: int) -> None:
        self.total = max(total, self.done)
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.refresh()

    def begin(self, stage: str) -> None:
        self.stage = stage
        if self.bar is not None:
            self.bar.set_description(f"judge: {stage}")

    def tick(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update(1)
        elif callable(self.show):
            self.show(self.stage, self.done, max(self.total, self.done))

    def close(self) -> None:
        if self.bar is not None:
            self.expect(self.done)
            self.bar.close()


def fit_response(
    dataset: Dataset,
    users: Tensor,
    *,
    seed: int,
    config: ResponseConfig | None = None,
    heldout_users: Tensor | None = None,
    progress: bool | Callable[[str, int, int], None] = False,
) -> tuple[FrozenResponse, dict[str, Any]]:
    """Fits one judge.

    Args:
        dataset: The log.
        users: int64, the users of one fold (A or B); no row of any other user is read, but for the activity (number of
            engaged items) that centres the other users' prior.
        seed: Seed of the fit.
        config: Settings; None = the defaults.
        heldout_users: Users of another fold, on whom the metrics are computed; they change nothing in the judge.
        progress: True shows a bar with time left; a function is called with (stage, done, total).

    Returns:
        The frozen judge, and JSON-able metrics: `outcomes` has one entry an outcome (`effects`, `calibration`, `heldout`).

    Raises:
        ValueError: When the fold has too few users or events to fit a judge.
    """
    config = config or ResponseConfig()
    begun = time.perf_counter()
    rows = Rows.of(dataset, users)
    if rows.n_users < 2 * config.inner_folds or int(rows.engaged.sum()) < 50:
        raise ValueError(
            f"{rows.n_users} users with {int(rows.engaged.sum())} engaged events are too few for a judge; "
            f"expected at least {2 * config.inner_folds} users and 50 events: use a larger log or larger fold shares"
        )
    sampled = not dataset.has_impressions
    base_rate = _base_rate(rows, config, sampled)
    bar = _Progress(progress, (config.inner_folds + 1) * dataset.outcome.shape[1] * 8)
    fit = _Fit(dataset, rows, config, seed, sampled, base_rate, bar)
    choices, samples, epochs = fit.out_of_fold()
    covariates = _covariates(dataset, rows)
    effects, calibration = [], []
    for outcome in range(len(dataset.outcomes)):
        bar.begin(f"random effects of {dataset.outcomes[outcome]}")
        free = torch.ones(choices[outcome].phi.shape[2], dtype=torch.bool)
        # a rate of the user's own would need the items that were shown and not taken
        free[0] = not (sampled and outcome == 0)
        fitted = fit_effects(choices[outcome], covariates[rows.users], free=free, rounds=config.effect_rounds)
        effects.append(fitted)
        calibration.append(_calibrate(samples[outcome], fitted, covariates))
        bar.tick()
    space, networks = fit.whole(epochs)
    names = (
        *STATIC_FEATURES,
        *(f"category: {dataset.category_names[int(c)]}" for c in fit.categories),
        *DYNAMIC_FEATURES,
    )
    response = _freeze(dataset, rows, space, networks, effects, calibration, covariates, names)
    if sampled:
        response = fit.declare_base_rate(response)
    metrics: dict[str, Any] = {
        "n_users": rows.n_users,
        "n_rows": rows.n,
        "sampled_negatives": sampled,
        "base_rate": base_rate,
        "epochs": dict(zip(dataset.outcomes, epochs, strict=True)),
        "outcomes": {},
    }
    for outcome, name in enumerate(dataset.outcomes):
        sample, found = samples[outcome], effects[outcome]
        scale, shift = calibration[outcome]
        entry: dict[str, Any] = {
            "effects": {
                "features": list(response.feature_names),
                "sd": found.covariance.diagonal().sqrt().tolist(),
                "covariance": found.covariance.tolist(),
                "mean": found.weight[:, 0].tolist(),
                "mean_per_sd_log_activity": found.weight[:, 1].tolist(),
                "log_marginal": found.log_marginal,
                "rounds": found.rounds,
            },
            "calibration": {"scale": scale, "shift": float(response.tensors["calibration"][outcome, 1])},
        }
        if heldout_users is not None:
            bar.begin(f"held-out {name}")
            popularity = logistic_fit(sample.simple.flatten(0, 1), sample.target.flatten(), sample.weight.flatten())
            held = fit.heldout_sample(response, heldout_users, outcome, space)
            entry["heldout"] = _score(held, found, covariates, scale, shift, popularity)
            bar.tick()
        metrics["outcomes"][name] = entry
    if sampled and heldout_users is not None:
        metrics["uniform_rate_heldout"] = fit.uniform_rate(response, heldout_users)
    metrics["uniform_rate"] = fit.uniform_rate(response, rows.users)
    metrics["seconds"] = round(time.perf_counter() - begun, 2)
    bar.close()
    return response, metrics


def _base_rate(rows: Rows, config: ResponseConfig, sampled: bool) -> float:
    if not sampled:
        return float(rows.engaged.to(torch.float64).mean())
    rate = config.base_rate
    if rate is None:
        rate = float(rows.engaged_counts.to(torch.float64).mean()) / rows.n_items
    if not 0.0 < rate < 1.0:
        raise ValueError(f"base_rate is {rate}; expected a probability inside (0, 1)")
    return rate


def _covariates(dataset: Dataset, rows: Rows) -> Tensor:
    """x_u = (1, log activity standardised in the fold) of every user of the dataset; float64 (n_users, 2)."""
    activity = torch.log1p(dataset.engaged_counts().to(torch.float64))
    own = activity[rows.users]
    spread = own.std(unbiased=False)
    standardised = (activity - own.mean()) / spread if float(spread) > 1e-6 else torch.zeros_like(activity)
    return torch.stack([torch.ones_like(standardised), standardised], dim=1)


@dataclass
class _Fit:
    """What all stages share."""

    dataset: Dataset
    rows: Rows
    config: ResponseConfig
    seed: int
    sampled: bool
    base_rate: float
    bar: _Progress

    def __post_init__(self) -> None:
        # one choice for all inner folds, so that a coefficient means the same in each
        self.categories = chosen_categories(self.dataset, self.rows, self.config.category_features)

    def out_of_fold(self) -> tuple[list[ChoiceData], list[_Sample], list[int]]:
        """Predictions of the inner folds for users that their networks have not seen, and the passes that were best."""
        config, n_outcomes = self.config, len(self.dataset.outcomes)
        folds = torch.arange(self.rows.n_users) % config.inner_folds
        folds = folds[torch.from_numpy(numpy_rng(self.seed, "inner_folds").permutation(self.rows.n_users))]
        choices: list[list[ChoiceData]] = [[] for _ in range(n_outcomes)]
        samples: list[list[_Sample]] = [[] for _ in range(n_outcomes)]
        epochs: list[int] = []
        for fold in range(config.inner_folds):
            learn, ask = self.rows.subset(folds != fold), self.rows.subset(folds == fold)
            seed = stream(self.seed, "inner", fold)
            self.bar.begin(f"inner fold {fold + 1} of {config.inner_folds}")
            space = item_space(self.dataset, learn, config, seed, self.categories)
            inputs, asked = space.inputs(learn), space.inputs(ask)
            for outcome in range(n_outcomes):
                network, best, _ = fit_network(
                    space,
                    learn,
                    inputs,
                    outcome=outcome,
                    sampled=self.sampled,
                    config=config,
                    seed=stream(seed, "outcome", outcome),
                    epochs=epochs[outcome] if fold > 0 else None,
                    validation=(ask, asked),
                    tick=self.bar.tick,
                )
                if fold == 0:
                    epochs.append(best)
                level = outcome_level(learn, outcome)
                choice, sample = self._predictions(space, network, level, ask, asked, outcome, seed)
                choices[outcome].append(choice)
                samples[outcome].append(sample)
            if fold == 0:
                later = sum(epochs) * config.inner_folds
                self.bar.expect(self.bar.done + later + 2 * n_outcomes)
        return [_cat(parts) for parts in choices], [_cat(parts) for parts in samples], epochs

    def _predictions(
        self, space: ItemSpace, network: Network, level: Tensor, ask: Rows, asked: Tensor, outcome: int, seed: int
    ) -> tuple[ChoiceData, _Sample]:
        """Choices for the random effects (all events) and a sample for the calibration (some events)."""
        config = self.config
        generator = torch_generator(seed, "predictions", outcome)
        local = torch.searchsorted(self.rows.users, ask.users)
        gate = outcome == 0 and self.sampled
        index = torch.nonzero(ask.engaged if outcome > 0 or gate else torch.ones(ask.n, dtype=torch.bool)).flatten()
        with torch.no_grad():
            if gate:
                drawn = ask.unseen_items(index, config.effect_negatives, space.q, generator)
                items = torch.cat([ask.item[index][:, None], drawn], dim=1)
                # importance of an item drawn from q: a constant in q drops out of the choice
                offset = self._chunked(lambda i, x: network.score(x, i), items, asked[index]) - space.q[items].log()
                phi = self._chunked(lambda i, x: space.features(x, i), items, asked[index])
                target = torch.zeros_like(offset)
                target[:, 0] = 1.0
                choice = ChoiceData(local[ask.user[index]], phi, offset, target, self.rows.n_users)
            else:
                own = ask.item[index][:, None]
                offset = self._chunked(lambda i, x: network.score(x, i), own, asked[index])[:, 0]
                phi = self._chunked(lambda i, x: space.features(x, i), own, asked[index])[:, 0]
                choice = ChoiceData.answers(
                    local[ask.user[index]], phi, offset, ask.outcome[index, outcome], self.rows.n_users
                )
            limit = _CALIBRATION_EVENTS // config.inner_folds
            if not gate:
                limit *= _UNIFORM_NEGATIVES
            some = index[torch.randperm(len(index), generator=generator)[:limit]]
            sample = self._sample(
                lambda i, x: network.score(x, i), space, level, ask, asked, some, outcome, gate, generator
            )
        return choice, sample

    def _sample(
        self,
        score: Callable[[Tensor, Tensor], Tensor],
        space: ItemSpace,
        level: Tensor,
        rows: Rows,
        inputs: Tensor,
        index: Tensor,
        outcome: int,
        gate: bool,
        generator: torch.Generator,
    ) -> _Sample:
        items, target = rows.item[index][:, None], rows.outcome[index, outcome][:, None]
        weight = torch.ones_like(target)
        if gate:
            uniform = torch.ones(rows.n_items)
            drawn = rows.unseen_items(index, _UNIFORM_NEGATIVES, uniform, generator)
            items = torch.cat([items, drawn], dim=1)
            target = torch.cat([torch.ones_like(target), torch.zeros(drawn.shape)], dim=1)
            odds = (1.0 - self.base_rate) / self.base_rate
            weight = torch.cat([weight, torch.full(drawn.shape, odds / _UNIFORM_NEGATIVES)], dim=1)
        columns = [torch.ones(items.shape), space.log_density[items]]
        if not gate:
            columns.append(level[items])
        return _Sample(
            rows.users[rows.user[index]],
            self._chunked(score, items, inputs[index]),
            self._chunked(lambda i, x: space.features(x, i), items, inputs[index]),
            torch.stack(columns, dim=-1),
            target,
            weight,
        )

    @staticmethod
    def _chunked(function: Callable[[Tensor, Tensor], Tensor], items: Tensor, inputs: Tensor) -> Tensor:
        pairs = zip(items.split(_CHUNK), inputs.split(_CHUNK), strict=True)
        return torch.cat([function(i, x) for i, x in pairs])

    def whole(self, epochs: list[int]) -> tuple[ItemSpace, list[Network]]:
        """Item space and networks of the whole fold."""
        self.bar.begin("whole fold")
        seed = stream(self.seed, "whole")
        space = item_space(self.dataset, self.rows, self.config, seed, self.categories)
        inputs = space.inputs(self.rows)
        networks = [
            fit_network(
                space,
                self.rows,
                inputs,
                outcome=outcome,
                sampled=self.sampled,
                config=self.config,
                seed=stream(seed, "outcome", outcome),
                epochs=epochs[outcome],
                tick=self.bar.tick,
            )[0]
            for outcome in range(len(self.dataset.outcomes))
        ]
        return space, networks

    def heldout_sample(self, response: FrozenResponse, users: Tensor, outcome: int, space: ItemSpace) -> _Sample:
        """Events of users of another fold, as the frozen judge sees them."""
        rows = Rows.of(self.dataset, users)
        inputs = prefix_inputs(response.tensors["item_input"], response.tensors["decays"], rows)
        generator = torch_generator(self.seed, "heldout", outcome)
        gate = outcome == 0 and self.sampled
        index = torch.nonzero(rows.engaged if outcome > 0 or gate else torch.ones(rows.n, dtype=torch.bool)).flatten()
        limit = _HELDOUT_EVENTS if gate else _HELDOUT_EVENTS * _UNIFORM_NEGATIVES
        index = index[torch.randperm(len(index), generator=generator)[:limit]]
        level = outcome_level(self.rows, outcome)
        return self._sample(
            lambda i, x: _frozen_score(response, x, i, outcome),
            space,
            level,
            rows,
            inputs,
            index,
            outcome,
            gate,
            generator,
        )

    def _uniform_exposures(self, response: FrozenResponse, users: Tensor) -> tuple[Tensor, Spread, Tensor]:
        """Uniformly drawn unseen items at the users' own states: gate score (n,), effects' part, weight (n,).

        Each user has the same weight, whatever the number of events.
        """
        rows = Rows.of(self.dataset, users)
        generator = torch_generator(self.seed, "uniform_exposures")
        index = torch.randperm(rows.n, generator=generator)[:_CALIBRATION_EVENTS]
        inputs = prefix_inputs(response.tensors["item_input"], response.tensors["decays"], rows)[index]
        items = rows.unseen_items(index, _UNIFORM_NEGATIVES, torch.ones(rows.n_items), generator)
        user = rows.users[rows.user[index]]
        score = self._chunked(lambda i, x: _frozen_score(response, x, i, 0), items, inputs)
        phi = self._chunked(lambda i, x: response.features(x, i), items, inputs)
        scale = response.tensors["calibration"][0, 0]
        mean, factor = response.tensors["effect_mean"][user, 0], response.tensors["effect_chol"][user, 0]
        spread = Spread.of(phi, mean * scale, factor * scale)
        share = 1.0 / torch.bincount(user, minlength=self.dataset.n_users).clamp(min=1).to(torch.float32)
        return score.flatten(), spread, share[user].repeat_interleave(items.shape[1])

    def declare_base_rate(self, response: FrozenResponse) -> FrozenResponse:
        """The same judge with the gate's shift at which a uniformly drawn unseen item is taken at the base rate."""
        score, spread, weight = self._uniform_exposures(response, self.rows.users)
        scale = float(response.tensors["calibration"][0, 0])
        shift = solve_shift(score, spread, scale, weight, self.base_rate)
        calibration = response.tensors["calibration"].clone()
        calibration[0, 1] = shift
        return FrozenResponse(
            {**response.tensors, "calibration": calibration}, response.outcomes, response.feature_names
        )

    def uniform_rate(self, response: FrozenResponse, users: Tensor) -> float:
        """Mean probability that the gate happens for a uniformly drawn unseen item; users weigh the same."""
        score, spread, weight = self._uniform_exposures(response, users)
        scale, shift = response.tensors["calibration"][0].tolist()
        p = marginal(score, spread, scale, shift)
        return float((p * weight).sum() / weight.sum())


def _frozen_score(response: FrozenResponse, inputs: Tensor, items: Tensor, outcome: int) -> Tensor:
    t = response.tensors
    tower = response.tower(inputs)[:, outcome]
    return torch.einsum("rmk,rk->rm", t["item_output"][items, outcome], tower) + t["item_bias"][items, outcome]


def _prior_spread(sample: _Sample, effects: Effects, covariates: Tensor) -> Spread:
    """Random effects of users of whom nothing but x_u is known."""
    mean = effects.prior(covariates)[sample.user].to(torch.float32)
    factor = cholesky_factor(effects.covariance).to(torch.float32)
    return Spread.of(sample.phi, mean, factor.expand(len(mean), -1, -1))


def _calibrate(sample: _Sample, effects: Effects, covariates: Tensor) -> tuple[float, float]:
    """Scale of f and shift at which predictions for unknown users (coefficients integrated out) mean what they say."""
    spread = _prior_spread(sample, effects, covariates)
    return fit_scale_and_shift(sample.score.flatten(), spread, sample.target.flatten(), sample.weight.flatten())


def _score(
    sample: _Sample,
    effects: Effects,
    covariates: Tensor,
    scale: float,
    shift: float,
    popularity: Tensor,
) -> dict[str, Any]:
    """Held-out numbers of one outcome: the judge with unknown coefficients, a popularity logistic, and the base rate."""
    spread = _prior_spread(sample, effects, covariates)
    target, weight = sample.target.flatten(), sample.weight.flatten()
    judge = marginal(sample.score.flatten(), spread, scale, shift)
    simple = torch.sigmoid(sample.simple.flatten(0, 1).to(torch.float64) @ popularity)
    observed = float((weight * target).sum(dtype=torch.float64) / weight.sum(dtype=torch.float64))
    predicted, seen, share = reliability(judge, target, weight)
    return {
        "n_events": len(sample.user),
        "n_rows": target.numel(),
        "n_users": int(torch.unique(sample.user).numel()),
        "log_loss": {
            "judge": log_loss(judge, target, weight),
            "popularity": log_loss(simple, target, weight),
            "base_rate": log_loss(torch.full_like(judge, observed), target, weight),
        },
        "calibration_slope": calibration_slope(judge, target, weight),
        "ece": expected_calibration_error(judge, target, weight),
        "rate_predicted": float((weight * judge).sum() / weight.sum()),
        "rate_observed": observed,
        "reliability": {"predicted": predicted.tolist(), "observed": seen.tolist(), "share": share.tolist()},
    }


def _freeze(
    dataset: Dataset,
    rows: Rows,
    space: ItemSpace,
    networks: list[Network],
    effects: list[Effects],
    calibration: list[tuple[float, float]],
    covariates: Tensor,
    feature_names: tuple[str, ...],
) -> FrozenResponse:
    """All parts in the tables of `FrozenResponse`; each outcome has its own block of hidden units."""
    n_outcomes, rank = len(networks), networks[0].vector.shape[1]
    widths = [len(network.hidden_bias) for network in networks]
    tower_weight = torch.zeros(n_outcomes * rank, sum(widths))
    at = 0
    for outcome, (network, width) in enumerate(zip(networks, widths, strict=True)):
        tower_weight[outcome * rank : (outcome + 1) * rank, at : at + width] = network.tower_weight
        at += width
    n_features = len(feature_names)
    mean = torch.zeros(dataset.n_users, n_outcomes, n_features)
    factor = torch.zeros(dataset.n_users, n_outcomes, n_features, n_features)
    for outcome, (found, (scale, _)) in enumerate(zip(effects, calibration, strict=True)):
        # the frozen logit is scale * (f + z . phi) + shift, the fitted one scale * f + z . phi + shift
        mean[:, outcome] = found.prior(covariates).to(torch.float32) / scale
        factor[:, outcome] = cholesky_factor(found.covariance).to(torch.float32) / scale
        mean[rows.users, outcome] = found.mean.to(torch.float32) / scale
        factor[rows.users, outcome] = cholesky_factor(found.posterior).to(torch.float32) / scale
    tensors = {
        "item_input": space.item_input,
        "decays": space.decays,
        "hidden_weight": torch.cat([network.hidden_weight for network in networks]),
        "hidden_bias": torch.cat([network.hidden_bias for network in networks]),
        "tower_weight": tower_weight,
        "tower_bias": torch.cat([network.tower_bias for network in networks]),
        "item_output": torch.stack([network.vector for network in networks], dim=1),
        "item_bias": torch.stack([network.bias for network in networks], dim=1),
        "calibration": torch.tensor(calibration, dtype=torch.float32),
        "static_features": space.static_features,
        "dynamic_scale": space.dynamic_scale,
        "effect_mean": mean,
        "effect_chol": factor,
        "pair_sd": torch.zeros(n_outcomes),
        "position_logit": torch.zeros(MAX_SLATE),
        "leaving": torch.tensor([float("-inf"), 0.0]),
    }
    return FrozenResponse(tensors, tuple(dataset.outcomes), feature_names)
