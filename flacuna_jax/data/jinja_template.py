"""Conversation formats written in Jinja: the chat template of a checkpoint, or a file."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from flacuna_jax.data.jinja_answers import ADVICE, Rendered, render_with_answers
from flacuna_jax.data.jinja_program import DATE, JinjaProgram, compile_template
from flacuna_jax.data.segments import Layout, Segment, Template, TemplateRefusal, Tools, Turn
from flacuna_jax.data.special_tokens import SpecialTokens
from flacuna_jax.errors import UserError


def read_jinja_file(path: Path) -> str:
    """Reads a template file. Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the template cannot be read ({error})") from None


def jinja_template(
    sources: Mapping[str, str], name: str, special: SpecialTokens, variables: Mapping[str, Any] | None = None
) -> Template:
    """A template from Jinja text.

    Args:
      sources: Jinja by name: "default", and "tool_use" for conversations with tools if it differs.
      name: Origin of the text, for messages.
      special: The special tokens of the tokenizer that will encode the conversations.
      variables: Passed to the template together with the messages.

    Raises:
      UserError: The text is not valid Jinja.
    """
    for source in sources.values():
        try:
            compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}:{error.lineno}: not a Jinja template: {error.message}") from None
    made = (
        _made(sources, name, special, JinjaProgram(sources, special, variables or {}, parts)) for parts in (False, True)
    )
    template = next(made)
    if template.untrainable is not None:  # templates of models for images may need messages in parts
        return next((other for other in made if other.untrainable is None), template)
    return template


def _made(sources: Mapping[str, str], name: str, special: SpecialTokens, program: JinjaProgram) -> Template:
    marks_answers = {key: "generation" in re.findall(r"{%-?\s*(\w+)", source) for key, source in sources.items()}

    def layout(system: str, turns: Sequence[Turn], tools: Tools) -> Iterator[Segment]:
        marked = marks_answers["tool_use" if tools and "tool_use" in sources else "default"]
        rendered = render_with_answers(program, special, system, turns, tools, marked)
        is_prompt = bool(turns) and turns[-1].role != "assistant"
        return _with_spaces_in_answers(list(_segments(program, special, rendered)), is_prompt)

    notes: tuple[str, ...] = ()
    if any("strftime_now" in source for source in sources.values()):
        notes = (f"the template writes the current date; it is fixed to {DATE:%d %B %Y} to keep the data the same",)
    template = Template(name, "", layout, (), (), sources["default"], notes)
    try:
        ends, stop = _try_out(layout)
    except TemplateRefusal as error:
        return dataclasses.replace(template, untrainable=f"{name}: {error}")
    return dataclasses.replace(template, ends=ends, stop_strings=stop)


def _try_out(layout: Layout) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns the special tokens and the text that end an answer. Raises TemplateRefusal if every record would fail."""
    turns = (Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"), Turn("assistant", "four"))
    segments = list(layout("", turns, ()))
    supervised = "".join(segment.text for segment in segments if segment.supervised)
    if "two" not in supervised or "four" not in supervised or "one" in supervised or "three" in supervised:
        raise TemplateRefusal(
            f"answers cannot be separated from prompts in the template (loss on {supervised!r}); {ADVICE}"
        )
    answer = itertools.dropwhile(lambda segment: "two" not in segment.text, segments)
    tail = next(answer).text.partition("two")[2].strip()
    closing = next(answer, None)
    if not tail and closing is not None and closing.supervised and closing.token is not None:
        return (closing.token,), ()
    return (), (tail,) if tail else ()


def _segments(program: JinjaProgram, special: SpecialTokens, rendered: Rendered) -> Iterator[Segment]:
    """Splits the text at special tokens and at the start and end of answers."""
    answers = iter(sorted(rendered.answers))
    answer = next(answers, None)
    turn = 0
    position = 0
    for span in special.split(rendered.text):
        end = position + len(span.text)
        while position < end:
            while answer is not None and answer.end <= position:
                turn, answer = answer.turn, next(answers, None)
            inside = answer is not None and answer.start <= position
            if answer is not None and inside:
                turn = answer.turn
            if span.id is not None:
                yield Segment(program.unguard(span.text), span.id, inside, turn)
                position = end
                continue
            stop = end if answer is None else min(end, answer.end if inside else answer.start)
            part = rendered.text[position:stop]
            yield Segment(program.unguard(part), None, inside, turn)
            position = stop


def _with_spaces_in_answers(segments: Sequence[Segment], is_prompt: bool) -> Iterator[Segment]:
    """Moves a space that the template writes before an answer into the answer, because it is part of the answer's first
    token: it carries loss with the answer, and a generation prompt ends before it."""
    held = ""
    for index, segment in enumerate(segments):
        text, held = held + segment.text, ""
        if segment.token is None and not segment.supervised and text.endswith(" ") and not text.endswith("  "):
            following = segments[index + 1] if index + 1 < len(segments) else None
            if is_prompt if following is None else following.token is None and following.supervised:
                text, held = text[:-1], " "
        if text:
            yield segment if text == segment.text else segment._replace(text=text)
