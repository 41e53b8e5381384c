"""Blend and Slots beside Select: hand-worked slates, credit, costs, and one answer for one item whoever shows it."""

import math
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.envs.actions import blend, blend_weights, next_scored, next_unshown, slots

ACTIONS = ("select", "blend", "slots")


def make(world, action, n=1, **settings):
    return MetaRecVectorEnv(
        n, world=world, action=action, **({"autoreset_mode": "Disabled", "output": "torch"} | settings)
    )


@pytest.fixture(scope="module")
def staying_world(leaving_world):
    """`leaving_world` without leaving."""
    judge = leaving_world.judge("A")
    judge = judge.replaced(leaving=torch.tensor([-torch.inf, 0.0, 0.0, 0.0]))
    return replace(leaving_world, responses={"A": judge, "B": judge})


def cold_start(world, user=0):
    return int(torch.nonzero(world.tensors["start_user"] == user)[0])


def random_actions(env, steps, seed=0):
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(steps)]


def test_a_blend_worked_out_by_hand(tiny_world):
    """specialist_0 lists 0 2 4 .., specialist_1 1 3 5 .., mixed 0 1 2 ..; equal weights put 0 and then 1 in front.

    Item 0 stands first in two lists, item 1 first and second, item 2 second and third.
    """
    env = make(tiny_world, "blend", cost_weight=0.25)
    env.reset(seed=4, options={"start_state": [cold_start(tiny_world)]})
    obs, reward, _, _, info = env.step(torch.zeros(1, 3))
    assert info["slate"].tolist() == [[0, 1]]
    assert info["strategy_weights"].tolist() == [pytest.approx([1 / 3] * 3)]
    # all three are asked: relative costs 0.2, 0.6 and 1
    assert float(info["reward_cost"]) == pytest.approx(-0.25 * 1.8)
    assert float(env.expected_reward) == pytest.approx(0.5 + 0.1 - 0.45, abs=1e-6)
    assert float(reward) == pytest.approx(float(info["outcomes"].sum()) - 0.45, abs=1e-6)
    blocks = {name: obs[0, where].tolist() for name, where in env.feature_slices.items()}
    assert blocks["last_strategy"] == pytest.approx([1 / 3] * 3)
    assert blocks["strategy_count"] == pytest.approx([math.log(4 / 3) / math.log(5)] * 3, abs=1e-5)
    third = float(reward) / 3
    assert blocks["strategy_mean_reward"] == pytest.approx([math.tanh(third / (4 / 3) / 0.6)] * 3, abs=1e-5)


def test_a_fusion_worked_out_by_hand():
    """Lists 0 1 2 and 2 1 0 of slates of one item: depth 4, weights 0.5 and 1."""
    lists = torch.tensor([[[0, 1, 2], [2, 1, 0]]], dtype=torch.int32)
    shown = torch.tensor([[0, 0, 0, 1]], dtype=torch.uint8)
    everyone = torch.ones(1, 2, dtype=torch.bool)
    action = torch.tensor([[0.0, 1.0]])
    # 1 / (60 + rank): item 0 0.5 / 61 + 1 / 63 = .02407, item 1 1.5 / 62 = .02419, item 2 0.5 / 63 + 1 / 61 = .02433
    assert blend(lists, None, shown, everyone, action, 1, "rank").slate.tolist() == [[2]]
    assert blend(lists, None, shown, everyone, -action, 1, "rank").slate.tolist() == [[0]]
    # linear: rank 1 counts 1, rank 2 3/4, rank 3 1/2: item 0 1, item 1 1.125, item 2 1.25
    assert blend(lists, None, shown, everyone, action, 1, "linear_rank").slate.tolist() == [[2]]
    assert blend(lists, None, shown, everyone, action, 3, "linear_rank").slate.tolist() == [[2, 1, 0]]
    # equal weights: all tie in linear ranks; the lower index goes first
    assert blend(lists, None, shown, everyone, torch.zeros(1, 2), 3, "linear_rank").slate.tolist() == [[0, 1, 2]]
    # item 2 was shown: ranks are counted without it
    shown[0, 2] = 1
    assert blend(lists, None, shown, everyone, action, 3, "rank").slate.tolist() == [[1, 0, -1]]
    # the second strategy is out of service: it has no say and is asked all the same
    plan = blend(lists, None, shown, torch.tensor([[True, False]]), action, 3, "rank")
    assert plan.slate.tolist() == [[0, 1, -1]]
    assert plan.asked.tolist() == [[True, True]]


def test_a_fusion_of_scores_worked_out_by_hand():
    """List 0 1 2 is sure of item 0 (z 3, 0, 0), list 2 1 0 of nothing (1, 0.5, 0): weights 0.5 and 1."""
    lists = torch.tensor([[[0, 1, 2], [2, 1, 0]]], dtype=torch.int32)
    scores = torch.tensor([[[3.0, 0.0, 0.0], [1.0, 0.5, 0.0]]], dtype=torch.float16)
    shown = torch.tensor([[0, 0, 0, 1]], dtype=torch.uint8)
    everyone = torch.ones(1, 2, dtype=torch.bool)
    action = torch.tensor([[0.0, 1.0]])
    # item 0 0.5 * 3 + 0 = 1.5, item 1 0 + 0.5, item 2 0 + 1, and 0.0015 for each
    assert blend(lists, scores, shown, everyone, action, 3, "zscore").slate.tolist() == [[0, 2, 1]]
    assert blend(lists, scores, shown, everyone, action, 3, "rank").slate.tolist() == [[2, 1, 0]]
    # item 0 was shown: of the first list 1 and 2 are left, both of z 0
    shown[0, 0] = 1
    assert blend(lists, scores, shown, everyone, action, 3, "zscore").slate.tolist() == [[2, 1, -1]]
    # the second strategy is out of service: what is left ties, and is served all the same, the lower index first
    plan = blend(lists, scores, shown, torch.tensor([[True, False]]), action, 3, "zscore")
    assert plan.slate.tolist() == [[1, 2, -1]]


def test_a_fusion_by_scores_without_scores_is_refused_and_never_falls_back_to_ranks():
    shown, everyone = torch.tensor([[0, 0, 1]], dtype=torch.uint8), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="a fusion by zscore needs the scores of the lists"):
        blend(torch.tensor([[[0, 1]]]), None, shown, everyone, torch.ones(1, 1), 1, "zscore")


def test_a_fusion_of_scores_never_serves_an_item_that_only_a_weightless_strategy_lists():
    lists = torch.tensor([[[0, 4], [2, 3]]], dtype=torch.int32)
    scores = torch.tensor([[[9.0, 8.0], [0.0, 0.0]]], dtype=torch.float16)
    shown = torch.tensor([[0, 0, 0, 0, 1]], dtype=torch.uint8)
    plan = blend(lists, scores, shown, torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-1.0, 1.0]]), 2, "zscore")
    assert plan.slate.tolist() == [[2, 3]]
    assert plan.asked.tolist() == [[False, True]]


@pytest.mark.parametrize("session_requests", [None, 2])
def test_a_blend_by_scores_of_one_strategy_serves_its_list(tiny_world, session_requests):
    """Weight on one strategy alone: any fusion then keeps its order, in one session and in several."""
    slates = []
    for fusion in ("rank", "zscore"):
        env = MetaRecVectorEnv(
            8,
            world=tiny_world,
            action="blend",
            fusion=fusion,
            session_requests=session_requests,
            autoreset_mode="Disabled",
        )
        env.reset(seed=0)
        action = np.full((8, 3), -1.0, dtype=np.float32)
        action[:, 1] = 1.0
        slates.append([env.step(action)[4]["slate"].tolist() for _ in range(4)])
    assert slates[0] == slates[1]


def test_weights_reach_from_nothing_to_one_and_all_zero_asks_everybody():
    action = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, -1.0, -1.0], [-3.0, 5.0, -1.0 + 1e-6]])
    assert blend_weights(action).tolist() == [[0.0, 0.5, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]


def test_a_strategy_without_weight_is_not_asked_and_costs_nothing(tiny_world):
    env = make(tiny_world, "blend", cost_weight=1.0)
    env.reset(seed=0, options={"start_state": [cold_start(tiny_world)]})
    _, _, _, _, info = env.step(torch.tensor([[1.0, -1.0, -1.0]]))
    assert info["slate"].tolist() == [[0, 2]]
    assert float(info["reward_cost"]) == pytest.approx(-0.2)


def test_slots_worked_out_by_hand(tiny_world):
    """mixed takes item 0, so that specialist_0 goes on with item 2; then specialist_0 with 4 and mixed with 1."""
    env = make(tiny_world, "slots", cost_weight=0.5)
    env.reset(seed=4, options={"start_state": [cold_start(tiny_world)]})
    obs, reward, _, _, info = env.step(torch.tensor([[2, 0]]))
    assert info["slate"].tolist() == [[0, 2]]
    assert info["slot_strategy"].tolist() == [[2, 0]]
    # two strategies are asked: 0.5 * (1 + 0.2)
    assert float(info["reward_cost"]) == pytest.approx(-0.6)
    click = info["outcomes"][0, :, 0].tolist()
    assert float(reward) == pytest.approx(sum(click) - 0.6, abs=1e-6)
    blocks = {name: obs[0, where].tolist() for name, where in env.feature_slices.items()}
    assert blocks["last_strategy"] == [0.5, 0.0, 0.5]
    # each owns half a request: credit its own click less its own cost, over 0.5 + 1, in typical rewards of 0.6
    credits = [(click[1] - 0.1) / 1.5 / 0.6, 0.0, (click[0] - 0.5) / 1.5 / 0.6]
    assert blocks["strategy_mean_reward"] == pytest.approx([math.tanh(c) for c in credits], abs=1e-5)
    _, _, _, _, info = env.step(torch.tensor([[0, 2]]))
    assert info["slate"].tolist() == [[4, 1]]


def test_a_place_whose_list_is_used_up_or_out_of_service_stays_empty():
    lists = torch.tensor([[[0, 1], [0, 3], [2, 1]]], dtype=torch.int32)  # 3 = no item
    shown = torch.tensor([[0, 0, 0, 1]], dtype=torch.uint8)
    everyone = torch.ones(1, 2, dtype=torch.bool)
    plan = slots(lists, shown, everyone, torch.tensor([[0, 1, 0]]))
    assert plan.slate.tolist() == [[0, -1, 2]]
    assert plan.share.tolist() == [pytest.approx([2 / 3, 1 / 3])]
    assert slots(lists, shown, torch.tensor([[True, False]]), torch.tensor([[0, 1, 0]])).slate.tolist() == [[0, -1, 2]]
    assert slots(lists, shown, torch.tensor([[False, True]]), torch.tensor([[0, 1, 0]])).slate.tolist() == [[-1, 0, -1]]


def test_the_next_items_of_several_lists_leave_out_what_was_shown():
    lists = torch.tensor([[[3, 1, 4], [2, 0, 5]]], dtype=torch.int32)  # 5 = no item
    shown = torch.tensor([[0, 1, 0, 0, 0, 1]], dtype=torch.uint8)
    assert next_unshown(lists, shown, 2).tolist() == [[[3, 4], [2, 0]]]


def test_the_same_item_state_and_place_give_the_same_answer_in_select_blend_and_slots(tiny_world):
    """mixed alone, an equal blend and a draft of the two specialists all show 0 1, then 2 3, then 4 5 ..."""
    same = {
        "select": np.full(64, 2),
        "blend": np.zeros((64, 3), dtype=np.float32),
        "slots": np.tile([0, 1], (64, 1)),
    }
    settings = {"position_decay": 0.5, "fatigue": 0.3, "output": "numpy"}
    options = {"start_state": [cold_start(tiny_world)] * 64, "noise": list(range(64))}
    envs = {name: make(tiny_world, name, 64, **settings) for name in ACTIONS}
    for env in envs.values():
        env.reset(seed=1, options=options)
    for request in range(4):
        infos = {name: env.step(same[name])[4] for name, env in envs.items()}
        for name in ("blend", "slots"):
            assert infos[name]["slate"].tolist() == [[2 * request, 2 * request + 1]] * 64
            assert np.array_equal(infos[name]["slate"], infos["select"]["slate"])
            assert np.array_equal(infos[name]["outcomes"], infos["select"]["outcomes"])
            assert torch.equal(envs[name].expected_reward, envs["select"].expected_reward)
    assert infos["select"]["outcomes"].any()


@pytest.mark.parametrize("action", ACTIONS)
def test_no_item_is_shown_twice_in_an_episode(staying_world, action):
    env = make(staying_world, action, 16, output="numpy")
    env.reset(seed=0)
    slates = np.concatenate([env.step(a)[4]["slate"] for a in random_actions(env, env.horizon)], axis=1)
    for row in slates:
        assert (row >= 0).all()
        assert len(set(row.tolist())) == env.horizon * env.slate_size


@pytest.mark.parametrize("action", ACTIONS)
def test_credits_sum_to_the_return_and_shares_to_the_requests(staying_world, action):
    env = make(staying_world, action, 16, output="numpy", cost_weight=0.2)
    env.reset(seed=0)
    total = sum(env.step(a)[1] for a in random_actions(env, 9))
    state = env.get_state()
    assert np.allclose(state["user.strategy_reward"].sum(dim=1)[:16], total, atol=1e-4)
    assert np.allclose(state["user.strategy_count"].sum(dim=1)[:16], 9.0, atol=1e-4)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_row_has_the_same_bits_in_any_batch(leaving_world, action):
    env = make(leaving_world, action, 21, output="numpy", autoreset_mode="SameStep")
    actions = random_actions(env, 20)
    env.reset(seed=5)
    many = [env.step(a) for a in actions]
    for row in (0, 20):
        alone = make(leaving_world, action, 1, output="numpy", autoreset_mode="SameStep")
        alone.reset(seed=5 + row)
        for a, step in zip(actions, many, strict=True):
            one = alone.step(a[row : row + 1])
            for x, y in zip(step[:4], one[:4], strict=True):
                assert np.array_equal(x[row], y[0])


@pytest.mark.parametrize(("action", "env_id"), [("select", "Select"), ("blend", "Blend"), ("slots", "Slots")])
def test_ids_make_both_kinds_of_environment_with_json_specs(tiny_world, tmp_path, action, env_id):
    folder = str(tiny_world.save(tmp_path / "world"))
    single = gymnasium.make(f"MetaRec/{env_id}-v0", world=folder, schedule=[["mixed", "removed", 2]])
    batch = gymnasium.make_vec(f"MetaRec/{env_id}-v0", num_envs=3, world=folder, cost_weight=[0.0, 1.0])
    assert single.unwrapped._batch.config.action == batch.config.action == action
    assert batch.single_action_space == single.action_space
    for env in (single, batch):
        again = gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json())
        assert again.kwargs["world"] == folder
    obs, _ = batch.reset(seed=0)
    obs, *_ = batch.step(batch.action_space.sample())
    assert batch.observation_space.contains(obs)


def test_masks_come_in_the_shape_that_maskable_ppo_asks_for(tiny_world):
    for action, shape in (("select", (4, 3)), ("blend", (4, 3)), ("slots", (4, 6))):
        env = make(tiny_world, action, 4, output="numpy", unavailable=["specialist_1"])
        _, info = env.reset(seed=0)
        assert info["action_mask"].tolist() == [[1, 0, 1]] * 4
        assert env.action_masks().shape == shape
        assert env.action_masks().sum() == 4 * 2 * shape[1] // 3


def test_an_action_that_does_not_fit_is_explained(tiny_world):
    slot_env, blend_env = make(tiny_world, "slots", 2), make(tiny_world, "blend", 2)
    for env in (slot_env, blend_env):
        env.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected integers \(2, 2\)"):
        slot_env.step(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"actions must lie in 0\.\.2"):
        slot_env.step(np.array([[0, 1], [0, 3]]))
    with pytest.raises(ValueError, match=r"expected numbers in \[-1, 1\] \(2, 3\)"):
        blend_env.step(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="not a number"):
        blend_env.step(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="action is 'choose', expected one of"):
        make(tiny_world, "choose")
    with pytest.raises(TypeError, match=r"no settings \['patients'\]"):
        make(tiny_world, "select", patients=3)


def test_the_next_items_do_not_depend_on_whether_another_list_runs_out():
    generator = torch.Generator().manual_seed(2)
    lists = torch.stack([torch.randperm(30, generator=generator)[:20] for _ in range(6)]).view(3, 2, 20).to(torch.int32)
    shown = torch.zeros(3, 31, dtype=torch.uint8)
    shown[:, -1] = 1
    shown[torch.rand(3, 31, generator=generator) < 0.4] = 1
    scores = torch.randn(3, 2, 20, generator=generator).to(torch.float16)
    full, worth = next_scored(lists, scores, shown, 4)
    short = torch.nn.functional.pad(lists[:1], (0, 0))
    short[:, 1, 2:] = 30
    mixed, mixed_worth = next_scored(torch.cat([lists, short]), scores[[0, 1, 2, 0]], shown[[0, 1, 2, 0]], 4)
    expected = [[[i for i in line if not shown[row, i]][:4] for line in lists[row].tolist()] for row in range(3)]
    assert full.tolist() == expected == mixed[:3].tolist()
    assert worth.equal(mixed_worth[:3])
    assert -1 in mixed[3, 1].tolist()
