import json
import sys
from pathlib import Path

import pytest

from flacuna_jax.cli import EXIT_STOPPED, EXIT_USER_ERROR
from flacuna_jax.errors import UserError
from flacuna_jax.paper.stages import Record, Stage, Stages, Stopped, digest


def stage(tmp_path: Path, *command: str) -> Stage:
    return Stage("copy", command, (tmp_path / "in",), (tmp_path / "own" / "out",), tmp_path / "own")


class Copying:
    """Executes a stage: copies the input to the output, unless `status` says that the command fails."""

    def __init__(self, status: int = 0) -> None:
        self.runs, self.status = 0, status

    def __call__(self, stage: Stage) -> int:
        self.runs += 1
        (output,) = stage.outputs
        output.parent.mkdir(exist_ok=True)
        if self.status == 0:
            output.write_bytes(stage.inputs[0].read_bytes())
        else:
            (output.parent / "half").touch()
        return self.status


@pytest.fixture
def copying(tmp_path: Path) -> Copying:
    (tmp_path / "in").write_text("one")
    return Copying()


def run(tmp_path: Path, copying: Copying, *command: str) -> Record:
    return Stages(tmp_path / "records", lambda _: None, copying).run(stage(tmp_path, *command))


def test_a_stage_runs_once_for_the_same_command_and_inputs(tmp_path: Path, copying: Copying) -> None:
    first = run(tmp_path, copying, "copy")
    assert run(tmp_path, copying, "copy") == first
    assert copying.runs == first.starts == 1
    assert first.outputs == {str(tmp_path / "own" / "out"): digest(tmp_path / "in")}


@pytest.mark.parametrize("change", ["input", "command", "output"])
def test_a_stage_runs_again_after_a_change(tmp_path: Path, copying: Copying, change: str) -> None:
    run(tmp_path, copying, "copy")
    (tmp_path / "own" / "left").touch()
    if change != "command":
        (tmp_path / "in" if change == "input" else tmp_path / "own" / "out").write_text("two")
    run(tmp_path, copying, "copy", *(["--fast"] if change == "command" else []))
    assert copying.runs == 2
    assert (tmp_path / "own" / "out").read_bytes() == (tmp_path / "in").read_bytes()
    assert (tmp_path / "own" / "left").exists() == (change == "output")


def test_a_stopped_stage_continues_with_what_it_has(tmp_path: Path, copying: Copying) -> None:
    with pytest.raises(Stopped, match="copy was stopped"):
        run(tmp_path, Copying(EXIT_STOPPED), "copy")
    finished = run(tmp_path, copying, "copy")
    assert finished.starts == 2
    assert (tmp_path / "own" / "half").exists()


def test_failures_are_told_apart(tmp_path: Path, copying: Copying) -> None:
    with pytest.raises(UserError, match="copy failed"):
        run(tmp_path, Copying(EXIT_USER_ERROR), "copy")
    with pytest.raises(RuntimeError, match="status 1"):
        run(tmp_path, Copying(1), "copy")
    missing = Stages(tmp_path / "records", lambda _: None, lambda _: 0)
    with pytest.raises(RuntimeError, match="did not write"):
        missing.run(stage(tmp_path, "copy"))
    (tmp_path / "in").unlink()
    with pytest.raises(UserError, match="does not exist"):
        run(tmp_path, copying, "copy")


def test_a_directory_has_the_digest_of_its_names_and_contents(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / "one" / name).write_text(text)
    before = digest(tmp_path / "one")
    (tmp_path / "one" / "b").rename(tmp_path / "one" / "c")
    assert digest(tmp_path / "one") != before


def test_a_command_runs_in_this_process_or_with_an_interpreter(tmp_path: Path) -> None:
    collection = tmp_path / "collection.json"
    records = [{"id": str(number), "conversations": [{"value": f"question {number}"}]} for number in range(5)]
    collection.write_text(json.dumps(records))
    for name, python in (("here", None), ("there", sys.executable)):
        command = ("paper.split", str(collection), "--held-out", "2", "--output", str(tmp_path / name))
        outputs = (tmp_path / name / "train.jsonl", tmp_path / name / "held_out.jsonl")
        Stages(tmp_path / "records").run(Stage(name, command, (collection,), outputs, None, python))
        assert [len(path.read_text().splitlines()) for path in outputs] == [3, 2]
    failing = Stage("none", ("paper.split", str(collection), "--held-out", "9", "--output", "x"), (collection,), ())
    with pytest.raises(UserError, match="none failed"):
        Stages(tmp_path / "records").run(failing)
