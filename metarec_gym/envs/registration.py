"""The ids of our environments. Entry points are strings, so registering loads no torch."""

from __future__ import annotations

import gymnasium

SELECT_ID = "MetaRec/Select-v0"


def register_envs() -> None:
    """Registers every id once; a second call changes nothing."""
    if SELECT_ID in gymnasium.registry:
        return
    # no max_episode_steps: truncation lives in the dynamics, so that single and vector environments agree
    gymnasium.register(
        id=SELECT_ID,
        entry_point="metarec_gym.envs.single_env:MetaRecEnv",
        vector_entry_point="metarec_gym.envs.vector_env:MetaRecVectorEnv",
        nondeterministic=False,
    )
