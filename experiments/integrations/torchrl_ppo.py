"""TorchRL on our environments: its own spec check, its collector, its PPO loss; single environments and our batch.

    python -m experiments.integrations.torchrl_ppo --steps 20000

Rewards, endings and last observations come as TorchRL defines them, so that its `GAE` bootstraps truncated episodes by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gymnasium
import torch
import tyro
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, GymWrapper
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import metarec_gym  # noqa: F401  registers the ids
from metarec_gym.world import World


def make_single(env_id: str = "MetaRec/Select-v0", **settings: Any) -> Any:
    """One user at a time, by id; without categorical encoding TorchRL's actions are one-hot."""
    return GymEnv(env_id, categorical_action_encoding=True, device="cpu", **settings)


def make_batch(num_envs: int, env_id: str = "MetaRec/Select-v0", *, mode: str = "Disabled", **settings: Any) -> Any:
    """Our batch in one process; `GymEnv(num_envs=...)` would start a process for each user instead.

    TorchRL resets rows itself ("Disabled", which it prefers) or reads `final_obs` ("SameStep"); it refuses "NextStep".
    """
    rows = gymnasium.make_vec(env_id, num_envs=num_envs, autoreset_mode=mode, output="torch", **settings)
    return GymWrapper(rows, categorical_action_encoding=True, device="cpu")


def networks(env: Any, width: int = 64) -> tuple[Any, Any]:
    """Actor and critic for a choice among strategies."""
    obs_dim, n_strategies = env.observation_spec["observation"].shape[-1], int(env.action_spec.space.n)
    logits = nn.Sequential(nn.Linear(obs_dim, width), nn.Tanh(), nn.Linear(width, n_strategies))
    actor = ProbabilisticActor(
        TensorDictModule(logits, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        spec=env.action_spec,
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = ValueOperator(nn.Sequential(nn.Linear(obs_dim, width), nn.Tanh(), nn.Linear(width, 1)))
    return actor, critic


def train(
    steps: int, seed: int, *, num_envs: int = 32, num_steps: int = 20, world: World | str | None = None
) -> dict[str, float]:
    """PPO; returns the mean reward a request of the first and the last batch, with what was counted."""
    # TorchRL draws actions and minibatches from torch's global generator
    torch.manual_seed(seed)
    env = make_batch(num_envs, world=world)
    env.set_seed(seed)
    actor, critic = networks(env)
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.01, normalize_advantage=True)
    # bootstraps where `truncated` is set without `terminated`, from the last observation of the old episode
    gae = GAE(gamma=0.9, lmbda=0.95, value_network=critic)
    optimizer = torch.optim.Adam(loss.parameters(), lr=2e-3)
    rows = num_envs * num_steps
    frames = -(-steps // rows) * rows
    collector = Collector(env, actor, frames_per_batch=rows, total_frames=frames, auto_register_policy_transforms=True)
    rewards, transitions, truncated = [], 0, 0
    for batch in collector:
        rewards.append(float(batch["next", "reward"].mean()))
        transitions, truncated = transitions + batch.numel(), truncated + int(batch["next", "truncated"].sum())
        for _ in range(4):
            with torch.no_grad():
                gae(batch)
            flat = batch.reshape(-1)
            for chosen in torch.randperm(rows).chunk(4):
                parts = loss(flat[chosen])
                optimizer.zero_grad()
                (parts["loss_objective"] + parts["loss_critic"] + parts["loss_entropy"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
    collector.shutdown()
    return {
        "transitions": transitions,
        "truncated": truncated,
        "reward_first": rewards[0],
        "reward_last": rewards[-1],
    }


@dataclass(frozen=True)
class Args:
    """PPO of TorchRL on `MetaRec/Select-v0`."""

    steps: int = 20_000
    """Requests to learn from, rounded up to whole batches."""
    seed: int = 0
    """Seed of networks, choices and users."""
    num_envs: int = 32
    """Users served at once."""
    world: str | None = None
    """Folder of a world; the embedded synthetic one if absent."""


def main() -> None:
    """The command line."""
    args = tyro.cli(Args)
    torch.set_num_threads(1)
    print(json.dumps(train(args.steps, args.seed, num_envs=args.num_envs, world=args.world), indent=2))


if __name__ == "__main__":
    main()
