"""Plays policies from given start states with common random numbers and keeps what evaluation needs of every request.

A row is one episode: a start state and a replicate. The environment's draws are keyed by (seed, user, replicate,
request, item, outcome), the policy's by (seed, start state, replicate, request), so every policy meets the same luck
and a difference between two policies on the same rows is theirs alone. A policy that blends strategies, or gives each place
of a slate its own, is played in an environment of its kind of action with that same luck, and pays for all that it asks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_gym.policy import ActingPolicy, Chooses, Policy, masked_uniform, one_hot_probs, sample_actions
from metarec_gym.seeding import fold_in, mix, stream, uniform

if TYPE_CHECKING:
    from metarec_gym.world import World

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Which episodes a batch of rows plays; all tensors int64 (rows,).

    Attributes:
        context: Index into the rollout's list of start states.
        start_state: Index into the world's start states.
        replicate: 0 .. replicates - 1; `noise_base + replicate` is the key of the row's luck.
        history_length: Items in the history at the start.
    """

    context: Tensor
    start_state: Tensor
    replicate: Tensor
    history_length: Tensor


@runtime_checkable
class RowRule(Protocol):
    """A rule that looks at no observation: it knows which episode a row plays and which request this is."""

    def row_choice(self, rows: Rows, request: int) -> Tensor:
        """Strategy of every row at the request (0, 1, ...); int64 (rows,)."""


@dataclass(frozen=True)
class Fixed:
    """Always the same strategy."""

    strategy: int

    def row_choice(self, rows: Rows, request: int) -> Tensor:
        """The strategy for every row."""
        return torch.full_like(rows.context, self.strategy)


@dataclass(frozen=True)
class Rotation:
    """One strategy after the other, in turn."""

    strategies: tuple[int, ...]

    def row_choice(self, rows: Rows, request: int) -> Tensor:
        """The request's strategy for every row."""
        return torch.full_like(rows.context, self.strategies[request % len(self.strategies)])


@dataclass(frozen=True)
class LengthRule:
    """A strategy for each range of history lengths at the start of the episode.

    Attributes:
        edges: Ascending; a history shorter than `edges[i]` and not shorter than `edges[i - 1]` is in range i.
        strategies: One more than there are edges.
    """

    edges: tuple[int, ...]
    strategies: tuple[int, ...]

    def bins(self, history_length: Tensor) -> Tensor:
        """Range of each history length; int64, shape as given."""
        edges = torch.tensor(self.edges, dtype=torch.int64, device=history_length.device)
        return torch.bucketize(history_length, edges, right=True)

    def row_choice(self, rows: Rows, request: int) -> Tensor:
        """The strategy of each row's range."""
        table = torch.tensor(self.strategies, dtype=torch.int64, device=rows.context.device)
        return table[self.bins(rows.history_length)]


@dataclass(frozen=True)
class Schedule:
    """A strategy for each request, the same for all users whose history length is in one range.

    Attributes:
        edges: As in `LengthRule`; empty for one range.
        table: For each range the strategies in order of the requests; the last one goes on.
    """

    edges: tuple[int, ...]
    table: tuple[tuple[int, ...], ...]

    def row_choice(self, rows: Rows, request: int) -> Tensor:
        """The request's strategy of each row's range."""
        now = torch.tensor([turns[min(request, len(turns) - 1)] for turns in self.table], device=rows.context.device)
        edges = torch.tensor(self.edges, dtype=torch.int64, device=rows.context.device)
        return now[torch.bucketize(rows.history_length, edges, right=True)]


@dataclass(frozen=True, eq=False)
class Choices:
    """Stored choices: one strategy for each start state and replicate, kept through the episode.

    Attributes:
        strategy: int64 (contexts, replicates).
    """

    strategy: Tensor

    def row_choice(self, rows: Rows, request: int) -> Tensor:
        """The stored strategy of each row."""
        return self.strategy.to(rows.context.device)[rows.context, rows.replicate]


class Seat(Protocol):
    """A privileged reference at play: it looks into the environment that it plays."""

    def begin(self, env: Any) -> None:
        """All rows of `env` have just been reset."""

    def choose(self, env: Any, action_mask: Tensor, request: int) -> Tensor:
        """Strategy of every row at the request (0, 1, ...); bool (num_envs, K) -> int64 (num_envs,)."""


@runtime_checkable
class Privileged(Protocol):
    """A reference that sees what no policy may see: for evaluation only."""

    def effort(self, n_strategies: int) -> int:
        """Work of one request, in requests of a fixed strategy."""

    def seat(self, make_env: Callable[[int], Any]) -> Seat:
        """The reference at play; `make_env` makes environments like the one played, for a number of rows."""


class Greedy:
    """At each state the strategy of highest true expected immediate reward: privileged, myopic, no upper bound."""

    def effort(self, n_strategies: int) -> int:
        """Every strategy's slate is looked at, and one is served."""
        return 1 + n_strategies // 2

    def seat(self, make_env: Callable[[int], Any]) -> Seat:
        """It needs nothing but the environment."""
        return self

    def begin(self, env: Any) -> None:
        """Nothing is remembered."""

    def choose(self, env: Any, action_mask: Tensor, request: int) -> Tensor:
        """The strategy that is worth most right now."""
        best: Tensor = env.peek_expected_rewards().masked_fill(~action_mask, -torch.inf).argmax(dim=1)
        return best


Player = Policy | ActingPolicy | RowRule | Privileged | Callable[[], Policy]
"""What can be played: a policy (or a function that makes one), a rule over rows, or a privileged reference."""


def action_of(player: Player) -> Chooses:
    """Kind of action that the player's environment must have: its `chooses`, and `select` where it says nothing."""
    found: Chooses = getattr(player, "chooses", "select")
    return found


def effort_of(player: Player, n_strategies: int) -> int:
    """Work of one request, in requests of a fixed strategy."""
    return player.effort(n_strategies) if isinstance(player, Privileged) else 1


OWN_SETTINGS = ("action", "fold", "horizon", "slate_size", "cost_weight")
"""Settings of the environment that an evaluation sets by itself."""


def check_env_settings(env: Mapping[str, Any]) -> None:
    """Refuses extra environment settings that do not exist, that the evaluation sets itself, or that JSON cannot hold.

    Args:
        env: Settings by name, as `EnvConfig` has them.

    Raises:
        ValueError: With what is possible.
    """
    from metarec_gym.envs.config import EnvConfig

    known = [f.name for f in fields(EnvConfig) if f.name not in OWN_SETTINGS]
    wrong = sorted(set(env) - set(known))
    if wrong:
        raise ValueError(f"the environment settings name {wrong}; possible are {', '.join(known)}")
    try:
        json.dumps(env)
    except TypeError as error:
        raise ValueError(f"the environment settings {dict(env)!r} are not JSON values: {error}") from error


@dataclass(frozen=True)
class Window:
    """The requests `first + 1 .. last` of an episode, whose mean reward is one reported value."""

    name: str
    first: int
    last: int

    @classmethod
    def until(cls, horizon: int) -> Window:
        """All requests up to the horizon."""
        return cls(f"@{horizon}", 0, horizon)

    @classmethod
    def last_tenth(cls, horizon: int) -> Window:
        """The last tenth of the requests, at least one."""
        return cls("last tenth", horizon - max(1, -(-horizon // 10)), horizon)


@dataclass(frozen=True)
class RolloutResult:
    """What happened, request by request. C start states, R replicates, T requests.

    Attributes:
        start_state: int64 (C,).
        user: int64 (C,).
        history_length: int64 (C,).
        noise: int64 (R,), keys of the luck.
        expected: float32 (C, R, T), expected reward given state and drawn user effects; 0 after leaving.
        reward: float32 (C, R, T), sampled reward; 0 after leaving.
        action: int16 (C, R, T), the strategy that served, of several the one of the largest share; -1 after leaving.
        alive: bool (C, R, T), the request was served.
        engaged: int16 (C, R, T), items the user took.
        share: float64 (C, R, K), each strategy's share in a request, summed over the requests served; None where one serves.
        asked: int64 (C, R, K), requests for which each strategy had to rank; None where one serves.
    """

    start_state: NDArray[np.int64]
    user: NDArray[np.int64]
    history_length: NDArray[np.int64]
    noise: NDArray[np.int64]
    expected: NDArray[np.float32]
    reward: NDArray[np.float32]
    action: NDArray[np.int16]
    alive: NDArray[np.bool_]
    engaged: NDArray[np.int16]
    share: Floats | None = None
    asked: NDArray[np.int64] | None = None

    def value(self, window: Window) -> Floats:
        """Mean expected reward a request of every episode, zero after leaving; (C, R)."""
        span = self.expected[:, :, window.first : window.last].astype(np.float64)
        total: Floats = span.sum(axis=2)
        return total / (window.last - window.first)

    def played(self, windows: Sequence[Window], n_strategies: int) -> Played:
        """The summary that is stored and compared."""
        if self.share is None:
            counts = np.stack([(self.action == k).sum(axis=(1, 2)) for k in range(n_strategies)], axis=1)
            served: NDArray[Any] = counts.astype(np.int64)
        else:
            served = self.share.sum(axis=1)
        return Played(
            start_state=self.start_state,
            user=self.user,
            history_length=self.history_length,
            noise=self.noise,
            value=np.stack([self.value(w) for w in windows], axis=2),
            by_request=self.expected.mean(axis=1, dtype=np.float64),
            served=served,
            engaged=self.engaged.mean(axis=1, dtype=np.float64).cumsum(axis=1),
            asked=None if self.asked is None else self.asked.sum(axis=1),
        )


@dataclass(frozen=True)
class Played:
    """What is kept of a policy's episodes. C start states, R replicates, T requests, P windows, K strategies.

    Attributes:
        start_state: int64 (C,).
        user: int64 (C,).
        history_length: int64 (C,).
        noise: int64 (R,).
        value: float64 (C, R, P), mean expected reward a request.
        by_request: float64 (C, T), expected reward of each request, mean over replicates.
        served: int64 (C, K), requests that each strategy served; where several serve one, float64, the sum of their shares.
        engaged: float64 (C, T), items taken so far, mean over replicates.
        asked: int64 (C, K), requests for which each strategy had to rank; None where one strategy serves a request.
    """

    start_state: NDArray[np.int64]
    user: NDArray[np.int64]
    history_length: NDArray[np.int64]
    noise: NDArray[np.int64]
    value: Floats
    by_request: Floats
    served: NDArray[Any]
    engaged: Floats
    asked: NDArray[np.int64] | None = None

    @property
    def paid(self) -> NDArray[Any]:
        """Requests that each strategy costs, (C, K): all that it was asked for, not its share in them alone."""
        return self.served if self.asked is None else self.asked

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Its arrays by name, for an .npz file."""
        return {name: array for name, array in vars(self).items() if array is not None}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Played:
        """The inverse of `arrays`."""
        return cls(**arrays)


def per_user(user: NDArray[np.int64], values: NDArray[Any]) -> Floats:
    """Mean over each user's start states; (C, ...) -> (users, ...), users ascending."""
    _, place, counts = np.unique(user, return_inverse=True, return_counts=True)
    total = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(total, place, values.astype(np.float64))
    return total / counts.reshape(-1, *[1] * (values.ndim - 1))


def pick_contexts(world: World, fold: str, *, per_user: int, seed: int, max_users: int | None = None) -> Tensor:
    """Start states to play: `per_user` of each user of the fold, picked by keyed draws.

    Args:
        world: The world.
        fold: "A" or "B".
        per_user: Start states a user; users with fewer give all they have.
        seed: Decides which.
        max_users: Keep at most this many users, picked by keyed draws; None keeps all.

    Returns:
        int64 (C,), ascending.
    """
    starts = world.starts_of(fold)
    user = world.tensors["start_user"][starts]
    root = mix(torch.tensor(stream(seed, "contexts")))
    order = torch.argsort(fold_in(root, starts), stable=True)
    order = order[torch.argsort(user[order], stable=True)]
    _, counts = torch.unique_consecutive(user[order], return_counts=True)
    first = torch.cumsum(counts, 0) - counts
    rank = torch.arange(len(order)) - torch.repeat_interleave(first, counts)
    chosen = order[rank < per_user]
    if max_users is not None and len(counts) > max_users:
        users = user[order[first]]
        kept = users[torch.argsort(fold_in(fold_in(root, -1), users), stable=True)[:max_users]]
        chosen = chosen[torch.isin(user[chosen], kept)]
    return starts[chosen].sort().values


def rollout(
    world: World,
    fold: str,
    player: Player,
    *,
    contexts: Tensor,
    replicates: int,
    horizon: int,
    env_seed: int,
    slate_size: int | None = None,
    cost_weight: float = 0.0,
    env_settings: Mapping[str, Any] | None = None,
    noise_base: int = 0,
    device: str | torch.device = "cpu",
    batch_rows: int = 2048,
    progress: Callable[[int], object] | None = None,
    make_env: Callable[[int], Any] | None = None,
) -> RolloutResult:
    """Plays one episode for each (start state, replicate).

    Args:
        world: The world.
        fold: Whose users, and whose judge: "A" or "B".
        player: What chooses the strategies; a policy's probabilities are sampled with keyed draws. Its `chooses` decides the
            environment's kind of action.
        contexts: int64 (C,), start states of the fold.
        replicates: Episodes from each start state, R.
        horizon: Requests an episode, T.
        env_seed: Seed of the draws; equal seeds give equal luck to every player.
        slate_size: Items a request; None takes the world's.
        cost_weight: Reward lost for the relative serving cost.
        env_settings: Further keyword arguments of the environment (`judge`, `session_requests` ...).
        noise_base: Key of the first replicate's luck; replicate r has `noise_base + r`.
        device: Where the environment runs.
        batch_rows: Episodes played side by side.
        progress: Called after every request with the number of users just served.
        make_env: Makes the environment for a number of rows; None makes `MetaRecVectorEnv`.

    Returns:
        What happened.

    Raises:
        ValueError: When there is nothing to play, or `make_env` makes an environment of another kind of action.
    """
    n_contexts = len(contexts)
    total = n_contexts * replicates
    if total == 0:
        raise ValueError(f"{n_contexts} start states and {replicates} replicates leave no episode to play")
    if make_env is None:
        kind = action_of(player)
        make_env = env_maker(world, fold, horizon, slate_size, cost_weight, env_settings, device, action=kind)
    context = torch.arange(n_contexts).repeat_interleave(replicates)
    replicate = torch.arange(replicates).repeat(n_contexts)
    batch = min(batch_rows, total)
    env = make_env(batch)
    seat = player.seat(make_env) if isinstance(player, Privileged) else None
    parts: list[dict[str, NDArray[Any]]] = []
    with torch.no_grad():
        for low in range(0, total, batch):
            # the last batch is filled up with its first row, which is thrown away: the environment keeps its size
            index = torch.arange(low, low + batch)
            index = torch.where(index < total, index, low)
            start = contexts[context[index]]
            rows = Rows(context[index], start, replicate[index], world.tensors["start_length"][start].to(torch.int64))
            kept = min(batch, total - low)
            tick = functools.partial(progress, kept) if progress is not None else None
            part = _play(env, player, seat, rows, noise_base, horizon, env_seed, device, tick)
            parts.append({name: array[:kept] for name, array in part.items()})
    env.close()
    # the last dimension: requests, and of shares the strategies
    merged: dict[str, Any] = {
        name: np.concatenate([p[name] for p in parts]).reshape(n_contexts, replicates, -1) for name in parts[0]
    }
    return RolloutResult(
        start_state=contexts.numpy(),
        user=world.tensors["start_user"][contexts].to(torch.int64).numpy(),
        history_length=world.tensors["start_length"][contexts].to(torch.int64).numpy(),
        noise=np.arange(noise_base, noise_base + replicates),
        **merged,
    )


def greedy_schedule(
    world: World,
    fold: str,
    *,
    contexts: Tensor,
    edges: tuple[int, ...],
    horizon: int,
    env_seed: int,
    slate_size: int | None = None,
    cost_weight: float = 0.0,
    env_settings: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> Schedule:
    """Learns a schedule from training users: at each request the strategy that is worth most to them on average.

    All users are played side by side by the schedule found so far, so what was shown before is taken into account.

    Args:
        world: The world.
        fold: Whose users to learn from.
        contexts: int64 (C,), start states of the fold, one episode each.
        edges: Ranges of history lengths that get schedules of their own, see `LengthRule`.
        horizon: Requests an episode.
        env_seed: Seed of the draws.
        slate_size: Items a request; None takes the world's.
        cost_weight: Reward lost for the relative serving cost.
        env_settings: Further keyword arguments of the environment.
        device: Where the environment runs.

    Returns:
        The schedule.
    """
    env = env_maker(world, fold, horizon, slate_size, cost_weight, env_settings, device)(len(contexts))
    lengths = world.tensors["start_length"][contexts].to(torch.int64)
    place = torch.bucketize(lengths, torch.tensor(edges, dtype=torch.int64), right=True).to(device)
    where = torch.nn.functional.one_hot(place, len(edges) + 1).to(torch.float64)
    table: list[list[int]] = [[] for _ in range(len(edges) + 1)]
    with torch.no_grad():
        _, info = env.reset(
            seed=env_seed, options={"start_state": contexts.to(device), "noise": torch.zeros_like(contexts).to(device)}
        )
        alive = torch.ones(len(contexts), dtype=torch.float64, device=device)
        key = fold_in(mix(torch.tensor(stream(env_seed, "policy draws"))), contexts).to(device)
        for request in range(horizon):
            mask = torch.as_tensor(info["action_mask"], device=device).to(torch.bool)
            worth = env.peek_expected_rewards().to(torch.float64) * alive[:, None]
            # mean over the range's users; users who left are worth nothing under any strategy
            best = (where.T @ worth).masked_fill(~mask.any(dim=0), -torch.inf).argmax(dim=1)
            for turns, strategy in zip(table, best.tolist(), strict=True):
                turns.append(int(strategy))
            action = _rule_action(best[place], mask, fold_in(key, request))
            _, _, terminated, truncated, info = env.step(action)
            alive = alive * (~(terminated | truncated)).to(torch.float64)
    env.close()
    return Schedule(edges, tuple(tuple(turns) for turns in table))


def env_maker(
    world: World,
    fold: str,
    horizon: int,
    slate_size: int | None,
    cost_weight: float,
    env_settings: Mapping[str, Any] | None,
    device: str | torch.device,
    *,
    action: Chooses = "select",
) -> Callable[[int], Any]:
    """A function that makes the environment policies are played in, for a number of rows."""
    settings = dict(env_settings or {})
    check_env_settings(settings)

    def make(num_envs: int) -> Any:
        from metarec_gym.envs.vector_env import MetaRecVectorEnv

        return MetaRecVectorEnv(
            num_envs,
            world=world,
            fold=fold,
            horizon=horizon,
            slate_size=slate_size,
            cost_weight=cost_weight,
            device=str(device),
            output="torch",
            autoreset_mode="Disabled",
            action=action,
            **settings,
        )

    return make


def _play(
    env: Any,
    player: Player,
    seat: Seat | None,
    rows: Rows,
    noise_base: int,
    horizon: int,
    env_seed: int,
    device: str | torch.device,
    tick: Callable[[], object] | None,
) -> dict[str, NDArray[Any]]:
    n = len(rows.context)
    noise = noise_base + rows.replicate
    options = {"start_state": rows.start_state.to(device), "noise": noise.to(device)}
    obs, info = env.reset(seed=env_seed, options=options)
    rows = Rows(*(getattr(rows, f).to(device) for f in ("context", "start_state", "replicate", "history_length")))
    # the policy's luck hangs on the episode, never on the row or the batch
    key = fold_in(mix(torch.tensor(stream(env_seed, "policy draws"))).to(device), rows.start_state)
    key = fold_in(key, noise.to(device))
    rule = player if isinstance(player, RowRule) else None
    policy = None if seat is not None or rule is not None else _as_policy(cast("Policy", player))
    kind = action_of(policy) if policy is not None else "select"
    if kind != "select":
        _check_kind(env, kind)
    if seat is not None:
        seat.begin(env)
    if policy is not None:
        policy.begin(n, device)
    alive = torch.ones(n, dtype=torch.bool, device=device)
    out: dict[str, list[Tensor]] = {name: [] for name in ("expected", "reward", "action", "alive", "engaged")}
    shares = _Shares(env, n) if kind != "select" else None
    for request in range(horizon):
        mask = torch.as_tensor(info["action_mask"], device=device).to(torch.bool)
        if seat is not None:
            action = seat.choose(env, mask, request)
        elif rule is not None:
            action = _rule_action(rule.row_choice(rows, request), mask, fold_in(key, request))
        elif shares is not None:
            action = cast(ActingPolicy, policy).act(obs, mask, shares.draws(fold_in(key, request)))
        else:
            probs = cast(Policy, policy).action_probs(obs, mask)
            action = sample_actions(probs, uniform(fold_in(key, request)))
        seen = obs
        obs, reward, terminated, truncated, info = env.step(action)
        reward = torch.where(alive, reward.to(torch.float32), 0.0)
        out["expected"].append(torch.where(alive, env.expected_reward, 0.0))
        out["reward"].append(reward)
        server = action if shares is None else shares.add(info, alive)
        out["action"].append(torch.where(alive, server, -1).to(torch.int16))
        out["alive"].append(alive)
        taken = torch.as_tensor(info["outcomes"], device=device)[:, :, 0] > 0
        out["engaged"].append(torch.where(alive, taken.sum(dim=1), 0).to(torch.int16))
        if policy is not None:
            policy.observe(seen, action, reward, alive)
        alive = alive & ~(terminated | truncated)
        if tick is not None:
            tick()
    arrays: dict[str, NDArray[Any]] = {name: torch.stack(steps, dim=1).cpu().numpy() for name, steps in out.items()}
    return arrays if shares is None else arrays | shares.arrays()


class _Shares:
    """Who had which share in the requests of rows that several strategies serve together."""

    def __init__(self, env: Any, rows: int) -> None:
        self.strategies, self.blends = env.world.n_strategies, env.config.action == "blend"
        self.share = torch.zeros(rows, self.strategies, dtype=torch.float64, device=env.device)
        self.asked = torch.zeros(rows, self.strategies, dtype=torch.int64, device=env.device)
        self.numbers = torch.arange(self.strategies if self.blends else env.slate_size, device=env.device)

    def draws(self, key: Tensor) -> Tensor:
        """A uniform draw for each number of the action; int64 (rows,) -> float32 (rows, K or slate_size)."""
        return uniform(fold_in(key[:, None], self.numbers))

    def add(self, info: Mapping[str, Any], alive: Tensor) -> Tensor:
        """Counts the request just served where `alive`; the strategy of the largest share, int64 (rows,)."""
        if self.blends:
            share = torch.as_tensor(info["strategy_weights"], device=alive.device).to(torch.float64)
        else:
            owner = torch.as_tensor(info["slot_strategy"], device=alive.device)
            share = torch.nn.functional.one_hot(owner, self.strategies).to(torch.float64).mean(dim=1)
        share = torch.where(alive[:, None], share, 0.0)
        self.share += share
        self.asked += share > 0
        return share.argmax(dim=1)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As in `RolloutResult`, rows first."""
        return {"share": self.share.cpu().numpy(), "asked": self.asked.cpu().numpy()}


def _check_kind(env: Any, kind: Chooses) -> None:
    found = env.config.action
    if found != kind:
        raise ValueError(
            f"the player's action is {kind!r} and the environment's {found!r}; make the environment with action={kind!r}, "
            "and give a function that makes such a policy the attribute `chooses`"
        )


def _rule_action(choice: Tensor, mask: Tensor, key: Tensor) -> Tensor:
    """A rule's choice; where it is out of service, one of the others at random."""
    available = mask.gather(1, choice[:, None])
    if bool(available.all()):
        return choice
    probs = torch.where(available, one_hot_probs(choice, mask.shape[1]), masked_uniform(mask))
    return sample_actions(probs, uniform(key))


def _as_policy(player: Policy | Callable[[], Policy]) -> Policy:
    # a class has the methods too, and a function has not; neither is a policy yet
    ready = (hasattr(player, "action_probs") or hasattr(player, "act")) and not isinstance(player, type)
    made: Any = player if ready else cast(Any, player)()
    return cast(Policy, made)
