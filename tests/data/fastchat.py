"""FastChat's preprocessing for vicuna_v1.1, reimplemented from its published rule, as the oracle for ids and masks.

One string per conversation: the slow LLaMA tokenizer splits it at special tokens and passes each part to SentencePiece;
labels are found by splitting the string again and counting tokens.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
IGNORED = -100
SEPARATOR = " ASSISTANT: "


class Labelled(NamedTuple):
    ids: list[int]
    labels: list[int]
    lost: bool
    """FastChat prints "tokenization mismatch" and trains on nothing of this sample."""


def prompt(turns: Sequence[tuple[str, str]], system: str = SYSTEM) -> str:
    """get_prompt with separators " " and "</s>"; turns are (role, text), role "USER" or "ASSISTANT"."""
    text = system + " "
    for index, (role, message) in enumerate(turns):
        text += f"{role}: {message}" + (" ", "</s>")[index % 2] if message else f"{role}:"
    return text


def slow_tokenize(model: SentencePieceProcessor, text: str) -> list[int]:
    ids = [1]
    for part in re.split("(</s>|<s>|<unk>)", text):
        ids += [SPECIAL[part]] if part in SPECIAL else model.encode(part) if part else []
    return ids


def preprocess(model: SentencePieceProcessor, turns: Sequence[tuple[str, str]], max_length: int = 4096) -> Labelled:
    conversation = prompt(turns)
    ids = slow_tokenize(model, conversation)
    labels = list(ids)
    position = 1
    labels[0] = IGNORED
    for piece in conversation.split("</s>"):
        if piece == "":
            break
        piece_length = len(slow_tokenize(model, piece))
        parts = piece.split(SEPARATOR)
        if len(parts) != 2:
            break
        question = len(slow_tokenize(model, parts[0] + SEPARATOR)) - 2
        labels[position : position + question] = [IGNORED] * question
        position += piece_length
    labels[position:] = [IGNORED] * len(labels[position:])
    known = sum(token != 0 for token in ids)  # padding is <unk>
    lost = position < max_length and position != known
    return Labelled(ids, [IGNORED] * len(labels) if lost else labels, lost)
