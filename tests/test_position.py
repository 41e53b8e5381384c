import pandas as pd
import pytest
import torch

from metarec_gym.data.impressions import ImpressionTable
from metarec_gym.response.position import fit_position, position_of_impressions

TRUTH = torch.tensor([0.0, -0.5, -1.0])


def impressions(seed, n=120_000, good_first=False):
    """Items 0..9 with known logits, shown in three places whose effect is known."""
    generator = torch.Generator().manual_seed(seed)
    item = torch.randint(10, (n,), generator=generator)
    # a policy that puts the better half of the items first more often
    odds = torch.where(item >= 5, 0.8, 0.2) if good_first else torch.full((n,), 1 / 3)
    first = torch.rand(n, generator=generator) < odds
    position = torch.where(first, 0, torch.randint(1, 3, (n,), generator=generator))
    logit = -2.0 + 0.2 * (item - 4.5) + TRUTH[position]
    return item, position, (torch.rand(n, generator=generator) < torch.sigmoid(logit)).to(torch.float64)


@pytest.mark.parametrize("good_first", [False, True])
def test_known_position_effects_are_found_within_three_standard_errors(good_first):
    found = fit_position(*impressions(1, good_first=good_first))
    assert bool(((found.logit - TRUTH).abs() <= 3.0 * found.standard_error + 1e-9).all())
    assert float(found.standard_error[1:].max()) < 0.05
    assert found.identified


def test_a_policy_that_puts_good_items_first_is_not_taken_for_examination():
    item, position, click = impressions(1, good_first=True)
    rate = [float(click[position == j].mean()) for j in range(3)]
    naive = torch.logit(torch.tensor(rate)) - torch.logit(torch.tensor(rate[0]))
    found = fit_position(item, position, click)
    # the raw rates exaggerate what the place does
    assert float(naive[1]) < -0.8
    assert float(found.logit[1]) == pytest.approx(-0.5, abs=0.1)


def test_standard_errors_cover_the_truth_nineteen_times_in_twenty():
    covered = [
        bool((found.logit[2] - TRUTH[2]).abs() <= 1.96 * found.standard_error[2])
        for found in (fit_position(*impressions(seed, n=20_000)) for seed in range(60))
    ]
    assert 0.87 <= sum(covered) / len(covered) <= 1.0


def test_the_decay_per_doubling_is_found_within_two_standard_errors():
    generator = torch.Generator().manual_seed(3)
    item, position = (
        torch.randint(10, (200_000,), generator=generator),
        torch.randint(4, (200_000,), generator=generator),
    )
    logit = -1.5 + 0.2 * (item - 4.5) - 0.4 * torch.log2(1.0 + position)
    click = (torch.rand(len(item), generator=generator) < torch.sigmoid(logit)).to(torch.float64)
    decay, error = fit_position(item, position, click).decay
    assert abs(decay - 0.4) <= 2.0 * error
    assert error < 0.02


def test_too_few_clicks_are_refused():
    with pytest.raises(ValueError, match=r"2 positions with \[1, 0\] clicks"):
        fit_position(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))


def test_an_impression_table_counts_positions_from_any_number():
    item, position, click = impressions(2, n=20_000)
    frame = pd.DataFrame(
        {
            "timestamp": 0.0,
            "campaign": "all",
            "strategy": "random",
            "item_id": [f"i{i}" for i in item.tolist()],
            "position": position.numpy() + 1,
            "propensity": 0.1,
            "click": click.numpy().astype(int),
        }
    )
    items = pd.DataFrame({"item_id": sorted(frame["item_id"].unique())})
    table = ImpressionTable.from_frame(frame, name="made", items=items)
    assert torch.allclose(position_of_impressions(table).logit, fit_position(item, position, click).logit)
    with pytest.raises(ValueError, match="no campaign 'men'"):
        position_of_impressions(table, campaign="men")
