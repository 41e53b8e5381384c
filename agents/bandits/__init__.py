"""Bandits over strategies, all batched: row i is a user; masks are kept; they return probabilities and the caller samples.

| file | bandits | learns from training users | learns inside the episode |
|---|---|---|---|
| `per_user` | epsilon-greedy, softmax, Boltzmann-Gumbel, UCB1, Thompson, EXP3 | nothing | each user's own means |
| `linear` | LinUCB and LinTS, disjoint and hybrid | one model, shared by all users | it goes on, or is frozen |
| `neural` | neural-linear Thompson | a network and a Bayesian head per strategy | the head goes on for each user |
| `population` | UCB and Thompson with the population's prior | how users' means are distributed | the posterior for the user |
| `hierarchical` | the same around a prediction from the observation | regressions, what users differ in | the posterior |
| `tuned` | the hierarchical bandit, everything chosen on training users | which settings serve best | the posterior |

`observe` takes the observation that the choice was made with, so feedback may come any number of requests later and in batches,
as long as a row's answers keep their order. Thompson sampling returns how often a strategy wins among a fixed number of posterior
draws, which are keyed by (seed, request, draw, strategy) and shared by the rows: the same user gets the same probabilities in any
batch. `save` and `load_bandit` write and read safetensors with a JSON header.
"""

from agents.bandits.hierarchical import Features, HierarchicalUcb, PriorBandit, Served, restart, serve
from agents.bandits.lessons import BANDITS
from agents.bandits.linear import HybridLinTs, HybridLinUcb, LinTs, LinUcb
from agents.bandits.neural import NeuralLinear
from agents.bandits.per_user import (
    BetaThompson,
    BoltzmannGumbel,
    EpsilonGreedy,
    Exp3,
    GaussianThompson,
    Softmax,
    Ucb1,
    gamma_draws,
)
from agents.bandits.population import PopulationThompson, PopulationUcb
from agents.bandits.shared import best_of, load_bandit
from agents.bandits.tuned import learn_tuned

__all__ = [
    "BANDITS",
    "BetaThompson",
    "BoltzmannGumbel",
    "EpsilonGreedy",
    "Exp3",
    "Features",
    "GaussianThompson",
    "HierarchicalUcb",
    "HybridLinTs",
    "HybridLinUcb",
    "LinTs",
    "LinUcb",
    "NeuralLinear",
    "PopulationThompson",
    "PopulationUcb",
    "PriorBandit",
    "Served",
    "Softmax",
    "Ucb1",
    "best_of",
    "gamma_draws",
    "learn_tuned",
    "load_bandit",
    "restart",
    "serve",
]
