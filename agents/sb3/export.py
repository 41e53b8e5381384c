"""Trained networks of Stable-Baselines3 as policies that need no SB3, and as one safetensors file each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metarec_gym.policy import MlpPolicy
from metarec_gym.policy_lstm import Layers, LstmPolicy, feed, load_network, named_layers, save_network, unnamed_layers

GREEDY = 1e6
"""Q-values are multiplied by this and played through a softmax: values that differ by 1e-4 leave the lesser exp(-100)."""

NO_NOISE = -20.0
"""Log deviation of weights that are played without noise."""

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
        out = feed(self.layers, obs)
        if self.chooses == "slots":
            logits = out.view(len(obs), -1, len(self.strategies))
            if action_mask is not None:
                logits = logits.masked_fill(~action_mask[:, None], -torch.inf)
            return logits.argmax(dim=2)
        return out.clamp(-1.0, 1.0)

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file (no pickle), atomically; returns its path."""
        width, places = self.layers[0][0].shape[1], self.layers[-1][0].shape[0] // len(self.strategies)
        tensors = named_layers(self.layers) | {"obs_mean": torch.zeros(width), "obs_scale": torch.ones(width)}
        tensors |= {} if self.log_std is None else {"log_std": self.log_std}
        form = {"kind": "mlp", "chooses": self.chooses, "places": places, "obs_clip": None}
        return save_network(path, tensors, self.strategies, self.meta, form)

    @classmethod
    def load(cls, path: str | Path) -> ActorFile:
        """Reads a saved actor.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the file holds another kind of policy, or comes from a newer schema.
        """
        header, tensors = load_network(path, "mlp")
        chooses = json.loads(header["form"])["chooses"]
        strategies, meta = tuple(json.loads(header["strategies"])), json.loads(header["meta"])
        return cls(unnamed_layers(tensors), strategies, chooses, log_std=tensors.get("log_std"), meta=meta)
