import dataclasses
import math

import pytest
import torch

from metarec_gym.data import FOLD_A, Dataset, encode, synthetic_log
from metarec_gym.response.config import ResponseConfig
from metarec_gym.response.fitting import fit_response, fit_variant
from metarec_gym.response.frozen import FrozenResponse
from metarec_gym.response.network import Network
from metarec_gym.response.stacking import Stack, fit_stack, user_weight
from metarec_gym.seeding import torch_generator

TINY = ResponseConfig(
    dim=6,
    taste_dim=4,
    hidden=8,
    rank=4,
    negatives=32,
    batch_size=128,
    max_epochs=1,
    inner_folds=2,
    averaging=0.9,
    effect_negatives=8,
    effect_rounds=2,
)


def rows(seed: int, network_weight: float, level_weight: float, n_users: int = 400, each: int = 15):
    """Rows of users with rates of their own; the rate is about 5 %, and what moves it is known."""
    generator = torch_generator(seed, "rows")
    n = n_users * each
    user = torch.arange(n_users).repeat_interleave(each)
    network, level = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    own = torch.randn(n_users, generator=generator)[user]
    logit = -3.5 + network_weight * network + level_weight * level + own
    target = (torch.rand(n, generator=generator) < torch.sigmoid(logit)).to(torch.float32)
    simple = torch.stack([torch.ones(n), torch.randn(n, generator=generator), level], dim=1)
    return network, simple, target, user


def log_loss(logit: torch.Tensor, target: torch.Tensor) -> float:
    return float(torch.nn.functional.binary_cross_entropy_with_logits(logit, target))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_network_that_learnt_nothing_leaves_the_reference_alone(seed: int):
    stack = fit_stack(*rows(seed, network_weight=0.0, level_weight=0.7))
    assert stack.network == 0.0
    # 0.7 given the user; averaged over users' own rates a logit is flatter, by 1 / sqrt(1 + 0.35) = 0.86
    assert stack.level == pytest.approx(0.6, abs=0.15)
    network, simple, target, _ = rows(seed + 10, network_weight=0.0, level_weight=0.7)
    plain = Stack(stack.constant, 0.0, 0.0, 0.0, 0.0)
    assert log_loss(stack.score(network, simple), target) < log_loss(plain.score(network, simple), target)
    assert log_loss(stack.score(network, simple), target) < log_loss(network - 3.0, target)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_network_that_learnt_something_is_kept_at_its_own_size(seed: int):
    stack = fit_stack(*rows(seed, network_weight=0.8, level_weight=0.0))
    assert stack.network == pytest.approx(0.7, abs=0.15)
    assert abs(stack.level) < 0.15
    network, simple, target, _ = rows(seed + 10, network_weight=0.8, level_weight=0.0)
    # the best constant's loss is the entropy of the rate
    rate = float(target.mean())
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert log_loss(stack.score(network, simple), target) < 0.97 * entropy


def test_a_network_twice_too_sure_of_itself_is_halved():
    network, simple, target, user = rows(0, network_weight=0.8, level_weight=0.0)
    once, twice = fit_stack(network, simple, target, user), fit_stack(2.0 * network, simple, target, user)
    assert twice.network == pytest.approx(0.5 * once.network, rel=1e-6)


def test_a_network_that_points_the_wrong_way_is_dropped():
    network, simple, target, user = rows(0, network_weight=0.8, level_weight=0.0)
    assert fit_stack(-network, simple, target, user).network == 0.0


def test_few_positives_move_a_weight_less_than_many():
    # the same slope, 0.9 before averaging, from about 10 and from about 2,000 positives
    few = fit_stack(*rows(3, network_weight=0.0, level_weight=0.9, n_users=20, each=10))
    many = fit_stack(*rows(3, network_weight=0.0, level_weight=0.9, n_users=2_000))
    assert abs(few.level) < 0.9
    assert many.level == pytest.approx(0.78, abs=0.1)


def test_rows_of_a_heavy_user_weigh_less_than_those_of_strangers():
    # 1 / (1 + 0.2 (n - 1)): one row 1, six rows 1 / 2 each
    weight = user_weight(torch.tensor([4, 7, 7, 7, 7, 7, 7]), alike=0.2)
    assert weight.tolist() == pytest.approx([1.0] + [0.5] * 6)


def test_the_stacked_network_answers_as_the_stack():
    generator = torch_generator(0, "network")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tower = (normal(5, 7), normal(5), normal(3, 5), normal(3))
    network = Network(*tower, vector=normal(9, 3), bias=normal(9), dynamic=normal(3), shown=torch.zeros(64))
    density, level, inputs = normal(9), normal(9), normal(4, 7)
    items = torch.tensor([[0, 1], [2, 3], [4, 5], [8, 0]])
    stack = Stack(constant=-2.0, popularity=0.3, level=0.6, network=0.25, network_gain=3.0)
    simple = torch.stack([torch.ones(4, 2), density[items], level[items]], dim=-1)
    found = stack.network_of(network, density, level).score(inputs, items)
    torch.testing.assert_close(found, stack.score(network.score(inputs, items), simple))
    assert Stack(**stack.to_json()) == stack


@pytest.fixture(scope="module")
def shop() -> Dataset:
    """A log with a third outcome that follows 4 % of the events, whoever and whatever."""
    dataset = encode(synthetic_log(5, n_users=90, n_items=40, events_per_user=(8, 16))[0], seed=0)
    generator = torch_generator(0, "buy")
    buy = (torch.rand(len(dataset.user), 1, generator=generator) < 0.04).to(torch.float32)
    return dataclasses.replace(
        dataset,
        outcome=torch.cat([dataset.outcome, buy], dim=1),
        outcomes=(*dataset.outcomes, "buy"),
        outcome_weights=(*dataset.outcome_weights, 5.0),
    )


@pytest.fixture(scope="module")
def fitted(shop: Dataset) -> tuple[FrozenResponse, dict]:
    return fit_response(shop, shop.users_in(FOLD_A), seed=1, config=TINY, members=1)


def test_only_a_rare_outcome_is_stacked(shop: Dataset, fitted: tuple[FrozenResponse, dict]):
    rows = torch.isin(shop.user, shop.users_in(FOLD_A))
    _, like, buy = shop.outcome[rows].sum(dim=0).tolist()
    # fewer than one positive an item, and many more
    assert buy < shop.n_items < like
    calibration = {name: entry["calibration"] for name, entry in fitted[1]["outcomes"].items()}
    assert "stack" not in calibration["watch"]
    assert "stack" not in calibration["like"]
    assert calibration["buy"]["scale"] == 1.0
    # whoever and whatever: the network has nothing to say
    assert calibration["buy"]["stack"]["network"] == 0.0
    assert not fitted[0].tensors["item_output"][:, :, 2].any()


def test_stacking_one_outcome_leaves_the_others_as_they_were(shop: Dataset, fitted: tuple[FrozenResponse, dict]):
    config = dataclasses.replace(TINY, rare_positives_per_item=0.0)
    plain, metrics = fit_response(shop, shop.users_in(FOLD_A), seed=1, config=config, members=1)
    assert "stack" not in metrics["outcomes"]["buy"]["calibration"]
    for name in ("item_output", "item_bias"):
        assert torch.equal(plain.tensors[name][:, :, :2], fitted[0].tensors[name][:, :, :2])
    for name in ("effect_mean", "effect_chol", "calibration"):
        assert torch.equal(plain.tensors[name][:, :2], fitted[0].tensors[name][:, :2])
    assert not torch.equal(plain.tensors["item_bias"], fitted[0].tensors["item_bias"])


def test_a_variant_keeps_the_stack_of_its_base(shop: Dataset, fitted: tuple[FrozenResponse, dict]):
    config = dataclasses.replace(TINY, sampler="uniform")
    variant, metrics = fit_variant(shop, shop.users_in(FOLD_A), *fitted, seed=1, config=config)
    stacks = [m["outcomes"]["buy"]["calibration"]["stack"] for m in (metrics, fitted[1])]
    assert stacks[0] == stacks[1]
    # an outcome with known answers has no sampler: its network is the base's
    assert torch.equal(variant.tensors["item_bias"][:, :, 2], fitted[0].tensors["item_bias"][:, :, 2])
