"""Checks of randomness: what a seed fixes, and what it does not."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch

from metarec_gym.testing.runs import BrokenRule, NotApplicable, Run, Subject, play
from metarec_gym.testing.trees import array, copied, difference, leaves, picked

LARGE_SEED = 2**64 - 1
"""Some collectors draw 64 random bits for a seed; seed + row is then larger than any 64-bit integer."""


def run_difference(one: Run, other: Run) -> str:
    """Where two runs first differ; "" = nowhere."""
    for index, (step, same) in enumerate(zip(one.steps, other.steps, strict=True)):
        for name in ("ended", "reward", "terminated", "truncated", "obs"):
            if found := difference(getattr(step, name), getattr(same, name), f"{name} of step {index}"):
                return found
    # equal ends, so the resets of ended rows came at the same steps
    for (where, obs, info), (_, other_obs, other_info) in zip(one.outputs(), other.outputs(), strict=True):
        if found := difference(obs, other_obs, f"obs after {where}") or difference(
            info, other_info, f"info after {where}"
        ):
            return found
    return ""


def check_repeatable(subject: Subject) -> None:
    """One seed and one sequence of actions give one run, whatever an environment did before the seed."""
    for mode in subject.modes:
        env, actions = subject.env(mode), subject.actions()
        play(env, mode, actions, seed=subject.seed + 1, steps=1)
        again = play(env, mode, actions, seed=subject.seed, steps=subject.steps)
        if found := run_difference(subject.run(mode), again):
            raise BrokenRule(
                "repeatable",
                f"seed {subject.seed} and the same actions ({mode.value}), in a new environment and in one that ran before: "
                f"{found}; expected equal runs",
            )


def refuse(subject: Subject, rule: str, sentence: str) -> NoReturn:
    """Raises the rule, or `repeatable` if that is why two runs differ."""
    check_repeatable(subject)
    raise BrokenRule(rule, sentence)


def check_seeds_differ(subject: Subject) -> None:
    """Another seed gives another run."""
    mode = subject.modes[0]
    seeds = (subject.seed, subject.seed + 1000)
    other = play(subject.env(mode), mode, subject.actions(), seed=seeds[1], steps=subject.steps)
    if not run_difference(subject.run(mode), other):
        raise BrokenRule(
            "seeds_differ", f"seeds {seeds[0]} and {seeds[1]} give equal runs, expected the seed to matter"
        )


def check_large_seeds(subject: Subject) -> None:
    """Any Python integer >= 0 is a seed."""
    env = subject.env()
    try:
        env.reset(seed=LARGE_SEED)
    except Exception as error:
        raise BrokenRule(
            "large_seeds", f"reset(seed={LARGE_SEED}) raised {error!r}; expected any Python integer >= 0 to be taken"
        ) from error


def check_seed_list(subject: Subject) -> None:
    """`reset(seed=[s, s + 1, ...])` is `reset(seed=s)`: one seed a row."""
    mode, seeds = subject.modes[0], [subject.seed + row for row in range(subject.num_envs)]
    env = subject.env(mode)
    try:
        env.reset(seed=seeds)  # type: ignore[arg-type]  # VectorEnv's own signature knows no list, Sync does
    except Exception as error:
        raise BrokenRule("seed_list", f"reset(seed={seeds}) raised {error!r}; expected one seed a row") from error
    run = play(subject.env(mode), mode, subject.actions(), seed=seeds, steps=subject.steps)
    if found := run_difference(subject.run(mode), run):
        refuse(
            subject,
            "seed_list",
            f"reset(seed={seeds}) is not reset(seed={subject.seed}): {found}; row i is seeded s + i",
        )
    backwards, _ = subject.env(mode).reset(seed=seeds[::-1])  # type: ignore[arg-type]
    if found := difference(picked(copied(backwards), slice(None, None, -1)), subject.run(mode).start[0], "obs"):
        refuse(
            subject,
            "seed_list",
            f"reset(seed={seeds[::-1]}) is not reset(seed={seeds}) backwards: {found}; expected one seed a row",
        )


def check_unseeded_reset(subject: Subject) -> None:
    """`reset()` without a seed goes on: other episodes than after the seed, the same ones each time."""
    mode, runs = subject.modes[0], []
    for _ in range(2):
        env = subject.env(mode)
        env.reset(seed=subject.seed)
        runs.append(play(env, mode, subject.actions(), seed=None, steps=subject.steps))
    first = subject.run(mode)
    if not run_difference(first, runs[0]):
        raise BrokenRule(
            "unseeded_reset",
            f"reset() after reset(seed={subject.seed}) gives the same run again; expected it to go on to other episodes",
        )
    if found := run_difference(*runs):
        refuse(
            subject,
            "unseeded_reset",
            f"reset() after reset(seed={subject.seed}) differs from time to time: {found}; expected it to go on from the seed",
        )


def check_rows_are_singles(subject: Subject) -> None:
    """Row i of the batch seeded s is the single environment seeded s + i, until its first episode ends."""
    if subject.make_single is None:
        raise NotApplicable("no single environment was given")
    run = subject.run(subject.modes[0])
    for row in sorted({0, subject.num_envs // 2, subject.num_envs - 1}):
        seed = subject.seed + row
        env = subject.make_single()
        obs, _ = env.reset(seed=seed)
        found = difference(array_tree(obs), picked(run.start[0], row), "obs after reset")
        for index, step in enumerate(run.steps):
            if found:
                break
            obs, reward, terminated, truncated, _ = env.step(picked(step.action, row))
            found = (
                difference(array_tree(obs), picked(step.after, row), f"obs after step {index}")
                or difference(
                    (bool(terminated), bool(truncated)), _flags(step, row), f"(terminated, truncated) of step {index}"
                )
                or _reward_difference(float(reward), step.reward[row], index)
            )
            if step.ended[row]:
                break
        if found:
            refuse(
                subject,
                "rows_are_singles",
                f"row {row} of reset(seed={subject.seed}) is not the single environment of reset(seed={seed}) (single first): "
                f"{found}",
            )


def array_tree(tree: Any) -> Any:
    """Observations of a single environment as nested arrays."""
    if isinstance(tree, dict):
        return {key: array_tree(value) for key, value in tree.items()}
    return tuple(array_tree(value) for value in tree) if isinstance(tree, tuple) else array(tree)


def _flags(step: Any, row: int) -> tuple[bool, bool]:
    return bool(step.terminated[row]), bool(step.truncated[row])


def _reward_difference(single: float, batched: Any, index: int) -> str:
    # the single environment's float may be double: it must be the batch's number at the batch's precision
    same = batched.dtype.type(single) == batched or (np.isnan(single) and np.isnan(batched))
    return "" if same else f"reward of step {index} is {single} and {batched}"


def check_outputs_agree(subject: Subject) -> None:
    """Tensors out hold the numbers that arrays out hold."""
    if subject.make_torch is None:
        raise NotApplicable("no make_torch was given")
    for mode in subject.modes:
        env = subject.make_torch(subject.num_envs, mode)
        for name, value in leaves(env.reset(seed=subject.seed), "reset"):
            if not isinstance(value, torch.Tensor):
                raise BrokenRule(
                    "outputs_agree", f"{name} of make_torch is a {type(value).__name__}, expected a tensor"
                )
        run = play(env, mode, subject.actions(), seed=subject.seed, steps=subject.steps)
        if found := run_difference(subject.run(mode), run):
            refuse(subject, "outputs_agree", f"arrays and tensors out ({mode.value}): {found}; expected equal numbers")
