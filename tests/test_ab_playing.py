"""Tests played in a world: visitors, the pre-period, exposure tables, interleaving, and the command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.ab_test import run
from experiments.ab_world import Args, arms_of, metrics_of, weights_of
from metarec_gym.evaluation.ab_test.interleaving import Preferences, draft, interleave, sensitivity
from metarec_gym.evaluation.ab_test.playing import exposure_table, play_arm, visitors
from metarec_gym.evaluation.ab_test.table import Metric, user_table
from metarec_gym.evaluation.online import best_policy, serve_in_world
from metarec_gym.evaluation.rollout import Fixed, Greedy, Rows
from metarec_gym.policy import FixedPolicy, MlpPolicy, UniformPolicy
from metarec_gym.seeding import numpy_rng
from metarec_gym.world import World

needs_tea_tasting = pytest.mark.skipif(
    importlib.util.find_spec("tea_tasting") is None, reason="needs the ab extra: pip install 'metarec-gym[ab]'"
)


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("ab") / "world"
    World.synthetic(n_types=2, users_per_type=30, items_per_type=60, horizon=6, slate_size=3, leaving=(-3.0, 0.8)).save(
        folder
    )
    return folder


def test_everybody_comes_as_often_as_asked_in_an_order_of_chance(tiny_world: World) -> None:
    group = visitors(tiny_world, "B", visits=3, seed=0)
    # fold B has 2 types x 4 users
    assert len(group) == 24
    assert len(set(group.visitor_id)) == 24
    assert sorted(group.noise.tolist()) == [0] * 8 + [1] * 8 + [2] * 8
    assert group.visitor_id != visitors(tiny_world, "B", visits=3, seed=1).visitor_id
    with pytest.raises(ValueError, match="at least 1"):
        visitors(tiny_world, "B", visits=0)


def test_arms_differ_only_after_the_pre_period(tiny_world: World) -> None:
    group = visitors(tiny_world, "B", seed=0)
    one, two = (
        play_arm(tiny_world, "B", Fixed(k), group, horizon=2, control=Fixed(2), pre_requests=2, seed=5) for k in (0, 1)
    )
    for name in one:
        np.testing.assert_array_equal(one[name][:, :2], two[name][:, :2])
    assert (one["reward"][:, 2:] != two["reward"][:, 2:]).any()


def test_a_visitor_meets_the_same_luck_in_any_group(tiny_world: World) -> None:
    group = visitors(tiny_world, "B", visits=2, seed=0)
    whole = play_arm(tiny_world, "B", UniformPolicy(), group, horizon=4, seed=5)
    part = play_arm(tiny_world, "B", UniformPolicy(), group.take(np.array([3, 9])), horizon=4, seed=5)
    for name, values in part.items():
        np.testing.assert_array_equal(values, whole[name][[3, 9]])


def test_a_policy_in_an_arm_plays_as_the_rule_it_is(tiny_world: World) -> None:
    group = visitors(tiny_world, "B", seed=0)
    policy, rule = (play_arm(tiny_world, "B", p, group, horizon=4, seed=5) for p in (FixedPolicy(1), Fixed(1)))
    np.testing.assert_array_equal(policy["reward"], rule["reward"])


def test_what_cannot_be_deployed_cannot_be_tested(tiny_world: World) -> None:
    with pytest.raises(TypeError, match="cannot be deployed"):
        play_arm(tiny_world, "B", Greedy(), visitors(tiny_world, "B"), horizon=2)


def test_the_exposure_table_by_hand(tiny_world: World) -> None:
    group = visitors(tiny_world, "B", seed=0).take(np.arange(3))
    # one request before, two in the test; the second visitor leaves before it begins, the third after its first request
    played = {
        "click": np.array([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        "alive": np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]),
    }
    table = exposure_table(group, ["old", "new", "new"], played, pre_requests=1)
    assert table["request"].tolist() == [0, 1, 0]
    users = user_table(table, [Metric("clicks", "click", covariate=("pre_click", None)), Metric("stay", "retained")])
    assert users["user_id"].tolist() == [group.visitor_id[0], group.visitor_id[2]]
    assert users[["click", "pre_click", "retained"]].to_numpy().tolist() == [[2, 1, 1], [1, 0, 0]]
    assert users["arm"].tolist() == ["old", "new"]


def test_a_draft_gives_each_pair_one_place_of_each_team() -> None:
    coins = torch.tensor([[True, False, True]])
    assert draft(coins, 6).tolist() == [[1, 0, 0, 1, 1, 0]]
    # of the last pair of an odd slate only the first place is there
    assert draft(coins, 5).tolist() == [[1, 0, 0, 1, 1]]


def test_preference_by_hand() -> None:
    # 3 more in 4 pairs of places; nothing shown: no preference
    found = Preferences(np.array([[1.0, 4.0], [0.0, 0.0]]), np.array([[4.0, 4.0], [0.0, 0.0]]))
    assert found.preference.tolist() == [0.75, 0.0]
    assert found.interval().estimate == 0.375


def test_interleaving_prefers_nobody_when_both_are_the_same(tiny_world: World) -> None:
    group = visitors(tiny_world, "B", visits=40, seed=0)
    same = interleave(tiny_world, "B", Fixed(2), Fixed(2), group, horizon=4, seed=1).interval()
    assert same.low < 0.0 < same.high


def test_interleaving_counts_nothing_of_the_pre_period(tiny_world: World) -> None:
    group = visitors(tiny_world, "B", visits=5, seed=0)
    found = interleave(tiny_world, "B", Fixed(0), Fixed(1), group, horizon=1, pre_requests=3, seed=1)
    # one request of two places, one of each team
    assert found.places.tolist() == [[1.0, 1.0]] * len(group)
    assert found.credit.max() <= 1.0


def test_interleaving_sees_a_difference_with_fewer_users_than_an_ab_test() -> None:
    # cold users; `mixed` shows both kinds of items in turn (0.5 and 0.1), the rule only the kind that the user likes (0.5)
    world = World.synthetic(
        n_types=2, users_per_type=20, items_per_type=40, horizon=4, slate_size=2, history_lengths=(0,), leaving=None
    )
    group = visitors(world, "B", visits=4, seed=0)
    rule = OwnSpecialist(world)
    preference = interleave(world, "B", Fixed(2), rule, group, horizon=4, seed=1)
    half = np.arange(len(group)) % 2 == 0
    arms = [
        play_arm(world, "B", player, group.take(np.flatnonzero(member)), horizon=4, seed=1)["reward"].mean(axis=1)
        for player, member in ((Fixed(2), half), (rule, ~half))
    ]
    found = sensitivity(preference.preference, *arms, samples=200)
    assert preference.interval().low > 0.0
    assert found.ab_test > 2.0
    assert found.fewer_users > 1.5


class OwnSpecialist:
    """The specialist of each user's own type, which only a test can know."""

    def __init__(self, world: World) -> None:
        # types take turns among the users
        self.choice = world.tensors["start_user"].to(torch.int64) % 2

    def row_choice(self, rows: Rows, request: int) -> torch.Tensor:
        return self.choice[rows.start_state]


def test_sensitivity_by_hand() -> None:
    # preference mean 1, variance 2, scaled to 4 users: z = 1 / sqrt(2 / 4)
    # A/B test: difference 2, variance 2 / 2 + 2 / 2: z = 2 / sqrt(2)
    found = sensitivity(np.array([0.0, 2.0]), np.array([0.0, 2.0]), np.array([2.0, 4.0]))
    assert found.interleaving == pytest.approx(2**0.5)
    assert found.ab_test == pytest.approx(2**0.5)
    assert found.fewer_users == pytest.approx(1.0)
    assert found.detected == ()


def test_adaptive_allocation_serves_each_visitor_once(tiny_world: World) -> None:
    serve = serve_in_world(tiny_world, "B", [Fixed(0), Fixed(2)], horizon=2, max_users=120, seed=3)
    found = best_policy(serve, 2, max_users=120, batch=20, first=40)
    assert found.users.sum() <= 120
    with pytest.raises(ValueError, match="were announced"):
        serve(0, 100)


# ---- the command


@needs_tea_tasting
def test_the_command_plans_plays_and_reports_and_is_found_again(world_folder: Path, tmp_path: Path, capsys) -> None:
    args = Args(
        world=world_folder,
        policies=("mixed", "specialist_0", "uniform"),
        visits=2,
        workers=1,
        runs=tmp_path,
        quiet=True,
        adaptive=True,
        adaptive_users=700,
    )
    row = run(args)
    (folder,) = tmp_path.glob("ab_test_*")
    assert row["stopped"] is None
    assert {e["metric"] for e in row["effects"]} == {"ctr", "reward"}
    assert {e["arm"] for e in row["effects"]} == set(row["interleaved"]) == {"specialist_0", "uniform"}
    assert set(row["planned"]) == {"ctr", "reward"}
    assert set(row["adaptive"]) == {"equal shares", "LUCB", "halving"}
    assert 0.01 < row["planned"]["reward"]["alarms"] < 0.1
    assert json.loads((folder / "result.json").read_text())["verdicts"] == row["verdicts"]
    assert (folder / "report.md").read_text().startswith("# A/B test in synthetic")
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "src=" not in page
    assert "<script" not in page
    assert "<section>" in page
    assert list(folder.glob("events.out.tfevents.*"))
    capsys.readouterr()
    assert run(args)["key"] == row["key"]
    assert "found finished" in capsys.readouterr().out
    # the table it wrote is analysed alike from outside
    own = run(
        Args(
            exposures=folder / "exposures.parquet",
            control="mixed",
            metrics=("ctr=click/shown", "reward=reward"),
            guardrails=("retention=retained@0.02",),
            runs=tmp_path,
        )
    )
    found = {(e["arm"], e["metric"]): e["p_value"] for e in own["effects"]}
    assert found == {(e["arm"], e["metric"]): e["p_value"] for e in row["effects"]}


def test_policies_are_named_checked_and_told_apart(world_folder: Path, tmp_path: Path) -> None:
    world = World.load(world_folder)
    arms = arms_of(Args(policies=("mixed", "mixed", "uniform")), world, {})
    assert [arm.name for arm in arms] == ["mixed", "mixed (2)", "uniform"]
    layer = [(torch.zeros(3, 4), torch.zeros(3))]
    path = MlpPolicy(layer, world.strategies, meta={"fold": "A"}).save(tmp_path / "run_1" / "policy.safetensors")
    arms = arms_of(Args(policies=("mixed", str(path))), world, {})
    assert arms[1].name == "run_1"
    with pytest.raises(ValueError, match="was trained on the users of fold A; test it with --fold B"):
        arms_of(Args(policies=("mixed", str(path)), fold="A"), world, {})
    with pytest.raises(ValueError, match="at least two"):
        arms_of(Args(policies=("mixed",)), world, {})
    with pytest.raises(ValueError, match="no strategy of the world"):
        arms_of(Args(policies=("mixed", "nobody")), world, {})
    other = MlpPolicy(layer, ("a", "b", "c")).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="train it in this world"):
        arms_of(Args(policies=("mixed", str(other))), world, {})


def test_metrics_guardrails_and_weights_are_read() -> None:
    found = metrics_of(Args(), ("watch", "like"))
    assert [m.name for m in found] == ["ctr", "conversion", "reward", "retention"]
    assert [m.margin for m in found] == [None, None, None, 0.02]
    with pytest.raises(ValueError, match="no metric"):
        metrics_of(Args(), None)
    with pytest.raises(ValueError, match="expected a metric, @ and a share"):
        metrics_of(Args(guardrails=("stay=retained",)), ("click",))
    assert weights_of(Args(), ["a", "b"]) == {"a": 1.0, "b": 1.0}
    assert weights_of(Args(weights=("b=1", "a=9")), ["a", "b"]) == {"a": 9.0, "b": 1.0}
    with pytest.raises(ValueError, match="the arms are"):
        weights_of(Args(weights=("a=1",)), ["a", "b"])


@needs_tea_tasting
def test_an_exposure_table_without_a_control_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,arm,click\n1,old,1\n2,new,0\n")
    with pytest.raises(ValueError, match=r"name one of the table's arms: \['new', 'old'\]"):
        run(Args(exposures=tmp_path / "log.csv", metrics=("clicks=click",), runs=tmp_path))


def test_sensitivity_resamples_with_its_own_generator() -> None:
    draws = [numpy_rng(0, name).normal(0.2, 1.0, 100) for name in ("p", "c", "t")]
    assert sensitivity(*draws, seed=1, samples=50) == sensitivity(*draws, seed=1, samples=50)
