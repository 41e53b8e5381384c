"""Playing without the host: `rollout.collect` by a compiled step or a CUDA graph, for environments that allow it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from agents.ppo.args import Args
from agents.ppo.heads import action_mask
from agents.ppo.networks import ActorCritic
from agents.ppo.rollout import Live, Rollout, check_masks
from metarec_gym.envs.captured import CapturedRollout, CaptureMode, refusal

Way = Literal["eager", "compile", "graph"]


def way_of(env: Any, args: Args) -> Way:
    """How a run plays, by `args.rollout`, its environment and its device.

    Raises:
        ValueError: When `compile` or `graph` is asked for and cannot be.
    """
    if args.rollout == "eager":
        return "eager"
    if args.rollout == "auto":
        on_gpu = getattr(getattr(env, "device", None), "type", "cpu") == "cuda"
        return "graph" if on_gpu and _refusal(env, args, "graph") is None else "eager"
    if why := _refusal(env, args, args.rollout):
        raise ValueError(f"rollout={args.rollout!r}: {why}")
    return args.rollout


def _refusal(env: Any, args: Args, mode: str) -> str | None:
    if args.recurrent:
        return "a network with memory is played step by step; use rollout='eager' or recurrent=False"
    if args.normalize_obs or args.normalize_reward:
        return "running normalisation asks which rows were served; use rollout='eager', or leave it off"
    return refusal(env, mode)


class CapturedCollector:
    """`rollout.collect` for one run: the same draws, the same actions, the same rewards.

    Args:
        env: A `MetaRecVectorEnv` that `way_of` allows.
        net: The network, without memory; its parameters change in place only.
        num_steps: Requests per environment and iteration.
        mode: `eager` calls the captured functions one by one: what the others must equal.
        backend: Of `torch.compile`.
    """

    def __init__(
        self, env: Any, net: ActorCritic, num_steps: int, mode: CaptureMode, *, backend: str = "inductor"
    ) -> None:
        self.env, self.net = env, net
        probe = net.head.draws(1, 1, torch.Generator(device=env.device))
        self.plays = CapturedRollout(
            env, self._act, num_steps, noise_shape=tuple(probe.shape[2:]), mode=mode, backend=backend
        )

    def _mask(self, available: Tensor) -> Tensor:
        return action_mask({"action_mask": available}, len(available), self.net.head, available.device)

    def _act(self, obs: Tensor, available: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head = self.net.head
        action, log_prob = head.sample(self.net.output(obs), self._mask(available), noise)
        return action, head.for_env(action), log_prob

    @torch.no_grad()
    def collect(self, live: Live, generator: torch.Generator) -> Rollout:
        """Plays a rollout and moves `live` along; its tensors are overwritten by the next one.

        Raises:
            ValueError: When a mask forbids every choice.
        """
        num_envs, steps, head = len(live.obs), self.plays.num_steps, self.net.head
        played = self.plays.run(head.draws(steps, num_envs, generator))
        done = played.terminated | played.truncated
        mask = self._mask(played.available.flatten(0, 1)).unflatten(0, (steps + 1, num_envs))
        start = torch.cat([live.start[None], done])
        check_masks(self.net, mask[:-1])
        live.obs, live.mask, live.done, live.start = played.obs[-1].clone(), mask[-1], done[-1], done[-1]
        # the environment counts from the same resets
        live.episode_return = self.env._return[:num_envs].clone()
        live.episode_length = self.env._length[:num_envs].to(torch.float32)
        return Rollout(
            obs=played.obs,
            mask=mask[:-1],
            action=played.action,
            log_prob=played.log_prob,
            reward=played.reward,
            learn_reward=played.reward,
            terminated=played.terminated,
            done=done,
            valid=torch.ones_like(done),
            start=start,
            memory=live.memory,
            critic_memory=live.critic_memory,
            ended_return=torch.where(done, played.episode_return, torch.nan),
            ended_length=torch.where(done, played.episode_length.to(torch.float32), torch.nan),
            final=[],
            final_obs=played.final_obs,
        )
