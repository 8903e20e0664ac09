"""The built-in conversation formats: as segments, and as Jinja for tokenizer files.

They support a system text and turns that alternate between user and assistant. Other content (tools, their calls and
results, reasoning) is rejected, or converted to text first (`as_text.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from flacuna_jax.data.as_text import check_plain, written_as_text
from flacuna_jax.data.segments import Segment, Template, Tools, Turn, Writer, text
from flacuna_jax.data.special_tokens import SpecialTokens


def _vicuna_v1_1(write: Writer, system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    """`{system} USER: {u} ASSISTANT: {a}</s>USER: {u2} ASSISTANT: {a2}</s>`, as FastChat's get_prompt writes it.

    Empty texts are written as in FastChat, because served prompts look the same: an empty turn is its role and colon
    without a separator after it ("USER:ASSISTANT:"), so an empty answer has no EOS and no loss.
    """
    yield from write.bos(-1)
    yield text(system, False, -1)
    separator = " "
    for index, turn in enumerate(turns):
        if turn.role == "user":
            question = f" {turn.text} " if turn.text else ""
            yield text(f"{separator}USER:{question}ASSISTANT:", False, index)
        elif turn.text:
            yield text(" " + turn.text, True, index)
            yield write.eos(True, index)
        separator = ""


def _vicuna_v0(write: Writer, system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    r"""`{system}\n\n### Human: {u}\n### Assistant: {a}\n### Human: ...`, the format with which FastChat trained v0.

    (FastChat's later get_prompt variants put no newline between turns; this follows its training code.) Two things
    differ from FastChat: the "###" that ends an answer carries loss, and EOS with loss follows the last answer, so that
    the model learns to stop in both places; and the "### Assistant:" before an answer carries no loss, because it is
    given in generation. FastChat did the opposite, and had no EOS.
    """
    yield from write.bos(-1)
    yield text(f"{system}\n\n###", False, -1)
    for index, turn in enumerate(turns):
        if turn.role == "user":
            yield text(f" Human: {turn.text}\n### Assistant:", False, index)
            continue
        supervised = bool(turn.text)
        is_last = index == len(turns) - 1
        yield text(f" {turn.text}\n" if is_last else f" {turn.text}\n###", supervised, index)
        if is_last:
            yield write.eos(supervised, index)


def _llama_2(write: Writer, system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    r"""`<s>[INST] {u} [/INST] {a} </s><s>[INST] {u2} [/INST] {a2} </s>`, texts stripped, as Llama 2 Chat was trained.

    A system text is part of the first user turn: `[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{u} [/INST]`.
    """
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for index, turn in enumerate(turns):
        stripped = turn.text.strip()
        if turn.role == "user":
            yield from write.bos(index)
            yield write.mark("[INST]", False, index)
            yield text(f" {head}{stripped} ", False, index)
            yield write.mark("[/INST]", False, index)
            head = ""
        else:
            supervised = bool(stripped)
            yield text(f" {stripped} ", supervised, index)
            yield write.eos(supervised, index)


def _chatml(write: Writer, system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    r"""`<|im_start|>user\n{u}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n`.

    If the tokenizer has no `<|im_end|>`, the markers are text, and EOS follows the last answer, so that the model
    learns to stop.
    """
    yield from write.bos(-1)
    if system:
        yield from _message(write, "system", system, -1)
    for index, turn in enumerate(turns):
        if turn.role == "user":
            yield from _message(write, "user", turn.text, index)
            yield write.mark(_IM_START, False, index)
            yield text("assistant\n", False, index)
            continue
        supervised = bool(turn.text)
        yield text(turn.text, supervised, index)
        yield write.mark(_IM_END, supervised, index)
        if index == len(turns) - 1 and not write.owns(_IM_END):
            yield write.eos(supervised, index)
        else:
            yield text("\n", False, index)


_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"


def _message(write: Writer, role: str, content: str, turn: int) -> Iterator[Segment]:
    yield write.mark(_IM_START, False, turn)
    yield text(f"{role}\n{content}", False, turn)
    yield write.mark(_IM_END, False, turn)
    yield text("\n", False, turn)


def _alpaca(write: Writer, system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    r"""`{system}\n\n### Instruction:\n{u}\n\n### Response:\n{a}</s>`; further turns begin at "### Instruction:"."""
    yield from write.bos(-1)
    if system:
        yield text(f"{system}\n\n", False, -1)
    for index, turn in enumerate(turns):
        if turn.role == "user":
            yield text(f"### Instruction:\n{turn.text}\n\n### Response:\n", False, index)
        else:
            yield text(turn.text, True, index)
            yield write.eos(bool(turn.text), index)


def _plain(write: Writer, system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    r"""`{u}\n{a}</s>`: no markers, like the prompts of FLAN models."""
    yield from write.bos(-1)
    if system:
        yield text(f"{system}\n\n", False, -1)
    for index, turn in enumerate(turns):
        if turn.role == "user":
            yield text(f"{turn.text}\n", False, index)
        else:
            yield text(turn.text, True, index)
            yield write.eos(bool(turn.text), index)


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
    # repr() of our system texts is a valid Jinja string literal: it puts double quotes around an apostrophe.
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

_CHATML_SYSTEM = "You are a helpful assistant."
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)

_LLAMA_2_JINJA = _jinja(
    "",
    "{%- for message in turns -%}CHECK"
    "{%- set text = message['content'].strip() -%}"
    "{%- if message['role'] == 'user' -%}"
    r"{{- bos_token + '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '')"
    " + text + ' [/INST]' -}}"
    "{%- else -%}"
    "{{- ' ' + text + ' ' + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}",
)
_CHATML_JINJA = _jinja(
    _CHATML_SYSTEM,
    r"{{- bos_token + ('<|im_start|>system\n' + system + '<|im_end|>\n' if system else '') -}}"
    "{%- for message in turns -%}CHECK"
    r"{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' -}}"
    r"{{- LAST_END if loop.last and message['role'] == 'assistant' else '\n' -}}"
    "{%- endfor -%}"
    r"{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}",
)
_ALPACA_JINJA = _jinja(
    _ALPACA_SYSTEM,
    r"{{- bos_token + (system + '\n\n' if system else '') -}}"
    "{%- for message in turns -%}CHECK"
    "{%- if message['role'] == 'user' -%}"
    r"{{- '### Instruction:\n' + message['content'] + '\n\n' -}}"
    "{%- else -%}"
    r"{{- '### Response:\n' + message['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    r"{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}",
)
_PLAIN_JINJA = _jinja(
    "",
    r"{{- bos_token + (system + '\n\n' if system else '') -}}"
    "{%- for message in turns -%}CHECK"
    r"{{- message['content'] + ('\n' if message['role'] == 'user' else eos_token) -}}"
    "{%- endfor -%}",
)


@dataclass(frozen=True)
class _Format:
    """A built-in format, not bound to a tokenizer."""

    system: str
    layout: Callable[[Writer, str, Sequence[Turn]], Iterator[Segment]]
    jinja: str
    stop_string: str | None = None
    end: str | None = None
    """The marker that ends an answer if the tokenizer has it as a token. None if EOS ends it."""


_FORMATS: Mapping[str, _Format] = MappingProxyType(
    {
        "vicuna_v1.1": _Format(_V1_1_SYSTEM, _vicuna_v1_1, _V1_1_JINJA),
        "vicuna_v0": _Format(_V0_SYSTEM, _vicuna_v0, _V0_JINJA, "###"),
        "llama-2-chat": _Format("", _llama_2, _LLAMA_2_JINJA),
        "chatml": _Format(_CHATML_SYSTEM, _chatml, _CHATML_JINJA, _IM_END, end=_IM_END),
        "alpaca": _Format(_ALPACA_SYSTEM, _alpaca, _ALPACA_JINJA, "### Instruction:"),
        "plain": _Format("", _plain, _PLAIN_JINJA),
    }
)
NAMES = tuple(_FORMATS)


def system_text(name: str) -> str:
    """The system text of a built-in format."""
    return _FORMATS[name].system


def source_of(name: str) -> str:
    """The Jinja text of a built-in format, not bound to a tokenizer."""
    return _FORMATS[name].jinja


def our_template(name: str, special: SpecialTokens, tools_as_text: bool = False) -> Template:
    """A built-in format, bound to the special tokens of one tokenizer.

    Args:
      name: One of `NAMES`.
      special: The tokenizer's special tokens.
      tools_as_text: Whether tools, calls, results and reasoning are written as text. Otherwise they are rejected.
    """
    format_, write = _FORMATS[name], Writer(special)
    owns_end = format_.end is not None and write.owns(format_.end)

    def layout(system: str, turns: Sequence[Turn], tools: Tools) -> Iterator[Segment]:
        if tools_as_text:
            system, turns = written_as_text(system, turns, tools)
        check_plain(name, turns, () if tools_as_text else tools)
        yield from format_.layout(write, system, turns)

    end = special.tokens[format_.end if owns_end and format_.end else special.eos].id
    stop = (format_.stop_string,) if format_.stop_string and not owns_end else ()
    return Template(name, format_.system, layout, stop, (end,), _jinja_for(format_.jinja, special.bos, owns_end))


def _jinja_for(source: str, bos: str | None, owns_end: bool) -> str:
    """The Jinja of a format for one tokenizer: transformers does not define bos_token if the tokenizer has none."""
    source = source.replace("LAST_END", r"'\n'" if owns_end else "eos_token")
    return source if bos is not None else source.replace("bos_token + ", "")
