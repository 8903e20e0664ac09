"""Segments: what a conversation is made of before it becomes ids.

A segment is either a special token (BOS, EOS) or text together with the answer to "does this text carry loss?". Ids are
made segment by segment, so that no text can ever become a special token, and no mask is ever found by searching for a
response string.

Segments meet only where encoding them one by one gives the ids of the whole text: after a special token, between a
character that is not a space and a space, or, where loss begins or ends, at a newline. LLaMA's vocabulary has no piece
with a space behind another character and none that holds a newline and something else, so no merge crosses such a point
(`join_segments` sees to the rest).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Role = Literal["system", "developer", "user", "assistant", "tool"]


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


class Segment(NamedTuple):
    """A special token, or text; `turn` is the index of the turn that it ends in (-1 before the first)."""

    kind: Literal["text", "bos", "eos"]
    text: str
    supervised: bool
    turn: int


Layout = Callable[[str, Sequence[Turn]], Iterator[Segment]]


@dataclass(frozen=True)
class Template:
    """A conversation format.

    `layout(system, turns)` yields the segments; after a user's turn it opens the assistant's, so that the same function
    gives training conversations (which end with the assistant) and generation prompts (which end with a user).
    `jinja` renders the same text for Hugging Face's `apply_chat_template`.
    """

    name: str
    system: str
    layout: Layout
    stop_strings: tuple[str, ...]
    """Text that ends an answer in generation, besides EOS."""
    jinja: str


def join_segments(segments: Iterator[Segment]) -> list[Segment]:
    """Joins neighbouring texts unless they have to be told apart and can; raises ValueError if they must and cannot."""
    joined: list[Segment] = []
    for segment in segments:
        if segment.kind == "text" and not segment.text:
            continue
        last = joined[-1] if joined else None
        if last is not None and last.kind == segment.kind == "text" and not _can_split(last, segment):
            if last.supervised != segment.supervised:
                raise ValueError(f"the template splits {last.text[-20:]!r} from {segment.text[:20]!r} inside a word")
            joined[-1] = segment._replace(text=last.text + segment.text)  # and its turn
        else:
            joined.append(segment)
    return joined


def _can_split(last: Segment, segment: Segment) -> bool:
    if segment.text.startswith(" ") and not last.text.endswith(" "):
        return True
    return last.supervised != segment.supervised and (last.text.endswith("\n") or segment.text.startswith("\n"))
