"""Where a generation ends: at a token that ends answers, before a stop string, or at its maximum length."""

import bisect
from collections.abc import Sequence

from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.generation.language_model import Generation, GenerationRequest


def ended(
    tokens: Sequence[int], request: GenerationRequest, tokenizer: Tokenizer, ends: frozenset[int]
) -> Generation | None:
    """The generation if these tokens complete it, otherwise None. It is cut at the first end, as if it were checked
    after every token, so the result does not depend on the number of tokens per check.

    Args:
      tokens: the new tokens so far, and possibly more than the generation needs.
      ends: tokens that end every answer, in addition to those of the request.
    """
    kept = tokens[: request.max_new_tokens]
    ends = ends | set(request.ends)
    length = next((i for i, token in enumerate(kept) if token in ends), len(kept))
    at_end = length < len(kept)
    kept = kept[:length]
    text = tokenizer.decode(kept)
    if any(stop in text for stop in request.stop):
        needed = bisect.bisect_left(
            range(len(kept)),
            True,
            key=lambda n: any(stop in tokenizer.decode(kept[:n]) for stop in request.stop),
        )
        text = tokenizer.decode(kept[:needed])
        return Generation(text[: min(text.find(stop) for stop in request.stop if stop in text)], needed, "stop")
    if at_end:
        return Generation(text, len(kept), "eos")
    return Generation(text, len(kept), "length") if len(kept) == request.max_new_tokens else None


def certain(text: str, stop: Sequence[str]) -> str:
    """The part of the text that more tokens cannot change: without an incomplete character or a possible beginning of a
    stop string."""
    text = text.rstrip("\ufffd")
    held = [n for term in stop for n in range(1, len(term)) if text.endswith(term[:n])]
    return text[: len(text) - max(held, default=0)]
