"""Items as vectors and features, and prefixes of histories as states: fixed before anything is learnt.

The state of a prefix does not depend on what is learnt (decays and item vectors are fixed before), so all prefix states are
computed once and learning is a network on fixed inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metarec_gym.response.rows import Rows, period_starts
from metarec_gym.seeding import numpy_rng, torch_generator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from metarec_gym.data.dataset import Dataset
    from metarec_gym.response.config import ResponseConfig

STATIC_FEATURES = ("intercept", "log_popularity", "age")
"""The first entries of phi; some categories, the trend and the two co-occurrence features follow."""
_YEAR_S = 365.25 * 86_400.0


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
