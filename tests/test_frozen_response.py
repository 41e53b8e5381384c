import math

import pytest
import torch

from metarec_gym.response.frozen import FrozenResponse, joint_probs, logistic, pad_rows


def make_response(*, n_items=6, dim=3, decays=(0.5, 0.9), outcomes=("watch", "like"), n_users=4, seed=0, **override):
    generator = torch.Generator().manual_seed(seed)
    n_outcomes, features, rank, hidden = len(outcomes), 4, 2, 5
    state_dim = (len(decays) + 1) * dim + 1

    def normal(*shape):
        return torch.randn(*shape, generator=generator) * 0.5

    tensors = {
        "item_input": normal(n_items, dim),
        "decays": torch.tensor(decays),
        "hidden_weight": normal(hidden, state_dim),
        "hidden_bias": normal(hidden),
        "tower_weight": normal(n_outcomes * rank, hidden),
        "tower_bias": normal(n_outcomes * rank),
        "item_output": normal(n_items, n_outcomes, rank),
        "item_bias": normal(n_items, n_outcomes),
        "calibration": torch.tensor([[1.1, -0.2]] * n_outcomes),
        "static_features": normal(n_items, features - 2),
        "dynamic_scale": torch.tensor([2.0, 3.0]),
        "effect_mean": normal(n_users, n_outcomes, features),
        "effect_chol": torch.eye(features).expand(n_users, n_outcomes, -1, -1) * 0.3,
        "pair_sd": torch.zeros(n_outcomes),
        "position_logit": torch.zeros(8),
        "leaving": torch.tensor([-torch.inf, 0.0]),
    } | override
    return FrozenResponse(tensors, outcomes, ("popularity", "age", "cooccurrence_recent", "cooccurrence_history"))


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


def test_the_probability_is_the_formula_of_the_docstring():
    response = make_response(seed=3)
    t = response.tensors
    state, item = response.start(torch.tensor([[0, 3, 2]])), 4
    effects = response.effects(0)[1:2]
    inputs = response.inputs(state)[0]
    hidden = torch.relu(t["hidden_weight"] @ inputs + t["hidden_bias"])
    tower = (t["tower_weight"] @ hidden + t["tower_bias"]).view(2, 2)
    recent, whole = t["item_input"][item] @ inputs[:3], t["item_input"][item] @ inputs[6:9]
    phi = torch.cat([t["static_features"][item], torch.stack([recent * 2.0, whole * 3.0])])
    got = response.conditional_probs(state, effects, torch.tensor([[item]]))[0, 0]
    for outcome in range(2):
        logit = tower[outcome] @ t["item_output"][item, outcome] + t["item_bias"][item, outcome]
        logit = (logit + phi @ effects[0, outcome]) * 1.1 - 0.2
        assert float(got[outcome]) == pytest.approx(1.0 / (1.0 + math.exp(-float(logit))), abs=1e-6)
    assert torch.allclose(response.features(response.inputs(state), torch.tensor([[item]]))[0, 0], phi, atol=1e-6)


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


def test_leaving_follows_unrewarded_requests():
    response = make_response(leaving=torch.tensor([-2.0, 0.5]))
    assert torch.allclose(response.leave_prob(torch.tensor([4.0])), logistic(torch.tensor([0.0])))


def test_the_hash_follows_the_content():
    assert make_response().hash == make_response().hash
    assert make_response().hash != make_response(pair_sd=torch.tensor([0.1, 0.0])).hash


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"item_bias has shape \(5, 2\), expected \(6, 2\)"):
        make_response(item_bias=torch.zeros(5, 2))


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="item_bias has values that are not finite"):
        make_response(item_bias=torch.full((6, 2), torch.nan))
