"""Log -> world: fits strategies and judges, ranks each start state's lists, checks the result; finished stages outlive a kill."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from metarec_gym.response.frozen import AnyJudge, FrozenResponse, LoggedResponse, untimed
from metarec_gym.seeding import numpy_rng, stream
from metarec_gym.world import FOLDS, SECOND, World, WorldError, list_stats, start_tables
from metarec_gym.world_judges import JudgeJob, fit_judges, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metarec_gym.data.dataset import Dataset
    from metarec_gym.data.interactions import InteractionLog
    from metarec_gym.data.sessions import SessionGap
    from metarec_gym.recommenders.base import Strategy
    from metarec_gym.recommenders.pool import Pool
    from metarec_gym.response.config import ResponseConfig

MAX_CATALOGUE_SHARE = 0.1
"""A horizon is sound while at most this share of the catalogue is shown: long episodes would deplete it."""
MAX_HORIZON = 100
SAMPLERS: tuple[Literal["uniform", "sqrt_popularity", "popularity"], ...] = ("uniform", "sqrt_popularity", "popularity")
"""Samplers of negatives; those that the main judge does not use become variants of it."""
DENSE = 0.9
"""Share of user-item pairs that a log must answer before a world may look its answers up."""


@dataclass
class Builder:
    """The arguments of `World.build`; `build` does the work."""

    log: InteractionLog
    seed: int
    pool: Sequence[str | Strategy] | None
    starts_per_user: int
    slate_size: int
    horizon: int | None
    out: str | Path | None
    progress: bool
    replicas: int
    response_config: ResponseConfig | None
    members: int
    variants: bool
    response: str
    session_gap_s: float | None
    workers: int
    device: str
    _gap: SessionGap | None = None

    def build(self) -> World:
        """The world; see `World.build`."""
        from metarec_gym.data import FOLD_A, FOLD_B, FOLD_S, encode

        begun = time.perf_counter()
        dataset, self._gap = self._with_sessions(encode(self.log, seed=self.seed))
        users_s, users_a, users_b = (dataset.users_in(fold) for fold in (FOLD_S, FOLD_A, FOLD_B))
        if min(len(users_s), len(users_a), len(users_b)) < 10:
            raise WorldError(
                f"{self.log.name} has {dataset.n_users} users; at least 30 are needed (10 to fit the strategies, "
                "10 for each of the two judges)"
            )
        horizon = self._sound_horizon(dataset.n_items)
        length = min(dataset.n_items, horizon * self.slate_size)
        pool = self._pool(dataset, users_s)
        responses, judge_metrics = self._judges(dataset, {"A": (users_a, users_b), "B": (users_b, users_a)})
        self._say("start states and their ranked lists")
        pool.to(self.device)
        tensors, gate_rate = self._tables(dataset, pool, responses, users_s, torch.cat([users_a, users_b]), length)
        engaged = dataset.engaged_counts().to(torch.float64)
        costs = pool.costs()
        # the check's size does not grow with the log: it stays on the CPU
        pool.to("cpu")
        metrics: dict[str, Any] = {
            "device": self.device,
            "judges": judge_metrics,
            "engaged_p90": float(torch.quantile(engaged, 0.9)),
            "users_by_fold": {"S": len(users_s), "A": len(users_a), "B": len(users_b)},
            "cost_seconds": {name: cost.seconds for name, cost in costs.items()},
            "cost_flops": {name: cost.flops for name, cost in costs.items()},
            "cost_money": {name: cost.money for name, cost in costs.items() if cost.money > 0},
            "session_gap_s": None if self._gap is None else self._gap.gap_s,
            "session_gap_note": "the log's own session ids" if self._gap is None else self._gap.note,
        }
        if self.replicas > 0 and self.response == "model":
            metrics["predictive_check"] = self._predictive_check(dataset, pool, responses, users_a, users_b)
        # last: re-rankers count what they were asked until here
        metrics["strategies"] = {strategy.name: said for strategy in pool if (said := strategy.report())}
        weights = tensors["outcome_weights"]
        # outcomes after the gate are conditional on it: their rate among engaged rows times the gate's rate
        taken = dataset.outcome[dataset.outcome[:, 0] > 0]
        rates = torch.cat([torch.ones(1), taken[:, 1:].mean(dim=0)]) * gate_rate
        metrics["seconds"] = round(time.perf_counter() - begun, 1)
        world = World(
            name=self.log.name,
            strategies=tuple(pool.names),
            outcomes=tuple(dataset.outcomes),
            horizon=horizon,
            slate_size=self.slate_size,
            seed=self.seed,
            # lists are better than chance: three times the utility of an item drawn at random is a typical shown item's
            reward_scale=round(max(3.0 * float((weights * rates).sum()), 1e-6), 6),
            tensors=tensors,
            responses=responses,
            info={
                "card": self.log.card,
                "cleaning": [vars(step) for step in self.log.cleaning],
                "log_hash": self.log.hash,
                "metrics": metrics,
            },
            ranker=pool,
            folder=None if self.out is None else Path(self.out),
        )
        if self.out is not None:
            self._write(world, dataset, pool)
        return world

    def _with_sessions(self, dataset: Dataset) -> tuple[Dataset, SessionGap | None]:
        """The dataset with its sessions cut at the gap asked for, or at one fitted from the times between events."""
        from metarec_gym.data.sessions import SessionGap, fit_session_gap, sessions_by_gap

        if "session_id" in self.log.frame.columns:
            return dataset, None
        user, time_s = dataset.user.numpy(), dataset.time.numpy()
        given = self.session_gap_s
        gap = fit_session_gap(user, time_s) if given is None else SessionGap(given, "given")
        return replace(dataset, session=torch.from_numpy(sessions_by_gap(user, time_s, gap.gap_s))), gap

    def _judges_of(self, dataset: Dataset) -> list[tuple[str, ResponseConfig]]:
        """Name and settings of each judge of a fold, the main one first."""
        from metarec_gym.response.config import SECOND_FAMILY, ResponseConfig

        main = self.response_config or ResponseConfig()
        judges: list[tuple[str, ResponseConfig]] = [("main", main)]
        if self.variants:
            quick = ("max_epochs", "inner_folds", "effect_negatives", "effect_rounds", "negatives", "base_rate")
            second = (
                SECOND_FAMILY
                if self.response_config is None
                else replace(SECOND_FAMILY, **{name: getattr(main, name) for name in quick})
            )
            judges.append((SECOND, second))
            if not dataset.has_impressions:
                judges += [(name, replace(main, sampler=name)) for name in SAMPLERS if name != main.sampler]
        return judges

    def _say(self, text: str) -> None:
        if self.progress:
            print(f"[world] {text}", flush=True)

    def _sound_horizon(self, n_items: int) -> int:
        largest = min(MAX_HORIZON, int(MAX_CATALOGUE_SHARE * n_items) // self.slate_size)
        if largest < 1:
            raise WorldError(
                f"{n_items} items are too few for slates of {self.slate_size}: one request would show more than "
                f"{MAX_CATALOGUE_SHARE:.0%} of the catalogue; use a smaller --slate-size"
            )
        if self.horizon is None:
            return largest
        if self.horizon * self.slate_size > n_items:
            raise WorldError(
                f"horizon {self.horizon} with slates of {self.slate_size} shows more than the {n_items} items; "
                f"the largest sound horizon is {largest}"
            )
        return self.horizon

    @functools.cached_property
    def _stages(self) -> Path | None:
        """Folder of finished stages, keyed by everything that decides them."""
        if self.out is None:
            return None
        asked = (
            *(self.log.hash, _code_hash(), torch.__version__, repr(self.response_config)),
            *(strategy.fingerprint() for strategy in self._strategies),
            *(str(self.members), self.response, repr(self.session_gap_s), self.device.split(":")[0]),
        )
        key = stream(self.seed, *asked)
        folder = Path(f"{self.out}.partial") / f"{key:016x}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @functools.cached_property
    def _strategies(self) -> list[Strategy]:
        """The strategies asked for, before they are fitted."""
        from metarec_gym.recommenders.registry import DEFAULT_POOL, make_strategy

        return [make_strategy(word) for word in self.pool or DEFAULT_POOL]

    def _pool(self, dataset: Dataset, users: Tensor) -> Pool:
        from metarec_gym.recommenders.pool import Pool

        done = self._stages / "pool" if self._stages else None
        if done is not None and done.is_dir():
            self._say("strategies: found")
            return Pool.load(done, given=self._strategies)
        self._say(f"fitting {len(self._strategies)} strategies on {len(users)} users of fold S")
        pool = Pool.fit(
            dataset, users, seed=self.seed, names=self._strategies, progress=self.progress, device=self.device
        )
        if done is not None:
            writing = done.with_name("pool.writing")
            shutil.rmtree(writing, ignore_errors=True)
            pool.save(writing)
            os.replace(writing, done)
        return pool

    def _timing(
        self, dataset: Dataset, fold: str, users: Tensor, others: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """When users leave and come back, fitted on the fold's users: tensors of a judge, and metrics."""
        from metarec_gym.data.sessions import SESSION_GAP_S
        from metarec_gym.response.leaving import fit_leaving
        from metarec_gym.response.returning import fit_return

        self._say(f"leaving and return times of fold {fold}")
        returning, return_metrics = fit_return(dataset, users, heldout_users=others)
        pause_s = SESSION_GAP_S if self._gap is None else self._gap.gap_s
        leaving, leaving_metrics = fit_leaving(dataset, users, heldout_users=others, pause_s=pause_s)
        tensors = {name: value.to(torch.float32) for name, value in returning.items()}
        return tensors | {"leaving": leaving.to(torch.float32)}, {
            "returning": return_metrics,
            "leaving": leaving_metrics,
        }

    def _judges(
        self, dataset: Dataset, folds: dict[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, AnyJudge], dict[str, Any]]:
        """Every judge and its metrics by name; `folds` gives the users of a fold and those it is scored on."""
        responses: dict[str, AnyJudge] = {}
        metrics: dict[str, Any] = {}
        if self.response == "logged":
            for fold, (users, _) in folds.items():
                responses[fold], metrics[fold] = _logged_judge(dataset, users), {"kind": "logged", "outcomes": {}}
        else:
            kinds = self._judges_of(dataset)
            # variants need the main judge: they are fitted in a second round
            for later in (False, True):
                jobs = [(fold, name, config) for fold in folds for name, config in kinds if (name in SAMPLERS) is later]
                work = {}
                for fold, name, config in jobs:
                    key, main = fold if name == "main" else f"{fold}/{name}", responses.get(fold)
                    work[key] = JudgeJob(
                        dataset=dataset,
                        users=folds[fold][0],
                        others=folds[fold][1],
                        seed=stream(self.seed, "judge", fold),
                        config=config,
                        members=self.members if name == "main" else 1,
                        base=(main, metrics[fold]) if later and isinstance(main, FrozenResponse) else None,
                        stage=None if self._stages is None else self._stages / f"judge_{key.replace('/', '_')}",
                        device=self.device,
                    )
                for key, (judge, found) in fit_judges(work, self.workers, self._say, self.progress).items():
                    responses[key], metrics[key] = judge, found
        for fold, (users, others) in folds.items():
            timing, timing_metrics = self._timing(dataset, fold, users, others)
            metrics[fold] |= timing_metrics
            for key in [key for key in responses if key == fold or key.startswith(f"{fold}/")]:
                # what a log leaves open stays open; when users leave and come back is the same for all judges of a fold
                responses[key] = responses[key].replaced(**timing)
        return responses, metrics

    def _tables(
        self,
        dataset: Dataset,
        pool: Pool,
        responses: dict[str, AnyJudge],
        users_s: Tensor,
        users: Tensor,
        length: int,
    ) -> tuple[dict[str, Tensor], float]:
        from metarec_gym.data import FOLD_B

        starts_user = users.repeat_interleave(self.starts_per_user)
        counts = dataset.engaged_counts()
        lengths = _start_lengths(counts[users], self.starts_per_user, self.seed)
        fold = (dataset.fold[starts_user] == FOLD_B).to(torch.int8)
        popularity = _popularity_percentile(dataset, users_s)
        category = dataset.item_category / dataset.item_category.sum(dim=1, keepdim=True).clamp(min=1.0)
        taste = _taste_table(dataset, users_s, self.seed)
        parts: dict[str, list[Tensor]] = {name: [] for name in start_tables()}
        second = {name: responses.get(f"{name}/{SECOND}") for name in FOLDS}
        observed = responses["A"].observed if isinstance(responses["A"], LoggedResponse) else None
        bar = _bar(len(starts_user), "ranking lists", self.progress)
        for lo in range(0, len(starts_user), 256):
            rows = slice(lo, min(lo + 256, len(starts_user)))
            histories = dataset.histories(starts_user[rows], lengths[rows])
            seen = histories.clamp(min=0)
            valid = (histories >= 0).to(torch.float32)
            exclude = None if observed is None else ~observed[starts_user[rows]]
            # the pool takes what it ranks to its device and brings the lists back
            found, scores = pool.ranked(histories, length, exclude=exclude)
            lists = found.to(torch.int32)
            states = torch.zeros(len(lists), responses["A"].state_dim)
            other_states = torch.zeros(len(lists), 0 if second["A"] is None else second["A"].state_dim)
            for index, name in enumerate(FOLDS):
                mine, other = fold[rows] == index, second[name]
                if bool(mine.any()):
                    states[mine] = responses[name].start(histories[mine])
                    if other is not None:
                        other_states[mine] = other.start(histories[mine])
            taste_sum = (taste[seen] * valid[..., None]).sum(dim=1)
            parts["start_lists"].append(lists)
            parts["start_list_scores"].append(scores)
            parts["start_state"].append(states)
            parts["start_state_second"].append(other_states)
            parts["start_taste"].append(taste_sum)
            parts["start_category"].append((category[seen] * valid[..., None]).sum(dim=1))
            parts["start_popularity"].append((popularity[seen] * valid).sum(dim=1))
            parts["start_list_stats"].append(list_stats(lists, popularity, taste, taste_sum))
            bar.update(len(lists))
        bar.close()
        tensors = {name: torch.cat(chunks) for name, chunks in parts.items() if chunks}
        tensors |= {
            "outcome_weights": torch.tensor(dataset.outcome_weights, dtype=torch.float32),
            "costs": _relative_costs([pool.costs()[name].flops for name in pool.names]),
            "item_taste": taste,
            "item_popularity": popularity,
            "item_category": category,
            "start_user": starts_user,
            "start_fold": fold,
            "start_length": lengths,
            "start_gap": _gaps(dataset, starts_user, lengths),
            **_start_sessions(dataset, starts_user, lengths),
            **_events(dataset, users),
            "period_starts": self._period_starts(dataset),
        }
        if dataset.has_impressions:
            gate_rate = float(dataset.outcome[dataset.rows_of(users_s), 0].mean())
        else:
            gate_rate = float(counts[users_s].to(torch.float64).mean()) / dataset.n_items
        return tensors, gate_rate

    def _period_starts(self, dataset: Dataset) -> Tensor:
        if self.response == "logged":
            return torch.zeros(1, dtype=torch.float64)
        from metarec_gym.response.rows import period_starts

        starts: Tensor = period_starts(dataset)
        return starts

    def _predictive_check(
        self,
        dataset: Dataset,
        pool: Pool,
        responses: dict[str, AnyJudge],
        users_a: Tensor,
        users_b: Tensor,
    ) -> dict[str, Any]:
        from metarec_gym.response.predictive_check import check_world

        done = self._stages / f"predictive_check_{self.replicas}.json" if self._stages else None
        if done is not None and done.is_file():
            return dict(json.loads(done.read_text()))
        self._say(f"posterior predictive check with {self.replicas} emitted logs")
        judges = {"A": (responses["A"], users_a), "B": (responses["B"], users_b)}
        # a log in which similar items are met in a row looks predictable between odd and even events; halves one after the
        # other say how much of that lasts
        result: dict[str, Any] = check_world(
            dataset,
            {n: (judge, users) for n, (judge, users) in judges.items() if isinstance(judge, FrozenResponse)},
            pool.top_lists,
            tuple(pool.names),
            seed=self.seed,
            replicas=self.replicas,
            halves="both",
            progress=self.progress,
        )
        if done is not None:
            write_text(done, json.dumps(result))
        return result

    def _write(self, world: World, dataset: Dataset, pool: Pool) -> None:
        import pandas as pd

        assert self.out is not None
        folder = Path(self.out)
        folder.parent.mkdir(parents=True, exist_ok=True)
        world.save(folder)
        pool.save(folder)
        names = {0: "S", 1: "A", 2: "B"}
        users = {
            "user_index": range(dataset.n_users),
            "user_id": dataset.user_ids,
            "fold": [names[int(f)] for f in dataset.fold],
        }
        items = {"item_index": range(dataset.n_items), "item_id": dataset.item_ids, "text": list(dataset.item_text)}
        for file, table in (("users.parquet", users), ("items.parquet", items)):
            pd.DataFrame(table).to_parquet(folder / (file + ".partial"), index=False)
            os.replace(folder / (file + ".partial"), folder / file)
        shutil.rmtree(f"{self.out}.partial", ignore_errors=True)


def _code_hash() -> str:
    """Hash of the code that fits: a stage kept by other code is not taken for finished."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    rooms = [sorted((here / room).glob("*.py")) for room in ("data", "recommenders", "response")]
    for file in [*(file for room in rooms for file in room), here / "devices.py", here / "world_judges.py"]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _bar(total: int, title: str, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=title, disable=not show, unit="start")


def _start_lengths(counts: Tensor, per_user: int, seed: int) -> Tensor:
    """History lengths of the start states: 0, then log-uniform in [1, count - 1], ascending for each user; int64."""
    import numpy as np

    rng = numpy_rng(seed, "start lengths")
    n = counts.numpy()[:, None]
    longest = np.maximum(n - 1, 1)
    drawn = np.floor(np.exp(rng.random((len(n), per_user - 1)) * np.log(longest + 1.0)))
    drawn = np.minimum(np.sort(drawn, axis=1), np.minimum(longest, n))
    return torch.from_numpy(np.concatenate([np.zeros_like(n), drawn.astype(np.int64)], axis=1)).flatten()


def _popularity_percentile(dataset: Dataset, users: Tensor) -> Tensor:
    rows = dataset.rows_of(users)
    engaged = dataset.outcome[rows, 0] > 0
    counts = torch.bincount(dataset.item[rows][engaged], minlength=dataset.n_items)
    # share of items that are less popular plus half of the ties: equal counts get equal percentiles
    ordered = counts.sort().values
    low = torch.searchsorted(ordered, counts, right=False)
    high = torch.searchsorted(ordered, counts, right=True)
    return ((low + high).to(torch.float32) / (2.0 * dataset.n_items)).contiguous()


def _taste_table(dataset: Dataset, users: Tensor, seed: int, dim: int = 8) -> Tensor:
    """Item vectors of the taste summary: truncated SVD of fold S's user-item matrix, rows of length <= 1."""
    import numpy as np
    import scipy.sparse as sp
    from scipy.sparse.linalg import svds

    rows = dataset.rows_of(users)
    rows = rows[dataset.outcome[rows, 0] > 0]
    shape = (dataset.n_users, dataset.n_items)
    matrix = sp.csr_matrix((np.ones(len(rows)), (dataset.user[rows].numpy(), dataset.item[rows].numpy())), shape=shape)[
        users.numpy()
    ]
    degree_user = np.sqrt(np.maximum(np.asarray(matrix.sum(axis=1)), 1.0))
    degree_item = np.sqrt(np.maximum(np.asarray(matrix.sum(axis=0)), 1.0))
    matrix = sp.csr_matrix(sp.diags(1.0 / degree_user[:, 0]) @ matrix @ sp.diags(1.0 / degree_item[0]))
    k = min(dim, min(matrix.shape) - 2)
    start = numpy_rng(seed, "taste").standard_normal(min(matrix.shape))
    _, values, vt = svds(matrix, k=k, v0=start)
    # svds fixes neither order nor signs: largest value first, largest entry positive
    vectors = vt[np.argsort(-values)].T
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(k)])
    vectors = vectors * np.where(signs == 0, 1.0, signs)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.where(norms > 1e-8, vectors / np.maximum(norms, 1e-8), 0.0)
    table = np.zeros((dataset.n_items, dim), dtype=np.float32)
    table[:, :k] = vectors
    return torch.from_numpy(table)


def _gaps(dataset: Dataset, users: Tensor, lengths: Tensor) -> Tensor:
    """log(1 + days) between the last two events of each history, a year = 1; 0 for fewer than two events."""
    engaged_rows = torch.nonzero(dataset.outcome[:, 0] > 0)[:, 0]
    counts = dataset.engaged_counts()
    first = torch.cumsum(counts, 0) - counts
    last = (first[users] + lengths - 1).clamp(min=0)
    before = (last - 1).clamp(min=0)
    days = (dataset.time[engaged_rows[last]] - dataset.time[engaged_rows[before]]).clamp(min=0.0) / 86400.0
    value = torch.log1p(days) / torch.log1p(torch.tensor(365.0, dtype=torch.float64))
    return torch.where(lengths >= 2, value.clamp(max=1.0), 0.0).to(torch.float32)


def _relative_costs(flops: list[float]) -> Tensor:
    cost = torch.tensor(flops, dtype=torch.float64)
    return (cost / cost.max().clamp(min=1e-12)).to(torch.float32)


def _start_sessions(dataset: Dataset, users: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """When each start state is, how many sessions its history has, and the gap before the last of them."""
    engaged_rows = torch.nonzero(dataset.outcome[:, 0] > 0)[:, 0]
    counts = dataset.engaged_counts()
    first = torch.cumsum(counts, 0) - counts
    any_history = lengths > 0
    last_row = engaged_rows[(first[users] + lengths - 1).clamp(min=0, max=max(len(engaged_rows) - 1, 0))]
    row = torch.where(any_history, last_row, dataset.offsets[users])
    # rows of a user stand in time order and sessions are numbered from 0: the first row of a session is found by its key
    key = dataset.user * (int(dataset.session.max()) + 1) + dataset.session
    begin = torch.searchsorted(key, key[row], right=False)
    before = (begin - 1).clamp(min=0)
    has_before = any_history & (begin > dataset.offsets[users])
    gap_s = (dataset.time[begin] - dataset.time[before]).clamp(min=0.0)
    return {
        "start_time": dataset.time[row],
        "start_sessions": torch.where(any_history, dataset.session[row] + 1, 0).to(torch.float32),
        "start_previous_gap": torch.where(has_before, gap_s / 3600.0, 0.0).to(torch.float32),
    }


def _events(dataset: Dataset, users: Tensor) -> dict[str, Tensor]:
    """Items taken by the users, one user after the other; other users have no events."""
    chosen = torch.zeros(dataset.n_users, dtype=torch.bool)
    chosen[users] = True
    engaged = (dataset.outcome[:, 0] > 0) & chosen[dataset.user]
    counts = torch.bincount(dataset.user[engaged], minlength=dataset.n_users)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(counts, 0)])
    return {"user_events": dataset.item[engaged].to(torch.int32), "user_event_offsets": offsets}


def _logged_judge(dataset: Dataset, users: Tensor) -> LoggedResponse:
    """Answers by look-up: the mean of a pair's logged outcomes, later outcomes given the gate.

    Raises:
        WorldError: When the users of the fold met fewer than `DENSE` of the items.
    """
    n_outcomes = dataset.outcome.shape[1]
    cell = dataset.user * dataset.n_items + dataset.item
    cells = dataset.n_users * dataset.n_items
    shown = torch.zeros(cells, dtype=torch.float64).index_add_(0, cell, torch.ones(len(cell), dtype=torch.float64))
    share = float((shown.view(dataset.n_users, dataset.n_items)[users] > 0).to(torch.float64).mean())
    if share < DENSE:
        raise WorldError(
            f"the log answers {share:.1%} of the user-item pairs, looking answers up needs {DENSE:.0%}; build the world with "
            "--response model"
        )
    total = torch.zeros(cells, n_outcomes, dtype=torch.float64).index_add_(0, cell, dataset.outcome.to(torch.float64))
    taken = total[:, :1]
    answers = torch.cat([taken / shown[:, None], total[:, 1:] / taken.clamp(min=1e-12)], dim=1)
    answers[:, 1:] = torch.where(taken > 0, answers[:, 1:], 0.0).clamp(max=1.0)
    answers[shown == 0] = torch.nan
    table = answers.to(torch.float32).view(dataset.n_users, dataset.n_items, n_outcomes)
    return LoggedResponse({"answers": table, **untimed()}, tuple(dataset.outcomes))
