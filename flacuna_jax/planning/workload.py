"""The input of a plan: a network, the statistics of a run, and a layout of the step on devices."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import optax

from flacuna_jax.config.data import DataConfig
from flacuna_jax.config.run import MeshConfig, RunConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.training.optimizer import make_optimizer
from flacuna_jax.training.step import StepConfig

if TYPE_CHECKING:
    from flacuna_jax.data.pipeline import RunPlan
    from flacuna_jax.data.store import TokenStore

FLAN_MINI_EXAMPLES = 1_340_153
"""Ghosal et al., 2023 (arXiv:2307.02053), table 1."""
ASSUMED_TOKENS, ASSUMED_SUPERVISED, ASSUMED_FILL = 256, 0.3, 0.98
"""Mean tokens of a document; fraction of tokens with loss; fraction of a packed row that is tokens."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of the data of a config, which are the same on every mesh."""

    rows_per_step: int
    steps: int | None
    """Number of steps; None if the data are absent and the number of examples is unknown."""
    examples_per_step: float
    fill: float
    """Fraction of the rows that is tokens, not padding."""
    supervised: float
    """Fraction of the tokens that carries loss."""
    document_length: float
    """Mean length of a document in tokens, which limits attention."""
    assumed: bool
    """Whether the statistics are assumed, because the data are not on this machine."""
    examples_of_a_step: str | None = None
    """Their number, or the range and mean, for messages; None if the statistics are assumed."""


@dataclass(frozen=True)
class Layout:
    """The layout of one optimizer step."""

    mesh: MeshConfig
    remat: str
    micro_batch: int
    """Rows per shard (replica × data × fsdp) in one forward and backward pass."""

    @property
    def shards(self) -> int:
        return self.mesh.row_shards

    def __str__(self) -> str:
        axes = [f"{axis} {size}" for axis, size in self.mesh.model_dump().items() if size > 1] or ["1 device"]
        return f"{' × '.join(axes)}, remat {self.remat}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Workload:
    """A run without its layout."""

    step: StepConfig
    """The settings of the trainer's step. A layout replaces its remat policy."""
    training: TrainingConfig
    length: int
    """Tokens per row."""
    statistics: Statistics
    reference_adapter: bool = False
    """Whether a second, frozen adapter is the reference of a preference."""

    @classmethod
    def of_run(cls, spec: ModelSpec, config: RunConfig, statistics: Statistics) -> "Workload":
        step, by_adapter = StepConfig.of_run(spec, config), config.reference_adapter is not None
        return cls(step, config.training, config.data.max_length, statistics, by_adapter)

    @property
    def spec(self) -> ModelSpec:
        return self.step.spec

    def with_spec(self, spec: ModelSpec) -> "Workload":
        """The same run of another network."""
        return replace(self, step=self.step.with_spec(spec))

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.training, self.statistics.steps or 1_000_000, self.spec.trainable)

    @property
    def compute_bytes(self) -> int:
        """Bytes of one number in compute dtype."""
        return 2 if self.spec.dtype == "bfloat16" else 4

    def micro_batches(self, layout: Layout) -> int:
        return -(-self.statistics.rows_per_step // (layout.micro_batch * layout.shards))

    def tokens_per_pass(self, layout: Layout) -> int:
        """Number of positions, including padding, that one device computes in one forward pass."""
        return layout.micro_batch * self.length


def measured_statistics(plan: "RunPlan", store: "TokenStore") -> Statistics:
    """The statistics of the tokenised data."""
    tokens = int(store.lengths.sum())
    return Statistics(
        rows_per_step=plan.rows_per_step,
        steps=plan.total_steps,
        examples_per_step=plan.examples_per_step,
        fill=plan.fill,
        supervised=int(store.supervised.sum()) / tokens,
        document_length=tokens / store.document_lengths.size,
        assumed=False,
        examples_of_a_step=plan.examples_of_a_step,
    )


def assumed_statistics(data: DataConfig, training: TrainingConfig, examples: int | None = None) -> Statistics:
    """Where the data are not here: documents of `ASSUMED_TOKENS`, two in an example of preferences, packed nearly full.

    The number of examples is `examples`, or the sum of `max_examples` if every source has it, or the published size of
    FLAN-mini.
    """
    if examples is None and any(source.format == "flan_mini" for source in data.sources):
        examples = FLAN_MINI_EXAMPLES
    limits = [source.max_examples for source in data.sources]
    if None not in limits:
        examples = sum(limit for limit in limits if limit is not None)
    packed = data.packing != "none"
    tokens = ASSUMED_TOKENS if training.examples == "answers" else 2 * ASSUMED_TOKENS
    per_row = max(1.0, ASSUMED_FILL * data.max_length / tokens) if packed else 1.0
    by_rows = training.batch_unit == "rows"
    rows_per_step = training.batch_size if by_rows else math.ceil(training.batch_size / per_row)
    steps = None if examples is None else training.epochs * math.ceil(examples / per_row / rows_per_step)
    if training.max_steps is not None:
        steps = training.max_steps if steps is None else min(steps, training.max_steps)
    return Statistics(
        rows_per_step=rows_per_step,
        steps=steps,
        examples_per_step=rows_per_step * per_row,
        fill=min(1.0, per_row * tokens / data.max_length),
        supervised=ASSUMED_SUPERVISED,
        document_length=float(ASSUMED_TOKENS),
        assumed=True,
    )
