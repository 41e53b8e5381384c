"""A population of policies scored on Ray actors, each with its own batched environment.

    with RayPopulation(PopulationEvaluator(recipe, network), actors=4) as evaluator:
        scores = evaluator.evaluate(population, seeds)

Drop-in for `agents.population.PopulationEvaluator`: a candidate's score does not depend on who else is in its batch, so the
scores are those of one process, whatever the number of actors.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from experiments.ray_cluster import start_ray


class Evaluator(Protocol):
    """What is put on the actors: made again from its pickled settings."""

    requests: int
    """Requests that users saw so far."""

    def evaluate(self, population: Tensor, seeds: list[int]) -> Tensor:
        """Scores of the candidates with these users; float64 (C, dim) -> (C,)."""
        ...


class _Actor:
    def __init__(self, evaluator: Evaluator) -> None:
        torch.set_num_threads(1)
        self.evaluator = evaluator

    def evaluate(self, population: Any, seeds: list[int]) -> tuple[Any, int]:
        before = self.evaluator.requests
        scores = self.evaluator.evaluate(torch.from_numpy(population.copy()), seeds)
        return scores.numpy(), self.evaluator.requests - before


class RayPopulation:
    """Scores populations on actors.

    Args:
        evaluator: What each actor gets a copy of; sent to the object store once.
        actors: How many; each takes one core.
        address: Of a cluster; None = this machine.
        retries: How often a part is sent again when its actor died; the actor is started anew.

    Raises:
        ValueError: When `actors` is below 1.
        ModuleNotFoundError: When Ray is not installed.
    """

    def __init__(self, evaluator: Evaluator, actors: int = 2, *, address: str | None = None, retries: int = 2) -> None:
        if actors < 1:
            raise ValueError(f"actors is {actors}, expected at least 1")
        self.requests = evaluator.requests
        """Requests that users saw so far, on all actors."""
        self._ray = start_ray(address, None if address else actors)
        remote = self._ray.remote(num_cpus=1, max_restarts=retries, max_task_retries=retries)(_Actor)
        shared = self._ray.put(evaluator)
        self._actors = [remote.remote(shared) for _ in range(actors)]

    def evaluate(self, population: Tensor, seeds: list[int]) -> Tensor:
        """Scores of the candidates; float64 (C, dim) -> (C,)."""
        parts = population.tensor_split(len(self._actors))
        sent = [
            actor.evaluate.remote(part.numpy(), seeds)
            for actor, part in zip(self._actors, parts, strict=True)
            if len(part)
        ]
        found = self._ray.get(sent)
        self.requests += sum(requests for _, requests in found)
        return torch.cat([torch.from_numpy(scores.copy()) for scores, _ in found])

    def close(self) -> None:
        """Ends the actors; Ray itself goes on."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
