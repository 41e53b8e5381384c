"""Explanations of policies: rules that keep the policy's worth, words in true units, attributions that add up, honest tables."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import explain as command
from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.envs.observation import feature_slices
from metarec_gym.evaluation.explain.attribution import attribute
from metarec_gym.evaluation.explain.counterfactual import counterfactual
from metarec_gym.evaluation.explain.distil import state_weight
from metarec_gym.evaluation.explain.explanation import Explained, explain, read_explanation
from metarec_gym.evaluation.explain.features import Feature, readable_features, taste_axes
from metarec_gym.evaluation.explain.segments import segment_table
from metarec_gym.evaluation.explain.tree import LEAF, Node, TreeData, TreePolicy, fit_tree
from metarec_gym.evaluation.explain.visits import Visits
from metarec_gym.evaluation.headroom import EvalSettings
from metarec_gym.evaluation.report.explanation import explanation_page, explanation_section
from metarec_gym.policy import MlpPolicy
from metarec_gym.world import World

SETTINGS = EvalSettings(contexts_per_user=2, replicates=1, horizon=3)


@pytest.fixture(scope="module")
def world() -> World:
    """Three types whose taste is known from the first request on; 3 items a request, 0.5 with the right specialist, else 0.1."""
    return World.synthetic(
        n_types=3, users_per_type=8, items_per_type=40, horizon=3, slate_size=3, history_lengths=(5, 10), leaving=None
    )


def _by_taste(world: World, sharpness: float = 50.0) -> MlpPolicy:
    """The optimal policy as a network: the strategy whose category the user has taken most."""
    weight = torch.zeros(world.n_strategies, sum(s.stop - s.start for s in feature_slices(world).values()))
    weight[torch.arange(3), torch.arange(3)] = sharpness
    return MlpPolicy(
        [(weight, torch.zeros(world.n_strategies))], world.strategies, meta={"world": world.hash, "fold": "A"}
    )


@pytest.fixture(scope="module")
def explained(world: World) -> Explained:
    return explain(world, _by_taste(world), "A", SETTINGS, rounds=2)


# ---- words


def test_every_feature_is_told_in_the_units_that_the_environment_counts_in(world: World) -> None:
    env = MetaRecVectorEnv(16, world=world, fold="A", horizon=3, output="torch", autoreset_mode="Disabled")
    features = {f.name: f for f in readable_features(world, 3, 3)}
    obs, info = env.reset(seed=0)
    taken = world.tensors["start_length"][info["start_state"]].clone()
    for _ in range(2):
        obs, reward, _, _, info = env.step(torch.zeros(16, dtype=torch.int64))
        taken += info["outcomes"][:, :, 0].sum(dim=1)
    first = {name: f.to_units(float(obs[0, f.index])) for name, f in features.items()}
    assert first["items taken so far (history included)"] == pytest.approx(int(taken[0]), abs=1e-3)
    assert first["requests served by specialist_0 so far"] == pytest.approx(2, abs=1e-4)
    assert first["requests served by specialist_1 so far"] == pytest.approx(0, abs=1e-4)
    assert first["reward of the last request"] == pytest.approx(float(reward[0]), abs=1e-4)
    assert features["request"].show(float(obs[0, features["request"].index])) == "3"
    assert features["specialist_0 served the last request"].show(1.0) == "yes"


def test_conditions_read_as_whole_numbers_where_things_are_counted(world: World) -> None:
    features = {f.block: f for f in readable_features(world, 10, 3)}
    length = math.log1p(11.5) / math.log1p(1000.0)
    assert features["history_length"].below(length) == "fewer than 12 items taken so far (history included)"
    assert features["history_length"].above(length) == "12 or more items taken so far (history included)"
    assert features["history_length"].below(0.05) == "no items taken so far (history included)"
    # 4.5 of 10 requests served: request 5 has 4 before it
    assert features["request_fraction"].below(0.45) == "request 5 or earlier"
    assert features["request_fraction"].above(0.45) == "request 6 or later"
    assert features["popularity_affinity"].below(0.62).endswith("at most 62 %")
    # the last strategy of the block
    assert features["last_strategy"].below(0.5) == "not: mixed served the last request"


def test_taste_axes_are_named_by_items_only_where_items_have_names(world: World, tmp_path: Path) -> None:
    import pandas as pd

    assert taste_axes(world) == ()
    folder = world.save(tmp_path / "world")
    n = world.n_items
    items = pd.DataFrame({"item_index": range(n), "item_id": range(n), "text": [f"film {i}" for i in range(n)]})
    items.to_parquet(folder / "items.parquet")
    popular = dataclasses.replace(
        world, folder=folder, tensors={**world.tensors, "item_popularity": torch.arange(n) / n}
    )
    # 120 items of three categories in turn; the popular tenth are 108..119, and 108 is the first of category 0
    assert taste_axes(popular)[0].startswith("taste axis 1: high for users of film 108; film 111")


# ---- the rules


def test_rules_keep_the_whole_lift_of_the_known_optimum(world: World, explained: Explained) -> None:
    result = explained.result
    # three items at 0.5; one specialist for everyone: (1.5 + 0.3 + 0.3) / 3
    assert result["played"]["policy"]["value"]["estimate"] == pytest.approx(1.5, abs=1e-4)
    assert result["played"]["single best"]["value"]["estimate"] == pytest.approx(0.7, abs=1e-4)
    assert result["played"]["rules"]["value"]["estimate"] == pytest.approx(1.5, abs=1e-4)
    assert result["played"]["rules"]["lift"]["estimate"] == pytest.approx(1.5 / 0.7 - 1, abs=1e-3)
    assert result["kept"]["estimate"] == pytest.approx(1.0, abs=1e-4)
    assert result["stands"]
    assert (result["trained_on"], result["scored_on"], result["users"]) == ("A", "B", 24)


def test_no_more_rules_than_are_needed(explained: Explained) -> None:
    # one for each type, found on training users and true of the others
    assert explained.result["rules"]["leaves"] == 3
    assert explained.result["rules"]["agreement"]["estimate"] == pytest.approx(1.0)
    rows = explained.result["rules"]["rows"]
    assert {row["serves"] for row in rows} == {"specialist_0", "specialist_1", "specialist_2"}
    assert [row["requests"] for row in rows] == pytest.approx([1 / 3] * 3)


def test_what_too_small_a_tree_loses_is_said(world: World) -> None:
    result = explain(world, _by_taste(world), "A", SETTINGS, max_leaves=2, rounds=1).result
    # two specialists are right for two types in three: (1.5 + 1.5 + 0.3) / 3 = 1.1, half of the lift
    assert result["kept"]["estimate"] == pytest.approx(0.5, abs=1e-3)
    assert not result["stands"]
    assert "tell only part of it: they keep 50%" in result["verdict"]


def test_a_policy_without_lift_has_none_to_keep(world: World) -> None:
    nothing = MlpPolicy([(0.0 * _by_taste(world).layers[0][0], torch.zeros(4))], world.strategies)
    result = explain(world, nothing, "A", SETTINGS, rounds=1).result
    assert result["kept"] is None
    assert not result["stands"]
    assert "no lift that rules could keep" in result["verdict"]


def test_a_policy_for_other_strategies_is_refused(world: World) -> None:
    other = MlpPolicy([(torch.zeros(2, 5), torch.zeros(2))], ("a", "b"))
    with pytest.raises(ValueError, match="chooses among a, b; the world has specialist_0"):
        explain(world, other, "A", SETTINGS)


def _feature(index: int, name: str) -> Feature:
    return Feature(index, "taste", name, "number", lambda v: v)


def test_a_heavy_state_outweighs_many_light_ones() -> None:
    data = TreeData(torch.zeros(4, 1), torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 1.0, 1.0, 5.0]))
    tree = fit_tree(data, ("a", "b"), (_feature(0, "x"),))
    assert tree.rules() == "b"
    assert tree.nodes[0].share == pytest.approx((3 / 8, 5 / 8))


def test_a_state_weighs_what_is_at_stake_among_the_strategies_in_service() -> None:
    visits = _visits(worth=torch.tensor([[1.0, 0.2, 9.0]]), mask=torch.tensor([[True, True, False]]))
    assert state_weight(visits).tolist() == pytest.approx([0.8])


def test_states_on_the_border_fall_where_scikit_learn_puts_them() -> None:
    from sklearn.tree import DecisionTreeClassifier

    generator = torch.Generator().manual_seed(0)
    obs = torch.rand(400, 3, generator=generator)
    label = (obs[:, 0] > 0.3).long() + (obs[:, 1] > obs[:, 2]).long()
    names = tuple(_feature(i, f"x{i}") for i in range(3))
    tree = fit_tree(TreeData(obs, label, torch.ones(400)), ("a", "b", "c"), names, max_leaves=12)
    model = DecisionTreeClassifier(max_leaf_nodes=12, min_weight_fraction_leaf=0.005, random_state=0).fit(obs, label)
    borders = torch.tensor([n.threshold for n in tree.nodes if n.feature != LEAF])
    cases = torch.cat(
        [obs, borders[:, None].expand(-1, 3), torch.nextafter(borders, borders + 1)[:, None].expand(-1, 3)]
    )
    chosen = tree.action_probs(cases, torch.ones(len(cases), 3, dtype=torch.bool)).argmax(dim=1)
    assert chosen.tolist() == model.predict(cases.numpy()).tolist()


def _three_leaves() -> TreePolicy:
    leaf = {"feature": LEAF, "threshold": 0.0, "left": LEAF, "right": LEAF, "yes": "", "no": ""}
    return TreePolicy(
        [
            Node(0, 0.5, 1, 4, "young", "old", (0.5, 0.3, 0.2)),
            Node(0, 0.2, 2, 3, "very young", "not very young", (0.4, 0.4, 0.2)),
            Node(**leaf, share=(1.0, 0.0, 0.0)),
            Node(**leaf, share=(0.1, 0.6, 0.3)),
            Node(**leaf, share=(0.0, 0.0, 1.0)),
        ],
        ("a", "b", "c"),
        obs_dim=1,
        meta={"world": "w"},
    )


def test_rules_are_indented_branches_and_conditions_name_the_strictest_only() -> None:
    tree = _three_leaves()
    assert tree.rules().splitlines() == ["young:", "    very young: a", "    not very young: b", "old: c"]
    assert tree.leaves == (2, 3, 4)
    # "very young" implies "young"
    assert tree.conditions(2) == ("very young",)
    assert tree.conditions(3) == ("young", "not very young")


def test_a_strategy_out_of_service_is_replaced_by_the_next_one_of_the_leaf() -> None:
    tree = _three_leaves()
    obs = torch.tensor([[0.3], [0.3], [0.9]])
    mask = torch.tensor([[True, True, True], [True, False, True], [True, True, False]])
    # the last leaf knows c only: a is the most common of the whole tree
    assert tree.action_probs(obs, mask).argmax(dim=1).tolist() == [1, 2, 0]


def test_branches_that_choose_alike_become_one_rule() -> None:
    tree = _three_leaves()
    alike = list(tree.nodes)
    alike[3] = dataclasses.replace(alike[3], share=(0.6, 0.1, 0.3))
    joined = TreePolicy(alike, tree.strategies, 1).joined()
    assert joined.rules().splitlines() == ["young: a", "old: c"]
    obs = torch.linspace(0.0, 1.0, 11)[:, None]
    mask = torch.ones(11, 3, dtype=torch.bool)
    assert torch.equal(joined.action_probs(obs, mask), TreePolicy(alike, tree.strategies, 1).action_probs(obs, mask))


def test_a_saved_tree_acts_as_before_and_is_plain_json(tmp_path: Path) -> None:
    tree = _three_leaves()
    path = tree.save(tmp_path / "tree.json")
    again = TreePolicy.load(path)
    obs, mask = torch.rand(50, 1, generator=torch.Generator().manual_seed(1)), torch.ones(50, 3, dtype=torch.bool)
    assert torch.equal(tree.action_probs(obs, mask), again.action_probs(obs, mask))
    assert (again.rules(), again.meta) == (tree.rules(), {"world": "w"})
    assert json.loads(path.read_text())["nodes"][0]["yes"] == "young"


def test_damaged_and_newer_tree_files_are_refused(tmp_path: Path) -> None:
    path = _three_leaves().save(tmp_path / "tree.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema": 2}))
    with pytest.raises(ValueError, match="upgrade metarec_gym"):
        TreePolicy.load(path)
    content["nodes"][0]["left"] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="node 0 of 5 asks entry 0 and leads to 0, 4"):
        TreePolicy.load(path)
    with pytest.raises(ValueError, match="is no tree policy"):
        TreePolicy.load(_written(tmp_path / "other.json", "[]"))
    with pytest.raises(FileNotFoundError, match=r"python -m experiments\.explain"):
        TreePolicy.load(tmp_path / "missing.json")


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_rules_may_ask_about_the_entries_they_were_given_only() -> None:
    obs = torch.tensor([[0.0, 0.0], [0.0, 0.1], [1.0, 0.9], [1.0, 1.0]])
    data = TreeData(obs, torch.tensor([0, 0, 1, 1]), torch.ones(4))
    assert fit_tree(data, ("a", "b"), (_feature(1, "y"),)).rules().splitlines() == [
        "y at most 0.50: a",
        "y above 0.50: b",
    ]


# ---- attributions


def test_attributions_add_up_to_the_lead_and_ignored_entries_get_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(8, 4, generator=generator)
    first[:, 3] = 0.0
    layers = [(first, torch.randn(8, generator=generator)), (torch.randn(3, 8, generator=generator), torch.zeros(3))]
    policy = MlpPolicy(layers, ("a", "b", "c"))
    obs = torch.rand(64, 4, generator=generator)
    choice = policy.logits(obs).argmax(dim=1)
    found = attribute(policy, obs, choice, obs.mean(dim=0))
    logits = policy.logits(obs)
    assert torch.allclose(found.lead, logits.max(dim=1).values - logits.mean(dim=1), atol=1e-5)
    assert torch.allclose(found.by_entry.sum(dim=1), found.lead - found.baseline_lead, atol=1e-4)
    assert found.error < 1e-4
    assert found.by_entry[:, 3].abs().max() == 0.0
    shares = found.shares({"x": slice(0, 3), "ignored": slice(3, 4)}, torch.arange(64))
    assert shares == {"x": 1.0, "ignored": 0.0}


def test_without_captum_the_rest_is_explained_and_the_extra_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("captum"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    result = explain(world, _by_taste(world), "A", SETTINGS, rounds=1).result
    assert result["stands"]
    assert "pip install 'metarec-gym[explain]'" in result["attributions"]["note"]
    assert "metarec-gym[explain]" in explanation_page(result, {})


def test_a_policy_that_reads_the_taste_alone_is_attributed_to_the_taste_alone(explained: Explained) -> None:
    shares = explained.result["attributions"]["shares"]
    assert shares["everyone"]["taste (items taken so far)"] == pytest.approx(1.0)
    # histories of 5 and of 10 items: nobody is heavy
    assert set(shares) == {"everyone", "cold", "light"}


# ---- tables and counterfactuals


def _visits(**given: torch.Tensor) -> Visits:
    n = len(next(iter(given.values())))
    default = {
        "obs": torch.zeros(n, 1),
        "mask": torch.ones(n, 3, dtype=torch.bool),
        "probs": torch.full((n, 3), 1 / 3),
        "worth": torch.zeros(n, 3),
        "action": torch.zeros(n, dtype=torch.int64),
        "user": torch.arange(n),
        "history_length": torch.zeros(n, dtype=torch.int64),
    }
    return Visits(**{**default, **given})


def test_gains_count_every_user_once_and_only_the_strategy_that_served() -> None:
    # 20 users; user 0 has 21 requests, on which strategy 1 gains 4 over strategy 0; the others gain 2
    user = torch.cat([torch.zeros(20, dtype=torch.int64), torch.arange(20)])
    worth = torch.zeros(40, 3)
    worth[:, 1] = torch.where(user == 0, 4.0, 2.0)
    visits = _visits(worth=worth, action=torch.ones(40, dtype=torch.int64), user=user)
    (segment,) = segment_table(visits, 0, ("a", "b", "c"), {"all": (torch.zeros(40, dtype=torch.int64), ["everyone"])})
    assert segment.gain is not None
    assert segment.gain.estimate == pytest.approx((4 + 19 * 2) / 20)
    assert (segment.users, segment.requests) == (1.0, 1.0)
    assert [(c.strategy, c.share) for c in segment.cells] == [("b", 1.0)]


def test_a_gain_over_fewer_than_ten_users_is_not_told() -> None:
    nine = _visits(worth=torch.ones(9, 3))
    (segment,) = segment_table(nine, 0, ("a", "b", "c"), {"all": (torch.zeros(9, dtype=torch.int64), ["everyone"])})
    assert segment.gain is None


class _Linear(MlpPolicy):
    """Serves b where 2 x + y > 2.5, else a."""

    def __init__(self) -> None:
        super().__init__([(torch.tensor([[0.0, 0.0], [2.0, 1.0]]), torch.tensor([0.0, -2.5]))], ("a", "b"))


def test_the_nearest_change_of_one_feature_takes_a_value_that_occurs() -> None:
    grid = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    obs = torch.stack([grid, torch.full_like(grid, 0.9)], dim=1)
    visits = _visits(obs=obs, mask=torch.ones(5, 2, dtype=torch.bool))
    found = counterfactual(_Linear(), 1, visits, (_feature(0, "x"), _feature(1, "y")), ("a", "b"))
    # 2 x > 1.6 needs x > 0.8: of the values that occur, 1.0; three of five states lie above 0.25
    assert (found.served, found.other) == ("a", "b")
    assert [(c.feature, c.before, c.after) for c in found.changes] == [("x", "0.25", "1.00")]
    # both ends count half: (4 + 2) / 2 of 5
    assert found.size == pytest.approx(0.6)
    assert "b would serve if x were 1.00 instead of 0.25" in found.sentence()


def test_two_features_change_where_one_is_not_enough_and_none_where_two_are_not() -> None:
    features, mask = (_feature(0, "x"), _feature(1, "y")), torch.ones(4, 2, dtype=torch.bool)
    corners = torch.cartesian_prod(torch.tensor([0.0, 0.9]), torch.tensor([0.0, 0.9]))
    # 1.8 and 0.9 are below 2.5 alone, 2.7 together
    both = counterfactual(_Linear(), 0, _visits(obs=corners, mask=mask), features, ("a", "b"))
    assert {c.feature for c in both.changes} == {"x", "y"}
    assert both.other == "b"
    none = counterfactual(_Linear(), 0, _visits(obs=0.9 * corners, mask=mask), features, ("a", "b"))
    assert none.other is None
    assert "No value of one or two features that occurs changes that" in none.sentence()


# ---- command and report


def test_the_command_writes_everything_once_and_feeds_the_report(world: World, tmp_path: Path) -> None:
    folder = world.save(tmp_path / "world")
    policy = _by_taste(world).save(tmp_path / "policy.safetensors")
    args = command.Args(world=folder, policy=policy, rounds=1, evaluation=SETTINGS, runs=tmp_path / "runs", quiet=True)
    row = command.run(args)
    (run,) = (tmp_path / "runs").iterdir()
    assert {"args.json", "command.txt", "explain.md", "explain.html", "result.json", "tree.json"} <= {
        p.name for p in run.iterdir()
    }
    assert TreePolicy.load(run / "tree.json").strategies == world.strategies
    assert "keep 100% [100%, 100%] of its lift" in (run / "explain.md").read_text()
    written = (run / "explain.html").stat().st_mtime_ns
    assert command.run(args) == row
    assert (run / "explain.html").stat().st_mtime_ns == written
    found = read_explanation(policy, world.hash)
    assert found is not None
    assert found["verdict"] == row["verdict"]
    assert read_explanation(policy, "another world") is None
    section = explanation_section(found)
    assert row["verdict"] in section.replace("&#x27;", "'")
    assert "gain a request [95 %]" in section


def test_a_policy_of_another_world_is_refused(world: World, tiny_world: World, tmp_path: Path) -> None:
    folder = tiny_world.save(tmp_path / "world")
    policy = _by_taste(world).save(tmp_path / "policy.safetensors")
    with pytest.raises(ValueError, match=f"was trained on the world {world.hash}"):
        command.run(command.Args(world=folder, policy=policy, runs=tmp_path))


def test_the_report_says_what_to_run_or_nothing_where_there_is_no_policy() -> None:
    assert "<code>python -m experiments.explain</code>" in explanation_section(None, "python -m experiments.explain")
    assert explanation_section(None) == ""


def test_names_from_a_log_cannot_break_the_page(explained: Explained) -> None:
    nasty = json.loads(json.dumps(explained.result).replace("specialist_0", "<b>x</b>"))
    page = explanation_page(nasty, {"command": "a < b"})
    assert "<b>x</b>" not in page.replace("<b>&lt;b&gt;x", "")
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "<script" not in page


@pytest.mark.slow
def test_rules_keep_nine_tenths_of_what_ppo_learns() -> None:
    from agents import ppo

    world = World.synthetic(
        n_types=3,
        users_per_type=8,
        items_per_type=40,
        horizon=6,
        slate_size=3,
        history_lengths=(0, 5, 10),
        leaving=None,
    )
    env = MetaRecVectorEnv(64, world=world, fold="A", output="torch", autoreset_mode="SameStep")
    trained = ppo.train(env, ppo.Args(total_steps=30_000, num_steps=12, minibatch_size=192), progress=False)
    settings = EvalSettings(contexts_per_user=3, replicates=2, horizon=6)
    result = explain(world, trained.policy, "A", settings).result
    assert result["rules"]["leaves"] <= 16
    assert result["kept"]["low"] >= 0.9
