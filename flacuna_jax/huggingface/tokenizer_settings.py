"""Settings in a tokenizer's JSON files: spellings of special tokens, added tokens, and whether BOS is added.

The files are those of transformers: tokenizer_config.json, special_tokens_map.json and added_tokens.json. config.json
has the ids of BOS and EOS for checkpoints without these files.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.json_file import read_json

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

_LISTS = ("additional_special_tokens", "extra_special_tokens", "chat_control_tokens")
"""Settings that list additional special tokens."""


class AddedToken(NamedTuple):
    """A token that was added to a vocabulary, with the flags of `tokenizers.AddedToken`."""

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of one directory.

    Attributes:
      directory: The directory of the files.
      raw: The merged keys of special_tokens_map.json and tokenizer_config.json; the latter takes precedence.
      model: The content of config.json; {} if the file does not exist.
      added: Tokens added by added_tokens.json and tokenizer_config.json, by content.
    """

    directory: Path
    raw: Mapping[str, Any]
    model: Mapping[str, Any]
    added: Mapping[str, AddedToken]

    def spelled(self, name: str) -> str | None:
        """The spelling of "bos", "eos", "unk" or "pad"; None if it is in no file."""
        return _content(self.raw.get(f"{name}_token"))

    def denies(self, name: str) -> bool:
        """Whether tokenizer_config.json sets the token to null."""
        return f"{name}_token" in self.raw and self.raw[f"{name}_token"] is None

    def id_in_model(self, name: str) -> int | None:
        """The id in config.json, for directories without tokenizer settings."""
        value = self.model.get(f"{name}_token_id")
        if isinstance(value, list):
            value = value[0] if value else None
        return value if type(value) is int else None

    @property
    def special(self) -> frozenset[str]:
        """Contents of tokens that a setting marks as special."""
        return _special(self.raw) | {token.content for token in self.added.values() if token.special}

    @functools.cached_property
    def variables(self) -> dict[str, str]:
        """The special tokens by name (bos_token, pad_token, ...), which transformers passes to chat templates."""
        named = {
            key: content for key, value in self.raw.items() if key.endswith("_token") and (content := _content(value))
        }
        extra = self.raw.get("extra_special_tokens")
        if isinstance(extra, dict):
            named |= {key: content for key, value in extra.items() if (content := _content(value))}
        return named

    @property
    def puts_bos(self) -> bool:
        """Whether tokenizer.model adds BOS to a text: true unless add_bos_token is false."""
        return self.raw.get("add_bos_token") is not False


def _special(raw: Mapping[str, Any]) -> frozenset[str]:
    """Tokens that have a name (eos_token, ...) or are listed as special."""
    entries = [value for key, value in raw.items() if key.endswith("_token")]
    for key in _LISTS:
        value = raw.get(key)
        entries += list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return frozenset(content for entry in entries if (content := _content(entry)) is not None)


def _content(entry: Any) -> str | None:
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) and content else None


def read_tokenizer_settings(directory: Path) -> TokenizerSettings:
    """Reads the settings. Raises UserError for a file that is not JSON, or an added token without content or id."""
    raw: dict[str, Any] = {}
    for file in (MAP, CONFIG):
        if (directory / file).is_file():
            raw |= read_json(directory / file)
    model = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    return TokenizerSettings(directory, raw, model, _added(directory, raw))


def with_new_tokens(settings: TokenizerSettings, new: Sequence[tuple[str, bool]], first: int) -> TokenizerSettings:
    """The settings with new tokens, (content, special), whose ids begin at `first`."""
    added = {content: AddedToken(first + i, content, special) for i, (content, special) in enumerate(new)}
    return dataclasses.replace(settings, added={**settings.added, **added})


def write_new_tokens(directory: Path, tokens: Sequence[AddedToken], fast: str) -> None:
    """Adds tokens to the files of a tokenizer, where transformers reads them.

    Args:
      directory: the files, which are changed.
      tokens: the new tokens.
      fast: name of the file of the `tokenizers` library.
    """
    entries = {token: {"content": token.content, "special": token.special, **_FLAGS} for token in tokens}
    if has_fast := (directory / fast).is_file():
        content = read_json(directory / fast)
        content["added_tokens"] = [*content.get("added_tokens", []), *({"id": t.id, **e} for t, e in entries.items())]
        _write_json(directory / fast, content)
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    if not has_fast or "added_tokens_decoder" in config:
        decoder = {str(token.id): entry for token, entry in entries.items()}
        config["added_tokens_decoder"] = config.get("added_tokens_decoder", {}) | decoder
        _write_json(directory / CONFIG, config)
    if (directory / ADDED).is_file():
        _write_json(directory / ADDED, read_json(directory / ADDED) | {token.content: token.id for token in tokens})


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _added(directory: Path, raw: Mapping[str, Any]) -> dict[str, AddedToken]:
    added: dict[str, AddedToken] = {}
    special = _special(raw)
    if (directory / ADDED).is_file():
        for content, number in read_json(directory / ADDED).items():
            if type(number) is not int or not content:
                raise UserError(f"{directory / ADDED}: {content!r} has the id {number!r}, which is not a whole number")
            added[content] = AddedToken(number, content, content in special)
    decoder = raw.get("added_tokens_decoder") or {}
    for number, entry in decoder.items():
        spelled = _content(entry)
        if spelled is None or not str(number).isdigit():
            raise UserError(f"{directory / CONFIG}: added_tokens_decoder.{number} has no content")
        flags = entry if isinstance(entry, dict) else {}
        added[spelled] = AddedToken(
            int(number),
            spelled,
            bool(flags.get("special")) or spelled in special,
            bool(flags.get("lstrip")),
            bool(flags.get("rstrip")),
        )
    return added
