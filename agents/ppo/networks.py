"""Actor and critic: tanh layers, with or without a memory of the episode, and their export."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from agents.ppo.args import Args
from agents.ppo.heads import Choice, Choices, Head, Weights
from metarec_gym.policy import GruPolicy, MlpPolicy


def _fill(weight: Tensor, bias: Tensor, gain: float, args: Args, generator: torch.Generator) -> None:
    if args.orthogonal_init:
        torch.nn.init.orthogonal_(weight, gain, generator=generator)
        torch.nn.init.zeros_(bias)
        return
    # torch's own initialisation of a linear layer
    bound = 1.0 / math.sqrt(weight.shape[1])
    torch.nn.init.uniform_(weight, -bound, bound, generator=generator)
    torch.nn.init.uniform_(bias, -bound, bound, generator=generator)


def _layers(widths: list[int], last_gain: float | None, args: Args, generator: torch.Generator) -> torch.nn.Sequential:
    """Tanh layers; the last is linear with its own gain, or a tanh layer like the others (None)."""
    modules: list[torch.nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        last = index == len(widths) - 2 and last_gain is not None
        # built on "meta": the default initialisation would draw from torch's global generator
        layer = torch.nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
        gain = last_gain if last and last_gain is not None else args.gain_hidden
        _fill(layer.weight.data, layer.bias.data, gain, args, generator)
        modules += [layer] if last else [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*modules)


def _memory(obs_dim: int, args: Args, generator: torch.Generator) -> torch.nn.GRU:
    unit = torch.nn.GRU(obs_dim, args.rnn_size, device="meta").to_empty(device="cpu")
    weight_ih, weight_hh, bias_ih, bias_hh = unit.all_weights[0]
    for weight, bias in ((weight_ih, bias_ih), (weight_hh, bias_hh)):
        # gate by gate: the three are separate matrices, and each is to be orthogonal
        for part, offset in zip(weight.data.chunk(3), bias.data.chunk(3), strict=True):
            _fill(part, offset, 1.0, args, generator)
    return unit


def remember(
    unit: torch.nn.GRU, obs: Tensor, state: Tensor, start: Tensor, cuts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """States of a recurrent unit after each step of a sequence.

    Args:
        unit: The unit.
        obs: float32 (steps, rows, obs_dim).
        state: float32 (rows, size), from before the first step.
        start: bool (steps, rows), True where an episode starts: it meets an empty memory.
        cuts: The steps at which any row starts, in order: in between, one call plays all steps.

    Returns:
        States float32 (steps, rows, size), and the last of them.
    """
    outs = []
    for begin, end in itertools.pairwise(sorted({0, *cuts, len(obs)})):
        state = torch.where(start[begin][:, None], 0.0, state)
        out, last = unit(obs[begin:end], state[None])
        outs.append(out)
        state = last[0]
    return torch.cat(outs) if len(outs) > 1 else outs[0], state


class ActorCritic(torch.nn.Module):
    """Action outputs and the state's value.

    Two tanh networks that share nothing, or one trunk under both. With memory, each network reads the observation and the state
    of a gated recurrent unit that saw the episode up to it.
    """

    def __init__(self, obs_dim: int, head: Head, args: Args, generator: torch.Generator) -> None:
        super().__init__()
        self.head, self.obs_dim = head, obs_dim
        self.size = args.rnn_size if args.recurrent else 0
        hidden, width = list(args.hidden), obs_dim + self.size
        self.trunk: torch.nn.Sequential | None = None
        if args.shared_trunk:
            self.trunk = _layers([width, *hidden], None, args, generator)
            hidden, width = [], args.hidden[-1] if args.hidden else width
        self.actor = _layers([width, *hidden, head.outputs], args.gain_actor, args, generator)
        self.critic = _layers([width, *hidden, 1], args.gain_critic, args, generator)
        self.memory = _memory(obs_dim, args, generator) if args.recurrent else None
        self.critic_memory = _memory(obs_dim, args, generator) if args.recurrent and not args.shared_trunk else None

    @property
    def recurrent(self) -> bool:
        """Has a memory."""
        return self.memory is not None

    def _below(self, obs: Tensor) -> Tensor:
        return obs if self.trunk is None else self.trunk(obs)

    def output(self, obs: Tensor) -> Tensor:
        """The actor's outputs; (..., obs_dim + size) -> (..., outputs)."""
        return self.actor(self._below(obs))  # type: ignore[no-any-return]

    def value(self, obs: Tensor) -> Tensor:
        """Expected discounted return; (..., obs_dim + size) -> (...)."""
        return self.critic(self._below(obs))[..., 0]  # type: ignore[no-any-return]

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and values of single requests, without memory; (rows, obs_dim) -> (rows, outputs) and (rows,)."""
        below = self._below(obs)
        return self.actor(below), self.critic(below)[..., 0]

    def step(self, obs: Tensor, memory: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The actor's outputs at one request.

        Args:
            obs: float32 (rows, obs_dim).
            memory: float32 (rows, size), the actor's state so far; any width without memory.
            start: bool (rows,), where an episode starts.

        Returns:
            Outputs (rows, outputs) and the actor's next state (rows, size).
        """
        if self.memory is None:
            return self.output(obs), memory
        state = torch.where(start[:, None], 0.0, memory)
        out = self.memory(obs[None], state[None])[0][0]
        return self.output(torch.cat([obs, out], dim=1)), out

    def sequence(
        self, obs: Tensor, memories: tuple[Tensor, Tensor], start: Tensor, cuts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Outputs (steps, rows, outputs) and values (steps, rows) of whole sequences; arguments as in `remember`."""
        assert self.memory is not None
        out, _ = remember(self.memory, obs, memories[0], start, cuts)
        seen = torch.cat([obs, out], dim=2)
        if self.critic_memory is None:
            return self.forward(seen)
        return self.output(seen), self.value_sequence(obs, memories[1], start, cuts)[0]

    def value_sequence(
        self, obs: Tensor, memory: Tensor, start: Tensor, cuts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Values (steps, rows) and the critic's states (steps, rows, size); without memory the states have no width."""
        unit = self.critic_memory or self.memory
        if unit is None:
            return self.value(obs), obs[..., :0]
        out, _ = remember(unit, obs, memory, start, cuts)
        return self.value(torch.cat([obs, out], dim=2)), out

    def next_value(self, obs: Tensor, memory: Tensor) -> Tensor:
        """Values one request on, from the critic's state so far; (rows, obs_dim) and (rows, size) -> (rows,)."""
        return self.value_sequence(obs[None], memory, torch.zeros_like(obs[None, :, 0], dtype=torch.bool), ())[0][0]


def export_policy(
    net: ActorCritic,
    strategies: tuple[str, ...],
    meta: dict[str, Any],
    normaliser: dict[str, Any] | None = None,
) -> MlpPolicy:
    """A copy of the actor as a policy that needs no training code.

    Args:
        net: The trained network.
        strategies: Names of the strategies, or of the actions.
        meta: Facts that travel with the policy.
        normaliser: `obs_mean`, `obs_scale` and `obs_clip` of a run that normalised observations.

    Returns:
        `GruPolicy` of a network with memory, else `MlpPolicy`; on the CPU.
    """
    modules: list[torch.nn.Module] = [*(net.trunk or ()), *net.actor]
    layers = [(m.weight.clone(), m.bias.clone()) for m in modules if isinstance(m, torch.nn.Linear)]
    settings: dict[str, Any] = {"meta": meta, **(normaliser or {})}
    if isinstance(net.head, Choices):
        settings |= {"chooses": "slots", "places": len(net.head.sizes)}
    if isinstance(net.head, Weights):
        settings |= {"chooses": "blend", "log_std": net.head.log_std.clone()}
    if net.memory is None:
        return MlpPolicy(layers, strategies, **settings).to("cpu")
    weight_ih, weight_hh, bias_ih, bias_hh = (tensor.detach().clone() for tensor in net.memory.all_weights[0])
    return GruPolicy((weight_ih, weight_hh, bias_ih, bias_hh), layers, strategies, **settings).to("cpu")


def take_actor(net: ActorCritic, policy: MlpPolicy) -> None:
    """Gives a network the actor of a policy; the critic stays as it is.

    Args:
        net: A network of two parts, without memory.
        policy: An exported actor of the same widths that normalises nothing.

    Raises:
        ValueError: When the policy is another kind of network.
    """
    own = [m for m in net.actor if isinstance(m, torch.nn.Linear)]
    plain = type(policy) is MlpPolicy and bool((policy.obs_mean == 0).all() and (policy.obs_scale == 1).all())
    shapes, wanted = [tuple(w.shape) for w, _ in policy.layers], [tuple(m.weight.shape) for m in own]
    if net.recurrent or net.trunk is not None or not isinstance(net.head, Choice) or not plain or shapes != wanted:
        raise ValueError(
            f"the start policy is a {policy.kind} network with layers {shapes}; expected an mlp without normalisation whose "
            f"layers are {wanted}, for a network that chooses one strategy, without memory and shared trunk: fit one with "
            "agents.ppo.imitate"
        )
    with torch.no_grad():
        for module, (weight, bias) in zip(own, policy.layers, strict=True):
            module.weight.copy_(weight)
            module.bias.copy_(bias)
