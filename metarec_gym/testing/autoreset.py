"""Checks of episode ends in the three autoreset modes: one sequence of real transitions, told in three ways."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from metarec_gym.testing.runs import BrokenRule, NotApplicable, Run, Subject, check_form
from metarec_gym.testing.seeds import refuse
from metarec_gym.testing.trees import Array, copied, difference, is_array, leaves, picked


def check_next_step(subject: Subject) -> None:
    """Next-step mode: the step after an end only resets the row: reward 0, both flags False."""
    run = _run(subject, AutoresetMode.NEXT_STEP)
    for index, step in enumerate(run.steps):
        for name in ("reward", "terminated", "truncated"):
            wrong = np.flatnonzero(~step.real & (getattr(step, name) != 0))
            if len(wrong):
                raise BrokenRule(
                    "next_step",
                    f"{name} of row {wrong[0]} is {getattr(step, name)[wrong[0]]} at step {index}, which only resets it after "
                    "the end of an episode (next-step mode); expected 0 and False: this is no transition",
                )


def check_final_obs(subject: Subject) -> None:
    """Same-step mode: `final_obs`, `final_info` and their masks are there for exactly the rows that ended."""
    run = _run(subject, AutoresetMode.SAME_STEP)
    for index, step in enumerate(run.steps):
        for key in ("final_obs", "final_info"):
            mask = step.info.get(f"_{key}", np.zeros(subject.num_envs, dtype=bool))
            if step.ended.any() and (key not in step.info or f"_{key}" not in step.info):
                raise BrokenRule(
                    "final_obs",
                    f"an episode ended at step {index} in same-step mode and info has {sorted(step.info)}; expected '{key}' and "
                    f"'_{key}'",
                )
            if not np.array_equal(mask, step.ended):
                raise BrokenRule(
                    "final_obs",
                    f"_{key} of step {index} marks the rows {np.flatnonzero(mask).tolist()}, expected the ones that ended: "
                    f"{np.flatnonzero(step.ended).tolist()}",
                )


def check_same_transitions(subject: Subject) -> None:
    """Every mode plays the same real transitions for one seed and the same actions."""
    if len(subject.modes) < 2:
        raise NotApplicable("one autoreset mode, nothing to compare it with")
    lists = {mode: _transitions(subject.run(mode)) for mode in subject.modes}
    first = subject.modes[0]
    for mode in subject.modes[1:]:
        found = _list_difference(lists[first], lists[mode])
        if found:
            if AutoresetMode.DISABLED in subject.modes and subject.num_envs > 1:
                # resets that touch other rows show here too; that is then what to say
                check_partial_reset(subject)
            refuse(
                subject,
                "same_transitions",
                f"{first.value} and {mode.value} play different transitions: {found}; expected the same ones for the same seed "
                "and actions",
            )


def check_final_info(subject: Subject) -> None:
    """`final_info` of same-step mode holds what `info` holds at the last step of an episode in another mode."""
    others = [mode for mode in subject.modes if mode is not AutoresetMode.SAME_STEP]
    run = _run(subject, AutoresetMode.SAME_STEP)
    if not others:
        raise NotApplicable("same-step mode alone, nothing to compare final_info with")
    check_final_obs(subject)
    told = _ends(run, [step.info.get("final_info", {}) for step in run.steps])
    shown = _ends(subject.run(others[0]), [step.info for step in subject.run(others[0]).steps])
    for row, (mine, theirs) in enumerate(zip(told, shown, strict=True)):
        for episode, (one, other) in enumerate(zip(mine, theirs, strict=False)):
            missing = sorted(other.keys() - one.keys())
            if missing:
                raise BrokenRule(
                    "final_info",
                    f"final_info lacks {missing} at the end of episode {episode} of row {row}, which {others[0].value} tells in "
                    "info at that step",
                )
            if found := difference({key: one[key] for key in other}, other, "final_info"):
                # other transitions end otherwise; that is then what to say
                check_same_transitions(subject)
                refuse(
                    subject,
                    "final_info",
                    f"at the end of episode {episode} of row {row}, same-step mode and {others[0].value} say: {found}; expected "
                    "what belongs to the step that ended",
                )


def check_partial_reset(subject: Subject) -> None:
    """Disabled mode: `options={"reset_mask": ...}` starts those rows and leaves the others untouched."""
    if AutoresetMode.DISABLED not in subject.modes:
        raise NotApplicable("no disabled mode")
    if subject.num_envs < 2:
        raise NotApplicable("one row has no neighbours")
    envs = [subject.env(AutoresetMode.DISABLED) for _ in range(2)]
    actions, others = subject.actions(), np.arange(subject.num_envs) > 0
    last = [copied(env.reset(seed=subject.seed)) for env in envs]
    ended = [np.zeros(subject.num_envs, dtype=bool) for _ in envs]
    for index in range(min(subject.steps, 30)):
        for which, env in enumerate(envs):
            # row 0 of the second environment starts anew after its first step; from then on it lives another life
            mask = ended[which] | (~others if which == index == 1 else False)
            if not mask.any():
                continue
            out = env.reset(options={"reset_mask": mask.copy()})
            check_form(env, out, f"reset of the rows {np.flatnonzero(mask).tolist()}", parts=2)
            obs, info = copied(out)
            if found := difference(picked(obs, ~mask), picked(last[which][0], ~mask), "obs"):
                raise BrokenRule(
                    "partial_reset",
                    f"resetting the rows {np.flatnonzero(mask).tolist()} changed others (after, before): {found}; expected them "
                    "untouched",
                )
            last[which] = (obs, info)
        count = np.full(subject.num_envs, index)
        steps = []
        for which, env in enumerate(envs):
            moved = env.step(actions.of(count, last[which][1]))
            check_form(env, moved, f"step {index}", parts=5)
            steps.append(copied(moved))
        last, ended = [(step[0], step[4]) for step in steps], [step[2] | step[3] for step in steps]
        one, two = (picked(step[:4], others) for step in steps)
        if found := difference(one, two, "(obs, reward, terminated, truncated)"):
            refuse(
                subject,
                "partial_reset",
                f"after resetting row 0 alone, the other rows go on differently (without, with): {found}; expected them "
                "untouched",
            )


def check_inputs_kept(subject: Subject) -> None:
    """The caller's `options` and actions are not written into."""
    for mode in subject.modes:
        for index, step in enumerate(subject.run(mode).steps):
            if found := difference(step.given, step.action, "action"):
                raise BrokenRule(
                    "inputs_kept", f"step {index} wrote into the caller's actions (after, before): {found}"
                )
    if AutoresetMode.DISABLED in subject.modes:
        env, mask = subject.env(AutoresetMode.DISABLED), np.ones(subject.num_envs, dtype=bool)
        env.reset(seed=subject.seed)
        options = {"reset_mask": mask}
        env.reset(options=options)
        if options.get("reset_mask") is not mask or len(options) != 1 or not mask.all():
            raise BrokenRule(
                "inputs_kept",
                f"reset changed the caller's options to {options}, expected {{'reset_mask': all True}}: wrappers read them "
                "afterwards; work on dict(options)",
            )


def _run(subject: Subject, mode: AutoresetMode) -> Run:
    if mode not in subject.modes:
        raise NotApplicable(f"{mode.value} is not among the modes of the environment")
    return subject.run(mode)


def _transitions(run: Run) -> tuple[dict[str, Array], NDArray[np.int64]]:
    """Row i's k-th real transition at [k, i], by field, and how many a row has."""
    real = np.stack([step.real for step in run.steps])
    number = np.cumsum(real, axis=0) - 1
    rows = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    fields: dict[str, Array] = {}
    for name in ("before", "action", "reward", "terminated", "truncated", "after"):
        columns = [dict(leaves(getattr(step, name), name)) for step in run.steps]
        for key in columns[0]:
            values = np.stack([column[key] for column in columns])
            fields[key] = np.zeros_like(values)
            fields[key][number[real], rows[real]] = values[real]
    return fields, real.sum(axis=0)


def _list_difference(
    one: tuple[dict[str, Array], NDArray[np.int64]], other: tuple[dict[str, Array], NDArray[np.int64]]
) -> str:
    both = np.minimum(one[1], other[1])
    length = len(next(iter(one[0].values())))
    shared = np.arange(length)[:, None] < both[None]
    first: tuple[int, int, str] | None = None
    for order, key in enumerate(one[0]):
        a, b = one[0][key], other[0][key]
        unequal = a != b
        if a.dtype.kind == "f":
            unequal &= ~(np.isnan(a) & np.isnan(b))
        wrong = unequal.reshape(*shared.shape, -1).any(axis=2) & shared
        if wrong.any():
            # the earliest transition says most: everything after follows from it
            number, row = (int(k) for k in np.argwhere(wrong)[0])
            found = difference(a[number, row], b[number, row], key)
            if first is None or (number, order) < first[:2]:
                first = (number, order, f"transition {number} of row {row}: {found}")
    return "" if first is None else first[2]


def _ends(run: Run, infos: list[Any]) -> list[list[dict[str, Array]]]:
    """What `infos` tell, where their masks are True, at the ends of episodes: [row][episode] -> values by name."""
    # a row is as good as another, and looking at each takes Python time
    rows = min(len(run.steps[0].ended), 64)
    found: list[list[dict[str, Array]]] = [[] for _ in range(rows)]
    for step, info in zip(run.steps, infos, strict=True):
        for row in np.flatnonzero(step.ended[:rows]).tolist():
            found[row].append(dict(_row_of(info, row, "")))
    return found


def _row_of(info: dict[str, Any], row: int, path: str) -> list[tuple[str, Array]]:
    values: list[tuple[str, Array]] = []
    for key, value in info.items():
        # wall-clock time differs from run to run
        if key.startswith("_") or (path.endswith("episode.") and key == "t"):
            continue
        mask = info.get(f"_{key}")
        if mask is not None and not mask[row]:
            continue
        if isinstance(value, dict):
            values += _row_of(value, row, f"{path}{key}.")
        elif is_array(value) and len(value) > row:
            values.append((f"{path}{key}", value[row]))
    return values
