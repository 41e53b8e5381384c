"""A refitted world before the users of a fixed truth: ids, propensities and probabilities are right, and a kill loses nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import feedback_loop
from metarec_gym.data.interactions import InteractionLog
from metarec_gym.data.synthetic import behaviour_log
from metarec_gym.evaluation import deployment
from metarec_gym.evaluation.deployment import Exploring, Truth, behaviour_world, deployed, emit, thinned
from metarec_gym.evaluation.feedback import DID_NOT, OPEN, PAID, paid, summary
from metarec_gym.evaluation.report.feedback import feedback_markdown, feedback_page
from metarec_gym.evaluation.rollout import Fixed, rollout
from metarec_gym.policy import FixedPolicy, UniformPolicy
from metarec_gym.world import World

SESSIONS = {"session_requests": 2}


@pytest.fixture(scope="module")
def world() -> World:
    """Two types of cold users; items 0, 2, 4 ... are of category 0, the others of category 1."""
    return World.synthetic(
        n_types=2, users_per_type=4, items_per_type=16, horizon=4, slate_size=2, history_lengths=(0,), leaving=None
    )


@pytest.fixture(scope="module")
def truth(world: World) -> Truth:
    return Truth(world, tuple(f"i{k}" for k in range(world.n_items)))


def _value_by_type(live: World, strategy: int) -> list[float]:
    starts = live.starts_of("B")
    played = rollout(
        live, "B", Fixed(strategy), contexts=starts, replicates=1, horizon=4, env_seed=0, env_settings=SESSIONS
    )
    kind = live.tensors["start_user"][starts] % 2
    value = torch.from_numpy(played.expected).mean(dim=(1, 2))
    return [float(value[kind == t].mean()) for t in (0, 1)]


def test_items_keep_their_identity_whatever_number_the_refitted_world_gives_them(truth: Truth, world: World) -> None:
    same = deployed(truth, world, truth.item_ids, 2)
    # two items of the own category at 0.5, of the other one at 0.1
    assert _value_by_type(same, 0) == pytest.approx([1.0, 0.2], abs=1e-5)
    # numbered from the other end, the items that specialist_0 lists are the truth's category 1
    swapped = deployed(truth, world, truth.item_ids[::-1], 2)
    assert _value_by_type(swapped, 0) == pytest.approx([0.2, 1.0], abs=1e-5)


def test_items_that_the_refitted_world_does_not_know_are_never_shown(world: World) -> None:
    # the truth has eight more items, in front of the others
    wide = World.synthetic(
        n_types=2, users_per_type=4, items_per_type=20, horizon=4, slate_size=2, history_lengths=(0,), leaving=None
    )
    truth = Truth(wide, (*(f"new{k}" for k in range(8)), *(f"i{k}" for k in range(world.n_items))))
    live = deployed(truth, world, truth.item_ids[8:], 2)
    log = emit(live, UniformPolicy(), truth.item_ids, settings=SESSIONS, horizon=4, seed=0, cohort=1, prefix="u")
    assert log.shown[:8].sum() == 0
    assert log.shown.sum() == len(log.frame)
    assert not log.frame["item_id"].str.startswith("new").any()


def test_the_log_of_a_deployment_carries_true_propensities(truth: Truth, world: World) -> None:
    live = deployed(truth, world, truth.item_ids, 2)
    arguments: dict[str, Any] = {"settings": SESSIONS, "horizon": 4, "seed": 0, "prefix": "u"}
    log = emit(live, Exploring(FixedPolicy(0), 0.3), truth.item_ids, cohort=1, **arguments)
    # 8 users, 4 requests of 2 items; three strategies share the 0.3
    assert len(log.frame) == 8 * 4 * 2
    assert log.served.sum() == 32
    expected = np.where(log.frame["strategy"] == "specialist_0", 0.8, 0.1)
    assert log.frame["propensity"].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert set(log.frame["strategy"]) > {"specialist_0"}
    assert not log.frame.duplicated(["user_id", "item_id"]).any()
    again = emit(live, Exploring(FixedPolicy(0), 0.3), truth.item_ids, cohort=1, **arguments)
    assert again.frame.equals(log.frame)
    other = emit(live, Exploring(FixedPolicy(0), 0.3), truth.item_ids, cohort=2, **arguments)
    assert not other.frame["click"].equals(log.frame["click"])


def test_the_log_of_a_deployment_is_a_log_with_impressions(truth: Truth, world: World) -> None:
    live = deployed(truth, world, truth.item_ids, 2)
    emitted = emit(live, UniformPolicy(), truth.item_ids, settings=SESSIONS, horizon=4, seed=0, cohort=1, prefix="u")
    log = InteractionLog.from_frame(emitted.frame, name="loop", outcomes=world.outcomes, merge_repeats=False)
    assert log.has_impressions
    assert len(log.frame) == len(emitted.frame)
    assert {"propensity", "strategy", "position"} <= set(log.frame.columns)


def test_thinning_by_propensity_leaves_the_log_of_a_uniform_choice() -> None:
    # of 20,000 requests of 2 items: strategy a with propensity 0.9 in 18,000, b with 0.1 in 2,000
    strategy = np.repeat(["a"] * 18_000 + ["b"] * 2_000, 2)
    frame = pd.DataFrame({"user_id": np.repeat(np.arange(20_000), 2), "timestamp": 0.0, "strategy": strategy})
    frame["propensity"] = np.where(strategy == "a", 0.9, 0.1)
    kept = thinned(frame, 0.1, seed=0, cohort=0)
    counts = kept["strategy"].value_counts()
    # all of b; of a each with 1/9: 2,000 +- 42 requests (one standard error)
    assert counts["b"] == 4_000
    assert counts["a"] / 2 == pytest.approx(2_000, abs=4 * 42)
    # whole requests
    assert set(kept["user_id"].value_counts()) == {2}
    assert kept.equals(thinned(frame, 0.1, seed=0, cohort=0))
    with pytest.raises(ValueError, match="without exploration some strategies are never chosen"):
        thinned(frame, 0.0, seed=0, cohort=0)


def test_an_exploration_share_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"exploration share is 1\.5"):
        Exploring(UniformPolicy(), 1.5)


def test_the_synthetic_truth_answers_by_the_model_that_made_the_log() -> None:
    _, model = behaviour_log(3, n_users=20, n_items=30, n_categories=2, span_days=5)
    world = behaviour_world(model, users=6, slate_size=5, seed=0)
    live = rollout(
        world,
        "B",
        Fixed(0),
        contexts=world.starts_of("B"),
        replicates=1,
        horizon=1,
        env_seed=0,
        env_settings={"world_seed": 7},
    )
    taste = world.judge("B").effects(7)[:, :, :3].double().numpy()
    logit = model.item_bias[None, :5] + np.einsum("uof,if->uio", taste, model.phi[:5])
    watch, like = (1 / (1 + np.exp(-logit[:, :, o])) for o in (0, 1))
    # the only strategy lists items 0 to 4 first; a like is worth 1, a watch nothing
    assert live.expected[:, 0, 0] == pytest.approx((watch * like).sum(axis=1), abs=1e-4)
    # another cohort, other people
    assert not torch.equal(world.judge("B").effects(8), world.judge("B").effects(7))


def _round(arm: str, number: int, policy: float, sbs: float, believed: float) -> dict[str, Any]:
    spread = np.linspace(0.99, 1.01, 50)
    users = {"policy": policy, "sampled": policy, "a": sbs, "b": 0.5 * sbs}
    return {
        "arm": arm,
        "round": number,
        "sbs": "a",
        "items": 40,
        "strategies": ["a", "b"],
        "true": {name: (value * spread).tolist() for name, value in users.items()},
        "believed": {"policy": (believed * spread).tolist(), "sbs": spread.tolist()},
        "deployed": (0.9 * policy * spread).tolist(),
        "served": [8, 8],
        "items_shown": 40 - 10 * (number - 1),
        "top_tenth": 0.4,
        "cpu_seconds": {"build": 1.0, "train": 2.0, "judge": 3.0},
    }


def _rounds() -> list[dict[str, Any]]:
    first = [_round(arm, 1, 1.2, 1.0, 1.1) for arm in ("naive", "explore")]
    return [first[0], _round("naive", 2, 0.9, 0.9, 1.3), first[1], _round("explore", 2, 1.26, 1.05, 1.2)]


def test_the_answer_says_what_selection_is_worth_now_and_what_was_believed() -> None:
    found = summary(_rounds(), {"exploration": 0.2, "rounds": 2})
    naive, explore = (found["curves"][arm][-1] for arm in ("naive", "explore"))
    # 0.9 / 0.9 and 0.9 / 1.2; 1.26 / 1.05 and 1.26 / 1.2
    assert (naive["lift"]["estimate"], naive["against_static"]["estimate"]) == pytest.approx((0.0, -0.25))
    assert (explore["lift"]["estimate"], explore["against_static"]["estimate"]) == pytest.approx((0.2, 0.05))
    assert explore["deployed_against_static"]["estimate"] == pytest.approx(0.9 * 1.05 - 1.0)
    assert found["static"]["lift"]["estimate"] == pytest.approx(0.2)
    assert naive["lift_true_best"] == naive["lift"]
    assert (naive["true_best"], naive["entropy_bits"]) == ("a", 1.0)
    assert found["answer"].startswith("Without exploration selection did not pay in round 2: +0.0 % [+0.0, +0.0]")
    assert "its own world believed +30.0 %" in found["answer"]
    assert "with 20% exploration selection still paid in round 2: +20.0 %" in found["answer"]
    assert "30 items were shown, 40 in round 1" in found["answer"]


def test_a_lift_pays_only_when_it_is_surely_above_two_percent() -> None:
    assert paid({"low": 0.021, "high": 0.05}) == PAID
    assert paid({"low": -0.01, "high": 0.019}) == DID_NOT
    assert paid({"low": 0.01, "high": 0.05}) == OPEN


def test_the_page_shows_every_round_and_asks_for_nothing_else() -> None:
    args = {"exploration": 0.2, "rounds": 2, "pool": ["a", "<b>"], "steps": 10, "copies": 1, "horizon": 4}
    result = {"name": "<i>", "args": {**args, "session_requests": 2}, **summary(_rounds(), args)}
    page, text = feedback_page(result, {"command": "x"}), feedback_markdown(result, {"command": "x"})
    assert page.count("<figure>") == 2
    assert "<script" not in page
    assert "&lt;i&gt;" in page
    assert text.count("\n| naive | ") == text.count("\n| explore | ") == 2
    assert "take no weights" in page


def test_a_loop_that_could_forget_its_whole_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 10 requests"):
        feedback_loop.run(feedback_loop.Args(horizon=4))
    with pytest.raises(ValueError, match="needs both --log and --world"):
        feedback_loop.run(feedback_loop.Args(log=Path("somewhere")))


@pytest.mark.slow
def test_a_killed_loop_goes_on_and_ends_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = feedback_loop.Args(
        rounds=2,
        pool=("popular", "item_knn"),
        horizon=10,
        session_requests=5,
        copies=1,
        steps=1280,
        max_epochs=1,
        users=90,
        items=100,
        runs=tmp_path / "whole",
        quiet=True,
    )
    whole = feedback_loop.run(args)
    assert {len(curve) for curve in whole["curves"].values()} == {2}
    (folder,) = (tmp_path / "whole").iterdir()
    assert {"feedback_loop.md", "feedback_loop.html", "result.json"} <= {p.name for p in folder.iterdir()}
    real, done = deployment.emit, 0

    def killed(*given: Any, **named: Any) -> Any:
        nonlocal done
        done += 1
        if done == 2:
            raise KeyboardInterrupt
        return real(*given, **named)

    again = dataclasses.replace(args, runs=tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(deployment, "emit", killed)
        with pytest.raises(KeyboardInterrupt):
            feedback_loop.run(again)
    row = feedback_loop.run(again)

    def numbers(result: dict[str, Any]) -> dict[str, Any]:
        curves = {a: [{**c, "cpu_seconds": None} for c in curve] for a, curve in result["curves"].items()}
        return {"curves": curves, "answer": result["answer"]}

    assert numbers(row) == numbers(whole)
