"""Checks of memory: what was returned belongs to the caller, and changes neither by later steps nor what they bring."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from metarec_gym.testing.runs import BrokenRule, Subject, play
from metarec_gym.testing.seeds import refuse, run_difference
from metarec_gym.testing.trees import array, copied, difference, leaves


def check_kept_arrays(subject: Subject) -> None:
    """A returned array never changes later: SB3 stores observations after the next step."""
    for mode in subject.modes:
        for where, raw, copy in subject.run(mode).raw:
            if found := difference(copied(raw), copy, where):
                raise BrokenRule(
                    "kept_arrays",
                    f"a later step changed what {where} had returned ({mode.value}; now, then): {found}; expected it to stay: "
                    "return copies",
                )


def check_written_arrays(subject: Subject) -> None:
    """Writing into returned arrays, or into the actions after the step, changes nothing inside: SB3 writes into rewards."""
    for mode in subject.modes:
        run = play(subject.env(mode), mode, subject.actions(), seed=subject.seed, steps=subject.steps, touch=_scribble)
        if found := run_difference(subject.run(mode), run):
            refuse(
                subject,
                "written_arrays",
                f"after the caller wrote into returned arrays and used actions, the run went on differently ({mode.value}; "
                f"clean, written): {found}; expected no effect: return copies",
            )


def check_arrays_apart(subject: Subject) -> None:
    """No two arrays of one output are the same memory: writing into one would change the other."""
    for mode in subject.modes:
        for where, raw, _ in subject.run(mode).raw:
            named = [(name, array(value)) for name, value in leaves(raw, where) if _is_plain(value)]
            for index, (name, value) in enumerate(named):
                for other_name, other in named[:index]:
                    if np.may_share_memory(value, other) and np.shares_memory(value, other):
                        raise BrokenRule(
                            "arrays_apart",
                            f"{other_name} and {name} are one memory ({mode.value}): writing into one changes the other; "
                            "expected copies",
                        )


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype != object)


def _scribble(raw: Any) -> None:
    for _, value in leaves(raw, ""):
        if isinstance(value, torch.Tensor):
            value.copy_(~value if value.dtype is torch.bool else torch.full_like(value, 7))
        elif _is_plain(value) and value.flags.writeable:
            value[...] = ~value if value.dtype == bool else np.full_like(value, 7)
