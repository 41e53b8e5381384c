import json

import pytest
import torch
from safetensors.torch import save_file

from metarec_gym.policy import (
    FixedPolicy,
    GruPolicy,
    MlpPolicy,
    UniformPolicy,
    gru_step,
    load_policy,
    sample_actions,
)


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


def _random_layers(obs_dim: int, outputs: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((8, obs_dim), (outputs, 8))
    return [(torch.randn(s, generator=generator), torch.randn(s[0], generator=generator)) for s in shapes]


def _policies() -> dict[str, MlpPolicy]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((12, 5), (12, 4), (12,), (12,))
    weight_ih, weight_hh, bias_ih, bias_hh = (torch.randn(shape, generator=generator) for shape in shapes)
    names, memory = ("a", "b", "c"), (weight_ih, weight_hh, bias_ih, bias_hh)
    return {
        "select": MlpPolicy(_random_layers(5, 3), names, obs_mean=torch.ones(5), obs_clip=1.0, meta={"seed": 1}),
        "slots": MlpPolicy(_random_layers(5, 6), names, chooses="slots", places=2),
        "blend": MlpPolicy(_random_layers(5, 3), names, chooses="blend", log_std=torch.zeros(3)),
        "memory": GruPolicy(memory, _random_layers(9, 3), names),
    }


@pytest.mark.parametrize("name", ["select", "slots", "blend", "memory"])
def test_every_kind_of_policy_survives_its_file(name: str, tmp_path) -> None:
    policy = _policies()[name]
    loaded = load_policy(policy.save(tmp_path / "policy.safetensors"))
    assert type(loaded) is type(policy)
    assert (loaded.chooses, loaded.places, loaded.obs_clip) == (policy.chooses, policy.places, policy.obs_clip)
    obs, mask = torch.linspace(-2, 2, 20).view(4, 5), torch.ones(4, 3, dtype=torch.bool)
    for each in (policy, loaded):
        each.begin(4)
    assert torch.equal(loaded.act(obs, mask), policy.act(obs, mask))


def test_a_recurrent_step_equals_that_of_torch() -> None:
    unit = torch.nn.GRU(5, 4, device="meta").to_empty(device="cpu")
    policy = _policies()["memory"]
    assert isinstance(policy, GruPolicy)
    with torch.no_grad():
        for mine, theirs in zip(unit.all_weights[0], policy.memory, strict=True):
            mine.copy_(theirs)
    obs, state = torch.linspace(-1, 1, 10).view(2, 5), torch.linspace(-1, 1, 8).view(2, 4)
    expected = unit(obs[None], state[None])[1][0].detach()
    torch.testing.assert_close(gru_step(obs, state, policy.memory), expected, atol=1e-6, rtol=0.0)


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="holds no policy"):
        load_policy(path)


def test_a_blend_has_no_probabilities_and_its_noise_has_the_deviation_it_says() -> None:
    policy = MlpPolicy([(torch.zeros(2, 1), torch.tensor([0.1, -0.1]))], ("a", "b"), chooses="blend",
                       log_std=torch.tensor([0.1, 0.2]).log())  # fmt: skip
    mask = torch.ones(4000, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="call act"):
        policy.action_probs(torch.zeros(4000, 1), mask)
    draw = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    weights = policy.act(torch.zeros(4000, 1), mask, draw)
    torch.testing.assert_close(weights.mean(dim=0), torch.tensor([0.1, -0.1]), atol=0.01, rtol=0.0)
    torch.testing.assert_close(weights.std(dim=0), torch.tensor([0.1, 0.2]), atol=0.01, rtol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["select", "slots", "blend", "memory"])
def test_onnx_computes_what_the_policy_computes(name: str, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    from metarec_gym.policy_onnx import export_onnx

    policy = _policies()[name]
    session = runtime.InferenceSession(str(export_onnx(policy, tmp_path / "policy.onnx")))
    generator = torch.Generator().manual_seed(4)
    obs = torch.randn(7, 5, generator=generator)
    mask = torch.rand(7, 3, generator=generator) > 0.4
    mask[:, 0] = True
    policy.begin(7)
    state = torch.zeros(7, 4)
    for _ in range(2):
        given = {"obs": obs.numpy(), "action_mask": mask.numpy(), "state": state.numpy()}
        outputs = session.run(None, {put.name: given[put.name] for put in session.get_inputs()})
        expected = policy.act(obs, mask) if name == "blend" else policy.action_probs(obs, mask)
        torch.testing.assert_close(torch.from_numpy(outputs[0]), expected, atol=1e-5, rtol=0.0)
        policy.observe(obs, torch.zeros(7, dtype=torch.int64), torch.zeros(7), torch.ones(7, dtype=torch.bool))
        state = torch.from_numpy(outputs[-1]) if name == "memory" else state
    assert json.loads(session.get_modelmeta().custom_metadata_map["strategies"]) == ["a", "b", "c"]
