"""Values of a config.json, checked; `origin` is the file's name in error messages."""

from collections.abc import Mapping
from typing import Any

from flacuna_jax.errors import UserError


def whole(raw: Mapping[str, Any], key: str, origin: str, default: int) -> int:
    value = raw.get(key, default)
    if type(value) is not int or value < 0:
        raise UserError(f"{origin}: {key} is {value!r}, not a whole number")
    return value


def size(raw: Mapping[str, Any], key: str, origin: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if type(value) is not int or value <= 0:
        what = "is missing" if value is None else f"is {value!r}, not a positive whole number"
        raise UserError(f"{origin}: {key} {what}")
    return value


def number(raw: Mapping[str, Any], key: str, origin: str, default: float) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{origin}: {key} is {value!r}, not a positive number")
    return float(value)


def flag(raw: Mapping[str, Any], key: str, origin: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{origin}: {key} is {value!r}, not true or false")
    return value
