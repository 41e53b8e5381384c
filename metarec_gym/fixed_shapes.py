"""Two ways to compute the same: looking at values on the way, or not.

On CPU it pays to look: only the users who took something move, only the members that are asked answer, and draws are hashed by
numpy. A step that is compiled or captured into a graph cannot: shapes must not hang on values, and the host must not wait for
them. Whatever has a faster way that looks asks `may_look` first; both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_fixed = False


def may_look(tensor: Tensor) -> bool:
    """True where a computation may look at the values of `tensor` on the host: on CPU, outside `fixed_shapes`."""
    return tensor.device.type == "cpu" and not _fixed


@contextmanager
def fixed_shapes() -> Iterator[None]:
    """Inside, nothing looks at values: what runs can be traced, compiled and captured."""
    global _fixed
    before, _fixed = _fixed, True
    try:
        yield
    finally:
        _fixed = before
