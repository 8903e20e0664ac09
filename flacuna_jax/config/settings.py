"""Describes every setting of a run, for `flacuna train --settings` as a YAML file with comments."""

import textwrap
import types
import typing
from typing import Any

import yaml
from pydantic import BaseModel, PlainSerializer
from pydantic.fields import FieldInfo

from flacuna_jax.config.run import RunConfig

_WIDTH = 100


def run_settings() -> str:
    """Every setting of a run."""
    return "\n".join(["# Each setting can also be given as --section.key=value.", *describe(RunConfig)])


def describe(section: type[BaseModel], indent: str = "", width: int = _WIDTH) -> list[str]:
    """The lines of a section: each setting with its default, its allowed words and its description. Where a setting has
    alternatives, those that are not the default are commented out."""
    lines = []
    for name, field in section.model_fields.items():
        lines += [f"{indent}# {line}" for line in _comment(field, width - len(indent) - 2)]
        sections, in_a_list = sections_of(field.annotation)
        if not sections or isinstance(field.default, str):
            lines.append(f"{indent}{name}:{_default(field)}")
        else:
            first, *sections = sections
            lines += [f"{indent}{name}:", *_settings(first, indent, width, in_a_list)]
        for other in sections:
            settings = _settings(other, indent, width - 2, in_a_list)
            lines += [f"{indent}# or", *(f"{indent}# {line.removeprefix(indent)}" for line in settings)]
    return lines


def _settings(section: type[BaseModel], indent: str, width: int, in_a_list: bool) -> list[str]:
    """The lines below the name of a section."""
    settings = describe(section, f"{indent}  {'  ' if in_a_list else ''}", width)
    if in_a_list:
        first = next(index for index, line in enumerate(settings) if not line.lstrip().startswith("#"))
        settings[first] = f"{indent}  - {settings[first].lstrip()}"
    return settings


def _comment(field: FieldInfo, width: int) -> list[str]:
    notes = [" ".join((field.description or "").split())]
    words = allowed_words(field.annotation)
    if len(words) > 1:
        notes.insert(0, f"{' | '.join(words)}.")
    if sections_of(field.annotation)[0] and not field.is_required() and not field.get_default():
        notes.append(f"Default: {default_text(field)}.")
    return textwrap.wrap(" ".join(filter(None, notes)), width)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        words = allowed_words(field.annotation)
        return f" {words[0]}" if len(words) == 1 else "    # required"
    return f" {default_text(field)}"


def default_text(field: FieldInfo) -> str:
    """The default of a setting that is not required and not a section, as YAML."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        value = dict(value) if is_mapping(field) else list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.strip().removesuffix("...").strip()


def is_mapping(field: FieldInfo) -> bool:
    """Whether a setting is a mapping in YAML; some are stored as pairs."""
    as_pairs = any(isinstance(item, PlainSerializer) and item.func is dict for item in field.metadata)
    return as_pairs or typing.get_origin(field.annotation) is dict


def allowed_words(annotation: Any) -> list[str]:
    """The fixed words that a setting accepts."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(word) for word in typing.get_args(annotation)]
    return [word for part in typing.get_args(annotation) for word in allowed_words(part)]


def sections_of(annotation: Any) -> tuple[list[type[BaseModel]], bool]:
    """The section classes of a setting, which are alternatives, and whether the setting is a list of such sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation], False
    found: list[type[BaseModel]] = []
    in_a_list = typing.get_origin(annotation) is tuple
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple):
        for part in typing.get_args(annotation):
            sections, is_list = sections_of(part)
            found, in_a_list = [*found, *sections], in_a_list or is_list
    return found, in_a_list
