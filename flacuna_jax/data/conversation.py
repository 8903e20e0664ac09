"""Conversations, and the templates that turn them into text with the supervised spans known by construction.

A template is a function from turns to *segments*. A segment is either a special token (BOS, EOS) or text together with
the answer to "does this text carry loss?". Ids are made segment by segment, so that no text can ever become a special
token, and no mask is ever found by searching for a response string.

Segments meet only where encoding them one by one gives the ids of the whole text: after a special token, or between a
character that is not a space and a space. LLaMA's vocabulary has no piece with a space behind another character, so no
merge crosses such a point (`join_segments` sees to the rest).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that alternate, a user's first. `system` replaces the template's system text; None keeps that."""

    id: str
    source: str
    turns: tuple[Turn, ...]
    system: str | None = None


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


def render(conversation: Conversation, template: Template) -> list[Segment]:
    """Segments of a conversation; ends ready for the answer if the last turn is a user's."""
    system = template.system if conversation.system is None else conversation.system
    return join_segments(template.layout(system, conversation.turns))


def render_prompt(turns: Sequence[Turn], template: Template, system: str | None = None) -> list[Segment]:
    """Segments of a generation prompt, from turns that end with a user's. Nothing follows "ASSISTANT:"."""
    if not turns or turns[-1].role != "user":
        raise ValueError("a prompt ends with a user's turn")
    return join_segments(template.layout(template.system if system is None else system, turns))


def render_text(segments: Sequence[Segment], bos: str = "<s>", eos: str = "</s>") -> str:
    """What a person (or an engine that tokenises whole strings) sees."""
    special = {"bos": bos, "eos": eos}
    return "".join(segment.text if segment.kind == "text" else special[segment.kind] for segment in segments)


def join_segments(segments: Iterator[Segment]) -> list[Segment]:
    """Joins neighbouring texts whose boundary is not a safe place to split; raises ValueError if only one has loss."""
    joined: list[Segment] = []
    for segment in segments:
        if segment.kind == "text" and not segment.text:
            continue
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.kind == segment.kind == "text"
            and (not segment.text.startswith(" ") or last.text.endswith(" "))
        ):
            if last.supervised != segment.supervised:
                raise ValueError(f"the template splits {last.text[-20:]!r} from {segment.text[:20]!r} inside a word")
            joined[-1] = segment._replace(text=last.text + segment.text)  # and its turn
        else:
            joined.append(segment)
    return joined


def _vicuna_v1_1(system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    """`{system} USER: {u} ASSISTANT: {a}</s>USER: {u2} ASSISTANT: {a2}</s>`, as FastChat's get_prompt writes it.

    Its quirk with empty texts is kept, since it is what such a prompt looks like when served: an empty turn is its role
    and colon with no separator after it ("USER:ASSISTANT:"), so an empty answer has no EOS and nothing to learn.
    """
    yield Segment("bos", "", False, -1)
    yield Segment("text", system, False, -1)
    separator = " "
    for index, turn in enumerate(turns):
        if turn.role == "user":
            question = f" {turn.text} " if turn.text else ""
            yield Segment("text", f"{separator}USER:{question}ASSISTANT:", False, index)
        elif turn.text:
            yield Segment("text", " " + turn.text, True, index)
            yield Segment("eos", "", True, index)
        separator = ""


def _vicuna_v0(system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    r"""`{system}\n\n### Human: {u}\n### Assistant: {a}\n### Human: ...`, the layout FastChat trained v0 with.

    (Its later get_prompt variants put no newline between turns; the training code is followed.) Two things are ours:
    the "###" that ends an answer carries loss, and the last answer is followed by EOS with loss, so that the model
    learns to stop in both places; and the "### Assistant:" in front of an answer does not carry loss, as it is given
    in generation. FastChat did it the other way round, with no EOS at all.
    """
    yield Segment("bos", "", False, -1)
    yield Segment("text", f"{system}\n\n###", False, -1)
    for index, turn in enumerate(turns):
        if turn.role == "user":
            yield Segment("text", f" Human: {turn.text}\n### Assistant:", False, index)
            continue
        supervised = bool(turn.text)
        is_last = index == len(turns) - 1
        yield Segment("text", f" {turn.text}\n" if is_last else f" {turn.text}\n###", supervised, index)
        if is_last:
            yield Segment("eos", "", supervised, index)


_JINJA_HEAD = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] or SYSTEM -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{%- set system = SYSTEM -%}{%- set turns = messages -%}"
    "{%- endif -%}"
)
_JINJA_CHECK = (
    "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
    "{{- raise_exception('Turns must alternate user/assistant, starting with user') -}}"
    "{%- endif -%}"
)


def _jinja(system: str, body: str) -> str:
    # repr() of our own system sentences is a valid jinja string literal: double quotes around an apostrophe.
    return _JINJA_HEAD.replace("SYSTEM", repr(system)) + body.replace("CHECK", _JINJA_CHECK)


_V1_1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_V0_SYSTEM = _V1_1_SYSTEM.replace("user", "human")

_V1_1_JINJA = _jinja(
    _V1_1_SYSTEM,
    "{{- bos_token + system + ' ' -}}"
    "{%- for message in turns -%}CHECK"
    "{%- if message['role'] == 'user' -%}"
    "{{- 'USER:' + (' ' + message['content'] + ' ' if message['content'] else '') -}}"
    "{%- else -%}"
    "{{- 'ASSISTANT:' + (' ' + message['content'] + eos_token if message['content'] else '') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}",
)
_V0_JINJA = _jinja(
    _V0_SYSTEM,
    r"{{- bos_token + system + '\n\n' -}}"
    "{%- for message in turns -%}CHECK"
    "{%- if message['role'] == 'user' -%}"
    r"{{- '### Human: ' + message['content'] + '\n' -}}"
    "{%- else -%}"
    r"{{- '### Assistant: ' + message['content'] + '\n' + (eos_token if loop.last else '') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Assistant:' -}}{%- endif -%}",
)

TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        template.name: template
        for template in (
            Template("vicuna_v1.1", _V1_1_SYSTEM, _vicuna_v1_1, (), _V1_1_JINJA),
            Template("vicuna_v0", _V0_SYSTEM, _vicuna_v0, ("###",), _V0_JINJA),
        )
    }
)
