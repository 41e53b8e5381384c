"""Tests played in a world: visitors are assigned, each meets its arm's policy, and what happened is an exposure table.

A visitor is a start state of a test user with luck of its own. Before the test every visitor is served by the control policy
for some requests: the pre-period that CUPED adjusts by. Then the arm's policy takes over, as a new policy does in a running
service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_gym.evaluation.ab_test.table import ACTIVITY, PRE
from metarec_gym.evaluation.rollout import Privileged, RowRule, Rows, check_env_settings, pick_contexts
from metarec_gym.policy import Policy, masked_uniform, one_hot_probs, sample_actions
from metarec_gym.seeding import fold_in, mix, stream, uniform

if TYPE_CHECKING:
    import pandas as pd

    from metarec_gym.evaluation.rollout import Player
    from metarec_gym.world import World

SHOWN, REWARD, RETAINED = "shown", "reward", "retained"
"""Columns beside the world's outcomes: items shown, reward, and 1 in the last request of a visitor who never left."""


@dataclass(frozen=True)
class Visitors:
    """Who takes part; in order of arrival.

    Attributes:
        visitor_id: Names, the unit of assignment: user and visit.
        start_state: int64 (n,), index into the world's start states.
        noise: int64 (n,), key of the luck.
        history_length: int64 (n,), events in the log before the visit.
    """

    visitor_id: tuple[str, ...]
    start_state: Tensor
    noise: Tensor
    history_length: Tensor

    def __len__(self) -> int:
        return len(self.visitor_id)

    def take(self, places: NDArray[np.int64]) -> Visitors:
        """The visitors at these places."""
        index = torch.from_numpy(places)
        names = tuple(self.visitor_id[i] for i in places.tolist())
        return Visitors(names, self.start_state[index], self.noise[index], self.history_length[index])


def visitors(world: World, fold: str, *, visits: int = 1, seed: int = 0, max_users: int | None = None) -> Visitors:
    """Each user of a fold `visits` times, in an order that the seed decides.

    With more than one visit a user is met again with new luck from the same start state: a larger test on the same people, so
    what it shows holds for these people.

    Args:
        world: The world.
        fold: "A" or "B".
        visits: Visits a user.
        seed: Decides start states, luck and order.
        max_users: Keep at most this many users.

    Raises:
        ValueError: When `visits` is below 1.
    """
    if visits < 1:
        raise ValueError(f"visits is {visits}, expected at least 1")
    starts = pick_contexts(world, fold, per_user=1, seed=seed, max_users=max_users)
    start, visit = starts.repeat(visits), torch.arange(visits).repeat_interleave(len(starts))
    order = torch.argsort(fold_in(fold_in(mix(torch.tensor(stream(seed, "arrival"))), start), visit), stable=True)
    start, visit = start[order], visit[order]
    user = world.tensors["start_user"][start].tolist()
    names = tuple(f"{u}.{v}" for u, v in zip(user, visit.tolist(), strict=True))
    return Visitors(names, start, visit, world.tensors["start_length"][start].to(torch.int64))


class Server:
    """One player at work for a batch of visitors; its luck hangs on the visit, never on the row or the batch.

    Args:
        player: A policy, a function that makes one, or a rule over rows.
        group: The visitors.
        seed: Seed of the draws.
        purpose: Tells this server's draws from those of others at the same requests.
        device: Where it runs.

    Raises:
        TypeError: When the player is a privileged reference.
    """

    def __init__(self, player: Player, group: Visitors, seed: int, purpose: str, device: str) -> None:
        if isinstance(player, Privileged):
            raise TypeError(f"{player!r} looks into the user: it cannot be deployed, so it cannot be tested")
        key = fold_in(mix(torch.tensor(stream(seed, purpose))), group.start_state)
        self._key = fold_in(key, group.noise).to(device)
        self._rows = Rows(
            torch.arange(len(group)).to(device),
            group.start_state.to(device),
            group.noise.to(device),
            group.history_length.to(device),
        )
        self._rule = player if isinstance(player, RowRule) else None
        self._policy: Policy | None = None
        if self._rule is None:
            ready = hasattr(player, "action_probs") and not isinstance(player, type)
            self._policy = cast(Policy, player if ready else cast(Callable[[], Policy], player)())
            self._policy.begin(len(group), device)

    def choose(self, obs: Tensor, mask: Tensor, request: int) -> Tensor:
        """Strategy of every row; float32 (rows, obs_dim), bool (rows, K) -> int64 (rows,)."""
        if self._rule is not None:
            wanted = self._rule.row_choice(self._rows, request)
            # out of service: one of the others at random
            there = mask.gather(1, wanted[:, None])
            probs = torch.where(there, one_hot_probs(wanted, mask.shape[1]), masked_uniform(mask))
        else:
            probs = cast(Policy, self._policy).action_probs(obs, mask)
        return sample_actions(probs, uniform(fold_in(self._key, request)))

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Feedback of the request just served."""
        if self._policy is not None:
            self._policy.observe(obs, action, reward, alive)


def make_env(
    world: World, fold: str, rows: int, horizon: int, action: str, settings: Mapping[str, Any], device: str
) -> Any:
    """The environment that a test is played in."""
    from metarec_gym.envs.vector_env import MetaRecVectorEnv

    check_env_settings(settings)
    return MetaRecVectorEnv(
        rows,
        world=world,
        fold=fold,
        horizon=horizon,
        action=action,
        device=device,
        output="torch",
        autoreset_mode="Disabled",
        **settings,
    )


def play_arm(
    world: World,
    fold: str,
    player: Player,
    group: Visitors,
    *,
    horizon: int,
    control: Player | None = None,
    pre_requests: int = 0,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Serves visitors: by the control policy for `pre_requests`, then by the arm's.

    Args:
        world: The world.
        fold: Whose users.
        player: The arm's policy.
        group: The arm's visitors, V.
        horizon: Requests after the pre-period, T.
        control: Who serves the pre-period; the arm's policy if None.
        pre_requests: Requests of the pre-period.
        seed: Seed of the draws; equal seeds give equal luck to every policy.
        settings: Further settings of the environment.
        device: Where it runs.
        progress: Called with the visitors just served, after every request.

    Returns:
        By column, float64 (V, pre_requests + T): the world's outcomes (items of the slate), `shown`, `reward`, and `alive`.
    """
    env = make_env(world, fold, len(group), pre_requests + horizon, "select", dict(settings or {}), device)
    options = {"start_state": group.start_state.to(device), "noise": group.noise.to(device)}
    out: dict[str, list[Tensor]] = {name: [] for name in (*world.outcomes, SHOWN, REWARD, "alive")}
    with torch.no_grad():
        obs, info = env.reset(seed=seed, options=options)
        after = Server(player, group, seed, "policy draws", device)
        same = control is None or control is player
        before = after if same else Server(cast("Player", control), group, seed, "policy draws", device)
        alive = torch.ones(len(group), dtype=torch.bool, device=device)
        for request in range(pre_requests + horizon):
            mask = torch.as_tensor(info["action_mask"], device=device).to(torch.bool)
            action = (before if request < pre_requests else after).choose(obs, mask, request)
            seen = obs
            obs, reward, terminated, truncated, info = env.step(action)
            for index, name in enumerate(world.outcomes):
                out[name].append(info["outcomes"][:, :, index].sum(dim=1))
            out[SHOWN].append((info["slate"] >= 0).sum(dim=1))
            out[REWARD].append(torch.where(alive, reward, 0.0))
            out["alive"].append(alive)
            # the arm's policy sees the pre-period too, as it would see a log
            for server in (after,) if same else (before, after):
                server.observe(seen, action, out[REWARD][-1], alive)
            alive = alive & ~(terminated | truncated)
            if progress is not None:
                progress(len(group))
    env.close()
    return {name: torch.stack(parts, dim=1).to(torch.float64).cpu().numpy() for name, parts in out.items()}


def exposure_table(
    group: Visitors, arms: Sequence[str], played: Mapping[str, NDArray[np.float64]], pre_requests: int
) -> pd.DataFrame:
    """What a logging service would have written, one row a request.

    Visitors who left in the pre-period were never exposed, whatever arm the hash had for them: they are no part of the test.

    Args:
        group: The visitors, in order of arrival; their place is the time of first exposure.
        arms: Arm of each.
        played: As `play_arm` returns it, rows in the order of the group.
        pre_requests: Requests before the test.

    Returns:
        `user_id, arm, first_exposure, history_length, request`, outcomes, `pre_<column>`.
    """
    import pandas as pd

    alive = played["alive"] > 0
    names = [name for name in played if name != "alive"]
    stays = np.zeros_like(played["alive"])
    # still there in the last request: one number a visitor, on the last row
    stays[:, -1] = alive[:, -1]
    visitor, request = np.nonzero(alive[:, pre_requests:])
    data: dict[str, Any] = {
        "user_id": np.array(group.visitor_id)[visitor],
        "arm": np.array(arms)[visitor],
        "first_exposure": visitor.astype(np.float64),
        "history_length": group.history_length.numpy()[visitor],
        "request": request,
    }
    data |= {name: played[name][:, pre_requests:][visitor, request] for name in names}
    data[RETAINED] = stays[:, pre_requests:][visitor, request]
    data[ACTIVITY] = np.log1p(group.history_length.numpy().astype(np.float64))[visitor]
    if pre_requests:
        data |= {PRE + name: played[name][:, :pre_requests].sum(axis=1)[visitor] for name in names}
    return pd.DataFrame(data)
