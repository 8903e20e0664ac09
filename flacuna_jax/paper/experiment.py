"""The stages of the experiment: data, sweep over learning rates, training, PEFT beside it, evaluation.

Paths are those below `output_dir`: data/, sweep/, runs/, peft/, evaluation/, stages/ (records), page/.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from flacuna_jax.config.files import load_config
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import FlanMiniConfig
from flacuna_jax.logs.report import read_metrics
from flacuna_jax.paper.settings import BenchmarkSettings, ExperimentSettings
from flacuna_jax.paper.stages import Record, Stage, Stages

BASE = "base"
"""Name of the untuned model in results."""
Losses = Mapping[str, Mapping[float, float]]
"""Held-out loss of each method's short run with each learning rate."""
COLLECTIONS = ("tasks", "chat")
SAMPLE_DATA = "data"
"""First part of the paths in the configs of the collections; `ExperimentSettings.data` replaces it."""
LEAKAGE = {
    "MMLU": "mmlu/data/val",
    "BBH": "bbh/bbh",
    "DROP": "drop",
    "CRASS": "crass",
    "HumanEval": "humaneval",
    "HHH": "hhh",
}
"""Benchmark -> its files in the sample data."""


def shares(records: int, chat_share: float) -> dict[str, int]:
    """Number of records of each collection, of `records` in all."""
    chat = round(records * chat_share)
    return {"tasks": records - chat, "chat": chat}


@dataclasses.dataclass(frozen=True)
class Training:
    """One training run: its method, its data, its learning rate and its directory."""

    name: str
    method: str
    directory: Path
    examples: int
    chat_share: float
    rate: float

    @property
    def sources(self) -> dict[str, int]:
        """Number of records of each collection that is used."""
        return {name: count for name, count in shares(self.examples, self.chat_share).items() if count}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Runs the stages of an experiment.

    Attributes:
      settings: the experiment's size, methods and benchmarks.
      peft_python: an interpreter with torch, transformers and peft, for the comparison; None leaves it out.
    """

    settings: ExperimentSettings
    stages: Stages
    peft_python: str | None = None

    @property
    def output(self) -> Path:
        return Path(self.settings.output_dir)

    def collection(self, name: str) -> Path:
        return self.output / "data" / name

    def records(self, name: str, part: str) -> Path:
        """The file with the records to train on ("train"), or with those that are held out of all runs ("held_out")."""
        return self.collection(name) / f"{part}.jsonl"

    def results(self, model: str, number: int) -> Path:
        """Directory with a model's results of the benchmarks with this number in the settings."""
        return self.output / "evaluation" / str(number) / model

    def all_results(self, model: str) -> list[Path]:
        """Files of a model's results."""
        numbers = range(len(self.settings.benchmarks))
        return [path for number in numbers for path in sorted(self.results(model, number).glob("*.json"))]

    def prepare(self) -> None:
        """Builds both collections, and sets held-out records aside."""
        held_out = shares(self.settings.held_out, self.settings.chat_share)
        for name, config in (("tasks", self.settings.tasks), ("chat", self.settings.chat)):
            self.stages.run(self._collection_stage(name, config))
            self.stages.run(self._split_stage(name, held_out[name]))

    def choose_rates(self) -> Losses:
        """Runs the sweep. Returns, for each method, the held-out loss at the end of a short run per learning rate; NaN
        if there is no choice."""
        losses: dict[str, dict[float, float]] = {}
        for method, choice in self.settings.methods.items():
            if len(choice.rates) == 1:
                losses[method] = dict.fromkeys(choice.rates, math.nan)
                continue
            for rate in choice.rates:
                name = f"sweep/{method}/{rate:g}"
                run = Training(
                    name, method, self.output / name, self.settings.sweep_examples, self.settings.chat_share, rate
                )
                self.train(run)
                losses.setdefault(method, {})[rate] = held_out_losses(run.directory)[-1]
        return losses

    def trainings(self, losses: Losses) -> list[Training]:
        """The runs that are evaluated, with the best learning rate of their method."""
        settings = self.settings
        planned = [(method, method, settings.chat_share) for method in settings.methods]
        planned += [(f"chat{share:.0%}"[:-1], settings.variant_method, share) for share in settings.chat_shares]
        return [
            Training(
                name, method, self.output / "runs" / name, settings.examples, share,
                min(losses[method], key=losses[method].__getitem__),
            )
            for name, method, share in planned
        ]  # fmt: skip

    def train(self, run: Training) -> Record:
        """Trains a run. Raises UserError if the collections have too few records for it."""
        for name, wanted in run.sources.items():
            with self.records(name, "train").open("rb") as file:
                there = sum(1 for _ in file)
            if there < wanted:
                raise UserError(f"{run.name} needs {wanted} records of {name}, and there are {there}: raise scale")
        return self.stages.run(self._train_stage(run))

    def compare_with_peft(self, run: Training) -> None:
        """PEFT's first steps on the batches of a run, if the settings name its method and there is an interpreter."""
        peft = self.settings.peft
        if peft is None or self.peft_python is None or run.name != peft.method:
            return
        out = self.output / "peft"
        command = (
            "paper.beside_peft", "--steps", str(peft.steps), "--output", str(out / "losses.json"),
            *self._train_arguments(run, out / "run"),
        )  # fmt: skip
        inputs = self._train_inputs(run)
        self.stages.run(Stage("peft", command, inputs, (out / "losses.json",), out, self.peft_python))

    def evaluate(self, name: str, run: Training | None) -> None:
        """Runs the benchmarks on a model; `run` is None for the base."""
        for number, benchmark in enumerate(self.settings.benchmarks):
            if benchmark.of == "all" or run is None or run.name in self.settings.methods:
                self.stages.run(self._evaluate_stage(name, run, number, benchmark))

    def _collection_stage(self, name: str, config: str) -> Stage:
        directory = self.collection(name)
        overrides = [
            f"--sources.{number}.path={json.dumps(path)}"
            for number, path in enumerate(_source_paths(config, self.settings.data))
        ]
        command = (
            "prepare", "--config", config, "--output", str(directory), f"--scale={self.settings.scale}",
            f"--tokenizer={self.settings.base}",
            f"--max_length={self.settings.row_length}", f"--seed={self.settings.seed}", *overrides,
            *(f"--leakage={one}={path}" for one, path in _benchmark_files(Path(self.settings.data))),
        )  # fmt: skip
        return Stage(f"data-{name}", command, (Path(config),), (directory / "flan_mini.json",))

    def _split_stage(self, name: str, held_out: int) -> Stage:
        collection, directory = self.collection(name) / "flan_mini.json", self.collection(name)
        command = ("paper.split", str(collection), "--held-out", str(held_out), "--output", str(directory))
        outputs = (self.records(name, "train"), self.records(name, "held_out"))
        return Stage(f"split-{name}", command, (collection,), outputs)

    def _train_arguments(self, run: Training, directory: Path) -> list[str]:
        settings = self.settings
        sources = [
            {"path": str(self.records(name, "train")), "format": "flan_mini", "max_examples": count}
            for name, count in run.sources.items()
        ]
        held_out = [{"path": str(self.records(name, "held_out")), "format": "flan_mini"} for name in COLLECTIONS]
        return [
            "--config", settings.methods[run.method].config, f"--output_dir={directory}", f"--seed={settings.seed}",
            f"--model.path={settings.base}", f"--data.sources={json.dumps(sources)}",
            f"--evaluation.sources={json.dumps(held_out)}",
            f"--data.max_length={settings.row_length}", f"--training.batch_size={settings.batch_size}",
            f"--training.learning_rate={run.rate!r}",
        ]  # fmt: skip

    def _train_inputs(self, run: Training) -> tuple[Path, ...]:
        data = [self.records(name, "train") for name in run.sources]
        data += [self.records(name, "held_out") for name in COLLECTIONS]
        return (Path(self.settings.methods[run.method].config), Path(self.settings.base), *data)

    def _train_stage(self, run: Training) -> Stage:
        command = ("train", *self._train_arguments(run, run.directory))
        outputs = (delivered(run, self.settings), run.directory / "metrics.jsonl")
        return Stage(f"train-{_safe(run.name)}", command, self._train_inputs(run), outputs, run.directory)

    def _evaluate_stage(self, name: str, run: Training | None, number: int, benchmark: BenchmarkSettings) -> Stage:
        settings, base, directory = self.settings, Path(self.settings.base), self.results(name, number)
        inputs: tuple[Path, ...] = (base,)
        model: tuple[str, ...] = ("--model", str(base))
        if run is not None:
            weights = delivered(run, settings)
            inputs = (base, weights)
            is_adapter = weights.parent.name == "adapter"
            model = (*model, "--adapter", str(weights.parent)) if is_adapter else ("--model", str(weights.parent))
        command = (
            "evaluate", *model, "--name", name, "--tasks", ",".join(benchmark.tasks), "--data", settings.data,
            "--output", str(directory.parent), "--no-published", "--allow-code-execution",
            *(() if benchmark.limit is None else ("--limit", str(benchmark.limit))), *benchmark.options,
        )  # fmt: skip
        return Stage(f"evaluate-{name}-{number}", command, inputs, (directory,), directory)


def held_out_losses(run: Path) -> list[float]:
    """Held-out losses of a run, from the one before its first step to that after its last."""
    records = read_metrics(run / "metrics.jsonl")
    return [record["eval/loss"] for record in records if record.get("kind") == "evaluation"]


def delivered(run: Training, settings: ExperimentSettings) -> Path:
    """The file with the weights that a run delivers."""
    if load_config(settings.methods[run.method].config).lora is None:
        return run.directory / "model" / "model.safetensors"
    return run.directory / "adapter" / "adapter_model.safetensors"


def _source_paths(config: str, data: str) -> list[str]:
    """Paths of a collection's sources, in the directory of the sample data."""
    sources = load_config(config, schema=FlanMiniConfig).sources
    return [str(Path(data) / Path(source.path).relative_to(SAMPLE_DATA)) for source in sources]


def _benchmark_files(data: Path) -> Iterator[tuple[str, Path]]:
    return ((name, data / path) for name, path in LEAKAGE.items() if (data / path).exists())


def _safe(name: str) -> str:
    return name.replace("/", "-")
