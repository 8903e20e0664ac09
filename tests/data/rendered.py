"""Conversations rendered by this package and by transformers, for comparison."""

from collections.abc import Callable
from typing import Any

from flacuna_jax.data.conversation import Conversation, Template, Turn, render
from flacuna_jax.data.tokenization import tokenize

Loaded = Callable[..., tuple[Any, Any]]
"""The fixture `loaded`: special tokens and options to this package's tokenizer and that of transformers."""

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


def said(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn(("user", "assistant")[index % 2], text) for index, text in enumerate(texts))


def messages_of(conversation: Conversation, in_parts: bool) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [] if conversation.system is None else [_message("system", conversation.system)]
    messages += [_message(turn.role, turn.text) | dict(turn.extra or {}) for turn in conversation.turns]
    if in_parts:
        messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    return messages


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def in_transformers(
    theirs: Any, source: str, conversation: Conversation, in_parts: bool = False
) -> tuple[list[int], list[bool]]:
    result = theirs.apply_chat_template(
        messages_of(conversation, in_parts),
        tools=[dict(tool) for tool in conversation.tools] or None,
        chat_template=source,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask = [bool(one) for one in result["assistant_masks"]]
    return list(result["input_ids"]), [False, *mask[1:]]


def in_flacuna(ours: Any, template: Template, conversation: Conversation) -> tuple[list[int], list[bool]]:
    example = tokenize(conversation, template, ours)
    return example.ids.tolist(), example.loss_mask.tolist()


def supervised_text(template: Template, turns: tuple[Turn, ...], tools: tuple[dict[str, Any], ...] = ()) -> str:
    segments = render(Conversation("", "", turns, None, tools), template)
    return "".join(segment.text for segment in segments if segment.supervised)
