"""Command lines: options, those that verbs share among them, overrides of settings, and number parsers for argparse's
`type`. Imports only the standard library, so that `--help` and mistyped options do not wait for JAX."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class _Paragraphs(argparse.HelpFormatter):
    """Fills each paragraph of the help text to the width of the terminal, and adds the default of every option that
    does not describe it itself."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(fill(paragraph, width, indent) for paragraph in text.split("\n\n"))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        none = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        return text if none or "default" in text else f"{text}; default: %(default)s"


class Parser(argparse.ArgumentParser):
    """Parses the options of a verb. For a mistyped option it prints one line that suggests the nearest one."""

    def __init__(self, verb: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(f"flacuna {verb}", description=description, epilog=epilog, formatter_class=_Paragraphs)
        self._given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def parse_with_overrides(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """Returns the options and the other arguments, which are `--section.key=value` overrides of a config."""
        options, overrides = self.parse_known_args(argv)
        for text in overrides:
            if self._nearest(text.partition("=")[0]):
                self.error(f"unrecognized arguments: {text}")
        return options, overrides

    def error(self, message: str) -> NoReturn:
        hints = [f"; write --config {text}" for text in self._given if text.endswith((".yaml", ".yml"))]
        if not message.endswith("required: --config"):
            hints = [f"; did you mean {near}?" for near in map(self._nearest, re.findall(r"--[\w-]+", message)) if near]
        self.exit(2, f"error: {message}{hints[0] if hints else ''} ({self.prog} --help lists all options)\n")

    def _nearest(self, option: str) -> str | None:
        """The known option nearest to an unknown one."""
        known = {name.replace("_", "-"): name for name in self._option_string_actions if name.startswith("--")}
        if option in known.values():
            return None
        near = difflib.get_close_matches(option.replace("_", "-"), known, n=1, cutoff=0.85)
        return known[near[0]] if near else None


class ShowText(argparse.Action):
    """An option that prints `text()` and exits, as --help does."""

    def __init__(self, option_strings: list[str], dest: str, text: Callable[[], str], help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)
        self._text = text

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(self._text())
        parser.exit()


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `inference.addressed_model` reads."""
    parser.add_argument("--run", metavar="DIR", help="a training run; uses its base and adapter")
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="a Hugging Face LLaMA directory, a converted one, a GGUF file, or hf:NAME[@REVISION][:FILE], instead of "
        "--run",
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="a PEFT adapter for --model, also as hf:NAME[@REVISION], or the run that trained one",
    )


def add_dtype_option(add: Callable[..., object]) -> None:
    """Of verbs that answer; `inference.dtype_of` reads it."""
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16; on a CPU whichever it multiplies faster")


def add_template_option(add: Callable[..., object]) -> None:
    add(
        "--template",
        metavar="NAME",
        help="name of a format, a .jinja file, checkpoint or auto; default: that of the run, else auto: that of the "
        "checkpoint, else vicuna_v1.1",
    )


def add_filter_options(add: Callable[..., object]) -> None:
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens; default: from all")
    add("--top-p", type=float, metavar="P", help="sample from the most likely tokens up to this sum; default: from all")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random numbers")


def add_base_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stored-base",
        action="store_true",
        help="use the stored weights of the base even if the run quantised them (model.quantization)",
    )


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers not below `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
        return int(text)

    return parse


def amount(text: str) -> float:
    """A number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
