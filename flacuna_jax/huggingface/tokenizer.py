"""Loads the tokenizer of a checkpoint directory for training: it encodes text, which never becomes a special token.

A pure LLaMA vocabulary (tokenizer.model) is used with SentencePiece, as in the training of LLaMA and Vicuna. All others
are used with tokenizer.json, which transformers and most servers read. If both files exist, they must agree.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from flacuna_jax.errors import UserError
from flacuna_jax.git_lfs import require_content
from flacuna_jax.huggingface.fast_tokenizer import FILE as FAST
from flacuna_jax.huggingface.fast_tokenizer import FastTokenizer
from flacuna_jax.huggingface.files.place import local_checkpoint, require_directory
from flacuna_jax.huggingface.sentencepiece_tokenizer import FILE as SENTENCEPIECE
from flacuna_jax.huggingface.sentencepiece_tokenizer import SentencePieceTokenizer
from flacuna_jax.huggingface.tokenizer_settings import (
    ADDED,
    CONFIG,
    MAP,
    TokenizerSettings,
    read_tokenizer_settings,
    with_new_tokens,
    write_new_tokens,
)

VOCABULARY, MERGES = "vocab.json", "merges.txt"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
FILES = (SENTENCEPIECE, FAST, VOCABULARY, MERGES, CONFIG, MAP, ADDED, *TEMPLATES)
"""The files that belong to a tokenizer."""

AnyTokenizer = SentencePieceTokenizer | FastTokenizer


NewTokens = Sequence[tuple[str, bool]]
"""Spelling of each token that is added to a tokenizer, and whether it is special; in the order of their ids, which
follow those of the vocabulary."""


def load_tokenizer(directory: str | Path, new: NewTokens = ()) -> AnyTokenizer:
    """Loads the tokenizer of a checkpoint directory, or of a model on the Hub (hf:NAME[@REVISION]), with new tokens.

    The first of these is used: tokenizer.model if it is a SentencePiece model without added tokens; tokenizer.json;
    vocab.json and merges.txt (which need transformers); tokenizer.model with added tokens.

    Raises:
      UserError: There is no tokenizer, it is damaged or lacks EOS, two of the files disagree, or a new token is a token
        already.
    """
    directory = require_directory(directory, weights=False)
    for path in tokenizer_files(directory):
        require_content(path)
    settings = read_tokenizer_settings(directory)
    if not new:
        return _load(directory, settings)
    known = _load(directory, settings)
    for content, special in new:
        if (number := token_id(known, content)) is not None:
            key = "data.add_special_tokens" if special else "data.add_tokens"
            raise UserError(
                f"{key}: {content!r} is a token of {directory} already, with id {number}; lora.train_tokens trains it"
            )
    if not any((directory / name).is_file() for name in (FAST, SENTENCEPIECE)):
        raise UserError(f"data.add_tokens: {directory} has no {FAST}; load the tokenizer with transformers and save it")
    return _load(directory, with_new_tokens(settings, new, known.vocab_size))


def token_id(tokenizer: AnyTokenizer, text: str) -> int | None:
    """The id of a text that is a single token, special or not; None for other texts."""
    if text in tokenizer.special.tokens:
        return tokenizer.special.tokens[text].id
    ids = tokenizer.encode(text, first=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_id else None


def _load(directory: Path, settings: TokenizerSettings) -> AnyTokenizer:
    has_fast = (directory / FAST).is_file()
    if (directory / SENTENCEPIECE).is_file() and not _is_tiktoken(directory):
        return _with_sentencepiece(directory, settings, has_fast)
    if has_fast:
        return FastTokenizer.from_file(directory / FAST, settings)
    if (directory / VOCABULARY).is_file() and (directory / MERGES).is_file():
        return _from_merges(directory, settings)
    if (directory / SENTENCEPIECE).is_file():
        raise UserError(
            f"{directory}: {SENTENCEPIECE} is a tiktoken file, as in Meta's releases of Llama 3; copy {FAST} of the "
            f"Hugging Face release to this directory"
        )
    raise UserError(
        f"{directory} has no tokenizer ({SENTENCEPIECE}, {FAST}, or {VOCABULARY} and {MERGES}); copy it from the base "
        f"model, or set model.tokenizer to its directory"
    )


def _with_sentencepiece(directory: Path, settings: TokenizerSettings, has_fast: bool) -> AnyTokenizer:
    if not has_fast:
        return SentencePieceTokenizer(directory / SENTENCEPIECE, settings)
    plain = SentencePieceTokenizer(directory / SENTENCEPIECE, TokenizerSettings(directory, {}, {}, {}))
    fast = FastTokenizer.from_file(directory / FAST, settings)
    if any(number >= plain.vocab_size for number in fast.special.ids):
        return fast
    slow = SentencePieceTokenizer(directory / SENTENCEPIECE, settings)
    _check_agreement(directory, slow, fast)
    # Settings without `legacy` are from LLaMA's first generation, which added a space before every text.
    same_inside = all(slow.encode(text, first=False) == fast.encode(text, first=False) for text in PROBES)
    is_plain = not slow.added and fast.special.ids <= slow.special.ids
    return slow if is_plain and (same_inside or "legacy" not in settings.raw) else fast


def _is_tiktoken(directory: Path) -> bool:
    """Whether a file is of tiktoken, whose lines have a token in base64 and its rank."""
    with open(directory / SENTENCEPIECE, "rb") as file:
        parts = file.readline(1024).split()
    return len(parts) == 2 and parts[1].isdigit()


def _from_merges(directory: Path, settings: TokenizerSettings) -> FastTokenizer:
    """Uses transformers, because splitting text into words for a byte-pair vocabulary depends on the tokenizer's
    class."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(
            f"{directory}: {VOCABULARY} and {MERGES} need transformers (pip install transformers); or save the "
            f"tokenizer as {FAST}"
        ) from None
    try:
        built = AutoTokenizer.from_pretrained(str(directory))
    except Exception as error:
        raise UserError(f"{directory}: transformers cannot read {VOCABULARY} and {MERGES}: {error}") from None
    return FastTokenizer(built.backend_tokenizer, settings)


PROBES = (
    "USER: How are you? ASSISTANT: I'm fine.",
    "two  spaces, a tab\tand\na new line\n\n  indented",
    "naïve façade, Größe, 東京, Привет, 🦙",
    "def f(x):\n    return x**2  # 3.14159",
    "<s> [INST] </s> <unk>",
    "1234567890 €5,000.00",
)
"""Texts on which two tokenizers of one vocabulary differ if their settings differ. No text begins with a space, because
transformers 5 treats it as the space that SentencePiece adds for LLaMA's tokenizer.model; no template begins with
one."""


def _check_agreement(directory: Path, slow: SentencePieceTokenizer, fast: FastTokenizer) -> None:
    """Raises UserError if the two files give different ids, since servers may read either."""
    advice = f"remove the one that does not belong to the model (without {FAST}, transformers makes one)"
    for name in ("bos", "eos"):
        ours, theirs = getattr(slow, f"{name}_id"), getattr(fast, f"{name}_id")
        if ours != theirs:
            raise UserError(
                f"{directory}: {name.upper()} is {ours} in {SENTENCEPIECE} but {theirs} in {FAST}; {advice}"
            )
    for text in PROBES:
        ours, theirs = slow.encode(text), fast.encode(text)
        if ours != theirs:
            place = next(i for i in range(len(ours) + 1) if ours[i : i + 1] != theirs[i : i + 1])
            raise UserError(
                f"{directory}: {SENTENCEPIECE} and {FAST} disagree. Token {place + 1} of {text!r} is "
                f"{ours[place : place + 1]} in one and {theirs[place : place + 1]} in the other; {advice}"
            )


def check_vocabulary(tokenizer: AnyTokenizer, vocab_size: int, directory: str | Path) -> None:
    """Raises `UserError` if the tokenizer can produce ids without a row in the embedding."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{directory}: its tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding {vocab_size} "
            f"rows; they do not belong together"
        )


def has_tokenizer(directory: Path) -> bool:
    """Whether there are files that `load_tokenizer` can load."""
    return any((directory / name).is_file() for name in (SENTENCEPIECE, FAST, VOCABULARY))


def tokenizer_files(directory: str | Path) -> list[Path]:
    """The existing tokenizer files, which are copied with a model."""
    directory = local_checkpoint(directory, weights=False)
    return [directory / name for name in FILES if (directory / name).is_file()]


def copy_new_tokens(source: Path, directory: Path, new: NewTokens) -> None:
    """Adds new tokens to a copy of the tokenizer files of `source`. Raises `UserError` like `load_tokenizer`."""
    if new:
        first = load_tokenizer(source).vocab_size
        settings = with_new_tokens(read_tokenizer_settings(source), new, first)
        write_new_tokens(directory, [settings.added[content] for content, _ in new], FAST)


def tokenizer_fingerprint(directory: str | Path, new: NewTokens = ()) -> str:
    """SHA-256 of everything that token ids depend on: the vocabulary file, and special tokens changed by settings."""
    directory = local_checkpoint(directory, weights=False)
    for names in ((SENTENCEPIECE,), (FAST,), (VOCABULARY, MERGES)):
        if all((directory / name).is_file() for name in names):
            digest = hashlib.sha256(b"".join((directory / name).read_bytes() for name in names))
            break
    else:
        raise UserError(f"{directory} has no tokenizer ({SENTENCEPIECE} or {FAST})")
    tokenizer = load_tokenizer(directory, new)
    if new:
        digest.update(json.dumps(list(new)).encode())
    if isinstance(tokenizer, FastTokenizer) or tokenizer.added:
        tokens = sorted((spelling, *token) for spelling, token in tokenizer.special.tokens.items())
        decisive = [tokens, tokenizer.special.bos, tokenizer.special.eos, list(tokenizer.prefix_ids)]
        digest.update(json.dumps(decisive).encode())
    return digest.hexdigest()
