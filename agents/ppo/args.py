"""Hyperparameters, with a switch wherever well-known implementations differ, and what training leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metarec_gym.policy import MlpPolicy

Schedule = Literal["linear", "constant"]


@dataclass(frozen=True)
class Args:
    """Hyperparameters of the learner; the number of environments is the environment's own.

    Stable-Baselines3, CleanRL and rsl_rl agree on the losses and differ in details; each has a switch here. Two differences need
    none: a minibatch of one request keeps its advantage (CleanRL divides by the deviation of one number, which is NaN), and SB3's
    normalisation of observations and rewards is CleanRL's.
    """

    seed: int = 0
    """Seed of the network, the actions, the minibatches and the environment (each has its own stream)."""
    total_steps: int = 1_000_000
    """Requests to learn from; rounded up to whole iterations."""
    num_steps: int = 33
    """Requests per environment and iteration."""
    learning_rate: float = 2e-3
    """Adam's step size in the first iteration."""
    lr_schedule: Schedule = "linear"
    """`linear` falls to zero at the end of the run."""
    schedules_count: Literal["before", "after"] = "before"
    """Iterations that the schedules count: those `before` this one, so the first has the full value (CleanRL), or this one too,
    `after` its rollout, so the last has zero (Stable-Baselines3)."""
    adam_eps: float = 1e-5
    """Adam's epsilon; torch's own default is 1e-8."""
    gamma: float = 0.9
    """Discount of the next request's value; ten requests of foresight cover what one episode can teach about a user."""
    gae_lambda: float = 0.95
    """Exponential weight of longer advantage estimates."""
    truncation: Literal["bootstrap", "current", "terminal"] = "bootstrap"
    """What a truncated episode is still worth: the value of its last observation (Stable-Baselines3), of the one before
    (rsl_rl), or nothing, as if the user had left (CleanRL)."""
    epochs: int = 4
    """Passes over each rollout."""
    minibatch_size: int = 1056
    """Requests per gradient step; the last one of a pass may be smaller. A recurrent network takes whole environments, as many as
    fit in. With more environments it may grow, but fewer gradient steps a request need larger budgets
    (`experiments/results/ppo_limits.md`)."""
    shuffle: Literal["epoch", "once"] = "epoch"
    """A new order of the requests in every pass, or one for all passes of an iteration (rsl_rl)."""
    clip_range: float = 0.2
    """The probability ratio counts only within 1 +- this."""
    clip_schedule: Schedule = "constant"
    """`linear` falls to zero at the end of the run."""
    clip_range_vf: float | None = None
    """Values may move by at most this per iteration; None does not clip (Stable-Baselines3). CleanRL: 0.2."""
    clip_vloss: Literal["clipped", "max"] = "clipped"
    """With `clip_range_vf`: the error of the clipped value (Stable-Baselines3), or the larger of both errors (CleanRL)."""
    value_loss_factor: float = 1.0
    """Times the mean squared value error: 1 as in Stable-Baselines3, 0.5 as in CleanRL."""
    normalize_advantage: bool = True
    """Advantages get mean 0 and deviation 1, unless there is only one."""
    advantage_scope: Literal["minibatch", "batch"] = "minibatch"
    """Over which requests: each minibatch, or the whole rollout once (rsl_rl)."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""
    ent_schedule: Schedule = "constant"
    """`linear` falls to zero at the end of the run."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""
    target_kl: float | None = None
    """The update ends when the KL estimate exceeds this, times `kl_factor`; None never ends it."""
    kl_factor: float = 1.5
    """Slack of `target_kl`: 1.5 in Stable-Baselines3, 1 in CleanRL."""
    kl_stop: Literal["minibatch", "epoch"] = "minibatch"
    """When to look: before each gradient step (Stable-Baselines3), or after each pass at its last minibatch (CleanRL)."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the tanh layers, of actor and critic alike."""
    shared_trunk: bool = False
    """Actor and critic share the tanh layers, and the memory; each has one layer of its own."""
    orthogonal_init: bool = True
    """Orthogonal weights and zero biases; else torch's uniform ones."""
    gain_hidden: float = 2.0**0.5
    """Orthogonal gain of the tanh layers."""
    gain_actor: float = 0.01
    """Orthogonal gain of the actor's last layer: near-uniform choices at the start."""
    gain_critic: float = 1.0
    """Orthogonal gain of the critic's last layer."""
    log_std_init: float = 0.0
    """Log of the first standard deviation of continuous actions; it is learned and does not hang on the observation."""
    recurrent: bool = False
    """A gated recurrent unit remembers the episode so far; the update plays whole environments."""
    rnn_size: int = 64
    """Width of that memory."""
    normalize_obs: bool = False
    """Observations get running mean 0 and deviation 1; the policy carries both."""
    clip_obs: float = 10.0
    """Normalised observations are cut off at +- this."""
    normalize_reward: bool = False
    """Rewards are divided by the running deviation of the discounted return, instead of by `reward_scale`."""
    clip_reward: float = 10.0
    """Normalised rewards are cut off at +- this."""
    reward_scale: float | None = None
    """Rewards are divided by this; None takes the root mean square of the first rollout's discounted returns: so the
    critic starts within reach of its targets, whatever the unit of the reward."""
    rollout: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How requests are played: `eager` steps the environment; `compile` (one compiled step) and `graph` (the whole rollout in a
    CUDA graph) leave the host out. With `graph` advantages and gradient steps are a graph too, unless `target_kl` or several
    processes need the host. `auto` is `graph` on CUDA where the environment and these settings allow it, else `eager`."""
    stats_window: int = 256
    """Episodes that the logged mean return and length run over; the best policy is the one with the best full window."""
    checkpoint_every: int = 10
    """Iterations between checkpoints; the last iteration always writes one."""


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind."""

    policy: MlpPolicy
    """The actor, without training code."""
    steps: int
    """Requests learned from."""
    seconds: float
    """Wall time of all iterations, interruptions excluded."""
    metrics: dict[str, float]
    """The last iteration's scalars, by TensorBoard tag."""
    history: list[dict[str, float]]
    """The scalars of every iteration that this process ran, plus `step`."""
