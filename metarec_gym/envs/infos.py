"""What an environment tells besides observation and reward: named tensors, dense, rows first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarec_gym.envs.actions import Plan
from metarec_gym.envs.dynamics import Served
from metarec_gym.envs.user_state import EnvTables, UserState


def state_facts(tables: EnvTables, state: UserState) -> dict[str, Tensor]:
    """Who sits in each row, and what the next choice may be."""
    facts = {
        "action_mask": state.available.to(torch.int8),
        "user": tables.user[state.start],
        "start_state": tables.start_index[state.start],
        "request": state.request.clone(),
    }
    if tables.session_requests is not None:
        facts["session"] = state.session.clone()
    return facts


def request_facts(
    tables: EnvTables, outcomes: tuple[str, ...], action: str, planned: Plan, served: Served
) -> dict[str, Tensor]:
    """What the request brought.

    Args:
        tables: The fold's tables.
        outcomes: Outcome names.
        action: Kind of action.
        planned: What was shown, and by whom.
        served: What followed.
    """
    facts = {"slate": served.slate, "outcomes": served.outcomes}
    facts |= {f"reward_{name}": served.parts[:, index].clone() for index, name in enumerate(outcomes)}
    facts["reward_cost"] = -served.cost
    facts["reward_latency"] = -served.latency
    facts["reward_retention"] = served.retention.clone()
    if planned.owner is not None:
        facts["slot_strategy"] = planned.owner.clone()
    if action == "blend":
        facts["strategy_weights"] = planned.share.clone()
    if tables.session_requests is not None:
        facts["session_ended"] = served.session_ends.clone()
        facts["away_hours"] = torch.where(served.session_ends, served.away_hours, 0.0)
    return facts


def apart(infos: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """`infos` with a copy of whatever `others` holds too: the caller may write into one without changing the other."""
    return {key: _copied(value) if value is others.get(key) else value for key, value in infos.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return value.clone() if isinstance(value, Tensor) else value.copy()
