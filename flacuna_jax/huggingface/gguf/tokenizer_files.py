"""tokenizer.json and tokenizer_config.json from the metadata of a GGUF file.

Files have one of two kinds of tokenizers: byte-level BPE with merges ("gpt2"), whose way of splitting words is given by
a name, and SentencePiece with scores ("llama"), which is written as BPE with the merges that the scores imply.
"""

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.gguf.header import Header
from flacuna_jax.huggingface.gguf.pre_tokenizers import SPLITTINGS

KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
TEMPLATES = "tokenizer.chat_templates"
NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Name in tokenizer_config.json → name in tokenizer.ggml.…_token_id."""
_SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}
"""Special tokens of a SentencePiece vocabulary whose file does not have them."""
SPACE = "▁"


class TokenType(enum.IntEnum):
    """The type of a token, as in SentencePiece."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def tokenizer_files_of(header: Header) -> dict[str, str | Mapping[str, Any]]:
    """Name → content of the files.

    Raises:
      UserError: the file has no tokenizer, or one that is not supported.
    """
    tokens = header.get(f"{KEY}tokens", list)
    if not tokens or len(set(tokens)) != len(tokens):
        raise UserError(f"{header.path} has no tokenizer ({KEY}tokens), or its tokens are not distinct")
    types = header.get(f"{KEY}token_type", list) or [TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"{header.path} has {len(tokens)} tokens, but types of {len(types)}")
    kind = header.get(f"{KEY}model", str)
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{header.path}: its tokenizer is {kind!r}; supported are gpt2 and llama")
    named = _named_tokens(header, tokens, {} if kind == "gpt2" else _SENTENCEPIECE_IDS)
    if kind == "gpt2":
        built, adds_bos = _byte_level(header, tokens)
    else:
        built, adds_bos = _sentencepiece(header, tokens, types, named["unk"]), True
    adds = {
        "bos": header.get(f"{KEY}add_bos_token", bool, adds_bos),
        "eos": header.get(f"{KEY}add_eos_token", bool, False),
    }
    _mark(built, tokens, types)
    _put_around(built, {name: token for name, token in named.items() if token is not None and adds.get(name)})
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in named.items()},
        **{f"add_{name}_token": added for name, added in adds.items()},
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": built.to_str(), "tokenizer_config.json": settings | _templates(header)}


def _named_tokens(header: Header, tokens: Sequence[str], default: Mapping[str, int]) -> dict[str, str | None]:
    """The spellings of special tokens by name."""
    found: dict[str, str | None] = {}
    for name, theirs in NAMES.items():
        number = header.get(f"{KEY}{theirs}_token_id", int, default.get(name))
        if number is not None and not 0 <= number < len(tokens):
            raise UserError(f"{header.path}: {KEY}{theirs}_token_id is {number}, but there are {len(tokens)} tokens")
        found[name] = None if number is None else tokens[number]
    return found


def _byte_level(header: Header, tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether it adds BOS if the file does not say so."""
    name = header.get(f"{KEY}pre", str, "default")
    if name not in SPLITTINGS:
        raise UserError(
            f"{header.path}: {KEY}pre is {name!r}, an unknown way of splitting words; known are {', '.join(SPLITTINGS)}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in header.get(f"{KEY}merges", list, [])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=SPLITTINGS[name].whole_words)
    except Exception as error:
        raise UserError(f"{header.path}: its tokenizer is damaged: {error}") from None
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = SPLITTINGS[name].pre_tokenizer
    built.decoder = decoders.ByteLevel()
    return built, SPLITTINGS[name].adds_bos


def _sentencepiece(
    header: Header, tokens: Sequence[str], types: Sequence[int], unknown: str | None
) -> tokenizers.Tokenizer:
    scores = header.get(f"{KEY}scores", list)
    if scores is None or len(scores) != len(tokens):
        raise UserError(f"{header.path} has no score for each of its {len(tokens)} tokens ({KEY}scores)")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = _merges(vocabulary, types, scores)
    built = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=TokenType.BYTE in types, fuse_unk=True, unk_token=unknown)
    )
    before = header.get(f"{KEY}add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", SPACE)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if before else spaces
    after = [decoders.Strip(" ", 1, 0)] if before else []
    built.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return built


def _merges(vocabulary: Mapping[str, int], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The pairs that SentencePiece joins, the highest score of a result first."""
    found = []
    normal = {token: number for token, number in vocabulary.items() if types[number] == TokenType.NORMAL}
    for token, number in normal.items():
        for cut in range(1, len(token)):
            left, right = normal.get(token[:cut]), normal.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[number], left, right, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]


def _mark(built: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Marks special tokens, and those that are recognised in any text."""
    for kind, is_special in ((TokenType.UNKNOWN, True), (TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [
            tokenizers.AddedToken(token, normalized=False, special=is_special)
            for token, of_token in zip(tokens, types, strict=True)
            if of_token == kind
        ]
        (built.add_special_tokens if is_special else built.add_tokens)(added)


def _put_around(built: tokenizers.Tokenizer, around: Mapping[str, str]) -> None:
    """Puts BOS before, and EOS after a text."""
    if not around:
        return
    single = [around[name] if name != "text" else "$A" for name in ("bos", "text", "eos") if name in (*around, "text")]
    ids = [(token, built.token_to_id(token)) for token in set(around.values())]
    built.post_processor = processors.TemplateProcessing(single=" ".join(single), special_tokens=ids)


def _templates(header: Header) -> dict[str, Any]:
    default = header.get(TEMPLATE, str)
    names = header.get(TEMPLATES, list, [])
    if default is None:
        return {}
    named = [{"name": name, "template": header.get(f"{TEMPLATE}.{name}", str, "")} for name in names]
    return {"chat_template": [{"name": "default", "template": default}, *named] if named else default}
