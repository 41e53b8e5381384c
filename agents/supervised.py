"""Supervised selection: trees, neighbours, clusters and length ranges that predict from the observation which strategy pays.

| policy | learns from | chooses |
|---|---|---|
| `ForestPolicy` (gbm_regressor) | randomly served requests | at each request, the highest predicted reward |
| `Router` (gbm_selector, knn_router, cluster_router, history_length) | whole episodes of every strategy | once, at the start |
| `SupervisedBandit` | randomly served requests | prediction plus what the user's own answers add, with a bound |

The budget of requests covers all of it. Trees are fitted by scikit-learn and frozen into tensors, so they run on any device and
are saved without pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from agents.bandits import best_of
from agents.baselines import RotationPolicy, probs_of_choice
from agents.service import EnvRecipe, FixedPlays, Service, play_fixed, serve_episodes, user_parts, whole_requests
from metarec_gym.policy import Policy, StatelessPolicy, UniformPolicy
from metarec_gym.seeding import stream

SCHEMA = 1
FIRST_SHARE = 0.5
"""Share of the regressor's budget that is served at random; the rest by its first fit, with exploration."""
EXPLORE = 0.3
"""Share of uniform choices in the second half."""
PREDICT_ROWS = 512
"""Rows that walk down all trees at once: what they touch stays in the cache (a row takes some kilobytes a tree level)."""
PARTS = 4
"""Parts of the users in cross-fitting."""


# ---- frozen trees


class Forest:
    """Boosted regression trees as tensors, one output for each strategy.

    Args:
        tensors: `feature` int64, `threshold` float64, `left`, `right` int64 and `value` float64, all (trees, nodes); leaves
            point at themselves. `output` int64 (trees,), `base` float64 (K,), `depth` int64 (1,).
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @classmethod
    def of(cls, models: Sequence[Any]) -> Self:
        """Freezes fitted `HistGradientBoostingRegressor`s, one for each output (without missing or categorical values)."""
        trees = [(k, stage[0].nodes) for k, model in enumerate(models) for stage in model._predictors]
        width = max((len(nodes) for _, nodes in trees), default=1)
        shape = (len(trees), width)
        feature, left, right = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        threshold, value = np.full(shape, np.inf), np.zeros(shape)
        for row, (_, nodes) in enumerate(trees):
            count, own = len(nodes), np.arange(len(nodes))
            leaf = nodes["is_leaf"].astype(bool)
            feature[row, :count] = np.where(leaf, 0, nodes["feature_idx"])
            threshold[row, :count] = np.where(leaf, np.inf, nodes["num_threshold"])
            left[row, :count] = np.where(leaf, own, nodes["left"])
            right[row, :count] = np.where(leaf, own, nodes["right"])
            value[row, :count] = nodes["value"]
        depth = max((int(nodes["depth"].max()) for _, nodes in trees), default=0)
        base = [float(np.ravel(model._baseline_prediction)[0]) for model in models]
        arrays = {"feature": feature, "threshold": threshold, "left": left, "right": right, "value": value}
        return cls(
            {name: torch.from_numpy(array) for name, array in arrays.items()}
            | {
                "output": torch.tensor([k for k, _ in trees], dtype=torch.int64),
                "base": torch.tensor(base, dtype=torch.float64),
                "depth": torch.tensor([depth]),
            }
        )

    def predict(self, obs: Tensor) -> Tensor:
        """float32 (num_rows, obs_dim) -> float64 (num_rows, K)."""
        if len(obs) > PREDICT_ROWS:
            return torch.cat([self.predict(part) for part in obs.split(PREDICT_ROWS)])
        t = {name: tensor.to(obs.device) for name, tensor in self.tensors.items()}
        result = t["base"].repeat(len(obs), 1)
        trees, width = t["feature"].shape
        if not trees:
            return result
        root = torch.arange(trees, device=obs.device) * width
        place = root.expand(len(obs), -1)
        flat = {name: t[name].flatten() for name in ("feature", "threshold", "left", "right", "value")}
        wide = obs.to(torch.float64)
        for _ in range(int(self.tensors["depth"])):
            goes_left = wide.gather(1, flat["feature"][place]) <= flat["threshold"][place]
            place = root + torch.where(goes_left, flat["left"][place], flat["right"][place])
        return result.index_add_(1, t["output"], flat["value"][place])


def fit_forest(
    x: Tensor, target: Tensor, seen: Tensor, *, seed: int, trees: int = 60, leaves: int = 8, rate: float = 0.1
) -> Forest:
    """One boosted model for each output.

    Args:
        x: float32 (N, obs_dim).
        target: (N, K).
        seen: bool (N, K), False where the target is not known.
        seed: Of scikit-learn's early stopping.
        trees: Most trees an output.
        leaves: Most leaves a tree.
        rate: Learning rate.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    models, features = [], x.numpy().astype(np.float64)
    for k in range(target.shape[1]):
        known = seen[:, k].numpy()
        count = int(known.sum())
        if count < 2:
            raise ValueError(f"strategy {k} served {count} training requests; raise the budget of requests")
        model = HistGradientBoostingRegressor(
            max_iter=trees,
            max_leaf_nodes=leaves,
            learning_rate=rate,
            min_samples_leaf=min(50, max(2, count // 20)),
            l2_regularization=1.0,
            early_stopping=count >= 500,
            n_iter_no_change=8,
            random_state=stream(seed, "forest", k) % 2**31,
        )
        # no sample weights: scikit-learn's weighted binning takes twenty times the time of the fit
        models.append(model.fit(features[known], target[known, k].numpy()))
    return Forest.of(models)


def fit_rewards(service: Service, num_strategies: int, seed: int) -> Forest:
    """Reward of every strategy from what was seen before the request."""
    alive = service.alive
    served = torch.nn.functional.one_hot(service.action[alive], num_strategies).to(torch.bool)
    reward = service.reward[alive].to(torch.float64)[:, None].expand(-1, num_strategies)
    return fit_forest(service.obs[alive], reward, served, seed=seed)


# ---- policies


class ForestPolicy(StatelessPolicy):
    """At each request the strategy of highest predicted reward."""

    kind = "forest"

    def __init__(self, forest: Forest) -> None:
        self.forest = forest

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The best available prediction."""
        return best_of(self.forest.predict(obs), action_mask)

    def tensors(self) -> dict[str, Tensor]:
        """All it consists of."""
        return self.forest.tensors


class SupervisedBandit:
    """A normal belief about how far a user's rewards lie from the prediction, strategy by strategy.

    Reward of strategy k at request t = f_k(obs_t) + delta_k + noise, with delta ~ N(0, cov) over users. Strategies whose
    surprises go together in training users share what one answer tells.

    Args:
        forest: The predictions f.
        cov: float64 (K, K), of the users' deviations.
        noise_var: Variance of one request's reward around prediction plus deviation.
        exploration: Posterior standard deviations added to the posterior mean.
    """

    kind = "supervised_bandit"

    def __init__(self, forest: Forest, cov: Tensor, noise_var: float, exploration: float = 0.25) -> None:
        self.forest, self.cov, self.noise_var = forest, cov.to(torch.float64), float(noise_var)
        self.exploration = float(exploration)
        self.begin(0)

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Every row is a new user: nothing is known of the deviations."""
        k = len(self.cov)
        self._mean = torch.zeros(num_rows, k, dtype=torch.float64, device=device)
        self._cov = self.cov.to(device).repeat(num_rows, 1, 1)
        self._prediction: Tensor | None = None

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The highest prediction plus deviation plus bound."""
        self._prediction = self.forest.predict(obs)
        spread = self._cov.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
        return best_of(self._prediction + self._mean + self.exploration * spread, action_mask)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Kalman step for the rows that were served."""
        predicted = self.forest.predict(obs) if self._prediction is None else self._prediction
        column = self._cov.gather(2, action[:, None, None].expand(-1, len(self.cov), 1))[..., 0]
        variance = column.gather(1, action[:, None])[:, 0] + self.noise_var
        gain = torch.where(alive[:, None], column / variance[:, None], 0.0)
        surprise = reward.to(torch.float64) - (predicted + self._mean).gather(1, action[:, None])[:, 0]
        self._mean = self._mean + gain * surprise[:, None]
        self._cov = self._cov - gain[:, :, None] * column[:, None, :]
        self._prediction = None

    def tensors(self) -> dict[str, Tensor]:
        """All it consists of."""
        facts = torch.tensor([self.noise_var, self.exploration], dtype=torch.float64)
        return {**self.forest.tensors, "cov": self.cov, "facts": facts}


class Router:
    """Chooses once, from the observation before the first request, and keeps to it; where it is out of service, any other.

    Args:
        how: `forest` (scores of frozen trees), `neighbours` (mean value of the k nearest training starts), `clusters` (value of
            the nearest centre) or `ranges` (value of the range that one column lies in).
        tensors: What it needs for that; see the functions that fit them.
    """

    kind = "router"

    def __init__(self, how: str, tensors: dict[str, Tensor]) -> None:
        if how not in ("forest", "neighbours", "clusters", "ranges"):
            raise ValueError(f"how is {how!r}, expected forest, neighbours, clusters or ranges")
        self.how, self._tensors = how, tensors
        self._choice: Tensor | None = None

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Nothing is chosen yet."""
        self._choice = None

    def scores(self, obs: Tensor) -> Tensor:
        """Predicted value of every strategy; float32 (num_rows, obs_dim) -> float64 (num_rows, K)."""
        t = {name: tensor.to(obs.device) for name, tensor in self._tensors.items()}
        if self.how == "forest":
            return Forest(self._tensors).predict(obs)
        if self.how == "ranges":
            x = obs[:, int(self._tensors["column"])].to(torch.float64).contiguous()
            return t["value"][torch.bucketize(x, t["edges"], right=True)]
        x = (obs.to(torch.float64) - t["mean"]) / t["scale"]
        distance = torch.cdist(x, t["centres"])
        if self.how == "clusters":
            return t["value"][distance.argmin(dim=1)]
        nearest = distance.topk(int(self._tensors["k"]), dim=1, largest=False).indices
        return t["value"][nearest].mean(dim=1)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The strategy chosen at the start."""
        if self._choice is None or len(self._choice) != len(obs):
            self._choice = self.scores(obs).argmax(dim=1)
        return probs_of_choice(self._choice, action_mask)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Nothing to learn."""

    def tensors(self) -> dict[str, Tensor]:
        """All it consists of."""
        return self._tensors


def save(policy: Any, path: str | Path) -> Path:
    """Writes a policy of this module as one safetensors file, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"supervised_schema": str(SCHEMA), "kind": policy.kind, "how": getattr(policy, "how", "")}
    partial = path.with_name(path.name + ".partial")
    save_file({k: v.contiguous().cpu() for k, v in policy.tensors().items()}, str(partial), metadata=header)
    os.replace(partial, path)
    return path


def load(path: str | Path) -> ForestPolicy | Router | SupervisedBandit:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is none of this module's, or newer.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no policy at {path}; learn one, e.g. learn_gbm_regressor(lesson), and save it")
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if int(header.get("supervised_schema", SCHEMA + 1)) > SCHEMA:
        raise ValueError(f"{path} holds {json.dumps(header)}, expected a supervised policy of schema {SCHEMA} or older")
    if header["kind"] == "router":
        return Router(header["how"], tensors)
    cov, facts = tensors.pop("cov", None), tensors.pop("facts", None)
    if cov is None or facts is None:
        return ForestPolicy(Forest(tensors))
    return SupervisedBandit(Forest(tensors), cov, float(facts[0]), float(facts[1]))


# ---- learning: requests


def served_in_two_rounds(recipe: EnvRecipe, requests: int, seed: int) -> Service:
    """Random service, then service by what it taught, with exploration: lists that a good policy has used up look different."""
    k = recipe.make(1).world.n_strategies
    first = serve_episodes(
        recipe, UniformPolicy(), whole_requests(FIRST_SHARE, requests), seed=seed, purpose="random service"
    )
    policy = ForestPolicy(fit_rewards(first, k, seed))
    rest = requests - first.requests
    return first.and_also(serve_episodes(recipe, policy, rest, seed=seed, purpose="second round", explore=EXPLORE))


def learn_gbm_regressor(lesson: Any) -> ForestPolicy:
    """Boosted trees for each strategy's reward; lesson -> policy."""
    seed = stream(lesson.seed, "gbm regressor")
    recipe = EnvRecipe.of(lesson.make_env(1))
    service = served_in_two_rounds(recipe, lesson.requests, seed)
    return ForestPolicy(fit_rewards(service, lesson.world.n_strategies, seed))


def learn_supervised_bandit(lesson: Any) -> SupervisedBandit:
    """The same predictions, with a belief about the user's deviations from them; lesson -> policy.

    Deviations are estimated on users whose requests the trees did not see: in their own they would be too small.
    """
    from metarec_gym.evaluation.references import fit_reward_prior

    k, seed = lesson.world.n_strategies, stream(lesson.seed, "supervised bandit")
    recipe = EnvRecipe.of(lesson.make_env(1))
    service = served_in_two_rounds(recipe, lesson.requests, seed)
    part = torch.arange(len(service.action)) % 2
    residual = torch.zeros_like(service.reward, dtype=torch.float64)
    for p in (0, 1):
        forest = fit_rewards(service.episodes(part != p), k, seed)
        mine = service.episodes(part == p)
        predicted = forest.predict(mine.obs.flatten(0, 1)).gather(1, mine.action.flatten()[:, None])
        residual[part == p] = mine.reward.to(torch.float64) - predicted.reshape(mine.reward.shape)
    served = torch.nn.functional.one_hot(service.action, k).bool() & service.alive[..., None]
    rest = torch.where(served, residual[..., None], 0.0)
    prior = fit_reward_prior(rest.numpy(), served.numpy())
    spread = rest.square().sum(dim=(0, 1)) / served.sum(dim=(0, 1)).clamp(min=1)
    cov = torch.from_numpy(prior.cov)
    noise = max(float((spread - cov.diagonal()).mean()), 1e-6)
    return SupervisedBandit(fit_rewards(service, k, seed), cov, noise)


# ---- learning: whole episodes of every strategy


Fit = Callable[[FixedPlays, Tensor], Router]
"""Fits a router to the starts of an index (int64)."""


def routed_value(plays: FixedPlays, fit: Fit, part: Tensor) -> float:
    """Cross-validated value of a router: fitted to the other users, it chooses for the starts of each part."""
    total = 0.0
    for p in range(int(part.max()) + 1):
        mine, rest = torch.nonzero(part == p)[:, 0], torch.nonzero(part != p)[:, 0]
        if len(mine) and len(rest):
            choice = fit(plays, rest).scores(plays.start_obs[mine]).argmax(dim=1)
            total += float(plays.value[mine].gather(1, choice[:, None]).sum())
    return total / len(part)


def best_fit(plays: FixedPlays, fits: Sequence[Fit], seed: int) -> Router:
    """The router of highest cross-validated value (the first of equal ones), fitted to all starts."""
    part = user_parts(plays.user, PARTS, seed)
    values = [routed_value(plays, fit, part) for fit in fits]
    return fits[int(np.argmax(values))](plays, torch.arange(len(plays.value)))


def _standard(x: Tensor) -> dict[str, Tensor]:
    wide = x.to(torch.float64)
    scale = wide.std(dim=0)
    # what never varies, at an episode's start most of the observation, must not be blown up
    return {"mean": wide.mean(dim=0), "scale": torch.where(scale > 1e-6, scale, 1e6)}


def neighbours_fit(k: int) -> Fit:
    """Mean value of the k nearest starts."""

    def fit(plays: FixedPlays, rows: Tensor) -> Router:
        standard = _standard(plays.start_obs[rows])
        centres = (plays.start_obs[rows].to(torch.float64) - standard["mean"]) / standard["scale"]
        number = torch.tensor([min(k, len(rows))])
        return Router("neighbours", {**standard, "centres": centres, "value": plays.value[rows], "k": number})

    return fit


def clusters_fit(count: int, seed: int) -> Fit:
    """k-means over the starts; a cluster has the mean value of its starts."""

    def fit(plays: FixedPlays, rows: Tensor) -> Router:
        from sklearn.cluster import KMeans

        standard = _standard(plays.start_obs[rows])
        x = (plays.start_obs[rows].to(torch.float64) - standard["mean"]) / standard["scale"]
        distinct = len(torch.unique(x, dim=0))
        means = KMeans(min(count, distinct), n_init=4, random_state=seed % 2**31).fit(x.numpy())
        label = torch.nn.functional.one_hot(torch.from_numpy(means.labels_).to(torch.int64), means.n_clusters)
        share = label.to(torch.float64)
        value = (share.T @ plays.value[rows]) / share.sum(dim=0).clamp(min=1.0)[:, None]
        return Router("clusters", {**standard, "centres": torch.from_numpy(means.cluster_centers_), "value": value})

    return fit


def ranges_fit(column: int, count: int) -> Fit:
    """Ranges of one column between quantiles of the starts."""

    def fit(plays: FixedPlays, rows: Tensor) -> Router:
        x = plays.start_obs[rows, column].to(torch.float64).contiguous()
        edges = torch.unique(torch.quantile(x, torch.arange(1, count, dtype=torch.float64) / count))
        edges = edges[edges > x.min()]
        place = torch.nn.functional.one_hot(torch.bucketize(x, edges, right=True), len(edges) + 1).to(torch.float64)
        value = (place.T @ plays.value[rows]) / place.sum(dim=0).clamp(min=1.0)[:, None]
        return Router("ranges", {"column": torch.tensor([column]), "edges": edges, "value": value})

    return fit


def selector_labels(plays: FixedPlays, seed: int) -> Tensor:
    """Best strategy of each start: one noisy episode each, shrunk to what other users' starts predict; int64 (N,).

    value = prediction + s (measured - prediction), s = share of the residual variance that is no noise of one episode.
    """
    part = user_parts(plays.user, PARTS, seed)
    predicted = plays.value.mean(dim=0).repeat(len(plays.value), 1)
    for p in range(PARTS):
        mine, rest = part == p, part != p
        if bool(mine.any()) and int(rest.sum()) >= 8:
            ones = torch.ones_like(plays.value[rest], dtype=torch.bool)
            forest = fit_forest(plays.start_obs[rest], plays.value[rest], ones, seed=seed, trees=40, leaves=4)
            predicted[mine] = forest.predict(plays.start_obs[mine])
    rest_var = (plays.value - predicted).square().mean(dim=0)
    share = (1.0 - plays.noise_var / rest_var.clamp(min=1e-12)).clamp(0.0, 1.0)
    return (predicted + share * (plays.value - predicted)).argmax(dim=1)


def learn_gbm_selector(lesson: Any) -> Router:
    """Boosted classifier of the start's best strategy (one tree score for each strategy); lesson -> policy."""
    seed = stream(lesson.seed, "gbm selector")
    plays = _plays(lesson, seed)
    label = torch.nn.functional.one_hot(selector_labels(plays, seed), plays.value.shape[1]).to(torch.float64)
    # a start whose strategies differ by much counts for more than one where the choice is all the same; the weight is in the
    # target: the strategy of highest E[weight * label] is that of the weighted classifier
    weight = (plays.value.amax(dim=1) - plays.value.mean(dim=1)).clamp(min=1e-6)
    target = label * (weight / weight.mean())[:, None]
    seen = torch.ones_like(target, dtype=torch.bool)
    return Router("forest", fit_forest(plays.start_obs, target, seen, seed=seed, trees=60, leaves=4).tensors)


def _plays(lesson: Any, seed: int) -> FixedPlays:
    return play_fixed(EnvRecipe.of(lesson.make_env(1)), lesson.requests, seed=seed)


def learn_knn_router(lesson: Any) -> Router:
    """Nearest training starts, their number by cross-validation; lesson -> policy."""
    seed = stream(lesson.seed, "knn router")
    return best_fit(_plays(lesson, seed), [neighbours_fit(k) for k in (200, 100, 50, 25, 10)], seed)


def learn_cluster_router(lesson: Any) -> Router:
    """k-means clusters of training starts, their number by cross-validation; lesson -> policy."""
    seed = stream(lesson.seed, "cluster router")
    return best_fit(_plays(lesson, seed), [clusters_fit(c, seed) for c in (1, 2, 4, 8, 16)], seed)


def learn_history_length(lesson: Any) -> Router:
    """A strategy for each range of history lengths at the start, the ranges by cross-validation; lesson -> policy."""
    seed = stream(lesson.seed, "history length")
    column = lesson.make_env(1).feature_slices["history_length"].start
    return best_fit(_plays(lesson, seed), [ranges_fit(column, c) for c in (1, 2, 3, 4, 6)], seed)


def learn_round_robin(lesson: Any) -> Policy:
    """Every strategy in turn; needs no request."""
    return RotationPolicy(range(lesson.world.n_strategies))
