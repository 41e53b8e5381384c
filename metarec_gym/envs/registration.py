"""The ids of our environments. Entry points are strings, so registering loads no torch."""

from __future__ import annotations

from typing import Any

import gymnasium

from metarec_gym.envs.scenarios import SCENARIOS

SELECT_ID = "MetaRec/Select-v0"
BLEND_ID = "MetaRec/Blend-v0"
SLOTS_ID = "MetaRec/Slots-v0"
ACTION_OF = {SELECT_ID: "select", BLEND_ID: "blend", SLOTS_ID: "slots"}
"""What an action says in each id; see `EnvConfig.action`."""
OTHER_IDS = {
    "MetaRec/Tune-v0": ("metarec_gym.envs.tune:TuneEnv", "metarec_gym.envs.tune:TuneVectorEnv"),
    "MetaRec/Replay-v0": ("metarec_gym.envs.replay:ReplayEnv", "metarec_gym.envs.replay:ReplayVectorEnv"),
}
"""Single and vector environment of the ids that do not run on a world's simulated users."""


WORLD_ENTRIES = ("metarec_gym.envs.single_env:MetaRecEnv", "metarec_gym.envs.vector_env:MetaRecVectorEnv")
"""Single and vector environment of the ids that run on a world."""


def register_envs() -> None:
    """Registers every id once; a second call changes nothing."""
    for env_id, action in ACTION_OF.items():
        _register(env_id, WORLD_ENTRIES, {"action": action})
    for env_id, entries in OTHER_IDS.items():
        _register(env_id, entries, {})
    for env_id, scenario in SCENARIOS.items():
        _register(env_id, OTHER_IDS.get(scenario.base_id, WORLD_ENTRIES), scenario.kwargs)


def _register(env_id: str, entries: tuple[str, str], kwargs: dict[str, Any]) -> None:
    if env_id in gymnasium.registry:
        return
    single, vector = entries
    # no max_episode_steps: truncation lives in the dynamics, so that single and vector environments agree
    gymnasium.register(id=env_id, entry_point=single, vector_entry_point=vector, nondeterministic=False, kwargs=kwargs)
