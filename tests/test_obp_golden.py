"""Equality with obp 0.5.7, whose answers tests/golden/make_obp_golden.py wrote down."""

import json
from pathlib import Path

import numpy as np
import pytest

from metarec_gym.evaluation.off_policy import single_action as single
from metarec_gym.evaluation.off_policy.bandit_log import BanditLog
from metarec_gym.evaluation.off_policy.slates import SlateChances, SlateLog, cascade_dr, iips, rips, sips
from metarec_gym.evaluation.off_policy.tuning import slope

GOLDEN = json.loads((Path(__file__).parent / "golden" / "obp.json").read_text())
SINGLE = {
    "ips": lambda log, pi, q: single.ips(log, pi),
    "ips clip=2": lambda log, pi, q: single.ips(log, pi, clip=2.0),
    "snips": lambda log, pi, q: single.snips(log, pi),
    "dm": single.direct_method,
    "dr": single.doubly_robust,
    "dr clip=2": lambda log, pi, q: single.doubly_robust(log, pi, q, clip=2.0),
    "sndr": single.self_normalised_dr,
    "switch_dr tau=2": lambda log, pi, q: single.switch_dr(log, pi, q, tau=2.0),
    "dros lambda=5": lambda log, pi, q: single.dr_optimistic_shrinkage(log, pi, q, shrinkage=5.0),
    "dros lambda=0": lambda log, pi, q: single.dr_optimistic_shrinkage(log, pi, q, shrinkage=0.0),
    "sg_ips lambda=0.1": lambda log, pi, q: single.sub_gaussian_ips(log, pi, smoothing=0.1),
    "sg_dr lambda=0.1": lambda log, pi, q: single.sub_gaussian_dr(log, pi, q, smoothing=0.1),
    "mips": lambda log, pi, q: single.mips(log, pi),
}
TUNED = {
    "ips": lambda log, pi, q, v: single.ips(log, pi, clip=v),
    "dr": lambda log, pi, q, v: single.doubly_robust(log, pi, q, clip=v),
    "switch_dr": lambda log, pi, q, v: single.switch_dr(log, pi, q, tau=v),
    "dros": lambda log, pi, q, v: single.dr_optimistic_shrinkage(log, pi, q, shrinkage=v),
    "sg_ips": lambda log, pi, q, v: single.sub_gaussian_ips(log, pi, smoothing=v),
    "sg_dr": lambda log, pi, q, v: single.sub_gaussian_dr(log, pi, q, smoothing=v),
}
SLATES = {
    "sips": lambda log, pi, q, after: sips(log, pi),
    "iips": lambda log, pi, q, after: iips(log, pi),
    "rips": lambda log, pi, q, after: rips(log, pi),
    "cascade_dr": cascade_dr,
}


def logged(case):
    arrays = {name: np.array(values) for name, values in case["log"].items()}
    log = BanditLog.from_arrays(
        arrays["action"], arrays["reward"], pscore=arrays["pscore"], families=[str(f) for f in arrays["family"]]
    )
    return log, arrays["probs"], arrays["q"]


@pytest.mark.parametrize("name", sorted(SINGLE))
def test_single_action_estimates_are_those_of_obp(name):
    assert all(set(case["obp"]["values"]) == set(SINGLE) for case in GOLDEN["single"])
    for case in GOLDEN["single"]:
        assert SINGLE[name](*logged(case)).value == pytest.approx(case["obp"]["values"][name], abs=1e-6)


@pytest.mark.parametrize("name", sorted(TUNED))
def test_slope_chooses_the_settings_that_obp_chooses(name):
    assert all(set(case["obp"]["slope"]) == set(TUNED) for case in GOLDEN["single"])
    for case in GOLDEN["single"]:
        log, probs, q = logged(case)
        answer = case["obp"]["slope"][name]
        candidates = [TUNED[name](log, probs, q, setting) for setting in answer["lambdas"]]
        chosen = slope(candidates, log.cluster)
        assert answer["lambdas"][chosen] == answer["choice"]
        assert candidates[chosen].value == pytest.approx(answer["value"], abs=1e-6)


@pytest.mark.parametrize("name", sorted(SLATES))
def test_slate_estimates_are_those_of_obp(name):
    (case,) = GOLDEN["slates"]
    assert set(case["obp"]) == set(SLATES)
    arrays = {key: np.array(values) for key, values in case["log"].items()}

    def cascade(key):
        return np.take_along_axis(arrays[key], arrays["action"][:, :, None], 2)[:, :, 0].cumprod(axis=1)

    slates = len(arrays["action"])
    log = SlateLog(
        action=arrays["action"],
        reward=arrays["reward"],
        logger=SlateChances(arrays["logger_item"], cascade("logger_next")),
        cluster=np.arange(slates),
        context=np.zeros((slates, 0)),
    )
    policy = SlateChances(arrays["policy_item"], cascade("next_item"))
    found = SLATES[name](log, policy, arrays["q"], arrays["next_item"]).value
    assert found == pytest.approx(case["obp"][name], abs=1e-6)
