"""A refitted world's strategies in front of the users of another world, and the log that such a deployment leaves behind.

What a refitted world says of itself cannot be believed: strategies and judge were fitted to what earlier policies chose to
show. So its strategies are put before the users of a fixed *truth*, a world whose judge never changes. The truth answers; the
refitted world ranks the lists and says what the policy sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_gym.policy import Policy, StatelessPolicy, masked_uniform, sample_actions
from metarec_gym.response.frozen import DYNAMIC_FEATURES, AnyJudge, FrozenResponse, untimed
from metarec_gym.seeding import fold_in, mix, numpy_rng, stream, uniform
from metarec_gym.world import FOLDS, World, list_stats

if TYPE_CHECKING:
    import pandas as pd

    from metarec_gym.data.synthetic import BehaviourTruth

FOLD = "B"
"""Fold of the truth whose users are served; policies of the first round learn on the other one."""
REQUEST_S = 60.0
"""Seconds between two requests of an emitted log."""


@dataclass(frozen=True)
class Truth:
    """The users that every deployment meets.

    Attributes:
        world: Its fold `FOLD` has the users and their judge; its own strategies serve nobody.
        item_ids: Id of each of its items.
    """

    world: World
    item_ids: tuple[str, ...]


def staying(judge: AnyJudge) -> AnyJudge:
    """The same judge whose users never leave and are all back after a day: a loop about what is liked, not about who stays."""
    gone = ("leaving", "return_edges", "return_baseline", "return_weight")
    return judge.replaced(**{name: value for name, value in untimed().items() if name in gone})


class _MappedRanker:
    """Ranks in the truth's item numbers what a refitted world ranks in its own; items that it does not know are never listed."""

    def __init__(self, refitted: World, to_refitted: Tensor) -> None:
        self.refitted, self.to_refitted = refitted, to_refitted
        known = torch.nonzero(to_refitted >= 0)[:, 0]
        self.to_truth = torch.full((refitted.n_items,), -1, dtype=torch.int64)
        self.to_truth[to_refitted[known]] = known

    def top_lists(self, histories: Tensor, length: int, *, exclude: Tensor | None = None) -> Tensor:
        """int64 (rows, H) -> int64 (rows, K, length), -1 where the refitted catalogue ran out."""
        return self._back(self.refitted.top_lists(*self._there(histories, length), exclude=self._barred(exclude)))

    def ranked(self, histories: Tensor, length: int, *, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `top_lists`, with standard scores."""
        lists, scores = self.refitted.ranked(*self._there(histories, length), exclude=self._barred(exclude))
        return self._back(lists), scores

    def _there(self, histories: Tensor, length: int) -> tuple[Tensor, int]:
        return torch.where(histories >= 0, self.to_refitted[histories.clamp(min=0)], -1), length

    def _barred(self, exclude: Tensor | None) -> Tensor | None:
        return None if exclude is None else exclude[:, self.to_truth]

    def _back(self, lists: Tensor) -> Tensor:
        return torch.where(lists >= 0, self.to_truth[lists.clamp(min=0)], -1)


def deployed(truth: Truth, refitted: World, item_ids: Sequence[str], session_requests: int) -> World:
    """The world in which a refitted world's strategies serve the truth's users, who all arrive without a history.

    Args:
        truth: Who answers.
        refitted: Who ranks, and whose tables say what a policy sees.
        item_ids: Id of each of the refitted world's items; all are the truth's.
        session_requests: Requests a session: lists are ranked for one.

    Returns:
        A world whose two folds are the truth's users.
    """
    place = {item: index for index, item in enumerate(item_ids)}
    to_refitted = torch.tensor([place.get(item, -1) for item in truth.item_ids])
    known = to_refitted >= 0
    t, r = truth.world.tensors, refitted.tensors

    def spread(table: Tensor) -> Tensor:
        out = torch.zeros(len(to_refitted), *table.shape[1:], dtype=table.dtype)
        out[known] = table[to_refitted[known]]
        return out

    cold = torch.nonzero((t["start_length"] == 0) & (t["start_fold"] == FOLDS.index(FOLD)))[:, 0]
    n, taste, popularity = len(cold), spread(r["item_taste"]), spread(r["item_popularity"])
    ranker = _MappedRanker(refitted, to_refitted)
    nobody = torch.full((1, 1), -1, dtype=torch.int64)
    lists, scores = ranker.ranked(nobody, session_requests * refitted.slate_size)
    taste_sum = torch.zeros(1, taste.shape[1])
    zeros = torch.zeros(n)
    judge = staying(truth.world.judge(FOLD))
    return replace(
        truth.world,
        strategies=refitted.strategies,
        # the unit in which rewards are observed is the one that the policy was trained with
        reward_scale=refitted.reward_scale,
        slate_size=refitted.slate_size,
        tensors={
            "outcome_weights": t["outcome_weights"],
            "costs": r["costs"],
            "item_taste": taste,
            "item_popularity": popularity,
            "item_category": t["item_category"],
            "start_user": t["start_user"][cold],
            "start_fold": torch.full((n,), FOLDS.index(FOLD), dtype=torch.int8),
            "start_length": torch.zeros(n, dtype=t["start_length"].dtype),
            "start_lists": lists.to(torch.int32).expand(n, -1, -1).contiguous(),
            "start_list_scores": scores.expand(n, -1, -1).contiguous(),
            "start_state": t["start_state"][cold],
            "start_state_second": t["start_state_second"][cold],
            "start_taste": taste_sum.expand(n, -1).contiguous(),
            "start_category": torch.zeros(n, t["item_category"].shape[1]),
            "start_popularity": zeros,
            "start_gap": zeros,
            "start_list_stats": list_stats(lists, popularity, taste, taste_sum).expand(n, -1, -1).contiguous(),
            "start_time": t["start_time"][cold],
            "start_sessions": zeros,
            "start_previous_gap": zeros,
            "period_starts": t["period_starts"],
            "user_events": t["user_events"],
            "user_event_offsets": t["user_event_offsets"],
        },
        responses={"A": judge, "B": judge},
        ranker=ranker,
        folder=None,
    )


class Exploring(StatelessPolicy):
    """Another policy in most requests, any strategy in the others; for policies that keep nothing between requests.

    Args:
        policy: What is served mostly.
        share: Share of the requests whose strategy is drawn uniformly.
    """

    def __init__(self, policy: Policy, share: float) -> None:
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"the exploration share is {share}, expected a number from 0 to 1")
        self.policy, self.share = policy, share

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The mixture of both."""
        probs = self.policy.action_probs(obs, action_mask)
        return (1.0 - self.share) * probs + self.share * masked_uniform(action_mask)


@dataclass(frozen=True)
class Emitted:
    """The log of a deployment.

    Attributes:
        frame: One row an impression, as `InteractionLog.from_frame` wants it: user_id, item_id, timestamp, session_id, position,
            strategy, propensity, and a column an outcome.
        served: int64 (K,), requests that each strategy served.
        shown: int64 (n_items of the truth,), times that each item was shown.
    """

    frame: pd.DataFrame
    served: NDArray[np.int64]
    shown: NDArray[np.int64]


def emit(
    world: World,
    policy: Policy,
    item_ids: Sequence[str],
    *,
    settings: Mapping[str, Any],
    horizon: int,
    seed: int,
    cohort: int,
    prefix: str,
) -> Emitted:
    """Serves every user of a deployed world once and writes the log.

    Args:
        world: As `deployed` gives it.
        policy: Who chooses; its probabilities become the propensities.
        item_ids: Id of each item of the truth.
        settings: Of the environment.
        horizon: Requests a user.
        seed: Decides all draws.
        cohort: Which draw of the users' tastes: another cohort, other people.
        prefix: Put before user ids, so that people of two deployments differ.

    Returns:
        The log. A row's propensity is the probability with which its strategy was chosen.
    """
    import pandas as pd

    from metarec_gym.envs.vector_env import MetaRecVectorEnv

    starts = world.starts_of(FOLD)
    env = MetaRecVectorEnv(
        len(starts),
        world=world,
        fold=FOLD,
        horizon=horizon,
        output="torch",
        autoreset_mode="Disabled",
        world_seed=cohort,
        **settings,
    )
    noise = torch.zeros_like(starts)
    obs, info = env.reset(seed=stream(seed, "deployment", cohort), options={"start_state": starts, "noise": noise})
    key = fold_in(mix(torch.tensor(stream(seed, "deployed choices", cohort))), starts)
    policy.begin(len(starts))
    alive = torch.ones(len(starts), dtype=torch.bool)
    parts: list[pd.DataFrame] = []
    served = np.zeros(world.n_strategies, dtype=np.int64)
    shown = np.zeros(world.n_items, dtype=np.int64)
    ids, names = np.asarray(item_ids, dtype=object), np.asarray(world.strategies, dtype=object)
    user = info["user"].numpy()
    for request in range(horizon):
        mask = info["action_mask"].to(torch.bool)
        with torch.no_grad():
            probs = policy.action_probs(obs, mask)
            action = sample_actions(probs, uniform(fold_in(key, request)))
            seen = obs
            obs, reward, terminated, truncated, info = env.step(action)
            policy.observe(seen, action, reward, alive)
        slate, outcomes = info["slate"].numpy(), info["outcomes"].numpy()
        row, position = np.nonzero((slate >= 0) & alive.numpy()[:, None])
        item, who = slate[row, position], action.numpy()[row]
        parts.append(
            pd.DataFrame(
                {
                    "user_id": [f"{prefix}{u}" for u in user[row]],
                    "item_id": ids[item],
                    "timestamp": world.tensors["period_starts"][0].item() + REQUEST_S * (request + 1),
                    # one visit: nobody leaves, and when users come back is not theirs to choose
                    "session_id": 0,
                    "position": position,
                    "strategy": names[who],
                    "propensity": probs.gather(1, action[:, None])[:, 0].numpy()[row].astype(np.float64),
                    **{name: outcomes[row, position, o].astype(np.float32) for o, name in enumerate(world.outcomes)},
                }
            )
        )
        served += np.bincount(action[alive].numpy(), minlength=len(served))
        shown += np.bincount(item, minlength=len(shown))
        alive = alive & ~(terminated | truncated)
    env.close()
    return Emitted(pd.concat(parts, ignore_index=True), served, shown)


def thinned(frame: pd.DataFrame, lowest: float, *, seed: int, cohort: int) -> pd.DataFrame:
    """The log that a uniform choice of the strategies would have left: requests kept in inverse proportion to their propensity.

    A request is kept with probability lowest / propensity (rejection sampling): a strategy that was chosen often loses most of
    its requests, so that what is kept no longer depends on who chose. Of n requests about n * lowest * K are left.

    Args:
        frame: Of `emit`.
        lowest: Smallest propensity that a strategy can have.
        seed: Decides which requests are kept.
        cohort: Of the frame; each cohort has draws of its own.

    Returns:
        The rows of the requests that were kept, in order.

    Raises:
        ValueError: When `lowest` is 0, or above a propensity of the frame.
    """
    propensity = frame["propensity"].to_numpy()
    if not 0.0 < lowest <= propensity.min() + 1e-6:
        raise ValueError(
            f"the lowest propensity is {lowest}, expected a number above 0 and at most {propensity.min()}, the lowest of the "
            "log: without exploration some strategies are never chosen, and no weight can bring them back"
        )
    request = frame.groupby(["user_id", "timestamp"], sort=False).ngroup().to_numpy()
    draw = numpy_rng(seed, "thinning", cohort).random(request.max() + 1)[request]
    kept: pd.DataFrame = frame[draw < lowest / propensity]
    return kept


def behaviour_world(truth: BehaviourTruth, *, users: int, slate_size: int, seed: int) -> World:
    """The model behind a behaviour log as a truth: each cohort draws its users' tastes from the population anew.

    Args:
        truth: The model; its users neither leave nor tire here.
        users: Users of a cohort.
        slate_size: Items a request.
        seed: Kept in the world.

    Returns:
        A world whose only strategy lists the items by number; it serves nobody (see `deployed`).
    """
    from metarec_gym.world_synthetic import FixedOrders, ramp_scores

    n_items, n_static = truth.phi.shape
    features, dim = n_static + len(DYNAMIC_FEATURES), 1
    mean = torch.zeros(users, 2, features)
    mean[:, :, :n_static] = torch.from_numpy(truth.effect_mean)
    root = torch.zeros(users, 2, features, features)
    root[:, :, :n_static, :n_static] = torch.from_numpy(np.linalg.cholesky(truth.effect_covariance))
    judge = FrozenResponse(
        {
            "item_input": torch.zeros(n_items, dim),
            "decays": torch.tensor([0.5]),
            "hidden_weight": torch.zeros(1, 1, 2 * dim + 1),
            "hidden_bias": torch.zeros(1, 1),
            "tower_weight": torch.zeros(1, 2, 1),
            "tower_bias": torch.zeros(1, 2),
            "item_output": torch.zeros(1, n_items, 2, 1),
            "item_bias": torch.from_numpy(truth.item_bias).to(torch.float32)[None],
            "calibration": torch.tensor([1.0, 0.0]).expand(1, 2, 2).contiguous(),
            "static_features": torch.from_numpy(truth.phi).to(torch.float32),
            "trend": torch.zeros(1, n_items),
            "dynamic_scale": torch.zeros(2),
            "effect_mean": mean,
            "effect_chol": root,
            "pair_sd": torch.zeros(2),
            **untimed(),
        },
        ("watch", "like"),
        (*truth.feature_names, *DYNAMIC_FEATURES),
    )
    category = torch.from_numpy(truth.item_category / truth.item_category.sum(axis=1, keepdims=True)).to(torch.float32)
    starts = 2 * users
    everything = torch.arange(n_items)
    lists = everything.to(torch.int32).expand(starts, 1, -1).contiguous()
    taste, popularity = torch.zeros(n_items, 8), torch.full((n_items,), 0.5)
    zeros = torch.zeros(starts)
    return World(
        name="behaviour",
        strategies=("in_order",),
        outcomes=("watch", "like"),
        horizon=1,
        slate_size=slate_size,
        seed=seed,
        reward_scale=1.0,
        tensors={
            "outcome_weights": torch.tensor([0.0, 1.0]),
            "costs": torch.ones(1),
            "item_taste": taste,
            "item_popularity": popularity,
            "item_category": category,
            "start_user": torch.arange(users).repeat(2),
            "start_fold": torch.arange(2, dtype=torch.int8).repeat_interleave(users),
            "start_length": torch.zeros(starts, dtype=torch.int64),
            "start_lists": lists,
            "start_list_scores": ramp_scores(lists),
            "start_state": torch.zeros(starts, judge.state_dim),
            "start_state_second": torch.zeros(starts, 0),
            "start_taste": torch.zeros(starts, 8),
            "start_category": torch.zeros(starts, category.shape[1]),
            "start_popularity": zeros,
            "start_gap": zeros,
            "start_list_stats": torch.zeros(starts, 1, 3),
            "start_time": torch.zeros(starts, dtype=torch.float64),
            "start_sessions": zeros,
            "start_previous_gap": zeros,
            "period_starts": torch.zeros(1, dtype=torch.float64),
            "user_events": torch.zeros(0, dtype=torch.int32),
            "user_event_offsets": torch.zeros(users + 1, dtype=torch.int64),
        },
        responses={"A": judge, "B": judge},
        ranker=FixedOrders([everything], n_items),
    )
