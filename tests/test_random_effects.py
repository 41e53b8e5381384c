import math

import pytest
import torch
from torch import Tensor

from metarec_gym.response.effects import ChoiceData, cholesky_factor, fit_effects
from metarec_gym.seeding import torch_generator


def known_users(seed: int, n_users: int, weight: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Covariates (1, standard normal) and z ~ N(W x, diag(sd^2))."""
    generator = torch_generator(seed, "users")
    x = torch.stack([torch.ones(n_users), torch.randn(n_users, generator=generator)], dim=1)
    z = x @ weight.T + torch.randn(n_users, len(sd), generator=generator) * sd
    return x, z


def answers_of(seed: int, z: Tensor, events: int) -> ChoiceData:
    generator = torch_generator(seed, "answers")
    n_users, f = z.shape
    user = torch.arange(n_users).repeat_interleave(events)
    phi = torch.randn(len(user), f, generator=generator)
    phi[:, 0] = 1.0
    offset = torch.randn(len(user), generator=generator)
    p = torch.sigmoid(offset + (phi * z[user]).sum(dim=1))
    answer = (torch.rand(len(user), generator=generator) < p).to(torch.float32)
    return ChoiceData.answers(user, phi, offset, answer, n_users)


def choices_of(seed: int, z: Tensor, events: int, alternatives: int) -> ChoiceData:
    generator = torch_generator(seed, "choices")
    n_users, f = z.shape
    user = torch.arange(n_users).repeat_interleave(events)
    phi = torch.randn(len(user), alternatives, f, generator=generator)
    offset = torch.randn(len(user), alternatives, generator=generator)
    logit = offset + torch.einsum("ejf,ef->ej", phi, z[user])
    noise = torch.empty(logit.shape).exponential_(generator=generator).log()
    target = torch.nn.functional.one_hot((logit - noise).argmax(dim=1), alternatives).to(torch.float32)
    return ChoiceData(user, phi, offset, target, n_users)


def test_the_spread_of_users_is_recovered_from_yes_no_answers():
    sd = torch.tensor([0.9, 0.5, 0.25])
    weight = torch.tensor([[0.3, -0.4], [0.0, 0.2], [0.5, 0.0]])
    x, z = known_users(1, 400, weight, sd)
    found = fit_effects(answers_of(1, z, 80), x)
    # sampling error of a standard deviation from 400 users is sd / sqrt(800) = 4 %, more where the answers are few
    assert torch.allclose(found.covariance.diagonal().sqrt().float(), sd, rtol=0.15, atol=0.03)
    assert torch.allclose(found.weight.float(), weight, atol=0.12)
    assert float((found.covariance - torch.diag(found.covariance.diagonal())).abs().max()) < 0.1


def test_the_spread_of_users_is_recovered_from_choices_among_sampled_items():
    sd = torch.tensor([0.6, 0.3])
    x, z = known_users(2, 300, torch.tensor([[0.2, 0.1], [-0.3, 0.0]]), sd)
    found = fit_effects(choices_of(2, z, 60, 10), x)
    assert torch.allclose(found.covariance.diagonal().sqrt().float(), sd, rtol=0.15)


def test_users_who_do_not_differ_get_effects_near_zero():
    x, z = known_users(3, 300, torch.zeros(3, 2), torch.zeros(3))
    found = fit_effects(answers_of(3, z, 60), x)
    assert float(found.covariance.diagonal().sqrt().max()) < 0.12
    assert float(found.mean.abs().max()) < 0.3


def test_the_posterior_covers_the_true_coefficients_as_often_as_it_says():
    x, z = known_users(4, 400, torch.zeros(2, 2), torch.tensor([0.8, 0.5]))
    found = fit_effects(answers_of(4, z, 40), x)
    error = (found.mean - z) / found.posterior.diagonal(dim1=1, dim2=2).sqrt()
    # 95 % of 400 standardised errors lie within 1.96, give or take 3 * sqrt(.95 * .05 / 400) = 3.3 %
    assert 0.91 < float((error.abs() < 1.96).double().mean()) < 0.985


def test_the_mode_of_a_user_is_the_one_a_grid_finds():
    x, z = known_users(5, 60, torch.zeros(1, 2), torch.tensor([0.7]))
    data = answers_of(5, z, 30)
    found = fit_effects(data, x)
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    mine = data.user == 7
    offset, answer = data.offset[mine, 0].double(), data.target[mine, 0].double()
    logit = offset[:, None] + grid
    log_lik = (answer[:, None] * logit - torch.nn.functional.softplus(logit)).sum(dim=0)
    prior_mean = float(found.prior(x.double())[7, 0])
    log_prior = -0.5 * (grid - prior_mean) ** 2 / float(found.covariance[0, 0])
    assert float(found.mean[7, 0]) == pytest.approx(float(grid[(log_lik + log_prior).argmax()]), abs=0.005)


def test_a_user_without_events_has_the_prior_as_posterior():
    x, z = known_users(6, 100, torch.tensor([[0.5, 0.3]]), torch.tensor([0.6]))
    data = answers_of(6, z, 30)
    keep = data.user != 99
    data = ChoiceData(data.user[keep], data.phi[keep], data.offset[keep], data.target[keep], 100)
    found = fit_effects(data, x)
    assert float(found.mean[99, 0]) == pytest.approx(float(found.prior(x.double())[99, 0]), abs=1e-6)
    assert float(found.posterior[99, 0, 0]) == pytest.approx(float(found.covariance[0, 0]), rel=1e-3)


def test_a_coefficient_that_is_not_free_or_not_identified_stays_zero():
    x, z = known_users(7, 80, torch.zeros(3, 2), torch.tensor([0.0, 0.0, 0.6]))
    data = choices_of(7, z, 30, 6)
    data.phi[:, :, 1] = 0.7  # the same for all alternatives: no choice tells anything about it
    found = fit_effects(data, x, free=torch.tensor([False, True, True]))
    assert found.mean[:, :2].abs().max() == 0
    assert found.covariance[:2].abs().max() == 0
    assert found.posterior[:, :2].abs().max() == 0
    assert float(found.covariance[2, 2]) > 0.2


def test_the_null_alternative_makes_a_choice_a_yes_no_answer():
    one = torch.zeros(1, dtype=torch.int64)
    data = ChoiceData.answers(one, torch.tensor([[2.0]]), torch.tensor([0.5]), torch.tensor([0.25]), 1)
    assert data.phi.tolist() == [[[2.0], [0.0]]]
    assert data.offset.tolist() == [[0.5, 0.0]]
    assert data.target.tolist() == [[0.25, 0.75]]


def test_the_factor_of_a_singular_covariance_gives_it_back():
    covariance = torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 2.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
    factor = cholesky_factor(covariance)
    assert torch.allclose(factor @ factor.T, covariance, atol=1e-12)
    assert torch.equal(factor, factor.tril())
    assert math.isclose(float(factor[1, 1]), 2.0, rel_tol=1e-9)
