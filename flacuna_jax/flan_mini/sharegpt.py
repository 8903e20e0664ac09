"""ShareGPT: cleaning as documented by FastChat, and splitting of long conversations without losing a turn.

Like FastChat, it removes HTML (which is converted to Markdown), conversations of at most one turn, broken role order,
mentions of OpenAI or ChatGPT, and duplicates (by id, and by first answer and number of turns; see `Item.same_as`). It
also removes refusals, by the beginning of an answer. A leading answer and a trailing question are cut off.

FastChat's splitting loses turns: its last pair vanishes if it overflows, and a first pair that is too long leaves an
empty conversation. Here every question-answer pair is in exactly one part, and pairs that are too long for a part are
counted.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from flacuna_jax.data.conversation import Conversation, Role, Turn
from flacuna_jax.data.formats import BadRecord
from flacuna_jax.flan_mini.html_to_markdown import html_to_markdown, is_html

_ROLES: Mapping[str, Role | None] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": None,
}
_BLOCKED = re.compile(r"openai|chatgpt", re.IGNORECASE)
_REFUSAL = re.compile(
    r"\s*(?:"
    r"(?:i['’]?m|i am) (?:very |really |so )?sorry,? (?:but )?(?:as an ai|i (?:can(?:no|['’])t|am (?:not able|unable)))"
    r"|(?:sorry|apologies),? (?:but )?(?:as an ai|i (?:can(?:no|['’])t|am (?:not able|unable)))"
    r"|i apologi[sz]e,? but (?:as an ai|i (?:can(?:no|['’])t|am (?:not able|unable)))"
    r"|(?:unfortunately,? )?i (?:cannot|can['’]t|am unable to|am not able to) "
    r"(?:fulfill|comply|assist|help|provide|engage)"
    r"|as an (?:ai|artificial intelligence)\b"
    r")",
    re.IGNORECASE,
)
_PAGER = re.compile(r"^\s*\d+ / \d+\s*$\n?", re.MULTILINE)
"""Remains of the page's switch between several answers ("2 / 3")."""

MADE_MARKDOWN = "HTML turned into Markdown"
CUT_ENDS = "leading answer or trailing question removed"


class CleaningError(Exception):
    """A conversation that cleaning removes, with the `reason` under which it is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def clean(record: object) -> tuple[Conversation, list[str]]:
    """Converts a raw export record to a clean conversation, and returns it with a list of the changes.

    Raises CleaningError for removed conversations and BadRecord for records that are not conversations.
    """
    system, turns, changes = _turns(record)
    assert isinstance(record, Mapping)
    begin = 1 if turns and turns[0].role == "assistant" else 0
    end = len(turns) - 1 if turns[begin:] and turns[-1].role == "user" else len(turns)
    if (begin, end) != (0, len(turns)):
        changes.append(CUT_ENDS)
    turns = turns[begin:end]
    if len(turns) < 2:
        raise CleaningError("no more than one turn")
    for first, second in pairwise(turns):
        if first.role == second.role:
            raise CleaningError("broken role order", f"two turns of the {first.role} follow each other")
    for turn in turns:
        if not turn.text:
            raise CleaningError("empty turn")
        if found := _BLOCKED.search(turn.text):
            raise CleaningError("mentions OpenAI or ChatGPT", found[0])
        if turn.role == "assistant" and _REFUSAL.match(turn.text):
            raise CleaningError("refusal", turn.text[:60])
    identity = str(record.get("id") or "")
    return Conversation(identity, "sharegpt", tuple(turns), system or None), changes


def _turns(record: object) -> tuple[str, list[Turn], list[str]]:
    if not isinstance(record, Mapping):
        raise BadRecord("wrong type", f"a record must be an object, not {type(record).__name__}")
    entries = record.get("conversations", record.get("items"))
    if not isinstance(entries, list):
        raise BadRecord("wrong type", "'conversations' must be a list of turns")
    system, turns, changes = "", [], []
    for index, entry in enumerate(entries):
        role, text = _turn(index, entry)
        if role == "assistant" and is_html(text):
            try:
                text, changes = html_to_markdown(text), [MADE_MARKDOWN]
            except ValueError as error:
                raise CleaningError("unreadable HTML", str(error)) from None
        text = _PAGER.sub("", text).strip() if role == "assistant" else text.strip()
        if role is not None:
            turns.append(Turn(role, text))
        elif index:
            raise CleaningError("broken role order", "a system message after the start")
        else:
            system = text
    return system, turns, changes


def _turn(index: int, entry: Any) -> tuple[Role | None, str]:
    if not isinstance(entry, Mapping):
        raise BadRecord("wrong type", f"turn {index + 1} must be an object")
    name, text = entry.get("from"), entry.get("value", entry.get("text"))
    if not isinstance(name, str) or name not in _ROLES:
        raise CleaningError("unknown role", f"turn {index + 1} is from {name!r}")
    if not isinstance(text, str):
        raise BadRecord("wrong type", f"the value of turn {index + 1} must be text, not {type(text).__name__}")
    return _ROLES[name], text


def split(
    conversation: Conversation, max_length: int, count: Callable[[Sequence[Turn]], int]
) -> tuple[list[Conversation], int]:
    """Splits a conversation into parts of at most `max_length` tokens, between question-answer pairs.

    Args:
      count: returns the number of tokens of a conversation of the given turns, including the template.

    Returns: the parts, with ids "{id}_{number of their first turn}" if there are several, and the number of pairs
      that are too long for a part; those are in no part.
    """
    if count(conversation.turns) <= max_length:
        return [conversation], 0
    parts: list[tuple[int, tuple[Turn, ...]]] = []
    open_turns: tuple[Turn, ...] = ()
    lost = 0
    for start in range(0, len(conversation.turns), 2):
        pair = conversation.turns[start : start + 2]
        if open_turns and count(open_turns + pair) <= max_length:
            open_turns += pair
            continue
        if open_turns:
            parts.append((start - len(open_turns), open_turns))
            open_turns = ()
        if count(pair) <= max_length:
            open_turns = pair
        else:
            lost += 1
    if open_turns:
        parts.append((len(conversation.turns) - len(open_turns), open_turns))
    return [
        Conversation(f"{conversation.id}_{start}", conversation.source, turns, conversation.system)
        for start, turns in parts
    ], lost
