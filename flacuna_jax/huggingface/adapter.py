"""Adapters, and how they are read: PEFT's, by anyone, as stacked arrays of one rank and one scale."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from flacuna_jax.config import LoraConfig, Projection
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.architecture import read_json
from flacuna_jax.huggingface.read import CheckpointReader
from flacuna_jax.huggingface.safetensors_file import read_header
from flacuna_jax.huggingface.tensors import MappedFiles, StoredTensor
from flacuna_jax.huggingface.torch_file import read_torch_file
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import lora_shapes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE, LEGACY_WEIGHTS_FILE = "adapter_model.safetensors", "adapter_model.bin"

Module = tuple[str, int]
"""Projection and layer."""

_REFUSED = {
    "use_dora": "DoRA's magnitudes have no place in a LoRA adapter",
    "modules_to_save": "it replaces whole modules of the base",
    "lora_bias": "its factors have biases",
    "target_parameters": "it targets parameters other than the seven projections",
    "trainable_token_indices": "it trains rows of the embedding",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it is active for some tokens only",
    "use_qalora": "its inputs are pooled",
    "use_bdlora": "its factors are block-diagonal",
}
"""Settings of PEFT that change what is computed beyond W x + scale · B A x, and why each cannot be represented."""

_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Others (PiSSA, OLoRA, CorDA, LoftQ) also change the base weights, which the adapter's files do not hold."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter and its settings.

    Attributes:
      lora: rank, alpha, dropout, targets.
      params: float32 arrays under our paths, A [layers, rank, in] and B [layers, out, rank].
      base_name: the base model as the adapter's author names it.
    """

    lora: LoraConfig
    params: dict[str, np.ndarray]
    base_name: str | None = None


def host_adapter(lora: LoraConfig, params: Mapping[str, jax.Array], base_name: str | None = None) -> Adapter:
    """An `Adapter` from a run's arrays, which must be addressable by this process."""
    return Adapter(lora, {path: np.asarray(value, np.float32) for path, value in params.items()}, base_name)


def read_adapter(directory: str | Path, config: LlamaConfig) -> Adapter:
    """A PEFT LoRA adapter by anyone, as stacked float32 arrays for a model of the given sizes.

    Ranks and alphas that differ between modules (rank_pattern, alpha_pattern), rank-stabilised scaling and layers
    without adapter are brought to one rank and one scale: factors are padded with zeros, which training leaves at
    zero, and B takes up the ratio of scales.

    Raises:
      UserError: files are missing or damaged, a tensor is left over, missing or misshapen, or a setting changes the
        computation in a way that plain LoRA cannot represent.
    """
    directory = Path(directory)
    settings = _read_settings(directory)
    source, tensors = _open_weights(directory)
    pairs = _pair_factors(source, tensors)
    scales = {module: _scale(settings, module, pair["lora_a"].shape[0], directory) for module, pair in pairs.items()}
    targets = _targets(directory, settings, {module for module, _ in pairs})
    lora, params = _stack(source, pairs, scales, config, _dropout(directory, settings), targets)
    return Adapter(lora, params, settings.get("base_model_name_or_path"))


def read_training_checkpoint(
    reader: CheckpointReader, config: LlamaConfig, *, alpha: float, dropout: float, base_name: str
) -> Adapter:
    """The LoRA factors inside a state dict that PEFT's users saved whole, base and all, such as the released Flacuna.

    Args:
      reader: the checkpoint (`names.is_training_checkpoint`).
      config: sizes of its base.
      alpha: the state dict does not hold it.
      dropout: neither.
      base_name: the base model.

    Raises:
      UserError: a factor is missing, misshapen or not finite.
    """
    pairs = _pair_factors(reader.directory, {n: t for n, t in reader.tensors.items() if ".lora_" in n})
    scales = {module: alpha / pair["lora_a"].shape[0] for module, pair in pairs.items()}
    targets = _targets(reader.directory, {}, {module for module, _ in pairs})
    lora, params = _stack(reader.directory, pairs, scales, config, dropout, targets)
    return Adapter(lora, params, base_name)


def _stack(
    source: Path,
    pairs: Mapping[Module, Mapping[str, StoredTensor]],
    scales: Mapping[Module, float],
    config: LlamaConfig,
    dropout: float,
    targets: tuple[Projection, ...],
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Brings all modules to the largest rank and the first module's scale."""
    rank = max(pair["lora_a"].shape[0] for pair in pairs.values())
    scale = next(iter(scales.values()))
    # Dividing by the rank and multiplying again may cost the last bit; alphas are short decimals.
    lora = LoraConfig(rank=rank, alpha=float(f"{scale * rank:.12g}"), dropout=dropout, targets=targets)
    params = {path: np.zeros(shape, np.float32) for path, shape in lora_shapes(config, lora).items()}
    files = MappedFiles()
    for (module, layer), pair in pairs.items():
        for leaf, stored in pair.items():
            ratio = scales[module, layer] / scale if leaf == "lora_b" else 1.0
            _place_factor(source, params, f"layers/{module}/{leaf}", layer, files.view(stored), ratio)
    return lora, params


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory} has no {CONFIG_FILE}; a PEFT adapter directory is expected")
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {settings.get('peft_type')!r}; only LORA adapters can be used")
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
        if not _is_positive(settings.get(key)):
            raise UserError(f"{path}: {key} is {settings.get(key)!r}, not a positive number")
    return settings


def _open_weights(directory: Path) -> tuple[Path, dict[str, StoredTensor]]:
    if (directory / WEIGHTS_FILE).is_file():
        return directory / WEIGHTS_FILE, read_header(directory / WEIGHTS_FILE)[0]
    if (directory / LEGACY_WEIGHTS_FILE).is_file():
        return directory / LEGACY_WEIGHTS_FILE, read_torch_file(directory / LEGACY_WEIGHTS_FILE)
    raise UserError(f"{directory} has neither {WEIGHTS_FILE} nor {LEGACY_WEIGHTS_FILE}")


def _pair_factors(source: Path, tensors: Mapping[str, StoredTensor]) -> dict[Module, dict[str, StoredTensor]]:
    """(projection, layer) → its two factors."""
    pairs: dict[Module, dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        place = names.parse_adapter_name(name)
        if place is None or tensor.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            unknown.append(name)
            continue
        path, layer = place
        _, module, leaf = path.split("/")
        if leaf in pairs.setdefault((module, layer), {}):
            raise UserError(f"{source} holds {leaf} of {module} in layer {layer} twice, as {name} and another name")
        pairs[module, layer][leaf] = tensor
    if unknown:
        raise UserError(f"{source} holds tensors that are not LoRA factors of a projection: {names.some(unknown)}")
    if not pairs:
        raise UserError(f"{source} holds no LoRA factors; the adapter was saved empty")
    for (module, layer), pair in pairs.items():
        if set(pair) != {"lora_a", "lora_b"}:
            lacking = "lora_B" if "lora_a" in pair else "lora_A"
            raise UserError(f"{source}: {module} of layer {layer} has no {lacking}")
        a, b = pair["lora_a"].shape, pair["lora_b"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
            raise UserError(
                f"{source}: {module} of layer {layer} has lora_A {list(a)} and lora_B {list(b)}; "
                f"[rank, in] and [out, rank] are expected"
            )
    return dict(sorted(pairs.items()))


def _scale(settings: Mapping[str, Any], module: Module, rank: int, directory: Path) -> float:
    """alpha / rank (or / √rank) of one module, after PEFT's patterns; the rank in the files must be the one stated."""
    projection, layer = module
    name = names.tensor_name(f"layers/{projection}/weight", layer).removesuffix(".weight")
    stated = _pattern_value(settings.get("rank_pattern"), name, settings["r"])
    if stated != rank:
        raise UserError(f"{directory / CONFIG_FILE} gives {name} rank {stated}, its tensors have rank {rank}")
    alpha = float(_pattern_value(settings.get("alpha_pattern"), name, settings["lora_alpha"]))
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _pattern_value(patterns: Any, name: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the whole name, or a dotted end of it."""
    for pattern, value in (patterns or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error:
            raise UserError(f"{CONFIG_FILE}: the pattern {pattern!r} is not a regular expression") from None
        if matches:
            if not _is_positive(value):
                raise UserError(f"{CONFIG_FILE}: the pattern {pattern!r} gives {value!r}, not a positive number")
            return value
    return default


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _dropout(directory: Path, settings: Mapping[str, Any]) -> float:
    value = settings.get("lora_dropout") or 0.0
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{directory / CONFIG_FILE}: lora_dropout is {value!r}, not a fraction below 1")
    return float(value)


def _targets(directory: Path, settings: Mapping[str, Any], found: set[str]) -> tuple[Projection, ...]:
    """The projections that the tensors are of, in the order of the settings where those list them."""
    stated = settings.get("target_modules")
    order = [str(name).rsplit(".", 1)[-1] for name in stated] if isinstance(stated, list) else []
    absent = sorted(set(order) - found)
    if absent:
        raise UserError(f"{directory / CONFIG_FILE} targets {', '.join(absent)}, but the weights have none of it")
    known: tuple[Projection, ...] = get_args(Projection)
    return tuple(sorted((name for name in known if name in found), key=[*order, *known].index))


def _place_factor(
    source: Path, params: Mapping[str, np.ndarray], path: str, layer: int, factor: np.ndarray, ratio: float
) -> None:
    stacked = params[path]
    rank_axis = 0 if path.endswith("lora_a") else 1
    if layer >= len(stacked):
        raise UserError(f"{source} has an adapter in layer {layer}; the base has {len(stacked)} layers")
    if factor.shape[1 - rank_axis] != stacked.shape[1:][1 - rank_axis]:
        raise UserError(
            f"{source}: {names.adapter_name(path, layer)} has shape {list(factor.shape)}; the base needs "
            f"{list(stacked.shape[1:])} at rank {stacked.shape[1:][rank_axis]}. It belongs to another model"
        )
    values = factor.astype(np.float32) * np.float32(ratio)
    if not np.isfinite(values).all():
        raise UserError(f"{source}: {names.adapter_name(path, layer)} is not finite")
    stacked[layer, : factor.shape[0], : factor.shape[1]] = values
