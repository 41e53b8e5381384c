"""Policies that learn nothing: what every learner has to beat, and the privileged rules that show what could be won.

`RandomPolicy` and `FixedPolicy` are those of `metarec_gym.policy`. SBS is `FixedPolicy(k)` and SCHED one of the
non-personal rules here, both with what was chosen on the training users. The oracles need what no policy may see: they
are for evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metarec_gym.policy import FixedPolicy, StatelessPolicy, UniformPolicy, masked_uniform, one_hot_probs

__all__ = [
    "FixedPolicy",
    "GreedyOracle",
    "HistoryLengthRule",
    "RandomPolicy",
    "RotationPolicy",
    "StoredChoicePolicy",
    "probs_of_choice",
    "single_best",
]

RandomPolicy = UniformPolicy


def probs_of_choice(choice: Tensor, action_mask: Tensor) -> Tensor:
    """Probability 1 for each row's choice; where it is unavailable, equal ones for the others.

    Args:
        choice: int64 (num_rows,).
        action_mask: bool (num_rows, K).

    Returns:
        float32 (num_rows, K).
    """
    available = action_mask.gather(1, choice[:, None])
    return torch.where(available, one_hot_probs(choice, action_mask.shape[1]), masked_uniform(action_mask))


def single_best(values: Sequence[float] | Tensor) -> FixedPolicy:
    """SBS: the fixed strategy of highest value on the training users; ties go to the lower index.

    Args:
        values: Value of every strategy played alone, (K,), measured on training users only.
    """
    numbers = torch.as_tensor(values, dtype=torch.float64)
    if numbers.ndim != 1 or not bool(numbers.isfinite().all()):
        raise ValueError(f"expected one finite value for each strategy, got {numbers.tolist()}")
    return FixedPolicy(int((numbers == numbers.max()).nonzero()[0, 0]))


class RotationPolicy:
    """One strategy after the other, each user starting with the first.

    Args:
        strategies: Indices in the order of service.
    """

    def __init__(self, strategies: Sequence[int]) -> None:
        if not strategies:
            raise ValueError("a rotation needs at least one strategy, got none")
        self.strategies = tuple(int(k) for k in strategies)
        self._request = torch.zeros(0, dtype=torch.int64)

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Every row is at its first request."""
        self._request = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The strategy whose turn it is."""
        table = torch.tensor(self.strategies, device=obs.device)
        return probs_of_choice(table[self._request % len(table)], action_mask)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """A request that was served moves its row on."""
        self._request = self._request + alive.to(torch.int64)


class HistoryLengthRule(StatelessPolicy):
    """A strategy for each range of history lengths: cold users get one strategy, regulars another.

    Args:
        column: Where the observation holds the history length: `env.feature_slices["history_length"].start`.
        edges: Ascending limits in the observation's own unit; row value < edges[0] is range 0, and so on.
        strategies: One for each range, `len(edges) + 1`.
    """

    def __init__(self, column: int, edges: Sequence[float], strategies: Sequence[int]) -> None:
        if len(strategies) != len(edges) + 1 or list(edges) != sorted(edges):
            raise ValueError(
                f"expected ascending edges and one strategy more than edges, got edges {list(edges)} and "
                f"{len(strategies)} strategies"
            )
        self.column = int(column)
        self.edges = tuple(float(edge) for edge in edges)
        self.strategies = tuple(int(k) for k in strategies)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The strategy of the row's range."""
        edges = torch.tensor(self.edges, dtype=obs.dtype, device=obs.device)
        table = torch.tensor(self.strategies, device=obs.device)
        return probs_of_choice(table[torch.bucketize(obs[:, self.column].contiguous(), edges, right=True)], action_mask)


class StoredChoicePolicy(StatelessPolicy):
    """One stored strategy for each row, e.g. the per-user oracle's (ORA_user).

    Args:
        choices: int64 (num_rows,).
    """

    def __init__(self, choices: Tensor) -> None:
        self.choices = choices.to(torch.int64)

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Checks that the rows are those the choices were made for."""
        if num_rows != len(self.choices):
            raise ValueError(
                f"there are {num_rows} rows but {len(self.choices)} stored choices; store one for each row"
            )

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The stored strategy of every row."""
        return probs_of_choice(self.choices.to(obs.device), action_mask)


class GreedyOracle(StatelessPolicy):
    """GREEDY: the strategy of highest true expected immediate reward; privileged and myopic, so no upper bound.

    Args:
        env: The environment being played, which must offer `peek_expected_rewards()`.
    """

    def __init__(self, env: Any) -> None:
        if not hasattr(env, "peek_expected_rewards"):
            raise ValueError(
                f"{type(env).__name__} has no peek_expected_rewards(); the greedy oracle plays MetaRecVectorEnv only"
            )
        self.env = env

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The best available strategy right now; ties go to the lower index."""
        values = torch.as_tensor(self.env.peek_expected_rewards()).masked_fill(~action_mask, -torch.inf)
        return one_hot_probs(
            (values == values.amax(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1), values.shape[1]
        )
