"""A conversation format given as a Jinja file, the kind that Hugging Face tokenizers carry as chat_template.

What carries loss is known by construction: either the template says so itself, by {% generation %} blocks, or it is
what an assistant's message adds to the generation prompt before it. BOS and EOS are stood in for by marks that no text
can hold while the template runs, so that a message which spells "</s>" stays text.
"""

import functools
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flacuna_jax.data.segments import Segment, Template, Turn, join_segments
from flacuna_jax.errors import UserError

_NONCE = secrets.token_hex(16)
_BOS, _EOS, _BEGIN, _END = (f"\ue000{_NONCE}{mark}\ue001" for mark in ("bos", "eos", "begin", "end"))
_MARKS = re.compile("|".join(map(re.escape, (_BOS, _EOS, _BEGIN, _END))))

Message = Mapping[str, str]


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012, Jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @staticmethod
    def _marked(caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    # A template that prints today's date would make another data set of every day.
    environment.globals["strftime_now"] = lambda format_: datetime(2000, 1, 1).strftime(format_)
    return environment


@functools.lru_cache(maxsize=16)
def load_jinja_template(path: Path) -> Template:
    """The template of a .jinja file.

    Raises UserError for a file that is missing, is not Jinja, or does not tell answers from prompts.
    """
    try:
        source = path.read_text(encoding="utf-8")
        compiled = _environment().from_string(source)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the template cannot be read ({error})") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not a Jinja template: {error.message}") from None

    marks_answers = "generation" in set(re.findall(r"{%-?\s*(\w+)", source))

    def layout(system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
        try:
            segments = (_marked if marks_answers else _by_prefix)(compiled, system, turns)
            yield from _with_spaces_in_answers(
                [segment for segment in segments if segment.kind != "text" or segment.text]
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{path}: the template fails: {error}") from None
        except _Unclear as error:
            raise UserError(f"{path}: {error}") from None

    template = Template(path.name, "", layout, (), source)
    _try_out(template)
    return template


def _try_out(template: Template) -> None:
    """Raises UserError now for what would fail with the first record."""
    two = (Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"), Turn("assistant", "four"))
    try:
        segments = join_segments(template.layout("", two))
    except ValueError as error:
        raise UserError(
            f"{template.name}: {error}; loss must begin and end at a space, a newline, BOS or EOS"
        ) from None
    supervised = "".join(segment.text for segment in segments if segment.supervised)
    if "two" not in supervised or "four" not in supervised or "one" in supervised:
        raise UserError(f"{template.name}: the template does not tell answers from prompts (loss on {supervised!r})")


class _Unclear(Exception):
    """The template's text does not tell which part of it is an answer."""


def _render(compiled: jinja2.Template, system: str, turns: Sequence[Turn], prompt: bool) -> str:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return compiled.render(messages=messages, bos_token=_BOS, eos_token=_EOS, add_generation_prompt=prompt)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # it is a program, and the user's
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error


def _by_prefix(compiled: jinja2.Template, system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    """Renders one message more at a time; what an answer adds to the prompt before it carries loss."""
    before = ""
    for index, turn in enumerate(turns):
        text = _render(compiled, system, turns[: index + 1], prompt=turn.role == "user")
        if not text.startswith(before):
            raise _Unclear(
                "a later message changes what the template wrote before, so that answers cannot be told from prompts; "
                "mark them with {% generation %}...{% endgeneration %}"
            )
        yield from _segments(text[len(before) :], turn.role == "assistant" and bool(turn.text), index)
        before = text


def _marked(compiled: jinja2.Template, system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    """Renders once; what stands in {% generation %} blocks, one for each answer, carries loss."""
    is_prompt = bool(turns) and turns[-1].role == "user"
    text = _render(compiled, system, turns, prompt=is_prompt)
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    blocks = text.count(_BEGIN)
    if blocks != len(answers):
        raise _Unclear(f"the template has {blocks} generation blocks for {len(answers)} answers")
    for number, part in enumerate(text.split(_BEGIN)):
        answer, end, rest = part.rpartition(_END)
        if number and not end:
            raise _Unclear("generation blocks lie in one another")
        if number:
            index = answers[number - 1]
            yield from _segments(answer, bool(turns[index].text), index)
        following = min(answers[number] - 1, len(turns) - 1) if number < len(answers) else len(turns) - 1
        yield from _segments(rest, False, following)


def _with_spaces_in_answers(segments: Sequence[Segment]) -> Iterator[Segment]:
    """A space that the template writes before an answer is the beginning of the answer's first token, to SentencePiece:
    it carries loss with it, and a prompt that waits for an answer ends before it."""
    held = ""
    for index, segment in enumerate(segments):
        text, held = held + segment.text, ""
        ends_prompt = segment.kind == "text" and not segment.supervised and re.search(r"(?<! ) $", text)
        is_last = index == len(segments) - 1
        if ends_prompt and (is_last or (segments[index + 1].kind == "text" and segments[index + 1].supervised)):
            text, held = text[:-1], " "
        yield segment._replace(text=text)


def _segments(text: str, supervised: bool, turn: int) -> Iterator[Segment]:
    start = 0
    for mark in _MARKS.finditer(text):
        yield Segment("text", text[start : mark.start()], supervised, turn)
        yield Segment("bos" if mark[0] == _BOS else "eos", "", supervised and mark[0] == _EOS, turn)
        start = mark.end()
    yield Segment("text", text[start:], supervised, turn)
