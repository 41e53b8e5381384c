"""The leaderboard and the one-file report: complete, self-contained, safe, and the same numbers everywhere."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import re

import pytest
import torch

from metarec_gym.envs import MetaRecVectorEnv
from metarec_gym.evaluation.explain.explanation import explain
from metarec_gym.evaluation.headroom import FOLDS, EvalSettings, Headroom, measure_headroom
from metarec_gym.evaluation.leaderboard import (
    PolicyPlays,
    PolicyRow,
    csv_text,
    leaderboard,
    markdown_table,
    ordered,
    text_table,
)
from metarec_gym.evaluation.report import ReportData, render
from metarec_gym.evaluation.report.parts import unbroken
from metarec_gym.evaluation.rollout import Played, Player, rollout
from metarec_gym.evaluation.verdict import decide
from metarec_gym.policy import FixedPolicy, MlpPolicy, UniformPolicy
from metarec_gym.seeding import stream
from metarec_gym.world import World


@pytest.fixture(scope="module")
def headroom(tiny_world: World) -> Headroom:
    return measure_headroom(tiny_world, EvalSettings(replicates=1, horizon=4, horizons=(2,)), progress=False)


@pytest.fixture(scope="module")
def rows(tiny_world: World, headroom: Headroom) -> list[PolicyRow]:
    def play(test: str, player: Player) -> Played:
        contexts = headroom.contexts[test]
        seed = stream(0, "evaluation")
        result = rollout(tiny_world, test, player, contexts=contexts, replicates=2, horizon=4, env_seed=seed)
        return result.played(headroom.windows, tiny_world.n_strategies)

    random = {test: [play(test, UniformPolicy())] for test in FOLDS}
    sbs = {test: [play(test, FixedPolicy(headroom.sbs[test][headroom.headline]))] for test in FOLDS}
    oracle = {test: [play(test, headroom.oracle_player(test))] for test in FOLDS}
    # two "training seeds": one is as good as the oracle, one as the single best strategy
    learned = {test: [oracle[test][0], sbs[test][0]] for test in FOLDS}
    return leaderboard(
        [
            PolicyPlays("random", "fixed", random),
            PolicyPlays("SBS", "fixed", sbs),
            PolicyPlays("per-user oracle", "oracle", oracle),
            PolicyPlays("<b>ppo</b> & co", "learned", learned, 12.5, "two seeds"),
        ],
        headroom,
        tiny_world.tensors["costs"].numpy(),
    )


def _row(rows: list[PolicyRow], name: str) -> PolicyRow:
    return next(row for row in rows if name in row.name)


def test_sbs_has_gap_zero_and_the_oracle_one_through_the_same_code(rows: list[PolicyRow], headroom: Headroom) -> None:
    sbs, oracle = (_row(rows, name).agc_user[headroom.headline] for name in ("SBS", "oracle"))
    assert sbs is not None
    assert oracle is not None
    assert (sbs.low, sbs.estimate, sbs.high) == (0.0, 0.0, 0.0)
    assert (oracle.low, oracle.estimate, oracle.high) == (1.0, 1.0, 1.0)


def test_a_learned_row_averages_its_seeds(rows: list[PolicyRow], headroom: Headroom) -> None:
    learned = _row(rows, "ppo")
    gap = learned.agc_user[headroom.headline]
    assert gap is not None
    assert learned.seeds == 2
    # one seed closes the gap, the other nothing; 1.0 and 0.6 a request
    assert gap.estimate == pytest.approx(0.5)
    assert learned.value[headroom.headline].estimate == pytest.approx(0.8, abs=1e-6)
    assert learned.p_holm is not None
    # half its seeds serve one strategy (0 bits), the other half two equally often (1 bit)
    assert learned.entropy == pytest.approx(0.5)


def test_costs_and_shares_follow_from_what_was_served(rows: list[PolicyRow]) -> None:
    oracle = _row(rows, "oracle")
    # both specialists serve half the requests: costs 0.2 and 0.6
    assert oracle.cost == pytest.approx(0.4)
    assert oracle.segment_share[0].tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert oracle.segment_value[2] is None


def test_tables_list_learned_policies_first_and_oracles_last(rows: list[PolicyRow], headroom: Headroom) -> None:
    assert ordered(rows, headroom.headline)[0].name == "<b>ppo</b> & co"
    lines = text_table(rows, headroom).splitlines()
    assert lines[0].startswith("policy")
    assert "AGC_user" in lines[0]
    assert lines[1].startswith("<b>ppo</b> & co (2 seeds)")
    assert lines[-1].startswith("per-user oracle")
    assert markdown_table(rows, headroom).count("\n") == len(rows) + 1


def test_csv_has_a_line_for_each_policy_and_window(rows: list[PolicyRow], headroom: Headroom) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(rows, headroom, "tiny"))))
    assert len(lines) == len(rows) * len(headroom.windows)
    learned = next(line for line in lines if line["kind"] == "learned" and line["horizon"] == "4")
    assert float(learned["lift_sbs"]) == pytest.approx(0.8 / 0.6 - 1, abs=1e-4)
    assert (learned["world"], learned["seeds"], learned["seconds"]) == ("tiny", "2", "12.5")
    assert float(learned["agc_user"]) == pytest.approx(0.5)


def _page(world: World, headroom: Headroom, rows: list[PolicyRow]) -> str:
    learned = {row.name: row.lift_sched[headroom.headline] for row in rows if row.kind == "learned"}
    verdict = decide(headroom.sbs_name, headroom.headrooms(), learned)
    return render(ReportData(world, headroom, rows, verdict, {"check": "0"}, {"command": "python -m x --a '<i>'"}))


def test_the_report_shows_what_the_second_judge_says_of_each_lift(
    tiny_world: World, headroom: Headroom, rows: list[PolicyRow]
) -> None:
    assert "<small>second judge" not in _page(tiny_world, headroom, rows)
    again = [dataclasses.replace(row, lift_sbs_second=row.lift_sbs) for row in rows]
    assert _page(tiny_world, headroom, again).count("<small>second judge") == len(rows)


def test_the_report_holds_the_explanation_of_a_trained_policy_or_says_how_to_get_one(
    tiny_world: World, headroom: Headroom, rows: list[PolicyRow]
) -> None:
    verdict = decide(headroom.sbs_name, headroom.headrooms(), {})
    plain = ReportData(tiny_world, headroom, rows, verdict)
    title = "What the learned policy does, in words"
    assert title not in render(plain)
    command = "python -m experiments.explain --policy x"
    assert command in render(dataclasses.replace(plain, explain_hint=command))
    width = MetaRecVectorEnv(1, world=tiny_world).single_observation_space.shape[0]
    weight = torch.zeros(3, width)
    # the strategy of the category that the user takes most
    weight[torch.arange(2), torch.arange(2)] = 50.0
    policy = MlpPolicy([(weight, torch.zeros(3))], tiny_world.strategies, meta={"agent": "ppo", "seed": 3})
    settings = EvalSettings(replicates=1, horizon=4)
    explained = explain(tiny_world, policy, "A", settings, rounds=1).result
    page = render(dataclasses.replace(plain, explanation=explained, explain_hint=command))
    assert title in page
    assert command not in page
    assert "One of the trained policies: ppo, seed 3." in page
    assert unbroken(html.escape(explained["verdict"])) in page
    assert not re.search(r'(src|href)="(?!#)', re.sub(r'xmlns(:xlink)?="[^"]*"', "", page))


def test_the_report_is_one_file_that_asks_for_nothing_else(
    tiny_world: World, headroom: Headroom, rows: list[PolicyRow]
) -> None:
    page = _page(tiny_world, headroom, rows)
    assert "<script" not in page
    assert "<link" not in page
    assert "@import" not in page
    assert not re.search(r'(src|href)="(?!#)', re.sub(r'xmlns(:xlink)?="[^"]*"', "", page))
    assert page.count("<figure>") == 2
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page


def test_the_report_says_the_verdict_first_and_names_world_and_axes(
    tiny_world: World, headroom: Headroom, rows: list[PolicyRow]
) -> None:
    page = _page(tiny_world, headroom, rows)
    assert page.index("<h1") < page.index("<h2")
    for text in (tiny_world.hash, headroom.sbs_name, "request of the episode", "expected reward of a request", "cold"):
        assert text in page
    # drawing placeholders became style-sheet variables
    assert "#0a0b" not in page
    assert "#010203" not in page
    assert "var(--ink)" in page


def test_names_and_commands_are_escaped(tiny_world: World, headroom: Headroom, rows: list[PolicyRow]) -> None:
    page = _page(tiny_world, headroom, rows)
    assert "<b>ppo</b>" not in page
    assert "&lt;b&gt;ppo&lt;/b&gt; &amp; co" in page
    assert "<i>&#x27;" not in page


def test_the_same_numbers_give_the_same_page(tiny_world: World, headroom: Headroom, rows: list[PolicyRow]) -> None:
    assert _page(tiny_world, headroom, rows) == _page(tiny_world, headroom, rows)


def test_cards_of_world_and_log_are_shown(tiny_world: World, headroom: Headroom, rows: list[PolicyRow]) -> None:
    info = {
        "card": {"licence": "CC0", "columns": {"click": "the user took it"}},
        "cleaning": [{"rule": "duplicate rows", "rows_before": 1200, "rows_after": 1100, "note": ""}],
        "metrics": {
            "judges": {"A": {"log_loss": 0.51234}, "B": {"log_loss": 0.49}},
            "predictive_check": {"real": {"headroom": 0.05}, "replicas": 200},
        },
    }
    page = _page(dataclasses.replace(tiny_world, info=info), headroom, rows)
    for text in ("CC0", "the user took it", "duplicate rows", "1,200", "0.5123", "posterior predictive"):
        assert text in page


def test_an_interval_is_never_broken_across_lines():
    assert unbroken("+10.3 % [+9.1, +11.5] and [1, 2]") == "+10.3 % [+9.1,\u00a0+11.5] and [1, 2]"
    assert unbroken("[1.5 %, 1,234.0 %]") == "[1.5 %,\u00a01,234.0 %]"
