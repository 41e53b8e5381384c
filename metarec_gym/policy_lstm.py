"""An exported LSTM policy: what `RecurrentPPO` of sb3-contrib learns, without its training code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SCHEMAS = {"mlp": 2, "lstm": 3}
"""Schema of the files by kind. Version 1 is the plain network of `MlpPolicy`, whose reader refuses later ones."""

Layers = list[tuple[Tensor, Tensor]]


class LstmPolicy:
    """An exported LSTM and tanh network; it remembers the episode's requests between `begin` and `begin`.

    Args:
        cell: Weights of the LSTM as torch lays them out: (4 H, obs_dim), (4 H, H), (4 H,), (4 H,), gates in the order i, f, g, o.
        layers: Tanh layers after it, logits at the end.
        strategies: Strategy names in the order of the logits.
        meta: JSON-able facts that travel with it.

    Raises:
        ValueError: When the last layer does not give a logit for each strategy.
    """

    def __init__(
        self,
        cell: tuple[Tensor, ...],
        layers: Layers,
        strategies: tuple[str, ...],
        *,
        meta: dict[str, Any] | None = None,
    ) -> None:
        if layers[-1][0].shape[0] != len(strategies):
            raise ValueError(f"the last layer must give one logit for each of the {len(strategies)} strategies")
        self.cell, self.layers, self.strategies = cell, layers, tuple(strategies)
        self.meta = dict(meta or {})
        self._state: tuple[Tensor, Tensor] | None = None
        self._next: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device | str) -> LstmPolicy:
        """Moves the weights to `device`; returns self."""
        self.cell = tuple(tensor.to(device) for tensor in self.cell)
        self.layers = [(w.to(device), b.to(device)) for w, b in self.layers]
        return self

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """New episodes in all rows: the memory is empty."""
        empty = torch.zeros(num_rows, self.cell[1].shape[1], device=device)
        self.to(device)
        self._state, self._next = (empty, empty.clone()), None

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Softmax over the available strategies; asking twice about one request does not count it twice.

        Raises:
            RuntimeError: When no episode was begun.
        """
        if self._state is None:
            raise RuntimeError("the policy has no memory yet; call begin(num_rows) at the start of the episodes")
        self._next = self._remember(obs, self._state)
        return torch.softmax(feed(self.layers, self._next[0]).masked_fill(~action_mask, -torch.inf), dim=1)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """The request was served: its observation enters the memory."""
        if self._state is not None:
            self._state, self._next = self._next or self._remember(obs, self._state), None

    def _remember(self, obs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weight_in, weight_hidden, bias_in, bias_hidden = self.cell
        hidden, kept = state
        gates = torch.nn.functional.linear(obs, weight_in, bias_in)
        gates = gates + torch.nn.functional.linear(hidden, weight_hidden, bias_hidden)
        i, f, g, o = gates.chunk(4, dim=1)
        # c_t = sigma(f) c_{t-1} + sigma(i) tanh(g), h_t = sigma(o) tanh(c_t)
        kept = torch.sigmoid(f) * kept + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(kept), kept

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file (no pickle), atomically; returns its path."""
        tensors = named_layers(self.layers) | {f"cell{i}": tensor for i, tensor in enumerate(self.cell)}
        return save_network(path, tensors, self.strategies, self.meta, {"kind": "lstm"})

    @classmethod
    def load(cls, path: str | Path) -> LstmPolicy:
        """Reads a saved policy.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the file holds another kind of policy, or comes from a newer schema.
        """
        header, tensors = load_network(path, "lstm")
        cell = tuple(tensors[f"cell{i}"] for i in range(4))
        strategies = tuple(json.loads(header["strategies"]))
        return cls(cell, unnamed_layers(tensors), strategies, meta=json.loads(header["meta"]))


def feed(layers: Layers, hidden: Tensor) -> Tensor:
    """Through tanh layers, the last one linear; (rows, in) -> (rows, out)."""
    for index, (weight, bias) in enumerate(layers):
        hidden = torch.nn.functional.linear(hidden, weight, bias)
        if index < len(layers) - 1:
            hidden = torch.tanh(hidden)
    return hidden


def named_layers(layers: Layers) -> dict[str, Tensor]:
    """The layers as a file names them."""
    pairs = enumerate(layers)
    return {
        f"layer{i}.{part}": tensor for i, pair in pairs for part, tensor in zip(("weight", "bias"), pair, strict=True)
    }


def unnamed_layers(tensors: dict[str, Tensor]) -> Layers:
    """The layers in a file's tensors, first to last."""
    count = sum(name.startswith("layer") and name.endswith(".weight") for name in tensors)
    return [(tensors[f"layer{i}.weight"], tensors[f"layer{i}.bias"]) for i in range(count)]


def save_network(
    path: str | Path,
    tensors: dict[str, Tensor],
    strategies: tuple[str, ...],
    meta: dict[str, Any],
    form: dict[str, Any],
) -> Path:
    """Writes one safetensors file, atomically; `form` says the kind of policy. Returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"schema": str(SCHEMAS[form["kind"]]), "form": json.dumps(form)}
    header |= {"strategies": json.dumps(strategies), "meta": json.dumps(meta, sort_keys=True)}
    partial = path.with_name(path.name + ".partial")
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, str(partial), metadata=header)
    os.replace(partial, path)
    return path


def load_network(path: str | Path, kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a file that holds a policy of this kind.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file holds another kind of policy, or comes from a newer schema.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no policy at {path}; train one: python -m experiments.train --agent sb3_ppo")
    with safe_open(str(path), framework="pt") as file:
        header: dict[str, str] = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    found = json.loads(header.get("form", "{}")).get("kind", "plain")
    if found != kind:
        raise ValueError(f"{path} holds a policy of kind {found!r}, expected {kind!r}")
    if int(header["schema"]) > SCHEMAS[kind]:
        raise ValueError(f"{path} has schema {header['schema']}, this reads up to {SCHEMAS[kind]}; use newer code")
    return header, tensors
