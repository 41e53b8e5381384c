"""Turns a policy into a small tree by imitation in its own and in the tree's states (DAgger), weighted as in VIPER.

Bastani, Pu and Solar-Lezama, "Verifiable Reinforcement Learning via Policy Extraction" (NeurIPS 2018), Algorithm 1: play, label
the states with what the policy would do, add them to all former ones, fit a tree in which a state weighs
max_a Q(s, a) - min_a Q(s, a), play the tree, and so on; the best tree by its own value counts. Three differences: an exported
policy carries no Q, so the spread of the *expected immediate rewards* of the strategies (training judge) stands for it, which
is short-sighted; requests enter by weight instead of being drawn by it, which has the same mean and less noise; and at the end
smaller trees are fitted to all requests, of which the smallest that loses next to nothing is kept: it is there to be read. A
label is a draw from the policy, so a leaf counts what the policy does there and not only what it does most.

Each tree is fitted twice: to all features, and without those that mirror the policy's own earlier choices. An imitator that sees
them learns to repeat itself instead of why the policy chose (de Haan, Jayaraman and Levine, "Causal Confusion in Imitation
Learning", NeurIPS 2019); which view is better is decided, as there, by the reward of playing both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarec_gym.evaluation.explain.tree import TreeData, TreePolicy, fit_tree
from metarec_gym.evaluation.explain.visits import Stage, Visits, visit
from metarec_gym.evaluation.rollout import Fixed
from metarec_gym.policy import sample_actions
from metarec_gym.seeding import fold_in, mix, stream, uniform

if TYPE_CHECKING:
    from metarec_gym.evaluation.explain.features import Feature
    from metarec_gym.policy import Policy

WEIGHTS = "largest minus smallest expected immediate reward of the strategies in service, by the training judge"
"""What a state weighs, in words."""
KEEP = 0.98
"""The smallest tree is taken that keeps this share of the best tree's lift over the single best strategy on training users."""
OWN_PAST = ("last_strategy", "strategy_count", "strategy_mean_reward")
"""Blocks of the observation that mirror the policy's own earlier choices."""
SIZES = (2, 3, 4, 6, 8, 12)
"""Leaves of the smaller trees."""


@dataclass(frozen=True)
class Candidate:
    """One tree that was fitted.

    Attributes:
        round: Round of the imitation, from 1; 0 for the smaller trees fitted at the end.
        leaves: Its leaves.
        own_past: Whether it may ask about the policy's own earlier choices.
        value: Its expected reward a request on training users, with luck of its own.
        requests: Requests that it was fitted to.
    """

    round: int
    leaves: int
    own_past: bool
    value: float
    requests: int


@dataclass(frozen=True)
class Distilled:
    """The tree and how it came about.

    Attributes:
        tree: The tree that was taken.
        candidates: All trees.
        visits: All requests that trees were fitted to.
    """

    tree: TreePolicy
    candidates: tuple[Candidate, ...]
    visits: Visits


def state_weight(visits: Visits) -> Tensor:
    """What is at stake in each state, max - min of the worth of the strategies in service; float64 (N,)."""
    worth = visits.worth.to(torch.float64)
    best = worth.masked_fill(~visits.mask, -torch.inf).max(dim=1).values
    worst = worth.masked_fill(~visits.mask, torch.inf).min(dim=1).values
    return best - worst


def distil(
    stage: Stage,
    policy: Policy,
    strategies: Sequence[str],
    features: Sequence[Feature],
    *,
    sbs: int,
    max_leaves: int = 16,
    rounds: int = 3,
    meta: dict[str, Any] | None = None,
) -> Distilled:
    """Imitates a policy by a tree.

    Args:
        stage: Training users, their judge and how they are played; each round has luck of its own.
        policy: What is imitated.
        strategies: Strategy names.
        features: The observation in words.
        sbs: The single best strategy, over which lifts are counted.
        max_leaves: Leaves at most.
        rounds: Trees that are fitted; the first to the states of the policy, later ones to those of the trees too.
        meta: Facts that travel with the tree.

    Returns:
        The smallest tree that is nearly as good as the best.
    """
    seen: list[Visits] = []
    actor: Policy = policy
    found: list[tuple[Candidate, TreePolicy]] = []
    check = replace(stage, env_seed=stream(stage.env_seed, "choose a tree"))

    def fit(visits: Visits, label: Tensor, leaves: int, at: int) -> TreePolicy:
        """Fits and plays a tree of either view; returns the better one."""
        data = TreeData(visits.obs, label, state_weight(visits))
        tried = []
        for own_past in (False, True):
            view = [f for f in features if own_past or f.block not in OWN_PAST]
            tree = fit_tree(data, strategies, view, max_leaves=leaves, meta=meta)
            value = float(check.play(tree, 1).expected.mean())
            tried.append((Candidate(at, len(tree.leaves), own_past, value, len(visits.obs)), tree))
        found.extend(tried)
        return max(tried, key=lambda pair: pair[0].value)[1]

    labels: list[Tensor] = []
    for at in range(1, rounds + 1):
        met, _ = visit(replace(stage, env_seed=stream(stage.env_seed, "distil", at)), actor, policy)
        seen.append(met)
        key = fold_in(mix(torch.tensor(stream(stage.env_seed, "labels", at))), torch.arange(len(met.obs)))
        labels.append(sample_actions(met.probs, uniform(key)))
        actor = fit(Visits.join(seen), torch.cat(labels), max_leaves, at)
    every = Visits.join(seen)
    for leaves in (size for size in SIZES if size < max_leaves):
        fit(every, torch.cat(labels), leaves, 0)
    base = float(check.play(Fixed(sbs), 1).expected.mean())
    best = max(c.value for c, _ in found)
    enough = [(c, tree) for c, tree in found if c.value >= best - (1.0 - KEEP) * max(best - base, 0.0)]
    _, tree = min(enough, key=lambda pair: (pair[0].leaves, -pair[0].value))
    return Distilled(tree, tuple(c for c, _ in found), every)
