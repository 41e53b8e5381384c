"""Strategies come, go, grow stale and fail: the mask says so before the choice, alike for every policy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.envs.life import in_service

SCHEDULE = [
    ["specialist_0", "removed", 2],
    ["specialist_1", "added", 1],
    ["mixed", "removed", 1],
    ["mixed", "added", 3],
]


@pytest.fixture(scope="module")
def staying_world(leaving_world):
    """`leaving_world` without leaving: every row lasts for 12 requests."""
    judge = leaving_world.judge("A")
    judge = judge.replaced(leaving=torch.tensor([-torch.inf, 0.0, 0.0, 0.0]))
    return replace(leaving_world, responses={"A": judge, "B": judge})


def masks_of(env, actions, seed=0, options=None):
    _, info = env.reset(seed=seed, options=options)
    masks = [info["action_mask"]]
    for action in actions:
        masks.append(env.step(action)[4]["action_mask"])
    return np.stack(masks)


def test_the_mask_is_the_one_of_the_next_choice(tiny_world):
    """specialist_0 goes at request 2, specialist_1 comes at 1, mixed is away at 1 and 2."""
    env = MetaRecVectorEnv(3, world=tiny_world, schedule=SCHEDULE, autoreset_mode="Disabled")
    masks = masks_of(env, [np.array([0, 1, 2])] * 4)
    assert masks[:4, 0].tolist() == [[1, 0, 1], [1, 1, 0], [0, 1, 0], [0, 1, 1]]
    assert (masks == masks[:, :1]).all()


def test_a_choice_out_of_service_serves_nothing_and_costs(tiny_world):
    env = MetaRecVectorEnv(2, world=tiny_world, schedule=SCHEDULE, cost_weight=0.5, autoreset_mode="Disabled")
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.array([1, 0]))
    assert info["slate"][0].tolist() == [-1, -1]
    assert (info["slate"][1] >= 0).all()
    assert reward[0] == pytest.approx(-0.5 * 0.6)
    # at request 1 it is there
    assert (env.step(np.array([1, 0]))[4]["slate"] >= 0).all()


def test_a_new_episode_starts_with_the_schedule_of_its_first_request(tiny_world):
    env = MetaRecVectorEnv(2, world=tiny_world, schedule=SCHEDULE, autoreset_mode="SameStep")
    masks = masks_of(env, [np.array([0, 1])] * 8)
    assert np.array_equal(masks[4:8], masks[:4])


def test_more_outages_take_more_strategies_out_and_longer_ones_last_longer(staying_world):
    share, length = {}, {}
    for rate, mean in ((0.0, 3.0), (0.02, 3.0), (0.1, 3.0), (0.1, 12.0)):
        env = MetaRecVectorEnv(
            512, world=staying_world, outage_rate=rate, outage_length=mean, autoreset_mode="Disabled"
        )
        masks = masks_of(env, [np.zeros(512, int)] * 11)[..., 1]
        share[rate, mean] = float((masks == 0).mean())
        # strategies that were out and stayed out for one more request
        length[rate, mean] = float((masks[1:][masks[:-1] == 0] == 0).mean()) if rate else 0.0
    assert share[0.0, 3.0] == 0.0
    assert 0.0 < share[0.02, 3.0] < share[0.1, 3.0] < share[0.1, 12.0]
    # long-run share rate / (rate + 1 / length); 512 chains of 12 requests
    assert share[0.02, 3.0] == pytest.approx(0.02 / (0.02 + 1 / 3), abs=0.03)
    assert share[0.1, 3.0] == pytest.approx(0.1 / (0.1 + 1 / 3), abs=0.05)
    assert length[0.1, 3.0] == pytest.approx(2 / 3, abs=0.06)
    assert length[0.1, 12.0] == pytest.approx(11 / 12, abs=0.03)


def test_strategies_fail_one_by_one_not_all_together(staying_world):
    """Long-run share 0.1 / (0.1 + 1 / 3) = 0.231 out; two at once 0.053 if they fail independently."""
    env = MetaRecVectorEnv(512, world=staying_world, outage_rate=0.1, outage_length=3.0, autoreset_mode="Disabled")
    out = masks_of(env, [np.zeros(512, int)] * 11)[..., 1:] == 0
    assert float(out.all(axis=2).mean()) == pytest.approx(0.053, abs=0.02)


def test_outages_lower_what_a_policy_that_ignores_them_earns(tiny_world):
    earned = []
    for rate in (0.0, 0.3):
        env = MetaRecVectorEnv(1024, world=tiny_world, outage_rate=rate, autoreset_mode="Disabled")
        env.reset(seed=0)
        earned.append(sum(float(env.step(np.full(1024, 1))[1].mean()) for _ in range(4)))
    assert earned[1] < 0.8 * earned[0]


def test_every_policy_meets_the_same_outages(staying_world):
    options = {"start_state": staying_world.starts_of("A")[:8].tolist(), "noise": list(range(8))}
    settings = {"world": staying_world, "outage_rate": 0.2, "autoreset_mode": "Disabled"}
    masks = [
        masks_of(MetaRecVectorEnv(8, action=action, **settings), [choice] * 11, options=options)
        for action, choice in (
            ("select", np.zeros(8, int)),
            ("select", np.full(8, 2)),
            ("blend", np.zeros((8, 3), np.float32)),
            ("slots", np.ones((8, 3), int)),
        )
    ]
    assert (masks[0] == 0).any()
    for other in masks[1:]:
        assert np.array_equal(masks[0], other)


def test_one_strategy_always_stays_in_service(staying_world):
    env = MetaRecVectorEnv(
        128,
        world=staying_world,
        outage_rate=0.9,
        outage_length=50.0,
        unavailable=["specialist_0"],
        autoreset_mode="Disabled",
    )
    masks = masks_of(env, [np.full(128, 1)] * 11)
    assert (masks.sum(axis=2) >= 1).all()
    assert (masks[..., 0] == 0).all()
    service = torch.tensor([[False, True, True], [True, True, True]])
    down = torch.tensor([[False, True, True], [True, False, True]])
    # the first scheduled one is held in service where all have failed
    assert in_service(service, down).tolist() == [[False, True, False], [False, True, False]]


def test_a_stale_strategy_keeps_the_lists_of_the_episodes_start_until_it_is_retrained(tiny_world):
    """A user who takes everything: fresh lists leave out what was taken, a stale list leaves out what was shown; so an order
    that depends on the history tells them apart."""
    world = replace(tiny_world, ranker=_LastTypeFirst(tiny_world))
    seen = {}
    for name, schedule in (
        ("fresh", []),
        ("stale", [["mixed", "stale", 0]]),
        ("retrained", [["mixed", "stale", 0], ["mixed", "retrained", 3]]),
    ):
        env = MetaRecVectorEnv(
            1,
            world=world,
            session_requests=1,
            schedule=schedule,
            base_rate_factor=1e6,
            autoreset_mode="Disabled",
        )
        start = int(torch.nonzero(world.tensors["start_user"] == 1)[0])
        env.reset(seed=0, options={"start_state": [start]})
        seen[name] = [env.step(np.array([2]))[4]["slate"][0].tolist() for _ in range(4)]
    assert seen["fresh"] == [[0, 1], [3, 5], [7, 9], [11, 13]]
    assert seen["stale"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # at request 3 a session starts with a fresh list: the last item taken was 5
    assert seen["retrained"] == [[0, 1], [2, 3], [4, 5], [7, 9]]


class _LastTypeFirst:
    """`mixed` lists items of the parity of the last item taken first; the other strategies list 0 1 2 ..."""

    def __init__(self, world):
        self.n_items = world.n_items

    def top_lists(self, histories, length, *, exclude=None):
        lists = torch.full((len(histories), 3, length), -1)
        for row, history in enumerate(histories.tolist()):
            barred = set(history) | set(torch.nonzero(exclude[row])[:, 0].tolist())
            free = [i for i in range(self.n_items) if i not in barred]
            last = history[-1] if history[-1] >= 0 else 0
            orders = [free, free, sorted(free, key=lambda i: (i % 2 != last % 2, i))]
            for k, order in enumerate(orders):
                found = order[:length]
                lists[row, k, : len(found)] = torch.tensor(found)
        return lists


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": [["none", "removed", 1]]}, "schedule names"),
        ({"schedule": [["mixed", "broken", 1]]}, "schedule has the event 'broken'"),
        ({"schedule": [["mixed", "removed", 9]]}, r"the episode has 0\.\.3"),
        ({"schedule": [["mixed", "stale", 1]]}, "set session_requests"),
        ({"schedule": [["mixed", "removed"]]}, r"expected \(strategy, event, request\)"),
        ({"schedule": [["mixed", "removed", 1]], "unavailable": ["mixed"]}, "name them once"),
        (
            {"schedule": [["mixed", "removed", 1], ["specialist_0", "removed", 1], ["specialist_1", "removed", 2]]},
            "no strategy in service at request 2",
        ),
        ({"outage_rate": 1.0}, "outage_rate is 1.0"),
        ({"outage_length": 0.5}, "outage_length is 0.5, expected a number of at least 1"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_explained(tiny_world, settings, message):
    with pytest.raises(ValueError, match=message):
        MetaRecVectorEnv(2, world=tiny_world, **settings)
