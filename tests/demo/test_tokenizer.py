"""The demo's tokenizer follows the conventions of LLaMA's, with our loader and with transformers."""

from pathlib import Path
from types import ModuleType

import pytest
import sentencepiece

from flacuna_jax.demo import corpus, words
from flacuna_jax.demo.tokenizer import VOCAB_SIZE, train_tokenizer
from flacuna_jax.huggingface.tokenizer import load_tokenizer

SIZES = corpus.CorpusSizes(conversations=1500, instructions=100, held_out=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus.texts(corpus.build_corpus(0, SIZES)), path)
    return path


def test_special_ids_and_bytes_equal_those_of_llama(directory: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert model.vocab_size() == VOCAB_SIZE
    assert [model.id_to_piece(i) for i in (3, 258)] == ["<0x00>", "<0xFF>"]
    assert all(model.is_byte(i) for i in range(3, 259))


@pytest.mark.parametrize("text", ["Who has the ring?\nA:", "  two  spaces ", "42 + 7", "Ünïcødé 日本 🙂", "</s> <unk>"])
def test_text_survives(directory: Path, text: str) -> None:
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_digits_are_single_tokens(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert len(tokenizer.encode("4711")) == len(tokenizer.encode("4")) + 3


def test_most_of_the_vocabulary_is_one_token(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    vocabulary = [*words.NAMES, *words.THINGS, *words.COLORS, *(word for pair in words.OPPOSITES for word in pair)]
    assert sum(len(tokenizer.encode(word)) == 1 for word in vocabulary) > 0.8 * len(vocabulary)


def test_transformers_reads_the_same_tokenizer(directory: Path, transformers: ModuleType) -> None:
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory, legacy=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    for text in ("Anna has a red ball.", "Q: 3 + 4 = ?\nA:"):
        assert theirs(text)["input_ids"] == [1, *ours.encode(text)]


def test_same_text_same_file(directory: Path, tmp_path: Path) -> None:
    train_tokenizer(corpus.texts(corpus.build_corpus(0, SIZES)), tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (directory / "tokenizer.model").read_bytes()
