"""CUDA graphs where there is no CUDA: operations on the pretended device are recorded once and run again on the same tensors.

A replay knows nothing of Python: what was a number is that number for ever, a tensor that was made anew elsewhere is not seen,
and every result lies where the first one lay. What CUDA forbids while it captures is refused: asking the host, a copy from or to
it, a shape that hangs on values, a draw from a generator. Streams do nothing.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

import agents.ppo.captured
import agents.ppo.training
from metarec_gym.envs import captured
from tests.pretend_device import DEVICE, RECORDERS, pretend_device

_aten = torch.ops.aten
_ASKS_THE_HOST = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
}


class PretendGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.operations: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def record(self, func: Any, args: Any, kwargs: Any, *, crosses: bool) -> Any:
        """Runs an operation on plain tensors and keeps it."""
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        by_mask = func in (_aten.index.Tensor, _aten.index_put_.default) and any(
            isinstance(part, Tensor) and part.dtype is torch.bool for part in tree_flatten(args[1])[0]
        )
        if func in _ASKS_THE_HOST or crosses or by_mask or kwargs.get("generator") is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        self._before += [(tensor, tensor.clone()) for tensor in _written(func, args, kwargs)]
        out = func(*args, **kwargs)
        known = {id(tensor) for tensor in tensors}
        results = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor) and id(leaf) not in known]
        if not _only_views(func):
            self.operations.append((func, args, kwargs, results))
        return out

    def forget_effects(self) -> None:
        """A capture executes nothing: what it wrote to is as it was."""
        while self._before:
            tensor, value = self._before.pop()
            tensor.copy_(value)

    def replay(self) -> None:
        """Runs everything again; results are written where they were."""
        for func, args, kwargs, results in self.operations:
            known = {id(leaf) for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)}
            again = func(*args, **kwargs)
            fresh = [leaf for leaf in tree_flatten(again)[0] if isinstance(leaf, Tensor) and id(leaf) not in known]
            for there, value in zip(results, fresh, strict=True):
                there.copy_(value)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes to."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    mutable = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in tree_flatten([given.get(name) for name in mutable])[0] if isinstance(leaf, Tensor)]


def _only_views(func: Any) -> bool:
    """Whether the results look at the arguments' memory: they see what is there at any time."""
    schema = func._schema
    alias = [result.alias_info for result in schema.returns]
    return bool(alias) and all(info is not None and not info.is_write for info in alias) and not schema.is_mutable


class _Stream:
    def wait_stream(self, other: Any) -> None:
        """Everything runs in order anyway."""


@contextlib.contextmanager
def _capture(graph: PretendGraph) -> Iterator[None]:
    RECORDERS.append(graph.record)
    try:
        yield
    finally:
        RECORDERS.pop()
        graph.forget_effects()


@contextlib.contextmanager
def pretend_graphs() -> Iterator[None]:
    """While it is on, `torch.cuda` captures what runs on the pretended device."""
    stand_ins: dict[str, Any] = {
        "CUDAGraph": PretendGraph,
        "graph": _capture,
        "Stream": lambda *_: _Stream(),
        "current_stream": lambda *_: _Stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
    }
    kept = {name: getattr(torch.cuda, name) for name in stand_ins}
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    try:
        yield
    finally:
        for name, own in kept.items():
            setattr(torch.cuda, name, own)


@contextlib.contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The pretended device with graphs, which the environments and PPO take for a GPU: what captures there is what runs on CUDA.

    The optimiser is torch's own in steps where CUDA has one fused kernel.
    """
    real = captured.refusal

    def refusal(env: Any, mode: str = "eager") -> str | None:
        return real(env, "eager" if mode == "graph" and env.device.type == DEVICE else mode)

    def adam(parameters: Any, args: Any, device: torch.device) -> torch.optim.Adam:
        rate = torch.tensor(args.learning_rate, device=device)
        return torch.optim.Adam(parameters, lr=rate, eps=args.adam_eps, capturable=True, foreach=False)

    monkeypatch.setattr(captured, "refusal", refusal)
    monkeypatch.setattr(agents.ppo.captured, "refusal", refusal)
    monkeypatch.setattr(agents.ppo.training, "adam", adam)
    monkeypatch.setattr(
        importlib.import_module("torch.optim.adam"), "_get_capturable_supported_devices", lambda *_, **__: [DEVICE]
    )
    with pretend_device() as device, pretend_graphs():
        yield device
