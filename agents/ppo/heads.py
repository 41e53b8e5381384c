"""From a network's outputs to actions: one choice, one a place, or a vector of weights.

Each head has `outputs` (numbers that the network gives), `mask_width` (entries of a row's mask), `action_shape`, `action_dtype`;
`draws(steps, rows, generator)` gives the noise of a rollout, `sample(output, mask, draw)` actions (rows, *action_shape) and their
log-probabilities (rows,), `log_prob(output, mask, action)` log-probabilities and entropies, both (rows,), and `for_env(action)`
what the environment is given. A mask of None forbids nothing.
"""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from metarec_gym.policy import sample_actions

FORBIDDEN = -1e8
"""Logit of what may not be chosen: finite, so that 0 * log 0 is 0 in the entropy; so far off that exp gives exactly 0."""


class Choice(torch.nn.Module):
    """One of `size` strategies."""

    action_shape: tuple[int, ...] = ()
    action_dtype = torch.int64

    def __init__(self, size: int) -> None:
        super().__init__()
        self.outputs = self.mask_width = size

    def log_probs(self, output: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probabilities, -1e8 or less where masked; (rows, size) and bool (rows, size) -> (rows, size)."""
        return torch.log_softmax(output if mask is None else output.masked_fill(~mask, FORBIDDEN), dim=-1)

    def draws(self, steps: int, rows: int, generator: torch.Generator) -> Tensor:
        """Uniforms (steps, rows)."""
        return torch.rand(steps, rows, generator=generator, device=generator.device)

    def sample(self, output: Tensor, mask: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Inverts the cumulative probabilities."""
        log_probs = self.log_probs(output, mask)
        action = sample_actions(log_probs.exp(), draw)
        return action, log_probs.gather(1, action[:, None])[:, 0]

    def log_prob(self, output: Tensor, mask: Tensor | None, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies."""
        log_probs = self.log_probs(output, mask)
        entropy = -(log_probs.exp() * log_probs).sum(dim=1)
        return log_probs.gather(1, action[:, None])[:, 0], entropy

    def for_env(self, action: Tensor) -> Tensor:
        """The action itself."""
        return action


class Choices(torch.nn.Module):
    """One choice for each of several places, independent given the observation."""

    action_dtype = torch.int64

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes, self.action_shape = sizes, (len(sizes),)
        self.outputs = self.mask_width = sum(sizes)

    def _places(self, output: Tensor, mask: Tensor | None) -> list[Tensor]:
        if mask is not None:
            output = output.masked_fill(~mask, FORBIDDEN)
        return [torch.log_softmax(part, dim=-1) for part in output.split(self.sizes, dim=-1)]

    def draws(self, steps: int, rows: int, generator: torch.Generator) -> Tensor:
        """Uniforms (steps, rows, places)."""
        return torch.rand(steps, rows, len(self.sizes), generator=generator, device=generator.device)

    def sample(self, output: Tensor, mask: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Inverts each place's cumulative probabilities."""
        places = self._places(output, mask)
        pairs = zip(places, draw.unbind(dim=1), strict=True)
        action = torch.stack([sample_actions(log_probs.exp(), uniform) for log_probs, uniform in pairs], dim=1)
        return action, self._of(places, action)

    @staticmethod
    def _of(places: list[Tensor], action: Tensor) -> Tensor:
        chosen = [p.gather(1, action[:, i, None])[:, 0] for i, p in enumerate(places)]
        return torch.stack(chosen, dim=1).sum(dim=1)

    def log_prob(self, output: Tensor, mask: Tensor | None, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, both sums over the places."""
        places = self._places(output, mask)
        entropy = torch.stack([-(p.exp() * p).sum(dim=1) for p in places], dim=1).sum(dim=1)
        return self._of(places, action), entropy

    def for_env(self, action: Tensor) -> Tensor:
        """The action itself."""
        return action


class Weights(torch.nn.Module):
    """Numbers, normal around the network's outputs with learned deviations; the environment gets them cut to its box."""

    action_dtype = torch.float32
    mask_width = 1

    def __init__(self, low: Tensor, high: Tensor, log_std_init: float) -> None:
        super().__init__()
        self.outputs, self.action_shape = len(low), (len(low),)
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.log_std = torch.nn.Parameter(torch.full((len(low),), log_std_init))

    def draws(self, steps: int, rows: int, generator: torch.Generator) -> Tensor:
        """Normals (steps, rows, K)."""
        return torch.randn(steps, rows, self.outputs, generator=generator, device=generator.device)

    def sample(self, output: Tensor, mask: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean plus deviation times noise, not cut: the ratio of the update is that of the unbounded normal, as in SB3."""
        action = output + self.log_std.exp() * draw
        return action, self.log_prob(output, mask, action)[0]

    def log_prob(self, output: Tensor, mask: Tensor | None, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies; there is nothing to forbid."""
        # log N(a; mu, sigma) = -(a - mu)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2
        z = (action - output) * (-self.log_std).exp()
        log_prob = (-0.5 * z.square() - self.log_std - 0.5 * math.log(2.0 * math.pi)).sum(dim=1)
        entropy = (self.log_std + 0.5 * (1.0 + math.log(2.0 * math.pi))).sum()
        return log_prob, entropy.expand(len(output))

    def for_env(self, action: Tensor) -> Tensor:
        """Cut to the box."""
        return torch.maximum(torch.minimum(action, self.high), self.low)


Head = Choice | Choices | Weights


def head_of(space: gym.Space[object], log_std_init: float = 0.0) -> Head:
    """The head for an action space.

    Raises:
        ValueError: When the space is none of Discrete, MultiDiscrete and a flat, bounded Box.
    """
    if isinstance(space, gym.spaces.Discrete) and space.start == 0:
        return Choice(int(space.n))
    if isinstance(space, gym.spaces.MultiDiscrete) and space.nvec.ndim == 1 and not np.any(space.start):
        if len(set(space.nvec.tolist())) != 1:
            raise ValueError(
                f"the places of {space} differ in size; PPO's slots choose from the same strategies everywhere"
            )
        return Choices([int(n) for n in space.nvec])
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.is_bounded():
        low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in (space.low, space.high))
        return Weights(low, high, log_std_init)
    raise ValueError(
        f"PPO needs Discrete, MultiDiscrete (both from 0) or a flat, bounded Box as actions, got {space}; wrap the environment"
    )


def action_mask(infos: dict[str, object], rows: int, head: Head, device: torch.device) -> Tensor:
    """What may be chosen, by `infos`; everything where it has no mask.

    Args:
        infos: `action_mask` is (rows, K), or with several places also (rows, sum of the places' sizes).
        rows: Users.
        head: Whose mask.
        device: Where to.

    Returns:
        bool (rows, mask_width).

    Raises:
        ValueError: When the mask has another width.
    """
    if "action_mask" not in infos or isinstance(head, Weights):
        # strategies out of service have no say in a blend: the environment sees to it
        return torch.ones(rows, head.mask_width, dtype=torch.bool, device=device)
    mask = torch.as_tensor(infos["action_mask"], device=device).to(torch.bool)
    if isinstance(head, Choices) and mask.shape[1] != head.mask_width and {mask.shape[1]} == set(head.sizes):
        mask = mask.repeat(1, len(head.sizes))
    if mask.shape != (rows, head.mask_width):
        raise ValueError(f"action_mask is {tuple(mask.shape)}, expected {(rows, head.mask_width)}")
    return mask
