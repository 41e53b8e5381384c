"""`experiments.adjust` scores what a policy gains from fresh users on other users, and finds its finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents import ppo
from experiments import adjust
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    made = World.synthetic(
        n_types=2,
        users_per_type=8,
        items_per_type=24,
        horizon=4,
        slate_size=2,
        history_lengths=(5,),
        leaving=None,
    )
    return made.save(tmp_path_factory.mktemp("adjust") / "world")


@pytest.fixture(scope="module")
def policy(world: Path, tmp_path_factory) -> Path:
    env = MetaRecVectorEnv(32, world=str(world), fold="A", autoreset_mode="SameStep", output="torch")
    args = ppo.Args(total_steps=512, num_steps=4, minibatch_size=64)
    return ppo.train(env, args, progress=False).policy.save(tmp_path_factory.mktemp("p") / "policy.safetensors")


def small(world: Path, runs: Path, **settings) -> adjust.Args:
    given = {"requests": 256, "num_envs": 16, "seeds": 2, "contexts_per_user": 1, "replicates": 1, "quiet": True}
    return adjust.Args(world=world, runs=runs, **{**given, **settings})


def test_the_page_has_a_row_for_every_number_of_requests_and_the_run_is_found_again(world, policy, tmp_path) -> None:
    args = small(world, tmp_path, policy=(policy,), page=tmp_path / "page.md", kl_limit=0.05)
    result = adjust.run(args)
    assert [row["requests"] for row in result["rows"]] == [64, 128, 256]
    for row in result["rows"]:
        assert row["kl"]["adjusted"][0] <= 0.05
        assert row["adjusted"]["low"] <= row["adjusted"]["estimate"] <= row["adjusted"]["high"]
    page = (tmp_path / "page.md").read_text()
    assert page.count("\n| ") == 4
    assert "adjusted (KL <= 0.05)" in page
    assert adjust.run(args)["seconds"] == result["seconds"]


def test_fresh_and_scored_users_share_nobody(world, policy, tmp_path) -> None:
    args = small(world, tmp_path, policy=(policy,))
    m = adjust._Measurement(args, World.load(world))
    user = m.world.tensors["start_user"]
    fresh, scored = (set(user[w.starts_of("B")].tolist()) for w in (m.fresh, m.scored))
    assert fresh
    assert scored
    assert not fresh & scored
    assert fresh | scored == set(user[m.world.starts_of("B")].tolist())
    env = m.env(64)
    seen = set()
    env.reset(seed=0)
    for _ in range(12):
        seen |= set(env.step(env.action_space.sample())[4]["user"].tolist())
    assert seen <= fresh


def test_a_new_strategy_enters_a_pool_whose_policy_never_met_it(world, tmp_path) -> None:
    result = adjust.run(small(world, tmp_path, new_strategy="specialist_1", train_requests=2048, seeds=2))
    assert {"old_pool", "new_less_old"} <= set(result)
    # half of the users like nothing but what the new strategy serves
    assert result["rows"][-1]["unleashed"]["value"] > 0.0
    text = next(tmp_path.glob("adjust_*/adjust.md")).read_text()
    assert "The policy without specialist_1" in text


def test_a_policy_of_the_fold_that_is_scored_is_refused(world, policy, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"use --fold B"):
        adjust.run(small(world, tmp_path, policy=(policy,), fold="A"))
    with pytest.raises(ValueError, match="and not both"):
        adjust.run(small(world, tmp_path))
    with pytest.raises(FileNotFoundError, match=r"experiments\.train"):
        adjust.run(small(world, tmp_path, policy=(tmp_path / "none.safetensors",)))
    with pytest.raises(ValueError, match="the pool has"):
        adjust.run(small(world, tmp_path, new_strategy="nothing"))
