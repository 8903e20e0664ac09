"""Nobody waits for an import that is not needed: `--help`, mistakes in options, and `import flacuna_jax`."""

import subprocess
import sys
from pathlib import Path

import pytest

import flacuna_jax
from flacuna_jax.cli import VERBS

HEAVY = ("jax", "flax", "optax", "orbax", "grain", "pandas", "pyarrow", "transformers", "datasets", "torch")
"""Each takes from a quarter of a second to several seconds to import."""
OF_CONFIGS = ("numpy", "pydantic", "yaml")
"""Reading a config may import these, `--help` may not."""
LISTING = f"""
import atexit, sys
found = lambda: [name for name in {HEAVY + OF_CONFIGS} if name in sys.modules]
atexit.register(lambda: print("imported:", *found(), file=sys.stderr))
"""


def imported(code: str, cwd: Path | None = None) -> tuple[int, set[str]]:
    """The exit status of a process that runs `code`, and the heavy packages that it imported."""
    done = subprocess.run([sys.executable, "-c", LISTING + code], capture_output=True, text=True, cwd=cwd)
    *_, last = done.stderr.splitlines()
    name, _, packages = last.partition(":")
    assert name == "imported", done.stderr
    return done.returncode, set(packages.split())


def test_the_test_sees_imports() -> None:
    assert imported("import flax.nnx, pydantic")[1] >= {"jax", "flax", "numpy", "pydantic"}


def test_the_package_imports_nothing_heavy() -> None:
    assert imported("import flacuna_jax; dir(flacuna_jax); flacuna_jax.UserError; flacuna_jax.Sampling") == (0, set())


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_nothing_heavy(verb: str) -> None:
    code = f"from flacuna_jax.cli import main; main(['{verb}', '--help'])"
    assert imported(code) == (0, set())


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_the_module_imports_nothing_heavy(verb: str) -> None:
    code = f"import runpy; sys.argv = ['', '--help']; runpy.run_module('flacuna_jax.{verb}', run_name='__main__')"
    assert imported(code) == (0, set())


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--config", "none.yaml"],
        ["train", "--config", "wrong.yaml"],
        ["plan", "--config", "wrong.yaml"],
        ["prepare", "--config", "wrong.yaml"],
        ["generate", "--model", "m", "--file", "none.txt"],
        ["generate", "--model", "m", "--top-p", "2", "Why?"],
        ["evaluate", "--model", "m", "--tasks", "mmlu", "--data", ".", "--limit", "0"],
        ["export", "run", "out", "--format", "zip"],
        ["convert", "model", "out", "--dtype", "int3"],
        ["chat", "--temprature", "1"],
        ["serve", "--port", "x"],
        ["check"],
    ],
)
def test_mistakes_are_found_before_anything_heavy_is_imported(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("trainin: {}\ndata: {}\n")
    code = f"from flacuna_jax.cli import script; sys.argv = ['flacuna', *{words}]; script()"
    status, packages = imported(code, tmp_path)
    assert status == 2
    assert packages <= set(OF_CONFIGS)


def test_answers_do_not_need_the_trainer_or_the_kernels_of_accelerators() -> None:
    code = "import flacuna_jax.verbs.generate; assert 'jax.experimental.pallas' not in sys.modules"
    status, packages = imported(code)
    assert status == 0
    assert packages & set(HEAVY) <= {"jax", "flax", "optax"}  # flax imports optax


def test_prepare_does_not_need_the_loader_of_batches() -> None:
    status, packages = imported("import flacuna_jax.verbs.prepare")
    assert status == 0
    assert packages.isdisjoint({"grain", "orbax"})


def test_the_names_of_the_package_are_there() -> None:
    assert set(dir(flacuna_jax)) >= set(flacuna_jax.__all__)
    for name in flacuna_jax.__all__:
        assert getattr(flacuna_jax, name) is not None
