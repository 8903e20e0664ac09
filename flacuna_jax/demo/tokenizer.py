"""Trains the demo's tokenizer: SentencePiece BPE with byte fallback and LLaMA's conventions, in a few seconds."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

VOCAB_SIZE = 1536


def train_tokenizer(texts: Iterable[str], directory: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Writes `tokenizer.model` and `tokenizer_config.json` as in a Hugging Face LLaMA directory.

    Like LLaMA's: unk 0, BOS 1, EOS 2, no padding token, single digits, bytes for unknown characters, a dummy prefix
    space, and no normalisation, so that decoding returns exactly the encoded text.

    Args:
      texts: the training text, a sentence or a turn each; the order only affects equally frequent pieces.
      directory: created if it does not exist.
      vocab_size: at least 3 + 256 bytes + the characters of the text.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
        "model_max_length": 2048,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
