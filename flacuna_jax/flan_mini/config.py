"""Every setting of a collection build (`configs/flan_mini.yaml`): typed, documented, validated."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from flacuna_jax.config.types import LocalPath, NonNegativeInt, PositiveFloat, PositiveInt, Section, TemplateName

Kind = Literal[
    "flan_rows",
    "natural_instructions",
    "chain_of_thought",
    "promptsource",
    "task_rows",
    "code_search_net",
    "apps",
    "code_contests",
    "alpaca",
    "sharegpt",
    "flan_mini",
]
Language = Literal["python", "python2", "cpp", "java", "javascript", "go", "php", "ruby"]
Share = Annotated[float, Field(ge=0, le=1)]

FLAN_TYPES = ("zs_opt", "zs_noopt", "fs_opt", "fs_noopt")
DIRECTIONS = ("direct", "inverse")
TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "flan_rows": FLAN_TYPES,
        "chain_of_thought": DIRECTIONS,
        "code_search_net": DIRECTIONS,
        "apps": DIRECTIONS,
        "code_contests": DIRECTIONS,
    }
)
"""The types of items of each kind of source, which `shares` can weight."""

_ONLY_FOR: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "shares": tuple(TYPES),
        "templates": ("promptsource",),
        "tasks": ("task_rows",),
        "languages": ("code_search_net", "code_contests"),
        "max_solutions": ("apps", "code_contests"),
        "few_shot": (
            "flan_rows",
            "natural_instructions",
            "chain_of_thought",
            "promptsource",
            "task_rows",
            "code_search_net",
            "apps",
            "code_contests",
        ),
    }
)


class TaskConfig(Section):
    """The mapping of rows of one raw dataset to items of a template family."""

    name: str
    """The `source` of the records, for example "glue/rte:2.0.0"."""
    family: str
    """A template family, for example nli or summarization."""
    files: str
    """File or glob, relative to the source's path."""
    fields: dict[str, str]
    """Placeholder of the family -> column of the rows."""
    labels: dict[str, str] | None = None
    """Value of the answer column -> the model's answer; the answers are also the options, in this order."""


class MixtureSource(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Name of the source in reports and ids."""
    kind: Kind
    path: LocalPath
    """A file or directory in the source's published layout, or hf:NAME[@REVISION][:CONFIG[:SPLIT]] for a dataset of the
    Hub."""
    examples: PositiveInt
    """Number of records at scale 1."""
    rate_cap: PositiveInt | None = None
    """Tasks share the source in proportion to their number of items, up to this maximum (that of FLAN)."""
    max_per_task: PositiveInt | None = None
    """Maximum number of records of any task, and of any type of a task."""
    shares: dict[str, PositiveFloat] | None = None
    """Relative weight of each type of item: zs_opt, zs_noopt, fs_opt, fs_noopt, or direct and inverse."""
    few_shot: Share = 0.0
    """Fraction of the items with exemplars, for sources whose rows have no template yet."""
    include: tuple[str, ...] = ()
    """Patterns (with * and ?) of the task names to use. Empty: all."""
    exclude: tuple[str, ...] = ()
    """Patterns of task names to exclude; they are counted."""
    templates: str | None = None
    """promptsource: directory of the templates.yaml files."""
    tasks: tuple[TaskConfig, ...] = ()
    """task_rows: the datasets."""
    languages: tuple[Language, ...] = ()
    """Programming languages to keep; empty: all."""
    max_solutions: PositiveInt = 10
    """Maximum number of solutions per programming problem."""

    @model_validator(mode="after")
    def options_belong_to_kind(self) -> "MixtureSource":
        for option, kinds in _ONLY_FOR.items():
            default = type(self).model_fields[option].default
            if self.kind not in kinds and getattr(self, option) != default:
                raise ValueError(f"{option} does not apply to kind {self.kind}, only to {', '.join(kinds)}")
        if self.kind == "promptsource" and self.templates is None:
            raise ValueError("kind promptsource needs templates: the directory of templates.yaml files")
        if self.kind == "task_rows" and not self.tasks:
            raise ValueError("kind task_rows needs tasks")
        for name in self.shares or {}:
            if name not in TYPES[self.kind]:
                raise ValueError(f"shares: {name!r} is not one of {', '.join(TYPES[self.kind])}")
        return self


class FewShotConfig(Section):
    max_exemplars: PositiveInt = 5
    pool: PositiveInt = 64
    """Number of items of each task from which exemplars are drawn."""


class LeakageConfig(Section):
    files: Annotated[dict[str, str], Field(min_length=1, max_length=64)]
    """Benchmark -> file or directory of its items (json, jsonl, csv, tsv, txt, parquet; .gz too)."""
    ngram: Annotated[int, Field(ge=3)] = 8
    """Number of words per n-gram."""


class FlanMiniConfig(Section):
    output_dir: LocalPath
    seed: NonNegativeInt = 42
    scale: PositiveFloat = 1.0
    """Factor for the `examples` of every source."""
    tokenizer: LocalPath
    """Directory with tokenizer.model or tokenizer.json, or hf:NAME[@REVISION]; it is used to measure lengths."""
    template: TemplateName = "vicuna_v1.1"
    """The conversation format for measuring lengths."""
    max_length: Annotated[int, Field(ge=64)] = 1280
    """Maximum length of a record in tokens, including the template."""
    format: Literal["json", "jsonl", "parquet"] = "json"
    """json: one list, as in the release; jsonl: a record per line; parquet."""
    workers: PositiveInt = 1
    """Number of processes. The result does not depend on it."""
    on_short: Literal["error", "report"] = "error"
    """For a source with too few records. error: stop. report: use what there is and report it."""
    on_bad_record: Literal["error", "skip"] = "error"
    family_templates: str | None = None
    """Directory of additional template families (YAML); they replace built-in families of the same name."""
    few_shot: FewShotConfig = FewShotConfig()
    leakage: LeakageConfig | None = None
    batch_size: PositiveInt = 128
    """Examples per optimizer step, for the report."""
    sources: Annotated[tuple[MixtureSource, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def names_are_distinct(self) -> "FlanMiniConfig":
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources have the name {name!r}")
        return self

    def wanted(self, source: MixtureSource) -> int:
        return max(1, round(source.examples * self.scale))

    @property
    def directory(self) -> Path:
        return Path(self.output_dir)

    def with_benchmarks(self, files: Mapping[str, str]) -> "FlanMiniConfig":
        """The same, with further files to search the records for."""
        if not files:
            return self
        known = self.leakage or LeakageConfig(files=dict(files))
        leakage = known.model_copy(update={"files": {**known.files, **files}})
        return self.model_copy(update={"leakage": leakage})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
