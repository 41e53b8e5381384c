import dataclasses
import json
import math

import pytest
import torch

from metarec_gym.data import FOLD_A, FOLD_B, Dataset, encode, synthetic_log
from metarec_gym.response.fitting import fit_response
from metarec_gym.response.frozen import FrozenResponse
from metarec_gym.response.model import ResponseConfig, Rows, item_space, prefix_inputs
from metarec_gym.seeding import torch_generator

SMALL = ResponseConfig(
    dim=12,
    hidden=16,
    rank=6,
    negatives=64,
    batch_size=128,
    max_epochs=8,
    inner_folds=3,
    averaging=0.9,
    learning_rate=2e-2,
    effect_negatives=24,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return encode(synthetic_log(0, n_users=240, n_items=120, events_per_user=(8, 40))[0], seed=0)


@pytest.fixture(scope="module")
def fitted(dataset: Dataset) -> tuple[FrozenResponse, dict]:
    users, others = dataset.users_in(FOLD_A), dataset.users_in(FOLD_B)
    return fit_response(dataset, users, seed=1, config=SMALL, heldout_users=others)


@pytest.fixture(scope="module")
def shown() -> Dataset:
    """A log that also says what was shown and not taken: one of three shown items is watched."""
    return encode(synthetic_log(2, n_users=150, n_items=60, events_per_user=(10, 25), shown_per_event=2)[0], seed=0)


@pytest.fixture(scope="module")
def fitted_shown(shown: Dataset) -> tuple[FrozenResponse, dict]:
    users, others = shown.users_in(FOLD_A), shown.users_in(FOLD_B)
    return fit_response(shown, users, seed=1, config=SMALL, heldout_users=others)


def test_the_judge_beats_popularity_and_the_base_rate_on_users_it_never_saw(fitted: tuple[FrozenResponse, dict]):
    watch = fitted[1]["outcomes"]["watch"]["heldout"]["log_loss"]
    like = fitted[1]["outcomes"]["like"]["heldout"]["log_loss"]
    assert watch["judge"] < watch["popularity"] < watch["base_rate"]
    assert like["judge"] < like["base_rate"]
    # users like what is of their type, which no popularity can know
    assert like["judge"] < like["popularity"]


def test_probabilities_for_users_never_seen_are_calibrated(fitted: tuple[FrozenResponse, dict]):
    for entry in fitted[1]["outcomes"].values():
        assert 0.7 < entry["heldout"]["calibration_slope"] < 1.4
        assert entry["heldout"]["rate_predicted"] == pytest.approx(entry["heldout"]["rate_observed"], rel=0.15)


def test_a_uniformly_drawn_unseen_item_is_taken_at_the_declared_base_rate(
    dataset: Dataset, fitted: tuple[FrozenResponse, dict]
):
    response, metrics = fitted
    users = dataset.users_in(FOLD_A)
    # by default the density: mean engaged items of a user over the number of items
    density = float(dataset.engaged_counts()[users].double().mean()) / dataset.n_items
    assert metrics["base_rate"] == pytest.approx(density)
    lengths = (dataset.engaged_counts()[users] // 2).clamp(min=1)
    histories = dataset.histories(users, lengths)
    generator = torch_generator(0, "unseen")
    items = torch.randint(dataset.n_items, (len(users), 400), generator=generator)
    unseen = ~(items[:, :, None] == histories[:, None, :]).any(dim=2)
    p = [
        response.conditional_probs(response.start(histories), response.effects(draw)[users], items, position=False)[
            ..., 0
        ][unseen].mean()
        for draw in range(8)
    ]
    assert float(torch.stack(p).mean()) == pytest.approx(density, rel=0.1)


def test_a_declared_base_rate_moves_the_gate_and_nothing_else(dataset: Dataset, fitted: tuple[FrozenResponse, dict]):
    users = dataset.users_in(FOLD_A)
    half = dataclasses.replace(SMALL, base_rate=0.5 * fitted[1]["base_rate"])
    response, metrics = fit_response(dataset, users, seed=1, config=half)
    assert metrics["uniform_rate"] == pytest.approx(half.base_rate, rel=1e-3)
    assert response.tensors["calibration"][0, 1] < fitted[0].tensors["calibration"][0, 1]
    for name in ("item_output", "item_bias", "hidden_weight"):
        assert torch.equal(response.tensors[name], fitted[0].tensors[name])


def test_what_a_log_of_positives_cannot_identify_is_zero(fitted: tuple[FrozenResponse, dict]):
    t = fitted[0].tensors
    assert t["pair_sd"].abs().max() == 0
    assert t["position_logit"].abs().max() == 0
    assert float(fitted[0].leave_prob(torch.tensor([30.0]))) == 0.0
    # a user's own rate of taking what is shown
    assert t["effect_mean"][:, 0, 0].abs().max() == 0
    assert t["effect_chol"][:, 0, 0].abs().max() == 0
    # the rate of likes among what was taken is seen, and differs or not as the log says
    assert t["effect_mean"][:, 1, 0].abs().max() > 0


def test_the_same_seed_gives_the_same_judge_whatever_the_other_folds_did(
    dataset: Dataset, fitted: tuple[FrozenResponse, dict]
):
    users = dataset.users_in(FOLD_A)
    own = torch.isin(dataset.user, users)
    item = torch.where(own, dataset.item, dataset.n_items - 1 - dataset.item)
    outcome = dataset.outcome.clone()
    outcome[~own, 1] = 1.0 - outcome[~own, 1]
    other = dataclasses.replace(dataset, item=item, outcome=outcome)
    # `fitted` also computed metrics on held-out users: they change nothing either
    assert fit_response(other, users, seed=1, config=SMALL)[0].hash == fitted[0].hash


def test_metrics_can_be_written_as_json(fitted: tuple[FrozenResponse, dict]):
    text = json.dumps(fitted[1], allow_nan=False)
    assert json.loads(text)["outcomes"]["watch"]["heldout"]["n_events"] > 500


def test_prefix_states_are_those_of_the_frozen_judge(dataset: Dataset, fitted: tuple[FrozenResponse, dict]):
    response, users = fitted[0], dataset.users_in(FOLD_B)[:5]
    rows = Rows.of(dataset, users)
    mine = prefix_inputs(response.tensors["item_input"], response.tensors["decays"], rows)
    frozen = response.inputs(response.start(dataset.histories(rows.users[rows.user], rows.rank)))
    assert torch.allclose(mine, frozen, atol=1e-5)


def test_prefix_states_skip_rows_that_were_not_engaged(shown: Dataset):
    users = shown.users_in(FOLD_A)[:4]
    rows = Rows.of(shown, users)
    space = item_space(shown, rows, SMALL, 0)
    tensors = {"item_input": space.item_input, "decays": space.decays}
    counts = torch.expm1(7.0 * prefix_inputs(**tensors, rows=rows)[:, -1]).round().to(torch.int64)
    assert torch.equal(counts, rows.rank)
    assert int(rows.rank.max()) < rows.n // 4


def test_negatives_are_items_the_user_had_not_taken(dataset: Dataset):
    rows = Rows.of(dataset, dataset.users_in(FOLD_A)[:6])
    index = torch.arange(rows.n)
    items = rows.unseen_items(index, 20, torch.ones(dataset.n_items), torch_generator(0, "negatives"))
    for row in range(rows.n):
        upto = (rows.user == rows.user[row]) & (rows.rank <= rows.rank[row])
        assert not set(items[row].tolist()) & set(rows.item[upto].tolist())


def test_sorted_keys_and_the_dense_table_agree_on_what_was_seen(dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    rows = Rows.of(dataset, dataset.users_in(FOLD_A)[:20])
    items = torch.arange(dataset.n_items)
    dense = rows.seen(rows.user, rows.rank, items)
    monkeypatch.setattr("metarec_gym.response.model._DENSE_CELLS", 0)
    assert torch.equal(rows.seen(rows.user, rows.rank, items), dense)
    assert torch.equal(dense.sum(dim=1), rows.rank)


def test_an_item_unseen_in_the_fold_has_a_zero_vector_and_borrows_from_its_category(dataset: Dataset):
    users = dataset.users_in(FOLD_A)
    item = torch.where(torch.isin(dataset.user, users) & (dataset.item == 7), 11, dataset.item)
    response = fit_response(dataclasses.replace(dataset, item=item), users, seed=1, config=SMALL)[0]
    assert response.tensors["item_input"][7].abs().max() == 0
    own = response.tensors["item_output"][7, 0]
    same = response.tensors["item_output"][7 % 4 :: 4, 0].mean(dim=0)
    other = response.tensors["item_output"][(7 + 1) % 4 :: 4, 0].mean(dim=0)
    assert (own - same).norm() < (own - other).norm()


def test_a_log_with_impressions_keeps_its_own_rate(fitted_shown: tuple[FrozenResponse, dict]):
    response, metrics = fitted_shown
    watch = metrics["outcomes"]["watch"]["heldout"]
    # one of three shown items is watched
    assert not metrics["sampled_negatives"]
    assert watch["rate_observed"] == pytest.approx(1 / 3, abs=0.01)
    assert watch["rate_predicted"] == pytest.approx(1 / 3, abs=0.03)
    assert watch["log_loss"]["judge"] < watch["log_loss"]["popularity"]
    assert response.outcomes == ("watch", "like")


def test_progress_is_told_stage_by_stage(shown: Dataset):
    told: list[tuple[str, int, int]] = []
    fit_response(
        shown,
        shown.users_in(FOLD_A),
        seed=1,
        config=dataclasses.replace(SMALL, max_epochs=1),
        progress=lambda stage, done, total: told.append((stage, done, total)),
    )
    assert [done for _, done, _ in told] == list(range(1, len(told) + 1))
    assert all(done <= total for _, done, total in told)
    assert {"inner fold 1 of 3", "whole fold"} <= {stage for stage, _, _ in told}


def test_too_few_users_are_refused_with_what_to_do(dataset: Dataset):
    with pytest.raises(ValueError, match="larger log"):
        fit_response(dataset, dataset.users_in(FOLD_A)[:3], seed=0, config=SMALL)


def test_a_known_spread_of_taste_for_popular_items_comes_back():
    """Users choose by popularity with a coefficient of their own: log odds = (1 + z_u) * log popularity, sd of z known."""
    log = synthetic_log(5, n_users=360, n_items=100, n_types=1, on_type_share=1.0, events_per_user=(30, 30))[0]
    dataset = encode(log, seed=0)
    generator = torch_generator(5, "taste")
    level = -torch.log(torch.arange(1, 101, dtype=torch.float32))
    standardised = (level - level.mean()) / level.std(unbiased=False)
    sd = 0.5
    z = sd * torch.randn(dataset.n_users, generator=generator)
    race = torch.empty(dataset.n_users, 100).exponential_(generator=generator).log()
    order = (level + z[:, None] * standardised - race).argsort(dim=1, descending=True)[:, :30]
    dataset = dataclasses.replace(dataset, item=order.flatten())
    _, metrics = fit_response(
        dataset, dataset.users_in(FOLD_A), seed=1, config=SMALL, heldout_users=dataset.users_in(FOLD_B)
    )
    watch = metrics["outcomes"]["watch"]
    sds = dict(zip(watch["effects"]["features"], watch["effects"]["sd"], strict=True))
    # 119 users with 30 choices each; the co-occurrence features explain a part of the same differences
    assert sds["log_popularity"] == pytest.approx(sd, rel=0.45)
    assert 0.8 < watch["heldout"]["calibration_slope"] < 1.25
    assert math.isfinite(watch["effects"]["log_marginal"])
