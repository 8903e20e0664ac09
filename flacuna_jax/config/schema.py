"""Every setting of a run: typed, documented, validated in one place.

A config is a YAML file; any key can be overridden on the command line as `--section.key=value`. Overrides are merged
before validation, so both kinds of mistake get the same message. The fully resolved config is written to the run
directory and is itself a valid config.
"""

import math
from typing import Annotated, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from flacuna_jax.config.objectives import MEASURES_OF_PAIRS, AdapterReferenceConfig, KtoConfig, PreferenceConfig
from flacuna_jax.config.types import (
    AUTO,
    HEAD,
    AlphaPattern,
    Examples,
    Fraction,
    Layers,
    LocalPath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RankPattern,
    Section,
    Target,
    TemplateChoice,
    by_pattern,
    expand_all_linear,
)
from flacuna_jax.hub import HubName, is_hub_name


class ArchitectureConfig(Section):
    """Sizes of a LLaMA model to train from scratch (`model.init: random`)."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    """Defaults to num_heads (no grouped-query attention)."""
    head_dim: PositiveInt | None = None
    """Defaults to hidden_size / num_heads."""
    vocab_size: PositiveInt | None = None
    """Defaults to the vocabulary size of the tokenizer."""
    max_position_embeddings: PositiveInt = 2048
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def heads_divide(self) -> "ArchitectureConfig":
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if (head_dim := self.head_dim or self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"head_dim {head_dim} is odd; rotary embeddings rotate pairs of dimensions")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class RopeScalingConfig(Section):
    """Extends a model to longer inputs than it was trained with; see docs/reference/methods.md."""

    type: Literal["linear", "ntk", "llama3"]
    factor: Annotated[float, Field(gt=1)] | None = None
    """Ratio of the extended context length to the model's own; null means data.max_length / the model's own."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths above (the model's own context length / this value) are scaled by the whole factor."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths below (the model's own context length / this value) are not scaled."""

    @model_validator(mode="after")
    def factors_in_order(self) -> "RopeScalingConfig":
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} is not below high_freq_factor {self.high_freq_factor:g}"
            )
        return self


class ModelConfig(Section):
    path: LocalPath | None = None
    """Directory of a Hugging Face LLaMA checkpoint, or of one written by `flacuna convert`; a GGUF file; or
    hf:NAME[@REVISION][:FILE], a model of the Hugging Face Hub or one of its GGUF files, which is downloaded into the
    Hub's cache."""
    name: str | None = None
    """Name of the base model to write into adapters, for example lmsys/vicuna-13b-v1.1; defaults to the name on the
    Hub, or to `path` as given."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype, and the dtype of a frozen base. Norm statistics, softmax, loss and adapters are always float32.
    auto: bfloat16 on GPUs and TPUs; on CPUs the one that the processor multiplies faster, which the start of the run
    prints and a resumed run keeps."""
    init: Literal["pretrained", "random"] = "pretrained"
    architecture: ArchitectureConfig | None = None
    quantization: Literal["nf4", "int8", "int8_product", "fp8_product"] | None = None
    """How the projections of a frozen base are stored; null stores them in `dtype`. See docs/reference/methods.md. With
    the _product forms, the matrix products with activations and gradients are also computed in 8 bits, which some
    devices do faster (docs/results/laboratory.md)."""
    rope_scaling: RopeScalingConfig | None = None
    """For inputs longer than the model's context; null uses the rotary embedding of the checkpoint unchanged."""
    tokenizer: LocalPath | None = None
    """Directory with tokenizer.model or tokenizer.json, or hf:NAME[@REVISION]; defaults to `path`."""

    @model_validator(mode="after")
    def source_of_weights(self) -> "ModelConfig":
        if self.init == "pretrained" and self.path is None:
            raise ValueError("path is missing: a checkpoint directory (or init: random with an architecture)")
        if self.init == "pretrained" and self.architecture is not None:
            raise ValueError("architecture needs init: random; a pretrained checkpoint has its own")
        if self.init == "random" and (self.architecture is None or (self.tokenizer or self.path) is None):
            raise ValueError("init: random needs architecture and tokenizer")
        return self

    @property
    def tokenizer_path(self) -> str:
        path = self.tokenizer or self.path
        assert path is not None, "the validator requires one of them"
        return path

    @property
    def base_name(self) -> str | None:
        """The name of the base model in adapters and model cards; None if there is no base."""
        on_hub = self._on_hub
        return self.name or (self.path if on_hub is None else on_hub.name)

    @property
    def base_revision(self) -> str | None:
        """The revision of the model on the Hub that `base_name` names, if `path` has one."""
        on_hub = self._on_hub
        return on_hub.revision if on_hub is not None and self.base_name == on_hub.name else None

    @property
    def _on_hub(self) -> HubName | None:
        return HubName.parse_model(self.path) if self.path is not None and is_hub_name(self.path) else None


class LoraConfig(Section):
    """LoRA (Hu et al., 2021): y = W x + alpha/rank · B A dropout(x). The defaults are the paper's values."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Fraction = 0.05
    """Probability with which each element of an adapter's input is set to zero in training."""
    targets: Annotated[tuple[Target, ...], BeforeValidator(expand_all_linear), Field(min_length=1)] = (
        "q_proj",
        "v_proj",
    )
    """Modules that get adapters: any of the seven projections of a layer (all-linear selects all seven), and the output
    head, lm_head."""
    layers_to_transform: Layers | None = None
    """Indices of the layers that get adapters, from 0; null selects all layers."""
    rank_pattern: RankPattern = ()
    """Ranks of single modules. Each key is a regular expression that matches the end of a module's name, such as
    model.layers.3.self_attn.q_proj."""
    alpha_pattern: AlphaPattern = ()
    """Alphas of single modules, with the same keys as `rank_pattern`."""
    use_rslora: bool = False
    """Scale adapters by alpha/√rank instead of alpha/rank (Kalajdzievski, 2023)."""
    use_dora: bool = False
    """DoRA (Liu et al., 2024): train the norm of each row of W + B A separately from its direction."""
    train_tokens: tuple[str | NonNegativeInt, ...] = ()
    """Tokens, as text or as ids, whose rows of the embedding and of the head are trained too (PEFT's
    `trainable_token_indices`). Those that the data section adds are always trained."""
    init_from: LocalPath | None = None
    """PEFT adapter to initialize the adapters from, a directory or hf:NAME[@REVISION]; its settings must equal these.
    null starts with new adapters."""

    @model_validator(mode="after")
    def targets_fit_together(self) -> "LoraConfig":
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets names a projection twice: {list(self.targets)}")
        if self.layers_to_transform is not None and HEAD in self.targets:
            raise ValueError(f"layers_to_transform selects layers, but {HEAD} in targets is in no layer")
        if self.use_dora and HEAD in self.targets:
            raise ValueError(f"use_dora applies to projections only; remove {HEAD} from targets")
        return self

    def rank_of(self, module: str) -> int:
        """Rank of a module by its Hugging Face name, for example model.layers.0.self_attn.q_proj."""
        return by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor that multiplies B A in the module of that name."""
        rank = self.rank_of(module)
        return by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


class SourceConfig(Section):
    path: LocalPath
    """A file (.json, .jsonl, .csv, .tsv, .parquet, .arrow, optionally compressed), a directory, a pattern such as
    data/*.jsonl, or hf:NAME[@REVISION][:CONFIG[:SPLIT]], a dataset of the Hugging Face Hub. See
    docs/reference/data.md."""
    format: Literal[
        "auto",
        "flan_mini",
        "sharegpt",
        "messages",
        "alpaca",
        "dolly",
        "prompt_completion",
        "question_answer",
        "preference",
        "kto",
        "text",
    ] = "auto"
    """auto: detected from the fields of the first record of each file. text: no template is applied, and the loss
    covers every token."""
    split: str | None = None
    """Which split to read from a directory with several splits or from the Hub; null reads the training split: of a
    directory, all files whose names do not mark them as validation or test data; of the Hub, train."""
    weight: PositiveFloat = 1.0
    """Passes over the source per epoch. A fractional pass is a random subset, drawn with (seed, epoch)."""
    max_examples: PositiveInt | None = None
    """Use only this many records, the first ones in file order."""


class DataConfig(Section):
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    max_length: Annotated[int, Field(ge=8, le=2**20)] = 1280
    """Tokens of a row, and the most that an example may have."""
    over_length: Literal["drop", "truncate_prompt", "error"] = "drop"
    """What happens to examples longer than `max_length`. drop: they are left out and counted. truncate_prompt:
    questions are shortened, then whole exchanges are removed, but answers are never cut. error: the command ends."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What happens to records that cannot be used, for example with an unknown role. skip: they are counted."""
    packing: Literal["best_fit", "first_fit", "none"] = "best_fit"
    """How examples are put into rows. none: one example per row."""
    template: TemplateChoice = AUTO
    """How conversations become text: the name of a format, a .jinja file, or checkpoint for the chat template of the
    base model. auto: the base model's chat template if it has one, otherwise vicuna_v1.1."""
    template_variables: dict[str, bool | int | str] = Field(default_factory=dict)
    """Passed to a Jinja template together with the messages, for example enable_thinking: false."""
    tools_as_text: bool = False
    """Whether tools, tool calls, tool results and reasoning are written as plain text if the template does not support
    them. If false, a record that contains them is a bad record."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens the loss covers: every assistant turn, only the last assistant turn, or everything except BOS."""
    add_tokens: tuple[str, ...] = ()
    """New tokens, which the tokenizer finds in any text. The tables of the model get rows for them; see
    docs/reference/methods.md."""
    add_special_tokens: tuple[str, ...] = ()
    """New special tokens, which only templates can write, such as <|im_start|>."""

    @model_validator(mode="after")
    def tokens_are_new_once(self) -> "DataConfig":
        new = [token for token, _ in self.new_tokens]
        for token, special in self.new_tokens:
            if new.count(token) > 1:
                raise ValueError(f"add_tokens and add_special_tokens name {token!r} twice")
            if token != token.strip():
                key = "add_special_tokens" if special else "add_tokens"
                raise ValueError(f"{key}: {token!r} begins or ends with white space")
        return self

    @property
    def new_tokens(self) -> tuple[tuple[str, bool], ...]:
        """Spelling of each new token, and whether it is special, in the order of their ids."""
        return (*((token, False) for token in self.add_tokens), *((token, True) for token in self.add_special_tokens))


class TrainingConfig(Section):
    objective: Annotated[PreferenceConfig, Field(discriminator="name")] | None = None
    """Preference tuning: {name: dpo}, simpo, orpo or kto, with the settings in docs/guides/preference.md. null:
    instruction tuning, the cross-entropy of the answers."""
    epochs: PositiveInt = 1
    """Passes over the data."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps; a run ends at `epochs` or `max_steps`, whichever comes first."""
    optimizer: Literal["adamw", "adafactor", "lion"] = "adamw"
    betas: tuple[Fraction, Fraction] | None = None
    """Decay rates of the moments; null means (0.9, 0.999) for AdamW and (0.9, 0.99) for Lion."""
    learning_rate: PositiveFloat = 2e-5
    """The largest one of the schedule, after warm-up."""
    lora_plus_ratio: PositiveFloat = 1.0
    """LoRA+ (Hayou et al., 2024): ratio of the learning rate of B and of DoRA's magnitudes to that of A."""
    warmup_steps: NonNegativeInt = 0
    warmup_ratio: Fraction = 0.0
    """Warm-up as a fraction of the run's steps, rounded down; an alternative to `warmup_steps`."""
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "warmup_stable_decay"] = "cosine"
    decay_steps: PositiveInt | None = None
    """warmup_stable_decay: number of final steps in which the learning rate decays, along a cosine."""
    final_ratio: Fraction = 0.0
    """Final learning rate of cosine, linear and warmup_stable_decay, as a fraction of `learning_rate`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    no_decay: tuple[str, ...] = ("norm", "bias", "embed_tokens", "lora_magnitude")
    """Parameters without weight decay: those whose name contains one of these words, or whose kind (matrix, table,
    norm, bias) is one of them."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients with a larger norm are scaled to it; null disables this."""
    batch_size: PositiveInt = 128
    """Examples, rounded up to whole rows, or packed rows per optimizer step; see `batch_unit`."""
    batch_unit: Literal["examples", "rows"] = "examples"
    """What `batch_size` counts. With examples, packing leaves the number of steps as it was, up to whole rows."""
    micro_batch_size: PositiveInt = 2
    """Rows in one forward and backward pass, per data×fsdp shard."""
    remat: Literal["auto", "none", "dots", "attention", "full", "offload"] = "auto"
    """What the backward pass recomputes. none: nothing. dots: everything except projections and attention. attention:
    everything except attention. full: each whole layer. offload: like dots, but the outputs of projections are kept in
    host memory. auto: the choice of `flacuna plan`."""
    attention: Literal["auto", "xla", "cudnn", "tokamax"] = "auto"
    """Attention implementation. auto: the kernels for the device. xla: plain loops, for comparison. cudnn: for GPUs,
    without packing. tokamax: Mosaic kernels for Hopper and Blackwell GPUs (pip install 'flacuna-jax[tokamax]')."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """What to do at a bad step, which is one whose loss or gradient is not finite or spikes (see `spike_factor`). Its
    update is not applied, and its batch is saved in bad_steps/. stop: end the run. skip: continue with the next
    batch."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A loss or gradient norm above this multiple of its mean over the last steps is a spike; null disables the
    check."""
    max_bad_steps: PositiveInt = 10
    """With on_bad_step: skip, the run ends after this many bad steps in a row."""

    @model_validator(mode="after")
    def schedule_is_whole(self) -> "TrainingConfig":
        if (self.schedule == "warmup_stable_decay") != (self.decay_steps is not None):
            raise ValueError("schedule: warmup_stable_decay needs decay_steps, and no other schedule has it")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio set the same thing; set only one of them")
        if self.final_ratio and self.schedule in ("constant", "inverse_sqrt"):
            raise ValueError(f"final_ratio has no effect with schedule: {self.schedule}")
        if self.betas is not None and self.optimizer == "adafactor":
            raise ValueError("betas apply to AdamW and Lion only; Adafactor computes its own decay rates")
        return self

    @property
    def examples(self) -> Examples:
        """The kind of examples that the objective trains on."""
        return "answers" if self.objective is None else self.objective.examples

    def warmup_of(self, total_steps: int) -> int:
        """Number of warm-up steps in a run of `total_steps` steps."""
        return self.warmup_steps or int(self.warmup_ratio * total_steps)


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
    are either all held out or all trained on, regardless of their order or number."""
    sources: tuple[SourceConfig, ...] = ()
    """Separate sources of evaluation records; an alternative to `fraction`."""
    max_examples: PositiveInt | None = None
    """Evaluate on only this many of the held-out records, those with the lowest hashes."""
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
    wandb: str | None = None
    """Name of a Weights & Biases project to log to (pip install 'flacuna-jax[wandb]')."""


class DistributedConfig(Section):
    """Several hosts; detected automatically under Slurm, Open MPI, Kubernetes and on TPU pods."""

    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: PositiveInt | None = None
    process_id: NonNegativeInt | None = None
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
    model: ModelConfig
    lora: LoraConfig | None = LoraConfig()
    """LoRA adapters to train; null trains every weight of the base."""
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig | Literal["auto"] = "auto"
    """auto: the mesh that the planner finds best for the available devices; or the number of devices per axis."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig | None = None
    logging: LoggingConfig = LoggingConfig()
    distributed: DistributedConfig = DistributedConfig()

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
