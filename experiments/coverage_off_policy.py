"""Off-policy intervals against a known truth: users of three types, each with a taste of its own, in logs of a production policy.

    python -m experiments.coverage --part off_policy

Heavy users are of another type than light ones, so the size of a user's cluster tells of rewards; a user's requests share
the user's own taste. The policy valued prefers other actions than the logger (weights up to 20). Three settings: one action a
request, slates, sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.run_folder import write_atomic
from metarec_gym.evaluation.intervals import Floats
from metarec_gym.evaluation.off_policy import sequences, slates
from metarec_gym.evaluation.off_policy import single_action as single
from metarec_gym.evaluation.off_policy.bandit_log import BanditLog
from metarec_gym.evaluation.off_policy.evaluation import all_terms
from metarec_gym.evaluation.off_policy.intervals import bootstrap_interval, empirical_bernstein, t_interval
from metarec_gym.evaluation.off_policy.terms import Terms
from metarec_gym.seeding import numpy_rng, stream

TYPES = np.array([0.5, 0.3, 0.2])
"""Shares of the users' types."""
REQUESTS = ((1, 3), (2, 6), (5, 11))
"""Fewest and most requests of each type's users."""
TASTE = 0.12
"""A user's rewards lie up to this above or below the type's, in all requests."""
FAMILIES = ("a", "a", "b", "b", "c")
MEANS = np.array(
    [
        [[0.30, 0.25, 0.50, 0.55, 0.20], [0.25, 0.30, 0.40, 0.60, 0.30]],
        [[0.55, 0.60, 0.30, 0.20, 0.40], [0.60, 0.50, 0.20, 0.30, 0.35]],
        [[0.20, 0.30, 0.35, 0.30, 0.70], [0.30, 0.20, 0.30, 0.40, 0.60]],
    ]
)
"""Chance of a click: type, time of day, action."""
PREFERS = np.array([[1.2, 0.3, -0.5, -0.9, 0.0], [-0.6, -1.0, 0.8, 0.9, 0.0], [0.6, 0.6, 0.0, 0.0, -1.2]])
"""The logger's preferences by type: mostly not for what is best."""
BY_DAY = np.array([0.0, 0.3, 0.2, -0.3, 0.0])
EPSILON = 0.2
"""The policy chooses its best action, and with this chance any."""
USERS = 300
SIZES = (50, 100, 200, 400, 800, 1600)
"""Users of the logs for the error curves."""


Drawn = tuple[dict[str, Terms], NDArray[np.int64]]
"""Estimates of one log, and its users."""


@dataclass(frozen=True)
class Setting:
    """What some of the table's rows are measured on."""

    title: str
    """Heading."""
    draw: Callable[[np.random.Generator, int], Drawn]
    """Generator and number of users -> estimates."""
    truth: float
    """What they estimate."""
    biased: tuple[str, ...] = ()
    """Estimators that promise no coverage: what they cut, tune or model biases them."""
    share: int = 1
    """One in so many repetitions is run (the costly ones)."""


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def logger_chances() -> Floats:
    """(types, times, K)."""
    return softmax(PREFERS[:, None, :] + BY_DAY * np.array([0.0, 1.0])[:, None])


def policy_chances() -> Floats:
    """(types, times, K): mostly the type's best action at the time."""
    best = np.eye(MEANS.shape[2])[MEANS.argmax(axis=2)]
    return np.asarray((1.0 - EPSILON) * best + EPSILON / MEANS.shape[2])


def true_value(probs: Floats, means: Floats) -> float:
    """Mean reward of a request; types count by their requests.

    Args:
        probs: (types, times, K).
        means: (types, times, K).
    """
    requests = TYPES * np.array([(low + high) / 2.0 for low, high in REQUESTS])
    by_type = (probs * means).sum(axis=2).mean(axis=1)
    return float(requests @ by_type / requests.sum())


def draw_users(rng: np.random.Generator, users: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Types and requests of users, int64 (users,), and their tastes (users,), symmetric about 0."""
    kind = rng.choice(len(TYPES), size=users, p=TYPES)
    low, high = np.array(REQUESTS)[kind].T
    return kind, rng.integers(low, high + 1), TASTE * rng.choice([-1.0, 1.0], size=users)


def draw_actions(rng: np.random.Generator, probs: Floats) -> NDArray[np.int64]:
    """One action a row of (n_rows, K)."""
    draw = rng.random(len(probs))[:, None]
    return np.asarray(np.minimum((probs.cumsum(axis=1) < draw).sum(axis=1), probs.shape[1] - 1), dtype=np.int64)


def draw_log(rng: np.random.Generator, users: int, means: Floats = MEANS) -> tuple[BanditLog, Floats]:
    """A log of single actions and the policy's probabilities on it."""
    kind, requests, taste = draw_users(rng, users)
    user = np.repeat(np.arange(users), requests)
    day = rng.integers(0, 2, size=len(user))
    pscore = logger_chances()[kind[user], day]
    action = draw_actions(rng, pscore)
    reward = (rng.random(len(user)) < means[kind[user], day, action] + taste[user]).astype(np.float64)
    context = np.column_stack([np.eye(len(TYPES))[kind[user]], day])
    log = BanditLog.from_arrays(action, reward, pscore=pscore, context=context, cluster=user, families=FAMILIES)
    return log, policy_chances()[kind[user], day]


def single_actions(rng: np.random.Generator, users: int) -> Drawn:
    """All single-action estimators on one log, and its users."""
    log, probs = draw_log(rng, users)
    q = log.reward_model(seed=int(rng.integers(2**31)))
    found = {name: terms for name, (terms, _) in all_terms(log, probs, q).items()}
    found["DR, clip=10"] = single.doubly_robust(log, probs, q, clip=10.0)
    return found, log.cluster


def family_means() -> Floats:
    """`MEANS` with every action as good as its family."""
    member = np.array([[own == other for other in FAMILIES] for own in FAMILIES], dtype=np.float64)
    return np.asarray(MEANS @ (member / member.sum(axis=1)))


def mips_only(rng: np.random.Generator, users: int) -> Drawn:
    """MIPS where its assumption holds: within a family all actions are as good."""
    log, probs = draw_log(rng, users, family_means())
    return {"MIPS": single.mips(log, probs), "IPS": single.ips(log, probs)}, log.cluster


def estimated(rng: np.random.Generator, users: int) -> Drawn:
    """IPS and DR where the log has no propensities."""
    full, probs = draw_log(rng, users)
    seed = int(rng.integers(2**31))
    log = BanditLog.from_arrays(
        full.action,
        full.reward,
        context=full.context,
        cluster=full.cluster,
        actions=full.actions,
        estimate_missing=True,
        seed=seed,
    )
    q = log.reward_model(seed=seed)
    return {
        "IPS": single.ips(log, probs),
        "SNIPS": single.snips(log, probs),
        "DR": single.doubly_robust(log, probs, q),
    }, log.cluster


# ---- slates: three places, four items drawn independently; a place's click depends on its item and its place

PLACES, ITEMS = 3, 4
EXAMINED = np.array([1.0, 0.8, 0.6])
ITEM_MEANS = np.array([[0.5, 0.3, 0.2, 0.4], [0.2, 0.6, 0.3, 0.3], [0.3, 0.3, 0.6, 0.2]])
LOGGER_ITEMS = softmax(np.array([[0.0, 0.5, 0.8, 0.2], [0.6, 0.0, 0.4, 0.2], [0.5, 0.3, 0.0, 0.4]]))
POLICY_ITEMS = softmax(np.array([[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 0.3, 0.2], [0.2, 0.0, 1.0, 0.0]]))


def slate_value() -> float:
    """True mean reward of a slate."""
    requests = TYPES * np.array([(low + high) / 2.0 for low, high in REQUESTS])
    by_type = (POLICY_ITEMS * ITEM_MEANS).sum(axis=1) * EXAMINED.sum()
    return float(requests @ by_type / requests.sum())


def slate_terms(rng: np.random.Generator, users: int) -> Drawn:
    """The four slate estimators on one log."""
    kind, requests, taste = draw_users(rng, users)
    user = np.repeat(np.arange(users), requests)
    rows = len(user)
    action = np.stack([draw_actions(rng, LOGGER_ITEMS[kind[user]]) for _ in range(PLACES)], axis=1)
    click = (ITEM_MEANS[kind[user][:, None], action] + taste[user][:, None]) * EXAMINED
    reward = (rng.random((rows, PLACES)) < click).astype(np.float64)

    def chances(by_type: Floats) -> slates.SlateChances:
        item = by_type[kind[user][:, None], action]
        return slates.SlateChances(item, np.asarray(np.cumprod(item, axis=1)))

    log = slates.SlateLog(action, reward, chances(LOGGER_ITEMS), user, np.eye(len(TYPES))[kind[user]])
    policy = chances(POLICY_ITEMS)
    next_item = np.repeat(POLICY_ITEMS[kind[user]][:, None, :], PLACES, axis=1)
    q = slates.cascade_rewards(log, next_item, seed=int(rng.integers(2**31)))
    return {
        "SIPS": slates.sips(log, policy),
        "IIPS": slates.iips(log, policy),
        "RIPS": slates.rips(log, policy),
        "cascade-DR": slates.cascade_dr(log, policy, q, next_item),
    }, log.cluster


# ---- sequences: four requests, a mood that follows the last action; two episodes a user; users leave in a bad mood

STEPS, MOODS, CHOICES = 4, 2, 3
CLICK = np.array([[0.2, 0.3, 0.5], [0.6, 0.4, 0.3]])
GOOD_NEXT = np.array([[0.3, 0.8, 0.4], [0.8, 0.6, 0.3]])
LEAVES = np.array([0.2, 0.05])
LOGGER_CHOICE = np.array([[0.4, 0.3, 0.3], [0.3, 0.4, 0.3]])
POLICY_CHOICE = np.array([[0.2, 0.6, 0.2], [0.7, 0.2, 0.1]])


def sequence_value() -> float:
    """True sum of rewards of an episode, by dynamic programming; moods start equally likely."""
    value = np.zeros(MOODS)
    for _ in range(STEPS):
        stays = (1.0 - LEAVES)[:, None] * (GOOD_NEXT * value[1] + (1.0 - GOOD_NEXT) * value[0])
        value = (POLICY_CHOICE * (CLICK + stays)).sum(axis=1)
    return float(value.mean())


def sequence_terms(rng: np.random.Generator, users: int) -> Drawn:
    """The four sequence estimators on one log of two episodes a user."""
    episodes = 2 * users
    user = np.repeat(np.arange(users), 2)
    taste = np.repeat(TASTE * rng.choice([-1.0, 1.0], size=users), 2)
    mood = rng.integers(0, MOODS, size=episodes)
    alive = np.ones(episodes, dtype=bool)
    kept = []
    for _ in range(STEPS):
        action = draw_actions(rng, LOGGER_CHOICE[mood])
        reward = np.where(alive, rng.random(episodes) < CLICK[mood, action] + taste, 0.0).astype(np.float64)
        kept.append((mood, action, reward, LOGGER_CHOICE[mood, action], alive))
        alive = alive & (rng.random(episodes) >= LEAVES[mood])
        mood = (rng.random(episodes) < GOOD_NEXT[mood, action]).astype(np.int64)
    moods, actions, rewards, chances, living = (np.stack(column, axis=1) for column in zip(*kept, strict=True))
    log = sequences.EpisodeLog(moods[:, :, None].astype(np.float64), actions, rewards, chances, living, user)
    probs = POLICY_CHOICE[moods]
    q = sequences.fitted_q(log, probs, seed=int(rng.integers(2**31)))
    return {
        "PDIS": sequences.pdis(log, probs),
        "WPDIS": sequences.wpdis(log, probs),
        "sequential DR": sequences.sequential_dr(log, probs, q),
        "FQE": sequences.fitted_q_value(log, probs, q),
    }, user


SETTINGS = {
    "single": Setting(
        "One action a request, known propensities",
        single_actions,
        true_value(policy_chances(), MEANS),
        ("IPS clipped", "DM", "Switch-DR", "DRos", "SG-DR", "MIPS", "DR, clip=10"),
    ),
    "mips": Setting("MIPS where only the family matters", mips_only, true_value(policy_chances(), family_means())),
    "estimated": Setting(
        "Propensities estimated from the context", estimated, true_value(policy_chances(), MEANS), share=4
    ),
    "slates": Setting("Slates of 3 places", slate_terms, slate_value()),
    "sequences": Setting("Sequences of 4 requests, 2 episodes a user", sequence_terms, sequence_value(), ("FQE",)),
}
BOOTSTRAP_SHARE = 4
"""One in so many repetitions is bootstrapped."""


def measure(
    name: str, repetitions: int, seed: int, users: int = USERS, samples: int = 0
) -> dict[str, dict[str, float]]:
    """Bias, error and coverage of a setting's estimators.

    Args:
        name: Key of `SETTINGS`.
        repetitions: Logs.
        seed: Seed.
        users: Users in a log.
        samples: Bootstrap samples, in one of `BOOTSTRAP_SHARE` repetitions; 0 = none.

    Returns:
        For each estimator: bias, root mean squared error, standard deviation, half width and coverage of the t interval,
        coverage of both bootstraps (NaN without).
    """
    setting = SETTINGS[name]
    errors: dict[str, list[tuple[float, float, bool]]] = {}
    resampled: dict[str, list[tuple[bool, bool]]] = {}
    for repetition in range(repetitions):
        rng = numpy_rng(seed, "coverage_off_policy", name, users, repetition)
        estimates, cluster = setting.draw(rng, users)
        for estimator, terms in estimates.items():
            interval = t_interval(terms, cluster)
            held = interval.low <= setting.truth <= interval.high
            errors.setdefault(estimator, []).append(
                (terms.value - setting.truth, interval.high - interval.estimate, held)
            )
            if samples and repetition % BOOTSTRAP_SHARE == 0:
                key = stream(seed, "bootstrap", repetition)
                both = (
                    bootstrap_interval(terms, cluster, seed=key, samples=samples, method="studentised"),
                    bootstrap_interval(terms, cluster, seed=key, samples=samples, method="percentile"),
                )
                first, second = (bounds.low <= setting.truth <= bounds.high for bounds in both)
                resampled.setdefault(estimator, []).append((first, second))
    table = {}
    for estimator, rows in errors.items():
        error, half, held = np.array(rows, dtype=np.float64).T
        boot = np.array(resampled.get(estimator, [(np.nan, np.nan)]), dtype=np.float64).mean(axis=0)
        table[estimator] = {
            "bias": float(error.mean()),
            "rmse": float(np.sqrt((error**2).mean())),
            "sd": float(error.std()),
            "half_width": float(half.mean()),
            "t": float(held.mean()),
            "studentised": float(boot[0]),
            "percentile": float(boot[1]),
            "repetitions": float(len(error)),
        }
    return table


def measure_bernstein(repetitions: int, seed: int, users: int) -> dict[str, float]:
    """Coverage and half width of the empirical Bernstein bounds."""
    truth = SETTINGS["single"].truth
    held, width = [], []
    for repetition in range(repetitions):
        rng = numpy_rng(seed, "coverage_bernstein", users, repetition)
        bounds = empirical_bernstein(*draw_log(rng, users), (0.0, 1.0))
        held.append(bounds.low <= truth <= bounds.high)
        width.append(bounds.high - bounds.low)
    return {"t": float(np.mean(held)), "half_width": float(np.mean(width)) / 2.0}


def plot_errors(curves: Mapping[str, list[float]], path: Path) -> Path:
    """Root mean squared error by the number of users, on logarithmic axes.

    Args:
        curves: One number a size of `SIZES`, by estimator.
        path: A PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, (name, errors) in enumerate(curves.items()):
        axis.loglog(
            SIZES, errors, marker="osv^D"[number % 5], markersize=4, label=name, linestyle="-" if number < 5 else "--"
        )
    start = curves["IPS"][0]
    axis.loglog(
        SIZES, [start * (SIZES[0] / size) ** 0.5 for size in SIZES], color="grey", linestyle=":", label="n^-1/2"
    )
    axis.set(xlabel="users in the log", ylabel="root mean squared error of the policy's value")
    axis.legend(fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=100)
    partial.replace(path)
    return path


def as_markdown(
    tables: Mapping[str, Mapping[str, Mapping[str, float]]],
    bernstein: Mapping[int, Mapping[str, float]],
    curves: Mapping[str, list[float]],
    facts: str,
) -> str:
    """The page."""
    lines = [
        "# Do off-policy intervals cover?",
        "",
        "`python -m experiments.coverage --part off_policy`: " + facts,
        "",
        f"Logs of {USERS} users with a known truth; 95 % intervals over users. Monte Carlo error of a coverage of 95 %: "
        "+-1.0 points at 2,000 logs, +-1.9 at 500 (two standard errors; bootstraps run on one log in four). *No promise*: an "
        "estimator that clips, tunes, models or assumes what is not so; its interval is about where it converges to, not about "
        "the truth, and what it covers here is luck of this setting. Estimated propensities are taken as known, which makes the "
        "intervals of IPS too wide (Hirano, Imbens and Ridder, Econometrica 2003).",
        "",
    ]
    for name, table in tables.items():
        setting = SETTINGS[name]
        lines += [f"## {setting.title} (truth {setting.truth:.4f})", ""]
        lines += ["| estimator | bias | sd | half width | t | studentised bootstrap | percentile bootstrap | logs | |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for estimator, row in table.items():
            lines.append(
                f"| {estimator} | {row['bias']:+.4f} | {row['sd']:.4f} | {row['half_width']:.4f} | {100 * row['t']:.1f} % "
                f"| {100 * row['studentised']:.1f} % | {100 * row['percentile']:.1f} % | {row['repetitions']:.0f} "
                f"| {'no promise' if estimator in setting.biased else ''} |"
            )
        lines.append("")
    lines += [
        "## Empirical Bernstein bounds (any tail, any overlap)",
        "",
        "| users | coverage | half width |",
        "|---|---|---|",
    ]
    lines += [f"| {users:,} | {100 * row['t']:.1f} % | {row['half_width']:.4f} |" for users, row in bernstein.items()]
    lines += ["", "## Error by the number of users", "", "![error](off_policy_error.png)", ""]
    lines += ["| estimator | " + " | ".join(f"{size:,}" for size in SIZES) + " |", "|---|" + "---|" * len(SIZES)]
    lines += [f"| {name} | " + " | ".join(f"{error:.4f}" for error in errors) + " |" for name, errors in curves.items()]
    return "\n".join(lines) + "\n"


def run(repetitions: int, seed: int, out: Path) -> dict[str, Any]:
    """Measures everything and writes `coverage_off_policy.md` and `off_policy_error.png`.

    Args:
        repetitions: Logs for the coverage of t intervals; costly parts get a share of them.
        seed: Seed.
        out: Folder.
    """
    start = time.process_time()
    tables = {}
    for name, setting in SETTINGS.items():
        tables[name] = measure(name, max(1, repetitions // setting.share), seed, samples=300)
        print(f"{setting.title}: {time.process_time() - start:.0f} s", flush=True)
    bernstein = {
        USERS: measure_bernstein(repetitions, seed, USERS),
        30_000: measure_bernstein(repetitions // 40, seed, 30_000),
    }
    curves: dict[str, list[float]] = {}
    for size in SIZES:
        for estimator, row in measure("single", max(1, repetitions // 20), seed, size).items():
            if estimator not in ("MIPS", "DR, clip=10"):
                curves.setdefault(estimator, []).append(row["rmse"])
    plot_errors(curves, out / "off_policy_error.png")
    facts = f"{repetitions:,} logs, seed {seed}, {time.process_time() - start:.0f} s of one core."
    page = as_markdown(tables, bernstein, curves, facts)
    write_atomic(out / "coverage_off_policy.md", page)
    print(page)
    return {"tables": tables, "bernstein": bernstein, "error": curves}
