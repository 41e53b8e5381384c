"""The libraries people use really train on our environments; see experiments/integrations/README.md."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from agents.sb3 import isolated_generators
from experiments.integrations import cleanrl_ppo, make_environment, sb3_agents
from metarec_gym.envs import MetaRecVectorEnv, TuneVectorEnv
from metarec_gym.envs.sb3 import SB3VecEnv
from metarec_gym.policy import UniformPolicy
from metarec_gym.world import World

HORIZON = 6


@pytest.fixture(autouse=True)
def _generators_come_back() -> Iterator[None]:
    """The libraries seed and draw from the process's own generators; no other test may notice."""
    with isolated_generators():
        yield


@pytest.fixture(scope="module")
def easy_world() -> World:
    """Nobody leaves, nobody is cold: a user's own specialist brings 3 * 0.9 clicks a request, the other one 3 * 0.05."""
    return World.synthetic(
        n_types=2,
        users_per_type=8,
        items_per_type=24,
        horizon=HORIZON,
        slate_size=3,
        high=0.9,
        low=0.05,
        history_lengths=(3,),
        leaving=None,
    )


# ------------------------------------------------------------------------------------------ Stable-Baselines3
@pytest.mark.parametrize(
    ("task", "steps"),
    [("ppo_select", 640), ("a2c_select", 960), ("dqn_select", 800), ("sac_blend", 640), ("ppo_slots", 960)],
)
def test_sb3_learns_from_as_many_requests_as_asked_and_gets_better(easy_world: World, task: Any, steps: int) -> None:
    numbers = sb3_agents.train(task, steps, seed=0, world=easy_world)
    assert numbers["transitions"] == steps
    assert numbers["parameter_change"] > 0
    # an untrained policy is near the mean of the two specialists and `mixed`: 6 * 3 * 0.475 = 8.6
    assert numbers["return_after"] > numbers["return_before"] + 0.5


def test_sb3s_own_loop_over_single_environments_trains_too(easy_world: World) -> None:
    numbers = sb3_agents.train("ppo_select", 80, seed=0, num_envs=2, batched=False, world=easy_world)
    assert numbers["transitions"] == 80
    assert numbers["parameter_change"] > 0
    assert math.isfinite(numbers["return_after"])


def test_sb3s_replay_buffer_holds_the_last_observation_of_every_cut_episode(easy_world: World) -> None:
    model = sb3_agents.make_model("dqn_select", 0, num_envs=4, world=easy_world)
    model.learn(4 * 20)
    buffer: Any = model.replay_buffer
    place = MetaRecVectorEnv(1, world=easy_world).feature_slices["request_fraction"]
    done = buffer.dones[:20] > 0
    # 20 requests are 3 whole episodes of 6 in each of the 4 rows
    assert done.sum() == 4 * 3
    assert np.array_equal(buffer.timeouts[:20], buffer.dones[:20])
    assert buffer.next_observations[:20][done][:, place].ravel().tolist() == [1.0] * 12
    assert not buffer.observations[1:20][done[:-1]][:, place].any()


def test_the_sb3_adapter_takes_what_make_vec_gives_and_refuses_other_environments() -> None:
    rows = SB3VecEnv(gymnasium.make_vec("MetaRec/Select-v0", num_envs=3, autoreset_mode="SameStep"))
    assert rows.reset().shape[0] == 3
    # Tune has no masks, and says so as sb3-contrib asks
    assert not SB3VecEnv(TuneVectorEnv(2, autoreset_mode="SameStep")).has_attr("action_masks")
    with pytest.raises(TypeError, match="SyncVectorEnv"):
        SB3VecEnv(gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync"))


# ------------------------------------------------------------------------------------------ sb3-contrib
def test_maskable_ppo_never_asks_a_strategy_out_of_service_and_plain_ppo_does(easy_world: World) -> None:
    pytest.importorskip("sb3_contrib", reason="needs sb3-contrib: pip install sb3-contrib")
    from experiments.integrations import sb3_contrib_agents

    settings: dict[str, Any] = {"outage_rate": 0.2, "unavailable": ("mixed",), "world": easy_world}
    masked = sb3_contrib_agents.train("maskable_ppo", 640, seed=0, **settings)
    plain = sb3_contrib_agents.train("ppo", 160, seed=0, **settings)
    assert masked["transitions"] == 640
    # `mixed` is always out of service, so there is at least one forbidden choice a request
    assert masked["masked_choices"] > 640
    assert masked["violations"] == 0
    assert plain["violations"] > 0
    assert masked["return_after"] > masked["return_before"]


def test_maskable_ppo_fills_no_place_of_a_slate_from_a_strategy_out_of_service(easy_world: World) -> None:
    contrib = pytest.importorskip("sb3_contrib", reason="needs sb3-contrib: pip install sb3-contrib")
    rows = sb3_agents.make_rows("MetaRec/Slots-v0", 4, unavailable=("mixed",), world=easy_world)
    model = contrib.MaskablePPO("MlpPolicy", rows, n_steps=20, batch_size=40, n_epochs=1, seed=0, device="cpu")
    model.learn(80)
    # strategies 0, 1 and mixed = 2, a choice for each of 3 places
    assert np.unique(model.rollout_buffer.actions).tolist() == [0.0, 1.0]


def test_recurrent_ppo_trains_and_keeps_its_memory_within_episodes(easy_world: World) -> None:
    pytest.importorskip("sb3_contrib", reason="needs sb3-contrib: pip install sb3-contrib")
    from experiments.integrations import sb3_contrib_agents

    rows = sb3_agents.make_rows("MetaRec/Select-v0", 8, world=easy_world)
    model: Any = sb3_contrib_agents.make_model("recurrent_ppo", rows, seed=0)
    before = torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()
    model.learn(160)
    assert model.num_timesteps == 160
    assert not torch.equal(before, torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach())
    starts = model.rollout_buffer.episode_starts.reshape(8, 20)
    # requests 0, 6, 12 and 18 of a rollout of 20 begin an episode
    assert np.flatnonzero(starts[0]).tolist() == [0, 6, 12, 18]


# ------------------------------------------------------------------------------------------ CleanRL's manner
def test_advantages_pass_no_ending_and_sum_what_lies_ahead() -> None:
    # two rows, gamma = lambda = 1/2; row 0 ends after request 0, row 1 never
    rewards = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    values = torch.tensor([[0.5, 0.5], [1.0, 1.0]])
    done = torch.tensor([[True, False], [False, False]])
    got = cleanrl_ppo.advantages(rewards, values, done, torch.tensor([4.0, 4.0]), 0.5, 0.5)
    # request 1: 2 + 0.5 * 4 - 1 = 3; request 0: ended 1 - 0.5 = 0.5; going on 1 + 0.5 * 1 - 0.5 + 0.25 * 3 = 1.75
    assert got.tolist() == [[0.5, 1.75], [3.0, 3.0]]


def test_only_a_cut_episode_is_worth_what_its_last_observation_promises() -> None:
    class Doubles:
        """Values a state at twice its only feature."""

        def value(self, obs: torch.Tensor) -> torch.Tensor:
            return 2.0 * obs[:, 0]

    no, yes = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    got = cleanrl_ppo.bootstrapped(torch.ones(4), no, yes, {"final_obs": torch.full((4, 1), 3.0)}, Doubles(), gamma=0.5)
    # only row 1 was cut without an end: 1 + 0.5 * 2 * 3
    assert got.tolist() == [1.0, 4.0, 1.0, 1.0]


def test_the_one_file_ppo_counts_every_cut_and_gets_better(easy_world: World) -> None:
    args = cleanrl_ppo.Args(total_steps=16 * 12 * 6, num_envs=16, num_steps=12)
    numbers = cleanrl_ppo.train(args, world=easy_world)
    assert numbers["transitions"] == 16 * 12 * 6
    # 12 requests are two episodes of 6 in each row
    assert numbers["bootstraps"] == 16 * 2 * 6
    assert numbers["reward_last"] > numbers["reward_first"] + 0.3


def test_equal_seeds_give_the_one_file_ppo_equal_numbers(easy_world: World) -> None:
    args = cleanrl_ppo.Args(total_steps=8 * 6 * 2, num_envs=8, num_steps=6)
    one, two, other = (cleanrl_ppo.train(dataclasses.replace(args, seed=seed), world=easy_world) for seed in (0, 0, 1))
    assert one == two
    assert one != other


# ------------------------------------------------------------------------------------------ TorchRL
@pytest.fixture
def torchrl_proof() -> Any:
    pytest.importorskip("torchrl", reason="needs torchrl: pip install torchrl")
    from experiments.integrations import torchrl_ppo

    return torchrl_ppo


@pytest.mark.parametrize("env_id", ["MetaRec/Select-v0", "MetaRec/Blend-v0", "MetaRec/Slots-v0", "MetaRec/Tune-v0"])
def test_torchrls_own_check_passes_for_the_id(torchrl_proof: Any, env_id: str) -> None:
    from torchrl.envs import check_env_specs

    check_env_specs(torchrl_proof.make_single(env_id), seed=0)


@pytest.mark.parametrize("mode", ["Disabled", "SameStep"])
def test_torchrl_sees_the_last_observation_of_an_episode_and_then_a_new_user(
    torchrl_proof: Any, easy_world: World, mode: str
) -> None:
    from torchrl.envs import check_env_specs

    env = torchrl_proof.make_batch(3, mode=mode, world=easy_world)
    check_env_specs(env, seed=0)
    rollout = env.rollout(2 * HORIZON, break_when_any_done=False)
    place = MetaRecVectorEnv(1, world=easy_world).feature_slices["request_fraction"]
    asked, got = rollout["observation"][..., place], rollout["next", "observation"][..., place]
    count = torch.arange(2 * HORIZON)
    assert torch.equal((asked[0, :, 0] * HORIZON).round().long(), count % HORIZON)
    assert torch.equal((got[2, :, 0] * HORIZON).round().long(), count % HORIZON + 1)
    assert rollout["next", "truncated"][1, :, 0].nonzero()[:, 0].tolist() == [5, 11]
    assert not rollout["next", "terminated"].any()


def test_torchrl_refuses_next_step_resets(torchrl_proof: Any, easy_world: World) -> None:
    with pytest.raises(RuntimeError, match="SAME_STEP or DISABLED"):
        torchrl_proof.make_batch(2, mode="NextStep", world=easy_world)


def test_torchrls_ppo_learns_from_as_many_requests_as_asked_and_gets_better(
    torchrl_proof: Any, easy_world: World
) -> None:
    numbers = torchrl_proof.train(16 * 12 * 5, seed=0, num_envs=16, num_steps=12, world=easy_world)
    assert numbers["transitions"] == 16 * 12 * 5
    assert numbers["truncated"] == 16 * 2 * 5
    assert numbers["reward_last"] > numbers["reward_first"] + 0.3


# ------------------------------------------------------------------------------------------ Minari
@pytest.fixture
def minari_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("minari", reason="needs minari: pip install minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    from experiments.integrations import minari_dataset

    return minari_dataset


@pytest.mark.filterwarnings("ignore:.*is set to None")
def test_a_minari_dataset_replays_bit_by_bit_in_the_environment_that_it_names(
    minari_proof: Any, leaving_world: World, tmp_path: Path
) -> None:
    import minari

    leaving_world.save(tmp_path / "world")
    settings = {"world": str(tmp_path / "world"), "outage_rate": 0.2}
    buffers = minari_proof.collect(UniformPolicy(), 12, 7, **settings)
    minari_proof.export("metarec/select/uniform-v0", "uniform", buffers, **settings)
    dataset = minari.load_dataset("metarec/select/uniform-v0")
    numbers = minari_proof.replay(dataset)
    assert numbers == {"episodes": 12, "transitions": sum(map(len, buffers)), "different": 0}
    ended = [bool(episode.terminations[-1]) for episode in dataset]
    assert any(ended)
    assert not all(ended)
    for episode in dataset:
        mask = episode.infos["action_mask"][:-1]
        assert mask[np.arange(len(episode)), episode.actions].all()
        # uniform over the strategies in service
        assert np.allclose(episode.infos["propensity"][:-1], 1 / mask.sum(axis=1))
        assert np.isnan(episode.infos["propensity"][-1])
        assert (episode.infos["slate"][0] == -1).all()
        assert np.array_equal(episode.rewards, episode.infos["outcomes"][1:, :, 0].sum(axis=1))


@pytest.mark.filterwarnings("ignore:.*is set to None")
def test_the_replay_notices_episodes_of_other_users(minari_proof: Any, leaving_world: World, tmp_path: Path) -> None:
    leaving_world.save(tmp_path / "world")
    buffers = minari_proof.collect(UniformPolicy(), 2, 7, world=str(tmp_path / "world"))
    wrong = [dataclasses.replace(buffer, seed=buffer.seed + 100) for buffer in buffers]
    dataset = minari_proof.export("metarec/select/wrong-v0", "uniform", wrong, world=str(tmp_path / "world"))
    assert minari_proof.replay(dataset)["different"] > 0


# ------------------------------------------------------------------------------------------ environments of their own
def run_in_its_environment(library: str, module: str, *arguments: str) -> dict[str, Any]:
    """The JSON that the proof prints, run in `build/envs/<library>`."""
    if not make_environment.is_ready(library):
        pytest.skip(f"{library} has no environment here: python -m experiments.integrations.make_environment {library}")
    command = [str(make_environment.python_of(library)), "-W", "ignore", "-m", f"experiments.integrations.{module}"]
    run = subprocess.run(
        [*command, *arguments],
        cwd=make_environment.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(json.loads(run.stdout[run.stdout.index("{") :]))


@pytest.mark.slow
def test_rllib_trains_sees_whole_episodes_and_restores_its_checkpoint() -> None:
    numbers = run_in_its_environment("rllib", "rllib_ppo", "--steps", "1600")
    # rollouts end at the first step of the batch that reaches 320 requests, so up to 15 more each
    assert 1600 <= numbers["transitions"] < 1600 + 5 * 16
    assert numbers["broken_episodes"] == 0
    # the control: what a same-step environment would have told RLlib
    assert numbers["broken_episodes_same_step"] > 0
    assert numbers["parameter_change"] > 0
    assert numbers["return_after"] > numbers["return_before"] + 1
    assert numbers["checkpoint_restores"] is True


@pytest.mark.slow
def test_tianshou_trains_keeps_last_observations_and_never_asks_a_strategy_out_of_service() -> None:
    numbers = run_in_its_environment("tianshou", "tianshou_dqn", "--steps", "1600")
    assert numbers["transitions"] == 1600
    assert numbers["truncated"] > 0
    assert numbers["truncated_at_the_horizon"] == numbers["truncated"]
    assert numbers["masked_choices"] > 0
    assert numbers["violations"] == 0
    assert numbers["return_after"] > numbers["return_before"] + 1


@pytest.mark.parametrize("library", make_environment.LIBRARIES)
def test_every_requirement_of_an_environment_is_pinned_once(library: str) -> None:
    text = (make_environment.HERE / f"requirements-{library}.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    names = [line.split("==")[0].lower() for line in lines]
    assert len(set(names)) == len(names)
    assert "torch==2.13.0" in lines


def test_an_environment_whose_installation_fails_is_made_anew_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_environment, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    commands: list[list[str]] = []
    fails = True

    def run(command: list[str], check: bool) -> None:
        assert check
        commands.append(command)
        Path(tmp_path / "build" / "envs" / "rllib").mkdir(parents=True, exist_ok=True)
        if fails and "install" in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(subprocess.CalledProcessError):
        make_environment.make("rllib")
    assert not make_environment.is_ready("rllib")
    fails = False
    make_environment.make("rllib")
    assert [command[1:3] for command in commands] == [["-m", "venv"], ["-m", "pip"]] + [["-m", "venv"]] + 2 * [
        ["-m", "pip"]
    ]
    assert commands[0][0] == sys.executable
    assert make_environment.is_ready("rllib")
    make_environment.make("rllib")
    assert len(commands) == 5
