"""Ollama's Modelfile for a GGUF file, with the chat template as a Go template if that can express it exactly.

A Go template cannot call the functions of Jinja, but it can write texts around the messages of a conversation. Whether
this is all that a Jinja template does is found out by rendering conversations.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

from jinja2 import TemplateError

from flacuna_jax.data.jinja_program import compile_template

Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]
"""Messages → the prompt, by the Jinja template."""


@dataclasses.dataclass(frozen=True)
class Around:
    """The texts that a template writes around messages, a system message first and then user and assistant in turn.

    Attributes:
      no_system: at the beginning of a conversation without a system message.
      system: before and after a system message.
      user: before a message of the user.
      assistant: before and after an answer.
      prompt: after the last message of the user.
    """

    no_system: str
    system: tuple[str, str]
    user: str
    assistant: tuple[str, str]
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, as the Go template of `go_template` renders it."""
        text = "" if messages[0]["role"] == "system" else self.no_system
        around = {"system": self.system, "user": (self.user, ""), "assistant": self.assistant}
        for message in messages:
            before, after = around[message["role"]]
            text += before + message["content"] + after
        return text + (self.prompt if messages[-1]["role"] == "user" else "")

    def go_template(self) -> str:
        """The template in Ollama's form, whose variables are Messages with Role and Content."""
        start = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_literal(self.no_system)}{{{{ end }}}}'
        branches = (
            ("if", "system", self.system),
            ("else if", "user", (self.user, "")),
            ("else if", "assistant", self.assistant),
        )
        inner = "".join(
            f'{{{{ {word} eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}'
            for word, role, (before, after) in branches
        )
        last = (
            f'{{{{ if and (eq .Role "user") (eq (len (slice $.Messages $i)) 1) }}}}{_literal(self.prompt)}{{{{ end }}}}'
        )
        loop = f"{{{{ range $i, $_ := .Messages }}}}{inner}{{{{ end }}}}{last}{{{{ end }}}}"
        return (start if self.no_system else "") + loop


def _literal(text: str) -> str:
    """Text of a Go template: in quotes where it would be an action, or would end the value in a Modelfile."""
    return text if "{{" not in text and '"""' not in text else "{{ " + json.dumps(text, ensure_ascii=False) + " }}"


def texts_around(render: Render) -> Around | None:
    """What a template writes around messages; None if it does more, or rejects a system message."""
    try:
        found = _separated(render)
        return found if all(found.render(one) == render(one) for one in _CONVERSATIONS) else None
    except (TemplateError, ValueError):
        return None


def _separated(render: Render) -> Around:
    """Raises ValueError if a message does not appear once, unchanged."""
    first, to_answer, to_user, prompt = _cut(render, _messages("uau"))
    begin, after_system, _ = _cut(render, _messages("su"))
    user = _common_end(first, to_user, after_system)
    rest = slice(0, -len(user) or None)
    return Around(first[rest], (begin, after_system[rest]), user, (to_answer, to_user[rest]), prompt)


def _cut(render: Render, messages: Sequence[Message]) -> list[str]:
    """The texts before, between and after the messages."""
    parts, rest = [], render(messages)
    for message in messages:
        before, found, rest = rest.partition(message["content"])
        if not found:
            raise ValueError("a message is missing")
        parts.append(before)
    return [*parts, rest]


def _common_end(*texts: str) -> str:
    length = 0
    while all(length < len(text) for text in texts) and len({text[-length - 1] for text in texts}) == 1:
        length += 1
    return texts[0][len(texts[0]) - length :]


_ROLES = {"s": "system", "u": "user", "a": "assistant"}


def _messages(roles: str, form: str = "text-{}-of-a-message") -> list[Message]:
    return [{"role": _ROLES[role], "content": form.format(number)} for number, role in enumerate(roles)]


_CONVERSATIONS = tuple(
    _messages(roles, form)
    for roles in ("u", "su", "uau", "suau", "uauau", "suauauau")
    for form in ("text-{}-of-a-message", "  {} spaces and\n\nlines \n", "<|{}|> {{{{ .Content }}}} </s> \\ ' \"")
)


def jinja_renderer(source: str, variables: Mapping[str, str], bos: str | None) -> Render:
    """Renders prompts with a Jinja template as transformers does.

    Args:
      source: the template.
      variables: special tokens by name.
      bos: the spelling of BOS if the tokenizer puts it before a text; it is then removed from the rendered prompt.
    """
    template = compile_template(source)

    def render(messages: Sequence[Message]) -> str:
        text = template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **variables)
        return text.removeprefix(bos) if bos else text

    return render


def modelfile(file: str, around: Around | None, stops: Sequence[str]) -> str:
    """The content of a Modelfile.

    Args:
      file: name of the GGUF file, in the same directory.
      around: the template; None leaves it to Ollama.
      stops: texts that end an answer.
    """
    lines = [f"FROM ./{file}"]
    if around is not None:
        lines.append(f'TEMPLATE """{around.go_template()}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"
