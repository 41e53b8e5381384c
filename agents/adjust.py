"""Adjusts a trained policy to fresh feedback, on a leash to the deployed one; carries a policy over to another pool.

Online, `finetune` plays the policy, fits a critic and takes clipped policy-gradient steps (as in `agents.ppo`) with a penalty on
the divergence from the deployed policy. Offline, `finetune_on_log` takes the same steps on logged requests with propensities.
After every update a hard bound holds: the weights are pulled back towards the deployed ones until, on the states just met, the
mean KL(adjusted || deployed) is within `kl_limit`.

The advantages are those of Schulman et al. 2016 (GAE), the clipped ratio is that of Schulman et al. 2017, eq. 7; logged requests
are weighed by clipped inverse propensities (Ionides 2008).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from agents.ppo import advantages_of
from metarec_gym.policy import MlpPolicy, sample_actions
from metarec_gym.seeding import stream, torch_generator

MARGIN = 0.8
"""The bound is kept with this share of `kl_limit` on the states seen, so that it holds on states not yet seen too."""
BISECTIONS = 20


@dataclass(frozen=True)
class Args:
    """Hyperparameters of an adjustment."""

    seed: int = 0
    """Seed of the critic, the actions, the minibatches and the environment."""
    requests: int = 30_000
    """Requests of fresh feedback; rounded up to whole iterations."""
    num_steps: int = 33
    """Requests per environment and iteration."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    gamma: float = 0.9
    """Discount of the next request's value."""
    gae_lambda: float = 0.95
    """Exponential weight of longer advantage estimates."""
    epochs: int = 4
    """Passes of the actor over each iteration's requests."""
    critic_epochs: int = 8
    """Passes of the critic, which starts from nothing, before the actor's."""
    minibatch_size: int = 528
    """Requests per gradient step."""
    clip_range: float = 0.2
    """The probability ratio counts only within 1 +- this."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus; what is deployed explores already."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""
    kl_coef: float = 0.05
    """Penalty on the mean KL(adjusted || deployed), in deviations of the advantage per nat."""
    kl_limit: float = 0.5
    """Hard bound of the mean KL(adjusted || deployed), in nats; infinite: no bound."""
    weight_limit: float = 10.0
    """Logged requests count at most this often."""

    def __post_init__(self) -> None:
        if not self.kl_limit > 0 or self.kl_coef < 0:
            raise ValueError(f"kl_limit is {self.kl_limit} and kl_coef {self.kl_coef}; expected above 0 and at least 0")


@dataclass(frozen=True)
class Adjusted:
    """What an adjustment leaves behind.

    Attributes:
        policy: The adjusted policy.
        requests: Requests of feedback used.
        history: After each iteration: `requests`, `reward` (mean of a request), `kl` (mean, on its states), `kept` (share of the
            way from the deployed weights that the bound let stand).
        snapshots: The policies at the numbers of requests asked for, in order.
    """

    policy: MlpPolicy
    requests: int
    history: list[dict[str, float]]
    snapshots: list[MlpPolicy] = field(default_factory=list)


@dataclass(frozen=True)
class Logged:
    """Logged requests; all (n, ...), one row a request.

    Attributes:
        obs: float32 (n, obs_dim).
        mask: bool (n, K).
        action: int64 (n,), the strategy that served.
        propensity: float32 (n,), the probability with which the log's policy chose it.
        value: float32 (n,), its reward, or the discounted return from it on.
    """

    obs: Tensor
    mask: Tensor
    action: Tensor
    propensity: Tensor
    value: Tensor


def log_probs_of(policy: MlpPolicy, obs: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities, -1e8 or less where masked; (n, obs_dim) and bool (n, K) -> (n, K)."""
    return torch.log_softmax(policy.logits(obs).masked_fill(~mask, -1e8), dim=1)


def mean_kl(adjusted: MlpPolicy, deployed: MlpPolicy, obs: Tensor, mask: Tensor) -> float:
    """Mean over states of KL(adjusted || deployed), in nats; (n, obs_dim) and bool (n, K)."""
    with torch.no_grad():
        return float(_kl(log_probs_of(adjusted, obs, mask), log_probs_of(deployed, obs, mask)).mean())


def _kl(new: Tensor, old: Tensor) -> Tensor:
    # finite in both where masked, and exp gives 0 there
    return (new.exp() * (new - old)).sum(dim=1)


class _Actor:
    """The policy's weights as leaves that can be trained; the normalisation of its observations stays."""

    def __init__(self, deployed: MlpPolicy, learning_rate: float) -> None:
        self.deployed = deployed
        self.origin = [tensor.clone() for pair in deployed.layers for tensor in pair]
        self.weights = [tensor.clone().requires_grad_(True) for tensor in self.origin]
        self.optimizer = torch.optim.Adam(self.weights, lr=learning_rate, eps=1e-5)

    def policy(self, share: float = 1.0, **facts: Any) -> MlpPolicy:
        """The policy at `share` of the way from the deployed weights; a copy."""
        flat = [(o + share * (w.detach() - o)).clone() for o, w in zip(self.origin, self.weights, strict=True)]
        return self._of(flat, facts)

    def live(self) -> MlpPolicy:
        """The policy whose weights are trained."""
        made = self._of([w.detach() for w in self.weights], {})
        made.layers = list(zip(self.weights[::2], self.weights[1::2], strict=True))
        return made

    def _of(self, flat: list[Tensor], facts: dict[str, Any]) -> MlpPolicy:
        d = self.deployed
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        return MlpPolicy(pairs, d.strategies, obs_mean=d.obs_mean, obs_scale=d.obs_scale, meta={**d.meta, **facts})

    def step(self, loss: Tensor, max_grad_norm: float) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, max_grad_norm)
        self.optimizer.step()

    def hold(self, obs: Tensor, mask: Tensor, kl_limit: float) -> tuple[float, float]:
        """Pulls the weights back until the mean KL is within the bound; returns the KL and the share of the way kept."""
        bound, share = MARGIN * kl_limit, 1.0
        kl = mean_kl(self.policy(), self.deployed, obs, mask)
        # NaN counts as outside
        if not kl <= bound:
            low, high = 0.0, 1.0
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                within = mean_kl(self.policy(middle), self.deployed, obs, mask) <= bound
                low, high = (middle, high) if within else (low, middle)
            share = low
            pulled = [tensor for pair in self.policy(share).layers for tensor in pair]
            with torch.no_grad():
                for weight, tensor in zip(self.weights, pulled, strict=True):
                    weight.copy_(tensor)
            kl = mean_kl(self.policy(), self.deployed, obs, mask)
        return kl, share


# ---- the requests that the policy serves


@dataclass(frozen=True)
class _Rollout:
    """Requests in order of time, (num_steps, num_envs, ...), and what followed each."""

    obs: Tensor
    next_obs: Tensor
    """Of the same episode: its last observation where it ended."""
    mask: Tensor
    action: Tensor
    log_prob: Tensor
    reward: Tensor
    terminated: Tensor
    done: Tensor

    def returns(self, gamma: float) -> Tensor:
        """Discounted rewards until the episode or the rollout ends, (num_steps, num_envs)."""
        nothing = torch.zeros_like(self.reward)
        return advantages_of(self.reward, nothing, nothing, self.terminated, self.done, gamma, 1.0)


@dataclass(frozen=True)
class _Part:
    """Requests to learn from, flat: (batch, ...)."""

    obs: Tensor
    mask: Tensor
    action: Tensor
    log_prob: Tensor
    advantage: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> _Part:
        """The requests at `index`."""
        return _Part(**{name: tensor[index] for name, tensor in vars(self).items()})


class _Player:
    """An environment, and where its rows are."""

    def __init__(self, env: VectorEnv[Any, Any, Any], seed: int) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"autoreset_mode is {mode}; an adjustment needs SAME_STEP: pass autoreset_mode='SameStep'")
        first, infos = env.reset(seed=stream(seed, "adjust", "env"))
        self.env, self.numpy = env, not isinstance(first, Tensor)
        self.obs = torch.as_tensor(first, dtype=torch.float32)
        self.num_strategies = int(env.single_action_space.n)  # type: ignore[attr-defined]
        self.mask = self._mask(infos)

    def _mask(self, infos: dict[str, Any]) -> Tensor:
        if "action_mask" not in infos:
            return torch.ones(len(self.obs), self.num_strategies, dtype=torch.bool)
        return torch.as_tensor(infos["action_mask"]).to(torch.bool)

    @torch.no_grad()
    def play(self, policy: MlpPolicy, num_steps: int, generator: torch.Generator) -> _Rollout:
        """`num_steps` requests in every row."""
        steps: list[tuple[Tensor, ...]] = []
        draws = torch.rand(num_steps, len(self.obs), generator=generator)
        for draw in draws:
            obs, mask = self.obs, self.mask
            log_probs = log_probs_of(policy, obs, mask)
            action = sample_actions(log_probs.exp(), draw)
            log_prob = log_probs.gather(1, action[:, None])[:, 0]
            after, reward, terminated, truncated, infos = self.env.step(action.numpy() if self.numpy else action)
            self.obs = torch.as_tensor(after, dtype=torch.float32)
            self.mask = self._mask(infos)
            terminated, truncated = torch.as_tensor(terminated), torch.as_tensor(truncated)
            done, next_obs = terminated | truncated, self.obs
            if bool(done.any()):
                # the returned row already belongs to the next episode
                final = torch.as_tensor(infos["final_obs"], dtype=torch.float32)
                next_obs = torch.where(done[:, None], final, next_obs)
            reward = torch.as_tensor(reward, dtype=torch.float32)
            steps.append((obs, next_obs, mask, action, log_prob, reward, terminated, done))
        return _Rollout(*(torch.stack(column) for column in zip(*steps, strict=True)))


def _networks(
    obs_dim: int, num_strategies: int, hidden: tuple[int, ...], generator: torch.Generator
) -> tuple[torch.nn.Sequential, torch.nn.Sequential]:
    """An actor and a critic as `agents.ppo` starts with: tanh layers, orthogonal weights, the actor nearly uniform."""
    made = []
    for outputs, last_gain in ((num_strategies, 0.01), (1, 1.0)):
        widths = [obs_dim, *hidden, outputs]
        modules: list[torch.nn.Module] = []
        for index, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            last = index == len(widths) - 2
            # built on "meta": the default initialisation would draw from torch's global generator
            layer = torch.nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
            torch.nn.init.orthogonal_(layer.weight, last_gain if last else math.sqrt(2.0), generator=generator)
            torch.nn.init.zeros_(layer.bias)
            modules += [layer] if last else [layer, torch.nn.Tanh()]
        made.append(torch.nn.Sequential(*modules))
    return made[0], made[1]


def finetune(
    env: VectorEnv[Any, Any, Any], deployed: MlpPolicy, args: Args, *, snapshots: Sequence[int] = ()
) -> Adjusted:
    """Fine-tunes a policy on the requests that it serves itself.

    Args:
        env: Fresh users: torch or numpy output, SAME_STEP, with the observations that the policy was trained on.
        deployed: The policy that serves now; not changed.
        args: Hyperparameters.
        snapshots: Numbers of requests after which the policy so far is kept, ascending.

    Returns:
        The adjusted policy; every policy that ever served is within the bound.

    Raises:
        ValueError: When the environment has other observations or strategies than the policy, or another autoreset mode.
    """
    player = _Player(env, args.seed)
    obs_dim, num_strategies = player.obs.shape[1], player.num_strategies
    names = tuple(getattr(env, "strategy_names", deployed.strategies))
    expected = deployed.layers[0][0].shape[1]
    if obs_dim != expected or num_strategies != len(deployed.strategies) or names != deployed.strategies:
        raise ValueError(
            f"the policy takes {expected} features and chooses among {list(deployed.strategies)}, the environment has "
            f"{obs_dim} and {list(names)}; carry the policy over first: agents.adjust.carry_over"
        )
    widths = tuple(w.shape[0] for w, _ in deployed.layers[:-1])
    critic = _networks(obs_dim, num_strategies, widths, torch_generator(args.seed, "adjust", "critic"))[1]
    critic_steps = torch.optim.Adam(critic.parameters(), lr=2e-3, eps=1e-5)
    actor = _Actor(deployed, args.learning_rate)
    generators = {name: torch_generator(args.seed, "adjust", name) for name in ("action", "minibatch")}
    history: list[dict[str, float]] = []
    kept: list[MlpPolicy] = []
    used, scale, wanted = 0, 0.0, list(snapshots)
    while used < args.requests:
        roll = player.play(actor.policy(), args.num_steps, generators["action"])
        # fixed from the first rollout on: a scale that moves would move the critic's targets under it
        scale = scale or float(roll.returns(args.gamma).square().mean().sqrt()) or 1.0
        part = _part(critic, roll, args, scale)
        for index in _minibatches(len(part.action), args.critic_epochs, args.minibatch_size, generators["minibatch"]):
            loss = torch.nn.functional.mse_loss(critic(part.obs[index])[:, 0], part.returns[index])
            critic_steps.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
            critic_steps.step()
        # the critic has just met these requests: its values say what was to be expected of them
        part = _part(critic, roll, args, scale)
        for index in _minibatches(len(part.action), args.epochs, args.minibatch_size, generators["minibatch"]):
            rows = part.rows(index)
            _step(actor, rows.obs, rows.mask, rows.action, rows.log_prob, rows.advantage, torch.ones(len(index)), args)
        kl, share = actor.hold(part.obs, part.mask, args.kl_limit)
        used += len(part.action)
        history.append({"requests": float(used), "reward": float(roll.reward.mean()), "kl": kl, "kept": share})
        while wanted and used >= wanted[0]:
            kept.append(actor.policy(adjusted_requests=used))
            wanted.pop(0)
    policy = actor.policy(adjusted_requests=used, kl_limit=args.kl_limit)
    return Adjusted(policy, used, history, kept + [policy] * len(wanted))


def finetune_on_log(deployed: MlpPolicy, log: Logged, args: Args) -> Adjusted:
    """Fine-tunes a policy on logged requests, whoever chose the strategies.

    Args:
        deployed: The policy that serves now; not changed.
        log: Requests with the propensities of what was chosen.
        args: Hyperparameters; `epochs` passes are made.

    Returns:
        The adjusted policy, within the bound on the log's states.

    Raises:
        ValueError: When a propensity is not in (0, 1].
    """
    if not bool(((log.propensity > 0) & (log.propensity <= 1)).all()):
        raise ValueError("a propensity is not in (0, 1]; log the probability with which the strategy was chosen")
    actor, generator = _Actor(deployed, args.learning_rate), torch_generator(args.seed, "adjust", "minibatch")
    with torch.no_grad():
        old = log_probs_of(deployed, log.obs, log.mask).gather(1, log.action[:, None])[:, 0]
        # how often the deployed policy would have made the logged choice, for each time that the log's did
        weight = (old - log.propensity.log()).exp().clamp(max=args.weight_limit)
        baseline = (weight * log.value).sum() / weight.sum()
    advantage = log.value - baseline
    for index in _minibatches(len(log.action), args.epochs, args.minibatch_size, generator):
        _step(
            actor, log.obs[index], log.mask[index], log.action[index], old[index], advantage[index], weight[index], args
        )
    kl, share = actor.hold(log.obs, log.mask, args.kl_limit)
    used = len(log.action)
    row = {"requests": float(used), "reward": float(log.value.mean()), "kl": kl, "kept": share}
    return Adjusted(actor.policy(adjusted_requests=used, kl_limit=args.kl_limit), used, [row])


def _step(
    actor: _Actor, obs: Tensor, mask: Tensor, action: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, args: Args
) -> None:
    """One gradient step of the clipped objective with the penalty; `old` is the deployed or serving log-probability."""
    log_probs = log_probs_of(actor.live(), obs, mask)
    ratio = (log_probs.gather(1, action[:, None])[:, 0] - old).exp()
    if len(advantage) > 1:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
    gain = (weight * torch.min(advantage * ratio, advantage * clipped)).sum() / weight.sum()
    entropy = -(log_probs.exp() * log_probs).sum(dim=1).mean()
    with torch.no_grad():
        reference = log_probs_of(actor.deployed, obs, mask)
    penalty = args.kl_coef * _kl(log_probs, reference).mean()
    actor.step(-gain - args.ent_coef * entropy + penalty, args.max_grad_norm)


@torch.no_grad()
def _part(critic: torch.nn.Module, roll: _Rollout, args: Args, scale: float) -> _Part:
    value, later = critic(roll.obs)[..., 0], critic(roll.next_obs)[..., 0]
    advantage = advantages_of(
        roll.reward / scale, value, later, roll.terminated, roll.done, args.gamma, args.gae_lambda
    )
    tensors = (roll.obs, roll.mask, roll.action, roll.log_prob, advantage, advantage + value)
    return _Part(*(tensor.flatten(0, 1) for tensor in tensors))


def _minibatches(rows: int, epochs: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    orders = (torch.randperm(rows, generator=generator).split(size) for _ in range(epochs))
    return itertools.chain.from_iterable(orders)


# ---- another pool or another world

PER_STRATEGY = ("last_strategy", "strategy_count", "strategy_mean_reward")


def carry_over(
    policy: MlpPolicy,
    strategies: Sequence[str],
    slices: dict[str, slice],
    *,
    prior_share: float | None = None,
) -> MlpPolicy:
    """A policy for another pool, or another world with the same features: old weights kept, new ones filled in.

    A strategy that the policy knows keeps its output row and its input columns. A new one gets the mean of the known ones' output
    rows, so it is as likely as a typical one, and input columns of zeros, so what is known of it changes no other choice yet.
    Strategies that are gone lose their rows.

    Args:
        policy: Trained on the observations of `metarec_gym.envs`, with its own pool.
        strategies: The new pool, in order.
        slices: `feature_slices` of the new environment: name -> where the block stands.
        prior_share: Share of requests that each new strategy gets where all others are equally likely; None: as the mean row
            says.

    Returns:
        The policy for the new pool.

    Raises:
        ValueError: When the two pools have no strategy in common, the blocks do not fit the policy, or the share
            is not in (0, 1).
    """
    old, new = list(policy.strategies), list(strategies)
    known = [name for name in new if name in old]
    if not known:
        raise ValueError(f"the policy knows {old}, the pool is {new}: nothing can be carried over")
    blocks = [(name, at) for name, at in sorted(slices.items(), key=lambda item: item[1].start)]
    source: list[int] = []
    at_old = 0
    for name, at in blocks:
        if _per_strategy(name):
            source += [at_old + old.index(s) if s in old else -1 for s in new]
            at_old += len(old)
        else:
            source += range(at_old, at_old + at.stop - at.start)
            at_old += at.stop - at.start
    obs_dim = policy.layers[0][0].shape[1]
    if at_old != obs_dim:
        raise ValueError(
            f"the policy takes {obs_dim} features, these blocks and its pool make {at_old}; use its world's"
        )
    column = torch.tensor(source)
    fresh = column < 0
    layers = [(w.clone(), b.clone()) for w, b in policy.layers]
    first, first_bias = layers[0]
    layers[0] = torch.where(fresh, 0.0, first[:, column.clamp(min=0)]), first_bias
    mean = torch.where(fresh, 0.0, policy.obs_mean[column.clamp(min=0)])
    scale = torch.where(fresh, 1.0, policy.obs_scale[column.clamp(min=0)])
    weight, bias = layers[-1]
    kept = torch.tensor([old.index(name) for name in known])
    typical = weight[kept].mean(dim=0), bias[kept].mean()
    offset = 0.0
    if prior_share is not None:
        if not 0.0 < prior_share < 1.0:
            raise ValueError(f"prior_share is {prior_share}, expected a share in (0, 1)")
        # e^offset / (e^offset + others) = share
        offset = float(torch.tensor(prior_share * (len(new) - 1) / (1.0 - prior_share)).log())
    rows = [(weight[old.index(s)], bias[old.index(s)]) if s in old else (typical[0], typical[1] + offset) for s in new]
    layers[-1] = torch.stack([w for w, _ in rows]), torch.stack([b for _, b in rows])
    meta = {**policy.meta, "carried_over_from": old}
    return MlpPolicy(layers, tuple(new), obs_mean=mean, obs_scale=scale, meta=meta)


def resized(slices: dict[str, slice], strategies: int) -> dict[str, slice]:
    """Where the blocks stand for a pool of another size.

    Args:
        slices: `feature_slices` of an environment: name -> where the block stands.
        strategies: Strategies of the other pool.
    """
    at, found = 0, {}
    for name, block in sorted(slices.items(), key=lambda item: item[1].start):
        size = strategies if _per_strategy(name) else block.stop - block.start
        found[name] = slice(at, at + size)
        at += size
    return found


def _per_strategy(name: str) -> bool:
    return name in PER_STRATEGY or name.startswith("list_")


def cold_policy(obs_dim: int, strategies: Sequence[str], hidden: tuple[int, ...], seed: int) -> MlpPolicy:
    """An untrained policy, nearly uniform: what a warm start is measured against."""
    actor = _networks(obs_dim, len(strategies), hidden, torch_generator(seed, "adjust", "cold"))[0]
    linear = [m for m in actor if isinstance(m, torch.nn.Linear)]
    return MlpPolicy([(m.weight, m.bias) for m in linear], tuple(strategies), meta={"agent": "cold", "seed": seed})


def unleashed(args: Args) -> Args:
    """The same hyperparameters without penalty and bound: for a policy that has nothing to be held to."""
    return dataclasses.replace(args, kl_coef=0.0, kl_limit=float("inf"))
