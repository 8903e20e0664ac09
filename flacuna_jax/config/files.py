"""Reads configs: YAML with exact line numbers, `--a.b=value` overrides, and messages that users can act on."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import BaseModel, ValidationError

from flacuna_jax.config.explanations import Location, all_keys, explain
from flacuna_jax.config.run import RunConfig
from flacuna_jax.errors import UserError

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
    known = [*words, *all_keys(RunConfig)]
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
        raise UserError(explain(error, tree, overridden, origin_of, schema)) from None


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
