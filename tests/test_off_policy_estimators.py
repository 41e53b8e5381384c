"""Expectations are sums over everything that could have been logged, with its chance: no sampling, no tolerance but rounding."""

import itertools

import numpy as np
import pytest

from metarec_gym.evaluation.off_policy import single_action as single
from metarec_gym.evaluation.off_policy.bandit_log import BanditLog
from metarec_gym.evaluation.off_policy.evaluation import value_policy
from metarec_gym.evaluation.off_policy.sequences import (
    EpisodeLog,
    fitted_q,
    fitted_q_value,
    pdis,
    sequential_dr,
    wpdis,
)
from metarec_gym.evaluation.off_policy.slates import (
    SlateChances,
    SlateLog,
    cascade_dr,
    cascade_rewards,
    iips,
    rips,
    sips,
)

LOGGER = np.array([0.5, 0.3, 0.2])
POLICY = np.array([0.1, 0.2, 0.7])
MEANS = np.array([0.2, 0.5, 0.9])
VALUE = 0.1 * 0.2 + 0.2 * 0.5 + 0.7 * 0.9
"""0.75"""
WRONG = np.array([0.6, 0.1, 0.4])
"""A reward model that is wrong everywhere."""


def every_row(means=MEANS, families=("x", "x", "y")):
    """All (action, click) of one context as rows, and the chance of each."""
    rows = list(itertools.product(range(3), (0.0, 1.0)))
    action, reward = np.array([k for k, _ in rows]), np.array([r for _, r in rows])
    chance = LOGGER[action] * np.where(reward == 1.0, means[action], 1.0 - means[action])
    log = BanditLog.from_arrays(action, reward, pscore=np.tile(LOGGER, (len(rows), 1)), families=families)
    probs, q = np.tile(POLICY, (len(rows), 1)), np.tile(WRONG, (len(rows), 1))
    return log, probs, q, chance


def expected(terms, chance):
    """Expectation of one row's contribution to a plain average."""
    assert np.array_equal(terms.bottom, np.ones_like(terms.bottom))
    return float(chance @ (terms.base + terms.top[:, 0]))


def test_ips_and_dr_are_unbiased_and_the_direct_method_is_as_wrong_as_its_model():
    log, probs, q, chance = every_row()
    assert chance.sum() == pytest.approx(1.0)
    assert expected(single.ips(log, probs), chance) == pytest.approx(VALUE)
    assert expected(single.doubly_robust(log, probs, q), chance) == pytest.approx(VALUE)
    # 0.1 * 0.6 + 0.2 * 0.1 + 0.7 * 0.4
    assert expected(single.direct_method(log, probs, q), chance) == pytest.approx(0.36)


def test_clipping_switching_shrinking_and_smoothing_cost_the_bias_that_their_docstrings_state():
    log, probs, q, chance = every_row()
    weight = POLICY / LOGGER  # 0.2, 2/3, 3.5
    gap = MEANS - WRONG
    # IPS clipped at 2 loses (3.5 - 2) of action 2's weight: 0.2 * 1.5 * 0.9
    assert expected(single.ips(log, probs, clip=2.0), chance) == pytest.approx(VALUE - 0.27)
    assert expected(single.doubly_robust(log, probs, q, clip=2.0), chance) == pytest.approx(VALUE - 0.2 * 1.5 * 0.5)
    # switching at 2 leaves action 2 to the model: 0.7 * (0.9 - 0.4)
    assert expected(single.switch_dr(log, probs, q, tau=2.0), chance) == pytest.approx(VALUE - 0.35)
    shrunk = 5.0 * weight / (weight**2 + 5.0)
    found = expected(single.dr_optimistic_shrinkage(log, probs, q, shrinkage=5.0), chance)
    assert found == pytest.approx(VALUE - LOGGER @ ((weight - shrunk) * gap))
    smoothed = weight / (0.9 + 0.1 * weight)
    found = expected(single.sub_gaussian_dr(log, probs, q, smoothing=0.1), chance)
    assert found == pytest.approx(VALUE - LOGGER @ ((weight - smoothed) * gap))
    found = expected(single.sub_gaussian_ips(log, probs, smoothing=0.1), chance)
    assert found == pytest.approx(VALUE - LOGGER @ ((weight - smoothed) * MEANS))


def test_at_their_ends_the_settings_give_ips_dr_and_the_direct_method_back():
    log, probs, q, _ = every_row()
    dr, dm = single.doubly_robust(log, probs, q).value, single.direct_method(log, probs, q).value
    assert single.switch_dr(log, probs, q, tau=np.inf).value == dr
    assert single.dr_optimistic_shrinkage(log, probs, q, shrinkage=np.inf).value == dr
    assert single.sub_gaussian_dr(log, probs, q, smoothing=0.0).value == pytest.approx(dr)
    assert single.dr_optimistic_shrinkage(log, probs, q, shrinkage=0.0).value == dm
    assert single.switch_dr(log, probs, q, tau=0.0).value == dm
    with pytest.raises(ValueError, match="smoothing is 1.5"):
        single.sub_gaussian_dr(log, probs, q, smoothing=1.5)


def test_mips_is_unbiased_if_only_the_family_matters_and_else_values_the_loggers_choice_within_it():
    log, probs, _, chance = every_row(means=np.array([0.4, 0.4, 0.9]))
    assert expected(single.mips(log, probs), chance) == pytest.approx(0.3 * 0.4 + 0.7 * 0.9)
    log, probs, _, chance = every_row()
    # family x as the logger mixes it: (0.5 * 0.2 + 0.3 * 0.5) / 0.8 = 0.3125
    assert expected(single.mips(log, probs), chance) == pytest.approx(0.3 * 0.3125 + 0.7 * 0.9)


def test_mips_says_what_it_lacks():
    with pytest.raises(ValueError, match="families"):
        single.mips(BanditLog.from_arrays([0, 1], [0.0, 1.0], pscore=np.full((2, 2), 0.5)), np.full((2, 2), 0.5))
    log = BanditLog.from_arrays([0, 1], [0.0, 1.0], propensity=[0.5, 0.5], families=["x", "y"])
    with pytest.raises(ValueError, match="chances of all actions"):
        single.mips(log, np.full((2, 2), 0.5))


def test_self_normalised_estimates_worked_out_by_hand():
    # weights 0.5 / 0.5 = 1, 0.5 / 0.25 = 2, 0.5 / 0.5 = 1
    log = BanditLog.from_arrays([0, 1, 0], [1.0, 1.0, 0.0], propensity=[0.5, 0.25, 0.5], actions=["a", "b"])
    probs, q = np.full((3, 2), 0.5), np.tile([0.2, 0.6], (3, 1))
    # (1 * 1 + 2 * 1 + 1 * 0) / (1 + 2 + 1)
    assert single.snips(log, probs).value == pytest.approx(0.75)
    # model 0.4; residuals 0.8, 0.4, -0.2: (0.8 + 0.8 - 0.2) / 4
    assert single.self_normalised_dr(log, probs, q).value == pytest.approx(0.75)
    assert single.doubly_robust(log, probs, q).value == pytest.approx(0.4 + 1.4 / 3)


def test_a_policy_that_no_row_matches_is_refused():
    log = BanditLog.from_arrays([0, 0], [1.0, 0.0], propensity=[0.5, 0.5], actions=["a", "b"])
    with pytest.raises(ValueError, match="no row of the log matches"):
        value_policy(log, np.tile([0.0, 1.0], (2, 1)), np.zeros((2, 2)))


# ---- slates: 2 places, 2 items; the reward of the second place may depend on the first


def every_slate(second):
    """All slates and clicks of one context, their chances, and a policy's.

    Args:
        second: second[a1][a2], chance of a click in the second place.
    """
    first, after = np.array([0.6, 0.4]), np.array([[0.7, 0.3], [0.2, 0.8]])
    new_first, new_after = np.array([0.3, 0.7]), np.array([[0.4, 0.6], [0.9, 0.1]])
    click = np.array([0.3, 0.6])
    rows = list(itertools.product(range(2), range(2), (0.0, 1.0), (0.0, 1.0)))
    action = np.array([[a, b] for a, b, _, _ in rows])
    reward = np.array([[r, s] for _, _, r, s in rows])
    a, b = action.T
    p1, p2 = click[a], second[a, b]
    chance = first[a] * after[a, b] * np.where(reward[:, 0] == 1, p1, 1 - p1)
    chance = chance * np.where(reward[:, 1] == 1, p2, 1 - p2)

    def chances(start, then):
        return SlateChances(
            item=np.stack([start[a], (start @ then)[b]], axis=1),
            cascade=np.stack([start[a], start[a] * then[a, b]], axis=1),
        )

    log = SlateLog(action, reward, chances(first, after), np.arange(len(rows)), np.zeros((len(rows), 0)))
    next_item = np.stack([np.tile(new_first, (len(rows), 1)), new_after[a]], axis=1)
    value = new_first @ click + sum(new_first[i] * new_after[i, j] * second[i, j] for i in range(2) for j in range(2))
    return log, chances(new_first, new_after), next_item, chance, value


def test_in_a_cascade_all_but_independent_ips_are_unbiased():
    log, policy, next_item, chance, value = every_slate(np.array([[0.1, 0.9], [0.5, 0.2]]))
    q = np.broadcast_to(np.array([0.4, 0.9]), next_item.shape)
    assert chance.sum() == pytest.approx(1.0)
    assert expected(sips(log, policy), chance) == pytest.approx(value)
    assert expected(rips(log, policy), chance) == pytest.approx(value)
    assert expected(cascade_dr(log, policy, q, next_item), chance) == pytest.approx(value)
    assert abs(expected(iips(log, policy), chance) - value) > 0.05


def test_independent_ips_is_unbiased_where_a_place_depends_on_its_own_item_only():
    log, policy, _, chance, value = every_slate(np.array([[0.1, 0.9], [0.1, 0.9]]))
    assert expected(iips(log, policy), chance) == pytest.approx(value)


def test_cascade_rewards_are_those_of_the_policy():
    second = np.array([[0.1, 0.9], [0.5, 0.2]])
    log, _, next_item, chance, _ = every_slate(second)
    # each possible slate as often as its chance says, spread over users so that every fold sees all of them
    often = np.round(chance * 1000).astype(int)
    rows = np.repeat(np.arange(len(chance)), often)
    grown = SlateLog(
        log.action[rows],
        log.reward[rows],
        SlateChances(log.logger.item[rows], log.logger.cascade[rows]),
        np.arange(len(rows)),
        np.zeros((len(rows), 0)),
    )
    q = cascade_rewards(grown, next_item[rows])
    # from the first place down: 0.3 + 0.4 * 0.1 + 0.6 * 0.9 with item 0 on top, 0.6 + 0.9 * 0.5 + 0.1 * 0.2 with item 1
    assert q[:, 0].mean(axis=0) == pytest.approx([0.88, 1.07], abs=0.05)
    # below item 1, item 0
    assert q[log.action[rows][:, 0] == 1, 1, 0].mean() == pytest.approx(0.5, abs=0.05)


# ---- sequences: two requests; what the first brings decides the second's context, and users may leave


def every_episode():
    """All episodes of a two-request world with their chances, a policy's probabilities, and its value.

    Context 0 first. Action k clicks with 0.2 + 0.4 k there. After a click the context is 1 and clicks come with 0.9 - 0.5 k;
    without one the user leaves.
    """
    logger, policy = np.array([[0.7, 0.3], [0.4, 0.6]]), np.array([[0.2, 0.8], [0.9, 0.1]])
    click = np.array([[0.2, 0.6], [0.9, 0.4]])
    rows, chances = [], []
    for a in range(2):
        rows.append((a, 0.0, 0, 0.0, False))
        chances.append(logger[0, a] * (1 - click[0, a]))
        for b, r in itertools.product(range(2), (0.0, 1.0)):
            rows.append((a, 1.0, b, r, True))
            chances.append(logger[0, a] * click[0, a] * logger[1, b] * (click[1, b] if r else 1 - click[1, b]))
    first, reward, second, later, stays = (np.array(column) for column in zip(*rows, strict=True))
    episodes = len(rows)
    context = np.zeros((episodes, 2, 1))
    context[:, 1, 0] = stays
    log = EpisodeLog(
        context=context,
        action=np.stack([first, second], axis=1),
        reward=np.stack([reward, later], axis=1),
        propensity=np.stack([logger[0, first], logger[1, second]], axis=1),
        alive=np.stack([np.ones(episodes, dtype=bool), stays], axis=1),
        cluster=np.arange(episodes),
    )
    probs = np.stack([np.tile(policy[0], (episodes, 1)), np.tile(policy[1], (episodes, 1))], axis=1)
    then = policy[1] @ click[1]
    return (
        log,
        probs,
        np.array(chances),
        (policy[0] @ click[0]) * (1.0 + then),
        (policy[0] @ click[0]) * (1.0 + 0.5 * then),
    )


def test_per_decision_weights_and_sequential_dr_are_unbiased_also_when_users_leave():
    log, probs, chance, value, discounted = every_episode()
    q = np.broadcast_to(np.array([0.7, 0.1]), probs.shape)
    assert chance.sum() == pytest.approx(1.0)
    assert expected(pdis(log, probs), chance) == pytest.approx(value)
    assert expected(sequential_dr(log, probs, q), chance) == pytest.approx(value)
    assert expected(pdis(log, probs, discount=0.5), chance) == pytest.approx(discounted)
    assert expected(sequential_dr(log, probs, q, discount=0.5), chance) == pytest.approx(discounted)


def test_sequential_dr_without_a_model_is_pdis():
    log, probs, _, _, _ = every_episode()
    assert sequential_dr(log, probs, np.zeros(probs.shape)).value == pytest.approx(pdis(log, probs).value)


def test_self_normalised_sequences_keep_those_who_left():
    # one stays (weights 2, 3), one leaves after the first request (weight 1)
    log = EpisodeLog(
        context=np.zeros((2, 2, 1)),
        action=np.array([[0, 0], [1, 0]]),
        reward=np.array([[1.0, 1.0], [0.0, 0.0]]),
        propensity=np.array([[0.25, 0.25], [0.5, 1.0]]),
        alive=np.array([[True, True], [True, False]]),
        cluster=np.array([0, 1]),
    )
    probs = np.array([[[0.5, 0.5], [0.75, 0.25]], [[0.5, 0.5], [0.5, 0.5]]])
    # request 1: (2 * 1) / (2 + 1); request 2: (6 * 1) / (6 + 1)
    assert wpdis(log, probs).value == pytest.approx(2 / 3 + 6 / 7)


def test_fitted_q_finds_the_value_where_its_contexts_hold_the_state():
    log, probs, chance, value, _ = every_episode()
    often = np.round(chance * 4000).astype(int)
    rows = np.repeat(np.arange(len(chance)), often)
    parts = {name: getattr(log, name)[rows] for name in ("context", "action", "reward", "propensity", "alive")}
    grown = EpisodeLog(**parts, cluster=np.arange(len(rows)))
    q = fitted_q(grown, probs[rows])
    assert fitted_q_value(grown, probs[rows], q).value == pytest.approx(value, rel=0.02)


def test_episodes_that_come_back_from_their_end_are_refused():
    shape = (2, 3)
    with pytest.raises(ValueError, match="never comes back"):
        EpisodeLog(
            context=np.zeros((*shape, 1)),
            action=np.zeros(shape, dtype=int),
            reward=np.zeros(shape),
            propensity=np.ones(shape),
            alive=np.array([[True, False, True], [True, True, True]]),
            cluster=np.arange(2),
        )
