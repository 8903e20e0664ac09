"""A cache of tokenised corpora, keyed by a hash of all inputs and opened memory-mapped.

    <cache>/<key>/            store.json and one .npy per array of the TokenStore
    <cache>/<key>.parts/      during the build: finished parts, from which an interrupted build continues

The key is a hash of the bytes of the data files and of the tokenizer, of the settings that affect examples, and of the
code of this package. The message for a miss names the differences to the most similar corpus in the cache. Building a
corpus removes those that have not been opened for a month.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.config.types import Examples
from flacuna_jax.data.build import SourceBuild, require_examples, template_without_checkpoint
from flacuna_jax.data.conversation import Template
from flacuna_jax.data.report import DataReport, SourceReport
from flacuna_jax.data.source_files import source_files
from flacuna_jax.data.store import StoreBuilder, TokenStore
from flacuna_jax.data.tokenization import SegmentEncoder, Tokenizer
from flacuna_jax.errors import UserError
from flacuna_jax.say import Say
from flacuna_jax.source_code import source_digest
from flacuna_jax.user_cache import user_cache

PART_EXAMPLES = 32_768
"""Examples per part; a build that is killed loses at most one part."""

UNUSED_DAYS = 30
"""Days after which an unopened corpus or an abandoned build is removed."""

_SHAPING = ("max_length", "over_length", "on_bad_record", "train_on", "template_variables", "tools_as_text")
_OF_PREFERENCES = ("first_lengths", "good")
"""Arrays that the examples of some kinds do not have."""
_FLAT = ("tokens", "loss_mask", "supervised", "source_index", "record_index", "id_bytes")
_AFTER_TOKENISATION = tuple(
    f"data/{name}.py" for name in ("held_out", "hub", "lookup", "packing", "pipeline", "report", "store_cache")
)
"""Code that a corpus does not depend on."""
_STORE, _FACTS = "store.json", "facts.json"


def default_directory() -> Path:
    """$FLACUNA_CACHE, or else flacuna_jax in the user's cache directory."""
    return user_cache()


def cached_store(
    config: DataConfig,
    tokenizer: Tokenizer,
    tokenizer_hash: str,
    directory: Path,
    say: Say,
    template: Template | None = None,
    examples: Examples = "answers",
) -> tuple[TokenStore, DataReport]:
    """The result of `build_store`, from the cache if it is there; otherwise it is built in the cache, in parts.

    `say` receives whether it was a hit or a miss, and why. Raises UserError like `build_store`.
    """
    template = template or template_without_checkpoint(config, tokenizer)
    parts = identity(config, template, tokenizer_hash, examples)
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    place = directory / key
    directory.mkdir(parents=True, exist_ok=True)
    # A second process that needs the same corpus waits, and then finds it.
    with _locked(directory / f"{key}.lock"):
        found = _open(place)
        if found is not None:
            with suppress(OSError):  # another user's cache may be read-only
                os.utime(place)
            say(f"tokenised data: hit {place} (same files, tokenizer, settings and code)")
            return _renamed(found, [source.path for source in config.sources])
        say(f"tokenised data: {_why(directory, parts)}; building {place}")
        _remove_unused(directory, place, say)
        return _build(config, template, tokenizer, parts, place, say, examples)


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Locks `path`. Raises BlockingIOError if another process has the lock and not `wait`."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _remove_unused(directory: Path, place: Path, say: Say) -> None:
    """Removes corpora that were not opened for long, except the one at `place`. Mapped files stay valid."""
    oldest = time.time() - UNUSED_DAYS * 86400
    for path in sorted(directory.iterdir()):
        key = path.name.removesuffix(".parts")
        if re.fullmatch(r"[0-9a-f]{32}", key) and key != place.name and path.stat().st_mtime < oldest:
            with suppress(OSError), _locked(directory / f"{key}.lock", wait=False):
                shutil.rmtree(path)
                say(f"tokenised data: {path} removed, unused for {UNUSED_DAYS} days")


def _renamed(found: tuple[TokenStore, DataReport], paths: Sequence[str]) -> tuple[TokenStore, DataReport]:
    """The store and report that were found, with the current paths of the files."""
    store, report = found
    reports = (dataclasses.replace(one, path=path) for one, path in zip(report.sources, paths, strict=True))
    return dataclasses.replace(store, sources=tuple(paths)), DataReport(tuple(reports))


def identity(
    config: DataConfig, template: Template, tokenizer_hash: str, examples: Examples = "answers"
) -> dict[str, Any]:
    """Everything that the examples of a config depend on, as settings and hashes."""
    return {
        "tokenizer": tokenizer_hash,
        "code": source_digest("data", without=_AFTER_TOKENISATION),
        "settings": {name: getattr(config, name) for name in _SHAPING},
        "template": template.jinja,
        "examples": examples,
        "sources": [_source_identity(source) for source in config.sources],
    }


def _source_identity(source: SourceConfig) -> dict[str, Any]:
    found = source_files(source.path, source.split)
    files = {path.relative_to(found.root).as_posix(): _file_hash(path) for path in found.files}
    described = {
        path.relative_to(found.root).as_posix(): dataclasses.asdict(description)
        for path, description in found.descriptions.items()
    }
    return {"format": source.format, "max_examples": source.max_examples, "files": files, "described": described}


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _why(directory: Path, parts: Mapping[str, Any]) -> str:
    """The difference between `parts` and the most similar corpus of the same data in the cache, as text."""
    others = []
    for path in directory.glob(f"*/{_STORE}"):
        try:
            others.append(_flatten(json.loads(path.read_text(encoding="utf-8"))["identity"]))
        except (OSError, ValueError, KeyError):
            continue
    mine = _flatten(json.loads(json.dumps(parts)))
    others = [other for other in others if _of_the_same_data(mine, other)]
    if not others:
        return "not in the cache yet"
    different = min((sorted({*mine, *other} - _common(mine, other)) for other in others), key=len)
    shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
    return f"miss, the corpus in the cache differs in {shown}" if shown else "miss, the corpus in the cache is damaged"


def _of_the_same_data(mine: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two corpora have a file in common, or the same file names."""
    files, others = ({name: flat[name] for name in flat if ".files." in name} for flat in (mine, other))
    return set(files) == set(others) or not set(files.values()).isdisjoint(others.values())


def _common(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    return {name for name in one if name in other and one[name] == other[name]}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict | list):
        items: Iterable[tuple[Any, Any]] = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: value for key, part in items for name, value in _flatten(part, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): tree}


def _build(
    config: DataConfig,
    template: Template,
    tokenizer: Tokenizer,
    parts: Mapping[str, Any],
    place: Path,
    say: Say,
    examples: Examples,
) -> tuple[TokenStore, DataReport]:
    workshop = place.with_name(f"{place.name}.parts")
    workshop.mkdir(parents=True, exist_ok=True)
    for abandoned in [*place.parent.glob(f".{place.name}.*"), *workshop.glob(".*")]:
        shutil.rmtree(abandoned)
    encoder = SegmentEncoder(tokenizer)
    reports: list[SourceReport] = []
    finished: list[Path] = []
    for index, source in enumerate(config.sources):
        done = _finished_parts(workshop, index)
        if done:
            say(f"{source.path}: continuing after {len(done)} finished parts")
        way = _Way(config, template, source, index, tokenizer, encoder, workshop, examples)
        reports.append(way.run(done))
        require_examples(reports[-1])
        finished += _finished_parts(workshop, index)
    _require_unchanged(config, parts, workshop)
    _join([_load_part(part) for part in finished], [source.path for source in config.sources], place, parts, reports)
    shutil.rmtree(workshop)
    opened = _open(place)
    assert opened is not None, "it has just been written"
    return opened


def _require_unchanged(config: DataConfig, parts: Mapping[str, Any], workshop: Path) -> None:
    """Raises `UserError` if the files changed during the build: the corpus would not match its key."""
    for source, read in zip(config.sources, parts["sources"], strict=True):
        if _source_identity(source) != read:
            shutil.rmtree(workshop)
            raise UserError(f"{source.path} was changed while it was read; start again when it no longer changes")


def _finished_parts(workshop: Path, source: int) -> list[Path]:
    return sorted(workshop.glob(f"{source:03d}-*"))


class _Way:
    """Builds the parts of one source."""

    def __init__(
        self,
        config: DataConfig,
        template: Template,
        source: SourceConfig,
        index: int,
        tokenizer: Tokenizer,
        encoder: SegmentEncoder,
        workshop: Path,
        examples: Examples,
    ) -> None:
        self._names = [s.path for s in config.sources]
        self._vocab_size = tokenizer.vocab_size
        self._index = index
        self._workshop = workshop
        self._report = SourceReport(source.path)
        self._source_build = SourceBuild(
            config, template, source, index, tokenizer, encoder, self._report, self._new_builder(), examples
        )

    def run(self, done: Sequence[Path]) -> SourceReport:
        """Builds the missing parts; returns the counts of the whole source."""
        passed, report, number = 0, None, len(done)
        if done:
            facts = _read_json(done[-1] / _FACTS)
            passed, report = facts["passed"], _report_from_json(facts["report"])
            if facts["complete"]:
                return report
        kept_before = report.kept if report else 0
        for gone_by in self._source_build.blocks(passed, report):
            passed = gone_by
            if self._report.kept - kept_before >= PART_EXAMPLES:
                self._save(number, passed, complete=False)
                kept_before = self._report.kept
                number += 1
        self._save(number, passed, complete=True)
        return self._report

    def _new_builder(self) -> StoreBuilder:
        return StoreBuilder(self._names, self._vocab_size)

    def _save(self, number: int, passed: int, complete: bool) -> None:
        store = self._source_build.builder.finish()
        self._source_build.builder = self._new_builder()
        part = self._workshop / f"{self._index:03d}-{number:06d}"
        partial = part.with_name(f".{part.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in (*_FLAT, "offsets", "task_index", "id_offsets", *_OF_PREFERENCES):
            if (array := getattr(store, name)) is not None:
                np.save(partial / f"{name}.npy", array, allow_pickle=False)
        facts = {"passed": passed, "complete": complete, "tasks": store.tasks, "report": _report_json(self._report)}
        (partial / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        _sync_and_move(partial, part)


@dataclasses.dataclass(frozen=True)
class _Part:
    arrays: Mapping[str, NDArray[Any]]
    tasks: tuple[str, ...]


def _load_part(directory: Path) -> _Part:
    names = (*_FLAT, "offsets", "task_index", "id_offsets", *_present(directory))
    arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in names}
    return _Part(arrays, tuple(_read_json(directory / _FACTS)["tasks"]))


def _join(
    parts: Sequence[_Part],
    sources: Sequence[str],
    place: Path,
    identity: Mapping[str, Any],
    reports: Sequence[SourceReport],
) -> None:
    """Concatenates the parts, one array at a time, so that at most one part is in memory."""
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tasks = tuple(dict.fromkeys(task for part in parts for task in part.tasks))
    position = {task: index for index, task in enumerate(tasks)}
    for name in (*_FLAT, *_OF_PREFERENCES):
        # A part without examples has no arrays of preferences.
        if arrays := [part.arrays[name] for part in parts if name in part.arrays]:
            _write_joined(partial / f"{name}.npy", arrays)
    renumbered = [
        np.array([position[task] for task in part.tasks], np.int32)[part.arrays["task_index"]] for part in parts
    ]
    _write_joined(partial / "task_index.npy", renumbered)
    for name in ("offsets", "id_offsets"):
        ends = np.cumsum([0, *(int(part.arrays[name][-1]) for part in parts)])
        shifted = [np.asarray(part.arrays[name][1:]) + start for part, start in zip(parts, ends[:-1], strict=True)]
        _write_joined(partial / f"{name}.npy", [np.zeros(1, np.int64), *shifted])
    facts = {
        "identity": identity,
        "sources": list(sources),
        "tasks": tasks,
        "reports": [_report_json(report) for report in reports],
        "fingerprint": _mapped(partial, sources, tasks).fingerprint,
    }
    (partial / _STORE).write_text(json.dumps(facts), encoding="utf-8")
    _sync_and_move(partial, place)


def _write_joined(path: Path, arrays: Sequence[NDArray[Any]]) -> None:
    total = sum(len(array) for array in arrays)
    header = {"descr": arrays[0].dtype.str, "fortran_order": False, "shape": (total,)}
    # Written, not mapped: on a full disk, a mapped file would kill the process without a message.
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for array in arrays:
            file.write(np.ascontiguousarray(array).data)


def _sync_and_move(partial: Path, place: Path) -> None:
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(place, ignore_errors=True)
    os.replace(partial, place)


def _open(place: Path) -> tuple[TokenStore, DataReport] | None:
    """The corpus at `place`, memory-mapped; None if it does not exist or is incomplete."""
    if not (place / _STORE).is_file():
        return None
    try:
        facts = _read_json(place / _STORE)
        store = _mapped(place, facts["sources"], facts["tasks"])
        reports = tuple(_report_from_json(report) for report in facts["reports"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    consistent = store.offsets[-1] == len(store.tokens) == len(store.loss_mask) and len(store) == len(store.supervised)
    intact = consistent and store.fingerprint == facts.get("fingerprint")
    return (store, DataReport(reports)) if intact else None


def _mapped(place: Path, sources: Sequence[str], tasks: Sequence[str]) -> TokenStore:
    names = (*_FLAT, "offsets", "task_index", "id_offsets", *_present(place))
    arrays = {name: _map(place / f"{name}.npy") for name in names}
    return TokenStore(**arrays, sources=tuple(sources), tasks=tuple(tasks))


def _present(place: Path) -> list[str]:
    return [name for name in _OF_PREFERENCES if (place / f"{name}.npy").exists()]


def _map(path: Path) -> NDArray[Any]:
    # An ndarray view, because slices of np.memmap copy its attributes, which costs more than the slice.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _report_json(report: SourceReport) -> dict[str, Any]:
    return dict(vars(report))


def _report_from_json(tree: Mapping[str, Any]) -> SourceReport:
    counters = {name: Counter(tree[name]) for name in ("dropped", "changed", "ignored")}
    lists = {name: tuple(tree[name]) for name in ("ignored_files", "notes")}
    return SourceReport(**{**tree, **counters, **lists})
