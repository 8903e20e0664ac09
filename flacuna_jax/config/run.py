"""`RunConfig`, all settings of a run: the sections that have no module of their own, and checks between sections.

A config is a YAML file; any key can be overridden on the command line as `--section.key=value`. Overrides are merged
before validation, so both kinds of mistake get the same message. The fully resolved config is written to the run
directory and is itself a valid config.
"""

import math
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.config.model import LoraConfig, ModelConfig
from flacuna_jax.config.objectives import MEASURES_OF_PAIRS, AdapterReferenceConfig, KtoConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.config.types import LocalPath, NonNegativeInt, PositiveInt, Section


class MeshConfig(Section):
    """Devices per mesh axis, from the slowest network to the fastest. Their product is the number of devices used."""

    replica: PositiveInt = 1
    """Number of copies of the other axes, one per TPU slice or host; only gradients cross the network between them."""
    data: PositiveInt = 1
    """Number of copies of the weights within a replica, each with its own rows."""
    fsdp: PositiveInt = 1
    """Number of devices over which the weights are split; they are gathered one layer at a time."""
    tensor: PositiveInt = 1
    """Number of devices over which heads, feed-forward units and the vocabulary are split."""

    @property
    def devices(self) -> int:
        return math.prod((self.replica, self.data, self.fsdp, self.tensor))

    @property
    def row_shards(self) -> int:
        """Number of shards of the rows of a batch."""
        return self.replica * self.data * self.fsdp


class CheckpointConfig(Section):
    every_steps: PositiveInt = 1000
    """Steps between checkpoints. One is also saved at the end, and when a signal stops the run."""
    keep: PositiveInt = 3
    """Number of most recent checkpoints to keep."""
    keep_best: NonNegativeInt = 1
    """Number of best checkpoints by evaluation.metric to keep in addition; each is saved when it is evaluated. Without
    evaluation, none are kept."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest checkpoint in output_dir, if there is one. never: fail if output_dir holds a
    run."""
    allow_changes: tuple[str, ...] = ()
    """What may differ from the run that is resumed: names of settings or sections (training.learning_rate), or data,
    tokenizer, base, code, reference."""


class TasksConfig(Section):
    """Benchmarks of `flacuna evaluate` to run on the model during training."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names as in `flacuna evaluate --tasks`: mmlu:5, bbh, hhh, ..., or tasks of lm-evaluation-harness."""
    data: LocalPath
    """Directory of the benchmarks' files, or of the task files of lm-evaluation-harness."""
    protocol: Literal["instructeval", "lm_eval"] = "instructeval"
    """instructeval: benchmarks of `flacuna evaluate`, with the prompts of InstructEval, without a chat template.
    lm_eval: tasks of lm-evaluation-harness, with the template of the run (pip install 'flacuna-jax[eval]')."""
    limit: PositiveInt | None = 20
    """Number of problems per subject or task; null runs all."""
    every_steps: PositiveInt | None = None
    """Steps between runs of the benchmarks; null runs them with every evaluation."""


class EvaluationConfig(Section):
    """Evaluation during a run, on records that it does not train on."""

    every_steps: PositiveInt = 500
    """Steps between evaluations. The model is also evaluated before the first step and after the last."""
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of the training records to hold out, chosen by a hash of the question: records with the same question
    are either all held out or all trained on, regardless of their order or number. null holds out none."""
    sources: tuple[SourceConfig, ...] = ()
    """Separate sources of evaluation records; an alternative to `fraction`."""
    max_examples: PositiveInt | None = None
    """Evaluate on only this many of the held-out records, those with the lowest hashes; null evaluates on all."""
    metric: str = "eval/loss"
    """Metric that selects the best checkpoint and decides early stopping. Lower is better for losses and perplexities,
    higher for all others."""
    patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without a new best value; null never stops early."""
    deliver: Literal["last", "best"] = "last"
    """Which checkpoint is written to adapter/ (or model/) at the end."""
    samples: NonNegativeInt = 4
    """Number of held-out questions that the model answers at every evaluation, for people to read."""
    prompts: tuple[str, ...] = ()
    """Additional questions of your own for the model to answer."""
    sample_tokens: PositiveInt = 128
    """Maximum number of tokens in an answer."""
    tasks: TasksConfig | None = None
    """Benchmarks to run during training; null runs none."""

    @model_validator(mode="after")
    def measures_something(self) -> "EvaluationConfig":
        if self.fraction is not None and self.sources:
            raise ValueError("fraction and sources both set the held-out records; set only one of them")
        if self.fraction is None and not self.sources and self.tasks is None:
            raise ValueError("fraction, sources or tasks is missing: there is nothing to evaluate")
        if self.metric.startswith("eval/") and self.fraction is None and not self.sources:
            raise ValueError(
                f"metric {self.metric} needs held-out records; set fraction or sources, or choose a metric of a task"
            )
        if any(source.weight != 1 for source in self.sources):
            raise ValueError("sources: weight applies to training only; evaluation reads each record once")
        return self

    @property
    def lower_is_better(self) -> bool:
        # eval/MEASURE/SOURCE or tasks/NAME/MEASURE; the names of sources and tasks must not influence the result.
        parts = self.metric.split("/")
        measure = parts[1] if self.metric.startswith("eval/") else parts[-1]
        return "loss" in measure or "perplexity" in measure or measure in ("kl", "nll")


class LoggingConfig(Section):
    every_steps: PositiveInt = 10
    """Steps between logged values."""
    tensorboard: bool = True
    """Whether the values that are in metrics.jsonl are also written for TensorBoard, to tensorboard/ in the run
    directory."""
    wandb: str | None = None
    """Name of a Weights & Biases project to log to (pip install 'flacuna-jax[wandb]'); null does not use it."""


class DistributedConfig(Section):
    """Several hosts; detected automatically under Slurm, Open MPI, Kubernetes and on TPU pods."""

    coordinator: str | None = None
    """host:port of process 0; null takes it from the launcher."""
    num_processes: PositiveInt | None = None
    """Number of processes of the run; null takes it from the launcher. With 1, a process trains alone, even under a
    launcher."""
    process_id: NonNegativeInt | None = None
    """Number of this process, from 0; null takes it from the launcher."""
    join_seconds: PositiveInt = 300
    """Seconds to wait for all hosts at the start."""
    heartbeat_seconds: PositiveInt = 30
    """Seconds without a heartbeat after which a host is considered dead and the others stop."""

    @property
    def is_explicit(self) -> bool:
        return (self.coordinator, self.num_processes, self.process_id) != (None, None, None)


class RunConfig(Section):
    output_dir: LocalPath
    """A directory, or gs://BUCKET/PATH; see docs/guides/runs.md."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Determines the initial values of adapters (and of the model with init: random), the order of the examples, the
    subsets of fractional passes, and dropout."""
    model: ModelConfig
    """The base model: its weights or sizes, dtype and tokenizer."""
    lora: LoraConfig | None = LoraConfig()
    """LoRA adapters to train; null trains every weight of the base."""
    data: DataConfig
    """Records to train on, and how they become rows of tokens."""
    training: TrainingConfig = TrainingConfig()
    """Objective, optimizer, schedule, batches, and how a step is computed."""
    mesh: MeshConfig | Literal["auto"] = "auto"
    """auto: the mesh that the planner finds best for the available devices; or the number of devices per axis."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved, which are kept, and how a run continues."""
    evaluation: EvaluationConfig | None = None
    """Evaluation during the run; null evaluates nothing."""
    logging: LoggingConfig = LoggingConfig()
    """How often values are logged, and where to besides metrics.jsonl in the run directory."""
    distributed: DistributedConfig = DistributedConfig()
    """How the processes of a run on several hosts find each other."""

    @model_validator(mode="after")
    def methods_fit_together(self) -> "RunConfig":
        if self.lora is None and self.training.lora_plus_ratio != 1:
            raise ValueError("training.lora_plus_ratio applies to adapters, and lora: null has none")
        if self.lora is None and self.model.quantization is not None:
            raise ValueError("model.quantization needs a frozen base, but lora: null trains every weight")
        if self.training.attention == "cudnn" and (self.data.packing != "none" or self.model.dtype == "float32"):
            raise ValueError("training.attention: cudnn needs data.packing: none and model.dtype: bfloat16")
        if self.training.attention == "tokamax" and self.model.dtype == "float32":
            raise ValueError("training.attention: tokamax needs model.dtype: bfloat16")
        return self

    @model_validator(mode="after")
    def objective_fits(self) -> "RunConfig":
        if self.training.objective is None:
            return self
        objective = f"training.objective {self.training.objective.name}"
        if self.data.train_on == "all":
            raise ValueError(f"data.train_on: all has no meaning for {objective}, which compares answers")
        if self.data.over_length == "truncate_prompt":
            raise ValueError(f"data.over_length: truncate_prompt is not available for {objective}; use drop or error")
        if self.training.attention == "cudnn":
            raise ValueError(f"training.attention: cudnn needs one document per row, but {objective} has two")
        metric = self.evaluation.metric if self.evaluation else ""
        if isinstance(self.training.objective, KtoConfig) and metric.startswith(MEASURES_OF_PAIRS):
            raise ValueError(
                f"evaluation.metric: {metric} compares the answers of pairs; for {objective} use eval/loss"
            )
        if self.reference_adapter is not None and self.lora is None:
            raise ValueError("training.objective.reference: an adapter needs lora; with lora: null, use cached")
        return self

    @property
    def reference_adapter(self) -> str | None:
        """Directory of the adapter that is the reference; None for other references."""
        reference = getattr(self.training.objective, "reference", None)
        return reference.adapter if isinstance(reference, AdapterReferenceConfig) else None

    @property
    def caches_reference(self) -> bool:
        """Whether log-probabilities of the reference are computed once, before training."""
        reference = getattr(self.training.objective, "reference", None)
        return reference == "cached" or (reference == "base" and self.lora is None)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
