"""Builds the collection: scan, draw, word, merge. Memory is bounded, the bytes are deterministic, every record is
counted."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.data.conversation import template_source
from flacuna_jax.data.files import DataFiles
from flacuna_jax.data.hub import dataset_files
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.account import SourceAccount, Statistics
from flacuna_jax.flan_mini.config import FlanMiniConfig, MixtureSource
from flacuna_jax.flan_mini.draw import Candidates, accepted, gather, next_draw, targets
from flacuna_jax.flan_mini.identity import build_key, file_hash, settings_that_count
from flacuna_jax.flan_mini.merge import Part, merge
from flacuna_jax.flan_mini.readers import READERS
from flacuna_jax.flan_mini.stages import LoadTokenizer, fetch, records_path, scan, write
from flacuna_jax.flan_mini.templates import family, load_families
from flacuna_jax.flan_mini.work import Crew, Job, Result, load_result, save_result
from flacuna_jax.hub import is_hub_name, snapshot_of
from flacuna_jax.say import Say
from flacuna_jax.source_code import source_digest

UNIT_BYTES, UNIT_FILES = 64 << 20, 64
"""Maximum bytes and maximum number of files that one job reads."""


@dataclass(frozen=True)
class SourceFiles:
    source: MixtureSource
    units: tuple[tuple[Path, ...], ...]
    ignored: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        return [path for unit in self.units for path in unit]


@dataclass(frozen=True)
class Inputs:
    """The files of a build. `hashes`: source -> file, relative to the source's path -> sha256."""

    sources: tuple[SourceFiles, ...]
    hashes: Mapping[str, Mapping[str, str]]
    parts: Mapping[str, Any]
    """Everything that the records depend on, as hashes and settings; `key` is its hash."""

    @property
    def key(self) -> str:
        return build_key(self.parts)


@dataclass(frozen=True)
class Built:
    records: int
    sha256: str
    path: Path
    accounts: tuple[SourceAccount, ...]
    statistics: Statistics


def find_inputs(config: FlanMiniConfig, tokenizer_hash: str, say: Say) -> Inputs:
    """Finds and hashes every input file. Raises UserError if a source has none, or has an unknown family."""
    _check_families(config)
    sources = []
    hashes: dict[str, dict[str, str]] = {}
    for source in config.sources:
        source, found = _find(source)
        files = SourceFiles(source, _units(found.files), found.ignored)
        sources.append(files)
        hashes[source.name] = _hashes(source, files)
    size = sum(path.stat().st_size for files in sources for path in files.files)
    say(f"inputs: {sum(len(files.files) for files in sources):,} files, {size / 1e6:,.1f} MB, all hashed")
    extra = sorted(Path(config.family_templates).glob("*.yaml")) if config.family_templates else []
    parts = {
        "code": source_digest("data", "flan_mini"),
        "libraries": {"markdownify": version("markdownify")},
        "settings": settings_that_count(config),
        "inputs": hashes,
        "tokenizer": tokenizer_hash,
        "template": template_source(config.template),
        "family_templates": {path.name: file_hash(path) for path in extra},
    }
    return Inputs(tuple(sources), hashes, parts)


def _find(source: MixtureSource) -> tuple[MixtureSource, DataFiles]:
    """A source with its path on this machine, and its files; for a dataset of the Hub, those of its split."""
    if not is_hub_name(source.path):
        source = source.model_copy(update={"path": str(snapshot_of(Path(source.path)))})
        return source, READERS[source.kind].find(source)
    dataset = dataset_files(source.path)
    source = source.model_copy(update={"path": str(dataset.root)})
    found, chosen = READERS[source.kind].find(source), frozenset(dataset.files)
    return source, DataFiles(tuple(file for file in found.files if file in chosen), found.ignored)


def _check_families(config: FlanMiniConfig) -> None:
    families = load_families(config.family_templates)
    for source in config.sources:
        for task in source.tasks:
            where = f"sources.{source.name}: task {task.name}"
            needed = family(families, task.family, where).needs()
            if missing := sorted(needed - set(task.fields)):
                raise UserError(f"{where}: family {task.family} also needs fields for {', '.join(missing)}")


def _hashes(source: MixtureSource, files: SourceFiles) -> dict[str, str]:
    root = Path(source.path)
    hashes = {(path.name if path == root else path.relative_to(root).as_posix()): path for path in files.files}
    if source.kind == "apps":
        # In the directory layout, a problem has several files, of which one was found.
        for path in [p for p in files.files if p.name == "question.txt"]:
            for sibling in sorted(path.parent.iterdir()):
                if sibling.is_file():
                    hashes[sibling.relative_to(root).as_posix()] = sibling
    if source.templates is not None:
        for path in sorted(Path(source.templates).rglob("templates.yaml")):
            hashes[f"templates: {path.relative_to(source.templates).as_posix()}"] = path
    return {name: file_hash(path) for name, path in sorted(hashes.items())}


def _units(files: Sequence[Path]) -> tuple[tuple[Path, ...], ...]:
    units: list[list[Path]] = []
    room = 0
    for path in files:
        size = path.stat().st_size
        if not units or size > room or len(units[-1]) >= UNIT_FILES:
            units.append([])
            room = UNIT_BYTES
        units[-1].append(path)
        room -= size
    return tuple(tuple(unit) for unit in units)


def build(config: FlanMiniConfig, inputs: Inputs, load_tokenizer: LoadTokenizer, say: Say) -> Built:
    """Builds the records into `config.directory`.

    Raises UserError for invalid input, and for a source with too few records if `on_short` is error. Then only the work
    directory is written to the output, from which the next build continues.
    """
    work = config.directory / f".work-{inputs.key[:16]}"
    _remove_stale(config.directory, work, say)
    with Crew(config.workers) as crew:
        built = [
            _Source(config, files, work / files.source.name, load_tokenizer, crew, say).run()
            for files in inputs.sources
        ]
    _check_short(config, [source.account for source in built])
    say("merging")
    merged = merge(config, [part for source in built for part in source.parts])
    statistics = Statistics.of([source.statistics for source in built])
    shutil.rmtree(work)
    return Built(merged.records, merged.sha256, merged.path, tuple(s.account for s in built), statistics)


def _remove_stale(directory: Path, work: Path, say: Say) -> None:
    for other in sorted(directory.glob(".work-*")) if directory.is_dir() else []:
        if other != work:
            say(f"removing an unfinished build with other settings or inputs ({other.name})")
            shutil.rmtree(other)


def _check_short(config: FlanMiniConfig, accounts: Sequence[SourceAccount]) -> None:
    short = [account for account in accounts if account.records < account.wanted]
    if short and config.on_short == "error":
        lines = [f"  {a.name}: {a.records:,} of {a.wanted:,} records; {a.why_short()}" for a in short]
        raise UserError(
            "too few records for the mixture:\n" + "\n".join(lines) + "\n(on_short: report uses what there is; a "
            "smaller scale or `examples` needs less)"
        )


@dataclass(frozen=True)
class _BuiltSource:
    account: SourceAccount
    statistics: Statistics
    parts: tuple[Part, ...]


class _Source:
    """Builds the accepted records of one source from its files."""

    def __init__(
        self,
        config: FlanMiniConfig,
        files: SourceFiles,
        work: Path,
        load_tokenizer: LoadTokenizer,
        crew: Crew,
        say: Say,
    ) -> None:
        self._config = config
        self._files = files
        self._source = files.source
        self._work = work
        self._load_tokenizer = load_tokenizer
        self._crew = crew
        self._say = say

    def run(self) -> _BuiltSource:
        scans = self._scan()
        candidates = gather(self._source, scans, self._config.seed)
        wanted_total = self._config.wanted(self._source)
        written: list[tuple[Path, Result]] = []
        rounds = 0
        while True:
            wanted = targets(self._source, candidates, wanted_total)
            drawn = next_draw(self._source, candidates, wanted, self._config.few_shot.pool)
            if drawn is None:
                break
            directory = self._work / f"round-{rounds}"
            save_result(directory / "drawn.npz", drawn.result())
            for bucket, result in enumerate(self._write_round(directory, drawn.buckets)):
                candidates.record_outcomes(result.arrays["keys"], result.arrays["parts"])
                written.append((records_path(directory, bucket), result))
            rounds += 1
        keys, used = accepted(candidates, wanted)
        return self._close(scans, candidates, keys, used, written)

    def _scan(self) -> list[Result]:
        jobs = [
            Job(self._work / f"scan-{unit}.npz", scan, (self._config, self._source, files))
            for unit, files in enumerate(self._files.units)
        ]
        self._run("scanned", jobs)
        return [load_result(job.path) for job in jobs]

    def _write_round(self, directory: Path, buckets: int) -> list[Result]:
        bucket_jobs = [
            Job(
                directory / f"bucket-{bucket}.npz",
                write,
                (self._config, self._source, self._load_tokenizer, directory, len(self._files.units), bucket),
            )
            for bucket in range(buckets)
        ]
        if not all(job.path.exists() for job in bucket_jobs):
            fetch_jobs = [
                Job(
                    directory / f"fetch-{unit}.npz",
                    fetch,
                    (self._config, self._source, files, directory / "drawn.npz", directory, unit),
                )
                for unit, files in enumerate(self._files.units)
            ]
            self._run("fetched", fetch_jobs)
        self._run("worded", bucket_jobs)
        return [load_result(job.path) for job in bucket_jobs]

    def _run(self, what: str, jobs: Sequence[Job]) -> None:
        found = self._crew.run(jobs)
        continued = f", {found} of them by an interrupted build" if found else ""
        self._say(f"{self._source.name}: {what} in {len(jobs)} job{'s' * (len(jobs) != 1)}{continued}")

    def _close(
        self,
        scans: Sequence[Result],
        candidates: Candidates,
        keys: NDArray[np.uint64],
        used: NDArray[np.int32],
        written: Sequence[tuple[Path, Result]],
    ) -> _BuiltSource:
        account = SourceAccount.of(
            self._config, self._source, self._files.ignored, scans, candidates, keys, used, [r for _, r in written]
        )
        statistics = Statistics.of_source(
            self._source.name, candidates, keys, used, [result.arrays for _, result in written]
        )
        parts = tuple(Part(path, keys, used) for path, _ in written)
        return _BuiltSource(account, statistics, parts)
