"""Parameters by path. The packages exchange them as flat dicts, `{"layers/q_proj/weight": array}`. `ModelSpec` converts
such a dict to a `Llama`. It has a `Parameter` for each entry, collected from the abstract network: shape, dtype, and
the `ParamInfo` in `llama.py`."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flacuna_jax.config.model import LoraConfig, ModelConfig
from flacuna_jax.config.types import AUTO
from flacuna_jax.model.llama import Block, Llama, LlamaConfig
from flacuna_jax.model.lora import LoRALinear, Ranks, adapter_ranks, require_matches
from flacuna_jax.model.quantized import KERNELS, Quantization
from flacuna_jax.model.sharding import parameter_shardings
from flacuna_jax.model.token_rows import NO_TOKENS, TrainedTokens
from flacuna_jax.model.variables import (
    BaseParam,
    LoRAParam,
    LoRAScale,
    ModuleName,
    Parameter,
    QuantParam,
    of_type,
    path_of,
)

Params = dict[str, jax.Array]
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The static properties of a network: sizes, adapters, compute dtype, and the form of its base."""

    config: LlamaConfig
    lora: LoraConfig | None = None
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    quantization: Quantization | None = None
    """Quantised form of the layers' projections; None stores them in `param_dtype`."""
    tokens: TrainedTokens = dataclasses.field(default=NO_TOKENS, repr=False)
    """Tokens whose rows of embedding and head are part of the adapter."""

    @classmethod
    def of_run(
        cls, config: LlamaConfig, model: ModelConfig, lora: LoraConfig | None, tokens: TrainedTokens = NO_TOKENS
    ) -> "ModelSpec":
        """With LoRA: float32 adapters and a base in compute dtype or quantised; without: all weights in float32.

        Raises:
          UserError: the adapters' settings select a layer that does not exist, or have a pattern that matches nothing.
        """
        if lora is not None:
            require_matches(lora, ModelSpec(config).linear.values())
            lora = lora.model_copy(update={"train_tokens": ()})  # `tokens` has their ids
        assert model.dtype != AUTO, "the start of a run replaces it"
        return cls(config, lora, model.dtype, model.dtype if lora else "float32", model.quantization, tokens)

    def create(self, seed: int | jax.Array) -> Llama:
        return Llama(
            self.config,
            self.lora,
            dtype=jnp.dtype(self.dtype),
            param_dtype=jnp.dtype(self.param_dtype),
            quantization=self.quantization,
            tokens=self.tokens,
            rngs=nnx.Rngs(params=jax.random.key(seed)),
        )

    @functools.cached_property
    def abstract(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self.create(0)))

    @property
    def base(self) -> dict[str, Parameter]:
        """The base's parameters by path, before quantisation."""
        return base_parameters(self.config)

    @functools.cached_property
    def held(self) -> dict[str, Parameter]:
        """The base's parameters in memory: unquantised, or their quantised parts."""
        return self._of_type(BaseParam, QuantParam)

    @functools.cached_property
    def adapters(self) -> dict[str, Parameter]:
        """The adapters' parameters by path; empty without LoRA."""
        return self._of_type(LoRAParam)

    def _of_type(self, *types: type[nnx.Variable]) -> dict[str, Parameter]:
        return {path: Parameter.of(leaf) for path, leaf in of_type(self.abstract[1], *types).items()}

    @property
    def without_adapters(self) -> "ModelSpec":
        """The base by itself."""
        return dataclasses.replace(self, lora=None, tokens=NO_TOKENS)

    @property
    def trainable(self) -> dict[str, Parameter]:
        """The parameters that training updates: the adapters, or all weights in full fine-tuning. Always float32."""
        moved = self.base if self.lora is None else self.adapters
        return {path: dataclasses.replace(parameter, dtype=_FLOAT32) for path, parameter in moved.items()}

    @property
    def base_shapes(self) -> Shapes:
        return {path: parameter.shape for path, parameter in self.base.items()}

    @property
    def lora_shapes(self) -> Shapes:
        return {path: parameter.shape for path, parameter in self.adapters.items()}

    @property
    def linear(self) -> dict[str, ModuleName]:
        """The modules that can have an adapter, by path: "layers/q_proj", "lm_head"."""
        matrices = {path: parameter for path, parameter in self.base.items() if parameter.kind == "matrix"}
        return {path.rpartition("/")[0]: parameter.module for path, parameter in matrices.items()}

    @property
    def embedding(self) -> str:
        """Path of the embedding table."""
        return next(path for path, parameter in self.base.items() if parameter.kind == "table")

    @property
    def head(self) -> str:
        """Path of the language-model head, which may be the embedding table."""
        once = (path for path, found in self.base.items() if found.kind == "matrix" and not found.stacked)
        return next(once, self.embedding)

    @property
    def token_rows(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Path of a table → path and tokens of its trained rows."""
        paths = {found.module: path for path, found in self.adapters.items() if found.kind == "token_rows"}
        ids = {self.head: self.tokens.head, self.embedding: self.tokens.embedding}
        tables = {table: self.base[table].module for table in ids}
        return {table: (paths[module], ids[table]) for table, module in tables.items() if module in paths}

    @functools.cached_property
    def ranks(self) -> dict[str, Ranks]:
        """Ranks and scales by layer of each module that has an adapter; empty without LoRA."""
        found = {path: adapter_ranks(self.lora, module) for path, module in self.linear.items()}
        return {path: ranks for path, ranks in found.items() if ranks is not None}

    @property
    def trainable_count(self) -> int:
        """Number of scalars that training updates, without the zeros of adapters beyond each layer's own rank."""
        if self.lora is None:
            return count(self.base_shapes)
        shapes = self.lora_shapes
        total = (len(self.tokens.embedding) + len(self.tokens.head)) * self.config.hidden_size
        for module, (ranks, _) in self.ranks.items():
            into, out = shapes[f"{module}/lora_a"][-1], shapes[f"{module}/lora_b"][-2]
            total += int(ranks.sum()) * (into + out) + self.lora.use_dora * int((ranks > 0).sum()) * out
        return total

    @functools.cached_property
    def scales(self) -> dict[str, np.ndarray]:
        """The values of `LoRAScale` variables: [layers], or a scalar for the head."""
        shapes = {path: leaf.shape for path, leaf in of_type(self.abstract[1], LoRAScale).items()}
        return {path: self.ranks[path.rpartition("/")[0]].scales.reshape(shape) for path, shape in shapes.items()}

    def merge(self, params: Mapping[str, jax.Array]) -> Llama:
        """The network with the given base and adapter arrays, whose names must be exactly those of the spec."""
        graph, state = self.abstract
        filled = []
        for keys, variable in nnx.to_flat_state(state):
            path = path_of(keys)
            value = jnp.asarray(self.scales[path]) if isinstance(variable, LoRAScale) else params[path]
            filled.append((keys, variable.replace(value)))
        return nnx.merge(graph, nnx.from_flat_state(filled))


_FLOAT32 = np.dtype(np.float32)


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of scalars in named shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


@functools.lru_cache(maxsize=64)
def base_parameters(config: LlamaConfig) -> dict[str, Parameter]:
    """The base's parameters by path: stacked [layers, ...], matrices [out, in]. The dict is cached; do not modify
    it."""
    return ModelSpec(config).held


@functools.lru_cache(maxsize=64)
def tensors_in_order(config: LlamaConfig) -> tuple[tuple[str, int | None], ...]:
    """(path, layer) of every tensor of a checkpoint, in the order in which a forward pass uses them: the order of
    declaration in `llama.py`. The layer is None for parameters outside of the layers."""
    paths: list[str] = []

    def declare() -> None:
        rngs = nnx.Rngs(0)
        network = Llama(config, rngs=rngs)
        network.layers = Block(
            config, None, jnp.dtype("float32"), rngs
        )  # the stacked module does not preserve the order
        paths.extend(_declared(network))

    jax.eval_shape(declare)
    base, order = base_parameters(config), []
    for stacked, together in itertools.groupby(paths, lambda path: base[path].stacked):
        group = list(together)
        layers = range(config.num_layers) if stacked else (None,)
        order += [(path, layer) for layer in layers for path in group]
    return tuple(order)


def _declared(module: nnx.Module, prefix: str = "") -> Iterator[str]:
    """Paths of a module's variables in the order in which they were assigned."""
    for name, value in vars(module).items():
        if isinstance(value, nnx.Variable):
            yield f"{prefix}{name}"
        elif isinstance(value, nnx.Module):
            yield from _declared(value, f"{prefix}{name}/")


def init_params(spec: ModelSpec, parameters: Mapping[str, Parameter], seed: int, mesh: Mesh) -> Params:
    """Random initial values of the given parameters, created with their shardings; the same numbers on any mesh.

    Only the given parameters are created: initializing the adapters of a 13B model allocates no base.
    """

    def draw(seed: jax.Array) -> Params:
        drawn = of_type(nnx.state(spec.create(seed)), nnx.Variable)
        return {path: drawn[path][...] for path in parameters}

    with jax.set_mesh(mesh):
        return jax.jit(draw, out_shardings=parameter_shardings(parameters, mesh))(jnp.uint32(seed))


def fresh_adapters(spec: ModelSpec, base: Mapping[str, jax.Array], seed: int, mesh: Mesh) -> Params:
    """PEFT's initialisation, the same numbers on any mesh: A uniform, B zero, DoRA's magnitudes the row norms of W,
    rows of tokens those of their table.

    `base` is read only for DoRA and for rows of tokens.
    """
    measured = {path: found for path, found in spec.adapters.items() if found.kind == "lora_magnitude"}
    copied = {path: found for path, found in spec.adapters.items() if found.kind == "token_rows"}
    drawn = {path: found for path, found in spec.adapters.items() if path not in measured | copied}
    adapters = init_params(spec, drawn, seed, mesh)
    for of_base, parts in ((_row_norms, measured), (_token_rows, copied)):
        if parts:
            with jax.set_mesh(mesh):
                take = jax.jit(functools.partial(of_base, spec), out_shardings=parameter_shardings(parts, mesh))
                adapters |= take(base)
    return adapters


def _token_rows(spec: ModelSpec, base: Params) -> Params:
    """The rows of the trained tokens in the tables of the base, float32."""
    return {
        path: jnp.take(base[table], np.array(ids), axis=0).astype(jnp.float32)
        for table, (path, ids) in spec.token_rows.items()
    }


def _row_norms(spec: ModelSpec, base: Params) -> Params:
    """DoRA's magnitudes before training, [layers, out]: row norms of W, zero in layers without an adapter."""
    zeros = {path: jnp.zeros(shape) for path, shape in spec.lora_shapes.items()}
    graph, stacked = nnx.split(spec.merge({**base, **zeros}).layers)

    def of_layer(state: nnx.State) -> Params:
        children = vars(nnx.merge(graph, state)).items()
        adapted = {name: child for name, child in children if isinstance(child, LoRALinear) and child.lora is not None}
        return {name: jnp.linalg.norm(child.kernel(jnp.dtype(jnp.float32)), axis=-1) for name, child in adapted.items()}

    return {
        f"layers/{name}/lora_magnitude": jnp.where(spec.ranks[f"layers/{name}"].ranks[:, None] > 0, norms_lo, 0)
        for name, norms_lo in jax.lax.map(of_layer, stacked).items()
    }


def quantize(spec: ModelSpec, mesh: Mesh, path: str, value: jax.Array) -> Params:
    """The arrays of a spec for a parameter of the base: itself, or the parts of its quantised form."""
    if spec.quantization is None or path in spec.held:
        return {path: value}
    kernel = KERNELS[spec.quantization]

    def of_layer(kernel_oi: jax.Array) -> Params:
        made = nnx.to_flat_state(nnx.state(kernel(kernel_oi)))
        return {f"{path}/{path_of(keys)}": variable[...] for keys, variable in made}

    parts = {part: spec.held[part] for part in jax.eval_shape(jax.vmap(of_layer), value)}
    with jax.set_mesh(mesh):
        by_layer = functools.partial(jax.lax.map, of_layer)
        return jax.jit(by_layer, out_shardings=parameter_shardings(parts, mesh))(value)
