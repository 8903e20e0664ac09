"""Adapters of bases whose files fuse projections (Phi-3): PEFT trains one pair of factors for the whole matrix.

On the rows of one module, B A of the whole matrix is those rows of B times A; so an adapter of PEFT becomes one adapter
per module, exactly. The other way, factors of several modules become one pair with A stacked and B block-diagonal,
whose rank is the sum of theirs; blocks are recognised when such an adapter is read again. If all modules have the same
A, as after reading an adapter of PEFT, it is written once.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flacuna_jax.config.types import by_pattern
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.files.tensors import ALL_ROWS, MappedFiles, ReadableTensor
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.lora import PEFT_LEAVES
from flacuna_jax.model.parameters import base_parameters

A, B, MAGNITUDE = (PEFT_LEAVES[kind] for kind in ("lora_a", "lora_b", "lora_magnitude"))


class Size(NamedTuple):
    """Settings of one module's adapter."""

    rank: int
    alpha: float

    @classmethod
    def with_scale(cls, rank: int, scale: float, rank_stabilised: bool) -> "Size":
        """The alpha that gives this scale."""
        return cls(rank, round(scale * (math.sqrt(rank) if rank_stabilised else rank), 9))


@dataclasses.dataclass(frozen=True)
class HeldTensor:
    """An array in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, files: MappedFiles, rows: slice = ALL_ROWS) -> np.ndarray:
        del files
        return self.array[rows]


@functools.lru_cache(maxsize=64)
def fused_modules(config: LlamaConfig) -> Mapping[str, Mapping[str, slice]]:
    """Modules of files that have the rows of several modules of the network: name → name of each → its rows. Empty for
    most networks."""
    fused: dict[str, dict[str, slice]] = {}
    for stored, parts in names.stored_parts(config).items():
        if len(parts) > 1:
            own = {base_parameters(config)[p.path].module.of_layer(p.layer): p.rows for p in parts}
            fused[stored.removesuffix(".weight")] = own
    return fused


def settings_of(sizes: Mapping[str, Size]) -> dict[str, Any]:
    """PEFT's rank, alpha and patterns for modules with these sizes; the most frequent size needs no pattern."""
    usual = collections.Counter(sizes.values()).most_common(1)[0][0]
    by_last: dict[str, set[Size]] = collections.defaultdict(set)
    for name, size in sizes.items():
        by_last[name.rpartition(".")[2]].add(size)
    patterns: dict[str, Size] = {}
    for name, size in sizes.items():
        last = name.rpartition(".")[2]
        if by_last[last] != {usual}:
            patterns[last if len(by_last[last]) == 1 else re.escape(name)] = size
    return {
        "r": usual.rank,
        "lora_alpha": usual.alpha,
        "rank_pattern": {pattern: size.rank for pattern, size in patterns.items() if size.rank != usual.rank},
        "alpha_pattern": {pattern: size.alpha for pattern, size in patterns.items() if size.alpha != usual.alpha},
    }


def split_fused_factors(
    source: Path, settings: Mapping[str, Any], tensors: Mapping[str, ReadableTensor], config: LlamaConfig
) -> tuple[dict[str, Any], dict[str, ReadableTensor]]:
    """Settings and tensors of a PEFT adapter in terms of the network's own modules.

    Args:
      source: the file of the tensors, for messages.
      settings: of the adapter, with patterns as pairs.
      tensors: by PEFT's name.
      config: of a base with fused projections.

    Raises:
      UserError: a factor of a fused module does not have its rows.
    """
    fused, rank_stabilised = fused_modules(config), bool(settings.get("use_rslora"))
    kept: dict[str, ReadableTensor] = {}
    grouped: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    sizes: dict[str, Size] = {}

    def scale_of(module: str) -> float:
        rank = by_pattern(settings["rank_pattern"], module, settings["r"])
        alpha = by_pattern(settings["alpha_pattern"], module, settings["lora_alpha"])
        return alpha / (math.sqrt(rank) if rank_stabilised else rank)

    for name, tensor in tensors.items():
        match = names.ADAPTER.fullmatch(name)
        module = "" if match is None else match[1].removeprefix(names.PEFT_PREFIX)
        if match is not None and module in fused:
            grouped[module][match[2] or match[3]] = tensor.read(MappedFiles())
            continue
        kept[name] = tensor
        if match is not None and match[2] == "lora_A":
            sizes[module] = Size.with_scale(tensor.shape[0], scale_of(module), rank_stabilised)
    for module, leaves in grouped.items():
        for own, factors in _split_factors(source, module, leaves, fused[module]).items():
            kept |= {f"{names.PEFT_PREFIX}{own}.{leaf}": HeldTensor(value) for leaf, value in factors.items()}
            sizes[own] = Size.with_scale(len(factors[A]), scale_of(module), rank_stabilised)
    targets = list(sizes)
    if isinstance(stated := settings.get("target_modules"), list):
        lasts = {name.rpartition(".")[2]: [own.rpartition(".")[2] for own in owns] for name, owns in fused.items()}
        present = {name.rpartition(".")[2] for name in sizes}
        targets += [
            own for name in stated for own in lasts.get(name, [name]) if not present & {*lasts.get(name, [name])}
        ]
    return {**settings, **(settings_of(sizes) if sizes else {}), "target_modules": targets}, kept


def _split_factors(
    source: Path, module: str, leaves: Mapping[str, np.ndarray], parts: Mapping[str, slice]
) -> dict[str, dict[str, np.ndarray]]:
    """The factors of each module: name → leaf → array."""
    total = max(rows.stop for rows in parts.values())
    a_ri, b_or = (leaves.get(leaf, np.zeros((0, 0))) for leaf in ("lora_A", "lora_B"))
    if a_ri.ndim != 2 or b_or.shape != (total, len(a_ri)):
        raise UserError(
            f"{source}: {module} has lora_A {list(a_ri.shape)} and lora_B {list(b_or.shape)}; they must be [rank, in] "
            f"and [{total}, rank]"
        )
    magnitude_o = leaves.get("lora_magnitude_vector")
    split = {}
    for own, columns in _blocks(b_or, parts).items():
        split[own] = {A: a_ri[columns], B: b_or[parts[own], columns]}
        if magnitude_o is not None:
            split[own][MAGNITUDE] = magnitude_o[parts[own]]
    return split


def _blocks(b_or: np.ndarray, parts: Mapping[str, slice]) -> dict[str, slice]:
    """The columns of B that each module needs: its block if B is block-diagonal with equal blocks, otherwise all. A
    module whose rows are zero has no adapter, unless all are."""
    used = [own for own, rows in parts.items() if np.any(b_or[rows])] or list(parts)
    width, rest = divmod(b_or.shape[1], len(used))
    blocks = {own: slice(i * width, (i + 1) * width) for i, own in enumerate(used)}
    inside = np.zeros(b_or.shape, bool)
    for own, columns in blocks.items():
        inside[parts[own], columns] = True
    if rest or not np.any(b_or) or np.any(b_or[~inside]):
        return dict.fromkeys(used, ALL_ROWS)
    return blocks


class Factors(NamedTuple):
    """The adapter of one module: A, B, its scale, and DoRA's magnitudes."""

    a_ri: np.ndarray
    b_or: np.ndarray
    scale: float
    magnitude_o: np.ndarray | None


def join(
    factors: Mapping[str, Factors], config: LlamaConfig, rank_stabilised: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The opposite of `split_fused_factors`: PEFT's rank, alpha, patterns and targets, and tensors by PEFT's name.

    Args:
      factors: by name of the network's module.
      config: of the base.
      rank_stabilised: whether PEFT divides alpha by √rank.

    Raises:
      UserError: modules of one fused matrix have different scales, or only some of them have DoRA's magnitudes, or none
        has been trained.
    """
    places = {own: (module, rows) for module, parts in fused_modules(config).items() for own, rows in parts.items()}
    together: dict[str, dict[str, Factors]] = collections.defaultdict(dict)
    for own, found in factors.items():
        together[places[own][0] if own in places else own][own] = found
    tensors: dict[str, np.ndarray] = {}
    sizes: dict[str, Size] = {}
    for module, members in together.items():
        joined = next(iter(members.values()))
        if module not in members:
            joined = _joined(
                module, {places[own][1].start: found for own, found in members.items()}, _rows(config, module)
            )
        named = {A: joined.a_ri, B: joined.b_or, MAGNITUDE: joined.magnitude_o}
        tensors |= {f"{names.PEFT_PREFIX}{module}.{leaf}": x for leaf, x in named.items() if x is not None}
        sizes[module] = Size.with_scale(len(joined.a_ri), joined.scale, rank_stabilised)
    targets = list(dict.fromkeys(module.rpartition(".")[2] for module in together))
    return {**settings_of(sizes), "target_modules": targets}, tensors


def _rows(config: LlamaConfig, module: str) -> int:
    return max(rows.stop for rows in fused_modules(config)[module].values())


def _joined(module: str, members: Mapping[int, Factors], total: int) -> Factors:
    """One pair of factors for modules by their first row in the matrix."""
    ordered = dict(sorted(members.items()))
    first, *others = ordered.values()
    if any(other.scale != first.scale for other in others):
        raise UserError(
            f"{module}: the modules in it have different scales (alpha and rank), but PEFT adapts them together; "
            "export the merged model"
        )
    if not any(np.any(found.b_or) for found in ordered.values()):
        raise UserError(f"{module}: its adapters are untrained (B is zero), and cannot be written as one")
    shared = all(np.array_equal(other.a_ri, first.a_ri) for other in others)
    a_ri = first.a_ri if shared else np.concatenate([found.a_ri for found in ordered.values()])
    b_or = np.zeros((total, len(a_ri)), np.float32)
    column = 0
    for start, found in ordered.items():
        rank = len(found.a_ri)
        b_or[start : start + len(found.b_or), column : column + rank] = found.b_or
        column += 0 if shared else rank
    if first.magnitude_o is None:
        return Factors(a_ri, b_or, first.scale, None)
    magnitudes = [found.magnitude_o for found in ordered.values() if found.magnitude_o is not None]
    if sum(map(len, magnitudes)) != total:
        raise UserError(f"{module}: with DoRA, all modules in it must be targets; export the merged model")
    return Factors(a_ri, b_or, first.scale, np.concatenate(magnitudes))
