"""What every strategy is: fitted once on the users of fold S, frozen into buffers, then scoring histories in batches.

A strategy never sees a user id. Two users with the same history get the same scores, whoever they are; a strategy that
knew the user (trained user factors) would know that user's future as well.

Histories everywhere: int64 (batch, H), the newest item last, padded with -1 on the left; H may be 0.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor

from metarec_gym import seeding

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from metarec_gym.data.dataset import Dataset

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

REFERENCE_LENGTH = 50
"""Items in the history of the request that `Cost` describes."""
_TIMED_ROWS = 64
_TIMED_REPEATS = 3


@dataclass(frozen=True)
class Cost:
    """What one request (one user with `REFERENCE_LENGTH` items of history) costs."""

    flops: float
    """Floating-point operations, counted on paper: the same on every machine."""
    seconds: float
    """Wall time on the device that the strategy is on, measured in batches of 64 users."""
    money: float = 0.0
    """What an outside service charges for it, in the currency of the prices that the strategy was given."""


@dataclass(frozen=True)
class FitRows:
    """The engaged events that a strategy may learn from: those of the given users and no others.

    Rows are sorted by (user, time). Users are renumbered 0..n_users-1: their identity is of no use to a strategy.
    """

    user: Tensor
    """int64 (n_rows,)."""
    item: Tensor
    """int64 (n_rows,)."""
    time: Tensor
    """float64 (n_rows,), unix seconds."""
    n_users: int
    n_items: int
    device: torch.device | str = "cpu"
    """Where a fit may compute; the rows themselves are on the CPU, where libraries want them."""

    @classmethod
    def of(cls, dataset: Dataset, users: Tensor, device: torch.device | str = "cpu") -> FitRows:
        """The rows of `users` (int64) whose gate outcome is positive.

        Raises:
            ValueError: When those users engaged with nothing.
        """
        rows = dataset.rows_of(users)
        rows = rows[dataset.outcome[rows, 0] > 0]
        if rows.numel() == 0:
            raise ValueError(
                f"the {users.numel()} users given to fit have no engaged event (outcome {dataset.outcomes[0]!r} > 0); "
                "strategies need at least one: give more users or check the outcome columns of the log"
            )
        distinct, user = torch.unique(dataset.user[rows], return_inverse=True)
        n_users = int(distinct.numel())
        return cls(user, dataset.item[rows], dataset.time[rows], n_users, dataset.n_items, device)

    def counts(self) -> Tensor:
        """Engaged events per item, int64 (n_items,)."""
        return torch.bincount(self.item, minlength=self.n_items)

    def matrix(self) -> csr_matrix:
        """Binary user x item matrix, float32 (n_users, n_items): a repeated item counts once."""
        import numpy as np
        from scipy.sparse import csr_matrix

        ones = np.ones(self.item.numel(), dtype=np.float32)
        matrix = csr_matrix((ones, (self.user.numpy(), self.item.numpy())), shape=(self.n_users, self.n_items))
        matrix.sum_duplicates()
        matrix.data[:] = 1.0
        return matrix


def keep_on_the_right(histories: Tensor, keep: Tensor) -> Tensor:
    """Drops the entries where `keep` (bool, same shape) is False, order kept, padding left; int64 (batch, H')."""
    order = keep.to(torch.int8).argsort(dim=1, stable=True)
    packed = torch.where(keep, histories, -1).gather(1, order)
    longest = int(keep.sum(dim=1).max()) if keep.numel() else 0
    return packed[:, packed.shape[1] - longest :]


def recency_weights(histories: Tensor, half_life_items: float | None) -> Tensor:
    """Weight 0.5 ** (k / half_life_items) of the k-th newest item, 0 on padding; float32 (batch, H).

    The newest item has k = 0; with `half_life_items=None` every item weighs 1.
    """
    known = (histories >= 0).to(torch.float32)
    if half_life_items is None:
        return known
    age = torch.arange(histories.shape[1] - 1, -1, -1, device=histories.device, dtype=torch.float32)
    return known * torch.pow(0.5, age / half_life_items)


def spread(histories: Tensor, values: Tensor, n_items: int) -> Tensor:
    """Sums `values` (float32, same shape as `histories`) into the columns of the items; float32 (batch, n_items)."""
    # the padding goes to a column of its own, which is cut off
    column = torch.where(histories >= 0, histories, n_items)
    out = torch.zeros(histories.shape[0], n_items + 1, device=histories.device)
    return out.scatter_add_(1, column, values)[:, :n_items]


def sum_of_rows(histories: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """Sums the rows of `table` (float32 (n_items, d)) that belong to the items, each times its value; (batch, d).

    The cost grows with the items that are there, whatever the padding and the catalogue; a row of the result does not
    depend on the other rows.
    """
    known = histories >= 0
    count = known.sum(dim=1)
    return torch.nn.functional.embedding_bag(
        histories[known], table, count.cumsum(0) - count, mode="sum", per_sample_weights=values[known]
    )


class Strategy(torch.nn.Module, ABC):
    """A recommender as an action: a family (`kind`), frozen buffers, and `score`.

    A subclass fills in `_fit`, `_score`, `_flops` and, if its constructor takes more than a name, `_settings`; see also
    `metarec_gym.recommenders.registry`. Tensors that `_score` reads are registered buffers, so that they move with the strategy.
    What all families share stands here, once: history items that fold S never met are dropped (no strategy knows anything of
    them), a user without a usable history is served the most popular items, and items that fold S never met come last.

    Args:
        name: Name in the pool.
    """

    kind: ClassVar[str]
    """Family: non_personal, neighbours, factorization, sequential, content, hybrid, precomputed, library, language_model,
    or a word of your own."""
    personal: ClassVar[bool] = True
    """Whether users without a usable history need a stand-in, the most popular items; False where the history changes nothing
    or the strategy has an answer of its own for them."""
    knows_unseen_items: ClassVar[bool] = False
    """Whether items that fold S never met have meaningful scores (from their text, or from outside)."""

    popularity: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("popularity", torch.zeros(0))
        self._seconds: dict[str, float] = {}
        self.register_load_state_dict_pre_hook(_make_room)  # type: ignore[no-untyped-call]

    @property
    def n_items(self) -> int:
        """Items in the catalogue; 0 before `fit`."""
        return int(self.popularity.numel())

    def fit(self, dataset: Dataset, users: Tensor, *, seed: int, device: torch.device | str = "cpu") -> Self:
        """Learns from the engaged events of `users` alone and freezes what was learned into buffers.

        Args:
            dataset: The encoded log.
            users: int64 (n,), the users of fold S.
            seed: All randomness of the fit comes from it; draws are made on the CPU, so they are the same on every device.
            device: Where strategies that learn with torch compute; those of a library compute where the library does.

        Returns:
            self, on the CPU.
        """
        rows = FitRows.of(dataset, users, device)
        counts = rows.counts().to(torch.float32)
        self.to("cpu")
        self.popularity = counts / counts.max()
        self._seconds = {}
        self._fit(rows, dataset, seeding.stream(seed, "strategy", self.name))
        return self.eval()

    @torch.no_grad()
    def score(self, histories: Tensor) -> Tensor:
        """Scores of all items for a batch of users known by their history alone.

        Args:
            histories: int64 (batch, H), newest last, -1 on the left.

        Returns:
            float32 (batch, n_items), finite, higher is better; consumed items are not masked yet.

        Raises:
            RuntimeError: Before `fit` or `load_state_dict`.
        """
        if self.n_items == 0:
            raise RuntimeError(f"strategy {self.name!r} has not been fitted; call fit(dataset, users, seed=...) first")
        if histories.ndim != 2 or histories.dtype != torch.int64:
            raise ValueError(
                f"histories are int64 (batch, H), came {histories.dtype} {tuple(histories.shape)}; "
                "make them with Dataset.histories"
            )
        keep = histories >= 0
        if not self.knows_unseen_items:
            keep &= self.popularity[histories.clamp(min=0)] > 0
        usable = keep_on_the_right(histories, keep)
        if usable.shape[1] == 0:
            # one column at least, so that `histories[:, -1]` is safe in every subclass
            usable = torch.nn.functional.pad(usable, (1, 0), value=-1)
        scores = self._score(usable)
        if self.personal:
            scores = torch.where((usable >= 0).any(dim=1, keepdim=True), scores, self.popularity)
        if not self.knows_unseen_items:
            scores = torch.where(self.popularity > 0, scores, scores.amin(dim=1, keepdim=True) - 1.0)
        return scores

    @torch.no_grad()
    def cost(self) -> Cost:
        """Cost of one request; seconds are measured once per device, on made-up histories."""
        device = str(self.popularity.device)
        if device not in self._seconds:
            # odd multiplier: rows differ, and the histories are the same on every machine
            grid = torch.arange(_TIMED_ROWS * REFERENCE_LENGTH, device=device).view(_TIMED_ROWS, REFERENCE_LENGTH)
            histories = (grid * 7919) % self.n_items
            self.score(histories)
            times = []
            for _ in range(_TIMED_REPEATS):
                _wait(device)
                begin = time.perf_counter()
                self.score(histories)
                _wait(device)
                times.append(time.perf_counter() - begin)
            self._seconds[device] = min(times) / _TIMED_ROWS
        return Cost(flops=float(self._flops()), seconds=self._seconds[device])

    def describe(self) -> dict[str, JSON]:
        """Class, name and settings: what `metarec_gym.recommenders.registry.rebuild` needs besides the state dict."""
        settings: dict[str, JSON] = {"name": self.name, **self._settings()}
        return {"class": class_path(type(self)), "kind": self.kind, "settings": settings}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """An empty strategy with the settings of `describe`; a class with settings that a file must not decide checks them."""
        return cls(**settings)

    def fingerprint(self) -> str:
        """Hash of all that decides a fit besides log, users and seed; 16 hexadecimal digits.

        Description, inputs (`_inputs`), and the source of a class from outside this package: a world that was built with
        other code or another file is not taken for this one.
        """
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode())
        if ":" in class_path(type(self)):
            try:
                digest.update(inspect.getsource(inspect.getmodule(type(self)) or type(self)).encode())
            except (OSError, TypeError):
                # typed into an interpreter: no file to read
                digest.update(b"no source")
        for part in self._inputs():
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()[:16]

    def report(self) -> dict[str, JSON]:
        """What a reader of the world should know of the fit or of the serving: left-out rows, failures; often nothing."""
        return {}

    @abstractmethod
    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        """Fills the buffers from `rows`, with tensors of the CPU; `rows.device` is where it may compute.

        Of `dataset` only item tables may be used, never its events.
        """

    @abstractmethod
    def _score(self, histories: Tensor) -> Tensor:
        """Scores (batch, n_items) of known items; the row of an empty history may hold any finite numbers.

        `histories` is int64 (batch, H) with H >= 1, newest last, -1 on the left.
        """

    @abstractmethod
    def _flops(self) -> float:
        """Operations of one request with `REFERENCE_LENGTH` items of history."""

    def _settings(self) -> dict[str, JSON]:
        """Constructor arguments besides the name."""
        return {}

    def _inputs(self) -> Iterable[bytes]:
        """Contents that a fit reads besides the log: files, tables, models."""
        return ()


def class_path(cls: type[Strategy]) -> str:
    """How a saved pool names a class: bare for those of this package, `module:Class` for all others."""
    own = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    return cls.__qualname__ if own else f"{cls.__module__}:{cls.__qualname__}"


def _make_room(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Gives the empty buffers of an unfitted strategy the shapes of the state about to be loaded."""
    for key, buffer in module._buffers.items():
        stored = state_dict.get(prefix + key)
        if buffer is not None and stored is not None and stored.shape != buffer.shape:
            module._buffers[key] = torch.empty_like(stored, device=buffer.device)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def best_items(scores: Tensor, excluded: Tensor, length: int) -> Tensor:
    """The best `length` items of each row, ties to the lower item index.

    Args:
        scores: float32 (batch, n_items), finite.
        excluded: int64 (batch, H), items that may not appear; -1 is ignored.
        length: Items wanted.

    Returns:
        int64 (batch, length), best first, -1 where the catalogue ran out.
    """
    n_items = scores.shape[1]
    # IEEE floats order like integers once the negative ones are flipped (+ 0.0 turns -0.0 into 0.0); with the item in
    # the low half every key is distinct, so there are no ties to break and every device answers alike
    bits = (scores + 0.0).contiguous().view(torch.int32)
    keys = torch.empty(scores.shape[0], n_items + 1, dtype=torch.int64, device=scores.device)
    keys[:, :n_items] = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys[:, :n_items].mul_(2**32).add_(torch.arange(n_items - 1, -1, -1, device=scores.device))
    lowest = torch.iinfo(torch.int64).min
    # the padding's column is nobody's
    keys[:, n_items] = lowest
    keys.scatter_(1, torch.where(excluded >= 0, excluded, n_items), lowest)
    size = min(length, n_items)
    if scores.device.type == "cpu":
        # numpy parts whole numbers several times as fast as torch's topk picks them
        own = keys.numpy()
        own.partition(n_items + 1 - size, axis=1)
        best = keys[:, n_items + 1 - size :].sort(dim=1, descending=True).values
    else:
        best = keys.topk(size, dim=1).values
    lists = torch.where(best > lowest, n_items - 1 - (best & 0xFFFFFFFF), -1)
    return torch.nn.functional.pad(lists, (0, length - size), value=-1)
