"""Does our PPO end where Stable-Baselines3's does, at equal settings?

    python -m experiments.parity --seeds 10

Both train on CartPole-v1 and on MetaRec/Select-v0 (the synthetic world), and both exported policies are played by the same code.
They count as equal when the 90 % interval of the difference of final returns lies within +-5 % of SB3's return (two one-sided
tests). Every training leaves a file: a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.run_folder import ENV_CODE, RunFolder, code_hash, command_line, write_atomic

if TYPE_CHECKING:
    from metarec_gym.policy import MlpPolicy

PARITY_CODE = (
    *ENV_CODE,
    "experiments/parity.py",
    "agents/ppo.py",
    "agents/ppo",
    "agents/sb3/ppo.py",
    "agents/sb3/common.py",
)
ENVS = ("CartPole-v1", "MetaRec/Select-v0")
AGENTS = ("ppo", "sb3_ppo")
CARTPOLE: dict[str, Any] = {
    "num_steps": 32,
    "minibatch_size": 256,
    "epochs": 20,
    "gamma": 0.98,
    "gae_lambda": 0.8,
    "learning_rate": 1e-3,
    "ent_coef": 0.0,
}
"""As in RL Zoo for PPO on CartPole-v1, but for the clip range, which stays at 0.2."""
CARTPOLE_ENVS = 8
SELECT_ENVS = 256


@dataclass(frozen=True)
class Args:
    """Compares two implementations of PPO."""

    seeds: int = 10
    """Training seeds of each."""
    cartpole_steps: int = 50_000
    """Steps of CartPole-v1."""
    select_steps: int = 60_000
    """Requests of MetaRec/Select-v0."""
    episodes: int = 50
    """Episodes of CartPole-v1 that a final return is the mean of; in Select each start state of fold B is played once."""
    margin: float = 0.05
    """Equal means within this share of SB3's return."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    page: Path | None = None
    """Where to write the Markdown page too."""
    quiet: bool = False
    """No lines on the way."""


def cartpole_policy(agent: str, seed: int, steps: int) -> MlpPolicy:
    """Trains on CartPole-v1 and exports the actor."""
    import gymnasium
    import torch
    from gymnasium.vector import AutoresetMode

    from agents import ppo
    from agents.sb3.common import isolated_generators
    from agents.sb3.export import linear_layers
    from agents.sb3.ppo import Args as Sb3Args
    from agents.sb3.ppo import make_model
    from metarec_gym.policy import MlpPolicy
    from metarec_gym.seeding import stream

    if agent == "ppo":
        env = gymnasium.make_vec(
            "CartPole-v1", CARTPOLE_ENVS, "sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
        )
        # SB3 is given the rewards as they are
        args = ppo.Args(seed=seed, total_steps=steps, reward_scale=1.0, **CARTPOLE)
        return ppo.train(env, args, progress=False).policy
    from stable_baselines3.common.env_util import make_vec_env

    with isolated_generators():
        rows = make_vec_env("CartPole-v1", CARTPOLE_ENVS)
        other = Sb3Args(seed=seed, total_steps=steps, **CARTPOLE)
        model = make_model(rows, CARTPOLE_ENVS, other, stream(seed, "sb3", "learner") % 2**32)
        model.learn(steps)
        layers = linear_layers(model.policy.mlp_extractor.policy_net, model.policy.action_net)
    assert isinstance(layers[0][0], torch.Tensor)
    return MlpPolicy(layers, ("left", "right"))


def cartpole_return(policy: MlpPolicy, episodes: int, seed: int) -> float:
    """Mean return of sampled actions, one episode a row."""
    import gymnasium
    import torch

    from metarec_gym.policy import sample_actions
    from metarec_gym.seeding import stream, torch_generator

    env: Any = gymnasium.make_vec("CartPole-v1", episodes, "vector_entry_point")
    generator = torch_generator(seed, "parity", "actions")
    obs, _ = env.reset(seed=stream(seed, "parity", "cartpole") % 2**31)
    alive, total = np.ones(episodes, dtype=bool), np.zeros(episodes)
    mask = torch.ones(episodes, 2, dtype=torch.bool)
    while alive.any():
        probs = policy.action_probs(torch.as_tensor(obs, dtype=torch.float32), mask)
        action = sample_actions(probs, torch.rand(episodes, generator=generator)).numpy()
        obs, reward, terminated, truncated, _ = env.step(action)
        total += np.where(alive, reward, 0.0)
        alive &= ~(terminated | truncated)
    env.close()
    return float(total.mean())


def select_return(agent: str, seed: int, steps: int) -> float:
    """Trains on fold A of the synthetic world; expected return of an episode on fold B."""
    from agents import ppo
    from agents.sb3 import ppo as sb3_ppo
    from metarec_gym.envs.vector_env import MetaRecVectorEnv
    from metarec_gym.evaluation.rollout import rollout
    from metarec_gym.seeding import stream

    module: Any = ppo if agent == "ppo" else sb3_ppo
    output: Any = "torch" if agent == "ppo" else "numpy"
    env = MetaRecVectorEnv(SELECT_ENVS, fold="A", autoreset_mode="SameStep", output=output)
    args = module.Args(seed=seed, total_steps=steps, num_steps=env.horizon)
    policy = module.train(env, args, progress=False).policy
    world = env.world
    # one luck for all trainings: what differs is what was learned
    played = rollout(world, "B", policy, contexts=world.starts_of("B"), replicates=1, horizon=env.horizon,
                     env_seed=stream(0, "parity", "select"))  # fmt: skip
    return float(played.expected.sum(axis=2).mean())


def final_return(env_id: str, agent: str, seed: int, args: Args) -> float:
    """Trains one agent under one seed and plays what it learned."""
    if env_id == "CartPole-v1":
        return cartpole_return(cartpole_policy(agent, seed, args.cartpole_steps), args.episodes, seed)
    return select_return(agent, seed, args.select_steps)


def difference(ours: NDArray[np.float64], theirs: NDArray[np.float64], margin: float) -> dict[str, Any]:
    """Welch's 90 % interval of the difference of means, in shares of their mean, and whether it lies within the margin.

    Args:
        ours: Final returns, one a seed.
        theirs: The same of the other implementation.
        margin: Share of their mean.

    Returns:
        `ours`, `theirs` (means), `estimate`, `low`, `high` (shares), `equal`.

    Raises:
        ValueError: With fewer than two seeds each.
    """
    from scipy import stats

    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"{len(ours)} and {len(theirs)} seeds, expected at least 2 each: an interval needs a spread")
    parts = ours.var(ddof=1) / len(ours), theirs.var(ddof=1) / len(theirs)
    se, scale = float(np.sqrt(sum(parts))), float(theirs.mean())
    gap = float(ours.mean()) - scale
    half = 0.0
    if se > 0:
        df = sum(parts) ** 2 / (parts[0] ** 2 / (len(ours) - 1) + parts[1] ** 2 / (len(theirs) - 1))
        half = float(stats.t.ppf(0.95, df)) * se
    low, high = (gap - half) / scale, (gap + half) / scale
    return {"ours": float(ours.mean()), "theirs": scale, "estimate": gap / scale, "low": low, "high": high,
            "equal": bool(-margin < low and high < margin)}  # fmt: skip


def page_of(args: Args, rows: dict[str, dict[str, Any]], command: str) -> str:
    """The Markdown page."""
    lines = [
        "# Our PPO and Stable-Baselines3's at equal settings",
        "",
        f"    {command}",
        "",
        f"{args.seeds} training seeds each; {args.cartpole_steps:,} steps of CartPole-v1 (RL Zoo's settings, clip range 0.2), "
        f"{args.select_steps:,} requests of MetaRec/Select-v0 (synthetic world, scored on fold B). Rewards of Select are scaled "
        "by a constant in ours and by VecNormalize in SB3's. 90 % interval (Welch) of the difference of final returns, in "
        f"percent of SB3's; equal means within +-{100 * args.margin:g} %.",
        "",
        "| environment | ours | SB3 | difference [90 % interval] | equal |",
        "|---|---|---|---|---|",
    ]
    for env_id, row in rows.items():
        spread = [
            f"{np.mean(row['returns'][a]):.2f} ({min(row['returns'][a]):.2f} to {max(row['returns'][a]):.2f})"
            for a in AGENTS
        ]
        gap = f"{100 * row['estimate']:+.2f} % [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]"
        lines.append(f"| {env_id} | {spread[0]} | {spread[1]} | {gap} | {'yes' if row['equal'] else 'not shown'} |")
    return "\n".join([*lines, "", "In brackets: the lowest and the highest seed.", ""])


def run(args: Args) -> dict[str, Any]:
    """Trains what is missing, compares, writes the page.

    Args:
        args: The command line.

    Returns:
        The result row.
    """
    facts = {name: value for name, value in vars(args).items() if name not in ("runs", "page", "quiet")}
    folder = RunFolder(args.runs, "parity", {"kind": "parity", **facts, "code": code_hash(PARITY_CODE)})
    done = folder.result()
    if done is None:
        folder.begin(args)
        rows: dict[str, dict[str, Any]] = {}
        for env_id in ENVS:
            returns: dict[str, list[float]] = {agent: [] for agent in AGENTS}
            for seed in range(args.seeds):
                for agent in AGENTS:
                    file = folder.path / f"{env_id.replace('/', '-')}_{agent}_{seed}.json"
                    if not file.is_file():
                        started = time.process_time()
                        value = final_return(env_id, agent, seed, args)
                        cpu_s = time.process_time() - started
                        write_atomic(file, json.dumps({"return": value, "cpu_s": cpu_s}) + "\n")
                        if not args.quiet:
                            print(f"{env_id}  {agent:8s} seed {seed}  {value:.2f}  {cpu_s:.0f} CPU s", flush=True)
                    returns[agent].append(float(json.loads(file.read_text())["return"]))
            ours, theirs = (np.array(returns[agent]) for agent in AGENTS)
            compared = difference(ours, theirs, args.margin)
            rows[env_id] = {**compared, "returns": returns}
        write_atomic(folder.path / "parity.md", page_of(args, rows, command_line()))
        done = folder.finish({"rows": rows})
    page = (folder.path / "parity.md").read_text(encoding="utf-8")
    if args.page is not None:
        write_atomic(args.page, page)
    if not args.quiet:
        print(f"{page}\nresult   {folder.path / 'result.json'}")
    return done


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
