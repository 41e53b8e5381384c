"""`MetaRec/Tune-v0`: the action steers the training of a small recommender, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from metarec_gym.envs.batched import BatchedEnv, BatchOfOne, Mode, Moved, State, row_exact, tree_sum
from metarec_gym.envs.tune_training import (
    CANDIDATES,
    METRICS,
    Settings,
    TrainingData,
    held_out_metric,
    initialise,
    resolve_training_data,
    run_key,
    train,
)
from metarec_gym.seeding import fold_in

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset
    from metarec_gym.data.interactions import InteractionLog
    from metarec_gym.world import World

ACTION_NAMES = ("step_users", "step_items", "step_weights", "l2", "hardness")
SPLITS = ("train", "test")
_HISTORY = 3
_MODEL = ("users", "items", "bias", "mean")
FEATURES = (
    ("loss", 1),
    ("loss_history", _HISTORY),
    ("gradient_norms", 3),
    ("parameter_sizes", 3),
    ("metric", 1),
    ("metric_history", _HISTORY),
    ("best_metric", 1),
    ("progress", 1),
    ("last_action", len(ACTION_NAMES)),
    ("cost_weight", 1),
)
"""Blocks of the observation and their widths."""


@dataclass(frozen=True)
class TuneConfig:
    """What is trained and how an action is read; each field has its sentence."""

    horizon: int = 20
    """Training steps until truncation; the meta-policy acts once in each."""
    updates_per_step: int = 4
    """Gradient steps in a training step."""
    batch_size: int = 128
    """Pairs, each with one negative, in a gradient step."""
    n_users: int = 64
    """Users of the log's subsample, at most."""
    n_items: int = 128
    """Items of the log's subsample, at most."""
    data_seed: int = 0
    """Which users and held-out items the subsample takes; the same for every row and episode."""
    metric: str = "ranking"
    """Held-out metric: `ranking` (AUC over held-out against never taken items, 0..1) or `log_loss` (its negative, -4..0)."""
    cost_weight: float = 0.0
    """Reward lost by a whole run at the dearest hardness."""
    split: str = "train"
    """Family of initialisations and mini-batches: `train`, or `test`, which shares no draw with it."""
    step_size: tuple[float, float] = (0.001, 1.0)
    """Smallest and largest step size that an action can ask for, users, items and weights alike."""
    l2: tuple[float, float] = (1e-5, 1.0)
    """Smallest and largest L2 strength."""

    def __post_init__(self) -> None:
        # JSON knows lists only
        object.__setattr__(self, "step_size", tuple(float(x) for x in self.step_size))
        object.__setattr__(self, "l2", tuple(float(x) for x in self.l2))
        for name in ("horizon", "updates_per_step", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.metric not in METRICS:
            raise ValueError(f"metric is {self.metric!r}, expected one of {METRICS}")
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}, expected one of {SPLITS}")
        if not 0.0 <= self.cost_weight < math.inf:
            raise ValueError(f"cost_weight is {self.cost_weight}, expected a number >= 0")
        for name, pair in (("step_size", self.step_size), ("l2", self.l2)):
            if len(pair) != 2 or not 0.0 < pair[0] < pair[1] < math.inf:
                raise ValueError(f"{name} is {pair}, expected (low, high) with 0 < low < high")

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """(low, high) of each entry of the action, in the order of `ACTION_NAMES`."""
        return (self.step_size,) * 3 + (self.l2, (1.0, float(CANDIDATES)))

    def action_of(self, **values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The action that asks for these settings, e.g. `action_of(step_users=0.05, ...)`; float32 (5,).

        Raises:
            ValueError: When a name is missing or a value outside its range.
        """
        if sorted(values) != sorted(ACTION_NAMES):
            raise ValueError(f"got settings {sorted(values)}, expected {list(ACTION_NAMES)}")
        action = []
        for name, (low, high) in zip(ACTION_NAMES, self.ranges, strict=True):
            if not low <= values[name] <= high:
                raise ValueError(f"{name} is {values[name]}, expected a number in [{low:g}, {high:g}]")
            action.append(2.0 * math.log(values[name] / low) / math.log(high / low) - 1.0)
        return np.clip(np.array(action, dtype=np.float32), -1.0, 1.0)

    def settings_of(self, action: Tensor) -> Settings:
        """What actions ask for; float32 (runs, 5), clipped to [-1, 1]."""
        low, high = (torch.tensor([math.log(pair[k]) for pair in self.ranges], device=action.device) for k in (0, 1))
        # x = low * (high / low) ** ((a + 1) / 2)
        share = (action.clamp(-1.0, 1.0) + 1.0) * 0.5
        return Settings(*row_exact(torch.exp, low + (high - low) * share).unbind(dim=1))


class TuneVectorEnv(BatchedEnv):
    """Training runs of small factorisation recommenders; the action sets step sizes, L2 and negatives for the next step.

    ## Description
    Every row is one training run on a subsample of a log. The recommender has a representation of every user and item and
    global weights (a mean and item biases); each training step is a few stochastic gradient steps on its log-loss over taken
    items and one negative each. Runs differ in their initialisation (whose scale is drawn too) and in their mini-batches.

    ## Actions
    `Box(-1, 1, (5,))`, each mapped log-uniformly to its range:

    | entry | name | -1 | +1 | meaning |
    |---|---|---|---|---|
    | 0 | step_users | 0.001 | 1 | step size of the user representations |
    | 1 | step_items | 0.001 | 1 | step size of the item representations |
    | 2 | step_weights | 0.001 | 1 | step size of mean and item biases |
    | 3 | l2 | 1e-5 | 1 | pull of representations and biases to 0 |
    | 4 | hardness | 1 | 8 | a negative is the best-scoring of so many random candidates (rounded) |

    Actions outside the box are clipped.

    ## Observations
    `Box(-1, 1, (22,), float32)`; `feature_slices` names the blocks.

    | block | width | bounds | meaning |
    |---|---|---|---|
    | loss | 1 | -1..1 | training log-loss of the last step over ln 2, less 1, clipped; 0 before the first |
    | loss_history | 3 | -1..1 | the same, one to three steps earlier |
    | gradient_norms | 3 | -1..1 | log10 of the gradient's norm over 2, clipped: users, items, weights; 0 before the first step |
    | parameter_sizes | 3 | -1..1 | log10 of the root mean square, clipped to 0.01..100, over 2: users, items, biases |
    | metric | 1 | -1..1 | ranking: 2 AUC - 1; log_loss: 1 - log-loss / ln 2, clipped |
    | metric_history | 3 | -1..1 | its last three gains, times 10, clipped |
    | best_metric | 1 | -1..1 | the best metric of the run so far, as `metric` |
    | progress | 1 | 0..1 | steps done over the horizon |
    | last_action | 5 | -1..1 | zeros before the first step |
    | cost_weight | 1 | 0..1 | w / (1 + w) |

    ## Reward
    `metric after the step - metric before it - cost_weight * cost / horizon`, where cost is the step's compute over that of a
    step at hardness 8: (6 + candidates) / 14. So the rewards of an episode sum to its last metric less its first and less the
    costs. The parts are in `info` as `reward_metric` and `reward_cost`.

    ## Episode end
    `terminated`: a number of the model is no longer finite; its metric is then the worst there is (0 for ranking, -4 for
    log_loss), so that the last reward takes back all that was gained. Short of that nothing ends a diverging run: logits are
    clipped at 30, log-losses at 4 and observations to their bounds. `truncated`: `horizon` training steps were done.

    ## Arguments
    See `__init__` and `TuneConfig`. `reset(options=...)` takes `reset_mask`.

    ## Registered ids
    `MetaRec/Tune-v0` (`gymnasium.make` gives a single run, `make_vec` this).

    ## Version history
    v0: first release.
    """

    def __init__(
        self,
        num_envs: int = 1,
        log: str | Path | InteractionLog | Dataset | World | TrainingData | None = None,
        device: str = "cpu",
        output: Literal["numpy", "torch"] = "numpy",
        autoreset_mode: Mode | AutoresetMode = "NextStep",
        max_episode_steps: int | None = None,
        record_statistics: bool = False,
        render_mode: None = None,
        **settings: Any,
    ) -> None:
        """Makes `num_envs` training runs.

        Args:
            num_envs: Rows.
            log: Folder of a prepared log or a world, or a log's name (both keep specs JSON-able), what one loads from it, or
                None for the synthetic default.
            device: "cpu", "cuda", "cuda:1" ...
            output: Arrays or tensors out; both are accepted in.
            autoreset_mode: One of Gymnasium's three.
            max_episode_steps: Overrides `horizon` (`gymnasium.make_vec` hands it over by this name).
            record_statistics: Adds `info["episode"]` at episode ends; leave it off under Gymnasium's RecordEpisodeStatistics.
            render_mode: There is nothing to render.
            **settings: Fields of `TuneConfig`.

        Raises:
            TypeError: When there is no setting of a name.
            ValueError: When a setting or the log does not fit.
            FileNotFoundError: When `log` names a folder without a log.
        """
        if max_episode_steps is not None:
            settings["horizon"] = max_episode_steps
        unknown = sorted(set(settings) - set(TuneConfig.__dataclass_fields__))
        if unknown:
            # Python's own wording: TorchRL's GymEnv offers `frameskip` to everyone and reads the answer
            raise TypeError(
                f"unexpected keyword argument {unknown[0]!r}: "
                f"Tune has no settings {unknown}; it has {sorted(TuneConfig.__dataclass_fields__)}"
            )
        self.config = config = TuneConfig(**settings)
        self.data = resolve_training_data(
            log, n_users=config.n_users, n_items=config.n_items, seed=config.data_seed
        ).to(device)
        self.horizon = config.horizon
        self.feature_slices: dict[str, slice] = {}
        start = 0
        for name, width in FEATURES:
            self.feature_slices[name] = slice(start, start + width)
            start += width
        low = np.full(start, -1.0, dtype=np.float32)
        for name in ("progress", "cost_weight"):
            low[self.feature_slices[name]] = 0.0
        super().__init__(
            num_envs,
            gymnasium.spaces.Box(low, np.ones(start, dtype=np.float32), dtype=np.float32),
            gymnasium.spaces.Box(-1.0, 1.0, (len(ACTION_NAMES),), dtype=np.float32),
            device=device,
            output=output,
            autoreset_mode=autoreset_mode,
            record_statistics=record_statistics,
            render_mode=render_mode,
        )

    def _key(self) -> Tensor:
        return run_key(self._episode_key(), self.config.split)

    def _fresh(self, options: dict[str, Any]) -> State:
        if options:
            raise ValueError(f"options has {sorted(options)}, expected nothing but reset_mask")
        key = self._key()
        model = initialise(self.data, key)
        metric, _ = held_out_metric(self.data, model, self.config.metric)
        zeros = torch.zeros(self.num_envs, device=self.device)
        return {
            **model,
            "step": torch.zeros(self.num_envs, dtype=torch.int64, device=self.device),
            "metric": metric,
            "best": metric.clone(),
            # ln 2 is the loss of a model that knows nothing: 0 in the observation
            "losses": zeros[:, None].expand(-1, 1 + _HISTORY) + math.log(2.0),
            "gains": zeros[:, None].repeat(1, _HISTORY),
            "gradient": zeros[:, None].expand(-1, 3) + 1.0,
            "action": zeros[:, None].repeat(1, len(ACTION_NAMES)),
        }

    def _check_action(self, action: Tensor) -> Tensor:
        if action.shape != (self.num_envs, len(ACTION_NAMES)) or not action.dtype.is_floating_point:
            raise ValueError(
                f"actions have shape {tuple(action.shape)} and dtype {action.dtype}, expected floats "
                f"({self.num_envs}, {len(ACTION_NAMES)}): {', '.join(ACTION_NAMES)}"
            )
        # on CUDA the check would wait for the device
        if self.device.type == "cpu" and not bool(torch.isfinite(action).all()):
            raise ValueError("an action is not finite; expected numbers in [-1, 1]")
        return action.to(torch.float32).clamp(-1.0, 1.0)

    def _transition(self, state: State, action: Tensor) -> Moved:
        config, settings = self.config, self.config.settings_of(action)
        model = {name: state[name] for name in _MODEL}
        trained = train(
            self.data,
            model,
            settings,
            fold_in(self._key(), state["step"]),
            updates=config.updates_per_step,
            batch=config.batch_size,
        )
        metric, finite = held_out_metric(self.data, trained.model, config.metric)
        gain = metric - state["metric"]
        cost = settings.cost * (config.cost_weight / config.horizon)
        step = state["step"] + 1
        moved = {
            **trained.model,
            "step": step,
            "metric": metric,
            "best": torch.maximum(state["best"], metric),
            "losses": torch.cat([trained.loss[:, None], state["losses"][:, :-1]], dim=1),
            "gains": torch.cat([gain[:, None], state["gains"][:, :-1]], dim=1),
            "gradient": trained.gradient,
            "action": action,
        }
        parts = {"reward_metric": gain, "reward_cost": -cost, "cost": settings.cost}
        return Moved(moved, gain - cost, ~finite, (step >= config.horizon) & finite, parts)

    def _observe(self, state: State) -> Tensor:
        scale, shift = (2.0, -1.0) if self.config.metric == "ranking" else (1.0 / math.log(2.0), 1.0)
        sizes = torch.stack([tree_sum((state[n] * state[n]).flatten(1)) / state[n][0].numel() for n in _MODEL[:3]], 1)
        # log10(norm) / 2 = log10(norm ** 2) / 4; a norm outside 0.01..100 is at the bound
        squares = torch.cat([state["gradient"] * state["gradient"], sizes], dim=1)
        logs = row_exact(torch.log10, torch.nan_to_num(squares, nan=1e4).clamp(1e-4, 1e4)) * 0.25
        weight = self.config.cost_weight
        blocks = {
            "loss": state["losses"][:, :1] / math.log(2.0) - 1.0,
            "loss_history": state["losses"][:, 1:] / math.log(2.0) - 1.0,
            "gradient_norms": logs[:, :3],
            "parameter_sizes": logs[:, 3:],
            "metric": state["metric"][:, None] * scale + shift,
            "metric_history": state["gains"] * 10.0,
            "best_metric": state["best"][:, None] * scale + shift,
            "progress": (state["step"].to(torch.float32) / self.horizon)[:, None],
            "last_action": state["action"],
            "cost_weight": torch.full_like(state["metric"], weight / (1.0 + weight))[:, None],
        }
        obs = torch.cat([blocks[name] for name, _ in FEATURES], dim=1)
        # a diverged model's loss may be no number: the bound stands for it
        return torch.nan_to_num(obs, nan=1.0).clamp(-1.0, 1.0)

    def _facts(self, state: State) -> dict[str, Tensor]:
        return {"metric": state["metric"], "step": state["step"]}


class TuneEnv(BatchOfOne):
    """One training run. Spaces, reward and endings: see `TuneVectorEnv`, of which this is one row."""

    def __init__(
        self,
        log: str | Path | InteractionLog | Dataset | World | TrainingData | None = None,
        device: str = "cpu",
        render_mode: None = None,
        **settings: Any,
    ) -> None:
        """Arguments as in `TuneVectorEnv`."""
        batch = TuneVectorEnv(1, log=log, device=device, autoreset_mode="Disabled", render_mode=render_mode, **settings)
        super().__init__(batch)
        self.feature_slices = batch.feature_slices
        self.config = batch.config
