"""Windows of events of users that the judges have not seen: the log's, and what the world makes from the same point on.

The world's user has the history of the log's user and a taste that the judge guesses from that history alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metarec_gym.data import FOLD_S
from metarec_gym.evaluation.validity.sample import FOLD_NUMBER, FOLDS, judges_of, periods
from metarec_gym.response.frozen import FrozenResponse
from metarec_gym.response.predictive_check import ListsFunction, emit
from metarec_gym.seeding import torch_generator

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset
    from metarec_gym.world import World

NOT_CHOSEN = 60
"""Items that stand for those a user did not choose."""
MAX_CHOICES = 20
"""Newest items of a history that a guess of the user's taste reads."""


@dataclass(frozen=True)
class Windows:
    """Events after a prefix of held-out users: the log's and the world's.

    Attributes:
        user: int64 (n,).
        history: int64 (n, H), the prefix.
        lists: int64 (n, K, M), the strategies' lists at the prefix, -1 where a list has no more items.
        real: int64 (n, E).
        time: float64 (n, E), when the log's events happened.
        made: int64 (R, n, E), what the judge that has not seen these users emits from the same state.
    """

    user: Tensor
    history: Tensor
    lists: Tensor
    real: Tensor
    time: Tensor
    made: Tensor

    def hits(self, items: Tensor, n_items: int) -> Tensor:
        """Share of the events whose item is in each strategy's list; (n, E) or (R, n, E) -> (..., K)."""
        n, k = self.lists.shape[:2]
        listed = torch.zeros(n, k, n_items + 1, dtype=torch.bool)
        listed.scatter_(2, torch.where(self.lists < 0, n_items, self.lists), True)
        listed[:, :, -1] = False
        row = torch.arange(n)[:, None]
        if items.dim() == 2:
            return listed[row, :, items].to(torch.float64).mean(dim=1)
        return torch.stack([listed[row, :, one].to(torch.float64).mean(dim=1) for one in items])


def windows(
    world: World,
    dataset: Dataset,
    lists_fn: ListsFunction,
    *,
    prefix: int,
    events: int,
    list_length: int,
    replicas: int,
    max_users: int,
    seed: int,
    refresh: int = 5,
) -> Windows | None:
    """Windows of users who have enough events; None when there are fewer than two.

    Args:
        world: The world.
        dataset: Its log.
        lists_fn: Ranks the strategies' lists.
        prefix: Engaged items before the window.
        events: Engaged items in it.
        list_length: Items of a list.
        replicas: Windows that the world makes of each one of the log.
        max_users: Users a fold at most.
        seed: Decides users and draws.
        refresh: The emitting user's state is brought up to date after this many events.

    Returns:
        The windows.
    """
    counts = dataset.engaged_counts()
    rows = torch.nonzero(dataset.outcome[:, 0] > 0).flatten()
    first = torch.cumsum(counts, 0) - counts
    parts = []
    for fold, other in (FOLDS, FOLDS[::-1]):
        response = judges_of(world, fold)["judge"]
        users = dataset.users_in(FOLD_NUMBER[other])
        users = users[counts[users] >= prefix + events]
        generator = torch_generator(seed, "windows", fold, prefix)
        users = users[torch.randperm(len(users), generator=generator)[:max_users].sort()[0]]
        for user in users.split(256):
            history = dataset.histories(user, torch.full((len(user),), prefix))
            at = rows[first[user][:, None] + prefix + torch.arange(events)]
            made = _emitted(
                world, response, dataset, user, history, dataset.time[at[:, 0]], events, replicas, refresh, generator
            )
            lists = lists_fn(history, list_length).to(torch.int64)
            parts.append(Windows(user, history, lists, dataset.item[at], dataset.time[at], made))
    if sum(len(part.user) for part in parts) < 2:
        return None
    joined = {n: torch.cat([getattr(part, n) for part in parts]) for n in ("user", "history", "lists", "real", "time")}
    return Windows(**joined, made=torch.cat([part.made for part in parts], dim=1))


def _emitted(
    world: World,
    response: FrozenResponse,
    dataset: Dataset,
    user: Tensor,
    history: Tensor,
    time: Tensor,
    events: int,
    replicas: int,
    refresh: int,
    generator: torch.Generator,
) -> Tensor:
    """Events that users take from these histories on, their taste being guessed from the history; int64 (R, n, events)."""
    n = len(user)
    state = response.start(history)
    seen = torch.zeros(n, dataset.n_items, dtype=torch.bool)
    if history.shape[1] > 0:
        seen.scatter_(1, history, True)
    period = periods(world, time)
    centre, factor = taste_given_history(response, user, history, period, generator)
    found = []
    for replica in range(replicas):
        noise = torch.randn(n, centre.shape[1], 1, generator=generator)
        z = centre + (factor @ noise)[..., 0]
        # members take turns among the users
        member = (torch.arange(n) + replica) % response.n_members
        items = emit(
            response, state, z, seen, events, refresh=refresh, generator=generator, member=member, period=period
        )
        found.append(items)
    return torch.stack(found)


def taste_given_history(
    response: FrozenResponse, user: Tensor, history: Tensor, period: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the judge makes of an unseen user's taste from the history alone: a normal approximation of the gate's z.

    Each item of the history was chosen among those not yet taken, of which a uniform sample stands for all; the prior is the
    one in the judge's table. Newton's method in v, where z = mean + factor v and v is standard normal a priori.

    Args:
        response: The judge.
        user: int64 (n,).
        history: int64 (n, H), whole histories of equal length.
        period: int64 (n,), the date at which they end.
        generator: Draws the items that were not chosen.

    Returns:
        Mean float32 (n, n_features), and a factor of the covariance (n, n_features, n_features).
    """
    mean, factor = response.tensors["effect_mean"][user], response.tensors["effect_chol"][user, 0]
    n, width = history.shape
    if width == 0:
        return mean[:, 0], factor
    scale = response.tensors["calibration"][:, 0, 0].mean()
    base, direction = [], []
    # the newest items say most, and bound the work
    for k in range(max(width - MAX_CHOICES, 0), width):
        unseen = torch.ones(n, response.n_items).scatter_(1, history[:, : k + 1], 0.0)
        others = torch.multinomial(unseen, NOT_CHOSEN, replacement=True, generator=generator)
        items = torch.cat([history[:, k : k + 1], others], dim=1)
        state = response.start(history[:, :k])
        p = response.conditional_probs(state, mean, items, period=period, position=False)[..., 0]
        base.append(torch.logit(p.clamp(1e-9, 1.0 - 1e-6)))
        direction.append(scale * (response.features(response.inputs(state), items, period) @ factor))
    logit, slope = torch.stack(base, dim=1), torch.stack(direction, dim=1)
    v = torch.zeros(n, factor.shape[2])
    eye = torch.eye(factor.shape[2])
    # one item not chosen stands for many: with the chosen one they share the probability as all items would
    share = torch.full((1 + NOT_CHOSEN,), math.log(max(response.n_items - width, 1) / NOT_CHOSEN))
    share[0] = 0.0
    for _ in range(6):
        q = torch.softmax(logit + torch.einsum("npmf,nf->npm", slope, v) + share, dim=2)
        expected = torch.einsum("npm,npmf->npf", q, slope)
        gradient = (slope[:, :, 0] - expected).sum(dim=1) - v
        second = torch.einsum("npm,npmf,npmg->nfg", q, slope, slope)
        precision = eye + second - torch.einsum("npf,npg->nfg", expected, expected)
        v = v + torch.linalg.solve(precision, gradient[..., None])[..., 0].clamp(-1.0, 1.0)
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    return mean[:, 0] + (factor @ v[..., None])[..., 0], factor @ root


FEATURES = (
    "log_popularity_mean",
    "log_popularity_sd",
    "log_popularity_step",
    "category_entropy",
    "category_repeats",
    "category_closeness_to_history",
    "taste_closeness_in_a_row",
    "taste_closeness_to_history",
    "age_years_mean",
    "age_years_sd",
)
"""What a window is described by, beside each strategy's hits."""


def window_features(world: World, dataset: Dataset, found: Windows, items: Tensor) -> Tensor:
    """Describes windows for the two-sample test; items (n, E) -> float64 (n, n_features + K)."""
    rows = dataset.rows_of(dataset.users_in(FOLD_S))
    counts = torch.bincount(dataset.item[rows][dataset.outcome[rows, 0] > 0], minlength=dataset.n_items)
    popularity = torch.log1p(counts.to(torch.float64))[items]
    category, taste = world.tensors["item_category"], world.tensors["item_taste"]
    shares = category[items].mean(dim=1)
    history = found.history
    past = _mean_of(category, history)
    in_a_row = torch.nn.functional.cosine_similarity(taste[items][:, 1:], taste[items][:, :-1], dim=-1).mean(dim=1)
    to_history = torch.nn.functional.cosine_similarity(taste[items].mean(dim=1), _mean_of(taste, history), dim=-1)
    age = (found.time - dataset.item_release[items]) / (365.25 * 86_400.0)
    known = ~torch.isnan(age)
    n_known = known.sum(dim=1).clamp(min=1)
    age_mean = torch.where(known, age, 0.0).sum(dim=1) / n_known
    age_sd = (torch.where(known, age - age_mean[:, None], 0.0).square().sum(dim=1) / n_known).sqrt()
    columns = [
        popularity.mean(dim=1),
        popularity.std(dim=1),
        (popularity[:, 1:] - popularity[:, :-1]).abs().mean(dim=1),
        -(shares * torch.log(shares.clamp(min=1e-12))).sum(dim=1),
        ((category[items][:, 1:] * category[items][:, :-1]).sum(dim=-1) > 0).to(torch.float64).mean(dim=1),
        torch.nn.functional.cosine_similarity(shares, past, dim=-1),
        in_a_row,
        to_history,
        age_mean,
        age_sd,
    ]
    described = torch.stack([column.to(torch.float64) for column in columns], dim=1)
    return torch.cat([described, found.hits(items, dataset.n_items)], dim=1)


def _mean_of(table: Tensor, history: Tensor) -> Tensor:
    valid = (history >= 0).to(table.dtype)[..., None]
    if history.shape[1] == 0:
        return torch.zeros(len(history), table.shape[1])
    return (table[history.clamp(min=0)] * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1.0)
