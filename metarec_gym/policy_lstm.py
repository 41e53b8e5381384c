"""An exported LSTM policy: what `RecurrentPPO` of sb3-contrib learns, without its training code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarec_gym.policy import MEMORY_TENSORS, MlpPolicy

Cell = tuple[Tensor, Tensor, Tensor, Tensor]


class LstmPolicy(MlpPolicy):
    """An exported LSTM and tanh network; it remembers the episode's requests between `begin` and `begin`.

    Args:
        cell: weight_ih (4 size, obs_dim), weight_hh (4 size, size), bias_ih and bias_hh (4 size,) as in torch.nn.LSTM; gates
            i, f, g, o.
        layers: As in `MlpPolicy`; the first layer takes the unit's output alone.
        strategies: Strategy names in the order of the logits.
        **settings: The other arguments of `MlpPolicy`.
    """

    kind = "lstm"

    def __init__(
        self, cell: Cell, layers: list[tuple[Tensor, Tensor]], strategies: tuple[str, ...], **settings: Any
    ) -> None:
        device = layers[0][0].device if layers else None
        weight_ih, weight_hh, bias_ih, bias_hh = (tensor.detach().to(device, torch.float32) for tensor in cell)
        self.cell: Cell = weight_ih, weight_hh, bias_ih, bias_hh
        super().__init__(layers, strategies, **settings)
        self._state: tuple[Tensor, Tensor] | None = None
        self._next: tuple[Tensor, Tensor] | None = None

    def _obs_dim(self) -> int:
        return self.cell[0].shape[1]

    def to(self, device: torch.device | str) -> LstmPolicy:
        """Moves the weights to `device`; returns self. The state follows the observations."""
        super().to(device)
        weight_ih, weight_hh, bias_ih, bias_hh = (tensor.to(device) for tensor in self.cell)
        self.cell = weight_ih, weight_hh, bias_ih, bias_hh
        return self

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """New episodes in all rows: the memory is empty."""
        empty = torch.zeros(num_rows, self.cell[1].shape[1], device=device)
        self._state, self._next = (empty, empty.clone()), None

    def _features(self, obs: Tensor) -> Tensor:
        if self._state is None:
            raise RuntimeError("the policy has no memory yet; call begin(num_rows) at the start of the episodes")
        # asking twice about one request does not count it twice
        self._next = self._remember(obs, self._state)
        return self._next[0]

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """The request was served: its observation enters the memory."""
        if self._state is not None:
            self._state, self._next = self._next or self._remember(obs, self._state), None

    def _remember(self, obs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        fed = self.normalised(obs)
        weight_in, weight_hidden, bias_in, bias_hidden = self.cell
        hidden, kept = (part.to(obs.device) for part in state)
        gates = torch.nn.functional.linear(fed, weight_in, bias_in)
        gates = gates + torch.nn.functional.linear(hidden, weight_hidden, bias_hidden)
        i, f, g, o = gates.chunk(4, dim=1)
        # c_t = sigma(f) c_{t-1} + sigma(i) tanh(g), h_t = sigma(o) tanh(c_t)
        kept = torch.sigmoid(f) * kept + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(kept), kept

    def choose(self, obs: Tensor, action_mask: Tensor | None = None) -> list[str]:
        """Names of the most probable strategies at the start of an episode; obs (num_rows, obs_dim) or (obs_dim,)."""
        self.begin(obs.shape[0] if obs.ndim == 2 else 1, obs.device)
        return super().choose(obs, action_mask)

    def _tensors(self) -> dict[str, Tensor]:
        named = zip(MEMORY_TENSORS, self.cell, strict=True)
        return super()._tensors() | {f"memory.{name}": tensor for name, tensor in named}
