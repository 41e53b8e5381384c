"""Gymnasium environments in which an action chooses a recommendation strategy, simulated from a log of real users.

Importing the package registers the environment ids and nothing more: torch is loaded when an environment is made.
"""

from metarec_gym.envs.registration import register_envs

__version__ = "0.1.0"

register_envs()
