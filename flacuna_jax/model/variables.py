"""Variables of the network with their descriptions, `ParamInfo`, which `llama.py` gives when it creates them.

All code that distinguishes parameters uses it: sharding, file names, weight decay, adapters, quantisation, merging, and
the planner. `ModelSpec` collects the descriptions from the abstract network as `Parameter`s by path.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
from flax import nnx

Axes = tuple[str | None, ...]
"""Logical axes of an array's dimensions, keys of `sharding.RULES`."""

Kind = Literal["matrix", "table", "norm", "bias", "scale", "lora_a", "lora_b", "lora_magnitude", "token_rows"]
"""matrix: multiplied with activations, [out, in]. table: looked up by token. norm: weight of a norm. bias: added.
scale: dequantises the codes of a quantised matrix. The others are the parts of an adapter; token_rows replaces rows of
a table."""


@dataclasses.dataclass(frozen=True)
class ModuleName:
    """Name of a module in Hugging Face's layout.

    Attributes:
      pattern: the name, with `{}` for the number of the layer.
      layers: number of layers over which the module is stacked; None outside of the layers.
    """

    pattern: str
    layers: int | None = None

    def inside(self, child: str) -> "ModuleName":
        return ModuleName(f"{self.pattern}.{child}", self.layers)

    def of_layer(self, layer: int | None = None) -> str:
        """The name in one layer, "model.layers.3.self_attn.q_proj"; `layer` is ignored outside of the layers."""
        return self.pattern.format(layer)

    @property
    def all(self) -> tuple[int | None, ...]:
        """The layers in which the module exists; (None,) outside of the layers."""
        return (None,) if self.layers is None else tuple(range(self.layers))

    @property
    def last(self) -> str:
        """The last component, which PEFT calls a target: "q_proj"."""
        return self.pattern.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The place of a module in a matrix of a file that has the rows of several modules (Phi-3).

    Attributes:
      module: the module of the matrix in files.
      first: the first row of this module.
      total: number of rows of all modules.
    """

    module: ModuleName
    first: int
    total: int


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """The description of a parameter.

    Attributes:
      module: the module that it belongs to.
      leaf: its name in files, after the module's name; empty for parameters that are in no file.
      kind: its role.
      layer_axes: logical axes of one of its layers.
      rows: its place in a matrix of several modules; None if files have it separately.
    """

    module: ModuleName
    leaf: str
    kind: Kind
    layer_axes: Axes
    rows: Rows | None = dataclasses.field(default=None, kw_only=True)

    @property
    def stacked(self) -> bool:
        """Whether the array has a leading layer axis."""
        return self.module.layers is not None

    @property
    def axes(self) -> Axes:
        return ("layers", *self.layer_axes) if self.stacked else self.layer_axes

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The layers in which it has a tensor; (None,) outside of the layers."""
        return self.module.all

    def tensor(self, layer: int | None = None) -> str:
        """Name of its tensor in a Hugging Face file: "model.layers.3.self_attn.q_proj.weight"."""
        return f"{self.module.of_layer(layer)}.{self.leaf}"

    def stored(self, layer: int | None = None) -> str:
        """Name of the tensor of a Hugging Face file that contains it: its own, or one of several modules."""
        module = self.module if self.rows is None else self.rows.module
        return f"{module.of_layer(layer)}.{self.leaf}"

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all its tensors, in layer order."""
        return tuple(map(self.tensor, self.layers))

    def part(self, kind: Kind, axes: Axes) -> "ParamInfo":
        """The description of a variable that represents a part of this one and is in no file."""
        return dataclasses.replace(self, leaf="", kind=kind, layer_axes=axes)


@dataclasses.dataclass(frozen=True)
class Parameter(ParamInfo):
    """A parameter of the abstract network: `shape` includes the layer axis."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, variable: nnx.Variable) -> "Parameter":
        info: ParamInfo = variable.get_metadata("info")
        shape, dtype = tuple(variable.shape), np.dtype(variable.dtype)
        return cls(info.module, info.leaf, info.kind, info.layer_axes, shape, dtype, rows=info.rows)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape


class BaseParam(nnx.Variable):
    """A weight of the base: frozen in compute dtype if adapters are trained, float32 if it is trained itself."""


class QuantParam(nnx.Variable):
    """Part of a frozen quantised kernel: its codes or their magnitudes."""


class LoRAParam(nnx.Variable):
    """An adapter weight, always float32."""


class LoRAScale(nnx.Variable):
    """The factor of B A, float32, 0 in layers without an adapter. It is computed from the config and never stored."""


def of_type(state: nnx.State, *types: type[nnx.Variable]) -> dict[str, Any]:
    """The variables of these types by path, "layers/q_proj/weight"."""
    leaves = nnx.to_flat_state(state)
    return {path_of(path): leaf for path, leaf in leaves if isinstance(leaf, types)}


def path_of(keys: tuple[Any, ...]) -> str:
    return "/".join(map(str, keys))
