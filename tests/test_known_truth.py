"""A world whose best strategy for every user is known by construction: what must learners and the evaluation say of it?"""

import pytest
import torch

from agents import ppo
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.evaluation.rollout import rollout
from metarec_gym.policy import FixedPolicy
from metarec_gym.world import World

OPTIMUM = 3 * 0.5
"""Three items a request, each taken with probability 0.5 when the strategy of the user's type serves."""


@pytest.fixture(scope="module")
def world() -> World:
    return World.synthetic(
        n_types=3,
        users_per_type=8,
        items_per_type=40,
        horizon=6,
        slate_size=3,
        history_lengths=(5, 10),
        leaving=None,
    )


def value(world: World, player) -> float:
    """Expected reward a request on the users of fold B."""
    played = rollout(world, "B", player, contexts=world.starts_of("B"), replicates=8, horizon=6, env_seed=1)
    return float(torch.as_tensor(played.expected).mean())


def test_ppo_trained_on_one_fold_reaches_95_percent_of_the_optimum_on_the_other(world):
    env = MetaRecVectorEnv(64, world=world, fold="A", output="torch", autoreset_mode="SameStep")
    trained = ppo.train(env, ppo.Args(total_steps=30_000, num_steps=12, minibatch_size=192), progress=False)
    reached = value(world, trained.policy)
    # a fixed strategy is right for one user in three: 3 x (0.5 + 0.1 + 0.1) / 3
    assert value(world, FixedPolicy(0)) == pytest.approx(0.7, abs=1e-5)
    assert reached >= 0.95 * OPTIMUM
    assert reached <= OPTIMUM + 1e-5


def test_rolling_out_the_right_specialist_for_every_user_gives_the_optimum_exactly(world):
    starts = world.starts_of("B")
    types = world.tensors["start_user"][starts] % 3

    class Truth(FixedPolicy):
        def action_probs(self, obs, action_mask):
            # the taste of a user with a history names the type: one-hot of the category
            return torch.nn.functional.one_hot(obs[:, :3].argmax(dim=1), action_mask.shape[1]).float()

    assert len(types.unique()) == 3
    assert value(world, Truth(0)) == pytest.approx(OPTIMUM, abs=1e-5)
