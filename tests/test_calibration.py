import math

import pytest
import torch

from metarec_gym.response.calibration import (
    Spread,
    calibration_slope,
    expected_calibration_error,
    fit_pair_sd,
    fit_scale_and_shift,
    log_loss,
    logistic_fit,
    marginal,
    reliability,
    solve_shift,
)
from metarec_gym.seeding import torch_generator


def test_log_loss_is_the_weighted_mean_of_minus_log_probability():
    p, target = torch.tensor([0.8, 0.25]), torch.tensor([1.0, 0.0])
    # (3 * -ln 0.8 + 1 * -ln 0.75) / 4
    expected = (3 * -math.log(0.8) - math.log(0.75)) / 4
    assert log_loss(p, target, torch.tensor([3.0, 1.0])) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_is_the_mean_gap_over_bins():
    p = torch.tensor([0.2, 0.2, 0.6, 0.6])
    target = torch.tensor([0.0, 1.0, 1.0, 1.0])
    # bins {.2, .2}: predicted .2, observed .5; {.6, .6}: predicted .6, observed 1: mean gap (.3 + .4) / 2
    assert expected_calibration_error(p, target, torch.ones(4), bins=2) == pytest.approx(0.35, abs=1e-6)


def test_a_constant_prediction_has_one_bin():
    predicted, observed, share = reliability(torch.full((40,), 0.3), torch.arange(40) % 2, torch.ones(40))
    assert len(predicted) == 1
    assert float(observed[0]) == pytest.approx(0.5)
    assert float(share[0]) == pytest.approx(1.0)


def test_the_slope_is_one_half_when_logits_are_twice_too_large():
    generator = torch_generator(0, "slope")
    logit = torch.randn(40_000, generator=generator)
    target = (torch.rand(40_000, generator=generator) < torch.sigmoid(logit)).float()
    assert calibration_slope(torch.sigmoid(logit), target, torch.ones(40_000)) == pytest.approx(1.0, abs=0.05)
    assert calibration_slope(torch.sigmoid(2 * logit), target, torch.ones(40_000)) == pytest.approx(0.5, abs=0.03)


def test_scale_and_shift_are_recovered_with_the_effects_integrated_out():
    generator = torch_generator(1, "scale")
    n = 60_000
    score = torch.randn(n, generator=generator)
    truth = 0.6 * score - 1.0 + 1.2 * torch.randn(n, generator=generator)
    target = (torch.rand(n, generator=generator) < torch.sigmoid(truth)).float()
    spread = Spread(torch.zeros(n), torch.full((n,), 1.2))
    scale, shift = fit_scale_and_shift(score, spread, target, torch.ones(n))
    assert scale == pytest.approx(0.6, abs=0.05)
    assert shift == pytest.approx(-1.0, abs=0.06)
    p = marginal(score, spread, scale, shift)
    assert float(p.mean()) == pytest.approx(float(target.mean()), abs=0.002)
    assert calibration_slope(p, target, torch.ones(n)) == pytest.approx(1.0, abs=0.05)


def test_the_average_over_effects_is_that_of_a_million_draws():
    generator = torch_generator(3, "draws")
    phi, mean = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[0.5, -0.25]])
    factor = torch.tensor([[[0.8, 0.0], [0.3, 0.4]]])
    spread = Spread.of(phi, mean, factor)
    # z . phi has mean .5 - .5 = 0 and variance (.8 + 2 * .3)^2 + (2 * .4)^2 = 2.6
    assert float(spread.mean) == pytest.approx(0.0, abs=1e-6)
    assert float(spread.sd) == pytest.approx(math.sqrt(2.6), abs=1e-5)
    drawn = torch.sigmoid(-1.0 + math.sqrt(2.6) * torch.randn(1_000_000, generator=generator)).mean()
    assert float(marginal(torch.tensor([-1.0]), spread)) == pytest.approx(float(drawn), abs=1e-3)


def test_what_rows_of_a_pair_share_is_recovered_and_unflattens_the_rest():
    generator = torch_generator(4, "pair")
    pair = torch.arange(2_000).repeat_interleave(4)
    known = torch.randn(8_000, generator=generator)
    eps = 1.2 * torch.randn(2_000, generator=generator)
    target = (torch.rand(8_000, generator=generator) < torch.sigmoid(known + eps[pair])).float()
    sd, gain, growth = fit_pair_sd(known, target, pair)
    assert sd == pytest.approx(1.2, abs=0.12)
    assert gain > 100
    # eps averaged out flattens logits by about 1 / sqrt(1 + .346 * 1.2 ** 2) = .82
    assert growth == pytest.approx(1 / 0.82, abs=0.06)
    shuffled = target[torch.randperm(8_000, generator=generator)]
    none, gain, _ = fit_pair_sd(torch.zeros(8_000), shuffled, pair)
    assert none < 0.2
    assert gain < 2.0


def test_a_known_part_of_the_logit_is_not_estimated_again():
    # two rows of either answer at offset 1: the rest is -1
    target, offset = torch.tensor([1.0, 0.0]), torch.ones(2)
    assert logistic_fit(torch.ones(2, 1), target, torch.ones(2), offset=offset).tolist() == pytest.approx(
        [-1.0], abs=1e-4
    )


def test_the_shift_gives_the_rate_that_was_asked_for():
    generator = torch_generator(2, "shift")
    score, weight = torch.randn(500, generator=generator), torch.rand(500, generator=generator)
    spread = Spread(torch.randn(500, generator=generator), torch.ones(500))
    shift = solve_shift(score, spread, 1.5, weight, 0.07)
    p = marginal(score, spread, 1.5, shift)
    assert float((p * weight).sum() / weight.sum()) == pytest.approx(0.07, abs=1e-5)


def test_a_rate_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match="inside"):
        solve_shift(torch.zeros(2), Spread(torch.zeros(2), torch.zeros(2)), 1.0, torch.ones(2), 1.0)


def test_logistic_regression_of_two_groups_finds_their_log_odds():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    target, weight = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 3.0, 3.0, 1.0])
    # group 0: odds 1/3, group 1: odds 3: intercept -ln 3, difference 2 ln 3
    beta = logistic_fit(x, target, weight)
    assert beta.tolist() == pytest.approx([-math.log(3), 2 * math.log(3)], abs=1e-3)
