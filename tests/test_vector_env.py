import hashlib

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.envs.actions import first_unshown
from metarec_gym.seeding import stream
from metarec_gym.world import World

MODES = ("NextStep", "SameStep", "Disabled")


def play(env, actions, seed=0, options=None):
    """Observations before each step, rewards, endings and infos of `actions` (steps, num_envs)."""
    obs, info = env.reset(seed=seed, options=options)
    record = []
    for action in actions:
        before = obs
        obs, reward, terminated, truncated, info = env.step(action)
        record.append((before, reward, terminated, truncated, info, obs))
    return record


def random_actions(env, steps, seed=0):
    return np.random.default_rng(seed).integers(0, env.world.n_strategies, (steps, env.num_envs))


def test_a_step_worked_out_by_hand(tiny_world):
    """A cold user of type 0 meets specialist_0: its first two items, 0 and 2, with probability 0.5 each."""
    env = MetaRecVectorEnv(1, world=tiny_world, autoreset_mode="Disabled", output="torch")
    start = int(torch.nonzero(tiny_world.tensors["start_user"] == 0)[0])
    obs, _ = env.reset(seed=4, options={"start_state": [start]})
    assert float(obs[0, env.feature_slices["request_fraction"]]) == 0.0
    obs, reward, terminated, truncated, info = env.step(torch.tensor([0]))
    assert info["slate"].tolist() == [[0, 2]]
    assert float(env.expected_reward[0]) == pytest.approx(2 * 0.5, abs=1e-6)
    assert float(reward[0]) == float(info["outcomes"].sum()) == float(info["reward_click"][0])
    assert not bool(terminated[0])
    assert not bool(truncated[0])
    blocks = {name: obs[0, where].tolist() for name, where in env.feature_slices.items()}
    assert blocks["request_fraction"] == [0.25]
    assert blocks["last_strategy"] == [1.0, 0.0, 0.0]
    # log(1 + 1) / log(1 + 4)
    assert blocks["strategy_count"] == pytest.approx([0.43068, 0.0, 0.0], abs=1e-4)
    # typical reward: slate 2 x mean probability (0.5 + 0.1) / 2 = 0.6
    assert blocks["last_reward"] == pytest.approx([np.tanh(float(reward[0]) / 0.6)], abs=1e-5)
    assert blocks["strategy_mean_reward"] == pytest.approx([np.tanh(float(reward[0]) / 2 / 0.6), 0, 0], abs=1e-5)
    # the other specialist's items have probability 0.1, `mixed` goes on with item 1 (0.1) and item 3 (0.1)
    assert env.peek_expected_rewards()[0].tolist() == pytest.approx([1.0, 0.2, 0.2], abs=1e-6)


def test_episodes_of_one_session_are_the_ones_they_were_before_episodes_could_have_several():
    """Slates, answers, endings and users of 30 requests, as the first version of the environment gave them."""
    sizes = {"n_types": 2, "users_per_type": 4, "items_per_type": 40, "horizon": 12, "slate_size": 3}
    world = World.synthetic(**sizes, history_lengths=(0,), leaving=(-3.0, 0.8))
    env = MetaRecVectorEnv(32, world=world, autoreset_mode="SameStep")
    digest = hashlib.sha256()
    for step in play(env, random_actions(env, 30), seed=7):
        info = step[4]
        for value in (step[2], step[3], *(info[key] for key in ("slate", "outcomes", "user", "request"))):
            digest.update(np.ascontiguousarray(value).tobytes())
    assert digest.hexdigest()[:16] == "f9cf573f367f4ced"


def test_the_slate_is_the_first_items_that_were_not_shown():
    lists = torch.tensor([[3, 1, 4, 0, 5], [2, 0, 5, 5, 5]], dtype=torch.int32)  # 5 = no item
    shown = torch.zeros(2, 6, dtype=torch.uint8)
    shown[:, -1] = 1
    shown[0, 1] = 1
    assert first_unshown(lists, shown, 3).tolist() == [[3, 4, 0], [2, 0, -1]]


def test_no_item_is_shown_twice_in_an_episode(leaving_world):
    env = MetaRecVectorEnv(16, world=leaving_world, autoreset_mode="Disabled")
    record = play(env, random_actions(env, env.horizon))
    for row in range(16):
        items = [i for step in record for i in step[4]["slate"][row].tolist() if i >= 0]
        assert len(items) == len(set(items))


def test_reward_parts_sum_to_the_reward(leaving_world):
    env = MetaRecVectorEnv(32, world=leaving_world, cost_weight=0.3, autoreset_mode="SameStep")
    for _, reward, _, _, info, _ in play(env, random_actions(env, 20)):
        assert np.allclose(info["reward_click"] + info["reward_cost"], reward, atol=1e-6)


def test_a_higher_cost_weight_lowers_the_reward_by_the_cost_of_the_strategy(tiny_world):
    actions = np.full((4, 8), 2)
    free, charged = (
        play(MetaRecVectorEnv(8, world=tiny_world, cost_weight=w, autoreset_mode="Disabled"), actions)
        for w in (0.0, 0.5)
    )
    cost = 0.5 * float(tiny_world.tensors["costs"][2])
    for a, b in zip(free, charged, strict=True):
        assert np.allclose(a[1] - b[1], cost, atol=1e-6)


def test_the_sampled_reward_has_the_expected_reward_as_its_mean(tiny_world):
    env = MetaRecVectorEnv(4096, world=tiny_world, autoreset_mode="Disabled")
    env.reset(seed=1)
    total, expected = 0.0, 0.0
    for step in range(4):
        _, reward, *_ = env.step(np.full(4096, step % 3))
        total, expected = total + reward.mean(), expected + float(env.expected_reward.mean())
    # standard error: sqrt(4 steps x 2 items x 0.25 / 4096) = 0.022
    assert total == pytest.approx(expected, abs=0.09)


@pytest.mark.parametrize("mode", MODES)
def test_row_i_seeded_s_equals_the_single_row_seeded_s_plus_i_bit_for_bit(leaving_world, mode):
    env = MetaRecVectorEnv(37, world=leaving_world, autoreset_mode=mode)
    actions = random_actions(env, 30)
    record = play(env, actions, seed=5)
    for row in (0, 1, 36):
        alone = MetaRecVectorEnv(1, world=leaving_world, autoreset_mode=mode)
        for many, one in zip(record, play(alone, actions[:, row : row + 1], seed=5 + row), strict=True):
            for a, b in zip((*many[:4], many[5]), (*one[:4], one[5]), strict=True):
                assert np.array_equal(a[row], b[0])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(leaving_world):
    env = MetaRecVectorEnv(8, world=leaving_world, autoreset_mode="SameStep")
    actions = random_actions(env, 20)
    runs = [np.stack([step[1] for step in play(env, actions, seed=s)]) for s in (1, 1, 2)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_experiment_seeds_zero_and_one_share_no_row(leaving_world):
    keys = []
    for seed in (0, 1):
        env = MetaRecVectorEnv(256, world=leaving_world)
        env.reset(seed=stream(seed, "train"))
        keys.append(set(env.get_state()["row_seed"].tolist()))
    assert not keys[0] & keys[1]


def test_draws_follow_user_request_and_item_not_strategy_or_slot(tiny_world):
    """Items 0 and 2 at request 0: specialist_0 shows them as first and second; the answers are those of any other slate."""
    env = MetaRecVectorEnv(64, world=tiny_world, autoreset_mode="Disabled")
    wide = MetaRecVectorEnv(64, world=tiny_world, autoreset_mode="Disabled", slate_size=4, horizon=2)
    start = int(torch.nonzero(tiny_world.tensors["start_user"] == 0)[0])
    options = {"start_state": [start] * 64, "noise": list(range(64))}
    answers = {}
    for name, e, action in (("specialist", env, 0), ("mixed", wide, 2)):
        e.reset(seed=9, options=options)
        _, _, _, _, info = e.step(np.full(64, action))
        answers[name] = {i: info["outcomes"][:, j, 0] for j, i in enumerate(info["slate"][0].tolist())}
    # mixed shows 0, 1, 2, 3: item 2 stands in slot 2 there and in slot 1 of the specialist
    assert set(answers["specialist"]) & set(answers["mixed"]) == {0, 2}
    for item in (0, 2):
        assert np.array_equal(answers["specialist"][item], answers["mixed"][item])


def test_rows_with_equal_start_and_noise_meet_equal_draws_whatever_their_place(leaving_world):
    starts = leaving_world.starts_of("B")[:6].tolist()
    env = MetaRecVectorEnv(6, world=leaving_world, fold="B", autoreset_mode="Disabled")
    actions = np.full((5, 6), 1)
    first = play(env, actions, seed=3, options={"start_state": starts, "noise": [7] * 6})
    second = play(env, actions, seed=3, options={"start_state": starts[::-1], "noise": [7] * 6})
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a[1], b[1][::-1])


def test_resetting_one_row_leaves_the_others_untouched(leaving_world):
    plain = MetaRecVectorEnv(4, world=leaving_world, autoreset_mode="Disabled")
    poked = MetaRecVectorEnv(4, world=leaving_world, autoreset_mode="Disabled")
    actions = random_actions(plain, 6)
    plain.reset(seed=0)
    poked.reset(seed=0)
    for step, action in enumerate(actions):
        if step == 3:
            obs, _ = poked.reset(options={"reset_mask": np.array([False, True, False, False])})
            assert obs[1, poked.feature_slices["request_fraction"]] == 0.0
        a, b = plain.step(action), poked.step(action)
        keep = [0, 2, 3]
        for x, y in zip(a[:4], b[:4], strict=True):
            assert np.array_equal(x[keep], y[keep])


def test_all_three_autoreset_modes_give_the_same_transitions(leaving_world):
    def transitions(mode):
        env = MetaRecVectorEnv(8, world=leaving_world, autoreset_mode=mode)
        strategies = np.random.default_rng(1).integers(0, env.world.n_strategies, (8, 4, env.horizon))
        obs, _ = env.reset(seed=2)
        episode, step, found = np.zeros(8, int), np.zeros(8, int), {}
        ended = np.zeros(8, bool)
        for _ in range(80):
            if mode == "Disabled" and ended.any():
                obs, _ = env.reset(options={"reset_mask": ended})
                episode, step, ended = episode + ended, np.where(ended, 0, step), np.zeros(8, bool)
            action = strategies[np.arange(8), episode % 4, step % env.horizon]
            nxt, reward, terminated, truncated, info = env.step(action)
            done = terminated | truncated
            for row in range(8):
                if mode == "NextStep" and ended[row]:
                    episode[row], step[row] = episode[row] + 1, 0
                    assert reward[row] == 0.0
                    assert not done[row]
                    continue
                last = info["final_obs"][row] if mode == "SameStep" and done[row] else nxt[row]
                key = (row, int(episode[row]), int(step[row]))
                found[key] = (
                    obs[row].tobytes(),
                    float(reward[row]),
                    bool(terminated[row]),
                    bool(truncated[row]),
                    last.tobytes(),
                )
                step[row] += 1
                if mode == "SameStep" and done[row]:
                    episode[row], step[row] = episode[row] + 1, 0
            ended = done
            obs = nxt
        return found

    by_mode = [transitions(mode) for mode in MODES]
    shared = set(by_mode[0]) & set(by_mode[1]) & set(by_mode[2])
    assert len(shared) > 300
    assert any(by_mode[0][key][2] for key in shared), "no user left: the test would say nothing of termination"
    for key in shared:
        assert by_mode[0][key] == by_mode[1][key] == by_mode[2][key]


def test_same_step_returns_the_reset_observation_and_keeps_the_last_one(tiny_world):
    env = MetaRecVectorEnv(4, world=tiny_world, autoreset_mode="SameStep")
    record = play(env, random_actions(env, 4))
    *_, truncated, info, obs = record[-1]
    where = env.feature_slices["request_fraction"]
    assert truncated.all()
    assert (obs[:, where] == 0.0).all()
    assert (info["final_obs"][:, where] == 1.0).all()
    assert info["_final_obs"].all()
    assert info["final_info"]["slate"].shape == (4, 2)


def test_an_ended_row_stays_ended_in_disabled_mode(tiny_world):
    env = MetaRecVectorEnv(2, world=tiny_world, autoreset_mode="Disabled")
    record = play(env, random_actions(env, 6))
    assert record[3][3].all()
    for step in record[4:]:
        assert step[3].all()
        assert (step[1] == 0.0).all()
        assert np.array_equal(step[5], record[3][5])


def test_leaving_terminates_and_the_horizon_truncates(leaving_world, tiny_world):
    record = play(MetaRecVectorEnv(64, world=leaving_world, autoreset_mode="SameStep"), np.full((40, 64), 2))
    assert any(step[2].any() for step in record)
    record = play(MetaRecVectorEnv(8, world=tiny_world, autoreset_mode="SameStep"), np.full((8, 8), 0))
    assert [bool(step[3].all()) for step in record] == [False, False, False, True] * 2
    assert not any(step[2].any() for step in record)


def test_a_stronger_hazard_of_leaving_shortens_episodes():
    lengths = []
    for weight in (0.2, 1.5):
        sizes = {"n_types": 2, "items_per_type": 110, "users_per_type": 8, "history_lengths": (0,)}
        world = World.synthetic(**sizes, leaving=(-4.0, weight))
        env = MetaRecVectorEnv(256, world=world, autoreset_mode="Disabled")
        served = sum(int((~(step[2] | step[3])).sum()) for step in play(env, np.full((20, 256), 1)))
        lengths.append(served)
    assert lengths[1] < 0.9 * lengths[0]


def test_returned_arrays_are_never_written_again(leaving_world):
    env = MetaRecVectorEnv(8, world=leaving_world, autoreset_mode="SameStep")
    obs, info = env.reset(seed=0)
    kept, copies = [obs, *info.values()], [np.copy(v) for v in (obs, *info.values())]
    for action in random_actions(env, 30):
        out = env.step(action)
        values = [*out[:4], *(v for v in out[4].values() if isinstance(v, np.ndarray))]
        kept += values
        copies += [np.copy(v) for v in values]
    for value, copy in zip(kept, copies, strict=True):
        assert np.array_equal(value, copy)


@pytest.mark.parametrize("mode", MODES)
def test_observations_stay_in_the_box_with_its_dtype(leaving_world, mode):
    env = MetaRecVectorEnv(64, world=leaving_world, autoreset_mode=mode)
    for before, reward, terminated, truncated, _, obs in play(env, random_actions(env, 30)):
        assert env.observation_space.contains(before)
        assert env.observation_space.contains(obs)
        assert obs.dtype == np.float32
        assert reward.dtype == np.float32
        assert terminated.dtype == truncated.dtype == bool


def test_an_unavailable_strategy_is_masked_and_serves_nothing(tiny_world):
    env = MetaRecVectorEnv(
        3, world=tiny_world, unavailable=["specialist_1"], autoreset_mode="Disabled", cost_weight=0.1
    )
    _, info = env.reset(seed=0)
    assert info["action_mask"].dtype == np.int8
    assert info["action_mask"].tolist() == [[1, 0, 1]] * 3
    assert env.action_masks().tolist() == [[True, False, True]] * 3
    assert env.single_action_space.sample(info["action_mask"][0]) != 1
    _, reward, _, _, info = env.step(np.array([1, 1, 1]))
    assert (info["slate"] == -1).all()
    assert np.allclose(reward, -0.1 * float(tiny_world.tensors["costs"][1]))


def test_torch_output_equals_numpy_output(leaving_world):
    a = MetaRecVectorEnv(8, world=leaving_world, output="numpy", autoreset_mode="SameStep")
    b = MetaRecVectorEnv(8, world=leaving_world, output="torch", autoreset_mode="SameStep")
    actions = random_actions(a, 20)
    for x, y in zip(play(a, actions), play(b, torch.from_numpy(actions)), strict=True):
        for u, v in zip((*x[:4], x[5]), (*y[:4], y[5]), strict=True):
            assert isinstance(v, torch.Tensor)
            assert np.array_equal(u, v.numpy())


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_state_continues_exactly(leaving_world, mode):
    env = MetaRecVectorEnv(8, world=leaving_world, autoreset_mode=mode)
    actions = random_actions(env, 24)
    play(env, actions[:12], seed=3)
    saved = env.get_state()
    rest = [env.step(a) for a in actions[12:]]
    other = MetaRecVectorEnv(8, world=leaving_world, autoreset_mode=mode)
    other.set_state(saved)
    for x, y in zip(rest, [other.step(a) for a in actions[12:]], strict=True):
        for u, v in zip(x[:4], y[:4], strict=True):
            assert np.array_equal(u, v)


def test_make_vec_takes_the_batched_implementation_and_a_step_limit(tiny_world, tmp_path):
    folder = tiny_world.save(tmp_path / "world")
    env = gymnasium.make_vec("MetaRec/Select-v0", num_envs=3, world=str(folder), max_episode_steps=2)
    assert isinstance(env, MetaRecVectorEnv)
    assert env.metadata["autoreset_mode"] is env.autoreset_mode is AutoresetMode.NEXT_STEP
    record = play(env, random_actions(env, 3))
    assert [bool(step[3].all()) for step in record] == [False, True, False]
    assert "world" in env.spec.to_json()


def test_statistics_count_real_requests_only(leaving_world):
    env = MetaRecVectorEnv(8, world=leaving_world, autoreset_mode="NextStep", record_statistics=True)
    total, length = np.zeros(8), np.zeros(8, int)
    ended = np.zeros(8, bool)
    seen = 0
    for _, reward, terminated, truncated, info, _ in play(env, random_actions(env, 60)):
        total, length = np.where(ended, 0.0, total + reward), np.where(ended, 0, length + 1)
        ended = terminated | truncated
        if ended.any():
            assert np.array_equal(info["_episode"], ended)
            assert np.allclose(info["episode"]["r"][ended], total[ended], atol=1e-5)
            assert np.array_equal(info["episode"]["l"][ended], length[ended])
            seen += int(ended.sum())
    assert seen > 20


def test_seeds_of_any_size_and_lists_of_seeds_are_taken(tiny_world):
    env = MetaRecVectorEnv(3, world=tiny_world)
    env.reset(seed=2**63 - 1)
    env.reset(seed=2**64 - 1)
    a, _ = env.reset(seed=[4, 5, 6])
    b, _ = env.reset(seed=4)
    assert np.array_equal(a, b)


def test_rewards_come_from_the_judge_so_changing_its_weights_changes_them(tiny_world):
    from dataclasses import replace

    from metarec_gym.response.frozen import FrozenResponse

    old = tiny_world.responses["A"]
    harsher = FrozenResponse(
        old.tensors | {"calibration": torch.tensor([[[1.0, -2.0]]])}, old.outcomes, old.feature_names
    )
    changed = replace(tiny_world, responses={"A": harsher, "B": harsher})
    expected = []
    for world in (tiny_world, changed):
        env = MetaRecVectorEnv(8, world=world, autoreset_mode="Disabled")
        play(env, np.full((1, 8), 2))
        expected.append(float(env.expected_reward.mean()))
    assert expected[1] < 0.5 * expected[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fold": "S"}, "fold is 'S', expected one of"),
        ({"horizon": 50}, "need lists of 100 items"),
        ({"unavailable": ["none"]}, "which the pool has not"),
        ({"unavailable": ["specialist_0", "specialist_1", "mixed"]}, "every strategy is unavailable"),
        ({"output": "jax"}, "expected 'numpy' or 'torch'"),
        ({"num_envs": 0}, "expected at least 1"),
        ({"horizon": 0}, "must be at least 1"),
    ],
)
def test_a_setting_that_does_not_fit_is_explained(tiny_world, settings, message):
    with pytest.raises(ValueError, match=message):
        MetaRecVectorEnv(**({"num_envs": 2, "world": tiny_world} | settings))


def test_misuse_is_explained(tiny_world):
    env = MetaRecVectorEnv(2, world=tiny_world)
    with pytest.raises(RuntimeError, match="call env.reset"):
        env.step(np.array([0, 0]))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must lie in 0\.\.2"):
        env.step(np.array([0, 3]))
    with pytest.raises(ValueError, match="expected integers"):
        env.step(np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="start states of the other fold"):
        env.reset(options={"start_state": tiny_world.starts_of("B")[:2]})
    with pytest.raises(ValueError, match="reset_mask has shape"):
        env.reset(options={"reset_mask": np.array([True])})


def test_no_global_random_state_is_touched(leaving_world):
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    env = MetaRecVectorEnv(8, world=leaving_world, autoreset_mode="SameStep")
    play(env, random_actions(env, 20))
    assert torch.equal(torch_before, torch.random.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_a_gpu_gives_the_same_slates_and_draws_as_cpu(leaving_world, gpu):
    cpu = MetaRecVectorEnv(256, world=leaving_world, output="torch", autoreset_mode="Disabled")
    far = MetaRecVectorEnv(256, world=leaving_world, output="torch", autoreset_mode="Disabled", device=gpu)
    actions = torch.from_numpy(random_actions(cpu, cpu.horizon))
    cpu.reset(seed=0)
    far.reset(seed=0)
    for action in actions:
        # the reference state is fed, so that one draw at a threshold cannot make everything after it differ
        far.set_state(cpu.get_state())
        a, b = cpu.step(action), far.step(action.to(gpu))
        assert torch.equal(a[4]["slate"], b[4]["slate"].cpu())
        assert torch.allclose(cpu.expected_reward, far.expected_reward.cpu(), atol=1e-5)
        assert float((a[1] != b[1].cpu()).float().mean()) < 1e-3
        assert torch.allclose(a[0], b[0].cpu(), atol=1e-5) or float((a[1] != b[1].cpu()).sum()) > 0


@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_what_comes_out_as_a_tensor_can_be_trained_on(output):
    env = MetaRecVectorEnv(3, output=output)
    env.reset(seed=0)
    obs, *_ = env.step(np.zeros(3, dtype=np.int64))
    weight = torch.ones(3, requires_grad=True)
    state = env.get_state()["user.profile"]
    loss = (weight * env.expected_reward).sum() + (weight * state[:3].sum(dim=1)).sum()
    if output == "torch":
        loss = loss + (weight * obs.sum(dim=1)).sum()
    loss.backward()
    assert weight.grad is not None
    assert bool(torch.isfinite(weight.grad).all())
    env.expected_reward.zero_()
