"""Finds the parts of a rendered conversation that carry loss, in one of three ways. None of them searches for the text
of an answer.

1. The template marks them with {% generation %} blocks.
2. Each message only appends text: an answer is the text that its message adds to the generation prompt before it.
3. Otherwise each message gets a mark at its end while the template runs. An answer begins after the text that the
   generation prompt adds to the previous message, and ends after the special token that follows its own mark. This
   also works for templates that write earlier messages differently once there are later ones, such as those of
   reasoning models.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flacuna_jax.data.as_text import AS_TEXT
from flacuna_jax.data.jinja_program import (
    BEGIN,
    END,
    JinjaProgram,
    Message,
    as_messages,
    probe,
    with_closing_marks,
    with_probe,
    without_closing_marks,
)
from flacuna_jax.data.segments import REASONING, TemplateRefusal, Tools, Turn
from flacuna_jax.data.special_tokens import Span, SpecialTokens

ADVICE = "enclose the assistant's answers in {% generation %}...{% endgeneration %}"

FEW_ANSWERS = 3
"""With fewer answers, a conversation is rendered once or twice for each answer."""


class Answer(NamedTuple):
    """Characters [start, end) of the rendered text carry the answer of turn `turn`."""

    start: int
    end: int
    turn: int


class Rendered(NamedTuple):
    text: str
    answers: list[Answer]


class _Unclear(Exception):
    """The answers cannot be located in the rendered text."""


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
            rendered = conversation.by_kinds() or conversation.by_prefix_or_marks()
    except _Unclear as error:
        if not conversation.is_prompt:
            _require_expressed(conversation)  # gives a more specific reason, if it applies
            raise TemplateRefusal(str(error)) from None
        rendered = Rendered(conversation.whole().replace(BEGIN, "").replace(END, ""), [])
    _require_expressed(conversation)
    return rendered._replace(answers=[answer for answer in rendered.answers if turns[answer.turn].says_something])


def _require_expressed(conversation: "_Conversation") -> None:
    """Raises TemplateRefusal if the template omits tools, calls, results, or the reasoning of the last answer.

    To test this, each of them gets a probe. The names of functions prove nothing, since a question may contain them.
    """
    if not conversation.tools and all(turn.extra is None and turn.role != "tool" for turn in conversation.turns):
        return
    probed = _Probed()
    tools = [probed.function(tool, "tools", " ({name!r} is omitted)") for tool in conversation.tools]
    messages = list(conversation.messages)
    for index, turn in enumerate(conversation.turns, conversation.offset):
        message = dict(messages[index])
        where = f" (turn {index - conversation.offset + 1})"
        if message.get("tool_calls"):
            message["tool_calls"] = [probed.function(call, "tool_calls", where) for call in message["tool_calls"]]
        if turn.role == "tool" and message["content"].strip():
            message["content"] = probed.text(message["content"], f"the result of a tool{where}")
        messages[index] = message
    last = messages[-1] if messages else {}
    if isinstance(last.get("reasoning_content"), str):
        reasoning = probed.text(last["reasoning_content"], "reasoning")
        messages[-1] = {**last, **{key: reasoning for key in REASONING if key in last}}
    if not probed.missing:
        return
    text = conversation.program.render(messages, tools, conversation.is_prompt)
    left_out = next((what for number, what in enumerate(probed.missing) if probe(number) not in text), None)
    if left_out is not None:
        raise TemplateRefusal(f"the template does not support {left_out}; {AS_TEXT}")


class _Probed:
    """Inserts probes into parts of a conversation; `missing` describes the part that an absent probe belongs to."""

    def __init__(self) -> None:
        self.missing: list[str] = []

    def text(self, content: str, what: str) -> str:
        self.missing.append(what)
        return with_probe(content, len(self.missing) - 1)

    def function(self, entry: Mapping[str, Any], what: str, where: str) -> Message:
        function = entry.get("function", entry)
        name = function.get("name")
        if not isinstance(name, str):
            return dict(entry)
        named = {**function, "name": self.text(name, what + where.format(name=name))}
        return {**entry, "function": named} if "function" in entry else named


_Known = dict[tuple[object, ...], str]
"""The text that a template writes after a message that is the last one, by the kind of the message."""


class _Conversation(NamedTuple):
    """One conversation with its template. `messages` are those of `turns`, after a system message if there is one."""

    program: JinjaProgram
    special: SpecialTokens
    messages: list[Message]
    tools: Tools
    turns: Sequence[Turn]

    @property
    def offset(self) -> int:
        """The number of messages before the turns."""
        return len(self.messages) - len(self.turns)

    @property
    def answers(self) -> list[int]:
        """Indices of the turns in which the assistant says something."""
        return [i for i, turn in enumerate(self.turns) if turn.role == "assistant" and turn.says_something]

    @property
    def uses_tools(self) -> bool:
        return any(message["role"] == "tool" or "tool_calls" in message for message in self.messages)

    @property
    def is_prompt(self) -> bool:
        return bool(self.turns) and self.turns[-1].role != "assistant"

    def whole(self) -> str:
        return self.program.render(self.messages, self.tools, self.is_prompt)

    def marked(self) -> tuple[str, dict[int, int]]:
        """The whole text, and the position of each message's end."""
        return without_closing_marks(self.program.render(with_closing_marks(self.messages), self.tools, self.is_prompt))

    def by_blocks(self) -> Rendered:
        """Finds the answers in {% generation %} blocks."""
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
        """The answer that each block belongs to, for a template that writes an answer in several blocks."""
        marked = self.program.render(with_closing_marks(self.messages), self.tools, self.is_prompt)
        clean, places = without_closing_marks(marked.replace(BEGIN, "").replace(END, ""))
        if clean != text or any(self.offset + turn not in places for turn in self.answers):
            raise _Unclear(
                "the template has several {% generation %} blocks per answer, and changes the text of messages"
            )
        owners: list[int] = []
        for start, _ in blocks:
            following = [message for message, place in places.items() if place >= start]
            message = min(following, key=lambda one: places[one], default=len(self.messages))
            turn = message - self.offset
            if turn not in self.answers:  # the block is between an answer and the next message
                turn = max((answer for answer in self.answers if answer < turn), default=self.answers[0])
            owners.append(turn)
        return owners

    def by_kinds(self) -> Rendered | None:
        """The result of `by_prefix_or_marks` with few renderings, for a conversation of many plain answers.

        The conversation is rendered once as a whole, and once up to the first message of each kind (see
        `_written_behind`). Returns None if there are few answers, if tools are used, or if the template does not write
        each kind the same everywhere.
        """
        if len(self.answers) < FEW_ANSWERS or self.uses_tools:
            return None
        text = self.whole()
        clean, places = self.marked()
        if clean != text:
            return None
        known: _Known = {}
        answers: list[Answer] = []
        for turn in self.answers:
            message = self.offset + turn
            if message not in places or message - 1 not in places:
                return None
            lead, closing = (
                self._written_behind(index, prompt, known) for index, prompt in ((message - 1, True), (message, False))
            )
            if lead is None or not text.startswith(lead, places[message - 1]):
                return None
            if closing is None or not text.startswith(closing, places[message]):
                return None
            start = places[message - 1] + len(lead)
            answers.append(Answer(start, self._end(text[: places[message] + len(closing)], start), turn))
        return Rendered(text, answers)

    def by_prefix_or_marks(self) -> Rendered:
        try:
            return self.by_prefix()
        except _Unclear:
            return self.by_marks()

    def by_prefix(self) -> Rendered:
        """Renders the conversation up to each answer, without it and with it; the added text carries loss."""
        text = ""
        answers: list[Answer] = []
        answered = self.answers
        for turn in answered:
            message = self.offset + turn
            prompt = self._extended(text, self.messages[:message], prompt=True)
            text = self._extended(prompt, self.messages[: message + 1], prompt=False)
            answers.append(Answer(len(prompt), self._end(text, len(prompt)), turn))
        if not answered or answered[-1] != len(self.turns) - 1:
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
        """The end of an answer that extends to the end of `text`, without the white space after its last special token,
        which is not generated."""
        marks = list(self.special.pattern.finditer(text, start))
        if not marks or text[marks[-1].end() :].strip() or self.special.tokens[marks[-1][0]].rstrip:
            return len(text)
        return marks[-1].end()

    def by_marks(self) -> Rendered:
        """Marks the end of each message while the template runs."""
        text = self.whole()
        clean, places = self.marked()
        if clean != text:
            raise _Unclear(f"the template changes the text of messages, so answers cannot be located; {ADVICE}")
        lost = [turn for turn in self.answers if self.offset + turn not in places]
        if lost:
            raise _Unclear(f"the template omits the assistant's text in turn {lost[0] + 1}")
        answers: list[Answer] = []
        known: _Known | None = None if self.uses_tools else {}
        for turn in self.answers:
            start = self._start_of(text, places, turn, known)
            end = self._end_behind(text, places[self.offset + turn], turn, known)
            inside = [message - self.offset + 1 for message, place in places.items() if start < place <= end]
            others = [other for other in inside if other != turn + 1]
            if others:
                raise _Unclear(f"the template writes turn {others[0]} inside the answer of turn {turn + 1}; {ADVICE}")
            answers.append(Answer(start, end, turn))
        return Rendered(text, answers)

    def _spans(self, text: str, start: int) -> Iterator[tuple[int, Span]]:
        """The spans of the text after `start`, each with the position of its end."""
        for span in self.special.split(text[start:]):
            start += len(span.text)
            yield start, span

    def _start_of(self, text: str, places: Mapping[int, int], turn: int, known: _Known | None) -> int:
        """The start of an answer: after the text that the generation prompt adds to the previous message.

        If the template writes an earlier answer differently from the generation prompt (for example without "<think>"),
        only their common prefix counts, up to a mark or a newline.
        """
        before = self.offset + turn - 1
        lead = self._written_behind(before, True, known) if before in places else None
        if lead is not None:
            common = _common(lead, text[places[before] : places[before] + len(lead)])
            if common == len(lead):
                return places[before] + common
            ends = [end for end, span in self._spans(lead, 0) if span.id is not None and end <= common]
            ends += [match.end() for match in re.finditer(r"[\n>\]]", lead[:common])]
            if ends:
                return places[before] + max(ends)
        raise _Unclear(f"the template writes no marker before an answer; {ADVICE}")

    def _written_behind(self, message: int, prompt: bool, known: _Known | None) -> str | None:
        """The text that the template writes after a message that is the last one; None if it omits the message's text.

        With `known`, one rendering serves all messages that have the same role and keys and end in the same white
        space, except the first turn. Without it, a conversation of n messages needs 2 n renderings.
        """
        one = self.messages[message]
        content = str(one["content"])
        key = (prompt, frozenset(one), one["role"], message > self.offset, content[len(content.rstrip()) :])
        if known is not None and key in known:
            return known[key]
        until = with_closing_marks(self.messages[: message + 1])
        text, places = without_closing_marks(self.program.render(until, self.tools, prompt))
        if message not in places:
            return None
        written = text[places[message] :]
        if known is not None:
            known[key] = written
        return written

    def _end_behind(self, text: str, place: int, turn: int, known: _Known | None) -> int:
        """The end of an answer whose message ends at `place`: after the special token that closes it."""
        closing = self._written_behind(self.offset + turn, False, known) or ""
        common = _common(closing, text[place : place + len(closing)])
        end = max((e for e, span in self._spans(text[: place + common], place) if span.id is not None), default=place)
        if end > place:
            return end
        # The template closes the last answer differently from earlier ones.
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
        raise _Unclear(f"the template writes no marker after an answer; {ADVICE}")


def _common(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
