"""Environments; importing this package loads no torch (`MetaRecVectorEnv` and `MetaRecEnv` load on first use)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarec_gym.envs.config import EnvConfig
    from metarec_gym.envs.replay import ReplayEnv, ReplayVectorEnv
    from metarec_gym.envs.single_env import MetaRecEnv
    from metarec_gym.envs.tune import TuneEnv, TuneVectorEnv
    from metarec_gym.envs.vector_env import MetaRecVectorEnv

__all__ = [
    "EnvConfig",
    "MetaRecEnv",
    "MetaRecVectorEnv",
    "ReplayEnv",
    "ReplayVectorEnv",
    "TuneEnv",
    "TuneVectorEnv",
]

_HOMES = {
    "EnvConfig": "config",
    "MetaRecEnv": "single_env",
    "MetaRecVectorEnv": "vector_env",
    "ReplayEnv": "replay",
    "ReplayVectorEnv": "replay",
    "TuneEnv": "tune",
    "TuneVectorEnv": "tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
