"""A world of any size with random tables: what a step costs hangs on the tables' shapes, not on what stands in them.

Nothing is fitted, so 1 M items take seconds. Shapes are those of the MovieLens-100K world unless a field says otherwise. For
measuring speed and memory only: what a policy earns here means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metarec_gym.response.frozen import DYNAMIC_FEATURES, FrozenResponse, untimed
from metarec_gym.seeding import torch_generator
from metarec_gym.world import World
from metarec_gym.world_synthetic import ramp_scores


@dataclass(frozen=True)
class RandomWorld:
    """Sizes of a random world."""

    n_items: int = 1_682
    """Items of the catalogue."""
    n_strategies: int = 10
    """Strategies; each has its own list for every start state."""
    slate_size: int = 5
    """Items a request."""
    horizon: int = 33
    """Requests an episode; lists hold horizon * slate_size items."""
    n_users: int = 1_000
    """Users, half of them in fold A, half in fold B."""
    starts_per_user: int = 4
    """Start states of each user."""
    history: int = 20
    """Items in every history."""
    n_members: int = 2
    """Networks of the judge."""
    n_outcomes: int = 2
    """Outcomes; the first is the gate."""
    dim: int = 64
    """Width of an item vector of the judge."""
    hidden: int = 96
    """Hidden units of the judge's user tower."""
    rank: int = 12
    """Width of the product of user and item tower."""
    n_static: int = 11
    """Static features of an item on which users differ."""
    n_categories: int = 18
    """Categories of items."""
    seed: int = 0
    """Decides every number."""

    def build(self) -> World:
        """The world.

        Raises:
            ValueError: When an episode would show more items than there are.
        """
        length = self.horizon * self.slate_size
        if length > self.n_items:
            raise ValueError(
                f"{self.horizon} requests of {self.slate_size} items need {length} items, n_items is {self.n_items}; "
                "use a shorter horizon or more items"
            )
        generator = torch_generator(self.seed, "random world")

        def normal(*shape: int, sd: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * sd

        judge = self._judge(normal)
        n_starts = self.n_users * self.starts_per_user
        lists = self._scattered((n_starts, self.n_strategies), length, generator).to(torch.int32)
        histories = self._scattered((n_starts,), self.history, generator)
        taste = torch.nn.functional.normalize(normal(self.n_items, 8), dim=1)
        popularity = torch.rand(self.n_items, generator=generator)
        category = torch.randint(self.n_categories, (self.n_items,), generator=generator)
        category = torch.nn.functional.one_hot(category, self.n_categories).to(torch.float32)
        user = torch.arange(self.n_users).repeat_interleave(self.starts_per_user)
        zeros = torch.zeros(n_starts)
        tensors = {
            "outcome_weights": torch.ones(self.n_outcomes),
            "costs": torch.linspace(0.1, 1.0, self.n_strategies),
            "item_taste": taste,
            "item_popularity": popularity,
            "item_category": category,
            "start_user": user,
            "start_fold": (user % 2).to(torch.int8),
            "start_length": torch.full((n_starts,), self.history),
            "start_lists": lists,
            "start_list_scores": ramp_scores(lists),
            "start_state": judge.start(histories),
            "start_state_second": torch.zeros(n_starts, 0),
            "start_taste": taste[histories].sum(dim=1),
            "start_category": category[histories].sum(dim=1),
            "start_popularity": popularity[histories].sum(dim=1),
            "start_gap": zeros,
            # the true statistics would need a table of start states x items
            "start_list_stats": torch.rand(n_starts, self.n_strategies, 3, generator=generator),
            "start_time": zeros.to(torch.float64),
            "start_sessions": zeros + 1.0,
            "start_previous_gap": zeros.clone(),
            "period_starts": torch.zeros(1, dtype=torch.float64),
            "user_events": histories[:: self.starts_per_user].flatten().to(torch.int32),
            "user_event_offsets": torch.arange(self.n_users + 1) * self.history,
        }
        return World(
            name=f"random_{self.n_items}",
            strategies=tuple(f"strategy_{k}" for k in range(self.n_strategies)),
            outcomes=("watch", "like", *(f"outcome_{o}" for o in range(2, self.n_outcomes)))[: self.n_outcomes],
            horizon=self.horizon,
            slate_size=self.slate_size,
            seed=self.seed,
            reward_scale=0.3,
            tensors=tensors,
            responses={"A": judge, "B": judge},
            info={"card": {"source": "random tables, for measuring speed", "licence": "Apache-2.0"}},
        )

    def _judge(self, normal: Callable[..., Tensor]) -> FrozenResponse:
        features, state = self.n_static + len(DYNAMIC_FEATURES), 4 * self.dim + 1
        return FrozenResponse(
            {
                "item_input": normal(self.n_items, self.dim, sd=self.dim**-0.5),
                "decays": torch.tensor([0.5, 0.8, 0.95]),
                "hidden_weight": normal(self.n_members, self.hidden, state, sd=state**-0.5),
                "hidden_bias": normal(self.n_members, self.hidden, sd=0.1),
                "tower_weight": normal(self.n_members, self.n_outcomes * self.rank, self.hidden, sd=self.hidden**-0.5),
                "tower_bias": torch.zeros(self.n_members, self.n_outcomes * self.rank),
                "item_output": normal(self.n_members, self.n_items, self.n_outcomes, self.rank, sd=0.5),
                "item_bias": normal(self.n_members, self.n_items, self.n_outcomes, sd=0.5) - 1.0,
                "calibration": torch.tensor([1.0, 0.0]).repeat(self.n_members, self.n_outcomes, 1),
                "static_features": normal(self.n_items, self.n_static, sd=0.3),
                "trend": torch.zeros(1, self.n_items),
                "dynamic_scale": torch.ones(2),
                "effect_mean": normal(self.n_users, self.n_outcomes, features, sd=0.3),
                "effect_chol": torch.eye(features).mul(0.1).repeat(self.n_users, self.n_outcomes, 1, 1),
                "pair_sd": torch.full((self.n_outcomes,), 0.1),
                **untimed(),
                "leaving": torch.tensor([-math.inf, 0.0, 0.0, 0.0]),
            },
            ("watch", "like", *(f"outcome_{o}" for o in range(2, self.n_outcomes)))[: self.n_outcomes],
            (*(f"static_{f}" for f in range(self.n_static)), *DYNAMIC_FEATURES),
        )

    def _scattered(self, shape: tuple[int, ...], length: int, generator: torch.Generator) -> Tensor:
        """Different items in each list, spread over the whole catalogue; int64 (*shape, length)."""
        # start + place * stride runs through the catalogue without a repeat if the two have no common factor
        stride = next(
            s for s in range(max(self.n_items * 5 // 8, 1), 2 * self.n_items) if math.gcd(s, self.n_items) == 1
        )
        start = torch.randint(self.n_items, (*shape, 1), generator=generator)
        return (start + torch.arange(length) * stride) % self.n_items
