"""Tokenizers for the tests of this room, thin and of their own, so that no other room's mistake shows here."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
import tokenizers


class SentencePiece:
    def __init__(self, path: Path) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.vocab_size = self.model.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.encode(list(texts)) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))


class Characters:
    """A tokenizer without files and without a dummy prefix: an id per character (or its low bits), 1 and 2 special."""

    bos_id, eos_id, vocab_size = 1, 2, 3 + 256

    def encode(self, text: str) -> list[int]:
        return [3 + ord(character) % 256 for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token - 3) for token in ids if token >= 3)


class Fast:
    """A tokenizer.json of the `tokenizers` library."""

    bos_id, eos_id = 1, 2

    def __init__(self, path: Path) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.tokenizer.encode_special_tokens = True
        self.vocab_size = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))


@pytest.fixture(scope="session")
def llama(llama_tokenizer: Path) -> SentencePiece:
    return SentencePiece(llama_tokenizer / "tokenizer.model")


@pytest.fixture(scope="session")
def fast(story_llama: Path) -> Fast:
    return Fast(story_llama / "tokenizer.json")


@pytest.fixture(scope="session")
def characters() -> Characters:
    return Characters()
