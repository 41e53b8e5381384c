"""PPO of Stable-Baselines3 on a MetaRec environment: the reference that our own PPO is read against, under the same tags.

    python -m agents.sb3.ppo --world worlds/movielens_100k --seed 0 --run-dir runs/sb3_0

Hyperparameters carry the names and defaults of `agents.ppo`. Differences that remain: rewards are scaled by SB3's running
`VecNormalize` (ours are by a constant), `train/*` is logged one iteration late, action masks are not known, and a killed run
starts again from its seed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.common import Algorithm
from agents.sb3.export import actor_critic_policy
from agents.sb3.hyperparameters import action_of, tuned
from metarec_gym.envs.vector_env import MetaRecVectorEnv


@dataclass(frozen=True)
class Args:
    """Hyperparameters, named as in `agents.ppo`."""

    seed: int = 0
    """Seed of the network, the actions, the minibatches and the environment."""
    total_steps: int = 1_000_000
    """Requests to learn from; rounded up to whole iterations."""
    num_steps: int = 33
    """Requests per environment and iteration."""
    learning_rate: float = 2e-3
    """Adam's step size in the first iteration."""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """`linear` falls to zero just after the last iteration."""
    gamma: float = 0.9
    """Discount of the next request's value; ten requests of foresight cover what one episode can teach about a user."""
    gae_lambda: float = 0.95
    """Exponential weight of longer advantage estimates."""
    epochs: int = 4
    """Passes over each rollout."""
    minibatch_size: int = 1056
    """Requests per gradient step."""
    clip_range: float = 0.2
    """The probability ratio counts only within 1 +- this."""
    clip_range_vf: float | None = None
    """Values may move by at most this per iteration; None does not clip."""
    normalize_advantage: bool = True
    """Advantages get mean 0 and deviation 1 in every minibatch."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the mean squared value error."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""
    target_kl: float | None = None
    """The update ends before the gradient step whose KL estimate exceeds 1.5 times this; None never ends it."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the tanh layers, of actor and critic alike."""
    stats_window: int = 256
    """Episodes that the logged mean return and length run over."""
    blind_to_masks: bool = False
    """Learn where strategies can be out of service although masks are not known: chosen, such a strategy serves nothing and
    the reward tells. The policy that is played leaves them alone."""


def defaults_for(env_id: str) -> Args:
    """The hyperparameters of a registered id's kind of action."""
    action = action_of(env_id)
    # the file of Select says the same (a test holds it): so the default training needs no PyYAML
    return Args() if action == "select" else tuned(Args(), "ppo", action)


def learning_rate(args: Args, num_envs: int) -> Any:
    """The schedule of `agents.ppo` in SB3's terms: a function of the share of steps that are left after the rollout."""
    per_iteration = args.num_steps * num_envs
    whole = math.ceil(args.total_steps / per_iteration) * per_iteration

    def at(progress_remaining: float) -> float:
        before = max((1.0 - progress_remaining) * args.total_steps - per_iteration, 0.0)
        return args.learning_rate * (1.0 - before / whole if args.lr_schedule == "linear" else 1.0)

    return at


def make_model(env: VecEnv, num_envs: int, args: Args, seed: int) -> PPO:
    """The untrained model."""
    return PPO(
        "MlpPolicy",
        env,
        learning_rate=learning_rate(args, num_envs),
        n_steps=args.num_steps,
        batch_size=args.minibatch_size,
        n_epochs=args.epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_range,
        clip_range_vf=args.clip_range_vf,
        normalize_advantage=args.normalize_advantage,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        target_kl=args.target_kl,
        stats_window_size=args.stats_window,
        policy_kwargs={"net_arch": list(args.hidden), "activation_fn": torch.nn.Tanh},
        seed=seed,
        device="cpu",
    )


ALGORITHM = Algorithm("sb3_ppo", make_model, actor_critic_policy)
train = ALGORITHM.train


@dataclass(frozen=True)
class Command:
    """Trains PPO of Stable-Baselines3 on `MetaRec/Select-v0`."""

    args: Args = dataclasses.field(default_factory=Args)
    """Hyperparameters."""
    world: str | None = None
    """Folder of a world; the embedded synthetic one if absent."""
    fold: Literal["A", "B"] = "A"
    """Whose users and judge to train on."""
    num_envs: int = 256
    """Users served at once."""
    run_dir: str | None = None
    """Where to write; `runs/sb3_<seed>` if absent."""
    threads: int = 1
    """CPU threads; these networks are too small to gain from more, and lose much on a busy machine."""


def main() -> None:
    """The command line."""
    import tyro

    command = tyro.cli(Command, config=(tyro.conf.OmitArgPrefixes,))
    torch.set_num_threads(command.threads)
    env = MetaRecVectorEnv(command.num_envs, world=command.world, fold=command.fold, autoreset_mode="SameStep")
    run_dir = Path(command.run_dir or f"runs/sb3_{command.args.seed}")
    result = train(env, command.args, run_dir=run_dir)
    row = {"steps": result.steps, "seconds": result.seconds, **result.metrics}
    (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(command), indent=2) + "\n")
    (run_dir / "command.txt").write_text(" ".join(["python -m agents.sb3.ppo", *sys.argv[1:]]) + "\n")
    (run_dir / "result.json").write_text(json.dumps(row, indent=2) + "\n")
    print(json.dumps({"run_dir": str(run_dir), **row}, indent=2))


if __name__ == "__main__":
    main()
