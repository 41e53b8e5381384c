"""Random effects by approximate marginal likelihood: how users differ in what they go for.

    choice of event e of user u among alternatives j:   P(j) = softmax_j( offset_ej + z_u . phi_ej ),    z_u ~ N(W x_u, Sigma)

One form serves both kinds of data. A positives-only log: the alternatives are the item taken and sampled items (McFadden's
correction -log q_j sits in the offset); constants drop out, so a rate of the user's own is not asked for. A yes/no answer: the
alternatives are the item and a null with offset 0 and phi 0.

W and Sigma maximise Laplace's approximation of the marginal likelihood: in each round the users' modes and curvatures are found
by damped Newton steps, all users at once, and with the likelihoods so replaced by Gaussians, EM for W and Sigma costs next to
nothing and runs to its end. The fixed point is that of Laplace EM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_CHUNK_ROWS = 8192
_INNER_EM = 60


@dataclass(frozen=True)
class ChoiceData:
    """Events, each a choice among alternatives."""

    user: Tensor
    """int64 (n_events,): 0..n_users-1."""
    phi: Tensor
    """float32 (n_events, n_alternatives, n_features)."""
    offset: Tensor
    """float32 (n_events, n_alternatives)."""
    target: Tensor
    """float32 (n_events, n_alternatives): share of each alternative, rows sum to 1."""
    n_users: int

    def to(self, device: torch.device | str) -> ChoiceData:
        """The same events on `device`."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    @classmethod
    def answers(cls, user: Tensor, phi: Tensor, offset: Tensor, answer: Tensor, n_users: int) -> ChoiceData:
        """Yes/no answers: phi (n, n_features), offset and answer (n,), answer in [0, 1]."""
        return cls(
            user,
            torch.stack([phi, torch.zeros_like(phi)], dim=1),
            torch.stack([offset, torch.zeros_like(offset)], dim=1),
            torch.stack([answer, 1.0 - answer], dim=1),
            n_users,
        )


@dataclass(frozen=True)
class Effects:
    """Fitted distribution of the users' coefficients; float64."""

    weight: Tensor
    """(n_features, n_covariates): W."""
    covariance: Tensor
    """(n_features, n_features): Sigma."""
    mean: Tensor
    """(n_users, n_features): posterior means (modes)."""
    posterior: Tensor
    """(n_users, n_features, n_features): posterior covariances."""
    log_marginal: float
    """Laplace's log marginal likelihood."""
    rounds: int
    """Rounds until the covariance stood still, or the most allowed."""

    def to(self, device: torch.device | str) -> Effects:
        """The same effects on `device`."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def prior(self, covariates: Tensor) -> Tensor:
        """Prior means of other users; (n, n_covariates) -> (n, n_features)."""
        return covariates.to(torch.float64) @ self.weight.T


def fit_effects(
    data: ChoiceData,
    covariates: Tensor,
    *,
    free: Tensor | None = None,
    rounds: int = 12,
    tolerance: float = 0.01,
    start_sd: float = 0.5,
) -> Effects:
    """Fits W and Sigma and every user's posterior, on the device of the events.

    Args:
        data: The events.
        covariates: (n_users, n_covariates) x_u, the first column 1.
        free: bool (n_features,): features with a random coefficient; the others have coefficient 0. None = all.
        rounds: Most rounds of modes and covariance.
        tolerance: Rounds end when no standard deviation moves by more than this share of the largest one.
        start_sd: Standard deviation that the search starts from.

    Returns:
        The effects; features that are not free have zeros everywhere.
    """
    n_features, device = data.phi.shape[2], data.phi.device
    free = torch.ones(n_features, dtype=torch.bool, device=device) if free is None else free.to(device)
    # a feature that never varies between alternatives says nothing: EM would leave its prior where it started
    spread = data.phi - data.phi.mean(dim=1, keepdim=True)
    free = free & (spread.abs().amax(dim=(0, 1)) > 1e-9)
    kept = torch.nonzero(free).flatten()
    x = covariates.to(device, torch.float64)
    n, f = data.n_users, len(kept)
    if f == 0 or len(data.user) == 0:
        zero = x.new_zeros(n_features, n_features)
        loss = _evaluate(data, x.new_zeros(n, 0), kept[:0], curvature=False)[0]
        mean = x.new_zeros(n, n_features)
        weight = x.new_zeros(n_features, x.shape[1])
        return Effects(weight, zero, mean, zero.expand(n, -1, -1).clone(), float(loss.sum()), 0)
    # solved once: W is an ordinary least squares fit of the users' means
    gram = torch.linalg.pinv(x.T @ x) @ x.T
    weight = x.new_zeros(f, x.shape[1])
    covariance = torch.eye(f, dtype=x.dtype, device=device) * start_sd**2
    mode = x @ weight.T
    posterior = covariance.expand(n, f, f)
    finished = 0
    for _round in range(rounds):
        mode, log_lik, gradient, curvature = _modes(data, kept, mode, x @ weight.T, covariance)
        # near the mode the log-likelihood is -1/2 z' C z + b' z + constant
        linear = (curvature @ mode[..., None])[..., 0] + gradient
        before = torch.cat([covariance.diagonal().sqrt(), weight.flatten()])
        for _step in range(_INNER_EM):
            mean, posterior = _gaussian_posterior(curvature, linear, x @ weight.T, covariance)
            weight = (gram @ mean).T
            residual = mean - x @ weight.T
            second = residual[:, :, None] * residual[:, None, :] + posterior
            stretch = _stretch(curvature, linear - (curvature @ (x @ weight.T)[..., None])[..., 0], residual, second)
            updated = stretch @ (second.sum(dim=0) / n) @ stretch.T
            updated = 0.5 * (updated + updated.T)
            step = float((updated - covariance).abs().max())
            covariance = updated
            if step < 1e-5 * float(covariance.diagonal().max()) + 1e-12:
                break
        mode = _gaussian_posterior(curvature, linear, x @ weight.T, covariance)[0]
        after = torch.cat([covariance.diagonal().sqrt(), weight.flatten()])
        finished += 1
        scale = max(float(covariance.diagonal().max().sqrt()), 0.05)
        if float((after - before).abs().max()) < tolerance * scale:
            break
    mode, log_lik, gradient, curvature = _modes(data, kept, mode, x @ weight.T, covariance)
    linear = (curvature @ mode[..., None])[..., 0] + gradient
    log_marginal = _laplace(log_lik, mode, curvature, x @ weight.T, covariance)
    mean, posterior = _gaussian_posterior(curvature, linear, x @ weight.T, covariance)

    def embed(part: Tensor, *axes: int) -> Tensor:
        shape = [n_features if axis in axes else size for axis, size in enumerate(part.shape)]
        whole = x.new_zeros(shape)
        index = [kept if axis in axes else torch.arange(size, device=device) for axis, size in enumerate(part.shape)]
        whole[torch.meshgrid(*index, indexing="ij")] = part
        return whole

    return Effects(
        embed(weight, 0), embed(covariance, 0, 1), embed(mean, 1), embed(posterior, 1, 2), log_marginal, finished
    )


def _evaluate(data: ChoiceData, z: Tensor, kept: Tensor, *, curvature: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Log-likelihood of each user at z, its gradient and minus its Hessian; float64 sums over float32 events.

    Returns:
        (n_users,), (n_users, f), (n_users, f, f).
    """
    n, f = z.shape
    log_lik, gradient, hessian = (z.new_zeros(shape) for shape in ((n,), (n, f), (n, f * f)))
    z32 = z.to(torch.float32)
    every = len(kept) == data.phi.shape[2]
    for lo in range(0, len(data.user), _CHUNK_ROWS):
        rows = slice(lo, lo + _CHUNK_ROWS)
        user, target = data.user[rows], data.target[rows]
        phi = data.phi[rows] if every else data.phi[rows][..., kept]
        logit = data.offset[rows] + (phi @ z32[user][..., None])[..., 0]
        log_p = torch.log_softmax(logit, dim=1)
        p = log_p.exp()
        log_lik.index_add_(0, user, (target * log_p).sum(dim=1).to(torch.float64))
        if f == 0:
            continue
        gradient.index_add_(0, user, ((target - p)[:, None, :] @ phi)[:, 0].to(torch.float64))
        if curvature:
            weighted = phi * p[..., None]
            centre = weighted.sum(dim=1)
            h = phi.transpose(1, 2) @ weighted - centre[:, :, None] * centre[:, None, :]
            hessian.index_add_(0, user, h.flatten(1).to(torch.float64))
    return log_lik, gradient, hessian.view(n, f, f)


def _modes(
    data: ChoiceData, kept: Tensor, start: Tensor, prior_mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every user's posterior mode by damped Newton steps; also log-likelihood, gradient and curvature there."""
    precision = torch.linalg.inv(_regular(covariance))

    def objective(log_lik: Tensor, z: Tensor) -> Tensor:
        residual = z - prior_mean
        return log_lik - 0.5 * torch.einsum("uf,fg,ug->u", residual, precision, residual)

    z = start.clone()
    log_lik, gradient, curvature = _evaluate(data, z, kept)
    value = objective(log_lik, z)
    size = torch.ones_like(value)
    for _ in range(12):
        slope = gradient - (z - prior_mean) @ precision
        step = torch.linalg.solve(curvature + precision, slope)
        # expected gain of the full step; what is left when it is tiny is below the approximation's own error
        if float((slope * step).sum(dim=1).max()) < 1e-4:
            break
        candidate = z + size[:, None] * step
        new_lik, new_gradient, new_curvature = _evaluate(data, candidate, kept)
        new_value = objective(new_lik, candidate)
        better = new_value >= value - 1e-6
        size = torch.where(better, torch.ones_like(size), size * 0.5)
        z = torch.where(better[:, None], candidate, z)
        value, log_lik = torch.where(better, new_value, value), torch.where(better, new_lik, log_lik)
        gradient = torch.where(better[:, None], new_gradient, gradient)
        curvature = torch.where(better[:, None, None], new_curvature, curvature)
    return z, log_lik, gradient, curvature


def _regular(covariance: Tensor) -> Tensor:
    return covariance + torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device) * 1e-8


def _gaussian_posterior(
    curvature: Tensor, linear: Tensor, prior_mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Posterior under the likelihood exp(-1/2 z'Cz + b'z); well behaved when the covariance is nearly singular."""
    root = torch.linalg.cholesky(_regular(covariance))
    # C = L (I + L' H L)^-1 L'
    inner = torch.eye(len(root), dtype=root.dtype, device=root.device) + root.T @ curvature @ root
    posterior = root @ torch.linalg.solve(inner, root.T.expand(len(curvature), -1, -1))
    pull = linear - (curvature @ prior_mean[..., None])[..., 0]
    mean = prior_mean + (posterior @ pull[..., None])[..., 0]
    return mean, 0.5 * (posterior + posterior.transpose(1, 2))


def _stretch(curvature: Tensor, pull: Tensor, mean: Tensor, second: Tensor) -> Tensor:
    """Matrix A that fits best when a user's residual r is replaced by A r: the extra step of parameter-expanded EM.

    Plain EM creeps where the users hardly differ; this step jumps (Liu, Rubin and Wu, Biometrika 1998).
    It maximises sum_u pull_u' A E[r] - 1/2 E[r' A' C_u A r].
    """
    f = mean.shape[1]
    # sum_u C_u A E[r r'] = sum_u pull_u E[r]', written for vec(A) row by row: A[a, b] at a * f + b
    system = torch.einsum("uac,ubd->abcd", curvature, second).reshape(f * f, f * f)
    right = (pull.T @ mean).reshape(f * f)
    # the change from the identity is solved for, by eigenvalues: directions without information keep their place
    identity = torch.eye(f, dtype=system.dtype, device=system.device).reshape(f * f)
    values, vectors = torch.linalg.eigh(0.5 * (system + system.T))
    usable = values > 1e-6 * values.max()
    inverse = torch.where(usable, 1.0 / torch.where(usable, values, torch.ones_like(values)), torch.zeros_like(values))
    change = vectors @ (inverse * (vectors.T @ (right - system @ identity)))
    stretched: Tensor = (identity + change).view(f, f)
    return stretched


def _laplace(log_lik: Tensor, mode: Tensor, curvature: Tensor, prior_mean: Tensor, covariance: Tensor) -> float:
    """Sum over users of log-likelihood + log prior at the mode - 1/2 log det(I + H Sigma)."""
    regular = _regular(covariance)
    residual = mode - prior_mean
    quadratic = (residual * torch.linalg.solve(regular, residual.T).T).sum(dim=1)
    identity = torch.eye(len(regular), dtype=torch.float64, device=regular.device)
    inflation = torch.linalg.slogdet(identity + curvature @ regular)[1]
    return float((log_lik - 0.5 * quadratic - 0.5 * inflation).sum())


def cholesky_factor(covariance: Tensor) -> Tensor:
    """Lower factors L of covariances (..., f, f) that may be singular: L L' = covariance."""
    values, vectors = torch.linalg.eigh(covariance.to(torch.float64))
    # QR of the symmetric root's transpose gives a triangular root even where eigenvalues are 0
    root = (vectors * values.clamp(min=0.0).sqrt()[..., None, :]).transpose(-1, -2)
    upper = torch.linalg.qr(root, mode="r")[1]
    sign = torch.where(torch.diagonal(upper, dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    lower: Tensor = (upper * sign[..., :, None]).transpose(-1, -2)
    return lower
