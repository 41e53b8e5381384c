"""A large language model as a strategy: it re-ranks the candidates of another one (extra `llm`).

Nothing else imports this module; a pool that holds such a strategy does.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from metarec_gym.recommenders.base import JSON, Cost, FitRows
from metarec_gym.recommenders.completions import CHARACTERS_PER_TOKEN, Completions, Mode, parse_ranking
from metarec_gym.recommenders.hybrid import Reranker

if TYPE_CHECKING:
    from metarec_gym.data.dataset import Dataset

SYSTEM = (
    "You rank items for one user by what the user took before. Answer with the numbers of all candidates, best first, "
    "separated by commas, and nothing else."
)
ITEM_CHARACTERS = 80
"""Longest description of an item in a prompt."""


class LanguageModelReranker(Reranker):
    """Re-ranks the best candidates of `base` by asking a language model behind an OpenAI-compatible endpoint.

    A hosted model or a local one: vLLM, llama.cpp, Ollama and LM Studio serve the same protocol
    (`endpoint="http://localhost:8000/v1"`), and then no history leaves the machine. Otherwise the titles of what a user took are
    sent to whoever runs the endpoint, without any user id.

    The prompt is `SYSTEM`, then the titles and categories of the newest items of the history, oldest first, then the numbered
    candidates:

        Taken, oldest first:
        - Alien (1979) Horror Sci-Fi
        Candidates:
        1. Heat (1995) Action Crime
        2. Aliens (1986) Action Sci-Fi

    See Hou et al., "Large language models are zero-shot rankers for recommender systems", ECIR 2024. The numbers are read from
    the answer by `parse_ranking`; candidates that it leaves out follow in the order of the base. So an answer can order the
    candidates and do nothing else, whatever an item's title says. Items behind the candidates keep the base's order down to
    `depth`; users without history keep it altogether and are not asked about.

    Every answer is kept in `cache`, an SQLite file: the same question is paid once, and `mode="replay"` builds a world again,
    without network, from that file alone. A request that fails (timeout, server error, an unreadable body, after `retries` tries
    with the client's backoff) falls back to the base's order and is counted; so is an answer without a single valid number.
    `report` has the counts, a world keeps them in `metrics["strategies"]`, and the first failure warns. A refusal (wrong key,
    unknown model) raises at once, and so do 20 failures in a row.

    **A saved world keeps neither key nor endpoint, and a loaded one calls nobody by itself:** it replays, unless the environment
    variable `METAREC_LLM_ENDPOINT` names an endpoint to ask, or `Pool.load(folder, given=[...])` is handed a strategy that asks.

    Args:
        model: The model's name at the endpoint.
        cache: SQLite file of the answers; made when the first one comes.
        base: The strategy whose candidates it re-ranks.
        name: Name in the pool.
        candidates: How many of the base's items it orders.
        history_items: How many of the newest items of the history it is told.
        endpoint: Base URL of the service, e.g. http://localhost:8000/v1; None takes `METAREC_LLM_ENDPOINT`, then the client's own
            default.
        mode: "live" asks what the cache does not know; "replay" refuses to; "auto" asks only if `METAREC_LLM_ENDPOINT` is set.
        price_per_1k_in: Price of 1,000 tokens of prompt.
        price_per_1k_out: Price of 1,000 tokens of answer.
        n_parameters: Size of the model, for `Cost.flops`: 2 operations per parameter and token (Kaplan et al., "Scaling laws for
            neural language models", 2020). A guess where the vendor does not tell.
        options: Further fields of the request; part of the cache key.
        timeout_s: Longest wait for one try, in seconds.
        retries: Tries after the first.
        concurrency: Requests in flight at a time.
        depth: How far down the base's list its order is kept.
        key_variable: Environment variable that holds the key; a local server needs none.
    """

    kind: ClassVar[str] = "language_model"
    text: Tensor
    text_end: Tensor

    def __init__(
        self,
        model: str,
        cache: str | Path,
        base: str = "ease",
        name: str = "language_model",
        *,
        candidates: int = 20,
        history_items: int = 15,
        endpoint: str | None = None,
        mode: Mode = "live",
        price_per_1k_in: float = 0.0,
        price_per_1k_out: float = 0.0,
        n_parameters: float = 8e9,
        options: Mapping[str, JSON] | None = None,
        timeout_s: float = 30.0,
        retries: int = 2,
        concurrency: int = 4,
        depth: int = 300,
        key_variable: str = "OPENAI_API_KEY",
    ) -> None:
        super().__init__(name, (base,), max(depth, candidates))
        if mode not in ("live", "replay", "auto") or candidates < 2 or history_items < 1 or concurrency < 1:
            raise ValueError(
                "expected mode 'live', 'replay' or 'auto', candidates >= 2, history_items >= 1 and concurrency >= 1; came "
                f"{mode!r}, {candidates}, {history_items} and {concurrency}"
            )
        self.candidates = candidates
        self.history_items = history_items
        self.price_per_1k_in = price_per_1k_in
        self.price_per_1k_out = price_per_1k_out
        self.n_parameters = n_parameters
        self.service = Completions(
            model=model,
            system=SYSTEM,
            cache=Path(cache),
            endpoint=endpoint,
            mode=mode,
            options={"temperature": 0.0} if options is None else dict(options),
            timeout_s=timeout_s,
            retries=retries,
            concurrency=concurrency,
            key_variable=key_variable,
        )
        self._reset_counts()
        # the items' descriptions as UTF-8, one after the other, and where each ends: a pool holds tensors only
        self.register_buffer("text", torch.zeros(0, dtype=torch.uint8))
        self.register_buffer("text_end", torch.zeros(0, dtype=torch.int64))
        self._texts: tuple[str, ...] = ()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """See `Strategy.from_settings`; a saved pool decides neither whom this machine asks nor that it asks.

        Raises:
            ValueError: When the settings name an endpoint, a key or anything else that is not saved.
        """
        saved = cls(model="", cache="")._settings().keys() | {"name"}
        if settings.keys() - saved or settings.get("mode") != "auto":
            raise ValueError(
                f"the saved strategy {settings.get('name')!r} has mode {settings.get('mode')!r} and settings "
                f"{sorted(settings.keys() - saved)}, which this class never saves; do not trust the folder that it is from"
            )
        return cls(**settings)

    def _reset_counts(self) -> None:
        # lists that an answer decided, from the cache or not, and the tokens and seconds of those answers
        self.ranked = self.unusable = self.tokens_in = self.tokens_out = 0
        self._seconds_answered = 0.0

    def _fit(self, rows: FitRows, dataset: Dataset, seed: int) -> None:
        super()._fit(rows, dataset, seed)
        if not any(text.strip() for text in dataset.item_text):
            raise ValueError(
                f"strategy {self.name!r} has nothing to read: the items have neither title nor categories; prepare the log with "
                "an item table"
            )
        parts = [
            # one line an item, whatever its title holds
            (" ".join(text.split()) or f"item {item_id}")[:ITEM_CHARACTERS].encode()
            for text, item_id in zip(dataset.item_text, dataset.item_ids.tolist(), strict=True)
        ]
        self.text = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
        self.text_end = torch.tensor([len(part) for part in parts]).cumsum(0)
        self._texts = ()
        self._reset_counts()

    def rerank(self, histories: Tensor, lists: Sequence[Tensor]) -> Tensor:
        """The base's list, its head in the order of the answers; see `Reranker.rerank`.

        Raises:
            LookupError: When an answer is not in the cache and nobody may be asked.
            RuntimeError: When the endpoint refuses, or fails again and again.
        """
        (base,) = lists
        ordered = base.clone()
        heads = [[item for item in head if item >= 0] for head in base[:, : self.candidates].tolist()]
        prompts: dict[int, str] = {}
        for row, (history, head) in enumerate(zip(histories.tolist(), heads, strict=True)):
            taken = [item for item in history if item >= 0]
            # without a history, or a choice, there is nothing to ask
            if taken and len(head) > 1:
                prompts[row] = self.prompt(taken, head)
        answers = self.service.ask(dict.fromkeys(prompts.values()))
        for row, prompt in prompts.items():
            if (answer := answers.get(prompt)) is None:
                continue
            head, ranking = heads[row], parse_ranking(answer.text, len(heads[row]))
            self.ranked += 1
            self.unusable += not ranking
            self.tokens_in += answer.tokens_in
            self.tokens_out += answer.tokens_out
            self._seconds_answered += answer.seconds
            places = dict.fromkeys([*ranking, *range(len(head))])
            ordered[row, : len(head)] = torch.tensor([head[place] for place in places], device=base.device)
        # scores fall by one from place to place; what is not listed follows by popularity
        value = torch.arange(ordered.shape[1], 0, -1, device=base.device, dtype=torch.float32).expand(ordered.shape)
        scores = torch.nn.functional.pad((self.popularity - 1.0).expand(len(base), -1), (0, 1))
        column = torch.where(ordered >= 0, ordered, self.n_items)
        return scores.scatter(1, column, value)[:, : self.n_items]

    def prompt(self, taken: Sequence[int], offered: Sequence[int]) -> str:
        """The question about one user: items taken, newest last, and candidates, the base's best first."""
        if not self._texts:
            whole, ends = bytes(self.text.cpu().numpy()), [0, *self.text_end.tolist()]
            self._texts = tuple(whole[begin:end].decode() for begin, end in itertools.pairwise(ends))
        lines = ["Taken, oldest first:", *(f"- {self._texts[item]}" for item in taken[-self.history_items :])]
        numbered = (f"{number}. {self._texts[item]}" for number, item in enumerate(offered, start=1))
        return "\n".join([*lines, "Candidates:", *numbered])

    def cost(self) -> Cost:
        """The base's cost and that of one answer: operations on paper, tokens and seconds as measured, cached or not.

        Before anything was ranked the tokens of the money are those on paper too, and the seconds of an answer are left out.
        """
        own = super().cost()
        tokens_in, tokens_out = self._paper_tokens()
        if self.ranked:
            tokens_in, tokens_out = self.tokens_in / self.ranked, self.tokens_out / self.ranked
        return Cost(
            flops=own.flops,
            seconds=own.seconds + self._seconds_answered / max(self.ranked, 1),
            money=own.money + (self.price_per_1k_in * tokens_in + self.price_per_1k_out * tokens_out) / 1000.0,
        )

    def report(self) -> dict[str, JSON]:
        """Requests and failures so far, tokens of the lists that answers decided, money of a request."""
        if not self.ranked and not self.service.requests:
            return {}
        return {
            "lists_ranked": self.ranked,
            "requests_sent": self.service.requests,
            "requests_failed": self.service.failures,
            "answers_unusable": self.unusable,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "money_per_request": self.cost().money,
        }

    def _flops(self) -> float:
        return 2.0 * self.n_parameters * sum(self._paper_tokens())

    def _paper_tokens(self) -> tuple[float, float]:
        """Tokens of a prompt of items of mean length, and of an answer of numbers: the same on every machine."""
        line = 3.0 + len(self.text) / max(self.n_items, 1)
        characters = len(SYSTEM) + line * (self.history_items + self.candidates)
        return characters / CHARACTERS_PER_TOKEN, 2.0 * self.candidates

    def _settings(self) -> dict[str, JSON]:
        return {
            "model": self.service.model,
            "cache": str(self.service.cache),
            "base": self.bases[0],
            "candidates": self.candidates,
            "history_items": self.history_items,
            "mode": "auto",
            "price_per_1k_in": self.price_per_1k_in,
            "price_per_1k_out": self.price_per_1k_out,
            "n_parameters": self.n_parameters,
            "options": dict(self.service.options),
            "depth": self.depth,
        }
