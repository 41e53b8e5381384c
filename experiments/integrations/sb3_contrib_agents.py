"""sb3-contrib on our environments: PPO that never asks a strategy out of service, and PPO with an LSTM.

    python -m experiments.integrations.sb3_contrib_agents --algorithm maskable_ppo --steps 20000

Plain PPO is there to compare with: it asks strategies out of service, which serve nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from experiments.integrations.sb3_agents import make_rows
from metarec_gym.world import World

Algorithm = Literal["maskable_ppo", "recurrent_ppo", "ppo"]

SETTINGS: dict[str, Any] = {"n_steps": 20, "batch_size": 80, "learning_rate": 2e-3, "gamma": 0.9, "device": "cpu"}


class MaskAudit(VecEnvWrapper):
    """Counts the requests that asked a strategy out of service; `MaskablePPO` finds `action_masks` through it."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.masked, self.violations = 0, 0

    def reset(self) -> Any:
        """Starts all rows."""
        return self.venv.reset()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Compares with the masks that hold before the request."""
        allowed = np.stack(self.venv.env_method("action_masks"))
        self.masked += int((~allowed).sum())
        self.violations += int((~np.take_along_axis(allowed, actions[:, None], axis=1)).sum())
        self.venv.step_async(actions)

    def step_wait(self) -> Any:
        """Hands on what the batch returned."""
        return self.venv.step_wait()


def make_model(algorithm: Algorithm, rows: VecEnv, seed: int) -> PPO | MaskablePPO | RecurrentPPO:
    """The untrained learner; `ppo` knows no masks and is there for comparison."""
    if algorithm == "maskable_ppo":
        return MaskablePPO("MlpPolicy", rows, seed=seed, **SETTINGS)
    if algorithm == "recurrent_ppo":
        narrow = {"lstm_hidden_size": 32, "net_arch": [32]}
        return RecurrentPPO("MlpLstmPolicy", rows, seed=seed, policy_kwargs=narrow, **SETTINGS)
    return PPO("MlpPolicy", rows, seed=seed, **SETTINGS)


def mean_return(model: Any, *, episodes: int = 128, seed: int = 1, **settings: Any) -> float:
    """Mean return of the sampled policy; a masked model needs contrib's own evaluation, SB3's would ignore the masks."""
    rows = make_rows("MetaRec/Select-v0", episodes, **settings)
    rows.seed(seed)
    score: Any = evaluate_masked if isinstance(model, MaskablePPO) else evaluate_policy
    return float(score(model, rows, n_eval_episodes=episodes, deterministic=False)[0])


def train(
    algorithm: Algorithm,
    steps: int,
    seed: int,
    *,
    num_envs: int = 16,
    outage_rate: float = 0.1,
    unavailable: tuple[str, ...] = (),
    world: World | str | None = None,
) -> dict[str, float]:
    """Learns while strategies fail and come back, and counts how often one out of service was asked."""
    settings: dict[str, Any] = {"outage_rate": outage_rate, "unavailable": unavailable, "world": world}
    rows = MaskAudit(make_rows("MetaRec/Select-v0", num_envs, **settings))
    model = make_model(algorithm, rows, seed)
    before = mean_return(model, **settings)
    model.learn(steps)
    return {
        "transitions": model.num_timesteps,
        "masked_choices": rows.masked,
        "violations": rows.violations,
        "return_before": before,
        "return_after": mean_return(model, **settings),
    }


@dataclass(frozen=True)
class Args:
    """Trains one agent of sb3-contrib while strategies fail and come back."""

    algorithm: Algorithm = "maskable_ppo"
    """`maskable_ppo`, `recurrent_ppo`, or plain `ppo` to compare with."""
    steps: int = 20_000
    """Requests to learn from."""
    seed: int = 0
    """Seed of network, exploration and users."""
    num_envs: int = 16
    """Users served at once."""
    outage_rate: float = 0.1
    """Probability that a strategy in service fails before a request."""
    world: str | None = None
    """Folder of a world; the embedded synthetic one if absent."""


def main() -> None:
    """The command line."""
    args = tyro.cli(Args)
    numbers = train(
        args.algorithm,
        args.steps,
        args.seed,
        num_envs=args.num_envs,
        outage_rate=args.outage_rate,
        world=args.world,
    )
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
