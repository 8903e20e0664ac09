"""Records of JSON files, streamed in bounded memory: one value per line, one list, or a sequence of values.

A file whose outermost value is an object that contains the list of records, {"data": [...]}, is read as that list;
`WRAPPERS` are the keys for it. Reading a JSON list cannot continue after a syntax error, so the rest of such a file
counts as one unreadable record. An object with a duplicate key is a bad record, because it is unknown which of the
values is meant.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flacuna_jax.data.raw import FileKind, Place, RawRecord, is_damage, open_data_file, require_no_utf16
from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.errors import UserError

CHUNK = 4 << 20
"""Number of bytes per read."""
LONGEST_RECORD = 256 << 20
"""Maximum length of a JSON record in characters, so that a torn file cannot fill the memory."""
WRAPPERS = ("data", "train", "records", "examples", "rows", "instances", "samples")
"""Keys of an outermost object that may contain the list of records."""


def read_json(path: Path, kind: FileKind, policy: BadRecordPolicy) -> Iterator[RawRecord]:
    """The records of a JSON file. Raises UserError if it cannot be read; damaged records go to `policy`."""
    with open_data_file(path, kind) as file:
        try:
            start = file.peek(4096)
            require_no_utf16(path, start)
            is_list = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            if is_list or kind.format != "lines":
                yield from _JsonStream(path, file).records(policy)
            else:
                yield from _read_lines(path, file, policy)
        except Exception as error:
            if is_damage(error):
                policy.report.read += 1
                policy.reject("torn file", path, f"the compressed file is torn or damaged ({error})")
            elif isinstance(error, OSError):
                raise UserError(f"{path}: cannot be read ({error})") from error
            else:
                raise


def _read_lines(path: Path, file: BinaryIO, policy: BadRecordPolicy) -> Iterator[RawRecord]:
    number = 0
    decoder = _Decoder()
    for line, raw in enumerate(file, start=1):
        if not raw.strip():
            continue
        number += 1
        place = Place(path, number, line)
        try:
            value = decoder.decode(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            policy.report.read += 1
            policy.reject("unreadable record", place, f"not a JSON record ({_short(error)}){_looks_like(raw)}")
        else:
            yield from decoder.checked(RawRecord(place, value), policy)


def _looks_like(line: bytes) -> str:
    text = line.strip()
    if text in (b"{", b"[") or re.match(rb"\"[^\"]*\"\s*:", text):
        return "; its records span several lines: give the file a name that ends in .json"
    if text.startswith(b"{'"):
        return "; the line is the repr of a Python dict: write it with json.dumps"
    return "; the line looks like CSV: give the file a name that ends in .csv" if _is_csv(text) else ""


def _is_csv(line: bytes) -> bool:
    return re.fullmatch(rb"[\w \"]+(,[\w \"]+)+", line) is not None


def _short(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


class _Decoder:
    """Decodes JSON and records duplicate keys of objects."""

    def __init__(self) -> None:
        self._repeated: list[str] = []
        decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._raw_decode: Callable[[str, int], tuple[Any, int]] = decoder.raw_decode
        self._decode: Callable[[str], Any] = decoder.decode

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            self._repeated += [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        return found

    def decode(self, text: str) -> Any:
        self._repeated.clear()
        return self._decode(text)

    def raw_decode(self, text: str, position: int) -> tuple[Any, int]:
        """The value at `position`, and the position of its end."""
        self._repeated.clear()
        return self._raw_decode(text, position)

    def checked(self, record: RawRecord, policy: BadRecordPolicy) -> Iterator[RawRecord]:
        """Yields the record just decoded; if it has a duplicate key, counts it instead."""
        if not self._repeated:
            yield record
            return
        policy.report.read += 1
        what = f"the key {self._repeated[0]!r} appears twice in an object; remove one of them"
        policy.reject("key given twice", record.place, what)


class _Broken(Exception):
    """The text is not a JSON list of records; `line` is the line of the error."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _JsonStream:
    """Decodes the values of one JSON list, or a sequence of values, from a window that moves over the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._decode_bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = _Decoder()
        self._window = ""
        self._position = 0
        self._line = 1  # of self._position
        self._at_end = False

    def records(self, policy: BadRecordPolicy) -> Iterator[RawRecord]:
        number = 0
        try:
            in_object = self._enter_wrapper(policy)
            in_list = in_object or self._peek() == "["
            if in_list:
                self._advance(self._position + 1)
            while (following := self._peek()) != "":
                if in_list and not number and following == "]":
                    break
                number += 1
                place = Place(self._path, number, self._line)
                value = self._value()
                yield from self._decoder.checked(RawRecord(place, value), policy)
                if in_list and not self._another():
                    break
            else:
                if in_list:
                    raise _Broken("the file ends inside the list: it is torn", self._line)
                if not number:
                    raise _Broken("the file is empty", self._line)
            if in_list:
                self._advance(self._position + 1)
                if in_object:
                    self._leave_wrapper(policy)
                if self._peek() != "":
                    raise _Broken("there is text after the end of the list", self._line)
        except _Broken as error:
            policy.report.read += 1
            place = Place(self._path, max(number, 1), error.line)
            policy.reject("unreadable rest of a file", place, f"not JSON ({error})")

    def _enter_wrapper(self, policy: BadRecordPolicy) -> bool:
        """For an object that contains the list of records: moves to the list, and counts the members before it.

        Returns False without moving for any other value, or if the list begins after the first `CHUNK`.
        """
        if self._peek() != "{":
            return False
        position, window = self._position + 1, self._window
        passed: list[str] = []
        try:
            while True:
                key, position = self._decoder.raw_decode(window, _skip(window, position))
                position = _skip(window, position)
                if not isinstance(key, str) or window[position] != ":":
                    return False
                position = _skip(window, position + 1)
                if key in WRAPPERS and window[position] == "[" and window[_skip(window, position + 1)] == "{":
                    for name in passed:
                        policy.report.ignore(f"{name} (of the file)")
                    self._advance(position)
                    return True
                passed.append(key)
                _, position = self._decoder.raw_decode(window, position)
                position = _skip(window, position)
                if window[position] != ",":
                    return False
                position += 1
        except (ValueError, RecursionError, IndexError):
            return False

    def _leave_wrapper(self, policy: BadRecordPolicy) -> None:
        """Reads the rest of the object after the list, and counts its members."""
        while (following := self._peek()) == ",":
            self._advance(self._position + 1)
            self._peek()
            key = self._value()
            if self._peek() != ":":
                raise _Broken(f"':' expected, found {self._peek()!r}", self._line)
            self._advance(self._position + 1)
            self._peek()
            self._value()
            policy.report.ignore(f"{key} (of the file)")
        if following != "}":
            raise _Broken(f"',' or '}}' expected, found {following!r}", self._line)
        self._advance(self._position + 1)

    def _another(self) -> bool:
        """Called after a value. Skips a comma and returns True; returns False at the end of the list."""
        following = self._peek()
        if following == ",":
            self._advance(self._position + 1)
            if self._peek() == "]":
                raise _Broken("the list ends with a comma", self._line)
            return True
        if following == "]":
            return False
        if following == "":
            raise _Broken("the file ends inside the list: it is torn", self._line)
        raise _Broken(f"',' or ']' expected, found {following!r}", self._line)

    def _value(self) -> Any:
        chunk = CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._position)
            except json.JSONDecodeError as error:
                if self._at_end or not self._may_be_unfinished(error):
                    raise _Broken(error.msg, self._line_of(error.pos)) from error
                if len(self._window) - self._position > LONGEST_RECORD:
                    raise _Broken("a record has no end", self._line) from error
            except (RecursionError, ValueError) as error:  # a number of thousands of digits is a ValueError
                raise _Broken(_short(error), self._line) from error
            else:
                # A number may continue after the window; an incomplete end has at most two characters ("1e+").
                if end + 2 < len(self._window) or self._at_end:
                    self._advance(end)
                    return value
            self._refill(chunk)
            chunk *= 2

    def _may_be_unfinished(self, error: json.JSONDecodeError) -> bool:
        # The longest literal that the end of the window can cut is "-Infinity"; an escape is shorter.
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._window) - 16

    def _peek(self) -> str:
        """Moves to the next character that is not white space and returns it; "" at the end of the file."""
        while True:
            window, position = self._window, self._position
            while position < len(window) and window[position] in " \t\r\n":
                position += 1
            self._advance(position)
            if position < len(window):
                return window[position]
            if self._at_end:
                return ""
            self._refill(CHUNK)

    def _advance(self, position: int) -> None:
        self._line += self._window.count("\n", self._position, position)
        self._position = position

    def _line_of(self, position: int) -> int:
        return self._line + self._window.count("\n", self._position, position)

    def _refill(self, size: int) -> None:
        data = self._file.read(size)
        self._at_end = not data
        try:
            text = self._decode_bytes.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            line = self._line_of(len(self._window)) + error.object[: error.start].count(b"\n")
            raise _Broken(f"not UTF-8: {error.reason}", line) from error
        self._window = self._window[self._position :] + text
        self._position = 0


def _skip(text: str, position: int) -> int:
    """The position of the next character that is not white space."""
    while text[position] in " \t\r\n":
        position += 1
    return position
