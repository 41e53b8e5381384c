"""Many requests without the host: a whole step, automatic reset included, as a function of tensors, compiled or in a CUDA graph.

`MetaRecVectorEnv.step` asks the host a few questions at every step: did an episode end, how deep must a list be read. On a GPU
the answers cost more than the step. `transition` asks none: rows that ended are reset by `torch.where`, no shape hangs on a
value, so it can be compiled as one graph (`torch.compile`; Ansel et al., ASPLOS 2024) or recorded and replayed (CUDA graphs).
It is made of the functions that `step` is made of, and gives the same bits; only infos it has none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from metarec_gym.envs.config import EnvConfig
from metarec_gym.envs.dynamics import advance, plan, serve
from metarec_gym.envs.episodes import Episodes
from metarec_gym.envs.observation import observe
from metarec_gym.envs.user_state import EnvTables, UserState, choose_rows, fresh_rows
from metarec_gym.envs.vector_env import MetaRecVectorEnv
from metarec_gym.fixed_shapes import fixed_shapes
from metarec_gym.response.frozen import AnyJudge, LoggedResponse

CaptureMode = Literal["eager", "compile", "graph"]
CAPTURE_MODES: tuple[CaptureMode, ...] = ("eager", "compile", "graph")
_WARM_UP = 3
"""Steps on a side stream before a capture: libraries allocate their workspaces in the first ones."""

Act = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""A policy as a function of tensors, without a look at the host: observations float32 (num_envs, obs_dim), strategies in service
bool (num_envs, K), noise (num_envs, ...) -> what was chosen (num_envs, ...), what the environment is given, log-probabilities
float32 (num_envs,)."""


@dataclass(frozen=True, eq=False)
class Rules:
    """What stays the same from step to step: the environment's own, nothing is copied."""

    tables: EnvTables
    judge: AnyJudge
    config: EnvConfig
    horizon: int
    slate_size: int
    reward_scale: float


@dataclass(frozen=True, eq=False)
class Carry:
    """What one step hands to the next; rows first, padding rows included."""

    state: UserState
    episodes: Episodes
    obs: Tensor
    """float32 (rows, obs_dim): what the policy sees next."""
    episode_return: Tensor
    """float32 (rows,): rewards of the episode so far."""
    episode_length: Tensor
    """int64 (rows,)."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one step brought; rows first, padding rows included."""

    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final_obs: Tensor
    """float32 (rows, obs_dim): the observation after the request, before any reset."""
    expected_reward: Tensor
    episode_return: Tensor
    """float32 (rows,): rewards of the episode, this one included."""
    episode_length: Tensor


def transition(rules: Rules, carry: Carry, action: Tensor) -> tuple[Carry, Outcome]:
    """One request in every row, and the next episode where it was the last (same-step reset).

    Args:
        rules: The environment's.
        carry: The rows; `carry.state.shown` is written in place, everything else stays.
        action: As `dynamics.plan` takes it, for all rows.
    """
    tables, state = rules.tables, carry.state
    # nobody looks how deep the lists must be read: as deep as an episode can need
    planned = plan(tables, rules.config, state, action, rules.slate_size, rules.horizon)
    served = serve(tables, rules.judge, rules.config, state, planned)
    moved = advance(tables, rules.judge, state, planned, served, rules.horizon)
    ended = moved.terminated | moved.truncated
    total, length = carry.episode_return + served.reward, carry.episode_length + 1
    outcome = Outcome(
        served.reward, moved.terminated, moved.truncated, _observed(rules, moved), served.expected_reward, total, length
    )
    episodes = carry.episodes.next(ended)
    start, draw_key = episodes.draw(tables, None, None)
    moved.shown.masked_fill_(ended[:, None], 0)
    moved.shown[:, -1] = 1
    fresh = fresh_rows(tables, start, draw_key, moved.shown, rules.horizon * rules.slate_size)
    state = choose_rows(ended, fresh, moved)
    total, length = torch.where(ended, 0.0, total), torch.where(ended, 0, length)
    return Carry(state, episodes, _observed(rules, state), total, length), outcome


def _observed(rules: Rules, state: UserState) -> Tensor:
    return observe(rules.tables, state, rules.horizon, rules.reward_scale, rules.config.latency_weight)


@dataclass(eq=False)
class Played:
    """What a rollout saw and did, time first: (num_steps, num_envs, ...). The next `run` writes into the same memory."""

    obs: Tensor
    """float32, one step longer than the rest: its last row is where the next rollout starts."""
    available: Tensor
    """bool (num_steps + 1, num_envs, K): strategies in service, as `obs`."""
    action: Tensor
    """As the policy chose it."""
    log_prob: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final_obs: Tensor
    """float32 (num_steps, num_envs, obs_dim): the observation after the request; where an episode ended, its last one."""
    expected_reward: Tensor
    episode_return: Tensor
    """float32: rewards of the episode, the request included."""
    episode_length: Tensor
    """int64."""


class CapturedRollout:
    """Plays `num_steps` requests of every row with a policy, without the host in between.

    Modes: `eager` calls the functions one by one (the reference for the others, on any device); `compile` compiles the step with
    its policy as one graph (`torch.compile(fullgraph=True)`; on CPU that needs a C++ compiler); `graph` records the whole rollout
    as a CUDA graph and replays it. Actions are not checked, as the checks look at values.

    Args:
        env: A `MetaRecVectorEnv` with `output="torch"` and `autoreset_mode="SameStep"`, episodes of one session and a learned
            judge. It must have been reset; it goes on from where each `run` ends, and `run` from where it stands.
        act: The policy. A network's parameters may change between runs, in place.
        num_steps: Requests a run.
        noise_shape: Of one row's noise in `act`: () for one number.
        mode: See above.
        backend: Of `torch.compile`.

    Raises:
        ValueError: When the environment or the mode is not one of those.
        RuntimeError: When `compile` finds no C++ compiler.
    """

    def __init__(
        self,
        env: MetaRecVectorEnv,
        act: Act,
        num_steps: int,
        *,
        noise_shape: tuple[int, ...] = (),
        mode: CaptureMode = "eager",
        backend: str = "inductor",
    ) -> None:
        if why := refusal(env, mode):
            raise ValueError(why)
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, expected at least 1")
        if mode == "compile" and backend == "inductor" and env.device.type == "cpu":
            _check_compiler()
        self.env, self.act, self.num_steps, self.mode = env, act, num_steps, mode
        self.rules = Rules(env._tables, env._judge, env.config, env.horizon, env.slate_size, env._reward_scale)
        self.noise = torch.zeros(num_steps, env.num_envs, *noise_shape, device=env.device)
        """float32 (num_steps, num_envs, *noise_shape): filled by `run`."""
        self._step: Callable[[Carry, Tensor], tuple[Carry, Tensor, Tensor, Outcome]] = self._move
        if mode == "compile":
            self._step = torch.compile(_alone(self._move), fullgraph=True, dynamic=False, backend=backend)
        self._carry: Carry | None = None
        self._played: Played | None = None
        self._graph: Any = None

    def _move(self, carry: Carry, noise: Tensor) -> tuple[Carry, Tensor, Tensor, Outcome]:
        """The policy and one step; a function of tensors, but for `carry.state.shown`."""
        num_envs, rows = noise.shape[0], carry.obs.shape[0]
        action, given, log_prob = self.act(carry.obs[:num_envs], carry.state.available[:num_envs], noise)
        whole = given if rows == num_envs else torch.cat([given, given.new_zeros(rows - num_envs, *given.shape[1:])])
        carry, outcome = transition(self.rules, carry, whole)
        return carry, action, log_prob, outcome

    # ------------------------------------------------------------------------------------------ a rollout
    @torch.no_grad()
    def run(self, noise: Tensor) -> Played:
        """Plays from where the environment stands; it stands at the rollout's end afterwards.

        Args:
            noise: float32 (num_steps, num_envs, *noise_shape).

        Returns:
            The rollout, in memory that the next `run` overwrites.

        Raises:
            ValueError: When `noise` has another shape, or a row's episode is over.
        """
        if noise.shape != self.noise.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {tuple(self.noise.shape)}")
        self.noise.copy_(noise)
        with fixed_shapes():
            carry = self._here()
            played = self._played = self._played or self._empty(carry)
            if self.mode == "graph":
                self._carry = self._replayed(carry, played)
            else:
                self._carry = self._play(carry, played)
        self._hand_back(self._carry, played)
        return played

    def _play(self, carry: Carry, played: Played) -> Carry:
        n = self.env.num_envs
        for t in range(self.num_steps):
            played.obs[t], played.available[t] = carry.obs[:n], carry.state.available[:n]
            carry, played.action[t], played.log_prob[t], outcome = self._step(carry, self.noise[t])
            for name, value in vars(outcome).items():
                getattr(played, name)[t] = value[:n]
        played.obs[self.num_steps], played.available[self.num_steps] = carry.obs[:n], carry.state.available[:n]
        return carry

    def _empty(self, carry: Carry) -> Played:
        n, steps = self.env.num_envs, self.num_steps
        action, _, log_prob = self.act(carry.obs[:n], carry.state.available[:n], self.noise[0])

        def like(sample: Tensor, longer: int = 0) -> Tensor:
            return sample.new_zeros(steps + longer, n, *sample.shape[1:])

        flag, number = carry.state.terminated, carry.episode_return
        return Played(
            like(carry.obs, 1), like(carry.state.available, 1), like(action), like(log_prob), like(number), like(flag),
            like(flag), like(carry.obs), like(number), like(number), like(carry.episode_length),
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ the environment
    def _here(self) -> Carry:
        """Where the environment stands."""
        env, mine = self.env, self._carry
        state = env._current()
        if mine is not None and state is mine.state:
            return mine
        if bool((state.terminated | state.truncated).any()):
            raise ValueError("an episode is over and was not reset; call env.reset() before a captured rollout")
        return Carry(state, env._episodes, env._observe(), env._return, env._length)

    def _hand_back(self, carry: Carry, played: Played) -> None:
        env = self.env
        env._state, env._episodes = carry.state, carry.episodes
        env._return, env._length = carry.episode_return, carry.episode_length
        env.expected_reward = played.expected_reward[-1].clone()

    # ------------------------------------------------------------------------------------------ CUDA graphs
    def _replayed(self, carry: Carry, played: Played) -> Carry:
        if self._graph is None:
            with torch.cuda.device(self.env.device):
                self._record(carry, played)
        fixed = self._carry
        assert fixed is not None
        _copy_into(fixed, carry)
        self._graph.replay()
        return fixed

    def _record(self, carry: Carry, played: Played) -> None:
        """Captures the rollout on memory of its own: what a replay reads and writes stays where it is."""
        self._carry = fixed = _clone(carry)
        side = torch.cuda.Stream(self.env.device)
        side.wait_stream(torch.cuda.current_stream(self.env.device))
        with torch.cuda.stream(side):
            trial = fixed
            for _ in range(_WARM_UP):
                trial = self._move(trial, self.noise[0])[0]
        torch.cuda.current_stream(self.env.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            _copy_into(fixed, self._play(fixed, played))


def refusal(env: Any, mode: str = "eager") -> str | None:
    """Why `env` cannot be played by a captured rollout in `mode`; None = it can."""
    if mode not in CAPTURE_MODES:
        return f"mode is {mode!r}, expected one of {CAPTURE_MODES}"
    if not isinstance(env, MetaRecVectorEnv):
        return f"a captured rollout plays MetaRecVectorEnv, got {type(env).__name__}; step the environment instead"
    if env.config.session_requests is not None:
        return (
            f"session_requests is {env.config.session_requests}: ranking again between sessions works on whichever rows are "
            "back, which no captured step can; use episodes of one session, or step the environment"
        )
    if isinstance(env._judge, LoggedResponse):
        return "a logged response checks on the host that every pair was observed; step the environment instead"
    if env.autoreset_mode is not AutoresetMode.SAME_STEP:
        return (
            f"autoreset_mode is {env.autoreset_mode.value!r}, a captured step resets in the same step; pass 'SameStep'"
        )
    if env.output != "torch":
        return f"output is {env.output!r}, a captured rollout stays on the device; pass output='torch'"
    if mode == "graph" and env.device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, the environment is on {env.device}; use mode 'eager' or 'compile'"
    return None


def _check_compiler() -> None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise RuntimeError(
            f"mode 'compile' needs a C++ compiler on CPU, found none of {names} on the PATH; install one, or use mode 'eager'"
        )


def _alone(method: Any) -> Any:
    """The same method with a code object of its own: torch counts compilations by code, and refuses the ninth environment."""
    function = method.__func__
    code, namespace = function.__code__.replace(), function.__globals__
    return MethodType(FunctionType(code, namespace, function.__name__, None, function.__closure__), method.__self__)


def _tensors(carry: Carry) -> list[Tensor]:
    parts: list[Any] = [carry.state, carry.episodes]
    found = [getattr(part, f.name) for part in parts for f in fields(part)]
    return [*found, carry.obs, carry.episode_return, carry.episode_length]


def _clone(carry: Carry) -> Carry:
    def cloned(part: Any) -> dict[str, Tensor]:
        return {f.name: getattr(part, f.name).clone() for f in fields(part)}

    return replace(
        carry,
        state=UserState(**cloned(carry.state)),
        episodes=Episodes(**cloned(carry.episodes)),
        **{name: getattr(carry, name).clone() for name in ("obs", "episode_return", "episode_length")},
    )


def _copy_into(target: Carry, source: Carry) -> None:
    for there, value in zip(_tensors(target), _tensors(source), strict=True):
        if there is not value:
            there.copy_(value)
