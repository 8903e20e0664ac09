"""The tokens that end an answer: the chat template's end of an answer, the tokenizer's EOS, and generation_config.json.

transformers and vLLM stop at the list in generation_config.json and at the tokenizer's EOS; so does this package.
"""

from pathlib import Path
from typing import Any

from flacuna_jax.data.conversation import Template
from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.files.place import local_checkpoint

GENERATION_CONFIG = "generation_config.json"


def checkpoint_ends(directory: str | Path) -> tuple[int, ...]:
    """The ids in generation_config.json, or in config.json if that file does not exist, as in transformers."""
    directory = local_checkpoint(directory, weights=False)
    for file in (GENERATION_CONFIG, "config.json"):
        path = directory / file
        if path.is_file():
            return _ids(read_json(path).get("eos_token_id"), path)
    return ()


def _ids(value: Any, path: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int for one in values):
        raise UserError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return tuple(one for one in values if one >= 0)


def answer_ends(template: Template | None, tokenizer: Tokenizer, directory: str | Path | None) -> tuple[int, ...]:
    """All tokens that end an answer, those of the template first.

    Args:
      template: None for text without a template.
      tokenizer: The tokenizer of the model.
      directory: The directory of the model. None if it has not been written yet.
    """
    of_template = () if template is None else template.ends
    of_files = () if directory is None else checkpoint_ends(directory)
    return tuple(dict.fromkeys((*of_template, tokenizer.eos_id, *of_files)))
