"""Conversation formats given as Jinja: the chat template of a checkpoint, or a file.

Which part of the rendered text carries loss is found in one of three ways, and never by searching for an answer:

1. The template says so by {% generation %} blocks.
2. The template only ever appends: an answer is what its message adds to the generation prompt before it.
3. Otherwise each message is marked at its end while the template runs. An answer reaches from the end of the header
   that the generation prompt writes to the special token after its mark. That holds for templates that write earlier
   messages differently once later ones are there, as those of reasoning models do.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from flacuna_jax.data.jinja_program import (
    BEGIN,
    DATE,
    END,
    JinjaProgram,
    Message,
    as_messages,
    compile_template,
    with_closing_marks,
    without_closing_marks,
)
from flacuna_jax.data.segments import Segment, Template, TemplateRefusal, Tools, Turn
from flacuna_jax.data.special_tokens import SpecialTokens
from flacuna_jax.errors import UserError

_ADVICE = "mark what the assistant says with {% generation %}...{% endgeneration %}"


class _Answer(NamedTuple):
    """Characters [start, end) of the rendered text carry the answer of turn `turn`."""

    start: int
    end: int
    turn: int


class _Rendered(NamedTuple):
    text: str
    answers: list[_Answer]


class _Unclear(Exception):
    """The rendered text does not tell which part of it is an answer."""


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
      UserError: The text is not Jinja, fails on a plain conversation, or does not tell answers from prompts.
    """
    for source in sources.values():
        try:
            compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}:{error.lineno}: not a Jinja template: {error.message}") from None
    program = JinjaProgram(sources, special, variables or {})
    marks_answers = {key: "generation" in re.findall(r"{%-?\s*(\w+)", source) for key, source in sources.items()}

    def layout(system: str, turns: Sequence[Turn], tools: Tools) -> Iterator[Segment]:
        marked = marks_answers["tool_use" if tools and "tool_use" in sources else "default"]
        rendered = _render(program, special, system, turns, tools, marked)
        return _with_spaces_in_answers(list(_segments(program, special, rendered)))

    notes: tuple[str, ...] = ()
    if any("strftime_now" in source for source in sources.values()):
        notes = (f"the template writes the date; it is {DATE:%d %B %Y} here, so that records stay the same every day",)
    ends, stop = _try_out(layout, name)
    return Template(name, "", layout, stop, ends, sources["default"], notes)


def _try_out(layout: Any, name: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """What ends an answer: special tokens, and text. Raises UserError now for what would fail with every record."""
    turns = (Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"), Turn("assistant", "four"))
    try:
        segments = list(layout("", turns, ()))
    except TemplateRefusal as error:
        raise UserError(f"{name}: {error}") from None
    supervised = "".join(segment.text for segment in segments if segment.supervised)
    if "two" not in supervised or "four" not in supervised or "one" in supervised or "three" in supervised:
        raise UserError(f"{name}: the template does not tell answers from prompts (loss on {supervised!r}); {_ADVICE}")
    answer = itertools.dropwhile(lambda segment: "two" not in segment.text, segments)
    tail = next(answer).text.partition("two")[2].strip()
    closing = next(answer, None)
    if not tail and closing is not None and closing.supervised and closing.token is not None:
        return (closing.token,), ()
    return (), (tail,) if tail else ()


def _render(
    program: JinjaProgram,
    special: SpecialTokens,
    system: str,
    turns: Sequence[Turn],
    tools: Tools,
    marks_answers: bool,
) -> _Rendered:
    messages = [program.guard(message) for message in as_messages(system, turns)]
    conversation = _Conversation(program, special, messages, program.guard(list(tools)), turns)
    try:
        if marks_answers:
            rendered = conversation.by_blocks()
        else:
            try:
                rendered = conversation.by_prefix()
            except _Unclear:
                rendered = conversation.by_marks()
    except _Unclear as error:
        raise TemplateRefusal(str(error)) from None
    kept = [answer for answer in rendered.answers if turns[answer.turn].trained and turns[answer.turn].says_something]
    return rendered._replace(answers=kept)


class _Conversation(NamedTuple):
    """One conversation on its way through a template. `messages` are those of `turns`, after a system message."""

    program: JinjaProgram
    special: SpecialTokens
    messages: list[Message]
    tools: Tools
    turns: Sequence[Turn]

    @property
    def offset(self) -> int:
        """Messages in front of the turns."""
        return len(self.messages) - len(self.turns)

    @property
    def answers(self) -> list[int]:
        """Turns in which the assistant says something."""
        return [i for i, turn in enumerate(self.turns) if turn.role == "assistant" and turn.says_something]

    @property
    def is_prompt(self) -> bool:
        return bool(self.turns) and self.turns[-1].role != "assistant"

    def whole(self) -> str:
        return self.program.render(self.messages, self.tools, self.is_prompt)

    def by_blocks(self) -> _Rendered:
        """What stands in {% generation %} blocks carries loss."""
        parts: list[str] = []
        blocks: list[tuple[int, int]] = []
        length = 0
        for number, part in enumerate(self.whole().split(BEGIN)):
            block, end, rest = part.partition(END)
            if bool(number) != bool(end) or END in rest:
                raise _Unclear("{% generation %} blocks are nested")
            if number:
                blocks.append((length, length + len(block)))
            parts += (block, rest)
            length += len(block) + len(rest)
        text = "".join(parts)
        blocks = [(start, end) for start, end in blocks if end > start]
        assistants = [index for index, turn in enumerate(self.turns) if turn.role == "assistant"]
        if len(blocks) == len(assistants):
            owners = assistants
        elif len(assistants) == 1:
            owners = assistants * len(blocks)
        else:
            owners = self._owners(text, blocks)
        return _Rendered(text, [_Answer(start, end, turn) for (start, end), turn in zip(blocks, owners, strict=True)])

    def _owners(self, text: str, blocks: Sequence[tuple[int, int]]) -> list[int]:
        """The answer that each block belongs to, where a template writes an answer in several."""
        marked = self.program.render(with_closing_marks(self.messages), self.tools, self.is_prompt)
        clean, places = without_closing_marks(marked.replace(BEGIN, "").replace(END, ""))
        if clean != text or any(self.offset + turn not in places for turn in self.answers):
            raise _Unclear("the template has several {% generation %} blocks per answer, and changes what messages say")
        owners: list[int] = []
        for start, _ in blocks:
            following = [message for message, place in places.items() if place >= start]
            message = min(following, key=lambda one: places[one], default=len(self.messages))
            turn = message - self.offset
            if turn not in self.answers:  # the block stands between an answer and the next message
                turn = max((answer for answer in self.answers if answer < turn), default=self.answers[0])
            owners.append(turn)
        return owners

    def by_prefix(self) -> _Rendered:
        """Renders up to each answer, without it and with it; what it adds carries loss."""
        text = ""
        answers: list[_Answer] = []
        for turn in self.answers:
            message = self.offset + turn
            prompt = self._extended(text, self.messages[:message], prompt=True)
            text = self._extended(prompt, self.messages[: message + 1], prompt=False)
            answers.append(_Answer(len(prompt), self._end(text, len(prompt)), turn))
        if not self.answers or self.answers[-1] != len(self.turns) - 1:
            text = self._extended(text, self.messages, prompt=self.is_prompt)
        return _Rendered(text, answers)

    def _extended(self, before: str, messages: Sequence[Message], prompt: bool) -> str:
        if not messages:
            return before  # most templates read messages[0]
        text = self.program.render(messages, self.tools, prompt)
        if not text.startswith(before):
            raise _Unclear("a later message changes what the template wrote before")
        return text

    def _end(self, text: str, start: int) -> int:
        """Where an answer ends that reaches to the end of `text`: white space behind its last special token is not
        generated."""
        end = start
        for span in self.special.split(text[start:]):
            end += len(span.text)
            last_is_space = span.id is None and not span.text.strip()
            if last_is_space and end == len(text) and end - len(span.text) > start:
                return end - len(span.text)
        return end

    def by_marks(self) -> _Rendered:
        """Marks the end of each message while the template runs."""
        text = self.whole()
        clean, places = without_closing_marks(
            self.program.render(with_closing_marks(self.messages), self.tools, self.is_prompt)
        )
        if clean != text or any(self.offset + turn not in places for turn in self.answers):
            raise _Unclear(f"the template changes what messages say, so answers cannot be told from prompts; {_ADVICE}")
        header = self._header()
        answers: list[_Answer] = []
        behind = 0
        for turn in self.answers:
            place = places[self.offset + turn]
            start = self._start(text, header, behind, place)
            behind = self._end_behind(text, place, turn)
            answers.append(_Answer(start, behind, turn))
        return _Rendered(text, answers)

    def _header(self) -> str:
        """What the generation prompt writes before an answer."""
        before = self.messages[: self.offset + self.answers[0]] if self.answers else self.messages
        if not before:
            return ""
        without, with_header = (self.program.render(before, self.tools, prompt) for prompt in (False, True))
        return with_header[len(without) :] if with_header.startswith(without) else ""

    def _start(self, text: str, header: str, behind: int, place: int) -> int:
        """Behind the header, or the part of it that the template writes in this place; else behind a special token."""
        cuts = [len(header), *(match.end() for match in re.finditer(r"\n", header))]
        for cut in sorted({cut for cut in cuts if cut}, reverse=True):
            found = text.rfind(header[:cut], behind, place)
            if found >= 0:
                return found + cut
        start = position = behind
        for span in self.special.split(text[behind:place]):
            position += len(span.text)
            if span.id is not None:
                start = position
        if start == behind:
            raise _Unclear(f"the template writes no mark before an answer; {_ADVICE}")
        return start

    def _end_behind(self, text: str, place: int, turn: int) -> int:
        """The end of an answer whose message ends at `place`: behind the special token that closes it."""
        until = self.messages[: self.offset + turn + 1]
        alone, places = without_closing_marks(self.program.render(with_closing_marks(until), self.tools, False))
        closing = alone[places.get(self.offset + turn, len(alone)) :]
        pairs = zip(closing, text[place:], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        end = position = place
        for span in self.special.split(text[place : place + common]):
            position += len(span.text)
            if span.id is not None:
                end = position
        if end > place:
            return end
        # The last answer is closed otherwise than those before it.
        for span in self.special.split(text[place:]):
            if span.id is not None:
                return end + len(span.text)
            if span.text.strip():
                break
            end += len(span.text)
        if closing and common == len(closing):
            return place + common
        raise _Unclear(f"the template writes no mark behind an answer; {_ADVICE}")


def _segments(program: JinjaProgram, special: SpecialTokens, rendered: _Rendered) -> Iterator[Segment]:
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


def _with_spaces_in_answers(segments: Sequence[Segment]) -> Iterator[Segment]:
    """A space that the template writes before an answer is the beginning of the answer's first token: it carries loss
    with the answer, and a prompt that waits for an answer ends before it."""
    held = ""
    for index, segment in enumerate(segments):
        text, held = held + segment.text, ""
        ends_prompt = segment.token is None and not segment.supervised and re.search(r"(?<! ) $", text)
        following = segments[index + 1] if index + 1 < len(segments) else None
        if ends_prompt and (following is None or (following.token is None and following.supervised)):
            text, held = text[:-1], " "
        if text:
            yield segment._replace(text=text)
