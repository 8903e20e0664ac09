"""Code: functions with documentation (CodeSearchNet), programming problems with solutions (APPS, CodeContests).

Every pair gives a direct item (text → code) and an inverse one (code → text); the source's `shares` weight them.
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flacuna_jax.data.files import DataFiles, Place
from flacuna_jax.data.formats import BadRecord
from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import MixtureSource
from flacuna_jax.flan_mini.items import Item, hash64
from flacuna_jax.flan_mini.readers.common import Items, Reader, attempt, each, filled, find_training, optional, text_of

LANGUAGE_NAMES = {
    "python": "Python",
    "python2": "Python 2",
    "cpp": "C++",
    "java": "Java",
    "javascript": "JavaScript",
    "go": "Go",
    "php": "PHP",
    "ruby": "Ruby",
}

# CodeSearchNet: the names of the original jsonl, and those of the version on the Hub.
_CSN_CODE = ("code", "whole_func_string", "func_code_string", "original_string")
_CSN_DOC = ("docstring", "func_documentation_string")
_CSN_SPLIT = ("partition", "split_name")
_CSN_COLUMNS = (*_CSN_CODE, *_CSN_DOC, *_CSN_SPLIT, "language", "func_name")


def _read_code_search_net(source: MixtureSource, path: Path, policy: BadRecordPolicy) -> Items:
    return each(path, _CSN_COLUMNS, policy, partial(_function, source))


def _function(source: MixtureSource, _: Place, record: Mapping[str, Any]) -> Iterator[Item]:
    language = text_of(record, "language").lower()
    if language not in LANGUAGE_NAMES:
        raise BadRecord("unknown programming language", f"language {language!r}")
    if (optional(record, *_CSN_SPLIT) or "train") != "train" or not _wanted(source, language):
        return
    docstring = filled(text_of(record, *_CSN_DOC), "documentation")
    code = filled(without_docstring(text_of(record, *_CSN_CODE), docstring), "code")
    fields = {
        "language": LANGUAGE_NAMES[language],
        "docstring": inspect.cleandoc(docstring),
        "code": code,
        "name": optional(record, "func_name") or "",
    }
    yield Item("code_search", "code_from_text", fields, "direct")
    yield Item("code_search", "text_from_code", fields, "inverse")


def without_docstring(code: str, docstring: str) -> str:
    """A Python function without its docstring, so that neither direction of the pair reveals the answer."""
    for quotes in ('"""', "'''"):
        pattern = rf"\n[ \t]*[rRuU]?{quotes}\s*{re.escape(docstring.strip())}\s*{quotes}[ \t]*(?=\n|$)"
        stripped, count = re.subn(pattern, "", code, count=1)
        if count:
            return stripped
    return code


def _wanted(source: MixtureSource, language: str) -> bool:
    return not source.languages or language in source.languages


def _problem_items(
    source: MixtureSource, task: str, problem: Mapping[str, str], solutions: Sequence[tuple[str, str]]
) -> Iterator[Item]:
    """Items of one problem with its (language, code) solutions; the choice of solutions depends on their content."""
    distinct = {(language, code.strip()) for language, code in solutions if code.strip() and _wanted(source, language)}
    chosen = sorted(distinct, key=lambda pair: hash64(*pair))[: source.max_solutions]
    family = "program_synthesis_with_starter" if problem["starter"] else "program_synthesis"
    for language, code in chosen:
        fields = {**problem, "language": LANGUAGE_NAMES[language], "solution": code}
        yield Item(task, family, fields, "direct")
        yield Item(task, "program_to_problem", fields, "inverse")


_APPS_COLUMNS = ("problem_id", "question", "solutions", "starter_code", "difficulty")


def _find_apps(source: MixtureSource) -> DataFiles:
    """The question.txt files of a source in APPS' directory layout, or else its jsonl or parquet files."""
    root = Path(source.path)
    questions = tuple(sorted(root.rglob("question.txt"))) if root.is_dir() else ()
    training = tuple(file for file in questions if "test" not in file.relative_to(root).parts)
    if not questions:
        return find_training(source)
    if not training:
        raise UserError(f"{root}: there are only test problems")
    return DataFiles(training, tuple(str(f.relative_to(root)) for f in questions if f not in set(training)))


def _read_apps(source: MixtureSource, path: Path, policy: BadRecordPolicy) -> Items:
    if path.name == "question.txt":
        return _read_apps_directory(source, path.parent, policy)
    return each(path, _APPS_COLUMNS, policy, partial(_apps_row, source))


def _read_apps_directory(source: MixtureSource, directory: Path, policy: BadRecordPolicy) -> Items:
    policy.report.read += 1
    place = Place(directory, 1, 0)
    for item in attempt(policy, directory, lambda: list(_apps_row(source, place, _apps_files(directory)))):
        yield place, item


def _apps_files(directory: Path) -> dict[str, str]:
    """A problem's files as the fields of a row; raises BadRecord if one cannot be read."""
    record = {}
    names = {"question": "question.txt", "solutions": "solutions.json", "starter_code": "starter_code.py"}
    for field, name in names.items():
        if (directory / name).is_file():
            try:
                record[field] = (directory / name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise BadRecord("unreadable file", f"{name} cannot be read: {error}") from None
    return record


def _apps_row(source: MixtureSource, _: Place, record: Mapping[str, Any]) -> Iterator[Item]:
    text = optional(record, "solutions")
    if not text:
        return  # some APPS problems have no solution
    try:
        solutions = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord("unreadable solutions", f"'solutions' is not a JSON list of programs: {error}") from None
    if not isinstance(solutions, list) or not all(isinstance(program, str) for program in solutions):
        raise BadRecord("unreadable solutions", "'solutions' is not a JSON list of programs")
    problem = {
        "problem": filled(text_of(record, "question"), "question"),
        "starter": (optional(record, "starter_code") or "").strip("\n"),
    }
    yield from _problem_items(source, "apps", problem, [("python", program) for program in solutions])


_CONTEST_LANGUAGES = {1: "python2", 2: "cpp", 3: "python", 4: "java"}
_CONTEST_COLUMNS = ("name", "description", "solutions")


def _read_code_contests(source: MixtureSource, path: Path, policy: BadRecordPolicy) -> Items:
    return each(path, _CONTEST_COLUMNS, policy, partial(_contest, source))


def _contest(source: MixtureSource, _: Place, record: Mapping[str, Any]) -> Iterator[Item]:
    solutions = record.get("solutions") or []
    if isinstance(solutions, Mapping):
        languages, programs = solutions.get("language"), solutions.get("solution")
        if not isinstance(languages, list) or not isinstance(programs, list) or len(languages) != len(programs):
            raise BadRecord(
                "unreadable solutions", "'solutions' must have lists language and solution of the same length"
            )
        pairs = list(zip(languages, programs, strict=True))
    elif isinstance(solutions, list) and all(isinstance(entry, Mapping) for entry in solutions):
        pairs = [(entry.get("language"), entry.get("solution")) for entry in solutions]
    else:
        raise BadRecord("unreadable solutions", "'solutions' must be an object of lists, or a list of objects")
    # A prompt cannot name an unknown language (0).
    known = [(_CONTEST_LANGUAGES.get(language), code) for language, code in pairs if isinstance(code, str)]
    problem = {"problem": filled(text_of(record, "description"), "description"), "starter": ""}
    solved = [(language, code) for language, code in known if language]
    yield from _problem_items(source, "code_contest", problem, solved)


CODE_SEARCH_NET = Reader(find_training, _read_code_search_net)
APPS = Reader(_find_apps, _read_apps)
CODE_CONTESTS = Reader(find_training, _read_code_contests)
