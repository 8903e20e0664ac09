"""Logits with one layer in memory at a time, so that a written model can be checked on a machine smaller than it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flacuna_jax.config import LoraConfig
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.load import match_tensors
from flacuna_jax.huggingface.tensors import TensorReader, cast, host_device
from flacuna_jax.kernels.attention import attention
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.llama import Block, LlamaConfig, RMSNorm, Rope

Weights = Callable[[str, int | None], np.ndarray]
"""(parameter path, layer or None) → array in any floating dtype."""


def stored_weights(reader: TensorReader, config: LlamaConfig) -> Weights:
    """Weights from the files of a checkpoint."""
    sources = match_tensors(reader, config)
    return lambda path, layer: reader.read(sources[path][layer or 0])


def probe_ids(config: LlamaConfig, length: int = 16) -> np.ndarray:
    """Fixed token ids spread over the vocabulary, int32 [length]."""
    return (1 + np.arange(length, dtype=np.int64) * 7919 % (config.vocab_size - 1)).astype(np.int32)


def streamed_logits(weights: Weights, config: LlamaConfig, ids_t: np.ndarray, adapter: Adapter | None) -> np.ndarray:
    """Float32 logits [length, vocab] of one sequence, computed on the CPU in float32 whatever the weights are.

    Args:
      weights: where weights come from; each is asked for once.
      config: sizes.
      ids_t: int32 token ids.
      adapter: added beside the base, not merged into it.
    """
    table = "embed_tokens/weight"
    paths, block = _block(config, None if adapter is None else adapter.lora)
    with jax.default_device(host_device()), jax.default_matmul_precision("highest"):
        x_btd = jnp.asarray(cast(weights(table, None)[ids_t], np.dtype(np.float32)))[None]
        for layer in range(config.num_layers):
            leaves = [_leaf(weights, adapter, path, layer) for path in paths]
            x_btd = block(x_btd, leaves).block_until_ready()
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps, jnp.dtype("float32"))
        norm.weight[...] = jnp.asarray(cast(weights("norm/weight", None), np.dtype(np.float32)))
        head_vd = weights(table if config.tie_word_embeddings else "lm_head/weight", None)
        return _project(norm(x_btd)[0], head_vd)


Apply = Callable[[jax.Array, list[np.ndarray]], jax.Array]


@functools.lru_cache(maxsize=8)
def _block(config: LlamaConfig, lora: LoraConfig | None) -> tuple[list[str], Apply]:
    """The parameter paths of one layer, and the layer as a function of activations [1, length, model] and those."""
    abstract = nnx.eval_shape(lambda: Block(config, lora, jnp.dtype("float32"), nnx.Rngs(params=0)))
    graph, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)

    @jax.jit
    def apply(x_btd: jax.Array, leaves: list[jax.Array]) -> jax.Array:
        filled = [
            (path, variable.replace(leaf.astype(jnp.float32)))
            for (path, variable), leaf in zip(flat, leaves, strict=True)
        ]
        length = x_btd.shape[1]
        mask = make_packed_mask(jnp.ones((1, length), jnp.int32))
        rope = Rope.at(jnp.arange(length)[None], config.head_dim, config.rope_theta)
        layer = nnx.merge(graph, nnx.from_flat_state(filled))
        return layer(x_btd, rope, lambda q, k, v: attention(q, k, v, mask))

    return ["/".join(map(str, ("layers", *path))) for path, _ in flat], apply


def _leaf(weights: Weights, adapter: Adapter | None, path: str, layer: int) -> np.ndarray:
    if adapter is not None and path in adapter.params:
        return adapter.params[path][layer]
    return weights(path, layer)


def _project(hidden_td: jax.Array, head_vd: np.ndarray, rows: int = 8192) -> np.ndarray:
    pieces = [head_vd[start : start + rows] for start in range(0, len(head_vd), rows)]
    return np.concatenate([np.asarray(_scores(hidden_td, piece)) for piece in pieces], axis=-1)


@jax.jit
def _scores(hidden_td: jax.Array, head_vd: jax.Array) -> jax.Array:
    return hidden_td @ head_vd.astype(jnp.float32).T
