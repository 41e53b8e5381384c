"""The commands end to end on tiny worlds: what is finished is not repeated, what was killed ends with the same numbers."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import compare, train
from experiments import headroom as headroom_command
from experiments.env_settings import env_pairs, env_settings
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.evaluation import tasks
from metarec_gym.evaluation.headroom import EvalSettings
from metarec_gym.evaluation.leaderboard import TRAINED
from metarec_gym.evaluation.metrics import closed_gap
from metarec_gym.evaluation.verdict import JUST_USE
from metarec_gym.policy import MlpPolicy
from metarec_gym.response.frozen import FrozenResponse
from metarec_gym.world import World

SMALL = EvalSettings(replicates=1, horizon=4, horizons=(2,), batch_rows=256, look_ahead=2, look_branches=2)


@pytest.fixture(scope="module")
def world_folder(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.save(tmp_path_factory.mktemp("worlds") / "tiny")


def _train_args(world: Path, runs: Path, **changes: object) -> train.Args:
    args = train.Args(
        world=world,
        steps=640,
        num_envs=16,
        horizon=4,
        set=("num_steps=8", "minibatch_size=64", "checkpoint_every=1"),
        runs=runs,
        quiet=True,
    )
    return dataclasses.replace(args, **changes)  # type: ignore[arg-type]


def _compare_args(world: Path, runs: Path, agents: tuple[str, ...]) -> compare.Args:
    return compare.Args(
        world=world, agents=agents, seeds=2, steps=512, evaluation=SMALL, workers=1, runs=runs, quiet=True
    )


def test_a_finished_training_is_found_and_not_repeated(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = _train_args(world_folder, tmp_path)
    row = train.run(args, "python -m experiments.train")
    folder = train.run_folder(args)
    assert row["world"] == World.load(world_folder).hash
    assert {"response", "seed", "device", "versions", "seconds", "steps"} <= set(row)
    assert MlpPolicy.load(folder.path / "policy.safetensors").strategies == ("specialist_0", "specialist_1", "mixed")
    assert json.loads((folder.path / "args.json").read_text())["args"]["fold"] == "A"

    from agents import ppo

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ppo, "train", never)
    assert train.run(args) == row
    # another seed is another question
    assert train.run_folder(dataclasses.replace(args, seed=1)).result() is None


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _train_args(world_folder, tmp_path / "whole")
    train.run(whole, "")
    killed = _train_args(world_folder, tmp_path / "killed", resume=True)
    done = 0

    def kill(amount: int) -> None:
        nonlocal done
        done += amount
        if done > 300:
            raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "_advance", kill)
    with pytest.raises(KeyboardInterrupt):
        train.run(killed, "")
    assert train.run_folder(killed).result() is None
    monkeypatch.setattr(tasks, "_advance", None)
    train.run(killed, "")
    first, second = (MlpPolicy.load(train.run_folder(args).path / "policy.safetensors") for args in (whole, killed))
    for (w1, b1), (w2, b2) in zip(first.layers, second.layers, strict=True):
        np.testing.assert_array_equal(w1.numpy(), w2.numpy())
        np.testing.assert_array_equal(b1.numpy(), b2.numpy())


def test_hyperparameters_are_set_by_name_and_wrong_names_are_refused() -> None:
    args = train.learner_args(train.Args(steps=7, seed=3, set=("learning_rate=0.5", "hidden=8,4", "epochs=2")))
    assert (args.total_steps, args.seed, args.learning_rate, args.hidden, args.epochs) == (7, 3, 0.5, (8, 4), 2)
    with pytest.raises(ValueError, match="learning_rat"):
        train.learner_args(train.Args(set=("learning_rat=1",)))
    with pytest.raises(ValueError, match="name=value"):
        train.learner_args(train.Args(set=("epochs",)))


@pytest.mark.parametrize(
    ("agent", "loader"),
    [
        ("tuned_ppo", "metarec_gym.policy.load_policy"),
        ("linucb", "agents.bandits.load_bandit"),
        ("knn_router", "agents.supervised.load"),
    ],
)
def test_an_agent_of_the_roster_is_trained_and_leaves_a_policy_that_loads(
    world_folder: Path, tmp_path: Path, agent: str, loader: str
) -> None:
    args = train.Args(world=world_folder, agent=agent, steps=1024, horizon=4, runs=tmp_path, quiet=True)
    row = train.run(args)
    assert (row["agent"], row["steps"], row["loader"]) == (agent, 1024, loader)
    module, _, name = loader.rpartition(".")
    policy = getattr(importlib.import_module(module), name)(train.run_folder(args).path / row["policy"])
    world = World.load(world_folder)
    env = MetaRecVectorEnv(3, world=world, output="torch")
    obs, _ = env.reset(seed=0)
    policy.begin(3)
    probs = policy.action_probs(obs, torch.ones(3, world.n_strategies, dtype=torch.bool))
    assert torch.allclose(probs.sum(dim=1), torch.ones(3))
    # found again, not learned again
    assert train.run(args)["wall_seconds"] == row["wall_seconds"]


def test_what_an_agent_of_the_roster_cannot_take_is_refused(world_folder: Path, tmp_path: Path) -> None:
    plain = train.Args(world=world_folder, agent="linucb", runs=tmp_path, quiet=True)
    for settings, named in (
        ({"set": ("epochs=2",)}, "--set"),
        ({"num_envs": 8}, "--num-envs"),
        ({"judge": "second"}, "--judge"),
    ):
        with pytest.raises(ValueError, match=f"linucb learns from a lesson.*leave out {named}"):
            train.run(dataclasses.replace(plain, **settings))
    with pytest.raises(ValueError, match="linucb chooses one strategy a request, --env is MetaRec/Blend-v0"):
        train.run(dataclasses.replace(plain, env=("MetaRec/Blend-v0",)))
    with pytest.raises(ValueError, match="round_robin leaves no file"):
        train.run(dataclasses.replace(plain, agent="round_robin", steps=64, horizon=4))


def test_the_headroom_command_prints_its_line_and_keeps_its_result(
    world_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = headroom_command.Args(world=world_folder, evaluation=SMALL, workers=1, runs=tmp_path, quiet=True)
    row = headroom_command.run(args)
    printed = capsys.readouterr().out
    assert "headroom over the single best strategy" in printed
    assert "per-user oracle +66.7 %" in printed
    assert row["windows"]["@4"]["per-user oracle"]["estimate"] == pytest.approx(2 / 3, abs=1e-6)
    assert row["responses"] == {fold: r.hash for fold, r in World.load(world_folder).responses.items()}


def test_single_agents_may_have_other_numbers_of_seeds(world_folder: Path, tmp_path: Path) -> None:
    args = _compare_args(world_folder, tmp_path, ("ppo", "population_ucb", "epsilon_greedy"))
    comparer = compare.Comparer(dataclasses.replace(args, seeds=2, seeds_of=("ppo=3", "epsilon_greedy=9")))
    # nothing is drawn in learning epsilon-greedy, so more seeds would repeat it
    seeds = {agent: comparer.seeds(agent) for agent in comparer.agents}
    assert seeds == {"ppo": 3, "population_ucb": 2, "epsilon_greedy": 1}
    assert len(comparer.training_args(_Horizon(4))) == 6  # type: ignore[arg-type]
    for wrong in ("ppo", "ppo=0", "dqn2=3"):
        with pytest.raises(ValueError, match="expected AGENT=N"):
            compare.Comparer(dataclasses.replace(args, seeds_of=(wrong,)))


def test_single_learners_may_have_other_hyperparameters(world_folder: Path, tmp_path: Path) -> None:
    args = _compare_args(world_folder, tmp_path, ("ppo", "sb3_ppo"))
    comparer = compare.Comparer(dataclasses.replace(args, set_of=("ppo:gamma=0.95", "ppo:gae_lambda=0.8")))
    jobs = comparer.training_args(_Horizon(4))  # type: ignore[arg-type]
    assert {job.agent: job.set for job in jobs} == {"ppo": ("gamma=0.95", "gae_lambda=0.8"), "sb3_ppo": ()}
    assert "--set gamma=0.95 gae_lambda=0.8" in compare.train_command(jobs[0])
    for wrong in ("gamma=0.95", "ucb1:scale=2", "ppo:gamma"):
        with pytest.raises(ValueError, match="expected LEARNER:NAME=VALUE"):
            compare.Comparer(dataclasses.replace(args, set_of=(wrong,)))


def test_compare_writes_every_file_and_a_second_run_trains_and_plays_nothing(
    world_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = _compare_args(world_folder, tmp_path, ("ppo", "epsilon_greedy", "population_ucb"))
    result = compare.run(args)
    printed = capsys.readouterr().out
    for text in (
        "world  synthetic",
        "3 strategies",
        "utility/request",
        "AGC_user",
        "verdict  ",
        "tensorboard --logdir",
    ):
        assert text in printed
    assert list(result.checks.values())[:2] == ["0", "1"]
    names = {row.name: row.kind for row in result.rows}
    assert names["ppo"] == "learned"
    assert names["population_ucb"] == "bandit"
    assert {"SBS", "SCHED", "random", "specialist_0", "per-user oracle", "greedy oracle"} <= set(names)
    for file in ("args.json", "command.txt", "result.json", "report.html", "leaderboard.md"):
        assert (result.folder / file).is_file()
    assert list(result.folder.glob("events.out.tfevents.*"))
    # one run of the HParams page a policy
    assert {p.parent.name for p in result.folder.glob("policies/*/events.out.tfevents.*")} >= {"ppo", "SBS", "FIR"}
    stored = json.loads((result.folder / "result.json").read_text())
    # three trained policies against SCHED, and two of them against the one hierarchical bandit
    assert len(stored["pairs"]) == len(result.pairs) == 3 + 2
    assert {found["reference"] for found in stored["hull"]} == {"SBS", "SCHED"}
    page = (result.folder / "report.html").read_text()
    for title in ("Which differences are sure", "Quality and serving cost", "What every policy serves"):
        assert f"<h2>{title}</h2>" in page
    lines = list(csv.DictReader((result.folder / "leaderboard_synthetic.csv").read_text().splitlines()))
    assert len(lines) == len(names) * 3

    def never(**_: object) -> dict[str, object]:
        raise AssertionError("done again")

    monkeypatch.setattr(tasks, "_run_here", never)
    again = compare.run(args)
    before, after = (json.dumps([compare.row_json(r, x.headroom) for r in x.rows]) for x in (result, again))
    assert before == after


@pytest.mark.slow
def test_blends_stand_on_the_leaderboard_and_the_verdict_on_selecting_does_not_count_them(
    world_folder: Path, tmp_path: Path
) -> None:
    args = dataclasses.replace(
        _compare_args(world_folder, tmp_path, ("sb3_sac", "fixed_hybrid", "ppo")),
        seeds=1,
        steps=1024,
        cost_weights=(0.5,),
    )
    jobs = compare.Comparer(args).training_args(_Horizon(4))  # type: ignore[arg-type]
    assert {train.env_of(job)[0] for job in jobs if job.agent == "sb3_sac"} == {"MetaRec/Blend-v0"}
    assert "--env MetaRec/Blend-v0" in compare.train_command(next(job for job in jobs if job.agent == "sb3_sac"))
    result = compare.run(args)
    rows = {row.name: row for row in result.rows}
    assert {name for name, row in rows.items() if row.blends} == {"sb3_sac", "fixed_hybrid"}
    assert (rows["sb3_sac"].kind, rows["fixed_hybrid"].kind) == ("learned", "supervised")
    # the network's weights are never 0 exactly: each request asks all three
    costs = World.load(world_folder).tensors["costs"].numpy()
    assert rows["sb3_sac"].cost == pytest.approx(costs.sum())
    assert rows["sb3_sac"].share.sum() == pytest.approx(1.0)
    assert rows["sb3_sac"].value_train
    # a fixed fusion of these lists is worth what its strategies are worth on average: half of the users like each
    assert rows["fixed_hybrid"].value[result.headroom.headline].estimate == pytest.approx(0.6, abs=0.05)
    assert result.verdict.policy in (None, "ppo")
    assert "Blending is no selecting" in result.verdict.reason
    offers = {o.label: o for o in result.frontiers[0].offers}
    assert {f"{name}{end}" for name in ("sb3_sac", "fixed_hybrid", "ppo") for end in ("", " (cost weight 0.5)")} <= set(
        offers
    )
    assert offers["sb3_sac"].cost == pytest.approx(costs.sum())


@pytest.fixture(scope="module")
def two_judges(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world with a second judge by which users like the *other* category: 0.1 becomes 0.5 and the reverse."""
    responses = dict(tiny_world.responses)
    for fold in ("A", "B"):
        judge = tiny_world.responses[fold]
        tensors = {**judge.tensors, "effect_mean": judge.tensors["effect_mean"].flip(0)}
        responses[f"{fold}/second"] = FrozenResponse(tensors, judge.outcomes, judge.feature_names)
    tensors = {**tiny_world.tensors, "start_state_second": tiny_world.tensors["start_state"].clone()}
    world = dataclasses.replace(tiny_world, tensors=tensors, responses=responses)
    return world.save(tmp_path_factory.mktemp("worlds") / "two_judges")


def test_a_second_judge_scores_everything_again_and_what_it_turns_round_is_named(
    two_judges: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = compare.run(_compare_args(two_judges, tmp_path, ("ppo", "population_ucb")))
    rows = {row.name: row for row in result.rows}
    at = result.headroom.headline
    # every row but none is missing; always the same strategy is worth 0.6 on average whichever category users like
    assert all(len(row.lift_sbs_second) == len(result.headroom.windows) for row in result.rows)
    assert rows["SBS"].lift_sbs_second[at].estimate == 0.0
    # the oracle's choices give 1.0 by the main judge and 0.2 by the second, SBS 0.6 by both
    oracle = rows["per-user oracle"]
    assert oracle.lift_sbs[at].estimate == pytest.approx(2 / 3, abs=1e-6)
    assert oracle.lift_sbs_second[at].estimate == pytest.approx(-2 / 3, abs=1e-6)
    assert oracle.model_dependent(at)
    # the greedy oracle knows the judge it is scored by
    assert rows["greedy oracle"].lift_sbs_second[at].estimate == pytest.approx(2 / 3, abs=1e-6)
    lines = list(csv.DictReader((result.folder / "leaderboard_synthetic.csv").read_text().splitlines()))
    line = next(x for x in lines if x["policy"] == "per-user oracle" and x["horizon"] == "4")
    assert float(line["lift_sbs_second"]) == pytest.approx(-2 / 3, abs=1e-4)
    assert float(line["lift_sbs_second_lo"]) < float(line["lift_sbs_second_hi"])
    assert line["model_dependent"] == "true"
    assert float(next(x for x in lines if x["policy"] == "ppo")["value_train_judge"]) > 0.0
    markdown = (result.folder / "leaderboard.md").read_text()
    assert "lift over SBS, second judge" in markdown
    assert "model-dependent" in markdown
    row = next(x for x in json.loads((result.folder / "result.json").read_text())["rows"] if x["policy"] == "FIR")
    assert row["windows"]["@4"]["lift_sbs_second"] is not None
    assert "Second judge" in capsys.readouterr().out


def test_policies_are_trained_in_the_environment_they_are_scored_in_but_by_the_main_judge(
    two_judges: Path, tmp_path: Path
) -> None:
    args = dataclasses.replace(
        _compare_args(two_judges, tmp_path, ("ppo",)), env=("patience=3", "base_rate_factor=0.5"), judge="second"
    )
    comparer = compare.Comparer(args)
    assert comparer.args.evaluation.env == {"patience": 3, "base_rate_factor": 0.5, "judge": "second"}
    # the second judge scores the table itself: there is no other one to score it again
    assert comparer.second is None
    job = comparer.training_args(_Horizon(4))[0]  # type: ignore[arg-type]
    assert train.env_of(job) == ("MetaRec/Select-v0", {"patience": 3, "base_rate_factor": 0.5})
    assert "patience=3" in compare.train_command(job)
    plain = dataclasses.replace(job, env=(train.SELECT_ID,))
    assert train.run_folder(job).key != train.run_folder(plain).key


@dataclasses.dataclass
class _Horizon:
    horizon: int


def test_environment_settings_are_read_as_json_and_checked() -> None:
    found = env_settings(("patience=3", "outage_rate=0.1", "fusion=linear_rank", "judge=main"), session_requests=5)
    assert found == {"patience": 3, "outage_rate": 0.1, "fusion": "linear_rank", "session_requests": 5}
    assert env_settings(env_pairs(found)) == found
    with pytest.raises(ValueError, match="KEY=VALUE"):
        env_settings(("patience",))
    with pytest.raises(ValueError, match="patient"):
        env_settings(("patient=3",))
    with pytest.raises(ValueError, match="twice"):
        env_settings(("patience=3", "patience=4"))
    with pytest.raises(ValueError, match="give it once"):
        env_settings(("judge=second",), judge="uniform")
    with pytest.raises(ValueError, match="ids"):
        train.env_of(train.Args(env=("MetaRec/Select-v0", "MetaRec/Blend-v0")))


def test_a_null_world_ends_in_just_use(tmp_path: Path) -> None:
    world = World.synthetic(
        n_types=2,
        users_per_type=4,
        items_per_type=16,
        horizon=4,
        slate_size=2,
        history_lengths=(0, 3),
        leaving=None,
        identical=True,
    )
    folder = world.save(tmp_path / "null")
    result = compare.run(_compare_args(folder, tmp_path / "runs", ("ppo", "ucb1")))
    assert result.verdict.kind == JUST_USE
    assert result.verdict.headline == f"just use {result.headroom.sbs_name}"
    for row in result.rows:
        assert row.lift_sbs[result.headroom.headline].estimate == 0.0
        assert row.agc_user[result.headroom.headline] is None
        assert row.kind not in TRAINED or row.p_holm == 1.0


def test_agents_are_chosen_by_kind_and_learn_again_for_every_cost_weight(world_folder: Path, tmp_path: Path) -> None:
    small = _compare_args(world_folder, tmp_path, ("ppo", "population_ucb"))
    args = dataclasses.replace(small, seeds=1, cost_weights=(5.0,))
    comparer = compare.Comparer(dataclasses.replace(args, agents=("learned",)))
    assert comparer.agents == tuple(name for name in (*train.LEARNERS, "tuned_ppo") if name not in comparer.skipped)
    result = compare.run(args)
    offers = {o.label: o for o in result.frontiers[0].offers}
    plain, priced = offers["population_ucb"], offers["population_ucb (cost weight 5)"]
    # serving costs 0.2, 0.6 and 1: a weight of 5 makes the cheapest strategy the best for everybody, worth 0.6 before cost
    assert priced.cost == pytest.approx(0.2)
    assert priced.utility == pytest.approx(0.6, abs=1e-5)
    assert plain.cost > 0.25
    # trained twice in each direction, and each training is played
    assert len(list(tmp_path.glob("ppo_*"))) == 2 * 2
    assert {"ppo", "ppo (cost weight 5)"} <= set(offers)
    assert "per-user oracle" not in offers
    assert "population_ucb (cost weight 5)" not in {row.name for row in result.rows}
    assert "## Quality and serving cost" in (result.folder / "leaderboard.md").read_text()


def test_unknown_agents_are_named(world_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dqn2"):
        compare.run(_compare_args(world_folder, tmp_path, ("ppo", "dqn2")))


def test_a_missing_world_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="experiments.build_world"):
        headroom_command.load_world(tmp_path / "nowhere")


def test_closed_gap_of_the_table_is_the_metric(world_folder: Path, tmp_path: Path) -> None:
    args = _compare_args(world_folder, tmp_path, ("epsilon_greedy",))
    result = compare.run(args)
    found = result.headroom
    # without a second judge its columns are empty
    lines = list(csv.DictReader((result.folder / "leaderboard_synthetic.csv").read_text().splitlines()))
    assert {(line["lift_sbs_second"], line["model_dependent"]) for line in lines} == {("", "")}
    assert "second judge" not in (result.folder / "leaderboard.md").read_text()
    at = found.headline
    sbs, oracle = found.pooled(found.sbs_value())[:, at], found.pooled(found.oracle_value())[:, at]
    gap = closed_gap(oracle, sbs, oracle, found.headrooms()["per-user oracle"])
    assert gap is not None
    assert gap.estimate == 1.0
