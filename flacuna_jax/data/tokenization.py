"""Converts conversations to token ids with a loss mask, segment by segment.

FastChat tokenised the text between two special tokens as one string. Here the answer is encoded separately from the
question, so that the start of the loss is known by construction. The ids are the same, token by token, because a
segment that continues a text starts with a space, and LLaMA's SentencePiece adds that same space (its "dummy prefix")
to the front of every text: encode("x: y") = encode("x:") + encode("y"). A tokenizer without a dummy prefix gets the
segment with its space; `puts_space_in_front` tests which kind a tokenizer is. With a vocabulary whose pieces extend
across spaces ("upon▁a"), the ids can differ from those of the whole string, but training and generation still agree,
because both use this module.

Differences from FastChat's `preprocess` for v1.1 (everything else is equal, token by token): "<s>", "</s>" and "<unk>"
in a text are text, not special tokens; " ASSISTANT: " in a text, an empty question or a missing last answer neither
discards the sample ("tokenization mismatch") nor shifts its mask; there is no padding; and data.over_length decides
about long examples, which are not cut off at the right. An empty question gives "USER:ASSISTANT:", as in FastChat.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.data.conversation import (
    Conversation,
    Template,
    TemplateRefusal,
    Tools,
    Turn,
    render,
    render_prompt,
)
from flacuna_jax.data.segments import Segment, join_segments
from flacuna_jax.data.special_tokens import SpecialTokens

TrainOn = Literal["assistant", "last", "all"]


class Tokenizer(Protocol):
    """The interface of a tokenizer for data and evaluation.

    Attributes:
      special: Its special tokens.
      bos_id: None if it has no BOS.
      prefix_ids: Ids that it adds before a plain text: BOS, or nothing.
      vocab_size: One more than its largest id.
    """

    special: SpecialTokens
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    prefix_ids: tuple[int, ...]
    vocab_size: int

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of a text, without BOS or EOS and never with a special id, even if the text spells a special token.

        Args:
          text: The text to encode.
          first: Whether the text begins the sequence. Otherwise it follows a special token.
        """
        ...

    def encode_batch(self, texts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        """Like `encode`, for many texts. If `first` is None, each text begins a sequence."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        ...


@dataclass(frozen=True)
class TokenizedExample:
    """A conversation as the model sees it, or the two of a preference, one after the other.

    ids: int32 [n], from BOS to the last EOS. loss_mask: bool [n]; loss_mask[i] is True if token i is a target with loss
    (predicted from token i-1); the first of a document is always False. first_length: number of tokens of the first of
    two documents; None if there is one. good: label of a single answer; None without one.
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    id: str
    source: str
    first_length: int | None = None
    good: bool | None = None

    @property
    def documents(self) -> tuple["TokenizedExample", ...]:
        """The one or two documents by themselves."""
        if self.first_length is None:
            return (self,)
        cut = self.first_length
        spans = (slice(None, cut), slice(cut, None))
        return tuple(TokenizedExample(self.ids[s], self.loss_mask[s], self.id, self.source) for s in spans)

    def followed_by(self, ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]) -> "TokenizedExample":
        """The example whose second document has these tokens."""
        both = np.concatenate([self.ids, ids]), np.concatenate([self.loss_mask, loss_mask])
        return dataclasses.replace(self, ids=both[0], loss_mask=both[1], first_length=len(self.ids))


def puts_space_in_front(tokenizer: Tokenizer) -> bool:
    """Whether a text after a special token gets the ids of " " + text within a text (SentencePiece's dummy prefix).

    If so, two texts that meet without a space cannot be encoded separately; if not, some such pairs can.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, first=False)

    pairs = (")", "\n"), ("7", "Q"), ("%", "é"), ("\n", "W")
    return all(encode(a + b) != encode(a) + encode(b) for a, b in pairs)


class Encoded(NamedTuple):
    """The ids of one segment (or of several joined ones), whether they are part of an answer, and the turn that they
    end in. Conversations share `ids`, which must not be modified."""

    ids: list[int]
    supervised: bool
    turn: int


class SegmentEncoder:
    """Encodes segments with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._has_dummy_prefix = puts_space_in_front(tokenizer)
        self._newline_length = len(tokenizer.encode("\n", first=False))

    def encode(self, conversations: Sequence[Sequence[Segment]]) -> list[list[Encoded]]:
        """The ids of every conversation's segments.

        All texts are encoded in one batch; a text that several conversations share, such as the system text, is encoded
        once.
        """
        joined = [join_segments(segments, keep_spaces=self._has_dummy_prefix) for segments in conversations]
        numbers: dict[_Piece, int] = {}
        order = [
            numbers.setdefault(self._piece(segments, index), len(numbers))
            for segments in joined
            for index, segment in enumerate(segments)
            if segment.token is None
        ]
        encoded = self.tokenizer.encode_batch([piece.text for piece in numbers], [piece.first for piece in numbers])
        ids = [one[self._newline_length :] if piece.cut else one for piece, one in zip(numbers, encoded, strict=True)]
        following = iter(order)
        return [
            [
                Encoded(
                    ids[next(following)] if segment.token is None else [segment.token], segment.supervised, segment.turn
                )
                for segment in segments
            ]
            for segments in joined
        ]

    def _piece(self, segments: Sequence[Segment], index: int) -> "_Piece":
        text = segments[index].text
        if index == 0 or not self._has_dummy_prefix or segments[index - 1].token is not None:
            return _Piece(text, index == 0, False)
        # The space that the tokenizer adds is that of the segment, or it is removed together with a newline.
        return _Piece(text[1:], False, False) if text.startswith(" ") else _Piece("\n" + text, False, True)


class _Piece(NamedTuple):
    """A text for the tokenizer, whether it begins the sequence, and whether its first token has to be removed."""

    text: str
    first: bool
    cut: bool


_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<(?:start|end)_of_\w+>|\[/?[A-Z]{3,}(?:_[A-Z]+)*\]")
"""Matches markers of chat templates that tokenizers usually have as tokens."""


def with_notes_on_marks(template: Template, tokenizer: Tokenizer) -> Template:
    """The template, with a note for each of its markers for which the tokenizer has no token."""
    turns = (Turn("user", "x"), Turn("assistant", "y"), Turn("user", "x"))
    try:
        rendered = render_prompt(turns, template)
    except TemplateRefusal:  # it may support shorter conversations; otherwise each one gets the message
        return template
    text = "".join(segment.text for segment in rendered if segment.token is None)
    notes = []
    for mark in dict.fromkeys(_MARK.findall(text)):
        ids = tokenizer.encode(mark, first=False)
        if len(ids) > 1:
            pieces = " ".join(repr(tokenizer.decode([token])) for token in ids)
            notes.append(f"the tokenizer has no token {mark}, which the template writes; it becomes {pieces}")
    return dataclasses.replace(template, notes=(*template.notes, *notes))


def segments_of(conversation: Conversation, template: Template, tokenizer: Tokenizer) -> list[Segment]:
    """The segments of a conversation, or of a text without roles, before which tokenizers put their prefix as they do
    for any text. Raises TemplateRefusal if the conversation is not supported."""
    if not conversation.raw:
        return render(conversation, template)
    text = "".join(turn.text for turn in conversation.turns)
    return [Segment(text, None, True, 0), Segment(tokenizer.special.eos, tokenizer.eos_id, True, 0)]


def tokenize_batch(
    conversations: Sequence[Conversation],
    rendered: Sequence[Sequence[Segment]],
    encoder: SegmentEncoder,
    train_on: TrainOn,
) -> list[TokenizedExample]:
    """Tokenises conversations, each given as segments, in one batch. An example may have no loss; the caller must drop
    it."""
    prefix = Encoded(list(encoder.tokenizer.prefix_ids), False, 0)
    return [
        _assemble(conversation, [prefix, *encoded], "all")
        if conversation.raw
        else _assemble(conversation, encoded, train_on)
        for conversation, encoded in zip(conversations, encoder.encode(rendered), strict=True)
    ]


def tokenize(
    conversation: Conversation, template: Template, tokenizer: Tokenizer, train_on: TrainOn = "assistant"
) -> TokenizedExample:
    """Tokenises one conversation.

    The loss covers every answer and the token that ends it ("assistant"), only the last answer and its end ("last"), or
    every token except BOS ("all").
    """
    segments = segments_of(conversation, template, tokenizer)
    return tokenize_batch([conversation], [segments], SegmentEncoder(tokenizer), train_on)[0]


def tokenize_prompt(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: Tokenizer,
    system: str | None = None,
    tools: Tools = (),
) -> list[int]:
    """Ids of a generation prompt: exactly the ids before an answer in training."""
    encoded = SegmentEncoder(tokenizer).encode([render_prompt(turns, template, system, tools)])[0]
    return [token for part in encoded for token in part.ids]


def _assemble(conversation: Conversation, encoded: Sequence[Encoded], train_on: TrainOn) -> TokenizedExample:
    last = max((part.turn for part in encoded if part.supervised), default=-1)

    def has_loss(part: Encoded) -> bool:
        if not part.supervised:
            return train_on == "all"
        return conversation.turns[part.turn].trained and (train_on != "last" or part.turn == last)

    ids = [token for part in encoded for token in part.ids]
    loss_mask = np.array([has_loss(part) for part in encoded for _ in part.ids], np.bool_)
    loss_mask[:1] = False
    return TokenizedExample(np.array(ids, np.int32), loss_mask, conversation.id, conversation.source)
