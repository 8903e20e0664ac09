"""Segments: the parts of a conversation before tokenisation.

A segment is a special token or a text, with a flag whether it carries loss. Each segment is tokenised separately, so no
message text can become a special token, and no mask is found by searching for a response string.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from flacuna_jax.data.special_tokens import SpecialTokens

Role = Literal["system", "developer", "user", "assistant", "tool"]
Tools = Sequence[Mapping[str, Any]]


class TemplateRefusal(ValueError):
    """A template does not support a conversation. The message names the part that it does not support."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
      trained: Whether an assistant's turn carries loss. Turns of other roles never do.
      extra: The other keys of the message, which are passed to the template as in transformers: tool_calls,
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
"""Keys of `Turn.extra` for the reasoning before an answer, in order of precedence."""
ANSWER_KEYS = ("tool_calls", *REASONING)
"""Keys of `Turn.extra` that the assistant produces in addition to its text."""


class Segment(NamedTuple):
    """A text, or a special token with its id.

    Attributes:
      text: The text; for a special token, its spelling in the rendered text.
      token: Its id. None for text.
      supervised: Whether it is part of an answer, which carries loss unless its turn is not trained.
      turn: Index of the turn that it ends in; -1 before the first turn.
    """

    text: str
    token: int | None
    supervised: bool
    turn: int


Layout = Callable[[str, Sequence[Turn], Tools], Iterator[Segment]]
"""Maps (system text, turns, tools) to segments. Raises TemplateRefusal for content that is not supported."""


@dataclass(frozen=True)
class Template:
    """A conversation format, bound to the special tokens of one tokenizer.

    `layout` yields the segments. After a last turn of the user or of a tool it adds the generation prompt, so the same
    function gives training conversations (which end with the assistant) and generation prompts (which do not).

    Attributes:
      system: The system text of conversations without one.
      stop_strings: Texts that end an answer in generation, in addition to the tokens of `ends`.
      ends: Ids of the special tokens that end an answer.
      jinja: The same format for Hugging Face's `apply_chat_template`.
      notes: Warnings for users about this template with this tokenizer, a line each.
      untrainable: Why this template supports prompts but no training conversations. None if it supports both.
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
        """Yields BOS, or nothing if the tokenizer has none."""
        if self._special.bos is not None:
            yield self._token(self._special.bos, False, turn)

    def eos(self, supervised: bool, turn: int) -> Segment:
        return self._token(self._special.eos, supervised, turn)

    def owns(self, mark: str) -> bool:
        return mark in self._special.tokens

    def mark(self, mark: str, supervised: bool, turn: int) -> Segment:
        """A marker of the template: a special token if the tokenizer has it, otherwise text."""
        return self._token(mark, supervised, turn) if self.owns(mark) else text(mark, supervised, turn)

    def _token(self, spelling: str, supervised: bool, turn: int) -> Segment:
        return Segment(spelling, self._special.tokens[spelling].id, supervised, turn)


def text(content: str, supervised: bool, turn: int) -> Segment:
    return Segment(content, None, supervised, turn)


def join_segments(segments: Iterable[Segment], keep_spaces: bool) -> list[Segment]:
    """Joins adjacent texts that both carry loss or both do not, so that each is encoded in one piece.

    Args:
      segments: The segments of a layout.
      keep_spaces: Whether to keep two texts separate if the second begins with a space and the first does not end with
        one. LLaMA's SentencePiece vocabulary has no piece with a space after another character, so no merge crosses
        such a point, and a system text that many conversations share is encoded once.
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
