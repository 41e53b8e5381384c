"""Several processes learn what one process learns from their users together."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file, save_file

from agents import ppo
from metarec_gym.seeding import torch_generator
from tests.test_ppo import ToyEnv

ROWS, STEPS = 4, 16


def batch_of(count: int) -> ppo.Batch:
    """Requests 0..count-1, always the same ones."""
    rng = torch_generator(7)
    obs, noise = torch.rand(count, 4, generator=rng), torch.randn(count, 3, generator=rng)
    log_prob = torch.full((count,), 0.25).log() + 0.1 * noise[:, 0]
    action = torch.randint(0, 4, (count,), generator=rng)
    return ppo.Batch(obs, None, action, log_prob, noise[:, 1], noise[:, 1] + 2.0, noise[:, 2])


def one_update(batch: ppo.Batch, minibatch: int, team: ppo.Team) -> dict[str, torch.Tensor]:
    args = ppo.Args(minibatch_size=minibatch, max_grad_norm=0.1, target_kl=0.5)
    net = ppo.ActorCritic(4, ppo.Choice(4), args, torch_generator(0))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, eps=1e-5)
    ppo.update(net, optimizer, batch, args, [torch.arange(len(batch))] * 2, team)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def member(rank: int, port: int, folder: str) -> None:
    """One process: the update of the fact below, then a short run."""
    torch.set_num_threads(1)
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    team = ppo.join_team("gloo")
    # minibatch i of both processes together is minibatch i of the one process
    mine = batch_of(64).rows(torch.arange(64).view(4, 2, 8)[:, rank].flatten())
    save_file(one_update(mine, 8, team), f"{folder}/update{rank}.safetensors")
    args = ppo.Args(total_steps=2 * ROWS * STEPS * 3, num_steps=STEPS, minibatch_size=20, normalize_obs=True)
    training = ppo.Training(ToyEnv(ROWS, 4, limit=6), args, team)
    first = training.live.obs.clone()
    while training.iteration < training.num_iterations:
        training.iterate()
    tensors: dict[str, Any] = {f"net.{k}": v for k, v in training.net.state_dict().items()}
    tensors |= {f"norm.{k}": v for k, v in training.normaliser.tensors().items()}
    tensors |= {"first": first, "steps": torch.tensor(training.steps)}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, f"{folder}/run{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_all_their_requests(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(member, (port, str(tmp_path)), nprocs=2)
    alone = one_update(batch_of(64), 16, ppo.SOLO)
    one, two = (load_file(tmp_path / f"update{rank}.safetensors") for rank in range(2))
    for name, tensor in alone.items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], tensor, atol=1e-6, rtol=0.0)
    one, two = (load_file(tmp_path / f"run{rank}.safetensors") for rank in range(2))
    assert not torch.equal(one.pop("first"), two.pop("first"))  # each plays its own users
    assert int(one["steps"]) == 2 * ROWS * STEPS * 3
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_a_process_without_a_launcher_is_told_how_to_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node 2"):
        ppo.join_team("gloo")


def test_a_team_learns_from_same_step_environments_alone() -> None:
    from gymnasium.vector import AutoresetMode

    with pytest.raises(ValueError, match="SameStep"):
        ppo.Training(ToyEnv(2, 4, mode=AutoresetMode.NEXT_STEP), ppo.Args(), ppo.Team(0, 2))
