"""Tuned PPO: schedules with one switch, imitation, PPO from a given actor on, means of networks, and its budget."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from agents import ppo
from agents.roster import Lesson
from agents.switches import find_switch, switch_policy
from agents.tuned_ppo import learn_tuned_ppo, mean_of
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.evaluation.rollout import Schedule, rollout
from metarec_gym.policy import MlpPolicy
from metarec_gym.world import World
from tests import known_worlds


def _lesson(world: World, requests: int = 2000, seed: int = 0) -> Lesson:
    return Lesson.of(world, "A", seed=seed, requests=requests, horizon=world.horizon)


def _network(seed: int, inputs: int = 5, width: int = 7, strategies: int = 3) -> MlpPolicy:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(width, inputs), (width, width), (strategies, width)]
    layers = [(torch.randn(shape, generator=draw), torch.randn(shape[0], generator=draw)) for shape in shapes]
    return MlpPolicy(layers, tuple(f"s{i}" for i in range(strategies)))


@pytest.mark.parametrize("switch", [1, 2, 3])
def test_a_switch_policy_plays_its_schedule(tiny_world: World, switch: int) -> None:
    policy, starts = switch_policy(tiny_world, 4, 2, 0, switch), tiny_world.starts_of("B")
    settings: dict[str, Any] = {"contexts": starts, "replicates": 2, "horizon": 4, "env_seed": 5}
    action = rollout(tiny_world, "B", policy, **settings).action
    wanted = rollout(tiny_world, "B", Schedule((), ((2,) * switch + (0,),)), **settings).action
    assert (action == wanted).all()
    assert set(action[:, :, switch - 1].flatten()) == {2}
    assert set(action[:, :, switch].flatten()) == {0}


def test_a_switch_policy_serves_something_else_while_its_strategies_are_out_of_service(tiny_world: World) -> None:
    policy = switch_policy(tiny_world, 4, 0, 1, 2)
    env = MetaRecVectorEnv(2, world=tiny_world, fold="A", horizon=4, output="torch")
    obs, _ = env.reset(seed=0)
    mask = torch.tensor([[False, True, True], [False, False, True]])
    assert policy.action_probs(obs, mask).argmax(dim=1)[1] == 2
    assert torch.equal(policy.action_probs(obs, mask)[1], torch.tensor([0.0, 0.0, 1.0]))


def test_the_best_switch_is_found_where_it_is_known() -> None:
    known = known_worlds.drift(8)
    lesson = Lesson.of(known.world, "A", seed=0, requests=20_000, horizon=8, **known.settings)
    policy = find_switch(lesson, 20_000, seed=0)
    # popularity decays: category 0 first, category 1 later
    assert (policy.meta["first"], policy.meta["second"]) == (0, 1)
    assert known_worlds.value(known, policy) >= 0.95 * known.best.mean()


def test_a_mean_of_networks_has_the_mean_of_their_logits() -> None:
    members, obs = [_network(seed) for seed in range(3)], torch.randn(11, 5, generator=torch.Generator().manual_seed(9))
    wanted = torch.stack([member.logits(obs) for member in members]).mean(dim=0)
    assert torch.allclose(mean_of(members).logits(obs), wanted, atol=1e-5)
    assert torch.allclose(mean_of(members, 2.0).logits(obs), 2.0 * wanted, atol=1e-5)
    # one alone is itself
    assert torch.allclose(mean_of(members[:1]).logits(obs), members[0].logits(obs), atol=1e-6)


def test_an_imitation_chooses_as_its_teacher_and_goes_on_exploring(tiny_world: World) -> None:
    env = _lesson(tiny_world).make_env(16)
    teacher = switch_policy(tiny_world, 4, 1, 2, 2)
    actor, served = ppo.imitate(teacher, env, ppo.Args(seed=3), requests=100)
    assert served == 112
    obs, info = env.reset(seed=11)
    for _ in range(4):
        mask = torch.as_tensor(info["action_mask"]).to(torch.bool)
        probs, wanted = actor.action_probs(obs, mask), teacher.action_probs(obs, mask).argmax(dim=1)
        assert torch.equal(probs.argmax(dim=1), wanted)
        # 0.8 of the teacher's, and a third of the rest
        assert torch.allclose(probs.max(dim=1).values, torch.tensor(0.8 + 0.2 / 3), atol=0.1)
        obs, _, _, _, info = env.step(wanted)


def test_ppo_goes_on_from_the_actor_it_is_given(tiny_world: World) -> None:
    args = ppo.Args(seed=1, total_steps=64, num_steps=4, hidden=(7, 7))
    env = _lesson(tiny_world).make_env(16)
    obs, _ = env.reset(seed=0)
    start = _network(4, inputs=obs.shape[1])
    training = ppo.Training(env, args, start=start)
    assert all(torch.equal(a, b) for a, b in zip(_flat(training.policy()), _flat(start), strict=True))
    # a step size of nothing leaves it as it is
    still = ppo.train(env, dataclasses.replace(args, learning_rate=0.0), progress=False, start=start).policy
    assert all(torch.equal(a, b) for a, b in zip(_flat(still), _flat(start), strict=True))
    moved = ppo.train(env, args, progress=False, start=start).policy
    assert not any(torch.equal(a, b) for a, b in zip(_flat(moved), _flat(start), strict=True))


def _flat(policy: MlpPolicy) -> list[torch.Tensor]:
    return [tensor for layer in policy.layers for tensor in layer]


@pytest.mark.parametrize("settings", [{"hidden": (8, 8)}, {"recurrent": True}, {"shared_trunk": True}])
def test_an_actor_that_does_not_fit_is_refused(tiny_world: World, settings: dict[str, Any]) -> None:
    env = _lesson(tiny_world).make_env(4)
    obs, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match="the start policy is a mlp network with layers"):
        ppo.Training(env, ppo.Args(**{"hidden": (7, 7)} | settings), start=_network(0, inputs=obs.shape[1]))


def test_a_checkpoint_of_another_start_is_refused(tiny_world: World, tmp_path: Any) -> None:
    env = _lesson(tiny_world).make_env(16)
    obs, _ = env.reset(seed=0)
    args = ppo.Args(total_steps=128, num_steps=4, hidden=(7, 7))
    first, other = (_network(seed, inputs=obs.shape[1]) for seed in (0, 1))
    ppo.train(env, args, progress=False, run_dir=tmp_path, start=first)
    ppo.train(env, args, progress=False, run_dir=tmp_path, start=first, resume=True)
    with pytest.raises(ValueError, match="was written with args"):
        ppo.train(env, args, progress=False, run_dir=tmp_path, start=other, resume=True)


def test_tuned_ppo_keeps_to_its_budget_and_says_what_it_chose(tiny_world: World) -> None:
    lesson, served, said = _lesson(tiny_world, requests=20_000), [0], []

    def make_env(num_envs: int, **settings: Any) -> MetaRecVectorEnv:
        env = lesson.make_env(num_envs, **settings)
        step = env.step

        def counted(action: torch.Tensor) -> Any:
            served[0] += env.num_envs
            return step(action)

        env.step = counted  # type: ignore[method-assign]
        return env

    policy = learn_tuned_ppo(dataclasses.replace(lesson, make_env=make_env), log=said.append)
    # rounded up to whole iterations of PPO and whole rounds of races
    assert 0.8 * 20_000 <= served[0] <= 1.05 * 20_000
    assert policy.meta["chosen"] in said[-1]
    assert [text.split()[0] for text in said] == ["schedule", "raced", "chosen"]


def test_tuned_ppo_gives_the_schedule_where_nothing_learned_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    known = known_worlds.drift(8)
    lesson = Lesson.of(known.world, "A", seed=0, requests=20_000, horizon=8, **known.settings)
    # category 2 is the least liked one
    poor = switch_policy(known.world, 8, 2, 2, 0)
    monkeypatch.setattr("agents.tuned_ppo._member", lambda *_: poor)
    policy = learn_tuned_ppo(lesson)
    assert policy.meta["chosen"] == "schedule"
    assert (policy.meta["first"], policy.meta["second"], policy.meta["agent"]) == (0, 1, "tuned_ppo")
