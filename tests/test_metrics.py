"""Closed gaps, lifts, entropy, worst decile, segments and the verdict, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from metarec_gym.evaluation.intervals import Interval
from metarec_gym.evaluation.metrics import closed_gap, lift, segment_of, segment_values, usage_entropy, worst_decile
from metarec_gym.evaluation.verdict import CANNOT_TELL, JUST_USE, MODEL_DEPENDENT, PAYS, RULE, decide, sign_changes

SBS = np.array([1.0, 2.0, 3.0, 4.0])
ORACLE = np.array([1.5, 2.5, 3.0, 5.0])


def _interval(low: float, high: float, *, df: float = 1e6) -> Interval:
    middle = (low + high) / 2
    return Interval(middle, low, high, (high - low) / 2 / 1.959964, df, 0.95, 10, 600)


OPEN = _interval(0.1, 0.3)


def test_the_single_best_strategy_closes_nothing_and_the_oracle_everything() -> None:
    nothing, everything = closed_gap(SBS, SBS, ORACLE, OPEN), closed_gap(ORACLE, SBS, ORACLE, OPEN)
    assert nothing is not None
    assert everything is not None
    assert (nothing.estimate, nothing.low, nothing.high) == (0.0, 0.0, 0.0)
    assert (everything.estimate, everything.low, everything.high) == (1.0, 1.0, 1.0)


def test_closed_gap_by_hand_over_seeds() -> None:
    # the gap is 0.5 on average, gains are 0.25 and 0.125: together 0.1875 / 0.5
    gap = closed_gap(np.stack([SBS + 0.25, SBS + 0.125]), SBS, ORACLE, OPEN)
    assert gap is not None
    assert gap.estimate == pytest.approx(0.375)
    assert gap.seeds == 2


def test_no_closed_gap_is_shown_where_the_headroom_is_not_surely_above_two_percent() -> None:
    assert closed_gap(ORACLE, SBS, ORACLE, _interval(0.02, 0.3)) is None
    assert closed_gap(ORACLE, SBS, ORACLE, _interval(0.0201, 0.3)) is not None


def test_lift_is_a_ratio_of_means() -> None:
    # 12 / 10 - 1
    assert lift(ORACLE, SBS).estimate == pytest.approx(0.2)
    assert lift(SBS, SBS).high == 0.0


def test_entropy_is_zero_for_one_strategy_and_log2_k_for_all() -> None:
    assert usage_entropy([0, 7, 0]) == 0.0
    assert usage_entropy([5, 5, 5, 5]) == 2.0
    # 0.5 * 1 + 2 * 0.25 * 2 = 1.5 bits
    assert usage_entropy([2, 1, 1]) == 1.5


def test_worst_decile_is_the_mean_of_the_lowest_tenth() -> None:
    assert worst_decile(np.arange(20.0)) == 0.5
    assert worst_decile([3.0, 1.0, 2.0]) == 1.0
    # seeds first: users (1, 3) over the two seeds
    assert worst_decile([[0.0, 3.0], [2.0, 3.0]]) == 1.0


def test_segments_are_cold_up_to_five_and_heavy_from_twenty_one() -> None:
    assert segment_of([0, 5, 6, 20, 21, 500]).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_user_with_two_start_states_in_a_segment_counts_once() -> None:
    cold, light, heavy = segment_values(np.array([1, 1, 2]), np.array([0, 3, 30]), np.array([1.0, 3.0, 9.0]))
    assert cold.tolist() == [2.0]
    assert light.tolist() == []
    assert heavy.tolist() == [9.0]


def test_selection_pays_when_a_lower_bound_is_above_two_percent() -> None:
    verdict = decide("ease", {"per-user oracle": OPEN}, {"ppo": _interval(0.03, 0.09)})
    assert (verdict.kind, verdict.policy) == (PAYS, "ppo")
    assert "+6.0 %" in verdict.headline


def test_many_learned_policies_widen_the_bounds() -> None:
    # one policy: lower bound 2.1 %; of ten, Bonferroni's quantile is 2.81 instead of 1.96: 4.1 - 2.81 / 1.96 * 2 = 1.2 %
    policies = {f"p{i}": _interval(0.021, 0.061) for i in range(10)}
    assert decide("ease", {"per-user oracle": OPEN}, {"p0": policies["p0"]}).kind == PAYS
    verdict = decide("ease", {"per-user oracle": OPEN}, policies)
    assert verdict.kind == CANNOT_TELL
    assert "Bonferroni" in verdict.reason


def test_just_use_needs_every_upper_bound_below_two_percent() -> None:
    small = _interval(-0.01, 0.015)
    assert decide("ease", {"per-user oracle": small}, {"ppo": small}).headline == "just use ease"
    assert decide("ease", {"per-user oracle": small}, {"ppo": small}).kind == JUST_USE
    assert decide("ease", {"per-user oracle": _interval(-0.01, 0.03)}, {"ppo": small}).kind == CANNOT_TELL
    assert decide("ease", {"per-user oracle": small}, {"ppo": _interval(-0.01, 0.03)}).kind == CANNOT_TELL


def test_cannot_tell_says_which_bound_is_in_the_way() -> None:
    verdict = decide("ease", {"per-user oracle": OPEN}, {"ppo": _interval(-0.05, 0.01)})
    assert "There is something to win" in verdict.reason
    assert "surely less than 2 %" in verdict.reason
    rules = {"per-user oracle": OPEN, "best non-personal rule": _interval(0.05, 0.09)}
    simple = decide("ease", rules, {"ppo": _interval(-0.05, 0.01)}, sched="in turn: ease, popular")
    assert simple.headline == "cannot tell (until then the safe choice is in turn: ease, popular)"
    assert "What is sure without learning" in simple.reason
    unsure = decide("ease", {"per-user oracle": _interval(0.01, 0.05)}, {})
    assert "open" in unsure.reason
    assert "No learned policy was played" in unsure.reason


def test_a_sign_changes_only_where_the_main_judge_was_sure() -> None:
    gain, loss, open_, tiny_loss = (_interval(*x) for x in ((0.03, 0.09), (-0.09, -0.03), (-0.02, 0.06), (-0.04, 0.02)))
    assert sign_changes(gain, loss)
    assert sign_changes(gain, tiny_loss)
    assert sign_changes(loss, open_)
    assert not sign_changes(open_, loss)
    assert not sign_changes(gain, open_)


def test_a_gain_that_a_second_judge_turns_round_is_model_dependent() -> None:
    gain, loss = _interval(0.03, 0.09), _interval(-0.09, -0.03)
    verdict = decide("ease", {"per-user oracle": OPEN}, {"ppo": gain}, second={"ppo": (gain, loss)})
    assert verdict.kind == MODEL_DEPENDENT
    assert verdict.headline == "model-dependent (until then the safe choice is ease)"
    assert "-6.0 % [-9.0, -3.0] under the second" in verdict.reason
    assert decide("ease", {"per-user oracle": OPEN}, {"ppo": gain}, second={"ppo": (gain, gain)}).kind == PAYS


def test_a_gain_that_holds_under_both_judges_decides_though_another_one_does_not() -> None:
    gain, more, loss = _interval(0.04, 0.09), _interval(0.06, 0.1), _interval(-0.09, -0.03)
    verdict = decide(
        "ease", {"per-user oracle": OPEN}, {"ppo": gain, "sb3": more}, second={"ppo": (gain, gain), "sb3": (more, loss)}
    )
    assert (verdict.kind, verdict.policy) == (PAYS, "ppo")
    assert "Model-dependent and not counted: sb3" in verdict.reason


def test_just_use_does_not_stand_where_a_second_judge_surely_prefers_something_else() -> None:
    small, gain = _interval(-0.01, 0.015), _interval(0.03, 0.09)
    second = {"ppo": (small, small), "als": (small, gain)}
    verdict = decide("ease", {"per-user oracle": small}, {"ppo": small}, second=second)
    assert verdict.kind == MODEL_DEPENDENT
    assert "als surely beats it" in verdict.reason
    assert decide("ease", {"per-user oracle": small}, {"ppo": small}, second={"ppo": (small, small)}).kind == JUST_USE


def test_the_best_simple_rule_is_no_safe_choice_where_a_second_judge_turns_it_round() -> None:
    rules = {"per-user oracle": OPEN, RULE: _interval(0.05, 0.09)}
    second = {RULE: (_interval(0.05, 0.09), _interval(-0.04, 0.01))}
    verdict = decide("ease", rules, {"ppo": _interval(-0.05, 0.01)}, sched="in turn: ease, popular", second=second)
    assert verdict.headline == "cannot tell (until then the safe choice is ease)"
    assert "Model-dependent" in verdict.reason
