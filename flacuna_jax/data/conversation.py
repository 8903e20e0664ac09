"""Conversations, and the templates that convert them to segments, so that supervised spans are known by construction.

A template is a function from turns to segments (`segments.py`), bound to the special tokens of one tokenizer:
`layouts.py` has the built-in formats, `jinja_template.py` makes one from a chat template.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flacuna_jax.config.types import AUTO, CHECKPOINT, Examples
from flacuna_jax.data.as_text import written_as_text
from flacuna_jax.data.jinja_template import jinja_template, read_jinja_file
from flacuna_jax.data.layouts import NAMES, our_template, source_of
from flacuna_jax.data.segments import Layout, Role, Segment, Template, TemplateRefusal, Tools, Turn
from flacuna_jax.data.special_tokens import SpecialTokens
from flacuna_jax.errors import UserError

__all__ = [
    "NAMES",
    "Conversation",
    "Role",
    "Segment",
    "Template",
    "TemplateRefusal",
    "Tools",
    "Turn",
    "named_template",
    "render",
    "render_prompt",
    "render_text",
    "template_from_jinja",
    "template_source",
]


def named_template(
    name: str, special: SpecialTokens, *, tools_as_text: bool = False, variables: Mapping[str, Any] | None = None
) -> Template:
    """A built-in template, or that of a .jinja file, bound to the special tokens of one tokenizer.

    Args:
      name: One of `NAMES`, or a path that ends in .jinja.
      special: The tokenizer's special tokens.
      tools_as_text: Whether tools, calls, results and reasoning that the template does not support are written as text.
        Otherwise such conversations are rejected.
      variables: Passed to a .jinja file together with the messages.

    Raises:
      UserError: The name is invalid, or the file cannot be used as a template.
    """
    if name.endswith(".jinja"):
        sources = {"default": read_jinja_file(Path(name))}
        return template_from_jinja(sources, name, special, tools_as_text=tools_as_text, variables=variables)
    if name not in NAMES:
        known = (AUTO, CHECKPOINT, *NAMES)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"template {name!r} is not one of {', '.join(known)}, or a .jinja file{hint}")
    return our_template(name, special, tools_as_text)


def template_from_jinja(
    sources: Mapping[str, str],
    name: str,
    special: SpecialTokens,
    *,
    tools_as_text: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> Template:
    """Like `jinja_template`, but a text that a built-in template exported gives that built-in template."""
    ours = (our_template(known, special, tools_as_text) for known in NAMES)
    exported = next((template for template in ours if template.jinja == sources["default"]), None)
    if exported is not None:
        return exported
    template = jinja_template(sources, name, special, variables)
    return dataclasses.replace(template, layout=_or_as_text(template.layout)) if tools_as_text else template


def _or_as_text(layout: Layout) -> Layout:
    """A layout that writes content as text if the chat template does not support it."""

    def either(system: str, turns: Sequence[Turn], tools: Tools) -> Iterator[Segment]:
        try:
            return iter(list(layout(system, turns, tools)))
        except TemplateRefusal:
            return layout(*written_as_text(system, turns, tools), ())

    return either


def template_source(name: str) -> str:
    """The Jinja text of a template by name, not bound to a tokenizer. Raises UserError for an unreadable file."""
    return read_jinja_file(Path(name)) if name.endswith(".jinja") else source_of(name)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The conversation in a record.

    Attributes:
      turns: Messages in order, without a leading system message.
      system: Replaces the template's system text. None keeps that text.
      tools: JSON schemas of the functions that the assistant may call, in the form of transformers.
      raw: Whether the record is a text without roles: `turns` is one turn of the assistant with that text, no template
        is applied, and every token carries loss.
      rejected: In a pair, the turns with the rejected answer, and `turns` are those with the chosen one. None if it is
        not a pair.
      good: Label of a single answer. None if it has none.
    """

    id: str
    source: str
    turns: tuple[Turn, ...]
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    raw: bool = False
    rejected: tuple[Turn, ...] | None = None
    good: bool | None = None

    @property
    def examples(self) -> Examples:
        """The kind of example that it is."""
        return "pairs" if self.rejected is not None else "answers" if self.good is None else "labelled"

    @property
    def documents(self) -> tuple["Conversation", ...]:
        """The conversations that are tokenised: itself, or the two of a pair."""
        if self.rejected is None:
            return (self,)
        return tuple(dataclasses.replace(self, turns=turns, rejected=None) for turns in (self.turns, self.rejected))


def render(conversation: Conversation, template: Template) -> list[Segment]:
    """Segments of a conversation. They end with the generation prompt unless the last turn is the assistant's.

    Raises TemplateRefusal if the template does not support the conversation.
    """
    system = template.system if conversation.system is None else conversation.system
    return [s for s in template.layout(system, conversation.turns, conversation.tools) if s.text or s.token is not None]


def render_prompt(
    turns: Sequence[Turn], template: Template, system: str | None = None, tools: Tools = ()
) -> list[Segment]:
    """Segments of a generation prompt, from turns whose last one is not the assistant's."""
    if not turns or turns[-1].role == "assistant":
        raise ValueError("the last turn of a prompt must be of the user or of a tool")
    return render(Conversation("", "", tuple(turns), system, tuple(tools)), template)


def render_text(segments: Sequence[Segment]) -> str:
    """The whole text, with special tokens in the tokenizer's spelling."""
    return "".join(segment.text for segment in segments)
