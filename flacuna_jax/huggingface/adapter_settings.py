"""adapter_config.json of a PEFT adapter: which modules it targets, with which ranks; settings that are refused."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.types import ALL_LINEAR, HEAD, NO_EXPRESSION, TARGETS, Target, by_pattern
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.architecture import read_json

CONFIG_FILE = "adapter_config.json"
_EMBEDDING = names.EMBEDDING.removesuffix(".weight")

_REFUSED = {
    "lora_bias": "its factors have biases",
    "target_parameters": "it targets parameters other than projections and head",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it is active only for some tokens",
    "use_qalora": "its inputs are pooled",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it also truncates the base weights",
    "monteclora_config": "its weights are random variables",
    "arrow_config": "it combines several adapters",
}
"""Settings of PEFT that change the computation beyond W x + scale · B A x, and why each is not supported."""

_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Others (PiSSA, OLoRA, CorDA, LoftQ) also change the base weights, which are not in the adapter's files."""


def read_adapter_settings(directory: Path) -> dict[str, Any]:
    """The settings of an adapter. Raises UserError if it is not LoRA, or if a setting is not supported."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory} has no {CONFIG_FILE}; give a PEFT adapter directory")
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {settings.get('peft_type')!r}; only LORA adapters are supported")
    for key, why in _REFUSED.items():
        if settings.get(key):
            raise UserError(f"{path}: {key} is {settings[key]!r}, which cannot be represented: {why}")
    if settings.get("init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        raise UserError(
            f"{path}: init_lora_weights is {settings['init_lora_weights']!r}, which changed the base weights as well; "
            f"convert the adapter to plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion)"
        )
    for key in ("r", "lora_alpha"):
        if not _is_positive(settings.get(key), whole=key == "r"):
            raise UserError(f"{path}: {key} is {settings.get(key)!r}, not a positive number")
    for key, (kind, what) in _SELECTIONS.items():
        value = settings.get(key)
        if not (
            value is None or type(value) is kind or (isinstance(value, list) and all(type(i) is kind for i in value))
        ):
            raise UserError(f"{path}: {key} is {str(value)[:80]!r}, not {what}, or a list")
    return settings


_SELECTIONS = {
    "target_modules": (str, "an expression"),
    "exclude_modules": (str, "an expression"),
    "modules_to_save": (str, "a name"),
    "layers_pattern": (str, "a name"),
    "layers_to_transform": (int, "a number"),
}
"""Settings that select modules and layers: the type of a value, alone or in a list."""


def require_targets(file: Path, settings: Mapping[str, Any], linear: Collection[str], found: Collection[str]) -> None:
    """Raises UserError if the weights lack a module that the settings select, or have one that they do not select.

    Args:
      file: adapter_config.json.
      settings: its content.
      linear: the modules of the base that can have an adapter.
      found: those that have one in the weights.
    """
    if settings.get("target_modules") is None:
        return
    try:
        selected = {name for name in linear if _is_targeted(settings, name)}
    except NO_EXPRESSION as error:
        raise UserError(f"{file}: target_modules or exclude_modules is not a regular expression: {error}") from None
    if settings.get("ensure_weight_tying"):  # the head gets the adapter of the embedding
        selected = selected - {HEAD} | ({HEAD} & set(found))
    if missing := sorted(selected - set(found)):
        raise UserError(f"{file} targets {names.some(missing, 2)}, but the weights have no tensors for it")
    if extra := sorted(set(found) - selected):
        raise UserError(f"{file} does not target {names.some(extra, 2)}, but the weights have tensors for it")


def _is_targeted(settings: Mapping[str, Any], name: str) -> bool:
    """PEFT's rule. `exclude_modules` and `modules_to_save` take precedence; layers apply to names without a path."""
    targets, excluded = settings["target_modules"], settings.get("exclude_modules") or []
    if re.fullmatch(excluded, name) if isinstance(excluded, str) else _ends_in(name, excluded):
        return False
    saved = settings.get("modules_to_save") or []
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in ([saved] if isinstance(saved, str) else saved)):
        return False
    if isinstance(targets, str):
        return name != HEAD if targets == ALL_LINEAR else re.fullmatch(targets, name) is not None
    return name in targets or (_ends_in(name, targets) and _is_in_layers(settings, name))


def _ends_in(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _is_in_layers(settings: Mapping[str, Any], name: str) -> bool:
    layers, patterns = settings.get("layers_to_transform"), settings.get("layers_pattern") or [r"[^.]*"]
    if layers in (None, []):
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def trained_tokens(file: Path, settings: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The ids of `trainable_token_indices` for a module: "model.embed_tokens" or "lm_head"; () for none.

    Raises:
      UserError: they are not different ids.
    """
    stated = settings.get("trainable_token_indices") or {}
    by_module = stated if isinstance(stated, dict) else {_EMBEDDING: stated}
    ids: Any = next((ids for key, ids in by_module.items() if _ends_in(module, [key])), [])
    if not isinstance(ids, list) or not all(type(one) is int and one >= 0 for one in ids) or len(set(ids)) < len(ids):
        raise UserError(f"{file}: trainable_token_indices has {str(ids)[:80]}, not a list of different ids")
    return tuple(ids)


def last_new_token(file: Path, settings: Mapping[str, Any], vocab_size: int) -> int:
    """The highest id in `trainable_token_indices`, at least that of the base's last row.

    Raises:
      UserError: not every token that the base lacks has a trained row, so that its row is not known.
    """
    ids = {one for module in (_EMBEDDING, HEAD) for one in trained_tokens(file, settings, module)}
    last = max([vocab_size - 1, *ids])
    if last - vocab_size + 1 > len(ids) or not ids.issuperset(range(vocab_size, last + 1)):
        raise UserError(
            f"{file}: trainable_token_indices goes up to {last}, but the base has {vocab_size} rows: the vocabulary "
            "was resized; save the adapter with PEFT's save_embedding_layers=True"
        )
    return last


def scale_of_embedding(file: Path, settings: Mapping[str, Any], rank: int) -> float:
    """The factor of B A of the embedding's adapter. Its patterns match no projection."""
    alpha = by_pattern(patterns_of(file, settings, "alpha_pattern", [_EMBEDDING]), _EMBEDDING, settings["lora_alpha"])
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def lora_config(file: Path, settings: Mapping[str, Any], ranks: Mapping[str, int], dora: bool) -> LoraConfig:
    """The settings that select ranks, scales and modules.

    Args:
      file: adapter_config.json.
      settings: its content.
      ranks: rank of each module that has an adapter in the weights.
      dora: whether the weights have magnitudes.

    Raises:
      UserError: a value is invalid, or differs from the weights.
    """
    if dora and HEAD in ranks:
        raise UserError(f"{file}: use_dora with {HEAD} among its targets is not implemented")
    rank_pattern = patterns_of(file, settings, "rank_pattern", ranks)
    lora = LoraConfig(
        rank=int(settings["r"]),
        alpha=float(settings["lora_alpha"]),
        dropout=_dropout(file, settings),
        targets=targets_of(ranks, settings.get("target_modules")),
        layers_to_transform=_layers(settings, ranks),
        rank_pattern=tuple((pattern, int(value)) for pattern, value in rank_pattern),
        alpha_pattern=patterns_of(file, settings, "alpha_pattern", ranks),
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=dora,
    )
    for name, rank in ranks.items():
        if lora.rank_of(name) != rank:
            raise UserError(f"{file} gives {name} rank {lora.rank_of(name)}, but its tensors have rank {rank}")
    return lora


def targets_of(modules: Collection[str], stated: Any = None) -> tuple[Target, ...]:
    """The last components of the modules' names, in the order of a setting that lists them."""
    found = {name.rpartition(".")[2] for name in modules}
    order = [str(name).rpartition(".")[2] for name in stated] if isinstance(stated, list) else []
    return tuple(sorted((name for name in TARGETS if name in found), key=[*order, *TARGETS].index))


def _layers(settings: Mapping[str, Any], modules: Collection[str]) -> tuple[int, ...] | None:
    """The layers that have adapters, if the settings select layers; otherwise None. Beside an adapter of the head, the
    other layers get factors of zeros."""
    if settings.get("layers_to_transform") in (None, []) or HEAD in modules:
        return None
    return tuple(sorted({number for name in modules if (number := names.layer_of(name)) is not None}))


def patterns_of(
    file: Path, settings: Mapping[str, Any], key: str, modules: Collection[str]
) -> tuple[tuple[str, float], ...]:
    """The patterns that match a module of the adapter; PEFT also ignores the others."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{file}: {key} is {patterns!r}, not an object")
    kept = []
    for pattern, value in patterns.items():
        try:
            matches = any(by_pattern(((pattern, True),), name, False) for name in modules)
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


def _dropout(file: Path, settings: Mapping[str, Any]) -> float:
    value = settings.get("lora_dropout") or 0.0
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{file}: lora_dropout is {value!r}, not a fraction below 1")
    return float(value)
