"""Which device a word means, and how many threads of the CPU a fit runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def device_of(word: str) -> str:
    """The device that `word` asks for, if it is there.

    Args:
        word: `cpu`, `cuda` or `cuda:1`; `auto` takes CUDA where there is a GPU and the CPU elsewhere. Another device of torch is
            taken where it holds float64, which fits need.

    Returns:
        The name of a device: `cpu` for every CPU, never `auto`.

    Raises:
        ValueError: When it is no device of torch, or one that is not there.
    """
    if word == "cpu":
        return word
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if word == "auto":
        return "cuda" if gpus else "cpu"
    try:
        device = torch.device(word)
    except RuntimeError as error:
        raise ValueError(f"device {word!r} is none that torch knows; expected auto, cpu, cuda or cuda:1") from error
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda":
        if (device.index or 0) < gpus:
            return word
        why = "is built without CUDA" if torch.version.cuda is None else f"sees {gpus} GPUs"
        raise ValueError(
            f"device {word!r} was asked for and torch {torch.__version__} {why}; use --device cpu, or --device auto, which takes "
            "a GPU where there is one"
        )
    try:
        torch.zeros(1, dtype=torch.float64, device=device).cpu()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device {word!r} cannot hold float64 numbers with torch {torch.__version__}; expected auto, cpu, cuda or cuda:1"
        ) from error
    return word


@contextmanager
def single_thread() -> Iterator[None]:
    """Inside, torch adds up on one thread of the CPU, so that no bit of a fit depends on the number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
