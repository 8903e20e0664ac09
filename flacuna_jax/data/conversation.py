"""Conversations, and the templates that turn them into text with the supervised spans known by construction.

A template is a function from turns to segments (`segments.py`); `layouts.py` has those that come with the project, and
`jinja_template.py` makes one of a file.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flacuna_jax.data.jinja_template import load_jinja_template
from flacuna_jax.data.layouts import LAYOUTS
from flacuna_jax.data.segments import Layout, Role, Segment, Template, Turn, join_segments
from flacuna_jax.errors import UserError

__all__ = [
    "TEMPLATES",
    "Conversation",
    "Layout",
    "Role",
    "Segment",
    "Template",
    "Turn",
    "join_segments",
    "named_template",
    "render",
    "render_prompt",
    "render_text",
]


class _Templates(Mapping[str, Template]):
    """Ours by name. A name that ends in .jinja is a file to make one of (UserError where that cannot be)."""

    _ours: Mapping[str, Template] = MappingProxyType({template.name: template for template in LAYOUTS})

    def __getitem__(self, name: str) -> Template:
        return load_jinja_template(Path(name)) if name.endswith(".jinja") else self._ours[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ours)

    def __len__(self) -> int:
        return len(self._ours)


TEMPLATES: Mapping[str, Template] = _Templates()


def named_template(name: str) -> Template:
    """One of ours, or that of a .jinja file. Raises UserError for a name of neither."""
    if not name.endswith(".jinja") and name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"template {name!r} is none of {', '.join(TEMPLATES)}, nor a .jinja file{hint}")
    return TEMPLATES[name]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as a record gives it.

    Attributes:
      turns: Messages in order, without a system message that stands first.
      system: Replaces the template's system text. None keeps that text.
      tools: JSON schemas of the functions that the assistant may call, as transformers takes them.
    """

    id: str
    source: str
    turns: tuple[Turn, ...]
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


def render(conversation: Conversation, template: Template) -> list[Segment]:
    """Segments of a conversation; ends ready for the answer if the last turn is a user's."""
    system = template.system if conversation.system is None else conversation.system
    return join_segments(template.layout(system, conversation.turns))


def render_prompt(turns: Sequence[Turn], template: Template, system: str | None = None) -> list[Segment]:
    """Segments of a generation prompt, from turns that end with a user's. Nothing follows "ASSISTANT:"."""
    if not turns or turns[-1].role != "user":
        raise ValueError("a prompt ends with a user's turn")
    return join_segments(template.layout(template.system if system is None else system, turns))


def render_text(segments: Sequence[Segment], bos: str = "<s>", eos: str = "</s>") -> str:
    """What a person (or an engine that tokenises whole strings) sees."""
    special = {"bos": bos, "eos": eos}
    return "".join(segment.text if segment.kind == "text" else special[segment.kind] for segment in segments)
