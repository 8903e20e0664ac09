"""Command lines: a mistyped option exits with status 2 and one line that suggests the right option."""

import argparse
import importlib

import pytest

from flacuna_jax import export, generate, plan, prepare, train
from flacuna_jax.arguments import Parser, amount, whole
from flacuna_jax.cli import VERBS
from flacuna_jax.errors import UserError


def test_valid_numbers_are_accepted() -> None:
    assert (whole(0)("0"), whole(1)("12"), amount("2.5"), amount("1e-3")) == (0, 12, 2.5, 1e-3)


@pytest.mark.parametrize(
    ("verb", "arguments", "says"),
    [
        (plan.main, ["--price", "nan"], "--price: 'nan' is not a number above 0"),
        (plan.main, ["--price", "-1"], "--price: '-1' is not a number above 0"),
        (plan.main, ["--examples", "0"], "--examples: '0' is not a whole number >= 1"),
        (plan.main, ["--examples", "9" * 40], "is not a whole number >= 1"),
        (prepare.main, ["--show", "-1"], "--show: '-1' is not a whole number >= 0"),
        (prepare.main, ["--show", "²"], "--show: '²' is not a whole number >= 0"),
        (export.main, ["--golden-tokens=-1"], "--golden-tokens: '-1' is not a whole number >= 0"),
        (export.main, ["--shard-bytes", "0"], "--shard-bytes: '0' is not a whole number >= 1"),
    ],
)
def test_invalid_numbers_are_named(verb, arguments, says, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        verb(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "arguments", "says"),
    [
        (generate.main, ["--max_new_tokens", "5"], "did you mean --max-new-tokens?"),
        (generate.main, ["--temprature=1", "hi"], "did you mean --temperature?"),
        (train.main, ["--config", "c.yaml", "--check-determinism"], "did you mean --check_determinism?"),
        (train.main, ["my.yaml"], "--config; write --config my.yaml"),
        (plan.main, ["--config", "c.yaml", "--serch"], "did you mean --search?"),
    ],
)
def test_a_mistyped_option_gets_one_line_with_the_nearest(verb, arguments, says, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        verb(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_help_describes_every_option_and_its_default(verb) -> None:
    parser: Parser = importlib.import_module(f"flacuna_jax.{verb}").parser()
    formatter = parser._get_formatter()
    for action in parser._actions:
        described = formatter._expand_help(action) if action.help else ""
        assert described, f"{verb} {action.option_strings}"
        if action.default is not None and action.default is not False and action.default not in ([], argparse.SUPPRESS):
            assert "default: " in described, f"{verb} {action.option_strings}"


def test_a_default_of_zero_is_a_default() -> None:
    assert "seed of the random numbers; default: 0" in generate.parser().format_help()


@pytest.mark.parametrize("override", ["--seed=7", "--output_dir=x", "--lora=null", "--mesh={data: 4}"])
def test_overrides_are_not_taken_for_options(override, capsys) -> None:
    """The command fails because of the missing config, not because of the override."""
    for verb in (train.main, prepare.main, plan.main):
        with pytest.raises(UserError, match=r"c\.yaml does not exist"):
            verb(["--config", "c.yaml", override])


def test_help_has_paragraphs_as_wide_as_the_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 60
    assert "\n\nPrompts are arguments" in told
