"""The single environment steps its row alone: every bit must be the batch's."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from experiments.random_world import RandomWorld
from metarec_gym.envs.single_env import MetaRecEnv
from metarec_gym.envs.vector_env import MetaRecVectorEnv

SETTINGS = {
    "plain": {},
    "costs": {"cost_weight": 0.3, "latency_weight": 0.2, "base_rate_factor": 1.5, "position_decay": 0.4},
    "drawn costs and patience": {"cost_weight": (0.0, 1.0), "patience": 3.0},
    "one member": {"member": 0},
}


def actions(env, steps, seed):
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(steps)]


def played(env, given, seed, options=None):
    """Everything that is returned, and what `reset` returns after an episode's end."""
    found = [env.reset(seed=seed, options=options)]
    for action in given:
        found.append(env.step(action))
        if found[-1][2] or found[-1][3]:
            found.append(env.reset())
    return found


def assert_equal(a, b):
    assert type(a) is type(b), (type(a), type(b))
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, np.ndarray | np.generic):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes(), (a, b)
    else:
        assert a == b


def by_batch(world, **settings):
    env = MetaRecEnv(world, **settings)
    env._row = None
    return env


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("action", ["select", "slots", "blend"])
def test_a_row_alone_is_the_batch_to_the_last_bit(leaving_world, action, name):
    settings = {"action": action, **SETTINGS[name]}
    alone, batch = MetaRecEnv(leaving_world, **settings), by_batch(leaving_world, **settings)
    assert alone._row is not None
    given = actions(alone, 30, seed=1)
    assert_equal(played(alone, given, seed=3), played(batch, given, seed=3))
    ours, theirs = alone._batch.get_state(), batch._batch.get_state()
    assert all(ours[k][0].equal(theirs[k][0]) for k in ours)


@pytest.mark.parametrize("action", ["select", "slots", "blend"])
def test_a_row_alone_is_a_row_of_many_while_strategies_come_and_go(leaving_world, action):
    name = leaving_world.strategies[0]
    settings = {"action": action, "schedule": ((name, "removed", 2), (name, "added", 5)), "patience": 8.0}
    alone, many = MetaRecEnv(leaving_world, **settings), MetaRecVectorEnv(20, leaving_world, **settings)
    assert_equal(alone.reset(seed=11)[0], many.reset(seed=4)[0][7])
    many.action_space.seed(0)
    masks = set()
    for _ in range(8):
        given = many.action_space.sample()
        one, all_rows = alone.step(given[7]), many.step(given)
        for ours, theirs in zip(one[:4], all_rows[:4], strict=True):
            assert np.asarray(ours).tobytes() == np.asarray(theirs[7], dtype=np.asarray(ours).dtype).tobytes()
        assert_equal(one[4], {k: v[7] for k, v in all_rows[4].items() if not k.startswith("_")})
        masks.add(one[4]["action_mask"].tobytes())
        if one[2] or one[3]:
            break
    assert len(masks) == 2


def test_a_judge_of_three_outcomes_two_members_and_a_trend_answers_alike():
    world = RandomWorld(n_items=300, n_users=20, n_strategies=4, slate_size=3, horizon=9, n_outcomes=3).build()
    trend = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    world = dataclasses.replace(world, responses={f: j.replaced(trend=trend) for f, j in world.responses.items()})
    judge = world.judge("A")
    assert (judge.n_outcomes, judge.n_members, judge.has_trend) == (3, 2, True)
    env, batch = MetaRecEnv(world, latency_weight=0.1), by_batch(world, latency_weight=0.1)
    given = actions(env, 30, seed=2)
    assert_equal(played(env, given, seed=0), played(batch, given, seed=0))


@pytest.mark.parametrize("settings", [{"session_requests": 3}, {"outage_rate": 0.3}, {"fatigue": 0.5}])
def test_what_a_row_alone_does_not_know_is_left_to_the_batch(leaving_world, settings):
    assert MetaRecEnv(leaving_world, **settings)._row is None


def test_a_wrong_action_and_a_step_after_the_end_are_answered_as_by_the_batch(tiny_world):
    env, batch = MetaRecEnv(tiny_world), by_batch(tiny_world)
    with pytest.raises(RuntimeError, match="before reset"):
        env.step(0)
    for each in (env, batch):
        each.reset(seed=1)
    for wrong in (-1, 3, 1.0, True, np.zeros(2, dtype=np.int64)):
        with pytest.raises(ValueError, match="actions"):
            env.step(wrong)
    for action in (0, np.int32(1), np.array(2), 1, 0, 2):
        assert_equal(env.step(action), batch.step(action))


def test_what_was_returned_is_never_written_again_and_a_copy_goes_its_own_way(leaving_world):
    env = MetaRecEnv(leaving_world, horizon=10)
    env.reset(seed=2)
    first = env.step(1)
    kept = copy.deepcopy(first)
    twin = copy.deepcopy(env)
    rest = [env.step(action) for action in (0, 2, 1)]
    assert_equal(first, kept)
    assert_equal([twin.step(action) for action in (0, 2, 1)], rest)
    first[0][:] = 0.0
    first[4]["action_mask"][:] = 0
    assert_equal(env.step(0), twin.step(0))
