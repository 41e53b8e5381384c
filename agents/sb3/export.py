"""Trained networks of Stable-Baselines3 as policies that need no SB3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarec_gym.policy import MEMORY_TENSORS, MlpPolicy
from metarec_gym.policy_lstm import LstmPolicy

GREEDY = 1e6
"""Q-values are multiplied by this and played through a softmax: values that differ by 1e-4 leave the lesser exp(-100)."""

NO_NOISE = -20.0
"""Log deviation of weights that are played without noise."""

Layers = list[tuple[Tensor, Tensor]]


def linear_layers(*modules: torch.nn.Module) -> Layers:
    """Weights and biases of all linear layers, in order."""
    found = [m for module in modules for m in module.modules() if isinstance(m, torch.nn.Linear)]
    return [(m.weight.detach().clone(), m.bias.detach().clone()) for m in found]


def actor_critic_policy(model: Any, action: str, strategies: tuple[str, ...], meta: dict[str, Any]) -> MlpPolicy:
    """The actor of PPO, A2C, TRPO or MaskablePPO."""
    layers = linear_layers(model.policy.mlp_extractor.policy_net, model.policy.action_net)
    if action == "select":
        return MlpPolicy(layers, strategies, meta=meta)
    if action == "slots":
        places = layers[-1][0].shape[0] // len(strategies)
        return MlpPolicy(layers, strategies, chooses="slots", places=places, meta=meta)
    return MlpPolicy(layers, strategies, chooses="blend", log_std=model.policy.log_std.clone(), meta=meta)


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


def squashed_policy(model: Any, action: str, strategies: tuple[str, ...], meta: dict[str, Any]) -> MlpPolicy:
    """The mean action of SAC's squashed Gaussian: tanh, which stands between layers, then an identity layer."""
    k = len(strategies)
    layers = [*linear_layers(model.actor.latent_pi, model.actor.mu), (torch.eye(k), torch.zeros(k))]
    facts = {**meta, "head": "mean of a squashed Gaussian, without its noise"}
    return MlpPolicy(layers, strategies, chooses="blend", log_std=torch.full((k,), NO_NOISE), meta=facts)


def recurrent_policy(model: Any, action: str, strategies: tuple[str, ...], meta: dict[str, Any]) -> LstmPolicy:
    """The actor of RecurrentPPO: its LSTM, then the tanh layers."""
    lstm = model.policy.lstm_actor
    weight_ih, weight_hh, bias_ih, bias_hh = (getattr(lstm, f"{name}_l0").clone() for name in MEMORY_TENSORS)
    layers = linear_layers(model.policy.mlp_extractor.policy_net, model.policy.action_net)
    return LstmPolicy((weight_ih, weight_hh, bias_ih, bias_hh), layers, strategies, meta=meta)
