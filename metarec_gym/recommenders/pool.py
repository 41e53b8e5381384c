"""The pool: the ordered strategies among which an action chooses, ranked for thousands of users at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metarec_gym.recommenders.base import JSON, Cost, Strategy, best_items
from metarec_gym.recommenders.hybrid import Reranker, bind_all
from metarec_gym.recommenders.registry import DEFAULT_POOL, make_strategy, rebuild

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

POOL_SCHEMA = 1
_ELEMENTS_PER_CHUNK = 2**21
"""Scores (rows x items) in flight at a time: some tens of MB with the keys that ranking makes of them."""
_ROWS_PER_MATMUL = 16


class Pool:
    """Fitted strategies in a fixed order; the place of a strategy is its action index.

    Args:
        strategies: Fitted on the same catalogue, with distinct names.
    """

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        names = [strategy.name for strategy in strategies]
        if not strategies or len(set(names)) != len(names) or any("/" in name for name in names):
            raise ValueError(f"a pool has one strategy or more, with distinct names without '/'; came {names}")
        sizes = {strategy.name: strategy.n_items for strategy in strategies}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise ValueError(f"the strategies of a pool are fitted on one catalogue; items known to each: {sizes}")
        self.strategies = tuple(strategies)
        self.names = tuple(names)
        # bases before re-rankers
        self._order = tuple(bind_all(self.strategies))

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        users: Tensor,
        *,
        seed: int,
        names: Sequence[str | Strategy] = DEFAULT_POOL,
        progress: bool = False,
        device: torch.device | str = "cpu",
    ) -> Pool:
        """Fits every strategy on the events of `users` and of nobody else.

        Args:
            dataset: The encoded log.
            users: int64 (n,), the users of fold S.
            seed: Each strategy draws from a stream of its own, so adding one changes no other.
            names: Names of `STRATEGIES`, other words that `make_strategy` reads, or strategies of your own (other settings,
                `Precomputed`, your own class).
            progress: Show a bar.
            device: Where strategies that learn with torch compute.

        Returns:
            The pool, on the CPU.
        """
        from tqdm import tqdm

        strategies = [make_strategy(name) for name in names]
        bind_all(strategies)
        # a strategy of your own may have a `fit` that knows no device
        where = {} if str(device) == "cpu" else {"device": device}
        with tqdm(total=len(strategies), desc="strategies", unit="strategy", disable=not progress) as bar:
            for strategy in strategies:
                bar.set_postfix_str(strategy.name)
                strategy.fit(dataset, users, seed=seed, **where)
                bar.update()
        return cls(strategies)

    @property
    def n_items(self) -> int:
        """Items in the catalogue."""
        return self.strategies[0].n_items

    @property
    def device(self) -> torch.device:
        """Where the strategies are."""
        return self.strategies[0].popularity.device

    def __len__(self) -> int:
        """Number of strategies, K."""
        return len(self.strategies)

    def __iter__(self) -> Iterator[Strategy]:
        """The strategies in the order of their action indices."""
        return iter(self.strategies)

    def __getitem__(self, name: str) -> Strategy:
        """The strategy called `name`."""
        if name not in self.names:
            raise KeyError(f"no strategy {name!r} in this pool; it has {list(self.names)}")
        return self.strategies[self.names.index(name)]

    def to(self, device: torch.device | str) -> Pool:
        """Moves every strategy to `device`; returns self."""
        for strategy in self.strategies:
            strategy.to(device)
        return self

    def costs(self) -> dict[str, Cost]:
        """Cost of one request of each strategy, in the order of the pool."""
        return {strategy.name: strategy.cost() for strategy in self.strategies}

    def top_lists(self, histories: Tensor, length: int, *, exclude: Tensor | None = None) -> Tensor:
        """What every strategy would show to every user; the lists of `ranked`."""
        return self._lists(histories, length, exclude, None)

    def ranked(self, histories: Tensor, length: int, *, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What every strategy would show to every user, without what the user has consumed, and how sure it is of it.

        Args:
            histories: int64 (batch, H), newest last, -1 on the left; on any device.
            length: Items in a list.
            exclude: bool (batch, n_items), further items that no list may hold; None = none.

        Returns:
            Lists, int64 (batch, K, length) on the device of `histories`: best first, ties to the lower item index, -1
            where the catalogue ran out; and their standard scores, float16 (batch, K, length): a strategy's score of the
            item, less the mean and over the standard deviation of its scores of all items that could be listed for the
            user (0 where they are all equal, and where there is no item).
        """
        scores = torch.zeros(len(histories), len(self), max(length, 0), dtype=torch.float16, device=histories.device)
        return self._lists(histories, length, exclude, scores), scores

    @torch.no_grad()
    def _lists(self, histories: Tensor, length: int, exclude: Tensor | None, scores: Tensor | None) -> Tensor:
        """The lists of `ranked`; standard scores are written into `scores` (float16 (batch, K, length)) if it is given."""
        if length < 1:
            raise ValueError(f"length is 1 or more, came {length}")
        if exclude is not None and (exclude.shape != (len(histories), self.n_items) or exclude.dtype != torch.bool):
            raise ValueError(
                f"exclude is bool ({len(histories)}, {self.n_items}), one row a history and one column an item; came "
                f"{exclude.dtype} {tuple(exclude.shape)}"
            )
        lists = histories.new_full((histories.shape[0], len(self), length), -1)
        # sums over the items of a history: bounded in rows x items and in rows x history
        widest = max(self.n_items, 64 * histories.shape[1], 1)
        rows = max(_ROWS_PER_MATMUL, _ELEMENTS_PER_CHUNK // widest // _ROWS_PER_MATMUL * _ROWS_PER_MATMUL)
        for begin in range(0, histories.shape[0], rows):
            chunk = histories[begin : begin + rows].to(self.device)
            n_rows = chunk.shape[0]
            # whole multiples of 16 rows: a matrix product of fewer rows may round differently
            chunk = torch.nn.functional.pad(chunk, (0, 0, 0, -n_rows % _ROWS_PER_MATMUL), value=-1)
            mask = None if exclude is None else exclude[begin : begin + rows].to(self.device)
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, 0, 0, -n_rows % _ROWS_PER_MATMUL))
            into = None if scores is None else scores[begin : begin + n_rows]
            lists[begin : begin + n_rows] = self._rank(chunk, length, mask, into)[:n_rows].to(histories.device)
        return lists

    def _rank(self, histories: Tensor, length: int, exclude: Tensor | None, scores: Tensor | None) -> Tensor:
        depth = dict.fromkeys(self.names, length)
        for strategy in self.strategies:
            if isinstance(strategy, Reranker):
                depth |= {base: max(depth[base], strategy.depth) for base in strategy.bases}
        ranked: dict[str, Tensor] = {}
        candidate = None if scores is None else _candidates(histories, self.n_items, exclude)
        for strategy in self._order:
            if isinstance(strategy, Reranker):
                score = strategy.rerank(histories, [ranked[base][:, : strategy.depth] for base in strategy.bases])
            else:
                score = strategy.score(histories)
            ranked[strategy.name] = _best_allowed(score, histories, depth[strategy.name], exclude)
            if scores is not None and candidate is not None:
                standard = standard_scores(score, candidate, ranked[strategy.name][:, :length])
                scores[:, self.names.index(strategy.name)] = standard[: len(scores)].to(scores.device)
        return torch.stack([ranked[name][:, :length] for name in self.names], dim=1)

    def save(self, folder: str | Path) -> Path:
        """Writes `strategies.safetensors` and `strategies.json` into `folder`, each atomically; no pickle.

        Two saves of equal pools are equal byte by byte: measured seconds are not stored.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{strategy.name}/{key}": value.detach().cpu().clone().contiguous()
            for strategy in self.strategies
            for key, value in strategy.state_dict().items()
        }
        description: dict[str, JSON] = {
            "schema": POOL_SCHEMA,
            "strategies": [strategy.describe() for strategy in self.strategies],
        }
        save_file(tensors, str(folder / "strategies.safetensors.partial"))
        (folder / "strategies.json.partial").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        for file in ("strategies.safetensors", "strategies.json"):
            os.replace(folder / f"{file}.partial", folder / file)
        return folder

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", *, given: Sequence[Strategy] = ()) -> Pool:
        """Reads a saved pool onto `device`.

        Args:
            folder: Where `save` wrote.
            device: Where the strategies go.
            given: Strategies of your own making that take the saved state of the same name, instead of being made from the
                saved settings: for what a file does not hold, such as whom a language model is asked.

        Raises:
            FileNotFoundError: When the folder holds no pool.
            ValueError: When it comes from a newer schema, or holds a class of somebody's own that is not registered here (see
                `register_strategy`).
        """
        folder = Path(folder)
        for file in ("strategies.json", "strategies.safetensors"):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"no {file} in {folder}; build a world: python -m experiments.build_world")
        description = json.loads((folder / "strategies.json").read_text(encoding="utf-8"))
        if description["schema"] > POOL_SCHEMA:
            raise ValueError(
                f"{folder} has pool schema {description['schema']}, this metarec_gym reads up to {POOL_SCHEMA}; "
                "upgrade metarec_gym"
            )
        tensors = load_file(str(folder / "strategies.safetensors"), device=str(device))
        ready = {strategy.name: strategy for strategy in given}
        strategies = []
        for entry in description["strategies"]:
            name = entry["settings"]["name"]
            strategy = (ready[name] if name in ready else rebuild(entry)).to(device)
            prefix = f"{strategy.name}/"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            strategy.load_state_dict(state)
            strategies.append(strategy.eval())
        return cls(strategies)


def _best_allowed(scores: Tensor, histories: Tensor, length: int, exclude: Tensor | None) -> Tensor:
    """`best_items` without the items of `exclude` (bool (batch, n_items)) either."""
    if exclude is None:
        return best_items(scores, histories, length)
    # scores are finite, so excluded items come last and are cut off there
    lists = best_items(scores.masked_fill(exclude, -torch.inf), histories, length)
    barred = (lists >= 0) & exclude.gather(1, lists.clamp(min=0))
    return torch.where(barred, -1, lists)


def _candidates(histories: Tensor, n_items: int, exclude: Tensor | None) -> Tensor:
    """Items that a list may hold: not in the history, not excluded; bool (batch, n_items)."""
    allowed = torch.ones(histories.shape[0], n_items + 1, dtype=torch.bool, device=histories.device)
    allowed.scatter_(1, torch.where(histories < 0, n_items, histories), False)
    return allowed[:, :n_items] if exclude is None else allowed[:, :n_items] & ~exclude


def standard_scores(scores: Tensor, candidate: Tensor, lists: Tensor) -> Tensor:
    """Scores of the listed items in standard deviations from the mean over the candidates.

    Args:
        scores: float32 (batch, n_items), finite.
        candidate: bool (batch, n_items), the items that mean and deviation are taken over.
        lists: int64 (batch, length), -1 where there is no item.

    Returns:
        float16 (batch, length); 0 where all candidates score alike, and where there is no item.
    """
    # float64 and then few bits: the order of a sum is not seen in the result
    value = scores.to(torch.float64)
    count = candidate.sum(dim=1, keepdim=True).clamp(min=1)
    mean = torch.where(candidate, value, 0.0).sum(dim=1, keepdim=True) / count
    variance = torch.where(candidate, (value - mean) ** 2, 0.0).sum(dim=1, keepdim=True) / count
    found = value.gather(1, lists.clamp(min=0)) - mean
    equal = variance <= 1e-12 * (1.0 + mean**2)
    z = torch.where(equal | (lists < 0), 0.0, found / variance.clamp(min=1e-300).sqrt())
    return z.clamp(-1e4, 1e4).to(torch.float16)
