"""Many small factorisation recommenders in training at once: the data, one step of training, the held-out metric.

The model of run r says that user u takes item i with

    logit p(u, i) = mean + bias_i + p_u . q_i

User representations p, item representations q, and the global weights (mean and item biases) are learned by stochastic
gradients of the log-loss over (user, taken item) pairs and one negative a pair. Every tensor has the runs first.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarec_gym.envs.batched import State, row_exact, tree_sum
from metarec_gym.places import log_folder
from metarec_gym.seeding import fold_in, mix, normal, stream, uniform

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset
    from metarec_gym.data.interactions import InteractionLog
    from metarec_gym.world import World

DIM = 8
"""Width of the user and item representations."""
CANDIDATES = 8
"""Most candidates among which the hardest negative is searched."""
GRADIENT_COST = 6
"""A gradient step on a pair and its negative costs as much as scoring so many candidates (three times a forward pass, twice)."""
WORST_LOG_LOSS = 4.0
"""A held-out pair's log-loss is cut here, so that a diverged run has a worst metric."""
_HELD_OUT_PER_USER = 4
_LOGIT_LIMIT = 30.0
_RUNS_AT_ONCE = 512
_INIT_SCALE = (0.01, 0.5)
_PAIR, _CANDIDATE, _USERS, _ITEMS, _SCALE = 1, 2, 3, 4, 5


@dataclass(frozen=True, eq=False)
class TrainingData:
    """A subsample of a log: what is trained on and what is held out."""

    name: str
    """Name of the log."""
    n_users: int
    """Users U."""
    n_items: int
    """Items I, the most taken ones."""
    train_user: Tensor
    """int64 (n_train,): who took ..."""
    train_item: Tensor
    """int64 (n_train,): ... what."""
    taken: Tensor
    """bool (U, I): the pairs of training."""
    held_user: Tensor
    """int64 (n_held_out,): who took ..."""
    held_item: Tensor
    """int64 (n_held_out,): ... what, unseen in training."""
    held_others: Tensor
    """bool (n_held_out, I): items that the pair's user never took, in training or later."""
    held_negative: Tensor
    """int64 (n_held_out,): one of them, drawn once: the negatives of the held-out log-loss."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingData:
        # gymnasium deep-copies keyword arguments of make(); frozen data may be shared
        return self

    def to(self, device: torch.device | str) -> TrainingData:
        """The same data on `device`."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.type == "Tensor"}
        return replace(self, **moved)

    @classmethod
    def from_events(
        cls, user: Tensor, item: Tensor, *, name: str, n_users: int = 64, n_items: int = 128, seed: int = 0
    ) -> TrainingData:
        """Takes the most popular items and users drawn among those with at least five of them.

        Args:
            user: int64 (n_events,).
            item: int64 (n_events,): taken items.
            name: Name of the log.
            n_users: Users at most.
            n_items: Items at most.
            seed: Which users, which held-out items, which negatives.

        Returns:
            The subsample; a fifth of every user's items (1 to 4), drawn at random, is held out: the question is how to train, not
            whether tastes drift.

        Raises:
            ValueError: When the log is too small.
        """
        counts = torch.bincount(item)
        popular = torch.argsort(counts, descending=True, stable=True)[:n_items].sort().values
        popular = popular[counts[popular] > 0]
        number = torch.full((len(counts),), -1, dtype=torch.int64)
        number[popular] = torch.arange(len(popular))
        events = [list(dict.fromkeys(group)) for group in _grouped(user, number[item])]
        able = [index for index, taken in enumerate(events) if 5 <= len(taken) < len(popular)]
        key = torch.tensor(stream(seed, "tune_data"), dtype=torch.int64)
        order = torch.argsort(uniform(fold_in(key, torch.tensor(able, dtype=torch.int64))), stable=True)
        chosen = sorted(able[index] for index in order[:n_users].tolist())
        if len(popular) < 16 or len(chosen) < 8:
            raise ValueError(
                f"the log {name!r} has {len(chosen)} users with 5 or more of its {len(popular)} most popular items, expected at "
                "least 8 users and 16 items: a smaller log gives nothing to train"
            )
        train, held = [], []
        anything = torch.zeros(len(chosen), len(popular), dtype=torch.bool)
        for row, index in enumerate(chosen):
            items = torch.tensor(events[index])
            items = items[torch.argsort(uniform(fold_in(fold_in(fold_in(key, 2), index), items)), stable=True)]
            size = min(_HELD_OUT_PER_USER, max(1, len(items) // 5))
            held += [(row, i) for i in items[:size].tolist()]
            train += [(row, i) for i in items[size:].tolist()]
            anything[row, items] = True
        train_user, train_item = torch.tensor(train).unbind(dim=1)
        held_user, held_item = torch.tensor(held).unbind(dim=1)
        taken = torch.zeros_like(anything)
        taken[train_user, train_item] = True
        others = ~anything[held_user]
        draws = uniform(fold_in(fold_in(key, 1), torch.arange(others.numel()))).view(others.shape)
        return cls(
            name=name,
            n_users=len(chosen),
            n_items=len(popular),
            train_user=train_user,
            train_item=train_item,
            taken=taken,
            held_user=held_user,
            held_item=held_item,
            held_others=others,
            held_negative=draws.masked_fill(~others, -1.0).argmax(dim=1),
        )

    @classmethod
    def from_dataset(cls, dataset: Dataset, **sizes: int) -> TrainingData:
        """From a log as tensors: the rows in which the user took the item."""
        engaged = dataset.outcome[:, 0] > 0
        return cls.from_events(dataset.user[engaged], dataset.item[engaged], name=dataset.name, **sizes)

    @classmethod
    def from_world(cls, world: World, **sizes: int) -> TrainingData:
        """From a world's own record of who took what.

        Raises:
            ValueError: When the world keeps no events, as synthetic ones.
        """
        offsets = world.tensors["user_event_offsets"].to(torch.int64)
        user = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets[1:] - offsets[:-1])
        item = world.tensors["user_events"].to(torch.int64)
        if len(item) == 0:
            raise ValueError(
                f"the world {world.name!r} keeps no events of its users; hand over the log it was built from"
            )
        return cls.from_events(user, item, name=world.name, **sizes)

    @classmethod
    def synthetic(cls, seed: int = 0, *, n_users: int = 64, n_items: int = 128, events: int = 30) -> TrainingData:
        """Users with tastes of four dimensions and popular items; nothing is downloaded.

        Args:
            seed: Which users and items.
            n_users: Users.
            n_items: Items.
            events: Items that every user took; half of them where there are no more.
        """
        # a user who took everything leaves no negatives
        events = events if events < n_items else n_items // 2
        key = torch.tensor(stream(seed, "tune_synthetic"), dtype=torch.int64)
        taste, content = (
            normal(fold_in(fold_in(key, part), torch.arange(size * 4))).view(size, 4)
            for part, size in ((0, n_users), (1, n_items))
        )
        popularity = normal(fold_in(fold_in(key, 2), torch.arange(n_items)))
        draw = uniform(fold_in(fold_in(key, 3), torch.arange(n_users * n_items))).view(n_users, n_items)
        # log-propensity + Gumbel noise, sorted: a draw without replacement
        keys = 1.5 * taste @ content.T / 2.0 + 0.7 * popularity - torch.log(-torch.log(draw.clamp(min=1e-7)))
        items = keys.argsort(dim=1, descending=True)[:, :events]
        user = torch.arange(n_users).repeat_interleave(events)
        return cls.from_events(user, items.flatten(), name="synthetic", n_users=n_users, n_items=n_items, seed=seed)


def _grouped(user: Tensor, item: Tensor) -> list[list[int]]:
    """Every user's items in the order given; unknown items (-1) left out."""
    groups: dict[int, list[int]] = {}
    for u, i in zip(user.tolist(), item.tolist(), strict=True):
        if i >= 0:
            groups.setdefault(u, []).append(i)
    return [groups[u] for u in sorted(groups)]


def resolve_training_data(
    log: str | Path | TrainingData | InteractionLog | Dataset | World | None, *, n_users: int, n_items: int, seed: int
) -> TrainingData:
    """The subsample of `log`: a folder (prepared log or world), a log's name, what one loads, or None for the synthetic default.

    Raises:
        FileNotFoundError: When a folder holds neither a log nor a world, or there is no log of that name.
        ValueError: When the log is too small.
        TypeError: When `log` is something else.
    """
    if log is None:
        return TrainingData.synthetic(seed, n_users=n_users, n_items=n_items)
    if isinstance(log, TrainingData):
        return log
    if isinstance(log, str | Path):
        return _from_folder(str(log_folder(log).resolve()), n_users, n_items, seed)
    return _from_object(log, n_users, n_items, seed)


@functools.lru_cache(maxsize=8)
def _from_folder(folder: str, n_users: int, n_items: int, seed: int) -> TrainingData:
    path = Path(folder)
    if (path / "world.json").is_file():
        from metarec_gym.world import World

        return _from_object(World.load(path), n_users, n_items, seed)
    from metarec_gym.data.interactions import InteractionLog

    return _from_object(InteractionLog.load(path), n_users, n_items, seed)


def _from_object(log: Any, n_users: int, n_items: int, seed: int) -> TrainingData:
    from metarec_gym.data.dataset import Dataset, encode
    from metarec_gym.data.interactions import InteractionLog
    from metarec_gym.world import World

    if isinstance(log, InteractionLog):
        log = encode(log, seed=seed)
    if isinstance(log, Dataset):
        return TrainingData.from_dataset(log, n_users=n_users, n_items=n_items, seed=seed)
    if isinstance(log, World):
        return TrainingData.from_world(log, n_users=n_users, n_items=n_items, seed=seed)
    raise TypeError(f"log is a {type(log).__name__}, expected a folder, an InteractionLog, a Dataset, a World or None")


# ---------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Settings:
    """What the meta-policy chose for a step, float32 (runs,) each."""

    step_users: Tensor
    """Step size of the user representations."""
    step_items: Tensor
    """Step size of the item representations."""
    step_weights: Tensor
    """Step size of mean and biases."""
    l2: Tensor
    """Strength of the pull to 0 on representations and biases."""
    hardness: Tensor
    """A negative is the highest-scoring of so many candidates (rounded); 1 = a uniform draw."""

    @property
    def candidates(self) -> Tensor:
        """int64 (runs,), 1..CANDIDATES."""
        return (self.hardness + 0.5).to(torch.int64).clamp(1, CANDIDATES)

    @property
    def cost(self) -> Tensor:
        """Compute of a step over the dearest step's; float32 (runs,) in (0, 1]."""
        return (self.candidates + GRADIENT_COST).to(torch.float32) / (CANDIDATES + GRADIENT_COST)


def initialise(data: TrainingData, key: Tensor) -> State:
    """Models before training; int64 (runs,) -> users (runs, U, d), items (runs, I, d), bias (runs, I), mean (runs,).

    The representations' scale is drawn log-uniformly from 0.01 to 0.5 for each run: some start nearly symmetric and slow, some
    start noisy.
    """
    low, high = (math.log(edge) for edge in _INIT_SCALE)
    scale = row_exact(torch.exp, (low + (high - low) * uniform(fold_in(key, _SCALE)))[:, None])
    tables = {}
    for name, tag, size in (("users", _USERS, data.n_users), ("items", _ITEMS, data.n_items)):
        index = torch.arange(size * DIM, device=key.device)
        tables[name] = (scale * normal(fold_in(fold_in(key, tag)[:, None], index))).view(-1, size, DIM)
    bias = torch.zeros(len(key), data.n_items, device=key.device)
    return {**tables, "bias": bias, "mean": torch.zeros(len(key), device=key.device)}


@dataclass(frozen=True)
class Trained:
    """What some gradient steps did, (runs,) each."""

    model: State
    """The model after them."""
    loss: Tensor
    """Mean log-loss of the training pairs and their negatives."""
    gradient: Tensor
    """(runs, 3): root mean square over the steps of the gradient's norm, for users, items and weights."""


def train(data: TrainingData, model: State, settings: Settings, key: Tensor, *, updates: int, batch: int) -> Trained:
    """Some gradient steps.

    Args:
        data: What is trained on.
        model: The models; not changed.
        settings: Step sizes and so on.
        key: int64 (runs,), parent of the draws of pairs and candidates.
        updates: Gradient steps.
        batch: Pairs in each.

    Returns:
        The models after, and what was seen on the way.
    """
    losses, norms = [], []
    for update in range(updates):
        model, loss, square = _update(data, model, settings, fold_in(key, update), batch)
        losses.append(loss)
        norms.append(square)
    loss = tree_sum(torch.stack(losses, dim=-1)) / updates
    return Trained(model, loss, torch.sqrt(tree_sum(torch.stack(norms, dim=-1)) / updates))


def _update(
    data: TrainingData, model: State, settings: Settings, key: Tensor, batch: int
) -> tuple[State, Tensor, Tensor]:
    runs, device = len(key), key.device
    row = torch.arange(runs, device=device)[:, None]
    pair = fold_in(fold_in(key, _PAIR)[:, None], torch.arange(batch, device=device))
    pair = (uniform(pair) * len(data.train_user)).to(torch.int64)
    user, item = data.train_user[pair], data.train_item[pair]
    widest = int(settings.candidates.max())
    number = torch.arange(batch * CANDIDATES, device=device).view(batch, CANDIDATES)[:, :widest]
    drawn = fold_in(fold_in(key, _CANDIDATE)[:, None, None], number)
    candidate = (uniform(drawn) * data.n_items).to(torch.int64)

    size_u, size_i = data.n_users, data.n_items
    user_place, item_place = row * size_u + user, row * size_i + item
    candidate_place = row[..., None] * size_i + candidate
    p, q = _looked_up(model["users"], user_place), _looked_up(model["items"], item_place)
    score = _looked_up(model["bias"], candidate_place)
    score = score + tree_sum(p[:, :, None, :] * _looked_up(model["items"], candidate_place))
    barred = torch.arange(widest, device=device) >= settings.candidates[:, None, None]
    barred = barred | data.taken[user[..., None], candidate]
    best = score.masked_fill(barred, -torch.inf).argmax(dim=2, keepdim=True)
    negative = candidate.gather(2, best)[..., 0]
    # where every candidate was taken by the user there is no negative
    valid = (~barred.gather(2, best)[..., 0]).to(torch.float32)
    negative_place = row * size_i + negative
    q_negative = _looked_up(model["items"], negative_place)

    mean = model["mean"][:, None]
    logit_taken = mean + _looked_up(model["bias"], item_place) + tree_sum(p * q)
    logit_negative = mean + _looked_up(model["bias"], negative_place) + tree_sum(p * q_negative)
    logit = torch.stack([logit_taken, logit_negative]).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)
    # d(-log p)/d(logit) of a taken item and of a negative
    error_taken = -row_exact(_sigmoid, -logit[0])
    error_negative = row_exact(_sigmoid, logit[1]) * valid
    loss = tree_sum(row_exact(_softplus, -logit[0]) + row_exact(_softplus, logit[1]) * valid)
    loss = loss / (batch + tree_sum(valid))

    d_p = error_taken[..., None] * q + error_negative[..., None] * q_negative
    users = _accumulated(user_place, d_p, runs * size_u).view(runs, size_u, DIM)
    places = torch.cat([item_place, negative_place], dim=1)
    errors = torch.cat([error_taken, error_negative], dim=1)
    d_q = torch.cat([error_taken[..., None] * p, error_negative[..., None] * p], dim=1)
    # the biases ride along as one more column
    both = _accumulated(places, torch.cat([d_q, errors[..., None]], dim=2), runs * size_i).view(runs, size_i, DIM + 1)
    items, bias = both[..., :DIM], both[..., DIM]
    d_mean = tree_sum(errors) / (2 * batch)

    squares = [_square(users), _square(items), tree_sum(bias * bias) + d_mean * d_mean]
    moved = {
        "users": _moved(model["users"], users, settings.step_users, settings.l2),
        "items": _moved(model["items"], items, settings.step_items, settings.l2),
        "bias": _moved(model["bias"], bias, settings.step_weights, settings.l2),
        "mean": model["mean"] - settings.step_weights * d_mean,
    }
    return moved, loss, torch.stack(squares, dim=1)


def _looked_up(table: Tensor, place: Tensor) -> Tensor:
    """Entries of all runs' tables by place, counted through the runs; (runs, n) or (runs, n, d) -> place's shape (and d)."""
    flat = table.flatten(0, 1)
    return flat.index_select(0, place.flatten()).view(*place.shape, *flat.shape[1:])


def _sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-x))


def _softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0.0) + torch.log1p(torch.exp(-x.abs()))


def _square(table: Tensor) -> Tensor:
    """Sum of squares of each run's table; (runs, ...) -> (runs,)."""
    return tree_sum((table * table).flatten(1))


def _moved(table: Tensor, gradient: Tensor, step: Tensor, l2: Tensor) -> Tensor:
    shape = (-1, *(1,) * (table.ndim - 1))
    # x' = (1 - step * l2) x - step * gradient; the pull never overshoots 0
    keep = 1.0 - (step * l2).clamp(max=1.0)
    return keep.view(shape) * table - step.view(shape) * gradient


def _accumulated(place: Tensor, value: Tensor, size: int) -> Tensor:
    """Sums of `value` (runs, n, width) by place (runs, n); always added in the same order."""
    table = torch.zeros(size, value.shape[2], device=value.device)
    flat = place.flatten(), value.flatten(0, 1)
    if value.device.type == "cpu":
        return table.index_add_(0, *flat)
    # on CUDA index_add adds in any order, this sorts first
    return table.index_put_((flat[0],), flat[1], accumulate=True)


# ---------------------------------------------------------------------------------------------------------- the metric


def held_out_ranking(data: TrainingData, model: State) -> Tensor:
    """Share of (held-out item, item never taken) pairs in the right order, ties half: AUC; (runs,) in [0, 1].

    Counts of points below 2**24 are exact in float32, so the order of addition does not matter.
    """
    runs = len(model["mean"])
    # some runs at a time: thousands of score tables would not fit into memory
    parts = [
        {name: table[k : k + _RUNS_AT_ONCE] for name, table in model.items()} for k in range(0, runs, _RUNS_AT_ONCE)
    ]
    return torch.cat([_ranking(data, part) for part in parts])


def _ranking(data: TrainingData, model: State) -> Tensor:
    users, items = model["users"].permute(2, 0, 1)[..., None], model["items"].permute(2, 0, 1)[:, :, None]
    score = model["bias"][:, None, :] + users[0] * items[0]
    for k in range(1, DIM):
        # element by element: a matrix product may add in another order in another batch
        score = score + users[k] * items[k]
    score = score.index_select(1, data.held_user)
    place = data.held_item.expand(len(score), -1)[..., None]
    own = score.gather(2, place)
    others = data.held_others.to(torch.float32)
    points = ((score < own).to(torch.float32) + (score <= own).to(torch.float32)) * others
    return points.sum(dim=2).sum(dim=1) / (2.0 * others.sum())


def held_out_log_loss(data: TrainingData, model: State) -> Tensor:
    """Mean log-loss of the held-out pairs and one negative each, cut at 4 a pair; (runs,) in [0, 4]."""
    users = model["users"][:, data.held_user]
    logit = [
        model["mean"][:, None] + model["bias"][:, item] + tree_sum(users * model["items"][:, item])
        for item in (data.held_item, data.held_negative)
    ]
    each = row_exact(_softplus, torch.cat([-logit[0], logit[1]], dim=1).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT))
    return tree_sum(each.clamp(max=WORST_LOG_LOSS)) / each.shape[1]


METRICS = ("ranking", "log_loss")
WORST = {"ranking": 0.0, "log_loss": -WORST_LOG_LOSS}
"""The metric of a run whose numbers are no longer finite."""


def held_out_metric(data: TrainingData, model: State, metric: str) -> tuple[Tensor, Tensor]:
    """The metric, higher is better, and which runs are still finite; float32 and bool (runs,)."""
    value = held_out_ranking(data, model) if metric == "ranking" else -held_out_log_loss(data, model)
    finite = torch.isfinite(value)
    for table in model.values():
        finite = finite & torch.isfinite(table).flatten(1).all(dim=1) if table.ndim > 1 else finite & table.isfinite()
    return torch.where(finite, value, WORST[metric]), finite


def run_key(row_key: Tensor, split: str) -> Tensor:
    """Parent of an episode's draws: initialisations of the two splits share nothing; int64 (runs,)."""
    return mix(fold_in(row_key, ("train", "test").index(split) + 17))
