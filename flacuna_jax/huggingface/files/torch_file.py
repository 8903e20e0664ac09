"""Reads the two layouts of `torch.save` without torch: the zip archive (since 1.6) and the older stream.

Both contain a pickle that describes tensors, and the uncompressed bytes of the tensors, which become views of the file.
"""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flacuna_jax.errors import UserError
from flacuna_jax.git_lfs import require_content
from flacuna_jax.huggingface.files.tensor_pickle import PickleRefused, Storage, StridedTensor, read_pickle
from flacuna_jax.huggingface.files.tensors import StoredTensor

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_MAX_PICKLE = 1 << 28
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_ENCRYPTED = 0x1


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The named tensors of a file written by `torch.save(state_dict)`.

    Raises:
      UserError: the file is missing, torn or big-endian, or contains anything other than a dictionary of tensors.
    """
    require_content(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
        tensors = _read_zip(path) if start == b"PK\x03\x04" else _read_stream(path)
    except PickleRefused as error:
        raise UserError(f"{path} is not a dictionary of tensors: {error}. Nothing in it was executed.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return tensors


def _read_zip(path: Path) -> dict[str, StoredTensor]:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise UserError(f"{path} is a zip file, but not one that torch.save writes (it has no data.pkl)")
            root = pickles[0].removesuffix("data.pkl")
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in members else b"little"
            if order != b"little":
                raise UserError(f"{path} was written on a big-endian machine, which is not supported")
            if members[pickles[0]].file_size > _MAX_PICKLE:
                raise UserError(f"{path}: its pickle has {members[pickles[0]].file_size} bytes; it is damaged")
            state = read_pickle(io.BytesIO(archive.read(pickles[0])))

            def locate(storage: Storage) -> int:
                info = members.get(f"{root}data/{storage.key}")
                if info is None:
                    raise UserError(f"{path} is torn: the numbers of storage {storage.key!r} are missing")
                if info.file_size < storage.numel * storage.dtype.itemsize:
                    raise UserError(f"{path} is damaged: storage {storage.key!r} is smaller than its tensors")
                return _data_offset(path, raw, info)

            return _tensors(path, state, locate)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, EOFError) as error:
        raise UserError(f"{path} is torn or damaged: {error}") from None
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, PickleRefused):
            raise
        raise UserError(f"{path} is damaged: {error}") from None


def _data_offset(path: Path, raw: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
        raise UserError(f"{path}: {info.filename} is compressed or encrypted, which torch.save never does")
    raw.seek(info.header_offset)
    signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise UserError(
            f"{path} is damaged: {info.filename} is not at the position that the directory of the zip file gives"
        )
    return info.header_offset + _LOCAL_HEADER.size + name_length + extra_length


def _read_stream(path: Path) -> dict[str, StoredTensor]:
    """The stream has three pickles of preamble, the state, the list of storage keys, and the length and numbers of each
    storage."""
    with path.open("rb") as file:
        try:
            preamble = [read_pickle(file) for _ in range(3)]
        except PickleRefused:
            preamble = []
        if preamble[:2] != [_MAGIC, _PROTOCOL] or not isinstance(preamble[2], dict):
            raise UserError(f"{path} was not written by torch.save, or its beginning is damaged")
        if preamble[2].get("little_endian") is not True:
            raise UserError(f"{path} was written on a big-endian machine, which is not supported")
        state, keys = read_pickle(file), read_pickle(file)
        storages = _storages(state)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
            raise UserError(f"{path} is damaged: its list of storages is not a list of names")
        if set(keys) != set(storages):
            raise UserError(f"{path} is damaged: its list of storages does not match its tensors")
        offsets: dict[str, int] = {}
        position = file.tell()
        for key in keys:
            file.seek(position)
            length = file.read(8)
            if len(length) != 8 or struct.unpack("<q", length)[0] != storages[key].numel:
                raise UserError(f"{path} is torn or damaged at byte {position}, where storage {key!r} should begin")
            offsets[key] = position + 8
            position += 8 + storages[key].numel * storages[key].dtype.itemsize
    return _tensors(path, state, lambda storage: offsets[storage.key])


def _storages(state: Any) -> dict[str, Storage]:
    tensors = state.values() if isinstance(state, dict) else ()
    return {tensor.storage.key: tensor.storage for tensor in tensors if isinstance(tensor, StridedTensor)}


def _tensors(path: Path, state: Any, locate: Callable[[Storage], int]) -> dict[str, StoredTensor]:
    if not isinstance(state, dict):
        raise UserError(f"{path} contains a {type(state).__name__}, not a dictionary of tensors")
    if not state:
        raise UserError(f"{path} contains an empty dictionary, without tensors; write or copy it again")
    offsets: dict[str, int] = {}
    result = {}
    file_size = path.stat().st_size
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, StridedTensor):
            kind = type(tensor).__name__
            raise UserError(f"{path} is not a dictionary of tensors: its entry {name!r} is a {kind}")
        storage = tensor.storage
        size = storage.dtype.itemsize
        if storage.key not in offsets:
            offsets[storage.key] = locate(storage)
        strides = tuple(stride * size for stride in tensor.strides)
        stored = StoredTensor(path, offsets[storage.key] + tensor.offset * size, tensor.shape, storage.dtype, strides)
        if stored.end > file_size:
            raise UserError(f"{path} is torn: tensor {name} ends at byte {stored.end}, after the end of the file")
        result[name] = stored
    return result
