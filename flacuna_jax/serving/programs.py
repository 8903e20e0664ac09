"""The programs of a server. Some are compiled before it is ready. After that, no client waits for a compiler: a step
uses the smallest program that is ready and large enough, and if a smaller one would do, a thread compiles that one."""

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flacuna_jax.generation.caches import Block, Rows
from flacuna_jax.generation.decode import RowSampling
from flacuna_jax.generation.decoder import Network, on_call, packed_parts
from flacuna_jax.generation.programs import (
    Advance,
    AdvanceSize,
    Fill,
    FillSize,
    Start,
    advance_program,
    fill_program,
    start_program,
)
from flacuna_jax.generation.settings import GREEDY
from flacuna_jax.model.sharding import row_shards

LENGTHS = (64, 128, 192, 256)
"""Compiled numbers of tokens of prompts. Longer ones would not be faster per token, at least on CPUs."""
PARTS = 8
"""Maximum number of prompts whose tokens are filled together."""
COMPILED_TOGETHER = 4
"""Programs that are compiled at the same time before the server is ready."""
GREEDILY, NO = np.int32(0), np.bool_(False)
"""A method of `choose_tokens`, and an answer to whether tokens are scored: arguments to compile for."""
_logger = logging.getLogger(__name__)


class StartSize(NamedTuple):
    """Rows that begin together."""

    parts: int


Size = FillSize | StartSize | AdvanceSize


def row_counts(network: Network, rows: int) -> list[int]:
    """The numbers of rows for which programs advance, in increasing order. On a CPU, a step with few rows takes less
    time; elsewhere, it takes about as long as one with all rows, because most of it is reading the weights."""
    counts = [rows]
    while network.layers is not None and row_shards(network.mesh) == 1 and counts[0] > 1:
        counts.insert(0, counts[0] // 4 or 1)
    return counts


class CompiledPrograms:
    """Implements `generation.programs.Programs`. A size for which no larger program is ready is compiled at once.

    Args:
      network: its parameters may be replaced by others of the same shapes.
      rows: of the decoder, as arrays or as shapes with shardings.
      steps: new tokens of a turn.
      alternatives: number of alternatives in scores.
    """

    def __init__(self, network: Network, rows: Rows, steps: int, alternatives: int) -> None:
        self._network, self._alternatives = network, alternatives
        self._rows: Rows = _shapes(rows)
        self._shared = NamedSharding(network.mesh, PartitionSpec())
        self._steps, self._blocks = steps, len(rows.blocks)
        self.counts = row_counts(network, len(rows.token_b))
        self._ready: dict[Size, Callable[..., Any]] = {}
        self._asked: set[Size] = set()
        self._background = ThreadPoolExecutor(1, "compiler")
        self._lock = threading.Lock()

    def compile_first(self) -> None:
        """Compiles what the first requests need, and the largest size of each step."""
        advances = {AdvanceSize(self._steps, *size) for size in ((self.counts[0], 1), (self.counts[-1], self._blocks))}
        fills = [FillSize(PARTS, *size) for size in ((LENGTHS[0], 0), (LENGTHS[-1], 0), (LENGTHS[-1], self._blocks))]
        with ThreadPoolExecutor(COMPILED_TOGETHER) as pool:
            list(pool.map(self._compile, [*advances, *fills, StartSize(PARTS)]))

    def close(self) -> None:
        """Nothing more is compiled in the background."""
        self._background.shutdown(wait=False, cancel_futures=True)

    def fill(self, wanted: FillSize) -> tuple[FillSize, Fill]:
        return self._best(wanted._replace(length=next(length for length in LENGTHS if length >= wanted.length)))

    def start(self, parts: int) -> Start:
        return self._best(StartSize(parts))[1]

    def advance(self, wanted: AdvanceSize) -> tuple[AdvanceSize, Advance]:
        return self._best(wanted._replace(rows=next(count for count in self.counts if count >= wanted.rows)))

    def _best(self, wanted: Any) -> tuple[Any, Callable[..., Any]]:
        """The smallest program that is ready and large enough."""
        if wanted not in self._ready:
            with self._lock:
                large_enough = [size for size in self._ready if _serves(size, wanted)]
            if not large_enough:
                self._compile(wanted)
            else:
                self._ask_for(wanted)
                wanted = min(large_enough)
        return wanted, self._ready[wanted]

    def _ask_for(self, size: Size) -> None:
        if size not in self._asked:
            self._asked.add(size)
            with contextlib.suppress(RuntimeError):  # closed
                self._background.submit(self._compile_for_later, size)

    def _compile_for_later(self, size: Size) -> None:
        try:
            self._compile(size)
        except Exception:
            _logger.warning("a program could not be compiled; a larger one is used (%s)", size, exc_info=True)

    def _compile(self, size: Size) -> None:
        with jax.set_mesh(self._network.mesh):
            apart = self._network.layers is not None
            program = self._called(size) if apart and isinstance(size, AdvanceSize) else self._lowered(size).compile()
        with self._lock:
            self._ready[size] = program

    def _lowered(self, size: Size) -> jax.stages.Lowered:
        spec, params = self._network.spec, self._network.params
        match size:
            case FillSize():
                fill = fill_program(spec, size, self._alternatives)
                packed = packed_parts({}, [[]] * row_shards(self._network.mesh), size, len(self._rows.token_b))
                return self._lower(fill, (params, None), (packed, NO), 2)
            case StartSize(parts):
                numbers_r, sampling = on_call(parts), RowSampling.of([GREEDY] * parts)
                logits_rv = jax.ShapeDtypeStruct((parts, spec.config.vocab_size), np.float32, sharding=self._shared)
                rest = (numbers_r, logits_rv, numbers_r.astype(np.uint32), sampling, GREEDILY, NO)
                return self._lower(start_program(self._alternatives), (), rest, 1)
            case AdvanceSize():
                advance = advance_program(spec, size, self._alternatives, apart=False)
                return self._lower(advance, (params, None), (GREEDILY, NO), 1)

    def _called(self, size: AdvanceSize) -> Advance:
        """A program of separate layers, which all have the same parts: they are compiled by a call with one layer."""
        params, layers = self._network.weights
        one = tuple(Block(block.k[:1], block.v[:1]) for block in self._rows.blocks)
        rows = jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), self._rows._replace(blocks=one)
        )
        advance = advance_program(self._network.spec, size, self._alternatives, apart=True)
        jax.block_until_ready(advance(params, layers[:1], None, rows, GREEDILY, NO))
        return advance

    def _lower(
        self, function: Callable[..., Any], before: Sequence[Any], after: Sequence[Any], results: int
    ) -> jax.stages.Lowered:
        """`before` and `after` are the arguments around the rows, which are also the first of the results."""
        kept = jax.tree.map(lambda x: x.sharding, self._rows)
        step = jax.jit(function, donate_argnums=len(before), out_shardings=(kept, *[self._shared] * results))
        return step.lower(*_shapes(before), self._rows, *after)


def _serves(size: Size, wanted: Size) -> bool:
    """Whether a program can be used instead of a wanted one."""
    exact = size[0] == wanted[0] and type(size) is type(wanted)
    return exact and all(own >= needed for own, needed in zip(size, wanted, strict=True))


def _shapes(arrays: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
