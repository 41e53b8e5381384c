"""Questions to a language model behind an OpenAI-compatible endpoint: each is asked once, its answer kept in a file.

Part of the strategy in `metarec_gym.recommenders.language_model`; knows nothing of items.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import sqlite3
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from metarec_gym.recommenders.base import JSON

ENDPOINT_VARIABLE = "METAREC_LLM_ENDPOINT"
CHARACTERS_PER_TOKEN = 4.0
"""What a token is counted as where nobody counted it."""
_HOPELESS = 20
"""Requests that may fail one after the other before asking stops: a world full of fallbacks would be its base in disguise."""
_TABLE = (
    "CREATE TABLE IF NOT EXISTS answer (key TEXT PRIMARY KEY, text TEXT, tokens_in INT, tokens_out INT, seconds REAL)"
)

Mode = Literal["live", "replay", "auto"]


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt, and what that took."""

    text: str
    tokens_in: int
    tokens_out: int
    seconds: float


@dataclass
class Completions:
    """Asks `model` and keeps its answers; the arguments are those of `LanguageModelReranker`.

    An answer's key in the file is the SHA-256 of model, system message, prompt and options.
    """

    model: str
    system: str
    cache: Path
    endpoint: str | None
    mode: Mode
    options: Mapping[str, JSON]
    timeout_s: float
    retries: int
    concurrency: int
    key_variable: str
    requests: int = 0
    """Requests sent, whatever came of them; the client's own tries count as one."""
    failures: int = 0
    """Requests that failed after all tries."""
    _failed_in_a_row: int = 0
    _client: Any = None
    _known: dict[str, Answer] = field(default_factory=dict)

    def ask(self, prompts: Iterable[str]) -> dict[str, Answer]:
        """Answers by prompt, from memory, file or endpoint; a prompt whose request failed is left out.

        Raises:
            LookupError: In replay, when an answer is not in the file.
            RuntimeError: When the endpoint refuses, or fails again and again.
            ValueError: When the file is not one of answers.
        """
        keys = {prompt: self._key(prompt) for prompt in prompts}
        unread = {key for key in keys.values() if key not in self._known}
        if unread:
            self._known |= _read(self.cache, unread)
        missing = [prompt for prompt, key in keys.items() if key not in self._known]
        if missing:
            if self.mode == "replay" or (self.mode == "auto" and not os.environ.get(ENDPOINT_VARIABLE)):
                raise LookupError(
                    f"{len(missing)} of {len(keys)} prompts for {self.model!r} have no answer in {self.cache}, and nobody may be "
                    f"asked; ask with mode='live', or name an endpoint: {ENDPOINT_VARIABLE}=http://localhost:8000/v1"
                )
            self._send(missing, keys)
        return {prompt: self._known[key] for prompt, key in keys.items() if key in self._known}

    def _key(self, prompt: str) -> str:
        content = [self.model, self.system, prompt, dict(self.options)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _send(self, prompts: Sequence[str], keys: Mapping[str, str]) -> None:
        try:
            openai = importlib.import_module("openai")
        except ImportError as error:
            raise ImportError(
                "asking a language model needs the extra 'llm'; install it: pip install 'metarec-gym[llm]'"
            ) from error
        if self._client is None:
            self._client = openai.OpenAI(
                base_url=self.endpoint or os.environ.get(ENDPOINT_VARIABLE) or None,
                # the client wants a key even where the server does not
                api_key=os.environ.get(self.key_variable) or "none",
                timeout=self.timeout_s,
                max_retries=self.retries,
            )
        refusals = (
            openai.AuthenticationError,
            openai.PermissionDeniedError,
            openai.NotFoundError,
            openai.BadRequestError,
        )
        with ThreadPoolExecutor(self.concurrency) as threads:
            futures = {threads.submit(self._request, prompt): prompt for prompt in prompts}
            try:
                for future in as_completed(futures):
                    self.requests += 1
                    try:
                        answer = future.result()
                    except refusals as error:
                        raise RuntimeError(
                            f"the endpoint refuses ({error}); check the model {self.model!r}, the options {dict(self.options)} "
                            f"and the key in {self.key_variable}"
                        ) from error
                    except (openai.OpenAIError, ValueError) as error:
                        self._failed(error)
                        continue
                    self._failed_in_a_row = 0
                    key = keys[futures[future]]
                    self._known[key] = answer
                    # one by one: a build that is killed has paid for nothing twice
                    _write(self.cache, key, answer)
            finally:
                threads.shutdown(cancel_futures=True)

    def _request(self, prompt: str) -> Answer:
        """One answer.

        Raises:
            openai.OpenAIError: When the request failed.
            ValueError: When the body is not what the protocol promises.
        """
        begin = time.perf_counter()
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": prompt}]
        reply = self._client.chat.completions.create(model=self.model, messages=messages, **self.options)
        try:
            text, usage = str(reply.choices[0].message.content or ""), reply.usage
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"the answer has no choices[0].message.content: {str(reply)[:80]!r}") from error
        # some servers count no tokens
        tokens_in = usage.prompt_tokens if usage else int((len(self.system) + len(prompt)) / CHARACTERS_PER_TOKEN)
        tokens_out = usage.completion_tokens if usage else int(len(text) / CHARACTERS_PER_TOKEN)
        return Answer(text, tokens_in, tokens_out, time.perf_counter() - begin)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._failed_in_a_row += 1
        what = f"{type(error).__name__}: {error}"
        if self.failures == 1:
            warnings.warn(
                f"a request to {self.model!r} failed ({what}); its list stays as it was, further failures are only counted",
                stacklevel=2,
            )
        if self._failed_in_a_row >= _HOPELESS:
            raise RuntimeError(
                f"{self._failed_in_a_row} requests to {self.model!r} failed in a row, the last with {what}; check the endpoint "
                f"and start again: the answers so far are kept in {self.cache}"
            ) from error


def parse_ranking(text: str, n_candidates: int) -> list[int]:
    """The places of the candidates (from 0) in the order of an answer; unknown and repeated numbers are dropped.

    What a model thinks aloud (`<think>...</think>`) is not read. Then count: the longest JSON list of numbers if there is one;
    else the numbers that lines begin with, if two lines or more do (the titles behind them may hold numbers of their own); else
    all numbers.
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    leading = re.findall(r"^\W*(\d+)\b(?!\s*,)", text, re.MULTILINE)
    listed = max(re.findall(r"\[[\s\d,\"']*\d[\s\d,\"']*\]", text), key=len, default="")
    numbers = leading if len(leading) > 1 and not listed else re.findall(r"\d+", listed or text)
    places = (int(number) - 1 for number in numbers if len(number) < 10)
    return list(dict.fromkeys(place for place in places if 0 <= place < n_candidates))


def _read(cache: Path, keys: Iterable[str]) -> dict[str, Answer]:
    """The answers that the file has; none if there is no file."""
    if not cache.is_file():
        return {}
    query = "SELECT text, tokens_in, tokens_out, seconds FROM answer WHERE key = ?"
    try:
        # read-only: the path may come from somebody else's folder
        with closing(sqlite3.connect(f"{cache.resolve().as_uri()}?mode=ro", uri=True, timeout=60.0)) as store:
            rows = ((key, store.execute(query, (key,)).fetchone()) for key in keys)
            return {key: Answer(*row) for key, row in rows if row is not None}
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{cache} is not a file of a language model's answers ({error}); name another cache"
        ) from error


def _write(cache: Path, key: str, answer: Answer) -> None:
    """Keeps one answer: a transaction is whole or not there, and processes wait for each other."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(cache, timeout=60.0)) as store, store:
        store.execute(_TABLE)
        row = (key, answer.text, answer.tokens_in, answer.tokens_out, answer.seconds)
        store.execute("INSERT OR IGNORE INTO answer VALUES (?, ?, ?, ?, ?)", row)
