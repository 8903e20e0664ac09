"""Records of JSON files, streamed in bounded memory: a value per line, one list, or values one after another.

A file whose outermost value is an object that holds the list of records, {"data": [...]}, is read as that list; the
names are `WRAPPERS`. A JSON list cannot be entered again behind a syntax error, so there the rest of the file counts as
one unreadable record. A key that stands twice in an object makes a bad record: which of its values is meant is unknown.
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
"""Bytes read at once."""
LONGEST_RECORD = 256 << 20
"""Characters after which a JSON record without an end is given up, so that a torn file cannot fill the memory."""
WRAPPERS = ("data", "train", "records", "examples", "rows", "instances", "samples")
"""Keys under which an object holds the list of a file's records."""


def read_json(path: Path, kind: FileKind, policy: BadRecordPolicy) -> Iterator[RawRecord]:
    """The records of a JSON file. Raises UserError if it cannot be read; what is damaged goes to `policy`."""
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
        return "; the file holds records over several lines: give it a name that ends in .json"
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
    """Decodes JSON and notes the keys that stand twice in an object."""

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
        """A value at `position`, and where it ends."""
        self._repeated.clear()
        return self._raw_decode(text, position)

    def checked(self, record: RawRecord, policy: BadRecordPolicy) -> Iterator[RawRecord]:
        """The record just decoded; nothing, and counted, if a key stands twice."""
        if not self._repeated:
            yield record
            return
        policy.report.read += 1
        what = f"the key {self._repeated[0]!r} stands twice in an object; which of its values is meant?"
        policy.reject("key given twice", record.place, what)


class _Broken(Exception):
    """The text is no JSON list of records; `line` is where."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _JsonStream:
    """Values of one JSON list, or of JSON values one after another, decoded from a window that moves over the file."""

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
                    raise _Broken("there is text behind the end of the list", self._line)
        except _Broken as error:
            policy.report.read += 1
            place = Place(self._path, max(number, 1), error.line)
            policy.reject("unreadable rest of a file", place, f"not JSON ({error})")

    def _enter_wrapper(self, policy: BadRecordPolicy) -> bool:
        """In an object that holds the list of records: moves to the list, and counts the members in front of it.

        False, without moving, for any other value, or where the list begins behind the first `CHUNK`.
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
        """Behind the list: reads the rest of the object, whose members are counted."""
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
        """After a value: True at a comma (which is passed), False at the end of the list."""
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
                # A number may go on behind the window, which then cuts it up to two characters late ("1e+").
                if end + 2 < len(self._window) or self._at_end:
                    self._advance(end)
                    return value
            self._refill(chunk)
            chunk *= 2

    def _may_be_unfinished(self, error: json.JSONDecodeError) -> bool:
        # The longest literal that a window can cut is "-Infinity"; an escape is shorter.
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._window) - 16

    def _peek(self) -> str:
        """The next character that is no white space, and moves there; "" at the end of the file."""
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
