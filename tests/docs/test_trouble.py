"""The messages on the page about errors are those of the code."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import flacuna_jax
from flacuna_jax.config.files import load_config
from flacuna_jax.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "trouble.md"
MESSAGES = re.findall(r"^```text\n(.*?)\n```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
SHORTEST = 8
"""Characters of a constant part of a message of the code that count as the same words."""

CONFIG = {"output_dir": "runs/x", "model": {"path": "models/x"}, "data": {"sources": [{"path": "x.json"}]}}
MISTAKES: dict[str, list[str] | None] = {
    "training.learning_rat is not a setting; did you mean training.learning_rate?": ["--training.learning_rat=1e-3"],
    "'--training.epochs=1.5': training.epochs: input should be a valid integer": ["--training.epochs=1.5"],
    "is not an override; write --section.key=value, for example --training.epochs=2": ["epochs=2"],
    "not valid YAML: mapping values are not allowed here": None,
    "fraction, sources or tasks is missing: there is nothing to evaluate": ["--evaluation.every_steps=5"],
}


def constant_parts() -> set[str]:
    """The constant parts of all texts in the code, without docstrings."""
    found = set()
    for path in Path(flacuna_jax.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found |= {line for line in node.value.splitlines() if len(line) >= SHORTEST}
    return found


PARTS = constant_parts()


def covered(message: str) -> float:
    """The part of a message's characters that the code has, word for word."""
    marked = set()
    for part in PARTS:
        for match in re.finditer(re.escape(part), message):
            marked |= set(range(*match.span()))
    return len(marked) / len(message)


def test_the_page_has_thirty_messages():
    assert len(MESSAGES) >= 30


@pytest.mark.parametrize("message", [text for text in MESSAGES if not any(words in text for words in MISTAKES)])
def test_the_code_can_print_a_message(message):
    """The rest of a message is values: names of files, numbers, lists."""
    assert covered(message) > 0.3, message


def test_other_words_are_noticed():
    assert covered("the length of this record is above the limit that the user has chosen") < 0.2


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_a_config_gives_its_message(message, tmp_path):
    assert any(message in text for text in MESSAGES)
    path = tmp_path / "config.yaml"
    overrides = MISTAKES[message]
    path.write_text("model: a: b" if overrides is None else yaml.safe_dump(CONFIG))
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(path, overrides or ())
