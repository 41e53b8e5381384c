"""One update of ours equals one update of Stable-Baselines3 on the same weights, batch and permutations.

P3: Discrete (with every option), MultiDiscrete, Box. P5: masked, against MaskablePPO of sb3-contrib, Discrete and MultiDiscrete.
P1: advantages against SB3's buffer. Running normalisation against VecNormalize. P9: planted errors break the parity.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from agents import ppo
from metarec_gym.seeding import torch_generator

STEPS, ENVS, SEED = 64, 4, 11


@pytest.fixture(autouse=True)
def _sb3_uses_global_generators() -> Iterator[None]:
    # SB3 seeds and draws from the process-wide generators; they are put back, so no other test can notice
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    random.setstate(saved[0])
    np.random.set_state(saved[1])  # noqa: NPY002
    torch.set_rng_state(saved[2])


def _collect(model: PPO, callback: Any) -> None:
    # MaskablePPO leaves out the masks unless it is told to use them, as `learn` does
    masked = {"use_masking": True} if hasattr(model.rollout_buffer, "action_masks") else {}
    model.collect_rollouts(model.env, callback, model.rollout_buffer, STEPS, **masked)


class Recorder(Logger):
    """Keeps what SB3 logs."""

    def __init__(self) -> None:
        super().__init__(folder=None, output_formats=[])


class Guess(gym.Env[Any, Any]):
    """Random observations; a reward for actions near one that the observation hides. Some actions are forbidden at times."""

    def __init__(self, space: gym.Space[Any]) -> None:
        self.observation_space, self.action_space = gym.spaces.Box(-1, 1, (4,), np.float32), space
        self.rng, self.clock = np.random.default_rng(0), 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.clock, self.obs = 0, self.rng.uniform(-1, 1, 4).astype(np.float32)
        return self.obs, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(np.cos(np.sum(action) - self.obs[0]))
        self.clock, self.obs = self.clock + 1, self.rng.uniform(-1, 1, 4).astype(np.float32)
        return self.obs, reward, self.clock >= 9, False, {}

    def action_masks(self) -> np.ndarray:
        width = int(self.action_space.n if isinstance(self.action_space, gym.spaces.Discrete) else 6)
        mask = np.ones(width, dtype=bool)
        mask[int(4 * abs(self.obs[1])) % 3] = False
        return mask


def sb3_model(algorithm: Any = PPO, space: gym.Space[Any] | None = None, **settings: Any) -> PPO:
    make = (lambda: gym.make("CartPole-v1")) if space is None else (lambda: Guess(space))
    env = DummyVecEnv([make for _ in range(ENVS)])
    model = algorithm("MlpPolicy", env, n_steps=STEPS, seed=SEED, device="cpu", **settings)
    model.set_logger(Recorder())
    # moves away from the symmetric start, so that the second rollout has advantages and ratios worth comparing
    _, callback = model._setup_learn(10_000, None)
    _collect(model, callback)
    model.train()
    _collect(model, callback)
    return model


def ours_of(model: PPO) -> tuple[ppo.ActorCritic, torch.optim.Optimizer]:
    """Our network and optimiser in the state of the model's."""
    net = ppo.ActorCritic(4, ppo.head_of(model.action_space), ppo.Args(), torch_generator(0))
    pairs = [*parameter_pairs(net, model)]
    optimizer = torch.optim.Adam(net.parameters(), lr=model.learning_rate, eps=1e-5, fused=True)
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs)
            state = model.policy.optimizer.state[theirs]
            optimizer.state[mine] = {name: tensor.clone() for name, tensor in state.items()}
    return net, optimizer


def parameter_pairs(net: ppo.ActorCritic, model: PPO) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    if isinstance(net.head, ppo.Weights):
        yield net.head.log_std, model.policy.log_std
    extractor = model.policy.mlp_extractor
    actor = [*extractor.policy_net, model.policy.action_net]
    critic = [*extractor.value_net, model.policy.value_net]
    for mine, theirs in zip([*net.actor, *net.critic], [*actor, *critic], strict=True):
        if isinstance(mine, torch.nn.Linear):
            yield mine.weight, theirs.weight
            yield mine.bias, theirs.bias


def flat_batch(model: PPO) -> ppo.Batch:
    buffer = model.rollout_buffer

    def flat(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(buffer.swap_and_flatten(array)).squeeze(-1)

    masks, actions = getattr(buffer, "action_masks", None), flat(buffer.actions)
    return ppo.Batch(
        obs=torch.from_numpy(buffer.swap_and_flatten(buffer.observations)),
        mask=None if masks is None else flat(masks).bool(),
        action=actions if isinstance(model.action_space, gym.spaces.Box) else actions.long(),
        log_prob=flat(buffer.log_probs),
        value=flat(buffer.values),
        advantage=flat(buffer.advantages),
        returns=flat(buffer.returns),
    )


CONFIGS = {
    "defaults": {},
    "value clipping": {"clip_range_vf": 0.2},
    "entropy bonus": {"ent_coef": 0.02},
    "raw advantages": {"normalize_advantage": False},
    "hard gradient clipping": {"max_grad_norm": 0.01},
    "no gradient clipping": {"max_grad_norm": 1e9},
    "tripped target_kl": {"target_kl": 1e-3, "learning_rate": 3e-3},
    "uneven minibatches": {"batch_size": 100},
}


def compare(
    settings: dict[str, Any], algorithm: Any = PPO, space: gym.Space[Any] | None = None
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Largest parameter difference after one update, and both sides of every logged scalar."""
    settings = {"batch_size": 64, "n_epochs": 4, "learning_rate": 1e-3, **settings}
    model = sb3_model(algorithm, space, **settings)
    net, optimizer = ours_of(model)
    batch = flat_batch(model)
    args = ppo.Args(
        minibatch_size=settings["batch_size"],
        normalize_advantage=settings.get("normalize_advantage", True),
        clip_range_vf=settings.get("clip_range_vf"),
        ent_coef=settings.get("ent_coef", 0.0),
        max_grad_norm=settings.get("max_grad_norm", 0.5),
        target_kl=settings.get("target_kl"),
    )
    np.random.seed(SEED)  # noqa: NPY002 (SB3 shuffles with it)
    orders = [torch.from_numpy(np.random.permutation(STEPS * ENVS)) for _ in range(4)]  # noqa: NPY002
    scalars = ppo.update(net, optimizer, batch, args, orders)
    np.random.seed(SEED)  # noqa: NPY002
    model.train()
    logged = model.logger.name_to_value
    difference = max(float((a - b).detach().abs().max()) for a, b in parameter_pairs(net, model))
    return difference, {tag: (float(number), float(logged[tag])) for tag, number in scalars.items()}


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("name", CONFIGS)
def test_one_update_equals_stable_baselines3(name: str) -> None:
    difference, scalars = compare(CONFIGS[name])
    assert difference <= 1e-6
    for tag, (mine, theirs) in scalars.items():
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6), tag


SPACES = {
    "slots": gym.spaces.MultiDiscrete([3, 3]),
    "blend": gym.spaces.Box(-1.0, 1.0, (3,)),
    "select": gym.spaces.Discrete(6),
}


@pytest.mark.parametrize("name", ["slots", "blend"])
def test_one_update_of_slots_and_blends_equals_stable_baselines3(name: str) -> None:
    difference, scalars = compare({"ent_coef": 0.02}, space=SPACES[name])
    assert difference <= 1e-6
    for tag, (mine, theirs) in scalars.items():
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6), tag


@pytest.mark.parametrize("name", ["select", "slots"])
def test_one_masked_update_equals_sb3_contrib(name: str) -> None:
    contrib = pytest.importorskip("sb3_contrib")
    difference, scalars = compare({"ent_coef": 0.02}, contrib.MaskablePPO, SPACES[name])
    assert difference <= 1e-6
    for tag, (mine, theirs) in scalars.items():
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6), tag


def test_the_masks_of_the_masked_parity_forbid_something() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    batch = flat_batch(sb3_model(contrib.MaskablePPO, SPACES["select"], batch_size=64, n_epochs=1))
    assert batch.mask is not None
    assert 0.1 < float((~batch.mask).float().mean()) < 0.2  # one of six
    assert bool(batch.mask.gather(1, batch.action[:, None]).all())


def test_running_normalisation_equals_vec_normalize() -> None:
    inner = DummyVecEnv([lambda: Guess(SPACES["select"]) for _ in range(ENVS)])
    theirs = VecNormalize(inner, clip_obs=1.5, clip_reward=2.0, gamma=0.9)
    theirs.seed(5)
    mine = ppo.Normaliser(4, obs=True, reward=True, clip_obs=1.5, clip_reward=2.0, gamma=0.9)
    expected = theirs.reset()
    got = mine.observation(torch.from_numpy(theirs.get_original_obs()))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)
    discounted, everyone = torch.zeros(ENVS), torch.ones(ENVS, dtype=torch.bool)
    for step in range(25):
        expected, reward, done, infos = theirs.step(np.full(ENVS, step % 6))
        got = mine.observation(torch.from_numpy(theirs.get_original_obs()))
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)
        raw = torch.from_numpy(theirs.get_original_reward()).float()
        discounted, scaled = mine.rewarded(discounted, raw, everyone, torch.from_numpy(done))
        np.testing.assert_allclose(scaled.numpy(), reward, atol=2e-6)
        for row in np.flatnonzero(done):
            # SB3 normalises the last observation by the statistics after the step
            last = torch.from_numpy(theirs.unnormalize_obs(infos[row]["terminal_observation"])).float()
            assert bool((mine.observation(last[None], learn=False).abs() <= 1.5).all())


def test_the_tripped_target_kl_really_ends_the_update_early() -> None:
    model = sb3_model(batch_size=64, n_epochs=4, learning_rate=3e-3, target_kl=1e-3)
    before = model._n_updates
    model.train()
    assert model._n_updates - before < 4


def test_our_advantages_equal_those_of_the_rollout_buffer() -> None:
    model = sb3_model(batch_size=64, n_epochs=1)
    buffer = model.rollout_buffer
    with torch.no_grad():
        last = model.policy.predict_values(torch.as_tensor(model._last_obs))[:, 0]
    starts = torch.from_numpy(buffer.episode_starts).bool()
    done = torch.cat([starts[1:], torch.as_tensor(model._last_episode_starts)[None].bool()])
    value = torch.from_numpy(buffer.values)
    # SB3 adds the bootstrap of a truncation to the reward, so both kinds of end are terminations here
    mine = ppo.advantages_of(
        torch.from_numpy(buffer.rewards), value, torch.cat([value[1:], last[None]]), done, done, 0.99, 0.95
    )  # fmt: skip
    np.testing.assert_allclose(mine.numpy(), buffer.advantages, atol=1e-5)


def _flip_advantage(batch: ppo.Batch) -> ppo.Batch:
    batch.advantage = -batch.advantage
    return batch


def _stale_log_probs(batch: ppo.Batch) -> ppo.Batch:
    batch.log_prob = batch.log_prob + 0.1
    return batch


def _unclipped_value_targets(batch: ppo.Batch) -> ppo.Batch:
    batch.returns = batch.advantage
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [_flip_advantage, _stale_log_probs, _unclipped_value_targets])
def test_a_planted_error_in_the_batch_breaks_the_parity(
    mutate: Callable[[ppo.Batch], ppo.Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    true_batch = flat_batch
    monkeypatch.setattr("tests.test_ppo_parity.flat_batch", lambda model: mutate(true_batch(model)))
    difference, _ = compare({})
    assert difference > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"vf_coef": 0.25}, {"clip_range": 0.05}, {"normalize_advantage": False}])
def test_a_planted_error_in_a_loss_term_breaks_the_parity(
    setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    true_args = ppo.Args
    monkeypatch.setattr(ppo, "Args", lambda **kwargs: true_args(**{**kwargs, **setting}))
    difference, _ = compare({})
    assert difference > 1e-5
