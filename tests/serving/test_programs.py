"""Programs that are compiled ahead and in the background."""

import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("starlette")

from flacuna_jax.generation.programs import AdvanceSize, FillSize
from flacuna_jax.serving.programs import LENGTHS, PARTS, CompiledPrograms, Size, StartSize
from flacuna_jax.serving.scheduler import STEPS
from tests.serving.models import prepared


@pytest.fixture(scope="module")
def programs(story_llama: Path) -> CompiledPrograms:
    scheduler, _ = prepared(story_llama, {}, "--rows", "4", "--context", "320")
    scheduler.warm_up()
    return scheduler._programs


def test_the_smallest_program_that_is_ready_is_used_until_a_better_one_is(
    programs: CompiledPrograms, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = FillSize(PARTS, LENGTHS[-1], 2)
    assert {largest, StartSize(PARTS), AdvanceSize(STEPS, programs.counts[-1], 2)} <= programs._ready.keys()
    wanted = FillSize(PARTS, 192, 1)
    assert wanted not in programs._ready
    compile_here = programs._compile
    compiling: list[tuple[object, str]] = []

    def compile_and_note(size: Size) -> None:
        compiling.append((size, threading.current_thread().name))
        compile_here(size)

    monkeypatch.setattr(programs, "_compile", compile_and_note)
    assert programs.fill(FillSize(PARTS, 150, 1)) == (largest, programs._ready[largest])
    end = time.monotonic() + 300
    while wanted not in programs._ready:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert programs.fill(FillSize(PARTS, 150, 1))[0] == wanted
    assert compiling == [(wanted, "compiler_0")]


def test_a_program_that_cannot_be_compiled_leaves_the_larger_one(
    programs: CompiledPrograms, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: no memory")

    monkeypatch.setattr(programs, "_lowered", broken)
    assert programs.fill(FillSize(PARTS, 100, 2))[0] == FillSize(PARTS, LENGTHS[-1], 2)
    programs._background.submit(lambda: None).result(60)
    assert "could not be compiled" in caplog.text
    assert programs.fill(FillSize(PARTS, 100, 2))[0] == FillSize(PARTS, LENGTHS[-1], 2)
