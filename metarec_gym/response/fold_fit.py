"""The fits on one fold that its judge is made of: inner folds, the whole fold, held-out users; on a device of choice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarec_gym.response.baselines import Factorization
from metarec_gym.response.calibration import Spread, marginal, solve_shift
from metarec_gym.response.config import ResponseConfig, inner_folds_of
from metarec_gym.response.effects import ChoiceData
from metarec_gym.response.frozen import DYNAMIC_FEATURES, FrozenResponse
from metarec_gym.response.item_space import STATIC_FEATURES, ItemSpace, chosen_categories, item_space, prefix_inputs
from metarec_gym.response.network import Network, fit_network, outcome_level, shown_logit
from metarec_gym.response.outcome_parts import Sample, weighted_mean
from metarec_gym.response.rows import Rows
from metarec_gym.response.stacking import Stack
from metarec_gym.seeding import numpy_rng, stream, torch_generator

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

_CALIBRATION_EVENTS = 8_000
_HELDOUT_EVENTS = 12_000
_UNIFORM_NEGATIVES = 16
_CHUNK = 2_048
_EFFECT_PAIRS = 4_000_000
"""Most (event, alternative) pairs in the fit of the random effects: a large log needs fewer negatives an event."""
_WEIGHT_SHAPE = 4.0
"""Shape of the gamma weights of users that a further member is fitted with. 1 is the Bayesian bootstrap, but a network with half
the effective users is worse by more than members differ: on MovieLens-100K two members then predict worse than one."""


def _joined(parts: list[Any]) -> Any:
    kind = type(parts[0])
    fields = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    whole = {k: torch.cat(v) if isinstance(v[0], Tensor) else v[0] for k, v in fields.items()}
    return kind(**whole)


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


def _base_rate(rows: Rows, config: ResponseConfig, sampled: bool) -> float:
    if not sampled:
        return float(rows.engaged.to(torch.float64).mean())
    rate = config.base_rate
    if rate is None:
        rate = float(rows.engaged_counts.to(torch.float64).mean()) / rows.n_items
    if not 0.0 < rate < 1.0:
        raise ValueError(f"base_rate is {rate}; expected a probability inside (0, 1)")
    return rate


@dataclass
class FoldFit:
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
    ) -> FoldFit:
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

    def out_of_fold(self) -> tuple[list[ChoiceData], list[Sample], list[int]]:
        """Predictions of the inner folds for users that their networks have not seen, and the passes that were best."""
        config, n_outcomes = self.config, len(self.dataset.outcomes)
        folds = torch.arange(self.rows.n_users) % self.inner_folds
        folds = folds[torch.from_numpy(numpy_rng(self.seed, "inner_folds").permutation(self.rows.n_users))]
        choices: list[list[ChoiceData]] = [[] for _ in range(n_outcomes)]
        samples: list[list[Sample]] = [[] for _ in range(n_outcomes)]
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
        return [_joined(parts) for parts in choices], [_joined(parts) for parts in samples], epochs

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
    ) -> tuple[ChoiceData, Sample]:
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
    ) -> Sample:
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
        return Sample(
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

    def heldout_sample(self, response: FrozenResponse, users: Tensor, outcome: int, space: ItemSpace) -> Sample:
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
            rate = self.base_rate if gate else weighted_mean(marginal(scores[0], spread, scale, shift), weight)
            for member in range(0 if gate else 1, response.n_members):
                calibration[member, outcome, 1] = solve_shift(scores[member], spread, scale, weight, rate)
        return response.replaced(calibration=calibration)

    def uniform_rate(self, response: FrozenResponse, users: Tensor) -> float:
        """Mean probability that the gate happens for a uniformly drawn unseen item; users weigh the same, members too.

        With impressions: for the log's own rows.
        """
        scores, spread, weight = self._exposures(response, users, 0)
        calibration = response.tensors["calibration"][:, 0].tolist()
        rates = [
            weighted_mean(marginal(score, spread, *pair), weight)
            for score, pair in zip(scores, calibration, strict=True)
        ]
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
