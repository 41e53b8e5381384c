"""Which strategies are in service: by schedule, and by outages that every policy meets alike."""

from __future__ import annotations

import torch
from torch import Tensor

from metarec_gym.envs.config import EnvConfig
from metarec_gym.seeding import fold_in, uniform

OUTAGE_DRAW = -6


def service_tables(config: EnvConfig, strategies: tuple[str, ...], horizon: int) -> tuple[Tensor, Tensor]:
    """What the schedule says of every request.

    A strategy whose first coming or going is `added` is out of service before it; any other is in service from the start.

    Args:
        config: The settings.
        strategies: Names, in the pool's order.
        horizon: Requests an episode.

    Returns:
        In service and stale; bool (horizon + 1, K) each, the last row for the state after the last request.

    Raises:
        ValueError: When the schedule leaves a request without any strategy.
    """
    service = torch.ones(horizon + 1, len(strategies), dtype=torch.bool)
    stale = torch.zeros_like(service)
    for k, name in enumerate(strategies):
        events = sorted((request, event) for strategy, event, request in config.schedule if strategy == name)
        presence = [event for _, event in events if event in ("added", "removed")]
        service[:, k] = name not in config.unavailable and presence[:1] != ["added"]
        for request, event in events:
            table = service if event in ("added", "removed") else stale
            table[request:, k] = event in ("added", "stale")
    empty = torch.nonzero(~service.any(dim=1))
    if len(empty):
        raise ValueError(f"the schedule leaves no strategy in service at request {int(empty[0])}; keep at least one")
    return service, stale


def outage(draw_key: Tensor, request: Tensor, down: Tensor, rate: float, length: float, *, first: bool) -> Tensor:
    """Strategies that have failed when request `request` comes: a chain of two states for each, keyed by the episode.

    Args:
        draw_key: int64 (rows,).
        request: int64 (rows,).
        down: bool (rows, K), failed at the request before; not read if `first`.
        rate: Probability that a strategy fails.
        length: Mean requests until it serves again.
        first: The episode's first request: the chain starts from its long-run shares.

    Returns:
        bool (rows, K).
    """
    strategy = torch.arange(down.shape[1], device=draw_key.device)
    key = fold_in(fold_in(draw_key, OUTAGE_DRAW), request)
    draw = uniform(fold_in(key[:, None], strategy))
    if first:
        return draw < rate / (rate + 1.0 / length)
    return torch.where(down, draw >= 1.0 / length, draw < rate)


def in_service(service: Tensor, down: Tensor) -> Tensor:
    """Strategies that can serve; where outages leave none, the first scheduled one of the pool is held in service.

    Args:
        service: bool (rows, K), by schedule; at least one in each row.
        down: bool (rows, K), failed; (rows, 0) where outages are off.

    Returns:
        bool (rows, K).
    """
    if down.shape[1] == 0:
        return service
    up = service & ~down
    first = service & (service.to(torch.int64).cumsum(dim=1) == 1)
    return torch.where(up.any(dim=1, keepdim=True), up, first)
