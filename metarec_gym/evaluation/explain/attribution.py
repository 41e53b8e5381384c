"""What a policy network looks at: integrated gradients of its logits, summed over the blocks of the observation.

Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks" (ICML 2017). The function that is explained is how far the
chosen strategy's logit stands above the mean of all logits: a constant added to every logit changes no choice. Attributions of a
state add up to that function minus its value at the baseline (completeness).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from metarec_gym.policy import MlpPolicy

STEPS = 64
"""Points of the integral; Gauss-Legendre, so the error of smooth networks is tiny."""


@dataclass(frozen=True)
class Attribution:
    """Attributions of some states.

    Attributes:
        by_entry: float32 (N, D), to each entry of the observation; a row sums to `lead` minus `baseline_lead`.
        lead: float32 (N,), the chosen strategy's logit minus the mean logit.
        baseline_lead: float32 (N,), the same strategy's at the baseline.
    """

    by_entry: Tensor
    lead: Tensor
    baseline_lead: Tensor

    @property
    def error(self) -> float:
        """Largest failure of completeness, as a share of the mean distance from the baseline."""
        distance = self.lead - self.baseline_lead
        gap = (self.by_entry.sum(dim=1) - distance).abs().max()
        return float(gap / distance.abs().mean().clamp(min=1e-12))

    def shares(self, blocks: Mapping[str, slice], rows: Tensor) -> dict[str, float]:
        """Mean absolute attribution of each block over some states, as shares of their sum; largest first."""
        size = {name: float(self.by_entry[rows][:, at].sum(dim=1).abs().mean()) for name, at in blocks.items()}
        total = sum(size.values())
        return {n: v / total if total > 0.0 else 0.0 for n, v in sorted(size.items(), key=lambda pair: -pair[1])}


def attribute(policy: MlpPolicy, obs: Tensor, choice: Tensor, baseline: Tensor) -> Attribution:
    """Integrated gradients of the chosen strategies' leads.

    Args:
        policy: The network.
        obs: float32 (N, D).
        choice: int64 (N,), the strategy whose lead is explained.
        baseline: float32 (D,), the state that attributions start from, such as the mean state.

    Returns:
        The attributions.

    Raises:
        ImportError: When captum is not installed.
    """
    try:
        captum: Any = importlib.import_module("captum.attr")
    except ImportError as error:
        raise ImportError(
            "attributions need captum, which is not installed; run: pip install 'metarec-gym[explain]'"
        ) from error

    def lead(states: Tensor, strategy: Tensor) -> Tensor:
        logits = policy.logits(states)
        return (logits - logits.mean(dim=1, keepdim=True)).gather(1, strategy[:, None])[:, 0]

    start = baseline.expand_as(obs).contiguous()
    by_entry: Tensor = captum.IntegratedGradients(lead).attribute(
        obs,
        baselines=start,
        additional_forward_args=(choice,),
        n_steps=STEPS,
        internal_batch_size=max(4096, len(obs)),
    )
    with torch.no_grad():
        return Attribution(by_entry.detach(), lead(obs, choice), lead(start, choice))
