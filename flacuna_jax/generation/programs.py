"""The compiled steps of a decoder, by size. `generate` compiles each size on first use; a server compiles ahead
(`serving.programs`)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax

from flacuna_jax.generation import by_layer, continuation
from flacuna_jax.generation.caches import Rows
from flacuna_jax.generation.continuation import Chosen
from flacuna_jax.generation.decode import LogProbabilities
from flacuna_jax.generation.sizes import padded_size
from flacuna_jax.model.parameters import ModelSpec


class FillSize(NamedTuple):
    """Parts of prompts that are filled together, tokens of a row of them, and blocks of a cache with earlier tokens."""

    parts: int
    length: int
    blocks: int


class AdvanceSize(NamedTuple):
    """New tokens of a row, number of rows, and blocks of their caches that are read."""

    steps: int
    rows: int
    blocks: int


Fill = Callable[..., tuple[Rows, jax.Array, LogProbabilities | None]]
"""`continuation.fill` without its static arguments; the others here likewise."""
Start = Callable[..., tuple[Rows, Chosen]]
Advance = Callable[..., tuple[Rows, Chosen]]


class Programs(Protocol):
    """Gives a decoder the program for each step."""

    def fill(self, wanted: FillSize) -> tuple[FillSize, Fill]:
        """A program, and its size: at least the wanted one, with as many parts."""
        ...

    def start(self, parts: int) -> Start: ...

    def advance(self, wanted: AdvanceSize) -> tuple[AdvanceSize, Advance]:
        """A program, and its size: at least the wanted one, with as many steps."""
        ...


def fill_program(spec: ModelSpec, size: FillSize, alternatives: int) -> Fill:
    """`alternatives`: number of alternatives in scores; 0 if none are made. So in the other functions here."""
    return functools.partial(continuation.fill, spec, blocks=size.blocks, alternatives=alternatives)


def start_program(alternatives: int) -> Start:
    return functools.partial(continuation.start, alternatives=alternatives)


def advance_program(spec: ModelSpec, size: AdvanceSize, alternatives: int, apart: bool) -> Advance:
    """`apart`: whether the layers are separate; then the program also takes `by_layer.layers_apart`."""
    steps, count, blocks = size
    advance = by_layer.advance if apart else continuation.advance
    return functools.partial(advance, spec, steps=steps, count=count, blocks=blocks, alternatives=alternatives)


@dataclass(frozen=True)
class OnFirstUse:
    """Compiles each size when it is first used."""

    spec: ModelSpec
    apart: bool
    """Whether the layers are separate."""
    alternatives: int = 0

    def fill(self, wanted: FillSize) -> tuple[FillSize, Fill]:
        size = wanted._replace(length=padded_size(wanted.length))
        return size, fill_program(self.spec, size, self.alternatives)

    def start(self, parts: int) -> Start:
        return start_program(self.alternatives)

    def advance(self, wanted: AdvanceSize) -> tuple[AdvanceSize, Advance]:
        return wanted, advance_program(self.spec, wanted, self.alternatives, self.apart)
