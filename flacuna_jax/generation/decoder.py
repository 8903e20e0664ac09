"""Rows on the devices that are filled with prompts, advanced and refilled: for `generate`, for streams, and for a
server, whose rows may have different adapters."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flacuna_jax.generation import continuation
from flacuna_jax.generation.caches import Rows, empty_rows
from flacuna_jax.generation.continuation import Chosen, Piece
from flacuna_jax.generation.decode import LogProbabilities, RowSampling, most_general
from flacuna_jax.generation.settings import GREEDY, Sampling
from flacuna_jax.generation.shared_prefix import Prefix
from flacuna_jax.kernels.axes import BATCH_AXES, TENSOR_AXIS
from flacuna_jax.model.parameters import ModelSpec

SIZES = (64, 128, 192, *(64 * factor * 2**power for power in range(13) for factor in (4, 5, 6, 7)))
"""Compiled lengths: 64, 128, 192, 256, 320, 384, 448, 512, 640, ...; above 256, a length is at most a quarter larger
than necessary."""


def padded_size(needed: int) -> int:
    return next(size for size in SIZES if size >= needed)


@dataclass(frozen=True)
class Network:
    """A network and its parameters on a mesh."""

    spec: ModelSpec
    params: Mapping[str, jax.Array]
    mesh: Mesh

    @functools.cached_property
    def layers(self) -> list[nnx.State] | None:
        return continuation.layers_apart(self.spec, self.params)


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
      network: may be replaced between calls by one with the same base.
      count: number of rows; a multiple of the parts into which the mesh splits them.
      slots: maximum number of tokens of a row, without the prefix.
      prefix: tokens before those of every row.
      own_columns: whether each row has an adapter of its own, given with its parts.
    """

    def __init__(
        self, network: Network, count: int, slots: int, prefix: Prefix | None = None, own_columns: bool = False
    ) -> None:
        self.network, self.count, self._prefix = network, count, prefix
        self.rows = _place(network, empty_rows(network.spec, count, slots, _apart(network), own_columns))

    def fill(
        self, parts: Mapping[int, Part], at_once: int, alternatives: int = 0, length: int | None = None
    ) -> tuple[jax.Array, LogProbabilities | None]:
        """Writes at most `at_once` parts into the caches of their rows.

        Args:
          parts: tokens by row.
          at_once: number of parts that a program is compiled for.
          alternatives: number of alternatives to targets.
          length: of parts that the program is compiled for; by default, the smallest of `SIZES`.

        Returns:
          Logits [at_once, vocab] after each part, and log-probabilities of the targets [at_once, length] if any part
          has some.
        """
        size = min(length or padded_size(max(len(part.tokens) for part in parts.values())), self.rows.slots)
        tokens_rt, target_rt = np.zeros((at_once, size), np.int32), np.zeros((at_once, size), np.int32)
        start_r, length_r = np.zeros(at_once, np.int32), np.ones(at_once, np.int32)
        columns_r2 = np.zeros((at_once, 2), np.int32)
        for i, part in enumerate(parts.values()):
            tokens_rt[i, : len(part.tokens)] = part.tokens
            start_r[i], length_r[i], columns_r2[i] = part.start, len(part.tokens), part.columns
            if part.targets is not None:
                target_rt[i, : len(part.targets)] = part.targets
        scored = any(part.targets is not None for part in parts.values())
        put = jnp.asarray
        piece = Piece(
            put(self._into(list(parts), at_once)),
            put(tokens_rt),
            put(start_r),
            put(length_r),
            None if self.rows.columns_b2 is None else put(columns_r2),
            put(target_rt) if scored else None,
        )
        spec, params, _ = self._parameters
        blocks = len(self.rows.blocks) if start_r.any() else 0  # few different programs
        self.rows, logits_rv, scores = continuation.fill(
            spec, params, self._prefix, self.rows, piece, blocks, alternatives if scored else 0
        )
        return logits_rv, jax.tree.map(on_host, scores)

    def start(self, draws: Sequence[tuple[int, Draw] | None], logits_rv: jax.Array, alternatives: int = 0) -> Chosen:
        """Chooses the first new token after each of the parts that were filled together, in their order.

        Args:
          draws: rows with their settings; None for a part that does not end its prompt.
          logits_rv: the result of `fill`.
        """
        at_once = len(logits_rv)
        settings = [GREEDY] * at_once
        into_r, seed_r = self._into([], at_once), np.zeros(at_once, np.uint32)
        for i, found in enumerate(draws):
            if found is not None:
                into_r[i], (settings[i], seed_r[i]) = found
        sampling = RowSampling.of(settings)
        self.rows, chosen = continuation.start(
            self.rows, into_r, logits_rv, seed_r, sampling, most_general(settings), alternatives
        )
        return jax.tree.map(on_host, chosen)

    def begin(self, prompts: Mapping[int, tuple[Part, Draw]], at_once: int) -> np.ndarray:
        """Fills rows with whole prompts. Returns their first new tokens, in the order of the rows given."""
        logits_rv, _ = self.fill({row: part for row, (part, _) in prompts.items()}, at_once)
        chosen = self.start([(row, draw) for row, (_, draw) in prompts.items()], logits_rv)
        return np.asarray(chosen.token)[: len(prompts)]

    def advance(self, steps: int, reach: int, samplings: Sequence[Sampling], alternatives: int = 0) -> Chosen:
        """`steps` more tokens of every row, on the host.

        Args:
          reach: maximum length of a row afterwards, of those whose tokens are used.
          samplings: the settings of those rows.
        """
        blocks = min(-(-reach // self.rows.block_slots), len(self.rows.blocks))
        spec, params, layers = self._parameters
        self.rows, chosen = continuation.advance(
            spec, params, layers, self._prefix, self.rows, steps, blocks, most_general(samplings), alternatives
        )
        return jax.tree.map(on_host, chosen)

    def copy(self, source: int, target: int) -> None:
        """Copies the cache of one row to another."""
        self.rows = continuation.copy_row(self.rows, np.int32(source), np.int32(target))

    @property
    def _parameters(self) -> tuple[ModelSpec, Mapping[str, jax.Array], list[nnx.State] | None]:
        return self.network.spec, self.network.params, self.network.layers

    def _into(self, rows: Sequence[int], at_once: int) -> np.ndarray:
        """Row numbers, padded with one that does not exist."""
        return np.array([*rows, *[self.count] * (at_once - len(rows))], np.int32)


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
