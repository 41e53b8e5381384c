import numpy as np
import torch

from metarec_gym import seeding


def test_neighbouring_seeds_and_other_purposes_share_no_stream():
    streams = {seeding.stream(seed, purpose) for seed in range(100) for purpose in ("fit", "play", 1, "1")}
    assert len(streams) == 400
    assert all(0 <= s < 2**63 for s in streams)


def test_a_stream_is_the_same_on_every_run():
    assert seeding.stream(0, "fit") == seeding.stream(0, "fit")
    a, b = (seeding.numpy_rng(7, "x").random(3) for _ in range(2))
    assert np.array_equal(a, b)


def test_splitmix64_finaliser_matches_a_plain_integer_computation():
    def reference(x: int) -> int:
        m = 2**64 - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & m
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & m
        return x ^ (x >> 31)

    values = [0, 1, 12345, 2**63 - 1, -1, -(2**63)]
    got = seeding.mix(torch.tensor(values))
    assert [int(v) % 2**64 for v in got] == [reference(v % 2**64) for v in values]


def test_folding_in_a_number_equals_folding_in_a_tensor():
    key = torch.arange(5)
    for value in (0, 1, 7, -2, 2**40):
        assert torch.equal(seeding.fold_in(key, value), seeding.fold_in(key, torch.full((5,), value)))


def test_uniform_draws_fill_the_unit_interval_evenly():
    draws = seeding.uniform(torch.arange(200_000))
    assert 0.0 <= float(draws.min()) < 1e-4
    assert 1.0 - 1e-4 < float(draws.max()) < 1.0
    # standard error of the mean is 0.289 / sqrt(200,000) = 0.00065
    assert abs(float(draws.mean()) - 0.5) < 0.003
    counts = torch.histc(draws, bins=20, min=0.0, max=1.0)
    chi_square = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_square < 43.8  # 99.9 % point of chi-square with 19 degrees of freedom


def test_draws_of_neighbouring_keys_are_uncorrelated():
    key = torch.arange(100_000)
    a, b = seeding.uniform(seeding.fold_in(key, 0)), seeding.uniform(seeding.fold_in(key, 1))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.015
    assert abs(float(torch.corrcoef(torch.stack([a[1:], a[:-1]]))[0, 1])) < 0.015


def test_normal_draws_have_mean_zero_and_variance_one():
    draws = seeding.normal(torch.arange(200_000))
    assert bool(torch.isfinite(draws).all())
    assert abs(float(draws.mean())) < 0.01
    assert abs(float(draws.var()) - 1.0) < 0.02


def test_draws_of_one_key_without_torch_are_the_same_bits():
    for key in (0, -1, 2**62, -(2**63)):
        values = torch.tensor([-7, -1, 0, 1, 5, 2**40])
        children = seeding.fold_in(torch.tensor([key]), values)
        assert [seeding.fold_in_one(key, int(v)) for v in values] == [int(c) % 2**64 for c in children]
        assert torch.equal(torch.from_numpy(seeding.uniform_of(key, values.numpy())), seeding.uniform(children))


def test_no_global_generator_is_touched():
    before = torch.random.get_rng_state()
    seeding.torch_generator(3, "a")
    seeding.uniform(torch.arange(4))
    assert torch.equal(before, torch.random.get_rng_state())
