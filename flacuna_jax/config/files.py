"""Reads configs: YAML with exact line numbers, `--a.b=value` overrides, and messages that users can act on."""

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import BaseModel, ValidationError, create_model

from flacuna_jax.config.data import SourceConfig
from flacuna_jax.config.other_names import ours
from flacuna_jax.config.run import RunConfig
from flacuna_jax.errors import UserError

Location = tuple[str | int, ...]
Schema = TypeVar("Schema", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """A YAML 1.1 loader that reads `2e-5` as a number rather than text, and dates as text, because no setting is a
    date. It rejects duplicate keys and keys that are not scalars."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`; keys here override merged ones
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        """Joins pairs of escaped surrogates, which JSON writes for characters beyond 16 bits, to one character."""
        text = super().construct_scalar(node)
        try:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise yaml.constructor.ConstructorError(
                None, None, f"{text!r} is not valid text", node.start_mark
            ) from None
        if "\0" in text:
            raise yaml.constructor.ConstructorError(
                None, None, "a setting must not contain a NUL character", node.start_mark
            )
        return text


_Loader.yaml_implicit_resolvers = {
    first: [(tag, expression) for tag, expression in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


@overload
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str] = (), *, schema: type[Schema]) -> Schema: ...
def load_config(path: str | Path, overrides: Sequence[str] = (), *, schema: type[BaseModel] = RunConfig) -> BaseModel:
    """Reads and validates a config file with its command-line overrides.

    Args:
      path: YAML file.
      overrides: `--section.key=value` strings; values are YAML.
      schema: the kind of config; by default, the config of a run.

    Raises:
      UserError: the file cannot be read, is not YAML, or a setting is unknown, mistyped or out of range; the message
        names the file and line (or the override) and the nearest valid key.
    """
    path = Path(path)
    tree, lines = _read_yaml(path)
    return _validate(tree, overrides, lambda location: f"{path}:{_line_of(lines, location)}", schema)


def top_level_keys(path: str | Path) -> frozenset[str]:
    """The top-level keys of a config file, which identify its kind; raises `UserError` like `load_config`."""
    return frozenset(map(str, _read_yaml(Path(path))[0]))


def require_config(config: object) -> None:
    """Raises `UserError` for anything but the config of a run, such as its path."""
    if not isinstance(config, RunConfig):
        raise UserError(f"config is {config!r}, not the config of a run; read a file with load_config(path)")


def require_settings(names: Sequence[str], words: Sequence[str], key: str) -> None:
    """Raises `UserError` for a name in the list `key` that is neither a setting or section of a run nor in `words`."""
    known = [*words, *_all_keys(RunConfig)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else f"; besides settings, {', '.join(words)} are valid"
            raise UserError(f"{key}: {name!r} is not a setting{hint}")


def parse_config(tree: dict[str, Any], overrides: Sequence[str] = (), origin: str = "config") -> RunConfig:
    """Validates an already parsed config; raises `UserError` like `load_config`."""
    return _validate(tree, overrides, lambda _: origin, RunConfig)


def _validate(tree: dict[str, Any], overrides: Sequence[str], origin_of: Any, schema: type[Schema]) -> Schema:
    overridden: dict[Location, str] = {}
    for text in overrides:
        location, value = _parse_override(text)
        _assign(tree, location, value, text)
        overridden[location] = text
    try:
        return schema.model_validate(_lists_to_tuples(tree))
    except ValidationError as error:
        raise UserError(_explain(error, overridden, origin_of, schema)) from None


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    try:
        tree, lines = _parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of settings, this file holds {type(tree).__name__}")
    return tree, lines


def _parse_yaml(text: str) -> tuple[Any, dict[Location, int]]:
    """Returns plain data and the line of each part of it. Raises YAMLError, or ValueError for absurdly long numbers."""
    lines: dict[Location, int] = {}
    try:
        tree = yaml.load(text, Loader=_Loader)  # a SafeLoader subclass: builds plain data only
        _collect_lines(yaml.compose(text, Loader=_Loader), (), lines)
    except RecursionError:
        raise ValueError("it is nested too deeply, or an alias refers to a value that contains it") from None
    return tree, lines


def _collect_lines(node: Any, location: Location, lines: dict[Location, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*location, key.value)] = key.start_mark.line + 1
            _collect_lines(value, (*location, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*location, index)] = item.start_mark.line + 1
            _collect_lines(item, (*location, index), lines)


def _line_of(lines: dict[Location, int], location: Location) -> int:
    while location and location not in lines:
        location = location[:-1]
    return lines.get(location, 1)


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _parse_override(text: str) -> tuple[Location, Any]:
    name, equals, value = text.removeprefix("--").partition("=")
    if not text.startswith("--") or not equals or not all(name.split(".")):
        raise UserError(f"{text!r} is not an override; write --section.key=value, for example --training.epochs=2")
    try:
        parsed, _ = _parse_yaml(value)
    except (yaml.YAMLError, ValueError) as error:
        what = error.problem if isinstance(error, yaml.MarkedYAMLError) else " ".join(str(error).split())
        raise UserError(f"{text!r}: the value is not valid YAML: {what}") from None
    return tuple(int(part) if part.isdecimal() else part for part in name.split(".")), parsed


def _assign(tree: dict[str, Any], location: Location, value: Any, text: str) -> None:
    """Sets `tree[location] = value` and creates missing sections; enters only mappings and existing list items."""
    here: Any = tree
    for part, following in zip(location, (*location[1:], None), strict=True):
        last = following is None
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                raise UserError(f"{text!r}: {part!r} is not an item of a list of {len(here)}")
        elif not isinstance(here, dict):
            raise UserError(f"{text!r}: {part!r} is inside a value that is not a section")
        if last:
            here[part] = value
        else:
            if (isinstance(here, dict) and here.get(part) is None) or here[part] == "auto":
                here[part] = {}
            here = here[part]


def _lists_to_tuples(value: Any) -> Any:
    """Converts lists to tuples: the schema has tuples and validates strictly, and YAML has only lists."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value


def _explain(error: ValidationError, overridden: dict[Location, str], origin_of: Any, schema: type[BaseModel]) -> str:
    items = [(_as_written(item["loc"]), item) for item in error.errors()]
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


def _as_written(location: tuple[str | int, ...]) -> Location:
    """Removes the type names and the names of alternatives that Pydantic adds to the location of a union's error."""
    parts = [part for part in location if not (isinstance(part, str) and re.search(r"Config|\[|^constrained-", part))]
    if parts[:2] == ["training", "objective"]:
        del parts[2:3]
    return tuple(parts)


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
    everywhere = {key.rsplit(".", 1)[-1]: key for key in reversed(_all_keys(schema))}
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


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = _section_in(field.annotation)
        if inner:
            keys += _all_keys(inner, f"{prefix}{name}.")
    return keys
