"""What `flacuna` gives every verb: exit statuses and clean exits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flacuna_jax.cli import run_verb
from flacuna_jax.errors import UserError

LISTING = (
    "from flacuna_jax.cli import run_verb\nraise SystemExit(run_verb(lambda _: [print(n) for n in range(10**6)] and 0))"
)


def test_a_closed_output_ends_a_verb_without_a_traceback() -> None:
    with subprocess.Popen([sys.executable, "-c", LISTING], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_any_other_broken_pipe_is_raised(capfd: pytest.CaptureFixture[str]) -> None:
    def verb(_: object) -> int:
        raise BrokenPipeError("a judge hung up")

    with pytest.raises(BrokenPipeError, match="a judge hung up"):
        run_verb(verb, [])


def test_user_errors_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def verb(_: object) -> int:
        raise UserError("x.yaml:3: no")

    assert run_verb(verb, []) == 2
    assert capsys.readouterr().err == "error: x.yaml:3: no\n"


@pytest.mark.parametrize("says", ["RESOURCE_EXHAUSTED: 5 bytes.\nBuffers: ...", "INTERNAL: Out of memory", None])
def test_out_of_memory_prints_one_line(says: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    def verb(_: object) -> int:
        raise MemoryError if says is None else RuntimeError(says)

    assert run_verb(verb, []) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory")
    assert said.count("\n") == 1


def test_a_file_name_that_is_too_long_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(lambda _: open(tmp_path / ("a" * 5000)), []) == 2  # noqa: SIM115
    said = capsys.readouterr().err
    assert "the file name is too long" in said
    assert len(said) < 300


def test_a_character_that_the_terminal_cannot_show_is_escaped() -> None:
    verb = "lambda _: print('4 \u00d7 \\ud800') or 0"
    script = f"from flacuna_jax.cli import run_verb\nraise SystemExit(run_verb({verb}))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "4 \\xd7 \\ud800\n"), result.stderr
