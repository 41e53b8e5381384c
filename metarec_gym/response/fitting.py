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
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarec_gym.response.baselines import Factorization
from metarec_gym.response.calibration import (
    Spread,
    calibration_slope,
    expected_calibration_error,
    fit_pair_sd,
    fit_scale_and_shift,
    log_loss,
    logistic_fit,
    marginal,
    reliability,
    solve_shift,
)
from metarec_gym.response.config import ResponseConfig, inner_folds_of
from metarec_gym.response.effects import ChoiceData, Effects, cholesky_factor, fit_effects
from metarec_gym.response.frozen import DYNAMIC_FEATURES, FrozenResponse, untimed
from metarec_gym.response.item_space import STATIC_FEATURES, ItemSpace, chosen_categories, item_space, prefix_inputs
from metarec_gym.response.network import Network, fit_network, outcome_level, shown_logit
from metarec_gym.response.rows import MAX_SLATE, Rows
from metarec_gym.response.stacking import Stack, fit_stack
from metarec_gym.seeding import numpy_rng, stream, torch_generator

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

_CALIBRATION_EVENTS = 8_000
_HELDOUT_EVENTS = 12_000
_UNIFORM_NEGATIVES = 16
_CHUNK = 2_048
_EFFECT_PAIRS = 4_000_000
"""Most (event, alternative) pairs in the fit of the random effects: a large log needs fewer negatives an event."""
_FEWEST_SHOWN = 200
"""Rows at a position below which its effect is that of the first position."""
_FEWEST_AGAIN = 300
"""(user, item) pairs met again below which eps_user,item is 0."""
_WEIGHT_SHAPE = 4.0
"""Shape of the gamma weights of users that a further member is fitted with. 1 is the Bayesian bootstrap, but a network with half
the effective users is worse by more than members differ: on MovieLens-100K two members then predict worse than one."""
_SURE = 3.84 / 2
"""Gain of log-likelihood from which a parameter is taken to differ from 0 (5 %)."""


@dataclass(frozen=True)
class _Sample:
    """Events of users the network has not seen, each with some items: what calibration and scoring read."""

    user: Tensor
    """int64 (n,): index of the user in the dataset."""
    score: Tensor
    """float32 (n, m, n_members): f, without random effects."""
    phi: Tensor
    """float32 (n, m, n_features)."""
    simple: Tensor
    """float32 (n, m, k): what the popularity baseline reads."""
    factors: Tensor
    """float32 (n, m, k): what the matrix factorisation reads besides."""
    target: Tensor
    """float32 (n, m)."""
    weight: Tensor
    """float32 (n, m): sampled negatives have the weight that makes the positives' share the base rate."""
    pair: Tensor
    """int64 (n, 1): number of the event's own (user, item) pair, -1 where the user had taken the item before."""
    position: Tensor
    """int64 (n, 1): place in the slate, 0 where it is not known."""
    exposure: Tensor
    """float32 (n, 1): exposure to the item's categories."""


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
    fit = _Fit.of(dataset, users, config, seed, members, progress, device)
    rows, bar, names = fit.rows, fit.bar, dataset.outcomes
    choices, samples, epochs = fit.out_of_fold()
    covariates = _covariates(dataset, rows)
    parts: list[_Part] = []
    for outcome, name in enumerate(names):
        bar.begin(f"random effects of {name}")
        free = torch.ones(choices[outcome].phi.shape[2], dtype=torch.bool)
        # a rate of the user's own would need the items that were shown and not taken
        free[0] = not (fit.sampled and outcome == 0)
        choice, sample, stack = choices[outcome], samples[outcome], None
        if fit.rare(outcome):
            choice, sample, stack = _stacked(sample, rows)
        choice = choice.to(device)
        effects = fit_effects(choice, covariates[rows.users], free=free, rounds=config.effect_rounds).to("cpu")
        parts.append(_calibrated(sample, effects, covariates, rows, outcome == 0 and not fit.sampled, stack))
        bar.tick()
    space, networks = fit.whole(epochs)
    networks = fit.stacked(networks, space, [part.stack for part in parts])
    response = fit.levelled(_freeze(dataset, rows, space, networks, parts, covariates, fit.feature_names))
    metrics = fit.description(epochs)
    for outcome, name in enumerate(names):
        entry = _describe(parts[outcome], response, outcome)
        if heldout_users is not None:
            bar.begin(f"held-out {name}")
            baselines = _fit_baselines(samples[outcome])
            held = fit.heldout_sample(response, heldout_users, outcome, space)
            entry["baselines"] = {kind: beta.tolist() for kind, beta in baselines.items()}
            entry["heldout"] = _score(
                held, parts[outcome], covariates, _heldout_calibration(entry, response, outcome), baselines
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
        device: As in `fit_response`; that of `base`, whose item vectors are compared to the last bit.

    Returns:
        As `fit_response`.

    Raises:
        ValueError: When the item vectors are not those of `base`: another seed, other users or other settings.
    """
    begun = time.perf_counter()
    fit = _Fit.of(dataset, users, config, seed, members or base.n_members, progress, device, stages=1)
    covariates = _covariates(dataset, fit.rows)
    space, networks = fit.whole([int(base_metrics["epochs"][name]) for name in dataset.outcomes])
    if not torch.equal(space.item_input, base.tensors["item_input"]) or fit.feature_names != base.feature_names:
        raise ValueError(
            "the variant's item vectors are not those of its base judge; expected the same users, seed and settings but for "
            "the sampler: fit it with fit_response instead"
        )
    stacks = [_Part.described(base_metrics["outcomes"][name]).stack for name in dataset.outcomes]
    networks = fit.stacked(networks, space, stacks)
    tensors = dict(base.tensors) | _network_tensors(networks)
    tensors["calibration"] = base.tensors["calibration"][:1].expand(fit.members, -1, -1)
    response = fit.levelled(FrozenResponse(tensors, base.outcomes, base.feature_names))
    metrics = fit.description([int(base_metrics["epochs"][name]) for name in dataset.outcomes])
    for outcome, name in enumerate(dataset.outcomes):
        known = base_metrics["outcomes"][name]
        part = _Part.described(known)
        entry = _describe(part, response, outcome)
        entry["effects"] = known["effects"]
        if heldout_users is not None:
            fit.bar.begin(f"held-out {name}")
            baselines = {k: torch.tensor(beta, dtype=torch.float64) for k, beta in known["baselines"].items()}
            held = fit.heldout_sample(response, heldout_users, outcome, space)
            entry["baselines"] = known["baselines"]
            entry["heldout"] = _score(held, part, covariates, _heldout_calibration(entry, response, outcome), baselines)
            fit.bar.tick()
        metrics["outcomes"][name] = entry
    fit.finish(metrics, response, heldout_users, begun)
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
    members: int
    sampled: bool
    base_rate: float
    bar: _Progress
    device: torch.device | str
    """Where networks are fitted; `rows` are on the CPU."""
    _factorization: Factorization | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        users: Tensor,
        config: ResponseConfig,
        seed: int,
        members: int,
        progress: bool | Callable[[str, int, int], None],
        device: torch.device | str,
        *,
        stages: int | None = None,
    ) -> _Fit:
        """Checks that the fold can be fitted; `stages` = fits of the whole fold's size, for the bar."""
        rows = Rows.of(dataset, users)
        if members < 1:
            raise ValueError(f"a judge of {members} members cannot answer; expected 1 or more")
        inner_folds = inner_folds_of(config, rows.n_users)
        if rows.n_users < 2 * inner_folds or int(rows.engaged.sum()) < 50:
            raise ValueError(
                f"{rows.n_users} users with {int(rows.engaged.sum())} engaged events are too few for a judge; "
                f"expected at least {2 * inner_folds} users and 50 events: use a larger log or larger fold shares"
            )
        sampled = not dataset.has_impressions
        fits = members + (inner_folds if stages is None else 0)
        bar = _Progress(progress, fits * dataset.outcome.shape[1] * 8)
        return cls(dataset, rows, config, seed, members, sampled, _base_rate(rows, config, sampled), bar, device)

    def __post_init__(self) -> None:
        # one choice for all inner folds, so that a coefficient means the same in each
        self.categories = chosen_categories(self.dataset, self.rows, self.config.category_features)
        self.inner_folds = inner_folds_of(self.config, self.rows.n_users)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of phi."""
        categories = (f"category: {self.dataset.category_names[int(c)]}" for c in self.categories)
        return (*STATIC_FEATURES, *categories, *DYNAMIC_FEATURES)

    def rare(self, outcome: int) -> bool:
        """Whether a later outcome has too few positives for a network of its own to be trusted alone."""
        positives = float(self.rows.outcome[self.rows.engaged, outcome].sum())
        return outcome > 0 and positives < self.config.rare_positives_per_item * self.rows.n_items

    def stacked(
        self, networks: list[list[Network]], space: ItemSpace, stacks: list[Stack | None]
    ) -> list[list[Network]]:
        """Networks of (member, outcome), the rare outcomes' ones replaced by what their stacks make of them."""
        levels = [None if s is None else outcome_level(self.rows, outcome) for outcome, s in enumerate(stacks)]
        return [
            [
                network if stack is None or level is None else stack.network_of(network, space.log_density, level)
                for network, stack, level in zip(own, stacks, levels, strict=True)
            ]
            for own in networks
        ]

    def description(self, epochs: list[int]) -> dict[str, Any]:
        """The metrics' head."""
        return {
            "family": self.config.family,
            "sampler": self.config.sampler,
            "members": self.members,
            "n_users": self.rows.n_users,
            "n_rows": self.rows.n,
            "sampled_negatives": self.sampled,
            "base_rate": self.base_rate,
            "epochs": dict(zip(self.dataset.outcomes, epochs, strict=True)),
            "outcomes": {},
        }

    def finish(
        self, metrics: dict[str, Any], response: FrozenResponse, heldout_users: Tensor | None, begun: float
    ) -> None:
        """The metrics' tail."""
        if self.sampled and heldout_users is not None:
            metrics["uniform_rate_heldout"] = self.uniform_rate(response, heldout_users)
        metrics["uniform_rate"] = self.uniform_rate(response, self.rows.users)
        metrics["seconds"] = round(time.perf_counter() - begun, 2)
        self.bar.close()

    def out_of_fold(self) -> tuple[list[ChoiceData], list[_Sample], list[int]]:
        """Predictions of the inner folds for users that their networks have not seen, and the passes that were best."""
        config, n_outcomes = self.config, len(self.dataset.outcomes)
        folds = torch.arange(self.rows.n_users) % self.inner_folds
        folds = folds[torch.from_numpy(numpy_rng(self.seed, "inner_folds").permutation(self.rows.n_users))]
        choices: list[list[ChoiceData]] = [[] for _ in range(n_outcomes)]
        samples: list[list[_Sample]] = [[] for _ in range(n_outcomes)]
        epochs: list[int] = []
        for fold in range(self.inner_folds):
            learn, ask = self.rows.subset(folds != fold), self.rows.subset(folds == fold)
            seed = stream(self.seed, "inner", fold)
            self.bar.begin(f"inner fold {fold + 1} of {self.inner_folds}")
            space = item_space(self.dataset, learn, config, seed, self.categories)
            factorization = Factorization.fit(learn, seed)
            far = _Far.of(space, learn, ask, self.device)
            for outcome in range(n_outcomes):
                network, best, _ = fit_network(
                    far.space,
                    far.learn,
                    far.inputs,
                    outcome=outcome,
                    sampled=self.sampled,
                    config=config,
                    seed=stream(seed, "outcome", outcome),
                    epochs=epochs[outcome] if fold > 0 else None,
                    validation=(far.ask, far.asked),
                    tick=self.bar.tick,
                )
                if fold == 0:
                    epochs.append(best)
                choice, sample = self._predictions(far, space, network, factorization, learn, ask, outcome, seed)
                choices[outcome].append(choice)
                samples[outcome].append(sample)
            if fold == 0:
                later = sum(epochs) * (self.inner_folds - 1 + self.members)
                self.bar.expect(self.bar.done + later + 2 * n_outcomes)
        return [_cat(parts) for parts in choices], [_cat(parts) for parts in samples], epochs

    def _predictions(
        self,
        far: _Far,
        space: ItemSpace,
        network: Network,
        factorization: Factorization,
        learn: Rows,
        ask: Rows,
        outcome: int,
        seed: int,
    ) -> tuple[ChoiceData, _Sample]:
        """Choices for the random effects (all events, on the device) and a sample for the calibration (some events, here)."""
        config = self.config
        generator = torch_generator(seed, "predictions", outcome)
        local = torch.searchsorted(self.rows.users, ask.users).to(self.device)
        gate = outcome == 0 and self.sampled
        index = _usable(ask, outcome, gate)
        with torch.no_grad():
            rows, at = far.ask, index.to(self.device)
            inputs, period = far.asked[at], rows.period[at]
            if gate:
                affordable = _EFFECT_PAIRS // max(int(self.rows.engaged.sum()), 1)
                drawn = rows.unseen_items(at, min(config.effect_negatives, max(affordable, 8)), far.space.q, generator)
                items = torch.cat([rows.item[at][:, None], drawn], dim=1)
                # importance of an item drawn from q: a constant in q drops out of the choice
                offset = _chunked(network.score, inputs, items) - far.space.q[items].log()
                phi = _chunked(far.space.features, inputs, items, period)
                target = torch.zeros_like(offset)
                target[:, 0] = 1.0
                choice = ChoiceData(local[rows.user[at]], phi, offset, target, self.rows.n_users)
            else:
                own = rows.item[at][:, None]
                offset = _chunked(network.score, inputs, own)[:, 0]
                offset = offset + shown_logit(network.shown, rows.position[at], rows.exposure[at])
                phi = _chunked(far.space.features, inputs, own, period)[:, 0]
                choice = ChoiceData.answers(
                    local[rows.user[at]], phi, offset, rows.outcome[at, outcome], self.rows.n_users
                )
            limit = _CALIBRATION_EVENTS // self.inner_folds
            if not gate:
                limit *= _UNIFORM_NEGATIVES
            some = index[torch.randperm(len(index), generator=generator)[:limit]]
            answers = None if gate else factorization.answers(learn, outcome)
            sample = self._sample(
                [network.to("cpu").score],
                space,
                outcome_level(learn, outcome),
                (factorization, answers),
                ask,
                far.asked[some.to(self.device)].cpu(),
                some,
                outcome,
                generator,
            )
        return choice, sample

    def _sample(
        self,
        scores: list[Callable[[Tensor, Tensor], Tensor]],
        space: ItemSpace,
        level: Tensor,
        factors: tuple[Factorization, Tensor | None],
        rows: Rows,
        inputs: Tensor,
        index: Tensor,
        outcome: int,
        generator: torch.Generator,
    ) -> _Sample:
        """The events `index` of `rows` as members (`scores`) and baselines see them; `inputs` are the states before them."""
        items, target = rows.item[index][:, None], rows.outcome[index, outcome][:, None]
        weight = torch.ones_like(target)
        gate = outcome == 0 and self.sampled
        again = rows.seen(rows.user[index], rows.rank[index], items)
        pair = torch.where(again, -1, rows.users[rows.user[index]][:, None] * rows.n_items + items)
        position, exposure = rows.position[index][:, None], rows.exposure[index][:, None]
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
        factorization, answers = factors
        user = factorization.users(rows, index)
        item = factorization.factors if answers is None else answers
        product = torch.cat(
            [
                torch.einsum("rk,rmk->rm", u, item[i])
                for u, i in zip(user.split(_CHUNK), items.split(_CHUNK), strict=True)
            ]
        )
        # the reconstruction of a taken item is near 1 and of the others near 0: its logarithm is the better predictor
        factor = [product, product.clamp(min=1e-3).log()] if answers is None else [product]
        return _Sample(
            user=rows.users[rows.user[index]],
            score=torch.stack([_chunked(score, inputs, items) for score in scores], dim=-1),
            phi=_chunked(space.features, inputs, items, rows.period[index]),
            simple=torch.stack(columns, dim=-1),
            factors=torch.stack(factor, dim=-1).to(torch.float32),
            target=target,
            weight=weight,
            pair=pair,
            position=position,
            exposure=exposure,
        )

    def whole(self, epochs: list[int]) -> tuple[ItemSpace, list[list[Network]]]:
        """Item space, and each member's networks, of the whole fold."""
        seed = stream(self.seed, "whole")
        space = item_space(self.dataset, self.rows, self.config, seed, self.categories)
        far_space, far_rows = space.to(self.device), self.rows.to(self.device)
        inputs = far_space.inputs(far_rows)
        networks: list[list[Network]] = []
        for member in range(self.members):
            self.bar.begin("whole fold" if member == 0 else f"whole fold, member {member + 1} of {self.members}")
            own = seed if member == 0 else stream(seed, "member", member)
            weight = None
            if member > 0:
                draws = numpy_rng(own, "user_weight").gamma(_WEIGHT_SHAPE, size=self.rows.n_users)
                weight = torch.from_numpy(draws / draws.mean()).to(torch.float32).to(self.device)
            networks.append(
                [
                    fit_network(
                        far_space,
                        far_rows,
                        inputs,
                        outcome=outcome,
                        sampled=self.sampled,
                        config=self.config,
                        seed=stream(own, "outcome", outcome),
                        epochs=epochs[outcome],
                        user_weight=weight,
                        tick=self.bar.tick,
                    )[0].to("cpu")
                    for outcome in range(len(self.dataset.outcomes))
                ]
            )
        return space, networks

    def heldout_sample(self, response: FrozenResponse, users: Tensor, outcome: int, space: ItemSpace) -> _Sample:
        """Events of users of another fold, as the frozen judge sees them."""
        rows = Rows.of(self.dataset, users)
        generator = torch_generator(self.seed, "heldout", outcome)
        gate = outcome == 0 and self.sampled
        index = _usable(rows, outcome, gate)
        limit = _HELDOUT_EVENTS if gate else _HELDOUT_EVENTS * _UNIFORM_NEGATIVES
        index = index[torch.randperm(len(index), generator=generator)[:limit]]
        if self._factorization is None:
            self._factorization = Factorization.fit(self.rows, stream(self.seed, "whole"))
        factorization = self._factorization
        return self._sample(
            [_frozen_score(response, outcome, member) for member in range(self.members)],
            space,
            outcome_level(self.rows, outcome),
            (factorization, None if gate else factorization.answers(self.rows, outcome)),
            rows,
            self._states(response, rows, index),
            index,
            outcome,
            generator,
        )

    def _states(self, response: FrozenResponse, rows: Rows, index: Tensor) -> Tensor:
        """What the judge reads at the rows `index`: computed on the device, where the recurrence is fast, and brought here."""
        item_input, decays = (response.tensors[name].to(self.device) for name in ("item_input", "decays"))
        return prefix_inputs(item_input, decays, rows.to(self.device))[index.to(self.device)].cpu()

    def _exposures(self, response: FrozenResponse, users: Tensor, outcome: int) -> tuple[list[Tensor], Spread, Tensor]:
        """Items at the users' own states: each member's score (n,), effects' part, weight (n,).

        A sampled gate: uniformly drawn unseen items, each user with the same weight whatever the number of events. Another
        outcome: the log's own rows.
        """
        rows = Rows.of(self.dataset, users)
        gate = outcome == 0 and self.sampled
        generator = torch_generator(self.seed, "uniform_exposures" if gate else "own_exposures", outcome)
        usable = torch.arange(rows.n) if gate else _usable(rows, outcome, gate)
        limit = _CALIBRATION_EVENTS if gate else _CALIBRATION_EVENTS * _UNIFORM_NEGATIVES
        index = usable[torch.randperm(len(usable), generator=generator)[:limit]]
        inputs = self._states(response, rows, index)
        user = rows.users[rows.user[index]]
        if gate:
            items = rows.unseen_items(index, _UNIFORM_NEGATIVES, torch.ones(rows.n_items), generator)
            share = 1.0 / torch.bincount(user, minlength=self.dataset.n_users).clamp(min=1).to(torch.float32)
            weight = share[user].repeat_interleave(items.shape[1])
        else:
            items, weight = rows.item[index][:, None], torch.ones(len(index))
        scores = [
            _chunked(_frozen_score(response, outcome, member), inputs, items).flatten()
            for member in range(response.n_members)
        ]
        phi = _chunked(response.features, inputs, items, rows.period[index])
        t = response.tensors
        # one scale for all members: the users' coefficients are shared
        scale = t["calibration"][0, outcome, 0]
        mean, factor = t["effect_mean"][user, outcome], t["effect_chol"][user, outcome]
        spread = Spread.of(phi, mean * scale, factor * scale).widened(float(scale * t["pair_sd"][outcome]))
        if outcome == 0 and not gate:
            shown = torch.cat([t["position_logit"][1:], t["fatigue"]])
            spread = spread.moved(shown_logit(shown, rows.position[index], rows.exposure[index]))
        return scores, spread, weight

    def levelled(self, response: FrozenResponse) -> FrozenResponse:
        """The same judge with shifts at which every member means the same rate.

        The gate of a positives-only log: a uniformly drawn unseen item is taken at the base rate. Another outcome: the first
        member's rate on the fold's own rows.
        """
        calibration = response.tensors["calibration"].clone()
        for outcome in range(response.n_outcomes):
            gate = outcome == 0 and self.sampled
            if not gate and response.n_members == 1:
                continue
            scores, spread, weight = self._exposures(response, self.rows.users, outcome)
            scale, shift = calibration[0, outcome].tolist()
            rate = self.base_rate if gate else _mean(marginal(scores[0], spread, scale, shift), weight)
            for member in range(0 if gate else 1, response.n_members):
                calibration[member, outcome, 1] = solve_shift(scores[member], spread, scale, weight, rate)
        return response.replaced(calibration=calibration)

    def uniform_rate(self, response: FrozenResponse, users: Tensor) -> float:
        """Mean probability that the gate happens for a uniformly drawn unseen item; users weigh the same, members too.

        With impressions: for the log's own rows.
        """
        scores, spread, weight = self._exposures(response, users, 0)
        calibration = response.tensors["calibration"][:, 0].tolist()
        rates = [_mean(marginal(score, spread, *pair), weight) for score, pair in zip(scores, calibration, strict=True)]
        return sum(rates) / len(rates)


@dataclass(frozen=True)
class _Far:
    """What an inner fold's networks are fitted and asked with, on the device of the fit."""

    space: ItemSpace
    learn: Rows
    inputs: Tensor
    """float32 (learn.n, state_dim)."""
    ask: Rows
    asked: Tensor
    """float32 (ask.n, state_dim)."""

    @classmethod
    def of(cls, space: ItemSpace, learn: Rows, ask: Rows, device: torch.device | str) -> _Far:
        space, learn, ask = space.to(device), learn.to(device), ask.to(device)
        return cls(space, learn, space.inputs(learn), ask, space.inputs(ask))


def _usable(rows: Rows, outcome: int, gate: bool) -> Tensor:
    """Rows that answer an outcome; `gate` = the gate of a positives-only log. int64 (n,)."""
    return torch.nonzero(rows.engaged if outcome > 0 or gate else torch.ones(rows.n, dtype=torch.bool)).flatten()


def _mean(p: Tensor, weight: Tensor) -> float:
    return float((p * weight).sum() / weight.sum(dtype=torch.float64))


def _chunked(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """`function` of some rows at a time."""
    return torch.cat([function(*part) for part in zip(*(x.split(_CHUNK) for x in arguments), strict=True)])


def _frozen_score(response: FrozenResponse, outcome: int, member: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The score f of a member as a function of inputs (rows, state_dim) and items (rows, m) -> (rows, m)."""
    vector = response.tensors["item_output"][member, :, outcome]
    bias = response.tensors["item_bias"][member, :, outcome]

    def score(inputs: Tensor, items: Tensor) -> Tensor:
        return torch.einsum("rmk,rk->rm", vector[items], response.tower(inputs, member)[:, outcome]) + bias[items]

    return score


@dataclass(frozen=True)
class _Part:
    """What the inner folds say of one outcome."""

    effects: Effects
    scale: float
    shift: float
    pair_sd: float
    """Standard deviation of eps_user,item in logits."""
    shown: Tensor
    """float32 (MAX_SLATE,): effects of positions 1, 2, ... and of exposure, in logits."""
    notes: dict[str, Any]
    stack: Stack | None = None
    """How the score of a rare outcome is made; None = it is the network's."""

    @classmethod
    def described(cls, entry: Mapping[str, Any]) -> _Part:
        """From the metrics of a fitted judge; without the users' own posteriors."""
        found, calibration = entry["effects"], entry["calibration"]
        weight = torch.tensor([found["mean"], found["mean_per_sd_log_activity"]], dtype=torch.float64).T
        covariance = torch.tensor(found["covariance"], dtype=torch.float64)
        none = torch.zeros(0, len(weight), dtype=torch.float64)
        effects = Effects(
            weight, covariance, none, none[..., None] * none[:, None], found["log_marginal"], found["rounds"]
        )
        return cls(
            effects,
            calibration["scale"],
            calibration["inner_shift"],
            calibration["pair_sd"],
            torch.tensor(calibration["shown"]),
            dict(calibration["notes"]),
            Stack(**calibration["stack"]) if calibration.get("stack") else None,
        )


def _describe(part: _Part, response: FrozenResponse, outcome: int) -> dict[str, Any]:
    effects = part.effects
    return {
        "effects": {
            "features": list(response.feature_names),
            "sd": effects.covariance.diagonal().sqrt().tolist(),
            "covariance": effects.covariance.tolist(),
            "mean": effects.weight[:, 0].tolist(),
            "mean_per_sd_log_activity": effects.weight[:, 1].tolist(),
            "log_marginal": effects.log_marginal,
            "rounds": effects.rounds,
        },
        "calibration": {
            "scale": part.scale,
            "shift": float(response.tensors["calibration"][0, outcome, 1]),
            "member_shifts": response.tensors["calibration"][:, outcome, 1].tolist(),
            "inner_shift": part.shift,
            "pair_sd": part.pair_sd,
            "shown": part.shown.tolist(),
            "notes": part.notes,
            **({} if part.stack is None else {"stack": part.stack.to_json()}),
        },
    }


def _prior_spread(sample: _Sample, part: _Part, covariates: Tensor) -> Spread:
    """Random effects of users of whom nothing but x_u is known, at the place where the item was shown."""
    mean = part.effects.prior(covariates)[sample.user].to(torch.float32)
    factor = cholesky_factor(part.effects.covariance).to(torch.float32)
    spread = Spread.of(sample.phi, mean, factor.expand(len(mean), -1, -1)).widened(part.pair_sd)
    if not bool(part.shown.any()):
        return spread
    return spread.moved(shown_logit(part.shown, sample.position.flatten(), sample.exposure.flatten()))


def _stacked(sample: _Sample, rows: Rows) -> tuple[ChoiceData, _Sample, Stack]:
    """A rare outcome's sample and choices with the stacked score in the place of the network's."""
    user, target = torch.searchsorted(rows.users, sample.user), sample.target[:, 0]
    stack = fit_stack(sample.score[:, 0, 0], sample.simple[:, 0], target, user)
    score = stack.score(sample.score[..., 0], sample.simple)
    choice = ChoiceData.answers(user, sample.phi[:, 0], score[:, 0], target, rows.n_users)
    return choice, replace(sample, score=score[..., None]), stack


def _calibrated(
    sample: _Sample, effects: Effects, covariates: Tensor, rows: Rows, impressions: bool, stack: Stack | None
) -> _Part:
    """Place, fatigue, pair effects (the gate of a log with impressions), then scale and shift of f.

    At these, predictions for unknown users (coefficients integrated out) mean what they say. A stacked score has its scale
    already: only the level is fitted, because a second slope from the same few positives is noise.
    """
    shown, notes, pair_sd = torch.zeros(MAX_SLATE), dict[str, Any](), 0.0
    if impressions:
        local = torch.searchsorted(rows.users, sample.user)
        taste = torch.einsum("nmf,nf->nm", sample.phi, effects.mean[local].to(torch.float32)).flatten()
        shown, logit, notes = _fit_shown(sample, taste)
        pair_sd, growth, notes["pair_sd"] = _fit_pair(sample, logit)
        # effects estimated with eps averaged out are flatter than those next to it
        shown = shown * growth
    part = _Part(effects, 1.0, 0.0, pair_sd, shown, notes)
    spread = _prior_spread(sample, part, covariates)
    score, target, weight = sample.score[..., 0].flatten(), sample.target.flatten(), sample.weight.flatten()
    if stack is not None:
        shift = solve_shift(score, spread, 1.0, weight, min(max(_mean(target, weight), 1e-6), 1.0 - 1e-6))
        return _Part(effects, 1.0, shift, pair_sd, shown, notes, stack)
    scale, shift = fit_scale_and_shift(score, spread, target, weight)
    return _Part(effects, scale, shift, pair_sd, shown, notes)


def _fit_shown(sample: _Sample, taste: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Effects of place and exposure by logistic regression next to f, with the users' own taste as offset.

    Returns:
        `_Part.shown`, the logit of every row, and what was found: gain of log-likelihood and whether it is beyond chance.
    """
    from scipy.stats import chi2

    position, exposure, target = sample.position.flatten(), sample.exposure.flatten(), sample.target.flatten()
    weight = sample.weight.flatten()
    counts = torch.bincount(position, minlength=MAX_SLATE)
    places = [int(p) for p in torch.nonzero(counts >= _FEWEST_SHOWN).flatten() if p > 0]
    blocks = {}
    if places and int(counts[0]) >= _FEWEST_SHOWN:
        blocks["position"] = torch.stack([(position == p).to(torch.float64) for p in places], dim=1)
    if float(exposure.std(unbiased=False)) > 1e-6:
        blocks["fatigue"] = exposure[:, None].to(torch.float64)
    base = torch.stack([torch.ones_like(taste), sample.score[..., 0].flatten()], dim=1).to(torch.float64)

    def fitted(names: list[str]) -> tuple[Tensor, Tensor, float]:
        x = torch.cat([base, *(blocks[name] for name in names)], dim=1)
        beta = logistic_fit(x, target, weight, offset=taste)
        logit = x @ beta + taste
        return beta, logit, -log_loss(torch.sigmoid(logit), target, weight) * len(target)

    notes: dict[str, Any] = {}
    kept, whole = list(blocks), fitted(list(blocks))[2]
    for name, block in blocks.items():
        gain = whole - fitted([other for other in blocks if other != name])[2]
        identified = gain > 0.5 * float(chi2.ppf(0.95, block.shape[1]))
        notes[name] = {"log_likelihood_gain": gain, "identified": identified}
        if not identified:
            kept.remove(name)
    beta, logit, _ = fitted(kept)
    shown, at = torch.zeros(MAX_SLATE), base.shape[1]
    if "position" in kept:
        shown[torch.tensor(places) - 1] = beta[at : at + len(places)].to(torch.float32)
        at += len(places)
    if "fatigue" in kept:
        shown[-1] = float(beta[at])
    return shown, logit.to(torch.float32), notes


def _fit_pair(sample: _Sample, logit: Tensor) -> tuple[float, float, dict[str, Any]]:
    """Standard deviation of eps_user,item from items that a user met again before taking them; 0 where there are few.

    Returns:
        It, the factor by which the other effects grow next to it, and what was found.
    """
    pair, fresh = sample.pair.flatten(), sample.pair.flatten() >= 0
    again = int((torch.unique(pair[fresh], return_counts=True)[1] > 1).sum())
    if again < _FEWEST_AGAIN:
        return 0.0, 1.0, {"pairs_met_again": again, "identified": False}
    sd, gain, growth = fit_pair_sd(logit[fresh], sample.target.flatten()[fresh], pair[fresh])
    identified = gain > _SURE
    notes = {"pairs_met_again": again, "log_likelihood_gain": gain, "identified": identified}
    return (sd, growth, notes) if identified else (0.0, 1.0, notes)


def _fit_baselines(sample: _Sample) -> dict[str, Tensor]:
    """Coefficients of the popularity logistic and of matrix factorisation next to it, on users that neither had seen."""
    target, weight = sample.target.flatten(), sample.weight.flatten()
    both = torch.cat([sample.simple, sample.factors], dim=-1)
    return {
        "popularity": logistic_fit(sample.simple.flatten(0, 1), target, weight),
        "mf": logistic_fit(both.flatten(0, 1), target, weight),
    }


def _heldout_calibration(entry: Mapping[str, Any], response: FrozenResponse, outcome: int) -> list[tuple[float, float]]:
    """Scale and shift of each member on the population of the held-out sample.

    Its positives' share is that of the inner folds' sample, where the gate's declared base rate is another population's: the
    members' differences are kept, the level is the inner folds'.
    """
    scale, level = entry["calibration"]["scale"], entry["calibration"]["inner_shift"]
    shifts = response.tensors["calibration"][:, outcome, 1].tolist()
    return [(scale, level + shift - shifts[0]) for shift in shifts]


def _score(
    sample: _Sample,
    part: _Part,
    covariates: Tensor,
    calibration: list[tuple[float, float]],
    baselines: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Held-out numbers of one outcome: the judge with unknown coefficients, averaged over members, and the baselines."""
    spread = _prior_spread(sample, part, covariates)
    target, weight = sample.target.flatten(), sample.weight.flatten()
    members = torch.stack(
        [
            marginal(sample.score[..., member].flatten(), spread, scale, shift)
            for member, (scale, shift) in enumerate(calibration)
        ]
    )
    judge = members.mean(dim=0)
    both = torch.cat([sample.simple, sample.factors], dim=-1).flatten(0, 1).to(torch.float64)
    simple = torch.sigmoid(sample.simple.flatten(0, 1).to(torch.float64) @ baselines["popularity"])
    observed = float((weight * target).sum(dtype=torch.float64) / weight.sum(dtype=torch.float64))
    predicted, seen, share = reliability(judge, target, weight)
    return {
        "n_events": len(sample.user),
        "n_rows": target.numel(),
        "n_users": int(torch.unique(sample.user).numel()),
        "log_loss": {
            "judge": log_loss(judge, target, weight),
            "mf": log_loss(torch.sigmoid(both @ baselines["mf"]), target, weight),
            "popularity": log_loss(simple, target, weight),
            "base_rate": log_loss(torch.full_like(judge, observed), target, weight),
        },
        "log_loss_members": [log_loss(p, target, weight) for p in members],
        # standard deviation between members over the mean, averaged over rows
        "member_disagreement": _mean(members.std(dim=0, unbiased=False) / judge.clamp(min=1e-12), weight),
        "calibration_slope": calibration_slope(judge, target, weight),
        "ece": expected_calibration_error(judge, target, weight),
        "rate_predicted": _mean(judge, weight),
        "rate_observed": observed,
        "reliability": {"predicted": predicted.tolist(), "observed": seen.tolist(), "share": share.tolist()},
    }


def _network_tensors(networks: list[list[Network]]) -> dict[str, Tensor]:
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


def _freeze(
    dataset: Dataset,
    rows: Rows,
    space: ItemSpace,
    networks: list[list[Network]],
    parts: list[_Part],
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
    tensors = _network_tensors(networks) | {
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
