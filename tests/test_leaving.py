from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from metarec_gym.data import Dataset, InteractionLog, encode, synthetic_log
from metarec_gym.data.synthetic import BehaviourTruth, behaviour_log
from metarec_gym.response.frozen import EXPOSURE_DECAY
from metarec_gym.response.leaving import LEAVING_FEATURES, fit_leaving, request_table


def hand_made(rows: list[tuple[str, float, int, str, float]]) -> Dataset:
    """A dataset of (user, second, session, item, watch) rows; item a is of category x, b of y, c of both."""
    frame = pd.DataFrame(rows, columns=["user_id", "second", "session_id", "item_id", "watch"])
    frame["timestamp"] = 1.7e9 + frame["second"]
    items = pd.DataFrame({"item_id": ["a", "b", "c"], "categories": ["x", "y", "x|y"]})
    return encode(InteractionLog.from_frame(frame, name="hand_made", outcomes=("watch",), items=items), seed=0)


@pytest.fixture(scope="module")
def made() -> tuple[Dataset, BehaviourTruth]:
    log, truth = behaviour_log(0, n_users=200, n_items=40)
    return encode(log, seed=0), truth


def everybody(dataset: Dataset) -> torch.Tensor:
    return torch.arange(dataset.n_users)


def errors(metrics: dict) -> np.ndarray:
    return np.array(list(metrics["standard_errors"].values()))


def test_requests_and_their_features_are_worked_out_by_hand() -> None:
    data = hand_made(
        [
            ("u", 0.0, 0, "a", 0.0),
            ("u", 0.0, 0, "b", 0.0),
            ("u", 60.0, 0, "a", 0.0),
            ("u", 60.0, 0, "c", 0.0),
            ("u", 90.0, 0, "b", 1.0),
            ("u", 90.0, 0, "a", 0.0),
            ("u", 9_000.0, 1, "a", 0.0),
            ("v", 20_000.0, 0, "a", 0.0),
            ("w", 20_000.0, 0, "c", 1.0),
        ]
    )
    table = request_table(data, torch.tensor([0, 1]))
    assert table.user.tolist() == [0, 0, 0, 0, 1]
    assert table.session.tolist() == [0, 0, 0, 1, 0]
    assert table.slate_size.tolist() == [2, 2, 2, 1, 1]
    unrewarded, quality, repetition = table.features.T.tolist()
    # the count starts anew in each session
    assert unrewarded == [1.0, 2.0, 0.0, 1.0, 1.0]
    assert quality == [0.0, 0.0, 0.5, 0.0, 0.0]
    # slates are (x, y) = (1/2, 1/2), (3/4, 1/4), (1/2, 1/2); exposure before the second is (0.5, 0.5), before the third
    # 0.8 (0.5, 0.5) + (0.75, 0.25) = (1.15, 0.65)
    assert repetition == pytest.approx([0.0, 0.5, 0.9, 0.0, 0.0], abs=1e-6)
    assert EXPOSURE_DECAY == 0.8
    assert table.left.tolist() == [False, False, True, True, True]
    # the log ends at 20,000 s: 11,000 s after u was last seen, at the very moment of v's request
    assert table.known.tolist() == [True, True, True, True, False]


def test_exposure_is_the_one_that_the_synthetic_users_met(made) -> None:
    data, truth = made
    table = request_table(data, everybody(data))
    assert np.allclose(table.features[:, 2], truth.exposure.reshape(-1, 5).mean(axis=1), atol=1e-4)


def test_leaving_coefficients_of_a_known_log_are_found_within_three_standard_errors(made) -> None:
    data, truth = made
    leaving, metrics = fit_leaving(data, everybody(data))
    assert leaving.dtype == torch.float32
    error = leaving.double().numpy() - np.array(truth.leaving)
    assert (np.abs(error) < 3 * errors(metrics)).all()
    assert (np.abs(error) < [0.2, 0.1, 0.5, 0.2]).all()
    assert metrics["identified"]
    assert metrics["better_than_constant"]
    assert metrics["held_out_log_loss"] < metrics["held_out_log_loss_constant"]
    assert list(metrics["coefficients"]) == ["intercept", *LEAVING_FEATURES]


def test_where_leaving_depends_on_nothing_the_coefficients_are_near_0_and_no_better_than_a_constant() -> None:
    log, _truth = behaviour_log(1, n_users=200, n_items=20, slate_size=3, leaving=(-2.0, 0.0, 0.0, 0.0))
    data = encode(log, seed=0)
    leaving, metrics = fit_leaving(data, everybody(data))
    assert float(leaving[0]) == pytest.approx(-2.0, abs=0.15)
    assert (np.abs(leaving[1:].numpy()) < 3 * errors(metrics)[1:]).all()
    assert (np.abs(leaving[1:].numpy()) < [0.05, 0.4, 0.15]).all()
    assert not metrics["better_than_constant"]


def test_sessions_cut_at_random_are_flagged_as_no_better_than_a_constant_hazard(made) -> None:
    data, _truth = made
    rng = np.random.default_rng(0)
    # a session ends after every tenth request, whatever the user met
    new_request = torch.cat([torch.ones(1, dtype=torch.bool), torch.diff(data.time) != 0])
    cut = new_request & torch.from_numpy(rng.random(data.n_rows) < 0.1)
    number = torch.cumsum(cut.to(torch.int64), dim=0)
    shuffled = replace(data, session=number - number[data.offsets[:-1]][data.user])
    metrics = fit_leaving(shuffled, everybody(data))[1]
    assert metrics["identified"]
    assert not metrics["better_than_constant"]
    assert fit_leaving(data, everybody(data))[1]["better_than_constant"]


def test_sessions_that_the_logs_end_cuts_do_not_count_as_left() -> None:
    # users arrive in the first 12 of 36 minutes and ask every 100 s: most sessions are still going on at the end
    truth = (-3.0, 0.0, 0.0, 0.0)
    log, _truth = behaviour_log(2, n_users=1000, n_items=20, slate_size=2, span_days=0.025, leaving=truth)
    data = encode(log, seed=0)
    told, metrics = fit_leaving(data, everybody(data), pause_s=180.0)
    rate = metrics["n_left"] / metrics["n_requests"]
    # 1 / (1 + e^3) = 0.0474; 14,000 requests give a standard error of 0.002
    assert rate == pytest.approx(0.0474, abs=0.006)
    assert abs(float(told[0]) + 3.0) < 3 * errors(metrics)[0]
    # taking every last request for leaving would be wrong by half
    assert float(request_table(data, everybody(data)).left.double().mean()) > 0.065
    end_s = float(data.time.max())
    requests = torch.unique(torch.stack([data.user.double(), data.time]), dim=1)
    assert metrics["n_dropped_at_the_logs_end"] == int((requests[1] >= end_s - 180.0).sum())


def test_a_log_of_what_was_taken_does_not_identify_leaving() -> None:
    data = encode(synthetic_log(0, n_users=30)[0], seed=0)
    leaving, metrics = fit_leaving(data, everybody(data))
    assert leaving.tolist() == [-np.inf, 0.0, 0.0, 0.0]
    assert metrics == {"identified": False, "note": "not identified: the log does not say what was shown"}


def test_too_few_ends_of_sessions_do_not_identify_leaving(made) -> None:
    data, _truth = made
    leaving, metrics = fit_leaving(data, torch.arange(2))
    assert leaving.tolist() == [-np.inf, 0.0, 0.0, 0.0]
    assert "100 needed" in metrics["note"]


def test_a_log_without_categories_has_no_effect_of_repetition(made) -> None:
    data, _truth = made
    bare = replace(data, item_category=torch.zeros(data.n_items, 0), category_names=())
    leaving, metrics = fit_leaving(bare, everybody(data))
    assert float(leaving[3]) == 0.0
    assert metrics["standard_errors"]["repetition"] == 0.0
    assert float(leaving[1]) > 0.1


def test_a_slate_without_one_timestamp_is_pointed_out(made) -> None:
    data, _truth = made
    spread = replace(data, time=data.time + torch.arange(data.n_rows) % 5)
    assert "one timestamp" in fit_leaving(spread, everybody(data))[1]["note"]
    assert "one timestamp" not in fit_leaving(data, everybody(data))[1]["note"]


def test_users_held_out_are_scored_by_the_fit_to_the_others(made) -> None:
    data, _truth = made
    fitted, held_out = torch.arange(0, 150), torch.arange(150, 200)
    leaving, metrics = fit_leaving(data, fitted, heldout_users=held_out)
    assert metrics["held_out_requests"] == int(request_table(data, held_out).known.sum())
    assert torch.equal(leaving, fit_leaving(data, fitted)[0])


def test_too_few_held_out_users_are_not_scored(made) -> None:
    data, _truth = made
    metrics = fit_leaving(data, torch.arange(100), heldout_users=torch.arange(100, 104))[1]
    assert "better_than_constant" not in metrics
    assert metrics["note_held_out"].startswith("4 held-out users are too few to tell")
