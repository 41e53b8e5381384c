"""One integer becomes many named, independent streams; draws are counter-based, so no global generator is ever touched.

Two kinds of randomness live here:

* `stream`, `numpy_rng`, `torch_generator`: one seed and a purpose give a generator of its own (fitting, folds, networks).
* `fold_in`, `uniform`, `normal`: a draw is a pure function of an int64 key. The same key gives the same draw whatever the
  batch size, the row, the device or the policy: common random numbers for free.

The mixer is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from metarec_gym.fixed_shapes import may_look

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor


def _as_int64(value: int) -> int:
    """The signed 64-bit integer with the bits of `value` (torch has no unsigned arithmetic on CPU)."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _as_int64(0x9E3779B97F4A7C15)
_MIX_1 = _as_int64(0xBF58476D1CE4E5B9)
_MIX_2 = _as_int64(0x94D049BB133111EB)
_ALL_BITS = 0xFFFFFFFFFFFFFFFF
_UNSIGNED_GOLDEN = 0x9E3779B97F4A7C15
_UNSIGNED_1, _UNSIGNED_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def stream(seed: int, *purpose: str | int) -> int:
    """Seed of the stream named `purpose`: a 63-bit hash, so neighbouring seeds and other purposes share nothing.

    Args:
        seed: The experiment's seed, any integer.
        purpose: Names and numbers that tell this use from every other one, e.g. `("train", "fold_a", 3)`.

    Returns:
        An integer in [0, 2**63).
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def numpy_rng(seed: int, *purpose: str | int) -> np.random.Generator:
    """A numpy generator of the stream `(seed, *purpose)`."""
    import numpy as np

    return np.random.default_rng(stream(seed, *purpose))


def torch_generator(seed: int, *purpose: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator of the stream `(seed, *purpose)`, on `device`."""
    import torch

    return torch.Generator(device=device).manual_seed(stream(seed, *purpose))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64 shifts keep the sign; the mask makes the shift a logical one
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors: every input bit reaches every output bit; wraps modulo 2**64."""
    if may_look(x) and x.dim() > 0:
        return _mix_on_cpu(x)
    # each fresh tensor is written again: half of the time would go to new memory
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift_right(x, 31).bitwise_xor_(x)


def _mix_on_cpu(x: Tensor) -> Tensor:
    """`mix` by numpy: shifts of unsigned numbers need no mask, and a call costs half of torch's."""
    import torch

    return torch.from_numpy(_mix_bits(x.numpy().view("uint64")).view("int64"))


def _mix_bits(bits: Any) -> Any:
    """`mix` of an array of uint64."""
    # what is fresh is written again: half of the time would go to new memory
    first = bits >> 30
    first ^= bits
    first *= _UNSIGNED_1
    second = first >> 27
    second ^= first
    second *= _UNSIGNED_2
    first = second >> 31
    first ^= second
    return first


def fold_in(key: Tensor, value: Tensor | int) -> Tensor:
    """Key of the child `value` of `key`; both int64, broadcast together.

    Args:
        key: Parent keys, int64.
        value: What distinguishes the child (a user, a request, an item, an outcome ...), int64 or int.

    Returns:
        int64 keys of the broadcast shape.
    """
    # the odd constant keeps value 0 from mapping a key onto itself; Python integers do not wrap by themselves
    step = _as_int64((value + 1) * _GOLDEN) if isinstance(value, int) else (value + 1) * _GOLDEN
    return mix(key + step)


def fold_in_one(key: int, value: int) -> int:
    """`fold_in` of one key, in [0, 2**64), by Python's integers; `value` of either sign."""
    bits = (key + (value + 1) * _GOLDEN) & _ALL_BITS
    bits = ((bits ^ (bits >> 30)) * _UNSIGNED_1) & _ALL_BITS
    bits = ((bits ^ (bits >> 27)) * _UNSIGNED_2) & _ALL_BITS
    return bits ^ (bits >> 31)


def uniform_of(key: int, value: NDArray[np.int64]) -> NDArray[np.float32]:
    """`uniform(fold_in(key, value))` of one key and few values, without torch; the same bits."""
    import numpy as np

    bits = _mix_bits(_mix_bits(value.view(np.uint64) * _UNSIGNED_GOLDEN + ((key + _UNSIGNED_GOLDEN) & _ALL_BITS)))
    draw: NDArray[np.float32] = (bits >> 40).astype(np.float32) * np.float32(2.0**-24)
    return draw


def uniform(key: Tensor) -> Tensor:
    """Uniform draws in [0, 1) as float32 with 24 random bits, exactly equal on every device; int64 (...) -> float32 (...)."""
    import torch

    return _shift_right(mix(key), 40).to(torch.float32) * 2.0**-24


def normal(key: Tensor) -> Tensor:
    """Standard normal draws by the inverse distribution function; int64 (...) -> float32 (...)."""
    import torch

    # half a step keeps the argument inside (0, 1), so the draw is finite
    probability = _shift_right(mix(key), 40).to(torch.float64) * 2.0**-24 + 2.0**-25
    draw: Tensor = torch.special.ndtri(probability).to(torch.float32)
    return draw
