"""The single environment steps its row alone: every bit must be the batch's."""

import gymnasium
import numpy as np
import pytest

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
    given = actions(alone, 60, seed=1)
    assert_equal(played(alone, given, seed=3), played(batch, given, seed=3))
    ours, theirs = alone._batch.get_state(), batch._batch.get_state()
    assert all(ours[k][0].equal(theirs[k][0]) for k in ours)
