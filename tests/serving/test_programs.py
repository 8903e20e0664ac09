"""Programs that are compiled ahead and in the background."""

import time
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("starlette")

from flacuna_jax.generation.programs import AdvanceSize, FillSize
from flacuna_jax.serving.programs import LENGTHS, CompiledPrograms, StartSize
from flacuna_jax.serving.scheduler import STEPS
from tests.serving.models import prepared


@pytest.fixture(scope="module")
def programs(story_llama: Path) -> CompiledPrograms:
    scheduler, _ = prepared(story_llama, {}, "--rows", "4", "--context", "320")
    scheduler.warm_up()
    return scheduler._programs


def test_the_smallest_program_that_is_ready_is_used_until_a_better_one_is(programs: CompiledPrograms) -> None:
    largest = FillSize(1, LENGTHS[-1], 2)
    assert {largest, StartSize(1), AdvanceSize(STEPS, programs.counts[-1], 2)} <= programs._ready.keys()
    wanted = FillSize(1, 192, 1)
    assert wanted not in programs._ready
    begin = time.monotonic()
    size, program = programs.fill(FillSize(1, 150, 1))
    # Compiling takes longer, even of this model.
    assert (size, program, time.monotonic() - begin < 0.1) == (largest, programs._ready[largest], True)
    end = time.monotonic() + 300
    while wanted not in programs._ready:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert programs.fill(FillSize(1, 150, 1))[0] == wanted


def test_a_program_that_cannot_be_compiled_leaves_the_larger_one(
    programs: CompiledPrograms, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: no memory")

    monkeypatch.setattr(programs, "_lowered", broken)
    assert programs.fill(FillSize(1, 100, 2))[0] == FillSize(1, LENGTHS[-1], 2)
    programs._background.submit(lambda: None).result(60)
    assert "could not be compiled" in caplog.text
    assert programs.fill(FillSize(1, 100, 2))[0] == FillSize(1, LENGTHS[-1], 2)
