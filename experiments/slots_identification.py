"""Does a strategy for each place tell the best strategy of a user sooner than one strategy a request, at equal regret?

    python -m experiments.slots_identification

A world whose truth is known: every user takes the items of one strategy more often, nothing tells which at the start. The same
learner plays `MetaRec/Select-v0` and `MetaRec/Slots-v0`: a Beta belief of each strategy's rate for each user, one draw of it
for each choice (Thompson sampling; Thompson, Biometrika 1933), items counted for the strategy of their place. In Slots it
chooses for each place, in Select for the whole slate. How much it explores is one number, so each environment has a curve:
requests until the best guess is right for 90 % of the users, against the regret of the episode. Every setting of Select is
compared with the setting of Slots whose regret comes nearest to it from below.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.run_folder import ENV_CODE, RunFolder, code_hash, command_line, write_atomic

if TYPE_CHECKING:
    from metarec_gym.evaluation.intervals import Interval
    from metarec_gym.world import World

Floats = NDArray[np.float64]

ACTIONS = ("select", "slots")
LEVEL = 0.9
"""Share of users whose best strategy must be the learner's best guess."""
PRIOR_ROWS = 4.0
"""Items that the prior belief about a strategy counts as."""
_RESAMPLES = 500


@dataclass(frozen=True)
class Args:
    """Compares how soon Select and Slots find each user's best strategy."""

    types: int = 8
    """User types: each has a specialist strategy; one more strategy serves all types in turn."""
    users_per_type: int = 50
    """Users of each type."""
    seeds: int = 10
    """Seeds of luck and learner; every user is met under each."""
    horizon: int = 40
    """Requests an episode."""
    slate_size: int = 5
    """Items a request."""
    high: float = 0.5
    """Probability that a user takes an item of the own specialist."""
    low: float = 0.1
    """Probability for the other specialists."""
    exploration: tuple[float, ...] = (0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.4, 2.8, 4.0, 8.0)
    """An item counts as 1 / this many in the belief that is drawn from: 1 = Thompson sampling, more explores more."""
    seed: int = 0
    """Of everything."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    results: Path = Path("experiments/results")
    """Folder of the Markdown page and the plot."""


@dataclass(frozen=True)
class Course:
    """What one learner did. Arrays are (seeds, users, T)."""

    right: NDArray[np.bool_]
    """Whether the best guess after each request is the user's best strategy."""
    regret: Floats
    """Expected reward lost in each request against the user's best strategy."""


def make_world(args: Args) -> World:
    """Users of whom nothing is known at the start, and who stay."""
    from metarec_gym.world import World

    return World.synthetic(
        n_types=args.types,
        users_per_type=args.users_per_type,
        items_per_type=args.horizon * args.slate_size,
        horizon=args.horizon,
        slate_size=args.slate_size,
        high=args.high,
        low=args.low,
        history_lengths=(0,),
        leaving=None,
    )


def play(world: World, args: Args, action: str, exploration: float) -> Course:
    """One learner in one environment, all users under all seeds in one batch.

    Args:
        world: Of `make_world`.
        args: Seeds, rates, horizon.
        action: `select` or `slots`.
        exploration: See `Args`.

    Returns:
        What it did.
    """
    import torch

    from metarec_gym.envs import MetaRecVectorEnv
    from metarec_gym.seeding import numpy_rng, stream

    starts = world.starts_of("A").numpy()
    users, k, slate = len(starts), world.n_strategies, args.slate_size
    rows = users * args.seeds
    env = MetaRecVectorEnv(rows, world=world, action=action, output="torch", autoreset_mode="Disabled")
    # row = seed * users + user; equal luck in both environments
    noise = np.repeat(np.arange(args.seeds), users)
    env.reset(
        seed=stream(args.seed, "slots_identification"),
        options={"start_state": np.tile(starts, args.seeds), "noise": noise},
    )
    best = np.tile(world.tensors["start_user"].numpy()[starts] % args.types, args.seeds)
    rng = numpy_rng(args.seed, "slots_identification", action, str(exploration))
    ties = rng.random((rows, k)) * 1e-9
    rate = (args.high + (args.types - 1) * args.low) / args.types
    prior = PRIOR_ROWS * np.array([rate, 1.0 - rate])
    taken, passed = np.zeros((rows, k)), np.zeros((rows, k))
    places = slate if action == "slots" else 1
    right, regret = np.zeros((rows, args.horizon), dtype=bool), np.zeros((rows, args.horizon))
    for t in range(args.horizon):
        a, b = prior[0] + taken / exploration, prior[1] + passed / exploration
        chosen = rng.beta(a[:, None], b[:, None], size=(rows, places, k)).argmax(axis=2)
        _, _, _, _, info = env.step(torch.from_numpy(chosen if action == "slots" else chosen[:, 0]))
        owner = np.eye(k)[np.broadcast_to(chosen, (rows, slate))]
        hit = info["outcomes"][:, :, 0].numpy()[:, :, None]
        taken += (owner * hit).sum(axis=1)
        passed += (owner * ~hit).sum(axis=1)
        regret[:, t] = slate * args.high - env.expected_reward.numpy()
        mean = (prior[0] + taken) / (PRIOR_ROWS + taken + passed)
        right[:, t] = (mean + ties).argmax(axis=1) == best
    shape = (args.seeds, users, args.horizon)
    return Course(right.reshape(shape), regret.reshape(shape))


def requests_until(share: Floats, level: float = LEVEL) -> float:
    """Requests until a share by request (T,) first reaches `level`, between two requests on a straight line; inf = never."""
    reached = np.flatnonzero(share >= level)
    if len(reached) == 0:
        return math.inf
    t = int(reached[0])
    before = float(share[t - 1]) if t > 0 else 0.0
    return t + (level - before) / (float(share[t]) - before)


@dataclass(frozen=True)
class Point:
    """One learner in one environment."""

    exploration: float
    requests: float
    """Requests until the guess is right for 90 % of the users; inf = not within the horizon."""
    regret: float
    """Mean regret of a request over the horizon."""


def point_of(course: Course, exploration: float) -> Point:
    """The learner's place in the plane."""
    return Point(exploration, requests_until(course.right.mean(axis=(0, 1))), float(course.regret.mean()))


def matched(select: Sequence[Point], slots: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Every setting of Select with that of Slots whose regret is nearest to it and not above it; left out where there is none."""
    pairs = []
    for own in select:
        able = [p for p in slots if p.regret <= own.regret]
        if able:
            pairs.append((own, max(able, key=lambda p: (p.regret, -p.requests))))
    return pairs


def differences(select: Course, slots: Course, pair: tuple[Point, Point], seed: int) -> dict[str, Interval]:
    """Slots less Select in requests and regret, and the ratio of requests; 95 % intervals over seeds and users, both resampled.

    Where 90 % are not reached within the horizon the horizon stands for the requests.

    Args:
        select: The course in Select.
        slots: The course in Slots: the same users and seeds.
        pair: Their points.
        seed: Of the resamples.
    """
    from metarec_gym.evaluation.intervals import Interval
    from metarec_gym.seeding import numpy_rng

    seeds, users, horizon = select.regret.shape
    rng = numpy_rng(seed, "slots_identification", "resamples")
    drawn = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=_RESAMPLES) / seeds
    who = rng.multinomial(users, np.full(users, 1.0 / users), size=_RESAMPLES) / users
    # a row's weight in a resample is that of its seed times that of its user
    weight = (drawn[:, :, None] * who[:, None, :]).reshape(_RESAMPLES, seeds * users)
    points = []
    for course in (select, slots):
        shares = weight @ course.right.reshape(-1, horizon).astype(np.float64)
        regrets = weight @ course.regret.mean(axis=2).ravel()
        points.append([Point(0.0, requests_until(share), float(r)) for share, r in zip(shares, regrets, strict=True)])
    found = [_less(own, other, horizon) for own, other in zip(*points, strict=True)]
    values = _less(pair[0], pair[1], horizon)
    low, high = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    spread = np.std(np.array(found), axis=0, ddof=1)
    return {
        name: Interval(values[i], float(low[i]), float(high[i]), float(spread[i]), float(seeds - 1), 0.95, seeds, users)
        for i, name in enumerate(("requests", "ratio", "regret"))
    }


def _less(select: Point, slots: Point, horizon: int) -> tuple[float, float, float]:
    own, other = (min(p.requests, float(horizon)) for p in (select, slots))
    return other - own, other / own, slots.regret - select.regret


def run(args: Args) -> dict[str, Any]:
    """Plays, compares, writes the result, the page and the plot.

    Args:
        args: The command line.

    Returns:
        The result row.
    """
    world = make_world(args)
    code = code_hash([*ENV_CODE, "experiments/slots_identification.py", "metarec_gym/world_synthetic.py"])
    folder = RunFolder(args.runs, "slots_identification", {"args": args, "world": world.hash, "code": code})
    folder.begin(args)
    started = time.process_time()
    courses = {(action, e): play(world, args, action, e) for action in ACTIONS for e in args.exploration}
    points = {action: [point_of(courses[action, e], e) for e in args.exploration] for action in ACTIONS}
    pairs = []
    for own, other in matched(points["select"], points["slots"]):
        both = courses["select", own.exploration], courses["slots", other.exploration]
        pairs.append((own, other, differences(*both, (own, other), args.seed)))
    thompson = {a: courses[a, 1.0].right.mean(axis=(0, 1)) for a in ACTIONS if (a, 1.0) in courses}
    row = {
        "world": world.hash,
        "points": {action: [vars(p) for p in points[action]] for action in ACTIONS},
        "matched": [
            {"select": vars(own), "slots": vars(other), **{name: i.to_json() for name, i in less.items()}}
            for own, other, less in pairs
        ],
        "verdict": verdict_of([less for _, _, less in pairs]),
        "cpu_seconds": time.process_time() - started,
    }
    text = page(args, world, points, pairs, row)
    write_atomic(args.results / "slots_identification.md", text)
    plot(args.results / "slots_identification.png", points, thompson)
    print(text)
    result = folder.finish(row)
    print(f"result   {folder.path / 'result.json'}")
    return result


def verdict_of(pairs: Sequence[dict[str, Interval]]) -> str:
    """One sentence: at how many of the matched regrets Slots is surely sooner, and surely later."""
    sooner = sum(less["requests"].high < 0.0 for less in pairs)
    later = sum(less["requests"].low > 0.0 for less in pairs)
    if not pairs:
        return "Slots has no setting that pays as little regret as Select: nothing can be compared."
    if sooner == len(pairs):
        where = f"at all {len(pairs)} settings of Select"
        return f"Slots identifies a user's best strategy in fewer requests at no more regret, {where}."
    return (
        f"Slots is surely sooner at {sooner} and surely later at {later} of the {len(pairs)} settings compared: it does not hold "
        "everywhere."
    )


def page(
    args: Args,
    world: World,
    points: dict[str, list[Point]],
    pairs: Sequence[tuple[Point, Point, dict[str, Interval]]],
    row: dict[str, Any],
) -> str:
    """The Markdown page."""
    users = args.types * args.users_per_type
    lines = [
        "# Does Slots find a user's best strategy sooner than Select?",
        f"**{row['verdict']}**",
        f"Command: `{command_line()}` ({row['cpu_seconds']:.0f} CPU seconds). Synthetic world `{world.hash}`: {users} users of "
        f"{args.types} types without history, {world.n_strategies} strategies, slates of {args.slate_size}, {args.horizon} "
        f"requests, an item is taken with probability {args.high} if the user's own specialist serves it and {args.low} "
        f"otherwise; {args.seeds} seeds. No place of the slate is better than another, and nobody leaves: a world with "
        "such effects may answer otherwise.",
        "The same learner in both: Beta beliefs for each user, Thompson draws, one for the slate in Select and one for each "
        "place in Slots. `exploration` divides the evidence that draws see. Requests: until the best guess is right for "
        f"{100 * LEVEL:.0f} % of the users. Regret: expected items lost a request against the user's best strategy, mean over "
        "the episode.",
        "## At no more regret",
        "Each line is a setting of Select beside the setting of Slots whose regret is nearest to it and not above it. 95 % "
        f"intervals: seeds and users resampled together, both environments alike ({_RESAMPLES} times).",
        "| Select: exploration | requests | regret | Slots: exploration | requests | regret | requests, Slots less Select | "
        "Slots over Select | regret, Slots less Select |\n" + "|---" * 9 + "|",
    ]
    for own, other, less in pairs:
        lines[-1] += (
            f"\n| {own.exploration:g} | {_requests(own, args.horizon)} | {own.regret:.3f} "
            f"| {other.exploration:g} | {_requests(other, args.horizon)} | {other.regret:.3f} "
            f"| {less['requests'].as_number(1)} | {less['ratio'].as_number(2)} | {less['regret'].as_number(3)} |"
        )
    lines += [
        "## All settings",
        "| exploration | Select: requests | regret | Slots: requests | regret |\n" + "|---" * 5 + "|",
    ]
    for own, other in zip(points["select"], points["slots"], strict=True):
        cells = [f"{_requests(p, args.horizon)} | {p.regret:.3f}" for p in (own, other)]
        lines[-1] += f"\n| {own.exploration:g} | {cells[0]} | {cells[1]} |"
    lines.append("![requests against regret, and the share of users over requests](slots_identification.png)")
    return "\n\n".join(lines) + "\n"


def _requests(point: Point, horizon: int) -> str:
    return f"{point.requests:.1f}" if math.isfinite(point.requests) else f"more than {horizon}"


def plot(path: Path, points: dict[str, list[Point]], thompson: dict[str, Floats]) -> None:
    """Requests against regret of all settings, and the share of users identified by Thompson sampling, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    for action, colour in zip(ACTIONS, ("tab:gray", "tab:blue"), strict=True):
        there = [p for p in points[action] if math.isfinite(p.requests)]
        left.plot([p.regret for p in there], [p.requests for p in there], "o-", color=colour, label=action.capitalize())
        for p in there:
            left.annotate(
                f"{p.exploration:g}", (p.regret, p.requests), fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
        if action in thompson:
            share = thompson[action]
            right.plot(np.arange(1, len(share) + 1), share, color=colour, label=action.capitalize())
    left.set(
        xlabel="regret a request",
        ylabel=f"requests until {LEVEL:.0%} are identified",
        title="exploration beside each point",
    )
    right.axhline(LEVEL, color="black", linewidth=0.5)
    right.set(xlabel="requests", ylabel="users whose best strategy is known", title="Thompson sampling (exploration 1)")
    left.legend()
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    # under another name first: a killed run leaves no half a picture
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def main() -> None:
    """The command line."""
    import tyro

    from metarec_gym.evaluation.tasks import one_thread

    one_thread()
    run(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    main()
