"""LOOK pays where the future does and nowhere else; FIR learns a user's type from all answers, by hand where possible."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.evaluation.references import (
    FullInformation,
    LookAhead,
    RewardPrior,
    fit_reward_prior,
    learn_reward_prior,
    spread_rows,
)
from metarec_gym.evaluation.rollout import Fixed, Greedy, Player, RolloutResult, rollout
from metarec_gym.world import World


def _play(
    world: World, player: Player, *, replicates: int = 2, batch_rows: int = 1024, horizon: int | None = None
) -> RolloutResult:
    return rollout(
        world,
        "B",
        player,
        contexts=world.starts_of("B"),
        replicates=replicates,
        horizon=horizon or world.horizon,
        env_seed=11,
        cost_weight=0.45,
        batch_rows=batch_rows,
    )


@pytest.fixture(scope="module")
def trap() -> World:
    """Serving `mixed` costs nothing and is worth 0.6 now, the right specialist 1.0 - 0.45; but unrewarded users leave.

    A slate of `mixed` holds one item of either type: 45 % of its slates bring nothing, of the specialist's 25 %.
    """
    world = World.synthetic(
        n_types=2,
        users_per_type=8,
        items_per_type=40,
        horizon=12,
        slate_size=2,
        history_lengths=(0,),
        leaving=(-6.0, 5.0),
    )
    costs = torch.tensor([1.0, 1.0, 0.0])
    return dataclasses.replace(world, tensors={**world.tensors, "costs": costs})


def test_looking_ahead_pays_where_the_cheap_strategy_drives_users_away(trap: World) -> None:
    greedy, look = _play(trap, Greedy()), _play(trap, LookAhead(ahead=6, branches=16))
    # greedy sees 0.6 > 0.55 and never serves a specialist
    assert (greedy.action[greedy.alive] == 2).all()
    specialist = look.user % 2
    served = look.action == specialist[:, None, None]
    assert served[look.alive].mean() > 0.5
    assert look.alive.mean() > greedy.alive.mean() + 0.05
    assert look.expected.mean() > 1.05 * greedy.expected.mean()


def test_at_the_last_request_there_is_no_future(trap: World) -> None:
    assert (_play(trap, LookAhead(ahead=6, branches=16), horizon=1).action == 2).all()


def test_looking_ahead_is_the_greedy_oracle_where_the_future_does_not_depend_on_the_present(tiny_world: World) -> None:
    greedy, look = _play(tiny_world, Greedy()), _play(tiny_world, LookAhead(ahead=3, branches=4))
    np.testing.assert_array_equal(look.action, greedy.action)
    np.testing.assert_array_equal(look.expected, greedy.expected)


def test_branches_leave_the_real_episode_alone_and_never_decide_without_being_sure(trap: World) -> None:
    greedy, look = _play(trap, Greedy()), _play(trap, LookAhead(ahead=2, branches=4, caution=1e9))
    for name in ("expected", "reward", "action", "alive"):
        np.testing.assert_array_equal(getattr(look, name), getattr(greedy, name))


def test_the_batch_and_the_number_of_copies_side_by_side_change_no_choice(trap: World) -> None:
    whole = _play(trap, LookAhead(ahead=2, branches=4), replicates=1, horizon=4)
    parts = _play(trap, LookAhead(ahead=2, branches=4, max_rows=50), replicates=1, horizon=4, batch_rows=11)
    np.testing.assert_array_equal(whole.action, parts.action)


def test_a_branch_meets_other_luck_than_the_episode(trap: World) -> None:
    env = MetaRecVectorEnv(3, world=trap, fold="B", output="torch", autoreset_mode="Disabled")
    env.reset(seed=5)
    saved = env.get_state()
    branch = MetaRecVectorEnv(40, world=trap, fold="B", output="torch", autoreset_mode="Disabled")
    branch.reset(seed=0)
    state = spread_rows(saved, branch.get_state(), torch.arange(40) % 3)
    assert torch.equal(state["user.start"][:6], saved["user.start"][[0, 1, 2, 0, 1, 2]])
    branch.set_state(state)
    action = torch.zeros(3, dtype=torch.int64)
    _, reward, *_ = env.step(action)
    _, copies, *_ = branch.step(action.repeat(14)[:40])
    # copies of a row meet its luck until their keys are changed
    assert torch.equal(copies[:3], reward)


def test_look_ahead_needs_two_branches_and_a_request() -> None:
    with pytest.raises(ValueError, match="at least 1 request, 2 branches"):
        LookAhead(branches=1)


def test_the_sampled_rewards_seen_beforehand_are_those_that_serving_brings(leaving_world: World) -> None:
    env = MetaRecVectorEnv(
        20, world=leaving_world, fold="A", output="torch", autoreset_mode="Disabled", cost_weight=0.3
    )
    env.reset(seed=1)
    env.step(torch.arange(20) % 3)
    seen, saved = env.peek_sampled_rewards(), env.get_state()
    for k in range(3):
        env.set_state(saved)
        _, reward, *_ = env.step(torch.full((20,), k))
        alive = ~(saved["user.terminated"] | saved["user.truncated"])[:20]
        assert alive.any()
        assert torch.equal(seen[alive, k], reward[alive])


def test_the_prior_finds_how_users_and_luck_vary() -> None:
    rng = np.random.default_rng(0)
    cov, noise = np.array([[1.0, -0.5], [-0.5, 1.0]]), np.array([[2.0, 0.8], [0.8, 1.0]])
    users = rng.multivariate_normal([0.0, 0.0], cov, size=4000)
    trend = np.array([[3.0, 1.0], [2.0, 1.0], [1.0, 1.0], [1.0, 2.0]])
    reward = users[:, None] + trend + rng.multivariate_normal([0.0, 0.0], noise, size=(4000, 4))
    prior = fit_reward_prior(reward, np.ones(reward.shape, dtype=bool))
    assert prior.mean == pytest.approx(trend, abs=0.1)
    assert prior.cov == pytest.approx(cov, abs=0.1)
    assert prior.noise == pytest.approx(noise, abs=0.1)


def test_what_was_not_seen_does_not_enter_the_prior() -> None:
    reward = np.zeros((40, 2, 2))
    reward[:, :, 0] = 1.0
    seen = np.ones(reward.shape, dtype=bool)
    reward[:5, 1], seen[:5, 1] = 1e6, False
    prior = fit_reward_prior(reward, seen)
    assert prior.mean.tolist() == [[1.0, 0.0], [1.0, 0.0]]


class _Told:
    """An environment of one row that only says what it is asked."""

    num_envs, device = 1, torch.device("cpu")

    def __init__(self, rewards: list[float]) -> None:
        self.rewards = torch.tensor([rewards])

    def peek_sampled_rewards(self) -> torch.Tensor:
        return self.rewards


def _learner(noise: float = 1.0) -> FullInformation:
    return FullInformation(RewardPrior(np.array([[1.0, 0.9]]), np.eye(2), noise * np.eye(2)))


def test_full_information_moves_by_hand_from_the_prior_to_what_it_is_told() -> None:
    env = _Told([0.0, 2.9])
    seat = _learner().seat(lambda n: None)
    mask = torch.ones(1, 2, dtype=torch.bool)
    seat.begin(env)
    assert seat.choose(env, mask, 0).tolist() == [0]
    # unit variances: half of each surprise, 1 + (0 - 1) / 2 and 0.9 + 2 / 2
    assert seat.choose(env, mask, 1).tolist() == [1]
    # two observations, not the third that came with the choice: precision 1 + 3, shift 3 * surprise
    mean = torch.linalg.solve(seat.precision, seat.shift[..., None])[0, :, 0]
    assert mean.tolist() == pytest.approx([2 / 3 * -1.0, 2 / 3 * 2.0])


def test_full_information_learns_nothing_of_a_strategy_out_of_service() -> None:
    env = _Told([-9.0, 0.9])
    seat = _learner().seat(lambda n: None)
    seat.begin(env)
    for request in range(3):
        assert seat.choose(env, torch.tensor([[False, True]]), request).tolist() == [1]
    assert seat.choose(env, torch.ones(1, 2, dtype=torch.bool), 3).tolist() == [0]


def test_full_information_finds_the_type_of_every_user(tiny_world: World) -> None:
    starts = tiny_world.starts_of("A")
    prior = learn_reward_prior(tiny_world, "A", contexts=starts.repeat(8), horizon=4, env_seed=3)
    # users of the two types like opposite specialists: 0.2 or 1.0 a request, 0.16 of variance
    assert prior.cov[0, 1] < 0.0 < prior.cov[0, 0]
    player = FullInformation(prior)
    again = pickle.loads(pickle.dumps(player))
    np.testing.assert_array_equal(again.prior.cov, prior.cov)
    told = rollout(
        tiny_world, "B", player, contexts=tiny_world.starts_of("B"), replicates=30, horizon=4, env_seed=1
    ).expected.mean(axis=(0, 1))
    fixed = rollout(tiny_world, "B", Fixed(0), contexts=tiny_world.starts_of("B"), replicates=1, horizon=4, env_seed=1)
    # before the first answer it knows no more than the best fixed strategy: 0.6; each answer helps
    assert told[0] == pytest.approx(0.6, abs=1e-4)
    assert fixed.expected.mean() == pytest.approx(0.6, abs=1e-4)
    assert told[1] > 0.7
    assert told[3] > 0.8
