"""Trained networks of Stable-Baselines3 as policies that need no SB3, and as one safetensors file each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metarec_gym.policy import MlpPolicy

ACTOR_SCHEMA = 1
GREEDY = 1e6
"""Q-values are multiplied by this and played through a softmax: values that differ by 1e-4 leave the lesser exp(-100)."""

Layers = list[tuple[Tensor, Tensor]]
Head = Literal["clip", "tanh", "slots"]


def linear_layers(*modules: torch.nn.Module) -> Layers:
    """Weights and biases of all linear layers, in order."""
    found = [m for module in modules for m in module.modules() if isinstance(m, torch.nn.Linear)]
    return [(m.weight.detach().clone(), m.bias.detach().clone()) for m in found]


def actor_critic_policy(
    model: Any, action: str, strategies: tuple[str, ...], meta: dict[str, Any]
) -> MlpPolicy | ActorFile:
    """The actor of PPO, A2C, TRPO or MaskablePPO."""
    layers = linear_layers(model.policy.mlp_extractor.policy_net, model.policy.action_net)
    if action == "select":
        return MlpPolicy(layers, strategies, meta=meta)
    return ActorFile(layers, strategies, "clip" if action == "blend" else "slots", meta=meta)


def value_policy(model: Any, action: str, strategies: tuple[str, ...], meta: dict[str, Any]) -> MlpPolicy:
    """The greedy policy of DQN: its logits are Q-values times `GREEDY`."""
    return _greedy(linear_layers(model.q_net.q_net), strategies, meta)


def quantile_policy(model: Any, action: str, strategies: tuple[str, ...], meta: dict[str, Any]) -> MlpPolicy:
    """The greedy policy of QR-DQN: the mean over quantiles is linear, so it folds into the last layer."""
    layers = linear_layers(model.quantile_net.quantile_net)
    weight, bias = layers[-1]
    k = len(strategies)
    # the output is (quantiles, K) laid out flat
    mean = weight.view(-1, k, weight.shape[1]).mean(dim=0), bias.view(-1, k).mean(dim=0)
    return _greedy([*layers[:-1], mean], strategies, meta)


def _greedy(layers: Layers, strategies: tuple[str, ...], meta: dict[str, Any]) -> MlpPolicy:
    weight, bias = layers[-1]
    facts = {**meta, "head": f"greedy over Q: logits are {GREEDY:g} times the values, so their softmax is the argmax"}
    return MlpPolicy([*layers[:-1], (weight * GREEDY, bias * GREEDY)], strategies, meta=facts)


def squashed_policy(model: Any, action: str, strategies: tuple[str, ...], meta: dict[str, Any]) -> ActorFile:
    """The mean action of SAC's squashed Gaussian."""
    return ActorFile(linear_layers(model.actor.latent_pi, model.actor.mu), strategies, "tanh", meta=meta)


def recurrent_policy(model: Any, action: str, strategies: tuple[str, ...], meta: dict[str, Any]) -> LstmPolicy:
    """The actor of RecurrentPPO: its LSTM, then the tanh layers."""
    lstm = model.policy.lstm_actor
    cell = tuple(getattr(lstm, f"{n}_l0").detach().clone() for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    layers = linear_layers(model.policy.mlp_extractor.policy_net, model.policy.action_net)
    return LstmPolicy(cell, layers, strategies, meta=meta)


class ActorFile:
    """A tanh network whose output is an action of Blend or of Slots: its most likely one, without exploration.

    Args:
        layers: Pairs of weight (out, in) and bias (out,); tanh between layers.
        strategies: Names in the order of the actions.
        head: `clip`: outputs cut off at -1 and 1 (Blend, Gaussian actors); `tanh`: squashed (Blend, SAC); `slots`: logits
            (slate_size, K), the likeliest strategy of each place.
        meta: JSON-able facts that travel with it.

    Raises:
        ValueError: When the last layer does not fit the head.
    """

    def __init__(
        self, layers: Layers, strategies: tuple[str, ...], head: Head, *, meta: dict[str, Any] | None = None
    ) -> None:
        width, k = layers[-1][0].shape[0], len(strategies)
        if width % k or (head != "slots" and width != k):
            raise ValueError(
                f"the last layer has {width} outputs, which the head {head!r} of {k} strategies cannot use"
            )
        self.layers, self.strategies, self.head = layers, tuple(strategies), head
        self.meta = dict(meta or {})

    def act(self, obs: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """Actions of all rows.

        Args:
            obs: float32 (rows, obs_dim).
            action_mask: bool (rows, K), True where the strategy may serve; None: all. Blend leaves masks to the environment.

        Returns:
            float32 (rows, K) in [-1, 1] for Blend, int64 (rows, slate_size) for Slots.
        """
        out = _feed(self.layers, obs)
        if self.head == "slots":
            logits = out.view(len(obs), -1, len(self.strategies))
            if action_mask is not None:
                logits = logits.masked_fill(~action_mask[:, None], -torch.inf)
            return logits.argmax(dim=2)
        return out.clamp(-1.0, 1.0) if self.head == "clip" else torch.tanh(out)

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file (no pickle), atomically; returns its path."""
        return _save(path, _named(self.layers), self.strategies, self.meta, {"kind": "actor", "head": self.head})

    @classmethod
    def load(cls, path: str | Path) -> ActorFile:
        """Reads a saved actor.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the file holds another kind of policy, or comes from a newer schema.
        """
        header, tensors = _load(path, "actor")
        return cls(_unnamed(tensors), tuple(json.loads(header["strategies"])), header["head"],  # type: ignore[arg-type]
                   meta=json.loads(header["meta"]))  # fmt: skip


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

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """New episodes in all rows: the memory is empty."""
        empty = torch.zeros(num_rows, self.cell[1].shape[1], device=device)
        self.cell = tuple(tensor.to(device) for tensor in self.cell)
        self.layers = [(w.to(device), b.to(device)) for w, b in self.layers]
        self._state, self._next = (empty, empty.clone()), None

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Softmax over the available strategies; asking twice about one request does not count it twice.

        Raises:
            RuntimeError: When no episode was begun.
        """
        if self._state is None:
            raise RuntimeError("the policy has no memory yet; call begin(num_rows) at the start of the episodes")
        self._next = self._remember(obs, self._state)
        return torch.softmax(_feed(self.layers, self._next[0]).masked_fill(~action_mask, -torch.inf), dim=1)

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
        tensors = _named(self.layers) | {f"cell{i}": tensor for i, tensor in enumerate(self.cell)}
        return _save(path, tensors, self.strategies, self.meta, {"kind": "lstm"})

    @classmethod
    def load(cls, path: str | Path) -> LstmPolicy:
        """Reads a saved policy.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the file holds another kind of policy, or comes from a newer schema.
        """
        header, tensors = _load(path, "lstm")
        cell = tuple(tensors[f"cell{i}"] for i in range(4))
        strategies = tuple(json.loads(header["strategies"]))
        return cls(cell, _unnamed(tensors), strategies, meta=json.loads(header["meta"]))


def _feed(layers: Layers, hidden: Tensor) -> Tensor:
    """Through tanh layers, the last one linear; (rows, in) -> (rows, out)."""
    for index, (weight, bias) in enumerate(layers):
        hidden = torch.nn.functional.linear(hidden, weight, bias)
        if index < len(layers) - 1:
            hidden = torch.tanh(hidden)
    return hidden


def _named(layers: Layers) -> dict[str, Tensor]:
    pairs = enumerate(layers)
    return {
        f"layer{i}.{part}": tensor for i, pair in pairs for part, tensor in zip(("weight", "bias"), pair, strict=True)
    }


def _unnamed(tensors: dict[str, Tensor]) -> Layers:
    count = sum(name.endswith(".weight") for name in tensors)
    return [(tensors[f"layer{i}.weight"], tensors[f"layer{i}.bias"]) for i in range(count)]


def _save(
    path: str | Path,
    tensors: dict[str, Tensor],
    strategies: tuple[str, ...],
    meta: dict[str, Any],
    kind: dict[str, str],
) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"strategies": json.dumps(strategies), "meta": json.dumps(meta, sort_keys=True)}
    partial = path.with_name(path.name + ".partial")
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, str(partial), metadata={"schema": str(ACTOR_SCHEMA), **facts, **kind})
    os.replace(partial, path)
    return path


def _load(path: str | Path, kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no policy at {path}; train one: python -m experiments.train --agent sb3_ppo")
    with safe_open(str(path), framework="pt") as file:
        header: dict[str, str] = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    found = header.get("kind", "mlp")
    if found != kind:
        raise ValueError(f"{path} holds a policy of kind {found!r}, expected {kind!r}")
    if int(header["schema"]) > ACTOR_SCHEMA:
        raise ValueError(f"{path} has schema {header['schema']}, this reads up to {ACTOR_SCHEMA}; use newer code")
    return header, tensors
