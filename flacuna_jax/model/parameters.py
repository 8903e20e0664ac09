"""Parameters by name. Rooms exchange them as flat dicts, `{"layers/q_proj/weight": array}`; `ModelSpec` turns such a
dict into a `Llama` and knows every name, shape and dtype without allocating anything."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from flacuna_jax.config import LoraConfig
from flacuna_jax.model.llama import Llama, LlamaConfig
from flacuna_jax.model.lora import BaseParam, LoRAParam
from flacuna_jax.model.sharding import parameter_shardings

Params = dict[str, jax.Array]
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything static about a network: sizes, adapters, compute dtype, and the dtype its base is held in."""

    config: LlamaConfig
    lora: LoraConfig | None = None
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"

    def create(self, seed: int | jax.Array) -> Llama:
        dtypes = {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}
        return Llama(self.config, self.lora, **dtypes, rngs=nnx.Rngs(params=jax.random.key(seed)))

    @functools.cached_property
    def abstract(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self.create(0)))

    @property
    def base_shapes(self) -> Shapes:
        return self._shapes(BaseParam)

    @property
    def lora_shapes(self) -> Shapes:
        """Names and shapes of the adapters; empty without LoRA."""
        return self._shapes(LoRAParam)

    def _shapes(self, kind: type[nnx.Variable]) -> Shapes:
        leaves = nnx.to_flat_state(self.abstract[1])
        return {_name(path): tuple(leaf.shape) for path, leaf in leaves if isinstance(leaf, kind)}

    def merge(self, params: Mapping[str, jax.Array]) -> Llama:
        """The network with the given base and adapter arrays; names must be exactly those of the spec."""
        graph, state = self.abstract
        return nnx.merge(
            graph, nnx.from_flat_state([(p, v.replace(params[_name(p)])) for p, v in nnx.to_flat_state(state)])
        )


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of scalars in named shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def base_shapes(config: LlamaConfig) -> Shapes:
    """Names and shapes of the base's parameters, stacked [layers, ...] and [out, in]."""
    return ModelSpec(config).base_shapes


def lora_shapes(config: LlamaConfig, lora: LoraConfig) -> Shapes:
    """Names and shapes of the adapters: A [layers, rank, in], B [layers, out, rank] of each targeted projection."""
    return ModelSpec(config, lora).lora_shapes


def init_params(spec: ModelSpec, shapes: Shapes, seed: int, mesh: Mesh) -> Params:
    """Freshly drawn parameters of the given names, born sharded; the same numbers on any mesh.

    Only what is asked for is made: drawing the adapters of a 13B model allocates no base.
    """

    def draw(seed: jax.Array) -> Params:
        _, state = nnx.split(spec.create(seed))
        drawn = {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}
        return {name: drawn[name] for name in shapes}

    with jax.set_mesh(mesh):
        return jax.jit(draw, out_shardings=parameter_shardings(shapes, mesh))(jnp.uint32(seed))
