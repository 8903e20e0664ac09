"""Computes logits and greedy continuations with only some rows of one matrix in memory at a time.

Therefore a written model and its source can be evaluated on a machine with much less memory. The layers are the model's
own block, with modules that read their weights when they are called. All computation is in float32 on the CPU,
independent of the dtype of the weights.

Two models can be evaluated side by side, such as a base with its adapter and the merged model. Most of their matrices
are the same; those are converted to float32 once, and multiplied once with the tokens of both.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.files.tensors import TensorReader, cast, host_device, row_blocks
from flacuna_jax.huggingface.load import match_tensors
from flacuna_jax.kernels.softcap import capped
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.lora import LoRALinear, row_norms
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.variables import path_of

Weights = Callable[[str, int, slice], np.ndarray]
"""(parameter path, layer, rows) → those rows, in any floating dtype; the layer is 0 outside of the layers."""

FLOAT = np.dtype(np.float32)


def stored_weights(reader: TensorReader, config: LlamaConfig) -> Weights:
    """Weights from the files of a checkpoint."""
    sources = match_tensors(reader, config)
    return lambda path, layer, rows: reader.read(sources[path][layer], rows)


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the models that are evaluated side by side.

    Attributes:
      weights: the source of its weights.
      adapter: its adapter, which is added to products and not merged into the weights.
    """

    weights: Weights
    adapter: Adapter | None = None

    def has_adapter(self, module: str, layer: int) -> bool:
        return self.adapter is not None and layer in self.adapter.layers_of(module)

    def product(self, x_bti: jax.Array, weight_oi: np.ndarray, module: str, layer: int, rows: slice) -> jax.Array:
        """x times some rows of a matrix, with its adapter if it has one."""
        if self.adapter is None or not self.has_adapter(module, layer):
            return _product(x_bti, weight_oi)
        a_ri, b_or, length_o = self.adapter.factors(module, layer, rows)
        y_bto = _sum_of_products(x_bti, weight_oi, a_ri, b_or)
        return (
            y_bto
            if length_o is None
            else y_bto * (length_o / row_norms(*map(jnp.asarray, (cast(weight_oi, FLOAT), a_ri, b_or))))
        )


def probe_ids(config: LlamaConfig, length: int = 8) -> np.ndarray:
    """Fixed token ids spread over the vocabulary, int32 [length]."""
    return (1 + np.arange(length, dtype=np.int64) * 7919 % (config.vocab_size - 1)).astype(np.int32)


def streamed_logits(weights: Weights, config: LlamaConfig, ids_t: np.ndarray, adapter: Adapter | None) -> np.ndarray:
    """Float32 logits [length, vocab] of one sequence.

    Args:
      weights: the source of the weights; each row is read once.
      config: sizes.
      ids_t: int32 token ids.
      adapter: an adapter, which is added to products and not merged into the weights.
    """
    return StreamedModel([Side(weights, adapter)], config, batch=1, slots=len(ids_t)).extend(ids_t[None])[0]


def streamed_greedy(
    weights: Weights, config: LlamaConfig, prompts: Sequence[Sequence[int]], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The greedy continuation of each prompt by `count` tokens; each token reads the weights once.

    Returns:
      ids int32 [prompts, count], and margins float32 [prompts, count]: the logit of the token minus the second largest.
    """
    longest = max(map(len, prompts))
    first_b = np.array([longest - len(prompt) for prompt in prompts])
    tokens_bt = np.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], np.int32)
    model = StreamedModel([Side(weights)], config, batch=len(prompts), slots=longest + count, first_b=first_b)
    chosen, margins = [], []
    for _ in range(count):
        logits_bv = model.extend(tokens_bt, last_only=True)[:, -1]
        two_b2 = np.sort(np.partition(logits_bv, -2, axis=-1)[:, -2:], axis=-1)
        tokens_bt = np.argmax(logits_bv, axis=-1).astype(np.int32)[:, None]
        chosen.append(tokens_bt[:, 0])
        margins.append(two_b2[:, 1] - two_b2[:, 0])
    return np.stack(chosen, axis=1), np.stack(margins, axis=1)


class StreamedModel:
    """Networks that read their weights again in every call, with a cache of keys and values between calls.

    Args:
      sides: the models; all of them get the same tokens, and their sequences are concatenated in the outputs.
      config: sizes.
      batch: number of sequences per side.
      slots: maximum number of tokens in a sequence.
      first_b: slot where each sequence begins, so that all end together; 0 by default.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        config: LlamaConfig,
        *,
        batch: int,
        slots: int,
        first_b: np.ndarray | None = None,
    ) -> None:
        self._sides, self._config = tuple(sides), config
        self._first_b = np.tile(np.zeros(batch, np.int64) if first_b is None else first_b, len(sides))
        kept = (2, config.num_layers, len(sides) * batch, slots, config.num_kv_heads, config.head_dim)
        self._kept = np.zeros(kept, FLOAT)
        self._filled = 0
        self._spec = ModelSpec(config, dtype=FLOAT.name, param_dtype=FLOAT.name)
        self._scratch = [np.empty(0, np.uint8) for _ in sides]
        self._layer = 0
        network = nnx.merge(*self._spec.abstract)
        self._norm = functools.partial(self._read, "norm", network.norm)
        self._block = network.layers
        for name, module in list(vars(network.layers).items()):
            if isinstance(module, LoRALinear):
                setattr(self._block, name, functools.partial(self._linear, f"layers/{name}", module))
            elif isinstance(module, nnx.Module):
                setattr(self._block, name, functools.partial(self._read, f"layers/{name}", module))

    def extend(self, tokens_bt: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        """Adds tokens [batch, tokens]. Returns float32 logits [sides · batch, tokens, vocab] of all of them or of the
        last."""
        self.begin(tokens_bt)
        for layer in range(self._config.num_layers):
            self.through(layer)
        return self.finish(last_only=last_only)

    def begin(self, tokens_bt: np.ndarray) -> None:
        """The first part of `extend`, which reads the embedding; `through` each layer and `finish` follow."""
        self._slots_t = self._filled + np.arange(tokens_bt.shape[1])
        self._filled += len(self._slots_t)
        positions_bt = np.maximum(self._slots_t - self._first_b[:, None], 0)
        with _in_float32():
            self._ropes = self._config.ropes_at(jnp.asarray(positions_bt))
            embedded = [_embed(side.weights, self._spec.embedding, tokens_bt) for side in self._sides]
            self._x_btd = jnp.asarray(np.concatenate(embedded)) * self._config.embedding_multiplier

    def through(self, layer: int) -> None:
        self._layer = layer
        with _in_float32():
            rope = self._config.rope_in(layer, self._ropes)
            self._x_btd = self._block(self._x_btd, rope, functools.partial(self._attend, layer, self._slots_t))

    def finish(self, *, last_only: bool = False) -> np.ndarray:
        """Reads the head and returns the logits."""
        with _in_float32():
            hidden_btd = self._norm(self._x_btd[:, -1:] if last_only else self._x_btd)
            logits_btv = self._project(self._spec.head, hidden_btd / self._config.logits_scaling)
            return np.asarray(capped(logits_btv, self._config.logits_softcap))

    def _read(self, path: str, module: nnx.Module, x: jax.Array) -> jax.Array:
        """Applies a small module of the network, such as a norm, with the weights of each side."""
        graph, abstract = nnx.split(module)

        def call(side: Side, x: jax.Array) -> jax.Array:
            filled = [
                (keys, variable.replace(self._whole(side, f"{path}/{path_of(keys)}")))
                for keys, variable in nnx.to_flat_state(abstract)
            ]
            return nnx.merge(graph, nnx.from_flat_state(filled))(x)

        return self._by_side(call, x)

    def _whole(self, side: Side, path: str) -> jax.Array:
        layer = self._layer if self._spec.base[path].stacked else 0
        return jnp.asarray(cast(side.weights(path, layer, slice(None)), FLOAT))

    def _linear(self, path: str, module: LoRALinear, x_bti: jax.Array, _: Any = None) -> jax.Array:
        y_bto = self._project(f"{path}/weight", x_bti)
        if not hasattr(module, "bias"):
            return y_bto
        return self._by_side(lambda side, y: y + self._whole(side, f"{path}/bias"), y_bto)

    def _by_side(self, function: Callable[[Side, jax.Array], jax.Array], x_btd: jax.Array) -> jax.Array:
        parts = jnp.split(x_btd, len(self._sides))
        return jnp.concatenate([function(side, part) for side, part in zip(self._sides, parts, strict=True)])

    def _project(self, path: str, x_bti: jax.Array) -> jax.Array:
        """x times a matrix of each side; computed once if the sides have the same matrix."""
        module, parameter = path.rpartition("/")[0], self._spec.base[path]
        layer, shape = self._layer if parameter.stacked else 0, parameter.layer_shape
        alike = not any(side.has_adapter(module, layer) for side in self._sides)
        y_bto = np.empty((*x_bti.shape[:-1], shape[0]), FLOAT)
        for rows in row_blocks(shape, _HALF):
            weights = [side.weights(path, layer, rows) for side in self._sides]
            if alike and all(_same(weights[0], other) for other in weights[1:]):
                y_bto[..., rows] = _product(x_bti, self._aligned(weights[0], 0))
                continue
            x_sides = jnp.split(x_bti, len(self._sides))
            weights = [self._aligned(weight, place) for place, weight in enumerate(weights)]
            parts = zip(self._sides, x_sides, weights, strict=True)
            y_bto[..., rows] = np.concatenate([side.product(x, w, module, layer, rows) for side, x, w in parts])
        return jnp.asarray(y_bto)

    def _aligned(self, weight: np.ndarray, place: int) -> np.ndarray:
        """The weight at an aligned address, where XLA uses it directly; copying others to new memory would take longer
        than their product. Valid until the next call for the same place."""
        if weight.ctypes.data % _ALIGNMENT == 0 and weight.flags.c_contiguous:
            return weight
        if len(self._scratch[place]) < weight.nbytes:
            raw = np.empty(weight.nbytes + _ALIGNMENT, np.uint8)
            self._scratch[place] = raw[-raw.ctypes.data % _ALIGNMENT :][: weight.nbytes]
        copy = self._scratch[place][: weight.nbytes].view(weight.dtype).reshape(weight.shape)
        copy[...] = weight
        return copy

    def _attend(
        self, layer: int, slots_t: np.ndarray, q_bthn: jax.Array, k_btkn: jax.Array, v_btkn: jax.Array
    ) -> jax.Array:
        for kept, new in zip(self._kept, (k_btkn, v_btkn), strict=True):
            kept[layer][:, slots_t] = np.asarray(new)
        slots_s = np.arange(self._kept.shape[3])
        visible_bts = (slots_s >= self._first_b[:, None, None]) & (slots_s <= slots_t[:, None])
        visible_bts &= slots_s >= self._config.first_visible(layer, slots_t)[:, None]
        return _attention(self._config, q_bthn, *self._kept[:, layer], visible_bts)


_ALIGNMENT = 64
_HALF = 2
"""Bytes per element of most stored weights; products are split into the same blocks as files."""


def _embed(weights: Weights, path: str, tokens_bt: np.ndarray) -> np.ndarray:
    """Looks up one row at a time, so that no other part of the table is read."""
    rows = {i: weights(path, 0, slice(i, i + 1)) for i in np.unique(tokens_bt).tolist()}
    return np.stack([np.stack([cast(rows[i][0], FLOAT) for i in sequence]) for sequence in tokens_bt.tolist()])


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same bits; most are the same view of a file."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    bits = f"u{a.dtype.itemsize}"
    return (a.ctypes.data, a.strides) == (b.ctypes.data, b.strides) or np.array_equal(a.view(bits), b.view(bits))


@contextlib.contextmanager
def _in_float32() -> Iterator[None]:
    with jax.default_device(host_device()), jax.default_matmul_precision("highest"):
        yield


@jax.jit
def _product(x_bti: jax.Array, weight_oi: jax.Array) -> jax.Array:
    return x_bti @ weight_oi.astype(jnp.float32).T


@jax.jit
def _sum_of_products(x_bti: jax.Array, weight_oi: jax.Array, a_ri: jax.Array, b_or: jax.Array) -> jax.Array:
    return x_bti @ weight_oi.astype(jnp.float32).T + (x_bti @ a_ri.T) @ b_or.T


@functools.partial(jax.jit, static_argnums=0)
def _attention(
    config: LlamaConfig, q_bthn: jax.Array, k_bskn: jax.Array, v_bskn: jax.Array, visible_bts: jax.Array
) -> jax.Array:
    """Softmax attention over the visible slots; the result for padding tokens, which see no slot, is arbitrary."""
    batch, length, _, size = q_bthn.shape
    q_btkgn = q_bthn.reshape(batch, length, k_bskn.shape[2], -1, size)
    scores = jnp.einsum("btkgn,bskn->bkgts", q_btkgn, k_bskn) * config.attention_scale
    scores = capped(scores, config.attention_softcap)
    weights = jax.nn.softmax(jnp.where(visible_bts[:, None, None], scores, -1e30), axis=-1)
    return jnp.einsum("bkgts,bskn->btkgn", weights, v_bskn).reshape(q_bthn.shape)
