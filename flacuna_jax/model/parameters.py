"""Parameters by name. Rooms exchange them as flat dicts, `{"layers/q_proj/weight": array}`; `ModelSpec` turns such a
dict into a `Llama` and knows every name, shape and dtype without allocating anything."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flacuna_jax.config import LoraConfig
from flacuna_jax.model.llama import Llama, LlamaConfig
from flacuna_jax.model.lora import BaseParam, LoRAParam, LoRAScale, Ranks, adapter_ranks, initial_magnitudes
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

    @property
    def ranks(self) -> dict[str, Ranks]:
        """Each module's ranks and scales by layer; empty without LoRA."""
        return {} if self.lora is None else adapter_ranks(self.lora, self.config.num_layers)

    @property
    def trainable_count(self) -> int:
        """Scalars that training moves: those of `lora_shapes` less the zeros beyond each layer's own rank."""
        if self.lora is None:
            return count(self.base_shapes)
        shapes, total = self.lora_shapes, 0
        for module, (ranks, _) in self.ranks.items():
            into, out = shapes[f"{module}/lora_a"][-1], shapes[f"{module}/lora_b"][-2]
            total += int(ranks.sum()) * (into + out) + self.lora.use_dora * int((ranks > 0).sum()) * out
        return total

    @functools.cached_property
    def scales(self) -> dict[str, np.ndarray]:
        """The values of `LoRAScale` variables: [layers], or a scalar for the head."""
        return {
            f"{module}/lora_scale": ranks.scales if module.startswith("layers/") else ranks.scales[0]
            for module, ranks in self.ranks.items()
        }

    def merge(self, params: Mapping[str, jax.Array]) -> Llama:
        """The network with the given base and adapter arrays; names must be exactly those of the spec."""
        graph, state = self.abstract
        filled = []
        for path, variable in nnx.to_flat_state(state):
            name = _name(path)
            value = jnp.asarray(self.scales[name]) if isinstance(variable, LoRAScale) else params[name]
            filled.append((path, variable.replace(value)))
        return nnx.merge(graph, nnx.from_flat_state(filled))


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


def fresh_adapters(spec: ModelSpec, base: Mapping[str, jax.Array], seed: int, mesh: Mesh) -> Params:
    """PEFT's initialisation, the same numbers on any mesh: A uniform, B zero, DoRA's magnitudes the row norms of W.

    `base` is read only for DoRA.
    """
    shapes = spec.lora_shapes
    drawn = {name: shape for name, shape in shapes.items() if not name.endswith("lora_magnitude")}
    adapters = init_params(spec, drawn, seed, mesh)
    measured = {name: shape for name, shape in shapes.items() if name not in drawn}
    if not measured:
        return adapters
    weights = {module: base[f"{module}/weight"] for module in spec.ranks}
    with jax.set_mesh(mesh):
        measure = jax.jit(
            lambda weights: initial_magnitudes(weights, spec.ranks), out_shardings=parameter_shardings(measured, mesh)
        )
        return {**adapters, **measure(weights)}
