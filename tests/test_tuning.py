import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import tuning
from experiments import tune
from metarec_gym.data import synthetic_log
from metarec_gym.envs.tune import TuneVectorEnv

SMALL = {"n_users": 16, "n_items": 32, "horizon": 4, "batch_size": 16, "updates_per_step": 1}


def make(**settings):
    return tuning.make_runs(None, **{**SMALL, **settings})


class CountedRuns:
    """An environment that counts the runs it starts."""

    def __init__(self, env):
        self.env, self.runs = env, 0

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self, **more):
        self.runs += self.env.num_envs
        return self.env.reset(**more)


def test_the_cosine_schedule_by_hand():
    env = make()
    start = env.config.action_of(step_users=0.4, step_items=0.1, step_weights=1.0, l2=0.01, hardness=2)
    schedule = tuning.cosine_of(env, torch.from_numpy(start)[None])
    obs = torch.zeros(3, env.single_observation_space.shape[0])
    obs[:, schedule.progress] = torch.tensor([0.0, 0.5, 1.0])
    settings = env.config.settings_of(schedule(obs))
    # from the peak over (peak + lowest) / 2 to the lowest, 0.001
    assert settings.step_users.tolist() == pytest.approx([0.4, 0.2005, 0.001], rel=1e-4)
    assert settings.step_weights.tolist() == pytest.approx([1.0, 0.5005, 0.001], rel=1e-4)
    assert settings.l2.tolist() == pytest.approx([0.01] * 3, rel=1e-4)


def test_a_schedule_is_a_straight_line_in_progress():
    env = make()
    line = tuning.schedule_of(
        env, torch.tensor([[-1.0, 0.0, 0.5, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0, -0.5]])
    )
    obs = torch.zeros(2, env.single_observation_space.shape[0])
    obs[:, line.progress] = torch.tensor([0.5, 1.0])
    assert line(obs).tolist() == [[-0.5, 0.0, 1.0, 0.0, -0.25], [0.0, 0.0, 1.0, 0.0, -0.5]]


def test_every_steering_meets_the_same_runs():
    env = make(split="test", metric="log_loss")
    a, b = (tuning.evaluate(env, tuning.constant_default(env, 0, 0), 128, seed=3) for _ in range(2))
    assert np.array_equal(a, b)
    assert len(np.unique(a)) > 100
    with pytest.raises(ValueError, match="expected a multiple of 64"):
        tuning.evaluate(env, tuning.constant_default(env, 0, 0), 100, seed=3)


@pytest.mark.parametrize(
    "method", ["search_constant", "search_cosine", "evolve_schedule", "evolve_cosine", "evolve_feedback"]
)
def test_a_search_uses_its_budget_and_no_more_and_is_reproducible(method):
    found = []
    for _ in range(2):
        env = CountedRuns(make(horizon=2))
        found.append(tuning.METHODS[method](env, 256, 5))
        assert env.runs == 256
    obs = torch.rand(4, env.single_observation_space.shape[0])
    assert torch.equal(found[0](obs), found[1](obs))


@pytest.mark.parametrize(
    ("method", "budget"),
    [("search_constant", 512), ("evolve_schedule", 1280), pytest.param("ppo", 2560, marks=pytest.mark.slow)],
)
def test_where_only_cost_counts_uniform_negatives_are_found(method, budget):
    """With a huge cost weight the optimum is known: hardness 1, cost 7/14 in every step."""
    env = make(cost_weight=50.0)
    least = -50.0 * 7 / 14
    steering = tuning.METHODS[method](env, budget, 1)
    value = tuning.evaluate(make(cost_weight=50.0, split="test"), steering, 64, seed=0).mean()
    # the gain of the metric adds at most 1
    assert value > 1.05 * least
    assert tuning.evaluate(env, tuning.schedule_of(env, torch.ones(1, 5)), 64, seed=0).mean() < 1.9 * least


def test_ppo_learns_on_the_same_settings_as_the_others_play():
    env = make(l2=(1e-4, 0.1), metric="log_loss")
    made = []
    original = TuneVectorEnv.__init__

    def remember(self, *args, **more):
        original(self, *args, **more)
        made.append(self.config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TuneVectorEnv, "__init__", remember)
        tuning.learn_ppo(env, 64, 0)
    assert made == [env.config]


def test_the_comparison_plays_every_method_once_and_finds_finished_runs_again(tmp_path, capsys):
    log, _ = synthetic_log(0, n_users=60, n_items=40)
    log.save(tmp_path / "log")
    args = tune.Args(
        logs=(tmp_path / "log",),
        methods=("constant_default", "evolve_schedule"),
        budget=64,
        seeds=2,
        runs=64,
        horizon=2,
        workers=1,
        folder=tmp_path / "runs",
    )
    first = tune.run(args)
    assert "3/3" in capsys.readouterr().out
    rows = first["logs"][str(tmp_path / "log")]
    difference = rows["evolve_schedule"]["less_constant_default"]["estimate"]
    gains = [rows[name]["gain"]["estimate"] for name in ("evolve_schedule", "constant_default")]
    assert difference == pytest.approx(gains[0] - gains[1])
    assert tune.run(args)["logs"] == first["logs"]
    assert "3/3" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="there are no methods"):
        tune.run(dataclasses.replace(args, methods=("guess",)))
    (page,) = args.folder.glob("tune_*/tune.md")
    text = page.read_text()
    for log, rows in first["logs"].items():
        assert f"## {Path(log).name}" in text
        for name, row in rows.items():
            assert f"| {name} | {row['gain']['estimate']:+.4f} [" in text


def test_the_page_names_only_methods_that_surely_beat_both_usual_schedules():
    def gain(low, high):
        return {"estimate": (low + high) / 2, "low": low, "high": high}

    less = [f"less_{name}" for name in ("constant_default", "cosine_default")]
    rows = {
        "constant_default": {"gain": gain(0, 1)},
        "cosine_default": {"gain": gain(0, 1)},
        "sure": {"gain": gain(0, 1), **dict.fromkeys(less, gain(0.1, 0.2))},
        "open": {"gain": gain(0, 1), less[0]: gain(0.1, 0.2), less[1]: gain(-0.1, 0.2)},
    }
    text = tune.markdown({"logs/shop": rows}, tune.Args())
    assert "Surely better than both usual schedules: sure." in text
    del rows["sure"]
    assert "Nothing surely beats both usual schedules." in tune.markdown({"logs/shop": rows}, tune.Args())
