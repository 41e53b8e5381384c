"""Bandits that share what they learn: equations worked by hand, late feedback, files, and worlds whose best strategy is known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from agents import bandits
from agents.race import race
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.seeding import torch_generator
from metarec_gym.world import World
from tests.test_bandits import ALL, OBS, SHARED, K, UserTypes, every_policy, feed, play

ON = torch.tensor([True])


def lesson_of(world: World, requests: int = 4000, seed: int = 0, **settings: Any) -> Any:
    def make_env(num_envs: int, **more: Any) -> MetaRecVectorEnv:
        return MetaRecVectorEnv(
            num_envs, world=world, fold="A", output="torch", autoreset_mode="SameStep", **settings, **more
        )

    return SimpleNamespace(
        world=world,
        fold="A",
        seed=seed,
        requests=requests,
        horizon=settings.get("horizon", world.horizon),
        make_env=make_env,
    )


def history(rows: int, requests: int, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """(obs, action, reward, alive) of each request."""
    g = torch_generator(seed, "history")
    return [
        (
            torch.rand(rows, 3 + K, generator=g),
            torch.randint(0, K, (rows,), generator=g),
            torch.rand(rows, generator=g),
            torch.rand(rows, generator=g) < 0.9,
        )
        for _ in range(requests)
    ]


# ---- choices worked by hand


def test_softmax_probabilities_are_exponential_in_the_means() -> None:
    policy = feed(bandits.Softmax(K, temperature=0.5), [(0, 1.0), (0, 0.0), (1, 1.0)])
    # means 0.5, 1, 0, 0 over temperature 0.5: exp(1), exp(2), 1, 1
    weights = torch.tensor([math.e, math.e**2, 1.0, 1.0])
    torch.testing.assert_close(policy.action_probs(OBS, ALL)[0], weights / weights.sum())


def test_exp3_divides_by_the_probability_of_the_choice() -> None:
    policy = bandits.Exp3(K, gamma=0.2)
    policy.begin(1)
    assert policy.action_probs(OBS, ALL).tolist() == [[0.25] * K]
    # weight exp(gamma * (reward / 0.25) / K) = exp(0.2 * 4 / 4); then 0.8 w / sum + 0.05
    policy.observe(OBS, torch.tensor([2]), torch.tensor([1.0]), ON)
    w = math.exp(0.2)
    assert float(policy.action_probs(OBS, ALL)[0, 2]) == pytest.approx(0.8 * w / (w + 3) + 0.05)


def test_exp3_with_a_rate_takes_falling_steps_from_the_mean_that_it_has_seen() -> None:
    policy = bandits.Exp3(K, rate=2.0)
    policy.begin(1)
    assert policy.action_probs(OBS, ALL).tolist() == [[0.25] * K]
    # eta_1 = 2 sqrt(ln 4 / 4); gain 1 against a baseline of 1/2; divided by 1/4 + eta_1 / 2
    first = 2.0 * math.sqrt(math.log(4) / 4)
    policy.observe(OBS, torch.tensor([2]), torch.tensor([1.0]), ON)
    gain = 0.5 / (0.25 + first / 2)
    assert float(policy.log_weight[0, 2]) == pytest.approx(gain)
    # eta_2 = eta_1 / sqrt(2) multiplies the whole gain; nothing is uniform
    w = math.exp(first / math.sqrt(2) * gain)
    assert float(policy.action_probs(OBS, ALL)[0, 2]) == pytest.approx(w / (w + 3))
    # the baseline is now (1/2 + 1) / 2: a gain of 3/4 moves nothing
    policy.observe(OBS, torch.tensor([1]), torch.tensor([0.75]), ON)
    assert policy.log_weight[0].tolist() == [0.0, 0.0, pytest.approx(gain), 0.0]


def test_epsilon_falls_as_requests_are_served() -> None:
    # min(1, (3 / t)^power): 1 for three requests, then 3/4, or 9/16
    for power, fourth in ((1.0, 3 / 4), (2.0, 9 / 16)):
        policy = bandits.EpsilonGreedy(K, epsilon=1.0, decay=3.0, power=power)
        policy.begin(2)
        for t in range(3):
            assert policy.exploration().tolist() == [[1.0], [pytest.approx(min(1.0, 3.0 / (t + 1)))]]
            policy.observe(OBS.expand(2, -1), torch.tensor([t, t]), torch.ones(2), torch.tensor([False, True]))
        # only the row that was served moves on
        assert policy.exploration()[:, 0].tolist() == [1.0, pytest.approx(fourth)]
        # strategies 0 to 2 have a mean of 1, 3 is untried and comes first
        assert float(policy.action_probs(OBS.expand(2, -1), ALL.expand(2, -1))[1, 3]) == pytest.approx(
            1 - fourth + fourth / K
        )


def test_boltzmann_gumbel_is_a_softmax_whose_temperature_falls_with_the_count() -> None:
    # equal counts n: the argmax of Gumbel noise of scale C / sqrt(n) is a softmax of temperature C / sqrt(n) = 1/2
    policy = bandits.BoltzmannGumbel(K, 0, scale=1.0, draws=4000)
    feed(policy, [(k, reward) for k in range(K) for reward in [k / 4] * 4])
    wanted = torch.softmax(torch.arange(K) / 4 / 0.5, dim=0)
    torch.testing.assert_close(policy.action_probs(OBS, ALL)[0], wanted, atol=0.03, rtol=0)
    # what is untried comes first, in equal shares
    shares = feed(policy, [(1, 100.0)]).action_probs(OBS, ALL)[0].tolist()
    assert shares == [
        pytest.approx(1 / 3, abs=0.03),
        0.0,
        pytest.approx(1 / 3, abs=0.03),
        pytest.approx(1 / 3, abs=0.03),
    ]


def test_beta_thompson_counts_a_request_as_many_trials_as_it_is_worth() -> None:
    # rewards from -1 to 3 as fractions: 2 is 3/4 of a success, 3 of 4 trials
    policy = feed(bandits.BetaThompson(K, 0, reward_low=-1.0, reward_range=4.0, trials=4.0), [(2, 2.0)])
    a, b = policy.posterior()
    assert a.tolist() == [[1.0, 1.0, 4.0, 1.0]]
    assert b.tolist() == [[1.0, 1.0, 2.0, 1.0]]


def test_exploration_that_settles_refuses_settings_without_a_meaning() -> None:
    with pytest.raises(ValueError, match="decay is 0"):
        bandits.EpsilonGreedy(K, decay=0.0)
    with pytest.raises(ValueError, match="scale is -1"):
        bandits.BoltzmannGumbel(K, 0, scale=-1.0)
    with pytest.raises(ValueError, match="trials 0"):
        bandits.BetaThompson(K, 0, trials=0.0)
    with pytest.raises(ValueError, match="rate is 0"):
        bandits.Exp3(K, rate=0.0)


def test_exp3_takes_the_probabilities_of_a_late_answer_from_its_caller() -> None:
    prompt, late = bandits.Exp3(K, gamma=0.2), bandits.Exp3(K, gamma=0.2)
    for policy in (prompt, late):
        policy.begin(1)
    first = late.action_probs(OBS, ALL)
    late.action_probs(OBS, torch.tensor([[True, False, True, False]]))
    late.observe(OBS, torch.tensor([2]), torch.tensor([1.0]), ON, probs=first)
    prompt.action_probs(OBS, ALL)
    prompt.observe(OBS, torch.tensor([2]), torch.tensor([1.0]), ON)
    assert torch.equal(prompt.log_weight, late.log_weight)


def test_a_discount_forgets_what_a_strategy_was_worth() -> None:
    # strategy 0 was good ten times and bad four times, strategy 1 middling: discounted mean of 0 is below 0.5
    pairs = [(1, 0.5), (2, 0.0), (3, 0.0)] + [(0, 1.0)] * 10 + [(0, 0.0)] * 4
    for discount, best in ((1.0, 0), (0.7, 1)):
        probs = feed(bandits.EpsilonGreedy(K, epsilon=0.0, discount=discount), pairs).action_probs(OBS, ALL)
        assert int(probs.argmax()) == best


def test_hybrid_model_equals_one_ridge_regression_on_all_features_together() -> None:
    policy = bandits.HybridLinUcb(K, 3 + K, [3], alpha=1.0, ridge=2.0, online=True)
    rows, targets = [], []
    for obs, action, reward, alive in history(6, 12):
        policy.observe(obs, action, reward, alive)
        x, z = policy.features(obs.double())
        for i in torch.nonzero(alive)[:, 0].tolist():
            a = int(action[i])
            rows.append(torch.cat([z[i, a], torch.kron(torch.eye(K, dtype=torch.float64)[a], x[i])]))
            targets.append(reward[i].double())
    design, target = torch.stack(rows), torch.stack(targets)
    gram = design.T @ design + 2.0 * torch.eye(design.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, design.T @ target)
    probe = history(5, 1, seed=9)[0][0]
    x, z = policy.features(probe.double())
    for a in range(K):
        one = torch.eye(K, dtype=torch.float64)[a]
        joint = torch.cat([z[:, a], torch.stack([torch.kron(one, row) for row in x])], dim=1)
        torch.testing.assert_close(policy.expected(probe)[:, a], (joint @ weights).float(), atol=1e-5, rtol=0)
        spread = (joint * torch.linalg.solve(gram, joint.T).T).sum(dim=1).sqrt()
        torch.testing.assert_close(policy.deviation(probe)[:, a], spread.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["disjoint", "hybrid"])
def test_thompson_draws_have_the_mean_and_spread_of_the_linear_posterior(kind: str) -> None:
    settings: dict[str, Any] = {"alpha": 0.7, "online": True, "draws": 4000}
    policy: Any = bandits.LinTs(K, 3 + K, **settings)
    if kind == "hybrid":
        policy = bandits.HybridLinTs(K, 3 + K, [3], **settings)
    for step in history(6, 12):
        policy.observe(*step)
    probe = history(3, 1, seed=9)[0][0]
    samples = policy._samples(probe)
    torch.testing.assert_close(samples.mean(dim=1), policy.expected(probe), atol=0.04, rtol=0)
    torch.testing.assert_close(samples.std(dim=1), 0.7 * policy.deviation(probe), atol=0.0, rtol=0.06)


def test_population_thompson_draws_correlated_strategies_together() -> None:
    # N(0, [[1, c], [c, 1]]) twice: with c near 1 the two strategies of a pair win or lose together; K = 2 stays a coin
    policy = bandits.PopulationThompson(3, draws=4000)
    policy.prior_cov = torch.tensor([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    policy.begin(1)
    probs = policy.action_probs(OBS, torch.ones(1, 3, dtype=torch.bool))[0]
    # independent strategies would give strategy 2 a third; against a pair that is nearly one strategy it wins almost half
    assert float(probs[2]) == pytest.approx(0.47, abs=0.04)


def test_memory_lets_a_belief_return_to_the_population() -> None:
    policy = bandits.PopulationUcb(2, memory=0.5)
    policy.begin(1)
    # after one answer of 1 (noise 1): mean 0.5, variance 0.5; one request later mean 0.25, variance 0.25 * 0.5 + 0.75
    policy.observe(OBS, torch.tensor([0]), torch.tensor([1.0]), ON)
    assert policy._mean.tolist() == [[0.25, 0.0]]
    torch.testing.assert_close(policy._cov[0], torch.diag(torch.tensor([0.875, 1.0], dtype=torch.float64)))


def test_a_leader_is_replaced_only_by_what_is_better_by_more_than_the_margin() -> None:
    policy = bandits.HierarchicalUcb(2, bandits.Features(()), exploration=0.0, lead=(0, 1), margin=0.3)
    policy.weights[:, 0] = torch.tensor([0.5, 0.7], dtype=torch.float64)
    policy.begin(1)
    both = torch.ones(1, 2, dtype=torch.bool)
    assert policy.action_probs(OBS, both).tolist() == [[1.0, 0.0]]
    policy.weights[1, 0] = 0.9
    assert policy.action_probs(OBS, both).tolist() == [[0.0, 1.0]]


# ---- late and batched feedback


def test_feedback_that_comes_late_teaches_the_same() -> None:
    steps = history(4, 9)
    for prompt, late in zip(every_policy(), every_policy(), strict=True):
        if isinstance(prompt, bandits.Exp3):
            continue  # its caller hands over the probabilities, see above
        prompt.begin(4)
        late.begin(4)
        mask = torch.ones(4, K, dtype=torch.bool)
        for t, step in enumerate(steps):
            prompt.observe(*step)
            late.action_probs(step[0], mask)
            if t >= 3:
                late.observe(*steps[t - 3])
        for step in steps[-3:]:
            late.observe(*step)
        obs = steps[0][0]
        torch.testing.assert_close(late.action_probs(obs, mask), prompt.action_probs(obs, mask))


def test_a_batch_of_answers_teaches_a_shared_model_what_they_teach_one_by_one() -> None:
    for together, single in zip(every_policy(), every_policy(), strict=True):
        if not isinstance(together, SHARED):
            continue
        for obs, action, reward, alive in history(5, 4):
            together.observe(obs, action, reward, alive)
            for i in range(5):
                single.observe(obs[i : i + 1], action[i : i + 1], reward[i : i + 1], alive[i : i + 1])
        probe = history(5, 1, seed=3)[0][0]
        torch.testing.assert_close(together.expected(probe), single.expected(probe))
        torch.testing.assert_close(together.deviation(probe), single.deviation(probe))


def test_a_new_user_in_a_row_starts_from_the_prior_and_the_others_keep_what_they_know() -> None:
    for policy in every_policy():
        if isinstance(policy, SHARED):
            continue
        policy.begin(3)
        steps = history(3, 5)
        for step in steps:
            policy.observe(*step)
        mask, obs = torch.ones(3, K, dtype=torch.bool), steps[0][0]
        before = policy.action_probs(obs, mask)
        bandits.restart(policy, torch.tensor([False, True, False]))
        after = policy.action_probs(obs, mask)
        policy.begin(3)
        fresh = policy.action_probs(obs, mask)
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        assert torch.equal(after[1], fresh[1])


# ---- files


def test_a_saved_bandit_goes_on_where_it_was(tmp_path: Path) -> None:
    steps = history(3, 6)
    mask, probe = torch.ones(3, K, dtype=torch.bool), history(3, 1, seed=4)[0][0]
    for policy in every_policy():
        policy.begin(3)
        for step in steps[:4]:
            policy.observe(*step)
        again = bandits.load_bandit(policy.save(tmp_path / "rows.safetensors", rows=True))
        assert type(again) is type(policy)
        for step in steps[4:]:
            policy.observe(*step)
            again.observe(*step)
        assert torch.equal(again.action_probs(probe, mask), policy.action_probs(probe, mask))
        fresh = bandits.load_bandit(policy.save(tmp_path / "learned.safetensors"))
        fresh.begin(3)
        policy.begin(3)
        assert torch.equal(fresh.action_probs(probe, mask), policy.action_probs(probe, mask))
        assert not list(tmp_path.glob("*.partial"))


def test_what_was_learned_from_training_users_is_in_the_file(tmp_path: Path) -> None:
    for policy in (
        bandits.LinUcb(K, K).learn(UserTypes(32, hint=True), 600, seed=1),
        bandits.PopulationThompson(K).learn(UserTypes(32), 600, seed=1),
        bandits.NeuralLinear(K, K, hidden=8, epochs=1).learn(UserTypes(32, hint=True), 600, seed=1),
    ):
        again = bandits.load_bandit(policy.save(tmp_path / "bandit.safetensors"))
        assert play(again, UserTypes(32, hint=True)) == play(policy, UserTypes(32, hint=True))


def test_a_wrong_file_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no bandit at"):
        bandits.load_bandit(tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, str(other), metadata={"schema": "1"})
    with pytest.raises(ValueError, match="no bandit"):
        bandits.load_bandit(other)
    save_file({"x": torch.zeros(1)}, str(other), metadata={"schema": "9", "bandit": "Softmax"})
    with pytest.raises(ValueError, match="schema 9"):
        bandits.load_bandit(other)
    save_file(
        {"x": torch.zeros(1)},
        str(other),
        metadata={"schema": "1", "bandit": "PopulationUcb", "settings": '{"num_strategies": 2}', "rows": "false"},
    )
    with pytest.raises(ValueError, match="lacks the tensors"):
        bandits.load_bandit(other)


# ---- known optimum


def test_every_new_bandit_serves_a_hidden_type_better_than_any_fixed_strategy() -> None:
    # any fixed or random strategy earns 0.425 a request, knowing the type earns 1
    def value(policy: Any) -> float:
        return play(policy, UserTypes(256, horizon=24))

    assert value(bandits.Softmax(K, temperature=0.15, prior_mean=0.4)) > 0.65
    assert value(bandits.Exp3(K, gamma=0.2, reward_low=-0.5, reward_high=1.5)) > 0.45
    # UCB with the same prior gets 0.87
    thompson = bandits.PopulationThompson(K, exploration=0.5).learn(UserTypes(512), 20_000, seed=1)
    assert value(thompson) > 0.85
    features = bandits.Features.all_of(K)
    learned = bandits.HierarchicalUcb(K, features).fit([bandits.serve(UserTypes(512), 20_000, 1)])
    assert value(learned) > 0.85


def test_models_that_read_the_type_reach_95_percent_of_the_optimum() -> None:
    for policy in (
        bandits.LinTs(K, K).learn(UserTypes(128, hint=True), 4_000, seed=1),
        bandits.HybridLinUcb(K, K, [0]).learn(UserTypes(128, hint=True), 4_000, seed=1),
        bandits.HybridLinTs(K, K, [0]).learn(UserTypes(128, hint=True), 4_000, seed=1),
        bandits.NeuralLinear(K, K, hidden=8, epochs=10).learn(UserTypes(128, hint=True), 4_000, seed=1),
        bandits.HierarchicalUcb(K, bandits.Features.all_of(K)).fit(
            [bandits.serve(UserTypes(128, hint=True), 4_000, 1)]
        ),
    ):
        assert play(policy, UserTypes(128, hint=True)) > 0.95


def test_a_supervised_prior_is_corrected_by_the_users_own_answers() -> None:
    # the prediction is right on average and says nothing of types
    policy = bandits.PriorBandit(K, lambda obs: torch.full((len(obs), K), 0.425))
    policy.learn(UserTypes(512), 20_000, seed=1)
    assert play(policy, UserTypes(256, horizon=24)) > 0.85
    with pytest.raises(TypeError, match="predictor"):
        policy.save("nowhere")


class Drifting(UserTypes):
    """Strategy 0 is the best in the first half of an episode, strategy 1 in the second; the clock is shown."""

    def _obs(self) -> torch.Tensor:
        obs = torch.zeros(self.num_envs, K)
        obs[:, 0] = (self.clock % self.horizon) / self.horizon
        return obs

    def step(self, actions: torch.Tensor) -> Any:
        late = self.clock % self.horizon >= self.horizon // 2
        self.means = torch.tensor([0.2, 1.0, 0.5, 0.0] if late else [1.0, 0.2, 0.5, 0.0]).repeat(K, 1)
        return super().step(actions)


def test_the_trend_of_a_strategy_is_a_schedule_and_forgetting_finds_a_drifting_best() -> None:
    env = Drifting(512, horizon=20)
    clock = bandits.Features((0,), bent=(0,), knots=(0.4, 0.45, 0.5, 0.55))
    scheduled = bandits.HierarchicalUcb(K, clock, ridge=0.1).fit([bandits.serve(env, 40_000, 1)])
    # knowing the schedule earns 1 a request; the best fixed strategy 0.6
    assert play(scheduled, Drifting(256, horizon=20)) > 0.95

    keep, forget = (play(bandits.EpsilonGreedy(K, discount=d), Drifting(256, horizon=80)) for d in (1.0, 0.9))
    assert forget > keep + 0.1


@pytest.fixture(scope="module")
def types() -> World:
    return World.synthetic(
        n_types=3, users_per_type=8, items_per_type=20, horizon=5, slate_size=2, history_lengths=(5, 10), leaving=None
    )


def value_on_b(world: World, policy: Any, **settings: Any) -> float:
    """Mean reward a request, net of cost, over all start states of fold B."""
    starts = world.starts_of("B")
    env = MetaRecVectorEnv(len(starts), world=world, fold="B", output="torch", autoreset_mode="Disabled", **settings)
    obs, info = env.reset(seed=3, options={"start_state": starts})
    policy.begin(len(starts))
    total = 0.0
    for _ in range(env.horizon):
        mask = info["action_mask"].bool()
        action = policy.action_probs(obs, mask).argmax(dim=1)
        assert bool(mask.gather(1, action[:, None]).all())
        seen = obs
        obs, reward, _, _, info = env.step(action)
        policy.observe(seen, action, reward, torch.ones_like(action, dtype=torch.bool))
        total += float((env.expected_reward).mean())
    return total / env.horizon


def test_the_tuned_bandit_reaches_95_percent_of_the_known_optimum_on_users_it_never_met(types: World) -> None:
    said: list[str] = []
    policy = bandits.learn_tuned(lesson_of(types), log=said.append)
    assert value_on_b(types, policy) >= 0.95
    assert said[-1].startswith("chosen")
    # out of service: the type's own strategy is worth 1, any other 0.2: (1 + 1 + 0.2) / 3
    out = {"unavailable": (types.strategies[0],)}
    masked = bandits.learn_tuned(lesson_of(types, **out))
    assert value_on_b(types, masked, **out) >= 0.95 * 2.2 / 3


def test_the_tuned_bandit_serves_a_cheap_strategy_where_the_right_one_costs_more_than_it_earns(types: World) -> None:
    # a cost weight of 2 and relative costs 0.2, 0.467, 0.733: the right strategy earns 1 - 0.4, 1 - 0.933 and 1 - 1.467, the
    # cheapest one 0.2 - 0.4 for the others, so the third type gets that: (0.6 + 0.0667 - 0.2) / 3
    policy = bandits.learn_tuned(lesson_of(types, cost_weight=2.0))
    assert value_on_b(types, policy, cost_weight=2.0) >= 0.95 * 0.4667 / 3


def test_a_race_gives_equal_bandits_equal_values(types: World) -> None:
    fixed = bandits.EpsilonGreedy(types.n_strategies, epsilon=1.0)
    result = race(lesson_of(types), [fixed, bandits.EpsilonGreedy(types.n_strategies, epsilon=1.0)], 400, 1)
    assert torch.equal(result.value[0], result.value[1])
    assert result.value.shape == (2, 40)
    assert result.requests == 400


def test_equal_seeds_give_equal_bandits(types: World) -> None:
    state = torch.get_rng_state()
    first, second = (bandits.learn_tuned(lesson_of(types, requests=800, seed=4)) for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert first.settings == second.settings
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(set(bandits.BANDITS) - {"tuned_hierarchical"}))
def test_every_lesson_gives_a_policy_that_serves(types: World, name: str) -> None:
    policy = bandits.BANDITS[name][0](lesson_of(types, requests=600))
    assert 0.2 <= value_on_b(types, policy) <= 1.0 + 1e-5


def test_a_gpu_gives_what_the_cpu_gives(gpu: str) -> None:
    for policy, twin in zip(every_policy(), every_policy(), strict=True):
        policy.begin(3)
        twin.begin(3, gpu)
        for step in history(3, 6):
            policy.observe(*step)
            twin.observe(*(part.to(gpu) for part in step))
        obs, mask = history(3, 1, seed=4)[0][0], torch.ones(3, K, dtype=torch.bool)
        torch.testing.assert_close(
            twin.action_probs(obs.to(gpu), mask.to(gpu)).cpu(), policy.action_probs(obs, mask), atol=0.05, rtol=0
        )
