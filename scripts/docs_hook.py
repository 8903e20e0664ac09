"""Hook of mkdocs: fills the reference pages from the code when the site is built, so that they cannot become outdated.

A page has one of the markers below where its generated part belongs.
"""

import importlib
import os
import posixpath
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import flacuna_jax
from flacuna_jax.cli import VERBS
from flacuna_jax.config.other_names import OURS
from flacuna_jax.config.run import RunConfig
from flacuna_jax.config.settings import allowed_words, default_text, is_mapping, sections_of

DOCS = Path(__file__).parents[1] / "docs"


def on_config(config: Any) -> Any:
    """Removes pages from the navigation that do not exist."""
    config["nav"] = list(_existing(config["nav"]))
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    for marker, generate in GENERATORS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, _with_links(generate(), page.file.src_uri))
    return markdown


def settings() -> str:
    """A table per section of the config, from its schema."""
    return "\n".join(_sections("", RunConfig, set()))


def commands() -> str:
    """The help of every verb."""
    return "\n\n".join(f"## {verb}\n\nTo {what}.\n\n```text\n{help_of(verb)}\n```" for verb, what in VERBS.items())


def other_names() -> str:
    """A table of the settings of other trainers, and ours."""
    return "\n".join(["| elsewhere | here |", "|---|---|", *(f"| `{name}` | {ours} |" for name, ours in OURS.items())])


def names() -> str:
    """Directives of mkdocstrings for the names of the package, in alphabetical order."""
    listed = sorted(name for name in flacuna_jax.__all__ if not name.startswith("_"))
    return "\n\n".join(f"::: {_home(name)}.{name}" for name in listed)


GENERATORS = {
    "<!-- settings -->": settings,
    "<!-- other names -->": other_names,
    "<!-- commands -->": commands,
    "<!-- names -->": names,
}


def help_of(verb: str) -> str:
    """What `flacuna VERB --help` prints in a terminal of 100 columns."""
    os.environ["COLUMNS"] = "100"
    help_text: str = importlib.import_module(f"flacuna_jax.{verb}").parser().format_help()
    return help_text.strip()


def _existing(nav: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            yield {title: list(_existing(target))}
        elif (DOCS / target).is_file():
            yield entry


def _sections(name: str, section: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """The heading, docstring and table of a section, then those of the sections in it."""
    seen.add(section)
    yield f"## {name or 'Top level'}\n"
    if section.__doc__ and section.__doc__ != BaseModel.__doc__:
        yield " ".join(section.__doc__.split()) + "\n"
    yield "| setting | values | default | |\n|---|---|---|---|"
    below = []
    for key, field in section.model_fields.items():
        sections, in_a_list = sections_of(field.annotation)
        path = f"{name}.{key}".lstrip(".")
        heads = [f"{path}[]" if in_a_list else path] * len(sections)
        if len(sections) > 1:
            heads = [f"{path} {{name: {name_of(one)}}}" if name_of(one) else path for one in sections]
        below += [(head, one) for head, one in zip(heads, sections, strict=True) if one not in seen]
        yield _row(key, field, bool(sections))
    yield ""
    for path, one in below:
        yield from _sections(path, one, seen)


def name_of(section: type[BaseModel]) -> str | None:
    """The word that selects this one of several alternatives."""
    words = allowed_words(section.model_fields["name"].annotation) if "name" in section.model_fields else []
    return words[0] if len(words) == 1 else None


def _row(key: str, field: FieldInfo, is_section: bool) -> str:
    words = " ".join(f"`{word}`" for word in allowed_words(field.annotation))
    values = "section" if is_section else words or ("mapping" if is_mapping(field) else _kind(field.annotation))
    if field.is_required():
        default = "**required**"
    else:
        default = "" if isinstance(field.get_default(), BaseModel) else f"`{default_text(field)}`"
    text = " ".join((field.description or "").split())
    text = re.sub(r"([|\[\]<])", r"\\\1", text)
    return f"| `{key}` | {values} | {default} | {text} |"


_KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", tuple: "list"}


def _kind(annotation: Any) -> str:
    """The type of a setting in words; of alternatives, each once."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _KINDS or origin in _KINDS:
        return _KINDS[origin or annotation]
    parts = parts[:1] if origin is typing.Annotated else parts
    return " or ".join(dict.fromkeys(_kind(part) for part in parts if part is not type(None)))


def _home(name: str) -> str:
    """The module that defines a name."""
    value = getattr(importlib.import_module("flacuna_jax"), name)
    return value.__module__


def _with_links(text: str, page: str) -> str:
    """Makes links of the paths of pages in docstrings, such as docs/guides/templates.md."""

    def link(found: re.Match[str]) -> str:
        target = posixpath.relpath(found[1], posixpath.dirname(page))
        return f"[{found[1]}]({target})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else re.sub(r"docs/([\w/]+\.md)", link, part) for part in parts)
