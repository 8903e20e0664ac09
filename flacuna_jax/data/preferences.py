r"""Records of preferences: pairs of a chosen and a rejected answer, and single answers that are labelled good or bad.

pair       {"prompt": str or messages, "chosen": str, message or messages, "rejected": likewise}
whole      {"chosen": messages, "rejected": messages}: two conversations with the same beginning, which is the prompt
HH         {"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": likewise}: the same as one text
kto        {"prompt": str or messages, "completion": str or messages, "label": bool}; or any other format of instruction
           data with `label` or `kto_tag`

Where the two conversations first differ, an answer must begin in both. Everything before it is the prompt, which
carries no loss.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.config.objectives import KtoConfig
from flacuna_jax.data.messages import read_messages, without_loss
from flacuna_jax.data.record import BadRecord, Reading
from flacuna_jax.data.segments import Turn
from flacuna_jax.errors import UserError

CHOSEN = ("chosen", "chosen_response", "preferred_output")
REJECTED = ("rejected", "rejected_response", "rejected_messages", "non_preferred_output")
LABELS = ("label", "kto_tag")
IDENTICAL = "chosen and rejected answers are the same"
EMPTY = "chosen or rejected answer is empty"

_RECOMMENDED = 4 / 3 + 0.01
"""Upper limit of the ratio of the weights of good and bad answers in equation 8 of the paper, and a rounding error."""
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


class Prompt(NamedTuple):
    """The prompt of a record by itself: its system text and its turns."""

    system: str | None
    turns: Sequence[Turn]


class Answers(NamedTuple):
    """The two conversations of a pair, whose common beginning carries no loss."""

    system: str | None
    chosen: list[Turn]
    rejected: list[Turn]


def transcript(text: str) -> list[Turn] | None:
    """The turns of a text in the form of HH-RLHF; None for other texts."""
    if not text.lstrip().startswith("Human:"):
        return None
    parts = _SPEAKER.split(text.strip())[1:]
    return [
        Turn("user" if speaker == "Human" else "assistant", said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def prompt_of(text: str) -> list[Turn] | None:
    """The turns of a prompt in the form of HH-RLHF, which ends with "Assistant:"; None for other texts."""
    turns = transcript(text)
    return turns[:-1] if turns and turns[-1] == Turn("assistant", "") else turns


def read_pair(reading: Reading, prompt: Prompt | None) -> Answers:
    """The chosen and rejected conversations. Raises BadRecord if they have no common prompt."""
    fields = [reading.first(*names) or names[0] for names in (CHOSEN, REJECTED)]
    (own, chosen), (other, rejected) = (_conversation(reading, field, prompt) for field in fields)
    if own != other:
        raise BadRecord("different prompts", "chosen and rejected have different system texts")
    common = _common(chosen, rejected)
    first_answers = [turns[common : common + 1] for turns in (chosen, rejected)]
    if common < max(len(chosen), len(rejected)):
        for field, first in zip(fields, first_answers, strict=True):
            if not first or first[0].role != "assistant":
                what = f"a turn of the {first[0].role}" if first else "nothing"
                raise BadRecord(
                    "different prompts",
                    f"chosen and rejected differ from turn {common + 1} on, where {field!r} has {what}; they may "
                    "differ only from an answer on",
                )
    if not any(turn.role == "user" for turn in chosen[:common]):
        raise BadRecord("no prompt", "chosen and rejected have no prompt in common")
    if common == len(chosen):
        return Answers(own, chosen, rejected)
    asked = without_loss(chosen[:common])
    return Answers(own, [*asked, *chosen[common:]], [*asked, *rejected[common:]])


def _conversation(reading: Reading, field: str, prompt: Prompt | None) -> tuple[str | None, list[Turn]]:
    """The conversation of one of the fields, with the prompt of the record if it has only an answer."""
    value = reading.record.get(field)
    if isinstance(value, str):
        whole = transcript(reading.text(field))
        if prompt is not None and whole is None:
            return prompt.system, [*prompt.turns, Turn("assistant", value)]
        if whole is None:
            raise BadRecord(
                "no prompt",
                f"{field!r} is a text, but the record has no prompt; add the field prompt, or write whole "
                "conversations as messages",
            )
        system = None
    elif isinstance(value, dict | list):
        reading = reading if isinstance(value, list) else replace(reading, record={**reading.record, field: [value]})
        system, whole = read_messages(reading, field)
        whole = whole or [Turn("assistant", "")]
    else:
        raise reading.wrong_type(field, "text or messages")
    if whole and whole[0].role == "assistant" and prompt is not None:
        return system or prompt.system, [*prompt.turns, *whole]
    if prompt is not None and [turn.text for turn in whole[: len(prompt.turns)]] != [t.text for t in prompt.turns]:
        asked = [turn.text for turn in whole if turn.role == "user"]
        if len(prompt.turns) != 1 or prompt.turns[0].text not in asked:
            raise BadRecord("different prompts", f"the conversation in {field!r} does not begin with the prompt")
    return system or (prompt.system if prompt is not None else None), whole


def _common(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    same = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(same, min(len(one), len(other)))


def read_label(reading: Reading) -> bool:
    """Whether the answer of a record is good. Raises BadRecord for anything but true, false, 1 and 0."""
    field = reading.first(*LABELS) or LABELS[0]
    value = reading.take(field)
    words = {"true": True, "false": False, "1": True, "0": False}
    label = words.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(label, bool | int) or label not in (0, 1):
        found = repr(value) if value is not None else "missing or null"
        raise BadRecord("wrong label", f"{field!r} is {found}; it must be true (a good answer) or false (a bad one)")
    return bool(label)


def check_labels(good: NDArray[np.bool_], settings: KtoConfig) -> tuple[str, ...]:
    """A warning if good and bad answers do not weigh what the authors of KTO recommend. Raises UserError if all labels
    are the same."""
    desirable, undesirable = int(np.count_nonzero(good)), int(np.count_nonzero(~good))
    if not (desirable and undesirable):
        raise UserError(
            f"data.sources: all {len(good):,} labels are {str(bool(desirable)).lower()}; KTO needs good and bad answers"
        )
    ratio = settings.desirable_weight * desirable / (settings.undesirable_weight * undesirable)
    if 1 <= ratio < _RECOMMENDED:
        return ()
    key, weight = "undesirable_weight", settings.undesirable_weight * ratio
    if ratio < 1:
        key, weight = "desirable_weight", settings.desirable_weight / ratio
    return (
        f"{desirable:,} good and {undesirable:,} bad answers, with their weights in a ratio of {ratio:.3g}; the "
        f"authors of KTO recommend 1 to 4/3: training.objective.{key}: {weight:.3g}",
    )
