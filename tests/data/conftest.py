"""Small tokenizers for the tests of this package, so that mistakes of other packages do not affect them."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from flacuna_jax.data.jinja_program import DATE
from flacuna_jax.data.special_tokens import Special, SpecialTokens
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from tests.data.chat_templates import write_tokenizer
from tests.data.rendered import Loaded
from tests.vocabularies import LLAMA, Characters


class SentencePiece:
    special, unk_id, prefix_ids = LLAMA, None, (1,)

    def __init__(self, path: Path) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.vocab_size = self.model.vocab_size()

    def encode(self, text: str, first: bool = True) -> list[int]:
        return self.model.encode(text)

    def encode_batch(self, texts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        return self.model.encode(list(texts)) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([token for token in ids if token not in self.special.ids])


class Fast:
    """A tokenizer.json of the `tokenizers` library."""

    special = SpecialTokens(
        {"<|start_story|>": Special(1), "<|end_story|>": Special(2)}, "<|start_story|>", "<|end_story|>"
    )
    bos_id, eos_id, unk_id, prefix_ids = 1, 2, None, (1,)

    def __init__(self, path: Path) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.tokenizer.encode_special_tokens = True
        self.vocab_size = self.tokenizer.get_vocab_size()

    def encode(self, text: str, first: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in ids if token not in self.special.ids])


@pytest.fixture(scope="session")
def llama(llama_tokenizer: Path) -> SentencePiece:
    return SentencePiece(llama_tokenizer / "tokenizer.model")


@pytest.fixture(scope="session")
def fast(story_llama: Path) -> Fast:
    return Fast(story_llama / "tokenizer.json")


@pytest.fixture(scope="session")
def characters() -> Characters:
    return Characters()


@pytest.fixture
def fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """The date that templates get from transformers is the one that they get here."""

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Fixed":
            return cls(DATE.year, DATE.month, DATE.day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Fixed)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Our tokenizer and that of transformers, with given special tokens."""
    transformers = pytest.importorskip("transformers")
    known: dict[Any, tuple[Any, Any]] = {}

    def load(*marks: Any, **options: Any) -> tuple[Any, Any]:
        key = (tuple(map(str, marks)), tuple(sorted(options.items())))
        if key not in known:
            directory = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), marks, **options)
            known[key] = (load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory))
        return known[key]

    return load
