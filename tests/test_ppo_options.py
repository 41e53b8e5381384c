"""PPO's options: action spaces, switches, schedules, judges, best policy. P7/P8: autoreset modes and outputs agree."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from agents import ppo
from agents.ppo import learning
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import load_policy
from metarec_gym.seeding import torch_generator
from tests.test_ppo import ToyEnv


def metarec(action: str = "select", num_envs: int = 20, **settings: Any) -> MetaRecVectorEnv:
    return MetaRecVectorEnv(num_envs, output="torch", autoreset_mode="SameStep", action=action, **settings)


@pytest.mark.parametrize("action", ["slots", "blend"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_slots_and_blends_train_and_their_policies_act_in_the_space(
    action: str, recurrent: bool, tmp_path: Path
) -> None:
    env = metarec(action, outage_rate=0.2) if action == "slots" else metarec(action)
    args = ppo.Args(total_steps=20 * 10 * 2, num_steps=10, minibatch_size=50, recurrent=recurrent, rnn_size=8)
    result = ppo.train(env, args, run_dir=tmp_path, progress=False)
    assert all(math.isfinite(number) for number in result.metrics.values())
    policy = load_policy(tmp_path / "policy.safetensors")
    assert (policy.chooses, policy.kind) == (action, "gru" if recurrent else "mlp")
    obs, infos = env.reset(seed=1)
    policy.begin(20)
    mask = torch.as_tensor(infos["action_mask"]).bool()
    shape = (20, policy.places) if action == "slots" else (20, len(policy.strategies))
    for draw in (None, torch.rand(shape, generator=torch_generator(0))):
        chosen = policy.act(obs, mask, draw)
        assert chosen.shape == (20, *env.single_action_space.shape)
        assert all(env.single_action_space.contains(row) for row in chosen.numpy())
        if action == "slots":
            assert bool(mask.gather(1, chosen).all())


def test_a_blend_learns_the_weights_that_pay() -> None:
    class Target(ToyEnv):
        """Reward 1 - |action - (0.5, -0.5)|^2."""

        def step(self, actions: Tensor) -> Any:
            assert bool((actions.abs() <= 1).all())
            obs, _, terminated, truncated, infos = super().step(torch.zeros(self.num_envs, dtype=torch.int64))
            reward = 1.0 - (actions - torch.tensor([0.5, -0.5])).square().sum(dim=1)
            return obs, reward, terminated, truncated, infos

    env = Target(16, 3, limit=4)
    env.single_action_space = gym.spaces.Box(-1, 1, (2,))
    args = ppo.Args(total_steps=16 * 16 * 30, num_steps=16, minibatch_size=64, learning_rate=1e-2, gamma=0.0, ent_coef=0,
                    hidden=(8,), log_std_init=-0.5)  # fmt: skip
    policy = ppo.train(env, args, progress=False).policy
    weights = policy.act(torch.eye(3), torch.ones(3, 2, dtype=torch.bool))
    torch.testing.assert_close(weights, torch.tensor([[0.5, -0.5]]).expand(3, -1), atol=0.15, rtol=0.0)


def test_forbidden_strategies_are_never_chosen_in_any_place() -> None:
    head = ppo.head_of(gym.spaces.MultiDiscrete([4, 4]))
    mask = ppo.action_mask({"action_mask": np.array([[1, 0, 0, 1]] * 50, dtype=np.int8)}, 50, head, torch.device("cpu"))
    assert mask.shape == (50, 8)
    draws = torch.rand(50, 2, generator=torch_generator(3))
    action, log_prob = head.sample(torch.randn(50, 8, generator=torch_generator(4)), mask, draws)
    assert set(action.unique().tolist()) == {0, 3}
    other, entropy = head.log_prob(torch.zeros(50, 8), mask, action)
    # two of four are left in each of two places: ln 2 + ln 2
    torch.testing.assert_close(entropy, torch.full((50,), 2 * math.log(2.0)))
    torch.testing.assert_close(other, torch.full((50,), -2 * math.log(2.0)))
    assert bool((log_prob > -20).all())


@pytest.mark.parametrize("space", [gym.spaces.MultiDiscrete([2, 3]), gym.spaces.Box(-np.inf, np.inf, (2,)),
                                   gym.spaces.Discrete(3, start=1), gym.spaces.MultiBinary(3)])  # fmt: skip
def test_spaces_that_cannot_be_played_are_refused(space: gym.Space[Any]) -> None:
    with pytest.raises(ValueError, match="places|needs Discrete"):
        ppo.head_of(space)


# ---- switches


def part_of(**changes: Any) -> tuple[ppo.ActorCritic, ppo.Batch]:
    net = ppo.ActorCritic(2, ppo.Choice(2), ppo.Args(), torch_generator(0))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.critic[-1].bias.fill_(1.0)  # type: ignore[union-attr, operator]
    half = torch.full((2,), 0.5).log()
    fields = {
        "log_prob": half,
        "value": torch.zeros(2),
        "advantage": torch.ones(2),
        "returns": torch.tensor([3.0, 1.5]),
    }
    return net, ppo.Batch(torch.zeros(2, 2), None, torch.tensor([0, 1]), **{**fields, **changes})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # value 1, targets 3 and 1.5: errors 4 and 0.25
        ({}, 2.125),
        ({"value_loss_factor": 0.5}, 1.0625),
        # clipped to 0.2 around the old value 0: errors 2.8^2 = 7.84 and 1.3^2 = 1.69
        ({"clip_range_vf": 0.2}, 4.765),
        ({"clip_range_vf": 0.2, "clip_vloss": "max"}, 4.765),
    ],
)
def test_each_value_loss_is_the_one_of_its_formula(settings: dict[str, Any], expected: float) -> None:
    net, part = part_of()
    assert float(learning.losses_of(net, part, ppo.Args(**settings))[1][1]) == pytest.approx(expected)


def test_the_larger_of_both_value_errors_counts_when_asked_for() -> None:
    # old value 3 is right already, the new one is 1: the clipped 2.8 errs by 0.04, the new one by 4
    net, part = part_of(value=torch.full((2,), 3.0), returns=torch.full((2,), 3.0))
    for vloss, expected in (("clipped", 0.04), ("max", 4.0)):
        args = ppo.Args(clip_range_vf=0.2, clip_vloss=vloss)  # type: ignore[arg-type]
        assert float(learning.losses_of(net, part, args)[1][1]) == pytest.approx(expected, rel=1e-5)


def test_a_truncated_episode_is_worth_what_the_switch_says() -> None:
    found = {}
    for switch in ("bootstrap", "current", "terminal"):
        training = ppo.Training(ToyEnv(2, 4, limit=4, walk=True), ppo.Args(num_steps=4, truncation=switch))  # type: ignore[arg-type]
        roll = ppo.collect(training.env, training.net, training.live, 4, training.generators["action"])
        batch, _ = ppo.make_batch(training.net, roll, training.args, 1.0)
        found[switch] = batch.returns.view(4, 2)[3] - roll.reward[3]
        value = training.net.value(torch.eye(4)).detach()
    # the walk stands at 3 and would go on to 0
    torch.testing.assert_close(found["bootstrap"], 0.9 * value[0].expand(2), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(found["current"], 0.9 * value[3].expand(2), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(found["terminal"], torch.zeros(2), atol=1e-6, rtol=0.0)


def test_schedules_fall_to_zero_at_the_end_and_count_as_told() -> None:
    for counted, expected in (("before", [1.0, 0.75, 0.5, 0.25]), ("after", [0.75, 0.5, 0.25, 0.0])):
        args = ppo.Args(total_steps=4 * 8 * 4, num_steps=8, learning_rate=1.0, clip_schedule="linear", clip_range=1.0,
                        schedules_count=counted)  # type: ignore[arg-type]  # fmt: skip
        history = ppo.train(ToyEnv(4, 4), args, progress=False).history
        assert [row["train/learning_rate"] for row in history] == expected
        assert [row["train/clip_range"] for row in history] == expected


def test_the_kl_limit_of_an_epoch_lets_the_first_pass_finish() -> None:
    steps = {}
    for stop in ("minibatch", "epoch"):
        args = ppo.Args(
            num_steps=16, minibatch_size=16, target_kl=1e-6, kl_factor=1.0, kl_stop=stop, learning_rate=0.05
        )  # type: ignore[arg-type]
        training = ppo.Training(ToyEnv(4, 4), args)
        training.iterate()
        steps[stop] = int(next(iter(training.optimizer.state.values()))["step"])
    # the first gradient step has KL 0; the second minibatch is already beyond the limit
    assert steps == {"minibatch": 1, "epoch": 4}


def test_a_batch_normalised_as_a_whole_has_mean_zero_and_deviation_one() -> None:
    training = ppo.Training(ToyEnv(4, 4), ppo.Args(num_steps=16, advantage_scope="batch"))
    roll = ppo.collect(training.env, training.net, training.live, 16, training.generators["action"])
    advantage = ppo.make_batch(training.net, roll, training.args, 1.0)[0].advantage
    assert float(advantage.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(advantage.std()) == pytest.approx(1.0, abs=1e-4)


def test_a_shared_trunk_has_one_set_of_layers_and_its_export_computes_the_same(tmp_path: Path) -> None:
    args = ppo.Args(total_steps=4 * 16, num_steps=16, shared_trunk=True, normalize_obs=True, orthogonal_init=False)
    training = ppo.Training(ToyEnv(4, 4), args)
    training.iterate()
    assert sum(isinstance(m, torch.nn.Linear) for m in training.net.modules()) == 4
    policy = load_policy(training.policy().save(tmp_path / "policy.safetensors"))
    obs = torch.rand(3, 4, generator=torch_generator(5))
    fed = training.normaliser.observation(obs, learn=False)
    torch.testing.assert_close(policy.logits(obs), training.net.output(fed).detach(), atol=1e-6, rtol=0.0)


# ---- runs


def test_the_best_policy_is_that_of_the_best_window_of_episodes(tmp_path: Path) -> None:
    args = ppo.Args(total_steps=4 * 8 * 6, num_steps=8, stats_window=8, learning_rate=0.05)
    history = ppo.train(ToyEnv(4, 4, limit=4), args, run_dir=tmp_path, progress=False).history
    best = max(history, key=lambda row: row["rollout/ep_rew_mean"])
    assert load_policy(tmp_path / "best.safetensors").meta["steps"] == best["step"]


def test_judges_share_the_rows_and_each_answers_its_own(tmp_path: Path) -> None:
    def make(num_envs: int, judge: str) -> ToyEnv:
        return ToyEnv(num_envs, 4, limit=3 if judge == "main" else 5, walk=True)

    env = ppo.with_judges(make, ("main", "second"), 5)
    assert env.sizes == [3, 2]
    obs, _ = env.reset(seed=1)
    for step in range(1, 6):
        obs, reward, _, truncated, infos = env.step(torch.full((5,), (step - 1) % 3))
        assert truncated.tolist() == [step % 3 == 0] * 3 + [step == 5] * 2
        assert reward[:3].tolist() == [1.0] * 3
        if step == 3:  # the first judge's rows show their last observation, and all go on
            assert infos["final_obs"].argmax(dim=1).tolist() == [3] * 5
            assert obs.argmax(dim=1).tolist() == [0] * 3 + [3] * 2
    args = ppo.Args(total_steps=5 * 8 * 4, num_steps=8, checkpoint_every=1)
    whole = ppo.train(ppo.with_judges(make, ("main", "second"), 5), args, run_dir=tmp_path / "whole", progress=False)
    half = dataclasses.replace(args)
    broken = ppo.with_judges(make, ("main", "second"), 5)
    broken.envs[1].die_at = 20
    with pytest.raises(KeyboardInterrupt):
        ppo.train(broken, half, run_dir=tmp_path / "cut", progress=False)
    again = ppo.train(
        ppo.with_judges(make, ("main", "second"), 5), args, run_dir=tmp_path / "cut", progress=False, resume=True
    )
    assert len(again.history) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole.policy.layers, again.policy.layers, strict=True))
    with pytest.raises(ValueError, match="give every judge a row"):
        ppo.with_judges(make, ("main", "second"), 1)


def test_whole_episodes_teach_the_same_in_both_autoreset_modes_and_outputs() -> None:
    seen: dict[tuple[str, str], dict[str, Tensor]] = {}
    for mode in ("SameStep", "NextStep"):
        for output in ("torch", "numpy"):
            env = MetaRecVectorEnv(16, output=output, autoreset_mode=mode, horizon=5)  # type: ignore[arg-type]
            steps = 10 if mode == "SameStep" else 12  # two episodes of five, and a reset after each
            training = ppo.Training(env, ppo.Args(num_steps=steps, reward_scale=1.0))
            with torch.no_grad():  # always the same strategy: a reset in between spends noise of actions
                training.net.actor[-1].bias.copy_(torch.tensor([50.0] + [0.0] * (len(training.strategies) - 1)))  # type: ignore[operator, union-attr]
            roll = ppo.collect(env, training.net, training.live, steps, training.generators["action"])
            value, next_value, _ = ppo.values_of(training.net, roll)
            advantage = ppo.advantages_of(roll.reward, value, next_value, roll.terminated, roll.done, 0.9, 0.95)
            # every user's first two episodes, where both were played to their end
            rows = [torch.nonzero(roll.valid[:, i] & (roll.done[:, i].cumsum(0) - roll.done[:, i].long() < 2))[:, 0]
                    for i in range(16) if int(roll.done[:, i].sum()) >= 2]  # fmt: skip
            users = [i for i in range(16) if int(roll.done[:, i].sum()) >= 2]
            parts = {"obs": roll.obs[:-1], "reward": roll.reward, "advantage": advantage, "ended": roll.terminated}
            seen[mode, output] = {
                name: torch.cat([part[at, i] for at, i in zip(rows, users, strict=True)])
                for name, part in parts.items()
            }
    first = seen["SameStep", "torch"]
    assert bool(first["ended"].any())  # some left, the others were cut off
    assert not bool(first["ended"].all())
    assert len(first["reward"]) > 100
    for other in seen.values():
        for name, mine in first.items():
            torch.testing.assert_close(mine, other[name], atol=1e-5, rtol=0.0)
