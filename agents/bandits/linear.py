"""Linear bandits shared by all users: each strategy's reward is linear in the observation (Li et al., 2010).

| class | model | choice |
|---|---|---|
| `LinUcb`, `LinTs` | disjoint: r = x . theta_a | mean plus bound; posterior draws |
| `HybridLinUcb`, `HybridLinTs` | hybrid: r = z_a . beta + x . theta_a, beta shared by the strategies | the same |

`learn` fits a model on training users; `begin` goes back to what `learn` left, so what was seen in one evaluation never enters
the next. Feedback may come late and for several requests at once: `observe` uses only the observation that it is given.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from agents.bandits.shared import Learner, best_of, draw_keys, win_shares, with_constant
from metarec_gym.policy import one_hot_probs
from metarec_gym.seeding import normal


def whitener(gram: Tensor) -> Tensor:
    """L^-1 of gram = L L', so that ||L^-1 x||^2 = x' gram^-1 x; float64 (..., d, d)."""
    factor = torch.linalg.cholesky(gram)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse


class _Linear(Learner):
    """What the linear bandits share: sufficient statistics, freezing, and the two ways to choose."""

    STATISTICS: tuple[str, ...] = ()
    """Names of the sums that are learned; float64, because they run over a million requests."""
    thompson = False
    """Posterior draws decide instead of a bound."""

    def __init__(
        self,
        num_strategies: int,
        obs_dim: int,
        alpha: float,
        ridge: float,
        online: bool,
        frozen: bool,
        seed: int,
        draws: int,
    ) -> None:
        if num_strategies < 1 or ridge <= 0.0:
            raise ValueError(f"num_strategies is {num_strategies} and ridge {ridge}; expected at least 1 and above 0")
        self.num_strategies, self.obs_dim = int(num_strategies), int(obs_dim)
        self.alpha, self.ridge, self.online, self.frozen = float(alpha), float(ridge), bool(online), bool(frozen)
        self.seed, self.draws = int(seed), int(draws)
        self.settings: dict[str, Any] = {
            "num_strategies": self.num_strategies,
            "obs_dim": self.obs_dim,
            "alpha": self.alpha,
            "ridge": self.ridge,
            "online": self.online,
            "frozen": self.frozen,
            "seed": self.seed,
            "draws": self.draws,
        }
        self.updates = torch.zeros((), dtype=torch.int64)

    def _keep(self) -> None:
        """What is there now is what `begin` goes back to."""
        for name in self.STATISTICS:
            setattr(self, f"learned_{name}", getattr(self, name).clone())
        self.learned_updates = self.updates.clone()

    def learn(self, env: Any, requests: int, *, seed: int) -> Self:
        """Plays `requests` requests of training users, choosing by its own rule and updating after each step.

        Args:
            env: A same-step vector environment, numpy or torch.
            requests: How many; rounded up to whole steps of the environment.
            seed: Of the environment and of ties.
        """
        self.frozen = False
        super().learn(env, requests, seed=seed)
        self._keep()
        self.frozen = self.settings["frozen"] = not self.online
        return self

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Back to what `learn` left."""
        for name in self.STATISTICS:
            setattr(self, name, getattr(self, f"learned_{name}").to(device).clone())
        self.updates = self.learned_updates.to(device).clone()
        self._solve()

    def _on(self, device: torch.device) -> None:
        if self.updates.device == device:
            return
        for name in (*self.STATISTICS, "updates"):
            setattr(self, name, getattr(self, name).to(device))
        self._solve()

    def _solve(self) -> None:
        raise NotImplementedError

    def expected(self, obs: Tensor) -> Tensor:
        """Mean reward of every strategy; (num_rows, obs_dim) -> float32 (num_rows, K)."""
        raise NotImplementedError

    def deviation(self, obs: Tensor) -> Tensor:
        """Its standard deviation for noise 1; (num_rows, obs_dim) -> float32 (num_rows, K)."""
        raise NotImplementedError

    def _samples(self, obs: Tensor) -> Tensor:
        """Rewards under drawn models; (num_rows, obs_dim) -> float32 (num_rows, draws, K)."""
        raise NotImplementedError

    def _normals(self, purpose: str, width: int) -> Tensor:
        return normal(draw_keys(self.seed, purpose, self.updates[None], self.draws, width))[0].to(torch.float64)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The highest mean plus bound, or the share of wins among drawn models; the highest mean if frozen."""
        self._on(obs.device)
        if self.frozen:
            return best_of(self.expected(obs), action_mask)
        if self.thompson:
            return win_shares(self._samples(obs), action_mask)
        return best_of(self.expected(obs) + self.alpha * self.deviation(obs), action_mask)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Adds the requests that were served, unless frozen; `obs` is what was seen before acting, however long ago."""
        if self.frozen or not bool(alive.any()):
            return
        self._on(obs.device)
        served = one_hot_probs(action, self.num_strategies).to(torch.float64) * alive.to(torch.float64)[:, None]
        self._add(obs, served, reward.to(torch.float64))
        self.updates = self.updates + 1
        self._solve()

    def _add(self, obs: Tensor, served: Tensor, reward: Tensor) -> None:
        """Adds to the sums; served float64 (num_rows, K), zero where nothing was."""
        raise NotImplementedError


class LinUcb(_Linear):
    """Disjoint LinUCB (Li et al., 2010, algorithm 1): each strategy's reward is linear in the observation.

    Args:
        num_strategies: K.
        obs_dim: Width of the observation; a constant is added.
        alpha: Width of the confidence bound, in standard deviations of the noise.
        ridge: Prior precision of the weights.
        online: The models go on learning after `learn`; False freezes them, and then the mean decides without a bound.
        frozen: Whether they are frozen; `learn` sets it.
    """

    STATISTICS = ("gram", "moment")
    LEARNED = ("learned_gram", "learned_moment", "learned_updates")
    ROWS = ("gram", "moment", "updates")

    def __init__(
        self,
        num_strategies: int,
        obs_dim: int,
        *,
        alpha: float = 0.5,
        ridge: float = 1.0,
        online: bool = False,
        frozen: bool = False,
        seed: int = 0,
        draws: int = 64,
    ) -> None:
        super().__init__(num_strategies, obs_dim, alpha, ridge, online, frozen, seed, draws)
        width = obs_dim + 1
        self.gram = torch.eye(width, dtype=torch.float64).mul(self.ridge).repeat(num_strategies, 1, 1)
        self.moment = torch.zeros(num_strategies, width, dtype=torch.float64)
        self._solve()
        self._keep()

    def _solve(self) -> None:
        white = whitener(self.gram)
        self._whitener = white.to(torch.float32)
        # A^-1 b = L'^-1 (L^-1 b)
        mean = (white.transpose(1, 2) @ (white @ self.moment[..., None]))[..., 0]
        self._weights = mean.to(torch.float32)

    def expected(self, obs: Tensor) -> Tensor:
        """Mean reward of every strategy; (num_rows, obs_dim) -> float32 (num_rows, K)."""
        return with_constant(obs) @ self._weights.T

    def deviation(self, obs: Tensor) -> Tensor:
        """Its standard deviation for noise 1; (num_rows, obs_dim) -> float32 (num_rows, K)."""
        spread: Tensor = torch.einsum("kij,nj->nki", self._whitener, with_constant(obs)).norm(dim=2)
        return spread

    def _samples(self, obs: Tensor) -> Tensor:
        k, width = self._weights.shape
        draws = self._normals("linear", k * width).reshape(self.draws, k, width).to(torch.float32)
        # theta = mean + alpha * L'^-1 e
        weights = self._weights + self.alpha * torch.einsum("kji,dkj->dki", self._whitener, draws)
        samples: Tensor = torch.einsum("ni,dki->ndk", with_constant(obs), weights)
        return samples

    def _add(self, obs: Tensor, served: Tensor, reward: Tensor) -> None:
        x = with_constant(obs).to(torch.float64)
        for k in range(self.num_strategies):
            rows = x * served[:, k, None]
            self.gram[k] += rows.T @ x
            self.moment[k] += rows.T @ reward


class LinTs(LinUcb):
    """Linear Thompson sampling (Agrawal and Goyal, 2013), disjoint: theta_a ~ N(A_a^-1 b_a, alpha^2 A_a^-1).

    Probabilities are the shares of wins among `draws` drawn models, keyed by (seed, number of updates, draw, weight) and shared
    by the rows.

    Args:
        num_strategies: K.
        obs_dim: Width of the observation; a constant is added.
        alpha: Standard deviation of the noise.
        ridge: Prior precision of the weights.
        online: The models go on learning after `learn`; False freezes them, and then the mean decides.
        frozen: Whether they are frozen; `learn` sets it.
        seed: Of the draws.
        draws: Drawn models.
    """

    thompson = True


class HybridLinUcb(_Linear):
    """Hybrid LinUCB (Li et al., 2010, algorithm 2): features of a strategy times features of the user share coefficients.

    E[r] = z_a . beta + x . theta_a, with x the user's features and a constant, and z_a the outer product of the strategy's own
    features with the crossed part of x. What is learned of a strategy through its features (what its list looks like, how often
    it served) holds
    for all of them. Kept as sums over requests; beta is solved from the Schur complement, which equals the paper's updates.

    Args:
        num_strategies: K.
        obs_dim: Width of the observation.
        own: First columns of blocks of K columns: column `own[j] + a` is feature j of strategy a.
        shared: Columns that describe the user; None takes all that are in no block of `own`.
        crossed: Columns that multiply the strategy's features, besides a constant; None takes `shared`.
        alpha: Width of the confidence bound, in standard deviations of the noise.
        ridge: Prior precision of the coefficients.
        online: The model goes on learning after `learn`; False freezes it, and then the mean decides without a bound.
        frozen: Whether it is frozen; `learn` sets it.
        seed: Of the draws (Thompson).
        draws: Drawn models (Thompson).

    Raises:
        ValueError: When there is no block or one does not fit the observation.
    """

    STATISTICS = ("gram", "moment", "cross", "shared_gram", "shared_moment")
    LEARNED = (*(f"learned_{name}" for name in STATISTICS), "learned_updates")
    ROWS = (*STATISTICS, "updates")

    def __init__(
        self,
        num_strategies: int,
        obs_dim: int,
        own: list[int],
        *,
        shared: list[int] | None = None,
        crossed: list[int] | None = None,
        alpha: float = 0.5,
        ridge: float = 1.0,
        online: bool = False,
        frozen: bool = False,
        seed: int = 0,
        draws: int = 64,
    ) -> None:
        super().__init__(num_strategies, obs_dim, alpha, ridge, online, frozen, seed, draws)
        if not own or min(own) < 0 or max(own) + num_strategies > obs_dim:
            raise ValueError(
                f"own is {own}: expected first columns of blocks of {num_strategies} inside an observation of {obs_dim}"
            )
        inside = {start + k for start in own for k in range(num_strategies)}
        self.own = [int(start) for start in own]
        self.shared = [c for c in range(obs_dim) if c not in inside] if shared is None else [int(c) for c in shared]
        self.crossed = list(self.shared) if crossed is None else [int(c) for c in crossed]
        self.settings |= {"own": self.own, "shared": self.shared, "crossed": self.crossed}
        x, z = len(self.shared) + 1, len(self.own) * (len(self.crossed) + 1)
        self.gram = torch.eye(x, dtype=torch.float64).mul(self.ridge).repeat(num_strategies, 1, 1)
        self.moment = torch.zeros(num_strategies, x, dtype=torch.float64)
        self.cross = torch.zeros(num_strategies, x, z, dtype=torch.float64)
        self.shared_gram = torch.eye(z, dtype=torch.float64) * self.ridge
        self.shared_moment = torch.zeros(z, dtype=torch.float64)
        self._solve()
        self._keep()

    def features(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """X (num_rows, len(shared) + 1) and z (num_rows, K, len(own) * (len(crossed) + 1))."""
        x = with_constant(obs[:, self.shared])
        own = torch.stack([obs[:, start : start + self.num_strategies] for start in self.own], dim=2)
        user = with_constant(obs[:, self.crossed])
        return x, (own[:, :, :, None] * user[:, None, None, :]).flatten(2)

    def _solve(self) -> None:
        white = whitener(self.gram)
        inverse = white.transpose(1, 2) @ white
        # A_a^-1 B_a, (K, x, z)
        self._carry = inverse @ self.cross
        # A0 = ridge I + sum z z' - sum_a B_a' A_a^-1 B_a; b0 likewise
        schur = self.shared_gram - (self.cross.transpose(1, 2) @ self._carry).sum(dim=0)
        right = self.shared_moment - (self._carry.transpose(1, 2) @ self.moment[..., None])[..., 0].sum(dim=0)
        self._shared_whitener = whitener((schur + schur.T) / 2.0)
        self._whitener = white
        self._beta = self._shared_whitener.T @ (self._shared_whitener @ right)
        # theta_a = A_a^-1 (b_a - B_a beta)
        self._theta = (inverse @ self.moment[..., None])[..., 0] - self._carry @ self._beta

    def expected(self, obs: Tensor) -> Tensor:
        """Mean reward of every strategy; (num_rows, obs_dim) -> float32 (num_rows, K)."""
        x, z = self.features(obs.to(torch.float64))
        return (z @ self._beta + x @ self._theta.T).to(torch.float32)

    def deviation(self, obs: Tensor) -> Tensor:
        """Its standard deviation for noise 1; (num_rows, obs_dim) -> float32 (num_rows, K)."""
        x, z = self.features(obs.to(torch.float64))
        # s = ||L0^-1 (z - B' A^-1 x)||^2 + ||L_a^-1 x||^2: the four terms of the paper's equation for s
        moved = z - torch.einsum("nx,kxz->nkz", x, self._carry)
        shared = torch.einsum("ij,nkj->nki", self._shared_whitener, moved).square().sum(dim=2)
        own = torch.einsum("kij,nj->nki", self._whitener, x).square().sum(dim=2)
        return (shared + own).sqrt().to(torch.float32)

    def _samples(self, obs: Tensor) -> Tensor:
        x, z = self.features(obs.to(torch.float64))
        k, width = self._theta.shape
        shift = self.alpha * self._normals("hybrid shared", len(self._beta)) @ self._shared_whitener
        normals = self._normals("hybrid own", k * width).reshape(self.draws, k, width)
        # theta_a given beta: its mean moves by -A_a^-1 B_a (beta - mean)
        theta = self._theta + self.alpha * torch.einsum("kji,dkj->dki", self._whitener, normals)
        theta = theta - torch.einsum("kxz,dz->dkx", self._carry, shift)
        samples = torch.einsum("nkz,dz->ndk", z, self._beta + shift) + torch.einsum("nx,dkx->ndk", x, theta)
        return samples.to(torch.float32)

    def _add(self, obs: Tensor, served: Tensor, reward: Tensor) -> None:
        x, z = self.features(obs.to(torch.float64))
        for k in range(self.num_strategies):
            rows = x * served[:, k, None]
            self.gram[k] += rows.T @ x
            self.moment[k] += rows.T @ reward
            self.cross[k] += rows.T @ z[:, k]
        # z of what was served
        z = (z * served[:, :, None]).sum(dim=1)
        self.shared_gram += z.T @ z
        self.shared_moment += z.T @ reward


class HybridLinTs(HybridLinUcb):
    """Thompson sampling in the hybrid model: beta from its posterior, theta_a given beta; arguments as `HybridLinUcb`."""

    thompson = True
