"""Further settings of the environment on a command line: `--env KEY=VALUE`, `--session-requests N`, `--judge NAME`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def env_settings(
    pairs: Sequence[str], *, session_requests: int | None = None, judge: str = "main", given: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """The settings by name; what is as the environment has it by itself is left out.

    Args:
        pairs: KEY=VALUE each; values are JSON, a plain word is itself.
        session_requests: Requests a session; None = the whole episode is one session.
        judge: Which of the fold's judges answers.
        given: Settings that are there already.

    Returns:
        The settings, checked.

    Raises:
        ValueError: When one is no pair, is given twice, or is no setting of the environment.
    """
    from metarec_gym.evaluation.rollout import check_env_settings

    settings = dict(given)
    for text in pairs:
        key, found, value = text.partition("=")
        if not found or not key:
            raise ValueError(f"--env {text!r}: expected KEY=VALUE, for example --env base_rate_factor=0.5")
        if key in settings:
            raise ValueError(f"--env gives {key} twice; give it once")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    for key, own, default in (("session_requests", session_requests, None), ("judge", judge, "main")):
        if own != default:
            if settings.get(key, own) != own:
                raise ValueError(f"{key} is given as {own!r} and with --env as {settings[key]!r}; give it once")
            settings[key] = own
    settings = {key: value for key, value in settings.items() if (key, value) != ("judge", "main")}
    check_env_settings(settings)
    return settings


def env_pairs(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The inverse of `env_settings`, in order of the names."""
    return tuple(f"{key}={json.dumps(settings[key])}" for key in sorted(settings))


def training_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a policy is trained with when it is scored with `settings`: the same world, its main judge."""
    return {key: value for key, value in settings.items() if key != "judge"}
