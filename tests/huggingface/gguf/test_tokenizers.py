"""Tokenizers in GGUF files: SentencePiece and `tokenizers` encode like the tokenizers made from the metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.answer_ends import checkpoint_ends
from flacuna_jax.huggingface.chat_template import read_chat_template
from flacuna_jax.huggingface.files.place import local_checkpoint
from flacuna_jax.huggingface.gguf.pre_tokenizers import SPLITTINGS
from flacuna_jax.huggingface.gguf.tokenizer_metadata import tokenizer_metadata
from flacuna_jax.huggingface.tokenizer import PROBES, load_tokenizer
from tests.huggingface.gguf.files import gguf, llama_metadata, llama_tensors, write

TEXTS = (*PROBES, "I'M here; 12345 67,8  9", "a/b//c\r\n\r\n  CamelCase...!?", "</s> and <s>[INST]")


def opened(path: Path, metadata: Mapping[str, Any]) -> Any:
    """The tokenizer of a file whose other content is that of a small LLaMA."""
    own = {key: value for key, value in llama_metadata().items() if not key.startswith("tokenizer")}
    return load_tokenizer(write(path, own | dict(metadata), llama_tensors()))


def test_a_sentencepiece_vocabulary_as_llama_cpp_writes_it(llama_tokenizer: Path, tmp_path: Path) -> None:
    tokens, scores, types = zip(*gguf.vocab.SentencePieceVocab(llama_tokenizer).all_tokens(), strict=True)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [token.decode() for token in tokens],
        "tokenizer.ggml.scores": [float(score) for score in scores],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
    }
    ours = opened(tmp_path / "x.gguf", metadata)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(llama_tokenizer / "tokenizer.model"))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(theirs.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.prefix_ids, ours.unk_id) == (1, 2, (1,), None)


def test_exported_metadata_of_a_sentencepiece_vocabulary(llama_tokenizer: Path) -> None:
    made = tokenizer_metadata(llama_tokenizer, 32000)
    tokens = [
        (token.decode(), score, int(kind))
        for token, score, kind in gguf.vocab.SentencePieceVocab(llama_tokenizer).all_tokens()
    ]
    keys = ("tokens", "scores", "token_type")
    assert list(zip(*(made[f"tokenizer.ggml.{key}"] for key in keys), strict=True)) == tokens
    assert made["tokenizer.ggml.add_bos_token"] is True


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    words = (
        "the capital of France is Paris; don't you'LL see 12345 and 67 words, naïve façades 東京 def f(x): return x**2"
    )
    return [" ".join(words.split()[start:]) + " \n\n " for start in range(len(words.split()))] * 3


def byte_level(splitting: str, corpus: list[str]) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer(models.BPE(ignore_merges=SPLITTINGS[splitting].whole_words))
    built.pre_tokenizer = SPLITTINGS[splitting].pre_tokenizer
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>", "<|im_end|>"]
    built.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    )
    return built


@pytest.mark.parametrize("splitting", ["gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "tekken", "gpt-4o"])
def test_a_byte_level_vocabulary_comes_back(splitting: str, corpus: list[str], tmp_path: Path) -> None:
    built = byte_level(splitting, corpus)
    source = tmp_path / "source"
    source.mkdir()
    built.save(str(source / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    metadata = tokenizer_metadata(source, 410)
    assert metadata["tokenizer.ggml.pre"] == splitting
    assert metadata["tokenizer.ggml.tokens"][409] == "[PAD409]"
    tokenizer = opened(tmp_path / "x.gguf", metadata)
    for text in TEXTS:
        assert tokenizer.encode(text) == built.encode(text, add_special_tokens=False).ids, text
    assert set(tokenizer.special.tokens) == {"<|begin|>", "<|end|>", "<|im_end|>"}
    assert (tokenizer.eos_id, tokenizer.prefix_ids) == (2, ())
    directory = local_checkpoint(tmp_path / "x.gguf")
    assert checkpoint_ends(directory) == (2, 1)
    template = read_chat_template(directory)
    assert template is not None
    assert template.sources == {"default": "{{ messages[0].content }}"}


@pytest.mark.parametrize(
    ("splitting", "repository_regex"),
    [
        (
            "llama-bpe",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+",
        ),
        (
            "qwen2",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+",
        ),
    ],
)
def test_splittings_are_those_of_published_tokenizers(splitting: str, repository_regex: str) -> None:
    assert SPLITTINGS[splitting].patterns == (repository_regex,)


def test_other_tokenizers_cannot_be_exported(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "b"}))
    word_level = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    word_level.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no tokenizer of type WordLevel"):
        tokenizer_metadata(tmp_path, 2)
    spaces = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    spaces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    spaces.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"^mine: .* splits words in a way for which llama\.cpp has no name"):
        tokenizer_metadata(tmp_path, 2, origin=Path("mine"))
