"""PPO in one file, in the manner of CleanRL, on `gymnasium.make_vec`: with action masks, and with truncation done right.

    python -m experiments.integrations.cleanrl_ppo --total-steps 50000

The manner: Huang et al., "CleanRL", JMLR 23(274), 2022. Where CleanRL's own script takes a truncated episode for an ended one,
this one adds gamma * V(final_obs) to its last reward: we stopped watching, the user did not stop taking items. For real work use
`agents.ppo`, which resumes, logs and exports.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium
import torch
import tyro
from gymnasium.spaces import flatdim
from torch import Tensor, nn

import metarec_gym  # noqa: F401  registers the ids


@dataclass(frozen=True)
class Args:
    """PPO on `MetaRec/Select-v0`."""

    total_steps: int = 50_000
    """Requests to learn from, rounded up to whole rollouts."""
    seed: int = 0
    """Seed of network, choices, minibatches and users."""
    num_envs: int = 32
    """Users served at once."""
    num_steps: int = 20
    """Requests per user and rollout."""
    learning_rate: float = 2e-3
    """Adam's step size, falling linearly to 0."""
    gamma: float = 0.9
    """Discount of the next request's value."""
    gae_lambda: float = 0.95
    """Exponential weight of longer advantage estimates."""
    epochs: int = 4
    """Passes over each rollout."""
    minibatches: int = 4
    """Gradient steps a pass."""
    clip: float = 0.2
    """The probability ratio counts only within 1 +- this."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the squared value error."""
    world: str | None = None
    """Folder of a world; the embedded synthetic one if absent."""


class Agent(nn.Module):
    """Actor and critic, two tanh networks."""

    def __init__(self, obs_dim: int, n_strategies: int, generator: torch.Generator) -> None:
        super().__init__()
        self.actor = self._network(obs_dim, n_strategies, 0.01, generator)
        self.critic = self._network(obs_dim, 1, 1.0, generator)

    @staticmethod
    def _network(width_in: int, width_out: int, gain: float, generator: torch.Generator) -> nn.Sequential:
        layers = [nn.Linear(width_in, 64), nn.Linear(64, 64), nn.Linear(64, width_out)]
        for layer, scale in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
            nn.init.orthogonal_(layer.weight, scale, generator=generator)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    def log_probs(self, obs: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities (rows, K); strategies out of service get -1e8 as logit, so that p log p stays a number."""
        return torch.log_softmax(self.actor(obs).masked_fill(mask == 0, -1e8), dim=1)

    def value(self, obs: Tensor) -> Tensor:
        """Value of each row's state, (rows,)."""
        return self.critic(obs)[:, 0]  # type: ignore[no-any-return]


def bootstrapped(
    reward: Tensor, terminated: Tensor, truncated: Tensor, info: dict[str, Any], agent: Any, gamma: float
) -> Tensor:
    """Adds gamma * V(final_obs) to the rewards (num_envs,) of cut episodes; the returned observation is the next user's."""
    cut = truncated & ~terminated
    return reward + gamma * agent.value(info["final_obs"]) * cut if bool(cut.any()) else reward


def advantages(rewards: Tensor, values: Tensor, done: Tensor, last_value: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE (Schulman et al. 2016, eq. 16): A_t = delta_t + gamma * lambda * A_{t+1}, cut where an episode ended; (T, N)."""
    out, ahead = torch.zeros_like(rewards), torch.zeros_like(last_value)
    following = torch.cat([values[1:], last_value[None]])
    for t in reversed(range(len(rewards))):
        goes_on = (~done[t]).to(rewards.dtype)
        delta = rewards[t] + gamma * following[t] * goes_on - values[t]
        ahead = out[t] = delta + gamma * lam * goes_on * ahead
    return out


def train(args: Args, **settings: Any) -> dict[str, float]:
    """Trains, and returns the mean reward a request of the first and the last rollout, with what was counted."""
    env = gymnasium.make_vec(
        "MetaRec/Select-v0",
        num_envs=args.num_envs,
        **{"world": args.world, "output": "torch", "autoreset_mode": "SameStep", **settings},
    )
    generator = torch.Generator().manual_seed(args.seed)
    agent = Agent(flatdim(env.single_observation_space), flatdim(env.single_action_space), generator)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5)
    obs, info = env.reset(seed=args.seed)
    iterations = -(-args.total_steps // (args.num_envs * args.num_steps))
    history, cuts = [], 0
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - iteration / iterations)
        steps: list[tuple[Tensor, ...]] = []
        earned = 0.0
        with torch.no_grad():
            for _ in range(args.num_steps):
                mask = info["action_mask"]
                log_probs = agent.log_probs(obs, mask)
                action = torch.multinomial(log_probs.exp(), 1, generator=generator)
                following, reward, terminated, truncated, info = env.step(action[:, 0])
                earned, cuts = earned + float(reward.sum()), cuts + int((truncated & ~terminated).sum())
                target = bootstrapped(reward, terminated, truncated, info, agent, args.gamma)
                taken = log_probs.gather(1, action)[:, 0]
                steps.append((obs, mask, action, taken, agent.value(obs), target, terminated | truncated))
                obs = following
            all_obs, masks, actions, old, values, rewards, done = (torch.stack(x) for x in zip(*steps, strict=True))
            gain = advantages(rewards, values, done, agent.value(obs), args.gamma, args.gae_lambda)
            batch = [x.flatten(0, 1) for x in (all_obs, masks, actions, old, gain, gain + values)]
        history.append(earned / (args.num_envs * args.num_steps))
        for _ in range(args.epochs):
            for rows in torch.randperm(len(batch[0]), generator=generator).chunk(args.minibatches):
                _update(agent, optimizer, [x[rows] for x in batch], args)
    env.close()
    count = iterations * args.num_envs * args.num_steps
    return {"transitions": count, "bootstraps": cuts, "reward_first": history[0], "reward_last": history[-1]}


def _update(agent: Agent, optimizer: torch.optim.Optimizer, batch: list[Tensor], args: Args) -> None:
    obs, mask, action, old, gain, returns = batch
    log_probs = agent.log_probs(obs, mask)
    ratio = (log_probs.gather(1, action)[:, 0] - old).exp()
    gain = (gain - gain.mean()) / (gain.std() + 1e-8)
    policy_loss = -torch.minimum(gain * ratio, gain * ratio.clamp(1 - args.clip, 1 + args.clip)).mean()
    value_loss = 0.5 * (agent.value(obs) - returns).square().mean()
    entropy = -(log_probs.exp() * log_probs).sum(dim=1).mean()
    optimizer.zero_grad()
    (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
    nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
    optimizer.step()


def main() -> None:
    """The command line."""
    args = tyro.cli(Args)
    torch.set_num_threads(1)
    print(json.dumps({**asdict(args), **train(args)}, indent=2))


if __name__ == "__main__":
    main()
