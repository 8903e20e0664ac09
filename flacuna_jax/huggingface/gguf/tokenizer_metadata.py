"""Metadata of a GGUF file that describe a tokenizer and its chat template; `tokenizer_files` reads them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.answer_ends import checkpoint_ends
from flacuna_jax.huggingface.chat_template import read_chat_template
from flacuna_jax.huggingface.fast_tokenizer import FastTokenizer
from flacuna_jax.huggingface.gguf.pre_tokenizers import SPLITTINGS
from flacuna_jax.huggingface.gguf.tokenizer_files import KEY, NAMES, SPACE, TEMPLATE, TEMPLATES, TokenType
from flacuna_jax.huggingface.sentencepiece_tokenizer import SentencePieceTokenizer
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.huggingface.tokenizer_settings import read_tokenizer_settings

_MORE_ENDS = ("eot", "eom")
"""Names under which files have further tokens that end an answer."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_TEXTS = (
    "I'm here, WE'LL see: 12345 67,8  9 and ２３",
    "naïve façade, Größe, 東京, Привет, 🦙",
    "def f(x):\n    return x**2  # 3.14159\n\n\n\tend",
    "a/b//c \r\n\r\n  <b>CamelCase</b>...!?  ",
)
"""Texts that every splitting of words divides in another way."""


class Token(NamedTuple):
    """A token of a GGUF file."""

    text: str
    score: float
    type: TokenType


def tokenizer_metadata(directory: Path, vocab_size: int, *, origin: Path | None = None) -> dict[str, Any]:
    """The metadata of the tokenizer and chat template of a checkpoint directory.

    Args:
      directory: with tokenizer files, and generation_config.json.
      vocab_size: rows of the embedding; ids without a token get names that no text contains.
      origin: the directory that messages name, if the files were copied from it.

    Raises:
      UserError: llama.cpp has no tokenizer of this kind.
    """
    tokenizer, settings = load_tokenizer(directory), read_tokenizer_settings(directory)
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = tokenizer.pieces()
        tokens = {number: Token(text, score, TokenType(kind)) for number, (text, score, kind) in pieces.items()}
        made: dict[str, Any] = {"model": "llama", "pre": "default", "add_space_prefix": True}
    else:
        tokens, made = _of_json(tokenizer, origin or directory)
    rows = [tokens.get(number, Token(f"[PAD{number}]", -1000.0, TokenType.UNUSED)) for number in range(vocab_size)]
    made |= {"tokens": [row.text for row in rows], "token_type": [int(row.type) for row in rows]}
    if made["model"] == "llama":
        made["scores"] = [row.score for row in rows]
    ids = {row.text: number for number, row in enumerate(rows)}
    unknown = next((row.text for row in rows if row.type is TokenType.UNKNOWN), settings.spelled("unk"))
    used = {"bos": tokenizer.special.bos, "eos": tokenizer.special.eos, "unk": unknown}
    for name, theirs in NAMES.items():
        spelled = settings.spelled(name) if name == "pad" else used[name]
        if spelled in ids:
            made[f"{theirs}_token_id"] = ids[spelled]
    others = [end for end in checkpoint_ends(directory) if end != tokenizer.eos_id]
    made |= {f"{name}_token_id": end for name, end in zip(_MORE_ENDS, others, strict=False)}
    made |= {"add_bos_token": bool(tokenizer.prefix_ids), "add_eos_token": False}
    return {f"{KEY}{key}": value for key, value in made.items()} | _template(directory)


def _template(directory: Path) -> dict[str, Any]:
    found = read_chat_template(directory)
    if found is None:
        return {}
    others = {name: text for name, text in found.sources.items() if name != "default"}
    named = {f"{TEMPLATE}.{name}": text for name, text in others.items()}
    return {TEMPLATE: found.sources["default"], **named, **({TEMPLATES: list(others)} if others else {})}


def _of_json(tokenizer: FastTokenizer, directory: Path) -> tuple[dict[int, Token], dict[str, Any]]:
    described = tokenizer.described()
    model = described["model"]
    if model["type"] != "BPE":
        raise UserError(f"{directory}: llama.cpp has no tokenizer of type {model['type']}; only BPE can be exported")
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    added = {
        token["id"]: Token(token["content"], -1000.0, TokenType.CONTROL if is_special else TokenType.USER_DEFINED)
        for token in described["added_tokens"]
        for is_special in [token["special"] or token["id"] in tokenizer.special.ids]
    }
    if model.get("byte_fallback"):
        tokens = _with_scores(model, merges)
        before = _puts_space(described)
        return tokens | _without_unknown(added, model), {"model": "llama", "pre": "default", "add_space_prefix": before}
    tokens = {number: Token(text, 0.0, TokenType.NORMAL) for text, number in model["vocab"].items()}
    made = {"model": "gpt2", "pre": _splitting(described, model, directory), "merges": [" ".join(m) for m in merges]}
    return tokens | added, made


def _with_scores(model: Mapping[str, Any], merges: Sequence[Sequence[str]]) -> dict[int, Token]:
    """The tokens of a SentencePiece vocabulary, whose scores give the order of merges."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    tokens = {}
    for text, number in model["vocab"].items():
        kind = TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        if text == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        score = -float(rank.get(text, len(merges) + number))
        tokens[number] = Token(text, score if kind is TokenType.NORMAL else 0.0, kind)
    return tokens


def _without_unknown(added: Mapping[int, Token], model: Mapping[str, Any]) -> dict[int, Token]:
    return {number: token for number, token in added.items() if token.text != model.get("unk_token")}


def _puts_space(described: Mapping[str, Any]) -> bool:
    """Whether a space is put in front of a text, by a normalizer or a pre-tokenizer."""
    parts = _without_vocabulary(described)
    text = "a" if parts.normalizer is None else parts.normalizer.normalize_str("a")
    if parts.pre_tokenizer is not None:
        text = parts.pre_tokenizer.pre_tokenize_str(text)[0][0]
    return text.startswith(SPACE)


def _without_vocabulary(described: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer without its vocabulary, which keeps the normalizer and the pre-tokenizer."""
    parts = {key: described.get(key) for key in ("normalizer", "pre_tokenizer")}
    return tokenizers.Tokenizer.from_str(
        json.dumps(json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()) | parts)
    )


def _splitting(described: Mapping[str, Any], model: Mapping[str, Any], directory: Path) -> str:
    """The name of the splitting that divides texts as this tokenizer does."""
    own = _without_vocabulary(described).pre_tokenizer
    if own is not None:
        divided = [own.pre_tokenize_str(text) for text in _TEXTS]
        for name, splitting in SPLITTINGS.items():
            if splitting.whole_words != bool(model.get("ignore_merges")):
                continue
            known = splitting.pre_tokenizer
            if all(known.pre_tokenize_str(text) == parts for text, parts in zip(_TEXTS, divided, strict=True)):
                return name
    raise UserError(f"{directory}: tokenizer.json splits words in a way for which llama.cpp has no name known here")
