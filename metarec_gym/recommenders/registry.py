"""What a word stands for in a pool: built-in names, a Parquet file, a class of your own; and what a saved pool may load.

A folder that somebody hands you never decides what code runs. Classes of this package are found by name. A class of
somebody's own is saved as `module:Class`, and loading such a pool works only where that class is trusted already: it was
given to a pool or registered (`register_strategy`) in this process, or the environment variable `METAREC_STRATEGIES` names
it (separated by spaces), so that every command and worker process may import it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from metarec_gym.recommenders.base import Strategy, class_path
from metarec_gym.recommenders.content import Content
from metarec_gym.recommenders.factorization import Als, Bpr
from metarec_gym.recommenders.hybrid import ReciprocalRankFusion
from metarec_gym.recommenders.neighbours import Ease, ItemKnn
from metarec_gym.recommenders.non_personal import LongTail, Popular, Trending
from metarec_gym.recommenders.precomputed import Precomputed
from metarec_gym.recommenders.sequential import SasRec

DEFAULT_POOL = (
    "popular",
    "trending",
    "long_tail",
    "item_knn",
    "ease",
    "als",
    "bpr",
    "content",
    "sasrec",
    "rrf",
)
"""The strategies that a world has if nothing else is said, in the order of their action indices."""

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "popular": Popular,
    "trending": Trending,
    "long_tail": LongTail,
    "item_knn": ItemKnn,
    "ease": Ease,
    "als": Als,
    "bpr": Bpr,
    "content": Content,
    "sasrec": SasRec,
    "rrf": ReciprocalRankFusion,
}
"""What a name stands for, with its default settings."""

TRUST_VARIABLE = "METAREC_STRATEGIES"

_CLASSES: dict[str, type[Strategy]] = {
    kind.__name__: kind
    for kind in (
        Popular,
        Trending,
        LongTail,
        ItemKnn,
        Ease,
        Als,
        Bpr,
        Content,
        SasRec,
        ReciprocalRankFusion,
        Precomputed,
    )
}
_ON_DEMAND = {
    "ImplicitModel": "metarec_gym.recommenders.libraries",
    "CornacModel": "metarec_gym.recommenders.libraries",
    "LanguageModelReranker": "metarec_gym.recommenders.language_model",
}
"""Classes of this package whose modules are imported only by pools that hold one."""
_TRUSTED: dict[str, type[Strategy]] = {}

AnyClass = TypeVar("AnyClass", bound=type[Strategy])


def register_strategy(cls: AnyClass) -> AnyClass:
    """Lets saved pools load `cls`, a strategy class of your own; usable as a decorator, returns `cls`."""
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise TypeError(f"register_strategy takes a subclass of metarec_gym.recommenders.Strategy, came {cls!r}")
    _TRUSTED[class_path(cls)] = cls
    return cls


def make_strategy(word: str | Strategy) -> Strategy:
    """The strategy that a word of a pool stands for.

    | word | strategy |
    |---|---|
    | `ease` | a name of `STRATEGIES` |
    | `production=scores.parquet` | `Precomputed.from_file("scores.parquet", name="production")` |
    | `my_module:MyStrategy` | the class, called without arguments, or the ready strategy of that name; the module is imported |

    Args:
        word: One of the above, or a strategy, which comes back as it is. Its class may be loaded again in this process.

    Raises:
        ValueError: When the word means nothing.
        ImportError: When the module or what is in it cannot be found.
    """
    strategy = _of_word(word) if isinstance(word, str) else word
    if not isinstance(strategy, Strategy):
        raise TypeError(f"a pool holds words and metarec_gym.recommenders.Strategy objects, came {strategy!r}")
    if ":" in class_path(type(strategy)):
        register_strategy(type(strategy))
    return strategy


def _of_word(word: str) -> Strategy:
    if word in STRATEGIES:
        return STRATEGIES[word]()
    name, equals, file = word.partition("=")
    if equals:
        return Precomputed.from_file(file, name=name)
    if ":" not in word:
        raise ValueError(
            f"no strategy is named [{word!r}]; the names are {sorted(STRATEGIES)}, and NAME=FILE.parquet or "
            "MODULE:CLASS bring your own"
        )
    found = _imported(word)
    strategy = found if isinstance(found, Strategy) or not callable(found) else found()
    if not isinstance(strategy, Strategy):
        raise ValueError(
            f"{word} is {found!r}; expected a subclass of metarec_gym.recommenders.Strategy, or one ready made"
        )
    return strategy


def rebuild(description: Mapping[str, Any]) -> Strategy:
    """An empty strategy from `Strategy.describe()`, ready for `load_state_dict`.

    Raises:
        ValueError: When this metarec_gym has no such class, or it is somebody's own and not trusted here.
        ImportError: When `METAREC_STRATEGIES` names it and it cannot be found.
    """
    path = str(description["class"])
    settings = description["settings"]
    if path in _CLASSES:
        return _CLASSES[path].from_settings(settings)
    if path in _ON_DEMAND:
        built: Strategy = getattr(importlib.import_module(_ON_DEMAND[path]), path).from_settings(settings)
        return built
    if ":" not in path:
        raise ValueError(
            f"no strategy class {path!r} here (there are {sorted({*_CLASSES, *_ON_DEMAND})}); upgrade metarec_gym"
        )
    if path not in _TRUSTED and path in os.environ.get(TRUST_VARIABLE, "").split():
        register_strategy(_imported(path))
    if path not in _TRUSTED:
        where = f"import it and call metarec_gym.recommenders.register_strategy, or set {TRUST_VARIABLE}={path}"
        if path.startswith("__main__:"):
            where = "put it into a module (it stood in the script that built this pool) and build again"
        raise ValueError(
            f"strategy {settings.get('name')!r} is of the class {path}, which nobody registered in this process; if you trust "
            f"it, {where}"
        )
    return _TRUSTED[path].from_settings(settings)


def _imported(path: str) -> Any:
    """What `module:name` stands for.

    Raises:
        ImportError: When there is no such module, or nothing of that name in it.
    """
    module_name, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(
            f"the strategy {path!r} cannot be imported ({error}); expected MODULE:CLASS, with the module installed or in the "
            "folder that you run from"
        ) from error
    return found
