"""Captured rollouts as a part of `experiments.throughput`: the environment alone, or with a policy network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from experiments.throughput_measure import random_policy
from metarec_gym.envs.captured import CapturedRollout
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.policy import sample_actions
from metarec_gym.seeding import torch_generator


def captured_block(env: MetaRecVectorEnv, mode: str, *, with_policy: bool) -> Callable[[int], int]:
    """Whole rollouts without the host, of random actions or of a policy network's; one call is one rollout."""
    obs, _ = env.reset(seed=0)
    steps, strategies, kind = env.horizon, env.world.n_strategies, env.config.action
    policy = random_policy(obs.shape[1], strategies, str(env.device))
    shape = {"blend": (strategies,), "slots": (env.slate_size,)}.get(kind, ())

    def act(obs: Tensor, available: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if with_policy:
            action = sample_actions(policy.action_probs(obs, available), noise)
        else:
            action = noise * 2 - 1 if kind == "blend" else (noise * strategies).to(torch.int64)
        return action, action, noise

    plays = CapturedRollout(env, act, steps, noise_shape=shape, mode=mode)  # type: ignore[arg-type]
    generator = torch_generator(0, "throughput draws", device=env.device)

    def draws() -> Tensor:
        return torch.rand(steps, env.num_envs, *shape, generator=generator, device=env.device)

    beforehand = draws()

    def block(count: int) -> int:
        for _ in range(count):
            plays.run(draws() if with_policy else beforehand)
        return count * steps * env.num_envs

    return block
