from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from metarec_gym.data import Dataset, InteractionLog, encode
from metarec_gym.data.synthetic import BehaviourTruth, behaviour_log
from metarec_gym.response.frozen import RETURN_FEATURES
from metarec_gym.response.returning import draw_gap, fit_return, kaplan_meier, return_table, survival

HOUR_S = 3600.0


def hand_made(rows: list[tuple[str, float, int, float]]) -> Dataset:
    """A dataset of (user, hour, session, watch) rows."""
    import pandas as pd

    frame = pd.DataFrame(rows, columns=["user_id", "hour", "session_id", "watch"])
    frame["timestamp"] = 1.7e9 + HOUR_S * frame["hour"]
    frame["item_id"] = [f"i{index}" for index in range(len(frame))]
    log = InteractionLog.from_frame(frame, name="hand_made", outcomes=("watch",))
    return encode(log, seed=0)


@pytest.fixture(scope="module")
def made() -> tuple[Dataset, BehaviourTruth]:
    log, truth = behaviour_log(0, n_users=200, n_items=40)
    return encode(log, seed=0), truth


def everybody(dataset: Dataset) -> torch.Tensor:
    return torch.arange(dataset.n_users)


def test_the_table_has_the_features_and_gaps_worked_out_by_hand() -> None:
    data = hand_made(
        [
            ("a", 0.0, 0, 1.0),
            ("a", 0.5, 0, 0.0),
            ("a", 1.0, 0, 1.0),
            ("a", 11.0, 1, 1.0),
            ("a", 12.0, 1, 0.0),
            ("a", 14.0, 2, 0.0),
            ("b", 3.0, 0, 1.0),
            ("c", 20.0, 0, 1.0),
        ]
    )
    table = return_table(data, torch.tensor([0, 1]))
    assert table.user.tolist() == [0, 0, 0, 1]
    assert table.session.tolist() == [0, 1, 2, 0]
    # user a: back after 11 - 1 = 10 hours and after 14 - 12 = 2 hours; then, like b, not seen again before the log's end at 20
    assert table.gap_h.tolist() == pytest.approx([10.0, 2.0, np.inf, np.inf])
    assert table.followed_h.tolist() == pytest.approx([19.0, 8.0, 6.0, 17.0])
    assert table.returned.tolist() == [True, True, False, False]
    expected = [
        [np.log(3), np.log(2), 0.0, 1.0],
        [np.log(2), np.log(3), np.log(11), 0.0],
        [0.0, np.log(4), np.log(3), 0.0],
        [np.log(2), np.log(2), 0.0, 1.0],
    ]
    assert np.allclose(table.features.numpy(), expected, atol=1e-6)


def test_overlapping_sessions_have_a_gap_of_0_and_are_counted() -> None:
    data = hand_made(
        [("a", 0.0, 0, 1.0), ("a", 1.0, 1, 1.0), ("a", 5.0, 0, 1.0), ("b", 9.0, 0, 1.0), ("c", 9.0, 0, 1.0)]
    )
    table = return_table(data, torch.tensor([0, 1]))
    assert table.gap_h.tolist() == [0.0, np.inf, np.inf]
    assert table.overlaps == 1


def test_a_gap_is_drawn_from_the_bin_that_the_uniform_falls_in_and_uniformly_in_log_hours() -> None:
    edges = torch.tensor([1.0, 4.0, 16.0])
    hazards = torch.tensor([[0.5, 0.4]]).expand(5, 2)
    # back in bin 0 with 0.5, in bin 1 with 0.5 * 0.4 = 0.2, not within 16 hours with 0.3
    u_bin = torch.tensor([0.0, 0.49, 0.51, 0.69, 0.71])
    u_inside = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.5])
    assert draw_gap(hazards, u_bin, u_inside, edges).tolist() == pytest.approx([1.0, 2.0, 4.0, 8.0, np.inf])
    assert survival(hazards)[0].tolist() == pytest.approx([0.5, 0.3])


def test_a_higher_hazard_never_means_a_later_return() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(500, 6, generator=generator) * 0.5
    high = low + torch.rand(500, 6, generator=generator) * 0.5
    u_bin, u_inside = torch.rand(2, 500, generator=generator)
    edges = torch.logspace(0, 2, 7)
    assert bool((draw_gap(high, u_bin, u_inside, edges) <= draw_gap(low, u_bin, u_inside, edges)).all())
    assert bool((draw_gap(high, u_bin, u_inside, edges) < draw_gap(low, u_bin, u_inside, edges)).any())


def test_without_bins_nobody_comes_back() -> None:
    gap = draw_gap(torch.zeros(3, 0), torch.tensor([0.0, 0.5, 0.9]), torch.rand(3), torch.zeros(1))
    assert gap.tolist() == [np.inf] * 3


def test_kaplan_meier_of_five_sessions_is_worked_out_by_hand() -> None:
    # returns at 1, 2 and 2 hours; censored at 1.5 and 5: 4/5 at 1 hour, then 3 at risk and 2 of them return
    gap = torch.tensor([1.0, torch.inf, 2.0, 2.0, torch.inf], dtype=torch.float64)
    followed = torch.tensor([9.0, 1.5, 9.0, 9.0, 5.0], dtype=torch.float64)
    hours, alive = kaplan_meier(gap, followed)
    assert hours.tolist() == [1.0, 2.0]
    assert alive.tolist() == pytest.approx([0.8, 0.8 / 3])


def test_return_weights_of_a_log_with_the_same_bins_are_found_within_three_standard_errors(made) -> None:
    data, truth = made
    tensors, metrics = fit_return(data, everybody(data), edges=torch.from_numpy(truth.return_edges))
    error = tensors["return_weight"].double().numpy() - truth.return_weight
    assert (np.abs(error) < 3 * np.array(list(metrics["standard_errors"].values()))).all()
    assert (np.abs(error) < [0.12, 0.12, 0.07, 0.4]).all()
    # bins with few returns are uncertain: the first ones have a hazard of 2 %
    assert np.abs(tensors["return_baseline"].numpy() - truth.return_baseline)[5:].max() < 0.5
    assert metrics["better_than_baseline"]
    assert metrics["engaged_users_return_sooner"]


def test_with_bins_of_its_own_the_fit_finds_the_weights_and_the_held_out_curve(made) -> None:
    data, truth = made
    tensors, metrics = fit_return(data, everybody(data))
    bins = metrics["n_bins"]
    assert 16 <= bins <= 20
    assert tensors["return_edges"].shape == (bins + 1,)
    assert tensors["return_baseline"].shape == (bins,)
    assert all(value.dtype == torch.float32 for value in tensors.values())
    error = tensors["return_weight"].double().numpy() - truth.return_weight
    assert (np.abs(error) < [0.12, 0.12, 0.07, 0.4]).all()
    assert metrics["ks"] < metrics["ks_noise"] < 0.15
    assert metrics["n_sessions"] == metrics["n_returns"] + metrics["n_censored"]
    assert metrics["n_censored"] == data.n_users
    assert list(metrics["coefficients"]) == list(RETURN_FEATURES)


def test_where_returns_depend_on_nothing_the_weights_are_near_0_and_no_better_than_the_baseline() -> None:
    log, _truth = behaviour_log(1, n_users=200, n_items=20, slate_size=2, return_weight=(0.0, 0.0, 0.0, 0.0))
    data = encode(log, seed=0)
    tensors, metrics = fit_return(data, everybody(data))
    assert (np.abs(tensors["return_weight"].numpy()) < 3 * np.array(list(metrics["standard_errors"].values()))).all()
    assert float(tensors["return_weight"][:3].abs().max()) < 0.15
    assert not metrics["better_than_baseline"]
    assert not metrics["engaged_users_return_sooner"]


def test_a_bin_that_the_logs_end_cuts_makes_nobody_more_likely_to_return() -> None:
    # a hazard of 10 % an hour, sessions spread over 40 hours: most are cut by the end inside one of the bins
    rng = np.random.default_rng(0)
    rows = []
    for user in range(3000):
        start = float(rng.uniform(0, 40))
        back = start + float(rng.exponential(10.0))
        rows.append((f"u{user:04d}", start, 0, 1.0))
        if back < 40:
            rows.append((f"u{user:04d}", back, 1, 1.0))
    data = hand_made(rows)
    edges = torch.tensor([0.01, 5.0, 10.0, 20.0])
    tensors, _metrics = fit_return(data, everybody(data), edges=edges)
    first = torch.tensor([[np.log(2), np.log(2), 0.0, 1.0]])
    hazard = torch.sigmoid(tensors["return_baseline"] + first.float() @ tensors["return_weight"][:, None])[0]
    # 1 - exp(-hours / 10) for bins of 5, 5 and 10 hours; dropping only those cut without a return would give far more
    assert hazard.tolist() == pytest.approx([0.393, 0.393, 0.632], abs=0.05)


def test_too_few_returns_give_no_bins_and_say_so(made) -> None:
    data, _truth = made
    tensors, metrics = fit_return(data, torch.arange(3))
    assert [len(tensors[name]) for name in ("return_edges", "return_baseline", "return_weight")] == [1, 0, 4]
    assert metrics["n_bins"] == 0
    assert "too few returns to tell" in metrics["note"]


def test_users_held_out_are_scored_by_the_fit_to_the_others_only(made) -> None:
    data, _truth = made
    fitted, held_out = torch.arange(0, 150), torch.arange(150, 200)
    tensors, metrics = fit_return(data, fitted, heldout_users=held_out)
    assert metrics["held_out_sessions"] == len(return_table(data, held_out).user)
    # the end of the log is the last event of anybody, so it is kept where it is
    end = data.time == data.time.max()
    later = replace(data, time=torch.where((data.user >= 150) & ~end, data.time - 3600.0, data.time))
    assert torch.equal(fit_return(later, fitted)[0]["return_weight"], tensors["return_weight"])


def test_the_fit_is_the_same_every_time(made) -> None:
    data, _truth = made
    first, second = (fit_return(data, everybody(data)) for _ in range(2))
    assert first[1] == second[1]
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])


def test_too_few_held_out_users_are_not_scored(made) -> None:
    data, _truth = made
    metrics = fit_return(data, torch.arange(100), heldout_users=torch.arange(100, 104))[1]
    assert "better_than_baseline" not in metrics
    assert metrics["note_held_out"].startswith("4 held-out users are too few to tell")
