"""Checks of what an environment says and returns: spaces, metadata, types, bounds, infos, masks, endings, specs, closing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from metarec_gym.testing.runs import BrokenRule, NotApplicable, Subject
from metarec_gym.testing.trees import Array, array, difference, is_array, leaves


def check_spaces(subject: Subject) -> None:
    """The batched spaces are `batch_space` of the single ones, for as many rows as were asked for."""
    env = subject.env()
    for name in ("observation_space", "action_space"):
        batched, single = getattr(env, name), getattr(env, f"single_{name}")
        expected = batch_space(single, env.num_envs)
        if batched != expected or batched.dtype != expected.dtype:
            raise BrokenRule(
                "spaces",
                f"{name} is {batched}, expected batch_space(single_{name}, {env.num_envs}), which is {expected}",
            )
    if subject.make_single is not None:
        one = subject.make_single()
        for name in ("observation_space", "action_space"):
            if getattr(one, name) != getattr(env, f"single_{name}"):
                raise BrokenRule(
                    "spaces",
                    f"single_{name} is {getattr(env, f'single_{name}')}, expected that of the single environment, "
                    f"{getattr(one, name)}",
                )


def check_metadata(subject: Subject) -> None:
    """`metadata["autoreset_mode"]` is the enum of this very instance; making another one changes nothing."""
    made = []
    for mode in subject.modes:
        env = subject.env(mode)
        said = env.metadata.get("autoreset_mode")
        if not isinstance(said, AutoresetMode):
            raise BrokenRule("metadata", f"metadata['autoreset_mode'] is {said!r}, expected AutoresetMode.{mode.name}")
        if said is not mode:
            raise BrokenRule("metadata", f"metadata['autoreset_mode'] is {said}, but {mode} was asked for")
        made.append((mode, env, type(env), dict(type(env).metadata)))
    for mode, env, kind, declared in made:
        if env.metadata["autoreset_mode"] is not mode or dict(kind.metadata) != declared:
            raise BrokenRule(
                "metadata",
                f"metadata of {kind.__name__} changed to {env.metadata['autoreset_mode']} when another instance was made, "
                f"expected {mode}; give every instance its own dict, {{**type(self).metadata, 'autoreset_mode': mode}}",
            )


def check_mode_attribute(subject: Subject) -> None:
    """The attribute `autoreset_mode` says what the metadata say: TorchRL reads it."""
    for mode in subject.modes:
        said = getattr(subject.env(mode), "autoreset_mode", None)
        if said is not mode:
            raise BrokenRule("mode_attribute", f"the attribute autoreset_mode is {said!r}, expected {mode!r}")


def check_types(subject: Subject) -> None:
    """Observations have shape and dtype of their space, rewards are floats (num_envs,), flags bool (num_envs,)."""
    for mode in subject.modes:
        subject.run(mode)


def check_bounds(subject: Subject) -> None:
    """Every observation, the last ones of same-step mode too, lies in its space."""
    space = subject.env().observation_space
    for mode in subject.modes:
        run = subject.run(mode)
        for where, obs, _ in run.outputs():
            _check_inside(space, obs, f"obs after {where} ({mode.value})")
        for index, step in enumerate(run.steps):
            if step.after is not step.obs:
                _check_inside(space, step.after, f"final_obs after step {index} ({mode.value})")


def _check_inside(space: gymnasium.Space[Any], obs: Any, name: str) -> None:
    if isinstance(space, gymnasium.spaces.Dict):
        for key, inner in space.spaces.items():
            _check_inside(inner, obs[key], f"{name}[{key!r}]")
    elif isinstance(space, gymnasium.spaces.Tuple):
        for index, inner in enumerate(space.spaces):
            _check_inside(inner, obs[index], f"{name}[{index}]")
    elif isinstance(space, gymnasium.spaces.Box):
        # written so that NaN is outside too
        outside = ~((obs >= space.low) & (obs <= space.high))
        if outside.any():
            where = tuple(int(k) for k in np.argwhere(outside)[0])
            raise BrokenRule(
                "bounds",
                f"{name}{list(where)} is {obs[where]!s}, expected {space.low[where]!s}..{space.high[where]!s} as its space says",
            )
    elif not space.contains(obs):
        raise BrokenRule("bounds", f"{name} is {obs!s}, which is not in {space}")


def check_info_pairs(subject: Subject) -> None:
    """Every info `key` has its mask `_key`, bool (num_envs,), and no mask stands alone; nested dicts alike."""
    for mode in subject.modes:
        for where, _, info in subject.run(mode).outputs():
            for name, key, entries in _entries(info, "info"):
                if key.startswith("_"):
                    if key[1:] not in entries:
                        raise BrokenRule("info_pairs", f"{name} after {where} masks {key[1:]!r}, which is not there")
                    continue
                mask = entries.get(f"_{key}")
                if mask is None:
                    raise BrokenRule(
                        "info_pairs",
                        f"{name} after {where} has no mask '_{key}', expected bool ({subject.num_envs},) that says which rows "
                        "have it",
                    )
                if not is_array(mask) or mask.dtype != bool or mask.shape != (subject.num_envs,):
                    came = f"{mask.dtype} {mask.shape}" if is_array(mask) else f"a {type(mask).__name__}"
                    raise BrokenRule(
                        "info_pairs",
                        f"the mask '_{key}' of {name} after {where} is {came}, expected bool ({subject.num_envs},)",
                    )


def check_info_dense(subject: Subject) -> None:
    """Every info is an array of numbers with one row an environment: no objects, no strings, no lists of dicts."""
    for mode in subject.modes:
        for where, _, info in subject.run(mode).outputs():
            for name, value in leaves(info, "info"):
                if value.dtype.kind not in "biufc":
                    raise BrokenRule(
                        "info_dense", f"{name} after {where} is of {value.dtype}, expected numbers or bool"
                    )
                if value.shape[:1] != (subject.num_envs,):
                    raise BrokenRule(
                        "info_dense", f"{name} after {where} has shape {value.shape}, expected {subject.num_envs} rows"
                    )


def _entries(info: Mapping[str, Any], name: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for key, value in info.items():
        yield f"{name}[{key!r}]", key, info
        # observations have nested spaces of their own, without masks inside
        if isinstance(value, dict) and key != "final_obs":
            yield from _entries(value, f"{name}[{key!r}]")


def check_action_masks(subject: Subject) -> None:
    """`info["action_mask"]` is int8 of 0 and 1 with a valid action in every row; `action_masks()` says the same in bool."""
    env = subject.env()
    has_method = hasattr(env, "action_masks")
    first = subject.run(subject.modes[0]).start[1]
    if "action_mask" not in first and not has_method:
        raise NotApplicable("neither info['action_mask'] nor action_masks()")
    for mode in subject.modes:
        for where, _, info in subject.run(mode).outputs():
            if "action_mask" not in info:
                if "action_mask" in first:
                    raise BrokenRule("action_masks", f"info has no 'action_mask' after {where}, but had it after reset")
                continue
            _check_mask(
                info["action_mask"], env.single_action_space, subject.num_envs, f"info['action_mask'] after {where}"
            )
    if has_method:
        _check_mask_method(subject)


def _check_mask(mask: Array, space: gymnasium.Space[Any], num_envs: int, name: str) -> None:
    if mask.dtype != np.int8 or mask.shape[:1] != (num_envs,):
        raise BrokenRule(
            "action_masks",
            f"{name} is {mask.dtype} {mask.shape}, expected int8 ({num_envs}, ...): sample() takes no other",
        )
    if not np.isin(mask, (0, 1)).all():
        raise BrokenRule("action_masks", f"{name} has values {np.unique(mask).tolist()}, expected 0 and 1")
    empty = np.flatnonzero(~mask.reshape(num_envs, -1).any(axis=1))
    if len(empty):
        raise BrokenRule("action_masks", f"{name} has no valid action in row {empty[0]}, expected at least one")
    if isinstance(space, gymnasium.spaces.Discrete):
        if mask.shape != (num_envs, int(space.n)):
            raise BrokenRule("action_masks", f"{name} has shape {mask.shape}, expected ({num_envs}, {space.n})")
        drawn = int(space.sample(mask[0]))
        if mask[0, drawn - int(space.start)] != 1:
            raise BrokenRule("action_masks", f"{name}: sample() gave {drawn} for the mask {mask[0].tolist()}")


def _check_mask_method(subject: Subject) -> None:
    env = subject.env()
    _, info = env.reset(seed=subject.seed)
    masks = getattr(env, "action_masks")()  # noqa: B009 (not an attribute of every VectorEnv)
    space, num_envs = env.single_action_space, subject.num_envs
    widths = [int(space.n)] if isinstance(space, gymnasium.spaces.Discrete) else []
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        widths = [int(width) for width in space.nvec.ravel()]
    if not is_array(masks) or array(masks).dtype != bool or array(masks).shape[:1] != (num_envs,):
        came = f"{masks.dtype} {tuple(masks.shape)}" if is_array(masks) else f"a {type(masks).__name__}"
        raise BrokenRule("action_masks", f"action_masks() gives {came}, expected bool ({num_envs}, ...)")
    masks = array(masks)
    if widths and masks.shape != (num_envs, sum(widths)):
        raise BrokenRule(
            "action_masks",
            f"action_masks() has shape {masks.shape}, expected ({num_envs}, {sum(widths)}): one entry for every choice",
        )
    for part in np.split(masks, np.cumsum(widths)[:-1], axis=1) if widths else [masks]:
        if not part.any(axis=1).all():
            raise BrokenRule(
                "action_masks", "action_masks() leaves a row without a valid action, expected at least one"
            )
    if len(widths) == 1 and "action_mask" in info and not np.array_equal(masks, array(info["action_mask"]) > 0):
        raise BrokenRule("action_masks", "action_masks() and info['action_mask'] disagree after reset")


def check_endings(subject: Subject) -> None:
    """Episodes end, and `terminated` (no future) is not `truncated` (we stopped watching)."""
    steps = subject.run(subject.modes[0]).steps
    ended = np.stack([step.ended for step in steps])
    terminated = np.stack([step.terminated for step in steps])[ended]
    truncated = np.stack([step.truncated for step in steps])[ended]
    if not ended.any():
        raise BrokenRule(
            "endings",
            f"no episode ended in {subject.steps} steps of {subject.num_envs} rows, so nothing was learnt about endings; give "
            "more steps, or the environment a shorter limit",
        )
    if (terminated & truncated).all():
        raise BrokenRule(
            "endings",
            f"all {len(terminated)} episode ends have terminated and truncated both True, expected one of them where there is "
            "one reason: a learner bootstraps from truncations only",
        )
    for name, flags in (("terminated", terminated & ~truncated), ("truncated", truncated & ~terminated)):
        if name in subject.endings and not flags.any():
            raise BrokenRule(
                "endings",
                f"none of {len(flags)} episode ends is {name} alone, though the environment is said to have such ends; "
                "expected the two reasons apart",
            )


def check_spec(subject: Subject) -> None:
    """`spec.to_json()` and back through `gymnasium.make` and `make_vec` gives the same environment."""
    if subject.env_id is None:
        raise NotApplicable("no env_id was given")
    kwargs = dict(subject.settings)
    one = gymnasium.make(subject.env_id, **kwargs)
    again = gymnasium.make(EnvSpec.from_json(_json_of(one.spec)))
    many = gymnasium.make_vec(subject.env_id, num_envs=subject.num_envs, **kwargs)
    many_again = gymnasium.make_vec(EnvSpec.from_json(_json_of(many.spec)))
    for name, first, second in (
        ("make", one.reset(seed=subject.seed), again.reset(seed=subject.seed)),
        ("make_vec", many.reset(seed=subject.seed), many_again.reset(seed=subject.seed)),
    ):
        if found := difference(first, second, "reset"):
            raise BrokenRule(
                "spec", f"gymnasium.{name} from the JSON of its own spec gives another environment: {found}"
            )
    if many_again.num_envs != subject.num_envs:
        raise BrokenRule("spec", f"make_vec from the JSON has {many_again.num_envs} rows, expected {subject.num_envs}")


def _json_of(spec: EnvSpec | None) -> str:
    if spec is None:
        raise BrokenRule("spec", "spec is None, expected the EnvSpec that gymnasium.make sets")
    try:
        return spec.to_json()
    except (TypeError, ValueError) as error:
        raise BrokenRule(
            "spec", f"spec.to_json() failed: {error}; expected arguments that JSON knows (names and paths, no arrays)"
        ) from error


def check_closing(subject: Subject) -> None:
    """`close()` may come twice, and `closed` says it."""
    env = subject.env()
    env.reset(seed=subject.seed)
    for _ in range(2):
        try:
            env.close()
        except Exception as error:
            raise BrokenRule("closing", f"close() raised {error!r}, expected that it may be called twice") from error
        if env.closed is not True:
            raise BrokenRule("closing", f"closed is {env.closed!r} after close(), expected True")
