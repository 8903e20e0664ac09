"""The special tokens of a tokenizer: spellings whose ids the text of a message must never produce."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Special(NamedTuple):
    """One special token.

    Attributes:
      id: Its token id.
      lstrip: Whether it absorbs white space to its left in a rendered text, as in `tokenizers.AddedToken`.
      rstrip: Whether it absorbs white space to its right.
    """

    id: int
    lstrip: bool = False
    rstrip: bool = False


class Span(NamedTuple):
    """A part of a text: a special token with its id, or plain text with id None."""

    text: str
    id: int | None


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of one tokenizer, by spelling.

    Attributes:
      tokens: Every special token, BOS and EOS included.
      bos: The spelling of BOS. None if the tokenizer has no BOS.
      eos: The spelling of EOS.
      variables: Other variables that transformers passes to a chat template, for example pad_token.
    """

    tokens: Mapping[str, Special]
    bos: str | None
    eos: str
    variables: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [token for token in (self.bos, self.eos) if token is not None and token not in self.tokens]
        if missing:
            raise ValueError(f"{missing[0]!r} is not among the special tokens")

    @property
    def ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self.tokens.values())

    @functools.cached_property
    def spellings(self) -> Mapping[int, str]:
        """Maps token ids to spellings."""
        return {token.id: spelling for spelling, token in self.tokens.items()}

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches a special token; if two begin at the same position, the longer one, as in `tokenizers`."""
        return re.compile("|".join(re.escape(token) for token in sorted(self.tokens, key=len, reverse=True)))

    def split(self, text: str) -> Iterator[Span]:
        """Splits a text at its special tokens. The concatenated spans are the text.

        White space that a token absorbs (`lstrip`, `rstrip`) is part of the token's span.
        """
        start = 0
        for match in self.pattern.finditer(text):
            number, lstrip, rstrip = self.tokens[match[0]]
            begin, end = match.span()
            begin = max(begin, start)
            if lstrip:
                begin = start + len(text[start:begin].rstrip())
            if rstrip:
                end += len(text[end:]) - len(text[end:].lstrip())
            if begin > start:
                yield Span(text[start:begin], None)
            yield Span(text[begin:end], number)
            start = end
        if start < len(text):
            yield Span(text[start:], None)
