"""How a judge is fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ResponseConfig:
    """How a judge is fitted; every default was chosen on inner validation users of MovieLens-100K's folds."""

    family: Literal["network", "mixed_logit"] = "network"
    """`network`: a tower on the recurrent state and learnt item vectors; `mixed_logit`: items' biases and features alone."""
    item_vectors: Literal["ppmi", "user_item"] = "ppmi"
    """Item vectors of the recurrence, by truncated SVD: of the PPMI of items close together in a history, beside taste vectors,
    or of the normalised user x item matrix alone, which knows no order."""
    dim: int = 32
    """Length of these item vectors."""
    taste_dim: int = 32
    """Length of the taste vectors beside the PPMI ones: what the same users take, near or far apart. A window sees what comes in
    a row; on MovieLens-100K the cosine over whole users is what it misses (held-out log-loss .1320 -> .1304)."""
    window: int = 10
    """Items of one history at most this far apart count as occurring together."""
    decays: tuple[float, ...] = (0.7, 0.9, 0.98)
    """Decays of the recurrence, fastest first."""
    hidden: int = 64
    """Hidden units of the gate's network; each later outcome has half as many of its own."""
    rank: int = 12
    """Length of the learnt user and item vectors."""
    sampler: Literal["uniform", "sqrt_popularity", "popularity"] = "sqrt_popularity"
    """How negatives are drawn where the log has none; log q is put back, so it changes noise and not meaning."""
    negatives: int = 256
    """Negatives shared by a mini-batch of a positives-only log."""
    batch_size: int | None = None
    """Prefixes a mini-batch; None = 512 up to 100,000 rows, 2,048 above: on MovieLens-1M's folds as good in little more than half
    the time, and better for outcomes that are learnt in one pass."""
    learning_rate: float = 8e-3
    """Adam's step size."""
    l2_vector: float = 10.0
    """Precision of the items' own output vectors around what their categories say."""
    l2_bias: float = 5.0
    """Precision of the items' own bias around popularity and categories."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the networks' matrices."""
    averaging: float = 0.98
    """Decay of the running average of the parameters that is kept."""
    max_epochs: int = 40
    """Most passes over the fold."""
    patience: int = 2
    """Passes without gain on inner validation users before learning stops."""
    inner_folds: int | None = None
    """Inner user folds: all that describes users is fitted on predictions for users the network has not seen. None = 8 up to
    1,000 users, 4 above: networks of 3/4 of 311 users were so much flatter than the whole fold's that its probabilities came out
    9 % too low; with many users the last quarter changes little."""
    category_features: int = 8
    """Categories in phi, for which users have random coefficients: those that split the fold's events most evenly."""
    effect_negatives: int = 48
    """Negatives per event in the fit of the random effects and in the calibration."""
    effect_rounds: int = 12
    """Most rounds of (modes, covariance) in the fit of the random effects."""
    popularity_prior: float = 2.0
    """Events added to every item's count before the logarithm."""
    trend_prior: float = 2.0
    """Events an average item's share in a period is smoothed with; infinity = no dated feature."""
    rare_positives_per_item: float = 1.0
    """A later outcome with fewer positives than this per item of the catalogue is rare: its network is stacked on the outcome's
    popularity (`stacking`) before anything else is estimated, and it keeps its own scale. 0 = no outcome is."""
    base_rate: float | None = None
    """Probability that a user takes an unseen item drawn uniformly; None = the log's density. Unused with impressions."""


def batch_size_of(config: ResponseConfig, n_rows: int) -> int:
    """Prefixes a mini-batch of a fit on `n_rows` rows."""
    if config.batch_size is not None:
        return config.batch_size
    return 512 if n_rows <= 100_000 else 2048


def inner_folds_of(config: ResponseConfig, n_users: int) -> int:
    """Inner user folds of a fit on `n_users` users."""
    if config.inner_folds is not None:
        return config.inner_folds
    return 8 if n_users <= 1000 else 4


SECOND_FAMILY = ResponseConfig(
    family="mixed_logit",
    item_vectors="user_item",
    dim=48,
    decays=(0.5, 0.95),
    category_features=16,
    learning_rate=2e-2,
)
"""A judge that shares neither f nor the item space with the default one: the final table is scored by it again."""
