import math

import pytest
import torch

from metarec_gym.response.frozen import (
    FrozenResponse,
    LoggedResponse,
    item_exposure,
    joint_probs,
    logistic,
    make_judge,
    next_exposure,
    pad_rows,
    untimed,
)

NAMES = ("popularity", "age", "trend", "cooccurrence_recent", "cooccurrence_history")


def make_response(
    *,
    n_items=6,
    dim=3,
    decays=(0.5, 0.9),
    outcomes=("watch", "like"),
    n_users=4,
    members=1,
    rank=2,
    hidden=5,
    seed=0,
    **override,
):
    generator = torch.Generator().manual_seed(seed)
    n_outcomes, features = len(outcomes), len(NAMES)
    state_dim = (len(decays) + 1) * dim + 1

    def normal(*shape):
        return torch.randn(*shape, generator=generator) * 0.5

    tensors = {
        "item_input": normal(n_items, dim),
        "decays": torch.tensor(decays),
        "hidden_weight": normal(members, hidden, state_dim),
        "hidden_bias": normal(members, hidden),
        "tower_weight": normal(members, n_outcomes * rank, hidden),
        "tower_bias": normal(members, n_outcomes * rank),
        "item_output": normal(members, n_items, n_outcomes, rank),
        "item_bias": normal(members, n_items, n_outcomes),
        "calibration": torch.tensor([1.1, -0.2])
        + 0.1 * torch.arange(members)[:, None, None] * torch.ones(n_outcomes, 1),
        "static_features": normal(n_items, 2),
        "trend": torch.cat([torch.zeros(1, n_items), normal(2, n_items)]),
        "dynamic_scale": torch.tensor([2.0, 3.0]),
        "effect_mean": normal(n_users, n_outcomes, features),
        "effect_chol": torch.eye(features).expand(n_users, n_outcomes, -1, -1) * 0.3,
        "pair_sd": torch.zeros(n_outcomes),
        **untimed(8),
    } | override
    return FrozenResponse(tensors, outcomes, NAMES)


def test_the_recurrence_is_an_exponential_average_of_item_vectors():
    response = make_response(dim=1, decays=(0.5,), item_input=torch.tensor([[1.0], [2.0], [4.0], [0.0], [0.0], [0.0]]))
    state = response.start(torch.tensor([[-1, 0, 1]]))
    # 0.5 * 2 (newest) + 0.5 * 0.5 * 1 = 1.25; sum 3; count 2
    assert state.tolist() == [[1.25, 3.0, 2.0]]
    moved = response.step(state, torch.tensor([[2, 3]]), torch.tensor([[True, False]]))
    # 0.5 * 1.25 + 0.5 * 4 = 2.625
    assert moved.tolist() == [[2.625, 7.0, 3.0]]


def test_stepping_through_items_equals_starting_with_them():
    response = make_response()
    histories = torch.tensor([[-1, -1, 3, 1, 4, 2], [0, 5, 2, 2, 1, 0]])
    stepped = response.start(histories[:, :2])
    stepped = response.step(stepped, histories[:, 2:].clamp(min=0), torch.ones(2, 4, dtype=torch.bool))
    assert torch.allclose(stepped, response.start(histories), atol=1e-6)


def test_items_that_were_not_taken_leave_no_trace():
    response = make_response()
    state = response.start(torch.tensor([[1, 2]]))
    moved = response.step(state, torch.tensor([[3, 4, 5]]), torch.zeros(1, 3, dtype=torch.bool))
    assert torch.equal(moved, state)


def test_left_padding_changes_no_state():
    response = make_response()
    short, padded = torch.tensor([[1, 2]]), torch.tensor([[-1, -1, -1, 1, 2]])
    assert torch.allclose(response.start(short), response.start(padded), atol=1e-7)


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("period", [0, 2])
def test_the_probability_is_the_formula_of_the_docstring(member, period):
    response = make_response(seed=3, members=2)
    t = response.tensors
    state, item = response.start(torch.tensor([[0, 3, 2]])), 4
    effects = response.effects(0)[1:2]
    inputs = response.inputs(state)[0]
    hidden = torch.relu(t["hidden_weight"][member] @ inputs + t["hidden_bias"][member])
    tower = (t["tower_weight"][member] @ hidden + t["tower_bias"][member]).view(2, 2)
    recent, whole = t["item_input"][item] @ inputs[:3], t["item_input"][item] @ inputs[6:9]
    dynamic = torch.stack([t["trend"][period, item], recent * 2.0, whole * 3.0])
    phi = torch.cat([t["static_features"][item], dynamic])
    rows, items = torch.tensor([member]), torch.tensor([[item]])
    got = response.conditional_probs(state, effects, items, member=rows, period=torch.tensor([period]))[0, 0]
    for outcome in range(2):
        logit = tower[outcome] @ t["item_output"][member, item, outcome] + t["item_bias"][member, item, outcome]
        logit = (logit + phi @ effects[0, outcome]) * (1.1 + 0.1 * member) - 0.2 + 0.1 * member
        assert float(got[outcome]) == pytest.approx(1.0 / (1.0 + math.exp(-float(logit))), abs=1e-6)
    features = response.features(response.inputs(state), items, torch.tensor([period]))
    assert torch.allclose(features[0, 0], phi, atol=1e-6)


def test_a_row_has_the_same_bits_whatever_members_the_other_rows_have():
    response = make_response(members=3)
    state, effects = response.start(torch.tensor([[1, 2]] * 16)), response.effects(0)[:1].expand(16, -1, -1)
    items = torch.tensor([[3, 4]]).expand(16, -1)
    mixed = torch.arange(16) % 3
    of_all = [response.conditional_probs(state, effects, items, member=torch.full((16,), m)) for m in range(3)]
    got = response.conditional_probs(state, effects, items, member=mixed)
    assert torch.equal(got, torch.stack([of_all[int(m)][row] for row, m in enumerate(mixed)]))
    assert not torch.equal(of_all[0], of_all[1])


@pytest.mark.parametrize(("dim", "hidden"), [(8, 5), (48, 24), (64, 96)])
def test_a_row_of_a_large_batch_has_the_bits_of_a_small_one(dim, hidden):
    # large batches ask each row's own member and move only who took something; small ones compute everything and choose
    response, generator = (
        make_response(members=3, n_items=40, dim=dim, hidden=hidden, rank=8),
        torch.Generator().manual_seed(5),
    )
    state = response.start(torch.randint(-1, 40, (160, 12), generator=generator))
    effects = response.effects(0)[torch.arange(160) % 4]
    items = torch.rand(160, 40, generator=generator).argsort(dim=1)[:, :6]
    engaged = torch.rand(160, 6, generator=generator) < 0.3
    member = torch.randint(0, 3, (160,), generator=generator)
    # one member with a single row: its block is filled up
    member[member == 2] = 0
    member[77] = 2
    probs, moved = (
        response.conditional_probs(state, effects, items, member=member),
        response.step(state, items, engaged),
    )
    for begin in range(0, 160, 16):
        rows = slice(begin, begin + 16)
        few = response.conditional_probs(state[rows], effects[rows], items[rows], member=member[rows])
        assert torch.equal(probs[rows], few)
        assert torch.equal(moved[rows], response.step(state[rows], items[rows], engaged[rows]))
    assert torch.equal(moved[~engaged.any(dim=1)], state[~engaged.any(dim=1)])
    assert not torch.equal(moved, state)


def test_a_large_batch_in_which_nobody_takes_anything_stays_as_it_is():
    response = make_response()
    state = response.start(torch.tensor([[1, 2]] * 80))
    assert torch.equal(response.step(state, torch.zeros(80, 2, dtype=torch.int64), torch.zeros(80, 2) > 0), state)


def test_a_gate_shift_moves_the_gate_and_nothing_that_follows_it():
    response = make_response()
    state, effects, items = response.start(torch.tensor([[1]])), response.effects(0)[:1], torch.tensor([[3, 4]])
    plain = torch.logit(response.conditional_probs(state, effects, items))
    moved = torch.logit(response.conditional_probs(state, effects, items, gate_shift=torch.tensor([[0.5, -2.0]])))
    assert torch.allclose(moved - plain, torch.tensor([[[0.5, 0.0], [-2.0, 0.0]]]), atol=1e-5)


def test_the_same_item_gets_the_same_probability_in_any_slate():
    response = make_response()
    state, effects = pad_rows(response.start(torch.tensor([[1, 2]]))), pad_rows(response.effects(0)[:1])
    one = response.conditional_probs(state, effects, torch.tensor([[3, 4]]).expand(16, -1))
    two = response.conditional_probs(state, effects, torch.tensor([[5, 3]]).expand(16, -1))
    assert torch.equal(one[0, 0], two[0, 1])


def test_position_moves_the_gate_only():
    position = torch.tensor([0.0, -1.0, 0, 0, 0, 0, 0, 0])
    response, flat = make_response(position_logit=position), make_response()
    state, effects = response.start(torch.tensor([[1]])), response.effects(0)[:1]
    items = torch.tensor([[3, 4]])
    with_position = torch.logit(response.conditional_probs(state, effects, items))
    without = torch.logit(flat.conditional_probs(state, effects, items))
    assert torch.allclose(with_position - without, torch.tensor([[[0.0, 0.0], [-1.0, 0.0]]]), atol=1e-5)


def test_effects_are_drawn_once_for_each_seed_member_and_user():
    response = make_response()
    assert torch.equal(response.effects(1), response.effects(1))
    assert not torch.equal(response.effects(1), response.effects(2))
    assert not torch.equal(response.effects(1), response.effects(1, member=1))
    many = torch.stack([response.effects(s) for s in range(400)])
    assert torch.allclose(many.mean(dim=0), response.tensors["effect_mean"], atol=0.08)
    assert float(many.std(dim=0).mean()) == pytest.approx(0.3, abs=0.02)


def test_joint_probabilities_multiply_by_the_gate():
    joint = joint_probs(torch.tensor([[0.5, 0.4, 0.1]]))
    assert torch.allclose(joint, torch.tensor([[0.5, 0.2, 0.05]]))


def test_users_never_leave_a_world_that_cannot_identify_leaving():
    assert make_response().leave_prob(torch.tensor([0.0, 50.0])).tolist() == [0.0, 0.0]


def test_leaving_follows_boredom_quality_and_repetition():
    response = make_response(leaving=torch.tensor([-2.0, 0.5, -3.0, 0.25]))
    one = torch.ones(1)
    # -2 + 0.5 * 4 = 0
    assert torch.allclose(response.leave_prob(4.0 * one), logistic(torch.tensor([0.0])))
    # -2 + 0.5 * 1 - 3 * 0.2 + 0.25 * 2 = -1.6
    assert torch.allclose(response.leave_prob(one, 0.2 * one, 2.0 * one), logistic(torch.tensor([-1.6])))


def test_return_hazards_move_with_their_covariates_in_every_bin():
    timing = {
        "return_edges": torch.tensor([0.5, 24.0, 168.0]),
        "return_baseline": torch.tensor([-1.0, 0.0]),
        "return_weight": torch.tensor([0.5, 0.0, 0.0, -1.0]),
    }
    response = make_response(**timing)
    assert response.has_return
    assert not make_response().has_return
    hazards = response.return_hazards(torch.tensor([[2.0, 9.0, 9.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))
    # weights: 0.5 * 2 = 1, and -1
    assert torch.allclose(hazards, logistic(torch.tensor([[0.0, 1.0], [-2.0, -1.0]])))


def test_exposure_fades_and_gains_the_mean_category_of_the_slate():
    categories = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]])
    valid = torch.tensor([[True, True, False]])
    exposure = torch.tensor([[1.0, 0.0]])
    # what an item of category 0 and one of both meet now
    assert item_exposure(exposure, categories).tolist() == [[1.0, 0.5, 0.0]]
    # 0.8 * [1, 0] + mean of [1, 0] and [.5, .5]
    assert torch.allclose(next_exposure(exposure, categories, valid), torch.tensor([[1.55, 0.25]]))


def logged(**override):
    # user 0 took item 0 and liked it, refused item 1, never met item 2
    answers = torch.tensor([[[1.0, 1.0], [0.0, 0.0], [torch.nan, torch.nan]], [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]])
    return LoggedResponse({"answers": answers, **untimed(), **override}, ("watch", "like"))


def test_logged_answers_are_looked_up():
    judge = logged()
    assert judge.observed.tolist() == [[True, True, False], [True, True, True]]
    users, items = torch.tensor([0, 1]), torch.tensor([[0, 1], [2, 1]])
    got = judge.conditional_probs(judge.start(items), judge.effects(0)[users], items, user=users)
    assert got.tolist() == [[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]]


def test_a_pair_that_the_log_never_saw_is_refused():
    judge, items = logged(), torch.tensor([[2]])
    with pytest.raises(ValueError, match="user 0 was never observed with item 2"):
        judge.conditional_probs(judge.start(items), judge.effects(0)[:1], items, user=torch.tensor([0]))


def test_a_setting_that_would_change_logged_answers_is_refused():
    judge, items = logged(), torch.tensor([[0]])
    with pytest.raises(ValueError, match="would change answers that were logged"):
        judge.conditional_probs(
            judge.start(items), judge.effects(0)[:1], items, user=torch.tensor([0]), gate_shift=torch.zeros(1, 1)
        )


def test_the_tensors_say_which_kind_of_judge_they_are():
    assert isinstance(make_judge(logged().tensors, ("watch", "like"), ()), LoggedResponse)
    model = make_response()
    assert isinstance(make_judge(model.tensors, model.outcomes, model.feature_names), FrozenResponse)
    assert make_judge(model.tensors, model.outcomes, model.feature_names).hash == model.hash


def test_the_hash_follows_the_content():
    assert make_response().hash == make_response().hash
    assert make_response().hash != make_response(pair_sd=torch.tensor([0.1, 0.0])).hash


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"item_bias has shape \(1, 5, 2\), expected \(1, 6, 2\)"):
        make_response(item_bias=torch.zeros(1, 5, 2))


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="item_bias has values that are not finite"):
        make_response(item_bias=torch.full((1, 6, 2), torch.nan))
