"""Lists that another system computed, served as a strategy: nothing of that system needs to be installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from metarec_gym.recommenders.base import JSON, FitRows
from metarec_gym.recommenders.neighbours import NeighbourStrategy, neighbour_table

if TYPE_CHECKING:
    import pandas as pd

    from metarec_gym.data.dataset import Dataset


class Precomputed(NeighbourStrategy):
    """Scores from a Parquet file of item-to-item lists, of one list for everybody, or of both.

    | file | columns | meaning |
    |---|---|---|
    | `neighbours` | `item_id`, `neighbour_id`, `score` | after `item_id`, `neighbour_id` is worth `score` > 0 |
    | `ranking` | `item_id`, `score` | worth to everybody; larger is better |

    Ids are the log's own ids; rows of items that the log does not have are left out and counted in `ignored_rows`. A
    user is scored by the neighbours of the last items of the history; items that none of them names follow in the order
    of `ranking` (or of popularity). Lists keyed by user are refused on purpose: a simulated user's history is not the
    one that such a list was made for. A sequence model can be brought in as the list it ranks after each item.

    Args:
        name: Name in the pool.
        neighbours: Parquet file or data frame of item-to-item lists.
        ranking: Parquet file or data frame of one list.
        last_items: How many of the newest items speak; None lets all of them.
        half_life_items: The k-th newest item weighs 0.5 ** (k / half_life_items); None weighs all alike.
        flops: What one request costs in the other system; None counts our look-up alone.
    """

    kind: ClassVar[str] = "precomputed"
    # users without history are served `ranking`
    personal: ClassVar[bool] = False
    knows_unseen_items: ClassVar[bool] = True
    rank_score: Tensor

    def __init__(
        self,
        name: str = "precomputed",
        neighbours: str | Path | pd.DataFrame | None = None,
        ranking: str | Path | pd.DataFrame | None = None,
        last_items: int | None = 20,
        half_life_items: float | None = 5.0,
        flops: float | None = None,
    ) -> None:
        super().__init__(name, last_items, half_life_items)
        self._neighbours = neighbours
        self._ranking = ranking
        self.flops = flops
        self.ignored_rows = 0
        # (n_items,) in [-1, 0], the order of the items that no neighbour list names
        self.register_buffer("rank_score", torch.zeros(0))

    @classmethod
    def from_file(cls, file: str | Path, name: str = "precomputed") -> Self:
        """The strategy in one Parquet file: item-to-item lists if it has a column `neighbour_id`, else one list for all.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When it is not a Parquet file, or its lists are keyed by user.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(file).is_file():
            raise FileNotFoundError(f"strategy {name!r} expects a Parquet file at {file}; there is none")
        try:
            columns = pq.read_schema(file).names
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"strategy {name!r} expects a Parquet file at {file}; it cannot be read: {error}"
            ) from error
        if "user_id" in columns:
            raise ValueError(
                f"{file} holds lists keyed by user: a simulated user's history is not the one that they were made for; export "
                "what the system lists after each item (item_id, neighbour_id, score), or one list (item_id, score)"
            )
        return cls(name, neighbours=file) if "neighbour_id" in columns else cls(name, ranking=file)

    def report(self) -> dict[str, JSON]:
        """Rows of items that the log does not have."""
        return {"ignored_rows": self.ignored_rows} if self.ignored_rows else {}

    def _inputs(self) -> Iterator[bytes]:
        import pandas as pd

        from metarec_gym.data.storage import content_hash, file_sha256

        for source in (self._neighbours, self._ranking):
            if isinstance(source, pd.DataFrame):
                yield content_hash({"table": source}, {}).encode()
            elif source is not None and Path(source).is_file():
                yield file_sha256(Path(source)).encode()
            else:
                yield b""

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        if self._neighbours is None and self._ranking is None:
            raise ValueError(f"strategy {self.name!r} has no file; give neighbours=, ranking= or both")
        self.ignored_rows = 0
        index = {item_id: number for number, item_id in enumerate(dataset.item_ids.tolist())}
        self.neighbour, self.similarity = neighbour_table(*self._pairs(index), rows.n_items)
        if self._ranking is None:
            self.rank_score = self.popularity - 1.0
        else:
            self.rank_score = self._ranked(index, rows.n_items)

    def _pairs(self, index: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
        if self._neighbours is None:
            empty = torch.zeros(0, dtype=torch.int64)
            return empty, empty, torch.zeros(0)
        table = self._read(self._neighbours, ("item_id", "neighbour_id", "score"), index)
        score = torch.from_numpy(table["score"].to_numpy("float32", copy=True))
        if bool((score <= 0).any()):
            raise ValueError(f"strategy {self.name!r}: neighbour scores are positive; shift them or drop those rows")
        return (
            torch.from_numpy(table["item_id"].to_numpy("int64", copy=True)),
            torch.from_numpy(table["neighbour_id"].to_numpy("int64", copy=True)),
            score,
        )

    def _ranked(self, index: dict[str, int], n_items: int) -> Tensor:
        table = self._read(self._ranking, ("item_id", "score"), index)
        score = torch.from_numpy(table["score"].to_numpy("float64", copy=True))
        item = torch.from_numpy(table["item_id"].to_numpy("int64", copy=True))
        # places instead of scores: any scale fits between -1 and 0, and the items outside the list come last
        place = torch.full((n_items,), float(n_items), dtype=torch.float64)
        place[item[score.argsort(descending=True, stable=True)]] = torch.arange(item.numel(), dtype=torch.float64)
        return (-place / n_items).to(torch.float32)

    def _read(self, source: Any, columns: tuple[str, ...], index: dict[str, int]) -> pd.DataFrame:
        import pandas as pd

        if isinstance(source, pd.DataFrame):
            table = source
        elif Path(source).is_file():
            table = pd.read_parquet(source)
        else:
            raise FileNotFoundError(f"strategy {self.name!r} expects a Parquet file with columns {columns} at {source}")
        missing = [column for column in columns if column not in table.columns]
        if missing:
            raise ValueError(
                f"strategy {self.name!r} expects columns {columns}, {missing} missing from {list(table.columns)}"
            )
        table = table.loc[:, list(columns)].copy()
        for column in columns[:-1]:
            table[column] = table[column].astype(str).map(index)
        if not bool(torch.isfinite(torch.from_numpy(table["score"].to_numpy("float64", copy=True))).all()):
            raise ValueError(f"strategy {self.name!r}: column 'score' has missing or infinite numbers; drop those rows")
        known = table.dropna()
        self.ignored_rows += len(table) - len(known)
        if known.empty:
            raise ValueError(
                f"strategy {self.name!r}: no id of the file is an item of the log, with ids like {list(index)[:3]}"
            )
        return known.drop_duplicates(list(columns[:-1]))

    def _backfill(self) -> Tensor:
        return self.rank_score

    def _flops(self) -> float:
        return super()._flops() if self.flops is None else self.flops

    def _settings(self) -> dict[str, JSON]:
        return {"last_items": self.last_items, "half_life_items": self.half_life_items, "flops": self.flops}
