"""Nested outputs of environments (dicts and tuples of arrays or tensors): copied, walked through and compared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]


def array(value: Any) -> Array:
    """An array or tensor, on whatever device, as a numpy array (a view where that is possible)."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    return np.asarray(value)


def leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Name and value of everything in nested dicts and tuples that is neither, e.g. `("info['user']", array)`."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{name}[{key!r}]")
    elif isinstance(tree, tuple | list):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{name}[{index}]")
    else:
        yield name, tree


def copied(tree: Any) -> Any:
    """The same nesting with numpy copies of every array and tensor; nothing in it changes later."""
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(copied(value) for value in tree)
    value = array(tree)
    return copy.deepcopy(value) if value.dtype == object else np.array(value)


def is_array(value: Any) -> bool:
    """Whether it has a shape and a dtype."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def picked(tree: Any, index: Any) -> Any:
    """`array[index]` of every array of the nesting."""
    if isinstance(tree, dict):
        return {key: picked(value, index) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(picked(value, index) for value in tree)
    return tree[index]


def stacked(trees: list[Any]) -> Any:
    """Nestings of one form as one, with a first axis more."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: stacked([tree[key] for tree in trees]) for key in first}
    if isinstance(first, tuple):
        return tuple(stacked([tree[k] for tree in trees]) for k in range(len(first)))
    return np.stack(trees)


def difference(one: Any, other: Any, name: str) -> str:
    """Where two nestings first differ in form, shape, dtype or any bit of value (NaN equals NaN); "" = nowhere."""
    left, right = dict(leaves(one, name)), dict(leaves(other, name))
    if left.keys() != right.keys():
        lone = sorted(left.keys() ^ right.keys())
        return f"{lone[0]} is in one and not in the other"
    for key in left:
        a, b = array(left[key]), array(right[key])
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{key} is {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        if a.dtype == object:
            if a.ndim == 0 and a.item() != b.item():
                return f"{key} is {a.item()!r} and {b.item()!r}"
            for index in np.ndindex(a.shape if a.ndim else (0,)):
                if found := difference(a[index], b[index], f"{key}{list(index)}"):
                    return found
            continue
        unequal = a != b
        if a.dtype.kind in "fc":
            unequal &= ~(np.isnan(a) & np.isnan(b))
        if np.any(unequal):
            where = tuple(int(k) for k in np.argwhere(unequal)[0])
            return f"{key}{list(where) if where else ''} is {a[where]} and {b[where]}"
    return ""
