"""What the items say of themselves: text and categories, or any embedding computed elsewhere."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from metarec_gym.recommenders.base import JSON, REFERENCE_LENGTH, FitRows, Strategy, recency_weights, sum_of_rows

if TYPE_CHECKING:
    import numpy as np

    from metarec_gym.data.dataset import Dataset


class Content(Strategy):
    """Cosine between an item and the recency-weighted mean of the history, in the space of the items' own descriptions.

    The space is TF-IDF over `Dataset.item_text` beside TF-IDF over the categories, by scikit-learn (Lops, de Gemmis and
    Semeraro, "Content-based recommender systems: state of the art and trends", 2011), or `embeddings` where they are
    given. An item that nobody in fold S took has a place in it like any other. Plain similarity loves the obscure, and
    many items share a description, so log popularity is added.

    Args:
        name: Name in the pool.
        half_life_items: The k-th newest item weighs 0.5 ** (k / half_life_items); None weighs all alike.
        popularity_weight: Weight of log(1 + events) / log(1 + most events), beside a cosine in [-1, 1].
        category_weight: Length of the category block beside the text block of length 1.
        max_words: Words kept, the most frequent first.
        embeddings: float (n_items, d) in the order of `Dataset.item_ids`, instead of TF-IDF; see `sentence_embeddings`.
    """

    kind: ClassVar[str] = "content"
    knows_unseen_items: ClassVar[bool] = True
    feature: Tensor
    prior: Tensor

    def __init__(
        self,
        name: str = "content",
        half_life_items: float | None = 10.0,
        popularity_weight: float = 1.0,
        category_weight: float = 1.0,
        max_words: int = 1024,
        embeddings: np.ndarray[Any, Any] | Tensor | None = None,
    ) -> None:
        super().__init__(name)
        self.half_life_items = half_life_items
        self.popularity_weight = popularity_weight
        self.category_weight = category_weight
        self.max_words = max_words
        self._embeddings = None if embeddings is None else torch.as_tensor(embeddings).detach().cpu().to(torch.float32)
        # rows of length 1, or 0 for an item that says nothing
        self.register_buffer("feature", torch.zeros(0, 0))
        self.register_buffer("prior", torch.zeros(0))

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        feature = self._tf_idf(dataset) if self._embeddings is None else self._embeddings
        if feature.ndim != 2 or feature.shape[0] != rows.n_items or not bool(torch.isfinite(feature).all()):
            raise ValueError(
                f"embeddings are finite numbers of shape (n_items={rows.n_items}, d) in the order of Dataset.item_ids, "
                f"came shape {tuple(feature.shape)}"
            )
        self.feature = torch.nn.functional.normalize(feature, dim=1)
        count = rows.counts().to(torch.float32)
        self.prior = torch.log1p(count) / torch.log1p(count.max())

    def _tf_idf(self, dataset: Dataset) -> Tensor:
        from sklearn.feature_extraction.text import TfidfTransformer, TfidfVectorizer

        blocks = []
        if any(text.strip() for text in dataset.item_text):
            # a word of one item links it to nothing, unless there are few items
            words = TfidfVectorizer(max_features=self.max_words, min_df=2 if dataset.n_items > 50 else 1)
            # scikit-learn raises where no word occurs twice: then the text links no two items
            with contextlib.suppress(ValueError):
                blocks.append(torch.from_numpy(words.fit_transform(dataset.item_text).toarray()).to(torch.float32))
        if dataset.item_category.shape[1] > 0:
            categories = TfidfTransformer().fit_transform(dataset.item_category.numpy()).toarray()
            blocks.append(self.category_weight * torch.from_numpy(categories).to(torch.float32))
        # without any description every cosine is 0 and popularity alone decides
        return torch.cat(blocks, dim=1) if blocks else torch.zeros(dataset.n_items, 1)

    def _score(self, histories: Tensor) -> Tensor:
        weight = recency_weights(histories, self.half_life_items)
        profile = torch.nn.functional.normalize(sum_of_rows(histories, weight, self.feature), dim=1)
        return profile @ self.feature.T + self.popularity_weight * self.prior

    def _flops(self) -> float:
        return 2.0 * (REFERENCE_LENGTH + self.n_items) * self.feature.shape[1]

    def _settings(self) -> dict[str, JSON]:
        return {
            "half_life_items": self.half_life_items,
            "popularity_weight": self.popularity_weight,
            "category_weight": self.category_weight,
            "max_words": self.max_words,
        }

    def _inputs(self) -> tuple[bytes, ...]:
        return () if self._embeddings is None else (self._embeddings.contiguous().numpy().tobytes(),)


def sentence_embeddings(dataset: Dataset, model: str = "all-MiniLM-L6-v2", device: str = "cpu") -> Tensor:
    """Sentence embeddings of `Dataset.item_text` for `Content(embeddings=...)`; float32 (n_items, d).

    Args:
        dataset: The encoded log; its item texts are read and nothing else.
        model: Name or folder of a sentence-transformers model.
        device: Where to run it.

    Raises:
        ImportError: When the extra is not installed.
    """
    try:
        library = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise ImportError(
            "sentence embeddings need the extra 'content'; install it: pip install 'metarec-gym[content]'"
        ) from error
    vectors = library.SentenceTransformer(model, device=device).encode(list(dataset.item_text), show_progress_bar=False)
    return torch.as_tensor(vectors).to(torch.float32)
