"""Every registered id keeps every rule of `metarec_gym.testing`, as arrays and tensors, one row or thousands."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from metarec_gym.envs.registration import ACTION_OF, OTHER_IDS
from metarec_gym.envs.scenarios import SCENARIOS
from metarec_gym.testing import CHECKS, check_vector_env
from metarec_gym.world import World

pytestmark = pytest.mark.filterwarnings("error")

SIMULATED = {"horizon": 2}
SESSIONS = {"horizon": 2, "session_requests": 1, "outage_rate": 0.3, "cost_weight": [0.0, 0.5]}
CASES = {
    "select": ("MetaRec/Select-v0", SIMULATED, ("terminated", "truncated")),
    "select, several sessions": ("MetaRec/Select-v0", SESSIONS, ("truncated",)),
    "blend": ("MetaRec/Blend-v0", SIMULATED, ("terminated", "truncated")),
    "slots": ("MetaRec/Slots-v0", SIMULATED, ("terminated", "truncated")),
    "slots, several sessions": ("MetaRec/Slots-v0", SESSIONS, ("truncated",)),
    "tune": (
        "MetaRec/Tune-v0",
        {"horizon": 2, "n_users": 10, "n_items": 20, "batch_size": 8, "updates_per_step": 1},
        ("truncated",),
    ),
    "replay": ("MetaRec/Replay-v0", {"horizon": 2}, ("truncated",)),
}
"""Id, settings, and the endings that occur. Tune terminates only when a model is no longer finite."""


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory):
    """Users who leave soon, in a folder: specs name it."""
    sizes = {"n_types": 2, "users_per_type": 4, "items_per_type": 16, "horizon": 4, "slate_size": 2}
    world = World.synthetic(**sizes, history_lengths=(0, 3), leaving=(-1.0, 0.8))
    return str(world.save(tmp_path_factory.mktemp("conformance") / "world"))


@pytest.fixture(params=CASES)
def case(request, world_folder):
    """What `check_vector_env` needs to know of an id."""
    return case_of(request.param, world_folder)


def case_of(name, world_folder):
    env_id, settings, endings = CASES[name]
    if env_id in ACTION_OF:
        settings = settings | {"world": world_folder}

    def maker(output):
        return lambda num_envs, mode: gymnasium.make_vec(
            env_id, num_envs, output=output, autoreset_mode=mode, **settings
        )

    return {
        "make": maker("numpy"),
        "make_torch": maker("torch"),
        "make_single": lambda: gymnasium.make(env_id, **settings),
        "env_id": env_id,
        "settings": settings,
        "endings": endings,
    }


def what_does_not_hold(verdict):
    return {rule for rule, said in verdict.items() if said != "holds"}


def test_every_id_is_among_the_cases():
    assert {env_id for env_id, _, _ in CASES.values()} == {*ACTION_OF, *OTHER_IDS}
    # a scenario is one of them with a log and settings fixed
    ours = {env_id for env_id in gymnasium.registry if env_id.startswith("MetaRec/")}
    assert ours == {*ACTION_OF, *OTHER_IDS, *SCENARIOS}


def test_seven_rows_keep_every_rule(case):
    verdict = check_vector_env(**case, num_envs=7, steps=5)
    masked = case["env_id"] in ACTION_OF
    assert set(verdict) == set(CHECKS)
    assert what_does_not_hold(verdict) == (set() if masked else {"action_masks"})


def test_seven_rows_of_tensors_keep_every_rule(case):
    case["make"] = case.pop("make_torch")
    verdict = check_vector_env(**case, num_envs=7, steps=5)
    masked = case["env_id"] in ACTION_OF
    assert what_does_not_hold(verdict) == {"outputs_agree"} | (set() if masked else {"action_masks"})


def test_a_single_row_keeps_every_rule(case):
    # one row need not meet both endings
    verdict = check_vector_env(**case | {"endings": ()}, num_envs=1, steps=5)
    assert what_does_not_hold(verdict) <= {"partial_reset", "action_masks"}


@pytest.mark.parametrize("name", ["select, several sessions", "replay"])
def test_4096_rows_keep_every_rule(name, world_folder):
    verdict = check_vector_env(**case_of(name, world_folder), num_envs=4096, steps=3)
    assert what_does_not_hold(verdict) <= {"action_masks"}


@pytest.mark.slow
def test_4096_rows_of_every_id_keep_every_rule(case):
    verdict = check_vector_env(**case, num_envs=4096, steps=7)
    assert what_does_not_hold(verdict) <= {"action_masks"}


def test_gymnasiums_and_sb3s_checkers_pass_without_a_warning(case):
    env = case["make_single"]().unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True)
        sb3_check_env(env)


def test_spaces_are_flat_and_start_at_0_as_sb3_needs_them(case):
    env = case["make"](2, "NextStep")
    assert isinstance(env.single_observation_space, gymnasium.spaces.Box)
    assert not np.any(getattr(env.single_action_space, "start", 0))
    assert np.isfinite(env.single_observation_space.low).all()
    assert np.isfinite(env.single_observation_space.high).all()
    # Gymnasium's check_env crashes on environments that say they are torch's
    assert "torch" not in env.metadata
    assert "torch" not in case["make_single"]().metadata


def test_gymnasiums_statistics_count_around_us_and_a_partial_reset_zeroes_its_rows_alone(case):
    """Both wrappers refuse an `episode` of our own; the vector one reads the options after us."""
    one = gymnasium.wrappers.RecordEpisodeStatistics(case["make_single"]())
    one.reset(seed=0)
    one.action_space.seed(0)
    ended, steps, total = False, 0, 0.0
    while not ended:
        _, reward, terminated, truncated, info = one.step(one.action_space.sample())
        ended, steps, total = terminated or truncated, steps + 1, total + reward
    assert info["episode"]["l"] == steps
    assert info["episode"]["r"] == pytest.approx(total, abs=1e-6)

    many = gymnasium.wrappers.vector.RecordEpisodeStatistics(case["make"](3, "Disabled"))
    many.reset(seed=0)
    many.action_space.seed(0)
    many.step(many.action_space.sample())
    many.reset(options={"reset_mask": np.array([True, False, False])})
    assert many.episode_lengths.tolist() == [0, 1, 1]
