"""Rules that learn nothing do exactly what they say."""

from __future__ import annotations

import pytest
import torch

from agents import baselines
from metarec_gym.policy import FixedPolicy

ALL = torch.ones(3, 4, dtype=torch.bool)
OBS = torch.tensor([[0.0, 0.1], [0.0, 0.5], [0.0, 0.9]])


def chosen(probs: torch.Tensor) -> list[int]:
    assert bool((probs.max(dim=1).values == 1.0).all())
    return probs.argmax(dim=1).tolist()


def test_the_single_best_is_the_strategy_of_highest_value_and_the_lower_index_wins_ties() -> None:
    policy = baselines.single_best([0.1, 0.4, 0.4, 0.2])
    assert isinstance(policy, FixedPolicy)
    assert policy.strategy == 1
    assert chosen(policy.action_probs(OBS, ALL)) == [1, 1, 1]
    with pytest.raises(ValueError, match="finite"):
        baselines.single_best([0.1, float("nan")])


def test_a_rotation_moves_on_only_where_a_request_was_served() -> None:
    policy = baselines.RotationPolicy([2, 0])
    policy.begin(3)
    assert chosen(policy.action_probs(OBS, ALL)) == [2, 2, 2]
    nothing = torch.zeros(3)
    policy.observe(OBS, torch.tensor([2, 2, 2]), nothing, torch.tensor([True, False, True]))
    assert chosen(policy.action_probs(OBS, ALL)) == [0, 2, 0]
    policy.observe(OBS, torch.tensor([0, 2, 0]), nothing, torch.tensor([True, True, True]))
    assert chosen(policy.action_probs(OBS, ALL)) == [2, 0, 2]
    policy.begin(3)
    assert chosen(policy.action_probs(OBS, ALL)) == [2, 2, 2]


def test_the_history_length_rule_serves_each_range_with_its_strategy() -> None:
    # 0.1 < 0.3 -> strategy 3; 0.3 <= 0.5 < 0.9 -> strategy 1; 0.9 >= 0.9 -> strategy 0
    policy = baselines.HistoryLengthRule(column=1, edges=[0.3, 0.9], strategies=[3, 1, 0])
    assert chosen(policy.action_probs(OBS, ALL)) == [3, 1, 0]
    with pytest.raises(ValueError, match="one strategy more than edges"):
        baselines.HistoryLengthRule(column=1, edges=[0.3], strategies=[3])


def test_stored_choices_are_replayed_row_by_row() -> None:
    policy = baselines.StoredChoicePolicy(torch.tensor([3, 0, 2]))
    policy.begin(3)
    assert chosen(policy.action_probs(OBS, ALL)) == [3, 0, 2]
    with pytest.raises(ValueError, match="2 rows but 3 stored choices"):
        policy.begin(2)


def test_the_greedy_oracle_takes_the_best_available_strategy_of_this_moment() -> None:
    class Env:
        values = torch.tensor([[0.1, 0.9, 0.2, 0.0], [0.5, 0.5, 0.1, 0.1], [0.0, 0.1, 0.2, 0.3]])

        def peek_expected_rewards(self) -> torch.Tensor:
            return self.values

    policy = baselines.GreedyOracle(Env())
    assert chosen(policy.action_probs(OBS, ALL)) == [1, 0, 3]
    mask = ALL.clone()
    mask[0, 1] = False
    assert chosen(policy.action_probs(OBS, mask)) == [2, 0, 3]
    with pytest.raises(ValueError, match="peek_expected_rewards"):
        baselines.GreedyOracle(object())


def test_an_unavailable_choice_is_spread_over_the_available_strategies() -> None:
    mask = torch.tensor([[True, False, True, False]])
    rotation = baselines.RotationPolicy([1])
    rotation.begin(1)
    length = baselines.HistoryLengthRule(1, [], [1])
    stored = baselines.StoredChoicePolicy(torch.tensor([1]))
    for policy in (rotation, length, stored, baselines.single_best([0, 1, 0, 0]), baselines.RandomPolicy()):
        assert policy.action_probs(OBS[:1], mask).tolist() == [[0.5, 0.0, 0.5, 0.0]]
