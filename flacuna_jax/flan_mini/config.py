"""Every setting of a collection build (`configs/flan_mini.yaml`): typed, documented, validated."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from flacuna_jax.config.schema import LocalPath, NonNegativeInt, PositiveFloat, PositiveInt, Section, TemplateName

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
"""The types of item that a kind of source tells apart, and that `shares` can weigh."""

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
    """How rows of one raw dataset become items of a template family."""

    name: str
    """The `source` of the records, for example "glue/rte:2.0.0"."""
    family: str
    """A template family, for example nli or summarization."""
    files: str
    """File or glob, relative to the source's path."""
    fields: dict[str, str]
    """Placeholder of the family -> column of the rows."""
    labels: dict[str, str] | None = None
    """What the answer column says -> what the model is to answer; also the options, in this order."""


class MixtureSource(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """How reports and ids call this source."""
    kind: Kind
    path: LocalPath
    """A file or directory in the source's published layout, or hf:NAME[:CONFIG[:SPLIT]] for a dataset of the hub."""
    examples: PositiveInt
    """Records wanted, at scale 1."""
    rate_cap: PositiveInt | None = None
    """Tasks share the source in proportion to their size, but none counts for more than this (FLAN's maximum)."""
    max_per_task: PositiveInt | None = None
    """No more records than this of any task, nor of any type of it."""
    shares: dict[str, PositiveFloat] | None = None
    """Relative weight per type of item: zs_opt, zs_noopt, fs_opt, fs_noopt, or direct and inverse."""
    few_shot: Share = 0.0
    """Part of the items that is shown with exemplars, where the source's rows are not templated already."""
    include: tuple[str, ...] = ()
    """Patterns (with * and ?) of task names; only these. Empty: all."""
    exclude: tuple[str, ...] = ()
    """Patterns of task names that are left out, and counted."""
    templates: str | None = None
    """promptsource: the directory of templates.yaml files."""
    tasks: tuple[TaskConfig, ...] = ()
    """task_rows: the datasets."""
    languages: tuple[Language, ...] = ()
    """Programming languages to keep; empty: all."""
    max_solutions: PositiveInt = 10
    """Solutions used per programming problem."""

    @model_validator(mode="after")
    def options_belong_to_kind(self) -> "MixtureSource":
        for option, kinds in _ONLY_FOR.items():
            default = type(self).model_fields[option].default
            if self.kind not in kinds and getattr(self, option) != default:
                raise ValueError(f"{option} is not for kind {self.kind}; it is for {', '.join(kinds)}")
        if self.kind == "promptsource" and self.templates is None:
            raise ValueError("kind promptsource needs templates: the directory of templates.yaml files")
        if self.kind == "task_rows" and not self.tasks:
            raise ValueError("kind task_rows needs tasks")
        for name in self.shares or {}:
            if name not in TYPES[self.kind]:
                raise ValueError(f"shares: {name!r} is none of {', '.join(TYPES[self.kind])}")
        return self


class FewShotConfig(Section):
    max_exemplars: PositiveInt = 5
    pool: PositiveInt = 64
    """Items of each task that exemplars are drawn from."""


class LeakageConfig(Section):
    files: Annotated[dict[str, str], Field(min_length=1, max_length=64)]
    """Benchmark -> file or directory of its items (json, jsonl, csv, tsv, txt, parquet; .gz too)."""
    ngram: Annotated[int, Field(ge=3)] = 8
    """Words per n-gram."""


class FlanMiniConfig(Section):
    output_dir: LocalPath
    seed: NonNegativeInt = 42
    scale: PositiveFloat = 1.0
    """Every source's `examples` times this."""
    tokenizer: LocalPath
    """Directory with tokenizer.model or tokenizer.json: lengths are counted in its tokens."""
    template: TemplateName = "vicuna_v1.1"
    """The conversation format that lengths are measured in."""
    max_length: Annotated[int, Field(ge=64)] = 1280
    """Tokens of the longest record, template included."""
    format: Literal["json", "jsonl", "parquet"] = "json"
    """json: one list, as released; jsonl: a record per line; parquet."""
    workers: PositiveInt = 1
    """Processes. Any number gives the same bytes."""
    on_short: Literal["error", "report"] = "error"
    """A source that cannot give what is wanted: stop, or take what there is and report it."""
    on_bad_record: Literal["error", "skip"] = "error"
    family_templates: str | None = None
    """Directory of further template families (YAML); one of the same name replaces ours."""
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
                raise ValueError(f"two sources are called {name!r}")
        return self

    def wanted(self, source: MixtureSource) -> int:
        return max(1, round(source.examples * self.scale))

    @property
    def directory(self) -> Path:
        return Path(self.output_dir)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
