"""Command lines: what is mistyped ends with status 2, one line, and the option that it was meant for."""

import pytest

from flacuna_jax import export, generate, plan, prepare, train
from flacuna_jax.arguments import amount, whole
from flacuna_jax.errors import UserError


def test_what_is_a_number_is_taken() -> None:
    assert (whole(0)("0"), whole(1)("12"), amount("2.5"), amount("1e-3")) == (0, 12, 2.5, 1e-3)


@pytest.mark.parametrize(
    ("verb", "arguments", "says"),
    [
        (plan.main, ["--price", "nan"], "--price: 'nan' is not a number above 0"),
        (plan.main, ["--price", "-1"], "--price: '-1' is not a number above 0"),
        (plan.main, ["--examples", "0"], "--examples: '0' is not a whole number from 1 on"),
        (plan.main, ["--examples", "9" * 40], "is not a whole number from 1 on"),
        (prepare.main, ["--show", "-1"], "--show: '-1' is not a whole number from 0 on"),
        (prepare.main, ["--show", "²"], "--show: '²' is not a whole number from 0 on"),
        (export.main, ["--golden-tokens=-1"], "--golden-tokens: '-1' is not a whole number from 0 on"),
        (export.main, ["--shard-bytes", "0"], "--shard-bytes: '0' is not a whole number from 1 on"),
    ],
)
def test_what_is_none_is_named(verb, arguments, says, capsys) -> None:
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
def test_what_is_mistyped_gets_one_line_with_the_nearest(verb, arguments, says, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        verb(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("override", ["--seed=7", "--output_dir=x", "--lora=null", "--mesh={data: 4}"])
def test_settings_are_no_options(override, capsys) -> None:
    """A config that is not there is what is wrong with this command, not the setting."""
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
