"""Reads the pickles of `torch.save` as data: a stack machine over their opcodes that imports nothing and calls nothing.

A pickle is a program, which Python's unpickler runs. Even with a restricted `find_class`, a file can call the permitted
objects and set attributes on them. This machine only recognises the names `torch._utils._rebuild_tensor_v2`,
`collections.OrderedDict` and the storage classes, and converts them to plain records. It rejects all other names and
all opcodes that a dictionary of tensors does not need.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

import numpy as np

from flacuna_jax.huggingface.files.tensors import BFLOAT16

STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_STORAGES = {f"torch.{name}": dtype for name, dtype in STORAGE_DTYPES.items()}
_MAX_READ = 1 << 26
_MAX_DIMENSIONS = 8


class PickleRefused(ValueError):
    """The pickle is torn, or contains something other than plain containers of tensors; the message names it."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """A sequence of numbers stored outside of the pickle under `key`."""

    key: str
    dtype: np.dtype
    numel: int


@dataclasses.dataclass(frozen=True)
class StridedTensor:
    """A view of a storage, with offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
    """An importable name in the file; it is never imported."""

    dotted: str


class _Mark:
    pass


_MARK = _Mark()

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_VALUE_OPCODES = _NUMBERS | _TEXTS


def read_pickle(stream: BinaryIO) -> Any:
    """Reads one pickle up to its STOP opcode: dicts, lists, tuples, numbers, text and `StridedTensor`s.

    Raises:
      PickleRefused: the pickle is torn or not a dictionary of tensors.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(_BoundedStream(stream)):  # type: ignore[arg-type]
            machine.step(opcode.name, argument)
        return machine.result()
    except PickleRefused:
        raise
    except Exception as error:
        # Damaged bytes can cause any error in the parser or the stack; all of them mean that the file is damaged.
        raise PickleRefused(f"it is damaged ({type(error).__name__}: {str(error)[:120]})") from None


class _BoundedStream:
    """The input of pickletools; a damaged length cannot make it allocate unlimited memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise PickleRefused(f"it is damaged (a value of {size} bytes)")
        return self._stream.read(size)

    def readline(self) -> bytes:
        return self._stream.readline(_MAX_READ)


class _Machine:
    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._operations: dict[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
            "STOP": lambda _: None,
            "MARK": lambda _: self._stack.append(_MARK),
            "POP": lambda _: self._drop(),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "EMPTY_LIST": lambda _: self._stack.append([]),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "TUPLE": lambda _: self._stack.append(tuple(self._pop_to_mark())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "DICT": lambda _: self._stack.append(_pairs(self._pop_to_mark())),
            "LIST": lambda _: self._stack.append(self._pop_to_mark()),
            "SETITEM": lambda _: self._set_items(self._pop_many(2)),
            "SETITEMS": lambda _: self._set_items(self._pop_to_mark()),
            "APPEND": lambda _: self._extend(self._pop_many(1)),
            "APPENDS": lambda _: self._extend(self._pop_to_mark()),
            "PUT": self._remember,
            "BINPUT": self._remember,
            "LONG_BINPUT": self._remember,
            "MEMOIZE": lambda _: self._remember(len(self._memo)),
            "GET": self._recall,
            "BINGET": self._recall,
            "LONG_BINGET": self._recall,
            "GLOBAL": lambda argument: self._stack.append(_known(argument.replace(" ", ".", 1))),
            "STACK_GLOBAL": lambda _: self._stack.append(_known(".".join(_texts(self._pop_many(2))))),
            "BINPERSID": lambda _: self._stack.append(_storage(self._pop())),
            "REDUCE": lambda _: self._reduce(),
            "BUILD": lambda _: self._build(),
        }

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _VALUE_OPCODES:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode])
        elif opcode in self._operations:
            self._operations[opcode](argument)
        else:
            _refuse(f"it uses the pickle opcode {opcode}, which a dictionary of tensors does not need")

    def result(self) -> Any:
        if len(self._stack) != 1:
            _refuse("it is damaged (it does not leave one value)")
        return self._pop()

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            _refuse("it is damaged (a value is missing)")
        return value

    def _drop(self) -> None:
        self._stack.pop()

    def _pop_many(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[Any]:
        values = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _tuple(self, count: int) -> None:
        self._stack.append(tuple(self._pop_many(count)))

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            _refuse(f"it is damaged (expected a {kind.__name__})")
        return self._stack[-1]

    def _set_items(self, values: list[Any]) -> None:
        table = self._top(dict)
        for key, value in _pairs(values).items():
            if key in table:
                _refuse(f"the key {key!r} appears twice")
            table[key] = value

    def _extend(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _remember(self, slot: Any) -> None:
        self._memo[int(slot)] = self._stack[-1]

    def _recall(self, slot: Any) -> None:
        self._stack.append(self._memo[int(slot)])

    def _reduce(self) -> None:
        function, arguments = self._pop_many(2)
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            _refuse("it calls something that is not a function")
        if function.dotted == _ORDERED_DICT:
            self._stack.append(_ordered_dict(arguments))
        elif function.dotted == _REBUILD_TENSOR:
            self._stack.append(_rebuild_tensor(arguments))
        else:
            _refuse(f"it calls {function.dotted}")

    def _build(self) -> None:
        """A state dict has `_metadata` (module versions) as an attribute, which does not affect the tensors."""
        self._pop()
        self._top(dict)


def _refuse(why: str) -> NoReturn:
    raise PickleRefused(why)


def _known(dotted: str) -> _Name:
    if dotted not in (_ORDERED_DICT, _REBUILD_TENSOR) and dotted not in _STORAGES:
        _refuse(f"it names {dotted[:200]}, which is not part of a dictionary of tensors")
    return _Name(dotted)


def _texts(values: list[Any]) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        _refuse("it is damaged (a name that is not text)")
    return values


def _pairs(values: list[Any]) -> dict[Any, Any]:
    keys, items = values[::2], values[1::2]
    if len(keys) != len(items) or not all(isinstance(key, str | int) for key in keys):
        _refuse("it contains a table whose keys are neither text nor numbers")
    if len(set(keys)) != len(keys):
        _refuse("it contains a table with a repeated key")
    return dict(zip(keys, items, strict=True))


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if not arguments:
        return {}
    if len(arguments) != 1 or not isinstance(arguments[0], list):
        _refuse("it is damaged (a table made of something else)")
    pairs = arguments[0]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        _refuse("it is damaged (a table made of something else)")
    return _pairs([item for pair in pairs for item in pair])


def _storage(identity: Any) -> Storage:
    """From ("storage", class, key, device, numel); in the oldest layout, the storage that it is a view of follows."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        _refuse("it refers to an outside object that is not a tensor storage")
    _, kind, key, _, numel = identity[:5]
    if len(identity) == 6 and identity[5] is not None:
        _refuse(
            "it contains a view of another storage, as written by torch before 0.4; save it again with a newer torch"
        )
    if not isinstance(kind, _Name) or kind.dotted not in _STORAGES:
        _refuse("it refers to a storage of unknown type")
    if not isinstance(key, str) or not _is_size(numel):
        _refuse("it is damaged (a storage without key or size)")
    return Storage(key, _STORAGES[kind.dotted], numel)


def _rebuild_tensor(arguments: tuple[Any, ...]) -> StridedTensor:
    """From (storage, offset, shape, strides, requires_grad, hooks[, metadata])."""
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], Storage):
        _refuse("it is damaged (a tensor without storage)")
    storage, offset, shape, strides = arguments[:4]
    if not _is_size(offset) or not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
        _refuse("it is damaged (a tensor without offset, shape and strides)")
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and offset + last >= storage.numel:
        _refuse(f"it is damaged (a tensor of shape {list(shape)} reaches past its storage of {storage.numel} numbers)")
    return StridedTensor(storage, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= _MAX_DIMENSIONS and all(map(_is_size, values))
