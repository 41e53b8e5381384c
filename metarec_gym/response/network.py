"""One network an outcome, and how it is learnt from fixed states.

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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarec_gym.response.config import ResponseConfig, batch_size_of
from metarec_gym.response.frozen import DYNAMIC_FEATURES
from metarec_gym.response.item_space import ItemSpace
from metarec_gym.response.rows import MAX_SLATE, Rows, draw_items
from metarec_gym.seeding import torch_generator


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
