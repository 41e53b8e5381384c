import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from metarec_gym.data import FOLD_A, FOLD_B, Dataset, encode, synthetic_log
from metarec_gym.data.interactions import InteractionLog
from metarec_gym.response.baselines import Factorization
from metarec_gym.response.config import SECOND_FAMILY, ResponseConfig
from metarec_gym.response.fitting import fit_response, fit_variant
from metarec_gym.response.frozen import FrozenResponse
from metarec_gym.response.item_space import item_space, prefix_inputs
from metarec_gym.response.rows import Rows, category_exposure, period_of, period_starts
from metarec_gym.seeding import torch_generator

SMALL = ResponseConfig(
    dim=12,
    taste_dim=8,
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


@pytest.fixture(scope="module")
def half(dataset: Dataset, fitted: tuple[FrozenResponse, dict]) -> tuple[FrozenResponse, dict]:
    """As `fitted`, with half the base rate and one member."""
    config = dataclasses.replace(SMALL, base_rate=0.5 * fitted[1]["base_rate"])
    return fit_response(dataset, dataset.users_in(FOLD_A), seed=1, config=config, members=1)


def test_a_declared_base_rate_moves_the_gate_and_nothing_else(
    fitted: tuple[FrozenResponse, dict], half: tuple[FrozenResponse, dict]
):
    response, metrics = half
    assert metrics["uniform_rate"] == pytest.approx(0.5 * fitted[1]["base_rate"], rel=1e-3)
    assert response.tensors["calibration"][0, 0, 1] < fitted[0].tensors["calibration"][0, 0, 1]
    assert torch.equal(response.tensors["calibration"][0, 1], fitted[0].tensors["calibration"][0, 1])


def test_what_a_log_of_positives_cannot_identify_is_zero(fitted: tuple[FrozenResponse, dict]):
    t = fitted[0].tensors
    assert t["pair_sd"].abs().max() == 0
    assert t["position_logit"].abs().max() == 0
    assert t["fatigue"].abs().max() == 0
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
    monkeypatch.setattr("metarec_gym.response.rows._DENSE_CELLS", 0)
    assert torch.equal(rows.seen(rows.user, rows.rank, items), dense)
    assert torch.equal(dense.sum(dim=1), rows.rank)


def test_an_item_unseen_in_the_fold_has_a_zero_vector_and_borrows_from_its_category(dataset: Dataset):
    users = dataset.users_in(FOLD_A)
    item = torch.where(torch.isin(dataset.user, users) & (dataset.item == 7), 11, dataset.item)
    response = fit_response(dataclasses.replace(dataset, item=item), users, seed=1, config=SMALL, members=1)[0]
    assert response.tensors["item_input"][7].abs().max() == 0
    vectors = response.tensors["item_output"][0, :, 0]
    own, same, other = vectors[7], vectors[7 % 4 :: 4].mean(dim=0), vectors[(7 + 1) % 4 :: 4].mean(dim=0)
    assert (own - same).norm() < (own - other).norm()


def test_a_log_with_impressions_keeps_its_own_rate(fitted_shown: tuple[FrozenResponse, dict]):
    response, metrics = fitted_shown
    watch = metrics["outcomes"]["watch"]["heldout"]
    # one of three shown items is watched
    assert not metrics["sampled_negatives"]
    assert watch["rate_observed"] == pytest.approx(1 / 3, abs=0.01)
    # fits of fifty users: seeds 0 to 7 give 0.317 to 0.391, and other matrix kernels are like another seed
    assert watch["rate_predicted"] == pytest.approx(1 / 3, abs=0.08)
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


def test_members_share_states_and_users_and_differ_in_what_the_log_leaves_open(
    dataset: Dataset, fitted: tuple[FrozenResponse, dict]
):
    response, metrics = fitted
    assert response.n_members == metrics["members"] == 2
    heldout = metrics["outcomes"]["watch"]["heldout"]
    assert 0.01 < heldout["member_disagreement"] < 0.5
    # the average of two predictions is at least as good as they are on average
    assert heldout["log_loss"]["judge"] < sum(heldout["log_loss_members"]) / 2
    users = dataset.users_in(FOLD_A)
    histories = dataset.histories(users, torch.full((len(users),), 5))
    z, every = response.effects(0)[users], torch.arange(dataset.n_items).expand(len(users), -1)
    state = response.start(histories)
    p = [
        response.conditional_probs(state, z, every, member=torch.full((len(users),), m), position=False) for m in (0, 1)
    ]
    assert not torch.allclose(p[0], p[1], atol=0.01)
    # each member takes a uniformly drawn unseen item at the base rate, and likes what was taken as often
    assert float(p[0][..., 0].mean()) == pytest.approx(float(p[1][..., 0].mean()), rel=0.15)


def test_the_first_member_does_not_depend_on_how_many_there_are(
    fitted: tuple[FrozenResponse, dict], half: tuple[FrozenResponse, dict]
):
    for name in ("item_output", "item_bias", "hidden_weight", "tower_weight"):
        assert torch.equal(half[0].tensors[name][0], fitted[0].tensors[name][0])


def test_the_judge_beats_matrix_factorisation_and_that_beats_popularity(fitted: tuple[FrozenResponse, dict]):
    watch = fitted[1]["outcomes"]["watch"]["heldout"]["log_loss"]
    assert watch["judge"] < watch["mf"] < watch["popularity"]


def test_a_users_factors_are_folded_in_from_what_was_taken_before_and_nothing_else(dataset: Dataset):
    rows = Rows.of(dataset, dataset.users_in(FOLD_A))
    model = Factorization.fit(rows, 0, rank=3)
    index = torch.tensor([rows.n - 1, 0, 25])
    found = model.users(rows, index)
    # nothing taken yet: the vector is 0
    assert found[1].abs().max() == 0
    for place in (0, 2):
        row = int(index[place])
        before = rows.item[(rows.user == rows.user[row]) & (torch.arange(rows.n) < row)]
        f = model.factors[before]
        # (F'F + c f'f + ridge) x = (1 + c) sum f
        gram = model.factors.T @ model.factors + 8.0 * f.T @ f + 8.0 * torch.eye(3, dtype=torch.float64)
        assert torch.allclose(found[place], torch.linalg.solve(gram, 9.0 * f.sum(dim=0)), atol=1e-9)


def test_the_second_family_has_no_tower_and_still_beats_popularity(
    dataset: Dataset, fitted: tuple[FrozenResponse, dict]
):
    users, others = dataset.users_in(FOLD_A), dataset.users_in(FOLD_B)
    config = dataclasses.replace(SECOND_FAMILY, dim=12, batch_size=128, max_epochs=8, inner_folds=3, averaging=0.9)
    response, metrics = fit_response(dataset, users, seed=1, config=config, heldout_users=others)
    assert response.tower(torch.randn(16, response.state_dim)).abs().max() == 0
    watch = metrics["outcomes"]["watch"]["heldout"]["log_loss"]
    assert watch["judge"] < watch["popularity"]
    # neither the decays nor the item vectors are the main judge's
    assert not set(response.tensors["decays"].tolist()) & set(fitted[0].tensors["decays"].tolist())
    near = fitted[0].tensors["item_input"][:, :12]
    angle = torch.nn.functional.cosine_similarity(response.tensors["item_input"], near)
    assert float(angle.abs().mean()) < 0.6


@pytest.fixture(scope="module")
def uniform(dataset: Dataset, fitted: tuple[FrozenResponse, dict]) -> tuple[FrozenResponse, dict]:
    return fit_variant(
        dataset,
        dataset.users_in(FOLD_A),
        fitted[0],
        json.loads(json.dumps(fitted[1])),
        seed=1,
        config=dataclasses.replace(SMALL, sampler="uniform"),
        heldout_users=dataset.users_in(FOLD_B),
        members=1,
    )


def test_a_variant_shares_states_and_users_with_its_base(
    fitted: tuple[FrozenResponse, dict], uniform: tuple[FrozenResponse, dict]
):
    for name in ("item_input", "static_features", "trend", "dynamic_scale", "effect_mean", "effect_chol"):
        assert torch.equal(uniform[0].tensors[name], fitted[0].tensors[name])
    assert not torch.equal(uniform[0].tensors["item_output"], fitted[0].tensors["item_output"])
    assert uniform[1]["uniform_rate"] == pytest.approx(fitted[1]["uniform_rate"], rel=1e-3)
    own, base = (m["outcomes"]["watch"]["heldout"]["log_loss"] for m in (uniform[1], fitted[1]))
    assert own["mf"] == pytest.approx(base["mf"], rel=1e-6)
    assert own["judge"] == pytest.approx(base["judge"], rel=0.03)


def test_a_variant_of_another_seed_is_refused(dataset: Dataset, fitted: tuple[FrozenResponse, dict]):
    config = dataclasses.replace(SMALL, sampler="uniform")
    with pytest.raises(ValueError, match="fit_response instead"):
        fit_variant(dataset, dataset.users_in(FOLD_A), *fitted, seed=2, config=config)


def popular(seed: int) -> Dataset:
    """Everybody draws from one popularity, rank ** -1 over 60 items: the density ratio is known."""
    log = synthetic_log(seed, n_users=300, n_items=60, n_types=1, on_type_share=1.0, events_per_user=(12, 12))[0]
    return encode(log, seed=0)


@pytest.mark.parametrize("sampler", ["uniform", "sqrt_popularity", "popularity"])
def test_every_sampler_gives_the_same_density_ratio(sampler: str):
    dataset = popular(3)
    config = dataclasses.replace(SMALL, sampler=sampler, dim=4, rank=2, hidden=4, inner_folds=2)
    users = dataset.users_in(FOLD_A)
    response, _ = fit_response(dataset, users, seed=1, config=config, members=1)
    counts = torch.bincount(dataset.item, minlength=60).float()
    state = response.start(torch.zeros(16, 0, dtype=torch.int64))
    z = response.tensors["effect_mean"].mean(dim=0).expand(16, -1, -1)
    p = response.conditional_probs(state, z, torch.arange(60).expand(16, -1), position=False)[0, :, 0]
    odds = torch.log(p / (1 - p))
    # log counts of all 300 users are the truth; users take 12 of 60 items, so popular ones are counted too low
    known = counts > 20
    slope = torch.cov(torch.stack([odds[known], counts[known].log()]))
    assert float(slope[0, 1] / slope[1, 1]) == pytest.approx(1.15, abs=0.3)


def test_a_trend_is_read_from_the_period_before_and_never_from_the_present(dataset: Dataset):
    users = dataset.users_in(FOLD_A)
    dataset = dataclasses.replace(dataset, time=5.0 * dataset.time)
    starts = period_starts(dataset)
    assert len(starts) > 4
    rows = Rows.of(dataset, users)
    trend = item_space(dataset, rows, SMALL, 0).trend
    assert trend.shape == (len(starts), dataset.n_items)
    assert trend[0].abs().max() == 0
    # what happens in the last period is seen by the overall share alone, by no period's own count
    last = (period_of(starts, dataset.time) == len(starts) - 1) & torch.isin(dataset.user, users)
    assert int(last.sum()) > 5
    generator = torch_generator(0, "shuffle")
    item = dataset.item.clone()
    item[last] = item[last][torch.randperm(int(last.sum()), generator=generator)]
    other = dataclasses.replace(dataset, item=item)
    assert torch.allclose(item_space(other, Rows.of(other, users), SMALL, 0).trend, trend, atol=1e-5)
    # an item taken in the second last period only is trending in the last one
    moved = torch.where(
        period_of(starts, dataset.time) == len(starts) - 2, 5, torch.where(dataset.item == 5, 6, dataset.item)
    )
    risen = dataclasses.replace(dataset, item=moved)
    found = item_space(risen, Rows.of(risen, users), SMALL, 0).trend
    assert int(found[-1].argmax()) == 5
    assert int(found[-2].argmin()) == 5 or float(found[-2, 5]) < 0


def test_periods_are_about_thirty_days_long_and_at_most_24(dataset: Dataset):
    year = dataclasses.replace(dataset, time=torch.linspace(0, 365 * 86_400.0, dataset.n_rows, dtype=torch.float64))
    assert len(period_starts(year)) == 12
    decade = dataclasses.replace(year, time=year.time * 10)
    assert len(period_starts(decade)) == 24
    assert period_starts(year)[0] == 0.0
    at = torch.tensor([-5.0, 0.0, 365 * 86_400.0, 1e12], dtype=torch.float64)
    assert period_of(period_starts(year), at).tolist() == [0, 0, 11, 11]


def test_exposure_counts_the_slates_before_in_the_session_and_fades():
    rows = [
        ("u", "a", 0, 1),
        ("u", "b", 0, 0),
        ("u", "a", 9, 0),
        ("u", "c", 20, 0),
        ("u", "a", 99_999, 1),
        ("v", "a", 20, 1),
    ]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "click"])
    items = pd.DataFrame({"item_id": ["a", "b", "c"], "categories": ["x", "x|y", "y"]})
    dataset = encode(padded(frame, items), seed=0)
    exposure = category_exposure(dataset, torch.arange(6))
    # slate 1 shows a (x) and b (x, y): means x .75, y .25; slate 2 shows a and meets .75
    # then x .8 * .75 + 1 = 1.6 and y .8 * .25 = .2, which c meets; a session later nothing is left
    assert exposure.tolist() == pytest.approx([0.0, 0.0, 0.75, 0.2, 0.0, 0.0])


def padded(frame: pd.DataFrame, items: pd.DataFrame) -> InteractionLog:
    """A log with two more users behind the given ones: three folds need three users."""
    more = pd.DataFrame({"user_id": ["x", "y"], "item_id": ["a", "b"], "timestamp": [0, 0], "click": [1, 0]})
    return InteractionLog.from_frame(pd.concat([frame, more]), name="shown", outcomes=("click",), items=items)


TINY = dataclasses.replace(SMALL, max_epochs=2, inner_folds=2, dim=6, rank=2, hidden=4, batch_size=512)
PLACE, FATIGUE, PAIR_SD = (0.0, -0.5, -1.0), -0.6, 1.0


@pytest.fixture(scope="module")
def slates() -> Dataset:
    """Slates of three with known effects: click logit = taste of the item - .5 * place - .6 * exposure + eps_user,item."""
    rng = np.random.default_rng(7)
    n_users, n_items, sessions, requests = 270, 24, 8, 4
    taste, category = rng.normal(0.0, 0.6, n_items), np.arange(n_items) % 3
    rows = []
    for user in range(n_users):
        eps, level = rng.normal(0.0, PAIR_SD, n_items), rng.normal(0.0, 0.4)
        for session in range(sessions):
            exposure = np.zeros(3)
            for request in range(requests):
                # some slates are of one category, so that exposure varies
                theme = int(rng.integers(0, 3))
                choice = np.flatnonzero(category == theme) if rng.random() < 0.5 else np.arange(n_items)
                slate = rng.choice(choice, 3, replace=False)
                time_s = session * 86_400 + request * 60
                for place, item in enumerate(slate):
                    logit = -0.3 + level + taste[item] + PLACE[place] + FATIGUE * exposure[category[item]] + eps[item]
                    click = float(rng.random() < 1 / (1 + np.exp(-logit)))
                    rows.append((f"u{user:03d}", f"i{item:02d}", time_s, click, place + 1))
                shown = np.bincount(category[slate], minlength=3) / 3
                exposure = 0.8 * exposure + shown
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "click", "position"])
    items = pd.DataFrame({"item_id": [f"i{i:02d}" for i in range(n_items)], "categories": [f"c{c}" for c in category]})
    return encode(InteractionLog.from_frame(frame, name="slates", outcomes=("click",), items=items), seed=0)


def test_place_fatigue_and_pair_effects_of_a_log_with_impressions_come_back(slates: Dataset):
    users, others = slates.users_in(FOLD_A), slates.users_in(FOLD_B)
    response, metrics = fit_response(slates, users, seed=1, config=TINY, heldout_users=others, members=1)
    notes = metrics["outcomes"]["click"]["calibration"]["notes"]
    assert all(notes[name]["identified"] for name in ("position", "fatigue", "pair_sd"))
    # 89 users with 96 rows each: standard errors of place and fatigue are about .06
    found = response.tensors["position_logit"][:4]
    assert found.tolist() == pytest.approx([*PLACE, 0.0], abs=0.2)
    assert float(response.tensors["fatigue"]) == pytest.approx(FATIGUE, abs=0.2)
    scale = float(response.tensors["calibration"][0, 0, 0])
    # what of eps lies along the 8 named features of 24 items is taken for taste: a third of its variance and more
    assert 0.4 < scale * float(response.tensors["pair_sd"][0]) < PAIR_SD
    heldout = metrics["outcomes"]["click"]["heldout"]
    assert heldout["rate_predicted"] == pytest.approx(heldout["rate_observed"], rel=0.08)
    assert heldout["log_loss"]["judge"] < heldout["log_loss"]["popularity"]


def test_place_fatigue_and_pair_effects_that_are_not_there_stay_zero(slates: Dataset):
    blind = torch.randperm(slates.n_rows, generator=torch_generator(0, "blind"))
    dataset = dataclasses.replace(slates, outcome=slates.outcome[blind])
    response, _ = fit_response(dataset, slates.users_in(FOLD_A), seed=1, config=TINY, members=1)
    for name in ("position_logit", "fatigue", "pair_sd"):
        assert response.tensors[name].abs().max() == 0


def test_a_watch_ratio_is_learnt_as_a_share_and_not_as_a_yes_or_no(dataset: Dataset):
    # the share watched is .8 of an item of the user's own type and .3 of another: `like` says which, by construction
    generator = torch_generator(0, "ratio")
    noise = 0.1 * torch.rand(dataset.n_rows, generator=generator)
    ratio = torch.where(dataset.outcome[:, 1] > 0, 0.7, 0.2) + noise
    outcome = torch.stack([dataset.outcome[:, 0], ratio], dim=1)
    watched = dataclasses.replace(dataset, outcome=outcome, outcomes=("watch", "watch_ratio"))
    users, others = dataset.users_in(FOLD_A), dataset.users_in(FOLD_B)
    _, metrics = fit_response(watched, users, seed=1, config=SMALL, heldout_users=others, members=1)
    heldout = metrics["outcomes"]["watch_ratio"]["heldout"]
    mean = float(ratio[torch.isin(dataset.user, others)].mean())
    assert heldout["rate_observed"] == pytest.approx(mean, abs=0.01)
    assert heldout["rate_predicted"] == pytest.approx(mean, abs=0.03)
    assert heldout["log_loss"]["judge"] < heldout["log_loss"]["popularity"]
    assert heldout["ece"] < 0.05, heldout["ece"]
