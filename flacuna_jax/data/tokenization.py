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

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.data.conversation import Conversation, Template, Tools, Turn, render, render_prompt
from flacuna_jax.data.segments import Segment, join_segments
from flacuna_jax.data.special_tokens import SpecialTokens

TrainOn = Literal["assistant", "last", "all"]


class Tokenizer(Protocol):
    """What data and evaluation need of a tokenizer.

    Attributes:
      special: Its special tokens.
      bos_id: None if it has no BOS.
      prefix_ids: What it puts in front of a plain text: BOS, or nothing.
      vocab_size: One more than its largest id.
    """

    special: SpecialTokens
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    prefix_ids: tuple[int, ...]
    vocab_size: int

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of a text, without BOS or EOS, and never a special id, whatever the text says.

        Args:
          text: What to encode.
          first: Whether the text begins the sequence. Otherwise it follows a special token.
        """
        ...

    def encode_batch(self, texts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        """As `encode`, for many texts; None means that each begins a sequence."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens have none."""
        ...


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
    """Whether a text behind a special token gets the ids that " " + text has within a text (SentencePiece's dummy
    prefix).

    If so, no two texts that meet without a space can be encoded apart; if not, some of these pairs surely can.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, first=False)

    pairs = (")", "\n"), ("7", "Q"), ("%", "é"), ("\n", "W")
    return all(encode(a + b) != encode(a) + encode(b) for a, b in pairs)


class Encoded(NamedTuple):
    """The ids of one segment (or of several that were joined), whether the assistant says them, and the turn they end
    in. Conversations share `ids`; they must not be changed."""

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

        All texts go to the tokenizer in one batch, and a text that several conversations share, such as the system
        text, goes there once.
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
        # The space that the tokenizer puts in front is the segment's own, or is cut off with a newline.
        return _Piece(text[1:], False, False) if text.startswith(" ") else _Piece("\n" + text, False, True)


class _Piece(NamedTuple):
    """A text for the tokenizer, whether it begins the sequence, and whether its first token is to be cut off."""

    text: str
    first: bool
    cut: bool


_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<(?:start|end)_of_\w+>|\[/?[A-Z]{3,}(?:_[A-Z]+)*\]")
"""What chat templates write as marks, and tokenizers usually have as tokens."""


def with_notes_on_marks(template: Template, tokenizer: Tokenizer) -> Template:
    """The template, with a note for each mark that it writes and the tokenizer has no token for."""
    turns = (Turn("user", "x"), Turn("assistant", "y"), Turn("user", "x"))
    rendered = render_prompt(turns, template)
    text = "".join(segment.text for segment in rendered if segment.token is None)
    notes = []
    for mark in dict.fromkeys(_MARK.findall(text)):
        ids = tokenizer.encode(mark, first=False)
        if len(ids) > 1:
            pieces = " ".join(repr(tokenizer.decode([token])) for token in ids)
            notes.append(f"the tokenizer has no token {mark}, which the template writes; it is spelled {pieces}")
    return dataclasses.replace(template, notes=(*template.notes, *notes))


def segments_of(conversation: Conversation, template: Template, tokenizer: Tokenizer) -> list[Segment]:
    """The segments of a conversation, or of a text without roles. Raises TemplateRefusal."""
    if not conversation.raw:
        return render(conversation, template)
    special = tokenizer.special
    front = [Segment(special.spellings[token], token, False, 0) for token in tokenizer.prefix_ids]
    text = "".join(turn.text for turn in conversation.turns)
    return [*front, Segment(text, None, True, 0), Segment(special.eos, tokenizer.eos_id, True, 0)]


def tokenize_batch(
    conversations: Sequence[Conversation],
    rendered: Sequence[Sequence[Segment]],
    encoder: SegmentEncoder,
    train_on: TrainOn,
) -> list[TokenizedExample]:
    """Tokenises conversations together, each with its segments. An example may come out without loss; its caller must
    not keep it."""
    return [
        _assemble(conversation, encoded, "all" if conversation.raw else train_on)
        for conversation, encoded in zip(conversations, encoder.encode(rendered), strict=True)
    ]


def tokenize(
    conversation: Conversation, template: Template, tokenizer: Tokenizer, train_on: TrainOn = "assistant"
) -> TokenizedExample:
    """Tokenises one conversation.

    Loss on: every answer and the token that ends it ("assistant"); the same for the last answered turn alone ("last");
    or every token but BOS ("all").
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
    """Ids of a generation prompt: exactly what stands before an answer in training."""
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
