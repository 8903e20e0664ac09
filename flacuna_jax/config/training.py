"""Settings of the section `training`: objective, optimizer, schedule, batches, and how a step is computed."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flacuna_jax.config.objectives import PreferenceConfig
from flacuna_jax.config.types import Examples, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section


class TrainingConfig(Section):
    objective: Annotated[PreferenceConfig, Field(discriminator="name")] | None = None
    """Preference tuning: {name: dpo}, simpo, orpo or kto, with the settings in docs/guides/preference.md. null:
    instruction tuning, the cross-entropy of the answers."""
    epochs: PositiveInt = 1
    """Passes over the data."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimizer steps; a run ends at `epochs` or `max_steps`, whichever comes first. null: at
    `epochs`."""
    optimizer: Literal["adamw", "adafactor", "lion"] = "adamw"
    """adamw: as in torch, with eps 1e-8; two moments per parameter. adafactor: without momentum, and with
    `learning_rate`; of matrices, means of rows and columns only. lion: one moment per parameter."""
    betas: tuple[Fraction, Fraction] | None = None
    """Decay rates of the moments; null means (0.9, 0.999) for AdamW and (0.9, 0.99) for Lion."""
    learning_rate: PositiveFloat = 2e-5
    """Maximum of the schedule, which it reaches at the end of warm-up."""
    lora_plus_ratio: PositiveFloat = 1.0
    """LoRA+ (Hayou et al., 2024): ratio of the learning rate of B and of DoRA's magnitudes to that of A."""
    warmup_steps: NonNegativeInt = 0
    """Number of steps in which the learning rate rises linearly to `learning_rate`; the first step has 0. The Flacuna
    paper has 3000."""
    warmup_ratio: Fraction = 0.0
    """Warm-up as a fraction of the run's steps, rounded down; an alternative to `warmup_steps`."""
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "warmup_stable_decay"] = "cosine"
    """Learning rate after warm-up, as in transformers. cosine and linear: falls to `final_ratio` at the end of the run.
    constant: does not fall. inverse_sqrt: falls as 1 / √step. warmup_stable_decay: falls in the last `decay_steps`
    only."""
    decay_steps: PositiveInt | None = None
    """warmup_stable_decay: number of final steps in which the learning rate decays, along a cosine; null with all other
    schedules."""
    final_ratio: Fraction = 0.0
    """Final learning rate of cosine, linear and warmup_stable_decay, as a fraction of `learning_rate`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay: an update also subtracts this value times the learning rate times the parameter.
    Parameters in `no_decay` have none."""
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
