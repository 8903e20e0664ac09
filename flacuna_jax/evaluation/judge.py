"""Judges, which review answers: a server with OpenAI's chat API, or a model of this package.

Requests have temperature 0. Answers of a server are kept in a transcript, which is also a cache: the server is not
asked again for a review in the transcript.
"""

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from flacuna_jax.data.conversation import Template, Turn
from flacuna_jax.data.tokenization import tokenize_prompt
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.cache import Store
from flacuna_jax.generation.language_model import GenerationRequest, LanguageModel

FILTERED = "The response was filtered"
"""Replaces a review that the server's content filter withheld, as in the original."""
RETRIED = (408, 409, 425, 429, *range(500, 600))


class Judge(Protocol):
    @property
    def name(self) -> str: ...

    def review(self, prompts: Sequence[str]) -> list[str]:
        """One answer per prompt, in the order of the prompts."""
        ...


@dataclass(frozen=True)
class ServerJudge:
    """A server with OpenAI's chat API. `url` is the base of the API, as in http://localhost:8000/v1. Retries wait 1, 2,
    4, ... seconds, or as long as the server's Retry-After header requires."""

    url: str
    model: str
    store: Store
    key: str | None = None
    retries: int = 6
    timeout: float = 120.0
    parallel: int = 4
    max_tokens: int = 128
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False)

    def __post_init__(self) -> None:
        address = urllib.parse.urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UserError(
                f"the judge's URL is {self.url!r}; expected the base of the API, as in http://localhost:8000/v1"
            )

    @property
    def name(self) -> str:
        return self.model

    def review(self, prompts: Sequence[str]) -> list[str]:
        """Raises UserError if the server cannot be reached, or rejects a request."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._review, prompts))

    def _review(self, prompt: str) -> str:
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        key = hashlib.sha256(json.dumps([self.url, request], sort_keys=True).encode()).hexdigest()
        known = self.store.get(key)
        if known is not None:
            return str(known["review"])
        review = self._ask(request)
        self.store.put(key, {"url": self.url, "request": request, "review": review})
        return review

    def _ask(self, request: dict[str, Any]) -> str:
        wrong = "no answer"
        for attempt in range(self.retries + 1):
            wait = 2.0**attempt
            try:
                review = _content(self._post(request))
                if review:
                    return review
                wrong = "an empty answer"
            except urllib.error.HTTPError as error:
                detail = error.read(2000).decode("utf-8", "replace")
                if "content_filter" in detail or "content management policy" in detail:
                    return FILTERED
                if error.code not in RETRIED:
                    raise UserError(f"the judge at {self.url} rejects it (HTTP {error.code}): {detail[:300]}") from None
                wrong, wait = f"HTTP {error.code}", _retry_after(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException, ValueError) as error:
                # A broken connection, or an answer that is not HTTP or not JSON.
                wrong = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                self.sleep(wait)
        raise UserError(f"the judge at {self.url} gave {wrong}, {self.retries + 1} times; its earlier reviews are kept")

    def _post(self, request: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = self.url.rstrip("/") + "/chat/completions"
        message = urllib.request.Request(address, json.dumps(request).encode(), headers)
        with urllib.request.urlopen(message, timeout=self.timeout) as response:
            return json.load(response)


def _retry_after(stated: str | None, default: float) -> float:
    try:
        return max(0.0, min(float(default if stated is None else stated), 120.0))
    except ValueError:
        return default


def _content(response: Any) -> str:
    """The review in a response. Raises ValueError if the response has another structure."""
    try:
        choice = response["choices"][0]
        if choice.get("finish_reason") == "content_filter":
            return FILTERED
        return str(choice["message"]["content"] or "").strip()
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"a response without choices[0].message.content: {json.dumps(response)[:200]}") from None


@dataclass(frozen=True)
class ModelJudge:
    """A model of this package as the judge, with a conversation template and greedy decoding."""

    model: LanguageModel
    template: Template
    max_new_tokens: int = 128

    @property
    def name(self) -> str:
        return self.model.name

    def review(self, prompts: Sequence[str]) -> list[str]:
        """Raises UserError if an answer to be reviewed does not fit the judge's context."""
        asked = [tuple(tokenize_prompt([Turn("user", p)], self.template, self.model.tokenizer)) for p in prompts]
        longest, context = max(map(len, asked), default=0), self.model.context_length
        if longest + self.max_new_tokens > context:
            raise UserError(
                f"the judge {self.name} has a context of {context} tokens; the longest prompt has {longest} tokens, "
                f"and a review takes up to {self.max_new_tokens}"
            )
        stop, ends = self.template.stop_strings, self.template.ends
        requests = [GenerationRequest(ids, self.max_new_tokens, stop, ends=ends) for ids in asked]
        return [generation.text for generation in self.model.generate(requests)]
