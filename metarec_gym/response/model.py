"""What the judge learns from: prefixes of the fold's users, their items as vectors and features, and one network an outcome.

The state of a prefix does not depend on what is learnt (decays and item vectors are fixed before), so all prefix states are
computed once and learning is a network on fixed inputs.

Gate of a positives-only log: each engaged event is a choice among the items that the user had not engaged with. Negatives
are drawn from a sampler q, and their log q is put back into the logit, so that f is a log density ratio:

    f(state, item) = log( n_items * P(the next engaged item is `item` | state) )
    logit(positive against M draws) = f - log(M q n_items)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from metarec_gym.seeding import numpy_rng, torch_generator

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

STATIC_FEATURES = ("intercept", "log_popularity", "age")
"""The first entries of phi; some categories and the two co-occurrence features follow."""
_DENSE_CELLS = 50_000_000
"""Up to this many (user, item) cells the order of engagement is kept as a dense table (200 MB)."""
_YEAR_S = 365.25 * 86_400.0


@dataclass(frozen=True)
class ResponseConfig:
    """How a judge is fitted; every default was chosen on inner validation users of MovieLens-100K's folds."""

    dim: int = 32
    """Length of the item vectors of the recurrence (PPMI and a truncated SVD)."""
    window: int = 10
    """Items of one history at most this far apart count as occurring together."""
    decays: tuple[float, ...] = (0.7, 0.9, 0.98)
    """Decays of the recurrence, fastest first."""
    hidden: int = 64
    """Hidden units of the gate's network; each later outcome has half as many of its own."""
    rank: int = 12
    """Length of the learnt user and item vectors."""
    sampler: Literal["uniform", "sqrt_popularity", "popularity"] = "sqrt_popularity"
    """How negatives are drawn where the log has none; log q is put back, so it changes noise and not meaning."""
    negatives: int = 256
    """Negatives shared by a mini-batch of a positives-only log."""
    batch_size: int = 512
    """Prefixes a mini-batch."""
    learning_rate: float = 8e-3
    """Adam's step size."""
    l2_vector: float = 10.0
    """Precision of the items' own output vectors around what their categories say."""
    l2_bias: float = 5.0
    """Precision of the items' own bias around popularity and categories."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the networks' matrices."""
    averaging: float = 0.98
    """Decay of the running average of the parameters that is kept."""
    max_epochs: int = 40
    """Most passes over the fold."""
    patience: int = 2
    """Passes without gain on inner validation users before learning stops."""
    inner_folds: int = 4
    """Inner user folds: everything that describes users is fitted on predictions for users the network has not seen."""
    category_features: int = 8
    """Categories in phi, for which users have random coefficients: those that split the fold's events most evenly."""
    effect_negatives: int = 48
    """Negatives per event in the fit of the random effects and in the calibration."""
    effect_rounds: int = 12
    """Most rounds of (modes, covariance) in the fit of the random effects."""
    popularity_prior: float = 2.0
    """Events added to every item's count before the logarithm."""
    base_rate: float | None = None
    """Probability that a user takes an unseen item drawn uniformly; None = the log's density. Unused with impressions."""


@dataclass(frozen=True)
class Rows:
    """Rows of some users in (user, time) order, users renumbered 0..n_users-1."""

    users: Tensor
    """int64 (n_users,): index of each user in the dataset, ascending."""
    user: Tensor
    """int64 (n,): 0..n_users-1."""
    item: Tensor
    """int64 (n,)."""
    outcome: Tensor
    """float32 (n, n_outcomes)."""
    rank: Tensor
    """int64 (n,): engaged items of the user before the row."""
    n_items: int
    _cache: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, dataset: Dataset, users: Tensor) -> Rows:
        """The rows of `users` (int64, any order)."""
        users = torch.unique(users)
        rows = dataset.rows_of(users)
        user = torch.searchsorted(users, dataset.user[rows])
        engaged = (dataset.outcome[rows, 0] > 0).to(torch.int64)
        before = torch.cumsum(engaged, dim=0) - engaged
        first = torch.searchsorted(user, torch.arange(len(users)))
        rank = before - (before[first.clamp(max=max(len(rows) - 1, 0))][user] if len(rows) else before)
        return cls(users, user, dataset.item[rows], dataset.outcome[rows], rank, dataset.n_items)

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.user.shape[0])

    @property
    def n_users(self) -> int:
        """Number of users."""
        return int(self.users.shape[0])

    @property
    def engaged(self) -> Tensor:
        """Whether the gate happened; bool (n,)."""
        return self.outcome[:, 0] > 0

    @cached_property
    def engaged_counts(self) -> Tensor:
        """Engaged rows of each user; int64 (n_users,)."""
        return torch.bincount(self.user[self.engaged], minlength=self.n_users)

    def subset(self, keep: Tensor) -> Rows:
        """The rows of the users with `keep`; bool (n_users,)."""
        renumber = torch.cumsum(keep.to(torch.int64), dim=0) - 1
        rows = keep[self.user]
        return Rows(
            self.users[keep],
            renumber[self.user[rows]],
            self.item[rows],
            self.outcome[rows],
            self.rank[rows],
            self.n_items,
        )

    def seen(self, user: Tensor, rank: Tensor, items: Tensor) -> Tensor:
        """Whether the user had engaged with an item before its `rank`-th engagement.

        Args:
            user: int64 (rows,), 0..n_users-1.
            rank: int64 (rows,).
            items: int64 (rows, m), or (m,) when every row asks about the same items.

        Returns:
            bool (rows, m).
        """
        if self.n_users * self.n_items <= _DENSE_CELLS:
            first = self._first_rank()
            if items.dim() == 1:
                # rows of the transposed table are contiguous: four times as fast as gathering columns
                columns = self._cache.setdefault("transposed", first.T.contiguous())
                taken = columns[items].T[user]
            else:
                taken = first[user[:, None], items]
            return taken < rank[:, None]
        keys, ranks = self._sorted_keys()
        asked = user[:, None] * self.n_items + items
        place = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
        return (keys[place] == asked) & (ranks[place] < rank[:, None])

    def _first_rank(self) -> Tensor:
        if "first" not in self._cache:
            first = torch.full((self.n_users * self.n_items,), torch.iinfo(torch.int32).max, dtype=torch.int32)
            keys, ranks = self._sorted_keys()
            first[keys] = ranks.to(torch.int32)
            self._cache["first"] = first.view(self.n_users, self.n_items)
        return self._cache["first"]

    def _sorted_keys(self) -> tuple[Tensor, Tensor]:
        """Keys user * n_items + item of the engaged rows, ascending, and the rank of the first such row."""
        if "keys" not in self._cache:
            key = (self.user * self.n_items + self.item)[self.engaged]
            keys, order = torch.sort(key, stable=True)
            fresh = torch.ones_like(keys, dtype=torch.bool)
            fresh[1:] = keys[1:] != keys[:-1]
            self._cache["keys"], self._cache["ranks"] = keys[fresh], self.rank[self.engaged][order][fresh]
        return self._cache["keys"], self._cache["ranks"]

    def unseen_items(self, index: Tensor, m: int, q: Tensor, generator: torch.Generator) -> Tensor:
        """Items drawn from `q` that the user had not engaged with at the row and that are not the row's own item.

        Args:
            index: int64 (rows,): which rows.
            m: Draws per row, with replacement.
            q: float (n_items,), the sampler.
            generator: Source of the draws.

        Returns:
            int64 (rows, m). Where a user has taken nearly everything a draw may remain a seen item.
        """
        items = draw_items(q, (len(index), m), generator)
        user, rank, own = self.user[index], self.rank[index], self.item[index]
        for _ in range(8):
            bad = self.seen(user, rank, items) | (items == own[:, None])
            row, column = torch.nonzero(bad, as_tuple=True)
            if len(row) == 0:
                break
            items[row, column] = draw_items(q, (len(row),), generator)
        return items


def draw_items(q: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Items drawn from `q` by its inverse distribution function; int64 of `shape`."""
    cumulative = torch.cumsum(q.to(torch.float64), dim=0)
    draw = torch.rand(shape, generator=generator, dtype=torch.float64) * cumulative[-1]
    return torch.searchsorted(cumulative, draw, right=True).clamp(max=len(q) - 1)


@dataclass(frozen=True)
class ItemSpace:
    """Fixed before anything is learnt: item vectors, static features, scale of the dynamic ones; from the given rows alone."""

    item_input: Tensor
    """float32 (n_items, dim); about unit norm, small for rare items, zero for unseen ones."""
    decays: Tensor
    """float32 (n_decays,)."""
    static_features: Tensor
    """float32 (n_items, 3 + n): intercept, log popularity, age, n categories (0 or 1, centred)."""
    dynamic_scale: Tensor
    """float32 (2,)."""
    log_density: Tensor
    """float32 (n_items,): log of n_items * (count + prior) / sum, the popularity model of the next item."""
    category: Tensor
    """float32 (n_items, n_categories): rows of unit length, or zero."""
    q: Tensor
    """float32 (n_items,): the sampler of negatives, sums to 1."""

    @property
    def dim(self) -> int:
        """Length of the item vectors."""
        return int(self.item_input.shape[1])

    def inputs(self, rows: Rows) -> Tensor:
        """What the network reads at each row: `FrozenResponse.inputs` of the state before it; (n, state_dim)."""
        return prefix_inputs(self.item_input, self.decays, rows)

    def features(self, inputs: Tensor, items: Tensor) -> Tensor:
        """phi: inputs (rows, state_dim) and items (rows, m) -> (rows, m, n_features)."""
        vectors = self.item_input[items]
        recent = torch.einsum("rmd,rd->rm", vectors, inputs[:, : self.dim])
        whole = torch.einsum("rmd,rd->rm", vectors, inputs[:, -self.dim - 1 : -1])
        dynamic = torch.stack([recent, whole], dim=-1) * self.dynamic_scale
        return torch.cat([self.static_features[items], dynamic], dim=-1)


def chosen_categories(dataset: Dataset, rows: Rows, count: int) -> Tensor:
    """At most `count` categories that split the fold's engaged events most evenly, ascending; int64.

    The share s of the events with the largest s (1 - s) comes first. A category that the ones before it (nearly) imply,
    like the last of several exclusive ones, is passed over: no log could tell its coefficient from theirs.
    """
    chosen: list[int] = []
    if dataset.item_category.shape[1] == 0 or not bool(rows.engaged.any()):
        return torch.tensor(chosen, dtype=torch.int64)
    share = dataset.item_category[rows.item[rows.engaged]].to(torch.float64).mean(dim=0)
    evenness = share * (1.0 - share)
    column = dataset.item_category.to(torch.float64)
    column = column - column.mean(dim=0)
    basis = torch.zeros(rows.n_items, 0, dtype=torch.float64)
    for index in torch.argsort(evenness, descending=True, stable=True).tolist():
        rest = column[:, index] - basis @ (basis.T @ column[:, index])
        if len(chosen) == count or float(evenness[index]) < 1e-4:
            break
        if float(rest.norm()) > 0.2 * float(column[:, index].norm()):
            chosen.append(index)
            basis = torch.cat([basis, rest[:, None] / rest.norm()], dim=1)
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def item_space(
    dataset: Dataset, rows: Rows, config: ResponseConfig, seed: int, categories: Tensor | None = None
) -> ItemSpace:
    """Item vectors and features from `rows` only; `categories` int64, None = `chosen_categories` of the rows."""
    if categories is None:
        categories = chosen_categories(dataset, rows, config.category_features)
    counts = torch.bincount(rows.item[rows.engaged], minlength=rows.n_items).to(torch.float64)
    item_input = _ppmi_vectors(rows, config.dim, config.window, seed)
    smoothed = counts + config.popularity_prior
    log_density = torch.log(smoothed / smoothed.mean())
    static = torch.stack([torch.ones(rows.n_items), _standardised(log_density), _age(dataset, rows)], dim=1)
    picked = dataset.item_category[:, categories].to(torch.float64)
    static = torch.cat([static, picked - picked.mean(dim=0)], dim=1)
    norm = dataset.item_category.norm(dim=1, keepdim=True)
    powers = {"uniform": 0.0, "sqrt_popularity": 0.5, "popularity": 1.0}
    q = smoothed ** powers[config.sampler]
    space = ItemSpace(
        item_input=item_input,
        decays=torch.tensor(config.decays, dtype=torch.float32),
        static_features=static.to(torch.float32),
        dynamic_scale=torch.ones(2),
        log_density=log_density.to(torch.float32),
        category=dataset.item_category / norm.clamp(min=1.0),
        q=(q / q.sum()).to(torch.float32),
    )
    generator = torch_generator(seed, "dynamic_scale")
    index = torch.randint(rows.n, (min(rows.n, 4000),), generator=generator)
    inputs = space.inputs(rows)[index]
    items = torch.randint(rows.n_items, (len(index), 16), generator=generator)
    spread = space.features(inputs, items)[..., -2:].flatten(0, 1).std(dim=0)
    scale = torch.where(spread > 1e-6, 1.0 / spread.clamp(min=1e-6), torch.zeros(2))
    return ItemSpace(**{**vars(space), "dynamic_scale": scale})


def _standardised(x: Tensor) -> Tensor:
    spread = x.std(unbiased=False)
    return (x - x.mean()) / spread if float(spread) > 1e-9 else torch.zeros_like(x)


def _age(dataset: Dataset, rows: Rows) -> Tensor:
    """Standardised log of the items' age in years when the log ends; 0 where the release is unknown. (n_items,)."""
    release = dataset.item_release.to(torch.float64)
    known = torch.isfinite(release)
    age = torch.zeros(rows.n_items, dtype=torch.float64)
    if int(known.sum()) > 1:
        end = float(dataset.time.max())
        age[known] = _standardised(torch.log1p(((end - release[known]) / _YEAR_S).clamp(min=0.0)))
    return age


def _ppmi_vectors(rows: Rows, dim: int, window: int, seed: int) -> Tensor:
    """Positive pointwise mutual information of items close together in a history, reduced by a truncated SVD."""
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import svds

    engaged = rows.engaged
    user, item = rows.user[engaged].numpy(), rows.item[engaged].numpy()
    n = rows.n_items
    left, right = [], []
    for lag in range(1, window + 1):
        same = user[lag:] == user[:-lag]
        left.append(item[:-lag][same])
        right.append(item[lag:][same])
    a, b = np.concatenate(left), np.concatenate(right)
    pairs = coo_matrix((np.ones(2 * len(a)), (np.concatenate([a, b]), np.concatenate([b, a]))), shape=(n, n)).tocsr()
    pairs.setdiag(0)
    pairs.eliminate_zeros()
    vectors = np.zeros((n, dim), dtype=np.float64)
    if pairs.nnz > 0:
        degree = np.asarray(pairs.sum(axis=1)).ravel()
        entries = pairs.tocoo()
        mutual = np.log(entries.data * degree.sum() / (degree[entries.row] * degree[entries.col]))
        ppmi = coo_matrix((np.maximum(mutual, 0.0), (entries.row, entries.col)), shape=(n, n)).tocsr()
        kept = min(dim, n - 2)
        if kept >= 1 and n > 4 * dim:
            start = numpy_rng(seed, "ppmi_svd").standard_normal(n)
            u, s, _ = svds(ppmi, k=kept, v0=start)
        else:
            u, s, _ = np.linalg.svd(ppmi.toarray())
            u, s = u[:, : min(dim, n)], s[: min(dim, n)]
        order = np.argsort(-s)
        found = u[:, order] * np.sqrt(np.maximum(s[order], 0.0))
        vectors[:, : found.shape[1]] = found
    counts = np.bincount(item, minlength=n)
    length = np.linalg.norm(vectors, axis=1)
    # a vector seen in few histories is mostly noise: it is shortened towards 0
    scale = np.where(length > 1e-9, (counts / (counts + 5.0)) / np.maximum(length, 1e-9), 0.0)
    return torch.from_numpy((vectors * scale[:, None]).astype(np.float32))


def prefix_inputs(item_input: Tensor, decays: Tensor, rows: Rows) -> Tensor:
    """The recurrence along every user's rows at once.

    Args:
        item_input: float32 (n_items, d).
        decays: float32 (n_decays,).
        rows: Users' rows in order.

    Returns:
        float32 (n, (n_decays + 1) * d + 1): averages, mean vector, log count before each row.
    """
    d, n_decays = item_input.shape[1], len(decays)
    out = torch.empty(rows.n, (n_decays + 1) * d + 1)
    lengths = torch.bincount(rows.user, minlength=rows.n_users)
    starts = torch.cumsum(lengths, dim=0) - lengths
    order = torch.argsort(lengths, descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    averages = torch.zeros(rows.n_users, n_decays, d)
    total, count = torch.zeros(rows.n_users, d), torch.zeros(rows.n_users, 1)
    engaged = rows.engaged.to(torch.float32)
    for step in range(int(lengths.max()) if rows.n else 0):
        # users are sorted by length: those that still have a row are the first ones
        active = int((lengths > step).sum())
        index = starts[:active] + step
        out[index, : n_decays * d] = averages[:active].flatten(1)
        out[index, n_decays * d : -1] = total[:active] / count[:active].clamp(min=1.0)
        out[index, -1:] = torch.log1p(count[:active]) / 7.0
        taken = engaged[index][:, None]
        vector = item_input[rows.item[index]] * taken
        # s' = d s + (1 - d) e for an engaged row, s' = s for another
        kept = torch.where(taken[:, :, None] > 0, decays[None, :, None], torch.ones(1))
        averages[:active] = averages[:active] * kept + (1.0 - decays)[None, :, None] * vector[:, None, :]
        total[:active] += vector
        count[:active] += taken
    return out


@dataclass(frozen=True)
class Network:
    """f of one outcome: tower(state) . v_i + b_i, plus the users' mean coefficients of the dynamic features."""

    hidden_weight: Tensor
    """(hidden, state_dim)."""
    hidden_bias: Tensor
    tower_weight: Tensor
    """(rank, hidden)."""
    tower_bias: Tensor
    vector: Tensor
    """(n_items, rank): v."""
    bias: Tensor
    """(n_items,): b."""
    dynamic: Tensor
    """(2,): mean coefficient of the two dynamic features; learnt here so that the tower need not imitate them, and
    replaced by the mean of the random effects afterwards."""

    def tower(self, inputs: Tensor) -> Tensor:
        """(rows, state_dim) -> (rows, rank)."""
        hidden = torch.relu(torch.nn.functional.linear(inputs, self.hidden_weight, self.hidden_bias))
        return torch.nn.functional.linear(hidden, self.tower_weight, self.tower_bias)

    def score(self, inputs: Tensor, items: Tensor) -> Tensor:
        """Score f without the dynamic features; inputs (rows, state_dim), items (rows, m) -> (rows, m)."""
        return torch.einsum("rmk,rk->rm", self.vector[items], self.tower(inputs)) + self.bias[items]


class _Learner:
    """The parameters of one `Network` while they are learnt; items borrow strength from their categories."""

    def __init__(
        self, space: ItemSpace, config: ResponseConfig, hidden: int, level: Tensor, generator: torch.Generator
    ):
        n_items, n_categories = space.category.shape
        state_dim = (len(space.decays) + 1) * space.dim + 1

        def normal(*shape: int, sd: float) -> Tensor:
            return (torch.randn(*shape, generator=generator) * sd).requires_grad_()

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape).requires_grad_()

        # the state's entries are small (averages of unit vectors in `dim` dimensions), hence the wide start
        self.hidden_weight = normal(hidden, state_dim, sd=(2.0 * space.dim / state_dim) ** 0.5)
        self.hidden_bias = zeros(hidden)
        self.tower_weight = normal(config.rank, hidden, sd=1.0 / math.sqrt(hidden))
        self.tower_bias = zeros(config.rank)
        self.own_vector = normal(n_items, config.rank, sd=0.05)
        self.category_vector = zeros(n_categories, config.rank)
        self.own_bias = zeros(n_items)
        self.category_bias = zeros(n_categories)
        self.slope = torch.ones(1).requires_grad_()
        self.constant = zeros(1)
        self.dynamic = zeros(2)
        self.space, self.config, self.level = space, config, level

    @property
    def decayed(self) -> list[Tensor]:
        return [self.hidden_weight, self.tower_weight, self.category_vector, self.category_bias]

    @property
    def free(self) -> list[Tensor]:
        own = [self.own_vector, self.own_bias]
        return [self.hidden_bias, self.tower_bias, *own, self.slope, self.constant, self.dynamic]

    def network(self) -> Network:
        """The network that the parameters make, gradients included."""
        space = self.space
        vector = self.own_vector + space.category @ self.category_vector
        bias = self.own_bias + space.category @ self.category_bias + self.slope * self.level + self.constant
        return Network(
            self.hidden_weight,
            self.hidden_bias,
            self.tower_weight,
            self.tower_bias,
            vector,
            bias,
            self.dynamic,
        )

    def averaged(self, average: list[Tensor]) -> Network:
        """The network that averaged parameters make, without gradients."""
        parameters = [*self.decayed, *self.free]
        kept = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, mean in zip(parameters, average, strict=True):
                parameter.copy_(mean)
            network = _frozen(self.network())
            for parameter, own in zip(parameters, kept, strict=True):
                parameter.copy_(own)
        return network

    def penalty(self) -> Tensor:
        """Minus log prior of the items' own parts, of a whole fold."""
        own = (
            self.config.l2_vector * self.own_vector.square().sum() + self.config.l2_bias * self.own_bias.square().sum()
        )
        return 0.5 * own


def _user_vectors(network: Network, space: ItemSpace, inputs: Tensor) -> Tensor:
    """Left factor of the logit as one matrix product: tower and weighted state; (rows, rank + dim)."""
    weight = network.dynamic * space.dynamic_scale
    dynamic = weight[0] * inputs[:, : space.dim] + weight[1] * inputs[:, -space.dim - 1 : -1]
    return torch.cat([network.tower(inputs), dynamic], dim=1)


def _gate_loss(
    network: Network, space: ItemSpace, rows: Rows, inputs: Tensor, index: Tensor, negatives: Tensor
) -> Tensor:
    """Logistic loss of engaged rows against shared negatives with log q put back, summed over rows; a scalar."""
    users = _user_vectors(network, space, inputs[index])
    items = torch.cat([network.vector, space.item_input], dim=1)
    own = rows.item[index]
    positive = (users * items[own]).sum(dim=1) + network.bias[own]
    negative = users @ items[negatives].T + network.bias[negatives]
    correction = math.log(len(negatives) * rows.n_items) + torch.log(space.q)
    usable = ~rows.seen(rows.user[index], rows.rank[index], negatives) & (negatives[None, :] != own[:, None])
    softplus = torch.nn.functional.softplus
    wrong = softplus(negative - correction[negatives]) * usable
    return softplus(-(positive - correction[own])).sum() + wrong.sum()


def _row_loss(network: Network, space: ItemSpace, rows: Rows, inputs: Tensor, index: Tensor, target: Tensor) -> Tensor:
    """Logistic loss of rows with a known answer, summed; a scalar."""
    own = rows.item[index]
    users = _user_vectors(network, space, inputs[index])
    logit = (users * torch.cat([network.vector[own], space.item_input[own]], dim=1)).sum(dim=1) + network.bias[own]
    return torch.nn.functional.binary_cross_entropy_with_logits(logit, target[index], reduction="sum")


def fit_network(
    space: ItemSpace,
    rows: Rows,
    inputs: Tensor,
    *,
    outcome: int,
    sampled: bool,
    config: ResponseConfig,
    seed: int,
    epochs: int | None = None,
    validation: tuple[Rows, Tensor] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Network, int, list[float]]:
    """Mini-batch Adam on the logistic loss of one outcome.

    Args:
        space: Item vectors and features.
        rows: Rows to learn from.
        inputs: `space.inputs(rows)`.
        outcome: Which outcome; later ones use the engaged rows only.
        sampled: The gate's negatives are sampled (a positives-only log).
        config: Settings.
        seed: Seed of this fit.
        epochs: Passes; None = until the loss of `validation` stops falling, keeping the best pass.
        validation: Rows of other users and their inputs.
        tick: Called after each pass.

    Returns:
        The network, the passes it took, and the validation loss per row after each pass.
    """
    generator = torch_generator(seed, "network", outcome)
    usable = torch.ones(rows.n, dtype=torch.bool) if outcome == 0 and not sampled else rows.engaged
    index = torch.nonzero(usable).flatten()
    target = rows.outcome[:, outcome].contiguous()
    gate = outcome == 0 and sampled
    level = space.log_density if gate else outcome_level(rows, outcome)
    learner = _Learner(space, config, config.hidden if outcome == 0 else max(config.hidden // 2, 4), level, generator)
    if not gate:
        rate = float(target[index].mean().clamp(1e-4, 1 - 1e-4)) if len(index) else 0.5
        with torch.no_grad():
            learner.constant += math.log(rate / (1 - rate))
    groups: list[dict[str, Any]] = [
        {"params": learner.decayed, "weight_decay": config.weight_decay, "decoupled_weight_decay": True},
        {"params": learner.free},
    ]
    optimiser = torch.optim.Adam(
        groups,
        lr=config.learning_rate,
        foreach=True,
    )
    check: Callable[[Network], float] | None = None
    if epochs is None and validation is not None:
        check = _validation_loss(space, *validation, outcome=outcome, sampled=sampled, config=config, seed=seed)
    best, best_loss, best_epoch, losses = _frozen(learner.network()), math.inf, 0, list[float]()
    # the average of the last steps generalises better than the last step, and its level is steadier
    parameters = [*learner.decayed, *learner.free]
    average = [parameter.detach().clone() for parameter in parameters]
    limit = config.max_epochs if epochs is None else epochs
    for epoch in range(limit):
        order = index[torch.randperm(len(index), generator=generator)]
        for batch in order.split(config.batch_size):
            network = learner.network()
            if gate:
                negatives = draw_items(space.q, (config.negatives,), generator)
                loss = _gate_loss(network, space, rows, inputs, batch, negatives)
            else:
                loss = _row_loss(network, space, rows, inputs, batch, target)
            loss = loss / len(batch) + learner.penalty() / len(index)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1.0 - config.averaging)
        tick()
        network = learner.averaged(average)
        if check is None:
            best, best_epoch = network, epoch + 1
            continue
        now = check(network)
        losses.append(now)
        # a gain below 0.05 % does not pay for another pass
        if now < best_loss * (1.0 - 5e-4):
            best, best_loss, best_epoch = network, now, epoch + 1
        elif epoch + 1 - best_epoch >= config.patience:
            break
    return (_levelled(best, space, rows, inputs, seed) if gate else best), best_epoch, losses


def _levelled(network: Network, space: ItemSpace, rows: Rows, inputs: Tensor, seed: int) -> Network:
    """The network with a constant that makes it a density ratio: exp(f) averages 1 over uniformly drawn unseen items."""
    generator = torch_generator(seed, "level")
    index = torch.randint(rows.n, (min(rows.n, 4000),), generator=generator)
    items = rows.unseen_items(index, 64, torch.ones(rows.n_items), generator)
    f = network.score(inputs[index], items)
    f = f + space.features(inputs[index], items)[..., -2:] @ network.dynamic
    return Network(**{**vars(network), "bias": network.bias - f.exp().mean().log()})


def outcome_level(rows: Rows, outcome: int) -> Tensor:
    """Logit of each item's smoothed rate of an outcome (a later one: given the gate), around the mean; float32 (n_items,)."""
    usable = rows.engaged if outcome > 0 else torch.ones(rows.n, dtype=torch.bool)
    item, value = rows.item[usable], rows.outcome[usable, outcome].to(torch.float64)
    mean = value.mean().clamp(1e-4, 1 - 1e-4) if len(value) else torch.tensor(0.5, dtype=torch.float64)
    total = torch.zeros(rows.n_items, dtype=torch.float64).index_add_(0, item, value)
    count = torch.bincount(item, minlength=rows.n_items).to(torch.float64)
    rate = (total + 10.0 * mean) / (count + 10.0)
    return (torch.logit(rate) - torch.logit(mean)).to(torch.float32)


def _frozen(network: Network) -> Network:
    return Network(**{name: value.detach().clone() for name, value in vars(network).items()})


def _validation_loss(
    space: ItemSpace, rows: Rows, inputs: Tensor, *, outcome: int, sampled: bool, config: ResponseConfig, seed: int
) -> Callable[[Network], float]:
    """The loss per row on other users, always with the same rows and negatives."""
    generator = torch_generator(seed, "validation", outcome)
    usable = torch.ones(rows.n, dtype=torch.bool) if outcome == 0 and not sampled else rows.engaged
    index = torch.nonzero(usable).flatten()
    index = index[torch.randperm(len(index), generator=generator)[:8192]]
    target = rows.outcome[:, outcome].contiguous()
    negatives = [draw_items(space.q, (config.negatives,), generator) for _ in range(0, len(index), 1024)]

    def loss(network: Network) -> float:
        with torch.no_grad():
            if outcome == 0 and sampled:
                parts = zip(index.split(1024), negatives, strict=False)
                total = sum(float(_gate_loss(network, space, rows, inputs, i, n)) for i, n in parts)
            else:
                total = float(_row_loss(network, space, rows, inputs, index, target))
        return total / max(len(index), 1)

    return loss
