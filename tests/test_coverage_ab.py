"""The promises of intervals, tests and plans, on users whose truth is known; fewer repetitions than the published page."""

from __future__ import annotations

import pytest

from experiments import coverage_ab
from experiments.coverage_ab import ANY, KINDS, TRUTH, Args, Line, draw_users, run
from metarec_gym.seeding import numpy_rng


@pytest.mark.parametrize("kind", KINDS)
def test_the_made_up_users_are_worth_what_is_said_of_them(kind: str) -> None:
    for lift in (0.0, 0.2):
        users = draw_users(kind, lift, (40_000,), numpy_rng(0, kind))
        assert users[:, 0].mean() / users[:, 1].mean() == pytest.approx(TRUTH[kind] * (1 + lift), rel=0.03)


def test_the_page_names_what_does_not_hold(tmp_path, monkeypatch) -> None:
    lines = [Line("kept", (0.93, 0.97), 0.95), Line("broken", (0.0, 0.05), 0.06), Line("for comparison", ANY, 0.5)]
    monkeypatch.setattr(coverage_ab, "PARTS", (type("Part", (), {"__call__": lambda *_: lines, "__name__": "part"})(),))
    run(Args(repetitions=10, out=tmp_path / "page.md"))
    text = (tmp_path / "page.md").read_text()
    assert "1 of 2 promises hold" in text
    assert "| broken | 0 % to 5 % | 6.00 % | **no** |" in text


@pytest.mark.slow
def test_promises_hold_within_the_noise_of_four_hundred_repetitions() -> None:
    # three standard errors of a share near 95 %
    noise = 3.0 * (0.95 * 0.05 / 400) ** 0.5
    for line in run(Args(repetitions=400)):
        assert line.promised[0] - noise <= line.found <= line.promised[1] + noise, line
