"""LoRA as a partition of the parameters: `BaseParam` and `LoRAParam` are separate variable types of one module.

Hu et al., 2021 (arXiv:2106.09685), with PEFT's conventions: y = W x + (alpha / rank) · B A dropout(x), A drawn from
U(±1/√in), B zero.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flacuna_jax.config import LoraConfig
from flacuna_jax.model.sharding import Axes, gather_weight

OUTPUT_NAME = "projection"
"""Of every projection's output, adapter included, for `jax.checkpoint_policies.save_only_these_names`."""


class BaseParam(nnx.Variable):
    """A weight of the base: frozen in compute dtype beside adapters, float32 when it is itself trained."""


class LoRAParam(nnx.Variable):
    """An adapter weight, always float32."""


class LoRALinear(nnx.Module):
    """A projection [out, in] with an optional low-rank adapter beside it.

    Args:
      axes: logical axes (out, in) of the kernel, see `sharding.RULES`.
      lora: the adapter's settings, None for a plain projection.
      module_id: distinguishes the dropout of this projection from its neighbours'.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: Axes,
        lora: LoraConfig | None,
        module_id: int,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.axes, self.lora, self.module_id = axes, lora, module_id
        self.weight = BaseParam(base_matrix(rngs.params(), (out_features, in_features), param_dtype))
        if lora is not None:
            bound = in_features**-0.5
            shape_a = (lora.rank, in_features)
            self.lora_a = LoRAParam(jax.random.uniform(rngs.params(), shape_a, jnp.float32, -bound, bound))
            self.lora_b = LoRAParam(jnp.zeros((out_features, lora.rank), jnp.float32))

    def __call__(self, x_bti: jax.Array, row_keys_b: jax.Array | None = None) -> jax.Array:
        """[batch, length, in] → [batch, length, out] in x's dtype; dropout only when there are keys."""
        weight_oi = gather_weight(self.weight[...].astype(x_bti.dtype), *self.axes)
        y_bto = x_bti @ weight_oi.T
        if self.lora is not None:
            a_ri, b_or = self.lora_a[...].astype(x_bti.dtype), self.lora_b[...].astype(x_bti.dtype)
            if row_keys_b is not None and self.lora.dropout > 0:
                x_bti = dropout_rows(x_bti, fold_keys(row_keys_b, self.module_id), self.lora.dropout)
            y_bto += _by_group(_by_group(x_bti, a_ri), b_or) * self.lora.scale
        return checkpoint_name(y_bto, OUTPUT_NAME)


def _by_group(x_bti: jax.Array, weight: jax.Array) -> jax.Array:
    """x times the transpose of `weight`: one [out, in] for all rows, or [groups, out, in], one for each equal part of
    the batch in its order."""
    if weight.ndim == 2:
        return x_bti @ weight.T
    x_gbti = x_bti.reshape(weight.shape[0], -1, *x_bti.shape[1:])
    return jnp.einsum("gbti,goi->gbto", x_gbti, weight).reshape(*x_bti.shape[:2], -1)


def base_matrix(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """A fresh matrix [out, in] or table [vocab, model]: normal, variance 1 / last dimension.

    At LLaMA's widths that is Hugging Face's 0.02; a small model drawn with 0.02 stays on a plateau where attention is
    uniform for most of its training.
    """
    return (shape[-1] ** -0.5 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def fold_keys(keys_b: jax.Array, data: jax.Array | int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_b, data)


def dropout_rows(x_bti: jax.Array, keys_b: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout with one key per row, so that no partition of a batch over devices or steps changes it."""
    keep_bti = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_bti.shape[1:]))(keys_b)
    return jnp.where(keep_bti, x_bti / (1 - rate), jnp.zeros((), x_bti.dtype))
