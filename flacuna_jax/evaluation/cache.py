"""A cache of answers on disk, so that a killed evaluation can be resumed and a repeated one computes nothing.

A store is a .jsonl file of {"key", "value"} objects. Answers are appended and flushed as they arrive; an incomplete
last line (the process was killed while writing) is dropped. Keys are hashes of everything that an answer depends on.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.errors import UserError
from flacuna_jax.generation.language_model import Generation, GenerationRequest, LanguageModel, Score, ScoreRequest

Request = TypeVar("Request", ScoreRequest, GenerationRequest)
Answer = TypeVar("Answer", Score, Generation)


class Store:
    """A dictionary from hash to JSON value that survives the process. One process writes a store at a time.

    Raises:
      UserError: another process has the file open, or a line other than the last is not an entry.
    """

    def __init__(self, path: Path | None) -> None:
        """`path` None keeps everything in memory."""
        self._values: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115 - open as long as the store
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{path} is in use by another evaluation; wait for it or use another --output"
                ) from None
            self._load(path)

    def _load(self, path: Path) -> None:
        assert self._file is not None
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}, line {number}, is not a cache entry; delete the file to start over") from None
            whole += len(line)
        self._file.truncate(whole)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Any | None:
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        self.put_many([(key, value)])

    def put_many(self, entries: Iterable[tuple[str, Any]]) -> None:
        """Adds entries; they are on disk when it returns."""
        with self._lock:
            for key, value in entries:
                self._values[key] = value
                if self._file is not None:
                    self._file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False).encode() + b"\n")
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


CHUNK = 512
"""Number of requests after which answers are written: the most that a killed evaluation loses."""
LONG = 64
"""Number of new tokens above which an answer counts as long; chunks of long answers have fewer requests."""


class CachedModel:
    """A language model with a cache: it sends a request to the wrapped model only if its answer is not in the store."""

    def __init__(
        self,
        model: LanguageModel,
        store: Store,
        progress: Callable[[int, int], None] | None = None,
        long_chunk: int = 64,
    ) -> None:
        """`progress(done, total)` counts distinct requests; it is called before the first chunk and after each.
        `long_chunk`: requests per chunk of long answers, a small multiple of the number of rows that the model decodes
        in parallel."""
        self._model, self._store, self._progress, self._long_chunk = model, store, progress, long_chunk

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def fingerprint(self) -> str:
        return self._model.fingerprint

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    @property
    def context_length(self) -> int:
        return self._model.context_length

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return self._answer(requests, self._model.loglikelihood, Score)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        return self._answer(requests, self._model.generate, Generation)

    def _answer(
        self, requests: Sequence[Request], ask: Callable[[Sequence[Request]], list[Answer]], kind: type[Answer]
    ) -> list[Answer]:
        keys = [self._key(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if self._store.get(key) is None}
        # Neighbours in token order share prefixes, so that requests with a common prefix are in the same chunk.
        todo = sorted(missing.items(), key=lambda item: _tokens(item[1]))
        size = min(CHUNK, self._long_chunk) if any(_is_long(request) for _, request in todo) else CHUNK
        total = len(set(keys))
        if todo and self._progress is not None:
            self._progress(total - len(todo), total)
        for begin in range(0, len(todo), size):
            chunk = todo[begin : begin + size]
            answers = ask([request for _, request in chunk])
            self._store.put_many((key, asdict(answer)) for (key, _), answer in zip(chunk, answers, strict=True))
            if self._progress is not None:
                self._progress(total - len(todo) + begin + len(chunk), total)
        return [kind(**self._store.get(key)) for key in keys]  # type: ignore[arg-type]

    def _key(self, request: ScoreRequest | GenerationRequest) -> str:
        return hashlib.sha256(f"{self.fingerprint} {request!r}".encode()).hexdigest()


def _tokens(request: ScoreRequest | GenerationRequest) -> tuple[int, ...]:
    return request.prompt if isinstance(request, GenerationRequest) else request.context


def _is_long(request: ScoreRequest | GenerationRequest) -> bool:
    return isinstance(request, GenerationRequest) and request.max_new_tokens > LONG


def directory_fingerprint(directories: Sequence[Path], extra: str = "") -> str:
    """Hash of the content of all files below the directories; for files above 64 MiB, of their size, both ends and one
    mebibyte in every 64."""
    digest = hashlib.sha256(extra.encode())
    for directory in directories:
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(directory)} {path.stat().st_size}".encode())
            with open(path, "rb") as file:
                for block in _sampled(file, path.stat().st_size):
                    digest.update(block)
    return digest.hexdigest()


def _sampled(file: Any, size: int) -> Iterable[bytes]:
    if size <= 64 << 20:
        yield file.read()
        return
    for offset in [*range(0, size, 64 << 20), max(0, size - (1 << 20))]:
        file.seek(offset)
        yield file.read(1 << 20)
