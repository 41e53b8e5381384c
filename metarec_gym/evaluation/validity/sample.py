"""What the validity report asks judges about: events of users that they have not seen.

Fold A's users are unseen by judge B and the other way round; for them a judge's table of random coefficients holds the prior
given their activity, so averaging over it is what the judge says of a user of whom nothing but the history is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_gym.data import FOLD_A, FOLD_B
from metarec_gym.evaluation.intervals import Floats
from metarec_gym.evaluation.validity.checks import Ints
from metarec_gym.response.calibration import Spread, logistic_fit
from metarec_gym.response.frozen import FrozenResponse
from metarec_gym.seeding import stream, torch_generator

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset
    from metarec_gym.data.interactions import InteractionLog
    from metarec_gym.world import World

FOLDS = ("A", "B")
FOLD_NUMBER = {"A": FOLD_A, "B": FOLD_B}
NEGATIVES = 16
"""Unseen items asked about beside each taken one, where the log has no real negatives."""
LATER_SHARE = 0.2
"""The last part of the calendar that counts as later time."""
_CHUNK_CELLS = 4_000_000
_LEVEL_PRIOR = 10.0


@dataclass(frozen=True)
class HeldOut:
    """Predictions of one outcome for users that the judges have not seen, both folds one after the other.

    Attributes:
        user: int64 (n,).
        row: int64 (n,), row of the log that was asked about; sampled negatives have the row of their event.
        later: bool (n,), in the last fifth of the calendar.
        target: float64 (n,) in [0, 1].
        weight: float64 (n,); sampled negatives have the weight that makes the positives' share the declared base rate.
        prob: Probability by model, float64 (n,): `judge`, `popularity`, `base_rate`, and variants of the judge.
        own: float64 (n,), the probability by the judge that was fitted on these very users.
    """

    user: Ints
    row: Ints
    later: NDArray[np.bool_]
    target: Floats
    weight: Floats
    prob: dict[str, Floats]
    own: Floats


def held_out(world: World, dataset: Dataset, outcome: int, *, limit: int, seed: int) -> HeldOut:
    """Asks every judge about a sample of the events of the other fold's users.

    Args:
        world: The world.
        dataset: Its log, with the world's folds.
        outcome: Index of the outcome; later ones are asked given the gate.
        limit: Events a fold at most.
        seed: Decides the sample.

    Returns:
        The predictions.
    """
    parts = []
    for fold, other in (FOLDS, FOLDS[::-1]):
        learned, asked = (dataset.users_in(FOLD_NUMBER[f]) for f in (fold, other))
        rows = _sample(dataset, asked, outcome, limit, stream(seed, "held out", fold, outcome))
        items, target, weight = _with_negatives(world, dataset, rows, outcome, fold, seed)
        period = periods(world, dataset.time[rows])
        simple = _Simple.fit(world, dataset, learned, outcome, fold, limit, seed)
        prob = {"popularity": simple(items), "base_rate": torch.full(items.shape, simple.rate, dtype=torch.float64)}
        for name, response in judges_of(world, fold).items():
            prob[name] = unseen_user_probs(response, dataset, rows, items, period, outcome)
        own = unseen_user_probs(judges_of(world, other)["judge"], dataset, rows, items, period, outcome)
        if sampled_gate(dataset, outcome):
            # the gate's level is declared, not measured: what can be held against the log is everything but the level
            prob = {name: at_rate(p, weight, simple.rate) for name, p in prob.items()}
            own = at_rate(own, weight, simple.rate)
        start, end = float(dataset.time.min()), float(dataset.time.max())
        later = dataset.time[rows] >= end - LATER_SHARE * (end - start)
        m = items.shape[1]
        user = dataset.user[rows]
        flat = {name: value.flatten().numpy() for name, value in prob.items()}
        parts.append(
            HeldOut(
                user.repeat_interleave(m).numpy(),
                rows.repeat_interleave(m).numpy(),
                later.repeat_interleave(m).numpy(),
                target.flatten().to(torch.float64).numpy(),
                weight.flatten().to(torch.float64).numpy(),
                flat,
                own.flatten().numpy(),
            )
        )
    return _joined(parts)


def served_by(log: InteractionLog, dataset: Dataset) -> NDArray[np.object_] | None:
    """Which strategy served each row of the dataset, (n_rows,); None where the log does not say."""
    if "strategy" not in log.frame.columns:
        return None
    frame = log.frame
    user = np.unique(frame["user_id"].to_numpy(dtype=object).astype(str), return_inverse=True)[1]
    order = np.lexsort((frame["timestamp"].to_numpy(dtype=np.float64), user))
    items = frame["item_id"].to_numpy(dtype=object).astype(str)[order]
    if not np.array_equal(items, dataset.item_ids[dataset.item.numpy()].astype(str)):
        raise ValueError(
            f"the rows of the log {log.name!r} are not in the order of its dataset, so strategies cannot be told apart; "
            "prepare the log again: python -m envs_data.<log>.prepare"
        )
    return frame["strategy"].to_numpy(dtype=object)[order].astype(str).astype(object)


def judges_of(world: World, fold: str) -> dict[str, FrozenResponse]:
    """The learned judges of a fold: `judge`, `second` (another family) and `sampler <name>` (other negatives)."""
    found = {}
    for name, response in world.responses.items():
        variant = name.partition("/")[2] if name.startswith(f"{fold}/") else ""
        kind = "judge" if name == fold else variant if variant == "second" else f"sampler {variant}" if variant else ""
        if kind and isinstance(response, FrozenResponse):
            found[kind] = response
    return found


def periods(world: World, time: Tensor) -> Tensor:
    """Row of the judges' `trend` at each time; float64 (n,) -> int64 (n,)."""
    starts = world.tensors["period_starts"]
    return (torch.searchsorted(starts, time.to(starts.dtype), right=True) - 1).clamp(min=0)


def unseen_user_probs(
    response: FrozenResponse, dataset: Dataset, rows: Tensor, items: Tensor, period: Tensor, outcome: int
) -> Tensor:
    """Probability of the outcome, averaged over members and over the random coefficients that the judge's table holds.

    Args:
        response: The judge.
        dataset: The log.
        rows: int64 (n,), rows of the log; the state is the one before each row.
        items: int64 (n, m), what is asked about.
        period: int64 (n,).
        outcome: Index of the outcome.

    Returns:
        float64 (n, m).
    """
    lengths = lengths_before(dataset, rows)
    looked_at = _position_shift(response, dataset, rows) if outcome == 0 else None
    found = torch.zeros(items.shape, dtype=torch.float64)
    # histories of like length together: a chunk is padded to its longest
    order = torch.argsort(lengths, stable=True)
    at = 0
    while at < len(order):
        width = max(int(lengths[order[min(at + 4_096, len(order)) - 1]]), items.shape[1], 1) * response.dim
        part = order[at : at + max(min(_CHUNK_CELLS // width, 4_096), 16)]
        at += len(part)
        user = dataset.user[rows[part]]
        state = response.start(dataset.histories(user, lengths[part]))
        mean, factor = response.tensors["effect_mean"][user], response.tensors["effect_chol"][user, outcome]
        phi = response.features(response.inputs(state), items[part], period[part])
        sd = (phi @ factor).norm(dim=-1)
        for member in range(response.n_members):
            chosen = torch.full((len(part),), member, dtype=torch.int64)
            p = response.conditional_probs(
                state,
                mean,
                items[part],
                member=chosen,
                period=period[part],
                position=False,
                gate_shift=None if looked_at is None else looked_at[part, None].expand(items[part].shape),
            )[..., outcome]
            scale = float(response.tensors["calibration"][member, outcome, 0])
            logit = torch.logit(p.to(torch.float64).clamp(1e-12, 1 - 1e-7)).flatten()
            spread = Spread(torch.zeros_like(logit), (scale * sd).flatten().to(torch.float64))
            averaged = spread.average(torch.sigmoid(spread.at(logit)).to(torch.float32))
            found[part] += averaged.view(p.shape) / response.n_members
    return found


def _position_shift(response: FrozenResponse, dataset: Dataset, rows: Tensor) -> Tensor | None:
    """What each row's place in the slate adds to the gate's logit, float32 (n,); None where the log has no places."""
    if dataset.position is None or not dataset.has_impressions:
        return None
    effect, place = response.tensors["position_logit"], dataset.position[rows]
    return torch.where(place >= 0, effect[place.clamp(0, len(effect) - 1)], 0.0)


def at_rate(p: Tensor, weight: Tensor, rate: float) -> Tensor:
    """Probabilities moved by one constant on the logit scale so that their weighted mean is `rate`; (n, m) -> (n, m)."""
    logit = torch.logit(p.clamp(1e-12, 1.0 - 1e-9))
    share = weight.to(torch.float64) / weight.sum()
    low, high = -40.0, 40.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float((share * torch.sigmoid(logit + middle)).sum()) < rate else (low, middle)
    return torch.sigmoid(logit + 0.5 * (low + high))


def lengths_before(dataset: Dataset, rows: Tensor) -> Tensor:
    """Engaged items of the row's user before the row; int64 (n,) -> int64 (n,)."""
    engaged = (dataset.outcome[:, 0] > 0).to(torch.int64)
    running = torch.cumsum(engaged, 0) - engaged
    return running[rows] - running[dataset.offsets[dataset.user[rows]]]


def sampled_gate(dataset: Dataset, outcome: int) -> bool:
    """Whether this outcome's negatives are sampled: the gate of a positives-only log."""
    return outcome == 0 and not dataset.has_impressions


def _sample(dataset: Dataset, users: Tensor, outcome: int, limit: int, seed: int) -> Tensor:
    """Rows of these users that say something about the outcome, at most so many; int64 (n,), ascending."""
    rows = dataset.rows_of(users)
    if outcome > 0 or not dataset.has_impressions:
        rows = rows[dataset.outcome[rows, 0] > 0]
    order = torch.randperm(len(rows), generator=torch_generator(seed, "rows"))[:limit]
    return rows[order.sort()[0]]


def _with_negatives(
    world: World, dataset: Dataset, rows: Tensor, outcome: int, fold: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Items asked about, what happened and weights; (n, m) each."""
    items, target = dataset.item[rows][:, None], dataset.outcome[rows, outcome][:, None]
    weight = torch.ones_like(target)
    if not sampled_gate(dataset, outcome):
        return items, target, weight
    generator = torch_generator(seed, "unseen items", fold)
    lengths = lengths_before(dataset, rows)
    drawn = []
    for part, own, length in zip(rows.split(512), items.split(512), lengths.split(512), strict=True):
        history = dataset.histories(dataset.user[part], length)
        unseen = torch.ones(len(part), dataset.n_items + 1)
        unseen.scatter_(1, torch.where(history < 0, dataset.n_items, history), 0.0)
        unseen.scatter_(1, own, 0.0)
        drawn.append(torch.multinomial(unseen[:, :-1], NEGATIVES, replacement=True, generator=generator))
    negatives = torch.cat(drawn)
    rate = declared_rate(world, dataset, fold)
    odds = (1.0 - rate) / rate
    return (
        torch.cat([items, negatives], dim=1),
        torch.cat([torch.ones_like(target), torch.zeros(negatives.shape)], dim=1),
        torch.cat([weight, torch.full(negatives.shape, odds / NEGATIVES)], dim=1),
    )


def declared_rate(world: World, dataset: Dataset, fold: str) -> float:
    """The base rate that the fold's judge declares, else the share of the catalogue that its users took."""
    judge = world.metrics.get("judges", {}).get(fold, {})
    rate = judge.get("base_rate") if isinstance(judge, Mapping) else None
    if isinstance(rate, float) and 0.0 < rate < 1.0:
        return rate
    return (
        float(dataset.engaged_counts()[dataset.users_in(FOLD_NUMBER[fold])].to(torch.float64).mean()) / dataset.n_items
    )


@dataclass(frozen=True)
class _Simple:
    """The popularity rule: a logistic regression on log popularity and, after the gate, on the item's own rate."""

    columns: Tensor
    """float64 (n_items, k)."""
    beta: Tensor
    """float64 (k,)."""
    rate: float
    """Base rate on the judge's own users."""

    @classmethod
    def fit(
        cls, world: World, dataset: Dataset, users: Tensor, outcome: int, fold: str, limit: int, seed: int
    ) -> _Simple:
        every = dataset.rows_of(users)
        every = every[dataset.outcome[every, 0] > 0] if outcome > 0 or not dataset.has_impressions else every
        # an item's own numbers come from the other half of the users: else the rule would read the answers it is fitted to
        order = torch.randperm(len(users), generator=torch_generator(seed, "halves", fold))
        half = torch.zeros(dataset.n_users, dtype=torch.int64)
        half[users[order[::2]]] = 1
        parts = []
        for number in (0, 1):
            table = cls._table(dataset, every[half[dataset.user[every]] != number], outcome)
            rows = _sample(dataset, users[half[users] == number], outcome, limit // 2, stream(seed, "popularity", fold))
            items, target, weight = _with_negatives(world, dataset, rows, outcome, fold, stream(seed, "popularity"))
            parts.append((table[items].flatten(0, 1), target.flatten(), weight.flatten()))
        x, target, weight = (torch.cat(columns) for columns in zip(*parts, strict=True))
        beta = logistic_fit(x, target, weight)
        return cls(cls._table(dataset, every, outcome), beta, float((weight * target).sum() / weight.sum()))

    @staticmethod
    def _table(dataset: Dataset, rows: Tensor, outcome: int) -> Tensor:
        """Columns of every item: 1, log popularity and, where answers are logged, the log odds of the item's own rate."""
        taken = rows[dataset.outcome[rows, 0] > 0]
        counts = torch.bincount(dataset.item[taken], minlength=dataset.n_items).to(torch.float64)
        columns = [torch.ones_like(counts), torch.log((counts + 0.5) / (counts.mean() + 0.5))]
        if not sampled_gate(dataset, outcome):
            seen = torch.bincount(dataset.item[rows], minlength=dataset.n_items).to(torch.float64)
            value = dataset.outcome[rows, outcome].to(torch.float64)
            total = torch.zeros(dataset.n_items, dtype=torch.float64).index_add_(0, dataset.item[rows], value)
            mean = value.mean().clamp(1e-4, 1.0 - 1e-4)
            level = (total + _LEVEL_PRIOR * mean) / (seen + _LEVEL_PRIOR)
            columns.append(torch.logit(level.clamp(1e-4, 1.0 - 1e-4)) - torch.logit(mean))
        return torch.stack(columns, dim=1)

    def __call__(self, items: Tensor) -> Tensor:
        return torch.sigmoid((self.columns @ self.beta)[items])


def _joined(parts: list[HeldOut]) -> HeldOut:
    def both(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    names = [name for name in parts[0].prob if all(name in part.prob for part in parts)]
    prob = {name: np.concatenate([part.prob[name] for part in parts]) for name in names}
    return HeldOut(both("user"), both("row"), both("later"), both("target"), both("weight"), prob, both("own"))


def world_dataset(world: World, log: InteractionLog) -> Dataset:
    """The log as the world read it: the same folds and the same sessions.

    Raises:
        ValueError: When the world was built from another log.
    """
    from dataclasses import replace

    from metarec_gym.data import encode
    from metarec_gym.data.sessions import sessions_by_gap

    built = world.info.get("log_hash")
    if built != log.hash:
        raise ValueError(
            f"the world {world.name!r} was built from a log with hash {built}, this one has {log.hash}; name the log it was "
            "built from with --log, or build the world again: python -m experiments.build_world"
        )
    dataset = encode(log, seed=world.seed)
    gap_s = world.metrics.get("session_gap_s")
    if gap_s is None:
        return dataset
    session = sessions_by_gap(dataset.user.numpy(), dataset.time.numpy(), float(gap_s))
    return replace(dataset, session=torch.from_numpy(session))
