"""Answers in OpenAI's form, for completions and chats, whole and in pieces."""

import itertools
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flacuna_jax.generation.language_model import Generation
from flacuna_jax.serving.jobs import Finished, Progress, TokenScore
from flacuna_jax.serving.token_texts import TokenTexts
from flacuna_jax.serving.tools import CallForm

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


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


def _end(finished: Finished) -> Sequence[TokenScore]:
    return () if finished.end is None else (finished.end,)


@dataclass(frozen=True)
class CompletionReply(Reply):
    """`echo`: whether the prompt is part of the answer's text.

    Scores include that of the token that ends an answer, as in vLLM: lm-evaluation-harness expects as many scores after
    those of the prompt as it asked for tokens.
    """

    echo: bool = False

    def choice(self, index: int, prompt: Sequence[int], prompt_text: str, finished: Finished) -> dict[str, Any]:
        generation = finished.generation
        scores = [*finished.scores, *_end(finished)]
        if self.echo and self.likely is not None:
            scores = [TokenScore(prompt[0], None), *finished.prompt_scores, *scores]
        text = (prompt_text if self.echo else "") + generation.text
        logprobs = None if self.likely is None else self._logprobs(scores, self.likely)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": FINISH[generation.finish]}

    def certain(self, text: str) -> str:
        """The part of a text that can be sent already."""
        return text

    def piece(self, index: int, text: str, sent: int, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """A piece that follows `sent` characters."""
        logprobs = None if self.likely is None else self._logprobs(scores, self.likely, sent)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def end(self, index: int, sent: int, scores: Sequence[TokenScore], finished: Finished) -> list[dict[str, Any]]:
        piece = self.piece(index, finished.generation.text[sent:], sent, [*scores, *_end(finished)])
        return [{**piece, "finish_reason": FINISH[finished.generation.finish]}]

    def _logprobs(self, scores: Sequence[TokenScore], likely: int, offset: int = 0) -> dict[str, Any]:
        texts = [self.texts.of(score.token) for score in scores]
        ends = list(itertools.accumulate(map(len, texts), initial=offset))
        return {
            "tokens": texts,
            "token_logprobs": [score.log_probability for score in scores],
            "top_logprobs": [self._top(score, likely) for score in scores],
            "text_offset": ends[:-1],
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
            "logprobs": self._logprobs(finished.scores),
            "finish_reason": "tool_calls" if calls else FINISH[finished.generation.finish],
        }

    def certain(self, text: str) -> str:
        """The part of a text that can be sent already, because no call can begin in it."""
        return text if self.calls is None else self.calls.certain(text)

    def piece(self, index: int, text: str, sent: int, scores: Sequence[TokenScore]) -> dict[str, Any]:
        return self._delta(index, {"content": text}, scores)

    def begin(self, index: int) -> dict[str, Any]:
        return self._delta(index, {"role": "assistant", "content": ""})

    def end(self, index: int, sent: int, scores: Sequence[TokenScore], finished: Finished) -> list[dict[str, Any]]:
        """The last pieces of an answer of which `sent` characters were sent."""
        text, calls = self._split(finished.generation)
        pieces = [self._delta(index, {"content": text[sent:]})] if text[sent:] else []
        if calls:
            numbered = [{"index": number, **call} for number, call in enumerate(calls)]
            pieces.append(self._delta(index, {"tool_calls": numbered}))
        reason = "tool_calls" if calls else FINISH[finished.generation.finish]
        return [*pieces, {**self._delta(index, {}, scores), "finish_reason": reason}]

    def _delta(self, index: int, delta: dict[str, Any], scores: Sequence[TokenScore] = ()) -> dict[str, Any]:
        logprobs = self._logprobs(scores) if scores else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

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

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self.likely is None:
            return None
        return {"content": [self._token(score) for score in scores], "refusal": None}

    def _token(self, score: TokenScore) -> dict[str, Any]:
        likely = [self._named(token, value) for token, value in score.likely[: self.likely]]
        return {**self._named(score.token, score.log_probability), "top_logprobs": likely}

    def _named(self, token: int, value: float | None) -> dict[str, Any]:
        text = self.texts.of(token)
        return {"token": text, "bytes": None if "\ufffd" in text else list(text.encode()), "logprob": value}


@dataclass
class ChoiceStream:
    """One answer that is sent in pieces.

    Attributes:
      told: text of the events so far, of which `sent` characters are in pieces.
      scores: those that are not in pieces yet, of `scored` so far.
    """

    reply: CompletionReply | ChatReply
    index: int
    told: str = ""
    sent: int = 0
    scores: list[TokenScore] = field(default_factory=list)
    scored: int = 0

    def pieces(self, event: Progress | Finished) -> list[dict[str, Any]]:
        if isinstance(event, Finished):
            return self.reply.end(self.index, self.sent, [*self.scores, *event.scores[self.scored :]], event)
        self.told += event.text
        self.scores += event.scores
        self.scored += len(event.scores)
        new = self.reply.certain(self.told)[self.sent :]
        if not new:
            return []
        piece = self.reply.piece(self.index, new, self.sent, self.scores)
        self.sent, self.scores = self.sent + len(new), []
        return [piece]
