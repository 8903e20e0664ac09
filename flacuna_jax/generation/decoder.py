"""Rows on the devices that are filled with prompts, advanced and refilled: for `generate`, for streams, and for a
server, whose rows may have different adapters."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flacuna_jax.generation import by_layer, continuation
from flacuna_jax.generation.caches import Rows, empty_rows
from flacuna_jax.generation.continuation import Chosen, Packed
from flacuna_jax.generation.decode import LogProbabilities, RowSampling, most_general
from flacuna_jax.generation.programs import AdvanceSize, FillSize, OnFirstUse, Programs
from flacuna_jax.generation.settings import GREEDY, METHODS, Sampling
from flacuna_jax.generation.shared_prefix import Prefix
from flacuna_jax.kernels.axes import BATCH_AXES, TENSOR_AXIS
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import row_shards


@dataclass(frozen=True)
class Network:
    """A network and its parameters on a mesh."""

    spec: ModelSpec
    params: Mapping[str, jax.Array]
    mesh: Mesh

    @functools.cached_property
    def layers(self) -> list[by_layer.Layer] | None:
        return by_layer.layers_apart(self.spec, self.params)

    @property
    def weights(self) -> tuple[Any, ...]:
        """The first arguments of programs that advance."""
        return (self.params,) if self.layers is None else (self.params, self.layers)


class Part(NamedTuple):
    """Tokens of a prompt that follow `start` earlier ones in the cache of its row.

    Attributes:
      columns: first and end column of the row's adapter.
      targets: the tokens that follow each token, if their log-probabilities are wanted.
    """

    tokens: Sequence[int]
    start: int = 0
    columns: tuple[int, int] = (0, 0)
    targets: Sequence[int] | None = None


class Draw(NamedTuple):
    """How the tokens of a row are chosen."""

    sampling: Sampling = GREEDY
    seed: int = 0


class Decoder:
    """Rows of one batch. All calls must be made with the network's mesh set (`jax.set_mesh`).

    Args:
      network: may be replaced between calls, together with `programs`, by one with the same base.
      count: number of rows; a multiple of the parts into which the mesh splits them.
      slots: maximum number of tokens of a row, without the prefix.
      prefix: tokens before those of every row.
      own_columns: whether each row has an adapter of its own, given with its parts.
      programs: of the network; by default, every size is compiled on first use.
    """

    def __init__(
        self,
        network: Network,
        count: int,
        slots: int,
        prefix: Prefix | None = None,
        own_columns: bool = False,
        programs: Programs | None = None,
    ) -> None:
        self.network, self.count, self._prefix = network, count, prefix
        self.programs = programs or OnFirstUse(network.spec, _apart(network))
        self.rows = _place(network, empty_rows(network.spec, count, slots, _apart(network), own_columns))

    def fill(self, parts: Mapping[int, Part], at_once: int) -> tuple[jax.Array, dict[int, LogProbabilities]]:
        """Writes parts into the caches of their rows. Several parts must begin their prompts and have the same columns.

        Args:
          parts: at most `at_once` parts, by row.
          at_once: number of parts that a program is compiled for.

        Returns:
          Logits [at_once, vocab] after each part, and log-probabilities of the targets of parts that have some, by row.
        """
        earlier = max(part.start for part in parts.values())
        spread = _spread(parts, row_shards(self.network.mesh))
        longest = max(sum(len(parts[row].tokens) for row in rows) for rows in spread)
        size, program = self.programs.fill(FillSize(at_once, longest, self.rows.blocks_for(earlier)))
        packed = packed_parts(parts, spread, size, self.count)
        if self.rows.columns_b2 is None:
            packed = packed._replace(columns_2=None)
        scored = {row: part for row, part in parts.items() if part.targets is not None}
        self.rows, logits_rv, scores = program(
            self.network.params, self._prefix, self.rows, packed, np.bool_(bool(scored))
        )
        if not scored:
            return logits_rv, {}
        scores, of_targets = jax.tree.map(on_host, scores), {}
        for part, last, row in zip(parts.values(), packed.last_j.tolist(), parts, strict=False):  # parts may be missing
            if row in scored:
                here = slice(last + 1 - len(part.tokens), last + 1)
                of_targets[row] = jax.tree.map(lambda x, here=here: x[here], scores)
        return logits_rv, of_targets

    def start(self, draws: Sequence[tuple[int, Draw] | None], logits_rv: jax.Array, scored: bool = False) -> Chosen:
        """Chooses the first new token after each of the parts that were filled together, in their order.

        Args:
          draws: rows with their settings; None for a part that does not end its prompt.
          logits_rv: the result of `fill`.
          scored: whether the log-probabilities of tokens are needed.
        """
        at_once = len(logits_rv)
        settings = [GREEDY] * at_once
        into_r, seed_r = on_call(at_once, self.count), np.zeros(at_once, np.uint32)
        for i, found in enumerate(draws):
            if found is not None:
                into_r[i], (settings[i], seed_r[i]) = found
        sampling = RowSampling.of(settings)
        self.rows, chosen = self.programs.start(at_once)(
            self.rows, into_r, logits_rv, seed_r, sampling, _method(settings), np.bool_(scored)
        )
        return jax.tree.map(on_host, chosen)

    def begin(self, prompts: Mapping[int, tuple[Part, Draw]]) -> np.ndarray:
        """Fills rows with whole prompts. Returns their first new tokens, in the order of the rows given."""
        logits_rv, _ = self.fill({row: part for row, (part, _) in prompts.items()}, self.count)
        chosen = self.start([(row, draw) for row, (_, draw) in prompts.items()], logits_rv)
        return np.asarray(chosen.token)[: len(prompts)]

    def advance(
        self,
        steps: int,
        reach: int,
        samplings: Sequence[Sampling],
        scored: bool = False,
        count: int | None = None,
    ) -> Chosen:
        """`steps` more tokens of rows, on the host.

        Args:
          reach: maximum length of a row afterwards, of those whose tokens are used.
          samplings: the settings of those rows.
          scored: whether the log-probabilities of tokens are needed.
          count: all of those rows are among the first `count`; by default, all rows.
        """
        wanted = AdvanceSize(steps, count or self.count, self.rows.blocks_for(reach))
        _, program = self.programs.advance(wanted)
        self.rows, chosen = program(
            *self.network.weights, self._prefix, self.rows, _method(samplings), np.bool_(scored)
        )
        return jax.tree.map(on_host, chosen)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies a row with the first `length` tokens of its cache to another row."""
        blocks = self.rows.blocks_for(length)
        self.rows = continuation.copy_row(self.rows, np.int32(source), np.int32(target), blocks=blocks)

    def keep(self, count: int) -> None:
        """Gives up all rows but the first `count`."""
        if count < self.count:
            self.count, self.rows = count, continuation.keep_rows(self.rows, count, len(self.rows.blocks))


def _spread(parts: Mapping[int, Part], shards: int) -> list[list[int]]:
    """The parts, given by their rows, that each of the devices with rows of its own computes: each goes to the one that
    has the fewest tokens so far."""
    spread: list[list[int]] = [[] for _ in range(shards)]
    for row in parts:
        min(spread, key=lambda rows: sum(len(parts[other].tokens) for other in rows)).append(row)
    return spread


def packed_parts(parts: Mapping[int, Part], spread: Sequence[Sequence[int]], size: FillSize, batch_rows: int) -> Packed:
    """Parts as `continuation.fill` takes them, for a batch of `batch_rows` rows."""
    shape = (len(spread), size.length)
    tokens_rt, part_rt, row_rt, slot_rt, target_rt = (on_call(shape) for _ in range(5))
    last_j, row_j = on_call(size.parts), on_call(size.parts, batch_rows)
    row_rt[:] = batch_rows
    ends, columns = [shard * size.length for shard in range(len(spread))], (0, 0)
    shard_of = {row: shard for shard, rows in enumerate(spread) for row in rows}
    for j, (row, part) in enumerate(parts.items()):
        shard, count = shard_of[row], len(part.tokens)
        here = slice(ends[shard], ends[shard] + count)
        ends[shard] = here.stop
        tokens_rt.flat[here], part_rt.flat[here], row_rt.flat[here] = part.tokens, j + 1, row
        slot_rt.flat[here] = np.arange(part.start, part.start + count)
        if part.targets is not None:
            target_rt.flat[here.start : here.start + len(part.targets)] = part.targets
        last_j[j], row_j[j], columns = here.stop - 1, row, part.columns
    columns_2: Any = np.array(columns, np.int32)
    return Packed(tokens_rt, part_rt, row_rt, slot_rt, target_rt, last_j, row_j, columns_2)


def moves_below(count: int, taken: Collection[int], key: Callable[[int], Any] | None = None) -> dict[int, int]:
    """A free row below `count` for each taken one that is not below it; `key` orders the free ones."""
    free = sorted((row for row in range(count) if row not in taken), key=key)
    return dict(zip((row for row in taken if row >= count), free, strict=False))


def on_call(shape: int | tuple[int, ...], value: int = 0) -> Any:
    """An int32 array on the host, which becomes a jax.Array when a program is called with it."""
    return np.full(shape, value, np.int32)


def _method(samplings: Iterable[Sampling]) -> np.int32:
    return np.int32(METHODS.index(most_general(samplings)))


def on_host(array: jax.Array) -> np.ndarray:
    """The whole array on the host, including parts in other processes."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _apart(network: Network) -> bool:
    return network.layers is not None


def _place(network: Network, rows: Rows) -> Rows:
    by_row_and_head = PartitionSpec(*() if _apart(network) else (None,), BATCH_AXES, TENSOR_AXIS)
    blocks = jax.device_put(rows.blocks, NamedSharding(network.mesh, by_row_and_head))
    numbers = jax.device_put(rows[1:], NamedSharding(network.mesh, PartitionSpec(BATCH_AXES)))
    return Rows(blocks, *numbers)
