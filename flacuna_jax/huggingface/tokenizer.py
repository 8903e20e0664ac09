"""Tokenizers as training needs them: text to ids and nothing else. No BOS or EOS is added, and no text can spell one.

`tokenizer.model` goes through SentencePiece directly, which is how LLaMA and Vicuna were trained ("legacy" behaviour in
transformers: every encoded segment gets its own leading space). `tokenizer.json` goes through `tokenizers` where it is
all there is; where both are, they must agree.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.json_file import read_json
from flacuna_jax.huggingface.place import require_directory

SENTENCEPIECE, FAST = "tokenizer.model", "tokenizer.json"
SETTINGS = "tokenizer_config.json"
FILES = (
    SENTENCEPIECE,
    FAST,
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class SentencePieceTokenizer:
    """A SentencePiece model; control pieces (<s>, </s>, <unk>) in text are spelled out, never recognised."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            # SentencePiece raises RuntimeError, OSError or TypeError, depending on where the file is damaged.
            raise UserError(f"{path} is not a SentencePiece model, or is damaged: {error}") from None
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.vocab_size: int = self._model.vocab_size()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{path} has no {'BOS' if self.bos_id < 0 else 'EOS'} token; LLaMA needs both")

    def encode(self, text: str) -> list[int]:
        with _texts([text]):
            return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with _texts(texts):
            return self._model.encode(list(texts), num_threads=1) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; BOS and EOS have none. Ids outside the vocabulary (padding of the embedding) have none."""
        return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size])


class FastTokenizer:
    """A tokenizer.json; its post-processor (which adds BOS) is left out, and special tokens in text are plain text."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise UserError(f"{path} is not a tokenizer, or is damaged: {error}") from None
        settings = _settings(path.parent)
        self.bos_id: int = self._special(path, settings, "bos")
        self.eos_id: int = self._special(path, settings, "eos")
        self._tokenizer = _with_special(self._tokenizer, {self.bos_id, self.eos_id})
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def _special(self, path: Path, settings: dict[str, Any], name: str) -> int:
        spelled = settings.get(f"{name}_token")
        token = spelled.get("content") if isinstance(spelled, dict) else spelled
        found = self._tokenizer.token_to_id(token) if isinstance(token, str) else settings.get(f"{name}_token_id")
        if type(found) is not int:
            raise UserError(f"{path.parent}: {SETTINGS} does not name a {name}_token that {path.name} knows")
        return found

    def encode(self, text: str) -> list[int]:
        with _texts([text]):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with _texts(texts):
            return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; BOS, EOS and other special tokens have none."""
        # tokenizers does not skip those that the vocabulary has besides, as that of TinyStories-656K does.
        text = [int(i) for i in ids if i not in (self.bos_id, self.eos_id)]
        return self._tokenizer.decode(text, skip_special_tokens=True)


def _with_special(tokenizer: tokenizers.Tokenizer, ids: Set[int]) -> tokenizers.Tokenizer:
    """One in which no text spells these tokens, also where tokenizer_config.json alone says that they are special."""
    added = tokenizer.get_added_tokens_decoder()
    if all(added[number].special for number in ids if number in added):
        return tokenizer
    raw = json.loads(tokenizer.to_str())
    for token in raw["added_tokens"]:
        token["special"] |= token["id"] in ids
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


@contextlib.contextmanager
def _texts(texts: Sequence[str]) -> Iterator[None]:
    """Raises UserError for half a surrogate pair, which is what Python makes of bytes that are not UTF-8."""
    try:
        yield
    except (TypeError, RuntimeError):  # as the libraries' bindings have it
        wrong = next((text for text in texts if any("\ud800" <= c <= "\udfff" for c in text)), None)
        if wrong is None:
            raise
        raise UserError(f"{wrong[:60]!r} is not UTF-8 text") from None


def _settings(directory: Path) -> dict[str, Any]:
    """Special tokens by name: from tokenizer_config.json, else special_tokens_map.json, else ids in config.json."""
    settings: dict[str, Any] = {}
    for file in ("config.json", "special_tokens_map.json", SETTINGS):
        if (directory / file).is_file():
            settings |= {key: value for key, value in read_json(directory / file).items() if value is not None}
    return settings


def load_tokenizer(directory: str | Path) -> SentencePieceTokenizer | FastTokenizer:
    """The tokenizer of a checkpoint directory: tokenizer.model if there is one, else tokenizer.json.

    Raises:
      UserError: neither file is there, it is damaged or lacks BOS or EOS, or both are there and disagree.
    """
    directory = require_directory(directory)
    if (directory / SENTENCEPIECE).is_file():
        tokenizer = SentencePieceTokenizer(directory / SENTENCEPIECE)
        if (directory / FAST).is_file():
            _check_agreement(directory, tokenizer, FastTokenizer(directory / FAST))
        return tokenizer
    if (directory / FAST).is_file():
        return FastTokenizer(directory / FAST)
    raise UserError(
        f"{directory} has no tokenizer ({SENTENCEPIECE} or {FAST}); copy it there from the base model, or name its "
        f"directory in model.tokenizer"
    )


_PROBES = (
    "USER: How are you? ASSISTANT: I'm fine.",
    "two  spaces, a tab\tand\na new line\n\n  indented",
    "naïve façade, Größe, 東京, Привет, 🦙",
    "def f(x):\n    return x**2  # 3.14159",
    "<s> [INST] </s> <unk>",
    "1234567890 €5,000.00",
)
"""Texts on which two tokenizers of one vocabulary differ if their settings do. None begins with a space: what
transformers 5 makes of LLaMA's tokenizer.model takes that one for SentencePiece's own, and no template begins so."""


def _check_agreement(directory: Path, slow: SentencePieceTokenizer, fast: FastTokenizer) -> None:
    """Training goes by tokenizer.model, most servers go by tokenizer.json; both must give the same ids."""
    advice = f"remove the one that does not belong to the model (without {FAST}, transformers makes its own)"
    for name in ("bos", "eos"):
        ours, theirs = getattr(slow, f"{name}_id"), getattr(fast, f"{name}_id")
        if ours != theirs:
            raise UserError(f"{directory}: {name.upper()} is {ours} in {SENTENCEPIECE}, {theirs} in {FAST}; {advice}")
    for text in _PROBES:
        ours, theirs = slow.encode(text), fast.encode(text)
        if ours != theirs:
            place = next(i for i in range(len(ours) + 1) if ours[i : i + 1] != theirs[i : i + 1])
            raise UserError(
                f"{directory}: {SENTENCEPIECE} and {FAST} disagree. Token {place + 1} of {text!r} is "
                f"{ours[place : place + 1]} in one and {theirs[place : place + 1]} in the other; {advice}"
            )


def check_vocabulary(tokenizer: SentencePieceTokenizer | FastTokenizer, vocab_size: int, directory: str | Path) -> None:
    """Raises `UserError` where the tokenizer can produce ids that the embedding has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{directory}: its tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {vocab_size} "
            f"rows; they do not belong together"
        )


def tokenizer_files(directory: str | Path) -> list[Path]:
    """The files that travel with a model, those of them that exist."""
    return [Path(directory) / name for name in FILES if (Path(directory) / name).is_file()]


def tokenizer_fingerprint(directory: str | Path) -> str:
    """sha256 of the file that decides ids: tokenizer.model, else tokenizer.json."""
    for name in (SENTENCEPIECE, FAST):
        path = Path(directory) / name
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    raise UserError(f"{directory} has no tokenizer ({SENTENCEPIECE} or {FAST})")
