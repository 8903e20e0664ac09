"""Answers in OpenAI's form, for completions and chats, whole and in pieces."""

import functools
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.generation.language_model import Generation
from flacuna_jax.serving.jobs import Finished, TokenScore
from flacuna_jax.serving.tools import CallForm

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


class TokenTexts:
    """The text of single tokens, with the spaces in front that decoding a token alone would lose."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", first=False)
        self.of = functools.lru_cache(maxsize=1 << 16)(self._of)

    def _of(self, token: int) -> str:
        special = self._tokenizer.special.spellings.get(token)
        if special is not None:
            return special
        decode = self._tokenizer.decode
        return decode([*self._before, token])[len(decode(self._before)) :]


@dataclass(frozen=True)
class Reply:
    """The parts of an answer that all of its pieces have.

    Attributes:
      likely: number of most likely tokens to report; None reports no scores.
    """

    model: str
    texts: TokenTexts
    likely: int | None
    prefix: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def wrapped(self, kind: str, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        identity = {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return {**identity, "choices": list(choices), **more}


def usage(prompt_tokens: int, finished: Sequence[Finished]) -> dict[str, Any]:
    """`prompt_tokens` counts each prompt once, however many answers it has."""
    new = sum(one.generation.tokens for one in finished)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": min(prompt_tokens, sum(one.shared for one in finished))},
    }


@dataclass(frozen=True)
class CompletionReply(Reply):
    """`echo`: whether the prompt is part of the answer's text."""

    echo: bool = False

    def choice(self, index: int, prompt: Sequence[int], prompt_text: str, finished: Finished) -> dict[str, Any]:
        generation = finished.generation
        scores = list(finished.scores)
        if self.echo and self.likely is not None:
            scores = [TokenScore(prompt[0], None), *finished.prompt_scores, *scores]
        text = (prompt_text if self.echo else "") + generation.text
        logprobs = None if self.likely is None else self._logprobs(scores, self.likely)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": FINISH[generation.finish]}

    def piece(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def end(self, index: int, rest: str, finished: Finished) -> dict[str, Any]:
        """The last piece; scores are part of it."""
        logprobs = None if self.likely is None else self._logprobs(finished.scores, self.likely)
        reason = FINISH[finished.generation.finish]
        return {"index": index, "text": rest, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scores: Sequence[TokenScore], likely: int) -> dict[str, Any]:
        texts = [self.texts.of(score.token) for score in scores]
        offsets = [0]
        for text in texts[:-1]:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [score.log_probability for score in scores],
            "top_logprobs": [self._top(score, likely) for score in scores],
            "text_offset": offsets[: len(texts)],
        }

    def _top(self, score: TokenScore, likely: int) -> dict[str, float] | None:
        """By text; the more likely one of two tokens with the same text, and always the token itself."""
        if score.log_probability is None:
            return None
        found: dict[str, float] = {}
        for token, value in (*score.likely[:likely], (score.token, score.log_probability)):
            found.setdefault(self.texts.of(token), value)
        return found


@dataclass(frozen=True)
class ChatReply(Reply):
    """`calls`: the form of tool calls, if the request has tools."""

    calls: CallForm | None = None

    def choice(self, index: int, finished: Finished) -> dict[str, Any]:
        text, calls = self._split(finished.generation)
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(finished),
            "finish_reason": "tool_calls" if calls else FINISH[finished.generation.finish],
        }

    def piece(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def end(self, index: int, told: int, finished: Finished) -> list[dict[str, Any]]:
        """The last pieces of an answer of which `told` characters were told."""
        text, calls = self._split(finished.generation)
        pieces = [self.piece(index, {"content": text[told:]})] if text[told:] else []
        if calls:
            numbered = [{"index": number, **call} for number, call in enumerate(calls)]
            pieces.append(self.piece(index, {"tool_calls": numbered}))
        reason = "tool_calls" if calls else FINISH[finished.generation.finish]
        last = {"index": index, "delta": {}, "logprobs": self._logprobs(finished), "finish_reason": reason}
        return [*pieces, last]

    def _split(self, generation: Generation) -> tuple[str, list[dict[str, Any]]]:
        if self.calls is None:
            return generation.text, []
        text, found = self.calls.parse(generation.text)
        calls = [
            {
                "id": f"call_{secrets.token_hex(8)}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for name, arguments in found
        ]
        return text, calls

    def _logprobs(self, finished: Finished) -> dict[str, Any] | None:
        if self.likely is None:
            return None
        return {"content": [self._token(score) for score in finished.scores], "refusal": None}

    def _token(self, score: TokenScore) -> dict[str, Any]:
        likely = [self._named(token, value) for token, value in score.likely[: self.likely]]
        return {**self._named(score.token, score.log_probability), "top_logprobs": likely}

    def _named(self, token: int, value: float | None) -> dict[str, Any]:
        text = self.texts.of(token)
        return {"token": text, "bytes": None if "\ufffd" in text else list(text.encode()), "logprob": value}
