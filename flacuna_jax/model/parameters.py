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

from flacuna_jax.config import LoraConfig, ModelConfig
from flacuna_jax.model.llama import Llama, LlamaConfig
from flacuna_jax.model.lora import BaseParam, LoRAParam, LoRAScale, Ranks, adapter_ranks, require_matches
from flacuna_jax.model.quantized import KERNELS, Quantization, QuantParam
from flacuna_jax.model.sharding import parameter_shardings

Params = dict[str, jax.Array]
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything static about a network: sizes, adapters, compute dtype, and how its base is held."""

    config: LlamaConfig
    lora: LoraConfig | None = None
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    quantization: Quantization | None = None
    """Of the layers' projections; None holds them in `param_dtype`."""

    @classmethod
    def of_run(cls, config: LlamaConfig, model: ModelConfig, lora: LoraConfig | None) -> "ModelSpec":
        """LoRA: float32 adapters beside a base in compute dtype or quantised; without: float32 masters of it all.

        Raises:
          UserError: the adapters' settings select a layer that is not there, or have a pattern that matches nothing.
        """
        if lora is not None:
            require_matches(lora, config.num_layers)
        return cls(config, lora, model.dtype, model.dtype if lora else "float32", model.quantization)

    def create(self, seed: int | jax.Array) -> Llama:
        return Llama(
            self.config,
            self.lora,
            dtype=jnp.dtype(self.dtype),
            param_dtype=jnp.dtype(self.param_dtype),
            quantization=self.quantization,
            rngs=nnx.Rngs(params=jax.random.key(seed)),
        )

    @functools.cached_property
    def abstract(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self.create(0)))

    @property
    def base_shapes(self) -> Shapes:
        """Names and shapes of the base's parameters, before any quantisation."""
        return dict(_base_shapes(self.config))

    @property
    def held(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What is in memory for the base: its parameters, or what quantisation makes of them."""
        leaves = nnx.to_flat_state(self.abstract[1])
        kept = [(_name(path), leaf) for path, leaf in leaves if isinstance(leaf, BaseParam | QuantParam)]
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in kept}

    @property
    def lora_shapes(self) -> Shapes:
        """Names and shapes of the adapters; empty without LoRA."""
        leaves = nnx.to_flat_state(self.abstract[1])
        return {_name(path): tuple(leaf.shape) for path, leaf in leaves if isinstance(leaf, LoRAParam)}

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


@functools.lru_cache(maxsize=64)
def _base_shapes(config: LlamaConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(leaf.shape)) for name, leaf in ModelSpec(config).held.items())


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
    with jax.set_mesh(mesh):
        measure = jax.jit(functools.partial(_row_norms, spec), out_shardings=parameter_shardings(measured, mesh))
        return {**adapters, **measure(base)}


def _row_norms(spec: ModelSpec, base: Params) -> Params:
    """DoRA's magnitudes before training, [layers, out]: row norms of W, zero in layers without an adapter."""
    graph, stacked = nnx.split(spec.merge({**base, **{n: jnp.zeros(s) for n, s in spec.lora_shapes.items()}}).layers)

    def of_layer(state: nnx.State) -> Params:
        block = nnx.merge(graph, state)
        kernels = {module: getattr(block, module.removeprefix("layers/")).kernel(jnp.float32) for module in spec.ranks}
        return {module: jnp.linalg.norm(kernel, axis=-1) for module, kernel in kernels.items()}

    return {
        f"{module}/lora_magnitude": jnp.where(spec.ranks[module].ranks[:, None] > 0, norms_lo, 0)
        for module, norms_lo in jax.lax.map(of_layer, stacked).items()
    }


def quantize(spec: ModelSpec, mesh: Mesh, name: str, value: jax.Array) -> Params:
    """What a spec holds of a parameter of the base: itself, or the parts of its quantised form."""
    if spec.quantization is None or f"{name}/codes" not in spec.held:
        return {name: value}
    kernel = KERNELS[spec.quantization]
    parts = {part: leaf.shape for part, leaf in spec.held.items() if part.startswith(f"{name}/")}

    def of_layer(kernel_oi: jax.Array) -> Params:
        made = nnx.to_flat_state(nnx.state(kernel(kernel_oi)))
        return {f"{name}/{_name(path)}": variable[...] for path, variable in made}

    with jax.set_mesh(mesh):
        by_layer = functools.partial(jax.lax.map, of_layer)
        return jax.jit(by_layer, out_shardings=parameter_shardings(parts, mesh))(value)
