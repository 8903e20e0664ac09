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
from flacuna_jax.paper import letters
from flacuna_jax.paper.settings import BenchmarkSettings, ExperimentSettings, VariantSettings
from flacuna_jax.paper.stages import Record, Stage, Stages

BASE = "base"
"""Name of the untuned model in results."""
Losses = Mapping[str, Mapping[float, float]]
"""Held-out loss of each method's short run with each learning rate."""
TASKS, CHAT = "tasks", "chat"
COLLECTIONS = (TASKS, CHAT)
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
    return {TASKS: records - chat, CHAT: chat}


@dataclasses.dataclass(frozen=True)
class Training:
    """One training run: its method, its data, its learning rate and its directory."""

    name: str
    method: str
    directory: Path
    examples: int
    chat_share: float
    rate: float
    few_shot: float | None = None
    """Share of records with worked examples in a collection of its own; None: the common collection."""
    options: tuple[str, ...] = ()
    """Further options of `flacuna train`."""

    @property
    def counts(self) -> dict[str, int]:
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

    def sources(self, run: Training) -> dict[Path, int]:
        """Files with the records of a run, and how many of them it uses."""
        names = {TASKS: TASKS if run.few_shot is None else _few_shot_name(run.few_shot), CHAT: CHAT}
        return {self.records(names[name], "train"): count for name, count in run.counts.items()}

    def results(self, model: str, number: int) -> Path:
        """Directory with a model's results of the benchmarks with this number in the settings."""
        return self.output / "evaluation" / str(number) / model

    def letters(self, model: str) -> Path:
        """Directory with lm-evaluation-harness's result of a model."""
        return self.output / "letters" / model

    def all_results(self, model: str) -> list[Path]:
        """Files of a model's results."""
        numbers = range(len(self.settings.benchmarks))
        return [path for number in numbers for path in sorted(self.results(model, number).glob("*.json"))]

    def prepare(self) -> None:
        """Builds both collections, and sets held-out records aside."""
        held_out = shares(self.settings.held_out, self.settings.chat_share)
        for name, config in ((TASKS, self.settings.tasks), (CHAT, self.settings.chat)):
            self.stages.run(self._collection_stage(name, config))
            self.stages.run(self._split_stage(name, ("--held-out", str(held_out[name]))))

    def prepare_few_shot(self, share: float) -> None:
        """Builds the collection of tasks with another share of records with worked examples. The held-out records
        stay the same, and their items are not in the new collection."""
        name, held_out = _few_shot_name(share), self.records(TASKS, "held_out")
        self.stages.run(self._collection_stage(name, self.settings.tasks, share))
        self.stages.run(self._split_stage(name, ("--held-out-of", str(held_out)), (held_out,)))

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
        same = {method: VariantSettings(method=method) for method in settings.methods}
        return [
            Training(
                name, change.method, self.output / "runs" / name, settings.examples,
                settings.chat_share if change.chat_share is None else change.chat_share,
                min(losses[change.method], key=losses[change.method].__getitem__), change.few_shot, change.options,
            )
            for name, change in {**same, **settings.variants}.items()
        ]  # fmt: skip

    def train(self, run: Training) -> Record:
        """Trains a run. Raises UserError if the collections have too few records for it."""
        if run.few_shot is not None:
            self.prepare_few_shot(run.few_shot)
        for path, wanted in self.sources(run).items():
            with path.open("rb") as file:
                there = sum(1 for _ in file)
            if there < wanted:
                name = path.parent.name
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
        if self.settings.letters and self.peft_python is not None:
            task = self._letters_task_stage()
            self.stages.run(task)
            self.stages.run(self._letters_stage(name, run, task.outputs))

    def _collection_stage(self, name: str, config: str, few_shot: float | None = None) -> Stage:
        directory, sources = self.collection(name), load_config(config, schema=FlanMiniConfig).sources
        overrides = [
            f"--sources.{number}.path={json.dumps(_in_data(source.path, self.settings.data))}"
            for number, source in enumerate(sources)
        ]
        if few_shot is not None:
            with_few_shot = [number for number, source in enumerate(sources) if source.few_shot]
            overrides += [f"--sources.{number}.few_shot={few_shot}" for number in with_few_shot]
        command = (
            "prepare", "--config", config, "--output", str(directory), f"--scale={self.settings.scale}",
            f"--tokenizer={self.settings.base}",
            f"--max_length={self.settings.row_length}", f"--seed={self.settings.seed}", *overrides,
            *(f"--leakage={one}={path}" for one, path in _benchmark_files(Path(self.settings.data))),
        )  # fmt: skip
        return Stage(f"data-{name}", command, (Path(config),), (directory / "flan_mini.json",))

    def _split_stage(self, name: str, held_out: tuple[str, str], inputs: tuple[Path, ...] = ()) -> Stage:
        collection, directory = self.collection(name) / "flan_mini.json", self.collection(name)
        command = ("paper.split", str(collection), *held_out, "--output", str(directory))
        outputs = (self.records(name, "train"), self.records(name, "held_out"))
        return Stage(f"split-{name}", command, (collection, *inputs), outputs)

    def _train_arguments(self, run: Training, directory: Path) -> list[str]:
        settings = self.settings
        sources = [
            {"path": str(path), "format": "flan_mini", "max_examples": count}
            for path, count in self.sources(run).items()
        ]
        held_out = [{"path": str(self.records(name, "held_out")), "format": "flan_mini"} for name in COLLECTIONS]
        return [
            "--config", settings.methods[run.method].config, f"--output_dir={directory}", f"--seed={settings.seed}",
            f"--model.path={settings.base}", f"--data.sources={json.dumps(sources)}",
            f"--evaluation.sources={json.dumps(held_out)}",
            f"--data.max_length={settings.row_length}", f"--training.batch_size={settings.batch_size}",
            f"--training.learning_rate={run.rate!r}", *run.options,
        ]  # fmt: skip

    def _train_inputs(self, run: Training) -> tuple[Path, ...]:
        data = list(self.sources(run))
        data += [self.records(name, "held_out") for name in COLLECTIONS]
        return (Path(self.settings.methods[run.method].config), Path(self.settings.base), *data)

    def _train_stage(self, run: Training) -> Stage:
        command = ("train", *self._train_arguments(run, run.directory))
        outputs = (delivered(run, self.settings), run.directory / "metrics.jsonl")
        return Stage(f"train-{_safe(run.name)}", command, self._train_inputs(run), outputs, run.directory)

    def _evaluate_stage(self, name: str, run: Training | None, number: int, benchmark: BenchmarkSettings) -> Stage:
        settings, directory = self.settings, self.results(name, number)
        model, inputs = self._model(run)
        command = (
            "evaluate", *model, "--name", name, "--tasks", ",".join(benchmark.tasks), "--data", settings.data,
            "--output", str(directory.parent), "--no-published", "--allow-code-execution",
            *(() if benchmark.limit is None else ("--limit", str(benchmark.limit))), *benchmark.options,
        )  # fmt: skip
        return Stage(f"evaluate-{name}-{number}", command, inputs, (directory,), directory)

    def _letters_task_stage(self) -> Stage:
        """The prompts of the task are those of the base's result of mmlu:0."""
        (zero_shot,) = (path for path in self.all_results(BASE) if path.name == "mmlu-0shot.json")
        out = self.letters(BASE).parent
        command = ("paper.letters", str(zero_shot), "--output", str(out))
        return Stage("letters", command, (zero_shot,), (out / letters.QUESTIONS, out / letters.TASK_FILE))

    def _letters_stage(self, name: str, run: Training | None, task: tuple[Path, ...]) -> Stage:
        directory, out = self.letters(name), self.letters(name).parent
        model, inputs = self._model(run)
        command = (
            "evaluate", "--protocol", "lm_eval", *model, "--name", name, "--tasks", letters.TASK, "--data", str(out),
            "--output", str(out),
        )  # fmt: skip
        outputs = (directory / letters.FILE,)
        return Stage(f"letters-{name}", command, (*inputs, *task), outputs, directory, self.peft_python)

    def _model(self, run: Training | None) -> tuple[tuple[str, ...], tuple[Path, ...]]:
        """Options of `flacuna evaluate` for a model, and its files; `run` is None for the base."""
        base = Path(self.settings.base)
        if run is None:
            return ("--model", str(base)), (base,)
        weights = delivered(run, self.settings)
        if weights.parent.name == "adapter":
            return ("--model", str(base), "--adapter", str(weights.parent)), (base, weights)
        return ("--model", str(weights.parent)), (base, weights)


def held_out_losses(run: Path) -> list[float]:
    """Held-out losses of a run, from the one before its first step to that after its last."""
    records = read_metrics(run / "metrics.jsonl")
    return [record["eval/loss"] for record in records if record.get("kind") == "evaluation"]


def delivered(run: Training, settings: ExperimentSettings) -> Path:
    """The file with the weights that a run delivers."""
    if load_config(settings.methods[run.method].config).lora is None:
        return run.directory / "model" / "model.safetensors"
    return run.directory / "adapter" / "adapter_model.safetensors"


def _in_data(path: str, data: str) -> str:
    """The path of a collection's source in the directory of the sample data."""
    return str(Path(data) / Path(path).relative_to(SAMPLE_DATA))


def _few_shot_name(share: float) -> str:
    """Name of the collection of tasks with this share of records with worked examples."""
    return f"tasks_few_shot_{share:g}"


def _benchmark_files(data: Path) -> Iterator[tuple[str, Path]]:
    return ((name, data / path) for name, path in LEAKAGE.items() if (data / path).exists())


def _safe(name: str) -> str:
    return name.replace("/", "-")
