"""The judge: how users answer. `FrozenResponse` runs it; `fitting.fit_response` makes it from one fold of a log."""

from metarec_gym.response.frozen import FrozenResponse

__all__ = ["FrozenResponse"]
