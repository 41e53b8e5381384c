"""The pretended graphs do what CUDA's do, and what is recorded by them replays as it is called step by step."""

from __future__ import annotations

import pytest
import torch

from agents import ppo
from metarec_gym.envs import MetaRecVectorEnv
from tests.pretend_graph import pretend_gpu


@pytest.fixture
def device(monkeypatch):
    with pretend_gpu(monkeypatch) as name:
        yield name


def captured(function):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def test_a_replay_reads_and_writes_the_same_memory(device):
    x, total = torch.ones(3, device=device), torch.zeros(3, device=device)

    def step():
        total.add_(x * 2.0)
        return total[1:].clone().view(2, 1)

    graph, seen = captured(step)
    # a capture executes nothing
    assert total.tolist() == [0.0] * 3
    x.fill_(5.0)
    graph.replay()
    graph.replay()
    assert total.tolist() == [20.0] * 3
    assert seen.flatten().tolist() == [20.0] * 2


def test_numbers_of_python_are_those_of_the_capture(device):
    factor, x = 2.0, torch.ones(2, device=device)
    graph, result = captured(lambda: x * factor)
    factor = 3.0
    graph.replay()
    assert result.tolist() == [2.0, 2.0]


def test_gradient_steps_are_replayed(device):
    weight = torch.ones(2, device=device).requires_grad_()
    target = torch.zeros(2, device=device)

    def step():
        weight.grad = None
        (weight - target).square().sum().backward()
        with torch.no_grad():
            weight.sub_(0.25 * weight.grad)

    graph, _ = captured(step)
    graph.replay()
    assert weight.tolist() == [0.5, 0.5]
    target.fill_(1.0)
    graph.replay()
    assert weight.tolist() == [0.75, 0.75]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: float(x.sum()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.rand(2, device=x.device, generator=torch.Generator(x.device)),
        lambda x: bool((x > 0).any()),
    ],
)
def test_what_a_capture_forbids_is_refused(device, wrong):
    x = torch.ones(2, device=device)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(lambda: wrong(x))


def test_ppo_that_plays_and_learns_by_replays_learns_what_the_cpu_does_by_steps(leaving_world, monkeypatch):
    def learnt(device: str, rollout: str) -> tuple[ppo.Training, torch.Tensor]:
        env = MetaRecVectorEnv(16, leaving_world, output="torch", autoreset_mode="SameStep", device=device)
        args = ppo.Args(total_steps=16 * 4 * 3, num_steps=4, minibatch_size=24, epochs=2, rollout=rollout)
        run = ppo.Training(env, args)
        for _ in range(3):
            run.iterate()
        return run, torch.cat([tensor.cpu().flatten() for tensor in run.net.state_dict().values()])

    _, by_steps = learnt("cpu", "eager")
    with pretend_gpu(monkeypatch) as device:
        run, replayed = learnt(device, "graph")
        assert (run.way, type(run.learner).__name__) == ("graph", "CapturedUpdate")
    torch.testing.assert_close(replayed, by_steps, rtol=0, atol=1e-5)
