"""From conversations to token ids with a loss mask, built segment by segment.

The text between two special tokens is what FastChat tokenised as one string; here the answer is encoded apart from the
question, so that where the loss begins is known and not searched for. The ids are the same, token by token, because a
segment that continues a text starts with a space and LLaMA's SentencePiece puts that same space (its "dummy prefix") in
front of whatever it encodes: encode("x: y") = encode("x:") + encode("y"). A tokenizer without a dummy prefix gets the
segment with its space; which kind a tokenizer is, is found by trying (`puts_space_in_front`). With a vocabulary whose
pieces reach over spaces ("upon▁a") the ids are not always those of the whole string, but training and generation, both
made here, still agree.

Where this differs from FastChat's `preprocess` for v1.1 (everything else is equal, token by token): "<s>", "</s>" and
"<unk>" in a text are text, not special tokens; " ASSISTANT: " in a text, an empty question or a missing last answer
neither lose the sample ("tokenization mismatch") nor move its mask; nothing is padded; and what is too long is not cut
off at the right but treated as data.over_length says. An empty question reads "USER:ASSISTANT:", as in FastChat's text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.data.conversation import Conversation, Segment, Template, Turn, render, render_prompt

TrainOn = Literal["assistant", "last", "all"]


class Tokenizer(Protocol):
    bos_id: int
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text: no BOS or EOS added, and never a special id, whatever the text says."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


@runtime_checkable
class BatchTokenizer(Protocol):
    """A tokenizer that encodes many texts faster than one by one."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class TokenizedExample:
    """A conversation as the model sees it.

    ids: int32 [n], from BOS to the last EOS. loss_mask: bool [n]; loss_mask[i] says that token i is a target with loss
    (predicted from token i-1); the first is False always.
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    id: str
    source: str


def puts_space_in_front(tokenizer: Tokenizer) -> bool:
    """Whether encode("x") gives the ids that " x" has within a text (SentencePiece's dummy prefix).

    If so, no two texts that meet without a space can be encoded apart; if not, some of these pairs surely can.
    """
    pairs = (")", "\n"), ("7", "Q"), ("%", "é"), ("\n", "W")
    return all(tokenizer.encode(a + b) != tokenizer.encode(a) + tokenizer.encode(b) for a, b in pairs)


class SegmentEncoder:
    """Encodes segments with one tokenizer; remembers the ids of system texts, which nearly all examples share."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._has_dummy_prefix = puts_space_in_front(tokenizer)
        self._newline_length = len(tokenizer.encode("\n"))
        self._system_ids: dict[str, list[int]] = {}

    def encode(self, conversations: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """The ids of every segment of every conversation; all texts go to the tokenizer in one batch."""
        texts: list[str] = []
        after_newline: list[bool] = []
        for segments in conversations:
            continues = False
            for segment in segments:
                if segment.kind == "text" and not self._is_known(segment):
                    inside = continues and self._has_dummy_prefix
                    has_space = segment.text.startswith(" ")
                    # The space that the tokenizer puts in front is the segment's own, or is cut off with a newline.
                    after_newline.append(inside and not has_space)
                    texts.append(segment.text[1:] if inside and has_space else "\n" * after_newline[-1] + segment.text)
                continues = segment.kind == "text"
        encoded = (
            ids[self._newline_length :] if cut else ids
            for ids, cut in zip(self._encode_texts(texts), after_newline, strict=True)
        )
        special = {"bos": [self._tokenizer.bos_id], "eos": [self._tokenizer.eos_id]}
        return [
            [
                special[segment.kind]
                if segment.kind != "text"
                else self._system_ids[segment.text]
                if self._is_known(segment)
                else next(encoded)
                for segment in segments
            ]
            for segments in conversations
        ]

    def _is_known(self, segment: Segment) -> bool:
        if segment.turn >= 0:
            return False
        if segment.text not in self._system_ids:
            if len(self._system_ids) >= 1024:
                return False
            self._system_ids[segment.text] = self._tokenizer.encode(segment.text)
        return True

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        if isinstance(self._tokenizer, BatchTokenizer):
            return self._tokenizer.encode_batch(texts)
        return [self._tokenizer.encode(text) for text in texts]


def tokenize_batch(
    conversations: Sequence[Conversation], template: Template, encoder: SegmentEncoder, train_on: TrainOn
) -> list[TokenizedExample]:
    """Tokenises conversations together. An example may come out without loss; its caller must not keep it."""
    rendered = [render(conversation, template) for conversation in conversations]
    return [
        _assemble(conversation, segments, ids, train_on)
        for conversation, segments, ids in zip(conversations, rendered, encoder.encode(rendered), strict=True)
    ]


def tokenize(
    conversation: Conversation, template: Template, tokenizer: Tokenizer, train_on: TrainOn = "assistant"
) -> TokenizedExample:
    """Tokenises one conversation.

    Loss on: every answer and the token that ends it ("assistant"); the same for the last answered turn alone ("last");
    or every token but BOS ("all").
    """
    return tokenize_batch([conversation], template, SegmentEncoder(tokenizer), train_on)[0]


def tokenize_prompt(
    turns: Sequence[Turn], template: Template, tokenizer: Tokenizer, system: str | None = None
) -> list[int]:
    """Ids of a generation prompt: exactly what stands before an answer in training."""
    encoded = SegmentEncoder(tokenizer).encode([render_prompt(turns, template, system)])[0]
    return [token for ids in encoded for token in ids]


def _assemble(
    conversation: Conversation, segments: Sequence[Segment], encoded: Sequence[list[int]], train_on: TrainOn
) -> TokenizedExample:
    only_turn = max((s.turn for s in segments if s.supervised), default=-1) if train_on == "last" else None
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for segment, part in zip(segments, encoded, strict=True):
        if segment.supervised and (only_turn is None or segment.turn == only_turn):
            spans.append((len(ids), len(ids) + len(part)))
        ids += part
    loss_mask = np.zeros(len(ids), np.bool_)
    if train_on == "all":
        loss_mask[1:] = True
    else:
        for start, end in spans:
            loss_mask[start:end] = True
    return TokenizedExample(np.array(ids, np.int32), loss_mask, conversation.id, conversation.source)
