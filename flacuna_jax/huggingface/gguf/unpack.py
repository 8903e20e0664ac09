"""A GGUF file as a checkpoint directory: config.json and tokenizer files made from its metadata, and links to it.

The directory is in the user's cache. Its files other than weights are small; the weights stay where they are.
"""

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.answer_ends import GENERATION_CONFIG
from flacuna_jax.huggingface.architecture import CONFIG_FILE
from flacuna_jax.huggingface.gguf.header import parts, read_header
from flacuna_jax.huggingface.gguf.settings import settings_of
from flacuna_jax.huggingface.gguf.tokenizer_files import KEY, tokenizer_files_of
from flacuna_jax.huggingface.golden import FILE as GOLDEN
from flacuna_jax.source_code import source_digest
from flacuna_jax.user_cache import user_cache

_ENDS = ("eos", "eot", "eom")
"""Names of the tokens that end an answer, in tokenizer.ggml.…_token_id."""


def unpacked(path: Path) -> Path:
    """The checkpoint directory of a GGUF file; made on the first call.

    Raises:
      UserError: the file cannot be read, its architecture or tokenizer is not supported, or the cache cannot be
        written to.
    """
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in _linked(path)]
    key = hashlib.sha256(repr((source_digest("huggingface/gguf"), states)).encode()).hexdigest()[:16]
    target = user_cache() / "gguf" / key / path.stem  # the last part becomes the name of the model in results
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            unpack(path, Path(temporary) / "whole")
            with contextlib.suppress(OSError):  # another process was faster
                (Path(temporary) / "whole").rename(target)
    except OSError as error:
        raise UserError(
            f"{path} cannot be unpacked to {target.parent} ({error.strerror}); set FLACUNA_CACHE to a directory with "
            "free space that you may write to"
        ) from None
    return target


def unpack(path: Path, directory: Path) -> None:
    """Creates the checkpoint directory of a GGUF file. Raises like `unpacked`."""
    header = read_header(parts(path)[0])
    ends = [header.get(f"{KEY}{name}_token_id", int) for name in _ENDS]
    generation = {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}
    content = {CONFIG_FILE: settings_of(header), GENERATION_CONFIG: generation, **tokenizer_files_of(header)}
    directory.mkdir()
    for name, value in content.items():
        text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
        (directory / name).write_text(text + "\n", encoding="utf-8")
    for file in _linked(path):
        (directory / file.name).symlink_to(file)


def _linked(path: Path) -> list[Path]:
    """All parts of a GGUF file, and the golden prompts beside an exported one."""
    beside = [path.with_name(GOLDEN)] if path.with_name(GOLDEN).is_file() else []
    return [file.absolute() for file in (*parts(path), *beside)]
