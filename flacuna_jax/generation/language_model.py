"""The interface of a model for evaluation: log-probabilities of continuations, and generation, both with token ids.

Benchmarks use only these protocols. `engine.LlamaLanguageModel` implements them with the network of this package; tests
implement them in a few lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from flacuna_jax.data.tokenization import Tokenizer


@dataclass(frozen=True)
class ScoreRequest:
    """A request for log p(continuation | context). Both are token ids; the context has at least BOS."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """`log_probability` is the sum over the continuation's tokens, in nats; `is_greedy` is whether each of them was the
    most likely token."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True)
class GenerationRequest:
    """A request for a continuation of `prompt` (token ids). Temperature 0 is greedy; otherwise `seed` is used.

    The text ends before the first of `stop`, at a token that ends answers (the model's, and those of `ends`), or after
    `max_new_tokens` tokens.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generation:
    text: str
    tokens: int
    """Number of new tokens, without the one that ends the answer."""
    finish: Literal["eos", "stop", "length"]


class Scorer(Protocol):
    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in their order."""
        ...


class Generator(Protocol):
    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """One generation per request, in their order; none depends on the others."""
        ...


class LanguageModel(Scorer, Generator, Protocol):
    @property
    def name(self) -> str:
        """Its name in tables."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of everything that its answers depend on: weights, adapters, tokenizer, dtype."""
        ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of prompt and answer together."""
        ...


def encode_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text without a template, after BOS if the tokenizer adds it, as in transformers."""
    return (*tokenizer.prefix_ids, *tokenizer.encode(text))
