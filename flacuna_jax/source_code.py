"""Hashes of the package's own source code, which identify results that other code might not reproduce.

Comments, docstrings and blank lines do not count: rewording one discards no cache and makes no run refuse to resume.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Collection
from functools import cache
from importlib import resources
from pathlib import Path

_COUNTED = (".py", ".json", ".yaml")
_TEXTS = (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
"""Tokens whose blank lines count. Since Python 3.12, an f-string is several tokens."""


@cache
def source_digest(*places: str, without: Collection[str] = ()) -> str:
    """SHA-256 of files of the package, in hexadecimal.

    Args:
      places: files, or directories with all their Python, JSON and YAML files, relative to `flacuna_jax`.
      without: files among them that do not count.
    """
    with resources.as_file(resources.files("flacuna_jax")) as root:
        return directory_digest(root, places, without)


def directory_digest(root: Path, places: Collection[str], without: Collection[str] = ()) -> str:
    """`source_digest` of a package in `root`."""
    found: dict[str, Path] = {}
    for place in (root / name for name in places):
        files = [place] if place.is_file() else [path for path in place.rglob("*") if path.suffix in _COUNTED]
        found |= {path.relative_to(root).as_posix(): path for path in files}
    digest = hashlib.sha256()
    for name in sorted(found.keys() - set(without)):
        path = found[name]
        content = statements(path.read_text("utf-8")).encode() if path.suffix == ".py" else path.read_bytes()
        digest.update(f"{name}\n{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def statements(source: str) -> str:
    """Python source without its comments, docstrings and blank lines outside of texts, otherwise as it was typed.

    The text is cut instead of printing the syntax tree, because every Python release prints a tree in another way.
    """
    lines, in_text = source.splitlines(), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
        elif token.type in _TEXTS:
            in_text.update(range(token.start[0], token.end[0]))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for row in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[row - 1] = ""
                in_text.discard(row)
    return "\n".join(line.rstrip() for row, line in enumerate(lines, 1) if line.strip() or row in in_text)
