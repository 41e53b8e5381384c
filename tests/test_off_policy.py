"""Logs at the door, and the command."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import off_policy
from metarec_gym.data import InteractionLog
from metarec_gym.data.impressions import load_open_bandit
from metarec_gym.envs.replay_table import ReplayTable
from metarec_gym.evaluation.intervals import Interval
from metarec_gym.evaluation.off_policy.bandit_log import ESTIMATED_PROPENSITIES, BanditLog, requests_of, target_probs
from metarec_gym.evaluation.off_policy.evaluation import HEADLINE, PolicyValue, value_policy
from metarec_gym.evaluation.off_policy.intervals import Bounds
from metarec_gym.evaluation.off_policy.page import claims
from metarec_gym.policy import MlpPolicy

OPEN_BANDIT = Path(__file__).resolve().parent.parent / "envs_data" / "open_bandit"


def production_frame():
    """Two users; u's first request shows two items. Outcome `buy` counts 5."""
    return pd.DataFrame(
        {
            "user_id": ["u", "u", "u", "u", "v"],
            "item_id": ["i", "j", "k", "i", "j"],
            "timestamp": [0.0, 0.0, 3600.0, 7200.0, 3600.0],
            "click": [1.0, 1.0, 0.0, 1.0, 0.0],
            "buy": [0.0, 1.0, 0.0, 0.0, 0.0],
            "strategy": ["a", "a", "b", "b", "a"],
            "propensity": [0.5, 0.5, 0.25, 0.8, 0.5],
        }
    )


def production_log(frame=None):
    frame = production_frame() if frame is None else frame
    return InteractionLog.from_frame(frame, name="shop", outcomes=["click", "buy"], outcome_weights=[1.0, 5.0])


def split_log(users=60, requests=6, with_propensity=True):
    """Traffic split 0.7 / 0.3 between a and b at random; b is better for everyone (0.6 against 0.3)."""
    rng = np.random.default_rng(0)
    rows = users * requests
    chosen = np.where(rng.random(rows) < 0.7, "a", "b")
    frame = pd.DataFrame(
        {
            "user_id": np.repeat(np.arange(users), requests),
            "item_id": np.arange(rows) % 7,
            "timestamp": np.tile(np.arange(requests) * 86_400.0, users),
            "click": (rng.random(rows) < np.where(chosen == "b", 0.6, 0.3)).astype(float),
            "strategy": chosen,
        }
    )
    if with_propensity:
        frame["propensity"] = np.where(chosen == "a", 0.7, 0.3)
    return InteractionLog.from_frame(frame, name="split", outcomes=["click"])


def test_rows_of_one_user_time_and_strategy_are_one_request():
    found = requests_of(production_log())
    assert list(found["user_id"]) == ["u", "u", "u", "v"]
    assert list(found["shown"]) == [2, 1, 1, 1]
    # both items clicked, one bought: 1 + 1 + 5
    assert list(found["reward"]) == [7.0, 0.0, 1.0, 0.0]
    assert list(found["earlier_requests"]) == [0, 1, 2, 0]
    # what was known before the first item of the request, not what its own items brought
    assert list(found["taken_before"]) == pytest.approx([0.0, 1.0, 2 / 3, 0.0])


def test_a_production_log_becomes_a_bandit_log():
    log = BanditLog.from_log(production_log(), families={"a": "plain", "b": "clever"})
    assert (log.actions, log.families) == (("a", "b"), ("plain", "clever"))
    assert list(log.action) == [0, 1, 1, 0]
    assert list(log.propensity) == [0.5, 0.25, 0.8, 0.5]
    assert list(log.cluster) == [0, 0, 0, 1]
    # b's chance changed: those of a are not known where b served
    assert log.pscore is None
    with pytest.raises(ValueError, match=r"no family is named for the strategies \['b'\]"):
        BanditLog.from_log(production_log(), families={"a": "plain"})


def test_in_a_plain_split_of_the_traffic_all_chances_are_known():
    log = BanditLog.from_log(split_log())
    assert np.allclose(log.pscore, [0.7, 0.3])


def test_two_propensities_in_one_request_are_refused():
    frame = production_frame()
    frame.loc[1, "propensity"] = 0.4
    with pytest.raises(ValueError, match="one number a request"):
        requests_of(production_log(frame))


def test_a_log_without_strategies_is_refused():
    with pytest.raises(ValueError, match="no column 'strategy'"):
        BanditLog.from_log(production_log(production_frame().drop(columns="strategy")))


def test_missing_propensities_are_estimated_only_when_asked_and_the_warning_stays():
    source = split_log(users=200, with_propensity=False)
    with pytest.raises(ValueError, match="no propensities"):
        BanditLog.from_log(source)
    log = BanditLog.from_log(source, estimate_missing=True)
    assert log.warnings == (ESTIMATED_PROPENSITIES,)
    assert log.propensity[log.action == 0].mean() == pytest.approx(0.7, abs=0.05)
    assert log.propensity[log.action == 1].mean() == pytest.approx(0.3, abs=0.05)
    assert np.allclose(log.pscore.sum(axis=1), 1.0)
    values = value_policy(log, target_probs(log, "b"), log.reward_model(), samples=50)
    assert all(ESTIMATED_PROPENSITIES in value.warnings for value in values)


def test_a_replay_table_whose_rows_count_for_several_actions_is_refused():
    table, _ = ReplayTable.synthetic(n_rows=64)
    log = BanditLog.from_table(table)
    assert np.array_equal(log.action, table.logged.numpy())
    assert np.allclose(1.0 / log.propensity, table.weight.max(dim=1).values.numpy())
    shared = ReplayTable(**{**vars(table), "weight": torch.ones_like(table.weight)})
    with pytest.raises(ValueError, match="several of its actions"):
        BanditLog.from_table(shared)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"propensity": [0.5, 0.0]}, r"1 of 2 propensities are not in \(0, 1\]"),
        ({"reward": [1.0, np.nan]}, "missing or infinite"),
        ({"action": [0, 2]}, r"expected 0\.\.1"),
        ({"pscore": [[0.5, 0.4], [0.5, 0.5]]}, "no distribution"),
        ({"pscore": [[0.4, 0.6], [0.5, 0.5]]}, "differs from propensity"),
        ({"available": [[True, True], [True, False]]}, "could not be chosen"),
        ({"families": ["x"]}, "expected 2"),
        ({"context": [[1.0]]}, "one row for each of 2 requests"),
    ],
)
def test_a_wrong_log_is_refused_with_a_sentence(change, sentence):
    given = {"action": [0, 1], "reward": [1.0, 0.0], "propensity": [0.5, 0.5], "actions": ["a", "b"]}
    BanditLog.from_arrays(**given)
    with pytest.raises(ValueError, match=sentence):
        BanditLog.from_arrays(**(given | change))


def test_policies_respect_what_was_available():
    log = BanditLog.from_arrays(
        [0, 1], [1.0, 0.0], propensity=[0.5, 0.5], actions=["a", "b", "c"], available=[[1, 0, 1], [1, 1, 1]]
    )
    assert target_probs(log, "uniform").tolist() == [[0.5, 0.0, 0.5], [1 / 3, 1 / 3, 1 / 3]]
    # where b is out, uniform over the others
    assert target_probs(log, "b").tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    assert target_probs(log, [0.2, 0.5, 0.3])[0].tolist() == pytest.approx([0.4, 0.0, 0.6])
    with pytest.raises(ValueError, match="unavailable"):
        target_probs(log, np.full((2, 3), 1 / 3))
    with pytest.raises(ValueError, match="no action 'd'"):
        target_probs(log, "d")
    with pytest.raises(ValueError, match="no distribution"):
        target_probs(log, [[0.5, 0.0, 0.4], [1.0, 0.0, 0.0]])


def test_every_estimator_finds_the_better_strategy_of_a_split():
    log = BanditLog.from_log(split_log(users=300), families={"a": "x", "b": "y"})
    values = value_policy(log, target_probs(log, "b"), log.reward_model(), samples=100)
    names = ["IPS", "IPS clipped", "SNIPS", "DM", "DR", "SNDR", "Switch-DR", "DRos", "SG-DR", "MIPS"]
    assert [value.estimator for value in values] == names
    for value in values:
        # clipping at 1 is what SLOPE may choose for IPS: then it is far too low, as its docstring says
        if value.estimator != "IPS clipped":
            assert value.interval.low < 0.6 < value.interval.high, value.estimator
            assert value.less_logged.low > 0.0, value.estimator


# ---- the command


def write_table(path, log, probability_of_b):
    rows = np.arange(log.n_rows)
    frame = pd.DataFrame(
        {
            "request": np.concatenate([rows, rows]),
            "strategy": ["a"] * len(rows) + ["b"] * len(rows),
            "probability": np.concatenate([1 - probability_of_b, probability_of_b]),
        }
    )
    frame.to_parquet(path, index=False)
    return path


def test_the_command_values_a_production_log_end_to_end(tmp_path, capsys):
    source = split_log()
    source.save(tmp_path / "log")
    log = BanditLog.from_log(source)
    table = write_table(tmp_path / "mine.parquet", log, np.full(log.n_rows, 0.25))
    width = log.context.shape[1] + 2 + 3 * log.n_actions
    exported = MlpPolicy([(torch.zeros(2, width), torch.tensor([0.0, 50.0]))], log.actions).save(
        tmp_path / "always_b.safetensors"
    )
    args = off_policy.Args(
        log=tmp_path / "log",
        policy=(table, exported),
        rule=("late=earlier_requests<3:a:b",),
        family=("a=x", "b=y"),
        samples=50,
        runs=tmp_path / "runs",
    )
    found = off_policy.run(args)["policies"]
    assert list(found) == ["a", "b", "uniform", "late", "mine", "always_b"]
    assert [e["estimator"] for e in found["a"]["estimators"]][-1] == "MIPS"

    def ips(name):
        return next(e for e in found[name]["estimators"] if e["estimator"] == "IPS")["estimate"]

    late = requests_of(source)["earlier_requests"].to_numpy() >= 3
    weight = np.where(late == (log.action == 1), 1.0 / log.propensity, 0.0)
    assert ips("late") == pytest.approx((weight * log.reward).mean())
    assert ips("mine") == pytest.approx(0.75 * ips("a") + 0.25 * ips("b"))
    assert ips("always_b") == pytest.approx(ips("b"))
    folder = next((tmp_path / "runs").iterdir())
    assert {"args.json", "result.json", "off_policy.md", "overlap.png", "requests.parquet"} <= {
        p.name for p in folder.iterdir()
    }
    page = (folder / "off_policy.md").read_text()
    assert page.count("| late |") == 11
    assert page in capsys.readouterr().out
    html = (folder / "off_policy.html").read_text()
    assert html.startswith("<!doctype html>")
    assert html.count("<figure>") == len(found)
    assert "src=" not in html


def test_the_page_claims_only_what_is_sure_after_holm():
    def row(low, high):
        found = Interval((low + high) / 2, low, high, 0.1, 9.0, 0.95, 1, 10)
        return PolicyValue("DR", "", found, Bounds(low, high, 0.95, "t"), found, None, ())

    values = {"fresh": [row(0.1, 0.2)], "late": [row(-0.1, 0.2)]}
    (sure,) = claims(values, {"fresh": 0.02, "late": 0.4}, 0.95)
    assert sure.startswith("fresh would have earned more than the log did: ")
    (nothing,) = claims(values, {"fresh": 0.06, "late": 0.4}, 0.95)
    assert nothing == "No policy surely differs from what the log earned (at 95%, DR, Holm)."


def test_estimated_propensities_are_said_on_the_page_and_in_the_result(tmp_path, capsys):
    split_log(with_propensity=False).save(tmp_path / "log")
    args = off_policy.Args(log=tmp_path / "log", estimate_propensities=True, samples=20, runs=tmp_path / "runs")
    found = off_policy.run(args)
    assert found["warnings"] == [ESTIMATED_PROPENSITIES]
    assert ESTIMATED_PROPENSITIES in capsys.readouterr().out


def test_policies_that_do_not_fit_the_log_are_refused_with_a_sentence(tmp_path):
    source = split_log(users=5)
    log, requests = BanditLog.from_log(source), requests_of(source)
    for rule, sentence in (
        ("late", "cannot be read"),
        ("late=propensity<0.5:a:b", "cannot be read"),
        ("late=reward<0.5:a:b", "cannot be read"),
        ("late=gap<soon:a:b", "expected a number"),
        ("late=gap<1:a:z", "no action 'z'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            off_policy.rule_probs(rule, log, requests)
    path = write_table(tmp_path / "p.parquet", log, np.full(log.n_rows, 0.5))
    table = pd.read_parquet(path)
    for changed, sentence in (
        (table[table["request"] > 0], r"1 requests \(first: 0\)"),
        (table.assign(strategy="z"), "never served"),
        (table.assign(request=table["request"] + 1), "see requests.parquet"),
        (pd.concat([table, table.head(1)]), "once at most"),
        (table.assign(probability=0.4), "no distribution"),
        (table.drop(columns="probability"), "lacks the column probability"),
    ):
        changed.to_parquet(path, index=False)
        with pytest.raises(ValueError, match=sentence):
            off_policy.table_probs(path, log)
    with pytest.raises(FileNotFoundError, match="write one with the columns"):
        off_policy.table_probs(tmp_path / "none.parquet", log)
    elsewhere = MlpPolicy([(torch.zeros(2, 4), torch.zeros(2))], log.actions).save(tmp_path / "select.safetensors")
    with pytest.raises(ValueError, match="learned elsewhere"):
        off_policy.exported_probs(elsewhere, log, ["x"] * log.context.shape[1])


@pytest.fixture(scope="module")
def open_bandit():
    if not (OPEN_BANDIT / "log.json").is_file():
        pytest.skip("needs Open Bandit: python -m envs_data.open_bandit.prepare")
    return load_open_bandit(OPEN_BANDIT)


def test_open_bandit_rows_are_items_at_places(open_bandit):
    logs = {name: off_policy.open_bandit_log(open_bandit, "men", name) for name in ("bts", "random")}
    assert logs["random"].n_actions == 34
    assert np.allclose(logs["random"].pscore, 1 / 34)
    assert logs["bts"].pscore is None
    probs, notes = off_policy.item_chances(logs["random"], logs["bts"])
    assert np.allclose(probs.sum(axis=1), 1.0)
    assert notes == (off_policy.AVERAGED,)
    assert off_policy.item_chances(logs["bts"], logs["random"])[1] == ()


@pytest.mark.slow
def test_open_bandit_runs_end_to_end_and_intervals_meet_the_on_policy_mean(open_bandit, tmp_path):
    args = off_policy.Args(log=OPEN_BANDIT, samples=100, runs=tmp_path)
    found = off_policy.run(args)["directions"]
    assert sorted(found) == [
        f"{c}: {a} -> {b}" for c in ("all", "men", "women") for a, b in (("bts", "random"), ("random", "bts"))
    ]
    for title, row in found.items():
        claim = next(e for e in row["estimators"] if e["estimator"] == HEADLINE)
        # both are estimates: their intervals overlap
        assert claim["low"] < row["on_policy"]["high"], title
        assert claim["high"] > row["on_policy"]["low"], title
        assert json.dumps(row)
