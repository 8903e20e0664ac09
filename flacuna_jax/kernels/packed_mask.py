"""The visibility of packed rows, in two integers per token.

A row holds documents one after another, then padding. Because documents are contiguous and attention is causal, a
query sees one interval of keys and a key is seen by one interval of queries; a sliding window only shortens both.
The kernels need nothing else: neither segment ids nor a [T, T] mask ever reaches them.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.tree_util.register_dataclass, data_fields=("start_bt", "end_bt"), meta_fields=("window",))
@dataclass(frozen=True)
class PackedMask:
    """Query q sees key k exactly when `start[q] <= k <= q`, which is the same as `k <= q < end[k]`.

    Padding has the empty intervals start = T and end = 0. Build it once per batch with `make_packed_mask`, outside
    the scan over layers.
    """

    start_bt: jax.Array
    """int32 [B, T]: first key that the query sees."""
    end_bt: jax.Array
    """int32 [B, T]: one past the last query that sees the key."""
    window: int | None = field(default=None)
    """Keys per query at most, itself included; None is the whole document. Already contained in both arrays."""


def make_packed_mask(segment_ids_bt: jax.Array, window: int | None = None) -> PackedMask:
    """Intervals of a batch of packed rows.

    `segment_ids_bt` [B, T] integers: equal neighbours belong to one document, 0 is padding (wherever it stands). An
    id that comes again after another one is a new document. `window` limits a query to its last `window` keys,
    itself included (sliding window attention as Mistral defines it).

    Raises ValueError for a window below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, but a query sees at least itself: use a window of 1 or more")
    length = segment_ids_bt.shape[-1]
    position_t = jnp.arange(length, dtype=jnp.int32)
    edge_b1 = jnp.ones_like(segment_ids_bt[:, :1], dtype=bool)
    change_bt = segment_ids_bt[:, 1:] != segment_ids_bt[:, :-1]
    is_first_bt = jnp.concatenate([edge_b1, change_bt], axis=1)
    is_last_bt = jnp.concatenate([change_bt, edge_b1], axis=1)
    start_bt = lax.cummax(jnp.where(is_first_bt, position_t, 0), axis=1)
    end_bt = lax.cummin(jnp.where(is_last_bt, position_t + 1, length), axis=1, reverse=True)
    if window is not None:
        start_bt = jnp.maximum(start_bt, position_t - (window - 1))
        end_bt = jnp.minimum(end_bt, position_t + window)
    padding_bt = segment_ids_bt == 0
    return PackedMask(
        start_bt=jnp.where(padding_bt, length, start_bt), end_bt=jnp.where(padding_bt, 0, end_bt), window=window
    )
