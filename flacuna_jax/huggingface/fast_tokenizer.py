"""Loads a tokenizer.json with the `tokenizers` library."""

import contextlib
import json
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from flacuna_jax.data.special_tokens import Special, SpecialTokens
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.tokenizer_settings import CONFIG, TokenizerSettings

FILE = "tokenizer.json"

_ANCHOR = f"\ue000{secrets.token_hex(8)}\ue001"
"""A token that our copy of a tokenizer adds before a text that does not begin its sequence, because some tokenizers add
a space only before the first text."""


class FastTokenizer:
    """Encodes texts without the tokens of the post-processor, and special tokens in texts as plain text.

    Args:
      tokenizer: From a file or from transformers.
      settings: The settings of its directory.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
        tokenizer = _with_added(tokenizer, settings)
        self.special = _special_tokens(tokenizer, settings)
        prefix = _prefix(tokenizer, self.special)
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id = None if self.special.bos is None else self.special.tokens[self.special.bos].id
        self.eos_id = self.special.tokens[self.special.eos].id
        self.prefix_ids: tuple[int, ...] = prefix
        self.unk_id: int | None = _unknown(tokenizer, settings)
        self._tokenizer = _with_flags(tokenizer, self.special)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.add_tokens([tokenizers.AddedToken(_ANCHOR, normalized=False)])

    @classmethod
    def from_file(cls, path: Path, settings: TokenizerSettings) -> "FastTokenizer":
        """Loads a file. Raises UserError if it is damaged or has no EOS."""
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise UserError(f"{path} is not a tokenizer, or is damaged: {error}") from None
        return cls(tokenizer, settings)

    def described(self) -> dict[str, Any]:
        """The content of a tokenizer.json, in which tokens are special that are so in the settings."""
        content = json.loads(self._tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != _ANCHOR]
        return content

    def encode(self, text: str, first: bool = True) -> list[int]:
        return self.encode_batch([text], [first])[0]

    def encode_batch(self, texts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        anchored = [False] * len(texts) if first is None else [not one for one in first]
        marked = [_ANCHOR + text if behind else text for text, behind in zip(texts, anchored, strict=True)]
        with utf8_texts(texts):
            encodings = self._tokenizer.encode_batch_fast(marked, add_special_tokens=False)
        return [one.ids[1:] if behind else one.ids for one, behind in zip(encodings, anchored, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        skipped = self.special.ids
        return self._tokenizer.decode([int(i) for i in ids if i not in skipped], skip_special_tokens=True)


def _with_added(tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> tokenizers.Tokenizer:
    """Adds the tokens that are in tokenizer_config.json but not in tokenizer.json, as transformers does."""
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in sorted(settings.added.values()):
        if token.content in present:
            continue
        entry = tokenizers.AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([entry])
        if tokenizer.token_to_id(token.content) != token.id:
            raise UserError(
                f"{settings.directory}: {CONFIG} gives {token.content!r} the id {token.id}, but {FILE} would give it "
                f"{tokenizer.token_to_id(token.content)}"
            )
    return tokenizer


def _special_tokens(tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> SpecialTokens:
    bos, eos = (_spelling(tokenizer, settings, name) for name in ("bos", "eos"))
    if eos is None:
        raise UserError(f"{settings.directory}: {CONFIG} does not name an eos_token that {FILE} knows")
    tokens: dict[str, Special] = {}
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if token.special or token.content in settings.special or token.content in (bos, eos):
            tokens[token.content] = Special(number, token.lstrip, token.rstrip)
    for spelling in (bos, eos):
        known = None if spelling is None else tokenizer.token_to_id(spelling)
        if spelling is not None and known is not None and spelling not in tokens:
            tokens[spelling] = Special(known)
    return SpecialTokens(tokens, bos, eos, settings.variables)


def _spelling(tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings, name: str) -> str | None:
    """The spelling of "bos" or "eos": from the tokenizer's settings, or else by the id in config.json."""
    spelled = settings.spelled(name)
    if spelled is not None:
        if tokenizer.token_to_id(spelled) is None:
            raise UserError(f"{settings.directory}: {CONFIG} has {spelled!r} as {name}_token, which is not in {FILE}")
        return spelled
    number = settings.id_in_model(name)
    if settings.denies(name) or number is None:
        return None
    added = tokenizer.get_added_tokens_decoder().get(number)
    return tokenizer.id_to_token(number) if added is None else added.content


def _prefix(tokenizer: tokenizers.Tokenizer, special: SpecialTokens) -> tuple[int, ...]:
    """The ids that are added before a plain text. Like transformers, uses the post-processor of tokenizer.json if it
    and add_bos_token in the settings disagree."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    begin = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(number for number in whole[:begin] if number in special.ids)


def _unknown(tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> int | None:
    """The id of unknown characters; None for a vocabulary with all bytes."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("byte_fallback") and tokenizer.token_to_id("<0x00>") is not None:
        return None
    if "unk_id" in model:
        return model["unk_id"]
    spelled = model.get("unk_token")
    return None if spelled is None else tokenizer.token_to_id(spelled)


def _with_flags(tokenizer: tokenizers.Tokenizer, special: SpecialTokens) -> tokenizers.Tokenizer:
    """A copy in which texts never become special tokens, including tokens that are special only in the settings."""
    added = tokenizer.get_added_tokens_decoder()
    if all(added[number].special for number in special.ids if number in added):
        return tokenizer
    raw = json.loads(tokenizer.to_str())
    for token in raw["added_tokens"]:
        token["special"] |= token["id"] in special.ids
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


@contextlib.contextmanager
def utf8_texts(texts: Sequence[str]) -> Iterator[None]:
    """Raises UserError for half a surrogate pair, which Python creates from bytes that are not UTF-8."""
    try:
        yield
    except (TypeError, RuntimeError):  # the exceptions of the libraries' bindings
        wrong = next((text for text in texts if any("\ud800" <= c <= "\udfff" for c in text)), None)
        if wrong is None:
            raise
        raise UserError(f"{wrong[:60]!r} is not UTF-8 text") from None
