"""Learning without the host: advantages and all gradient steps of an iteration as one function of fixed shape, in a CUDA graph.

`learning.update` hands the device a few dozen small kernels a minibatch; on a GPU giving the orders takes longer than the work.
Here the whole iteration is recorded once and replayed: it reads the rollout, the orders of the requests and the scheduled numbers
from memory that stays where it is, and the step size from the optimiser's tensor. The sums are those of `learning`, bit for bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from agents.ppo.args import Args
from agents.ppo.learning import descend, losses_of, requests_of, told_of
from agents.ppo.networks import ActorCritic
from agents.ppo.rollout import Rollout
from agents.ppo.team import Team

_WARM_UP = 2
"""Updates on a side stream before a capture: libraries allocate their workspaces, and the optimiser its state, in the first."""
_READ = ("obs", "mask", "action", "log_prob", "learn_reward", "terminated", "done", "final_obs")
"""Tensors of a rollout that learning reads."""


def updates_captured(way: str, args: Args, team: Team) -> bool:
    """Whether a run that plays in this way also learns by a graph.

    `target_kl` asks the host after every step whether to go on, and several processes talk to each other: these learn by steps.
    """
    return way == "graph" and args.target_kl is None and team.size == 1


class CapturedUpdate:
    """`learning.make_batch` and `learning.update` of one run: the same advantages, the same steps.

    Args:
        net: A network without memory; its parameters change in place only.
        optimizer: Of its parameters; for `graph` capturable, with a step size that is a tensor.
        args: Hyperparameters; `clip_range` and `ent_coef` may change from call to call.
        mode: `graph` records the first call and replays it; `eager` calls the same functions one by one, on any device.
    """

    def __init__(
        self, net: ActorCritic, optimizer: torch.optim.Optimizer, args: Args, mode: Literal["eager", "graph"]
    ) -> None:
        self.net, self.optimizer, self.args, self.mode = net, optimizer, args, mode
        self.parameters = list(net.parameters())
        self._roll: Rollout | None = None
        self._told: dict[str, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """Records anew at the next call: the optimiser's state lies elsewhere, after a checkpoint was loaded."""
        self._graph: Any = None

    def learn(self, roll: Rollout, now: Args, reward_scale: float, orders: Tensor) -> dict[str, Tensor]:
        """One iteration's gradient steps.

        Args:
            roll: A captured rollout: every row was served, and `final_obs` is there.
            now: Hyperparameters with this iteration's clip range and entropy weight.
            reward_scale: The same in every call.
            orders: One permutation of the requests per epoch, int64 (epochs, num_steps * num_envs).

        Returns:
            As `learning.update`; the next call overwrites it.
        """
        self._take(roll, now, orders)
        if self.mode == "eager":
            return self._learn(reward_scale)
        if self._graph is None:
            with torch.cuda.device(orders.device):
                self._record(reward_scale)
        self._graph.replay()
        return self._told

    def _take(self, roll: Rollout, now: Args, orders: Tensor) -> None:
        """Copies what is read to where it is read."""
        if self._roll is None:
            copies: dict[str, Any] = {name: getattr(roll, name).clone() for name in _READ}
            self._roll, self._orders = dataclasses.replace(roll, **copies), orders.clone()
            # as python's numbers are read: a bound in double precision, a factor in single
            self._clip = torch.tensor(now.clip_range, dtype=torch.float64, device=orders.device)
            self._entropy = torch.tensor(now.ent_coef, dtype=torch.float32, device=orders.device)
            return
        for name in _READ:
            getattr(self._roll, name).copy_(getattr(roll, name))
        self._orders.copy_(orders)
        self._clip.fill_(now.clip_range)
        self._entropy.fill_(now.ent_coef)

    def _learn(self, reward_scale: float) -> dict[str, Tensor]:
        assert self._roll is not None
        now = dataclasses.replace(self.args, clip_range=self._clip, ent_coef=self._entropy)  # type: ignore[arg-type]
        batch = requests_of(self.net, self._roll, now, reward_scale, everybody=True)[0].flattened()
        steps: list[Tensor] = []
        epoch_starts, loss = 0, batch.value
        for order in self._orders.unbind():
            epoch_starts = len(steps)
            for index in order.split(batch.units(now)):
                loss, numbers = losses_of(self.net, batch.rows(index), now)
                steps.append(numbers)
                descend(loss, self.parameters, self.optimizer, now)
        return told_of(steps, epoch_starts, loss, batch.value, batch.returns)

    def _record(self, reward_scale: float) -> None:
        """Captures an iteration; network and optimiser are afterwards as before."""
        before, moments = [p.detach().clone() for p in self.parameters], self._moments()
        side = torch.cuda.Stream(self._orders.device)
        side.wait_stream(torch.cuda.current_stream(self._orders.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._learn(reward_scale)
        torch.cuda.current_stream(self._orders.device).wait_stream(side)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.copy_(value)
                for name, tensor in self.optimizer.state[parameter].items():
                    # an optimiser that has not stepped yet starts from zeros
                    tensor.copy_(moments.get((parameter, name), torch.zeros_like(tensor)))
        # gradients are written, not added to, where the capture finds none
        self.optimizer.zero_grad()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._told = self._learn(reward_scale)

    def _moments(self) -> dict[tuple[torch.nn.Parameter, str], Tensor]:
        return {
            (parameter, name): tensor.clone()
            for parameter in self.parameters
            for name, tensor in self.optimizer.state.get(parameter, {}).items()
        }
