"""An actor that does nearly what another policy does: where training begins when a good policy is known.

PPO that begins with near-uniform choices learns the first requests' gains first and may settle where little is left for the last
ones; begun from a policy that already keeps something for later, it goes on from there (`experiments/results/ppo_limits.md`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from agents.ppo.args import Args
from agents.ppo.heads import Choice, action_mask
from agents.ppo.networks import ActorCritic, export_policy
from metarec_gym.policy import MlpPolicy, Policy, masked_uniform, sample_actions
from metarec_gym.seeding import stream, torch_generator

ELSEWHERE = 0.2
"""Share of uniform choices: while the policy is watched, so that states beside its path are met, and in what is imitated, so that
the actor goes on exploring."""
STEPS = 400
"""Gradient steps."""
ROWS = 1024
"""Requests of each."""


def imitate(policy: Policy, env: Any, args: Args, *, requests: int) -> tuple[MlpPolicy, int]:
    """Fits the actor that `args` describes to a policy's choices (cross-entropy on the states that the policy meets).

    Args:
        policy: What is imitated, of a Select environment.
        env: A torch vector environment that resets in the same step. Rewards are not looked at.
        args: `seed`, `hidden`, `orthogonal_init` and `gain_hidden` count.
        requests: How many the policy serves, rounded up to whole steps of the environment.

    Returns:
        The actor, for `train(..., start=...)`, and the requests served.
    """
    seed = stream(args.seed, "ppo", "imitation")
    obs, info = env.reset(seed=stream(seed, "env"))
    head, generator = Choice(env.single_action_space.n), torch_generator(seed, "draws")
    policy.begin(env.num_envs, env.device)
    seen, wanted = [], []
    for _ in range(-(-requests // env.num_envs)):
        mask = action_mask(info, env.num_envs, head, env.device)
        target = (1.0 - ELSEWHERE) * policy.action_probs(obs, mask) + ELSEWHERE * masked_uniform(mask)
        seen.append(obs.cpu())
        wanted.append(target.cpu())
        action = sample_actions(target, torch.rand(env.num_envs, generator=generator).to(env.device))
        before = obs
        obs, reward, terminated, _, info = env.step(action)
        policy.observe(before, action, reward, torch.ones_like(terminated))
    x, y = torch.cat(seen), torch.cat(wanted)
    plain = dataclasses.replace(args, recurrent=False, shared_trunk=False)
    net = ActorCritic(x.shape[1], head, plain, torch_generator(seed, "network"))
    optimizer = torch.optim.Adam(net.actor.parameters(), lr=2e-3)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (ROWS,), generator=generator)
        loss = -(y[rows] * torch.log_softmax(net.output(x[rows]), dim=1)).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return export_policy(net, tuple(env.strategy_names), {"agent": "imitation", "seed": args.seed}), len(x)
