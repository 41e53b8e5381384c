"""Playing: what one iteration sees and does, on the environment's device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from agents.ppo.heads import action_mask
from agents.ppo.networks import ActorCritic
from agents.ppo.normalise import Normaliser


@dataclass
class Live:
    """What one request hands to the next, all (num_envs, ...): the part of a run that lies between env and learner."""

    obs: Tensor
    """Normalised, where the run normalises."""
    mask: Tensor
    """bool (num_envs, mask_width)."""
    done: Tensor
    """True where the previous step ended the episode."""
    start: Tensor
    """True where `obs` is the first of an episode."""
    memory: Tensor
    """The actor's memory, (num_envs, size); no width without."""
    critic_memory: Tensor
    discounted: Tensor
    """Running discounted return, for reward normalisation."""
    episode_return: Tensor
    episode_length: Tensor
    numpy: bool
    """The environment takes and gives arrays; not part of a checkpoint."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {name: tensor for name, tensor in vars(self).items() if name != "numpy"}


@dataclass
class Rollout:
    """One iteration's requests, time first: (num_steps, num_envs, ...)."""

    obs: Tensor
    """One step longer than the rest: its last row is where the next iteration starts."""
    mask: Tensor
    action: Tensor
    log_prob: Tensor
    reward: Tensor
    """As the environment gave it."""
    learn_reward: Tensor
    """As the learner sees it: normalised, where the run normalises; else the same tensor."""
    terminated: Tensor
    done: Tensor
    valid: Tensor
    """False on the rows that NEXT_STEP spends on a reset: nobody was served."""
    start: Tensor
    """True where an episode starts; one step longer, as `obs`."""
    memory: Tensor
    """The actor's memory before the first step, (num_envs, size)."""
    critic_memory: Tensor
    ended_return: Tensor
    """Return of the episode that ended here, NaN where none did."""
    ended_length: Tensor
    final: list[tuple[int, Tensor, Tensor]]
    """SAME_STEP truncations: (step, rows, their last observations)."""
    final_obs: Tensor | None = None
    """In place of `final`, of a rollout that did not ask which rows they are: every request's observation after it,
    (num_steps, num_envs, obs_dim)."""

    def cuts(self) -> tuple[int, ...]:
        """Steps at which an episode starts in any row, of `obs` (so up to num_steps)."""
        return tuple(self.start.any(dim=1).nonzero()[:, 0].tolist())


def autoreset_mode(env: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """The mode of `env`; the ones that cannot be learned from here are refused."""
    mode = env.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        raise ValueError(f"autoreset_mode is {mode}; PPO needs SAME_STEP or NEXT_STEP: pass autoreset_mode='SameStep'")
    return AutoresetMode(mode)


def _empty_rollout(net: ActorCritic, live: Live, num_steps: int) -> Rollout:
    num_envs, device, head = len(live.obs), live.obs.device, net.head

    def empty(dtype: torch.dtype, *extra: int, steps: int = num_steps) -> Tensor:
        return torch.empty(steps, num_envs, *extra, dtype=dtype, device=device)

    reward = empty(torch.float32)
    return Rollout(
        obs=empty(torch.float32, net.obs_dim, steps=num_steps + 1),
        mask=empty(torch.bool, head.mask_width),
        action=empty(head.action_dtype, *head.action_shape),
        log_prob=empty(torch.float32),
        reward=reward,
        learn_reward=reward,
        terminated=empty(torch.bool),
        done=empty(torch.bool),
        valid=empty(torch.bool).fill_(True),
        start=empty(torch.bool, steps=num_steps + 1),
        memory=live.memory,
        critic_memory=live.critic_memory,
        ended_return=empty(torch.float32),
        ended_length=empty(torch.float32),
        final=[],
    )


@torch.no_grad()
def collect(
    env: VectorEnv[Any, Any, Any],
    net: ActorCritic,
    live: Live,
    num_steps: int,
    generator: torch.Generator,
    normaliser: Normaliser | None = None,
) -> Rollout:
    """Plays `num_steps` requests in every environment and moves `live` along.

    Raises:
        ValueError: When a mask forbids every choice, or the autoreset mode cannot be learned from.
    """
    same_step, device = autoreset_mode(env) == AutoresetMode.SAME_STEP, live.obs.device
    head, num_envs = net.head, len(live.obs)
    normaliser = normaliser or Normaliser(net.obs_dim, obs=False, reward=False)
    roll = _empty_rollout(net, live, num_steps)
    if normaliser.reward is not None:
        roll.learn_reward = torch.empty_like(roll.reward)
    draws = head.draws(num_steps, num_envs, generator)
    for t in range(num_steps):
        if not same_step:
            roll.valid[t] = ~live.done
        roll.obs[t], roll.mask[t], roll.start[t] = live.obs, live.mask, live.start
        output, live.memory = net.step(live.obs, live.memory, live.start)
        action, roll.log_prob[t] = head.sample(output, live.mask, draws[t])
        roll.action[t] = action

        given = head.for_env(action)
        obs, reward, terminated, truncated, infos = env.step(given.cpu().numpy() if live.numpy else given)
        roll.reward[t] = torch.as_tensor(reward, device=device)
        roll.terminated[t] = torch.as_tensor(terminated, device=device)
        truncated = torch.as_tensor(truncated, device=device)
        live.done = roll.terminated[t] | truncated
        roll.done[t] = live.done
        # the observation that the reset row of NEXT_STEP sees is the episode's last one
        live.start = live.done if same_step else ~roll.valid[t]
        live.obs = normaliser.observation(torch.as_tensor(obs, dtype=torch.float32, device=device))
        if same_step and "final_obs" in infos:
            # the returned row already belongs to the next episode; the last one's value is V(final_obs)
            rows = (truncated & ~roll.terminated[t]).nonzero()[:, 0]
            if len(rows):
                final = _rows_of(infos["final_obs"], rows)
                roll.final.append((t, rows, normaliser.observation(final, learn=False)))
        live.mask = action_mask(infos, num_envs, head, device)
        if normaliser.reward is not None:
            live.discounted, roll.learn_reward[t] = normaliser.rewarded(
                live.discounted, roll.reward[t], roll.valid[t], live.done
            )

        live.episode_return = live.episode_return + torch.where(roll.valid[t], roll.reward[t], 0.0)
        live.episode_length = live.episode_length + roll.valid[t]
        roll.ended_return[t] = torch.where(live.done, live.episode_return, torch.nan)
        roll.ended_length[t] = torch.where(live.done, live.episode_length, torch.nan)
        live.episode_return = torch.where(live.done, 0.0, live.episode_return)
        live.episode_length = torch.where(live.done, 0.0, live.episode_length)
    roll.obs[num_steps], roll.start[num_steps] = live.obs, live.start
    check_masks(net, roll.mask)
    return roll


def check_masks(net: ActorCritic, mask: Tensor) -> None:
    """Refuses masks (..., mask_width) that leave a row nothing to choose.

    Raises:
        ValueError: When a mask forbids every choice.
    """
    if any(not bool(part.any(dim=-1).all()) for part in mask.split(_places(net), dim=-1)):
        raise ValueError("an action_mask forbids every strategy; an environment must leave at least one available")


def _places(net: ActorCritic) -> list[int]:
    sizes = getattr(net.head, "sizes", None)
    return list(sizes) if sizes is not None else [net.head.mask_width]


def _rows_of(final_obs: Any, rows: Tensor) -> Tensor:
    if isinstance(final_obs, np.ndarray) and final_obs.dtype == object:  # SyncVectorEnv: None in the rows that go on
        final_obs = np.stack([final_obs[i] for i in rows.tolist()])
        return torch.as_tensor(final_obs, dtype=torch.float32, device=rows.device)
    return torch.as_tensor(final_obs, dtype=torch.float32, device=rows.device)[rows]
