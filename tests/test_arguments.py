"""Numbers on command lines: what is none of their kind ends with status 2, and the option's name."""

import pytest

from flacuna_jax import export, plan, prepare
from flacuna_jax.arguments import amount, whole


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
