"""`experiments.parity` compares final returns by an interval worked out here by hand, and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments import parity


def test_the_interval_of_the_difference_is_welchs() -> None:
    ours, theirs = np.array([101.0, 103.0]), np.array([99.0, 101.0])
    # means 102 and 100; variances 2 and 2, so se = sqrt(1 + 1) = 1.41421, df = 2, t(0.95, 2) = 2.91999: half = 4.12948
    row = parity.difference(ours, theirs, 0.05)
    assert row["estimate"] == pytest.approx(0.02)
    assert row["low"] == pytest.approx(0.02 - 0.0412948, abs=1e-6)
    assert row["high"] == pytest.approx(0.02 + 0.0412948, abs=1e-6)
    assert not row["equal"]
    assert parity.difference(ours, theirs, 0.07)["equal"]
    with pytest.raises(ValueError, match="at least 2 each"):
        parity.difference(ours[:1], theirs, 0.05)


def test_a_stopped_run_trains_only_what_is_missing(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def instant(env_id: str, agent: str, seed: int, args: parity.Args) -> float:
        asked.append((env_id, agent, seed))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return 100.0 + seed + (agent == "ppo")

    monkeypatch.setattr(parity, "final_return", instant)
    args = parity.Args(seeds=3, runs=tmp_path, quiet=True, page=tmp_path / "page.md")
    with pytest.raises(KeyboardInterrupt):
        parity.run(args)
    result = parity.run(args)
    # 2 environments, 2 agents, 3 seeds; the fifth was asked twice
    assert len(asked) == 13
    assert result["rows"]["CartPole-v1"]["returns"] == {"ppo": [101.0, 102.0, 103.0], "sb3_ppo": [100.0, 101.0, 102.0]}
    assert (
        "| CartPole-v1 | 102.00 (101.00 to 103.00) | 101.00 (100.00 to 102.00) |" in (tmp_path / "page.md").read_text()
    )


@pytest.mark.slow
def test_both_learn_something_on_both_environments_at_small_settings(tmp_path: Path) -> None:
    args = parity.Args(cartpole_steps=6144, select_steps=5120, episodes=10, runs=tmp_path)
    for agent in parity.AGENTS:
        # a random policy lasts 22 steps: twice that
        assert parity.final_return("CartPole-v1", agent, 0, args) > 44
        assert parity.final_return("MetaRec/Select-v0", agent, 0, args) > 0
