import pytest
import torch

from metarec_gym.policy import FixedPolicy, MlpPolicy, UniformPolicy, sample_actions


def test_sampling_inverts_the_cumulative_probabilities():
    probs = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).expand(5, -1)
    draws = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999])
    # cumulative: .2 .2 .7 1.0
    assert sample_actions(probs, draws).tolist() == [0, 0, 2, 2, 3]


def test_an_impossible_strategy_is_never_sampled():
    probs = torch.tensor([[0.0, 1.0 - 1e-7, 0.0]]).expand(3, -1)
    assert sample_actions(probs, torch.tensor([0.0, 0.5, 1.0 - 2**-24])).tolist() == [1, 1, 1]


def test_fixed_policy_falls_back_to_the_available_strategies():
    mask = torch.tensor([[True, True, True], [True, False, True]])
    probs = FixedPolicy(1).action_probs(torch.zeros(2, 4), mask)
    assert probs.tolist() == [[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]


def test_uniform_policy_spreads_over_the_mask():
    mask = torch.tensor([[True, False, True, True]])
    assert torch.allclose(UniformPolicy().action_probs(torch.zeros(1, 2), mask), torch.tensor([[1, 0, 1, 1]]) / 3)


def _policy() -> MlpPolicy:
    generator = torch.Generator().manual_seed(1)
    layers = [
        (torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)),
        (torch.randn(2, 8, generator=generator), torch.zeros(2)),
    ]
    return MlpPolicy(layers, ("popular", "ease"), obs_mean=torch.ones(3), meta={"seed": 5})


def test_an_exported_policy_survives_its_file(tmp_path):
    policy = _policy()
    loaded = MlpPolicy.load(policy.save(tmp_path / "policy.safetensors"))
    obs = torch.linspace(-1, 1, 12).view(4, 3)
    assert torch.equal(loaded.logits(obs), policy.logits(obs))
    assert loaded.strategies == ("popular", "ease")
    assert loaded.meta == {"seed": 5}
    assert loaded.choose(obs[0])[0] in ("popular", "ease")


def test_the_network_is_computed_as_written():
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0.0, 1.0])
    policy = MlpPolicy(
        [(weight, bias)], ("a", "b"), obs_mean=torch.tensor([1.0, 0.0]), obs_scale=torch.tensor([2.0, 1.0])
    )
    # ((3 - 1) / 2, 2 * 4 + 1)
    assert policy.logits(torch.tensor([[3.0, 4.0]])).tolist() == [[1.0, 9.0]]


def test_a_missing_policy_file_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m experiments\.train"):
        MlpPolicy.load(tmp_path / "none.safetensors")


def test_a_network_with_the_wrong_number_of_logits_is_refused():
    with pytest.raises(ValueError, match="one logit for each of the 3 strategies"):
        MlpPolicy([(torch.zeros(2, 3), torch.zeros(2))], ("a", "b", "c"))
