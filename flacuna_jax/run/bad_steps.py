"""Handles bad steps: writes the batch to a file for inspection, and stops or continues according to the settings.

bad_steps/<step>.json lists every example of the batch with its id, source, record as in its file, text as the model saw
it, and current loss, so that the example that caused the bad step can be found.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.data.lookup import find_records
from flacuna_jax.data.pipeline import StepSource
from flacuna_jax.data.store import TokenStore, describe_example
from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.errors import UserError
from flacuna_jax.model.parameters import Params
from flacuna_jax.training.loop import StepRecord, to_devices
from flacuna_jax.training.scoring import make_scorer, make_statistics
from flacuna_jax.training.state import TrainState
from flacuna_jax.training.step import StepConfig
from flacuna_jax.whole_files import write_atomically

BAD_STEPS = "bad_steps"


class BadStep(RuntimeError):
    """The loss or its gradient is NaN, infinite or a spike, and the settings end the run. The step changed no
    parameters, and earlier checkpoints are intact."""


@dataclasses.dataclass(frozen=True)
class BatchInspector:
    """Lists the examples of a step and the loss of each.

    Args:
      store, source: the examples, and the assignment of examples to steps.
      splits: for each source of the store, the split that its configuration names.
      config, batch_sharding: for computing losses; all hosts compute them together.
      tokenizer: decodes the text; used on the first host only.
    """

    store: TokenStore
    splits: Sequence[str | None]
    source: StepSource
    config: StepConfig
    batch_sharding: NamedSharding
    tokenizer: Tokenizer

    def losses(self, step: int, trainable: Params, frozen: Params) -> dict[int, float]:
        """Mean loss over the supervised tokens of each example of a step (counted from 1), without dropout.

        Examples are labelled by their positions in the step.
        """
        examples = self.source.info(step - 1).example_indices
        place = np.full(len(self.store), -1, np.int32)
        place[examples] = np.arange(len(examples))
        # An example may occur twice if the weight of its source is above 1; both occurrences then add to one sum.
        batch = to_devices(self.source.labelled(step - 1, place), self.batch_sharding)
        mesh = self.batch_sharding.mesh
        assert isinstance(mesh, Mesh), "batches are of real devices"
        summed = make_statistics(self.config, mesh)(trainable, frozen, batch)
        statistics = {name: found.mean() for name, found in summed.items()}
        sums = jax.device_get(make_scorer(self.config, len(examples), mesh)(trainable, frozen, batch, statistics))
        found = {}
        for example in dict.fromkeys(examples.tolist()):
            loss, tokens = float(sums.values["loss"][place[example]]), int(sums.tokens[place[example]])
            found[example] = loss / tokens if tokens else math.nan
        return found

    def describe(self, step: int, losses: Mapping[int, float]) -> list[list[dict[str, Any]]]:
        """The examples of a step by packed row, with all known facts; numbers that are not finite become strings."""
        rows = self.source.rows(step - 1)
        records = self._records([int(example) for row in rows for example in row])
        return [[self._example(int(example), losses, records) for example in row] for row in rows]

    def _example(self, index: int, losses: Mapping[int, float], records: Mapping[int, Any]) -> dict[str, Any]:
        store = self.store
        return {
            "example": index,
            "id": store.id_of(index),
            "task": store.tasks[store.task_index[index]],
            "tokens": int(store.lengths[index]),
            "supervised_tokens": int(store.supervised[index]),
            "loss": _number(losses.get(index, math.nan)),
            **records[index],
            "seen": [dict(piece._asdict()) for piece in describe_example(store, index, self.tokenizer)],
            "ids": store.example(index).ids.tolist(),
        }

    def _records(self, examples: list[int]) -> dict[int, dict[str, Any]]:
        by_source: dict[int, set[int]] = {}
        for example in examples:
            by_source.setdefault(int(self.store.source_index[example]), set()).add(
                int(self.store.record_index[example])
            )
        found = {
            source: _records_or_reason(self.store.sources[source], self.splits[source], numbers)
            for source, numbers in by_source.items()
        }
        described = {}
        for example in examples:
            source, number = int(self.store.source_index[example]), int(self.store.record_index[example])
            place = {"source": self.store.sources[source], "record_number": number}
            described[example] = {**place, **found[source].get(number, {})}
        return described


@dataclasses.dataclass(frozen=True)
class BadStepPolicy:
    """A step hook that writes the batch of a bad step to a file, and ends the run if the settings require it.

    Args:
      settings: `on_bad_step`, `max_bad_steps`.
      inspector: describes the batch.
      frozen: parameters that are not trained.
      directory: the run directory; None on hosts that do not write.
      say: receives messages for the user.
    """

    settings: TrainingConfig
    inspector: BatchInspector
    frozen: Params
    directory: Path | None
    say: Callable[[str], None]

    def __call__(self, record: StepRecord, state: TrainState) -> None:
        """Does nothing after a good step. Raises `BadStep` if the run must end."""
        if not record.is_bad:
            return
        losses = self.inspector.losses(record.step, state.trainable, self.frozen)
        kept = self._keep(record, state, losses)
        what = f"step {record.step}: loss {record.loss:g}, gradient norm {record.grad_norm:g}{kept}"
        if self.settings.on_bad_step == "stop":
            raise BadStep(f"{what}; the run is stopped (training.on_bad_step: skip would continue with the next batch)")
        if record.in_a_row >= self.settings.max_bad_steps:
            raise BadStep(f"{what}; {record.in_a_row} bad steps in a row end the run (training.max_bad_steps)")
        self.say(f"{what}; skipped ({record.skipped - 1} skipped before)")

    def _keep(self, record: StepRecord, state: TrainState, losses: Mapping[int, float]) -> str:
        if self.directory is None:
            return ""
        path = self.directory / BAD_STEPS / f"{record.step}.json"
        content = {
            "step": record.step,
            "loss": _number(record.loss),
            "grad_norm": _number(record.grad_norm),
            "policy": self.settings.on_bad_step,
            "losses_are_of_the_parameters_after_step": state.step,
            "rows": self.inspector.describe(record.step, losses),
        }
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1))
        except (OSError, UserError) as error:
            return f" (its batch could not be written: {error})"
        return f"; its batch is in {path}, {self._to_blame(record, losses)}"

    def _to_blame(self, record: StepRecord, losses: Mapping[int, float]) -> str:
        """Names the worst example, unless the losses of all examples or of none are not finite."""
        bad = sum(not math.isfinite(loss) for loss in losses.values())
        if bad == len(losses) > 1:
            return "and none of its examples has a finite loss: check the base model and the learning rate"
        if not bad and not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            return "and each of its examples alone has a finite loss: check the learning rate"
        worst = max(losses, key=lambda example: _badness(losses[example]))
        return f"worst example {self.inspector.store.id_of(worst)!r} with loss {losses[worst]:g}"


def _badness(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _records_or_reason(path: str, split: str | None, numbers: set[int]) -> dict[int, dict[str, Any]]:
    """Records by number; if the file is not readable any more, the reason in place of each record."""
    try:
        return find_records(path, numbers, split)
    except (UserError, OSError) as error:
        return {number: {"record": None, "why_not": str(error)} for number in numbers}
