"""The hierarchical bandit with a predicted prior: r = predicted(observation, strategy) + theta_user,strategy + noise.

`predicted` holds what is known of users by their observation (history, lists, request number, how often a strategy has served);
theta ~ N(0, Sigma) is how this user differs from users who look the same, learned inside the episode. Both come from training
users. `HierarchicalUcb` predicts with one ridge regression per strategy; `PriorBandit` takes any predictor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from agents.bandits.population import drift, effects_of, episodes_of, kalman, posterior_draws
from agents.bandits.shared import Saved, best_of, play, win_shares
from metarec_gym.policy import masked_uniform


@dataclass(frozen=True)
class Served:
    """What training users answered, request by request.

    Attributes:
        obs: float32 (requests, num_rows, obs_dim).
        action: int64 (requests, num_rows).
        reward: float32 (requests, num_rows).
        done: bool (requests, num_rows), True on an episode's last request.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    done: Tensor


def serve(env: Any, requests: int, seed: int, policy: Any | None = None, epsilon: float = 1.0) -> Served:
    """Serves training users with a policy and, with probability epsilon, at random.

    Args:
        env: A same-step vector environment, numpy or torch.
        requests: How many; rounded up to whole steps of the environment.
        seed: Of the environment and the choices.
        policy: A bandit with rows; None serves at random.
        epsilon: Share of random service.
    """
    kept: list[tuple[Tensor, ...]] = []
    if policy is not None:
        policy.begin(env.num_envs, getattr(env, "device", "cpu"))

    def choose(obs: Tensor, mask: Tensor) -> Tensor:
        if policy is None:
            return masked_uniform(mask)
        probs: Tensor = (1.0 - epsilon) * policy.action_probs(obs, mask) + epsilon * masked_uniform(mask)
        return probs

    def keep(obs: Tensor, action: Tensor, reward: Tensor, done: Tensor) -> None:
        kept.append((obs.cpu().clone(), action.cpu(), reward.cpu(), done.cpu()))
        if policy is not None:
            policy.observe(obs, action, reward, torch.ones_like(done))
            restart(policy, done)

    play(env, requests, seed, choose, keep)
    return Served(*(torch.stack(part) for part in zip(*kept, strict=True)))


def restart(bandit: Any, done: Tensor) -> None:
    """New users sit in the rows whose episode has ended; bool (num_rows,)."""
    if not bool(done.any()):
        return
    before = {name: getattr(bandit, name) for name in bandit.ROWS}
    bandit.begin(len(done), done.device)
    for name, old in before.items():
        new = getattr(bandit, name)
        setattr(bandit, name, torch.where(done.reshape(-1, *[1] * (new.ndim - 1)), new, old))


@dataclass(frozen=True)
class Features:
    """Which parts of the observation predict a strategy's reward.

    Attributes:
        shared: Columns that every strategy's regression sees.
        own: First columns of blocks of K columns, of which a strategy's regression sees its own column.
        bent: Of the columns in `shared`, those that bend at `knots`, and that act on each column of `shared` too.
        bent_own: Of the blocks in `own`, those whose column bends.
        knots: Where; columns are in [-1, 1].
    """

    shared: tuple[int, ...]
    own: tuple[int, ...] = ()
    bent: tuple[int, ...] = ()
    bent_own: tuple[int, ...] = ()
    knots: tuple[float, ...] = (0.15, 0.3, 0.5, 0.7)

    @classmethod
    def all_of(cls, obs_dim: int) -> Features:
        """Every column, nothing bent."""
        return cls(shared=tuple(range(obs_dim)))

    def of(self, obs: Tensor, num_strategies: int) -> Tensor:
        """Features of every strategy; (num_rows, obs_dim) -> float64 (num_rows, K, width)."""
        obs = obs.to(torch.float64)
        shared = obs[:, list(self.shared)]
        parts = [torch.ones_like(obs[:, :1]), shared]
        for column in self.bent:
            parts += [(obs[:, [column]] - knot).clamp(min=0.0) for knot in self.knots]
            parts.append(obs[:, [column]] * shared)
        common = torch.cat(parts, dim=1)[:, None].expand(-1, num_strategies, -1)
        blocks = [common]
        for start in self.own:
            blocks.append(obs[:, start : start + num_strategies, None])
        for start in self.bent_own:
            own = obs[:, start : start + num_strategies, None]
            blocks += [(own - knot).clamp(min=0.0) for knot in self.knots]
        return torch.cat(blocks, dim=2)


class _Hierarchical(Saved):
    """The belief about each row's deviation from what is predicted; subclasses predict."""

    ROWS = ("_mean", "_cov", "_request")

    def __init__(
        self,
        num_strategies: int,
        exploration: float,
        memory: float,
        thompson: bool,
        seed: int,
        draws: int,
        lead: tuple[int, ...],
        margin: float,
    ) -> None:
        if not 0.0 < memory <= 1.0:
            raise ValueError(f"memory is {memory}, expected a number in (0, 1]; 1 forgets nothing")
        self.num_strategies, self.exploration, self.memory = int(num_strategies), float(exploration), float(memory)
        self.thompson, self.seed, self.draws = bool(thompson), int(seed), int(draws)
        self.lead, self.margin = tuple(int(k) for k in lead), float(margin)
        self.settings = {
            "num_strategies": self.num_strategies,
            "exploration": self.exploration,
            "memory": self.memory,
            "thompson": self.thompson,
            "seed": self.seed,
            "draws": self.draws,
            "lead": list(self.lead),
            "margin": self.margin,
        }
        self.effect_cov = torch.eye(num_strategies, dtype=torch.float64)
        self.noise_var = 1.0

    def predict(self, obs: Tensor) -> Tensor:
        """Expected reward of every strategy for a user who looks like this; float64 (num_rows, K)."""
        raise NotImplementedError

    def _loaded(self) -> None:
        self.noise_var = float(self.noise_var)

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Every row is a new user, who is as predicted until answers come."""
        k = self.num_strategies
        self._mean = torch.zeros(num_rows, k, dtype=torch.float64, device=device)
        self._cov = self.effect_cov.to(device).repeat(num_rows, 1, 1)
        self._request = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def scores(self, obs: Tensor) -> Tensor:
        """Predicted reward plus what this user's answers say, plus the margin of the leading strategy; (num_rows, K)."""
        mean = self.predict(obs) + self._mean
        if self.lead and self.margin:
            lead = torch.tensor(self.lead, device=mean.device)[self._request.clamp(max=len(self.lead) - 1)]
            mean = mean.scatter_add(1, lead[:, None], torch.full_like(mean[:, :1], self.margin))
        return mean

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The highest mean plus bound, or the share of wins among posterior draws."""
        mean = self.scores(obs)
        if self.thompson:
            samples = posterior_draws(self.seed, self._request, self.draws, mean, self._cov, self.exploration)
            return win_shares(samples, action_mask)
        spread = self._cov.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
        return best_of(mean + self.exploration * spread, action_mask)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Updates the belief about every row that was served; `obs` is what was seen before acting, however long ago."""
        expected = self.predict(obs).gather(1, action[:, None])[:, 0]
        mean, cov = kalman(self._mean, self._cov, action, reward.to(torch.float64) - expected, self.noise_var, alive)
        zero, prior = torch.zeros_like(mean[:1]), self.effect_cov.to(mean.device)
        self._mean, self._cov = drift(mean, cov, zero, prior, self.memory, alive)
        self._request = self._request + alive.to(torch.int64)

    def fit_effects(self, served: Served, expected: Tensor) -> Self:
        """Estimates Sigma and the noise from what the prediction leaves.

        Args:
            served: Answers of training users, best served at random.
            expected: float64 (requests, num_rows), predicted reward of what served.
        """
        episode, _ = episodes_of(served.done)
        rest = served.reward.to(torch.float64) - expected
        self.effect_cov, self.noise_var = effects_of(
            rest.flatten(), served.action.flatten(), episode.flatten(), self.num_strategies
        )
        return self


class HierarchicalUcb(_Hierarchical):
    """Hierarchical UCB or Thompson sampling whose prior mean is a ridge regression on the present observation.

    The regression sees the request number and how often each strategy has served, with bends, so it holds each strategy's
    trend (a schedule) and how lists wear out. It is fitted on training users in rounds: at random first, then with the
    bandit's own choices, in which users are worn as it wears them.

    Args:
        num_strategies: K.
        features: What the regressions see; a dict of `Features` too.
        exploration: Posterior standard deviations added to the mean, or the scale of Thompson's draws.
        memory: Share of a user's deviation that is left one request later; 1 = users do not change.
        thompson: Posterior draws decide instead of a bound.
        seed: Of the posterior draws.
        draws: Posterior draws that the probabilities are shares of.
        lead: A schedule: strategy that leads at each request, the last one from then on; empty = none.
        margin: Reward that the leading strategy is given on top: others serve only where they are better by more.
        ridge: Prior precision of the regression weights.
    """

    LEARNED = ("weights", "effect_cov", "noise_var")

    def __init__(
        self,
        num_strategies: int,
        features: Features | dict[str, Any],
        *,
        exploration: float = 0.5,
        memory: float = 1.0,
        thompson: bool = False,
        seed: int = 0,
        draws: int = 64,
        lead: tuple[int, ...] = (),
        margin: float = 0.0,
        ridge: float = 3.0,
    ) -> None:
        super().__init__(num_strategies, exploration, memory, thompson, seed, draws, lead, margin)
        if isinstance(features, dict):
            features = Features(**{name: tuple(value) for name, value in features.items()})
        self.features, self.ridge = features, float(ridge)
        self.settings |= {"features": asdict(features), "ridge": self.ridge}
        width = (max((*features.shared, *(s + num_strategies - 1 for s in features.own), 0))) + 1
        width = features.of(torch.zeros(1, width), num_strategies).shape[2]
        self.weights = torch.zeros(num_strategies, width, dtype=torch.float64)
        self.begin(0)

    def like(self, **changed: Any) -> HierarchicalUcb:
        """The same learned bandit with other settings."""
        other = HierarchicalUcb(**{**self.settings, **changed})
        other.weights, other.effect_cov, other.noise_var = self.weights, self.effect_cov, self.noise_var
        other.begin(0)
        return other

    def predict(self, obs: Tensor) -> Tensor:
        """Ridge regression of every strategy; float64 (num_rows, K)."""
        return (self.features.of(obs, self.num_strategies) * self.weights.to(obs.device)).sum(dim=2)

    def fit(self, rounds: list[Served], sweeps: int = 2) -> Self:
        """Fits regressions, Sigma and noise.

        Args:
            rounds: Answers of training users; the first round served at random, Sigma comes from it.
            sweeps: Passes. In a pass after the first the regression explains what the belief, as it then stood, did not:
                a bandit serves a user what this user likes, which would flatter that strategy otherwise.
        """
        believed = [torch.zeros_like(part.reward, dtype=torch.float64) for part in rounds]
        for sweep in range(sweeps):
            self._regress(rounds, believed)
            expected = self._expected(rounds[0])
            self.fit_effects(rounds[0], expected)
            if sweep < sweeps - 1:
                believed = [self._replayed(part) for part in rounds]
        self.begin(0)
        return self

    def _regress(self, rounds: list[Served], believed: list[Tensor]) -> None:
        k, width = self.weights.shape
        gram = torch.eye(width, dtype=torch.float64).mul(self.ridge).repeat(k, 1, 1)
        moment = torch.zeros(k, width, dtype=torch.float64)
        for part, belief in zip(rounds, believed, strict=True):
            target = part.reward.to(torch.float64) - belief
            for t in range(len(part.obs)):
                features = self.features.of(part.obs[t], k)
                for a in range(k):
                    mine = part.action[t] == a
                    x = features[mine, a]
                    gram[a] += x.T @ x
                    moment[a] += x.T @ target[t, mine]
        self.weights = torch.linalg.solve(gram, moment[..., None])[..., 0]

    def _expected(self, part: Served) -> Tensor:
        rows = [
            self.predict(obs).gather(1, action[:, None])[:, 0]
            for obs, action in zip(part.obs, part.action, strict=True)
        ]
        return torch.stack(rows)

    def _replayed(self, part: Served) -> Tensor:
        """Deviation that was believed before each answer; float64 (requests, num_rows)."""
        self.begin(part.reward.shape[1])
        believed = []
        for t in range(len(part.obs)):
            action = part.action[t]
            believed.append(self._mean.gather(1, action[:, None])[:, 0])
            self.observe(part.obs[t], action, part.reward[t], torch.ones_like(part.done[t]))
            restart(self, part.done[t])
        return torch.stack(believed)


class PriorBandit(_Hierarchical):
    """Any predictor as prior mean, and what users differ in beyond it learned inside the episode.

    Not saved: the predictor is the caller's.

    Args:
        num_strategies: K.
        predictor: (num_rows, obs_dim) -> (num_rows, K) expected rewards.
        exploration: As in `HierarchicalUcb`.
        memory: As in `HierarchicalUcb`.
        thompson: As in `HierarchicalUcb`.
        seed: Of the posterior draws.
        draws: Posterior draws.
    """

    def __init__(
        self,
        num_strategies: int,
        predictor: Callable[[Tensor], Tensor],
        *,
        exploration: float = 0.5,
        memory: float = 1.0,
        thompson: bool = False,
        seed: int = 0,
        draws: int = 64,
    ) -> None:
        super().__init__(num_strategies, exploration, memory, thompson, seed, draws, (), 0.0)
        self.predictor = predictor
        self.begin(0)

    def predict(self, obs: Tensor) -> Tensor:
        """The predictor's answer; float64 (num_rows, K)."""
        return self.predictor(obs).to(torch.float64)

    def learn(self, env: Any, requests: int, *, seed: int) -> Self:
        """Serves training users at random and estimates how they differ beyond the prediction.

        Args:
            env: A same-step vector environment; best of users that the predictor was not fitted to.
            requests: How many; rounded up to whole steps of the environment.
            seed: Of the environment and the choices.
        """
        part = serve(env, requests, seed)
        expected = [self.predict(o).gather(1, a[:, None])[:, 0] for o, a in zip(part.obs, part.action, strict=True)]
        self.fit_effects(part, torch.stack(expected))
        self.begin(0)
        return self

    def save(self, path: Any, *, rows: bool = False) -> Any:
        """Refused.

        Raises:
            TypeError: Always: the predictor is code, which is not written into files.
        """
        raise TypeError("PriorBandit holds a predictor that is code; save that and build the bandit again")
