"""PPO does what its formulas say, learns what is known to be learnable, and resumes bit for bit.

Which test is which, in this file if no other is named:

- P1 advantages: equal a numpy loop, the closed form, and SB3's buffer (test_ppo_parity).
- P2 truncation: an endless task is worth 50 only with the bootstrap; the observation after a reset never enters.
- P3 one update equals SB3's, P5 also masked against sb3-contrib: test_ppo_parity. Masked choices have no gradient and no entropy.
- P4 a whole run equals SB3's with the same uniforms and permutations: test_ppo_whole_run.
- P6 ratio one at the first gradient step; with memory: test_ppo_memory.
- P7 equal seeds, equal policies; numpy equals torch output (test_ppo_options); several processes equal one (test_ppo_team).
- P8 both autoreset modes: reset rows are not learned from; whole episodes teach the same (test_ppo_options).
- P9 each planted error is caught; more of them in test_ppo_parity and test_ppo_memory.
- L1 identity, L2 with and without masks, L3 CartPole, L4 a cue that only a memory keeps (test_ppo_memory), L6 the synthetic world
  here and in test_known_optimum; L5 LunarLander (test_ppo_lander, needs Box2D).
"""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

import agents.ppo.learning
import agents.ppo.rollout
import agents.ppo.training
from agents import ppo
from metarec_gym.policy import MlpPolicy
from metarec_gym.seeding import fold_in, torch_generator, uniform

ROOT = Path(__file__).parents[1]


class ToyEnv(VectorEnv[Any, Any, Any]):
    """A torch vector environment whose obs is the one-hot target; episodes end after `limit` steps.

    With `walk` the target is the episode's step modulo `size`, else it is drawn. Reward 1 for a hit, or always.
    """

    def __init__(
        self,
        num_envs: int,
        size: int,
        *,
        limit: int = 100,
        invalid: int = 0,
        show_mask: bool = True,
        walk: bool = False,
        always_reward: bool = False,
        ending: str = "truncated",
        mode: AutoresetMode = AutoresetMode.SAME_STEP,
        poison_reset: bool = False,
        die_at: int | None = None,
    ) -> None:
        self.num_envs, self.size, self.limit, self.invalid, self.walk = num_envs, size, limit, invalid, walk
        self.show_mask, self.always_reward, self.ending = show_mask, always_reward, ending
        self.poison_reset, self.die_at, self.calls = poison_reset, die_at, 0
        self.metadata = {"autoreset_mode": mode}
        self.mode = mode
        self.single_observation_space = gym.spaces.Box(0, 1, (size,), np.float32)
        self.single_action_space = gym.spaces.Discrete(size)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Tensor, dict[str, Any]]:
        self.key = fold_in(torch.tensor([0 if seed is None else seed]), torch.arange(self.num_envs))
        self.clock = torch.zeros(self.num_envs, dtype=torch.int64)
        self.length = torch.zeros(self.num_envs, dtype=torch.int64)
        self.over = torch.zeros(self.num_envs, dtype=torch.bool)
        return self._obs(), self._infos()

    def _target(self) -> Tensor:
        if self.walk:
            return self.length % self.size
        return (uniform(fold_in(self.key, self.clock)) * self.size).to(torch.int64)

    def _obs(self) -> Tensor:
        return torch.nn.functional.one_hot(self._target(), self.size).to(torch.float32)

    def _infos(self) -> dict[str, Any]:
        if not self.invalid or not self.show_mask:
            return {}
        draws = uniform(fold_in(fold_in(self.key, self.clock)[:, None], torch.arange(1, self.size + 1)))
        draws.scatter_(1, self._target()[:, None], 2.0)  # the target is never among the forbidden
        forbidden = draws.argsort(dim=1)[:, : self.invalid]
        mask = torch.ones(self.num_envs, self.size, dtype=torch.int8).scatter_(1, forbidden, 0)
        return {"action_mask": mask}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        self.calls += 1
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        assert isinstance(actions, Tensor)
        reset_now = self.over if self.mode == AutoresetMode.NEXT_STEP else torch.zeros_like(self.over)
        hit = torch.ones_like(self.over) if self.always_reward else actions == self._target()
        reward = torch.where(reset_now, 0.0, hit.to(torch.float32))
        self.clock = self.clock + 1
        self.length = torch.where(reset_now, 0, self.length + 1)
        ended = ~reset_now & (self.length >= self.limit)
        obs, infos = self._obs(), {}
        if self.mode == AutoresetMode.SAME_STEP:
            infos = {"final_obs": obs, "_final_obs": ended}
            self.length = torch.where(ended, 0, self.length)
            obs = self._obs()
            if self.poison_reset:
                obs = torch.where(ended[:, None], torch.nan, obs)
        self.over = ended
        none = torch.zeros_like(ended)
        terminated, truncated = (none, ended) if self.ending == "truncated" else (ended, none)
        return obs, reward, terminated, truncated, {**infos, **self._infos()}

    def get_state(self) -> dict[str, Tensor]:
        return {"key": self.key, "clock": self.clock, "length": self.length, "over": self.over}

    def set_state(self, state: dict[str, Tensor]) -> None:
        self.key, self.clock, self.length, self.over = (state[k] for k in ("key", "clock", "length", "over"))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


IDENTITY = ppo.Args(
    total_steps=1200, num_steps=64, minibatch_size=64, epochs=8, learning_rate=5e-3, lr_schedule="constant", gamma=0.4
)


def hit_rate(policy: MlpPolicy, env: ToyEnv, steps: int = 100) -> float:
    """Share of the targets that the most probable action hits."""
    obs, infos = env.reset(seed=99)
    total = 0.0
    for _ in range(steps):
        probs = policy.action_probs(obs, ppo.action_mask(infos, len(obs), ppo.Choice(env.size), obs.device))
        obs, reward, _, _, infos = env.step(probs.argmax(dim=1))
        total += float(reward.mean())
    return total / steps


# ---- advantages


def test_advantages_equal_a_numpy_loop_with_terminations_and_truncations() -> None:
    rng = np.random.default_rng(3)
    steps, envs = 50, 7
    reward, value, next_value = (rng.normal(size=(steps, envs)).astype(np.float32) for _ in range(3))
    terminated, truncated = rng.random((steps, envs)) < 0.1, rng.random((steps, envs)) < 0.1
    for gamma in (1.0, 0.99):
        for lam in (1.0, 0.9):
            expected = np.zeros((steps, envs))
            for e in range(envs):
                later = 0.0
                for t in reversed(range(steps)):
                    future = 0.0 if terminated[t, e] else next_value[t, e]
                    ended = terminated[t, e] or truncated[t, e]
                    delta = reward[t, e] + gamma * future - value[t, e]
                    later = delta + (0.0 if ended else gamma * lam * later)
                    expected[t, e] = later
            tensors = [torch.from_numpy(x) for x in (reward, value, next_value, terminated, terminated | truncated)]
            np.testing.assert_allclose(ppo.advantages_of(*tensors, gamma, lam).numpy(), expected, atol=1e-5)


def test_the_future_counts_after_a_truncation_and_not_after_a_termination() -> None:
    # one step, reward 1, V(s) = 2, V(s') = 10, gamma 0.5: 1 + 5 - 2 = 4 if truncated, 1 - 2 = -1 if terminated
    one, two, ten = torch.ones(1, 2), torch.full((1, 2), 2.0), torch.full((1, 2), 10.0)
    terminated, done = torch.tensor([[False, True]]), torch.tensor([[True, True]])
    assert ppo.advantages_of(one, two, ten, terminated, done, 0.5, 0.9).tolist() == [[4.0, -1.0]]


def test_constant_rewards_give_the_closed_form_of_the_geometric_sum() -> None:
    # value 0, reward 1, lambda 1: A_t = sum of gamma^i to the end of the episode
    steps, gamma = 6, 0.9
    zeros, no = torch.zeros(steps, 1), torch.zeros(steps, 1, dtype=torch.bool)
    done = no.clone()
    done[[2, 5]] = True
    advantage = ppo.advantages_of(zeros + 1, zeros, zeros, done, done, gamma, 1.0)[:, 0]
    expected = [2.71, 1.9, 1.0, 2.71, 1.9, 1.0]
    torch.testing.assert_close(advantage, torch.tensor(expected))


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("ending", ["truncated", "terminated"])
def test_an_endless_task_cut_every_8_steps_is_worth_50_only_with_the_bootstrap(
    mode: AutoresetMode, ending: str
) -> None:
    # reward 1 forever at gamma 0.98 is worth 1 / 0.02 = 50; counted to the cut it is at most (1 - 0.98^8) / 0.02 = 7.5
    env = ToyEnv(4, 4, limit=8, walk=True, always_reward=True, ending=ending, mode=mode)
    iterations = 40 if ending == "truncated" else 15
    args = ppo.Args(total_steps=4 * 18 * iterations, num_steps=18, minibatch_size=72, epochs=6, learning_rate=1e-2,
                    gamma=0.98, gae_lambda=1.0, reward_scale=50.0, hidden=(16,))  # fmt: skip
    training = ppo.Training(env, args)
    for _ in range(iterations):
        training.iterate()
    values = training.net.value(torch.eye(4)) * 50.0
    close = (values - 50.0).abs() < 1.0
    assert bool(close.all()) if ending == "truncated" else not bool(close.any())


def test_the_observation_after_a_reset_never_enters_the_advantages_of_the_episode_before() -> None:
    batches = []
    for poison in (False, True):
        env = ToyEnv(4, 4, limit=8, walk=True, poison_reset=poison)
        training = ppo.Training(env, ppo.Args(num_steps=8, reward_scale=1.0))
        roll = ppo.collect(env, training.net, training.live, 8, training.generators["action"])
        assert bool(roll.obs[8].isnan().all()) == poison
        batches.append(ppo.make_batch(training.net, roll, training.args, 1.0)[0])
    assert torch.equal(batches[0].advantage, batches[1].advantage)


def test_what_follows_an_episode_leaves_its_advantages_alone() -> None:
    advantages = []
    for later in (0.0, 100.0):
        training = ppo.Training(ToyEnv(4, 4, limit=4, ending="terminated"), ppo.Args(num_steps=8))
        roll = ppo.collect(training.env, training.net, training.live, 8, training.generators["action"])
        roll.reward[4:] += later
        advantages.append(ppo.make_batch(training.net, roll, training.args, 1.0)[0].advantage.view(8, 4))
    assert torch.equal(advantages[0][:4], advantages[1][:4])
    assert not torch.equal(advantages[0][4:], advantages[1][4:])


def test_the_last_request_before_a_termination_is_worth_its_reward_alone() -> None:
    training = ppo.Training(ToyEnv(4, 4, limit=4, ending="terminated"), ppo.Args(num_steps=4))
    roll = ppo.collect(training.env, training.net, training.live, 4, training.generators["action"])
    batch, _ = ppo.make_batch(training.net, roll, training.args, 1.0)
    torch.testing.assert_close(batch.returns.view(4, 4)[3], roll.reward[3])


def test_next_step_reset_rows_are_neither_counted_nor_learned_from() -> None:
    env = ToyEnv(3, 4, limit=4, mode=AutoresetMode.NEXT_STEP)
    training = ppo.Training(env, ppo.Args(num_steps=10, total_steps=60, reward_scale=1.0))
    roll = ppo.collect(env, training.net, training.live, 10, training.generators["action"])
    # 4 requests, 1 reset, 4 requests, 1 reset
    assert roll.valid[:, 0].tolist() == [True] * 4 + [False] + [True] * 4 + [False]
    assert len(ppo.make_batch(training.net, roll, training.args, 1.0)[0].action) == 3 * 8
    training.iterate()
    assert training.metrics["rollout/ep_len_mean"] == 4.0


def test_a_numpy_environment_of_gymnasium_trains_in_both_modes() -> None:
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        env = gym.make_vec("CartPole-v1", 2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})
        result = ppo.train(env, ppo.Args(total_steps=256, num_steps=64), progress=False)
        assert result.metrics["rollout/ep_len_mean"] == result.metrics["rollout/ep_rew_mean"] > 5


# ---- update


def test_the_first_gradient_step_meets_ratio_one() -> None:
    for invalid in (0, 3):
        training = ppo.Training(ToyEnv(16, 8, invalid=invalid), ppo.Args(num_steps=16, reward_scale=1.0))
        roll = ppo.collect(training.env, training.net, training.live, 16, training.generators["action"])
        batch = ppo.make_batch(training.net, roll, training.args, 1.0)[0]
        log_probs, _ = training.net.head.log_prob(training.net.output(batch.obs), batch.mask, batch.action)
        assert float(((log_probs - batch.log_prob).exp() - 1).abs().max().detach()) < 1e-6
        scalars = ppo.update(training.net, training.optimizer, batch, training.args, [torch.arange(256)])
        assert float(scalars["train/approx_kl"]) < 1e-6
        assert float(scalars["train/clip_fraction"]) == 0.0


def test_the_scale_and_offset_of_advantages_do_not_matter() -> None:
    results = []
    for scale, offset in ((1.0, 0.0), (8.0, 3.0)):
        training = ppo.Training(ToyEnv(8, 4), ppo.Args(num_steps=16, vf_coef=0.0, reward_scale=1.0))
        roll = ppo.collect(training.env, training.net, training.live, 16, training.generators["action"])
        batch, _ = ppo.make_batch(training.net, roll, training.args, 1.0)
        batch.advantage = batch.advantage * scale + offset
        ppo.update(training.net, training.optimizer, batch, training.args, [torch.arange(128)])
        results.append(torch.cat([p.detach().flatten() for p in training.net.actor.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=0.0)


def test_a_forbidden_strategy_has_probability_zero_no_gradient_and_no_entropy() -> None:
    net = ppo.ActorCritic(4, ppo.Choice(6), ppo.Args(hidden=(8,)), torch_generator(0))
    mask = torch.tensor([[True, False, True, True, False, False], [False, True, False, False, False, False]])
    seen: list[Tensor] = []
    net.actor.register_forward_hook(lambda _module, _inputs, output: seen.append(output) or output.retain_grad())
    log_probs = net.head.log_probs(net.output(torch.rand(2, 4, generator=torch_generator(1))), mask)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(dim=1)
    assert bool((probs[~mask] == 0).all())
    assert float(entropy[0].detach()) == pytest.approx(np.log(3), abs=1e-3)  # near-uniform at the start: ln(3 allowed)
    assert float(entropy[1].detach()) == 0.0
    (entropy.sum() + log_probs[0, 0]).backward()
    assert seen[0].grad is not None
    assert bool((seen[0].grad[~mask] == 0).all())


def test_forbidden_strategies_are_never_chosen() -> None:
    env = ToyEnv(32, 10, invalid=7)
    training = ppo.Training(env, ppo.Args(num_steps=32))
    roll = ppo.collect(env, training.net, training.live, 32, training.generators["action"])
    assert bool(roll.mask.gather(2, roll.action[..., None]).all())


def test_a_mask_without_any_strategy_is_refused() -> None:
    training = ppo.Training(ToyEnv(2, 4), ppo.Args(num_steps=2))
    training.live.mask = torch.zeros(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one"):
        training.iterate()


def test_disabled_autoreset_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="autoreset_mode='SameStep'"):
        ppo.train(ToyEnv(2, 4, mode=AutoresetMode.DISABLED), ppo.Args(), progress=False)


def test_the_learning_rate_falls_linearly_from_its_full_value() -> None:
    result = ppo.train(ToyEnv(4, 4), ppo.Args(total_steps=4 * 8 * 4, num_steps=8, learning_rate=1.0), progress=False)
    assert [h["train/learning_rate"] for h in result.history] == [1.0, 0.75, 0.5, 0.25]


# ---- runs


def weights(policy: MlpPolicy) -> list[Tensor]:
    return [tensor for layer in policy.layers for tensor in layer]


def test_equal_seeds_give_equal_policies_and_no_global_generator_moves() -> None:
    random.seed(1)
    states = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002 (is it touched?)
    args = dataclasses.replace(IDENTITY, total_steps=512)
    one, two = (ppo.train(ToyEnv(4, 4), args, progress=False).policy for _ in range(2))
    other = ppo.train(ToyEnv(4, 4), dataclasses.replace(args, seed=1), progress=False).policy
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))
    assert not torch.equal(weights(one)[0], weights(other)[0])
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_killed_run_resumes_and_equals_the_unbroken_one(tmp_path: Path) -> None:
    args = ppo.Args(total_steps=8 * 16 * 6, num_steps=16, minibatch_size=50, checkpoint_every=3)
    unbroken = ppo.train(ToyEnv(8, 5, limit=7), args, run_dir=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(ToyEnv(8, 5, limit=7, die_at=16 * 4 + 5), args, run_dir=tmp_path / "cut", progress=False)
    resumed = ppo.train(ToyEnv(8, 5, limit=7), args, run_dir=tmp_path / "cut", progress=False, resume=True)
    assert len(resumed.history) == 3
    assert resumed.steps == unbroken.steps == 768
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed.policy), weights(unbroken.policy), strict=True))
    for mine, theirs in zip(resumed.history, unbroken.history[3:], strict=True):
        assert {k: v for k, v in mine.items() if k != "time/fps"} == {
            k: v for k, v in theirs.items() if k != "time/fps"
        }
    # a finished run has nothing left to do and says the same
    again = ppo.train(ToyEnv(8, 5, limit=7), args, run_dir=tmp_path / "cut", progress=False, resume=True)
    assert again.history == []
    assert again.metrics == resumed.metrics


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    args = ppo.Args(total_steps=64, num_steps=16)
    ppo.train(ToyEnv(4, 4), args, run_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="use the same settings"):
        ppo.train(ToyEnv(4, 4), dataclasses.replace(args, gamma=0.5), run_dir=tmp_path, progress=False, resume=True)


def test_tensorboard_holds_the_tags_of_stable_baselines3_and_one_event_file(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = ppo.train(
        ToyEnv(4, 3, limit=8), ppo.Args(total_steps=2 * 4 * 16, num_steps=16), run_dir=tmp_path, progress=False
    )  # fmt: skip
    assert len(list(tmp_path.rglob("events.out.tfevents*"))) == 1
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    expected = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "metarec/return_per_request"}
    expected |= {f"metarec/action_share/action_{i}" for i in range(3)}
    expected |= {f"train/{name}" for name in ("approx_kl", "clip_fraction", "clip_range", "entropy_loss", "loss")}
    expected |= {f"train/{n}" for n in ("explained_variance", "learning_rate", "policy_gradient_loss", "value_loss")}
    assert set(events.Tags()["scalars"]) == expected
    assert [event.step for event in events.Scalars("rollout/ep_rew_mean")] == [64, 128]
    assert "hparams" in {
        plugin for plugin in events.summary_metadata.values() for plugin in [plugin.plugin_data.plugin_name]
    }
    saved = MlpPolicy.load(tmp_path / "policy.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(weights(saved), weights(result.policy), strict=True))
    assert saved.meta["agent"] == "ppo"


def test_metarec_resumes_bit_for_bit(tmp_path: Path) -> None:
    vector_env = pytest.importorskip("metarec_gym.envs.vector_env")

    def env() -> Any:
        return vector_env.MetaRecVectorEnv(num_envs=20, output="torch", autoreset_mode="SameStep")

    args = ppo.Args(total_steps=20 * 15 * 4, num_steps=15, minibatch_size=100, checkpoint_every=2)
    unbroken = ppo.train(env(), args, progress=False)
    broken, calls = env(), []
    serve = broken.step

    def dying_step(actions: Tensor) -> Any:
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return serve(actions)

    broken.step = dying_step
    with pytest.raises(KeyboardInterrupt):
        ppo.train(broken, args, run_dir=tmp_path, progress=False)
    resumed = ppo.train(env(), args, run_dir=tmp_path, progress=False, resume=True)
    assert len(resumed.history) == 2
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed.policy), weights(unbroken.policy), strict=True))


def test_importing_ppo_needs_nothing_but_torch_numpy_gymnasium_and_safetensors() -> None:
    heavy = "{'pandas', 'scipy', 'stable_baselines3', 'tyro', 'tensorboard', 'matplotlib', 'implicit', 'sklearn'}"
    code = f"import sys, agents.ppo; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# ---- learning


def test_ppo_learns_the_identity_within_1200_steps() -> None:
    result = ppo.train(ToyEnv(1, 4), IDENTITY, progress=False)
    assert result.steps <= 1280  # whole iterations of 64
    assert hit_rate(result.policy, ToyEnv(1, 4)) >= 0.9


def learn_with_forbidden_strategies(show_mask: bool) -> float:
    """Hit rate after 4096 requests with 70 strategies of which 55 are forbidden at each."""
    args = ppo.Args(total_steps=4096, num_steps=256, minibatch_size=128, epochs=10, learning_rate=2e-3, gamma=0.4,
                    lr_schedule="constant", ent_coef=0.0)  # fmt: skip
    result = ppo.train(ToyEnv(8, 70, invalid=55, show_mask=show_mask), args, progress=False)
    return hit_rate(result.policy, ToyEnv(8, 70, invalid=55, show_mask=show_mask))


def test_masks_make_a_task_with_many_forbidden_strategies_learnable() -> None:
    assert learn_with_forbidden_strategies(True) >= 0.9


@pytest.mark.slow
def test_without_masks_that_task_is_not_learned() -> None:
    assert learn_with_forbidden_strategies(False) < 0.6


def test_metarec_ppo_beats_the_uniform_choice_on_the_synthetic_world() -> None:
    vector_env = pytest.importorskip("metarec_gym.envs.vector_env")
    env = vector_env.MetaRecVectorEnv(num_envs=128, output="torch", autoreset_mode="SameStep")
    result = ppo.train(env, ppo.Args(total_steps=50_000, minibatch_size=1056), progress=False)
    # the first rollout plays an almost uniform policy; each user type has a specialist that pays about twice as much
    first, last = result.history[0], result.metrics
    assert last["metarec/return_per_request"] > 1.5 * first["metarec/return_per_request"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation",
    ["advantage sign", "no termination", "no mask", "reset value", "no done", "raw advantage", "old log-probs"],
)
def test_each_planted_error_is_caught_by_a_test_above(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true_advantages, true_mask = ppo.advantages_of, ppo.action_mask
    learning, rollout, run = agents.ppo.learning, agents.ppo.rollout, agents.ppo.training
    check = test_ppo_learns_the_identity_within_1200_steps
    if mutation == "advantage sign":
        monkeypatch.setattr(learning, "advantages_of", lambda *args: -true_advantages(*args))
    elif mutation == "no termination":
        monkeypatch.setattr(
            learning,
            "advantages_of",
            lambda r, v, n, terminated, d, g, lam: true_advantages(r, v, n, d & False, d, g, lam),
        )
        check = test_the_last_request_before_a_termination_is_worth_its_reward_alone
    elif mutation == "no mask":
        for module in (rollout, run):
            monkeypatch.setattr(module, "action_mask", lambda infos, *rest: true_mask({}, *rest))
        check = test_masks_make_a_task_with_many_forbidden_strategies_learnable
    elif mutation == "no done":
        monkeypatch.setattr(
            learning, "advantages_of", lambda r, v, n, x, d, g, lam: true_advantages(r, v, n, x, d & False, g, lam)
        )
        check = test_what_follows_an_episode_leaves_its_advantages_alone
    elif mutation == "raw advantage":
        monkeypatch.setattr(ppo.Team, "normalised", lambda team, advantage: advantage)
        check = test_the_scale_and_offset_of_advantages_do_not_matter
    elif mutation == "old log-probs":
        true_sample = ppo.Choice.sample

        def old(head: Any, output: Tensor, mask: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
            action, log_prob = true_sample(head, output, mask, draw)
            return action, log_prob - 0.01

        monkeypatch.setattr(ppo.Choice, "sample", old)
        check = test_the_first_gradient_step_meets_ratio_one
    else:

        def reset_value(net: Any, roll: Any) -> Any:
            values = net.value(roll.obs)
            return values[:-1], values[1:], roll.critic_memory

        monkeypatch.setattr(learning, "values_of", reset_value)
        check = test_the_observation_after_a_reset_never_enters_the_advantages_of_the_episode_before
    with pytest.raises(AssertionError):
        check()


@pytest.mark.slow
def test_ppo_balances_the_pole_for_475_steps() -> None:
    env = gym.make_vec("CartPole-v1", 8, vectorization_mode="vector_entry_point")
    args = ppo.Args(total_steps=100_000, num_steps=32, minibatch_size=256, epochs=20, gamma=0.98, gae_lambda=0.8,
                    learning_rate=1e-3, ent_coef=0.0, reward_scale=1.0)  # fmt: skip
    policy = ppo.train(env, args, progress=False).policy
    test_env = gym.make_vec("CartPole-v1", 20, vectorization_mode="vector_entry_point")
    obs, _ = test_env.reset(seed=7)
    length, alive = np.zeros(20), np.ones(20, dtype=bool)
    while alive.any():
        probs = policy.action_probs(torch.as_tensor(obs), torch.ones(20, 2, dtype=torch.bool))
        obs, _, terminated, truncated, _ = test_env.step(probs.argmax(dim=1).numpy())
        length += alive
        alive &= ~(terminated | truncated)
    assert length.mean() >= 475
