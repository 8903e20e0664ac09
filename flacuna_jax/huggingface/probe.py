"""Logits and greedy continuations with some rows of one matrix in memory at a time.

So a written model, and what it was made from, can be asked on a machine much smaller than either. The layers are the
model's own (`Block`); only its matrices are stood in for by ones that are read while they are multiplied. Everything is
float32, whatever the weights are, on the CPU.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flacuna_jax.config import PROJECTIONS
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.load import match_tensors
from flacuna_jax.huggingface.tensors import TensorReader, cast, host_device, row_blocks
from flacuna_jax.model.llama import Block, LlamaConfig, RMSNorm, Rope
from flacuna_jax.model.lora import peft_module, row_norms
from flacuna_jax.model.parameters import base_shapes

Weights = Callable[[str, int, slice], np.ndarray]
"""(parameter path, layer, rows) → those rows, in any floating dtype; the layer is 0 for what exists once."""

FLOAT = np.dtype(np.float32)


def stored_weights(reader: TensorReader, config: LlamaConfig) -> Weights:
    """Weights from the files of a checkpoint."""
    sources = match_tensors(reader, config)
    return lambda path, layer, rows: reader.read(sources[path][layer], rows)


def probe_ids(config: LlamaConfig, length: int = 8) -> np.ndarray:
    """Fixed token ids spread over the vocabulary, int32 [length]."""
    return (1 + np.arange(length, dtype=np.int64) * 7919 % (config.vocab_size - 1)).astype(np.int32)


def streamed_logits(weights: Weights, config: LlamaConfig, ids_t: np.ndarray, adapter: Adapter | None) -> np.ndarray:
    """Float32 logits [length, vocab] of one sequence.

    Args:
      weights: where weights come from; each row is asked for once.
      config: sizes.
      ids_t: int32 token ids.
      adapter: added beside the base, not merged into it.
    """
    return StreamedModel(weights, config, adapter, batch=1, slots=len(ids_t)).extend(ids_t[None])[0]


def streamed_greedy(
    weights: Weights, config: LlamaConfig, prompts: Sequence[Sequence[int]], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` likeliest next tokens of each prompt, one after another; every one costs one reading of the weights.

    Returns:
      ids int32 [prompts, count], and margins float32 [prompts, count]: by how much a token's logit exceeds the next.
    """
    longest = max(map(len, prompts))
    first_b = np.array([longest - len(prompt) for prompt in prompts])
    tokens_bt = np.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], np.int32)
    model = StreamedModel(weights, config, None, batch=len(prompts), slots=longest + count, first_b=first_b)
    chosen, margins = [], []
    for _ in range(count):
        logits_bv = model.extend(tokens_bt, last_only=True)[:, -1]
        two_b2 = np.sort(np.partition(logits_bv, -2, axis=-1)[:, -2:], axis=-1)
        tokens_bt = np.argmax(logits_bv, axis=-1).astype(np.int32)[:, None]
        chosen.append(tokens_bt[:, 0])
        margins.append(two_b2[:, 1] - two_b2[:, 0])
    return np.stack(chosen, axis=1), np.stack(margins, axis=1)


class StreamedModel:
    """A network whose weights are read anew for every call, with a cache of keys and values between calls.

    Args:
      weights, config, adapter: as for `streamed_logits`.
      batch: sequences.
      slots: tokens that a sequence can have.
      first_b: slot where each sequence begins, so that all end together; 0 by default.
    """

    def __init__(
        self,
        weights: Weights,
        config: LlamaConfig,
        adapter: Adapter | None,
        *,
        batch: int,
        slots: int,
        first_b: np.ndarray | None = None,
    ) -> None:
        self._weights, self._config, self._adapter = weights, config, adapter
        self._first_b = np.zeros(batch, np.int64) if first_b is None else first_b
        self._kept = np.zeros((2, config.num_layers, batch, slots, config.num_kv_heads, config.head_dim), FLOAT)
        self._filled = 0
        self._shapes = base_shapes(config)

    def extend(self, tokens_bt: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        """Adds tokens; float32 logits [batch, tokens, vocab] of them, or [batch, 1, vocab] of the last alone."""
        self.begin(tokens_bt)
        for layer in range(self._config.num_layers):
            self.through(layer)
        return self.finish(last_only=last_only)

    def begin(self, tokens_bt: np.ndarray) -> None:
        """`extend` in steps: first this, which reads the embedding, then `through` each layer, then `finish`."""
        self._slots_t = self._filled + np.arange(tokens_bt.shape[1])
        self._filled += len(self._slots_t)
        positions_bt = np.maximum(self._slots_t - self._first_b[:, None], 0)
        with _in_float32():
            self._rope = Rope.at(jnp.asarray(positions_bt), self._config.rope_frequencies)
            self._x_btd = jnp.asarray(self._embed(tokens_bt))

    def through(self, layer: int) -> None:
        with _in_float32():
            attend = functools.partial(self._attend, layer, self._slots_t)
            self._x_btd = Block.__call__(self._block(layer), self._x_btd, self._rope, attend)

    def finish(self, *, last_only: bool = False) -> np.ndarray:
        """Reads the head; the logits."""
        with _in_float32():
            hidden_btd = self._norm("norm/weight", 0)(self._x_btd[:, -1:] if last_only else self._x_btd)
            head = "embed_tokens/weight" if self._config.tie_word_embeddings else "lm_head/weight"
            return np.asarray(self._project(head, 0, hidden_btd))

    def _embed(self, tokens_bt: np.ndarray) -> np.ndarray:
        """Looks up one row at a time: no other part of the table is read."""
        rows = {i: self._weights("embed_tokens/weight", 0, slice(i, i + 1)) for i in np.unique(tokens_bt).tolist()}
        return np.stack([np.stack([cast(rows[i][0], FLOAT) for i in sequence]) for sequence in tokens_bt.tolist()])

    def _block(self, layer: int) -> Any:
        """What `Block` has in its place: sizes, and things to call under the names of its modules."""
        modules = {name: functools.partial(self._linear, f"layers/{name}", layer) for name in PROJECTIONS}
        norms = ("input_layernorm", "post_attention_layernorm")
        return SimpleNamespace(
            config=self._config, **modules, **{name: self._norm(f"layers/{name}/weight", layer) for name in norms}
        )

    def _norm(self, path: str, layer: int) -> RMSNorm:
        norm = RMSNorm(self._config.hidden_size, self._config.rms_norm_eps, jnp.dtype(FLOAT))
        norm.weight[...] = jnp.asarray(cast(self._weights(path, layer, slice(None)), FLOAT))
        return norm

    def _linear(self, module: str, layer: int, x_bti: jax.Array, _: Any = None) -> jax.Array:
        y_bto, bias = self._project(f"{module}/weight", layer, x_bti), f"{module}/bias"
        return y_bto + cast(self._weights(bias, layer, slice(None)), FLOAT) if bias in self._shapes else y_bto

    def _project(self, path: str, layer: int, x_bti: jax.Array) -> jax.Array:
        """x times a matrix, with its adapter if it has one."""
        module, adapter = path.removesuffix("/weight"), self._adapter
        shape = self._shapes[path][1:] if names.is_stacked(path) else self._shapes[path]
        blocks = row_blocks(shape, FLOAT.itemsize)
        if adapter is None or f"{module}/lora_a" not in adapter.params or layer not in adapter.layers_of(module):
            return jnp.concatenate([_product(x_bti, self._weights(path, layer, rows)) for rows in blocks], axis=-1)
        a_ri = adapter.factor(f"{module}/lora_a", layer)
        b_or = adapter.factor(f"{module}/lora_b", layer) * np.float32(adapter.lora.scale_of(peft_module(module, layer)))
        pieces = []
        for rows in blocks:
            weight_oi = self._weights(path, layer, rows)
            y_bto = _sum_of_products(x_bti, weight_oi, a_ri, b_or[rows])
            if adapter.lora.use_dora:
                length_o = adapter.factor(f"{module}/lora_magnitude", layer)[rows]
                y_bto = y_bto * (length_o / row_norms(*map(jnp.asarray, (cast(weight_oi, FLOAT), a_ri, b_or[rows]))))
            pieces.append(y_bto)
        return jnp.concatenate(pieces, axis=-1)

    def _attend(
        self, layer: int, slots_t: np.ndarray, q_bthn: jax.Array, k_btkn: jax.Array, v_btkn: jax.Array
    ) -> jax.Array:
        for kept, new in zip(self._kept, (k_btkn, v_btkn), strict=True):
            kept[layer][:, slots_t] = np.asarray(new)
        slots_s = np.arange(self._kept.shape[3])
        visible_bts = (slots_s >= self._first_b[:, None, None]) & (slots_s <= slots_t[:, None])
        if self._config.sliding_window is not None:
            visible_bts &= slots_s > slots_t[:, None] - self._config.sliding_window
        return _attention(q_bthn, *self._kept[:, layer], visible_bts)


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


@jax.jit
def _attention(q_bthn: jax.Array, k_bskn: jax.Array, v_bskn: jax.Array, visible_bts: jax.Array) -> jax.Array:
    """Softmax attention over the visible slots; a token of the padding, which sees none, gets anything."""
    batch, length, _, size = q_bthn.shape
    q_btkgn = q_bthn.reshape(batch, length, k_bskn.shape[2], -1, size)
    scores = jnp.einsum("btkgn,bskn->bkgts", q_btkgn, k_bskn) * size**-0.5
    weights = jax.nn.softmax(jnp.where(visible_bts[:, None, None], scores, -1e30), axis=-1)
    return jnp.einsum("bkgts,bskn->btkgn", weights, v_bskn).reshape(q_bthn.shape)
