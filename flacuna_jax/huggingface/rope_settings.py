"""Rotary embeddings in config.json of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`)."""

import math
from typing import Any

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.families import Member, Settings
from flacuna_jax.huggingface.values import flag, number, size
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.rope import RopeScaling

LOCAL_THETA = "rope_local_base_freq"
"""The key of the rotary base of layers with a window (Gemma 3)."""


def rope_fields(raw: Settings, origin: str, member: Member, positions: int, head_dim: int) -> dict[str, Any]:
    """The fields of `LlamaConfig` about rotary embeddings.

    Raises:
      UserError: the keys contradict each other, or have a value that is not implemented.
    """
    windowed_theta = None
    if member.rope_by_layer_type:
        raw, windowed_theta = _of_whole_documents(raw, origin, member)
    theta = _theta(raw, origin, member)
    fraction = _fraction(raw, origin, member)
    rotated = int(head_dim * fraction)
    if rotated % 2 or not rotated:
        raise UserError(f"{origin}: {rotated} of {head_dim} dimensions are rotated; rotary embeddings rotate pairs")
    return {
        "rope_theta": theta,
        "windowed_rope_theta": theta if member.rope_by_layer_type and windowed_theta is None else windowed_theta,
        "rope_scaling": _scaling(raw, origin, positions, rotated),
        "partial_rotary_factor": fraction,
    }


def _of_whole_documents(raw: Settings, origin: str, member: Member) -> tuple[Settings, float | None]:
    """The settings with only the rotary embedding of layers without a window, and the base of the others."""
    rope = _rope(raw, "rope_parameters", origin)
    whole, windowed = (_rope(rope, f"{kind}_attention", f"{origin}: rope_parameters") for kind in ("full", "sliding"))
    if not whole and not windowed:
        theta = raw.get(LOCAL_THETA, member.windowed_rope_theta)
        return raw, None if theta is None else number({LOCAL_THETA: theta}, LOCAL_THETA, origin, 0.0)
    if windowed.get("rope_type", "default") != "default":
        raise UserError(f"{origin}: layers with a window have the rope_type {windowed['rope_type']!r}, not default")
    default = member.windowed_rope_theta or member.rope_theta
    theta = number(windowed, "rope_theta", f"{origin}: rope_parameters.sliding_attention", default)
    if raw.get(LOCAL_THETA, theta) != theta:
        raise UserError(f"{origin}: {LOCAL_THETA} is {raw[LOCAL_THETA]!r}, but rope_parameters has {theta:g}")
    return {**raw, "rope_parameters": whole}, theta


def _theta(raw: Settings, origin: str, member: Member) -> float:
    nested = _rope(raw, "rope_parameters", origin).get("rope_theta")
    flat = raw.get("rope_theta")
    if nested is not None and flat is not None and nested != flat:
        raise UserError(f"{origin}: rope_theta is {flat!r}, but rope_parameters.rope_theta is {nested!r}")
    theta = nested if nested is not None else flat
    return number({} if theta is None else {"rope_theta": theta}, "rope_theta", origin, member.rope_theta)


def _fraction(raw: Settings, origin: str, member: Member) -> float:
    """The fraction of each head that is rotated."""
    key = "partial_rotary_factor"
    stated = (raw, *(_rope(raw, name, origin) for name in ("rope_scaling", "rope_parameters")))
    found = {number(place, key, origin, 1.0) for place in stated if place.get(key) is not None}
    if len(found) > 1:
        raise UserError(f"{origin}: {key} has the values {sorted(found)}; remove one of them")
    fraction = next(iter(found), 1.0)
    if fraction > 1 or (fraction != 1 and not member.partial_rotary):
        raise UserError(f"{origin}: {key} is {fraction:g}; partial rotary embedding is not implemented for this model")
    return fraction


def _scaling(raw: Settings, origin: str, positions: int, rotated: int) -> RopeScaling | None:
    """The rope scaling from either of its two keys; a kind that is not implemented is an error, never ignored."""
    found = {key: _parse_scaling(raw, key, origin, positions, rotated) for key in ("rope_scaling", "rope_parameters")}
    given = {key: scaling for key, scaling in found.items() if raw.get(key) is not None}
    if len(set(given.values())) > 1:
        raise UserError(f"{origin}: rope_scaling and rope_parameters differ; remove one of them")
    return next(iter(given.values()), None)


def _parse_scaling(raw: Settings, key: str, origin: str, positions: int, rotated: int) -> RopeScaling | None:
    rope = _rope(raw, key, origin)
    kind = rope.get("rope_type", rope.get("type", "default"))
    where = f"{origin}: {key}"
    if by_type := [name for name in rope if str(name).endswith("_attention")]:
        raise UserError(f"{where} has {by_type[0]}, but all layers of this model have the same rotary embedding")
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, number(rope, "factor", where, 0.0))
    if kind == "longrope" or (kind in ("su", "yarn") and "short_factor" in rope):
        return _longrope(raw, rope, where, positions, rotated)
    if kind == "yarn":
        return _yarn(rope, where, positions)
    if kind != "llama3":
        raise UserError(f"{where} has {kind!r}; only linear, llama3, yarn, longrope and dynamic are implemented")
    low, high = (number(rope, key, where, 0.0) for key in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise UserError(f"{where}: low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    return RopeScaling(
        "llama3",
        number(rope, "factor", where, 0.0),
        low,
        high,
        size(rope, "original_max_position_embeddings", where, positions),
    )


def _longrope(raw: Settings, rope: Settings, where: str, positions: int, rotated: int) -> RopeScaling:
    """LongRoPE with transformers' defaults."""
    stated = {**rope, **{key: raw[key] for key in ("original_max_position_embeddings",) if raw.get(key)}}
    original = size(stated, "original_max_position_embeddings", where, positions)
    factor = _stated(rope, "factor", where, positions / original)
    return RopeScaling(
        "longrope",
        factor,
        original_max_position_embeddings=original,
        attention_factor=_stated(rope, "attention_factor", where, _longrope_magnitude(factor, original)),
        short_factor=_divisors(rope, "short_factor", where, rotated // 2),
        long_factor=_divisors(rope, "long_factor", where, rotated // 2),
    )


def _stated(rope: Settings, key: str, where: str, computed: float) -> float:
    return computed if rope.get(key) is None else number(rope, key, where, 0.0)


def _divisors(rope: Settings, key: str, where: str, pairs: int) -> tuple[float, ...]:
    divisors = rope.get(key)
    if not isinstance(divisors, list) or len(divisors) != pairs:
        raise UserError(f"{where}: {key} is not a list of {pairs} numbers, one per rotated pair")
    return tuple(number({key: divisor}, key, where, 0.0) for divisor in divisors)


def _longrope_magnitude(factor: float, original: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _yarn(rope: Settings, where: str, positions: int) -> RopeScaling:
    """YaRN with transformers' defaults."""
    original = size(rope, "original_max_position_embeddings", where, positions)
    factor = number(rope, "factor", where, positions / original)
    scales = [number(rope, key, where, 1.0) for key in ("mscale", "mscale_all_dim") if rope.get(key)]

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    stated = rope.get("attention_factor")
    computed = magnitude(scales[0]) / magnitude(scales[1]) if len(scales) == 2 else magnitude(1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=number(rope, "beta_fast", where, 32.0),
        beta_slow=number(rope, "beta_slow", where, 1.0),
        attention_factor=computed if stated is None else number(rope, "attention_factor", where, 1.0),
        truncate=flag({"truncate": True} | dict(rope), "truncate", where),
    )


def _rope(raw: Settings, key: str, origin: str) -> Settings:
    rope = raw.get(key)
    if rope is not None and not isinstance(rope, dict):
        raise UserError(f"{origin}: {key} is {rope!r}, not an object")
    return rope or {}


def rope_settings(config: LlamaConfig, member: Member) -> dict[str, Any]:
    """The keys of config.json about rotary embeddings, for transformers 4 and 5."""
    scaling = config.rope_scaling
    nested = {"rope_theta": config.rope_theta, **_scaling_settings(scaling)}
    written: dict[str, Any] = {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else _scaling_settings(scaling),
        "rope_parameters": nested,
    }
    if member.partial_rotary:
        written["partial_rotary_factor"] = nested["partial_rotary_factor"] = config.partial_rotary_factor
    if scaling is not None and scaling.kind == "longrope":
        written["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        nested["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        written["rope_scaling"] = _longrope_settings(config, scaling)
    if member.rope_by_layer_type:
        windowed = {"rope_type": "default", "rope_theta": config.windowed_rope_theta}
        written["rope_parameters"] = {"full_attention": nested, "sliding_attention": windowed}
    if member.windowed_rope_theta is not None:
        written[LOCAL_THETA] = config.windowed_rope_theta
    return written


def _longrope_settings(config: LlamaConfig, scaling: RopeScaling) -> dict[str, Any]:
    """transformers 4 rejects a longrope with more than these three keys, and computes the others."""
    written: dict[str, Any] = {"type": "longrope"}
    written |= {key: list(getattr(scaling, key)) for key in ("short_factor", "long_factor")}
    original = scaling.original_max_position_embeddings
    if scaling.factor != config.max_position_embeddings / original:
        written["factor"] = scaling.factor
    if scaling.attention_factor != _longrope_magnitude(scaling.factor, original):
        written["attention_factor"] = scaling.attention_factor
    return written


def _scaling_settings(scaling: RopeScaling | None) -> dict[str, Any]:
    """Rope scaling with `type` for transformers 4.42 and older, and `rope_type` for newer releases."""
    if scaling is None:
        return {"rope_type": "default"}
    written: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        written |= {name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
    if scaling.kind == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        written |= {name: getattr(scaling, name) for name in names}
    if scaling.kind == "longrope":
        written |= {name: list(getattr(scaling, name)) for name in ("short_factor", "long_factor")}
        written["attention_factor"] = scaling.attention_factor
    if scaling.kind in ("llama3", "yarn"):
        written["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    return written
