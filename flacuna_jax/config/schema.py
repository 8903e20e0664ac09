"""Every setting of a run: typed, documented, validated in one place.

A config is a YAML file; any key can be overridden on the command line as `--section.key=value`. Overrides are merged
before validation, so both kinds of mistake get the same message. The fully resolved config is written to the run
directory and is itself a valid config.
"""

import difflib
import math
import os
import re
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
"""What `lora.targets` may name, so that a mistyped word is found before a model is opened. Which modules a model has,
`model/llama.py` says; `lora.require_matches` compares the two."""
TARGETS: tuple[Target, ...] = get_args(Target)
HEAD: Target = "lm_head"
PROJECTIONS = tuple(target for target in TARGETS if target != HEAD)
ALL_LINEAR = "all-linear"

PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
"""Sizes, steps and layers are counted in 32 bits."""
PositiveFloat = Annotated[float, Field(gt=0, lt=3.4e38)]
"""As float32 has them."""
Fraction = Annotated[float, Field(ge=0, lt=1)]


LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, or what may stand in its place (gs://..., hf:...); ~ is the home directory, as in a shell."""

TEMPLATE_NAMES = ("vicuna_v1.1", "vicuna_v0", "llama-2-chat", "chatml", "alpaca", "plain")
AUTO, CHECKPOINT, FALLBACK = "auto", "checkpoint", "vicuna_v1.1"
"""auto is the checkpoint's own chat template if it has one, else the fallback."""


def _known_template(name: str, names: tuple[str, ...]) -> str:
    if name in names or name.endswith(".jinja"):
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name!r} is none of {', '.join(names)}, nor a .jinja file{hint}")


TemplateName = Annotated[str, AfterValidator(lambda name: _known_template(name, TEMPLATE_NAMES))]
"""A conversation format of ours, or a Jinja file."""
TemplateChoice = Annotated[str, AfterValidator(lambda name: _known_template(name, (AUTO, CHECKPOINT, *TEMPLATE_NAMES)))]


class Section(BaseModel):
    """Frozen, strict, and closed: an unknown key or a wrong type is an error, never ignored or converted."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        str_min_length=1,
        use_attribute_docstrings=True,
    )


class ArchitectureConfig(Section):
    """Sizes of a LLaMA to be trained from scratch (`model.init: random`)."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    """Defaults to num_heads (no grouped-query attention)."""
    head_dim: PositiveInt | None = None
    """Defaults to hidden_size / num_heads."""
    vocab_size: PositiveInt | None = None
    """Defaults to the tokenizer's."""
    max_position_embeddings: PositiveInt = 2048
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def heads_divide(self) -> "ArchitectureConfig":
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if (head_dim := self.head_dim or self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"head_dim {head_dim} is odd; rotary embedding turns pairs")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class RopeScalingConfig(Section):
    """Stretches a model to longer inputs than it was trained with; see docs/methods.md."""

    type: Literal["linear", "ntk", "llama3"]
    factor: Annotated[float, Field(gt=1)] | None = None
    """How much longer; null takes data.max_length / the model's own context."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths above the model's own context / this are stretched in full."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths below the model's own context / this stay."""

    @model_validator(mode="after")
    def factors_in_order(self) -> "RopeScalingConfig":
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} is not below high_freq_factor {self.high_freq_factor:g}"
            )
        return self


class ModelConfig(Section):
    path: LocalPath | None = None
    """A Hugging Face LLaMA directory or a converted one."""
    name: str | None = None
    """What adapters name as their base, for example lmsys/vicuna-13b-v1.1; defaults to `path` as given."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype, and the dtype of a frozen base. Norm statistics, softmax, loss and adapters are float32 always."""
    init: Literal["pretrained", "random"] = "pretrained"
    architecture: ArchitectureConfig | None = None
    quantization: Literal["nf4", "int8", "int8_product", "fp8_product"] | None = None
    """How the projections of a frozen base are held, instead of in `dtype`; see docs/methods.md. _product: also
    multiplied in 8 bits, with activations and gradients, on units that are faster at it (docs/performance.md)."""
    rope_scaling: RopeScalingConfig | None = None
    """For inputs longer than the model's context; null leaves positions as the checkpoint has them."""
    tokenizer: LocalPath | None = None
    """Directory with tokenizer.model or tokenizer.json; defaults to `path`."""

    @model_validator(mode="after")
    def source_of_weights(self) -> "ModelConfig":
        if self.init == "pretrained" and self.path is None:
            raise ValueError("path is missing: a checkpoint directory (or init: random with an architecture)")
        if self.init == "pretrained" and self.architecture is not None:
            raise ValueError("architecture is for init: random; a pretrained checkpoint brings its own")
        if self.init == "random" and (self.architecture is None or (self.tokenizer or self.path) is None):
            raise ValueError("init: random needs architecture and tokenizer")
        return self

    @property
    def tokenizer_path(self) -> str:
        path = self.tokenizer or self.path
        assert path is not None, "the validator requires one of them"
        return path


def _expand_all_linear(value: Any) -> Any:
    listed = (value,) if value == ALL_LINEAR else value
    if not isinstance(listed, tuple):
        return value
    return tuple(name for item in listed for name in (PROJECTIONS if item == ALL_LINEAR else (item,)))


def _as_pairs(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, dict) else value


NO_EXPRESSION = (re.error, RecursionError, OverflowError)
"""What Python's compiler of regular expressions raises."""


def _are_expressions(pairs: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    for pattern, _ in pairs:
        try:
            re.compile(pattern)
        except NO_EXPRESSION as error:
            raise ValueError(f"{pattern[:80]!r} is not a regular expression: {error}") from None
    return pairs


def _in_order(layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(layers)))


Layers = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1), AfterValidator(_in_order)]
_Patterns = (BeforeValidator(_as_pairs), AfterValidator(_are_expressions), PlainSerializer(dict))
RankPattern = Annotated[tuple[tuple[str, PositiveInt], ...], *_Patterns]
AlphaPattern = Annotated[tuple[tuple[str, PositiveFloat], ...], *_Patterns]
"""A mapping in YAML; pairs here, so that a config can be hashed."""


def by_pattern(patterns: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    """PEFT's rule: the value of the first pattern that matches the module's whole name or a dotted end of it."""
    matches = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matches, default)


class LoraConfig(Section):
    """LoRA (Hu et al., 2021) with the paper's values as defaults: y = W x + alpha/rank · B A dropout(x)."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Fraction = 0.05
    targets: Annotated[tuple[Target, ...], BeforeValidator(_expand_all_linear), Field(min_length=1)] = (
        "q_proj",
        "v_proj",
    )
    """Any of the seven projections of a layer, which all-linear names together, and the head, lm_head."""
    layers_to_transform: Layers | None = None
    """Layers that get adapters, counted from 0; null is all of them."""
    rank_pattern: RankPattern = ()
    """Other ranks by module: a regular expression for the end of a name such as model.layers.3.self_attn.q_proj."""
    alpha_pattern: AlphaPattern = ()
    """Other alphas by module, like `rank_pattern`."""
    use_rslora: bool = False
    """alpha/√rank instead of alpha/rank (Kalajdzievski, 2023)."""
    use_dora: bool = False
    """Trains the length of each row of W + B A apart from its direction (Liu et al., 2024)."""
    init_from: LocalPath | None = None
    """A PEFT adapter directory of the same settings to go on from, instead of a fresh one."""

    @model_validator(mode="after")
    def targets_fit_together(self) -> "LoraConfig":
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets names a projection twice: {list(self.targets)}")
        if self.layers_to_transform is not None and HEAD in self.targets:
            raise ValueError(f"layers_to_transform selects layers, and {HEAD} in targets is in none of them")
        if self.use_dora and HEAD in self.targets:
            raise ValueError(f"use_dora is for projections; take {HEAD} out of targets")
        return self

    def rank_of(self, module: str) -> int:
        """Rank of a module by its Hugging Face name, for example model.layers.0.self_attn.q_proj."""
        return by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by in a module of that name."""
        rank = self.rank_of(module)
        return by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


class SourceConfig(Section):
    path: LocalPath
    """A file (.json, .jsonl, .csv, .tsv, .parquet, .arrow, compressed or not), a directory, a pattern such as
    data/*.jsonl, or hf:NAME[:CONFIG[:SPLIT]], fetched once. See docs/data.md."""
    format: Literal[
        "auto",
        "flan_mini",
        "sharegpt",
        "messages",
        "alpaca",
        "dolly",
        "prompt_completion",
        "question_answer",
        "text",
    ] = "auto"
    """auto: what the fields of a file's first records say. text: no template, and every token carries loss."""
    split: str | None = None
    """Of a directory that holds several splits, or of the hub: which one; null takes what is not for validation or
    test by its name."""
    weight: PositiveFloat = 1.0
    """Passes over the source per epoch; a fraction is a subset drawn from (seed, epoch)."""
    max_examples: PositiveInt | None = None
    """Keep only this many records, the first ones in file order."""


class DataConfig(Section):
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    max_length: Annotated[int, Field(ge=8, le=2**20)] = 1280
    over_length: Literal["drop", "truncate_prompt", "error"] = "drop"
    on_bad_record: Literal["error", "skip"] = "error"
    packing: Literal["best_fit", "first_fit", "none"] = "best_fit"
    template: TemplateChoice = AUTO
    """How conversations become text: the name of a format, a .jinja file, or checkpoint, the chat template that the
    base model brings. auto: checkpoint if there is one, else vicuna_v1.1."""
    template_variables: dict[str, bool | int | str] = {}
    """Passed to a Jinja template beside the messages, for example enable_thinking: false."""
    tools_as_text: bool = False
    """Whether tools, tool calls, tool results and reasoning are written as text where the template has no form for
    them. Otherwise a record that has them is a bad record."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens carry loss: every assistant turn, only the last one, or everything but the BOS."""


class TrainingConfig(Section):
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    """A run ends at `epochs` or `max_steps`, whichever comes first."""
    optimizer: Literal["adamw", "adafactor", "lion"] = "adamw"
    betas: tuple[Fraction, Fraction] | None = None
    """Decay rates of the moments; (0.9, 0.999) for AdamW and (0.9, 0.99) for Lion where they are not given."""
    learning_rate: PositiveFloat = 2e-5
    lora_plus_ratio: PositiveFloat = 1.0
    """LoRA+ (Hayou et al., 2024): learning rate of B, and of DoRA's magnitudes, as a multiple of that of A."""
    warmup_steps: NonNegativeInt = 0
    warmup_ratio: Fraction = 0.0
    """Or warm-up as a part of the run's steps, rounded down."""
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "warmup_stable_decay"] = "cosine"
    decay_steps: PositiveInt | None = None
    """Of warmup_stable_decay: how many of the last steps the rate falls in, along a cosine."""
    final_ratio: Fraction = 0.0
    """What cosine, linear and warmup_stable_decay end at, as a fraction of `learning_rate`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    no_decay: tuple[str, ...] = ("norm", "bias", "embed_tokens", "lora_magnitude")
    """Parameters do not decay if one of these words is in their name, or is their kind: matrix, table, norm, bias."""
    max_grad_norm: PositiveFloat | None = 1.0
    batch_size: PositiveInt = 128
    """Examples or packed rows per optimizer step, see `batch_unit`."""
    batch_unit: Literal["examples", "rows"] = "examples"
    micro_batch_size: PositiveInt = 2
    """Rows per data×fsdp shard in one forward and backward pass."""
    remat: Literal["auto", "none", "dots", "attention", "full", "offload"] = "auto"
    """What the backward pass computes again: nothing, all but projections and attention, all but attention, or each
    whole layer. offload: as dots, with the results of projections kept in the host's memory. auto: `flacuna plan`'s."""
    attention: Literal["auto", "xla", "cudnn", "tokamax"] = "auto"
    """auto: the kernels for the device. xla: plain loops, to compare. cudnn: on GPUs, of rows that are not packed.
    tokamax: Mosaic kernels for Hopper and Blackwell GPUs (pip install 'flacuna-jax[tokamax]')."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite, or leaps, changes nothing. stop: the run ends there; skip: it goes
    on with the next batch. The batch is kept in bad_steps/ either way."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A leap is a loss or gradient norm above this many times its mean over the last steps; null looks for none."""
    max_bad_steps: PositiveInt = 10
    """With on_bad_step: skip, so many in a row end the run all the same."""

    @model_validator(mode="after")
    def schedule_is_whole(self) -> "TrainingConfig":
        if (self.schedule == "warmup_stable_decay") != (self.decay_steps is not None):
            raise ValueError("decay_steps belongs to schedule: warmup_stable_decay, which needs it")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are two ways to say the same; set one of them")
        if self.final_ratio and self.schedule in ("constant", "inverse_sqrt"):
            raise ValueError(f"final_ratio has no meaning with schedule: {self.schedule}")
        if self.betas is not None and self.optimizer == "adafactor":
            raise ValueError("betas are AdamW's and Lion's; Adafactor has a schedule of its own for them")
        return self

    def warmup_of(self, total_steps: int) -> int:
        """Steps of warm-up in a run of so many."""
        return self.warmup_steps or int(self.warmup_ratio * total_steps)


class MeshConfig(Section):
    """Devices per axis, slowest network first; their product is the number of devices used."""

    replica: PositiveInt = 1
    """Copies of all that follows, one per TPU slice or host: only gradients cross the network between them."""
    data: PositiveInt = 1
    fsdp: PositiveInt = 1
    tensor: PositiveInt = 1

    @property
    def devices(self) -> int:
        return math.prod((self.replica, self.data, self.fsdp, self.tensor))

    @property
    def row_shards(self) -> int:
        """Parts that the rows of a batch are cut into."""
        return self.replica * self.data * self.fsdp


class CheckpointConfig(Section):
    every_steps: PositiveInt = 1000
    keep: PositiveInt = 3
    """The last so many stay."""
    keep_best: NonNegativeInt = 1
    """And so many more, the best by evaluation.metric; each is saved when it is measured. Without evaluation, none."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest checkpoint in output_dir if there is one; never: refuse a used output_dir."""
    allow_changes: tuple[str, ...] = ()
    """What may differ from the run that is continued: settings or sections by name (training.learning_rate), or data,
    tokenizer, base, code."""


class TasksConfig(Section):
    """Benchmarks of `flacuna evaluate` that are run on the model in training."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    """As in `flacuna evaluate --tasks`: mmlu:5, bbh, hhh, ..., or the harness's tasks."""
    data: LocalPath
    """Directory of the benchmarks' files, or of the harness's task files."""
    protocol: Literal["instructeval", "lm_eval"] = "instructeval"
    limit: PositiveInt | None = 20
    """Problems per subject or task."""
    every_steps: PositiveInt | None = None
    """Null: with every evaluation."""


class EvaluationConfig(Section):
    """What is measured while a run goes on, on records that it does not learn from."""

    every_steps: PositiveInt = 500
    """Besides that the start and the end are measured."""
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training records to hold out, chosen by the hash of their question: records with the same question
    are on the same side, whatever their order or number."""
    sources: tuple[SourceConfig, ...] = ()
    """Or records of their own."""
    max_examples: PositiveInt | None = None
    """Measure only so many of the held-out records, those with the lowest hashes."""
    metric: str = "eval/loss"
    """Which number tells the best checkpoint, and when to stop. Losses and perplexities want to be low, others high."""
    patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without a new best."""
    deliver: Literal["last", "best"] = "last"
    """Which checkpoint becomes adapter/ (or model/)."""
    samples: NonNegativeInt = 4
    """Held-out questions that are answered at every evaluation, for people to read."""
    prompts: tuple[str, ...] = ()
    """Questions of one's own to answer besides."""
    sample_tokens: PositiveInt = 128
    """The longest answer."""
    tasks: TasksConfig | None = None

    @model_validator(mode="after")
    def measures_something(self) -> "EvaluationConfig":
        if self.fraction is not None and self.sources:
            raise ValueError("fraction and sources are two ways to say the same; set one of them")
        if self.fraction is None and not self.sources and self.tasks is None:
            raise ValueError("fraction, sources or tasks is missing: there is nothing to measure")
        if self.metric.startswith("eval/") and self.fraction is None and not self.sources:
            raise ValueError(f"metric {self.metric} is of held-out records; set fraction or sources, or name a task's")
        if any(source.weight != 1 for source in self.sources):
            raise ValueError("sources: weight is for training; what is measured is read once")
        return self

    @property
    def lower_is_better(self) -> bool:
        # eval/MEASURE/SOURCE and tasks/NAME/MEASURE; what sources and tasks are called says nothing.
        parts = self.metric.split("/")
        measure = parts[1] if self.metric.startswith("eval/") else parts[-1]
        return "loss" in measure or "perplexity" in measure


class LoggingConfig(Section):
    every_steps: PositiveInt = 10
    tensorboard: bool = True
    wandb: str | None = None
    """A Weights & Biases project; needs the `wandb` extra."""


class DistributedConfig(Section):
    """Several hosts; found out by itself under Slurm, Open MPI, Kubernetes and on TPU pods."""

    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: PositiveInt | None = None
    process_id: NonNegativeInt | None = None
    join_seconds: PositiveInt = 300
    """How long to wait for a late host at the start."""
    heartbeat_seconds: PositiveInt = 30
    """How long a silent host is believed to live; then the others stop."""

    @property
    def is_explicit(self) -> bool:
        return (self.coordinator, self.num_processes, self.process_id) != (None, None, None)


class RunConfig(Section):
    output_dir: LocalPath
    """A directory, or gs://BUCKET/PATH, see docs/training.md."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    model: ModelConfig
    lora: LoraConfig | None = LoraConfig()
    """null trains every weight of the base."""
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig | Literal["auto"] = "auto"
    """auto: what the planner finds best for the devices here; or devices per axis."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig | None = None
    logging: LoggingConfig = LoggingConfig()
    distributed: DistributedConfig = DistributedConfig()

    @model_validator(mode="after")
    def methods_fit_together(self) -> "RunConfig":
        if self.lora is None and self.training.lora_plus_ratio != 1:
            raise ValueError("training.lora_plus_ratio is for adapters; with lora: null there are none")
        if self.lora is None and self.model.quantization is not None:
            raise ValueError("model.quantization is for a frozen base; with lora: null every weight trains")
        if self.training.attention == "cudnn" and (self.data.packing != "none" or self.model.dtype != "bfloat16"):
            raise ValueError("training.attention: cudnn needs data.packing: none and model.dtype: bfloat16")
        if self.training.attention == "tokamax" and self.model.dtype != "bfloat16":
            raise ValueError("training.attention: tokamax needs model.dtype: bfloat16")
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
