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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metarec_gym.places import world_folder
from metarec_gym.response.frozen import AnyJudge, LoggedResponse, make_judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metarec_gym.data.interactions import InteractionLog
    from metarec_gym.recommenders.base import Strategy
    from metarec_gym.response.config import ResponseConfig

WORLD_SCHEMA = 3
FOLDS = ("A", "B")
LIST_FEATURES = ("popularity", "agreement", "similarity")
"""What an observation says of a strategy's list, each over its first `LIST_HEAD` items."""
LIST_HEAD = 20
SECOND = "second"
"""Judge of a second family: it shares neither form nor item space with the main one, and re-scores final tables."""

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
    "start_list_scores": "float16, shape of start_lists: standard score of each listed item for its strategy (see Pool.ranked)",
    "start_state": "(n_starts, state_dim) the fold's main judge (and its variants) after the history",
    "start_state_second": "(n_starts, state_dim of the second family) the second family's judge; no columns without one",
    "start_taste": "(n_starts, n_taste) sum of item_taste over the history",
    "start_category": "(n_starts, n_categories) sum of item_category over the history",
    "start_popularity": "(n_starts,) sum of item_popularity over the history",
    "start_gap": "(n_starts,) time between the last two events of the history, 0 = none or one event, 1 = a year",
    "start_list_stats": "(n_starts, n_strategies, 3) " + ", ".join(LIST_FEATURES),
    "start_time": "(n_starts,) float64 unix seconds of the last event of the history; cold: of the user's first event",
    "start_sessions": "(n_starts,) sessions in the history",
    "start_previous_gap": "(n_starts,) hours between the history's last session and the one before it; 0 = none",
    "period_starts": "(n_periods,) float64 unix seconds at which each row of the judges' `trend` begins",
    "user_events": "int32 (n_events,) items taken by the users, in time order, one user after the other",
    "user_event_offsets": "int64 (n_users + 1,) where each user's events begin",
}


class Ranker(Protocol):
    """Ranks the strategies' lists for live histories; `Pool` is one."""

    def top_lists(self, histories: Tensor, length: int, *, exclude: Tensor | None = None) -> Tensor:
        """int64 (batch, H), newest last, -1 on the left -> int64 (batch, K, length), -1 where the catalogue ran out."""
        ...

    def ranked(self, histories: Tensor, length: int, *, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `top_lists`, and the standard score of each listed item for its strategy; float16 (batch, K, length)."""
        ...


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
        responses: The frozen judges: "A" and "B", one a fold, and variants of them: "A/second" (second family), "A/uniform"
            (another sampler of negatives) and so on.
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
    responses: dict[str, AnyJudge]
    info: dict[str, Any] = field(default_factory=dict)
    ranker: Ranker | None = None
    """Ranks lists for live histories; read from `folder` on first use if None."""
    folder: Path | None = None
    """Where the world was loaded from or saved to."""

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

    def judge(self, fold: str, name: str = "main") -> AnyJudge:
        """The judge of a fold: `main`, or a variant by name (see `judge_names`).

        Raises:
            ValueError: When the world has no such judge.
        """
        key = fold if name == "main" else f"{fold}/{name}"
        if key not in self.responses:
            raise ValueError(
                f"the world {self.name!r} has no judge {name!r} for fold {fold}; it has {self.judge_names(fold)}: build it with "
                "variants (experiments.build_world --variants)"
            )
        return self.responses[key]

    def judge_names(self, fold: str) -> tuple[str, ...]:
        """Names of a fold's judges, `main` first."""
        variants = sorted(key.split("/", 1)[1] for key in self.responses if key.startswith(f"{fold}/"))
        return ("main", *variants)

    def start_states(self, name: str = "main") -> Tensor:
        """The start states as the judge `name` sees them; float32 (n_starts, state_dim)."""
        return self.tensors["start_state_second" if name == SECOND else "start_state"]

    @property
    def latencies(self) -> Tensor:
        """Measured seconds a request over those of the slowest strategy; (n_strategies,). Not hashed: no two builds agree."""
        seconds = self.metrics.get("cost_seconds", {})
        value = torch.tensor([float(seconds.get(name, 0.0)) for name in self.strategies])
        return value / value.max().clamp(min=1e-12)

    def history_of(self, starts: Tensor) -> Tensor:
        """Histories of start states; int64 (rows,) -> int64 (rows, H), newest last, -1 on the left."""
        t = self.tensors
        length = t["start_length"][starts].to(torch.int64)
        width = int(length.max()) if len(length) else 0
        back = torch.arange(width, 0, -1)
        place = t["user_event_offsets"][t["start_user"][starts]][:, None] + length[:, None] - back[None, :]
        inside = back[None, :] <= length[:, None]
        if width == 0:
            return torch.full((len(starts), 0), -1, dtype=torch.int64)
        return torch.where(inside, t["user_events"][place.clamp(min=0)].to(torch.int64), -1)

    def top_lists(
        self, histories: Tensor, length: int, *, exclude: Tensor | None = None, user: Tensor | None = None
    ) -> Tensor:
        """Ranks the strategies' lists for live histories.

        Args:
            histories: int64 (rows, H), newest last, -1 on the left.
            length: Items in a list.
            exclude: bool (rows, n_items), items that may not be listed; None = only the history is left out.
            user: int64 (rows,), whose histories these are; needed where answers are looked up, to leave out unobserved pairs.

        Returns:
            int64 (rows, K, length), -1 where a list has no more items.

        Raises:
            WorldError: When the world was built without its strategies at hand.
        """
        return self._ranker(histories.device).top_lists(histories, length, exclude=self._barred(exclude, user))

    def ranked(
        self, histories: Tensor, length: int, *, exclude: Tensor | None = None, user: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `top_lists`, and the standard score of each listed item for its strategy; float16 (rows, K, length)."""
        return self._ranker(histories.device).ranked(histories, length, exclude=self._barred(exclude, user))

    def _barred(self, exclude: Tensor | None, user: Tensor | None) -> Tensor | None:
        """Items that may not be listed: those of `exclude`, and in a world of logged answers the unobserved ones."""
        judge = self.responses["A"]
        if not isinstance(judge, LoggedResponse):
            return exclude
        if user is None:
            raise WorldError("a world of logged answers ranks observed items only: hand over `user`")
        unobserved = ~judge.observed[user.to(judge.device)].to(user.device)
        return unobserved if exclude is None else exclude | unobserved

    def _ranker(self, device: torch.device) -> Ranker:
        if self.ranker is None:
            if self.folder is None or not (self.folder / "strategies.json").is_file():
                raise WorldError(
                    f"the world {self.name!r} has no strategies beside it, so lists cannot be ranked again; load it from the "
                    "folder that experiments.build_world wrote"
                )
            from metarec_gym.recommenders.pool import Pool

            # a frozen dataclass: the cache is set once, and changes nothing that is hashed
            object.__setattr__(self, "ranker", Pool.load(self.folder))
        ranker = self.ranker
        assert ranker is not None
        move = getattr(ranker, "to", None)
        return ranker if move is None or getattr(ranker, "device", device) == device else move(device)

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
        for judge, response in self.responses.items():
            flat |= {f"response_{judge}.{name}": tensor.cpu().clone() for name, tensor in response.tensors.items()}
        orders = getattr(self.ranker, "orders", None)
        if orders is not None:
            flat["ranker.orders"] = orders.clone()
        save_file(flat, str(partial / "world.safetensors"))
        header = self._identity() | {
            "hash": self.hash,
            "feature_names": {judge: response.feature_names for judge, response in self.responses.items()},
            "info": self.info,
        }
        (partial / "world.json").write_text(json.dumps(header, indent=2, sort_keys=True) + "\n")
        # validity.json speaks of one world only; a page about an older one must not survive it
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
        if header.get("schema", 0) < WORLD_SCHEMA:
            raise WorldError(
                f"{folder} has world schema {header.get('schema')}, this metarec_gym reads {WORLD_SCHEMA} (judges with members, "
                f"sessions, dates, scores of listed items); {rebuild}"
            )
        try:
            flat = load_file(str(folder / "world.safetensors"))
            responses = {
                judge: make_judge(
                    {n.split(".", 1)[1]: t for n, t in flat.items() if n.startswith(f"response_{judge}.")},
                    tuple(header["outcomes"]),
                    tuple(names),
                )
                for judge, names in header["feature_names"].items()
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
                ranker=_fixed_orders(flat),
                folder=folder,
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
        pool: Sequence[str | Strategy] | None = None,
        starts_per_user: int = 8,
        slate_size: int = 5,
        horizon: int | None = None,
        out: str | Path | None = None,
        progress: bool = True,
        replicas: int = 200,
        response_config: ResponseConfig | None = None,
        members: int = 2,
        variants: bool = True,
        response: Literal["model", "logged"] = "model",
        session_gap_s: float | None = None,
        workers: int = 1,
        device: str = "cpu",
    ) -> World:
        """Turns a log into a world: fold S fits the strategies, folds A and B fit one judge each.

        Args:
            log: The validated log.
            seed: Decides folds, fits and start states.
            pool: Strategies: names, `production=scores.parquet`, `my_module:MyStrategy` (see `recommenders.make_strategy`), or
                strategies of your own; the default pool if None.
            starts_per_user: Start states for each user of folds A and B; the first is cold (empty history), the others have
                history lengths drawn log-uniformly up to the user's own.
            slate_size: Items a request.
            horizon: Requests an episode; None takes the largest sound one.
            out: Folder to save to; finished stages are kept beside it (`<out>.partial`) and found again after a kill.
            progress: Shows a line and a bar for each stage.
            replicas: Emitted logs of the posterior predictive check; 0 leaves the check out.
            response_config: How the judges are fitted; None = the defaults.
            members: Networks in each judge; an episode meets one of them.
            variants: Also fits a judge of a second family and, for positives-only logs, judges with other samplers of negatives.
            response: "logged" answers by look-up: for logs in which (nearly) every user met every item.
            session_gap_s: Longest pause inside a session in seconds, for logs without session ids; None fits it from the times
                between events.
            workers: Processes that fit judges side by side; more than 1 needs a script that guards its main part.
            device: Where strategies that learn with torch and the judges are fitted and the lists ranked: `cpu`, `cuda`, or
                `auto`, which takes a GPU where there is one; the world itself is on the CPU, and its metrics say where it was
                built. On another device kernels round otherwise: it is another world. On CUDA some add in no fixed order, so two
                builds may differ in their last bits.

        Returns:
            The world, saved to `out` when that is given.

        Raises:
            ValueError: When the device is not there.
            WorldError: When the log is too small to split, the horizon is longer than the catalogue allows, or answers cannot be
                looked up because most pairs were never observed.
        """
        from metarec_gym.devices import device_of
        from metarec_gym.world_building import Builder

        return Builder(
            log=log,
            seed=seed,
            pool=pool,
            starts_per_user=starts_per_user,
            slate_size=slate_size,
            horizon=horizon,
            out=out,
            progress=progress,
            replicas=replicas,
            response_config=response_config,
            members=members,
            variants=variants,
            response=response,
            session_gap_s=session_gap_s,
            workers=workers,
            device=device_of(device),
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
        leaving: tuple[float, ...] | None = (-6.0, 0.8),
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
            leaving: Logit of leaving after a request: intercept, weight per request since the last click, per share of the slate
                taken, per mean exposure of the slate (missing ones are 0); None = never.
            identical: All strategies serve the list of `mixed`: nothing can be won by selecting.
            seed: Decides the users' histories.

        Raises:
            WorldError: When the categories are too small for the horizon.
        """
        from metarec_gym.world_synthetic import synthetic_world

        return synthetic_world(
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
    """The world itself, the one in a folder (each folder is read once), the one of a name, or the synthetic default for None.

    Args:
        world: A World, a folder, a name such as "movielens_100k" (see `metarec_gym.places`), or None.

    Raises:
        FileNotFoundError: When the folder has no world, or there is none of that name; the message has the commands.
        WorldError: When it is damaged.
    """
    if isinstance(world, World):
        return world
    if world is None:
        return _default_world()
    folder = world_folder(world)
    file = folder / "world.json"
    if not file.is_file():
        return World.load(folder)
    key = (str(file.resolve()), file.stat().st_mtime_ns)
    if key not in _LOADED:
        _LOADED[key] = World.load(folder)
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
    responses: dict[str, AnyJudge] = {}
    for judge, response in world.responses.items():
        parts = {n: t.clone() for n, t in response.tensors.items()}
        for name in ("effect_mean", "effect_chol"):
            if name in parts:
                parts[name][index] = 0.0
        if "answers" in parts:
            parts["answers"][index] = torch.nan
        responses[judge] = make_judge(parts, response.outcomes, response.feature_names)
    tensors |= _without_events(tensors, index)
    users = users.drop(index=hit)
    partial = folder / "users.parquet.partial"
    users.to_parquet(partial, index=False)
    os.replace(partial, folder / "users.parquet")
    erased = replace(world, tensors=tensors, responses=responses)
    erased.save(folder)
    return erased


def _without_events(tensors: dict[str, Tensor], user: int) -> dict[str, Tensor]:
    """The event tables without one user's events."""
    offsets = tensors["user_event_offsets"].clone()
    lo, hi = int(offsets[user]), int(offsets[user + 1])
    events = torch.cat([tensors["user_events"][:lo], tensors["user_events"][hi:]])
    offsets[user + 1 :] -= hi - lo
    return {"user_events": events, "user_event_offsets": offsets}


def _fixed_orders(flat: dict[str, Tensor]) -> Ranker | None:
    """The ranker of a synthetic world, which is small enough to be kept in the file; None for a built world."""
    if "ranker.orders" not in flat:
        return None
    from metarec_gym.world_synthetic import FixedOrders

    return FixedOrders(flat["ranker.orders"], int(flat["world.item_popularity"].shape[0]))


def start_tables() -> tuple[str, ...]:
    """Names of the tables with one row a start state."""
    return tuple(name for name in _TENSORS if name.startswith("start_"))


def list_stats(lists: Tensor, popularity: Tensor, taste: Tensor, taste_sum: Tensor) -> Tensor:
    """Mean popularity, agreement with the other strategies and similarity to the taste; -> (rows, K, 3) in [-1, 1]."""
    head = lists[:, :, :LIST_HEAD].to(torch.int64)
    valid = (head >= 0).to(torch.float32)
    safe, size = head.clamp(min=0), valid.sum(dim=2).clamp(min=1.0)
    mean_popularity = (popularity[safe] * valid).sum(dim=2) / size
    direction = torch.nn.functional.normalize(taste_sum, dim=1)
    closeness = (taste[safe] * direction[:, None, None, :]).sum(dim=-1)
    similarity = (closeness * valid).sum(dim=2) / size
    strategies = head.shape[1]
    column = torch.where(head < 0, len(popularity), head)
    listed = torch.zeros(head.shape[0], len(popularity) + 1, device=lists.device)
    for k in range(strategies):
        listed.scatter_add_(1, column[:, k], valid[:, k])
    # in how many lists each item stands, its own included
    shared = (listed.gather(1, column.flatten(1)).view(head.shape) * valid).sum(dim=2) / size
    # a list agrees fully with itself; that is no news
    agreement = (shared - 1.0) / max(strategies - 1, 1)
    return torch.stack([mean_popularity, agreement.clamp(0.0, 1.0), similarity], dim=2)
