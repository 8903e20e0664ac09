"""Conversation formats given as Jinja: the chat template of a checkpoint, or a file."""

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
    """The text of a template file. Raises UserError if it cannot be read."""
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
      name: Where the text comes from, for messages.
      special: The special tokens of the tokenizer that will encode it.
      variables: Passed to the template beside the messages.

    Raises:
      UserError: The text is not Jinja.
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
    if template.untrainable is not None:  # the templates of models that see images may need messages in parts
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
        notes = (f"the template writes the date; it is {DATE:%d %B %Y} here, so that records stay the same every day",)
    template = Template(name, "", layout, (), (), sources["default"], notes)
    try:
        ends, stop = _try_out(layout)
    except TemplateRefusal as error:
        return dataclasses.replace(template, untrainable=f"{name}: {error}")
    return dataclasses.replace(template, ends=ends, stop_strings=stop)


def _try_out(layout: Layout) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """What ends an answer: special tokens, and text. Raises TemplateRefusal for what would fail with every record."""
    turns = (Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"), Turn("assistant", "four"))
    segments = list(layout("", turns, ()))
    supervised = "".join(segment.text for segment in segments if segment.supervised)
    if "two" not in supervised or "four" not in supervised or "one" in supervised or "three" in supervised:
        raise TemplateRefusal(f"the template does not tell answers from prompts (loss on {supervised!r}); {ADVICE}")
    answer = itertools.dropwhile(lambda segment: "two" not in segment.text, segments)
    tail = next(answer).text.partition("two")[2].strip()
    closing = next(answer, None)
    if not tail and closing is not None and closing.supervised and closing.token is not None:
        return (closing.token,), ()
    return (), (tail,) if tail else ()


def _segments(program: JinjaProgram, special: SpecialTokens, rendered: Rendered) -> Iterator[Segment]:
    """Cuts the text at special tokens and where answers begin and end."""
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
    """A space that the template writes before an answer is the beginning of the answer's first token: it carries loss
    with the answer, and a prompt that waits for an answer ends before it."""
    held = ""
    for index, segment in enumerate(segments):
        text, held = held + segment.text, ""
        if segment.token is None and not segment.supervised and text.endswith(" ") and not text.endswith("  "):
            following = segments[index + 1] if index + 1 < len(segments) else None
            if is_prompt if following is None else following.token is None and following.supervised:
                text, held = text[:-1], " "
        if text:
            yield segment if text == segment.text else segment._replace(text=text)
