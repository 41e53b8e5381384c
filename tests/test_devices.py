"""Everything that takes a device keeps its tensors there, shown on a pretended one; CUDA itself is asked by the `gpu` tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.ppo import Args, train
from agents.roster import ROSTER, Lesson
from metarec_gym.data import FOLD_A, FOLD_B, FOLD_S, Dataset, encode, synthetic_log
from metarec_gym.devices import device_of
from metarec_gym.envs import MetaRecVectorEnv, ReplayVectorEnv
from metarec_gym.envs.tune import TuneVectorEnv
from metarec_gym.policy import GruPolicy, MlpPolicy, load_policy
from metarec_gym.policy_lstm import LstmPolicy
from metarec_gym.recommenders import Pool
from metarec_gym.recommenders.sequential import SasRec
from metarec_gym.response.config import SECOND_FAMILY, ResponseConfig
from metarec_gym.response.fitting import fit_response, fit_variant
from metarec_gym.world import World
from tests.pretend_device import RAN, FarTensor, pretend_device

QUICK = ResponseConfig(
    dim=8,
    taste_dim=8,
    hidden=16,
    rank=4,
    negatives=32,
    batch_size=256,
    max_epochs=1,
    inner_folds=2,
    effect_negatives=8,
    effect_rounds=1,
)
FEW_STEPS = 6
SHORT_POOL = ("popular", "ease", SasRec("sasrec", width=16, steps=6))


@pytest.fixture
def device() -> Iterator[str]:
    with pretend_device() as name:
        yield name


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return encode(synthetic_log(0, n_users=90, n_items=80, events_per_user=(6, 20))[0], seed=0)


@pytest.fixture(scope="module")
def shown(dataset: Dataset) -> Dataset:
    """The same events with slates, places, and items that were shown and not taken."""
    generator = torch.Generator().manual_seed(0)
    taken = torch.rand(dataset.outcome.shape[0], generator=generator) < 0.4
    place = torch.randint(5, (len(taken),), generator=generator)
    return replace(dataset, outcome=dataset.outcome * taken[:, None], has_impressions=True, position=place)


# ------------------------------------------------------------------------------------------------ the pretence
def test_a_tensor_left_on_the_cpu_is_noticed(device):
    table, rows = torch.ones(4, 2), torch.tensor([1, 2], device=device)
    assert rows.device.type == device
    assert isinstance(rows, FarTensor)
    for wrong in (
        lambda: table[rows],
        lambda: rows + torch.ones(2, dtype=torch.int64),
        lambda: torch.nn.functional.embedding(rows, table),
        lambda: torch.cat([rows, torch.zeros(1, dtype=torch.int64)]),
    ):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            wrong()
    with pytest.raises(RuntimeError, match="numpy"):
        rows.numpy()


def test_what_cuda_allows_in_an_index_or_an_elementwise_operation_is_not_allowed_elsewhere(device):
    far, one, here = torch.arange(4, device=device), torch.tensor(1, device=device), torch.tensor(1)

    def written():
        far[torch.tensor([0, 1], device=device)] = torch.tensor([5, 6])

    def added():
        nonlocal here
        here += one

    for wrong in (written, added, lambda: torch.stack([one, here]), lambda: torch.index_select(far, 0, here)):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            wrong()


def test_a_number_an_index_of_the_cpu_and_a_move_are_allowed_as_on_cuda(device):
    far = torch.arange(4.0, device=device)
    assert (far * torch.tensor(2.0)).tolist() == [0.0, 2.0, 4.0, 6.0]
    assert far[torch.tensor([3, 0])].tolist() == [3.0, 0.0]
    assert far[[1]].tolist() == [1.0]
    far[1:3] = 7.0
    far += 1.0
    assert far.cpu().numpy().tolist() == [1.0, 8.0, 8.0, 4.0]
    assert torch.empty(4, device=device).copy_(torch.ones(4)).sum().item() == 4.0


def test_a_draw_needs_a_generator_of_its_device(device):
    with pytest.raises(RuntimeError, match="generator is on another device"):
        torch.rand(3, generator=torch.Generator(), device=device)
    with pytest.raises(RuntimeError, match="generator is on another device"):
        torch.rand(3, generator=torch.Generator(device))
    drawn = torch.rand(3, generator=torch.Generator(device).manual_seed(1), device=device)
    assert torch.equal(drawn.cpu(), torch.rand(3, generator=torch.Generator().manual_seed(1)))


def test_a_comparison_compares_numbers(device):
    torch.testing.assert_close(torch.ones(2, device=device), torch.ones(2, device=device))
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(torch.ones(2, device=device), torch.zeros(2, device=device))


def test_gradients_flow_on_the_pretended_device(device):
    weight = torch.ones(2, device=device).requires_grad_()
    (weight * torch.arange(2.0, device=device)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 1.0]


# ------------------------------------------------------------------------------------------------ words
def test_auto_is_the_cpu_where_there_is_no_gpu_and_cuda_is_refused_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == "cpu"
    with pytest.raises(ValueError, match=r"'cuda' was asked for .* use --device cpu, or --device auto"):
        device_of("cuda")
    with pytest.raises(ValueError, match="'gpu' is none that torch knows"):
        device_of("gpu")
    assert device_of("cpu:0") == "cpu"
    for word in ("mps", "xpu", "meta"):
        with pytest.raises(ValueError, match=f"'{word}' cannot hold float64"):
            device_of(word)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(word) for word in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match=r"'cuda:2' was asked for .* 2 GPUs"):
        device_of("cuda:2")


# ------------------------------------------------------------------------------------------------ environments
def played(env: Any, seed: int = 0) -> list[Tensor]:
    """Observations, rewards and masks of some steps, on the CPU."""
    env.action_space.seed(seed)
    obs, infos = env.reset(seed=seed)
    out = [obs]
    for _ in range(FEW_STEPS):
        action = env.action_space.sample()
        if env.output == "torch":
            action = torch.as_tensor(action).to(env.device)
        obs, reward, terminated, truncated, infos = env.step(action)
        out += [obs, reward, terminated, truncated]
        out += [infos["action_mask"]] if "action_mask" in infos else []
    return [torch.as_tensor(x).cpu() for x in out]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("output", ["numpy", "torch"])
@pytest.mark.parametrize(
    "settings",
    [
        {"action": "select"},
        {"action": "select", "autoreset_mode": "SameStep", "cost_weight": 0.1},
        {"action": "blend"},
        {"action": "slots"},
        {"action": "select", "session_requests": 3},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_environments_step_on_another_device(device, leaving_world, settings, output):
    here, there = (
        MetaRecVectorEnv(12, leaving_world, fold="A", output=output, device=d, **settings) for d in ("cpu", device)
    )
    expected = played(here)
    RAN.clear()
    assert_same(expected, played(there))
    assert RAN["gather"] + RAN["index"] > FEW_STEPS


def test_replay_and_tuning_step_on_another_device(device):
    for make in (
        lambda d: ReplayVectorEnv(5, horizon=4, output="torch", device=d),
        lambda d: TuneVectorEnv(4, output="torch", device=d),
    ):
        expected = played(make("cpu"))
        RAN.clear()
        assert_same(expected, played(make(device)))
        assert RAN["gather"] + RAN["index"] + RAN["index_select"] > 0


# ------------------------------------------------------------------------------------------------ agents
def test_a_loaded_policy_follows_the_observations(device, leaving_world, tmp_path):
    env = MetaRecVectorEnv(4, leaving_world, output="torch", autoreset_mode="SameStep")
    for recurrent in (False, True):
        trained = train(env, Args(total_steps=64, num_steps=8, recurrent=recurrent), progress=False).policy
        path = trained.save(tmp_path / f"{recurrent}.safetensors")
        obs, mask = torch.rand(3, env.single_observation_space.shape[0]), torch.ones(3, 3, dtype=torch.bool)
        answers = []
        for where in ("cpu", device):
            policy = load_policy(path)
            policy.begin(3, where)
            answers.append(policy.action_probs(obs.to(where), mask.to(where)).cpu())
            assert len(policy.choose(obs.to(where))) == 3
        assert torch.equal(*answers)


def test_a_policy_made_of_another_devices_layers_is_on_one_device(device):
    layers = [(torch.ones(2, 3, device=device), torch.zeros(2, device=device))]
    policy = MlpPolicy(layers, ("a", "b"), obs_scale=torch.full((3,), 2.0))
    assert {tensor.device.type for tensor in policy._tensors().values()} == {device}
    for where in (device, "cpu", device):
        probs = policy.action_probs(torch.ones(1, 3, device=where), torch.ones(1, 2, dtype=torch.bool, device=where))
        assert probs.cpu().tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_memory_follows_the_observations_too(device, kind):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    gates, width = (3, 3 + 4) if kind == "gru" else (4, 4)
    memory = drawn(gates * 4, 3), drawn(gates * 4, 4), drawn(gates * 4), drawn(gates * 4)
    layers = [(drawn(2, width), drawn(2))]
    obs, mask = drawn(5, 3), torch.ones(5, 2, dtype=torch.bool)
    answers = []
    for order in (("cpu", "cpu"), (device, device), ("cpu", device), (device, "cpu")):
        policy = (GruPolicy if kind == "gru" else LstmPolicy)(memory, layers, ("a", "b"))
        # it begins where it is told, and is asked where the observations are
        policy.begin(5)
        for where in order:
            seen = obs.to(where), torch.zeros(5, device=where), torch.zeros(5, device=where)
            policy.observe(*seen, torch.ones(5, dtype=torch.bool, device=where))
            probs = policy.action_probs(obs.to(where), mask.to(where))
        answers.append(probs.cpu())
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0])


LEARNERS = {
    "plain": ("select", {}),
    "blend": ("blend", {}),
    "slots": ("slots", {}),
    "memory": ("select", {"recurrent": True, "rnn_size": 8}),
    "normalised": ("select", {"normalize_obs": True, "normalize_reward": True, "target_kl": 0.02}),
}


@pytest.mark.parametrize(("action", "settings"), LEARNERS.values(), ids=LEARNERS)
def test_ppo_learns_on_another_device(device, leaving_world, action, settings):
    def learnt(where: str) -> MlpPolicy:
        env = MetaRecVectorEnv(8, leaving_world, output="torch", autoreset_mode="SameStep", action=action, device=where)
        args = Args(total_steps=256, num_steps=8, minibatch_size=32, epochs=2, **settings)
        policy: MlpPolicy = train(env, args, progress=False).policy
        return policy

    near = learnt("cpu")
    RAN.clear()
    far = learnt(device)
    assert all(RAN[name] > 0 for name in ("tanh_backward", "index", "mm"))
    for (w, b), (far_w, far_b) in zip(near.layers, far.layers, strict=True):
        # a linear layer is other kernels on tensors that are wrapped: the last bits differ
        torch.testing.assert_close(far_w.cpu(), w, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(far_b.cpu(), b, rtol=1e-3, atol=1e-4)


def value_of(name: str, world: World, device: str, requests: int) -> list[float]:
    """What the agent earns on the fold's users after it learnt and plays there."""
    from metarec_gym.evaluation.rollout import pick_contexts, rollout

    lesson = Lesson.of(world, "A", seed=0, requests=requests, horizon=world.horizon, device=device)
    player = ROSTER[name].learn(lesson)
    contexts = pick_contexts(world, "B", per_user=1, seed=0)
    result = rollout(
        world, "B", player, contexts=contexts, replicates=2, horizon=world.horizon, env_seed=0, device=device
    )
    return [float(x) for x in np.asarray(result.reward).sum(axis=-1).flatten()]


FEW = ("ga", "thompson", "lints", "hybrid_linucb", "neural_linear", "population_thompson", "knn_router")


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ROSTER]
)
def test_agents_learn_and_play_on_another_device(device, leaving_world, name):
    if ROSTER[name].missing():
        pytest.skip(f"needs {ROSTER[name].missing()}")
    requests = 9_000 if name == "fixed_hybrid" else 2_500
    assert value_of(name, leaving_world, "cpu", requests) == value_of(name, leaving_world, device, requests)


@pytest.mark.slow
def test_a_comparison_runs_on_another_device_and_says_the_same(device, leaving_world, tmp_path):
    from experiments.compare import Args as CompareArgs
    from experiments.compare import run
    from metarec_gym.evaluation.headroom import EvalSettings

    leaving_world.save(tmp_path / "world")
    settings = {"world": tmp_path / "world", "agents": ("thompson",), "seeds": 1, "steps": 2_000, "workers": 1}
    settings |= {"quiet": True, "evaluation": EvalSettings(replicates=2)}
    here, there = (run(CompareArgs(**settings, device=w, runs=tmp_path / w)) for w in ("cpu", device))
    assert here.verdict == there.verdict
    assert [(row.name, row.value) for row in here.rows] == [(row.name, row.value) for row in there.rows]


# ------------------------------------------------------------------------------------------------ fits
def test_strategies_are_fitted_on_another_device(device, dataset):
    users = dataset.users_in(FOLD_S)
    here, there = (
        Pool.fit(dataset, users, seed=0, names=[*SHORT_POOL, "als"], device=where) for where in ("cpu", device)
    )
    assert there.device.type == "cpu"
    # EASE and SASRec were computed there, not moved there
    assert all(RAN[name] > 0 for name in ("linalg_cholesky_ex", "cholesky_inverse", "embedding_dense_backward"))
    for one, other in zip(here, there, strict=True):
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), (one.name, key)


@pytest.mark.parametrize("family", ["network", "mixed_logit"])
@pytest.mark.parametrize("log", ["positives", "impressions"])
def test_judges_are_fitted_on_another_device(device, dataset, shown, log, family):
    data = dataset if log == "positives" else shown
    quick = {name: getattr(QUICK, name) for name in ("max_epochs", "inner_folds", "effect_negatives", "effect_rounds")}
    config = QUICK if family == "network" else replace(SECOND_FAMILY, dim=8, **quick)
    users, others = data.users_in(FOLD_A), data.users_in(FOLD_B)
    judges = [
        fit_response(data, users, seed=1, config=config, heldout_users=others, device=where)
        for where in ("cpu", device)
    ]
    assert judges[0][0].hash == judges[1][0].hash
    # gradient steps and the users' random effects
    assert all(RAN[name] > 0 for name in ("_foreach_addcdiv_", "embedding_dense_backward", "_linalg_solve_ex"))
    held = [metrics["outcomes"][data.outcomes[0]]["heldout"] for _, metrics in judges]
    assert held[0] == held[1]


def test_a_variant_of_a_judge_is_fitted_on_another_device(device, dataset):
    users = dataset.users_in(FOLD_A)
    base = fit_response(dataset, users, seed=1, config=QUICK)
    config = replace(QUICK, sampler="uniform")
    here, there = (fit_variant(dataset, users, *base, seed=1, config=config, device=w)[0] for w in ("cpu", device))
    assert here.hash == there.hash
    assert RAN["_foreach_addcdiv_"] > 0


def test_a_world_is_built_on_another_device(device):
    log = synthetic_log(0, n_users=60, n_items=100, events_per_user=(6, 20))[0]
    settings = {"pool": SHORT_POOL, "progress": False, "replicas": 0, "response_config": QUICK, "members": 1}
    here = World.build(log, **settings, variants=False)
    RAN.clear()
    there = World.build(log, **settings, variants=False, device=device)
    assert here.hash == there.hash
    assert (here.metrics["device"], there.metrics["device"]) == ("cpu", device)
    # fits of strategies and judges, and the ranking of lists
    assert all(RAN[name] > 0 for name in ("cholesky_inverse", "gelu_backward", "_foreach_addcdiv_", "topk"))


def test_a_world_is_not_built_on_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' was asked for"):
        World.build(synthetic_log(0, n_users=60, n_items=100)[0], device="cuda")


@pytest.mark.gpu
def test_cuda_fits_strategies_and_judges_that_predict_as_well_as_the_cpus(dataset):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    users, others = dataset.users_in(FOLD_A), dataset.users_in(FOLD_B)
    losses = []
    for device in ("cpu", "cuda"):
        _, metrics = fit_response(dataset, users, seed=1, config=QUICK, heldout_users=others, device=device)
        losses.append(metrics["outcomes"][dataset.outcomes[0]]["heldout"]["log_loss"]["judge"])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    s, histories = dataset.users_in(FOLD_S), dataset.histories(others, torch.full_like(others, 5))
    here, there = (Pool.fit(dataset, s, seed=0, names=("ease", "sasrec"), device=d) for d in ("cpu", "cuda"))
    torch.testing.assert_close(here["ease"].weight, there["ease"].weight, rtol=1e-4, atol=1e-6)
    lists = [pool.top_lists(histories, 10)[:, 1] for pool in (here, there)]
    shared = (lists[0][:, :, None] == lists[1][:, None, :]).any(dim=2).to(torch.float32).mean()
    # rounding grows over the training steps: the lists are those of one model, not of another
    assert float(shared) > 0.8
