"""From a log of what users did to tensors: validation, cleaning, folds, sessions, privacy, and a synthetic log."""

from metarec_gym.data.dataset import Dataset, encode
from metarec_gym.data.impressions import ImpressionTable, load_open_bandit
from metarec_gym.data.interactions import CleaningStep, InteractionLog, id_strings, parse_times
from metarec_gym.data.privacy import erase_user, minimise, pseudonym, pseudonymise, read_key, write_key
from metarec_gym.data.sessions import SESSION_GAP_S, SessionGap, fit_session_gap, sessions_by_gap, sessions_by_id
from metarec_gym.data.splits import FOLD_A, FOLD_B, FOLD_S, assign_folds, engaged_before
from metarec_gym.data.synthetic import BehaviourTruth, SyntheticTruth, behaviour_log, synthetic_log

__all__ = [
    "FOLD_A",
    "FOLD_B",
    "FOLD_S",
    "SESSION_GAP_S",
    "BehaviourTruth",
    "CleaningStep",
    "Dataset",
    "ImpressionTable",
    "InteractionLog",
    "SessionGap",
    "SyntheticTruth",
    "assign_folds",
    "behaviour_log",
    "encode",
    "engaged_before",
    "erase_user",
    "fit_session_gap",
    "id_strings",
    "load_open_bandit",
    "minimise",
    "parse_times",
    "pseudonym",
    "pseudonymise",
    "read_key",
    "sessions_by_gap",
    "sessions_by_id",
    "synthetic_log",
    "write_key",
]
