"""Loads a tokenizer.model with SentencePiece, as in the training of LLaMA and Vicuna ("legacy" in transformers: every
text after a special token gets a leading space)."""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from flacuna_jax.data.special_tokens import Special, SpecialTokens
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.fast_tokenizer import utf8_texts
from flacuna_jax.huggingface.tokenizer_settings import AddedToken, TokenizerSettings

FILE = "tokenizer.model"


class SentencePieceTokenizer:
    """A SentencePiece model and the tokens that were added to it. Control pieces and special tokens in a text are
    encoded as plain text; other added tokens are recognised, as in transformers."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise UserError(f"{path} is not a SentencePiece model, or is damaged: {error}") from None
        pieces = self._model.vocab_size()
        self.added = {t.content: t for t in settings.added.values() if self._is_added(t, settings)}
        self._plain = {content: token for content, token in self.added.items() if not token.special}
        self._contents = {token.id: content for content, token in self.added.items()}
        self.special = self._special_tokens(path, settings)
        self.bos_id = None if self.special.bos is None else self.special.tokens[self.special.bos].id
        self.eos_id: int = self.special.tokens[self.special.eos].id
        self.prefix_ids: tuple[int, ...] = () if self.bos_id is None or not settings.puts_bos else (self.bos_id,)
        self.vocab_size: int = max([pieces - 1, *self._contents]) + 1
        unknown = self._model.unk_id()
        has_bytes = pieces > 0 and any(self._model.is_byte(i) for i in range(min(pieces, 300)))
        self.unk_id: int | None = None if has_bytes or unknown < 0 else unknown
        self._legacy = settings.raw.get("legacy") is not False
        self._newline = len(self._model.encode("\n"))

    def _is_added(self, token: AddedToken, settings: TokenizerSettings) -> bool:
        """Whether a token is not a piece of the model. Raises UserError if its id is that of another piece."""
        if token.id < self._model.vocab_size():
            piece = self._model.id_to_piece(token.id)
            if piece == token.content and token.special and token.id in self._model.encode(piece):
                raise UserError(
                    f"{settings.directory}: {token.content!r} is special, but {FILE} encodes it in any text; load the "
                    f"tokenizer with transformers and save it as tokenizer.json"
                )
            return piece != token.content and token.content != self._model.decode([token.id])
        return True

    def _special_tokens(self, path: Path, settings: TokenizerSettings) -> SpecialTokens:
        tokens = {
            self._model.id_to_piece(i): Special(i)
            for i in range(self._model.vocab_size())
            if self._model.is_control(i) or self._model.is_unknown(i)
        }
        tokens |= {t.content: Special(t.id, t.lstrip, t.rstrip) for t in self.added.values() if t.special}
        for token in settings.added.values():
            if token.content in tokens:
                tokens[token.content] = Special(tokens[token.content].id, token.lstrip, token.rstrip)
        bos = self._spelling("bos", self._model.bos_id(), tokens, settings)
        eos = self._spelling("eos", self._model.eos_id(), tokens, settings)
        if eos is None:
            raise UserError(f"{path} has no EOS token, and neither has tokenizer_config.json")
        for spelling in (bos, eos):
            if spelling is not None and spelling not in tokens:
                number = self._id(spelling)
                if number is None:
                    raise UserError(
                        f"{settings.directory}: tokenizer_config.json has {spelling!r}, which is not in {FILE}"
                    )
                tokens[spelling] = Special(number)
        return SpecialTokens(tokens, bos, eos, settings.variables)

    def _spelling(self, name: str, number: int, tokens: dict[str, Special], settings: TokenizerSettings) -> str | None:
        """The spelling in the settings, or else that of the model."""
        if settings.denies(name):
            return None
        spelled = settings.spelled(name)
        if spelled is not None:
            return spelled
        return self._model.id_to_piece(number) if number >= 0 else None

    def _id(self, content: str) -> int | None:
        if content in self.added:
            return self.added[content].id
        number = self._model.piece_to_id(content)
        return None if number == self._model.unk_id() else number

    def pieces(self) -> dict[int, tuple[str, float, int]]:
        """id → piece, score and type (of SentencePiece: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6
        byte); added tokens are control or user-defined."""
        model, found = self._model, {}
        tests = ((model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6))
        for number in range(model.vocab_size()):
            kind = next((kind for is_of, kind in tests if is_of(number)), 1)
            found[number] = (model.id_to_piece(number), model.get_score(number), kind)
        for token in self.added.values():
            found[token.id] = (token.content, -1000.0, 3 if token.special else 4)
        return found

    def encode(self, text: str, first: bool = True) -> list[int]:
        return self.encode_batch([text], [first])[0]

    def encode_batch(self, texts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        if not texts:
            return []
        with utf8_texts(texts):
            if self._legacy and not self._plain:
                return self._model.encode(list(texts), num_threads=1)
            begins = [True] * len(texts) if first is None else first
            return [self._in_sections(text, begin) for text, begin in zip(texts, begins, strict=True)]

    def _in_sections(self, text: str, first: bool) -> list[int]:
        """Splits the text at added tokens, as transformers does, and encodes each part."""
        ids: list[int] = []
        for section, token in self._sections(text):
            if token is not None:
                ids.append(token.id)
            elif self._legacy or (first and not ids):
                ids += self._model.encode(section)
            else:
                ids += self._model.encode("\n" + section)[self._newline :]
        return ids

    def _sections(self, text: str) -> Iterator[tuple[str, AddedToken | None]]:
        start = 0
        for match in self._added_pattern.finditer(text) if self._plain else ():
            token = self._plain[match[0]]
            before = text[start : match.start()]
            before = before.rstrip() if token.lstrip else before
            if before:
                yield before, None
            yield match[0], token
            rest = text[match.end() :]
            start = match.end() + (len(rest) - len(rest.lstrip()) if token.rstrip else 0)
        if text[start:]:
            yield text[start:], None

    @functools.cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(content) for content in sorted(self._plain, key=len, reverse=True)))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens and ids outside of the vocabulary (padding of the embedding)."""
        skipped = self.special.ids
        kept = [int(i) for i in ids if i not in skipped]
        if not self._contents:
            return self._model.decode([i for i in kept if 0 <= i < self.vocab_size])
        parts: list[str] = []
        run: list[int] = []
        for number in kept:
            if number in self._contents:
                parts += [self._model.decode(run), self._contents[number]]
                run = []
            elif 0 <= number < self._model.vocab_size():
                run.append(number)
        return "".join([*parts, self._model.decode(run)])
