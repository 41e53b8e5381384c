"""Environments for the tests of the conformance kit: one that keeps every rule, and copies of it that break one each."""

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

NEXT_STEP, SAME_STEP, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED


class Walk(VectorEnv):
    """Rows walk on [-1, 1] and terminate beyond 0.4; five steps are the limit. Left is masked where x < 0."""

    metadata = {"render_modes": [], "autoreset_mode": NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs=1, autoreset_mode="NextStep", drift=None):
        self.num_envs = num_envs
        self.mode = self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.mode}
        self.drift = drift.get(0, 0.0) if isinstance(drift, dict) else 0.0
        self.single_observation_space = gymnasium.spaces.Box(np.float32([-1, 0]), np.float32([1, 1]))
        self.single_action_space = gymnasium.spaces.Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.random = None

    def row_seeds(self, seed):
        return list(seed) if isinstance(seed, list) else [seed + row for row in range(self.num_envs)]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed if isinstance(seed, int) else None)
        mask = (options or {}).get("reset_mask")
        if seed is not None:
            self.random = [np.random.default_rng(s) for s in self.row_seeds(seed)]
        if mask is None:
            mask = np.ones(self.num_envs, dtype=bool)
            self.x, self.t = np.zeros(self.num_envs, dtype=np.float32), np.zeros(self.num_envs, dtype=int)
            self.ended = ~mask
        self.begin(mask)
        return self.obs(), self.info()

    def begin(self, rows):
        x, t = self.x.copy(), self.t.copy()
        for row in np.flatnonzero(rows):
            x[row], t[row] = self.random[row].uniform(-0.3, 0.3) + self.drift, 0
        self.x, self.t, self.ended = x, t, self.ended & ~rows

    def obs(self):
        return np.stack([self.x, self.t / 5], axis=1).astype(np.float32)

    def mask(self):
        mask = np.ones((self.num_envs, 3), dtype=np.int8)
        mask[:, 0] = self.x >= 0
        return mask

    def action_masks(self):
        return self.mask().astype(bool)

    def facts(self):
        return {"action_mask": self.mask(), "position": self.x.copy()}

    def info(self):
        info = self.facts()
        return info | {f"_{key}": np.ones(self.num_envs, dtype=bool) for key in info}

    def move(self, actions, idle):
        x = self.x.copy()
        for row in np.flatnonzero(~idle):
            x[row] += 0.2 * (actions[row] - 1) + self.random[row].uniform(-0.2, 0.2)
        self.x, self.t = np.clip(x, -1, 1), self.t + ~idle

    def step(self, actions):
        idle = self.ended
        self.move(actions, idle)
        reward = np.where(idle, 0, self.x).astype(np.float32)
        terminated = (np.abs(self.x) > 0.4) & ~idle
        truncated = (self.t >= 5) & ~terminated & ~idle
        self.ended = terminated | truncated
        info = self.info()
        if self.mode is NEXT_STEP and idle.any():
            self.begin(idle)
            info = self.info()
        if self.mode is SAME_STEP and self.ended.any():
            ended, last = self.ended, self.last(info)
            self.begin(ended)
            info = self.info() | last
            info |= {f"_{key}": ended.copy() for key in last}
        return self.obs(), reward, terminated, truncated, info

    def last(self, info):
        return {"final_obs": self.obs(), "final_info": info}

    def close_extras(self, **kwargs):
        pass


class WalkEnv(gymnasium.Env):
    """One row of Walk."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, drift=None, kind=None, render_mode=None):
        self.batch = (kind or Walk)(1, "Disabled", drift=drift)
        self.observation_space, self.action_space = (
            self.batch.single_observation_space,
            self.batch.single_action_space,
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        first = seed is None and self.batch.random is None
        obs, _ = self.batch.reset(seed=int(self.np_random.integers(2**31)) if first else seed)
        return obs[0], {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.batch.step(np.array([action]))
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}


class TorchWalk(Walk):
    """Tensors out."""

    def reset(self, **how):
        return tensors(super().reset(**how))

    def step(self, actions):
        return tensors(super().step(actions))


def tensors(tree):
    if isinstance(tree, dict):
        return {key: tensors(value) for key, value in tree.items()}
    return tuple(tensors(value) for value in tree) if isinstance(tree, tuple) else torch.from_numpy(np.array(tree))


# ---- one rule broken each


class WiderSpace(Walk):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.observation_space = gymnasium.spaces.Box(-1, 1, (self.num_envs, 2), dtype=np.float32)


class OneRowMore(Walk):
    def __init__(self, num_envs=1, *args, **kwargs):
        super().__init__(num_envs + 1, *args, **kwargs)


class OtherActions(Walk):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.action_space = gymnasium.spaces.Box(0, 2, (self.num_envs,), dtype=np.int64)


class ClassMetadata(Walk):
    metadata = {"render_modes": [], "autoreset_mode": NEXT_STEP}  # noqa: RUF012

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metadata = type(self).metadata
        self.metadata["autoreset_mode"] = self.mode


class ModeAsText(Walk):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metadata["autoreset_mode"] = self.mode.value


class ModeOfTheClass(Walk):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metadata = dict(type(self).metadata)


class NoModeAttribute(Walk):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.autoreset_mode


def changed(position, change):
    """A Walk whose step returns something else at one position."""

    class Changed(Walk):
        def step(self, actions):
            out = list(super().step(actions))
            out[position] = change(out[position])
            return tuple(out)

    return Changed


class DoubleObs(Walk):
    def obs(self):
        return super().obs().astype(np.float64)


class InfoAsList(Walk):
    def reset(self, **how):
        obs, _ = super().reset(**how)
        return obs, [{}] * self.num_envs


class BeyondTheBox(Walk):
    def obs(self):
        return super().obs() * np.float32([1, 1.5])


class NotANumber(Walk):
    def obs(self):
        return np.where(super().obs() > 0.5, np.float32("nan"), super().obs())


class FinalBeyondTheBox(Walk):
    def last(self, info):
        last = super().last(info)
        return last | {"final_obs": last["final_obs"] + np.float32([0, 1])}


class NoMaskOfInfo(Walk):
    def info(self):
        info = super().info()
        del info["_position"]
        return info


class MaskAlone(Walk):
    def info(self):
        return super().info() | {"_nothing": np.ones(self.num_envs, dtype=bool)}


class MaskOfNumbers(Walk):
    def info(self):
        return super().info() | {"_position": np.ones(self.num_envs)}


class Words(Walk):
    def facts(self):
        return super().facts() | {"name": np.array(["row"] * self.num_envs)}


class ListOfInfos(Walk):
    def facts(self):
        return super().facts() | {"rows": [1.0] * self.num_envs}


class Objects(Walk):
    def facts(self):
        return super().facts() | {"any": np.full(self.num_envs, None, dtype=object)}


class NumberForAll(Walk):
    def facts(self):
        return super().facts() | {"weight": np.float32([0.5, 0.5])[: self.num_envs - 1]}


class BoolMask(Walk):
    def facts(self):
        return super().facts() | {"action_mask": self.mask().astype(bool)}


class NothingValid(Walk):
    def mask(self):
        return super().mask() * (np.abs(self.x) < 0.2).astype(np.int8)[:, None]

    def action_masks(self):
        return super().mask().astype(bool)


class MaskMethodOfOthers(Walk):
    def action_masks(self):
        return np.ones((self.num_envs, 3), dtype=bool)


class WideMaskMethod(Walk):
    def action_masks(self):
        return np.ones((self.num_envs, 4), dtype=bool)


class MaskForgottenLater(Walk):
    def step(self, actions):
        *out, info = super().step(actions)
        return (*out, {key: value for key, value in info.items() if "action_mask" not in key})


class OneDone(Walk):
    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions)
        return obs, reward, terminated | truncated, terminated | truncated, info


class TruncationAsTermination(Walk):
    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions)
        return obs, reward, terminated | truncated, np.zeros_like(truncated), info


class Endless(Walk):
    def move(self, actions, idle):
        self.x = np.float32([r.uniform(-0.3, 0.3) for r in self.random])
        self.t = np.minimum(self.t + 1, 4)


class OwnEntropy(Walk):
    def move(self, actions, idle):
        super().move(actions, idle)
        self.x = np.clip(self.x + np.random.default_rng().uniform(-0.1, 0.1, self.num_envs), -1, 1).astype(np.float32)


class Remembers(Walk):
    """Steps of before the seed count on."""

    total = 0

    def move(self, actions, idle):
        self.total += 1
        super().move(actions, idle)
        self.x = np.clip(self.x + np.float32(0.01 * (self.total % 7)), -1, 1)


class DeafToSeeds(Walk):
    def row_seeds(self, seed):
        return [0] * self.num_envs


class SmallSeeds(Walk):
    def row_seeds(self, seed):
        return [int(np.int64(s)) for s in super().row_seeds(seed)]


class OneSeedOnly(Walk):
    def row_seeds(self, seed):
        return [seed + row for row in range(self.num_envs)]


class FirstOfTheList(Walk):
    def row_seeds(self, seed):
        return super().row_seeds(seed[0] if isinstance(seed, list) else seed)


class OtherListThanNumber(Walk):
    def row_seeds(self, seed):
        return [s + 100 for s in seed] if isinstance(seed, list) else super().row_seeds(seed)


class SeedsAgain(Walk):
    last_seed = None

    def reset(self, *, seed=None, options=None):
        self.last_seed = seed if seed is not None else self.last_seed
        return super().reset(seed=None if options else self.last_seed, options=options)


class FreshEntropy(Walk):
    def reset(self, *, seed=None, options=None):
        if seed is None and options is None:
            seed = int(np.random.default_rng().integers(2**40))
        return super().reset(seed=seed, options=options)


class RewardedReset(Walk):
    def step(self, actions):
        idle = self.ended if self.mode is NEXT_STEP else np.zeros(self.num_envs, dtype=bool)
        obs, reward, *rest = super().step(actions)
        return obs, np.where(idle, np.float32(1), reward), *rest


class NoFinalObs(Walk):
    def last(self, info):
        return {"final_info": info}


class NoFinalInfo(Walk):
    def last(self, info):
        return {"final_obs": self.obs()}


class FinalForEveryRow(Walk):
    def step(self, actions):
        *out, info = super().step(actions)
        return (*out, info | {key: np.ones_like(value) for key, value in info.items() if key.startswith("_final")})


class FinalIsFirst(Walk):
    """In same-step mode the observation after the reset stands for the last one."""

    def step(self, actions):
        obs, *out, info = super().step(actions)
        return obs, *out, info | ({"final_obs": obs.copy()} if "final_obs" in info else {})


class LateReset(Walk):
    """In next-step mode the first step of an episode is swallowed."""

    def step(self, actions):
        idle = self.ended
        out = super().step(actions)
        if self.mode is NEXT_STEP and idle.any():
            self.t = self.t + idle
            return self.obs(), *out[1:]
        return out


class InfoOfTheNext(Walk):
    def step(self, actions):
        *out, info = super().step(actions)
        if "final_info" in info:
            info["final_info"] = self.info()
        return (*out, info)


class PoorFinalInfo(Walk):
    def last(self, info):
        few = {key: info[key] for key in ("action_mask", "_action_mask")}
        return super().last(info) | {"final_info": few}


class ResetsAll(Walk):
    def begin(self, rows):
        super().begin(np.ones_like(rows) if self.mode is DISABLED else rows)


class DrawsForAll(Walk):
    """A reset of one row takes a draw from every row's generator."""

    def begin(self, rows):
        super().begin(rows)
        if self.mode is DISABLED:
            for row in np.flatnonzero(~rows):
                self.random[row].uniform()


class PopsOptions(Walk):
    def reset(self, *, seed=None, options=None):
        mask = options.pop("reset_mask", None) if options else None
        return super().reset(seed=seed, options=None if mask is None else {"reset_mask": mask})


class ClearsTheMask(Walk):
    def reset(self, *, seed=None, options=None):
        out = super().reset(seed=seed, options=options)
        if options:
            options["reset_mask"][:] = False
        return out


class WritesActions(Walk):
    def step(self, actions):
        out = super().step(actions)
        actions[:] = 0
        return out


class OneBuffer(Walk):
    buffer = None

    def obs(self):
        obs = super().obs()
        if self.buffer is None:
            self.buffer = obs
        self.buffer[:] = obs
        return self.buffer

    def last(self, info):
        return super().last(info) | {"final_obs": self.obs().copy()}


class OneInfoBuffer(Walk):
    def facts(self):
        facts = super().facts()
        if not hasattr(self, "buffer"):
            self.buffer = facts["position"].copy()
        if self.mode is not SAME_STEP:
            self.buffer[:] = facts["position"]
            facts["position"] = self.buffer
        return facts


class StateAsInfo(Walk):
    def facts(self):
        return super().facts() | {"position": self.x}


class KeepsActions(Walk):
    """The actions of the step before push on; they are the caller's own array."""

    before = None

    def reset(self, **how):
        self.before = None if "options" not in how else self.before
        return super().reset(**how)

    def move(self, actions, idle):
        super().move(actions, idle)
        if self.before is not None:
            fresh = self.t > 1
            self.x = np.clip(self.x + np.float32(0.01) * self.before * (fresh & ~idle), -1, 1).astype(np.float32)
        self.before = actions


class TwoNames(Walk):
    def facts(self):
        facts = super().facts()
        return facts | {"again": facts["position"]}


class CannotCloseTwice(Walk):
    def close(self, **kwargs):
        if self.closed:
            raise RuntimeError("already closed")
        self.closed = True


class NeverClosed(Walk):
    def close(self, **kwargs):
        pass
