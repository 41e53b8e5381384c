"""A captured step is the environment's own: the same bits as `step`, in every way of running it.

On CPU: `eager` and `compile` with dynamo's own backend (which proves that the step is one graph, so that nothing asks the host)
give the same bits; the compiler's C++ (slow) may round differently, so its outcome draws must agree in 99.9 % of the rows, and
its rewards within 1e-5 where they do. The `gpu` tests compare all three modes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from experiments.random_world import RandomWorld
from metarec_gym.envs import captured
from metarec_gym.envs.captured import CapturedRollout, Carry, refusal, transition
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.fixed_shapes import fixed_shapes, may_look
from metarec_gym.world import World

ROWS = 70
"""Not a multiple of 16, so that there are padding rows, and above 64, from where the step sorts rows on CPU."""
STEPS = 16
ASKS_THE_HOST = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal")


@pytest.fixture(scope="module")
def several_members() -> World:
    """Two members in the judge and layers wide enough that `step` sorts rows by member; episodes of 5 requests."""
    return RandomWorld(
        n_items=150, n_users=12, starts_per_user=2, horizon=5, history=5, n_strategies=3, dim=8, hidden=16, rank=8,
        n_members=2,
    ).build()  # fmt: skip


def make(world: World, rows: int = ROWS, seed: int = 3, **settings: Any) -> MetaRecVectorEnv:
    options = {"output": "torch", "autoreset_mode": "SameStep", **settings}
    env = MetaRecVectorEnv(rows, world=world, **options)
    env.reset(seed=seed)
    return env


def noise_for(env: MetaRecVectorEnv, steps: int = STEPS, seed: int = 0) -> Tensor:
    """Uniforms (steps, num_envs, ...), from which `act_of` makes actions."""
    shape = {"select": (), "blend": (env.world.n_strategies,), "slots": (env.slate_size,)}[env.config.action]
    return torch.rand(steps, env.num_envs, *shape, generator=torch.Generator().manual_seed(seed)).to(env.device)


def act_of(env: MetaRecVectorEnv) -> captured.Act:
    """Actions that hang on the noise and on the observation, so that a wrong observation shows."""
    kind, strategies = env.config.action, env.world.n_strategies

    def act(obs: Tensor, available: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = obs.sum(dim=1).view(-1, *[1] * (noise.ndim - 1))
        mixed = (noise + seen).frac().abs()
        action = mixed * 2 - 1 if kind == "blend" else (mixed * strategies).to(torch.int64).clamp(max=strategies - 1)
        return action, action, noise.flatten(1).sum(dim=1) if noise.ndim > 1 else noise

    return act


def rollout_of(env: MetaRecVectorEnv, steps: int = STEPS, **options: Any) -> CapturedRollout:
    return CapturedRollout(env, act_of(env), steps, noise_shape=tuple(noise_for(env, 1).shape[2:]), **options)


def assert_is_what_step_does(
    world: World, runs: int = 1, *, mode: str = "eager", backend: str = "", **settings: Any
) -> int:
    """Plays `runs` rollouts and the same requests by `step`; returns how many episodes ended."""
    env, ref = make(world, **settings), make(world, **settings)
    plays, act = rollout_of(env, mode=mode, backend=backend), act_of(ref)
    obs, mask, ended = ref._observe()[:ROWS], torch.as_tensor(ref.action_masks())[:, : world.n_strategies], 0
    for run in range(runs):
        noise = noise_for(env, seed=run)
        played = plays.run(noise)
        for t in range(STEPS):
            action, given, log_prob = act(obs, mask, noise[t])
            assert torch.equal(played.obs[t], obs)
            assert torch.equal(played.available[t], mask)
            assert torch.equal(played.action[t], action)
            assert torch.equal(played.log_prob[t], log_prob)
            total = ref._return
            obs, reward, terminated, truncated, info = ref.step(given)
            mask, over = info["action_mask"].to(torch.bool), terminated | truncated
            assert torch.equal(played.reward[t], reward)
            assert torch.equal(played.terminated[t], terminated)
            assert torch.equal(played.truncated[t], truncated)
            assert torch.equal(played.expected_reward[t], ref.expected_reward)
            assert torch.equal(played.episode_return[t], (total[:ROWS] + reward))
            if bool(over.any()):
                assert torch.equal(played.final_obs[t][over], info["final_obs"][over])
            ended += int(over.sum())
        assert torch.equal(played.obs[STEPS], obs)
        here, there = env.get_state(), ref.get_state()
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)
    return ended


LIFE = {"cost_weight": (0.0, 0.5), "latency_weight": 0.1, "outage_rate": 0.2, "patience": 2.0, "fatigue": 0.5}


@pytest.mark.parametrize("action", ["select", "blend", "slots"])
def test_a_captured_rollout_is_step_to_the_last_bit_over_many_episodes(leaving_world, action):
    assert assert_is_what_step_does(leaving_world, runs=2, action=action) > ROWS


def test_so_it_is_with_costs_outages_patience_and_fatigue(leaving_world):
    assert assert_is_what_step_does(leaving_world, **LIFE) > ROWS


def test_so_it_is_where_step_sorts_rows_by_the_member_that_answers(several_members):
    assert assert_is_what_step_does(several_members, action="select") == 3 * ROWS


def test_one_goes_on_with_step_and_comes_back(leaving_world):
    env, ref = make(leaving_world), make(leaving_world)
    plays, act, noise = rollout_of(env, steps=3), act_of(env), noise_for(env, 9)
    first = dataclasses.replace(plays.run(noise[:3])).obs.clone()
    obs = env._observe()[:ROWS]
    for t in range(3, 6):
        obs = env.step(act(obs, env._current().available[:ROWS], noise[t])[1])[0]
    last = plays.run(noise[6:])
    whole = rollout_of(ref, steps=9).run(noise)
    assert torch.equal(whole.obs[:3], first[:3])
    assert torch.equal(whole.obs[6:], last.obs)
    assert torch.equal(whole.reward[6:], last.reward)


def test_a_saved_state_plays_the_same_rollout_again(leaving_world):
    env = make(leaving_world)
    plays, noise = rollout_of(env), noise_for(env)
    saved = env.get_state()
    first = plays.run(noise).reward.clone()
    assert not torch.equal(plays.run(noise).reward, first)
    env.set_state(saved)
    assert torch.equal(plays.run(noise).reward, first)


def traced(env: MetaRecVectorEnv) -> torch.fx.GraphModule:
    """The step as a graph of operations on tensors without values: whatever needs a value fails."""
    rules = rollout_of(env).rules
    carry = Carry(env._current(), env._episodes, env._observe(), env._return, env._length)
    names = [f.name for f in dataclasses.fields(carry.state)]
    kind = env.config.action
    shape = (env._rows,) if kind == "select" else (env._rows, noise_for(env, 1).shape[2])

    def step(action: Tensor, *state: Tensor) -> list[Tensor]:
        given = type(carry.state)(**dict(zip(names, state, strict=True)))
        after, outcome = transition(rules, dataclasses.replace(carry, state=given), action)
        return [after.obs, outcome.reward, outcome.terminated]

    action = torch.zeros(shape, dtype=torch.float32 if kind == "blend" else torch.int64)
    state = [getattr(carry.state, name).clone() for name in names]
    return make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(action, *state)


@pytest.mark.parametrize(
    "action", ["select", pytest.param("blend", marks=pytest.mark.slow), pytest.param("slots", marks=pytest.mark.slow)]
)
def test_no_operation_of_the_step_hangs_on_values(several_members, action):
    with fixed_shapes():
        graph = traced(make(several_members, action=action)).graph
    called = {str(node.target).split(".")[1] for node in graph.nodes if str(node.target).startswith("aten.")}
    assert {"where", "gather", "scatter_"} <= called
    assert not called & set(ASKS_THE_HOST)


def test_the_step_of_the_cpu_looks_at_values_and_does_not_trace(several_members):
    env = make(several_members)
    with pytest.raises(Exception, match=r"(?i)data.dependent|numpy|fake"):
        traced(env)


def test_looking_is_allowed_again_after_an_error():
    seen: list[bool] = []

    def failing() -> None:
        with fixed_shapes():
            seen.append(may_look(torch.zeros(1)))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert [*seen, may_look(torch.zeros(1))] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("action", ["select", "blend", "slots"])
def test_the_step_compiles_as_one_graph_with_the_same_bits(leaving_world, action):
    assert assert_is_what_step_does(leaving_world, mode="compile", backend="eager", action=action) > ROWS


def assert_nearly(found: captured.Played, wanted: captured.Played) -> None:
    """Equal draws in 99.9 % of the requests, and rewards within 1e-5 where they are.

    A draw falls the other way where a probability that is rounded differently lies on the other side of its uniform number. From
    then on the episode is another one, so requests count up to the first difference of their row.
    """
    apart = (found.reward - wanted.reward).abs() > 1e-5
    # an equal past: no difference before this request
    same_past = apart.to(torch.int64).cumsum(dim=0) - apart.to(torch.int64) == 0
    assert float(apart[same_past].float().mean()) <= 1e-3
    assert torch.equal(found.action[0], wanted.action[0])
    agreeing = same_past & ~apart
    assert float(agreeing.float().mean()) > 0.5
    assert float((found.final_obs - wanted.final_obs).abs()[agreeing].max()) <= 1e-4


@pytest.mark.slow
def test_compiled_by_the_cpp_backend_the_draws_are_nearly_all_equal(several_members):
    env, ref = make(several_members), make(several_members)
    assert_nearly(rollout_of(env, mode="compile").run(noise_for(env)), rollout_of(ref).run(noise_for(ref)))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"autoreset_mode": "NextStep"}, "autoreset_mode is 'NextStep'"),
        ({"output": "numpy"}, "output is 'numpy'"),
        ({"session_requests": 2}, "session_requests is 2"),
    ],
)
def test_what_cannot_be_captured_is_refused_with_the_reason(tiny_world, settings, why):
    env = make(tiny_world, 4, **settings)
    with pytest.raises(ValueError, match=why):
        CapturedRollout(env, act_of(env), 2)


def test_a_graph_without_cuda_and_an_unknown_mode_are_refused(tiny_world):
    env = make(tiny_world, 4)
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, the environment is on cpu"):
        CapturedRollout(env, act_of(env), 2, mode="graph")
    assert "expected one of" in str(refusal(env, "fast"))
    assert refusal(env, "compile") is None
    assert "got object" in str(refusal(object()))


def test_compiling_without_a_compiler_says_what_is_missing(tiny_world, monkeypatch):
    monkeypatch.setattr(captured.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    env = make(tiny_world, 4)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler on CPU, found none of \['g\+\+', 'clang\+\+'\]"):
        CapturedRollout(env, act_of(env), 2, mode="compile")


def test_noise_of_another_shape_is_refused(tiny_world):
    env = make(tiny_world, 4)
    with pytest.raises(ValueError, match=r"noise has shape \(3, 4\), expected \(2, 4\)"):
        rollout_of(env, steps=2).run(noise_for(env, 3))


@pytest.mark.parametrize("action", ["select", "blend", "slots"])
def test_on_a_gpu_a_graph_is_eager(several_members, gpu, action):
    def played(mode: str, runs: int = 3) -> list[captured.Played]:
        env = make(several_members, device=gpu, action=action)
        plays, found = rollout_of(env, mode=mode), []
        for run in range(runs):
            one = plays.run(noise_for(env, seed=run))
            found.append(captured.Played(**{name: value.clone() for name, value in vars(one).items()}))
        return found

    eager, graph = played("eager"), played("graph")
    for one, other in zip(eager, graph, strict=True):
        assert all(torch.equal(vars(one)[name], vars(other)[name]) for name in vars(one))
    if gpu == "cuda":
        assert_nearly(played("compile")[0], eager[0])


def test_on_a_gpu_a_captured_rollout_is_step(several_members, gpu):
    env, ref = make(several_members, device=gpu), make(several_members, device=gpu)
    played, act, noise = rollout_of(env, mode="graph").run(noise_for(env)), act_of(ref), noise_for(ref)
    obs = ref._observe()[:ROWS]
    for t in range(STEPS):
        obs, reward, terminated, truncated, _ = ref.step(act(obs, obs, noise[t])[1])
        assert torch.equal(played.reward[t], reward)
        assert torch.equal(played.obs[t + 1], obs)
        assert torch.equal(played.terminated[t] | played.truncated[t], terminated | truncated)
