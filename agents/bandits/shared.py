"""What every bandit uses: ties, posterior draws as probabilities, learning from training users, and files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from gymnasium.vector import AutoresetMode
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metarec_gym.policy import masked_uniform, one_hot_probs, sample_actions
from metarec_gym.seeding import fold_in, stream, torch_generator

BANDIT_SCHEMA = 1


def best_of(scores: Tensor, action_mask: Tensor) -> Tensor:
    """Equal probability for the available strategies of highest score; both (num_rows, K) -> float32 (num_rows, K)."""
    allowed = scores.masked_fill(~action_mask, -torch.inf)
    return masked_uniform((allowed == allowed.amax(dim=1, keepdim=True)) & action_mask)


def draw_keys(seed: int, purpose: str, request: Tensor, draws: int, width: int) -> Tensor:
    """Keys of posterior draws that rows at the same request share; int64 (num_rows,) -> int64 (num_rows, draws, width)."""
    device = request.device
    root = torch.tensor(stream(seed, "thompson", purpose), device=device)
    draw = torch.arange(draws, device=device)[None, :, None]
    return fold_in(fold_in(fold_in(root, request[:, None, None]), draw), torch.arange(width, device=device))


def win_shares(samples: Tensor, action_mask: Tensor) -> Tensor:
    """Share of the draws in which each available strategy is the best; (num_rows, draws, K) -> float32 (num_rows, K)."""
    allowed = samples.masked_fill(~action_mask[:, None, :], -torch.inf)
    return one_hot_probs(allowed.argmax(dim=2), samples.shape[2]).mean(dim=1)


def with_constant(obs: Tensor) -> Tensor:
    """A column of ones on the right; (num_rows, d) -> (num_rows, d + 1)."""
    return torch.cat([obs, obs.new_ones(len(obs), 1)], dim=1)


def play(
    env: Any,
    requests: int,
    seed: int,
    choose: Callable[[Tensor, Tensor], Tensor],
    learn: Callable[[Tensor, Tensor, Tensor, Tensor], object],
) -> int:
    """Serves training users.

    Args:
        env: A same-step vector environment, numpy or torch.
        requests: How many to play at least; rounded up to whole steps of the environment.
        seed: Of the environment and of the choices.
        choose: `(obs, action_mask) -> probs` as in a policy.
        learn: Gets `(obs, action, reward, done)` of each step.

    Returns:
        Requests played.

    Raises:
        ValueError: When the environment resets later than in the same step: a row's users would be mixed up.
    """
    if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
        raise ValueError("learning a bandit needs an environment with autoreset_mode='SameStep'; make it with that")
    generator = torch_generator(seed, "bandit", "action")
    obs, infos = env.reset(seed=stream(seed, "bandit", "env"))
    num_strategies = int(env.single_action_space.n)
    steps = math.ceil(requests / env.num_envs)
    for _ in range(steps):
        rows = torch.as_tensor(obs, dtype=torch.float32)
        mask = torch.ones(len(rows), num_strategies, dtype=torch.bool, device=rows.device)
        if "action_mask" in infos:
            mask = torch.as_tensor(infos["action_mask"], device=rows.device).to(torch.bool)
        # drawn on the CPU whatever the environment's device, so that both see the same draws
        draw = torch.rand(len(rows), generator=generator).to(rows.device)
        action = sample_actions(choose(rows, mask), draw)
        obs, reward, terminated, truncated, infos = env.step(action if isinstance(obs, Tensor) else action.numpy())
        done = torch.as_tensor(terminated, device=rows.device) | torch.as_tensor(truncated, device=rows.device)
        learn(rows, action, torch.as_tensor(reward, dtype=torch.float32, device=rows.device), done)
    served: int = steps * int(env.num_envs)
    return served


class Saved:
    """A bandit that can be written to a file: constructor settings, what was learned, and what is known of its rows."""

    KINDS: ClassVar[dict[str, type[Saved]]] = {}
    """Classes by name, for `load_bandit`."""
    LEARNED: ClassVar[tuple[str, ...]] = ()
    """Tensors that learning from training users left."""
    ROWS: ClassVar[tuple[str, ...]] = ()
    """Tensors that `begin` makes and `observe` changes."""
    settings: dict[str, Any]
    """Keyword arguments of the constructor."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Saved.KINDS[cls.__name__] = cls

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Forgets every row."""
        raise NotImplementedError

    def save(self, path: str | Path, *, rows: bool = False) -> Path:
        """Writes one safetensors file (tensors and a JSON header, no pickle), atomically; returns its path.

        Args:
            path: File to write.
            rows: Keep what is known of the present rows too, so that a loaded bandit goes on with them.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = self.LEARNED + (self.ROWS if rows else ())
        # clones: safetensors refuses tensors that share memory
        tensors = {name: torch.as_tensor(getattr(self, name)).detach().cpu().contiguous().clone() for name in names}
        header = {
            "schema": str(BANDIT_SCHEMA),
            "bandit": type(self).__name__,
            "settings": json.dumps(self.settings, sort_keys=True),
            "rows": json.dumps(rows),
        }
        partial = path.with_name(path.name + ".partial")
        # a bandit without tensors still needs one: safetensors files without any are not read everywhere
        save_file(tensors or {"empty": torch.zeros(1)}, str(partial), metadata=header)
        os.replace(partial, path)
        return path

    def _loaded(self) -> None:
        """Derives what is not stored."""


def load_bandit(path: str | Path) -> Any:
    """Reads a saved bandit.

    Args:
        path: A file that `save` wrote.

    Returns:
        The bandit, on the CPU; without stored rows it waits for `begin`.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file holds no bandit, one of a newer schema, or a damaged one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no bandit at {path}; learn one and write it with its save()")
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if header.get("bandit") not in Saved.KINDS:
        raise ValueError(f"{path} holds {header.get('bandit', 'no bandit')!r}, expected one of {sorted(Saved.KINDS)}")
    if int(header["schema"]) > BANDIT_SCHEMA:
        raise ValueError(
            f"{path} has bandit schema {header['schema']}, this code reads up to {BANDIT_SCHEMA}; update it"
        )
    cls = Saved.KINDS[header["bandit"]]
    bandit = cls(**json.loads(header["settings"]))
    with_rows = bool(json.loads(header["rows"]))
    names = cls.LEARNED + (cls.ROWS if with_rows else ())
    missing = sorted(set(names) - set(tensors))
    if missing:
        raise ValueError(f"{path} lacks the tensors {missing} of a {cls.__name__}; write it again")
    for name in cls.LEARNED:
        setattr(bandit, name, tensors[name])
    bandit._loaded()
    bandit.begin(0)
    if with_rows:
        for name in cls.ROWS:
            setattr(bandit, name, tensors[name])
    return bandit


class Learner(Saved):
    """Base of the bandits that learn from training users by playing with their own choices."""

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Strategy probabilities."""
        raise NotImplementedError

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Adds the requests that were served."""
        raise NotImplementedError

    def learn(self, env: Any, requests: int, *, seed: int) -> Self:
        """Plays `requests` requests of training users, choosing by its own rule and updating after each step.

        Args:
            env: A same-step vector environment, numpy or torch.
            requests: How many; rounded up to whole steps of the environment.
            seed: Of the environment and of ties.
        """
        play(
            env,
            requests,
            seed,
            self.action_probs,
            lambda obs, action, reward, done: self.observe(obs, action, reward, torch.ones_like(done)),
        )
        return self
