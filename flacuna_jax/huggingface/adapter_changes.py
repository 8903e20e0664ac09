"""What an adapter's file has besides factors of projections, and what it means for the base.

PEFT saves whole modules (`modules_to_save`), biases (`bias`), tables (`save_embedding_layers`, or a resized
vocabulary), rows of tables (`trainable_token_indices`) and factors of the embedding. It computes with all of them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flacuna_jax.config.types import HEAD
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.adapter_settings import last_new_token, scale_of_embedding, trained_tokens
from flacuna_jax.huggingface.changed_base import BaseChanges, Change, extended_to, grown, plus_product, replaced_by
from flacuna_jax.huggingface.files.tensors import MappedFiles, ReadableTensor, TensorReader, cast, is_finite
from flacuna_jax.huggingface.load import FLOATING, names_in
from flacuna_jax.model.llama import EMBEDDING, LlamaConfig
from flacuna_jax.model.parameters import base_parameters
from flacuna_jax.model.token_rows import NO_TOKENS, TrainedTokens

_FLOAT = np.dtype(np.float32)
_EMBEDDING = EMBEDDING.of_layer()
_FACTORS = ("lora_embedding_A", "lora_embedding_B")


@dataclasses.dataclass(frozen=True)
class Besides:
    """Tensors of an adapter's file.

    Attributes:
      replaced: tensors that replace those of the base, by their names in the base.
      rows: trained rows [tokens, model] by module.
      factors: A [rank, vocab] and B [model, rank] of the embedding; () without.
    """

    replaced: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    factors: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class Meaning:
    """The result for a base.

    Attributes:
      config: sizes of the base with the changes.
      changes: of the base; None if it stays as it is.
      tokens: the tokens with trained rows.
      embedding_rows: float32 rows [tokens, model] of the embedding, and of a head that is not tied to it.
      head_rows: the rows of such a head.
    """

    config: LlamaConfig
    changes: BaseChanges | None
    tokens: TrainedTokens = NO_TOKENS
    embedding_rows: np.ndarray | None = None
    head_rows: np.ndarray | None = None


def split(source: Path, tensors: Mapping[str, ReadableTensor]) -> tuple[Besides, dict[str, ReadableTensor]]:
    """The tensors besides factors of projections, and the others.

    Raises:
      UserError: a value is not a finite number, or only one of two factors is there.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    others, files = {}, MappedFiles()
    for name, tensor in tensors.items():
        if ".original_module." in name:  # what a module in modules_to_save replaced; PEFT does not compute with it
            continue
        place = names.tensor_in_adapter(name)
        if place is None or tensor.dtype.name not in FLOATING:
            others[name] = tensor
            continue
        module, part = place
        values = tensor.read(files)
        if not np.array_equal(found.setdefault(module, {}).get(part, values), values):
            raise UserError(f"{source} has two values of {part} of {module}, as {name} and under another name")
        if not is_finite(values):
            raise UserError(f"{source}: {name} is not finite")
        found[module][part] = values
    whole = [(module, part) for module, parts in found.items() for part in ("weight", "bias") if part in parts]
    replaced = {f"{module}.{part}": found[module][part] for module, part in whole}
    rows = {module: cast(parts["rows"], _FLOAT) for module, parts in found.items() if "rows" in parts}
    embedding = {part: value for part, value in found.get(_EMBEDDING, {}).items() if part in _FACTORS}
    if len(embedding) == 1:
        raise UserError(f"{source}: {_EMBEDDING} has {next(iter(embedding))}, but not both of {' and '.join(_FACTORS)}")
    factors = tuple(cast(embedding[part], _FLOAT) for part in _FACTORS) if embedding else ()
    return Besides(replaced, rows, factors), others


def meaning(
    source: Path,
    file: Path,
    settings: Mapping[str, Any],
    besides: Besides,
    config: LlamaConfig,
    base: TensorReader | None,
    head_has_factors: bool,
) -> Meaning:
    """What the tensors change in a base.

    Tensors equal to those of the base are dropped. A head that is tied to the embedding is separated from it if the
    adapter changes the two differently, as in PEFT.

    Args:
      source: the file of the tensors.
      file: the file of the settings.
      settings: the adapter's settings.
      besides: its tensors besides factors of projections.
      config: sizes of the base.
      base: the base; None keeps tensors that are equal to its own.
      head_has_factors: whether the adapter has factors for the head.

    Raises:
      UserError: a tensor does not belong to the base, or ids and rows do not match.
    """
    sizes = dataclasses.replace(config, vocab_size=_vocabulary(source, file, settings, besides, config))
    replaced = _split_fused(besides.replaced, sizes)
    _check_replaced(source, replaced, sizes)
    replaced = _without_equal(replaced, config, base)
    table, head = replaced.pop(names.EMBEDDING, None), replaced.pop(names.HEAD, None)
    if config.tie_word_embeddings and sizes.vocab_size != config.vocab_size:
        table, head = (head if table is None else table), (table if head is None else head)
    ids, rows = _tokens(source, file, settings, besides.rows, sizes)
    by_tensor: dict[str, tuple[Change, ...]] = {name: (replaced_by(value),) for name, value in replaced.items()}
    if config.tie_word_embeddings and _alike(table, head) and not besides.factors and not head_has_factors:
        if HEAD not in rows or (ids[HEAD] == ids[_EMBEDDING] and _alike(rows.get(_EMBEDDING), rows[HEAD])):
            head, rows = None, {module: value for module, value in rows.items() if module != HEAD}
        else:
            sizes = dataclasses.replace(sizes, tie_word_embeddings=False)
    elif config.tie_word_embeddings:
        sizes = dataclasses.replace(sizes, tie_word_embeddings=False)
        rows = {HEAD: rows[_EMBEDDING], **rows} if _EMBEDDING in rows else rows
    if head_has_factors and HEAD in rows:
        raise UserError(f"{file}: trainable_token_indices together with an adapter of {HEAD} is not supported")
    grows = sizes.vocab_size > config.vocab_size
    if table is not None or grows:
        by_tensor[names.EMBEDDING] = (extended_to(sizes.vocab_size) if table is None else replaced_by(table),)
    if besides.factors:
        by_tensor[names.EMBEDDING] = (
            *by_tensor.get(names.EMBEDDING, ()),
            _product(source, file, settings, besides, sizes),
        )
    if head is not None or (grows and not sizes.tie_word_embeddings):
        by_tensor[names.HEAD] = (extended_to(sizes.vocab_size) if head is None else replaced_by(head),)
    changes = BaseChanges(config, sizes, by_tensor) if by_tensor or sizes != config else None
    tokens = TrainedTokens(*(ids[module] if module in rows else () for module in (_EMBEDDING, HEAD)))
    return Meaning(sizes, changes, tokens, rows.get(_EMBEDDING), rows.get(HEAD))


def _vocabulary(source: Path, file: Path, settings: Mapping[str, Any], besides: Besides, config: LlamaConfig) -> int:
    """The number of rows of the tables in the adapter. Without tables, that of the base, or more for trained tokens
    that follow its vocabulary."""
    tables = {name: besides.replaced[name] for name in (names.EMBEDDING, names.HEAD) if name in besides.replaced}
    sizes = {len(table) for table in tables.values()}
    if len(sizes) > 1:
        raise UserError(f"{source} has tables of {' and '.join(map(str, sorted(sizes)))} rows")
    if not sizes:
        return grown(config.vocab_size, 1 + last_new_token(file, settings, config.vocab_size))
    size = sizes.pop()
    if size != config.vocab_size and not config.tie_word_embeddings and len(tables) == 1:
        raise UserError(
            f"{source} has {next(iter(tables))} of {size} rows, but the base has {config.vocab_size}, and the adapter "
            "has no other table of that size: the vocabulary was resized; save the adapter with PEFT's "
            "save_embedding_layers=True"
        )
    return size


def _split_fused(replaced: Mapping[str, np.ndarray], config: LlamaConfig) -> dict[str, np.ndarray]:
    """The matrices of the network's modules, where the base's files have those of several modules in one (Phi-3)."""
    stored, split = names.stored_parts(config), {}
    for name, value in replaced.items():
        parts = stored.get(name, ())
        if len(parts) < 2 or value.shape[:1] != (parts[-1].rows.stop,):
            split[name] = value
            continue
        split |= {base_parameters(config)[part.path].tensor(part.layer): value[part.rows] for part in parts}
    return split


def _check_replaced(source: Path, replaced: Mapping[str, np.ndarray], config: LlamaConfig) -> None:
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    for name, value in replaced.items():
        place = names.parse_tensor_name(name, untied)
        if place is None:
            raise UserError(
                f"{source} has the tensor {name} (modules_to_save, or bias), but the base has no such parameter; "
                "it belongs to another model"
            )
        path, layer = place
        if layer is not None and layer >= config.num_layers:
            raise UserError(f"{source} has an adapter in layer {layer}, but the base has {config.num_layers} layers")
        shape = base_parameters(untied)[path].layer_shape
        if value.shape != shape:
            raise UserError(
                f"{source}: {name} has shape {list(value.shape)}, but the base needs {list(shape)}; it belongs to "
                "another model"
            )


def _without_equal(
    replaced: Mapping[str, np.ndarray], config: LlamaConfig, base: TensorReader | None
) -> dict[str, np.ndarray]:
    """Those that differ from the base, in its dtype."""
    if base is None or not replaced:
        return dict(replaced)
    stored = names_in(base, config)
    if config.tie_word_embeddings:
        stored[names.HEAD] = stored[names.EMBEDDING]

    def is_equal(name: str, value: np.ndarray) -> bool:
        source = stored[name]
        return base.shape(source) == value.shape and np.array_equal(cast(value, base.dtype(source)), base.read(source))

    return {name: value for name, value in replaced.items() if not is_equal(name, value)}


def _tokens(
    source: Path, file: Path, settings: Mapping[str, Any], rows: Mapping[str, np.ndarray], config: LlamaConfig
) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    """Ids and rows by module, of the embedding and the head."""
    ids = {module: trained_tokens(file, settings, module) for module in (_EMBEDDING, HEAD)}
    if config.tie_word_embeddings and HEAD in rows and not ids[HEAD]:
        ids[HEAD] = ids[_EMBEDDING]
    if unknown := sorted(set(rows) - set(ids)):
        raise UserError(f"{source} has trained rows of {unknown[0]}; only {_EMBEDDING} and {HEAD} can have some")
    if (last := max([0, *ids[_EMBEDDING], *ids[HEAD]])) >= config.vocab_size:
        raise UserError(f"{file}: trainable_token_indices has {last}, but there are only {config.vocab_size} rows")
    tied = config.tie_word_embeddings and ids[HEAD] == ids[_EMBEDDING]
    for module in ids:
        found = rows[module].shape if module in rows else (0, config.hidden_size)
        expected = (0 if module not in rows and module == HEAD and tied else len(ids[module]), config.hidden_size)
        if found != expected:
            raise UserError(
                f"{source}: the trained rows of {module} have shape {list(found)}; trainable_token_indices and the "
                f"base need {list(expected)}"
            )
    return ids, dict(rows)


def _alike(table: np.ndarray | None, head: np.ndarray | None) -> bool:
    return (table is None and head is None) or (table is not None and head is not None and np.array_equal(table, head))


def _product(source: Path, file: Path, settings: Mapping[str, Any], besides: Besides, config: LlamaConfig) -> Change:
    a_rv, b_dr = besides.factors
    rank = a_rv.shape[0]
    if a_rv.shape != (rank, config.vocab_size) or b_dr.shape != (config.hidden_size, rank):
        raise UserError(
            f"{source}: {_EMBEDDING} has factors {list(a_rv.shape)} and {list(b_dr.shape)}; the base needs "
            f"{[rank, config.vocab_size]} and {[config.hidden_size, rank]}"
        )
    return plus_product(a_rv, b_dr, scale_of_embedding(file, settings, rank))
