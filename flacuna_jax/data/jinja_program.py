"""Runs a chat template as transformers does, and distinguishes the text of messages from the text of the template.

Before a template runs, every spelling of a special token in a message is replaced by a mark that no text can contain.
Therefore every special token in the rendered text was written by the template.
"""

import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flacuna_jax.data.segments import REASONING, TemplateRefusal, Tools, Turn
from flacuna_jax.data.special_tokens import SpecialTokens

Message = dict[str, Any]

_NONCE = secrets.token_hex(16)
BEGIN, END = (f"\ue000{_NONCE}{mark}\ue001" for mark in ("begin", "end"))
"""Marks that {% generation %} blocks write around their text."""
_GUARDED = re.compile(f"\ue000{_NONCE}g(\\d+)\ue001")
_CLOSING = re.compile(f"\ue000{_NONCE}c(\\d+)\ue001")

DATE = datetime(2000, 1, 1)
"""The fixed date that `strftime_now` writes; with today's date, the same records would give other tokens every day."""


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}, which enclose the assistant's answers."""

    tags = {"generation"}  # noqa: RUF012, Jinja's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @staticmethod
    def _marked(caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter of transformers; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """Raises jinja2.TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = DATE.strftime
    template = environment.from_string(source)
    template.globals = dict(
        template.globals
    )  # Jinja copies its ChainMap for every rendering, which takes a third of the time
    return template


def as_messages(system: str, turns: Sequence[Turn]) -> list[Message]:
    """Converts a conversation to the messages that transformers would pass to the template."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    return messages + [_message(turn) for turn in turns]


def _message(turn: Turn) -> Message:
    message = {"role": turn.role, "content": turn.text}
    for key, value in (turn.extra or {}).items():
        if value is not None:
            message[key] = value
    # Templates read reasoning from one of two keys; like transformers, set both.
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


class JinjaProgram:
    """A chat template (and its variant for conversations with tools, if there is one) with one tokenizer's tokens.

    Args:
      sources: Jinja by name: "default", and "tool_use" if the checkpoint has one.
      special: The tokenizer's special tokens.
      variables: Passed to the template together with the messages, for example enable_thinking.
      parts: Whether the content of messages is a list with one text part, as image processors expect.
    """

    def __init__(
        self, sources: Mapping[str, str], special: SpecialTokens, variables: Mapping[str, Any], parts: bool
    ) -> None:
        self._compiled = {name: compile_template(source) for name, source in sources.items()}
        self._special = special
        bos = {} if special.bos is None else {"bos_token": special.bos}
        self._variables = {**special.variables, **bos, "eos_token": special.eos, **variables}
        self._guards = {spelling: f"\ue000{_NONCE}g{i}\ue001" for i, spelling in enumerate(special.tokens)}
        self._spellings = tuple(special.tokens)
        self._parts = parts

    def guard(self, value: Any) -> Any:
        """Returns a message, or a part of one, in which no string spells a special token."""
        if isinstance(value, str):
            return self._special.pattern.sub(lambda match: self._guards[match[0]], value)
        if isinstance(value, Mapping):
            return {key: self.guard(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.guard(entry) for entry in value]
        return value

    def unguard(self, text: str) -> str:
        """Restores the original text of messages."""
        if _NONCE not in text:
            return text
        return _GUARDED.sub(lambda match: self._spellings[int(match[1])], text)

    def render(self, messages: Sequence[Message], tools: Tools, prompt: bool) -> str:
        """Renders guarded messages. Raises TemplateRefusal if the template fails."""
        if self._parts:
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        try:
            try:
                return self._run(messages, tools, prompt)
            except TypeError:
                if not any(one.get("tool_calls") for one in messages):
                    raise
                return self._run([_with_text_arguments(one) for one in messages], tools, prompt)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
            raise TemplateRefusal(f"the template rejects the conversation: {kind}{error}") from None

    def _run(self, messages: Sequence[Message], tools: Tools, prompt: bool) -> str:
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        return self._compiled[name].render(
            messages=messages,
            tools=list(tools) or None,
            documents=None,
            add_generation_prompt=prompt,
            **self._variables,
        )


def _with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text, which DeepSeek's template concatenates with strings."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    as_text = [
        {**call, "function": {**call["function"], "arguments": _to_json(call["function"].get("arguments"))}}
        for call in calls
    ]
    return {**message, "tool_calls": as_text}


def with_closing_marks(messages: Sequence[Message]) -> list[Message]:
    """Adds a mark to the end of each message's text, before trailing white space, which a template may strip."""
    return [_closed(message, index) for index, message in enumerate(messages)]


def _closed(message: Message, index: int) -> Message:
    mark = f"\ue000{_NONCE}c{index}\ue001"
    content = message.get("content")
    calls = message.get("tool_calls")
    if isinstance(content, str) and (content.strip() or (content and not calls)):
        return {**message, "content": _before_space(content, mark)}
    if calls:
        last = calls[-1]
        function = last.get("function", last)
        named = {**function, "name": f"{function.get('name', '')}{mark}"}
        return {**message, "tool_calls": [*calls[:-1], {**last, "function": named} if "function" in last else named]}
    return message


def probe(number: int) -> str:
    """A text to search for in the rendered text; it is unchanged if the template writes it as JSON."""
    return f"{_NONCE}p{number:08d}"


def with_probe(content: str, number: int) -> str:
    """Adds `probe` to the end of the content, before trailing white space, which a template may strip."""
    return _before_space(content, probe(number))


def _before_space(content: str, mark: str) -> str:
    kept = content.rstrip()
    return kept + mark + content[len(kept) :]


def without_closing_marks(text: str) -> tuple[str, dict[int, int]]:
    """Returns the text without its marks, and the position of each mark in it.

    For a mark that appears twice, the first position counts: a template may repeat the name of a called function before
    the function's result.
    """
    parts: list[str] = []
    places: dict[int, int] = {}
    start = length = 0
    for match in _CLOSING.finditer(text):
        parts.append(text[start : match.start()])
        length += len(parts[-1])
        places.setdefault(int(match[1]), length)
        start = match.end()
    return "".join(parts) + text[start:], places
