"""Writes obp.json: what obp 0.5.7 (Open Bandit Pipeline, Apache-2.0) answers on small made-up logs, and the logs themselves.

obp refuses Python >= 3.11 and is unmaintained, so it is no dependency: the answers were made once, in an environment of its own.

    python3.11 -m venv obp_env
    obp_env/bin/pip install numpy scipy scikit-learn pandas matplotlib seaborn tqdm pyyaml torch
    obp_env/bin/pip install --no-deps --ignore-requires-python obp==0.5.7 pyieoe pingouin
    obp_env/bin/python tests/golden/make_obp_golden.py

Made with Python 3.11.7, numpy 2.4.6, scipy 1.17.1, scikit-learn 1.9.1, pandas 3.1.1, torch 2.13.0. MIPS runs with the true
p(e | a) (the other branch of obp 0.5.7 does not run on this scikit-learn).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

LAMBDAS = {
    "ips": [1.0, 2.0, 5.0, 10.0, 50.0, 1000.0],
    "dr": [1.0, 2.0, 5.0, 10.0, 50.0, 1000.0],
    "switch_dr": [0.5, 1.0, 2.0, 5.0, 10.0, 50.0],
    "dros": [0.1, 1.0, 10.0, 100.0, 10000.0],
    "sg_ips": [0.0, 0.01, 0.1, 0.5, 1.0],
    "sg_dr": [0.0, 0.01, 0.1, 0.5, 1.0],
}


def distribution(rng, shape, sharpness):
    """Random probabilities over the last axis, rounded so that JSON keeps them exactly."""
    logits = sharpness * rng.standard_normal(shape)
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    probs = np.maximum(np.round(probs, 5), 1e-4)
    probs[..., -1] = 0.0
    probs = probs / np.maximum(1.0, (probs.sum(axis=-1, keepdims=True) + 0.01))
    probs = np.round(probs, 6)
    probs[..., -1] = np.round(1.0 - probs.sum(axis=-1), 6)
    return probs


def single_log(rng, rows=120, actions=5):
    """Logged actions with the logger's and a policy's chances, rewards and a rough reward model."""
    pscore, probs = distribution(rng, (rows, actions), 1.3), distribution(rng, (rows, actions), 1.3)
    action = np.array([rng.choice(actions, p=p / p.sum()) for p in pscore])
    truth = 0.2 + 0.6 * rng.random(actions)
    reward = (rng.random(rows) < truth[action]).astype(float)
    q = np.round(np.clip(truth + 0.15 * rng.standard_normal((rows, actions)), 0, 1), 4)
    family = np.array([0, 0, 1, 1, 2])[:actions]
    return {"pscore": pscore, "probs": probs, "action": action, "reward": reward, "q": q, "family": family}


def slate_log(rng, slates=40, places=3, items=4):
    """Slates whose items are drawn place by place; chances change with what stands above."""
    logger, policy = distribution(rng, (slates, places, items), 0.8), distribution(rng, (slates, places, items), 0.8)
    action = np.array([[rng.choice(items, p=p / p.sum()) for p in row] for row in logger])
    reward = (rng.random((slates, places)) < 0.2 + 0.1 * action).astype(float)
    q = np.round(rng.random((slates, places, items)), 4)
    # the marginals need not fit the joint chances for the arithmetic to be checked
    items_logger, items_policy = (
        distribution(rng, (slates, places, items), 0.8),
        distribution(rng, (slates, places, items), 0.8),
    )
    chosen = action[:, :, None]
    return {
        "action": action,
        "reward": reward,
        "q": q,
        "next_item": policy,
        "logger_next": logger,
        "logger_item": np.take_along_axis(items_logger, chosen, 2)[:, :, 0],
        "policy_item": np.take_along_axis(items_policy, chosen, 2)[:, :, 0],
    }


def single_answers(log):
    """obp's values and SLOPE choices for one log."""
    from obp import ope

    rows = len(log["action"])
    arrays = {
        "reward": log["reward"],
        "action": log["action"],
        "pscore": log["pscore"][np.arange(rows), log["action"]],
        "action_dist": log["probs"][:, :, None],
        "position": np.zeros(rows, dtype=int),
    }
    model = {**arrays, "estimated_rewards_by_reg_model": log["q"][:, :, None]}
    member = np.zeros((log["pscore"].shape[1], log["family"].max() + 1, 1))
    member[np.arange(len(member)), log["family"], 0] = 1.0
    answers = {
        "ips": ope.InverseProbabilityWeighting().estimate_policy_value(**arrays),
        "ips clip=2": ope.InverseProbabilityWeighting(lambda_=2.0).estimate_policy_value(**arrays),
        "snips": ope.SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**arrays),
        "dm": ope.DirectMethod().estimate_policy_value(**model),
        "dr": ope.DoublyRobust().estimate_policy_value(**model),
        "dr clip=2": ope.DoublyRobust(lambda_=2.0).estimate_policy_value(**model),
        "sndr": ope.SelfNormalizedDoublyRobust().estimate_policy_value(**model),
        "switch_dr tau=2": ope.SwitchDoublyRobust(lambda_=2.0).estimate_policy_value(**model),
        "dros lambda=5": ope.DoublyRobustWithShrinkage(lambda_=5.0).estimate_policy_value(**model),
        "dros lambda=0": ope.DoublyRobustWithShrinkage(lambda_=0.0).estimate_policy_value(**model),
        "sg_ips lambda=0.1": ope.SubGaussianInverseProbabilityWeighting(lambda_=0.1).estimate_policy_value(**arrays),
        "sg_dr lambda=0.1": ope.SubGaussianDoublyRobust(lambda_=0.1).estimate_policy_value(**model),
        "mips": ope.MarginalizedInverseProbabilityWeighting(n_actions=len(member)).estimate_policy_value(
            reward=log["reward"],
            action=log["action"],
            action_embed=log["family"][log["action"]][:, None],
            pi_b=log["pscore"][:, :, None],
            action_dist=log["probs"][:, :, None],
            p_e_a=member,
            position=arrays["position"],
        ),
    }
    tunings = {
        "ips": (ope.InverseProbabilityWeightingTuning, arrays),
        "dr": (ope.DoublyRobustTuning, model),
        "switch_dr": (ope.SwitchDoublyRobustTuning, model),
        "dros": (ope.DoublyRobustWithShrinkageTuning, model),
        "sg_ips": (ope.SubGaussianInverseProbabilityWeightingTuning, arrays),
        "sg_dr": (ope.SubGaussianDoublyRobustTuning, model),
    }
    chosen = {}
    for name, (tuning, given) in tunings.items():
        tuned = tuning(lambdas=LAMBDAS[name], tuning_method="slope")
        value = tuned.estimate_policy_value(**given)
        chosen[name] = {"lambdas": LAMBDAS[name], "choice": tuned.best_hyperparam, "value": float(value)}
    return {"values": {name: float(value) for name, value in answers.items()}, "slope": chosen}


def slate_answers(log):
    """obp's values of one slate log."""
    from obp import ope

    slates, places = log["action"].shape
    items = log["q"].shape[2]
    chosen = log["action"][:, :, None]
    joint = [np.take_along_axis(log[key], chosen, 2)[:, :, 0].cumprod(axis=1) for key in ("logger_next", "next_item")]
    common = {
        "slate_id": np.repeat(np.arange(slates), places),
        "reward": log["reward"].ravel(),
        "position": np.tile(np.arange(places), slates),
    }
    whole = [np.repeat(chances[:, -1], places) for chances in joint]
    return {
        "sips": ope.SlateStandardIPS(len_list=places).estimate_policy_value(
            **common, pscore=whole[0], evaluation_policy_pscore=whole[1]
        ),
        "iips": ope.SlateIndependentIPS(len_list=places).estimate_policy_value(
            **common,
            pscore_item_position=log["logger_item"].ravel(),
            evaluation_policy_pscore_item_position=log["policy_item"].ravel(),
        ),
        "rips": ope.SlateRewardInteractionIPS(len_list=places).estimate_policy_value(
            **common, pscore_cascade=joint[0].ravel(), evaluation_policy_pscore_cascade=joint[1].ravel()
        ),
        "cascade_dr": ope.SlateCascadeDoublyRobust(len_list=places, n_unique_action=items).estimate_policy_value(
            **common,
            action=log["action"].ravel(),
            pscore_cascade=joint[0].ravel(),
            evaluation_policy_pscore_cascade=joint[1].ravel(),
            q_hat=log["q"].ravel(),
            evaluation_policy_action_dist=log["next_item"].ravel(),
        ),
    }


def main():
    """Writes the file beside this one."""
    golden = {"single": [], "slates": []}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        log = single_log(rng)
        golden["single"].append({"log": {k: v.tolist() for k, v in log.items()}, "obp": single_answers(log)})
    log = slate_log(np.random.default_rng(10))
    answers = {name: float(value) for name, value in slate_answers(log).items()}
    golden["slates"].append({"log": {k: v.tolist() for k, v in log.items()}, "obp": answers})
    path = Path(__file__).with_name("obp.json")
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
