import json
from pathlib import Path

import gymnasium
import numpy as np
import pandas as pd
import pytest
import torch

from experiments import replay
from metarec_gym.data import InteractionLog, synthetic_log
from metarec_gym.data.impressions import ImpressionTable
from metarec_gym.envs.replay import ReplayEnv, ReplayVectorEnv, first_observations
from metarec_gym.envs.replay_table import ReplayTable
from metarec_gym.evaluation.replay_value import on_policy_value, replay_value
from metarec_gym.policy import FixedPolicy, UniformPolicy

MODES = ("NextStep", "SameStep", "Disabled")
OPEN_BANDIT = Path(__file__).resolve().parent.parent / "envs_data" / "open_bandit"


def four_rows():
    """Two actions; logged 0, 1, 0, 1 with chances 0.5, 0.25, 0.5, 0.75; rewards 1, 1, 0, 1."""
    return ReplayTable(
        name="by_hand",
        actions=("a", "b"),
        context_names=("x",),
        context=torch.tensor([[0.0], [0.1], [0.2], [0.3]]),
        reward=torch.tensor([1.0, 1.0, 0.0, 1.0]),
        weight=torch.tensor([[2.0, 0.0], [0.0, 4.0], [2.0, 0.0], [0.0, 4 / 3]]),
        logged=torch.tensor([0, 1, 0, 1]),
        cluster=torch.arange(4),
    )


def production_log(**more):
    """Two users; strategies a and b served with chances that the log knows."""
    frame = pd.DataFrame(
        {
            "user_id": ["u", "u", "u", "v"],
            "item_id": ["i", "j", "i", "j"],
            "timestamp": [0.0, 3600.0, 7200.0, 3600.0],
            "click": [1.0, 0.0, 1.0, 1.0],
            "strategy": ["a", "b", "b", "a"],
            "propensity": [0.5, 0.25, 0.8, 0.5],
            **more,
        }
    )
    return InteractionLog.from_frame(frame, name="production", outcomes=["click"])


def impressions():
    """Campaign x: `learned` changes its chances, `random` shows each of two items with 0.5."""
    frame = pd.DataFrame(
        {
            "timestamp": np.arange(8.0),
            "campaign": "x",
            "strategy": ["learned"] * 4 + ["random"] * 4,
            "item_id": ["i", "i", "i", "j", "i", "j", "i", "j"],
            "position": 1,
            "propensity": [0.9, 0.6, 0.8, 0.2, 0.5, 0.5, 0.5, 0.5],
            "click": [1, 0, 0, 1, 0, 1, 1, 0],
            "user_feature_0": ["p", "q", "p", "q", "p", "q", "p", "q"],
        }
    )
    items = pd.DataFrame({"item_id": ["i", "j"], "item_feature_3": [0, 1]})
    return ImpressionTable.from_frame(frame, name="shop", items=items)


def random_actions(env, steps, seed=0):
    return np.random.default_rng(seed).integers(0, env.table.n_actions, (steps, env.num_envs))


def play(env, actions, seed=0, options=None):
    obs, info = env.reset(seed=seed, options=options)
    record = []
    for action in actions:
        before = obs
        obs, reward, terminated, truncated, info = env.step(action)
        record.append((before, reward, terminated, truncated, info, obs))
    return record


# ---- the table


def test_a_production_log_is_replayed_on_its_own_strategies():
    table = ReplayTable.from_log(production_log())
    assert table.actions == ("a", "b")
    # rows by user and time: u at 0, 1 h, 2 h, then v
    assert table.weight.tolist() == [[2.0, 0.0], [0.0, 4.0], [0.0, 1.25], [2.0, 0.0]]
    assert table.reward.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert table.cluster.tolist() == [0, 0, 0, 1]
    context = dict(zip(table.context_names, table.context.T.tolist(), strict=True))
    # the past only: nothing before the first row, then 1 of 1 taken, then 1 of 2
    assert context["taken_before"] == pytest.approx([0.0, 1.0, 0.5, 0.0])
    assert context["rows_before"][1] == pytest.approx(np.log(2) / np.log(1001))
    items = ReplayTable.from_log(production_log(), action="item")
    assert items.actions == ("i", "j")
    assert items.weight[0].tolist() == [2.0, 0.0]


def test_a_log_without_propensities_is_refused_and_told_why(tmp_path):
    log, _ = synthetic_log(0, n_users=12, n_items=48)
    with pytest.raises(ValueError, match="no column 'propensity'.*without bias"):
        ReplayTable.from_log(log)
    log.save(tmp_path)
    with pytest.raises(ValueError, match="no column 'propensity'"):
        ReplayVectorEnv(1, log=str(tmp_path))


def test_rows_of_one_strategy_are_reweighed_for_the_other():
    table = ReplayTable.from_impressions(impressions())
    assert table.actions == ("learned", "random")
    # random is known exactly: 0.5 / p; learned has shown i in 3 of 4 rows: 0.75 / 0.5 and 0.25 / 0.5
    by_hand = [[1, 0.5 / 0.9], [1, 0.5 / 0.6], [1, 0.5 / 0.8], [1, 2.5], [1.5, 1], [0.5, 1], [1.5, 1], [0.5, 1]]
    assert torch.allclose(table.weight, torch.tensor(by_hand))
    balanced = ReplayTable.from_impressions(impressions(), reweigh="balanced")
    # over the mean chance: (0.9, 0.5) / 0.7 in the first row, (0.75, 0.5) / 0.625 in the fifth
    assert torch.allclose(
        balanced.weight[[0, 4]], torch.tensor([[0.9, 0.5], [0.75, 0.5]]) / torch.tensor([[0.7], [0.625]])
    )
    assert float(balanced.weight.max()) <= 2.0
    own = ReplayTable.from_impressions(impressions(), reweigh="none")
    assert own.weight.tolist() == [[2.0, 0.0]] * 4 + [[0.0, 2.0]] * 4
    assert own.uniform
    assert not table.uniform


def test_a_category_stands_for_a_uniform_draw_from_it():
    table = ReplayTable.from_impressions(impressions(), action="category")
    assert table.actions == ("0", "1")
    # each category holds one item: weight 1 / propensity
    assert table.weight[:2].tolist() == [[pytest.approx(1 / 0.9), 0.0], [pytest.approx(1 / 0.6), 0.0]]
    assert table.weight[4:6].tolist() == [[2.0, 0.0], [0.0, 2.0]]


def test_what_was_shown_is_no_part_of_the_context():
    frame = impressions().frame.assign(affinity=np.arange(8.0))
    table = ImpressionTable.from_frame(frame, name="shop", items=impressions().items)
    names = ReplayTable.from_impressions(table).context_names
    assert names == ("user_feature_0=p", "user_feature_0=q", "position=1", "hour_sin", "hour_cos")


# ---- the environment


def test_a_step_worked_out_by_hand():
    env = ReplayVectorEnv(2, log=four_rows(), order="log", horizon=3, autoreset_mode="Disabled")
    obs, info = env.reset(seed=0, options={"row": [1, 2]})
    assert info["row"].tolist() == [1, 2]
    assert obs[:, 0].tolist() == pytest.approx([0.1, 0.2])
    obs, reward, terminated, truncated, info = env.step(np.array([1, 1]))
    # row 1 logged b with chance 0.25 and reward 1: worth 4; row 2 logged a: no match
    assert reward.tolist() == [4.0, 0.0]
    assert info["matched"].tolist() == [True, False]
    assert info["replayed_row"].tolist() == [1, 2]
    assert info["row"].tolist() == [2, 3]
    assert not (terminated | truncated).any()
    see = {name: obs[:, where] for name, where in env.feature_slices.items()}
    assert see["progress"][:, 0].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert see["matched"][:, 0].tolist() == [1.0, 0.0]
    assert see["last_action"].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    # log(1 + 4) / log(1 + 3) is clipped to 1
    assert see["action_count"].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    # tanh(4 / (1 + 4) / mean logged reward 0.75)
    assert see["action_mean_reward"][0, 1] == pytest.approx(np.tanh(4 / 5 / 0.75), abs=1e-6)


def test_in_rejection_mode_a_row_counts_only_if_the_action_is_the_logged_one():
    table, _ = ReplayTable.synthetic(n_rows=64, uniform=True)
    env = ReplayVectorEnv(16, log=table, mode="rejection", autoreset_mode="Disabled")
    for _, reward, _, _, info, _ in play(env, random_actions(env, 8)):
        hit = table.logged.numpy()[info["replayed_row"]]
        assert np.array_equal(reward, np.where(info["matched"], info["logged_reward"], 0.0))
        assert (info["matched"] == (info["weight"] > 0)).all()
        assert len(hit) == 16
    with pytest.raises(ValueError, match="did not draw its actions uniformly"):
        ReplayVectorEnv(1, log=four_rows(), mode="rejection")


def test_the_mean_reward_of_a_fixed_action_is_its_replay_value():
    table, truth = ReplayTable.synthetic(3, n_rows=2000)
    env = ReplayVectorEnv(2000, log=table, order="log", horizon=2000, autoreset_mode="Disabled")
    env.reset(seed=0, options={"row": np.arange(2000)})
    _, reward, *_ = env.step(np.full(2000, 2))
    # every row once
    value = replay_value(table, 2).interval
    assert reward.mean() == pytest.approx(value.estimate, rel=1e-5)
    assert abs(value.estimate - float(truth[:, 2].mean())) < 4 * value.se


def test_reward_parts_sum_to_the_reward():
    env = ReplayVectorEnv(8, autoreset_mode="SameStep", horizon=5)
    for _, reward, _, _, info, _ in play(env, random_actions(env, 12)):
        parts = [value for key, value in info.items() if key.startswith("reward_")]
        assert np.array_equal(sum(parts), reward)


@pytest.mark.parametrize("mode", MODES)
def test_row_i_seeded_s_equals_the_single_row_seeded_s_plus_i_bit_for_bit(mode):
    env = ReplayVectorEnv(37, horizon=5, autoreset_mode=mode)
    actions = random_actions(env, 14)
    record = play(env, actions, seed=5)
    for row in (0, 1, 36):
        alone = play(ReplayVectorEnv(1, horizon=5, autoreset_mode=mode), actions[:, row : row + 1], seed=5 + row)
        for many, one in zip(record, alone, strict=True):
            for a, b in zip((*many[:4], many[5]), (*one[:4], one[5]), strict=True):
                assert np.array_equal(a[row], b[0])


def test_the_single_environment_is_a_row_of_the_batch():
    many = play(ReplayVectorEnv(3, autoreset_mode="Disabled"), random_actions(ReplayVectorEnv(3), 6), seed=2)
    env = ReplayEnv()
    obs, _ = env.reset(seed=4)
    for step, action in zip(many, random_actions(ReplayVectorEnv(3), 6)[:, 2], strict=True):
        assert np.array_equal(obs, step[0][2])
        obs, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated) == (float(step[1][2]), False, bool(step[3][2]))
        assert info["row"] == step[4]["row"][2]


def test_the_three_autoreset_modes_play_the_same_transitions():
    runs = {}
    for mode in MODES:
        env = ReplayVectorEnv(4, horizon=3, autoreset_mode=mode)
        obs, _ = env.reset(seed=1)
        found = []
        for episode in range(2):
            for step, action in enumerate(random_actions(env, 3, seed=episode)):
                before = obs
                obs, reward, _, truncated, info = env.step(action)
                found.append(
                    (before, reward, truncated, info["final_obs"] if mode == "SameStep" and step == 2 else obs)
                )
            if mode == "NextStep":
                obs, reward, *_ = env.step(action)
                assert not reward.any()
            elif mode == "Disabled":
                obs, _ = env.reset(options={"reset_mask": np.ones(4, dtype=bool)})
        runs[mode] = found
    for mode in MODES[1:]:
        for a, b in zip(runs["NextStep"], runs[mode], strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    env = ReplayVectorEnv(8, autoreset_mode="SameStep")
    runs = [np.stack([step[5] for step in play(env, random_actions(env, 20), seed=s)]) for s in (1, 1, 2)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_observations_stay_in_bounds_and_returned_arrays_never_change_later():
    env = ReplayVectorEnv(64, horizon=6, autoreset_mode="SameStep")
    last, _ = env.reset(seed=0)
    for action in random_actions(env, 20):
        copy = last.copy()
        obs, rewards, *_ = env.step(action)
        rewards += 100.0
        assert np.array_equal(last, copy)
        assert env.observation_space.contains(obs)
        last = obs


def test_torch_output_and_state_go_on_exactly():
    env = ReplayVectorEnv(5, horizon=4, output="torch")
    actions = torch.from_numpy(random_actions(env, 9))
    play(env, actions[:3])
    saved = env.get_state()
    first = torch.stack([env.step(action)[0] for action in actions[3:]])
    other = ReplayVectorEnv(5, horizon=4, output="torch")
    other.set_state(saved)
    assert torch.equal(first, torch.stack([other.step(action)[0] for action in actions[3:]]))


def test_a_gpu_replays_the_same_rows_and_rewards_as_cpu(gpu):
    cpu, far = (ReplayVectorEnv(256, output="torch", device=device, horizon=5) for device in ("cpu", gpu))
    runs = [play(env, torch.from_numpy(random_actions(env, 12)), seed=1) for env in (cpu, far)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a[4]["row"], b[4]["row"].cpu())
        assert torch.equal(a[1], b[1].cpu())
        torch.testing.assert_close(a[5], b[5].cpu(), rtol=1e-5, atol=1e-6)


def test_wrong_settings_actions_and_options_are_refused_with_a_sentence():
    with pytest.raises(TypeError, match="has no settings"):
        ReplayVectorEnv(1, modus="weighted")
    with pytest.raises(ValueError, match="mode is 'dr'"):
        ReplayVectorEnv(1, mode="dr")
    with pytest.raises(TypeError, match="log is a int"):
        ReplayVectorEnv(1, log=3)
    env = ReplayVectorEnv(2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must lie in 0\.\.3"):
        env.step(np.array([0, 4]))
    with pytest.raises(ValueError, match="expected integers"):
        env.step(np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"must lie in 0\.\.4095"):
        env.reset(options={"row": [0, 5000]})


# ---- values


def test_the_three_estimators_worked_out_by_hand():
    # a: rows 0 and 2 weigh 2 each, rewards 1 and 0
    assert replay_value(four_rows(), 0).interval.estimate == pytest.approx(2 / 4)
    assert replay_value(four_rows(), 0, estimator="self_normalised").interval.estimate == pytest.approx(2 / 4)
    # b: 4 + 4/3 of 4 rows; self-normalised: both rewards are 1
    value = replay_value(four_rows(), 1)
    assert value.interval.estimate == pytest.approx((4 + 4 / 3) / 4)
    assert value.effective_rows == pytest.approx((16 / 3) ** 2 / (16 + 16 / 9), rel=1e-5)
    assert (value.matched, value.largest_weight) == (2.0, 4.0)
    assert replay_value(four_rows(), 1, estimator="self_normalised").interval.estimate == pytest.approx(1.0)
    # half and half: (2*.5*1 + 4*.5*1 + 0 + 4/3*.5*1) / 4
    assert replay_value(four_rows(), [0.5, 0.5]).interval.estimate == pytest.approx((1 + 2 + 2 / 3) / 4)
    # standard error by hand: values 0, 4, 0, 4/3 for b
    assert value.interval.se == pytest.approx(np.std([0, 4, 0, 4 / 3], ddof=1) / 2, rel=1e-5)


def test_a_policy_is_valued_as_its_probabilities_are():
    table, _ = ReplayTable.synthetic(1, n_rows=500)
    assert replay_value(table, FixedPolicy(1)).interval == replay_value(table, 1).interval
    uniform = replay_value(table, UniformPolicy()).interval
    assert uniform == replay_value(table, [0.25] * 4).interval
    env = ReplayVectorEnv(1, log=table, autoreset_mode="Disabled")
    obs, info = env.reset(seed=0)
    assert np.array_equal(first_observations(table)[int(info["row"][0])].numpy(), obs[0])


def test_on_uniform_logs_rejection_is_the_mean_over_matching_rows():
    table, _ = ReplayTable.synthetic(2, n_rows=800, uniform=True)
    own = table.reward[table.logged == 3]
    value = replay_value(table, 3, estimator="rejection")
    assert value.interval.estimate == pytest.approx(float(own.mean()))
    assert value.matched == len(own)
    assert on_policy_value(table, 3).estimate == pytest.approx(float(own.mean()))


def test_rows_of_one_user_widen_the_interval():
    table, _ = ReplayTable.synthetic(5, n_rows=2000, rows_per_user=20)
    clustered = replay_value(table, [0.25] * 4).interval
    alone = replay_value(table.select(torch.arange(2000)), [0.25] * 4).interval
    assert clustered == alone
    doubled = ReplayTable(**{**vars(table), "cluster": torch.arange(2000)})
    assert replay_value(doubled, [0.25] * 4).interval.se < clustered.se
    assert clustered.users == 100


def test_ppo_finds_the_best_action_of_every_group_from_the_log_alone():
    from agents.ppo import Args, train

    table, truth = ReplayTable.synthetic(4, n_rows=8192)
    env = ReplayVectorEnv(64, log=table, horizon=20, autoreset_mode="SameStep", output="torch")
    settings = Args(
        total_steps=64 * 20 * 16, num_steps=20, minibatch_size=640, gamma=0.0, learning_rate=1e-2, hidden=(32,)
    )
    policy = train(env, settings, progress=False).policy
    groups = torch.eye(3)
    one_each = ReplayTable(**{**vars(table.select(torch.arange(3))), "context": groups})
    probs = policy.action_probs(first_observations(one_each), torch.ones(3, 4, dtype=torch.bool))
    # what it prefers, without the exploration that is left after so short a training
    value = float(truth.gather(1, probs.argmax(dim=1, keepdim=True)).mean())
    best = float(truth.max(dim=1).values.mean())
    single = float(truth.mean(dim=0).max())
    assert value > 0.95 * best
    assert value > single


def test_a_log_that_says_nothing_about_a_policy_is_refused():
    table = four_rows().select(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="no row .* matches the policy"):
        replay_value(table, 1)
    with pytest.raises(ValueError, match="no distribution"):
        replay_value(four_rows(), [0.7, 0.7])
    with pytest.raises(ValueError, match="did not draw its actions uniformly"):
        replay_value(four_rows(), 0, estimator="rejection")


def coverage(logs, estimator, **settings):
    """Share of logs whose 95 % interval holds the true value of a policy that differs by group."""
    policy = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6], [0.25, 0.25, 0.25, 0.25]])
    held = 0
    for seed in range(logs):
        table, truth = ReplayTable.synthetic(seed, n_rows=1200, **settings)
        interval = replay_value(table, table.context @ policy, estimator=estimator).interval
        held += interval.low <= float((truth * policy).sum(dim=1).mean()) <= interval.high
    return held / logs


def test_intervals_cover_the_truth_in_a_few_logs():
    # 100 logs: 95 % with a standard error of 2 %
    assert 0.9 <= coverage(100, "weighted") <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        ("weighted", {}),
        ("weighted", {"rows_per_user": 8}),
        ("self_normalised", {}),
        ("self_normalised", {"rows_per_user": 8}),
        ("rejection", {"uniform": True}),
    ],
)
def test_95_percent_intervals_cover_93_to_97_percent_over_2000_logs(estimator, settings):
    assert 0.93 <= coverage(2000, estimator, **settings) <= 0.97


# ---- Open Bandit


@pytest.fixture(scope="module")
def open_bandit():
    if not (OPEN_BANDIT / "log.json").is_file():
        pytest.skip("needs the sample: python -m envs_data.open_bandit.prepare")
    return str(OPEN_BANDIT)


def test_open_bandit_runs_end_to_end_and_both_directions_agree_with_the_on_policy_mean(open_bandit):
    env = ReplayVectorEnv(32, log=open_bandit, campaign="men", horizon=4, autoreset_mode="SameStep")
    for _, _, _, _, info, obs in play(env, random_actions(env, 9)):
        assert env.observation_space.contains(obs)
        assert info["matched"].all()
    table = env.table
    assert table.actions == ("bts", "random")
    for target, source in ((0, 1), (1, 0)):
        other = replay_value(table.select(table.logged == source), target, estimator="self_normalised")
        own = on_policy_value(table, target)
        # two independent estimates of one number
        assert abs(other.interval.estimate - own.estimate) < 3 * np.hypot(other.interval.se, own.se)
        assert 0.7 < other.mean_weight < 1.3


def test_the_specification_of_open_bandit_survives_json(open_bandit):
    spec = gymnasium.envs.registration.EnvSpec(
        "MetaRec/Replay-v0",
        entry_point="metarec_gym.envs.replay:ReplayEnv",
        kwargs={"log": open_bandit, "action": "category", "campaign": "all"},
    )
    kwargs = json.loads(spec.to_json())["kwargs"]
    assert ReplayEnv(**kwargs).action_space.n == 7


def test_the_command_values_every_strategy_beside_its_own_rows(open_bandit, tmp_path, capsys):
    result = replay.run(replay.Args(log=Path(open_bandit), campaigns=("men",), runs=tmp_path))
    rows = result["tables"]["open_bandit/men"]
    # 69 and 46 clicks in 10,000 impressions each
    assert rows["bts"]["on_policy"]["estimate"] == pytest.approx(0.0069)
    assert rows["random"]["on_policy"]["estimate"] == pytest.approx(0.0046)
    assert sum(rows["by_context"]["shares"].values()) == pytest.approx(1.0, abs=0.002)
    assert "own rows" in capsys.readouterr().out


def test_the_context_policy_finds_the_groups_of_a_synthetic_log():
    table, truth = ReplayTable.synthetic(0, n_rows=6000)
    choice = replay.cross_fitted_choice(table, 10.0, 0)
    gained = (choice * (table.context @ truth)).sum(dim=1).mean()
    assert float(gained) > 0.97 * float(truth.max(dim=1).values.mean())
