"""How other libraries encode text with the tokenizer of a directory. Exports are checked against these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers


class OtherEncoder(NamedTuple):
    """Encodes as a server does.

    Attributes:
      name: Library and version.
      text: Whole text to ids, with what the tokenizer puts in front.
      chat: A user's message to the ids of the prompt that the directory's chat template makes; None if the library
        knows no chat templates.
    """

    name: str
    text: Callable[[str], list[int]]
    chat: Callable[[str], list[int]] | None


def encoder_of(directory: Path) -> OtherEncoder | None:
    """That of transformers if it is installed, else of tokenizers; None if neither can read the directory."""
    try:
        import transformers
    except ImportError:
        return _of_tokenizers(directory)
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(str(directory))
    except Exception:  # whatever keeps transformers from reading it keeps this check from being made
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
