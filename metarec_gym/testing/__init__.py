"""A conformance kit for Gymnasium vector environments, ours and yours: `check_vector_env` and tests to inherit.

It needs gymnasium, numpy and torch, and knows nothing of recommenders::

    from metarec_gym.testing import EnvContract

    class TestMine(EnvContract):
        def make_vector_env(self, num_envs, autoreset_mode):
            return MyVectorEnv(num_envs, autoreset_mode=autoreset_mode)
"""

from metarec_gym.testing.contract import CHECKS, EnvContract, check_vector_env
from metarec_gym.testing.runs import BrokenRule, NotApplicable, Subject

__all__ = ["CHECKS", "BrokenRule", "EnvContract", "NotApplicable", "Subject", "check_vector_env"]
