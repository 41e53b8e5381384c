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

SCHEMAS = {"mlp": 2, "lstm": 3}
"""Schema of the files by kind. Version 1 is the plain network of `MlpPolicy`, whose reader refuses later ones."""
GREEDY = 1e6
"""Q-values are multiplied by this and played through a softmax: values that differ by 1e-4 leave the lesser exp(-100)."""

NO_NOISE = -20.0
"""Log deviation of weights that are played without noise."""

Layers = list[tuple[Tensor, Tensor]]
Chooses = Literal["blend", "slots"]


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
    if action == "slots":
        return ActorFile(layers, strategies, "slots", meta=meta)
    return ActorFile(layers, strategies, "blend", log_std=model.policy.log_std.detach().clone(), meta=meta)


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
    """The mean action of SAC's squashed Gaussian: tanh, which stands between layers, then an identity layer."""
    k = len(strategies)
    layers = [*linear_layers(model.actor.latent_pi, model.actor.mu), (torch.eye(k), torch.zeros(k))]
    facts = {**meta, "head": "mean of a squashed Gaussian, without its noise"}
    return ActorFile(layers, strategies, "blend", log_std=torch.full((k,), NO_NOISE), meta=facts)


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
        chooses: `blend`: outputs (K,), cut off at -1 and 1; `slots`: logits (slate_size * K,), place by place.
        log_std: float32 (K,), log deviation of each weight of a blend while it explored; None in slots.
        meta: JSON-able facts that travel with it.

    Raises:
        ValueError: When the last layer does not fit.
    """

    def __init__(
        self,
        layers: Layers,
        strategies: tuple[str, ...],
        chooses: Chooses,
        *,
        log_std: Tensor | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        width, k = layers[-1][0].shape[0], len(strategies)
        if width % k or (chooses == "blend" and width != k):
            raise ValueError(f"the last layer has {width} outputs, which {chooses} of {k} strategies cannot use")
        if (chooses == "blend") != (log_std is not None):
            raise ValueError("a blend, and nothing else, needs log_std (K,): the log deviation of each weight")
        self.layers, self.strategies, self.chooses, self.log_std = layers, tuple(strategies), chooses, log_std
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
        if self.chooses == "slots":
            logits = out.view(len(obs), -1, len(self.strategies))
            if action_mask is not None:
                logits = logits.masked_fill(~action_mask[:, None], -torch.inf)
            return logits.argmax(dim=2)
        return out.clamp(-1.0, 1.0)

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file (no pickle), atomically; returns its path."""
        width, places = self.layers[0][0].shape[1], self.layers[-1][0].shape[0] // len(self.strategies)
        tensors = _named(self.layers) | {"obs_mean": torch.zeros(width), "obs_scale": torch.ones(width)}
        tensors |= {} if self.log_std is None else {"log_std": self.log_std}
        form = {"kind": "mlp", "chooses": self.chooses, "places": places, "obs_clip": None}
        return _save(path, tensors, self.strategies, self.meta, form)

    @classmethod
    def load(cls, path: str | Path) -> ActorFile:
        """Reads a saved actor.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the file holds another kind of policy, or comes from a newer schema.
        """
        header, tensors = _load(path, "mlp")
        chooses = json.loads(header["form"])["chooses"]
        strategies, meta = tuple(json.loads(header["strategies"])), json.loads(header["meta"])
        return cls(_unnamed(tensors), strategies, chooses, log_std=tensors.get("log_std"), meta=meta)


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
    count = sum(name.startswith("layer") and name.endswith(".weight") for name in tensors)
    return [(tensors[f"layer{i}.weight"], tensors[f"layer{i}.bias"]) for i in range(count)]


def _save(
    path: str | Path,
    tensors: dict[str, Tensor],
    strategies: tuple[str, ...],
    meta: dict[str, Any],
    form: dict[str, Any],
) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"schema": str(SCHEMAS[form["kind"]]), "form": json.dumps(form)}
    header |= {"strategies": json.dumps(strategies), "meta": json.dumps(meta, sort_keys=True)}
    partial = path.with_name(path.name + ".partial")
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, str(partial), metadata=header)
    os.replace(partial, path)
    return path


def _load(path: str | Path, kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
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
