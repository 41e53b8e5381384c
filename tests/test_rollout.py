"""Playing policies: equal luck for all, nothing counted after leaving, numbers worked out on the tiny world."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from metarec_gym.evaluation.references import FullInformation, LookAhead, learn_reward_prior
from metarec_gym.evaluation.rollout import (
    Choices,
    Fixed,
    Greedy,
    LengthRule,
    Played,
    Player,
    RolloutResult,
    Rotation,
    Rows,
    Schedule,
    Window,
    greedy_schedule,
    per_user,
    pick_contexts,
    rollout,
)
from metarec_gym.policy import FixedPolicy, UniformPolicy
from metarec_gym.response.frozen import FrozenResponse
from metarec_gym.world import World

# the tiny world: strategies specialist_0, specialist_1, mixed; a slate holds 2 items; own type 0.5, other type 0.1


MEMBER_TENSORS = (
    "hidden_weight",
    "hidden_bias",
    "tower_weight",
    "tower_bias",
    "item_output",
    "item_bias",
    "calibration",
)


def _play(
    world: World,
    player: Player,
    *,
    replicates: int = 3,
    batch_rows: int = 64,
    base: int = 0,
    settings: dict[str, Any] | None = None,
) -> RolloutResult:
    return rollout(
        world,
        "B",
        player,
        contexts=world.starts_of("B"),
        replicates=replicates,
        horizon=world.horizon,
        env_seed=11,
        noise_base=base,
        batch_rows=batch_rows,
        env_settings=settings,
    )


def test_expected_rewards_are_the_ones_built_into_the_world(tiny_world: World) -> None:
    result = _play(tiny_world, Fixed(0))
    user_type = result.user % 2
    # specialist_0 shows 2 items of category 0: 2 * 0.5 to type 0 and 2 * 0.1 to type 1, at every request
    assert result.expected[user_type == 0] == pytest.approx(1.0)
    assert result.expected[user_type == 1] == pytest.approx(0.2)
    assert result.alive.all()
    assert (result.action == 0).all()


def test_the_greedy_oracle_serves_every_user_the_right_specialist(tiny_world: World) -> None:
    result = _play(tiny_world, Greedy())
    assert (result.action == (result.user % 2)[:, None, None]).all()
    assert result.expected == pytest.approx(1.0)


def test_a_fixed_policy_and_the_fixed_rule_meet_bit_equal_luck(leaving_world: World) -> None:
    rule, policy = _play(leaving_world, Fixed(1)), _play(leaving_world, FixedPolicy(1))
    np.testing.assert_array_equal(rule.expected, policy.expected)
    np.testing.assert_array_equal(rule.reward, policy.reward)


@pytest.mark.parametrize("batch_rows", [11, 1000])
def test_the_batch_size_changes_no_number(leaving_world: World, batch_rows: int) -> None:
    reference = _play(leaving_world, UniformPolicy(), replicates=2)
    other = _play(leaving_world, UniformPolicy(), replicates=2, batch_rows=batch_rows)
    for name in ("expected", "reward", "action", "alive", "engaged"):
        np.testing.assert_array_equal(getattr(reference, name), getattr(other, name))


def test_later_replicates_are_the_same_whether_played_at_once_or_afterwards(leaving_world: World) -> None:
    whole = _play(leaving_world, UniformPolicy(), replicates=4)
    late = _play(leaving_world, UniformPolicy(), replicates=2, base=2)
    np.testing.assert_array_equal(whole.expected[:, 2:], late.expected)
    np.testing.assert_array_equal(whole.noise[2:], late.noise)


def test_replicates_differ(leaving_world: World) -> None:
    result = _play(leaving_world, UniformPolicy(), replicates=2)
    assert (result.action[:, 0] != result.action[:, 1]).any()


def test_nothing_counts_after_the_user_left(leaving_world: World) -> None:
    result = _play(leaving_world, Fixed(0), replicates=6)
    gone = ~result.alive
    assert gone.any()
    assert (result.expected[gone] == 0).all()
    assert (result.reward[gone] == 0).all()
    assert (result.engaged[gone] == 0).all()
    assert (result.action[gone] == -1).all()
    # once gone, gone for good
    assert (np.diff(result.alive.astype(int), axis=2) <= 0).all()


def test_sampled_rewards_average_to_the_expected_ones(tiny_world: World) -> None:
    result = _play(tiny_world, Fixed(2), replicates=60, batch_rows=1000)
    # 16 start states * 60 * 4 requests of variance below 0.5: standard error below 0.012
    assert result.reward.mean() == pytest.approx(result.expected.mean(), abs=0.035)
    assert result.engaged.sum() == result.reward.sum()


def test_rotation_and_stored_choices_serve_what_they_say(tiny_world: World) -> None:
    assert _play(tiny_world, Rotation((2, 0))).action[0, 0].tolist() == [2, 0, 2, 0]
    stored = torch.arange(len(tiny_world.starts_of("B")) * 3).reshape(-1, 3) % 3
    served = _play(tiny_world, Choices(stored)).action
    np.testing.assert_array_equal(served, np.repeat(stored.numpy()[:, :, None], 4, axis=2))


def test_length_rule_ranges_start_at_their_edge() -> None:
    rule = LengthRule(edges=(3, 10), strategies=(5, 6, 7))
    lengths = torch.tensor([0, 2, 3, 9, 10, 99])
    rows = Rows(torch.arange(6), torch.arange(6), torch.zeros(6, dtype=torch.int64), lengths)
    assert rule.row_choice(rows, 0).tolist() == [5, 5, 6, 6, 7, 7]


def test_a_schedule_serves_by_request_and_range_and_its_last_strategy_goes_on(tiny_world: World) -> None:
    served = _play(tiny_world, Schedule(edges=(1,), table=((2, 0), (1,))), replicates=1)
    cold = served.history_length == 0
    assert cold.any()
    assert (served.action[cold] == [2, 0, 0, 0]).all()
    assert (served.action[~cold] == 1).all()


def test_a_schedule_learned_from_users_of_one_type_serves_that_type(tiny_world: World) -> None:
    starts = tiny_world.starts_of("A")
    ones = starts[tiny_world.tensors["start_user"][starts] % 2 == 1]
    learned = greedy_schedule(tiny_world, "A", contexts=ones, edges=(), horizon=4, env_seed=0)
    assert learned == Schedule((), ((1, 1, 1, 1),))


@pytest.fixture(scope="module")
def returning_world() -> World:
    """Sessions of two requests; the more a user took in a session, the likelier the next one. Only the own type is liked."""
    world = World.synthetic(
        n_types=2,
        users_per_type=8,
        items_per_type=40,
        horizon=8,
        slate_size=2,
        high=0.9,
        low=0.02,
        history_lengths=(3,),
        leaving=None,
    )
    responses = {}
    for fold, judge in world.responses.items():
        back = {
            "return_edges": torch.tensor([1.0, 48.0]),
            "return_baseline": torch.tensor([-3.0]),
            "return_weight": torch.tensor([5.0, 0.0, 0.0, 0.0]),
        }
        responses[fold] = FrozenResponse({**judge.tensors, **back}, judge.outcomes, judge.feature_names)
    return dataclasses.replace(world, responses=responses)


SESSIONS = {"session_requests": 2}


def test_users_who_do_not_come_back_are_worth_nothing_from_then_on(returning_world: World) -> None:
    result = _play(returning_world, Fixed(0), replicates=4, settings=SESSIONS)
    own = result.user % 2 == 0
    # served what they like, users take 1.8 items a request and come back: logit -3 + 5 * log(1 + 3.6) = 4.6
    assert result.alive[own].mean() > 0.9
    # the others take nothing as a rule and stay away after the first session: logit -3
    assert result.alive[~own][:, :, :2].all()
    assert result.alive[~own][:, :, 2:].mean() < 0.3
    assert (result.expected[~result.alive] == 0).all()
    assert (result.action[~result.alive] == -1).all()
    # absences fall between sessions only
    gone = np.diff(result.alive.astype(int), axis=2)
    assert (gone[:, :, ::2] == 0).all()
    assert (gone[:, :, 1::2] < 0).any()


def test_privileged_references_play_several_sessions(returning_world: World) -> None:
    prior = learn_reward_prior(
        returning_world,
        "A",
        contexts=returning_world.starts_of("A"),
        horizon=8,
        env_seed=0,
        env_settings=SESSIONS,
    )
    players = {"greedy": Greedy(), "look": LookAhead(ahead=2, branches=2), "told": FullInformation(prior)}
    values = {
        name: _play(returning_world, player, replicates=2, settings=SESSIONS).expected.mean()
        for name, player in players.items()
    }
    fixed = _play(returning_world, Fixed(0), replicates=2, settings=SESSIONS).expected.mean()
    assert values["greedy"] > 1.5 * fixed
    # serving what is liked now is also what brings users back
    assert values["look"] == pytest.approx(values["greedy"], rel=0.02)
    assert fixed < values["told"] <= values["greedy"] * 1.001


def test_expected_rewards_of_the_oracle_are_those_of_the_member_that_answers(tiny_world: World) -> None:
    responses = {}
    for fold, judge in tiny_world.responses.items():
        # the second member likes everything half as much on the odds scale
        parts = {n: torch.cat([judge.tensors[n], judge.tensors[n]]) for n in MEMBER_TENSORS}
        parts["item_bias"][1] -= 0.7
        responses[fold] = FrozenResponse({**judge.tensors, **parts}, judge.outcomes, judge.feature_names)
    world = dataclasses.replace(tiny_world, responses=responses)
    result = _play(world, Greedy(), replicates=8)
    first, second = (_play(world, Greedy(), replicates=8, settings={"member": m}) for m in (0, 1))
    assert (result.action == (result.user % 2)[:, None, None]).all()
    assert first.expected.min() == pytest.approx(1.0)
    assert second.expected.max() < 0.8
    # every episode meets one of them, drawn by its own key
    of_first = np.isclose(result.expected, first.expected).all(axis=2)
    of_second = np.isclose(result.expected, second.expected).all(axis=2)
    assert (of_first ^ of_second).all()
    assert 0.3 < of_first.mean() < 0.7


class _Recorder(UniformPolicy):
    """Notes the rewards it is told."""

    def __init__(self) -> None:
        self.rewards: list[torch.Tensor] = []
        self.begun = 0

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        self.begun += 1

    def observe(self, obs: torch.Tensor, action: torch.Tensor, reward: torch.Tensor, alive: torch.Tensor) -> None:
        self.rewards.append(reward)


def test_policies_get_feedback_of_every_request_and_begin_once_a_batch(tiny_world: World) -> None:
    policy = _Recorder()
    result = _play(tiny_world, policy)
    assert policy.begun == 1
    told = torch.stack(policy.rewards, dim=1)[: result.reward.size // 4]
    np.testing.assert_array_equal(told.numpy().reshape(result.reward.shape), result.reward)


def test_a_function_that_makes_the_policy_is_enough(tiny_world: World) -> None:
    np.testing.assert_array_equal(_play(tiny_world, UniformPolicy).action, _play(tiny_world, UniformPolicy()).action)


def test_values_of_windows_by_hand() -> None:
    expected = np.arange(20, dtype=np.float32).reshape(1, 1, 20)
    zeros = np.zeros((1, 1, 20))
    result = RolloutResult(
        np.array([0]),
        np.array([0]),
        np.array([0]),
        np.array([0]),
        expected,
        expected,
        zeros.astype(np.int16),
        zeros.astype(bool),
        zeros.astype(np.int16),
    )
    # 0 + 1 + ... + 9 over 10; the last tenth of 20 requests is 18 and 19; of 11 requests it is two (rounded up)
    assert result.value(Window.until(10))[0, 0] == 4.5
    assert result.value(Window.last_tenth(20))[0, 0] == 18.5
    assert (Window.last_tenth(11).first, Window.last_tenth(5).first) == (9, 4)


def test_played_counts_strategies_and_survives_its_file(tiny_world: World) -> None:
    played = _play(tiny_world, Rotation((2, 0))).played((Window.until(4),), 3)
    # 3 replicates * 4 requests from each start state, half of them each
    assert (played.served == [6, 0, 6]).all()
    again = Played.from_arrays(played.arrays())
    np.testing.assert_array_equal(again.value, played.value)


def test_start_states_of_a_user_are_averaged_first() -> None:
    # user 7: (1 + 3) / 2 = 2, user 9: 10
    values = per_user(np.array([9, 7, 7]), np.array([10.0, 1.0, 3.0]))
    assert values.tolist() == [2.0, 10.0]


def test_contexts_are_the_folds_own_and_a_fixed_number_a_user(tiny_world: World) -> None:
    chosen = pick_contexts(tiny_world, "B", per_user=1, seed=3)
    users = tiny_world.tensors["start_user"][chosen]
    assert torch.isin(chosen, tiny_world.starts_of("B")).all()
    assert len(users) == len(users.unique()) == 8
    assert torch.equal(chosen, pick_contexts(tiny_world, "B", per_user=1, seed=3))
    assert len(pick_contexts(tiny_world, "B", per_user=9, seed=3)) == len(tiny_world.starts_of("B"))
    fewer = pick_contexts(tiny_world, "B", per_user=2, seed=3, max_users=5)
    assert len(tiny_world.tensors["start_user"][fewer].unique()) == 5


def test_nothing_to_play_is_said(tiny_world: World) -> None:
    with pytest.raises(ValueError, match="no episode to play"):
        _play(tiny_world, Fixed(0), replicates=0)
