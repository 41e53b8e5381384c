"""Proximal policy optimisation: rollout, advantages and update stay on the environment's device.

It follows Stable-Baselines3's PPO (same losses, same tags in TensorBoard) with four differences on purpose: the
learning rate falls from its full value and never below zero; action masks are honoured; `train/*` is logged with the
rollout it belongs to, not one iteration later; and a run can be killed and resumed, bit for bit on CPU. `Args` has a switch
wherever implementations differ.

    python -m agents.ppo --env-id MetaRec/Select-v0 --world worlds/movielens_100k --seed 0 --run-dir runs/ppo_0
    torchrun --nproc-per-node 2 -m agents.ppo --backend gloo --world worlds/movielens_100k

Read `args`, `heads` (actions), `networks`, `rollout`, `learning` (advantages, losses, update) and `training` in this order;
`normalise`, `judges`, `team` (several processes), `imitation` (an actor to begin with), `captured` (rollouts compiled or in a
CUDA graph) and `captured_update` (learning in one) are options.
"""

from agents.ppo.args import Args, TrainResult
from agents.ppo.heads import Choice, Choices, Weights, action_mask, head_of
from agents.ppo.imitation import imitate
from agents.ppo.judges import JudgesEnv, with_judges
from agents.ppo.learning import Batch, Sequences, advantages_of, losses_of, make_batch, update, values_of
from agents.ppo.networks import ActorCritic, export_policy
from agents.ppo.normalise import Normaliser
from agents.ppo.rollout import Live, Rollout, collect
from agents.ppo.team import SOLO, Team, join_team
from agents.ppo.training import Training, learn_ppo, learn_ppo_gru, train

__all__ = [
    "SOLO",
    "ActorCritic",
    "Args",
    "Batch",
    "Choice",
    "Choices",
    "JudgesEnv",
    "Live",
    "Normaliser",
    "Rollout",
    "Sequences",
    "Team",
    "TrainResult",
    "Training",
    "Weights",
    "action_mask",
    "advantages_of",
    "collect",
    "export_policy",
    "head_of",
    "imitate",
    "join_team",
    "learn_ppo",
    "learn_ppo_gru",
    "losses_of",
    "make_batch",
    "train",
    "update",
    "values_of",
    "with_judges",
]
