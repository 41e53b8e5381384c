"""Which of several deployed policies is best, and how many users does it take to know? Fixed and adaptive allocation.

Users come in batches; an allocation says which policies serve the next batch. Every policy's mean has an asymptotic confidence
sequence at level 1 - alpha / K (`ab_test.sequential`): with probability 1 - alpha all of them hold at all times at once,
whoever was served when. So an allocation that stops when one policy's lower bound is above every other's upper bound names a
worse one with probability at most alpha.

* `fixed_allocation`: every policy serves every batch.
* `best_policy`: LUCB (Kalyanakrishnan, Tewari, Auer and Stone, ICML 2012): only the leader and its strongest challenger serve.
* `successive_halving` (Karnin, Koren and Somekh, ICML 2013): a fixed number of users, half of the policies dropped each round;
  it names a policy and guarantees nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metarec_gym.evaluation.ab_test.playing import REWARD, play_arm, visitors
from metarec_gym.evaluation.ab_test.sequential import MIN_USERS, boundary

if TYPE_CHECKING:
    from metarec_gym.evaluation.rollout import Player
    from metarec_gym.world import World

Floats = NDArray[np.float64]

Serve = Callable[[int, int], Floats]
"""`serve(policy, users)`: lets the policy serve so many users that were not served before; one outcome each, float64 (users,)."""


@dataclass(frozen=True)
class Round:
    """What was known after a batch; float64 (K,) each."""

    users: NDArray[np.int64]
    mean: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class OnlineResult:
    """What came out.

    Attributes:
        best: Index of the policy named best.
        sure: Whether its lower bound was above every other's upper bound.
        rounds: What was known after each batch.
    """

    best: int
    sure: bool
    rounds: tuple[Round, ...]

    @property
    def users(self) -> NDArray[np.int64]:
        """Users that each policy served; int64 (K,)."""
        return self.rounds[-1].users


class _Served:
    """Running sums of every policy, and their confidence sequences."""

    def __init__(self, serve: Serve, policies: int, alpha: float, best_at: float) -> None:
        if policies < 2:
            raise ValueError(f"{policies} policies: comparing needs at least two")
        self._serve, self._alpha, self._best_at = serve, alpha / policies, best_at
        self.count = np.zeros(policies, dtype=np.int64)
        self._sum, self._square = np.zeros(policies), np.zeros(policies)
        self.rounds: list[Round] = []

    def add(self, policy: int, users: int) -> None:
        got = np.asarray(self._serve(policy, users), dtype=np.float64)
        if got.shape != (users,) or not np.isfinite(got).all():
            raise ValueError(f"serve({policy}, {users}) gave shape {got.shape}, expected {users} finite outcomes")
        self.count[policy] += users
        self._sum[policy] += got.sum()
        self._square[policy] += (got**2).sum()

    def look(self) -> Round:
        mean = self._sum / self.count
        variance = np.maximum(self._square - self.count * mean**2, 0.0) / np.maximum(self.count - 1, 1)
        half = boundary(self.count, best_at=self._best_at, alpha=self._alpha) * np.sqrt(variance / self.count)
        self.rounds.append(Round(self.count.copy(), mean, mean - half, mean + half))
        return self.rounds[-1]


def _leader(now: Round) -> tuple[int, int, bool]:
    """Best mean, its strongest challenger by upper bound, and whether they are apart."""
    leader = int(np.argmax(now.mean))
    others = now.high.copy()
    others[leader] = -np.inf
    challenger = int(np.argmax(others))
    return leader, challenger, bool(now.low[leader] > now.high[challenger])


def _run(
    serve: Serve, policies: int, batch: int, max_users: int, alpha: float, first: int, adaptive: bool
) -> OnlineResult:
    served = _Served(serve, policies, alpha, best_at=max(max_users / policies / 4.0, float(first)))
    for policy in range(policies):
        served.add(policy, first)
    while True:
        leader, challenger, sure = _leader(served.look())
        chosen = (leader, challenger) if adaptive else tuple(range(policies))
        if sure or int(served.count.sum()) + batch * len(chosen) > max_users:
            return OnlineResult(leader, sure, tuple(served.rounds))
        for policy in chosen:
            served.add(policy, batch)


def fixed_allocation(
    serve: Serve, policies: int, *, max_users: int, batch: int = 50, alpha: float = 0.05, first: int = MIN_USERS
) -> OnlineResult:
    """Every policy serves every batch, until one is surely best or the users run out.

    Args:
        serve: Serves users.
        policies: How many policies, K.
        max_users: Users at most, over all policies.
        batch: Users of a policy between two looks.
        alpha: Probability of naming a worse policy as surely best.
        first: Users of each policy before the first look: the sequences are for large numbers.

    Raises:
        ValueError: When there are fewer than two policies or `serve` gives something else than it should.
    """
    return _run(serve, policies, batch, max_users, alpha, first, adaptive=False)


def best_policy(
    serve: Serve, policies: int, *, max_users: int, batch: int = 50, alpha: float = 0.05, first: int = MIN_USERS
) -> OnlineResult:
    """Only the leader and its strongest challenger serve, until one is surely best or the users run out.

    Args:
        serve: Serves users.
        policies: How many policies, K.
        max_users: Users at most, over all policies.
        batch: Users of a policy between two looks.
        alpha: Probability of naming a worse policy as surely best.
        first: Users of each policy before the first look.

    Raises:
        ValueError: When there are fewer than two policies or `serve` gives something else than it should.
    """
    return _run(serve, policies, batch, max_users, alpha, first, adaptive=True)


def successive_halving(serve: Serve, policies: int, *, max_users: int, alpha: float = 0.05) -> OnlineResult:
    """Equal shares of the users to ceil(log2 K) rounds; after each the worse half of the policies is dropped.

    Args:
        serve: Serves users.
        policies: How many policies, K.
        max_users: Users, all of them used but for rounding.
        alpha: Level of the bounds that are reported.

    Raises:
        ValueError: When there are fewer than two policies or too few users for each round.
    """
    served = _Served(serve, policies, alpha, best_at=max_users / policies)
    rounds = int(np.ceil(np.log2(policies)))
    alive = list(range(policies))
    for _ in range(rounds):
        share = max_users // (rounds * len(alive))
        if share < 2:
            raise ValueError(
                f"{max_users} users leave {share} for a policy in a round; give at least {4 * policies * rounds}"
            )
        for policy in alive:
            served.add(policy, share)
        now = served.look()
        alive = sorted(alive, key=lambda policy: -now.mean[policy])[: -(-len(alive) // 2)]
    others = np.delete(now.high, alive[0])
    return OnlineResult(alive[0], bool(now.low[alive[0]] > others.max()), tuple(served.rounds))


def serve_in_world(
    world: World,
    fold: str,
    players: Sequence[Player],
    *,
    horizon: int,
    max_users: int,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Serve:
    """Lets policies serve visitors of a world, each visitor once; the outcome is the visitor's reward a request.

    Args:
        world: The world.
        fold: Whose users.
        players: The policies.
        horizon: Requests a visitor.
        max_users: Visitors that will be asked for at most; users come again with new luck when there are not so many.
        seed: Decides who comes when, and all draws.
        settings: Further settings of the environment.
        device: Where it runs.
    """
    fold_users = len(np.unique(world.tensors["start_user"][world.starts_of(fold)].numpy()))
    coming = visitors(world, fold, visits=-(-max_users // fold_users), seed=seed)
    served = 0

    def serve(policy: int, users: int) -> Floats:
        nonlocal served
        if served + users > len(coming):
            raise ValueError(f"{served + users} visitors were asked for, {len(coming)} were announced by max_users")
        group = coming.take(np.arange(served, served + users))
        served += users
        played = play_arm(
            world, fold, players[policy], group, horizon=horizon, seed=seed, settings=settings, device=device
        )
        reward: Floats = played[REWARD].mean(axis=1)
        return reward

    return serve
