"""Encodes text with other libraries and the tokenizer of a directory, to check exports against them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers


class OtherEncoder(NamedTuple):
    """Encodes like a server.

    Attributes:
      name: Library and version.
      text: Encodes a whole text, including the tokens that the tokenizer adds before it.
      chat: Encodes a user's message as a prompt of the directory's chat template; None if the library does not support
        chat templates.
    """

    name: str
    text: Callable[[str], list[int]]
    chat: Callable[[str], list[int]] | None


def encoder_of(directory: Path) -> OtherEncoder | None:
    """The encoder of transformers if it is installed, or else of tokenizers; None if neither can read the directory."""
    try:
        import transformers
    except ImportError:
        return _of_tokenizers(directory)
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(str(directory))
    except Exception:  # if transformers cannot read it for any reason, there is no check
        return _of_tokenizers(directory)

    def chat(message: str) -> list[int]:
        messages = [{"role": "user", "content": message}]
        return _plain(
            loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        )

    has_template = getattr(loaded, "chat_template", None) is not None
    return OtherEncoder(
        f"transformers {transformers.__version__}",
        lambda text: _plain(loaded.encode(text)),
        chat if has_template else None,
    )


def _of_tokenizers(directory: Path) -> OtherEncoder | None:
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    loaded = tokenizers.Tokenizer.from_file(str(path))
    return OtherEncoder(f"tokenizers {tokenizers.__version__}", lambda text: loaded.encode(text).ids, None)


def _plain(ids: Any) -> list[int]:
    return [int(number) for number in ids]
