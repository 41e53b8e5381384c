"""Who sits in each row, and the key of all draws of a row's episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metarec_gym.envs.user_state import EnvTables
from metarec_gym.seeding import fold_in, mix, uniform

_START_DRAW, _EPISODE_DRAW, _NOISE_DRAW = 1, 2, 3


@dataclass(frozen=True, eq=False)
class Episodes:
    """Seeds and episode numbers of the rows, padding rows included."""

    row_seed: Tensor
    """int64 (rows,)."""
    env_key: Tensor
    """int64 (1,): of the environment's seed; draws of rows with `noise` hang on it."""
    episode: Tensor
    """int64 (rows,)."""

    def seeded(self, seeds: Sequence[int], mask: Tensor) -> Episodes:
        """New seeds (integers in [0, 2**63), padding rows included) and episode 0 in the rows of `mask`."""
        values = torch.tensor(seeds, dtype=torch.int64, device=self.row_seed.device)
        return Episodes(torch.where(mask, values, self.row_seed), mix(values[:1]), torch.where(mask, 0, self.episode))

    def next(self, mask: Tensor) -> Episodes:
        """The rows of `mask` go on to their next episode."""
        return replace(self, episode=self.episode + mask)

    def draw(self, tables: EnvTables, start: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Start states (rows of the tables) and draw keys of the episodes; int64 (rows,) both.

        Args:
            tables: The fold's tables.
            start: Given start states; None draws them.
            noise: Rows with equal start state, noise and environment seed get equal keys; None keys by row and episode.
        """
        key = mix(self.row_seed)
        if start is None:
            draw = uniform(fold_in(fold_in(key, _START_DRAW), self.episode)).to(torch.float64)
            start = (draw * len(tables.user)).to(torch.int64)
        user = tables.user[start]
        if noise is None:
            return start, fold_in(fold_in(fold_in(key, _EPISODE_DRAW), user), self.episode)
        return start, fold_in(fold_in(fold_in(self.env_key, _NOISE_DRAW), user), noise)


def row_seeds(seed: int | Sequence[int | None], num_envs: int, rows: int, generator: Any) -> list[int]:
    """Seed of every row in [0, 2**63): `seed + i`, or each row's own of a list; None entries are drawn from `generator`.

    Args:
        seed: What `reset` was given.
        num_envs: Rows that exist.
        rows: Rows with the padding.
        generator: A numpy generator.

    Raises:
        ValueError: When a list has not `num_envs` entries.
    """
    if isinstance(seed, int):
        # Python integers of any size: reduce before the signed 64-bit tensor sees them
        return [(seed + i) % 2**63 for i in range(rows)]
    if len(seed) != num_envs:
        raise ValueError(f"seed has {len(seed)} entries, expected {num_envs}")
    drawn = [int(generator.integers(2**62)) if s is None else int(s) % 2**63 for s in seed]
    return drawn + [0] * (rows - num_envs)


def row_mask(given: Any, num_envs: int, rows: int, device: torch.device) -> Tensor:
    """`options["reset_mask"]` as bool (rows,), padding False; None = every row.

    Raises:
        ValueError: When it is not bool (num_envs,).
    """
    if given is None:
        return torch.ones(rows, dtype=torch.bool, device=device)
    mask = torch.as_tensor(given, device=device)
    if mask.shape != (num_envs,) or mask.dtype != torch.bool:
        raise ValueError(
            f"reset_mask has shape {tuple(mask.shape)} and dtype {mask.dtype}, expected bool ({num_envs},)"
        )
    return torch.cat([mask, mask.new_zeros(rows - num_envs)])


def pinned(given: Any, name: str, num_envs: int, rows: int, device: torch.device) -> Tensor | None:
    """A whole number for every row out of `options`, the padding filled with the first; int64 (rows,).

    Raises:
        ValueError: When it does not have `num_envs` entries.
    """
    if given is None:
        return None
    value = torch.as_tensor(given, device=device).to(torch.int64)
    if value.shape != (num_envs,):
        raise ValueError(f"options[{name!r}] has shape {tuple(value.shape)}, expected ({num_envs},)")
    return torch.cat([value, value[:1].expand(rows - num_envs)])


def start_rows(tables: EnvTables, given: Tensor | None, fold: str) -> Tensor | None:
    """Rows of the tables for `options["start_state"]`, indices into the world's start states; int64 (rows,).

    Raises:
        ValueError: When one is out of range or of the other fold.
    """
    if given is None:
        return None
    count = tables.start_row.shape[0]
    if bool(((given < 0) | (given >= count)).any()):
        raise ValueError(f"options['start_state'] must lie in 0..{count - 1}, the world's start states")
    rows = tables.start_row[given]
    if bool((rows < 0).any()):
        raise ValueError(
            f"options['start_state'] names start states of the other fold; this environment simulates fold {fold}: see "
            f"World.starts_of({fold!r})"
        )
    return rows
