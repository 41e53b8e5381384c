"""What the judge learns from: prefixes of the fold's users, their items as vectors and features, and one network an outcome.

The state of a prefix does not depend on what is learnt (decays and item vectors are fixed before), so all prefix states are
computed once and learning is a network on fixed inputs.

Gate of a positives-only log: each engaged event is a choice among the items that the user had not engaged with. Negatives
are drawn from a sampler q, and their log q is put back into the logit, so that f is a log density ratio:

    f(state, item) = log( n_items * P(the next engaged item is `item` | state) )
    logit(positive against M draws) = f - log(M q n_items)

Two families answer the same question with as little in common as the data allow. `network`: a tower on the recurrent state and
learnt item vectors, next to items' biases and the named features. `mixed_logit`: McFadden's mixed logit, items' biases and the
named features alone, on other item vectors and other decays (`SECOND_FAMILY`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from metarec_gym.response.frozen import DYNAMIC_FEATURES, EXPOSURE_DECAY
from metarec_gym.seeding import numpy_rng, torch_generator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from metarec_gym.data.dataset import Dataset

STATIC_FEATURES = ("intercept", "log_popularity", "age")
"""The first entries of phi; some categories, the trend and the two co-occurrence features follow."""
MAX_SLATE = 64
"""Positions for which a position effect is stored."""
MAX_PERIODS = 24
"""Most periods that a log is cut into."""
PERIOD_DAYS = 30.0
"""Length of a period, longer where the log would have more than `MAX_PERIODS`."""
_DENSE_CELLS = 50_000_000
"""Up to this many (user, item) cells the order of engagement is kept as a dense table (200 MB)."""
_DAY_S = 86_400.0
_YEAR_S = 365.25 * _DAY_S


@dataclass(frozen=True)
class ResponseConfig:
    """How a judge is fitted; every default was chosen on inner validation users of MovieLens-100K's folds."""

    family: Literal["network", "mixed_logit"] = "network"
    """`network`: a tower on the recurrent state and learnt item vectors; `mixed_logit`: items' biases and features alone."""
    item_vectors: Literal["ppmi", "user_item"] = "ppmi"
    """Item vectors of the recurrence, by truncated SVD: of the PPMI of items close together in a history, beside taste vectors,
    or of the normalised user x item matrix alone, which knows no order."""
    dim: int = 32
    """Length of these item vectors."""
    taste_dim: int = 32
    """Length of the taste vectors beside the PPMI ones: what the same users take, near or far apart. A window sees what comes in
    a row; on MovieLens-100K the cosine over whole users is what it misses (held-out log-loss .1320 -> .1304)."""
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
    batch_size: int | None = None
    """Prefixes a mini-batch; None = 512 up to 100,000 rows, 2,048 above: on MovieLens-1M's folds as good in little more than half
    the time, and better for outcomes that are learnt in one pass."""
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
    inner_folds: int | None = None
    """Inner user folds: all that describes users is fitted on predictions for users the network has not seen. None = 8 up to
    1,000 users, 4 above: networks of 3/4 of 311 users were so much flatter than the whole fold's that its probabilities came out
    9 % too low; with many users the last quarter changes little."""
    category_features: int = 8
    """Categories in phi, for which users have random coefficients: those that split the fold's events most evenly."""
    effect_negatives: int = 48
    """Negatives per event in the fit of the random effects and in the calibration."""
    effect_rounds: int = 12
    """Most rounds of (modes, covariance) in the fit of the random effects."""
    popularity_prior: float = 2.0
    """Events added to every item's count before the logarithm."""
    trend_prior: float = 2.0
    """Events an average item's share in a period is smoothed with; infinity = no dated feature."""
    rare_positives_per_item: float = 1.0
    """A later outcome with fewer positives than this per item of the catalogue is rare: its network is stacked on the outcome's
    popularity (`stacking`) before anything else is estimated, and it keeps its own scale. 0 = no outcome is."""
    base_rate: float | None = None
    """Probability that a user takes an unseen item drawn uniformly; None = the log's density. Unused with impressions."""


def batch_size_of(config: ResponseConfig, n_rows: int) -> int:
    """Prefixes a mini-batch of a fit on `n_rows` rows."""
    if config.batch_size is not None:
        return config.batch_size
    return 512 if n_rows <= 100_000 else 2048


def inner_folds_of(config: ResponseConfig, n_users: int) -> int:
    """Inner user folds of a fit on `n_users` users."""
    if config.inner_folds is not None:
        return config.inner_folds
    return 8 if n_users <= 1000 else 4


SECOND_FAMILY = ResponseConfig(
    family="mixed_logit",
    item_vectors="user_item",
    dim=48,
    decays=(0.5, 0.95),
    category_features=16,
    learning_rate=2e-2,
)
"""A judge that shares neither f nor the item space with the default one: the final table is scored by it again."""


def period_starts(dataset: Dataset) -> Tensor:
    """When each period of the log begins, unix seconds; float64 (n_periods,). Only the log's first and last time decide it."""
    first, last = float(dataset.time.min()), float(dataset.time.max())
    count = min(max(round((last - first) / (PERIOD_DAYS * _DAY_S)), 1), MAX_PERIODS)
    return first + (last - first) / count * torch.arange(count, dtype=torch.float64)


def period_of(starts: Tensor, time_s: Tensor) -> Tensor:
    """The period of each time; a time before the first is in it. float64 (n,) -> int64 (n,)."""
    found: Tensor = torch.searchsorted(starts, time_s.contiguous(), right=True) - 1
    return found.clamp(min=0)


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
    period: Tensor
    """int64 (n,): period of the log (`period_starts`)."""
    position: Tensor
    """int64 (n,): place in the slate; 0 where the log does not say."""
    exposure: Tensor
    """float32 (n,): exposure to the item's categories earlier in the session; 0 where the log has no impressions."""
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
        return cls(
            users,
            user,
            dataset.item[rows],
            dataset.outcome[rows],
            rank,
            period_of(period_starts(dataset), dataset.time[rows]),
            torch.zeros_like(user) if dataset.position is None else dataset.position[rows].clamp(0, MAX_SLATE - 1),
            category_exposure(dataset, rows),
            dataset.n_items,
        )

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

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on `device` (self when they are there already)."""
        if self.user.device == torch.device(device):
            return self
        names = ("users", "user", "item", "outcome", "rank", "period", "position", "exposure")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved, _cache={})

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
            self.period[rows],
            self.position[rows],
            self.exposure[rows],
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
                if "transposed" not in self._cache:
                    self._cache["transposed"] = first.T.contiguous()
                taken = self._cache["transposed"][items].T[user]
            else:
                taken = first[user[:, None], items]
            return taken < rank[:, None]
        keys, ranks = self._sorted_keys()
        asked = user[:, None] * self.n_items + items
        place = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
        return (keys[place] == asked) & (ranks[place] < rank[:, None])

    def _first_rank(self) -> Tensor:
        if "first" not in self._cache:
            keys, ranks = self._sorted_keys()
            never = torch.iinfo(torch.int32).max
            first = torch.full((self.n_users * self.n_items,), never, dtype=torch.int32, device=keys.device)
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


def category_exposure(dataset: Dataset, rows: Tensor) -> Tensor:
    """Exposure to each row's categories by the slates shown before in the session, as the environment counts it.

    Rows of one session with the same time are one slate. A slate adds the mean of its items' category shares, and what was there
    before fades by `EXPOSURE_DECAY`.

    Args:
        dataset: The log.
        rows: int64 (n,), ascending row indices, whole users.

    Returns:
        float32 (n,); zeros where the log has no impressions or no categories.
    """
    category = dataset.item_category
    if not dataset.has_impressions or category.shape[1] == 0 or len(rows) == 0:
        return torch.zeros(len(rows))
    category = category / category.sum(dim=1, keepdim=True).clamp(min=1.0)
    user, session, time_s, item = (x[rows] for x in (dataset.user, dataset.session, dataset.time, dataset.item))
    # rows of a session need not be adjacent when the log gave session ids: they are put together, in time order
    order = torch.argsort(session, stable=True)
    order = order[torch.argsort(user[order], stable=True)]
    user, session, time_s, item = user[order], session[order], time_s[order], item[order]
    new_session = torch.ones(len(rows), dtype=torch.bool)
    new_session[1:] = (user[1:] != user[:-1]) | (session[1:] != session[:-1])
    new_slate = new_session.clone()
    new_slate[1:] |= time_s[1:] != time_s[:-1]
    slate = torch.cumsum(new_slate, dim=0) - 1
    mean = torch.zeros(int(slate[-1]) + 1, category.shape[1]).index_add_(0, slate, category[item])
    mean = mean / torch.bincount(slate)[:, None]
    # slates of all sessions side by side: one step of the recurrence serves every session that is long enough
    of_session = (torch.cumsum(new_session, dim=0) - 1)[new_slate]
    lengths = torch.bincount(of_session)
    first = torch.cumsum(lengths, dim=0) - lengths
    before = torch.zeros_like(mean)
    for step in range(1, int(lengths.max())):
        at = first[lengths > step] + step
        before[at] = EXPOSURE_DECAY * before[at - 1] + mean[at - 1]
    exposure = torch.empty(len(rows))
    exposure[order] = (category[item] * before[slate]).sum(dim=1)
    return exposure


def draw_items(q: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Items drawn from `q` by its inverse distribution function, with numbers of the CPU's generator; int64 of `shape`."""
    cumulative = torch.cumsum(q.to(torch.float64), dim=0)
    draw = torch.rand(shape, generator=generator, dtype=torch.float64).to(q.device) * cumulative[-1]
    return torch.searchsorted(cumulative, draw, right=True).clamp(max=len(q) - 1)


@dataclass(frozen=True)
class ItemSpace:
    """Fixed before anything is learnt: item vectors, static features, scale of the dynamic ones; from the given rows alone."""

    item_input: Tensor
    """float32 (n_items, dim): PPMI and taste vectors, of norm 1 at most each, small for rare items, zero for unseen ones."""
    decays: Tensor
    """float32 (n_decays,)."""
    static_features: Tensor
    """float32 (n_items, 3 + n): intercept, log popularity, age, n categories (0 or 1, centred)."""
    trend: Tensor
    """float32 (n_periods, n_items): log popularity in the period before against all time, standardised; row 0 is 0."""
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

    def to(self, device: torch.device | str) -> ItemSpace:
        """The same space on `device`."""
        return ItemSpace(**{name: value.to(device) for name, value in vars(self).items()})

    def inputs(self, rows: Rows) -> Tensor:
        """What the network reads at each row: `FrozenResponse.inputs` of the state before it; (n, state_dim)."""
        return prefix_inputs(self.item_input, self.decays, rows)

    def features(self, inputs: Tensor, items: Tensor, period: Tensor) -> Tensor:
        """phi: inputs (rows, state_dim), items (rows, m) and period (rows,) -> (rows, m, n_features)."""
        vectors = self.item_input[items]
        recent = torch.einsum("rmd,rd->rm", vectors, inputs[:, : self.dim])
        whole = torch.einsum("rmd,rd->rm", vectors, inputs[:, -self.dim - 1 : -1])
        dynamic = torch.stack([recent, whole], dim=-1) * self.dynamic_scale
        trend = self.trend[period[:, None], items][..., None]
        return torch.cat([self.static_features[items], trend, dynamic], dim=-1)


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
    if config.item_vectors == "ppmi":
        near = _ppmi_vectors(rows, config.dim, config.window, seed)
        item_input = torch.cat([near, _taste_vectors(rows, config.taste_dim, seed)], dim=1)
    else:
        item_input = _user_item_vectors(rows, config.dim, seed)
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
        trend=_trend(rows, len(period_starts(dataset)), config.trend_prior),
        dynamic_scale=torch.ones(2),
        log_density=log_density.to(torch.float32),
        category=dataset.item_category / norm.clamp(min=1.0),
        q=(q / q.sum()).to(torch.float32),
    )
    generator = torch_generator(seed, "dynamic_scale")
    index = torch.randint(rows.n, (min(rows.n, 4000),), generator=generator)
    inputs = space.inputs(rows)[index]
    items = torch.randint(rows.n_items, (len(index), 16), generator=generator)
    spread = space.features(inputs, items, rows.period[index])[..., -2:].flatten(0, 1).std(dim=0)
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


def _trend(rows: Rows, n_periods: int, prior: float) -> Tensor:
    """Log of each item's share of the engaged events of the period before, relative to its share of all; (n_periods, n_items).

    The share of a period is smoothed by `prior * n_items` events that are spread as all events are. Dividing by the standard
    deviation over items and periods makes one coefficient mean as much as that of another feature.
    """
    engaged = rows.engaged
    item, period = rows.item[engaged], rows.period[engaged]
    trend = torch.zeros(n_periods, rows.n_items, dtype=torch.float64)
    if n_periods == 1 or not math.isfinite(prior) or len(item) == 0:
        return trend.to(torch.float32)
    count = torch.bincount(period * rows.n_items + item, minlength=n_periods * rows.n_items).to(torch.float64)
    count = count.view(n_periods, rows.n_items)
    # an item nobody took in the fold has trend 0: its share is the smoothing's
    overall = count.sum(dim=0) + 1e-3
    overall = overall / overall.sum()
    weight = prior * rows.n_items
    before = count[:-1]
    smoothed = (before + weight * overall) / (before.sum(dim=1, keepdim=True) + weight)
    trend[1:] = torch.log(smoothed / overall)
    # rarely met items all lie near 0: the spread of the events' own items is what a coefficient meets
    spread = trend[period, item].std(unbiased=False)
    return (trend / spread if float(spread) > 1e-6 else torch.zeros_like(trend)).to(torch.float32)


def _user_item_vectors(rows: Rows, dim: int, seed: int) -> Tensor:
    """Right singular vectors of the user x item matrix, each entry over the root of its row's and column's sums."""
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import svds

    engaged = rows.engaged
    pair = torch.unique(rows.user[engaged] * rows.n_items + rows.item[engaged]).numpy()
    user, item = pair // rows.n_items, pair % rows.n_items
    by_user, by_item = np.bincount(user, minlength=rows.n_users), np.bincount(item, minlength=rows.n_items)
    value = 1.0 / np.sqrt(by_user[user] * by_item[item])
    matrix = coo_matrix((value, (user, item)), shape=(rows.n_users, rows.n_items)).tocsr()
    vectors = np.zeros((rows.n_items, dim), dtype=np.float64)
    smallest = min(matrix.shape)
    # the first singular vectors say how often users and items occur, which the biases know already
    kept = min(dim + 1, smallest)
    if kept < smallest - 1 and smallest > 100:
        start = numpy_rng(seed, "user_item_svd").standard_normal(smallest)
        _, s, v = svds(matrix, k=kept, v0=start)
    else:
        _, s, v = np.linalg.svd(matrix.toarray(), full_matrices=False)
        s, v = s[:kept], v[:kept]
    order = np.argsort(-s)[1:]
    # over the root of the popularity: columns of the normalised matrix are about as long as their items are popular
    found = v[order].T * s[order] / np.sqrt(np.maximum(by_item, 1))[:, None]
    vectors[:, : found.shape[1]] = found
    return _shortened(vectors, by_item)


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
    return _shortened(vectors, np.bincount(item, minlength=n))


def _taste_vectors(rows: Rows, dim: int, seed: int) -> Tensor:
    """Vectors whose inner products are the items' cosines over users, the rare items' shortened: a truncated SVD."""
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import svds

    keys = torch.unique((rows.user * rows.n_items + rows.item)[rows.engaged])
    user, item = (keys // rows.n_items).numpy(), (keys % rows.n_items).numpy()
    counts = np.bincount(item, minlength=rows.n_items)
    shape = (rows.n_users, rows.n_items)
    matrix = coo_matrix((1.0 / np.sqrt(counts[item] + 5.0), (user, item)), shape=shape).tocsr()
    vectors = np.zeros((rows.n_items, dim))
    if matrix.nnz > 0 and dim > 0:
        if min(shape) > 2 * dim:
            start = numpy_rng(seed, "taste_svd").standard_normal(min(shape))
            u, s, _ = svds(matrix, k=dim, v0=start)
        else:
            u, s, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
        order = np.argsort(-s)[:dim]
        # as a product with the users' sides, so that an item without events gets exact zeros
        vectors[:, : len(order)] = matrix.T @ u[:, order]
    return torch.from_numpy(vectors.astype(np.float32))


def _shortened(vectors: NDArray[np.float64], counts: NDArray[np.int64]) -> Tensor:
    """Vectors of unit length, but a vector seen in few histories is mostly noise: it is shortened towards 0."""
    import numpy as np

    length = np.linalg.norm(vectors, axis=1)
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
    d, n_decays, device = item_input.shape[1], len(decays), item_input.device
    out = torch.empty(rows.n, (n_decays + 1) * d + 1, device=device)
    lengths = torch.bincount(rows.user, minlength=rows.n_users)
    starts = torch.cumsum(lengths, dim=0) - lengths
    order = torch.argsort(lengths, descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    averages = torch.zeros(rows.n_users, n_decays, d, device=device)
    total, count = torch.zeros(rows.n_users, d, device=device), torch.zeros(rows.n_users, 1, device=device)
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
        kept = torch.where(taken[:, :, None] > 0, decays[None, :, None], 1.0)
        averages[:active] = averages[:active] * kept + (1.0 - decays)[None, :, None] * vector[:, None, :]
        total[:active] += vector
        count[:active] += taken
    return out


@dataclass(frozen=True)
class Network:
    """f of one outcome: tower(state) . v_i + b_i, plus the users' mean coefficients of the dynamic features.

    A mixed logit has a tower of zeros.
    """

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
    """(3,): mean coefficient of the dynamic features; learnt here so that the tower need not imitate them, and
    replaced by the mean of the random effects afterwards."""
    shown: Tensor
    """(MAX_SLATE,): effect of the places after the first, and last of exposure; learnt here so that the items' own parts are
    free of where they were shown, and fitted again on predictions for unseen users. 0 without impressions."""

    def to(self, device: torch.device | str) -> Network:
        """The same network on `device`."""
        return Network(**{name: value.to(device) for name, value in vars(self).items()})

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
        self,
        space: ItemSpace,
        config: ResponseConfig,
        hidden: int,
        level: Tensor,
        generator: torch.Generator,
        *,
        shown: bool,
    ):
        n_items, n_categories = space.category.shape
        state_dim = (len(space.decays) + 1) * space.dim + 1
        self.towered, rank, device = config.family == "network", config.rank, space.item_input.device

        def normal(*shape: int, sd: float) -> Tensor:
            return (torch.randn(*shape, generator=generator) * sd).to(device).requires_grad_()

        def fixed(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        def zeros(*shape: int) -> Tensor:
            return fixed(*shape).requires_grad_()

        if self.towered:
            # the state's entries are small (averages of unit vectors in `dim` dimensions), hence the wide start
            self.hidden_weight = normal(hidden, state_dim, sd=(2.0 * space.dim / state_dim) ** 0.5)
            self.hidden_bias = zeros(hidden)
            self.tower_weight = normal(rank, hidden, sd=1.0 / math.sqrt(hidden))
            self.tower_bias = zeros(rank)
            self.own_vector = normal(n_items, rank, sd=0.05)
            self.category_vector = zeros(n_categories, rank)
        else:
            self.hidden_weight, self.hidden_bias = fixed(1, state_dim), fixed(1)
            self.tower_weight, self.tower_bias = fixed(1, 1), fixed(1)
            self.own_vector, self.category_vector = fixed(n_items, 1), fixed(n_categories, 1)
        self.own_bias = zeros(n_items)
        self.category_bias = zeros(n_categories)
        self.slope = torch.ones(1, device=device).requires_grad_()
        self.constant = zeros(1)
        self.dynamic = zeros(len(DYNAMIC_FEATURES))
        self.shown = zeros(MAX_SLATE) if shown else fixed(MAX_SLATE)
        self.space, self.config, self.level = space, config, level

    @property
    def decayed(self) -> list[Tensor]:
        tower = [self.hidden_weight, self.tower_weight, self.category_vector] if self.towered else []
        return [*tower, self.category_bias]

    @property
    def free(self) -> list[Tensor]:
        tower = [self.hidden_bias, self.tower_bias, self.own_vector] if self.towered else []
        shown = [self.shown] if self.shown.requires_grad else []
        return [*tower, self.own_bias, self.slope, self.constant, self.dynamic, *shown]

    def network(self) -> Network:
        """The network that the parameters make, gradients included."""
        space = self.space
        vector = self.own_vector + space.category @ self.category_vector if self.towered else self.own_vector
        bias = self.own_bias + space.category @ self.category_bias + self.slope * self.level + self.constant
        return Network(
            self.hidden_weight,
            self.hidden_bias,
            self.tower_weight,
            self.tower_bias,
            vector,
            bias,
            self.dynamic,
            self.shown,
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
        own = self.config.l2_bias * self.own_bias.square().sum()
        if self.towered:
            own = own + self.config.l2_vector * self.own_vector.square().sum()
        return 0.5 * own


def _user_vectors(network: Network, space: ItemSpace, inputs: Tensor, period: Tensor) -> Tensor:
    """Left factor of the logit as one matrix product; (rows, rank + dim + n_periods + 1)."""
    weight = network.dynamic[1:] * space.dynamic_scale
    dynamic = weight[0] * inputs[:, : space.dim] + weight[1] * inputs[:, -space.dim - 1 : -1]
    dated = torch.nn.functional.one_hot(period, len(space.trend)).to(inputs.dtype) * network.dynamic[0]
    return torch.cat([network.tower(inputs), dynamic, dated, torch.ones_like(inputs[:, :1])], dim=1)


def _item_vectors(network: Network, space: ItemSpace) -> Tensor:
    """Right factor of the logit; (n_items, rank + dim + n_periods + 1)."""
    return torch.cat([network.vector, space.item_input, space.trend.T, network.bias[:, None]], dim=1)


def _gate_loss(
    network: Network, space: ItemSpace, rows: Rows, inputs: Tensor, index: Tensor, negatives: Tensor
) -> Tensor:
    """Logistic loss of engaged rows against shared negatives with log q put back; (len(index),)."""
    users = _user_vectors(network, space, inputs[index], rows.period[index])
    items, own = _item_vectors(network, space), rows.item[index]
    # an embedding's backward pass adds in a fixed order whatever the number of threads; that of indexing does not
    embedding = torch.nn.functional.embedding
    positive = (users * embedding(own, items)).sum(dim=1)
    negative = users @ embedding(negatives, items).T
    correction = math.log(len(negatives) * rows.n_items) + torch.log(space.q)
    usable = ~rows.seen(rows.user[index], rows.rank[index], negatives) & (negatives[None, :] != own[:, None])
    softplus = torch.nn.functional.softplus
    wrong = softplus(negative - correction[negatives]) * usable
    return softplus(-(positive - correction[own])) + wrong.sum(dim=1)


def _row_loss(network: Network, space: ItemSpace, rows: Rows, inputs: Tensor, index: Tensor, target: Tensor) -> Tensor:
    """Logistic loss of rows with a known answer in [0, 1]; (len(index),)."""
    users = _user_vectors(network, space, inputs[index], rows.period[index])
    own = torch.nn.functional.embedding(rows.item[index], _item_vectors(network, space))
    logit = (users * own).sum(dim=1) + shown_logit(network.shown, rows.position[index], rows.exposure[index])
    return torch.nn.functional.binary_cross_entropy_with_logits(logit, target[index], reduction="none")


def shown_logit(shown: Tensor, position: Tensor, exposure: Tensor) -> Tensor:
    """What place and fatigue add to the gate's logit.

    Args:
        shown: (MAX_SLATE,): effects of positions 1, 2, ... against position 0, and last the weight of exposure.
        position: int64 (n,), 0..MAX_SLATE-1.
        exposure: float32 (n,).

    Returns:
        (n,).
    """
    place = torch.cat([torch.zeros_like(shown[:1]), shown[:-1]])
    return torch.nn.functional.embedding(position, place[:, None])[:, 0] + shown[-1] * exposure


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
    user_weight: Tensor | None = None,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Network, int, list[float]]:
    """Mini-batch Adam on the logistic loss of one outcome, on the device of `space`; all draws are made on the CPU.

    Args:
        space: Item vectors and features.
        rows: Rows to learn from, on the same device.
        inputs: `space.inputs(rows)`.
        outcome: Which outcome; later ones use the engaged rows only.
        sampled: The gate's negatives are sampled (a positives-only log).
        config: Settings.
        seed: Seed of this fit.
        epochs: Passes; None = until the loss of `validation` stops falling, keeping the best pass.
        validation: Rows of other users and their inputs.
        user_weight: float32 (n_users,), how much each user's rows count, 1 on average; None = all the same.
        tick: Called after each pass.

    Returns:
        The network, the passes it took, and the validation loss per row after each pass.
    """
    generator, batch_size = torch_generator(seed, "network", outcome), batch_size_of(config, rows.n)
    index = _learnt_rows(rows, outcome, sampled)
    target = rows.outcome[:, outcome].contiguous()
    gate = outcome == 0 and sampled
    level = space.log_density if gate else outcome_level(rows, outcome)
    hidden = config.hidden if outcome == 0 else max(config.hidden // 2, 4)
    shown = outcome == 0 and not sampled and bool((rows.position > 0).any() | (rows.exposure > 0).any())
    learner = _Learner(space, config, hidden, level, generator, shown=shown)
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
        order = index[torch.randperm(len(index), generator=generator).to(index.device)]
        for batch in order.split(batch_size):
            network = learner.network()
            if gate:
                negatives = draw_items(space.q, (config.negatives,), generator)
                loss = _gate_loss(network, space, rows, inputs, batch, negatives)
            else:
                loss = _row_loss(network, space, rows, inputs, batch, target)
            if user_weight is not None:
                loss = loss * user_weight[rows.user[batch]]
            loss = loss.mean() + learner.penalty() / len(index)
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


def _learnt_rows(rows: Rows, outcome: int, sampled: bool) -> Tensor:
    """The rows that an outcome is learnt from: for a gate with impressions all of them, otherwise the engaged ones."""
    usable = torch.ones_like(rows.engaged) if outcome == 0 and not sampled else rows.engaged
    return torch.nonzero(usable).flatten()


def _levelled(network: Network, space: ItemSpace, rows: Rows, inputs: Tensor, seed: int) -> Network:
    """The network with a constant that makes it a density ratio: exp(f) averages 1 over uniformly drawn unseen items."""
    generator = torch_generator(seed, "level")
    index = torch.randint(rows.n, (min(rows.n, 4000),), generator=generator).to(inputs.device)
    items = rows.unseen_items(index, 64, torch.ones(rows.n_items, device=inputs.device), generator)
    f = network.score(inputs[index], items)
    dynamic = space.features(inputs[index], items, rows.period[index])[..., -len(DYNAMIC_FEATURES) :]
    f = f + dynamic @ network.dynamic
    return Network(**{**vars(network), "bias": network.bias - f.exp().mean().log()})


def outcome_level(rows: Rows, outcome: int) -> Tensor:
    """Logit of each item's smoothed rate of an outcome (a later one: given the gate), around the mean; float32 (n_items,)."""
    usable = rows.engaged if outcome > 0 else torch.ones_like(rows.engaged)
    item, value = rows.item[usable], rows.outcome[usable, outcome].to(torch.float64)
    mean = value.mean().clamp(1e-4, 1 - 1e-4) if len(value) else torch.full_like(value.sum(), 0.5)
    total = torch.zeros(rows.n_items, dtype=torch.float64, device=item.device).index_add_(0, item, value)
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
    index = _learnt_rows(rows, outcome, sampled)
    index = index[torch.randperm(len(index), generator=generator)[:8192].to(index.device)]
    target = rows.outcome[:, outcome].contiguous()
    negatives = [draw_items(space.q, (config.negatives,), generator) for _ in range(0, len(index), 1024)]

    def loss(network: Network) -> float:
        with torch.no_grad():
            if outcome == 0 and sampled:
                parts = zip(index.split(1024), negatives, strict=False)
                total = sum(float(_gate_loss(network, space, rows, inputs, i, n).sum()) for i, n in parts)
            else:
                total = float(_row_loss(network, space, rows, inputs, index, target).sum())
        return total / max(len(index), 1)

    return loss
