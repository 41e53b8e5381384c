"""Two privileged references beside the oracles: one that looks ahead, one that sees every strategy's answer.

`LookAhead` (LOOK) is the greedy oracle with rollouts: it tries every strategy in simulated branches and follows the greedy
oracle in them for a few requests. Its lift over the greedy oracle says whether anything is long-term in a world: where there
is nothing, a bandit is enough.

`FullInformation` (FIR) learns as a bandit does, from the same prior, but is told after every request what each strategy would
have brought in that state. What it gains over a bandit is the price of seeing one answer a request. It is no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_gym.evaluation.rollout import Floats, env_maker
from metarec_gym.policy import masked_uniform, sample_actions
from metarec_gym.seeding import fold_in, mix, stream, uniform

if TYPE_CHECKING:
    from metarec_gym.world import World

BRANCH_DRAW = -101
"""Purpose of the draws in branches: requests are >= 0, so no branch meets the luck of the real episode."""
FEWEST_ROWS = 30
"""Trend and prior of a request are taken from at least this many episodes; later requests keep the last ones."""


@dataclass(frozen=True)
class LookAhead:
    """LOOK: at each state the strategy that is worth most now and over the next requests, if the greedy oracle goes on.

    For each of the strategies that are worth most now, `branches` copies of the user are served by it once and by the greedy
    oracle for `ahead` requests more, all with fresh luck that the strategies share: the real episode's luck is never seen.
    What is left of luck after that would draw the choice away from the greedy one for nothing; so another strategy is taken
    only where its advantage is larger than `caution` standard errors.

    Attributes:
        ahead: Requests after the present one that count.
        branches: Copies for each strategy.
        candidates: Strategies tried, best now first; None tries all.
        caution: Standard errors that an advantage must exceed.
        max_rows: Copies played side by side.
    """

    ahead: int = 3
    branches: int = 4
    candidates: int | None = None
    caution: float = 1.5
    max_rows: int = 4096

    def __post_init__(self) -> None:
        if self.ahead < 1 or self.branches < 2 or (self.candidates is not None and self.candidates < 2):
            raise ValueError(
                f"ahead is {self.ahead}, branches {self.branches} and candidates {self.candidates}; expected at least "
                "1 request, 2 branches and 2 candidates"
            )

    def tried(self, n_strategies: int) -> int:
        """Strategies tried of a pool."""
        return n_strategies if self.candidates is None else min(self.candidates, n_strategies)

    def effort(self, n_strategies: int) -> int:
        """Work of one request, in requests of a fixed strategy."""
        greedy = 1 + n_strategies // 2
        return greedy + self.tried(n_strategies) * self.branches * (1 + self.ahead * greedy)

    def seat(self, make_env: Callable[[int], Any]) -> _LookAheadSeat:
        """Its branches run in an environment of their own."""
        return _LookAheadSeat(self, make_env)


class _LookAheadSeat:
    def __init__(self, rule: LookAhead, make_env: Callable[[int], Any]) -> None:
        self.rule, self.make_env = rule, make_env
        self.branch: Any = None
        self.users = 0

    def begin(self, env: Any) -> None:
        """The branches' environment is made once for all batches."""
        copies = self.rule.tried(env.world.n_strategies) * self.rule.branches
        users = min(env.num_envs, max(1, self.rule.max_rows // copies))
        if self.branch is None or self.users != users:
            self.users, self.branch = users, self.make_env(users * copies)
            start = env.world.starts_of(env.config.fold)[:1].expand(users * copies)
            self.branch.reset(seed=0, options={"start_state": start.to(env.device)})
            self.like = self.branch.get_state()

    def choose(self, env: Any, action_mask: Tensor, request: int) -> Tensor:
        """The greedy strategy, or one that is surely better in the long run."""
        now = env.peek_expected_rewards().to(torch.float64).masked_fill(~action_mask, -torch.inf)
        greedy: Tensor = now.argmax(dim=1)
        if request + 1 >= env.horizon:
            return greedy
        # the greedy strategy comes first, whatever it is tied with
        ranked = now.scatter(1, greedy[:, None], torch.inf)
        tried = ranked.topk(self.rule.tried(now.shape[1]), dim=1).indices
        saved, rows = env.get_state(), env.num_envs
        worth = torch.cat([self._worth(saved, tried, low, request) for low in range(0, rows, self.users)])[:rows]
        # (rows, branches, tried): luck is shared inside a branch, so advantages over the greedy strategy are paired
        advantage = worth - worth[:, :, :1]
        se = advantage.std(dim=1) / self.rule.branches**0.5
        sure = advantage.mean(dim=1) - self.rule.caution * se
        sure = sure.masked_fill(~action_mask.gather(1, tried), -torch.inf)
        sure[:, 0] = 0.0
        # sums of rewards differ in their last bits for no reason
        best = torch.where(sure.amax(dim=1) > 1e-6, sure.argmax(dim=1), 0)
        chosen: Tensor = tried.gather(1, best[:, None])[:, 0]
        return chosen

    def _worth(self, saved: dict[str, Tensor], tried: Tensor, low: int, request: int) -> Tensor:
        """Expected reward of this request and the next, for the users from `low` on; float64 (users, branches, tried)."""
        rule, env = self.rule, self.branch
        (rows, strategies), device = tried.shape, env.device
        copies = strategies * rule.branches
        user = torch.arange(low, low + self.users, device=device).clamp(max=rows - 1).repeat_interleave(copies)
        place = torch.arange(copies, device=device).repeat(self.users)
        action, number = tried[user, place % strategies], place // strategies
        state = spread_rows(saved, self.like, user)
        key = state["user.draw_key"]
        number = torch.cat([number, number.new_zeros(len(key) - len(number))])
        # luck of its own for every request and branch, shared by the strategies
        state["user.draw_key"] = fold_in(fold_in(key, BRANCH_DRAW), request * rule.branches + number)
        env.set_state(state)
        total = torch.zeros(len(user), dtype=torch.float64, device=device)
        alive = torch.ones(len(user), dtype=torch.bool, device=device)
        for step in range(rule.ahead + 1):
            _, _, terminated, truncated, info = env.step(action)
            total += torch.where(alive, env.expected_reward, 0.0)
            alive = alive & ~(terminated | truncated)
            if step == rule.ahead or not bool(alive.any()):
                break
            mask = torch.as_tensor(info["action_mask"], device=device).to(torch.bool)
            action = env.peek_expected_rewards().masked_fill(~mask, -torch.inf).argmax(dim=1)
        return total.view(self.users, rule.branches, strategies)


def spread_rows(saved: Mapping[str, Tensor], like: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """State of an environment whose row i is a copy of row `rows[i]` of another one.

    Args:
        saved: `get_state()` of the other environment.
        like: `get_state()` of this one.
        rows: int64 (num_envs of this one,).

    Returns:
        What `set_state` takes; rows that only fill the batch up copy the first one.
    """
    here, there = len(like["user.request"]), len(saved["user.request"])
    index = torch.cat([rows, rows[:1].expand(here - len(rows))])
    state = {}
    for name, value in saved.items():
        by_row = value.ndim > 0 and value.shape[0] == there and like[name].shape[0] == here
        state[name] = value[index] if by_row else value
    return state


@dataclass(frozen=True, eq=False)
class RewardPrior:
    """What training users tell of a new user's rewards. T requests, K strategies.

    Attributes:
        mean: float64 (T, K), mean sampled reward of each strategy at each request.
        cov: float64 (K, K), covariance over users of their mean rewards.
        noise: float64 (K, K), covariance of the sampled rewards of one state around the user's mean.
    """

    mean: Floats
    cov: Floats
    noise: Floats

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Its arrays by name, for an .npz file."""
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class FullInformation:
    """FIR: a normal belief about the user's mean reward under every strategy, told all K sampled rewards of each state.

    Attributes:
        prior: From training users, see `learn_reward_prior`.
    """

    prior: RewardPrior

    def effort(self, n_strategies: int) -> int:
        """Every strategy's answer is drawn, and one is served."""
        return 1 + n_strategies

    def seat(self, make_env: Callable[[int], Any]) -> _FullInformationSeat:
        """It needs nothing but the environment."""
        return _FullInformationSeat(self.prior)


class _FullInformationSeat:
    def __init__(self, prior: RewardPrior) -> None:
        self.prior = prior

    def begin(self, env: Any) -> None:
        """Every row is a new user: back to the prior."""
        n, k = env.num_envs, self.prior.cov.shape[0]
        device = env.device
        self.trend = torch.from_numpy(self.prior.mean).to(device)
        self.noise = torch.from_numpy(self.prior.noise).to(device)
        # information form: precision and precision-weighted deviation add up over observations
        self.precision = torch.linalg.inv(torch.from_numpy(self.prior.cov)).to(device).repeat(n, 1, 1)
        self.shift = torch.zeros(n, k, dtype=torch.float64, device=device)

    def choose(self, env: Any, action_mask: Tensor, request: int) -> Tensor:
        """The highest posterior mean; then all rewards of this state are taken in."""
        trend = self.trend[min(request, len(self.trend) - 1)]
        deviation = torch.linalg.solve(self.precision, self.shift[..., None])[..., 0]
        action: Tensor = (trend + deviation).masked_fill(~action_mask, -torch.inf).argmax(dim=1)
        self._learn(env.peek_sampled_rewards().to(torch.float64) - trend, action_mask)
        return action

    def _learn(self, surprise: Tensor, seen: Tensor) -> None:
        """Takes in reward minus trend, (rows, K), of the strategies that are in service."""
        both = seen[:, :, None] & seen[:, None, :]
        if bool(seen.all()):
            gain = torch.linalg.inv(self.noise).expand(len(seen), -1, -1)
        else:
            # strategies out of service are cut out of the noise, inverted apart and tell nothing
            eye = torch.eye(seen.shape[1], dtype=torch.float64, device=seen.device)
            gain = torch.where(both, torch.linalg.inv(torch.where(both, self.noise, eye)), 0.0)
        self.precision = self.precision + gain
        self.shift = self.shift + (gain @ torch.where(seen, surprise, 0.0)[..., None])[..., 0]


def learn_reward_prior(
    world: World,
    fold: str,
    *,
    contexts: Tensor,
    horizon: int,
    env_seed: int,
    slate_size: int | None = None,
    cost_weight: float = 0.0,
    env_settings: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> RewardPrior:
    """Serves training users at random, looks at every strategy's sampled reward on the way and estimates the prior.

    Args:
        world: The world.
        fold: Whose users to learn from.
        contexts: int64 (C,), start states of the fold, one episode each.
        horizon: Requests an episode.
        env_seed: Seed of the draws.
        slate_size: Items a request; None takes the world's.
        cost_weight: Reward lost for the relative serving cost.
        env_settings: Further keyword arguments of the environment.
        device: Where the environment runs.

    Returns:
        The prior.
    """
    env = env_maker(world, fold, horizon, slate_size, cost_weight, env_settings, device)(len(contexts))
    key = fold_in(mix(torch.tensor(stream(env_seed, "policy draws"))), contexts).to(device)
    rewards, seen = [], []
    with torch.no_grad():
        _, info = env.reset(
            seed=env_seed, options={"start_state": contexts.to(device), "noise": torch.zeros_like(contexts).to(device)}
        )
        alive = torch.ones(len(contexts), dtype=torch.bool, device=device)
        for request in range(horizon):
            mask = torch.as_tensor(info["action_mask"], device=device).to(torch.bool)
            rewards.append(env.peek_sampled_rewards().cpu().numpy())
            seen.append((mask & alive[:, None]).cpu().numpy())
            action = sample_actions(masked_uniform(mask), uniform(fold_in(key, request)))
            _, _, terminated, truncated, info = env.step(action)
            alive = alive & ~(terminated | truncated)
    env.close()
    return fit_reward_prior(np.stack(rewards, axis=1).astype(np.float64), np.stack(seen, axis=1))


def fit_reward_prior(reward: Floats, seen: NDArray[np.bool_]) -> RewardPrior:
    """Moments of users and of noise.

    Products of rewards of two different requests of one user share the user and no luck: their mean is the covariance over
    users. What the products of one request have beyond that is noise.

    Args:
        reward: (users, T, K), sampled rewards of all strategies at each state.
        seen: bool (users, T, K), False after leaving and where a strategy was out of service.

    Returns:
        The prior, its covariances made positive definite.
    """
    weight = seen.astype(np.float64)
    count = weight.sum(axis=0)
    mean = np.where(count > 0, (reward * weight).sum(axis=0) / np.maximum(count, 1.0), 0.0)
    for request in range(1, len(mean)):
        mean[request] = np.where(count[request] < FEWEST_ROWS, mean[request - 1], mean[request])
    rest = (reward - mean) * weight
    total, number = rest.sum(axis=1), weight.sum(axis=1)
    same, same_number = (np.einsum("utk,utl->kl", x, x) for x in (rest, weight))
    pairs = number.T @ number - same_number
    cov = (total.T @ total - same) / np.maximum(pairs, 1.0)
    noise = same / np.maximum(same_number, 1.0) - cov
    floor = max(1e-4 * float(np.diag(same / np.maximum(same_number, 1.0)).mean()), 1e-12)
    return RewardPrior(mean, _positive(cov, floor), _positive(noise, floor))


def _positive(matrix: Floats, floor: float) -> Floats:
    """The nearest symmetric matrix whose eigenvalues are at least `floor`."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2.0)
    result: Floats = (vectors * np.maximum(values, floor)) @ vectors.T
    return result
