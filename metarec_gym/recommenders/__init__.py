"""Strategies: recommenders fitted on fold S, frozen into tensors, that score histories and never see a user id."""

from metarec_gym.recommenders.base import Cost, Strategy
from metarec_gym.recommenders.pool import Pool
from metarec_gym.recommenders.precomputed import Precomputed
from metarec_gym.recommenders.registry import DEFAULT_POOL, STRATEGIES, make_strategy, register_strategy

__all__ = [
    "DEFAULT_POOL",
    "STRATEGIES",
    "Cost",
    "Pool",
    "Precomputed",
    "Strategy",
    "make_strategy",
    "register_strategy",
]
