"""Learning: advantages of a rollout, and gradient steps on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.ppo.args import Args
from agents.ppo.networks import ActorCritic
from agents.ppo.rollout import Rollout
from agents.ppo.team import SOLO, Team

# ---- advantages


@torch.no_grad()
def values_of(net: ActorCritic, roll: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """What the critic says of a rollout.

    Returns:
        Values of each request's state and of the state it led to, both (num_steps, num_envs), and the critic's memory after the
        last request (num_envs, size).
    """
    values, memory = net.value_sequence(roll.obs, roll.critic_memory, roll.start, roll.cuts() if net.recurrent else ())
    # NEXT_STEP shows the last observation of an episode as the reset row's obs, so the shift is right for it too
    next_values = values[1:].clone()
    for t, rows, final_obs in roll.final:
        next_values[t, rows] = net.next_value(final_obs, memory[t, rows])
    if roll.final_obs is not None:
        next_values = torch.where(roll.done & ~roll.terminated, net.value(roll.final_obs), next_values)
    return values[:-1], next_values, memory[-2]


def advantages_of(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimates (Schulman et al., 2016); all arguments and the result are (num_steps, num_envs).

    A terminated episode has no future; a truncated one is worth what the critic says of its last state (`next_value`);
    in both the sum of later errors ends.
    """
    # delta_t = r_t + gamma * V(s_{t+1}) - V(s_t), with V = 0 after a termination
    delta = reward + gamma * torch.where(terminated, 0.0, next_value) - value
    # A_t = delta_t + gamma * lambda * A_{t+1}, cut where an episode ended
    decay = gamma * gae_lambda * (~done).to(delta.dtype)
    advantage, later = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        later = delta[t] + decay[t] * later
        advantage[t] = later
    return advantage


def typical_return(roll: Rollout, gamma: float, team: Team = SOLO) -> float:
    """Root mean square of the discounted returns inside a rollout; 1 where there was no reward at all."""
    nothing = torch.zeros_like(roll.reward)
    returns = advantages_of(roll.reward, nothing, nothing, roll.terminated, roll.done, gamma, 1.0)
    return float(team.mean(returns[roll.valid].square().mean()).sqrt()) or 1.0


# ---- batches


@dataclass
class Batch:
    """Requests to learn from, flat: (batch, ...)."""

    obs: Tensor
    mask: Tensor | None
    """None where nothing is forbidden anywhere."""
    action: Tensor
    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    returns: Tensor

    def __len__(self) -> int:
        """Requests, which are also what an order permutes."""
        return len(self.action)

    def units(self, args: Args) -> int:
        """Of what an order permutes, how many make a minibatch."""
        return args.minibatch_size

    def rows(self, index: Tensor) -> Batch:
        """The requests at `index`."""
        return self._each(lambda tensor: tensor.index_select(0, index))

    def flattened(self) -> Batch:
        """Time and environments in one dimension; (num_steps, num_envs, ...) -> (num_steps * num_envs, ...)."""
        return self._each(lambda tensor: tensor.flatten(0, 1))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        fields: dict[str, Any] = {n: None if x is None else change(x) for n, x in vars(self).items()}
        return Batch(**fields)

    def forward(self, net: ActorCritic) -> tuple[Tensor, Tensor]:
        """Outputs and values of the requests."""
        return net(self.obs)  # type: ignore[no-any-return]


@dataclass
class Sequences:
    """Whole environments to learn from, for networks with memory; time first: (num_steps, num_envs, ...)."""

    obs: Tensor
    start: Tensor
    valid: Tensor
    memory: Tensor
    """(num_envs, size)."""
    critic_memory: Tensor
    cuts: tuple[int, ...]
    requests: Batch
    """The other tensors, time first too."""

    def __len__(self) -> int:
        """Environments: what an order permutes."""
        return self.obs.shape[1]

    def units(self, args: Args) -> int:
        """As many environments as hold a minibatch of requests."""
        return max(1, args.minibatch_size // len(self.obs))

    def rows(self, index: Tensor) -> SequenceBatch:
        """The requests of the environments at `index`."""
        valid = self.valid.index_select(1, index).flatten()
        where = None if bool(valid.all()) else valid.nonzero()[:, 0]

        def flat(tensor: Tensor) -> Tensor:
            chosen = tensor.index_select(1, index).flatten(0, 1)
            return chosen if where is None else chosen.index_select(0, where)

        own = vars(self.requests._each(flat))
        obs, start = self.obs.index_select(1, index), self.start.index_select(1, index)
        memories = self.memory.index_select(0, index), self.critic_memory.index_select(0, index)
        return SequenceBatch(**own, sequence=obs, start=start, memories=memories, cuts=self.cuts, where=where)


@dataclass
class SequenceBatch(Batch):
    """A minibatch of whole environments: its requests flat, and what a memory needs to play them again."""

    sequence: Tensor
    """Observations (num_steps, rows, obs_dim)."""
    start: Tensor
    memories: tuple[Tensor, Tensor]
    cuts: tuple[int, ...]
    where: Tensor | None
    """Places of the requests in the flattened sequence; None where all are."""

    def forward(self, net: ActorCritic) -> tuple[Tensor, Tensor]:
        """Outputs and values of the requests, by the states that the network now has at them."""
        output, value = net.sequence(self.sequence, self.memories, self.start, self.cuts)
        output, value = output.flatten(0, 1), value.flatten()
        return (output, value) if self.where is None else (output[self.where], value[self.where])


def make_batch(
    net: ActorCritic, roll: Rollout, args: Args, reward_scale: float, team: Team = SOLO
) -> tuple[Batch | Sequences, Tensor]:
    """Advantages and value targets of a rollout, without the rows on which nobody was served.

    Returns:
        The batch, and the critic's memory after the last request.
    """
    everybody = bool(roll.valid.all())
    requests, memory = requests_of(net, roll, args, reward_scale, team, everybody=everybody)
    if bool(roll.mask.all()):
        requests.mask = None
    if net.recurrent:
        cuts = tuple(cut for cut in roll.cuts() if cut < len(roll.action))
        return Sequences(
            roll.obs[:-1], roll.start[:-1], roll.valid, roll.memory, roll.critic_memory, cuts, requests
        ), memory  # fmt: skip
    flat = requests.flattened()
    return (flat if everybody else flat.rows(roll.valid.flatten().nonzero()[:, 0])), memory


def requests_of(
    net: ActorCritic, roll: Rollout, args: Args, reward_scale: float, team: Team = SOLO, *, everybody: bool
) -> tuple[Batch, Tensor]:
    """Advantages and value targets of all rows of a rollout, (num_steps, num_envs, ...), and the critic's last memory.

    With `everybody`, which says that every row was served, nothing here looks at values on the host.
    """
    value, next_value, memory = values_of(net, roll)
    terminated = roll.terminated
    if args.truncation == "current":
        next_value = torch.where(roll.done, value, next_value)
    elif args.truncation == "terminal":
        terminated = roll.done
    reward = roll.learn_reward / reward_scale
    advantage = advantages_of(reward, value, next_value, terminated, roll.done, args.gamma, args.gae_lambda)
    returns = advantage + value
    if args.normalize_advantage and args.advantage_scope == "batch":
        served = advantage.flatten() if everybody else advantage[roll.valid]
        normalised = team.normalised(served)
        advantage = (
            normalised.view_as(advantage)
            if everybody
            else torch.zeros_like(advantage).masked_scatter_(roll.valid, normalised)
        )
    return Batch(roll.obs[:-1], roll.mask, roll.action, roll.log_prob, value, advantage, returns), memory


# ---- update


def losses_of(net: ActorCritic, part: Batch, args: Args, team: Team = SOLO) -> tuple[Tensor, Tensor]:
    """The loss of one minibatch, and what is logged of it.

    Returns:
        The loss, with its graph, and (5,): policy loss, value loss, negative entropy, clip fraction, KL estimate.
    """
    output, value = part.forward(net)
    log_prob, entropy = net.head.log_prob(output, part.mask, part.action)
    log_ratio = log_prob - part.log_prob
    ratio = log_ratio.exp()
    advantage = part.advantage
    if args.normalize_advantage and args.advantage_scope == "minibatch" and len(advantage) > 1:
        advantage = team.normalised(advantage)
    clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
    policy_loss = -torch.min(advantage * ratio, advantage * clipped).mean()
    value_loss = _value_loss(value, part, args)
    entropy_loss = -entropy.mean()
    loss = policy_loss + args.ent_coef * entropy_loss + args.vf_coef * value_loss
    with torch.no_grad():
        # k3 estimate of KL(old || new): E[(ratio - 1) - log ratio], never negative
        kl = ((ratio - 1) - log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > args.clip_range).float().mean()
        return loss, torch.stack([policy_loss, value_loss, entropy_loss, clip_fraction, kl])


def _value_loss(value: Tensor, part: Batch, args: Args) -> Tensor:
    error = (value - part.returns).square()
    if args.clip_range_vf is not None:
        near = part.value + (value - part.value).clamp(-args.clip_range_vf, args.clip_range_vf)
        clipped = (near - part.returns).square()
        error = torch.max(error, clipped) if args.clip_vloss == "max" else clipped
    return args.value_loss_factor * error.mean()


def update(
    net: ActorCritic,
    optimizer: torch.optim.Optimizer,
    batch: Batch | Sequences,
    args: Args,
    orders: Iterable[Tensor],
    team: Team = SOLO,
) -> dict[str, Tensor]:
    """Gradient steps on one batch.

    Args:
        net: Changed in place.
        optimizer: Of the network's parameters, with this iteration's learning rate.
        batch: The iteration's requests.
        args: Hyperparameters, with this iteration's clip range and entropy weight.
        orders: One permutation of the batch per epoch, int64 (len(batch),).
        team: Processes that take the steps together.

    Returns:
        Device scalars by tag; as in SB3 `approx_kl` is the last epoch's mean and `loss` the last minibatch's.
    """
    steps: list[Tensor] = []
    epoch_starts = 0
    loss, stop = torch.zeros(()), False
    parameters = list(net.parameters())
    for order in orders:
        epoch_starts = len(steps)
        for index in order.split(batch.units(args)):
            loss, numbers = losses_of(net, batch.rows(index), args, team)
            steps.append(numbers)
            # the only place where the host waits for the device, and only if asked to
            if args.target_kl is not None and args.kl_stop == "minibatch" and _too_far(numbers, args, team):
                stop = True
                break
            descend(loss, parameters, optimizer, args, team)
        if stop or (args.target_kl is not None and args.kl_stop == "epoch" and _too_far(steps[-1], args, team)):
            break
    told = batch.requests if isinstance(batch, Sequences) else batch
    value, returns = told.value, told.returns
    if isinstance(batch, Sequences):
        value, returns = value[batch.valid], returns[batch.valid]
    return told_of(steps, epoch_starts, loss, value, returns)


def descend(
    loss: Tensor, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, args: Args, team: Team = SOLO
) -> None:
    """One gradient step."""
    optimizer.zero_grad()
    loss.backward()
    team.average_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()


def told_of(steps: list[Tensor], epoch_starts: int, loss: Tensor, value: Tensor, returns: Tensor) -> dict[str, Tensor]:
    """What an update logs.

    Args:
        steps: What `losses_of` says of each minibatch.
        epoch_starts: The first minibatch of the last epoch.
        loss: Of the last minibatch.
        value: Of all requests, before the update.
        returns: Their targets.
    """
    every = torch.stack(steps)
    policy_mean, value_mean, entropy_mean, clip_mean, _ = every.mean(dim=0).unbind()
    return {
        "train/policy_gradient_loss": policy_mean,
        "train/value_loss": value_mean,
        "train/entropy_loss": entropy_mean,
        "train/clip_fraction": clip_mean,
        "train/approx_kl": every[epoch_starts:, 4].mean(),
        "train/loss": loss.detach(),
        "train/explained_variance": 1 - (returns - value).var() / returns.var(),
    }


def _too_far(numbers: Tensor, args: Args, team: Team) -> bool:
    assert args.target_kl is not None
    return float(team.mean(numbers[4])) > args.kl_factor * args.target_kl
