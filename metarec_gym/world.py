"""The hinge: a world is a log's split, its strategies' lists, two frozen judges and the start states, in one hashed folder.

Running an environment needs `world.safetensors` and `world.json` alone; the Parquet tables are for people, and the strategies'
own weights are kept so that lists for new histories can be ranked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metarec_gym.response.frozen import FrozenResponse
from metarec_gym.seeding import numpy_rng, stream

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset
    from metarec_gym.data.interactions import InteractionLog
    from metarec_gym.recommenders.pool import Pool
    from metarec_gym.response.model import ResponseConfig

WORLD_SCHEMA = 1
FOLDS = ("A", "B")
LIST_FEATURES = ("popularity", "agreement", "similarity")
"""What an observation says of a strategy's list, each over its first `LIST_HEAD` items."""
LIST_HEAD = 20
MAX_CATALOGUE_SHARE = 0.1
"""A horizon is sound while at most this share of the catalogue is shown: long episodes would deplete it."""
MAX_HORIZON = 100

_TENSORS = {
    "outcome_weights": "(n_outcomes,) reward of each outcome",
    "costs": "(n_strategies,) FLOPs a request relative to the dearest strategy",
    "item_taste": "(n_items, n_taste) item vectors of the taste summary, from fold S only",
    "item_popularity": "(n_items,) popularity percentile in fold S",
    "item_category": "(n_items, n_categories) shares, rows sum to 1 or 0",
    "start_user": "(n_starts,) user index",
    "start_fold": "(n_starts,) 0 = fold A, 1 = fold B",
    "start_length": "(n_starts,) items in the history",
    "start_lists": "(n_starts, n_strategies, list_length) ranked items without the history, -1 = none left",
    "start_state": "(n_starts, state_dim) the fold's judge after the history",
    "start_taste": "(n_starts, n_taste) sum of item_taste over the history",
    "start_category": "(n_starts, n_categories) sum of item_category over the history",
    "start_popularity": "(n_starts,) sum of item_popularity over the history",
    "start_gap": "(n_starts,) time between the last two events of the history, 0 = none or one event, 1 = a year",
    "start_list_stats": "(n_starts, n_strategies, 3) " + ", ".join(LIST_FEATURES),
}


class WorldError(ValueError):
    """A world folder or a request to a world that cannot be used; the message says what to do."""


@dataclass(frozen=True, eq=False)
class World:
    """Everything an environment needs, frozen; made by `build`, `load` or `synthetic`.

    Attributes:
        name: Name of the log.
        strategies: Strategy names; the action index is the position here.
        outcomes: Outcome names, the gate first.
        horizon: Largest sound number of requests an episode: at most 10 % of the catalogue is shown.
        slate_size: Items a request that the horizon was computed for.
        seed: Seed of the build.
        reward_scale: Typical reward of one shown item; observations measure rewards in slates of it.
        tensors: Run-time tables, see `_TENSORS`.
        responses: The frozen judge of each fold.
        info: JSON-able facts that do not change what an environment does (card, metrics, seconds); not hashed.
    """

    name: str
    strategies: tuple[str, ...]
    outcomes: tuple[str, ...]
    horizon: int
    slate_size: int
    seed: int
    reward_scale: float
    tensors: dict[str, Tensor]
    responses: dict[str, FrozenResponse]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = sorted(set(_TENSORS) - set(self.tensors))
        if missing:
            raise WorldError(f"the world lacks the tables {missing}; build it again: python -m experiments.build_world")

    def __deepcopy__(self, memo: dict[int, Any]) -> World:
        # gymnasium deep-copies keyword arguments of make(); a frozen world may be shared
        return self

    @property
    def n_strategies(self) -> int:
        """Number of strategies K."""
        return len(self.strategies)

    @property
    def n_items(self) -> int:
        """Number of items."""
        return int(self.tensors["item_popularity"].shape[0])

    @property
    def n_users(self) -> int:
        """Number of users of the log, all folds."""
        return int(self.responses["A"].n_users)

    @property
    def list_length(self) -> int:
        """Items kept of every ranked list."""
        return int(self.tensors["start_lists"].shape[2])

    @property
    def card(self) -> dict[str, Any]:
        """Source, licence and counts of the log."""
        return dict(self.info.get("card", {}))

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured while building: judges, posterior predictive check, strategies."""
        return dict(self.info.get("metrics", {}))

    @functools.cached_property
    def hash(self) -> str:
        """Content hash of all that decides what an environment does; 16 hexadecimal characters."""
        digest = hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _identity(self) -> dict[str, Any]:
        return {
            "schema": WORLD_SCHEMA,
            "name": self.name,
            "strategies": self.strategies,
            "outcomes": self.outcomes,
            "horizon": self.horizon,
            "slate_size": self.slate_size,
            "seed": self.seed,
            "reward_scale": self.reward_scale,
            "responses": {fold: response.hash for fold, response in sorted(self.responses.items())},
        }

    def starts_of(self, fold: str) -> Tensor:
        """Indices of the start states of a fold's users; int64 (n,)."""
        return torch.nonzero(self.tensors["start_fold"] == FOLDS.index(fold))[:, 0]

    # ---------------------------------------------------------------------------------------------- files
    def save(self, folder: str | Path) -> Path:
        """Writes the folder atomically: it appears complete or not at all; an older world there is replaced.

        Args:
            folder: Target folder.

        Returns:
            The folder.
        """
        folder = Path(folder)
        partial = folder.with_name(folder.name + ".writing")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # clones: safetensors refuses tensors that share memory, as tables of a synthetic world do
        flat = {f"world.{name}": tensor.clone() for name, tensor in self.tensors.items()}
        for fold, response in self.responses.items():
            flat |= {f"response_{fold}.{name}": tensor.cpu().clone() for name, tensor in response.tensors.items()}
        save_file(flat, str(partial / "world.safetensors"))
        header = self._identity() | {
            "hash": self.hash,
            "feature_names": {fold: response.feature_names for fold, response in self.responses.items()},
            "info": self.info,
        }
        (partial / "world.json").write_text(json.dumps(header, indent=2, sort_keys=True) + "\n")
        for extra in ("items.parquet", "users.parquet", "strategies.safetensors", "strategies.json"):
            if (folder / extra).is_file():
                shutil.copy2(folder / extra, partial / extra)
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> World:
        """Reads a world and checks its hash.

        Raises:
            FileNotFoundError: When there is no world in `folder`.
            WorldError: When the folder is damaged or written by a newer version.
        """
        folder = Path(folder)
        if not (folder / "world.json").is_file():
            raise FileNotFoundError(
                f"no world at {folder}; build it: python -m experiments.build_world --log LOG --out {folder}"
            )
        rebuild = f"build it again: python -m experiments.build_world --log LOG --out {folder}"
        try:
            header = json.loads((folder / "world.json").read_text())
        except ValueError as error:
            raise WorldError(f"{folder / 'world.json'} is damaged ({error}); {rebuild}") from error
        if header.get("schema", 0) > WORLD_SCHEMA:
            raise WorldError(
                f"{folder} has world schema {header['schema']}, this metarec_gym reads up to {WORLD_SCHEMA}; "
                "upgrade metarec_gym or build the world again"
            )
        try:
            flat = load_file(str(folder / "world.safetensors"))
            responses = {
                fold: FrozenResponse(
                    {n.split(".", 1)[1]: t for n, t in flat.items() if n.startswith(f"response_{fold}.")},
                    tuple(header["outcomes"]),
                    tuple(header["feature_names"][fold]),
                )
                for fold in FOLDS
            }
            world = cls(
                name=header["name"],
                strategies=tuple(header["strategies"]),
                outcomes=tuple(header["outcomes"]),
                horizon=header["horizon"],
                slate_size=header["slate_size"],
                seed=header["seed"],
                reward_scale=header["reward_scale"],
                tensors={n.split(".", 1)[1]: t for n, t in flat.items() if n.startswith("world.")},
                responses=responses,
                info=header["info"],
            )
        except WorldError:
            raise
        except Exception as error:
            raise WorldError(f"the world at {folder} is damaged ({error}); {rebuild}") from error
        if world.hash != header["hash"]:
            raise WorldError(
                f"the world at {folder} is damaged: its content has hash {world.hash}, world.json says "
                f"{header['hash']}; {rebuild}"
            )
        return world

    @classmethod
    def build(
        cls,
        log: InteractionLog,
        *,
        seed: int = 0,
        pool: tuple[str, ...] | None = None,
        starts_per_user: int = 8,
        slate_size: int = 5,
        horizon: int | None = None,
        out: str | Path | None = None,
        progress: bool = True,
        replicas: int = 200,
        response_config: ResponseConfig | None = None,
    ) -> World:
        """Turns a log into a world: fold S fits the strategies, folds A and B fit one judge each.

        Args:
            log: The validated log.
            seed: Decides folds, fits and start states.
            pool: Strategy names; the default pool if None.
            starts_per_user: Start states for each user of folds A and B; the first is cold (empty history), the others have
                history lengths drawn log-uniformly up to the user's own.
            slate_size: Items a request.
            horizon: Requests an episode; None takes the largest sound one.
            out: Folder to save to; finished stages are kept beside it (`<out>.partial`) and found again after a kill.
            progress: Shows a line and a bar for each stage.
            replicas: Emitted logs of the posterior predictive check; 0 leaves the check out.
            response_config: How the judges are fitted; None = the defaults.

        Returns:
            The world, saved to `out` when that is given.

        Raises:
            WorldError: When the log is too small to split, or the horizon is longer than the catalogue allows.
        """
        return _Builder(
            log, seed, pool, starts_per_user, slate_size, horizon, out, progress, replicas, response_config
        ).build()

    @classmethod
    def synthetic(
        cls,
        *,
        n_types: int = 4,
        users_per_type: int = 16,
        items_per_type: int = 140,
        horizon: int = 20,
        slate_size: int = 5,
        high: float = 0.5,
        low: float = 0.1,
        history_lengths: tuple[int, ...] = (0, 3, 10, 30),
        leaving: tuple[float, float] | None = (-6.0, 0.8),
        identical: bool = False,
        seed: int = 0,
    ) -> World:
        """A small world whose best strategy for each user is known by construction.

        Users of type g take items of category g with probability `high` and others with `low`. Strategy `specialist_g` serves
        category g only, `mixed` serves all in turn. So the best strategy of a type-g user is `specialist_g`, and without leaving
        the best value a request is `slate_size * high`, for users whose type is known from the first request on.

        Args:
            n_types: User types, item categories and specialists.
            users_per_type: Users of each type in each of the folds A and B.
            items_per_type: Items of each category; at least horizon * slate_size + the longest history.
            horizon: Requests an episode.
            slate_size: Items a request.
            high: Probability that a user takes an item of the own type.
            low: Probability for the other types.
            history_lengths: History lengths of each user's start states; 0 is a cold user, whose type must be found out.
            leaving: Logit of leaving after a request: intercept and weight per request since the last click; None = never.
            identical: All strategies serve the list of `mixed`: nothing can be won by selecting.
            seed: Decides the users' histories.

        Raises:
            WorldError: When the categories are too small for the horizon.
        """
        return _synthetic(
            n_types,
            users_per_type,
            items_per_type,
            horizon,
            slate_size,
            (high, low),
            history_lengths,
            leaving,
            identical,
            seed,
        )


@functools.lru_cache(maxsize=1)
def _default_world() -> World:
    return World.synthetic()


_LOADED: dict[tuple[str, int], World] = {}


def resolve_world(world: World | str | Path | None) -> World:
    """The world itself, the one in a folder (each folder is read once), or the synthetic default for None.

    Args:
        world: A World, a folder, or None.

    Raises:
        FileNotFoundError: When the folder has no world.
        WorldError: When it is damaged.
    """
    if isinstance(world, World):
        return world
    if world is None:
        return _default_world()
    file = Path(world) / "world.json"
    if not file.is_file():
        return World.load(world)
    key = (str(file.resolve()), file.stat().st_mtime_ns)
    if key not in _LOADED:
        _LOADED[key] = World.load(world)
    return _LOADED[key]


def erase_user(folder: str | Path, user_id: str) -> World:
    """Removes one user from a saved world: start states, random effects and the row of `users.parquet`.

    The strategies and judges were still fitted with the user's events; to undo that too, erase the user from the log
    (`metarec_gym.data.privacy.erase_user`) and build the world again.

    Args:
        folder: The world's folder, rewritten in place (its hash changes).
        user_id: The id as it stands in the prepared log.

    Returns:
        The new world.

    Raises:
        KeyError: When the world has no such user.
    """
    import pandas as pd

    folder = Path(folder)
    world = World.load(folder)
    users = pd.read_parquet(folder / "users.parquet")
    hit = users.index[users["user_id"] == str(user_id)]
    if len(hit) == 0:
        raise KeyError(f"the world at {folder} has no user {user_id!r}; see the ids in {folder / 'users.parquet'}")
    index = int(users.loc[hit[0], "user_index"])
    keep = world.tensors["start_user"] != index
    tensors = {n: (t[keep] if n.startswith("start_") else t) for n, t in world.tensors.items()}
    responses = {}
    for fold, response in world.responses.items():
        parts = {n: t.clone() for n, t in response.tensors.items()}
        parts["effect_mean"][index] = 0.0
        parts["effect_chol"][index] = 0.0
        responses[fold] = FrozenResponse(parts, response.outcomes, response.feature_names)
    users = users.drop(index=hit)
    partial = folder / "users.parquet.partial"
    users.to_parquet(partial, index=False)
    os.replace(partial, folder / "users.parquet")
    erased = World(
        world.name,
        world.strategies,
        world.outcomes,
        world.horizon,
        world.slate_size,
        world.seed,
        world.reward_scale,
        tensors,
        responses,
        world.info,
    )
    erased.save(folder)
    return erased


# ------------------------------------------------------------------------------------------------ building
@dataclass
class _Builder:
    log: InteractionLog
    seed: int
    pool_names: tuple[str, ...] | None
    starts_per_user: int
    slate_size: int
    horizon: int | None
    out: str | Path | None
    progress: bool
    replicas: int
    response_config: ResponseConfig | None

    def build(self) -> World:
        from metarec_gym.data import FOLD_A, FOLD_B, FOLD_S, encode

        dataset = encode(self.log, seed=self.seed)
        users_s, users_a, users_b = (dataset.users_in(fold) for fold in (FOLD_S, FOLD_A, FOLD_B))
        if min(len(users_s), len(users_a), len(users_b)) < 10:
            raise WorldError(
                f"{self.log.name} has {dataset.n_users} users; at least 30 are needed (10 to fit the strategies, "
                "10 for each of the two judges)"
            )
        horizon = self._sound_horizon(dataset.n_items)
        length = min(dataset.n_items, horizon * self.slate_size)
        pool = self._pool(dataset, users_s)
        responses, judge_metrics = {}, {}
        for fold, users, others in (("A", users_a, users_b), ("B", users_b, users_a)):
            responses[fold], judge_metrics[fold] = self._judge(dataset, fold, users, others)
        self._say("start states and their ranked lists")
        tensors, gate_rate = self._tables(dataset, pool, responses, users_s, torch.cat([users_a, users_b]), length)
        engaged = dataset.engaged_counts().to(torch.float64)
        metrics: dict[str, Any] = {
            "judges": judge_metrics,
            "engaged_p90": float(torch.quantile(engaged, 0.9)),
            "users_by_fold": {"S": len(users_s), "A": len(users_a), "B": len(users_b)},
            "cost_seconds": {name: cost.seconds for name, cost in pool.costs().items()},
            "cost_flops": {name: cost.flops for name, cost in pool.costs().items()},
        }
        if self.replicas > 0:
            metrics["predictive_check"] = self._predictive_check(dataset, pool, responses, users_a, users_b)
        weights = tensors["outcome_weights"]
        # outcomes after the gate are conditional on it: their rate among engaged rows times the gate's rate
        taken = dataset.outcome[dataset.outcome[:, 0] > 0]
        rates = torch.cat([torch.ones(1), taken[:, 1:].mean(dim=0)]) * gate_rate
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
        )
        if self.out is not None:
            self._write(world, dataset, pool)
        return world

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
        asked = (self.log.hash, _code_hash(), torch.__version__, repr(self.pool_names), repr(self.response_config))
        key = stream(self.seed, *asked)
        folder = Path(f"{self.out}.partial") / f"{key:016x}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _pool(self, dataset: Dataset, users: Tensor) -> Pool:
        from metarec_gym.recommenders.pool import DEFAULT_POOL, Pool

        done = self._stages / "pool" if self._stages else None
        if done is not None and done.is_dir():
            self._say("strategies: found")
            return Pool.load(done)
        names = self.pool_names or DEFAULT_POOL
        self._say(f"fitting {len(names)} strategies on {len(users)} users of fold S")
        pool = Pool.fit(dataset, users, seed=self.seed, names=names, progress=self.progress)
        if done is not None:
            writing = done.with_name("pool.writing")
            shutil.rmtree(writing, ignore_errors=True)
            pool.save(writing)
            os.replace(writing, done)
        return pool

    def _judge(
        self, dataset: Dataset, fold: str, users: Tensor, others: Tensor
    ) -> tuple[FrozenResponse, dict[str, Any]]:
        from metarec_gym.response.fitting import fit_response

        done = self._stages / f"judge_{fold}" if self._stages else None
        if done is not None and done.with_suffix(".json").is_file():
            self._say(f"judge {fold}: found")
            header = json.loads(done.with_suffix(".json").read_text())
            tensors = load_file(str(done.with_suffix(".safetensors")))
            response = FrozenResponse(tensors, tuple(header["outcomes"]), tuple(header["feature_names"]))
            return response, header["metrics"]
        self._say(f"fitting judge {fold} on {len(users)} users")
        response, metrics = fit_response(
            dataset,
            users,
            seed=stream(self.seed, "judge", fold),
            config=self.response_config,
            heldout_users=others,
            progress=self.progress,
        )
        if done is not None:
            save_file(response.tensors, str(done.with_suffix(".safetensors")))
            header = {"outcomes": response.outcomes, "feature_names": response.feature_names, "metrics": metrics}
            # the JSON is written last: its presence says that the stage is complete
            _write_text(done.with_suffix(".json"), json.dumps(header))
        return response, metrics

    def _tables(
        self,
        dataset: Dataset,
        pool: Pool,
        responses: dict[str, FrozenResponse],
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
        parts: dict[str, list[Tensor]] = {n: [] for n in _TENSORS if n.startswith("start_")}
        bar = _bar(len(starts_user), "ranking lists", self.progress)
        for lo in range(0, len(starts_user), 256):
            rows = slice(lo, min(lo + 256, len(starts_user)))
            histories = dataset.histories(starts_user[rows], lengths[rows])
            seen = histories.clamp(min=0)
            valid = (histories >= 0).to(torch.float32)
            lists = pool.top_lists(histories, length).to(torch.int32)
            states = torch.zeros(len(lists), responses["A"].state_dim)
            for index, name in enumerate(FOLDS):
                mine = fold[rows] == index
                if bool(mine.any()):
                    states[mine] = responses[name].start(histories[mine])
            taste_sum = (taste[seen] * valid[..., None]).sum(dim=1)
            parts["start_lists"].append(lists)
            parts["start_state"].append(states)
            parts["start_taste"].append(taste_sum)
            parts["start_category"].append((category[seen] * valid[..., None]).sum(dim=1))
            parts["start_popularity"].append((popularity[seen] * valid).sum(dim=1))
            parts["start_list_stats"].append(_list_stats(lists, popularity, taste, taste_sum))
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
        }
        if dataset.has_impressions:
            gate_rate = float(dataset.outcome[dataset.rows_of(users_s), 0].mean())
        else:
            gate_rate = float(counts[users_s].to(torch.float64).mean()) / dataset.n_items
        return tensors, gate_rate

    def _predictive_check(
        self,
        dataset: Dataset,
        pool: Pool,
        responses: dict[str, FrozenResponse],
        users_a: Tensor,
        users_b: Tensor,
    ) -> dict[str, Any]:
        from metarec_gym.response.predictive_check import check_world

        done = self._stages / f"predictive_check_{self.replicas}.json" if self._stages else None
        if done is not None and done.is_file():
            return dict(json.loads(done.read_text()))
        self._say(f"posterior predictive check with {self.replicas} emitted logs")
        check = functools.partial(
            check_world,
            dataset,
            {"A": (responses["A"], users_a), "B": (responses["B"], users_b)},
            pool.top_lists,
            tuple(pool.names),
            seed=self.seed,
            progress=self.progress,
        )
        result: dict[str, Any] = check(replicas=self.replicas)
        # a log in which similar items are met in a row looks predictable between odd and even events; halves one after the
        # other say how much of that lasts
        result["consecutive_halves"] = check(replicas=max(self.replicas // 4, 2), halves="consecutive")
        if done is not None:
            _write_text(done, json.dumps(result))
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
    for room in ("data", "recommenders", "response"):
        for file in sorted((here / room).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


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


def _list_stats(lists: Tensor, popularity: Tensor, taste: Tensor, taste_sum: Tensor) -> Tensor:
    """Mean popularity, agreement with the other strategies and similarity to the taste; -> (rows, K, 3) in [-1, 1]."""
    head = lists[:, :, :LIST_HEAD].to(torch.int64)
    valid = (head >= 0).to(torch.float32)
    safe, size = head.clamp(min=0), valid.sum(dim=2).clamp(min=1.0)
    mean_popularity = (popularity[safe] * valid).sum(dim=2) / size
    direction = torch.nn.functional.normalize(taste_sum, dim=1)
    closeness = (taste[safe] * direction[:, None, None, :]).sum(dim=-1)
    similarity = (closeness * valid).sum(dim=2) / size
    strategies = head.shape[1]
    shared = torch.zeros(head.shape[:2])
    for other in range(strategies):
        same = (head[:, :, :, None] == head[:, None, other, None, :]) & (head >= 0)[..., None]
        shared += same.any(dim=-1).to(torch.float32).sum(dim=2) / size
    # a list agrees fully with itself; that is no news
    agreement = (shared - 1.0) / max(strategies - 1, 1)
    return torch.stack([mean_popularity, agreement.clamp(0.0, 1.0), similarity], dim=2)


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


# ------------------------------------------------------------------------------------------------ synthetic
def _synthetic(
    n_types: int,
    users_per_type: int,
    items_per_type: int,
    horizon: int,
    slate_size: int,
    probability: tuple[float, float],
    history_lengths: tuple[int, ...],
    leaving: tuple[float, float] | None,
    identical: bool,
    seed: int,
) -> World:
    length = horizon * slate_size
    if items_per_type < length + max(history_lengths):
        raise WorldError(
            f"items_per_type={items_per_type} is too small: {horizon} requests of {slate_size} items and a history of "
            f"{max(history_lengths)} need at least {length + max(history_lengths)}"
        )
    high, low = (torch.logit(torch.tensor(p, dtype=torch.float64)).item() for p in probability)
    n_items, n_users, dim, taste_dim = n_types * items_per_type, 2 * n_types * users_per_type, 4, max(8, n_types)
    item_type = torch.arange(n_items) % n_types
    user_type = torch.arange(n_users) % n_types
    user_fold = torch.arange(n_users) // (n_types * users_per_type)
    one_hot = torch.nn.functional.one_hot(item_type, n_types).to(torch.float32)
    features = n_types + 2
    effect_mean = torch.full((n_users, 1, features), float(low))
    effect_mean[torch.arange(n_users), 0, user_type] = float(high)
    effect_mean[:, :, n_types:] = 0.0
    response = FrozenResponse(
        {
            "item_input": torch.zeros(n_items, dim),
            "decays": torch.tensor([0.5]),
            "hidden_weight": torch.zeros(4, 2 * dim + 1),
            "hidden_bias": torch.zeros(4),
            "tower_weight": torch.zeros(2, 4),
            "tower_bias": torch.zeros(2),
            "item_output": torch.zeros(n_items, 1, 2),
            "item_bias": torch.zeros(n_items, 1),
            "calibration": torch.tensor([[1.0, 0.0]]),
            "static_features": one_hot,
            "dynamic_scale": torch.zeros(2),
            "effect_mean": effect_mean,
            "effect_chol": torch.zeros(n_users, 1, features, features),
            "pair_sd": torch.zeros(1),
            "position_logit": torch.zeros(64),
            "leaving": torch.tensor(leaving if leaving is not None else (-torch.inf, 0.0)),
        },
        ("click",),
        (*(f"category_{g}" for g in range(n_types)), "cooccurrence_recent", "cooccurrence_history"),
    )
    per_user = len(history_lengths)
    start_user = torch.arange(n_users).repeat_interleave(per_user)
    start_length = torch.tensor(history_lengths).repeat(n_users)
    # category g's items in a fixed order; a history is a seeded sample of the user's own category
    members = torch.stack([torch.nonzero(item_type == g)[:, 0] for g in range(n_types)])
    rng = numpy_rng(seed, "synthetic histories")
    strategies = (*(f"specialist_{g}" for g in range(n_types)), "mixed")
    orders = [*members, torch.arange(n_items)]
    lists = torch.full((len(start_user), len(strategies), length), -1, dtype=torch.int32)
    popularity = torch.full((n_items,), 0.5)
    taste = torch.zeros(n_items, taste_dim)
    taste[:, :n_types] = one_hot
    histories: list[Tensor] = []
    for row, (user, size) in enumerate(zip(start_user.tolist(), start_length.tolist(), strict=True)):
        own = members[int(user_type[user])]
        history = own[torch.from_numpy(rng.permutation(len(own))[:size])]
        histories.append(history)
        for k, order in enumerate(orders):
            ranked = orders[-1] if identical else order
            unseen = ranked[~torch.isin(ranked, history)]
            lists[row, k] = unseen[:length].to(torch.int32)
    taste_sum = torch.stack([taste[h].sum(dim=0) for h in histories])
    return World(
        name="synthetic_null" if identical else "synthetic",
        strategies=strategies,
        outcomes=("click",),
        horizon=horizon,
        slate_size=slate_size,
        seed=seed,
        reward_scale=round((probability[0] + (n_types - 1) * probability[1]) / n_types, 6),
        tensors={
            "outcome_weights": torch.ones(1),
            "costs": torch.linspace(0.2, 1.0, len(strategies)),
            "item_taste": taste,
            "item_popularity": popularity,
            "item_category": one_hot,
            "start_user": start_user,
            "start_fold": user_fold[start_user].to(torch.int8),
            "start_length": start_length,
            "start_lists": lists,
            "start_state": torch.zeros(len(start_user), response.state_dim),
            "start_taste": taste_sum,
            "start_category": torch.stack([one_hot[h].sum(dim=0) for h in histories]),
            "start_popularity": start_length * 0.5,
            "start_gap": torch.zeros(len(start_user)),
            "start_list_stats": _list_stats(lists, popularity, taste, taste_sum),
        },
        responses={"A": response, "B": response},
        info={
            "card": {"source": "synthetic, by construction", "licence": "Apache-2.0"},
            "metrics": {"users_by_fold": {"A": n_users // 2, "B": n_users // 2}},
        },
    )
