"""Segments: what a conversation is made of before it becomes ids.

A segment is a special token or a text, together with the answer to "does this carry loss?". Ids are made segment by
segment, so no message text can become a special token, and no mask is found by searching for a response string.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from flacuna_jax.data.special_tokens import SpecialTokens

Role = Literal["system", "developer", "user", "assistant", "tool"]
Tools = Sequence[Mapping[str, Any]]


class TemplateRefusal(ValueError):
    """A template has no form for a conversation. The message says what it cannot express."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
      trained: Whether an assistant's turn carries loss. Other roles never do.
      extra: The other keys of the message, which are passed to the template as transformers passes them: tool_calls,
        tool_call_id, name, reasoning_content, thinking. None if there are none.
    """

    role: Role
    text: str
    trained: bool = True
    extra: Mapping[str, Any] | None = None

    @property
    def says_something(self) -> bool:
        """Whether the turn has text, reasoning or tool calls."""
        return bool(self.text) or (self.extra is not None and any(self.extra.get(key) for key in ANSWER_KEYS))


REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of `Turn.extra` that hold the reasoning before an answer, in the order in which they are looked for."""
ANSWER_KEYS = ("tool_calls", *REASONING)
"""Keys of `Turn.extra` that an assistant produces, besides its text."""


class Segment(NamedTuple):
    """A text, or a special token with its id.

    Attributes:
      text: For a special token, how it is spelled in the rendered text.
      token: Its id. None for text.
      supervised: Whether it is what the assistant says, which carries loss unless its turn is not trained.
      turn: Index of the turn that it ends in; -1 before the first.
    """

    text: str
    token: int | None
    supervised: bool
    turn: int


Layout = Callable[[str, Sequence[Turn], Tools], Iterator[Segment]]
"""(system text, turns, tools) to segments. Raises TemplateRefusal for what the template has no form for."""


@dataclass(frozen=True)
class Template:
    """A conversation format, bound to the special tokens of one tokenizer.

    `layout` yields the segments; after a user's or a tool's turn it opens the assistant's, so the same function gives
    training conversations (which end with the assistant) and generation prompts (which do not).

    Attributes:
      system: The system text of a conversation that brings none.
      stop_strings: Text that ends an answer in generation, besides the tokens of `ends`.
      ends: Ids of the special tokens that end an answer.
      jinja: The same format for Hugging Face's `apply_chat_template`.
      notes: What a user should know about this template with this tokenizer, a line each.
      untrainable: Why no conversation can be trained on with this template, though prompts can be made. None if it can.
    """

    name: str
    system: str
    layout: Layout
    stop_strings: tuple[str, ...]
    ends: tuple[int, ...]
    jinja: str
    notes: tuple[str, ...] = ()
    untrainable: str | None = None


class Writer:
    """Makes segments for a layout with the tokens of one tokenizer."""

    def __init__(self, special: SpecialTokens) -> None:
        self._special = special

    def bos(self, turn: int) -> Iterator[Segment]:
        """BOS; nothing if the tokenizer has none."""
        if self._special.bos is not None:
            yield self._token(self._special.bos, False, turn)

    def eos(self, supervised: bool, turn: int) -> Segment:
        return self._token(self._special.eos, supervised, turn)

    def owns(self, mark: str) -> bool:
        return mark in self._special.tokens

    def mark(self, mark: str, supervised: bool, turn: int) -> Segment:
        """A mark of the template: a special token if the tokenizer has it, text otherwise."""
        return self._token(mark, supervised, turn) if self.owns(mark) else text(mark, supervised, turn)

    def _token(self, spelling: str, supervised: bool, turn: int) -> Segment:
        return Segment(spelling, self._special.tokens[spelling].id, supervised, turn)


def text(content: str, supervised: bool, turn: int) -> Segment:
    return Segment(content, None, supervised, turn)


def join_segments(segments: Iterable[Segment], keep_spaces: bool) -> list[Segment]:
    """Joins neighbouring texts that carry the same loss, so that each is encoded in one piece.

    Args:
      segments: As a layout yields them.
      keep_spaces: Whether texts stay apart where the second begins with a space and the first does not end with one.
        LLaMA's SentencePiece vocabulary has no piece with a space behind another character, so no merge crosses such
        a point, and a system text that many conversations share is then encoded once.
    """
    joined: list[Segment] = []
    for segment in segments:
        if segment.token is None and not segment.text:
            continue
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.token is None
            and segment.token is None
            and last.supervised == segment.supervised
            and not (keep_spaces and segment.text.startswith(" ") and not last.text.endswith(" "))
        ):
            joined[-1] = segment._replace(text=last.text + segment.text)  # with its turn
        else:
            joined.append(segment)
    return joined
