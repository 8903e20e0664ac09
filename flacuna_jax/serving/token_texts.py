"""The text of single tokens, for log-probabilities."""

import functools

from flacuna_jax.data.tokenization import Tokenizer


class TokenTexts:
    """The text of single tokens, with the spaces in front that decoding a token alone would lose."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", first=False)
        self.of = functools.lru_cache(maxsize=1 << 16)(self._of)

    def _of(self, token: int) -> str:
        special = self._tokenizer.special.spellings.get(token)
        if special is not None:
            return special
        decode = self._tokenizer.decode
        return decode([*self._before, token])[len(decode(self._before)) :]
