"""Bandits that start from nothing with every user: each row keeps counts and reward sums of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from agents.bandits.shared import Saved, best_of, draw_keys, win_shares
from metarec_gym.policy import masked_uniform, one_hot_probs
from metarec_gym.seeding import fold_in, normal, uniform


class _PerUser(Saved):
    """Counts and reward sums of every row and strategy, forgotten when episodes begin.

    With a discount below 1 every request of a row multiplies what is known of it (Garivier and Moulines, 2011): old answers
    fade, so a strategy that has become better or worse is noticed.
    """

    ROWS = ("count", "total", "served")

    def __init__(self, num_strategies: int, discount: float = 1.0) -> None:
        if num_strategies < 1:
            raise ValueError(f"num_strategies is {num_strategies}, expected at least 1")
        if not 0.0 < discount <= 1.0:
            raise ValueError(f"discount is {discount}, expected a number in (0, 1]; 1 forgets nothing")
        self.num_strategies, self.discount = int(num_strategies), float(discount)
        self.begin(0)

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Forgets every row."""
        self.count = torch.zeros(num_rows, self.num_strategies, device=device)
        self.total = torch.zeros_like(self.count)
        self.served = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Adds the requests that were served."""
        on = alive.to(torch.float32)[:, None]
        served = one_hot_probs(action, self.num_strategies) * on
        if self.discount < 1.0:
            fade = 1.0 - on * (1.0 - self.discount)
            self.count, self.total = self.count * fade, self.total * fade
        self.count = self.count + served
        self.total = self.total + served * reward.to(torch.float32)[:, None]
        self.served = self.served + alive.to(torch.int64)

    def _mean(self) -> Tensor:
        # untried strategies have a total of 0; a discounted count may be below 1
        return self.total / torch.where(self.count > 0, self.count, 1.0)


class EpsilonGreedy(_PerUser):
    """The best mean so far, or with probability epsilon any strategy; untried ones come first.

    With `decay` a user's request t explores with probability epsilon_t = min(epsilon, (decay / t)^power), and so settles. Power
    1 is epsilon_n-greedy of Auer, Cesa-Bianchi and Fischer (2002, figure 3), whose `decay` is c K / d^2 for a gap d between the
    best strategy and the next. Power 2 explores in `decay` requests at first and in as many ever after: for episodes of a known
    length.

    Args:
        num_strategies: K.
        epsilon: Share of the requests spent on a uniform choice; with `decay` the largest one.
        discount: Weight of an answer one request later; 1 = for ever.
        decay: Requests after which exploration falls; None explores with `epsilon` for ever.
        power: How fast it falls.
    """

    def __init__(
        self,
        num_strategies: int,
        epsilon: float = 0.1,
        discount: float = 1.0,
        decay: float | None = None,
        power: float = 1.0,
    ) -> None:
        super().__init__(num_strategies, discount)
        if decay is not None and (decay <= 0.0 or power <= 0.0):
            raise ValueError(
                f"decay is {decay} and power {power}; expected numbers above 0, or decay=None to explore for ever"
            )
        self.epsilon, self.decay, self.power = float(epsilon), decay, float(power)
        self.settings = {
            "num_strategies": self.num_strategies,
            "epsilon": self.epsilon,
            "discount": self.discount,
            "decay": self.decay,
            "power": self.power,
        }

    def exploration(self) -> Tensor:
        """Share of uniform choices at each row's next request; float32 (num_rows, 1)."""
        if self.decay is None:
            return torch.full((len(self.served), 1), self.epsilon, device=self.served.device)
        # epsilon_t = min(epsilon, (decay / t)^power)
        share: Tensor = (self.decay / (self.served[:, None] + 1.0)) ** self.power
        return share.clamp(max=self.epsilon)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """(1 - epsilon_t) for the best, epsilon_t spread over all that are available."""
        scores, epsilon = torch.where(self.count == 0, torch.inf, self._mean()), self.exploration()
        return (1 - epsilon) * best_of(scores, action_mask) + epsilon * masked_uniform(action_mask)


class Softmax(_PerUser):
    """Boltzmann exploration: probabilities proportional to exp(mean reward / temperature) (Luce, 1959).

    Args:
        num_strategies: K.
        temperature: In units of reward; towards 0 the best mean alone is chosen, a large one chooses uniformly.
        prior_mean: Mean reward that an untried strategy counts with.
        discount: Weight of an answer one request later; 1 = for ever.
    """

    def __init__(
        self, num_strategies: int, temperature: float = 0.1, prior_mean: float = 0.0, discount: float = 1.0
    ) -> None:
        super().__init__(num_strategies, discount)
        if temperature <= 0.0:
            raise ValueError(f"temperature is {temperature}, expected a number above 0")
        self.temperature, self.prior_mean = float(temperature), float(prior_mean)
        self.settings = {
            "num_strategies": self.num_strategies,
            "temperature": self.temperature,
            "prior_mean": self.prior_mean,
            "discount": self.discount,
        }

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """Softmax of the means over the available strategies."""
        scores = torch.where(self.count == 0, self.prior_mean, self._mean()) / self.temperature
        return torch.softmax(scores.masked_fill(~action_mask, -torch.inf), dim=1)


class BoltzmannGumbel(_PerUser):
    """Boltzmann exploration that settles (Cesa-Bianchi, Gentile, Lugosi and Neu, 2017, section 4).

    A softmax is the argmax of means with Gumbel noise of one scale for all. No one temperature that falls with time alone is
    right: it must fall with what is known of each strategy, so the noise of strategy a has the scale C / sqrt(count_a). Untried
    strategies come first.

    Args:
        num_strategies: K.
        seed: Of the noise.
        scale: C, the deviation of one request's reward around its mean.
        draws: Draws of the noise that the probabilities are shares of.
        discount: Weight of an answer one request later; 1 = for ever.
    """

    def __init__(
        self, num_strategies: int, seed: int, *, scale: float = 1.0, draws: int = 64, discount: float = 1.0
    ) -> None:
        super().__init__(num_strategies, discount)
        if scale <= 0.0:
            raise ValueError(f"scale is {scale}, expected a number above 0")
        self.seed, self.scale, self.draws = int(seed), float(scale), int(draws)
        self.settings = {
            "num_strategies": self.num_strategies,
            "seed": self.seed,
            "scale": self.scale,
            "draws": self.draws,
            "discount": self.discount,
        }

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """How often each strategy has the highest mean with its noise."""
        keys = draw_keys(self.seed, "gumbel", self.served, self.draws, self.num_strategies)
        # Gumbel = -ln(-ln U)
        noise = -torch.log(-torch.log(uniform(keys).clamp(1e-7, 1.0 - 1e-7)))
        scale = self.scale * torch.where(self.count > 0, self.count, 1.0).rsqrt()
        # untried ones share the first place, by their noise
        lead = torch.where(self.count == 0, 1e6 * self.scale, self._mean())
        return win_shares(lead[:, None] + scale[:, None] * noise, action_mask)


class Ucb1(_PerUser):
    """Optimism in the face of uncertainty (Auer, Cesa-Bianchi and Fischer, 2002).

    Args:
        num_strategies: K.
        reward_range: Largest minus smallest reward of one request; the bound is scaled by it.
        exploration: Factor of the confidence bound; sqrt(2) is the paper's.
        discount: Weight of an answer one request later; below 1 it is discounted UCB (Garivier and Moulines, 2011).
    """

    def __init__(
        self,
        num_strategies: int,
        reward_range: float = 1.0,
        exploration: float = math.sqrt(2.0),
        discount: float = 1.0,
    ) -> None:
        super().__init__(num_strategies, discount)
        self.reward_range, self.exploration = float(reward_range), float(exploration)
        self.settings = {
            "num_strategies": self.num_strategies,
            "reward_range": self.reward_range,
            "exploration": self.exploration,
            "discount": self.discount,
        }

    def bounds(self) -> Tensor:
        """Upper confidence bounds; infinite for untried strategies; float32 (num_rows, K)."""
        # mean + c * range * sqrt(ln t / n)
        log_t = self.count.sum(dim=1, keepdim=True).clamp(min=1.0).log()
        count = torch.where(self.count > 0, self.count, 1.0)
        bound = self._mean() + self.exploration * self.reward_range * (log_t / count).sqrt()
        return torch.where(self.count == 0, torch.inf, bound)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """The highest upper confidence bound; untried strategies come first."""
        return best_of(self.bounds(), action_mask)


class GaussianThompson(_PerUser):
    """Thompson sampling with independent normal beliefs about each strategy's mean reward.

    Args:
        num_strategies: K.
        seed: Of the posterior draws.
        prior_mean: Expected reward of a request before the first one.
        prior_std: Its uncertainty.
        noise_std: Deviation of one request's reward around the user's mean.
        draws: Posterior draws that the probabilities are shares of.
        discount: Weight of an answer one request later; 1 = for ever.
    """

    def __init__(
        self,
        num_strategies: int,
        seed: int,
        *,
        prior_mean: float = 0.0,
        prior_std: float = 1.0,
        noise_std: float = 1.0,
        draws: int = 64,
        discount: float = 1.0,
    ) -> None:
        super().__init__(num_strategies, discount)
        self.seed, self.draws = int(seed), int(draws)
        self.prior_mean, self.prior_std, self.noise_std = float(prior_mean), float(prior_std), float(noise_std)
        self.settings = {
            "num_strategies": self.num_strategies,
            "seed": self.seed,
            "prior_mean": self.prior_mean,
            "prior_std": self.prior_std,
            "noise_std": self.noise_std,
            "draws": self.draws,
            "discount": self.discount,
        }

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the belief about every strategy; float32 (num_rows, K) each."""
        precision = self.prior_std**-2 + self.count * self.noise_std**-2
        mean = (self.prior_mean * self.prior_std**-2 + self.total * self.noise_std**-2) / precision
        return mean, precision.rsqrt()

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """How often each strategy is the best in a posterior draw."""
        mean, std = self.posterior()
        keys = draw_keys(self.seed, "gaussian", self.served, self.draws, self.num_strategies)
        return win_shares(mean[:, None] + std[:, None] * normal(keys), action_mask)


class BetaThompson(_PerUser):
    """Thompson sampling with Beta(1, 1) beliefs; a reward counts as a fraction of success, (reward - low) / range.

    A request is one Bernoulli trial in the classical rule. But an answer that is a fraction tells more than a coin does: the
    reward of a slate of S items is S trials. Counted as one, beliefs stay far wider than the data, and the rule goes on trying
    others long after it could know better. `trials` is how many one request is worth (the inverse dispersion of a
    quasi-binomial likelihood: p (1 - p) over the variance of the fraction).

    Args:
        num_strategies: K.
        seed: Of the posterior draws.
        reward_range: From the reward of a useless request to that of a perfect one; what lies outside is clipped.
        draws: Posterior draws that the probabilities are shares of.
        discount: Weight of an answer one request later; 1 = for ever.
        reward_low: Reward of a useless request.
        trials: Bernoulli trials that one request is worth.
    """

    def __init__(
        self,
        num_strategies: int,
        seed: int,
        *,
        reward_range: float = 1.0,
        draws: int = 16,
        discount: float = 1.0,
        reward_low: float = 0.0,
        trials: float = 1.0,
    ) -> None:
        super().__init__(num_strategies, discount)
        if reward_range <= 0.0 or trials <= 0.0:
            raise ValueError(f"reward_range is {reward_range} and trials {trials}; expected numbers above 0")
        self.seed, self.draws, self.reward_range = int(seed), int(draws), float(reward_range)
        self.reward_low, self.trials = float(reward_low), float(trials)
        self.settings = {
            "num_strategies": self.num_strategies,
            "seed": self.seed,
            "reward_range": self.reward_range,
            "draws": self.draws,
            "discount": self.discount,
            "reward_low": self.reward_low,
            "trials": self.trials,
        }

    def observe(self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor) -> None:
        """Adds the clipped fraction of a success."""
        super().observe(obs, action, ((reward - self.reward_low) / self.reward_range).clamp(0.0, 1.0), alive)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Parameters a and b of the Beta belief about every strategy; float32 (num_rows, K) each."""
        return 1.0 + self.trials * self.total, 1.0 + self.trials * (self.count - self.total)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """How often each strategy is the best in a posterior draw."""
        a, b = self.posterior()
        # Beta(a, b) = Ga / (Ga + Gb) of two gamma draws
        keys = [
            draw_keys(self.seed, f"beta {side}", self.served, self.draws, self.num_strategies)
            for side in ("successes", "failures")
        ]
        win, loss = gamma_draws(keys[0], a[:, None]), gamma_draws(keys[1], b[:, None])
        return win_shares(win / (win + loss), action_mask)


def gamma_draws(key: Tensor, shape: Tensor) -> Tensor:
    """Gamma(shape, 1) draws for shape >= 1 from int64 keys; the two broadcast together.

    Marsaglia and Tsang's squeeze with four tries, each a function of the key; all four are refused with a probability below
    1e-5, and then the last one stands.
    """
    d = shape - 1.0 / 3.0
    c = (9.0 * d).rsqrt()
    result = torch.ones((), device=key.device)
    accepted = torch.zeros((), dtype=torch.bool, device=key.device)
    for attempt in range(4):
        x = normal(fold_in(key, 2 * attempt))
        u = uniform(fold_in(key, 2 * attempt + 1))
        v = (1.0 + c * x) ** 3
        positive = v.clamp(min=1e-12)
        good = (v > 0) & (u.clamp(min=1e-12).log() < 0.5 * x * x + d * (1.0 - v + positive.log()))
        result = torch.where(accepted, result, d * positive)
        accepted = accepted | good
    return result


class Exp3(Saved):
    """Exponential weights for adversarial rewards (Auer, Cesa-Bianchi, Freund and Schapire, 2002, figure 1), a row a user.

    That rule explores with `gamma` for ever. With `rate` it is the anytime form, which settles: request t has the step size
    eta_t = rate * sqrt(ln K / (t K)) (Bubeck and Cesa-Bianchi, 2012, theorem 3.1), weights are exponential in eta_t times the
    whole estimated gain, nothing is chosen uniformly, and the probability that the update divides by is raised by eta_t / 2,
    which bounds its variance instead (implicit exploration: EXP3-IX of Neu, 2015). Gains then count from the mean that the row
    has seen, a baseline known before the choice: estimates become less noisy, and a strategy that is out of service neither
    gains nor loses.

    Its update divides by the probability with which the strategy was chosen. `observe` takes it from `probs`; without that it
    is the probability of the latest `action_probs`, so feedback that comes after further choices must bring its own.

    Args:
        num_strategies: K.
        gamma: Share of uniform exploration in (0, 1]; it is the step size too. Not used with `rate`.
        reward_low: Reward that counts as 0; what lies below is clipped.
        reward_high: Reward that counts as 1; what lies above is clipped.
        rate: Factor of the falling step size; None keeps `gamma`.
    """

    ROWS = ("log_weight", "last_probs", "served", "total")

    def __init__(
        self,
        num_strategies: int,
        gamma: float = 0.1,
        *,
        reward_low: float = 0.0,
        reward_high: float = 1.0,
        rate: float | None = None,
    ) -> None:
        if not 0.0 < gamma <= 1.0 or reward_high <= reward_low:
            raise ValueError(
                f"gamma is {gamma} and rewards lie in [{reward_low}, {reward_high}]; expected gamma in (0, 1] and low < high"
            )
        if rate is not None and rate <= 0.0:
            raise ValueError(f"rate is {rate}, expected a number above 0, or None for a step size of gamma")
        self.num_strategies, self.gamma, self.rate = int(num_strategies), float(gamma), rate
        self.reward_low, self.reward_high = float(reward_low), float(reward_high)
        self.settings = {
            "num_strategies": self.num_strategies,
            "gamma": self.gamma,
            "reward_low": self.reward_low,
            "reward_high": self.reward_high,
            "rate": self.rate,
        }
        self.begin(0)

    def begin(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        """Equal weights in every row."""
        self.log_weight = torch.zeros(num_rows, self.num_strategies, device=device)
        self.last_probs = torch.full_like(self.log_weight, 1.0 / self.num_strategies)
        self.served, self.total = self.log_weight.new_zeros(num_rows), self.log_weight.new_zeros(num_rows)

    def _step(self) -> Tensor:
        """Step size of each row's next request; float32 (num_rows, 1)."""
        k = self.num_strategies
        # eta_t = rate sqrt(ln K / (t K))
        falling: Tensor = math.log(k) / k / (self.served[:, None] + 1.0)
        return falling.sqrt() * (self.rate or 0.0)

    def action_probs(self, obs: Tensor, action_mask: Tensor) -> Tensor:
        """(1 - gamma) by weight, gamma uniform, both over the available strategies."""
        if self.rate is not None:
            # with a rate, log_weight holds gains that the step size of the day multiplies
            gains = (self._step() * self.log_weight).masked_fill(~action_mask, -torch.inf)
            self.last_probs = torch.softmax(gains, dim=1)
            return self.last_probs
        by_weight = torch.softmax(self.log_weight.masked_fill(~action_mask, -torch.inf), dim=1)
        self.last_probs = (1.0 - self.gamma) * by_weight + self.gamma * masked_uniform(action_mask)
        return self.last_probs

    def observe(
        self, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor, *, probs: Tensor | None = None
    ) -> None:
        """Moves the weight of what was served.

        Args:
            obs: Not looked at.
            action: int64 (num_rows,).
            reward: float32 (num_rows,).
            alive: bool (num_rows,).
            probs: float32 (num_rows, K), what `action_probs` had returned for this request; None = its latest answer.
        """
        chosen = (self.last_probs if probs is None else probs).gather(1, action[:, None])
        gain = ((reward.to(torch.float32) - self.reward_low) / (self.reward_high - self.reward_low)).clamp(0.0, 1.0)
        on = alive.to(torch.float32)
        if self.rate is not None:
            # half of the range stands for one answer, so that the first gains are not 0
            baseline = (self.total + 0.5) / (self.served + 1.0)
            # G_a += (x_a - baseline) / (p_a + eta_t / 2)
            estimate = (gain - baseline)[:, None] / (chosen + 0.5 * self._step())
            self.log_weight = self.log_weight + one_hot_probs(action, self.num_strategies) * on[:, None] * estimate
            self.served, self.total = self.served + on, self.total + on * gain
            return
        # w_a *= exp(gamma * (x_a / p_a) / K), 0 for the others
        step = self.gamma * gain[:, None] / (chosen * self.num_strategies)
        served = one_hot_probs(action, self.num_strategies) * on[:, None]
        self.log_weight = self.log_weight + served * step
