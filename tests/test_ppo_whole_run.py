"""P4: a whole run of ours equals a whole run of Stable-Baselines3 that is given the same weights, uniforms and permutations.

Ours runs as it is. SB3 gets ours' first weights, samples its actions by inverting the cumulative probabilities at ours' uniforms,
and shuffles by ours' permutations; environment seeds are equal. So whatever else differs between the two would show.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from agents import ppo
from agents.sb3 import isolated_generators
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.envs.sb3 import SB3VecEnv
from metarec_gym.policy import sample_actions
from metarec_gym.seeding import stream, torch_generator
from metarec_gym.world import World
from tests.test_ppo_parity import parameter_pairs

STEPS, ENVS, ITERATIONS, EPOCHS, SEED = 32, 4, 10, 4, 5
ARGS = ppo.Args(
    seed=SEED,
    total_steps=STEPS * ENVS * ITERATIONS,
    num_steps=STEPS,
    minibatch_size=32,
    epochs=EPOCHS,
    learning_rate=1e-3,
    schedules_count="after",
    clip_schedule="linear",
    gamma=0.95,
    reward_scale=1.0,
)


@dataclass
class Run:
    """What a run played and learned.

    Attributes:
        actions: int64 (requests, num_envs).
        obs: Observations that the steps returned, (requests, num_envs, obs_dim).
        rewards: (requests, num_envs).
        parameters: After the last update.
        terminated: Episodes that ended by themselves, of ours alone.
        truncated: Episodes that were cut, of ours alone.
    """

    actions: np.ndarray
    obs: np.ndarray
    rewards: np.ndarray
    parameters: list[torch.Tensor]
    terminated: int = 0
    truncated: int = 0

    def same_trajectory(self, other: Run) -> bool:
        """Every action, observation and reward."""
        pairs = (self.actions, other.actions), (self.obs, other.obs), (self.rewards, other.rewards)
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs)

    def distance(self, other: Run) -> float:
        """Largest difference of a parameter."""
        pairs = zip(self.parameters, other.parameters, strict=True)
        return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)


class Spy(BaseCallback):
    """Keeps what SB3 plays."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[np.ndarray, ...]] = []

    def _on_step(self) -> bool:
        # copies: SB3 adds the bootstrap to the rewards afterwards, in place
        self.steps.append(tuple(np.array(self.locals[name]) for name in ("actions", "new_obs", "rewards")))
        return True


def run_ours(env: VectorEnv[Any, Any, Any], args: ppo.Args) -> tuple[ppo.ActorCritic, Run]:
    """A whole run, and the network as it was before it."""
    steps: list[tuple[np.ndarray, ...]] = []
    ends = np.zeros(2, dtype=np.int64)
    inner = env.step

    def step(action: Any) -> Any:
        result = inner(action)
        obs, reward, terminated, truncated, _ = result
        steps.append((np.array(action), np.array(obs), np.array(reward, dtype=np.float32)))
        ends[:] += np.sum(terminated), np.sum(truncated & ~terminated)
        return result

    env.step = step  # type: ignore[method-assign]
    training = ppo.Training(env, args)
    fresh = ppo.ActorCritic(training.net.obs_dim, training.net.head, args, torch_generator(0))
    fresh.load_state_dict(training.net.state_dict())
    while training.iteration < training.num_iterations:
        training.iterate()
    parameters = [p.detach() for net in (training.net.actor, training.net.critic) for p in net.parameters()]
    return fresh, Run(*map(np.stack, zip(*steps, strict=True)), parameters, *ends.tolist())


def run_sb3(rows: VecEnv, first: ppo.ActorCritic, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A whole run of SB3 from the weights of `first`, with the uniforms and permutations that a run of ours draws."""
    args, noise = ARGS, {name: torch_generator(SEED, "ppo", name) for name in ("action", "minibatch")}
    model = PPO(
        "MlpPolicy",
        rows,
        n_steps=args.num_steps,
        batch_size=args.minibatch_size,
        n_epochs=args.epochs,
        learning_rate=lambda left: args.learning_rate * left,
        clip_range=lambda left: args.clip_range * left,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        seed=0,
        device="cpu",
    )
    # after the constructor, which seeds the environments with the model's seed
    rows.seed(stream(SEED, "ppo", "env"))
    with torch.no_grad():
        for mine, theirs in parameter_pairs(first, model):
            theirs.copy_(mine)

    def uniforms() -> Iterator[torch.Tensor]:
        while True:
            yield from torch.rand(STEPS, ENVS, generator=noise["action"])

    def permutation(size: int) -> np.ndarray:
        # ours counts requests step by step, SB3 environment by environment
        step, env = np.divmod(torch.randperm(size, generator=noise["minibatch"]).numpy(), ENVS)
        return env * STEPS + step

    drawn, chooser = uniforms(), model.policy.action_dist
    monkeypatch.setattr(chooser, "sample", lambda: sample_actions(chooser.distribution.probs, next(drawn)))
    monkeypatch.setattr(np.random, "permutation", permutation)
    spy = Spy()
    model.learn(args.total_steps, callback=spy)
    parameters = [theirs.detach() for _, theirs in parameter_pairs(first, model)]
    return Run(*map(np.stack, zip(*spy.steps, strict=True)), parameters)


def cartpole() -> gym.Env[Any, Any]:
    """Falls within some ten steps at first; cut after 15, so that both kinds of end occur."""
    return gym.make("CartPole-v1", max_episode_steps=15)


def cartpoles() -> tuple[VectorEnv[Any, Any, Any], VecEnv]:
    """For ours and for SB3."""
    return SyncVectorEnv([cartpole] * ENVS, autoreset_mode=AutoresetMode.SAME_STEP), DummyVecEnv([cartpole] * ENVS)


def select(world: World) -> tuple[VectorEnv[Any, Any, Any], VecEnv]:
    """For ours and for SB3."""
    mine, theirs = (
        MetaRecVectorEnv(ENVS, world=world, fold="A", horizon=6, output="numpy", autoreset_mode="SameStep")
        for _ in range(2)
    )
    return mine, SB3VecEnv(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cartpole", "select"])
def test_a_whole_run_plays_and_learns_what_stable_baselines3_does(
    name: str, leaving_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Callable[[], Any] = {"cartpole": cartpoles, "select": functools.partial(select, leaving_world)}[name]
    with isolated_generators():
        env, rows = make()
        first, ours = run_ours(env, ARGS)
        theirs = run_sb3(rows, first, monkeypatch)
    assert len(ours.actions) == STEPS * ITERATIONS
    assert min(ours.terminated, ours.truncated) >= 10  # both kinds of end are in the run
    assert ours.same_trajectory(theirs)
    assert ours.distance(theirs) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"truncation": "terminal"}, {"schedules_count": "before"}, {"gae_lambda": 0.9}])
def test_a_run_that_differs_in_one_setting_ends_elsewhere(
    setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with isolated_generators():
        env, rows = cartpoles()
        first, ours = run_ours(env, dataclasses.replace(ARGS, **setting))
        theirs = run_sb3(rows, first, monkeypatch)
    assert not ours.same_trajectory(theirs)
    assert ours.distance(theirs) > 1e-3
