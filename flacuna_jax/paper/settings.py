"""Settings of an experiment (configs/paper_135m/30m.yaml, ...): its size, its methods and its benchmarks."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flacuna_jax.config.types import LocalPath, NonNegativeInt, PositiveFloat, PositiveInt, Section

Share = Annotated[float, Field(ge=0, lt=1)]


class MethodSettings(Section):
    """A way of training: a training config, and the learning rates to choose from."""

    config: str
    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]


class VariantSettings(Section):
    """A further run of a method with one change."""

    method: str
    chat_share: Share | None = None
    """Share of chat records; null: as in the other runs."""
    few_shot: Share | None = None
    """Share of task and code records with worked examples; null: as the collection's config says."""
    options: tuple[str, ...] = ()
    """Further options of `flacuna train`."""


class PeftSettings(Section):
    """The comparison with PEFT: the same data, order, initial adapter and schedule."""

    method: str
    steps: PositiveInt


class BenchmarkSettings(Section):
    """Benchmarks that are run with one limit."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """As in `flacuna evaluate --tasks`."""
    limit: PositiveInt | None = None
    """Problems per subject or task; null: all."""
    of: Literal["all", "methods"] = "all"
    """all: every trained model; methods: without the variants of the mixture."""
    options: tuple[str, ...] = ()
    """Further options of `flacuna evaluate`."""


class ExperimentSettings(Section):
    output_dir: LocalPath
    budget: str
    """Name of the budget, for the page."""
    seed: NonNegativeInt = 42
    base: LocalPath
    """The chat model: a directory or a GGUF file."""
    data: LocalPath
    """Directory of the sources of the mixture and of the benchmarks."""
    tasks: str
    """Config of the collection of tasks and code."""
    chat: str
    """Config of the collection of chat records."""
    scale: PositiveFloat = 1.0
    """Factor for the sizes of both collections."""
    examples: PositiveInt
    """Records of each run."""
    held_out: PositiveInt
    """Records that no run trains on, with the same share of chat records, for the held-out loss."""
    chat_share: Share = 0.084
    """Share of chat records among them; FLAN-mini's is 0.084."""
    row_length: PositiveInt = 1280
    """Maximum length of a record, and length of the packed rows."""
    batch_size: PositiveInt = 16
    methods: Annotated[dict[str, MethodSettings], Field(min_length=1)]
    """Name -> training config and learning rates."""
    sweep_examples: PositiveInt
    """Records of each run of the sweep over learning rates."""
    variants: Annotated[dict[str, VariantSettings], Field(default_factory=dict)]
    """Name -> further run."""
    questions: Annotated[dict[str, tuple[str, ...]], Field(default_factory=dict)]
    """Heading -> the methods and variants that are compared below it."""
    peft: PeftSettings | None = None
    benchmarks: tuple[BenchmarkSettings, ...] = ()
    letters: bool = False
    """lm-evaluation-harness also scores the letters after the prompts of mmlu:0 (`paper.letters`)."""

    @model_validator(mode="after")
    def names_exist(self) -> "ExperimentSettings":
        runs = [*self.methods, *self.variants]
        if len(set(runs)) < len(runs):
            raise ValueError("a variant has the name of a method")
        methods = [variant.method for variant in self.variants.values()]
        methods += [self.peft.method] if self.peft else []
        compared = [name for compared in self.questions.values() for name in compared]
        for kind, names, known in (
            ("methods", methods, list(self.methods)),
            ("methods and variants", compared, runs),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{unknown[0]!r} is not one of the {kind} {', '.join(known)}")
        if self.letters and not any("mmlu:0" in benchmark.tasks for benchmark in self.benchmarks):
            raise ValueError("letters needs the benchmark mmlu:0, for its prompts")
        return self
