"""Reads PEFT adapters of any origin into stacked arrays, with the adapter's own settings."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.types import HEAD
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.adapter_changes import meaning, split
from flacuna_jax.huggingface.adapter_settings import (
    CONFIG_FILE,
    lora_config,
    patterns_of,
    read_adapter_settings,
    require_targets,
    targets_of,
)
from flacuna_jax.huggingface.changed_base import BaseChanges, Change, with_rows
from flacuna_jax.huggingface.files.place import local_checkpoint
from flacuna_jax.huggingface.files.read import CheckpointReader
from flacuna_jax.huggingface.files.safetensors_file import read_header
from flacuna_jax.huggingface.files.tensors import (
    MappedFiles,
    ReadableTensor,
    StoredTensor,
    TensorReader,
    cast,
    host_device,
)
from flacuna_jax.huggingface.files.torch_file import read_torch_file
from flacuna_jax.huggingface.fused_adapter import fused_modules, split_fused_factors
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.variables import Parameter

WEIGHTS_FILE, LEGACY_WEIGHTS_FILE = "adapter_model.safetensors", "adapter_model.bin"

_FLOAT = np.dtype(np.float32)

Module = tuple[str, int]
"""A module ("layers/q_proj", "lm_head") and a layer."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter and its settings.

    Attributes:
      spec: the network of its base, with the adapter's settings.
      params: float32 arrays under our paths: A [layers, rank, in], B [layers, out, rank] and, with DoRA, magnitudes
        [layers, out], with zeros beyond a layer's own rank, and trained rows of tables [tokens, model]. Arrays of the
        head have no layer axis.
      base_name: the name of the base model in the adapter's settings.
      base_revision: its revision on the Hub.
      changes: what it changes in the base's tensors; None if it only adds to them.
    """

    spec: ModelSpec
    params: dict[str, np.ndarray]
    base_name: str | None = None
    base_revision: str | None = None
    changes: BaseChanges | None = None

    @property
    def lora(self) -> LoraConfig:
        """Rank, alpha, dropout, targets."""
        assert self.spec.lora is not None
        return self.spec.lora

    def base(self, reader: TensorReader) -> TensorReader:
        """The base that the adapter is added to: a checkpoint with the adapter's changes."""
        return reader if self.changes is None else self.changes.on(reader)

    def with_rows(self, base: TensorReader) -> TensorReader:
        """A base with the adapter's trained rows in its tables."""
        if not self.spec.token_rows:
            return base
        rows: dict[str, tuple[Change, ...]] = {
            self.spec.base[table].tensor(): (with_rows(ids, self.params[path]),)
            for table, (path, ids) in self.spec.token_rows.items()
        }
        return BaseChanges(self.spec.config, self.spec.config, rows).on(base)

    @property
    def is_trained(self) -> bool:
        """Whether any B has a nonzero element."""
        return any(np.any(self.params[path]) for path, part in self.spec.adapters.items() if part.kind == "lora_b")

    def layers_of(self, module: str) -> list[int]:
        """Layers in which a module, for example "layers/q_proj" or "lm_head", has an adapter; [0] for the head."""
        ranks = self.spec.ranks.get(module)
        return [] if ranks is None else np.flatnonzero(ranks.ranks).tolist()

    def factor(self, path: str, layer: int) -> np.ndarray:
        """One layer of the parameter at `path`, without the padding to the largest rank of all layers."""
        parameter = self.spec.adapters[path]
        value = self.params[path][layer] if parameter.stacked else self.params[path]
        rank = self.lora.rank_of(parameter.module.of_layer(layer))
        return {"lora_a": value[:rank], "lora_b": value[..., :rank]}.get(parameter.kind, value)

    def factors(self, module: str, layer: int, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """A, and for the given rows of the module, scale · B and the magnitudes (None without DoRA)."""
        scale = self.spec.ranks[module].scales[layer]
        magnitude_o = self.factor(f"{module}/lora_magnitude", layer)[rows] if self.lora.use_dora else None
        return self.factor(f"{module}/lora_a", layer), self.factor(f"{module}/lora_b", layer)[rows] * scale, magnitude_o

    def merge(
        self,
        weight_oi: np.ndarray,
        module: str,
        layer: int,
        rows: slice = slice(None),
        dtype: np.dtype = _FLOAT,
    ) -> np.ndarray:
        """Merges the module's adapter into some rows of a weight: W + scale · B A; with DoRA every row is then scaled
        to its magnitude. Computed in float32 and rounded once.

        Args:
          weight_oi: the rows of W.
          module, layer: the adapter's module and layer; without an adapter there, the weight is returned unchanged.
          rows: the position of the rows in the whole matrix.
          dtype: of the result.
        """
        if layer not in self.layers_of(module):
            return weight_oi if weight_oi.dtype == dtype else cast(weight_oi, dtype)
        a_ri, b_or, magnitude_o = self.factors(module, layer, rows)
        with jax.default_device(host_device()):
            return np.asarray(_merged(weight_oi, a_ri, b_or, magnitude_o, dtype.name)).astype(dtype, copy=False)


@functools.partial(jax.jit, static_argnames="dtype")
def _merged(
    weight_oi: jax.Array, a_ri: jax.Array, b_or: jax.Array, magnitude_o: jax.Array | None, dtype: str
) -> jax.Array:
    """Compiled, because NumPy's rounding to half precision is several times slower than reading the weights."""
    total_oi = weight_oi.astype(jnp.float32) + jnp.dot(b_or, a_ri, precision="highest")
    if magnitude_o is not None:
        norms_o = jnp.maximum(jnp.linalg.norm(total_oi, axis=-1), 1e-15)
        total_oi *= (magnitude_o / norms_o)[:, None]
    return total_oi.astype(jnp.float32 if dtype == "float64" else dtype)


def read_adapter(directory: str | Path, config: LlamaConfig, base: TensorReader | None = None) -> Adapter:
    """Reads a PEFT LoRA adapter as stacked float32 arrays for a model of the given sizes.

    Ranks and alphas that differ between modules (rank_pattern, alpha_pattern), rank-stabilised scaling, DoRA, layers
    without an adapter and trained rows of tables are preserved. If an expression selects single modules, the other
    modules of the same name get factors of zeros, which training leaves at zero. Tables, biases and whole modules in
    the adapter are changes of the base (`Adapter.base`).

    Args:
      directory: the adapter.
      config: sizes of its base; `Adapter.spec.config` has those of the changed base.
      base: the base; None keeps tensors in the adapter that are equal to those of the base.

    Raises:
      UserError: files are missing or damaged, a tensor is unexpected, missing or has the wrong shape, or a setting
        changes the computation in a way that plain LoRA cannot represent.
    """
    directory = local_checkpoint(directory)
    file, settings = directory / CONFIG_FILE, read_adapter_settings(directory)
    source, tensors = _open_weights(directory)
    besides, factors = split(source, tensors)
    if fused := fused_modules(config):
        stored = [*fused, *(name.of_layer(layer) for name in ModelSpec(config).linear.values() for layer in name.all)]
        patterns = {key: patterns_of(file, settings, key, stored) for key in ("rank_pattern", "alpha_pattern")}
        settings, factors = split_fused_factors(source, {**settings, **patterns}, factors, config)
    head_has_factors = any(name.startswith(f"{names.PEFT_PREFIX}{HEAD}.") for name in factors)
    meant = meaning(source, file, settings, besides, config, base, head_has_factors)
    modules = _group(source, factors, meant.config)
    dora = bool(settings.get("use_dora"))
    if any(("lora_magnitude" in parts) != dora for parts in modules.values()):
        raise UserError(f"{file}: use_dora is {dora}, but magnitudes are {'missing' if dora else 'present'}")
    linear = ModelSpec(meant.config).linear
    ranks = {linear[module].of_layer(layer): parts["lora_a"].shape[0] for (module, layer), parts in modules.items()}
    every = [name.of_layer(layer) for name in linear.values() for layer in range(name.layers or 1)]
    _check_layers(source, modules, meant.config)
    require_targets(file, settings, every, ranks)
    spec = ModelSpec(meant.config, lora_config(file, settings, ranks, dora), tokens=meant.tokens)
    adapter = _adapter(source, modules, spec, settings.get("base_model_name_or_path"))
    for table, value in ((spec.embedding, meant.embedding_rows), (spec.head, meant.head_rows)):
        if value is not None:
            adapter.params[spec.token_rows[table][0]] = value
    return dataclasses.replace(adapter, base_revision=settings.get("revision"), changes=meant.changes)


def read_training_checkpoint(
    reader: CheckpointReader, config: LlamaConfig, *, alpha: float, dropout: float, base_name: str
) -> Adapter:
    """Extracts the LoRA factors from a state dict of a whole PEFT model including its base, such as the released
    Flacuna.

    Args:
      reader: the checkpoint (`names.is_training_checkpoint`).
      config: sizes of its base.
      alpha: LoRA alpha, which is not in the state dict.
      dropout: LoRA dropout, which is not in the state dict.
      base_name: name of the base model.

    Raises:
      UserError: a factor is missing, has the wrong shape or is not finite.
    """
    modules = _group(reader.directory, {n: t for n, t in reader.tensors.items() if ".lora_" in n}, config)
    _check_layers(reader.directory, modules, config)
    linear = ModelSpec(config).linear
    ranks = {linear[module].of_layer(layer): parts["lora_a"].shape[0] for (module, layer), parts in modules.items()}
    rank = max(ranks.values())
    lora = LoraConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=targets_of(ranks),
        rank_pattern=tuple((re.escape(name), other) for name, other in ranks.items() if other != rank),
    )
    return _adapter(reader.directory, modules, ModelSpec(config, lora), base_name)


Parts = dict[str, ReadableTensor]
"""lora_a, lora_b and optionally lora_magnitude of one module in one layer."""


def _adapter(source: Path, modules: Mapping[Module, Parts], spec: ModelSpec, base_name: str | None) -> Adapter:
    params = {path: np.zeros(shape, np.float32) for path, shape in spec.lora_shapes.items()}
    files = MappedFiles()
    for (module, layer), parts in modules.items():
        for leaf, stored in parts.items():
            path = f"{module}/{leaf}"
            _place(source, params[path], spec.adapters[path], layer, stored.read(files))
    if spec.lora is not None and spec.lora.use_dora:
        _require_everywhere(source, modules, spec)
    return Adapter(spec, params, base_name)


def _check_layers(source: Path, modules: Mapping[Module, Parts], config: LlamaConfig) -> None:
    last = max(layer for _, layer in modules)
    if last >= config.num_layers:
        raise UserError(f"{source} has an adapter in layer {last}, but the base has {config.num_layers} layers")


def _require_everywhere(source: Path, modules: Mapping[Module, Parts], spec: ModelSpec) -> None:
    """Raises UserError with DoRA if a module has no adapter: factors can be zeros there, but a magnitude cannot."""
    for module, (ranks, _) in spec.ranks.items():
        for layer in np.flatnonzero(ranks):
            if (module, int(layer)) not in modules:
                name = spec.linear[module].of_layer(int(layer))
                raise UserError(
                    f"{source}: {name} has no adapter, but others of its name or layer have one; with DoRA (use_dora) "
                    f"that cannot be represented"
                )


def _open_weights(directory: Path) -> tuple[Path, dict[str, StoredTensor]]:
    if (directory / WEIGHTS_FILE).is_file():
        return directory / WEIGHTS_FILE, read_header(directory / WEIGHTS_FILE)[0]
    if (directory / LEGACY_WEIGHTS_FILE).is_file():
        return directory / LEGACY_WEIGHTS_FILE, read_torch_file(directory / LEGACY_WEIGHTS_FILE)
    raise UserError(f"{directory} has neither {WEIGHTS_FILE} nor {LEGACY_WEIGHTS_FILE}")


def _group(source: Path, tensors: Mapping[str, ReadableTensor], config: LlamaConfig) -> dict[Module, Parts]:
    """Maps (module, layer) to its tensors."""
    modules: dict[Module, Parts] = {}
    linear, unknown = ModelSpec(config).linear, []
    for name, tensor in tensors.items():
        place = names.parse_adapter_name(name, config)
        if place is None or tensor.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            unknown.append(name)
            continue
        path, layer = place
        module, _, leaf = path.rpartition("/")
        if leaf in modules.setdefault((module, layer), {}):
            where = linear[module].of_layer(layer)
            raise UserError(f"{source} has {leaf} of {where} twice, as {name} and under another name")
        modules[module, layer][leaf] = tensor
    if unknown:
        raise UserError(
            f"{source} has tensors that are not LoRA factors of a projection of this base: {names.some(unknown)}"
        )
    if not modules:
        raise UserError(f"{source} has no LoRA factors; the adapter was saved empty")
    for (module, layer), parts in modules.items():
        _check_factors(source, f"{linear[module].last} of layer {layer}", parts)
    return dict(sorted(modules.items()))


def _check_factors(source: Path, where: str, parts: Parts) -> None:
    for leaf, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
        if leaf not in parts:
            raise UserError(f"{source}: {where} has no {theirs}")
    a, b = parts["lora_a"].shape, parts["lora_b"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
        raise UserError(
            f"{source}: {where} has lora_A {list(a)} and lora_B {list(b)}; they must be [rank, in] and [out, rank]"
        )


def _place(source: Path, value: np.ndarray, parameter: Parameter, layer: int, factor: np.ndarray) -> None:
    """Writes one layer of a parameter; elements beyond its rank stay zero."""
    target, name = value[layer] if parameter.stacked else value, names.adapter_name(parameter, layer)
    wrong = {
        "lora_a": factor.shape[1:] != target.shape[1:],
        "lora_b": factor.shape[:1] != target.shape[:1],
        "lora_magnitude": factor.shape != target.shape,
    }
    if wrong[parameter.kind]:
        raise UserError(
            f"{source}: {name} has shape {list(factor.shape)}; the base needs "
            f"{list(target.shape)} at the largest rank. It belongs to another model"
        )
    values = factor.astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{source}: {name} is not finite")
    target[tuple(slice(size) for size in values.shape)] = values
