"""The ids of our environments. Entry points are strings, so registering loads no torch."""

from __future__ import annotations

import gymnasium

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


def register_envs() -> None:
    """Registers every id once; a second call changes nothing."""
    for env_id, action in ACTION_OF.items():
        if env_id in gymnasium.registry:
            continue
        # no max_episode_steps: truncation lives in the dynamics, so that single and vector environments agree
        gymnasium.register(
            id=env_id,
            entry_point="metarec_gym.envs.single_env:MetaRecEnv",
            vector_entry_point="metarec_gym.envs.vector_env:MetaRecVectorEnv",
            nondeterministic=False,
            kwargs={"action": action},
        )
    for env_id, (single, vector) in OTHER_IDS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(id=env_id, entry_point=single, vector_entry_point=vector, nondeterministic=False)
