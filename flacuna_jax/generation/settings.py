"""How answers are made: settings only, so that command lines can show their defaults without importing JAX."""

import dataclasses
import math
from typing import Literal

from flacuna_jax.errors import UserError

LOWEST_TEMPERATURE = 1e-6
"""Logits divided by a much smaller temperature would overflow float32."""

Method = Literal["greedy", "sampled", "filtered"]
"""What a step computes: the most likely token only, also samples, or also samples after filters."""
METHODS: tuple[Method, ...] = ("greedy", "sampled", "filtered")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings. Filters apply in the order temperature, top_k, top_p, as in transformers."""

    temperature: float = 0.0
    """0 chooses the most likely token (greedy); otherwise logits are divided by it."""
    top_k: int | None = None
    """Keep only this many of the most likely tokens."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens whose probabilities reach this sum."""

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or LOWEST_TEMPERATURE <= self.temperature < math.inf):
            raise UserError(
                f"temperature is {self.temperature}; use 0 for greedy decoding or a number >= {LOWEST_TEMPERATURE}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be a probability above 0 and at most 1")

    @property
    def method(self) -> Method:
        if self.temperature == 0:
            return "greedy"
        return "sampled" if self.top_k is None and self.top_p in (None, 1) else "filtered"


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are made."""

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Texts that end an answer, in addition to those of the template."""
    sampling: Sampling = GREEDY
    seed: int = 0
    system: str | None = None
    """Replaces the template's system text."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Batch sizes: packed rows of `row_length` tokens (longer if a text needs it) in batches of `row_tokens` tokens,
    and `rows` prompts that are decoded together."""

    row_length: int = 512
    row_tokens: int = 4096
    rows: int = 16
