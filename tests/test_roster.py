"""The roster: every agent of the leaderboard learns from a lesson, on its budget, and the same seed gives the same policy."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from agents.roster import KINDS, ROSTER, Entry, Lesson, pick
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.envs.actions import blend_weights
from metarec_gym.evaluation.rollout import action_of
from metarec_gym.seeding import stream
from metarec_gym.world import World


def _lesson(world: World, seed: int = 0) -> Lesson:
    return Lesson.of(world, "A", seed=seed, requests=1024, horizon=4, cost_weight=0.25)


def test_a_lesson_makes_environments_of_its_fold_with_its_settings(tiny_world: World) -> None:
    env = _lesson(tiny_world).make_env(3, patience=5.0)
    assert (env.num_envs, env.config.fold, env.config.judge) == (3, "A", "main")
    assert (env.horizon, env.config.cost_weight, env.config.patience) == (4, 0.25, 5.0)
    obs, _ = env.reset(seed=0)
    assert isinstance(obs, torch.Tensor)
    # what the caller asks for wins over the lesson's settings
    assert _lesson(tiny_world).make_env(2, horizon=2).horizon == 2


def test_agents_are_picked_by_name_and_by_kind_in_the_order_of_the_roster() -> None:
    assert pick(("all",), ("ppo",)) == ("ppo", *ROSTER)
    assert pick(("bandit",), ("ppo",)) == tuple(n for n, e in ROSTER.items() if e.kind == "bandit")
    assert pick(("population_ucb", "learned", "ucb1"), ("ppo",)) == ("ppo", "tuned_ppo", "ucb1", "population_ucb")
    with pytest.raises(ValueError, match=r"\['dqn2'\].*population_ucb"):
        pick(("ppo", "dqn2"), ("ppo",))


def test_an_entry_without_its_library_names_what_is_missing() -> None:
    entry = Entry("search", 1, ROSTER["ucb1"].learn, needs=("torch", "no_such_library"))
    assert entry.missing() == ("no_such_library",)
    assert all(entry.kind in KINDS for entry in ROSTER.values())
    with pytest.raises(ValueError, match="oracle"):
        Entry("oracle", 1, ROSTER["ucb1"].learn)


@pytest.mark.parametrize("name", sorted(ROSTER))
def test_every_agent_learns_from_a_lesson_and_one_seed_gives_one_policy(tiny_world: World, name: str) -> None:
    entry = ROSTER[name]
    if entry.missing():
        pytest.skip(f"needs {entry.missing()}")
    probs = []
    for _ in range(2):
        policy = entry.learn(_lesson(tiny_world))
        env = MetaRecVectorEnv(6, world=tiny_world, fold="B", horizon=4, output="torch", autoreset_mode="Disabled")
        obs, info = env.reset(seed=stream(0, "evaluation"))
        policy.begin(6)
        mask = torch.as_tensor(info["action_mask"]).to(torch.bool)
        mask[:, 0] = False
        choose = policy.act if action_of(policy) == "blend" else policy.action_probs  # type: ignore[union-attr]
        found = choose(obs, mask)
        assert found.shape == (6, 3)
        if action_of(policy) == "blend":
            # weights in [-1, 1]; what is out of service has none
            found = blend_weights(found) / blend_weights(found).sum(dim=1, keepdim=True)
        assert torch.allclose(found.sum(dim=1), torch.ones(6), atol=1e-5)
        assert bool((found[:, 0] == 0).all())
        policy.observe(obs, found.argmax(dim=1), torch.ones(6), torch.ones(6, dtype=torch.bool))
        probs.append(torch.cat([found, choose(obs, mask)]))
    assert torch.equal(probs[0], probs[1])


def test_the_budget_of_a_lesson_is_all_that_a_bandit_is_served(tiny_world: World) -> None:
    served = 0
    lesson = _lesson(tiny_world)

    def make_env(num_envs: int, **settings: object) -> MetaRecVectorEnv:
        env = lesson.make_env(num_envs, **settings)
        step = env.step

        def counted(action: torch.Tensor) -> object:
            nonlocal served
            served += env.num_envs
            return step(action)

        env.step = counted  # type: ignore[method-assign, assignment]
        return env

    ROSTER["population_ucb"].learn(dataclasses.replace(lesson, requests=5000, make_env=make_env))
    # rounded up to whole steps of the environment
    assert 5000 <= served < 5000 + 2048
