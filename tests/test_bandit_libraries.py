"""The same data in mabwiser and Vowpal Wabbit: equal means, bounds, posteriors and predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import bandits
from metarec_gym.seeding import numpy_rng

K, D, N = 4, 5, 60


def data(binary: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contexts (N, D), strategies (N,), rewards (N,)."""
    rng = numpy_rng(0, "libraries")
    obs = rng.uniform(-1, 1, size=(N, D)).astype(np.float32)
    action = np.concatenate([np.arange(K), rng.integers(0, K, N - K)])
    reward = (rng.normal(size=(K, D))[action] * obs).sum(axis=1) + 0.3 * rng.normal(size=N)
    return obs, action, (reward > 0).astype(np.float64) if binary else reward.astype(np.float64)


def taught(policy: Any, obs: np.ndarray, action: np.ndarray, reward: np.ndarray) -> Any:
    """One user's history."""
    policy.begin(1)
    for x, a, r in zip(obs, action, reward, strict=True):
        policy.observe(
            torch.from_numpy(x)[None],
            torch.tensor([int(a)]),
            torch.tensor([r], dtype=torch.float32),
            torch.tensor([True]),
        )
    return policy


def mab(policy: Any, contexts: np.ndarray | None, action: np.ndarray, reward: np.ndarray) -> Any:
    pytest.importorskip("mabwiser")
    from mabwiser.mab import MAB

    learner = MAB(arms=list(range(K)), learning_policy=policy, seed=0)
    if contexts is None:
        learner.fit(action, reward)
    else:
        learner.fit(action, reward, contexts)
    return learner


def test_epsilon_greedy_has_mabwisers_means() -> None:
    pytest.importorskip("mabwiser")
    from mabwiser.mab import LearningPolicy

    obs, action, reward = data()
    theirs = mab(LearningPolicy.EpsilonGreedy(epsilon=0.0), None, action, reward).predict_expectations()
    ours = taught(bandits.EpsilonGreedy(K, epsilon=0.0), obs, action, reward)._mean()[0]
    np.testing.assert_allclose(ours, [theirs[k] for k in range(K)], atol=1e-5)


def test_softmax_has_mabwisers_probabilities() -> None:
    pytest.importorskip("mabwiser")
    from mabwiser.mab import LearningPolicy

    obs, action, reward = data()
    learner = mab(LearningPolicy.Softmax(tau=0.7), None, action, reward)
    # predict_expectations returns a Dirichlet draw around them
    theirs = learner._imp.arm_to_expectation
    policy = taught(bandits.Softmax(K, temperature=0.7), obs, action, reward)
    ours = policy.action_probs(torch.zeros(1, D), torch.ones(1, K, dtype=torch.bool))[0]
    np.testing.assert_allclose(ours, [theirs[k] for k in range(K)], atol=1e-5)


def test_ucb1_has_mabwisers_bounds() -> None:
    pytest.importorskip("mabwiser")
    from mabwiser.mab import LearningPolicy

    obs, action, reward = data()
    theirs = mab(LearningPolicy.UCB1(alpha=1.25), None, action, reward).predict_expectations()
    # mabwiser: mean + alpha * sqrt(2 ln t / n)
    policy = taught(bandits.Ucb1(K, exploration=1.25 * 2.0**0.5), obs, action, reward)
    np.testing.assert_allclose(policy.bounds()[0], [theirs[k] for k in range(K)], atol=1e-5)


def test_beta_thompson_has_mabwisers_posterior() -> None:
    pytest.importorskip("mabwiser")
    from mabwiser.mab import LearningPolicy

    obs, action, reward = data(binary=True)
    learner = mab(LearningPolicy.ThompsonSampling(), None, action, reward)
    a, b = taught(bandits.BetaThompson(K, 0), obs, action, reward).posterior()
    assert a[0].tolist() == [learner._imp.arm_to_success_count[k] for k in range(K)]
    assert b[0].tolist() == [learner._imp.arm_to_fail_count[k] for k in range(K)]


def test_beta_thompson_chooses_as_often_as_mabwiser() -> None:
    pytest.importorskip("mabwiser")
    from mabwiser.mab import LearningPolicy

    obs, action, reward = data(binary=True)
    learner = mab(LearningPolicy.ThompsonSampling(), None, action, reward)
    draws = 2000
    counts = np.bincount([learner.predict() for _ in range(draws)], minlength=K) / draws
    policy = taught(bandits.BetaThompson(K, 0, draws=draws), obs, action, reward)
    ours = policy.action_probs(torch.zeros(1, D), torch.ones(1, K, dtype=torch.bool))[0]
    # two shares of 2,000 draws differ by at most 4 * sqrt(2 * 0.25 / 2000)
    np.testing.assert_allclose(ours, counts, atol=0.065)


def test_linucb_has_mabwisers_scores() -> None:
    pytest.importorskip("mabwiser")
    from mabwiser.mab import LearningPolicy

    obs, action, reward = data()
    with_one = np.concatenate([obs, np.ones((N, 1))], axis=1)
    learner = mab(LearningPolicy.LinUCB(alpha=0.8, l2_lambda=1.5), with_one, action, reward)
    theirs = learner.predict_expectations(with_one[:7])
    policy = taught(bandits.LinUcb(K, D, alpha=0.8, ridge=1.5, online=True), obs, action, reward)
    probe = torch.from_numpy(obs[:7])
    ours = policy.expected(probe) + 0.8 * policy.deviation(probe)
    np.testing.assert_allclose(ours, [[row[k] for k in range(K)] for row in theirs], atol=1e-4)


def test_lints_has_mabwisers_posterior() -> None:
    pytest.importorskip("mabwiser")
    from mabwiser.mab import LearningPolicy

    obs, action, reward = data()
    with_one = np.concatenate([obs, np.ones((N, 1))], axis=1)
    learner = mab(LearningPolicy.LinTS(alpha=0.8, l2_lambda=1.5), with_one, action, reward)
    policy = taught(bandits.LinTs(K, D, alpha=0.8, ridge=1.5, online=True), obs, action, reward)
    for k in range(K):
        model = learner._imp.arm_to_model[k]
        np.testing.assert_allclose(policy._weights[k], model.beta, atol=1e-5)
        np.testing.assert_allclose(torch.linalg.inv(policy.gram[k]), model.A_inv, atol=1e-5)


def test_the_linear_model_predicts_what_vowpal_wabbits_ridge_regression_predicts(tmp_path: Path) -> None:
    vw = pytest.importorskip("vowpalwabbit")
    obs, action, reward = data()
    # Vowpal Wabbit minimises sum (y - w'x)^2 + l2 / 2 ||w||^2: a ridge of l2 / 2
    policy = taught(bandits.LinUcb(K, D, ridge=1.5, online=True), obs, action, reward)
    texts = ["| " + " ".join(f"f{j}:{x}" for j, x in enumerate(row)) + " one:1" for row in obs]
    for k in (0, 1):
        table, model = tmp_path / f"{k}.txt", tmp_path / f"{k}.vw"
        table.write_text("".join(f"{reward[i]} {texts[i]}\n" for i in np.flatnonzero(action == k)))
        vw.Workspace(
            f"-d {table} --bfgs --passes 50 --termination 0 --l2 3.0 --noconstant --holdout_off -k --quiet "
            f"--cache_file {tmp_path / 'cache'} --predict_only_model -f {model}"
        ).finish()
        reader = vw.Workspace(f"-i {model} -t --predict_only_model --quiet")
        theirs = [reader.predict(text) for text in texts]
        reader.finish()
        # it clips predictions to the rewards it has seen
        seen = reward[action == k]
        ours = policy.expected(torch.from_numpy(obs))[:, k].clamp(seen.min(), seen.max())
        # BFGS stops near the minimum, predictions have a spread of about 1
        np.testing.assert_allclose(ours, theirs, atol=3e-3)


def test_softmax_explores_as_vowpal_wabbit_does() -> None:
    vw = pytest.importorskip("vowpalwabbit")
    worth = [0.1, 0.5, 0.9, 0.3]
    space = vw.Workspace(
        "--cb_explore_adf --softmax --lambda 2.5 --cb_type mtr --noconstant --power_t 0 -l 0.5 --quiet"
    )

    def request(chosen: int | None = None) -> list[str]:
        # action:cost:probability before what was chosen; a cost is a reward with the other sign
        label = {chosen: f"0:{-worth[chosen]}:0.25 "} if chosen is not None else {}
        return [f"{label.get(k, '')}| strategy{k}" for k in range(K)]

    pairs = [(i % K, worth[i % K]) for i in range(400)]
    for k, _ in pairs:
        space.learn(request(k))
    theirs = space.predict(request())
    space.finish()
    policy = taught(
        bandits.Softmax(K, temperature=1 / 2.5),
        np.zeros((400, D), dtype=np.float32),
        *map(np.array, zip(*pairs, strict=True)),
    )
    ours = policy.action_probs(torch.zeros(1, D), torch.ones(1, K, dtype=torch.bool))[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
