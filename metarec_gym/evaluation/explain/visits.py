"""The states that a policy meets, with what every strategy would have been worth there."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from metarec_gym.evaluation.rollout import RolloutResult, env_maker, rollout

if TYPE_CHECKING:
    from metarec_gym.evaluation.headroom import EvalSettings
    from metarec_gym.policy import Policy
    from metarec_gym.world import World


@dataclass(frozen=True)
class Stage:
    """Where policies are played.

    Attributes:
        world: The world.
        fold: Whose users, and whose judge.
        contexts: int64 (C,), start states.
        horizon: Requests an episode, T.
        env_seed: Seed of the luck.
        settings: Slate size, cost weight, further settings of the environment and `batch_rows`.
    """

    world: World
    fold: str
    contexts: Tensor
    horizon: int
    env_seed: int
    settings: EvalSettings

    def play(self, player: Any, replicates: int) -> RolloutResult:
        """One episode for each (start state, replicate); equal luck for every player."""
        return rollout(
            self.world,
            self.fold,
            player,
            contexts=self.contexts,
            replicates=replicates,
            horizon=self.horizon,
            env_seed=self.env_seed,
            slate_size=self.settings.slate_size,
            cost_weight=self.settings.cost_weight,
            env_settings=self.settings.env,
            batch_rows=self.settings.batch_rows,
        )


@dataclass(frozen=True)
class Visits:
    """Requests that were served while a policy acted; N requests, D entries of the observation, K strategies.

    Attributes:
        obs: float32 (N, D).
        mask: bool (N, K), strategies that could serve.
        probs: float32 (N, K), what the policy that is explained would do there, whoever acted.
        worth: float32 (N, K), expected immediate reward of every strategy by the fold's judge; privileged.
        action: int64 (N,), the strategy that served.
        user: int64 (N,).
        history_length: int64 (N,), at the start of the episode.
    """

    obs: Tensor
    mask: Tensor
    probs: Tensor
    worth: Tensor
    action: Tensor
    user: Tensor
    history_length: Tensor

    @property
    def label(self) -> Tensor:
        """The explained policy's most probable strategy; int64 (N,)."""
        return self.probs.argmax(dim=1)

    def where(self, rows: Tensor) -> Visits:
        """Some of the requests; bool or int64 index."""
        return Visits(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @staticmethod
    def join(parts: list[Visits]) -> Visits:
        """Requests of several plays as one."""
        return Visits(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Visits)})


class _Watched:
    """Plays `actor` and writes down what `explained` would do in the same states; both get the feedback."""

    def __init__(self, actor: Policy, explained: Policy, env: Any) -> None:
        self.actor, self.explained, self.env = actor, explained, env
        self.rows: dict[str, list[Tensor]] = {name: [] for name in ("obs", "mask", "probs", "worth")}

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        for policy in {id(p): p for p in (self.actor, self.explained)}.values():
            policy.begin(num_rows, device)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        probs = self.explained.action_probs(obs, action_mask)
        worth = self.env.peek_expected_rewards()
        for name, value in (("obs", obs), ("mask", action_mask), ("probs", probs), ("worth", worth)):
            self.rows[name].append(value.cpu())
        return probs if self.actor is self.explained else self.actor.action_probs(obs, action_mask)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        for policy in {id(p): p for p in (self.actor, self.explained)}.values():
            policy.observe(obs, action, reward, alive)


def visit(stage: Stage, actor: Policy, explained: Policy | None = None) -> tuple[Visits, RolloutResult]:
    """Plays a policy once from every start state and keeps the states that it meets.

    Args:
        stage: Where.
        actor: Who acts.
        explained: Whose choices are written down; the actor's if None.

    Returns:
        The requests served, episode by episode, and what happened.
    """
    s = stage.settings
    env = env_maker(stage.world, stage.fold, stage.horizon, s.slate_size, s.cost_weight, s.env, "cpu")(
        len(stage.contexts)
    )
    watched = _Watched(actor, explained or actor, env)
    result = rollout(
        stage.world,
        stage.fold,
        watched,
        contexts=stage.contexts,
        replicates=1,
        horizon=stage.horizon,
        env_seed=stage.env_seed,
        # one batch: no row is thrown away
        batch_rows=len(stage.contexts),
        make_env=lambda rows: env,
    )
    alive = torch.from_numpy(result.alive[:, 0])
    kept = {name: torch.stack(steps, dim=1)[alive] for name, steps in watched.rows.items()}
    of_row = {"user": torch.from_numpy(result.user), "history_length": torch.from_numpy(result.history_length)}
    spread = {name: value[:, None].expand_as(alive)[alive] for name, value in of_row.items()}
    action = torch.from_numpy(result.action[:, 0]).to(torch.int64)[alive]
    return Visits(**kept, action=action, **cast("dict[str, Any]", spread)), result
