"""What changes a hash of the package's source code."""

import io
import tokenize
from pathlib import Path

import pytest

import flacuna_jax
from flacuna_jax.source_code import directory_digest, statements

SOURCE = '''"""A module."""

import math  # for pi


def area(radius: float) -> float:
    """In square metres.

    Errors: none.
    """
    text = "# not a comment"
    return math.pi * radius**2 + len(text)
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A module.", "Another description."),
        ("# for pi", "# because of pi, and of nothing else"),
        ("  # for pi", ""),
        ("    Errors: none.\n", ""),
        ("\n\n\n", "\n"),
    ],
)
def test_words_do_not_change_the_hash(tmp_path, old, new):
    assert digest(tmp_path, SOURCE) == digest(tmp_path, SOURCE.replace(old, new))


@pytest.mark.parametrize(("old", "new"), [("radius**2", "radius**3"), ("# not a comment", "# not"), ("math.pi * ", "")])
def test_code_changes_the_hash(tmp_path, old, new):
    assert digest(tmp_path, SOURCE) != digest(tmp_path, SOURCE.replace(old, new))


def test_names_of_files_and_data_files_count(tmp_path):
    before = digest(tmp_path, SOURCE)
    (tmp_path / "package" / "table.json").write_text("{}")
    assert directory_digest(tmp_path, ["package"]) != before
    assert directory_digest(tmp_path, ["package"], without=["package/table.json"]) == before
    (tmp_path / "package" / "a.py").rename(tmp_path / "package" / "b.py")
    assert directory_digest(tmp_path, ["package"], without=["package/table.json"]) != before


def test_every_module_of_the_package_keeps_its_code():
    for path in Path(flacuna_jax.__file__).parent.rglob("*.py"):
        source = path.read_text()
        assert code(statements(source)) == code(source), path


def digest(directory: Path, source: str) -> str:
    (directory / "package").mkdir(exist_ok=True)
    (directory / "package" / "a.py").write_text(source)
    return directory_digest(directory, ["package"])


def code(source: str) -> list[str]:
    """The tokens that are neither comments nor strings nor layout."""
    layout = (tokenize.COMMENT, tokenize.STRING, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type not in layout]
