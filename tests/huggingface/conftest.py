"""Fixtures of the Hugging Face tests; checkpoints are made if torch is installed."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sentencepiece

if TYPE_CHECKING:
    from tests.huggingface.checkpoints import Written


@pytest.fixture(scope="session")
def tiny_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a SentencePiece model like LLaMA's (BPE, byte fallback, <unk> <s> </s>), 300 pieces."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    corpus = directory / "corpus.txt"
    words = (
        "the",
        "user",
        "asked",
        "a",
        "question",
        "about",
        "lists",
        "and",
        "assistant",
        "gave",
        "helpful",
        "answers",
    )
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 9)) for i in range(1, 400)]
    corpus.write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return directory


@pytest.fixture(scope="session", params=["plain", "grouped", "tied"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Written":
    """One checkpoint per architecture, float32 safetensors in one file."""
    checkpoints = pytest.importorskip("tests.huggingface.checkpoints", reason="checkpoints are written by torch")
    return checkpoints.write(checkpoints.ARCHITECTURES[request.param], tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> "Written":
    """The plain architecture in half precision, like Vicuna."""
    checkpoints = pytest.importorskip("tests.huggingface.checkpoints", reason="checkpoints are written by torch")
    return checkpoints.write(checkpoints.SMALL, tmp_path_factory.mktemp("half"), half=True)
