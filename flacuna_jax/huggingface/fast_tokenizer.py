"""A tokenizer.json, by the `tokenizers` library."""

import contextlib
import json
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from flacuna_jax.data.special_tokens import Special, SpecialTokens
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.tokenizer_settings import CONFIG, TokenizerSettings

FILE = "tokenizer.json"

_ANCHOR = f"\ue000{secrets.token_hex(8)}\ue001"
"""A token of our copy of a tokenizer that stands in front of a text which does not begin its sequence: some tokenizers
put a space in front of the first text alone."""


class FastTokenizer:
    """Encodes texts without what the post-processor adds, and special tokens in texts as plain text.

    Args:
      tokenizer: From a file, or as transformers built it.
      settings: Of the directory it comes from.
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
        """Raises UserError where the file is damaged, or has no EOS."""
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise UserError(f"{path} is not a tokenizer, or is damaged: {error}") from None
        return cls(tokenizer, settings)

    def encode(self, text: str, first: bool = True) -> list[int]:
        return self.encode_batch([text], [first])[0]

    def encode_batch(self, texts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        anchored = [False] * len(texts) if first is None else [not one for one in first]
        marked = [_ANCHOR + text if behind else text for text, behind in zip(texts, anchored, strict=True)]
        with utf8_texts(texts):
            encodings = self._tokenizer.encode_batch_fast(marked, add_special_tokens=False)
        return [one.ids[1:] if behind else one.ids for one, behind in zip(encodings, anchored, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens have none."""
        skipped = self.special.ids
        return self._tokenizer.decode([int(i) for i in ids if i not in skipped], skip_special_tokens=True)


def _with_added(tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> tokenizers.Tokenizer:
    """With the tokens that tokenizer_config.json adds and tokenizer.json lacks, as transformers adds them."""
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in sorted(settings.added.values()):
        if token.content in present:
            continue
        entry = tokenizers.AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([entry])
        if tokenizer.token_to_id(token.content) != token.id:
            raise UserError(
                f"{settings.directory}: {CONFIG} gives {token.content!r} the id {token.id}, {FILE} would give it "
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
    """How "bos" or "eos" is spelled: as the tokenizer's settings say, else by the id in config.json."""
    spelled = settings.spelled(name)
    if spelled is not None:
        if tokenizer.token_to_id(spelled) is None:
            raise UserError(f"{settings.directory}: {CONFIG} names {spelled!r} as {name}_token, which {FILE} lacks")
        return spelled
    number = settings.id_in_model(name)
    if settings.denies(name) or number is None:
        return None
    added = tokenizer.get_added_tokens_decoder().get(number)
    return tokenizer.id_to_token(number) if added is None else added.content


def _prefix(tokenizer: tokenizers.Tokenizer, special: SpecialTokens) -> tuple[int, ...]:
    """What goes in front of a plain text. transformers goes by the post-processor of tokenizer.json, too, and not by
    add_bos_token in the settings, where the two disagree."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    begin = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(number for number in whole[:begin] if number in special.ids)


def _unknown(tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> int | None:
    """The id of characters outside of the vocabulary; None for a vocabulary that has all bytes."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("byte_fallback") and tokenizer.token_to_id("<0x00>") is not None:
        return None
    if "unk_id" in model:
        return model["unk_id"]
    spelled = model.get("unk_token")
    return None if spelled is None else tokenizer.token_to_id(spelled)


def _with_flags(tokenizer: tokenizers.Tokenizer, special: SpecialTokens) -> tokenizers.Tokenizer:
    """One in which no text spells a special token, also where only the settings say that it is special."""
    added = tokenizer.get_added_tokens_decoder()
    if all(added[number].special for number in special.ids if number in added):
        return tokenizer
    raw = json.loads(tokenizer.to_str())
    for token in raw["added_tokens"]:
        token["special"] |= token["id"] in special.ids
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


@contextlib.contextmanager
def utf8_texts(texts: Sequence[str]) -> Iterator[None]:
    """Raises UserError for half a surrogate pair, which is what Python makes of bytes that are not UTF-8."""
    try:
        yield
    except (TypeError, RuntimeError):  # as the libraries' bindings have it
        wrong = next((text for text in texts if any("\ud800" <= c <= "\udfff" for c in text)), None)
        if wrong is None:
            raise
        raise UserError(f"{wrong[:60]!r} is not UTF-8 text") from None
