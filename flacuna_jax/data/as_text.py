"""Tools, calls, results and reasoning for templates that do not support them: rejected, or written as text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from flacuna_jax.data.segments import REASONING, TemplateRefusal, Tools, Turn

AS_TEXT = "data.tools_as_text: true writes such content as text"


def check_plain(template: str, turns: Sequence[Turn], tools: Tools) -> None:
    """Raises TemplateRefusal unless turns alternate between user and assistant and contain only text."""
    if tools:
        raise TemplateRefusal(f"{template} does not support a list of tools; {AS_TEXT}")
    for index, turn in enumerate(turns):
        if turn.role not in ("user", "assistant"):
            hint = f"; {AS_TEXT}" if turn.role == "tool" else ""
            raise TemplateRefusal(
                f"{template} does not support a message of role {turn.role!r} (turn {index + 1}){hint}"
            )
        for key in ("tool_calls", *REASONING):
            if turn.extra is not None and turn.extra.get(key):
                raise TemplateRefusal(f"{template} does not support {key!r} (turn {index + 1}); {AS_TEXT}")
    for index, (first, second) in enumerate(pairwise(turns)):
        if first.role == second.role:
            where = f"turns {index + 1} and {index + 2}"
            raise TemplateRefusal(f"{template} needs alternating turns, but {where} are both of role {first.role}")


def written_as_text(system: str, turns: Sequence[Turn], tools: Tools) -> tuple[str, list[Turn]]:
    """Converts a conversation to one of text only, with alternating turns.

    Each tool becomes a line of JSON in the system text, calls become `<tool_call>` lines of the assistant, results
    `<tool_response>` lines of the user, and reasoning a `<think>` block before the answer. Developer messages and later
    system messages become messages of the user. Consecutive turns of one role are joined by a newline.
    """
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        system = f"{system}\n\nTools:\n{lines}" if system else f"Tools:\n{lines}"
    plain: list[Turn] = []
    for turn in turns:
        plainer = _plain(turn)
        last = plain[-1] if plain else None
        if last is not None and last.role == plainer.role and (_is_converted(turn) or turn.role == "user"):
            trained = last.trained and plainer.trained
            plain[-1] = Turn(last.role, f"{last.text}\n{plainer.text}", trained)
        else:
            plain.append(plainer)
    return system, plain


def _is_converted(turn: Turn) -> bool:
    return turn.role not in ("user", "assistant") or turn.extra is not None


def _plain(turn: Turn) -> Turn:
    extra = turn.extra or {}
    if turn.role == "tool":
        return Turn("user", f"<tool_response>{turn.text}</tool_response>")
    if turn.role in ("system", "developer"):
        return Turn("user", turn.text)
    reasoning = next((str(extra[key]) for key in REASONING if extra.get(key)), None)
    parts = [f"<think>\n{reasoning}\n</think>\n"] if reasoning else []
    parts += [turn.text] if turn.text else []
    parts += [f"<tool_call>{_call(call)}</tool_call>" for call in _calls(extra)]
    return Turn(turn.role, "\n".join(parts), turn.trained)


def _calls(extra: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return extra.get("tool_calls") or ()


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    return json.dumps({"name": function.get("name"), "arguments": function.get("arguments")}, ensure_ascii=False)
