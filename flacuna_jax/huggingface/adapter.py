"""Reads PEFT adapters of any origin into stacked arrays, with the adapter's own settings."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flacuna_jax.config.schema import LoraConfig
from flacuna_jax.config.types import HEAD, NO_EXPRESSION, TARGETS, Target, by_pattern
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.architecture import read_json
from flacuna_jax.huggingface.files.place import local_checkpoint
from flacuna_jax.huggingface.files.read import CheckpointReader
from flacuna_jax.huggingface.files.safetensors_file import read_header
from flacuna_jax.huggingface.files.tensors import MappedFiles, ReadableTensor, StoredTensor, cast, host_device
from flacuna_jax.huggingface.files.torch_file import read_torch_file
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.variables import ModuleName, Parameter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE, LEGACY_WEIGHTS_FILE = "adapter_model.safetensors", "adapter_model.bin"

_FLOAT = np.dtype(np.float32)

Module = tuple[str, int]
"""A module ("layers/q_proj", "lm_head") and a layer."""

_REFUSED = {
    "modules_to_save": "it replaces whole modules of the base",
    "lora_bias": "its factors have biases",
    "target_parameters": "it targets parameters other than projections and head",
    "trainable_token_indices": "it trains rows of the embedding",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it is active only for some tokens",
    "use_qalora": "its inputs are pooled",
    "use_bdlora": "its factors are block-diagonal",
}
"""Settings of PEFT that change the computation beyond W x + scale · B A x, and why each is not supported."""

_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Others (PiSSA, OLoRA, CorDA, LoftQ) also change the base weights, which are not in the adapter's files."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter and its settings.

    Attributes:
      spec: the network of its base, with the adapter's settings.
      params: float32 arrays under our paths: A [layers, rank, in], B [layers, out, rank] and, with DoRA, magnitudes
        [layers, out], with zeros beyond a layer's own rank. Arrays of the head have no layer axis.
      base_name: the name of the base model in the adapter's settings.
      base_revision: its revision on the Hub.
    """

    spec: ModelSpec
    params: dict[str, np.ndarray]
    base_name: str | None = None
    base_revision: str | None = None

    @property
    def lora(self) -> LoraConfig:
        """Rank, alpha, dropout, targets."""
        assert self.spec.lora is not None
        return self.spec.lora

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


def read_adapter(directory: str | Path, config: LlamaConfig) -> Adapter:
    """Reads a PEFT LoRA adapter as stacked float32 arrays for a model of the given sizes.

    Ranks and alphas that differ between modules (rank_pattern, alpha_pattern), rank-stabilised scaling, DoRA and
    layers without an adapter are preserved. If an expression selects single modules, the other modules of the same name
    get factors of zeros, which training leaves at zero.

    Raises:
      UserError: files are missing or damaged, a tensor is unexpected, missing or has the wrong shape, or a setting
        changes the computation in a way that plain LoRA cannot represent.
    """
    directory = local_checkpoint(directory)
    settings = _read_settings(directory)
    source, tensors = _open_weights(directory)
    modules = _group(source, tensors, config)
    linear = ModelSpec(config).linear
    lora = _lora_config(directory, settings, modules, linear)
    for (module, layer), parts in modules.items():
        name, rank = linear[module].of_layer(layer), parts["lora_a"].shape[0]
        if lora.rank_of(name) != rank:
            raise UserError(
                f"{directory / CONFIG_FILE} gives {name} rank {lora.rank_of(name)}, but its tensors have rank {rank}"
            )
    adapter = _adapter(source, modules, ModelSpec(config, lora), settings.get("base_model_name_or_path"))
    return dataclasses.replace(adapter, base_revision=settings.get("revision"))


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
    linear = ModelSpec(config).linear
    ranks = {linear[module].of_layer(layer): parts["lora_a"].shape[0] for (module, layer), parts in modules.items()}
    rank = max(ranks.values())
    lora = LoraConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=_targets(reader.directory, {}, modules, linear),
        rank_pattern=tuple((re.escape(name), other) for name, other in ranks.items() if other != rank),
    )
    return _adapter(reader.directory, modules, ModelSpec(config, lora), base_name)


Parts = dict[str, ReadableTensor]
"""lora_a, lora_b and optionally lora_magnitude of one module in one layer."""


def _adapter(source: Path, modules: Mapping[Module, Parts], spec: ModelSpec, base_name: str | None) -> Adapter:
    _check_layers(source, modules, spec.config)
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


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory} has no {CONFIG_FILE}; give a PEFT adapter directory")
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {settings.get('peft_type')!r}; only LORA adapters are supported")
    for key, why in _REFUSED.items():
        if settings.get(key):
            raise UserError(f"{path}: {key} is {settings[key]!r}, which cannot be represented: {why}")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {settings['bias']!r}, which cannot be represented: the model has no biases")
    if settings.get("init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        raise UserError(
            f"{path}: init_lora_weights is {settings['init_lora_weights']!r}, which changed the base weights as well; "
            f"convert the adapter to plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion)"
        )
    for key in ("r", "lora_alpha"):
        if not _is_positive(settings.get(key), whole=key == "r"):
            raise UserError(f"{path}: {key} is {settings.get(key)!r}, not a positive number")
    return settings


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
        if _repeats_the_base(name, tensor, config):
            continue
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
    tables = [name for name in unknown if names.is_table_in_adapter(name)]
    if tables:
        shape = list(tensors[tables[0]].shape)
        raise UserError(
            f"{source} has the table {tables[0]} of shape {shape}, but the base has "
            f"{[config.vocab_size, config.hidden_size]}: the adapter was trained with a resized vocabulary; merge it "
            "into a base of that size with PEFT, and start from the result"
        )
    if unknown:
        tied = config.tie_word_embeddings and any(f".{HEAD}." in name for name in unknown)
        hint = f" (the {HEAD} of this model is its embedding table)" if tied else ""
        raise UserError(f"{source} has tensors that are not LoRA factors of a projection: {names.some(unknown)}{hint}")
    if not modules:
        raise UserError(f"{source} has no LoRA factors; the adapter was saved empty")
    for (module, layer), parts in modules.items():
        _check_factors(source, f"{linear[module].last} of layer {layer}", parts)
    return dict(sorted(modules.items()))


def _repeats_the_base(name: str, tensor: ReadableTensor, config: LlamaConfig) -> bool:
    """Whether a tensor is the base's own table, which PEFT saves with adapters of the head. It must have the size of
    the base's, so that a table with a resized vocabulary is not ignored."""
    return names.is_table_in_adapter(name) and tensor.shape == (config.vocab_size, config.hidden_size)


def _check_factors(source: Path, where: str, parts: Parts) -> None:
    for leaf, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
        if leaf not in parts:
            raise UserError(f"{source}: {where} has no {theirs}")
    a, b = parts["lora_a"].shape, parts["lora_b"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
        raise UserError(
            f"{source}: {where} has lora_A {list(a)} and lora_B {list(b)}; they must be [rank, in] and [out, rank]"
        )


def _lora_config(
    directory: Path, settings: Mapping[str, Any], modules: Mapping[Module, Parts], linear: Mapping[str, ModuleName]
) -> LoraConfig:
    file = directory / CONFIG_FILE
    dora = bool(settings.get("use_dora"))
    if any(("lora_magnitude" in parts) != dora for parts in modules.values()):
        raise UserError(f"{file}: use_dora is {dora}, but magnitudes are {'missing' if dora else 'present'}")
    if dora and (HEAD, 0) in modules:
        raise UserError(f"{file}: use_dora with {HEAD} among its targets is not implemented")
    names_of_modules = [linear[module].of_layer(layer) for module, layer in modules]
    ranks = _patterns(file, settings, "rank_pattern", names_of_modules)
    return LoraConfig(
        rank=int(settings["r"]),
        alpha=float(settings["lora_alpha"]),
        dropout=_dropout(directory, settings),
        targets=_targets(directory, settings, modules, linear),
        layers_to_transform=_layers(settings, modules),
        rank_pattern=tuple((pattern, int(value)) for pattern, value in ranks),
        alpha_pattern=_patterns(file, settings, "alpha_pattern", names_of_modules),
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=dora,
    )


def _layers(settings: Mapping[str, Any], modules: Mapping[Module, Parts]) -> tuple[int, ...] | None:
    """The layers that have adapters, if the settings select layers; otherwise None."""
    if settings.get("layers_to_transform") in (None, []):
        return None
    return tuple(sorted({layer for _, layer in modules}))


def _patterns(
    file: Path, settings: Mapping[str, Any], key: str, names_of_modules: Sequence[str]
) -> tuple[tuple[str, float], ...]:
    """The patterns that match a module of the adapter; PEFT also ignores the others."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{file}: {key} is {patterns!r}, not an object")
    kept = []
    for pattern, value in patterns.items():
        try:
            matches = any(by_pattern(((pattern, True),), name, False) for name in names_of_modules)
        except NO_EXPRESSION:
            raise UserError(f"{file}: the pattern {pattern[:80]!r} is not a regular expression") from None
        if not _is_positive(value, whole=key == "rank_pattern"):
            raise UserError(f"{file}: the pattern {pattern!r} gives {value!r}, not a positive number")
        kept += [(pattern, float(value))] if matches else []
    return tuple(kept)


def _is_positive(value: Any, whole: bool) -> bool:
    """Whether a value is a positive number in the range that `LoraConfig` accepts."""
    kind, limit = (int, 2**31) if whole else (int | float, 3.4e38)
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < limit


def _dropout(directory: Path, settings: Mapping[str, Any]) -> float:
    value = settings.get("lora_dropout") or 0.0
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{directory / CONFIG_FILE}: lora_dropout is {value!r}, not a fraction below 1")
    return float(value)


def _targets(
    directory: Path, settings: Mapping[str, Any], modules: Mapping[Module, Parts], linear: Mapping[str, ModuleName]
) -> tuple[Target, ...]:
    """The modules of the tensors, in the order of the settings if those list them."""
    found = {linear[module].last for module, _ in modules}
    stated = settings.get("target_modules")
    order = [str(name).rsplit(".", 1)[-1] for name in stated] if isinstance(stated, list) else []
    absent = sorted(set(order) - found)
    if absent:
        raise UserError(
            f"{directory / CONFIG_FILE} targets {', '.join(absent)}, but the weights have no tensors for it"
        )
    return tuple(sorted((name for name in TARGETS if name in found), key=[*order, *TARGETS].index))


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
