"""The arithmetic of a run, the arrays of its batches, and resuming anywhere on any number of hosts."""

import itertools
from typing import Any

import numpy as np
import pytest

from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.data.pipeline import (
    Batch,
    BatchStream,
    RunPlan,
    StepSource,
    check_batch_arithmetic,
    plan_steps,
)
from flacuna_jax.data.store import StoreBuilder, TokenStore
from flacuna_jax.data.tokenization import TokenizedExample
from flacuna_jax.errors import UserError

LENGTH = 64


def make_store(sizes: tuple[int, ...] = (150, 40), seed: int = 0) -> TokenStore:
    """Random examples of 3 to LENGTH tokens; the answer is the last third."""
    random = np.random.default_rng(seed)
    builder = StoreBuilder([f"source{i}" for i in range(len(sizes))], 1000)
    for source, size in enumerate(sizes):
        examples = []
        for index in range(size):
            n = int(min(LENGTH, 3 + random.exponential(20)))
            ids = random.integers(3, 1000, n).astype(np.int32)
            examples.append(TokenizedExample(ids, np.arange(n) >= (2 * n + 2) // 3, f"{source}/{index}", "task"))
        builder.add(source, examples, range(size))
    return builder.finish()


STORE = make_store()


def make_plan(
    store: TokenStore = STORE,
    *,
    shards: int | None = 2,
    seed: int = 0,
    weights: tuple[float, ...] = (1.0, 1.0),
    packing: str = "best_fit",
    **training: Any,
) -> RunPlan:
    data = DataConfig(
        sources=tuple(SourceConfig(path=f"{i}", weight=weight) for i, weight in enumerate(weights)),
        max_length=LENGTH,
        packing=packing,
    )
    settings = TrainingConfig(**{"batch_size": 16, "micro_batch_size": 2, **training})
    return plan_steps(store, data, settings, seed=seed, shards=shards)


def test_examples_as_unit() -> None:
    plan = make_plan(epochs=3)
    assert plan.examples == 190
    assert plan.rows_per_step == -(-16 * plan.rows // 190)
    assert plan.micro_rows == 4
    assert plan.accumulation == -(-plan.rows_per_step // 4)
    assert [e.steps for e in plan.epochs] == [-(-e.rows // plan.rows_per_step) for e in plan.epochs]
    assert [e.first_step for e in plan.epochs] == [0, *itertools.accumulate(e.steps for e in plan.epochs)][:3]
    assert plan.total_steps == sum(e.steps for e in plan.epochs)
    assert plan.fill == STORE.lengths.sum() / (plan.rows * LENGTH)
    assert plan.fill > 0.95
    # About 16 examples per step, as configured.
    assert 16 <= plan.examples_per_step <= 16 * (plan.rows_per_step + 1) / plan.rows_per_step
    assert plan.warnings == ()


def test_the_range_of_examples_per_step_is_that_of_the_batches() -> None:
    plan = make_plan()
    source = StepSource(STORE, plan)
    whole = [info.examples for info in map(source.info, range(len(source))) if info.rows == plan.rows_per_step]
    assert len(set(whole)) > 1, "a step has a number of rows, not of examples"
    assert plan.epochs[0].examples_of_step == (min(whole), max(whole))
    assert plan.examples_of_a_step == f"{min(whole)} to {max(whole)} (mean {plan.examples_per_step:.1f})"
    all_at_once = make_plan(batch_size=1000)
    assert all_at_once.examples_of_a_step == "190"
    assert make_plan(packing="none").examples_of_a_step == "16"


def test_rows_per_step_does_not_depend_on_the_mesh() -> None:
    plans = [make_plan(shards=shards, micro_batch_size=m) for shards in (1, 2, 4, 8) for m in (1, 2, 3)]
    assert len({plan.rows_per_step for plan in plans}) == 1
    assert len({plan.total_steps for plan in plans}) == 1
    assert make_plan(shards=None).rows_per_step == plans[0].rows_per_step
    assert make_plan(shards=None, batch_unit="rows", batch_size=3).rows_per_step == 3


def test_rows_as_unit() -> None:
    plan = make_plan(batch_unit="rows", batch_size=16)
    assert (plan.rows_per_step, plan.accumulation) == (16, 4)
    assert plan.epochs[0].steps == -(-plan.rows // 16)
    message = "training.batch_size 18 .* must be a multiple of 4 = training.micro_batch_size 2 × 2 data×fsdp shards"
    with pytest.raises(UserError, match=message):
        make_plan(batch_unit="rows", batch_size=18)
    with pytest.raises(UserError, match=message):
        check_batch_arithmetic(TrainingConfig(batch_unit="rows", batch_size=18, micro_batch_size=2), 2)


def test_packing_that_reduces_the_steps_is_reported() -> None:
    (warning,) = make_plan(batch_unit="rows").warnings
    assert "with packing, an epoch has" in warning
    assert "batch_unit: examples" in warning
    assert make_plan(batch_unit="rows", packing="none").warnings == ()


def test_max_steps_and_warmup() -> None:
    whole = make_plan(epochs=2)
    assert make_plan(epochs=2, max_steps=5).total_steps == 5
    assert make_plan(epochs=2, max_steps=10**6).total_steps == whole.total_steps
    assert len(make_plan(epochs=500, max_steps=whole.epochs[0].steps + 1).epochs) == 2
    assert make_plan(epochs=2, warmup_steps=whole.total_steps - 1).total_steps == whole.total_steps
    with pytest.raises(UserError, match=f"warmup_steps {whole.total_steps} is not shorter than the run of"):
        make_plan(epochs=2, warmup_steps=whole.total_steps)
    with pytest.raises(UserError, match="warmup_steps 5 is not shorter than the run of 5 steps"):
        make_plan(epochs=2, warmup_steps=5, max_steps=5)
    falling = {"schedule": "warmup_stable_decay", "max_steps": 5, "epochs": 2}
    assert make_plan(warmup_steps=2, decay_steps=3, **falling).total_steps == 5
    with pytest.raises(
        UserError, match=r"3 steps of warm-up and training\.decay_steps 3 together are longer than the run of 5 steps"
    ):
        make_plan(warmup_steps=3, decay_steps=3, **falling)


@pytest.mark.parametrize("unit", ["examples", "rows"])
def test_a_batch_larger_than_the_data_needs_no_more_memory_than_the_data(unit: str) -> None:
    plan = make_plan(epochs=3, batch_size=2_000_000_000, batch_unit=unit)
    assert plan.total_steps == 3
    assert plan.rows_per_step == max(epoch.rows for epoch in plan.epochs)
    assert "every step is an epoch" in plan.warnings[0]
    assert StepSource(STORE, plan)[2]["tokens"].shape[0] == -(-plan.rows_per_step // 4)
    assert not any("every step" in warning for warning in make_plan().warnings)


def test_weights_that_leave_no_example() -> None:
    with pytest.raises(UserError, match="an epoch has no example"):
        make_plan(make_store((3,)), weights=(0.01,))


def documents(batch: Batch) -> list[tuple[list[int], list[bool]]]:
    """Every document of a batch as (ids, loss mask); also checks that the arrays agree with each other."""
    found = []
    flat = {name: array.reshape(-1, LENGTH) for name, array in batch.items()}
    for row in range(len(flat["tokens"])):
        tokens, targets, mask, segments, positions = (
            flat[name][row] for name in ("tokens", "targets", "loss_mask", "segment_ids", "positions")
        )
        used = int((segments > 0).sum())
        assert (segments[used:] == 0).all()
        for array in (tokens, targets, mask, positions):
            assert not array[used:].any()
        assert sorted(set(segments[:used])) == list(range(1, int(segments.max()) + 1))
        for segment in range(1, int(segments.max()) + 1):
            span = np.flatnonzero(segments == segment)
            assert (np.diff(span) == 1).all()
            ids = tokens[span]
            assert positions[span].tolist() == list(range(len(span)))
            assert targets[span].tolist() == [*ids[1:].tolist(), 0]
            assert not mask[span][-1]
            found.append((ids.tolist(), [False, *mask[span][:-1].tolist()]))
    return found


def expected(examples: np.ndarray) -> list[tuple[list[int], list[bool]]]:
    return [(STORE.example(i).ids.tolist(), STORE.example(i).loss_mask.tolist()) for i in examples]


@pytest.mark.parametrize("packing", ["best_fit", "first_fit", "none"])
def test_an_epoch_has_every_example_once(packing: str) -> None:
    plan = make_plan(packing=packing, epochs=2, weights=(1.0, 2.0))
    source = StepSource(STORE, plan)
    assert len(source) == plan.total_steps
    for epoch in plan.epochs:
        seen: list[int] = []
        for step in range(epoch.first_step, epoch.first_step + epoch.steps):
            info = source.info(step)
            batch = source[step]
            assert batch["tokens"].shape == (plan.accumulation, plan.micro_rows, LENGTH)
            assert {name: array.dtype for name, array in batch.items()} == {
                "tokens": np.int32,
                "targets": np.int32,
                "segment_ids": np.int32,
                "positions": np.int32,
                "loss_mask": np.bool_,
            }
            assert documents(batch) == expected(info.example_indices)
            assert info.examples == len(info.example_indices)
            assert info.tokens == (batch["segment_ids"] > 0).sum()
            assert info.supervised_tokens == batch["loss_mask"].sum()
            assert info.rows == (batch["segment_ids"] > 0).any(axis=-1).sum() <= plan.rows_per_step
            assert info.fill == info.tokens / (info.rows * LENGTH)
            seen += info.example_indices.tolist()
        assert sorted(seen) == sorted([*range(150), *range(150, 190), *range(150, 190)])


def test_rows_are_at_the_documented_positions() -> None:
    plan = make_plan()
    source = StepSource(STORE, plan)
    batch = source[0]
    for number, examples in enumerate(source.rows(0)):
        micro_batch, row = divmod(number, plan.micro_rows)
        assert batch["tokens"][micro_batch, row, : STORE.lengths[examples[0]]].tolist() == (
            STORE.example(examples[0]).ids.tolist()
        )


def test_the_last_step_of_an_epoch_is_padded_and_not_mixed() -> None:
    plan = make_plan(epochs=2, shards=1, batch_unit="rows", batch_size=10)
    source = StepSource(STORE, plan)
    last = plan.epochs[0].steps - 1
    assert source.info(last).rows == plan.rows - 10 * last
    assert (source.info(last).epoch, source.info(last + 1).epoch) == (0, 1)
    assert source.info(last + 1).rows == 10
    with pytest.raises(IndexError):
        source.info(plan.total_steps)


def test_hosts_share_a_batch() -> None:
    plan = make_plan(shards=4)
    whole = StepSource(STORE, plan)[3]
    for count in (2, 4):
        parts = [StepSource(STORE, plan, index, count)[3] for index in range(count)]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts], axis=1), array)
    with pytest.raises(UserError, match="8 rows cannot be shared by 3 hosts"):
        StepSource(STORE, plan, 0, 3)


def batches(plan: RunPlan, *, start_step: int = 0, host: int = 0, hosts: int = 1, threads: int = 2) -> BatchStream:
    return BatchStream(StepSource(STORE, plan, host, hosts), start_step, threads, ahead=4)


def assert_same(batch: Batch, other: Batch) -> None:
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize("threads", [1, 4])
def test_the_stream_is_the_source_in_order(threads: int) -> None:
    plan = make_plan(epochs=2)
    source = StepSource(STORE, plan)
    stream = batches(plan, threads=threads)
    steps = list(stream)
    assert len(steps) == plan.total_steps
    for step, batch in enumerate(steps):
        assert_same(batch, source[step])
    stream.close()


def test_resume_at_any_step() -> None:
    plan = make_plan(epochs=2)
    source = StepSource(STORE, plan)
    # Mid-epoch, at the seam of the epochs, in the second, at the end; on one host or as the second of two.
    for step in (1, plan.epochs[0].steps, plan.epochs[0].steps + 2, plan.total_steps):
        again = batches(plan, start_step=step)
        rest = list(again)
        assert len(rest) == plan.total_steps - step
        for offset, batch in enumerate(rest):
            assert_same(batch, source[step + offset])
        again.close()
        second = batches(plan, host=1, hosts=2, start_step=step)
        for offset, batch in enumerate(second):
            assert_same(batch, {name: array[:, 2:] for name, array in source[step + offset].items()})
        second.close()


def test_the_order_depends_only_on_seed_and_epoch() -> None:
    orders = {}
    for seed in (0, 1):
        plan = make_plan(epochs=2, seed=seed)
        for epoch in plan.epochs:
            for source in (StepSource(STORE, plan), StepSource(STORE, plan)):
                info = [source.info(epoch.first_step + step).example_indices for step in range(epoch.steps)]
                orders.setdefault((seed, epoch.first_step > 0), set()).add(tuple(np.concatenate(info)))
    assert [len(order) for order in orders.values()] == [1, 1, 1, 1]
    assert len(set.union(*orders.values())) == 4
