"""Settings of an environment; each field has its sentence."""

from __future__ import annotations

from dataclasses import dataclass

from metarec_gym.world import FOLDS, World


@dataclass(frozen=True)
class EnvConfig:
    """What an environment simulates, besides the world itself."""

    fold: str = "A"
    """Whose users are simulated, by their own judge: train on one of A and B, score on the other."""
    horizon: int | None = None
    """Requests until truncation; None takes the world's largest sound horizon."""
    slate_size: int | None = None
    """Items a request; None takes the world's."""
    cost_weight: float = 0.0
    """Reward lost for the relative serving cost (dearest strategy = 1) of each request."""
    world_seed: int = 0
    """Which draw of the users' random coefficients, from their posterior."""
    unavailable: tuple[str, ...] = ()
    """Strategies that are out of service: masked; choosing one all the same serves an empty slate."""

    def resolve(self, world: World) -> tuple[int, int]:
        """Horizon and slate size for `world`.

        Raises:
            ValueError: When a setting does not fit the world.
        """
        if self.fold not in FOLDS:
            raise ValueError(f"fold is {self.fold!r}, expected one of {FOLDS}: a judge exists for these users only")
        horizon = world.horizon if self.horizon is None else self.horizon
        slate_size = world.slate_size if self.slate_size is None else self.slate_size
        if horizon < 1 or slate_size < 1:
            raise ValueError(f"horizon is {horizon} and slate_size {slate_size}; both must be at least 1")
        if horizon * slate_size > world.list_length:
            raise ValueError(
                f"{horizon} requests of {slate_size} items need lists of {horizon * slate_size} items, the world "
                f"{world.name!r} holds {world.list_length}; use a shorter horizon or build the world with --horizon {horizon}"
                f" --slate-size {slate_size}"
            )
        unknown = sorted(set(self.unavailable) - set(world.strategies))
        if unknown:
            raise ValueError(f"unavailable names {unknown}, which the pool has not; it has {list(world.strategies)}")
        if len(set(self.unavailable)) == world.n_strategies:
            raise ValueError("every strategy is unavailable; at least one must be able to serve")
        return horizon, slate_size
