"""Strategies: recommenders fitted on fold S, frozen into tensors, that score histories and never see a user id."""

from metarec_gym.recommenders.base import Cost, Strategy
from metarec_gym.recommenders.pool import DEFAULT_POOL, STRATEGIES, Pool

__all__ = ["DEFAULT_POOL", "STRATEGIES", "Cost", "Pool", "Strategy"]
