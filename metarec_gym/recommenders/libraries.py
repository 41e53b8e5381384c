"""Models of outside libraries as strategies: `implicit`, and `cornac` (extra `recommenders`).

A library's model knows users by number and keeps what it learned of each. A strategy knows no users: the model is fitted on
fold S, its *item* side is frozen into one of the forms that this package scores with anyway, and the history folds in.

| library | model | frozen into | user at scoring time |
|---|---|---|---|
| implicit | `AlternatingLeastSquares` | `Als` | exact: what the library's `recalculate_user` solves |
| implicit | `ItemItemRecommender` (cosine, TF-IDF, BM25) | `ItemKnn` | exact: sum over the whole history, as the library scores |
| implicit | `BayesianPersonalizedRanking`, `LogisticMatrixFactorization` | `Bpr` | one Newton step of the logistic loss |
| cornac | `EASE` | `Ease` | exact: x B |
| cornac | `BPR`, `WBPR`, `MMMF` | `Bpr` | one Newton step of the logistic loss |
| cornac | `HPF` | `Als` with alpha 1, l2 1 | least squares on the item factors |

"Exact" forms rank as the library does. The others replace a trained user factor by a folded-in one, which no library has for
a user it never met: another estimator, often a better one.

Not taken: what needs the training users at scoring time (`UserKNN`), what fits ratings, of which a log of events has only one
value (cornac's `MF`, `PMF`, `NMF`, `SVD`, `ItemKNN`, whose cosine over common users is then 1 for every pair), and networks;
bring those in by a class of your own, or by their lists (`Precomputed`).
"""

from __future__ import annotations

import copy
import importlib
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metarec_gym.recommenders.base import JSON, FitRows, Strategy
from metarec_gym.recommenders.factorization import Als, Bpr, library_seed
from metarec_gym.recommenders.neighbours import EASE_MAX_ITEMS, Ease, ItemKnn

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

Form = Als | Bpr | ItemKnn | Ease
_FORMS: dict[str, type[Form]] = {kind.__name__: kind for kind in (Als, Bpr, ItemKnn, Ease)}


class LibraryModel(Strategy):
    """What the adapters share: a model that is fitted on fold S (or came fitted), and the form that it is frozen into."""

    kind: ClassVar[str] = "library"
    form: Form

    def __init__(self, name: str, model: Any, form: Form) -> None:
        super().__init__(name)
        self._model = model
        self.form = form
        self._outside = model is not None and self._is_fitted(model)
        self._item_ids: list[str] = []

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        if self._model is None:
            raise RuntimeError(
                f"strategy {self.name!r} was loaded: its tensors are here, its model is not; give the model again"
            )
        if isinstance(self.form, Ease) and rows.n_items > EASE_MAX_ITEMS:
            raise ValueError(
                f"an item x item matrix takes at most {EASE_MAX_ITEMS} items, came {rows.n_items}; leave it out"
            )
        if self._outside:
            model, column = self._model, {item: number for number, item in enumerate(self._item_ids)}
            place = torch.tensor([column.get(item, -1) for item in dataset.item_ids.tolist()])
            if not bool((place >= 0).any()):
                raise ValueError(
                    f"strategy {self.name!r}: no item of the fitted model is an item of the log, with ids like "
                    f"{dataset.item_ids[:3].tolist()}"
                )
            seen = place >= 0
        else:
            from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

            # one thread: repeatable, and the libraries warn of nested threads
            with threadpool_limits(1, "blas"):
                model = self._trained(rows, library_seed(seed))
            place, seen = torch.arange(rows.n_items), rows.counts() > 0
        self._freeze(model, place, seen)
        self.form.popularity = self.popularity
        self.form.eval()

    def report(self) -> dict[str, JSON]:
        """Says of a model that came fitted that nobody here knows on whom."""
        return {"fitted": "elsewhere, on users that this world cannot name"} if self._outside else {}

    def _score(self, histories: Tensor) -> Tensor:
        return self.form._score(histories)

    def _flops(self) -> float:
        return self.form._flops()

    def _settings(self) -> dict[str, JSON]:
        return {"form": self.form.describe()}

    def _inputs(self) -> Iterator[bytes]:
        from scipy.sparse import csr_matrix

        # the library's own settings, and what a fitted model has learned
        for key, value in sorted(vars(self._model).items()) if self._model is not None else ():
            if value is None or isinstance(value, bool | int | float | str):
                yield f"{key}={value!r}".encode()
            elif isinstance(value, np.ndarray):
                yield key.encode() + value.tobytes()
            elif isinstance(value, csr_matrix):
                yield key.encode() + value.indices.tobytes() + value.data.tobytes()
        yield "\n".join(self._item_ids).encode()

    @abstractmethod
    def _is_fitted(self, model: Any) -> bool:
        """Whether the model came fitted."""

    @abstractmethod
    def _trained(self, rows: FitRows, seed: int) -> Any:
        """A copy of the model, fitted on `rows`."""

    @abstractmethod
    def _freeze(self, model: Any, place: Tensor, seen: Tensor) -> None:
        """Fills `form` from a fitted model.

        Args:
            model: The fitted model.
            place: int64 (n_items,), where it keeps each item of the log; -1 = nowhere.
            seen: bool (n_items,), the items of which it has learned something.
        """


class ImplicitModel(LibraryModel):
    """Any CPU model of the library `implicit`, with the settings that you gave it; see the table of this module.

        ImplicitModel(AlternatingLeastSquares(factors=64, alpha=20), name="als_64")

    The model is copied, given one thread (so that fits repeat) and, if it has no `random_state`, a seed. A model that is fitted
    already is taken as it is, with `item_ids`. It must not have seen the users of folds A and B, or it knows the future of
    those on whom policies are scored; the world cannot check that and says so.

    Args:
        model: The model, fitted or not.
        name: Name in the pool.
        item_ids: For a fitted model: the log's id of each of its item columns, in order.
        form: What a saved pool hands in instead of the model.
    """

    def __init__(
        self,
        model: Any = None,
        name: str = "implicit",
        item_ids: Sequence[Any] | None = None,
        form: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, model, _implicit_form(model) if form is None else _saved_form(form))
        if self._outside and item_ids is None:
            raise ValueError(
                f"strategy {name!r}: the model is fitted already; give item_ids, the log's id of each of its item columns, or a "
                "model that is not fitted"
            )
        if self._outside and item_ids is not None:
            self._item_ids = [str(item) for item in item_ids]
            n_items = (model.similarity if isinstance(self.form, ItemKnn) else model.item_factors).shape[0]
            if len(self._item_ids) != n_items:
                raise ValueError(
                    f"strategy {name!r}: the model has {n_items} items, came {len(self._item_ids)} item_ids"
                )

    def _is_fitted(self, model: Any) -> bool:
        return getattr(model, "item_factors", None) is not None or getattr(model, "similarity", None) is not None

    def _trained(self, rows: FitRows, seed: int) -> Any:
        model = copy.deepcopy(self._model)
        model.num_threads = 1
        if getattr(model, "random_state", 0) is None:
            model.random_state = seed
        # item-item models want doubles
        events = rows.matrix().astype("float64") if isinstance(self.form, ItemKnn) else rows.matrix()
        with warnings.catch_warnings():
            # they also transpose the matrix and then warn that it is not CSR
            warnings.filterwarnings("ignore", message=".*CSR")
            model.fit(events, show_progress=False)
        return model

    def _freeze(self, model: Any, place: Tensor, seen: Tensor) -> None:
        if isinstance(self.form, ItemKnn):
            chosen = place.clamp(min=0).numpy()
            similarity = model.similarity.tocsr()[chosen][:, chosen].tocoo()
            known = seen.numpy()
            similarity.data = similarity.data * (known[similarity.row] & known[similarity.col])
            self.form.freeze(similarity)
            return
        factor = torch.from_numpy(np.asarray(model.item_factors))[place.clamp(min=0)]
        if isinstance(self.form, Als):
            self.form.freeze(factor, seen)
        elif isinstance(self.form, Bpr):
            # behind the factors: BPR has the bias; LMF has the bias, and ones for the user's bias
            self.form.freeze(*_unknown_as_nothing(factor[:, : model.factors], factor[:, model.factors], seen))


class CornacModel(LibraryModel):
    """One of the models of the library `cornac` in the table of this module, with the settings that you gave it.

        CornacModel(cornac.models.WBPR(k=32), name="wbpr")

    The model is cloned and, if it has no seed, given one. A model that is fitted already is taken as it is, its items found by
    the ids that it was fitted with. It must not have seen the users of folds A and B, or it knows the future of those on whom
    policies are scored; the world cannot check that and says so.

    Args:
        model: The model, fitted or not.
        name: Name in the pool.
        fold_l2: Ridge of the folding-in of a `Bpr` form, in units of the factors' covariance.
        form: What a saved pool hands in instead of the model.

    Raises:
        ImportError: When cornac is not installed.
        ValueError: When the model cannot be a strategy.
    """

    def __init__(
        self,
        model: Any = None,
        name: str = "cornac",
        fold_l2: float = 0.5,
        form: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, model, _cornac_form(model, fold_l2) if form is None else _saved_form(form))
        if self._outside:
            by_column = sorted((number, str(item)) for item, number in model.iid_map.items())
            self._item_ids = [item for _, item in by_column]

    def _is_fitted(self, model: Any) -> bool:
        return bool(model.is_fitted)

    def _trained(self, rows: FitRows, seed: int) -> Any:
        settings: dict[str, Any] = {"verbose": False}
        if getattr(self._model, "seed", 0) is None:
            settings["seed"] = seed
        model = self._model.clone(settings)
        pairs = rows.matrix().tocoo()
        users = OrderedDict((user, user) for user in range(rows.n_users))
        items = OrderedDict((item, item) for item in range(rows.n_items))
        events = (pairs.row.astype("int64"), pairs.col.astype("int64"), pairs.data.astype("float64"))
        data = importlib.import_module("cornac.data").Dataset(
            rows.n_users, rows.n_items, users, items, events, seed=seed
        )
        return model.fit(data)

    def _freeze(self, model: Any, place: Tensor, seen: Tensor) -> None:
        at = place.clamp(min=0)
        if isinstance(self.form, Ease):
            weight = torch.from_numpy(np.asarray(model.B))[at][:, at]
            self.form.freeze(torch.where(seen[:, None] & seen, weight, 0.0))
        elif isinstance(self.form, Als):
            self.form.freeze(torch.from_numpy(np.asarray(model.Beta))[at], seen)
        elif isinstance(self.form, Bpr):
            factor, bias = torch.from_numpy(np.asarray(model.i_factors)), torch.from_numpy(np.asarray(model.i_biases))
            self.form.freeze(*_unknown_as_nothing(factor[at], bias[at], seen))


def _saved_form(description: Mapping[str, Any]) -> Form:
    """The empty form that `Strategy.describe` speaks of."""
    return _FORMS[description["class"]](**description["settings"])


def _implicit_form(model: Any) -> Form:
    """The form for a model of implicit.

    Raises:
        ValueError: When there is none.
    """
    from implicit.cpu.als import AlternatingLeastSquares
    from implicit.cpu.bpr import BayesianPersonalizedRanking
    from implicit.cpu.lmf import LogisticMatrixFactorization
    from implicit.nearest_neighbours import ItemItemRecommender

    if isinstance(model, AlternatingLeastSquares):
        return Als(factors=model.factors, alpha=model.alpha, l2=model.regularization, iterations=model.iterations)
    if isinstance(model, BayesianPersonalizedRanking | LogisticMatrixFactorization):
        return Bpr(factors=model.factors, l2=model.regularization, iterations=model.iterations)
    if isinstance(model, ItemItemRecommender):
        # the library counts an item among its own neighbours
        return ItemKnn(n_neighbours=max(model.K - 1, 1), last_items=None, half_life_items=None)
    raise ValueError(
        f"ImplicitModel takes implicit's CPU models AlternatingLeastSquares, BayesianPersonalizedRanking, "
        f"LogisticMatrixFactorization and ItemItemRecommender, came {type(model).__module__}.{type(model).__name__}; "
        "call to_cpu() on a GPU model"
    )


def _cornac_form(model: Any, fold_l2: float) -> Form:
    """The form for a model of cornac.

    Raises:
        ImportError: When cornac is not installed.
        ValueError: When there is none.
    """
    try:
        models = importlib.import_module("cornac.models")
    except ImportError as error:
        raise ImportError(
            "CornacModel needs the extra 'recommenders'; install it: pip install 'metarec-gym[recommenders]'"
        ) from error
    if isinstance(model, models.EASE):
        return Ease(l2=float(model.lamb))
    # WBPR and MMMF are kinds of BPR
    if isinstance(model, models.BPR):
        return Bpr(factors=model.k, l2=model.lambda_reg, iterations=model.max_iter, fold_l2=fold_l2)
    if isinstance(model, models.HPF):
        return Als(factors=model.k, alpha=1.0, l2=1.0, iterations=model.max_iter)
    raise ValueError(
        f"CornacModel takes cornac's EASE, BPR, WBPR, MMMF and HPF, came {type(model).__name__}: its items cannot be frozen "
        "without its users, or it fits ratings, which events are not; write a Strategy of your own, or bring its lists "
        "(Precomputed)"
    )


def _unknown_as_nothing(factor: Tensor, bias: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors (n_items, d) and biases (n_items,), 0 where not `seen`; and `seen`."""
    return torch.where(seen[:, None], factor, 0.0), torch.where(seen, bias, 0.0), seen
