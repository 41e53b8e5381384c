"""The validity report: a world whose judge is right passes, a wrong judge is found out, a small log cannot tell."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.validity import Args, run
from metarec_gym import world_building
from metarec_gym.data import Dataset, InteractionLog, encode, synthetic_log
from metarec_gym.evaluation.headroom import EvalSettings
from metarec_gym.evaluation.intervals import Interval
from metarec_gym.evaluation.validity.checks import (
    calibration,
    clustered_mean,
    concordance,
    curve_quantiles,
    hazard_curves,
    rank_correlation,
    two_sample_auc,
)
from metarec_gym.evaluation.validity.findings import (
    FAIL,
    OPEN,
    PASS,
    conclude,
    find,
    headroom_verdict,
    read_validity,
    within,
)
from metarec_gym.evaluation.validity.page import page, validity_section
from metarec_gym.evaluation.validity.parts import (
    outcome_part,
    predictive_part,
    rates_by_group,
    windows_part,
)
from metarec_gym.evaluation.validity.sample import HeldOut, at_rate, lengths_before, served_by, world_dataset
from metarec_gym.evaluation.validity.text import markdown
from metarec_gym.evaluation.validity.variations import Variation, play_variations, sensitivity_rows
from metarec_gym.evaluation.validity.windows import taste_given_history
from metarec_gym.response.frozen import FrozenResponse, untimed
from metarec_gym.response.predictive_check import check_world, emit
from metarec_gym.seeding import numpy_rng, torch_generator
from metarec_gym.world import World

N_USERS, N_ITEMS, EVENTS = 420, 100, 36
TASTE_SD = 1.2


def true_judge() -> FrozenResponse:
    """Users differ in how much they like the first half of the items; items differ in popularity and in how they are liked."""
    generator = torch_generator(0, "true judge")
    n_static, rank = 2, 2
    features = n_static + 3
    static = torch.ones(N_ITEMS, n_static)
    static[:, 1] = torch.where(torch.arange(N_ITEMS) < N_ITEMS // 2, 1.0, -1.0)
    factor = torch.zeros(N_USERS, 2, features, features)
    factor[:, 0, 1, 1] = TASTE_SD
    factor[:, 1, 0, 0] = 0.7
    bias = torch.randn(1, N_ITEMS, 2, generator=generator)
    return FrozenResponse(
        {
            "item_input": torch.randn(N_ITEMS, 4, generator=generator) * 0.3,
            "decays": torch.tensor([0.5, 0.9]),
            "hidden_weight": torch.zeros(1, 3, 13),
            "hidden_bias": torch.zeros(1, 3),
            "tower_weight": torch.zeros(1, 2 * rank, 3),
            "tower_bias": torch.zeros(1, 2 * rank),
            "item_output": torch.zeros(1, N_ITEMS, 2, rank),
            "item_bias": bias * torch.tensor([0.8, 1.2]),
            "calibration": torch.tensor([[[1.0, -2.0], [1.0, 0.3]]]),
            "static_features": static,
            "trend": torch.zeros(12, N_ITEMS),
            "dynamic_scale": torch.zeros(2),
            "effect_mean": torch.zeros(N_USERS, 2, features),
            "effect_chol": factor,
            "pair_sd": torch.zeros(2),
            **untimed(8),
        },
        ("watch", "like"),
        ("intercept", "half", "trend", "cooccurrence_recent", "cooccurrence_history"),
    )


def true_log(judge: FrozenResponse) -> InteractionLog:
    """What users who are as the judge says would leave behind."""
    generator = torch_generator(0, "true log")
    effects = judge.effects(7)
    state = judge.start(torch.zeros(N_USERS, 0, dtype=torch.int64))
    unseen = torch.zeros(N_USERS, N_ITEMS, dtype=torch.bool)
    items = emit(judge, state, effects[:, 0], unseen, EVENTS, refresh=EVENTS, generator=generator)
    p = judge.conditional_probs(state, effects, items, position=False)[..., 1]
    liked = torch.rand(p.shape, generator=generator) < p
    rng = numpy_rng(0, "times")
    minutes = np.cumsum(rng.uniform(1, 4000, size=(N_USERS, EVENTS)), axis=1)
    frame = pd.DataFrame(
        {
            "user_id": np.repeat([f"u{u:03d}" for u in range(N_USERS)], EVENTS),
            "item_id": [f"i{i:03d}" for i in items.flatten().tolist()],
            "timestamp": 8.7e8 + 60.0 * minutes.flatten(),
            "watch": 1.0,
            "like": liked.flatten().numpy().astype(np.float64),
        }
    )
    table = pd.DataFrame(
        {
            "item_id": [f"i{i:03d}" for i in range(N_ITEMS)],
            "title": [f"Item {i}" for i in range(N_ITEMS)],
            "categories": ["first" if i < N_ITEMS // 2 else "second" for i in range(N_ITEMS)],
        }
    )
    weights = {"outcomes": ("watch", "like"), "outcome_weights": (0.0, 1.0)}
    return InteractionLog.from_frame(frame, name="truth", items=table, card={"source": "made up"}, **weights)


def told(judge: FrozenResponse, dataset: Dataset, users: torch.Tensor) -> FrozenResponse:
    """The judge after it was told its own fold's events: its table holds what they show of these users' tastes."""
    history = dataset.histories(users, torch.full((len(users),), EVENTS))
    period = torch.zeros(len(users), dtype=torch.int64)
    centre, factor = taste_given_history(judge, users, history, period, torch_generator(0, "told"))
    mean, root = judge.tensors["effect_mean"].clone(), judge.tensors["effect_chol"].clone()
    mean[users, 0], root[users, 0] = centre, factor
    return judge.replaced(effect_mean=mean, effect_chol=root)


@dataclasses.dataclass(frozen=True)
class Truth:
    folder: Path
    log: InteractionLog
    world: World
    dataset: Dataset


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    judge = true_judge()
    log, folder = true_log(judge), tmp_path_factory.mktemp("truth")
    with pytest.MonkeyPatch.context() as patch:
        # nothing is fitted: both folds' judge is the one that made the log
        patch.setattr(
            world_building,
            "fit_judges",
            lambda jobs, *_: {key: (told(judge, job.dataset, job.users), {}) for key, job in jobs.items()},
        )
        world = World.build(
            log,
            pool=("popular", "long_tail", "content", "item_knn"),
            starts_per_user=2,
            horizon=3,
            replicas=40,
            variants=False,
            progress=False,
            out=folder / "world",
        )
    log.save(folder / "log")
    dataset = world_dataset(world, log)
    assert dataset.n_items == N_ITEMS
    return Truth(folder, log, world, dataset)


def with_judge(world: World, judge: FrozenResponse) -> World:
    return dataclasses.replace(world, responses={"A": judge, "B": judge})


def measure(truth: Truth, world: World, **more: Any) -> dict[str, Any]:
    outcomes = {
        name: outcome_part(world, truth.dataset, index, limit=4_000, seed=0)
        for index, name in enumerate(world.outcomes)
    }
    return conclude({"outcomes": outcomes, **windows_part(world, truth.dataset, quick=True, seed=0), **more})


def result(validity: dict[str, Any], topic: str, outcome: str = "", part: str = "") -> str:
    found = [
        f["result"]
        for f in validity["findings"]
        if f["topic"] == topic and f["outcome"] == outcome and part in f["question"]
    ]
    assert len(found) == 1, found
    return str(found[0])


# ---- a right judge and wrong ones


@pytest.fixture(scope="module")
def right(truth: Truth) -> dict[str, Any]:
    return measure(truth, truth.world, posterior_predictive=predictive_part(truth.world))


def test_a_right_judge_passes_every_check_that_its_log_can_tell(right: dict[str, Any]) -> None:
    for outcome in ("watch", "like"):
        assert result(right, "prediction", outcome, f"popularity on {outcome!r} of unseen users?") == PASS
        assert result(right, "calibration", outcome, "slope") == PASS
        assert result(right, "calibration", outcome, "error") == PASS
    assert result(right, "rates", "like") == PASS
    assert result(right, "order of strategies") == PASS
    assert result(right, "look of sessions") == PASS
    assert [f["result"] for f in right["findings"] if f["topic"] == "differences between users"] == [PASS] * 4
    assert right["verdict"]["kind"] == "good"


def test_a_rate_that_is_declared_is_never_passed(right: dict[str, Any]) -> None:
    assert result(right, "rates", "watch") == OPEN
    assert any("absolute rates of watch" in s for s in right["verdict"]["may_not"])


def test_sessions_of_a_right_judge_cannot_be_told_from_real_ones(right: dict[str, Any]) -> None:
    auc = right["classifier_auc"]
    assert auc["low"] <= 0.55
    assert auc["auc"] == pytest.approx(0.5, abs=0.1)


def test_a_judge_twice_too_sure_fails_its_slope(truth: Truth) -> None:
    sure = true_judge().replaced(calibration=torch.tensor([[[2.0, -2.0], [2.0, 0.3]]]))
    entry = outcome_part(with_judge(truth.world, sure), truth.dataset, 1, limit=4_000, seed=0)
    assert result(conclude({"outcomes": {"like": entry}}), "calibration", "like", "slope") == FAIL
    # twice the logit, but users twice as different flatten what is said of an unknown user
    assert 0.5 < entry["calibration_slope"] < 0.7


def test_a_judge_that_confuses_the_items_is_found_out_everywhere(truth: Truth) -> None:
    order = torch.from_numpy(numpy_rng(0, "confused").permutation(N_ITEMS))
    judge = true_judge()
    found = measure(truth, with_judge(truth.world, judge.replaced(item_bias=judge.tensors["item_bias"][:, order])))
    for outcome in ("watch", "like"):
        assert result(found, "prediction", outcome, f"popularity on {outcome!r} of unseen users?") == FAIL
    assert result(found, "order of strategies") == FAIL
    assert result(found, "look of sessions") == FAIL
    assert found["verdict"]["kind"] == "bad"


def test_a_judge_whose_users_are_all_alike_understates_their_differences(truth: Truth) -> None:
    judge = true_judge()
    alike = judge.replaced(effect_chol=torch.zeros_like(judge.tensors["effect_chol"]))
    users = {"A": (alike, truth.dataset.users_in(1)), "B": (alike, truth.dataset.users_in(2))}
    check = check_world(truth.dataset, users, truth.world.top_lists, truth.world.strategies, seed=0, replicas=40)
    found = conclude({"posterior_predictive": {"interleaved": check}})
    trace = next(f for f in found["findings"] if "how much users differ" in f["question"])
    assert trace["result"] == FAIL
    assert "understates" in trace["text"]
    assert any("understates" in sentence for sentence in found["verdict"]["may_not"])


def test_the_taste_that_a_history_shows_is_found_again(truth: Truth) -> None:
    judge = true_judge()
    taste = judge.effects(7)[:, 0, 1]
    user = torch.arange(N_USERS)
    history = truth.dataset.histories(user, torch.full((N_USERS,), 20))
    period, generator = torch.zeros(N_USERS, dtype=torch.int64), torch_generator(0, "guess")
    mean, factor = taste_given_history(judge, user, history, period, generator)
    sd = (factor @ factor.transpose(1, 2)).diagonal(dim1=1, dim2=2).sqrt()[:, 1]
    # residuals over their stated spread have variance 1; 420 of them tell within 15 %
    assert float(((taste - mean[:, 1]) / sd).square().mean()) == pytest.approx(1.0, abs=0.2)
    assert float(torch.corrcoef(torch.stack([taste, mean[:, 1]]))[0, 1]) > 0.85


# ---- the arithmetic


def test_calibration_by_hand() -> None:
    p = np.array([0.2, 0.2, 0.2, 0.2, 0.6, 0.6, 0.6, 0.6])
    target = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    found = calibration(p, target, np.ones(8), np.arange(8), seed=0)
    # two bins: |0.2 - 0.25| and |0.6 - 0.75|, each half of the rows
    assert found.ece.estimate == pytest.approx(0.1)
    assert (found.predicted, found.observed.estimate) == (pytest.approx(0.4), 0.5)
    assert found.ece_share.estimate == pytest.approx(0.2)
    # a line through two bins fits both: logit .25 -> logit .75 over logit .2 -> logit .6
    slope = 2 * np.log(3) / (np.log(0.6 / 0.4) - np.log(0.2 / 0.8))
    assert found.slope is not None
    assert found.slope.estimate == pytest.approx(slope, rel=1e-6)


def test_equal_predictions_have_no_slope() -> None:
    found = calibration(np.full(6, 0.5), np.array([0, 1, 1, 0, 1, 0]), np.ones(6), np.arange(6), seed=0)
    assert found.slope is None
    assert found.ece.estimate == 0.0


def test_rows_of_one_user_count_as_one_user() -> None:
    user = np.repeat(np.arange(20), 50)
    value = np.repeat(np.arange(20) % 2, 50).astype(np.float64)
    # 20 users, half of them always 1: the error is that of 20 draws, 0.5 / sqrt(20) * sqrt(20 / 19), not of 1,000
    assert clustered_mean(value, user).se == pytest.approx(0.5 / np.sqrt(19), rel=1e-6)


def test_only_pairs_that_the_log_separates_count() -> None:
    rng = numpy_rng(0, "hits")
    noise = rng.normal(0.0, 0.1, size=(200, 4))
    log = np.array([0.4, 0.3, 0.2, 0.2]) + noise - noise.mean(axis=0)
    world = np.array([0.3, 0.4, 0.1, 0.2]) + 0.0 * noise
    found = concordance(log, world, ("a", "b", "c", "d"), seed=0)
    # c and d are alike in the log; a above b is turned round
    assert (found.pairs, found.separated, found.agreeing) == (6, 5, 4)
    assert found.reversed == (("a", "b"),)
    assert found.share is not None
    assert found.share.estimate == pytest.approx(0.8)


def test_a_log_that_separates_nothing_has_no_concordance() -> None:
    same = np.tile(numpy_rng(0, "same").random((50, 1)), (1, 3))
    found = concordance(same, same, ("a", "b", "c"), seed=0)
    assert (found.separated, found.share) == (0, None)
    answer = find({"concordance": found.to_json(("a", "b", "c"))})
    assert next(f for f in answer if f.topic == "order of strategies").result == OPEN


def test_a_classifier_tells_shifted_samples_and_not_equal_ones() -> None:
    rng = numpy_rng(0, "samples")
    real, user = rng.normal(size=(300, 3)), np.arange(300)
    equal = two_sample_auc(real, rng.normal(size=(300, 3)), user, ("x", "y", "z"), seed=0)
    assert equal["low"] <= 0.55
    # a shift by 2 standard deviations: AUC = Phi(2 / sqrt(2)) = 0.921
    shifted = two_sample_auc(real, rng.normal(size=(300, 3)) - [2.0, 0.0, 0.0], user, ("x", "y", "z"), seed=0)
    assert shifted["classifiers"]["logistic"]["auc"] == pytest.approx(0.921, abs=0.03)
    assert shifted["features"]["x"]["auc"] == pytest.approx(0.921, abs=0.03)


def test_hazards_become_distribution_functions() -> None:
    bins = np.array([0, 0, 0, 0, 1, 1])
    happened = np.array([True, False, False, False, True, False])
    log, model = hazard_curves(bins, happened, np.full(6, 0.5), 2)
    # 1 of 4, then 1 of 2: 1 - 3/4 * 1/2
    assert log.tolist() == [0.25, 0.625]
    assert model.tolist() == [0.5, 0.75]
    assert curve_quantiles([10.0, 20.0], model, (0.25, 0.625, 0.9)) == [5.0, 15.0, None]


def test_moving_to_a_rate_keeps_the_order_and_the_slope() -> None:
    p, weight = torch.tensor([[0.1, 0.3, 0.5]], dtype=torch.float64), torch.tensor([[1.0, 1.0, 2.0]])
    moved = at_rate(p, weight, 0.2)
    assert float((moved * weight).sum() / 4.0) == pytest.approx(0.2)
    step = torch.logit(moved) - torch.logit(p)
    assert float(step.max() - step.min()) == pytest.approx(0.0, abs=1e-9)


def test_rank_correlation_of_constants_is_defined() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert rank_correlation([1, 1], [2, 2]) == 1.0
    assert rank_correlation([1, 2], [2, 2]) == 0.0


def test_engaged_items_before_a_row_are_counted(truth: Truth) -> None:
    rows = torch.tensor([0, 5, EVENTS - 1, EVENTS, EVENTS + 3])
    assert lengths_before(truth.dataset, rows).tolist() == [0, 5, EVENTS - 1, 0, 3]


def test_rates_are_told_apart_by_who_served_and_how_long_the_history_was() -> None:
    log = synthetic_log(0, n_users=60, events_per_user=(5, 5), shown_per_event=1)[0]
    names = np.where(log.frame["user_id"].str[-1].astype(int) % 2 == 0, "even", "odd")
    log = dataclasses.replace(log, frame=log.frame.assign(strategy=names))
    dataset = encode(log, seed=0)
    served = served_by(log, dataset)
    assert served is not None
    assert served[dataset.user == 3].tolist() == ["odd"] * 10
    n = dataset.n_rows
    users, rows, ones = dataset.user.numpy(), np.arange(n), np.ones(n)
    sample = HeldOut(users, rows, ones > 0, dataset.outcome[:, 0].numpy(), ones, {"judge": 0.4 * ones}, ones)
    found = rates_by_group(dataset, sample, served)
    # one item shown for each taken, all histories are short
    assert sorted(found) == ["even, cold", "odd, cold"]
    assert found["odd, cold"]["rate_log"] == pytest.approx(0.5)
    assert found["odd, cold"]["rate_sim"] == pytest.approx(0.4)
    assert found["even, cold"]["n_rows"] == 30 * 10


# ---- findings


def test_a_number_passes_fails_or_cannot_tell() -> None:
    assert within(1.0, 0.95, 1.05, (0.9, 1.1)) == PASS
    assert within(1.3, 1.2, 1.4, (0.9, 1.1)) == FAIL
    assert within(1.15, 1.05, 1.25, (0.9, 1.1)) == OPEN
    # inside, but an interval this wide would hold any slope
    assert within(1.0, 0.5, 1.5, (0.9, 1.1)) == OPEN


def test_a_rate_with_a_wide_interval_cannot_tell() -> None:
    def rate(low: float, sim: float, high: float) -> str:
        entry = {"rate_sim": sim, "rate_log": 0.5, "rate_log_lo": low, "rate_log_hi": high}
        return next(f.result for f in find({"outcomes": {"like": entry}}) if f.topic == "rates")

    assert rate(0.48, 0.51, 0.52) == PASS
    assert rate(0.48, 0.53, 0.52) == FAIL
    assert rate(0.30, 0.51, 0.70) == OPEN


def test_what_was_not_measured_cannot_tell() -> None:
    found = find({})
    assert {f.result for f in found} == {OPEN}
    validity = conclude({})
    assert validity["verdict"]["kind"] == "open"
    assert 3 <= len(validity["verdict"]["sentences"]) <= 6


def test_nothing_long_term_means_a_bandit() -> None:
    found = conclude({"long_term": {"estimate": 0.002, "low": -0.002, "high": 0.006}})
    assert result(found, "long term") == FAIL
    assert any("use a bandit here" in sentence for sentence in found["verdict"]["sentences"])
    planned = conclude({"long_term": {"estimate": 0.05, "low": 0.03, "high": 0.07}})
    assert result(planned, "long term") == PASS


def lift_of(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 0.01, 100.0, 0.95, 1, 100)


def test_a_variation_moves_when_its_verdict_or_its_best_strategy_does() -> None:
    assert headroom_verdict({"oracle": lift_of(0.03, 0.05)}) == "something to win"
    assert headroom_verdict({"oracle": lift_of(-0.01, 0.01)}) == "nothing to win"
    assert headroom_verdict({"oracle": lift_of(0.01, 0.05)}) == OPEN
    users = {"A": [[1.0, 0.9], [1.2, 1.1]], "B": [[0.9, 0.8], [0.9, 0.8]]}
    common = {"label": "x", "env": {}, "sbs": "a", "headrooms": {}, "user_values": users}
    main = {**common, "values": {"a": 1.0, "b": 0.9}, "best": "a", "verdict": "nothing to win"}
    other_verdict = {**main, "verdict": "something to win"}
    other_best = {**main, "values": {"a": 1.0, "b": 1.1}, "best": "b"}
    rows = sensitivity_rows(
        {"main": main, "v": other_verdict, "b": other_best, "same": main, "open": {**main, "verdict": OPEN}}
    )
    # b loses 10 % of a's value in the world as built, with every user
    answers = {"main": "stays", "v": "moves", "b": "moves", "same": "stays", "open": "unclear"}
    assert {row["name"]: row["answer"] for row in rows} == answers
    assert rows[2]["other_best_loses"]["estimate"] == pytest.approx(0.1)
    answer = find({"sensitivity": rows})
    assert next(f for f in answer if f.topic == "settings").result == FAIL


def test_variations_are_played_and_what_a_world_cannot_play_says_so(truth: Truth, tmp_path: Path) -> None:
    settings = EvalSettings(
        contexts_per_user=1, max_users=8, replicates=1, max_replicates=1, horizon=1, horizons=(), look=False
    )
    chosen = (
        Variation("half", "half", {"base_rate_factor": 0.5}),
        Variation("double", "double", {"base_rate_factor": 2.0}),
        Variation("other", "a judge that is not there", {"judge": "second"}),
    )
    found = play_variations(truth.folder / "world", chosen, settings, folder=tmp_path, workers=1, progress=False)
    # the same users and luck: whoever takes more of everything values every strategy more
    assert all(found["double"]["values"][name] > value for name, value in found["half"]["values"].items())
    assert "has no judge 'second'" in found["other"]["note"]


# ---- the command and the page


@pytest.fixture(scope="module")
def finished(truth: Truth) -> dict[str, Any]:
    return run(arguments(truth))


def arguments(truth: Truth, **more: Any) -> Args:
    folder = truth.folder
    common = {"quick": True, "sensitivity": False, "workers": 1, "quiet": True, "runs": folder / "runs"}
    return Args(world=folder / "world", **{"log": folder / "log", **common, **more})


def test_the_command_writes_validity_beside_the_world_and_finds_its_run_again(
    truth: Truth, finished: dict[str, Any]
) -> None:
    validity = json.loads((truth.folder / "world" / "validity.json").read_text())
    keys = (
        "ece",
        "ece_share_of_rate",
        "calibration_slope",
        "rate_sim",
        "rate_log",
        "rate_log_lo",
        "rate_log_hi",
        "log_loss",
    )
    for outcome in ("watch", "like"):
        assert set(keys) <= set(validity["outcomes"][outcome])
    parts = ("concordance", "posterior_predictive", "classifier_auc", "sensitivity", "judges_agree", "long_term")
    assert {"world", "log_hash", "log_loss", "findings", "verdict", *parts} <= set(validity)
    assert validity["world"] == truth.world.hash
    assert {"judge", "popularity", "base_rate"} <= set(validity["log_loss"])
    again = run(arguments(truth))
    assert (again["seconds"], again["findings"]) == (finished["seconds"], finished["findings"])


def test_the_markdown_page_holds_the_verdict_every_finding_and_every_variation(truth: Truth, finished: dict[str, Any]):
    validity = json.loads((truth.folder / "world" / "validity.json").read_text())
    text = markdown(validity, {"command": "python -m experiments.validity"})
    assert text.startswith(f"# How far may {truth.world.name} be believed?\n\n**{validity['verdict']['headline']}.**")
    for finding in validity["findings"]:
        assert f"| {finding['question']} | {finding['result']} |" in text
    assert all(f"| {row['label']} |" in text for row in validity["sensitivity"])


def test_a_killed_run_keeps_its_parts(truth: Truth, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = (truth.folder / "runs").glob("validity_*")
    (folder / "result.json").unlink()

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a part that was kept is measured again")

    for part in ("parts.outcome_part", "parts.windows_part", "parts.time_part", "variations.play_part"):
        monkeypatch.setattr(f"metarec_gym.evaluation.validity.{part}", never)
    assert run(arguments(truth))["findings"] == finished["findings"]


def test_another_log_is_refused(truth: Truth, tmp_path: Path) -> None:
    other = dataclasses.replace(truth.log, frame=truth.log.frame.iloc[: EVENTS * 100])
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="was built from a log with hash"):
        run(arguments(truth, log=tmp_path / "other", runs=tmp_path / "runs"))


def test_validity_of_another_world_is_not_read(truth: Truth, finished: dict[str, Any], tmp_path: Path) -> None:
    assert read_validity(truth.folder / "world", truth.world.hash) is not None
    assert read_validity(truth.folder / "world", "another") is None
    assert read_validity(tmp_path, truth.world.hash) is None


def test_the_page_asks_for_nothing_else_and_says_the_verdict_first(truth: Truth, finished: dict[str, Any]) -> None:
    (folder,) = (truth.folder / "runs").glob("validity_*")
    html = (folder / "validity.html").read_text()
    assert "<script" not in html
    assert not re.search(r'(src|href)="(?!#)', re.sub(r'xmlns(:xlink)?="[^"]*"', "", html))
    assert html.index("<h1") < html.index("<h2")
    for text in (finished["verdict"]["headline"], truth.world.hash, "prefers-color-scheme:dark", "popular", "like"):
        assert text in html
    assert "#0a0b" not in html
    assert "#010203" not in html


def bare(**more: Any) -> dict[str, Any]:
    """A report of nothing measured: it has no figures."""
    return {"name": "bare", "world": "0123", **conclude({"outcomes": {}, **more})}


def test_names_on_the_page_are_escaped() -> None:
    html = page(bare() | {"name": "<i>log</i>"}, {"command": "<b>x</b>"})
    assert "<i>log</i>" not in html
    assert "&lt;i&gt;log&lt;/i&gt;" in html
    assert "<b>x</b>" not in html


def test_the_section_of_the_comparison_says_what_to_run_where_nothing_was_measured() -> None:
    assert "python -m experiments.validity" in validity_section(None)
    validity = bare(long_term={"estimate": 0.002, "low": -0.002, "high": 0.006})
    section = validity_section(validity)
    assert validity["verdict"]["headline"] in section
    assert "use a bandit here" in section
    assert section.count("<section>") > 1
