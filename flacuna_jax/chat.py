"""`flacuna chat --run RUN`: a conversation in the terminal, with exactly the template of training.

Commands: /reset forgets the conversation, /system TEXT replaces the system text, /load ADAPTER switches the adapter
(/load alone removes it), /base toggles answers of the base model beside those of the tuned one, /task TEXT puts the
next questions into the paper's prompt for writing (/task alone ends this), /help, /quit.
"""

from collections.abc import Sequence

from flacuna_jax.arguments import (
    Parser,
    add_base_option,
    add_dtype_option,
    add_filter_options,
    add_model_options,
    add_template_option,
)
from flacuna_jax.cli import run_verb


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parser().parse_args(argv)
    from flacuna_jax.verbs import chat

    chat.run(arguments)
    return None


def parser() -> Parser:
    options = Parser("chat", __doc__)
    add = options.add_argument
    add_model_options(options)
    add("--beside-base", action="store_true", help="also print the answers of the base model")
    add("--system", help="system text, replaces that of the template")
    add("--task", help="definition of a task, for the paper's writing prompt that then wraps each question")
    add_template_option(add)
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="maximum length of an answer; default: 512, or half of the model's context if that is less",
    )
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    add_filter_options(add)
    add_dtype_option(add)
    add_base_option(options)
    return options


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
