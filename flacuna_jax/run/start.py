"""The state at which a run starts, and the state that it delivers: checkpoints, adapters, weights."""

import dataclasses

import jax

from flacuna_jax.errors import UserError
from flacuna_jax.model.parameters import Params
from flacuna_jax.run.resume import (
    BASE_CHECKSUM,
    allowed_changes,
    base_change,
    refusal,
    require_same_run,
    rounding_changes,
)
from flacuna_jax.run.setup import Setup, first_adapters, load_weights
from flacuna_jax.say import Say
from flacuna_jax.storage.checkpoint import Checkpointer, Meta, checksum, list_checkpoints, restore_adapters
from flacuna_jax.storage.run_directory import RunDirectory
from flacuna_jax.training.history import History, RecentLosses
from flacuna_jax.training.state import TrainState
from flacuna_jax.training.step import partition


@dataclasses.dataclass(frozen=True)
class Start:
    """The state to start from, the frozen parameters, the results of earlier evaluations, the losses of the last steps,
    and the facts that the run's checkpoints record."""

    state: TrainState
    base: Params
    history: History
    recent: RecentLosses
    meta: Meta


def starting_point(setup: Setup, directory: RunDirectory, checkpointer: Checkpointer, say: Say) -> Start:
    """The start of a run, or the checkpoint to continue from.

    In order of preference: the newest intact checkpoint, the adapter in lora.init_from, fresh adapters. Without LoRA:
    the newest intact checkpoint, the base's weights (or random weights).

    Raises:
      UserError: the checkpoints belong to another run, none of them is intact, or a finished run has none any more.
    """
    config, layout = setup.config, setup.layout
    lower_is_better = config.evaluation is not None and config.evaluation.lower_is_better
    allowed = config.checkpoint.allow_changes
    restored = checkpointer.restore(
        layout.trainable,
        layout.opt_state,
        check=lambda saved: require_same_run(saved, setup.meta, directory.output, allowed),
        notify=say,
    )
    if restored is None:
        directory.require_undelivered()
        state, base = fresh_state(setup)
        return Start(state, base, History(lower_is_better), RecentLosses(), _meta_with(setup, base))
    if restored.step > setup.plan.total_steps:
        raise UserError(
            f"{directory.output} contains a run that is at step {restored.step:,}, beyond the "
            f"{setup.plan.total_steps:,} steps of these settings; choose another output_dir for a shorter run"
        )
    base = load_weights(setup) if config.lora else {}
    meta = _meta_with(setup, base)
    other_base = base_change(restored.meta, meta)
    if other_base and "base" not in allowed:
        raise refusal(directory.output, [other_base], ", ".join((*allowed, "base")))
    say(f"resuming after step {restored.step}")
    for change in rounding_changes(restored.meta, meta):
        say(f"note: results are equal only up to rounding, not bit for bit: {change}")
    for change in (*allowed_changes(restored.meta, meta, allowed), *filter(None, [other_base])):
        say(f"note: results may differ from here on, accepted by checkpoint.allow_changes: {change}")
    same_metric = (restored.meta["config"].get("evaluation") or {}).get("metric") == (
        config.evaluation.metric if config.evaluation else None
    )
    history = History(lower_is_better)
    if same_metric and config.evaluation is not None:
        history = History.from_json(lower_is_better, restored.meta["counters"]["history"])
    recent = RecentLosses.from_json(restored.meta["counters"].get("recent_losses", ()))  # absent in older checkpoints
    return Start(TrainState(restored.step, restored.trainable, restored.opt_state), base, history, recent, meta)


def _meta_with(setup: Setup, base: Params) -> Meta:
    return {**setup.meta, BASE_CHECKSUM: checksum(base)} if setup.config.lora else setup.meta


def fresh_state(setup: Setup) -> tuple[TrainState, Params]:
    """The state before the first step, and the frozen parameters."""
    base = load_weights(setup)
    trainable, frozen = partition(setup.spec, base, first_adapters(setup, base))
    return setup.layout.begin(trainable), frozen


def newest_state(setup: Setup, say: Say) -> tuple[TrainState, Params]:
    """The newest checkpoint's parameters, without its optimizer state, for inspection; without checkpoints, the initial
    parameters.

    Raises:
      UserError: the checkpoint is damaged.
    """
    state, frozen = fresh_state(setup)
    steps = list_checkpoints(setup.config.output_dir)
    if not steps:
        return state, frozen
    say(f"parameters of step {steps[-1]}")
    arrays, _ = restore_adapters(setup.config.output_dir, steps[-1])
    shardings = {name: leaf.sharding for name, leaf in state.trainable.items()}
    return TrainState(steps[-1], jax.device_put(arrays, shardings), state.opt_state), frozen


def chosen_state(setup: Setup, checkpointer: Checkpointer, history: History, last: TrainState, say: Say) -> TrainState:
    """The state to deliver: the last, or that of the best checkpoint. Raises UserError if it cannot be read."""
    settings = setup.config.evaluation
    if settings is None or settings.deliver == "last":
        return last
    kept = [step for step in history.best(len(history.values)) if step in checkpointer.steps()]
    if not kept:
        raise UserError(
            "evaluation.deliver is best, but no remaining checkpoint was evaluated; "
            "set checkpoint.keep_best to keep the best ones"
        )
    best = history.best(1)[0]
    left = "" if kept[0] == best else f" of the remaining ones; the best was step {best} ({history.values[best]:.4g})"
    say(f"delivering step {kept[0]}, the best by {settings.metric} ({history.values[kept[0]]:.4g}){left}")
    if kept[0] == last.step:
        return last
    trainable = checkpointer.read_trainable(kept[0], setup.layout.trainable)
    return TrainState(kept[0], jax.block_until_ready(trainable), last.opt_state)
