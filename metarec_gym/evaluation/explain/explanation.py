"""Explains a trained selection policy on users that it has not seen, with what the explanation itself is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metarec_gym.envs.observation import feature_slices
from metarec_gym.evaluation.explain.attribution import attribute
from metarec_gym.evaluation.explain.counterfactual import CAVEAT, counterfactual, example_states
from metarec_gym.evaluation.explain.distil import WEIGHTS, Distilled, distil
from metarec_gym.evaluation.explain.features import BLOCK_WORDS, readable_features, taste_axes
from metarec_gym.evaluation.explain.segments import Segment, history_segments, segment_table, taste_clusters
from metarec_gym.evaluation.explain.visits import Stage, Visits, visit
from metarec_gym.evaluation.headroom import FOLDS, EvalSettings, horizons_of
from metarec_gym.evaluation.intervals import Floats, Interval, mean_interval, ratio_interval
from metarec_gym.evaluation.metrics import SEGMENTS, lift, segment_values
from metarec_gym.evaluation.rollout import Fixed, RolloutResult, Window, per_user, pick_contexts
from metarec_gym.policy import FirstChoice, MlpPolicy
from metarec_gym.seeding import numpy_rng, stream

if TYPE_CHECKING:
    from metarec_gym.evaluation.explain.tree import TreePolicy
    from metarec_gym.world import World

SCHEMA = 1
MUST_KEEP = 0.9
"""Share of the policy's lift that the rules must keep to stand for it."""
SBS_REPLICATES = 2
"""Replicates that choose the single best strategy on training users."""
ATTRIBUTED = 2048
"""States that attributions are computed for, at most."""


@dataclass(frozen=True)
class Explained:
    """What came out.

    Attributes:
        tree: The rules as a policy.
        result: Everything measured, as plain JSON types.
    """

    tree: TreePolicy
    result: dict[str, Any]


def explain(
    world: World,
    policy: MlpPolicy,
    fold: str,
    settings: EvalSettings,
    *,
    max_leaves: int = 16,
    rounds: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> Explained:
    """Explains a policy.

    Rules, taste clusters and the single best strategy come from the users the policy was trained on, with their judge; every
    number that is reported comes from the other fold's users and judge.

    Args:
        world: The world.
        policy: The policy; its strategies must be the world's.
        fold: Whose users it was trained on.
        settings: How policies are played.
        max_leaves: Rules at most.
        rounds: Rounds of the imitation.
        say: Told what is being done.

    Returns:
        The rules and every number.

    Raises:
        ValueError: When the policy is not one for this world.
    """
    if policy.strategies != world.strategies:
        raise ValueError(
            f"the policy chooses among {', '.join(policy.strategies)}; the world has {', '.join(world.strategies)}: explain it "
            "on the world that it was trained on"
        )
    test = FOLDS[1 - FOLDS.index(fold)]
    horizon, sound, notes = horizons_of(world, settings)
    train_stage, test_stage = (_stage(world, f, horizon, settings) for f in (fold, test))
    features = readable_features(
        world, horizon, settings.slate_size or world.slate_size, session_requests=settings.env.get("session_requests")
    )
    width = policy.layers[0][0].shape[1]
    if width != len(features):
        raise ValueError(f"the policy reads {width} numbers, this world's observation has {len(features)}")
    say("single best strategy on the training users")
    sbs = single_best(train_stage)
    say("rules")
    meta = {"world": world.hash, "fold": fold, "imitates": policy.meta, "horizon": horizon}
    made = distil(
        train_stage, policy, world.strategies, features, sbs=sbs, max_leaves=max_leaves, rounds=rounds, meta=meta
    )
    say("playing policy and rules on users that neither has seen")
    replicates = 2 * settings.replicates
    players = {"policy": policy, "first choice": FirstChoice(policy), "rules": made.tree, "single best": Fixed(sbs)}
    plays = {name: test_stage.play(player, replicates) for name, player in players.items()}
    seen, _ = visit(test_stage, policy)
    by_rules, _ = visit(test_stage, made.tree, policy)
    say("who gets what")
    window = Window.until(horizon)
    segments, groups = _segments(made, seen, sbs, world, settings.seed)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "world": world.hash,
        "name": world.name,
        "policy": policy.meta,
        "trained_on": fold,
        "scored_on": test,
        "horizon": horizon,
        "sound": sound,
        "notes": list(notes),
        "users": len(np.unique(plays["policy"].user)),
        "contexts": len(test_stage.contexts),
        "replicates": replicates,
        "strategies": list(world.strategies),
        "sbs": world.strategies[sbs],
        "env": settings.env,
        **_worth(plays, window),
        "rules": _rules(made, by_rules, seen, sbs, world),
        "segments": [s.to_json() | {"lift": _segment_lift(s, plays, window)} for s in segments],
        "counterfactuals": [
            counterfactual(policy, state, seen, features, world.strategies).to_json()
            for state in example_states(seen, groups)
        ],
        "counterfactual_caveat": CAVEAT,
        "taste_axes": list(taste_axes(world)),
    }
    say("attributions")
    try:
        result["attributions"] = _attributions(policy, seen, groups, made.visits, world, settings.seed)
    except ImportError as error:
        # an extra that is not installed must not cost the rest
        result["attributions"] = {"note": str(error)}
    return Explained(made.tree, result)


def read_explanation(policy: Path, world_hash: str) -> dict[str, Any] | None:
    """The explanation beside a policy's file; None when there is none, or when it is another world's."""
    file = explanation_file(policy)
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found if found.get("world") == world_hash and found.get("schema") == SCHEMA else None


def explanation_file(policy: Path) -> Path:
    """Where the explanation of a policy's file is kept."""
    return policy.with_name(f"{policy.stem}.explanation.json")


def _stage(world: World, fold: str, horizon: int, settings: EvalSettings) -> Stage:
    contexts = pick_contexts(
        world, fold, per_user=settings.contexts_per_user, seed=settings.seed, max_users=settings.max_users
    )
    return Stage(world, fold, contexts, horizon, stream(settings.seed, "evaluation"), settings)


def single_best(stage: Stage) -> int:
    """The strategy that is worth most to the stage's users when it always serves."""
    values = []
    for k in range(stage.world.n_strategies):
        played = stage.play(Fixed(k), SBS_REPLICATES)
        values.append(float(per_user(played.user, played.expected.mean(axis=(1, 2), dtype=np.float64)).mean()))
    return int(np.argmax(values))


def _users(played: RolloutResult, window: Window) -> Floats:
    """Value of every user, (users,)."""
    return per_user(played.user, played.value(window).mean(axis=1))


def _worth(plays: dict[str, RolloutResult], window: Window) -> dict[str, Any]:
    """Value and lift of each player, the share of the lift that the rules keep, and the answer in words."""
    values = {name: _users(played, window) for name, played in plays.items()}
    base = values["single best"]
    lifts = {name: lift(v, base) for name, v in values.items() if name != "single best"}
    table = {
        name: {"value": mean_interval(v).to_json(), "lift": lifts[name].to_json() if name in lifts else None}
        for name, v in values.items()
    }
    against, chance = (ratio_interval(values[n], values["policy"], minus=1.0) for n in ("rules", "first choice"))
    kept = None
    if lifts["policy"].low > 0.0:
        kept = ratio_interval(values["rules"] - base, values["policy"] - base)
    return {
        "played": table,
        "kept": None if kept is None else kept.to_json(),
        "rules_against_policy": against.to_json(),
        "first_choice_against_policy": chance.to_json(),
        "stands": kept is not None and kept.estimate >= MUST_KEEP,
        "verdict": _verdict(kept, against, lifts),
    }


def _verdict(kept: Interval | None, against: Interval, lifts: dict[str, Interval]) -> str:
    own, rules = lifts["policy"].as_percent(), lifts["rules"].as_percent()
    if kept is None:
        return (
            f"The policy's own lift over the single best strategy is not surely above 0 ({own}), so there is no lift that rules "
            f"could keep; they earn {against.as_percent()} compared with the policy ({rules} over the single best strategy)."
        )
    share = f"{kept.estimate:.0%} [{kept.low:.0%}, {kept.high:.0%}]"
    both = f"policy {own}, rules {rules} over the single best strategy"
    if kept.low >= MUST_KEEP:
        return f"The rules stand for the policy: they keep {share} of its lift ({both})."
    if kept.estimate >= MUST_KEEP:
        return f"The rules keep {share} of the policy's lift ({both}); that it is at least {MUST_KEEP:.0%} is likely, not sure."
    return (
        f"The rules tell only part of it: they keep {share} of the policy's lift ({both}). The rest is in the states where rules "
        "and policy differ."
    )


def _rules(made: Distilled, by_rules: Visits, seen: Visits, sbs: int, world: World) -> dict[str, Any]:
    """The rules with what each is worth, and how often they choose as the policy does."""
    tree = made.tree
    here, there = tree.leaf_of(by_rules.obs), tree.leaf_of(seen.obs)
    probs = tree.action_probs(seen.obs, seen.mask)
    agrees = (probs.argmax(dim=1) == seen.label).to(torch.float64).numpy()
    overlap = torch.minimum(probs, seen.probs).sum(dim=1).to(torch.float64).numpy()
    user = seen.user.numpy()
    leaves = tree.leaves
    place = torch.full((len(tree.nodes),), -1)
    place[torch.tensor(leaves)] = torch.arange(len(leaves))
    names = [" and ".join(tree.conditions(leaf)) or "always" for leaf in leaves]
    worth = {s.name: s for s in segment_table(by_rules, sbs, world.strategies, {"rule": (place[here], names)})}
    rows = []
    for leaf, name in zip(leaves, names, strict=True):
        segment, inside = worth.get(name), (there == leaf).numpy()
        rows.append(
            {
                "if": list(tree.conditions(leaf)),
                "serves": tree.serves(leaf),
                "requests": 0.0 if segment is None else segment.requests,
                "users": 0.0 if segment is None else segment.users,
                "gain": None if segment is None or segment.gain is None else segment.gain.to_json(),
                "overlap": float(overlap[inside].mean()) if inside.any() else None,
            }
        )
    shares = {leaf: f"   ({row['requests']:.0%} of requests)" for leaf, row in zip(leaves, rows, strict=True)}
    return {
        "leaves": len(leaves),
        "text": tree.rules(shares),
        "rows": rows,
        "agreement": mean_interval(per_user(user, agrees)).to_json(),
        "overlap": mean_interval(per_user(user, overlap)).to_json(),
        "weights": WEIGHTS,
        "candidates": [vars(c) for c in made.candidates],
    }


def _segments(made: Distilled, seen: Visits, sbs: int, world: World, seed: int) -> tuple[list[Segment], Tensor]:
    """The table of segments, and the history segment of each request."""
    taste = feature_slices(world)["taste"]
    clusters = taste_clusters(made.visits, taste, world, seed=seed)
    history = history_segments(seen)
    groups: dict[str, tuple[Tensor, Any]] = {"history at the start": history}
    if clusters.names:
        groups["taste at the moment"] = (clusters.of(seen, taste), clusters.names)
    return segment_table(seen, sbs, world.strategies, groups), history[0]


def _segment_lift(segment: Segment, plays: dict[str, RolloutResult], window: Window) -> dict[str, float] | None:
    """Closed-loop lift of a history segment's users; None for segments that an episode can leave, or with few users."""
    if segment.group != "history at the start":
        return None
    index = [segment.name.startswith(name) for name in SEGMENTS].index(True)
    policy, base = (
        segment_values(p.user, p.history_length, p.value(window).mean(axis=1))[index]
        for p in (plays["policy"], plays["single best"])
    )
    return lift(policy, base).to_json() if len(base) >= 2 and base.mean() > 0.0 else None


def _attributions(
    policy: MlpPolicy, seen: Visits, segment: Tensor, training: Visits, world: World, seed: int
) -> dict[str, Any]:
    """Shares of the blocks in what makes the policy choose, over all states and by history segment."""
    picked = numpy_rng(seed, "attributed states").permutation(len(seen.obs))[:ATTRIBUTED]
    rows = torch.from_numpy(np.sort(picked))
    some = seen.where(rows)
    found = attribute(policy, some.obs, some.label, training.obs.mean(dim=0))
    blocks = feature_slices(world)
    everything = torch.ones(len(rows), dtype=torch.bool)
    parts = {"everyone": everything, **{name: segment[rows] == i for i, name in enumerate(SEGMENTS)}}
    return {
        "states": len(rows),
        "completeness_error": found.error,
        "baseline": "the mean state of the training requests",
        "shares": {
            name: {BLOCK_WORDS[b]: share for b, share in found.shares(blocks, inside).items()}
            for name, inside in parts.items()
            if bool(inside.any())
        },
    }
