"""Running normalisation of observations and rewards, as VecNormalize of Stable-Baselines3 does it, on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.ppo.team import SOLO, Team

EPSILON = 1e-8
"""Added to a variance before its root is taken."""


class Running:
    """Mean and variance of all that was seen, by the parallel formula of Chan et al. (1983); float64.

    Args:
        shape: Of one sample.
        team: Processes that see their own samples and keep one common estimate.
    """

    def __init__(self, shape: tuple[int, ...], team: Team = SOLO) -> None:
        self.mean, self.var = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
        self.count = torch.tensor(1e-4, dtype=torch.float64)
        self.team = team

    def add(self, samples: Tensor) -> None:
        """Takes in `samples` (n, *shape)."""
        if self.mean.device != samples.device:
            self.mean, self.var, self.count = (x.to(samples.device) for x in (self.mean, self.var, self.count))
        samples = samples.to(torch.float64)
        count = torch.full_like(self.count, float(len(samples)))
        mean, square = samples.sum(dim=0), samples.square().sum(dim=0)
        if self.team.size > 1:
            count, mean, square = (self.team.sum(x) for x in (count, mean, square))
        mean = mean / count.clamp(min=1.0)
        # around the mean of the samples: the difference of squares would lose what a far-off mean leaves
        var = (samples - mean).square().mean(dim=0) if self.team.size == 1 else square / count - mean.square()
        total, delta = self.count + count, mean - self.mean
        moment = self.var * self.count + var * count + delta.square() * self.count * count / total
        keep = count > 0
        self.mean = torch.where(keep, self.mean + delta * count / total, self.mean)
        self.var = torch.where(keep, moment / total, self.var)
        self.count = torch.where(keep, total, self.count)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"mean": self.mean, "var": self.var, "count": self.count}


class Normaliser:
    """Observations to mean 0 and deviation 1, rewards to a discounted return of deviation 1; either may be left out.

    Args:
        obs_dim: Width of an observation.
        obs: Normalise observations.
        reward: Normalise rewards.
        clip_obs: Normalised observations are cut off at +- this.
        clip_reward: Normalised rewards likewise.
        gamma: Discount of the return.
        team: See `Running`.
    """

    def __init__(
        self,
        obs_dim: int,
        *,
        obs: bool,
        reward: bool,
        clip_obs: float = 10.0,
        clip_reward: float = 10.0,
        gamma: float = 0.99,
        team: Team = SOLO,
    ) -> None:
        self.obs = Running((obs_dim,), team) if obs else None
        self.reward = Running((), team) if reward else None
        self.clip_obs, self.clip_reward, self.gamma = clip_obs, clip_reward, gamma

    def observation(self, obs: Tensor, learn: bool = True) -> Tensor:
        """Normalised observations, after their statistics were taken in; (rows, obs_dim) -> the same shape."""
        if self.obs is None:
            return obs
        if learn:
            self.obs.add(obs)
        mean, scale = self._of(self.obs)
        return ((obs - mean) / scale).clamp(-self.clip_obs, self.clip_obs)

    @staticmethod
    def _of(running: Running) -> tuple[Tensor, Tensor]:
        return running.mean.to(torch.float32), (running.var + EPSILON).sqrt().to(torch.float32)

    def rewarded(self, discounted: Tensor, reward: Tensor, valid: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
        """The next discounted returns and the normalised rewards; all (num_envs,)."""
        assert self.reward is not None
        discounted = discounted * self.gamma + reward
        self.reward.add(discounted[valid])
        scale = (self.reward.var + EPSILON).sqrt().to(torch.float32)
        scaled = (reward / scale).clamp(-self.clip_reward, self.clip_reward)
        return torch.where(done, 0.0, discounted), scaled

    def exported(self) -> dict[str, Any]:
        """What a policy carries."""
        if self.obs is None:
            return {}
        mean, scale = self._of(self.obs)
        return {"obs_mean": mean.clone(), "obs_scale": scale.clone(), "obs_clip": self.clip_obs}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        parts = {"obs": self.obs, "reward": self.reward}
        return {f"{n}.{k}": v for n, part in parts.items() if part is not None for k, v in part.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what `tensors` gave."""
        for name, value in tensors.items():
            part, _, key = name.partition(".")
            setattr(getattr(self, part), key, value.clone())
