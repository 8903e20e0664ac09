"""The attention mask of packed rows, as two integers per token.

A row contains documents one after another, then padding. Because documents are contiguous and attention is causal, a
query sees one interval of keys and a key is seen by one interval of queries; a sliding window only shortens both. The
kernels need nothing else, neither segment ids nor a [T, T] mask.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.tree_util.register_dataclass, data_fields=("start_bt", "end_bt"), meta_fields=("window", "one_document"))
@dataclass(frozen=True)
class PackedMask:
    """Query q sees key k exactly when `start[q] <= k <= q`, which is the same as `k <= q < end[k]`.

    Padding has the empty intervals start = T and end = 0. Build it once per batch with `make_packed_mask`, outside
    the scan over layers.
    """

    start_bt: jax.Array
    """int32 [B, T]: first key visible to the query."""
    end_bt: jax.Array
    """int32 [B, T]: one past the last query that sees the key."""
    window: int | None = None
    """Maximum number of visible keys, including the query itself; None: no static limit. Both arrays include it."""
    one_document: bool = False
    """Whether every row is one document followed by padding, in which only `window` limits what a query sees; a static
    promise, for backends that need it."""

    def within(self, window: int) -> "PackedMask":
        """The same documents, in which a query sees at most its last `window` keys, including itself.

        Raises ValueError for a window below 1.
        """
        if window < 1:
            raise ValueError(f"window is {window}, but must be at least 1, because a query sees itself")
        position_t = jnp.arange(self.start_bt.shape[-1], dtype=jnp.int32)
        return replace(
            self,
            start_bt=jnp.maximum(self.start_bt, position_t - (window - 1)),
            end_bt=jnp.minimum(self.end_bt, position_t + window),
            window=window if self.window is None else min(window, self.window),
        )

    def without_promises(self) -> "PackedMask":
        """The same visible keys without static statements about them."""
        return replace(self, window=None, one_document=False)


def make_packed_mask(segment_ids_bt: jax.Array, window: int | None = None, *, one_document: bool = False) -> PackedMask:
    """Intervals of a batch of packed rows.

    `segment_ids_bt` [B, T] integers: equal neighbours belong to one document, 0 is padding (at any position). An id
    that returns after another one is a new document. `window` limits a query to its last `window` keys, including
    itself (sliding window attention as in Mistral). `one_document` promises that every row has at most one document, at
    its beginning.

    Raises ValueError for a window below 1.
    """
    length = segment_ids_bt.shape[-1]
    position_t = jnp.arange(length, dtype=jnp.int32)
    edge_b1 = jnp.ones_like(segment_ids_bt[:, :1], dtype=bool)
    change_bt = segment_ids_bt[:, 1:] != segment_ids_bt[:, :-1]
    is_first_bt = jnp.concatenate([edge_b1, change_bt], axis=1)
    is_last_bt = jnp.concatenate([change_bt, edge_b1], axis=1)
    start_bt = lax.cummax(jnp.where(is_first_bt, position_t, 0), axis=1)
    end_bt = lax.cummin(jnp.where(is_last_bt, position_t + 1, length), axis=1, reverse=True)
    padding_bt = segment_ids_bt == 0
    mask = PackedMask(
        start_bt=jnp.where(padding_bt, length, start_bt),
        end_bt=jnp.where(padding_bt, 0, end_bt),
        one_document=one_document,
    )
    return mask if window is None else mask.within(window)


class TileRange(NamedTuple):
    """The tiles [first, stop) contain all visible pairs; in [full_first, full_stop) every pair is visible.

    first <= full_first <= full_stop <= stop. Tiles between first and full_first, and between full_stop and stop, need
    the mask. If nothing is visible, all four are equal.
    """

    first: jax.Array
    full_first: jax.Array
    full_stop: jax.Array
    stop: jax.Array


def key_tiles(start: jax.Array, query: jax.Array, tile: int) -> TileRange:
    """Tiles of `tile` keys that a group of queries reads.

    `start` and `query` int32 [..., n]: `start_bt` at consecutive positions and those positions; one range per group
    [...]. Queries without any key (start > query) are ignored, so their results from a full tile are meaningless.
    Works for scalars in a kernel and for whole arrays.
    """
    sees_any = start <= query
    earliest_start = jnp.min(jnp.where(sees_any, start, _FAR), axis=-1)
    latest_start = jnp.max(jnp.where(sees_any, start, 0), axis=-1)
    first_query = jnp.min(jnp.where(sees_any, query, _FAR), axis=-1)
    stop_query = jnp.max(jnp.where(sees_any, query + 1, 0), axis=-1)
    return _tile_range(earliest_start, latest_start, first_query + 1, stop_query, tile)


def query_tiles(end: jax.Array, key: jax.Array, tile: int) -> TileRange:
    """Tiles of `tile` queries that read a group of keys: the counterpart of `key_tiles`, with `end_bt`.

    Keys that no query sees (end <= key) are ignored, so their results from a full tile are meaningless.
    """
    seen = key < end
    first_key = jnp.min(jnp.where(seen, key, _FAR), axis=-1)
    last_key = jnp.max(jnp.where(seen, key, 0), axis=-1)
    earliest_end = jnp.min(jnp.where(seen, end, _FAR), axis=-1)
    latest_end = jnp.max(jnp.where(seen, end, 0), axis=-1)
    return _tile_range(first_key, last_key, earliest_end, latest_end, tile)


_FAR = 2**30
"""Beyond every position, and far from the int32 limit."""


def _tile_range(first: jax.Array, full_first: jax.Array, full_stop: jax.Array, stop: jax.Array, tile: int) -> TileRange:
    """Converts positions to tiles: the outer range grows to whole tiles, the inner one shrinks to them."""
    stop = lax.div(stop + (tile - 1), tile)
    first = jnp.minimum(lax.div(first, tile), stop)
    full_first = jnp.clip(lax.div(full_first + (tile - 1), tile), first, stop)
    full_stop = jnp.clip(lax.div(full_stop, tile), full_first, stop)
    return TileRange(first, full_first, full_stop, stop)
