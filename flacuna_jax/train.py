"""`python -m flacuna_jax.train --config C [--a.b=value ...]`: the main job, from a checkpoint and data to an adapter.

Reads top to bottom: model, data, plan, starting state, loop, export. Every part lives in its room; this file only puts
them together.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import jax

from flacuna_jax import distributed
from flacuna_jax.cli import run_verb
from flacuna_jax.config import RunConfig
from flacuna_jax.config_files import load_config
from flacuna_jax.data.pipeline import BatchStream, StepSource, check_batch_arithmetic
from flacuna_jax.model.sharding import batch_sharding, check_mesh, make_mesh, row_shards
from flacuna_jax.model_source import open_model
from flacuna_jax.run_delivery import deliver_result
from flacuna_jax.run_setup import Setup, build_data, first_adapters, load_weights, plan_lines, resolve_auto
from flacuna_jax.training.checkpoint import Checkpointer
from flacuna_jax.training.loop import Loop
from flacuna_jax.training.metrics import Throughput, open_tracker
from flacuna_jax.training.progress import open_progress
from flacuna_jax.training.report import environment, mixture_rows, read_metrics, write_report
from flacuna_jax.training.resume import require_same_run, rounding_changes
from flacuna_jax.training.run_directory import RunDirectory, open_run_directory
from flacuna_jax.training.state import TrainState
from flacuna_jax.training.step import StepConfig, make_step, partition
from flacuna_jax.training.step_log import StepLog


def main(argv: Sequence[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(
        prog="flacuna train",
        description="Fine-tunes a LLaMA: LoRA adapters, or every weight with lora: null.",
        epilog="Any setting of the config can be overridden: --training.epochs=2 --data.sources.0.path=my.jsonl",
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="see configs/")
    arguments, overrides = parser.parse_known_args(argv)
    train(load_config(arguments.config, overrides))
    return None


def train(config: RunConfig) -> None:
    """Runs, or resumes, one training run. Raises `UserError` before anything is written if the input is wrong."""
    distributed.initialize(config.distributed)
    source = open_model(config.model)
    config = resolve_auto(config, source)
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, source.config.num_heads, source.config.num_kv_heads, source.config.intermediate_size)
    shards = row_shards(mesh)
    check_batch_arithmetic(config.training, shards)

    primary = jax.process_index() == 0
    with open_run_directory(config.directory, resume=config.checkpoint.resume, primary=primary) as directory:
        say: Callable[[str], None] = print if primary else lambda _: None
        setup = Setup(config, mesh, source, *build_data(config, source, shards, say))
        distributed.require_agreement(setup.shared_facts)
        with Checkpointer(
            directory.path, keep=config.checkpoint.keep, asynchronous=config.lora is None
        ) as checkpointer:
            _train(setup, directory, checkpointer, say)


def _train(setup: Setup, directory: RunDirectory, checkpointer: Checkpointer, say: Callable[[str], None]) -> None:
    config, layout, meta = setup.config, setup.layout, setup.meta
    primary = jax.process_index() == 0
    for line in plan_lines(setup):
        say(line)

    # Where the run starts: the newest intact checkpoint > the adapter of lora.init_from > fresh adapters. Without LoRA:
    # the newest checkpoint > the base's weights, or random ones.
    restored = checkpointer.restore(
        layout.trainable,
        layout.opt_state,
        check=lambda saved: require_same_run(saved, meta, directory.path),
        notify=say,
    )
    if restored:
        say(f"resuming after step {restored.step}")
        for change in rounding_changes(restored.meta, meta):
            say(f"note: equal to rounding only, not bit for bit: {change}")
        state = TrainState(restored.step, restored.trainable, restored.opt_state)
        base = load_weights(setup) if config.lora else {}
    else:
        base = load_weights(setup)
        trainable, base = partition(setup.spec, base, first_adapters(setup, base))
        state = layout.begin(trainable)
    if primary:
        directory.write_config(config.to_yaml())
        directory.cut_metrics_back(state.step)

    source = StepSource(setup.store, setup.plan, jax.process_index(), jax.process_count())
    stream = BatchStream(source, start_step=state.step, threads=2, ahead=4)
    throughput = Throughput()
    started = time.monotonic()
    with (
        open_tracker(
            config.logging, directory.path, config=meta["config"], after_step=state.step, primary=primary
        ) as tracker,
        open_progress(setup.plan.total_steps, state.step, primary=primary) as progress,
    ):

        def save(state: TrainState) -> None:
            tracker.sync()
            with throughput.paused():
                checkpointer.save(state.step, state.trainable, state.opt_state, {**meta, "cursor": stream.cursor()})

        log = StepLog(
            total_steps=setup.plan.total_steps,
            every_steps=config.logging.every_steps,
            schedule=setup.schedule,
            info=source.info,
            tracker=tracker,
            progress=progress,
            throughput=throughput,
        )
        step = make_step(
            StepConfig(setup.spec, config.seed, remat=config.training.remat),
            layout.optimizer,
            setup.mesh,
            layout.shardings,
        )
        loop = Loop(
            step=step,
            frozen=base,
            batches=stream,
            batch_sharding=batch_sharding(setup.mesh),
            total_steps=setup.plan.total_steps,
            observe=log,
            save=save,
            save_every=config.checkpoint.every_steps,
        )
        state = loop.run(state)
        stream.close()
    checkpointer.wait()
    say(f"{state.step} steps done in {time.monotonic() - started:.1f} s")
    say(deliver_result(setup, directory, state, base, log.last_loss))
    if primary:
        write_report(
            directory.report,
            title=directory.path.name,
            records=read_metrics(directory.metrics),
            facts={line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in plan_lines(setup)},
            mixture=mixture_rows(setup.report),
            config_yaml=config.to_yaml(),
            environment=environment(),
        )


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
