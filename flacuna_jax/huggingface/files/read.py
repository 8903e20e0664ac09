"""Opens checkpoint directories of all file formats as one flat table of tensors, without loading weights."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.architecture import CONFIG_FILE, read_architecture
from flacuna_jax.huggingface.files import native
from flacuna_jax.huggingface.files.fused import split_fused
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.files.meta import PARAMS_FILE, is_meta, read_meta
from flacuna_jax.huggingface.files.place import require_directory
from flacuna_jax.huggingface.files.quantised import dequantised, dtype_of, method_of
from flacuna_jax.huggingface.files.safetensors_file import read_header
from flacuna_jax.huggingface.files.tensors import ALL_ROWS, MappedFiles, ReadableTensor, StoredTensor
from flacuna_jax.huggingface.files.torch_file import read_torch_file
from flacuna_jax.huggingface.gguf.header import SUFFIX as GGUF
from flacuna_jax.huggingface.gguf.tensors import linked_file, packed_kinds
from flacuna_jax.huggingface.gguf.tensors import read_tensors as read_gguf

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
LEGACY, LEGACY_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclasses.dataclass(frozen=True)
class CheckpointReader:
    """The tensors of a checkpoint under their Hugging Face names.

    Attributes:
      directory: the directory, for messages.
      tensors: name → location, shape and dtype.
      once: see `MappedFiles`.
    """

    directory: Path
    tensors: Mapping[str, ReadableTensor]
    once: bool = False

    @functools.cached_property
    def _files(self) -> MappedFiles:
        return MappedFiles(self.once)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: slice = ALL_ROWS) -> np.ndarray:
        """A read-only view of the file's pages if possible, otherwise a copy of the rows.

        Raises:
          UserError: the file was truncated or deleted after it was opened.
        """
        return self.tensors[name].read(self._files, rows)


def open_checkpoint(directory: str | Path, *, once: bool = False) -> CheckpointReader:
    """Opens a LLaMA directory: Hugging Face's (safetensors or legacy .bin, sharded or not), Meta's, or a converted one.

    Headers and pickles are read and checked against each other and against file sizes; weights are not touched.

    Args:
      directory: the checkpoint's directory.
      once: whether its weights will be read once from end to end, so that they need not stay in the page cache.

    Raises:
      UserError: there is no checkpoint, a file is missing, torn or of another kind, or an index does not match its
        shards.
    """
    directory = require_directory(directory)
    return CheckpointReader(directory, split_fused(directory, _tensors(directory)), once)


def _tensors(directory: Path) -> Mapping[str, ReadableTensor]:
    if native.is_native(directory):
        return native.read_tensors(directory)
    for file_name, index_name, read_file in (
        (SAFETENSORS, SAFETENSORS_INDEX, _safetensors),
        (LEGACY, LEGACY_INDEX, read_torch_file),
    ):
        if (directory / file_name).is_file():
            return _dequantised(directory, read_file(directory / file_name))
        if (directory / index_name).is_file():
            return _dequantised(directory, _read_shards(directory / index_name, read_file))
    if is_meta(directory):
        return read_meta(directory)
    if any(directory.glob(f"*{GGUF}")):
        return read_gguf(directory, read_architecture(directory))
    raise UserError(f"{directory} contains no checkpoint: {_what_is_there(directory)}")


def _dequantised(directory: Path, tensors: dict[str, StoredTensor]) -> Mapping[str, ReadableTensor]:
    config = directory / CONFIG_FILE
    settings = read_json(config) if config.is_file() else {}
    return tensors if method_of(settings) is None else dequantised(tensors, settings)


def note_on_quantisation(directory: str | Path) -> str | None:
    """A line that says how quantised weights are read; None if a checkpoint has none.

    Raises: like `open_checkpoint`.
    """
    directory = require_directory(directory)
    config = directory / CONFIG_FILE
    settings = read_json(config) if config.is_file() else {}
    if (method := method_of(settings)) is not None:
        return f"{directory}: weights quantised by {method} are read as {dtype_of(settings).name}"
    if any(directory.glob(f"*{GGUF}")) and (kinds := packed_kinds(directory)):
        return f"{linked_file(directory)}: weights of types {', '.join(kinds)} are read as float32"
    return None


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    return read_header(path)[0]


def _what_is_there(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return "it is a PEFT adapter, which needs its base model; give the base's directory here"
    if any(directory.glob("model-*.safetensors")) or any(directory.glob("pytorch_model-*.bin")):
        return f"there are shards, but no {SAFETENSORS_INDEX} or {LEGACY_INDEX}"
    if (directory / PARAMS_FILE).is_file() or any(directory.glob("consolidated.*")):
        return f"Meta's files are {PARAMS_FILE} and consolidated.00.pth, ...; one of them is missing"
    return f"it has none of {SAFETENSORS}, {SAFETENSORS_INDEX}, {LEGACY}, {LEGACY_INDEX} or {native.MANIFEST}"


def _read_shards(index: Path, read_file: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensor names to files")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise UserError(f"{index} lists {file!r}, which is not a file name in its directory")
        if not (index.parent / file).is_file():
            raise UserError(f"{index.parent / file} is missing; {index.name} lists it")
        tensors |= _read_shard(index, index.parent / file, weight_map, read_file)
    return tensors


def _read_shard(
    index: Path, path: Path, weight_map: Mapping[str, str], read_file: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    held = read_file(path)
    promised = {name for name, file in weight_map.items() if file == path.name}
    missing = sorted(promised - set(held))
    extra = sorted(name for name in set(held) - promised if not names.is_ignored(name))
    if missing:
        raise UserError(f"{path} lacks {names.some(missing)}, which {index.name} lists for it")
    if extra:
        raise UserError(f"{path} contains {names.some(extra)}, which {index.name} does not list for it")
    return {name: tensor for name, tensor in held.items() if name in promised}
