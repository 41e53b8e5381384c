"""A policy turns observations into strategy probabilities; this is all that evaluation and deployment know of an agent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

POLICY_SCHEMA = 2
"""1: a tanh network that chooses one strategy. 2: also memory, clipped observations, slots and blends."""
Chooses = Literal["select", "slots", "blend"]
"""What an exported network decides: one strategy, one a place, or the weights of a blend."""


class Policy(Protocol):
    """What every policy offers. Rows are users in the middle of an episode; K is the number of strategies."""

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """New episodes start in all `num_rows` rows: forget what was learned inside earlier episodes."""

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Strategy probabilities.

        Args:
            obs: float32 (num_rows, obs_dim).
            action_mask: bool (num_rows, K), True where the strategy may serve.

        Returns:
            float32 (num_rows, K), rows sum to 1, zero where the mask is False.
        """

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Feedback of the request just served, for policies that learn inside an episode.

        Args:
            obs: float32 (num_rows, obs_dim), what the policy saw before acting.
            action: int64 (num_rows,), the strategy that served.
            reward: float32 (num_rows,), the sampled reward.
            alive: bool (num_rows,), False where the episode had already ended (nothing was served).
        """


class ActingPolicy(Protocol):
    """A policy that gives the environment's action itself: a blend has weights, and slots have a strategy a place.

    Attributes:
        chooses: Kind of action, which the environment must have.
    """

    chooses: Chooses

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """As in `Policy`."""

    def act(self, obs: Tensor, action_mask: Tensor, draw: Tensor | None = None) -> Tensor:
        """The action, see `MlpPolicy.act`."""

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """As in `Policy`; `action` is what `act` gave."""


class StatelessPolicy:
    """Base of the policies that keep nothing between requests."""

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Nothing to forget."""

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Nothing to learn."""


def masked_uniform(action_mask: Tensor) -> Tensor:
    """Equal probability for every available strategy; bool (num_rows, K) -> float32 (num_rows, K)."""
    allowed = action_mask.to(torch.float32)
    return allowed / allowed.sum(dim=1, keepdim=True)


def one_hot_probs(action: Tensor, num_strategies: int) -> Tensor:
    """Probability 1 for one strategy a row; int64 (num_rows,) -> float32 (num_rows, K)."""
    return torch.nn.functional.one_hot(action, num_strategies).to(torch.float32)


def sample_actions(probs: Tensor, draw: Tensor) -> Tensor:
    """Inverse-CDF sampling: probs (num_rows, K) and uniforms in [0, 1) (num_rows,) -> int64 (num_rows,)."""
    cumulative = probs.cumsum(dim=1)
    # scaling by the total keeps a sum of 1 - 1e-7 from selecting past the last strategy; searchsorted skips zero-probability ones
    threshold = draw[:, None] * cumulative[:, -1:]
    action = torch.searchsorted(cumulative.contiguous(), threshold, right=True)[:, 0]
    last_possible = probs.shape[1] - 1 - (probs.flip(1) > 0).to(torch.uint8).argmax(dim=1)
    return torch.minimum(action, last_possible)


class UniformPolicy(StatelessPolicy):
    """Every available strategy with equal probability."""

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Equal probabilities over the mask."""
        return masked_uniform(action_mask)


class FixedPolicy(StatelessPolicy):
    """Always the same strategy; where it is unavailable, a uniform choice among the others.

    Args:
        strategy: Index of the strategy in the pool.
    """

    def __init__(self, strategy: int) -> None:
        self.strategy = int(strategy)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Probability 1 for the strategy wherever it is available."""
        fixed = torch.zeros_like(action_mask, dtype=torch.float32)
        fixed[:, self.strategy] = 1.0
        return torch.where(action_mask[:, self.strategy, None], fixed, masked_uniform(action_mask))


class FirstChoice(StatelessPolicy):
    """Always the most probable strategy of a policy that keeps nothing between requests."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Probability 1 for the most probable strategy."""
        probs = self.policy.action_probs(obs, action_mask)
        return one_hot_probs(probs.argmax(dim=1), probs.shape[1])


class MlpPolicy(StatelessPolicy):
    """An exported tanh network: the actor of a trained agent without its training code.

    Args:
        layers: Pairs of weight (out, in) and bias (out,), float32; tanh between layers, logits (or weights) at the end.
        strategies: Strategy names in the order of the logits.
        obs_mean: Subtracted from the observation, (obs_dim,); zeros if None.
        obs_scale: The observation is divided by it, (obs_dim,); ones if None.
        obs_clip: The observation so normalised is cut off at +- this; None does not cut.
        chooses: `select`: K logits; `slots`: K logits for each of `places`, place after place; `blend`: the means of K weights
            in [-1, 1].
        places: Places of a slate, for `slots`.
        log_std: Log of the standard deviation of each weight, (K,), for `blend`.
        meta: JSON-able facts that travel with the policy (world hash, seed, versions ...).

    Raises:
        ValueError: When the last layer does not fit the strategies.
    """

    kind = "mlp"

    def __init__(
        self,
        layers: list[tuple[Tensor, Tensor]],
        strategies: tuple[str, ...],
        *,
        obs_mean: Tensor | None = None,
        obs_scale: Tensor | None = None,
        obs_clip: float | None = None,
        chooses: Chooses = "select",
        places: int = 1,
        log_std: Tensor | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        if not layers or layers[-1][0].shape[0] != len(strategies) * places:
            raise ValueError(
                f"the last layer must give one logit for each of the {len(strategies)} strategies"
                + (f" and {places} places" if places > 1 else "")
            )
        if (chooses == "blend") != (log_std is not None):
            raise ValueError("a blend, and nothing else, needs log_std (K,): the log deviation of each weight")
        # one device for all of it: that of the first layer
        device = layers[0][0].device

        def own(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, torch.float32)

        self.layers = [(own(w), own(b)) for w, b in layers]
        self.strategies = tuple(strategies)
        obs_dim = self._obs_dim()
        self.obs_mean = torch.zeros(obs_dim, device=device) if obs_mean is None else own(obs_mean)
        self.obs_scale = torch.ones(obs_dim, device=device) if obs_scale is None else own(obs_scale)
        self.obs_clip, self.chooses, self.places = obs_clip, chooses, places
        self.log_std = None if log_std is None else own(log_std)
        self.meta = dict(meta or {})

    def _obs_dim(self) -> int:
        return self.layers[0][0].shape[1]

    def to(self, device: torch.device | str) -> MlpPolicy:
        """Moves the weights to `device`, where the first observation would bring them too; returns self."""
        self.layers = [(w.to(device), b.to(device)) for w, b in self.layers]
        self.obs_mean, self.obs_scale = self.obs_mean.to(device), self.obs_scale.to(device)
        self.log_std = None if self.log_std is None else self.log_std.to(device)
        return self

    def normalised(self, obs: Tensor) -> Tensor:
        """What the network is fed; float32 (num_rows, obs_dim) -> the same shape. The weights follow the observations."""
        if self.obs_mean.device != obs.device:
            self.to(obs.device)
        fed = (obs - self.obs_mean) / self.obs_scale
        return fed if self.obs_clip is None else fed.clamp(-self.obs_clip, self.obs_clip)

    def _features(self, obs: Tensor) -> Tensor:
        return self.normalised(obs)

    def logits(self, obs: Tensor) -> Tensor:
        """Unmasked output of the network; float32 (num_rows, obs_dim) -> (num_rows, K * places)."""
        hidden = self._features(obs)
        for index, (weight, bias) in enumerate(self.layers):
            hidden = torch.nn.functional.linear(hidden, weight, bias)
            if index < len(self.layers) - 1:
                hidden = torch.tanh(hidden)
        return hidden

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Softmax over the available strategies.

        Args:
            obs: float32 (num_rows, obs_dim).
            action_mask: bool (num_rows, K); in `slots` it holds for every place.

        Returns:
            float32 (num_rows, K), in `slots` (num_rows, places, K).

        Raises:
            ValueError: For a blend, whose action is no choice among strategies; ask `act`.
        """
        if self.chooses == "blend":
            raise ValueError("a blend has weights, not probabilities of strategies; call act(obs, action_mask)")
        logits = self.logits(obs)
        if self.chooses == "slots":
            logits, action_mask = logits.unflatten(1, (self.places, -1)), action_mask[:, None]
        return torch.softmax(logits.masked_fill(~action_mask, -torch.inf), dim=-1)

    def act(self, obs: Tensor, action_mask: Tensor, draw: Tensor | None = None) -> Tensor:
        """The action that the environment takes.

        Args:
            obs: float32 (num_rows, obs_dim).
            action_mask: bool (num_rows, K).
            draw: Uniforms in [0, 1): (num_rows,), in `slots` (num_rows, places), in `blend` (num_rows, K). None takes the most
                probable action.

        Returns:
            `select`: int64 (num_rows,); `slots`: int64 (num_rows, places); `blend`: float32 (num_rows, K) in [-1, 1].
        """
        if self.log_std is not None:
            weight = self.logits(obs)
            if draw is not None:
                # away from 0 and 1, where the inverse of the normal distribution is infinite
                noise = torch.special.ndtri(draw.to(torch.float64).clamp(2.0**-33, 1.0 - 2.0**-33)).to(torch.float32)
                weight = weight + self.log_std.exp() * noise
            return weight.clamp(-1.0, 1.0)
        probs = self.action_probs(obs, action_mask)
        if draw is None:
            return probs.argmax(dim=-1)
        return sample_actions(probs.flatten(0, -2), draw.flatten()).view(probs.shape[:-1])

    def choose(self, obs: Tensor, action_mask: Tensor | None = None) -> list[str]:
        """Names of the most probable strategies; obs (num_rows, obs_dim) or (obs_dim,). Only for `select`."""
        rows = obs if obs.ndim == 2 else obs[None]
        everything = torch.ones(rows.shape[0], len(self.strategies), dtype=torch.bool, device=rows.device)
        mask = everything if action_mask is None else action_mask
        return [self.strategies[i] for i in self.action_probs(rows, mask).argmax(dim=1).tolist()]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"obs_mean": self.obs_mean, "obs_scale": self.obs_scale}
        for index, (weight, bias) in enumerate(self.layers):
            tensors[f"layer{index}.weight"], tensors[f"layer{index}.bias"] = weight, bias
        return tensors if self.log_std is None else tensors | {"log_std": self.log_std}

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file (weights and JSON metadata, no pickle), atomically; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"strategies": json.dumps(self.strategies), "meta": json.dumps(self.meta, sort_keys=True)}
        form = {"kind": self.kind, "chooses": self.chooses, "places": self.places, "obs_clip": self.obs_clip}
        plain = form == {"kind": "mlp", "chooses": "select", "places": 1, "obs_clip": None}
        # a plain network stays readable for installations that know schema 1 alone
        header |= {"schema": "1"} if plain else {"schema": str(POLICY_SCHEMA), "form": json.dumps(form)}
        partial = path.with_name(path.name + ".partial")
        save_file({k: v.contiguous().cpu() for k, v in self._tensors().items()}, str(partial), metadata=header)
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> MlpPolicy:
        """`load_policy`: reads a saved policy of any kind."""
        return load_policy(path)


MEMORY_TENSORS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""Names of a gated recurrent unit's weights, in the order of torch.nn.GRU."""


def gru_step(obs: Tensor, state: Tensor, memory: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """One step of a gated recurrent unit (Cho et al., EMNLP 2014, with the reset gate as in torch.nn.GRU).

    Args:
        obs: float32 (num_rows, obs_dim).
        state: float32 (num_rows, size).
        memory: weight_ih (3 size, obs_dim), weight_hh (3 size, size), bias_ih and bias_hh (3 size,); gates r, z, n.

    Returns:
        The next state, float32 (num_rows, size).
    """
    weight_ih, weight_hh, bias_ih, bias_hh = memory
    seen_r, seen_z, seen_n = torch.nn.functional.linear(obs, weight_ih, bias_ih).chunk(3, dim=1)
    kept_r, kept_z, kept_n = torch.nn.functional.linear(state, weight_hh, bias_hh).chunk(3, dim=1)
    reset, update = torch.sigmoid(seen_r + kept_r), torch.sigmoid(seen_z + kept_z)
    # h' = (1 - z) n + z h
    new = torch.tanh(seen_n + reset * kept_n)
    return new + update * (state - new)


class GruPolicy(MlpPolicy):
    """An exported network with memory: it learns about a user inside the episode.

    A gated recurrent unit reads each request's observation, in which the last request's strategy and reward stand; the tanh
    network sees the observation and the unit's state. `begin` empties the memory; `observe` moves it on by one request, so
    `action_probs` may be asked as often as one likes.

    Args:
        memory: weight_ih, weight_hh, bias_ih, bias_hh of the unit; see `gru_step`.
        layers: As in `MlpPolicy`; the first layer takes obs_dim + size inputs.
        strategies: Strategy names in the order of the logits.
        **settings: The other arguments of `MlpPolicy`.
    """

    kind = "gru"

    def __init__(
        self,
        memory: tuple[Tensor, Tensor, Tensor, Tensor],
        layers: list[tuple[Tensor, Tensor]],
        strategies: tuple[str, ...],
        **settings: Any,
    ) -> None:
        device = layers[0][0].device if layers else None
        weight_ih, weight_hh, bias_ih, bias_hh = (tensor.detach().to(device, torch.float32) for tensor in memory)
        self.memory = weight_ih, weight_hh, bias_ih, bias_hh
        super().__init__(layers, strategies, **settings)
        self.state = torch.zeros(0, self.size)

    @property
    def size(self) -> int:
        """Width of the memory's state."""
        return self.memory[1].shape[1]

    def _obs_dim(self) -> int:
        return self.memory[0].shape[1]

    def to(self, device: torch.device | str) -> GruPolicy:
        """Moves the weights and the state to `device`; returns self."""
        super().to(device)
        weight_ih, weight_hh, bias_ih, bias_hh = (tensor.to(device) for tensor in self.memory)
        self.memory = weight_ih, weight_hh, bias_ih, bias_hh
        self.state = self.state.to(device)
        return self

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Empties the memory of all rows."""
        self.state = torch.zeros(num_rows, self.size, device=device)

    def _features(self, obs: Tensor) -> Tensor:
        if len(self.state) != len(obs):
            raise ValueError(f"the memory has {len(self.state)} rows, obs {len(obs)}; call begin({len(obs)}) first")
        fed = self.normalised(obs)
        return torch.cat([fed, gru_step(fed, self.state.to(obs.device), self.memory)], dim=1)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Remembers the request just served; action and reward reach the memory with the next observation."""
        fed, state = self.normalised(obs), self.state.to(obs.device)
        self.state = torch.where(alive[:, None], gru_step(fed, state, self.memory), state)

    def choose(self, obs: Tensor, action_mask: Tensor | None = None) -> list[str]:
        """Names of the most probable strategies at the start of an episode; obs (num_rows, obs_dim) or (obs_dim,)."""
        self.begin(obs.shape[0] if obs.ndim == 2 else 1, obs.device)
        return super().choose(obs, action_mask)

    def _tensors(self) -> dict[str, Tensor]:
        named = zip(MEMORY_TENSORS, self.memory, strict=True)
        return super()._tensors() | {f"memory.{name}": tensor for name, tensor in named}


def load_policy(path: str | Path) -> MlpPolicy:
    """Reads an exported policy of any kind: with or without memory, for one strategy, slots or a blend.

    Args:
        path: A file that `save` wrote.

    Returns:
        `GruPolicy` or `LstmPolicy` where the file holds a memory, else `MlpPolicy`.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is no policy or comes from a newer schema.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no policy at {path}; train one: python -m experiments.train --agent ppo")
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if "strategies" not in header:
        raise ValueError(f"{path} holds no policy (no strategies in its header); expected a policy.safetensors")
    if int(header["schema"]) > POLICY_SCHEMA:
        raise ValueError(
            f"{path} has policy schema {header['schema']}, this metarec_gym reads up to {POLICY_SCHEMA}; "
            "upgrade metarec_gym"
        )
    form = json.loads(header.get("form", '{"kind": "mlp"}'))
    kind = form.pop("kind")
    count = sum(name.startswith("layer") and name.endswith(".weight") for name in tensors)
    layers = [(tensors[f"layer{i}.weight"], tensors[f"layer{i}.bias"]) for i in range(count)]
    settings = {name: tensors[name] for name in ("obs_mean", "obs_scale", "log_std") if name in tensors}
    settings |= form | {"meta": json.loads(header["meta"])}
    strategies = tuple(json.loads(header["strategies"]))
    if kind == "mlp":
        return MlpPolicy(layers, strategies, **settings)
    weight_ih, weight_hh, bias_ih, bias_hh = (tensors[f"memory.{name}"] for name in MEMORY_TENSORS)
    memory = weight_ih, weight_hh, bias_ih, bias_hh
    if kind == "gru":
        return GruPolicy(memory, layers, strategies, **settings)
    from metarec_gym.policy_lstm import LstmPolicy

    return LstmPolicy(memory, layers, strategies, **settings)
