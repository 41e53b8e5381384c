"""Several processes that learn one network: each plays its own users, gradients are averaged."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """This process among `size` equals; alone, everything here is the identity."""

    rank: int = 0
    size: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, which are taken to hold equally many requests."""
        return tensor if self.size == 1 else self.sum(tensor) / self.size

    def normalised(self, advantage: Tensor) -> Tensor:
        """Mean 0 and (unbiased) deviation 1 over the requests of all processes; (batch,) -> (batch,)."""
        if self.size == 1:
            return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        mean, count = self.mean(advantage.mean()), len(advantage) * self.size
        var = self.mean((advantage - mean).square().mean()) * count / (count - 1)
        return (advantage - mean) / (var.sqrt() + 1e-8)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the processes, in one message."""
        if self.size == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = self.mean(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


SOLO = Team()
"""One process."""


def join_team(backend: str) -> Team:
    """The team that `torchrun` started this process for.

    Args:
        backend: `gloo` for CPUs, `nccl` for one CUDA device a process.

    Raises:
        RuntimeError: When no launcher started this process.
    """
    import torch.distributed as dist

    if "RANK" not in os.environ:
        raise RuntimeError(
            "--backend needs a launcher: torchrun --nproc-per-node 2 -m agents.ppo --backend gloo; leave it out for one process"
        )
    dist.init_process_group(backend)
    return Team(dist.get_rank(), dist.get_world_size())
