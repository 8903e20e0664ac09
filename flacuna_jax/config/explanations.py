"""Explains why a config is not valid: messages that name the setting and, if there is one, the nearest valid value."""

import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from flacuna_jax.config.data import SourceConfig
from flacuna_jax.config.other_names import ours
from flacuna_jax.config.run import RunConfig

Location = tuple[str | int, ...]
"""Keys of sections and indices of lists, from the outside in."""


def explain(
    error: ValidationError,
    tree: Any,
    overridden: Mapping[Location, str],
    origin_of: Callable[[Location], str],
    schema: type[BaseModel],
) -> str:
    """A line for each mistake.

    Args:
      tree: what was validated.
      overridden: overrides of the command line, by the location that each sets.
      origin_of: where a location is written, for example a file and a line.
    """
    items = [(_as_written(item["loc"], tree), item) for item in error.errors()]
    messages = []
    for location, item in _joined(items):
        # A union reports every alternative and a container reports its items' failure again: keep the deepest.
        if any(len(other) > len(location) and other[: len(location)] == location for other, _ in items):
            continue
        message = _explain_one(item, location, schema)
        override = next((text for at, text in overridden.items() if _concerns(at, location, message)), None)
        messages.append(f"{repr(override) if override else origin_of(location)}: {message}")
    return "\n".join(dict.fromkeys(messages))


def _joined(items: list[tuple[Location, Any]]) -> list[tuple[Location, Any]]:
    """One error per location, where a union reports one for each alternative: with the words of all of them, or the one
    of an alternative that has the right type."""
    by_location: dict[Location, list[Any]] = {}
    for location, item in items:
        by_location.setdefault(location, []).append(item)
    joined = []
    for location, found in by_location.items():
        words = [item["ctx"]["expected"] for item in found if item["type"] == "literal_error"]
        right = [item for item in found if item["type"] not in ("string_type", "int_type", "int_from_float")]
        if words:
            *first, last = dict.fromkeys(re.findall(r"'[^']+'", " ".join(words)))
            expected = f"{', '.join(first)} or {last}" if first else last
            joined.append((location, {**found[0], "type": "literal_error", "ctx": {"expected": expected}}))
        elif right or len(found) == 1:
            joined += [(location, item) for item in right or found]
        else:
            needed = " or ".join(item["msg"].removeprefix("Input should be ") for item in found)
            joined.append((location, {**found[0], "type": "type", "msg": f"Input should be {needed}"}))
    return joined


def _concerns(set_at: Location, location: Location, message: str) -> bool:
    """Whether an override caused an error at `location`: it set that location or one that contains it, or it set a part
    of that location and the message names that part."""
    if location[: len(set_at)] == set_at:
        return True
    return set_at[: len(location)] == location and re.search(rf"\b{re.escape(str(set_at[-1]))}\b", message) is not None


def _explain_one(item: Any, location: Location, schema: type[BaseModel]) -> str:
    key = ".".join(map(str, location))
    kind, value = item["type"], item.get("input")
    if kind in ("model_type", "model_attributes_type"):
        null = " or null" if _may_be_null(location, schema) else ""
        return f"{key} must be a section{null}, not {value!r}{_as_section(location, value, schema)}"
    if kind == "extra_forbidden":
        section = _section_at(location[:-1], schema)
        if section and location[-1] in section.model_fields:  # of another alternative
            return f"{key} is not a setting of {item['loc'][-2]}"
        return f"{key} is not a setting{_nearest_key(location, value, schema)}"
    if kind == "missing":
        return f"{key} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        names = [name.strip("'") for name in re.findall(r"'[^']+'", item["ctx"].get("expected_tags", ""))]
        near = difflib.get_close_matches(str(item["ctx"].get("tag")), names, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key}.name must be one of {', '.join(names)}{hint}" if names else f"{key}.name is missing"
    if kind == "value_error":
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    if kind == "literal_error":
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", item["ctx"]["expected"]), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        section = _section_at(location, schema)
        others = f" or a section of {', '.join(section.model_fields)}" if section else ""
        return f"{key} must be {item['ctx']['expected']}{others}, not {value!r}{hint}"
    if _section_at(location, schema) is not None:
        hint = _as_section(location, value, schema)
    else:
        nearest = _nearest_value(kind, value, item.get("ctx", {}))
        if isinstance(value, int | float) and value <= 0 and _may_be_null(location, schema):
            nearest = f"{nearest}, or null for none" if nearest else "null for none"
        hint = f"; use {nearest}" if nearest is not None else ""
    message = "input should be a list" if kind == "tuple_type" else f"{item['msg'][0].lower()}{item['msg'][1:]}"
    return f"{key}: {message} (got {value!r}){hint}"


def _nearest_value(kind: str, value: Any, limits: Mapping[str, Any]) -> str | None:
    """A suggestion: the nearest valid value, or the value of the right type that was probably meant; else None."""
    if kind in ("greater_than", "less_than"):
        limit, way, word = (limits["gt"], 1, "above") if kind == "greater_than" else (limits["lt"], -1, "below")
        return str(limit + way) if isinstance(limit, int) else f"any number {word} {limit:g}"
    if kind in ("greater_than_equal", "less_than_equal"):
        return str(limits["ge" if kind == "greater_than_equal" else "le"])
    if kind in ("int_type", "int_from_float", "float_type"):
        return _as_number(value, whole=kind != "float_type")
    if kind == "bool_type":
        words = {"true": "true", "yes": "true", "on": "true", "1": "true"}
        words |= {"false": "false", "no": "false", "off": "false", "0": "false"}
        return words.get(str(value).lower())
    if kind == "string_type" and isinstance(value, int | float):
        return f"'{value}' (in quotes)"
    return f"[{value}]" if kind == "tuple_type" and isinstance(value, str | int | float) else None


def _as_number(value: Any, whole: bool) -> str | None:
    text = str(float(value)) if isinstance(value, bool) else str(value).strip()
    thousands = re.fullmatch(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?", text)
    try:
        number = float(text.replace(",", "" if thousands else "."))
        return str(round(number) or math.ceil(number)) if whole else f"{number:g}" if math.isfinite(number) else None
    except (ValueError, OverflowError):
        return None


def _as_written(location: tuple[str | int, ...], tree: Any) -> Location:
    """The location in the tree: without the type names and the names of alternatives that Pydantic adds for a union,
    and with the key of a mapping that is validated as pairs."""
    parts = [part for part in location if not (isinstance(part, str) and re.search(r"Config|\[|^constrained-", part))]
    if parts[:2] == ["training", "objective"]:
        del parts[2:3]
    here = tree
    for index, part in enumerate(parts):
        if isinstance(here, dict) and isinstance(part, int) and part not in here:
            return (*parts[:index], list(here)[part], *parts[index + 2 :])
        here = _within(here, part)
    return tuple(parts)


def _within(here: Any, part: str | int) -> Any:
    try:
        return here[part]
    except (KeyError, IndexError, TypeError):
        return None


def _as_section(location: Location, value: Any, schema: type[BaseModel]) -> str:
    """A hint that shows a value written as a section, for a source (or list of sources) given as a path alone, and for
    an alternative given by its name."""
    section = _section_at(location, schema)
    key = "path" if section is SourceConfig else "name"
    if section is None or key not in section.model_fields or not isinstance(value, str):
        return ""
    form = f"{{{key}: {value}}}"
    if section is not SourceConfig or isinstance(location[-1], int):
        return f"; write {form}"
    return f"; write [{form}], on a command line --{'.'.join(map(str, location))}='[{form}]'"


def _may_be_null(location: Location, schema: type[BaseModel]) -> bool:
    section = _section_at(location[:-1], schema)
    field = section.model_fields.get(str(location[-1])) if section else None
    return field is not None and types.NoneType in typing.get_args(field.annotation)


def _nearest_key(location: Location, value: Any, schema: type[BaseModel]) -> str:
    section = _section_at(location[:-1], schema)
    wrong = str(location[-1])
    theirs = ours(wrong, value, in_a_source=section is SourceConfig) if schema is RunConfig else None
    if theirs:
        return f"; here it is {theirs}"
    if section:
        near = difflib.get_close_matches(wrong, list(section.model_fields), n=1)
        if near:
            return f"; did you mean {'.'.join(map(str, (*location[:-1], near[0])))}?"
    # A name from another section must be a close match; an entry of a list is not matched with other sections.
    everywhere = {key.rsplit(".", 1)[-1]: key for key in reversed(all_keys(schema))}
    near = difflib.get_close_matches(wrong, list(everywhere), n=1, cutoff=0.75)
    if near and section is not SourceConfig:
        return f"; did you mean {everywhere[near[0]]}?"
    names = ", ".join(section.model_fields) if section else ""
    return f"; valid keys here: {names}" if names else ""


def _section_at(location: Location, schema: type[BaseModel]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = schema
    for part in location:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = _section_in(field.annotation) if field else None
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section of a setting; for alternatives, one with the settings of all of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType, tuple, typing.Annotated):
        return None
    found = [section for section in map(_section_in, typing.get_args(annotation)) if section is not None]
    if len(found) < 2:
        return found[0] if found else None
    fields = {name: (field.annotation, field) for section in found for name, field in section.model_fields.items()}
    return create_model("Alternatives", **fields)  # type: ignore[call-overload]


def all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all settings and sections."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = _section_in(field.annotation)
        if inner:
            keys += all_keys(inner, f"{prefix}{name}.")
    return keys
