"""PPO of Stable-Baselines3 trains through the adapter, under our tags, without touching the process's generators."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import ppo, sb3
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import MlpPolicy

SMALL = sb3.Args(total_steps=2 * 16 * 20, num_steps=20, minibatch_size=160, epochs=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_env(**kwargs: object) -> MetaRecVectorEnv:
    return MetaRecVectorEnv(16, autoreset_mode="SameStep", **kwargs)  # type: ignore[arg-type]


def test_equal_seeds_give_equal_policies_and_the_global_generators_come_back_unchanged() -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    one, two = (sb3.train(make_env(), SMALL, progress=False) for _ in range(2))
    other = sb3.train(make_env(), dataclasses.replace(SMALL, seed=1), progress=False)
    for (w1, b1), (w2, b2) in zip(one.policy.layers, two.policy.layers, strict=True):
        assert torch.equal(w1, w2)
        assert torch.equal(b1, b2)
    assert not torch.equal(one.policy.layers[0][0], other.policy.layers[0][0])
    assert one.steps == 640
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_its_curves_carry_the_tags_of_our_ppo_and_lie_in_one_event_file(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = sb3.train(make_env(), SMALL, run_dir=tmp_path / "sb3", progress=False)
    ours = {field.name for field in dataclasses.fields(ppo.Args)}
    settings = {field.name: getattr(SMALL, field.name) for field in dataclasses.fields(SMALL) if field.name in ours}
    ppo.train(make_env(output="torch"), ppo.Args(**settings), run_dir=tmp_path / "ppo", progress=False)
    tags = {}
    for name in ("sb3", "ppo"):
        assert len(list((tmp_path / name).glob("events.out.tfevents*"))) == 1
        events = accumulator.EventAccumulator(str(tmp_path / name))
        events.Reload()
        tags[name] = set(events.Tags()["scalars"])
        assert "hparams" in {data.plugin_data.plugin_name for data in events.summary_metadata.values()}
        assert events.Scalars("rollout/ep_rew_mean")[0].step == 320
    # SB3 adds what its own logger knows; the HParams table of neither adds a scalar
    assert tags["ppo"] == tags["sb3"]
    saved = MlpPolicy.load(tmp_path / "sb3" / "policy.safetensors")
    assert torch.equal(saved.layers[0][0], result.policy.layers[0][0])
    assert saved.meta["agent"] == "sb3_ppo"


def test_the_learning_rate_schedule_is_that_of_our_ppo() -> None:
    # 3 iterations of 4 * 10 = 40 requests for 100 wanted: 1, 2/3, 1/3
    args = sb3.Args(total_steps=100, num_steps=10, learning_rate=1.0)
    schedule = sb3.learning_rate(args, num_envs=4)
    rates = [schedule(1.0 - steps / 100) for steps in (40, 80, 120)]
    assert rates == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert schedule(1.0) == 1.0


def test_hyperparameters_have_the_names_and_defaults_of_our_ppo() -> None:
    ours = {field.name: field.default for field in dataclasses.fields(ppo.Args)}
    theirs = {field.name: field.default for field in dataclasses.fields(sb3.Args)}
    # ours knows masks
    assert theirs.pop("blind_to_masks") is False
    assert theirs == {name: ours[name] for name in theirs}


def test_the_exported_policy_gives_the_probabilities_of_the_model() -> None:
    models = []
    kept = dataclasses.replace(
        sb3.ALGORITHM, export=lambda model, *rest: models.append(model) or sb3.actor_critic_policy(model, *rest)
    )
    result = kept.train(make_env(), SMALL, progress=False)
    obs, _ = make_env(output="torch").reset(seed=3)
    with torch.no_grad():
        expected = models[0].policy.get_distribution(obs).distribution.probs
    mask = torch.ones(16, len(result.policy.strategies), dtype=torch.bool)
    torch.testing.assert_close(result.policy.action_probs(obs, mask), expected)


def test_unavailable_strategies_are_refused_because_sb3_would_serve_them() -> None:
    name = make_env().strategy_names[0]
    with pytest.raises(ValueError, match=r"agents\.ppo"):
        sb3.train(make_env(unavailable=(name,)), SMALL, progress=False)


@pytest.mark.slow
def test_it_learns_the_synthetic_world_as_our_ppo_does() -> None:
    def last(module: object, output: str) -> float:
        env = MetaRecVectorEnv(128, autoreset_mode="SameStep", output=output)  # type: ignore[arg-type]
        args = module.Args(total_steps=100_000, minibatch_size=1056)  # type: ignore[attr-defined]
        result = module.train(env, args, progress=False)  # type: ignore[attr-defined]
        return float(result.metrics["metarec/return_per_request"])

    theirs, ours = last(sb3, "numpy"), last(ppo, "torch")
    assert abs(theirs - ours) < 0.1 * ours
