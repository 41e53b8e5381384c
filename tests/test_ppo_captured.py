"""PPO that plays and learns without the host learns what PPO that steps learns, and stepping what it did before there was one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agents import ppo
from agents.ppo.captured import CapturedCollector, way_of
from agents.ppo.captured_update import CapturedUpdate, updates_captured
from agents.ppo.training import adam, set_learning_rate
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.world import World

ROLLOUT_FIELDS = (
    "obs", "mask", "action", "log_prob", "reward", "terminated", "done", "valid", "start", "ended_return", "ended_length",
)  # fmt: skip


def make(world: World, rows: int = 48, **settings: Any) -> MetaRecVectorEnv:
    return MetaRecVectorEnv(rows, world=world, output="torch", autoreset_mode="SameStep", **settings)


def training(world: World, *, captured: str | None = None, env: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A run of five iterations; `captured` plays by captured functions in that mode, by dynamo alone where it compiles."""
    vector = make(world, **(env or {}))
    run = ppo.Training(vector, ppo.Args(total_steps=5 * 48 * 12, num_steps=12, minibatch_size=144, **settings))
    if captured is not None:
        run.captured = CapturedCollector(vector, run.net, 12, captured, backend="eager")  # type: ignore[arg-type]
    return run


def learning_captured(world: World, **settings: Any) -> Any:
    """The same run, whose advantages and steps are the captured functions, called one by one."""
    run = training(world, captured="eager", **settings)
    run.learner = CapturedUpdate(run.net, run.optimizer, run.args, "eager")
    return run


def weights_of(run: Any) -> torch.Tensor:
    return torch.cat([tensor.cpu().flatten() for tensor in run.net.state_dict().values()])


# after five iterations of the code as it was before there were captured rollouts: sums of the weights of the actor's and the
# critic's last layer, value loss, entropy loss, mean return of the last episodes
BEFORE = {
    "select": (0.005390473, 0.26781059, 0.52889639, -0.78689229, 7.953125),
    "masked": (0.026082729, 0.17183994, 0.37988362, -0.33212999, 7.296875),
    "blend": (0.37924920, 0.26332560, 1.0189559, -4.2322416, 7.6328125),
    "memory": (0.11472567, 0.035670534, 0.43114838, -0.75769287, 8.078125),
}


@pytest.mark.parametrize(
    "env", [{}, {"outage_rate": 0.2}, {"action": "blend"}, {"action": "slots", "outage_rate": 0.2}]
)
def test_a_captured_rollout_is_the_one_that_steps_to_the_last_bit(leaving_world, env):
    stepping, captured = training(leaving_world, env=env), training(leaving_world, env=env, captured="eager")
    for _ in range(2):
        by_step = ppo.collect(stepping.env, stepping.net, stepping.live, 12, stepping.generators["action"])
        found = captured.captured.collect(captured.live, captured.generators["action"])
        for name in ROLLOUT_FIELDS:
            one, other = getattr(by_step, name), getattr(found, name)
            # the return of an episode that did not end is no number
            torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True, msg=name)
        here, there = stepping.live.tensors(), captured.live.tensors()
        assert all(torch.equal(here[name], there[name]) for name in here)
        values, found_values = (ppo.values_of(stepping.net, roll)[1] for roll in (by_step, found))
        torch.testing.assert_close(found_values, values, rtol=1e-5, atol=1e-6)
    assert bool(by_step.done.any())
    assert len(by_step.final) > 0


def test_training_without_the_host_learns_the_same(leaving_world):
    stepping, captured = training(leaving_world), training(leaving_world, captured="eager")
    for _ in range(5):
        stepping.iterate()
        captured.iterate()
    # the last observations are valued in one batch instead of a few rows at a time, which rounds differently
    torch.testing.assert_close(weights_of(captured), weights_of(stepping), rtol=0, atol=1e-5)
    assert captured.metrics["rollout/ep_rew_mean"] == pytest.approx(stepping.metrics["rollout/ep_rew_mean"], abs=0.05)


@pytest.mark.slow
def test_training_by_a_compiled_step_learns_the_same(leaving_world):
    eager, compiled = training(leaving_world, captured="eager"), training(leaving_world, captured="compile")
    for _ in range(3):
        eager.iterate()
        compiled.iterate()
    assert torch.equal(weights_of(compiled), weights_of(eager))


LEARNING: dict[str, dict[str, Any]] = {
    "select": {},
    "masked": {"env": {"outage_rate": 0.2}, "truncation": "terminal"},
    "slots": {"env": {"action": "slots"}, "truncation": "current", "shuffle": "once"},
    "blend": {"env": {"action": "blend"}, "advantage_scope": "batch"},
    # so narrow that they bind: a range that a graph does not read anew is noticed
    "schedules": {
        "clip_range": 0.02,
        "clip_schedule": "linear",
        "ent_coef": 0.1,
        "ent_schedule": "linear",
        "clip_range_vf": 0.05,
        "clip_vloss": "max",
        "learning_rate": 1e-2,
    },
    "one trunk": {"shared_trunk": True, "normalize_advantage": False},
}


@pytest.mark.parametrize("kind", sorted(LEARNING))
def test_captured_learning_takes_the_same_steps_to_the_last_bit(leaving_world, kind):
    by_steps = training(leaving_world, captured="eager", **LEARNING[kind])
    captured = learning_captured(leaving_world, **LEARNING[kind])
    for _ in range(3):
        one, other = by_steps.iterate(), captured.iterate()
        assert {k: v for k, v in one.items() if k != "time/fps"} == {k: v for k, v in other.items() if k != "time/fps"}
    assert torch.equal(weights_of(captured), weights_of(by_steps))


def test_a_last_minibatch_that_is_smaller_is_learned_from_too(leaving_world):
    # 576 requests: one minibatch of 400 and one of 176
    runs = [make_run(leaving_world) for make_run in (lambda w: training(w, captured="eager"), learning_captured)]
    for run in runs:
        run.args = dataclasses.replace(run.args, minibatch_size=400)
        if run.learner is not None:
            run.learner.args = run.args
        run.iterate()
    assert torch.equal(weights_of(runs[0]), weights_of(runs[1]))


class AsksTheHost(TorchDispatchMode):
    """Refuses what makes the host wait for a device, or makes a shape hang on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        asks = name in (
            "_local_scalar_dense",
            "item",
            "nonzero",
            "masked_select",
            "_unique2",
            "bincount",
            "is_nonzero",
            "equal",
        )
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if asks or by_mask:
            raise AssertionError(f"{name} asks the host")
        return func(*args, **(kwargs or {}))


def test_captured_learning_asks_the_host_nothing(leaving_world):
    run = learning_captured(leaving_world, env={"outage_rate": 0.2}, advantage_scope="batch")
    run.iterate()
    roll = run.captured.collect(run.live, run.generators["action"])
    orders = torch.stack(list(run._orders(roll.reward.numel(), roll.reward.device)))
    with AsksTheHost():
        run.learner.learn(roll, run.args, 1.0, orders)
        # the ordinary way looks at the mask
        with pytest.raises(AssertionError, match="asks the host"):
            ppo.make_batch(run.net, roll, run.args, 1.0)


def test_what_needs_the_host_learns_by_steps():
    solo, two = ppo.SOLO, ppo.Team(0, 2)
    assert updates_captured("graph", ppo.Args(), solo)
    assert not updates_captured("eager", ppo.Args(), solo)
    assert not updates_captured("compile", ppo.Args(), solo)
    assert not updates_captured("graph", ppo.Args(target_kl=0.01), solo)
    assert not updates_captured("graph", ppo.Args(), two)


def test_a_checkpoint_goes_on_in_another_way(leaving_world, tmp_path):
    one = training(leaving_world, captured="eager")
    for _ in range(2):
        one.iterate()
    one.save(tmp_path / "checkpoint.safetensors")
    other = training(leaving_world, rollout="eager")
    other.load(tmp_path / "checkpoint.safetensors")
    one.iterate()
    other.iterate()
    torch.testing.assert_close(weights_of(other), weights_of(one), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["select", "masked", "blend", "memory"])
def test_stepping_learns_what_it_did_before_there_was_a_choice(leaving_world, kind):
    settings: dict[str, Any] = {
        "select": {},
        "masked": {"env": {"outage_rate": 0.2}, "target_kl": 0.01},
        "blend": {"env": {"action": "blend"}, "normalize_obs": True, "normalize_reward": True},
        "memory": {"recurrent": True},
    }[kind]
    run = training(leaving_world, **settings)
    for _ in range(5):
        metrics = run.iterate()
    found = (
        float(run.net.actor[-1].weight.detach().double().sum()),
        float(run.net.critic[-1].weight.detach().double().sum()),
        metrics["train/value_loss"],
        metrics["train/entropy_loss"],
        metrics["rollout/ep_rew_mean"],
    )
    # bit for bit on one machine; another one's matrix kernels may round differently
    assert found == pytest.approx(BEFORE[kind], rel=1e-3)


def test_on_cpu_auto_steps_and_what_cannot_be_captured_is_refused(leaving_world):
    env = make(leaving_world)
    assert way_of(env, ppo.Args()) == "eager"
    assert way_of(env, ppo.Args(rollout="compile")) == "compile"
    for settings, why in (
        ({"rollout": "graph"}, "a CUDA graph needs a CUDA device"),
        ({"rollout": "compile", "recurrent": True}, "a network with memory is played step by step"),
        ({"rollout": "compile", "normalize_obs": True}, "running normalisation asks which rows were served"),
    ):
        with pytest.raises(ValueError, match=why):
            way_of(env, ppo.Args(**settings))
    with pytest.raises(ValueError, match="a captured rollout plays MetaRecVectorEnv, got object"):
        way_of(object(), ppo.Args(rollout="compile"))


def test_a_mask_that_forbids_everything_is_refused_without_the_host_too(leaving_world):
    run = training(leaving_world, captured="eager")
    run.env.reset(seed=0)
    state = run.env._current()
    run.env._state = type(state)(**{**vars(state), "available": torch.zeros_like(state.available)})
    with pytest.raises(ValueError, match="an action_mask forbids every strategy"):
        run.captured.collect(run.live, run.generators["action"])


def test_a_learning_rate_that_is_a_tensor_is_changed_in_place():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = adam([parameter], ppo.Args(), torch.device("cpu"))
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    set_learning_rate(optimizer, 0.125)
    assert float(rate) == 0.125


def test_on_a_gpu_replayed_graphs_learn_what_stepping_does(leaving_world, gpu):
    def trained(rollout: str) -> Any:
        run = training(leaving_world, env={"device": gpu}, rollout=rollout)
        for _ in range(5):
            run.iterate()
        return run

    graph, stepping = trained("auto" if gpu == "cuda" else "graph"), trained("eager")
    assert (graph.way, stepping.way) == ("graph", "eager")
    assert (graph.learner is None, stepping.learner is None) == (False, True)
    assert isinstance(graph.optimizer.param_groups[0]["lr"], torch.Tensor)
    torch.testing.assert_close(weights_of(graph), weights_of(stepping), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(LEARNING))
def test_on_a_gpu_a_recorded_update_is_the_one_by_steps(leaving_world, gpu, kind):
    settings = {**LEARNING[kind], "rollout": "graph"}
    settings["env"] = {**settings.get("env", {}), "device": gpu}
    recorded, by_steps = training(leaving_world, **settings), training(leaving_world, **settings)
    by_steps.learner = None
    for _ in range(4):
        recorded.iterate()
        by_steps.iterate()
    torch.testing.assert_close(weights_of(recorded), weights_of(by_steps), rtol=0, atol=1e-4)


def test_on_a_gpu_a_checkpoint_goes_on_with_a_recorded_update(leaving_world, gpu, tmp_path):
    one = training(leaving_world, env={"device": gpu}, rollout="graph")
    for _ in range(2):
        one.iterate()
    one.save(tmp_path / "checkpoint.safetensors")
    other = training(leaving_world, env={"device": gpu}, rollout="graph")
    other.iterate()
    other.load(tmp_path / "checkpoint.safetensors")
    for run in (one, other):
        run.iterate()
    torch.testing.assert_close(weights_of(other), weights_of(one), rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_on_cuda_learning_waits_for_nothing(leaving_world):
    run = training(leaving_world, env={"device": "cuda"})
    run.iterate()
    roll = run.captured.collect(run.live, run.generators["action"])
    batch, _ = ppo.make_batch(run.net, roll, run.args, 1.0)
    orders = list(run._orders(len(batch), roll.obs.device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.learner.learn(roll, run.args, 1.0, torch.stack(orders))
        ppo.update(run.net, run.optimizer, batch, run.args, orders)
    finally:
        torch.cuda.set_sync_debug_mode("default")
