"""An exported policy as ONNX, for services that do not run torch."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarec_gym.policy import GruPolicy, MlpPolicy, gru_step


class _Graph(torch.nn.Module):
    """What is exported: the policy's arithmetic with its memory as an input and an output."""

    def __init__(self, policy: MlpPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, obs: Tensor, action_mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        policy = self.policy
        hidden = policy.normalised(obs)
        if isinstance(policy, GruPolicy):
            state = gru_step(hidden, state, policy.memory)
            hidden = torch.cat([hidden, state], dim=1)
        for index, (weight, bias) in enumerate(policy.layers):
            hidden = torch.nn.functional.linear(hidden, weight, bias)
            if index < len(policy.layers) - 1:
                hidden = torch.tanh(hidden)
        if policy.chooses == "blend":
            return hidden.clamp(-1.0, 1.0), state
        if policy.chooses == "slots":
            hidden, action_mask = hidden.unflatten(1, (policy.places, -1)), action_mask[:, None]
        return torch.softmax(hidden.masked_fill(~action_mask, -torch.inf), dim=-1), state


class _Memoryless(_Graph):
    def forward(self, obs: Tensor, action_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(obs, action_mask, obs)[0]


def export_onnx(policy: MlpPolicy, path: str | Path) -> Path:
    """Writes `policy` as one ONNX file, atomically.

    Inputs are `obs` float32 (num_rows, obs_dim) and `action_mask` bool (num_rows, K); a policy with memory also takes
    `state` float32 (num_rows, size), zeros at the start of an episode. Outputs are `probs` (a blend: `weights`, its most probable
    action) and, with memory, `next_state`, to be handed in with the user's next request. num_rows is free. Strategy names and
    facts are in the file's metadata. A blend takes `action_mask` and does not
    need it: the environment gives strategies out of service no say.

    Args:
        policy: An exported policy.
        path: The file to write.

    Returns:
        The path.

    Raises:
        ImportError: When the packages for ONNX are missing.
        ValueError: When the policy remembers by an LSTM, which has no export here.
    """
    if policy.kind not in ("mlp", "gru"):
        raise ValueError(f"a policy of kind {policy.kind!r} has no ONNX export; expected 'mlp' or 'gru'")
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ImportError(
            "ONNX export needs the packages onnx and onnxscript: pip install 'metarec-gym[onnx]'"
        ) from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remembers = isinstance(policy, GruPolicy)
    # two rows: with one, the exporter would take the batch for a constant
    inputs = {"obs": policy.obs_mean.expand(2, -1).clone(), "action_mask": torch.ones(2, len(policy.strategies)) > 0}
    if isinstance(policy, GruPolicy):
        inputs["state"] = torch.zeros(2, policy.size, device=policy.obs_mean.device)
    module = (_Graph(policy) if remembers else _Memoryless(policy)).eval()
    rows = torch.export.Dim("num_rows", min=1)
    outputs = ["weights" if policy.chooses == "blend" else "probs", *(["next_state"] if remembers else [])]
    program = _exported(
        module,
        tuple(inputs.values()),
        input_names=list(inputs),
        output_names=outputs,
        dynamic_shapes={name: {0: rows} for name in inputs},
    )
    if program is None:
        raise RuntimeError("the exporter gave no program; check the versions of torch and onnxscript")
    model = program.model_proto
    facts = {"strategies": policy.strategies, "chooses": policy.chooses, "places": policy.places, "meta": policy.meta}
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.SerializeToString())
    os.replace(partial, path)
    return path


def _exported(module: torch.nn.Module, inputs: tuple[Tensor, ...], **names: Any) -> torch.onnx.ONNXProgram | None:
    """torch.onnx.export without its remarks on packages that are not needed and on names that several inputs share."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(module, inputs, dynamo=True, verbose=False, **names)
    finally:
        logger.setLevel(level)
