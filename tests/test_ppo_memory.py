"""PPO with a memory: states are reset, replayed and exported as they were played, and the memory is used.

P6 for recurrent networks (ratio one at the first gradient step), L4 in small: a task that only a memory can solve.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from agents import ppo
from metarec_gym.policy import GruPolicy, load_policy
from metarec_gym.seeding import fold_in, torch_generator, uniform
from tests.test_ppo import ToyEnv

SMALL: dict[str, Any] = {"recurrent": True, "rnn_size": 12, "hidden": (12,), "reward_scale": 1.0}


class CueEnv(ToyEnv):
    """The target is shown at an episode's first request alone, and stays: (1 + 5/3) / 6 = 0.44 of the hits without a memory."""

    def _target(self) -> Tensor:
        return (uniform(fold_in(self.key, self.clock - self.length)) * self.size).to(torch.int64)

    def _obs(self) -> Tensor:
        return torch.where((self.length == 0)[:, None], super()._obs(), 0.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def played(mode: AutoresetMode, shared: bool, steps: int = 10) -> tuple[ppo.Training, ppo.Sequences]:
    """A second rollout, so that memories are not empty at its start, of episodes that end inside it."""
    training = ppo.Training(CueEnv(5, 3, limit=4, mode=mode), ppo.Args(num_steps=steps, shared_trunk=shared, **SMALL))
    for _ in range(2):
        roll = ppo.collect(training.env, training.net, training.live, steps, training.generators["action"])
        batch, training.live.critic_memory = ppo.make_batch(training.net, roll, training.args, 1.0)
    assert isinstance(batch, ppo.Sequences)
    return training, batch


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("shared", [False, True])
def test_the_update_meets_the_very_states_of_the_rollout(mode: AutoresetMode, shared: bool) -> None:
    training, batch = played(mode, shared)
    assert float(batch.memory.abs().sum()) > 0
    part = batch.rows(torch.tensor([3, 0, 4]))
    output, value = part.forward(training.net)
    log_prob, _ = training.net.head.log_prob(output, part.mask, part.action)
    assert len(part.action) == 3 * (10 if mode == AutoresetMode.SAME_STEP else 8)
    torch.testing.assert_close(log_prob, part.log_prob, atol=1e-6, rtol=0.0)
    torch.testing.assert_close(value, part.value, atol=1e-6, rtol=0.0)


def test_a_memory_that_is_not_emptied_between_episodes_breaks_the_ratio_of_one() -> None:
    training, batch = played(AutoresetMode.SAME_STEP, False)
    batch.start, batch.cuts = torch.zeros_like(batch.start), ()
    part = batch.rows(torch.arange(5))
    log_prob, _ = training.net.head.log_prob(part.forward(training.net)[0], part.mask, part.action)
    assert float((log_prob - part.log_prob).detach().abs().max()) > 1e-5


def test_an_episode_is_played_alike_whatever_the_user_met_before() -> None:
    net = ppo.ActorCritic(3, ppo.Choice(3), ppo.Args(**SMALL), torch_generator(0))
    obs = torch.rand(6, 2, 3, generator=torch_generator(1))
    start = torch.zeros(6, 2, dtype=torch.bool)
    start[2] = True
    memories = torch.rand(2, 2, 12, generator=torch_generator(2)).unbind()
    one = net.sequence(obs, (memories[0], memories[0]), start, (2,))
    two = net.sequence(obs, (memories[1], memories[1]), start, (2,))
    for mine, other in zip(one, two, strict=True):
        assert torch.equal(mine[2:], other[2:])
        assert not torch.equal(mine[:2], other[:2])


def test_the_last_observation_of_a_truncated_episode_is_valued_with_its_memory() -> None:
    values = []
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        training = ppo.Training(ToyEnv(4, 4, limit=4, walk=True, mode=mode), ppo.Args(num_steps=5, **SMALL))
        roll = ppo.collect(training.env, training.net, training.live, 5, training.generators["action"])
        values.append(ppo.values_of(training.net, roll)[1][3])
    torch.testing.assert_close(values[0], values[1], atol=1e-6, rtol=0.0)


@pytest.mark.slow
def test_only_a_memory_solves_the_task_whose_cue_is_shown_once() -> None:
    args = ppo.Args(total_steps=32 * 24 * 14, num_steps=24, minibatch_size=192, learning_rate=8e-3, gamma=0.5, **SMALL)
    hits = ppo.train(CueEnv(32, 3, limit=6), args, progress=False).metrics["rollout/ep_rew_mean"] / 6
    assert hits > 0.8


def test_a_killed_run_with_memory_and_normalisation_resumes_and_equals_the_unbroken_one(tmp_path: Path) -> None:
    args = ppo.Args(total_steps=8 * 6 * 4, num_steps=6, minibatch_size=24, checkpoint_every=2, normalize_obs=True,
                    normalize_reward=True, **{**SMALL, "reward_scale": None})  # fmt: skip
    unbroken = ppo.train(CueEnv(8, 3, limit=4), args, progress=False).policy
    with pytest.raises(KeyboardInterrupt):
        ppo.train(CueEnv(8, 3, limit=4, die_at=6 * 3 + 2), args, run_dir=tmp_path, progress=False)
    resumed = ppo.train(CueEnv(8, 3, limit=4), args, run_dir=tmp_path, progress=False, resume=True)
    assert len(resumed.history) == 2
    assert resumed.policy._tensors().keys() == unbroken._tensors().keys()
    for name, tensor in unbroken._tensors().items():
        assert torch.equal(tensor, resumed.policy._tensors()[name]), name


def test_the_exported_policy_remembers_as_the_network_did(tmp_path: Path) -> None:
    env = CueEnv(5, 3, limit=4)
    training = ppo.Training(env, ppo.Args(num_steps=4, normalize_obs=True, **SMALL))
    policy = load_policy(training.policy().save(tmp_path / "policy.safetensors"))
    assert isinstance(policy, GruPolicy)
    policy.begin(5)
    obs, _ = env.reset(seed=3)
    memory, start = torch.zeros(5, 12), torch.ones(5, dtype=torch.bool)
    alive, allowed = torch.tensor([True, True, True, True, False]), torch.ones(5, 3, dtype=torch.bool)
    for _ in range(4):
        fed = training.normaliser.observation(obs, learn=False)
        output, memory = training.net.step(fed, memory, start)
        for _ in range(2):  # asking twice does not move the memory
            probs = policy.action_probs(obs, allowed)
        torch.testing.assert_close(probs[:4], torch.softmax(output, dim=1)[:4], atol=1e-6, rtol=0.0)
        action = probs.argmax(dim=1)
        policy.observe(obs, action, torch.zeros(5), alive)
        obs, start = env.step(action)[0], torch.zeros(5, dtype=torch.bool)
    assert float(policy.state[4].abs().max()) == 0.0  # nobody was served in the ended row
    with pytest.raises(ValueError, match="call begin"):
        policy.action_probs(obs[:2], allowed[:2])
