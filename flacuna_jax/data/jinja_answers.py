"""Which part of a rendered conversation carries loss. It is found in one of three ways, never by searching an answer:

1. The template says so by {% generation %} blocks.
2. The template only ever appends: an answer is what its message adds to the generation prompt before it.
3. Otherwise each message is marked at its end while the template runs. An answer begins behind what the generation
   prompt writes after the message before it, and ends behind the special token that follows its own mark. That holds
   for templates that write earlier messages differently once later ones are there, as those of reasoning models do.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from flacuna_jax.data.as_text import AS_TEXT
from flacuna_jax.data.jinja_program import (
    BEGIN,
    END,
    JinjaProgram,
    Message,
    as_messages,
    with_closing_marks,
    without_closing_marks,
)
from flacuna_jax.data.segments import TemplateRefusal, Tools, Turn
from flacuna_jax.data.special_tokens import Span, SpecialTokens

ADVICE = "mark what the assistant says with {% generation %}...{% endgeneration %}"


class Answer(NamedTuple):
    """Characters [start, end) of the rendered text carry the answer of turn `turn`."""

    start: int
    end: int
    turn: int


class Rendered(NamedTuple):
    text: str
    answers: list[Answer]


class _Unclear(Exception):
    """The rendered text does not tell which part of it is an answer."""


def render_with_answers(
    program: JinjaProgram,
    special: SpecialTokens,
    system: str,
    turns: Sequence[Turn],
    tools: Tools,
    marks_answers: bool,
) -> Rendered:
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
        if not conversation.is_prompt:
            raise TemplateRefusal(str(error)) from None
        rendered = Rendered(conversation.whole().replace(BEGIN, "").replace(END, ""), [])
    _require_expressed(rendered.text, conversation)
    return rendered._replace(answers=[answer for answer in rendered.answers if turns[answer.turn].says_something])


def _require_expressed(text: str, conversation: "_Conversation") -> None:
    """Raises TemplateRefusal if the template leaves out tools, calls, results, or the reasoning of the last answer."""
    for tool in conversation.tools:
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in text:
            raise TemplateRefusal(f"the template has no form for tools ({name!r} is left out); {AS_TEXT}")
    for number, (turn, message) in enumerate(
        zip(conversation.turns, conversation.messages[conversation.offset :], strict=True), 1
    ):
        for call in message.get("tool_calls") or ():
            name = call.get("function", call).get("name")
            if isinstance(name, str) and name not in text:
                raise TemplateRefusal(f"the template has no form for tool_calls (turn {number}); {AS_TEXT}")
        if turn.role == "tool" and message["content"].strip() not in text:
            raise TemplateRefusal(f"the template has no form for the result of a tool (turn {number}); {AS_TEXT}")
    for message in conversation.messages[-1:]:
        reasoning = message.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning.strip() not in text:
            raise TemplateRefusal(f"the template has no form for reasoning; {AS_TEXT}")


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

    def by_blocks(self) -> Rendered:
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
        return Rendered(text, [Answer(start, end, turn) for (start, end), turn in zip(blocks, owners, strict=True)])

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

    def by_prefix(self) -> Rendered:
        """Renders up to each answer, without it and with it; what it adds carries loss."""
        text = ""
        answers: list[Answer] = []
        for turn in self.answers:
            message = self.offset + turn
            prompt = self._extended(text, self.messages[:message], prompt=True)
            text = self._extended(prompt, self.messages[: message + 1], prompt=False)
            answers.append(Answer(len(prompt), self._end(text, len(prompt)), turn))
        if not self.answers or self.answers[-1] != len(self.turns) - 1:
            text = self._extended(text, self.messages, prompt=self.is_prompt)
        return Rendered(text, answers)

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
        spans = [span for _, span in self._spans(text, start)]
        if len(spans) > 1 and spans[-1].id is None and not spans[-1].text.strip():
            return len(text) - len(spans[-1].text)
        return len(text)

    def by_marks(self) -> Rendered:
        """Marks the end of each message while the template runs."""
        text = self.whole()
        clean, places = without_closing_marks(
            self.program.render(with_closing_marks(self.messages), self.tools, self.is_prompt)
        )
        if clean != text:
            raise _Unclear(f"the template changes what messages say, so answers cannot be told from prompts; {ADVICE}")
        lost = [turn for turn in self.answers if self.offset + turn not in places]
        if lost:
            raise _Unclear(f"the template leaves out what the assistant says in turn {lost[0] + 1}")
        answers: list[Answer] = []
        for turn in self.answers:
            start = self._start_of(text, places, turn)
            answers.append(Answer(start, self._end_behind(text, places[self.offset + turn], turn), turn))
        return Rendered(text, answers)

    def _spans(self, text: str, start: int) -> Iterator[tuple[int, Span]]:
        """The spans of the text behind `start`, each with where it ends."""
        for span in self.special.split(text[start:]):
            start += len(span.text)
            yield start, span

    def _start_of(self, text: str, places: Mapping[int, int], turn: int) -> int:
        """Where an answer begins: behind what the generation prompt writes after the message before it.

        Of a prompt that ends otherwise than the template writes an earlier answer (as with "<think>"), the part counts
        that they have in common, up to a mark or a newline.
        """
        before = self.offset + turn - 1
        prompt, in_prompt = without_closing_marks(
            self.program.render(with_closing_marks(self.messages[: before + 1]), self.tools, True)
            if before >= 0
            else ""
        )
        if before in places and before in in_prompt:
            lead, rest = prompt[in_prompt[before] :], text[places[before] :]
            common = _common(lead, rest)
            if common == len(lead):
                return places[before] + common
            ends = [end for end, span in self._spans(lead, 0) if span.id is not None and end <= common]
            ends += [match.end() for match in re.finditer(r"[\n>\]]", lead[:common])]
            if ends:
                return places[before] + max(ends)
        raise _Unclear(f"the template writes no mark before an answer; {ADVICE}")

    def _end_behind(self, text: str, place: int, turn: int) -> int:
        """The end of an answer whose message ends at `place`: behind the special token that closes it."""
        until = self.messages[: self.offset + turn + 1]
        alone, places = without_closing_marks(self.program.render(with_closing_marks(until), self.tools, False))
        closing = alone[places.get(self.offset + turn, len(alone)) :]
        common = _common(closing, text[place:])
        end = max((e for e, span in self._spans(text[: place + common], place) if span.id is not None), default=place)
        if end > place:
            return end
        # The last answer is closed otherwise than those before it.
        for following, span in self._spans(text, place):
            if span.id is not None:
                return following
            if span.text.strip():
                break
        if common == len(closing):
            return place + common
        line = text.rfind("\n", place, place + common)
        if line > place:
            return line
        raise _Unclear(f"the template writes no mark behind an answer; {ADVICE}")


def _common(one: str, other: str) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
