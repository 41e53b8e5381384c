"""Every estimator at once: a log, a policy, a table of values with their intervals and what they rest on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metarec_gym.evaluation.intervals import Floats, Interval
from metarec_gym.evaluation.off_policy import single_action as single
from metarec_gym.evaluation.off_policy.bandit_log import BanditLog
from metarec_gym.evaluation.off_policy.cross_fitting import RewardModel
from metarec_gym.evaluation.off_policy.diagnostics import Support, support
from metarec_gym.evaluation.off_policy.intervals import Bounds, bootstrap_interval, difference_interval, t_interval
from metarec_gym.evaluation.off_policy.terms import Terms
from metarec_gym.evaluation.off_policy.tuning import CLIPS, SHRINKAGES, SMOOTHINGS, slope

HEADLINE = "DR"
"""The estimator that claims rest on, named before any log is looked at: unbiased whatever its reward model is worth."""
MODEL_ONLY = "DM"
"""The estimator that rests on the reward model alone."""

UNCUT = {"IPS clipped": "=inf", "Switch-DR": "=inf", "DRos": "=inf", "SG-DR": "=0"}
"""Settings that leave all weights as they are."""


@dataclass(frozen=True)
class PolicyValue:
    """One estimator's answer for one policy."""

    estimator: str
    """Its name."""
    setting: str
    """What SLOPE chose, e.g. `clip=10`; empty where there is nothing to choose."""
    interval: Interval
    """Value of a request with its t interval over users."""
    bootstrap: Bounds
    """Studentised bootstrap over users."""
    less_logged: Interval
    """Value less the logger's own mean reward, on the same users."""
    support: Support | None
    """What it rests on; None for the direct method, which rests on its model."""
    warnings: tuple[str, ...]
    """What it has to be read with."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "estimator": self.estimator,
            "setting": self.setting,
            **self.interval.to_json(),
            "bootstrap": [self.bootstrap.low, self.bootstrap.high],
            "less_logged": self.less_logged.to_json(),
            "support": None if self.support is None else vars(self.support),
            "warnings": list(self.warnings),
        }


def all_terms(log: BanditLog, probs: Floats, q: Floats | RewardModel) -> dict[str, tuple[Terms, str]]:
    """Terms and chosen setting of every single-action estimator.

    Args:
        log: The log; MIPS is there where it names families and knows the chances of all actions.
        probs: (n_rows, K).
        q: The reward model, cross-fitted.
    """
    found = {
        "IPS": (single.ips(log, probs), ""),
        "IPS clipped": _tuned(log, "clip", CLIPS, lambda c: single.ips(log, probs, clip=c)),
        "SNIPS": (single.snips(log, probs), ""),
        MODEL_ONLY: (single.direct_method(log, probs, q), ""),
        "DR": (single.doubly_robust(log, probs, q), ""),
        "SNDR": (single.self_normalised_dr(log, probs, q), ""),
        "Switch-DR": _tuned(log, "tau", CLIPS, lambda t: single.switch_dr(log, probs, q, tau=t)),
        "DRos": _tuned(log, "lambda", SHRINKAGES, lambda s: single.dr_optimistic_shrinkage(log, probs, q, shrinkage=s)),
        "SG-DR": _tuned(log, "lambda", SMOOTHINGS, lambda s: single.sub_gaussian_dr(log, probs, q, smoothing=s)),
    }
    if log.families is not None and log.pscore is not None:
        found["MIPS"] = (single.mips(log, probs), "")
    return found


def value_policy(
    log: BanditLog, probs: Floats, q: Floats | RewardModel, *, seed: int = 0, level: float = 0.95, samples: int = 1000
) -> list[PolicyValue]:
    """Values a policy by every estimator.

    Args:
        log: The log.
        probs: (n_rows, K), see `target_probs`.
        q: `log.reward_model()`.
        seed: Seed of the bootstrap.
        level: Confidence level.
        samples: Bootstrap samples.

    Returns:
        One answer an estimator.

    Raises:
        ValueError: When no row of the log matches the policy.
    """
    logged = single.logged_value(log)
    estimates = all_terms(log, probs, q)
    raw = support(single.importance_weights(log, probs))
    values = []
    for name, (terms, setting) in estimates.items():
        notes = list(log.warnings)
        rests_on = None
        if name == MODEL_ONLY:
            notes.append("rests on the reward model alone: the interval holds its noise, not its bias")
        else:
            if setting and not setting.endswith(UNCUT[name]):
                notes.append("biased by the weights that its setting cuts; the interval does not hold that")
            # what SLOPE cut away still tells how little of the log the policy matches
            notes += support(terms.weight).warnings() if name == "MIPS" else raw.warnings()
            rests_on = support(terms.weight) if terms.weight.any() else None
        values.append(
            PolicyValue(
                estimator=name,
                setting=setting,
                interval=t_interval(terms, log.cluster, level=level),
                bootstrap=bootstrap_interval(terms, log.cluster, seed=seed, level=level, samples=samples),
                less_logged=difference_interval(terms, logged, log.cluster, level=level),
                support=rests_on,
                warnings=tuple(notes),
            )
        )
    return values


def _tuned(
    log: BanditLog, name: str, settings: Sequence[float], estimate: Callable[[float], Terms]
) -> tuple[Terms, str]:
    candidates = [estimate(setting) for setting in settings]
    best = slope(candidates, log.cluster)
    return candidates[best], f"{name}={settings[best]:g}" if np.isfinite(settings[best]) else f"{name}=inf"
