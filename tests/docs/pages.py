"""The pages of the documentation, and the commands and snippets on them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ENDS = {"|", "||", "&&", ";", ">", "&", "}"}


class Snippet(NamedTuple):
    page: str
    language: str
    text: str


class Command(NamedTuple):
    """A call of a verb, as written on a page."""

    place: str
    verb: str
    arguments: list[str]
    whole: bool = True
    """Whether it can be called as it is; in running text, an option may lack its value."""


def snippets(*languages: str) -> list[Snippet]:
    """The blocks of all pages in these languages."""
    found = [
        Snippet(str(page.relative_to(ROOT)), language, text)
        for page in PAGES
        for language, text in _BLOCK.findall(page.read_text(encoding="utf-8"))
    ]
    return [one for one in found if one.language in languages]


def commands() -> list[Command]:
    """Every call of a verb: in blocks of pages, in their text between backticks, and in the heads of configs."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for language, block in _BLOCK.findall(text) if language in ("bash", "") for line in _lines(block)]
        found += [one for line in lines for one in _calls(str(page.relative_to(ROOT)), line)]
        mentioned = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", _BLOCK.sub("", text))]
        found += [one._replace(whole=False) for code in mentioned for one in _calls(str(page.relative_to(ROOT)), code)]
    for config in sorted((ROOT / "configs").rglob("*.yaml")):
        lines = [line.lstrip("# ") for line in config.read_text().splitlines() if line.startswith("#   ")]
        found += [one for line in lines for one in _calls(f"configs/{config.name}", re.sub(r"\s{2,}.*", "", line))]
    return found


def _lines(block: str) -> Iterator[str]:
    """The lines of a block of shell commands, without continuations and comments."""
    for line in block.replace("\\\n", " ").splitlines():
        yield re.sub(r"\s+#.*", "", line).strip()


def _calls(place: str, line: str) -> Iterator[Command]:
    called = re.search(r"(?:^|\s)(?:flacuna |python -m flacuna_jax\.)(?=[a-z])(?!demo|cli)(.*)", line)
    if called is None:
        return
    words = shlex.split(called[1])
    end = next((index for index, word in enumerate(words) if word in _ENDS or word.startswith("[")), len(words))
    verb, *arguments = [word.rstrip(";") for word in words[:end]]
    if re.fullmatch("[a-z]+", verb) and "..." not in arguments:
        yield Command(place, verb, arguments)


def benchmarks() -> dict[str, set[str]]:
    """The options with which pages call each benchmark, by its file."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for called in re.findall(
            r"python (?:-m )?(benchmarks[./]\w+)(?:\.py)?([^`\n#|]*)", page.read_text(encoding="utf-8")
        ):
            file = f"{called[0].replace('.', '/')}.py"
            found.setdefault(file, set()).update(re.findall(r"--[\w-]+", called[1]))
    return found
