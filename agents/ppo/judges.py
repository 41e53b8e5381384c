"""Training against several judges at once, so that a policy does not lean on what only one of them believes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from metarec_gym.seeding import stream


class JudgesEnv(VectorEnv[Any, Any, Any]):
    """Several torch environments with equal spaces as one: rows 0..n-1 are the first's, then the second's and so on.

    Infos keep what a learner reads: `action_mask`, and `final_obs` in same-step mode. Rows of other judges are untouched by an
    episode's end.

    Args:
        judges: Names, one for each environment.
        envs: The environments, with torch output.

    Raises:
        ValueError: When there are none, or their spaces or autoreset modes differ.
    """

    def __init__(self, judges: Sequence[str], envs: Sequence[Any]) -> None:
        if not envs or len(envs) != len(judges):
            raise ValueError(f"{len(envs)} environments for {len(judges)} judges; expected one each, and at least one")
        first = envs[0]
        for env in envs[1:]:
            for name in ("single_observation_space", "single_action_space"):
                if getattr(env, name) != getattr(first, name):
                    raise ValueError(f"the environments differ in {name}; make them from one world and one id")
            if env.metadata["autoreset_mode"] != first.metadata["autoreset_mode"]:
                raise ValueError("the environments differ in autoreset_mode; pass the same to all")
        self.envs, self.judges = list(envs), list(judges)
        self.sizes = [env.num_envs for env in envs]
        self.num_envs = sum(self.sizes)
        self.metadata = dict(first.metadata)
        self.single_observation_space = first.single_observation_space
        self.single_action_space = first.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        for name in ("world", "config", "strategy_names"):
            setattr(self, name, getattr(first, name, None))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Starts episodes in all rows; each judge's rows have their own stream of `seed`.

        Raises:
            ValueError: When options are given: rows belong to different judges.
        """
        if options:
            raise ValueError(
                f"options {sorted(options)} cannot be split among judges; reset the environments themselves"
            )
        seeds = [None if seed is None else stream(seed, "judge", i) for i in range(len(self.envs))]
        results = [env.reset(seed=s) for env, s in zip(self.envs, seeds, strict=True)]
        return torch.cat([obs for obs, _ in results]), self._joined(
            [obs for obs, _ in results], [i for _, i in results]
        )

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One request in every row."""
        parts = torch.as_tensor(actions).split(self.sizes)
        results = [env.step(part) for env, part in zip(self.envs, parts, strict=True)]
        obs, reward, terminated, truncated, infos = zip(*results, strict=True)
        joined = self._joined(list(obs), list(infos))
        return torch.cat(obs), torch.cat(reward), torch.cat(terminated), torch.cat(truncated), joined

    @staticmethod
    def _joined(obs: list[Tensor], infos: list[dict[str, Any]]) -> dict[str, Any]:
        joined: dict[str, Any] = {}
        if all("action_mask" in info for info in infos):
            joined["action_mask"] = torch.cat([torch.as_tensor(info["action_mask"]) for info in infos])
        if any("final_obs" in info for info in infos):
            # rows of a judge where no episode ended hold their live observation: nobody looks there
            joined["final_obs"] = torch.cat([info.get("final_obs", o) for info, o in zip(infos, obs, strict=True)])
            none = [torch.zeros(len(o), dtype=torch.bool, device=o.device) for o in obs]
            joined["_final_obs"] = torch.cat([i.get("_final_obs", n) for i, n in zip(infos, none, strict=True)])
        return joined

    def get_state(self) -> dict[str, Tensor]:
        """Everything that decides what comes next."""
        states = (env.get_state().items() for env in self.envs)
        return {f"{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in state}

    def set_state(self, saved: dict[str, Tensor]) -> None:
        """Goes on from `get_state()`."""
        for i, env in enumerate(self.envs):
            prefix = f"{i}."
            env.set_state({name[len(prefix) :]: t for name, t in saved.items() if name.startswith(prefix)})

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the environments."""
        for env in self.envs:
            env.close()


def with_judges(make: Callable[..., Any], judges: Sequence[str], num_envs: int) -> Any:
    """One environment, whose rows are shared out among the judges.

    Args:
        make: `make(num_envs, judge=name)` gives a vector environment with torch output.
        judges: Names of the training fold's judges: main, second, uniform, popularity.
        num_envs: Rows in all; the first judges get one more where they do not divide.

    Raises:
        ValueError: When there are more judges than rows.
    """
    if num_envs < len(judges):
        raise ValueError(f"num_envs is {num_envs}, fewer than the {len(judges)} judges; give every judge a row")
    if len(judges) == 1:
        return make(num_envs, judge=judges[0])
    counts = [num_envs // len(judges) + (i < num_envs % len(judges)) for i in range(len(judges))]
    return JudgesEnv(judges, [make(count, judge=judge) for count, judge in zip(counts, judges, strict=True)])
