"""LoRA as a partition of the parameters: `BaseParam` and `LoRAParam` are separate variable types of one module.

Hu et al., 2021 (arXiv:2106.09685), with PEFT's conventions: y = W x + (alpha / rank) · B A dropout(x), A drawn from
U(±1/√in), B zero.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flacuna_jax.config import LoraConfig
from flacuna_jax.model.sharding import Axes, gather_weight

INITIALIZER_RANGE = 0.02
"""Standard deviation of a fresh base matrix (Hugging Face's `initializer_range`)."""


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
        if self.lora is None:
            return y_bto
        a_ri, b_or = self.lora_a[...].astype(x_bti.dtype), self.lora_b[...].astype(x_bti.dtype)
        if row_keys_b is not None and self.lora.dropout > 0:
            x_bti = dropout_rows(x_bti, fold_keys(row_keys_b, self.module_id), self.lora.dropout)
        return y_bto + (x_bti @ a_ri.T) @ b_or.T * self.lora.scale


def base_matrix(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return (INITIALIZER_RANGE * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def fold_keys(keys_b: jax.Array, data: jax.Array | int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_b, data)


def dropout_rows(x_bti: jax.Array, keys_b: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout with one key per row, so that no partition of a batch over devices or steps changes it."""
    keep_bti = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_bti.shape[1:]))(keys_b)
    return jnp.where(keep_bti, x_bti / (1 - rate), jnp.zeros((), x_bti.dtype))
