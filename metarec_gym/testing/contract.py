"""All checks in order, as one function and as an inheritable class of tests."""

from __future__ import annotations

import unittest
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, VectorEnv

from metarec_gym.testing import autoreset, form, memory, seeds
from metarec_gym.testing.runs import FOUNDATIONS, MakeSingle, MakeVector, NotApplicable, Subject

Check = Callable[[Subject], None]

CHECKS: dict[str, Check] = {
    "spaces": form.check_spaces,
    "metadata": form.check_metadata,
    "mode_attribute": form.check_mode_attribute,
    "types": form.check_types,
    "final_obs": autoreset.check_final_obs,
    "bounds": form.check_bounds,
    "info_pairs": form.check_info_pairs,
    "info_dense": form.check_info_dense,
    "action_masks": form.check_action_masks,
    "endings": form.check_endings,
    "repeatable": seeds.check_repeatable,
    "seeds_differ": seeds.check_seeds_differ,
    "large_seeds": seeds.check_large_seeds,
    "seed_list": seeds.check_seed_list,
    "unseeded_reset": seeds.check_unseeded_reset,
    "rows_are_singles": seeds.check_rows_are_singles,
    "next_step": autoreset.check_next_step,
    "same_transitions": autoreset.check_same_transitions,
    "final_info": autoreset.check_final_info,
    "partial_reset": autoreset.check_partial_reset,
    "inputs_kept": autoreset.check_inputs_kept,
    "kept_arrays": memory.check_kept_arrays,
    "written_arrays": memory.check_written_arrays,
    "arrays_apart": memory.check_arrays_apart,
    "outputs_agree": seeds.check_outputs_agree,
    "spec": form.check_spec,
    "closing": form.check_closing,
}
"""Every rule and the function that checks it; a rule that does not apply raises `NotApplicable`."""


def refuse_unknown(skip: Mapping[str, str]) -> None:
    """Raises ValueError unless `skip` gives a reason for rules that exist and may be left out."""
    unknown = sorted(set(skip) - set(CHECKS))
    if unknown:
        raise ValueError(f"skip names {unknown}, which are no rules; the rules are {sorted(CHECKS)}")
    needed = sorted(set(skip) & set(FOUNDATIONS))
    if needed:
        raise ValueError(f"skip names {needed}, on which the other checks rely; they cannot be left out")
    bare = sorted(rule for rule, reason in skip.items() if not reason.strip())
    if bare:
        raise ValueError(f"skip gives no reason for {bare}; say why the environment may break them")


def check_vector_env(make: MakeVector, *, skip: Mapping[str, str] | None = None, **how: Any) -> dict[str, str]:
    """Checks any Gymnasium vector environment against the rules of `CHECKS`; the first one broken is raised.

    Gymnasium's own `check_env` takes single environments only.

    Example:
        >>> import gymnasium
        >>> make = lambda num_envs, mode: gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="vector_entry_point")
        >>> habits = {
        ...     "mode_attribute": "says its mode in the metadata only",
        ...     "seed_list": "one generator for all rows",
        ...     "closing": "close() does not set closed",
        ... }
        >>> verdict = check_vector_env(make, modes=(gymnasium.vector.AutoresetMode.NEXT_STEP,), skip=habits)
        >>> verdict["repeatable"], verdict["seed_list"]
        ('holds', 'left out: one generator for all rows')

    Args:
        make: `make(num_envs, autoreset_mode)` gives a new vector environment each time.
        skip: Rules that the environment may break, each with the reason.
        **how: Fields of `Subject`: `make_single`, `make_torch`, `env_id`, `settings`, `num_envs`, `steps`, `seed`, `modes`,
            `endings`.

    Returns:
        What became of each rule: `holds`, or why it was not checked.

    Raises:
        BrokenRule: At the first rule that does not hold.
        ValueError: When `skip` names no rule, a rule that all others need, or no reason.
    """
    skip = skip or {}
    refuse_unknown(skip)
    subject, verdict = Subject(make, **how), {}
    for rule, check in CHECKS.items():
        if rule in skip:
            verdict[rule] = f"left out: {skip[rule]}"
            continue
        try:
            check(subject)
        except NotApplicable as reason:
            verdict[rule] = f"does not apply: {reason}"
        else:
            verdict[rule] = "holds"
    return verdict


class EnvContract:
    """Tests to inherit: `test_<rule>` for every rule of `CHECKS`, so that a failing one is named by what is broken.

    Example:
        In a file that pytest collects:

        >>> import gymnasium
        >>> class TestCartPole(EnvContract):
        ...     modes = (gymnasium.vector.AutoresetMode.NEXT_STEP,)
        ...     skip = {"mode_attribute": "has the metadata only", "seed_list": "takes one seed for the batch"}
        ...     def make_vector_env(self, num_envs, autoreset_mode):
        ...         return gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="vector_entry_point")
        >>> TestCartPole().test_next_step()
    """

    num_envs: int = 3
    """Rows."""
    steps: int = 60
    """Steps of every run; some episode must end within them."""
    seed: int = 0
    """Seed of resets and actions."""
    modes: tuple[AutoresetMode, ...] = tuple(AutoresetMode)
    """Autoreset modes that `make_vector_env` can give."""
    endings: tuple[str, ...] = ()
    """Endings known to occur within `steps`: `terminated`, `truncated`."""
    env_id: str | None = None
    """Registered id, for the round trip of the spec."""
    settings: Mapping[str, Any] = {}
    """Keyword arguments of `gymnasium.make` for `env_id`."""
    skip: Mapping[str, str] = {}
    """Rules that the environment may break, each with the reason."""

    def make_vector_env(self, num_envs: int, autoreset_mode: AutoresetMode) -> VectorEnv[Any, Any, Any]:
        """A new vector environment."""
        raise NotImplementedError(f"{type(self).__name__} needs make_vector_env(num_envs, autoreset_mode)")

    def make_env(self) -> gymnasium.Env[Any, Any]:
        """A new single environment, of which the rows are copies; leave it out if there is none."""
        raise NotApplicable("no make_env")

    def make_torch_vector_env(self, num_envs: int, autoreset_mode: AutoresetMode) -> VectorEnv[Any, Any, Any]:
        """As `make_vector_env`, with tensors out; leave it out if there is none."""
        raise NotApplicable("no make_torch_vector_env")

    def subject(self) -> Subject:
        """What the checks get."""
        single: MakeSingle | None = self.make_env if type(self).make_env is not EnvContract.make_env else None
        own_torch = type(self).make_torch_vector_env is not EnvContract.make_torch_vector_env
        return Subject(
            self.make_vector_env,
            make_single=single,
            make_torch=self.make_torch_vector_env if own_torch else None,
            env_id=self.env_id,
            settings=self.settings,
            num_envs=self.num_envs,
            steps=self.steps,
            seed=self.seed,
            modes=self.modes,
            endings=self.endings,
        )

    def check(self, rule: str) -> None:
        """Checks one rule, unless `skip` leaves it out."""
        refuse_unknown(self.skip)
        if rule in self.skip:
            raise unittest.SkipTest(self.skip[rule])
        CHECKS[rule](self.subject())

    def test_single_env(self) -> None:
        """Gymnasium's `check_env` passes without a warning."""
        env = self.make_env()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(env.unwrapped, skip_render_check=True)


def _test_of(rule: str) -> Callable[[EnvContract], None]:
    def test(self: EnvContract) -> None:
        self.check(rule)

    test.__name__, test.__doc__ = f"test_{rule}", CHECKS[rule].__doc__
    return test


for _rule in CHECKS:
    setattr(EnvContract, f"test_{_rule}", _test_of(_rule))
