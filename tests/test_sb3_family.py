"""The algorithms of Stable-Baselines3 and sb3-contrib train on our batch and play afterwards without SB3."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("sb3_contrib")

from agents.sb3.hyperparameters import settings_of, tuned
from agents.sb3.settings import parse_rate
from experiments import train as command
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import MlpPolicy, load_policy
from metarec_gym.policy_lstm import LstmPolicy
from metarec_gym.policy_onnx import export_onnx
from metarec_gym.world import World

NAMES = ("ppo", "a2c", "dqn", "sac", "maskable_ppo", "recurrent_ppo", "qrdqn", "trpo")
SMALL: dict[str, Any] = {
    "n_steps": 4,
    "num_steps": 4,
    "batch_size": 32,
    "minibatch_size": 32,
    "n_epochs": 1,
    "epochs": 1,
    "learning_starts": 64,
    "buffer_size": 512,
    "n_quantiles": 4,
    "target_update_interval": 64,
}
EVERY = ("select", "blend", "slots")
KINDS = {
    "ppo": EVERY,
    "a2c": EVERY,
    "trpo": EVERY,
    "maskable_ppo": ("select", "slots"),
    "recurrent_ppo": ("select",),
    "dqn": ("select",),
    "qrdqn": ("select",),
    "sac": ("blend",),
}
PAIRS = [(name, action) for name in NAMES for action in KINDS[name]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def module_of(name: str) -> Any:
    return importlib.import_module(f"agents.sb3.{name}")


def small(name: str, action: str, steps: int = 256) -> Any:
    args = module_of(name).defaults_for(f"MetaRec/{action.capitalize()}-v0")
    fields = {f.name for f in dataclasses.fields(args)}
    return dataclasses.replace(args, total_steps=steps, **{k: v for k, v in SMALL.items() if k in fields})


def make_env(world: World, action: str, **settings: Any) -> MetaRecVectorEnv:
    return MetaRecVectorEnv(16, world=world, action=action, autoreset_mode="SameStep", **settings)


def trained(name: str, action: str, world: World, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Any, Any]:
    """The model as SB3 has it, and the result."""
    module, models = module_of(name), []
    algorithm = module.ALGORITHM

    def export(model: Any, *rest: Any) -> Any:
        models.append(model)
        return algorithm.export(model, *rest)

    watched = dataclasses.replace(algorithm, export=export)
    result = watched.train(make_env(world, action, **settings), small(name, action), progress=False)
    return models[0], result


@pytest.mark.parametrize(("name", "action"), PAIRS)
def test_what_is_exported_acts_as_the_model(name, action, leaving_world, tmp_path: Path, monkeypatch) -> None:
    model, result = trained(name, action, leaving_world, monkeypatch)
    policy = result.policy
    assert result.steps >= 256
    assert {"rollout/ep_rew_mean", "time/fps", "metarec/return_per_request"} <= set(result.metrics)
    shares = [v for k, v in result.metrics.items() if k.startswith("metarec/action_share/")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    obs, _ = make_env(leaving_world, action).reset(seed=3)
    expected, _ = model.predict(obs, deterministic=True)
    loaded = type(policy).load(policy.save(tmp_path / "policy.safetensors"))
    seen = torch.as_tensor(obs)
    if action != "select":
        assert loaded.chooses == action
        everything = torch.ones(16, len(loaded.strategies), dtype=torch.bool)
        assert np.allclose(loaded.act(seen, everything).numpy(), expected, atol=1e-5)
        return
    mask = torch.ones(16, len(loaded.strategies), dtype=torch.bool)
    loaded.begin(16)
    probs = loaded.action_probs(seen, mask)
    assert probs.argmax(dim=1).tolist() == expected.tolist()
    if name in ("dqn", "qrdqn"):
        assert "greedy over Q" in loaded.meta["head"]
        assert probs.amax(dim=1).median() > 0.999


def test_the_exported_lstm_remembers_as_the_model_does(leaving_world, monkeypatch) -> None:
    model, result = trained("recurrent_ppo", "select", leaving_world, monkeypatch)
    policy = result.policy
    assert isinstance(policy, LstmPolicy)
    with pytest.raises(ValueError, match="kind 'lstm' has no ONNX export"):
        export_onnx(policy, "nowhere.onnx")
    env = make_env(leaving_world, "select")
    obs, _ = env.reset(seed=5)
    state, start = None, np.ones(16, dtype=bool)
    mask, everyone = torch.ones(16, len(policy.strategies), dtype=torch.bool), torch.ones(16, dtype=torch.bool)
    policy.begin(16)
    for _ in range(3):
        with torch.no_grad():
            states = tuple(torch.as_tensor(s) for s in state) if state is not None else (torch.zeros(1, 16, 64),) * 2
            wanted, _ = model.policy.get_distribution(torch.as_tensor(obs), states, torch.as_tensor(start).float())
        _, state = model.predict(obs, state=state, episode_start=start, deterministic=True)
        seen = torch.as_tensor(obs)
        # asked twice, counted once
        policy.action_probs(seen, mask)
        torch.testing.assert_close(policy.action_probs(seen, mask), wanted.distribution.probs)
        action = torch.zeros(16, dtype=torch.int64)
        policy.observe(seen, action, torch.zeros(16), everyone)
        obs, start = env.step(action)[0], np.zeros(16, dtype=bool)


@pytest.mark.parametrize("name", ["a2c", "dqn", "qrdqn", "recurrent_ppo", "trpo", "ppo"])
@pytest.mark.parametrize(
    "settings", [{"unavailable": ("mixed",)}, {"outage_rate": 0.1}, {"schedule": (("mixed", "removed", 5),)}]
)
def test_algorithms_without_masks_refuse_worlds_with_masks(name, settings, leaving_world) -> None:
    with pytest.raises(ValueError, match="knows no action masks"):
        module_of(name).train(make_env(leaving_world, "select", **settings), small(name, "select"), progress=False)


@pytest.mark.parametrize("name", ["a2c", "dqn", "ppo"])
def test_an_algorithm_that_is_blind_to_masks_learns_where_they_are_when_it_is_told_to(name, leaving_world) -> None:
    env = make_env(leaving_world, "select", unavailable=("mixed",))
    asked, step = [], env.step

    def watched(actions: Any) -> Any:
        asked.extend(np.asarray(actions).tolist())
        return step(actions)

    env.step = watched  # type: ignore[method-assign]
    args = dataclasses.replace(small(name, "select"), blind_to_masks=True)
    policy = module_of(name).train(env, args, progress=False).policy
    out = env.strategy_names.index("mixed")
    # in training it meets the outage, at play the mask is kept
    assert out in asked
    obs, info = env.reset(seed=1)
    probs = policy.action_probs(torch.as_tensor(obs), torch.as_tensor(info["action_mask"]).bool())
    assert float(probs[:, out].max()) == 0.0


def test_maskable_ppo_never_asks_a_strategy_out_of_service(leaving_world) -> None:
    env = make_env(leaving_world, "select", unavailable=("mixed",), outage_rate=0.2)
    step, asked = env.step, []

    def watched(actions: Any) -> Any:
        asked.append(np.take_along_axis(env.action_masks(), np.asarray(actions)[:, None], axis=1).all())
        return step(actions)

    env.step = watched  # type: ignore[method-assign]
    module_of("maskable_ppo").train(env, small("maskable_ppo", "select"), progress=False)
    assert len(asked) == 16
    assert all(asked)


@pytest.mark.parametrize(("name", "action"), [("dqn", "blend"), ("sac", "select"), ("maskable_ppo", "blend")])
def test_an_algorithm_refuses_the_actions_it_cannot_choose(name, action, leaving_world) -> None:
    args = module_of(name).Args()
    with pytest.raises(ValueError, match=rf"sb3_{name} cannot choose the actions of {action}"):
        module_of(name).train(make_env(leaving_world, action), args, progress=False)


@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_the_replay_buffer_keeps_the_last_observation_of_an_episode_and_how_it_ended(
    name, leaving_world, monkeypatch
) -> None:
    action = KINDS[name][0]
    model, _ = trained(name, action, leaving_world, monkeypatch)
    buffer = model.replay_buffer
    env = make_env(leaving_world, action)
    fraction = env.feature_slices["request_fraction"]
    size = buffer.pos
    before, after = buffer.observations[:size, :, fraction], buffer.next_observations[:size, :, fraction]
    # a next observation belongs to the same episode: one request further, not at the start of the next one
    assert np.allclose(after - before, 1 / env.horizon, atol=1e-5)
    done, cut = buffer.dones[:size] > 0, buffer.timeouts[:size] > 0
    full = np.isclose(after[..., 0], 1.0, atol=1e-5)
    assert (cut <= done).all()
    assert (full[cut]).all()
    assert cut.any()
    assert (done & ~cut).any()


def test_off_policy_rows_explore_each_for_themselves(leaving_world) -> None:
    module = module_of("dqn")
    from metarec_gym.envs.sb3 import SB3VecEnv

    model = module.make_model(SB3VecEnv(make_env(leaving_world, "select")), 16, small("dqn", "select"), 0)
    obs = np.tile(make_env(leaving_world, "select").reset(seed=0)[0][:1], (2000, 1))
    model.exploration_rate = 0.5
    action, _ = model.predict(obs)
    greedy, _ = model.predict(obs[:1], deterministic=True)
    # half of the rows explore, 1 in K of those by chance takes the greedy action: 2000 rows, so +-4 deviations = 0.045
    k = leaving_world.n_strategies
    assert abs((action == greedy[0]).mean() - (0.5 + 0.5 / k)) < 0.045


@pytest.mark.parametrize("action", ["select", "blend", "slots"])
def test_the_hyperparameter_files_name_only_what_the_algorithms_have(action) -> None:
    for name in NAMES:
        settings = settings_of(name, action)
        assert bool(settings) == (action in KINDS[name])
        if settings:
            args = module_of(name).defaults_for(f"MetaRec/{action.capitalize()}-v0")
            for key, value in settings.items():
                got = getattr(args, key)
                assert (list(got) if isinstance(got, tuple) else got) == value


def test_the_file_of_select_says_what_our_ppo_and_sb3s_have_in_common() -> None:
    args = module_of("ppo").Args()
    assert tuned(args, "ppo", "select") == args == module_of("ppo").defaults_for("MetaRec/Select-v0")


def test_a_learning_rate_is_written_as_in_rl_zoo() -> None:
    assert parse_rate("lin_0.1")(0.25) == pytest.approx(0.025)
    assert parse_rate("0.1")(0.25) == 0.1
    with pytest.raises(ValueError, match="expected a number or 'lin_'"):
        parse_rate("cosine")


@pytest.mark.parametrize("name", ["a2c", "dqn"])
def test_equal_seeds_give_equal_policies(name, leaving_world) -> None:
    one, two = (
        module_of(name).train(make_env(leaving_world, "select"), small(name, "select"), progress=False).policy
        for _ in range(2)
    )
    assert isinstance(one, MlpPolicy)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one.layers, two.layers, strict=True))


def test_experiments_train_knows_them_all(tmp_path: Path) -> None:
    for name in NAMES:
        action = KINDS[name][0]
        args = command.Args(agent=f"sb3_{name}", env=(f"MetaRec/{action.capitalize()}-v0",), runs=tmp_path)
        assert type(command.learner_args(args)).__module__ == f"agents.sb3.{name}"
    row = command.run(
        command.Args(
            agent="sb3_sac",
            env=("MetaRec/Blend-v0",),
            steps=320,
            num_envs=32,
            quiet=True,
            runs=tmp_path,
            set=("learning_starts=64", "batch_size=32", "buffer_size=640"),
        )
    )
    folder = next(tmp_path.glob("sb3_sac_A_seed0_*"))
    assert load_policy(folder / row["policy"]).chooses == "blend"
    with pytest.raises(ValueError, match="--agent is 'sb3_nothing'"):
        command.run_folder(command.Args(agent="sb3_nothing", runs=tmp_path))
