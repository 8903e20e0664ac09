"""Commands of the pages against the parsers and the schema, their snippets against the code. test_start.py runs those
that need nothing from elsewhere."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import flacuna_jax
from flacuna_jax.arguments import Parser
from flacuna_jax.cli import VERBS
from flacuna_jax.config.data import SourceConfig
from flacuna_jax.config.files import load_config, parse_config, top_level_keys
from flacuna_jax.config.run import RunConfig
from flacuna_jax.data.formats import read_source
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import FlanMiniConfig
from flacuna_jax.paper.settings import ExperimentSettings
from tests.docs.pages import PAGES, ROOT, Command, Snippet, benchmarks, commands, snippets

COMMANDS = commands()
SMALLEST = {"output_dir": "runs/x", "model": {"path": "models/x"}, "data": {"sources": [{"path": "x.json"}]}}
WITH_OVERRIDES = ("train", "prepare", "plan")


def name(one: Command | Snippet) -> str:
    text = f"{one.verb} {' '.join(one.arguments)}" if isinstance(one, Command) else one.text
    return f"{one[0]}-{text[:50]}"


def test_the_pages_have_commands():
    assert len(COMMANDS) > 80
    assert {one.verb for one in COMMANDS} == set(VERBS)


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.whole], ids=name)
def test_a_command_is_accepted(command, monkeypatch):
    """Its options and values by the parser, its settings by the schema, together with those of its config."""
    monkeypatch.chdir(ROOT)
    parser = parser_of(command.verb)
    if command.verb not in WITH_OVERRIDES:
        parser.parse_args(command.arguments)
        return
    if {"--settings", "--help"} & set(command.arguments):
        return
    options, overrides = parser.parse_with_overrides(command.arguments)
    if options.config is None:  # plan --calibrate
        return
    config = options.config if Path(options.config).is_file() else "configs/own_data.yaml"
    collection = not top_level_keys(config) & {"data", "model"}
    load_config(config, overrides, schema=FlanMiniConfig if collection else RunConfig)


@pytest.mark.parametrize("command", [one for one in COMMANDS if not one.whole], ids=name)
def test_an_option_in_running_text_exists(command):
    known = parser_of(command.verb)._option_string_actions
    given = [word.partition("=") for word in command.arguments if word.startswith("--")]
    settings = [f"{option}={value}" for option, _, value in given if option not in known]
    if settings:
        assert command.verb in WITH_OVERRIDES
        load_config(ROOT / "configs" / "own_data.yaml", settings)


def parser_of(verb: str) -> Parser:
    return importlib.import_module(f"flacuna_jax.{verb}").parser()


@pytest.mark.parametrize("wrong", [["--confg", "configs/demo.yaml"], ["--config", "configs/demo.yaml", "--lora.rnk=3"]])
def test_a_mistake_on_a_page_would_be_found(wrong, monkeypatch):
    with pytest.raises((SystemExit, UserError)):
        test_a_command_is_accepted(Command("x", "train", wrong), monkeypatch)


FAMILIES = "docs/guides/collection.md"


@pytest.mark.parametrize("snippet", [one for one in snippets("yaml") if one.page != FAMILIES], ids=name)
def test_a_yaml_snippet_is_a_part_of_a_config(snippet):
    if snippet.page == "docs/guides/paper.md":
        base = ROOT / "configs" / "paper_135m" / "10m.yaml"
        overrides = [f"--{name}={json.dumps(value)}" for name, value in yaml.safe_load(snippet.text).items()]
        assert load_config(base, overrides, schema=ExperimentSettings).variants
        return
    whole = dict(SMALLEST)
    for section, settings in yaml.safe_load(snippet.text).items():
        whole[section] = {**whole.get(section, {}), **settings} if isinstance(settings, dict) else settings
    assert isinstance(parse_config(whole), RunConfig)


@pytest.mark.parametrize("snippet", snippets("python"), ids=name)
def test_a_python_snippet_imports_what_exists(snippet):
    for node in ast.walk(ast.parse(snippet.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flacuna_jax"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_records_of_the_guide_are_read(tmp_path):
    records = [one for one in snippets("json") if one.page == "docs/guides/own_data.md"]
    described = [one for one in records if "file_name" in one.text]
    assert len(records) == 3
    assert len(described) == 1
    for number, one in enumerate(records):
        directory = tmp_path / str(number)
        directory.mkdir()
        text = one.text
        if one in described:
            (directory / "dataset_info.json").write_text(text)
            text = json.dumps({"q": "What is the capital of France?", "a": "Paris."})
        path = directory / "my_records.jsonl"
        path.write_text(text)
        policy = BadRecordPolicy(SourceReport(str(path)), "error")
        ((_, conversation),) = read_source(SourceConfig(path=str(path)), policy, "answers")
        assert [turn.text for turn in conversation.turns] == ["What is the capital of France?", "Paris."]


PATH = re.compile(r"(?<![\w/.-])((?:docs|tests|configs|scripts|benchmarks|notebooks|flacuna_jax)/[\w./-]*\w)")
MADE = ("docs/results.md", "flacuna_jax/compiled", "flacuna_jax/runs", "flacuna_jax/copies")
"""Written by a program, in directories of the same names."""


def test_paths_on_pages_exist():
    texts = {page.name: re.sub(r"^```text.*?^```", "", page.read_text(), flags=re.M | re.S) for page in PAGES}
    found = [(page, path) for page, text in texts.items() for path in PATH.findall(text)]
    assert not [(page, path) for page, path in found if not _exists(path) and not re.search("VERB|DEVICE", path)]


def test_pages_that_the_code_names_exist():
    files = [
        file for folder in ("flacuna_jax", "configs", "benchmarks", "scripts") for file in (ROOT / folder).rglob("*")
    ]
    for file in files:
        if file.suffix in (".py", ".yaml", ".sh"):
            assert all(map(_exists, re.findall(r"\bdocs/[\w/]+\.md", file.read_text()))), file


def _exists(path: str) -> bool:
    made = path.startswith(MADE)
    return made or any((ROOT / candidate).exists() for candidate in (path, f"{path}.py"))


def test_the_package_exports_what_the_site_lists():
    assert all(getattr(flacuna_jax, exported) is not None for exported in flacuna_jax.__all__)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "options"), benchmarks().items())
def test_a_benchmark_has_the_options_of_the_pages(file, options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, file, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert options <= set(re.findall(r"--[\w-]+", done.stdout))
