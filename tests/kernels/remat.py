"""How often a backend's kernels stand in the compiled gradient of three layers that are checkpointed."""

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flacuna_jax.kernels.attention import Backend, attention
from flacuna_jax.kernels.packed_mask import PackedMask


def kernels_in_gradient(
    mesh: Mesh, lowering: AbstractContextManager[Any], call: str, policy: Any, backend: Backend = "auto"
) -> int:
    """`call` is the text by which a kernel is found in the compiled program, `lowering` the context to lower in."""
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((4, 1280, 4, 128), jnp.bfloat16, sharding=whole)
    weights = jax.ShapeDtypeStruct((3, 128, 128), jnp.bfloat16, sharding=whole)
    interval = jax.ShapeDtypeStruct((4, 1280), jnp.int32, sharding=whole)

    def loss(x: jax.Array, weights: jax.Array, mask: PackedMask) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            h = x @ weight
            return x + attention(h, h, h, mask, backend=backend), None

        x, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), x, weights)
        return jnp.sum(x.astype(jnp.float32))

    with lowering:
        lowered = jax.jit(jax.grad(loss, 1)).lower(x, weights, PackedMask(interval, interval))
        return (lowered.compile().as_text() or "").count(call)
