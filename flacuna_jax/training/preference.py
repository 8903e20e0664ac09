"""Preference objectives on packed pairs: DPO and its variants, SimPO, ORPO; and KTO on single answers.

An example has two documents next to each other in a row, the first with an odd segment id. For the others they are the
conversations with the chosen and with the rejected answer; for KTO, an answer, and the same prompt with the answer to
another question. Losses are summed by example, so that a step is a mean over its pairs, however its rows are split into
micro-batches. docs/guides/preference.md has the formulas.

Shape suffixes: b batch, t length, e examples of a row, a the two answers of an example.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flacuna_jax.config.objectives import DpoConfig, KtoConfig, OrpoConfig, PreferenceConfig, SimpoConfig
from flacuna_jax.training.network import Batch, Network
from flacuna_jax.training.objective import PACKED_ROWS, Leaf, Measures, Objective, Statistics, Terms, Weighted

SFT_TOKENS = "sft_tokens"
"""Statistic: supervised tokens of the chosen answer, per pair, which the sum of their cross-entropy is divided by."""
KL = "kl"
"""Statistic of KTO, and the mean logarithm of policy over reference that the other objectives log."""
_WEIGHT = "/weight"


class Answers(NamedTuple):
    """The answers of a micro-batch, float32 [b, e, a]; zeros where a row has fewer examples."""

    log_probabilities: jax.Array
    reference: jax.Array
    """Log-probabilities under the reference; zeros without one."""
    tokens: jax.Array
    """Number of supervised tokens."""

    @property
    def present_be(self) -> jax.Array:
        return self.tokens[..., 0] > 0

    @property
    def ratios(self) -> jax.Array:
        """Logarithms of policy over reference."""
        return self.log_probabilities - self.reference

    @property
    def means(self) -> jax.Array:
        """Log-probabilities per token."""
        return self.log_probabilities / jnp.maximum(self.tokens, 1)


Totals = dict[str, tuple[jax.Array, jax.Array]]
"""By name, a total and the weight to divide it by, of each example: float32 [b, e]."""


@functools.cache
def preference_objective(settings: PreferenceConfig, cached: bool = False) -> Objective:
    """The objective of some settings; `cached` if batches have the log-probabilities of the reference."""
    kto = isinstance(settings, KtoConfig)
    leaves = (*PACKED_ROWS, *([Leaf("good", "bool")] if kto else ()))
    references = int(_has_reference(settings) and not cached)
    return Objective(
        leaves=(*leaves, Leaf("reference", "float32")) if cached else leaves,
        terms=functools.partial(_terms, settings, cached),
        measures=functools.partial(_measures, settings, cached),
        derived=functools.partial(_derived, _sft_weight(settings)),
        statistics=_statistics(settings, cached),
        counted="examples" if kto else "pairs",
        forwards=2 * references + 1 if kto else references,
    )


def by_document(values_bt: jax.Array, segment_ids_bt: jax.Array) -> jax.Array:
    """Sums over each document, float32 [b, e, a], for at most length / 4 examples of a row.

    A comparison of all positions with all documents, which XLA fuses into the sum. Unlike a scatter it adds in a fixed
    order, and it needs no exchange between devices. A document has two tokens or more.
    """
    examples = max(1, values_bt.shape[1] // 4)
    documents = jnp.arange(1, 2 * examples + 1)[None, :, None]
    picked = jnp.where(segment_ids_bt[:, None] == documents, values_bt[:, None].astype(jnp.float32), 0.0)
    return jnp.sum(picked, axis=-1).reshape(values_bt.shape[0], examples, 2)


def _answers(settings: PreferenceConfig, cached: bool, network: Network, batch: Batch) -> tuple[Answers, jax.Array]:
    """The answers, and the summed cross-entropy of the tokens that supervised fine-tuning is on, [b, e]."""
    segments_bt, mask_bt = batch["segment_ids"], batch["loss_mask"]
    sft_bt = _sft_mask(settings, batch)
    losses_bt = network.token_losses({**batch, "loss_mask": mask_bt | sft_bt})
    answers = Answers(
        -by_document(jnp.where(mask_bt, losses_bt, 0.0), segments_bt),
        _reference(settings, cached, network, batch),
        by_document(mask_bt, segments_bt),
    )
    return answers, by_document(jnp.where(sft_bt, losses_bt, 0.0), segments_bt)[..., 0]


def _sft_mask(settings: PreferenceConfig, batch: Batch) -> jax.Array:
    """The targets of supervised fine-tuning, bool [b, t]: those of chosen answers, or also of their prompts."""
    segments_bt = batch["segment_ids"]
    chosen_bt = segments_bt % 2 == 1
    if not (isinstance(settings, OrpoConfig) and settings.sft_on == "all"):
        return batch["loss_mask"] & chosen_bt
    following_bt = jnp.pad(segments_bt[:, 1:], ((0, 0), (0, 1)))
    return chosen_bt & (segments_bt == following_bt)


def _reference(settings: PreferenceConfig, cached: bool, network: Network, batch: Batch) -> jax.Array:
    if cached:
        return _of_documents(batch["reference"], batch)
    if not _has_reference(settings):
        return jnp.zeros((), jnp.float32)
    by_adapter = not isinstance(getattr(settings, "reference", None), str)
    reference = network.with_reference_adapter() if by_adapter else network.without_adapters()
    return jax.lax.stop_gradient(-by_document(reference.token_losses(batch), batch["segment_ids"]))


def _of_documents(values_bt: jax.Array, batch: Batch) -> jax.Array:
    """The values of a leaf that is constant over the tokens of a document, [b, e, a]."""
    return by_document(jnp.where(batch["positions"] == 0, values_bt, 0), batch["segment_ids"])


def _has_reference(settings: PreferenceConfig) -> bool:
    return getattr(settings, "reference", "none") != "none"


def _sft_weight(settings: PreferenceConfig) -> float:
    return 1.0 if isinstance(settings, OrpoConfig) else getattr(settings, "sft_weight", 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# The losses of each example, [b, e].


def _paired_loss(settings: DpoConfig | SimpoConfig | OrpoConfig, answers: Answers) -> jax.Array:
    if isinstance(settings, OrpoConfig):
        return -settings.beta * jax.nn.log_sigmoid(_log_odds_ratio(answers))
    if isinstance(settings, SimpoConfig):
        margin = settings.beta * _difference(answers.means) - settings.gamma
        return _smoothed(margin, settings.label_smoothing)
    margin, smoothing = settings.beta * _difference(answers.ratios), settings.label_smoothing
    match settings.loss:
        case "hinge":
            return jax.nn.relu(1 - margin)
        case "ipo":  # on means, as the authors of IPO confirmed for TRL
            return (_difference(answers.ratios / jnp.maximum(answers.tokens, 1)) - 1 / (2 * settings.beta)) ** 2
        case "robust":
            right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
            return (smoothing * wrong - (1 - smoothing) * right) / (1 - 2 * smoothing)
    return _smoothed(margin, smoothing)


def _smoothed(margin: jax.Array, smoothing: float) -> jax.Array:
    return -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)


def _difference(of_answers: jax.Array) -> jax.Array:
    return of_answers[..., 0] - of_answers[..., 1]


def _log_odds_ratio(answers: Answers) -> jax.Array:
    """log odds(chosen) - log odds(rejected), odds(y) = P(y) / (1 - P(y)) of the probability per token."""
    # Where there is no example, any probability but 1, whose odds are infinite.
    means = jnp.where(answers.present_be[..., None], answers.means, -1.0)
    # log(1 - exp(x)) by the form that is exact at that x.
    complements = jnp.where(means > -math.log(2), jnp.log(-jnp.expm1(means)), jnp.log1p(-jnp.exp(means)))
    return _difference(means - complements)


def _paired(settings: DpoConfig | SimpoConfig | OrpoConfig, answers: Answers, nll_be: jax.Array) -> Totals:
    present_be = answers.present_be.astype(jnp.float32)
    by_mean = not isinstance(settings, DpoConfig)
    rewards = settings.beta * (answers.means if by_mean else answers.ratios)
    values = {
        "loss": _paired_loss(settings, answers),
        "rewards/chosen": rewards[..., 0],
        "rewards/rejected": rewards[..., 1],
        "rewards/margin": _difference(rewards),
        "rewards/accuracy": (_difference(rewards) > 0).astype(jnp.float32),
        "logps/chosen": answers.log_probabilities[..., 0],
        "logps/rejected": answers.log_probabilities[..., 1],
        "length/chosen": answers.tokens[..., 0],
        "length/rejected": answers.tokens[..., 1],
    }
    if _has_reference(settings):
        values[KL] = jnp.mean(answers.ratios, axis=-1)
    if isinstance(settings, OrpoConfig):
        values["log_odds_ratio"] = _log_odds_ratio(answers)
    totals = {name: (value * present_be, present_be) for name, value in values.items()}
    return totals | ({"nll": (nll_be, answers.tokens[..., 0])} if _sft_weight(settings) else {})


def _labelled(settings: KtoConfig, answers: Answers, batch: Batch) -> Totals:
    """KTO: answers beside a reference point, which is the divergence from the reference over the whole step."""
    present_be = answers.present_be.astype(jnp.float32)
    good_be = _of_documents(batch["good"], batch)[..., 0]
    bad_be = present_be - good_be
    ratios_be, point = answers.ratios[..., 0], jnp.maximum(batch[KL], 0)
    value_be = jax.nn.sigmoid(settings.beta * jnp.where(good_be > 0, ratios_be - point, point - ratios_be))
    weights_be = settings.desirable_weight * good_be + settings.undesirable_weight * bad_be
    totals = {"loss": (weights_be * (1 - value_be), present_be), KL: (point * present_be, present_be)}
    for name, of_be in (("chosen", good_be), ("rejected", bad_be)):
        totals |= {
            f"rewards/{name}": (settings.beta * ratios_be * of_be, of_be),
            f"logps/{name}": (answers.log_probabilities[..., 0] * of_be, of_be),
            f"length/{name}": (answers.tokens[..., 0] * of_be, of_be),
        }
    return totals


def _totals(settings: PreferenceConfig, cached: bool, network: Network, batch: Batch) -> Totals:
    answers, nll_be = _answers(settings, cached, network, batch)
    if isinstance(settings, KtoConfig):
        return _labelled(settings, answers, batch)
    totals = _paired(settings, answers, nll_be)
    if "nll" in totals and isinstance(settings, OrpoConfig) and settings.sft_on == "all":
        totals["nll"] = (nll_be, by_document(_sft_mask(settings, batch), batch["segment_ids"])[..., 0])
    return totals


# ---------------------------------------------------------------------------------------------------------------------
# The functions of the objective.


def _statistics(settings: PreferenceConfig, cached: bool) -> Statistics | None:
    if isinstance(settings, KtoConfig):
        return functools.partial(_divergence, settings, cached)
    return functools.partial(_sft_tokens, settings) if _sft_weight(settings) else None


def _divergence(settings: KtoConfig, cached: bool, network: Network, batch: Batch) -> dict[str, Weighted]:
    """Mean log-ratio of the answers to other questions."""
    answers, _ = _answers(settings, cached, network, batch)
    return {KL: Weighted(jnp.sum(answers.ratios[..., 1]), jnp.sum(answers.present_be, dtype=jnp.float32))}


def _sft_tokens(settings: PreferenceConfig, network: Network, batch: Batch) -> dict[str, Weighted]:
    del network
    tokens = jnp.sum(_sft_mask(settings, batch), dtype=jnp.float32)
    pairs = jnp.sum((batch["positions"] == 0) & (batch["segment_ids"] % 2 == 1), dtype=jnp.float32)
    return {SFT_TOKENS: Weighted(tokens, pairs)}


def _terms(settings: PreferenceConfig, cached: bool, network: Network, batch: Batch) -> Terms:
    totals = _totals(settings, cached, network, batch)
    scalars = {name: Weighted(jnp.sum(total), jnp.sum(weight)) for name, (total, weight) in totals.items()}
    loss = scalars.pop("loss")
    if weight := _sft_weight(settings):
        # Divided by the pairs of the step, this is the mean over the tokens of the step.
        loss = Weighted(loss.sum + weight * scalars["nll"].sum / jnp.maximum(batch[SFT_TOKENS], 1), loss.weight)
    return Terms(loss, scalars)


def _measures(settings: PreferenceConfig, cached: bool, network: Network, batch: Batch) -> Measures:
    """The totals and weights of each example, at the first token of its first document."""
    totals = _totals(settings, cached, network, batch)
    segments_bt = batch["segment_ids"]
    first_bt = (batch["positions"] == 0) & (segments_bt % 2 == 1)

    def at_first(values_be: jax.Array) -> jax.Array:
        segments_e = 2 * jnp.arange(values_be.shape[1])[None, :, None] + 1
        return jnp.sum(jnp.where((segments_bt[:, None] == segments_e) & first_bt[:, None], values_be[..., None], 0), 1)

    present_be = totals["loss"][1]
    found = {name: total for name, (total, _) in totals.items()}
    found |= {name + _WEIGHT: weight for name, (_, weight) in totals.items() if weight is not present_be}
    return Measures({name: at_first(values_be) for name, values_be in found.items()}, first_bt)


def _derived(sft_weight: float, means: Mapping[str, float]) -> dict[str, float]:
    figures = {}
    for name, mean in means.items():
        if not name.endswith(_WEIGHT):
            weight = means.get(name + _WEIGHT, 1.0)
            figures[name] = mean / weight if weight else math.nan
    return figures | ({"loss": figures["loss"] + sft_weight * figures["nll"]} if sft_weight else {})
