"""A second device where there is none: tensors on `meta` that hold numbers and refuse to meet tensors of the CPU, as CUDA's do.

Code that runs here with `device="meta"` and gives the CPU's results puts every tensor where it belongs: a table left behind, a
random draw made on the wrong side, or a `.numpy()` without `.cpu()` fails as it would on a GPU. It says nothing of speed, of a
GPU's rounding; `pretend_graph` records graphs on it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "meta"
_aten, _Generator = torch.ops.aten, torch.Generator
_CPU_INDEX_ALLOWED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
"""CUDA's tensors may be indexed by the CPU's."""
RAN: Counter[str] = Counter()
"""How often each operation ran on the device; emptied when a pretence begins."""
RECORDERS: list[Any] = []
"""The last one runs every operation on the device instead; see `pretend_graph`."""


class FarTensor(Tensor):
    """A tensor that says it is on `meta`; its numbers are in `near`."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        far: FarTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device(DEVICE),
        )
        far.near = near
        return far

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"FarTensor({self.near!r})"

    def tolist(self) -> Any:
        """The numbers; a copy to the host, as on CUDA."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def pretend_device() -> Iterator[str]:
    """While it is on, tensors can be made on the device it gives, and moved there and back."""
    generator, inference_mode, assert_close = torch.Generator, torch.inference_mode, torch.testing.assert_close
    torch.Generator = _AnyGenerator
    # it compares no numbers of `meta`
    torch.testing.assert_close = lambda *args, **kwargs: assert_close(*tree_map(_near, args), **kwargs)
    # tensors of inference mode refuse to be wrapped; what they compute is the same
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()
    RAN.clear()
    try:
        with _Constants(), _Operations():
            yield DEVICE
    finally:
        torch.Generator, torch.inference_mode, torch.testing.assert_close = generator, inference_mode, assert_close
        FarGenerator.known.clear()


class _AllGenerators(type(_Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _Generator)


class FarGenerator(torch.Generator):
    """A generator that says it is on `meta`; it draws the CPU's numbers."""

    device = torch.device(DEVICE)
    known: ClassVar[dict[int, FarGenerator]] = {}
    """These generators by address: the dispatcher hands over another Python object of the same generator."""


class _AnyGenerator(torch.Generator, metaclass=_AllGenerators):
    """Stands for `torch.Generator`."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        if torch.device(device).type != DEVICE:
            return _Generator(device=device)
        far = FarGenerator()
        FarGenerator.known[far._cdata] = far
        return far


class _Constants(TorchFunctionMode):
    """Python numbers become tensors outside of the dispatcher: they are made on the CPU and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == DEVICE:
            if isinstance(args[0], FarTensor):
                return func(*args, **kwargs)
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        if func is Tensor.new_tensor and isinstance(args[0], FarTensor):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(DEVICE)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _index(args[1]), *args[2:])
        return func(*args, **kwargs)


def _index(index: Any) -> Any:
    """An index whose lists are tensors."""
    if isinstance(index, tuple):
        return tuple(_index(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


class _Operations(TorchDispatchMode):
    """Runs every operation on the numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    leaves = [leaf for leaf in tree_flatten((args, dict(kwargs)))[0] if isinstance(leaf, Tensor)]
    far = [leaf for leaf in leaves if isinstance(leaf, FarTensor)]
    if any(leaf.device.type == DEVICE and not isinstance(leaf, FarTensor) for leaf in leaves):
        raise RuntimeError(
            f"{func} was given a tensor of {DEVICE} without numbers: this pretence does not know how it was made"
        )
    asked = kwargs.get("device")
    moves = func in (_aten._to_copy.default, _aten.copy_.default)
    if far and not moves:
        _check_together(func, args, leaves)
    result_is_far = bool(far) if asked is None else torch.device(asked).type == DEVICE
    if func is _aten.copy_.default:
        result_is_far = isinstance(args[0], FarTensor)
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in FarGenerator.known) != result_is_far:
        raise RuntimeError("the generator is on another device than the numbers it draws")
    if asked is not None and torch.device(asked).type == DEVICE:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    owner = {id(leaf.near): leaf for leaf in far}
    if result_is_far:
        RAN[str(func).removeprefix("aten.").partition(".")[0]] += 1
    near_args, near_kwargs = tree_map(_near, args), tree_map(_near, dict(kwargs))
    if RECORDERS:
        out = RECORDERS[-1](func, near_args, near_kwargs, crosses=moves and result_is_far != _all_far(leaves))
    else:
        out = func(*near_args, **near_kwargs)

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor) or not result_is_far:
            return value
        # an operation in place gives back the tensor it was given
        return owner.get(id(value)) if id(value) in owner else FarTensor(value)

    return tree_map(back, out)


def _check_together(func: Callable[..., Any], args: Any, leaves: list[Tensor]) -> None:
    """CUDA's rule: all on one device, but for indices of the CPU, and numbers (no dimension) in elementwise operations."""
    if func in _CPU_INDEX_ALLOWED and isinstance(args[0], FarTensor):
        leaves = [leaf for leaf in tree_flatten((args[0], args[2:]))[0] if isinstance(leaf, Tensor)]
    elementwise = torch.Tag.pointwise in func.tags or func is _aten.fill_.Tensor
    writes_near = func._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], FarTensor)
    allowed = elementwise and not writes_near
    strangers = [leaf for leaf in leaves if not isinstance(leaf, FarTensor) and not (allowed and leaf.dim() == 0)]
    if strangers:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, meta and cpu, in {func}: "
            f"{[tuple(leaf.shape) for leaf in strangers]} on the CPU"
        )


def _all_far(leaves: list[Tensor]) -> bool:
    return all(isinstance(leaf, FarTensor) for leaf in leaves)


def _near(value: Any) -> Any:
    return value.near if isinstance(value, FarTensor) else value
