"""Which device a word means."""

from __future__ import annotations

import torch


def device_of(word: str) -> str:
    """The device that `word` asks for, if it is there.

    Args:
        word: `cpu`, `cuda`, `cuda:1` or any other device of torch; `auto` takes CUDA where there is a GPU and the CPU elsewhere.

    Returns:
        The name of a device; never `auto`.

    Raises:
        ValueError: When it is no device of torch, or a GPU that is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if word == "auto":
        return "cuda" if gpus else "cpu"
    try:
        device = torch.device(word)
    except RuntimeError as error:
        raise ValueError(f"device {word!r} is none that torch knows; expected auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        why = "is built without CUDA" if torch.version.cuda is None else f"sees {gpus} GPUs"
        raise ValueError(
            f"device {word!r} was asked for and torch {torch.__version__} {why}; use --device cpu, or --device auto, which takes "
            "a GPU where there is one"
        )
    return word
