"""Is there anything to win by selecting? Measured before anything is trained, with both directions pooled by user.

Every strategy is played closed-loop from the same start states with the same luck. A first round plays all of them a few
times; a second round, with fresh luck, replays what may still be best in two halves of replicates: the per-user oracle
chooses a strategy for each start state on one half and is scored on the other, then the other way round, because a raw
maximum would mostly reward luck. As the second round grows, strategies that are surely not the best of a start state leave
(one in ten thousand leaves in error); whatever is scored plays on, so leaving biases no value. The single best strategy
(SBS) and the best non-personal rule (SCHED) are chosen on the users of one fold (with its judge) and scored on the users of
the other (with the other judge). Two references stand beside the oracles: one that looks ahead (LOOK) and one that sees
every strategy's answer (FIR), see `references`.
"""

from metarec_gym.evaluation.headroom.found import FoldPlays, Headroom, LookPlays, Sched
from metarec_gym.evaluation.headroom.measure import measure_headroom, play_task
from metarec_gym.evaluation.headroom.rules import (
    choose_sched,
    describe_timed_rule,
    fit_length_rule,
    played_throughout,
    still_racing,
)
from metarec_gym.evaluation.headroom.settings import FOLDS, EvalSettings, env_key, horizons_of

__all__ = [
    "FOLDS",
    "EvalSettings",
    "FoldPlays",
    "Headroom",
    "LookPlays",
    "Sched",
    "choose_sched",
    "describe_timed_rule",
    "env_key",
    "fit_length_rule",
    "horizons_of",
    "measure_headroom",
    "play_task",
    "played_throughout",
    "still_racing",
]
