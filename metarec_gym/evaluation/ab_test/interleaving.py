"""Two policies inside one slate: each visitor compares them, so differences between visitors cancel.

Team draft (Radlinski, Kurup and Joachims, CIKM 2008) on `MetaRec/Slots-v0`: places are filled in pairs, a coin says which
policy has the first of a pair, and each policy's strategy puts its best unshown item into its place. What the visitor takes
is credited to the policy whose place it was in. The estimand is the preference between the two at equal places of a shared
slate; it is not the effect of an A/B test, where each policy also makes the history that it then acts on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metarec_gym.evaluation.ab_test.estimates import Floats
from metarec_gym.evaluation.ab_test.playing import Server, Visitors, make_env
from metarec_gym.evaluation.intervals import Interval, mean_interval
from metarec_gym.seeding import fold_in, mix, stream, uniform

if TYPE_CHECKING:
    from metarec_gym.evaluation.rollout import Player
    from metarec_gym.world import World


@dataclass(frozen=True, eq=False)
class Preferences:
    """What each visitor's taking said.

    Attributes:
        credit: float64 (visitors, 2), reward of the places of the first and the second policy, all requests.
        places: float64 (visitors, 2), places that showed an item of each.
    """

    credit: Floats
    places: Floats

    @property
    def preference(self) -> Floats:
        """Credit of the second less credit of the first, per pair of places; float64 (visitors,)."""
        pairs = np.maximum(self.places.sum(axis=1), 1.0) / 2.0
        out: Floats = (self.credit[:, 1] - self.credit[:, 0]) / pairs
        return out

    def interval(self, *, level: float = 0.95) -> Interval:
        """Mean preference for the second policy over visitors."""
        return mean_interval(self.preference, level=level)


def draft(coins: Tensor, slate_size: int) -> Tensor:
    """Team of each place: bool (rows, pairs), True = the second policy has the first of the pair -> int64 (rows, slate_size)."""
    first = coins.to(torch.int64)
    return torch.stack([first, 1 - first], dim=2).flatten(1)[:, :slate_size]


def interleave(
    world: World,
    fold: str,
    first: Player,
    second: Player,
    group: Visitors,
    *,
    horizon: int,
    pre_requests: int = 0,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Preferences:
    """Serves visitors by both policies at once.

    Where both choose one strategy in a request its places say nothing of the two, and chance shares them.

    Args:
        world: The world.
        fold: Whose users.
        first: One policy, usually the control.
        second: The other.
        group: The visitors.
        horizon: Requests after the pre-period.
        pre_requests: Requests before, served by the first policy alone and not counted, as in `playing.play_arm`.
        seed: Seed of the draws.
        settings: Further settings of the environment.
        device: Where it runs.
        progress: Called with the visitors just served, after every request.

    Returns:
        The visitors' preferences.
    """
    env = make_env(world, fold, len(group), pre_requests + horizon, "slots", dict(settings or {}), device)
    size, weights = env.slate_size, world.tensors["outcome_weights"].to(device)
    credit = torch.zeros(len(group), 2, dtype=torch.float64, device=device)
    places = torch.zeros_like(credit)
    key = fold_in(fold_in(mix(torch.tensor(stream(seed, "team draft"))), group.start_state), group.noise).to(device)
    with torch.no_grad():
        obs, info = env.reset(
            seed=seed, options={"start_state": group.start_state.to(device), "noise": group.noise.to(device)}
        )
        servers = [Server(p, group, seed, f"team {i}", device) for i, p in enumerate((first, second))]
        alive = torch.ones(len(group), dtype=torch.bool, device=device)
        for request in range(pre_requests + horizon):
            mask = torch.as_tensor(info["action_mask"], device=device).to(torch.bool)
            choice = torch.stack([server.choose(obs, mask, request) for server in servers], dim=1)
            counted = request >= pre_requests
            choice = choice if counted else choice[:, :1].expand(-1, 2)
            pair = torch.arange(-(-size // 2), device=device)
            team = draft(uniform(fold_in(fold_in(key, request)[:, None], pair)) < 0.5, size)
            seen = obs
            obs, reward, terminated, truncated, info = env.step(choice.gather(1, team))
            worth = (info["outcomes"].to(torch.float64) * weights.to(torch.float64)).sum(dim=2)
            if counted:
                credit.scatter_add_(1, team, worth)
                places.scatter_add_(1, team, (info["slate"] >= 0).to(torch.float64))
            for index, server in enumerate(servers):
                server.observe(seen, choice[:, index], torch.where(alive, reward, 0.0), alive)
            alive = alive & ~(terminated | truncated)
            if progress is not None:
                progress(len(group))
    env.close()
    return Preferences(credit.cpu().numpy(), places.cpu().numpy())


@dataclass(frozen=True)
class Sensitivity:
    """Interleaving and A/B test at equal numbers of users.

    Attributes:
        users: Users in either.
        interleaving: z score of the preference.
        ab_test: z score of the difference.
        fewer_users: How many times fewer users interleaving needs for the same z score: the ratio of the squares.
        detected: Pairs (users, share of interleavings, share of A/B tests that were significant at 5 %), users resampled.
    """

    users: int
    interleaving: float
    ab_test: float
    fewer_users: float
    detected: tuple[tuple[int, float, float], ...]


def sensitivity(
    preference: Floats, control: Floats, treatment: Floats, *, seed: int = 0, samples: int = 1000
) -> Sensitivity:
    """How much sooner interleaving sees a difference.

    Args:
        preference: A user's preference, (users,).
        control: A user's value in the control arm, (users of that arm,).
        treatment: Likewise in the other arm.
        seed: Of the resampling.
        samples: Tests resampled for each number of users.

    Returns:
        z scores scaled to the users of the A/B test, and detection rates at a quarter, a half and all of them.
    """
    from scipy import stats

    from metarec_gym.seeding import numpy_rng

    total = len(control) + len(treatment)

    def score(effect: float, variance: float) -> float:
        return effect / variance**0.5 if variance > 0 else 0.0

    inter = score(float(preference.mean()), float(preference.var(ddof=1)) / total)
    variance = float(treatment.var(ddof=1)) / len(treatment) + float(control.var(ddof=1)) / len(control)
    ab = score(float(treatment.mean() - control.mean()), variance)
    rng, detected = numpy_rng(seed, "sensitivity"), []
    for users in (total // 4, total // 2, total):
        if users < 20:
            continue
        one = rng.choice(preference, (samples, users))
        two = [rng.choice(arm, (samples, max(2, round(users * len(arm) / total)))) for arm in (control, treatment)]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = stats.ttest_1samp(one, 0.0, axis=1).pvalue
            both = stats.ttest_ind(two[1], two[0], axis=1, equal_var=False).pvalue
        rates = [float(np.mean(np.asarray(p) < 0.05)) for p in (found, both)]
        detected.append((users, rates[0], rates[1]))
    return Sensitivity(total, inter, ab, (inter / ab) ** 2 if ab else float("inf"), tuple(detected))
