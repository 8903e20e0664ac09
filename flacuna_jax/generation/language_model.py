"""What evaluation asks of a model: log-probabilities of continuations, and continuations. Token ids on both sides.

Benchmarks know these protocols alone; `flax_model.LlamaLanguageModel` implements them on the network of this package,
tests implement them in a few lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from flacuna_jax.data.tokenization import Tokenizer


@dataclass(frozen=True)
class ScoreRequest:
    """Asks for log p(continuation | context). Both are token ids; the context holds at least BOS."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """`log_probability` is the sum over the continuation's tokens, in nats; `is_greedy`: each was the most likely."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True)
class GenerationRequest:
    """Asks for a continuation of `prompt` (token ids). Temperature 0 is greedy; `seed` matters otherwise.

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
    """New tokens made, the one that ends the answer not counted."""
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
        """What tables call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of everything that its answers depend on: weights, adapters, tokenizer, dtype."""
        ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context_length(self) -> int:
        """Most tokens the model can attend to, prompt and answer together."""
        ...


def encode_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text without a template: BOS in front where the tokenizer puts it there, as in transformers."""
    return (*tokenizer.prefix_ids, *tokenizer.encode(text, first=not tokenizer.prefix_ids))
