"""Cross-entropy without storing all logits: sorts supervised positions to the front, then applies the head in chunks.

In instruction tuning most positions carry no loss. On each device the supervised positions are moved to the front by a
stable sort, and only ceil(count / chunk) chunks of them go through the head, so the cost depends on the number of
supervised tokens. Statistics are float32. If the head is frozen, the gradient with respect to the activations is
computed together with the loss, so the backward pass only multiplies two arrays; for a trained head, the backward pass
recomputes the logits, chunk by chunk.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from flacuna_jax.kernels.axes import BATCH_AXES, TENSOR_AXIS
from flacuna_jax.kernels.softcap import capped, through_cap

LARGEST_CHUNK, SMALLEST_CHUNK = 1024, 256
"""Largest and smallest number of positions per chunk: 1024 × 32000 float32 logits are 131 MB, and already fill the
matrix units of a large accelerator. Below 256, even a CPU loses more by reading the head again for each chunk than by
the unused part of the last chunk."""

LOOP_SCOPE = "head_chunks"
"""Name of the loop over chunks in compiled programs and profiles."""


def chunk_size(positions: int) -> int:
    """Number of positions per chunk, for a number of positions on a device: a tenth, so that the last chunk, which is
    computed whole, wastes at most that; between 256 and 1024."""
    tenth = positions // 10 // SMALLEST_CHUNK * SMALLEST_CHUNK
    return min(positions, max(SMALLEST_CHUNK, min(LARGEST_CHUNK, tenth)))


class TrainedRows(NamedTuple):
    """Rows of a head that have a gradient."""

    rows_nd: jax.Array
    """Float32."""
    ids: tuple[int, ...]
    """The place of each row in the head."""


def token_losses(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    targets_bt: jax.Array,
    loss_mask_bt: jax.Array,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
    trained_columns: int | None = None,
    trained_rows: TrainedRows | None = None,
) -> jax.Array:
    """Negative log-likelihood of each supervised target, float32 [b, t], zero where the mask is false.

    Args:
      hidden_btd: final hidden states; the head's matmul runs in their dtype, accumulating float32.
      head_vd: language-model head [vocab, model].
      targets_bt: int32 target ids.
      loss_mask_bt: bool, true if the target carries loss.
      softcap: limit of the logits, see `kernels.softcap`.
      chunk: positions per chunk; None: `chunk_size`.
      trained_columns: number of the head's last columns that have a gradient; the gradient of the others is zero and is
        not computed. None: all.
      trained_rows: rows that the head already contains, and that have a gradient instead of it. None: the head has one.

    On a mesh (`jax.set_mesh` with axes data, fsdp, tensor), rows are split over data × fsdp, and the vocabulary over
    tensor if that divides it.
    """
    logits = _Logits(softcap, chunk)
    if trained_rows is None:
        return _token_losses(hidden_btd, head_vd, None, targets_bt, loss_mask_bt, logits, trained_columns, None)
    head_vd = jax.lax.stop_gradient(head_vd)
    inputs = (hidden_btd, head_vd, trained_rows.rows_nd, targets_bt, loss_mask_bt)
    return _token_losses(*inputs, logits, None, trained_rows.ids)


def token_scores(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    targets_bt: jax.Array,
    loss_mask_bt: jax.Array,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The result of `token_losses`, and whether each supervised target is the most likely token, bool [b, t].

    For evaluation: it has no gradient.
    """
    return _on_mesh(_scores, _Logits(softcap, chunk), head_vd, ("rows", "rows"))(
        hidden_btd, head_vd, targets_bt, loss_mask_bt
    )


class _Logits(NamedTuple):
    """How logits are computed: their limit, and the number of positions per chunk; None: none, and `chunk_size`."""

    softcap: float | None
    chunk: int | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _token_losses(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    rows_nd: jax.Array | None,
    targets_bt: jax.Array,
    loss_mask_bt: jax.Array,
    logits: _Logits,
    trained_columns: int | None,
    row_ids: tuple[int, ...] | None,
) -> jax.Array:
    del rows_nd  # the head contains them
    return _on_mesh(_losses, logits, head_vd, "rows")(hidden_btd, head_vd, targets_bt, loss_mask_bt)


def _forward_rule(
    hidden: Any,
    head: Any,
    rows: Any,
    targets: Any,
    loss_mask: Any,
    logits: _Logits,
    trained_columns: int | None,
    row_ids: tuple[int, ...] | None,
) -> tuple[jax.Array, tuple]:
    inputs = (hidden.value, head.value, targets.value, loss_mask.value)
    if head.perturbed or (rows is not None and rows.perturbed):
        losses_bt = _on_mesh(_losses, logits, head.value, "rows")(*inputs)
        return losses_bt, (None, inputs)
    losses_bt, unit_gradient_btd = _on_mesh(_losses_and_gradients, logits, head.value, ("rows", "rows"))(*inputs)
    return losses_bt, (unit_gradient_btd, None)


def _backward_rule(
    logits: _Logits,
    trained_columns: int | None,
    row_ids: tuple[int, ...] | None,
    residuals: tuple,
    cotangent_bt: Any,
) -> tuple:
    unit_gradient_btd, inputs = residuals
    if isinstance(cotangent_bt, SymbolicZero):
        cotangent_bt = jnp.zeros(cotangent_bt.shape, cotangent_bt.dtype)
    if inputs is None:
        gradient_btd = unit_gradient_btd.astype(jnp.float32) * cotangent_bt[..., None]
        return gradient_btd.astype(unit_gradient_btd.dtype), None, None, None, None
    if row_ids is not None:
        local = functools.partial(_row_gradients, ids=row_ids)
        hidden_gradient, row_gradient = _on_mesh(local, logits, inputs[1], ("rows", "whole"))(*inputs, cotangent_bt)
        return hidden_gradient, None, row_gradient, None, None
    local = functools.partial(_all_gradients, columns=trained_columns or inputs[1].shape[1])
    hidden_gradient, head_gradient = _on_mesh(local, logits, inputs[1], ("rows", "head"))(*inputs, cotangent_bt)
    return hidden_gradient, head_gradient, None, None, None


_token_losses.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


# ---------------------------------------------------------------------------------------------------------------------
# The part of one device. Suffixes: n positions (supervised first, padded to whole chunks), c one chunk, v vocabulary.


@dataclasses.dataclass(frozen=True)
class _Layout:
    chunk: int
    softcap: float | None = None
    vocab_axis: str | None = None
    """Mesh axis that splits the head's rows; None if the head is whole."""
    row_axes: tuple[str, ...] = ()
    """Mesh axes that split the batch."""


class _Positions(NamedTuple):
    order_n: jax.Array
    """Index into the flattened batch, supervised positions first; past the end for the padding of the last chunk."""
    targets_n: jax.Array
    supervised: jax.Array
    """Number of positions with loss."""

    def at(self, index: jax.Array, chunk: int) -> "_Positions":
        order_c, targets_c = (
            jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk) for x in (self.order_n, self.targets_n)
        )
        return _Positions(order_c, targets_c, jnp.clip(self.supervised - index * chunk, 0, chunk))


def _supervised_first(targets_bt: jax.Array, loss_mask_bt: jax.Array, chunk: int) -> _Positions:
    mask = loss_mask_bt.reshape(-1)
    order = jnp.argsort(~mask, stable=True)
    padding = -mask.size % chunk
    order_n = jnp.pad(order, (0, padding), constant_values=mask.size)
    return _Positions(order_n, jnp.pad(targets_bt.reshape(-1)[order], (0, padding)), jnp.sum(mask))


def _loop(positions: _Positions, layout: _Layout, body: Callable, init: Any) -> Any:
    with jax.named_scope(LOOP_SCOPE):
        return jax.lax.fori_loop(0, (positions.supervised + layout.chunk - 1) // layout.chunk, body, init)


def _put(x_n: jax.Array, index: jax.Array, x_c: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_n, x_c.astype(x_n.dtype), index * x_c.shape[0], 0)


def _put_back(x_n: jax.Array, positions: _Positions, shape: tuple[int, ...]) -> jax.Array:
    """From sorted order to the batch's original order and shape."""
    rows = jnp.zeros((shape[0] * shape[1], *x_n.shape[1:]), x_n.dtype)
    return rows.at[positions.order_n].set(x_n, mode="drop", unique_indices=True).reshape(shape)


class _ChunkStatistics(NamedTuple):
    """Statistics of one chunk; zero beyond its supervised positions."""

    loss_c: jax.Array
    is_likeliest_c: jax.Array
    """Whether no token is more likely than the target."""
    gradient_cv: jax.Array
    """d loss / d (hidden · head), through the cap if there is one."""


def _chunk_statistics(hidden_cd: jax.Array, head_vd: jax.Array, here: _Positions, layout: _Layout) -> _ChunkStatistics:
    logits_cv = jnp.einsum("cd,vd->cv", hidden_cd, head_vd, preferred_element_type=jnp.float32)
    logits_cv = capped(logits_cv, layout.softcap)
    vocab_start = jnp.int32(0)
    highest_c = jnp.max(logits_cv, axis=-1)
    if layout.vocab_axis:
        vocab_start = jax.lax.axis_index(layout.vocab_axis) * head_vd.shape[0]
        highest_c = jax.lax.pmax(highest_c, layout.vocab_axis)
    is_target_cv = here.targets_n[:, None] == vocab_start + jnp.arange(head_vd.shape[0])
    exponentials_cv = jnp.exp(logits_cv - highest_c[:, None])
    normalizer_c = jnp.sum(exponentials_cv, axis=-1)
    target_logit_c = jnp.sum(jnp.where(is_target_cv, logits_cv, 0.0), axis=-1)
    if layout.vocab_axis:
        normalizer_c, target_logit_c = jax.lax.psum((normalizer_c, target_logit_c), layout.vocab_axis)
    live_c = jnp.arange(layout.chunk) < here.supervised
    loss_c = jnp.where(live_c, jnp.log(normalizer_c) + highest_c - target_logit_c, 0.0)
    gradient_cv = jnp.where(live_c[:, None], exponentials_cv / normalizer_c[:, None] - is_target_cv, 0.0)
    gradient_cv = through_cap(gradient_cv, logits_cv, layout.softcap)
    return _ChunkStatistics(loss_c, live_c & (target_logit_c >= highest_c), gradient_cv)


def _through_head(gradient_cv: jax.Array, head_vd: jax.Array, layout: _Layout) -> jax.Array:
    gradient_cd = jnp.einsum(
        "cv,vd->cd", gradient_cv.astype(head_vd.dtype), head_vd, preferred_element_type=jnp.float32
    )
    return jax.lax.psum(gradient_cd, layout.vocab_axis) if layout.vocab_axis else gradient_cd


def _losses(
    hidden_btd: jax.Array, head_vd: jax.Array, targets_bt: jax.Array, loss_mask_bt: jax.Array, *, layout: _Layout
) -> jax.Array:
    return _scores(hidden_btd, head_vd, targets_bt, loss_mask_bt, layout=layout)[0]


def _scores(
    hidden_btd: jax.Array, head_vd: jax.Array, targets_bt: jax.Array, loss_mask_bt: jax.Array, *, layout: _Layout
) -> tuple[jax.Array, jax.Array]:
    """Losses, and whether each target is the most likely token."""
    hidden_nd = hidden_btd.reshape(-1, hidden_btd.shape[-1])
    positions = _supervised_first(targets_bt, loss_mask_bt, layout.chunk)

    def body(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        losses_n, is_likeliest_n = carry
        here = positions.at(index, layout.chunk)
        found = _chunk_statistics(hidden_nd[here.order_n], head_vd, here, layout)
        return _put(losses_n, index, found.loss_c), _put(is_likeliest_n, index, found.is_likeliest_c)

    shape = positions.order_n.shape
    losses_n, is_likeliest_n = _loop(positions, layout, body, (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)))
    losses_bt = _put_back(losses_n, positions, targets_bt.shape)
    return losses_bt, _put_back(is_likeliest_n, positions, targets_bt.shape)


def _losses_and_gradients(
    hidden_btd: jax.Array, head_vd: jax.Array, targets_bt: jax.Array, loss_mask_bt: jax.Array, *, layout: _Layout
) -> tuple[jax.Array, jax.Array]:
    """Losses, and the gradient of each loss with respect to its hidden state."""
    hidden_nd = hidden_btd.reshape(-1, hidden_btd.shape[-1])
    positions = _supervised_first(targets_bt, loss_mask_bt, layout.chunk)

    def body(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        losses_n, gradients_nd = carry
        here = positions.at(index, layout.chunk)
        loss_c, _, gradient_cv = _chunk_statistics(hidden_nd[here.order_n], head_vd, here, layout)
        gradient_cd = _through_head(gradient_cv, head_vd, layout)
        return _put(losses_n, index, loss_c), _put(gradients_nd, index, gradient_cd)

    size = positions.order_n.size
    init = jnp.zeros((size,), jnp.float32), jnp.zeros((size, hidden_nd.shape[1]), hidden_nd.dtype)
    losses_n, gradients_nd = _loop(positions, layout, body, init)
    losses_bt = _put_back(losses_n, positions, targets_bt.shape)
    return losses_bt, _put_back(gradients_nd, positions, hidden_btd.shape)


def _all_gradients(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    targets_bt: jax.Array,
    loss_mask_bt: jax.Array,
    cotangent_bt: jax.Array,
    *,
    columns: int,
    layout: _Layout,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of Σ cotangent · loss with respect to hidden states and the last `columns` of the head."""
    hidden_gradient_btd, head_gradient_vk = _gradients(
        hidden_btd,
        head_vd,
        targets_bt,
        loss_mask_bt,
        cotangent_bt,
        lambda gradient_cv: gradient_cv,
        (head_vd.shape[0], columns),
        layout,
    )
    # If the zeros are only sliced off again, as for a frozen matrix with an adapter, XLA never creates them.
    head_gradient_vd = jnp.pad(head_gradient_vk, ((0, 0), (head_vd.shape[1] - columns, 0)))
    return hidden_gradient_btd, head_gradient_vd.astype(head_vd.dtype)


def _row_gradients(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    targets_bt: jax.Array,
    loss_mask_bt: jax.Array,
    cotangent_bt: jax.Array,
    *,
    ids: tuple[int, ...],
    layout: _Layout,
) -> tuple[jax.Array, jax.Array]:
    """Gradients with respect to hidden states and, float32, to the rows `ids` of the head."""
    row_i = jnp.array(ids)
    if layout.vocab_axis:
        row_i -= jax.lax.axis_index(layout.vocab_axis) * head_vd.shape[0]
    is_here_i = (row_i >= 0) & (row_i < head_vd.shape[0])

    def of_rows(gradient_cv: jax.Array) -> jax.Array:
        return jnp.where(is_here_i, gradient_cv[:, jnp.clip(row_i, 0, head_vd.shape[0] - 1)], 0)

    shape = (len(ids), head_vd.shape[1])
    inputs = (hidden_btd, head_vd, targets_bt, loss_mask_bt, cotangent_bt)
    hidden_gradient_btd, row_gradient_id = _gradients(*inputs, of_rows, shape, layout)
    if layout.vocab_axis:
        row_gradient_id = jax.lax.psum(row_gradient_id, layout.vocab_axis)
    return hidden_gradient_btd, row_gradient_id


def _gradients(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    targets_bt: jax.Array,
    loss_mask_bt: jax.Array,
    cotangent_bt: jax.Array,
    of_rows: Callable[[jax.Array], jax.Array],
    shape: tuple[int, int],
    layout: _Layout,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of Σ cotangent · loss with respect to hidden states and, float32 [rows, columns], to a part of the
    head: the rows that `of_rows` selects from the gradient of logits, and as many last columns as `shape` has."""
    hidden_nd, cotangent_n = hidden_btd.reshape(-1, hidden_btd.shape[-1]), cotangent_bt.reshape(-1)
    positions = _supervised_first(targets_bt, loss_mask_bt, layout.chunk)

    def body(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        gradients_nd, head_gradient_vk = carry
        here = positions.at(index, layout.chunk)
        hidden_cd = hidden_nd[here.order_n]
        gradient_cv = (
            _chunk_statistics(hidden_cd, head_vd, here, layout).gradient_cv * cotangent_n[here.order_n][:, None]
        )
        through_cd = _through_head(gradient_cv, head_vd, layout)
        trained_ck = hidden_cd[:, -shape[1] :]
        head_gradient_vk += jnp.einsum(
            "cv,ck->vk", of_rows(gradient_cv).astype(hidden_cd.dtype), trained_ck, preferred_element_type=jnp.float32
        )
        return _put(gradients_nd, index, through_cd), head_gradient_vk

    init = (
        jnp.zeros((positions.order_n.size, hidden_nd.shape[1]), hidden_nd.dtype),
        jnp.zeros(shape, jnp.float32),
    )
    gradients_nd, head_gradient_vk = _loop(positions, layout, body, init)
    if layout.row_axes:
        head_gradient_vk = jax.lax.psum(head_gradient_vk, layout.row_axes)
    return _put_back(gradients_nd, positions, hidden_btd.shape), head_gradient_vk


def _on_mesh(local: Callable, logits: _Logits, head_vd: jax.Array, outputs: Any) -> Callable:
    """Runs `local` on every device's rows; `outputs` gives the sharding of each result: like "rows", like the "head",
    or "whole"."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    split_vocab = not mesh.empty and mesh.shape[TENSOR_AXIS] > 1 and head_vd.shape[0] % mesh.shape[TENSOR_AXIS] == 0

    def run(hidden_btd: jax.Array, *others: jax.Array) -> Any:
        positions = hidden_btd.shape[0] * hidden_btd.shape[1] // devices
        layout = _Layout(
            chunk=chunk_size(positions) if logits.chunk is None else min(logits.chunk, positions),
            softcap=logits.softcap,
            vocab_axis=TENSOR_AXIS if split_vocab else None,
            row_axes=() if mesh.empty else BATCH_AXES,
        )
        share = functools.partial(local, layout=layout)
        if mesh.empty:
            return share(hidden_btd, *others)
        specs = {"rows": P(BATCH_AXES), "head": P(layout.vocab_axis), "whole": P()}
        in_specs = (specs["rows"], specs["head"], *(specs["rows"] for _ in others[1:]))
        out_specs = jax.tree.map(specs.__getitem__, outputs)
        return jax.shard_map(share, in_specs=in_specs, out_specs=out_specs, check_vma=False)(hidden_btd, *others)

    return run
