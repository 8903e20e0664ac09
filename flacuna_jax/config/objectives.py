"""Settings of `training.objective`: preference tuning. docs/guides/preference.md describes the losses."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from flacuna_jax.config.types import Examples, LocalPath, PositiveFloat, Section

NonNegativeFloat = Annotated[float, Field(ge=0, lt=3.4e38)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


class AdapterReferenceConfig(Section):
    adapter: LocalPath
    """PEFT adapter directory, on the same base and with the settings of `lora`."""


Reference = Literal["base", "cached"] | AdapterReferenceConfig
"""The model that a preference is relative to. base: the base, with the adapters switched off. cached: the weights that
the run begins with, whose log-probabilities are computed once; full fine-tuning does this for base, too.
{adapter: DIR}: the base with that adapter."""


class DpoConfig(Section):
    """Direct preference optimisation (Rafailov et al., 2023) and its variants."""

    examples: ClassVar[Examples] = "pairs"

    name: Literal["dpo"]
    """Direct preference optimisation, on pairs of a preferred and a rejected answer."""
    beta: PositiveFloat = 0.1
    """Strength of the tie to the reference; tau for ipo."""
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """Loss of a pair, by its margin: beta times the difference of the answers' log-ratios of model and reference.
    sigmoid: -log σ(margin), as in the original. hinge: max(0, 1 - margin). ipo: squared distance of the difference of
    log-ratios per token from 1 / (2 beta). robust: like sigmoid, corrected for wrong preferences (see
    `label_smoothing`)."""
    label_smoothing: Smoothing = 0.0
    """Assumed fraction of wrong preferences. sigmoid: conservative DPO. robust: its unbiased form."""
    reference: Reference | Literal["none"] = "base"
    """base: the base, adapters off. cached: the initial weights, computed once. {adapter: DIR}: the base with that
    adapter. none: no reference, as in CPO."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the mean cross-entropy of the preferred answers' tokens, which is added to the loss."""

    @model_validator(mode="after")
    def smoothing_is_used(self) -> "DpoConfig":
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing has no effect with loss: {self.loss}")
        return self


class SimpoConfig(Section):
    """SimPO (Meng et al., 2024): mean log-probabilities per token and a target margin, without a reference."""

    examples: ClassVar[Examples] = "pairs"

    name: Literal["simpo"]
    """SimPO, on pairs and without a reference."""
    beta: PositiveFloat = 2.0
    """Factor of the rewards, which are beta times the mean log-probability per token of an answer."""
    gamma: NonNegativeFloat = 1.0
    """Target margin between the rewards of the two answers."""
    label_smoothing: Smoothing = 0.0
    """Assumed fraction of wrong preferences."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the mean cross-entropy of the preferred answers' tokens, which is added to the loss."""


class OrpoConfig(Section):
    """ORPO (Hong et al., 2024): cross-entropy of the preferred answer and the odds ratio, without a reference."""

    examples: ClassVar[Examples] = "pairs"

    name: Literal["orpo"]
    """ORPO, on pairs and without a reference."""
    beta: PositiveFloat = 0.1
    """Weight of the odds ratio."""
    sft_on: Literal["answer", "all"] = "answer"
    """Tokens of the cross-entropy: those of the preferred answer, as in the paper; or also its prompt, as in TRL."""


class KtoConfig(Section):
    """KTO (Ethayarajh et al., 2024): single answers, labelled good or bad."""

    examples: ClassVar[Examples] = "labelled"

    name: Literal["kto"]
    """KTO, on single answers that are labelled good or bad."""
    beta: PositiveFloat = 0.1
    """Strength of the tie to the reference."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of the loss of good answers."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of the loss of bad answers. The paper recommends weights with which good and bad answers together weigh
    about the same."""
    reference: Reference = "base"
    """base: the base, adapters off. cached: the initial weights, computed once. {adapter: DIR}: the base with that
    adapter."""


MEASURES_OF_PAIRS = ("eval/rewards/accuracy", "eval/rewards/margin")
"""Numbers of an evaluation that only objectives on pairs have."""

PreferenceConfig = DpoConfig | SimpoConfig | OrpoConfig | KtoConfig
