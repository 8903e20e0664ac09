"""The conversation formats: as segments, and as the Jinja that Hugging Face's tokenizers carry."""

from collections.abc import Iterator, Sequence

from flacuna_jax.data.segments import Segment, Template, Turn


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


def _llama_2(system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    r"""`<s>[INST] {u} [/INST] {a} </s><s>[INST] {u2} [/INST] {a2} </s>`, texts stripped, as Llama 2 Chat was trained.

    A system text stands in the first user's turn: `[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{u} [/INST]`.
    """
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for index, turn in enumerate(turns):
        text = turn.text.strip()
        if turn.role == "user":
            yield Segment("bos", "", False, index)
            yield Segment("text", f"[INST] {head}{text} [/INST]", False, index)
            head = ""
        else:
            yield Segment("text", f" {text} ", bool(text), index)
            yield Segment("eos", "", bool(text), index)


def _chatml(system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    r"""`<|im_start|>user\n{u}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n`, the marks as text.

    EOS follows the last answer, so that the model learns to stop where the marks are no tokens of their own, too.
    """
    yield Segment("bos", "", False, -1)
    if system:
        yield Segment("text", f"<|im_start|>system\n{system}<|im_end|>\n", False, -1)
    for index, turn in enumerate(turns):
        if turn.role == "user":
            text = f"<|im_start|>user\n{turn.text}<|im_end|>\n<|im_start|>assistant\n"
            yield Segment("text", text, False, index)
            continue
        supervised = bool(turn.text)
        yield Segment("text", f"{turn.text}<|im_end|>", supervised, index)
        if index == len(turns) - 1:
            yield Segment("eos", "", supervised, index)
        else:
            yield Segment("text", "\n", False, index)


def _alpaca(system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    r"""`{system}\n\n### Instruction:\n{u}\n\n### Response:\n{a}</s>`; further turns begin at "### Instruction:"."""
    yield Segment("bos", "", False, -1)
    if system:
        yield Segment("text", f"{system}\n\n", False, -1)
    for index, turn in enumerate(turns):
        if turn.role == "user":
            yield Segment("text", f"### Instruction:\n{turn.text}\n\n### Response:\n", False, index)
        else:
            yield Segment("text", turn.text, True, index)
            yield Segment("eos", "", bool(turn.text), index)


def _plain(system: str, turns: Sequence[Turn]) -> Iterator[Segment]:
    r"""`{u}\n{a}</s>`: no marks at all, as models of the FLAN family are asked."""
    yield Segment("bos", "", False, -1)
    if system:
        yield Segment("text", f"{system}\n\n", False, -1)
    for index, turn in enumerate(turns):
        if turn.role == "user":
            yield Segment("text", f"{turn.text}\n", False, index)
        else:
            yield Segment("text", turn.text, True, index)
            yield Segment("eos", "", bool(turn.text), index)


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
    r"{{- eos_token if loop.last and message['role'] == 'assistant' else '\n' -}}"
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

LAYOUTS = (
    Template("vicuna_v1.1", _V1_1_SYSTEM, _vicuna_v1_1, (), _V1_1_JINJA),
    Template("vicuna_v0", _V0_SYSTEM, _vicuna_v0, ("###",), _V0_JINJA),
    Template("llama-2-chat", "", _llama_2, (), _LLAMA_2_JINJA),
    Template("chatml", _CHATML_SYSTEM, _chatml, ("<|im_end|>",), _CHATML_JINJA),
    Template("alpaca", _ALPACA_SYSTEM, _alpaca, ("### Instruction:",), _ALPACA_JINJA),
    Template("plain", "", _plain, (), _PLAIN_JINJA),
)
